//! Products of a few rows with a weight in MXFP4, whose codes stay 4 bits in memory.
//!
//! A weight is (panels, blocks, 4, 16 outputs) words of 8 codes each, the first four in the low
//! halves of the bytes, and (panels, blocks, 16 outputs) bytes of E8M0. Rows become whole numbers
//! of 8 bits, with a scale for every 32 elements, the largest of which is 127. Doubled elements of
//! E2M1 are whole numbers, too, from -12 to 12: a block is summed exactly. What it stands for is
//! added up in f32, block by block, with operations that are rounded one by one. So every
//! instruction set has the same bits.
//!
//! NOTE: instructions that multiply bytes take one operand without a sign. So 12 is added to what is
//! looked up of a code, and 12 times the sum of the row's block taken back.

use super::super::arena::{Arena, Buffer};
use super::super::disjoint::DisjointSlice;
use super::super::gemm::PANEL;
use super::super::isa::{isa_fn, simd_fn};
use super::super::{Cpu, JOB_ELEMENTS};
use crate::formats::{BLOCK, quantize_closest};

/// Words of a block of one output.
const WORDS: usize = BLOCK / 8;

/// Rows that share a look at the weight.
const ROWS: usize = 4;

/// Twice the element of each code, and 12. NOTE: a scale of 2^-127, whose byte is 0, is read as 0:
/// its bits are shifted to an exponent's place.
const DOUBLED: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// A weight (outputs, inputs).
pub(super) struct Mxfp4Weight {
    codes: Buffer<u32>,
    scales: Buffer<u8>,
    outputs: usize,
    inputs: usize,
}

/// Rows in 8 bits, (rows, blocks).
struct Rows<'a> {
    /// (rows, blocks, 8 words of 4 elements)
    elements: &'a [u32],
    /// Half of each block's scale, for elements of E2M1 are doubled.
    scales: &'a [f32],
    /// -12 times each block's sum.
    sums: &'a [i32],
    blocks: usize,
}

impl Mxfp4Weight {
    pub(super) fn new(arena: &mut Arena, outputs: usize, inputs: usize) -> Self {
        let blocks = outputs.div_ceil(PANEL) * inputs.div_ceil(BLOCK);
        let (codes, scales) = (blocks * WORDS * PANEL, blocks * PANEL);
        Self { codes: arena.alloc(codes), scales: arena.alloc(scales), outputs, inputs }
    }

    fn blocks(&self) -> usize {
        self.inputs.div_ceil(BLOCK)
    }

    /// Takes the numbers of `w` (outputs, inputs).
    pub(super) fn fill(&mut self, cpu: &Cpu, w: &[f32]) {
        let (outputs, inputs, blocks) = (self.outputs, self.inputs, self.blocks());
        let codes = DisjointSlice::new(&mut self.codes);
        let scales = DisjointSlice::new(&mut self.scales);
        cpu.parallel(outputs.div_ceil(PANEL), |panel| {
            // SAFETY: a job owns its panel.
            let (codes, scales) = unsafe {
                let words = blocks * WORDS * PANEL;
                (
                    codes.part(panel * words, words),
                    scales.part(panel * blocks * PANEL, blocks * PANEL),
                )
            };
            codes.fill(0);
            for (lane, row) in w.chunks(inputs).skip(panel * PANEL).take(PANEL).enumerate() {
                for (block, values) in row.chunks(BLOCK).enumerate() {
                    let mut padded = [0.0; BLOCK];
                    padded[..values.len()].copy_from_slice(values);
                    let (scale, of_block) = quantize_closest(&padded);
                    scales[block * PANEL + lane] = scale;
                    for (word, codes_of) in of_block.chunks_exact(8).enumerate() {
                        let nibble = |i: usize| u32::from(codes_of[i] & 15);
                        let byte = |i: usize| (nibble(i) | nibble(i + 4) << 4) << (8 * i);
                        codes[(block * WORDS + word) * PANEL + lane] =
                            byte(0) | byte(1) | byte(2) | byte(3);
                    }
                }
            }
        });
    }

