//! What a trainer needs of memory: planned, then allocated by the same code.

use super::batch::Batch;
use crate::backend::{Backend, Precision, Sequences, Trained, WorkspaceShape};
use crate::gpt::{
    ActivationGradients, Activations, ModelConfig, ParamSpec, Params, for_all_layers,
    parameter_tensors, specs,
};
use crate::model::Model;
use crate::run::TrainerOptions;
use crate::{Engine, Result};

/// Bytes that a model and its trainer take, by purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Weights.
    pub weights: u64,
    /// Gradients of the weights.
    pub gradients: u64,
    /// Moments of AdamW.
    pub optimizer: u64,
    /// What the forward pass keeps for the backward pass, and the gradients that flow back.
    pub activations: u64,
    /// Packed operands and other scratch of the kernels.
    pub workspace: u64,
}

impl Plan {
    /// Sum of all purposes.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations + self.workspace
    }
}

/// Computes what a model and its trainer will take, before anything is allocated. It is exact: the
/// trainer allocates by the same code.
///
/// # Errors
/// [`Error::InvalidArgument`] for options that make no trainer.
pub fn plan(engine: &Engine, config: &ModelConfig, options: &TrainerOptions) -> Result<Plan> {
    config.validate()?;
    let options = options.resolved(config)?;
    let backend = engine.backend();
    // What the optimizer keeps for all parameters together is rounded up as a whole.
    let table = |config: &ModelConfig| -> Result<u64> {
        let mut arena = backend.arena(None)?;
        backend.optimizer(&mut arena, parameter_tensors(config))?;
        Ok(backend.arena_used(&arena) as u64)
    };
    let [gradients, moments, activations, workspace] = for_all_layers(config, |config| {
        let mut plan = Plan::default();
        Buffers::new(backend, None, config, &options, &mut plan)?;
        Ok([plan.gradients, plan.optimizer - table(config)?, plan.activations, plan.workspace])
    })?;
    let weights = Model::plan(engine, config)?;
    Ok(Plan { weights, gradients, optimizer: moments + table(config)?, activations, workspace })
}

/// All memory of a trainer.
pub(super) struct Buffers<B: Backend> {
    pub(super) gradients: Params<B::F32>,
    /// First moments.
    pub(super) m: Params<B::F32>,
    /// Second moments.
    pub(super) v: Params<B::F32>,
    pub(super) activations: Activations<B>,
    pub(super) d: ActivationGradients<B>,
    pub(super) batch: Batch<B>,
    pub(super) workspace: B::Workspace,
    pub(super) optimizer: B::Optimizer,
    pub(super) recordings: B::Recordings,
}

/// Calls `visit` with every parameter and what training keeps for it.
pub(super) fn trained<B: Backend>(
    params: &mut Params<B::Param>,
    m: &mut Params<B::F32>,
    v: &mut Params<B::F32>,
    gradients: &mut Params<B::F32>,
    specs: &Params<ParamSpec>,
    visit: &mut dyn FnMut(Trained<'_, B>),
) {
    let moments = m.iter_mut().zip(v.iter_mut());
    let all = params.iter_mut().zip(moments).zip(gradients.iter_mut()).zip(specs.iter());
    for (((param, (m, v)), gradient), spec) in all {
        visit(Trained { param, m, v, gradient, decays: spec.decays() });
    }
}

impl<B: Backend> Buffers<B> {
    /// Cuts everything from one arena of `bytes`, or measures for `None`; fills in the plan.
    pub(super) fn new(
        backend: &B,
        bytes: Option<u64>,
        config: &ModelConfig,
        options: &TrainerOptions,
        plan: &mut Plan,
    ) -> Result<Self> {
        let mut arena = backend.arena(bytes.map(|bytes| bytes as usize))?;
        let mut measured = 0;
        let mut since_last = |arena: &B::Arena| {
            let used = backend.arena_used(arena) as u64;
            used - std::mem::replace(&mut measured, used)
        };
        let specs = specs(config)?;
        let sequences = Sequences { batch: options.batch_size, length: options.sequence_length };
        let params = |arena: &mut B::Arena| specs.map(|spec| backend.f32(arena, spec.len()));

        let gradients = params(&mut arena)?;
        plan.gradients = since_last(&arena);
        let (m, v) = (params(&mut arena)?, params(&mut arena)?);
        let optimizer = backend.optimizer(&mut arena, parameter_tensors(config))?;
        plan.optimizer = since_last(&arena);
        let precision = Precision::of(options.recipe.linear().forward());
        let activations = Activations::new(
            backend,
            &mut arena,
            config,
            sequences,
            precision,
            Some(options.recompute),
        )?;
        let d = ActivationGradients::new(backend, &mut arena, config, sequences, precision);
        let batch = Batch::new(backend, &mut arena, sequences, bytes.is_some())?;
        plan.activations = since_last(&arena);
        let shape = WorkspaceShape {
            sequences,
            channels: config.channels,
            mlp_channels: config.mlp_width(),
            heads: config.heads,
            vocab_size: config.vocab_size,
            recipes: options.recipe.all(),
            backward: true,
        };
        backend.supports(&shape)?;
        let workspace = backend.workspace(&mut arena, &shape);
        plan.workspace = since_last(&arena);
        let recordings = backend.recordings();
        Ok(Self { gradients, m, v, activations, d, batch, workspace, optimizer, recordings })
    }
}
