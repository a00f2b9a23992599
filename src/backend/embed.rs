//! Embeddings of tokens and positions.

use super::{Documents, Memory, Sequences};

/// Sizes of an embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmbeddingShape {
    /// B and T.
    pub sequences: Sequences,
    /// C.
    pub channels: usize,
}

/// Where gradients of embeddings go.
pub struct EmbeddingGradients<'a, B: Memory> {
    /// (V, C), added to; None where wte is not trained.
    pub dwte: Option<B::Gradient<'a>>,
    /// (context, C), overwritten, or with `accumulate` added to; 0 in rows beyond T. None the same, and
    /// where there is no wpe.
    pub dwpe: Option<B::Gradient<'a>>,
    /// Whether what dwpe held counts.
    pub accumulate: bool,
}

/// The embedding.
pub trait Embed: Memory {
    /// out (B T, C): row `token` of wte (V, C) plus, where there is one, row `position` of wpe
    /// (context, C), which is counted from where a document begins.
    fn embedding_forward(
        &self,
        out: &mut Self::Tensor,
        tokens: &Self::Tokens,
        documents: Option<Documents<'_, Self>>,
        wte: Self::Param<'_>,
        wpe: Option<Self::Param<'_>>,
        shape: EmbeddingShape,
    );
    /// Adds dout (B T, C) to the rows of dwte that the forward pass read, and makes dwpe of it.
    /// `tokens` are those of the last [`Memory::write_tokens`].
    fn embedding_backward(
        &self,
        gradients: EmbeddingGradients<'_, Self>,
        dout: &Self::Tensor,
        tokens: &Self::Tokens,
        documents: Option<Documents<'_, Self>>,
        shape: EmbeddingShape,
    );
}
