//! Adapters of layers that files have in parts: q, k and v of Llama's blocks, gate and up.
//!
//! Here such a layer has one adapter, y += scale (x A^T) B^T, whose B has rows for each part. PEFT has
//! one for each part. Ours is saved as one each with the same A. What PEFT trained has an A each: then
//! ours has all of them, one above the other, and of each part's B the rows in the columns that belong
//! to its A, 0 in others, which computes the same; its rank is as much larger, and so is that of layers
//! in one part, whose further rows and columns are 0. Parts without an adapter have a B of 0.

use std::ops::Range;

use super::tensors::{FLOATS, TensorFile};
use super::{Scratch, TensorRead};
use crate::gpt::{ModelConfig, TensorInfo, TensorPart};
use crate::reserve::{reuse, zeros};
use crate::{Error, Result};

/// In front of our names.
pub(super) const PREFIX: &str = "base_model.model.";

const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// The layer that an adapter's matrix is of, and whether it is B.
fn layer_of(name: &str) -> Option<(&str, bool)> {
    let a = name.strip_suffix(A).map(|layer| (layer, false));
    a.or_else(|| name.strip_suffix(B).map(|layer| (layer, true)))
}

/// What files have of a layer: names without their ends, and rows of its result.
fn parts_of(config: &ModelConfig, layer: &str, rows: usize) -> Result<Vec<TensorPart>> {
    let Some(mut parts) = config.parts_of(&format!("{layer}.weight"))? else {
        return Ok(vec![TensorPart { name: layer.to_owned(), rows: 0..rows }]);
    };
    for part in &mut parts {
        part.name.truncate(part.name.len() - ".weight".len());
    }
    Ok(parts)
}

/// The names that files have of all of a model's adapters.
pub(super) fn names_in_files(config: &ModelConfig, tensors: &[TensorInfo]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for tensor in tensors {
        let Some((layer, is_b)) = layer_of(&tensor.name) else { continue };
        let end = if is_b { B } else { A };
        let parts = parts_of(config, layer, 0)?;
        names.extend(parts.into_iter().map(|part| format!("{}{end}", part.name)));
    }
    Ok(names)
}

/// Adapters as PEFT has them.
pub(super) struct InParts<'a> {
    adapters: &'a dyn TensorRead,
    tensors: Vec<TensorInfo>,
    /// Of each of `tensors`: the number of ours, and which elements of it.
    of: Vec<(usize, Range<usize>)>,
}

impl<'a> InParts<'a> {
    pub(super) fn new(config: &ModelConfig, adapters: &'a dyn TensorRead) -> Result<Self> {
        let (mut tensors, mut of) = (Vec::new(), Vec::new());
        for (index, tensor) in adapters.tensors().iter().enumerate() {
            let Some((layer, is_b)) = layer_of(&tensor.name) else { continue };
            let [rows, cols] = tensor.shape[..] else { continue };
            for TensorPart { name, rows: of_part } in parts_of(config, layer, rows)? {
                let (rows, end) = if is_b { (of_part, B) } else { (0..rows, A) };
                let (name, shape) = (format!("{name}{end}"), vec![rows.len(), cols]);
                tensors.push(TensorInfo { name, shape });
                of.push((index, rows.start * cols..rows.end * cols));
            }
        }
        Ok(Self { adapters, tensors, of })
    }
}

impl TensorRead for InParts<'_> {
    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read(&self, index: usize, out: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        let (index, range) = &self.of[index];
        let len = self.adapters.tensors()[*index].len();
        if range.len() == len {
            return self.adapters.read(*index, out, scratch);
        }
        // Of a rank's width: small.
        let mut whole = zeros("a tensor", len)?;
        self.adapters.read(*index, &mut whole, scratch)?;
        out.copy_from_slice(&whole[range.clone()]);
        Ok(())
    }
}

/// The adapters of a file by the names that they have in it, `named` with whatever is in front.
pub(super) struct Found<'a> {
    pub(super) file: &'a TensorFile<'a>,
    pub(super) named: &'a dyn Fn(&str) -> Option<String>,
    pub(super) config: &'a ModelConfig,
    /// The modules that have an adapter in some block, and so in all.
    pub(super) modules: &'a [&'static str],
    /// What the file says of the rank.
    pub(super) rank: usize,
}

impl Found<'_> {
    /// The parts of a layer that have an adapter, with their numbers among all.
    fn of_layer(&self, layer: &str, rows: usize) -> Result<(Vec<(usize, TensorPart)>, usize)> {
        let parts = parts_of(self.config, layer, rows)?;
        let count = parts.len();
        let has = |part: &TensorPart| {
            self.modules.iter().any(|module| {
                part.name.strip_suffix(module).is_some_and(|before| before.ends_with('.'))
            })
        };
        Ok((parts.into_iter().enumerate().filter(|(_, part)| has(part)).collect(), count))
    }

    /// By how much our rank is larger: the most parts of a layer whose A differ.
    pub(super) fn stacked(&self, tensors: &[TensorInfo]) -> Result<usize> {
        let mut most = 1;
        for layer in tensors.iter().filter_map(|tensor| tensor.name.strip_suffix(A)) {
            let (parts, count) = self.of_layer(layer, 0)?;
            let names = parts.iter().filter_map(|(_, p)| (self.named)(&format!("{}{A}", p.name)));
            let names: Vec<_> = names.collect();
            for pair in names.windows(2) {
                if !self.file.holds_same(&pair[0], self.file, &pair[1])? {
                    most = most.max(count);
                }
            }
        }
        Ok(most)
    }

    /// One of our matrices, of a rank that is `stacked` times as large.
    pub(super) fn read(
        &self,
        tensor: &TensorInfo,
        stacked: usize,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let (rank, [rows, cols]) = (self.rank, [tensor.shape[0], tensor.shape[1]]);
        let Some((layer, is_b)) = layer_of(&tensor.name) else {
            unreachable!("an adapter has two matrices")
        };
        let (parts, count) = self.of_layer(layer, rows)?;
        let out = {
            out.clear();
            reuse(out, "a tensor", tensor.len())?
        };
        out.fill(0.0);
        let mut values = Vec::new();
        for (number, part) in parts {
            // Where this part's A stands among all of them.
            let first = if stacked > 1 && count > 1 { number * rank } else { 0 };
            let name = format!("{}{}", part.name, if is_b { B } else { A });
            let Some(name) = (self.named)(&name) else {
                let message = format!(
                    "tensor {PREFIX}{name}: missing; every block has the same adapters, of two tensors each"
                );
                return Err(Error::format(self.file.path(), message));
            };
            if is_b {
                self.file.read(&name, &[part.rows.len(), rank], &FLOATS, &mut values)?;
                for (row, values) in part.rows.zip(values.chunks_exact(rank)) {
                    out[row * cols + first..][..rank].copy_from_slice(values);
                }
            } else {
                self.file.read(&name, &[rank, cols], &FLOATS, &mut values)?;
                out[first * cols..][..values.len()].copy_from_slice(&values);
            }
        }
        Ok(())
    }
}
