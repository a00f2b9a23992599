//! Scratch memory: packed GEMM operands, a chunk of logits, and what each attention thread needs.

use super::gemm::{BLOCK_STEPS, Format, Layout, PANEL, PackedMut};
use super::memory::{Arena, Buffer};
use super::{Isa, attention, classifier};
use crate::backend::WorkspaceShape;
use crate::mx::{Gemm, LinearRecipe};

/// Scratch memory for models of one shape.
pub struct Workspace {
    /// Operand A of a GEMM.
    pub(super) a: PackMemory,
    /// Operand B of a GEMM.
    pub(super) b: PackMemory,
    /// wte^T of the classifier, which keeps two forms of wte over all chunks.
    pub(super) transposed_head: PackMemory,
    /// x^T of one chunk in the classifier's weight gradient.
    pub(super) head_input: PackMemory,
    /// Logits of one chunk of rows, then their gradients.
    pub(super) logits: Buffer<f32>,
    /// (threads, attention::scratch_len)
    pub(super) attention: Buffer<f32>,
    pub(super) attention_len: usize,
}

/// Memory for one packed operand.
pub(super) struct PackMemory {
    words: Buffer<u32>,
    scales: Buffer<f32>,
    sums: Buffer<i32>,
    vector_sums: Buffer<f32>,
}

/// Sizes of a [`PackMemory`], grown to the largest operand asked for.
#[derive(Clone, Copy)]
struct PackSize {
    isa: Isa,
    words: usize,
    blocks: usize,
    lanes: usize,
}

impl PackSize {
    fn new(isa: Isa) -> Self {
        Self { isa, words: 0, blocks: 0, lanes: 0 }
    }

    /// Makes room for `rows` vectors of length `depth`.
    fn add(&mut self, rows: usize, depth: usize, format: Format, group: usize) {
        let depth = depth.next_multiple_of(group);
        let lanes = rows.next_multiple_of(PANEL);
        self.lanes = self.lanes.max(lanes);
        let layout = Layout::best(self.isa, format);
        self.words = self.words.max(lanes * layout.steps(format, depth));
        if format == Format::Mxfp4 {
            // Operands that are not exact in tiles lie in panels, which take fewer words.
            let blocks = lanes * Layout::Panels.steps(format, depth) / BLOCK_STEPS;
            self.blocks = self.blocks.max(blocks);
        }
    }
}

impl PackMemory {
    fn new(arena: &mut Arena, size: PackSize) -> Self {
        Self {
            words: arena.alloc(size.words),
            scales: arena.alloc(size.blocks),
            sums: arena.alloc(size.blocks),
            vector_sums: arena.alloc(size.lanes),
        }
    }

    /// For an operand alone.
    pub(super) fn as_mut(&mut self) -> PackedMut<'_> {
        PackedMut { vector_sums: &mut [], ..self.with_vector_sums() }
    }

    /// For an operand and the sums of its vectors.
    pub(super) fn with_vector_sums(&mut self) -> PackedMut<'_> {
        PackedMut {
            words: &mut self.words,
            scales: &mut self.scales,
            sums: &mut self.sums,
            vector_sums: &mut self.vector_sums,
        }
    }

    /// The sums that packing with [`PackMemory::with_vector_sums`] left.
    pub(super) fn vector_sums(&self) -> &[f32] {
        &self.vector_sums
    }
}

impl Workspace {
    pub(super) fn new(arena: &mut Arena, shape: &WorkspaceShape, threads: usize, isa: Isa) -> Self {
        let WorkspaceShape {
            sequences,
            channels: c,
            mlp_channels: m,
            heads,
            vocab_size,
            recipes,
            backward,
        } = *shape;
        let (rows, precision) = (sequences.rows(), shape.precision());
        let plain = Format::from(precision);
        let (mut a, mut b) = (PackSize::new(isa), PackSize::new(isa));
        for (inputs, outputs) in [(c, 3 * c), (c, c), (c, m), (m, c)] {
            for gemm in recipes.iter().map(LinearRecipe::forward) {
                let (format, group) = (Format::carrying(gemm.format()), gemm.group());
                a.add(rows, inputs, format, group);
                b.add(outputs, inputs, format, group);
            }
            // As if both products were as each is, which costs next to nothing; and bf16 in any
            // case, which recipes fall back to.
            let fallback = backward.then_some(&Gemm::BF16);
            for gemm in shape.backward_gemms().chain(fallback) {
                let (format, group) = (Format::carrying(gemm.format()), gemm.group());
                a.add(rows, outputs, format, group); // dgrad: dy
                b.add(inputs, outputs, format, group); // dgrad: W
                a.add(outputs, rows, format, group); // wgrad: dy
                b.add(inputs, rows, format, group); // wgrad: x
            }
        }
        let (mut transposed_head, mut head_input) = (PackSize::new(isa), PackSize::new(isa));
        let chunk = classifier::chunk_rows(rows, vocab_size);
        a.add(chunk, c, plain, 1);
        b.add(vocab_size, c, plain, 1);
        if backward {
            a.add(chunk, vocab_size, plain, 1);
            a.add(vocab_size, chunk, plain, 1);
            transposed_head.add(c, vocab_size, plain, 1);
            head_input.add(c, chunk, plain, 1);
        }
        let (length, head_size) = (sequences.length, c / heads);
        let attention_len = attention::scratch_len(isa, precision, length, head_size, backward);
        Self {
            a: PackMemory::new(arena, a),
            b: PackMemory::new(arena, b),
            transposed_head: PackMemory::new(arena, transposed_head),
            head_input: PackMemory::new(arena, head_input),
            logits: arena.alloc(chunk * vocab_size),
            attention: arena.alloc(threads * attention_len),
            attention_len,
        }
    }
}
