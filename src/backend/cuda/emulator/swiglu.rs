//! SwiGLU and its gradient: `swiglu.cu`.

use super::{Emulator, Held, SCHEDULES};
use crate::backend::conformance::{f64s, random, rounded};
use crate::backend::{Precision, reference};

/// As the kernels are declared: to, amax, from, rows and M.
pub(super) type SwiGluKernel = unsafe extern "C" fn(u64, *mut u32, u64, u32, u32);

fn apply(
    (emulator, schedule): (&Emulator, (u32, u32)),
    name: &str,
    (to, from): (&mut Held, &mut Held),
    [rows, m]: [usize; 2],
) -> u32 {
    let kernel: SwiGluKernel = emulator.kernel(&format!("{name}<{}>", Held::name(to.precision)));
    let (mut amax, to, from) = (0, to.address(), from.address());
    let at_amax = &raw mut amax;
    emulator.run(schedule, [2, 1], 256, || {
        // SAFETY: buffers and grid are what the comment of the kernels asks for.
        unsafe { kernel(to, at_amax, from, rows as u32, m as u32) };
    });
    amax
}

/// Whole groups of columns and others.
#[test]
fn swiglu_is_that_of_the_definition() {
    let Some(emulator) = Emulator::new("swiglu") else { return };
    for (case, size @ [rows, m]) in [[3, 8], [70, 72], [5, 33], [1, 1]].into_iter().enumerate() {
        for precision in [Precision::F32, Precision::Bf16] {
            let of = (&emulator, SCHEDULES[case % SCHEDULES.len()]);
            let y: Vec<f32> = random(rows * 2 * m, 1).iter().map(|v| 4.0 * v).collect();
            let (y, d) = (rounded(&y, precision), rounded(&random(rows * m, 2), precision));
            let [mut held_y, mut held_d] = [&y, &d].map(|values| Held::new(values, precision));
            let mut out = Held::new(&vec![f32::NAN; rows * m], precision);
            let amax = apply(of, "swiglu_forward", (&mut out, &mut held_y), size);
            assert_eq!(amax, out.amax(), "{size:?}");
            let exact = reference::swiglu_forward(&f64s(&y), m);
            let bound = if precision == Precision::F32 { 1e-6 } else { 4e-3 };
            let near = |ours: &[f32], exact: &[f64]| {
                for (ours, exact) in ours.iter().zip(exact) {
                    let off = (f64::from(*ours) - exact).abs();
                    assert!(off <= bound * exact.abs().max(1.0), "{size:?}: {ours}, not {exact}");
                }
            };
            near(&out.values(), &exact);
            let amax = apply(of, "swiglu_backward", (&mut held_y, &mut held_d), size);
            assert_eq!(amax, held_y.amax(), "{size:?}");
            near(&held_y.values(), &reference::swiglu_backward(&f64s(&y), &f64s(&d), m));
        }
    }
}

/// To f32's accuracy relative to 1 or the gate, and no NaN that no NaN made.
#[test]
fn gates_of_any_size_are_finite() {
    let Some(emulator) = Emulator::new("swiglu") else { return };
    let mut gates: Vec<f32> = (-12_000..=12_000).map(|i| i as f32 * 1e-2).collect();
    gates.extend([1e-40, 1e-20, 88.5, 1e4, 1e20, 3e38].iter().flat_map(|v| [*v, -*v]));
    gates.extend([0.0, -0.0, f32::NAN]);
    let (of, rows) = ((&emulator, SCHEDULES[0]), gates.len());
    let y: Vec<f32> = gates.iter().flat_map(|gate| [*gate, 1.0]).collect();
    let mut y = Held::new(&y, Precision::F32);
    let [mut out, mut d] = [f32::NAN, 1.0].map(|v| Held::new(&vec![v; rows], Precision::F32));
    apply(of, "swiglu_forward", (&mut out, &mut y), [rows, 1]);
    apply(of, "swiglu_backward", (&mut y, &mut d), [rows, 1]);
    let gradients = y.values();
    let results = out.values().into_iter().zip(gradients.chunks(2));
    for (gate, (value, of_y)) in gates.iter().zip(results) {
        let (wide, all) = (f64::from(*gate), [value, of_y[0], of_y[1]]);
        if gate.is_nan() {
            assert!(all.iter().all(|v| v.is_nan()));
            continue;
        }
        let s = 1.0 / (1.0 + (-wide).exp());
        let slope = if s == 0.0 { 0.0 } else { s + wide * s * (1.0 - s) };
        for (ours, exact) in all.iter().zip([wide * s, slope, wide * s]) {
            let off = (f64::from(*ours) - exact).abs();
            assert!(off <= 5e-7 * wide.abs().max(1.0), "{gate}: {ours}, not {exact}");
        }
    }
}
