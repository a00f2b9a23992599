//! Packing: one pass over an operand converts it to its format and lays it out in panels.
//!
//! For MXFP4 that pass transforms, scales, rounds and packs. It works on 16 vectors at a time, the
//! reduction dimension running down an array of 16-lane rows, so that the butterfly, the block
//! maxima and the rounding are plain lane-by-lane arithmetic for either layout of the source.
//! `mx::Mxfp4Matrix` is the definition; the codes are the same bit for bit.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{BLOCK_STEPS, Format, Layout, PANEL, Packed, Side};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::lanes::{Lanes, lanes_fn, place, round_keys, round_to_bf16};
use crate::backend::cpu::shared::SharedSlice;
use crate::mx::{BLOCK, Draw, E2M1_VALUES, MAX_GROUP, Range, Rounding, group_scale, round_to_e4m3};

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

    /// Elements k0 .. k0 + 16 of vectors r0 .. r0 + 16, zero beyond the edges: row k of the result
    /// holds element k0 + k of the 16 vectors.
    ///
    /// # Safety
    /// The instruction set of `L`.
    #[inline(always)]
    unsafe fn load<L: Lanes>(&self, r0: usize, k0: usize) -> [L::F; PANEL] {
        // SAFETY: passed on.
        unsafe {
            let square = self.load_square::<L>(r0, k0);
            if self.transposed { square } else { L::transpose(square) }
        }
    }

    /// The same elements, as they lie in memory: where the source is not transposed, row r holds 16
    /// elements of vector r0 + r.
    ///
    /// # Safety
    /// The instruction set of `L`.
    #[inline(always)]
    unsafe fn load_square<L: Lanes>(&self, r0: usize, k0: usize) -> [L::F; PANEL] {
        let inside = r0 + PANEL <= self.rows && k0 + PANEL <= self.depth;
        let (row, column) = if self.transposed { (k0, r0) } else { (r0, k0) };
        let edge;
        let (from, stride) = if inside && self.fp8_scale.is_none() {
            let from = &self.data[row * self.stride + column..];
            assert!(from.len() >= (PANEL - 1) * self.stride + PANEL);
            (from.as_ptr(), self.stride)
        } else {
            edge = self.load_edge(r0, k0);
            (edge.as_flattened().as_ptr(), PANEL)
        };
        // SAFETY: 16 rows of 16 elements, `stride` apart, are readable (checked above).
        unsafe {
            let mut square = [L::splat(0.0); PANEL];
            for i in 0..PANEL {
                square[i] = L::load(from.add(i * stride));
            }
            square
        }
    }

    /// Asks for the memory that [`Matrix::load`] will read; past the end of a vector, for that of the
    /// panel `panels` further on.
    ///
    /// NOTE: 16 rows far apart are more streams than a processor follows by itself.
    ///
    /// # Safety
    /// The instruction set of `L`.
    #[inline(always)]
    unsafe fn prefetch<L: Lanes>(&self, r0: usize, k0: usize, panels: usize) {
        let next = k0 >= self.depth;
        let (r0, k0) = if next { (r0 + panels * PANEL, k0 - self.depth) } else { (r0, k0) };
        let (row, column) = if self.transposed { (k0, r0) } else { (r0, k0) };
        let from = self.data.as_ptr().wrapping_add(row * self.stride + column);
        for i in 0..PANEL {
            // SAFETY: passed on.
            unsafe { L::prefetch(from.wrapping_add(i * self.stride)) };
        }
    }

    /// The square of memory that [`Matrix::load`] reads, where not all of it exists, or FP8 sees it.
    #[inline(never)]
    fn load_edge(&self, r0: usize, k0: usize) -> [[f32; PANEL]; PANEL] {
        let mut square = [[0.0; PANEL]; PANEL];
        let (rows, depth) = (self.rows - r0, self.depth.saturating_sub(k0));
        let (down, across) = if self.transposed { (depth, rows) } else { (rows, depth) };
        let (row, column) = if self.transposed { (k0, r0) } else { (r0, k0) };
        let across = across.min(PANEL);
        if across > 0 {
            for (i, square) in square.iter_mut().enumerate().take(down) {
                let from = &self.data[(row + i) * self.stride + column..][..across];
                square[..across].copy_from_slice(from);
            }
        }
        if let Some(scale) = self.fp8_scale {
            let inverse = 1.0 / scale; // exact: a power of two
            for v in square.as_flattened_mut() {
                *v = round_to_e4m3(*v * inverse) * scale;
            }
        }
        square
    }
}

