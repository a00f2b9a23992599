//! What a recipe keeps of the weights of blocks from step to step: their slow means, and how far they
//! and what they are rounded to move while those that oscillate are looked for.

use crate::Result;
use crate::backend::{Backend, Part, StepPlan, Track, Values, View, Viewed};
use crate::checkpoint::TensorRead;
use crate::formats::{LINEARS, Operand, Reset, ResetPhase};
use crate::gpt::{Matrix, Means, ParamTable, TensorInfo};
use crate::model::OnDevice;
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
}

/// Flat buffers (matrices), each as [`Track`] has it, and who looks.
struct Tracked<B: Backend> {
    flats: [B::F32; 3],
    observer: B::Observer,
}

impl<B: Backend> Tracked<B> {
    fn new(backend: &B, arena: &mut B::Arena, matrices: &[Matrix], len: usize) -> Result<Self> {
        let flats = std::array::from_fn(|_| backend.f32(arena, len));
        let shapes = matrices.iter().map(|matrix| Ok(matrix.shape));
        let shapes = collect("the shapes of the weights of blocks", shapes)?;
        Ok(Self { flats, observer: backend.observer(arena, &shapes)? })
    }

    fn of(&mut self, matrix: &Matrix) -> (Track<'_, B>, &mut B::Observer) {
        let [before, moved, rounded_moved] = &mut self.flats;
        (Track { before, moved, rounded_moved, slot: matrix.own }, &mut self.observer)
    }
}

/// Where a run is after a step: steps done of the schedule, and how many there are.
#[derive(Clone, Copy)]
pub(super) struct Done {
    pub(super) steps: u64,
    pub(super) of: u64,
}

impl Done {
    pub(super) fn of(state: &TrainerState) -> Self {
        Self { steps: state.schedule_step(), of: state.options.schedule.total_steps }
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
            return Ok(Self { matrices: Vec::new(), means: None, tracked: None });
        }
        let (matrices, len) = table.matrices(B::ALIGN)?;
        let means = ema.map(|_| backend.f32(arena, len));
        let tracked = reset.map(|_| Tracked::new(backend, arena, &matrices, len)).transpose()?;
        Ok(Self { matrices, means, tracked })
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
    ) -> bool {
        let phase = |reset: Reset| reset.phase(done.steps, done.of);
        let phase = recipe.reset().map_or(ResetPhase::Rest, phase);
        for number in 0..self.matrices.len() {
            let operand = *plan.layers[number / LINEARS][number % LINEARS].forward().b();
            // None of a block or a step in bf16.
            let phase = if operand.has_codes() { phase } else { ResetPhase::Rest };
            if phase == ResetPhase::Track {
                self.view_before(backend, number, &operand);
            }
            if let Some(decay) = recipe.ema() {
                self.update_mean(backend, weights, number, decay);
            }
            let threshold = recipe.reset().map_or(f32::INFINITY, |reset| reset.threshold());
            self.track(backend, weights, (number, &operand), phase, threshold);
        }
        phase == ResetPhase::Reset
    }

    fn update_mean(&mut self, backend: &B, weights: &B::Weights, number: usize, decay: f32) {
        let Matrix { param, own, .. } = self.matrices[number];
        if let Some(means) = &mut self.means {
            backend.update_mean(means, own, backend.param(weights, param), decay);
        }
    }

    /// As the forward pass of the step saw the weight.
    fn view_before(&mut self, backend: &B, number: usize, operand: &Operand) {
        let Self { matrices, means, tracked } = self;
        let (Some(tracked), matrix) = (tracked, &matrices[number]) else { return };
        let mean = means.as_ref().map(|flat| Part { flat, slot: matrix.own });
        let of = Viewed { number, shape: matrix.shape, operand };
        let (Track { before, slot, .. }, observer) = tracked.of(matrix);
        let kept = Values::Kept(Part { flat: before, slot });
        backend.view(observer, View::Before, kept, mean, of);
    }

    fn track(
        &mut self,
        backend: &B,
        weights: &mut B::Weights,
        (number, operand): (usize, &Operand),
        phase: ResetPhase,
        threshold: f32,
    ) {
        let Self { matrices, means, tracked } = self;
        let (Some(tracked), matrix) = (tracked, &matrices[number]) else { return };
        let mean = means.as_ref().map(|flat| Part { flat, slot: matrix.own });
        let of = Viewed { number, shape: matrix.shape, operand };
        let (track, observer) = tracked.of(matrix);
        let w = || backend.param(weights, matrix.param);
        match phase {
            ResetPhase::Rest => {}
            ResetPhase::Begin => backend.begin_track(track, w()),
            ResetPhase::Track => {
                backend.view(observer, View::After, Values::Weight(w()), mean, of);
                backend.observe(observer, track, w(), of);
            }
            ResetPhase::Reset => {
                backend.view(observer, View::After, Values::Weight(w()), mean, of);
                backend.reset(observer, track, (weights, matrix.param), of, threshold);
            }
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

    /// All that a checkpoint has of it, in order.
    pub(super) fn states(&self, state: &TrainerState) -> impl Iterator<Item = State> {
        self.kept(state).map(|(state, _)| state)
    }

    /// The values of these, as a checkpoint holds them, of these [`Followed::tensors`].
    pub(super) fn exported<'a>(
        &'a self,
        state: &TrainerState,
        on: &'a OnDevice<B>,
        tensors: &'a [TensorInfo],
    ) -> impl Iterator<Item = (State, Exported<'a, B>)> {
        let matrices = &self.matrices;
        self.kept(state).map(move |(state, flat)| (state, Exported { on, tensors, matrices, flat }))
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
        let Self { matrices, means, tracked } = self;
        let tracked = tracked.iter_mut().flat_map(|tracked| &mut tracked.flats);
        let Some(flat) = means.iter_mut().chain(tracked).nth(number) else { return Ok(()) };
        let Matrix { param, own, .. } = matrices[index];
        on.table.specs()[param.index].import(values, ours)?;
        on.backend.write_f32(flat, own.start, ours)
    }

    /// What is kept between steps: of what is tracked, nothing but while it is.
    fn kept(&self, state: &TrainerState) -> impl Iterator<Item = (State, &B::F32)> {
        let Done { steps, of } = Done::of(state);
        let reset = state.options.recipe.reset();
        let tracked = self.tracked.as_ref();
        let tracked = tracked.filter(|_| reset.is_some_and(|reset| reset.is_tracking(steps, of)));
        let tracked =
            tracked.into_iter().flat_map(|tracked| TRACKED.into_iter().zip(&tracked.flats));
        self.means.iter().map(|means| (MEAN, means)).chain(tracked)
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
        let Matrix { param, own, .. } = self.matrices[index];
        self.on.backend.read_f32(self.flat, own.start, out)?;
        self.on.table.specs()[param.index].export(out, &mut Vec::new())
    }
}
