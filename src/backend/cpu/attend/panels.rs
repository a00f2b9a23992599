//! Attention with the operands of all products in bf16, in panels: for recipes whose forward pass
//! is, where the processor multiplies bf16 (AVX-512).
//!
//! Blocks of 48 queries, as in f32. Scores come as (key, 16 queries): two keys a word, that is
//! operand A of O = P V and dQ = dS K; turned, two queries a word, operand A of dV = P^T dO and dK
//! = dS^T Q, which are summed where they lie, block after block.

use std::ops::Range;

use super::{HeadBackward, HeadForward, HeadOutput, QUERIES, Scratch};
use crate::backend::cpu::gemm::{
    Matrix, PANEL, Packing, Panels, Role, TILE_COLS, TILE_ROWS, TileOutput, bf16_tile, pack_bf16,
};
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::lanes::{Lanes, lanes_fn};

/// Steps of a block's queries.
const QUERY_STEPS: usize = QUERIES / 2;

/// Sizes of scratch memory.
#[derive(Clone, Copy)]
struct Sizes {
    /// T, padded to whole panels.
    length: usize,
    /// Steps along d and along T.
    depth_steps: usize,
    length_steps: usize,
    /// Words of (T, d) as vectors along d, (panels of T, d / 2, 16), and along T, (panels of d, T /
    /// 2, 16).
    by_position: usize,
    by_channel: usize,
}

impl Sizes {
    fn new(length: usize, head_size: usize) -> Self {
        let (depth_steps, length_steps) = (head_size.div_ceil(2), length.div_ceil(2));
        let (length, depth) = (length.next_multiple_of(PANEL), head_size.next_multiple_of(PANEL));
        let (by_position, by_channel) = (length * depth_steps, depth * length_steps);
        Self { length, depth_steps, length_steps, by_position, by_channel }
    }

    /// Elements of the scores of a block, (3 panels, T, 16).
    fn scores(self) -> usize {
        QUERIES * self.length
    }

    /// Words of 16 queries' scores, (T / 2, 16).
    fn pairs(self) -> usize {
        self.length / 2 * PANEL
    }

    /// Words of a block's scores, turned: (panels of T, 24 steps, 16).
    fn turned(self) -> usize {
        self.length * QUERY_STEPS
    }
}

/// f32 elements that one thread needs.
pub(super) fn scratch_len(length: usize, head_size: usize, backward: bool) -> usize {
    let sizes = Sizes::new(length, head_size);
    let Sizes { by_position, by_channel, .. } = sizes;
    if backward {
        let operands = 4 * by_position + 3 * by_channel;
        operands + 2 * sizes.scores() + sizes.pairs() + 2 * sizes.turned()
    } else {
        2 * by_position + by_channel + sizes.scores() + sizes.pairs()
    }
}

/// The forward pass of one head.
pub(super) fn forward_head(isa: Isa, scratch: &mut [f32], mut head: HeadForward<'_>) {
    let t = head.q.length;
    let sizes = Sizes::new(t, head.q.head_size);
    let mut scratch = Scratch(scratch);
    let [keys, queries] = [(); 2].map(|()| scratch.words(sizes.by_position));
    let values = scratch.words(sizes.by_channel);
    let (scores, pairs) = (scratch.f32(sizes.scores()), scratch.words(sizes.pairs()));
    let pack = |from: &Matrix<'_>, to: &mut [u32]| {
        pack_bf16(isa, from, Packing::Panels, Role::A, to);
    };
    pack(&head.k.by_position(), keys);
    pack(&head.q.by_position(), queries);
    pack(&head.v.by_channel(), values);
    for q0 in (0..t).step_by(QUERIES) {
        let q1 = (q0 + QUERIES).min(t);
        scores_of_block(isa, sizes, keys, queries, q0, q1, scores);
        let panels = scores.chunks_exact_mut(sizes.length * PANEL);
        for (first, scores) in (q0..q1).step_by(PANEL).zip(panels) {
            let lanes = head.softmax(isa, scores, first, q1);
            pack_pairs(isa, scores, q1, pairs);
            // SAFETY: the job owns the output; first + lanes <= T.
            unsafe {
                queries_by_channels(isa, sizes, pairs, values, lanes, q1, head.out.skip(first));
            }
        }
    }
}

