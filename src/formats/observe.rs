//! What is seen of weights from step to step: how far they move, and how far and how often what
//! they are rounded to does; how sure their codes are.
//!
//! Source: TetraJet (arXiv 2502.20853), section 4.

use super::e2m1::{E2M1_MAX, E2M1_VALUES};
use super::quantize::nearest;

/// How many times as far as itself the number of an oscillating weight moves.
pub const OSCILLATING: f32 = 16.0;

/// Sums over the elements of a weight that was observed after a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Observation {
    /// Of the squares of changes.
    pub changes: f64,
    /// Of the squares before.
    pub before: f64,
    /// Of the squares of the rounded weights' changes.
    pub rounded_changes: f64,
    /// Of their squares before.
    pub rounded_before: f64,
    /// Of [`confidence`].
    pub confidence: f64,
    /// Codes that changed, where 0 is as good as -0.
    pub flipped: u64,
    /// Elements above the largest number of their blocks.
    pub clipped: u64,
    /// Elements whose numbers have moved more than [`OSCILLATING`] times as far as themselves since
    /// tracking began.
    pub oscillating: u64,
    /// The largest magnitude.
    pub amax: f32,
}

impl Observation {
    /// That of both parts.
    pub fn and(self, other: Self) -> Self {
        Self {
            changes: self.changes + other.changes,
            before: self.before + other.before,
            rounded_changes: self.rounded_changes + other.rounded_changes,
            rounded_before: self.rounded_before + other.rounded_before,
            confidence: self.confidence + other.confidence,
            flipped: self.flipped + other.flipped,
            clipped: self.clipped + other.clipped,
            oscillating: self.oscillating + other.oscillating,
            amax: self.amax.max(other.amax),
        }
    }
}

/// An element of a weight before and after a step.
#[derive(Clone, Copy, Debug)]
pub struct Observed {
    /// The weights.
    pub weights: [f32; 2],
    /// What they are rounded to, dequantized.
    pub rounded: [f32; 2],
    /// The scales of their blocks.
    pub block_scales: [f32; 2],
}

impl Observed {
    /// Adds what is seen of it, and how far it moved to `moved`: itself, and its number.
    pub fn add_to(&self, sums: &mut Observation, moved: [&mut f32; 2]) {
        let Self { weights: [before, after], rounded: [q_before, q_after], block_scales } = *self;
        let (change, q_change) = (after - before, q_after - q_before);
        let [moved, q_moved] = moved;
        *moved += change.abs();
        *q_moved += q_change.abs();
        let square = |v: f32| f64::from(v) * f64::from(v);
        sums.changes += square(change);
        sums.before += square(before);
        sums.rounded_changes += square(q_change);
        sums.rounded_before += square(q_before);
        let y = element(after, block_scales[1]).abs();
        sums.confidence += f64::from(confidence(y));
        let codes = [element(q_before, block_scales[0]), element(q_after, block_scales[1])];
        let [was, is] = codes.map(|y| (nearest(y.abs()), y < 0.0));
        sums.flipped += u64::from(was != is);
        sums.clipped += u64::from(y > E2M1_MAX);
        sums.oscillating += u64::from(*moved > 0.0 && *q_moved / *moved > OSCILLATING);
        sums.amax = sums.amax.max(after.abs());
    }
}

/// A weight or its number over its scale; 0 where the block vanishes.
fn element(v: f32, unit: f32) -> f32 {
    if unit == 0.0 { 0.0 } else { v / unit }
}

/// How far from changing the code of |y|, a weight over its scale, is: its distance from the nearest
/// midpoint of the grid over the largest in its bin; 1 above 6.
pub fn confidence(y: f32) -> f32 {
    let code = usize::from(nearest(y));
    let middle = |code: usize| (E2M1_VALUES[code] + E2M1_VALUES[code + 1]) * 0.5;
    let (distance, largest) = match code {
        0 => (middle(0) - y, middle(0)),
        7 => (y - middle(6), E2M1_MAX - middle(6)),
        _ => {
            let (low, high) = (middle(code - 1), middle(code));
            ((y - low).min(high - y), (high - low) * 0.5)
        }
    };
    (distance / largest).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_sure_in_the_middle_of_their_bins() {
        for (y, expected) in [
            (0.0, 1.0),
            (0.125, 0.5),
            (0.25, 0.0),
            (0.5, 1.0),
            (1.75, 0.0),
            (2.125, 1.0),
            (3.0, 1.0),
            (4.25, 1.0),
            (5.0, 0.0),
            (5.5, 0.5),
            (6.0, 1.0),
            (7.9, 1.0),
        ] {
            assert_eq!(confidence(y), expected, "{y}");
        }
        assert!((0..=8000).all(|i| (0.0..=1.0).contains(&confidence(i as f32 / 1000.0))));
    }

    #[test]
    fn what_is_seen_of_an_element() {
        let (mut sums, mut moved, mut q_moved) = (Observation::default(), 0.0, 0.0);
        let mut see = |weights, rounded, block_scales| {
            let seen = Observed { weights, rounded, block_scales };
            seen.add_to(&mut sums, [&mut moved, &mut q_moved]);
        };
        see([0.375, -0.5], [0.5, -0.5], [0.5, 0.5]);
        // Another scale is no other code, and a sign of 0 is none.
        see([3.0, 3.0], [3.0, 3.0], [0.5, 0.5]);
        see([3.5, 3.5], [1.5, 3.0], [0.25, 0.5]);
        see([0.01, -0.01], [0.0, -0.0], [1.0, 1.0]);
        see([0.0, 0.25], [0.0, 0.0], [0.0, 0.0]);
        assert_eq!((sums.flipped, sums.clipped, sums.amax), (1, 1, 3.5));
        assert_eq!(sums.rounded_changes, 1.0 + 2.25);
        assert_eq!((moved, q_moved), (0.875 + 0.02 + 0.25, 2.5));
        let twice = sums.and(sums);
        assert_eq!((twice.flipped, twice.changes, twice.amax), (2, 2.0 * sums.changes, 3.5));
    }
}
