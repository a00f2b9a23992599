//! Logits of a whole sequence, of which nothing is kept.

use std::sync::Arc;

use super::{DecoderWeights, recipe_in};
use crate::Result;
use crate::backend::{Backend, Decode, Sequences, WorkspaceShape};
use crate::gpt::{Activations, Pass, Shapes};
use crate::model::{Model, OnDevice};

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
    let shapes = Shapes { config, sequences, precision };
    let shape = WorkspaceShape {
        linears: &shapes.linears(),
        norm: shapes.norm(),
        attention: shapes.attention(0),
        head: shapes.head(),
        recipes: &[*recipe.linear(0)],
        merge: None,
        packed: &[],
        backward: false,
    };
    backend.supports(&shape)?;
    let (mut activations, mut workspace, mut tokens, mut logits) =
        on.allocate(model.engine(), "generating", |arena| {
            Ok((
                Activations::new(backend, arena, shapes, None)?,
                backend.workspace(arena, &shape),
                backend.tokens(arena, context.len(), false)?,
                backend.f32(arena, config.vocab_size),
            ))
        })?;
    backend.scope(|| {
        backend.write_tokens(&mut tokens, context.len(), |to| to.copy_from_slice(context));
        let (means, merge) = (None, None);
        let mut pass = Pass {
            backend,
            config,
            table: &on.table,
            weights: &weights.all,
            means,
            trains: false,
            merge,
            workspace: &mut workspace,
            sequences,
            plan: &plan,
        };
        pass.forward(&mut activations, &tokens);
        pass.logits(&activations, context.len() - 1, &mut logits);
    });
    backend.read_f32(&logits, 0, out)
}
