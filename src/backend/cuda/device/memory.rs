//! The arena on a GPU: one allocation, planned, cut into buffers; and uploads through pinned
//! memory.
//!
//! As on the CPU, the same code runs twice, counting first, so the plan is what is allocated.
//!
//! Who writes a tensor notes its amax, from which the scale of its FP8 form is made, so no kernel
//! reads a tensor to find it: `Tensor::write` is the only way to write. Every writing takes a fresh
//! word; all words are zeroed where a pass begins. A tensor that something else has overwritten is
//! measured. Optimizers do it for weights.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::sys::{self, CUresult};

use super::capture;
use super::gpu::{Gpu, text};
use crate::backend::block::{Counted, Kind};
use crate::backend::{GradientPlace, Precision, Slot};
use crate::optim::Master;
use crate::reserve::reserve;
use crate::{Error, Result};

/// Buffers start at multiples of this many bytes, as those of cudaMalloc do.
const ALIGN: usize = 256;

/// A bump allocator over one allocation.
pub(crate) struct Arena {
    gpu: Arc<Gpu>,
    slab: Option<Arc<Slab>>,
    used: usize,
    /// Of the tensors, once there is one.
    amaxes: Option<Arc<Amaxes>>,
}

/// The allocation that the buffers of an arena share and keep alive.
struct Slab {
    gpu: Arc<Gpu>,
    base: u64,
    bytes: usize,
    _counted: Counted,
}

impl Drop for Slab {
    fn drop(&mut self) {
        if self.gpu.is_stuck() {
            return;
        }
        let _alone = capture::without_captures();
        self.gpu.scope(|| {
            // SAFETY: ours, and no buffer is left. What is queued may still use it.
            unsafe {
                let _ = sys::cuStreamSynchronize(self.gpu.stream());
                let _ = sys::cuMemFree_v2(self.base);
            }
        });
    }
}

/// A piece of an arena: an address on the device, and what keeps it valid.
pub(crate) struct Piece {
    pub(crate) address: u64,
    keep: Option<Arc<Slab>>,
}

impl Piece {
    /// Keeps its allocation as long as the process lives.
    pub(crate) fn keep_for_ever(&self) {
        std::mem::forget(self.keep.clone());
    }

    /// The same piece once more.
    pub(crate) fn again(&self) -> Self {
        Self { address: self.address, keep: self.keep.clone() }
    }
}

/// f32 values.
pub(crate) struct F32 {
    pub(crate) piece: Piece,
    pub(crate) len: usize,
}

/// Activations or their gradients.
pub(crate) struct Tensor {
    pub(crate) piece: Piece,
    pub(crate) len: usize,
    pub(crate) precision: Precision,
    amaxes: Arc<Amaxes>,
    /// Number of the word that the kernel which wrote the tensor noted its largest magnitude in.
    noted: Option<u64>,
}

/// All parameters of a model: master values, the bf16 copies that GEMMs read, and a word each for the
/// bits of the largest magnitude (amax): of the master values, or where these are split of the
/// copies, which operands are then made from.
pub(crate) struct Weights {
    masters: Masters<Piece>,
    pub(crate) copy: Piece,
    pub(crate) amax: Piece,
}

/// Master values in f32, or the low halves that their copies lack.
#[derive(Clone, Copy)]
pub(crate) enum Masters<T> {
    F32(T),
    Low(T),
}

impl Weights {
    /// The buffers of all, and bytes of a master value.
    pub(crate) fn buffers(&self) -> ([&Piece; 3], usize) {
        let (masters, size) = match &self.masters {
            Masters::F32(whole) => (whole, 4),
            Masters::Low(low) => (low, 2),
        };
        ([&self.amax, &self.copy, masters], size)
    }

