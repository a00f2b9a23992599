//! The end of a step.

use super::*;

/// Parameters in training.
pub(in crate::backend) struct Update<B: Harness> {
    params: Params<B>,
    /// First and second moments, laid out as the gradients.
    states: [B::F32; 2],
    gradients: Flat<B>,
    reduction: B::Reduction,
    workspace: B::Workspace,
}

/// Weights, first and second moments, and gradients of a parameter.
type Values = [Vec<f32>; 4];

/// Of several jobs and a rest, of less than a vector, and of whole ones.
const LENGTHS: [usize; 3] = [40_003, 7, 4096];

/// The second parameter does not decay.
pub(in crate::backend) fn some_values() -> [Values; 3] {
    std::array::from_fn(|i| {
        let values = |seed| random(LENGTHS[i], 10 * i as u64 + seed);
        [values(1), values(2), values(3).iter().map(|v| v * v).collect(), values(4)]
    })
}

/// The third step of an optimizer, without clipping.
pub(in crate::backend) fn step(kind: OptimizerKind) -> OptimizerStep {
    OptimizerStep {
        optimizer: Optimizer { clip: 0.0, ..Optimizer::new(kind) },
        lr: 0.01,
        t: 3,
        loss_scale: 0.25,
        largest_gradient: f32::INFINITY,
    }
}

impl<B: Harness> Update<B> {
    pub(in crate::backend) fn of(b: &B, values: &[Values], kind: OptimizerKind) -> Self {
        let all = |which: usize| values.iter().map(|of_one| &of_one[which][..]).collect::<Vec<_>>();
        let params = Params::of(b, &all(0));
        let optimizer = Optimizer::new(kind);
        Self {
            states: [1, 2].map(|which| Flat::of(b, &all(which)).buffer),
            gradients: Flat::of(b, &all(3)),
            reduction: cut(b, |arena| b.reduction(arena, &params.slots, &optimizer).unwrap()),
            workspace: workspace(b, Sequences { batch: 1, length: 1 }, 8, 1, 8, Precision::Bf16),
            params,
        }
    }

    fn add_losses(&mut self, b: &B, losses: &[f32], accumulate: bool) {
        let rows = losses.len();
        b.add_losses(&mut self.reduction, &f32_input(b, losses), rows, accumulate);
    }

    /// What a step works on, with what is kept besides.
    fn trained(&mut self) -> (Trained<'_, B>, &mut B::Reduction, &mut B::Workspace) {
        let trained = Trained {
            slots: &self.params.slots,
            weights: &mut self.params.weights,
            states: &mut self.states,
            gradients: &mut self.gradients.buffer,
        };
        (trained, &mut self.reduction, &mut self.workspace)
    }

    pub(in crate::backend) fn step(&mut self, b: &B, step: &OptimizerStep) -> StepSums {
        let (mut trained, reduction, workspace) = self.trained();
        b.reduce(workspace, reduction, &mut trained, step);
        b.update(reduction, &mut trained, step).unwrap()
    }

    /// What the step that `sums` were found for would leave.
    fn tried(&mut self, b: &B, step: &OptimizerStep, sums: &StepSums) -> Vec<Largest> {
        let (mut trained, reduction, _) = self.trained();
        let mut tried = Vec::new();
        let mut largest = |of_one| tried.push(of_one);
        b.try_update(reduction, &mut trained, step, sums, &mut largest).unwrap();
        tried
    }

    /// All parameters, each with its weights.
    pub(in crate::backend) fn parameters(
        &self,
        b: &B,
    ) -> impl Iterator<Item = (B::Param<'_>, Vec<f32>)> {
        (0..self.params.slots.len()).map(|i| (self.params.get(b, i), self.params.read(b, i)))
    }

    /// Weights and moments of each parameter.
    fn read(&self, b: &B) -> Vec<[Vec<f32>; 3]> {
        let weights = (0..self.params.slots.len()).map(|i| self.params.read(b, i));
        let [m, v] = self.states.each_ref().map(|state| self.gradients.read_from(b, state));
        let moments = m.into_iter().zip(v);
        weights.zip(moments).map(|(p, (m, v))| [p, m, v]).collect()
    }
}

