//! The language-model head fused with softmax and cross-entropy, one chunk of rows at a time:
//! logits = x W^T; then one kernel turns them into losses and, in place, into
//! dlogits = scale (softmax - one_hot); then dx = dlogits W and dW += dlogits^T x.

use cudarc::driver::sys;

use super::device::gemm::{Operand, Type};
use super::device::launch;
use super::device::memory::{F32, Param, Tensor};
use super::{Cuda, Product, Workspace, kernel};
use crate::Result;
use crate::backend::{
    Classifier, ClassifierGradient, Head, HeadShape, HostClassifier, HostLoss, LogitRows,
    Precision, WorstLosses,
};
use crate::reserve::zeros;

/// Logits held at a time, about: 1 GiB in bf16. Fewer chunks read and write dW less often.
const CHUNK_LOGITS: usize = 1 << 29;

/// Logits that the host sees at a time, about: 32 MiB, as on a CPU.
const HOST_LOGITS: usize = 8 << 20;

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

/// `Losses` of the kernel.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Losses {
    pub(super) logits: u64,
    pub(super) losses: u64,
    pub(super) targets: u64,
    pub(super) weights: u64,
    pub(super) vocab: u32,
    pub(super) stride: u32,
    pub(super) scale: f32,
    pub(super) gradient: u32,
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

    /// dx and dw of `n` rows from row `first` of x on, whose gradients of logits are at the start of
    /// the scratch.
    fn head_backward(
        &self,
        workspace: &mut Workspace,
        gradient: &mut ClassifierGradient<'_, Self>,
        (x, w): (&Tensor, u64),
        [first, n]: [usize; 2],
        HeadShape { channels, vocab_size, .. }: HeadShape,
    ) {
        let precision = Type::from(x.precision);
        let (logits, stride) = (workspace.logits.address, stride(vocab_size));
        let chunk = x.at(first * channels);
        let (sizes, right) = ([n, channels, vocab_size], Operand::columns(w, channels));
        let to = gradient.dx.write().at(first * channels);
        let dx = Product::new(precision, sizes, Operand::rows(logits, stride), right, to);
        self.product(workspace, &dx);
        let Some(dw) = &mut gradient.dw else { return };
        let [left, right] = [Operand::columns(logits, stride), Operand::columns(chunk, channels)];
        let (sizes, to) = ([vocab_size, channels, n], dw.in_f32());
        let dw = Product {
            c_type: Type::F32,
            accumulate: gradient.accumulate || first > 0,
            ..Product::new(precision, sizes, left, right, to)
        };
        self.product(workspace, &dw);
    }
}

impl Head for Cuda {
    fn classifier(
        &self,
        workspace: &mut Workspace,
        operands: Classifier<'_, Self>,
        shape: HeadShape,
    ) {
        let HeadShape { rows, vocab_size, .. } = shape;
        let Classifier { losses, mut gradient, x, w, targets } = operands;
        let w = w.as_read_in(x.precision);
        for first in (0..rows).step_by(workspace.chunk) {
            let n = workspace.chunk.min(rows - first);
            self.logits_of(workspace, (x, w), [first, n], shape);
            let places = first as u64 * 4;
            let weights = gradient.as_ref().and_then(|gradient| gradient.weights);
            let of_rows = Losses {
                logits: workspace.logits.address,
                losses: losses.address() + places,
                targets: targets.ids() + places,
                weights: weights.map_or(0, |weights| weights.address() + places),
                vocab: vocab_size as u32,
                stride: stride(vocab_size) as u32,
                scale: gradient.as_ref().map_or(0.0, |gradient| gradient.scale),
                gradient: gradient.is_some().into(),
            };
            launch!(self.gpu, kernel!(x, "softmax_loss"), [n, 1, 1], THREADS, 0; of_rows);
            if let Some(gradient) = &mut gradient {
                self.head_backward(workspace, gradient, (x, w), [first, n], shape);
            }
        }
    }

