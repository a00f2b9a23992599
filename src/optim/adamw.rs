//! AdamW (Loshchilov and Hutter, arXiv 1711.05101): Adam with weight decay outside of the moments.
//!
//! Moments are kept raw; what corrects them for their start at 0 are factors of the rate and of the
//! root, computed in f64, for beta^t is close to 1 for long.

use super::bounds::{FLOOR, MOST, SLACK};
use super::{
    Bounds, Definition, Gradients, Master, Moments, Muon, Normalization, Optimizer, OptimizerKind,
    OptimizerStep, State,
};

pub(super) const DEFINITION: Definition = Definition {
    name: "adamw",
    defaults: Optimizer {
        kind: OptimizerKind::AdamW,
        moments: Moments::F32,
        master: Master::F32,
        gradients: Gradients::F32,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        clip: 1.0,
        normalization: Normalization::USUAL,
        muon: Muon::USUAL,
        ramping: 0,
    },
    normalizes: false,
    orthogonalizes: false,
    states: &STATES,
    largest_gradient,
    after,
};

/// What is kept of the parameters.
pub(super) const STATES: [State; 2] = [
    State { name: "m", what: "first moment", is_signed: true },
    // Its root would be NaN, and no step done, for a reason that no setting can put right.
    State { name: "v", what: "second moment", is_signed: false },
];

/// The arithmetic of an update of one parameter, which is the same whether it is stored or tried.
#[derive(Clone, Copy)]
pub(crate) struct Update {
    /// Factors of moments: of what was kept, and of what comes.
    kept1: f32,
    kept2: f32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    size: f32,
    root: f32,
    keep: f32,
    gradient_scale: f32,
    /// Elements of a gradient beyond a limit are made smaller by a factor, before all are.
    clipped: [f32; 2],
}

impl Update {
    /// Of a parameter with this learning rate, which `decays` or does not.
    pub(crate) fn new(step: &OptimizerStep, rate: f32, decays: bool, gradient_scale: f32) -> Self {
        Self::with_size(step, [rate, size(step, rate)], decays, gradient_scale)
    }

    /// The same with this rate, and what it is with the correction for first moments.
    pub(crate) fn with_size(
        step: &OptimizerStep,
        [rate, size]: [f32; 2],
        decays: bool,
        gradient_scale: f32,
    ) -> Self {
        let Optimizer { beta1, beta2, epsilon, .. } = step.optimizer;
        let keep = if decays { keep(step, rate) } else { 1.0 };
        let [kept1, kept2] = if step.starts_again() { [0.0; 2] } else { [beta1, beta2] };
        let (root, clipped) = (root(step), [f32::INFINITY, 1.0]);
        Self { kept1, kept2, beta1, beta2, epsilon, size, root, keep, gradient_scale, clipped }
    }

    /// The same of a gradient whose elements beyond a limit are made smaller by a factor first.
    pub(crate) fn clipped(self, clipped: [f32; 2]) -> Self {
        Self { clipped, ..self }
    }

    /// A weight and its moments after the update.
    #[inline(always)]
    pub(crate) fn of(&self, p: f32, m: f32, v: f32, g: f32) -> (f32, f32, f32) {
        let (m, v) = self.of_moments(m, v, g);
        (self.moved(self.decayed(p), [m, v], 1.0), m, v)
    }

    /// What weight decay leaves of a weight.
    #[inline(always)]
    pub(super) fn decayed(&self, p: f32) -> f32 {
        p * self.keep
    }

    /// A weight moved by its moments, so many times as far as one update does.
    #[inline(always)]
    pub(super) fn moved(&self, p: f32, [m, v]: [f32; 2], times: f32) -> f32 {
        p - self.size * times * (m / (v.sqrt() * self.root + self.epsilon))
    }

    /// The moments alone.
    #[inline(always)]
    pub(crate) fn of_moments(&self, m: f32, v: f32, g: f32) -> (f32, f32) {
        let gradient = clip(g, self.clipped) * self.gradient_scale;
        let m = mean(self.kept1, m, self.beta1, gradient);
        (m, mean(self.kept2, v, self.beta2, gradient * gradient))
    }
}