pub(super) fn sums_of_losses<B: Harness>(backends: &[B]) {
    // Their sums are exact in any order.
    let losses: Vec<f32> = (0..1500).map(|i| 0.5 * i as f32).collect();
    each(backends, |b| {
        let mut update = Update::of(b, &some_values()[1..2], OptimizerKind::AdamW);
        for rows in [1usize, 3, 1500] {
            let sum = 0.25 * (rows * (rows - 1)) as f64;
            update.add_losses(b, &losses[..2], false);
            // An evaluation in between is none of the step's.
            let of_evaluation = f32_input(b, &losses[..rows]);
            let found = b.sum_losses(&mut update.reduction, &of_evaluation, rows).unwrap();
            assert_eq!(found, sum, "{}: {rows} losses", b.name());
            update.add_losses(b, &losses[..rows], true);
            let sums = update.step(b, &step(OptimizerKind::AdamW));
            assert_eq!(sums.losses, sum + 0.5, "{}: {rows} losses", b.name());
        }
    });
}

/// What a step leaves of parameter `i` by the definition of its optimizer, in f64.
fn twin(step: &OptimizerStep, i: usize, [p, m, v, g]: &Values, scale: f64) -> Vec<[f64; 3]> {
    let Optimizer { kind, beta2, epsilon, .. } = step.optimizer;
    let (beta2, epsilon) = (f64::from(beta2), f64::from(epsilon));
    let correction = 1.0 - beta2.powi(step.t as i32);
    // Of squared gradients to their corrected second moments (arXiv 2304.13013, algorithm 2).
    let ratio = |(v, g): (&f32, &f32)| {
        let square = (scale * f64::from(*g)).powi(2);
        let moment = (beta2 * f64::from(*v) + (1.0 - beta2) * square) / correction;
        square / moment.max(epsilon * epsilon)
    };
    let rms = (v.iter().zip(g).map(ratio).sum::<f64>() / g.len() as f64).sqrt();
    let lr = match kind {
        OptimizerKind::AdamW => step.lr,
        OptimizerKind::StableAdamW => (f64::from(step.lr) / rms.max(1.0)) as f32,
    };
    let step = OptimizerStep { lr, ..*step };
    let of_element = |k: usize| {
        let before = [p[k], m[k], v[k]].map(f64::from);
        reference::adamw(before, scale * f64::from(g[k]), i != 1, &step)
    };
    (0..g.len()).map(of_element).collect()
}

pub(super) fn optimizer_steps<B: Harness>(backends: &[B]) {
    let mut values = some_values();
    // Second moments that have not seen such gradients coming.
    values[2][2].iter_mut().for_each(|v| *v *= 1e-3);
    let squares = values.iter().flat_map(|[.., g]| f64s(g)).map(|g| g * g);
    let norm = squares.sum::<f64>().sqrt();
    let clips = [0.0, (0.5 * norm) as f32];
    for (kind, clip) in OptimizerKind::ALL.iter().flat_map(|kind| clips.map(|clip| (*kind, clip))) {
        let step = step(kind);
        let step = OptimizerStep { optimizer: Optimizer { clip, ..step.optimizer }, ..step };
        let scale = if clip == 0.0 { 1.0 } else { f64::from(clip) / norm };
        each(backends, |b| {
            let mut update = Update::of(b, &values, kind);
            let before = update.read(b);
            let name = format!("{}, {kind}", b.name());
            // Without a finite loss, or with a gradient above the limit, nothing moves.
            update.add_losses(b, &[1.0, f32::NAN], false);
            assert!(update.step(b, &step).losses.is_nan(), "{name}");
            update.add_losses(b, &[1.0, 3.0], false);
            let below = OptimizerStep { largest_gradient: (0.4 * norm) as f32, ..step };
            assert_eq!(update.step(b, &below).gradient_scale(&below), None, "{name}");
            assert!(update.read(b) == before, "{name}");

            let sums = update.step(b, &step);
            assert_eq!(sums.loss_and_norm(&step).0, 1.0, "{name}");
            let bound = b.bound(Of::GradientNorm, Precision::F32);
            assert!((sums.squares.sqrt() / norm - 1.0).abs() <= bound, "{name}");
            for (i, (ours, values)) in update.read(b).iter().zip(&values).enumerate() {
                let exact = twin(&step, i, values, scale);
                for (which, what) in ["weights", "m", "v"].iter().enumerate() {
                    let exact: Vec<f64> = exact.iter().map(|of_one| of_one[which]).collect();
                    within(b, &format!("{what} of {i} by {kind}"), &ours[which], &exact, 1e-6);
                }
            }
        });
    }
}

