//! Attention on AMX tiles, with the operands of all products in bf16: for recipes whose forward
//! pass is.
//!
//! Blocks have 32 queries, the square of a tile. Products are transposed where that spares operands
//! a transposition: P^T and dS^T come as (keys, 16 queries) from the softmax, which is operand B of
//! O^T = V^T P^T and dQ^T = K^T dS^T; and their rows, of 32 queries, are the rows of operand A of
//! dV = P^T dO and dK = dS^T Q, which sum over the blocks in scratch memory.

use std::ops::Range;

use super::{HeadBackward, HeadForward, HeadOutput, Scratch};
use crate::backend::cpu::gemm::tiles::{Quad, SIDE, SQUARE, Tiles};
use crate::backend::cpu::gemm::{Matrix, PANEL, Packing, Role, pack_bf16};
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::lanes::{Lanes, lanes_fn, round_to_bf16};

/// Sizes of scratch memory, all of them padded to whole squares.
#[derive(Clone, Copy)]
struct Sizes {
    /// T and d.
    length: usize,
    depth: usize,
    /// Words of a (T, d) operand.
    operand: usize,
    /// Elements of the scores of one block, and words of them as bf16.
    scores: usize,
}

impl Sizes {
    fn new(length: usize, head_size: usize) -> Self {
        let (length, depth) = (length.next_multiple_of(SIDE), head_size.next_multiple_of(SIDE));
        Self { length, depth, operand: length * depth / 2, scores: length * SIDE }
    }

    /// Words of a panel of vectors along d, and along T.
    fn along_depth(self) -> usize {
        self.depth / 2 * PANEL
    }
    fn along_length(self) -> usize {
        self.length / 2 * PANEL
    }
}

/// f32 elements that one thread needs.
pub(super) fn scratch_len(length: usize, head_size: usize, backward: bool) -> usize {
    let Sizes { length, depth, operand, scores } = Sizes::new(length, head_size);
    if backward {
        7 * operand + 2 * scores + 3 * scores / 2 + 2 * length * depth + depth * SIDE
    } else {
        3 * operand + scores + scores / 2 + depth * SIDE
    }
}

/// Two panels from panel `first` of `count` on, `in_panel` words each, from word `start` of a panel
/// on; the last panel twice where it is alone.
fn pair(
    words: &[u32],
    first: usize,
    count: usize,
    in_panel: usize,
    start: usize,
) -> [*const u32; 2] {
    [first, (first + 1).min(count - 1)].map(|panel| words[panel * in_panel + start..].as_ptr())
}

/// The forward pass of one head.
pub(super) fn forward_head(isa: Isa, scratch: &mut [f32], mut head: HeadForward<'_>) {
    let (t, d) = (head.q.length, head.q.head_size);
    let sizes = Sizes::new(t, d);
    let mut scratch = Scratch(scratch);
    let [keys, queries, values] = [(); 3].map(|()| scratch.words(sizes.operand));
    let (scores, packed) = (scratch.f32(sizes.scores), scratch.words(sizes.scores / 2));
    let block_out = scratch.f32(sizes.depth * SIDE);
    let pack = |from: &Matrix<'_>, role, to: &mut [u32]| {
        pack_bf16(isa, from, Packing::Tiles, role, to);
    };
    pack(&head.k.by_position(), Role::A, keys);
    pack(&head.q.by_position(), Role::B, queries);
    pack(&head.v.by_channel(), Role::A, values);
    // SAFETY: this module is for processors with AMX.
    let tiles = unsafe { Tiles::configure() };
    for q0 in (0..t).step_by(SIDE) {
        let q1 = (q0 + SIDE).min(t);
        scores_of_block(&tiles, sizes, keys, queries, t, q0, scores);
        let panels = scores.chunks_exact_mut(sizes.length * PANEL);
        for (first, scores) in (q0..q1).step_by(PANEL).zip(panels) {
            head.softmax(isa, scores, first, q1);
        }
        pack_pairs(isa, scores, sizes.length, q1, packed);
        // SAFETY: scratch memory has room for whole squares.
        unsafe { channels_by_queries(&tiles, sizes, values, packed, d, q1, block_out) };
        store_turned(isa, block_out, q1 - q0, head.out.skip(q0));
    }
}

