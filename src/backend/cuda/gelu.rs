//! GELU in its tanh form, as GPT-2 has it.

use super::gpu::launch;
use super::memory::Tensor;
use super::{Cuda, kernel};

const BLOCK: usize = 256;
/// Elements of a thread.
const ELEMENTS: usize = 8;

/// out = gelu(x), both of `len` elements.
pub(super) fn forward(cuda: &Cuda, out: &mut Tensor, x: &Tensor, len: usize) {
    launch!(cuda.gpu, kernel!(out, "gelu_forward"), [len.div_ceil(BLOCK * ELEMENTS), 1, 1], BLOCK, 0;
        out.address(), x.address(), len as u64);
}

/// d = d * gelu'(x), in place.
pub(super) fn backward(cuda: &Cuda, d: &mut Tensor, x: &Tensor, len: usize) {
    launch!(cuda.gpu, kernel!(d, "gelu_backward"), [len.div_ceil(BLOCK * ELEMENTS), 1, 1], BLOCK, 0;
        d.address(), x.address(), len as u64);
}
