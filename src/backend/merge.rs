//! Channels merged by their hashes, before a linear layer reads them.

use super::{Memory, Sequences};
use crate::formats::Draw;

/// Sizes of what is merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeShape {
    /// B and T.
    pub sequences: Sequences,
    /// C.
    pub channels: usize,
    /// L, at most [`crate::formats::MAX_HASHES`].
    pub hashes: usize,
}

/// What channels are merged in.
pub struct Merged<'a, B: Memory> {
    /// (B T, C), in place.
    pub x: &'a mut B::Tensor,
    /// How many buckets each sequence has, B whole numbers, is written from `at` on.
    pub buckets: &'a mut B::F32,
    /// Where in `buckets`.
    pub at: usize,
}

/// Merges channels.
pub trait Merge: Memory {
    /// In every sequence each channel of x becomes the mean of those with an equal hash:
    /// [`crate::formats::merge_channels`], rounded to what a tensor holds.
    fn merge_channels(
        &self,
        workspace: &mut Self::Workspace,
        merged: Merged<'_, Self>,
        shape: MergeShape,
        draw: &Draw,
    );
}
