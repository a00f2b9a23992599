//! What is found of updates before they are made: `optimize_watch.cu`.

use super::super::step::{Entry, OfMoments, Step};
use super::super::tests::random;
use super::moments::Memory;
use super::{Emulator, SCHEDULES};
use crate::backend::conformance::{FORMS, loaded, step, stored};
use crate::backend::{Slot, StateLayout, UpdateSums};
use crate::optim::{Optimizer, OptimizerKind, ParamKind, stable_adamw};

type WatchKernel =
    unsafe extern "C" fn(*mut [f64; 2], *const Entry, *const f64, *const [f32; 6], Step, OfMoments);

/// Of three pieces and a rest that ends within a group, of less than a vector, and of whole pieces.
const LENGTHS: [usize; 3] = [13_003, 7, 4096];

#[test]
fn updates_are_watched() {
    let Some(emulator) = Emulator::new("optimize_watch") else { return };
    let watch: WatchKernel = emulator.kernel("watch_update");
    let kinds = [ParamKind::Matrix, ParamKind::Vector, ParamKind::Table];
    let slots: Vec<_> = std::iter::zip(kinds, LENGTHS)
        .enumerate()
        .map(|(index, (kind, len))| Slot { index, start: 0, len, rows: 1, kind })
        .collect();
    // Limit, factor of what is beyond it, factor of all, what is kept.
    let normals = [[0.5, 0.25, 2.0, 0.0, 0.0, 0.0]; 3];
    for (moments, beta2, master, gradients) in FORMS {
        let optimizer = Optimizer::new(OptimizerKind::AdamW);
        let step = step(Optimizer { moments, beta2, master, gradients, ..optimizer });
        let layouts = StateLayout::of_all(&slots, &step.optimizer, &(0..slots.len()), 128).unwrap();
        let narrow = kinds.map(|kind| gradients.are_in_bf16(kind));
        let values: [[Vec<f32>; 4]; 3] = std::array::from_fn(|i| {
            let mut all = [0, 1, 2, 3].map(|k| random(LENGTHS[i], 10 * i as u64 + k));
            all[2].iter_mut().for_each(|v| *v *= *v);
            if narrow[i] {
                all[3].iter_mut().for_each(|g| *g = half::bf16::from_f32(*g).to_f32());
            }
            all
        });
        for (schedule, normal) in SCHEDULES.into_iter().flat_map(|s| [(s, false), (s, true)]) {
            let mut one = Memory::of([&layouts[0], &layouts[1]], &values, master, narrow);
            let mut table = one.table();
            // As of a matrix of Muon.
            table[2].v = 0;
            let before = one.clone();
            let mut partials = [[[f64::NAN; 2]; 3]; 3];
            let (of_partials, sums) = (partials.as_mut_ptr().cast(), [1.0, 4.0, 0.0]);
            let of_normals = if normal { normals.as_ptr() } else { std::ptr::null() };
            let (of_kernel, of_moments) = (Step::new(&step), OfMoments::new(&step));
            let (entries, sums) = (table.as_ptr(), sums.as_ptr());
            emulator.run(schedule, [3, 3], 256, || {
                // SAFETY: buffers are as long as the table and the grid say.
                unsafe { watch(of_partials, entries, sums, of_normals, of_kernel, of_moments) };
            });
            assert!(one == before, "watching changes nothing");
            let [limit, shrink, scale, ..] = normals[0];
            let [clipped, scale] = if normal {
                [[limit, shrink], [scale; 2]]
            } else {
                [[f32::INFINITY, 1.0], [1.0; 2]]
            };
            let ratio = stable_adamw::Ratio::new(&step, scale[0]).clipped(clipped);
            for (i, (parts, [_, _, v, g])) in partials.iter().zip(&values).enumerate() {
                let place = &layouts[1].places[i];
                let v = loaded(place, true, &stored(place, true, v, None));
                let squares: f64 = g.iter().map(|g| f64::from(*g).powi(2)).sum();
                let ratios = v.iter().zip(g).map(|(v, g)| f64::from(ratio.of(*v, *g)).powi(2));
                let ratios: f64 = if i == 2 { 0.0 } else { ratios.sum() };
                let sum = |of: usize| parts.iter().map(|part| part[of]).sum::<f64>();
                let ours = UpdateSums { squares: sum(0), ratios: sum(1) };
                let what = format!("{}, {schedule:?}, {i}: {ours:?}", step.optimizer);
                assert!((ours.squares / squares - 1.0).abs() < 1e-12, "{what} {squares}");
                assert!((ours.ratios - ratios).abs() <= 1e-12 * ratios, "{what} {ratios}");
            }
        }
    }
}
