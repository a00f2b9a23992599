//! Packing of MXFP4: one pass transforms, scales, rounds and packs.
//!
//! Butterfly, block maxima and rounding are lane-by-lane arithmetic over 16 vectors.
//! `formats::Mxfp4Matrix` is the definition; the codes are the same bit for bit.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{Matrix, PackedMut, Strip, add_to_sums, turn_square};
use crate::backend::cpu::gemm::{BLOCK_STEPS, PANEL, Packing, Role};
use crate::backend::cpu::lanes::{Lanes, lanes_fn, place, round_keys};
use crate::formats::{BLOCK, Draw, E2M1_VALUES, MAX_GROUP, Range, Rounding, group_scale};

/// How an operand is quantized to MXFP4.
#[derive(Clone, Copy)]
pub struct Quantization<'a> {
    /// Signs of the transform; empty for none. Their number is the group.
    pub signs: &'a [f32],
    /// How elements are rounded.
    pub rounding: Rounding,
    /// The part of the format's range that scales use.
    pub range: Range,
    /// Bits of unbiased rounding, keyed by the element's row and column as it is stored.
    pub draw: Draw,
}

impl Quantization<'_> {
    /// Length that the reduction dimension is padded to a multiple of.
    pub(super) fn group(&self) -> usize {
        self.signs.len().max(BLOCK)
    }
}

/// The range of the scale bytes of an operand, all panels taken together.
#[derive(Default)]
pub(super) struct ScaleRange {
    /// 255 less the smallest.
    pub(super) below: AtomicU32,
    pub(super) max: AtomicU32,
}

lanes_fn! {
    /// `out` is the memory of these panels; their scale bytes go to `range`.
    pub(super) fn mxfp4_strip(
        strip: Strip<'_>,
        quantization: &Quantization<'_>,
        range: &ScaleRange,
        out: PackedMut<'_>,
    ) = mxfp4_lanes;
}

/// A group of elements of 16 vectors, where registers do not straddle cache lines.
#[repr(C, align(64))]
struct GroupBuffer([[f32; PANEL]; MAX_GROUP]);

/// Transforms and quantizes the vectors of some panels, group by group.
#[inline(always)]
unsafe fn mxfp4_lanes<L: Lanes>(
    strip: Strip<'_>,
    quantization: &Quantization<'_>,
    range: &ScaleRange,
    out: PackedMut<'_>,
) {
    // SAFETY: passed on.
    unsafe {
        match strip.packing {
            Packing::Panels => mxfp4_panels::<L, false>(strip, quantization, range, out),
            Packing::Tiles => mxfp4_panels::<L, true>(strip, quantization, range, out),
        }
    }
}

#[inline(always)]
unsafe fn mxfp4_panels<L: Lanes, const TILES: bool>(
    strip: Strip<'_>,
    quantization: &Quantization<'_>,
    range: &ScaleRange,
    out: PackedMut<'_>,
) {
    let Strip { source, r0, panels, role, .. } = strip;
    let group = quantization.group();
    let mut buffer = GroupBuffer([[0.0f32; PANEL]; MAX_GROUP]);
    let buffer = &mut buffer.0[..group];
    let table = if TILES { element_values() } else { element_bytes(role) };
    let keys = round_keys(quantization.draw.key);
    let block_words = if TILES { PANEL } else { BLOCK_STEPS };
    let words = out.words.as_chunks_mut::<PANEL>().0;
    let scales = out.scales.as_chunks_mut::<PANEL>().0;
    let sums = out.sums.as_chunks_mut::<PANEL>().0;
    out.vector_sums.fill(0.0);
    // The largest byte so far, and the largest 255 - byte.
    let (mut max, mut max_below) = ([0u32; PANEL], [0u32; PANEL]);
    let (blocks, blocks_per_group) = (words.len() / block_words / panels, group / BLOCK);
    for first in (0..blocks).step_by(blocks_per_group) {
        for panel in 0..panels {
            let r0 = r0 + panel * PANEL;
            let part = if out.vector_sums.is_empty() { 0 } else { PANEL };
            let vector_sums = &mut out.vector_sums[panel * part..][..part];
            // SAFETY: passed on.
            unsafe {
                let k0 = first * BLOCK;
                load_group::<L>(source, r0, k0, quantization.signs, panels, buffer, vector_sums);
            }
            for (i, values) in buffer.as_chunks::<BLOCK>().0.iter().enumerate() {
                let (at, k0) = (panel * blocks + first + i, (first + i) * BLOCK);
                let (draw, part) = ((&quantization.draw, &keys), quantization.range.factor());
                let words = &mut words[at * block_words..][..block_words];
                // SAFETY: passed on; rows of 16 lanes.
                unsafe {
                    let (scale, byte) = match (quantization.rounding, source.transposed) {
                        (Rounding::Nearest | Rounding::Eden | Rounding::ByMean, _) => {
                            quantize::<L, false, false, TILES>(
                                values, part, draw, r0, k0, &table, words,
                            )
                        }
                        (Rounding::Unbiased, false) => quantize::<L, true, false, TILES>(
                            values, part, draw, r0, k0, &table, words,
                        ),
                        (Rounding::Unbiased, true) => quantize::<L, true, true, TILES>(
                            values, part, draw, r0, k0, &table, words,
                        ),
                    };
                    let below = L::sub_u(L::splat_u(255), byte);
                    L::store_u(max.as_mut_ptr(), L::max_u(L::load_u(max.as_ptr()), byte));
                    let below = L::max_u(L::load_u(max_below.as_ptr()), below);
                    L::store_u(max_below.as_mut_ptr(), below);
                    match (TILES, role) {
                        (true, Role::A) => turn_square::<L>(words),
                        (true, Role::B) => {}
                        (false, Role::A) => {
                            let word = L::sub_u(L::bits(scale), L::splat_u(ONE));
                            L::store(scales[at].as_mut_ptr(), L::from_bits(word));
                            store_sum::<L>(words, &mut sums[at]);
                        }
                        (false, Role::B) => L::store(scales[at].as_mut_ptr(), scale),
                    }
                }
            }
        }
    }
    for l in 0..PANEL {
        range.max.fetch_max(max[l], Ordering::Relaxed);
        range.below.fetch_max(max_below[l], Ordering::Relaxed);
    }
}

