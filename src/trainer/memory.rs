//! What a trainer needs of memory: planned, then allocated by the same code.
//!
//! `plan` counts one block and two, and every further block as the second, so that it needs no
//! memory for thousands of them; a test compares it with what a trainer takes, at every option.

use std::ops::Range;

use super::batch::BatchBuffers;
use super::exchange::Exchange;
use super::follow::Followed;
use super::merge::Merges;
use super::owners::Owners;
use super::ramping::Ramping;
use crate::backend::{
    Backend, FlatGradients, MergeShape, Reached, Sequences, Slot, StateLayout, WorkspaceShape,
    on_device,
};
use crate::comm::{Ranks, Share};
use crate::gpt::{ActivationGradients, Activations, ForBackward, ModelConfig, Shapes};
use crate::model::{Model, table_for};
use crate::optim::spam::STATISTICS;
use crate::reserve::collect;
use crate::run::TrainerOptions;
use crate::{Engine, Result};

/// Bytes that a model and its trainer take, by purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Weights.
    pub weights: u64,
    /// Gradients of the weights.
    pub gradients: u64,
    /// What the optimizer keeps, such as moments, and what the recipe keeps of weights.
    pub optimizer: u64,
    /// What the forward pass keeps for the backward pass, and the gradients that flow back.
    pub activations: u64,
    /// Packed operands and other scratch of the kernels.
    pub workspace: u64,
    /// Sums of lanes that are kept until others are added to them, and what GPUs get from others.
    pub exchange: u64,
}

impl Plan {
    /// Sum of all purposes.
    pub fn total(&self) -> u64 {
        let Self { weights, gradients, optimizer, activations, workspace, exchange } = self;
        weights + gradients + optimizer + activations + workspace + exchange
    }
}

/// Computes what a model and its trainer will take, before anything is allocated. It is exact: the
/// trainer allocates by the same code.
///
/// # Errors
/// [`crate::Error::InvalidArgument`] for options that make no trainer,
/// [`crate::Error::Unsupported`] for what the device cannot do, [`crate::Error::OutOfMemory`] for
/// sizes that no machine has.
pub fn plan(engine: &Engine, config: &ModelConfig, options: &TrainerOptions) -> Result<Plan> {
    config.validate()?;
    let options = options.resolved(config, engine.size())?;
    let mut plan = on_device!(engine.backend(), backend => {
        let (backend, mut plan) = (&**backend, Plan::default());
        options.frozen.check(config, &table_for(backend, config)?)?;
        let cut = &mut Measured::new(backend, None)?;
        Flat::new(backend, cut, config, &options, (engine.ranks(), false), &mut plan)?;
        // Every further block takes as much as the second.
        let of = |layers| -> Result<[u64; 2]> {
            let (config, mut plan) = (ModelConfig { layers, ..config.clone() }, Plan::default());
            Buffers::new(backend, None, &config, &options, engine.ranks(), &mut plan)?;
            Ok([plan.activations, plan.workspace])
        };
        let (one, two) = (of(1)?, of(2)?);
        let further = config.layers as u64 - 1;
        [plan.activations, plan.workspace] =
            std::array::from_fn(|i| one[i] + (two[i] - one[i]) * further);
        plan
    });
    plan.weights = Model::plan(engine, config, options.optimizer.master)?;
    Ok(plan)
}

/// All memory of a trainer.
pub(super) struct Buffers<B: Backend> {
    // NOTE: before the events that are recorded in them.
    pub(super) recordings: B::Recordings,
    pub(super) flat: Flat<B>,
    pub(super) activations: Activations<B>,
    pub(super) d: ActivationGradients<B>,
    pub(super) batch: BatchBuffers<B>,
    pub(super) merges: Option<Merges<B>>,
    pub(super) workspace: B::Workspace,
}

/// What there is for each parameter, and for all of them together.
pub(super) struct Flat<B: Backend> {
    /// Where each parameter lies; those that are not trained have no elements.
    pub(super) slots: Vec<Slot>,
    pub(super) gradients: FlatGradients<B>,
    /// What the optimizer keeps of each element, in the order of its states.
    pub(super) states: Vec<B::Bytes>,
    /// Where in each of them.
    pub(super) layouts: Vec<StateLayout>,
    /// The parameters whose states these are, by their numbers: all, but where ranks shard them.
    pub(super) owned: Range<usize>,
    /// The same in parts, which are given to other ranks one behind the other.
    pub(super) parts: Vec<Range<usize>>,
    /// (parameters, [`STATISTICS`]), of an optimizer that normalizes gradients.
    pub(super) statistics: B::F32,
    pub(super) reduction: B::Reduction,
    pub(super) followed: Followed<B>,
    /// Of an optimizer that ramps up.
    pub(super) ramping: Option<Ramping<B>>,
    pub(super) exchange: Exchange<B>,
}

/// An arena that tells what was cut from it since it was last asked.
struct Measured<'a, B: Backend> {
    backend: &'a B,
    arena: B::Arena,
    told: u64,
}

impl<'a, B: Backend> Measured<'a, B> {
    fn new(backend: &'a B, bytes: Option<u64>) -> Result<Self> {
        let arena = backend.arena(bytes.map(|bytes| bytes as usize))?;
        Ok(Self { backend, arena, told: 0 })
    }

