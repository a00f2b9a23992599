//! Linear layers, with what is fused to their ends.

use super::{Memory, Part};
use crate::formats::{LinearRecipe, Random};

/// What an MLP without a gate applies between its two layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// GELU in its tanh form, x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as GPT-2 has it.
    #[default]
    GeluTanh,
    /// GELU itself, x times the normal distribution's probability of less than x.
    Gelu,
}

/// Sizes of a linear layer: y (rows, outputs) = x (rows, inputs) W (outputs, inputs)^T + b.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// B T.
    pub rows: usize,
    /// Channels that come in.
    pub inputs: usize,
    /// Channels that go out.
    pub outputs: usize,
}

/// What happens to a layer's result as it leaves.
pub enum Epilogue<'a, B: Memory> {
    /// Nothing.
    None,
    /// out (rows, outputs) = gelu(y), in one of GELU's forms.
    Gelu {
        /// Overwritten.
        out: &'a mut B::Tensor,
        /// Which GELU.
        form: Activation,
    },
    /// out (rows, M) = silu(gate) up of y = [gate | up] (rows, 2 M), where silu(x) = x / (1 + e^-x)
    /// (Shazeer 2020, "GLU Variants Improve Transformer", arXiv 2002.05202).
    SwiGlu {
        /// Overwritten.
        out: &'a mut B::Tensor,
    },
}

/// What the forward pass of a layer works on.
pub struct LinearForward<'a, B: Linear> {
    /// (rows, outputs), overwritten.
    pub y: &'a mut B::Tensor,
    /// (rows, inputs)
    pub x: &'a B::Tensor,
    /// (outputs, inputs)
    pub w: B::Param<'a>,
    /// (outputs), where it has any.
    pub b: Option<B::Param<'a>>,
    /// (outputs, inputs): the slow mean of W, where the recipe rounds W by it.
    pub mean: Option<Part<'a, B>>,
    /// What y passes through besides.
    pub epilogue: Epilogue<'a, B>,
    /// Overwritten, where there is any.
    pub turned: Option<&'a mut B::Turned>,
}

/// The gradient dy (rows, outputs) of a layer's result.
pub enum OutputGradient<'a, B: Memory> {
    /// As such.
    Whole(&'a B::Tensor),
    /// dy = d gelu'(y), where d is the gradient of gelu(y).
    BehindGelu {
        /// (rows, outputs). What it holds afterwards is not said.
        d: &'a mut B::Tensor,
        /// The layer's result.
        y: &'a B::Tensor,
        /// Which GELU.
        form: Activation,
    },
    /// dy of y = [gate | up], where d is the gradient of silu(gate) up.
    BehindSwiGlu {
        /// (rows, outputs / 2)
        d: &'a B::Tensor,
        /// The layer's result, in whose place dy may be put: what it holds afterwards is not said.
        y: &'a mut B::Tensor,
    },
}

/// What the backward pass of a layer works on.
pub struct LinearBackward<'a, B: Linear> {
    /// (rows, inputs) = dy W, overwritten.
    pub dx: &'a mut B::Tensor,
    /// (outputs, inputs) = dy^T x, overwritten, or with `accumulate` added to; None where W is not
    /// trained, which spares the product.
    pub dw: Option<B::Gradient<'a>>,
    /// (outputs) = the column sums of dy, the same, and None of a layer without b.
    pub db: Option<B::Gradient<'a>>,
    /// dy (rows, outputs)
    pub dy: OutputGradient<'a, B>,
    /// (rows, inputs); not read where `turned` has what is needed of it.
    pub x: &'a B::Tensor,
    /// What the forward pass left of x and W.
    pub turned: Option<&'a B::Turned>,
    /// (outputs, inputs)
    pub w: B::Param<'a>,
    /// (outputs, inputs): the slow mean of W, where the recipe's forward pass rounds W by it.
    pub mean: Option<Part<'a, B>>,
    /// Whether what dw and db held counts.
    pub accumulate: bool,
}

/// The numbers that a GEMM is multiplied in, whatever the formats of its operands: those of its
/// carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Numbers {
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// Integers: elements of MXFP4, which are multiples of a half.
    Integers,
    /// Integers of 8 bits with a scale a vector or a tensor.
    Int8,
    /// FP8 with one scale a tensor.
    Fp8,
    /// FP8 with a scale for each block.
    Mxfp8,
    /// FP4 with a scale for each block.
    Fp4,
}

impl Numbers {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Integers => "integers",
            Self::Int8 => "int8",
            Self::Fp8 => "FP8",
            Self::Mxfp8 => "MXFP8",
            Self::Fp4 => "FP4",
        }
    }
}

/// Linear layers, and the activation between them.
pub trait Linear: Memory {
    /// Operands of a layer's backward pass that its forward pass makes as it reads x and W.
    type Turned: Send;

    /// Whether a layer's forward pass can make them by this recipe. A layer that has them does not
    /// read x in its backward pass.
    fn turns(&self, shape: LinearShape, recipe: &LinearRecipe) -> bool;
    /// Room for them, where it can.
    fn turned(&self, arena: &mut Self::Arena, shape: LinearShape) -> Self::Turned;
    /// y = x W^T + b, or without a b x W^T.
    fn linear_forward(
        &self,
        workspace: &mut Self::Workspace,
        operands: LinearForward<'_, Self>,
        shape: LinearShape,
        recipe: &LinearRecipe,
    );
    /// Gradients of x, W and b.
    ///
    /// `random` says where in the run this is, for the bits of rounding and transforms.
    fn linear_backward(
        &self,
        workspace: &mut Self::Workspace,
        operands: LinearBackward<'_, Self>,
        shape: LinearShape,
        recipe: &LinearRecipe,
        random: &Random,
    );
    /// What multiplies the GEMMs of a layer of this shape: forward, dgrad and wgrad.
    fn numbers(&self, shape: LinearShape, recipe: &LinearRecipe) -> [Numbers; 3];
    /// out = gelu(x), both of `len` elements.
    fn gelu_forward(&self, out: &mut Self::Tensor, x: &Self::Tensor, len: usize, form: Activation);
    /// d = d gelu'(x), in place, both of `len` elements.
    fn gelu_backward(&self, d: &mut Self::Tensor, x: &Self::Tensor, len: usize, form: Activation);
    /// out (rows, M) = silu(gate) up of y = [gate | up] (rows, 2 M).
    fn swiglu_forward(&self, out: &mut Self::Tensor, y: &Self::Tensor, rows: usize, m: usize);
    /// y = [gate | up] (rows, 2 M) becomes the gradient of itself, d (rows, M) being that of
    /// silu(gate) up.
    fn swiglu_backward(&self, y: &mut Self::Tensor, d: &Self::Tensor, rows: usize, m: usize);
}
