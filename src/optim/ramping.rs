//! Q-Ramping (TetraJet, arXiv 2502.20853): AdamW that updates weights less often whose numbers in 4
//! bits oscillate, each time by the mean of the gradients since the last.
//!
//! Before the first step of every period, steps of AdamW are made aside and undone. How far a
//! weight moved in them, dW, and what it is rounded to, dQ, say how often it is updated from then
//! on:
//!
//! ```text
//! R = dQ / (dW + 1e-8),  N = min(5 floor(R / 16) + 1, steps of a period)
//! ```
//!
//! and a step t with a gradient g is
//!
//! ```text
//! p = p (1 - lr wd),  n = n + 1,  s = s + g
//! where N divides n:
//!   m = beta1 m + (1 - beta1) s / n,  v = beta2 v + (1 - beta2) (s / n)^2
//!   p = p - lr n / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon),  n = s = 0
//! ```
//!
//! So with N = 1 it is AdamW. As in the authors' code t counts all steps, so that moments which
//! have seen fewer are corrected for less of their start, and a new N finds n and s as they are.
//!
//! NOTE: N and n are whole numbers in f32, where n / N is one, too, only if it is exactly: n is
//! below 2^24, so that other quotients are more than half of a last place away from whole ones.

use super::bounds::{FLOOR, MOST, SLACK};
use super::{
    Bounds, Definition, Error, Gradients, Master, Moments, Optimizer, OptimizerKind, OptimizerStep,
    Result, State, adamw,
};

/// Steps that are made aside.
pub(crate) const SIDE_STEPS: u64 = 30;

/// For every so many times as far as itself that its number moves, a weight is updated less often..
const RATIO: f32 = 16.0;
/// .. by so many steps.
const STEPS: f32 = 5.0;

/// The most steps of a period.
const LONGEST: u32 = 1 << 20;

/// AdamW, but for what is kept and how far it moves.
pub(super) const DEFINITION: Definition =
    Definition { states: &STATES, largest_gradient, after, ..adamw::DEFINITION };

/// What is kept of the parameters: the moments of AdamW, and of matrices of blocks N, n and s.
const STATES: [State; 5] = [
    adamw::STATES[0],
    adamw::STATES[1],
    State { name: "ramping_interval", what: "interval of updates", is_signed: false },
    State { name: "ramping_count", what: "number of gradients", is_signed: false },
    State { name: "ramping_sum", what: "sum of gradients", is_signed: true },
];

/// The number of the state that N is, and that of n.
pub(crate) const INTERVAL: usize = 2;
const COUNT: usize = 3;

/// Sets the period that a switch names.
pub(super) fn set(optimizer: &mut Optimizer, value: &str) -> Result<()> {
    let value = value.trim();
    let steps = value.parse().map_err(|_| {
        Error::invalid("ramping", format!("expected a whole number of steps, got {value:?}"))
    })?;
    optimizer.ramping = steps;
    if steps > 0 {
        optimizer.clip = 0.0;
    }
    check_kind(optimizer)
}

/// Checks what an optimizer that ramps up is set to.
pub(super) fn check(optimizer: &Optimizer) -> Result<()> {
    let Optimizer { ramping, clip, moments, master, gradients, .. } = *optimizer;
    if ramping == 0 {
        return Ok(());
    }
    check_kind(optimizer)?;
    if ramping > LONGEST {
        let message = format!("expected at most {LONGEST} steps, got {ramping}");
        return Err(Error::invalid("ramping", message));
    }
    if clip > 0.0 {
        let message = format!(
            "ramping adds up the gradients of several steps, each as it is; set 0, got {clip}"
        );
        return Err(Error::invalid("clip", message));
    }
    let (given, needed) = if moments != Moments::F32 {
        (format!("moments={moments}"), "moments=f32")
    } else if master != Master::F32 {
        (format!("master={master}"), "master=f32")
    } else if gradients != Gradients::F32 {
        (format!("gradients={gradients}"), "gradients=f32")
    } else {
        return Ok(());
    };
    let message = format!(
        "ramping follows how weights move and adds up their gradients, all of it in f32; use \
         {needed}, got {given}"
    );
    Err(Error::invalid("optimizer", message))
}

fn check_kind(optimizer: &Optimizer) -> Result<()> {
    let Optimizer { kind, ramping, .. } = *optimizer;
    if ramping == 0 || kind == OptimizerKind::AdamW {
        return Ok(());
    }
    let message = format!("it makes updates of adamw less frequent; use adamw, got {kind}");
    Err(Error::invalid("ramping", message))
}

