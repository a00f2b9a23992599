//! The operations that training a GPT needs, over opaque buffers: a trait for each family of them.
//!
//! Shapes: B sequences, T tokens each, `rows` = B T, C channels, M inside an MLP, H heads of C / H
//! channels, V tokens in the vocabulary. Everything is dense and row-major. Unless an operation
//! says "adds to", it overwrites its outputs. Gradients of parameters are added to with
//! `accumulate`, which a step's first micro-step is without, so that nothing clears them but those
//! of a token embedding that is not the head, too.
//!
//! Model code is written once over [`Backend`]; an implementation keeps its buffers in the
//! precision that suits the device. Every operation has a plain scalar twin, which the tests of
//! each backend compare it with. Which device it is is asked once, at the top (see `Device`);
//! below that a buffer of one device does not even compile where another's is wanted.
//!
//! Operations return nothing: a device may run them later than the call. What went wrong on it
//! shows at the next call that reads from it, as an error.

mod attend;
pub(crate) mod block;
#[cfg(test)]
mod conformance;
pub mod cpu;
pub(crate) mod cuda;
mod decode;
mod embed;
mod exchange;
mod follow;
mod gradients;
mod head;
mod host;
mod linear;
mod lora;
mod memory;
mod merge;
mod norm;
mod optimize;
#[cfg(test)]
pub(crate) mod reference;
mod rotary;
mod select;
mod stream;

pub use crate::optim::{Largest, OptimizerStep, StepSums, UpdateSums};
pub use attend::{Attend, AttentionBackward, AttentionShape, Documents};
pub use block::Allocator;
pub use decode::{Decode, DecoderWeights, OfSequence};
pub use embed::{Embed, EmbeddingGradients, EmbeddingShape};
pub use exchange::{Bucket, Exchange, Reached};
pub use follow::{Follow, Track, Values, View, Viewed};
pub use gradients::FlatGradients;
pub use head::{
    Classifier, ClassifierGradient, Head, HeadShape, HostClassifier, HostLoss, LogitRows,
    WorstLosses,
};
pub(crate) use host::HostBuffer;
pub use linear::{
    Activation, Epilogue, Linear, LinearBackward, LinearForward, LinearShape, Numbers,
    OutputGradient,
};
pub use lora::{Adapt, LoraBackward, LoraForward, LoraShape};
pub use memory::{GradientPlace, Memory, Part, Slot};
pub use merge::{Merge, MergeShape, Merged};
pub use norm::{Norm, NormBackward, NormKind, NormParams, NormShape, NormStatistics, ResidualSum};
pub use optimize::{Optimize, StateLayout, Trained};
pub(crate) use optimize::{Place, as_one};
pub use rotary::{HeadNorms, HeadNormsBackward, Rotate, Turn};
pub use select::{Select, SelectShape, Selected, SelectedSum};
pub use stream::CudaStream;

use std::ops::Range;

use crate::Result;
use crate::formats::{Element, Gemm, LINEARS, LinearRecipe};

/// Something that each device has a type of its own for: engines, models, trainers and decoders
/// hold one, and [`on_device`] calls what is generic over [`Backend`] below it.
pub(crate) enum Device<C, G> {
    /// Every processor.
    Cpu(C),
    /// One NVIDIA GPU.
    Cuda(G),
}

/// An expression in `$inner`, whatever the device.
macro_rules! on_device {
    ($device:expr, $inner:ident => $then:expr) => {
        match $device {
            $crate::backend::Device::Cpu($inner) => $then,
            $crate::backend::Device::Cuda($inner) => $then,
        }
    };
}
pub(crate) use on_device;

/// Number format of activations and their gradients, where a backend has a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32.
    F32,
    /// bf16, where the backend's kernels are made for it; others keep f32.
    Bf16,
}

