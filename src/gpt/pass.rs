//! The GPT itself: forward and backward, written once over `Backend`.
//!
//! Pre-LayerNorm blocks; attention and MLP each add to the residual stream; the head shares its
//! weights with the token embedding (Radford et al. 2019, "GPT-2"), unless the model has others for
//! it.

use super::activations::{ActivationGradients, Activations};
use super::params::{Linear, Matrix, Norm, ParamTable};
use super::{ModelConfig, Shapes};
use crate::backend::{
    AttentionBackward, Backend, Classifier, ClassifierGradient, EmbeddingGradients, Epilogue,
    LinearBackward, LinearForward, MergeShape, Merged, NormBackward, NormParams, NormStatistics,
    OutputGradient, Part, ResidualSum, Sequences, Slot, StepPlan,
};
use crate::formats::{LINEARS, LinearRecipe, Random, projections};

/// What one pass over a batch works with.
pub(crate) struct Pass<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) config: &'a ModelConfig,
    pub(crate) table: &'a ParamTable,
    pub(crate) weights: &'a B::Weights,
    /// Where a recipe rounds weights by them.
    pub(crate) means: Option<Means<'a, B>>,
    /// Whether a backward pass follows.
    pub(crate) trains: bool,
    /// In an evaluation whose recipe merges channels.
    pub(crate) merge: Option<Merging<'a, B>>,
    pub(crate) workspace: &'a mut B::Workspace,
    pub(crate) sequences: Sequences,
    /// All that the pass depends on besides random numbers.
    pub(crate) plan: &'a StepPlan,
}

/// The slow means of the matrices of blocks.
pub(crate) struct Means<'a, B: Backend> {
    pub(crate) flat: &'a B::F32,
    /// All of them, in order.
    pub(crate) matrices: &'a [Matrix],
}

/// How the channels that a linear layer reads are merged, which nothing else reads then.
pub(crate) struct Merging<'a, B: Backend> {
    /// Bits of a hash.
    pub(crate) hashes: usize,
    /// Of the projections.
    pub(crate) seed: u64,
    /// (layers, stride): of a layer the buckets of each linear layer (B), overwritten.
    pub(crate) buckets: &'a mut B::F32,
    pub(crate) stride: usize,
}

/// Where in a run a backward pass is, for its random numbers.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) seed: u64,
    pub(crate) step: u64,
    pub(crate) micro_step: usize,
}

impl<'a, B: Backend> Pass<'a, B> {
    /// Tokens (rows) to the normalized output of the last block, `acts.ln_f`.
    pub(crate) fn forward(&mut self, acts: &mut Activations<B>, tokens: &B::Tokens) {
        let (backend, table) = (self.backend, self.table);
        let (wte, wpe) = (self.param(table.wte), self.param(table.wpe));
        let shape = self.shapes().embedding();
        backend.embedding_forward(&mut acts.residual[0], tokens, wte, wpe, shape);
        self.ln_1(acts, 0);
        for (l, block) in table.blocks.iter().enumerate() {
            self.attention(acts, l);
            self.mlp(acts, l);
            self.merge(&mut acts.gelu[l], block.fc2, l);
            let at = (block.fc2, l, &mut acts.turned[..]);
            self.linear(&mut acts.branch, &acts.gelu[l], at, Epilogue::None);

            // The sum that ends this block, and the norm that begins what follows it.
            let (norm, out, statistics) = match table.blocks.get(l + 1) {
                Some(block) => {
                    (block.ln_1, &mut acts.ln_1[l + 1], acts.ln_1_statistics[l + 1].as_mut())
                }
                None => (table.ln_f, &mut acts.ln_f, acts.ln_f_statistics.as_mut()),
            };
            let (x, y, sum) = (&acts.middle[l], &acts.branch, &mut acts.residual[l + 1]);
            self.add_norm(out, statistics, ResidualSum { sum, x, y }, norm);
        }
    }

    /// The norm of a block's input, from `acts.residual`.
    fn ln_1(&mut self, acts: &mut Activations<B>, l: usize) {
        let (out, statistics) = (&mut acts.ln_1[l], acts.ln_1_statistics[l].as_mut());
        self.norm(out, statistics, &acts.residual[l], self.table.blocks[l].ln_1);
    }

