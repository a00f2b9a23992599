//! The end of a step: a reduction of all gradients to a few sums, then the update.
//!
//! Between the two is the seam at which clipping decides, and at which ranks exchange what they have.

use super::Memory;
use crate::Result;

/// Settings of one AdamW update.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// 1 for the first update.
    pub t: u64,
    /// Largest global norm of the gradient, which is scaled down to it; 0 does not clip.
    pub clip: f32,
    /// Factor of the sum of losses that makes it the step's loss.
    pub loss_scale: f32,
    /// Largest norm of the clipped gradient with which the update is made; with a larger one nothing
    /// changes.
    pub largest_gradient: f32,
}

impl AdamWStep {
    /// The learning rate with the correction for first moments that start at 0. Corrections are
    /// computed in f64: beta^t is close to 1 for long.
    pub fn size(&self) -> f32 {
        (f64::from(self.lr) / self.correction(self.beta1)) as f32
    }

    /// Factor of the root of second moments, which start at 0, too.
    pub fn root(&self) -> f32 {
        (1.0 / self.correction(self.beta2).sqrt()) as f32
    }

    /// What weight decay leaves of a weight.
    pub fn keep(&self) -> f32 {
        1.0 - self.lr * self.weight_decay
    }

    fn correction(&self, beta: f32) -> f64 {
        1.0 - f64::from(beta).powf(self.t as f64)
    }
}

/// Largest magnitudes of weights and of their moments; NaN where one of them is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Largest {
    /// Of weights.
    pub weight: f32,
    /// Of first moments.
    pub m: f32,
    /// Of second moments.
    pub v: f32,
}

impl Largest {
    /// Takes in another's, whose numbers are finite.
    pub fn include(&mut self, other: Self) {
        self.weight = self.weight.max(other.weight);
        self.m = self.m.max(other.m);
        self.v = self.v.max(other.v);
    }
}

/// What an optimizer step found before it changed anything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepSums {
    /// Sum of the losses that [`Optimize::add_losses`] added.
    pub losses: f64,
    /// Sum of the squares of all gradients.
    pub squares: f64,
    /// Blocks of MXFP4 operands that were rounded with a larger scale than their own, because the device
    /// multiplies in a format that the scale does not fit.
    pub raised_blocks: u64,
}

impl StepSums {
    /// Mean loss and global norm of the gradient.
    pub fn loss_and_norm(&self, step: &AdamWStep) -> (f32, f32) {
        ((self.losses * f64::from(step.loss_scale)) as f32, self.squares.sqrt() as f32)
    }

    /// Norm of the clipped gradient.
    pub fn clipped_norm(&self, step: &AdamWStep) -> f32 {
        let (_, norm) = self.loss_and_norm(step);
        if step.clip > 0.0 { norm.min(step.clip) } else { norm }
    }

    /// Factor of the gradient that clipping asks for; None where the loss or the norm is not finite or
    /// the clipped norm above its limit, and nothing may be updated. PyTorch's clip_grad_norm_ adds the
    /// same 1e-6.
    pub fn gradient_scale(&self, step: &AdamWStep) -> Option<f32> {
        let (loss, norm) = self.loss_and_norm(step);
        let excess = step.clip / (norm + 1e-6);
        let scale = if step.clip > 0.0 { excess.min(1.0) } else { 1.0 };
        let is_within = self.clipped_norm(step) <= step.largest_gradient;
        (loss.is_finite() && norm.is_finite() && is_within).then_some(scale)
    }
}

/// All parameters of a model with what training keeps for them.
pub struct Trained<'a, B: Memory> {
    /// Where each lies in all of the buffers.
    pub slots: &'a [super::Slot],
    /// The parameters.
    pub weights: &'a mut B::Weights,
    /// First moments.
    pub m: &'a mut B::F32,
    /// Second moments.
    pub v: &'a mut B::F32,
    /// Gradients.
    pub gradients: &'a mut B::F32,
}

/// Optimizers.
pub trait Optimize: Memory {
    /// What optimizer steps keep besides the states: sums, tables of parameters.
    type Optimizer: Send;

    /// What steps over `parameters` parameters need; an error where the host lacks memory for it.
    fn optimizer(&self, arena: &mut Self::Arena, parameters: usize) -> Result<Self::Optimizer>;
    /// Takes the sum of the first `rows` losses as that of the step, or with `accumulate` adds it.
    fn add_losses(
        &self,
        optimizer: &mut Self::Optimizer,
        losses: &Self::F32,
        rows: usize,
        accumulate: bool,
    );
    /// Sums up what the gradients are, for the update that comes next. `workspace` is that of the step's
    /// operations, which count clamped scales in it.
    fn reduce(
        &self,
        workspace: &mut Self::Workspace,
        optimizer: &mut Self::Optimizer,
        trained: &mut Trained<'_, Self>,
        step: &AdamWStep,
    );
    /// Clips, and makes one AdamW update of every parameter after [`Optimize::reduce`], unless loss or norm
    /// is not finite or the norm above `step`'s limit: then nothing changes. Waits for the device.
    fn update(
        &self,
        optimizer: &mut Self::Optimizer,
        trained: &mut Trained<'_, Self>,
        step: &AdamWStep,
    ) -> Result<StepSums>;
    /// Computes the update of [`Optimize::update`], which found `sums`, for every parameter without
    /// storing it, and calls `largest` with what it would leave of each, in their order. Waits for the
    /// device.
    fn try_update(
        &self,
        optimizer: &mut Self::Optimizer,
        trained: &mut Trained<'_, Self>,
        step: &AdamWStep,
        sums: &StepSums,
        largest: &mut (dyn FnMut(Largest) + Send),
    ) -> Result<()>;
    /// The sum of the first `rows` losses, of an evaluation. Waits for the device.
    fn sum_losses(
        &self,
        optimizer: &mut Self::Optimizer,
        losses: &Self::F32,
        rows: usize,
    ) -> Result<f64>;
}
