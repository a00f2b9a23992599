//! SwiGLU, silu(gate) up, and its gradient.

use super::device::launch;
use super::device::memory::Tensor;
use super::{Cuda, kernel};

const THREADS: usize = 256;
/// Elements of a thread at a time, where they divide M.
const ELEMENTS: usize = 8;
/// Rows of which the first is sampled, as the kernel has it.
const SAMPLED_ROWS: usize = 32;

/// As many blocks as run at once, at most.
fn grid(cuda: &Cuda, rows: usize, m: usize) -> [usize; 3] {
    let pieces = rows * if m.is_multiple_of(ELEMENTS) { m / ELEMENTS } else { m };
    assert!(pieces <= u32::MAX as usize, "the kernels count pieces in 32 bits");
    let at_once = 8 * cuda.gpu.multiprocessors as usize;
    [pieces.div_ceil(THREADS).min(at_once), 1, 1]
}

/// out (rows, M) of y = [gate | up] (rows, 2 M).
pub(super) fn forward(cuda: &Cuda, out: &mut Tensor, y: &Tensor, rows: usize, m: usize) {
    let mut out = out.write();
    launch!(cuda.gpu, kernel!(y, "swiglu_forward"), grid(cuda, rows, m), THREADS, 0;
        out.address, out.amax(), y.address(), rows as u32, m as u32);
}

/// y becomes its gradient, d (rows, M) being that of the result.
pub(super) fn backward(cuda: &Cuda, y: &mut Tensor, d: &Tensor, rows: usize, m: usize) {
    let mut y = y.write();
    launch!(cuda.gpu, kernel!(d, "swiglu_backward"), grid(cuda, rows, m), THREADS, 0;
        y.address, y.amax(), d.address(), rows as u32, m as u32);
}

/// Makes the word at `amax` the larger of itself and the bits of the largest magnitude of the gradient
/// of y (rows, 2 M), of d (rows, M), bf16 numbers both, in every 32nd row.
pub(super) fn sample_gradient(cuda: &Cuda, amax: u64, d: u64, y: u64, (rows, m): (usize, usize)) {
    let grid = [m.div_ceil(THREADS * ELEMENTS), rows.div_ceil(SAMPLED_ROWS), 1];
    launch!(cuda.gpu, "sample_swiglu_gradient", grid, THREADS, 0; amax, d, y, m as u32);
}
