//! Weights from step to step, beside what an optimizer does to them: the slow means that the forward
//! pass may round them by, how far they and what they are rounded to move, and the reset of those
//! that oscillate.

use super::{Memory, Part, Slot};
use crate::Result;
use crate::formats::{Observation, Operand};

/// The values of a weight, (outputs, inputs).
pub enum Values<'a, B: Memory> {
    /// As they are.
    Weight(B::Param<'a>),
    /// As they were.
    Kept(Part<'a, B>),
}

/// When a weight is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Before a step.
    Before,
    /// After it.
    After,
}

/// A weight as it is looked at.
#[derive(Clone, Copy)]
pub struct Viewed<'a> {
    /// Which of the observer's weights.
    pub number: usize,
    /// Outputs and inputs.
    pub shape: [usize; 2],
    /// W of the forward pass: E2M1 with scales of blocks or squares.
    pub operand: &'a Operand,
}

/// What is kept of a weight that is tracked: a slot of flat buffers.
pub struct Track<'a, B: Memory> {
    /// The weight before the step.
    pub before: &'a mut B::F32,
    /// How far it moved in all.
    pub moved: &'a mut B::F32,
    /// How far what it is rounded to moved.
    pub rounded_moved: &'a mut B::F32,
    /// Where in all three.
    pub slot: Slot,
}

/// Follows weights.
pub trait Follow: Memory {
    /// Scratch memory for both views of a weight, and what was observed.
    type Observer: Send + Sync;

    /// mean = `decay` mean + (1 - `decay`) w, for the piece of `means` in `slot`, which is as long as
    /// w: [`crate::formats::ema`], bit for bit.
    fn update_mean(&self, means: &mut Self::F32, slot: Slot, w: Self::Param<'_>, decay: f32);
    /// An observer of weights of these outputs and inputs, by number.
    fn observer(&self, arena: &mut Self::Arena, shapes: &[[usize; 2]]) -> Result<Self::Observer>;
    /// Tracking begins: `before` = w, and nothing moved yet.
    fn begin_track(&self, track: Track<'_, Self>, w: Self::Param<'_>);
    /// Keeps what the forward pass makes of a weight, dequantized, and the scales of its blocks, as
    /// a view. `mean` is the slow mean where the operand is rounded by it.
    fn view(
        &self,
        observer: &mut Self::Observer,
        view: View,
        values: Values<'_, Self>,
        mean: Option<Part<'_, Self>>,
        of: Viewed<'_>,
    );
    /// Adds to `track` how far the weight and what it is rounded to moved from one view to the
    /// other, which are of it, notes what else there is to see ([`crate::formats::Observed`]), and
    /// keeps the weight as the one before the next step.
    fn observe(
        &self,
        observer: &mut Self::Observer,
        track: Track<'_, Self>,
        w: Self::Param<'_>,
        of: Viewed<'_>,
    );
    /// What was last observed of each weight. Waits for the device.
    fn observations(&self, observer: &mut Self::Observer, to: &mut [Observation]) -> Result<()>;
    /// Makes the f32 numbers in `to`, from byte `at` on, the intervals that Q-Ramping updates
    /// weights at which moved so far: `interval` of `optim/ramping.rs`, bit for bit.
    fn find_intervals(&self, to: &mut Self::Bytes, at: usize, track: Track<'_, Self>, period: f32);
    /// Weights that [`crate::formats::oscillates`] is true of become what they are rounded to, by
    /// the view after the step. Copies that kernels read follow.
    fn reset(
        &self,
        observer: &Self::Observer,
        track: Track<'_, Self>,
        weights: (&mut Self::Weights, Slot),
        of: Viewed<'_>,
        threshold: f32,
    );
}
