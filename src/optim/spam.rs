//! Gradients that are normalized tensor by tensor before Adam sees them: Stable-SPAM (arXiv
//! 2502.17055) and its later form, GradientStabilizer.
//!
//! ```text
//! A  M = max |g|;  T = gamma3 T + (1 - gamma3) M;  limit = T / (1 - gamma3^k)
//!    where |g_i| > limit:  g_i = g_i / M limit
//! B  n = |g|;  mean = gamma1 mean + (1 - gamma1) n;  square = gamma2 square + (1 - gamma2) n^2
//!    g = g / n  mean / (1 - gamma1^k) / (sqrt(square / (1 - gamma2^k)) + epsilon)
//! C  every `reset` steps the moments start again from 0, and so does their correction
//! ```
//!
//! `stable-spam` counts k from the first step. `stable-spam-ref` is what the authors' code does: k
//! starts again with the moments, while T, mean and square do not, so that for hundreds of steps
//! behind a reset the limit is far too high. `gradstab` is B alone, without its corrections.
//!
//! With `s=cosine` beta1 and gamma1 are s times as large, where s = 1/2 + (1 + cos(pi t / (T + 1))) / 4
//! behind t of T steps. Corrections are those of means that have always decayed so.
//!
//! What is kept of a tensor is T, mean and the root of square, in f32: the square itself may be
//! beyond it.

use super::bounds::Bounds;
use super::{Definition, Normalization, Optimizer, OptimizerKind, OptimizerStep, adamw};

const DEFAULTS: Optimizer = Optimizer {
    kind: OptimizerKind::StableSpam,
    beta2: 0.999,
    clip: 0.0,
    ..adamw::DEFINITION.defaults
};

pub(super) const STABLE: Definition = Definition {
    name: "stable-spam",
    defaults: DEFAULTS,
    normalizes: true,
    largest_gradient,
    after,
    ..adamw::DEFINITION
};

pub(super) const REFERENCE: Definition = Definition {
    name: "stable-spam-ref",
    defaults: Optimizer { kind: OptimizerKind::StableSpamRef, ..DEFAULTS },
    ..STABLE
};

pub(super) const GRADSTAB: Definition = Definition {
    name: "gradstab",
    defaults: Optimizer {
        kind: OptimizerKind::GradStab,
        normalization: Normalization {
            gamma1: 0.6,
            gamma2: 0.999,
            gamma3: 0.0,
            reset: 0,
            anneals: false,
        },
        ..DEFAULTS
    },
    ..STABLE
};

/// Numbers that are kept of a tensor: T, mean, and the root of square.
pub(crate) const STATISTICS: usize = 3;

/// What a step's normalization is computed with, the same for all tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct Factors {
    pub(crate) gamma1: f64,
    pub(crate) gamma2: f64,
    pub(crate) gamma3: f64,
    /// What means are divided by, since they start at 0.
    pub(crate) correction1: f64,
    pub(crate) correction2: f64,
    /// 0 where gradients are not clipped.
    pub(crate) correction3: f64,
    pub(crate) epsilon: f64,
}

impl Factors {
    pub(crate) fn new(step: &OptimizerStep) -> Self {
        let Normalization { gamma1, gamma2, gamma3, reset, .. } = step.optimizer.normalization;
        let gamma1 = gamma1 * step.annealing;
        let k = match step.optimizer.kind {
            OptimizerKind::StableSpamRef => of_reference(step.t, reset.into()),
            _ => step.t,
        };
        let correction = |gamma: f64| 1.0 - gamma.powf(k as f64);
        let corrections = match step.optimizer.kind {
            OptimizerKind::GradStab => [1.0, 1.0, 0.0],
            _ => [gamma1, gamma2, gamma3].map(correction),
        };
        let [correction1, correction2, correction3] = corrections;
        let epsilon = step.optimizer.epsilon.into();
        Self { gamma1, gamma2, gamma3, correction1, correction2, correction3, epsilon }
    }

    /// A, with the largest magnitude: beyond which elements are clipped, and the factor of those.
    pub(crate) fn limit(&self, statistics: &mut [f32; STATISTICS], largest: f32) -> [f32; 2] {
        if self.correction3 == 0.0 {
            return [f32::INFINITY, 1.0];
        }
        let largest = f64::from(largest);
        let mean = self.gamma3 * f64::from(statistics[0]) + (1.0 - self.gamma3) * largest;
        statistics[0] = mean as f32;
        let limit = mean / self.correction3;
        [limit as f32, if largest > limit { (limit / largest) as f32 } else { 1.0 }]
    }

    /// B, with the sum of squares of clipped elements: the factor of all.
    pub(crate) fn scale(&self, statistics: &mut [f32; STATISTICS], squares: f64) -> f32 {
        let norm = squares.sqrt();
        let mean = self.gamma1 * f64::from(statistics[1]) + (1.0 - self.gamma1) * norm;
        let root = f64::from(statistics[2]);
        let square = self.gamma2 * (root * root) + (1.0 - self.gamma2) * squares;
        (statistics[1], statistics[2]) = (mean as f32, square.sqrt() as f32);
        if norm == 0.0 {
            return 1.0;
        }
        let length = mean / self.correction1 / ((square / self.correction2).sqrt() + self.epsilon);
        (length / norm) as f32
    }
}

