//! The CPU backend: f32 activations; GEMMs in f32, bf16 or MXFP4; kernels chosen once, by
//! instruction set; one thread pool an engine.
//!
//! Results do not depend on the number of threads: every sum has an order of its own.

mod arena;
mod attend;
#[cfg(test)]
mod conformance;
mod decode;
mod disjoint;
mod embed;
mod exchange;
mod follow;
mod gelu;
pub mod gemm;
mod head;
mod isa;
mod lanes;
mod linear;
mod lora;
mod math;
mod memory;
mod merge;
mod moments;
mod muon;
mod norm;
mod optimize;
mod quantize;
mod ramping;
mod restore;
mod rotary;
mod select;
mod swiglu;
#[cfg(test)]
mod tests;
mod workers;
mod workspace;

pub use arena::{Arena, Buffer};
pub use isa::Isa;
pub use select::Selection;
pub use workspace::Workspace;

use std::sync::Arc;

use rayon::prelude::*;

use super::block::Supply;
use super::{Backend, StepPlan};
use crate::Result;
use workers::Workers;

/// The CPU.
pub struct Cpu {
    isa: Isa,
    workers: Workers,
    supply: Arc<Supply>,
}

impl Cpu {
    /// Starts `threads` workers; 0 takes one for each core that the process may use.
    pub fn new(threads: usize) -> Result<Self> {
        Self::with_isa(threads, Isa::from_environment()?)
    }

    /// The same with a given instruction set.
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Self> {
        assert!(isa.is_available(), "this processor has no {}", isa.name());
        Ok(Self { isa, workers: Workers::start(threads)?, supply: Arc::default() })
    }

    /// The same with memory that comes from `supply`.
    pub(crate) fn supplied(self, supply: &Arc<Supply>) -> Self {
        Self { supply: supply.clone(), ..self }
    }

    /// The instruction set of its kernels.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Worker threads.
    pub fn threads(&self) -> usize {
        self.workers.count()
    }

    /// Runs `f` on the pool, so that parallel iterators in it use these workers and no others.
    fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.workers.install(f)
    }

    fn zero(&self, buffer: &mut [f32]) {
        self.install(|| buffer.par_chunks_mut(JOB_ELEMENTS).for_each(|x| x.fill(0.0)));
    }

    /// Calls `f(0)`, `f(1)` .. `f(jobs - 1)`, spread over the workers.
    fn parallel(&self, jobs: usize, f: impl Fn(usize) + Sync + Send) {
        self.install(|| (0..jobs).into_par_iter().with_max_len(1).for_each(f));
    }
}

/// Rows, columns or elements that one job of an element-wise operation takes.
///
/// Large enough to be worth a job, and fixed, for sums over jobs must not depend on the threads.
const JOB_ELEMENTS: usize = 1 << 14;

/// Where `len` elements are halved, again and again, until a job is left: at a multiple of a job's,
/// whatever the threads, so that sums have one order.
fn middle(len: usize) -> Option<usize> {
    (len > JOB_ELEMENTS).then(|| (len / 2).next_multiple_of(JOB_ELEMENTS))
}

/// Rows of `channels` elements in one job.
fn rows_per_job(channels: usize) -> usize {
    (JOB_ELEMENTS / channels).max(1)
}

impl Backend for Cpu {
    /// Starting an operation costs nothing here, so nothing is recorded.
    type Recordings = ();

    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.install(f)
    }

    fn recordings(&self) {}

    fn recorded(&self, (): &mut (), _: &StepPlan, _: [u32; 2], mut operations: impl FnMut()) {
        operations();
    }
}
