//! The end of a step: `optimize.cu`.

use super::super::step::{Entry, Step};
use super::super::tests::random;
use super::{Emulator, SCHEDULES};
use crate::backend::{OptimizerStep, reference};
use crate::optim::Optimizer;

type SquaresKernel = unsafe extern "C" fn(*mut f64, *const Entry, u32, u64, u64);
type SumSquaresKernel =
    unsafe extern "C" fn(*mut f64, *mut u32, *const f64, u64, *const Entry, u32, u32, Step);
pub(super) type AdamWKernel =
    unsafe extern "C" fn(*const Entry, u32, u64, u64, *const f64, *mut u32, Step);

/// An update is that of the definition; above the limit there is none; and a trial changes nothing
/// and tells what the update leaves, NaN and infinity included.
#[test]
fn updates_are_those_of_the_definition_and_can_be_tried() {
    let Some(emulator) = Emulator::new("optimize") else { return };
    let squares: SquaresKernel = emulator.kernel("square_gradients");
    let sum_squares: SumSquaresKernel = emulator.kernel("sum_squares");
    let adamw: AdamWKernel = emulator.kernel("adamw");
    let lengths = [5003, 7, 4096];
    let with = |lr: f32, clip: f32, largest_gradient: f32| OptimizerStep {
        optimizer: Optimizer { clip, ..Optimizer::default() },
        lr,
        t: 3,
        seed: 0,
        loss_scale: 1.0,
        largest_gradient,
        annealing: 1.0,
    };
    // The norm of the gradients is some 55.
    for (case, (lr, clip, m_of_one, v_of_one, g_of_one)) in [
        (0.01, 20.0, 1.0f32, 1.0f32, 1.0f32),
        (3e38, 0.0, 1.0, 1.0, 1.0),
        (0.01, 0.0, 1.0, 1.0, 1e20),
        (0.01, 20.0, 3e37, 0.0, 0.0),
    ]
    .into_iter()
    .enumerate()
    {
        // A parameter, its moments, its gradient; a place in the rest of the first one is special.
        let host = lengths.map(|n| {
            let seed = n as u64;
            let mut all = [0, 1, 2, 3].map(|i| random(n, 10 * seed + i));
            all[2].iter_mut().for_each(|v| *v *= *v);
            if n == 5003 {
                (all[1][5001], all[2][5001], all[3][5001]) = (m_of_one, v_of_one, g_of_one);
            }
            all
        });
        let norm = host.iter().flat_map(|all| &all[3]).map(|g| f64::from(*g).powi(2)).sum::<f64>();
        let norm = norm.sqrt();
        for schedule in SCHEDULES {
            let mut device = host.clone();
            let mut copies = lengths.map(|n| vec![0u16; n]);
            let mut amax = [77u32; 3];
            let mut first_piece = 0;
            let table: Vec<Entry> = device
                .iter_mut()
                .zip(&mut copies)
                .zip(&mut amax)
                .enumerate()
                .map(|(i, (([param, m, v, gradient], copy), amax))| {
                    let len = param.len() as u64;
                    let pieces = len.div_ceil(4096);
                    first_piece += pieces;
                    Entry {
                        param: param.as_mut_ptr().addr() as u64,
                        copy: copy.as_mut_ptr().addr() as u64,
                        m: m.as_mut_ptr().addr() as u64,
                        v: v.as_mut_ptr().addr() as u64,
                        gradient: gradient.as_mut_ptr().addr() as u64,
                        len,
                        first_piece: first_piece - pieces,
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
                    }
                })
                .collect();
            let (mut sums, mut partials, mut clamped) = ([2.5, 0.0, 0.0], [0.0; 4], 6u32);
            let (sums, partials, clamped) =
                (&raw mut sums, partials.as_mut_ptr(), &raw mut clamped);
            let sums = sums.cast::<f64>();
            let entries = table.as_ptr();
            let run = |step: &OptimizerStep, trial: *mut u32| {
                let step = Step::new(step);
                // SAFETY: buffers are as long as the table and the grids say.
                unsafe {
                    // In parts, as where ranks own some each.
                    for (first, end) in [(0, 1), (1, 4)] {
                        emulator.run(schedule, [2, 1], 64, || {
                            squares(partials, entries, 3, first, end);
                        });
                    }
                    emulator.run(schedule, [1, 1], 1024, || {
                        sum_squares(sums, clamped, partials, 4, entries, 0, 3, step);
                    });
                    for (first, end) in [(0, 2), (2, 3), (3, 4)] {
                        emulator.run(schedule, [3, 1], 256, || {
                            adamw(entries, 3, first, end, sums, trial, step);
                        });
                    }
                }
            };
            // Above the limit: nothing.
            run(&with(lr, clip, 19.0), std::ptr::null_mut());
            let mut trial = [0u32; 9];
            // SAFETY: read between kernels.
            let found = unsafe { std::slice::from_raw_parts(sums, 3) };
            assert!((found[1].sqrt() / norm - 1.0).abs() < 1e-9 && found[2] == 6.0);
            let step = with(lr, clip, f32::INFINITY);
            run(&with(lr, clip, 19.0), trial.as_mut_ptr());
            assert_eq!((&device, amax, trial), (&host, [77; 3], [0; 9]), "{case}");
            // Tried, then done.
            run(&step, trial.as_mut_ptr());
            assert_eq!(device, host, "{case}");
            run(&step, std::ptr::null_mut());
            for (i, [p, m, v, _]) in device.iter().enumerate() {
                let bits = |x: &[f32]| x.iter().map(|x| x.abs().to_bits()).max().unwrap();
                // Which NaN it is does not matter.
                let is_same = |a: u32, b: u32| a == b || a.min(b) > 0x7f80_0000;
                for (k, x) in [p, m, v].into_iter().enumerate() {
                    assert!(is_same(trial[3 * i + k], bits(x)), "case {case}, {i}, {k}");
                }
                assert!(is_same(amax[i], bits(p)), "case {case}, {i}");
                let scale = if clip > 0.0 { f64::from(clip) / norm } else { 1.0 };
                for k in 0..p.len() {
                    let before = [0, 1, 2].map(|j| f64::from(host[i][j][k]));
                    let gradient = scale * f64::from(host[i][3][k]);
                    let exact = reference::adamw(before, gradient, i != 1, &step);
                    let ours = [p[k], m[k], v[k]];
                    if case > 0 && ours.iter().any(|x| !x.is_finite()) {
                        continue;
                    }
                    for (ours, exact) in ours.into_iter().zip(exact) {
                        let distance = (f64::from(ours) - exact).abs();
                        assert!(distance <= 1e-5 * (1.0 + exact.abs()), "{case}: {ours} {exact}");
                    }
                }
            }
            let is_finite = |i: usize| trial[i] < 0x7f80_0000;
            let expected =
                [[true; 3], [false, true, true], [true, true, false], [false, true, true]];
            assert_eq!([0, 1, 2].map(is_finite), expected[case], "case {case}");
        }
    }
}
