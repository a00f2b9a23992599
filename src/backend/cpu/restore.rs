//! Behind products in the basis of a rotated forward pass ([`Restoration`]).

use super::Cpu;
use super::disjoint::DisjointSlice;
use super::gemm::Output;
use crate::formats::Restoration;

/// `out` gets the gradient of `tensor`, both (rows, columns) and dense, from the product `c` (rows,
/// padded columns), which is overwritten.
pub(super) fn restore(
    cpu: &Cpu,
    restoration: Restoration,
    c: &mut [f32],
    tensor: &[f32],
    Output { c: out, stride: columns, accumulate, .. }: Output<'_>,
) {
    let depth = restoration.depth(columns);
    let rows = c.len() / depth;
    let (c, out) = (DisjointSlice::new(c), DisjointSlice::new(out));
    cpu.parallel(rows, |row| {
        // SAFETY: every job has rows of its own.
        let (c, out) = unsafe { (c.part(row * depth, depth), out.part(row * columns, columns)) };
        restoration.apply(c, &tensor[row * columns..][..columns]);
        for (out, c) in out.iter_mut().zip(c) {
            *out = if accumulate { *out + *c } else { *c };
        }
    });
}
