//! What a recipe keeps of the weights of blocks from step to step: their slow means, and how far they
//! and what they are rounded to move while those that oscillate are looked for.

use super::source::Source;
use super::track::Tracked;
use super::watch::{Watch, WeightMetrics};
use crate::Result;
use crate::backend::{Backend, Part, StepPlan, Values, View, Viewed};
use crate::checkpoint::{Scratch, TensorRead};
use crate::formats::{LINEARS, Operand, Reset, ResetPhase};
use crate::gpt::{Matrix, Means, ParamTable, TensorInfo};
use crate::model::{Model, OnDevice};
use crate::optim::State;
use crate::recipe::Recipe;
use crate::reserve::{collect, text};
use crate::run::TrainerState;

/// The slow means, as checkpoints name them.
const MEAN: State = State { name: "ema", what: "slow mean", is_signed: true };

/// What is tracked of each weight, as checkpoints name it.
const TRACKED: [State; 3] = [
    State { name: "reset_before", what: "number before the last step", is_signed: true },
    State { name: "reset_moved", what: "distance", is_signed: false },
    State { name: "reset_rounded", what: "distance of the rounded number", is_signed: false },
];

/// What is kept of the weights of blocks.
pub(super) struct Followed<B: Backend> {
    /// All of them; none where nothing is kept.
    matrices: Vec<Matrix>,
    /// (matrices), where the recipe rounds by them.
    means: Option<B::F32>,
    /// Where the recipe resets them.
    tracked: Option<Tracked<B>>,
    /// Where somebody asks how they change.
    watch: Option<Watch<B>>,
}

/// Where a run is after a step: steps done of the schedule, and how many there are.
#[derive(Clone, Copy)]
pub(super) struct Done {
    pub(super) steps: u64,
    pub(super) of: u64,
    /// Steps done of the run.
    pub(super) run: u64,
}

impl Done {
    pub(super) fn of(state: &TrainerState) -> Self {
        Self {
            steps: state.schedule_step(),
            of: state.options.schedule.total_steps,
            run: state.step,
        }
    }
}

impl<B: Backend> Followed<B> {
    pub(super) fn new(
        backend: &B,
        arena: &mut B::Arena,
        table: &ParamTable,
        recipe: &Recipe,
    ) -> Result<Self> {
        let (ema, reset) = (recipe.ema(), recipe.reset());
        if ema.is_none() && reset.is_none() {
            return Ok(Self { matrices: Vec::new(), means: None, tracked: None, watch: None });
        }
        let (matrices, len) = table.matrices(B::ALIGN)?;
        let means = ema.map(|_| backend.f32(arena, len));
        let tracked = reset.map(|_| Tracked::new(backend, arena, &matrices, len)).transpose()?;
        Ok(Self { matrices, means, tracked, watch: None })
    }

    /// Begins with weights as they are.
    pub(super) fn begin(&mut self, backend: &B, weights: &B::Weights) {
        for number in 0..self.matrices.len() {
            self.update_mean(backend, weights, number, 0.0);
        }
    }

    /// Follows an update of the weights, which the forward pass of the step rounded by `plan`.
    /// Whether some may have been reset.
    pub(super) fn after_update(
        &mut self,
        backend: &B,
        weights: &mut B::Weights,
        plan: &StepPlan,
        recipe: &Recipe,
        done: Done,
    ) -> Result<bool> {
        let phase = |reset: Reset| reset.phase(done.steps, done.of);
        let phase = recipe.reset().map_or(ResetPhase::Rest, phase);
        for number in 0..self.matrices.len() {
            let operand = *plan.layers[number / LINEARS][number % LINEARS].forward().b();
            // None of a block or a step in bf16.
            let has_codes = operand.has_codes();
            let phase = if has_codes { phase } else { ResetPhase::Rest };
            if has_codes {
                self.view_before(backend, number, &operand, phase);
            }
            if let Some(decay) = recipe.ema() {
                self.update_mean(backend, weights, number, decay);
            }
            let threshold = recipe.reset().map_or(f32::INFINITY, |reset| reset.threshold());
            if has_codes {
                // Who watches sees weights that were reset as they are from now on.
                self.track(backend, weights, (number, &operand), phase, threshold);
                self.observe(backend, weights, (number, &operand));
            }
        }
        if let Some(watch) = &mut self.watch {
            watch.end_step(backend, weights, &self.matrices, done.run)?;
        }
        Ok(phase == ResetPhase::Reset)
    }

