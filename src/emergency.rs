//! The allocator of the C library and of mxtrain: the system's, and a reserve behind it.
//!
//! Rust ends the process where a small allocation fails that nobody asks about first: a message, a
//! path, a list's node, the standard library's own. A host must survive that. So where the system
//! refuses a small request, it is served from a reserve in the library's own memory, and the call
//! goes on to the next large request, whose refusal is an error (`reserve.rs`).
//!
//! The reserve is not drained step by step: once more than [`LOW`] of it is in use, whatever asks
//! for memory by size is refused, and so is every call of the C API that comes in
//! (`capi/guard.rs`), except those that give something back or allocate nothing. What is freed goes
//! back to the reserve.
//!
//! What others' code allocates in large pieces without asking, a parser for example, does not fit
//! into it. Whoever calls such code asks for as much first, and keeps it as a [`Spare`], which is
//! given up where the system refuses anything on that thread.
//!
//! It is a set of pools, each of slots of one size, with a bit for every slot. There is no lock, so
//! no child of a fork inherits one that is held, and every thread is served.
//!
//! NOTE: only with the feature `c-library`, which mxtrain asks for. A Rust program that uses the
//! crate has its own allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, UnsafeCell};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The allocator.
struct Emergency;

#[global_allocator]
static ALLOCATOR: Emergency = Emergency;

/// Bytes of a pool.
const POOL: usize = 256 << 10;

/// Pools: of slots of 64 bytes, of 256, and so on up to 64 KiB.
const POOLS: usize = 6;

/// Bytes of the reserve in use from which on memory counts as short.
const LOW: usize = POOL * POOLS / 4;

/// Alignment of the pools, and most that a slot has. Loaders do not see to more than a page.
const PAGE: usize = 4096;

/// Zero pages, which take no memory before they are used.
#[repr(C, align(4096))]
struct Pools(UnsafeCell<[[u8; POOL]; POOLS]>);

// SAFETY: a slot belongs to whoever set its bit, until its bit is cleared.
unsafe impl Sync for Pools {}

static MEMORY: Pools = Pools(UnsafeCell::new([[0; POOL]; POOLS]));

/// A bit for each slot that is in use.
static TAKEN: [[AtomicU64; POOL / slot_size(0) / 64]; POOLS] =
    [const { [const { AtomicU64::new(0) }; POOL / slot_size(0) / 64] }; POOLS];

/// Bytes of the slots in use.
static USED: AtomicUsize = AtomicUsize::new(0);

const fn slot_size(pool: usize) -> usize {
    64 << (2 * pool)
}

/// Whether so much of the reserve is in use that nothing new may begin.
pub(crate) fn is_low() -> bool {
    USED.load(Ordering::Relaxed) > LOW
}

/// A free slot for `layout`, or NULL.
fn take(layout: Layout) -> *mut u8 {
    let size = layout.size().max(layout.align());
    if layout.align() > PAGE || size > slot_size(POOLS - 1) {
        return null_mut();
    }
    for pool in (0..POOLS).filter(|pool| slot_size(*pool) >= size) {
        let slots = POOL / slot_size(pool);
        for (index, word) in TAKEN[pool].iter().take(slots.div_ceil(64)).enumerate() {
            let slots_here = u64::MAX >> 64usize.saturating_sub(slots);
            let mut taken = word.load(Ordering::Relaxed);
            while !taken & slots_here != 0 {
                let free = (!taken).trailing_zeros() as usize;
                let (with, order) = (taken | 1 << free, (Ordering::Acquire, Ordering::Relaxed));
                match word.compare_exchange_weak(taken, with, order.0, order.1) {
                    Ok(_) => {
                        USED.fetch_add(slot_size(pool), Ordering::Relaxed);
                        let offset = pool * POOL + (64 * index + free) * slot_size(pool);
                        // SAFETY: within the pools.
                        return unsafe { MEMORY.0.get().cast::<u8>().add(offset) };
                    }
                    Err(now) => taken = now,
                }
            }
        }
    }
    null_mut()
}

/// Where in the reserve `pointer` points, if it does.
fn offset_of(pointer: *mut u8) -> Option<usize> {
    let offset = pointer.addr().wrapping_sub(MEMORY.0.get().addr());
    (offset < POOL * POOLS).then_some(offset)
}

/// Frees the slot at `offset`.
fn give_back(offset: usize) {
    let (pool, within) = (offset / POOL, offset % POOL);
    let slot = within / slot_size(pool);
    TAKEN[pool][slot / 64].fetch_and(!(1 << (slot % 64)), Ordering::Release);
    USED.fetch_sub(slot_size(pool), Ordering::Relaxed);
}

/// A block of the system's that this thread gives up where the system refuses it another one.
#[derive(Debug)]
pub(crate) struct Spare(*mut Block);

/// How a block begins: they are a list.
struct Block {
    next: *mut Self,
    layout: Layout,
}

