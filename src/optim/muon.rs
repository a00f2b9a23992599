//! Muon (Keller Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024):
//! momentum of a matrix, orthogonalized. Weights W (outputs, inputs) of blocks' linear layers move by
//!
//! ```text
//! m = beta m + (1 - beta) g,  u = (1 - beta) g + beta m          (Nesterov's momentum)
//! X = u / (|u| + 1e-7), of the lower of u and u^T in rows        (Frobenius norm)
//! five times:  A = X X^T,  B = b A + c A A,  X = a X + B X
//! W = W (1 - rate wd) - rate sqrt(max(1, outputs / inputs)) X,   rate = ratio lr
//! ```
//!
//! and everything else by AdamW (`adamw.rs`) at the rate lr itself. The five steps, a quintic of the
//! singular values that leaves all of them at 0.68 to 1.21, are computed in bf16 with sums in f32:
//! u, and each A, A A, B, B X and X, are rounded to bf16. No second moment is kept of matrices. Those of
//! queries, keys and values are one matrix here, as the layer has it.
//!
//! AdamW is the library's: the reference has an epsilon of 1e-10 for it and does not clip, and here
//! both are as with AdamW alone. Of the length of gradients X keeps only how one step's compares with
//! the others' in the momentum.
//!
//! Two things make the bits the same on every instruction set, and the numbers finite for certain.
//! What lies 2^-50 below the norm and further is 0 in X, A and B: then no product and no sum of
//! theirs is below f32's ordinary numbers, and every product is exact, fused or not. It is far
//! below what bf16 makes of the largest. And the numbers of the last X are held within [`LARGEST`].
//!
//! NOTE: the bound is the definition's own with room for roundings. The norm is at most 1 in the
//! beginning, so singular values s are, too; the quintic leaves [0, 1.25] within [0, 1.2025]; and no
//! number of a matrix is larger than its largest singular value. What roundings add to these is, for
//! matrices of many rows, small by experience and not by proof (each is up to 2^-8 of a number, and
//! they could conspire in the norm as the root of the rows): so it is not relied upon.

use super::bounds::{FLOOR, MOST, SLACK};
use super::{Bounds, Definition, Error, Optimizer, OptimizerKind, OptimizerStep, Result, adamw};

pub(super) const DEFINITION: Definition = Definition {
    name: "muon",
    defaults: Optimizer { kind: OptimizerKind::Muon, ..adamw::DEFINITION.defaults },
    orthogonalizes: true,
    largest_gradient,
    after,
    ..adamw::DEFINITION
};

/// What `muon` updates the matrices of blocks with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Muon {
    /// `momentum=`: decay of the momentum.
    pub momentum: f32,
    /// `ratio=`: the rate of matrices, in learning rates, which are those of all else.
    pub ratio: f32,
}

impl Muon {
    /// The reference's: a rate of 0.02 where AdamW has 3e-4.
    pub(super) const USUAL: Self = Self { momentum: 0.95, ratio: 66.67 };

