//! What a model tells a backend of itself: the shapes of its operations on a batch. The backend
//! sizes its scratch memory by them, too, so that none knows an architecture.

use super::{Lora, ModelConfig};
use crate::Result;
use crate::backend::{
    AttentionShape, EmbeddingShape, HeadShape, LinearShape, LoraShape, NormShape, Precision,
    Sequences,
};
use crate::formats::LINEARS;
use crate::reserve::collect;

/// Shapes of a model's operations.
#[derive(Clone, Copy)]
pub(crate) struct Shapes<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) sequences: Sequences,
    /// Of activations, and of the products of attention and the head.
    pub(crate) precision: Precision,
}

impl Shapes<'_> {
    pub(super) fn embedding(&self) -> EmbeddingShape {
        EmbeddingShape { sequences: self.sequences, channels: self.config.channels }
    }

    pub(crate) fn norm(&self) -> NormShape {
        let ModelConfig { channels, layer_norm_epsilon: epsilon, .. } = *self.config;
        NormShape { rows: self.sequences.rows(), channels, epsilon, kind: self.config.norm() }
    }

    /// The linear layers of a block, by number.
    pub(crate) fn linears(&self) -> [LinearShape; 4] {
        let rows = self.sequences.rows();
        self.config.linears().map(|[inputs, outputs]| LinearShape { rows, inputs, outputs })
    }

    /// The adapter beside linear layer `number` of a block, where it has one.
    pub(super) fn adapter(&self, number: usize) -> Option<LoraShape> {
        let lora = self.config.lora.as_ref().filter(|lora| lora.layers[number])?;
        let (scale, Lora { rank, .. }) = (lora.scale(), *lora);
        let LinearShape { rows, inputs, outputs } = self.linears()[number];
        Some(LoraShape { rows, inputs, outputs, rank, scale, precision: self.precision })
    }

    /// All adapters of a block.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn adapters(&self) -> Result<Vec<LoraShape>> {
        let adapters = (0..LINEARS).filter_map(|number| self.adapter(number)).map(Ok);
        collect("the shapes of the adapters", adapters)
    }

    pub(crate) fn attention(&self, layer: usize) -> AttentionShape {
        let Self { config, sequences, precision } = *self;
        let (heads, kv_heads) = (config.heads, config.kv_head_count());
        let head_size = config.head_width();
        let score_factor = config.score_factor(layer);
        AttentionShape { sequences, heads, kv_heads, head_size, score_factor, precision }
    }

    /// Gate and up of Llama's MLP are so wide each.
    pub(super) fn gated(&self) -> [usize; 2] {
        [self.sequences.rows(), self.config.mlp_width()]
    }

    pub(crate) fn head(&self) -> HeadShape {
        let ModelConfig { channels, vocab_size, .. } = *self.config;
        HeadShape { rows: self.sequences.rows(), channels, vocab_size, precision: self.precision }
    }
}
