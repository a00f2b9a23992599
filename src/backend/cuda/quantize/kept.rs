//! What the forward pass made of an operand in NVFP4, where a backward product is made from that.
//!
//! Its numbers are elements of E2M1 times scales of E4M3, six bits that bf16 holds, below one scale
//! of the tensor. So they are made anew as such and turned into values by who reads them; and the
//! kernel that makes them has the rotated tensor's amax on the way. NOTE: through f32 values in
//! memory it took 16 bytes an element of x in bf16 and 18 of W in f32, and now 8 and 10. To make
//! them in registers for the amax and then once more for the operand would take 6 and 10, and twice
//! the arithmetic of choosing scales, which costs more than these bytes.

use std::ffi::c_void;

use super::values::{Arguments as Values, Matrix, Quantization};
use super::{Launch, Source};
use crate::backend::Precision;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::device::capture::Redraw;
use crate::backend::cuda::device::launch;
use crate::formats::{Block, Operand, Outer, Random, Rounding, Scale};

/// An operand of the forward pass, whose numbers go to its `to`, and that of a product which is
/// made from them, of the same source with the reduction down its columns.
#[derive(Clone, Copy)]
pub(crate) struct Keeping {
    pub(crate) forward: Quantization,
    pub(crate) backward: Quantization,
}

/// `Kept` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Arguments {
    forward: Values,
    backward: Values,
}

impl Keeping {
    /// Whether operands are such.
    pub(crate) fn fits(forward: &Operand, backward: &Operand) -> bool {
        let Scale::TwoLevels(_, Outer::Tensor) = forward.format().scale() else { return false };
        forward.rounding() == Rounding::Nearest
            && forward.transform().is_none()
            && !matches!(forward.format().block(), Block::Square(_))
            && backward.format().is_nvfp4()
            && !backward.is_corrected()
    }

    /// Makes the numbers, and gives what is to be rounded from them, its amax known.
    pub(super) fn run(mut self, cuda: &Cuda) -> Quantization {
        self.forward.find(cuda);
        let Launch { grid, block, shared } = self.backward.launches()[1];
        if self.backward.is_rotated_anew() {
            let drawing = Drawing { arguments: self.arguments(), of: self };
            cuda.gpu.launch_drawn(&self.kernel(), grid, block, shared, drawing);
        } else {
            let arguments = self.arguments();
            launch!(cuda.gpu, &self.kernel(), grid, block, shared; arguments);
        }
        self.kept()
    }

    pub(crate) fn kernel(&self) -> String {
        match self.forward.matrix.source.precision {
            Precision::F32 => "keep_nvfp4<float>".into(),
            Precision::Bf16 => "keep_nvfp4<bf16>".into(),
        }
    }

    pub(crate) fn arguments(&self) -> Arguments {
        let mut backward = self.backward;
        if !backward.finds_amax() {
            backward.to.amax = 0;
        }
        Arguments { forward: self.forward.arguments(), backward: backward.arguments() }
    }

    /// The operand of the product, from the numbers.
    pub(crate) fn kept(self) -> Quantization {
        let Self { forward, mut backward } = self;
        let source = Source { address: forward.to.out, precision: Precision::Bf16 };
        backward.matrix = Matrix { source, amax: None, scale: forward.to.scale, ..backward.matrix };
        backward
    }
}

/// A kernel's argument, with what it is made for.
struct Drawing {
    arguments: Arguments,
    of: Keeping,
}

impl Redraw for Drawing {
    fn redraw(&mut self, [step, micro_step]: [u32; 2]) {
        let random = &mut self.of.backward.random;
        *random = Random { step, micro_step, ..*random };
        self.arguments = self.of.arguments();
    }

    fn argument(&mut self) -> *mut c_void {
        std::ptr::from_mut(&mut self.arguments).cast()
    }
}