    /// Sets what a switch names; whether it is one of these.
    pub(super) fn set(&mut self, switch: &str, value: &str) -> Result<bool> {
        let value = value.trim();
        let number = |what| {
            let bad = |_| Error::invalid(what, format!("expected a number, got {value:?}"));
            value.parse().map_err(bad)
        };
        match switch {
            "momentum" => self.momentum = number("momentum")?,
            "ratio" => self.ratio = number("ratio")?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Writes those switches that are not the usual ones.
    pub(super) fn switches(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let usual = Self::USUAL;
        for (name, ours, usual) in
            [("momentum", self.momentum, usual.momentum), ("ratio", self.ratio, usual.ratio)]
        {
            if ours != usual {
                write!(f, ",{name}={ours}")?;
            }
        }
        Ok(())
    }
}

/// How often the quintic is applied.
pub(crate) const STEPS: usize = 5;

/// Its factors a, b and c: of s, s^3 and s^5.
pub(crate) const QUINTIC: [f32; 3] = [3.4445, -4.7750, 2.0315];

/// Added to the norm, so that of zeros there come zeros.
const EPSILON: f32 = 1e-7;

/// Above every number that the quintic leaves.
pub(crate) const LARGEST: f32 = 2.0;

/// Below this, numbers of X, A and B are 0.
const SMALLEST: f32 = 1.0 / (1u64 << 50) as f32;

/// The largest number of bf16.
const BF16_MAX: f32 = f32::from_bits(0x7f7f_0000);

/// To bf16, to nearest even; |x| at most [`BF16_MAX`].
#[inline(always)]
fn to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

/// As products take it: in bf16, and 0 where it is below [`SMALLEST`].
#[inline(always)]
pub(crate) fn rounded(x: f32) -> f32 {
    let x = to_bf16(x);
    if x.abs() < SMALLEST { 0.0 } else { x }
}

/// The arithmetic of momentum.
#[derive(Clone, Copy)]
pub(crate) struct Momentum {
    beta: f32,
    gradient_scale: f32,
}

impl Momentum {
    pub(crate) fn new(step: &OptimizerStep, gradient_scale: f32) -> Self {
        Self { beta: step.optimizer.muon.momentum, gradient_scale }
    }

    /// Momentum after a gradient, and u in bf16.
    #[inline(always)]
    pub(crate) fn of(&self, m: f32, g: f32) -> (f32, f32) {
        let gradient = g * self.gradient_scale;
        let m = adamw::mean(self.beta, m, self.beta, gradient);
        let u = adamw::mean(self.beta, m, self.beta, gradient);
        (m, to_bf16(u.clamp(-BF16_MAX, BF16_MAX)))
    }
}

/// What u is divided by, from the sum of its squares.
pub(crate) fn divisor(squares: f64) -> f32 {
    squares.sqrt() as f32 + EPSILON
}

/// X, which the five steps begin with.
#[inline(always)]
pub(crate) fn normalized(u: f32, divisor: f32) -> f32 {
    rounded(u / divisor)
}

/// B of an element of A and the same of A A; and the next X of X and B X.
#[inline(always)]
pub(crate) fn combined([of_x, of_product]: [f32; 2], x: f32, product: f32) -> f32 {
    rounded(of_x * x + of_product * to_bf16(product))
}

/// The arithmetic of a matrix's weights.
#[derive(Clone, Copy)]
pub(crate) struct Movement {
    /// What weight decay leaves of a weight.
    pub(crate) keep: f32,
    /// What X is multiplied by.
    pub(crate) size: f32,
}

impl Movement {
    /// Of a matrix of `rows` outputs and `cols` inputs.
    pub(crate) fn new(step: &OptimizerStep, [rows, cols]: [usize; 2]) -> Self {
        let (rate, scale) = (rate(step), (rows as f64 / cols as f64).max(1.0).sqrt());
        Self { keep: adamw::keep(step, rate), size: (f64::from(rate) * scale) as f32 }
    }

    /// A weight after the update.
    #[inline(always)]
    pub(crate) fn of(&self, p: f32, x: f32) -> f32 {
        let x = if x.is_nan() { 0.0 } else { x.clamp(-LARGEST, LARGEST) };
        p * self.keep - self.size * x
    }
}

fn rate(step: &OptimizerStep) -> f32 {
    step.optimizer.muon.ratio * step.lr
}

/// More than the root of outputs to inputs of any matrix: a bound that needs no shapes, and is as
/// good, for what AdamW may add is far more.
const TALLEST: f64 = (1u64 << 32) as f64;

/// The largest weight that a matrix may have after an update.
fn largest_weight(bounds: &Bounds, step: &OptimizerStep) -> f64 {
    let rate = rate(step);
    let keep = f64::from(adamw::keep(step, rate).abs()).max(1.0);
    bounds.weight * keep + f64::from(rate) * TALLEST * f64::from(LARGEST)
}

fn largest_gradient(bounds: &Bounds, step: &OptimizerStep) -> f32 {
    // NOTE: a comparison with NaN is false.
    match largest_weight(bounds, step) <= MOST {
        true => (adamw::DEFINITION.largest_gradient)(bounds, step),
        false => -1.0,
    }
}

/// Momentum is a mean as first moments are.
fn after(bounds: &Bounds, step: &OptimizerStep, gradient: f32) -> Bounds {
    let of_others = (adamw::DEFINITION.after)(bounds, step, gradient);
    let of_matrices = (largest_weight(bounds, step) * SLACK).max(FLOOR);
    Bounds { weight: of_others.weight.max(of_matrices), ..of_others }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scale(exponents: std::ops::Range<f64>) -> impl Strategy<Value = f32> {
        exponents.prop_map(|exponent| 10f64.powf(exponent) as f32)
    }

    fn step(optimizer: Optimizer, lr: f32) -> OptimizerStep {
        let largest_gradient = f32::INFINITY;
        let (seed, loss_scale, annealing) = (0, 1.0, 1.0);
        OptimizerStep { optimizer, lr, t: 3, seed, loss_scale, largest_gradient, annealing }
    }

    fn any_step() -> impl Strategy<Value = OptimizerStep> {
        let momentum = prop_oneof![Just(0.0f32), Just(1.0f32.next_down()), 0.0f32..0.9999];
        let ratio = prop_oneof![Just(0.0f32), Just(66.67), scale(-3.0..38.5)];
        let weight_decay = prop_oneof![Just(0.0), scale(-3.0..38.5)];
        (scale(-8.0..38.5), momentum, ratio, weight_decay).prop_map(
            |(lr, momentum, ratio, weight_decay)| {
                let muon = Muon { momentum, ratio };
                step(Optimizer { muon, weight_decay, clip: 0.0, ..DEFINITION.defaults }, lr)
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        /// Within the limit that bounds give, all stays finite and within the next bounds, whatever
        /// X is and however tall a matrix.
        #[test]
        fn bounds_vouch_for_updates(
            step in any_step(),
            weight in scale(-40.0..37.5),
            state in scale(-40.0..37.5),
            part in -1.0f32..=1.0,
            x in prop_oneof![Just(f32::NAN), Just(f32::INFINITY), -3.0f32..3.0],
            exponents in (0u32..31, 0u32..31),
        ) {
            let bounds = Bounds { weight: weight.into(), states: [state.into(), FLOOR] };
            let limit = bounds.largest_gradient(&step);
            if limit < 0.0 {
                return Ok(());
            }
            let gradient = limit * part;
            let next = bounds.after(&step, gradient.abs());
            for m in [state, -state] {
                let (m, u) = Momentum::new(&step, 1.0).of(m, gradient);
                prop_assert!(f64::from(m.abs()) <= next.states[0], "{m} {next:?} {step:?}");
                prop_assert!(u.is_finite(), "{u} {step:?}");
            }
            let movement = Movement::new(&step, [1 << exponents.0, 1 << exponents.1]);
            for p in [weight, -weight] {
                let p = movement.of(p, x);
                prop_assert!(p.is_finite(), "{p} {step:?}");
                prop_assert!(f64::from(p.abs()) <= next.weight, "{p} {next:?} {step:?}");
            }
        }
    }

    #[test]
    fn the_quintic_leaves_what_is_below_its_bound() {
        let [a, b, c] = QUINTIC.map(f64::from);
        let of = |s: f64| s * (a + b * s * s + c * s.powi(4));
        let largest = (0..=12_500).map(|i| of(f64::from(i) * 1e-4)).fold(0.0, f64::max);
        assert!(largest <= 1.2025 && largest < f64::from(LARGEST), "{largest}");
        // From a hundredth of the norm on, five steps come to the plateau.
        let after = |s: f64| (0..STEPS).fold(s, |s, _| of(s));
        let all = || (100..=10_000).map(|i| after(f64::from(i) * 1e-4));
        assert!(all().all(|s| (0.68..1.2025).contains(&s)), "{:?}", all().reduce(f64::min));
    }

    #[test]
    fn numbers_are_rounded_to_bf16_and_the_smallest_to_zero() {
        let drawn = (0..100_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b1)));
        for x in drawn.filter(|x| x.abs() < 3e38) {
            let expected = half::bf16::from_f32(x).to_f32();
            assert_eq!(to_bf16(x), expected, "{x:e}");
            let expected = if expected.abs() < SMALLEST { 0.0 } else { expected };
            assert_eq!(rounded(x), expected, "{x:e}");
        }
        assert_eq!(SMALLEST, 2f32.powi(-50));
        // What bf16 cannot hold is its largest.
        let (m, u) = Momentum { beta: 0.0, gradient_scale: 1.0 }.of(0.0, -f32::MAX);
        assert_eq!((m, u), (-f32::MAX, -BF16_MAX));
        assert_eq!(normalized(0.0, divisor(0.0)), 0.0);
    }
}
