//! The end of a step: the gradient's norm, and AdamW over all parameters, by the arithmetic of
//! `optim/adamw.rs` compiled for each instruction set; StableAdamW gives it rates of its own.

use std::ops::Range;

use rayon::prelude::*;

use super::isa::simd_fn;
use super::math::{AHEAD, prefetch_after};
use super::{Arena, Buffer, Cpu, JOB_ELEMENTS, Workspace};
use crate::Result;
use crate::backend::{Optimize, Slot, Trained};
use crate::optim::adamw::Update;
use crate::optim::stable_adamw::{self, Ratio};
use crate::optim::{Largest, Optimizer, OptimizerKind, OptimizerStep, StepSums};
use crate::reserve::zeros;

/// What a reduction found.
pub struct Reduction {
    losses: f64,
    squares: f64,
    /// Learning rate of each parameter.
    rates: Vec<f32>,
}

impl Reduction {
    fn sums(&self) -> StepSums {
        StepSums { losses: self.losses, squares: self.squares, raised_blocks: 0 }
    }
}

impl Optimize for Cpu {
    type Reduction = Reduction;

    fn reduction(&self, _: &mut Arena, slots: &[Slot], _: &Optimizer) -> Result<Reduction> {
        let rates = zeros("the learning rates of the parameters", slots.len())?;
        Ok(Reduction { losses: 0.0, squares: 0.0, rates })
    }

    fn add_losses(
        &self,
        reduction: &mut Reduction,
        losses: &Buffer<f32>,
        rows: usize,
        accumulate: bool,
    ) {
        let before = if accumulate { reduction.losses } else { 0.0 };
        reduction.losses = before + sum_of(&losses[..rows]);
    }

    fn reduce(
        &self,
        _workspace: &mut Workspace,
        reduction: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
    ) {
        let (slots, isa, gradients) = (trained.slots, self.isa(), &trained.gradients);
        let squares = |slot: &Slot| {
            sum_in_order(slot.range(), &|job| chunk_sum_of_squares(isa, &gradients[job]))
        };
        reduction.squares = self.install(|| slots.iter().map(squares).sum());
        reduction.rates.fill(step.lr);
        if step.optimizer.kind == OptimizerKind::StableAdamW {
            // Above the limit of the norm, too: there the update is tried.
            let free = OptimizerStep { largest_gradient: f32::INFINITY, ..*step };
            let ratio = Ratio::new(step, reduction.sums().gradient_scale(&free).unwrap_or(1.0));
            let v = &moments(trained.states)[1];
            let squares = |job: Range<usize>| {
                chunk_sum_of_ratios(isa, &v[job.clone()], &gradients[job], ratio)
            };
            self.install(|| {
                for (rate, slot) in reduction.rates.iter_mut().zip(slots) {
                    let squares = sum_in_order(slot.range(), &squares);
                    *rate = stable_adamw::rate(step.lr, squares, slot.len);
                }
            });
        }
    }

    fn update(
        &self,
        reduction: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
    ) -> Result<StepSums> {
        let sums = reduction.sums();
        let Some(gradient_scale) = sums.gradient_scale(step) else { return Ok(sums) };
        let Trained { slots, weights, states, gradients } = trained;
        let ([m, v], isa) = (moments(states), self.isa());
        self.install(|| {
            for (slot, rate) in slots.iter().zip(&reduction.rates) {
                let update = Update::new(step, *rate, slot.decays, gradient_scale);
                weights[slot.range()]
                    .par_chunks_mut(JOB_ELEMENTS)
                    .zip(m[slot.range()].par_chunks_mut(JOB_ELEMENTS))
                    .zip(v[slot.range()].par_chunks_mut(JOB_ELEMENTS))
                    .zip(gradients[slot.range()].par_chunks(JOB_ELEMENTS))
                    .for_each(|(((p, m), v), g)| update_chunk(isa, p, m, v, g, update));
            }
        });
        Ok(sums)
    }

