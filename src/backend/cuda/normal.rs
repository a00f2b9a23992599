//! Normal random values: `mx::fill_normal` on the device.

use super::Cuda;
use super::device::launch;
use super::quantize::random;
use crate::mx::Draw;

const BLOCK: usize = 256;

/// Overwrites `len` f32 values.
pub(super) fn fill(cuda: &Cuda, to: u64, len: usize, std: f32, draw: &Draw) {
    launch!(cuda.gpu, "fill_normal", [len.div_ceil(2 * BLOCK), 1, 1], BLOCK, 0;
        to, len as u64, std, random::Draw::from(*draw));
}