/// N of a weight that moved by `moved` in all, and its number by `rounded_moved`, with periods of
/// so many steps.
pub(crate) fn interval(moved: f32, rounded_moved: f32, period: f32) -> f32 {
    let ratio = rounded_moved / (moved + 1e-8);
    ((ratio / RATIO).floor() * STEPS + 1.0).min(period)
}

/// A number of state `state` that no run with this optimizer has; None where all may be.
pub(crate) fn impossible(optimizer: &Optimizer, state: usize, values: &[f32]) -> Option<f32> {
    let most = match state {
        INTERVAL => f64::from(optimizer.ramping),
        // N divides a number of every period, so where a new one comes n is less than a period.
        COUNT => 2.0 * f64::from(optimizer.ramping) - 1.0,
        _ => return None,
    };
    let may_be = |v: f32| v.fract() == 0.0 && v >= 0.0 && f64::from(v) <= most;
    values.iter().copied().find(|v| !may_be(*v))
}

/// The arithmetic of an update of one parameter.
#[derive(Clone, Copy)]
pub(crate) struct Update(adamw::Update);

/// A weight and what is kept of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Weight {
    pub(crate) p: f32,
    pub(crate) m: f32,
    pub(crate) v: f32,
    /// n and s.
    pub(crate) count: f32,
    pub(crate) sum: f32,
}

impl Update {
    /// Of a parameter that `decays` or does not.
    pub(crate) fn new(step: &OptimizerStep, decays: bool) -> Self {
        Self(adamw::Update::new(step, step.lr, decays, 1.0))
    }

    /// A weight after a step with a gradient.
    #[inline(always)]
    pub(crate) fn of(&self, weight: Weight, interval: f32, g: f32) -> Weight {
        let Weight { p, m, v, count, sum } = weight;
        let (p, count, sum) = (self.0.decayed(p), count + 1.0, sum + g);
        let times = count / interval;
        if times != times.trunc() {
            return Weight { p, m, v, count, sum };
        }
        let (m, v) = self.0.of_moments(m, v, sum / count);
        Weight { p: self.0.moved(p, [m, v], count), m, v, count: 0.0, sum: 0.0 }
    }
}

/// How many times as far as in a step of AdamW a weight may move: n of a run is at most half of
/// this, and n of a file, which [`impossible`] has passed, less than all of it before it begins
/// again.
fn most_times(step: &OptimizerStep) -> f64 {
    4.0 * f64::from(step.optimizer.ramping)
}

/// As of AdamW, but that the bound of first moments is that of s, too, which one may become.
fn largest_gradient(bounds: &Bounds, step: &OptimizerStep) -> f32 {
    let size = f64::from(adamw::size(step, step.lr)) * most_times(step);
    let epsilon = f64::from(step.optimizer.epsilon);
    let factor = (1.0 / epsilon).max(size / epsilon).max(1.0);
    let most = (MOST - bounds.weight * adamw::largest_keep(step)) / (2.0 * factor);
    let [m, v] = bounds.states;
    let limit = (most.min(MOST.sqrt()) - m) / 2.0;
    // NOTE: a comparison with NaN is false.
    if limit >= 0.0 && v <= MOST && size <= MOST { limit as f32 } else { -1.0 }
}

