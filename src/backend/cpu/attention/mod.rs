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

mod panels;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::Cpu;
use super::gemm::{
    Matrix, PANEL, Panels, Strided, TILE_COLS, TILE_ROWS, TileOutput, pack_f32_panel, strided_tile,
};
use super::isa::{Isa, simd_fn};
use super::lanes::{self, lanes_fn};
use super::math::{exp, lane_sum};
use super::workspace::Workspace;
use crate::backend::{AttentionShape, Precision};

/// Queries of one block: the columns of a tile.
const BLOCK: usize = TILE_COLS;

type Lanes = [f32; PANEL];

/// f32 elements that one thread needs.
pub(super) fn scratch_len(
    isa: Isa,
    precision: Precision,
    length: usize,
    head_size: usize,
    backward: bool,
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if in_tiles(isa, precision) {
        return tiles::scratch_len(length, head_size, backward);
    }
    if in_bf16(isa, precision) {
        return panels::scratch_len(length, head_size, backward);
    }
    let queries = length.next_multiple_of(PANEL) * head_size; // (panels of queries, d, 16)
    let channels = head_size.next_multiple_of(PANEL) * length; // (panels of channels, T, 16)
    let scores = BLOCK * length; // (3 panels of queries, T, 16)
    if backward { 2 * queries + 3 * channels + 2 * scores } else { queries + channels + scores }
}

