//! Large memory of the host, in blocks: of the system's, or of an allocator that the program gives.
//! And how much of it, and of a GPU's, an engine has in use.
//!
//! What is large is what grows with models and batches and is planned: arenas, and what snapshots
//! copy. All else is small, or lives for a call, and is the process's own.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapMut;

use crate::{Error, Result};

/// Blocks begin at multiples of this many bytes: a cache line, and an AVX-512 register.
pub(crate) const ALIGN: usize = 64;

/// Gives large memory of the host, in place of the system.
///
/// # Safety
/// What [`Allocator::allocate`] returns, other than null, is memory of as many bytes as were asked
/// for, which nothing else uses until it is given to [`Allocator::deallocate`].
pub unsafe trait Allocator: Send + Sync {
    /// Memory of `bytes` bytes, at least one, at a multiple of `alignment`, with whatever in it;
    /// null where there is none, which is an [`Error::OutOfMemory`] of the call that needs it.
    fn allocate(&self, bytes: usize, alignment: usize) -> *mut u8;

    /// Takes back memory with the size and alignment that it was asked for with.
    ///
    /// # Safety
    /// It comes from [`Allocator::allocate`], and nothing uses it any more.
    unsafe fn deallocate(&self, memory: *mut u8, bytes: usize, alignment: usize);
}

// SAFETY: what it says of itself.
unsafe impl<T: Allocator + ?Sized> Allocator for Arc<T> {
    fn allocate(&self, bytes: usize, alignment: usize) -> *mut u8 {
        (**self).allocate(bytes, alignment)
    }

    unsafe fn deallocate(&self, memory: *mut u8, bytes: usize, alignment: usize) {
        // SAFETY: as promised by the caller.
        unsafe { (**self).deallocate(memory, bytes, alignment) }
    }
}

/// Bytes that are in use, and the most that ever were.
#[derive(Debug, Default)]
pub(crate) struct Count {
    now: AtomicU64,
    peak: AtomicU64,
}

impl Count {
    /// In use, and at most so far.
    pub(crate) fn get(&self) -> [u64; 2] {
        let now = self.now.load(Ordering::Relaxed);
        // Another thread may be between its two stores.
        [now, self.peak.load(Ordering::Relaxed).max(now)]
    }

    fn add(&self, bytes: u64) {
        let now = self.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(now, Ordering::Relaxed);
    }
}

/// Which memory something is counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The device's, which for the CPU lies on the host.
    Device,
    /// The host's, beside it.
    Host,
}

/// Where an engine's large memory comes from, and how much is in use.
#[derive(Default)]
pub struct Supply {
    /// The program's, where it has one.
    allocator: Option<Box<dyn Allocator>>,
    device: Count,
    host: Count,
}

impl Supply {
    /// Of an allocator, where there is one, or of the system.
    pub(crate) fn new(allocator: Option<Box<dyn Allocator>>) -> Self {
        Self { allocator, ..Self::default() }
    }

    pub(crate) fn count(&self, kind: Kind) -> &Count {
        match kind {
            Kind::Device => &self.device,
            Kind::Host => &self.host,
        }
    }
}

/// Memory that counts as in use for as long as this lives.
pub(crate) struct Counted {
    supply: Arc<Supply>,
    kind: Kind,
    bytes: u64,
}

impl Counted {
    pub(crate) fn new(supply: &Arc<Supply>, kind: Kind, bytes: usize) -> Self {
        supply.count(kind).add(bytes as u64);
        Self { supply: supply.clone(), kind, bytes: bytes as u64 }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.supply.count(self.kind).now.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A block, whose bytes were 0 when it was made.
pub(crate) struct Block {
    base: NonNull<u8>,
    bytes: usize,
    /// The system's memory; None where it is the allocator's.
    _mapping: Option<MmapMut>,
    // NOTE: the last, so that the allocator goes after the memory.
    counted: Counted,
}

// SAFETY: plain memory, which is reached through its owner alone.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// A block of `bytes` bytes; messages call it `what`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::InvalidArgument`] for an allocator that breaks its word.
    pub(crate) fn new(
        supply: &Arc<Supply>,
        kind: Kind,
        what: &'static str,
        bytes: usize,
    ) -> Result<Self> {
        let refused = |by: std::fmt::Arguments<'_>| Error::OutOfMemory {
            what,
            needed: bytes as u64,
            limit: format!("which {by}; use a smaller batch or model"),
        };
        // Nothing is a block as well.
        let size = bytes.max(1);
        let Some(allocator) = &supply.allocator else {
            let mut mapping = MmapMut::map_anon(size)
                .map_err(|e| refused(format_args!("the system refuses ({e})")))?;
            // Large pages spare the GEMMs most TLB misses. Where they are off, nothing is lost.
            #[cfg(target_os = "linux")]
            let _ = mapping.advise(memmap2::Advice::HugePage);
            let base = NonNull::new(mapping.as_mut_ptr()).expect("a mapping is never at address 0");
            let counted = Counted::new(supply, kind, bytes);
            return Ok(Self { base, bytes, _mapping: Some(mapping), counted });
        };
        if isize::try_from(size).is_err() {
            return Err(refused(format_args!("no memory can be")));
        }
        let base = NonNull::new(allocator.allocate(size, ALIGN));
        let base = base.ok_or_else(|| refused(format_args!("the program's allocator refuses")))?;
        if !base.addr().get().is_multiple_of(ALIGN) {
            // SAFETY: just given to us, and not used.
            unsafe { allocator.deallocate(base.as_ptr(), size, ALIGN) };
            let message = format!("expected memory at a multiple of {ALIGN}, got {base:p}");
            return Err(Error::invalid("allocate", message));
        }
        // SAFETY: so many bytes of ours.
        unsafe { base.write_bytes(0, size) };
        let counted = Counted::new(supply, kind, bytes);
        Ok(Self { base, bytes, _mapping: None, counted })
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Its size.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// All of it.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: so many bytes of ours, which were set, borrowed through self.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes) }
    }