/// How an operand is quantized to MXFP4.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    /// Signs of the transform; empty for none. Their number is the group.
    pub signs: &'a [f32],
    /// How elements are rounded.
    pub rounding: Rounding,
    /// The part of the format's range that scales use.
    pub range: Range,
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
    /// The sum of each vector, for a transposed source: (panels, 16), or empty if nobody asks. They
    /// come for free where the values pass through registers anyway.
    pub vector_sums: &'a mut [f32],
}

impl PackedMut<'_> {
    /// The same memory, for a while.
    pub fn reborrow(&mut self) -> PackedMut<'_> {
        PackedMut {
            words: self.words,
            scales: self.scales,
            sums: self.sums,
            vector_sums: self.vector_sums,
        }
    }
}

/// Elements along the reduction dimension that plain packing fetches ahead.
const AHEAD: usize = 2 * PANEL;

/// Panels of a transposed source that are packed together, for they share pages and cache lines.
const STRIP: usize = 4;

/// Packs an operand. `rotation` is given for MXFP4 and only then.
pub fn pack<'a>(
    cpu: &Cpu,
    source: &Matrix<'_>,
    format: Format,
    layout: Layout,
    rotation: Option<&Rotation<'_>>,
    side: Side,
    memory: PackedMut<'a>,
) -> Packed<'a> {
    let isa = cpu.isa();
    let panels = source.rows.div_ceil(PANEL);
    let depth = source.depth.next_multiple_of(rotation.map_or(1, Rotation::group));
    let steps = layout.steps(format, depth);
    let scaled = (format, layout) == (Format::Mxfp4, Layout::Panels);
    let blocks = if scaled { steps / BLOCK_STEPS } else { 0 };
    let words = &mut memory.words[..panels * steps * PANEL];
    let scales = &mut memory.scales[..panels * blocks * PANEL];
    let sums = &mut memory.sums[..panels * blocks * PANEL];
    let wants_sums = !memory.vector_sums.is_empty();
    assert!(source.transposed || !wants_sums, "vectors are summed where they are transposed");
    let vector_sums = &mut memory.vector_sums[..if wants_sums { panels * PANEL } else { 0 }];
    let range = ScaleRange::new();

    let strip = if source.transposed { STRIP } else { 1 };
    let per_panel = [steps * PANEL, blocks * PANEL, if wants_sums { PANEL } else { 0 }];
    let shared = (
        SharedSlice::new(words),
        SharedSlice::new(scales),
        SharedSlice::new(sums),
        SharedSlice::new(vector_sums),
    );
    cpu.parallel(panels.div_ceil(strip), |job| {
        let first = job * strip;
        let count = strip.min(panels - first);
        let r0 = first * PANEL;
        let [in_words, in_blocks, in_sums] = per_panel;
        // SAFETY: jobs own disjoint panels.
        let (words, scales, sums, vector_sums) = unsafe {
            (
                shared.0.part(first * in_words, count * in_words),
                shared.1.part(first * in_blocks, count * in_blocks),
                shared.2.part(first * in_blocks, count * in_blocks),
                shared.3.part(first * in_sums, count * in_sums),
            )
        };
        match (format, rotation) {
            (Format::Mxfp4, Some(rotation)) => {
                let out = Mxfp4Strip { words, scales, sums, vector_sums, range: &range };
                mxfp4_strip(isa, source, r0, rotation, layout, side, count, out);
            }
            (Format::Bf16, None) => {
                bf16_strip(isa, source, r0, layout, side, count, words, vector_sums);
            }
            (Format::F32, None) => {
                let words = bytemuck::cast_slice_mut(words);
                f32_strip(isa, source, r0, count, words, vector_sums);
            }
            _ => unreachable!("a rotation goes with MXFP4"),
        }
    });
    let scale_bytes = (range.min.into_inner(), range.max.into_inner());
    Packed { format, layout, rows: source.rows, steps, words, scales, sums, scale_bytes }
}

