//! The end of a step: a reduction of all gradients to a few sums, then the update.
//!
//! Between the two is the seam at which clipping decides, and at which ranks exchange what they
//! have.

use super::{Memory, Slot};
use crate::Result;
use crate::optim::{Largest, Optimizer, OptimizerStep, StepSums};

/// All parameters of a model with what training keeps for them.
pub struct Trained<'a, B: Memory> {
    /// Where each lies in all of the buffers.
    pub slots: &'a [Slot],
    /// The parameters.
    pub weights: &'a mut B::Weights,
    /// What the optimizer keeps of each element, in the order that it names its states in.
    pub states: &'a mut [B::F32],
    /// Gradients.
    pub gradients: &'a mut B::F32,
}

/// Optimizers.
pub trait Optimize: Memory {
    /// What a reduction leaves for the update that follows it: sums, tables of parameters.
    type Reduction: Send;

    /// What steps of an optimizer over these parameters need; an error where the host lacks memory
    /// for it.
    fn reduction(
        &self,
        arena: &mut Self::Arena,
        slots: &[Slot],
        optimizer: &Optimizer,
    ) -> Result<Self::Reduction>;
    /// Begins a step: forgets what was counted since the last one, by evaluations and by a step that
    /// was given up.
    fn begin_step(&self, _workspace: &mut Self::Workspace) {}
    /// Takes the sum of the first `rows` losses as that of the step, or with `accumulate` adds it.
    fn add_losses(
        &self,
        reduction: &mut Self::Reduction,
        losses: &Self::F32,
        rows: usize,
        accumulate: bool,
    );
    /// Sums up what the gradients are, for the update that comes next, and finds the rate of each
    /// parameter where it is not the step's. `workspace` is that of the
    /// step's operations, which count clamped scales in it.
    fn reduce(
        &self,
        workspace: &mut Self::Workspace,
        reduction: &mut Self::Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
    );
    /// Clips, and makes one update of every parameter and its states after [`Optimize::reduce`],
    /// unless loss or norm is not finite or the norm above `step`'s limit: then nothing changes.
    /// Waits for the device.
    fn update(
        &self,
        reduction: &mut Self::Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
    ) -> Result<StepSums>;
    /// Computes the update of [`Optimize::update`], which found `sums`, for every parameter without
    /// storing it, and calls `largest` with what it would leave of each, in their order. Waits for
    /// the device.
    fn try_update(
        &self,
        reduction: &mut Self::Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
        sums: &StepSums,
        largest: &mut (dyn FnMut(Largest) + Send),
    ) -> Result<()>;
    /// The sum of the first `rows` losses, of an evaluation. Waits for the device.
    fn sum_losses(
        &self,
        reduction: &mut Self::Reduction,
        losses: &Self::F32,
        rows: usize,
    ) -> Result<f64>;
}
