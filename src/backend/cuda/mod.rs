//! The CUDA backend: bf16 activations and copies of the weights (f32 ones in the recipe `fp32`),
//! f32 master weights, moments and gradients; GEMMs by cuBLASLt, everything else by the kernels in
//! `kernels/`, each launched from the file of the same name here.
//!
//! Everything is queued on one stream, and the host waits only where it reads a number. Kernels sum
//! in an order that depends on shapes alone, so two runs on one kind of GPU give the same bits.

mod adamw;
mod attention;
mod classifier;
mod device;
mod embedding;
#[cfg(test)]
mod emulator;
mod gelu;
mod kernels;
mod layernorm;
mod linear;
mod normal;
mod quantize;
#[cfg(test)]
mod tests;
mod workspace;

use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::sys;

pub(crate) use adamw::Optimizer;
pub(crate) use device::memory::{Arena, F32, Param, Tensor};
pub(crate) use device::recordings::Recordings;
pub(crate) use embedding::Tokens;
pub(crate) use workspace::Workspace;

use super::{
    Activation, AdamWStep, AttentionShape, Backend, ClassifierGradient, Largest, LinearShape,
    NormStatistics, Precision, Sequences, StepKind, StepSums, VisitTrained, WorkspaceShape,
};
use crate::mx::{Draw, Random};
use crate::recipe::{Forward, LinearRecipe};
use crate::{CudaStream, Error, Result};
use device::gemm::{Gemm, Product, Type};
use device::gpu::Gpu;
use linear::Gradient;
use quantize::carrier;

/// One GPU.
pub(crate) struct Cuda {
    gemm: Gemm,
    gpu: Arc<Gpu>,
    /// What multiplies MXFP8 operands on chips that do not.
    #[cfg(test)]
    stand_in: Option<fn(&Self, &Product)>,
}

impl Cuda {
    /// Opens GPU `ordinal`. `warn` receives what a user should put right.
    pub(crate) fn new(
        ordinal: usize,
        stream: Option<CudaStream>,
        warn: &dyn Fn(String),
    ) -> Result<Self> {
        let stream = stream.map(|stream| stream.as_raw().cast());
        Self::of(Gpu::open(ordinal, stream, &kernels::FILES, warn)?)
    }

    fn of(gpu: Gpu) -> Result<Self> {
        let gpu = Arc::new(gpu);
        Ok(Self {
            gemm: Gemm::new(&gpu)?,
            gpu,
            #[cfg(test)]
            stand_in: None,
        })
    }

    /// The chip, for the log.
    pub(crate) fn description(&self) -> String {
        let (major, minor) = self.gpu.capability;
        let memory = self.gpu.memory().map_or(0, |(_, total)| total >> 20);
        format!("{} (compute capability {major}.{minor}, {memory} MiB)", self.gpu.name)
    }

    fn product(&self, workspace: &Workspace, product: &Product) {
        if product.operands.contains(&Type::E2m1) {
            return carrier::multiply_fp4(self, product);
        }
        #[cfg(test)]
        if let Some(multiply) = self.stand_in
            && product.operands.contains(&Type::Mxfp8)
        {
            return multiply(self, product);
        }
        self.gemm.run(&self.gpu, product, workspace.gemm.address);
    }

    /// Bytes of the GPU's memory that are free, and those that it has.
    pub(crate) fn memory(&self) -> Option<(u64, u64)> {
        self.gpu.memory().map(|(free, total)| (free as u64, total as u64))
    }

    /// Bytes from `address` to the end of its allocation, if a GPU has it.
    pub(crate) fn room_at(&self, address: u64) -> Option<usize> {
        use sys::CUpointer_attribute as Attribute;
        let attribute = |which, value: *mut u64| {
            // SAFETY: each of these attributes has at most 8 bytes.
            let result = unsafe { sys::cuPointerGetAttribute(value.cast(), which, address) };
            result == sys::CUresult::CUDA_SUCCESS
        };
        let (mut kind, mut start, mut size) = (0, 0, 0);
        self.gpu.scope(|| {
            // The driver does not know ordinary host memory, and refuses.
            let known = attribute(Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, &mut kind)
                && kind == sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u64
                && attribute(Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, &mut start)
                && attribute(Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE, &mut size);
            known.then(|| (start + size).saturating_sub(address) as usize)
        })
    }

