//! The parameters of a GPT, as one structure for whatever belongs to each of them: weights,
//! gradients, moments, names.

use std::iter::once;

use super::ModelConfig;
use crate::Result;
use crate::reserve::{collect, reserve, text};

/// Name and shape of a parameter, as Hugging Face's `gpt2` has them. A head of its own is the
/// tensor `lm_head.weight`; a head that is the token embedding is not listed twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Hugging Face's name, such as `transformer.h.0.attn.c_attn.weight`.
    pub name: String,
    /// Its shape; linear weights are (inputs, outputs).
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Scalars in the tensor.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element (no parameter has none).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Name of the token embedding, which is the head as well unless there is a [`HEAD`].
pub(crate) const WTE: &str = "transformer.wte.weight";

/// Name of a head of its own.
pub(crate) const HEAD: &str = "lm_head.weight";

/// One value of type T for every parameter.
pub(crate) struct Params<T> {
    /// Token embedding and, where `head` is None, language-model head, (V, C).
    pub(crate) wte: T,
    /// Position embedding, (context, C).
    pub(crate) wpe: T,
    pub(crate) blocks: Vec<Block<T>>,
    /// The norm before the head.
    pub(crate) ln_f: Norm<T>,
    /// A head that is not the token embedding, (V, C). Last, so that all else has one order.
    pub(crate) head: Option<T>,
}

/// The parameters of a transformer block.
pub(crate) struct Block<T> {
    /// Before attention.
    pub(crate) ln_1: Norm<T>,
    /// C -> 3 C.
    pub(crate) qkv: Linear<T>,
    /// C -> C.
    pub(crate) projection: Linear<T>,
    /// Before the MLP.
    pub(crate) ln_2: Norm<T>,
    /// C -> M.
    pub(crate) fc1: Linear<T>,
    /// M -> C.
    pub(crate) fc2: Linear<T>,
}

/// LayerNorm: (C) each.
pub(crate) struct Norm<T> {
    pub(crate) w: T,
    pub(crate) b: T,
}

/// A linear layer: w (outputs, inputs), b (outputs).
pub(crate) struct Linear<T> {
    pub(crate) w: T,
    pub(crate) b: T,
}

impl<T> Params<T> {
    /// All values, in the order of Hugging Face's `gpt2`.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        let blocks = self.blocks.iter().flat_map(|b| {
            [
                &b.ln_1.w,
                &b.ln_1.b,
                &b.qkv.w,
                &b.qkv.b,
                &b.projection.w,
                &b.projection.b,
                &b.ln_2.w,
                &b.ln_2.b,
                &b.fc1.w,
                &b.fc1.b,
                &b.fc2.w,
                &b.fc2.b,
            ]
        });
        let ends = [&self.ln_f.w, &self.ln_f.b].into_iter().chain(&self.head);
        [&self.wte, &self.wpe].into_iter().chain(blocks).chain(ends)
    }

    /// The head's value.
    pub(crate) fn head(&self) -> &T {
        self.head.as_ref().unwrap_or(&self.wte)
    }

    /// The head's value.
    pub(crate) fn head_mut(&mut self) -> &mut T {
        self.head.as_mut().unwrap_or(&mut self.wte)
    }

    /// All values, in the same order.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        let blocks = self.blocks.iter_mut().flat_map(|b| {
            [
                &mut b.ln_1.w,
                &mut b.ln_1.b,
                &mut b.qkv.w,
                &mut b.qkv.b,
                &mut b.projection.w,
                &mut b.projection.b,
                &mut b.ln_2.w,
                &mut b.ln_2.b,
                &mut b.fc1.w,
                &mut b.fc1.b,
                &mut b.fc2.w,
                &mut b.fc2.b,
            ]
        });
        let ends = [&mut self.ln_f.w, &mut self.ln_f.b].into_iter().chain(&mut self.head);
        once(&mut self.wte).chain(once(&mut self.wpe)).chain(blocks).chain(ends)
    }

    /// The same structure with `f` of every value, called in the order of `iter`.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> Result<Params<U>> {
        let (wte, wpe) = (f(&self.wte), f(&self.wpe));
        let blocks = self.blocks.iter().map(|b| {
            Ok(Block {
                ln_1: Norm { w: f(&b.ln_1.w), b: f(&b.ln_1.b) },
                qkv: Linear { w: f(&b.qkv.w), b: f(&b.qkv.b) },
                projection: Linear { w: f(&b.projection.w), b: f(&b.projection.b) },
                ln_2: Norm { w: f(&b.ln_2.w), b: f(&b.ln_2.b) },
                fc1: Linear { w: f(&b.fc1.w), b: f(&b.fc1.b) },
                fc2: Linear { w: f(&b.fc2.w), b: f(&b.fc2.b) },
            })
        });
        let blocks = collect("the blocks", blocks)?;
        let ln_f = Norm { w: f(&self.ln_f.w), b: f(&self.ln_f.b) };
        Ok(Params { wte, wpe, blocks, ln_f, head: self.head.as_ref().map(f) })
    }
}

