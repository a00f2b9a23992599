//! exp, GELU and SiLU without branches, so that loops over them become vector code.
//!
//! Sums and products only, never fused: the same bits on every instruction set.

/// Lanes of the loops that `simd_fn!` compiles: one AVX-512 register of f32.
pub(super) const LANES: usize = 16;

/// e^x to about 1 ulp; 0 below -87.3 and e^88 above 88. NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts: the first has few bits, so that n * LN2_HIGH is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;

    let clamped = if x > 88.0 { 88.0 } else { x };
    let clamped = if clamped < -87.3 { -87.3 } else { clamped };
    let biased = clamped * LOG2_E + ROUND;
    let n = biased - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    // Taylor-like minimax polynomial of (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2 (Cephes, expf).
    let p = ((((1.987_569_1e-4 * r + 1.398_2e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r
        + 1.666_666_6e-1)
        * r
        + 0.5;
    let e_r = (p * (r * r) + r) + 1.0;
    // 2^n by its bits; the low bits of `biased` hold n.
    let two_n = f32::from_bits((biased.to_bits() << 23).wrapping_add(127 << 23));
    let result = if x < -87.3 { 0.0 } else { e_r * two_n };
    if x.is_nan() { x } else { result }
}

/// sqrt(2 / pi) and the cubic coefficient of the tanh form of GELU (Hendrycks and Gimpel, 2016).
const GELU_SCALE: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

/// GELU in its tanh form: x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3).
///
/// NOTE: computed as x / (1 + e^(-2 u)), the same function, which does not cancel for negative x.
#[inline(always)]
pub(super) fn gelu(x: f32) -> f32 {
    let u = GELU_SCALE * (x + GELU_CUBIC * x * x * x);
    x / (1.0 + exp(-2.0 * u))
}

/// The derivative of [`gelu`]: s + x s (1 - s) 2 u', with s = 1 / (1 + e^(-2 u)).
#[inline(always)]
pub(super) fn gelu_derivative(x: f32) -> f32 {
    let u = GELU_SCALE * (x + GELU_CUBIC * x * x * x);
    let slope = GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * x * x);
    let e = exp(-2.0 * u);
    let s = 1.0 / (1.0 + e);
    s + x * s * (e * s) * (2.0 * slope)
}

/// GELU itself: x P, with P the probability that a normal number is less than x.
#[inline(always)]
pub(super) fn exact_gelu(x: f32) -> f32 {
    let (p, _) = normal(x);
    x * p
}

/// The derivative of [`exact_gelu`]: P + x times the normal density at x.
#[inline(always)]
pub(super) fn exact_gelu_derivative(x: f32) -> f32 {
    const DENSITY: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
    let (p, e) = normal(x);
    p + DENSITY * x * e
}

/// SiLU, x / (1 + e^-x).
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// The derivative of [`silu`]: s + x s (1 - s), with s = 1 / (1 + e^-x).
///
/// NOTE: e s in the place of 1 - s, which would cancel. Where e overflows the clamp of `exp`, s is
/// so small that both terms are 0 to f32.
#[inline(always)]
pub(super) fn silu_derivative(x: f32) -> f32 {
    let e = exp(-x);
    let s = 1.0 / (1.0 + e);
    s + x * s * (e * s)
}

/// The probability that a normal number is less than x, to 2e-7, and e^(-x^2 / 2).
///
/// That of less than -|x| is e^(-x^2 / 2) t Q(t) with t = 1 / (1 + 0.35 |x|), where Q is smooth:
/// the polynomial of degree 8 that is nearest in relative error (3e-8) up to |x| = 14, where the
/// exponential is 0.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    const Q: [f32; 9] = [
        0.139_621_4,
        0.139_861_88,
        0.119_832_754,
        0.105_508_454,
        -0.023_110_922,
        0.159_175_77,
        -0.255_715_67,
        0.143_972_4,
        -0.029_146_073,
    ];
    let e = exp(-0.5 * (x * x));
    let t = 1.0 / (1.0 + 0.35 * x.abs());
    let mut q = Q[8];
    q = q * t + Q[7];
    q = q * t + Q[6];
    q = q * t + Q[5];
    q = q * t + Q[4];
    q = q * t + Q[3];
    q = q * t + Q[2];
    q = q * t + Q[1];
    q = q * t + Q[0];
    let tail = e * (t * q);
    (if x > 0.0 { 1.0 - tail } else { tail }, e)
}

/// Elements that long loops work on while they fetch the next ones.
///
/// NOTE: processors fetch ahead by themselves, but not past the end of a page, and some in virtual
/// machines hardly at all: asking took a quarter off GELU. Measured on a Xeon with AMX, 2026-11-24.
pub(super) const AHEAD: usize = 256;

/// Asks for as many elements again as `x` has, those right after it, which need not be anybody's.
#[inline(always)]
pub(super) fn prefetch_after(x: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..x.len()).step_by(LANES) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let line = x.as_ptr().wrapping_add(x.len() + at);
        // SAFETY: a hint, which touches nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

/// Sum of f over the elements of slices of one length: 16 partial sums, then pairwise. The order is
/// fixed.
///
/// NOTE: f takes elements, not an index, which would leave bounds checks between the lanes.
#[inline(always)]
pub(super) fn lane_sum<const N: usize>(x: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = x.map(|x| x.as_chunks::<LANES>());
    for i in 0..chunks[0].0.len() {
        let chunk = chunks.map(|(whole, _)| &whole[i]);
        for l in 0..LANES {
            lanes[l] += f(chunk.map(|x| x[l]));
        }
    }
    for i in 0..chunks[0].1.len() {
        lanes[i] += f(chunks.map(|(_, rest)| rest[i]));
    }
    fold_lanes(lanes)
}

