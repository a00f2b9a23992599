//! The GPT itself: forward and backward, written once over `Backend`.
//!
//! Pre-LayerNorm blocks; attention and MLP each add to the residual stream; the head shares its
//! weights with the token embedding (Radford et al. 2019, "GPT-2"), unless the model has others for
//! it.

use super::ModelConfig;
use super::activations::{ActivationGradients, Activations};
use super::params::{Linear, Norm, Params};
use crate::backend::{
    AttentionShape, Backend, ClassifierGradient, LinearShape, NormStatistics, Precision, Sequences,
};
use crate::mx::{LinearRecipe, Random};
use crate::recipe::Recipe;

/// Numbers of a block's linear layers in the counter of random bits.
const QKV: u32 = 0;
const PROJECTION: u32 = 1;
const FC1: u32 = 2;
const FC2: u32 = 3;

/// What one pass over a batch works with.
pub(crate) struct Pass<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) config: &'a ModelConfig,
    pub(crate) params: &'a Params<B::Param>,
    pub(crate) workspace: &'a mut B::Workspace,
    pub(crate) sequences: Sequences,
    pub(crate) recipe: &'a Recipe,
}

/// Where in a run a backward pass is.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) seed: u64,
    pub(crate) step: u64,
    pub(crate) micro_step: usize,
    /// Steps of the schedule that are done.
    pub(crate) schedule_step: u64,
    /// Steps of the whole schedule, 0 where not known; recipes may change towards the end.
    pub(crate) total_steps: u64,
}

