//! Attention of a few rows behind those whose keys and values are kept, in f32.
//!
//! Keys and values are kept as products read them: of a kv head first the keys, 16 positions side
//! by side in panels (T / 16, d, 16), then the values, 16 channels side by side (d / 16, T, 16). So
//! a row costs a look at both, and nothing is packed for it. Sums over channels and over keys run in
//! the order of `forward_head`, which gives the rows of a whole sequence the same bits.

use std::ops::Range;

use super::{Head, for_each_job};
use crate::backend::AttentionShape;
use crate::backend::cpu::Cpu;
use crate::backend::cpu::arena::Buffer;
use crate::backend::cpu::disjoint::DisjointSlice;
use crate::backend::cpu::gemm::{
    PANEL, Panels, Strided, TILE_COLS, TILE_ROWS, TileOutput, strided_tile,
};
use crate::backend::cpu::isa::{Isa, simd_fn};
use crate::backend::cpu::math::exp;
use crate::backend::cpu::workspace::Workspace;

/// Where a kv head's keys and values lie.
#[derive(Clone, Copy)]
struct Kept {
    /// Positions, in whole panels.
    positions: usize,
    head_size: usize,
}

impl Kept {
    fn of(positions: usize, shape: AttentionShape) -> Self {
        let positions = positions.next_multiple_of(PANEL);
        Self { positions, head_size: shape.head_size }
    }

    fn keys(self) -> usize {
        self.positions * self.head_size
    }

    /// Of a kv head.
    fn len(self) -> usize {
        self.keys() + self.positions * self.head_size.next_multiple_of(PANEL)
    }
}

/// Elements that are kept of so many positions.
pub(in crate::backend::cpu) fn kept_len(positions: usize, shape: AttentionShape) -> usize {
    shape.kv_heads * Kept::of(positions, shape).len()
}