    pub(crate) fn param(&self, slot: Slot) -> Param<'_> {
        let masters = match &self.masters {
            Masters::F32(whole) => Masters::F32(whole.address + 4 * slot.start as u64),
            Masters::Low(low) => Masters::Low(low.address + 2 * slot.start as u64),
        };
        Param {
            masters,
            len: slot.len,
            copy: self.copy.at(2 * slot.start),
            amax: self.amax.at(4 * slot.index),
            _weights: PhantomData,
        }
    }
}

/// One of them.
pub(crate) struct Param<'a> {
    pub(crate) masters: Masters<u64>,
    pub(crate) len: usize,
    pub(crate) copy: Piece,
    pub(crate) amax: Piece,
    _weights: PhantomData<&'a Weights>,
}

/// The gradient of a parameter.
pub(crate) struct Gradient<'a> {
    start: u64,
    pub(crate) place: GradientPlace,
    _all: PhantomData<&'a mut Piece>,
}

impl<'a> Gradient<'a> {
    /// At a place of the buffer of all.
    pub(crate) fn at(all: &'a Piece, place: GradientPlace) -> Self {
        Self { start: all.address + place.start as u64, place, _all: PhantomData }
    }

    pub(crate) fn address(&self) -> u64 {
        self.start
    }

    /// The address, for kernels that write f32 alone.
    ///
    /// # Panics
    /// For the gradient of a matrix of a block that is kept in bf16, which products alone write.
    pub(crate) fn in_f32(&self) -> u64 {
        assert_eq!(self.place.precision, Precision::F32, "kept in f32");
        self.start
    }
}

/// Words for the bits of largest magnitudes: every kernel that writes a tensor takes one of its
/// own.
///
/// All are zeroed together at the start of a pass, because zeroing one before every kernel would
/// take as long as many kernels of a small model do. A pass that takes more than there are goes
/// without.
pub(crate) struct Amaxes {
    words: Piece,
    /// How many were ever taken; those that a pass does not take count as taken.
    taken: AtomicU64,
}

impl Amaxes {
    const COUNT: u64 = 4096;

    /// Where number `number` lies, as long as its pass lasts.
    fn address(&self, number: u64) -> Option<u64> {
        let pass = |number| number / Self::COUNT;
        // The last of a pass marks that there are no more.
        let last = number % Self::COUNT == Self::COUNT - 1;
        (!last && pass(number) == pass(self.taken.load(Ordering::Relaxed)))
            .then(|| self.words.address + 4 * (number % Self::COUNT))
    }

    /// The first of `count` next to each other.
    fn take(&self, count: u64) -> Option<u64> {
        let number = self.taken.load(Ordering::Relaxed);
        self.address(number + count - 1)?;
        self.taken.store(number + count, Ordering::Relaxed);
        Some(number)
    }
}

impl Param<'_> {
    /// The address of the values that kernels of a precision read.
    pub(crate) fn as_read_in(&self, precision: Precision) -> u64 {
        match precision {
            Precision::F32 => self.master(),
            Precision::Bf16 => self.copy.address,
        }
    }

    /// The address of the master values.
    ///
    /// # Panics
    /// Where they are split, which trainers refuse for all that reads them.
    pub(crate) fn master(&self) -> u64 {
        self.whole().expect("master weights are in f32")
    }

    /// The same; None where they are split.
    pub(crate) fn whole(&self) -> Option<u64> {
        match self.masters {
            Masters::F32(whole) => Some(whole),
            Masters::Low(_) => None,
        }
    }

    /// The address of the values that operands are made from, and their type.
    pub(crate) fn source(&self) -> (u64, Precision) {
        match self.masters {
            Masters::F32(whole) => (whole, Precision::F32),
            Masters::Low(_) => (self.copy.address, Precision::Bf16),
        }
    }
}

impl Tensor {
    pub(crate) fn address(&self) -> u64 {
        self.piece.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.len * self.precision.size()
    }

