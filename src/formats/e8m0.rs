//! E8M0, the scale of a block: one byte e, value 2^(e - 127); 255 is NaN.

/// The byte of the scale 1.
pub const E8M0_BIAS: i32 = 127;

/// The byte of a block that holds NaN or infinity.
pub const E8M0_NAN: u8 = 255;

/// The scale's value, NaN for 255.
pub fn decode_e8m0(byte: u8) -> f32 {
    match byte {
        E8M0_NAN => f32::NAN,
        0 => f32::from_bits(1 << 22), // 2^-127 is subnormal in f32
        e => f32::from_bits(u32::from(e) << 23),
    }
}

/// The byte of the scale of a block whose largest magnitude is `max_bits` (the bits of |v|).
///
/// exponent = clamp(floor(log2 max) - 2, -127, 127), read from the bits: 2 is the exponent of
/// E2M1's largest value. Subnormal and zero blocks end at -127, which is byte 0.
pub(super) fn scale_byte(max_bits: u32) -> u8 {
    match max_bits >> 23 {
        255 => E8M0_NAN,
        biased => biased.saturating_sub(2) as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_bytes_follow_the_definition() {
        for byte in 0..255u8 {
            assert_eq!(f64::from(decode_e8m0(byte)), 2f64.powi(i32::from(byte) - E8M0_BIAS));
        }
        assert!(decode_e8m0(E8M0_NAN).is_nan());
        for max in [0.0, 1e-45, 1.1e-38, 2.4e-38, 0.49, 0.5, 1.0, 5.99, 6.0, 7.99, 8.0, 3e38f32] {
            let exponent = if max == 0.0 { -127.0 } else { f64::from(max).log2().floor() - 2.0 };
            let byte = (exponent.clamp(-127.0, 127.0) as i32 + E8M0_BIAS) as u8;
            assert_eq!(scale_byte(max.to_bits()), byte, "{max}");
        }
        assert_eq!(scale_byte(f32::INFINITY.to_bits()), E8M0_NAN);
        assert_eq!(scale_byte(f32::NAN.to_bits() & 0x7fff_ffff), E8M0_NAN);
    }
}
