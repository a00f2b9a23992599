//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) and the gradient's norm.

use rayon::prelude::*;

use super::isa::{Isa, simd_fn};
use super::math::{AHEAD, prefetch_after};
use super::{Arena, Buffer, Cpu, JOB_ELEMENTS, Workspace};
use crate::Result;
use crate::backend::{AdamWStep, Largest, Optimize, Slot, StepSums, Trained};

/// What steps keep besides the states.
#[derive(Default)]
pub struct Optimizer {
    losses: f64,
    squares: f64,
}

impl Optimizer {
    fn sums(&self) -> StepSums {
        StepSums { losses: self.losses, squares: self.squares, raised_blocks: 0 }
    }
}

impl Optimize for Cpu {
    type Optimizer = Optimizer;

    fn optimizer(&self, _: &mut Arena, _: usize) -> Result<Optimizer> {
        Ok(Optimizer::default())
    }

    fn add_losses(
        &self,
        optimizer: &mut Optimizer,
        losses: &Buffer<f32>,
        rows: usize,
        accumulate: bool,
    ) {
        let before = if accumulate { optimizer.losses } else { 0.0 };
        optimizer.losses = before + sum_of(&losses[..rows]);
    }

    fn reduce(
        &self,
        _workspace: &mut Workspace,
        optimizer: &mut Optimizer,
        trained: &mut Trained<'_, Self>,
        _step: &AdamWStep,
    ) {
        let gradient = |slot: &Slot| &trained.gradients[slot.range()];
        let squares =
            || trained.slots.iter().map(|slot| sum_of_squares(self, gradient(slot))).sum();
        optimizer.squares = self.install(squares);
    }

    fn update(
        &self,
        optimizer: &mut Optimizer,
        trained: &mut Trained<'_, Self>,
        step: &AdamWStep,
    ) -> Result<StepSums> {
        let sums = optimizer.sums();
        if let Some(gradient_scale) = sums.gradient_scale(step) {
            let Trained { slots, weights, m, v, gradients } = trained;
            self.install(|| {
                for slot in *slots {
                    let range = slot.range();
                    let all = Elements {
                        param: &mut weights[range.clone()],
                        m: &mut m[range.clone()],
                        v: &mut v[range.clone()],
                        gradient: &gradients[range],
                    };
                    update(self, all, &for_parameter(step, slot.decays), gradient_scale);
                }
            });
        }
        Ok(sums)
    }

    fn try_update(
        &self,
        _: &mut Optimizer,
        trained: &mut Trained<'_, Self>,
        step: &AdamWStep,
        sums: &StepSums,
        largest: &mut (dyn FnMut(Largest) + Send),
    ) -> Result<()> {
        if let Some(gradient_scale) = sums.gradient_scale(step) {
            let Trained { slots, weights, m, v, gradients } = trained;
            self.install(|| {
                for slot in *slots {
                    let range = slot.range();
                    let all = Elements {
                        param: &weights[range.clone()],
                        m: &m[range.clone()],
                        v: &v[range.clone()],
                        gradient: &gradients[range],
                    };
                    largest(try_update(
                        self,
                        all,
                        &for_parameter(step, slot.decays),
                        gradient_scale,
                    ));
                }
            });
        }
        Ok(())
    }