/// Where a strip of MXFP4 panels goes.
struct Mxfp4Strip<'a> {
    /// (panels, steps, 16)
    words: &'a mut [u32],
    /// (panels, blocks, 16)
    scales: &'a mut [f32],
    sums: &'a mut [i32],
    /// (panels, 16), or empty.
    vector_sums: &'a mut [f32],
    range: &'a ScaleRange,
}

/// The smallest and the largest scale byte of an operand, all panels taken together.
struct ScaleRange {
    min: AtomicU32,
    max: AtomicU32,
}

impl ScaleRange {
    fn new() -> Self {
        Self { min: AtomicU32::new(u32::MAX), max: AtomicU32::new(0) }
    }
}

/// Packs vectors r0 .. r0 + 16 as f32: `out` is (depth, 16).
pub(in crate::backend::cpu) fn pack_f32_panel(
    isa: Isa,
    source: &Matrix<'_>,
    r0: usize,
    out: &mut [f32],
) {
    f32_strip(isa, source, r0, 1, out, &mut []);
}

/// Packs vectors r0 .. r0 + 16 as bf16: `out` is (depth / 2, 16).
pub(in crate::backend::cpu) fn pack_bf16_panel(
    isa: Isa,
    source: &Matrix<'_>,
    r0: usize,
    out: &mut [u32],
) {
    bf16_strip(isa, source, r0, Layout::Panels, Side::A, 1, out, &mut []);
}

/// Packs all vectors as bf16 in tiles: `out` is (panels, steps, 16), see [`Packed::words`].
#[cfg(target_arch = "x86_64")]
pub(in crate::backend::cpu) fn pack_tiles(
    isa: Isa,
    source: &Matrix<'_>,
    side: Side,
    out: &mut [u32],
) {
    let in_panel = Layout::Tiles.steps(Format::Bf16, source.depth) * PANEL;
    for (panel, out) in out.chunks_exact_mut(in_panel).take(source.rows.div_ceil(PANEL)).enumerate()
    {
        bf16_strip(isa, source, panel * PANEL, Layout::Tiles, side, 1, out, &mut []);
    }
}

lanes_fn! {
    fn f32_strip(
        source: &Matrix<'_>,
        r0: usize,
        panels: usize,
        out: &mut [f32],
        vector_sums: &mut [f32],
    ) = f32_lanes;
}

lanes_fn! {
    fn bf16_strip(
        source: &Matrix<'_>,
        r0: usize,
        layout: Layout,
        side: Side,
        panels: usize,
        out: &mut [u32],
        vector_sums: &mut [f32],
    ) = bf16_lanes;
}

lanes_fn! {
    fn mxfp4_strip(
        source: &Matrix<'_>,
        r0: usize,
        rotation: &Rotation<'_>,
        layout: Layout,
        side: Side,
        panels: usize,
        out: Mxfp4Strip<'_>,
    ) = mxfp4_lanes;
}

/// Adds 16 elements of each of 16 vectors to their sums, in order.
#[inline(always)]
unsafe fn add_to_sums<L: Lanes>(values: &[L::F; PANEL], sums: &mut [f32]) {
    // SAFETY: passed on; `sums` has 16 elements.
    unsafe {
        let mut sum = L::load(sums.as_ptr());
        for i in 0..PANEL {
            sum = L::add(sum, values[i]);
        }
        L::store(sums.as_mut_ptr(), sum);
    }
}

