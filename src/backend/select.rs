//! Blocks that see a part of each sequence: which positions, and their rows out of the residual
//! stream and back.

use std::ops::Range;

use super::{Memory, Sequences};
use crate::formats::Random;

/// Sizes of what is selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectShape {
    /// B and T, of all rows.
    pub sequences: Sequences,
    /// r: positions of each sequence that are kept, from 1 to T. Kept rows are B r.
    pub kept: usize,
    /// C.
    pub channels: usize,
}

/// The positions that a block keeps.
pub struct Selected<'a, B: Select> {
    /// Of all blocks.
    pub selection: &'a B::Selection,
    /// Which block.
    pub layer: usize,
}

/// A sum of the residual stream in a part of its rows.
pub struct SelectedSum<'a, B: Memory> {
    /// (B T, C), overwritten: x + y in kept rows, `base` in others.
    pub out: &'a mut B::Tensor,
    /// (B T, C)
    pub base: &'a B::Tensor,
    /// (B r, C)
    pub x: &'a B::Tensor,
    /// (B r, C)
    pub y: &'a B::Tensor,
}

/// Rows of some positions. Kept rows are in the order of sequences, then of positions.
pub trait Select: Memory {
    /// Positions of sequences that blocks keep.
    type Selection: Send;

    /// Room for those of so many blocks.
    fn selection(
        &self,
        arena: &mut Self::Arena,
        sequences: Sequences,
        layers: usize,
    ) -> Self::Selection;
    /// Draws what some blocks keep, which is [`crate::formats::kept_positions`] for the place that
    /// `random` says, whatever its layer.
    fn select_positions(
        &self,
        selection: &mut Self::Selection,
        layers: Range<usize>,
        shape: SelectShape,
        random: &Random,
    );
    /// out (B r, C) = the kept rows of x (B T, C).
    fn gather_rows(
        &self,
        out: &mut Self::Tensor,
        x: &Self::Tensor,
        selected: Selected<'_, Self>,
        shape: SelectShape,
    );
    /// The kept rows of `to` (B T, C) = x (B r, C); others stay.
    fn scatter_rows(
        &self,
        to: &mut Self::Tensor,
        x: &Self::Tensor,
        selected: Selected<'_, Self>,
        shape: SelectShape,
    );
    /// A sum in the kept rows.
    fn scatter_sum(
        &self,
        sum: SelectedSum<'_, Self>,
        selected: Selected<'_, Self>,
        shape: SelectShape,
    );
}
