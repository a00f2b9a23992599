//! The end of a step: the gradient's norm, and AdamW over all parameters, by the arithmetic of
//! `optim/adamw.rs` compiled for each instruction set; StableAdamW gives it rates of its own, and Muon
//! (`muon.rs`) and Q-Ramping (`ramping.rs`) move matrices otherwise.

use std::ops::{Add, Range};

use rayon::prelude::*;

use super::isa::{Isa, simd_fn};
use super::math::{AHEAD, lane_amax, prefetch_after};
use super::memory::gradients_of;
use super::moments::{Moment, PIECE, Rounding, Stored, Then};
use super::{Arena, Buffer, Cpu, JOB_ELEMENTS, Workspace, middle, muon, ramping};
use crate::Result;
use crate::backend::{FlatGradients, Optimize, Slot, Trained};
use crate::optim::adamw::{Update, clip};
use crate::optim::spam::{Factors, STATISTICS};
use crate::optim::stable_adamw::{self, Ratio};
use crate::optim::{Largest, Optimizer, OptimizerKind, OptimizerStep, StepSums, UpdateSums};
use crate::reserve::collect;

/// What a reduction found.
pub struct Reduction {
    losses: f64,
    squares: f64,
    /// Of each parameter.
    ones: Vec<One>,
    /// Of an optimizer that orthogonalizes.
    muon: muon::Scratch,
}

/// What a reduction found of one parameter.
#[derive(Clone, Copy)]
struct One {
    /// Its learning rate.
    rate: f32,
    /// How its gradient is normalized: elements beyond a limit are made smaller by a factor, then
    /// all by another.
    clipped: [f32; 2],
    scale: f32,
    /// What an update keeps of it.
    statistics: [f32; STATISTICS],
}

impl One {
    /// As the gradient is.
    fn plain(rate: f32) -> Self {
        let statistics = [0.0; STATISTICS];
        Self { rate, clipped: [f32::INFINITY, 1.0], scale: 1.0, statistics }
    }

    fn update(&self, step: &OptimizerStep, slot: Slot, gradient_scale: f32) -> Update {
        let update = Update::new(step, self.rate, slot.decays(), self.scale * gradient_scale);
        update.clipped(self.clipped)
    }
}

impl Reduction {
    /// What clipping makes gradients smaller by, above the limit of the norm, too, where an update is
    /// tried; 1 where nothing may be updated.
    fn scale_if_it_may(&self, step: &OptimizerStep) -> f32 {
        let free = OptimizerStep { largest_gradient: f32::INFINITY, ..*step };
        self.sums().gradient_scale(&free).unwrap_or(1.0)
    }

    fn sums(&self) -> StepSums {
        StepSums { losses: self.losses, squares: self.squares, raised_blocks: 0 }
    }
}

impl Optimize for Cpu {
    type Reduction = Reduction;
    type UpdateWatch = ();

    fn reduction(
        &self,
        arena: &mut Arena,
        slots: &[Slot],
        optimizer: &Optimizer,
    ) -> Result<Reduction> {
        let ones = slots.iter().map(|_| Ok(One::plain(0.0)));
        let ones = collect("what a step finds of the parameters", ones)?;
        let muon = muon::Scratch::new(arena, self.isa(), slots, optimizer);
        Ok(Reduction { losses: 0.0, squares: 0.0, ones, muon })
    }

    fn add_losses(
        &self,
        reduction: &mut Reduction,
        losses: (&Buffer<f32>, Option<&Buffer<f32>>),
        rows: usize,
        accumulate: bool,
    ) {
        let before = if accumulate { reduction.losses } else { 0.0 };
        reduction.losses = before + sum_of(losses, rows);
    }

    fn counts(&self, _: &Workspace, reduction: &Reduction) -> Result<(f64, u64)> {
        Ok((reduction.losses, 0))
    }

    fn set_losses(&self, reduction: &mut Reduction, losses: f64) -> Result<()> {
        reduction.losses = losses;
        Ok(())
    }

    fn scale_gradients(&self, gradients: &mut FlatGradients<Self>, of: &Range<usize>, factor: f32) {
        let bytes = gradients.bytes_of(of);
        let gradients: &mut [f32] = bytemuck::cast_slice_mut(&mut gradients.all_mut()[bytes]);
        self.install(|| {
            let jobs = gradients.par_chunks_mut(JOB_ELEMENTS);
            jobs.for_each(|job| job.iter_mut().for_each(|g| *g *= factor));
        });
    }

