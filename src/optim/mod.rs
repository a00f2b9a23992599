//! The optimizer's settings. The update itself is a backend operation (`Backend::adamw`).

mod schedule;

pub use schedule::{Schedule, ScheduleKind};

use crate::{Error, Result};

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101): Adam with weight decay outside of the moments.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the square root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay, applied to tensors of two or more dimensions.
    pub weight_decay: f32,
    /// Largest global gradient norm; longer gradients are scaled down to it. 0 turns it off.
    pub clip: f32,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1, clip: 1.0 }
    }
}

impl AdamW {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming the field.
    pub fn validate(&self) -> Result<()> {
        let limits = [
            ("beta1", self.beta1, 0.0, 1.0),
            ("beta2", self.beta2, 0.0, 1.0),
            ("epsilon", self.epsilon, 0.0, 1.0),
            ("weight_decay", self.weight_decay, 0.0, f32::MAX),
            ("clip", self.clip, 0.0, f32::MAX),
        ];
        for (what, value, low, high) in limits {
            if !(value >= low && value < high) {
                let message = format!("expected a number from {low} to below {high}, got {value}");
                return Err(Error::invalid(what, message));
            }
        }
        Ok(())
    }
}
