//! The head's part of an evaluation that asks how bad losses could be.

use super::{Activations, Pass, Shapes};
use crate::backend::{Backend, WorstLosses};

/// Where [`Pass::worst_losses`] puts what it finds, one number a row.
pub(crate) struct WorstOf<'a, B: Backend> {
    /// Losses where the logits have moved against them.
    pub(crate) losses: &'a mut B::F32,
    /// The largest magnitudes of the logits.
    pub(crate) amax: &'a mut B::F32,
    /// How far logits may move.
    pub(crate) epsilon: f32,
}

impl<B: Backend> Pass<'_, B> {
    /// [`Pass::loss`], bit for bit, and how bad the losses could be.
    pub(crate) fn worst_losses(
        &mut self,
        acts: &mut Activations<B>,
        targets: &B::Tokens,
        WorstOf { losses: worst, amax, epsilon }: WorstOf<'_, B>,
    ) {
        let (config, sequences, precision) = (self.config, self.sequences, self.plan.precision);
        let shape = Shapes { config, sequences, precision }.head();
        let w = self.backend.param(self.weights, self.table.head());
        let Activations { losses, ln_f: x, .. } = acts;
        let operands = WorstLosses { losses, worst, amax, x, w, targets, epsilon };
        self.backend.worst_losses(self.workspace, operands, shape);
    }
}
