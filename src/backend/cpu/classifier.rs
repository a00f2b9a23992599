//! The language-model head fused with softmax and cross-entropy, one chunk of rows at a time:
//! logits = x wte^T; loss = log sum exp(logits) - logits[target]; and, for training,
//! dlogits = scale (softmax - one_hot) in place, dx = dlogits wte, dwte += dlogits^T x.
//!
//! wte is packed once for all chunks, in both directions.

use rayon::prelude::*;

use super::gemm::{Format, Layout, Matrix, Output, Packed, PackedMut, Side, pack};
use super::isa::simd_fn;
use super::math::{exp, lane_max, lane_sum};
use super::workspace::Workspace;
use super::{Cpu, rows_per_job};
use crate::backend::{ClassifierGradient, LinearShape, Precision};

/// Logits held at a time, about: 32 MiB.
const CHUNK_LOGITS: usize = 8 << 20;

/// Rows of one chunk.
pub(super) fn chunk_rows(rows: usize, vocab_size: usize) -> usize {
    (CHUNK_LOGITS / vocab_size).max(64).min(rows)
}

/// See `Backend::classifier`; `shape` is rows, channels, vocabulary.
pub(super) fn run(
    cpu: &Cpu,
    workspace: &mut Workspace,
    losses: &mut [f32],
    mut gradient: Option<ClassifierGradient<'_, Cpu>>,
    x: &[f32],
    wte: &[f32],
    targets: &[u32],
    shape: LinearShape,
    precision: Precision,
) {
    let LinearShape { rows, inputs: channels, outputs: vocab_size } = shape;
    let format = Format::from(precision);
    let Workspace { a, b, transposed_head, head_input, logits, .. } = workspace;
    let head = pack_plain(
        cpu,
        Matrix::rows_by_depth(wte, vocab_size, channels),
        format,
        Side::B,
        b.as_mut(),
    );
    let transposed = gradient.as_ref().map(|_| {
        let wte = Matrix::depth_by_rows(wte, channels, vocab_size);
        pack_plain(cpu, wte, format, Side::B, transposed_head.as_mut())
    });
    let chunk = chunk_rows(rows, vocab_size);
    for r0 in (0..rows).step_by(chunk) {
        let n = chunk.min(rows - r0);
        let x = &x[r0 * channels..][..n * channels];
        let logits = &mut logits[..n * vocab_size];
        let packed = Matrix::rows_by_depth(x, n, channels);
        let packed = pack_plain(cpu, packed, format, Side::A, a.as_mut());
        cpu.gemm(packed, head, overwrite(logits, vocab_size));

        let scale = gradient.as_ref().map(|g| g.scale);
        let losses = &mut losses[r0..r0 + n];
        softmax_rows(cpu, logits, losses, &targets[r0..r0 + n], vocab_size, scale);

        let (Some(gradient), Some(transposed)) = (&mut gradient, transposed) else { continue };
        let dlogits: &[f32] = logits;
        let by_vocab = Matrix::rows_by_depth(dlogits, n, vocab_size);
        let by_vocab = pack_plain(cpu, by_vocab, format, Side::A, a.as_mut());
        let dx = &mut gradient.dx[r0 * channels..][..n * channels];
        cpu.gemm(by_vocab, transposed, overwrite(dx, channels));

        let by_row = Matrix::depth_by_rows(dlogits, vocab_size, n);
        let by_row = pack_plain(cpu, by_row, format, Side::A, a.as_mut());
        let x = Matrix::depth_by_rows(x, channels, n);
        let x = pack_plain(cpu, x, format, Side::B, head_input.as_mut());
        let accumulate = gradient.accumulate || r0 > 0;
        cpu.gemm(by_row, x, Output { accumulate, ..overwrite(gradient.dwte, channels) });
    }
}

fn pack_plain<'a>(
    cpu: &Cpu,
    source: Matrix<'_>,
    format: Format,
    side: Side,
    memory: PackedMut<'a>,
) -> Packed<'a> {
    pack(cpu, &source, format, Layout::best(cpu.isa(), format), None, side, memory)
}

fn overwrite(c: &mut [f32], stride: usize) -> Output<'_> {
    Output { c, stride, alpha: 1.0, bias: None, accumulate: false }
}

/// Losses of all rows and, with `scale`, dlogits in place of the logits.
fn softmax_rows(
    cpu: &Cpu,
    logits: &mut [f32],
    losses: &mut [f32],
    targets: &[u32],
    vocab_size: usize,
    scale: Option<f32>,
) {
    let per_job = rows_per_job(vocab_size);
    cpu.install(|| {
        logits
            .par_chunks_mut(per_job * vocab_size)
            .zip(losses.par_chunks_mut(per_job))
            .zip(targets.par_chunks(per_job))
            .for_each(|((logits, losses), targets)| {
                let rows = logits.chunks_exact_mut(vocab_size).zip(losses).zip(targets);
                for ((logits, loss), target) in rows {
                    *loss = softmax_row(cpu.isa(), logits, *target as usize, scale);
                }
            });
    });
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

/// Logits (V) of one row x (C), as the packed GEMM would round its operands.
pub(super) fn logits(cpu: &Cpu, logits: &mut [f32], x: &[f32], wte: &[f32], precision: Precision) {
    let channels = x.len();
    let per_job = rows_per_job(channels);
    cpu.install(|| {
        logits.par_chunks_mut(per_job).enumerate().for_each(|(job, logits)| {
            let wte = &wte[job * per_job * channels..][..logits.len() * channels];
            dot_rows(cpu.isa(), logits, x, wte, precision == Precision::Bf16);
        });
    });
}

simd_fn! {
    fn dot_rows(out: &mut [f32], x: &[f32], rows: &[f32], as_bf16: bool) {
        let round = |v: f32| if as_bf16 { half::bf16::from_f32(v).to_f32() } else { v };
        for (out, row) in out.iter_mut().zip(rows.chunks_exact(x.len())) {
            *out = lane_sum([x, row], |[x, w]| round(x) * round(w));
        }
    }
}
