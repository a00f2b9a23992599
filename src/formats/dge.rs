//! The differentiable gradient estimator: what a weight's gradient is multiplied by, so that it is
//! that of a smooth curve through E2M1's steps instead of that of a straight line.
//!
//! Source: "Optimizing Large Language Model Training Using FP4 Quantization" (arXiv 2501.17116).

use super::e2m1::E2M1_VALUES;

/// No weight's gradient becomes larger than by this.
pub const DGE_MAX: f32 = 3.0;

/// f'(y) = min(3, |2 (y - lo) / d - 1|^(1/k - 1) / k) in the bin [lo, lo + d) of y, a weight over
/// its scale, before it is rounded; the last bin is [4, 6]. `k` is the steepness, 5 in the paper.
///
/// NOTE: of rounded numbers it would be 1/k everywhere, which is another method, and a worse one.
pub fn dge_derivative(y: f32, k: f32) -> f32 {
    // Bins are symmetric, their lower edges those of the signed axis, which magnitudes turn around:
    // at an edge both sides have the value 1/k.
    let magnitude = y.abs().min(6.0);
    let low = (0..7).rev().find(|code| E2M1_VALUES[*code] <= magnitude).unwrap_or(0);
    let (from, to) = (E2M1_VALUES[low], E2M1_VALUES[low + 1]);
    let distance = (2.0 * (magnitude - from) / (to - from) - 1.0).abs();
    // In f64, as elsewhere where a power is taken once for a weight.
    let power = f64::from(distance).powf(1.0 / f64::from(k) - 1.0) / f64::from(k);
    (power as f32).min(DGE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        for (y, expected) in [
            (0.0, 0.2),
            (0.1, 0.300_960),
            (0.2, 0.724_780),
            (0.24, 2.626_528),
            (0.25, 3.0),
            (0.5, 0.2),
            (2.4, 0.724_780),
            (4.5, 0.348_220),
            (5.1, 1.261_915),
            (6.0, 0.2),
        ] {
            for y in [y, -y] {
                let found = dge_derivative(y, 5.0);
                assert!((found - expected).abs() < 1e-5 * expected, "{y}: {found}");
            }
        }
        let line = [
            0.2, 0.444_585, 0.581_911, 0.218_612, 2.108_788, 0.270_943, 0.309_684, 0.270_943,
            0.241_635, 0.581_911,
        ];
        for (i, expected) in line.into_iter().enumerate() {
            let y = -6.0 + 12.0 * i as f32 / 19.0;
            for y in [y, -y] {
                let found = dge_derivative(y, 5.0);
                assert!((found - expected).abs() < 2e-5, "{y}: {found}");
            }
        }
    }

    #[test]
    fn a_steepness_of_one_is_the_straight_line() {
        for i in 0..=600 {
            assert_eq!(dge_derivative(i as f32 / 100.0, 1.0), 1.0);
        }
    }
}
