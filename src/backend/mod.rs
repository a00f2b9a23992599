//! The operations that training a GPT needs, over opaque buffers.
//!
//! Shapes: B sequences, T tokens each, `rows` = B T, C channels, M inside an MLP, H heads of C / H
//! channels, V tokens in the vocabulary. Everything is dense and row-major. Unless an operation
//! says "adds to", it overwrites its outputs. Gradients of parameters are added to with
//! `accumulate`, which a step's first micro-step is without.
//!
//! Model code is written once over [`Backend`]; an implementation keeps its buffers in the precision
//! that suits the device. Every operation has a plain scalar twin, which the tests of each backend
//! compare it with.
//!
//! Operations return nothing: a device may run them later than the call. What went wrong on it shows
//! at the next call that reads from it, as an error.

pub mod cpu;
pub(crate) mod cuda;
mod device;
#[cfg(test)]
pub(crate) mod reference;

pub(crate) use device::Device;

use crate::Result;
use crate::mx::{Draw, Element, Gemm, LinearRecipe, Random};

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
        match forward.format().element() {
            Element::F32 => Self::F32,
            Element::Bf16 | Element::E4m3 | Element::E2m1 => Self::Bf16,
        }
    }
}

/// What an MLP applies between its two layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// GELU in its tanh form, x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as GPT-2 has it.
    #[default]
    GeluTanh,
    /// GELU itself, x times the normal distribution's probability of less than x.
    Gelu,
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

/// Sizes of an attention operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// B and T.
    pub sequences: Sequences,
    /// H.
    pub heads: usize,
    /// C / H.
    pub head_size: usize,
    /// Of the scores, which are divided by sqrt(head size) besides: 1 in GPT-2.
    pub score_factor: f32,
    /// Of its products, where a backend has a choice.
    pub precision: Precision,
}

/// Sizes of a linear layer: y (rows, outputs) = x (rows, inputs) W (outputs, inputs)^T + b.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Tokens.
    pub rows: usize,
    /// Channels that come in.
    pub inputs: usize,
    /// Channels that go out.
    pub outputs: usize,
}

/// What the scratch memory of a backend is sized by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkspaceShape<'a> {
    /// B and T of the largest batch.
    pub sequences: Sequences,
    /// C.
    pub channels: usize,
    /// M.
    pub mlp_channels: usize,
    /// H.
    pub heads: usize,
    /// V.
    pub vocab_size: usize,
    /// What linear layers may use.
    pub recipes: &'a [LinearRecipe],
    /// Whether backward operations will run.
    pub backward: bool,
}

impl WorkspaceShape<'_> {
    /// Of activations: f32 where any recipe has them so.
    pub fn precision(&self) -> Precision {
        let mut all = self.recipes.iter().map(|recipe| Precision::of(recipe.forward()));
        if all.any(|p| p == Precision::F32) { Precision::F32 } else { Precision::Bf16 }
    }

    /// All backward GEMMs that will run.
    pub fn backward_gemms(&self) -> impl Iterator<Item = &Gemm> {
        let recipes = if self.backward { self.recipes } else { &[] };
        recipes.iter().flat_map(LinearRecipe::backward)
    }
}

/// Mean and reciprocal standard deviation of every row that a LayerNorm saw, (rows) each.
pub struct NormStatistics<T> {
    /// Mean.
    pub mean: T,
    /// 1 / sqrt(variance + epsilon).
    pub rstd: T,
}

impl<T> NormStatistics<T> {
    /// Borrows both.
    pub fn as_ref(&self) -> NormStatistics<&T> {
        NormStatistics { mean: &self.mean, rstd: &self.rstd }
    }

    /// Borrows both, to be overwritten.
    pub fn as_mut(&mut self) -> NormStatistics<&mut T> {
        NormStatistics { mean: &mut self.mean, rstd: &mut self.rstd }
    }
}

/// Settings of one AdamW update.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// 1 for the first update.
    pub t: u64,
    /// Largest global norm of the gradient, which is scaled down to it; 0 does not clip.
    pub clip: f32,
    /// Factor of the sum of losses that makes it the step's loss.
    pub loss_scale: f32,
    /// Largest norm of the clipped gradient with which the update is made; with a larger one nothing
    /// changes.
    pub largest_gradient: f32,
}

