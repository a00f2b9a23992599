//! FP8 E4M3 with current scaling: largest magnitudes, bytes for the tensor cores, and numbers as
//! FP8 keeps them.

use super::Source;
use crate::backend::cuda::device::launch;
use crate::backend::cuda::device::memory::{Piece, Tensor};
use crate::backend::cuda::{Cuda, Workspace, kernel};
use crate::formats::Element;

/// Threads of a block.
const THREADS: usize = 256;

/// Elements of a thread that makes bytes along rows.
pub(crate) const CONVERTED: usize = 16;

/// Rows and columns of the tiles that are turned.
pub(crate) const TILE: usize = 128;

/// The address of the bits of the largest magnitude of a tensor's first `len` elements, which were
/// the last to be written: what the kernel noted that did it, or else `word`, after reading them once
/// more.
pub(crate) fn amax_of(cuda: &Cuda, word: &Piece, tensor: &Tensor, len: usize) -> u64 {
    tensor.amax().unwrap_or_else(|| find_amax(cuda, word.address, Source::of(tensor), len))
}

/// Reads a source for that; `word` is where it goes, which is returned.
pub(crate) fn find_amax(cuda: &Cuda, word: u64, source: Source, len: usize) -> u64 {
    cuda.clear(word, 4);
    let blocks = len.div_ceil(8 * THREADS).min(8 * cuda.gpu.multiprocessors as usize);
    launch!(cuda.gpu, kernel!(source, "find_amax"), [blocks, 1, 1], THREADS, 0;
        word, source.address, len as u64);
    word
}

/// The addresses of x (len) as FP8 keeps it, and of the bits of the largest magnitude of that.
pub(crate) fn keep(cuda: &Cuda, workspace: &Workspace, x: &Tensor, len: usize) -> (u64, u64) {
    let amax = amax_of(cuda, &workspace.x_amax, x, len);
    let (kept, kept_amax) = (workspace.kept.address, workspace.kept_amax.address);
    round(cuda, kept, kept_amax, Source::of(x), amax, len);
    (kept, kept_amax)
}

/// `out` (len, bf16) = the source as FP8 holds it with a scale for the whole tensor, whose largest
/// magnitude is at `amax`; that of the result goes to `kept_amax`.
pub(crate) fn round(cuda: &Cuda, out: u64, kept_amax: u64, source: Source, amax: u64, len: usize) {
    let grid = [len.div_ceil(8 * THREADS), 1, 1];
    launch!(cuda.gpu, kernel!(source, "round_to_fp8"), grid, THREADS, 0;
        out, kept_amax, source.address, amax, len as u64);
}

/// `out` (len) = the FP8 bytes of the source with a scale for the whole tensor, which goes to
/// `scale`.
pub(crate) fn convert(
    cuda: &Cuda,
    element: Element,
    [out, scale]: [u64; 2],
    source: Source,
    amax: u64,
    len: usize,
) {
    let grid = [len.div_ceil(CONVERTED * THREADS), 1, 1];
    let name = match element {
        Element::E5m2 => kernel!(source, "convert_to_fp8", true),
        _ => kernel!(source, "convert_to_fp8", false),
    };
    launch!(cuda.gpu, name, grid, THREADS, 0; out, scale, source.address, amax, len as u64);
}

/// The same of a source (rows, cols), transposed; both are multiples of 16.
pub(crate) fn turn(
    cuda: &Cuda,
    element: Element,
    [out, scale]: [u64; 2],
    source: Source,
    amax: u64,
    [rows, cols]: [usize; 2],
) {
    let grid = [cols.div_ceil(TILE), rows.div_ceil(TILE), 1];
    let name = match element {
        Element::E5m2 => kernel!(source, "turn_to_fp8", true),
        _ => kernel!(source, "turn_to_fp8", false),
    };
    launch!(cuda.gpu, name, grid, THREADS, 0;
        out, scale, source.address, amax, rows as u32, cols as u32);
}

/// Both of a source (rows, cols), likewise, with one reading, and the column sums of every tile's
/// rows to `sums`, if that is not 0. The number of these parts is returned.
pub(crate) fn convert_both(
    cuda: &Cuda,
    element: Element,
    [by_rows, by_columns, scale, sums]: [u64; 4],
    source: Source,
    amax: u64,
    [rows, cols]: [usize; 2],
) -> usize {
    let grid = [cols.div_ceil(TILE), rows.div_ceil(TILE), 1];
    let name = match element {
        Element::E5m2 => kernel!(source, "convert_both_to_fp8", true),
        _ => kernel!(source, "convert_both_to_fp8", false),
    };
    launch!(cuda.gpu, name, grid, THREADS, 0;
        by_rows, by_columns, scale, sums, source.address, amax, rows as u32, cols as u32);
    grid[1]
}
