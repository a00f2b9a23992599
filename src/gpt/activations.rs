//! What the forward pass keeps for the backward pass, and the gradients that flow back.
//!
//! One [`Layers`] a kind of tensor, indexed by layer modulo its length: where a tensor need not
//! outlive its layer, in inference and for what is computed again in the backward pass, all layers
//! share one.

use std::ops::{Index, IndexMut};

use super::recompute::Recompute;
use super::{Architecture, ModelConfig, Shapes};
use crate::Result;
use crate::backend::{Backend, NormStatistics, Precision};
use crate::formats::{LINEARS, LinearRecipe};
use crate::reserve::collect;

/// A tensor for each layer, or fewer that layers take in turn.
pub(super) struct Layers<T>(Vec<T>);

impl<T> Layers<T> {
    fn new(count: usize, mut tensor: impl FnMut() -> T) -> Result<Self> {
        collect("the tensors of all layers", (0..count).map(|_| Ok(tensor()))).map(Self)
    }

    /// The tensors of a layer and of the next, which are two.
    pub(super) fn with_next(&mut self, layer: usize) -> (&T, &mut T) {
        let [this, next] = self.0.get_disjoint_mut([layer, layer + 1]).expect("layers share none");
        (this, next)
    }

    /// Whether layer `l` has a tensor that other layers use too.
    pub(super) fn is_shared(&self) -> bool {
        self.0.len() == 1
    }
}

impl<T> Index<usize> for Layers<T> {
    type Output = T;

    fn index(&self, layer: usize) -> &T {
        &self.0[layer % self.0.len()]
    }
}

impl<T> IndexMut<usize> for Layers<T> {
    fn index_mut(&mut self, layer: usize) -> &mut T {
        let count = self.0.len();
        &mut self.0[layer % count]
    }
}

/// What a backward pass needs of the forward pass.
pub(crate) struct ForBackward<'a> {
    pub(crate) recompute: Recompute,
    /// The formats of a block's linear layers, where all blocks have the same in all steps.
    pub(crate) everywhere: Option<&'a [LinearRecipe; LINEARS]>,
    /// Whether blocks drop tokens.
    pub(crate) drops: bool,
}

/// What blocks that drop tokens need besides.
pub(super) struct Dropping<B: Backend> {
    /// Of all blocks, though the first and the last keep everything: every block is to take as much
    /// memory as the second.
    pub(super) selection: B::Selection,
    /// The kept rows of a block's input: (rows, C) or fewer.
    pub(super) input: B::Tensor,
}

/// What the linear layers of blocks make in the forward pass besides their results.
pub(super) struct Beside<B: Backend> {
    /// What they turned, by block. Where there is any, their backward passes read no input, and what
    /// norms and GELU put out is not kept.
    pub(super) turned: Vec<[B::Turned; LINEARS]>,
    /// What lies between the two matrices of their adapters, (rows, rank); no layer where none has an
    /// adapter.
    pub(super) low: Layers<[Option<B::Tensor>; LINEARS]>,
}

/// What Llama's blocks need besides, one for all layers.
pub(super) struct Rotary<B: Backend> {
    /// (D / 2)
    pub(super) frequencies: Vec<f32>,
    /// (rows, D): what rows are turned by.
    pub(super) table: B::Tensor,
    /// The same of rows that a block keeps, where blocks drop tokens.
    pub(super) kept: Option<B::Tensor>,
    /// (rows, qkv channels): q and k as attention reads them and v, where the layer's result is kept
    /// as it is for norms of heads.
    pub(super) normed: Option<B::Tensor>,
}

