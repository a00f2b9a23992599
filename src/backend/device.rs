//! The backend of an engine, chosen at run time: one arm for each that the library has.
//!
//! Buffers are enums with the same arms. A buffer never meets another device than the one that made it,
//! because models, trainers and decoders hold one engine; [`Side`] states that where it is relied on.

use super::cpu::{self, Cpu};
use super::cuda::{self, Cuda};
use super::{
    Activation, AdamWStep, AttentionShape, Backend, ClassifierGradient, Largest, LinearShape,
    NormStatistics, Precision, Sequences, StepKind, StepSums, Trained, VisitTrained,
    WorkspaceShape,
};
use crate::Result;
use crate::mx::{Draw, LinearRecipe, Random};

/// The device that an engine runs on.
pub(crate) enum Device {
    /// Every processor.
    Cpu(Cpu),
    /// One NVIDIA GPU.
    Cuda(Cuda),
}

/// Something of a device's own type `T`, inside an enum over the devices.
pub(crate) trait Side<T> {
    fn side(&self) -> &T;
    fn side_mut(&mut self) -> &mut T;
}

/// An enum over what the devices have for one associated type of [`Backend`].
macro_rules! sides {
    ($(#[$meta:meta])* $name:ident, $cpu:ty, $cuda:ty) => {
        $(#[$meta])*
        // A trainer has one of each, so the size of the larger arm does not matter.
        #[allow(clippy::large_enum_variant)]
        pub(crate) enum $name {
            Cpu($cpu),
            Cuda($cuda),
        }
        sides!(impl $name, Cpu, $cpu);
        sides!(impl $name, Cuda, $cuda);
    };
    (impl $name:ident, $arm:ident, $side:ty) => {
        impl Side<$side> for $name {
            fn side(&self) -> &$side {
                match self {
                    Self::$arm(side) => side,
                    _ => unreachable!("a buffer stays with the device that made it"),
                }
            }
            fn side_mut(&mut self) -> &mut $side {
                match self {
                    Self::$arm(side) => side,
                    _ => unreachable!("a buffer stays with the device that made it"),
                }
            }
        }
    };
}

sides!(Arena, cpu::Arena, cuda::Arena);
sides!(Tensor, cpu::Buffer<f32>, cuda::Tensor);
sides!(F32, cpu::Buffer<f32>, cuda::F32);
sides!(Param, cpu::Buffer<f32>, cuda::Param);
sides!(Tokens, cpu::Buffer<u32>, cuda::Tokens);
sides!(Workspace, cpu::Workspace, cuda::Workspace);
sides!(Optimizer, f64, cuda::Optimizer);
sides!(Recordings, cpu::Recordings, cuda::Recordings);

/// Calls the same method of whichever device it is; arguments take their side by the types that the
/// method wants.
macro_rules! on_device {
    ($self:ident, $backend:ident => $call:expr) => {
        match $self {
            Self::Cpu($backend) => $call,
            Self::Cuda($backend) => $call,
        }
    };
}

/// The same, and puts the result into the enum `$name`.
macro_rules! made_by_device {
    ($self:ident, $name:ident, $backend:ident => $call:expr) => {
        match $self {
            Self::Cpu($backend) => $name::Cpu($call),
            Self::Cuda($backend) => $name::Cuda($call),
        }
    };
}

fn sides_of<T>(statistics: NormStatistics<&impl Side<T>>) -> NormStatistics<&T> {
    NormStatistics { mean: statistics.mean.side(), rstd: statistics.rstd.side() }
}

fn sides_of_mut<T>(statistics: NormStatistics<&mut impl Side<T>>) -> NormStatistics<&mut T> {
    NormStatistics { mean: statistics.mean.side_mut(), rstd: statistics.rstd.side_mut() }
}

/// A visit to all parameters as a device's own types see it.
fn visit<B>(all: &mut VisitTrained<'_, Device>, visitor: &mut dyn FnMut(Trained<'_, B>))
where
    B: Backend,
    Param: Side<B::Param>,
    F32: Side<B::F32>,
{
    all(&mut |one| {
        visitor(Trained {
            param: one.param.side_mut(),
            m: one.m.side_mut(),
            v: one.v.side_mut(),
            gradient: one.gradient.side_mut(),
            decays: one.decays,
        });
    });
}

fn gradient_of<'a, B>(gradient: ClassifierGradient<'a, Device>) -> ClassifierGradient<'a, B>
where
    B: Backend,
    Tensor: Side<B::Tensor>,
    F32: Side<B::F32>,
{
    let ClassifierGradient { dx, dwte, scale, accumulate } = gradient;
    ClassifierGradient { dx: dx.side_mut(), dwte: dwte.side_mut(), scale, accumulate }
}

