//! What this thread captures, if it does: where work goes then, and what has to keep clear of that.
//!
//! A capture runs on a stream of its own and concerns only the thread that makes it; other threads
//! go on using the device, but for what waits for all of it (see [`without_captures`]). The host
//! may do that too, and break a capture off.
//!
//! Our own loading, allocating and freeing keeps clear of captures; the host's does not know of
//! them.

use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUresult};

thread_local! {
    /// Where this thread's capture runs; null outside of one.
    static CAPTURING: Cell<sys::CUstream> = const { Cell::new(null_mut()) };
    /// Kernels of this thread's capture whose arguments change.
    static REDRAWN: RefCell<Vec<Redrawn>> = const { RefCell::new(Vec::new()) };
    /// Whether anything went wrong in this thread's capture.
    static FAILED: Cell<bool> = const { Cell::new(false) };
}

/// Held by the thread that captures, of all engines in the process.
static CAPTURE: Mutex<()> = Mutex::new(());

fn lock_captures() -> MutexGuard<'static, ()> {
    CAPTURE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While this lives, no other thread captures: loading and unloading kernels (which cuBLASLt does
/// when a kind of product comes up for the first time), allocating and freeing wait for the whole
/// device, and CUDA breaks off every capture then. None where this thread itself captures.
pub(super) fn without_captures() -> Option<MutexGuard<'static, ()>> {
    capturing().is_none().then(lock_captures)
}

/// The stream of this thread's capture, if it makes one.
pub(super) fn capturing() -> Option<sys::CUstream> {
    Some(CAPTURING.get()).filter(|stream| !stream.is_null())
}

/// Something went wrong. Whether a capture of this thread met it, so that it is none of the
/// device's business yet: the work is done without one then, and meets it again.
pub(super) fn has_failed() -> bool {
    let captures = capturing().is_some();
    if captures {
        FAILED.set(true);
    }
    captures
}

/// The one argument of a kernel, part of which is drawn anew for every step.
pub(crate) trait Redraw: Send {
    /// Draws it for (optimizer step, micro-step).
    fn redraw(&mut self, step: [u32; 2]);

    /// What the kernel declares as its argument.
    fn argument(&mut self) -> *mut c_void;
}

/// A kernel of a graph whose argument changes.
pub(super) struct Redrawn {
    pub(super) node: sys::CUgraphNode,
    pub(super) arguments: Box<dyn Redraw>,
    /// As captured; what it points to is the graph's.
    pub(super) captured: sys::CUDA_KERNEL_NODE_PARAMS,
}

/// Notes that the kernel launched last is to be drawn anew whenever it is launched again.
pub(super) fn note_redrawn(arguments: impl Redraw + 'static) {
    let Some(stream) = capturing() else { return };
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut graph, mut last, mut count) = (null_mut(), std::ptr::null(), 0);
    // SAFETY: numbers and pointers, for which zero is a value.
    let mut captured: sys::CUDA_KERNEL_NODE_PARAMS = unsafe { std::mem::zeroed() };
    // SAFETY: writes to these variables. `last` points to CUDA's own array of `count` nodes, which
    // is valid until the next call with the stream, so it is read before any.
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
        // A kernel is the last of its stream, alone.
        if result != CUresult::CUDA_SUCCESS || count != 1 {
            has_failed();
            return;
        }
        let node = *last;
        if sys::cuGraphKernelNodeGetParams_v2(node, &mut captured) != CUresult::CUDA_SUCCESS {
            has_failed();
            return;
        }
        node
    };
    let redrawn = Redrawn { node, arguments: Box::new(arguments), captured };
    REDRAWN.with_borrow_mut(|all| all.push(redrawn));
}

/// A capture on a stream of its own. It ends also where the operations panic.
pub(super) struct Capture {
    stream: sys::CUstream,
    _alone: MutexGuard<'static, ()>,
}

impl Capture {
    pub(super) fn begin() -> Option<Self> {
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
            FAILED.set(false);
            CAPTURING.set(stream);
            Some(capture)
        }
    }

    /// What was captured; None if something broke it off.
    pub(super) fn end(self) -> Option<(sys::CUgraph, Vec<Redrawn>)> {
        let mut graph = null_mut();
        CAPTURING.set(null_mut());
        // SAFETY: writes a handle.
        let _ = unsafe { sys::cuStreamEndCapture(self.stream, &mut graph) };
        let failed = FAILED.take();
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