    /// Waits for everything before it, then copies.
    pub(crate) fn read<T: Pod>(&self, from: u64, to: &mut [T]) -> Result<()> {
        self.gpu.scope(|| {
            // SAFETY: the buffer at `from` is at least as long as `to`, which outlives the wait.
            let result = unsafe {
                sys::cuMemcpyDtoHAsync_v2(
                    to.as_mut_ptr().cast(),
                    from,
                    size_of_val(to),
                    self.gpu.stream(),
                )
            };
            self.gpu.note("reading from the GPU", result);
            self.gpu.synchronize()
        })
    }

    /// Copies after everything before it, and waits.
    pub(crate) fn write<T: Pod>(&self, to: u64, from: &[T]) -> Result<()> {
        self.gpu.scope(|| {
            // SAFETY: the buffer at `to` is as long as `from`, which outlives the wait.
            let result = unsafe {
                sys::cuMemcpyHtoDAsync_v2(
                    to,
                    from.as_ptr().cast(),
                    size_of_val(from),
                    self.gpu.stream(),
                )
            };
            self.gpu.note("writing to the GPU", result);
            self.gpu.synchronize()
        })
    }

    fn clear(&self, address: u64, bytes: usize) {
        // SAFETY: the buffer at `address` has `bytes` bytes.
        let result = unsafe { sys::cuMemsetD8Async(address, 0, bytes, self.gpu.stream()) };
        self.gpu.note("clearing memory", result);
    }
}

/// `kernel!(tensor, "name", other, arguments)` is the name of a template's kernel for the tensor's
/// precision.
macro_rules! kernel {
    ($tensor:expr, $name:literal $(, $argument:literal)*) => {
        match $tensor.precision {
            $crate::backend::Precision::F32 => concat!($name, "<float" $(, ",", $argument)*, ">"),
            $crate::backend::Precision::Bf16 => concat!($name, "<bf16" $(, ",", $argument)*, ">"),
        }
    };
}
use kernel;

impl Backend for Cuda {
    type Arena = Arena;
    type Tensor = Tensor;
    type F32 = F32;
    type Param = Param;
    type Tokens = Tokens;
    type Workspace = Workspace;
    type Optimizer = Optimizer;
    type Recordings = Recordings;

    fn supports(&self, shape: &WorkspaceShape) -> Result<()> {
        let (head_size, most) = (shape.channels / shape.heads, attention::MAX_HEAD_SIZE);
        if head_size > most {
            return Err(Error::Unsupported {
                what: format!("attention with {head_size} channels a head on a GPU"),
                remedy: format!("use more heads, so that each has at most {most} channels"),
            });
        }
        let mxfp4 = shape.backward.is_some_and(|backward| backward.mxfp4_group.is_some());
        let widest = shape.mlp_channels.max(3 * shape.channels);
        if mxfp4 && widest > quantize::MAX_DEPTH {
            return Err(Error::Unsupported {
                what: format!("MXFP4 with layers of {widest} channels on a GPU"),
                remedy: format!(
                    "use recipe bf16, or at most {} channels in an MLP and {} outside",
                    quantize::MAX_DEPTH,
                    quantize::MAX_DEPTH / 4
                ),
            });
        }
        Ok(())
    }

    fn arena(&self, bytes: Option<usize>) -> Result<Arena> {
        match bytes {
            None => Ok(Arena::measuring(&self.gpu)),
            Some(bytes) => Arena::allocated(&self.gpu, bytes),
        }
    }

    fn arena_used(&self, arena: &Arena) -> usize {
        arena.used()
    }

    fn tensor(&self, arena: &mut Arena, len: usize, precision: Precision) -> Tensor {
        arena.tensor(len, precision)
    }

    fn f32(&self, arena: &mut Arena, len: usize) -> F32 {
        arena.f32(len)
    }

    fn param(&self, arena: &mut Arena, len: usize) -> Param {
        arena.param(len)
    }

    fn tokens(&self, arena: &mut Arena, len: usize) -> Result<Tokens> {
        Tokens::new(arena, len)
    }

    fn workspace(&self, arena: &mut Arena, shape: &WorkspaceShape) -> Workspace {
        Workspace::new(arena, shape)
    }

    fn optimizer(&self, arena: &mut Arena, parameters: usize) -> Result<Optimizer> {
        Optimizer::new(arena, parameters)
    }

    fn write_tokens(&self, to: &mut Tokens, from: &[u32]) {
        to.write(from);
    }

    fn write_f32(&self, to: &mut F32, from: &[f32]) -> Result<()> {
        self.write(to.address(), from)
    }

    fn read_f32(&self, from: &F32, to: &mut [f32]) -> Result<()> {
        self.read(from.address(), to)
    }

    fn write_param(&self, to: &mut Param, from: &[f32]) -> Result<()> {
        self.write(to.master.address(), from)?;
        self.gpu.scope(|| {
            adamw::copy_to_bf16(self, to);
            self.gpu.synchronize()
        })
    }

