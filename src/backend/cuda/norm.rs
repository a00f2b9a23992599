//! LayerNorm and its backward pass.

use super::device::launch;
use super::device::memory::{F32, Tensor};
use super::quantize::sums;
use super::{Cuda, Workspace, kernel};
use crate::backend::{Norm, NormBackward, NormParams, NormShape, NormStatistics, ResidualSum};

/// Threads of a block; a warp takes a row.
const THREADS: usize = 256;

/// Most blocks of the backward kernel, each of which leaves partial sums of dw and db.
const MAX_PARTS: usize = 512;

/// Floats of scratch that the backward pass needs: (parts, 2, C).
pub(super) fn partials(channels: usize) -> usize {
    MAX_PARTS * 2 * channels
}

/// `Normalize` of the kernels.
#[repr(C)]
struct Normalize {
    out: u64,
    sum: u64,
    amax: u64,
    mean: u64,
    rstd: u64,
    x: u64,
    y: u64,
    w: u64,
    b: u64,
    rows: u32,
    channels: u32,
    epsilon: f32,
}

impl Normalize {
    /// Of x alone.
    fn new(
        out: &mut Tensor,
        statistics: NormStatistics<&mut F32>,
        x: &Tensor,
        NormParams { w, b }: NormParams<'_, Cuda>,
        NormShape { rows, channels, epsilon }: NormShape,
    ) -> Self {
        let [w, b] = [w, b].map(|param| param.as_read_in(x.precision));
        let [rows, channels] = [rows, channels].map(|n| n as u32);
        let [mean, rstd] = [statistics.mean.address(), statistics.rstd.address()];
        let (mut out, x) = (out.write(), x.address());
        let (amax, out) = (out.amax(), out.address);
        Self { out, sum: 0, amax, mean, rstd, x, y: 0, w, b, rows, channels, epsilon }
    }
}

/// `Backward` of the kernels.
#[repr(C)]
struct Backward {
    dx: u64,
    amax: u64,
    partial: u64,
    dy: u64,
    x: u64,
    mean: u64,
    rstd: u64,
    w: u64,
    rows: u32,
    channels: u32,
}

fn grid(rows: usize) -> [usize; 3] {
    [rows.div_ceil(THREADS / 32), 1, 1]
}

impl Norm for Cuda {
    fn layernorm_forward(
        &self,
        out: &mut Tensor,
        statistics: NormStatistics<&mut F32>,
        x: &Tensor,
        params: NormParams<'_, Self>,
        shape: NormShape,
    ) {
        let of_x = Normalize::new(out, statistics, x, params, shape);
        launch!(self.gpu, kernel!(x, "normalize", false), grid(shape.rows), THREADS, 0; of_x);
    }

    fn add_layernorm_forward(
        &self,
        out: &mut Tensor,
        statistics: NormStatistics<&mut F32>,
        ResidualSum { sum, x, y }: ResidualSum<'_, Self>,
        params: NormParams<'_, Self>,
        shape: NormShape,
    ) {
        let of_x = Normalize::new(out, statistics, x, params, shape);
        let of_sum = Normalize { sum: sum.write().address, y: y.address(), ..of_x };
        launch!(self.gpu, kernel!(x, "normalize", true), grid(shape.rows), THREADS, 0; of_sum);
    }

    fn layernorm_backward(
        &self,
        workspace: &mut Workspace,
        operands: NormBackward<'_, Self>,
        NormShape { rows, channels, .. }: NormShape,
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
        let (name, shared) = (kernel!(x, "layernorm_backward"), 8 * channels);
        launch!(self.gpu, name, [parts, 1, 1], THREADS, shared; arguments);
        // A part holds C sums for dw, then C for db.
        sums::add_pairs(self, [dw, db], partials, parts, channels, accumulate);
    }
}
