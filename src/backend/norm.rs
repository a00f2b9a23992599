//! LayerNorm and RMSNorm, alone and behind a residual sum.

use super::Memory;

/// What a row is normalized by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum NormKind {
    /// LayerNorm (Ba et al. 2016, arXiv 1607.06450): its mean, and its deviation from that.
    #[default]
    Layer,
    /// RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): the root of its mean square.
    Rms,
}

/// Sizes of a norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormShape {
    /// B T.
    pub rows: usize,
    /// C.
    pub channels: usize,
    /// Added to the variance, or to the mean square.
    pub epsilon: f32,
    /// Which norm it is.
    pub kind: NormKind,
}

/// What every row that a norm saw was normalized by, (rows) each.
pub struct NormStatistics<T> {
    /// Mean; not written by RMSNorm, and not read.
    pub mean: T,
    /// 1 / sqrt(variance + epsilon), or of the mean square in the variance's place.
    pub rstd: T,
}

impl<T> NormStatistics<T> {
    /// Borrows both.
    pub fn as_ref(&self) -> NormStatistics<&T> {
        NormStatistics { mean: &self.mean, rstd: &self.rstd }
    }

    /// Borrows both, to be overwritten.
    pub fn as_mut(&mut self) -> NormStatistics<&mut T> {
        NormStatistics { mean: &mut self.mean, rstd: &mut self.rstd }
    }
}

/// Weights of a norm.
pub struct NormParams<'a, B: Memory> {
    /// (C)
    pub w: B::Param<'a>,
    /// (C); RMSNorm has none.
    pub b: Option<B::Param<'a>>,
}

/// A sum of the residual stream.
pub struct ResidualSum<'a, B: Memory> {
    /// (rows, C) = x + y, overwritten.
    pub sum: &'a mut B::Tensor,
    /// (rows, C)
    pub x: &'a B::Tensor,
    /// (rows, C)
    pub y: &'a B::Tensor,
}

/// What the backward pass of a norm works on.
pub struct NormBackward<'a, B: Memory> {
    /// (rows, C), added to.
    pub dx: &'a mut B::Tensor,
    /// (C), overwritten, or with `accumulate` added to; None where w is not trained.
    pub dw: Option<B::Gradient<'a>>,
    /// The same; None of RMSNorm.
    pub db: Option<B::Gradient<'a>>,
    /// (rows, C)
    pub dy: &'a B::Tensor,
    /// (rows, C)
    pub x: &'a B::Tensor,
    /// Of the forward pass.
    pub statistics: NormStatistics<&'a B::F32>,
    /// (C)
    pub w: B::Param<'a>,
    /// Whether what dw and db held counts.
    pub accumulate: bool,
}

/// Norms.
pub trait Norm: Memory {
    /// out (rows, C) = (x - mean) rstd w + b, or of RMSNorm x rstd w, and the statistics for the
    /// backward pass.
    fn norm_forward(
        &self,
        out: &mut Self::Tensor,
        statistics: NormStatistics<&mut Self::F32>,
        x: &Self::Tensor,
        params: NormParams<'_, Self>,
        shape: NormShape,
    );
    /// A sum, then the norm of that sum.
    fn add_norm_forward(
        &self,
        out: &mut Self::Tensor,
        statistics: NormStatistics<&mut Self::F32>,
        sum: ResidualSum<'_, Self>,
        params: NormParams<'_, Self>,
        shape: NormShape,
    );
    /// Gradients of x, w and b.
    fn norm_backward(
        &self,
        workspace: &mut Self::Workspace,
        operands: NormBackward<'_, Self>,
        shape: NormShape,
    );
}
