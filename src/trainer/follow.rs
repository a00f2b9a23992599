//! What a recipe keeps of the weights of blocks from step to step: their slow means.

use crate::Result;
use crate::backend::Backend;
use crate::checkpoint::TensorRead;
use crate::gpt::{Matrix, Means, ParamTable, TensorInfo};
use crate::model::OnDevice;
use crate::optim::State;
use crate::recipe::Recipe;
use crate::reserve::{collect, text};

/// The slow means, as checkpoints name them.
pub(super) const MEAN: State = State { name: "ema", what: "slow mean", is_signed: true };

/// What is kept of the weights of blocks.
pub(super) struct Followed<B: Backend> {
    /// All of them; none where nothing is kept.
    matrices: Vec<Matrix>,
    /// (matrices), where the recipe rounds by them.
    means: Option<B::F32>,
}

impl<B: Backend> Followed<B> {
    pub(super) fn new(
        backend: &B,
        arena: &mut B::Arena,
        table: &ParamTable,
        recipe: &Recipe,
    ) -> Result<Self> {
        if recipe.ema().is_none() {
            return Ok(Self { matrices: Vec::new(), means: None });
        }
        let (matrices, len) = table.matrices(B::ALIGN)?;
        Ok(Self { matrices, means: Some(backend.f32(arena, len)) })
    }

    /// Begins with weights as they are.
    pub(super) fn begin(&mut self, backend: &B, weights: &B::Weights) {
        self.update_means(backend, weights, 0.0);
    }

    /// Follows an update of the weights.
    pub(super) fn after_update(&mut self, backend: &B, weights: &B::Weights, recipe: &Recipe) {
        if let Some(decay) = recipe.ema() {
            self.update_means(backend, weights, decay);
        }
    }

    fn update_means(&mut self, backend: &B, weights: &B::Weights, decay: f32) {
        let Some(means) = &mut self.means else { return };
        for Matrix { param, own } in &self.matrices {
            backend.update_mean(means, *own, backend.param(weights, *param), decay);
        }
    }

    /// As a pass reads them.
    pub(super) fn means(&self) -> Option<Means<'_, B>> {
        self.means.as_ref().map(|flat| Means { flat, matrices: &self.matrices })
    }

    /// Name and shape of each weight of which something is kept.
    pub(super) fn tensors(&self, all: &[TensorInfo]) -> Result<Vec<TensorInfo>> {
        const WHAT: &str = "the names of the tensors";
        let copy = |matrix: &Matrix| {
            let TensorInfo { name, shape } = &all[matrix.param.index];
            let name = text(WHAT, format_args!("{name}"))?;
            Ok(TensorInfo { name, shape: collect(WHAT, shape.iter().map(|n| Ok(*n)))? })
        };
        collect(WHAT, self.matrices.iter().map(copy))
    }

    /// All that is kept, as a checkpoint names it.
    pub(super) fn states(&self) -> impl Iterator<Item = State> {
        self.means.iter().map(|_| MEAN)
    }

    /// The values of all that is kept, as a checkpoint holds them, of these [`Followed::tensors`].
    pub(super) fn exported<'a>(
        &'a self,
        on: &'a OnDevice<B>,
        tensors: &'a [TensorInfo],
    ) -> impl Iterator<Item = (State, Exported<'a, B>)> {
        let Self { matrices, means } = self;
        means.iter().map(move |flat| (MEAN, Exported { on, tensors, matrices, flat }))
    }

    /// Overwrites what state `number` has of weight `index`; the values are in a checkpoint's order.
    pub(super) fn load(
        &mut self,
        on: &OnDevice<B>,
        (_number, index): (usize, usize),
        values: &[f32],
        ours: &mut Vec<f32>,
    ) -> Result<()> {
        let Some(means) = &mut self.means else { return Ok(()) };
        let Matrix { param, own } = self.matrices[index];
        on.table.specs()[param.index].import(values, ours)?;
        on.backend.write_f32(means, own.start, ours)
    }
}

/// Values of the weights of blocks in Hugging Face's order and shape.
pub(super) struct Exported<'a, B: Backend> {
    on: &'a OnDevice<B>,
    tensors: &'a [TensorInfo],
    matrices: &'a [Matrix],
    flat: &'a B::F32,
}

impl<B: Backend> TensorRead for Exported<'_, B> {
    fn tensors(&self) -> &[TensorInfo] {
        self.tensors
    }

    fn read(&self, index: usize, out: &mut [f32]) -> Result<()> {
        let Matrix { param, own } = self.matrices[index];
        self.on.backend.read_f32(self.flat, own.start, out)?;
        self.on.table.specs()[param.index].export(out, &mut Vec::new())
    }
}
