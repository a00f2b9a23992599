//! Causal self-attention by blocks of 48 queries, 32 on AMX. A job is a head of one sequence; in
//! the backward pass a kv head, whose query heads add to dk and dv one after the other, so that
//! sums have one order.
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
//! Products are in f32; with AVX-512, those whose precision is bf16 are in bf16, on tiles where
//! there are such.

pub(super) mod behind;
mod f32;
mod panels;
mod rows;
#[cfg(test)]
mod tests;
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
use crate::backend::{Attend, AttentionBackward, AttentionShape, Documents, Precision, Sequences};
use rows::{QuerySums, dot, gradient_panel, softmax_panel};

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
        documents: Option<Documents<'_, Self>>,
        shape: AttentionShape,
    ) {
        let (AttentionShape { sequences, heads, .. }, isa) = (shape, self.isa());
        let rows = sequences.rows();
        let holds =
            out.len() >= rows * shape.channels() && qkv.len() >= rows * shape.qkv_channels();
        assert!(holds, "tensors hold the sequences");
        let (out, lse) = (DisjointSlice::new(out), DisjointSlice::new(lse));
        for_each_job(self, workspace, sequences.batch * heads, |scratch, job| {
            let head = Head { shape, batch: job / heads, head: job % heads };
            for of in pieces(documents, sequences, head.batch) {
                let [q, k, v] = head.qkv(qkv).map(|rows| rows.part(&of));
                // SAFETY: a job owns the lse of its head.
                let lse = unsafe { lse.part(head.lse() + of.start, of.len()) };
                let (scale, out) = (head.scale(), head.out(&out).skip(of.start));
                let head = HeadForward { q, k, v, scale, out, lse };
                forward_head(isa, shape.precision, scratch, head);
            }
        });
    }

    fn attention_backward(
        &self,
        workspace: &mut Workspace,
        operands: AttentionBackward<'_, Self>,
        shape: AttentionShape,
    ) {
        let AttentionBackward { dqkv, dout, out, lse, qkv, documents } = operands;
        let (AttentionShape { sequences, kv_heads, .. }, isa) = (shape, self.isa());
        let elements = sequences.rows() * shape.qkv_channels();
        let holds = [dqkv.len(), qkv.len()].iter().all(|len| *len >= elements);
        assert!(holds && out.len() >= sequences.rows() * shape.channels());
        let (together, dqkv) = (shape.heads_per_kv_head(), DisjointSlice::new(dqkv));
        for_each_job(self, workspace, sequences.batch * kv_heads, |scratch, job| {
            let (batch, first) = (job / kv_heads, job % kv_heads * together);
            for head in first..first + together {
                let at = Head { shape, batch, head };
                for of in pieces(documents, sequences, batch) {
                    let [q, k, v] = at.qkv(qkv).map(|rows| rows.part(&of));
                    let [dq, dk, dv] = at.dqkv(&dqkv).map(|rows| rows.skip(of.start));
                    let [out, dout] = [out, dout].map(|tensor| at.of_out(tensor).part(&of));
                    let (scale, lse) = (at.scale(), &lse[at.lse()..][of]);
                    let adds = head > first;
                    let head = HeadBackward { q, k, v, scale, out, dout, lse, dq, dk, dv, adds };
                    backward_head(isa, shape.precision, scratch, head);
                }
            }
        });
    }
}

fn forward_head(isa: Isa, precision: Precision, scratch: &mut [f32], head: HeadForward<'_>) {
    #[cfg(target_arch = "x86_64")]
    if in_tiles(isa, precision) {
        return tiles::forward_head(isa, scratch, head);
    }
    if in_bf16(isa, precision) {
        return panels::forward_head(isa, scratch, head);
    }
    f32::forward_head(isa, scratch, head);
}

fn backward_head(isa: Isa, precision: Precision, scratch: &mut [f32], head: HeadBackward<'_>) {
    #[cfg(target_arch = "x86_64")]
    if in_tiles(isa, precision) {
        return tiles::backward_head(isa, scratch, head);
    }
    if in_bf16(isa, precision) {
        return panels::backward_head(isa, scratch, head);
    }
    f32::backward_head(isa, scratch, head);
}

/// The documents of a sequence, as ranges of its positions; without any it is one.
///
/// What they are is given as words on the device, so a range is believed only as far as it goes on and
/// ends within the sequence.
pub(super) fn pieces(
    documents: Option<&Buffer<u32>>,
    sequences: Sequences,
    sequence: usize,
) -> impl Iterator<Item = Range<usize>> {
    let (rows, length) = (sequences.rows(), sequences.length);
    let ends = documents.map(|bounds| &bounds[rows + sequence * length..][..length]);
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = next;
        next = match ends {
            None => length,
            Some(ends) => (*ends.get(start)? as usize).clamp(start + 1, length),
        };
        (start < length).then_some(start..next)
    })
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