/// The backward pass of one head.
pub(super) fn backward_head(isa: Isa, scratch: &mut [f32], head: HeadBackward<'_>) {
    let t = head.q.length;
    let sizes = Sizes::new(t, head.q.head_size);
    let mut scratch = Scratch(scratch);
    let [keys, values, queries, douts] = [(); 4].map(|()| scratch.words(sizes.by_position));
    let [key_channels, query_channels, dout_channels] =
        [(); 3].map(|()| scratch.words(sizes.by_channel));
    let [scores, dscores] = [(); 2].map(|()| scratch.f32(sizes.scores()));
    let pairs = scratch.words(sizes.pairs());
    let [p_turned, ds_turned] = [(); 2].map(|()| scratch.words(sizes.turned()));
    let pack = |from: &Matrix<'_>, to: &mut [u32]| {
        pack_bf16(isa, from, Packing::Panels, Role::A, to);
    };
    pack(&head.k.by_position(), keys);
    pack(&head.v.by_position(), values);
    pack(&head.q.by_position(), queries);
    pack(&head.dout.by_position(), douts);
    pack(&head.k.by_channel(), key_channels);
    pack(&head.q.by_channel(), query_channels);
    pack(&head.dout.by_channel(), dout_channels);
    for q0 in (0..t).step_by(QUERIES) {
        let q1 = (q0 + QUERIES).min(t);
        scores_of_block(isa, sizes, keys, queries, q0, q1, scores);
        scores_of_block(isa, sizes, values, douts, q0, q1, dscores);
        let in_panel = sizes.length * PANEL;
        let panels = scores.chunks_exact_mut(in_panel).zip(dscores.chunks_exact_mut(in_panel));
        for (first, (scores, dscores)) in (q0..q1).step_by(PANEL).zip(panels) {
            let lanes = (q1 - first).min(PANEL);
            head.gradient_panel(isa, scores, dscores, first..first + lanes, q1);
            let p = (first - q0) / PANEL;
            turn(isa, scores, q1, p, p_turned);
            turn(isa, dscores, q1, p, ds_turned);
            pack_pairs(isa, dscores, q1, pairs);
            let dq = head.dq.skip(first);
            // SAFETY: the job owns the output; first + lanes <= T.
            unsafe { queries_by_channels(isa, sizes, pairs, key_channels, lanes, q1, dq) };
        }
        // SAFETY: the job owns the outputs; q1 <= T.
        unsafe {
            let written = if head.adds { q1 } else { q0 };
            let block = (q0..q1, written);
            keys_by_channels(isa, sizes, p_turned, dout_channels, block.clone(), head.dv);
            keys_by_channels(isa, sizes, ds_turned, query_channels, block, head.dk);
        }
    }
}

/// (3 panels, T, 16) = A B^T of keys 0 .. q1 and queries q0 .. q1, both (T, d).
fn scores_of_block(
    isa: Isa,
    sizes: Sizes,
    a: &[u32],
    b: &[u32],
    q0: usize,
    q1: usize,
    out: &mut [f32],
) {
    let in_panel = sizes.depth_steps * PANEL;
    let b = Panels { data: &b[q0 / PANEL * in_panel..], stride: in_panel };
    let panels = (q1 - q0).div_ceil(PANEL);
    for key in (0..q1).step_by(TILE_ROWS) {
        let rows = TILE_ROWS.min(q1 - key);
        let out = &mut out[key * PANEL..][..((panels - 1) * sizes.length + rows) * PANEL];
        let to = TileOutput::sums(out.as_mut_ptr(), PANEL, rows, panels * PANEL);
        let to = TileOutput { panel_stride: sizes.length * PANEL, ..to };
        // SAFETY: the last row of the last panel is within the slice taken above.
        unsafe {
            bf16_tile(isa, &a[key / PANEL * in_panel + key % PANEL..], &b, sizes.depth_steps, &to)
        };
    }
}