/// The counter of the authors' code in step t before its reset.
fn of_reference(t: u64, reset: u64) -> u64 {
    if reset == 0 || t <= reset { t } else { (t - 1) % reset + 2 }
}

/// s behind so many of the schedule's steps.
pub(super) fn annealing(steps: u64, total_steps: u64) -> f64 {
    let part = steps.min(total_steps) as f64 / (total_steps as f64 + 1.0);
    0.5 + 0.25 * (1.0 + (std::f64::consts::PI * part).cos())
}

/// No normalized gradient of a tensor is longer, whatever the gradients were.
///
/// With weights w of the mean and u of the mean of squares, (sum w n)^2 is at most
/// sum(w^2 / u) sum(u n^2), a geometric series; and no correction makes it more than
/// 1 / (1 - gamma1) times as long. Where gamma1 falls, older norms have decayed by no more than what
/// it began with, and weigh no more than 1 less what it is.
fn longest(step: &OptimizerStep) -> f64 {
    let Normalization { gamma1, gamma2, .. } = step.optimizer.normalization;
    let series = (1.0 - gamma2) * (1.0 - gamma1 * gamma1 / gamma2);
    // Twice, for what f32 makes of the statistics and of gradients near its end.
    2.0 / series.sqrt()
}

/// The norm is that of gradients before they are normalized, and any will do, or none.
fn largest_gradient(bounds: &Bounds, step: &OptimizerStep) -> f32 {
    let largest = (adamw::DEFINITION.largest_gradient)(bounds, step);
    if f64::from(largest) >= longest(step) { f32::INFINITY } else { -1.0 }
}

fn after(bounds: &Bounds, step: &OptimizerStep, _: f32) -> Bounds {
    (adamw::DEFINITION.after)(bounds, step, longest(step) as f32)
}

#[cfg(test)]
mod tests {
    use super::adamw::Update;
    use super::*;

    fn step(t: u64, optimizer: Optimizer) -> OptimizerStep {
        let largest_gradient = f32::INFINITY;
        let (seed, loss_scale, annealing) = (0, 1.0, 1.0);
        OptimizerStep { optimizer, lr: 1e-3, t, seed, loss_scale, largest_gradient, annealing }
    }

    /// A tensor in training.
    struct One {
        p: Vec<f32>,
        m: Vec<f32>,
        v: Vec<f32>,
        statistics: [f32; STATISTICS],
    }

    impl One {
        fn new(len: usize) -> Self {
            let zeros = || vec![0.0; len];
            Self { p: zeros(), m: zeros(), v: zeros(), statistics: [0.0; STATISTICS] }
        }

        /// One step; the limit, and the length of the normalized gradient.
        fn step(&mut self, step: &OptimizerStep, g: &[f32]) -> [f32; 2] {
            let factors = Factors::new(step);
            let largest = g.iter().fold(0.0f32, |most, g| most.max(g.abs()));
            let clipped @ [limit, shrink] = factors.limit(&mut self.statistics, largest);
            let of_one = |g: &f32| if g.abs() > limit { g * shrink } else { *g };
            let squares: f64 = g.iter().map(|g| f64::from(of_one(g)).powi(2)).sum();
            let scale = factors.scale(&mut self.statistics, squares);
            let update = Update::new(step, step.lr, true, scale).clipped(clipped);
            for (i, g) in g.iter().enumerate() {
                (self.p[i], self.m[i], self.v[i]) = update.of(self.p[i], self.m[i], self.v[i], *g);
            }
            [limit, scale * squares.sqrt() as f32]
        }
    }

    fn close(ours: f32, exact: f64) -> bool {
        (f64::from(ours) - exact).abs() <= 1e-6 * exact.abs().max(1e-3)
    }

    /// Four steps with a reset in the third, of the authors' code and with a counter of its own.
    #[test]
    fn steps_are_those_of_the_authors_code() {
        let gradients = [[0.3, -0.4], [0.03, 0.04], [3.0, -0.4], [0.3, 0.4]];
        for (kind, last) in [
            (OptimizerKind::StableSpamRef, [1.918820030, 0.944383696, -0.003947, 0.001676]),
            (OptimizerKind::StableSpam, [0.960369905, 0.852710279, -0.003935, 0.001707]),
        ] {
            let mut optimizer = Optimizer { weight_decay: 0.0, ..Optimizer::new(kind) };
            optimizer.normalization.reset = 3;
            let mut one = One::new(2);
            for (i, (g, expected)) in gradients
                .iter()
                .zip([
                    [0.4, 1.0, -0.001, 0.001],
                    [0.219909955, 0.679981594, -0.001973, 0.001135],
                    [1.147533951, 0.866752740, -0.002973, 0.002135],
                    last,
                ])
                .enumerate()
            {
                let [limit, length] = one.step(&step(i as u64 + 1, optimizer), g);
                let [of_limit, of_length, x, y] = expected;
                assert!(close(limit, of_limit), "{kind}, step {}: limit {limit}", i + 1);
                assert!(close(length, of_length), "{kind}, step {}: length {length}", i + 1);
                let is_there = |p: f32, exact: f64| (f64::from(p) - exact).abs() < 6e-7;
                assert!(is_there(one.p[0], x) && is_there(one.p[1], y), "{kind}: {:?}", one.p);
            }
        }
    }

