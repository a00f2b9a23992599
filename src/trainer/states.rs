//! What an optimizer keeps of weights, as checkpoints hold it: numbers, or codes and their scales.
//!
//! Numbers and codes are in the order of the weights in the file, like everything else there; scales
//! are those of groups of neighbours in memory, so in the order of memory.

use crate::Result;
use crate::backend::{Backend, Place, StateLayout};
use crate::checkpoint::{CODES, Dtype, SCALES, StateValues, TensorRead, decode};
use crate::gpt::{ParamSpec, TensorInfo};
use crate::model::OnDevice;
use crate::optim::moments::{self, Code, Element, First, GROUP, Second};
use crate::optim::spam::STATISTICS;
use crate::optim::{Optimizer, State};
use crate::reserve::{collect, reserve, text};

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
                Element::Int8 => &[Part::Codes, Part::Scales],
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
pub(super) struct Exported<'a, B: Backend> {
    pub(super) model: &'a OnDevice<B>,
    pub(super) stored: Stored,
    pub(super) layout: &'a StateLayout,
    pub(super) state: &'a B::Bytes,
    pub(super) of: &'static State,
}

impl<B: Backend> TensorRead for Exported<'_, B> {
    fn tensors(&self) -> &[TensorInfo] {
        &self.stored.tensors
    }

    fn dtype(&self, index: usize) -> Dtype {
        let (parameter, part) = self.stored.parts[index];
        match (part, self.layout.places[parameter].element) {
            (Part::Codes, _) if self.of.is_signed => Dtype::I8,
            (Part::Codes, _) => Dtype::U8,
            (Part::Numbers, Element::Bf16) => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    fn read(&self, index: usize, out: &mut [f32]) -> Result<()> {
        let (parameter, part) = self.stored.parts[index];
        let (place, backend) = (&self.layout.places[parameter], &*self.model.backend);
        let dtype = self.dtype(index);
        if part == Part::Scales {
            return backend.read_bytes(self.state, place.scales, bytemuck::cast_slice_mut(out));
        }
        if dtype == Dtype::F32 {
            backend.read_bytes(self.state, place.start, bytemuck::cast_slice_mut(out))?;
        } else {
            let mut bytes = Vec::new();
            reserve(&mut bytes, "a tensor", place.bytes())?;
            bytes.resize(place.bytes(), 0u8);
            backend.read_bytes(self.state, place.start, &mut bytes)?;
            decode(dtype, &bytes, out);
        }
        self.model.table.specs()[parameter].export(out, &mut Vec::new())
    }
}

/// What normalizing gradients keeps of each parameter.
pub(super) const OF_GRADIENTS: State =
    State { name: "statistics", what: "statistic of gradients", is_signed: false };

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
pub(super) struct ExportedStatistics<'a, B: Backend> {
    pub(super) backend: &'a B,
    pub(super) tensors: &'a [TensorInfo],
    pub(super) flat: &'a B::F32,
}

impl<B: Backend> TensorRead for ExportedStatistics<'_, B> {
    fn tensors(&self) -> &[TensorInfo] {
        self.tensors
    }

    fn read(&self, index: usize, out: &mut [f32]) -> Result<()> {
        self.backend.read_f32(self.flat, STATISTICS * index, out)
    }
}

/// Stores what a checkpoint holds of a parameter's state, in whatever that is kept here.
pub(super) fn load<B: Backend>(
    backend: &B,
    (state, place, of): (&mut B::Bytes, &Place, &State),
    spec: &ParamSpec,
    values: StateValues<'_>,
    ours: &mut Vec<f32>,
) -> Result<()> {
    let mut bytes = Vec::new();
    let scales = match values {
        StateValues::Numbers(numbers) => {
            spec.import(numbers, ours)?;
            None
        }
        StateValues::Codes { codes, scales } => {
            spec.import(codes, ours)?;
            Some(scales)
        }
    };
    reserve(&mut bytes, "a tensor", place.bytes())?;
    match (place.element, scales) {
        (Element::Int8, Some(scales)) => {
            bytes.extend(ours.iter().map(|code| *code as i32 as u8));
            backend.write_bytes(state, place.scales, bytemuck::cast_slice(scales))?;
        }
        (Element::Int8, None) => {
            bytes.resize(place.bytes(), 0);
            let mut scales = Vec::new();
            reserve(&mut scales, "the scales of a tensor", place.groups())?;
            let encode = if of.is_signed {
                moments::encode_group::<First>
            } else {
                moments::encode_group::<Second>
            };
            let groups = ours.chunks(GROUP).zip(bytes.chunks_mut(GROUP));
            scales.extend(groups.map(|(values, codes)| encode(values, codes)));
            backend.write_bytes(state, place.scales, bytemuck::cast_slice(&scales))?;
        }
        (element, scales) => {
            let decode = if of.is_signed { First::decode } else { Second::decode };
            for (values, scale) in ours.chunks_mut(GROUP).zip(scales.unwrap_or_default()) {
                values.iter_mut().for_each(|v| *v = decode(*v as i32 as u8, *scale));
            }
            match element {
                Element::Bf16 => {
                    bytes.extend(ours.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()))
                }
                _ => return backend.write_bytes(state, place.start, bytemuck::cast_slice(ours)),
            }
        }
    }
    backend.write_bytes(state, place.start, &bytes)
}