    fn join_gradients(&self, others: &Buffer<u8>, gradients: &mut FlatGradients<Self>) {
        let others: &[f32] = bytemuck::cast_slice(others);
        let gradients: &mut [f32] = bytemuck::cast_slice_mut(gradients.all_mut());
        let jobs = gradients.par_chunks_mut(JOB_ELEMENTS).zip(others.par_chunks(JOB_ELEMENTS));
        self.install(|| {
            jobs.for_each(|(to, from)| to.iter_mut().zip(from).for_each(|(to, from)| *to += from));
        });
    }

    fn reduce(
        &self,
        _workspace: &mut Workspace,
        reduction: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
    ) {
        let (slots, isa) = (trained.slots, self.isa());
        let gradients = &*trained.gradients;
        let squares = |slot: &Slot| {
            let g = gradients_of(gradients, slot.index);
            in_order(g, &|job| chunk_sum_of_squares(isa, job), &Add::add)
        };
        reduction.squares = self.install(|| slots.iter().map(squares).sum());
        reduction.ones.fill(One::plain(step.lr));
        if step.optimizer.kind.normalizes() {
            self.install(|| normalize(isa, &mut reduction.ones, trained, &Factors::new(step)));
        }
        if step.optimizer.kind == OptimizerKind::StableAdamW {
            let ratio = Ratio::new(step, reduction.scale_if_it_may(step));
            self.install(|| {
                for (index, one) in reduction.ones.iter_mut().enumerate() {
                    let squares = Part::of(trained, index, step).sum_of_ratios(isa, ratio);
                    one.rate = stable_adamw::rate(step.lr, squares, slots[index].len);
                }
            });
        }
    }

    fn update(
        &self,
        _workspace: &mut Workspace,
        reduction: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
        _updated: &mut (dyn FnMut(usize) -> Result<()> + Send),
    ) -> Result<StepSums> {
        let sums = reduction.sums();
        let Some(gradient_scale) = sums.gradient_scale(step) else { return Ok(sums) };
        let isa = self.isa();
        let Reduction { ones, muon, .. } = reduction;
        self.install(|| {
            for (index, one) in ones.iter().enumerate() {
                if !trained.owned().contains(&index) || trained.slots[index].len == 0 {
                    continue;
                }
                if step.optimizer.orthogonalizes(trained.slots[index].kind) {
                    let cpu = self;
                    muon::Update { cpu, step, gradient_scale, index }.run(muon, trained);
                    continue;
                }
                if step.optimizer.ramps(trained.slots[index].kind) {
                    ramping::update(isa, trained, index, step);
                    continue;
                }
                let update = one.update(step, trained.slots[index], gradient_scale);
                let mut largest = [0.0; 2];
                if trained.layouts[0].places[index].element.has_one_scale() {
                    largest = Part::of(trained, index, step).largest_moments(isa, update);
                }
                let update = |part: Part<'_>| {
                    part.in_pieces(isa, Then::Store, &mut |p, m, v, g| {
                        update_chunk(isa, p, m, v, g, update);
                    });
                };
                Part::up_to(largest, trained, index, step).in_jobs(&update, &|(), ()| ());
            }
        });
        for (kept, one) in trained.statistics.as_chunks_mut().0.iter_mut().zip(&*ones) {
            *kept = one.statistics;
        }
        Ok(sums)
    }

    fn try_update(
        &self,
        _workspace: &mut Workspace,
        reduction: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
        sums: &StepSums,
        largest: &mut (dyn FnMut(Largest) + Send),
    ) -> Result<()> {
        let Some(gradient_scale) = sums.gradient_scale(step) else { return Ok(()) };
        let isa = self.isa();
        // By their bits NaN is larger than everything.
        let larger = |a: [u32; 3], b: [u32; 3]| std::array::from_fn(|i| a[i].max(b[i]));
        let Reduction { ones, muon, .. } = reduction;
        self.install(|| {
            for (index, one) in ones.iter().enumerate() {
                if !trained.owned().contains(&index) || trained.slots[index].len == 0 {
                    largest(Largest::default());
                    continue;
                }
                if step.optimizer.orthogonalizes(trained.slots[index].kind) {
                    let update = muon::Update { cpu: self, step, gradient_scale, index };
                    largest(update.attempt(muon, trained));
                    continue;
                }
                if step.optimizer.ramps(trained.slots[index].kind) {
                    largest(ramping::attempt(isa, trained, index, step));
                    continue;
                }
                let update = one.update(step, trained.slots[index], gradient_scale);
                let tried = |part: Part<'_>| {
                    let mut bits = [0; 3];
                    part.in_pieces(isa, Then::Forget, &mut |p, m, v, g| {
                        bits = larger(bits, try_chunk(isa, p, m, v, g, update));
                    });
                    bits
                };
                let bits = Part::of(trained, index, step).in_jobs(&tried, &larger);
                let [weight, m, v] = bits.map(f32::from_bits);
                largest(Largest { weight, states: [m, v] });
            }
        });
        Ok(())
    }

    fn update_watch(&self, _: &mut Arena, _: usize) -> Result<()> {
        Ok(())
    }

    fn watch_update(
        &self,
        (): &mut (),
        reduction: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
        found: &mut (dyn FnMut(UpdateSums) + Send),
    ) -> Result<()> {
        let (isa, slots) = (self.isa(), trained.slots);
        let scale = reduction.scale_if_it_may(step);
        self.install(|| {
            for (index, one) in reduction.ones.iter().enumerate() {
                let g = gradients_of(trained.gradients, index);
                let squares = in_order(g, &|job| chunk_sum_of_squares(isa, job), &Add::add);
                let has_second = !step.optimizer.orthogonalizes(slots[index].kind);
                let ratio = Ratio::new(step, one.scale * scale).clipped(one.clipped);
                let ratios = match has_second {
                    true => Part::of(trained, index, step).sum_of_ratios(isa, ratio),
                    false => 0.0,
                };
                found(UpdateSums { squares, ratios });
            }
        });
        Ok(())
    }

    fn sum_losses(
        &self,
        _: &mut Reduction,
        losses: (&Buffer<f32>, Option<&Buffer<f32>>),
        rows: usize,
    ) -> Result<f64> {
        Ok(sum_of(losses, rows))
    }
}

