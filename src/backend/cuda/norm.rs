//! LayerNorm and its backward pass.

use super::device::launch;
use super::device::memory::{F32, Param, Tensor};
use super::quantize::sums;
use super::{Cuda, Workspace, kernel};
use crate::backend::NormStatistics;

/// Threads of a block; a warp takes a row.
const BLOCK: usize = 256;

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
        parameters: [&Param; 2],
        sizes: [usize; 2],
        epsilon: f32,
    ) -> Self {
        let [w, b] = parameters.map(|parameter| parameter.as_read_in(x.precision));
        let [rows, channels] = sizes.map(|n| n as u32);
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
    [rows.div_ceil(BLOCK / 32), 1, 1]
}

pub(super) fn forward(
    cuda: &Cuda,
    out: &mut Tensor,
    statistics: NormStatistics<&mut F32>,
    x: &Tensor,
    w: &Param<'_>,
    b: &Param<'_>,
    rows: usize,
    channels: usize,
    epsilon: f32,
) {
    let of_x = Normalize::new(out, statistics, x, [w, b], [rows, channels], epsilon);
    launch!(cuda.gpu, kernel!(x, "normalize", false), grid(rows), BLOCK, 0; of_x);
}

pub(super) fn add_forward(
    cuda: &Cuda,
    out: &mut Tensor,
    sum: &mut Tensor,
    statistics: NormStatistics<&mut F32>,
    x: &Tensor,
    y: &Tensor,
    w: &Param<'_>,
    b: &Param<'_>,
    rows: usize,
    channels: usize,
    epsilon: f32,
) {
    let of_x = Normalize::new(out, statistics, x, [w, b], [rows, channels], epsilon);
    let of_sum = Normalize { sum: sum.write().address, y: y.address(), ..of_x };
    launch!(cuda.gpu, kernel!(x, "normalize", true), grid(rows), BLOCK, 0; of_sum);
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
    w: &Param<'_>,
    rows: usize,
    channels: usize,
    accumulate: bool,
) {
    let partials = workspace.partials.address;
    // As many as run at once: more would wait for the slowest.
    let parts = (3 * cuda.gpu.multiprocessors as usize).min(MAX_PARTS);
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
    let shared = 8 * channels;
    launch!(cuda.gpu, kernel!(x, "layernorm_backward"), [parts, 1, 1], BLOCK, shared; arguments);
    // A part holds C sums for dw, then C for db.
    sums::add_partials(cuda, dw, Some(db), partials, parts, channels, accumulate);
}
