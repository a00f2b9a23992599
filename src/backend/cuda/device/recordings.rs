//! Recorded work. What a training step asks for is the same at every step but for random numbers, so it
//! is captured once as a CUDA graph and from then on launched as a whole: the kernels of a small model
//! take less time than launching them one by one.
//!
//! A capture runs on a stream of its own and concerns only the thread that makes it; other threads go
//! on using the device, but for what waits for all of it (see [`without_captures`]). The host may do
//! that too, and break a capture off: then the step is done without it, and the next one tries again.
//! The first step of a kind is not captured, because in it kernels are loaded and algorithms chosen.
//! Kernels that draw random numbers are noted, and get new arguments before every launch.

use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUresult};

use super::super::linear::{DrawArgument, TransformArgument};
use super::gpu::Gpu;
use crate::backend::StepKind;
use crate::mx::{GemmId, OperandId, Random};
use crate::recipe::Transform;

/// Captures of a kind of step that may fail before no further one is made.
const MAX_FAILURES: u32 = 5;

/// Most arguments of a kernel.
const MAX_ARGUMENTS: usize = 24;

thread_local! {
    /// Where this thread's capture runs; null outside of one.
    static CAPTURING: Cell<sys::CUstream> = const { Cell::new(null_mut()) };
    /// What this thread's capture found so far.
    static REDRAWN: RefCell<Vec<Redrawn>> = const { RefCell::new(Vec::new()) };
    /// What first went wrong in this thread's capture.
    static FAILURE: RefCell<Option<String>> = const { RefCell::new(None) };
    /// How many arguments this thread's last kernel had.
    static ARGUMENTS: Cell<usize> = const { Cell::new(0) };
}

/// Held by the thread that captures, of all engines in the process.
static CAPTURE: Mutex<()> = Mutex::new(());

fn lock_captures() -> MutexGuard<'static, ()> {
    CAPTURE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While this lives, no other thread captures: loading and unloading kernels (which cuBLASLt does when a
/// kind of product comes up for the first time), allocating and freeing wait for the whole device, and
/// CUDA breaks off every capture then. None where this thread itself captures.
pub(crate) fn without_captures() -> Option<MutexGuard<'static, ()>> {
    capturing().is_none().then(lock_captures)
}

/// The stream of this thread's capture, if it makes one.
pub(crate) fn capturing() -> Option<sys::CUstream> {
    Some(CAPTURING.get()).filter(|stream| !stream.is_null())
}

/// Takes a message about what this thread's capture met, which is none of the device's business yet;
/// gives it back where there is no capture.
pub(crate) fn note_failure(message: String) -> Option<String> {
    if capturing().is_none() {
        return Some(message);
    }
    FAILURE.with_borrow_mut(|failure| {
        failure.get_or_insert(message);
    });
    None
}

/// Is told the number of arguments of every kernel.
pub(crate) fn note_kernel(arguments: usize) {
    ARGUMENTS.set(arguments);
}

/// What the random numbers of a quantization kernel are drawn for.
#[derive(Clone, Copy)]
pub(crate) struct Drawn {
    pub(crate) random: Random,
    /// One transform each.
    pub(crate) gemms: &'static [GemmId],
    pub(crate) operand: OperandId,
    pub(crate) transform: Option<Transform>,
}

impl Drawn {
    /// The last arguments of the kernel: a transform for each product, and the draw.
    fn arguments(&self) -> ([TransformArgument; 2], DrawArgument) {
        let transform = |gemm: &GemmId| {
            let mut signs = [0.0; crate::mx::MAX_GROUP];
            let signs =
                super::super::linear::fill_signs(&mut signs, self.transform, *gemm, &self.random);
            TransformArgument::new(signs)
        };
        let last = self.gemms.last().map_or_else(|| TransformArgument::new(&[]), transform);
        let first = self.gemms.first().map_or(last, transform);
        ([first, last], self.random.rounding(self.operand).into())
    }
}

/// A kernel of a graph whose arguments change.
struct Redrawn {
    node: sys::CUgraphNode,
    /// How many arguments it has.
    arguments: usize,
    drawn: Drawn,
    /// As captured; it points into the graph.
    captured: sys::CUDA_KERNEL_NODE_PARAMS,
}

