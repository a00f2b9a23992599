//! What the forward pass made of an operand in NVFP4, where a backward product is made from that.
//!
//! Below scales of 128 elements nobody has to know a tensor first: a thread block makes both in
//! registers, one behind the other, which takes 4 bytes an element of x in bf16 and 6 of W in f32,
//! in place of 12 and 14 through f32 values in memory.
//!
//! Below one scale of the tensor the numbers are made as such: elements of E2M1 times scales of
//! E4M3 are six bits, which bf16 holds. Who reads them turns them into values, and the kernel that
//! makes them finds the rotated tensor's amax on the way. NOTE: through f32 values it took 16 bytes
//! an element of x and 18 of W, and now 8 and 10. To make the numbers in registers for the amax and
//! then once more for the operand would take 6 and 10, and twice the arithmetic of choosing scales,
//! by whose instructions these kernels are bound.

use std::ffi::c_void;

use super::values::{Arguments as Values, Matrix, Quantization};
use super::{Launch, Source};
use crate::backend::Precision;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::device::capture::Redraw;
use crate::backend::cuda::device::launch;
use crate::formats::{Block, Operand, Outer, Random, Rounding, Scale, Transform};

/// An operand of the forward pass, whose numbers go to its `to`, and that of a product which is
/// made from them, of the same source with the reduction down its columns.
#[derive(Clone, Copy)]
pub(crate) struct Keeping {
    pub(crate) forward: Quantization,
    pub(crate) backward: Quantization,
}

/// `Keeping` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Arguments {
    forward: Values,
    backward: Values,
}

/// How it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// By one kernel.
    InRegisters,
    /// From bf16 numbers in memory.
    FromNumbers,
}

impl Way {
    /// Of operands; none where values go through memory.
    pub(crate) fn of(forward: &Operand, backward: &Operand) -> Option<Self> {
        let has_kernels = |operand: &Operand| {
            operand.format().is_nvfp4()
                && !matches!(operand.format().block(), Block::Square(_))
                && operand.rounding() != Rounding::ByMean
        };
        let plain = forward.rounding() == Rounding::Nearest && forward.transform().is_none();
        if !(has_kernels(forward) && plain && has_kernels(backward)) || backward.is_corrected() {
            return None;
        }
        let of_tensor = |operand: &Operand| {
            matches!(operand.format().scale(), Scale::TwoLevels(_, Outer::Tensor))
        };
        let group = backward.transform().map_or(0, Transform::group);
        if of_tensor(forward) {
            Some(Self::FromNumbers)
        } else if !of_tensor(backward) && group <= SIDE {
            Some(Self::InRegisters)
        } else {
            None
        }
    }
}

/// Lines and columns that a thread block takes which makes both, its threads, and the bytes of
/// shared memory that `Side` of the kernels takes.
const SIDE: usize = 128;
const SIDE_THREADS: usize = 512;
const SIDE_BYTES: usize = SIDE * SIDE / 32 * (4 * 32 + 16) + SIDE / 32 * 32;

impl Keeping {
    /// The operand of the product.
    pub(crate) fn run(self, cuda: &Cuda, way: Way) {
        match way {
            Way::InRegisters => self.start(cuda, way),
            Way::FromNumbers => self.keep(cuda).round(cuda),
        }
    }

    /// Makes the numbers, and gives what is to be rounded from them, its amax known.
    fn keep(mut self, cuda: &Cuda) -> Quantization {
        self.forward.find(cuda);
        self.start(cuda, Way::FromNumbers);
        self.kept()
    }

    fn start(&self, cuda: &Cuda, way: Way) {
        let Launch { grid, block, shared } = self.launch(way);
        let (kernel, arguments) = (self.kernel(way), self.arguments());
        if self.backward.is_drawn() {
            let drawing = Drawing { arguments, of: *self };
            cuda.gpu.launch_drawn(&kernel, grid, block, shared, drawing);
        } else {
            launch!(cuda.gpu, &kernel, grid, block, shared; arguments);
        }
    }

    pub(crate) fn launch(&self, way: Way) -> Launch {
        if way == Way::FromNumbers {
            return self.backward.launches()[1];
        }
        let grid = [self.backward.matrix.vectors, self.backward.depth()].map(|n| n.div_ceil(SIDE));
        Launch { grid: [grid[0], grid[1], 1], block: SIDE_THREADS, shared: SIDE_BYTES }
    }

    pub(crate) fn kernel(&self, way: Way) -> String {
        let number = match self.forward.matrix.source.precision {
            Precision::F32 => "float",
            Precision::Bf16 => "bf16",
        };
        match (way, self.backward.operand.rounding()) {
            (Way::FromNumbers, _) => format!("keep_nvfp4<{number}>"),
            (Way::InRegisters, Rounding::Unbiased) => {
                format!("requantize_nvfp4<{number},UNBIASED>")
            }
            (Way::InRegisters, _) => format!("requantize_nvfp4<{number},TO_NEAREST>"),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::quantize::values::To;
    use crate::formats::{GemmId, Operand, OperandId};
    use crate::recipe::Recipe;

    /// A recorded kernel gets the numbers of the step that it is launched in.
    #[test]
    fn random_numbers_are_drawn_anew() {
        for (recipe, way) in [("quartet2", Way::FromNumbers), ("tetrajet2", Way::InRegisters)] {
            let linear = *recipe.parse::<Recipe>().unwrap().linear(0);
            let of = |step| {
                let source = Source { address: 0, precision: Precision::Bf16 };
                let matrix = Matrix::rows(source, 128, 256, OperandId::X);
                let of = |matrix, operand: &Operand| Quantization {
                    matrix,
                    operand: *operand,
                    transform: operand.transform(),
                    gemm: GemmId::Wgrad,
                    random: Random { seed: 1, step, micro_step: 2, layer: 3, linear: 0 },
                    to: To::default(),
                };
                let forward = of(matrix, linear.forward().a());
                let backward = of(matrix.turned(), linear.wgrad().b());
                assert_eq!(Way::of(&forward.operand, &backward.operand), Some(way));
                Keeping { forward, backward }
            };
            let mut drawing = Drawing { arguments: of(4).arguments(), of: of(4) };
            drawing.redraw([9, 2]);
            let drawn = |arguments: Arguments| arguments.backward.drawn();
            assert_eq!(drawn(drawing.arguments), drawn(of(9).arguments()));
            assert_ne!(drawn(drawing.arguments), drawn(of(4).arguments()));
        }
    }
}