/// The bits of 1.0.
pub(in crate::backend::cpu::gemm) const ONE: u32 = 127 << 23;

/// Bytes of the doubled elements by code, plus 12 for operand B, where they are unsigned.
fn element_bytes(role: Role) -> [u32; 16] {
    let offset = if role == Role::B { 12.0 } else { 0.0 };
    element_values().map(|value| (2.0 * f32::from_bits(value) + offset) as i32 as u32 & 255)
}

/// Bits of the elements by code.
fn element_values() -> [u32; 16] {
    std::array::from_fn(|code| {
        let magnitude = E2M1_VALUES[code % 8];
        (if code < 8 { magnitude } else { -magnitude }).to_bits()
    })
}

/// Loads a group of elements of 16 vectors and rotates it as `formats::rotate` does: strides 1 to 8
/// while 16 elements are in registers, the others on the way back through the first-level cache.
#[inline(always)]
unsafe fn load_group<L: Lanes>(
    source: &Matrix<'_>,
    r0: usize,
    k0: usize,
    signs: &[f32],
    panels: usize,
    buffer: &mut [[f32; PANEL]],
    vector_sums: &mut [f32],
) {
    let group = buffer.len();
    // SAFETY: passed on; rows of 16 elements.
    unsafe {
        for (part, rows) in buffer.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            let mut v = source.load::<L>(r0, k0 + part * PANEL);
            source.prefetch::<L>(r0, k0 + group + part * PANEL, panels);
            add_to_sums::<L>(&v, vector_sums, 0);
            if let Some(signs) = signs.get(part * PANEL..(part + 1) * PANEL) {
                for i in 0..PANEL {
                    v[i] = L::mul(v[i], L::splat(signs[i]));
                }
                v = butterfly::<L, 16>(v);
            }
            for i in 0..PANEL {
                L::store(rows[i].as_mut_ptr(), v[i]);
            }
        }
        match signs.len() {
            32 => across_parts::<L, 2>(buffer),
            64 => across_parts::<L, 4>(buffer),
            128 => across_parts::<L, 8>(buffer),
            256 => across_parts::<L, 16>(buffer),
            _ => {}
        }
    }
}

/// The stages of strides 16, 32 .. 8 N of a group of 16 N, and the scale.
#[inline(always)]
unsafe fn across_parts<L: Lanes, const N: usize>(buffer: &mut [[f32; PANEL]]) {
    // SAFETY: passed on; the buffer has 16 N rows of 16 elements.
    unsafe {
        let scale = L::splat(group_scale(N * PANEL));
        for i in 0..PANEL {
            let mut v = [scale; N];
            for part in 0..N {
                v[part] = L::load(buffer[part * PANEL + i].as_ptr());
            }
            v = butterfly::<L, N>(v);
            for part in 0..N {
                L::store(buffer[part * PANEL + i].as_mut_ptr(), L::mul(v[part], scale));
            }
        }
    }
}

