//! StableAdamW's kernels on the processor, against the arithmetic of `optim/` bit for bit: nothing
//! is contracted here, on a GPU it is.

use super::super::step::{Entry, Step};
use super::super::tests::random;
use super::adamw::AdamWKernel;
use super::{Emulator, SCHEDULES};
use crate::optim::StepSums;
use crate::optim::adamw::{self, Update};
use crate::optim::stable_adamw::{self, Ratio};
use crate::optim::{Optimizer, OptimizerKind, OptimizerStep};

type SquareRatios = unsafe extern "C" fn(*mut f64, *const Entry, u32, u64, *const f64, Step);
type FindRates = unsafe extern "C" fn(*mut [f32; 2], *const f64, *const Entry, f64, Step);
type StableAdamW =
    unsafe extern "C" fn(*const Entry, u32, u64, u64, *const f64, *const [f32; 2], *mut u32, Step);

#[test]
fn rates_and_updates_are_those_of_the_definition() {
    let Some(emulator) = Emulator::new("optimize") else { return };
    let square_ratios: SquareRatios = emulator.kernel("square_ratios");
    let find_rates: FindRates = emulator.kernel("find_rates");
    let plain: AdamWKernel = emulator.kernel("adamw");
    let stable: StableAdamW = emulator.kernel("stable_adamw");
    let lengths = [9001, 7, 4096];
    // Second moments as they are after ordinary steps, and so large that no rate falls.
    for (what, moment, clip) in [("falls", 1e-3, 0.0), ("falls", 1e-3, 60.0), ("stays", 1e3, 0.0)] {
        let host = lengths.map(|n| {
            let seed = n as u64;
            let [p, m, mut v, g] = [0, 1, 2, 3].map(|i| random(n, 10 * seed + i));
            v.iter_mut().for_each(|v| *v = moment * (0.5 + *v * *v));
            [p, m, v, g]
        });
        let optimizer = Optimizer { clip, ..Optimizer::new(OptimizerKind::StableAdamW) };
        let (lr, t, largest_gradient) = (0.01, 3, f32::INFINITY);
        let (seed, loss_scale, annealing) = (0, 1.0, 1.0);
        let step =
            OptimizerStep { optimizer, lr, t, seed, loss_scale, largest_gradient, annealing };
        let squares = host.iter().flat_map(|all| &all[3]).map(|g| f64::from(*g).powi(2)).sum();
        let found = StepSums { losses: 1.0, squares, raised_blocks: 0 };
        let scale = found.gradient_scale(&step).unwrap();
        for schedule in SCHEDULES {
            let (mut of_stable, mut of_plain) = (host.clone(), host.clone());
            let table = |all: &mut [[Vec<f32>; 4]; 3],
                         copies: &mut [Vec<u16>; 3],
                         amax: &mut [u32; 3]| {
                let mut first_piece = 0;
                let mut entries = Vec::new();
                for (i, ((all, copy), amax)) in all.iter_mut().zip(copies).zip(amax).enumerate() {
                    let [param, m, v, gradient] =
                        all.each_mut().map(|values| values.as_mut_ptr().addr() as u64);
                    let len = lengths[i] as u64;
                    entries.push(Entry {
                        param,
                        copy: copy.as_mut_ptr().addr() as u64,
                        m,
                        v,
                        gradient,
                        len,
                        first_piece,
                        decays: u16::from(i != 1),
                        narrow: 0,
                        element: [0; 2],
                        low: 0,
                        m_scales: 0,
                        v_scales: 0,
                        amax: std::ptr::from_mut(amax).addr() as u64,
                        interval: 0,
                        count: 0,
                        sum: 0,
                    });
                    first_piece += len.div_ceil(4096);
                }
                (entries, first_piece)
            };
            let mut copies = lengths.map(|n| vec![0u16; n]);
            let mut amax = [0u32; 3];
            let sums = [found.losses, found.squares, 0.0];
            let (mut partials, mut rates) = ([f64::NAN; 5], [[f32::NAN; 2]; 3]);
            let (entries, pieces) = table(&mut of_stable, &mut copies, &mut amax);
            assert_eq!(pieces, 5);
            let (entries, as_kernels) = (entries.as_ptr(), Step::new(&step));
            let (sums, correction) = (sums.as_ptr(), adamw::correction(&step, optimizer.beta1));
            let (partials, found_rates) = (partials.as_mut_ptr(), rates.as_mut_ptr());
            // SAFETY: buffers are as long as the table and the grids say.
            unsafe {
                emulator.run(schedule, [2, 1], 256, || {
                    square_ratios(partials, entries, 3, pieces, sums, as_kernels);
                });
                emulator.run(schedule, [3, 1], 256, || {
                    find_rates(found_rates, partials, entries, correction, as_kernels);
                });
                emulator.run(schedule, [2, 1], 256, || {
                    let none = std::ptr::null_mut();
                    stable(entries, 3, 0, pieces, sums, found_rates, none, as_kernels);
                });
            }
            let (entries, _) = table(&mut of_plain, &mut copies, &mut amax);
            let entries = entries.as_ptr();
            // SAFETY: as above.
            unsafe {
                emulator.run(schedule, [2, 1], 256, || {
                    plain(entries, 3, 0, pieces, sums, std::ptr::null_mut(), as_kernels);
                });
            }
            for (i, [p, m, v, g]) in host.iter().enumerate() {
                let ratio = Ratio::new(&step, scale);
                let ratios = v.iter().zip(g).map(|(v, g)| f64::from(ratio.of(*v, *g)).powi(2));
                let expected = stable_adamw::rate(lr, ratios.sum(), p.len());
                let [rate, size] = rates[i];
                assert!((rate / expected - 1.0).abs() < 2e-7, "{what} {i}: {rate}, {expected}");
                assert_eq!(rate < 0.9 * lr, what == "falls", "{what} {i}: {rate}");
                assert_eq!(size, adamw::size(&step, rate));
                let update = Update::new(&step, rate, i != 1, scale);
                for k in 0..p.len() {
                    let (p, m, v) = update.of(p[k], m[k], v[k], g[k]);
                    let [ours, our_m, our_v, _] = &of_stable[i];
                    assert_eq!([ours[k], our_m[k], our_v[k]], [p, m, v], "{what} {i}, {k}");
                }
            }
            assert_eq!(of_stable == of_plain, what == "stays", "{what}");
        }
    }
}
