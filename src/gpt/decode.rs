//! The forward pass of a few rows of one sequence behind others, whose keys and values are kept.

use std::ops::Range;

use super::Shapes;
use super::activations::{Activations, Beside, Rotary};
use super::params::{Linear, ParamTable};
use super::pass::{Pass, around_adapter, attended};
use crate::Result;
use crate::backend::{
    AttentionShape, Backend, Decode, DecoderWeights, Epilogue, HeadShape, LinearForward,
    LinearShape, OfSequence, ResidualSum, Sequences,
};
use crate::formats::LINEARS;
use crate::reserve::collect;

/// Keys and values of a sequence, of each block.
pub(crate) struct Kept<B: Decode>(Vec<B::Tensor>);

impl<B: Backend + Decode> Kept<B> {
    /// For so many positions.
    pub(crate) fn new(
        backend: &B,
        arena: &mut B::Arena,
        shapes: Shapes<'_>,
        positions: usize,
    ) -> Result<Self> {
        let kept = |l| Ok(backend.kept(arena, positions, shapes.attention(l)));
        let layers = 0..shapes.config.layers;
        Ok(Self(collect("the keys and values of all blocks", layers.map(kept))?))
    }

    /// Those of another sequence.
    pub(crate) fn copy_from(&mut self, backend: &B, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(to, from)| backend.copy_kept(from, to));
    }
}

/// Weights as few rows read them.
pub(crate) struct Packed<B: Decode> {
    blocks: Vec<[B::Packed; LINEARS]>,
    head: B::Packed,
}

impl<B: Backend + Decode> Packed<B> {
    /// Room for them.
    pub(crate) fn new(
        backend: &B,
        arena: &mut B::Arena,
        shapes: Shapes<'_>,
        weights: DecoderWeights,
    ) -> Result<Self> {
        for shape in shapes.linears().into_iter().chain([head_of(shapes)]) {
            backend.decodes(shape, weights)?;
        }
        let packed = |_| Ok(shapes.linears().map(|shape| backend.packed(arena, shape, weights)));
        let layers = 0..shapes.config.layers;
        let blocks = collect("the weights of all blocks", layers.map(packed))?;
        let head = backend.packed_head(arena, head_of(shapes), weights);
        Ok(Self { blocks, head })
    }

    /// Takes weights as they are now; what was kept before was made by others.
    pub(crate) fn fill(
        &mut self,
        backend: &B,
        table: &ParamTable,
        weights: &B::Weights,
        shapes: Shapes<'_>,
    ) {
        for (block, packed) in table.blocks.iter().zip(&mut self.blocks) {
            for layer in [block.qkv, block.projection, block.fc1, block.fc2] {
                let number = layer.number as usize;
                let w = backend.param(weights, layer.w);
                backend.pack_weight(&mut packed[number], w, shapes.linears()[number]);
            }
        }
        let w = backend.param(weights, table.head());
        backend.pack_weight(&mut self.head, w, head_of(shapes));
    }
}

impl<B: Backend + Decode> Pass<'_, B> {
    /// Rows (tokens and starts as they were written) behind those of which `kept` is, to the
    /// normalized output of the last block, and their keys and values to `kept`: of one sequence, or a
    /// row of each.
    pub(crate) fn forward_behind(
        &mut self,
        acts: &mut Activations<B>,
        (tokens, starts): (&B::Tokens, &[usize]),
        packed: &Packed<B>,
        kept: &mut [&mut Kept<B>],
    ) {
        let (backend, table, shapes) = (self.backend, self.table, self.shapes());
        let (wte, wpe) = (self.param(table.wte), table.wpe.map(|wpe| self.param(wpe)));
        let all = shapes.sequences.rows();
        assert!(
            kept.len() == starts.len() && [1, all].contains(&kept.len()),
            "a row of each, or all"
        );
        let to = &mut acts.residual[0];
        backend.embedding_behind(to, (tokens, starts), wte, wpe, shapes.embedding());
        if let Some(Rotary { frequencies, table, .. }) = &mut acts.rotary {
            backend.rotations_behind(table, frequencies, (tokens, starts), shapes.attention(0));
        }
        self.ln_1(acts, 0);
        for (l, block) in table.blocks.iter().enumerate() {
            let packed = &packed.blocks[l];
            let (y, x) = (&mut acts.qkv[l], &acts.ln_1[l]);
            self.packed_linear(y, x, (block.qkv, packed, &mut acts.beside), Epilogue::None);
            self.position(acts, l);
            let (out, rows) = (&mut acts.attention[l], all / kept.len());
            let qkv = attended(&acts.qkv[l], &acts.rotary);
            let sequences = Sequences { batch: 1, length: rows };
            let shape = AttentionShape { sequences, ..shapes.attention(l) };
            for (number, (kept, start)) in kept.iter_mut().zip(starts).enumerate() {
                let of = OfSequence { all, first: number * rows, start: *start };
                let kept = &mut kept.0[l];
                backend.attention_behind(self.workspace, out, qkv, kept, (tokens, of), shape);
            }
            let (y, x) = (&mut acts.branch, &acts.attention[l]);
            self.packed_linear(y, x, (block.projection, packed, &mut acts.beside), Epilogue::None);

            let (out, statistics) = (&mut acts.ln_2[l], acts.ln_2_statistics[l].as_mut());
            let (x, y) = (&acts.residual[l], &acts.branch);
            let sum = ResidualSum { sum: &mut acts.middle[l], x, y };
            self.add_norm(out, statistics, sum, block.ln_2, shapes.norm());
            let gelu = self.activation(&mut acts.gelu[l]);
            let (y, x) = (&mut acts.fc1[l], &acts.ln_2[l]);
            self.packed_linear(y, x, (block.fc1, packed, &mut acts.beside), gelu);
            let (y, x) = (&mut acts.branch, &acts.gelu[l]);
            self.packed_linear(y, x, (block.fc2, packed, &mut acts.beside), Epilogue::None);
            self.end(acts, l);
        }
    }

    /// Logits (n, V) of n rows after [`Pass::forward_behind`].
    pub(crate) fn logits_behind(
        &mut self,
        acts: &Activations<B>,
        rows: Range<usize>,
        packed: &Packed<B>,
        out: &mut B::F32,
    ) {
        let (x, shape) = ((&acts.ln_f, rows), self.shapes().head());
        let w = self.param(self.table.head());
        self.backend.packed_logits(self.workspace, out, x, (w, &packed.head), shape);
    }

    fn packed_linear(
        &mut self,
        y: &mut B::Tensor,
        x: &B::Tensor,
        (layer, packed, beside): (Linear, &[B::Packed; LINEARS], &mut Beside<B>),
        epilogue: Epilogue<'_, B>,
    ) {
        let (number, shapes) = (layer.number as usize, self.shapes());
        let [epilogue, behind] = around_adapter(layer, epilogue);
        let (w, b) = (self.param(layer.w), layer.b.map(|b| self.param(b)));
        let operands = LinearForward { y: &mut *y, x, w, b, mean: None, epilogue, turned: None };
        let (packed, shape) = (&packed[number], shapes.linears()[number]);
        self.backend.packed_forward(self.workspace, operands, packed, shape);
        if let Some(adapter) = layer.adapter {
            // All blocks share what is read at once.
            let low = &mut beside.low[0][number];
            self.adapt((y, low, x), adapter, shapes.adapter(number), behind);
        }
    }
}

/// The head as a linear layer.
fn head_of(shapes: Shapes<'_>) -> LinearShape {
    let HeadShape { rows, channels: inputs, vocab_size: outputs, .. } = shapes.head();
    LinearShape { rows, inputs, outputs }
}
