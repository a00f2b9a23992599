//! Memory of GPUs that reach each other, over NVLink or PCIe: each process maps the others' memory, and
//! its kernels read and write there.
//!
//! Processes tell each other how far they are in words of device memory, for which a stream waits without
//! anybody's help. One that waits for a rank that is gone is released by its own process, which first
//! tells all others to believe nothing from it any more.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys::{self, CUresult};

use super::beside::Beside;
use super::gpu::{Gpu, text};
use super::memory::{Arena, Piece};
use crate::Result;

/// Memory that other processes can map.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Exported {
    /// Of the process, drawn when it first exports some.
    process: [u64; 2],
    handle: [u8; 64],
    /// Where it is mapped in that process.
    address: u64,
    /// From the start of its allocation.
    offset: u64,
}

/// The memory of another process, mapped.
pub(crate) struct Mapped {
    gpu: Arc<Gpu>,
    /// In this process.
    pub(crate) address: u64,
    /// What is to be unmapped; 0 for memory of this process.
    opened: u64,
}

/// What tells this process from all others, whatever containers they are in.
fn process() -> [u64; 2] {
    static DRAWN: OnceLock<[u64; 2]> = OnceLock::new();
    *DRAWN.get_or_init(|| {
        let mut drawn = [u64::from(std::process::id()), std::ptr::from_ref(&DRAWN) as u64];
        // Where there is no such call, the number and the place, which is random as well, have to do.
        // NOTE: by its number, since the function of this name is younger than the oldest glibc that
        // the library runs with.
        // SAFETY: writes as many bytes.
        let _ = unsafe {
            let bytes = drawn.as_mut_ptr().cast::<c_void>();
            libc::syscall(libc::SYS_getrandom, bytes, size_of_val(&drawn), 0)
        };
        drawn
    })
}

impl Exported {
    /// What `piece` is cut from.
    pub(crate) fn new(gpu: &Gpu, piece: &Piece) -> std::result::Result<Self, String> {
        let address = piece.address;
        let (mut base, mut bytes) = (0, 0);
        // SAFETY: bytes, of which all are values.
        let mut handle: sys::CUipcMemHandle = unsafe { std::mem::zeroed() };
        // SAFETY: writes numbers and a handle.
        let result = gpu.scope(|| unsafe {
            match sys::cuMemGetAddressRange_v2(&mut base, &mut bytes, address) {
                CUresult::CUDA_SUCCESS => sys::cuIpcGetMemHandle(&mut handle, base),
                other => other,
            }
        });
        if result != CUresult::CUDA_SUCCESS {
            return Err(format!("memory cannot be shared: {}", text(result)));
        }
        let handle = handle.reserved.map(|byte| byte as u8);
        Ok(Self { process: process(), handle, address, offset: address - base })
    }
}

impl Mapped {
    /// Whether it is of another process.
    pub(crate) fn is_opened(&self) -> bool {
        self.opened != 0
    }

    /// This rank's own.
    pub(crate) fn own(gpu: &Arc<Gpu>, piece: &Piece) -> Self {
        Self { gpu: gpu.clone(), address: piece.address, opened: 0 }
    }

    pub(crate) fn new(gpu: &Arc<Gpu>, exported: &Exported) -> std::result::Result<Self, String> {
        let Exported { handle, address, offset, .. } = *exported;
        if exported.process == process() {
            gpu.scope(|| enable_access(address))?;
            return Ok(Self { gpu: gpu.clone(), address, opened: 0 });
        }
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as _) };
        let (mut opened, flags) = (0, sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
        // SAFETY: writes an address, which `drop` gives back.
        let result =
            gpu.scope(|| unsafe { sys::cuIpcOpenMemHandle_v2(&mut opened, handle, flags as u32) });
        if result != CUresult::CUDA_SUCCESS {
            return Err(format!("the memory of another rank cannot be mapped: {}", text(result)));
        }
        Ok(Self { gpu: gpu.clone(), address: opened + offset, opened })
    }
}

/// Lets the current context reach that of an address of this process.
fn enable_access(address: u64) -> std::result::Result<(), String> {
    let which = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_CONTEXT;
    let mut context: sys::CUcontext = std::ptr::null_mut();
    // SAFETY: the attribute is a handle, which is valid as long as the memory.
    let result = unsafe {
        match sys::cuPointerGetAttribute((&raw mut context).cast::<c_void>(), which, address) {
            CUresult::CUDA_SUCCESS => sys::cuCtxEnablePeerAccess(context, 0),
            other => other,
        }
    };
    match result {
        CUresult::CUDA_SUCCESS | CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
        other => Err(format!("another GPU cannot be reached: {}", text(other))),
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if self.opened == 0 || self.gpu.is_stuck() {
            return;
        }
        // SAFETY: mapped in `new`, and what used it has been waited for.
        self.gpu.scope(|| unsafe {
            let _ = sys::cuIpcCloseMemHandle(self.opened);
        });
    }
}

/// What a rank tells another: which of its gradients are made, and what of its sums, squares or weights
/// has arrived. They count on from exchange to exchange.
#[derive(Clone, Copy)]
pub(crate) enum Told {
    Made = 0,
    Arrived = 1,
    /// Not a count: nothing is to be believed any more.
    Aborted = 2,
}

/// Ranks of whom one kernel reaches all memory, as kernels/exchange.cu has it.
pub(crate) const MOST_PEERS: usize = 8;

/// Bytes of what one rank tells another.
const WORDS: u64 = 16;