#[inline(always)]
unsafe fn f32_lanes<L: Lanes>(
    source: &Matrix<'_>,
    r0: usize,
    panels: usize,
    out: &mut [f32],
    vector_sums: &mut [f32],
) {
    let (depth, rows) = (source.depth, out.as_chunks_mut::<PANEL>().0);
    vector_sums.fill(0.0);
    for k0 in (0..depth).step_by(PANEL) {
        for panel in 0..panels {
            // SAFETY: passed on; rows of 16 elements.
            unsafe {
                let values = source.load::<L>(r0 + panel * PANEL, k0);
                source.prefetch::<L>(r0 + panel * PANEL, k0 + AHEAD, panels);
                let rows = &mut rows[panel * depth + k0..][..PANEL.min(depth - k0)];
                for (i, to) in rows.iter_mut().enumerate() {
                    L::store(to.as_mut_ptr(), values[i]);
                }
                if !vector_sums.is_empty() {
                    add_to_sums::<L>(&values, &mut vector_sums[panel * PANEL..][..PANEL]);
                }
            }
        }
    }
}

/// Pairs of bf16, the lower index in the low half.
#[inline(always)]
unsafe fn bf16_lanes<L: Lanes>(
    source: &Matrix<'_>,
    r0: usize,
    layout: Layout,
    side: Side,
    panels: usize,
    out: &mut [u32],
    vector_sums: &mut [f32],
) {
    let steps = layout.steps(Format::Bf16, source.depth);
    let rows = out.as_chunks_mut::<PANEL>().0;
    vector_sums.fill(0.0);
    let by_lanes = (layout, side) == (Layout::Tiles, Side::A);
    if by_lanes && !source.transposed {
        // SAFETY: passed on.
        unsafe { bf16_rows::<L>(source, r0, panels, steps, rows) };
        return;
    }
    for step in (0..steps).step_by(PANEL / 2) {
        for panel in 0..panels {
            // SAFETY: passed on; rows of 16 words.
            unsafe {
                let values = source.load::<L>(r0 + panel * PANEL, 2 * step);
                source.prefetch::<L>(r0 + panel * PANEL, 2 * step + AHEAD, panels);
                let count = (PANEL / 2).min(steps - step);
                let at = panel * steps + step;
                for (i, to) in rows[at..][..count].iter_mut().enumerate() {
                    L::store_u(to.as_mut_ptr(), L::bf16_pairs(values[2 * i], values[2 * i + 1]));
                }
                if !vector_sums.is_empty() {
                    add_to_sums::<L>(&values, &mut vector_sums[panel * PANEL..][..PANEL]);
                }
                if by_lanes && step % PANEL > 0 {
                    turn_square::<L>(&mut rows[at - PANEL / 2..][..PANEL]);
                }
            }
        }
    }
}

/// The squares of tiles of operand A from a source that has them as rows already.
#[inline(always)]
unsafe fn bf16_rows<L: Lanes>(
    source: &Matrix<'_>,
    r0: usize,
    panels: usize,
    steps: usize,
    out: &mut [[u32; PANEL]],
) {
    for panel in 0..panels {
        for step in (0..steps).step_by(PANEL) {
            // SAFETY: passed on; rows of 16 words.
            unsafe {
                let r0 = r0 + panel * PANEL;
                let first = source.load_square::<L>(r0, 2 * step);
                let second = source.load_square::<L>(r0, 2 * step + PANEL);
                source.prefetch::<L>(r0, 2 * step + AHEAD, 1);
                source.prefetch::<L>(r0, 2 * step + PANEL + AHEAD, 1);
                let rows = &mut out[panel * steps + step..][..PANEL];
                for (i, to) in rows.iter_mut().enumerate() {
                    let (low, high) = (round_to_bf16::<L>(first[i]), round_to_bf16::<L>(second[i]));
                    L::store_u(to.as_mut_ptr(), L::narrow([low, high]));
                }
            }
        }
    }
}