    #[test]
    fn gradstab_gives_gradients_these_lengths() {
        let optimizer = Optimizer::new(OptimizerKind::GradStab);
        let mut one = One::new(2);
        for (t, (norm, expected)) in
            (1..).zip([(0.5, 12.649111), (0.05, 8.814800), (50.0, 12.701597), (0.5, 7.750932)])
        {
            let [limit, length] = one.step(&step(t, optimizer), &[0.6 * norm, -0.8 * norm]);
            assert!(limit == f32::INFINITY && close(length, expected), "step {t}: {length}");
        }
    }

    /// Whatever gradients come, in the order that makes the most of it.
    #[test]
    fn no_gradient_is_longer_than_is_said() {
        for (kind, gammas) in [
            (OptimizerKind::StableSpam, [0.7, 0.9f64]),
            (OptimizerKind::StableSpamRef, [0.85, 0.99999]),
            (OptimizerKind::GradStab, [0.6, 0.999]),
        ] {
            let mut optimizer = Optimizer::new(kind);
            [optimizer.normalization.gamma1, optimizer.normalization.gamma2] = gammas;
            optimizer.normalization.reset = 7;
            let most = longest(&step(1, optimizer));
            let growths = [1e-3f32, 0.5, 1.0, 1.3, 10.0, 1e3].into_iter();
            for (growth, total_steps) in growths.flat_map(|g| [(g, 0), (g, 5), (g, 60)]) {
                let (mut one, mut norm) = (One::new(1), 1.0f32);
                for t in 1..60 {
                    let annealing =
                        if total_steps > 0 { annealing(t - 1, total_steps) } else { 1.0 };
                    let step = OptimizerStep { annealing, ..step(t, optimizer) };
                    let [_, length] = one.step(&step, &[norm]);
                    assert!(
                        f64::from(length) <= most,
                        "{kind}, {growth}, step {t}: {length} {most}"
                    );
                    norm = (norm * growth).clamp(1e-30, 1e30);
                }
            }
        }
    }

    #[test]
    fn decay_rates_fall_to_half_as_half_a_cosine_does() {
        let all = (0..=9).map(|t| annealing(t, 9)).collect::<Vec<_>>();
        assert!(all[0] == 1.0 && all.is_sorted_by(|a, b| a > b), "{all:?}");
        assert!((all[5] - 0.75).abs() < 1e-12 && (all[9] - 0.5122358709).abs() < 1e-9, "{all:?}");
        assert_eq!(annealing(50, 9), all[9]);
        let optimizer: Optimizer = "stable-spam,s=cosine".parse().unwrap();
        let (behind, s) = optimizer.annealed(5, 9);
        assert_eq!((behind.beta1, s), (0.9 * 0.75, all[5]));
        let mean = |annealing| Factors::new(&OptimizerStep { annealing, ..step(3, behind) });
        let of = mean(s);
        assert_eq!([of.gamma1, of.gamma2], [0.7 * s, 0.9]);
        assert!((of.correction1 - (1.0 - (0.7 * s).powi(3))).abs() < 1e-12);
        for other in ["stable-spam", "stable-spam,s=1", "adamw"] {
            let optimizer: Optimizer = other.parse().unwrap();
            assert_eq!(optimizer.annealed(5, 9), (optimizer, 1.0));
        }
    }

    #[test]
    fn counters_start_again_as_the_code_does() {
        let counted = |f: fn(u64, u64) -> u64| (1..=8).map(|t| f(t, 3)).collect::<Vec<_>>();
        assert_eq!(counted(of_reference), [1, 2, 3, 2, 3, 4, 2, 3]);
        assert_eq!(of_reference(9, 0), 9);
        let with = |t, reset| {
            let mut optimizer = Optimizer::new(OptimizerKind::StableSpam);
            optimizer.normalization.reset = reset;
            step(t, optimizer)
        };
        let ages = (1..=8).map(|t| with(t, 3).age()).collect::<Vec<_>>();
        assert_eq!(ages, [1, 2, 1, 2, 3, 1, 2, 3]);
        assert_eq!(with(9, 0).age(), 9);
        assert_eq!([2, 3, 6].map(|t| with(t, 3).starts_again()), [false, true, true]);
        assert!(!with(3, 0).starts_again());
        // Of an optimizer that does not normalize, the setting is not read.
        assert_eq!(step(9, Optimizer::default()).age(), 9);
    }
}