impl AdamWStep {
    /// The learning rate with the correction for first moments that start at 0. Corrections are
    /// computed in f64: beta^t is close to 1 for long.
    pub fn size(&self) -> f32 {
        (f64::from(self.lr) / self.correction(self.beta1)) as f32
    }

    /// Factor of the root of second moments, which start at 0, too.
    pub fn root(&self) -> f32 {
        (1.0 / self.correction(self.beta2).sqrt()) as f32
    }

    /// What weight decay leaves of a weight.
    pub fn keep(&self) -> f32 {
        1.0 - self.lr * self.weight_decay
    }

    fn correction(&self, beta: f32) -> f64 {
        1.0 - f64::from(beta).powf(self.t as f64)
    }
}

/// Largest magnitudes of weights and of their moments; NaN where one of them is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Largest {
    /// Of weights.
    pub weight: f32,
    /// Of first moments.
    pub m: f32,
    /// Of second moments.
    pub v: f32,
}

impl Largest {
    /// Takes in another's, whose numbers are finite.
    pub fn include(&mut self, other: Self) {
        self.weight = self.weight.max(other.weight);
        self.m = self.m.max(other.m);
        self.v = self.v.max(other.v);
    }
}

/// All that the operations of a micro-step depend on, besides random numbers, for one trainer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepKind {
    /// Whether gradients are added to those of the micro-steps before.
    pub accumulate: bool,
    /// Whether the recipe has come to its last steps, with other formats.
    pub in_last_steps: bool,
}

/// What an optimizer step found before it changed anything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepSums {
    /// Sum of the losses that [`Backend::add_losses`] added.
    pub losses: f64,
    /// Sum of the squares of all gradients.
    pub squares: f64,
    /// Blocks of MXFP4 operands that were rounded with a larger scale than their own, because the device
    /// multiplies in a format that the scale does not fit.
    pub raised_blocks: u64,
}

impl StepSums {
    /// Mean loss and global norm of the gradient.
    pub fn loss_and_norm(&self, step: &AdamWStep) -> (f32, f32) {
        ((self.losses * f64::from(step.loss_scale)) as f32, self.squares.sqrt() as f32)
    }

    /// Norm of the clipped gradient.
    pub fn clipped_norm(&self, step: &AdamWStep) -> f32 {
        let (_, norm) = self.loss_and_norm(step);
        if step.clip > 0.0 { norm.min(step.clip) } else { norm }
    }

    /// Factor of the gradient that clipping asks for; None where the loss or the norm is not finite or
    /// the clipped norm above its limit, and nothing may be updated. PyTorch's clip_grad_norm_ adds the
    /// same 1e-6.
    pub fn gradient_scale(&self, step: &AdamWStep) -> Option<f32> {
        let (loss, norm) = self.loss_and_norm(step);
        let excess = step.clip / (norm + 1e-6);
        let scale = if step.clip > 0.0 { excess.min(1.0) } else { 1.0 };
        let is_within = self.clipped_norm(step) <= step.largest_gradient;
        (loss.is_finite() && norm.is_finite() && is_within).then_some(scale)
    }
}

/// A parameter with all that training keeps for it; all four have one length.
pub struct Trained<'a, B: Backend> {
    /// The parameter.
    pub param: &'a mut B::Param,
    /// First moment.
    pub m: &'a mut B::F32,
    /// Second moment.
    pub v: &'a mut B::F32,
    /// Gradient.
    pub gradient: &'a mut B::F32,
    /// Whether weight decay applies.
    pub decays: bool,
}

/// Calls its argument with every parameter, in one order.
pub type VisitTrained<'a, B> = dyn FnMut(&mut dyn FnMut(Trained<'_, B>)) + Send + 'a;