    /// to (rows, outputs) = x (rows, inputs) W^T + bias; `scratch` has room for x in f32, in whole
    /// blocks.
    pub(super) fn product(
        &self,
        cpu: &Cpu,
        scratch: &mut [u32],
        (to, bias): (&mut [f32], Option<&[f32]>),
        x: &[f32],
        rows: usize,
    ) {
        let (outputs, blocks) = (self.outputs, self.blocks());
        let (elements, scratch) = scratch.split_at_mut(rows * blocks * 8);
        let (scales, scratch) = scratch.split_at_mut(rows * blocks);
        let (scales, sums) = (
            bytemuck::cast_slice_mut::<u32, f32>(scales),
            bytemuck::cast_slice_mut::<u32, i32>(&mut scratch[..rows * blocks]),
        );
        let of_row = elements.chunks_exact_mut(blocks * 8).zip(x.chunks_exact(self.inputs));
        let of_row = of_row.zip(scales.chunks_exact_mut(blocks).zip(sums.chunks_exact_mut(blocks)));
        for ((elements, x), (scales, sums)) in of_row {
            quantize_row(cpu.isa(), bytemuck::cast_slice_mut(elements), scales, sums, x);
        }
        let (x, to) = (Rows { elements, scales, sums, blocks }, DisjointSlice::new(to));
        let panels = outputs.div_ceil(PANEL);
        // As many weights as are worth a job.
        let per_job = (4 * JOB_ELEMENTS / (blocks * BLOCK * PANEL)).max(1);
        cpu.parallel(panels.div_ceil(per_job), |job| {
            for panel in job * per_job..panels.min((job + 1) * per_job) {
                let codes = &self.codes[panel * blocks * WORDS * PANEL..][..blocks * WORDS * PANEL];
                let of_weight = &self.scales[panel * blocks * PANEL..][..blocks * PANEL];
                let columns = panel * PANEL..outputs.min((panel + 1) * PANEL);
                let (mut first, mut acc) = (0, [[0.0; PANEL]; ROWS]);
                while first < rows {
                    let (isa, x) = (cpu.isa(), x.from(first));
                    let count = if rows - first >= ROWS { ROWS } else { 1 };
                    if count == 1 {
                        let acc = std::array::from_mut(&mut acc[0]);
                        multiply_one(isa, acc, codes, of_weight, &x);
                    } else {
                        multiply_rows(isa, &mut acc, codes, of_weight, &x);
                    }
                    for (row, acc) in acc[..count].iter().enumerate() {
                        let start = (first + row) * outputs + columns.start;
                        // SAFETY: a job owns the columns of its panels.
                        let to = unsafe { to.part(start, columns.len()) };
                        match bias {
                            None => to.copy_from_slice(&acc[..to.len()]),
                            Some(bias) => {
                                let bias = &bias[columns.clone()];
                                let sums = acc.iter().zip(bias).map(|(sum, bias)| sum + bias);
                                to.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum);
                            }
                        }
                    }
                    first += count;
                }
            }
        });
    }
}

simd_fn! {
    /// Elements of a row in 8 bits, to nearest even, blocks that are not whole filled up with 0. A
    /// block with a number that is not finite makes NaN of all that it is multiplied with.
    fn quantize_row(elements: &mut [i8], scales: &mut [f32], sums: &mut [i32], x: &[f32]) {
        let of_blocks = elements.chunks_exact_mut(BLOCK).zip(x.chunks(BLOCK));
        for (block, (elements, x)) in of_blocks.enumerate() {
            // Of magnitudes as whole numbers NaN is the largest.
            let amax = x.iter().fold(0, |most: u32, v| most.max(v.to_bits() & 0x7fff_ffff));
            let amax = f32::from_bits(amax);
            // Below, a factor would not be finite; such a block is 0.
            let factor = if amax > 1e-36 { 127.0 / amax } else { 0.0 };
            elements.fill(0);
            let mut sum = 0;
            for (element, v) in elements.iter_mut().zip(x) {
                let n = (v * factor).round_ties_even() as i32;
                *element = n as i8;
                sum += n;
            }
            scales[block] = if amax.is_finite() { amax * (0.5 / 127.0) } else { f32::NAN };
            sums[block] = -12 * sum;
        }
    }
}

