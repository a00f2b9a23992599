//! AdamW's update of a matrix that may be due less often than in every step, by the arithmetic of
//! `optim/ramping.rs` compiled for each instruction set.

use std::array;

use rayon::prelude::*;

use super::isa::{Isa, simd_fn};
use super::memory::gradients_of;
use super::{Cpu, JOB_ELEMENTS};
use crate::backend::Trained;
use crate::optim::ramping::{Update, Weight};
use crate::optim::{Largest, OptimizerStep};

/// A part of a matrix, with what is kept of it.
struct Part<'a> {
    p: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    interval: &'a [f32],
    count: &'a mut [f32],
    sum: &'a mut [f32],
    g: &'a [f32],
}

impl<'a> Part<'a> {
    /// Jobs of a whole matrix, by its number.
    fn jobs(
        trained: &'a mut Trained<'_, Cpu>,
        index: usize,
    ) -> impl IndexedParallelIterator<Item = Part<'a>> {
        let Trained { slots, weights, states, layouts, gradients, .. } = trained;
        let range = slots[index].range();
        let Ok([m, v, interval, count, sum]) = <&mut [_; 5]>::try_from(&mut **states) else {
            panic!("ramping names five states")
        };
        let places: [_; 5] = array::from_fn(|state| &layouts[state].places[index]);
        let mut places = places.into_iter();
        let mut jobs = |state: &'a mut [u8]| {
            let place = places.next().expect("one for each state");
            let values: &mut [f32] =
                bytemuck::cast_slice_mut(&mut state[place.start..][..place.bytes()]);
            values.par_chunks_mut(JOB_ELEMENTS)
        };
        let (m, v, interval, count, sum) =
            (jobs(m), jobs(v), jobs(interval), jobs(count), jobs(sum));
        let p = weights[range].par_chunks_mut(JOB_ELEMENTS);
        let g = gradients_of(gradients, index).par_chunks(JOB_ELEMENTS);
        let all = (p, m, v, interval, count, sum, g).into_par_iter();
        all.map(|(p, m, v, interval, count, sum, g)| Part { p, m, v, interval, count, sum, g })
    }

    #[inline(always)]
    fn weight(&self, i: usize) -> Weight {
        let [p, m, v] = [self.p[i], self.m[i], self.v[i]];
        Weight { p, m, v, count: self.count[i], sum: self.sum[i] }
    }
}

/// Moves a matrix.
pub(super) fn update(isa: Isa, trained: &mut Trained<'_, Cpu>, index: usize, step: &OptimizerStep) {
    let update = Update::new(step, trained.slots[index].decays());
    Part::jobs(trained, index).for_each(|part| update_chunk(isa, part, update));
}

/// What [`update`] would leave; of first moments and sums the larger.
pub(super) fn attempt(
    isa: Isa,
    trained: &mut Trained<'_, Cpu>,
    index: usize,
    step: &OptimizerStep,
) -> Largest {
    let update = Update::new(step, trained.slots[index].decays());
    // By their bits NaN is larger than everything.
    let larger = |a: [u32; 3], b: [u32; 3]| array::from_fn(|i| a[i].max(b[i]));
    let tried = Part::jobs(trained, index).map(|part| try_chunk(isa, part, update));
    let [weight, m, v] = tried.reduce(|| [0; 3], larger).map(f32::from_bits);
    Largest { weight, states: [m, v] }
}

simd_fn! {
    fn update_chunk(part: Part<'_>, update: Update) {
        for i in 0..part.p.len() {
            let Weight { p, m, v, count, sum } =
                update.of(part.weight(i), part.interval[i], part.g[i]);
            (part.p[i], part.m[i], part.v[i]) = (p, m, v);
            (part.count[i], part.sum[i]) = (count, sum);
        }
    }
}

simd_fn! {
    /// The bits of the largest magnitudes that [`update_chunk`] would leave.
    fn try_chunk(part: Part<'_>, update: Update) -> [u32; 3] {
        let mut largest = [0; 3];
        for i in 0..part.p.len() {
            let Weight { p, m, v, sum, .. } =
                update.of(part.weight(i), part.interval[i], part.g[i]);
            let [p, m, v, sum] = [p, m, v, sum].map(|x| x.abs().to_bits());
            for (largest, x) in largest.iter_mut().zip([p, m.max(sum), v]) {
                *largest = x.max(*largest);
            }
        }
        largest
    }
}
