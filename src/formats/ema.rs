//! Q-EMA: a weight is rounded to that neighbour in E2M1's grid which a slow mean of the weight is
//! nearer to, so that a weight beside a threshold does not change its code at every step.
//!
//! Source: TetraJet (arXiv 2502.20853), section 5.

use super::e2m1::E2M1_VALUES;

/// Steps during which the mean is only gathered: codes follow it from the 11th step on.
pub const EMA_FROM_STEP: u64 = 10;

/// The mean after a step that has left `weight`: b `mean` + (1 - b) `weight`.
pub fn ema(mean: f32, weight: f32, b: f32) -> f32 {
    b * mean + (1.0 - b) * weight
}

/// The code of `y`, a weight over its block's scale, given the mean over the same scale.
///
/// y lies in a bin of the grid, up to 6; the upper end is taken where the mean, with y's sign, lies
/// in its upper half or above. A number of the grid lies at the lower end of its bin, so it moves,
/// too, and 6 lies in the last one.
pub fn round_by_mean(y: f32, mean: f32) -> u8 {
    let magnitude = y.abs();
    let low = (0..7).rev().find(|code| E2M1_VALUES[*code] <= magnitude).unwrap_or(0);
    let middle = (E2M1_VALUES[low] + E2M1_VALUES[low + 1]) * 0.5;
    let mean = if y.is_sign_negative() { -mean } else { mean };
    let code = low + usize::from(mean >= middle);
    code as u8 | ((y.to_bits() >> 31) as u8) << 3
}

#[cfg(test)]
mod tests {
    use super::super::decode_e2m1;
    use super::*;

    #[test]
    fn the_nearer_neighbour_of_the_mean() {
        for (w, mean, expected) in [
            (1.3, 1.2, 1.0),
            (1.2, 1.3, 1.5),
            (-1.2, -1.3, -1.5),
            (1.3, -4.0, 1.0),
            (1.3, 9.0, 1.5),
            (2.6, 2.4, 2.0),
            (4.9, 5.1, 6.0),
            (1.25, 1.25, 1.5),
            (1.0, 1.3, 1.5),
            (6.0, 4.9, 4.0),
            (0.0, 0.1, 0.0),
            (7.5, 5.5, 6.0),
        ] {
            assert_eq!(decode_e2m1(round_by_mean(w, mean)), expected, "{w}, {mean}");
        }
    }

    /// Where the mean is the weight, this is rounding to nearest with ties away from 0.
    #[test]
    fn a_weight_that_rests_is_rounded_to_nearest() {
        for i in -6000..=6000 {
            let w = i as f32 / 1000.0;
            let distance = |code: u8| (decode_e2m1(code).abs() - w.abs()).abs();
            let best = (0..8u8).rev().min_by(|a, b| distance(*a).total_cmp(&distance(*b))).unwrap();
            assert_eq!(round_by_mean(w, w) & 7, best, "{w}");
        }
    }
}
