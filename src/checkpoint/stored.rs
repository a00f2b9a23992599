//! What saved weights are stored as, and the tensors that this makes of them.
//!
//! In MXFP4 the weight of a linear layer, or of a head of its own, is two tensors: its codes (F4,
//! two a byte, the first in the low half) under its name, of shape (outputs, inputs), and its scales
//! (F8_E8M0) as NAME.scales, of shape (outputs, blocks). Blocks run along the inputs, which are
//! filled up with 0 to whole ones. Codes and scales are those of
//! [`crate::formats::quantize_closest`], and what they stand for has the same codes and scales
//! again. All else is f32, the embedding too where it is the head: so a decoder in MXFP4 computes
//! with the same bits as one of the model that was saved.
//!
//! NOTE: not in Hugging Face's shape, (inputs, outputs). Blocks would not be neighbours; and a
//! program that knows nothing of the form fails for the shape, where it would only warn of weights
//! that are missing and begin with random ones.

use half::{bf16, f16};
use safetensors::tensor::Dtype;

use super::{SCALES, Scratch, TensorRead};
use crate::formats::{BLOCK, quantize_closest};
use crate::gpt::{HEAD, ParamSpec, TensorInfo};
use crate::optim::named;
use crate::reserve::{reserve, zeros};
use crate::{Error, Result};

/// What the weights of a saved model are stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StoredWeights {
    /// f32, as they are.
    #[default]
    F32,
    /// f16, to nearest. Numbers that round above 65504 are refused.
    F16,
    /// bf16, to nearest.
    Bf16,
    /// The linear layers and a head of its own in MXFP4, 4.25 bits a weight, as a decoder in MXFP4
    /// has them; all else in f32. Read by this library alone.
    Mxfp4,
}

impl StoredWeights {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Mxfp4];

    /// Its name: `f32`, `f16`, `bf16` or `mxfp4`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Mxfp4 => "mxfp4",
        }
    }

    /// What `config.json` calls the numbers of most tensors that transformers reads.
    pub(super) fn dtype_name(self) -> &'static str {
        match self {
            Self::F32 | Self::Mxfp4 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

named!(StoredWeights, "weights");

/// The shape of a linear layer's weight, and whether files have (inputs, outputs).
#[derive(Clone, Copy)]
pub(super) struct Linear {
    pub(super) outputs: usize,
    inputs: usize,
    is_turned: bool,
}

impl Linear {
    /// What `tensor` is the weight of, unless it is another kind of parameter.
    pub(super) fn of(tensor: &TensorInfo) -> Option<Self> {
        let [rows, cols] = tensor.shape[..] else { return None };
        if tensor.name == HEAD {
            return Some(Self { outputs: rows, inputs: cols, is_turned: false });
        }
        if tensor.name.starts_with("model.layers.") {
            return Some(Self { outputs: rows, inputs: cols, is_turned: false });
        }
        let is_in_block = tensor.name.starts_with("transformer.h.");
        is_in_block.then_some(Self { outputs: cols, inputs: rows, is_turned: true })
    }

    /// Blocks of an output.
    pub(super) fn blocks(&self) -> usize {
        self.inputs.div_ceil(BLOCK)
    }

    /// What codes and scales stand for, in the order of Hugging Face's files.
    pub(super) fn dequantized(
        &self,
        codes: &mut Vec<f32>,
        scales: &[f32],
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let padded = self.blocks() * BLOCK;
        for (block, scale) in codes.chunks_exact_mut(BLOCK).zip(scales) {
            block.iter_mut().for_each(|code| *code *= scale);
        }
        if padded > self.inputs {
            for row in 0..self.outputs {
                codes.copy_within(row * padded..row * padded + self.inputs, row * self.inputs);
            }
            codes.truncate(self.outputs * self.inputs);
        }
        if self.is_turned {
            out.clear();
            reserve(out, "a tensor", codes.len())?;
            out.resize(codes.len(), 0.0);
            ParamSpec::transpose(codes, out, self.outputs, self.inputs);
        } else {
            std::mem::swap(codes, out);
        }
        Ok(())
    }
}

/// What a tensor of a file has of a weight.
#[derive(Clone, Copy)]
enum Part {
    Numbers(Dtype),
    Codes(Linear),
    Scales(Linear),
}

/// Weights as they are stored.
pub(super) struct Stored<'a> {
    weights: &'a dyn TensorRead,
    tensors: Vec<TensorInfo>,
    /// Of each of `tensors`: the number of its weight, and what it has of it.
    parts: Vec<(usize, Part)>,
}