    fn draw_param(&self, to: &mut Param, std: f32, draw: &Draw) -> Result<()> {
        self.gpu.scope(|| {
            normal::fill(self, to.master.address(), to.master.len, std, draw);
            adamw::copy_to_bf16(self, to);
            self.gpu.synchronize()
        })
    }

    fn read_param(&self, from: &Param, to: &mut [f32]) -> Result<()> {
        self.read(from.master.address(), to)
    }

    fn recordings(&self) -> Recordings {
        Recordings::new(&self.gpu)
    }

    fn recorded(
        &self,
        recordings: &mut Recordings,
        kind: StepKind,
        [step, micro_step]: [u32; 2],
        operations: impl FnMut(),
    ) {
        recordings.run(kind, [step, micro_step], operations);
    }

    fn zero_tensor(&self, buffer: &mut Tensor) {
        let bytes = buffer.bytes();
        self.clear(buffer.write().address, bytes);
    }

    fn zero_f32(&self, buffer: &mut F32) {
        self.clear(buffer.address(), 4 * buffer.len);
    }

    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.gpu.scope(f)
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
        embedding::forward(self, out, tokens, wte, wpe, sequences, channels);
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
        embedding::backward(self, dwte, dwpe, dout, tokens, sequences, channels, accumulate);
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
        layernorm::forward(self, out, statistics, x, w, b, rows, channels, epsilon);
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
        layernorm::add_forward(self, out, sum, statistics, x, y, w, b, rows, channels, epsilon);
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
        layernorm::backward(
            self, workspace, dx, dw, db, dy, x, statistics, w, rows, channels, accumulate,
        );
    }

    fn linear_forward(
        &self,
        workspace: &mut Workspace,
        y: &mut Tensor,
        x: &Tensor,
        w: &Param,
        b: &Param,
        shape: LinearShape,
        format: Forward,
    ) {
        linear::forward(self, workspace, y, None, x, w, b, shape, format);
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
        format: Forward,
        form: Activation,
    ) {
        linear::forward(self, workspace, pre, Some((out, form)), x, w, b, shape, format);
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
        let dy = Gradient::Whole(dy);
        linear::backward(self, workspace, dx, dw, db, dy, x, w, shape, recipe, random, accumulate);
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
        let dy = Gradient::BehindGelu { d: dy, pre, form };
        linear::backward(self, workspace, dx, dw, db, dy, x, w, shape, recipe, random, accumulate);
    }

    fn gelu_forward(&self, out: &mut Tensor, x: &Tensor, len: usize, form: Activation) {
        gelu::forward(self, out, x, len, form);
    }

    fn gelu_backward(&self, d: &mut Tensor, x: &Tensor, len: usize, form: Activation) {
        gelu::backward(self, d, x, len, form);
    }

    fn attention_forward(
        &self,
        _workspace: &mut Workspace,
        out: &mut Tensor,
        lse: &mut F32,
        qkv: &Tensor,
        shape: AttentionShape,
    ) {
        attention::forward(self, out, lse, qkv, shape);
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
        attention::backward(self, workspace, dqkv, dout, out, lse, qkv, shape);
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
        _format: Forward,
    ) {
        let shape = LinearShape { rows, inputs: channels, outputs: vocab_size };
        classifier::run(self, workspace, losses, gradient, x, wte, targets, shape);
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
        _format: Forward,
    ) {
        classifier::logits(self, workspace, logits, x, row, wte, channels, vocab_size);
    }

    fn add_losses(&self, optimizer: &mut Optimizer, losses: &F32, rows: usize, accumulate: bool) {
        adamw::add_losses(self, optimizer, losses, rows, accumulate);
    }

    fn finish_step(
        &self,
        workspace: &mut Workspace,
        optimizer: &mut Optimizer,
        parameters: &mut VisitTrained<'_, Self>,
        step: &AdamWStep,
    ) -> Result<StepSums> {
        adamw::finish_step(self, workspace, optimizer, parameters, step)
    }

    fn try_step(
        &self,
        optimizer: &mut Optimizer,
        parameters: &mut VisitTrained<'_, Self>,
        step: &AdamWStep,
        _sums: &StepSums,
        largest: &mut (dyn FnMut(Largest) + Send),
    ) -> Result<()> {
        adamw::try_step(self, optimizer, parameters, step, largest)
    }

    fn sum_losses(&self, optimizer: &mut Optimizer, losses: &F32, rows: usize) -> Result<f64> {
        adamw::sum_losses(self, optimizer, losses, rows)
    }
}
