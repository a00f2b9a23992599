//! Q-Ramping (`optim/ramping.rs`): the steps that are made aside before every period, how far they
//! move weights and what these are rounded to, and that nothing else is left of them.
//!
//! The windows of such steps are drawn apart from the run's, by [`Dataset::side_window`], and so
//! are their random numbers. Formats, learning rate and slow means are those of the step that comes
//! after them; what the recipe follows of weights does not see them. W is rounded to nearest,
//! whatever the recipe rounds it by.
//!
//! NOTE: a run that was saved where a period begins makes the same steps again when it goes on, so
//! nothing of them is in a checkpoint.
//!
//! [`Dataset::side_window`]: crate::Dataset::side_window

use std::sync::Arc;

use super::follow::Done;
use super::track::Tracked;
use super::{FillWindow, Run, check_finite};
use crate::backend::{Backend, StateLayout, Viewed};
use crate::comm::Call;
use crate::data::Window;
use crate::formats::LINEARS;
use crate::gpt::{Matrix, ParamTable};
use crate::model::{Model, Weights};
use crate::optim::ramping::{INTERVAL, SIDE_STEPS};
use crate::optim::{Bounds, Optimizer, OptimizerStep};
use crate::run::TrainerState;
use crate::{Error, Result};

/// Where random numbers of steps aside are drawn: beyond any step of a run.
const BEYOND: u64 = 1 << 31;

/// What is kept while steps are made aside.
pub(super) struct Ramping<B: Backend> {
    matrices: Vec<Matrix>,
    tracked: Tracked<B>,
    /// As they were: weights, first and second moments.
    weights: B::F32,
    moments: [B::Bytes; 2],
}

impl<B: Backend> Ramping<B> {
    /// None for an optimizer that ramps nothing up.
    pub(super) fn new(
        backend: &B,
        arena: &mut B::Arena,
        table: &ParamTable,
        optimizer: &Optimizer,
        layouts: &[StateLayout],
    ) -> Result<Option<Self>> {
        if optimizer.ramping == 0 {
            return Ok(None);
        }
        let (matrices, len) = table.matrices(B::ALIGN)?;
        let tracked = Tracked::new(backend, arena, &matrices, len)?;
        let weights = backend.f32(arena, table.len());
        let moments = [0, 1].map(|state| backend.bytes(arena, layouts[state].bytes));
        Ok(Some(Self { matrices, tracked, weights, moments }))
    }

    /// Puts aside what the steps will change.
    fn begin(
        &mut self,
        backend: &B,
        table: &ParamTable,
        weights: &B::Weights,
        (states, layouts): (&[B::Bytes], &[StateLayout]),
    ) {
        table.slots().iter().for_each(|s| backend.put_aside(weights, *s, &mut self.weights));
        for (kept, (state, layout)) in self.moments.iter_mut().zip(states.iter().zip(layouts)) {
            backend.copy_bytes(state, layout.bytes, kept);
        }
        for matrix in &self.matrices {
            let (track, _) = self.tracked.of(matrix);
            backend.begin_track(track, backend.param(weights, matrix.param));
        }
    }

    /// Adds what a step moved.
    fn observe(&mut self, backend: &B, weights: &B::Weights, state: &TrainerState) {
        let (recipe, layers) = (&state.options.recipe, self.matrices.len() / LINEARS);
        let Done { steps, of, .. } = Done::of(state);
        for (number, matrix) in self.matrices.iter().enumerate() {
            let linears = recipe.for_layer(number / LINEARS, layers, steps, of);
            let operand = linears[number % LINEARS].forward().b();
            if !operand.has_codes() {
                continue;
            }
            let of = Viewed { number, shape: matrix.shape, operand };
            self.tracked.view_before(backend, matrix, None, of);
            self.tracked.observe(backend, weights, matrix, None, of);
        }
    }

    /// Puts back what was put aside.
    fn end(
        &self,
        backend: &B,
        table: &ParamTable,
        weights: &mut B::Weights,
        (states, layouts): (&mut [B::Bytes], &[StateLayout]),
    ) {
        table.slots().iter().for_each(|s| backend.put_back(&self.weights, *s, weights));
        for (kept, (state, layout)) in self.moments.iter().zip(states.iter_mut().zip(layouts)) {
            backend.copy_bytes(kept, layout.bytes, state);
        }
    }

    /// Replaces the intervals of all matrices by those of what moved.
    fn replace_intervals(
        &mut self,
        backend: &B,
        intervals: &mut B::Bytes,
        layout: &StateLayout,
        period: u32,
    ) {
        for matrix in &self.matrices {
            let at = layout.places[matrix.param.index].start;
            let (track, _) = self.tracked.of(matrix);
            backend.find_intervals(intervals, at, track, period as f32);
        }
    }
}

