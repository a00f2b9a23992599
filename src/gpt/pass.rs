//! The GPT itself: forward and backward, written once over `Backend`.
//!
//! A norm stands before attention and before the MLP, each of which adds to the residual stream; the
//! head shares its weights with the token embedding (Radford et al. 2019, "GPT-2"), unless the model
//! has others for it. Llama's blocks are the same with other norms, an MLP that has a gate, and q and k
//! that positions turn: where these do so in place, what is kept of the layer is what attention read.
//!
//! A block that drops tokens is one of shorter sequences: the kept rows of the residual stream are
//! gathered, go through it, and are put back; others pass by it unchanged, and so do their
//! gradients. Kept positions ascend, so that a causal mask is the same to them.

use super::activations::{ActivationGradients, Activations, Beside, Dropping, Layers, Rotary};
use super::params::{Adapter, Linear, Matrix, Norm, ParamTable};
use super::{Architecture, ModelConfig, Shapes};
use crate::Result;
use crate::backend::{
    AttentionBackward, Backend, Classifier, ClassifierGradient, Documents, EmbeddingGradients,
    Epilogue, FlatGradients, HeadNorms, HeadNormsBackward, HostClassifier, HostLoss,
    LinearBackward, LinearForward, LoraBackward, LoraForward, LoraShape, MergeShape, Merged,
    NormBackward, NormParams, NormShape, NormStatistics, OutputGradient, Part, ResidualSum,
    SelectShape, Selected, SelectedSum, Sequences, Slot, StepPlan, Turn,
};
use crate::formats::{LINEARS, LinearRecipe, Random, projections};

/// What a layer's result passes through at once, and what behind its adapter, which comes first.
pub(super) fn around_adapter<B: Backend>(
    layer: Linear,
    epilogue: Epilogue<'_, B>,
) -> [Epilogue<'_, B>; 2] {
    match layer.adapter {
        Some(_) => [Epilogue::None, epilogue],
        None => [epilogue, Epilogue::None],
    }
}

/// What a block keeps that drops tokens.
fn selected<B: Backend>(acts: &Activations<B>, layer: usize) -> Selected<'_, B> {
    let Dropping { selection, .. } = acts.dropping.as_ref().expect(HAS_ROOM);
    Selected { selection, layer }
}

/// What attention reads: the layer's result, or what norms of heads have made of it.
pub(super) fn attended<'o, B: Backend>(
    qkv: &'o B::Tensor,
    rotary: &'o Option<Rotary<B>>,
) -> &'o B::Tensor {
    rotary.as_ref().and_then(|rotary| rotary.normed.as_ref()).unwrap_or(qkv)
}

/// The gradients of a weight, and of the bias beside it where it has one.
fn gradients_of<'g, B: Backend>(
    backend: &B,
    grads: &'g mut FlatGradients<B>,
    w: Slot,
    b: Option<Slot>,
) -> (Option<B::Gradient<'g>>, Option<B::Gradient<'g>>) {
    match b {
        Some(b) => grads.of(backend, [w, b]).into(),
        None => {
            let [dw] = grads.of(backend, [w]);
            (dw, None)
        }
    }
}

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
    /// That are kept apart; where there are any, the plan says so.
    pub(crate) documents: Option<Documents<'a, B>>,
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

/// What losses are multiplied by in what gradients are of.
pub(crate) struct Scales<'a, B: Backend> {
    /// (rows): of each, where they have any.
    pub(crate) weights: Option<&'a B::F32>,
    /// Of all.
    pub(crate) scale: f32,
}

/// Where in a run a backward pass is, for its random numbers.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) seed: u64,
    pub(crate) step: u64,
    pub(crate) micro_step: usize,
}

/// What a trainer whose options drop tokens has made, and no other plan drops any.
const HAS_ROOM: &str = "there is room for the rows that blocks keep";

/// The table has adapters where the configuration has, and so have the activations.
const HAS_ADAPTERS: &str = "there is room for what adapters make";

impl Place {
    fn random(self, block: usize, linear: u32) -> Random {
        Random {
            seed: self.seed,
            step: self.step as u32,
            micro_step: self.micro_step as u32,
            layer: block as u32,
            linear,
        }
    }
}