impl HeadForward<'_> {
    /// scores (keys, 16 queries) -> P in place, for queries `first` .. over keys 0 .. `keys`, and
    /// their lse. Returns how many queries there are.
    fn softmax(&mut self, isa: Isa, scores: &mut [f32], first: usize, keys: usize) -> usize {
        let lse = softmax_panel(isa, scores, first, keys, self.scale);
        let queries = (keys - first).min(PANEL);
        self.lse[first..][..queries].copy_from_slice(&lse[..queries]);
        queries
    }
}

/// The operands of one head's backward pass; `dq`, `dk` and `dv` are written, with `adds` the
/// latter two added to.
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
    adds: bool,
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

/// A query head of one sequence.
#[derive(Clone, Copy)]
struct Head {
    shape: AttentionShape,
    batch: usize,
    head: usize,
}

impl Head {
    /// Its q, and the k and v that it uses.
    fn qkv(self, qkv: &[f32]) -> [HeadRows<'_>; 3] {
        let stride = self.shape.qkv_channels();
        self.shape.starts(self.head).map(|start| self.rows(qkv, start, stride))
    }

    /// The same of their gradients.
    fn dqkv(self, dqkv: &DisjointSlice<f32>) -> [HeadOutput; 3] {
        let stride = self.shape.qkv_channels();
        self.shape.starts(self.head).map(|start| self.output(dqkv, start, stride))
    }

    /// Its columns of a tensor like out.
    fn of_out(self, data: &[f32]) -> HeadRows<'_> {
        self.rows(data, self.head * self.shape.head_size, self.shape.channels())
    }

    fn out(self, to: &DisjointSlice<f32>) -> HeadOutput {
        self.output(to, self.head * self.shape.head_size, self.shape.channels())
    }

    /// Where its (T) of lse begin.
    fn lse(self) -> usize {
        (self.batch * self.shape.heads + self.head) * self.shape.sequences.length
    }

    /// The columns from `start` on of its sequence's rows, which lie `stride` apart.
    fn rows(self, data: &[f32], start: usize, stride: usize) -> HeadRows<'_> {
        let AttentionShape { sequences: Sequences { length, .. }, head_size, .. } = self.shape;
        HeadRows { data: &data[self.batch * length * stride + start..], length, head_size, stride }
    }

    /// The same of an output.
    fn output(self, to: &DisjointSlice<f32>, start: usize, stride: usize) -> HeadOutput {
        let AttentionShape { sequences: Sequences { length, .. }, head_size, .. } = self.shape;
        HeadOutput { first: to.pointer(self.batch * length * stride + start), stride, head_size }
    }

    /// What its scores are multiplied by.
    fn scale(self) -> f32 {
        1.0 / (self.shape.head_size as f32).sqrt() * self.shape.score_factor
    }
}

/// Calls `f(scratch, 0)` .. `f(scratch, jobs - 1)`, on threads that each have scratch memory of
/// their own.
fn for_each_job(
    cpu: &Cpu,
    workspace: &mut Workspace,
    jobs: usize,
    f: impl Fn(&mut [f32], usize) + Sync + Send,
) {
    let next = AtomicUsize::new(0);
    cpu.install(|| {
        workspace.of_threads().with_max_len(1).for_each(|scratch| {
            loop {
                let job = next.fetch_add(1, Ordering::Relaxed);
                if job >= jobs {
                    break;
                }
                f(scratch, job);
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

    /// Some of them, in a row.
    fn part(self, rows: &Range<usize>) -> Self {
        Self { data: &self.data[rows.start * self.stride..], length: rows.len(), ..self }
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
        unsafe { self.part(row, column, values.len()) }.copy_from_slice(values);
    }

    /// # Safety
    /// The elements are in bounds and owned by the caller.
    unsafe fn add(self, row: usize, column: usize, values: &[f32]) {
        // SAFETY: passed on.
        let to = unsafe { self.part(row, column, values.len()) };
        to.iter_mut().zip(values).for_each(|(to, value)| *to += value);
    }

    /// # Safety
    /// The elements are in bounds, owned by the caller, and borrowed once at a time.
    unsafe fn part<'a>(self, row: usize, column: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: passed on.
        unsafe { std::slice::from_raw_parts_mut(self.at(row, column), len) }
    }

    /// # Safety
    /// The first `rows` rows are in bounds and owned by the caller.
    unsafe fn fill_zero(self, rows: usize) {
        for row in 0..rows {
            // SAFETY: passed on.
            unsafe { self.part(row, 0, self.head_size) }.fill(0.0);
        }
    }
}
