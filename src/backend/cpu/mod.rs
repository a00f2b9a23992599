//! The CPU backend: f32 activations; GEMMs in f32, bf16 or MXFP4; kernels chosen once, by
//! instruction set; one thread pool an engine.
//!
//! Results do not depend on the number of threads: every sum has an order of its own.

mod arena;
mod attend;
mod disjoint;
mod embed;
mod gelu;
pub mod gemm;
mod head;
mod isa;
mod lanes;
mod linear;
mod math;
mod norm;
mod optimize;
#[cfg(test)]
mod tests;
mod workers;
mod workspace;

pub use arena::{Arena, Buffer};
pub use isa::Isa;
pub use workspace::Workspace;

use rayon::prelude::*;

use super::{
    Activation, Attend, AttentionBackward, AttentionShape, Backend, Classifier, Embed,
    EmbeddingGradients, EmbeddingShape, Epilogue, Head, HeadShape, Linear, LinearBackward,
    LinearForward, LinearShape, Memory, Norm, NormBackward, NormParams, NormShape, NormStatistics,
    OutputGradient, Precision, ResidualSum, Slot, StepPlan, WorkspaceShape,
};
use crate::Result;
use crate::mx::{self, Draw, LinearRecipe, Random};
use workers::Workers;

/// The CPU.
pub struct Cpu {
    isa: Isa,
    workers: Workers,
}

impl Cpu {
    /// Starts `threads` workers; 0 takes one for each core that the process may use.
    pub fn new(threads: usize) -> Result<Self> {
        Self::with_isa(threads, Isa::from_environment()?)
    }

    /// The same with a given instruction set.
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Self> {
        assert!(isa.is_available(), "this processor has no {}", isa.name());
        Ok(Self { isa, workers: Workers::start(threads)? })
    }

    /// The instruction set of its kernels.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Worker threads.
    pub fn threads(&self) -> usize {
        self.workers.count()
    }

    /// Runs `f` on the pool, so that parallel iterators in it use these workers and no others.
    fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.workers.install(f)
    }

    fn zero(&self, buffer: &mut [f32]) {
        self.install(|| buffer.par_chunks_mut(JOB_ELEMENTS).for_each(|x| x.fill(0.0)));
    }

    /// Calls `f(0)`, `f(1)` .. `f(jobs - 1)`, spread over the workers.
    fn parallel(&self, jobs: usize, f: impl Fn(usize) + Sync + Send) {
        self.install(|| (0..jobs).into_par_iter().with_max_len(1).for_each(f));
    }
}

/// Rows, columns or elements that one job of an element-wise operation takes.
///
/// Large enough to be worth a job, and fixed, for sums over jobs must not depend on the threads.
const JOB_ELEMENTS: usize = 1 << 14;

/// Rows of `channels` elements in one job.
fn rows_per_job(channels: usize) -> usize {
    (JOB_ELEMENTS / channels).max(1)
}

impl Workspace {
    /// Scratch memory for all operations of models of one shape.
    fn new(arena: &mut Arena, shape: &WorkspaceShape<'_>, threads: usize, isa: Isa) -> Self {
        let WorkspaceShape { sequences, channels, heads, vocab_size, backward, .. } = *shape;
        let head = LinearShape { rows: sequences.rows(), inputs: channels, outputs: vocab_size };
        let (precision, length) = (shape.precision(), sequences.length);
        let size = linear::scratch(isa, &linear_layers(shape), shape)
            .max(head::scratch(isa, head, precision, backward))
            .max(attend::scratch(isa, precision, length, channels / heads, backward));
        Self::of_size(arena, size, threads)
    }
}

/// The linear layers of a block.
fn linear_layers(shape: &WorkspaceShape<'_>) -> [LinearShape; 4] {
    let (rows, c, m) = (shape.sequences.rows(), shape.channels, shape.mlp_channels);
    let layer = |inputs, outputs| LinearShape { rows, inputs, outputs };
    [layer(c, 3 * c), layer(c, c), layer(c, m), layer(m, c)]
}

/// Starting an operation costs nothing here, so nothing is recorded.
pub struct Recordings;

impl Memory for Cpu {
    type Arena = Arena;
    type Tensor = Buffer<f32>;
    type F32 = Buffer<f32>;
    type Weights = Buffer<f32>;
    type Param<'a> = &'a [f32];
    type Gradient<'a> = &'a mut [f32];
    type Tokens = Buffer<u32>;
    type Workspace = Workspace;

