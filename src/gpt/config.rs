//! The shape of a GPT, in GPT-2's blocks or in Llama's.
//!
//! What differs from GPT-2 is data, which is GPT-2's by default and then changes no bit. A head
//! that is not the embedding is one more value at the end of the parameters, so that everything
//! before it has one order; attention's scores have a factor beside 1 / sqrt(d), which is 1 in
//! GPT-2; GELU comes in two forms, of which only GPT-2's is fused with quantization.

use std::fmt;
use std::str::FromStr;

use super::{Lora, Rope, RopeScaling};
pub use crate::backend::Activation;
use crate::backend::NormKind;
use crate::{Error, Result};

/// What the blocks of a model are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// GPT-2's (Radford et al. 2019): LayerNorm, learned positions, GELU between the two layers of
    /// the MLP, a bias everywhere.
    #[default]
    Gpt2,
    /// Llama's (Touvron et al. 2023, arXiv 2302.13971), which Mistral, Qwen2, Qwen3 and SmolLM have,
    /// too: RMSNorm, rotary positions, SwiGLU, fewer heads of keys and values, and no biases but
    /// where [`ModelConfig::qkv_bias`] says so.
    Llama,
}

/// The shape of a model. `Default` is GPT-2 small (124M).
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// What its blocks are made of.
    pub architecture: Architecture,
    /// V: number of different tokens. Any number; kernels pad inside.
    pub vocab_size: usize,
    /// Longest sequence the model can see; in GPT-2 the number of learned positions.
    pub context_length: usize,
    /// L: number of transformer blocks.
    pub layers: usize,
    /// H: attention heads a block; must divide `channels` where `head_size` is 0.
    pub heads: usize,
    /// Heads of keys and values a block, which divide `heads`; 0 stands for `heads`, GPT-2's.
    pub kv_heads: usize,
    /// D: channels of a head; 0 stands for `channels / heads`, GPT-2's. Even in Llama's blocks.
    pub head_size: usize,
    /// C: width of the residual stream.
    pub channels: usize,
    /// Added to the variance in LayerNorm, and to the mean square in RMSNorm.
    pub layer_norm_epsilon: f32,
    /// M: width of the MLP inside a block; 0 stands for 4 C, GPT-2's, or in Llama's blocks for 8/3 C,
    /// rounded up to a multiple of 256, and is what a model of that width has.
    pub mlp_channels: usize,
    /// What the MLP of GPT-2's blocks applies between its two layers; Llama's have SwiGLU.
    pub activation: Activation,
    /// Whether what makes q, k and v has a bias in Llama's blocks, as in Qwen2.
    pub qkv_bias: bool,
    /// Whether every head of q and k is normalized in Llama's blocks, as in Qwen3.
    pub qk_norm: bool,
    /// How far positions turn in Llama's blocks.
    pub rope: Rope,
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
            architecture: Architecture::Gpt2,
            vocab_size: 50257,
            context_length: 1024,
            layers: 12,
            heads: 12,
            kv_heads: 0,
            head_size: 0,
            channels: 768,
            layer_norm_epsilon: 1e-5,
            mlp_channels: 0,
            activation: Activation::GeluTanh,
            qkv_bias: false,
            qk_norm: false,
            rope: Rope::default(),
            tied_head: true,
            scale_attention: true,
            scale_attention_by_layer: false,
            lora: None,
        }
    }
}

impl ModelConfig {
    /// Channels of one attention head: `head_size`, or what 0 stands for.
    pub fn head_width(&self) -> usize {
        if self.head_size == 0 { self.channels / self.heads } else { self.head_size }
    }

    /// Heads of keys and values: `kv_heads`, or what 0 stands for.
    pub fn kv_head_count(&self) -> usize {
        if self.kv_heads == 0 { self.heads } else { self.kv_heads }
    }

    /// Width of the MLP: `mlp_channels`, or what 0 stands for.
    pub fn mlp_width(&self) -> usize {
        if self.mlp_channels == 0 { self.usual_mlp_width() } else { self.mlp_channels }
    }

    fn usual_mlp_width(&self) -> usize {
        match self.architecture {
            Architecture::Gpt2 => 4 * self.channels,
            Architecture::Llama => (8 * self.channels).div_ceil(3).next_multiple_of(256),
        }
    }

    /// Whether its blocks are Llama's.
    pub(crate) fn is_llama(&self) -> bool {
        self.architecture == Architecture::Llama
    }

    /// The norms of its blocks.
    pub(super) fn norm(&self) -> NormKind {
        if self.is_llama() { NormKind::Rms } else { NormKind::Layer }
    }

    /// The linear layers of a block, (inputs, outputs): what makes q, k and v, what attention's
    /// result passes through, and the two of the MLP, of which Llama's first makes gate and up.
    pub fn linears(&self) -> [[usize; 2]; 4] {
        let (c, m) = (self.channels, self.mlp_width());
        let [q, kv] = [self.heads, self.kv_head_count()].map(|heads| heads * self.head_width());
        let gates = if self.is_llama() { 2 } else { 1 };
        [[c, q + 2 * kv], [q, c], [c, gates * m], [m, c]]
    }