    fn sum_losses(&self, _: &mut Optimizer, losses: &Buffer<f32>, rows: usize) -> Result<f64> {
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
struct Elements<'a, T> {
    param: T,
    /// First moments.
    m: T,
    /// Second moments.
    v: T,
    gradient: &'a [f32],
}

/// One update of a parameter and its moments, by `gradient_scale` times its gradient.
fn update(cpu: &Cpu, all: Elements<'_, &mut [f32]>, step: &AdamWStep, gradient_scale: f32) {
    let Elements { param, m, v, gradient } = all;
    cpu.install(|| {
        param
            .par_chunks_mut(JOB_ELEMENTS)
            .zip(m.par_chunks_mut(JOB_ELEMENTS))
            .zip(v.par_chunks_mut(JOB_ELEMENTS))
            .zip(gradient.par_chunks(JOB_ELEMENTS))
            .for_each(|(((p, m), v), g)| {
                update_chunk(cpu.isa(), p, m, v, g, step, gradient_scale);
            });
    });
}

/// The largest magnitudes that [`update`] would leave.
fn try_update(
    cpu: &Cpu,
    all: Elements<'_, &[f32]>,
    step: &AdamWStep,
    gradient_scale: f32,
) -> Largest {
    let Elements { param, m, v, gradient } = all;
    let bits = cpu.install(|| {
        param
            .par_chunks(JOB_ELEMENTS)
            .zip(m.par_chunks(JOB_ELEMENTS))
            .zip(v.par_chunks(JOB_ELEMENTS))
            .zip(gradient.par_chunks(JOB_ELEMENTS))
            .map(|(((p, m), v), g)| try_chunk(cpu.isa(), p, m, v, g, step, gradient_scale))
            // By their bits NaN is larger than everything.
            .reduce(|| [0; 3], |a, b| [a[0].max(b[0]), a[1].max(b[1]), a[2].max(b[2])])
    });
    let [weight, m, v] = bits.map(f32::from_bits);
    Largest { weight, m, v }
}

/// The settings for a parameter that `decays` or does not.
fn for_parameter(step: &AdamWStep, decays: bool) -> AdamWStep {
    AdamWStep { weight_decay: if decays { step.weight_decay } else { 0.0 }, ..*step }
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
    fn update_chunk(
        p: &mut [f32],
        m: &mut [f32],
        v: &mut [f32],
        g: &[f32],
        step: &AdamWStep,
        gradient_scale: f32,
    ) {
        let update = Update::new(step, gradient_scale);
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
    fn try_chunk(
        p: &[f32],
        m: &[f32],
        v: &[f32],
        g: &[f32],
        step: &AdamWStep,
        gradient_scale: f32,
    ) -> [u32; 3] {
        let update = Update::new(step, gradient_scale);
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

/// The arithmetic of an update, which is the same whether it is stored or tried.
struct Update {
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    size: f32,
    root: f32,
    keep: f32,
    gradient_scale: f32,
}

impl Update {
    fn new(step: &AdamWStep, gradient_scale: f32) -> Self {
        let AdamWStep { beta1, beta2, epsilon, .. } = *step;
        let (size, root, keep) = (step.size(), step.root(), step.keep());
        Self { beta1, beta2, epsilon, size, root, keep, gradient_scale }
    }

    /// A weight and its moments after the update.
    #[inline(always)]
    fn of(&self, p: f32, m: f32, v: f32, g: f32) -> (f32, f32, f32) {
        let gradient = g * self.gradient_scale;
        let m = self.beta1 * m + (1.0 - self.beta1) * gradient;
        let v = self.beta2 * v + (1.0 - self.beta2) * (gradient * gradient);
        let p = p * self.keep - self.size * (m / (v.sqrt() * self.root + self.epsilon));
        (p, m, v)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backend::StepSums;
    use crate::optim::Bounds;

    /// A power of ten.
    fn scale(exponents: std::ops::Range<f64>) -> impl Strategy<Value = f32> {
        exponents.prop_map(|exponent| 10f64.powf(exponent) as f32)
    }

    fn steps() -> impl Strategy<Value = AdamWStep> {
        let beta = || prop_oneof![Just(0.0f32), Just(1.0f32.next_down()), 0.0f32..0.9999];
        let rates = (scale(-8.0..38.5), prop_oneof![Just(0.0), scale(-3.0..38.5)]);
        let t = prop_oneof![1u64..5, 1u64..1_000_000];
        (rates, beta(), beta(), scale(-44.8..-0.1), t).prop_map(
            |((lr, weight_decay), beta1, beta2, epsilon, t)| AdamWStep {
                lr,
                beta1,
                beta2,
                epsilon,
                weight_decay,
                t,
                clip: 0.0,
                loss_scale: 1.0,
                largest_gradient: f32::INFINITY,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        /// Within the limit that bounds give, all stays finite and within the next bounds.
        #[test]
        fn bounds_vouch_for_updates(
            step in steps(),
            bounds in (scale(-45.0..37.5), scale(-45.0..37.5), scale(-45.0..37.5)),
            parts in [-1.0f32..=1.0, -1.0f32..=1.0, 0.0f32..=1.0],
            gradients in prop::collection::vec(prop_oneof![Just(1.0f32), Just(-1.0), -1.0f32..1.0], 8),
        ) {
            let (weight, m, v) = bounds;
            let [mut p, mut first, mut second] = [weight * parts[0], m * parts[1], v * parts[2]];
            let mut bounds = Bounds { weight: weight.into(), m: m.into(), v: v.into() };
            for (t, part) in (step.t..).zip(gradients) {
                let step = AdamWStep { t, ..step };
                let limit = bounds.largest_gradient(&step);
                if limit < 0.0 {
                    break;
                }
                let gradient = limit * part;
                let next = bounds.after(&step, gradient.abs());
                let [fixed, decayed] = [false, true].map(|decays| {
                    let update = Update::new(&for_parameter(&step, decays), 1.0);
                    update.of(p, first, second, gradient)
                });
                for (p, first, second) in [fixed, decayed] {
                    prop_assert!(f64::from(p.abs()) <= next.weight, "{p} {next:?} {step:?}");
                    prop_assert!(f64::from(first.abs()) <= next.m, "{first} {next:?} {step:?}");
                    prop_assert!(f64::from(second.abs()) <= next.v, "{second} {next:?} {step:?}");
                    prop_assert!(p.is_finite() && first.is_finite() && second.is_finite());
                }
                (p, first, second) = decayed;
                bounds = next;
            }
        }
    }

    /// The factor of clipping may lie below f32's ordinary numbers, where it is rounded by up to its half.
    #[test]
    fn bounds_vouch_for_gradients_that_are_clipped_to_almost_nothing() {
        for clip in [1e-3f32, 8e-8, 1e-7, 1.1e-7, 3e-7, 1e-6, 1e-30] {
            let step = AdamWStep {
                lr: 1.0,
                beta1: 0.0,
                beta2: 0.0,
                epsilon: 1e-8,
                weight_decay: 0.0,
                t: 1,
                clip,
                loss_scale: 1.0,
                largest_gradient: f32::INFINITY,
            };
            let squares = 1e38f32 as f64 * 1e38f32 as f64;
            let sums = StepSums { losses: 0.0, squares, raised_blocks: 0 };
            let update = Update::new(&step, sums.gradient_scale(&step).unwrap());
            let (p, m, v) = update.of(0.0, 0.0, 0.0, 1e38);
            let next = Bounds { weight: 0.0, ..Bounds::NEW }.after(&step, sums.clipped_norm(&step));
            let all = [(p, next.weight), (m, next.m), (v, next.v)];
            assert!(all.iter().all(|(x, most)| f64::from(x.abs()) <= *most), "{clip}: {all:?}");
        }
    }

    /// Ordinary settings never need more than a first look, and nothing is vouched for that is unknown.
    #[test]
    fn bounds_are_wide_enough_for_training() {
        let mut step = AdamWStep {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            t: 1,
            clip: 0.0,
            loss_scale: 1.0,
            largest_gradient: f32::INFINITY,
        };
        let mut bounds = Bounds { weight: 1.0, ..Bounds::NEW };
        while step.t < 100_000 {
            assert!(bounds.largest_gradient(&step) > 1e9, "{bounds:?} {step:?}");
            bounds = bounds.after(&step, 10.0);
            step.t += 1;
        }
        assert!(Bounds::NEW.largest_gradient(&step) < 0.0);
        assert!(Bounds::UNKNOWN.largest_gradient(&step) < 0.0);
        assert!(bounds.largest_gradient(&AdamWStep { lr: 3e38, ..step }) < 0.0);
    }
}