/// Rows to columns, of a square of words.
#[inline(always)]
unsafe fn turn_square<L: Lanes>(square: &mut [[u32; PANEL]]) {
    // SAFETY: passed on; 16 rows of 16 words.
    unsafe {
        let mut rows = [L::splat(0.0); PANEL];
        for (row, from) in rows.iter_mut().zip(square.iter()) {
            *row = L::from_bits(L::load_u(from.as_ptr()));
        }
        rows = L::transpose(rows);
        for (row, to) in rows.iter().zip(square) {
            L::store_u(to.as_mut_ptr(), L::bits(*row));
        }
    }
}

/// A group of elements of 16 vectors, where registers do not straddle cache lines.
#[repr(C, align(64))]
struct Group([[f32; PANEL]; MAX_GROUP]);

/// Transforms and quantizes the vectors of some panels, group by group.
#[inline(always)]
unsafe fn mxfp4_lanes<L: Lanes>(
    source: &Matrix<'_>,
    r0: usize,
    rotation: &Rotation<'_>,
    layout: Layout,
    side: Side,
    panels: usize,
    out: Mxfp4Strip<'_>,
) {
    // SAFETY: passed on.
    unsafe {
        match layout {
            Layout::Panels => mxfp4_panels::<L, false>(source, r0, rotation, side, panels, out),
            Layout::Tiles => mxfp4_panels::<L, true>(source, r0, rotation, side, panels, out),
        }
    }
}

#[inline(always)]
unsafe fn mxfp4_panels<L: Lanes, const TILES: bool>(
    source: &Matrix<'_>,
    r0: usize,
    rotation: &Rotation<'_>,
    side: Side,
    panels: usize,
    out: Mxfp4Strip<'_>,
) {
    let group = rotation.group();
    let mut buffer = Group([[0.0f32; PANEL]; MAX_GROUP]);
    let buffer = &mut buffer.0[..group];
    let table = if TILES { element_values() } else { element_bytes(side) };
    let keys = round_keys(rotation.draw.key);
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
                load_group::<L>(source, r0, k0, rotation.signs, panels, buffer, vector_sums);
            }
            for (i, values) in buffer.as_chunks::<BLOCK>().0.iter().enumerate() {
                let (at, k0) = (panel * blocks + first + i, (first + i) * BLOCK);
                let draw = (&rotation.draw, &keys);
                let range = rotation.range.factor();
                let words = &mut words[at * block_words..][..block_words];
                // SAFETY: passed on; rows of 16 lanes.
                unsafe {
                    let (scale, byte) = match (rotation.rounding, source.transposed) {
                        (Rounding::Nearest, _) => quantize::<L, false, false, TILES>(
                            values, range, draw, r0, k0, &table, words,
                        ),
                        (Rounding::Unbiased, false) => quantize::<L, true, false, TILES>(
                            values, range, draw, r0, k0, &table, words,
                        ),
                        (Rounding::Unbiased, true) => quantize::<L, true, true, TILES>(
                            values, range, draw, r0, k0, &table, words,
                        ),
                    };
                    let below = L::sub_u(L::splat_u(255), byte);
                    L::store_u(max.as_mut_ptr(), L::max_u(L::load_u(max.as_ptr()), byte));
                    let below = L::max_u(L::load_u(max_below.as_ptr()), below);
                    L::store_u(max_below.as_mut_ptr(), below);
                    match (TILES, side) {
                        (true, Side::A) => turn_square::<L>(words),
                        (true, Side::B) => {}
                        (false, Side::A) => {
                            let word = L::sub_u(L::bits(scale), L::splat_u(ONE));
                            L::store(scales[at].as_mut_ptr(), L::from_bits(word));
                            store_sum::<L>(words, &mut sums[at]);
                        }
                        (false, Side::B) => L::store(scales[at].as_mut_ptr(), scale),
                    }
                }
            }
        }
    }
    for l in 0..PANEL {
        out.range.max.fetch_max(max[l], Ordering::Relaxed);
        out.range.min.fetch_min(255 - max_below[l], Ordering::Relaxed);
    }
}