impl<'a> Stored<'a> {
    pub(super) fn new(weights: &'a dyn TensorRead, stored: StoredWeights) -> Self {
        let dtype = match stored {
            StoredWeights::F32 | StoredWeights::Mxfp4 => Dtype::F32,
            StoredWeights::F16 => Dtype::F16,
            StoredWeights::Bf16 => Dtype::BF16,
        };
        let (mut tensors, mut parts) = (Vec::new(), Vec::new());
        for (index, tensor) in weights.tensors().iter().enumerate() {
            let linear = Linear::of(tensor).filter(|_| stored == StoredWeights::Mxfp4);
            let Some(linear) = linear else {
                tensors.push(tensor.clone());
                parts.push((index, Part::Numbers(dtype)));
                continue;
            };
            let (name, blocks) = (tensor.name.clone(), linear.blocks());
            let scales = format!("{name}{SCALES}");
            let shape = vec![linear.outputs, blocks * BLOCK];
            tensors.push(TensorInfo { name, shape });
            tensors.push(TensorInfo { name: scales, shape: vec![linear.outputs, blocks] });
            parts.extend([(index, Part::Codes(linear)), (index, Part::Scales(linear))]);
        }
        Self { weights, tensors, parts }
    }

    /// The weight of a linear layer in blocks: `take` gets the number of each, scale and codes.
    fn quantize(
        &self,
        index: usize,
        linear: Linear,
        scratch: &mut Scratch,
        mut take: impl FnMut(usize, u8, [u8; BLOCK]),
    ) -> Result<()> {
        /// By the next one, codes stand for numbers that f32 does not have.
        const LARGEST: u8 = 252;
        let Linear { outputs, inputs, is_turned } = linear;
        let mut values = zeros("a tensor", outputs * inputs)?;
        self.weights.read(index, &mut values, scratch)?;
        if is_turned {
            let mut rows = zeros("a copy of a tensor", values.len())?;
            ParamSpec::transpose(&values, &mut rows, inputs, outputs);
            values = rows;
        }
        for (row, values) in values.chunks_exact(inputs).enumerate() {
            for (block, values) in values.chunks(BLOCK).enumerate() {
                let mut padded = [0.0; BLOCK];
                padded[..values.len()].copy_from_slice(values);
                let (scale, codes) = quantize_closest(&padded);
                if scale > LARGEST {
                    return Err(self.no_block(index, values));
                }
                take(row * linear.blocks() + block, scale, codes);
            }
        }
        Ok(())
    }

    /// Why there is no block of these values.
    fn no_block(&self, index: usize, values: &[f32]) -> Error {
        let name = &self.weights.tensors()[index].name;
        if let Some(value) = values.iter().find(|v| !v.is_finite()) {
            return Error::NotFinite { what: format!("a number of tensor {name}"), value: *value };
        }
        let largest = values.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs()));
        too_large(name, largest.unwrap_or(0.0), StoredWeights::Mxfp4)
    }
}

impl TensorRead for Stored<'_> {
    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn dtype(&self, index: usize) -> Dtype {
        match self.parts[index].1 {
            Part::Numbers(dtype) => dtype,
            Part::Codes(_) => Dtype::F4,
            Part::Scales(_) => Dtype::F8_E8M0,
        }
    }

    fn read(&self, index: usize, out: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        let (weight, part) = self.parts[index];
        match part {
            Part::Numbers(dtype) => {
                self.weights.read(weight, out, scratch)?;
                let (stored, fits): (_, fn(f32) -> bool) = match dtype {
                    Dtype::F16 => (StoredWeights::F16, |v| f16::from_f32(v).is_finite()),
                    Dtype::BF16 => (StoredWeights::Bf16, |v| bf16::from_f32(v).is_finite()),
                    _ => return Ok(()),
                };
                match out.iter().find(|v| v.is_finite() && !fits(**v)) {
                    Some(v) => Err(too_large(&self.tensors[index].name, *v, stored)),
                    None => Ok(()),
                }
            }
            // What stands for a code or a scale in a file: its bits, as a number.
            Part::Codes(linear) => self.quantize(weight, linear, scratch, |block, _, codes| {
                let out = &mut out[block * BLOCK..][..BLOCK];
                out.iter_mut().zip(codes).for_each(|(out, code)| *out = code.into());
            }),
            Part::Scales(linear) => {
                let take = |block: usize, scale: u8, _| out[block] = scale.into();
                self.quantize(weight, linear, scratch, take)
            }
        }
    }
}

fn too_large(name: &str, value: f32, stored: StoredWeights) -> Error {
    let message = format!(
        "tensor {name} has the number {value:e}, which {stored} does not have; \
                           choose f32"
    );
    Error::invalid("weights", message)
}
