//! From 32 f32 values to one block: a scale byte and 32 codes.

use super::BLOCK;
use super::e2m1::decode_e2m1;
use super::e8m0::{E8M0_NAN, PowerRule, decode_e8m0};

/// How elements are rounded to E2M1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// To the nearest value, ties to the even code, saturated at +-6 (Algorithm 1).
    Nearest,
    /// Stochastically, so that the mean is the value (Algorithm 2). Nothing may saturate.
    Unbiased,
    /// To the nearest value, and the scale stochastically, so that the mean over random rotations
    /// is the value ([`super::quantize_nvfp4_eden`]).
    Eden,
    /// Of weights: to the neighbour that the weight's slow mean is nearer to
    /// ([`super::round_by_mean`]).
    ByMean,
}

/// The part of E2M1's range that a block's scale lets the largest magnitude come to. What the range
/// takes from the values, the product's accumulator gives back ([`super::product_scale`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Range {
    /// The values over the scale, below 8: what lies above 6 saturates (Algorithm 1).
    Full,
    /// Three quarters of them, below 6: nothing saturates (Algorithm 2).
    ThreeQuarters,
}

impl Range {
    /// What values are multiplied by before rounding.
    pub const fn factor(self) -> f32 {
        match self {
            Self::Full => 1.0,
            Self::ThreeQuarters => 0.75,
        }
    }
}

/// Quantizes a block. `bits(i)` gives the 16 random bits of element i; nearest rounding asks for
/// none.
///
/// A block that holds NaN or infinity gets the scale byte 255, and codes 0.
pub fn quantize_block(
    v: &[f32; BLOCK],
    rounding: Rounding,
    range: Range,
    bits: impl Fn(usize) -> u16,
) -> (u8, [u8; BLOCK]) {
    let mut codes = [0; BLOCK];
    let scale = PowerRule::Floor.byte(v);
    for (i, (code, x)) in codes.iter_mut().zip(v).enumerate() {
        *code = quantize_element(*x, scale, rounding, range, || bits(i));
    }
    (scale, codes)
}

/// Quantizes a block to nearest by the scale of [`quantize_block`] or the next, which lets nothing
/// saturate, whichever leaves the smaller sum of squared errors; of two that leave the same, by the
/// first. For numbers that stay: it looks at every element twice.
pub fn quantize_closest(v: &[f32; BLOCK]) -> (u8, [u8; BLOCK]) {
    let by = |scale: u8| {
        let code = |x: &f32| quantize_element(*x, scale, Rounding::Nearest, Range::Full, || 0);
        let codes = std::array::from_fn(|i| code(&v[i]));
        let of = |(x, code): (&f32, &u8)| {
            f64::from(*x) - f64::from(decode_e2m1(*code)) * f64::from(decode_e8m0(scale))
        };
        let error: f64 = v.iter().zip(&codes).map(|one| of(one).powi(2)).sum();
        (error, (scale, codes))
    };
    let scale = PowerRule::Floor.byte(v);
    let (error, first) = by(scale);
    if scale >= E8M0_NAN - 1 {
        return first;
    }
    let (of_next, next) = by(scale + 1);
    if of_next < error { next } else { first }
}

/// The code of an element of a block with this scale byte; 0 for a byte of 255.
pub(super) fn quantize_element(
    v: f32,
    scale: u8,
    rounding: Rounding,
    range: Range,
    bits: impl FnOnce() -> u16,
) -> u8 {
    if scale == E8M0_NAN {
        return 0;
    }
    // NOTE: values see one multiplication, by a factor that is exact itself: one rounding, not two.
    let y = v.abs() * (range.factor() * decode_e8m0(254 - scale));
    let magnitude = match rounding {
        Rounding::Nearest | Rounding::Eden | Rounding::ByMean => nearest(y),
        Rounding::Unbiased => stochastic(y, bits()),
    };
    magnitude | ((v.to_bits() >> 31) as u8) << 3
}

/// Code of the value nearest to y >= 0. At a midpoint the even code wins, so every second threshold
/// is inclusive.
pub(super) fn nearest(y: f32) -> u8 {
    u8::from(y > 0.25)
        + u8::from(y >= 0.75)
        + u8::from(y > 1.25)
        + u8::from(y >= 1.75)
        + u8::from(y > 2.5)
        + u8::from(y >= 3.5)
        + u8::from(y > 5.0)
}

/// Code of y, 0 <= y <= 6, rounded up with probability (y - lo) / (hi - lo), to the nearest 2^-16.
///
/// For y >= 1 the grid keeps one mantissa bit of the f32, so adding random bits below it and
/// cutting them off rounds stochastically; a carry walks into the exponent, as it should. Below 1
/// the grid is even (steps of 0.5), which adding 1 turns into the same case. The half step of 2^-17
/// centres the resolution: an exact grid value never moves, and the mean is off by at most 2^-17.
pub(super) fn stochastic(y: f32, bits: u16) -> u8 {
    let (u, first) = if y < 1.0 { (y + 1.0, 254) } else { (y, 252) };
    (((u.to_bits() + (u32::from(bits) << 6 | 32)) >> 22) - first) as u8
}

#[cfg(test)]
mod tests {
    use super::super::{E2M1_VALUES, decode_e2m1, decode_e8m0};
    use super::*;
    use proptest::prelude::*;