/// Sums and differences at strides 1, 2 .. N / 2.
///
/// NOTE: strides are constants. A loop over them was not unrolled, and every sum of 16 elements
/// passed through memory: half of the time that a transposed operand took. Measured on Zen 4,
/// 2026-11-24.
#[inline(always)]
unsafe fn butterfly<L: Lanes, const N: usize>(mut v: [L::F; N]) -> [L::F; N] {
    // SAFETY: passed on.
    unsafe {
        stage::<L, N, 1>(&mut v);
        stage::<L, N, 2>(&mut v);
        stage::<L, N, 4>(&mut v);
        stage::<L, N, 8>(&mut v);
    }
    v
}

/// Sums and differences at one stride, if it is below N.
#[inline(always)]
unsafe fn stage<L: Lanes, const N: usize, const STRIDE: usize>(v: &mut [L::F; N]) {
    if STRIDE < N {
        for i in 0..N / 2 {
            let low = i / STRIDE * 2 * STRIDE + i % STRIDE;
            let (a, b) = (v[low], v[low + STRIDE]);
            // SAFETY: passed on.
            (v[low], v[low + STRIDE]) = unsafe { (L::add(a, b), L::sub(a, b)) };
        }
    }
}

/// Draws the rounding bits of elements k0 .. k0 + 8 of 16 vectors from r0 on: 16 bits each, those
/// of elements 2 i and 2 i + 1 in word i.
#[inline(always)]
unsafe fn draw_bits<L: Lanes>(
    draw: &Draw,
    keys: &[[u32; 2]; 10],
    transposed: bool,
    r0: u32,
    k0: u32,
) -> [L::U; 4] {
    // SAFETY: passed on.
    unsafe {
        let last_words = [draw.word2, draw.word3];
        if transposed {
            // Lanes are columns of the source, two eights of them. Lane 4 b + j computes row
            // 2 j + b / 2 and eight b % 2, so that interleaving the four words gives whole rows.
            const ROW: [u32; PANEL] = [0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7];
            const EIGHT: [u32; PANEL] = [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1];
            let row = L::add_u(L::load_u(ROW.as_ptr()), L::splat_u(k0));
            let column = L::add_u(L::load_u(EIGHT.as_ptr()), L::splat_u(draw.word1 | (r0 / 8)));
            let [a, b, c, d] = L::interleave(L::philox(keys, row, column, last_words));
            [L::zip(a), L::zip(b), L::zip(c), L::zip(d)]
        } else {
            // Lanes are rows of the source.
            const LANE: [u32; PANEL] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
            let row = L::add_u(L::load_u(LANE.as_ptr()), L::splat_u(r0));
            L::philox(keys, row, L::splat_u(draw.word1 | (k0 / 8)), last_words)
        }
    }
}

