//! Recorded work. What a training step asks for is the same at every step but for random numbers, and
//! what a token of a text asks for is the same but for numbers in memory, so it is captured once as a
//! CUDA graph and from then on launched as a whole: the kernels of a small model take less time than
//! launching them one by one.
//!
//! A capture that fails leaves the step to be done without it, and the next one tries again. The
//! first step of a kind is not captured, because in it kernels are loaded and algorithms chosen.
//! Kernels that draw random numbers are noted, and their argument is made anew before every launch.
//!
//! What a micro-step asks for depends on `StepPlan` and on random numbers alone: the value that
//! drives the pass is the key of its recording. The gradient of the embeddings stays outside, for
//! the host sorts tokens while the graph runs.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::capture::{Capture, Redrawn};
use super::gpu::Gpu;
use crate::backend::StepPlan;

/// Captures of a kind of step that may fail before no further one is made.
const MAX_FAILURES: u32 = 5;

/// The recordings of a trainer, one for each kind of step that it does, or of a decoder's text.
pub(crate) struct Recordings {
    gpu: Arc<Gpu>,
    kinds: Vec<(StepPlan, State)>,
}

enum State {
    /// Not captured yet, but tried so many times.
    Seen {
        failures: u32,
    },
    Captured(Graph),
}

struct Graph {
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
    redrawn: Vec<Redrawn>,
}

// SAFETY: graphs may be used from any thread, by one at a time.
unsafe impl Send for Recordings {}

impl Recordings {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Self {
        Self { gpu: gpu.clone(), kinds: Vec::new() }
    }

    /// Does `operations`: as they come, or recorded.
    pub(crate) fn run(&mut self, plan: &StepPlan, step: [u32; 2], mut operations: impl FnMut()) {
        let gpu = &self.gpu;
        let Some((_, state)) = self.kinds.iter_mut().find(|(known, _)| known == plan) else {
            self.kinds.push((plan.clone(), State::Seen { failures: 0 }));
            return operations();
        };
        if let State::Seen { failures } = state
            && *failures < MAX_FAILURES
        {
            match Graph::capture(&mut operations) {
                Some(graph) => *state = State::Captured(graph),
                None => *failures += 1,
            }
        }
        match state {
            State::Captured(graph) => graph.launch(gpu, step),
            State::Seen { .. } => operations(),
        }
    }
}

impl Drop for Recordings {
    fn drop(&mut self) {
        let Self { gpu, kinds } = self;
        gpu.scope(|| {
            for (_, state) in kinds.drain(..) {
                if let State::Captured(graph) = state {
                    // SAFETY: ours. One that still runs is destroyed when it has ended.
                    unsafe {
                        let _ = sys::cuGraphExecDestroy(graph.executable);
                        let _ = sys::cuGraphDestroy(graph.graph);
                    }
                }
            }
        });
    }
}

impl Graph {
    /// What `operations` ask for; None if anything went wrong, and nothing was done then. An error
    /// that is not of the capture comes back when they run without one.
    fn capture(operations: impl FnOnce()) -> Option<Self> {
        let capture = Capture::begin()?;
        operations();
        let (graph, redrawn) = capture.end()?;
        let mut executable = null_mut();
        // SAFETY: writes a handle.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0) };
        if made != CUresult::CUDA_SUCCESS {
            // SAFETY: ours.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
            return None;
        }
        Some(Self { graph, executable, redrawn })
    }

    /// Launches the work for (optimizer step, micro-step).
    fn launch(&mut self, gpu: &Gpu, step: [u32; 2]) {
        for kernel in &mut self.redrawn {
            kernel.arguments.redraw(step);
            let mut argument = kernel.arguments.argument();
            let mut parameters = kernel.captured;
            parameters.kernelParams = &mut argument;
            // SAFETY: the kernel has this one argument, which the driver copies.
            let result = unsafe {
                sys::cuGraphExecKernelNodeSetParams_v2(self.executable, kernel.node, &parameters)
            };
            gpu.note("drawing random numbers for a recorded kernel", result);
        }
        // SAFETY: all that the graph touches lives as long as the trainer or decoder that it is recorded
        // for, but for the model's weights: where these move, whoever has recordings drops them.
        let result = unsafe { sys::cuGraphLaunch(self.executable, gpu.stream()) };
        gpu.note("a recorded step", result);
    }
}
