//! Logits, losses and hidden states of whole sequences, of which nothing is kept.

use std::sync::Arc;

use super::{DecoderWeights, recipe_in};
use crate::Result;
use crate::backend::{Backend, Decode, Precision, Sequences, WorkspaceShape};
use crate::gpt::{Activations, Pass, Shapes};
use crate::model::{Model, OnDevice};
use crate::recipe::Recipe;
use crate::reserve::{collect, zeros};

/// What a pass takes.
struct Room<B: Backend> {
    activations: Activations<B>,
    workspace: B::Workspace,
    tokens: B::Tokens,
    targets: B::Tokens,
    /// Of one token, where these are wanted.
    logits: B::F32,
}

impl<B: Backend> Room<B> {
    fn new(
        model: &Model,
        on: &Arc<OnDevice<B>>,
        what: &'static str,
        (sequences, precision): (Sequences, Precision),
        (recipe, logits): (&Recipe, usize),
    ) -> Result<Self> {
        let (config, backend) = (model.config(), &*on.backend);
        let shapes = Shapes { config, sequences, precision };
        let shape = WorkspaceShape {
            linears: &shapes.linears(),
            norm: shapes.norm(),
            attention: shapes.attention(0),
            head: shapes.head(),
            recipes: &[*recipe.linear(0)],
            merge: None,
            packed: &[],
            adapters: &shapes.adapters()?,
            backward: false,
        };
        backend.supports(&shape)?;
        on.allocate(model.engine(), what, |arena| {
            Ok(Self {
                activations: Activations::new(backend, arena, shapes, None)?,
                workspace: backend.workspace(arena, &shape),
                tokens: backend.tokens(arena, sequences.rows(), false)?,
                targets: backend.tokens(arena, sequences.rows(), false)?,
                logits: backend.f32(arena, logits),
            })
        })
    }
}

/// Logits of the token after `context`, by a forward pass over all of it.
pub(super) fn next_logits<B: Backend + Decode>(
    model: &Model,
    on: &Arc<OnDevice<B>>,
    context: &[u32],
    out: &mut [f32],
) -> Result<()> {
    // From here on nobody changes what the weights are kept as.
    let weights = on.read()?;
    let (config, backend) = (model.config(), &*on.backend);
    let precision = B::activations_in(DecoderWeights::F32, weights.master);
    let recipe = recipe_in(precision);
    let plan = recipe.step_plan(config.layers)?;
    let sequences = Sequences { batch: 1, length: context.len() };
    let of = (&recipe, config.vocab_size);
    let mut room = Room::new(model, on, "generating", (sequences, precision), of)?;
    backend.scope(|| {
        let Room { activations, workspace, tokens, logits, .. } = &mut room;
        backend.write_tokens(tokens, context.len(), |to| to.copy_from_slice(context));
        let (means, merge) = (None, None);
        let mut pass = Pass {
            backend,
            config,
            table: &on.table,
            weights: &weights.all,
            means,
            trains: false,
            merge,
            workspace,
            sequences,
            documents: None,
            plan: &plan,
        };
        pass.forward(activations, tokens);
        pass.logits(activations, context.len() - 1, logits);
    });
    backend.read_f32(&room.logits, 0, out)
}

/// Texts that are there, one behind the other.
pub(super) struct Texts<'a> {
    pub(super) tokens: &'a [u32],
    pub(super) lengths: &'a [usize],
}

/// Tokens that are computed at once, but that of a text all are.
const AT_ONCE: usize = 4096;

/// Log-probabilities of the tokens of texts, and hidden states (tokens, C) where these are wanted. Texts
/// of about the same length are computed together, the shorter ones with tokens behind them, which none
/// before looks at.
pub(super) fn score<B: Backend + Decode>(
    model: &Model,
    on: &Arc<OnDevice<B>>,
    texts: &Texts<'_>,
    wanted: DecoderWeights,
    (log_probabilities, mut hidden): (&mut [f32], Option<&mut [f32]>),
) -> Result<()> {
    const WHAT: &str = "texts that are scored";
    let weights = on.read()?;
    let (config, backend) = (model.config(), &*on.backend);
    let channels = config.channels;
    let precision = B::activations_in(wanted, weights.master);
    let recipe = recipe_in(precision);
    let plan = recipe.step_plan(config.layers)?;
    let mut end = 0;
    let places = texts.lengths.iter().filter(|length| **length > 0).map(|length| {
        end += length;
        Ok((end - length, *length))
    });
    // Where each begins, and how long it is: the longest first.
    let mut places = collect(WHAT, places)?;
    places.sort_by_key(|(_, length)| std::cmp::Reverse(*length));
    let Some((_, longest)) = places.first().copied() else { return Ok(()) };
    let batch = (AT_ONCE / longest).clamp(1, places.len());
    let most = Sequences { batch, length: longest };
    let mut room = Room::new(model, on, "scoring", (most, precision), (&recipe, 0))?;
    let mut losses = zeros(WHAT, most.rows())?;
    for group in places.chunks(batch) {
        let sequences = Sequences { batch: group.len(), length: group[0].1 };
        let rows = sequences.rows();
        backend.scope(|| {
            let Room { activations, workspace, tokens, targets, .. } = &mut room;
            for (to, first) in [(&mut *tokens, 0), (&mut *targets, 1)] {
                backend.write_tokens(to, rows, |to| {
                    to.fill(0);
                    for (to, (start, length)) in to.chunks_exact_mut(sequences.length).zip(group) {
                        let text = &texts.tokens[*start..][first..*length];
                        to[..text.len()].copy_from_slice(text);
                    }
                });
            }
            let mut pass = Pass {
                backend,
                config,
                table: &on.table,
                weights: &weights.all,
                means: None,
                trains: false,
                merge: None,
                workspace,
                sequences,
                documents: None,
                plan: &plan,
            };
            pass.forward(activations, tokens);
            pass.loss(activations, targets);
        });
        backend.read_f32(&room.activations.losses, 0, &mut losses[..rows])?;
        for (row, (start, length)) in group.iter().enumerate() {
            let first = row * sequences.length;
            let to = &mut log_probabilities[*start..][..*length];
            to[0] = 0.0;
            let losses = &losses[first..][..length - 1];
            to[1..].iter_mut().zip(losses).for_each(|(to, loss)| *to = -loss);
            if let Some(hidden) = &mut hidden {
                let to = &mut hidden[start * channels..][..length * channels];
                backend.read_activations(room.activations.hidden(), first * channels, to)?;
            }
        }
    }
    Ok(())
}
