//! Attention, by the chip's own kernels and by those of older ones.

use super::*;
use crate::backend::reference;

#[test]
fn attention() {
    each_precision(check_attention);
    let Some(cuda) = older_gpu() else { return };
    cuda.gpu.scope(|| check_attention(&cuda, Precision::Bf16));
    cuda.gpu.synchronize().unwrap();
}

fn check_attention(cuda: &Cuda, precision: Precision) {
    for (batch, length, heads, head_size, score_factor) in [
        (1, 1, 1, 8, 1.0),
        (2, 7, 3, 16, 1.0),
        (1, 65, 2, 20, 1.0),
        (2, 130, 3, 64, 1.0),
        (1, 300, 2, 128, 1.0),
        (1, 257, 2, 96, 1.0),
        (2, 128, 1, 48, 1.0),
        (1, 33, 1, 160, 1.0),
        (1, 1000, 1, 64, 1.0),
        (2, 450, 1, 128, 1.0),
        // Without the root of the head size, and divided by a layer's number.
        (1, 150, 2, 16, 4.0),
        (1, 70, 2, 20, 0.5),
        (1, 200, 1, 64, 1.0 / 3.0),
        (2, 140, 1, 128, 0.25),
    ] {
        let sequences = Sequences { batch, length };
        let format = Forward::Bf16;
        let shape = AttentionShape { sequences, heads, head_size, score_factor, format };
        let c = heads * head_size;
        let rows = sequences.rows();
        let qkv = rounded(&random(rows * 3 * c, 1), precision);
        let dout = rounded(&random(rows * c, 2), precision);
        let (qkv_d, dout_d) = (tensor(cuda, &qkv, precision), tensor(cuda, &dout, precision));
        let mut out = poison(cuda, rows * c, precision);
        let mut lse = f32_buffer(cuda, &vec![f32::NAN; rows * heads]);
        let mut scratch = workspace(cuda, &workspace_shape(sequences, c, heads, 8, precision));
        cuda.attention_forward(&mut scratch, &mut out, &mut lse, &qkv_d, shape);
        let (exact, exact_lse) = reference::attention_forward(&f64s(&qkv), shape);
        let loose = match precision {
            Precision::F32 => 1e-5,
            Precision::Bf16 => 1e-2,
        };
        // An error of a score is relative to the score, and the softmax sees it as it is.
        let loose = loose * f64::from(score_factor.max(1.0));
        close("attention", &values_of(cuda, &out), &exact, loose);
        close("lse", &f32s_of(cuda, &lse), &exact_lse, 1e-5);
        let mut dqkv = poison(cuda, rows * 3 * c, precision);
        cuda.attention_backward(&mut scratch, &mut dqkv, &dout_d, &out, &lse, &qkv_d, shape);
        let exact = reference::attention_backward(&f64s(&dout), &f64s(&qkv), shape);
        close("dqkv", &values_of(cuda, &dqkv), &exact, 1.5 * loose);
    }
}