/// The sum of the lanes, by halves.
#[inline(always)]
fn fold_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest of `x` (f32::MIN for none). NaN does not win, and shows in the sums that follow.
#[inline(always)]
pub(super) fn lane_max(x: &[f32]) -> f32 {
    lane_max_of(x, |v| v)
}

/// The largest magnitude, 0 of nothing. NaN is not seen.
#[inline(always)]
pub(super) fn lane_amax(x: &[f32]) -> f32 {
    lane_max_of(x, f32::abs).max(0.0)
}

#[inline(always)]
fn lane_max_of(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [f32::MIN; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for l in 0..LANES {
            let v = f(chunk[l]);
            lanes[l] = if v > lanes[l] { v } else { lanes[l] };
        }
    }
    let max = |a: f32, b: f32| if b > a { b } else { a };
    rest.iter().map(|v| f(*v)).fold(lanes.into_iter().fold(f32::MIN, max), max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate() {
        let mut worst = 0.0f64;
        for i in -87_000..=87_000 {
            let x = i as f32 / 1000.0 + 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2e-7, "relative error: {worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn gelu_derivative_is_the_slope() {
        for i in -60..60 {
            let x = f64::from(i) / 10.0 + 0.05;
            let g = |x: f64| {
                0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044715 * x * x * x)).tanh())
            };
            let slope = (g(x + 1e-5) - g(x - 1e-5)) / 2e-5;
            assert!((f64::from(gelu(x as f32)) - g(x)).abs() < 1e-6);
            assert!((f64::from(gelu_derivative(x as f32)) - slope).abs() < 1e-6, "{x}");
        }
    }

    #[test]
    fn silu_and_its_slope_are_those_of_the_definition() {
        let silu_of = |x: f64| x / (1.0 + (-x).exp());
        for x in (-20_000..=20_000).map(|i| i as f32 * 5e-3).chain([1e30, -1e30, -0.0]) {
            let (wide, bound) = (f64::from(x), f64::from(x.abs().max(1.0)) * 3e-7);
            assert!((f64::from(silu(x)) - silu_of(wide)).abs() <= bound, "{x}");
            let h = 1e-5 * wide.abs().max(1.0);
            let slope = (silu_of(wide + h) - silu_of(wide - h)) / (2.0 * h);
            assert!((f64::from(silu_derivative(x)) - slope).abs() < 1e-6, "{x}");
        }
        assert!(silu(f32::NAN).is_nan() && silu_derivative(f32::NAN).is_nan());
    }

    /// To the error of f32 relative to 1 or x, and no NaN that no NaN made.
    #[test]
    fn exact_gelu_is_that_of_the_definition() {
        use crate::backend::{Activation, reference};
        let small = (-12_000..=12_000).map(|i| i as f32 * 1e-3);
        let large = [1e-40, 1e-20, 20.0, 1e4, 1e18, 1e30].into_iter().flat_map(|v| [v, -v]);
        let mut worst = [0.0f64; 2];
        for x in small.chain(large).chain([0.0, -0.0]) {
            let wide = f64::from(x);
            let exact = [reference::gelu_of, reference::gelu_derivative_of]
                .map(|f| f(Activation::Gelu, wide));
            for ((ours, exact), worst) in
                [exact_gelu(x), exact_gelu_derivative(x)].into_iter().zip(exact).zip(&mut worst)
            {
                assert!(ours.is_finite(), "{x}: {ours}");
                *worst = worst.max((f64::from(ours) - exact).abs() / wide.abs().max(1.0));
            }
        }
        assert!(worst[0] < 3e-7 && worst[1] < 3e-7, "{worst:?}");
        assert!(exact_gelu(f32::NAN).is_nan() && exact_gelu_derivative(f32::NAN).is_nan());
    }

    /// The twin's derivative is the slope of the twin.
    #[test]
    fn the_twin_of_gelu_has_the_slope_that_it_says() {
        use crate::backend::{Activation, reference};
        for form in [Activation::GeluTanh, Activation::Gelu] {
            for i in -60..60 {
                let (x, h) = (f64::from(i) / 10.0 + 0.05, 1e-5);
                let f = |x| reference::gelu_of(form, x);
                let slope = (f(x + h) - f(x - h)) / (2.0 * h);
                assert!((reference::gelu_derivative_of(form, x) - slope).abs() < 1e-9, "{x}");
            }
        }
        // Of a table: 1.96 is the 97.5th percentile.
        assert!((reference::gelu_of(Activation::Gelu, 1.959_964) / 1.959_964 - 0.975).abs() < 1e-8);
    }

    #[test]
    fn sums_and_maxima_take_every_element() {
        for n in [0usize, 1, 15, 16, 17, 100] {
            let x: Vec<f32> = (0..n).map(|i| (i * 7 % 31) as f32).collect();
            assert_eq!(lane_sum([&x], |[v]| v), x.iter().sum::<f32>());
            let squares = x.iter().map(|v| v * v).sum::<f32>();
            assert_eq!(lane_sum([&x, &x], |[a, b]| a * b), squares);
            assert_eq!(lane_max(&x), x.iter().copied().fold(f32::MIN, f32::max));
            let negated: Vec<f32> = x.iter().map(|v| -v).collect();
            assert_eq!(lane_amax(&negated), x.iter().copied().fold(0.0, f32::max));
        }
    }
}
