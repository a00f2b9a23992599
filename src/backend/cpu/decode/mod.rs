//! A few rows behind those whose keys and values are kept. Products are those of whole sequences,
//! with weights that are packed once: every element is summed in the same order, so that a row has
//! the bits that it has among others. Those of weights in MXFP4 are of their own (`mxfp4`).

mod mxfp4;

use std::ops::Range;

use super::arena::Arena;
use super::attend::behind;
use super::embed::position_behind;
use super::gemm::{Conversion, Layout, Matrix, Output, PackMemory, PackSize, Role, pack};
use super::workspace::Workspace;
use super::{Buffer, Cpu};
use crate::Result;
use crate::backend::{
    AttentionShape, Decode, DecoderWeights, EmbeddingShape, HeadShape, LinearForward, LinearShape,
    Memory, OfSequence, Precision,
};
use crate::optim::Master;
use mxfp4::Mxfp4Weight;

/// A weight as products of few rows read it.
pub struct PackedWeight(Numbers);

enum Numbers {
    /// In panels or tiles, of f32 or bf16.
    Plain {
        /// Of the weight.
        memory: PackMemory,
        /// What it is packed to.
        conversion: Conversion<'static>,
        /// Once it is.
        layout: Option<Layout>,
    },
    /// In 4 bits.
    Mxfp4(Mxfp4Weight),
    /// The head as it lies in f32, for a copy of it would be as long.
    InPlace,
}

impl PackedWeight {
    /// to (rows, outputs) = x (rows, inputs) W^T, and the bias.
    fn product(
        &self,
        cpu: &Cpu,
        workspace: &mut Workspace,
        (to, bias): (&mut [f32], Option<&[f32]>),
        x: &[f32],
        LinearShape { rows, inputs, outputs }: LinearShape,
    ) {
        match &self.0 {
            Numbers::Plain { memory, conversion, layout } => {
                let layout = layout.expect("a weight is packed before it is read");
                let x = Matrix::rows_by_depth(x, rows, inputs);
                let x = pack(cpu, &x, *conversion, Role::A, workspace.a.as_mut());
                let (alpha, accumulate) = (1.0, false);
                let out = Output { c: to, stride: outputs, alpha, bias, accumulate };
                cpu.gemm(x, memory.packed(layout), out);
            }
            Numbers::Mxfp4(weight) => {
                weight.product(cpu, workspace.a.as_mut().words, (to, bias), x, rows);
            }
            Numbers::InPlace => unreachable!("a head has no product"),
        }
    }
}

impl Decode for Cpu {
    type Packed = PackedWeight;

    const ROWS: usize = 128;

    fn activations_in(_weights: DecoderWeights, _master: Master) -> Precision {
        Precision::F32
    }

    fn packed(
        &self,
        arena: &mut Arena,
        LinearShape { inputs, outputs, .. }: LinearShape,
        weights: DecoderWeights,
    ) -> PackedWeight {
        let conversion = match weights {
            DecoderWeights::F32 => Conversion::F32,
            DecoderWeights::Bf16 => Conversion::Bf16,
            DecoderWeights::Mxfp4 => {
                return PackedWeight(Numbers::Mxfp4(Mxfp4Weight::new(arena, outputs, inputs)));
            }
        };
        let mut size = PackSize::default();
        size.add(self.isa(), [outputs, inputs], conversion.format(), 1);
        let memory = PackMemory::new(arena, size);
        PackedWeight(Numbers::Plain { memory, conversion, layout: None })
    }

    fn packed_head(
        &self,
        arena: &mut Arena,
        shape: LinearShape,
        weights: DecoderWeights,
    ) -> PackedWeight {
        match weights {
            DecoderWeights::F32 => PackedWeight(Numbers::InPlace),
            _ => self.packed(arena, shape, weights),
        }
    }

    fn pack_weight(
        &self,
        packed: &mut PackedWeight,
        w: &[f32],
        LinearShape { inputs, outputs, .. }: LinearShape,
    ) {
        match &mut packed.0 {
            Numbers::Plain { memory, conversion, layout } => {
                let w = Matrix::rows_by_depth(w, outputs, inputs);
                *layout = Some(pack(self, &w, *conversion, Role::B, memory.as_mut()).layout());
            }
            Numbers::Mxfp4(weight) => weight.fill(self, w),
            Numbers::InPlace => {}
        }
    }

    fn packed_forward(
        &self,
        workspace: &mut Workspace,
        operands: LinearForward<'_, Self>,
        packed: &PackedWeight,
        shape: LinearShape,
    ) {
        let LinearForward { y, x, b: bias, epilogue, .. } = operands;
        let LinearShape { rows, inputs, outputs } = shape;
        let to = (&mut y[..rows * outputs], bias);
        packed.product(self, workspace, to, &x[..rows * inputs], shape);
        self.end_linear(y, epilogue, rows, outputs);
    }

    fn packed_logits(
        &self,
        workspace: &mut Workspace,
        logits: &mut Buffer<f32>,
        (x, rows): (&Buffer<f32>, Range<usize>),
        (w, head): (&[f32], &PackedWeight),
        HeadShape { channels, vocab_size, .. }: HeadShape,
    ) {
        let shape = LinearShape { rows: rows.len(), inputs: channels, outputs: vocab_size };
        let (x, to) = (
            &x[rows.start * channels..rows.end * channels],
            &mut logits[..rows.len() * vocab_size],
        );
        match head.0 {
            Numbers::InPlace => self.logits_in_place(to, x, (w, channels), Precision::F32),
            _ => head.product(self, workspace, (to, None), x, shape),
        }
    }

    fn rows(&self, arena: &mut Arena, rows: usize) -> Result<Self::Tokens> {
        self.tokens(arena, rows, false)
    }

    fn write_rows(&self, to: &mut Self::Tokens, tokens: &[u32], _starts: &[usize]) {
        self.write_tokens(to, tokens.len(), |to| to.copy_from_slice(tokens));
    }

    fn embedding_behind(
        &self,
        out: &mut Buffer<f32>,
        (tokens, starts): (&Self::Tokens, &[usize]),
        wte: &[f32],
        wpe: Option<&[f32]>,
        EmbeddingShape { sequences, channels }: EmbeddingShape,
    ) {
        let position =
            wpe.map(|wpe| move |row| &wpe[position_behind(starts, row) * channels..][..channels]);
        self.embed_rows(out, tokens, wte, (sequences.rows(), channels), position);
    }

    fn rotations_behind(
        &self,
        table: &mut Buffer<f32>,
        frequencies: &[f32],
        (_, starts): (&Self::Tokens, &[usize]),
        shape: AttentionShape,
    ) {
        let position = |row| position_behind(starts, row);
        self.turn_by(table, frequencies, shape.sequences.rows(), position);
    }

    fn kept(&self, arena: &mut Arena, positions: usize, shape: AttentionShape) -> Buffer<f32> {
        arena.alloc(behind::kept_len(positions, shape))
    }

    fn copy_kept(&self, from: &Buffer<f32>, to: &mut Buffer<f32>) {
        to.copy_from_slice(from);
    }

    fn attention_behind(
        &self,
        workspace: &mut Workspace,
        out: &mut Buffer<f32>,
        qkv: &Buffer<f32>,
        kept: &mut Buffer<f32>,
        (_, OfSequence { first, start, .. }): (&Self::Tokens, OfSequence),
        shape: AttentionShape,
    ) {
        let out = &mut out[first * shape.channels()..];
        let qkv = &qkv[first * shape.qkv_channels()..];
        behind::forward(self, workspace, out, qkv, (kept, start), shape);
    }
}
