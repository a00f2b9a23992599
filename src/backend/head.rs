//! The language-model head and its loss. The logits of more than a chunk of rows are never held.

use super::{Memory, Precision};
use crate::Result;

/// Sizes of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// B T.
    pub rows: usize,
    /// C.
    pub channels: usize,
    /// V.
    pub vocab_size: usize,
    /// Of its products.
    pub precision: Precision,
}

/// What [`Head::classifier`] works on.
pub struct Classifier<'a, B: Memory> {
    /// (rows), overwritten.
    pub losses: &'a mut B::F32,
    /// Where gradients go, if they are wanted.
    pub gradient: Option<ClassifierGradient<'a, B>>,
    /// (rows, C)
    pub x: &'a B::Tensor,
    /// The head's weights (V, C): the token embedding's, unless the model has others.
    pub w: B::Param<'a>,
    /// (rows)
    pub targets: &'a B::Tokens,
}

/// What [`Head::classifier_of_host`] works on: fields as those of [`Classifier`].
pub struct HostClassifier<'a, B: Memory> {
    /// (rows), overwritten by the host.
    pub losses: &'a mut B::F32,
    /// Where gradients go, if they are wanted; else what the host makes of logits is dropped.
    pub gradient: Option<ClassifierGradient<'a, B>>,
    /// (rows, C)
    pub x: &'a B::Tensor,
    /// (V, C)
    pub w: B::Param<'a>,
}

/// Some rows of a batch on their way through a loss of the host's.
#[derive(Debug)]
pub struct LogitRows<'a> {
    /// The number of the first: position t of sequence b is row b T + t.
    pub first: usize,
    /// (rows, V), row-major: logits, to be replaced by the gradient of each row's loss in them. What
    /// stands in rows whose weight is 0 does not count.
    pub logits: &'a mut [f32],
    /// (rows), NaN, to be overwritten with their losses.
    pub losses: &'a mut [f32],
}

/// A loss of the host's: what it is of some rows, and its gradient. Rows come in their order, each
/// once.
pub type HostLoss<'a> = dyn FnMut(LogitRows<'_>) -> Result<()> + 'a;

/// Where [`Head::classifier`] puts the gradients of `scale` times the sum of the losses, each times
/// its weight.
pub struct ClassifierGradient<'a, B: Memory> {
    /// (rows, C), overwritten.
    pub dx: &'a mut B::Tensor,
    /// (V, C), overwritten, or with `accumulate` added to; None where w is not trained.
    pub dw: Option<B::Gradient<'a>>,
    /// (rows): a factor of each loss, where they have any.
    pub weights: Option<&'a B::F32>,
    /// Factor of all losses.
    pub scale: f32,
    /// Whether what dw held counts.
    pub accumulate: bool,
}

/// What [`Head::worst_losses`] works on.
pub struct WorstLosses<'a, B: Memory> {
    /// (rows), overwritten: those of [`Head::classifier`], bit for bit.
    pub losses: &'a mut B::F32,
    /// (rows), overwritten: the largest loss that there is when each logit y moves by up to
    /// `epsilon` (|y| + 1).
    pub worst: &'a mut B::F32,
    /// (rows), overwritten: the largest |y|.
    pub amax: &'a mut B::F32,
    /// As [`Classifier::x`].
    pub x: &'a B::Tensor,
    /// As [`Classifier::w`].
    pub w: B::Param<'a>,
    /// As [`Classifier::targets`].
    pub targets: &'a B::Tokens,
    /// From above 0 to 1.
    pub epsilon: f32,
}

/// The head.
pub trait Head: Memory {
    /// Cross-entropy of softmax(x w^T) against `targets`, one loss a row, and its gradients.
    fn classifier(
        &self,
        workspace: &mut Self::Workspace,
        operands: Classifier<'_, Self>,
        shape: HeadShape,
    );
    /// The same of a loss that the host makes of logits, on the thread of this call; its error ends the
    /// pass. Waits for the device.
    fn classifier_of_host(
        &self,
        workspace: &mut Self::Workspace,
        operands: HostClassifier<'_, Self>,
        shape: HeadShape,
        loss: &mut HostLoss<'_>,
    ) -> Result<()>;
    /// Losses as they are and at their worst, for evaluations. A loss falls in the target's logit
    /// and rises in all others, so that the worst is where the target's is `epsilon` (|y| + 1)
    /// lower and the others as much higher.
    fn worst_losses(
        &self,
        workspace: &mut Self::Workspace,
        operands: WorstLosses<'_, Self>,
        shape: HeadShape,
    );
    /// Logits (V) of row `row` of x (rows, C).
    fn logits(
        &self,
        workspace: &mut Self::Workspace,
        logits: &mut Self::F32,
        x: &Self::Tensor,
        row: usize,
        w: Self::Param<'_>,
        shape: HeadShape,
    );
}