    /// A cache line.
    const ALIGN: usize = 16;

    fn arena(&self, bytes: Option<usize>) -> Result<Arena> {
        bytes.map_or_else(|| Ok(Arena::measuring()), Arena::mapped)
    }

    fn arena_used(&self, arena: &Arena) -> usize {
        arena.used()
    }

    // NOTE: f32 whatever the precision asked for: GEMMs round their operands as they pack them.
    fn tensor(&self, arena: &mut Arena, len: usize, _: Precision) -> Buffer<f32> {
        arena.alloc(len)
    }

    fn f32(&self, arena: &mut Arena, len: usize) -> Buffer<f32> {
        arena.alloc(len)
    }

    fn weights(&self, arena: &mut Arena, len: usize, _: usize) -> Buffer<f32> {
        arena.alloc(len)
    }

    fn tokens(&self, arena: &mut Arena, len: usize) -> Result<Buffer<u32>> {
        Ok(arena.alloc(len))
    }

    fn workspace(&self, arena: &mut Arena, shape: &WorkspaceShape<'_>) -> Workspace {
        Workspace::new(arena, shape, self.threads(), self.isa)
    }

    fn param<'a>(&self, weights: &'a Buffer<f32>, slot: Slot) -> &'a [f32] {
        &weights[slot.range()]
    }

    fn gradients<'a, const N: usize>(
        &self,
        flat: &'a mut Buffer<f32>,
        slots: [Slot; N],
    ) -> [&'a mut [f32]; N] {
        flat.get_disjoint_mut(slots.map(Slot::range)).expect("slots are apart and in the buffer")
    }

    fn write_tokens(&self, to: &mut Buffer<u32>, from: &[u32]) {
        to[..from.len()].copy_from_slice(from);
    }

    fn write_f32(&self, to: &mut Buffer<f32>, at: usize, from: &[f32]) -> Result<()> {
        to[at..][..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn read_f32(&self, from: &Buffer<f32>, at: usize, to: &mut [f32]) -> Result<()> {
        to.copy_from_slice(&from[at..][..to.len()]);
        Ok(())
    }

    fn write_param(&self, to: &mut Buffer<f32>, slot: Slot, from: &[f32]) -> Result<()> {
        to[slot.range()].copy_from_slice(from);
        Ok(())
    }

    fn draw_param(&self, to: &mut Buffer<f32>, slot: Slot, std: f32, draw: &Draw) -> Result<()> {
        self.install(|| {
            to[slot.range()].par_chunks_mut(JOB_ELEMENTS).enumerate().for_each(|(job, part)| {
                mx::fill_normal(part, std, draw, (job * JOB_ELEMENTS / 2) as u32);
            });
        });
        Ok(())
    }

    fn read_param(&self, from: &Buffer<f32>, slot: Slot, to: &mut [f32]) -> Result<()> {
        to.copy_from_slice(&from[slot.range()]);
        Ok(())
    }

    fn zero_tensor(&self, buffer: &mut Buffer<f32>) {
        self.zero(buffer);
    }

    fn zero_gradient(&self, gradient: &mut [f32]) {
        self.zero(gradient);
    }
}

impl Backend for Cpu {
    type Recordings = Recordings;

    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.install(f)
    }

    fn recordings(&self) -> Recordings {
        Recordings
    }

    fn recorded(
        &self,
        _: &mut Recordings,
        _: &StepPlan,
        _: [u32; 2],
        mut operations: impl FnMut(),
    ) {
        operations();
    }
}

impl Embed for Cpu {
    fn embedding_forward(
        &self,
        out: &mut Buffer<f32>,
        tokens: &Buffer<u32>,
        wte: &[f32],
        wpe: &[f32],
        shape: EmbeddingShape,
    ) {
        embed::forward(self, out, tokens, wte, wpe, shape.sequences, shape.channels);
    }

    fn embedding_backward(
        &self,
        gradients: EmbeddingGradients<'_, Self>,
        dout: &Buffer<f32>,
        tokens: &Buffer<u32>,
        shape: EmbeddingShape,
    ) {
        let EmbeddingGradients { dwte, dwpe, accumulate } = gradients;
        if !accumulate {
            self.zero(dwpe);
        }
        embed::backward(self, dwte, dwpe, dout, tokens, shape.sequences, shape.channels);
    }
}

