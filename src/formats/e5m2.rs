//! FP8 E5M2: 5 exponent bits (bias 15), 2 mantissa bits, largest value 57,344. Infinity exists and
//! is never made here.

/// The largest value.
pub const E5M2_MAX: f32 = 57_344.0;

/// The smallest power of two s for which `amax / s` is at most 57,344, kept within 2^-100 .. 2^100.
/// 1 for a tensor of zeros; NaN where `amax` is NaN or infinite.
pub fn e5m2_scale(amax: f32) -> f32 {
    // 57,344 = 1.75 * 2^15.
    super::e4m3::power_scale(amax, 15)
}

/// The E5M2 value nearest to `v`, ties to even, saturated at +-57,344. NaN stays NaN.
pub fn round_to_e5m2(v: f32) -> f32 {
    super::e4m3::round_to_fp8::<2, -14>(v, E5M2_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_to_the_nearest_grid_value_ties_to_even() {
        let grid: Vec<f32> = (0..124u32)
            .map(|code| {
                let (e, m) = ((code >> 2) as i32, (code & 3) as f32);
                if e == 0 { m * 2f32.powi(-16) } else { (1.0 + m / 4.0) * 2f32.powi(e - 15) }
            })
            .collect();
        assert_eq!(*grid.last().unwrap(), E5M2_MAX);
        for (i, pair) in grid.windows(2).enumerate() {
            let (lo, hi) = (pair[0], pair[1]);
            let middle = (lo + hi) / 2.0;
            let even = if i % 2 == 0 { lo } else { hi };
            assert_eq!(round_to_e5m2(lo), lo);
            assert_eq!(round_to_e5m2(-middle), -even, "between {lo} and {hi}");
            assert_eq!(round_to_e5m2(f32::from_bits(middle.to_bits() - 1)), lo);
            assert_eq!(round_to_e5m2(f32::from_bits(middle.to_bits() + 1)), hi);
        }
        assert_eq!(round_to_e5m2(1e9), E5M2_MAX);
        assert_eq!(round_to_e5m2(f32::NEG_INFINITY), -E5M2_MAX);
        assert!(round_to_e5m2(f32::NAN).is_nan());
    }

    #[test]
    fn the_scale_is_the_smallest_that_fits() {
        for amax in [1e-20f32, 0.1, 1.0, 57_344.0, 57_345.0, 60_000.0, 1e20] {
            let s = e5m2_scale(amax);
            assert!(amax / s <= E5M2_MAX && amax / (s * 0.5) > E5M2_MAX, "{amax}: {s}");
        }
        assert_eq!(e5m2_scale(0.0), 1.0);
        assert!(e5m2_scale(f32::INFINITY).is_nan());
    }
}