    /// The only way to write the tensor, in place or anew. Who asks [`Written::amax`] for a word
    /// notes the largest magnitude there; else none is known from here on.
    pub(crate) fn write(&mut self) -> Written<'_> {
        self.noted = None;
        Written { address: self.address(), tensor: self }
    }

    /// The address of the bits of the largest magnitude, if they were noted.
    pub(crate) fn amax(&self) -> Option<u64> {
        self.amaxes.address(self.noted?)
    }

    /// The address of `count` zeroed words for what else a pass has to find out about the tensor;
    /// None where there are not as many.
    pub(crate) fn zeroed_words(&self, count: u64) -> Option<u64> {
        let number = self.amaxes.take(count)?;
        self.amaxes.address(number)
    }

    /// A pass begins, which overwrites all tensors of the arena before it reads them.
    pub(crate) fn begin_pass(&self, gpu: &Gpu) {
        let Amaxes { words, taken } = &*self.amaxes;
        let next = (taken.load(Ordering::Relaxed) / Amaxes::COUNT + 1) * Amaxes::COUNT;
        taken.store(next, Ordering::Relaxed);
        let bytes = 4 * Amaxes::COUNT as usize;
        // SAFETY: the words are ours.
        let result = unsafe { sys::cuMemsetD8Async(words.address, 0, bytes, gpu.stream()) };
        gpu.note("clearing largest magnitudes", result);
    }

    /// The address of element `index`.
    pub(crate) fn at(&self, index: usize) -> u64 {
        self.address() + (index * self.precision.size()) as u64
    }
}

/// A tensor that is being written.
pub(crate) struct Written<'a> {
    pub(crate) address: u64,
    tensor: &'a mut Tensor,
}

impl Written<'_> {
    /// A zeroed word in which the kernels that now write the tensor note the largest magnitude of
    /// all that they store; address 0 where none needs to know.
    pub(crate) fn amax(&mut self) -> u64 {
        let Tensor { precision, noted, amaxes, .. } = &mut *self.tensor;
        *noted = (*precision == Precision::Bf16).then(|| amaxes.take(1)).flatten();
        self.tensor.amax().unwrap_or(0)
    }

    /// The address of element `index`.
    pub(crate) fn at(&self, index: usize) -> u64 {
        self.tensor.at(index)
    }
}

impl Piece {
    /// What begins `bytes` further on, for as long as this one is kept.
    fn at(&self, bytes: usize) -> Self {
        Self { address: self.address + bytes as u64, keep: None }
    }
}

impl F32 {
    pub(crate) fn address(&self) -> u64 {
        self.piece.address
    }

    /// The address of element `index`.
    pub(crate) fn at(&self, index: usize) -> u64 {
        debug_assert!(index <= self.len, "in the buffer");
        self.address() + 4 * index as u64
    }
}

impl Arena {
    /// An arena that only counts.
    pub(crate) fn measuring(gpu: &Arc<Gpu>) -> Self {
        Self { gpu: gpu.clone(), slab: None, used: 0, amaxes: None }
    }

    /// Of the GPU.
    pub(crate) fn capability(&self) -> (i32, i32) {
        self.gpu.capability
    }

