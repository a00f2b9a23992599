//! How large weights and moments can be after an update, computed from a few numbers alone.
//!
//! A step must not leave NaN or infinity behind, and must not read all weights once more to know. So a
//! trainer carries bounds of their magnitudes along: every update makes them wider by what it can have
//! added. They say up to which norm of the gradient the next update is safe for certain; what they
//! cannot vouch for is computed twice, first without storing (`Backend::try_step`), which also tells
//! the magnitudes themselves, and so bounds to start again from.

use crate::backend::{AdamWStep, Largest};

/// Upper bounds of magnitudes; infinite where nothing is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bounds {
    /// Of every weight of the model.
    pub(crate) weight: f64,
    /// Of every first moment.
    pub(crate) m: f64,
    /// Of every second moment.
    pub(crate) v: f64,
}

/// No term of an update may be larger: far enough below f32's largest number for sums of a few.
const MOST: f64 = 1e37;
/// More than what the roundings of an update can add, relatively.
const SLACK: f64 = 1.0 + 1e-5;
/// The same for numbers so small that roundings are not relative.
const FLOOR: f64 = 1e-30;

impl Bounds {
    /// Of what may hold anything.
    pub(crate) const UNKNOWN: Self =
        Self { weight: f64::INFINITY, m: f64::INFINITY, v: f64::INFINITY };

    /// Of moments that are 0, with weights of which nothing is known.
    pub(crate) const NEW: Self = Self { weight: f64::INFINITY, m: FLOOR, v: FLOOR };

    /// The largest norm of a clipped gradient with which every number of an update is finite for
    /// certain; below 0 where that cannot be said of any.
    pub(crate) fn largest_gradient(&self, step: &AdamWStep) -> f32 {
        let (size, epsilon) = (f64::from(step.size()), f64::from(step.epsilon));
        // A first moment becomes itself, its quotient by at least epsilon, and that times the size.
        let factor = (1.0 / epsilon).max(size / epsilon).max(1.0);
        let most = (MOST - self.weight * largest_keep(step)) / (2.0 * factor);
        // NOTE: a comparison with NaN is false.
        if self.m <= most && self.v <= MOST { most.min(MOST.sqrt()) as f32 } else { -1.0 }
    }

    /// Those after an update with a clipped gradient of norm `gradient`. No element of a gradient is
    /// larger than its norm, and a moment is a mean of what was there and what came.
    ///
    /// NOTE: but for clipping. Its factor may be so small that what is below f32's numbers rounds up to the
    /// smallest of them, which is less than twice as much.
    pub(crate) fn after(&self, step: &AdamWStep, gradient: f32) -> Self {
        let gradient = 2.0 * f64::from(gradient);
        let m = (self.m.max(gradient) * SLACK).max(FLOOR);
        let v = (self.v.max(gradient * gradient) * SLACK).max(FLOOR);
        let moved = m * f64::from(step.size()) / f64::from(step.epsilon);
        let weight = ((self.weight * largest_keep(step) + moved) * SLACK).max(FLOOR);
        Self { weight, m, v }
    }
}

impl From<Largest> for Bounds {
    fn from(largest: Largest) -> Self {
        let [weight, m, v] =
            [largest.weight, largest.m, largest.v].map(|x| f64::from(x).max(FLOOR));
        Self { weight, m, v }
    }
}

/// Largest factor that weight decay leaves of a weight; 1 for those that do not decay.
fn largest_keep(step: &AdamWStep) -> f64 {
    f64::from(step.keep().abs()).max(1.0)
}
