//! Memory of the CPU: everything is a slice of an arena, in f32.

use std::sync::Arc;

use rayon::prelude::*;

use super::{Arena, Buffer, Cpu, JOB_ELEMENTS, Workspace, attend, head, linear, lora, merge};
use crate::Result;
use crate::backend::block::Supply;
use crate::backend::{FlatGradients, GradientPlace, Memory, Precision, Slot, WorkspaceShape};
use crate::formats::{self, Draw};
use crate::optim::Master;

impl Memory for Cpu {
    type Arena = Arena;
    type Tensor = Buffer<f32>;
    type F32 = Buffer<f32>;
    type Bytes = Buffer<u8>;
    type Weights = Buffer<f32>;
    type Param<'a> = &'a [f32];
    type Gradient<'a> = &'a mut [f32];
    type Tokens = Buffer<u32>;
    type Workspace = Workspace;

    /// A cache line.
    const ALIGN: usize = 16;
    const HAS_COPIES: bool = false;

    fn supply(&self) -> &Arc<Supply> {
        &self.supply
    }

    fn arena(&self, bytes: Option<usize>) -> Result<Arena> {
        bytes.map_or_else(|| Ok(Arena::measuring()), |bytes| Arena::supplied(&self.supply, bytes))
    }

    fn arena_used(&self, arena: &Arena) -> usize {
        arena.used()
    }

    // NOTE: f32 whatever the precision asked for: GEMMs round their operands as they pack them.
    fn tensor(&self, arena: &mut Arena, len: usize, _: Precision) -> Buffer<f32> {
        arena.alloc(len)
    }

    fn f32(&self, arena: &mut Arena, len: usize) -> Buffer<f32> {
        arena.alloc(len)
    }

    fn bytes(&self, arena: &mut Arena, len: usize) -> Buffer<u8> {
        arena.alloc(len)
    }

    fn weights(&self, arena: &mut Arena, len: usize, _: usize, _: Master) -> Buffer<f32> {
        arena.alloc(len)
    }

    fn keep_weights_as(&self, _: &mut Buffer<f32>, _: usize, _: &[Slot], _: Master) -> Result<()> {
        Ok(())
    }

    fn tokens(&self, arena: &mut Arena, len: usize, _: bool) -> Result<Buffer<u32>> {
        Ok(arena.alloc(len))
    }

    fn workspace(&self, arena: &mut Arena, shape: &WorkspaceShape<'_>) -> Workspace {
        let size = linear::scratch(self.isa(), shape)
            .max(lora::scratch(self.isa(), shape))
            .max(attend::scratch(self.isa(), shape.attention, shape.backward))
            .max(head::scratch(self.isa(), shape.head, shape.backward))
            .max(merge::scratch(shape.merge));
        Workspace::of_size(arena, size, self.threads())
    }

    fn param<'a>(&self, weights: &'a Buffer<f32>, slot: Slot) -> &'a [f32] {
        &weights[slot.range()]
    }

    fn gradients<'a, const N: usize>(
        &self,
        all: &'a mut Buffer<u8>,
        places: [GradientPlace; N],
    ) -> [&'a mut [f32]; N] {
        let all: &mut [f32] = bytemuck::cast_slice_mut(all);
        let range = |place: GradientPlace| place.start / 4..place.start / 4 + place.len;
        all.get_disjoint_mut(places.map(range)).expect("places are apart and in the buffer")
    }

    fn write_tokens(&self, to: &mut Buffer<u32>, len: usize, fill: impl FnOnce(&mut [u32])) {
        fill(&mut to[..len]);
    }

    fn write_f32(&self, to: &mut Buffer<f32>, at: usize, from: &[f32]) -> Result<()> {
        to[at..][..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn read_f32(&self, from: &Buffer<f32>, at: usize, to: &mut [f32]) -> Result<()> {
        to.copy_from_slice(&from[at..][..to.len()]);
        Ok(())
    }

    fn read_activations(&self, from: &Buffer<f32>, at: usize, to: &mut [f32]) -> Result<()> {
        self.read_f32(from, at, to)
    }

    fn write_bytes(&self, to: &mut Buffer<u8>, at: usize, from: &[u8]) -> Result<()> {
        to[at..][..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn read_bytes(&self, from: &Buffer<u8>, at: usize, to: &mut [u8]) -> Result<()> {
        to.copy_from_slice(&from[at..][..to.len()]);
        Ok(())
    }

    fn write_param(&self, to: &mut Buffer<f32>, slot: Slot, from: &[f32]) -> Result<()> {
        to[slot.range()].copy_from_slice(from);
        Ok(())
    }

    fn draw_param(&self, to: &mut Buffer<f32>, slot: Slot, std: f32, draw: &Draw) -> Result<()> {
        self.install(|| {
            to[slot.range()].par_chunks_mut(JOB_ELEMENTS).enumerate().for_each(|(job, part)| {
                formats::fill_normal(part, std, draw, (job * JOB_ELEMENTS / 2) as u32);
            });
        });
        Ok(())
    }

    fn read_param(&self, from: &Buffer<f32>, slot: Slot, to: &mut [f32]) -> Result<()> {
        to.copy_from_slice(&from[slot.range()]);
        Ok(())
    }

    fn put_aside(&self, from: &Buffer<f32>, slot: Slot, to: &mut Buffer<f32>) {
        to[slot.range()].copy_from_slice(&from[slot.range()]);
    }

    fn put_back(&self, from: &Buffer<f32>, slot: Slot, to: &mut Buffer<f32>) {
        to[slot.range()].copy_from_slice(&from[slot.range()]);
    }

    fn copy_bytes(&self, from: &Buffer<u8>, len: usize, to: &mut Buffer<u8>) {
        to[..len].copy_from_slice(&from[..len]);
    }

    fn zero_tensor(&self, buffer: &mut Buffer<f32>) {
        self.zero(buffer);
    }

    fn zero_gradient(&self, gradient: &mut [f32]) {
        self.zero(gradient);
    }
}

/// The gradients of a parameter, by its number: nothing of one that is not trained.
pub(super) fn gradients_of(gradients: &FlatGradients<Cpu>, index: usize) -> &[f32] {
    let place = gradients.places[index];
    bytemuck::cast_slice(&gradients.bytes[place.start..][..place.bytes()])
}