    /// An arena of `bytes` zeroed bytes of device memory.
    pub(crate) fn allocated(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self> {
        let (free, total) = gpu.memory().unwrap_or((usize::MAX, usize::MAX));
        let too_much = |limit: String| Error::OutOfMemory {
            what: "the planned arena",
            needed: bytes as u64,
            limit,
        };
        if bytes > free {
            return Err(too_much(format!(
                "{} has {free} of {total} bytes free; use a smaller batch or model",
                gpu.name
            )));
        }
        let base = gpu.scope(|| {
            let _alone = capture::without_captures();
            let mut base = 0;
            // SAFETY: writes one address; freed with the last buffer.
            let result = unsafe { sys::cuMemAlloc_v2(&mut base, bytes.max(1)) };
            if result != CUresult::CUDA_SUCCESS {
                let reason = text(result);
                return Err(too_much(format!(
                    "which {} refuses ({reason}); use a smaller batch or model",
                    gpu.name
                )));
            }
            Ok(base)
        })?;
        let arena = Self {
            gpu: gpu.clone(),
            slab: Some(Arc::new(Slab {
                gpu: gpu.clone(),
                base,
                bytes,
                _counted: Counted::new(&gpu.supply, Kind::Device, bytes),
            })),
            used: 0,
            amaxes: None,
        };
        gpu.scope(|| {
            // SAFETY: the allocation has `bytes` bytes.
            let result = unsafe { sys::cuMemsetD8Async(base, 0, bytes, gpu.stream()) };
            gpu.note("clearing memory", result);
        });
        Ok(arena)
    }

    /// Bytes handed out so far.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// The next `bytes` bytes (address 0 where the arena only measures).
    ///
    /// # Panics
    /// If the arena is smaller than what was measured, which would be a bug of the caller.
    pub(crate) fn bytes(&mut self, bytes: usize) -> Piece {
        let start = self.used;
        self.used += bytes.next_multiple_of(ALIGN);
        let address = self.slab.as_ref().map_or(0, |slab| {
            assert!(self.used <= slab.bytes, "an arena is cut as it was measured");
            slab.base + start as u64
        });
        Piece { address, keep: self.slab.clone() }
    }

    pub(crate) fn f32(&mut self, len: usize) -> F32 {
        F32 { piece: self.bytes(len * 4), len }
    }

    pub(crate) fn tensor(&mut self, len: usize, precision: Precision) -> Tensor {
        let amaxes = self.amaxes.take().unwrap_or_else(|| {
            let words = self.bytes(4 * Amaxes::COUNT as usize);
            Arc::new(Amaxes { words, taken: AtomicU64::new(0) })
        });
        self.amaxes = Some(amaxes.clone());
        let piece = self.bytes(len * precision.size());
        Tensor { piece, len, precision, amaxes, noted: None }
    }

    pub(crate) fn weights(&mut self, len: usize, count: usize, master: Master) -> Weights {
        let masters = match master {
            Master::F32 => Masters::F32(self.bytes(len * 4)),
            Master::Split => Masters::Low(self.bytes(len * 2)),
        };
        Weights { masters, copy: self.bytes(len * 2), amax: self.bytes(count * 4) }
    }

    /// Pinned host memory of `len` words, none where the arena only measures.
    pub(crate) fn upload(&self, len: usize) -> Upload {
        Upload::new(&self.gpu, if self.slab.is_some() { len } else { 0 })
    }

    /// An empty vector with room for `len` elements, for none where the arena only measures.
    pub(crate) fn on_host<T>(&self, what: &'static str, len: usize) -> Result<Vec<T>> {
        let mut vec = Vec::new();
        reserve(&mut vec, what, if self.slab.is_some() { len } else { 0 })?;
        Ok(vec)
    }
}

/// Pinned host memory from which words go to the device while the host does something else.
pub(crate) struct Upload {
    gpu: Arc<Gpu>,
    /// Written from the start on: `new` fills it.
    words: *mut u32,
    len: usize,
    /// When the last copy has been read.
    sent: sys::CUevent,
}

// SAFETY: the memory is plain and owned. `send` alone writes it, through `&mut self`; `sent` reads
// it, and no two threads share an upload, which is not `Sync`.
unsafe impl Send for Upload {}

impl Upload {
    fn new(gpu: &Arc<Gpu>, len: usize) -> Self {
        let mut upload = Self {
            gpu: gpu.clone(),
            words: std::ptr::null_mut(),
            len: 0,
            sent: std::ptr::null_mut(),
        };
        if len == 0 {
            return upload;
        }
        gpu.scope(|| {
            let _alone = capture::without_captures();
            let mut memory: *mut c_void = std::ptr::null_mut();
            // SAFETY: writes a pointer, which is given back in `drop`.
            let result = unsafe { sys::cuMemHostAlloc(&mut memory, len * 4, 0) };
            gpu.note("allocating pinned memory", result);
            if result == CUresult::CUDA_SUCCESS {
                // SAFETY: room for `len` words, aligned to a page, of ours alone. CUDA does not say
                // what is in them, so they are written before anything takes them for numbers.
                let words = unsafe {
                    std::slice::from_raw_parts_mut(memory.cast::<MaybeUninit<u32>>(), len)
                };
                words.fill(MaybeUninit::zeroed());
                (upload.words, upload.len) = (memory.cast(), len);
            }
            let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
            // SAFETY: writes a handle, which is given back in `drop`.
            gpu.note("making an event", unsafe { sys::cuEventCreate(&mut upload.sent, flags) });
        });
        upload
    }

