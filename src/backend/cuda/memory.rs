//! Buffers of a GPU's arena, and copies to and from the host.
//!
//! Copies that the host reads wait for all that was queued before them; tokens go out through
//! pinned memory instead, while the GPU still works.

use std::ffi::c_void;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::sys::{self, CUresult, CUstream};

use super::device::launch;
use super::device::memory::{Arena, F32, Gradient, Masters, Param, Piece, Pinned, Tensor, Weights};
use super::embed::Tokens;
use super::quantize::random;
use super::{Cuda, Workspace, optimize};
use crate::Result;
use crate::backend::block::Supply;
use crate::backend::{GradientPlace, Memory, Precision, Slot, WorkspaceShape};
use crate::formats::Draw;
use crate::optim::{Master, master};
use crate::reserve::{reserve, zeros};

impl Memory for Cuda {
    type Arena = Arena;
    type Tensor = Tensor;
    type F32 = F32;
    type Bytes = Piece;
    type Weights = Weights;
    type Param<'a> = Param<'a>;
    type Gradient<'a> = Gradient<'a>;
    type Tokens = Tokens;
    type Workspace = Workspace;

    /// What cuBLASLt likes best of the bf16 copies: 256 bytes.
    const ALIGN: usize = 128;
    const HAS_COPIES: bool = true;

    fn supply(&self) -> &Arc<Supply> {
        &self.gpu.supply
    }

    fn arena(&self, bytes: Option<usize>) -> Result<Arena> {
        match bytes {
            None => Ok(Arena::measuring(&self.gpu)),
            Some(bytes) => Arena::allocated(&self.gpu, bytes),
        }
    }

    fn arena_used(&self, arena: &Arena) -> usize {
        arena.used()
    }

    fn tensor(&self, arena: &mut Arena, len: usize, precision: Precision) -> Tensor {
        arena.tensor(len, precision)
    }

    fn f32(&self, arena: &mut Arena, len: usize) -> F32 {
        arena.f32(len)
    }

    fn bytes(&self, arena: &mut Arena, len: usize) -> Piece {
        arena.bytes(len)
    }

    fn weights(&self, arena: &mut Arena, len: usize, count: usize, master: Master) -> Weights {
        arena.weights(len, count, master)
    }

    fn keep_weights_as(
        &self,
        weights: &mut Weights,
        len: usize,
        slots: &[Slot],
        master: Master,
    ) -> Result<()> {
        self.settle()?;
        let mut measuring = Arena::measuring(&self.gpu);
        measuring.weights(len, slots.len(), master);
        let mut arena = Arena::allocated(&self.gpu, measuring.used())?;
        let other = arena.weights(len, slots.len(), master);
        self.gpu.scope(|| {
            for slot in slots {
                optimize::keep_as(self, &weights.param(*slot), &other.param(*slot));
            }
            self.gpu.synchronize()
        })?;
        *weights = other;
        Ok(())
    }

    fn tokens(&self, arena: &mut Arena, len: usize, have_gradients: bool) -> Result<Tokens> {
        Tokens::new(arena, len, have_gradients)
    }

    fn workspace(&self, arena: &mut Arena, shape: &WorkspaceShape) -> Workspace {
        Workspace::new(arena, shape)
    }

