//! Operands in int8 by kernels of their own (`int8.cu`), which read a source once: rows with a
//! scale each, whose amaxes are found where they are quantized, and tensors whose amax is known. As
//! bf16 numbers, or as bytes for integer tensor cores, whose results are integers.

use super::Launch;
use super::fp8::TILE;

/// Numbers of a thread; lengths of rows and both sizes of tensors are multiples of it.
pub(super) const EACH: usize = 16;

/// Of a warp.
const OF_WARP: usize = 32 * EACH;

/// Threads of a block that makes a tensor, or rows that are no longer than they take.
const THREADS: usize = 256;

/// Longest rows, of which a thread block takes one; sums of as many products fit 32 bits.
pub(crate) const LONGEST: usize = 1024 * EACH;
const _: () = assert!(LONGEST < i32::MAX as usize / (127 * 127));

/// Results of a piece, and the rows of which a piece has a multiple.
///
/// NOTE: a piece fills a GPU twice with the largest tiles of cuBLASLt (128 by 256), and its 32 MiB
/// are meant to stay in the L2 cache of an H100, of 50, until they are scaled.
const PIECE: usize = 8 << 20;
const PIECE_ROWS: usize = 128;

/// Rows that are multiplied for so many. NOTE: not all of cuBLASLt's integer kernels take few rows,
/// so there are whole 32; nobody reads what is behind the last.
pub(super) fn padded(rows: usize) -> usize {
    rows.next_multiple_of(32)
}

/// The most rows of a product (rows, columns) that are multiplied and then scaled at once: not
/// fewer for more rows, since a plan is for as many as there ever are.
pub(super) fn most_rows_at_once(rows: usize, columns: usize) -> usize {
    rows.min((PIECE / columns / PIECE_ROWS).max(1) * PIECE_ROWS)
}

/// How many are, so that pieces are alike.
pub(super) fn rows_at_once(rows: usize, columns: usize) -> usize {
    let pieces = rows.div_ceil(most_rows_at_once(rows, columns));
    rows.div_ceil(pieces).next_multiple_of(PIECE_ROWS).min(rows)
}

/// How an operand is made here, if it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Rows along the reduction.
    Rows,
    /// A tensor, in the order of its source.
    Tensor,
    /// A tensor that is stored transposed, along the reduction.
    Turned,
}

impl Form {
    /// The name of its kernel, which makes `bytes` or bf16 of such numbers.
    pub(super) fn kernel(self, number: &str, bytes: bool) -> String {
        let integer = if bytes { "u8" } else { "bf16" };
        match self {
            Self::Rows => format!("round_int8_rows<{number},{integer}>"),
            Self::Tensor => format!("round_int8_tensor<{number},{integer}>"),
            Self::Turned => format!("turn_int8<{number}>"),
        }
    }

    /// Of so many vectors of this length.
    pub(super) fn launch(self, vectors: usize, length: usize) -> Launch {
        let (blocks, block) = match self {
            Self::Turned => {
                let grid = [vectors.div_ceil(TILE), length.div_ceil(TILE), 1];
                return Launch { grid, block: THREADS, shared: 0 };
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces cover all rows, and none is larger than what is planned for at least as many.
    #[test]
    fn pieces_fit_the_plan_of_more_rows() {
        for columns in [16, 1024, 3072, 4096, 16384] {
            let all = [1, 77, 128, 2048, 2049, 5000, 16384, 100_000];
            for (i, rows) in all.into_iter().enumerate() {
                let at_once = rows_at_once(rows, columns);
                assert!((1..=rows).contains(&at_once), "{rows} {columns}");
                assert!(at_once == rows || at_once.is_multiple_of(PIECE_ROWS));
                for more in &all[i..] {
                    assert!(
                        at_once <= most_rows_at_once(*more, columns),
                        "{rows} {more} {columns}"
                    );
                }
                assert!(at_once * columns <= PIECE.max(PIECE_ROWS * columns));
            }
        }
        assert_eq!([1024, 3072, 4096].map(|n| rows_at_once(16384, n)), [8192, 2432, 2048]);
    }
}