/// The sum of losses, in order.
fn sum_of((losses, weights): (&Buffer<f32>, Option<&Buffer<f32>>), rows: usize) -> f64 {
    let losses = losses[..rows].iter().map(|loss| f64::from(*loss));
    match weights {
        None => losses.sum(),
        Some(weights) => {
            let pairs = losses.zip(&weights[..]).filter(|(_, weight)| **weight != 0.0);
            pairs.map(|(loss, weight)| loss * f64::from(*weight)).sum()
        }
    }
}

/// What `of` makes of jobs of fixed size, joined in one order.
fn in_order<R: Send>(
    all: &[f32],
    of: &(impl Fn(&[f32]) -> R + Sync),
    joined: &(impl Fn(R, R) -> R + Sync),
) -> R {
    let Some(middle) = middle(all.len()) else { return of(all) };
    let (left, right) = all.split_at(middle);
    let (left, right) = rayon::join(|| in_order(left, of, joined), || in_order(right, of, joined));
    joined(left, right)
}

/// Finds how the gradient of each parameter is normalized, from what was kept of it.
fn normalize(isa: Isa, ones: &mut [One], trained: &Trained<'_, Cpu>, factors: &Factors) {
    let kept = trained.statistics.as_chunks().0;
    for ((one, slot), kept) in ones.iter_mut().zip(trained.slots).zip(kept) {
        one.statistics = *kept;
        let g = gradients_of(trained.gradients, slot.index);
        let largest = in_order(g, &|job| chunk_largest(isa, job), &f32::max);
        one.clipped = factors.limit(&mut one.statistics, largest);
        let of_job = |job: &[f32]| chunk_sum_of_clipped(isa, job, one.clipped);
        one.scale = factors.scale(&mut one.statistics, in_order(g, &of_job, &Add::add));
    }
}

/// A parameter in training, or a part of it.
struct Part<'a> {
    p: &'a mut [f32],
    /// First and second moments.
    m: Stored<'a>,
    v: Stored<'a>,
    g: &'a [f32],
}

impl<'a> Part<'a> {
    /// A whole parameter, by its number.
    fn of(trained: &'a mut Trained<'_, Cpu>, index: usize, step: &OptimizerStep) -> Self {
        Self::up_to([0.0; 2], trained, index, step)
    }

    /// The same, which will store moments up to these: scales of the whole parameter become theirs.
    fn up_to(
        largest: [f32; 2],
        trained: &'a mut Trained<'_, Cpu>,
        index: usize,
        step: &OptimizerStep,
    ) -> Self {
        let Trained { slots, weights, states, layouts, gradients, .. } = trained;
        let ([m, v, ..], [of_m, of_v, ..]) = (&mut **states, *layouts) else {
            panic!("AdamW names two states")
        };
        let range = slots[index].range();
        let rounding = |beta| Rounding::of(step, beta, index);
        Self {
            p: &mut weights[range],
            m: Stored::of(m, &of_m.places[index], rounding(step.optimizer.beta1), largest[0]),
            v: Stored::of(v, &of_v.places[index], rounding(step.optimizer.beta2), largest[1]),
            g: gradients_of(gradients, index),
        }
    }

