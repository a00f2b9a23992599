//! Rotary positions and the norms of heads before them.

use super::device::launch;
use super::device::memory::Tensor;
use super::embed::Tokens;
use super::quantize::sums;
use super::{Cuda, Workspace, attend, kernel};
use crate::backend::{
    AttentionShape, Documents, HeadNorms, HeadNormsBackward, NormShape, Rotate, Turn,
};

/// Pairs of the largest head.
const MOST_PAIRS: usize = attend::MAX_HEAD_SIZE / 2;

/// Threads of a block, which has a row, and of one that has many.
const THREADS: usize = 128;
const THREADS_OF_MANY: usize = 256;

/// Most blocks of the backward kernel, each of which leaves partial sums of both weights.
const MAX_PARTS: usize = 512;

/// Floats of scratch that the backward pass needs: (parts, 2, D).
pub(super) fn partials(head_size: usize) -> usize {
    MAX_PARTS * 2 * head_size
}

/// Where rows stand.
#[derive(Clone, Copy)]
pub(super) enum Places {
    /// In sequences of so many positions, and in documents that begin at those there, or 0.
    Whole { length: usize, starts: u64 },
    /// Behind others: the position of the first is there, or `of_each`.
    Behind { starts: u64, of_each: bool },
}

/// `Rotations` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Rotations {
    table: u64,
    starts: u64,
    half: u32,
    length: u32,
    of_each: u32,
    frequencies: [f32; MOST_PAIRS],
}

impl Rotations {
    pub(super) fn new(table: u64, frequencies: &[f32], places: Places) -> Self {
        let (length, starts, of_each) = match places {
            Places::Whole { length, starts } => (length as u32, starts, 0),
            Places::Behind { starts, of_each } => (0, starts, u32::from(of_each)),
        };
        let mut all = [0.0; MOST_PAIRS];
        all[..frequencies.len()].copy_from_slice(frequencies);
        let half = frequencies.len() as u32;
        Self { table, starts, half, length, of_each, frequencies: all }
    }
}

/// Starts the kernel that makes the table of so many rows.
pub(super) fn find(
    cuda: &Cuda,
    table: &mut Tensor,
    frequencies: &[f32],
    rows: usize,
    places: Places,
) {
    let of_rows = Rotations::new(table.write().address, frequencies, places);
    launch!(cuda.gpu, "find_rotations", [rows, 1, 1], THREADS, 0; of_rows);
}

/// `OfHeads` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct OfHeads {
    pub(super) to: u64,
    pub(super) amax: u64,
    pub(super) x: u64,
    pub(super) table: u64,
    pub(super) q: u64,
    pub(super) k: u64,
    pub(super) partial: u64,
    pub(super) rows: u32,
    pub(super) heads: u32,
    pub(super) kv_heads: u32,
    pub(super) half: u32,
    pub(super) epsilon: f32,
}

impl OfHeads {
    /// In place, without norms.
    pub(super) fn new(to: u64, table: u64, shape: AttentionShape) -> Self {
        let AttentionShape { sequences, heads, kv_heads, head_size, .. } = shape;
        let [rows, heads, kv_heads, half] =
            [sequences.rows(), heads, kv_heads, head_size / 2].map(|n| n as u32);
        let (amax, x, q, k, partial, epsilon) = (0, 0, 0, 0, 0, 0.0);
        Self { to, amax, x, table, q, k, partial, rows, heads, kv_heads, half, epsilon }
    }

    /// The same of x, with these norms.
    fn normed(self, x: &Tensor, HeadNorms { q, k }: HeadNorms<'_, Cuda>, epsilon: f32) -> Self {
        let [q, k] = [q, k].map(|w| w.as_read_in(x.precision));
        Self { x: x.address(), q, k, epsilon, ..self }
    }
}

impl Rotate for Cuda {
    fn rotations(
        &self,
        table: &mut Tensor,
        frequencies: &[f32],
        documents: Option<Documents<'_, Self>>,
        AttentionShape { sequences, .. }: AttentionShape,
    ) {
        let starts = documents.map_or(0, Tokens::ids);
        let places = Places::Whole { length: sequences.length, starts };
        find(self, table, frequencies, sequences.rows(), places);
    }

    fn rotate(&self, qkv: &mut Tensor, table: &Tensor, turn: Turn, shape: AttentionShape) {
        let name = match turn {
            Turn::Forward => kernel!(qkv, "rotate", false),
            Turn::Back => kernel!(qkv, "rotate", true),
        };
        let mut qkv = qkv.write();
        // Attention reads q and k, and a product gradients.
        let amax = if turn == Turn::Back { qkv.amax() } else { 0 };
        let of_heads = OfHeads { amax, ..OfHeads::new(qkv.address, table.address(), shape) };
        launch!(self.gpu, name, [shape.sequences.rows(), 1, 1], THREADS, 0; of_heads);
    }

    fn head_norms_forward(
        &self,
        out: &mut Tensor,
        qkv: &Tensor,
        table: &Tensor,
        norms: HeadNorms<'_, Self>,
        (shape, NormShape { epsilon, .. }): (AttentionShape, NormShape),
    ) {
        let of_heads = OfHeads::new(out.write().address, table.address(), shape);
        let of_heads = of_heads.normed(qkv, norms, epsilon);
        let grid = [shape.sequences.rows(), 1, 1];
        launch!(self.gpu, kernel!(qkv, "norm_heads"), grid, THREADS, 0; of_heads);
    }

    fn head_norms_backward(
        &self,
        workspace: &mut Workspace,
        operands: HeadNormsBackward<'_, Self>,
        (shape, NormShape { epsilon, .. }): (AttentionShape, NormShape),
    ) {
        let HeadNormsBackward { dqkv, dq, dk, qkv, table, norms, accumulate } = operands;
        let partial = workspace.partials.address;
        // As many as run at once.
        let parts = (2 * self.gpu.multiprocessors as usize).min(MAX_PARTS);
        let mut dqkv = dqkv.write();
        let amax = dqkv.amax();
        let of_heads = OfHeads::new(dqkv.address, table.address(), shape);
        let of_heads = OfHeads { amax, partial, ..of_heads.normed(qkv, norms, epsilon) };
        let (name, grid) = (kernel!(qkv, "norm_heads_backward"), [parts, 1, 1]);
        launch!(self.gpu, name, grid, THREADS_OF_MANY, 0; of_heads);
        sums::add_pairs(self, [dq, dk], partial, parts, shape.head_size, accumulate);
    }
}
