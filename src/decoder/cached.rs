//! Logits of a sequence of which keys and values are kept, so that a token takes one row.

use std::sync::Arc;

use super::DecoderWeights;
use crate::Result;
use crate::backend::{
    Backend, Decode, HeadShape, LinearShape, Precision, Sequences, StepPlan, WorkspaceShape,
};
use crate::formats::{BLOCK, LinearRecipe};
use crate::gpt::{Activations, ModelConfig, Pass, Past, Shapes};
use crate::model::{Model, OnDevice, Weights};
use crate::optim::Master;
use crate::recipe::Recipe;

/// A model, and what is kept of a sequence.
pub(super) struct Cached<B: Backend + Decode> {
    model: Arc<OnDevice<B>>,
    activations: Activations<B>,
    workspace: B::Workspace,
    tokens: B::Tokens,
    logits: B::F32,
    plan: StepPlan,
    past: Past<B>,
    /// Positions of which keys and values are kept.
    kept: usize,
    /// [`crate::model::Weights::changes`] of the weights that `past` was made from.
    changes: Option<u64>,
    /// Of passes over one row.
    recordings: B::Recordings,
    /// Tokens that there is room for, and what the weights are in.
    room: usize,
    weights: DecoderWeights,
    /// [`crate::model::Weights::moves`] of the weights that are recorded.
    moves: u64,
}

impl<B: Backend + Decode> Cached<B> {
    /// For sequences of up to `room` tokens.
    pub(super) fn new(
        model: &Model,
        on: &Arc<OnDevice<B>>,
        room: usize,
        weights: DecoderWeights,
    ) -> Result<Self> {
        let kept = on.read()?;
        Self::beside(model, on, room, weights, &kept)
    }

    fn beside(
        model: &Model,
        on: &Arc<OnDevice<B>>,
        room: usize,
        weights: DecoderWeights,
        kept: &Weights<B>,
    ) -> Result<Self> {
        let weights = (weights, (kept.master, kept.moves));
        on.allocate(model.engine(), "generating", |arena| {
            Self::cut(on, arena, model.config(), (room, weights))
        })
    }

    /// What is kept of positions from `len` on is forgotten.
    pub(super) fn rewind(&mut self, len: usize) {
        self.kept = self.kept.min(len);
    }

    /// Logits of the token after `context`, whose first tokens are those that were seen before.
    pub(super) fn next_logits(
        &mut self,
        model: &Model,
        context: &[u32],
        out: &mut [f32],
    ) -> Result<()> {
        let (on, config) = (Arc::clone(&self.model), model.config());
        let (OnDevice { backend, table, .. }, weights) = (&*on, on.read()?);
        let backend = &**backend;
        if weights.moves != self.moves {
            *self = Self::beside(model, &on, self.room, self.weights, &weights)?;
        }
        let Self { activations, workspace, tokens, logits, plan, past, recordings, .. } = self;
        let (kept, changes) = (&mut self.kept, &mut self.changes);
        let precision = plan.precision;
        let shapes =
            |length| Shapes { config, sequences: Sequences { batch: 1, length }, precision };
        if *changes != Some(weights.changes) {
            (*kept, *changes) = (0, None);
            backend.scope(|| past.pack(backend, table, &weights.all, shapes(1)));
            *changes = Some(weights.changes);
        }
        // The last row is computed in any case, for its logits.
        let mut start = (*kept).min(context.len() - 1);
        *kept = start;
        backend.scope(|| {
            while start < context.len() {
                let rows = &context[start..][..B::ROWS.min(context.len() - start)];
                backend.write_rows(tokens, rows, start);
                let is_last = start + rows.len() == context.len();
                let mut pass = Pass {
                    backend,
                    config,
                    table,
                    weights: &weights.all,
                    means: None,
                    trains: false,
                    merge: None,
                    workspace,
                    sequences: Sequences { batch: 1, length: rows.len() },
                    plan,
                };
                let mut all = || {
                    pass.forward_behind(activations, tokens, (past, start));
                    if is_last {
                        pass.logits_behind(activations, rows.len() - 1, past, logits);
                    }
                };
                // What a token takes where a text is written.
                match is_last && rows.len() == 1 {
                    true => backend.recorded(recordings, plan, [0, 0], all),
                    false => all(),
                }
                start += rows.len();
            }
        });
        backend.read_f32(logits, 0, out)?;
        *kept = start;
        Ok(())
    }

    fn cut(
        on: &Arc<OnDevice<B>>,
        arena: &mut B::Arena,
        config: &ModelConfig,
        (room, (weights, (master, moves))): (usize, (DecoderWeights, (Master, u64))),
    ) -> Result<Self> {
        let (backend, rows) = (&*on.backend, room.min(B::ROWS));
        // Of scratch memory: products of other numbers take less.
        let (recipe, linear) = match B::activations_in(weights, master) {
            Precision::F32 => (Recipe::fp32(), LinearRecipe::F32),
            Precision::Bf16 => (Recipe::bf16(), LinearRecipe::BF16),
        };
        let precision = recipe.precision();
        let of = |length| Shapes { config, sequences: Sequences { batch: 1, length }, precision };
        let shapes = of(rows);
        let shape = WorkspaceShape {
            // MXFP4 has whole blocks. Weights take none, for they are packed already.
            linears: &shapes.linears().map(|LinearShape { rows, inputs, .. }| LinearShape {
                rows,
                inputs: inputs.next_multiple_of(BLOCK),
                outputs: 1,
            }),
            norm: shapes.norm(),
            // Of rows behind all others.
            attention: of(room).attention(0),
            // Logits take no room of the classifier's.
            head: HeadShape { vocab_size: 1, ..shapes.head() },
            recipes: &[linear],
            merge: None,
            backward: false,
        };
        backend.supports(&shape)?;
        Ok(Self {
            model: on.clone(),
            activations: Activations::new(backend, arena, shapes, None)?,
            workspace: backend.workspace(arena, &shape),
            tokens: backend.rows(arena, rows)?,
            logits: backend.f32(arena, config.vocab_size),
            plan: recipe.step_plan(config.layers)?,
            past: Past::new(backend, arena, shapes, (weights, room))?,
            kept: 0,
            changes: None,
            recordings: backend.recordings(),
            room,
            weights,
            moves,
        })
    }
}
