//! What kernels note of the tensors that they write.

use super::*;
use crate::backend::{
    Activation, Linear as _, Norm as _, NormParams, NormShape, NormStatistics, ResidualSum,
    Select as _, SelectShape, Selected,
};

/// What kernels note is the largest magnitude of what they stored, NaN being larger than all.
#[test]
fn largest_magnitudes_are_noted() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| {
        let noted = |what: &str, tensor: &Tensor| {
            let address = tensor.amax().unwrap_or_else(|| panic!("{what} was not noted"));
            // One NaN is as good as another.
            let bits = |bits: u32| if f32::from_bits(bits).is_nan() { u32::MAX } else { bits };
            let of_all = amax_of(&cuda.read_tensor(tensor));
            assert_eq!(bits(word(&cuda, address)), bits(of_all), "{what}");
        };
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
                let shape = NormShape { rows, channels: c, epsilon: 1e-5 };
                let params = || {
                    let [w, b] = [&w, &b].map(|p| p.param(alone(c)));
                    NormParams { w, b }
                };
                cuda.layernorm_forward(&mut out, statistics.as_mut(), &x, params(), shape);
                noted("a norm", &out);
                let (stats, residual) =
                    (statistics.as_mut(), ResidualSum { sum: &mut sum, x: &x, y: &x });
                cuda.add_layernorm_forward(&mut out, stats, residual, params(), shape);
                noted("a norm of a sum", &out);
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
