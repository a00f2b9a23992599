//! Attention with products in f32: for recipes whose forward pass is in f32, and where the processor does
//! not multiply bf16.

use super::rows::{PerQuery, dot, gradient_panel, softmax_panel};
use super::{Head, HeadQkv, Part, QUERIES, SharedOut, scale_of};
use crate::backend::AttentionShape;
use crate::backend::cpu::gemm::{
    Matrix, PANEL, Panels, Strided, TILE_COLS, TILE_ROWS, TileOutput, pack_f32_panel, strided_tile,
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
pub(super) fn forward_head(
    isa: Isa,
    scratch: &mut [f32],
    qkv: &HeadQkv<'_>,
    head: Head,
    shape: AttentionShape,
    out: SharedOut,
    lse: SharedOut,
) {
    let (t, d, c) = (qkv.length, qkv.head_size, qkv.channels);
    let (queries, rest) = scratch.split_at_mut(t.next_multiple_of(PANEL) * d);
    let (values, scores) = rest.split_at_mut(d.next_multiple_of(PANEL) * t);
    qkv.pack_rows(isa, Part::Q, queries);
    qkv.pack_channels(isa, Part::V, values);
    for q0 in (0..t).step_by(QUERIES) {
        let q1 = (q0 + QUERIES).min(t);
        let block = QueryBlock { q0, q1, length: t };
        // S^T, then P^T in place.
        let keys = Unpacked { data: qkv.part(Part::K), rows: q1, stride: 3 * c, step: 1 };
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
            let a = Unpacked { data: scores, rows: lanes, stride: 1, step: PANEL };
            let at = head.row(shape, first) * c + head.head * d;
            // SAFETY: a job owns the columns of its head in the rows of its sequence.
            unsafe { a.times(isa, values, t, 0..q1, d, out.offset(at), c, false) };
        }
    }
}

/// The backward pass of one head.
pub(super) fn backward_head(
    isa: Isa,
    scratch: &mut [f32],
    qkv: &HeadQkv<'_>,
    scale: f32,
    head_out: &[f32],
    head_dout: &[f32],
    head_lse: &[f32],
    gradient: impl Fn(Part, usize) -> SharedOut,
) {
    let (t, d, c) = (qkv.length, qkv.head_size, qkv.channels);
    let by_rows = t.next_multiple_of(PANEL) * d;
    let by_channels = d.next_multiple_of(PANEL) * t;
    let (queries, rest) = scratch.split_at_mut(by_rows);
    let (douts, rest) = rest.split_at_mut(by_rows);
    let (query_channels, rest) = rest.split_at_mut(by_channels);
    let (key_channels, rest) = rest.split_at_mut(by_channels);
    let (dout_channels, rest) = rest.split_at_mut(by_channels);
    let (scores, dscores) = rest.split_at_mut(QUERIES * t);

    qkv.pack_rows(isa, Part::Q, queries);
    pack_rows(isa, head_dout, c, t, d, douts);
    qkv.pack_channels(isa, Part::Q, query_channels);
    qkv.pack_channels(isa, Part::K, key_channels);
    pack_channels(isa, head_dout, c, t, d, dout_channels);

    for row in 0..t {
        for part in [Part::K, Part::V] {
            // SAFETY: a job owns the columns of its head in the rows of its sequence.
            unsafe { gradient(part, row).fill_zero(d) };
        }
    }
    for q0 in (0..t).step_by(QUERIES) {
        let q1 = (q0 + QUERIES).min(t);
        let block = QueryBlock { q0, q1, length: t };
        let keys = Unpacked { data: qkv.part(Part::K), rows: q1, stride: 3 * c, step: 1 };
        let values = Unpacked { data: qkv.part(Part::V), rows: q1, stride: 3 * c, step: 1 };
        block.product(isa, &keys, &block.panels(queries, d), d, scores);
        block.product(isa, &values, &block.panels(douts, d), d, dscores);
        let panels = scores.chunks_exact_mut(t * PANEL).zip(dscores.chunks_exact_mut(t * PANEL));
        for (p, (scores, dscores)) in panels.enumerate() {
            let first = q0 + p * PANEL;
            if first >= q1 {
                break;
            }
            let lanes = (q1 - first).min(PANEL);
            let (mut row_lse, mut row_d): (PerQuery, PerQuery) = ([0.0; PANEL], [0.0; PANEL]);
            for l in 0..lanes {
                let at = (first + l) * c;
                let (o, d_o) = (&head_out[at..at + d], &head_dout[at..at + d]);
                row_d[l] = dot(isa, o, d_o);
                row_lse[l] = head_lse[first + l];
            }
            gradient_panel(isa, scores, dscores, first, q1, scale, &row_lse, &row_d);

            // dQ = dS K, overwritten: every query belongs to one panel.
            let ds = Unpacked { data: dscores, rows: lanes, stride: 1, step: PANEL };
            let dq = gradient(Part::Q, first);
            // SAFETY: as above; the same holds for the two products below.
            unsafe { ds.times(isa, key_channels, t, 0..q1, d, dq, 3 * c, false) };
            // dV += P^T dO and dK += dS^T Q, over this panel's queries.
            let p_t = Unpacked { data: scores, rows: q1, stride: PANEL, step: 1 };
            let ds_t = Unpacked { data: dscores, rows: q1, stride: PANEL, step: 1 };
            let range = first..first + lanes;
            let (dv, dk) = (gradient(Part::V, 0), gradient(Part::K, 0));
            // SAFETY: see above.
            unsafe {
                p_t.times(isa, dout_channels, t, range.clone(), d, dv, 3 * c, true);
                ds_t.times(isa, query_channels, t, range, d, dk, 3 * c, true);
            }
        }
    }
}

impl HeadQkv<'_> {
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
struct Unpacked<'a> {
    data: &'a [f32],
    rows: usize,
    stride: usize,
    step: usize,
}

impl<'a> Unpacked<'a> {
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
