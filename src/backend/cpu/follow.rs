//! Slow means of weights.

use rayon::prelude::*;

use super::{Buffer, Cpu, JOB_ELEMENTS};
use crate::backend::{Follow, Slot};
use crate::formats::ema;

impl Follow for Cpu {
    fn update_mean(&self, means: &mut Buffer<f32>, slot: Slot, w: &[f32], decay: f32) {
        self.install(|| {
            means[slot.range()]
                .par_chunks_mut(JOB_ELEMENTS)
                .zip(w.par_chunks(JOB_ELEMENTS))
                .for_each(|(means, w)| {
                    means.iter_mut().zip(w).for_each(|(mean, w)| *mean = ema(*mean, *w, decay));
                });
        });
    }
}
