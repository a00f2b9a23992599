//! AdamW with Q-Ramping: `optimize_ramping.cu`.

use super::super::step::{Entry, Step};
use super::super::tests::random;
use super::adamw::AdamWKernel;
use super::{Emulator, SCHEDULES};
use crate::backend::OptimizerStep;
use crate::backend::conformance::step;
use crate::optim::ramping::{Update, Weight};

/// Of two pieces, of less than a warp, and of a whole piece.
const LENGTHS: [usize; 3] = [5003, 7, 4096];

/// Twelve steps with intervals of all kinds of the first parameter, and none of the others, are
/// those of the scalar arithmetic to the bit; a trial before each stores nothing and tells the
/// largest.
#[test]
fn weights_ramp_up_as_defined() {
    let Some(emulator) = Emulator::new("optimize_ramping") else { return };
    let kernel: AdamWKernel = emulator.kernel("update_ramping");
    let intervals: Vec<f32> =
        (0..LENGTHS[0]).map(|i| [1.0, 6.0, 2.0, 10.0, 0.0, 3.0][i % 6]).collect();
    let start = LENGTHS.map(|n| {
        let [p, m, v] = [0, 1, 2].map(|k| random(n, 10 * n as u64 + k));
        let weight = |i| Weight { p: p[i], m: m[i], v: v[i] * v[i], count: 0.0, sum: 0.0 };
        (0..n).map(weight).collect::<Vec<_>>()
    });
    for schedule in SCHEDULES {
        let mut exact = start.clone();
        let mut device = start.each_ref().map(|weights| Buffers::of(weights));
        for t in 1..=12 {
            let step = OptimizerStep { t, ..step("adamw,ramping=10".parse().unwrap()) };
            let gradients = LENGTHS.map(|n| random(n, 100 * n as u64 + t));
            let mut first_piece = 0;
            let mut table = Vec::new();
            for (i, (of, g)) in device.iter_mut().zip(&gradients).enumerate() {
                let ramping = if i == 0 { of.ramping(&intervals) } else { [0; 3] };
                of.amax = 0;
                table.push(Entry {
                    param: of.p.as_mut_ptr().addr() as u64,
                    copy: of.copy.as_mut_ptr().addr() as u64,
                    m: of.m.as_mut_ptr().addr() as u64,
                    v: of.v.as_mut_ptr().addr() as u64,
                    gradient: g.as_ptr().addr() as u64,
                    len: g.len() as u64,
                    first_piece,
                    decays: u16::from(i != 1),
                    amax: std::ptr::from_mut(&mut of.amax).addr() as u64,
                    interval: ramping[0],
                    count: ramping[1],
                    sum: ramping[2],
                    ..bytemuck::Zeroable::zeroed()
                });
                first_piece += g.len().div_ceil(4096) as u64;
            }
            let (entries, sums) = (table.as_ptr(), [1.0, 4.0, 0.0]);
            let run = |trial: *mut u32, step: &OptimizerStep| {
                let (step, sums) = (Step::new(step), sums.as_ptr());
                emulator.run(schedule, [3, 1], 256, || {
                    // SAFETY: buffers are as long as the table and the grid say.
                    unsafe { kernel(entries, 3, 0, first_piece, sums, trial, step) };
                });
            };
            let before = device.clone();
            let mut trial = [0u32; 9];
            let below = OptimizerStep { largest_gradient: 1.9, ..step };
            run(std::ptr::null_mut(), &below);
            run(trial.as_mut_ptr(), &below);
            assert!(device == before && trial == [0; 9], "above the limit: nothing");
            run(trial.as_mut_ptr(), &step);
            assert!(device == before, "a trial stores nothing");
            run(std::ptr::null_mut(), &step);
            for (i, weights) in exact.iter_mut().enumerate() {
                let update = Update::new(&step, i != 1);
                for (k, weight) in weights.iter_mut().enumerate() {
                    let interval = if i == 0 { intervals[k] } else { 1.0 };
                    *weight = update.of(*weight, interval, gradients[i][k]);
                }
                let expected = Buffers::of(weights);
                assert!(device[i] == expected, "step {t}, {i}, {schedule:?}");
                let largest = |of: &dyn Fn(&Weight) -> f32| {
                    weights.iter().map(|weight| of(weight).abs().to_bits()).max()
                };
                let m = largest(&|weight| weight.m.abs().max(weight.sum.abs()));
                let exact = [largest(&|weight| weight.p), m, largest(&|weight| weight.v)];
                assert_eq!([0, 1, 2].map(|k| Some(trial[3 * i + k])), exact, "step {t}, {i}");
            }
        }
        assert!(exact[0].iter().any(|weight| weight.count == 2.0));
    }
}

/// What is kept of a parameter.
#[derive(Clone, PartialEq)]
struct Buffers {
    p: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
    count: Vec<f32>,
    sum: Vec<f32>,
    copy: Vec<u16>,
    amax: u32,
}

impl Buffers {
    fn of(weights: &[Weight]) -> Self {
        let all = |of: fn(&Weight) -> f32| weights.iter().map(of).collect::<Vec<_>>();
        let p = all(|weight| weight.p);
        let copy = p.iter().map(|p| half::bf16::from_f32(*p).to_bits()).collect();
        let amax = p.iter().map(|p| p.abs().to_bits()).max().unwrap_or(0);
        let [m, v] = [all(|weight| weight.m), all(|weight| weight.v)];
        Self {
            p,
            m,
            v,
            count: all(|weight| weight.count),
            sum: all(|weight| weight.sum),
            copy,
            amax,
        }
    }

    /// Addresses of what ramping keeps.
    fn ramping(&mut self, intervals: &[f32]) -> [u64; 3] {
        let kept = [intervals.as_ptr(), self.count.as_mut_ptr(), self.sum.as_mut_ptr()];
        kept.map(|from| from.addr() as u64)
    }
}
