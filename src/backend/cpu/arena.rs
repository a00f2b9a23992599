//! The arena: all memory of a model or a trainer, planned, mapped once and cut into buffers.
//!
//! An arena is used twice with the same code. Measuring, it counts what is asked for and hands out
//! empty buffers; then one mapping of exactly that size is made and cut. So the plan cannot differ
//! from what is allocated.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::MmapMut;

use crate::{Error, Result};

/// Buffers start at multiples of this many bytes: a cache line, and an AVX-512 register.
const ALIGN: usize = 64;

/// A bump allocator over one mapping.
pub struct Arena {
    mapping: Option<Arc<Mapping>>,
    used: usize,
}

/// The mapping that the buffers of an arena share and keep alive.
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
    _memory: MmapMut,
}

// SAFETY: the mapping is plain memory; `base` is only read to cut disjoint buffers from it.
unsafe impl Send for Mapping {}
// SAFETY: as above; there is no way to reach the memory through a shared `Mapping`.
unsafe impl Sync for Mapping {}

impl Arena {
    /// An arena that only counts.
    pub fn measuring() -> Self {
        Self { mapping: None, used: 0 }
    }

    /// An arena of `bytes` zeroed bytes.
    pub fn mapped(bytes: usize) -> Result<Self> {
        let failed = |e: std::io::Error| Error::OutOfMemory {
            what: "the planned arena",
            needed: bytes as u64,
            limit: format!("which the system refuses ({e}); use a smaller batch or model"),
        };
        let mut memory = MmapMut::map_anon(bytes.max(1)).map_err(failed)?;
        // Large pages spare the GEMMs most TLB misses. Where they are off, nothing is lost.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        let base = NonNull::new(memory.as_mut_ptr()).expect("a mapping is never at address 0");
        Ok(Self { mapping: Some(Arc::new(Mapping { base, bytes, _memory: memory })), used: 0 })
    }

    /// Bytes handed out so far.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Cuts the next buffer of `len` zeroed elements (an empty one where the arena only measures).
    ///
    /// # Panics
    /// If the arena is smaller than what was measured, which would be a bug of the caller.
    pub fn alloc<T: bytemuck::Pod>(&mut self, len: usize) -> Buffer<T> {
        let start = self.used;
        self.used += (len * size_of::<T>()).next_multiple_of(ALIGN);
        let Some(mapping) = &self.mapping else {
            return Buffer { ptr: NonNull::dangling(), len: 0, _keep: None, _type: PhantomData };
        };
        assert!(self.used <= mapping.bytes, "an arena is cut as it was measured");
        // SAFETY: `start + len * size` is within the mapping (checked above), and `start` is a
        // multiple of 64 from a page boundary, so it is aligned for T.
        let ptr = unsafe { mapping.base.add(start) }.cast();
        Buffer { ptr, len, _keep: Some(mapping.clone()), _type: PhantomData }
    }
}

/// A piece of an arena, owned like a `Box<[T]>`.
pub struct Buffer<T> {
    ptr: NonNull<T>,
    len: usize,
    _keep: Option<Arc<Mapping>>,
    _type: PhantomData<T>,
}

// SAFETY: a buffer owns its piece alone (the arena hands out disjoint pieces), as a Box would.
unsafe impl<T: Send> Send for Buffer<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Buffer<T> {}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the piece is alive (`_keep`), aligned, `len` long, and only borrowed through
        // self. It holds zeroes or values written as T, which is Pod.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_disjoint_and_outlive_the_arena() {
        let cut = |arena: &mut Arena| {
            (arena.alloc::<f32>(3), arena.alloc::<u8>(65), arena.alloc::<f32>(16))
        };
        let mut measuring = Arena::measuring();
        let (a, _, _) = cut(&mut measuring);
        assert!(a.is_empty());
        assert_eq!(measuring.used(), 64 + 128 + 64);

        let mut arena = Arena::mapped(measuring.used()).unwrap();
        let (mut a, mut b, mut c) = cut(&mut arena);
        drop(arena);
        for address in [a.as_ptr() as usize, b.as_ptr() as usize, c.as_ptr() as usize] {
            assert_eq!(address % ALIGN, 0);
        }
        a.fill(1.0);
        b.fill(2);
        assert!(c.iter().all(|v| *v == 0.0));
        c.fill(3.0);
        assert!(a.iter().all(|v| *v == 1.0) && b.iter().all(|v| *v == 2));
    }

    #[test]
    fn a_hopeless_size_is_an_error() {
        let error = Arena::mapped(1 << 62).err().expect("no system has an exbibyte").to_string();
        assert!(error.contains("smaller batch"), "{error}");
    }
}
