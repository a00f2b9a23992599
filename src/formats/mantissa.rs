//! E8Mx: bf16 with fewer bits of mantissa, as "To FP8 and Back Again" (arXiv 2405.18710) trains
//! with. Such numbers are bf16 numbers, so products of bf16 hold them.

/// The number of `bits` mantissa bits, 1 to 7, nearest to `v`, ties to even.
pub fn round_mantissa(v: f32, bits: u32) -> f32 {
    let cut = 23 - bits;
    let word = v.to_bits();
    if v.is_nan() {
        return v;
    }
    let even = word >> cut & 1;
    f32::from_bits((word + (1 << (cut - 1)) - 1 + even) >> cut << cut)
}

/// What is left of `v` as bf16, rounded to nearest even, without all but `bits` mantissa bits: as
/// the paper has it, which is biased.
pub fn cut_mantissa(v: f32, bits: u32) -> f32 {
    let v = round_mantissa(v, 7);
    if v.is_nan() { v } else { f32::from_bits(v.to_bits() >> (23 - bits) << (23 - bits)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        for (v, bits, cut, nearest) in [
            (1.1, 5, 1.09375, 1.09375),
            (1.1, 4, 1.0625, 1.125),
            (1.1, 3, 1.0, 1.125),
            (-3.3, 5, -3.25, -3.3125),
        ] {
            assert_eq!((cut_mantissa(v, bits), round_mantissa(v, bits)), (cut, nearest), "{v}");
        }
    }

    #[test]
    fn seven_bits_are_bf16() {
        let mut word = 1u32;
        for _ in 0..100_000 {
            word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let v = f32::from_bits(word);
            if !v.is_nan() {
                let expected = half::bf16::from_f32(v).to_f32();
                assert_eq!(round_mantissa(v, 7).to_bits(), expected.to_bits(), "{v}");
                assert_eq!(cut_mantissa(v, 7).to_bits(), expected.to_bits(), "{v}");
            }
        }
        assert!(round_mantissa(f32::NAN, 3).is_nan() && cut_mantissa(f32::NAN, 3).is_nan());
        assert_eq!(round_mantissa(f32::MAX, 3), f32::INFINITY);
    }
}
