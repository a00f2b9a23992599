//! Decoding: rows of a sequence behind those whose keys and values are kept.

use std::ops::Range;

use super::{
    Attend, AttentionShape, Embed, EmbeddingShape, HeadShape, Linear, LinearForward, LinearShape,
    Precision,
};
use crate::Result;
use crate::optim::{Master, named};

/// What a model's linear layers and its head are computed in where it writes text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DecoderWeights {
    /// f32; on a GPU bf16 where a trainer keeps the weights with `master=split`.
    #[default]
    F32,
    /// bf16, weights and what they are multiplied with, with sums in f32: half the bytes. The numbers
    /// of the recipe `bf16`; on a processor attention stays in f32.
    Bf16,
    /// MXFP4, 4.25 bits a weight, by the scales of [`crate::formats::quantize_closest`]; what they are
    /// multiplied with in bf16 on a GPU, and on a processor in 8 bits, for every 32 elements a scale of
    /// their own.
    Mxfp4,
}

impl DecoderWeights {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Mxfp4];

    /// Its name: `f32`, `bf16` or `mxfp4`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Mxfp4 => "mxfp4",
        }
    }
}

named!(DecoderWeights, "weights");

/// Rows of a sequence in a pass: all rows of it are of one, or each is of one of its own.
#[derive(Clone, Copy, Debug)]
pub struct OfSequence {
    /// Rows of the pass.
    pub all: usize,
    /// Rows of the pass before these.
    pub first: usize,
    /// Position of the first in its sequence.
    pub start: usize,
}

/// Operations on a few rows, whose weights are read once for all of them.
///
/// A row's result is that of the same row of a whole sequence, bit for bit where a backend sums in
/// an order that does not depend on the rows beside it.
pub trait Decode: Linear + Attend + Embed {
    /// The weight of a linear layer as such products read it, made once for all rows to come.
    type Packed: Send + Sync;

    /// Rows of a pass: enough that weights are read seldom, and few enough that activations stay
    /// small.
    const ROWS: usize;

    /// What activations are in beside such weights, of a model that keeps its own as `master`.
    fn activations_in(weights: DecoderWeights, master: Master) -> Precision;
    /// An error that names what the device cannot do for a layer, and the remedy.
    fn decodes(&self, _shape: LinearShape, _weights: DecoderWeights) -> Result<()> {
        Ok(())
    }

    /// Room for it.
    fn packed(
        &self,
        arena: &mut Self::Arena,
        shape: LinearShape,
        weights: DecoderWeights,
    ) -> Self::Packed;
    /// Room for the head, which a backend may read where and as it lies.
    fn packed_head(
        &self,
        arena: &mut Self::Arena,
        shape: LinearShape,
        weights: DecoderWeights,
    ) -> Self::Packed;
    /// Fills such room, with the numbers that it was made for.
    fn pack_weight(&self, packed: &mut Self::Packed, w: Self::Param<'_>, shape: LinearShape);
    /// [`Linear::linear_forward`] with a weight that is packed.
    fn packed_forward(
        &self,
        workspace: &mut Self::Workspace,
        operands: LinearForward<'_, Self>,
        packed: &Self::Packed,
        shape: LinearShape,
    );
    /// logits (n, V) of n rows of x (rows, C), with the head (V, C) and what it is packed as.
    fn packed_logits(
        &self,
        workspace: &mut Self::Workspace,
        logits: &mut Self::F32,
        rows_of_x: (&Self::Tensor, Range<usize>),
        head: (Self::Param<'_>, &Self::Packed),
        shape: HeadShape,
    );
    /// Room for `rows` tokens and where they stand.
    fn rows(&self, arena: &mut Self::Arena, rows: usize) -> Result<Self::Tokens>;
    /// Writes tokens of one sequence behind the first `starts[0]`, or, of as many sequences, one of each
    /// and where it stands. What is then asked of these rows, with the same `starts`, may be recorded,
    /// and done again for others of as many tokens. Weights, packed or not, and what is kept of earlier
    /// positions are as they were when this was called: operations on the rows may read them early.
    fn write_rows(&self, to: &mut Self::Tokens, tokens: &[u32], starts: &[usize]);
    /// out (rows, C) = the rows' tokens of wte (V, C) plus their positions of wpe (T, C), where there is one.
    fn embedding_behind(
        &self,
        out: &mut Self::Tensor,
        rows: (&Self::Tokens, &[usize]),
        wte: Self::Param<'_>,
        wpe: Option<Self::Param<'_>>,
        shape: EmbeddingShape,
    );
    /// The table of [`super::Rotate::rotations`] for these rows.
    fn rotations_behind(
        &self,
        table: &mut Self::Tensor,
        frequencies: &[f32],
        rows: (&Self::Tokens, &[usize]),
        shape: AttentionShape,
    );
    /// Room for keys and values of so many positions of a sequence, in the precision of `shape`, as
    /// the backend lays them out.
    fn kept(
        &self,
        arena: &mut Self::Arena,
        positions: usize,
        shape: AttentionShape,
    ) -> Self::Tensor;
    /// Keeps in `to` what is kept in another of the same room.
    fn copy_kept(&self, from: &Self::Tensor, to: &mut Self::Tensor);
    /// Keeps keys and values of rows of a sequence, n of those in qkv (rows, qkv channels),
    /// behind the first `start` positions of `kept`, and makes those of out (rows, C) of the attention
    /// of these rows to all positions up to their own. Of one sequence, whose length in `shape` is n; the
    /// workspace is to be for sequences of `start` + n.
    fn attention_behind(
        &self,
        workspace: &mut Self::Workspace,
        out: &mut Self::Tensor,
        qkv: &Self::Tensor,
        kept: &mut Self::Tensor,
        rows: (&Self::Tokens, OfSequence),
        shape: AttentionShape,
    );
}
