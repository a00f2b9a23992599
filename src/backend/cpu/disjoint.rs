//! A slice that jobs share out, where the parts do not follow each other and `chunks_mut` cannot
//! cut it.

/// A slice of which every job takes parts of its own.
pub(super) struct DisjointSlice<T>(*mut T, usize);

// SAFETY: callers of `part` keep parts disjoint, and whoever writes through `pointer` keeps to
// elements of its own.
unsafe impl<T: Send> Sync for DisjointSlice<T> {}

impl<T> DisjointSlice<T> {
    /// The slice must not be used otherwise for as long as parts are.
    pub(super) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr(), slice.len())
    }

    /// Where element `start` lies, for those who own elements that do not follow each other.
    pub(super) fn pointer(&self, start: usize) -> *mut T {
        assert!(start <= self.1, "element {start} of {}", self.1);
        self.0.wrapping_add(start)
    }

    /// Elements start .. start + len.
    ///
    /// # Safety
    /// The slice is alive, nobody else uses these elements meanwhile.
    ///
    /// # Panics
    /// If they are not all in the slice.
    #[expect(clippy::mut_from_ref, reason = "the parts are disjoint, see Safety")]
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start + len <= self.1, "{start} + {len} elements of {}", self.1);
        // SAFETY: in bounds, and the caller keeps parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}