    fn since_last(&mut self) -> u64 {
        let used = self.backend.arena_used(&self.arena) as u64;
        used - std::mem::replace(&mut self.told, used)
    }
}

impl<B: Backend> Flat<B> {
    fn new(
        backend: &B,
        cut: &mut Measured<'_, B>,
        config: &ModelConfig,
        options: &TrainerOptions,
        (ranks, allocates): (Option<&Ranks>, bool),
        plan: &mut Plan,
    ) -> Result<Self> {
        let table = table_for(backend, config)?;
        let (arena, optimizer) = (&mut cut.arena, &options.optimizer);
        let slots = options.frozen.trained(&table)?;
        let gradients = FlatGradients::new(backend, arena, &slots, optimizer.gradients)?;
        plan.gradients = cut.since_last();
        let arena = &mut cut.arena;
        let owners = Owners::new(&slots, optimizer, B::ALIGN, ranks)?;
        let owned = ranks.map_or(0..slots.len(), |ranks| owners.of(ranks.rank()));
        let layouts = StateLayout::of_all(&slots, optimizer, &owned, B::ALIGN)?;
        let states = layouts.iter().map(|layout| Ok(backend.bytes(arena, layout.bytes)));
        let states = collect("the states of the optimizer", states)?;
        let kept = if optimizer.kind.normalizes() { slots.len() } else { 0 };
        let statistics = backend.f32(arena, kept * STATISTICS);
        let reduction = backend.reduction(arena, &slots, optimizer)?;
        let followed = Followed::new(backend, arena, &table, &options.recipe)?;
        let ramping = Ramping::new(backend, arena, &table, optimizer, &layouts)?;
        plan.optimizer = cut.since_last();
        let share = Share::new(options.accumulation, options.lanes, ranks);
        let of = ((&table, &slots[..]), &gradients, owners);
        let (exchange, parts) =
            Exchange::new(backend, &mut cut.arena, of, share, ranks, allocates)?;
        plan.exchange = cut.since_last();
        Ok(Self {
            slots,
            gradients,
            states,
            layouts,
            owned,
            parts,
            statistics,
            reduction,
            followed,
            ramping,
            exchange,
        })
    }

    /// Lets the devices of ranks reach each other's memory, which all ranks do before a step.
    pub(super) fn meet(&mut self, backend: &B, weights: &B::Weights, ranks: &Ranks) -> Result<()> {
        let Self { gradients, reduction, exchange, .. } = self;
        exchange.meet(backend, &Reached { gradients, weights, reduction }, ranks)
    }
}

impl<B: Backend> Buffers<B> {
    /// Cuts everything from one arena of `bytes`, or measures for `None`; fills in the plan.
    pub(super) fn new(
        backend: &B,
        bytes: Option<u64>,
        config: &ModelConfig,
        options: &TrainerOptions,
        ranks: Option<&Ranks>,
        plan: &mut Plan,
    ) -> Result<Self> {
        let mut cut = Measured::new(backend, bytes)?;
        let sequences = Sequences { batch: options.batch_size, length: options.sequence_length };
        let precision = options.recipe.precision();
        let flat = Flat::new(backend, &mut cut, config, options, (ranks, bytes.is_some()), plan)?;
        let (arena, drops) = (&mut cut.arena, options.token_drop.is_some());
        let (recompute, everywhere) = (options.recompute, options.recipe.everywhere());
        let kept = ForBackward { recompute, everywhere, drops };
        let shapes = Shapes { config, sequences, precision };
        let activations = Activations::new(backend, arena, shapes, Some(kept))?;
        let d = ActivationGradients::new(backend, arena, shapes, drops);
        let batch = BatchBuffers::new(backend, arena, options, bytes.is_some())?;
        let merges = Merges::new(backend, arena, config, options, bytes.is_some())?;
        plan.activations = cut.since_last();
        // What multiplies fewer rows may be something else, with other needs.
        let sizes = options.token_drop.iter().flat_map(|drop| drop.sizes(sequences.length));
        let of_size = |length| Shapes { sequences: Sequences { length, ..sequences }, ..shapes };
        let of_sizes = sizes.flat_map(|length| of_size(length).linears());
        let linears = shapes.linears().into_iter().chain(of_sizes).map(Ok);
        let linears = collect("the shapes of the linear layers", linears)?;
        let widest = linears.iter().map(|layer| layer.inputs).max().unwrap_or(0);
        let of_bits = |hashes| MergeShape { sequences, channels: widest, hashes };
        let shape = WorkspaceShape {
            linears: &linears,
            norm: shapes.norm(),
            attention: shapes.attention(0),
            head: shapes.head(),
            recipes: &options.recipe.all(),
            merge: options.recipe.haste().map(of_bits),
            packed: &[],
            adapters: &shapes.adapters()?,
            backward: true,
        };
        backend.supports(&shape)?;
        let workspace = backend.workspace(&mut cut.arena, &shape);
        plan.workspace = cut.since_last();
        let recordings = backend.recordings();
        Ok(Self { flat, activations, d, batch, merges, workspace, recordings })
    }
}
