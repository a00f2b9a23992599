//! What kernels note of the tensors that they write.

use super::*;
use crate::backend::{
    Activation, Attend as _, AttentionBackward, AttentionShape, HeadNorms, HeadNormsBackward,
    Linear as _, Norm as _, NormKind, NormParams, NormShape, NormStatistics, ResidualSum,
    Rotate as _, Select as _, SelectShape, Selected, Turn,
};

/// Whether what was noted is the largest magnitude of a tensor, NaN being larger than all.
#[track_caller]
fn noted(cuda: &Cuda, what: &str, tensor: &Tensor) {
    let address = tensor.amax().unwrap_or_else(|| panic!("{what} was not noted"));
    // One NaN is as good as another.
    let bits = |bits: u32| if f32::from_bits(bits).is_nan() { u32::MAX } else { bits };
    let of_all = amax_of(&cuda.read_tensor(tensor));
    assert_eq!(bits(word(cuda, address)), bits(of_all), "{what}");
}

/// What kernels note is the largest magnitude of what they stored.
#[test]
fn largest_magnitudes_are_noted() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| {
        let noted = |what: &str, tensor: &Tensor| noted(&cuda, what, tensor);
        for (rows, c) in [(1, 8), (77, 33), (300, 384)] {
            for poisoned in [false, true] {
                let mut values = rounded(&random(rows * c, 1), Precision::Bf16);
                if poisoned {
                    values[rows * c / 2] = f32::NAN;
                }
                let x = tensor(&cuda, &values, Precision::Bf16);
                let (w, b) = (param(&cuda, &random(c, 2)), param(&cuda, &random(c, 3)));
                let mut statistics = NormStatistics {
                    mean: f32_buffer(&cuda, &vec![0.0; rows]),
                    rstd: f32_buffer(&cuda, &vec![0.0; rows]),
                };
                let (mut out, mut sum) = (
                    poison(&cuda, rows * c, Precision::Bf16),
                    poison(&cuda, rows * c, Precision::Bf16),
                );
                let shape = NormShape { rows, channels: c, epsilon: 1e-5, kind: NormKind::Layer };
                let params = || {
                    let [w, b] = [&w, &b].map(|p| p.param(alone(c)));
                    NormParams { w, b: Some(b) }
                };
                cuda.norm_forward(&mut out, statistics.as_mut(), &x, params(), shape);
                noted("a norm", &out);
                let (stats, residual) =
                    (statistics.as_mut(), ResidualSum { sum: &mut sum, x: &x, y: &x });
                cuda.add_norm_forward(&mut out, stats, residual, params(), shape);
                noted("a norm of a sum", &out);
                let shape = NormShape { kind: NormKind::Rms, ..shape };
                let params = || NormParams { w: w.param(alone(c)), b: None };
                cuda.norm_forward(&mut out, statistics.as_mut(), &x, params(), shape);
                noted("an RMSNorm", &out);
                let (stats, residual) =
                    (statistics.as_mut(), ResidualSum { sum: &mut sum, x: &x, y: &x });
                cuda.add_norm_forward(&mut out, stats, residual, params(), shape);
                noted("an RMSNorm of a sum", &out);
                let mut gated = rounded(&random(2 * rows * c, 4), Precision::Bf16);
                if poisoned {
                    gated[rows * c] = f32::NAN;
                }
                let mut gated = tensor(&cuda, &gated, Precision::Bf16);
                cuda.swiglu_forward(&mut out, &gated, rows, c);
                noted("SwiGLU", &out);
                cuda.swiglu_backward(&mut gated, &x, rows, c);
                noted("SwiGLU's gradient", &gated);
                for form in [Activation::GeluTanh, Activation::Gelu] {
                    cuda.gelu_forward(&mut out, &x, rows * c, form);
                    noted("GELU", &out);
                    cuda.gelu_backward(&mut out, &x, rows * c, form);
                    noted("GELU's derivative", &out);
                }
                let sequences = Sequences { batch: 1, length: rows };
                let shape = SelectShape { sequences, kept: rows.div_ceil(2), channels: c };
                let mut measuring = Arena::measuring(&cuda.gpu);
                cuda.selection(&mut measuring, sequences, 1);
                let mut arena = Arena::allocated(&cuda.gpu, measuring.used()).unwrap();
                let mut selection = cuda.selection(&mut arena, sequences, 1);
                cuda.select_positions(&mut selection, 0..1, shape, &RANDOM);
                let mut kept = poison(&cuda, shape.kept * c, Precision::Bf16);
                let selected = || Selected { selection: &selection, layer: 0 };
                cuda.gather_rows(&mut kept, &x, selected(), shape);
                noted("gathered rows", &kept);
                cuda.scatter_rows(&mut out, &kept, selected(), shape);
                assert!(out.amax().is_none());
                cuda.zero_tensor(&mut out);
                assert!(out.amax().is_none());
                assert!(sum.amax().is_none());
                assert_eq!(word(&cuda, w.amax.address), amax_of(&random(c, 2)));
            }
        }
        // After the words of a pass are used up, nothing is noted until the next one.
        let mut out = poison(&cuda, 8, Precision::Bf16);
        let taken = (0..5000).filter(|_| out.write().amax() != 0).count();
        assert_eq!(taken, 4095);
        assert!(out.zeroed_words(3).is_none());
        out.begin_pass(&cuda.gpu);
        assert!(out.write().amax() != 0);
        assert!(out.zeroed_words(3).is_some());
    });
}