impl Norm for Cpu {
    fn layernorm_forward(
        &self,
        out: &mut Buffer<f32>,
        statistics: NormStatistics<&mut Buffer<f32>>,
        x: &Buffer<f32>,
        NormParams { w, b }: NormParams<'_, Self>,
        NormShape { rows, channels, epsilon }: NormShape,
    ) {
        norm::forward(self, out, statistics, x, w, b, rows, channels, epsilon);
    }

    fn add_layernorm_forward(
        &self,
        out: &mut Buffer<f32>,
        statistics: NormStatistics<&mut Buffer<f32>>,
        ResidualSum { sum, x, y }: ResidualSum<'_, Self>,
        NormParams { w, b }: NormParams<'_, Self>,
        NormShape { rows, channels, epsilon }: NormShape,
    ) {
        norm::add_forward(self, out, sum, statistics, x, y, w, b, rows, channels, epsilon);
    }

    fn layernorm_backward(
        &self,
        _workspace: &mut Workspace,
        operands: NormBackward<'_, Self>,
        NormShape { rows, channels, .. }: NormShape,
    ) {
        let NormBackward { dx, dw, db, dy, x, statistics, w, accumulate } = operands;
        if !accumulate {
            self.zero(dw);
            self.zero(db);
        }
        norm::backward(self, dx, dw, db, dy, x, statistics, w, rows, channels);
    }
}

impl Linear for Cpu {
    fn linear_forward(
        &self,
        workspace: &mut Workspace,
        operands: LinearForward<'_, Self>,
        shape: LinearShape,
        recipe: &LinearRecipe,
    ) {
        let LinearForward { y, x, w, b, epilogue } = operands;
        linear::forward(self, workspace, y, x, w, b, shape, recipe);
        if let Epilogue::Gelu { out, form } = epilogue {
            self.gelu_forward(out, y, shape.rows * shape.outputs, form);
        }
    }

    fn linear_backward(
        &self,
        workspace: &mut Workspace,
        operands: LinearBackward<'_, Self>,
        shape: LinearShape,
        recipe: &LinearRecipe,
        random: &Random,
    ) {
        let LinearBackward { dx, dw, db, dy, x, w, accumulate } = operands;
        let dy = match dy {
            OutputGradient::Whole(dy) => dy,
            OutputGradient::BehindGelu { d, y, form } => {
                self.gelu_backward(d, y, shape.rows * shape.outputs, form);
                &*d
            }
        };
        linear::backward(self, workspace, dx, dw, db, dy, x, w, shape, recipe, random, accumulate);
    }

    fn gelu_forward(&self, out: &mut Buffer<f32>, x: &Buffer<f32>, len: usize, form: Activation) {
        gelu::forward(self, &mut out[..len], &x[..len], form);
    }

    fn gelu_backward(&self, d: &mut Buffer<f32>, x: &Buffer<f32>, len: usize, form: Activation) {
        gelu::backward(self, &mut d[..len], &x[..len], form);
    }
}

impl Attend for Cpu {
    fn attention_forward(
        &self,
        workspace: &mut Workspace,
        out: &mut Buffer<f32>,
        lse: &mut Buffer<f32>,
        qkv: &Buffer<f32>,
        shape: AttentionShape,
    ) {
        attend::forward(self, workspace, out, lse, qkv, shape);
    }

    fn attention_backward(
        &self,
        workspace: &mut Workspace,
        operands: AttentionBackward<'_, Self>,
        shape: AttentionShape,
    ) {
        let AttentionBackward { dqkv, dout, out, lse, qkv } = operands;
        attend::backward(self, workspace, dqkv, dout, out, lse, qkv, shape);
    }
}

impl Head for Cpu {
    fn classifier(
        &self,
        workspace: &mut Workspace,
        operands: Classifier<'_, Self>,
        HeadShape { rows, channels, vocab_size, precision }: HeadShape,
    ) {
        let Classifier { losses, gradient, x, w, targets } = operands;
        let shape = LinearShape { rows, inputs: channels, outputs: vocab_size };
        head::run(self, workspace, losses, gradient, x, w, targets, shape, precision);
    }

    fn logits(
        &self,
        _workspace: &mut Workspace,
        logits: &mut Buffer<f32>,
        x: &Buffer<f32>,
        row: usize,
        w: &[f32],
        HeadShape { channels, vocab_size, precision, .. }: HeadShape,
    ) {
        let x = &x[row * channels..][..channels];
        head::logits(self, &mut logits[..vocab_size], x, w, precision);
    }
}