thread_local! {
    // Const-made and without destructor, so that an allocator may use it.
    static BLOCKS: Cell<*mut Block> = const { Cell::new(null_mut()) };
}

/// Blocks of all threads. A thread that has none does not look at its variables, which it might not
/// have yet.
static BLOCK_COUNT: AtomicUsize = AtomicUsize::new(0);

impl Spare {
    /// `None` where the system refuses it, or has refused so much that nothing new may begin.
    pub(crate) fn new(bytes: usize) -> Option<Self> {
        let bytes = bytes.checked_add(size_of::<Block>())?;
        let layout = Layout::from_size_align(bytes, align_of::<Block>()).ok()?;
        if is_low() {
            return None;
        }
        // SAFETY: the size is not 0; what is written fits, and the layout says how it is aligned.
        unsafe {
            let block = System.alloc(layout).cast::<Block>();
            if block.is_null() {
                return None;
            }
            block.write(Block { next: BLOCKS.get(), layout });
            BLOCKS.set(block);
            BLOCK_COUNT.fetch_add(1, Ordering::Relaxed);
            Some(Self(block))
        }
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        // SAFETY: blocks of this thread's list live, and only this thread, which a `Spare` does not
        // leave, reads and changes it.
        unsafe {
            let mut before: *mut Block = null_mut();
            let mut block = BLOCKS.get();
            while !block.is_null() && block != self.0 {
                (before, block) = (block, (*block).next);
            }
            // It may be given up already.
            if block.is_null() {
                return;
            }
            match before.is_null() {
                true => BLOCKS.set((*block).next),
                false => (*before).next = (*block).next,
            }
            free_block(block);
        }
    }
}

/// # Safety
/// `block` is in no list any more.
unsafe fn free_block(block: *mut Block) {
    BLOCK_COUNT.fetch_sub(1, Ordering::Relaxed);
    // SAFETY: it came from there with this layout.
    unsafe { System.dealloc(block.cast(), (*block).layout) };
}

/// Gives one of this thread's blocks back to the system; false if there is none.
fn give_up_spare() -> bool {
    if BLOCK_COUNT.load(Ordering::Relaxed) == 0 {
        return false;
    }
    let block = BLOCKS.get();
    if block.is_null() {
        return false;
    }
    // SAFETY: the first of the list, which goes on behind it.
    unsafe {
        BLOCKS.set((*block).next);
        free_block(block);
    }
    true
}

/// Runs `ask`, whose requests give up no [`Spare`]: a refusal is an error to it.
pub(crate) fn keeping_spares<R>(ask: impl FnOnce() -> R) -> R {
    /// Puts the list back.
    struct Restore(*mut Block);
    impl Drop for Restore {
        fn drop(&mut self) {
            BLOCKS.set(self.0);
        }
    }
    if BLOCK_COUNT.load(Ordering::Relaxed) == 0 {
        return ask();
    }
    let _restore = Restore(BLOCKS.replace(null_mut()));
    ask()
}

/// Asks the system, and asks again for each [`Spare`] that is given up.
fn from_system(ask: impl Fn() -> *mut u8) -> *mut u8 {
    loop {
        let pointer = ask();
        if !pointer.is_null() || !give_up_spare() {
            return pointer;
        }
    }
}

// SAFETY: memory is the system's or a slot that nobody else has; slots are as large as asked for,
// and aligned, for pools begin at a page and a slot's size is a power of two.
unsafe impl GlobalAlloc for Emergency {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on.
        let pointer = from_system(|| unsafe { System.alloc(layout) });
        if pointer.is_null() { take(layout) } else { pointer }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on.
        let pointer = from_system(|| unsafe { System.alloc_zeroed(layout) });
        if !pointer.is_null() {
            return pointer;
        }
        let pointer = take(layout);
        if !pointer.is_null() {
            // SAFETY: a slot of at least this size. What it held before is still there.
            unsafe { pointer.write_bytes(0, layout.size()) };
        }
        pointer
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        match offset_of(pointer) {
            Some(offset) => give_back(offset),
            // SAFETY: passed on; it came from there.
            None => unsafe { System.dealloc(pointer, layout) },
        }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if offset_of(pointer).is_none() {
            // SAFETY: passed on; it came from there.
            let moved = from_system(|| unsafe { System.realloc(pointer, layout, size) });
            if !moved.is_null() {
                return moved;
            }
            // A block that only is to be smaller is good as it is: the system asks for no size when
            // it is freed.
            if size <= layout.size() {
                return pointer;
            }
        }
        // SAFETY: the caller promises that `size`, rounded up to the alignment, is no overflow.
        let wanted = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        // SAFETY: as asked for by the caller, who has the block of `layout`; both are apart.
        unsafe {
            let moved = self.alloc(wanted);
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(pointer, layout.size().min(size));
                self.dealloc(pointer, layout);
            }
            moved
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Mutex;

    use super::*;

