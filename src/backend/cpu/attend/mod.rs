//! Causal self-attention, one (sequence, head) a job, by blocks of 48 queries.
//!
//! Scores are computed transposed, S^T = K Q^T, so that a block's scores lie as (key, 16 queries):
//! the softmax over keys is then lane-by-lane arithmetic, and the block is already packed as an
//! operand of the next product. A thread holds the scores of 48 queries, never (T, T).
//!
//! Backward (with P the softmax, D = rowsum(dO o O), s the scale of the scores, 1 / sqrt(d) in
//! GPT-2): dV = P^T dO; dP = dO V^T; dS = P o (dP - D); dQ = s dS K; dK = s dS^T Q. P is recomputed
//! from the scores and `lse`, the log of each row's sum, as in flash attention (Dao et al., arXiv
//! 2205.14135).
//!
//! Products are in f32. With AVX-512, those whose precision is bf16 are, and on tiles where there
//! are such.

mod f32;
mod panels;
mod rows;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::disjoint::DisjointSlice;
use super::gemm::{Matrix, PANEL, TILE_COLS};
use super::isa::Isa;
use super::workspace::{ScratchSize, Workspace};
use super::{Buffer, Cpu};
use crate::backend::{Attend, AttentionBackward, AttentionShape, Precision};
use rows::{QuerySums, dot, gradient_panel};

/// Queries of one block: the columns of a tile.
const QUERIES: usize = TILE_COLS;

/// What attention needs of a workspace; with `trains`, for gradients too.
pub(super) fn scratch(isa: Isa, shape: AttentionShape, trains: bool) -> ScratchSize {
    let AttentionShape { sequences, head_size, precision, .. } = shape;
    let scratch_len = if in_bf16(isa, precision) { panels::scratch_len } else { f32::scratch_len };
    #[cfg(target_arch = "x86_64")]
    let scratch_len = if in_tiles(isa, precision) { tiles::scratch_len } else { scratch_len };
    let of_thread = scratch_len(sequences.length, head_size, trains);
    ScratchSize { of_thread, ..ScratchSize::default() }
}

/// Whether products are in bf16, on tiles.
#[cfg(target_arch = "x86_64")]
fn in_tiles(isa: Isa, precision: Precision) -> bool {
    isa == Isa::Amx && precision == Precision::Bf16
}

/// Whether they are in bf16, in panels. Without an instruction that multiplies bf16, f32 is faster.
fn in_bf16(isa: Isa, precision: Precision) -> bool {
    isa == Isa::Avx512 && precision == Precision::Bf16
}

impl Attend for Cpu {
    fn attention_forward(
        &self,
        workspace: &mut Workspace,
        out: &mut Buffer<f32>,
        lse: &mut Buffer<f32>,
        qkv: &Buffer<f32>,
        shape: AttentionShape,
    ) {
        let (t, isa) = (shape.sequences.length, self.isa());
        let elements = shape.sequences.rows() * shape.heads * shape.head_size;
        assert!(out.len() >= elements && qkv.len() >= 3 * elements, "tensors hold the sequences");
        let (out, lse) = (DisjointSlice::new(out), DisjointSlice::new(lse));
        for_each_head(self, workspace, shape, |scratch, head| {
            let [q, k, v] = [0, 1, 2].map(|part| head.rows(qkv, 3, part));
            // SAFETY: a job owns the lse of its head.
            let lse = unsafe { lse.part(head.index * t, t) };
            let (scale, out) = (head.scale(), head.output(&out, 1, 0));
            let head = HeadForward { q, k, v, scale, out, lse };
            #[cfg(target_arch = "x86_64")]
            if in_tiles(isa, shape.precision) {
                return tiles::forward_head(isa, scratch, head);
            }
            if in_bf16(isa, shape.precision) {
                return panels::forward_head(isa, scratch, head);
            }
            f32::forward_head(isa, scratch, head);
        });
    }

    fn attention_backward(
        &self,
        workspace: &mut Workspace,
        operands: AttentionBackward<'_, Self>,
        shape: AttentionShape,
    ) {
        let AttentionBackward { dqkv, dout, out, lse, qkv } = operands;
        let (t, isa) = (shape.sequences.length, self.isa());
        let elements = shape.sequences.rows() * shape.heads * shape.head_size;
        assert!(dqkv.len() >= 3 * elements && qkv.len() >= 3 * elements && out.len() >= elements);
        let dqkv = DisjointSlice::new(dqkv);
        for_each_head(self, workspace, shape, |scratch, head| {
            let [q, k, v] = [0, 1, 2].map(|part| head.rows(qkv, 3, part));
            let [dq, dk, dv] = [0, 1, 2].map(|part| head.output(&dqkv, 3, part));
            let (out, dout) = (head.rows(out, 1, 0), head.rows(dout, 1, 0));
            let (scale, lse) = (head.scale(), &lse[head.index * t..][..t]);
            let head = HeadBackward { q, k, v, scale, out, dout, lse, dq, dk, dv };
            #[cfg(target_arch = "x86_64")]
            if in_tiles(isa, shape.precision) {
                return tiles::backward_head(isa, scratch, head);
            }
            if in_bf16(isa, shape.precision) {
                return panels::backward_head(isa, scratch, head);
            }
            f32::backward_head(isa, scratch, head);
        });
    }
}

/// The operands of one head's forward pass; `out` and `lse` (T) are written.
struct HeadForward<'a> {
    q: HeadRows<'a>,
    k: HeadRows<'a>,
    v: HeadRows<'a>,
    /// What the scores are multiplied by.
    scale: f32,
    out: HeadOutput,
    lse: &'a mut [f32],
}

