//! Scratch memory: cuBLASLt's own, a chunk of logits, quantized operands, partial sums.

use super::decode::Few;
use super::device::gemm;
use super::device::memory::{Arena, Piece};
use super::quantize::carrier::Carrier;
use super::quantize::{Behind, Target, sums, values};
use super::{head, merge, norm, rotary};
use crate::backend::{HeadShape, LinearShape, WorkspaceShape};
use crate::formats::{BLOCK, Format, Gemm};

/// Room for an operand of a product: its elements, and FP8's factor or the scales of its blocks.
pub(super) struct Room {
    pub(super) elements: Piece,
    pub(super) scales: Piece,
}

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
    /// The left operand of a product whose format differs from the activations': dy, in one or two
    /// forms.
    pub(super) left: Room,
    /// The right one: W or x. Where a text is written, what many rows lay out.
    pub(super) right: Room,
    /// Bytes from the start of the left one's room to its form down columns, where FP8 needs half
    /// of it for each; and the same of its scales.
    columns_at: [u64; 2],
    /// x as FP8 keeps it: bf16, or in the forward pass E4M3 bytes.
    pub(super) kept: Piece,
    /// One word each: the bits of the largest magnitudes of dy and x, where no kernel noted them,
    /// and of x as FP8 keeps it.
    pub(super) dy_amax: Piece,
    pub(super) x_amax: Piece,
    pub(super) kept_amax: Piece,
    /// [`Behind::attempt`], where no zeroed words are left.
    pub(super) attempt: Piece,
    /// Of products whose operands are made as numbers.
    pub(super) values: values::Room,
    /// The gradient of what lies between the two matrices of an adapter: (rows, rank) in the
    /// activations' precision.
    pub(super) low: Piece,
    /// Of channels that are merged.
    pub(super) merge: merge::Room,
    /// One word: blocks whose scales were clamped since the last step ended.
    pub(super) clamped: Piece,
}

impl Workspace {
    pub(super) fn new(arena: &mut Arena, shape: &WorkspaceShape<'_>) -> Self {
        let WorkspaceShape {
            linears,
            norm,
            attention,
            head,
            recipes,
            merge,
            packed,
            adapters,
            backward: training,
        } = *shape;
        let HeadShape { rows, channels, vocab_size, precision } = head;
        let chunk = head::chunk_rows(rows, vocab_size);
        // A row of x may be copied there.
        let logits = (chunk * head::stride(vocab_size)).max(channels) * precision.size();
        let most = |of: fn(&LinearShape) -> usize| linears.iter().map(of).max().unwrap_or(0);
        let partials = most(|layer| sums::partials(layer.rows, layer.outputs));
        let of_norms = norm::partials(norm.channels).max(rotary::partials(attention.head_size));
        let partials = of_norms.max(partials) * usize::from(training);

        let fp8 = recipes.iter().any(|recipe| recipe.forward().is_in(Format::E4M3));
        let carrier = Carrier::best(Format::MXFP4, arena.capability());
        let in_powers = |gemm: &Gemm| carrier == Carrier::Fp8 && values::is_in_powers(gemm);
        let in_mxfp4 =
            shape.backward_gemms().filter(|gemm| gemm.is_in(Format::MXFP4) || in_powers(gemm));
        // As if both products were padded to the longer one's group, which costs next to nothing.
        let group = in_mxfp4.map(Gemm::group).max();
        let mxfp4_forward = recipes.iter().any(|recipe| in_powers(recipe.forward()));
        let (mut operands, mut scales) = ([0; 2], [4; 2]);
        for LinearShape { rows, inputs, outputs } in linears.iter().copied() {
            let mut room = |first: usize, second: usize| {
                operands = [operands[0].max(first), operands[1].max(second)];
            };
            if fp8 {
                room(0, outputs * inputs);
            }
            if mxfp4_forward {
                let depth = inputs.next_multiple_of(BLOCK);
                room(rows * depth, outputs * depth);
            }
            if let Some(group) = group {
                let padded = |n: usize| n.next_multiple_of(group);
                room(rows * padded(outputs), inputs * padded(outputs));
                room(outputs * padded(rows), inputs * padded(rows));
                for (first, second, depth) in [(rows, inputs, outputs), (outputs, inputs, rows)] {
                    let bytes = [first, second].map(|n| carrier.scale_bytes(n, padded(depth)));
                    scales = [scales[0].max(bytes[0]), scales[1].max(bytes[1])];
                }
            }
        }
        // cuBLASLt wants those of blocks aligned to 16 bytes.
        let second_scales = scales[0].next_multiple_of(16);
        if carrier.has_block_scales() {
            scales[0] += second_scales;
        }
        let values = values::Size::new(shape, arena.capability());
        let laid_out = |(layer, weights): &_| Few::laid_out(*layer, *weights, precision);
        let laid_out = [0, packed.iter().map(laid_out).max().unwrap_or(0)];
        let low = adapters.iter().map(|of| of.rows * of.rank * of.precision.size());
        let low = low.filter(|_| training).max().unwrap_or(0);
        let mut room = |side: usize| Room {
            elements: arena
                .bytes((operands[side] * 2).max(values.operands[side]).max(laid_out[side])),
            scales: arena.bytes(scales[side]),
        };
        Self {
            left: room(0),
            right: room(1),
            columns_at: [operands[0] as u64, second_scales as u64],
            gemm: arena.bytes(gemm::WORKSPACE),
            logits: arena.bytes(logits),
            chunk,
            delta: arena.bytes(if training {
                attention.sequences.rows() * attention.heads * 4
            } else {
                0
            }),
            partials: arena.bytes(partials * 4),
            kept: arena.bytes(if fp8 { most(|layer| layer.rows * layer.inputs) * 2 } else { 0 }),
            dy_amax: arena.bytes(4),
            x_amax: arena.bytes(4),
            kept_amax: arena.bytes(4),
            attempt: arena.bytes(4 * Behind::WORDS as usize),
            clamped: arena.bytes(4),
            values: values.cut(arena),
            low: arena.bytes(low),
            merge: merge::Room::new(arena, merge),
        }
    }

    /// Where a carrier's operands go: dy along rows and down columns, and the other one.
    pub(super) fn targets(&self, carrier: Carrier) -> [Target; 3] {
        let [left, right] = carrier.types(Format::MXFP4);
        let target = |format, room: &Room, [elements, scales]: [u64; 2]| Target {
            format,
            out: room.elements.address + elements,
            scales: room.scales.address + scales,
        };
        let [elements, scales] = self.columns_at;
        let columns_at = match carrier {
            // One form at a time.
            Carrier::Bf16 | Carrier::Int8 => [0, 0],
            // One factor for both.
            Carrier::Fp8 => [elements, 0],
            Carrier::Mxfp8 | Carrier::Fp4 => [elements, scales],
        };
        [
            target(left, &self.left, [0, 0]),
            target(left, &self.left, columns_at),
            target(right, &self.right, [0, 0]),
        ]
    }
}
