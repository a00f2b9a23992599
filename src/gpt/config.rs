//! The shape of a GPT.
//!
//! What differs from GPT-2 is data, which is GPT-2's by default and then changes no bit. A head
//! that is not the embedding is one more value at the end of the parameters, so that everything
//! before it has one order; attention's scores have a factor beside 1 / sqrt(d), which is 1 in
//! GPT-2; GELU comes in two forms, of which only GPT-2's is fused with quantization.

use std::fmt;
use std::str::FromStr;

use super::Lora;
pub use crate::backend::Activation;
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
    /// M: width of the MLP inside a block; 0 stands for 4 C, GPT-2's, and is what a model of that
    /// width has.
    pub mlp_channels: usize,
    /// What the MLP applies between its two layers.
    pub activation: Activation,
    /// Whether the head shares its weights with the token embedding, as in GPT-2. Otherwise it has
    /// a tensor `lm_head.weight` (V, C) of its own.
    pub tied_head: bool,
    /// Whether attention divides its scores by the root of the head size, as in GPT-2.
    pub scale_attention: bool,
    /// Whether attention divides its scores by the number of its layer, from 1 on, as well.
    pub scale_attention_by_layer: bool,
    /// What is trained beside the linear layers, in the place of everything else; None where nothing
    /// is.
    pub lora: Option<Lora>,
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
            mlp_channels: 0,
            activation: Activation::GeluTanh,
            tied_head: true,
            scale_attention: true,
            scale_attention_by_layer: false,
            lora: None,
        }
    }
}

impl ModelConfig {
    /// Channels of one attention head.
    pub fn head_size(&self) -> usize {
        self.channels / self.heads
    }

    /// Width of the MLP: `mlp_channels`, or what 0 stands for.
    pub fn mlp_width(&self) -> usize {
        if self.mlp_channels == 0 { 4 * self.channels } else { self.mlp_channels }
    }

    /// The linear layers of a block, (inputs, outputs): what makes q, k and v, what attention's
    /// result passes through, and the two of the MLP.
    pub fn linears(&self) -> [[usize; 2]; 4] {
        let (c, m) = (self.channels, self.mlp_width());
        [[c, 3 * c], [c, c], [c, m], [m, c]]
    }

    /// With 0 for the width that 0 stands for, so that equal models have equal configurations.
    pub(crate) fn canonical(mut self) -> Self {
        if self.mlp_channels == 4 * self.channels {
            self.mlp_channels = 0;
        }
        self
    }

    /// Factor of the scores of layer `layer`, which are divided by the root of the head size in any
    /// case.
    pub(crate) fn score_factor(&self, layer: usize) -> f32 {
        let unscaled = if self.scale_attention { 1.0 } else { (self.head_size() as f32).sqrt() };
        let number = if self.scale_attention_by_layer { layer + 1 } else { 1 };
        unscaled / number as f32
    }

    /// Number of scalars in all tensors.
    pub fn parameter_count(&self) -> u64 {
        let [v, t, l, c, m] =
            [self.vocab_size, self.context_length, self.layers, self.channels, self.mlp_width()]
                .map(|n| n as u64);
        let tables = if self.tied_head { v + t } else { 2 * v + t };
        // Per block: weights of attention and MLP, 5 C and M of their biases, 4 C of two
        // LayerNorms.
        let block = 4 * c * c + 2 * c * m + 9 * c + m + self.adapters_of_a_block();
        tables * c + l * block + 2 * c
    }

    /// Scalars of the adapters of a block.
    fn adapters_of_a_block(&self) -> u64 {
        let Some(lora) = &self.lora else { return 0 };
        let adapted = self.linears().into_iter().zip(lora.layers).filter(|(_, is)| *is);
        adapted.map(|([inputs, outputs], _)| (lora.rank * (inputs + outputs)) as u64).sum()
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
        if self.mlp_channels > 1 << 22 {
            let message = format!("expected a number up to {}, got {}", 1 << 22, self.mlp_channels);
            return Err(Error::invalid("mlp_channels", message));
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
        self.lora.as_ref().map_or(Ok(()), Lora::validate)
    }
}

/// As `config.json` names it.
impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GeluTanh => "gelu_new",
            Self::Gelu => "gelu",
        })
    }
}

/// All names of transformers for the same functions.
impl FromStr for Activation {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_fast"
            | "gelu_accurate" => Ok(Self::GeluTanh),
            "gelu" | "gelu_python" => Ok(Self::Gelu),
            _ => {
                let message = format!(
                    "expected gelu_new (the tanh form) or gelu (the exact one), got {name}"
                );
                Err(Error::invalid("activation", message))
            }
        }
    }
}
