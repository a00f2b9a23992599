//! A step as data: what an update is told, what the reduction before it found, what it would leave.

use super::{MAX_STATES, Optimizer};

/// What one update is made from besides weights, states and gradients.
#[derive(Clone, Copy, Debug)]
pub struct OptimizerStep {
    /// The method and its settings.
    pub optimizer: Optimizer,
    /// Learning rate.
    pub lr: f32,
    /// 1 for the first update.
    pub t: u64,
    /// The run's, for moments that are rounded stochastically.
    pub seed: u64,
    /// Factor of the sum of losses that makes it the step's loss.
    pub loss_scale: f32,
    /// Largest norm of the clipped gradient with which the update is made; with a larger one
    /// nothing changes.
    pub largest_gradient: f32,
    /// What the decay rate of the mean of norms is multiplied by, where gradients are normalized; that
    /// of the first moment is already.
    pub annealing: f64,
}

impl OptimizerStep {
    /// How often a moment that began as 0 has been updated after this step.
    pub(crate) fn age(&self) -> u64 {
        match self.reset() {
            Some(reset) if self.t >= reset => self.t % reset + 1,
            _ => self.t,
        }
    }

    /// Whether moments begin as 0 in this step.
    pub(crate) fn starts_again(&self) -> bool {
        self.reset().is_some_and(|reset| self.t.is_multiple_of(reset))
    }

    /// Steps after which moments start again, where they do.
    fn reset(&self) -> Option<u64> {
        let Optimizer { kind, normalization, .. } = self.optimizer;
        (kind.normalizes() && normalization.reset > 0).then_some(normalization.reset.into())
    }
}

/// What a reduction found before anything was changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepSums {
    /// Sum of the losses of all micro-steps.
    pub losses: f64,
    /// Sum of the squares of all gradients.
    pub squares: f64,
    /// Blocks of MXFP4 operands that were rounded with a larger scale than their own, because the
    /// device multiplies in a format that the scale does not fit.
    pub raised_blocks: u64,
}

impl StepSums {
    /// Mean loss and global norm of the gradient.
    pub fn loss_and_norm(&self, step: &OptimizerStep) -> (f32, f32) {
        ((self.losses * f64::from(step.loss_scale)) as f32, self.squares.sqrt() as f32)
    }

    /// Norm of the clipped gradient.
    pub fn clipped_norm(&self, step: &OptimizerStep) -> f32 {
        let ((_, norm), clip) = (self.loss_and_norm(step), step.optimizer.clip);
        if clip > 0.0 { norm.min(clip) } else { norm }
    }

    /// Factor of the gradient that clipping asks for; None where the loss or the norm is not finite
    /// or the clipped norm above its limit, and nothing may be updated. PyTorch's clip_grad_norm_
    /// adds the same 1e-6.
    pub fn gradient_scale(&self, step: &OptimizerStep) -> Option<f32> {
        let ((loss, norm), clip) = (self.loss_and_norm(step), step.optimizer.clip);
        let excess = clip / (norm + 1e-6);
        let scale = if clip > 0.0 { excess.min(1.0) } else { 1.0 };
        let is_within = self.clipped_norm(step) <= step.largest_gradient;
        (loss.is_finite() && norm.is_finite() && is_within).then_some(scale)
    }
}

/// What an update is about to do to a parameter.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UpdateSums {
    /// Sum of the squares of its gradient, before clipping and whatever the optimizer makes of it.
    pub squares: f64,
    /// Sum of g^2 / max(u, epsilon^2), of the gradient g that moments take in and of corrected second
    /// moments u that have taken it in; 0 where there are none.
    pub ratios: f64,
}

/// Largest magnitudes of weights and of their states; NaN where one of them is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Largest {
    /// Of weights.
    pub weight: f32,
    /// Of each state; 0 beyond those that the optimizer has.
    pub states: [f32; MAX_STATES],
}

impl Largest {
    /// Takes in another's, whose numbers are finite.
    pub fn include(&mut self, other: Self) {
        self.weight = self.weight.max(other.weight);
        for (largest, other) in self.states.iter_mut().zip(other.states) {
            *largest = largest.max(other);
        }
    }
}