    fn update_mean(&mut self, backend: &B, weights: &B::Weights, number: usize, decay: f32) {
        let Matrix { param, own, .. } = self.matrices[number];
        if let Some(means) = &mut self.means {
            backend.update_mean(means, own, backend.param(weights, param), decay);
        }
    }

    /// As the forward pass of the step saw the weight, for those who follow it.
    fn view_before(&mut self, backend: &B, number: usize, operand: &Operand, phase: ResetPhase) {
        let Self { matrices, means, tracked, watch } = self;
        let matrix = &matrices[number];
        let mean = || means.as_ref().map(|flat| Part { flat, slot: matrix.own });
        let of = Viewed { number, shape: matrix.shape, operand };
        if let Some(tracked) = tracked
            && phase == ResetPhase::Track
        {
            tracked.view_before(backend, matrix, mean(), of);
        }
        if let Some(watch) = watch {
            watch.look().view_before(backend, matrix, mean(), of);
        }
    }

    /// What the step did to the weight, for whoever watches.
    fn observe(&mut self, backend: &B, weights: &B::Weights, (number, operand): (usize, &Operand)) {
        let Self { matrices, means, watch, .. } = self;
        let (Some(watch), matrix) = (watch, &matrices[number]) else { return };
        let mean = means.as_ref().map(|flat| Part { flat, slot: matrix.own });
        let of = Viewed { number, shape: matrix.shape, operand };
        watch.look().observe(backend, weights, matrix, mean, of);
    }

    fn track(
        &mut self,
        backend: &B,
        weights: &mut B::Weights,
        (number, operand): (usize, &Operand),
        phase: ResetPhase,
        threshold: f32,
    ) {
        let Self { matrices, means, tracked, .. } = self;
        let (Some(tracked), matrix) = (tracked, &matrices[number]) else { return };
        let mean = means.as_ref().map(|flat| Part { flat, slot: matrix.own });
        let of = Viewed { number, shape: matrix.shape, operand };
        match phase {
            ResetPhase::Rest => {}
            ResetPhase::Begin => {
                let (track, _) = tracked.of(matrix);
                backend.begin_track(track, backend.param(weights, matrix.param));
            }
            ResetPhase::Track => tracked.observe(backend, weights, matrix, mean, of),
            ResetPhase::Reset => {
                let (track, observer) = tracked.of(matrix);
                let w = Values::Weight(backend.param(weights, matrix.param));
                backend.view(observer, View::After, w, mean, of);
                backend.reset(observer, track, (weights, matrix.param), of, threshold);
            }
        }
    }

    /// Watches how the weights that `recipe` rounds to 4 bits change, over windows of `every` steps
    /// from now on, in memory of its own; 0 ends it.
    pub(super) fn watch(
        &mut self,
        on: &OnDevice<B>,
        model: &Model,
        recipe: &Recipe,
        every: u64,
    ) -> Result<()> {
        self.watch = None;
        if every == 0 {
            return Ok(());
        }
        let (backend, table) = (&*on.backend, &on.table);
        let (matrices, len) = table.matrices(B::ALIGN)?;
        let layers = model.config().layers;
        recipe.check_codes(layers, "it is their codes that are watched")?;
        let has_codes = |number: &usize| recipe.has_codes(*number, layers);
        let watched: Vec<usize> = (0..matrices.len()).filter(has_codes).collect();
        let new = |arena: &mut B::Arena| {
            Watch::new(backend, arena, (&matrices, len), &watched, model.tensors(), every)
        };
        let mut watch = on.allocate(model.engine(), "what is seen of weights", new)?;
        let weights = on.read()?;
        backend.scope(|| watch.begin(backend, &weights.all, &matrices));
        (self.matrices, self.watch) = (matrices, Some(watch));
        Ok(())
    }

