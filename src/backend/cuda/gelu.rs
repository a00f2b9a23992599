//! GELU in its tanh form, as GPT-2 has it, and itself.

use super::device::launch;
use super::device::memory::Tensor;
use super::{Cuda, kernel};
use crate::backend::Activation;

const BLOCK: usize = 256;
/// Elements of a thread.
const ELEMENTS: usize = 8;
/// Rows of which the first is sampled, as the kernel has it.
const SAMPLED_ROWS: usize = 32;

/// One block for every stretch of elements, but no more than run at once: the fewer blocks, the
/// fewer notes of the largest magnitude.
fn grid(cuda: &Cuda, len: usize) -> [usize; 3] {
    let at_once = 8 * cuda.gpu.multiprocessors as usize;
    [len.div_ceil(BLOCK * ELEMENTS).min(at_once), 1, 1]
}

/// out = gelu(x), both of `len` elements.
pub(super) fn forward(cuda: &Cuda, out: &mut Tensor, x: &Tensor, len: usize, form: Activation) {
    let name = match form {
        Activation::GeluTanh => kernel!(out, "gelu_of_all", false, false),
        Activation::Gelu => kernel!(out, "gelu_of_all", true, false),
    };
    let mut out = out.write();
    launch!(cuda.gpu, name, grid(cuda, len), BLOCK, 0;
        out.address, out.amax(), x.address(), len as u64);
}

/// d = d * gelu'(x), in place.
pub(super) fn backward(cuda: &Cuda, d: &mut Tensor, x: &Tensor, len: usize, form: Activation) {
    let name = match form {
        Activation::GeluTanh => kernel!(d, "gelu_of_all", false, true),
        Activation::Gelu => kernel!(d, "gelu_of_all", true, true),
    };
    let mut d = d.write();
    launch!(cuda.gpu, name, grid(cuda, len), BLOCK, 0;
        d.address, d.amax(), x.address(), len as u64);
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
    let grid = [cols.div_ceil(BLOCK * ELEMENTS), rows.div_ceil(SAMPLED_ROWS), 1];
    launch!(cuda.gpu, "sample_gelu_gradient", grid, BLOCK, 0; amax, d, x, cols as u32);
}