/// A device that trains GPTs.
pub trait Backend: Send + Sync + Sized + 'static {
    /// Memory that buffers are cut from; see [`Backend::arena`].
    type Arena;
    /// Activations and their gradients, in the backend's compute precision.
    type Tensor: Send;
    /// f32 on the device: statistics, losses, parameter gradients, moments.
    type F32: Send;
    /// A parameter: f32 master values, and whatever copy the kernels read.
    type Param: Send;
    /// Token numbers.
    type Tokens: Send;
    /// Scratch memory of the kernels.
    type Workspace: Send;
    /// What optimizer steps keep besides the moments: sums, tables of buffers.
    type Optimizer: Send;
    /// What [`Backend::recorded`] keeps for a trainer.
    type Recordings: Send;

    /// An error that names what the device cannot do for models of a shape, and the remedy.
    fn supports(&self, _shape: &WorkspaceShape) -> Result<()> {
        Ok(())
    }

    // --- Memory ---

    /// An arena of `bytes` bytes, or for `None` one that only measures: it hands out buffers that must
    /// not be used and counts their bytes.
    fn arena(&self, bytes: Option<usize>) -> Result<Self::Arena>;
    /// Bytes that an arena has handed out.
    fn arena_used(&self, arena: &Self::Arena) -> usize;
    /// A zeroed activation buffer of `len` elements.
    fn tensor(&self, arena: &mut Self::Arena, len: usize, precision: Precision) -> Self::Tensor;
    /// A zeroed f32 buffer of `len` elements.
    fn f32(&self, arena: &mut Self::Arena, len: usize) -> Self::F32;
    /// A zeroed parameter of `len` elements.
    fn param(&self, arena: &mut Self::Arena, len: usize) -> Self::Param;
    /// A buffer of `len` tokens; an error where the host lacks memory for it.
    fn tokens(&self, arena: &mut Self::Arena, len: usize) -> Result<Self::Tokens>;
    /// Scratch memory for models of a shape.
    fn workspace(&self, arena: &mut Self::Arena, shape: &WorkspaceShape) -> Self::Workspace;

    /// What steps over `parameters` parameters need; an error where the host lacks memory for it.
    fn optimizer(&self, arena: &mut Self::Arena, parameters: usize) -> Result<Self::Optimizer>;

    /// Copies tokens to the start of a buffer that is at least as long.
    fn write_tokens(&self, to: &mut Self::Tokens, from: &[u32]);
    /// Copies f32 values to the device; both have the same length.
    fn write_f32(&self, to: &mut Self::F32, from: &[f32]) -> Result<()>;
    /// Copies the first `to.len()` f32 values to the host, after all that was asked for before.
    fn read_f32(&self, from: &Self::F32, to: &mut [f32]) -> Result<()>;
    /// Overwrites a parameter; both have the same length.
    fn write_param(&self, to: &mut Self::Param, from: &[f32]) -> Result<()>;
    /// Overwrites a parameter with normal values of a standard deviation, `mx::fill_normal`'s from row 0
    /// on, bit for bit.
    fn draw_param(&self, to: &mut Self::Param, std: f32, draw: &Draw) -> Result<()>;
    /// Copies the master values of a parameter to the host; both have the same length.
    fn read_param(&self, from: &Self::Param, to: &mut [f32]) -> Result<()>;
    /// Sets every element to 0.
    fn zero_tensor(&self, buffer: &mut Self::Tensor);
    /// Sets every element to 0.
    fn zero_f32(&self, buffer: &mut Self::F32);

    /// Runs `f` where the backend's operations are cheapest to start (on a worker thread, say).
    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R;

    /// No recordings yet.
    fn recordings(&self) -> Self::Recordings;
    /// Does `operations`, which are the same on the same buffers wherever `kind` is the same, but for
    /// random numbers, drawn for `place`: optimizer step and micro-step. A device may record them and do
    /// them from then on without calling `operations`, which is called twice where recording fails.
    fn recorded(
        &self,
        recordings: &mut Self::Recordings,
        kind: StepKind,
        place: [u32; 2],
        operations: impl FnMut(),
    );

    // --- Embedding ---

    /// out (B T, C): row `token` of wte plus row `position` of wpe.
    fn embedding_forward(
        &self,
        out: &mut Self::Tensor,
        tokens: &Self::Tokens,
        wte: &Self::Param,
        wpe: &Self::Param,
        sequences: Sequences,
        channels: usize,
    );
    /// Adds dout to the rows of dwte (V, C) and dwpe (context, C) that the forward pass read; what dwpe
    /// held counts only with `accumulate`. `tokens` are those of the last [`Backend::write_tokens`].
    fn embedding_backward(
        &self,
        dwte: &mut Self::F32,
        dwpe: &mut Self::F32,
        dout: &Self::Tensor,
        tokens: &Self::Tokens,
        sequences: Sequences,
        channels: usize,
        accumulate: bool,
    );

    // --- LayerNorm ---

    /// out (rows, C) = (x - mean) rstd w + b, and the statistics for the backward pass.
    fn layernorm_forward(
        &self,
        out: &mut Self::Tensor,
        statistics: NormStatistics<&mut Self::F32>,
        x: &Self::Tensor,
        w: &Self::Param,
        b: &Self::Param,
        rows: usize,
        channels: usize,
        epsilon: f32,
    );
    /// sum (rows, C) = x + y, then the LayerNorm of that sum.
    fn add_layernorm_forward(
        &self,
        out: &mut Self::Tensor,
        sum: &mut Self::Tensor,
        statistics: NormStatistics<&mut Self::F32>,
        x: &Self::Tensor,
        y: &Self::Tensor,
        w: &Self::Param,
        b: &Self::Param,
        rows: usize,
        channels: usize,
        epsilon: f32,
    );
    /// Adds to dx (rows, C); overwrites dw (C) and db (C), or with `accumulate` adds to them.
    fn layernorm_backward(
        &self,
        workspace: &mut Self::Workspace,
        dx: &mut Self::Tensor,
        dw: &mut Self::F32,
        db: &mut Self::F32,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        statistics: NormStatistics<&Self::F32>,
        w: &Self::Param,
        rows: usize,
        channels: usize,
        accumulate: bool,
    );

    // --- Linear layers ---

    /// y = x W^T + b.
    fn linear_forward(
        &self,
        workspace: &mut Self::Workspace,
        y: &mut Self::Tensor,
        x: &Self::Tensor,
        w: &Self::Param,
        b: &Self::Param,
        shape: LinearShape,
        recipe: &LinearRecipe,
    );
    /// pre = x W^T + b and out = gelu(pre), both (rows, outputs), in one of GELU's forms.
    fn linear_gelu_forward(
        &self,
        workspace: &mut Self::Workspace,
        out: &mut Self::Tensor,
        pre: &mut Self::Tensor,
        x: &Self::Tensor,
        w: &Self::Param,
        b: &Self::Param,
        shape: LinearShape,
        recipe: &LinearRecipe,
        form: Activation,
    ) {
        self.linear_forward(workspace, pre, x, w, b, shape, recipe);
        self.gelu_forward(out, pre, shape.rows * shape.outputs, form);
    }
    /// dx = dy W, dw = dy^T x and db = the column sums of dy, the latter two added to what is there with
    /// `accumulate`.
    ///
    /// `random` says where in the run this is, for the bits of rounding and transforms.
    fn linear_backward(
        &self,
        workspace: &mut Self::Workspace,
        dx: &mut Self::Tensor,
        dw: &mut Self::F32,
        db: &mut Self::F32,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        w: &Self::Param,
        shape: LinearShape,
        recipe: &LinearRecipe,
        random: &Random,
        accumulate: bool,
    );
    /// [`Backend::linear_backward`] where dy is the gradient of gelu(pre), not yet of `pre`, the layer's
    /// result. What dy holds afterwards is not said.
    fn linear_gelu_backward(
        &self,
        workspace: &mut Self::Workspace,
        dx: &mut Self::Tensor,
        dw: &mut Self::F32,
        db: &mut Self::F32,
        dy: &mut Self::Tensor,
        pre: &Self::Tensor,
        x: &Self::Tensor,
        w: &Self::Param,
        shape: LinearShape,
        recipe: &LinearRecipe,
        random: &Random,
        accumulate: bool,
        form: Activation,
    ) {
        self.gelu_backward(dy, pre, shape.rows * shape.outputs, form);
        self.linear_backward(workspace, dx, dw, db, dy, x, w, shape, recipe, random, accumulate);
    }

    /// out = gelu(x), both of `len` elements.
    fn gelu_forward(&self, out: &mut Self::Tensor, x: &Self::Tensor, len: usize, form: Activation);
    /// d = d gelu'(x), in place, both of `len` elements.
    fn gelu_backward(&self, d: &mut Self::Tensor, x: &Self::Tensor, len: usize, form: Activation);

    // --- Attention ---

    /// out (B, T, C) = softmax(factor q k^T / sqrt(head size), causal) v from qkv (B, T, 3 C): q, k
    /// and v of C channels each, heads side by side. `lse` (B, H, T) keeps the logarithm of each
    /// row's sum.
    fn attention_forward(
        &self,
        workspace: &mut Self::Workspace,
        out: &mut Self::Tensor,
        lse: &mut Self::F32,
        qkv: &Self::Tensor,
        shape: AttentionShape,
    );
    /// dqkv (B, T, 3 C) from dout (B, T, C).
    fn attention_backward(
        &self,
        workspace: &mut Self::Workspace,
        dqkv: &mut Self::Tensor,
        dout: &Self::Tensor,
        out: &Self::Tensor,
        lse: &Self::F32,
        qkv: &Self::Tensor,
        shape: AttentionShape,
    );

    // --- Language-model head and loss ---
    //
    // `wte` are the head's weights (V, C): the token embedding's, unless the model has others.

    /// Cross-entropy of softmax(x wte^T) against `targets`, one loss a row, without ever holding the
    /// logits of more than a chunk of rows.
    ///
    /// With `gradient` it also computes the gradients of `gradient.scale` times the sum of the losses.
    fn classifier(
        &self,
        workspace: &mut Self::Workspace,
        losses: &mut Self::F32,
        gradient: Option<ClassifierGradient<'_, Self>>,
        x: &Self::Tensor,
        wte: &Self::Param,
        targets: &Self::Tokens,
        rows: usize,
        channels: usize,
        vocab_size: usize,
        precision: Precision,
    );
    /// Logits (V) of row `row` of x (rows, C).
    fn logits(
        &self,
        workspace: &mut Self::Workspace,
        logits: &mut Self::F32,
        x: &Self::Tensor,
        row: usize,
        wte: &Self::Param,
        channels: usize,
        vocab_size: usize,
        precision: Precision,
    );

    // --- Optimizer ---

    /// Takes the sum of the first `rows` losses as that of the step, or with `accumulate` adds it.
    fn add_losses(
        &self,
        optimizer: &mut Self::Optimizer,
        losses: &Self::F32,
        rows: usize,
        accumulate: bool,
    );
    /// The global norm of the gradients, clipping, and one AdamW update of every parameter, unless
    /// loss or norm is not finite or the norm above `step`'s limit: then nothing changes. `workspace` is
    /// that of the step's operations, which count raised blocks in it. Waits for the device.
    fn finish_step(
        &self,
        workspace: &mut Self::Workspace,
        optimizer: &mut Self::Optimizer,
        parameters: &mut VisitTrained<'_, Self>,
        step: &AdamWStep,
    ) -> Result<StepSums>;
    /// Computes the update of [`Backend::finish_step`], which found `sums`, for every parameter without
    /// storing it, and calls `largest` with what it would leave of each, in their order. Waits for the
    /// device.
    fn try_step(
        &self,
        optimizer: &mut Self::Optimizer,
        parameters: &mut VisitTrained<'_, Self>,
        step: &AdamWStep,
        sums: &StepSums,
        largest: &mut (dyn FnMut(Largest) + Send),
    ) -> Result<()>;
    /// The sum of the first `rows` losses, of an evaluation. Waits for the device.
    fn sum_losses(
        &self,
        optimizer: &mut Self::Optimizer,
        losses: &Self::F32,
        rows: usize,
    ) -> Result<f64>;
}

/// Where [`Backend::classifier`] puts gradients.
pub struct ClassifierGradient<'a, B: Backend> {
    /// (rows, C), overwritten.
    pub dx: &'a mut B::Tensor,
    /// (V, C), overwritten, or with `accumulate` added to.
    pub dwte: &'a mut B::F32,
    /// Factor of each loss.
    pub scale: f32,
    /// Whether what dwte held counts.
    pub accumulate: bool,
}