    fn try_update(
        &self,
        reduction: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
        sums: &StepSums,
        largest: &mut (dyn FnMut(Largest) + Send),
    ) -> Result<()> {
        let Some(gradient_scale) = sums.gradient_scale(step) else { return Ok(()) };
        let Trained { slots, weights, states, gradients } = trained;
        let ([m, v], isa) = (moments(states), self.isa());
        self.install(|| {
            for (slot, rate) in slots.iter().zip(&reduction.rates) {
                let update = Update::new(step, *rate, slot.decays, gradient_scale);
                let bits = weights[slot.range()]
                    .par_chunks(JOB_ELEMENTS)
                    .zip(m[slot.range()].par_chunks(JOB_ELEMENTS))
                    .zip(v[slot.range()].par_chunks(JOB_ELEMENTS))
                    .zip(gradients[slot.range()].par_chunks(JOB_ELEMENTS))
                    .map(|(((p, m), v), g)| try_chunk(isa, p, m, v, g, update))
                    // By their bits NaN is larger than everything.
                    .reduce(|| [0; 3], |a, b| [a[0].max(b[0]), a[1].max(b[1]), a[2].max(b[2])]);
                let [weight, m, v] = bits.map(f32::from_bits);
                largest(Largest { weight, states: [m, v] });
            }
        });
        Ok(())
    }

    fn sum_losses(&self, _: &mut Reduction, losses: &Buffer<f32>, rows: usize) -> Result<f64> {
        Ok(sum_of(&losses[..rows]))
    }
}

/// The sum of losses, in order.
fn sum_of(losses: &[f32]) -> f64 {
    losses.iter().map(|loss| f64::from(*loss)).sum()
}

/// The sum of `of` over jobs of fixed size, in halves of halves, whatever the threads.
fn sum_in_order(all: Range<usize>, of: &(impl Fn(Range<usize>) -> f64 + Sync)) -> f64 {
    if all.len() <= JOB_ELEMENTS {
        return of(all);
    }
    let middle = all.start + (all.len() / 2).next_multiple_of(JOB_ELEMENTS);
    let (left, right) = (all.start..middle, middle..all.end);
    let (left, right) = rayon::join(|| sum_in_order(left, of), || sum_in_order(right, of));
    left + right
}

/// What AdamW keeps: first and second moments.
fn moments(states: &mut [Buffer<f32>]) -> &mut [Buffer<f32>; 2] {
    states.try_into().expect("AdamW names two states")
}

simd_fn! {
    fn chunk_sum_of_squares(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 8];
        let (whole, rest) = x.as_chunks::<8>();
        for chunk in whole {
            for l in 0..8 {
                lanes[l] += f64::from(chunk[l]) * f64::from(chunk[l]);
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(*x) * f64::from(*x);
        }
        lanes.iter().sum()
    }
}

simd_fn! {
    /// Of the squares of a gradient's ratios to its second moments.
    fn chunk_sum_of_ratios(v: &[f32], g: &[f32], ratio: Ratio) -> f64 {
        let mut lanes = [0.0f64; 8];
        for (v, g) in v.chunks(8).zip(g.chunks(8)) {
            for ((lane, v), g) in lanes.iter_mut().zip(v).zip(g) {
                let ratio = f64::from(ratio.of(*v, *g));
                *lane += ratio * ratio;
            }
        }
        lanes.iter().sum()
    }
}

simd_fn! {
    fn update_chunk(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], update: Update) {
        let moments = m.chunks_mut(AHEAD).zip(v.chunks_mut(AHEAD));
        for ((p, (m, v)), g) in p.chunks_mut(AHEAD).zip(moments).zip(g.chunks(AHEAD)) {
            prefetch_after(p);
            prefetch_after(m);
            prefetch_after(v);
            prefetch_after(g);
            let n = p.len();
            let (m, v, g) = (&mut m[..n], &mut v[..n], &g[..n]);
            for i in 0..n {
                (p[i], m[i], v[i]) = update.of(p[i], m[i], v[i], g[i]);
            }
        }
    }
}

simd_fn! {
    /// The bits of the largest magnitudes that [`update_chunk`] would leave: weight, moments.
    fn try_chunk(p: &[f32], m: &[f32], v: &[f32], g: &[f32], update: Update) -> [u32; 3] {
        let mut largest = [0; 3];
        let (m, v, g) = (&m[..p.len()], &v[..p.len()], &g[..p.len()]);
        for i in 0..p.len() {
            let (p, m, v) = update.of(p[i], m[i], v[i], g[i]);
            for (largest, x) in largest.iter_mut().zip([p, m, v]) {
                *largest = x.abs().to_bits().max(*largest);
            }
        }
        largest
    }
}
