//! FP8 E4M3, the format of the optional FP8 forward pass: 4 exponent bits (bias 7), 3 mantissa
//! bits, largest value 448, no infinity.
//!
//! "Current scaling": one scale a tensor, computed from the tensor itself. Ours is a power of two,
//! so that dividing by it and multiplying by it again is exact and the same on every backend.

/// The largest value.
pub const E4M3_MAX: f32 = 448.0;

/// The smallest power of two s for which `amax / s` is at most 448, kept within 2^-100 .. 2^100.
/// 1 for a tensor of zeros; NaN where `amax` is NaN or infinite.
pub fn e4m3_scale(amax: f32) -> f32 {
    // 448 = 1.75 * 2^8.
    power_scale(amax, 8)
}

/// The same for a largest value of 1.75 * 2^`largest`.
pub(super) fn power_scale(amax: f32, largest: i32) -> f32 {
    if amax == 0.0 {
        return 1.0;
    }
    if !amax.is_finite() {
        return f32::NAN;
    }
    // floor(log2 amax) - largest, one more above a mantissa of 1.75.
    let bits = amax.to_bits();
    let above = i32::from(bits & 0x007f_ffff > 0x0060_0000);
    let exponent = ((bits >> 23) as i32 - 127 - largest + above).clamp(-100, 100);
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// The E4M3 value nearest to `v`, ties to even, saturated at +-448. NaN stays NaN.
pub fn round_to_e4m3(v: f32) -> f32 {
    round_to_fp8::<3, -6>(v, E4M3_MAX)
}

/// The same for a format with `MANTISSA` bits and normal numbers from 2^`LOWEST` on.
pub(super) fn round_to_fp8<const MANTISSA: i32, const LOWEST: i32>(v: f32, largest: f32) -> f32 {
    let magnitude = v.abs().min(largest);
    // Below the normal numbers the grid is even; above, steps are 2^-MANTISSA of the binade.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(LOWEST);
    // Adding and subtracting 1.5 * 2^23 steps rounds to a whole number of steps, ties to even.
    let magic = f32::from_bits(((exponent - MANTISSA + 23 + 127) as u32) << 23) * 1.5;
    let rounded = (magnitude + magic) - magic;
    if v.is_nan() { v } else { rounded.copysign(v) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All non-negative finite E4M3 values, in order.
    fn grid() -> Vec<f32> {
        (0..127u32)
            .map(|code| {
                let (e, m) = ((code >> 3) as i32, (code & 7) as f32);
                if e == 0 { m * 2f32.powi(-9) } else { (1.0 + m / 8.0) * 2f32.powi(e - 7) }
            })
            .collect()
    }

    #[test]
    fn rounds_to_the_nearest_grid_value_ties_to_even() {
        let grid = grid();
        assert_eq!(*grid.last().unwrap(), E4M3_MAX);
        for (i, pair) in grid.windows(2).enumerate() {
            let (lo, hi) = (pair[0], pair[1]);
            let middle = (lo + hi) / 2.0;
            let even = if i % 2 == 0 { lo } else { hi };
            assert_eq!(round_to_e4m3(lo), lo);
            assert_eq!(round_to_e4m3(-middle), -even, "between {lo} and {hi}");
            assert_eq!(round_to_e4m3(f32::from_bits(middle.to_bits() - 1)), lo);
            assert_eq!(round_to_e4m3(f32::from_bits(middle.to_bits() + 1)), hi);
        }
        assert_eq!(round_to_e4m3(1e9), E4M3_MAX);
        assert_eq!(round_to_e4m3(f32::NEG_INFINITY), -E4M3_MAX);
        assert!(round_to_e4m3(f32::NAN).is_nan());
    }

    #[test]
    fn the_scale_is_the_smallest_that_fits() {
        for max in [1e-20f32, 0.1, 1.0, 447.0, 448.0, 448.1, 500.0, 1e20] {
            let s = e4m3_scale(max);
            assert!(max / s <= E4M3_MAX && max / (s * 0.5) > E4M3_MAX, "{max}: {s}");
        }
        assert_eq!(e4m3_scale(0.0), 1.0);
        assert!(e4m3_scale(f32::INFINITY).is_nan());
    }
}
