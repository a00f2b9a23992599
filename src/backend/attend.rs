//! Causal self-attention, of whole sequences or within the documents that are packed into them.

use super::{Memory, Precision, Sequences};

/// Where documents that are packed into sequences begin and end: (2, B, T). First of each position the
/// position of its sequence at which its document begins, then of each the one behind its document's
/// last. A position looks at its own document alone.
pub type Documents<'a, B> = &'a <B as Memory>::Tokens;

/// Sizes of an attention operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// B and T.
    pub sequences: Sequences,
    /// H: heads of q.
    pub heads: usize,
    /// Heads of k and v, which divide H: query heads share them in groups that lie together.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_size: usize,
    /// Of the scores, which are divided by sqrt(head size) besides: 1 in GPT-2.
    pub score_factor: f32,
    /// Of its products.
    pub precision: Precision,
}

impl AttentionShape {
    /// Channels of a row of out: C, all heads of q.
    pub fn channels(&self) -> usize {
        self.heads * self.head_size
    }

    /// Channels of a row of qkv: all heads of q, then those of k, then those of v; 3 C where each
    /// query head has a kv head.
    pub fn qkv_channels(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_size
    }

    /// Query heads that share a kv head.
    pub fn heads_per_kv_head(&self) -> usize {
        let Self { heads, kv_heads, .. } = *self;
        assert!(heads.is_multiple_of(kv_heads), "{kv_heads} kv heads divide {heads} heads");
        heads / kv_heads
    }

    /// Where in a row of qkv a query head's q begins, and the k and v that it uses.
    pub fn starts(&self, head: usize) -> [usize; 3] {
        let kv_head = self.heads + head / self.heads_per_kv_head();
        [head, kv_head, kv_head + self.kv_heads].map(|head| head * self.head_size)
    }
}

/// What the backward pass of attention works on.
pub struct AttentionBackward<'a, B: Memory> {
    /// (B, T, qkv channels), overwritten.
    pub dqkv: &'a mut B::Tensor,
    /// (B, T, C)
    pub dout: &'a B::Tensor,
    /// (B, T, C), of the forward pass.
    pub out: &'a B::Tensor,
    /// (B, H, T), of the forward pass.
    pub lse: &'a B::F32,
    /// (B, T, qkv channels)
    pub qkv: &'a B::Tensor,
    /// Of the forward pass.
    pub documents: Option<Documents<'a, B>>,
}

/// Attention.
pub trait Attend: Memory {
    /// out (B, T, C) = softmax(factor q k^T / sqrt(head size), causal) v from qkv (B, T, qkv
    /// channels), whose rows are as [`AttentionShape`] says. `lse` (B, H, T) keeps the logarithm of
    /// each row's sum. Of `documents` each is as if it were alone.
    fn attention_forward(
        &self,
        workspace: &mut Self::Workspace,
        out: &mut Self::Tensor,
        lse: &mut Self::F32,
        qkv: &Self::Tensor,
        documents: Option<Documents<'_, Self>>,
        shape: AttentionShape,
    );
    /// dqkv from dout: dk and dv of a kv head are sums over the query heads that share it.
    fn attention_backward(
        &self,
        workspace: &mut Self::Workspace,
        operands: AttentionBackward<'_, Self>,
        shape: AttentionShape,
    );
}