/// An element of a gradient, made smaller by a factor where it is beyond a limit.
#[inline(always)]
pub(crate) fn clip(g: f32, [limit, shrink]: [f32; 2]) -> f32 {
    if g.abs() > limit { g * shrink } else { g }
}

/// A moment that takes in a number, of which it keeps so much, with its decay rate.
#[inline(always)]
pub(super) fn mean(kept: f32, moment: f32, beta: f32, new: f32) -> f32 {
    kept * moment + (1.0 - beta) * new
}

/// The learning rate with the correction for first moments that start at 0.
pub(crate) fn size(step: &OptimizerStep, rate: f32) -> f32 {
    (f64::from(rate) / correction(step, step.optimizer.beta1)) as f32
}

/// Factor of the root of second moments, which start at 0, too.
pub(crate) fn root(step: &OptimizerStep) -> f32 {
    (1.0 / correction(step, step.optimizer.beta2).sqrt()) as f32
}

/// What weight decay leaves of a weight.
pub(super) fn keep(step: &OptimizerStep, rate: f32) -> f32 {
    1.0 - rate * step.optimizer.weight_decay
}

pub(crate) fn correction(step: &OptimizerStep, beta: f32) -> f64 {
    1.0 - f64::from(beta).powf(step.age() as f64)
}

fn largest_gradient(bounds: &Bounds, step: &OptimizerStep) -> f32 {
    let (size, epsilon) = (f64::from(size(step, step.lr)), f64::from(step.optimizer.epsilon));
    // A first moment becomes itself, its quotient by at least epsilon, and that times the size.
    let factor = (1.0 / epsilon).max(size / epsilon).max(1.0);
    let most = (MOST - bounds.weight * largest_keep(step)) / (2.0 * factor);
    let [m, v] = bounds.states;
    // NOTE: a comparison with NaN is false.
    if m <= most && v <= MOST { most.min(MOST.sqrt()) as f32 } else { -1.0 }
}

/// No element of a gradient is larger than its norm, and a moment is a mean of what was there and
/// what came.
///
/// NOTE: but for clipping. Its factor may be so small that what is below f32's numbers rounds up to
/// the smallest of them, which is less than twice as much.
fn after(bounds: &Bounds, step: &OptimizerStep, gradient: f32) -> Bounds {
    let (gradient, [m, v]) = (2.0 * f64::from(gradient), bounds.states);
    let m = (m.max(gradient) * SLACK).max(FLOOR);
    let v = (v.max(gradient * gradient) * SLACK).max(FLOOR);
    let moved = m * f64::from(size(step, step.lr)) / f64::from(step.optimizer.epsilon);
    let weight = ((bounds.weight * largest_keep(step) + moved) * SLACK).max(FLOOR);
    Bounds { weight, states: [m, v] }
}