isa_fn! {
    /// acc (1, 16) = the products of a panel with a row.
    fn multiply_one(acc: &mut [[f32; PANEL]; 1], codes: &[u32], scales: &[u8], x: &Rows<'_>);
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni" => {
        // SAFETY: the set is there, and slices are as long as blocks say (asserted within).
        unsafe { avx512::multiply::<1>(acc, codes, scales, x) }
    }
    avx2 => {
        // SAFETY: as above.
        unsafe { avx2::multiply::<1>(acc, codes, scales, x) }
    }
    portable => { portable::multiply::<1>(acc, codes, scales, x) }
}

isa_fn! {
    /// acc (4, 16) = the products of a panel with four rows.
    fn multiply_rows(acc: &mut [[f32; PANEL]; ROWS], codes: &[u32], scales: &[u8], x: &Rows<'_>);
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni" => {
        // SAFETY: as above.
        unsafe { avx512::multiply::<ROWS>(acc, codes, scales, x) }
    }
    avx2 => {
        // SAFETY: as above.
        unsafe { avx2::multiply::<ROWS>(acc, codes, scales, x) }
    }
    portable => { portable::multiply::<ROWS>(acc, codes, scales, x) }
}

impl Rows<'_> {
    /// Those from a row on.
    fn from(&self, row: usize) -> Rows<'_> {
        let before = row * self.blocks;
        Rows {
            elements: &self.elements[before * 8..],
            scales: &self.scales[before..],
            sums: &self.sums[before..],
            blocks: self.blocks,
        }
    }

    /// Whether there are so many, and a panel of codes and scales as long.
    fn fit(&self, rows: usize, codes: &[u32], scales: &[u8]) -> bool {
        let blocks = rows * self.blocks;
        self.elements.len() >= blocks * 8
            && self.scales.len() >= blocks
            && self.sums.len() >= blocks
            && codes.len() == self.blocks * WORDS * PANEL
            && scales.len() == self.blocks * PANEL
    }
}

mod portable {
    use super::{DOUBLED, PANEL, Rows, WORDS};