/// Activations of one batch; rows = B T, or fewer within a block that drops tokens.
pub(crate) struct Activations<B: Backend> {
    /// Input of each block, and the output of the last: (rows, C).
    pub(super) residual: Layers<B::Tensor>,
    /// (rows, C)
    pub(super) ln_1: Layers<B::Tensor>,
    pub(super) ln_1_statistics: Layers<NormStatistics<B::F32>>,
    /// (rows, all heads of q, k and v); with q and k turned, where positions turn them in place.
    pub(super) qkv: Layers<B::Tensor>,
    pub(super) rotary: Option<Rotary<B>>,
    /// (rows, all heads)
    pub(super) attention: Layers<B::Tensor>,
    /// (B, H, T)
    pub(super) lse: Layers<B::F32>,
    /// The residual stream between attention and MLP: (rows, C).
    pub(super) middle: Layers<B::Tensor>,
    /// (rows, C)
    pub(super) ln_2: Layers<B::Tensor>,
    pub(super) ln_2_statistics: Layers<NormStatistics<B::F32>>,
    /// (rows, M), or gate and up (rows, 2 M), in whose place the backward pass may put their gradient.
    pub(super) fc1: Layers<B::Tensor>,
    /// What the second layer of the MLP reads: (rows, M).
    pub(super) gelu: Layers<B::Tensor>,
    pub(super) beside: Beside<B>,
    pub(super) dropping: Option<Dropping<B>>,
    /// What a block adds to the residual stream: (rows, C).
    pub(super) branch: B::Tensor,
    /// (rows, C)
    pub(super) ln_f: B::Tensor,
    pub(super) ln_f_statistics: NormStatistics<B::F32>,
    /// (rows)
    pub(crate) losses: B::F32,
}

/// Gradients of activations, reused by all layers.
pub(crate) struct ActivationGradients<B: Backend> {
    /// Of the residual stream: (rows, C).
    pub(super) residual: B::Tensor,
    /// Of its rows that a block keeps, where blocks drop tokens: (rows, C) or fewer.
    pub(super) kept: Option<B::Tensor>,
    /// Of whatever a layer of C channels put out or took in, and of all heads of q: (rows, the
    /// larger).
    pub(super) narrow: B::Tensor,
    /// The same for all heads of q, k and v, or M channels: (rows, the larger).
    pub(super) wide: B::Tensor,
}

impl<B: Backend> Activations<B> {
    /// With what is `kept` for a backward pass, which computes the rest again; for None keeps
    /// nothing beyond the layer that is being computed.
    pub(crate) fn new(
        backend: &B,
        arena: &mut B::Arena,
        shapes: Shapes<'_>,
        kept: Option<ForBackward<'_>>,
    ) -> Result<Self> {
        let Shapes { config, sequences, precision } = shapes;
        let ModelConfig { layers, channels: c, heads, .. } = *config;
        let (rows, [qkv, attended, fc1, activated]) = (sequences.rows(), shapes.linears());
        let (recompute, everywhere, drops) = match kept {
            Some(ForBackward { recompute, everywhere, drops }) => {
                (Some(recompute), everywhere, drops)
            }
            None => (None, None, false),
        };
        // Gradients of adapters read what layers read.
        let everywhere = everywhere.filter(|_| config.lora.is_none());
        let turned = match everywhere.filter(|_| recompute == Some(Recompute::Nothing)) {
            Some(recipes) => turned(backend, arena, shapes, recipes)?,
            None => Vec::new(),
        };
        // Inputs of blocks; what GEMMs and attention put out; what norms and GELU put out; numbers
        // of a row, which are small.
        let (inputs, products, pointwise, numbers) = match recompute {
            None => (1, 1, 1, 1),
            Some(Recompute::Nothing) if turned.is_empty() => (layers + 1, layers, layers, layers),
            Some(Recompute::Nothing | Recompute::Pointwise) => (layers + 1, layers, 1, layers),
            Some(Recompute::Block) => (layers + 1, 1, 1, layers),
        };
        let tensors = |arena: &mut B::Arena, count: usize, width: usize| {
            Layers::new(count, || backend.tensor(arena, rows * width, precision))
        };
        // Small, and nothing computes that of a block's last layer again.
        let adapted = if config.lora.is_some() { numbers } else { 0 };
        let low = Layers::new(adapted, || {
            std::array::from_fn(|number| {
                let adapter = shapes.adapter(number)?;
                Some(backend.tensor(arena, rows * adapter.rank, precision))
            })
        })?;
        let statistics = |arena: &mut B::Arena| NormStatistics {
            mean: backend.f32(arena, rows),
            rstd: backend.f32(arena, rows),
        };
        let all_statistics = |arena: &mut B::Arena| Layers::new(numbers, || statistics(arena));
        let rotary = match config.architecture {
            Architecture::Gpt2 => None,
            Architecture::Llama => {
                let d = config.head_width();
                let frequencies = config.rope.frequencies(d)?;
                let mut table = || backend.tensor(arena, rows * d, Precision::F32);
                let (table, kept) = (table(), drops.then(table));
                let normed =
                    config.qk_norm.then(|| backend.tensor(arena, rows * qkv.outputs, precision));
                Some(Rotary { frequencies, table, kept, normed })
            }
        };
        Ok(Self {
            residual: tensors(arena, inputs, c)?,
            ln_1: tensors(arena, pointwise, c)?,
            ln_1_statistics: all_statistics(arena)?,
            qkv: tensors(arena, products, qkv.outputs)?,
            rotary,
            attention: tensors(arena, products, attended.inputs)?,
            lse: Layers::new(numbers, || backend.f32(arena, rows * heads))?,
            middle: tensors(arena, products, c)?,
            ln_2: tensors(arena, pointwise, c)?,
            ln_2_statistics: all_statistics(arena)?,
            fc1: tensors(arena, products, fc1.outputs)?,
            gelu: tensors(arena, pointwise, activated.inputs)?,
            beside: Beside { turned, low },
            dropping: drops.then(|| Dropping {
                selection: backend.selection(arena, sequences, layers),
                input: backend.tensor(arena, rows * c, precision),
            }),
            branch: backend.tensor(arena, rows * c, precision),
            ln_f: backend.tensor(arena, rows * c, precision),
            ln_f_statistics: statistics(arena),
            losses: backend.f32(arena, rows),
        })
    }

