//! The CUDA backend: bf16 activations and copies of the weights (f32 ones in the recipe `fp32`),
//! f32 master weights, moments and gradients; GEMMs by cuBLASLt, everything else by the kernels in
//! `kernels/`, each launched from the file of the same name here or in `quantize/`, but for
//! `attend_behind.cu` (decode.rs), `optimize_muon.cu` (muon.rs), `normal.cu` (memory.rs),
//! `product_sm120.cu` (quantize/carrier.rs), `quantize_values.cu`, `quantize_nvfp4.cu` and `int8.cu`
//! (quantize/values.rs), `requantize_nvfp4.cu` (quantize/kept.rs) and the other `quantize_*.cu`
//! (quantize/mod.rs).
//!
//! Everything is queued on one stream, and the host waits only where it reads a number. Kernels sum
//! in an order that depends on shapes alone, so two runs on one kind of GPU give the same bits. The
//! first error stays and comes out of the next call that reads.

mod attend;
#[cfg(test)]
mod conformance;
mod decode;
mod device;
mod embed;
#[cfg(test)]
mod emulator;
mod exchange;
mod follow;
mod gelu;
mod head;
mod kernels;
mod linear;
mod lora;
mod memory;
mod merge;
mod muon;
mod norm;
mod optimize;
mod quantize;
mod rotary;
mod select;
mod step;
mod swiglu;
#[cfg(test)]
mod tests;
mod workspace;

use std::sync::Arc;

pub(crate) use device::peers::Exported;
pub(crate) use device::recordings::Recordings;
pub(crate) use workspace::Workspace;

use super::block::Supply;
use super::{Backend, StepPlan, WorkspaceShape};
use crate::formats::Format;
use crate::{CudaStream, Error, Result};
use device::gemm::{Gemm, Product, Type};
use device::gpu::Gpu;
use quantize::carrier;

/// One GPU.
pub(crate) struct Cuda {
    // NOTE: first, since it may wait for what runs on the GPU.
    link: Option<Arc<exchange::Link>>,
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
        supply: &Arc<Supply>,
        warn: &dyn Fn(String),
    ) -> Result<Self> {
        let stream = stream.map(|stream| stream.as_raw().cast());
        let mut gpu = Gpu::open(ordinal, stream, &kernels::FILES, warn)?;
        gpu.supply = supply.clone();
        Self::of(gpu)
    }

    fn of(gpu: Gpu) -> Result<Self> {
        let gpu = Arc::new(gpu);
        Ok(Self {
            link: None,
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
    type Recordings = Recordings;

    fn supports(&self, shape: &WorkspaceShape) -> Result<()> {
        let (head_size, most) = (shape.attention.head_size, attend::MAX_HEAD_SIZE);
        if head_size > most {
            return Err(Error::Unsupported {
                what: format!("attention with {head_size} channels a head on a GPU"),
                remedy: format!("use more heads, so that each has at most {most} channels"),
            });
        }
        let mxfp4 = shape.backward_gemms().any(|gemm| gemm.is_in(Format::MXFP4));
        let widest = shape.linears.iter().map(|layer| layer.outputs).max().unwrap_or(0);
        if mxfp4 && widest > quantize::MAX_DEPTH {
            return Err(Error::Unsupported {
                what: format!("MXFP4 with a linear layer of {widest} outputs on a GPU"),
                remedy: format!(
                    "use recipe bf16, or a model whose layers have at most {} (the MLP's first is \
                     the widest: gate and up are one)",
                    quantize::MAX_DEPTH
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
