//! The gradients of all parameters, in one buffer.

use std::ops::Range;

use super::{GradientPlace, Memory, Precision, Slot};
use crate::Result;
use crate::optim::Gradients;
use crate::reserve::{collect, reserve};

/// The gradients of all parameters, each in f32 or bf16.
pub struct FlatGradients<B: Memory> {
    pub(super) bytes: B::Bytes,
    /// Of the buffer.
    pub(super) len: usize,
    /// By a slot's number.
    pub(super) places: Vec<GradientPlace>,
}

impl<B: Memory> FlatGradients<B> {
    /// Of parameters whose gradients are kept in `kept`, where the device has anything but f32. Those
    /// without elements are not trained ([`Slot::untrained`]).
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn new(
        backend: &B,
        arena: &mut B::Arena,
        slots: &[Slot],
        kept: Gradients,
    ) -> Result<Self> {
        let (align, mut end) = (B::ALIGN * size_of::<f32>(), 0usize);
        let places = slots.iter().map(|slot| {
            let precision = match B::HAS_COPIES && kept.are_in_bf16(slot.kind) {
                false => Precision::F32,
                true => Precision::Bf16,
            };
            let place = GradientPlace { precision, start: end, len: slot.len };
            end = (end + place.bytes()).next_multiple_of(align);
            Ok(place)
        });
        let places = collect("a table of the gradients", places)?;
        Ok(Self { bytes: backend.bytes(arena, end), len: end, places })
    }

    /// Those of several parameters, no two of them the same; None of one that is not trained.
    pub(crate) fn of<const N: usize>(
        &mut self,
        backend: &B,
        slots: [Slot; N],
    ) -> [Option<B::Gradient<'_>>; N] {
        let places = slots.map(|slot| self.places[slot.index]);
        let mut gradients = backend.gradients(&mut self.bytes, places).into_iter();
        places.map(|place| gradients.next().filter(|_| place.len > 0))
    }

    /// Where those of a parameter begin.
    pub(crate) fn start(&self, slot: Slot) -> usize {
        self.places[slot.index].start
    }

    /// The bytes of those of some parameters in a row.
    pub(super) fn bytes_of(&self, of: &Range<usize>) -> Range<usize> {
        let places = &self.places[of.clone()];
        let start = places.first().map_or(0, |first| first.start);
        start..places.last().map_or(start, |last| last.start + last.bytes())
    }

    /// What lies behind parameters, as ranges of bytes, where that is any.
    pub(crate) fn tails(&self) -> impl Iterator<Item = Range<usize>> {
        let starts = self.places.iter().skip(1).map(|place| place.start).chain([self.len]);
        let ends = self.places.iter().map(|place| place.start + place.bytes());
        ends.zip(starts).map(|(end, next)| end..next).filter(|tail| !tail.is_empty())
    }

    /// Bytes of all, with what lies between parameters, which stays 0.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The buffer of all.
    pub(crate) fn all(&self) -> &B::Bytes {
        &self.bytes
    }

    /// The buffer of all, to be written.
    pub(crate) fn all_mut(&mut self) -> &mut B::Bytes {
        &mut self.bytes
    }

    /// Copies those of a parameter to the host, after all that was asked for before.
    pub(crate) fn read(&self, backend: &B, slot: Slot, to: &mut [f32]) -> Result<()> {
        let place = self.places[slot.index];
        if place.precision == Precision::F32 {
            return backend.read_bytes(&self.bytes, place.start, bytemuck::cast_slice_mut(to));
        }
        let mut numbers: Vec<u16> = Vec::new();
        reserve(&mut numbers, "a tensor", to.len())?;
        numbers.resize(to.len(), 0);
        backend.read_bytes(&self.bytes, place.start, bytemuck::cast_slice_mut(&mut numbers))?;
        to.iter_mut()
            .zip(numbers)
            .for_each(|(to, number)| *to = half::bf16::from_bits(number).to_f32());
        Ok(())
    }

    /// Overwrites those of a parameter, rounded to nearest, after all that was asked for before.
    pub(crate) fn write(&mut self, backend: &B, slot: Slot, from: &[f32]) -> Result<()> {
        let place = self.places[slot.index];
        if place.precision == Precision::F32 {
            return backend.write_bytes(&mut self.bytes, place.start, bytemuck::cast_slice(from));
        }
        let mut numbers: Vec<u16> = Vec::new();
        reserve(&mut numbers, "a tensor", from.len())?;
        numbers.extend(from.iter().map(|value| half::bf16::from_f32(*value).to_bits()));
        backend.write_bytes(&mut self.bytes, place.start, bytemuck::cast_slice(&numbers))
    }
}