impl<B: Backend> Pass<'_, B> {
    /// Tokens (rows) to the normalized output of the last block, `acts.ln_f`.
    pub(crate) fn forward(&mut self, acts: &mut Activations<B>, tokens: &B::Tokens) {
        let (backend, params) = (self.backend, self.params);
        let (rows, c) = (self.sequences.rows(), self.config.channels);
        let (m, epsilon) = (self.config.mlp_width(), self.config.layer_norm_epsilon);

        let (wte, wpe) = (&params.wte, &params.wpe);
        backend.embedding_forward(&mut acts.residual[0], tokens, wte, wpe, self.sequences, c);
        self.ln_1(acts, 0);
        for (l, block) in params.blocks.iter().enumerate() {
            self.attention(acts, l);
            self.mlp(acts, l);
            self.linear(&mut acts.branch, &acts.gelu[l], &block.fc2, m, c);

            // The sum that ends this block, and the norm that begins what follows it.
            let (Norm { w, b }, out, statistics) = match params.blocks.get(l + 1) {
                Some(block) => {
                    (&block.ln_1, &mut acts.ln_1[l + 1], acts.ln_1_statistics[l + 1].as_mut())
                }
                None => (&params.ln_f, &mut acts.ln_f, acts.ln_f_statistics.as_mut()),
            };
            let (x, y, sum) = (&acts.middle[l], &acts.branch, &mut acts.residual[l + 1]);
            backend.add_layernorm_forward(out, sum, statistics, x, y, w, b, rows, c, epsilon);
        }
    }

    /// The norm of a block's input, from `acts.residual`.
    fn ln_1(&mut self, acts: &mut Activations<B>, l: usize) {
        let Norm { w, b } = &self.params.blocks[l].ln_1;
        let (out, statistics) = (&mut acts.ln_1[l], acts.ln_1_statistics[l].as_mut());
        self.norm(out, statistics, &acts.residual[l], w, b);
    }

    /// Attention and what it adds to the residual stream, from `acts.ln_1` to `acts.ln_2`.
    fn attention(&mut self, acts: &mut Activations<B>, l: usize) {
        let (backend, block) = (self.backend, &self.params.blocks[l]);
        let (rows, c) = (self.sequences.rows(), self.config.channels);
        let epsilon = self.config.layer_norm_epsilon;
        let shape = self.attention_shape(l);
        self.linear(&mut acts.qkv[l], &acts.ln_1[l], &block.qkv, c, 3 * c);
        let (out, lse) = (&mut acts.attention[l], &mut acts.lse[l]);
        backend.attention_forward(self.workspace, out, lse, &acts.qkv[l], shape);
        self.linear(&mut acts.branch, &acts.attention[l], &block.projection, c, c);

        let Norm { w, b } = &block.ln_2;
        let (out, sum, statistics) =
            (&mut acts.ln_2[l], &mut acts.middle[l], acts.ln_2_statistics[l].as_mut());
        let (x, y) = (&acts.residual[l], &acts.branch);
        backend.add_layernorm_forward(out, sum, statistics, x, y, w, b, rows, c, epsilon);
    }

    /// The MLP's first layer and GELU, from `acts.ln_2` to `acts.gelu`.
    fn mlp(&mut self, acts: &mut Activations<B>, l: usize) {
        let (rows, c) = (self.sequences.rows(), self.config.channels);
        let (Linear { w, b }, recipe) = (&self.params.blocks[l].fc1, self.recipe.linear());
        let (out, pre, x) = (&mut acts.gelu[l], &mut acts.fc1[l], &acts.ln_2[l]);
        let (backend, workspace) = (self.backend, &mut *self.workspace);
        let shape = LinearShape { rows, inputs: c, outputs: self.config.mlp_width() };
        let form = self.config.activation;
        backend.linear_gelu_forward(workspace, out, pre, x, w, b, shape, recipe, form);
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
        } else if acts.gelu.is_shared() {
            let elements = self.sequences.rows() * self.config.mlp_width();
            self.ln_1(acts, l);
            let Norm { w, b } = &self.params.blocks[l].ln_2;
            let (out, statistics) = (&mut acts.ln_2[l], acts.ln_2_statistics[l].as_mut());
            self.norm(out, statistics, &acts.middle[l], w, b);
            let form = self.config.activation;
            self.backend.gelu_forward(&mut acts.gelu[l], &acts.fc1[l], elements, form);
        }
    }

    /// Losses of all rows after [`Pass::forward`].
    pub(crate) fn loss(&mut self, acts: &mut Activations<B>, targets: &B::Tokens) {
        self.classify(acts, targets, None);
    }

    /// Losses of all rows, and the gradients of `scale` times their sum, but for what the embeddings get
    /// as such: those of the step's first micro-step overwrite `grads`, others are added.
    pub(crate) fn backward(
        &mut self,
        acts: &mut Activations<B>,
        d: &mut ActivationGradients<B>,
        grads: &mut Params<B::F32>,
        targets: &B::Tokens,
        scale: f32,
        place: Place,
    ) {
        let (backend, params) = (self.backend, self.params);
        let (c, m) = (self.config.channels, self.config.mlp_width());
        // The first micro-step of a step overwrites the last step's gradients.
        let accumulate = place.micro_step > 0;

        let gradient =
            ClassifierGradient { dx: &mut d.narrow, dwte: grads.head_mut(), scale, accumulate };
        self.classify(acts, targets, Some(gradient));
        backend.zero_tensor(&mut d.residual);
        let last = &acts.residual[self.config.layers];
        self.norm_backward(
            d,
            &mut grads.ln_f,
            last,
            &acts.ln_f_statistics,
            &params.ln_f,
            accumulate,
        );

        for (l, block) in params.blocks.iter().enumerate().rev() {
            self.recompute(acts, l);
            let grads = &mut grads.blocks[l];
            let layers = self.config.layers;
            let recipe = self.recipe.for_layer(l, layers, place.schedule_step, place.total_steps);
            let random = |linear| Random {
                seed: place.seed,
                step: place.step as u32,
                micro_step: place.micro_step as u32,
                layer: l as u32,
                linear,
            };

            // MLP: d.residual is the gradient of the block's output, and passes to its input.
            let call = LinearCall { inputs: m, outputs: c, recipe, random: random(FC2) };
            let (dx, dy, x) = (&mut d.wide, &d.residual, &acts.gelu[l]);
            self.linear_backward(dx, &mut grads.fc2, dy, x, &block.fc2, call);
            let call = LinearCall { inputs: c, outputs: m, recipe, random: random(FC1) };
            let (dx, dy, pre, x) = (&mut d.narrow, &mut d.wide, &acts.fc1[l], &acts.ln_2[l]);
            self.linear_gelu_backward(dx, &mut grads.fc1, dy, pre, x, &block.fc1, call);
            let (x, statistics) = (&acts.middle[l], &acts.ln_2_statistics[l]);
            self.norm_backward(d, &mut grads.ln_2, x, statistics, &block.ln_2, accumulate);

            // Attention.
            let random_projection = random(PROJECTION);
            let call = LinearCall { inputs: c, outputs: c, recipe, random: random_projection };
            let (dx, dy, x) = (&mut d.narrow, &d.residual, &acts.attention[l]);
            self.linear_backward(dx, &mut grads.projection, dy, x, &block.projection, call);
            let (dqkv, dout) = (&mut d.wide, &d.narrow);
            let (out, lse, qkv) = (&acts.attention[l], &acts.lse[l], &acts.qkv[l]);
            let shape = self.attention_shape(l);
            backend.attention_backward(self.workspace, dqkv, dout, out, lse, qkv, shape);
            let call = LinearCall { inputs: c, outputs: 3 * c, recipe, random: random(QKV) };
            let (dx, dy, x) = (&mut d.narrow, &d.wide, &acts.ln_1[l]);
            self.linear_backward(dx, &mut grads.qkv, dy, x, &block.qkv, call);
            let (x, statistics) = (&acts.residual[l], &acts.ln_1_statistics[l]);
            self.norm_backward(d, &mut grads.ln_1, x, statistics, &block.ln_1, accumulate);
        }
    }

    /// The gradients of the embeddings, after [`Pass::backward`].
    pub(crate) fn embedding_backward(
        &mut self,
        d: &ActivationGradients<B>,
        grads: &mut Params<B::F32>,
        tokens: &B::Tokens,
        place: Place,
    ) {
        let (backend, sequences, c) = (self.backend, self.sequences, self.config.channels);
        let accumulate = place.micro_step > 0;
        // Only a head that shares them has overwritten the last step's gradients.
        if grads.head.is_some() && !accumulate {
            backend.zero_f32(&mut grads.wte);
        }
        let (dwte, dwpe) = (&mut grads.wte, &mut grads.wpe);
        backend.embedding_backward(dwte, dwpe, &d.residual, tokens, sequences, c, accumulate);
    }

    /// Logits (V) of row `row` after [`Pass::forward`].
    pub(crate) fn logits(&mut self, acts: &Activations<B>, row: usize, out: &mut B::F32) {
        let ModelConfig { channels, vocab_size, .. } = *self.config;
        let head = self.params.head();
        let precision = Precision::of(self.recipe.linear().forward());
        let backend = self.backend;
        backend.logits(self.workspace, out, &acts.ln_f, row, head, channels, vocab_size, precision);
    }

    fn norm(
        &self,
        out: &mut B::Tensor,
        statistics: NormStatistics<&mut B::F32>,
        x: &B::Tensor,
        w: &B::Param,
        b: &B::Param,
    ) {
        let (rows, c) = (self.sequences.rows(), self.config.channels);
        let epsilon = self.config.layer_norm_epsilon;
        self.backend.layernorm_forward(out, statistics, x, w, b, rows, c, epsilon);
    }

    fn attention_shape(&self, layer: usize) -> AttentionShape {
        let (heads, head_size) = (self.config.heads, self.config.head_size());
        let score_factor = self.config.score_factor(layer);
        let precision = Precision::of(self.recipe.linear().forward());
        AttentionShape { sequences: self.sequences, heads, head_size, score_factor, precision }
    }

    fn classify(
        &mut self,
        acts: &mut Activations<B>,
        targets: &B::Tokens,
        gradient: Option<ClassifierGradient<'_, B>>,
    ) {
        let ModelConfig { channels, vocab_size, .. } = *self.config;
        self.backend.classifier(
            self.workspace,
            &mut acts.losses,
            gradient,
            &acts.ln_f,
            self.params.head(),
            targets,
            self.sequences.rows(),
            channels,
            vocab_size,
            Precision::of(self.recipe.linear().forward()),
        );
    }

    fn linear(
        &mut self,
        y: &mut B::Tensor,
        x: &B::Tensor,
        layer: &Linear<B::Param>,
        inputs: usize,
        outputs: usize,
    ) {
        let shape = LinearShape { rows: self.sequences.rows(), inputs, outputs };
        let Linear { w, b } = layer;
        self.backend.linear_forward(self.workspace, y, x, w, b, shape, self.recipe.linear());
    }

    fn linear_backward(
        &mut self,
        dx: &mut B::Tensor,
        grads: &mut Linear<B::F32>,
        dy: &B::Tensor,
        x: &B::Tensor,
        layer: &Linear<B::Param>,
        call: LinearCall,
    ) {
        let LinearCall { inputs, outputs, recipe, random } = call;
        let shape = LinearShape { rows: self.sequences.rows(), inputs, outputs };
        let Linear { w: dw, b: db } = grads;
        let (backend, workspace) = (self.backend, &mut *self.workspace);
        let w = &layer.w;
        let accumulate = random.micro_step > 0;
        backend
            .linear_backward(workspace, dx, dw, db, dy, x, w, shape, &recipe, &random, accumulate);
    }

    /// The same for a layer whose result `pre` went through GELU, given the gradient of what came out.
    fn linear_gelu_backward(
        &mut self,
        dx: &mut B::Tensor,
        grads: &mut Linear<B::F32>,
        dy: &mut B::Tensor,
        pre: &B::Tensor,
        x: &B::Tensor,
        layer: &Linear<B::Param>,
        call: LinearCall,
    ) {
        let LinearCall { inputs, outputs, recipe, random } = call;
        let shape = LinearShape { rows: self.sequences.rows(), inputs, outputs };
        let Linear { w: dw, b: db } = grads;
        let (backend, workspace) = (self.backend, &mut *self.workspace);
        let (w, form) = (&layer.w, self.config.activation);
        let accumulate = random.micro_step > 0;
        backend.linear_gelu_backward(
            workspace, dx, dw, db, dy, pre, x, w, shape, &recipe, &random, accumulate, form,
        );
    }

    /// Adds the norm's part to d.residual, given the gradient of its output in d.narrow.
    fn norm_backward(
        &mut self,
        d: &mut ActivationGradients<B>,
        grads: &mut Norm<B::F32>,
        x: &B::Tensor,
        statistics: &NormStatistics<B::F32>,
        norm: &Norm<B::Param>,
        accumulate: bool,
    ) {
        let (rows, c) = (self.sequences.rows(), self.config.channels);
        let (dx, dy) = (&mut d.residual, &d.narrow);
        let Norm { w: dw, b: db } = grads;
        let (backend, workspace, statistics) =
            (self.backend, &mut *self.workspace, statistics.as_ref());
        backend.layernorm_backward(
            workspace, dx, dw, db, dy, x, statistics, &norm.w, rows, c, accumulate,
        );
    }
}

/// Sizes and formats of one linear layer's backward pass.
struct LinearCall {
    inputs: usize,
    outputs: usize,
    recipe: LinearRecipe,
    random: Random,
}
