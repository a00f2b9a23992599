//! The arena: all memory of a model or a trainer, planned, allocated once and cut into buffers.
//!
//! An arena is used twice with the same code. Measuring, it counts what is asked for and hands out
//! empty buffers; then one block of exactly that size is made and cut. So the plan cannot differ
//! from what is allocated.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::Result;
use crate::backend::block::{ALIGN, Block, Kind, Supply};

/// A bump allocator over one block, which the buffers share and keep alive.
pub struct Arena {
    block: Option<Arc<Block>>,
    used: usize,
}

impl Arena {
    /// An arena that only counts.
    pub fn measuring() -> Self {
        Self { block: None, used: 0 }
    }

    /// An arena of `bytes` zeroed bytes, of the system's memory.
    pub fn mapped(bytes: usize) -> Result<Self> {
        Self::supplied(&Arc::default(), bytes)
    }

    /// An arena of `bytes` zeroed bytes of an engine's memory.
    pub(crate) fn supplied(supply: &Arc<Supply>, bytes: usize) -> Result<Self> {
        let block = Block::new(supply, Kind::Device, "the planned arena", bytes)?;
        Ok(Self { block: Some(Arc::new(block)), used: 0 })
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
        let Some(block) = &self.block else {
            return Buffer { ptr: NonNull::dangling(), len: 0, _keep: None, _type: PhantomData };
        };
        assert!(self.used <= block.len(), "an arena is cut as it was measured");
        // SAFETY: `start + len * size` is within the block (checked above), and both `start` and
        // where the block begins are multiples of 64, so it is aligned for T. Pieces are disjoint,
        // and nothing else reaches the block's bytes.
        let ptr = unsafe { block.base().add(start) }.cast();
        Buffer { ptr, len, _keep: Some(block.clone()), _type: PhantomData }
    }
}

/// A piece of an arena, owned like a `Box<[T]>`.
pub struct Buffer<T> {
    ptr: NonNull<T>,
    len: usize,
    _keep: Option<Arc<Block>>,
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
