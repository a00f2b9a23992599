//! Packing: one pass over an operand converts it to its format and lays it out in panels.
//!
//! For MXFP4 that pass transforms, scales, rounds and packs. It works on 16 vectors at a time, the
//! reduction dimension running down an array of 16-lane rows, so that the butterfly, the block
//! maxima and the rounding are plain lane-by-lane arithmetic for either layout of the source.
//! `mx::Mxfp4Matrix` is the definition; the codes are the same bit for bit.

use rayon::prelude::*;

use super::{BLOCK_STEPS, Format, PANEL, Packed};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::isa::simd_fn;
use crate::mx::{BLOCK, Draw, M0, M1, Rounding, W0, W1, group_scale, round_to_e4m3};

/// The longest group of the Hadamard transform.
const MAX_GROUP: usize = 256;

type Lanes = [f32; PANEL];

/// An operand where it lies. Element k of vector r is `data[r * stride + k]`, or, where it is
/// transposed, `data[k * stride + r]`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// The values.
    pub data: &'a [f32],
    /// Vectors.
    pub rows: usize,
    /// Elements of a vector, along the reduction dimension.
    pub depth: usize,
    /// Elements between rows in memory.
    pub stride: usize,
    /// Whether a row in memory runs across the vectors.
    pub transposed: bool,
    /// The values are seen as FP8 E4M3 with this scale keeps them.
    pub fp8_scale: Option<f32>,
}

impl<'a> Matrix<'a> {
    /// `data` is (rows, depth).
    pub fn rows_by_depth(data: &'a [f32], rows: usize, depth: usize) -> Self {
        Self { data, rows, depth, stride: depth, transposed: false, fp8_scale: None }
    }

    /// `data` is (depth, rows).
    pub fn depth_by_rows(data: &'a [f32], rows: usize, depth: usize) -> Self {
        Self { data, rows, depth, stride: rows, transposed: true, fp8_scale: None }
    }

    /// The same, seen as FP8 keeps it.
    pub fn as_fp8(self, scale: Option<f32>) -> Self {
        Self { fp8_scale: scale, ..self }
    }

    /// Loads elements k0 .. k0 + buffer.len() of vectors r0 .. r0 + 16, zero beyond the edges.
    #[inline(always)]
    fn load(&self, r0: usize, k0: usize, buffer: &mut [Lanes]) {
        let lanes = (self.rows - r0).min(PANEL);
        let depth = self.depth.saturating_sub(k0).min(buffer.len());
        if lanes < PANEL || depth < buffer.len() {
            buffer.fill([0.0; PANEL]);
        }
        if !self.transposed {
            for l in 0..lanes {
                let row = &self.data[(r0 + l) * self.stride + k0..][..depth];
                for (k, v) in row.iter().enumerate() {
                    buffer[k][l] = *v;
                }
            }
        } else {
            for k in 0..depth {
                let from = &self.data[(k0 + k) * self.stride + r0..][..lanes];
                buffer[k][..lanes].copy_from_slice(from);
            }
        }
        if let Some(scale) = self.fp8_scale {
            let inverse = 1.0 / scale; // exact: a power of two
            for row in buffer {
                for v in row {
                    *v = round_to_e4m3(*v * inverse) * scale;
                }
            }
        }
    }
}

/// How an operand is quantized to MXFP4.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    /// Signs of the transform; empty for none. Their number is the group.
    pub signs: &'a [f32],
    /// How elements are rounded.
    pub rounding: Rounding,
    /// Bits of unbiased rounding, keyed by the element's row and column as it is stored.
    pub draw: Draw,
}

impl Rotation<'_> {
    /// Length that the reduction dimension is padded to a multiple of.
    fn group(&self) -> usize {
        self.signs.len().max(BLOCK)
    }
}

/// Memory that an operand is packed into; slices may be longer than needed.
pub struct PackedMut<'a> {
    /// See [`Packed::words`].
    pub words: &'a mut [u32],
    /// See [`Packed::scales`].
    pub scales: &'a mut [f32],
    /// See [`Packed::sums`].
    pub sums: &'a mut [i32],
}