/// `formats::quantize_block` of 16 blocks at a time. Words hold four bytes of doubled elements
/// instead of codes; or, in `TILES`, pairs of bf16, the elements times their scale, where these are
/// normal numbers. Returns half of each scale, and the scale's byte (255 for NaN).
///
/// NOTE: a block of zeroes has the byte 0, 2^-127. Its scale multiplies zeroes, so that of 1.0,
/// which no range check trips over, stands here instead.
#[inline(always)]
unsafe fn quantize<L: Lanes, const UNBIASED: bool, const TRANSPOSED: bool, const TILES: bool>(
    values: &[[f32; PANEL]; BLOCK],
    range: f32,
    (draw, keys): (&Draw, &[[u32; 2]; 10]),
    r0: usize,
    k0: usize,
    table: &[u32; 16],
    words: &mut [[u32; PANEL]],
) -> (L::F, L::U) {
    // SAFETY: passed on; rows of 16 lanes.
    unsafe {
        let magnitude = L::splat_u(0x7fff_ffff);
        let mut max = L::splat_u(0);
        for row in values {
            max = L::max_u(max, L::and(L::bits(L::load(row.as_ptr())), magnitude));
        }
        // The scale's byte is the biased exponent less 2, at least 0; see `formats::e8m0`.
        let biased = L::shift_right::<23>(max);
        let bad = L::equal(biased, L::splat_u(255));
        let zero = L::and(L::equal(max, L::splat_u(0)), L::splat_u(129));
        let biased = L::add_u(biased, zero);
        let byte = L::sub_u(L::max_u(biased, L::splat_u(2)), L::splat_u(2));
        let inverse = L::from_bits(L::shift_left::<23>(L::sub_u(L::splat_u(254), byte)));
        let factor = L::mul(inverse, L::splat(range));
        let smallest = L::and(L::equal(byte, L::splat_u(0)), L::splat_u(1 << 22));
        let scale = L::from_bits(L::or(L::shift_left::<23>(byte), smallest));
        let half = L::bits(L::mul(scale, L::splat(0.5)));
        let half = L::from_bits(L::or(half, L::and(bad, L::splat_u(0x7fc0_0000))));

        // Two steps at a time: 8 elements, one call of the generator.
        for pair in 0..BLOCK_STEPS / 2 {
            let k = 8 * pair;
            let bits = if UNBIASED {
                draw_bits::<L>(draw, keys, TRANSPOSED, r0 as u32, (k0 + k) as u32)
            } else {
                [max; 4]
            };
            if UNBIASED && !TILES {
                let mut x = [factor; 8];
                for i in 0..8 {
                    x[i] = L::load(values[k + i].as_ptr());
                }
                let [low, high] = L::stochastic_bytes(x, factor, bits, table);
                L::store_u(words[2 * pair].as_mut_ptr(), low);
                L::store_u(words[2 * pair + 1].as_mut_ptr(), high);
                continue;
            }
            let mut element = [max; 8];
            for i in 0..8 {
                let x = L::bits(L::load(values[k + i].as_ptr()));
                let y = L::mul(L::from_bits(L::and(x, magnitude)), factor);
                if TILES && UNBIASED {
                    let word = bits[i / 2];
                    let half = L::and(word, L::splat_u(0xffff));
                    let half = if i % 2 == 0 { half } else { L::shift_right::<16>(word) };
                    let value = L::bits(L::stochastic_value(y, place::<L>(half)));
                    element[i] = L::or(value, L::and(x, L::splat_u(1 << 31)));
                    continue;
                }
                let sign = L::and(L::shift_right::<28>(x), L::splat_u(8));
                element[i] = L::look_up(L::or(nearest::<L>(y), sign), table);
            }
            if TILES {
                for i in 0..4 {
                    let low = L::bits(L::mul(L::from_bits(element[2 * i]), scale));
                    let high = L::bits(L::mul(L::from_bits(element[2 * i + 1]), scale));
                    let word = L::or(L::shift_right::<16>(low), high);
                    L::store_u(words[4 * pair + i].as_mut_ptr(), word);
                }
                continue;
            }
            for half in 0..2 {
                let [a, b, c, d] = [
                    element[4 * half],
                    element[4 * half + 1],
                    element[4 * half + 2],
                    element[4 * half + 3],
                ];
                let low = L::or(a, L::shift_left::<8>(c));
                let high = L::or(L::shift_left::<16>(b), L::shift_left::<24>(d));
                L::store_u(words[2 * pair + half].as_mut_ptr(), L::or(low, high));
            }
        }
        if !TILES && L::any(bad) {
            // Elements of blocks that hold NaN or infinity are 0, whatever was computed of them.
            let zero = L::splat_u(table[0] * 0x0101_0101);
            for word in words.iter_mut() {
                let good = L::xor(L::load_u(word.as_ptr()), zero);
                let good = L::and(good, L::xor(bad, L::splat_u(u32::MAX)));
                L::store_u(word.as_mut_ptr(), L::xor(good, zero));
            }
        }
        (half, L::or(byte, L::and(bad, L::splat_u(255))))
    }
}

/// As in `formats::quantize`.
#[inline(always)]
unsafe fn nearest<L: Lanes>(y: L::F) -> L::U {
    // SAFETY: passed on.
    unsafe {
        // A mask is -1 where the threshold is passed.
        let mut sum = L::add_u(L::less(L::splat(0.25), y), L::less_equal(L::splat(0.75), y));
        sum = L::add_u(sum, L::less(L::splat(1.25), y));
        sum = L::add_u(sum, L::less_equal(L::splat(1.75), y));
        sum = L::add_u(sum, L::less(L::splat(2.5), y));
        sum = L::add_u(sum, L::less_equal(L::splat(3.5), y));
        sum = L::add_u(sum, L::less(L::splat(5.0), y));
        L::sub_u(L::splat_u(0), sum)
    }
}

/// -12 times the sum of each block's elements: what the offset of 12 of the other operand adds.
#[inline(always)]
unsafe fn store_sum<L: Lanes>(words: &[[u32; PANEL]], sums: &mut [i32; PANEL]) {
    // SAFETY: passed on; rows of 16 words.
    unsafe {
        let zero = L::splat_u(0);
        let mut sum = zero;
        for word in words {
            sum = L::add_bytes(sum, L::load_u(word.as_ptr()));
        }
        let twelve = L::add_u(L::shift_left::<3>(sum), L::shift_left::<2>(sum));
        L::store_u(sums.as_mut_ptr().cast(), L::sub_u(zero, twelve));
    }
}
