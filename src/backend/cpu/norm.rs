//! LayerNorm (Ba et al., arXiv 1607.06450) and RMSNorm (Zhang and Sennrich, arXiv 1910.07467) over
//! the channels of each row.
//!
//! The backward pass recomputes the normalized value from x and the saved statistics, and *adds* to
//! dx, because dx is the gradient of the residual stream, which the norm branches off from.

use rayon::prelude::*;

use super::disjoint::DisjointSlice;
use super::isa::simd_fn;
use super::math::{AHEAD, lane_sum, prefetch_after};
use super::{Buffer, Cpu, Workspace, rows_per_job};
use crate::backend::{
    Norm, NormBackward, NormKind, NormParams, NormShape, NormStatistics, ResidualSum,
};

impl Norm for Cpu {
    fn norm_forward(
        &self,
        out: &mut Buffer<f32>,
        statistics: NormStatistics<&mut Buffer<f32>>,
        x: &Buffer<f32>,
        params: NormParams<'_, Self>,
        shape @ NormShape { rows, channels, .. }: NormShape,
    ) {
        let per_job = rows_per_job(channels);
        self.install(|| {
            out[..rows * channels]
                .par_chunks_mut(per_job * channels)
                .zip(x[..rows * channels].par_chunks(per_job * channels))
                .zip(statistics.mean[..rows].par_chunks_mut(per_job))
                .zip(statistics.rstd[..rows].par_chunks_mut(per_job))
                .for_each(|(((out, x), mean), rstd)| {
                    self.norm_rows(out, NormStatistics { mean, rstd }, x, &params, shape);
                });
        });
    }

    fn add_norm_forward(
        &self,
        out: &mut Buffer<f32>,
        statistics: NormStatistics<&mut Buffer<f32>>,
        ResidualSum { sum, x, y }: ResidualSum<'_, Self>,
        params: NormParams<'_, Self>,
        shape @ NormShape { rows, channels, .. }: NormShape,
    ) {
        let per_job = rows_per_job(channels);
        let chunk = per_job * channels;
        self.install(|| {
            out[..rows * channels]
                .par_chunks_mut(chunk)
                .zip(sum[..rows * channels].par_chunks_mut(chunk))
                .zip(x[..rows * channels].par_chunks(chunk))
                .zip(y[..rows * channels].par_chunks(chunk))
                .zip(statistics.mean[..rows].par_chunks_mut(per_job))
                .zip(statistics.rstd[..rows].par_chunks_mut(per_job))
                .for_each(|(((((out, sum), x), y), mean), rstd)| {
                    add(self.isa(), sum, x, y);
                    let statistics = NormStatistics { mean, rstd };
                    self.norm_rows(out, statistics, sum, &params, shape);
                });
        });
    }