/// Largest factor that weight decay leaves of a weight; 1 for those that do not decay.
pub(super) fn largest_keep(step: &OptimizerStep) -> f64 {
    f64::from(keep(step, step.lr).abs()).max(1.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::optim::StepSums;

    /// A power of ten.
    fn scale(exponents: std::ops::Range<f64>) -> impl Strategy<Value = f32> {
        exponents.prop_map(|exponent| 10f64.powf(exponent) as f32)
    }

    fn step(lr: f32, t: u64, optimizer: Optimizer) -> OptimizerStep {
        OptimizerStep {
            optimizer,
            lr,
            t,
            seed: 0,
            loss_scale: 1.0,
            largest_gradient: f32::INFINITY,
            annealing: 1.0,
        }
    }

    fn steps() -> impl Strategy<Value = OptimizerStep> {
        let beta = || prop_oneof![Just(0.0f32), Just(1.0f32.next_down()), 0.0f32..0.9999];
        let rates = (scale(-8.0..38.5), prop_oneof![Just(0.0), scale(-3.0..38.5)]);
        let t = prop_oneof![1u64..5, 1u64..1_000_000];
        (rates, beta(), beta(), scale(-44.8..-0.1), t).prop_map(
            |((lr, weight_decay), beta1, beta2, epsilon, t)| {
                let kind = OptimizerKind::AdamW;
                step(
                    lr,
                    t,
                    Optimizer {
                        kind,
                        beta1,
                        beta2,
                        epsilon,
                        weight_decay,
                        clip: 0.0,
                        ..Optimizer::default()
                    },
                )
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        /// Within the limit that bounds give, all stays finite and within the next bounds.
        #[test]
        fn bounds_vouch_for_updates(
            step in steps(),
            bounds in (scale(-45.0..37.5), scale(-45.0..37.5), scale(-45.0..37.5)),
            parts in [-1.0f32..=1.0, -1.0f32..=1.0, 0.0f32..=1.0],
            gradients in
                prop::collection::vec(prop_oneof![Just(1.0f32), Just(-1.0), -1.0f32..1.0], 8),
        ) {
            let (weight, m, v) = bounds;
            let [mut p, mut first, mut second] = [weight * parts[0], m * parts[1], v * parts[2]];
            let mut bounds = Bounds { weight: weight.into(), states: [m.into(), v.into()] };
            for (t, part) in (step.t..).zip(gradients) {
                let step = OptimizerStep { t, ..step };
                let limit = bounds.largest_gradient(&step);
                if limit < 0.0 {
                    break;
                }
                let gradient = limit * part;
                let next = bounds.after(&step, gradient.abs());
                let [fixed, decayed] = [false, true].map(|decays| {
                    let update = Update::new(&step, step.lr, decays, 1.0);
                    update.of(p, first, second, gradient)
                });
                let most = [next.weight, next.states[0], next.states[1]];
                for (p, first, second) in [fixed, decayed] {
                    for (x, most) in [p, first, second].into_iter().zip(most) {
                        prop_assert!(x.is_finite(), "{x} {step:?}");
                        prop_assert!(f64::from(x.abs()) <= most, "{x} {next:?} {step:?}");
                    }
                }
                (p, first, second) = decayed;
                bounds = next;
            }
        }
    }

    /// The factor of clipping may lie below f32's ordinary numbers, where it is rounded by up to
    /// its half.
    #[test]
    fn bounds_vouch_for_gradients_that_are_clipped_to_almost_nothing() {
        for clip in [1e-3f32, 8e-8, 1e-7, 1.1e-7, 3e-7, 1e-6, 1e-30] {
            let off =
                Optimizer { beta1: 0.0, beta2: 0.0, weight_decay: 0.0, ..DEFINITION.defaults };
            let step = step(1.0, 1, Optimizer { clip, ..off });
            let squares = 1e38f32 as f64 * 1e38f32 as f64;
            let sums = StepSums { losses: 0.0, squares, raised_blocks: 0 };
            let update = Update::new(&step, step.lr, true, sums.gradient_scale(&step).unwrap());
            let (p, m, v) = update.of(0.0, 0.0, 0.0, 1e38);
            let next = Bounds { weight: 0.0, ..Bounds::NEW }.after(&step, sums.clipped_norm(&step));
            let [most_m, most_v] = next.states;
            let all = [(p, next.weight), (m, most_m), (v, most_v)];
            assert!(all.iter().all(|(x, most)| f64::from(x.abs()) <= *most), "{clip}: {all:?}");
        }
    }

    /// Ordinary settings never need more than a first look, and nothing is vouched for that is
    /// unknown.
    #[test]
    fn bounds_are_wide_enough_for_training() {
        let mut step = step(1e-3, 1, Optimizer { clip: 0.0, ..DEFINITION.defaults });
        let mut bounds = Bounds { weight: 1.0, ..Bounds::NEW };
        while step.t < 100_000 {
            assert!(bounds.largest_gradient(&step) > 1e9, "{bounds:?} {step:?}");
            bounds = bounds.after(&step, 10.0);
            step.t += 1;
        }
        assert!(Bounds::NEW.largest_gradient(&step) < 0.0);
        assert!(Bounds::UNKNOWN.largest_gradient(&step) < 0.0);
        assert!(bounds.largest_gradient(&OptimizerStep { lr: 3e38, ..step }) < 0.0);
    }
}