/// The words of all ranks of a group.
pub(crate) struct Peers {
    gpu: Arc<Gpu>,
    rank: usize,
    /// (ranks, 4) words of this rank, in which the others write.
    own: Piece,
    /// The same of all ranks.
    all: Vec<Mapped>,
    count: AtomicU32,
    is_aborted: AtomicBool,
}

impl Peers {
    /// What this rank exports for that, and is kept for [`Peers::new`].
    pub(crate) fn words(gpu: &Arc<Gpu>, size: usize) -> Result<Piece> {
        // NOTE: CUDA cuts small allocations from blocks of this size, all of which others map.
        const BLOCK: usize = 2 << 20;
        let bytes = (size * WORDS as usize).next_multiple_of(BLOCK);
        let mut measuring = Arena::measuring(gpu);
        measuring.bytes(bytes);
        let words = Arena::allocated(gpu, measuring.used())?.bytes(bytes);
        gpu.synchronize()?;
        Ok(words)
    }

    pub(crate) fn new(gpu: &Arc<Gpu>, rank: usize, own: Piece, all: Vec<Mapped>) -> Self {
        let (count, is_aborted) = (AtomicU32::new(0), AtomicBool::new(false));
        Self { gpu: gpu.clone(), rank, own, all, count, is_aborted }
    }

    /// The other ranks, each from another one on, so that not all ask the same first.
    pub(crate) fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, size) = (self.rank, self.all.len());
        (1..size).map(move |i| (rank + i) % size)
    }

    /// The next count, the same on all ranks, which exchange the same things in the same order.
    pub(crate) fn next(&self) -> u32 {
        self.count.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }

    pub(crate) fn is_aborted(&self) -> bool {
        self.is_aborted.load(Ordering::Relaxed)
    }

    /// Where `by` tells something to `to`.
    fn place(&self, by: usize, to: usize, told: Told) -> u64 {
        self.all[to].address + by as u64 * WORDS + 4 * told as u64
    }

    /// Copies to the memory of a rank.
    pub(crate) fn copy(&self, beside: &Beside, from: u64, bytes: usize, to: u64) {
        // SAFETY: so many bytes are there, on both sides.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, beside.stream()) };
        self.gpu.note("copying to another GPU", result);
    }

    /// Tells it to a rank once all is done that is queued.
    pub(crate) fn tell(&self, beside: &Beside, to: usize, told: Told, count: u32) {
        let place = self.place(self.rank, to, told);
        // SAFETY: a word of memory that is mapped.
        let result = unsafe { sys::cuStreamWriteValue32_v2(beside.stream(), place, count, 0) };
        self.gpu.note("telling another GPU", result);
    }

    /// What is queued from now on comes behind what a rank tells.
    pub(crate) fn hear(&self, beside: &Beside, by: usize, told: Told, count: u32) {
        let place = self.place(by, self.rank, told);
        let at_least = sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32;
        // SAFETY: a word of memory that is there.
        let result =
            unsafe { sys::cuStreamWaitValue32_v2(beside.stream(), place, count, at_least) };
        self.gpu.note("hearing from another GPU", result);
    }

    /// The words that others have written: four of each rank.
    pub(crate) fn own_words(&self) -> u64 {
        self.own.address
    }

    /// Whether one has said, in such words, that nothing is to be believed.
    pub(crate) fn says_aborted(words: &[u32]) -> bool {
        words.chunks(WORDS as usize / 4).any(|of_rank| of_rank[Told::Aborted as usize] != 0)
    }

    /// Tells all others to believe nothing from here on, then releases what waits on this GPU.
    pub(crate) fn abort(&self) {
        if self.is_aborted.swap(true, Ordering::Relaxed) {
            return;
        }
        // NOTE: in this order, and each done before the next: what is released goes on with what never
        // came, and tells others so. It is queued where nothing waits.
        for to in self.others() {
            self.set(self.place(self.rank, to, Told::Aborted), 1);
        }
        self.release();
    }

    /// Lets what waits on this GPU go on; others may still tell something that takes that back.
    pub(crate) fn release(&self) {
        let released = self.count.load(Ordering::Relaxed).wrapping_add(1 << 30);
        for by in self.others() {
            for told in [Told::Made, Told::Arrived] {
                self.set(self.place(by, self.rank, told), released);
            }
        }
    }

    /// NOTE: an error is not kept, for another process may be gone with its memory, and this one goes on.
    fn set(&self, place: u64, word: u32) {
        // SAFETY: a word of memory that is mapped.
        unsafe {
            let _ = sys::cuMemsetD32Async(place, word, 1, self.gpu.stream());
            let _ = sys::cuStreamSynchronize(self.gpu.stream());
        }
    }

    /// Whether another rank has given up, as this one's words have it now.
    pub(crate) fn is_given_up(&self) -> bool {
        let mut words = [0u32; 4 * MOST_PEERS];
        let bytes = self.all.len().min(MOST_PEERS) * WORDS as usize;
        // SAFETY: so many bytes are there, on both sides; the wait ends the copy.
        let result = unsafe {
            let (to, stream) = (words.as_mut_ptr().cast(), self.gpu.stream());
            match sys::cuMemcpyDtoHAsync_v2(to, self.own.address, bytes, stream) {
                CUresult::CUDA_SUCCESS => sys::cuStreamSynchronize(stream),
                other => other,
            }
        };
        self.gpu.note("hearing from other GPUs", result);
        Self::says_aborted(&words)
    }

    /// Keeps the words of this rank for ever, since others may still write there.
    pub(crate) fn keep_for_ever(&self) {
        self.own.keep_for_ever();
    }
}