    /// What the last whole window has shown.
    pub(super) fn metrics(&self) -> Option<&WeightMetrics> {
        self.watch.as_ref()?.metrics()
    }

    /// As a pass reads them.
    pub(super) fn means(&self) -> Option<Means<'_, B>> {
        self.means.as_ref().map(|flat| Means { flat, matrices: &self.matrices })
    }

    /// Weights of which something is kept.
    pub(super) fn matrices(&self) -> &[Matrix] {
        &self.matrices
    }

    /// All that a checkpoint has of it, in order.
    pub(super) fn states(&self, state: &TrainerState) -> impl Iterator<Item = State> {
        self.kept(state).map(|(state, _)| state)
    }

    /// Overwrites what [`Followed::states`] number `number` has of weight `index`; the values are in
    /// a checkpoint's order.
    pub(super) fn load(
        &mut self,
        on: &OnDevice<B>,
        (number, index): (usize, usize),
        values: &[f32],
        ours: &mut Vec<f32>,
    ) -> Result<()> {
        let Self { matrices, means, tracked, .. } = self;
        let tracked = tracked.iter_mut().flat_map(|tracked| &mut tracked.flats);
        let Some(flat) = means.iter_mut().chain(tracked).nth(number) else { return Ok(()) };
        let Matrix { param, own, .. } = matrices[index];
        let ours = on.table.specs()[param.index].import(values, ours)?;
        on.backend.write_f32(flat, own.start, ours)
    }

    /// What is kept between steps: of what is tracked, nothing but while it is.
    pub(super) fn kept(&self, state: &TrainerState) -> impl Iterator<Item = (State, &B::F32)> {
        let Done { steps, of, .. } = Done::of(state);
        let reset = state.options.recipe.reset();
        let tracked = self.tracked.as_ref();
        let tracked = tracked.filter(|_| reset.is_some_and(|reset| reset.is_tracking(steps, of)));
        let tracked =
            tracked.into_iter().flat_map(|tracked| TRACKED.into_iter().zip(&tracked.flats));
        self.means.iter().map(|means| (MEAN, means)).chain(tracked)
    }
}

/// Name and shape of each of these weights.
pub(super) fn tensors(matrices: &[Matrix], all: &[TensorInfo]) -> Result<Vec<TensorInfo>> {
    const WHAT: &str = "the names of the tensors";
    let copy = |matrix: &Matrix| {
        let TensorInfo { name, shape } = &all[matrix.param.index];
        let name = text(WHAT, format_args!("{name}"))?;
        Ok(TensorInfo { name, shape: collect(WHAT, shape.iter().map(|n| Ok(*n)))? })
    };
    collect(WHAT, matrices.iter().map(copy))
}

/// Values of the weights of blocks in Hugging Face's order and shape.
pub(super) struct Exported<'a> {
    pub(super) source: &'a dyn Source,
    pub(super) table: &'a ParamTable,
    pub(super) tensors: &'a [TensorInfo],
    pub(super) matrices: &'a [Matrix],
    /// Which of what is kept it is.
    pub(super) number: usize,
}

impl TensorRead for Exported<'_> {
    fn tensors(&self) -> &[TensorInfo] {
        self.tensors
    }

    fn read(&self, index: usize, out: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        let Matrix { param, own, .. } = self.matrices[index];
        let read = |ours: &mut [f32]| self.source.followed(self.number, own.start, ours);
        self.table.specs()[param.index].export(out, &mut scratch.numbers, read)
    }
}
