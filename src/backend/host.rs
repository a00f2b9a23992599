//! Memory of the host that a device copies to at full speed.

use std::ffi::c_void;

use super::Memory;
use super::block::{Block, Kind};
use crate::Result;

/// Bytes on the host, of which a device that can copies large ones without a detour. They stay where
/// they are until more are asked for.
///
/// NOTE: it stays as long as it was, for memory that was not used before is dear: the system clears
/// it, page by page.
#[derive(Default)]
pub(crate) struct HostBuffer {
    // NOTE: before what it holds in place.
    pin: Option<Box<dyn Send + Sync>>,
    block: Option<Block>,
}

/// Less than this is not worth it, and may share a page with others.
const LARGE: usize = 1 << 20;

impl HostBuffer {
    /// The first `len` bytes, to be overwritten; messages call them `what`. Where there is an
    /// error, there are none.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn room<B: Memory>(
        &mut self,
        backend: &B,
        what: &'static str,
        len: usize,
    ) -> Result<&mut [u8]> {
        if self.bytes().len() < len {
            self.pin = None;
            self.block = None;
            // Whole numbers of f32.
            let size = len.next_multiple_of(size_of::<f32>());
            let block = self.block.insert(Block::new(backend.supply(), Kind::Host, what, size)?);
            if len >= LARGE {
                let memory = block.base().as_ptr().cast::<c_void>();
                // SAFETY: so many bytes of ours, which stay there for longer than the pin: it goes
                // first, here and when this is dropped.
                self.pin = unsafe { backend.pin(memory, block.len()) };
            }
        }
        Ok(self.block.as_mut().map_or(&mut [], |block| &mut block.bytes_mut()[..len]))
    }

    /// The first `len` numbers; see [`HostBuffer::room`].
    pub(crate) fn floats<B: Memory>(
        &mut self,
        backend: &B,
        what: &'static str,
        len: usize,
    ) -> Result<&mut [f32]> {
        if len == 0 {
            return Ok(&mut []);
        }
        Ok(bytemuck::cast_slice_mut(self.room(backend, what, len * size_of::<f32>())?))
    }

    /// All that there ever was room for.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.block.as_ref().map_or(&[], Block::bytes)
    }

    /// [`HostBuffer::bytes`] as numbers.
    pub(crate) fn as_floats(&self) -> &[f32] {
        self.block.as_ref().map_or(&[], |block| bytemuck::cast_slice(block.bytes()))
    }
}
