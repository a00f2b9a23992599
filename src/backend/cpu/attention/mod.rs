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
//! Products are in f32. With AVX-512, those of recipes whose forward pass is not f32 are in bf16, and on
//! tiles where there are such.

mod f32;
mod panels;
mod rows;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::Cpu;
use super::gemm::TILE_COLS;
use super::isa::Isa;
use super::workspace::{ScratchSize, Workspace};
use crate::backend::AttentionShape;
use crate::recipe::Forward;

/// Queries of one block: the columns of a tile.
const QUERIES: usize = TILE_COLS;

/// What attention needs of a workspace; with `trains`, for gradients too.
pub(super) fn scratch(
    isa: Isa,
    format: Forward,
    length: usize,
    head_size: usize,
    trains: bool,
) -> ScratchSize {
    let scratch_len = if in_bf16(isa, format) { panels::scratch_len } else { f32::scratch_len };
    #[cfg(target_arch = "x86_64")]
    let scratch_len = if in_tiles(isa, format) { tiles::scratch_len } else { scratch_len };
    let of_thread = scratch_len(length, head_size, trains);
    ScratchSize { of_thread, ..ScratchSize::default() }
}

/// What the scores are multiplied by.
fn scale_of(shape: AttentionShape) -> f32 {
    1.0 / (shape.head_size as f32).sqrt() * shape.score_factor
}

/// Whether products are in bf16, on tiles.
#[cfg(target_arch = "x86_64")]
fn in_tiles(isa: Isa, format: Forward) -> bool {
    isa == Isa::Amx && format != Forward::F32
}

/// Whether they are in bf16, in panels. Without an instruction that multiplies bf16, f32 is faster.
fn in_bf16(isa: Isa, format: Forward) -> bool {
    isa == Isa::Avx512 && format != Forward::F32
}

/// out (B, T, C) and lse (B, H, T) from qkv (B, T, 3 C).
pub(super) fn forward(
    cpu: &Cpu,
    workspace: &mut Workspace,
    out: &mut [f32],
    lse: &mut [f32],
    qkv: &[f32],
    shape: AttentionShape,
) {
    let (t, d) = (shape.sequences.length, shape.head_size);
    let c = shape.heads * d;
    assert!(out.len() >= shape.sequences.rows() * c && qkv.len() >= shape.sequences.rows() * 3 * c);
    let out = SharedOut(out.as_mut_ptr());
    let lse = SharedOut(lse[..shape.sequences.batch * shape.heads * t].as_mut_ptr());
    for_each_head(cpu, workspace, shape, |scratch, head| {
        let isa = cpu.isa();
        let head_qkv = HeadQkv::new(qkv, shape, head);
        #[cfg(target_arch = "x86_64")]
        if in_tiles(isa, shape.format) {
            return tiles::forward_head(isa, scratch, &head_qkv, head, shape, out, lse);
        }
        if in_bf16(isa, shape.format) {
            return panels::forward_head(isa, scratch, &head_qkv, head, shape, out, lse);
        }
        f32::forward_head(isa, scratch, &head_qkv, head, shape, out, lse);
    });
}

/// dqkv (B, T, 3 C) from dout (B, T, C).
pub(super) fn backward(
    cpu: &Cpu,
    workspace: &mut Workspace,
    dqkv: &mut [f32],
    dout: &[f32],
    out: &[f32],
    lse: &[f32],
    qkv: &[f32],
    shape: AttentionShape,
) {
    let (t, d) = (shape.sequences.length, shape.head_size);
    let c = shape.heads * d;
    let rows = shape.sequences.rows();
    assert!(dqkv.len() >= rows * 3 * c && qkv.len() >= rows * 3 * c && out.len() >= rows * c);
    let dqkv = SharedOut(dqkv.as_mut_ptr());
    for_each_head(cpu, workspace, shape, |scratch, head| {
        let isa = cpu.isa();
        let head_qkv = HeadQkv::new(qkv, shape, head);
        let (first_row, scale) = (head.row(shape, 0), scale_of(shape));
        let head_dout = &dout[first_row * c + head.head * d..];
        let head_out = &out[first_row * c + head.head * d..];
        let head_lse = &lse[head.index * t..][..t];
        let gradient = |part: Part, row: usize| {
            dqkv.offset((first_row + row) * 3 * c + part as usize * c + head.head * d)
        };
        #[cfg(target_arch = "x86_64")]
        if in_tiles(isa, shape.format) {
            let (out, dout) = (head_out, head_dout);
            tiles::backward_head(isa, scratch, &head_qkv, scale, out, dout, head_lse, gradient);
            return;
        }
        if in_bf16(isa, shape.format) {
            let (out, dout) = (head_out, head_dout);
            panels::backward_head(isa, scratch, &head_qkv, scale, out, dout, head_lse, gradient);
            return;
        }
        let (out, dout) = (head_out, head_dout);
        f32::backward_head(isa, scratch, &head_qkv, scale, out, dout, head_lse, gradient);
    });
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
    batch: usize,
    head: usize,
    /// batch * H + head
    index: usize,
}

impl Head {
    /// Row of (B T) that holds position `position` of this sequence.
    fn row(self, shape: AttentionShape, position: usize) -> usize {
        self.batch * shape.sequences.length + position
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
                f(scratch, Head { batch, head, index });
            }
        });
    });
}

/// Which third of qkv.
#[derive(Clone, Copy)]
enum Part {
    Q = 0,
    K = 1,
    V = 2,
}

/// qkv from the first row of a sequence on, seen by one head.
struct HeadQkv<'a> {
    data: &'a [f32],
    length: usize,
    head_size: usize,
    channels: usize,
}

impl<'a> HeadQkv<'a> {
    fn new(qkv: &'a [f32], shape: AttentionShape, head: Head) -> Self {
        let channels = shape.heads * shape.head_size;
        let start = head.row(shape, 0) * 3 * channels + head.head * shape.head_size;
        let (length, head_size) = (shape.sequences.length, shape.head_size);
        Self { data: &qkv[start..], length, head_size, channels }
    }

    /// From this head's first element of q, k or v on; rows lie 3 C apart.
    fn part(&self, part: Part) -> &'a [f32] {
        &self.data[part as usize * self.channels..]
    }
}

/// An output that jobs share; each writes the columns of its own head.
#[derive(Clone, Copy)]
struct SharedOut(*mut f32);

// SAFETY: see `SharedOut`; every use says which part it owns.
unsafe impl Sync for SharedOut {}
// SAFETY: as above.
unsafe impl Send for SharedOut {}

impl SharedOut {
    fn offset(self, elements: usize) -> Self {
        Self(self.0.wrapping_add(elements))
    }

    /// # Safety
    /// Elements at .. at + values.len() are in bounds and owned by the caller.
    unsafe fn write(self, at: usize, values: &[f32]) {
        // SAFETY: passed on.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), values.len()) }
            .copy_from_slice(values);
    }

    /// # Safety
    /// `len` elements are in bounds and owned by the caller.
    unsafe fn fill_zero(self, len: usize) {
        // SAFETY: passed on.
        unsafe { std::slice::from_raw_parts_mut(self.0, len) }.fill(0.0);
    }
}