/// The backward pass of one head.
pub(super) fn backward_head(isa: Isa, scratch: &mut [f32], head: HeadBackward<'_>) {
    let (t, d) = (head.q.length, head.q.head_size);
    let sizes = Sizes::new(t, d);
    let mut scratch = Scratch(scratch);
    let [keys, values, queries, douts] = [(); 4].map(|()| scratch.words(sizes.operand));
    let [key_channels, query_channels, dout_channels] =
        [(); 3].map(|()| scratch.words(sizes.operand));
    let [scores, dscores] = [(); 2].map(|()| scratch.f32(sizes.scores));
    let [packed, p_rows, ds_rows] = [(); 3].map(|()| scratch.words(sizes.scores / 2));
    let [dk, dv] = [(); 2].map(|()| scratch.f32(sizes.length * sizes.depth));
    let dq = scratch.f32(sizes.depth * SIDE);
    let pack = |from: &Matrix<'_>, role, to: &mut [u32]| {
        pack_bf16(isa, from, Packing::Tiles, role, to);
    };
    pack(&head.k.by_position(), Role::A, keys);
    pack(&head.v.by_position(), Role::A, values);
    pack(&head.q.by_position(), Role::B, queries);
    pack(&head.dout.by_position(), Role::B, douts);
    pack(&head.k.by_channel(), Role::A, key_channels);
    pack(&head.q.by_channel(), Role::B, query_channels);
    pack(&head.dout.by_channel(), Role::B, dout_channels);
    dk.fill(0.0);
    dv.fill(0.0);
    // SAFETY: this module is for processors with AMX.
    let tiles = unsafe { Tiles::configure() };
    for q0 in (0..t).step_by(SIDE) {
        let q1 = (q0 + SIDE).min(t);
        scores_of_block(&tiles, sizes, keys, queries, t, q0, scores);
        scores_of_block(&tiles, sizes, values, douts, t, q0, dscores);
        let in_panel = sizes.length * PANEL;
        let panels = scores.chunks_exact_mut(in_panel).zip(dscores.chunks_exact_mut(in_panel));
        for (first, (scores, dscores)) in (q0..q1).step_by(PANEL).zip(panels) {
            head.gradient_panel(isa, scores, dscores, first..(first + PANEL).min(q1), q1);
        }
        pack_pairs(isa, dscores, sizes.length, q1, packed);
        pack_rows(isa, scores, sizes.length, q1, p_rows);
        pack_rows(isa, dscores, sizes.length, q1, ds_rows);
        // SAFETY: scratch memory has room for whole squares.
        unsafe {
            channels_by_queries(&tiles, sizes, key_channels, packed, d, q1, dq);
            keys_by_channels(&tiles, sizes, p_rows, dout_channels, d, q0..q1, dv);
            keys_by_channels(&tiles, sizes, ds_rows, query_channels, d, q0..q1, dk);
        }
        store_turned(isa, dq, q1 - q0, head.dq.skip(q0));
    }
    for (to, sums) in [(head.dk, dk), (head.dv, dv)] {
        for (row, sums) in sums.chunks_exact(sizes.depth).take(t).enumerate() {
            let write = if head.adds { HeadOutput::add } else { HeadOutput::write };
            // SAFETY: the job owns all T rows of the outputs.
            unsafe { write(to, row, 0, &sums[..d]) };
        }
    }
}

/// (2 panels, T, 16) = A B^T of keys 0 .. q0 + 32 and the queries of a block, both (T, d).
fn scores_of_block(
    tiles: &Tiles,
    sizes: Sizes,
    a: &[u32],
    b: &[u32],
    t: usize,
    q0: usize,
    out: &mut [f32],
) {
    let (count, in_panel) = (t.div_ceil(PANEL), sizes.along_depth());
    let out = &mut out[..2 * sizes.length * PANEL];
    let b = pair(b, q0 / PANEL, count, in_panel, 0);
    for key in (0..(q0 + SIDE).min(t)).step_by(SIDE) {
        let a = pair(a, key / PANEL, count, in_panel, 0);
        let squares = [0, sizes.length * PANEL, SQUARE * PANEL, (sizes.length + SQUARE) * PANEL];
        let squares = squares.map(|at| out.as_mut_ptr().wrapping_add(key * PANEL + at));
        // SAFETY: panels hold d / 32 squares; keys below `sizes.length` have room.
        unsafe {
            tiles.multiply::<false>(a, b, sizes.depth / SIDE, Quad { squares, stride: PANEL })
        };
    }
}

/// out (d, 32) = A (d, T) times the packed scores of a block, over keys 0 .. q1.
///
/// # Safety
/// `a` and `packed` hold whole squares up to q1, `out` has room for them.
unsafe fn channels_by_queries(
    tiles: &Tiles,
    sizes: Sizes,
    a: &[u32],
    packed: &[u32],
    d: usize,
    q1: usize,
    out: &mut [f32],
) {
    let b = pair(packed, 0, 2, sizes.along_length(), 0);
    for channel in (0..d).step_by(SIDE) {
        let a = pair(a, channel / PANEL, d.div_ceil(PANEL), sizes.along_length(), 0);
        let to = Quad::of(out[channel * SIDE..].as_mut_ptr(), SIDE);
        // SAFETY: passed on.
        unsafe { tiles.multiply::<false>(a, b, q1.div_ceil(SIDE), to) };
    }
}

