//! What is trained beside linear layers (LoRA): y gets scale (x A^T) B^T added.

use super::{Linear, Precision};

/// Sizes of an adapter of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraShape {
    /// B T.
    pub rows: usize,
    /// Channels that come in.
    pub inputs: usize,
    /// Channels that go out.
    pub outputs: usize,
    /// Of the product B A.
    pub rank: usize,
    /// What the product is multiplied by.
    pub scale: f32,
    /// Of its products.
    pub precision: Precision,
}

/// What the forward pass of an adapter works on.
pub struct LoraForward<'a, B: Linear> {
    /// (rows, outputs), the layer's result, added to.
    pub y: &'a mut B::Tensor,
    /// (rows, rank) = x A^T, overwritten.
    pub low: &'a mut B::Tensor,
    /// (rows, inputs)
    pub x: &'a B::Tensor,
    /// A (rank, inputs)
    pub a: B::Param<'a>,
    /// B (outputs, rank)
    pub b: B::Param<'a>,
}

/// What the backward pass of an adapter works on.
pub struct LoraBackward<'a, B: Linear> {
    /// (rows, inputs), the layer's, added to: scale (dy B) A.
    pub dx: &'a mut B::Tensor,
    /// (rank, inputs) = scale (dy B)^T x, overwritten, or with `accumulate` added to; None where A is
    /// not trained.
    pub da: Option<B::Gradient<'a>>,
    /// (outputs, rank) = scale dy^T low, the same.
    pub db: Option<B::Gradient<'a>>,
    /// (rows, outputs)
    pub dy: &'a B::Tensor,
    /// (rows, inputs)
    pub x: &'a B::Tensor,
    /// (rows, rank), of the forward pass.
    pub low: &'a B::Tensor,
    /// A (rank, inputs)
    pub a: B::Param<'a>,
    /// B (outputs, rank)
    pub b: B::Param<'a>,
    /// Whether what da and db held counts.
    pub accumulate: bool,
}

/// Adapters of linear layers. Their products are of numbers in f32 or bf16, whatever the recipe.
pub trait Adapt: Linear {
    /// y += scale (x A^T) B^T.
    fn lora_forward(
        &self,
        workspace: &mut Self::Workspace,
        operands: LoraForward<'_, Self>,
        shape: LoraShape,
    );
    /// Gradients of x, A and B.
    fn lora_backward(
        &self,
        workspace: &mut Self::Workspace,
        operands: LoraBackward<'_, Self>,
        shape: LoraShape,
    );
}