    /// With 0 for what 0 stands for, so that equal models have equal configurations.
    pub(crate) fn canonical(mut self) -> Self {
        if self.mlp_channels == self.usual_mlp_width() {
            self.mlp_channels = 0;
        }
        if self.kv_heads == self.heads {
            self.kv_heads = 0;
        }
        if self.channels.is_multiple_of(self.heads) && self.head_size == self.channels / self.heads
        {
            self.head_size = 0;
        }
        if self.is_llama() {
            self.activation = Activation::default();
        }
        self
    }

    /// Factor of the scores of layer `layer`, which are divided by the root of the head size in any
    /// case.
    pub(crate) fn score_factor(&self, layer: usize) -> f32 {
        let unscaled = if self.scale_attention { 1.0 } else { (self.head_width() as f32).sqrt() };
        let number = if self.scale_attention_by_layer { layer + 1 } else { 1 };
        unscaled / number as f32
    }

    /// Number of scalars in all tensors.
    pub fn parameter_count(&self) -> u64 {
        let linears = self.linears();
        let products: usize = linears.iter().map(|[inputs, outputs]| inputs * outputs).sum();
        let [v, t, l, c] = [self.vocab_size, self.context_length, self.layers, self.channels];
        let tables = if self.tied_head { v } else { 2 * v };
        let [[_, qkv], ..] = linears;
        let (beside, last) = match self.architecture {
            Architecture::Gpt2 => {
                let biases: usize = linears.iter().map(|[_, outputs]| outputs).sum();
                (t * c + 2 * c, biases + 4 * c)
            }
            Architecture::Llama => {
                let biases = if self.qkv_bias { qkv } else { 0 };
                let of_heads = if self.qk_norm { 2 * self.head_width() } else { 0 };
                (c, biases + of_heads + 2 * c)
            }
        };
        let block = (products + last) as u64 + self.adapters_of_a_block();
        (tables * c + beside) as u64 + l as u64 * block
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
        if self.head_size > 1 << 16 {
            let message = format!("expected a number up to {}, got {}", 1 << 16, self.head_size);
            return Err(Error::invalid("head_size", message));
        }
        if self.head_size == 0 && !self.channels.is_multiple_of(self.heads) {
            return Err(Error::invalid(
                "heads",
                format!("{} heads do not divide {} channels", self.heads, self.channels),
            ));
        }
        let of_heads = self.heads * self.head_width();
        if of_heads > 1 << 22 {
            let message =
                format!("expected up to {} channels in all heads, got {of_heads}", 1 << 22);
            return Err(Error::invalid("head_size", message));
        }
        if self.kv_heads > 0 && !self.heads.is_multiple_of(self.kv_heads) {
            let message = format!("{} do not divide {} heads", self.kv_heads, self.heads);
            return Err(Error::invalid("kv_heads", message));
        }
        if !(self.layer_norm_epsilon > 0.0 && self.layer_norm_epsilon < 1.0) {
            return Err(Error::invalid(
                "layer_norm_epsilon",
                format!("expected a number between 0 and 1, got {}", self.layer_norm_epsilon),
            ));
        }
        match self.architecture {
            Architecture::Gpt2 => self.validate_gpt2()?,
            Architecture::Llama => self.validate_llama()?,
        }
        self.lora.as_ref().map_or(Ok(()), Lora::validate)
    }

    fn validate_gpt2(&self) -> Result<()> {
        let usual = Self { kv_heads: 0, head_size: 0, ..self.clone() };
        let only_of_llama = [
            ("kv_heads", self.kv_head_count() != self.heads),
            ("head_size", self.head_width() != usual.channels / usual.heads),
            ("qkv_bias", self.qkv_bias),
            ("qk_norm", self.qk_norm),
            ("rope_theta", self.rope.theta != Rope::default().theta),
            ("rope_scaling", self.rope.scaling != RopeScaling::None),
        ];
        match only_of_llama.into_iter().find(|(_, is_set)| *is_set) {
            Some((what, _)) => {
                let message = "GPT-2's blocks have no such choice; architecture llama has";
                Err(Error::invalid(what, message))
            }
            None => Ok(()),
        }
    }

    fn validate_llama(&self) -> Result<()> {
        if !self.head_width().is_multiple_of(2) {
            let message = format!(
                "expected an even number of channels a head, which rotary positions turn in pairs, \
                 got {}",
                self.head_width()
            );
            return Err(Error::invalid("head_size", message));
        }
        if self.qkv_bias && self.qk_norm {
            let message = "expected no bias beside norms of q and k: no known model has both";
            return Err(Error::invalid("qkv_bias", message));
        }
        for (what, is_usual) in [
            ("scale_attention", self.scale_attention),
            ("scale_attention_by_layer", !self.scale_attention_by_layer),
        ] {
            if !is_usual {
                return Err(Error::invalid(
                    what,
                    "Llama's blocks have no such choice; GPT-2's have",
                ));
            }
        }
        self.rope.validate()
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

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gpt2 => "gpt2",
            Self::Llama => "llama",
        })
    }
}

impl FromStr for Architecture {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "gpt2" => Ok(Self::Gpt2),
            "llama" => Ok(Self::Llama),
            _ => {
                let message = format!("expected gpt2 or llama, got {name:?}");
                Err(Error::invalid("architecture", message))
            }
        }
    }
}