/// to (lanes, d) = scores of 16 queries by pairs of keys, over keys 0 .. q1, times B (d, T).
///
/// # Safety
/// The caller owns the first `lanes` rows of `to`.
unsafe fn queries_by_channels(
    isa: Isa,
    sizes: Sizes,
    pairs: &[u32],
    b: &[u32],
    lanes: usize,
    q1: usize,
    to: HeadOutput,
) {
    let in_panel = sizes.length_steps * PANEL;
    for j in (0..to.head_size).step_by(TILE_COLS) {
        let columns = TILE_COLS.min(to.head_size - j);
        let b = Panels { data: &b[j / PANEL * in_panel..], stride: in_panel };
        for i in (0..lanes).step_by(TILE_ROWS) {
            let rows = TILE_ROWS.min(lanes - i);
            let to = TileOutput::sums(to.at(i, j), to.stride, rows, columns);
            // SAFETY: passed on.
            unsafe { bf16_tile(isa, &pairs[i..], &b, q1.div_ceil(2), &to) };
        }
    }
}

/// to (keys, d) = turned scores of `queries` times B (d, T), for keys up to the last query; added
/// for the first `written`.
///
/// # Safety
/// The caller owns the rows of these keys.
unsafe fn keys_by_channels(
    isa: Isa,
    sizes: Sizes,
    turned: &[u32],
    b: &[u32],
    (queries, written): (Range<usize>, usize),
    to: HeadOutput,
) {
    let in_panel = sizes.length_steps * PANEL;
    for j in (0..to.head_size).step_by(TILE_COLS) {
        let columns = TILE_COLS.min(to.head_size - j);
        let first = j / PANEL * in_panel + queries.start / 2 * PANEL;
        let b = Panels { data: &b[first..], stride: in_panel };
        for key in (0..queries.end).step_by(TILE_ROWS) {
            let rows = TILE_ROWS.min(queries.end - key);
            let to = TileOutput::sums(to.at(key, j), to.stride, rows, columns);
            let to = TileOutput { add: key < written, ..to };
            let a = &turned[key / PANEL * QUERY_STEPS * PANEL + key % PANEL..];
            // SAFETY: passed on.
            unsafe { bf16_tile(isa, a, &b, queries.len().div_ceil(2), &to) };
        }
    }
}

lanes_fn! {
    /// Scores (T, 16 queries) of keys 0 .. `keys`, two keys a word: (T / 2, 16). One beyond is 0.
    fn pack_pairs(scores: &[f32], keys: usize, out: &mut [u32]) = pairs_lanes;
}

lanes_fn! {
    /// The same scores, two queries a word, as steps 8 `panel` .. of (panels of T, 24 steps, 16
    /// keys).
    fn turn(scores: &[f32], keys: usize, panel: usize, out: &mut [u32]) = turn_lanes;
}

#[inline(always)]
unsafe fn pairs_lanes<L: Lanes>(scores: &[f32], keys: usize, out: &mut [u32]) {
    let rows = &scores.as_chunks::<PANEL>().0[..keys];
    for (rows, to) in rows.chunks(2).zip(out.as_chunks_mut::<PANEL>().0) {
        // SAFETY: passed on; rows of 16 elements.
        unsafe {
            let low = L::load(rows[0].as_ptr());
            let high = if rows.len() == 2 { L::load(rows[1].as_ptr()) } else { L::splat(0.0) };
            L::store_u(to.as_mut_ptr(), L::bf16_pairs(low, high));
        }
    }
}

#[inline(always)]
unsafe fn turn_lanes<L: Lanes>(scores: &[f32], keys: usize, panel: usize, out: &mut [u32]) {
    let squares = scores.as_chunks::<PANEL>().0.as_chunks::<PANEL>().0;
    let out = out.as_chunks_mut::<PANEL>().0.chunks_exact_mut(QUERY_STEPS);
    for (square, to) in squares.iter().zip(out).take(keys.div_ceil(PANEL)) {
        let to = &mut to[panel * PANEL / 2..][..PANEL / 2];
        // SAFETY: passed on; rows of 16 elements. Those of keys beyond the last are never stored.
        unsafe {
            let mut rows = [L::splat(0.0); PANEL];
            for i in 0..PANEL {
                rows[i] = L::load(square[i].as_ptr());
            }
            let rows = L::transpose(rows);
            for i in 0..PANEL / 2 {
                L::store_u(to[i].as_mut_ptr(), L::bf16_pairs(rows[2 * i], rows[2 * i + 1]));
            }
        }
    }
}
