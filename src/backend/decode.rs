//! Decoding: rows of a sequence behind those whose keys and values are kept.

use super::{Attend, AttentionShape, HeadShape, Linear, LinearForward, LinearShape};
use crate::formats::LinearRecipe;

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
        recipe: &LinearRecipe,
    ) -> Self::Packed;
    /// Fills it. The recipe's forward product is in f32 or bf16.
    fn pack_weight(
        &self,
        packed: &mut Self::Packed,
        w: Self::Param<'_>,
        shape: LinearShape,
        recipe: &LinearRecipe,
    );
    /// [`Linear::linear_forward`] with a weight that is packed.
    fn packed_forward(
        &self,
        workspace: &mut Self::Workspace,
        operands: LinearForward<'_, Self>,
        packed: &Self::Packed,
        shape: LinearShape,
        recipe: &LinearRecipe,
    );
    /// logits (V) of a row of x (rows, C), with the head as a packed weight (V, C).
    fn packed_logits(
        &self,
        workspace: &mut Self::Workspace,
        logits: &mut Self::F32,
        row_of_x: (&Self::Tensor, usize),
        head: &Self::Packed,
        shape: HeadShape,
        recipe: &LinearRecipe,
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