/// Packs an operand. `rotation` is given for MXFP4 and only then; `unsigned` for operand B of it.
pub fn pack<'a>(
    cpu: &Cpu,
    source: &Matrix<'_>,
    format: Format,
    rotation: Option<&Rotation<'_>>,
    unsigned: bool,
    memory: PackedMut<'a>,
) -> Packed<'a> {
    let isa = cpu.isa();
    let panels = source.rows.div_ceil(PANEL);
    let depth = source.depth.next_multiple_of(rotation.map_or(1, Rotation::group));
    let steps = format.steps(depth);
    let blocks = if rotation.is_some() { panels * (steps / BLOCK_STEPS) * PANEL } else { 0 };
    let words = &mut memory.words[..panels * steps * PANEL];
    let scales = &mut memory.scales[..blocks];
    let sums = &mut memory.sums[..blocks];
    let per_panel = words.par_chunks_exact_mut(steps * PANEL).with_max_len(1).enumerate();
    cpu.install(|| match (format, rotation) {
        (Format::Mxfp4, Some(rotation)) => {
            let blocks = steps / BLOCK_STEPS * PANEL;
            per_panel
                .zip(scales.par_chunks_exact_mut(blocks).zip(sums.par_chunks_exact_mut(blocks)))
                .for_each(|((panel, words), (scales, sums))| {
                    let r0 = panel * PANEL;
                    mxfp4_panel(isa, source, r0, rotation, unsigned, words, scales, sums);
                });
        }
        (Format::Bf16, None) => {
            per_panel.for_each(|(panel, words)| bf16_panel(isa, source, panel * PANEL, words));
        }
        (Format::F32, None) => per_panel.for_each(|(panel, words)| {
            pack_f32_panel(isa, source, panel * PANEL, bytemuck::cast_slice_mut(words));
        }),
        _ => unreachable!("a rotation goes with MXFP4"),
    });
    Packed { format, rows: source.rows, steps, words, scales, sums }
}

simd_fn! {
    /// Packs vectors r0 .. r0 + 16 as f32: `out` is (depth, 16).
    pub(in crate::backend::cpu) fn pack_f32_panel(source: &Matrix<'_>, r0: usize, out: &mut [f32]) {
        let (rows, _) = out.as_chunks_mut::<PANEL>();
        source.load(r0, 0, &mut rows[..source.depth]);
    }
}

simd_fn! {
    /// Packs vectors r0 .. r0 + 16 as pairs of bf16, the lower index in the low half.
    fn bf16_panel(source: &Matrix<'_>, r0: usize, out: &mut [u32]) {
        let mut buffer = [[0.0; PANEL]; 64];
        let (steps, _) = out.as_chunks_mut::<PANEL>();
        for (chunk, steps) in steps.chunks_mut(buffer.len() / 2).enumerate() {
            let buffer = &mut buffer[..2 * steps.len()];
            source.load(r0, chunk * 64, buffer);
            for (words, pair) in steps.iter_mut().zip(buffer.as_chunks::<2>().0) {
                for l in 0..PANEL {
                    words[l] = round_to_bf16(pair[0][l]) | round_to_bf16(pair[1][l]) << 16;
                }
            }
        }
    }
}

/// The bits of the bf16 nearest to v, ties to even; NaN stays NaN.
#[inline(always)]
fn round_to_bf16(v: f32) -> u32 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if v.is_nan() { bits >> 16 | 0x40 } else { rounded }
}

simd_fn! {
    /// Transforms and quantizes vectors r0 .. r0 + 16. `words` is (steps, 16), `scales` and `sums`
    /// are (blocks, 16).
    fn mxfp4_panel(
        source: &Matrix<'_>,
        r0: usize,
        rotation: &Rotation<'_>,
        unsigned: bool,
        words: &mut [u32],
        scales: &mut [f32],
        sums: &mut [i32],
    ) {
        let group = rotation.group();
        let mut buffer = [[0.0; PANEL]; MAX_GROUP];
        let buffer = &mut buffer[..group];
        let words = words.as_chunks_mut::<PANEL>().0.as_chunks_mut::<BLOCK_STEPS>().0;
        let scales = scales.as_chunks_mut::<PANEL>().0;
        let sums = sums.as_chunks_mut::<PANEL>().0;
        let mut bits = [[0u32; PANEL]; BLOCK];
        for block in 0..words.len() {
            let k0 = block * BLOCK;
            if k0.is_multiple_of(group) {
                source.load(r0, k0, buffer);
                if !rotation.signs.is_empty() {
                    rotate_lanes(buffer, rotation.signs);
                }
            }
            let values: &[Lanes; BLOCK] = buffer[k0 % group..]
                .first_chunk()
                .expect("a group is a whole number of blocks");
            if rotation.rounding == Rounding::Unbiased {
                                draw_bits(&rotation.draw, source.transposed, r0 as u32, k0 as u32, &mut bits);
            }
            quantize_lanes(
                values,
                rotation.rounding,
                &bits,
                unsigned,
                &mut words[block],
                &mut scales[block],
                &mut sums[block],
            );
        }
    }
}

