//! Norms and GELU, and what kernels note of what they store.

use super::*;
use crate::backend::{Activation, reference};

#[test]
fn layernorm_and_gelu() {
    each_precision(|cuda, precision| {
        for (rows, c) in [(1, 8), (7, 33), (300, 384), (65, 768), (9, 1600), (5, 4104)] {
            let values = |len, seed| rounded(&random(len, seed), precision);
            let (x, dy) = (values(rows * c, 1), values(rows * c, 2));
            let (w, b) = (values(c, 3), values(c, 4));
            let (x_d, dy_d) = (tensor(cuda, &x, precision), tensor(cuda, &dy, precision));
            let (w_d, b_d) = (param(cuda, &w), param(cuda, &b));
            let nan = vec![f32::NAN; rows];
            let mut statistics =
                NormStatistics { mean: f32_buffer(cuda, &nan), rstd: f32_buffer(cuda, &nan) };
            let epsilon = 1e-5;
            let (mut out, mut sum) =
                (poison(cuda, rows * c, precision), poison(cuda, rows * c, precision));
            cuda.add_layernorm_forward(
                &mut out,
                &mut sum,
                statistics.as_mut(),
                &x_d,
                &dy_d,
                &w_d,
                &b_d,
                rows,
                c,
                epsilon,
            );
            let exact: Vec<f64> =
                x.iter().zip(&dy).map(|(a, b)| f64::from(*a) + f64::from(*b)).collect();
            let ours = values_of(cuda, &sum);
            close("sum", &ours, &exact, bound(precision));
            let e = f64::from(epsilon);
            let (exact, ..) = reference::layernorm_forward(&f64s(&ours), &f64s(&w), &f64s(&b), e);
            close("norm of sum", &values_of(cuda, &out), &exact, bound(precision));

            let stats = statistics.as_mut();
            cuda.layernorm_forward(&mut out, stats, &x_d, &w_d, &b_d, rows, c, epsilon);
            let (exact, mean, rstd) =
                reference::layernorm_forward(&f64s(&x), &f64s(&w), &f64s(&b), e);
            close("norm", &values_of(cuda, &out), &exact, bound(precision));
            close("mean", &f32s_of(cuda, &statistics.mean), &mean, 1e-5);
            close("rstd", &f32s_of(cuda, &statistics.rstd), &rstd, 1e-5);

            let one = vec![1.0; rows * c];
            let mut dx = tensor(cuda, &one, precision);
            let (mut dw, mut db) = (f32_buffer(cuda, &one[..c]), f32_buffer(cuda, &one[..c]));
            let shape = Sequences { batch: 1, length: rows };
            let mut scratch = workspace(cuda, &workspace_shape(shape, c, 1, 8, precision));
            let (s, stats) = (&mut scratch, statistics.as_ref());
            cuda.layernorm_backward(
                s, &mut dx, &mut dw, &mut db, &dy_d, &x_d, stats, &w_d, rows, c, true,
            );
            let (exact_dx, exact_dw, exact_db) =
                reference::layernorm_backward(&f64s(&dy), &f64s(&x), &f64s(&w), e);
            let loose = bound(precision).max(1e-5);
            close("dx", &values_of(cuda, &dx), &plus_one(exact_dx), loose);
            close("dw", &f32s_of(cuda, &dw), &plus_one(exact_dw.clone()), 1e-5);
            close("db", &f32s_of(cuda, &db), &plus_one(exact_db.clone()), 1e-5);
            let poison = vec![f32::NAN; c];
            let (mut dw, mut db) = (f32_buffer(cuda, &poison), f32_buffer(cuda, &poison));
            let (s, stats) = (&mut scratch, statistics.as_ref());
            cuda.layernorm_backward(
                s, &mut dx, &mut dw, &mut db, &dy_d, &x_d, stats, &w_d, rows, c, false,
            );
            close("dw alone", &f32s_of(cuda, &dw), &exact_dw, 1e-5);
            close("db alone", &f32s_of(cuda, &db), &exact_db, 1e-5);

            for form in [Activation::GeluTanh, Activation::Gelu] {
                cuda.gelu_forward(&mut out, &x_d, rows * c, form);
                let exact: Vec<f64> =
                    x.iter().map(|v| reference::gelu_of(form, f64::from(*v))).collect();
                close("gelu", &values_of(cuda, &out), &exact, bound(precision));
                let mut d = tensor(cuda, &dy, precision);
                cuda.gelu_backward(&mut d, &x_d, rows * c, form);
                let slope = |(x, dy): (&f32, &f32)| {
                    f64::from(*dy) * reference::gelu_derivative_of(form, f64::from(*x))
                };
                let exact: Vec<f64> = x.iter().zip(&dy).map(slope).collect();
                close("dgelu", &values_of(cuda, &d), &exact, bound(precision));
            }
        }
    });
}

/// What kernels note is the largest magnitude of what they stored, NaN being larger than
/// everything.
#[test]
fn largest_magnitudes_are_noted() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| {
        let noted = |what: &str, tensor: &Tensor| {
            let address = tensor.amax().unwrap_or_else(|| panic!("{what} was not noted"));
            assert_eq!(word(&cuda, address), amax_of(&values_of(&cuda, tensor)), "{what}");
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
                cuda.layernorm_forward(&mut out, statistics.as_mut(), &x, &w, &b, rows, c, 1e-5);
                noted("a norm", &out);
                let stats = statistics.as_mut();
                cuda.add_layernorm_forward(
                    &mut out, &mut sum, stats, &x, &x, &w, &b, rows, c, 1e-5,
                );
                noted("a norm of a sum", &out);
                for form in [Activation::GeluTanh, Activation::Gelu] {
                    cuda.gelu_forward(&mut out, &x, rows * c, form);
                    noted("GELU", &out);
                    cuda.gelu_backward(&mut out, &x, rows * c, form);
                    noted("GELU's derivative", &out);
                }
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
