//! What a model tells a backend of itself: the shapes of its operations on a batch, from which the backend
//! sizes its scratch memory, too, so that no backend knows an architecture.

use super::ModelConfig;
use crate::backend::{
    AttentionShape, EmbeddingShape, HeadShape, LinearShape, NormShape, Precision, Sequences,
};

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
        NormShape { rows: self.sequences.rows(), channels, epsilon }
    }

    /// The linear layers of a block, by number.
    pub(crate) fn linears(&self) -> [LinearShape; 4] {
        let rows = self.sequences.rows();
        self.config.linears().map(|[inputs, outputs]| LinearShape { rows, inputs, outputs })
    }

    pub(crate) fn attention(&self, layer: usize) -> AttentionShape {
        let (heads, head_size) = (self.config.heads, self.config.head_size());
        let (score_factor, precision) = (self.config.score_factor(layer), self.precision);
        AttentionShape { sequences: self.sequences, heads, head_size, score_factor, precision }
    }

    pub(crate) fn head(&self) -> HeadShape {
        let ModelConfig { channels, vocab_size, .. } = *self.config;
        HeadShape { rows: self.sequences.rows(), channels, vocab_size, precision: self.precision }
    }
}
