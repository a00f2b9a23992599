//! A GEMM operand of any format: what its numbers become, and the scales that multiply the sums of a
//! product of them. The definition that kernels are compared with, bit for bit.
//!
//! An operand is gathered along the reduction dimension and rotated, then quantized where it lies,
//! vector by vector ([`quantize_vectors`]), so that a backend can share the vectors out.

use super::Slope;
use super::ema::round_by_mean;
use super::nvfp4::{encoding, nvfp4_codes, nvfp4_scale, nvfp4_scale_within};
use super::quantize::{nearest, quantize_element};
use super::{
    BLOCK, Block, Draw, E2M1_MAX, Element, Format, Nvfp4Tensor, Operand, Rounding, Scale, Source,
    amax_of, clamped, cut_mantissa, decode_e2m1, decode_e8m0, e4m3_scale, e5m2_scale, int8_scale,
    nvfp4_outer, outlier, quantize_nvfp4, quantize_nvfp4_eden, quantize_nvfp4_within, rotate,
    round_mantissa, round_to_e4m3, round_to_e5m2, round_to_int8,
};
use super::{NVFP4_BLOCK, NVFP4_OUTER, Outer};

/// Vectors that are quantized at once: a multiple of all that share anything, and of the eight whose
/// random bits one call of the generator gives.
pub const VECTORS_AT_ONCE: usize = 32;

/// An operand as a product multiplies it: `rows` vectors of length `depth`, which is padded.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// Vectors.
    pub rows: usize,
    /// Padded length.
    pub depth: usize,
    /// Elements times the scales of their blocks, (rows, depth).
    pub values: Vec<f32>,
    /// What all of them are multiplied by besides.
    pub scale: f32,
    /// And each vector, (rows); empty where there are no such scales.
    pub vector_scales: Vec<f32>,
    /// What elements of E2M1 are multiplied by to give values back, (rows, blocks); empty where
    /// neither blocks nor squares have scales.
    pub block_scales: Vec<f32>,
    /// What a product of them is multiplied by, so that their slope is 1; 1 where that is not asked
    /// for.
    pub correction: f32,
}

/// The random bits of an operand.
#[derive(Clone, Copy, Debug)]
pub struct Bits {
    /// Of elements, keyed by their row and column in the source as it is stored.
    pub elements: Draw,
    /// Of scales, keyed by vector and block.
    pub scales: Draw,
    /// Whether the source is stored (depth, rows).
    pub transposed: bool,
}

impl Quantized {
    /// Gathers, rotates (where `signs` is not empty; its length is the group) and quantizes.
    pub fn new(source: Source<'_>, operand: &Operand, signs: &[f32], bits: &Bits) -> Self {
        Self::of(source, &[], operand, signs, bits)
    }

    /// Quantizes weights (rows, depth) that are rounded by their slow `means`, which lie as they do.
    pub fn by_means(source: Source<'_>, means: &[f32], operand: &Operand, bits: &Bits) -> Self {
        assert!(!source.transposed && means.len() == source.data.len(), "means lie as weights do");
        Self::of(source, means, operand, &[], bits)
    }