    /// Attention and what it adds to the residual stream, from `acts.ln_1` to `acts.ln_2`.
    fn attention(&mut self, acts: &mut Activations<B>, l: usize) {
        let block = &self.table.blocks[l];
        let shape = self.shapes().attention(l);
        self.merge(&mut acts.ln_1[l], block.qkv, l);
        let at = (block.qkv, l, &mut acts.turned[..]);
        self.linear(&mut acts.qkv[l], &acts.ln_1[l], at, Epilogue::None);
        let (out, lse) = (&mut acts.attention[l], &mut acts.lse[l]);
        self.backend.attention_forward(self.workspace, out, lse, &acts.qkv[l], shape);
        self.merge(&mut acts.attention[l], block.projection, l);
        let at = (block.projection, l, &mut acts.turned[..]);
        self.linear(&mut acts.branch, &acts.attention[l], at, Epilogue::None);

        let (out, statistics) = (&mut acts.ln_2[l], acts.ln_2_statistics[l].as_mut());
        let (x, y, sum) = (&acts.residual[l], &acts.branch, &mut acts.middle[l]);
        self.add_norm(out, statistics, ResidualSum { sum, x, y }, block.ln_2);
    }

    /// The MLP's first layer and GELU, from `acts.ln_2` to `acts.gelu`.
    fn mlp(&mut self, acts: &mut Activations<B>, l: usize) {
        self.merge(&mut acts.ln_2[l], self.table.blocks[l].fc1, l);
        let gelu = Epilogue::Gelu { out: &mut acts.gelu[l], form: self.config.activation };
        let at = (self.table.blocks[l].fc1, l, &mut acts.turned[..]);
        self.linear(&mut acts.fc1[l], &acts.ln_2[l], at, gelu);
    }

    /// Computes again what the forward pass did not keep of layer `l`.
    fn recompute(&mut self, acts: &mut Activations<B>, l: usize) {
        // What layers share is still the last one's.
        if l + 1 == self.config.layers {
            return;
        }
        if acts.qkv.is_shared() {
            self.ln_1(acts, l);
            self.attention(acts, l);
            self.mlp(acts, l);
        } else if acts.gelu.is_shared() && acts.turned.is_empty() {
            let elements = self.sequences.rows() * self.config.mlp_width();
            self.ln_1(acts, l);
            let (out, statistics) = (&mut acts.ln_2[l], acts.ln_2_statistics[l].as_mut());
            self.norm(out, statistics, &acts.middle[l], self.table.blocks[l].ln_2);
            let form = self.config.activation;
            self.backend.gelu_forward(&mut acts.gelu[l], &acts.fc1[l], elements, form);
        }
    }

    /// Losses of all rows after [`Pass::forward`].
    pub(crate) fn loss(&mut self, acts: &mut Activations<B>, targets: &B::Tokens) {
        self.classify(acts, targets, None);
    }

