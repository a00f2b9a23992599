//! Scratch memory: cuBLASLt's own, a chunk of logits, quantized operands, partial sums.

use super::layernorm;
use super::linear;
use super::memory::{Arena, Piece, size_of_element};
use super::roads::Road;
use super::{classifier, gemm};
use crate::backend::{HeadShape, LinearShape, WorkspaceShape};
use crate::mx::{Format, Gemm};

/// Scratch memory for models of one shape.
pub(crate) struct Workspace {
    /// [`gemm::WORKSPACE`] bytes for cuBLASLt.
    pub(super) gemm: Piece,
    /// One chunk of logits, then their gradients: (chunk, stride) in the activations' precision.
    pub(super) logits: Piece,
    /// Rows of a chunk.
    pub(super) chunk: usize,
    /// (B, H, T) f32: row sums of dout * out in attention's backward pass.
    pub(super) delta: Piece,
    /// f32 partial sums of norms' and bias gradients.
    pub(super) partials: Piece,
    /// The two operands of a GEMM whose formats differ from the activations': bf16.
    pub(super) operands: [Piece; 2],
    /// Bytes from the start of the first operand's room to its second form, where FP8 needs half of it for
    /// each.
    pub(super) second_form: u64,
    /// x as FP8 keeps it: bf16.
    pub(super) kept: Piece,
    /// The f32 factors of the two operands, or the scales of their blocks.
    pub(super) scales: [Piece; 2],
    /// Bytes from the start of the first operand's to those of its second form.
    pub(super) second_scales: u64,
    /// One word each: the bits of the largest magnitude of what an operand is made from, where no kernel
    /// noted it, and of x as FP8 keeps it.
    pub(super) most: [Piece; 3],
    /// [`linear::BehindGelu::attempt`], where no zeroed words are left.
    pub(super) attempt: Piece,
    /// One word: blocks that were raised since the last step ended.
    pub(super) raised: Piece,
}

impl Workspace {
    pub(super) fn new(arena: &mut Arena, shape: &WorkspaceShape) -> Self {
        let WorkspaceShape { linears, norm, attention, head, recipes, backward: training } = *shape;
        let HeadShape { rows, channels, vocab_size, precision } = head;
        let chunk = classifier::chunk_rows(rows, vocab_size);
        // A row of x may be copied there.
        let logits =
            (chunk * classifier::stride(vocab_size)).max(channels) * size_of_element(precision);
        let most = |of: fn(&LinearShape) -> usize| linears.iter().map(of).max().unwrap_or(0);
        let partials = most(|layer| linear::partials(layer.rows, layer.outputs));
        let partials = layernorm::partials(norm.channels).max(partials) * usize::from(training);

        let fp8 = recipes.iter().any(|recipe| recipe.forward().format() == Format::E4M3);
        let in_mxfp4 = shape.backward_gemms().filter(|gemm| gemm.format() == Format::MXFP4);
        // As if both products were padded to the longer one's group, which costs next to nothing.
        let group = in_mxfp4.map(Gemm::group).max();
        let road = Road::of(arena.capability());
        let (mut operands, mut scales) = ([0; 2], [4; 2]);
        for LinearShape { rows, inputs, outputs } in linears.iter().copied() {
            let mut room = |first: usize, second: usize| {
                operands = [operands[0].max(first), operands[1].max(second)];
            };
            if fp8 {
                room(0, outputs * inputs);
            }
            if let Some(group) = group {
                let padded = |n: usize| n.next_multiple_of(group);
                room(rows * padded(outputs), inputs * padded(outputs));
                room(outputs * padded(rows), inputs * padded(rows));
                for (first, second, depth) in [(rows, inputs, outputs), (outputs, inputs, rows)] {
                    let bytes = [first, second].map(|n| road.scale_bytes(n, padded(depth)));
                    scales = [scales[0].max(bytes[0]), scales[1].max(bytes[1])];
                }
            }
        }
        // cuBLASLt wants those of blocks aligned to 16 bytes.
        let second_scales = scales[0].next_multiple_of(16);
        if road.has_block_scales() {
            scales[0] += second_scales;
        }
        Self {
            gemm: arena.bytes(gemm::WORKSPACE),
            logits: arena.bytes(logits),
            chunk,
            delta: arena.bytes(if training {
                attention.sequences.rows() * attention.heads * 4
            } else {
                0
            }),
            partials: arena.bytes(partials * 4),
            operands: operands.map(|len| arena.bytes(len * 2)),
            second_form: operands[0] as u64,
            kept: arena.bytes(if fp8 { most(|layer| layer.rows * layer.inputs) * 2 } else { 0 }),
            scales: scales.map(|bytes| arena.bytes(bytes)),
            second_scales: second_scales as u64,
            most: [0; 3].map(|_| arena.bytes(4)),
            attempt: arena.bytes(4 * linear::BehindGelu::WORDS as usize),
            raised: arena.bytes(4),
        }
    }
}