    fn of(
        source: Source<'_>,
        means: &[f32],
        operand: &Operand,
        signs: &[f32],
        bits: &Bits,
    ) -> Self {
        let Source { rows, depth: length, .. } = source;
        let depth = length.next_multiple_of(signs.len().max(operand.format().block().depth()));
        let gather = |source: Source<'_>| {
            let mut values = vec![0.0; rows * depth];
            for (row, to) in values.chunks_exact_mut(depth).enumerate() {
                to[..length].iter_mut().enumerate().for_each(|(k, to)| *to = source.at(row, k));
            }
            values
        };
        let mut values = gather(source);
        if !signs.is_empty() {
            values.chunks_exact_mut(signs.len()).for_each(|group| rotate(group, signs));
        }
        let tensor = tensor_scale(operand, amax_of(&values));
        let rotated = if operand.is_corrected() { values.clone() } else { Vec::new() };
        let mut vector_scales =
            vec![0.0; if has_vector_scales(operand.format()) { rows } else { 0 }];
        let blocks = match operand.format().block() {
            Block::Elements(n) | Block::Square(n) => depth / n,
            Block::Vector | Block::Tensor => 0,
        };
        let mut block_scales = vec![0.0; rows * blocks];
        for first in (0..rows).step_by(VECTORS_AT_ONCE) {
            let count = VECTORS_AT_ONCE.min(rows - first);
            let range = first * depth..(first + count) * depth;
            let part = Vectors {
                values: &mut values[range.clone()],
                scales: vector_scales.get_mut(first..first + count).unwrap_or_default(),
                depth,
                first,
                block_scales: &mut block_scales[first * blocks..(first + count) * blocks],
                means: means.get(first * length..(first + count) * length).unwrap_or_default(),
            };
            quantize_vectors(part, operand, tensor, bits);
        }
        let scale = tensor.decode;
        let mut slope = Slope::default();
        slope.add(&rotated, &values);
        let correction = slope.correction(scale, operand.range());
        Self { rows, depth, values, scale, vector_scales, block_scales, correction }
    }

    /// The values that the numbers stand for as f32, (rows, `length`), without padding: what a
    /// backward pass sees of an operand of the forward pass. Of what is rotated `length` is the
    /// padded one.
    pub fn dequantized(&self, length: usize) -> Vec<f32> {
        let of_vector = |row: usize| match self.vector_scales.get(row) {
            Some(scale) => self.scale * scale,
            None => self.scale,
        };
        let rows = self.values.chunks_exact(self.depth).enumerate();
        rows.flat_map(|(row, v)| v[..length].iter().map(move |v| v * of_vector(row))).collect()
    }

    /// The values that the numbers stand for, (rows, depth).
    pub fn dequantize(&self) -> Vec<f64> {
        let of_vector = |row: usize| self.vector_scales.get(row).map_or(1.0, |s| f64::from(*s));
        let values = self.values.iter().enumerate();
        let scale = f64::from(self.scale);
        values.map(|(i, v)| f64::from(*v) * scale * of_vector(i / self.depth)).collect()
    }
}

/// Whether products multiply their sums by a scale for every vector.
pub fn has_vector_scales(format: Format) -> bool {
    (format.block(), format.scale()) == (Block::Vector, Scale::Amax)
}

/// Whether the scales depend on the largest magnitude of the tensor.
pub fn needs_amax(format: Format) -> bool {
    match format.block() {
        Block::Tensor => !format.is_unscaled(),
        _ => matches!(format.scale(), Scale::TwoLevels(_, Outer::Tensor)),
    }
}

/// The scale of a tensor with this largest magnitude; 1 where there is none.
pub fn tensor_scale(operand: &Operand, amax: f32) -> Nvfp4Tensor {
    let format = operand.format();
    let inverse = |decode: f32| Nvfp4Tensor { encode: 1.0 / decode, decode };
    match (format.element(), format.block(), format.scale()) {
        (_, _, Scale::TwoLevels(_, Outer::Tensor)) if operand.rounding() == Rounding::Eden => {
            Nvfp4Tensor::eden(amax)
        }
        (_, _, Scale::TwoLevels(rule, Outer::Tensor)) => Nvfp4Tensor::new(amax, rule),
        (Element::E4m3, ..) => inverse(e4m3_scale(amax)),
        (Element::E5m2, ..) => inverse(e5m2_scale(amax)),
        // Integers are computed from the largest magnitude itself.
        (Element::Int8, Block::Tensor, _) => Nvfp4Tensor { encode: amax, decode: int8_scale(amax) },
        _ => Nvfp4Tensor { encode: 1.0, decode: 1.0 },
    }
}

/// Vectors of an operand, gathered and rotated: at most [`VECTORS_AT_ONCE`], the first of which has
/// a multiple of that for its number.
pub struct Vectors<'a> {
    /// (vectors, depth), replaced by what a product multiplies.
    pub values: &'a mut [f32],
    /// Gets the scales of vectors; empty where there are none.
    pub scales: &'a mut [f32],
    /// Padded length.
    pub depth: usize,
    /// The number of the first.
    pub first: usize,
    /// (vectors, length): the slow means that weights are rounded by; empty for other roundings.
    pub means: &'a [f32],
    /// (vectors, blocks): gets what elements of E2M1 are multiplied by to give values back, where
    /// blocks or squares have a scale; empty where nobody asks.
    pub block_scales: &'a mut [f32],
}