/// Gradients of q, k and v have one word, which counts all of them, whichever was written last.
#[test]
fn largest_magnitudes_of_heads_are_noted() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| {
        let sizes = [(1, 5, 1, 1, 6), (2, 70, 4, 2, 64), (1, 33, 3, 1, 80), (2, 40, 4, 4, 128)];
        for (batch, length, heads, kv_heads, head_size) in sizes {
            let (sequences, precision) = (Sequences { batch, length }, Precision::Bf16);
            let score_factor = 1.0;
            let shape =
                AttentionShape { sequences, heads, kv_heads, head_size, score_factor, precision };
            let (rows, wide, c) = (sequences.rows(), shape.qkv_channels(), shape.channels());
            let norm = NormShape { rows, channels: c, epsilon: 1e-6, kind: NormKind::Rms };
            let mut scratch = workspace(&cuda, sequences, c, heads, 8, precision);
            let table = tensor(&cuda, &random(rows * head_size, 1), Precision::F32);
            let qkv = tensor(&cuda, &random(rows * wide, 2), precision);
            let dout = tensor(&cuda, &random(rows * c, 3), precision);
            let w = param(&cuda, &random(head_size, 4));
            let (mut out, mut lse) =
                (poison(&cuda, rows * c, precision), f32_buffer(&cuda, &vec![0.0; rows * heads]));
            cuda.attention_forward(&mut scratch, &mut out, &mut lse, &qkv, None, shape);
            noted(&cuda, "attention", &out);
            let mut dqkv = poison(&cuda, rows * wide, precision);
            let operands = AttentionBackward {
                dqkv: &mut dqkv,
                dout: &dout,
                out: &out,
                lse: &lse,
                qkv: &qkv,
                documents: None,
            };
            cuda.attention_backward(&mut scratch, operands, shape);
            noted(&cuda, "its gradient", &dqkv);
            // The largest are those of q, then those of v.
            for factor in [1.0, 1e3] {
                let mut values = random(rows * wide, 5);
                for row in values.chunks_mut(wide) {
                    row[wide - kv_heads * head_size..].iter_mut().for_each(|v| *v *= factor);
                }
                let mut dqkv = tensor(&cuda, &values, precision);
                cuda.rotate(&mut dqkv, &table, Turn::Back, shape);
                noted(&cuda, "heads turned back", &dqkv);
                cuda.rotate(&mut dqkv, &table, Turn::Forward, shape);
                assert!(dqkv.amax().is_none());
                let mut dqkv = tensor(&cuda, &values, precision);
                let operands = HeadNormsBackward {
                    dqkv: &mut dqkv,
                    dq: None,
                    dk: None,
                    qkv: &qkv,
                    table: &table,
                    norms: HeadNorms { q: w.param(alone(head_size)), k: w.param(alone(head_size)) },
                    accumulate: false,
                };
                cuda.head_norms_backward(&mut scratch, operands, (shape, norm));
                noted(&cuda, "gradients behind norms of heads", &dqkv);
            }
        }
    });
}