/// With second moments so large that no root mean square is above 1.
pub(super) fn rates_that_do_not_fall_give_the_bits_of_adamw<B: Harness>(backends: &[B]) {
    let mut values = some_values();
    values.iter_mut().flat_map(|[_, _, v, _]| v).for_each(|v| *v = 1e3 * (0.5 + *v));
    each(backends, |b| {
        let [stable, plain] = [OptimizerKind::StableAdamW, OptimizerKind::AdamW].map(|kind| {
            let mut update = Update::of(b, &values, kind);
            update.add_losses(b, &[1.0], false);
            for t in 3..8 {
                update.step(b, &OptimizerStep { t, ..step(kind) });
            }
            update.read(b)
        });
        assert!(stable == plain, "{}", b.name());
    });
}

/// What a trial says an update would leave is what it leaves, to the bit, NaN and infinity
/// included.
pub(super) fn tried_updates_are_the_updates<B: Harness>(backends: &[B]) {
    // Extreme values at a place that no vector and no job begins with, and which of weight and
    // moments stay finite of AdamW.
    let cases: [(&str, f32, [f32; 4], [bool; 3]); 6] = [
        ("ordinary", 0.01, [1.0, 1.0, 1.0, 1.0], [true; 3]),
        ("a large weight", 0.01, [3e38, 1.0, 1.0, 1.0], [true; 3]),
        ("a large moment", 0.01, [1.0, 3e37, 1.0, 1.0], [true; 3]),
        ("a tiny second moment", 0.01, [1.0, 3e37, 0.0, 0.0], [false, true, true]),
        ("a large gradient", 0.01, [1.0, 1.0, 1.0, 1e20], [true, true, false]),
        ("a large rate", 3e38, [1.0, 1.0, 1.0, 1.0], [false, true, true]),
    ];
    let kinds = OptimizerKind::ALL.into_iter();
    for (kind, (what, lr, extremes, finite)) in
        kinds.flat_map(|kind| cases.map(|case| (kind, case)))
    {
        let step = OptimizerStep { lr, ..step(kind) };
        let mut values = some_values();
        values[0].iter_mut().zip(extremes).for_each(|(values, extreme)| values[33_333] = extreme);
        each(backends, |b| {
            let what = format!("{}, {kind}, {what}", b.name());
            let mut update = Update::of(b, &values, kind);
            let before = update.read(b);
            update.add_losses(b, &[1.0], false);
            let below = OptimizerStep { largest_gradient: 1.0, ..step };
            let sums = update.step(b, &below);
            assert_eq!(sums.gradient_scale(&below), None, "{what}");
            let tried = update.tried(b, &step, &sums);
            assert!(update.read(b) == before, "{what}: a trial changes nothing");
            update.step(b, &step);
            assert_eq!(tried.len(), values.len(), "{what}");
            for (of_one, tried) in update.read(b).iter().zip(&tried) {
                let Largest { weight, states: [m, v] } = *tried;
                let tried = [weight, m, v];
                let amax = of_one.each_ref().map(|values| {
                    f32::from_bits(values.iter().map(|v| v.abs().to_bits()).max().unwrap())
                });
                assert_eq!(bits(&tried), bits(&amax), "{what}");
            }
            let Largest { weight, states: [m, v] } = tried[0];
            let found = [weight, m, v].map(f32::is_finite);
            assert!(kind != OptimizerKind::AdamW || found == finite, "{what}: {found:?}");
        });
    }
}