/// Quantizes vectors in place.
pub fn quantize_vectors(part: Vectors<'_>, operand: &Operand, tensor: Nvfp4Tensor, bits: &Bits) {
    let Vectors { values, scales, depth, first, means, block_scales } = part;
    let format = operand.format();
    let by_mean = operand.rounding() == Rounding::ByMean;
    assert_eq!(by_mean, !means.is_empty(), "means go with the rounding by them");
    match (format.element(), format.block()) {
        (Element::F32, _) => {}
        (Element::Bf16, _) => values.iter_mut().for_each(|v| *v = round_mantissa(*v, 7)),
        (Element::Mantissa(n, cut), _) => {
            let round = if cut { cut_mantissa } else { round_mantissa };
            values.iter_mut().for_each(|v| *v = round(*v, n.into()));
        }
        (Element::E4m3, _) => {
            values.iter_mut().for_each(|v| *v = round_to_e4m3(*v * tensor.encode));
        }
        (Element::E5m2, _) => {
            values.iter_mut().for_each(|v| *v = round_to_e5m2(*v * tensor.encode));
        }
        (Element::Int8, Block::Tensor) => {
            values.iter_mut().for_each(|v| *v = round_to_int8(*v, tensor.encode));
        }
        (Element::Int8, _) => {
            for (vector, scale) in values.chunks_exact_mut(depth).zip(scales) {
                let amax = amax_of(vector);
                vector.iter_mut().for_each(|v| *v = round_to_int8(*v, amax));
                *scale = int8_scale(amax);
            }
        }
        (Element::E2m1, Block::Vector | Block::Tensor) => {
            e2m1_vectors(values, depth, scales, operand);
        }
        (Element::E2m1, Block::Square(n)) => {
            squares(values, depth, n, operand, tensor, block_scales);
        }
        (Element::E2m1, Block::Elements(n)) => {
            let length = means.len() / (values.len() / depth);
            let means = Means { all: means, first, length };
            let rounded = BlockRounding { operand, tensor, bits, means };
            for (eight, values) in values.chunks_mut(8 * depth).enumerate() {
                let of_these = 8 * eight * (depth / n);
                let block_scales = block_scales.get_mut(of_these..).unwrap_or_default();
                rounded.eight_vectors(values, depth, n, first + 8 * eight, block_scales);
            }
        }
    }
}

/// E2M1 with a scale for every vector: f32, which products apply, or a power of two.
///
/// Outliers are clamped first, and what that took is added to the values: a product of both.
fn e2m1_vectors(values: &mut [f32], depth: usize, scales: &mut [f32], operand: &Operand) {
    let mut scales = scales.iter_mut();
    for vector in values.chunks_exact_mut(depth) {
        let whole = [f32::NEG_INFINITY, f32::INFINITY];
        let bounds = operand.outliers().map_or(whole, |kept| kept.bounds(vector));
        let amax = match operand.outliers() {
            Some(_) => bounds[0].abs().max(bounds[1].abs()),
            None => amax_of(vector),
        };
        let (unit, value) = match operand.format().scale() {
            Scale::Power(rule) => {
                let unit = decode_e8m0(rule.byte(&[amax]));
                (unit, unit)
            }
            _ => (if amax == 0.0 { 1.0 } else { amax / E2M1_MAX }, 1.0),
        };
        let unit = if amax.is_finite() { unit } else { f32::NAN };
        for v in vector.iter_mut() {
            let inside = clamped(*v, bounds);
            let magnitude = decode_e2m1(nearest((inside / unit).abs())) * value;
            let number = magnitude.copysign(inside);
            *v = match operand.outliers() {
                _ if unit.is_nan() => f32::NAN,
                Some(_) => number + outlier(*v, bounds),
                None => number,
            };
        }
        if let Some(scale) = scales.next() {
            *scale = unit;
        }
    }
}

