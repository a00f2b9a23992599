//! The language-model head fused with softmax and cross-entropy, one chunk of rows at a time:
//! logits = x w^T; loss = log sum exp(logits) - logits[target]; and, for training,
//! dlogits = scale (softmax - one_hot) in place, dx = dlogits w, dw += dlogits^T x.
//!
//! w is packed once for all chunks, in both directions.

use rayon::prelude::*;

use super::disjoint::DisjointSlice;
use super::gemm::{Conversion, Matrix, Output, PackMemory, Packed, Role, pack};
use super::isa::{Isa, simd_fn};
use super::math::{exp, lane_amax, lane_max, lane_sum};
use super::workspace::{ScratchSize, Workspace};
use super::{Buffer, Cpu, rows_per_job};
use crate::Result;
use crate::backend::{
    Classifier, ClassifierGradient, Head, HeadShape, HostClassifier, HostLoss, LogitRows,
    Precision, WorstLosses,
};

/// Logits held at a time, about: 32 MiB.
const CHUNK_LOGITS: usize = 8 << 20;

/// Rows of one chunk.
fn chunk_rows(rows: usize, vocab_size: usize) -> usize {
    (CHUNK_LOGITS / vocab_size).max(64).min(rows)
}

/// What [`Head::classifier`] needs of a workspace; with `trains`, for gradients too.
pub(super) fn scratch(isa: Isa, shape: HeadShape, trains: bool) -> ScratchSize {
    let HeadShape { rows, channels, vocab_size, precision } = shape;
    let format = Conversion::to(precision).format();
    let chunk = chunk_rows(rows, vocab_size);
    let mut size = ScratchSize { elements: chunk * vocab_size, ..ScratchSize::default() };
    let (a, [head, transposed_head, input]) = (&mut size.a, &mut size.b);
    a.add(isa, [chunk, channels], format, 1);
    head.add(isa, [vocab_size, channels], format, 1);
    if trains {
        a.add(isa, [chunk, vocab_size], format, 1); // dlogits
        a.add(isa, [vocab_size, chunk], format, 1); // dlogits^T
        transposed_head.add(isa, [channels, vocab_size], format, 1);
        input.add(isa, [channels, chunk], format, 1);
    }
    size
}

impl Head for Cpu {
    fn classifier(
        &self,
        workspace: &mut Workspace,
        operands: Classifier<'_, Self>,
        shape: HeadShape,
    ) {
        let HeadShape { rows, channels, vocab_size, precision } = shape;
        let Classifier { losses, mut gradient, x, w, targets } = operands;
        let conversion = Conversion::to(precision);
        let Workspace { a, b: [head, transposed_head, input], elements: logits, .. } = workspace;
        let by_channel = Matrix::rows_by_depth(w, vocab_size, channels);
        let head = pack(self, &by_channel, conversion, Role::B, head.as_mut());
        let transposed = gradient.as_ref().map(|_| {
            let by_vocab = Matrix::depth_by_rows(w, channels, vocab_size);
            pack(self, &by_vocab, conversion, Role::B, transposed_head.as_mut())
        });
        let chunk = chunk_rows(rows, vocab_size);
        for r0 in (0..rows).step_by(chunk) {
            let n = chunk.min(rows - r0);
            let x = &x[r0 * channels..][..n * channels];
            let logits = &mut logits[..n * vocab_size];
            let packed = Matrix::rows_by_depth(x, n, channels);
            let packed = pack(self, &packed, conversion, Role::A, a.as_mut());
            self.gemm(packed, head, overwrite(logits, vocab_size));

            let scales = gradient.as_ref().map(|g| Scales::of(g, r0, n));
            let losses = &mut losses[r0..r0 + n];
            softmax_rows(self, logits, losses, &targets[r0..r0 + n], vocab_size, scales);

            let (Some(gradient), Some(transposed)) = (&mut gradient, transposed) else { continue };
            let behind = Behind { x, w: transposed, first: r0, shape };
            self.head_backward(logits, gradient, behind, (a, input));
        }
    }

    fn classifier_of_host(
        &self,
        workspace: &mut Workspace,
        operands: HostClassifier<'_, Self>,
        shape: HeadShape,
        loss: &mut HostLoss<'_>,
    ) -> Result<()> {
        let HeadShape { rows, channels, vocab_size, precision } = shape;
        let HostClassifier { losses, mut gradient, x, w } = operands;
        let conversion = Conversion::to(precision);
        let Workspace { a, b: [head, transposed_head, input], elements: logits, .. } = workspace;
        let by_channel = Matrix::rows_by_depth(w, vocab_size, channels);
        let head = pack(self, &by_channel, conversion, Role::B, head.as_mut());
        let transposed = gradient.as_ref().map(|_| {
            let by_vocab = Matrix::depth_by_rows(w, channels, vocab_size);
            pack(self, &by_vocab, conversion, Role::B, transposed_head.as_mut())
        });
        let chunk = chunk_rows(rows, vocab_size);
        for first in (0..rows).step_by(chunk) {
            let n = chunk.min(rows - first);
            let x = &x[first * channels..][..n * channels];
            let logits = &mut logits[..n * vocab_size];
            let packed = Matrix::rows_by_depth(x, n, channels);
            let packed = pack(self, &packed, conversion, Role::A, a.as_mut());
            self.gemm(packed, head, overwrite(logits, vocab_size));

            let losses = &mut losses[first..first + n];
            losses.fill(f32::NAN);
            loss(LogitRows { first, logits, losses })?;
            let (Some(gradient), Some(w)) = (&mut gradient, transposed) else { continue };
            scale_rows(self, logits, vocab_size, Scales::of(gradient, first, n));
            let behind = Behind { x, w, first, shape };
            self.head_backward(logits, gradient, behind, (a, input));
        }
        Ok(())
    }