    /// NOTE: logits go to the host and their gradients come back, 4 or 8 bytes a logit over PCIe,
    /// while the GPU waits.
    fn classifier_of_host(
        &self,
        workspace: &mut Workspace,
        operands: HostClassifier<'_, Self>,
        shape: HeadShape,
        loss: &mut HostLoss<'_>,
    ) -> Result<()> {
        const WHAT: &str = "logits for the host's loss";
        let HeadShape { rows, vocab_size, .. } = shape;
        let HostClassifier { losses, mut gradient, x, w } = operands;
        let (w, precision, stride) = (w.as_read_in(x.precision), x.precision, stride(vocab_size));
        let at_once = (HOST_LOGITS / vocab_size).clamp(1, rows.max(1));
        let mut logits: Vec<f32> = zeros(WHAT, at_once * vocab_size)?;
        let mut of_rows = zeros(WHAT, at_once)?;
        // As they lie on the GPU.
        let mut bytes: Vec<u8> = zeros(WHAT, at_once * stride * precision.size())?;
        let mut scales: Vec<f32> = zeros(WHAT, rows)?;
        scales.fill(1.0);
        if let Some(weights) = gradient.as_ref().and_then(|gradient| gradient.weights) {
            self.read(weights.address(), &mut scales)?;
        }
        for first in (0..rows).step_by(workspace.chunk) {
            let n = workspace.chunk.min(rows - first);
            self.gpu.scope(|| self.logits_of(workspace, (x, w), [first, n], shape));
            for done in (0..n).step_by(at_once) {
                let (here, row) = (at_once.min(n - done), first + done);
                let bytes = &mut bytes[..here * stride * precision.size()];
                let place = workspace.logits.address + (done * stride * precision.size()) as u64;
                self.read(place, bytes)?;
                let logits = &mut logits[..here * vocab_size];
                let of_rows = &mut of_rows[..here];
                let held = bytes.chunks_exact_mut(stride * precision.size());
                for (to, from) in logits.chunks_exact_mut(vocab_size).zip(held) {
                    read_logits(from, to, precision);
                }
                of_rows.fill(f32::NAN);
                loss(LogitRows { first: row, logits, losses: of_rows })?;
                self.write(losses.at(row), of_rows)?;
                let Some(gradient) = &gradient else { continue };
                let held = bytes.chunks_exact_mut(stride * precision.size());
                let numbers = logits.chunks_exact(vocab_size).zip(&scales[row..]);
                for (to, (from, weight)) in held.zip(numbers) {
                    write_gradients(from, gradient.scale * weight, to, precision);
                }
                self.write(place, bytes)?;
            }
            let Some(gradient) = &mut gradient else { continue };
            self.gpu.scope(|| self.head_backward(workspace, gradient, (x, w), [first, n], shape));
        }
        Ok(())
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
            let of_rows = Losses {
                logits,
                losses,
                targets,
                weights: 0,
                vocab: vocab_size as u32,
                stride,
                scale: 0.0,
                gradient: 0,
            };
            launch!(self.gpu, kernel!(x, "softmax_loss"), [n, 1, 1], THREADS, 0; of_rows);
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

/// Numbers of a row as they lie on the GPU.
fn read_logits(row: &[u8], to: &mut [f32], precision: Precision) {
    match precision {
        Precision::F32 => {
            let row = row.as_chunks().0.iter();
            to.iter_mut().zip(row).for_each(|(to, bytes)| *to = f32::from_le_bytes(*bytes));
        }
        Precision::Bf16 => {
            let row = row.as_chunks().0.iter().map(|bytes| half::bf16::from_le_bytes(*bytes));
            to.iter_mut().zip(row).for_each(|(to, value)| *to = value.to_f32());
        }
    }
}

/// Numbers of a row times `scale`, as they lie on the GPU, and 0 behind them.
fn write_gradients(from: &[f32], scale: f32, row: &mut [u8], precision: Precision) {
    if scale == 0.0 {
        // Whatever the host has written there.
        row.fill(0);
        return;
    }
    let (numbers, rest) = row.split_at_mut(from.len() * precision.size());
    let scaled = from.iter().map(|value| value * scale);
    match precision {
        Precision::F32 => {
            let numbers = numbers.as_chunks_mut().0.iter_mut();
            numbers.zip(scaled).for_each(|(to, value)| *to = value.to_le_bytes());
        }
        Precision::Bf16 => {
            let numbers = numbers.as_chunks_mut().0.iter_mut();
            let scaled = scaled.map(half::bf16::from_f32);
            numbers.zip(scaled).for_each(|(to, value)| *to = value.to_le_bytes());
        }
    }
    rest.fill(0);
}