/// Squares of n vectors and n elements that share a scale, rounded to nearest.
fn squares(
    values: &mut [f32],
    depth: usize,
    n: usize,
    operand: &Operand,
    tensor: Nvfp4Tensor,
    block_scales: &mut [f32],
) {
    let mut room = [0.0; VECTORS_AT_ONCE * VECTORS_AT_ONCE];
    for (number, band) in values.chunks_mut(n * depth).enumerate() {
        let rows = band.len() / depth;
        let square = &mut room[..band.len() / depth * n];
        for k in (0..depth).step_by(n) {
            for (to, row) in square.chunks_exact_mut(n).zip(band.chunks_exact(depth)) {
                to.copy_from_slice(&row[k..k + n]);
            }
            let unit = match operand.format().scale() {
                Scale::Power(rule) => {
                    let byte = rule.byte(square);
                    for row in band.chunks_exact_mut(depth) {
                        let block: &mut [f32] = &mut row[k..k + n];
                        power_block(block, byte, operand, None);
                    }
                    decode_e8m0(byte)
                }
                Scale::TwoLevels(rule, _) => {
                    let scale = nvfp4_scale(square, amax_of(square), tensor, rule);
                    for row in band.chunks_exact_mut(depth) {
                        let block: &mut [f32; NVFP4_BLOCK] =
                            (&mut row[k..k + n]).try_into().expect("16 elements");
                        let codes = nvfp4_codes(block, scale, tensor, None);
                        store(block, &codes, scale);
                    }
                    scale * tensor.decode
                }
                Scale::One | Scale::Amax => unreachable!("squares have scales of their own"),
            };
            for row in number * n..number * n + rows {
                if let Some(to) = block_scales.get_mut(row * (depth / n) + k / n) {
                    *to = unit;
                }
            }
        }
    }
}

/// How blocks along the reduction dimension are rounded.
struct BlockRounding<'a> {
    operand: &'a Operand,
    tensor: Nvfp4Tensor,
    bits: &'a Bits,
    means: Means<'a>,
}

/// The slow means of vectors from number `first` on, without padding.
struct Means<'a> {
    all: &'a [f32],
    first: usize,
    length: usize,
}

impl Means<'_> {
    /// Of elements k .. k + n of a vector; 0 for padding.
    fn of<const N: usize>(&self, vector: usize, k: usize) -> [f32; N] {
        let row = &self.all[(vector - self.first) * self.length..][..self.length];
        std::array::from_fn(|i| row.get(k + i).copied().unwrap_or(0.0))
    }
}