/// The gradients that flow through a block: of the residual stream, or the rows of it that the block
/// keeps, and two for whatever lies beside it.
struct Flow<'a, B: Backend> {
    stream: &'a mut B::Tensor,
    narrow: &'a mut B::Tensor,
    wide: &'a mut B::Tensor,
}

impl<'a, B: Backend> Pass<'a, B> {
    /// Draws which tokens the blocks keep that drop any, before both passes of a micro-step.
    pub(crate) fn draw_kept(&mut self, acts: &mut Activations<B>, place: Place) {
        let layers = self.plan.dropping();
        if layers.is_empty() {
            return;
        }
        let Dropping { selection, .. } = acts.dropping.as_mut().expect(HAS_ROOM);
        let (shape, random) = (self.selected(layers.start), place.random(layers.start, 0));
        self.backend.select_positions(selection, layers, shape, &random);
    }

    /// Tokens (rows) to the normalized output of the last block, `acts.ln_f`.
    pub(crate) fn forward(&mut self, acts: &mut Activations<B>, tokens: &B::Tokens) {
        let (backend, table) = (self.backend, self.table);
        let (wte, wpe) = (self.param(table.wte), table.wpe.map(|wpe| self.param(wpe)));
        let shape = self.shapes().embedding();
        let documents = self.documents;
        backend.embedding_forward(&mut acts.residual[0], tokens, documents, wte, wpe, shape);
        if let Some(Rotary { frequencies, table, .. }) = &mut acts.rotary {
            backend.rotations(table, frequencies, documents, self.shapes().attention(0));
        }
        self.ln_1(acts, 0);
        for (l, block) in table.blocks.iter().enumerate() {
            if self.drops(l) {
                self.gather_input(acts, l);
                self.ln_1(acts, l);
            }
            self.attention(acts, l);
            self.mlp(acts, l);
            self.merge(&mut acts.gelu[l], block.fc2, l);
            let at = (block.fc2, l, &mut acts.beside);
            self.linear(&mut acts.branch, &acts.gelu[l], at, Epilogue::None);
            if self.drops(l) { self.end_kept(acts, l) } else { self.end(acts, l) }
        }
    }

    /// The sum that ends a block, and the norm that begins what follows it.
    ///
    /// NOTE: where a block follows that drops tokens, that norm is in vain, for it takes its own of
    /// the kept rows: once in a pass, which a sum alone would spare as one more operation.
    pub(super) fn end(&mut self, acts: &mut Activations<B>, l: usize) {
        let (norm, out, statistics) = match self.table.blocks.get(l + 1) {
            Some(block) => {
                (block.ln_1, &mut acts.ln_1[l + 1], acts.ln_1_statistics[l + 1].as_mut())
            }
            None => (self.table.ln_f, &mut acts.ln_f, acts.ln_f_statistics.as_mut()),
        };
        let (x, y, sum) = (&acts.middle[l], &acts.branch, &mut acts.residual[l + 1]);
        let shape = self.shapes().norm();
        self.add_norm(out, statistics, ResidualSum { sum, x, y }, norm, shape);
    }

    /// The same of a block that drops tokens, which is never the last: the sum is in the rows that it
    /// keeps, and the norm is left to the next where that drops tokens, too.
    fn end_kept(&mut self, acts: &mut Activations<B>, l: usize) {
        let Dropping { selection, .. } = acts.dropping.as_ref().expect(HAS_ROOM);
        let (base, out) = acts.residual.with_next(l);
        let sum = SelectedSum { out, base, x: &acts.middle[l], y: &acts.branch };
        self.backend.scatter_sum(sum, Selected { selection, layer: l }, self.selected(l));
        if !self.drops(l + 1) {
            self.ln_1(acts, l + 1);
        }
    }

    /// The rows of a block's input that it keeps, where it drops others.
    fn gather_input(&mut self, acts: &mut Activations<B>, l: usize) {
        let Dropping { selection, input } = acts.dropping.as_mut().expect(HAS_ROOM);
        let selected = Selected { selection, layer: l };
        self.backend.gather_rows(input, &acts.residual[l], selected, self.selected(l));
        if let Some(Rotary { table, kept: Some(kept), .. }) = &mut acts.rotary {
            let shape = SelectShape { channels: self.config.head_width(), ..self.selected(l) };
            self.backend.gather_rows(kept, table, Selected { selection, layer: l }, shape);
        }
    }

