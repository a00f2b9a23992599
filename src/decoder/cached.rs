//! Logits of sequences of which keys and values are kept, so that a token takes one row.

use std::sync::Arc;

use super::{DecoderOptions, recipe_in};
use crate::Result;
use crate::backend::{
    Backend, Decode, HeadShape, LinearShape, Sequences, StepPlan, WorkspaceShape,
};
use crate::formats::BLOCK;
use crate::gpt::{Activations, Kept, ModelConfig, Packed, Pass, Shapes};
use crate::model::{Model, OnDevice, Weights};
use crate::reserve::collect;

/// What is kept of a sequence.
struct Sequence<B: Backend + Decode> {
    kept: Kept<B>,
    /// Positions of which it is.
    positions: usize,
    /// Of passes over one row of it.
    recordings: B::Recordings,
}

/// A model, and what is kept of sequences.
pub(super) struct Cached<B: Backend + Decode> {
    model: Arc<OnDevice<B>>,
    activations: Activations<B>,
    workspace: B::Workspace,
    tokens: B::Tokens,
    logits: B::F32,
    plan: StepPlan,
    packed: Packed<B>,
    sequences: Vec<Sequence<B>>,
    /// [`crate::model::Weights::changes`] of the weights that all of these were made from.
    changes: Option<u64>,
    options: DecoderOptions,
    /// [`crate::model::Weights::moves`] of the weights that are recorded.
    moves: u64,
}

impl<B: Backend + Decode> Cached<B> {
    pub(super) fn new(
        model: &Model,
        on: &Arc<OnDevice<B>>,
        options: DecoderOptions,
    ) -> Result<Self> {
        let weights = on.read()?;
        Self::beside(model, on, options, &weights)
    }

    fn beside(
        model: &Model,
        on: &Arc<OnDevice<B>>,
        options: DecoderOptions,
        weights: &Weights<B>,
    ) -> Result<Self> {
        on.allocate(model.engine(), "generating", |arena| {
            Self::cut(on, arena, model.config(), options, weights)
        })
    }

    /// What is kept of positions from `len` on is forgotten.
    pub(super) fn rewind(&mut self, sequence: usize, len: usize) {
        let positions = &mut self.sequences[sequence].positions;
        *positions = len.min(*positions);
    }

    /// Keeps of sequence `to` what is kept of another.
    pub(super) fn fork(&mut self, from: usize, to: usize) {
        let backend = &*self.model.backend;
        if let Ok([from, to]) = self.sequences.get_disjoint_mut([from, to]) {
            to.positions = from.positions;
            backend.scope(move || to.kept.copy_from(backend, &from.kept));
        }
    }

    /// Logits of the token after `context`, whose first tokens are those of the sequence that were
    /// seen before.
    pub(super) fn next_logits(
        &mut self,
        model: &Model,
        (sequence, context): (usize, &[u32]),
        out: &mut [f32],
    ) -> Result<()> {
        let (on, config) = (Arc::clone(&self.model), model.config());
        let (OnDevice { backend, table, .. }, weights) = (&*on, on.read()?);
        let backend = &**backend;
        if weights.moves != self.moves {
            // Recorded passes read where the weights were.
            if B::activations_in(self.options.weights, weights.master) == self.plan.precision {
                let sequences = self.sequences.iter_mut();
                sequences.for_each(|sequence| sequence.recordings = backend.recordings());
                self.moves = weights.moves;
            } else {
                *self = Self::beside(model, &on, self.options, &weights)?;
            }
        }
        let Self {
            activations, workspace, tokens, logits, plan, packed, sequences, changes, ..
        } = self;
        let precision = plan.precision;
        let shapes =
            |length| Shapes { config, sequences: Sequences { batch: 1, length }, precision };
        if *changes != Some(weights.changes) {
            sequences.iter_mut().for_each(|sequence| sequence.positions = 0);
            *changes = None;
            backend.scope(|| packed.fill(backend, table, &weights.all, shapes(1)));
            *changes = Some(weights.changes);
        }
        let Sequence { kept, positions, recordings } = &mut sequences[sequence];
        // The last row is computed in any case, for its logits.
        let mut start = (*positions).min(context.len() - 1);
        *positions = start;
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
                    pass.forward_behind(activations, (tokens, start), packed, kept);
                    if is_last {
                        pass.logits_behind(activations, rows.len() - 1, packed, logits);
                    }
                };
                // What a token takes where a text is written.
                if is_last && rows.len() == 1 {
                    backend.recorded(recordings, plan, [0, 0], all);
                } else {
                    all();
                }
                start += rows.len();
            }
        });
        backend.read_f32(logits, 0, out)?;
        *positions = start;
        Ok(())
    }

    fn cut(
        on: &Arc<OnDevice<B>>,
        arena: &mut B::Arena,
        config: &ModelConfig,
        options: DecoderOptions,
        weights: &Weights<B>,
    ) -> Result<Self> {
        let DecoderOptions { room, sequences, weights: form } = options;
        let (backend, rows) = (&*on.backend, room.min(B::ROWS));
        // Of scratch memory: products of other numbers take less.
        let precision = B::activations_in(form, weights.master);
        let recipe = recipe_in(precision);
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
            recipes: &[*recipe.linear(0)],
            merge: None,
            backward: false,
        };
        backend.supports(&shape)?;
        let mut sequence = || {
            let kept = Kept::new(backend, arena, shapes, room)?;
            Ok(Sequence { kept, positions: 0, recordings: backend.recordings() })
        };
        let sequences = (0..sequences).map(|_| sequence());
        let sequences = collect("the sequences of a decoder", sequences)?;
        Ok(Self {
            model: on.clone(),
            activations: Activations::new(backend, arena, shapes, None)?,
            workspace: backend.workspace(arena, &shape),
            tokens: backend.rows(arena, rows)?,
            logits: backend.f32(arena, config.vocab_size),
            plan: recipe.step_plan(config.layers)?,
            packed: Packed::new(backend, arena, shapes, form)?,
            sequences,
            changes: None,
            options,
            moves: weights.moves,
        })
    }
}
