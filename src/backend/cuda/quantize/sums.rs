//! Column sums in two steps: parts, which kernels leave, and their sums in a fixed order. Bias
//! gradients are such sums of dy, which quantizing dy makes on the way.

use crate::backend::cuda::device::launch;
use crate::backend::cuda::device::memory::{Gradient, Tensor};
use crate::backend::cuda::{Cuda, Workspace, kernel};

/// Stretches of rows whose column sums are kept apart.
fn parts(rows: usize) -> usize {
    rows.div_ceil(64).min(128)
}

/// Floats of scratch that the bias gradient needs: (parts, outputs), from dy or from quantizing it.
pub(crate) fn partials(rows: usize, outputs: usize) -> usize {
    parts(rows).max(rows.div_ceil(64) + 2) * outputs
}

/// db (outputs) = the column sums of dy (rows, outputs), or with `accumulate` they are added.
pub(crate) fn bias_gradient(
    cuda: &Cuda,
    workspace: &Workspace,
    db: &mut Gradient<'_>,
    dy: &Tensor,
    (rows, outputs): (usize, usize),
    accumulate: bool,
) {
    let (partials, parts) = (workspace.partials.address, parts(rows));
    launch!(cuda.gpu, kernel!(dy, "bias_gradient"), [outputs.div_ceil(256), parts, 1], 256, 0;
        partials, dy.address(), rows as u32, outputs as u32);
    add_partials(cuda, db, partials, parts, outputs, accumulate);
}

/// `to` (n) = the sums of the columns of partials (parts, n), or with `accumulate` they are added.
pub(crate) fn add_partials(
    cuda: &Cuda,
    to: &mut Gradient<'_>,
    partials: u64,
    parts: usize,
    n: usize,
    accumulate: bool,
) {
    launch!(cuda.gpu, "add_partials", [n.div_ceil(32), 1, 1], 1024, 0;
        to.in_f32(), 0u64, partials, parts as u32, n as u32, u32::from(accumulate));
}

/// The same of two gradients of n each from partials (parts, 2, n). The sums of one that nobody wants
/// stay in the first part, whose columns only the block that has read them writes.
pub(crate) fn add_pairs(
    cuda: &Cuda,
    to: [Option<Gradient<'_>>; 2],
    partials: u64,
    parts: usize,
    n: usize,
    accumulate: bool,
) {
    if to.iter().all(Option::is_none) {
        return;
    }
    let unwanted = [partials, partials + 4 * n as u64];
    let [first, second] =
        std::array::from_fn(|i| to[i].as_ref().map_or(unwanted[i], Gradient::in_f32));
    launch!(cuda.gpu, "add_partials", [(2 * n).div_ceil(32), 1, 1], 1024, 0;
        first, second, partials, parts as u32, n as u32, u32::from(accumulate));
}