/// What the scores are multiplied by.
fn scale_of(shape: AttentionShape) -> f32 {
    1.0 / (shape.head_size as f32).sqrt() * shape.score_factor
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
        if in_tiles(isa, shape.precision) {
            return tiles::forward_head(isa, scratch, &head_qkv, head, shape, out, lse);
        }
        if in_bf16(isa, shape.precision) {
            return panels::forward_head(isa, scratch, &head_qkv, head, shape, out, lse);
        }
        let (queries, rest) = scratch.split_at_mut(t.next_multiple_of(PANEL) * d);
        let (values, scores) = rest.split_at_mut(d.next_multiple_of(PANEL) * t);
        head_qkv.pack_rows(isa, Part::Q, queries);
        head_qkv.pack_channels(isa, Part::V, values);
        for q0 in (0..t).step_by(BLOCK) {
            let q1 = (q0 + BLOCK).min(t);
            let block = QueryBlock { q0, q1, length: t };
            // S^T, then P^T in place.
            let keys = Rows { data: head_qkv.part(Part::K), rows: q1, stride: 3 * c, step: 1 };
            block.product(isa, &keys, &block.panels(queries, d), d, scores);
            for (p, scores) in scores.chunks_exact_mut(t * PANEL).enumerate() {
                let first = q0 + p * PANEL;
                if first >= q1 {
                    break;
                }
                let scale = scale_of(shape);
                let sums = softmax_panel(isa, scores, first, q1, scale);
                let lanes = (q1 - first).min(PANEL);
                // SAFETY: a job owns the lse of its head; first + lanes <= T.
                unsafe { lse.write(head.index * t + first, &sums[..lanes]) };
                // O = P V: the panel is A, (keys, 16 queries); V is B.
                let a = Rows { data: scores, rows: lanes, stride: 1, step: PANEL };
                let at = head.row(shape, first) * c + head.head * d;
                // SAFETY: a job owns the columns of its head in the rows of its sequence.
                unsafe { a.times(isa, values, t, 0..q1, d, out.offset(at), c, false) };
            }
        }
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
        if in_tiles(isa, shape.precision) {
            let (out, dout) = (head_out, head_dout);
            tiles::backward_head(isa, scratch, &head_qkv, scale, out, dout, head_lse, gradient);
            return;
        }
        if in_bf16(isa, shape.precision) {
            let (out, dout) = (head_out, head_dout);
            panels::backward_head(isa, scratch, &head_qkv, scale, out, dout, head_lse, gradient);
            return;
        }
        let by_rows = t.next_multiple_of(PANEL) * d;
        let by_channels = d.next_multiple_of(PANEL) * t;
        let (queries, rest) = scratch.split_at_mut(by_rows);
        let (douts, rest) = rest.split_at_mut(by_rows);
        let (query_channels, rest) = rest.split_at_mut(by_channels);
        let (key_channels, rest) = rest.split_at_mut(by_channels);
        let (dout_channels, rest) = rest.split_at_mut(by_channels);
        let (scores, dscores) = rest.split_at_mut(BLOCK * t);

        head_qkv.pack_rows(isa, Part::Q, queries);
        pack_rows(isa, head_dout, c, t, d, douts);
        head_qkv.pack_channels(isa, Part::Q, query_channels);
        head_qkv.pack_channels(isa, Part::K, key_channels);
        pack_channels(isa, head_dout, c, t, d, dout_channels);

        for row in 0..t {
            for part in [Part::K, Part::V] {
                // SAFETY: a job owns the columns of its head in the rows of its sequence.
                unsafe { gradient(part, row).fill_zero(d) };
            }
        }
        for q0 in (0..t).step_by(BLOCK) {
            let q1 = (q0 + BLOCK).min(t);
            let block = QueryBlock { q0, q1, length: t };
            let keys = Rows { data: head_qkv.part(Part::K), rows: q1, stride: 3 * c, step: 1 };
            let values = Rows { data: head_qkv.part(Part::V), rows: q1, stride: 3 * c, step: 1 };
            block.product(isa, &keys, &block.panels(queries, d), d, scores);
            block.product(isa, &values, &block.panels(douts, d), d, dscores);
            let panels =
                scores.chunks_exact_mut(t * PANEL).zip(dscores.chunks_exact_mut(t * PANEL));
            for (p, (scores, dscores)) in panels.enumerate() {
                let first = q0 + p * PANEL;
                if first >= q1 {
                    break;
                }
                let lanes = (q1 - first).min(PANEL);
                let (mut row_lse, mut row_d) = ([0.0; PANEL], [0.0; PANEL]);
                for l in 0..lanes {
                    let at = (first + l) * c;
                    let (o, d_o) = (&head_out[at..at + d], &head_dout[at..at + d]);
                    row_d[l] = dot(isa, o, d_o);
                    row_lse[l] = head_lse[first + l];
                }
                gradient_panel(isa, scores, dscores, first, q1, scale, &row_lse, &row_d);

                // dQ = dS K, overwritten: every query belongs to one panel.
                let ds = Rows { data: dscores, rows: lanes, stride: 1, step: PANEL };
                let dq = gradient(Part::Q, first);
                // SAFETY: as above; the same holds for the two products below.
                unsafe { ds.times(isa, key_channels, t, 0..q1, d, dq, 3 * c, false) };
                // dV += P^T dO and dK += dS^T Q, over this panel's queries.
                let p_t = Rows { data: scores, rows: q1, stride: PANEL, step: 1 };
                let ds_t = Rows { data: dscores, rows: q1, stride: PANEL, step: 1 };
                let range = first..first + lanes;
                let (dv, dk) = (gradient(Part::V, 0), gradient(Part::K, 0));
                // SAFETY: see above.
                unsafe {
                    p_t.times(isa, dout_channels, t, range.clone(), d, dv, 3 * c, true);
                    ds_t.times(isa, query_channels, t, range, d, dk, 3 * c, true);
                }
            }
        }
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
        let scratch = workspace.attention.par_chunks_exact_mut(workspace.attention_len);
        scratch.with_max_len(1).for_each(|scratch| {
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

    fn pack_rows(&self, isa: Isa, part: Part, out: &mut [f32]) {
        pack_rows(isa, self.part(part), 3 * self.channels, self.length, self.head_size, out);
    }

    fn pack_channels(&self, isa: Isa, part: Part, out: &mut [f32]) {
        pack_channels(isa, self.part(part), 3 * self.channels, self.length, self.head_size, out);
    }
}

/// Packs (T, d) with rows `stride` apart as vectors along d: (panels of T, d, 16).
fn pack_rows(isa: Isa, data: &[f32], stride: usize, length: usize, d: usize, out: &mut [f32]) {
    let source =
        Matrix { data, rows: length, depth: d, stride, transposed: false, fp8_scale: None };
    for (panel, out) in out.chunks_exact_mut(d * PANEL).enumerate() {
        pack_f32_panel(isa, &source, panel * PANEL, out);
    }
}

/// Packs (T, d) with rows `stride` apart as vectors along T: (panels of d, T, 16).
fn pack_channels(isa: Isa, data: &[f32], stride: usize, length: usize, d: usize, out: &mut [f32]) {
    let source = Matrix { data, rows: d, depth: length, stride, transposed: true, fp8_scale: None };
    for (panel, out) in out.chunks_exact_mut(length * PANEL).enumerate() {
        pack_f32_panel(isa, &source, panel * PANEL, out);
    }
}

/// Queries q0 .. q1 and the keys 0 .. q1 that they see.
struct QueryBlock {
    q0: usize,
    q1: usize,
    length: usize,
}

impl QueryBlock {
    /// The block's panels of a packed (panels of T, d, 16) operand.
    fn panels<'a>(&self, packed: &'a [f32], d: usize) -> Panels<'a, f32> {
        Panels { data: &packed[self.q0 / PANEL * d * PANEL..], stride: d * PANEL }
    }

    /// out (3 panels, T, 16) = rows 0 .. q1 of A times the block's panels, over `depth`.
    fn product(&self, isa: Isa, a: &Rows<'_>, b: &Panels<'_, f32>, depth: usize, out: &mut [f32]) {
        let panels = (self.q1 - self.q0).div_ceil(PANEL);
        for i in (0..self.q1).step_by(TILE_ROWS) {
            let rows = TILE_ROWS.min(self.q1 - i);
            let c = out[i * PANEL..][..((panels - 1) * self.length + rows) * PANEL].as_mut_ptr();
            let to = TileOutput {
                c,
                stride: PANEL,
                panel_stride: self.length * PANEL,
                rows,
                columns: panels * PANEL,
                alpha: 1.0,
                bias: None,
                add: false,
                stream: false,
            };
            // SAFETY: the last row of the last panel is within the slice taken above.
            unsafe { strided_tile(isa, &a.tile(i), b, depth, &to) };
        }
    }
}