/// What is known of a parameter before it exists.
///
/// NOTE: it owns no memory, so that a plan for thousands of blocks takes one vector.
#[derive(Clone, Debug)]
pub(crate) struct ParamSpec {
    /// The block that it is in.
    layer: Option<usize>,
    /// Hugging Face's name, or what is behind the block's.
    name: &'static str,
    /// Hugging Face's shape, with 0 behind a vector's length.
    shape: [usize; 2],
    /// A linear weight: Hugging Face has (inputs, outputs), we hold (outputs, inputs).
    pub(crate) transposed: bool,
    pub(crate) init: Init,
}

/// Initial values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Init {
    Zeros,
    Ones,
    /// Normal with mean 0.
    Normal {
        std: f32,
    },
}

impl ParamSpec {
    /// Scalars in the parameter.
    pub(crate) fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Hugging Face's shape.
    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape[..if self.shape[1] == 0 { 1 } else { 2 }]
    }

    /// Hugging Face's name and shape.
    pub(crate) fn info(&self) -> Result<TensorInfo> {
        const WHAT: &str = "the names of the tensors";
        let name = match self.layer {
            Some(layer) => text(WHAT, format_args!("transformer.h.{layer}.{}", self.name))?,
            None => text(WHAT, format_args!("{}", self.name))?,
        };
        let shape = collect(WHAT, self.shape().iter().map(|size| Ok(*size)))?;
        Ok(TensorInfo { name, shape })
    }

    /// Whether weight decay applies: to tensors of two or more dimensions.
    pub(crate) fn decays(&self) -> bool {
        self.shape().len() >= 2
    }

    /// Converts values between Hugging Face's order and ours.
    ///
    /// `rows` and `cols` are those of `from`.
    fn transpose(from: &[f32], to: &mut [f32], rows: usize, cols: usize) {
        for r in 0..rows {
            for c in 0..cols {
                to[c * rows + r] = from[r * cols + c];
            }
        }
    }

    /// Puts values that are in our order into Hugging Face's.
    pub(crate) fn export(&self, values: &mut [f32], scratch: &mut Vec<f32>) -> Result<()> {
        if self.transposed {
            scratch.clear();
            reserve(scratch, "a copy of a tensor", values.len())?;
            scratch.extend_from_slice(values);
            Self::transpose(scratch, values, self.shape[1], self.shape[0]);
        }
        Ok(())
    }

    /// Puts values that are in Hugging Face's order into ours.
    pub(crate) fn import(&self, values: &[f32], scratch: &mut Vec<f32>) -> Result<()> {
        scratch.clear();
        reserve(scratch, "a copy of a tensor", values.len())?;
        scratch.extend_from_slice(values);
        if self.transposed {
            Self::transpose(values, scratch, self.shape[0], self.shape[1]);
        }
        Ok(())
    }
}