    pub(super) fn multiply<const N: usize>(
        acc: &mut [[f32; PANEL]; N],
        codes: &[u32],
        scales: &[u8],
        x: &Rows<'_>,
    ) {
        assert!(x.fit(N, codes, scales));
        for (r, acc) in acc.iter_mut().enumerate() {
            *acc = [0.0; PANEL];
            for block in 0..x.blocks {
                let at = r * x.blocks + block;
                let mut dot = [x.sums[at]; PANEL];
                for word in 0..WORDS {
                    let of_lanes = &codes[(block * WORDS + word) * PANEL..][..PANEL];
                    for half in 0..2 {
                        let a = x.elements[at * 8 + 2 * word + half].to_le_bytes();
                        for (dot, codes) in dot.iter_mut().zip(of_lanes) {
                            for (i, a) in a.iter().enumerate() {
                                let code = codes >> (8 * i + 4 * half) & 15;
                                *dot += i32::from(DOUBLED[code as usize]) * i32::from(*a as i8);
                            }
                        }
                    }
                }
                for (l, acc) in acc.iter_mut().enumerate() {
                    let scale = f32::from_bits(u32::from(scales[block * PANEL + l]) << 23);
                    *acc += dot[l] as f32 * (scale * x.scales[at]);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{DOUBLED, PANEL, Rows, WORDS};

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    pub(super) unsafe fn multiply<const N: usize>(
        acc: &mut [[f32; PANEL]; N],
        codes: &[u32],
        scales: &[u8],
        x: &Rows<'_>,
    ) {
        assert!(x.fit(N, codes, scales));
        // SAFETY: all addresses are within the slices (asserted).
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(DOUBLED.as_ptr().cast()));
            let low = _mm512_set1_epi8(15);
            let mut sums = [_mm512_setzero_ps(); N];
            for block in 0..x.blocks {
                let mut dots = [_mm512_setzero_si512(); N];
                for (r, dot) in dots.iter_mut().enumerate() {
                    *dot = _mm512_set1_epi32(*x.sums.get_unchecked(r * x.blocks + block));
                }
                let from = codes.as_ptr().add(block * WORDS * PANEL);
                for word in 0..WORDS {
                    let both = _mm512_loadu_si512(from.add(word * PANEL).cast());
                    let first = _mm512_shuffle_epi8(table, _mm512_and_si512(both, low));
                    let second = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
                    let second = _mm512_shuffle_epi8(table, second);
                    for (r, dot) in dots.iter_mut().enumerate() {
                        let a = x.elements.as_ptr().add((r * x.blocks + block) * 8 + 2 * word);
                        *dot = _mm512_dpbusd_epi32(*dot, first, _mm512_set1_epi32(*a as i32));
                        let a = _mm512_set1_epi32(*a.add(1) as i32);
                        *dot = _mm512_dpbusd_epi32(*dot, second, a);
                    }
                }
                let bytes = _mm_loadu_si128(scales.as_ptr().add(block * PANEL).cast());
                let bits = _mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(bytes));
                let scale = _mm512_castsi512_ps(bits);
                for (r, sum) in sums.iter_mut().enumerate() {
                    let of_row = _mm512_set1_ps(*x.scales.get_unchecked(r * x.blocks + block));
                    let factor = _mm512_mul_ps(scale, of_row);
                    let products = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[r]), factor);
                    *sum = _mm512_add_ps(*sum, products);
                }
            }
            for (acc, sum) in acc.iter_mut().zip(sums) {
                _mm512_storeu_ps(acc.as_mut_ptr(), sum);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{DOUBLED, PANEL, Rows, WORDS};

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn multiply<const N: usize>(
        acc: &mut [[f32; PANEL]; N],
        codes: &[u32],
        scales: &[u8],
        x: &Rows<'_>,
    ) {
        assert!(x.fit(N, codes, scales));
        // SAFETY: all addresses are within the slices (asserted).
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(DOUBLED.as_ptr().cast()));
            let (low, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
            for side in 0..2 {
                let mut sums = [_mm256_setzero_ps(); N];
                for block in 0..x.blocks {
                    let mut dots = [_mm256_setzero_si256(); N];
                    for (r, dot) in dots.iter_mut().enumerate() {
                        *dot = _mm256_set1_epi32(*x.sums.get_unchecked(r * x.blocks + block));
                    }
                    let from = codes.as_ptr().add(block * WORDS * PANEL + 8 * side);
                    for word in 0..WORDS {
                        let both = _mm256_loadu_si256(from.add(word * PANEL).cast());
                        let first = _mm256_shuffle_epi8(table, _mm256_and_si256(both, low));
                        let second = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low);
                        let second = _mm256_shuffle_epi8(table, second);
                        for (r, dot) in dots.iter_mut().enumerate() {
                            let a = x.elements.as_ptr().add((r * x.blocks + block) * 8 + 2 * word);
                            // At most 4 x 24 x 127 in 16 bits, so that nothing saturates.
                            let pairs = _mm256_add_epi16(
                                _mm256_maddubs_epi16(first, _mm256_set1_epi32(*a as i32)),
                                _mm256_maddubs_epi16(second, _mm256_set1_epi32(*a.add(1) as i32)),
                            );
                            *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(pairs, ones));
                        }
                    }
                    let bytes = scales.as_ptr().add(block * PANEL + 8 * side);
                    let bytes = _mm_loadl_epi64(bytes.cast());
                    let bits = _mm256_slli_epi32::<23>(_mm256_cvtepu8_epi32(bytes));
                    let scale = _mm256_castsi256_ps(bits);
                    for (r, sum) in sums.iter_mut().enumerate() {
                        let of_row = _mm256_set1_ps(*x.scales.get_unchecked(r * x.blocks + block));
                        let factor = _mm256_mul_ps(scale, of_row);
                        let products = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[r]), factor);
                        *sum = _mm256_add_ps(*sum, products);
                    }
                }
                for (acc, sum) in acc.iter_mut().zip(sums) {
                    _mm256_storeu_ps(acc.as_mut_ptr().add(8 * side), sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::Isa;
    use super::*;
    use crate::backend::conformance::random;
    use crate::formats::{decode_e2m1, decode_e8m0};

    /// What the numbers of both operands give in f64, and the same bits on every instruction set, for
    /// any number of rows and threads.
    #[test]
    fn products_are_those_of_the_numbers() {
        for (rows, outputs, inputs) in [(1, 16, 32), (3, 37, 95), (4, 5, 640), (9, 70, 33)] {
            let (w, x) = (random(outputs * inputs, 1), random(rows * inputs, 2));
            let bias = random(outputs, 3);
            let mut results = Vec::new();
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                for threads in [1, 3] {
                    let cpu = Cpu::with_isa(threads, isa).unwrap();
                    let mut arena = Arena::mapped(1 << 22).unwrap();
                    let mut weight = Mxfp4Weight::new(&mut arena, outputs, inputs);
                    weight.fill(&cpu, &w);
                    let mut scratch = vec![0; rows * inputs.next_multiple_of(BLOCK)];
                    let mut to = vec![f32::NAN; rows * outputs];
                    weight.product(&cpu, &mut scratch, (&mut to, Some(&bias)), &x, rows);
                    results.push(to);
                }
            }
            assert!(results.iter().all(|to| *to == results[0]), "{rows} {outputs} {inputs}");
            let weights: Vec<Vec<f64>> = w.chunks(inputs).map(dequantized).collect();
            for (r, x) in x.chunks(inputs).enumerate() {
                for (o, w) in weights.iter().enumerate() {
                    let exact: f64 = w.iter().zip(in_8_bits(x)).map(|(w, x)| w * x).sum();
                    let (ours, bias) = (f64::from(results[0][r * outputs + o]), f64::from(bias[o]));
                    assert!((ours - bias - exact).abs() < 1e-4, "{r} {o}: {ours}, {exact}");
                }
            }
        }
    }

    fn dequantized(row: &[f32]) -> Vec<f64> {
        let of_block = |values: &[f32]| {
            let mut padded = [0.0; BLOCK];
            padded[..values.len()].copy_from_slice(values);
            let (scale, codes) = quantize_closest(&padded);
            let number = move |code: u8| f64::from(decode_e2m1(code) * decode_e8m0(scale));
            codes.into_iter().take(values.len()).map(number).collect::<Vec<_>>()
        };
        row.chunks(BLOCK).flat_map(of_block).collect()
    }

    fn in_8_bits(row: &[f32]) -> Vec<f64> {
        let of_block = |values: &[f32]| {
            let amax = values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
            let number = |v: &f32| f64::from((v * (127.0 / amax)).round_ties_even());
            values.iter().map(|v| number(v) * f64::from(amax) / 127.0).collect::<Vec<_>>()
        };
        row.chunks(BLOCK).flat_map(of_block).collect()
    }

    #[test]
    fn a_block_of_zeros_is_zero_and_padding_counts_nothing() {
        let cpu = Cpu::with_isa(1, Isa::best()).unwrap();
        let mut arena = Arena::mapped(1 << 16).unwrap();
        let mut weight = Mxfp4Weight::new(&mut arena, 2, 40);
        let mut w = vec![0.0; 80];
        w[40] = 1.5;
        w[79] = -2.0;
        weight.fill(&cpu, &w);
        let mut x = vec![0.0; 40];
        let (mut to, mut scratch) = (vec![f32::NAN; 2], vec![7; 64]);
        weight.product(&cpu, &mut scratch, (&mut to, None), &x, 1);
        assert_eq!(to, [0.0, 0.0]);
        (x[0], x[39]) = (127.0, 254.0);
        weight.product(&cpu, &mut scratch, (&mut to, None), &x, 1);
        assert_eq!(to, [0.0, 1.5 * 127.0 - 508.0]);
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            x[3] = broken;
            weight.product(&cpu, &mut scratch, (&mut to, None), &x, 1);
            assert!(to.iter().all(|v| v.is_nan()), "{broken}: {to:?}");
        }
    }
}
