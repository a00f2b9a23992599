//! The CUDA backend: bf16 activations and copies of the weights (f32 ones in the recipe `fp32`),
//! f32 master weights, moments and gradients; GEMMs by cuBLASLt, everything else by the kernels in
//! `kernels/`, each launched from the file of the same name here.
//!
//! Everything is queued on one stream, and the host waits only where it reads a number. Kernels sum
//! in an order that depends on shapes alone, so two runs on one kind of GPU give the same bits.

mod adamw;
mod attend;
#[cfg(test)]
mod conformance;
mod device;
mod embed;
#[cfg(test)]
mod emulator;
mod gelu;
mod head;
mod kernels;
mod linear;
mod norm;
mod normal;
mod quantize;
#[cfg(test)]
mod tests;
mod workspace;

use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::sys;

pub(crate) use device::memory::{Arena, F32, Gradient, Param, Tensor, Weights};
pub(crate) use device::recordings::Recordings;
pub(crate) use embed::Tokens;
pub(crate) use workspace::Workspace;

use super::{
    Activation, Attend, AttentionBackward, AttentionShape, Backend, Classifier, Embed,
    EmbeddingGradients, EmbeddingShape, Epilogue, Head, HeadShape, Linear, LinearBackward,
    LinearForward, LinearShape, Memory, Norm, NormBackward, NormParams, NormShape, NormStatistics,
    Precision, ResidualSum, Slot, StepPlan, WorkspaceShape,
};
use crate::mx::{Draw, Format, LinearRecipe, Random};
use crate::{CudaStream, Error, Result};
use device::gemm::{Gemm, Product, Type};
use device::gpu::Gpu;
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

impl Memory for Cuda {
    type Arena = Arena;
    type Tensor = Tensor;
    type F32 = F32;
    type Weights = Weights;
    type Param<'a> = Param<'a>;
    type Gradient<'a> = Gradient<'a>;
    type Tokens = Tokens;
    type Workspace = Workspace;

    /// What cuBLASLt likes best of the bf16 copies: 256 bytes.
    const ALIGN: usize = 128;

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

    fn weights(&self, arena: &mut Arena, len: usize, count: usize) -> Weights {
        arena.weights(len, count)
    }

    fn tokens(&self, arena: &mut Arena, len: usize) -> Result<Tokens> {
        Tokens::new(arena, len)
    }

    fn workspace(&self, arena: &mut Arena, shape: &WorkspaceShape) -> Workspace {
        Workspace::new(arena, shape)
    }

    fn param<'a>(&self, weights: &'a Weights, slot: Slot) -> Param<'a> {
        weights.param(slot)
    }

    fn gradients<'a, const N: usize>(
        &self,
        flat: &'a mut F32,
        slots: [Slot; N],
    ) -> [Gradient<'a>; N] {
        slots.map(|slot| flat.gradient(slot))
    }

    fn write_tokens(&self, to: &mut Tokens, from: &[u32]) {
        to.write(from);
    }

    fn write_f32(&self, to: &mut F32, at: usize, from: &[f32]) -> Result<()> {
        self.write(to.at(at), from)
    }

    fn read_f32(&self, from: &F32, at: usize, to: &mut [f32]) -> Result<()> {
        self.read(from.at(at), to)
    }

    fn write_param(&self, to: &mut Weights, slot: Slot, from: &[f32]) -> Result<()> {
        let param = to.param(slot);
        self.write(param.master.address(), from)?;
        self.gpu.scope(|| {
            adamw::copy_to_bf16(self, &param);
            self.gpu.synchronize()
        })
    }

    fn draw_param(&self, to: &mut Weights, slot: Slot, std: f32, draw: &Draw) -> Result<()> {
        let param = to.param(slot);
        self.gpu.scope(|| {
            normal::fill(self, param.master.address(), param.master.len, std, draw);
            adamw::copy_to_bf16(self, &param);
            self.gpu.synchronize()
        })
    }

    fn read_param(&self, from: &Weights, slot: Slot, to: &mut [f32]) -> Result<()> {
        self.read(from.param(slot).master.address(), to)
    }

    fn zero_tensor(&self, buffer: &mut Tensor) {
        let bytes = buffer.bytes();
        self.clear(buffer.write().address, bytes);
    }

    fn zero_gradient(&self, gradient: Gradient<'_>) {
        self.clear(gradient.address(), 4 * gradient.len);
    }
}

impl Backend for Cuda {
    type Recordings = Recordings;

    fn supports(&self, shape: &WorkspaceShape) -> Result<()> {
        let (head_size, most) = (shape.channels / shape.heads, attend::MAX_HEAD_SIZE);
        if head_size > most {
            return Err(Error::Unsupported {
                what: format!("attention with {head_size} channels a head on a GPU"),
                remedy: format!("use more heads, so that each has at most {most} channels"),
            });
        }
        let mxfp4 = shape.backward_gemms().any(|gemm| gemm.format() == Format::MXFP4);
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

    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.gpu.scope(f)
    }

