//! StableAdamW (arXiv 2304.13013, algorithm 2): AdamW whose rate falls for a parameter whose
//! gradients are larger than its second moments have seen coming, instead of clipping by the global
//! norm:
//!
//! ```text
//! RMS = sqrt(mean over the parameter of g^2 / max(u, epsilon^2)),  rate = lr / max(1, RMS)
//! ```
//!
//! u is the corrected second moment after the update. All else is AdamW's: its states, its update
//! at that rate (which decay takes, too), and, because no rate is above the schedule's, its bounds.
//!
//! NOTE: RMS is 1 in the first step and never above 1 / sqrt(1 - beta2), which is 4.47 for 0.95:
//! what there is to gain shows with a beta2 of 0.98 and above.

use super::{Definition, Optimizer, OptimizerKind, OptimizerStep, adamw};

pub(super) const DEFINITION: Definition = Definition {
    name: "stable-adamw",
    defaults: Optimizer {
        kind: OptimizerKind::StableAdamW,
        clip: 0.0,
        ..adamw::DEFINITION.defaults
    },
    ..adamw::DEFINITION
};

/// The arithmetic of a parameter's mean square, of every optimizer that has second moments.
#[derive(Clone, Copy)]
pub(crate) struct Ratio {
    kept2: f32,
    beta2: f32,
    epsilon: f32,
    root: f32,
    gradient_scale: f32,
    clipped: [f32; 2],
}

impl Ratio {
    pub(crate) fn new(step: &OptimizerStep, gradient_scale: f32) -> Self {
        let Optimizer { beta2, epsilon, .. } = step.optimizer;
        let kept2 = if step.starts_again() { 0.0 } else { beta2 };
        let (root, clipped) = (adamw::root(step), [f32::INFINITY, 1.0]);
        Self { kept2, beta2, epsilon, root, gradient_scale, clipped }
    }

    /// The same of a gradient whose elements beyond a limit are made smaller by a factor first.
    pub(crate) fn clipped(self, clipped: [f32; 2]) -> Self {
        Self { clipped, ..self }
    }

    /// g / max(sqrt(u), epsilon) of an element; its square may be beyond f32.
    #[inline(always)]
    pub(crate) fn of(&self, v: f32, g: f32) -> f32 {
        let gradient = adamw::clip(g, self.clipped) * self.gradient_scale;
        let v = adamw::mean(self.kept2, v, self.beta2, gradient * gradient);
        gradient / (v.sqrt() * self.root).max(self.epsilon)
    }
}

/// The rate of a parameter of `len` elements whose ratios have this sum of squares.
pub(crate) fn rate(lr: f32, squares: f64, len: usize) -> f32 {
    let rms = (squares / len as f64).sqrt();
    (f64::from(lr) / rms.max(1.0)) as f32
}

#[cfg(test)]
mod tests {
    use super::adamw::Update;
    use super::*;

    fn step(t: u64, kind: OptimizerKind) -> OptimizerStep {
        let optimizer = Optimizer::new(kind);
        let largest_gradient = f32::INFINITY;
        let (seed, loss_scale, annealing) = (0, 1.0, 1.0);
        OptimizerStep { optimizer, lr: 0.01, t, seed, loss_scale, largest_gradient, annealing }
    }

    fn rate_of(step: &OptimizerStep, v: &[f32], g: &[f32]) -> f32 {
        let ratio = Ratio::new(step, 1.0);
        let squares = v.iter().zip(g).map(|(v, g)| f64::from(ratio.of(*v, *g)).powi(2)).sum();
        rate(step.lr, squares, g.len())
    }

    /// One step of a parameter; its rate.
    fn update(step: &OptimizerStep, p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) -> f32 {
        let rate = match step.optimizer.kind {
            OptimizerKind::StableAdamW => rate_of(step, v, g),
            _ => step.lr,
        };
        let update = Update::new(step, rate, true, 1.0);
        for i in 0..g.len() {
            (p[i], m[i], v[i]) = update.of(p[i], m[i], v[i], g[i]);
        }
        rate
    }