impl<B: Backend> Run<B> {
    /// Makes steps aside, where a period begins, and finds intervals by them; whatever comes of
    /// them, weights and moments are then as before.
    pub(super) fn begin_period(
        &mut self,
        weights: &mut Weights<B>,
        model: &Model,
        state: &TrainerState,
        (known, step, call): (&Bounds, &OptimizerStep, Call),
        of: (&mut FillWindow<'_>, bool),
    ) -> Result<()> {
        let (on, largest) = (Arc::clone(&self.model), weights.largest);
        let (backend, table, period) = (&*on.backend, &on.table, step.optimizer.ramping);
        let flat = &mut self.buffers.flat;
        let Some(ramping) = &mut flat.ramping else { return Ok(()) };
        if !state.step.is_multiple_of(period.into()) {
            return Ok(());
        }
        backend.scope(|| {
            ramping.begin(backend, table, &weights.all, (&flat.states, &flat.layouts));
        });
        let done = self.steps_aside(weights, model, (state, call), (*known, step), of);
        let flat = &mut self.buffers.flat;
        let Some(ramping) = &mut flat.ramping else { return Ok(()) };
        backend.scope(|| {
            ramping.end(backend, table, &mut weights.all, (&mut flat.states, &flat.layouts));
        });
        weights.largest = largest;
        done.map_err(|error| match error {
            Error::NotFinite { what, value } => {
                let what = format!("in steps that ramping makes before step {}, {what}", step.t);
                Error::NotFinite { what, value }
            }
            other => other,
        })?;
        let (intervals, layout) = (&mut flat.states[INTERVAL], &flat.layouts[INTERVAL]);
        backend.scope(|| ramping.replace_intervals(backend, intervals, layout, period));
        Ok(())
    }

    fn steps_aside(
        &mut self,
        weights: &mut Weights<B>,
        model: &Model,
        (state, call): (&TrainerState, Call),
        (mut known, step): (Bounds, &OptimizerStep),
        (fill, weighted): (&mut FillWindow<'_>, bool),
    ) -> Result<()> {
        let on = Arc::clone(&self.model);
        let before = (state.step / u64::from(step.optimizer.ramping)).wrapping_mul(SIDE_STEPS);
        let optimizer = Optimizer { ramping: 0, ..step.optimizer };
        for i in 0..SIDE_STEPS {
            let aside = OptimizerStep { optimizer, t: step.t + i, ..*step };
            let number = before.wrapping_add(i);
            let mut fill =
                |micro_step, row, window: Window<'_>| fill(Some(number), micro_step, row, window);
            let drawn_for = BEYOND + number % BEYOND;
            let drawn = (drawn_for, step.loss_scale);
            let all =
                self.gradients(weights, model, (state, call), drawn, &mut |run, weights| {
                    run.own_gradients(weights, model, state, drawn, (&mut fill, weighted))
                })?;
            let all = all.of_windows(state);
            let aside = self.divided(state, &aside, all.divisor);
            let sums = self.update(weights, model, &mut known, &aside, false)?;
            check_finite(&sums, &aside, format_args!("one"))?;
            if let Some(ramping) = &mut self.buffers.flat.ramping {
                let backend = &*on.backend;
                backend.scope(|| ramping.observe(backend, &weights.all, state));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::iter::zip;

    use super::super::Gradients;
    use super::super::memory::Flat;
    use super::*;
    use crate::backend::{Device, Slot};
    use crate::formats::{Bits, OperandId, Quantized, Random, Source};
    use crate::optim::ramping::interval;
    use crate::run::TrainerOptions;
    use crate::{Dataset, Engine, EngineOptions, ModelConfig, Schedule, Trainer};

    fn data() -> Dataset {
        Dataset::from_tokens((0..2000).map(|i| i * i % 31).collect()).unwrap()
    }

    /// Rates at which some numbers move once and others never.
    fn trainer(optimizer: &str, recipe: &str) -> Trainer {
        let engine = Engine::new(EngineOptions { threads: 2, ..Default::default() }).unwrap();
        let config = ModelConfig {
            vocab_size: 33,
            context_length: 16,
            layers: 2,
            heads: 2,
            channels: 36,
            ..ModelConfig::default()
        };
        let options = TrainerOptions {
            batch_size: 3,
            accumulation: 2,
            recipe: recipe.parse().unwrap(),
            optimizer: Optimizer { clip: 0.0, ..optimizer.parse().unwrap() },
            schedule: Schedule { lr: 1e-5, ..Schedule::default() },
            ..TrainerOptions::default()
        };
        Trainer::new(&Model::new(&engine, &config).unwrap(), options).unwrap()
    }

    /// The weights of linear layers, or a state of them.
    fn of_matrices(trainer: &Trainer, state: Option<usize>) -> Vec<(Slot, Vec<f32>)> {
        let Device::Cpu(run) = &trainer.run else { panic!("made on the CPU") };
        let (matrices, _) = run.model.table.matrices(16).unwrap();
        let read = |matrix: &Matrix| {
            let flat = &run.buffers.flat;
            let values = match state {
                None => run.model.read().unwrap().all[matrix.param.range()].to_vec(),
                Some(state) => {
                    let place = &flat.layouts[state].places[matrix.param.index];
                    let bytes = &flat.states[state][place.start..][..place.bytes()];
                    bytemuck::cast_slice(bytes).to_vec()
                }
            };
            (matrix.param, values)
        };
        matrices.iter().map(read).collect()
    }

    fn states(trainer: &Trainer) -> [Vec<(Slot, Vec<f32>)>; 6] {
        [None, Some(0), Some(1), Some(2), Some(3), Some(4)].map(|state| of_matrices(trainer, state))
    }

    /// Without stochastic rounding, whose draws differ: intervals are those of what thirty steps of
    /// AdamW on other windows move, and the step that comes after them is AdamW's first.
    #[test]
    fn intervals_are_those_of_steps_on_other_windows() {
        let recipe = "mxfp4-mxfp4,bf16-last-layers=1";
        let mut twin = trainer("adamw", recipe);
        let operand = *twin.options().recipe.linear(0).forward().b();
        let rounded = |(slot, w): &(Slot, Vec<f32>)| {
            let [rows, depth] = slot.shape();
            let source = Source { data: w, rows, depth, transposed: false };
            let draw = Random::NONE.rounding(OperandId::W);
            let bits = Bits { elements: draw, scales: draw, transposed: false };
            Quantized::new(source, &operand, &[], &bits).dequantized(depth)
        };
        let (data, seed) = (data(), twin.seed());
        let mut before = of_matrices(&twin, None);
        let mut moved: Vec<_> = before.iter().map(|(_, w)| vec![[0.0f32; 2]; w.len()]).collect();
        for step in 0..30 {
            let mut side = |_: Option<u64>, micro_step, row, window: Window<'_>| {
                let number = (step * 2 + micro_step as u64) * 3 + row as u64;
                data.side_window(seed, number, 33, window)
            };
            twin.optimizer_step(
                Ok(()),
                None,
                false,
                Gradients::Of { fill: &mut side, weighted: false },
            )
            .unwrap();
            let after = of_matrices(&twin, None);
            for (moved, (before, after)) in moved.iter_mut().zip(zip(&before, &after)) {
                let numbers = zip(rounded(before), rounded(after));
                let all = zip(zip(&before.1, &after.1), numbers);
                for ([w, q], ((w_before, w_after), (q_before, q_after))) in
                    moved.iter_mut().zip(all)
                {
                    *w += (w_after - w_before).abs();
                    *q += (q_after - q_before).abs();
                }
            }
            before = after;
        }
        let mut ramping = trainer("adamw,ramping=1000", recipe);
        let mut plain = trainer("adamw", recipe);
        let expected = plain.step(&data).unwrap();
        let stats = ramping.step(&data).unwrap();
        assert_eq!((stats.loss, stats.grad_norm), (expected.loss, expected.grad_norm));
        let mut waiting = 0;
        for (i, ((_, found), moved)) in zip(of_matrices(&ramping, Some(2)), &moved).enumerate() {
            // The last block is in bf16.
            let expected =
                moved.iter().map(|[w, q]| if i < 4 { interval(*w, *q, 1000.0) } else { 1.0 });
            assert_eq!(found, expected.collect::<Vec<_>>(), "{i}");
            waiting += found.iter().filter(|n| **n > 1.0).count();
        }
        let all: usize = moved.iter().map(Vec::len).sum();
        assert!(waiting > 100 && waiting < all / 4, "{waiting} of {all}");
        // What is updated in this step is AdamW's, and what waits has only decayed.
        let [intervals, count, sum] = [2, 3, 4].map(|state| of_matrices(&ramping, Some(state)));
        let (ours, theirs) = (of_matrices(&ramping, None), of_matrices(&plain, None));
        for (i, (_, intervals)) in intervals.iter().enumerate() {
            for (k, interval) in intervals.iter().enumerate() {
                let is_due = *interval == 1.0;
                assert_eq!(count[i].1[k], if is_due { 0.0 } else { 1.0 });
                assert!(is_due || sum[i].1[k] != 0.0, "{i}, {k}");
                assert_eq!(ours[i].1[k] == theirs[i].1[k], is_due, "{i}, {k}");
            }
        }
    }

    /// Weights, moments, intervals and what has been added up.
    #[test]
    fn a_stop_or_a_failure_within_leaves_everything_as_before() {
        let recipe = "tetrajet,ema=0.9";
        let data = data();
        let [mut straight, mut stopped] = [0; 2].map(|_| trainer("adamw,ramping=3", recipe));
        for _ in 0..3 {
            straight.step(&data).unwrap();
            stopped.step(&data).unwrap();
        }
        let before = states(&stopped);
        let (stop, seed) = (stopped.stop_handle(), stopped.seed());
        let mut asks = |aside: Option<u64>, _, row, window: Window<'_>| {
            if aside == Some(30 + 7) {
                stop.request_stop();
            }
            data.side_window(seed, row as u64, 33, window)
        };
        let error = stopped
            .optimizer_step(Ok(()), None, true, Gradients::Of { fill: &mut asks, weighted: false })
            .unwrap_err();
        assert!(matches!(error, Error::Stopped), "{error}");
        assert!(states(&stopped) == before && stopped.steps_done() == 3);
        stopped.stop_handle().clear();
        let mut fails = |aside: Option<u64>, _, row, window: Window<'_>| match aside {
            Some(39) => Err(Error::invalid("tokens", "there are none")),
            _ => data.side_window(seed, row as u64, 33, window),
        };
        assert!(
            stopped
                .optimizer_step(
                    Ok(()),
                    None,
                    false,
                    Gradients::Of { fill: &mut fails, weighted: false }
                )
                .is_err()
        );
        assert!(states(&stopped) == before);
        // Beyond what moments can become.
        let Device::Cpu(run) = &mut stopped.run else { panic!("made on the CPU") };
        let slot = run.model.table.slots()[0];
        let mut large = run.model.read().unwrap().all[slot.range()].to_vec();
        let wte = large.clone();
        large.iter_mut().for_each(|w| *w *= 1e25);
        stopped.model().write_tensor("transformer.wte.weight", &large).unwrap();
        let error = stopped.step(&data).unwrap_err().to_string();
        assert!(error.contains("in steps that ramping makes before step 4, "), "{error}");
        assert!(!error.contains("step 5") && !error.contains("(clip"), "{error}");
        stopped.model().write_tensor("transformer.wte.weight", &wte).unwrap();
        assert!(states(&stopped) == before);
        // Beyond what weights can become.
        stopped.set_lr(Some(3e38)).unwrap();
        let error = stopped.step(&data).unwrap_err().to_string();
        assert!(error.contains("in steps that ramping makes before step 4"), "{error}");
        assert!(states(&stopped) == before);
        stopped.set_lr(None).unwrap();
        for _ in 0..3 {
            let [a, b] = [&mut straight, &mut stopped].map(|t| t.step(&data).unwrap().loss);
            assert_eq!(a, b);
        }
        assert!(states(&stopped) == states(&straight) && states(&straight) != before);
    }

    #[test]
    fn numbers_that_no_run_has_are_not_loaded() {
        let mut trainer = trainer("adamw,ramping=3", "tetrajet");
        trainer.step(&data()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        for (state, value, name) in [
            (2, 3.0, None),
            (2, 4.0, Some("interval of updates")),
            (2, 0.5, Some("interval of updates")),
            (3, 5.0, None),
            (3, 6.0, Some("number of gradients")),
            (3, 1e30, Some("number of gradients")),
            (4, -1e30, None),
        ] {
            let put = |trainer: &mut Trainer, value: f32| {
                let Device::Cpu(run) = &mut trainer.run else { panic!("made on the CPU") };
                let index = run.model.table.matrices(16).unwrap().0[1].param.index;
                let Flat { states, layouts, .. } = &mut run.buffers.flat;
                let states: &mut [f32] = bytemuck::cast_slice_mut(&mut states[state]);
                std::mem::replace(&mut states[layouts[state].places[index].start / 4], value)
            };
            let before = put(&mut trainer, value);
            trainer.save(folder.path()).unwrap();
            let loaded = Trainer::load(trainer.model().engine(), folder.path());
            match name {
                None => drop(loaded.unwrap()),
                Some(name) => {
                    let error = loaded.unwrap_err();
                    assert!(matches!(error, Error::Format { .. }), "{error}");
                    let message = error.to_string();
                    let expected =
                        format!("no {name} of transformer.h.0.attn.c_proj.weight in a run with");
                    assert!(message.contains(&expected), "{message}");
                }
            }
            put(&mut trainer, before);
        }
    }
}