/// The operands of one head's backward pass; `dq`, `dk` and `dv` are written.
struct HeadBackward<'a> {
    q: HeadRows<'a>,
    k: HeadRows<'a>,
    v: HeadRows<'a>,
    /// What the scores are multiplied by.
    scale: f32,
    out: HeadRows<'a>,
    dout: HeadRows<'a>,
    /// (T)
    lse: &'a [f32],
    dq: HeadOutput,
    dk: HeadOutput,
    dv: HeadOutput,
}

impl HeadBackward<'_> {
    /// scores -> P and dscores -> dS times the scale, both (keys, 16 queries), in place, for
    /// `queries` over keys 0 .. `keys`.
    fn gradient_panel(
        &self,
        isa: Isa,
        scores: &mut [f32],
        dscores: &mut [f32],
        queries: Range<usize>,
        keys: usize,
    ) {
        let first = queries.start;
        let (mut lse, mut d) = ([0.0; PANEL], [0.0; PANEL]);
        for (l, query) in queries.enumerate() {
            d[l] = dot(isa, self.out.row(query), self.dout.row(query));
            lse[l] = self.lse[query];
        }
        gradient_panel(isa, scores, dscores, first, keys, self.scale, &QuerySums { lse, d });
    }
}

/// Cuts scratch memory.
struct Scratch<'a>(&'a mut [f32]);

impl<'a> Scratch<'a> {
    fn f32(&mut self, len: usize) -> &'a mut [f32] {
        let (part, rest) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        part
    }

    fn words(&mut self, len: usize) -> &'a mut [u32] {
        bytemuck::cast_slice_mut(self.f32(len))
    }
}

/// One (sequence, head) pair.
#[derive(Clone, Copy)]
struct Head {
    shape: AttentionShape,
    batch: usize,
    head: usize,
    /// batch * H + head
    index: usize,
}

impl Head {
    /// Its columns of part `part` of (B, T, parts C).
    fn rows(self, data: &[f32], parts: usize, part: usize) -> HeadRows<'_> {
        let (start, stride) = self.place(parts, part);
        let AttentionShape { sequences, head_size, .. } = self.shape;
        HeadRows { data: &data[start..], length: sequences.length, head_size, stride }
    }

    /// The same of an output.
    fn output(self, to: &DisjointSlice<f32>, parts: usize, part: usize) -> HeadOutput {
        let (start, stride) = self.place(parts, part);
        HeadOutput { first: to.pointer(start), stride, head_size: self.shape.head_size }
    }

    /// Its first element there, and the elements from row to row.
    fn place(self, parts: usize, part: usize) -> (usize, usize) {
        let AttentionShape { sequences, heads, head_size, .. } = self.shape;
        let (row, channels) = (self.batch * sequences.length, heads * head_size);
        ((row * parts + part) * channels + self.head * head_size, parts * channels)
    }

    /// What its scores are multiplied by.
    fn scale(self) -> f32 {
        1.0 / (self.shape.head_size as f32).sqrt() * self.shape.score_factor
    }
}

/// Calls `f` for every head, on threads that each have scratch memory of their own.
fn for_each_head(
    cpu: &Cpu,
    workspace: &mut Workspace,
    shape: AttentionShape,
    f: impl Fn(&mut [f32], Head) + Sync + Send,
) {
    let heads = shape.sequences.batch * shape.heads;
    let next = AtomicUsize::new(0);
    cpu.install(|| {
        workspace.of_threads().with_max_len(1).for_each(|scratch| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= heads {
                    break;
                }
                let (batch, head) = (index / shape.heads, index % shape.heads);
                f(scratch, Head { shape, batch, head, index });
            }
        });
    });
}

/// One head's rows of a tensor: (T, d), rows `stride` apart.
#[derive(Clone, Copy)]
struct HeadRows<'a> {
    data: &'a [f32],
    length: usize,
    head_size: usize,
    stride: usize,
}

impl<'a> HeadRows<'a> {
    fn row(self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..self.head_size]
    }

    /// As vectors along d, one a position.
    fn by_position(self) -> Matrix<'a> {
        let Self { data, length: rows, head_size: depth, stride } = self;
        Matrix { data, rows, depth, stride, transposed: false, fp8_scale: None }
    }

    /// As vectors along T, one a channel.
    fn by_channel(self) -> Matrix<'a> {
        let Self { data, length: depth, head_size: rows, stride } = self;
        Matrix { data, rows, depth, stride, transposed: true, fp8_scale: None }
    }
}

/// One head's rows of an output: (T, d), rows `stride` apart. The job of the head owns them.
#[derive(Clone, Copy)]
struct HeadOutput {
    first: *mut f32,
    stride: usize,
    head_size: usize,
}

impl HeadOutput {
    /// The rows behind the first `rows`.
    fn skip(self, rows: usize) -> Self {
        Self { first: self.at(rows, 0), ..self }
    }

    fn at(self, row: usize, column: usize) -> *mut f32 {
        self.first.wrapping_add(row * self.stride + column)
    }

    /// # Safety
    /// The elements are in bounds and owned by the caller.
    unsafe fn write(self, row: usize, column: usize, values: &[f32]) {
        // SAFETY: passed on.
        unsafe { std::slice::from_raw_parts_mut(self.at(row, column), values.len()) }
            .copy_from_slice(values);
    }

    /// # Safety
    /// The first `rows` rows are in bounds and owned by the caller.
    unsafe fn fill_zero(self, rows: usize) {
        for row in 0..rows {
            // SAFETY: passed on.
            unsafe { std::slice::from_raw_parts_mut(self.at(row, 0), self.head_size) }.fill(0.0);
        }
    }
}
