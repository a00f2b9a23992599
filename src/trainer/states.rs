//! What an optimizer keeps of weights, as checkpoints hold it: numbers, or codes and their scales.
//!
//! Numbers and codes are in the order of the weights in the file, like everything else there; scales
//! are those of groups of neighbours in memory, so in the order of memory.

use super::source::Source;
use crate::Result;
use crate::backend::{Backend, Place, StateLayout};
use crate::checkpoint::{CODES, Dtype, SCALES, Scratch, StateValues, TensorRead, decode};
use crate::gpt::{ParamSpec, ParamTable, TensorInfo};
use crate::optim::moments::{
    self, E4m3, Element, F16, First, Float, GROUP, Second, inverse, tensor_scale,
};
use crate::optim::spam::STATISTICS;
use crate::optim::{Optimizer, State};
use crate::reserve::{collect, reserve, reuse, text};

/// The weights that a state is kept of.
pub(super) struct Owners {
    pub(super) tensors: Vec<TensorInfo>,
    /// Which parameter each of them is.
    pub(super) parameters: Vec<usize>,
}

impl Owners {
    /// Of these weights.
    pub(super) fn of(weights: &[TensorInfo], layout: &StateLayout) -> Result<Self> {
        let has = |index: &usize| layout.places[*index].len > 0;
        let parameters = (0..weights.len()).filter(has);
        let tensors = parameters.clone().map(|index| {
            let TensorInfo { name, shape } = &weights[index];
            let shape = collect(WHAT, shape.iter().map(|size| Ok(*size)))?;
            Ok(TensorInfo { name: text(WHAT, format_args!("{name}"))?, shape })
        });
        let tensors = collect(WHAT, tensors)?;
        Ok(Self { tensors, parameters: collect(WHAT, parameters.map(Ok))? })
    }
}

/// The tensors that files have of a state.
pub(super) struct Stored {
    tensors: Vec<TensorInfo>,
    /// Parameter and part of each of them.
    parts: Vec<(usize, Part)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Part {
    Numbers,
    Codes,
    Scales,
}

const WHAT: &str = "the names of the optimizer's states";

impl Stored {
    /// Of these weights.
    pub(super) fn of(weights: &[TensorInfo], layout: &StateLayout) -> Result<Self> {
        let all = weights.iter().zip(&layout.places).enumerate();
        let all = all.filter(|(_, (_, place))| place.len > 0);
        let parts = all.flat_map(|(index, (weight, place))| {
            let parts: &[Part] = match place.element {
                Element::Int8 | Element::E4m3 | Element::F16 => &[Part::Codes, Part::Scales],
                Element::F32 | Element::Bf16 => &[Part::Numbers],
            };
            parts.iter().map(move |part| (index, *part, weight, place))
        });
        let tensors = parts.clone().map(|(_, part, weight, place)| {
            let (behind, shape) = match part {
                Part::Numbers => ("", &weight.shape[..]),
                Part::Codes => (CODES, &weight.shape[..]),
                Part::Scales => (SCALES, &[place.groups()][..]),
            };
            let name = text(WHAT, format_args!("{}{behind}", weight.name))?;
            let shape = collect(WHAT, shape.iter().map(|size| Ok(*size)))?;
            Ok(TensorInfo { name, shape })
        });
        Ok(Self {
            tensors: collect(WHAT, tensors)?,
            parts: collect(WHAT, parts.map(|(index, part, ..)| Ok((index, part))))?,
        })
    }
}

/// A state as a checkpoint takes it.
pub(super) struct Exported<'a> {
    pub(super) source: &'a dyn Source,
    pub(super) table: &'a ParamTable,
    pub(super) stored: Stored,
    pub(super) layout: &'a StateLayout,
    /// Which of the optimizer's states it is.
    pub(super) number: usize,
    pub(super) of: &'static State,
}

impl TensorRead for Exported<'_> {
    fn tensors(&self) -> &[TensorInfo] {
        &self.stored.tensors
    }

    fn dtype(&self, index: usize) -> Dtype {
        let (parameter, part) = self.stored.parts[index];
        match (part, self.layout.places[parameter].element) {
            (Part::Codes, Element::E4m3) => Dtype::F8_E4M3,
            (Part::Codes, Element::F16) => Dtype::F16,
            (Part::Codes, _) if self.of.is_signed => Dtype::I8,
            (Part::Codes, _) => Dtype::U8,
            (Part::Numbers, Element::Bf16) => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    fn read(&self, index: usize, out: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        let (parameter, part) = self.stored.parts[index];
        let (place, dtype) = (&self.layout.places[parameter], self.dtype(index));
        let stored = |at, out: &mut [u8]| self.source.state(self.number, at, out);
        if part == Part::Scales {
            return stored(place.scales, bytemuck::cast_slice_mut(out));
        }
        let Scratch { numbers, bytes, .. } = scratch;
        self.table.specs()[parameter].export(out, numbers, |ours| {
            if dtype == Dtype::F32 {
                return stored(place.start, bytemuck::cast_slice_mut(ours));
            }
            let bytes = reuse(bytes, "a tensor", place.bytes())?;
            stored(place.start, bytes)?;
            decode(dtype, bytes, ours);
            Ok(())
        })
    }

    fn codes<'s>(&self, index: usize, scratch: &'s mut Scratch) -> Option<Result<&'s [u8]>> {
        let (parameter, part) = self.stored.parts[index];
        let place = &self.layout.places[parameter];
        if part != Part::Codes || place.element != Element::Int8 {
            return None;
        }
        let Scratch { bytes, turned, .. } = scratch;
        let read = |ours: &mut [u8]| self.source.state(self.number, place.start, ours);
        let spec = &self.table.specs()[parameter];
        let found = reuse(turned, "a tensor", place.len)
            .and_then(|out| spec.export(out, bytes, read).map(|()| &*out));
        Some(found)
    }
}