    fn norm_backward(
        &self,
        _workspace: &mut Workspace,
        operands: NormBackward<'_, Self>,
        NormShape { rows, channels, kind, .. }: NormShape,
    ) {
        let NormBackward { dx, mut dw, mut db, dy, x, statistics, w, accumulate } = operands;
        for gradient in [&mut dw, &mut db].into_iter().flatten().filter(|_| !accumulate) {
            self.zero(gradient);
        }
        let (mean, rstd) = (&statistics.mean[..rows], &statistics.rstd[..rows]);
        let per_job = rows_per_job(channels);
        let chunk = per_job * channels;
        self.install(|| {
            dx[..rows * channels]
                .par_chunks_mut(chunk)
                .zip(dy[..rows * channels].par_chunks(chunk))
                .zip(x[..rows * channels].par_chunks(chunk))
                .zip(mean.par_chunks(per_job).zip(rstd.par_chunks(per_job)))
                .for_each(|(((dx, dy), x), (mean, rstd))| match kind {
                    NormKind::Layer => backward_rows(self.isa(), dx, dy, x, mean, rstd, w),
                    NormKind::Rms => rms_backward_rows(self.isa(), dx, dy, x, rstd, w),
                });
            // Parameter gradients sum over rows, in order: each job owns some columns.
            const COLUMNS: usize = 64;
            if dw.is_none() && db.is_none() {
                return;
            }
            let [dw, db] = [dw, db].map(|gradient| gradient.map(DisjointSlice::new));
            (0..channels.div_ceil(COLUMNS)).into_par_iter().with_max_len(1).for_each(|job| {
                let (first, mut unused) = (job * COLUMNS, [[0.0; COLUMNS]; 2]);
                let n = COLUMNS.min(channels - first);
                let [of_w, of_b] = &mut unused;
                let [dw, db] = [(&dw, of_w), (&db, of_b)].map(|(all, unused)| match all {
                    // SAFETY: jobs own disjoint columns.
                    Some(all) => unsafe { all.part(first, n) },
                    None => &mut unused[..n],
                });
                let (isa, dy, x) = (self.isa(), &dy[first..], &x[first..]);
                let statistics = NormStatistics { mean, rstd };
                match kind {
                    NormKind::Layer => backward_columns(isa, dw, db, dy, x, statistics, channels),
                    NormKind::Rms => rms_backward_columns(isa, dw, dy, x, rstd, channels),
                }
            });
        });
    }
}

impl Cpu {
    /// The norm of some rows.
    fn norm_rows(
        &self,
        out: &mut [f32],
        statistics: NormStatistics<&mut [f32]>,
        x: &[f32],
        NormParams { w, b }: &NormParams<'_, Self>,
        NormShape { epsilon, kind, .. }: NormShape,
    ) {
        match (kind, b) {
            (NormKind::Layer, Some(b)) => {
                forward_rows(self.isa(), out, statistics, x, w, b, epsilon);
            }
            (NormKind::Layer, None) => unreachable!("a LayerNorm has a bias"),
            (NormKind::Rms, _) => {
                rms_forward_rows(self.isa(), out, statistics.rstd, x, w, epsilon);
            }
        }
    }
}

simd_fn! {
    fn add(sum: &mut [f32], x: &[f32], y: &[f32]) {
        let chunks = sum.chunks_mut(AHEAD).zip(x.chunks(AHEAD)).zip(y.chunks(AHEAD));
        for ((sum, x), y) in chunks {
            prefetch_after(x);
            prefetch_after(y);
            for ((sum, x), y) in sum.iter_mut().zip(x).zip(y) {
                *sum = x + y;
            }
        }
    }
}

simd_fn! {
    fn forward_rows(
        out: &mut [f32],
        statistics: NormStatistics<&mut [f32]>,
        x: &[f32],
        w: &[f32],
        b: &[f32],
        epsilon: f32,
    ) {
        let c = w.len();
        let (w, b) = (&w[..c], &b[..c]);
        let rows = out.chunks_exact_mut(c).zip(x.chunks_exact(c));
        let statistics = statistics.mean.iter_mut().zip(statistics.rstd);
        for ((out, x), (mean, rstd)) in rows.zip(statistics) {
            let (out, x) = (&mut out[..c], &x[..c]);
            prefetch_after(x);
            let m = lane_sum([x], |[x]| x) / c as f32;
            let variance = lane_sum([x], |[x]| (x - m) * (x - m)) / c as f32;
            let s = 1.0 / (variance + epsilon).sqrt();
            for i in 0..c {
                out[i] = (x[i] - m) * s * w[i] + b[i];
            }
            (*mean, *rstd) = (m, s);
        }
    }
}

