//! A stream of the host's, on which a GPU does all work.

use std::ffi::c_void;

/// A CUDA stream of the host program: a `CUstream`, which the runtime calls `cudaStream_t`.
#[derive(Clone, Copy, Debug)]
pub struct CudaStream(*mut c_void);

// SAFETY: streams may be used from any thread.
unsafe impl Send for CudaStream {}
// SAFETY: as above.
unsafe impl Sync for CudaStream {}

impl CudaStream {
    /// # Safety
    /// `stream` is a stream, and stays one until the engine that gets it and everything made from
    /// that engine is gone.
    pub unsafe fn from_raw(stream: *mut c_void) -> Self {
        Self(stream)
    }

    pub(crate) fn as_raw(self) -> *mut c_void {
        self.0
    }
}