    /// Tests that look at how much is in use take turns.
    static ALONE: Mutex<()> = Mutex::new(());

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).unwrap()
    }

    fn free(pointer: *mut u8) {
        give_back(offset_of(pointer).expect("a slot of the reserve"));
    }

    #[test]
    fn slots_are_apart_aligned_and_used_again() {
        let _alone = ALONE.lock().unwrap();
        for _ in 0..3 {
            let mut slots = Vec::new();
            for (size, align) in [(1, 1), (64, 8), (65, 64), (3000, 4096), (65536, 16), (0, 1)] {
                let slot = take(layout(size, align));
                assert!(!slot.is_null() && slot.addr().is_multiple_of(align));
                // SAFETY: as many bytes are ours.
                unsafe { slot.write_bytes(slots.len() as u8, size) };
                slots.push((slot, size));
            }
            for (value, (slot, size)) in slots.into_iter().enumerate() {
                // SAFETY: as above.
                let bytes = unsafe { std::slice::from_raw_parts(slot, size) };
                assert!(bytes.iter().all(|byte| *byte == value as u8));
                free(slot);
            }
        }
        assert_eq!(USED.load(Ordering::Relaxed), 0);
        assert!(take(layout(65537, 1)).is_null() && take(layout(8, 8192)).is_null());
    }

    /// In a process of its own: as long as the reserve is low, nothing that asks for memory begins,
    /// and other tests would fail.
    #[test]
    fn it_ends_and_says_before_that_it_is_low() {
        const OWN: &str = "MXT_TEST_RESERVE";
        const NAME: &str = "emergency::tests::it_ends_and_says_before_that_it_is_low";
        if std::env::var_os(OWN).is_none() {
            let mut own = std::process::Command::new(std::env::current_exe().unwrap());
            let output = own.args(["--exact", NAME, "--nocapture"]).env(OWN, "1").output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && text.contains("alone"), "{output:?}");
            return;
        }
        println!("alone");
        let mut slots = Vec::new();
        let mut was_low_at = 0;
        loop {
            let slot = take(layout(64, 64));
            if slot.is_null() {
                break;
            }
            slots.push(slot);
            if was_low_at == 0 && is_low() {
                was_low_at = slots.len();
            }
        }
        // Larger slots serve small requests, too.
        assert_eq!(slots.len(), (0..POOLS).map(|pool| POOL / slot_size(pool)).sum::<usize>());
        assert_eq!(slots.iter().collect::<HashSet<_>>().len(), slots.len());
        assert!(was_low_at > 1000 && was_low_at < slots.len(), "{was_low_at} of {}", slots.len());
        slots.into_iter().for_each(free);
        assert!(!is_low() && USED.load(Ordering::Relaxed) == 0);
    }

    #[test]
    fn a_block_moves_from_the_reserve_to_the_system() {
        let _alone = ALONE.lock().unwrap();
        let (small, large) = (layout(100, 8), layout(1 << 20, 8));
        // SAFETY: every block is used within its size and freed with its layout.
        unsafe {
            let slot = take(small);
            slot.write_bytes(7, 100);
            let moved = ALLOCATOR.realloc(slot, small, large.size());
            assert!(!moved.is_null() && offset_of(moved).is_none());
            assert!(std::slice::from_raw_parts(moved, 100).iter().all(|byte| *byte == 7));
            ALLOCATOR.dealloc(moved, large);
        }
        assert_eq!(USED.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn spares_are_given_up_one_by_one() {
        let [a, b, c] = [10, 1 << 20, 3].map(|bytes| Spare::new(bytes).expect("memory"));
        drop(b);
        assert!(keeping_spares(|| !give_up_spare()));
        let asked = Cell::new(0);
        let refused = from_system(|| {
            asked.set(asked.get() + 1);
            null_mut()
        });
        assert_eq!((refused, asked.get()), (null_mut(), 3), "at first, and for each of the two");
        drop((a, c));
        let _d = Spare::new(1).expect("memory");
        std::thread::scope(|scope| {
            assert!(!scope.spawn(give_up_spare).join().unwrap(), "another thread's");
        });
        assert!(give_up_spare() && !give_up_spare());
        assert!(Spare::new(usize::MAX).is_none() && Spare::new(1 << 62).is_none());
    }

    #[test]
    fn threads_share_it() {
        let _alone = ALONE.lock().unwrap();
        std::thread::scope(|scope| {
            for thread in 1..=4_u8 {
                scope.spawn(move || {
                    for round in 0..2000 {
                        let size = 1 + round * 7 % 900;
                        let slot = take(layout(size, 8));
                        assert!(!slot.is_null());
                        // SAFETY: as many bytes are ours.
                        let bytes = unsafe {
                            slot.write_bytes(thread, size);
                            std::slice::from_raw_parts(slot, size)
                        };
                        assert!(bytes.iter().all(|byte| *byte == thread));
                        free(slot);
                    }
                });
            }
        });
        assert_eq!(USED.load(Ordering::Relaxed), 0);
    }
}
