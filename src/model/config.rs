//! The shape of a GPT.

use crate::{Error, Result};

/// The shape of a GPT-2 model. `Default` is GPT-2 small (124M).
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// V: number of different tokens. Any number; kernels pad inside.
    pub vocab_size: usize,
    /// Longest sequence the model can see (number of learned positions).
    pub context_length: usize,
    /// L: number of transformer blocks.
    pub layers: usize,
    /// H: attention heads a block; must divide `channels`.
    pub heads: usize,
    /// C: width of the residual stream.
    pub channels: usize,
    /// Added to the variance in LayerNorm.
    pub layer_norm_epsilon: f32,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            vocab_size: 50257,
            context_length: 1024,
            layers: 12,
            heads: 12,
            channels: 768,
            layer_norm_epsilon: 1e-5,
        }
    }
}

impl ModelConfig {
    /// Channels of one attention head.
    pub fn head_size(&self) -> usize {
        self.channels / self.heads
    }

    /// Number of trained scalars.
    pub fn parameter_count(&self) -> u64 {
        let (v, t, l, c) = (
            self.vocab_size as u64,
            self.context_length as u64,
            self.layers as u64,
            self.channels as u64,
        );
        // Per block: 12 C^2 of weights, 9 C of their biases, 4 C of two LayerNorms.
        (v + t) * c + l * (12 * c * c + 13 * c) + 2 * c
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming the field, what was expected and what came.
    pub fn validate(&self) -> Result<()> {
        let limits = [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("context_length", self.context_length, 1 << 24),
            ("layers", self.layers, 4095),
            ("heads", self.heads, 1 << 16),
            ("channels", self.channels, 1 << 20),
        ];
        for (what, value, limit) in limits {
            if value == 0 || value > limit {
                let message = format!("expected a number from 1 to {limit}, got {value}");
                return Err(Error::invalid(what, message));
            }
        }
        if !self.channels.is_multiple_of(self.heads) {
            return Err(Error::invalid(
                "heads",
                format!("{} heads do not divide {} channels", self.heads, self.channels),
            ));
        }
        if !(self.layer_norm_epsilon > 0.0 && self.layer_norm_epsilon < 1.0) {
            return Err(Error::invalid(
                "layer_norm_epsilon",
                format!("expected a number between 0 and 1, got {}", self.layer_norm_epsilon),
            ));
        }
        Ok(())
    }
}
