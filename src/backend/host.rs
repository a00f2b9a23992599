//! Memory of the host that a device copies to at full speed.

use std::ffi::c_void;

use super::Memory;
use crate::Result;
use crate::reserve::reuse;

/// Bytes on the host, of which a device that can copies large ones without a detour. They stay where
/// they are until more are asked for.
#[derive(Default)]
pub(crate) struct HostBuffer {
    // NOTE: before what it holds in place.
    pin: Option<Box<dyn Send + Sync>>,
    words: Vec<f32>,
}

/// Less than this is not worth it, and may share a page with others.
const LARGE: usize = 1 << 20;

impl HostBuffer {
    /// The first `len` bytes, to be overwritten; messages call them `what`.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn room<B: Memory>(
        &mut self,
        backend: &B,
        what: &'static str,
        len: usize,
    ) -> Result<&mut [u8]> {
        let words = len.div_ceil(size_of::<f32>());
        if self.words.len() < words {
            self.pin = None;
            reuse(&mut self.words, what, words)?;
            if len >= LARGE {
                let memory = self.words.as_mut_ptr().cast::<c_void>();
                // SAFETY: so many bytes of ours, which stay there for longer than the pin: it goes
                // first, here and when this is dropped.
                self.pin = unsafe { backend.pin(memory, 4 * self.words.len()) };
            }
        }
        Ok(&mut bytemuck::cast_slice_mut(&mut self.words)[..len])
    }

    /// All that there ever was room for.
    pub(crate) fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }
}