/// `mx::rotate`, 16 vectors at a time.
#[inline(always)]
fn rotate_lanes(buffer: &mut [Lanes], signs: &[f32]) {
    let group = buffer.len();
    // Rows are copied out and in: the compiler then knows that they do not overlap.
    for (row, sign) in buffer.iter_mut().zip(signs) {
        *row = row.map(|v| v * sign);
    }
    let mut stride = 1;
    while stride < group {
        for pair in buffer.chunks_exact_mut(2 * stride) {
            let (low, high) = pair.split_at_mut(stride);
            for (low, high) in low.iter_mut().zip(high) {
                let (a, b) = (*low, *high);
                *low = std::array::from_fn(|l| a[l] + b[l]);
                *high = std::array::from_fn(|l| a[l] - b[l]);
            }
        }
        stride *= 2;
    }
    let scale = group_scale(group);
    for row in buffer {
        *row = row.map(|v| v * scale);
    }
}

/// The rounding bits of a block of 16 vectors, placed where the rounding adds them: 16 bits from bit
/// 6 up, and the half step below.
#[inline(always)]
fn draw_bits(draw: &Draw, transposed: bool, r0: u32, k0: u32, bits: &mut [[u32; PANEL]; BLOCK]) {
    let place = |half: u32| half << 6 | 32;
    if transposed {
        // Lanes are columns of the source: two groups of 8 columns; 16 of its rows a call.
        for (half, bits) in bits.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            let first = k0 + (half * PANEL) as u32;
            for group in 0..2 {
                let column_group = r0 / 8 + group as u32;
                let words = philox_lanes(draw, first, column_group);
                for (row, bits) in bits.iter_mut().enumerate() {
                    for (w, words) in words.iter().enumerate() {
                        bits[group * 8 + 2 * w] = place(words[row] & 0xffff);
                        bits[group * 8 + 2 * w + 1] = place(words[row] >> 16);
                    }
                }
            }
        }
    } else {
        // Lanes are rows of the source; 8 of its columns a call.
        for (group, bits) in bits.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let words = philox_lanes(draw, r0, k0 / 8 + group as u32);
            for (w, words) in words.iter().enumerate() {
                bits[2 * w] = words.map(|word| place(word & 0xffff));
                bits[2 * w + 1] = words.map(|word| place(word >> 16));
            }
        }
    }
}

/// `Draw::bits` for 16 consecutive rows: four words of 16 lanes.
#[inline(always)]
fn philox_lanes(draw: &Draw, row: u32, column_group: u32) -> [[u32; PANEL]; 4] {
    let mut c0: [u32; PANEL] = std::array::from_fn(|l| row.wrapping_add(l as u32));
    let mut c1 = [draw.word1 | column_group; PANEL];
    let mut c2 = [draw.word2; PANEL];
    let mut c3 = [draw.word3; PANEL];
    let [mut k0, mut k1] = draw.key;
    let multiply = |c: [u32; PANEL], m: u32| c.map(|c| u64::from(c) * u64::from(m));
    for _ in 0..10 {
        let (p0, p1) = (multiply(c0, M0), multiply(c2, M1));
        c0 = std::array::from_fn(|l| (p1[l] >> 32) as u32 ^ c1[l] ^ k0);
        c2 = std::array::from_fn(|l| (p0[l] >> 32) as u32 ^ c3[l] ^ k1);
        c1 = p1.map(|p| p as u32);
        c3 = p0.map(|p| p as u32);
        k0 = k0.wrapping_add(W0);
        k1 = k1.wrapping_add(W1);
    }
    [c0, c1, c2, c3]
}

