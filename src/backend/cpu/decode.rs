//! A few rows behind those whose keys and values are kept. Products are those of whole sequences,
//! with weights that are packed once: every element is summed in the same order, so that a row has
//! the bits that it has among others.

use super::arena::Arena;
use super::attend::behind;
use super::gemm::{Conversion, Layout, Matrix, Output, PackMemory, PackSize, Role, pack};
use super::workspace::Workspace;
use super::{Buffer, Cpu};
use crate::backend::{
    AttentionShape, Decode, Epilogue, HeadShape, Linear, LinearForward, LinearShape, Precision,
};
use crate::formats::LinearRecipe;

/// A weight, in panels or tiles.
pub struct PackedWeight {
    memory: PackMemory,
    layout: Option<Layout>,
}

fn conversion(recipe: &LinearRecipe) -> Conversion<'static> {
    Conversion::to(Precision::of(recipe.forward()))
}

impl Decode for Cpu {
    type Packed = PackedWeight;

    fn packed(&self, arena: &mut Arena, shape: LinearShape, recipe: &LinearRecipe) -> PackedWeight {
        let LinearShape { inputs, outputs, .. } = shape;
        let mut size = PackSize::default();
        size.add(self.isa(), [outputs, inputs], conversion(recipe).format(), 1);
        PackedWeight { memory: PackMemory::new(arena, size), layout: None }
    }

    fn pack_weight(
        &self,
        packed: &mut PackedWeight,
        w: &[f32],
        LinearShape { inputs, outputs, .. }: LinearShape,
        recipe: &LinearRecipe,
    ) {
        let w = Matrix::rows_by_depth(w, outputs, inputs);
        let memory = packed.memory.as_mut();
        packed.layout = Some(pack(self, &w, conversion(recipe), Role::B, memory).layout());
    }

    fn packed_forward(
        &self,
        workspace: &mut Workspace,
        operands: LinearForward<'_, Self>,
        packed: &PackedWeight,
        LinearShape { rows, inputs, outputs }: LinearShape,
        recipe: &LinearRecipe,
    ) {
        let LinearForward { y, x, b: bias, epilogue, .. } = operands;
        let layout = packed.layout.expect("a weight is packed before it is read");
        let x = Matrix::rows_by_depth(&x[..rows * inputs], rows, inputs);
        let x = pack(self, &x, conversion(recipe), Role::A, workspace.a.as_mut());
        let bias = Some(bias);
        let out = Output { c: y, stride: outputs, alpha: 1.0, bias, accumulate: false };
        self.gemm(x, packed.memory.packed(layout), out);
        if let Epilogue::Gelu { out, form } = epilogue {
            self.gelu_forward(out, y, rows * outputs, form);
        }
    }

    fn packed_logits(
        &self,
        workspace: &mut Workspace,
        logits: &mut Buffer<f32>,
        (x, row): (&Buffer<f32>, usize),
        head: &PackedWeight,
        HeadShape { channels, vocab_size, .. }: HeadShape,
        recipe: &LinearRecipe,
    ) {
        let x = Matrix::rows_by_depth(&x[row * channels..][..channels], 1, channels);
        let x = pack(self, &x, conversion(recipe), Role::A, workspace.a.as_mut());
        let layout = head.layout.expect("a weight is packed before it is read");
        let (c, stride) = (&mut logits[..vocab_size], vocab_size);
        let out = Output { c, stride, alpha: 1.0, bias: None, accumulate: false };
        self.gemm(x, head.memory.packed(layout), out);
    }

    fn kept(&self, arena: &mut Arena, positions: usize, shape: AttentionShape) -> Buffer<f32> {
        arena.alloc(behind::kept_len(positions, shape))
    }

    fn attention_behind(
        &self,
        workspace: &mut Workspace,
        out: &mut Buffer<f32>,
        qkv: &Buffer<f32>,
        kept: &mut Buffer<f32>,
        start: usize,
        shape: AttentionShape,
    ) {
        behind::forward(self, workspace, out, qkv, (kept, start), shape);
    }
}
