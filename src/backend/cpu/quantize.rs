//! Operands of formats that no packing makes at once: they are quantized to f32 numbers, which then
//! are packed as bf16 or f32 and multiplied exactly.
//!
//! The arithmetic is the definition's own ([`formats::quantize_vectors`]), shared out among threads.

use std::sync::atomic::{AtomicU32, Ordering};

use super::Cpu;
use super::arena::Buffer;
use super::disjoint::DisjointSlice;
use super::gemm::{Conversion, Matrix};
use crate::formats::{
    self, Bits, Element, Format, Gemm, MAX_GROUP, Operand, OperandSource, Outer, Rounding, Scale,
    Slope, VECTORS_AT_ONCE, Vectors, rotate,
};

/// Memory for the numbers of an operand.
pub(super) struct ValueMemory {
    /// (vectors, depth)
    pub(super) values: Buffer<f32>,
    /// (vectors)
    pub(super) scales: Buffer<f32>,
    /// Of each job: sums for the slope.
    pub(super) sums: Buffer<f64>,
}

/// How much of it.
#[derive(Clone, Copy, Default)]
pub(super) struct ValueSize {
    pub(super) values: usize,
    pub(super) scales: usize,
    pub(super) sums: usize,
}

impl ValueSize {
    /// Makes room for `vectors` of length `depth`, which is padded to whole groups.
    pub(super) fn add(&mut self, [vectors, depth]: [usize; 2], group: usize) {
        let values = vectors * depth.next_multiple_of(group);
        *self = self.max(Self { values, scales: vectors, sums: 0 });
    }

    /// Makes room for the slope of `vectors`.
    pub(super) fn add_slope(&mut self, vectors: usize) {
        let sums = 2 * vectors.div_ceil(VECTORS_AT_ONCE);
        *self = self.max(Self { sums, ..Self::default() });
    }

    /// Room for either.
    pub(super) fn max(self, other: Self) -> Self {
        Self {
            values: self.values.max(other.values),
            scales: self.scales.max(other.scales),
            sums: self.sums.max(other.sums),
        }
    }
}

/// An operand in numbers: what it is made from and how.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) matrix: Matrix<'a>,
    pub(super) operand: &'a Operand,
    /// Of the transform; empty for none.
    pub(super) signs: &'a [f32],
    pub(super) bits: Bits,
    /// The slow means of a matrix that is not transposed, where it is rounded by them; else empty.
    pub(super) means: &'a [f32],
}

/// An operand in numbers.
pub(super) struct Values<'a> {
    pub(super) matrix: Matrix<'a>,
    /// What all of them are multiplied by besides.
    pub(super) scale: f32,
    /// And each vector; empty where there are no such scales.
    pub(super) vector_scales: &'a [f32],
    /// What a product is multiplied by, so that the slope of their rounding is 1.
    pub(super) correction: f32,
}

/// Whether a GEMM is packed from its operands in one pass: in f32, bf16, FP8 E4M3 and MXFP4 of OCP,
/// of what the forward pass made of operand B if that was in E4M3, too.
pub(super) fn packs_at_once(gemm: &Gemm, forward: &Operand) -> bool {
    let plain = [Format::F32, Format::BF16, Format::E4M3, Format::MXFP4];
    let from_tensor = gemm.b().source() == OperandSource::HighPrecision;
    let by_mean = gemm.b().rounding() == Rounding::ByMean;
    !by_mean
        && !gemm.is_corrected()
        && plain.into_iter().any(|format| gemm.is_in(format))
        && (from_tensor || forward.format() == Format::E4M3)
}

/// What the numbers of a GEMM's operands are packed as: bf16, but for scales that it does not hold.
pub(super) fn conversion(gemm: &Gemm) -> Conversion<'static> {
    match (gemm.element(), gemm.a().format().scale()) {
        (Element::F32, _) | (_, Scale::TwoLevels(_, Outer::Elements)) => Conversion::F32,
        // Sums of numbers and outliers.
        _ if gemm.a().outliers().is_some() => Conversion::F32,
        _ => Conversion::Bf16,
    }
}