    /// What `of` makes of jobs, joined in one order.
    fn in_jobs<R: Send>(
        self,
        of: &(impl Fn(Self) -> R + Sync),
        joined: &(impl Fn(R, R) -> R + Sync),
    ) -> R {
        let Some(middle) = middle(self.g.len()) else { return of(self) };
        let (p, of_right) = self.p.split_at_mut(middle);
        let ([m, right_m], [v, right_v]) = (self.m.split_at(middle), self.v.split_at(middle));
        let (g, right_g) = self.g.split_at(middle);
        let left = Part { p, m, v, g };
        let right = Part { p: of_right, m: right_m, v: right_v, g: right_g };
        let (left, right) = rayon::join(|| left.in_jobs(of, joined), || right.in_jobs(of, joined));
        joined(left, right)
    }

    /// The largest magnitudes that an update will leave of its moments.
    fn largest_moments(self, isa: Isa, update: Update) -> [f32; 2] {
        let larger = |a: [u32; 2], b: [u32; 2]| [a[0].max(b[0]), a[1].max(b[1])];
        let of_job = |part: Self| {
            let mut bits = [0; 2];
            part.in_pieces(isa, Then::Forget, &mut |_, m, v, g| {
                bits = larger(bits, chunk_largest_moments(isa, m, v, g, update));
            });
            bits
        };
        self.in_jobs(&of_job, &larger).map(f32::from_bits)
    }

    /// The sum of the squares of its gradient's ratios to its second moments.
    fn sum_of_ratios(self, isa: Isa, ratio: Ratio) -> f64 {
        let of_job = |part: Self| {
            let mut sum = 0.0;
            part.in_pieces(isa, Then::Forget, &mut |_, _, v, g| {
                sum += chunk_sum_of_ratios(isa, v, g, ratio);
            });
            sum
        };
        self.in_jobs(&of_job, &Add::add)
    }

    /// Calls `of` with weights, moments and gradients in f32: with all of a job at once, or in
    /// pieces where moments have to be decoded.
    fn in_pieces(
        self,
        isa: Isa,
        then: Then,
        of: &mut impl FnMut(&mut [f32], &mut [f32], &mut [f32], &[f32]),
    ) {
        let Self { p, m: mut stored_m, v: mut stored_v, g } = self;
        if let (Stored::F32(m), Stored::F32(v)) = (&mut stored_m, &mut stored_v) {
            return of(p, m, v, g);
        }
        let (mut m, mut v) = ([0.0; PIECE], [0.0; PIECE]);
        for (i, (p, g)) in p.chunks_mut(PIECE).zip(g.chunks(PIECE)).enumerate() {
            let (first, m, v) = (i * PIECE, &mut m[..g.len()], &mut v[..g.len()]);
            stored_m.load(isa, Moment::First, first, m);
            stored_v.load(isa, Moment::Second, first, v);
            of(p, m, v, g);
            if then == Then::Store {
                stored_m.store(isa, Moment::First, first, m);
                stored_v.store(isa, Moment::Second, first, v);
            }
        }
    }
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
    /// Of the squares of elements that are clipped.
    fn chunk_sum_of_clipped(x: &[f32], clipped: [f32; 2]) -> f64 {
        let mut lanes = [0.0f64; 8];
        for chunk in x.chunks(8) {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                let x = f64::from(clip(*x, clipped));
                *lane += x * x;
            }
        }
        lanes.iter().sum()
    }
}

simd_fn! {
    /// NaN is not seen: with one the norm is none, and no step is done.
    fn chunk_largest(x: &[f32]) -> f32 {
        lane_amax(x)
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

simd_fn! {
    /// The bits of the largest magnitudes of moments that [`update_chunk`] would leave.
    fn chunk_largest_moments(m: &[f32], v: &[f32], g: &[f32], update: Update) -> [u32; 2] {
        let mut largest = [0; 2];
        let (m, v) = (&m[..g.len()], &v[..g.len()]);
        for i in 0..g.len() {
            let (m, v) = update.of_moments(m[i], v[i], g[i]);
            largest = [largest[0].max(m.abs().to_bits()), largest[1].max(v.abs().to_bits())];
        }
        largest
    }
}
