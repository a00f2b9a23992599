//! E2M1, the 4-bit element: sign, two exponent bits, one mantissa bit. No NaN, no infinity.

/// Values of the codes 0 to 7; code + 8 is the negative.
pub const E2M1_VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The largest value.
pub const E2M1_MAX: f32 = 6.0;

/// The value of a 4-bit code (the upper bits of the byte are not read).
pub fn decode_e2m1(code: u8) -> f32 {
    let magnitude = E2M1_VALUES[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// Packs codes two to a byte, the element of lower index in the low nibble. An odd number of codes
/// leaves the last high nibble 0.
pub fn pack_e2m1(codes: &[u8]) -> Vec<u8> {
    codes.chunks(2).map(|pair| (pair[0] & 15) | (pair.get(1).map_or(0, |c| c & 15) << 4)).collect()
}

/// Code number `index` of a packed row.
pub fn unpack_e2m1(packed: &[u8], index: usize) -> u8 {
    (packed[index / 2] >> (4 * (index % 2))) & 15
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_follow_the_bit_fields() {
        for code in 0..16u8 {
            let (sign, exponent, mantissa) = (code >> 3, (code >> 1) & 3, f32::from(code & 1));
            // Exponent bias 1; exponent 0 holds the subnormals 0 and 0.5.
            let magnitude = match exponent {
                0 => 0.5 * mantissa,
                e => (1.0 + 0.5 * mantissa) * f32::from(1u8 << (e - 1)),
            };
            let value = if sign == 1 { -magnitude } else { magnitude };
            assert_eq!(decode_e2m1(code).to_bits(), value.to_bits(), "code {code}");
        }
        assert_eq!(E2M1_VALUES[7], E2M1_MAX);
    }

    #[test]
    fn the_lower_index_is_in_the_low_nibble() {
        let codes = [1, 2, 15, 8, 7];
        let packed = pack_e2m1(&codes);
        assert_eq!(packed, [0x21, 0x8f, 0x07]);
        for (i, &code) in codes.iter().enumerate() {
            assert_eq!(unpack_e2m1(&packed, i), code);
        }
    }
}