/// An operand A read where it lies: element (i, k) is `data[i * stride + k * step]`.
struct Rows<'a> {
    data: &'a [f32],
    rows: usize,
    stride: usize,
    step: usize,
}

impl<'a> Rows<'a> {
    /// From row i on.
    fn tile(&self, i: usize) -> Strided<'a> {
        Strided { data: &self.data[i * self.stride..], stride: self.stride, step: self.step }
    }

    /// c (rows, d) (+)= A B over B's steps `range`; B is (panels of d, steps, 16). A's first step
    /// goes with the first of the range.
    ///
    /// # Safety
    /// `c` points to `rows` rows of d elements, `stride` apart, that nothing else accesses.
    unsafe fn times(
        &self,
        isa: Isa,
        b: &[f32],
        b_steps: usize,
        range: std::ops::Range<usize>,
        d: usize,
        c: SharedOut,
        stride: usize,
        add: bool,
    ) {
        for j in (0..d).step_by(TILE_COLS) {
            let columns = (d - j).min(TILE_COLS);
            let first = (j / PANEL * b_steps + range.start) * PANEL;
            let b = Panels { data: &b[first..], stride: b_steps * PANEL };
            for i in (0..self.rows).step_by(TILE_ROWS) {
                let to = TileOutput {
                    c: c.offset(i * stride + j).0,
                    stride,
                    panel_stride: PANEL,
                    rows: TILE_ROWS.min(self.rows - i),
                    columns,
                    alpha: 1.0,
                    bias: None,
                    add,
                    stream: false,
                };
                // SAFETY: rows i .. i + 8 below `rows`, columns j .. <= d, which the caller owns.
                unsafe { strided_tile(isa, &self.tile(i), &b, range.len(), &to) };
            }
        }
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

simd_fn! {
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        lane_sum([a, b], |[a, b]| a * b)
    }
}

