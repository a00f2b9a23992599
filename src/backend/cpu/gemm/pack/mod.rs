//! Packing: one pass over an operand converts it to its format and lays it out in panels.
//!
//! It works on 16 vectors at a time, the reduction dimension running down an array of 16-lane rows,
//! so that all of it is plain lane-by-lane arithmetic for either layout of the source.

mod memory;
mod mxfp4;
mod plain;
#[cfg(test)]
mod unpack;

use super::{BLOCK_STEPS, Format, PANEL, Packed, Packing, Role};
use crate::backend::Precision;
use crate::backend::cpu::Cpu;
use crate::backend::cpu::disjoint::DisjointSlice;
use crate::backend::cpu::lanes::Lanes;
use crate::formats::round_to_e4m3;
pub use memory::PackedMut;
pub(in crate::backend::cpu) use memory::{Layout, PackMemory, PackSize};
pub(super) use mxfp4::ONE;
pub use mxfp4::Quantization;
use mxfp4::{ScaleRange, mxfp4_strip};
use plain::{bf16_strip, f32_strip};
pub(in crate::backend::cpu) use plain::{pack_bf16, pack_f32};
#[cfg(test)]
pub(in crate::backend::cpu) use unpack::{unpack_mxfp4, unpack_tiles};

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

    /// Asks for the memory that [`Matrix::load`] will read; past the end of a vector, for that of
    /// the panel `panels` further on.
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

    /// The square of memory that [`Matrix::load`] reads, where not all of it exists, or FP8 sees
    /// it.
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

/// What packing makes of an operand's elements.
#[derive(Clone, Copy)]
pub enum Conversion<'a> {
    /// See [`Format::F32`].
    F32,
    /// See [`Format::Bf16`].
    Bf16,
    /// See [`Format::Mxfp4`].
    Mxfp4(Quantization<'a>),
}

impl Conversion<'_> {
    /// To what a precision's products take.
    pub(in crate::backend::cpu) fn to(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
        }
    }

    /// The format that comes of it.
    pub fn format(&self) -> Format {
        match self {
            Self::F32 => Format::F32,
            Self::Bf16 => Format::Bf16,
            Self::Mxfp4(_) => Format::Mxfp4,
        }
    }

    /// What the reduction dimension is padded to a multiple of.
    fn group(&self) -> usize {
        if let Self::Mxfp4(quantization) = self { quantization.group() } else { 1 }
    }
}

/// Panels of an operand that one job packs.
#[derive(Clone, Copy)]
struct Strip<'a> {
    source: &'a Matrix<'a>,
    /// Its first vector.
    r0: usize,
    panels: usize,
    packing: Packing,
    role: Role,
}

/// Panels of a transposed source that are packed together, for they share pages and cache lines.
const STRIP_PANELS: usize = 4;

/// Packs an operand as this instruction set multiplies it fastest.
pub fn pack<'a>(
    cpu: &Cpu,
    source: &Matrix<'_>,
    conversion: Conversion<'_>,
    role: Role,
    memory: PackedMut<'a>,
) -> Packed<'a> {
    let packing = Packing::best(cpu.isa(), conversion.format());
    pack_in(packing, cpu, source, conversion, role, memory)
}

/// The same in a given packing. Any set packs tiles, of all but f32; only multiplying them takes
/// AMX.
pub(in crate::backend::cpu) fn pack_in<'a>(
    packing: Packing,
    cpu: &Cpu,
    source: &Matrix<'_>,
    conversion: Conversion<'_>,
    role: Role,
    memory: PackedMut<'a>,
) -> Packed<'a> {
    let (isa, format) = (cpu.isa(), conversion.format());
    let panels = source.rows.div_ceil(PANEL);
    let depth = source.depth.next_multiple_of(conversion.group());
    let steps = packing.steps(format, depth);
    let scaled = (format, packing) == (Format::Mxfp4, Packing::Panels);
    let blocks = if scaled { steps / BLOCK_STEPS } else { 0 };
    let words = &mut memory.words[..panels * steps * PANEL];
    let scales = &mut memory.scales[..panels * blocks * PANEL];
    let sums = &mut memory.sums[..panels * blocks * PANEL];
    let wants_sums = !memory.vector_sums.is_empty();
    assert!(source.transposed || !wants_sums, "vectors are summed where they are transposed");
    let vector_sums = &mut memory.vector_sums[..if wants_sums { panels * PANEL } else { 0 }];
    let range = ScaleRange::default();
    let in_strip = if source.transposed { STRIP_PANELS } else { 1 };
    let per_panel = [steps * PANEL, blocks * PANEL, if wants_sums { PANEL } else { 0 }];
    let shared = (
        DisjointSlice::new(words),
        DisjointSlice::new(scales),
        DisjointSlice::new(sums),
        DisjointSlice::new(vector_sums),
    );
    cpu.parallel(panels.div_ceil(in_strip), |job| {
        let first = job * in_strip;
        let count = in_strip.min(panels - first);
        let [in_words, in_blocks, in_sums] = per_panel;
        // SAFETY: jobs own disjoint panels.
        let out = unsafe {
            PackedMut {
                words: shared.0.part(first * in_words, count * in_words),
                scales: shared.1.part(first * in_blocks, count * in_blocks),
                sums: shared.2.part(first * in_blocks, count * in_blocks),
                vector_sums: shared.3.part(first * in_sums, count * in_sums),
            }
        };
        let strip = Strip { source, r0: first * PANEL, panels: count, packing, role };
        match conversion {
            Conversion::Mxfp4(quantization) => mxfp4_strip(isa, strip, &quantization, &range, out),
            Conversion::Bf16 => bf16_strip(isa, strip, out.words, out.vector_sums),
            Conversion::F32 => {
                let words = bytemuck::cast_slice_mut(out.words);
                f32_strip(isa, strip, words, out.vector_sums);
            }
        }
    });
    let scale_bytes = (255 - range.below.into_inner(), range.max.into_inner());
    Packed { format, packing, rows: source.rows, steps, words, scales, sums, scale_bytes }
}

/// Adds 16 elements of each vector of a panel to their sums, (panels, 16), in order; none if empty.
#[inline(always)]
unsafe fn add_to_sums<L: Lanes>(values: &[L::F; PANEL], sums: &mut [f32], panel: usize) {
    if sums.is_empty() {
        return;
    }
    let sums = &mut sums[panel * PANEL..][..PANEL];
    // SAFETY: passed on; `sums` has 16 elements.
    unsafe {
        let mut sum = L::load(sums.as_ptr());
        for i in 0..PANEL {
            sum = L::add(sum, values[i]);
        }
        L::store(sums.as_mut_ptr(), sum);
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