    fn recordings(&self) -> Recordings {
        Recordings::new(&self.gpu)
    }

    fn recorded(
        &self,
        recordings: &mut Recordings,
        plan: &StepPlan,
        place: [u32; 2],
        operations: impl FnMut(),
    ) {
        recordings.run(plan, place, operations);
    }
}

impl Embed for Cuda {
    fn embedding_forward(
        &self,
        out: &mut Tensor,
        tokens: &Tokens,
        wte: Param<'_>,
        wpe: Param<'_>,
        EmbeddingShape { sequences, channels }: EmbeddingShape,
    ) {
        embed::forward(self, out, tokens, &wte, &wpe, sequences, channels);
    }

    fn embedding_backward(
        &self,
        gradients: EmbeddingGradients<'_, Self>,
        dout: &Tensor,
        tokens: &Tokens,
        EmbeddingShape { sequences, channels }: EmbeddingShape,
    ) {
        let EmbeddingGradients { mut dwte, mut dwpe, accumulate } = gradients;
        let (dwte, dwpe) = (&mut dwte, &mut dwpe);
        embed::backward(self, dwte, dwpe, dout, tokens, sequences, channels, accumulate);
    }
}

impl Norm for Cuda {
    fn layernorm_forward(
        &self,
        out: &mut Tensor,
        statistics: NormStatistics<&mut F32>,
        x: &Tensor,
        NormParams { w, b }: NormParams<'_, Self>,
        NormShape { rows, channels, epsilon }: NormShape,
    ) {
        norm::forward(self, out, statistics, x, &w, &b, rows, channels, epsilon);
    }

    fn add_layernorm_forward(
        &self,
        out: &mut Tensor,
        statistics: NormStatistics<&mut F32>,
        ResidualSum { sum, x, y }: ResidualSum<'_, Self>,
        NormParams { w, b }: NormParams<'_, Self>,
        NormShape { rows, channels, epsilon }: NormShape,
    ) {
        norm::add_forward(self, out, sum, statistics, x, y, &w, &b, rows, channels, epsilon);
    }

    fn layernorm_backward(
        &self,
        workspace: &mut Workspace,
        operands: NormBackward<'_, Self>,
        NormShape { rows, channels, .. }: NormShape,
    ) {
        let NormBackward { dx, mut dw, mut db, dy, x, statistics, w, accumulate } = operands;
        let (dw, db) = (&mut dw, &mut db);
        norm::backward(
            self, workspace, dx, dw, db, dy, x, statistics, &w, rows, channels, accumulate,
        );
    }
}

impl Linear for Cuda {
    fn linear_forward(
        &self,
        workspace: &mut Workspace,
        operands: LinearForward<'_, Self>,
        shape: LinearShape,
        recipe: &LinearRecipe,
    ) {
        let LinearForward { y, x, w, b, epilogue } = operands;
        let gelu = match epilogue {
            Epilogue::None => None,
            Epilogue::Gelu { out, form } => Some((out, form)),
        };
        linear::forward(self, workspace, y, gelu, x, &w, &b, shape, recipe);
    }

    fn linear_backward(
        &self,
        workspace: &mut Workspace,
        operands: LinearBackward<'_, Self>,
        shape: LinearShape,
        recipe: &LinearRecipe,
        random: &Random,
    ) {
        let LinearBackward { dx, mut dw, mut db, dy, x, w, accumulate } = operands;
        let (dw, db) = (&mut dw, &mut db);
        linear::backward(self, workspace, dx, dw, db, dy, x, &w, shape, recipe, random, accumulate);
    }

    fn gelu_forward(&self, out: &mut Tensor, x: &Tensor, len: usize, form: Activation) {
        gelu::forward(self, out, x, len, form);
    }

    fn gelu_backward(&self, d: &mut Tensor, x: &Tensor, len: usize, form: Activation) {
        gelu::backward(self, d, x, len, form);
    }
}

impl Attend for Cuda {
    fn attention_forward(
        &self,
        _workspace: &mut Workspace,
        out: &mut Tensor,
        lse: &mut F32,
        qkv: &Tensor,
        shape: AttentionShape,
    ) {
        attend::forward(self, out, lse, qkv, shape);
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

impl Head for Cuda {
    fn classifier(
        &self,
        workspace: &mut Workspace,
        operands: Classifier<'_, Self>,
        HeadShape { rows, channels, vocab_size, .. }: HeadShape,
    ) {
        let Classifier { losses, gradient, x, w, targets } = operands;
        let shape = LinearShape { rows, inputs: channels, outputs: vocab_size };
        head::run(self, workspace, losses, gradient, x, &w, targets, shape);
    }

    fn logits(
        &self,
        workspace: &mut Workspace,
        logits: &mut F32,
        x: &Tensor,
        row: usize,
        w: Param<'_>,
        HeadShape { channels, vocab_size, .. }: HeadShape,
    ) {
        head::logits(self, workspace, logits, x, row, &w, channels, vocab_size);
    }
}
