//! The end of a step: the gradient's norm, and AdamW over all parameters, by the arithmetic of
//! `optim/adamw.rs` compiled for each instruction set.

use rayon::prelude::*;

use super::isa::{Isa, simd_fn};
use super::math::{AHEAD, prefetch_after};
use super::{Arena, Buffer, Cpu, JOB_ELEMENTS, Workspace};
use crate::Result;
use crate::backend::{Optimize, Slot, Trained};
use crate::optim::adamw::Update;
use crate::optim::{Largest, Optimizer, OptimizerStep, StepSums};

/// What a reduction found.
#[derive(Default)]
pub struct Reduction {
    losses: f64,
    squares: f64,
}

impl Reduction {
    fn sums(&self) -> StepSums {
        StepSums { losses: self.losses, squares: self.squares, raised_blocks: 0 }
    }
}

impl Optimize for Cpu {
    type Reduction = Reduction;

    fn reduction(&self, _: &mut Arena, _: &[Slot], _: &Optimizer) -> Result<Reduction> {
        Ok(Reduction::default())
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
        _step: &OptimizerStep,
    ) {
        let gradient = |slot: &Slot| &trained.gradients[slot.range()];
        let squares =
            || trained.slots.iter().map(|slot| sum_of_squares(self, gradient(slot))).sum();
        reduction.squares = self.install(squares);
    }

    fn update(
        &self,
        reduction: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
    ) -> Result<StepSums> {
        let sums = reduction.sums();
        if let Some(gradient_scale) = sums.gradient_scale(step) {
            self.install(|| {
                for slot in trained.slots {
                    let arithmetic = Update::new(step, slot.decays, gradient_scale);
                    update(self, elements(trained, *slot), arithmetic);
                }
            });
        }
        Ok(sums)
    }

    fn try_update(
        &self,
        _: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
        sums: &StepSums,
        largest: &mut (dyn FnMut(Largest) + Send),
    ) -> Result<()> {
        if let Some(gradient_scale) = sums.gradient_scale(step) {
            self.install(|| {
                for slot in trained.slots {
                    let arithmetic = Update::new(step, slot.decays, gradient_scale);
                    largest(try_update(self, elements(trained, *slot), arithmetic));
                }
            });
        }
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

/// Sum of squares in f64: by chunks of fixed size, then halves of halves, whatever the threads.
fn sum_of_squares(cpu: &Cpu, x: &[f32]) -> f64 {
    fn halves(isa: Isa, x: &[f32]) -> f64 {
        if x.len() <= JOB_ELEMENTS {
            return chunk_sum_of_squares(isa, x);
        }
        let middle = (x.len() / 2).next_multiple_of(JOB_ELEMENTS);
        let (left, right) = x.split_at(middle);
        let (left, right) = rayon::join(|| halves(isa, left), || halves(isa, right));
        left + right
    }
    cpu.install(|| halves(cpu.isa(), x))
}

/// The elements of a parameter and of what training keeps for it; all four have one length.
struct Elements<'a> {
    param: &'a mut [f32],
    /// First moments.
    m: &'a mut [f32],
    /// Second moments.
    v: &'a mut [f32],
    gradient: &'a [f32],
}

fn elements<'a>(trained: &'a mut Trained<'_, Cpu>, slot: Slot) -> Elements<'a> {
    let [m, v] = &mut *trained.states else { panic!("AdamW keeps two states") };
    Elements {
        param: &mut trained.weights[slot.range()],
        m: &mut m[slot.range()],
        v: &mut v[slot.range()],
        gradient: &trained.gradients[slot.range()],
    }
}

/// One update of a parameter and its moments.
fn update(cpu: &Cpu, all: Elements<'_>, update: Update) {
    let Elements { param, m, v, gradient } = all;
    cpu.install(|| {
        param
            .par_chunks_mut(JOB_ELEMENTS)
            .zip(m.par_chunks_mut(JOB_ELEMENTS))
            .zip(v.par_chunks_mut(JOB_ELEMENTS))
            .zip(gradient.par_chunks(JOB_ELEMENTS))
            .for_each(|(((p, m), v), g)| update_chunk(cpu.isa(), p, m, v, g, update));
    });
}

/// The largest magnitudes that [`update`] would leave.
fn try_update(cpu: &Cpu, all: Elements<'_>, update: Update) -> Largest {
    let Elements { param, m, v, gradient } = all;
    let bits = cpu.install(|| {
        param
            .par_chunks(JOB_ELEMENTS)
            .zip(m.par_chunks(JOB_ELEMENTS))
            .zip(v.par_chunks(JOB_ELEMENTS))
            .zip(gradient.par_chunks(JOB_ELEMENTS))
            .map(|(((p, m), v), g)| try_chunk(cpu.isa(), p, m, v, g, update))
            // By their bits NaN is larger than everything.
            .reduce(|| [0; 3], |a, b| [a[0].max(b[0]), a[1].max(b[1]), a[2].max(b[2])])
    });
    let [weight, m, v] = bits.map(f32::from_bits);
    Largest { weight, states: [m, v] }
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