impl BlockRounding<'_> {
    /// Up to eight vectors from number `first` on, in blocks of n.
    fn eight_vectors(
        &self,
        values: &mut [f32],
        depth: usize,
        n: usize,
        first: usize,
        block_scales: &mut [f32],
    ) {
        let unbiased = self.operand.rounding() == Rounding::Unbiased;
        let mut drawn = [[0u16; 32]; 8];
        // The outer scales of the vectors, where blocks lie within such.
        let mut outer = [1.0; 8];
        for k in (0..depth).step_by(n) {
            if unbiased {
                self.bits.fill(&mut drawn, first, k, n);
            }
            for (i, vector) in values.chunks_exact_mut(depth).enumerate() {
                if k.is_multiple_of(NVFP4_OUTER)
                    && let Scale::TwoLevels(_, outer_rule @ (Outer::Elements | Outer::Powers)) =
                        self.operand.format().scale()
                {
                    let all = &vector[k..(k + NVFP4_OUTER).min(depth)];
                    outer[i] = nvfp4_outer(amax_of(all), outer_rule == Outer::Powers);
                }
                let bits = unbiased.then_some(&drawn[i]);
                let unit = self.block(&mut vector[k..k + n], outer[i], bits, (first + i, k / n));
                if let Some(to) = block_scales.get_mut(i * (depth / n) + k / n) {
                    *to = unit;
                }
            }
        }
    }

    /// Gives what elements are multiplied by to give values back.
    fn block(
        &self,
        block: &mut [f32],
        outer: f32,
        bits: Option<&[u16; 32]>,
        (vector, number): (usize, usize),
    ) -> f32 {
        let element = |i: usize| bits.map_or(0, |bits| bits[i]);
        let by_mean = self.operand.rounding() == Rounding::ByMean;
        match self.operand.format().scale() {
            Scale::Power(rule) if by_mean => {
                let byte = rule.byte(block);
                let factor = self.operand.range().factor() * decode_e8m0(254 - byte.min(254));
                let means = self.means.of::<BLOCK>(vector, number * block.len());
                store_by_mean(block, &means, |v| v * factor, decode_e8m0(byte));
                decode_e8m0(byte)
            }
            Scale::Power(rule) => {
                let byte = rule.byte(block);
                power_block(block, byte, self.operand, bits);
                decode_e8m0(byte)
            }
            Scale::TwoLevels(rule, kind) if by_mean => {
                let sixteen: &[f32; NVFP4_BLOCK] = (&*block).try_into().expect("16 elements");
                let means = self.means.of::<NVFP4_BLOCK>(vector, number * NVFP4_BLOCK);
                if kind == Outer::Tensor {
                    let scale = nvfp4_scale(sixteen, amax_of(sixteen), self.tensor, rule);
                    let encode = encoding(scale, self.tensor);
                    store_by_mean(block, &means, |v| v * encode, scale);
                    scale * self.tensor.decode
                } else {
                    let unit = nvfp4_scale_within(sixteen, outer) * outer;
                    store_by_mean(block, &means, |v| v / unit, unit);
                    unit
                }
            }
            Scale::TwoLevels(rule, kind) => {
                let sixteen: &mut [f32; NVFP4_BLOCK] = block.try_into().expect("16 elements");
                let bits = bits.map(|_| &element as &dyn Fn(usize) -> u16);
                let (scale, codes) = match (kind, self.operand.rounding()) {
                    (Outer::Tensor, Rounding::Eden) => {
                        let draw = self.bits.scales.element(vector as u32, number as u32);
                        quantize_nvfp4_eden(sixteen, self.tensor, draw)
                    }
                    (Outer::Tensor, _) => {
                        quantize_nvfp4(sixteen, amax_of(sixteen), self.tensor, rule, bits)
                    }
                    _ => {
                        let (scale, codes) = quantize_nvfp4_within(sixteen, outer, bits);
                        // Exact where the outer scale is a power of two.
                        (scale * outer, codes)
                    }
                };
                store(sixteen, &codes, scale);
                scale * self.tensor.decode
            }
            Scale::One | Scale::Amax => unreachable!("blocks have scales of their own"),
        }
    }
}

/// A block of MXFP4 with this scale byte.
fn power_block(block: &mut [f32], byte: u8, operand: &Operand, bits: Option<&[u16; 32]>) {
    let scale = decode_e8m0(byte);
    for (i, v) in block.iter_mut().enumerate() {
        let bits = || bits.map_or(0, |bits| bits[i]);
        let code = quantize_element(*v, byte, operand.rounding(), operand.range(), bits);
        *v = decode_e2m1(code) * scale;
    }
}

/// A block of weights with this scale, rounded by their means; `scaled` makes elements of both.
fn store_by_mean(block: &mut [f32], means: &[f32], scaled: impl Fn(f32) -> f32, scale: f32) {
    for (v, mean) in block.iter_mut().zip(means) {
        *v = decode_e2m1(round_by_mean(scaled(*v), scaled(*mean))) * scale;
    }
}

fn store(block: &mut [f32; NVFP4_BLOCK], codes: &[u8; NVFP4_BLOCK], scale: f32) {
    for (v, code) in block.iter_mut().zip(codes) {
        *v = decode_e2m1(*code) * scale;
    }
}

