//! The language-model head fused with softmax and cross-entropy, one chunk of rows at a time:
//! logits = x W^T; then one kernel turns them into losses and, in place, into
//! dlogits = scale (softmax - one_hot); then dx = dlogits W and dW += dlogits^T x.

use cudarc::driver::sys;

use super::device::gemm::{Operand, Type};
use super::device::launch;
use super::device::memory::{F32, Param, Tensor};
use super::{Cuda, Product, Workspace, kernel};
use crate::backend::{Classifier, Head, HeadShape, WorstLosses};

/// Logits held at a time, about: 1 GiB in bf16. Fewer chunks read and write dW less often.
const CHUNK_LOGITS: usize = 1 << 29;

/// Of a block, which has one row of logits.
pub(super) const THREADS: usize = 1024;

/// Rows of one chunk: equal chunks, but for the last, of a multiple of 128 rows.
pub(super) fn chunk_rows(rows: usize, vocab_size: usize) -> usize {
    let most = (CHUNK_LOGITS / stride(vocab_size)).max(128);
    rows.div_ceil(rows.div_ceil(most)).next_multiple_of(128).min(rows)
}

/// Elements from one row of logits to the next: aligned for 16-byte accesses and tensor cores.
pub(super) fn stride(vocab_size: usize) -> usize {
    vocab_size.next_multiple_of(64)
}

/// `Worst` of the kernel.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Worst {
    pub(super) logits: u64,
    pub(super) worst: u64,
    pub(super) amax: u64,
    pub(super) targets: u64,
    pub(super) vocab: u32,
    pub(super) stride: u32,
    pub(super) epsilon: f32,
}

impl Cuda {
    /// Logits of `n` rows from row `first` of x on, at the start of the scratch.
    fn logits_of(
        &self,
        workspace: &mut Workspace,
        (x, w): (&Tensor, u64),
        [first, n]: [usize; 2],
        HeadShape { channels, vocab_size, .. }: HeadShape,
    ) {
        let [of_x, of_w] =
            [x.at(first * channels), w].map(|address| Operand::rows(address, channels));
        let (sizes, logits) = ([n, vocab_size, channels], workspace.logits.address);
        let product = Product {
            c_stride: stride(vocab_size),
            ..Product::new(x.precision.into(), sizes, of_x, of_w, logits)
        };
        self.product(workspace, &product);
    }
}

impl Head for Cuda {
    fn classifier(
        &self,
        workspace: &mut Workspace,
        operands: Classifier<'_, Self>,
        shape: HeadShape,
    ) {
        let HeadShape { rows, channels, vocab_size, .. } = shape;
        let Classifier { losses, mut gradient, x, w, targets } = operands;
        let (precision, w) = (Type::from(x.precision), w.as_read_in(x.precision));
        let (logits, stride) = (workspace.logits.address, stride(vocab_size));
        for first in (0..rows).step_by(workspace.chunk) {
            let n = workspace.chunk.min(rows - first);
            self.logits_of(workspace, (x, w), [first, n], shape);
            let scale = gradient.as_ref().map_or(0.0, |gradient| gradient.scale);
            let places = first as u64 * 4;
            launch!(self.gpu, kernel!(x, "softmax_loss"), [n, 1, 1], THREADS, 0;
                logits, losses.address() + places, targets.ids() + places,
                vocab_size as u32, stride as u32, scale, u32::from(gradient.is_some()));
            let Some(gradient) = &mut gradient else { continue };
            let chunk = x.at(first * channels);
            let (sizes, right) = ([n, channels, vocab_size], Operand::columns(w, channels));
            let to = gradient.dx.write().at(first * channels);
            let dx = Product::new(precision, sizes, Operand::rows(logits, stride), right, to);
            self.product(workspace, &dx);
            let [left, right] =
                [Operand::columns(logits, stride), Operand::columns(chunk, channels)];
            let (sizes, to) = ([vocab_size, channels, n], gradient.dw.in_f32());
            let dw = Product {
                c_type: Type::F32,
                accumulate: gradient.accumulate || first > 0,
                ..Product::new(precision, sizes, left, right, to)
            };
            self.product(workspace, &dw);
        }
    }

    fn worst_losses(
        &self,
        workspace: &mut Workspace,
        operands: WorstLosses<'_, Self>,
        shape: HeadShape,
    ) {
        let HeadShape { rows, vocab_size, .. } = shape;
        let WorstLosses { losses, worst, amax, x, w, targets, epsilon } = operands;
        let w = w.as_read_in(x.precision);
        let (logits, stride) = (workspace.logits.address, stride(vocab_size) as u32);
        for first in (0..rows).step_by(workspace.chunk) {
            let n = workspace.chunk.min(rows - first);
            self.logits_of(workspace, (x, w), [first, n], shape);
            let places = first as u64 * 4;
            let [losses, targets] = [losses.address(), targets.ids()].map(|at| at + places);
            launch!(self.gpu, kernel!(x, "softmax_loss"), [n, 1, 1], THREADS, 0;
                logits, losses, targets, vocab_size as u32, stride, 0.0f32, 0u32);
            let moved = Worst {
                logits,
                worst: worst.address() + places,
                amax: amax.address() + places,
                targets,
                vocab: vocab_size as u32,
                stride,
                epsilon,
            };
            launch!(self.gpu, kernel!(x, "worst_loss"), [n, 1, 1], THREADS, 0; moved);
        }
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
        // cuBLASLt wants operands aligned, and a row need not be: a copy at the start of the
        // scratch is.
        let aligned = workspace.logits.address;
        let bytes = channels * x.precision.size();
        // SAFETY: a row of logits has room for a row of x (`Workspace::new` sees to that).
        let result = unsafe {
            sys::cuMemcpyDtoDAsync_v2(aligned, x.at(row * channels), bytes, self.gpu.stream())
        };
        self.gpu.note("copying a row", result);
        let w = w.as_read_in(x.precision);
        let [left, right] = [aligned, w].map(|address| Operand::rows(address, channels));
        let sizes = [1, vocab_size, channels];
        let product = Product {
            c_type: Type::F32,
            ..Product::new(x.precision.into(), sizes, left, right, logits.address())
        };
        self.product(workspace, &product);
    }
}