    /// All of it, to be changed.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self._mapping.is_none()
            && let Some(allocator) = &self.counted.supply.allocator
        {
            // SAFETY: it came from there, with this size, and goes with its owner.
            unsafe { allocator.deallocate(self.base.as_ptr(), self.bytes.max(1), ALIGN) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::alloc::{Layout, alloc, dealloc};
    use std::sync::Mutex;

    use super::*;

    /// Blocks that are out, and how many more there may be.
    #[derive(Default)]
    struct Counting {
        out: Mutex<Vec<(usize, usize)>>,
        more: AtomicU64,
        shift: usize,
    }

    // SAFETY: the process's own memory, and a piece of it behind its beginning, which nothing uses.
    unsafe impl Allocator for Counting {
        fn allocate(&self, bytes: usize, alignment: usize) -> *mut u8 {
            if self.more.fetch_sub(1, Ordering::Relaxed) == 0 {
                self.more.store(0, Ordering::Relaxed);
                return std::ptr::null_mut();
            }
            let layout = Layout::from_size_align(bytes + alignment, alignment).unwrap();
            // SAFETY: not of size 0.
            let memory = unsafe { alloc(layout).add(self.shift) };
            // What was there before.
            // SAFETY: so many bytes of ours.
            unsafe { memory.write_bytes(7, bytes) };
            self.out.lock().unwrap().push((memory as usize, bytes));
            memory
        }

        unsafe fn deallocate(&self, memory: *mut u8, bytes: usize, alignment: usize) {
            let mut out = self.out.lock().unwrap();
            let place = out.iter().position(|of| *of == (memory as usize, bytes)).unwrap();
            out.swap_remove(place);
            let layout = Layout::from_size_align(bytes + alignment, alignment).unwrap();
            // SAFETY: it was allocated so.
            unsafe { dealloc(memory.sub(self.shift), layout) };
        }
    }

    #[test]
    fn blocks_are_counted_zeroed_and_given_back() {
        let counting = Arc::new(Counting { more: 2.into(), ..Counting::default() });
        let allocator: Option<Box<dyn Allocator>> = Some(Box::new(counting.clone()));
        for supply in [Supply::default(), Supply::new(allocator)] {
            let (supply, is_own) = (Arc::new(supply), Arc::strong_count(&counting) > 1);
            let mut one = Block::new(&supply, Kind::Device, "x", 1000).unwrap();
            let two = Block::new(&supply, Kind::Host, "x", 0).unwrap();
            assert!(one.bytes().iter().all(|byte| *byte == 0) && two.bytes().is_empty());
            one.bytes_mut().fill(1);
            assert_eq!(supply.count(Kind::Device).get(), [1000, 1000]);
            assert_eq!(supply.count(Kind::Host).get(), [0, 0]);
            if supply.allocator.is_some() {
                assert!(is_own && counting.out.lock().unwrap().len() == 2);
                let error = Block::new(&supply, Kind::Host, "the x", 77).err().unwrap();
                assert!(matches!(error, Error::OutOfMemory { needed: 77, .. }), "{error}");
                assert!(error.to_string().contains("the program's allocator refuses"), "{error}");
            }
            drop((one, two));
            assert_eq!(supply.count(Kind::Device).get(), [0, 1000]);
        }
        assert!(counting.out.lock().unwrap().is_empty());
        assert_eq!(Arc::strong_count(&counting), 1, "the allocator goes with the last of it");
    }

    #[test]
    fn an_allocator_that_breaks_its_word_is_an_error() {
        let counting = Arc::new(Counting { more: 9.into(), shift: 8, ..Counting::default() });
        let allocator: Option<Box<dyn Allocator>> = Some(Box::new(counting.clone()));
        let supply = Arc::new(Supply::new(allocator));
        let error = Block::new(&supply, Kind::Device, "x", 100).err().unwrap();
        assert!(error.to_string().contains("multiple of 64"), "{error}");
        let error = Block::new(&supply, Kind::Device, "x", usize::MAX).err().unwrap();
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
        assert!(counting.out.lock().unwrap().is_empty());
        assert_eq!(supply.count(Kind::Device).get(), [0, 0]);
    }
}
