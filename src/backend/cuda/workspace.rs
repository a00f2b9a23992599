//! Scratch memory: cuBLASLt's own, a chunk of logits, quantized operands, partial sums.

use super::carrier::Road;
use super::classifier;
use super::device::gemm;
use super::device::memory::{Arena, Piece, size_of_element};
use super::layernorm;
use super::linear;
use crate::backend::{Precision, WorkspaceShape};
use crate::recipe::Forward;

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
        let WorkspaceShape {
            sequences,
            channels: c,
            mlp_channels: m,
            heads,
            vocab_size,
            forward,
            backward,
        } = *shape;
        let rows = sequences.rows();
        let precision = Precision::of(forward);
        let chunk = classifier::chunk_rows(rows, vocab_size);
        // A row of x may be copied there.
        let logits = (chunk * classifier::stride(vocab_size)).max(c) * size_of_element(precision);
        let training = backward.is_some();
        let partials = layernorm::partials(c).max(linear::partials(rows, m.max(3 * c)))
            * usize::from(training);

        let fp8 = forward == Forward::Fp8;
        let group = backward.and_then(|backward| backward.mxfp4_group);
        let road = Road::of(arena.capability());
        let (mut operands, mut scales) = ([0; 2], [4; 2]);
        for (inputs, outputs) in [(c, 3 * c), (c, c), (c, m), (m, c)] {
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
            delta: arena.bytes(if training { rows * heads * 4 } else { 0 }),
            partials: arena.bytes(partials * 4),
            operands: operands.map(|len| arena.bytes(len * 2)),
            second_form: operands[0] as u64,
            kept: arena.bytes(if fp8 { rows * m.max(c) * 2 } else { 0 }),
            scales: scales.map(|bytes| arena.bytes(bytes)),
            second_scales: second_scales as u64,
            most: [0; 3].map(|_| arena.bytes(4)),
            attempt: arena.bytes(4 * linear::BehindGelu::WORDS as usize),
            raised: arena.bytes(4),
        }
    }
}
