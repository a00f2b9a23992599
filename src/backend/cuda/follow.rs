//! Slow means of weights.

use super::Cuda;
use super::device::launch;
use super::device::memory::{F32, Param};
use crate::backend::{Follow, Slot};

const THREADS: usize = 256;

impl Follow for Cuda {
    fn update_mean(&self, means: &mut F32, slot: Slot, w: Param<'_>, decay: f32) {
        let grid = [slot.len.div_ceil(THREADS), 1, 1];
        launch!(self.gpu, "update_mean", grid, THREADS, 0;
            means.at(slot.start), w.master.address(), slot.len as u64, decay);
    }
}
