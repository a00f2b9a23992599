//! A whole GEMM operand in MXFP4: the reference that kernels are compared with, and the packed form
//! for storage and tests.

use super::{
    BLOCK, Draw, Operand, decode_e2m1, decode_e8m0, pack_e2m1, quantize_block, rotate, unpack_e2m1,
};

/// An operand as it lies in memory: `rows` vectors along the reduction dimension `depth`.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The values, dense.
    pub data: &'a [f32],
    /// Vectors.
    pub rows: usize,
    /// Length of each along the reduction dimension.
    pub depth: usize,
    /// Whether the memory holds (depth, rows) instead of (rows, depth).
    pub transposed: bool,
}

impl Source<'_> {
    /// Element `k` of vector `row`.
    pub fn at(&self, row: usize, k: usize) -> f32 {
        self.data[if self.transposed { k * self.rows + row } else { row * self.depth + k }]
    }
}

/// A matrix of MXFP4 blocks along the reduction dimension: `rows` x `depth`, row-major, the depth
/// padded to whole blocks (or whole groups where there is a transform).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mxfp4Matrix {
    /// Vectors.
    pub rows: usize,
    /// Padded length, a multiple of 32.
    pub depth: usize,
    /// Two codes a byte: (rows, depth / 2).
    pub codes: Vec<u8>,
    /// One scale byte a block: (rows, depth / 32).
    pub scales: Vec<u8>,
}

impl Mxfp4Matrix {
    /// Transforms (where `signs` is not empty; its length is the group) and quantizes, with the
    /// rounding and the range of `operand`, of which a [`super::Rounding`] is an abbreviation.
    ///
    /// `draw` gives the bits of unbiased rounding, keyed by the element's place in the source as it
    /// is stored; nearest rounding does not read it.
    pub fn quantize(
        source: Source<'_>,
        signs: &[f32],
        operand: impl Into<Operand>,
        draw: &Draw,
    ) -> Self {
        let operand = operand.into();
        let group = signs.len().max(BLOCK);
        let depth = source.depth.next_multiple_of(group);
        let mut codes = Vec::with_capacity(source.rows * depth / 2);
        let mut scales = Vec::with_capacity(source.rows * depth / BLOCK);
        for row in 0..source.rows {
            let mut v: Vec<f32> = (0..source.depth).map(|k| source.at(row, k)).collect();
            v.resize(depth, 0.0);
            if !signs.is_empty() {
                v.chunks_exact_mut(group).for_each(|x| rotate(x, signs));
            }
            for (block, x) in v.as_chunks::<BLOCK>().0.iter().enumerate() {
                let bits = |i| {
                    let (row, k) = (row as u32, (block * BLOCK + i) as u32);
                    if source.transposed { draw.element(k, row) } else { draw.element(row, k) }
                };
                let (scale, block_codes) =
                    quantize_block(x, operand.rounding(), operand.range(), bits);
                scales.push(scale);
                codes.extend(pack_e2m1(&block_codes));
            }
        }
        Self { rows: source.rows, depth, codes, scales }
    }

    /// The code of element `k` of vector `row`.
    pub fn code(&self, row: usize, k: usize) -> u8 {
        unpack_e2m1(&self.codes[row * self.depth / 2..], k)
    }

    /// The scale byte of block `block` of vector `row`.
    pub fn scale(&self, row: usize, block: usize) -> u8 {
        self.scales[row * (self.depth / BLOCK) + block]
    }

    /// All values, (rows, depth).
    pub fn dequantize(&self) -> Vec<f32> {
        (0..self.rows * self.depth)
            .map(|i| {
                let (row, k) = (i / self.depth, i % self.depth);
                decode_e2m1(self.code(row, k)) * decode_e8m0(self.scale(row, k / BLOCK))
            })
            .collect()
    }

    /// The product `self` `other`^T, (self.rows, other.rows): exact integers in each block, their
    /// sum over the blocks in f32, in order. The definition of an MXFP4 GEMM before its output
    /// factor.
    pub fn product(&self, other: &Self) -> Vec<f32> {
        assert_eq!(self.depth, other.depth, "operands share the reduction dimension");
        let mut out = Vec::with_capacity(self.rows * other.rows);
        for i in 0..self.rows {
            for j in 0..other.rows {
                let mut sum = 0.0f32;
                for block in 0..self.depth / BLOCK {
                    let dot: i32 = (block * BLOCK..(block + 1) * BLOCK)
                        .map(|k| doubled(self.code(i, k)) * doubled(other.code(j, k)))
                        .sum();
                    // A doubled element on each side: a quarter.
                    let scale = 0.5 * decode_e8m0(self.scale(i, block));
                    sum += dot as f32 * (scale * (0.5 * decode_e8m0(other.scale(j, block))));
                }
                out.push(sum);
            }
        }
        out
    }
}

/// Twice the value of a code: a whole number from -12 to 12.
fn doubled(code: u8) -> i32 {
    (2.0 * decode_e2m1(code)) as i32
}
