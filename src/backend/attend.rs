//! Causal self-attention.

use super::{Memory, Precision, Sequences};

/// Sizes of an attention operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// B and T.
    pub sequences: Sequences,
    /// H.
    pub heads: usize,
    /// C / H.
    pub head_size: usize,
    /// Of the scores, which are divided by sqrt(head size) besides: 1 in GPT-2.
    pub score_factor: f32,
    /// Of its products.
    pub precision: Precision,
}

/// What the backward pass of attention works on.
pub struct AttentionBackward<'a, B: Memory> {
    /// (B, T, 3 C), overwritten.
    pub dqkv: &'a mut B::Tensor,
    /// (B, T, C)
    pub dout: &'a B::Tensor,
    /// (B, T, C), of the forward pass.
    pub out: &'a B::Tensor,
    /// (B, H, T), of the forward pass.
    pub lse: &'a B::F32,
    /// (B, T, 3 C)
    pub qkv: &'a B::Tensor,
}

/// Attention.
pub trait Attend: Memory {
    /// out (B, T, C) = softmax(factor q k^T / sqrt(head size), causal) v from qkv (B, T, 3 C): q, k
    /// and v of C channels each, heads side by side. `lse` (B, H, T) keeps the logarithm of each
    /// row's sum.
    fn attention_forward(
        &self,
        workspace: &mut Self::Workspace,
        out: &mut Self::Tensor,
        lse: &mut Self::F32,
        qkv: &Self::Tensor,
        shape: AttentionShape,
    );
    /// dqkv from dout.
    fn attention_backward(
        &self,
        workspace: &mut Self::Workspace,
        operands: AttentionBackward<'_, Self>,
        shape: AttentionShape,
    );
}
