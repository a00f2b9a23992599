//! Attention with products in f32: for recipes whose forward pass is in f32, and where the
//! processor does not multiply bf16.

use std::ops::Range;

use super::{HeadBackward, HeadForward, HeadOutput, HeadRows, QUERIES, Scratch};
use crate::backend::cpu::gemm::{
    PANEL, Panels, Strided, TILE_COLS, TILE_ROWS, TileOutput, pack_f32, strided_tile,
};
use crate::backend::cpu::isa::Isa;

/// f32 elements that one thread needs.
pub(super) fn scratch_len(length: usize, head_size: usize, backward: bool) -> usize {
    let queries = length.next_multiple_of(PANEL) * head_size; // (panels of queries, d, 16)
    let channels = head_size.next_multiple_of(PANEL) * length; // (panels of channels, T, 16)
    let scores = QUERIES * length; // (3 panels of queries, T, 16)
    if backward { 2 * queries + 3 * channels + 2 * scores } else { queries + channels + scores }
}

/// The forward pass of one head.
pub(super) fn forward_head(isa: Isa, scratch: &mut [f32], mut head: HeadForward<'_>) {
    let (t, d) = (head.q.length, head.q.head_size);
    let mut scratch = Scratch(scratch);
    let queries = scratch.f32(t.next_multiple_of(PANEL) * d);
    let values = scratch.f32(d.next_multiple_of(PANEL) * t);
    let scores = scratch.f32(QUERIES * t);
    pack_f32(isa, &head.q.by_position(), queries);
    pack_f32(isa, &head.v.by_channel(), values);
    for q0 in (0..t).step_by(QUERIES) {
        let q1 = (q0 + QUERIES).min(t);
        let block = QueryBlock { q0, q1, length: t };
        // S^T, then P^T in place.
        block.product(isa, &Unpacked::of(head.k, q1), &block.panels(queries, d), d, scores);
        let panels = scores.chunks_exact_mut(t * PANEL);
        for (first, scores) in (q0..q1).step_by(PANEL).zip(panels) {
            let lanes = head.softmax(isa, scores, first, q1);
            // O = P V: the panel is A, (keys, 16 queries); V is B.
            let a = Unpacked { data: scores, rows: lanes, stride: 1, step: PANEL };
            // SAFETY: the job owns the output; first + lanes <= T.
            unsafe { a.times(isa, values, t, 0..q1, head.out.skip(first), false) };
        }
    }
}