    /// Lets `fill` write the first `len` words once the copy before this one has been read, then
    /// starts copying them to `to`.
    pub(crate) fn send(&mut self, to: u64, len: usize, fill: impl FnOnce(&mut [u32])) {
        if len > self.len {
            self.gpu.fail(format!("{len} words do not fit an upload of {}", self.len));
            return;
        }
        // SAFETY: the event is ours.
        let waited = unsafe { sys::cuEventSynchronize(self.sent) };
        self.gpu.note("an upload", waited);
        if waited != CUresult::CUDA_SUCCESS {
            // The copy before may still be read.
            return;
        }
        // SAFETY: the memory has `len` words, which `new` has written and which no copy reads any
        // more after the wait; the buffer at `to` is as long.
        unsafe {
            fill(std::slice::from_raw_parts_mut(self.words, len));
            let from = self.words.cast();
            let result = sys::cuMemcpyHtoDAsync_v2(to, from, len * 4, self.gpu.stream());
            self.gpu.note("an upload", result);
            self.gpu.note("an upload", sys::cuEventRecord(self.sent, self.gpu.stream()));
        }
    }

    /// What was sent last.
    pub(crate) fn sent(&self) -> &[u32] {
        if self.words.is_null() {
            return &[];
        }
        // SAFETY: `len` words of ours, which `new` has written, and `send` alone writes again.
        unsafe { std::slice::from_raw_parts(self.words, self.len) }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if (self.words.is_null() && self.sent.is_null()) || self.gpu.is_stuck() {
            return;
        }
        self.gpu.scope(|| {
            let _alone = capture::without_captures();
            // SAFETY: ours, where they could be made; the wait ends the last copy.
            unsafe {
                let _ = sys::cuStreamSynchronize(self.gpu.stream());
                if !self.sent.is_null() {
                    let _ = sys::cuEventDestroy_v2(self.sent);
                }
                if !self.words.is_null() {
                    let _ = sys::cuMemFreeHost(self.words.cast());
                }
            }
        });
    }
}

/// Memory of somebody else on the host, which copies reach without a detour as long as this lives.
pub(crate) struct Pinned {
    gpu: Arc<Gpu>,
    memory: *mut c_void,
}

// SAFETY: the pointer is handed to the driver alone, which any thread may ask.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// None where the driver refuses, as it does beyond a limit of locked memory.
    ///
    /// # Safety
    /// So many bytes are there, and stay there as long as the result.
    pub(crate) unsafe fn new(gpu: &Arc<Gpu>, memory: *mut c_void, bytes: usize) -> Option<Self> {
        if gpu.is_stuck() {
            return None;
        }
        let _alone = capture::without_captures();
        let result = gpu.scope(|| {
            // SAFETY: as promised by the caller.
            unsafe { sys::cuMemHostRegister_v2(memory, bytes, sys::CU_MEMHOSTREGISTER_PORTABLE) }
        });
        (result == CUresult::CUDA_SUCCESS).then(|| Self { gpu: gpu.clone(), memory })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.is_stuck() {
            return;
        }
        let _alone = capture::without_captures();
        self.gpu.scope(|| {
            // SAFETY: registered in `new`; the wait ends the last copy.
            unsafe {
                let _ = sys::cuStreamSynchronize(self.gpu.stream());
                let _ = sys::cuMemHostUnregister(self.memory);
            }
        });
    }
}