impl Backend for Device {
    type Arena = Arena;
    type Tensor = Tensor;
    type F32 = F32;
    type Param = Param;
    type Tokens = Tokens;
    type Workspace = Workspace;
    type Optimizer = Optimizer;
    type Recordings = Recordings;

    fn supports(&self, shape: &WorkspaceShape) -> Result<()> {
        on_device!(self, b => b.supports(shape))
    }

    fn arena(&self, bytes: Option<usize>) -> Result<Arena> {
        Ok(made_by_device!(self, Arena, b => b.arena(bytes)?))
    }

    fn arena_used(&self, arena: &Arena) -> usize {
        on_device!(self, b => b.arena_used(arena.side()))
    }

    fn tensor(&self, arena: &mut Arena, len: usize, precision: Precision) -> Tensor {
        made_by_device!(self, Tensor, b => b.tensor(arena.side_mut(), len, precision))
    }

    fn f32(&self, arena: &mut Arena, len: usize) -> F32 {
        made_by_device!(self, F32, b => b.f32(arena.side_mut(), len))
    }

    fn param(&self, arena: &mut Arena, len: usize) -> Param {
        made_by_device!(self, Param, b => b.param(arena.side_mut(), len))
    }

    fn tokens(&self, arena: &mut Arena, len: usize) -> Result<Tokens> {
        Ok(made_by_device!(self, Tokens, b => b.tokens(arena.side_mut(), len)?))
    }

    fn workspace(&self, arena: &mut Arena, shape: &WorkspaceShape) -> Workspace {
        made_by_device!(self, Workspace, b => b.workspace(arena.side_mut(), shape))
    }

    fn optimizer(&self, arena: &mut Arena, parameters: usize) -> Result<Optimizer> {
        Ok(made_by_device!(self, Optimizer, b => b.optimizer(arena.side_mut(), parameters)?))
    }

    fn write_tokens(&self, to: &mut Tokens, from: &[u32]) {
        on_device!(self, b => b.write_tokens(to.side_mut(), from));
    }

    fn write_f32(&self, to: &mut F32, from: &[f32]) -> Result<()> {
        on_device!(self, b => b.write_f32(to.side_mut(), from))
    }

    fn read_f32(&self, from: &F32, to: &mut [f32]) -> Result<()> {
        on_device!(self, b => b.read_f32(from.side(), to))
    }

    fn write_param(&self, to: &mut Param, from: &[f32]) -> Result<()> {
        on_device!(self, b => b.write_param(to.side_mut(), from))
    }

    fn draw_param(&self, to: &mut Param, std: f32, draw: &Draw) -> Result<()> {
        on_device!(self, b => b.draw_param(to.side_mut(), std, draw))
    }

    fn read_param(&self, from: &Param, to: &mut [f32]) -> Result<()> {
        on_device!(self, b => b.read_param(from.side(), to))
    }

    fn recordings(&self) -> Recordings {
        made_by_device!(self, Recordings, b => b.recordings())
    }

    fn recorded(
        &self,
        recordings: &mut Recordings,
        kind: StepKind,
        place: [u32; 2],
        operations: impl FnMut(),
    ) {
        on_device!(self, b => b.recorded(recordings.side_mut(), kind, place, operations));
    }

    fn zero_tensor(&self, buffer: &mut Tensor) {
        on_device!(self, b => b.zero_tensor(buffer.side_mut()));
    }