/// Notes that the last kernel is to be drawn anew whenever it is launched again.
pub(crate) fn note_drawn(gpu: &Gpu, drawn: Drawn) {
    let Some(stream) = capturing() else { return };
    let arguments = ARGUMENTS.get();
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut graph, mut last, mut count) = (null_mut(), std::ptr::null(), 0);
    // SAFETY: numbers and pointers, for which zero is a value.
    let mut captured: sys::CUDA_KERNEL_NODE_PARAMS = unsafe { std::mem::zeroed() };
    // SAFETY: writes to these variables. `last` points to CUDA's own array of `count` nodes, which is
    // valid until the next call with the stream, so it is read before any.
    let node = unsafe {
        let result = sys::cuStreamGetCaptureInfo_v3(
            stream,
            &mut status,
            null_mut(),
            &mut graph,
            &mut last,
            null_mut(),
            &mut count,
        );
        gpu.note("looking at a recording", result);
        if result != CUresult::CUDA_SUCCESS || count != 1 {
            gpu.fail(format!(
                "a recorded kernel is not the last of its stream, but one of {count}"
            ));
            return;
        }
        let node = *last;
        gpu.note(
            "looking at a recorded kernel",
            sys::cuGraphKernelNodeGetParams_v2(node, &mut captured),
        );
        node
    };
    REDRAWN.with_borrow_mut(|all| all.push(Redrawn { node, arguments, drawn, captured }));
}

/// The recordings of a trainer, one for each kind of step that it does.
pub(crate) struct Recordings {
    gpu: Arc<Gpu>,
    kinds: Vec<(StepKind, State)>,
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
    pub(crate) fn run(&mut self, kind: StepKind, random: [u32; 2], mut operations: impl FnMut()) {
        let gpu = &self.gpu;
        let Some((_, state)) = self.kinds.iter_mut().find(|(known, _)| *known == kind) else {
            self.kinds.push((kind, State::Seen { failures: 0 }));
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
            State::Captured(graph) => graph.launch(gpu, random),
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
    /// What `operations` ask for; None if anything went wrong, and nothing was done then. An error that
    /// is not of the capture comes back when they run without one.
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
    fn launch(&mut self, gpu: &Gpu, [step, micro_step]: [u32; 2]) {
        for kernel in &mut self.redrawn {
            let random = Random { step, micro_step, ..kernel.drawn.random };
            kernel.drawn.random = random;
            let (mut transforms, mut draw) = kernel.drawn.arguments();
            let mut arguments: [*mut c_void; MAX_ARGUMENTS] = [null_mut(); MAX_ARGUMENTS];
            let n = kernel.arguments;
            let mut parameters = kernel.captured;
            // SAFETY: the graph holds `n` pointers to the arguments of this kernel, the last of
            // which have these types; the driver copies what the new ones point to.
            unsafe {
                let captured = std::slice::from_raw_parts(parameters.kernelParams, n);
                arguments[..n].copy_from_slice(captured);
                let [first, last] = &mut transforms;
                if kernel.drawn.gemms.len() == 2 {
                    arguments[n - 3] = std::ptr::from_mut(first).cast();
                }
                arguments[n - 2] = std::ptr::from_mut(last).cast();
                arguments[n - 1] = std::ptr::from_mut(&mut draw).cast();
                parameters.kernelParams = arguments.as_mut_ptr();
                let result = sys::cuGraphExecKernelNodeSetParams_v2(
                    self.executable,
                    kernel.node,
                    &parameters,
                );
                gpu.note("drawing random numbers for a recorded kernel", result);
            }
        }
        // SAFETY: all that the graph touches lives as long as the trainer that it is recorded for.
        let result = unsafe { sys::cuGraphLaunch(self.executable, gpu.stream()) };
        gpu.note("a recorded step", result);
    }
}

/// A capture on a stream of its own. It ends also where the operations panic.
struct Capture {
    stream: sys::CUstream,
    _alone: MutexGuard<'static, ()>,
}

impl Capture {
    fn begin() -> Option<Self> {
        let alone = lock_captures();
        let mut stream = null_mut();
        let non_blocking = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: writes a handle, which `drop` destroys.
        unsafe {
            let result = sys::cuStreamCreate(&mut stream, non_blocking);
            if result != CUresult::CUDA_SUCCESS {
                return None;
            }
            let capture = Self { stream, _alone: alone };
            let result = sys::cuStreamBeginCapture_v2(stream, mode);
            if result != CUresult::CUDA_SUCCESS {
                return None;
            }
            REDRAWN.take();
            FAILURE.take();
            CAPTURING.set(stream);
            Some(capture)
        }
    }

    /// What was captured; None if something broke it off.
    fn end(self) -> Option<(sys::CUgraph, Vec<Redrawn>)> {
        let mut graph = null_mut();
        CAPTURING.set(null_mut());
        // SAFETY: writes a handle.
        let _ = unsafe { sys::cuStreamEndCapture(self.stream, &mut graph) };
        let failed = FAILURE.take().is_some();
        if failed && !graph.is_null() {
            // SAFETY: ours.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
        (!failed && !graph.is_null()).then(|| (graph, REDRAWN.take()))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        CAPTURING.set(null_mut());
        REDRAWN.take();
        // SAFETY: ours; destroying it ends a capture that is still going on.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
    }
}
