//! LayerNorm and RMSNorm: `norm.cu`.

use super::super::norm::{Backward, Normalize};
use super::super::quantize::Launch;
use super::{Emulator, Held, SCHEDULES};
use crate::backend::conformance::{f64s, random, rounded};
use crate::backend::{NormKind, Precision, reference};

const EPSILON: f32 = 1e-5;

fn near(what: &str, ours: &[f32], exact: &[f64], bound: f64) {
    let size = exact.iter().fold(1e-3f64, |size, v| size.max(v.abs()));
    assert_eq!(ours.len(), exact.len(), "{what}");
    for (i, (ours, exact)) in ours.iter().zip(exact).enumerate() {
        let off = (f64::from(*ours) - exact).abs();
        assert!(off <= bound * size, "{what}: {i}: {ours}, not {exact}");
    }
}

/// In every number of warps that share a row, and where rows are not aligned or too long for them.
/// RMSNorm looks at nothing that it does not have.
#[test]
fn norms_are_those_of_the_definition() {
    let Some(emulator) = Emulator::new("norm") else { return };
    let sizes = [[5, 24], [3, 33], [9, 1024], [5, 1032], [3, 2056], [2, 4104]];
    let cases = sizes.into_iter().flat_map(|size| {
        let kinds = [NormKind::Layer, NormKind::Rms].into_iter();
        kinds.flat_map(move |kind| [Precision::F32, Precision::Bf16].map(|to| (size, kind, to)))
    });
    for (case, ([rows, c], kind, precision)) in cases.enumerate() {
        let (schedule, number) = (SCHEDULES[case % SCHEDULES.len()], Held::name(precision));
        let (rms, what) = (kind == NormKind::Rms, format!("({rows}, {c}) {kind:?} {number}"));
        let bound = if precision == Precision::F32 { 1e-5 } else { 1e-2 };
        let of = |len, seed| rounded(&random(len, seed), precision);
        let [x, y, dy] = [1, 2, 3].map(|seed| of(rows * c, seed));
        let [w, b] = [4, 5].map(|seed| of(c, seed));
        let [mut held_x, mut held_y, mut held_dy, mut held_w, mut held_b] =
            [&x, &y, &dy, &w, &b].map(|values| Held::new(values, precision));
        let nan = vec![f32::NAN; rows * c];
        for adds in [false, true] {
            let [mut out, mut sum] = [&nan; 2].map(|values| Held::new(values, precision));
            let [mut mean, mut rstd] = [(); 2].map(|()| vec![f32::NAN; rows]);
            let mut amax = 0u32;
            let of_rows = Normalize {
                out: out.address(),
                sum: if adds { sum.address() } else { 0 },
                amax: &raw mut amax as u64,
                mean: if rms { 0 } else { mean.as_mut_ptr() as u64 },
                rstd: rstd.as_mut_ptr() as u64,
                x: held_x.address(),
                y: if adds { held_y.address() } else { 0 },
                w: held_w.address(),
                b: if rms { 0 } else { held_b.address() },
                rows: rows as u32,
                channels: c as u32,
                epsilon: EPSILON,
            };
            let launch = Launch { grid: [rows.div_ceil(8), 1, 1], block: 256, shared: 0 };
            let name = format!("normalize<{number},{adds},{rms}>");
            emulator.launch(schedule, &name, launch, of_rows);
            let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            let sums = rounded(&sums, precision);
            if adds {
                assert_eq!(sum.values(), sums, "{what}: sums");
            }
            let from = f64s(if adds { &sums } else { &x });
            let (exact, exact_mean, exact_rstd) =
                reference::norm_forward(kind, &from, &f64s(&w), &f64s(&b), EPSILON.into());
            near(&what, &out.values(), &exact, bound);
            near(&what, &rstd, &exact_rstd, 1e-5);
            if !rms {
                near(&what, &mean, &exact_mean, 1e-5);
            }
            assert_eq!(amax, out.amax(), "{what}: amax");
        }

        let [x64, dy64, w64] = [&x, &dy, &w].map(|values| f64s(values));
        let (_, mean, rstd) = reference::norm_forward(kind, &x64, &w64, &w64, EPSILON.into());
        let [mean, rstd] =
            [&mean, &rstd].map(|values| values.iter().map(|v| *v as f32).collect::<Vec<_>>());
        let mut dx = Held::new(&vec![1.0; rows * c], precision);
        let (parts, each) = (2, if rms { c } else { 2 * c });
        let (mut partial, mut amax) = (vec![f32::NAN; parts * each], 0u32);
        let of_rows = Backward {
            dx: dx.address(),
            amax: &raw mut amax as u64,
            partial: partial.as_mut_ptr() as u64,
            dy: held_dy.address(),
            x: held_x.address(),
            mean: if rms { 0 } else { mean.as_ptr() as u64 },
            rstd: rstd.as_ptr() as u64,
            w: held_w.address(),
            rows: rows as u32,
            channels: c as u32,
        };
        let launch = Launch { grid: [parts, 1, 1], block: 256, shared: 4 * each };
        emulator.launch(schedule, &format!("norm_backward<{number},{rms}>"), launch, of_rows);
        let (exact, dw, db) = reference::norm_backward(kind, &dy64, &x64, &w64, EPSILON.into());
        let exact: Vec<f64> = exact.iter().map(|v| v + 1.0).collect();
        near(&format!("{what}: dx"), &dx.values(), &exact, bound);
        assert_eq!(amax, dx.amax(), "{what}: amax of dx");
        let sums: Vec<f32> = (0..each).map(|i| partial[i] + partial[each + i]).collect();
        near(&format!("{what}: dw"), &sums[..c], &dw, 1e-5);
        if !rms {
            near(&format!("{what}: db"), &sums[c..], &db, 1e-5);
        }
    }
}
