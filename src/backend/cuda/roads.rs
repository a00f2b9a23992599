//! Which tensor cores multiply MXFP4 operands, and what those of Blackwell need that others do not: a
//! scale for every block, in cuBLASLt's layout or the definition's, and on some a kernel of our own.

use super::Cuda;
use super::gemm::{Product, Type};
use super::gpu::launch;
use super::linear::{DrawArgument, TILE_COLUMNS, Target, TransformArgument};
use crate::backend::LinearShape;
use crate::mx::{BLOCK, Draw, Rounding};

/// How MXFP4 operands are held and multiplied. All of them hold MXFP4 values exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Road {
    /// As bf16 numbers, everywhere.
    Bf16,
    /// As FP8 numbers with one power of two a tensor: dy in E5M2, whose 28 binades blocks need most, the
    /// other in E4M3, because no product takes E5M2 twice. Blocks below that range are raised.
    Fp8,
    /// As MXFP8 by cuBLASLt: E4M3 elements, and every block's own scale.
    Mxfp8,
    /// As they are, by `mxfp4_sm120.cu`.
    Fp4,
}

impl Road {
    /// The best one of a chip.
    pub(super) fn of(capability: (i32, i32)) -> Self {
        match capability {
            // NOTE: 10.x and 11.0 have FP4 products too, but of another kind (`tcgen05`).
            (12, 0 | 1) => Self::Fp4,
            (10..=12, _) => Self::Mxfp8,
            capability if capability >= (8, 9) => Self::Fp8,
            _ => Self::Bf16,
        }
    }

    /// This one, if it takes a layer of these sizes. cuBLASLt wants FP8 operands in rows of whole 16 bytes;
    /// that their length is a multiple of 32, as MXFP8 needs, padding to whole blocks sees to.
    pub(super) fn for_layer(self, LinearShape { rows, inputs, outputs }: LinearShape) -> Self {
        let fits = [rows, inputs, outputs].iter().all(|n| n.is_multiple_of(16));
        if fits || self == Self::Fp4 { self } else { Self::Bf16 }
    }

    /// Whether every block has a scale.
    pub(super) fn has_block_scales(self) -> bool {
        matches!(self, Self::Mxfp8 | Self::Fp4)
    }

    /// Bytes of the scales of an operand (vectors, depth) that has one for every block.
    pub(super) fn scale_bytes(self, vectors: usize, depth: usize) -> usize {
        let blocks = depth / BLOCK;
        match self {
            Self::Bf16 | Self::Fp8 => 0,
            Self::Mxfp8 => {
                vectors.next_multiple_of(TILE_VECTORS) * blocks.next_multiple_of(TILE_BLOCKS)
            }
            Self::Fp4 => vectors * blocks,
        }
    }
}

/// Vectors of a tile of MXFP8's scales.
pub(super) const TILE_VECTORS: usize = 128;

/// Blocks of each of them.
const TILE_BLOCKS: usize = 4;

/// Where the scale of a vector's block lies among those of MXFP8, of `blocks` a vector: in tiles of 128
/// vectors and 4 blocks, which follow each other along the vectors. The twin of `tiled` in `mxfp4.cu`.
/// ref: cuBLAS documentation, "1D Block Scaling Factors Layout".
#[cfg(test)]
pub(super) fn tiled(vector: usize, block: usize, blocks: usize) -> usize {
    let tile = vector / TILE_VECTORS * blocks.div_ceil(TILE_BLOCKS) + block / TILE_BLOCKS;
    let (outer, inner) = (vector % TILE_VECTORS, block % TILE_BLOCKS);
    tile * TILE_VECTORS * TILE_BLOCKS + outer % 32 * 16 + outer / 32 * 4 + inner
}

/// Both forms of a source (rows, cols) of bf16 numbers, along rows to `targets[0]` and down columns to
/// `targets[1]`, both codes or both MXFP8, with one group for both, of at most 64. `sums` and the result as of
/// [`super::linear::quantize`].
pub(super) fn quantize_both(
    cuda: &Cuda,
    targets: [Target; 2],
    source: u64,
    (rows, cols): (usize, usize),
    sums: u64,
    signs: [&[f32]; 2],
    rounding: Rounding,
    draw: Draw,
) -> usize {
    let group = signs[0].len();
    let [rows_depth, depth] = [cols, rows].map(|n| n.next_multiple_of(group.max(BLOCK)));
    let nearest = rounding == Rounding::Nearest;
    let (name, columns, by_rows, by_columns) = match targets {
        [
            Target::Codes { codes: by_rows, scales: row_scales },
            Target::Codes { codes: by_columns, scales },
        ] => {
            let names = ["quantize_both_codes_bf16_unbiased", "quantize_both_codes_bf16_nearest"];
            (names, rows_depth, (by_rows, row_scales), (by_columns, scales))
        }
        [
            Target::Mxfp8 { out: by_rows, scales: row_scales },
            Target::Mxfp8 { out: by_columns, scales },
        ] => {
            let names = ["quantize_both_mxfp8_bf16_unbiased", "quantize_both_mxfp8_bf16_nearest"];
            let columns = cols.next_multiple_of(TILE_VECTORS);
            (names, columns, (by_rows, row_scales), (by_columns, scales))
        }
        _ => unreachable!("both forms are of one kind that has a scale for every block"),
    };
    let grid = [columns.div_ceil(TILE_COLUMNS), depth.div_ceil(128), 1];
    launch!(cuda.gpu, name[usize::from(nearest)], grid, 256, 0;
        by_rows.0, by_rows.1, by_columns.0, by_columns.1, sums, source, rows as u32, cols as u32,
        rows_depth as u32, depth as u32, group as u32, TransformArgument::new(signs[0]),
        TransformArgument::new(signs[1]), DrawArgument::from(draw));
    grid[1]
}

/// Rows and columns of C of a thread block of `product_mxfp4_*`, its threads, and its stages of codes and scales.
const FP4_TILE: usize = 128;
const FP4_THREADS: usize = 256;
const FP4_SHARED: usize = 4 * 2 * FP4_TILE * (64 + 4);

/// A product of operands in [`Type::E2m1`], dense, the reduction along their rows.
pub(super) fn multiply_fp4(cuda: &Cuda, product: &Product) {
    let &Product { m, n, k, a, b, c, c_stride, c_type, alpha, accumulate, scales, .. } = product;
    let name = match c_type {
        Type::Bf16 => "product_mxfp4_bf16",
        Type::F32 => "product_mxfp4_f32",
        Type::E4m3 | Type::E5m2 | Type::Mxfp8 | Type::E2m1 => {
            unreachable!("results are activations or gradients")
        }
    };
    let [a_scales, b_scales] = scales.expect("MXFP4 operands have scales");
    let grid = [n.div_ceil(FP4_TILE), m.div_ceil(FP4_TILE), 1];
    launch!(cuda.gpu, name, grid, FP4_THREADS, FP4_SHARED;
        c, a.address, a_scales, b.address, b_scales, m as u32, n as u32, k as u32, c_stride as u32,
        alpha, u32::from(accumulate));
}