    /// What the norm behind the last block has put out: (rows, C).
    pub(crate) fn hidden(&self) -> &B::Tensor {
        &self.ln_f
    }

    /// The input of the first block's qkv layer (rows, C).
    #[cfg(test)]
    pub(crate) fn first_qkv_input(&self) -> &B::Tensor {
        &self.ln_1[0]
    }
}

/// Room for what all layers turn, if all do.
fn turned<B: Backend>(
    backend: &B,
    arena: &mut B::Arena,
    shapes: Shapes<'_>,
    recipes: &[LinearRecipe; LINEARS],
) -> Result<Vec<[B::Turned; LINEARS]>> {
    let linears = shapes.linears();
    if !linears.iter().zip(recipes).all(|(shape, recipe)| backend.turns(*shape, recipe)) {
        return Ok(Vec::new());
    }
    let of_block = |_| Ok(std::array::from_fn(|i| backend.turned(arena, linears[i])));
    collect("what layers turn", (0..shapes.config.layers).map(of_block))
}

impl<B: Backend> ActivationGradients<B> {
    /// `drops` tells whether blocks drop tokens.
    pub(crate) fn new(backend: &B, arena: &mut B::Arena, shapes: Shapes<'_>, drops: bool) -> Self {
        let Shapes { config, sequences, precision } = shapes;
        let (rows, c, [qkv, attended, _, activated]) =
            (sequences.rows(), config.channels, shapes.linears());
        let (narrow, wide) = (c.max(attended.inputs), qkv.outputs.max(activated.inputs));
        Self {
            residual: backend.tensor(arena, rows * c, precision),
            kept: drops.then(|| backend.tensor(arena, rows * c, precision)),
            narrow: backend.tensor(arena, rows * narrow, precision),
            wide: backend.tensor(arena, rows * wide, precision),
        }
    }

    /// After a backward pass, the gradient of the first block's qkv (rows, 3 C).
    #[cfg(test)]
    pub(crate) fn of_first_qkv(&self) -> &B::Tensor {
        &self.wide
    }
}