    /// All that is defined.
    const KINDS: [(Rounding, Range); 3] = [
        (Rounding::Nearest, Range::Full),
        (Rounding::Nearest, Range::ThreeQuarters),
        (Rounding::Unbiased, Range::ThreeQuarters),
    ];

    /// 7.9 saturates by the first scale, and 6.5 loses less that way.
    #[test]
    fn the_better_of_two_scales_is_taken() {
        let block = |values: [f32; 2]| std::array::from_fn(|i| if i < 2 { values[i] } else { 0.0 });
        let codes = |codes: [u8; 2]| std::array::from_fn(|i| if i < 2 { codes[i] } else { 0 });
        assert_eq!(quantize_closest(&block([7.9, 4.0])), (128, codes([6, 4])));
        assert_eq!(quantize_closest(&block([6.5, 0.5])), (127, codes([7, 1])));
        assert_eq!(quantize_closest(&block([0.0, 0.0])), (0, codes([0, 0])));
        assert_eq!(quantize_closest(&block([f32::NAN, 1.0])).0, 255);
    }

    #[test]
    fn nearest_takes_the_closest_value_and_the_even_code_on_ties() {
        for i in 0..=8000 {
            let y = i as f32 / 1000.0;
            let distance = |c: u8| (E2M1_VALUES[c as usize] - y).abs();
            let best = (0..8u8)
                .min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a % 2).cmp(&(b % 2))));
            assert_eq!(Some(nearest(y)), best, "{y}");
        }
    }

    /// Counts all 65,536 draws: the share rounded up is the position between neighbours to 2^-17.
    #[test]
    fn stochastic_rounds_up_with_the_right_probability() {
        for y in
            [0.0, 1e-9, 0.1, 0.25, 0.5, 0.7, 0.999_999, 1.0, 1.3, 1.5, 1.9, 2.25, 3.9, 4.5, 6.0]
        {
            let mut sum = 0.0f64;
            for bits in 0..=u16::MAX {
                let v = E2M1_VALUES[usize::from(stochastic(y, bits))];
                let lo = E2M1_VALUES.iter().rfind(|g| **g <= y).unwrap();
                let hi = E2M1_VALUES.iter().find(|g| **g >= y).unwrap();
                assert!(v == *lo || v == *hi, "{y} became {v}");
                sum += f64::from(v);
            }
            let mean = sum / 65536.0;
            assert!((mean - f64::from(y)).abs() <= 2.0 * 2f64.powi(-17), "{y}: mean {mean}");
        }
    }

    #[test]
    fn special_blocks() {
        let unbiased = |v| quantize_block(v, Rounding::Unbiased, Range::ThreeQuarters, |_| 65535);
        assert_eq!(unbiased(&[0.0; BLOCK]), (0, [0; BLOCK]));
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut v = [1.0; BLOCK];
            v[7] = bad;
            for (rounding, range) in KINDS {
                assert_eq!(quantize_block(&v, rounding, range, |_| 0), (255, [0; BLOCK]));
            }
        }
        let huge = unbiased(&[f32::MAX; BLOCK]);
        assert!(huge.0 == 252 && huge.1.iter().all(|c| *c <= 7));
    }

    proptest! {
        /// What blocks stand for is in the same blocks again, so that files may have it: where the
        /// second scale is taken, something saturated by the first and is 4 by the second, and of 4
        /// that is the first. Up to the largest that f32 has.
        #[test]
        fn the_closest_of_what_blocks_stand_for_are_these_blocks(
            v in prop::array::uniform32(-8f32..8.0), zeros: u32, exponent in -149i32..=124,
        ) {
            let v: [f32; BLOCK] = std::array::from_fn(|i| match zeros >> i & 1 {
                // Of either sign, and what rounds to it.
                0 => v[i] * 2f32.powi(exponent),
                _ => v[i] * f32::from_bits(1),
            });
            let (scale, codes) = quantize_closest(&v);
            let stands_for = codes.map(|code| decode_e2m1(code) * decode_e8m0(scale));
            prop_assume!(stands_for.iter().all(|v| v.is_finite()));
            prop_assert_eq!(quantize_closest(&stands_for), (scale, codes));
        }

        /// Whatever the block, stochastic results are neighbours of what the range leaves of v, and
        /// nearest results are within half a step of it, or saturated.
        #[test]
        fn results_are_neighbours(
            v in prop::array::uniform32(-1e3f32..1e3), exponent in -120i32..110, seed: u16,
        ) {
            let v = v.map(|x| x * 2f32.powi(exponent));
            for (rounding, range) in KINDS {
                let bits = |i| seed.wrapping_mul(i as u16 * 2 + 1);
                let (scale, codes) = quantize_block(&v, rounding, range, bits);
                let s = f64::from(decode_e8m0(scale));
                for (x, c) in v.iter().zip(codes) {
                    let got = f64::from(decode_e2m1(c));
                    let wanted = f64::from(range.factor()) * f64::from(*x) / s;
                    let slack = if rounding == Rounding::Nearest { 0.5 } else { 1.0 };
                    prop_assert!(wanted.abs() <= 6.0 || range == Range::Full);
                    let step = match wanted.abs() { w if w < 2.0 => 0.5, w if w < 4.0 => 1.0, _ => 2.0 };
                    let wanted = wanted.clamp(-6.0, 6.0);
                    prop_assert!((got - wanted).abs() <= slack * step + 1e-5, "{wanted} became {got}");
                }
            }
        }
    }
}
