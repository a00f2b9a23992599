//! What the forward pass keeps for the backward pass, and the gradients that flow back.
//!
//! One vector a kind of tensor, indexed by layer. A forward-only set holds one layer, which all
//! layers share.

use super::ModelConfig;
use crate::backend::{Backend, NormStatistics, Precision, Sequences};

/// Activations of one batch; rows = B T.
pub(crate) struct Activations<B: Backend> {
    /// Input of each block, and the output of the last: (rows, C).
    pub(super) residual: Vec<B::Tensor>,
    /// (rows, C)
    pub(super) ln_1: Vec<B::Tensor>,
    pub(super) ln_1_statistics: Vec<NormStatistics<B::F32>>,
    /// (rows, 3 C)
    pub(super) qkv: Vec<B::Tensor>,
    /// (rows, C)
    pub(super) attention: Vec<B::Tensor>,
    /// (B, H, T)
    pub(super) lse: Vec<B::F32>,
    /// The residual stream between attention and MLP: (rows, C).
    pub(super) middle: Vec<B::Tensor>,
    /// (rows, C)
    pub(super) ln_2: Vec<B::Tensor>,
    pub(super) ln_2_statistics: Vec<NormStatistics<B::F32>>,
    /// (rows, 4 C)
    pub(super) fc1: Vec<B::Tensor>,
    /// (rows, 4 C)
    pub(super) gelu: Vec<B::Tensor>,
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
    /// Of whatever a layer of C channels put out or took in: (rows, C).
    pub(super) narrow: B::Tensor,
    /// The same for 3 C or 4 C channels: (rows, 4 C).
    pub(super) wide: B::Tensor,
}

impl<B: Backend> Activations<B> {
    /// `keep` layers' worth: all of them for training, one for inference.
    fn new(
        backend: &B,
        arena: &mut B::Arena,
        config: &ModelConfig,
        sequences: Sequences,
        precision: Precision,
        keep: usize,
        residuals: usize,
    ) -> Self {
        let rows = sequences.rows();
        let c = config.channels;
        let tensors = |arena: &mut B::Arena, count: usize, width: usize| -> Vec<B::Tensor> {
            (0..count).map(|_| backend.tensor(arena, rows * width, precision)).collect()
        };
        let statistics = |arena: &mut B::Arena| NormStatistics {
            mean: backend.f32(arena, rows),
            rstd: backend.f32(arena, rows),
        };
        Self {
            residual: tensors(arena, residuals, c),
            ln_1: tensors(arena, keep, c),
            ln_1_statistics: (0..keep).map(|_| statistics(arena)).collect(),
            qkv: tensors(arena, keep, 3 * c),
            attention: tensors(arena, keep, c),
            lse: (0..keep).map(|_| backend.f32(arena, rows * config.heads)).collect(),
            middle: tensors(arena, keep, c),
            ln_2: tensors(arena, keep, c),
            ln_2_statistics: (0..keep).map(|_| statistics(arena)).collect(),
            fc1: tensors(arena, keep, 4 * c),
            gelu: tensors(arena, keep, 4 * c),
            branch: backend.tensor(arena, rows * c, precision),
            ln_f: backend.tensor(arena, rows * c, precision),
            ln_f_statistics: statistics(arena),
            losses: backend.f32(arena, rows),
        }
    }

    /// Keeps every layer, for a backward pass.
    pub(crate) fn for_training(
        backend: &B,
        arena: &mut B::Arena,
        config: &ModelConfig,
        sequences: Sequences,
        precision: Precision,
    ) -> Self {
        let layers = config.layers;
        Self::new(backend, arena, config, sequences, precision, layers, layers + 1)
    }

    /// Keeps nothing beyond the layer that is being computed.
    pub(crate) fn for_inference(
        backend: &B,
        arena: &mut B::Arena,
        config: &ModelConfig,
        sequences: Sequences,
        precision: Precision,
    ) -> Self {
        Self::new(backend, arena, config, sequences, precision, 1, 1)
    }
}

impl<B: Backend> ActivationGradients<B> {
    pub(crate) fn new(
        backend: &B,
        arena: &mut B::Arena,
        config: &ModelConfig,
        sequences: Sequences,
        precision: Precision,
    ) -> Self {
        let (rows, c) = (sequences.rows(), config.channels);
        Self {
            residual: backend.tensor(arena, rows * c, precision),
            narrow: backend.tensor(arena, rows * c, precision),
            wide: backend.tensor(arena, rows * 4 * c, precision),
        }
    }
}
