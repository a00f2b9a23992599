//! From 32 f32 values to one block: a scale byte and 32 codes.

use super::BLOCK;
use super::e8m0::{E8M0_NAN, scale_byte};

/// How elements are rounded to E2M1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest value, ties to the even code, saturated at +-6 (Algorithm 1).
    Nearest,
    /// Three quarters of the value, rounded stochastically: the mean is 0.75 v and nothing clips
    /// (Algorithm 2). The product's accumulator makes up for the factor ([`super::product_scale`]).
    Unbiased,
}

/// Quantizes a block. `bits(i)` gives the 16 random bits of element i; nearest rounding asks for
/// none.
///
/// A block that holds NaN or infinity gets the scale byte 255, and codes 0.
pub fn quantize_block(
    v: &[f32; BLOCK],
    rounding: Rounding,
    bits: impl Fn(usize) -> u16,
) -> (u8, [u8; BLOCK]) {
    let mut codes = [0; BLOCK];
    // Comparing magnitudes as integers also lets NaN win.
    let max_bits = v.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    let scale = scale_byte(max_bits);
    if scale == E8M0_NAN {
        return (scale, codes);
    }
    // 2^-exponent, exact: the exponent lies in -127 ..= 125.
    let inverse = f32::from_bits((254 - u32::from(scale)) << 23);
    for (i, (code, x)) in codes.iter_mut().zip(v).enumerate() {
        let magnitude = match rounding {
            Rounding::Nearest => nearest(x.abs() * inverse),
            // NOTE: one multiplication by 0.75 * 2^-exponent, which is exact: one rounding, not two.
            Rounding::Unbiased => stochastic(x.abs() * (0.75 * inverse), bits(i)),
        };
        *code = magnitude | ((x.to_bits() >> 31) as u8) << 3;
    }
    (scale, codes)
}

/// Code of the value nearest to y >= 0. At a midpoint the even code wins, so every second threshold
/// is inclusive.
fn nearest(y: f32) -> u8 {
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
fn stochastic(y: f32, bits: u16) -> u8 {
    let (u, first) = if y < 1.0 { (y + 1.0, 254) } else { (y, 252) };
    (((u.to_bits() + (u32::from(bits) << 6 | 32)) >> 22) - first) as u8
}

#[cfg(test)]
mod tests {
    use super::super::{E2M1_VALUES, decode_e2m1, decode_e8m0};
    use super::*;
    use proptest::prelude::*;

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
        assert_eq!(quantize_block(&[0.0; BLOCK], Rounding::Unbiased, |_| 65535), (0, [0; BLOCK]));
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut v = [1.0; BLOCK];
            v[7] = bad;
            for rounding in [Rounding::Nearest, Rounding::Unbiased] {
                assert_eq!(quantize_block(&v, rounding, |_| 0), (255, [0; BLOCK]));
            }
        }
        let huge = quantize_block(&[f32::MAX; BLOCK], Rounding::Unbiased, |_| 65535);
        assert!(huge.0 == 252 && huge.1.iter().all(|c| *c <= 7));
    }

    proptest! {
        /// Whatever the block, stochastic results are neighbours of 0.75 v and nearest results are
        /// within half a step, or saturated.
        #[test]
        fn results_are_neighbours(
            v in prop::array::uniform32(-1e3f32..1e3), exponent in -120i32..110, seed: u16,
        ) {
            let v = v.map(|x| x * 2f32.powi(exponent));
            for rounding in [Rounding::Nearest, Rounding::Unbiased] {
                let (scale, codes) =
                    quantize_block(&v, rounding, |i| seed.wrapping_mul(i as u16 * 2 + 1));
                let s = f64::from(decode_e8m0(scale));
                for (x, c) in v.iter().zip(codes) {
                    let got = f64::from(decode_e2m1(c));
                    let (wanted, slack) = match rounding {
                        Rounding::Nearest => (f64::from(*x) / s, 0.5),
                        Rounding::Unbiased => (0.75 * f64::from(*x) / s, 1.0),
                    };
                    let step = match wanted.abs() { w if w < 2.0 => 0.5, w if w < 4.0 => 1.0, _ => 2.0 };
                    let wanted = wanted.clamp(-6.0, 6.0);
                    prop_assert!((got - wanted).abs() <= slack * step + 1e-5, "{wanted} became {got}");
                }
            }
        }
    }
}
