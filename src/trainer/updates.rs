//! What updates do, for whoever asks: how long the gradient of each tensor is, and how far it is
//! beyond what second moments have seen coming.
//!
//! The second is the root mean square of g over the root of the corrected second moment that has
//! taken g in, which is 1 while gradients stay as they were. Wortsman et al. 2023, "Stable and
//! low-precision training for large-scale vision-language models", found that one of 2.3 and above
//! in the first layers comes before most spikes of the loss, by one to eight steps; StableAdamW
//! makes the rate smaller by it.

use crate::Result;
use crate::backend::{Backend, Trained, UpdateSums};
use crate::model::{Model, OnDevice};
use crate::optim::{Optimizer, OptimizerStep};
use crate::reserve::{collect, reserve, text};

/// What an update did to a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TensorUpdate {
    /// Norm of its gradient, before clipping and normalization.
    pub grad_norm: f32,
    /// Root of the mean of g^2 / max(u, epsilon^2): g is the gradient that the moments take in, u
    /// the corrected second moment after that. NaN of a tensor that has none, as matrices of Muon.
    pub rms: f32,
}

/// What [`crate::Trainer::watch_updates`] found of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UpdateMetrics {
    /// Which step, from 1 on.
    pub step: u64,
    /// What no root mean square can be above: 1 / sqrt(1 - beta2).
    pub ceiling: f32,
    /// Of each tensor, by name, in the order of [`Model::tensors`].
    pub tensors: Vec<(String, TensorUpdate)>,
}

impl UpdateMetrics {
    /// The tensor with the largest root mean square, and what that is; of equals the first.
    pub fn largest(&self) -> Option<(&str, f32)> {
        let all = self.tensors.iter().filter(|(_, update)| !update.rms.is_nan());
        let all = all.map(|(name, update)| (name.as_str(), update.rms));
        all.reduce(|largest, other| if other.1 > largest.1 { other } else { largest })
    }
}

/// A watch over updates.
pub(super) struct Updates<B: Backend> {
    every: u64,
    room: B::UpdateWatch,
    /// Of the step that is being done.
    found: Vec<UpdateSums>,
    /// Of the last step that was watched and done.
    metrics: UpdateMetrics,
}

impl<B: Backend> Updates<B> {
    /// Of every so many steps, in memory of its own.
    pub(super) fn new(on: &OnDevice<B>, model: &Model, every: u64) -> Result<Self> {
        const WHAT: &str = "what is found of updates";
        let (backend, tensors) = (&*on.backend, model.tensors());
        let cut = |arena: &mut B::Arena| backend.update_watch(arena, tensors.len());
        let room = on.allocate(model.engine(), WHAT, cut)?;
        let mut found = Vec::new();
        reserve(&mut found, WHAT, tensors.len())?;
        let named = tensors.iter().map(|tensor| {
            Ok((text(WHAT, format_args!("{}", tensor.name))?, TensorUpdate::default()))
        });
        let metrics = UpdateMetrics { tensors: collect(WHAT, named)?, ..Default::default() };
        Ok(Self { every, room, found, metrics })
    }

    /// Looks at an update that is about to be made, where it is one of those that are watched.
    pub(super) fn look(
        &mut self,
        backend: &B,
        reduction: &mut B::Reduction,
        trained: &mut Trained<'_, B>,
        step: &OptimizerStep,
    ) -> Result<()> {
        self.found.clear();
        if !step.t.is_multiple_of(self.every) {
            return Ok(());
        }
        let Self { room, found, .. } = self;
        backend.watch_update(room, reduction, trained, step, &mut |sums| found.push(sums))
    }

    /// The update was made.
    pub(super) fn keep(&mut self, on: &OnDevice<B>, step: &OptimizerStep) {
        if self.found.is_empty() {
            return;
        }
        let Optimizer { beta2, .. } = step.optimizer;
        let metrics = &mut self.metrics;
        (metrics.step, metrics.ceiling) = (step.t, (1.0 - f64::from(beta2)).sqrt().recip() as f32);
        let tensors = metrics.tensors.iter_mut().zip(on.table.slots());
        for (((_, update), slot), sums) in tensors.zip(&self.found) {
            let has_second = !step.optimizer.orthogonalizes(slot.kind);
            let mean = if has_second { sums.ratios / slot.len as f64 } else { f64::NAN };
            let grad_norm = sums.squares.sqrt() as f32;
            *update = TensorUpdate { grad_norm, rms: mean.sqrt() as f32 };
        }
    }

    /// What was found last; None before.
    pub(super) fn metrics(&self) -> Option<&UpdateMetrics> {
        (self.metrics.step > 0).then_some(&self.metrics)
    }
}