/// `mx::quantize_block`, 16 blocks at a time, with doubled elements instead of codes.
#[inline(always)]
fn quantize_lanes(
    values: &[Lanes; BLOCK],
    rounding: Rounding,
    bits: &[[u32; PANEL]; BLOCK],
    unsigned: bool,
    words: &mut [[u32; PANEL]; BLOCK_STEPS],
    scales: &mut Lanes,
    sums: &mut [i32; PANEL],
) {
    let mut max_bits = [0u32; PANEL];
    for row in values {
        max_bits = std::array::from_fn(|l| max_bits[l].max(row[l].to_bits() & 0x7fff_ffff));
    }
    let mut factor = [0.0; PANEL];
    let mut keep = [0i32; PANEL];
    for l in 0..PANEL {
        let biased = max_bits[l] >> 23;
        let byte = biased.saturating_sub(2);
        let inverse = f32::from_bits((254 - byte) << 23);
        factor[l] = if rounding == Rounding::Unbiased { 0.75 * inverse } else { inverse };
        let scale = f32::from_bits(if byte == 0 { 1 << 22 } else { byte << 23 });
        // Half of the scale, for elements are doubled.
        scales[l] = if biased == 255 { f32::NAN } else { 0.5 * scale };
        keep[l] = if biased == 255 { 0 } else { -1 };
    }
    let offset = if unsigned { 12 } else { 0 };
    let mut total = [0i32; PANEL];
    for (step, words) in words.iter_mut().enumerate() {
        let mut word = [0u32; PANEL];
        for i in 0..4 {
            let (row, bits) = (values[4 * step + i], bits[4 * step + i]);
            let y: Lanes = std::array::from_fn(|l| row[l].abs() * factor[l]);
            let code: [u32; PANEL] = match rounding {
                Rounding::Nearest => y.map(nearest),
                Rounding::Unbiased => std::array::from_fn(|l| stochastic(y[l], bits[l])),
            };
            let element: [i32; PANEL] = std::array::from_fn(|l| {
                let sign = row[l].to_bits() as i32 >> 31;
                ((doubled(code[l]) as i32 ^ sign) - sign) & keep[l]
            });
            total = std::array::from_fn(|l| total[l] + element[l]);
            word =
                std::array::from_fn(|l| word[l] | ((element[l] + offset) as u32 & 255) << (8 * i));
        }
        *words = word;
    }
    for l in 0..PANEL {
        sums[l] = -12 * total[l];
    }
}

/// Twice the value of a code: 0 1 2 3 4 6 8 12. Above 3 it is a mantissa of two bits, shifted.
#[inline(always)]
fn doubled(code: u32) -> u32 {
    let shifted = (2 | code & 1) << ((code >> 1).wrapping_sub(1) & 3);
    if code < 4 { code } else { shifted }
}

/// As in `mx::quantize`.
#[inline(always)]
fn nearest(y: f32) -> u32 {
    u32::from(y > 0.25)
        + u32::from(y >= 0.75)
        + u32::from(y > 1.25)
        + u32::from(y >= 1.75)
        + u32::from(y > 2.5)
        + u32::from(y >= 3.5)
        + u32::from(y > 5.0)
}

/// As in `mx::quantize`; `bits` are in place.
#[inline(always)]
fn stochastic(y: f32, bits: u32) -> u32 {
    let below_one = y < 1.0;
    let u = if below_one { y + 1.0 } else { y };
    (u.to_bits().wrapping_add(bits) >> 22).wrapping_sub(if below_one { 254 } else { 252 })
}

/// A panel's blocks as `mx` codes and scale bytes, for tests: element k of lane l.
#[cfg(test)]
pub(in crate::backend::cpu) fn unpack_mxfp4(
    packed: &Packed<'_>,
    row: usize,
    k: usize,
) -> (i8, f32) {
    let (panel, lane) = (row / PANEL, row % PANEL);
    let word = packed.words[(panel * packed.steps + k / 4) * PANEL + lane];
    let block = (panel * packed.steps / BLOCK_STEPS + k / BLOCK) * PANEL + lane;
    (word.to_le_bytes()[k % 4] as i8, 2.0 * packed.scales[block])
}