/// What normalizing gradients keeps of each parameter.
pub(super) const OF_GRADIENTS: State =
    State { name: "statistics", what: "gradient statistic", is_signed: false };

/// As checkpoints hold it: a tensor of [`STATISTICS`] numbers a parameter, of which there are none
/// where gradients are not normalized.
pub(super) fn statistics(weights: &[TensorInfo], optimizer: &Optimizer) -> Result<Vec<TensorInfo>> {
    let weights = if optimizer.kind.normalizes() { weights } else { &[] };
    let tensors = weights.iter().map(|weight| {
        let name = text(WHAT, format_args!("{}", weight.name))?;
        Ok(TensorInfo { name, shape: collect(WHAT, [Ok(STATISTICS)])? })
    });
    collect(WHAT, tensors)
}

/// Statistics as a checkpoint takes them.
pub(super) struct ExportedStatistics<'a> {
    pub(super) source: &'a dyn Source,
    pub(super) tensors: &'a [TensorInfo],
}

impl TensorRead for ExportedStatistics<'_> {
    fn tensors(&self) -> &[TensorInfo] {
        self.tensors
    }

    fn read(&self, index: usize, out: &mut [f32], _: &mut Scratch) -> Result<()> {
        self.source.statistics(STATISTICS * index, out)
    }
}

/// Stores what a checkpoint holds of a parameter's state, in whatever that is kept here.
pub(super) fn load<B: Backend>(
    backend: &B,
    (state, place, of): (&mut B::Bytes, &Place, &State),
    spec: &ParamSpec,
    values: StateValues<'_>,
    scratch: &mut Scratch,
) -> Result<()> {
    let Scratch { numbers, bytes, turned } = scratch;
    let ours = match values {
        StateValues::Numbers(of_file) => spec.import(of_file, numbers)?,
        StateValues::Scaled { numbers: of_file, scale } => {
            let ours = spec.import(of_file, numbers)?;
            if !place.element.has_one_scale() {
                ours.iter_mut().for_each(|v| *v *= scale);
            }
            ours
        }
        StateValues::Codes { codes, scales } => {
            let codes = spec.import(codes, turned)?;
            if place.element == Element::Int8 {
                backend.write_bytes(state, place.scales, bytemuck::cast_slice(scales))?;
                return backend.write_bytes(state, place.start, codes);
            }
            let ours = reuse(numbers, "a copy of a tensor", codes.len())?;
            let decode = match of.is_signed {
                true => moments::decode_group::<First>,
                false => moments::decode_group::<Second>,
            };
            let groups = codes.chunks(GROUP).zip(scales).zip(ours.chunks_mut(GROUP));
            groups.for_each(|((codes, scale), values)| decode(codes, *scale, values));
            ours
        }
    };
    let mut scales = Vec::new();
    bytes.clear();
    reserve(bytes, "a tensor", place.bytes())?;
    reserve(&mut scales, "the scales of a tensor", place.groups())?;
    match place.element {
        Element::F32 => {
            return backend.write_bytes(state, place.start, bytemuck::cast_slice(ours));
        }
        Element::Bf16 => {
            bytes.extend(ours.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()));
        }
        Element::Int8 => {
            bytes.resize(place.bytes(), 0);
            let encode = match of.is_signed {
                true => moments::encode_group::<First>,
                false => moments::encode_group::<Second>,
            };
            let groups = ours.chunks(GROUP).zip(bytes.chunks_mut(GROUP));
            scales.extend(groups.map(|(values, codes)| encode(values, codes)));
        }
        Element::E4m3 => {
            let (scale, inverse) = scale_of::<E4m3>(values, ours);
            scales.push(scale);
            bytes.extend(ours.iter().map(|v| E4m3::encode(*v, inverse)));
        }
        Element::F16 => {
            let (scale, inverse) = scale_of::<F16>(values, ours);
            scales.push(scale);
            bytes.extend(ours.iter().flat_map(|v| F16::encode(*v, inverse).to_le_bytes()));
        }
    }
    if !scales.is_empty() {
        backend.write_bytes(state, place.scales, bytemuck::cast_slice(&scales))?;
    }
    backend.write_bytes(state, place.start, bytes)
}

/// The scale of a tensor, and what `ours` has to be multiplied by to be stored: a file's, or the one
/// of these numbers.
fn scale_of<F: Float>(values: StateValues<'_>, ours: &[f32]) -> (f32, f32) {
    if let StateValues::Scaled { scale, .. } = values {
        return (scale, 1.0);
    }
    let scale = tensor_scale::<F>(0.0, ours.iter().fold(0.0, |most, v| v.abs().max(most)));
    (scale, inverse(scale))
}
