//! Weights from step to step, beside what an optimizer does to them: the slow means that the forward
//! pass may round them by.

use super::{Memory, Slot};

/// Follows weights.
pub trait Follow: Memory {
    /// mean = `decay` mean + (1 - `decay`) w, for the piece of `means` in `slot`, which is as long as
    /// w: [`crate::formats::ema`], bit for bit.
    fn update_mean(&self, means: &mut Self::F32, slot: Slot, w: Self::Param<'_>, decay: f32);
}
