//! GELU in its tanh form, as GPT-2 has it, and itself.

use super::Cuda;
use super::device::launch;
use super::device::memory::Tensor;

const THREADS: usize = 256;
/// Elements of a thread.
const ELEMENTS: usize = 8;
/// Rows of which the first is sampled, as the kernel has it.
const SAMPLED_ROWS: usize = 32;

/// One block for every stretch of elements, but no more than run at once: the fewer blocks, the
/// fewer notes of the largest magnitude.
fn grid(cuda: &Cuda, len: usize) -> [usize; 3] {
    let at_once = 8 * cuda.gpu.multiprocessors as usize;
    [len.div_ceil(THREADS * ELEMENTS).min(at_once), 1, 1]
}

/// Starts the kernel of this name, which makes `to` from x, both of `len` elements.
pub(super) fn of_all(cuda: &Cuda, name: &str, to: &mut Tensor, x: &Tensor, len: usize) {
    let mut to = to.write();
    launch!(cuda.gpu, name, grid(cuda, len), THREADS, 0;
        to.address, to.amax(), x.address(), len as u64);
}

/// Makes the word at `amax` the larger of itself and the bits of the largest magnitude of d
/// gelu'(x), both (rows, cols) of bf16 numbers, in every 32nd row.
pub(super) fn sample_gradient(
    cuda: &Cuda,
    amax: u64,
    d: u64,
    x: u64,
    (rows, cols): (usize, usize),
) {
    let grid = [cols.div_ceil(THREADS * ELEMENTS), rows.div_ceil(SAMPLED_ROWS), 1];
    launch!(cuda.gpu, "sample_gelu_gradient", grid, THREADS, 0; amax, d, x, cols as u32);
}
