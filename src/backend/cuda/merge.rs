//! Channels merged by their hashes: `merge.cu`.

use super::device::launch;
use super::device::memory::{Arena, Piece, Tensor};
use super::quantize::random;
use super::{Cuda, Workspace, kernel};
use crate::backend::{self, MergeShape, Merged};
use crate::formats::Draw;

const THREADS: usize = 256;

/// Scratch memory: what projections draw, and of each channel its hash and the next of its bucket.
pub(super) struct Room {
    /// (L, T) bytes
    projections: Piece,
    /// (B, C) u64
    hashes: Piece,
    /// (B, C) u32
    next: Piece,
}

impl Room {
    pub(super) fn new(arena: &mut Arena, shape: Option<MergeShape>) -> Self {
        let sizes = shape.map(|MergeShape { sequences, channels, hashes }| {
            [hashes * sequences.length, sequences.batch * channels]
        });
        let [entries, channels] = sizes.unwrap_or_default();
        Self {
            projections: arena.bytes(entries),
            hashes: arena.bytes(8 * channels),
            next: arena.bytes(4 * channels),
        }
    }
}

/// `Merge` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Merge {
    pub(super) x: u64,
    pub(super) projections: u64,
    pub(super) hashes: u64,
    pub(super) next: u64,
    pub(super) buckets: u64,
    pub(super) batch: u32,
    pub(super) tokens: u32,
    pub(super) channels: u32,
    pub(super) bits: u32,
    pub(super) draw: random::Draw,
}

/// Thread blocks of the kernels that draw projections and that hash channels.
pub(super) fn grids(MergeShape { sequences, channels, hashes }: MergeShape) -> [usize; 2] {
    [hashes * sequences.length.div_ceil(8), sequences.batch * channels]
        .map(|threads| threads.div_ceil(THREADS))
}

impl backend::Merge for Cuda {
    fn merge_channels(
        &self,
        workspace: &mut Workspace,
        Merged { x, buckets, at }: Merged<'_, Self>,
        shape: MergeShape,
        draw: &Draw,
    ) {
        let MergeShape { sequences, channels, hashes } = shape;
        let Room { projections, hashes: of_channels, next } = &workspace.merge;
        let merge = Merge {
            x: x.write().address,
            projections: projections.address,
            hashes: of_channels.address,
            next: next.address,
            buckets: buckets.at(at),
            batch: sequences.batch as u32,
            tokens: sequences.length as u32,
            channels: channels as u32,
            bits: hashes as u32,
            draw: random::Draw::from(*draw),
        };
        let x: &Tensor = x;
        let [drawing, hashing] = grids(shape);
        launch!(self.gpu, "draw_projections", [drawing, 1, 1], THREADS, 0; merge);
        launch!(self.gpu, kernel!(x, "hash_channels"), [hashing, 1, 1], THREADS, 0; merge);
        launch!(self.gpu, "link_channels", [sequences.batch, 1, 1], THREADS, 0; merge);
        let rows = sequences.rows();
        launch!(self.gpu, kernel!(x, "average_channels"), [rows, 1, 1], THREADS, 0; merge);
    }
}