impl Precision {
    /// Of what lies around a recipe's forward GEMM: activations, attention, the head (which the
    /// paper keeps out of MXFP4 and FP8).
    pub fn of(forward: &Gemm) -> Self {
        if forward.element() == Element::F32 { Self::F32 } else { Self::Bf16 }
    }

    /// Bytes of an element that is held in it.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// Sizes of a batch of sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequences {
    /// B.
    pub batch: usize,
    /// T.
    pub length: usize,
}

impl Sequences {
    /// B T.
    pub fn rows(self) -> usize {
        self.batch * self.length
    }
}

/// What the scratch memory of a backend is sized by: a model's operations on its largest batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WorkspaceShape<'a> {
    /// The linear layers of a block.
    pub linears: &'a [LinearShape],
    /// The norms.
    pub norm: NormShape,
    /// Attention, whatever its factor.
    pub attention: AttentionShape,
    /// The head.
    pub head: HeadShape,
    /// What linear layers may use.
    pub recipes: &'a [LinearRecipe],
    /// The widest input of a linear layer whose channels are merged, where any are.
    pub merge: Option<MergeShape>,
    /// Layers with packed weights, and what these are in ([`Decode`]): those of a decoder.
    pub packed: &'a [(LinearShape, DecoderWeights)],
    /// What linear layers may have beside them.
    pub adapters: &'a [LoraShape],
    /// Whether backward operations will run.
    pub backward: bool,
}

impl WorkspaceShape<'_> {
    /// All backward GEMMs that will run.
    pub fn backward_gemms(&self) -> impl Iterator<Item = &Gemm> {
        let recipes = if self.backward { self.recipes } else { &[] };
        recipes.iter().flat_map(LinearRecipe::backward)
    }
}

/// All that the operations of a micro-step depend on, besides random numbers: it drives the pass,
/// and is the key that a device records the pass under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepPlan {
    /// Whether gradients are added to those of the micro-steps before.
    pub accumulate: bool,
    /// Whether losses have weights.
    pub weighted: bool,
    /// Whether documents are kept apart.
    pub documents: bool,
    /// Of activations and their gradients, and of the products of attention and the head.
    pub precision: Precision,
    /// Formats of the linear layers of each block.
    pub layers: Vec<[LinearRecipe; LINEARS]>,
    /// Positions of each sequence that the blocks between the first and the last keep; None where
    /// they keep all.
    pub kept: Option<usize>,
}

impl StepPlan {
    /// The blocks that do not keep all positions.
    pub fn dropping(&self) -> Range<usize> {
        let between = 1..self.layers.len().saturating_sub(1);
        if self.kept.is_some() { between } else { 0..0 }
    }

    /// Positions of each sequence that a block keeps, where it does not keep all.
    pub fn kept_by(&self, layer: usize) -> Option<usize> {
        self.kept.filter(|_| self.dropping().contains(&layer))
    }
}

/// A device that trains GPTs.
pub trait Backend:
    Memory
    + Embed
    + Norm
    + Rotate
    + Select
    + Merge
    + Linear
    + Adapt
    + Attend
    + Head
    + Exchange
    + Optimize
    + Follow
{
    /// What [`Backend::recorded`] keeps for a trainer.
    type Recordings: Send;

    /// An error that names what the device cannot do for models of a shape, and the remedy.
    fn supports(&self, _shape: &WorkspaceShape<'_>) -> Result<()> {
        Ok(())
    }

    /// Runs `f` where the backend's operations are cheapest to start (on a worker thread, say).
    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R;

    /// No recordings yet.
    fn recordings(&self) -> Self::Recordings;
    /// Does `operations`, which are the same on the same buffers wherever `plan` is the same, but
    /// for random numbers, drawn for `place`: optimizer step and micro-step. A device may record
    /// them and do them from then on without calling `operations`, which is called twice where
    /// recording fails.
    fn recorded(
        &self,
        recordings: &mut Self::Recordings,
        plan: &StepPlan,
        place: [u32; 2],
        operations: impl FnMut(),
    );
}
