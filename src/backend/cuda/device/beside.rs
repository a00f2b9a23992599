//! A stream beside the one that all else is queued on, and the events by which one waits for the
//! other.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::capture;
use super::gpu::{Gpu, text};
use crate::{Error, Result};

/// A stream whose work comes first where both have some.
pub(crate) struct Beside {
    gpu: Arc<Gpu>,
    stream: sys::CUstream,
}

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Beside {}
// SAFETY: as above.
unsafe impl Sync for Beside {}

impl Beside {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        let (mut stream, mut least, mut greatest) = (null_mut(), 0, 0);
        // SAFETY: writes numbers and a handle, which is given back in `drop`.
        let result = gpu.scope(|| unsafe {
            let _ = sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest);
            sys::cuStreamCreateWithPriority(&mut stream, flags, greatest)
        });
        made("a stream", result)?;
        Ok(Self { gpu: gpu.clone(), stream })
    }

    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Queues what `f` asks for here.
    pub(crate) fn queue<R>(&self, f: impl FnOnce() -> R) -> R {
        self.gpu.beside(self.stream, f)
    }

    /// What is queued here from now on comes behind an event.
    pub(crate) fn wait_for(&self, event: &Event) {
        // SAFETY: both live.
        let result = unsafe { sys::cuStreamWaitEvent(self.stream, event.event, 0) };
        self.gpu.note("waiting for an event", result);
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if self.gpu.is_stuck() {
            return;
        }
        // SAFETY: ours. What is still queued is done before it goes.
        self.gpu.scope(|| unsafe {
            let _ = sys::cuStreamDestroy_v2(self.stream);
        });
    }
}

/// A moment in a stream's work.
pub(crate) struct Event {
    gpu: Arc<Gpu>,
    event: sys::CUevent,
}

// SAFETY: as of a stream.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let (mut event, flags) = (null_mut(), sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING);
        // SAFETY: writes a handle, which is given back in `drop`.
        let result = gpu.scope(|| unsafe { sys::cuEventCreate(&mut event, flags as u32) });
        made("an event", result)?;
        Ok(Self { gpu: gpu.clone(), event })
    }

    /// It comes when all is done that is queued so far; in what is recorded, at every launch of it.
    pub(crate) fn record(&self) {
        // What is launched as a whole has events that others can wait for only by this flag, which is
        // an error elsewhere.
        let external = sys::CUevent_record_flags_enum::CU_EVENT_RECORD_EXTERNAL as u32;
        let flags = if capture::capturing().is_some() { external } else { 0 };
        // SAFETY: both live, the event for longer than what is recorded.
        let result = unsafe { sys::cuEventRecordWithFlags(self.event, self.gpu.stream(), flags) };
        self.gpu.note("an event", result);
    }

    /// Whether it has come, after it was recorded. An error of the device is kept for later.
    pub(crate) fn has_come(&self) -> bool {
        // SAFETY: it lives.
        match unsafe { sys::cuEventQuery(self.event) } {
            CUresult::CUDA_ERROR_NOT_READY => false,
            result => {
                self.gpu.note("an event", result);
                true
            }
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: ours.
        self.gpu.scope(|| unsafe {
            let _ = sys::cuEventDestroy_v2(self.event);
        });
    }
}

fn made(what: &str, result: CUresult) -> Result<()> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        result => Err(Error::Device { message: format!("cannot make {what}: {}", text(result)) }),
    }
}