/// Keeps keys and values of rows qkv behind the first `start` positions, and makes `out` of all up
/// to a row's own.
pub(in crate::backend::cpu) fn forward(
    cpu: &Cpu,
    workspace: &mut Workspace,
    out: &mut [f32],
    qkv: &[f32],
    (kept, start): (&mut Buffer<f32>, usize),
    shape: AttentionShape,
) {
    let AttentionShape { sequences, heads, kv_heads, head_size: d, .. } = shape;
    let (rows, stride) = (sequences.length, shape.qkv_channels());
    assert!(sequences.batch == 1, "rows are of one sequence");
    assert!(out.len() >= rows * shape.channels() && qkv.len() >= rows * stride);
    // As it was made, for so many positions.
    let of_head = kept.len() / kv_heads;
    let layout = Kept { positions: of_head / (d + d.next_multiple_of(PANEL)), head_size: d };
    assert!(layout.len() == of_head && start + rows <= layout.positions, "there is room for rows");
    let together = shape.heads_per_kv_head();
    let (isa, parts) = (cpu.isa(), DisjointSlice::new(kept));
    cpu.parallel(kv_heads, |kv_head| {
        let [_, k, v] = shape.starts(kv_head * together);
        // SAFETY: a job owns what is kept of its head.
        let part = unsafe { parts.part(kv_head * of_head, of_head) };
        let (keys, values) = part.split_at_mut(layout.keys());
        for (row, of_row) in qkv.chunks_exact(stride).take(rows).enumerate() {
            let at = start + row;
            let panel = &mut keys[at / PANEL * d * PANEL..][..d * PANEL];
            for (lanes, k) in panel.chunks_exact_mut(PANEL).zip(&of_row[k..][..d]) {
                lanes[at % PANEL] = *k;
            }
            for (panel, v) in of_row[v..][..d].chunks(PANEL).enumerate() {
                values[(panel * layout.positions + at) * PANEL..][..v.len()].copy_from_slice(v);
            }
        }
    });
    let (kept, out): (&[f32], _) = (kept, DisjointSlice::new(out));
    for_each_job(cpu, workspace, heads, |scratch, number| {
        let head = Head { shape, batch: 0, head: number };
        let (keys, values) = kept[number / together * of_head..][..of_head].split_at(layout.keys());
        let queries = &qkv[shape.starts(number)[0]..];
        let (to, t) = (head.out(&out), layout.positions);
        for first in (0..rows).step_by(TILE_ROWS) {
            let count = TILE_ROWS.min(rows - first);
            let seen = start + first + count;
            let scores = &mut scratch[..count * t];
            let a = Strided { data: &queries[first * stride..], stride, step: 1 };
            for j in (0..seen).step_by(TILE_COLS) {
                let b = Panels { data: &keys[j * d..], stride: d * PANEL };
                let columns = TILE_COLS.min(seen - j);
                let to = TileOutput::sums(scores[j..].as_mut_ptr(), t, count, columns);
                // SAFETY: the last row begins t elements before the end, and j + columns <= t.
                unsafe { strided_tile(isa, &a, &b, d, &to) };
            }
            for (row, scores) in scores.chunks_exact_mut(t).enumerate() {
                let (scores, beyond) = scores[..seen].split_at_mut(start + first + row + 1);
                softmax_row(isa, scores, head.scale());
                beyond.fill(0.0);
            }
            // A row has no part of the values behind its own, be they NaN, which a probability of 0
            // would not take out of a sum: then each is summed alone, to the same bits.
            let behind = start + first + 1..seen;
            let at_once = if is_finite(values, t, behind) { count } else { 1 };
            for (row, scores) in scores.chunks(at_once * t).enumerate() {
                let (row, count) = (row * at_once, at_once);
                let a = Strided { data: scores, stride: t, step: 1 };
                for j in (0..d).step_by(TILE_COLS) {
                    let b = Panels { data: &values[j * t..], stride: t * PANEL };
                    let columns = TILE_COLS.min(d - j);
                    let to = TileOutput::sums(to.at(first + row, j), to.stride, count, columns);
                    let seen = start + first + row + count;
                    // SAFETY: the job owns the columns of its head.
                    unsafe { strided_tile(isa, &a, &b, seen, &to) };
                }
            }
        }
    });
}

/// Whether all values (panels, t, 16) at some positions are finite.
fn is_finite(values: &[f32], t: usize, mut positions: Range<usize>) -> bool {
    let of =
        |at: usize| values.chunks_exact(t * PANEL).flat_map(move |all| &all[at * PANEL..][..PANEL]);
    positions.all(|at| of(at).all(|v| v.is_finite()))
}

/// Scores of a query to the keys that it sees become probabilities, as `softmax_panel` makes them.
fn softmax_row(isa: Isa, scores: &mut [f32], scale: f32) {
    exp_row(isa, scores, scale);
    // In the order of the keys.
    let sum = scores.iter().fold(0.0, |sum, p| sum + p);
    scale_row(isa, scores, 1.0 / sum);
}

simd_fn! {
    fn exp_row(scores: &mut [f32], scale: f32) {
        let mut most = [f32::MIN; PANEL];
        let (panels, rest) = scores.as_chunks::<PANEL>();
        for panel in panels {
            for l in 0..PANEL {
                most[l] = if panel[l] > most[l] { panel[l] } else { most[l] };
            }
        }
        let of_rest = rest.iter().chain(&most);
        let max = of_rest.fold(f32::MIN, |max, v| if *v > max { *v } else { max });
        let (panels, rest) = scores.as_chunks_mut::<PANEL>();
        for panel in panels {
            for v in panel {
                *v = exp((*v - max) * scale);
            }
        }
        for v in rest {
            *v = exp((*v - max) * scale);
        }
    }
}

simd_fn! {
    fn scale_row(scores: &mut [f32], factor: f32) {
        scores.iter_mut().for_each(|v| *v *= factor);
    }
}