/// Name, shape and initial values of every parameter: GPT-2's initialization, in which the layers
/// that add to the residual stream start smaller by the root of their number (Radford et al. 2019).
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
pub(crate) fn specs(config: &ModelConfig) -> Result<Params<ParamSpec>> {
    let (c, m) = (config.channels, config.mlp_width());
    let std = 0.02;
    let residual_std = std / (2.0 * config.layers as f32).sqrt();
    let vector = |layer, name, len, init| ParamSpec {
        layer,
        name,
        shape: [len, 0],
        transposed: false,
        init,
    };
    let norm = |layer, [w, b]: [&'static str; 2]| Norm {
        w: vector(layer, w, c, Init::Ones),
        b: vector(layer, b, c, Init::Zeros),
    };
    let linear = |layer, [w, b]: [&'static str; 2], inputs, outputs, std| Linear {
        w: ParamSpec {
            layer: Some(layer),
            name: w,
            shape: [inputs, outputs],
            transposed: true,
            init: Init::Normal { std },
        },
        b: vector(Some(layer), b, outputs, Init::Zeros),
    };
    let table = |name, rows| ParamSpec {
        layer: None,
        name,
        shape: [rows, c],
        transposed: false,
        init: Init::Normal { std },
    };
    let blocks = (0..config.layers).map(|l| {
        Ok(Block {
            ln_1: norm(Some(l), ["ln_1.weight", "ln_1.bias"]),
            qkv: linear(l, ["attn.c_attn.weight", "attn.c_attn.bias"], c, 3 * c, std),
            projection: linear(l, ["attn.c_proj.weight", "attn.c_proj.bias"], c, c, residual_std),
            ln_2: norm(Some(l), ["ln_2.weight", "ln_2.bias"]),
            fc1: linear(l, ["mlp.c_fc.weight", "mlp.c_fc.bias"], c, m, std),
            fc2: linear(l, ["mlp.c_proj.weight", "mlp.c_proj.bias"], m, c, residual_std),
        })
    });
    Ok(Params {
        wte: table(WTE, config.vocab_size),
        wpe: table("transformer.wpe.weight", config.context_length),
        blocks: collect("the blocks", blocks)?,
        ln_f: norm(None, ["transformer.ln_f.weight", "transformer.ln_f.bias"]),
        head: (!config.tied_head).then(|| table(HEAD, config.vocab_size)),
    })
}

/// How many tensors a model has.
pub(crate) fn parameter_tensors(config: &ModelConfig) -> usize {
    4 + 12 * config.layers + usize::from(!config.tied_head)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        ModelConfig {
            vocab_size: 7,
            context_length: 5,
            layers: 2,
            heads: 2,
            channels: 4,
            ..ModelConfig::default()
        }
    }

    fn unlike_gpt2() -> ModelConfig {
        ModelConfig { mlp_channels: 9, tied_head: false, ..config() }
    }

    #[test]
    fn specs_add_up_to_the_parameter_count() {
        for config in [config(), unlike_gpt2()] {
            let total: usize = specs(&config).unwrap().iter().map(ParamSpec::len).sum();
            assert_eq!(total as u64, config.parameter_count());
            assert_eq!(specs(&config).unwrap().iter().count(), parameter_tensors(&config));
        }
        assert_eq!(ModelConfig::default().parameter_count(), 124_439_808);
    }

    #[test]
    fn a_head_of_its_own_comes_last_and_decays() {
        let [tied, untied] = [config(), unlike_gpt2()].map(|config| specs(&config).unwrap());
        let names = |specs: &Params<ParamSpec>| -> Vec<String> {
            specs.iter().map(|spec| spec.info().unwrap().name).collect()
        };
        let mut all = names(&tied);
        all.push(HEAD.into());
        assert_eq!(names(&untied), all);
        assert!(untied.head().decays() && untied.head().name == HEAD);
        assert_eq!(untied.head().shape(), [7, 4]);
        assert_eq!(tied.head().name, WTE);
    }

    #[test]
    fn iterators_and_map_agree_on_the_order() {
        let mut specs = specs(&unlike_gpt2()).unwrap();
        let names: Vec<_> = specs.iter().map(|s| s.info().unwrap().name).collect();
        let mapped = specs.map(|s| s.info().unwrap().name).unwrap();
        assert!(mapped.iter().eq(&names));
        assert!(specs.iter_mut().map(|s| s.info().unwrap().name).eq(names.clone()));
        assert_eq!(names.len(), 2 + 2 * 12 + 2 + 1);
        let unique: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(unique.len(), names.len());
    }

    #[test]
    fn export_undoes_import() {
        let specs = specs(&config()).unwrap();
        let spec = &specs.blocks[0].qkv.w; // (4, 12) there, (12, 4) here
        let theirs: Vec<f32> = (0..spec.len()).map(|i| i as f32).collect();
        let (mut ours, mut scratch) = (Vec::new(), Vec::new());
        spec.import(&theirs, &mut ours).unwrap();
        assert_eq!(ours[4 + 2], theirs[2 * 12 + 1]);
        spec.export(&mut ours, &mut scratch).unwrap();
        assert_eq!(ours, theirs);
    }
}
