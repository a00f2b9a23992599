//! Integers of 8 bits, -127 to 127, with one f32 scale for a row or for a tensor.
//!
//! Source: SwitchBack, "Stable and low-precision training for large-scale vision-language models"
//! (arXiv 2304.13013).

/// The largest integer, to which the largest magnitude comes.
pub const INT8_MAX: f32 = 127.0;

/// What gives values back from integers, for what has this largest magnitude: amax / 127. 1 for
/// zeros, NaN where it is not finite.
pub fn int8_scale(amax: f32) -> f32 {
    match amax {
        0.0 => 1.0,
        amax if amax.is_finite() => (amax / INT8_MAX).max(f32::MIN_POSITIVE),
        _ => f32::NAN,
    }
}

/// The integer nearest to 127 v / amax, ties to even, for a magnitude of at most `amax`; NaN for an
/// amax that is not finite.
pub fn round_to_int8(v: f32, amax: f32) -> f32 {
    match amax {
        0.0 => 0.0,
        amax if amax.is_finite() => (v / amax * INT8_MAX).round_ties_even(),
        _ => f32::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vector_of_switchback() {
        let quantize = |values: &[f32]| {
            let amax = values.iter().fold(0.0, |amax: f32, v| amax.max(v.abs()));
            let codes: Vec<f32> = values.iter().map(|v| round_to_int8(*v, amax)).collect();
            (codes, int8_scale(amax))
        };
        let (x, x_scale) = quantize(&[1.0, -2.0, 0.5]);
        let (w, w_scale) = quantize(&[4.0, 1.0, -2.0]);
        assert_eq!(x, [64.0, -127.0, 32.0]);
        assert_eq!(w, [127.0, 32.0, -64.0]);
        let sum: f32 = x.iter().zip(&w).map(|(x, w)| x * w).sum();
        assert_eq!(sum, 2016.0);
        assert!((x_scale * w_scale * sum - 0.999_938).abs() < 1e-6);
    }

    #[test]
    fn the_ends() {
        assert_eq!(int8_scale(0.0), 1.0);
        assert!(int8_scale(f32::INFINITY).is_nan() && int8_scale(f32::NAN).is_nan());
        assert!(round_to_int8(f32::NAN, 1.0).is_nan() && round_to_int8(1.0, f32::NAN).is_nan());
        assert_eq!(round_to_int8(0.0, 0.0), 0.0);
        for amax in [1e-45, 1e-38, 0.1, 3.0, 1e30, f32::MAX] {
            assert_eq!(round_to_int8(-amax, amax), -127.0);
        }
    }
}