    /// Losses of all rows, and the gradients of `scale` times their sum, but for what the
    /// embeddings get as such: those of the step's first micro-step overwrite `grads`, others are
    /// added.
    pub(crate) fn loss_and_backward(
        &mut self,
        acts: &mut Activations<B>,
        d: &mut ActivationGradients<B>,
        grads: &mut B::F32,
        targets: &B::Tokens,
        scale: f32,
        place: Place,
    ) {
        let (backend, table, accumulate) = (self.backend, self.table, self.plan.accumulate);
        let [dw] = backend.gradients(grads, [table.head()]);
        let gradient = ClassifierGradient { dx: &mut d.narrow, dw, scale, accumulate };
        self.classify(acts, targets, Some(gradient));
        backend.zero_tensor(&mut d.residual);
        let last = &acts.residual[self.config.layers];
        self.norm_backward(d, grads, last, &acts.ln_f_statistics, table.ln_f);

        for (l, block) in table.blocks.iter().enumerate().rev() {
            self.recompute(acts, l);
            let at = (place, l, &acts.turned[..]);

            // MLP: d.residual is the gradient of the block's output, and passes to its input.
            let dy = OutputGradient::Whole(&d.residual);
            self.linear_backward(&mut d.wide, grads, dy, &acts.gelu[l], block.fc2, at);
            let (y, form) = (&acts.fc1[l], self.config.activation);
            let dy = OutputGradient::BehindGelu { d: &mut d.wide, y, form };
            self.linear_backward(&mut d.narrow, grads, dy, &acts.ln_2[l], block.fc1, at);
            let (x, statistics) = (&acts.middle[l], &acts.ln_2_statistics[l]);
            self.norm_backward(d, grads, x, statistics, block.ln_2);

            // Attention.
            let dy = OutputGradient::Whole(&d.residual);
            let x = &acts.attention[l];
            self.linear_backward(&mut d.narrow, grads, dy, x, block.projection, at);
            let operands = AttentionBackward {
                dqkv: &mut d.wide,
                dout: &d.narrow,
                out: &acts.attention[l],
                lse: &acts.lse[l],
                qkv: &acts.qkv[l],
            };
            let shape = self.shapes().attention(l);
            backend.attention_backward(self.workspace, operands, shape);
            let dy = OutputGradient::Whole(&d.wide);
            self.linear_backward(&mut d.narrow, grads, dy, &acts.ln_1[l], block.qkv, at);
            let (x, statistics) = (&acts.residual[l], &acts.ln_1_statistics[l]);
            self.norm_backward(d, grads, x, statistics, block.ln_1);
        }
    }

    /// The gradients of the embeddings, after [`Pass::loss_and_backward`].
    pub(crate) fn embedding_backward(
        &mut self,
        d: &ActivationGradients<B>,
        grads: &mut B::F32,
        tokens: &B::Tokens,
    ) {
        let (backend, table, accumulate) = (self.backend, self.table, self.plan.accumulate);
        // Only a head that shares them has overwritten the last step's gradients.
        if table.has_own_head() && !accumulate {
            let [dwte] = backend.gradients(grads, [table.wte]);
            backend.zero_gradient(dwte);
        }
        let [dwte, dwpe] = backend.gradients(grads, [table.wte, table.wpe]);
        let gradients = EmbeddingGradients { dwte, dwpe, accumulate };
        backend.embedding_backward(gradients, &d.residual, tokens, self.shapes().embedding());
    }

    /// Logits (V) of row `row` after [`Pass::forward`].
    pub(crate) fn logits(&mut self, acts: &Activations<B>, row: usize, out: &mut B::F32) {
        let (head, shape) = (self.param(self.table.head()), self.shapes().head());
        self.backend.logits(self.workspace, out, &acts.ln_f, row, head, shape);
    }

