//! The GPT itself: forward and backward, written once over `Backend`.
//!
//! Pre-LayerNorm blocks; attention and MLP each add to the residual stream; the head shares its
//! weights with the token embedding (Radford et al. 2019, "GPT-2").

use super::ModelConfig;
use super::activations::{ActivationGradients, Activations};
use super::params::{Linear, Norm, Params};
use crate::backend::{
    AttentionShape, Backend, ClassifierGradient, LinearShape, NormStatistics, Sequences,
};
use crate::mx::{LinearId, Random};
use crate::recipe::{LinearRecipe, Recipe};

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
    /// Steps of the whole run, 0 where not known; recipes may change towards the end.
    pub(crate) total_steps: u64,
}

impl<B: Backend> Pass<'_, B> {
    /// Tokens (rows) to the normalized output of the last block, `acts.ln_f`.
    pub(crate) fn forward(&mut self, acts: &mut Activations<B>, tokens: &B::Tokens) {
        let (backend, params) = (self.backend, self.params);
        let (rows, c) = (self.sequences.rows(), self.config.channels);
        let epsilon = self.config.layer_norm_epsilon;
        let shape = self.attention_shape();
        // Layers share one slot where nothing is kept for a backward pass.
        let (slots, residuals) = (acts.ln_1.len(), acts.residual.len());

        let (wte, wpe) = (&params.wte, &params.wpe);
        backend.embedding_forward(&mut acts.residual[0], tokens, wte, wpe, self.sequences, c);
        let Norm { w, b } = &params.blocks[0].ln_1;
        let (out, statistics) = (&mut acts.ln_1[0], &mut acts.ln_1_statistics[0]);
        backend.layernorm_forward(out, statistics, &acts.residual[0], w, b, rows, c, epsilon);

        for (l, block) in params.blocks.iter().enumerate() {
            let (s, r) = (l % slots, l % residuals);
            self.linear(&mut acts.qkv[s], &acts.ln_1[s], &block.qkv, c, 3 * c);
            let (out, lse) = (&mut acts.attention[s], &mut acts.lse[s]);
            backend.attention_forward(self.workspace, out, lse, &acts.qkv[s], shape);
            self.linear(&mut acts.branch, &acts.attention[s], &block.projection, c, c);

            let Norm { w, b } = &block.ln_2;
            let (out, sum, statistics) =
                (&mut acts.ln_2[s], &mut acts.middle[s], &mut acts.ln_2_statistics[s]);
            let (x, y) = (&acts.residual[r], &acts.branch);
            backend.add_layernorm_forward(out, sum, statistics, x, y, w, b, rows, c, epsilon);
            self.linear(&mut acts.fc1[s], &acts.ln_2[s], &block.fc1, c, 4 * c);
            backend.gelu_forward(&mut acts.gelu[s], &acts.fc1[s], rows * 4 * c);
            self.linear(&mut acts.branch, &acts.gelu[s], &block.fc2, 4 * c, c);

            // The sum that ends this block, and the norm that begins what follows it.
            let next = (l + 1) % slots;
            let sum = &mut acts.residual[(l + 1) % residuals];
            let (Norm { w, b }, out, statistics) = match params.blocks.get(l + 1) {
                Some(block) => (&block.ln_1, &mut acts.ln_1[next], &mut acts.ln_1_statistics[next]),
                None => (&params.ln_f, &mut acts.ln_f, &mut acts.ln_f_statistics),
            };
            let (x, y) = (&acts.middle[s], &acts.branch);
            backend.add_layernorm_forward(out, sum, statistics, x, y, w, b, rows, c, epsilon);
        }
    }

    /// Losses of all rows after [`Pass::forward`].
    pub(crate) fn loss(&mut self, acts: &mut Activations<B>, targets: &B::Tokens) {
        self.classify(acts, targets, None);
    }

    /// Losses of all rows, and the gradients of `scale` times their sum, added to `grads`.
    pub(crate) fn backward(
        &mut self,
        acts: &mut Activations<B>,
        d: &mut ActivationGradients<B>,
        grads: &mut Params<B::F32>,
        tokens: &B::Tokens,
        targets: &B::Tokens,
        scale: f32,
        place: Place,
    ) {
        let (backend, params) = (self.backend, self.params);
        let (rows, c) = (self.sequences.rows(), self.config.channels);
        let shape = self.attention_shape();

        let gradient = ClassifierGradient { dx: &mut d.narrow, dwte: &mut grads.wte, scale };
        self.classify(acts, targets, Some(gradient));
        backend.zero_tensor(&mut d.residual);
        let last = &acts.residual[self.config.layers];
        self.norm_backward(d, &mut grads.ln_f, last, &acts.ln_f_statistics, &params.ln_f);

        for (l, block) in params.blocks.iter().enumerate().rev() {
            let grads = &mut grads.blocks[l];
            let layers = self.config.layers;
            let recipe = self.recipe.for_layer(l, layers, place.step, place.total_steps);
            let random = |linear| Random {
                seed: place.seed,
                step: place.step as u32,
                micro_step: place.micro_step as u32,
                layer: l as u32,
                linear,
            };

            // MLP: d.residual is the gradient of the block's output, and passes to its input.
            let call =
                LinearCall { inputs: 4 * c, outputs: c, recipe, random: random(LinearId::Fc2) };
            let (dx, dy, x) = (&mut d.wide, &d.residual, &acts.gelu[l]);
            self.linear_backward(dx, &mut grads.fc2, dy, x, &block.fc2, call);
            backend.gelu_backward(&mut d.wide, &acts.fc1[l], rows * 4 * c);
            let call =
                LinearCall { inputs: c, outputs: 4 * c, recipe, random: random(LinearId::Fc1) };
            let (dx, dy, x) = (&mut d.narrow, &d.wide, &acts.ln_2[l]);
            self.linear_backward(dx, &mut grads.fc1, dy, x, &block.fc1, call);
            let (x, statistics) = (&acts.middle[l], &acts.ln_2_statistics[l]);
            self.norm_backward(d, &mut grads.ln_2, x, statistics, &block.ln_2);

            // Attention.
            let random_projection = random(LinearId::Projection);
            let call = LinearCall { inputs: c, outputs: c, recipe, random: random_projection };
            let (dx, dy, x) = (&mut d.narrow, &d.residual, &acts.attention[l]);
            self.linear_backward(dx, &mut grads.projection, dy, x, &block.projection, call);
            let (dqkv, dout) = (&mut d.wide, &d.narrow);
            let (out, lse, qkv) = (&acts.attention[l], &acts.lse[l], &acts.qkv[l]);
            backend.attention_backward(self.workspace, dqkv, dout, out, lse, qkv, shape);
            let call =
                LinearCall { inputs: c, outputs: 3 * c, recipe, random: random(LinearId::Qkv) };
            let (dx, dy, x) = (&mut d.narrow, &d.wide, &acts.ln_1[l]);
            self.linear_backward(dx, &mut grads.qkv, dy, x, &block.qkv, call);
            let (x, statistics) = (&acts.residual[l], &acts.ln_1_statistics[l]);
            self.norm_backward(d, &mut grads.ln_1, x, statistics, &block.ln_1);
        }
        let (dwte, dwpe) = (&mut grads.wte, &mut grads.wpe);
        backend.embedding_backward(dwte, dwpe, &d.residual, tokens, self.sequences, c);
    }

    /// Logits (V) of row `row` after [`Pass::forward`].
    pub(crate) fn logits(&mut self, acts: &Activations<B>, row: usize, out: &mut B::F32) {
        let ModelConfig { channels, vocab_size, .. } = *self.config;
        let (wte, format) = (&self.params.wte, self.recipe.head());
        let backend = self.backend;
        backend.logits(self.workspace, out, &acts.ln_f, row, wte, channels, vocab_size, format);
    }

    fn attention_shape(&self) -> AttentionShape {
        let (heads, head_size) = (self.config.heads, self.config.head_size());
        let format = self.recipe.forward;
        AttentionShape { sequences: self.sequences, heads, head_size, format }
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
            &self.params.wte,
            targets,
            self.sequences.rows(),
            channels,
            vocab_size,
            self.recipe.head(),
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
        self.backend.linear_forward(self.workspace, y, x, w, b, shape, self.recipe.forward);
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
        backend.linear_backward(workspace, dx, dw, db, dy, x, &layer.w, shape, &recipe, &random);
    }

    /// Adds the norm's part to d.residual, given the gradient of its output in d.narrow.
    fn norm_backward(
        &self,
        d: &mut ActivationGradients<B>,
        grads: &mut Norm<B::F32>,
        x: &B::Tensor,
        statistics: &NormStatistics<B::F32>,
        norm: &Norm<B::Param>,
    ) {
        let (rows, c) = (self.sequences.rows(), self.config.channels);
        let (dx, dy) = (&mut d.residual, &d.narrow);
        let Norm { w: dw, b: db } = grads;
        self.backend.layernorm_backward(dx, dw, db, dy, x, statistics, &norm.w, rows, c);
    }
}

/// Sizes and formats of one linear layer's backward pass.
struct LinearCall {
    inputs: usize,
    outputs: usize,
    recipe: LinearRecipe,
    random: Random,
}
