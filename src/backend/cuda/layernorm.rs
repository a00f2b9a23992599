//! LayerNorm and its backward pass.

use super::device::launch;
use super::device::memory::{F32, Param, Tensor};
use super::{Cuda, Workspace, kernel, linear};
use crate::backend::NormStatistics;

/// Threads of a block; a warp takes a row.
const BLOCK: usize = 256;

/// Most blocks of the backward kernel, each of which leaves partial sums of dw and db.
const MAX_PARTS: usize = 512;

/// Floats of scratch that the backward pass needs: (parts, 2, C).
pub(super) fn partials(channels: usize) -> usize {
    MAX_PARTS * 2 * channels
}

fn grid(rows: usize) -> [usize; 3] {
    [rows.div_ceil(BLOCK / 32), 1, 1]
}

pub(super) fn forward(
    cuda: &Cuda,
    out: &mut Tensor,
    statistics: NormStatistics<&mut F32>,
    x: &Tensor,
    w: &Param,
    b: &Param,
    rows: usize,
    channels: usize,
    epsilon: f32,
) {
    let (w, b) = (w.as_read_in(x.precision), b.as_read_in(x.precision));
    launch!(cuda.gpu, kernel!(x, "layernorm_forward"), grid(rows), BLOCK, 0;
        out.address(), out.noting(), statistics.mean.address(), statistics.rstd.address(), x.address(), w, b,
        rows as u32, channels as u32, epsilon);
}

pub(super) fn add_forward(
    cuda: &Cuda,
    out: &mut Tensor,
    sum: &mut Tensor,
    statistics: NormStatistics<&mut F32>,
    x: &Tensor,
    y: &Tensor,
    w: &Param,
    b: &Param,
    rows: usize,
    channels: usize,
    epsilon: f32,
) {
    let (w, b) = (w.as_read_in(x.precision), b.as_read_in(x.precision));
    launch!(cuda.gpu, kernel!(x, "add_layernorm_forward"), grid(rows), BLOCK, 0;
        out.address(), sum.address(), out.noting(), statistics.mean.address(), statistics.rstd.address(),
        x.address(), y.address(), w, b, rows as u32, channels as u32, epsilon);
}

/// Adds to dx; overwrites dw and db, or with `accumulate` adds to them.
pub(super) fn backward(
    cuda: &Cuda,
    workspace: &Workspace,
    dx: &mut Tensor,
    dw: &mut F32,
    db: &mut F32,
    dy: &Tensor,
    x: &Tensor,
    statistics: NormStatistics<&F32>,
    w: &Param,
    rows: usize,
    channels: usize,
    accumulate: bool,
) {
    let partials = workspace.partials.address;
    // As many as run at once: more would wait for the slowest.
    let parts = (3 * cuda.gpu.multiprocessors as usize).min(MAX_PARTS);
    launch!(cuda.gpu, kernel!(x, "layernorm_backward"), [parts, 1, 1], BLOCK, 8 * channels;
        dx.address(), dx.noting(), partials, dy.address(), x.address(),
        statistics.mean.address(), statistics.rstd.address(), w.as_read_in(x.precision),
        rows as u32, channels as u32);
    // A part holds C sums for dw, then C for db.
    linear::add_partials(cuda, dw, Some(db), partials, parts, channels, accumulate);
}