/// The backward pass of one head.
pub(super) fn backward_head(isa: Isa, scratch: &mut [f32], head: HeadBackward<'_>) {
    let (t, d) = (head.q.length, head.q.head_size);
    let mut scratch = Scratch(scratch);
    let [queries, douts] = [(); 2].map(|()| scratch.f32(t.next_multiple_of(PANEL) * d));
    let [query_channels, key_channels, dout_channels] =
        [(); 3].map(|()| scratch.f32(d.next_multiple_of(PANEL) * t));
    let [scores, dscores] = [(); 2].map(|()| scratch.f32(QUERIES * t));
    pack_f32(isa, &head.q.by_position(), queries);
    pack_f32(isa, &head.dout.by_position(), douts);
    pack_f32(isa, &head.q.by_channel(), query_channels);
    pack_f32(isa, &head.k.by_channel(), key_channels);
    pack_f32(isa, &head.dout.by_channel(), dout_channels);
    if !head.adds {
        // SAFETY: the job owns all T rows of the outputs.
        unsafe {
            head.dk.fill_zero(t);
            head.dv.fill_zero(t);
        }
    }
    for q0 in (0..t).step_by(QUERIES) {
        let q1 = (q0 + QUERIES).min(t);
        let block = QueryBlock { q0, q1, length: t };
        block.product(isa, &Unpacked::of(head.k, q1), &block.panels(queries, d), d, scores);
        block.product(isa, &Unpacked::of(head.v, q1), &block.panels(douts, d), d, dscores);
        let panels = scores.chunks_exact_mut(t * PANEL).zip(dscores.chunks_exact_mut(t * PANEL));
        for (first, (scores, dscores)) in (q0..q1).step_by(PANEL).zip(panels) {
            let lanes = (q1 - first).min(PANEL);
            let range = first..first + lanes;
            head.gradient_panel(isa, scores, dscores, range.clone(), q1);
            let ds = Unpacked { data: dscores, rows: lanes, stride: 1, step: PANEL };
            let p_t = Unpacked { data: scores, rows: q1, stride: PANEL, step: 1 };
            let ds_t = Unpacked { data: dscores, rows: q1, stride: PANEL, step: 1 };
            // SAFETY: the job owns the outputs; first + lanes and q1 are at most T.
            unsafe {
                // dQ = dS K, overwritten: every query belongs to one panel.
                ds.times(isa, key_channels, t, 0..q1, head.dq.skip(first), false);
                // dV += P^T dO and dK += dS^T Q, over this panel's queries.
                p_t.times(isa, dout_channels, t, range.clone(), head.dv, true);
                ds_t.times(isa, query_channels, t, range, head.dk, true);
            }
        }
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
    fn product(
        &self,
        isa: Isa,
        a: &Unpacked<'_>,
        b: &Panels<'_, f32>,
        depth: usize,
        out: &mut [f32],
    ) {
        let panels = (self.q1 - self.q0).div_ceil(PANEL);
        for i in (0..self.q1).step_by(TILE_ROWS) {
            let rows = TILE_ROWS.min(self.q1 - i);
            let c = out[i * PANEL..][..((panels - 1) * self.length + rows) * PANEL].as_mut_ptr();
            let to = TileOutput::sums(c, PANEL, rows, panels * PANEL);
            let to = TileOutput { panel_stride: self.length * PANEL, ..to };
            // SAFETY: the last row of the last panel is within the slice taken above.
            unsafe { strided_tile(isa, &a.tile(i), b, depth, &to) };
        }
    }
}

/// An operand A read where it lies: element (i, k) is `data[i * stride + k * step]`.
struct Unpacked<'a> {
    data: &'a [f32],
    rows: usize,
    stride: usize,
    step: usize,
}

impl<'a> Unpacked<'a> {
    /// The first `rows` rows of a head.
    fn of(from: HeadRows<'a>, rows: usize) -> Self {
        Self { data: from.data, rows, stride: from.stride, step: 1 }
    }

    /// From row i on.
    fn tile(&self, i: usize) -> Strided<'a> {
        Strided { data: &self.data[i * self.stride..], stride: self.stride, step: self.step }
    }

    /// to (rows, d) (+)= A B over B's steps `range`; B is (panels of d, steps, 16). A's first step
    /// goes with the first of the range.
    ///
    /// # Safety
    /// Nothing else accesses the first `rows` rows of `to`.
    unsafe fn times(
        &self,
        isa: Isa,
        b: &[f32],
        b_steps: usize,
        range: Range<usize>,
        to: HeadOutput,
        add: bool,
    ) {
        for j in (0..to.head_size).step_by(TILE_COLS) {
            let columns = (to.head_size - j).min(TILE_COLS);
            let first = (j / PANEL * b_steps + range.start) * PANEL;
            let b = Panels { data: &b[first..], stride: b_steps * PANEL };
            for i in (0..self.rows).step_by(TILE_ROWS) {
                let rows = TILE_ROWS.min(self.rows - i);
                let to = TileOutput::sums(to.at(i, j), to.stride, rows, columns);
                // SAFETY: rows i .. i + 8 below `rows`, columns j .. <= d, which the caller owns.
                unsafe {
                    let to = TileOutput { add, ..to };
                    strided_tile(isa, &self.tile(i), &b, range.len(), &to);
                }
            }
        }
    }
}
