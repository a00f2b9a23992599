//! The carrier of a product: which numbers and tensor cores multiply it, chosen by formats, chip
//! and sizes.
//!
//! FP8, exactly (Ada, Hopper): an E2M1 element times a power of two is an FP8 number as long as the
//! block's scale lies within the format's range below the largest of its tensor: 28 binades in
//! E5M2, which dy gets, whose blocks spread most, and 14 in E4M3 for x and W, in the forward pass
//! too, because no product takes E5M2 twice. One power of two a tensor goes to cuBLASLt, whose
//! kernels for that are its fastest. A block further down gets a clamped scale, the lowest that
//! fits (valid MXFP4, unbiased still), and is counted in a step's statistics. Operands are exact;
//! the tensor cores' sums are as long as what they add at once has much the same size, and off by
//! up to 8e-6 where outliers make it not.
//!
//! bf16: the same values on chips without FP8, and at sizes that 16 does not divide.
//!
//! int8, as bytes by integer tensor cores: sums are exact, and what scales rows comes behind the
//! product. NOTE: bf16 numbers are slower at every length of the reduction: results take 4 bytes
//! and another pass either way, and bf16 operands twice the bytes and up to twice the time. Chips
//! of 10.3 have few units for integers.
//!
//! Blackwell, where every block keeps its scale and nobody needs an amax: on 10.x and 11.0 operands
//! are MXFP8, E4M3 numbers with the definition's scales in cuBLASLt's tiles of 128 by 4; on 12.0
//! and 12.1 they are the definition's own bytes, which `product_sm120.cu` multiplies at the rate of
//! FP4. The FP8 forward pass is Hopper's, with one scale a tensor. NOTE: none of this has run on a
//! Blackwell chip yet; CI compiles it for sm_100a and sm_120a.

use crate::backend::cuda::Cuda;
use crate::backend::cuda::device::gemm::{Product, Type};
use crate::backend::cuda::device::launch;
use crate::backend::{LinearShape, Numbers};
use crate::formats::{BLOCK, Element, Format};

/// How operands are held and multiplied. All but the last hold MXFP4 values exactly, the first two
/// also those of FP8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carrier {
    /// As bf16 numbers, everywhere.
    Bf16,
    /// As FP8 numbers with one power of two a tensor: dy in E5M2, whose 28 binades blocks need
    /// most, the other in E4M3, because no product takes E5M2 twice. Scales of blocks below that
    /// range are clamped.
    Fp8,
    /// As MXFP8 by cuBLASLt: E4M3 elements, and every block's own scale.
    Mxfp8,
    /// As they are, by `product_sm120.cu`.
    Fp4,
    /// int8 as it is, by cuBLASLt.
    Int8,
}

impl Carrier {
    /// The best one of a chip, for E4M3 of the forward pass, MXFP4 of the backward pass, or int8.
    pub(crate) fn best(format: Format, capability: (i32, i32)) -> Self {
        match capability {
            (10, 3) if format.element() == Element::Int8 => Self::Bf16,
            _ if format.element() == Element::Int8 => Self::Int8,
            capability if capability < (8, 9) => Self::Bf16,
            _ if format == Format::E4M3 => Self::Fp8,
            // NOTE: 10.x and 11.0 have FP4 products too, but of another kind (`tcgen05`).
            (12, 0 | 1) => Self::Fp4,
            (10..=12, _) => Self::Mxfp8,
            _ => Self::Fp8,
        }
    }

    /// That of a layer of these sizes: the best one, if it takes them. cuBLASLt wants operands of
    /// bytes in rows of whole 16; that their length is a multiple of 32, as MXFP8 needs, padding to
    /// whole blocks sees to. No reduction of int8 is over the layer's rows.
    pub(crate) fn of(format: Format, capability: (i32, i32), shape: LinearShape) -> Self {
        let LinearShape { rows, inputs, outputs } = shape;
        let best = Self::best(format, capability);
        let rows = if best == Self::Int8 { 0 } else { rows };
        let fits = [rows, inputs, outputs].iter().all(|n| n.is_multiple_of(16));
        if fits || best == Self::Fp4 { best } else { Self::Bf16 }
    }