    /// What a block reads of the residual stream.
    fn input<'o>(
        &self,
        residual: &'o Layers<B::Tensor>,
        dropping: &'o Option<Dropping<B>>,
        l: usize,
    ) -> &'o B::Tensor {
        if self.drops(l) { &dropping.as_ref().expect(HAS_ROOM).input } else { &residual[l] }
    }

    /// The norm of a block's input.
    pub(super) fn ln_1(&mut self, acts: &mut Activations<B>, l: usize) {
        let (out, statistics) = (&mut acts.ln_1[l], acts.ln_1_statistics[l].as_mut());
        let x = self.input(&acts.residual, &acts.dropping, l);
        self.norm(out, statistics, x, self.table.blocks[l].ln_1, self.shapes_of(l).norm());
    }

    /// Attention and what it adds to the residual stream, from `acts.ln_1` to `acts.ln_2`.
    fn attention(&mut self, acts: &mut Activations<B>, l: usize) {
        let block = &self.table.blocks[l];
        let shape = self.shapes_of(l).attention(l);
        self.merge(&mut acts.ln_1[l], block.qkv, l);
        let at = (block.qkv, l, &mut acts.beside);
        self.linear(&mut acts.qkv[l], &acts.ln_1[l], at, Epilogue::None);
        self.position(acts, l);
        let (out, lse) = (&mut acts.attention[l], &mut acts.lse[l]);
        let (qkv, documents) = (attended(&acts.qkv[l], &acts.rotary), self.documents);
        self.backend.attention_forward(self.workspace, out, lse, qkv, documents, shape);
        self.merge(&mut acts.attention[l], block.projection, l);
        let at = (block.projection, l, &mut acts.beside);
        self.linear(&mut acts.branch, &acts.attention[l], at, Epilogue::None);

        let (out, statistics) = (&mut acts.ln_2[l], acts.ln_2_statistics[l].as_mut());
        let x = self.input(&acts.residual, &acts.dropping, l);
        let sum = ResidualSum { sum: &mut acts.middle[l], x, y: &acts.branch };
        self.add_norm(out, statistics, sum, block.ln_2, self.shapes_of(l).norm());
    }

    /// Turns q and k to their positions, behind the norms of their heads where there are such.
    pub(super) fn position(&mut self, acts: &mut Activations<B>, l: usize) {
        let Some(rotary) = &mut acts.rotary else { return };
        let (shapes, qkv) = (self.shapes_of(l), &mut acts.qkv[l]);
        let shape = shapes.attention(l);
        let Rotary { table, kept, normed, .. } = rotary;
        let table = if self.drops(l) { kept.as_ref().expect(HAS_ROOM) } else { table };
        match (normed, self.head_norms(l)) {
            (Some(out), Some(norms)) => {
                let shapes = (shape, shapes.norm());
                self.backend.head_norms_forward(out, qkv, table, norms, shapes);
            }
            _ => self.backend.rotate(qkv, table, Turn::Forward, shape),
        }
    }

    fn head_norms(&self, l: usize) -> Option<HeadNorms<'a, B>> {
        let [q, k] = self.table.blocks[l].of_heads?.map(|slot| self.param(slot));
        Some(HeadNorms { q, k })
    }

    /// What the MLP's first layer passes through.
    pub(super) fn activation<'o>(&self, out: &'o mut B::Tensor) -> Epilogue<'o, B> {
        match self.config.architecture {
            Architecture::Gpt2 => Epilogue::Gelu { out, form: self.config.activation },
            Architecture::Llama => Epilogue::SwiGlu { out },
        }
    }

    /// The MLP's first layer and what its result passes through, from `acts.ln_2` to `acts.gelu`.
    fn mlp(&mut self, acts: &mut Activations<B>, l: usize) {
        self.merge(&mut acts.ln_2[l], self.table.blocks[l].fc1, l);
        let gelu = self.activation(&mut acts.gelu[l]);
        let at = (self.table.blocks[l].fc1, l, &mut acts.beside);
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
        } else if acts.gelu.is_shared() && acts.beside.turned.is_empty() {
            let [rows, m] = self.shapes_of(l).gated();
            self.ln_1(acts, l);
            let (out, statistics) = (&mut acts.ln_2[l], acts.ln_2_statistics[l].as_mut());
            let (norm, shape) = (self.table.blocks[l].ln_2, self.shapes_of(l).norm());
            self.norm(out, statistics, &acts.middle[l], norm, shape);
            self.activate(&acts.fc1[l], self.activation(&mut acts.gelu[l]), rows, m);
        }
    }

    /// Does what a layer's result y passes through, which is M channels wide behind it.
    fn activate(&self, y: &B::Tensor, behind: Epilogue<'_, B>, rows: usize, m: usize) {
        match behind {
            Epilogue::None => {}
            Epilogue::Gelu { out, form } => self.backend.gelu_forward(out, y, rows * m, form),
            Epilogue::SwiGlu { out } => self.backend.swiglu_forward(out, y, rows, m),
        }
    }

    /// Losses of all rows after [`Pass::forward`].
    pub(crate) fn loss(&mut self, acts: &mut Activations<B>, targets: &B::Tokens) {
        self.classify(acts, targets, None);
    }

    /// Losses of all rows, and the gradients of `scale` times their sum in the head and in its input:
    /// those of the step's first micro-step overwrite `grads`, others are added.
    pub(crate) fn loss_and_gradients(
        &mut self,
        acts: &mut Activations<B>,
        d: &mut ActivationGradients<B>,
        grads: &mut FlatGradients<B>,
        targets: &B::Tokens,
        scales: &Scales<'_, B>,
    ) {
        let gradient = self.head_gradients(d, grads, scales);
        self.classify(acts, targets, Some(gradient));
    }

    /// The same of losses that the host makes of logits, on the thread of this call.
    pub(crate) fn loss_and_gradients_of_host(
        &mut self,
        acts: &mut Activations<B>,
        d: &mut ActivationGradients<B>,
        grads: &mut FlatGradients<B>,
        scales: &Scales<'_, B>,
        loss: &mut HostLoss<'_>,
    ) -> Result<()> {
        let gradient = self.head_gradients(d, grads, scales);
        self.classify_by_host(acts, Some(gradient), loss)
    }

    /// Losses of all rows that the host makes of logits, on the thread of this call.
    pub(crate) fn loss_of_host(
        &mut self,
        acts: &mut Activations<B>,
        loss: &mut HostLoss<'_>,
    ) -> Result<()> {
        self.classify_by_host(acts, None, loss)
    }

    fn classify_by_host<'o>(
        &mut self,
        acts: &'o mut Activations<B>,
        gradient: Option<ClassifierGradient<'o, B>>,
        loss: &mut HostLoss<'_>,
    ) -> Result<()>
    where
        'a: 'o,
    {
        let (w, shape) =
            (self.backend.param(self.weights, self.table.head()), self.shapes().head());
        let Activations { losses, ln_f: x, .. } = acts;
        let operands = HostClassifier { losses, gradient, x, w };
        self.backend.classifier_of_host(self.workspace, operands, shape, loss)
    }

    fn head_gradients<'o>(
        &self,
        d: &'o mut ActivationGradients<B>,
        grads: &'o mut FlatGradients<B>,
        Scales { weights, scale }: &Scales<'o, B>,
    ) -> ClassifierGradient<'o, B> {
        let [dw] = grads.of(self.backend, [self.table.head()]);
        let accumulate = self.plan.accumulate;
        ClassifierGradient { dx: &mut d.narrow, dw, weights: *weights, scale: *scale, accumulate }
    }

    /// What those gradients make of all others, but for what the embeddings get as such.
    /// `block_is_done` is told behind the backward pass of each block, from the last on.
    pub(crate) fn backward(
        &mut self,
        acts: &mut Activations<B>,
        d: &mut ActivationGradients<B>,
        grads: &mut FlatGradients<B>,
        place: Place,
        mut block_is_done: impl FnMut(usize),
    ) {
        self.backend.zero_tensor(&mut d.residual);
        let last = &acts.residual[self.config.layers];
        let (ln_f, shape) = (self.table.ln_f, self.shapes().norm());
        let (dx, dy) = (&mut d.residual, &d.narrow);
        self.norm_backward((dx, dy), grads, last, &acts.ln_f_statistics, (ln_f, shape));

        for l in (0..self.config.layers).rev() {
            if self.drops(l) {
                self.kept_backward(acts, d, grads, l, place);
            } else {
                self.recompute(acts, l);
                let ActivationGradients { residual: stream, narrow, wide, .. } = &mut *d;
                self.block_backward(acts, Flow { stream, narrow, wide }, grads, l, place);
            }
            block_is_done(l);
        }
    }

    /// The backward pass of a block that drops tokens. The gradients of rows that it drops pass by.
    fn kept_backward(
        &mut self,
        acts: &mut Activations<B>,
        d: &mut ActivationGradients<B>,
        grads: &mut FlatGradients<B>,
        l: usize,
        place: Place,
    ) {
        let shape = self.selected(l);
        // The blocks behind it have used the room of its input for theirs.
        self.gather_input(acts, l);
        self.recompute(acts, l);
        let ActivationGradients { residual, kept, narrow, wide } = d;
        let stream = kept.as_mut().expect(HAS_ROOM);
        self.backend.gather_rows(stream, residual, selected(acts, l), shape);
        self.block_backward(acts, Flow { stream, narrow, wide }, grads, l, place);
        self.backend.scatter_rows(residual, stream, selected(acts, l), shape);
    }

    /// The backward pass of a block: `stream` is the gradient of its output, and becomes that of its
    /// input.
    fn block_backward(
        &mut self,
        acts: &mut Activations<B>,
        Flow { stream, narrow, wide }: Flow<'_, B>,
        grads: &mut FlatGradients<B>,
        l: usize,
        place: Place,
    ) {
        let (block, at) = (&self.table.blocks[l], (place, l, &acts.beside));
        let shapes = self.shapes_of(l);

        // MLP.
        let dy = OutputGradient::Whole(stream);
        self.linear_backward(wide, grads, dy, &acts.gelu[l], block.fc2, at);
        let (y, form) = (&mut acts.fc1[l], self.config.activation);
        let dy = match self.config.architecture {
            Architecture::Gpt2 => OutputGradient::BehindGelu { d: wide, y, form },
            Architecture::Llama => OutputGradient::BehindSwiGlu { d: wide, y },
        };
        self.linear_backward(narrow, grads, dy, &acts.ln_2[l], block.fc1, at);
        let (x, statistics) = (&acts.middle[l], &acts.ln_2_statistics[l]);
        self.norm_backward((stream, narrow), grads, x, statistics, (block.ln_2, shapes.norm()));

        // Attention.
        let dy = OutputGradient::Whole(stream);
        self.linear_backward(narrow, grads, dy, &acts.attention[l], block.projection, at);
        // Of all layers with norms of heads it is the last that has its own, unless a block has been
        // computed again.
        let is_there = l + 1 == self.config.layers || acts.qkv.is_shared();
        if block.of_heads.is_some() && !is_there {
            self.position(acts, l);
        }
        let at = (place, l, &acts.beside);
        let operands = AttentionBackward {
            dqkv: wide,
            dout: narrow,
            out: &acts.attention[l],
            lse: &acts.lse[l],
            qkv: attended(&acts.qkv[l], &acts.rotary),
            documents: self.documents,
        };
        self.backend.attention_backward(self.workspace, operands, shapes.attention(l));
        self.position_backward(wide, acts, grads, l);
        let dy = OutputGradient::Whole(wide);
        self.linear_backward(narrow, grads, dy, &acts.ln_1[l], block.qkv, at);
        let x = self.input(&acts.residual, &acts.dropping, l);
        let statistics = &acts.ln_1_statistics[l];
        self.norm_backward((stream, narrow), grads, x, statistics, (block.ln_1, shapes.norm()));
    }

    /// The gradient of what [`Pass::position`] put out becomes that of what it read.
    fn position_backward(
        &mut self,
        dqkv: &mut B::Tensor,
        acts: &Activations<B>,
        grads: &mut FlatGradients<B>,
        l: usize,
    ) {
        let Some(Rotary { table, kept, .. }) = &acts.rotary else { return };
        let table = if self.drops(l) { kept.as_ref().expect(HAS_ROOM) } else { table };
        let shapes = self.shapes_of(l);
        let shape = shapes.attention(l);
        let (Some(norms), Some(slots)) = (self.head_norms(l), self.table.blocks[l].of_heads) else {
            self.backend.rotate(dqkv, table, Turn::Back, shape);
            return;
        };
        let [dq, dk] = grads.of(self.backend, slots);
        let (qkv, accumulate) = (&acts.qkv[l], self.plan.accumulate);
        let operands = HeadNormsBackward { dqkv, dq, dk, qkv, table, norms, accumulate };
        self.backend.head_norms_backward(self.workspace, operands, (shape, shapes.norm()));
    }

    /// The gradients of the embeddings, after [`Pass::backward`].
    pub(crate) fn embedding_backward(
        &mut self,
        d: &ActivationGradients<B>,
        grads: &mut FlatGradients<B>,
        tokens: &B::Tokens,
    ) {
        let (backend, table, accumulate) = (self.backend, self.table, self.plan.accumulate);
        // Only a head that shares them has overwritten the last step's gradients.
        if table.has_own_head()
            && !accumulate
            && let [Some(dwte)] = grads.of(backend, [table.wte])
        {
            backend.zero_gradient(dwte);
        }
        let (dwte, dwpe) = gradients_of(backend, grads, table.wte, table.wpe);
        let gradients = EmbeddingGradients { dwte, dwpe, accumulate };
        let (shape, documents) = (self.shapes().embedding(), self.documents);
        backend.embedding_backward(gradients, &d.residual, tokens, documents, shape);
    }

    /// Logits (V) of row `row` after [`Pass::forward`].
    pub(crate) fn logits(&mut self, acts: &Activations<B>, row: usize, out: &mut B::F32) {
        let (head, shape) = (self.param(self.table.head()), self.shapes().head());
        self.backend.logits(self.workspace, out, &acts.ln_f, row, head, shape);
    }

    pub(super) fn param(&self, slot: Slot) -> B::Param<'a> {
        self.backend.param(self.weights, slot)
    }

    fn norm_params(&self, norm: Norm) -> NormParams<'a, B> {
        NormParams { w: self.param(norm.w), b: norm.b.map(|b| self.param(b)) }
    }

    fn recipe(&self, block: usize, layer: Linear) -> &'a LinearRecipe {
        &self.plan.layers[block][layer.number as usize]
    }

    fn mean(&self, block: usize, layer: Linear) -> Option<Part<'a, B>> {
        let Means { flat, matrices } = self.means.as_ref()?;
        let slot = matrices[block * LINEARS + layer.number as usize].own;
        Some(Part { flat, slot })
    }

    /// Of all rows.
    pub(super) fn shapes(&self) -> Shapes<'a> {
        let (sequences, precision) = (self.sequences, self.plan.precision);
        Shapes { config: self.config, sequences, precision }
    }

    /// Within a block.
    fn shapes_of(&self, block: usize) -> Shapes<'a> {
        Shapes { sequences: self.sequences_of(block), ..self.shapes() }
    }

    fn sequences_of(&self, block: usize) -> Sequences {
        let length = self.plan.kept_by(block).unwrap_or(self.sequences.length);
        Sequences { length, ..self.sequences }
    }

    /// Whether a block drops tokens.
    fn drops(&self, block: usize) -> bool {
        self.plan.kept_by(block).is_some()
    }

    /// What a block keeps of the rows of the residual stream.
    fn selected(&self, block: usize) -> SelectShape {
        let (sequences, kept) = (self.sequences, self.sequences_of(block).length);
        SelectShape { sequences, kept, channels: self.config.channels }
    }

    fn norm(
        &self,
        out: &mut B::Tensor,
        statistics: NormStatistics<&mut B::F32>,
        x: &B::Tensor,
        norm: Norm,
        shape: NormShape,
    ) {
        let params = self.norm_params(norm);
        self.backend.norm_forward(out, statistics, x, params, shape);
    }

    pub(super) fn add_norm(
        &self,
        out: &mut B::Tensor,
        statistics: NormStatistics<&mut B::F32>,
        sum: ResidualSum<'_, B>,
        norm: Norm,
        shape: NormShape,
    ) {
        let params = self.norm_params(norm);
        self.backend.add_norm_forward(out, statistics, sum, params, shape);
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
        (layer, block, beside): (Linear, usize, &mut Beside<B>),
        epilogue: Epilogue<'_, B>,
    ) {
        let (number, Beside { turned, low }) = (layer.number as usize, beside);
        let [epilogue, behind] = around_adapter(layer, epilogue);
        let (w, b) = (self.param(layer.w), layer.b.map(|b| self.param(b)));
        let mean = self.mean(block, layer);
        let turned = turned.get_mut(block).filter(|_| self.trains);
        let turned = turned.map(|all| &mut all[number]);
        let operands = LinearForward { y: &mut *y, x, w, b, mean, epilogue, turned };
        let (shapes, recipe) = (self.shapes_of(block), self.recipe(block, layer));
        self.backend.linear_forward(self.workspace, operands, shapes.linears()[number], recipe);
        if let Some(adapter) = layer.adapter {
            let low = &mut low[block][number];
            self.adapt((y, low, x), adapter, shapes.adapter(number), behind);
        }
    }

    /// Adds an adapter's part to the result of its layer, and does what that passes through.
    pub(super) fn adapt(
        &mut self,
        (y, low, x): (&mut B::Tensor, &mut Option<B::Tensor>, &B::Tensor),
        adapter: Adapter,
        shape: Option<LoraShape>,
        behind: Epilogue<'_, B>,
    ) {
        let (shape, low) = shape.zip(low.as_mut()).expect(HAS_ADAPTERS);
        let [a, b] = [adapter.a, adapter.b].map(|slot| self.backend.param(self.weights, slot));
        let operands = LoraForward { y: &mut *y, low, x, a, b };
        self.backend.lora_forward(self.workspace, operands, shape);
        self.activate(y, behind, shape.rows, self.config.mlp_width());
    }

    fn linear_backward(
        &mut self,
        dx: &mut B::Tensor,
        grads: &mut FlatGradients<B>,
        dy: OutputGradient<'_, B>,
        x: &B::Tensor,
        layer: Linear,
        (place, block, Beside { turned, low }): (Place, usize, &Beside<B>),
    ) {
        let (number, shapes) = (layer.number as usize, self.shapes_of(block));
        let shape = shapes.linears()[number];
        // An adapter's gradients read what the layer's would make on their way.
        let dy = match (layer.adapter, dy) {
            (Some(_), OutputGradient::BehindGelu { d, y, form }) => {
                self.backend.gelu_backward(d, y, shape.rows * shape.outputs, form);
                OutputGradient::Whole(&*d)
            }
            (Some(_), OutputGradient::BehindSwiGlu { d, y }) => {
                self.backend.swiglu_backward(y, d, shape.rows, shape.outputs / 2);
                OutputGradient::Whole(&*y)
            }
            (_, dy) => dy,
        };
        let of_adapter = match (layer.adapter, &dy) {
            (Some(adapter), OutputGradient::Whole(dy)) => Some((adapter, *dy)),
            _ => None,
        };
        let (dw, db) = gradients_of(self.backend, grads, layer.w, layer.b);
        let w = self.backend.param(self.weights, layer.w);
        let (mean, accumulate) = (self.mean(block, layer), self.plan.accumulate);
        let turned = turned.get(block).map(|all| &all[number]);
        let operands = LinearBackward { dx: &mut *dx, dw, db, dy, x, turned, w, mean, accumulate };
        let (random, recipe) = (place.random(block, layer.number), self.recipe(block, layer));
        self.backend.linear_backward(self.workspace, operands, shape, recipe, &random);
        let Some((Adapter { a, b }, dy)) = of_adapter else { return };
        let (shape, low) =
            shapes.adapter(number).zip(low[block][number].as_ref()).expect(HAS_ADAPTERS);
        let [da, db] = grads.of(self.backend, [a, b]);
        let [a, b] = [a, b].map(|slot| self.backend.param(self.weights, slot));
        let operands = LoraBackward { dx, da, db, dy, x, low, a, b, accumulate };
        self.backend.lora_backward(self.workspace, operands, shape);
    }

    /// Adds the norm's part to dx, given the gradient dy of its output.
    fn norm_backward(
        &mut self,
        (dx, dy): (&mut B::Tensor, &B::Tensor),
        grads: &mut FlatGradients<B>,
        x: &B::Tensor,
        statistics: &NormStatistics<B::F32>,
        (norm, shape): (Norm, NormShape),
    ) {
        let (dw, db) = gradients_of(self.backend, grads, norm.w, norm.b);
        let w = self.backend.param(self.weights, norm.w);
        let (statistics, accumulate) = (statistics.as_ref(), self.plan.accumulate);
        let operands = NormBackward { dx, dw, db, dy, x, statistics, w, accumulate };
        self.backend.norm_backward(self.workspace, operands, shape);
    }
}
