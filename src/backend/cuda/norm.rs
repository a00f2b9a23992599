//! LayerNorm and RMSNorm, and their backward passes.

use super::device::launch;
use super::device::memory::{F32, Tensor};
use super::quantize::sums;
use super::{Cuda, Workspace, kernel};
use crate::backend::{
    Norm, NormBackward, NormKind, NormParams, NormShape, NormStatistics, ResidualSum,
};

/// Threads of a block; a warp takes a row.
const THREADS: usize = 256;

/// Most blocks of the backward kernel, each of which leaves partial sums of dw and db.
const MAX_PARTS: usize = 512;

/// Floats of scratch that the backward pass needs: (parts, 2, C).
pub(super) fn partials(channels: usize) -> usize {
    MAX_PARTS * 2 * channels
}

/// `Normalize` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Normalize {
    pub(super) out: u64,
    pub(super) sum: u64,
    pub(super) amax: u64,
    pub(super) mean: u64,
    pub(super) rstd: u64,
    pub(super) x: u64,
    pub(super) y: u64,
    pub(super) w: u64,
    pub(super) b: u64,
    pub(super) rows: u32,
    pub(super) channels: u32,
    pub(super) epsilon: f32,
}

impl Normalize {
    /// Of x alone.
    fn new(
        out: &mut Tensor,
        statistics: NormStatistics<&mut F32>,
        x: &Tensor,
        NormParams { w, b }: NormParams<'_, Cuda>,
        NormShape { rows, channels, epsilon, .. }: NormShape,
    ) -> Self {
        let w = w.as_read_in(x.precision);
        let b = b.map_or(0, |b| b.as_read_in(x.precision));
        let [rows, channels] = [rows, channels].map(|n| n as u32);
        let [mean, rstd] = [statistics.mean.address(), statistics.rstd.address()];
        let (mut out, x) = (out.write(), x.address());
        let (amax, out) = (out.amax(), out.address);
        Self { out, sum: 0, amax, mean, rstd, x, y: 0, w, b, rows, channels, epsilon }
    }
}

/// `Backward` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Backward {
    pub(super) dx: u64,
    pub(super) amax: u64,
    pub(super) partial: u64,
    pub(super) dy: u64,
    pub(super) x: u64,
    pub(super) mean: u64,
    pub(super) rstd: u64,
    pub(super) w: u64,
    pub(super) rows: u32,
    pub(super) channels: u32,
}

fn grid(rows: usize) -> [usize; 3] {
    [rows.div_ceil(THREADS / 32), 1, 1]
}

impl Norm for Cuda {
    fn norm_forward(
        &self,
        out: &mut Tensor,
        statistics: NormStatistics<&mut F32>,
        x: &Tensor,
        params: NormParams<'_, Self>,
        shape: NormShape,
    ) {
        let of_x = Normalize::new(out, statistics, x, params, shape);
        let name = match shape.kind {
            NormKind::Layer => kernel!(x, "normalize", false, false),
            NormKind::Rms => kernel!(x, "normalize", false, true),
        };
        launch!(self.gpu, name, grid(shape.rows), THREADS, 0; of_x);
    }

    fn add_norm_forward(
        &self,
        out: &mut Tensor,
        statistics: NormStatistics<&mut F32>,
        ResidualSum { sum, x, y }: ResidualSum<'_, Self>,
        params: NormParams<'_, Self>,
        shape: NormShape,
    ) {
        let of_x = Normalize::new(out, statistics, x, params, shape);
        let of_sum = Normalize { sum: sum.write().address, y: y.address(), ..of_x };
        let name = match shape.kind {
            NormKind::Layer => kernel!(x, "normalize", true, false),
            NormKind::Rms => kernel!(x, "normalize", true, true),
        };
        launch!(self.gpu, name, grid(shape.rows), THREADS, 0; of_sum);
    }

    fn norm_backward(
        &self,
        workspace: &mut Workspace,
        operands: NormBackward<'_, Self>,
        NormShape { rows, channels, kind, .. }: NormShape,
    ) {
        let NormBackward { dx, dw, db, dy, x, statistics, w, accumulate } = operands;
        let partials = workspace.partials.address;
        // As many as run at once: more would wait for the slowest.
        let parts = (3 * self.gpu.multiprocessors as usize).min(MAX_PARTS);
        let mut dx = dx.write();
        let arguments = Backward {
            dx: dx.address,
            amax: dx.amax(),
            partial: partials,
            dy: dy.address(),
            x: x.address(),
            mean: statistics.mean.address(),
            rstd: statistics.rstd.address(),
            w: w.as_read_in(x.precision),
            rows: rows as u32,
            channels: channels as u32,
        };
        let (name, floats) = match kind {
            NormKind::Layer => (kernel!(x, "norm_backward", false), 2 * channels),
            NormKind::Rms => (kernel!(x, "norm_backward", true), channels),
        };
        launch!(self.gpu, name, [parts, 1, 1], THREADS, 4 * floats; arguments);
        // A part holds C sums for dw, then of LayerNorm C for db.
        match (kind, dw) {
            (NormKind::Layer, dw) => {
                sums::add_pairs(self, [dw, db], partials, parts, channels, accumulate);
            }
            (NormKind::Rms, Some(mut dw)) => {
                sums::add_partials(self, &mut dw, partials, parts, channels, accumulate);
            }
            (NormKind::Rms, None) => {}
        }
    }
}