simd_fn! {
    /// With g = dy w and n the normalized x: dx += rstd (g - mean(g) - n mean(g n)).
    fn backward_rows(
        dx: &mut [f32],
        dy: &[f32],
        x: &[f32],
        mean: &[f32],
        rstd: &[f32],
        w: &[f32],
    ) {
        let c = w.len();
        let rows = dx.chunks_exact_mut(c).zip(dy.chunks_exact(c)).zip(x.chunks_exact(c));
        for (((dx, dy), x), (m, s)) in rows.zip(mean.iter().zip(rstd)) {
            let (dx, dy, x, w) = (&mut dx[..c], &dy[..c], &x[..c], &w[..c]);
            prefetch_after(dx);
            prefetch_after(dy);
            prefetch_after(x);
            let mean_g = lane_sum([dy, w], |[dy, w]| dy * w) / c as f32;
            let term = |[dy, w, x]: [f32; 3]| dy * w * ((x - m) * s);
            let mean_gn = lane_sum([dy, w, x], term) / c as f32;
            for i in 0..c {
                let n = (x[i] - m) * s;
                dx[i] += s * (dy[i] * w[i] - mean_g - n * mean_gn);
            }
        }
    }
}

simd_fn! {
    /// Adds to some columns, with which dy and x begin; their rows lie `channels` apart.
    fn backward_columns(
        dw: &mut [f32],
        db: &mut [f32],
        dy: &[f32],
        x: &[f32],
        statistics: NormStatistics<&[f32]>,
        channels: usize,
    ) {
        for (row, (m, s)) in statistics.mean.iter().zip(statistics.rstd).enumerate() {
            let at = row * channels;
            let n = dw.len();
            let (dy, x, db) = (&dy[at..][..n], &x[at..][..n], &mut db[..n]);
            for i in 0..n {
                dw[i] += dy[i] * ((x[i] - m) * s);
                db[i] += dy[i];
            }
        }
    }
}

simd_fn! {
    pub(super) fn rms_forward_rows(
        out: &mut [f32],
        rstd: &mut [f32],
        x: &[f32],
        w: &[f32],
        epsilon: f32,
    ) {
        let c = w.len();
        let rows = out.chunks_exact_mut(c).zip(x.chunks_exact(c));
        for ((out, x), rstd) in rows.zip(rstd) {
            let (out, x) = (&mut out[..c], &x[..c]);
            prefetch_after(x);
            let s = rms_of(x, epsilon);
            for i in 0..c {
                out[i] = x[i] * s * w[i];
            }
            *rstd = s;
        }
    }
}

/// 1 / sqrt(mean of squares + epsilon).
#[inline(always)]
pub(super) fn rms_of(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (lane_sum([x], |[x]| x * x) / x.len() as f32 + epsilon).sqrt()
}

simd_fn! {
    /// With g = dy w and n = x rstd: dx += rstd (g - n mean(g n)).
    fn rms_backward_rows(dx: &mut [f32], dy: &[f32], x: &[f32], rstd: &[f32], w: &[f32]) {
        let c = w.len();
        let rows = dx.chunks_exact_mut(c).zip(dy.chunks_exact(c)).zip(x.chunks_exact(c));
        for (((dx, dy), x), s) in rows.zip(rstd) {
            let (dx, dy, x, w) = (&mut dx[..c], &dy[..c], &x[..c], &w[..c]);
            prefetch_after(dx);
            prefetch_after(dy);
            prefetch_after(x);
            let mean_gn = lane_sum([dy, w, x], |[dy, w, x]| dy * w * (x * s)) / c as f32;
            for i in 0..c {
                dx[i] += s * (dy[i] * w[i] - x[i] * s * mean_gn);
            }
        }
    }
}

simd_fn! {
    /// Adds to some columns, with which dy and x begin; their rows lie `channels` apart.
    fn rms_backward_columns(dw: &mut [f32], dy: &[f32], x: &[f32], rstd: &[f32], channels: usize) {
        for (row, s) in rstd.iter().enumerate() {
            let (at, n) = (row * channels, dw.len());
            let (dy, x) = (&dy[at..][..n], &x[at..][..n]);
            for i in 0..n {
                dw[i] += dy[i] * (x[i] * s);
            }
        }
    }
}