    fn worst_losses(
        &self,
        workspace: &mut Workspace,
        operands: WorstLosses<'_, Self>,
        HeadShape { rows, channels, vocab_size, precision }: HeadShape,
    ) {
        let WorstLosses { losses, worst, amax, x, w, targets, epsilon } = operands;
        let conversion = Conversion::to(precision);
        let Workspace { a, b: [head, ..], elements: logits, .. } = workspace;
        let by_channel = Matrix::rows_by_depth(w, vocab_size, channels);
        let head = pack(self, &by_channel, conversion, Role::B, head.as_mut());
        let chunk = chunk_rows(rows, vocab_size);
        for r0 in (0..rows).step_by(chunk) {
            let of_chunk = r0..rows.min(r0 + chunk);
            let n = of_chunk.len();
            let logits = &mut logits[..n * vocab_size];
            let packed = Matrix::rows_by_depth(&x[r0 * channels..][..n * channels], n, channels);
            let packed = pack(self, &packed, conversion, Role::A, a.as_mut());
            self.gemm(packed, head, overwrite(logits, vocab_size));

            let targets = &targets[of_chunk.clone()];
            softmax_rows(self, logits, &mut losses[of_chunk.clone()], targets, vocab_size, None);
            let amax = &mut amax[of_chunk.clone()];
            move_rows(self, logits, amax, targets, vocab_size, epsilon);
            softmax_rows(self, logits, &mut worst[of_chunk], targets, vocab_size, None);
        }
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
        self.logits_in_place(&mut logits[..vocab_size], x, (w, channels), precision);
    }
}

/// Factors of the gradients of some rows.
#[derive(Clone, Copy)]
struct Scales<'a> {
    /// Of all.
    of_all: f32,
    /// Of each, where they have any.
    weights: Option<&'a [f32]>,
}

impl<'a> Scales<'a> {
    /// Of `n` rows from `first` on.
    fn of(gradient: &ClassifierGradient<'a, Cpu>, first: usize, n: usize) -> Self {
        let weights = gradient.weights.map(|weights| &weights[first..first + n]);
        Self { of_all: gradient.scale, weights }
    }

    fn of_row(&self, row: usize) -> f32 {
        self.weights.map_or(self.of_all, |weights| self.of_all * weights[row])
    }
}

/// What gradients of logits go back through: rows of x from `first` on, and w (C, V), packed.
#[derive(Clone, Copy)]
struct Behind<'a> {
    x: &'a [f32],
    w: Packed<'a>,
    first: usize,
    shape: HeadShape,
}

impl Cpu {
    /// dx and dw of some rows, given the gradients of their logits.
    fn head_backward(
        &self,
        dlogits: &[f32],
        gradient: &mut ClassifierGradient<'_, Self>,
        Behind { x, w, first, shape }: Behind<'_>,
        (a, input): (&mut PackMemory, &mut PackMemory),
    ) {
        let HeadShape { channels, vocab_size, precision, .. } = shape;
        let (n, conversion) = (dlogits.len() / vocab_size, Conversion::to(precision));
        let by_vocab = Matrix::rows_by_depth(dlogits, n, vocab_size);
        let by_vocab = pack(self, &by_vocab, conversion, Role::A, a.as_mut());
        let dx = &mut gradient.dx[first * channels..][..n * channels];
        self.gemm(by_vocab, w, overwrite(dx, channels));

        let Some(dw) = &mut gradient.dw else { return };
        let by_row = Matrix::depth_by_rows(dlogits, vocab_size, n);
        let by_row = pack(self, &by_row, conversion, Role::A, a.as_mut());
        let x = Matrix::depth_by_rows(x, channels, n);
        let x = pack(self, &x, conversion, Role::B, input.as_mut());
        let accumulate = gradient.accumulate || first > 0;
        self.gemm(by_row, x, Output { accumulate, ..overwrite(dw, channels) });
    }