impl ValueMemory {
    /// Quantizes an operand.
    pub(super) fn quantize(&mut self, cpu: &Cpu, source: Source<'_>) -> Values<'_> {
        let Source { matrix, operand, signs, ref bits, means } = source;
        let format = operand.format();
        let Matrix { rows, depth: length, .. } = matrix;
        let depth = length.next_multiple_of(signs.len().max(format.block().depth()));
        let values = &mut self.values[..rows * depth];
        let scales = if formats::has_vector_scales(format) { rows } else { 0 };
        let scales = &mut self.scales[..scales];
        let jobs = rows.div_ceil(VECTORS_AT_ONCE);
        let amax = AtomicU32::new(0);
        let shared = DisjointSlice::new(values);
        let part = |job: usize| {
            let first = job * VECTORS_AT_ONCE;
            let count = VECTORS_AT_ONCE.min(rows - first);
            // SAFETY: jobs own disjoint vectors.
            (first, unsafe { shared.part(first * depth, count * depth) })
        };
        cpu.parallel(jobs, |job| {
            let (first, values) = part(job);
            gather(&matrix, first, values, depth);
            if !signs.is_empty() {
                values.chunks_exact_mut(signs.len()).for_each(|group| rotate(group, signs));
            }
            if formats::needs_amax(format) {
                amax.fetch_max(formats::amax_of(values).to_bits(), Ordering::Relaxed);
            }
        });
        let tensor = formats::tensor_scale(operand, f32::from_bits(amax.into_inner()));
        let of_vectors = DisjointSlice::new(scales);
        let sums = if operand.is_corrected() { 2 * jobs } else { 0 };
        let sums = &mut self.sums[..sums];
        let of_jobs = DisjointSlice::new(sums);
        cpu.parallel(jobs, |job| {
            let (first, values) = part(job);
            let count = if scales.is_empty() { 0 } else { values.len() / depth };
            // SAFETY: as above.
            let scales = unsafe { of_vectors.part(first.min(scales.len()), count) };
            let of_these = first * length..first * length + values.len() / depth * length;
            let means = means.get(of_these).unwrap_or_default();
            let vectors = Vectors { values, scales, depth, first, means, block_scales: &mut [] };
            formats::quantize_vectors(vectors, operand, tensor, bits);
            if operand.is_corrected() {
                let (first, values) = part(job);
                let slope = slope(&matrix, first, values, depth, signs);
                // SAFETY: every job has two sums of its own.
                unsafe { of_jobs.part(2 * job, 2) }.copy_from_slice(&slope);
            }
        });
        let mut slope = Slope::default();
        for [products, squares] in sums.as_chunks().0 {
            slope.add_sums(Slope { products: *products, squares: *squares });
        }
        Values {
            matrix: Matrix::rows_by_depth(values, rows, depth),
            scale: tensor.decode,
            vector_scales: scales,
            correction: slope.correction(tensor.decode, operand.range()),
        }
    }

    /// A tensor (rows, depth) as the forward pass dequantized it, dense; what is rotated with its
    /// padding.
    pub(super) fn dequantized(&mut self, cpu: &Cpu, source: Source<'_>) -> &[f32] {
        let Source { matrix: Matrix { rows, depth: length, .. }, .. } = source;
        let Values { matrix: Matrix { depth, .. }, scale, .. } = self.quantize(cpu, source);
        let length = if source.signs.is_empty() { length } else { depth };
        let has_scales = formats::has_vector_scales(source.operand.format());
        let (values, scales) = (DisjointSlice::new(&mut self.values), &self.scales);
        cpu.parallel(rows, |row| {
            let scale = if has_scales { scale * scales[row] } else { scale };
            // SAFETY: every job has a vector of its own.
            unsafe { values.part(row * depth, length) }.iter_mut().for_each(|v| *v *= scale);
        });
        // Padding lies behind every vector; what is asked for is dense.
        if length < depth {
            (1..rows).for_each(|row| {
                self.values.copy_within(row * depth..row * depth + length, row * length);
            });
        }
        &self.values[..rows * length]
    }
}

/// Vectors `first`.. of a matrix, zeros behind their end.
fn gather(from: &Matrix<'_>, first: usize, values: &mut [f32], depth: usize) {
    let count = values.len() / depth;
    if !from.transposed {
        for (i, to) in values.chunks_exact_mut(depth).enumerate() {
            let row = &from.data[(first + i) * from.stride..][..from.depth];
            to[..from.depth].copy_from_slice(row);
            to[from.depth..].fill(0.0);
        }
        return;
    }
    for k in 0..from.depth {
        let row = &from.data[k * from.stride + first..][..count];
        for (i, v) in row.iter().enumerate() {
            values[i * depth + k] = *v;
        }
    }
    for to in values.chunks_exact_mut(depth) {
        to[from.depth..].fill(0.0);
    }
}

/// Sums of products and of squares of vectors `first`.., rotated once more, and what they became.
fn slope(from: &Matrix<'_>, first: usize, values: &[f32], depth: usize, signs: &[f32]) -> [f64; 2] {
    let mut slope = Slope::default();
    let mut room = [0.0; MAX_GROUP];
    let x = &mut room[..signs.len()];
    for (row, values) in values.chunks_exact(depth).enumerate() {
        for (group, values) in values.chunks_exact(signs.len()).enumerate() {
            for (i, x) in x.iter_mut().enumerate() {
                let (vector, k) = (first + row, group * signs.len() + i);
                let at = [vector * from.stride + k, k * from.stride + vector];
                *x = if k < from.depth { from.data[at[usize::from(from.transposed)]] } else { 0.0 };
            }
            rotate(x, signs);
            slope.add(x, values);
        }
    }
    [slope.products, slope.squares]
}

/// c (rows, columns) times scales of its rows and of its columns, plus a bias.
pub(super) fn scale_result(
    cpu: &Cpu,
    c: &mut [f32],
    columns: usize,
    [of_rows, of_columns]: [&[f32]; 2],
    bias: Option<&[f32]>,
) {
    let (rows, c) = (c.len() / columns, DisjointSlice::new(c));
    cpu.parallel(rows, |row| {
        // SAFETY: every job has a row of its own.
        let c = unsafe { c.part(row * columns, columns) };
        let of_row = of_rows.get(row).copied().unwrap_or(1.0);
        for (j, c) in c.iter_mut().enumerate() {
            let scale = of_row * of_columns.get(j).copied().unwrap_or(1.0);
            *c = *c * scale + bias.map_or(0.0, |bias| bias[j]);
        }
    });
}
