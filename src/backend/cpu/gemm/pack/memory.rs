//! Memory that operands are packed into, and how much of it they take.

use crate::backend::cpu::arena::{Arena, Buffer};
use crate::backend::cpu::gemm::{BLOCK_STEPS, Format, PANEL, Packed, Packing};
use crate::backend::cpu::isa::Isa;

/// Memory that an operand is packed into; slices may be longer than needed.
pub struct PackedMut<'a> {
    /// See [`super::super::Packed::words`].
    pub words: &'a mut [u32],
    /// See [`super::super::Packed::scales`].
    pub scales: &'a mut [f32],
    /// See [`super::super::Packed::sums`].
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

/// Memory for one packed operand.
pub(in crate::backend::cpu) struct PackMemory {
    words: Buffer<u32>,
    scales: Buffer<f32>,
    sums: Buffer<i32>,
    vector_sums: Buffer<f32>,
}

impl PackMemory {
    pub(in crate::backend::cpu) fn new(arena: &mut Arena, size: PackSize) -> Self {
        Self {
            words: arena.alloc(size.words),
            scales: arena.alloc(size.blocks),
            sums: arena.alloc(size.blocks),
            vector_sums: arena.alloc(size.lanes),
        }
    }

    /// For an operand alone.
    pub(in crate::backend::cpu) fn as_mut(&mut self) -> PackedMut<'_> {
        PackedMut { vector_sums: &mut [], ..self.with_vector_sums() }
    }

    /// For an operand and the sums of its vectors.
    pub(in crate::backend::cpu) fn with_vector_sums(&mut self) -> PackedMut<'_> {
        PackedMut {
            words: &mut self.words,
            scales: &mut self.scales,
            sums: &mut self.sums,
            vector_sums: &mut self.vector_sums,
        }
    }

    /// The operand that was packed into it.
    pub(in crate::backend::cpu) fn packed(&self, layout: Layout) -> Packed<'_> {
        let Layout { format, packing, rows, steps, blocks, scale_bytes } = layout;
        let panels = rows.div_ceil(PANEL);
        Packed {
            format,
            packing,
            rows,
            steps,
            words: &self.words[..panels * steps * PANEL],
            scales: &self.scales[..blocks],
            sums: &self.sums[..blocks],
            scale_bytes,
        }
    }

    /// Where these sums go, for who makes them otherwise; there may be more places than vectors.
    pub(in crate::backend::cpu) fn vector_sums_mut(&mut self) -> &mut [f32] {
        &mut self.vector_sums
    }

    /// The sums that packing with [`PackMemory::with_vector_sums`] left.
    pub(in crate::backend::cpu) fn vector_sums(&self) -> &[f32] {
        &self.vector_sums
    }
}

/// What there is to know of an operand that stays packed, besides where it is.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Layout {
    format: Format,
    packing: Packing,
    rows: usize,
    steps: usize,
    blocks: usize,
    scale_bytes: (u32, u32),
}

impl Packed<'_> {
    /// What [`PackMemory::packed`] is told.
    pub(in crate::backend::cpu) fn layout(&self) -> Layout {
        let Self { format, packing, rows, steps, scales, scale_bytes, .. } = *self;
        Layout { format, packing, rows, steps, blocks: scales.len(), scale_bytes }
    }
}

/// Sizes of a [`PackMemory`], grown to the largest operand asked for.
#[derive(Clone, Copy, Default)]
pub(in crate::backend::cpu) struct PackSize {
    words: usize,
    blocks: usize,
    lanes: usize,
}

impl PackSize {
    /// Makes room for `rows` vectors of length `depth`, which is padded to whole groups.
    pub(in crate::backend::cpu) fn add(
        &mut self,
        isa: Isa,
        [rows, depth]: [usize; 2],
        format: Format,
        group: usize,
    ) {
        let (depth, lanes) = (depth.next_multiple_of(group), rows.next_multiple_of(PANEL));
        let words = lanes * Packing::best(isa, format).steps(format, depth);
        // Operands that are not exact in tiles lie in panels, which take fewer words.
        let blocks = lanes * Packing::Panels.steps(format, depth) / BLOCK_STEPS;
        let blocks = if format == Format::Mxfp4 { blocks } else { 0 };
        *self = self.max(Self { words, blocks, lanes });
    }

    /// Room for either.
    pub(in crate::backend::cpu) fn max(self, other: Self) -> Self {
        Self {
            words: self.words.max(other.words),
            blocks: self.blocks.max(other.blocks),
            lanes: self.lanes.max(other.lanes),
        }
    }
}
