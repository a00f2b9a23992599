//! How weights and what they are rounded to change, for whoever asks: over windows of steps, of each
//! matrix of the blocks and of all of them.

use super::track::Tracked;
use crate::Result;
use crate::backend::Backend;
use crate::formats::Observation;
use crate::gpt::{Matrix, TensorInfo};
use crate::reserve::{collect, text, zeros};

/// How weights changed over a window of steps, and what they are rounded to in the forward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WeightChange {
    /// Mean over the steps of |W - W before| / |W before|, Frobenius norms.
    pub change: f64,
    /// The same of the rounded weights.
    pub rounded_change: f64,
    /// Mean over the steps of the share of weights whose codes changed.
    pub flipped: f64,
    /// Mean over the weights, after the last step, of their distance from the nearest threshold at
    /// which their code changes, over the largest such distance of any weight with that code.
    pub confidence: f64,
    /// Share of weights whose rounded numbers moved more than 16 times as far as themselves, in the
    /// whole window.
    pub oscillating: f64,
    /// Share of weights above the largest number of their blocks, after the last step.
    pub clipped: f64,
    /// The largest magnitude after the last step.
    pub amax: f32,
}

/// What [`crate::Trainer::watch_weights`] finds in a window of steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WeightMetrics {
    /// The last step of the window.
    pub step: u64,
    /// Steps of the window.
    pub steps: u64,
    /// Of all weights that the forward pass holds in 4 bits.
    pub all: WeightChange,
    /// Of each of these tensors, by name.
    pub tensors: Vec<(String, WeightChange)>,
}

/// Sums over the steps of a window.
#[derive(Clone, Copy, Default)]
struct Sums {
    change: f64,
    rounded_change: f64,
    flipped: f64,
    last: Observation,
}

impl Sums {
    fn add(&mut self, seen: Observation, elements: f64) {
        let ratio = |of: f64, over: f64| if over > 0.0 { (of / over).sqrt() } else { 0.0 };
        self.change += ratio(seen.changes, seen.before);
        self.rounded_change += ratio(seen.rounded_changes, seen.rounded_before);
        self.flipped += seen.flipped as f64 / elements;
        self.last = seen;
    }

    fn over(&self, steps: u64, elements: f64) -> WeightChange {
        let Self { change, rounded_change, flipped, last } = *self;
        let steps = steps as f64;
        WeightChange {
            change: change / steps,
            rounded_change: rounded_change / steps,
            flipped: flipped / steps,
            confidence: last.confidence / elements,
            oscillating: last.oscillating as f64 / elements,
            clipped: last.clipped as f64 / elements,
            amax: last.amax,
        }
    }
}

/// A watch over the weights of blocks.
pub(super) struct Watch<B: Backend> {
    tracked: Tracked<B>,
    every: u64,
    /// Steps of the present window.
    steps: u64,
    /// Whether something was observed in the present step.
    is_seen: bool,
    observations: Vec<Observation>,
    /// Numbers of the matrices that are watched, with what was seen of them.
    watched: Vec<(usize, Sums)>,
    of_all: Sums,
    /// Of the last whole window; its tensors are those that are watched.
    metrics: WeightMetrics,
}

impl<B: Backend> Watch<B> {
    /// A watch over those of the matrices whose numbers are `watched`.
    pub(super) fn new(
        backend: &B,
        arena: &mut B::Arena,
        (matrices, len): (&[Matrix], usize),
        watched: &[usize],
        tensors: &[TensorInfo],
        every: u64,
    ) -> Result<Self> {
        const WHAT: &str = "what is seen of weights";
        let entry = |number: &usize| {
            let name = &tensors[matrices[*number].param.index].name;
            Ok((text(WHAT, format_args!("{name}"))?, WeightChange::default()))
        };
        let tensors = collect(WHAT, watched.iter().map(entry))?;
        Ok(Self {
            tracked: Tracked::new(backend, arena, matrices, len)?,
            every,
            steps: 0,
            is_seen: false,
            observations: zeros(WHAT, matrices.len())?,
            watched: collect(WHAT, watched.iter().map(|number| Ok((*number, Sums::default()))))?,
            of_all: Sums::default(),
            metrics: WeightMetrics { tensors, ..WeightMetrics::default() },
        })
    }

    /// What the last whole window has shown.
    pub(super) fn metrics(&self) -> Option<&WeightMetrics> {
        (self.metrics.steps > 0).then_some(&self.metrics)
    }

    /// Begins a window with weights as they are.
    pub(super) fn begin(&mut self, backend: &B, weights: &B::Weights, matrices: &[Matrix]) {
        (self.steps, self.of_all) = (0, Sums::default());
        for (number, sums) in &mut self.watched {
            *sums = Sums::default();
            let (track, _) = self.tracked.of(&matrices[*number]);
            backend.begin_track(track, backend.param(weights, matrices[*number].param));
        }
    }

    /// Who looks at the weights of a step.
    pub(super) fn look(&mut self) -> &mut Tracked<B> {
        self.is_seen = true;
        &mut self.tracked
    }

    /// Takes in what was observed of a step; the last of a window begins another. Waits for the
    /// device.
    pub(super) fn end_step(
        &mut self,
        backend: &B,
        weights: &B::Weights,
        matrices: &[Matrix],
        step: u64,
    ) -> Result<()> {
        if !std::mem::take(&mut self.is_seen) {
            return Ok(());
        }
        backend.observations(self.tracked.observer(), &mut self.observations)?;
        let (mut all, mut elements) = (Observation::default(), 0.0);
        for (number, sums) in &mut self.watched {
            let (seen, len) = (self.observations[*number], matrices[*number].own.len as f64);
            sums.add(seen, len);
            (all, elements) = (all.and(seen), elements + len);
        }
        self.of_all.add(all, elements);
        self.steps += 1;
        if self.steps < self.every {
            return Ok(());
        }
        let (steps, metrics) = (self.steps, &mut self.metrics);
        (metrics.step, metrics.steps) = (step, steps);
        metrics.all = self.of_all.over(steps, elements);
        for ((_, change), (number, sums)) in metrics.tensors.iter_mut().zip(&self.watched) {
            *change = sums.over(steps, matrices[*number].own.len as f64);
        }
        self.begin(backend, weights, matrices);
        Ok(())
    }
}
