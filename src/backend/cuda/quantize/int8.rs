//! Operands in int8 by kernels of their own (`int8.cu`), which read a source once: rows with a
//! scale each, whose amaxes are found where they are quantized, and tensors whose amax is known.

use super::Launch;
use super::values::Quantization;
use crate::formats::{Block, Element};

/// Numbers of a thread; sizes are multiples of it.
const EACH: usize = 16;

/// Of a warp.
const OF_WARP: usize = 32 * EACH;

/// Threads of a block that makes a tensor, or rows that are no longer than they take.
const THREADS: usize = 256;

/// Longest rows, of which a thread block takes one.
const LONGEST: usize = 1024 * EACH;

/// How an operand is made here, if it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Rows along the reduction.
    Rows,
    /// A tensor, in the order of its source.
    Tensor,
}

impl Form {
    /// Of numbers in bf16, without what the kernels of all formats note besides.
    pub(super) fn of(made: &Quantization) -> Option<Self> {
        let (matrix, to) = (&made.matrix, &made.to);
        let fits = [matrix.vectors, matrix.length].iter().all(|n| n.is_multiple_of(EACH));
        let noted = [to.block_scales, to.sums, to.bounds].iter().any(|address| *address != 0);
        let others = to.wide || to.dequantized || noted || made.transform.is_some();
        let format = made.operand.format();
        if format.element() != Element::Int8 || !fits || others {
            return None;
        }
        match format.block() {
            Block::Vector => (!matrix.transposed && matrix.length <= LONGEST).then_some(Self::Rows),
            _ => Some(Self::Tensor),
        }
    }

    /// The name of its kernel.
    pub(super) fn kernel(self, number: &str) -> String {
        match self {
            Self::Rows => format!("round_int8_rows<{number}>"),
            Self::Tensor => format!("round_int8_tensor<{number}>"),
        }
    }

    /// Of so many vectors of this length.
    pub(super) fn launch(self, vectors: usize, length: usize) -> Launch {
        let (blocks, block) = match self {
            Self::Rows => {
                let warps = length.div_ceil(OF_WARP);
                let each = (THREADS / 32 / warps).max(1);
                (vectors.div_ceil(each), 32 * warps * each)
            }
            Self::Tensor => ((vectors * length).div_ceil(EACH * THREADS), THREADS),
        };
        Launch { grid: [blocks, 1, 1], block, shared: 0 }
    }
}