    /// Three steps computed in f64 by the definition with debiased betas.
    #[test]
    fn three_steps_are_those_of_the_definition() {
        let (mut p, mut m, mut v) = ([1.0f32, -0.5, 0.25, 2.0], [0.0; 4], [0.0; 4]);
        for (t, g, expected_rate, expected) in [
            (
                1,
                [0.1, -0.2, 0.3, 0.05],
                0.01,
                [0.989000001, -0.4895000005, 0.239750000333, 1.988000002],
            ),
            (
                2,
                [1.0, -2.0, 0.3, 0.0],
                0.00906910698454,
                [0.980872013062, -0.481825014406, 0.230463461811, 1.98004233627],
            ),
            (
                3,
                [0.1, 0.2, -0.3, 0.05],
                0.01,
                [0.973047271366, -0.475765530518, 0.227613072237, 1.96988405732],
            ),
        ] {
            let rate = update(&step(t, OptimizerKind::StableAdamW), &mut p, &mut m, &mut v, &g);
            assert!((f64::from(rate) / expected_rate - 1.0).abs() < 1e-6, "step {t}: rate {rate}");
            for (p, expected) in p.iter().zip(expected) {
                assert!((f64::from(*p) - expected).abs() < 3e-7, "step {t}: {p}, not {expected}");
            }
        }
    }

    #[test]
    fn the_first_step_has_the_whole_rate() {
        let g: Vec<f32> = (0..1000).map(|i| ((i * 37 % 101) as f32 - 50.0) * 1e-4).collect();
        for beta2 in [0.0, 0.95, 0.999] {
            let mut step = step(1, OptimizerKind::StableAdamW);
            step.optimizer.beta2 = beta2;
            let rate = rate_of(&step, &[0.0; 1000], &g);
            assert!((rate / step.lr - 1.0).abs() < 2e-7, "{beta2}: {rate}");
        }
    }

    /// A gradient a thousand times as long as those before moves a weight by 0.1 of the rate, where
    /// AdamW moves it by 0.45.
    #[test]
    fn a_spike_moves_weights_little() {
        let moved = [OptimizerKind::StableAdamW, OptimizerKind::AdamW].map(|kind| {
            let (mut p, mut m, mut v) = ([0.0f32; 64], [0.0; 64], [0.0; 64]);
            for t in 1..=200 {
                let sign =
                    |i: usize| if (t as usize * 7 + i * 5).is_multiple_of(3) { -1.0 } else { 1.0 };
                let size = if t == 200 { 1000.0 } else { 1.0 };
                let g: [f32; 64] = std::array::from_fn(|i| size * sign(i));
                let before = p;
                let mut step = step(t, kind);
                step.optimizer.weight_decay = 0.0;
                update(&step, &mut p, &mut m, &mut v, &g);
                if t == 200 {
                    let most = p.iter().zip(before).map(|(p, b)| (p - b).abs()).fold(0.0, f32::max);
                    return most / step.lr;
                }
            }
            unreachable!("the last step returns")
        });
        let [stable, plain] = moved;
        assert!((stable - 0.1).abs() < 0.01 && (plain - 0.45).abs() < 0.01, "{moved:?}");
    }

    /// Whatever the numbers, a rate is one: not NaN, not above the schedule's.
    #[test]
    fn rates_are_within_the_schedule() {
        let extremes = [0.0f32, 1e-45, 1e-30, 1e-8, 1.0, 1e19, 3e38];
        for epsilon in [f32::from_bits(1), 1e-30, 1e-8] {
            for (v, g) in extremes.iter().flat_map(|v| extremes.map(|g| (*v, g))) {
                let mut step = step(3, OptimizerKind::StableAdamW);
                step.optimizer.epsilon = epsilon;
                let rate = rate_of(&step, &[v], &[g]);
                assert!((0.0..=step.lr).contains(&rate), "{epsilon:e}, {v:e}, {g:e}: {rate}");
            }
        }
    }
}