    fn param(&self, slot: Slot) -> B::Param<'a> {
        self.backend.param(self.weights, slot)
    }

    fn norm_params(&self, norm: Norm) -> NormParams<'a, B> {
        NormParams { w: self.param(norm.w), b: self.param(norm.b) }
    }

    fn recipe(&self, block: usize, layer: Linear) -> &'a LinearRecipe {
        &self.plan.layers[block][layer.number as usize]
    }

    fn mean(&self, block: usize, layer: Linear) -> Option<Part<'a, B>> {
        let Means { flat, matrices } = self.means.as_ref()?;
        let slot = matrices[block * LINEARS + layer.number as usize].own;
        Some(Part { flat, slot })
    }

    fn shapes(&self) -> Shapes<'a> {
        let (sequences, precision) = (self.sequences, self.plan.precision);
        Shapes { config: self.config, sequences, precision }
    }

    fn norm(
        &self,
        out: &mut B::Tensor,
        statistics: NormStatistics<&mut B::F32>,
        x: &B::Tensor,
        norm: Norm,
    ) {
        let (params, shape) = (self.norm_params(norm), self.shapes().norm());
        self.backend.layernorm_forward(out, statistics, x, params, shape);
    }

    fn add_norm(
        &self,
        out: &mut B::Tensor,
        statistics: NormStatistics<&mut B::F32>,
        sum: ResidualSum<'_, B>,
        norm: Norm,
    ) {
        let (params, shape) = (self.norm_params(norm), self.shapes().norm());
        self.backend.add_layernorm_forward(out, statistics, sum, params, shape);
    }

    fn classify<'o>(
        &mut self,
        acts: &'o mut Activations<B>,
        targets: &'o B::Tokens,
        gradient: Option<ClassifierGradient<'o, B>>,
    ) where
        'a: 'o,
    {
        let (w, shape) =
            (self.backend.param(self.weights, self.table.head()), self.shapes().head());
        let Activations { losses, ln_f: x, .. } = acts;
        let operands = Classifier { losses, gradient, x, w, targets };
        self.backend.classifier(self.workspace, operands, shape);
    }

    /// Merges the channels of what a layer is about to read, where that is asked for.
    fn merge(&mut self, x: &mut B::Tensor, layer: Linear, block: usize) {
        let sequences = self.sequences;
        let channels = self.shapes().linears()[layer.number as usize].inputs;
        let Some(Merging { hashes, seed, buckets, stride }) = &mut self.merge else { return };
        let at = block * *stride + layer.number as usize * sequences.batch;
        let merged = Merged { x, buckets: &mut **buckets, at };
        let shape = MergeShape { sequences, channels, hashes: *hashes };
        let draw = projections(*seed, block as u32, layer.number);
        self.backend.merge_channels(self.workspace, merged, shape, &draw);
    }

    fn linear(
        &mut self,
        y: &mut B::Tensor,
        x: &B::Tensor,
        (layer, block, turned): (Linear, usize, &mut [[B::Turned; LINEARS]]),
        epilogue: Epilogue<'_, B>,
    ) {
        let [w, b] = [layer.w, layer.b].map(|slot| self.backend.param(self.weights, slot));
        let mean = self.mean(block, layer);
        let turned = turned.get_mut(block).filter(|_| self.trains);
        let turned = turned.map(|all| &mut all[layer.number as usize]);
        let operands = LinearForward { y, x, w, b, mean, epilogue, turned };
        let (shape, recipe) =
            (self.shapes().linears()[layer.number as usize], self.recipe(block, layer));
        self.backend.linear_forward(self.workspace, operands, shape, recipe);
    }

    fn linear_backward(
        &mut self,
        dx: &mut B::Tensor,
        grads: &mut B::F32,
        dy: OutputGradient<'_, B>,
        x: &B::Tensor,
        layer: Linear,
        (place, block, turned): (Place, usize, &[[B::Turned; LINEARS]]),
    ) {
        let [dw, db] = self.backend.gradients(grads, [layer.w, layer.b]);
        let w = self.backend.param(self.weights, layer.w);
        let (mean, accumulate) = (self.mean(block, layer), self.plan.accumulate);
        let turned = turned.get(block).map(|all| &all[layer.number as usize]);
        let operands = LinearBackward { dx, dw, db, dy, x, turned, w, mean, accumulate };
        let random = Random {
            seed: place.seed,
            step: place.step as u32,
            micro_step: place.micro_step as u32,
            layer: block as u32,
            linear: layer.number,
        };
        let (shape, recipe) =
            (self.shapes().linears()[layer.number as usize], self.recipe(block, layer));
        self.backend.linear_backward(self.workspace, operands, shape, recipe, &random);
    }

    /// Adds the norm's part to d.residual, given the gradient of its output in d.narrow.
    fn norm_backward(
        &mut self,
        d: &mut ActivationGradients<B>,
        grads: &mut B::F32,
        x: &B::Tensor,
        statistics: &NormStatistics<B::F32>,
        norm: Norm,
    ) {
        let [dw, db] = self.backend.gradients(grads, [norm.w, norm.b]);
        let w = self.backend.param(self.weights, norm.w);
        let (dx, dy, statistics) = (&mut d.residual, &d.narrow, statistics.as_ref());
        let accumulate = self.plan.accumulate;
        let operands = NormBackward { dx, dw, db, dy, x, statistics, w, accumulate };
        self.backend.layernorm_backward(self.workspace, operands, self.shapes().norm());
    }
}
