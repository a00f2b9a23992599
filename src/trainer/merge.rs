//! What `haste` would spare of an evaluation: operations of the linear layers of all blocks, counted
//! by the buckets that their channels fell into.

use crate::Result;
use crate::backend::{Backend, LinearShape, Sequences};
use crate::formats::LINEARS;
use crate::gpt::{Merging, ModelConfig, Shapes};
use crate::reserve::zeros;
use crate::run::TrainerOptions;

/// The part of the operations of an evaluation's linear layers that `haste` would spare: those of
/// x W^T alone, 2 T C O of T tokens, C inputs and O outputs, a multiplication and an addition each.
/// Nothing of it is faster here: products are computed at their full width.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spared {
    /// Less 2 T K O of K buckets.
    pub products: f64,
    /// Less also what merging adds: T C for the means that channels are centred by, L T C / 3 for L
    /// projections, of whose entries a third is not 0, and (C - K) (T + O) to sum the channels of
    /// buckets and their columns of W, which each sequence does anew. Below 0 where that is more.
    /// Comparisons of hashes and divisions are not counted.
    pub all: f64,
}

/// Operations of linear layers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Operations {
    /// Of products of whole width.
    whole: f64,
    /// Of products of buckets.
    merged: f64,
    added: f64,
}

impl Operations {
    /// Adds those of a sequence of so many tokens, whose channels fell into so many buckets.
    fn add(&mut self, tokens: usize, layer: LinearShape, hashes: usize, buckets: f32) {
        let [t, c, o, l] = [tokens, layer.inputs, layer.outputs, hashes].map(|n| n as f64);
        let k = f64::from(buckets);
        self.whole += 2.0 * t * c * o;
        self.merged += 2.0 * t * k * o;
        self.added += t * c + l * t * c / 3.0 + (c - k) * (t + o);
    }

    fn spared(&self) -> Spared {
        let Self { whole, merged, added } = *self;
        Spared { products: 1.0 - merged / whole, all: 1.0 - (merged + added) / whole }
    }
}

/// Counts buckets, where a recipe merges channels.
pub(super) struct Merges<B: Backend> {
    hashes: usize,
    /// (layers, stride): of a layer the buckets of each linear layer (B).
    buckets: B::F32,
    stride: usize,
    /// The same on the host.
    found: Vec<f32>,
    operations: Operations,
}

impl<B: Backend> Merges<B> {
    /// None where nothing is merged; `allocate` is false where the arena only measures.
    pub(super) fn new(
        backend: &B,
        arena: &mut B::Arena,
        config: &ModelConfig,
        options: &TrainerOptions,
        allocate: bool,
    ) -> Result<Option<Self>> {
        let Some(hashes) = options.recipe.haste() else { return Ok(None) };
        let stride = (LINEARS * options.batch_size).next_multiple_of(B::ALIGN);
        let len = config.layers * stride;
        Ok(Some(Self {
            hashes,
            buckets: backend.f32(arena, len),
            stride,
            found: zeros("the buckets of an evaluation", if allocate { len } else { 0 })?,
            operations: Operations::default(),
        }))
    }

    /// An evaluation begins.
    pub(super) fn begin(&mut self) {
        self.operations = Operations::default();
    }

    /// For the pass over a batch.
    pub(super) fn merging(&mut self, seed: u64) -> Merging<'_, B> {
        let Self { hashes, stride, ref mut buckets, .. } = *self;
        Merging { hashes, seed, buckets, stride }
    }

    /// Counts the operations of a batch whose pass is done. Waits for the device.
    pub(super) fn count(&mut self, backend: &B, shapes: Shapes<'_>) -> Result<()> {
        let Self { hashes, ref buckets, stride, ref mut found, ref mut operations } = *self;
        let Sequences { batch, length } = shapes.sequences;
        backend.read_f32(buckets, 0, found)?;
        for of_layer in found.chunks_exact(stride) {
            for (layer, buckets) in shapes.linears().into_iter().zip(of_layer.chunks(batch)) {
                buckets.iter().for_each(|count| operations.add(length, layer, hashes, *count));
            }
        }
        Ok(())
    }

    /// Of the whole evaluation.
    pub(super) fn spared(&self) -> Spared {
        self.operations.spared()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 4 tokens, 6 channels, 10 outputs and 3 projections, by hand.
    #[test]
    fn operations_are_counted() {
        let layer = LinearShape { rows: 8, inputs: 6, outputs: 10 };
        let of = |buckets| {
            let mut operations = Operations::default();
            operations.add(4, layer, 3, buckets);
            operations
        };
        // 24 for means, 24 for projections; two channels fewer cost 2 (4 + 10).
        let expected = Operations { whole: 480.0, merged: 320.0, added: 24.0 + 24.0 + 28.0 };
        assert_eq!(of(4.0), expected);
        let Spared { products, all } = of(4.0).spared();
        assert!((products - 1.0 / 3.0).abs() < 1e-12 && (all - 84.0 / 480.0).abs() < 1e-12);
        // Where nothing is merged, hashes are in vain.
        assert_eq!(of(6.0).spared(), Spared { products: 0.0, all: 1.0 - 528.0 / 480.0 });
    }
}