/// The bits of 1.0.
pub(super) const ONE: u32 = 127 << 23;

/// Bytes of the doubled elements by code, plus 12 for operand B, where they are unsigned.
fn element_bytes(side: Side) -> [u32; 16] {
    let offset = if side == Side::B { 12.0 } else { 0.0 };
    element_values().map(|value| (2.0 * f32::from_bits(value) + offset) as i32 as u32 & 255)
}

/// Bits of the elements by code.
fn element_values() -> [u32; 16] {
    std::array::from_fn(|code| {
        let magnitude = E2M1_VALUES[code % 8];
        (if code < 8 { magnitude } else { -magnitude }).to_bits()
    })
}

/// Loads a group of elements of 16 vectors and rotates it as `mx::rotate` does: strides 1 to 8 while
/// 16 elements are in registers, the others on the way back through the first-level cache.
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
            if !vector_sums.is_empty() {
                add_to_sums::<L>(&v, vector_sums);
            }
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
/// NOTE: strides are constants. A loop over them was not unrolled, and every sum of 16 elements passed
/// through memory: half of the time that a transposed operand took. Measured on Zen 4, 2026-11-24.
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

/// Draws the rounding bits of elements k0 .. k0 + 8 of 16 vectors from r0 on: 16 bits each, those of
/// elements 2 i and 2 i + 1 in word i.
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
            // Lanes are columns of the source, two groups of 8. Lane 4 b + j computes row
            // 2 j + b / 2 and group b % 2, so that interleaving the four words gives whole rows.
            const ROW: [u32; PANEL] = [0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7];
            const GROUP: [u32; PANEL] = [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1];
            let row = L::add_u(L::load_u(ROW.as_ptr()), L::splat_u(k0));
            let column = L::add_u(L::load_u(GROUP.as_ptr()), L::splat_u(draw.word1 | (r0 / 8)));
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

/// `mx::quantize_block` of 16 blocks at a time. Words hold four bytes of doubled elements instead of
/// codes; or, in `TILES`, pairs of bf16, the elements times their scale, where these are normal numbers.
/// Returns half of each scale, and the scale's byte (255 for NaN).
///
/// NOTE: a block of zeroes has the byte 0, 2^-127. Its scale multiplies zeroes, so that of 1.0, which
/// no range check trips over, stands here instead.
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
        // The scale's byte is the biased exponent less 2, at least 0; see `mx::e8m0`.
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

/// As in `mx::quantize`.
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

/// The byte of element k of vector `row`, and its block's scale, of MXFP4 in panels, for tests.
#[cfg(test)]
pub(in crate::backend::cpu) fn unpack_mxfp4(
    packed: &Packed<'_>,
    row: usize,
    k: usize,
    side: Side,
) -> (i8, f32) {
    let (panel, lane) = (row / PANEL, row % PANEL);
    let word = packed.words[(panel * packed.steps + k / 4) * PANEL + lane];
    let block = (panel * packed.steps / BLOCK_STEPS + k / BLOCK) * PANEL + lane;
    let half = packed.scales[block];
    let half =
        if side == Side::B { half } else { f32::from_bits(half.to_bits().wrapping_add(ONE)) };
    (word.to_le_bytes()[[0, 2, 1, 3][k % 4]] as i8, 2.0 * half)
}

/// Element k of vector `row` of an operand in tiles, for tests.
#[cfg(test)]
pub(in crate::backend::cpu) fn unpack_tiles(
    packed: &Packed<'_>,
    row: usize,
    k: usize,
    side: Side,
) -> f32 {
    let (panel, lane, step) = (row / PANEL, row % PANEL, k / 2);
    let square = panel * packed.steps + step / PANEL * PANEL;
    let word = match side {
        Side::A => packed.words[(square + lane) * PANEL + step % PANEL],
        Side::B => packed.words[(square + step % PANEL) * PANEL + lane],
    };
    half::bf16::from_bits((word >> (16 * (k % 2))) as u16).to_f32()
}