impl Bits {
    /// The bits of elements k .. k + n, a multiple of 8, of the eight vectors from `first` on, which
    /// is one, too.
    fn fill(&self, drawn: &mut [[u16; 32]; 8], first: usize, k: usize, n: usize) {
        let half = |words: [u32; 4], i: usize| (words[i / 2] >> (16 * (i % 2))) as u16;
        if self.transposed {
            for i in 0..n {
                let words = self.elements.bits((k + i) as u32, (first / 8) as u32);
                for (vector, drawn) in drawn.iter_mut().enumerate() {
                    drawn[i] = half(words, vector);
                }
            }
        } else {
            for (vector, drawn) in drawn.iter_mut().enumerate() {
                for (eight, drawn) in drawn[..n].chunks_exact_mut(8).enumerate() {
                    let group = k / 8 + eight;
                    let words = self.elements.bits((first + vector) as u32, group as u32);
                    for (i, drawn) in drawn.iter_mut().enumerate() {
                        *drawn = half(words, i);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        GemmId, Mxfp4Matrix, OperandId, PowerRule, Purpose, Random, Signs, Transform,
    };
    use super::super::{MAX_GROUP, Nvfp4Scale, Range, fill_normal, fill_signs};
    use super::*;

    const RANDOM: Random = Random { seed: 5, step: 2, micro_step: 1, layer: 3, linear: 1 };

    fn bits(random: &Random, transposed: bool) -> Bits {
        let [elements, scales] = [OperandId::Dy, OperandId::DyScales].map(|id| random.rounding(id));
        Bits { elements, scales, transposed }
    }

    fn normal(len: usize, seed: u64) -> Vec<f32> {
        let mut values = vec![0.0; len];
        fill_normal(&mut values, 1.0, &Draw::of(seed, Purpose::Weights, 0, 0), 0);
        values
    }

    /// x_i = (((37 i + 11) mod 64) - 31.5) / 16.
    fn series(len: usize) -> Vec<f32> {
        (0..len).map(|i| (((37 * i + 11) % 64) as f32 - 31.5) / 16.0).collect()
    }

    fn nearest_of(data: &[f32], operand: &Operand) -> Quantized {
        let source = Source { data, rows: 1, depth: data.len(), transposed: false };
        Quantized::new(source, operand, &[], &bits(&RANDOM, false))
    }

    #[test]
    fn the_vector_of_powers_of_two() {
        let x = series(32);
        let values = |digits: &str, scale: f32| -> Vec<f32> {
            let codes = digits.chars().map(|c| c.to_digit(16).unwrap() as u8);
            codes.map(|code| decode_e2m1(code) * scale).collect()
        };
        let half = values("d4b58d2c4a61d3c59e1d4b58e2c4a60d", 0.5);
        let quarter = values("f6d78f4e6c71f5e7af3f6d79f4e6c71f", 0.25);
        for (rule, expected, error) in [
            (PowerRule::Floor, &quarter, 0.025_390_625),
            (PowerRule::Ceil, &half, 0.014_648_437_5),
            (PowerRule::Even, &half, 0.014_648_437_5),
            (PowerRule::QuestFloor, &half, 0.014_648_437_5),
            (PowerRule::Quest, &half, 0.014_648_437_5),
        ] {
            let found = nearest_of(&x, &Operand::of(Format::mxfp4(rule, false)));
            assert_eq!(&found.values, expected, "{rule:?}");
            let squares = x.iter().zip(&found.values).map(|(x, q)| f64::from(x - q).powi(2));
            assert_eq!(squares.sum::<f64>() / 32.0, error, "{rule:?}");
        }
    }

    /// MXFP4 by the first rule has another definition, which packs it.
    #[test]
    fn mxfp4_is_that_of_the_packed_matrix() {
        for (rows, depth, transposed) in [(5, 70, false), (33, 64, true), (70, 33, true)] {
            let data = normal(rows * depth, 1);
            let source = Source { data: &data, rows, depth, transposed };
            for group in [0, 32, 128] {
                let transform = (group > 0).then(|| Transform::of(group, Signs::Random));
                for rounding in [Rounding::Nearest, Rounding::Unbiased] {
                    let operand = Operand::mxfp4(rounding, transform);
                    let mut room = [0.0; MAX_GROUP];
                    let signs = fill_signs(&mut room, transform, GemmId::Wgrad, &RANDOM);
                    let bits = bits(&RANDOM, transposed);
                    let ours = Quantized::new(source, &operand, signs, &bits);
                    let packed = Mxfp4Matrix::quantize(source, signs, operand, &bits.elements);
                    assert_eq!((ours.rows, ours.depth), (packed.rows, packed.depth));
                    let same = ours.values.iter().zip(packed.dequantize());
                    assert!(same.map(|(a, b)| (a.to_bits(), b.to_bits())).all(|(a, b)| a == b));
                }
            }
        }
    }

    /// One number for both products, so that the gradient is that of what was computed.
    #[test]
    fn squares_are_the_same_along_both_dimensions() {
        let (rows, cols) = (70, 45);
        let data = normal(rows * cols, 3);
        for format in [
            Format::mxfp4(PowerRule::Ceil, true),
            Format::nvfp4(Nvfp4Scale::Full, true),
            Format::nvfp4(Nvfp4Scale::FourOverSix, true),
        ] {
            let operand = Operand::of(format);
            let of = |rows, depth, transposed| {
                let source = Source { data: &data, rows, depth, transposed };
                Quantized::new(source, &operand, &[], &bits(&RANDOM, transposed))
            };
            let (along, down) = (of(rows, cols, false), of(cols, rows, true));
            assert_eq!(along.scale, down.scale);
            for row in 0..rows {
                for col in 0..cols {
                    let [a, b] = [
                        along.values[row * along.depth + col],
                        down.values[col * down.depth + row],
                    ];
                    assert_eq!(a, b, "{format:?}: {row}, {col}");
                }
            }
        }
    }

    /// Relative squared errors and slopes on normal numbers whose deviation is spread over an
    /// octave, of 4 million there and fewer here.
    #[test]
    fn errors_are_those_that_theory_gives() {
        let (rows, depth) = (256, 512);
        let mut data = normal(rows * depth, 9);
        for (i, part) in data.chunks_mut(32).enumerate() {
            // The same in squares of 32.
            let square = i / (depth / 32) / 32 * (depth / 32) + i % (depth / 32);
            let sigma = (square as f32 / (rows * depth / 1024) as f32).exp2();
            part.iter_mut().for_each(|v| *v *= sigma);
        }
        let mxfp4 = |rule, square| Operand::of(Format::mxfp4(rule, square));
        let part = |operand: Operand| operand.within(Range::ThreeQuarters);
        let nvfp4 = |rule, square| Operand::of(Format::nvfp4(rule, square));
        let sr = |operand: Operand| operand.rounded(Rounding::Unbiased);
        let eden = nvfp4(Nvfp4Scale::Full, false)
            .rounded(Rounding::Eden)
            .rotated(Transform::of(128, Signs::Random));
        for (name, operand, error, slope) in [
            ("floor", mxfp4(PowerRule::Floor, false), 0.0135, 0.9776),
            ("floor 3/4", part(mxfp4(PowerRule::Floor, false)), 0.0137, 0.9906),
            ("ceil", mxfp4(PowerRule::Ceil, false), 0.0136, 0.9906),
            ("even", mxfp4(PowerRule::Even, false), 0.0126, 0.9902),
            ("floor 3/4 SR", sr(mxfp4(PowerRule::Floor, false)), 0.0279, 1.0001),
            ("ceil SR", sr(mxfp4(PowerRule::Ceil, false)), 0.0277, 1.0),
            ("QuEST floor", mxfp4(PowerRule::QuestFloor, false), 0.0235, 0.944),
            ("QuEST", mxfp4(PowerRule::Quest, false), 0.0134, 0.986),
            ("ceil squares", mxfp4(PowerRule::Ceil, true), 0.0192, 0.9918),
            ("NVFP4", nvfp4(Nvfp4Scale::Full, false), 0.0090, 0.9955),
            ("NVFP4 four over six", nvfp4(Nvfp4Scale::FourOverSix, false), 0.0076, 0.9966),
            ("NVFP4 squares", nvfp4(Nvfp4Scale::Full, true), 0.0124, 0.9910),
            ("NVFP4 SR", sr(nvfp4(Nvfp4Scale::Full, false)), 0.0189, 0.9967),
            ("NVFP4 SR 17/16", sr(nvfp4(Nvfp4Scale::Headroom, false)), 0.0236, 1.0),
            ("MS-EDEN", eden, 0.0094, 1.0),
        ] {
            let source = Source { data: &data, rows, depth, transposed: false };
            let mut room = [0.0; MAX_GROUP];
            let signs = fill_signs(&mut room, operand.transform(), GemmId::Dgrad, &RANDOM);
            let found = Quantized::new(source, &operand, signs, &bits(&RANDOM, false));
            let factor = f64::from(operand.range().factor());
            let mut x = data.clone();
            if !signs.is_empty() {
                x.chunks_exact_mut(signs.len()).for_each(|group| rotate(group, signs));
            }
            let (mut squares, mut errors, mut products) = (0.0, 0.0, 0.0);
            for (x, q) in x.iter().zip(found.dequantize()) {
                let (x, q) = (f64::from(*x), q / factor);
                squares += x * x;
                errors += (x - q).powi(2);
                products += x * q;
            }
            let found = (errors / squares, products / squares);
            println!("{name:20} {:.4} {:.4}", found.0, found.1);
            assert!((found.0 / error - 1.0).abs() < 0.04, "{name}: {found:?}, not {error}");
            assert!((found.1 - slope).abs() < 0.002, "{name}: {found:?}, not {slope}");
        }
    }

    /// Over seeds the mean is the value: of a rotated vector, turned back.
    #[test]
    fn unbiased_operands_have_the_mean_of_their_source() {
        const SEEDS: usize = 4096;
        let depth = 128;
        let x = normal(depth, 4);
        let nvfp4 = |rule| Operand::of(Format::nvfp4(rule, false));
        let h128 = Transform::of(128, Signs::Random);
        let nearest = Operand::of(Format::MXFP4).rotated(h128);
        for operand in [
            Operand::of(Format::mxfp4(PowerRule::Ceil, false)).rounded(Rounding::Unbiased),
            nvfp4(Nvfp4Scale::Headroom).rounded(Rounding::Unbiased),
            nvfp4(Nvfp4Scale::Headroom).rounded(Rounding::Unbiased).rotated(h128),
            nvfp4(Nvfp4Scale::Full).rounded(Rounding::Eden).rotated(h128),
            nearest.within(Range::ThreeQuarters).with_correction(true).unwrap(),
            nvfp4(Nvfp4Scale::Full).rotated(h128).with_correction(true).unwrap(),
        ] {
            let (mut sums, mut squares) = (vec![0.0; depth], vec![0.0; depth]);
            let mut slope = 0.0;
            for seed in 0..SEEDS as u64 {
                let random = Random { seed, ..RANDOM };
                let source = Source { data: &x, rows: 1, depth, transposed: false };
                let mut room = [0.0; MAX_GROUP];
                let signs = fill_signs(&mut room, operand.transform(), GemmId::Dgrad, &random);
                let found = Quantized::new(source, &operand, signs, &bits(&random, false));
                let mut values = found.dequantized(depth);
                let back = found.correction / operand.range().factor();
                values.iter_mut().for_each(|v| *v *= back);
                if !signs.is_empty() {
                    // H is its own inverse.
                    rotate(&mut values, &vec![1.0; depth]);
                    values.iter_mut().zip(signs).for_each(|(v, sign)| *v *= sign);
                }
                for (i, v) in values.iter().enumerate() {
                    sums[i] += f64::from(*v);
                    squares[i] += f64::from(*v).powi(2);
                    slope += f64::from(v * x[i]);
                }
            }
            let n = SEEDS as f64;
            for i in 0..depth {
                let (mean, exact) = (sums[i] / n, f64::from(x[i]));
                let error = ((squares[i] / n - mean * mean).max(0.0) / n).sqrt();
                // 4 standard errors of each of 128; what is unbiased over rotations alone is off by
                // less than 0.1% besides.
                let slack = 4.5 * error + 1e-3 * exact.abs() + 1e-6;
                assert!((mean - exact).abs() <= slack, "{operand:?} {i}: {mean}, not {exact}");
            }
            let all: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
            assert!((slope / n / all - 1.0).abs() < 1e-3, "{operand:?}: slope {}", slope / n / all);
        }
    }
}
