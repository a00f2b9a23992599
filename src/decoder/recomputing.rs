//! Logits of a whole sequence, of which nothing is kept.

use std::sync::Arc;

use super::DecoderWeights;
use crate::backend::{Backend, Sequences, StepPlan, WorkspaceShape};
use crate::formats::LinearRecipe;
use crate::gpt::{Activations, ModelConfig, Pass, Shapes};
use crate::model::{Model, OnDevice};
use crate::optim::Master;
use crate::recipe::Recipe;
use crate::{Error, Result};

/// A model and memory for forward passes over one sequence.
pub(super) struct Recomputing<B: Backend> {
    model: Arc<OnDevice<B>>,
    activations: Activations<B>,
    workspace: B::Workspace,
    tokens: B::Tokens,
    logits: B::F32,
    plan: StepPlan,
    /// What the weights are kept as: where they are split, it computes with their copies.
    master: Master,
    weights: DecoderWeights,
    longest: usize,
}

impl<B: Backend> Recomputing<B> {
    pub(super) fn new(
        model: &Model,
        on: &Arc<OnDevice<B>>,
        longest: usize,
        weights: DecoderWeights,
    ) -> Result<Self> {
        let master = on.read()?.master;
        Self::for_master(model, on, longest, (master, weights))
    }

    fn for_master(
        model: &Model,
        on: &Arc<OnDevice<B>>,
        longest: usize,
        master: (Master, DecoderWeights),
    ) -> Result<Self> {
        on.allocate(model.engine(), "generating", |arena| {
            Self::cut(on, arena, model.config(), longest, master)
        })
    }

    /// Logits of the token after `context`.
    pub(super) fn next_logits(
        &mut self,
        model: &Model,
        context: &[u32],
        out: &mut [f32],
    ) -> Result<()> {
        let (on, config) = (Arc::clone(&self.model), model.config());
        let (OnDevice { backend, table, .. }, weights) = (&*on, on.read()?);
        if weights.master != self.master {
            let of = (weights.master, self.weights);
            *self = Self::for_master(model, &on, self.longest, of)?;
        }
        let weights = &weights.all;
        let sequences = Sequences { batch: 1, length: context.len() };
        let Self { activations, workspace, tokens, logits, plan, .. } = self;
        backend.scope(|| {
            backend.write_tokens(tokens, context.len(), |to| to.copy_from_slice(context));
            let (backend, means, merge) = (&**backend, None, None);
            let mut pass = Pass {
                backend,
                config,
                table,
                weights,
                means,
                trains: false,
                merge,
                workspace,
                sequences,
                plan,
            };
            pass.forward(activations, tokens);
            pass.logits(activations, context.len() - 1, logits);
        });
        backend.read_f32(logits, 0, out)
    }

    fn cut(
        model: &Arc<OnDevice<B>>,
        arena: &mut B::Arena,
        config: &ModelConfig,
        longest: usize,
        (master, weights): (Master, DecoderWeights),
    ) -> Result<Self> {
        let (recipe, linear) = match (master, weights) {
            (_, DecoderWeights::Mxfp4) => {
                let remedy = "use bf16 or f32 here, or the device cpu".into();
                let what = "weights in MXFP4 on a GPU, where text is written".into();
                return Err(Error::Unsupported { what, remedy });
            }
            (Master::F32, DecoderWeights::F32) => (Recipe::fp32(), LinearRecipe::F32),
            _ => (Recipe::bf16(), LinearRecipe::BF16),
        };
        let precision = recipe.precision();
        let (backend, sequences) = (&*model.backend, Sequences { batch: 1, length: longest });
        let shapes = Shapes { config, sequences, precision };
        let shape = WorkspaceShape {
            linears: &shapes.linears(),
            norm: shapes.norm(),
            attention: shapes.attention(0),
            head: shapes.head(),
            recipes: &[linear],
            merge: None,
            backward: false,
        };
        backend.supports(&shape)?;
        Ok(Self {
            model: model.clone(),
            activations: Activations::new(backend, arena, shapes, None)?,
            workspace: backend.workspace(arena, &shape),
            tokens: backend.tokens(arena, longest, false)?,
            logits: backend.f32(arena, config.vocab_size),
            plan: recipe.step_plan(config.layers)?,
            master,
            weights,
            longest,
        })
    }
}