/// What comes of s is a first moment's only gradient at most.
fn after(bounds: &Bounds, step: &OptimizerStep, gradient: f32) -> Bounds {
    let [m, v] = bounds.states;
    let m = ((m + f64::from(gradient)) * SLACK).max(FLOOR);
    let v = (v.max(m * m) * SLACK).max(FLOOR);
    let size = f64::from(adamw::size(step, step.lr)) * most_times(step);
    let moved = m * size / f64::from(step.optimizer.epsilon);
    let weight = ((bounds.weight * adamw::largest_keep(step) + moved) * SLACK).max(FLOOR);
    Bounds { weight, states: [m, v] }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn step(optimizer: Optimizer, lr: f32, t: u64) -> OptimizerStep {
        let largest_gradient = f32::INFINITY;
        let (seed, loss_scale, annealing) = (0, 1.0, 1.0);
        OptimizerStep { optimizer, lr, t, seed, loss_scale, largest_gradient, annealing }
    }

    fn adamw() -> Optimizer {
        "adamw,ramping=10".parse().unwrap()
    }

    const AT_REST: Weight = Weight { p: 0.0, m: 0.0, v: 0.0, count: 0.0, sum: 0.0 };

    #[test]
    fn a_weight_moves_as_in_the_authors_code() {
        let optimizer = Optimizer { beta2: 0.999, weight_decay: 0.0, ..adamw() };
        let mut weight = AT_REST;
        let mut found = Vec::new();
        for t in 1..=6u8 {
            let update = Update::new(&step(optimizer, 0.1, t.into()), true);
            weight = update.of(weight, 3.0, t.into());
            found.push(weight);
        }
        for (i, expected) in [(2, -0.191_644_078), (5, -0.389_445_604)] {
            assert!((f64::from(found[i].p) - expected).abs() < 1e-7, "{found:?}");
            assert_eq!([found[i].count, found[i].sum], [0.0; 2]);
        }
        assert_eq!([found[1].p, found[1].count, found[1].sum], [0.0, 2.0, 3.0]);
        assert_eq!([found[3].p, found[3].count, found[3].sum], [found[2].p, 1.0, 4.0]);
    }

    #[test]
    fn weights_whose_numbers_move_far_are_updated_less_often() {
        for (ratio, expected) in
            [(0.0, 1.0), (15.0, 1.0), (16.0, 6.0), (33.0, 11.0), (100.0, 31.0), (1e7, 500.0)]
        {
            assert_eq!(interval(0.5, 0.5 * ratio, 500.0), expected, "{ratio}");
        }
        // What rests, rests; what vanishes beside its number is updated least.
        assert_eq!(interval(0.0, 0.0, 500.0), 1.0);
        assert_eq!(interval(0.0, 1.0, 500.0), 500.0);
        assert_eq!(interval(f32::INFINITY, f32::INFINITY, 500.0), 500.0);
    }

    /// With an interval of 1, or of 0, as buffers begin, it is AdamW to the bit.
    #[test]
    fn every_step_is_one_of_adamw_where_nothing_oscillates() {
        let optimizer = adamw();
        for interval in [0.0, 1.0] {
            let (mut weight, mut plain) = (Weight { p: 0.3, ..AT_REST }, (0.3f32, 0.0, 0.0));
            for t in 1..50 {
                let (g, step) = ((t as f32).sin(), step(optimizer, 0.01, t));
                weight = Update::new(&step, true).of(weight, interval, g);
                let (p, m, v) = plain;
                plain = adamw::Update::new(&step, step.lr, true, 1.0).of(p, m, v, g);
                assert_eq!((weight.p, weight.m, weight.v), plain);
            }
        }
    }

    #[test]
    fn counts_are_divided_exactly() {
        let update = Update::new(&step(adamw(), 0.1, 1), true);
        for interval in [1u32, 2, 3, 6, 7, 11, 499, 500, 1_048_575, LONGEST] {
            let near = [1, 2, 3, 5, interval, interval + 1, 2 * interval - 1, 4 * LONGEST];
            for count in near.into_iter().flat_map(|n| [n, n / interval * interval]) {
                if count == 0 {
                    continue;
                }
                let weight = Weight { count: (count - 1) as f32, sum: 1.0, ..AT_REST };
                let is_updated = update.of(weight, interval as f32, 1.0).count == 0.0;
                assert_eq!(is_updated, count % interval == 0, "{count} {interval}");
            }
        }
    }

    #[test]
    fn what_does_not_go_with_it_is_refused_with_a_reason() {
        let refused = |optimizer: Optimizer| optimizer.validate().unwrap_err().to_string();
        let good = adamw();
        good.validate().unwrap();
        assert_eq!((good.ramping, good.clip), (10, 0.0));
        for (optimizer, part) in [
            (
                Optimizer { clip: 1.0, ..good },
                "clip: ramping adds up the gradients of several steps",
            ),
            (Optimizer { moments: Moments::Int8, ..good }, "use moments=f32, got moments=int8"),
            (Optimizer { master: Master::Split, ..good }, "use master=f32, got master=split"),
            (Optimizer { gradients: Gradients::Bf16, ..good }, "use gradients=f32, got gradients"),
            (Optimizer { ramping: LONGEST + 1, ..good }, "ramping: expected at most 1048576 steps"),
            (
                Optimizer { kind: OptimizerKind::StableAdamW, ..good },
                "ramping: it makes updates of adamw less frequent; use adamw, got stable-adamw",
            ),
        ] {
            let message = refused(optimizer);
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn numbers_that_no_run_has_are_found() {
        let optimizer = adamw();
        let found = |state, value| impossible(&optimizer, state, &[1.0, value]);
        for value in [0.0, 1.0, 10.0] {
            assert_eq!([2, 3].map(|state| found(state, value)), [None; 2]);
        }
        assert_eq!([2, 3].map(|state| found(state, 19.0)), [Some(19.0), None]);
        for value in [-1.0, 0.5, 20.0, 1e30] {
            assert_eq!([2, 3].map(|state| found(state, value)), [Some(value); 2]);
            assert_eq!([0, 1, 4].map(|state| found(state, value)), [None; 3]);
        }
    }

    /// A power of ten.
    fn scale(exponents: std::ops::Range<f64>) -> impl Strategy<Value = f32> {
        exponents.prop_map(|exponent| 10f64.powf(exponent) as f32)
    }

    fn steps() -> impl Strategy<Value = OptimizerStep> {
        let beta = || prop_oneof![Just(0.0f32), Just(1.0f32.next_down()), 0.0f32..0.9999];
        let rates = (scale(-8.0..38.5), prop_oneof![Just(0.0), scale(-3.0..38.5)]);
        let t = prop_oneof![1u64..5, 1u64..1_000_000];
        (rates, beta(), beta(), scale(-44.8..-0.1), t, 1u32..=LONGEST).prop_map(
            |((lr, weight_decay), beta1, beta2, epsilon, t, ramping)| {
                let optimizer = adamw();
                let optimizer =
                    Optimizer { ramping, beta1, beta2, epsilon, weight_decay, ..optimizer };
                step(optimizer, lr, t)
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        /// Within the limit that bounds give, all stays finite and within the next bounds, whatever
        /// has been added up and however many gradients of it.
        #[test]
        fn bounds_vouch_for_updates(
            step in steps(),
            bounds in (scale(-45.0..37.5), scale(-45.0..37.5), scale(-45.0..37.5)),
            parts in [-1.0f32..=1.0, -1.0f32..=1.0, 0.0f32..=1.0, -1.0f32..=1.0, 0.0f32..=1.0],
            intervals in prop::collection::vec(
                prop_oneof![Just(1.0f32), Just(2.0), Just(3.0), Just(1e6)], 8),
            gradients in
                prop::collection::vec(prop_oneof![Just(1.0f32), Just(-1.0), -1.0f32..1.0], 8),
        ) {
            let (weight, m, v) = bounds;
            let longest = step.optimizer.ramping;
            let count = (parts[4] * (2 * longest - 1) as f32).floor();
            let sum = if count == 0.0 { 0.0 } else { m * parts[3] };
            let [p, m_part, v_part] = [weight * parts[0], m * parts[1], v * parts[2]];
            let start = Weight { p, m: m_part, v: v_part, count, sum };
            let mut both = [start, start];
            let mut bounds = Bounds { weight: weight.into(), states: [m.into(), v.into()] };
            for (t, (part, interval)) in (step.t..).zip(gradients.into_iter().zip(intervals)) {
                let step = OptimizerStep { t, ..step };
                let limit = bounds.largest_gradient(&step);
                if limit < 0.0 || both.iter().any(|of| of.count + 1.0 > 4.0 * longest as f32) {
                    break;
                }
                let gradient = limit * part;
                let next = bounds.after(&step, gradient.abs());
                let most = [next.weight, next.states[0], next.states[1], next.states[0]];
                for (of_one, decays) in both.iter_mut().zip([false, true]) {
                    *of_one = Update::new(&step, decays).of(*of_one, interval, gradient);
                    let Weight { p, m, v, sum, .. } = *of_one;
                    for (x, most) in [p, m, v, sum].into_iter().zip(most) {
                        prop_assert!(x.is_finite(), "{x} {step:?}");
                        prop_assert!(f64::from(x.abs()) <= most, "{x} {next:?} {step:?}");
                    }
                }
                bounds = next;
            }
        }
    }

    /// Ordinary settings rarely need more than a first look.
    #[test]
    fn bounds_are_wide_enough_for_training() {
        let mut step = step("adamw,ramping=500".parse().unwrap(), 1e-3, 1);
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
