//! Rotary positions and the norms of heads before them, a row at a time.

use rayon::prelude::*;

use super::disjoint::DisjointSlice;
use super::embed::position_of;
use super::isa::simd_fn;
use super::math::lane_sum;
use super::norm::rms_of;
use super::{Buffer, Cpu, Workspace, rows_per_job};
use crate::backend::{
    AttentionShape, Documents, HeadNorms, HeadNormsBackward, NormShape, Rotate, Turn,
};

impl Cpu {
    /// The table of rows at these positions.
    ///
    /// NOTE: by a library of our own choice, so that the bits are those of every system's; it costs
    /// a thousandth of a pass, as all layers share the table.
    pub(super) fn turn_by(
        &self,
        table: &mut Buffer<f32>,
        frequencies: &[f32],
        rows: usize,
        position: impl Fn(usize) -> usize + Sync,
    ) {
        let d = 2 * frequencies.len();
        self.install(|| {
            table[..rows * d].par_chunks_exact_mut(d).enumerate().for_each(|(row, table)| {
                let position = position(row) as f32;
                let (cosines, sines) = table.split_at_mut(frequencies.len());
                for ((cos, sin), frequency) in cosines.iter_mut().zip(sines).zip(frequencies) {
                    let (s, c) = libm::sincos(f64::from(position * frequency));
                    (*cos, *sin) = (c as f32, s as f32);
                }
            });
        });
    }
}

impl Rotate for Cpu {
    fn rotations(
        &self,
        table: &mut Buffer<f32>,
        frequencies: &[f32],
        documents: Option<Documents<'_, Self>>,
        AttentionShape { sequences, .. }: AttentionShape,
    ) {
        let position = |row| position_of(documents, sequences, row);
        self.turn_by(table, frequencies, sequences.rows(), position);
    }

    fn rotate(
        &self,
        qkv: &mut Buffer<f32>,
        table: &Buffer<f32>,
        turn: Turn,
        shape: AttentionShape,
    ) {
        let (d, wide, rows) = (shape.head_size, shape.qkv_channels(), shape.sequences.rows());
        let (turned, per_job) = ((shape.heads + shape.kv_heads) * d, rows_per_job(wide));
        self.install(|| {
            let rows = qkv[..rows * wide].par_chunks_mut(per_job * wide);
            rows.zip(table.par_chunks(per_job * d)).for_each(|(qkv, table)| {
                for (qkv, table) in qkv.chunks_exact_mut(wide).zip(table.chunks_exact(d)) {
                    for head in qkv[..turned].chunks_exact_mut(d) {
                        turn_head(self.isa(), head, table, turn);
                    }
                }
            });
        });
    }

    fn head_norms_forward(
        &self,
        out: &mut Buffer<f32>,
        qkv: &Buffer<f32>,
        table: &Buffer<f32>,
        HeadNorms { q, k }: HeadNorms<'_, Self>,
        (shape, NormShape { epsilon, .. }): (AttentionShape, NormShape),
    ) {
        let (d, wide, rows) = (shape.head_size, shape.qkv_channels(), shape.sequences.rows());
        let (of_q, of_k, per_job) = (shape.channels(), shape.kv_heads * d, rows_per_job(wide));
        self.install(|| {
            let out = out[..rows * wide].par_chunks_mut(per_job * wide);
            let rows = out.zip(qkv[..rows * wide].par_chunks(per_job * wide));
            rows.zip(table.par_chunks(per_job * d)).for_each(|((out, qkv), table)| {
                let rows = out.chunks_exact_mut(wide).zip(qkv.chunks_exact(wide));
                for ((out, qkv), table) in rows.zip(table.chunks_exact(d)) {
                    out[of_q + of_k..].copy_from_slice(&qkv[of_q + of_k..]);
                    for (range, w) in [(0..of_q, q), (of_q..of_q + of_k, k)] {
                        let heads = out[range.clone()].chunks_exact_mut(d);
                        for (out, x) in heads.zip(qkv[range].chunks_exact(d)) {
                            norm_head(self.isa(), out, x, w, epsilon);
                            turn_head(self.isa(), out, table, Turn::Forward);
                        }
                    }
                }
            });
        });
    }