    fn param<'a>(&self, weights: &'a Weights, slot: Slot) -> Param<'a> {
        weights.param(slot)
    }

    fn gradients<'a, const N: usize>(
        &self,
        all: &'a mut Piece,
        places: [GradientPlace; N],
    ) -> [Gradient<'a>; N] {
        places.map(|place| Gradient::at(all, place))
    }

    fn write_tokens(&self, to: &mut Tokens, len: usize, fill: impl FnOnce(&mut [u32])) {
        to.write(len, fill);
    }

    fn write_f32(&self, to: &mut F32, at: usize, from: &[f32]) -> Result<()> {
        self.write(to.at(at), from)
    }

    fn read_f32(&self, from: &F32, at: usize, to: &mut [f32]) -> Result<()> {
        self.read(from.at(at), to)
    }

    fn read_activations(&self, from: &Tensor, at: usize, to: &mut [f32]) -> Result<()> {
        if from.precision == Precision::F32 {
            return self.read(from.at(at), to);
        }
        let mut numbers: Vec<u16> = zeros("a tensor", to.len())?;
        self.read(from.at(at), &mut numbers)?;
        let numbers = numbers.into_iter().map(|bits| half::bf16::from_bits(bits).to_f32());
        to.iter_mut().zip(numbers).for_each(|(to, number)| *to = number);
        Ok(())
    }

    fn write_bytes(&self, to: &mut Piece, at: usize, from: &[u8]) -> Result<()> {
        self.write(to.address + at as u64, from)
    }

    fn read_bytes(&self, from: &Piece, at: usize, to: &mut [u8]) -> Result<()> {
        self.read(from.address + at as u64, to)
    }

    fn write_param(&self, to: &mut Weights, slot: Slot, from: &[f32]) -> Result<()> {
        let param = to.param(slot);
        let Masters::Low(low) = param.masters else {
            self.write(param.master(), from)?;
            return self.gpu.scope(|| {
                optimize::copy_to_bf16(self, &param);
                self.gpu.synchronize()
            });
        };
        self.settle()?;
        let (mut copies, mut lows) = (Vec::new(), Vec::new());
        reserve(&mut copies, "a tensor", from.len())?;
        reserve(&mut lows, "a tensor", from.len())?;
        for [copy, low] in from.iter().map(|value| master::split(*value)) {
            copies.push(copy);
            lows.push(low);
        }
        let largest = copies.iter().map(|copy| u32::from(*copy & 0x7fff) << 16).max();
        self.write(low, &lows)?;
        self.write(param.copy.address, &copies)?;
        self.write(param.amax.address, &[largest.unwrap_or(0)])
    }

    fn draw_param(&self, to: &mut Weights, slot: Slot, std: f32, draw: &Draw) -> Result<()> {
        let param = to.param(slot);
        self.gpu.scope(|| {
            let (to, len) = (param.master(), param.len);
            // A thread makes two values.
            launch!(self.gpu, "fill_normal", [len.div_ceil(512), 1, 1], 256, 0;
                to, len as u64, std, random::Draw::from(*draw));
            optimize::copy_to_bf16(self, &param);
            self.gpu.synchronize()
        })
    }

    fn read_param(&self, from: &Weights, slot: Slot, to: &mut [f32]) -> Result<()> {
        let param = from.param(slot);
        if let Masters::F32(_) = param.masters {
            return self.read(param.master(), to);
        }
        let (mut copies, mut lows) = (zeros("a tensor", to.len())?, zeros("a tensor", to.len())?);
        self.read_halves(from, slot, &mut copies, &mut lows)?;
        let joined = copies.into_iter().zip(lows).map(|(copy, low)| master::join([copy, low]));
        to.iter_mut().zip(joined).for_each(|(to, joined)| *to = joined);
        Ok(())
    }

    fn read_halves(
        &self,
        from: &Weights,
        slot: Slot,
        copies: &mut [u16],
        lows: &mut [u16],
    ) -> Result<()> {
        self.settle()?;
        let param = from.param(slot);
        let Masters::Low(low) = param.masters else { unreachable!("master values are split") };
        self.read(param.copy.address, copies)?;
        self.read(low, lows)
    }

    unsafe fn pin(&self, memory: *mut c_void, bytes: usize) -> Option<Box<dyn Send + Sync>> {
        // SAFETY: as promised by the caller.
        let pinned = unsafe { Pinned::new(&self.gpu, memory, bytes) };
        pinned.map(|pinned| Box::new(pinned) as Box<dyn Send + Sync>)
    }

    fn put_aside(&self, from: &Weights, slot: Slot, to: &mut F32) {
        self.copy(from.param(slot).master(), 4 * slot.len, to.at(slot.start));
    }

    fn put_back(&self, from: &F32, slot: Slot, to: &mut Weights) {
        let param = to.param(slot);
        self.copy(from.at(slot.start), 4 * slot.len, param.master());
        optimize::copy_to_bf16(self, &param);
    }

    fn copy_bytes(&self, from: &Piece, len: usize, to: &mut Piece) {
        self.copy(from.address, len, to.address);
    }

    fn zero_tensor(&self, buffer: &mut Tensor) {
        let bytes = buffer.bytes();
        self.clear(buffer.write().address, bytes);
    }

    fn zero_gradient(&self, gradient: Gradient<'_>) {
        self.clear(gradient.address(), gradient.place.bytes());
    }
}

impl Cuda {
    /// Bytes of the GPU's memory that are free, and those that it has.
    pub(crate) fn memory(&self) -> Option<(u64, u64)> {
        self.gpu.memory().map(|(free, total)| (free as u64, total as u64))
    }

    /// Bytes from `address` to the end of its allocation, if a GPU has it.
    pub(crate) fn room_at(&self, address: u64) -> Option<usize> {
        use sys::CUpointer_attribute as Attribute;
        let attribute = |which, value: *mut u64| {
            // SAFETY: each of these attributes has at most 8 bytes.
            let result = unsafe { sys::cuPointerGetAttribute(value.cast(), which, address) };
            result == CUresult::CUDA_SUCCESS
        };
        let (mut kind, mut start, mut size) = (0, 0, 0);
        self.gpu.scope(|| {
            // The driver does not know ordinary host memory, and refuses.
            let known = attribute(Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, &mut kind)
                && kind == sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u64
                && attribute(Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, &mut start)
                && attribute(Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE, &mut size);
            known.then(|| (start + size).saturating_sub(address) as usize)
        })
    }

    /// Waits for everything before it, then copies.
    pub(crate) fn read<T: Pod>(&self, from: u64, to: &mut [T]) -> Result<()> {
        let (bytes, to) = (size_of_val(to), to.as_mut_ptr().cast());
        // SAFETY: the buffer at `from` is at least as long as `to`, which outlives the wait.
        self.wait_for("reading from the GPU", |stream| unsafe {
            sys::cuMemcpyDtoHAsync_v2(to, from, bytes, stream)
        })
    }

    /// Copies after everything before it, and waits.
    pub(crate) fn write<T: Pod>(&self, to: u64, from: &[T]) -> Result<()> {
        let (bytes, from) = (size_of_val(from), from.as_ptr().cast());
        // SAFETY: the buffer at `to` is as long as `from`, which outlives the wait.
        self.wait_for("writing to the GPU", |stream| unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, from, bytes, stream)
        })
    }

    fn wait_for(&self, what: &str, start: impl FnOnce(CUstream) -> CUresult) -> Result<()> {
        self.gpu.scope(|| {
            self.gpu.note(what, start(self.gpu.stream()));
            self.gpu.synchronize()
        })
    }

    /// Copies within the GPU.
    pub(super) fn copy(&self, from: u64, bytes: usize, to: u64) {
        // SAFETY: both buffers have `bytes` bytes.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.gpu.stream()) };
        self.gpu.note("copying memory", result);
    }

    pub(super) fn clear(&self, address: u64, bytes: usize) {
        // SAFETY: the buffer at `address` has `bytes` bytes.
        let result = unsafe { sys::cuMemsetD8Async(address, 0, bytes, self.gpu.stream()) };
        self.gpu.note("clearing memory", result);
    }
}