    fn zero_f32(&self, buffer: &mut F32) {
        on_device!(self, b => b.zero_f32(buffer.side_mut()));
    }

    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        on_device!(self, b => b.scope(f))
    }

    fn embedding_forward(
        &self,
        out: &mut Tensor,
        tokens: &Tokens,
        wte: &Param,
        wpe: &Param,
        sequences: Sequences,
        channels: usize,
    ) {
        on_device!(self, b => b.embedding_forward(
            out.side_mut(), tokens.side(), wte.side(), wpe.side(), sequences, channels
        ));
    }

    fn embedding_backward(
        &self,
        dwte: &mut F32,
        dwpe: &mut F32,
        dout: &Tensor,
        tokens: &Tokens,
        sequences: Sequences,
        channels: usize,
        accumulate: bool,
    ) {
        on_device!(self, b => b.embedding_backward(
            dwte.side_mut(), dwpe.side_mut(), dout.side(), tokens.side(), sequences, channels,
            accumulate
        ));
    }

    fn layernorm_forward(
        &self,
        out: &mut Tensor,
        statistics: NormStatistics<&mut F32>,
        x: &Tensor,
        w: &Param,
        b: &Param,
        rows: usize,
        channels: usize,
        epsilon: f32,
    ) {
        on_device!(self, d => d.layernorm_forward(
            out.side_mut(), sides_of_mut(statistics), x.side(), w.side(), b.side(), rows, channels,
            epsilon
        ));
    }

    fn add_layernorm_forward(
        &self,
        out: &mut Tensor,
        sum: &mut Tensor,
        statistics: NormStatistics<&mut F32>,
        x: &Tensor,
        y: &Tensor,
        w: &Param,
        b: &Param,
        rows: usize,
        channels: usize,
        epsilon: f32,
    ) {
        on_device!(self, d => d.add_layernorm_forward(
            out.side_mut(), sum.side_mut(), sides_of_mut(statistics), x.side(), y.side(), w.side(),
            b.side(), rows, channels, epsilon
        ));
    }

    fn layernorm_backward(
        &self,
        workspace: &mut Workspace,
        dx: &mut Tensor,
        dw: &mut F32,
        db: &mut F32,
        dy: &Tensor,
        x: &Tensor,
        statistics: NormStatistics<&F32>,
        w: &Param,
        rows: usize,
        channels: usize,
        accumulate: bool,
    ) {
        on_device!(self, b => b.layernorm_backward(
            workspace.side_mut(), dx.side_mut(), dw.side_mut(), db.side_mut(), dy.side(), x.side(),
            sides_of(statistics), w.side(), rows, channels, accumulate
        ));
    }

    fn linear_forward(
        &self,
        workspace: &mut Workspace,
        y: &mut Tensor,
        x: &Tensor,
        w: &Param,
        b: &Param,
        shape: LinearShape,
        recipe: &LinearRecipe,
    ) {
        on_device!(self, d => d.linear_forward(
            workspace.side_mut(), y.side_mut(), x.side(), w.side(), b.side(), shape, recipe
        ));
    }

    fn linear_gelu_forward(
        &self,
        workspace: &mut Workspace,
        out: &mut Tensor,
        pre: &mut Tensor,
        x: &Tensor,
        w: &Param,
        b: &Param,
        shape: LinearShape,
        recipe: &LinearRecipe,
        form: Activation,
    ) {
        on_device!(self, d => d.linear_gelu_forward(
            workspace.side_mut(), out.side_mut(), pre.side_mut(), x.side(), w.side(), b.side(),
            shape, recipe, form
        ));
    }

    fn linear_backward(
        &self,
        workspace: &mut Workspace,
        dx: &mut Tensor,
        dw: &mut F32,
        db: &mut F32,
        dy: &Tensor,
        x: &Tensor,
        w: &Param,
        shape: LinearShape,
        recipe: &LinearRecipe,
        random: &Random,
        accumulate: bool,
    ) {
        on_device!(self, b => b.linear_backward(
            workspace.side_mut(), dx.side_mut(), dw.side_mut(), db.side_mut(), dy.side(), x.side(),
            w.side(), shape, recipe, random, accumulate
        ));
    }

    fn linear_gelu_backward(
        &self,
        workspace: &mut Workspace,
        dx: &mut Tensor,
        dw: &mut F32,
        db: &mut F32,
        dy: &mut Tensor,
        pre: &Tensor,
        x: &Tensor,
        w: &Param,
        shape: LinearShape,
        recipe: &LinearRecipe,
        random: &Random,
        accumulate: bool,
        form: Activation,
    ) {
        on_device!(self, b => b.linear_gelu_backward(
            workspace.side_mut(), dx.side_mut(), dw.side_mut(), db.side_mut(), dy.side_mut(),
            pre.side(), x.side(), w.side(), shape, recipe, random, accumulate, form
        ));
    }

    fn gelu_forward(&self, out: &mut Tensor, x: &Tensor, len: usize, form: Activation) {
        on_device!(self, b => b.gelu_forward(out.side_mut(), x.side(), len, form));
    }

    fn gelu_backward(&self, d: &mut Tensor, x: &Tensor, len: usize, form: Activation) {
        on_device!(self, b => b.gelu_backward(d.side_mut(), x.side(), len, form));
    }

    fn attention_forward(
        &self,
        workspace: &mut Workspace,
        out: &mut Tensor,
        lse: &mut F32,
        qkv: &Tensor,
        shape: AttentionShape,
    ) {
        on_device!(self, b => b.attention_forward(
            workspace.side_mut(), out.side_mut(), lse.side_mut(), qkv.side(), shape
        ));
    }

    fn attention_backward(
        &self,
        workspace: &mut Workspace,
        dqkv: &mut Tensor,
        dout: &Tensor,
        out: &Tensor,
        lse: &F32,
        qkv: &Tensor,
        shape: AttentionShape,
    ) {
        on_device!(self, b => b.attention_backward(
            workspace.side_mut(), dqkv.side_mut(), dout.side(), out.side(), lse.side(), qkv.side(),
            shape
        ));
    }

    fn classifier(
        &self,
        workspace: &mut Workspace,
        losses: &mut F32,
        gradient: Option<ClassifierGradient<'_, Self>>,
        x: &Tensor,
        wte: &Param,
        targets: &Tokens,
        rows: usize,
        channels: usize,
        vocab_size: usize,
        precision: Precision,
    ) {
        on_device!(self, b => b.classifier(
            workspace.side_mut(), losses.side_mut(), gradient.map(gradient_of), x.side(),
            wte.side(), targets.side(), rows, channels, vocab_size, precision
        ));
    }

    fn logits(
        &self,
        workspace: &mut Workspace,
        logits: &mut F32,
        x: &Tensor,
        row: usize,
        wte: &Param,
        channels: usize,
        vocab_size: usize,
        precision: Precision,
    ) {
        on_device!(self, b => b.logits(
            workspace.side_mut(), logits.side_mut(), x.side(), row, wte.side(), channels, vocab_size,
            precision
        ));
    }

    fn add_losses(&self, optimizer: &mut Optimizer, losses: &F32, rows: usize, accumulate: bool) {
        on_device!(self, b => b.add_losses(optimizer.side_mut(), losses.side(), rows, accumulate));
    }

    fn finish_step(
        &self,
        workspace: &mut Workspace,
        optimizer: &mut Optimizer,
        parameters: &mut VisitTrained<'_, Self>,
        step: &AdamWStep,
    ) -> Result<StepSums> {
        on_device!(self, b => {
            let (workspace, optimizer) = (workspace.side_mut(), optimizer.side_mut());
            b.finish_step(workspace, optimizer, &mut |f| visit(parameters, f), step)
        })
    }

    fn try_step(
        &self,
        optimizer: &mut Optimizer,
        parameters: &mut VisitTrained<'_, Self>,
        step: &AdamWStep,
        sums: &StepSums,
        largest: &mut (dyn FnMut(Largest) + Send),
    ) -> Result<()> {
        on_device!(self, b => {
            let optimizer = optimizer.side_mut();
            b.try_step(optimizer, &mut |f| visit(parameters, f), step, sums, largest)
        })
    }

    fn sum_losses(&self, optimizer: &mut Optimizer, losses: &F32, rows: usize) -> Result<f64> {
        on_device!(self, b => b.sum_losses(optimizer.side_mut(), losses.side(), rows))
    }
}
