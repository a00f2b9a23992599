//! How large weights and states can be after an update, computed from a few numbers alone.
//!
//! A step must not leave NaN or infinity behind, and must not read all weights once more to know.
//! So a trainer carries bounds of their magnitudes along: every update makes them wider by what it
//! can have added, which each optimizer says of itself. They say up to which norm of the gradient
//! the next update is safe for certain; what they cannot vouch for is computed twice, first without
//! storing (`Optimize::try_update`), which also tells the magnitudes themselves, and so bounds to
//! start again from.
//!
//! The update asks for the bound's norm where it asks whether the norm is finite. The bound of the
//! weights lies with them, for several trainers and the host write there.

use super::{Largest, MAX_STATES, Master, OptimizerStep};

/// Upper bounds of magnitudes; infinite where nothing is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bounds {
    /// Of every weight of the model.
    pub(crate) weight: f64,
    /// Of every element of each state.
    pub(crate) states: [f64; MAX_STATES],
}

/// No term of an update may be larger: far enough below f32's largest number for sums of a few.
pub(super) const MOST: f64 = 1e37;
/// More than what the roundings of an update can add, relatively.
pub(super) const SLACK: f64 = 1.0 + 1e-5;
/// The same for numbers so small that roundings are not relative.
pub(super) const FLOOR: f64 = 1e-30;

impl Bounds {
    /// Of what may hold anything.
    pub(crate) const UNKNOWN: Self =
        Self { weight: f64::INFINITY, states: [f64::INFINITY; MAX_STATES] };

    /// Of states that are 0, with weights of which nothing is known.
    pub(crate) const NEW: Self = Self { weight: f64::INFINITY, states: [FLOOR; MAX_STATES] };

    /// The largest norm of a clipped gradient with which every number of an update is finite for
    /// certain; below 0 where that cannot be said of any.
    pub(crate) fn largest_gradient(&self, step: &OptimizerStep) -> f32 {
        (step.optimizer.definition().largest_gradient)(self, step)
    }

    /// Those after an update with a clipped gradient of norm `gradient`.
    pub(crate) fn after(&self, step: &OptimizerStep, gradient: f32) -> Self {
        (step.optimizer.definition().after)(self, step, gradient).stored(step)
    }

    /// Those of what an update leaves whose magnitudes were found.
    pub(crate) fn found(Largest { weight, states }: Largest, step: &OptimizerStep) -> Self {
        let bound = |x: f32| f64::from(x).max(FLOOR);
        Self { weight: bound(weight), states: states.map(bound) }.stored(step)
    }

    /// States are rounded to what they are kept in, and weights move by a last place of f32 where
    /// they are split.
    fn stored(self, step: &OptimizerStep) -> Self {
        let slack = step.optimizer.moments.slack();
        let weight = match step.optimizer.master {
            Master::F32 => self.weight,
            Master::Split => self.weight * SLACK,
        };
        Self { weight, states: self.states.map(|bound| bound * slack) }
    }
}