    fn head_norms_backward(
        &self,
        _workspace: &mut Workspace,
        operands: HeadNormsBackward<'_, Self>,
        (shape, NormShape { epsilon, .. }): (AttentionShape, NormShape),
    ) {
        let HeadNormsBackward { dqkv, mut dq, mut dk, qkv, table, norms, accumulate } = operands;
        for gradient in [&mut dq, &mut dk].into_iter().flatten().filter(|_| !accumulate) {
            self.zero(gradient);
        }
        let (d, wide, rows) = (shape.head_size, shape.qkv_channels(), shape.sequences.rows());
        let (turned, per_job) = ((shape.heads + shape.kv_heads) * d, rows_per_job(wide));
        self.install(|| {
            let dqkv = dqkv[..rows * wide].par_chunks_mut(per_job * wide);
            dqkv.zip(table.par_chunks(per_job * d)).for_each(|(dqkv, table)| {
                for (dqkv, table) in dqkv.chunks_exact_mut(wide).zip(table.chunks_exact(d)) {
                    for head in dqkv[..turned].chunks_exact_mut(d) {
                        turn_head(self.isa(), head, table, Turn::Back);
                    }
                }
            });
        });
        // Gradients of weights sum over rows and heads, in order: each job owns some columns.
        const COLUMNS: usize = 16;
        for (w, first, heads) in [(dq, 0, shape.heads), (dk, shape.heads, shape.kv_heads)] {
            let Some(dw) = w else { continue };
            let dw = DisjointSlice::new(dw);
            self.parallel(d.div_ceil(COLUMNS), |job| {
                let columns = job * COLUMNS..((job + 1) * COLUMNS).min(d);
                // SAFETY: jobs own disjoint columns.
                let to = unsafe { dw.part(columns.start, columns.len()) };
                for row in 0..rows {
                    for head in first..first + heads {
                        let at = row * wide + head * d;
                        let (x, dy) = (&qkv[at..][..d], &dqkv[at..][..d]);
                        add_column(self.isa(), to, x, dy, columns.start, epsilon);
                    }
                }
            });
        }
        self.install(|| {
            let dqkv = dqkv[..rows * wide].par_chunks_mut(per_job * wide);
            dqkv.zip(qkv.par_chunks(per_job * wide)).for_each(|(dqkv, qkv)| {
                for (dqkv, qkv) in dqkv.chunks_exact_mut(wide).zip(qkv.chunks_exact(wide)) {
                    let heads = dqkv[..turned].chunks_exact_mut(d).zip(qkv.chunks_exact(d));
                    for (head, (dy, x)) in heads.enumerate() {
                        let w = if head < shape.heads { norms.q } else { norms.k };
                        norm_head_back(self.isa(), dy, x, w, epsilon);
                    }
                }
            });
        });
    }
}

simd_fn! {
    fn turn_head(head: &mut [f32], table: &[f32], turn: Turn) {
        let half = head.len() / 2;
        let (low, high) = head.split_at_mut(half);
        let (cosines, sines) = table.split_at(half);
        let sign = match turn {
            Turn::Forward => 1.0,
            Turn::Back => -1.0,
        };
        for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(cosines.iter().zip(sines)) {
            let sin = sign * sin;
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

simd_fn! {
    fn norm_head(out: &mut [f32], x: &[f32], w: &[f32], epsilon: f32) {
        let s = rms_of(x, epsilon);
        for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
            *out = x * s * w;
        }
    }
}

simd_fn! {
    /// dy becomes dx: with g = dy w and n = x s, s (g - n mean(g n)).
    fn norm_head_back(dy: &mut [f32], x: &[f32], w: &[f32], epsilon: f32) {
        let s = rms_of(x, epsilon);
        let mean = lane_sum([&*dy, w, x], |[dy, w, x]| dy * w * (x * s)) / x.len() as f32;
        for ((dy, x), w) in dy.iter_mut().zip(x).zip(w) {
            *dy = s * (*dy * w - x * s * mean);
        }
    }
}

simd_fn! {
    /// Adds dy x s of some columns, from `first` on.
    fn add_column(to: &mut [f32], x: &[f32], dy: &[f32], first: usize, epsilon: f32) {
        let s = rms_of(x, epsilon);
        for ((to, x), dy) in to.iter_mut().zip(&x[first..]).zip(&dy[first..]) {
            *to += dy * (x * s);
        }
    }
}
