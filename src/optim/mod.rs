//! The optimizer's settings. The update itself is a backend operation (`Backend::adamw`).

mod bounds;
mod schedule;

pub(crate) use bounds::Bounds;
pub use schedule::{Schedule, ScheduleKind};

use crate::{Error, Result};

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101): Adam with weight decay outside of the moments.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the square root of the second moment; above 0.
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
            // The smallest number of f32: 0 would make NaN of every weight whose gradient is 0.
            ("epsilon", self.epsilon, f32::from_bits(1), 1.0),
            ("weight_decay", self.weight_decay, 0.0, f32::MAX),
            ("clip", self.clip, 0.0, f32::MAX),
        ];
        for (what, value, low, high) in limits {
            if !(value >= low && value < high) {
                let range = match what {
                    "epsilon" => "above 0 (1e-8 is usual)".to_owned(),
                    _ => format!("from {low}"),
                };
                let message = format!("expected a number {range} to below {high}, got {value}");
                return Err(Error::invalid(what, message));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_nan_is_refused_by_name() {
        let refused = |optimizer: AdamW| match optimizer.validate() {
            Err(Error::InvalidArgument { what, .. }) => what,
            other => panic!("{optimizer:?}: {other:?}"),
        };
        let good = AdamW::default();
        // 1e-46 is 0 in f32, and 1 - 1e-9 is 1.
        let too_small = "1e-46".parse().unwrap();
        for epsilon in [0.0, -0.0, too_small, -1e-8, 1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(refused(AdamW { epsilon, ..good.clone() }), "epsilon");
        }
        for beta in [1.0, "0.999999999".parse().unwrap(), -0.1, f32::NAN] {
            assert_eq!(refused(AdamW { beta1: beta, ..good.clone() }), "beta1");
            assert_eq!(refused(AdamW { beta2: beta, ..good.clone() }), "beta2");
        }
        for bad in [-0.1, f32::NAN, f32::INFINITY] {
            assert_eq!(refused(AdamW { weight_decay: bad, ..good.clone() }), "weight_decay");
            assert_eq!(refused(AdamW { clip: bad, ..good.clone() }), "clip");
        }
        let message = AdamW { epsilon: 0.0, ..good }.validate().unwrap_err().to_string();
        assert_eq!(message, "epsilon: expected a number above 0 (1e-8 is usual) to below 1, got 0");
    }
}
