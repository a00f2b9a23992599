//! Logits of sequences of which keys and values are kept, so that a token takes one row.

use std::sync::Arc;

use super::{DecoderOptions, DecoderWeights, recipe_in};
use crate::backend::{
    Backend, Decode, HeadShape, LinearShape, Sequences, StepPlan, WorkspaceShape,
};
use crate::formats::BLOCK;
use crate::gpt::{Activations, Kept, ModelConfig, Packed, ParamTable, Pass, Shapes};
use crate::model::{Model, OnDevice, Weights};
use crate::reserve::{collect, reserve};
use crate::{Error, Result};

/// Most rows of which logits are computed at once.
const LOGIT_ROWS: usize = 32;

/// By which weights logits are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// Those of the decoder's options.
    Own,
    /// In MXFP4 as a draft, whose keys and values stand behind those of the others.
    Draft,
}

/// What is kept of a sequence.
struct Sequence<B: Backend + Decode> {
    kept: Kept<B>,
    /// Positions of which it is, by the decoder's own weights and, behind them, by a draft.
    positions: [usize; 2],
    /// Of passes over one row of it, by both.
    recordings: [B::Recordings; 2],
}

/// A model, and what is kept of sequences.
pub(super) struct Cached<B: Backend + Decode> {
    model: Arc<OnDevice<B>>,
    activations: Activations<B>,
    workspace: B::Workspace,
    tokens: B::Tokens,
    logits: B::F32,
    plan: StepPlan,
    /// By a draft, too, where there is to be one.
    packed: [Option<Packed<B>>; 2],
    sequences: Vec<Sequence<B>>,
    /// [`crate::model::Weights::changes`] of the weights that all of these were made from.
    changes: Option<u64>,
    options: DecoderOptions,
    /// Most rows of a pass.
    rows: usize,
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
        *positions = positions.map(|of| of.min(len));
    }

    /// Positions of a sequence that are computed.
    pub(super) fn computed(&self, sequence: usize, by: By) -> usize {
        self.sequences[sequence].positions[by as usize]
    }

    /// Keeps of sequence `to` what is kept of another.
    pub(super) fn fork(&mut self, from: usize, to: usize) {
        let backend = &*self.model.backend;
        if let Ok([from, to]) = self.sequences.get_disjoint_mut([from, to]) {
            to.positions = from.positions;
            backend.scope(move || to.kept.copy_from(backend, &from.kept));
        }
    }

    /// Logits (n, V) of what comes after each token of `context` from number `from` on; its first
    /// tokens are those of the sequence that were seen before.
    pub(super) fn logits(
        &mut self,
        model: &Model,
        (sequence, context, by): (usize, &[u32], By),
        from: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let on = Arc::clone(&self.model);
        let weights = on.read()?;
        self.follow(model, &on, &weights)?;
        // Rows whose logits are asked for are computed in any case.
        let text = (sequence, context, by);
        self.run(model, &on.table, &weights, text, from, Some(out))
    }

    /// Logits (n, V) of what comes after the last tokens of n different sequences.
    pub(super) fn logits_of(
        &mut self,
        model: &Model,
        texts: &[(usize, &[u32])],
        out: &mut [f32],
    ) -> Result<()> {
        let on = Arc::clone(&self.model);
        let weights = on.read()?;
        self.follow(model, &on, &weights)?;
        for (sequence, context) in texts {
            let before = &context[..context.len() - 1];
            let computed = self.computed(*sequence, By::Own);
            if computed < before.len() {
                let text = (*sequence, before, By::Own);
                self.run(model, &on.table, &weights, text, before.len(), None)?;
            }
        }
        let most = LOGIT_ROWS.min(self.rows);
        let vocab_size = model.config().vocab_size;
        for (texts, out) in texts.chunks(most).zip(out.chunks_mut(most * vocab_size)) {
            self.run_each(model, &on.table, &weights, texts, out)?;
        }
        Ok(())
    }

    /// Takes weights as they are now; whether they had changed.
    pub(super) fn follow_model(&mut self, model: &Model) -> Result<bool> {
        let on = Arc::clone(&self.model);
        let weights = on.read()?;
        let before = self.changes;
        self.follow(model, &on, &weights)?;
        Ok(self.changes != before)
    }

    fn follow(&mut self, model: &Model, on: &Arc<OnDevice<B>>, weights: &Weights<B>) -> Result<()> {
        let (backend, config) = (&*on.backend, model.config());
        if weights.moves != self.moves {
            // Recorded passes read where the weights were.
            if B::activations_in(self.options.weights, weights.master) == self.plan.precision {
                let sequences = self.sequences.iter_mut();
                let recordings = || [backend.recordings(), backend.recordings()];
                sequences.for_each(|sequence| sequence.recordings = recordings());
                self.moves = weights.moves;
            } else {
                *self = Self::beside(model, on, self.options, weights)?;
            }
        }
        let Self { plan, packed, sequences, changes, .. } = self;
        let of_one = Sequences { batch: 1, length: 1 };
        let shapes = Shapes { config, sequences: of_one, precision: plan.precision };
        if *changes != Some(weights.changes) {
            sequences.iter_mut().for_each(|sequence| sequence.positions = [0; 2]);
            *changes = None;
            let packed = packed.iter_mut().flatten();
            backend.scope(|| {
                packed.for_each(|packed| packed.fill(backend, &on.table, &weights.all, shapes));
            });
            *changes = Some(weights.changes);
        }
        Ok(())
    }

    /// Computes what is missing of a sequence, and again from number `from` on, whose logits go to
    /// `out`.
    fn run(
        &mut self,
        model: &Model,
        table: &ParamTable,
        weights: &Weights<B>,
        (sequence, context, by): (usize, &[u32], By),
        from: usize,
        mut out: Option<&mut [f32]>,
    ) -> Result<()> {
        let (backend, config) = (Arc::clone(&self.model.backend), model.config());
        let backend = &*backend;
        let Self { activations, workspace, tokens, logits, plan, packed, sequences, .. } = self;
        let Sequence { kept, positions, recordings } = &mut sequences[sequence];
        let packed = packed[by as usize].as_ref().expect("a decoder that drafts has its weights");
        let recordings = &mut recordings[by as usize];
        let mut start = positions[by as usize].min(from);
        // Behind rows of one kind there may be a draft's alone.
        *positions = match by {
            By::Own => [start; 2],
            By::Draft => [positions[0].min(start), start],
        };
        backend.scope(|| -> Result<()> {
            while start < context.len() {
                let rows = &context[start..][..B::ROWS.min(context.len() - start)];
                let end = start + rows.len();
                backend.write_rows(tokens, rows, &[start]);
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
                    documents: None,
                    plan,
                };
                let of_tokens = (&*tokens, &[start][..]);
                let wanted = out.as_deref_mut().filter(|_| from < end);
                let Some(out) = wanted else {
                    pass.forward_behind(activations, of_tokens, packed, &mut [&mut *kept]);
                    start = end;
                    continue;
                };
                // What a token takes where a text is written.
                if rows.len() == 1 {
                    backend.recorded(recordings, plan, [0, 0], || {
                        pass.forward_behind(activations, of_tokens, packed, &mut [&mut *kept]);
                        pass.logits_behind(activations, 0..1, packed, logits);
                    });
                    let to = &mut out[(start - from) * config.vocab_size..];
                    backend.read_f32(logits, 0, &mut to[..config.vocab_size])?;
                } else {
                    pass.forward_behind(activations, of_tokens, packed, &mut [&mut *kept]);
                    let mut first = from.max(start);
                    while first < end {
                        let n = LOGIT_ROWS.min(end - first);
                        let of_rows = first - start..first - start + n;
                        pass.logits_behind(activations, of_rows, packed, logits);
                        let to = &mut out[(first - from) * config.vocab_size..];
                        backend.read_f32(logits, 0, &mut to[..n * config.vocab_size])?;
                        first += n;
                    }
                }
                start = end;
            }
            Ok(())
        })?;
        positions[by as usize..].fill(start);
        Ok(())
    }

    /// Computes the last token of each of a few sequences, and its logits, in one pass.
    fn run_each(
        &mut self,
        model: &Model,
        table: &ParamTable,
        weights: &Weights<B>,
        texts: &[(usize, &[u32])],
        out: &mut [f32],
    ) -> Result<()> {
        let (backend, config) = (Arc::clone(&self.model.backend), model.config());
        let backend = &*backend;
        let Self { activations, workspace, tokens, logits, plan, packed, sequences, .. } = self;
        let packed = packed[By::Own as usize].as_ref().expect("a decoder has its own weights");
        let (mut last, mut starts) = ([0; LOGIT_ROWS], [0; LOGIT_ROWS]);
        for (n, (_, context)) in texts.iter().enumerate() {
            starts[n] = context.len() - 1;
            last[n] = context[starts[n]];
        }
        let (last, starts) = (&last[..texts.len()], &starts[..texts.len()]);
        let mut kept = Vec::new();
        reserve(&mut kept, "the sequences of a pass", texts.len())?;
        // In the order of the texts.
        for (sequence, of) in sequences.iter_mut().enumerate() {
            let Some(place) = texts.iter().position(|text| text.0 == sequence) else { continue };
            of.positions = [starts[place]; 2];
            kept.push((place, &mut of.kept));
        }
        kept.sort_unstable_by_key(|(place, _)| *place);
        let mut kept = collect("the sequences of a pass", kept.into_iter().map(|of| Ok(of.1)))?;
        let mut pass = Pass {
            backend,
            config,
            table,
            weights: &weights.all,
            means: None,
            trains: false,
            merge: None,
            workspace,
            sequences: Sequences { batch: 1, length: texts.len() },
            documents: None,
            plan,
        };
        backend.scope(move || {
            backend.write_rows(tokens, last, starts);
            pass.forward_behind(activations, (&*tokens, starts), packed, &mut kept);
            pass.logits_behind(activations, 0..texts.len(), packed, logits);
            backend.read_f32(logits, 0, out)
        })?;
        for (sequence, context) in texts {
            sequences[*sequence].positions = [context.len(); 2];
        }
        Ok(())
    }

    fn cut(
        on: &Arc<OnDevice<B>>,
        arena: &mut B::Arena,
        config: &ModelConfig,
        options: DecoderOptions,
        weights: &Weights<B>,
    ) -> Result<Self> {
        let DecoderOptions { room, sequences, weights: form, drafts } = options;
        // A pass may have a row of each of several sequences, too.
        let rows = room.min(B::ROWS).max(sequences.min(LOGIT_ROWS));
        let backend = &*on.backend;
        // Of scratch memory: products of other numbers take less.
        let precision = B::activations_in(form, weights.master);
        if drafts && B::activations_in(DecoderWeights::Mxfp4, weights.master) != precision {
            return Err(Error::Unsupported {
                what: format!("drafts in MXFP4 for weights in {form} on this device"),
                remedy: "use weights bf16, the draft ngram, or device cpu".into(),
            });
        }
        let recipe = recipe_in(precision);
        let of = |length| Shapes { config, sequences: Sequences { batch: 1, length }, precision };
        let shapes = of(rows);
        // In one form where there are no drafts.
        let forms = [form, if drafts { DecoderWeights::Mxfp4 } else { form }];
        let packed = forms.map(|weights| shapes.linears().map(|layer| (layer, weights))).concat();
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
            packed: &packed,
            adapters: &shapes.adapters()?,
            backward: false,
        };
        backend.supports(&shape)?;
        let mut sequence = || {
            let kept = Kept::new(backend, arena, shapes, room)?;
            let recordings = [backend.recordings(), backend.recordings()];
            Ok(Sequence { kept, positions: [0; 2], recordings })
        };
        let sequences = (0..sequences).map(|_| sequence());
        let sequences = collect("the sequences of a decoder", sequences)?;
        Ok(Self {
            model: on.clone(),
            activations: Activations::new(backend, arena, shapes, None)?,
            workspace: backend.workspace(arena, &shape),
            tokens: backend.rows(arena, rows)?,
            logits: backend.f32(arena, rows.min(LOGIT_ROWS) * config.vocab_size),
            plan: recipe.step_plan(config.layers)?,
            packed: [
                Some(Packed::new(backend, arena, shapes, form)?),
                match drafts {
                    true => Some(Packed::new(backend, arena, shapes, DecoderWeights::Mxfp4)?),
                    false => None,
                },
            ],
            sequences,
            changes: None,
            options,
            rows,
            moves: weights.moves,
        })
    }
}
