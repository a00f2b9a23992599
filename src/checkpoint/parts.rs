//! Tensors that files have in parts: q, k and v of Llama's blocks, gate and up.

use std::cell::RefCell;
use std::ops::Range;

use super::{Scratch, TensorRead};
use crate::gpt::{ModelConfig, TensorInfo};
use crate::reserve::{collect, reserve, text};
use crate::{Error, Result};

const WHAT: &str = "the names of the tensors";

/// What a file has of a tensor.
pub(super) struct Part {
    /// As the file has it.
    pub(super) info: TensorInfo,
    /// The number of the tensor.
    pub(super) index: usize,
    /// Which elements of it.
    pub(super) range: Range<usize>,
}

/// What files have of tensors, in their order.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(super) fn parts(config: &ModelConfig, tensors: &[TensorInfo]) -> Result<Vec<Part>> {
    let mut all = Vec::new();
    for (index, tensor) in tensors.iter().enumerate() {
        let copy = |name: &str, rows: usize| {
            let inner = tensor.shape[1..].iter().copied();
            let shape = std::iter::once(rows).chain(inner).map(Ok);
            Ok::<_, Error>(TensorInfo {
                name: text(WHAT, format_args!("{name}"))?,
                shape: collect(WHAT, shape)?,
            })
        };
        let parts = config.parts_of(&tensor.name)?;
        reserve(&mut all, WHAT, parts.as_ref().map_or(1, Vec::len))?;
        let Some(parts) = parts else {
            let info = copy(&tensor.name, tensor.shape[0])?;
            all.push(Part { info, index, range: 0..tensor.len() });
            continue;
        };
        let width: usize = tensor.shape[1..].iter().product();
        for part in parts {
            let range = part.rows.start * width..part.rows.end * width;
            all.push(Part { info: copy(&part.name, part.rows.len())?, index, range });
        }
    }
    Ok(all)
}

/// Weights as files have them.
pub(super) struct InParts<'a> {
    weights: &'a dyn TensorRead,
    tensors: Vec<TensorInfo>,
    /// Of each of `tensors`: the number of its weight, and which elements of that.
    of: Vec<(usize, Range<usize>)>,
    /// The last weight that was read in parts, which the next part may be of.
    last: RefCell<(Option<usize>, Vec<f32>)>,
}

impl<'a> InParts<'a> {
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(super) fn new(config: &ModelConfig, weights: &'a dyn TensorRead) -> Result<Self> {
        let (mut tensors, mut of) = (Vec::new(), Vec::new());
        for Part { info, index, range } in parts(config, weights.tensors())? {
            reserve(&mut tensors, WHAT, 1)?;
            reserve(&mut of, WHAT, 1)?;
            tensors.push(info);
            of.push((index, range));
        }
        Ok(Self { weights, tensors, of, last: RefCell::new((None, Vec::new())) })
    }
}

impl TensorRead for InParts<'_> {
    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read(&self, index: usize, out: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        let (index, range) = &self.of[index];
        let len = self.weights.tensors()[*index].len();
        if range.len() == len {
            return self.weights.read(*index, out, scratch);
        }
        let (last, values) = &mut *self.last.borrow_mut();
        if *last != Some(*index) {
            *last = None;
            values.clear();
            reserve(values, "a tensor", len)?;
            values.resize(len, 0.0);
            self.weights.read(*index, values, scratch)?;
            *last = Some(*index);
        }
        out.copy_from_slice(&values[range.clone()]);
        Ok(())
    }
}