    /// Logits (n, V) of x (n, C), with w (V, C) as it lies.
    pub(super) fn logits_in_place(
        &self,
        logits: &mut [f32],
        x: &[f32],
        (w, channels): (&[f32], usize),
        precision: Precision,
    ) {
        let vocab_size = w.len() / channels;
        let per_job = rows_per_job(channels);
        let logits = DisjointSlice::new(logits);
        self.parallel(vocab_size.div_ceil(per_job), |job| {
            // Read from memory once, for all rows.
            let of_job = job * per_job..vocab_size.min((job + 1) * per_job);
            let w = &w[of_job.start * channels..of_job.end * channels];
            for (row, x) in x.chunks_exact(channels).enumerate() {
                // SAFETY: a job owns its columns.
                let logits = unsafe { logits.part(row * vocab_size + of_job.start, of_job.len()) };
                // As the packed GEMM would round its operands.
                dot_rows(self.isa(), logits, x, w, precision == Precision::Bf16);
            }
        });
    }
}

fn overwrite(c: &mut [f32], stride: usize) -> Output<'_> {
    Output { c, stride, alpha: 1.0, bias: None, accumulate: false }
}

/// Losses of all rows and, with `scales`, dlogits in place of the logits.
fn softmax_rows(
    cpu: &Cpu,
    logits: &mut [f32],
    losses: &mut [f32],
    targets: &[u32],
    vocab_size: usize,
    scales: Option<Scales<'_>>,
) {
    let per_job = rows_per_job(vocab_size);
    cpu.install(|| {
        logits
            .par_chunks_mut(per_job * vocab_size)
            .zip(losses.par_chunks_mut(per_job))
            .zip(targets.par_chunks(per_job))
            .enumerate()
            .for_each(|(job, ((logits, losses), targets))| {
                let rows = logits.chunks_exact_mut(vocab_size).zip(losses).zip(targets);
                for (row, ((logits, loss), target)) in (job * per_job..).zip(rows) {
                    let scale = scales.map(|scales| scales.of_row(row));
                    *loss = softmax_row(cpu.isa(), logits, *target as usize, scale);
                }
            });
    });
}

/// Multiplies gradients of logits by the factors of their rows.
fn scale_rows(cpu: &Cpu, dlogits: &mut [f32], vocab_size: usize, scales: Scales<'_>) {
    cpu.install(|| {
        dlogits.par_chunks_mut(vocab_size).enumerate().for_each(|(row, dlogits)| {
            match scales.of_row(row) {
                // Whatever the host has written there.
                0.0 => dlogits.fill(0.0),
                scale => dlogits.iter_mut().for_each(|v| *v *= scale),
            }
        });
    });
}

/// Moves the logits of all rows to where their loss is worst, and tells how large they were.
fn move_rows(
    cpu: &Cpu,
    logits: &mut [f32],
    amax: &mut [f32],
    targets: &[u32],
    vocab_size: usize,
    epsilon: f32,
) {
    let per_job = rows_per_job(vocab_size);
    cpu.install(|| {
        logits
            .par_chunks_mut(per_job * vocab_size)
            .zip(amax.par_chunks_mut(per_job))
            .zip(targets.par_chunks(per_job))
            .for_each(|((logits, amax), targets)| {
                let rows = logits.chunks_exact_mut(vocab_size).zip(amax).zip(targets);
                for ((logits, amax), target) in rows {
                    *amax = move_row(cpu.isa(), logits, *target as usize, epsilon);
                }
            });
    });
}

simd_fn! {
    /// Moves the target's logit down and the others up; gives the largest magnitude before.
    fn move_row(logits: &mut [f32], target: usize, epsilon: f32) -> f32 {
        let amax = lane_amax(logits);
        let y = logits[target];
        for v in logits.iter_mut() {
            *v += epsilon * (v.abs() + 1.0);
        }
        logits[target] = y - epsilon * (y.abs() + 1.0);
        amax
    }
}

simd_fn! {
    /// The loss of one row; with `scale`, the logits become scale (softmax - one_hot).
    fn softmax_row(logits: &mut [f32], target: usize, scale: Option<f32>) -> f32 {
        let max = lane_max(logits);
        let at_target = logits[target] - max;
        let Some(scale) = scale else {
            let sum = lane_sum([logits], |[v]| exp(v - max));
            return sum.ln() - at_target;
        };
        for v in logits.iter_mut() {
            *v = exp(*v - max);
        }
        let sum = lane_sum([logits], |[v]| v);
        let factor = scale / sum;
        for v in logits.iter_mut() {
            *v *= factor;
        }
        logits[target] -= scale;
        sum.ln() - at_target
    }
}

simd_fn! {
    fn dot_rows(out: &mut [f32], x: &[f32], rows: &[f32], as_bf16: bool) {
        let round = |v: f32| if as_bf16 { half::bf16::from_f32(v).to_f32() } else { v };
        for (out, row) in out.iter_mut().zip(rows.chunks_exact(x.len())) {
            *out = lane_sum([x, row], |[x, w]| round(x) * round(w));
        }
    }
}