/// Turns scores (keys, 16 queries) of queries first .. into probabilities in place, 0 for keys that a
/// query does not see, over keys 0 .. `keys`. Returns log sum exp of each query.
fn softmax_panel(isa: Isa, scores: &mut [f32], first: usize, keys: usize, scale: f32) -> Lanes {
    let (max, sum) = exp_panel(isa, scores, first, keys, scale);
    scale_rows(isa, &mut scores[..keys * PANEL], &sum.map(|s| 1.0 / s));
    std::array::from_fn(|l| max[l] * scale + sum[l].ln())
}

simd_fn! {
    /// Turns scores into e^(scale (score - max)), and returns the largest score and the sum of each query.
    ///
    /// NOTE: keys that all queries see are a loop of their own; comparing positions for each took longer
    /// than the exponentials.
    fn exp_panel(
        scores: &mut [f32],
        first: usize,
        keys: usize,
        scale: f32,
    ) -> (Lanes, Lanes) {
        let (seen, diagonal) = scores.as_chunks_mut::<PANEL>().0[..keys].split_at_mut(first);
        let mut max = [f32::MIN; PANEL];
        for row in seen.iter() {
            for l in 0..PANEL {
                max[l] = if row[l] > max[l] { row[l] } else { max[l] };
            }
        }
        for (key, row) in diagonal.iter_mut().enumerate() {
            for l in 0..PANEL {
                row[l] = if key <= l { row[l] } else { f32::NEG_INFINITY };
                max[l] = if row[l] > max[l] { row[l] } else { max[l] };
            }
        }
        let mut sum = [0.0; PANEL];
        for row in scores.as_chunks_mut::<PANEL>().0[..keys].iter_mut() {
            for l in 0..PANEL {
                row[l] = exp((row[l] - max[l]) * scale);
                sum[l] += row[l];
            }
        }
        (max, sum)
    }
}

lanes_fn! {
    /// Multiplies rows of 16 by `factors`.
    ///
    /// NOTE: with whole registers. Of the plain loop the compiler made gathers and scatters.
    fn scale_rows(rows: &mut [f32], factors: &[f32; PANEL]) = scale_lanes;
}

#[inline(always)]
unsafe fn scale_lanes<L: lanes::Lanes>(rows: &mut [f32], factors: &[f32; PANEL]) {
    for row in rows.as_chunks_mut::<PANEL>().0 {
        // SAFETY: passed on; rows of 16 elements.
        unsafe {
            let v = L::mul(L::load(row.as_ptr()), L::load(factors.as_ptr()));
            L::store(row.as_mut_ptr(), v);
        }
    }
}

simd_fn! {
    /// scores -> P and dscores -> dS times `scale`, both in place, for queries first .. over
    /// keys 0 .. `keys`.
    fn gradient_panel(
        scores: &mut [f32],
        dscores: &mut [f32],
        first: usize,
        keys: usize,
        scale: f32,
        lse: &Lanes,
        d: &Lanes,
    ) {
        let rows = &mut scores.as_chunks_mut::<PANEL>().0[..keys];
        let drows = &mut dscores.as_chunks_mut::<PANEL>().0[..keys];
        for (key, (row, drow)) in rows.iter_mut().zip(drows).enumerate() {
            for l in 0..PANEL {
                let visible = key <= first + l;
                let p = exp(row[l] * scale - lse[l]);
                let p = if visible { p } else { 0.0 };
                row[l] = p;
                drow[l] = p * (drow[l] - d[l]) * scale;
            }
        }
    }
}
