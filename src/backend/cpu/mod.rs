//! The CPU backend: f32 activations; GEMMs in f32, bf16 or MXFP4; kernels chosen once, by
//! instruction set; one thread pool an engine.
//!
//! Results do not depend on the number of threads: every sum has an order of its own.

mod adamw;
mod attention;
mod classifier;
mod embedding;
mod gelu;
pub mod gemm;
mod isa;
mod lanes;
mod layernorm;
mod linear;
mod math;
mod memory;
mod shared;
#[cfg(test)]
mod tests;
mod workers;
mod workspace;

pub use isa::Isa;
pub use memory::{Arena, Buffer};
pub use workspace::Workspace;

use rayon::prelude::*;

use super::{
    Activation, AdamWStep, AttentionShape, Backend, ClassifierGradient, Largest, LinearShape,
    NormStatistics, Precision, Sequences, StepKind, StepSums, VisitTrained, WorkspaceShape,
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

/// Starting an operation costs nothing here, so nothing is recorded.
pub struct Recordings;

impl Backend for Cpu {
    type Arena = Arena;
    type Tensor = Buffer<f32>;
    type F32 = Buffer<f32>;
    type Param = Buffer<f32>;
    type Tokens = Buffer<u32>;
    type Workspace = Workspace;
    /// The sum of the losses of a step.
    type Optimizer = f64;
    type Recordings = Recordings;

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

    fn param(&self, arena: &mut Arena, len: usize) -> Buffer<f32> {
        arena.alloc(len)
    }

    fn tokens(&self, arena: &mut Arena, len: usize) -> Result<Buffer<u32>> {
        Ok(arena.alloc(len))
    }

    fn workspace(&self, arena: &mut Arena, shape: &WorkspaceShape) -> Workspace {
        Workspace::new(arena, shape, self.threads(), self.isa)
    }

    fn optimizer(&self, _: &mut Arena, _: usize) -> Result<f64> {
        Ok(0.0)
    }

    fn write_tokens(&self, to: &mut Buffer<u32>, from: &[u32]) {
        to[..from.len()].copy_from_slice(from);
    }

    fn write_f32(&self, to: &mut Buffer<f32>, from: &[f32]) -> Result<()> {
        to.copy_from_slice(from);
        Ok(())
    }

    fn read_f32(&self, from: &Buffer<f32>, to: &mut [f32]) -> Result<()> {
        to.copy_from_slice(&from[..to.len()]);
        Ok(())
    }

    fn write_param(&self, to: &mut Buffer<f32>, from: &[f32]) -> Result<()> {
        to.copy_from_slice(from);
        Ok(())
    }

    fn draw_param(&self, to: &mut Buffer<f32>, std: f32, draw: &Draw) -> Result<()> {
        self.install(|| {
            to.par_chunks_mut(JOB_ELEMENTS).enumerate().for_each(|(job, part)| {
                mx::fill_normal(part, std, draw, (job * JOB_ELEMENTS / 2) as u32);
            });
        });
        Ok(())
    }

    fn read_param(&self, from: &Buffer<f32>, to: &mut [f32]) -> Result<()> {
        to.copy_from_slice(from);
        Ok(())
    }

    fn recordings(&self) -> Recordings {
        Recordings
    }

    fn recorded(&self, _: &mut Recordings, _: StepKind, _: [u32; 2], mut operations: impl FnMut()) {
        operations();
    }

    fn zero_tensor(&self, buffer: &mut Buffer<f32>) {
        self.zero(buffer);
    }

    fn zero_f32(&self, buffer: &mut Buffer<f32>) {
        self.zero(buffer);
    }

    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.install(f)
    }

    fn embedding_forward(
        &self,
        out: &mut Buffer<f32>,
        tokens: &Buffer<u32>,
        wte: &Buffer<f32>,
        wpe: &Buffer<f32>,
        sequences: Sequences,
        channels: usize,
    ) {
        embedding::forward(self, out, tokens, wte, wpe, sequences, channels);
    }

    fn embedding_backward(
        &self,
        dwte: &mut Buffer<f32>,
        dwpe: &mut Buffer<f32>,
        dout: &Buffer<f32>,
        tokens: &Buffer<u32>,
        sequences: Sequences,
        channels: usize,
        accumulate: bool,
    ) {
        if !accumulate {
            self.zero(dwpe);
        }
        embedding::backward(self, dwte, dwpe, dout, tokens, sequences, channels);
    }

    fn layernorm_forward(
        &self,
        out: &mut Buffer<f32>,
        statistics: NormStatistics<&mut Buffer<f32>>,
        x: &Buffer<f32>,
        w: &Buffer<f32>,
        b: &Buffer<f32>,
        rows: usize,
        channels: usize,
        epsilon: f32,
    ) {
        layernorm::forward(self, out, statistics, x, w, b, rows, channels, epsilon);
    }

    fn add_layernorm_forward(
        &self,
        out: &mut Buffer<f32>,
        sum: &mut Buffer<f32>,
        statistics: NormStatistics<&mut Buffer<f32>>,
        x: &Buffer<f32>,
        y: &Buffer<f32>,
        w: &Buffer<f32>,
        b: &Buffer<f32>,
        rows: usize,
        channels: usize,
        epsilon: f32,
    ) {
        layernorm::add_forward(self, out, sum, statistics, x, y, w, b, rows, channels, epsilon);
    }

    fn layernorm_backward(
        &self,
        _workspace: &mut Workspace,
        dx: &mut Buffer<f32>,
        dw: &mut Buffer<f32>,
        db: &mut Buffer<f32>,
        dy: &Buffer<f32>,
        x: &Buffer<f32>,
        statistics: NormStatistics<&Buffer<f32>>,
        w: &Buffer<f32>,
        rows: usize,
        channels: usize,
        accumulate: bool,
    ) {
        if !accumulate {
            self.zero(dw);
            self.zero(db);
        }
        layernorm::backward(self, dx, dw, db, dy, x, statistics, w, rows, channels);
    }

    fn linear_forward(
        &self,
        workspace: &mut Workspace,
        y: &mut Buffer<f32>,
        x: &Buffer<f32>,
        w: &Buffer<f32>,
        b: &Buffer<f32>,
        shape: LinearShape,
        recipe: &LinearRecipe,
    ) {
        linear::forward(self, workspace, y, x, w, b, shape, recipe);
    }

    fn linear_backward(
        &self,
        workspace: &mut Workspace,
        dx: &mut Buffer<f32>,
        dw: &mut Buffer<f32>,
        db: &mut Buffer<f32>,
        dy: &Buffer<f32>,
        x: &Buffer<f32>,
        w: &Buffer<f32>,
        shape: LinearShape,
        recipe: &LinearRecipe,
        random: &Random,
        accumulate: bool,
    ) {
        linear::backward(self, workspace, dx, dw, db, dy, x, w, shape, recipe, random, accumulate);
    }

    fn gelu_forward(&self, out: &mut Buffer<f32>, x: &Buffer<f32>, len: usize, form: Activation) {
        gelu::forward(self, &mut out[..len], &x[..len], form);
    }

    fn gelu_backward(&self, d: &mut Buffer<f32>, x: &Buffer<f32>, len: usize, form: Activation) {
        gelu::backward(self, &mut d[..len], &x[..len], form);
    }

    fn attention_forward(
        &self,
        workspace: &mut Workspace,
        out: &mut Buffer<f32>,
        lse: &mut Buffer<f32>,
        qkv: &Buffer<f32>,
        shape: AttentionShape,
    ) {
        attention::forward(self, workspace, out, lse, qkv, shape);
    }

    fn attention_backward(
        &self,
        workspace: &mut Workspace,
        dqkv: &mut Buffer<f32>,
        dout: &Buffer<f32>,
        out: &Buffer<f32>,
        lse: &Buffer<f32>,
        qkv: &Buffer<f32>,
        shape: AttentionShape,
    ) {
        attention::backward(self, workspace, dqkv, dout, out, lse, qkv, shape);
    }

    fn classifier(
        &self,
        workspace: &mut Workspace,
        losses: &mut Buffer<f32>,
        gradient: Option<ClassifierGradient<'_, Self>>,
        x: &Buffer<f32>,
        wte: &Buffer<f32>,
        targets: &Buffer<u32>,
        rows: usize,
        channels: usize,
        vocab_size: usize,
        precision: Precision,
    ) {
        let shape = LinearShape { rows, inputs: channels, outputs: vocab_size };
        classifier::run(self, workspace, losses, gradient, x, wte, targets, shape, precision);
    }

    fn logits(
        &self,
        _workspace: &mut Workspace,
        logits: &mut Buffer<f32>,
        x: &Buffer<f32>,
        row: usize,
        wte: &Buffer<f32>,
        channels: usize,
        vocab_size: usize,
        precision: Precision,
    ) {
        let x = &x[row * channels..][..channels];
        classifier::logits(self, &mut logits[..vocab_size], x, wte, precision);
    }

    fn add_losses(&self, sum: &mut f64, losses: &Buffer<f32>, rows: usize, accumulate: bool) {
        *sum = if accumulate { *sum } else { 0.0 } + sum_of(&losses[..rows]);
    }

    fn finish_step(
        &self,
        _workspace: &mut Workspace,
        losses: &mut f64,
        parameters: &mut VisitTrained<'_, Self>,
        step: &AdamWStep,
    ) -> Result<StepSums> {
        self.install(|| {
            let mut squares = 0.0;
            parameters(&mut |parameter| {
                squares += adamw::sum_of_squares(self, parameter.gradient);
            });
            let sums = StepSums { losses: *losses, squares, raised_blocks: 0 };
            if let Some(gradient_scale) = sums.gradient_scale(step) {
                parameters(&mut |parameter| adamw::update(self, parameter, step, gradient_scale));
            }
            Ok(sums)
        })
    }

    fn try_step(
        &self,
        _: &mut f64,
        parameters: &mut VisitTrained<'_, Self>,
        step: &AdamWStep,
        sums: &StepSums,
        largest: &mut (dyn FnMut(Largest) + Send),
    ) -> Result<()> {
        self.install(|| {
            if let Some(gradient_scale) = sums.gradient_scale(step) {
                parameters(&mut |parameter| {
                    largest(adamw::try_update(self, &parameter, step, gradient_scale));
                });
            }
        });
        Ok(())
    }

    fn sum_losses(&self, _: &mut f64, losses: &Buffer<f32>, rows: usize) -> Result<f64> {
        Ok(sum_of(&losses[..rows]))
    }
}

/// The sum of losses, in order.
fn sum_of(losses: &[f32]) -> f64 {
    losses.iter().map(|loss| f64::from(*loss)).sum()
}
