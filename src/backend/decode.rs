//! Decoding: rows of a sequence behind those whose keys and values are kept.

use super::{Attend, AttentionShape, HeadShape, Linear, LinearForward, LinearShape};
use crate::optim::named;

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
    /// multiplied with in 8 bits, for every 32 elements a scale of their own. On a processor.
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

/// Operations on a few rows, whose weights are read once for all of them.
///
/// A row's result is that of the same row of a whole sequence, bit for bit where a backend sums in
/// an order that does not depend on the rows beside it.
pub trait Decode: Linear + Attend {
    /// The weight of a linear layer as such products read it, made once for all rows to come.
    type Packed: Send + Sync;

    /// Room for it.
    fn packed(
        &self,
        arena: &mut Self::Arena,
        shape: LinearShape,
        weights: DecoderWeights,
    ) -> Self::Packed;
    /// Fills it, with the numbers that it was made for.
    fn pack_weight(&self, packed: &mut Self::Packed, w: Self::Param<'_>, shape: LinearShape);
    /// [`Linear::linear_forward`] with a weight that is packed.
    fn packed_forward(
        &self,
        workspace: &mut Self::Workspace,
        operands: LinearForward<'_, Self>,
        packed: &Self::Packed,
        shape: LinearShape,
    );
    /// logits (V) of a row of x (rows, C), with the head as a packed weight (V, C).
    fn packed_logits(
        &self,
        workspace: &mut Self::Workspace,
        logits: &mut Self::F32,
        row_of_x: (&Self::Tensor, usize),
        head: &Self::Packed,
        shape: HeadShape,
    );
    /// Room for keys and values of so many positions of a sequence, in f32, as the backend lays them
    /// out.
    fn kept(
        &self,
        arena: &mut Self::Arena,
        positions: usize,
        shape: AttentionShape,
    ) -> Self::Tensor;
    /// Keeps keys and values of rows qkv (n, qkv channels) behind the first `start` positions of
    /// `kept`, and makes out (n, C) of the attention of these rows to all positions
    /// up to their own. Of one sequence, whose length in `shape` is n. Products are in f32, for which
    /// the workspace is to be, and for sequences of `start` + n.
    fn attention_behind(
        &self,
        workspace: &mut Self::Workspace,
        out: &mut Self::Tensor,
        qkv: &Self::Tensor,
        kept: &mut Self::Tensor,
        start: usize,
        shape: AttentionShape,
    );
}