/// out (T, d) += scores by rows, of keys up to the last of `queries`, times B (d, T) over these.
///
/// # Safety
/// As above.
unsafe fn keys_by_channels(
    tiles: &Tiles,
    sizes: Sizes,
    rows: &[u32],
    b: &[u32],
    d: usize,
    queries: Range<usize>,
    out: &mut [f32],
) {
    for channel in (0..d).step_by(SIDE) {
        let first = channel / PANEL;
        let start = queries.start / 2 * PANEL;
        let b = pair(b, first, d.div_ceil(PANEL), sizes.along_length(), start);
        for key in (0..queries.end).step_by(SIDE) {
            let a = pair(rows, key / PANEL, sizes.length / PANEL, SQUARE * PANEL, 0);
            let to = Quad::of(out[key * sizes.depth + channel..].as_mut_ptr(), sizes.depth);
            // SAFETY: passed on.
            unsafe { tiles.multiply::<true>(a, b, 1, to) };
        }
    }
}

lanes_fn! {
    /// Scores (2 panels, T, 16 queries) as operand B, pairs of keys: (2 panels, T / 2, 16). Keys
    /// from `keys` on become 0 up to a whole square.
    fn pack_pairs(scores: &[f32], length: usize, keys: usize, out: &mut [u32]) = pairs_lanes;
}

lanes_fn! {
    /// The same scores as operand A, rows of 32 queries: (T, 16 pairs).
    fn pack_rows(scores: &[f32], length: usize, keys: usize, out: &mut [u32]) = rows_lanes;
}

lanes_fn! {
    /// Writes (d, 32 queries) as rows, of the first `queries`, which the caller owns.
    fn store_turned(sums: &[f32], queries: usize, to: HeadOutput) = turned_lanes;
}

#[inline(always)]
unsafe fn pairs_lanes<L: Lanes>(scores: &[f32], length: usize, keys: usize, out: &mut [u32]) {
    for panel in 0..2 {
        let rows = &scores.as_chunks::<PANEL>().0[panel * length..][..length];
        let out = &mut out.as_chunks_mut::<PANEL>().0[panel * length / 2..][..length / 2];
        let zero = [0.0; PANEL];
        for (step, to) in out.iter_mut().enumerate().take(keys.next_multiple_of(SIDE) / 2) {
            let row = |key: usize| if key < keys { &rows[key] } else { &zero };
            let (low, high) = (row(2 * step), row(2 * step + 1));
            // SAFETY: passed on; rows of 16 elements.
            unsafe {
                let low = round_to_bf16::<L>(L::load(low.as_ptr()));
                let high = round_to_bf16::<L>(L::load(high.as_ptr()));
                let high = L::and(high, L::splat_u(0xffff_0000));
                L::store_u(to.as_mut_ptr(), L::or(L::shift_right::<16>(low), high));
            }
        }
    }
}

#[inline(always)]
unsafe fn rows_lanes<L: Lanes>(scores: &[f32], length: usize, keys: usize, out: &mut [u32]) {
    let rows = &scores.as_chunks::<PANEL>().0[..2 * length];
    let out = &mut out.as_chunks_mut::<PANEL>().0[..keys.next_multiple_of(SIDE)];
    for (key, to) in out.iter_mut().enumerate() {
        // SAFETY: passed on; rows of 16 elements.
        unsafe {
            let mut words = L::splat_u(0);
            if key < keys {
                let low = round_to_bf16::<L>(L::load(rows[key].as_ptr()));
                let high = round_to_bf16::<L>(L::load(rows[length + key].as_ptr()));
                words = L::narrow([low, high]);
            }
            L::store_u(to.as_mut_ptr(), words);
        }
    }
}

#[inline(always)]
unsafe fn turned_lanes<L: Lanes>(sums: &[f32], queries: usize, to: HeadOutput) {
    let rows = sums.as_chunks::<SIDE>().0;
    for channel in (0..to.head_size).step_by(PANEL) {
        let rows = &rows[channel..][..PANEL];
        for first in (0..queries).step_by(PANEL) {
            let mut turned = [[0.0f32; PANEL]; PANEL];
            // SAFETY: passed on; rows of 32 elements, and the caller owns those it names.
            unsafe {
                let mut square = [L::splat(0.0); PANEL];
                for (v, row) in square.iter_mut().zip(rows) {
                    *v = L::load(row[first..][..PANEL].as_ptr());
                }
                square = L::transpose(square);
                for (v, row) in square.iter().zip(&mut turned) {
                    L::store(row.as_mut_ptr(), *v);
                }
                for (i, row) in turned.iter().enumerate().take(queries - first) {
                    let row = &row[..PANEL.min(to.head_size - channel)];
                    to.write(first + i, channel, row);
                }
            }
        }
    }
}
