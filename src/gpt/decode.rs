//! The forward pass of a few rows of one sequence behind others, whose keys and values are kept.

use super::Shapes;
use super::activations::Activations;
use super::params::{Linear, ParamTable};
use super::pass::Pass;
use crate::Result;
use crate::backend::{
    Backend, Decode, DecoderWeights, Epilogue, HeadShape, LinearForward, LinearShape, ResidualSum,
};
use crate::formats::LINEARS;
use crate::reserve::collect;

/// What is kept of a sequence, and weights as few rows read them.
pub(crate) struct Past<B: Decode> {
    /// Keys and values of each block.
    kept: Vec<B::Tensor>,
    packed: Vec<[B::Packed; LINEARS]>,
    /// The head, where it is in less than f32.
    head: Option<B::Packed>,
}

impl<B: Backend + Decode> Past<B> {
    /// For so many positions.
    pub(crate) fn new(
        backend: &B,
        arena: &mut B::Arena,
        shapes: Shapes<'_>,
        (weights, positions): (DecoderWeights, usize),
    ) -> Result<Self> {
        let layers = shapes.config.layers;
        for shape in shapes.linears().into_iter().chain([head_of(shapes)]) {
            backend.decodes(shape, weights)?;
        }
        let kept = |l| Ok(backend.kept(arena, positions, shapes.attention(l)));
        let kept = collect("the keys and values of all blocks", (0..layers).map(kept))?;
        let packed = |_| Ok(shapes.linears().map(|shape| backend.packed(arena, shape, weights)));
        let packed = collect("the weights of all blocks", (0..layers).map(packed))?;
        let is_packed = weights != DecoderWeights::F32;
        let head = is_packed.then(|| backend.packed(arena, head_of(shapes), weights));
        Ok(Self { kept, packed, head })
    }

    /// Takes weights as they are now; what was kept was made by others.
    pub(crate) fn pack(
        &mut self,
        backend: &B,
        table: &ParamTable,
        weights: &B::Weights,
        shapes: Shapes<'_>,
    ) {
        for (block, packed) in table.blocks.iter().zip(&mut self.packed) {
            for layer in [block.qkv, block.projection, block.fc1, block.fc2] {
                let number = layer.number as usize;
                let w = backend.param(weights, layer.w);
                backend.pack_weight(&mut packed[number], w, shapes.linears()[number]);
            }
        }
        if let Some(head) = &mut self.head {
            let w = backend.param(weights, table.head());
            backend.pack_weight(head, w, head_of(shapes));
        }
    }
}

impl<B: Backend + Decode> Pass<'_, B> {
    /// Rows behind the first `start` positions of a sequence, which `past` has been given, to the
    /// normalized output of the last block, and their keys and values to `past`.
    pub(crate) fn forward_behind(
        &mut self,
        acts: &mut Activations<B>,
        tokens: &B::Tokens,
        (past, start): (&mut Past<B>, usize),
    ) {
        let (backend, table, shapes) = (self.backend, self.table, self.shapes());
        let (rows, [wte, wpe]) = ((tokens, start), [table.wte, table.wpe].map(|of| self.param(of)));
        backend.embedding_behind(&mut acts.residual[0], rows, wte, wpe, shapes.embedding());
        self.ln_1(acts, 0);
        for (l, block) in table.blocks.iter().enumerate() {
            let packed = &past.packed[l];
            let (y, x) = (&mut acts.qkv[l], &acts.ln_1[l]);
            self.packed_linear(y, x, (block.qkv, packed), Epilogue::None);
            let (out, qkv, kept) = (&mut acts.attention[l], &acts.qkv[l], &mut past.kept[l]);
            let shape = shapes.attention(l);
            backend.attention_behind(self.workspace, out, qkv, kept, rows, shape);
            let (y, x) = (&mut acts.branch, &acts.attention[l]);
            self.packed_linear(y, x, (block.projection, packed), Epilogue::None);

            let (out, statistics) = (&mut acts.ln_2[l], acts.ln_2_statistics[l].as_mut());
            let (x, y) = (&acts.residual[l], &acts.branch);
            let sum = ResidualSum { sum: &mut acts.middle[l], x, y };
            self.add_norm(out, statistics, sum, block.ln_2, shapes.norm());
            let gelu = Epilogue::Gelu { out: &mut acts.gelu[l], form: self.config.activation };
            let (y, x) = (&mut acts.fc1[l], &acts.ln_2[l]);
            self.packed_linear(y, x, (block.fc1, packed), gelu);
            let (y, x) = (&mut acts.branch, &acts.gelu[l]);
            self.packed_linear(y, x, (block.fc2, packed), Epilogue::None);
            self.end(acts, l);
        }
    }

    /// Logits (V) of row `row` after [`Pass::forward_behind`].
    pub(crate) fn logits_behind(
        &mut self,
        acts: &Activations<B>,
        row: usize,
        past: &Past<B>,
        out: &mut B::F32,
    ) {
        let Some(head) = &past.head else { return self.logits(acts, row, out) };
        let (x, shape) = ((&acts.ln_f, row), self.shapes().head());
        let w = self.param(self.table.head());
        self.backend.packed_logits(self.workspace, out, x, (w, head), shape);
    }

    fn packed_linear(
        &mut self,
        y: &mut B::Tensor,
        x: &B::Tensor,
        (layer, packed): (Linear, &[B::Packed; LINEARS]),
        epilogue: Epilogue<'_, B>,
    ) {
        let [w, b] = [layer.w, layer.b].map(|slot| self.param(slot));
        let operands = LinearForward { y, x, w, b, mean: None, epilogue, turned: None };
        let number = layer.number as usize;
        let (packed, shape) = (&packed[number], self.shapes().linears()[number]);
        self.backend.packed_forward(self.workspace, operands, packed, shape);
    }
}

/// The head as a linear layer.
fn head_of(shapes: Shapes<'_>) -> LinearShape {
    let HeadShape { rows, channels: inputs, vocab_size: outputs, .. } = shapes.head();
    LinearShape { rows, inputs, outputs }
}