    /// Formats of dy, or of x in the forward pass, and of the other operand.
    pub(crate) fn types(self, format: Format) -> [Type; 2] {
        match self {
            Self::Bf16 => [Type::Bf16; 2],
            Self::Fp8 if format == Format::E4M3 => [Type::E4m3; 2],
            Self::Fp8 => [Type::E5m2, Type::E4m3],
            Self::Mxfp8 => [Type::Mxfp8; 2],
            Self::Fp4 => [Type::E2m1; 2],
            Self::Int8 => [Type::Int8; 2],
        }
    }

    /// What it multiplies in.
    pub(crate) fn numbers(self) -> Numbers {
        match self {
            Self::Bf16 => Numbers::Bf16,
            Self::Fp8 => Numbers::Fp8,
            Self::Mxfp8 => Numbers::Mxfp8,
            Self::Fp4 => Numbers::Fp4,
            Self::Int8 => Numbers::Int8,
        }
    }

    /// Whether every block has a scale.
    pub(crate) fn has_block_scales(self) -> bool {
        matches!(self, Self::Mxfp8 | Self::Fp4)
    }

    /// Bytes of the scales of an operand (vectors, depth) that has one for every block.
    pub(crate) fn scale_bytes(self, vectors: usize, depth: usize) -> usize {
        let blocks = depth / BLOCK;
        match self {
            Self::Bf16 | Self::Fp8 | Self::Int8 => 0,
            Self::Mxfp8 => {
                vectors.next_multiple_of(TILE_VECTORS) * blocks.next_multiple_of(TILE_BLOCKS)
            }
            Self::Fp4 => vectors * blocks,
        }
    }
}

/// Vectors of a tile of MXFP8's scales.
pub(crate) const TILE_VECTORS: usize = 128;

/// Blocks of each of them.
const TILE_BLOCKS: usize = 4;

/// Where the scale of a vector's block lies among those of MXFP8, of `blocks` a vector: in tiles of
/// 128 vectors and 4 blocks, which follow each other along the vectors. The twin of `tiled` in
/// `quantize_blocks.cu`.
/// ref: cuBLAS documentation, "1D Block Scaling Factors Layout".
#[cfg(test)]
pub(crate) fn tiled(vector: usize, block: usize, blocks: usize) -> usize {
    let tile = vector / TILE_VECTORS * blocks.div_ceil(TILE_BLOCKS) + block / TILE_BLOCKS;
    let (outer, inner) = (vector % TILE_VECTORS, block % TILE_BLOCKS);
    tile * TILE_VECTORS * TILE_BLOCKS + outer % 32 * 16 + outer / 32 * 4 + inner
}

/// Rows and columns of C of a thread block of `product_mxfp4`, its threads, and its stages of codes
/// and scales.
const FP4_TILE: usize = 128;
const FP4_THREADS: usize = 256;
const FP4_SHARED: usize = 4 * 2 * FP4_TILE * (64 + 4);

/// `Product` of `product_sm120.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Fp4Product {
    pub(crate) c: u64,
    pub(crate) a: u64,
    pub(crate) a_scales: u64,
    pub(crate) b: u64,
    pub(crate) b_scales: u64,
    pub(crate) m: u32,
    pub(crate) n: u32,
    pub(crate) k: u32,
    pub(crate) stride: u32,
    pub(crate) alpha: f32,
    pub(crate) accumulate: u32,
}

/// A product of operands in [`Type::E2m1`], dense, the reduction along their rows.
pub(crate) fn multiply_fp4(cuda: &Cuda, product: &Product) {
    let &Product { m, n, k, a, b, c, c_stride, c_type, alpha, accumulate, scales, .. } = product;
    let name = match c_type {
        Type::Bf16 => "product_mxfp4<bf16>",
        Type::F32 => "product_mxfp4<float>",
        _ => unreachable!("results are activations or gradients"),
    };
    let [a_scales, b_scales] = scales.expect("MXFP4 operands have scales");
    let arguments = Fp4Product {
        c,
        a: a.address,
        a_scales,
        b: b.address,
        b_scales,
        m: m as u32,
        n: n as u32,
        k: k as u32,
        stride: c_stride as u32,
        alpha,
        accumulate: u32::from(accumulate),
    };
    let grid = [n.div_ceil(FP4_TILE), m.div_ceil(FP4_TILE), 1];
    launch!(cuda.gpu, name, grid, FP4_THREADS, FP4_SHARED; arguments);
}
