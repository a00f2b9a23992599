//! Rotary positions (Su et al. 2021, "RoFormer", arXiv 2104.09864), and the norms of heads before
//! them.
//!
//! A head's channels are pairs, i and i + D / 2 of D, as Hugging Face's checkpoints have them: at
//! position p pair i is turned by p f_i. What rows are turned by is a table, made once a pass, so
//! that nothing else knows of positions, documents or rows that blocks drop.

use super::{AttentionShape, Documents, Memory, NormShape};

/// Which way pairs are turned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// By their angles.
    Forward,
    /// Back, as gradients are.
    Back,
}

/// Weights of the norms of heads, RMSNorm each: (D).
pub struct HeadNorms<'a, B: Memory> {
    /// Of every head of q.
    pub q: B::Param<'a>,
    /// Of every head of k.
    pub k: B::Param<'a>,
}

/// What the backward pass of heads' norms works on.
pub struct HeadNormsBackward<'a, B: Memory> {
    /// (rows, qkv channels): gradients of what the forward pass put out, which become those of its
    /// input.
    pub dqkv: &'a mut B::Tensor,
    /// (D), overwritten, or with `accumulate` added to; None where it is not trained.
    pub dq: Option<B::Gradient<'a>>,
    /// The same.
    pub dk: Option<B::Gradient<'a>>,
    /// (rows, qkv channels), the forward pass's input.
    pub qkv: &'a B::Tensor,
    /// What rows were turned by.
    pub table: &'a B::Tensor,
    /// Weights.
    pub norms: HeadNorms<'a, B>,
    /// Whether what dq and dk held counts.
    pub accumulate: bool,
}

/// Rotary positions.
///
/// Tables (rows, D) are in f32: of every row the cosines of its D / 2 angles, then their sines. An
/// angle is the product of position and frequency, rounded to f32, as transformers has it.
pub trait Rotate: Memory {
    /// The table of whole sequences, in which positions are counted from where a document begins;
    /// `frequencies` has D / 2 of them.
    fn rotations(
        &self,
        table: &mut Self::Tensor,
        frequencies: &[f32],
        documents: Option<Documents<'_, Self>>,
        shape: AttentionShape,
    );
    /// Turns q and k of qkv (rows, qkv channels), in place.
    fn rotate(
        &self,
        qkv: &mut Self::Tensor,
        table: &Self::Tensor,
        turn: Turn,
        shape: AttentionShape,
    );
    /// out (rows, qkv channels): q and k of qkv with every head normalized, then turned; v as it is.
    /// Of `norm` epsilon counts alone.
    fn head_norms_forward(
        &self,
        out: &mut Self::Tensor,
        qkv: &Self::Tensor,
        table: &Self::Tensor,
        norms: HeadNorms<'_, Self>,
        shape: (AttentionShape, NormShape),
    );
    /// Gradients of qkv and of the weights.
    fn head_norms_backward(
        &self,
        workspace: &mut Self::Workspace,
        operands: HeadNormsBackward<'_, Self>,
        shape: (AttentionShape, NormShape),
    );
}
