//! Linear layers in all recipes.

use super::quantize::carrier::{Carrier, Format};
use super::*;
use crate::backend::{Activation, reference};
use crate::recipe::{Backward, Recipe};

#[test]
fn linear_layers_in_plain_formats() {
    each_precision(|cuda, precision| {
        for (rows, inputs, outputs) in [(1, 8, 16), (130, 40, 72), (77, 96, 33)] {
            let shape = LinearShape { rows, inputs, outputs };
            let values = |len, seed| rounded(&random(len, seed), precision);
            let (x, w) = (values(rows * inputs, 1), values(outputs * inputs, 2));
            let (b, dy) = (values(outputs, 3), values(rows * outputs, 4));
            let (x_d, w_d, b_d) = (tensor(cuda, &x, precision), param(cuda, &w), param(cuda, &b));
            let dy_d = tensor(cuda, &dy, precision);
            let sequences = Sequences { batch: 1, length: rows };
            let shape_of_all = workspace_shape(sequences, inputs.max(outputs), 1, 8, precision);
            let mut scratch = workspace(cuda, &shape_of_all);
            let mut y = poison(cuda, rows * outputs, precision);
            let (format, recipe): (_, Recipe) = match precision {
                Precision::F32 => (Forward::F32, "fp32".parse().unwrap()),
                Precision::Bf16 => (Forward::Bf16, "bf16".parse().unwrap()),
            };
            cuda.linear_forward(&mut scratch, &mut y, &x_d, &w_d, &b_d, shape, format);
            let exact = reference::linear_forward(&f64s(&x), &f64s(&w), &f64s(&b), shape);
            close("y", &values_of(cuda, &y), &exact, bound(precision));
            let mut dx = poison(cuda, rows * inputs, precision);
            let mut dw = f32_buffer(cuda, &vec![1.0; outputs * inputs]);
            let mut db = f32_buffer(cuda, &vec![1.0; outputs]);
            let recipe = recipe.for_layer(0, 1, 0, 0);
            let (s, r) = (&mut scratch, &RANDOM);
            cuda.linear_backward(
                s, &mut dx, &mut dw, &mut db, &dy_d, &x_d, &w_d, shape, &recipe, r, true,
            );
            let (exact_dx, exact_dw, exact_db) =
                reference::linear_backward(&f64s(&dy), &f64s(&x), &f64s(&w), shape);
            close("dx", &values_of(cuda, &dx), &exact_dx, bound(precision));
            close("dw", &f32s_of(cuda, &dw), &plus_one(exact_dw.clone()), 1e-5);
            close("db", &f32s_of(cuda, &db), &plus_one(exact_db.clone()), 1e-5);

            // The same with gradients that are overwritten, and with GELU after the forward product
            // and before the backward ones.
            cuda.write_f32(&mut dw, &vec![f32::NAN; outputs * inputs]).unwrap();
            cuda.write_f32(&mut db, &vec![f32::NAN; outputs]).unwrap();
            let (mut pre, mut out) =
                (poison(cuda, rows * outputs, precision), poison(cuda, rows * outputs, precision));
            let (s, forms) = (&mut scratch, [Activation::Gelu, Activation::GeluTanh]);
            for form in forms {
                cuda.linear_gelu_forward(
                    s, &mut out, &mut pre, &x_d, &w_d, &b_d, shape, format, form,
                );
                close("pre", &values_of(cuda, &pre), &exact, bound(precision));
                let gelu: Vec<f64> = exact.iter().map(|v| reference::gelu_of(form, *v)).collect();
                close("gelu", &values_of(cuda, &out), &gelu, 2.0 * bound(precision));
            }
            cuda.linear_backward(
                s, &mut dx, &mut dw, &mut db, &dy_d, &x_d, &w_d, shape, &recipe, r, false,
            );
            close("dw alone", &f32s_of(cuda, &dw), &exact_dw, 1e-5);
            close("db alone", &f32s_of(cuda, &db), &exact_db, 1e-5);
            let pre = rounded(&random(rows * outputs, 5), precision);
            let pre_d = tensor(cuda, &pre, precision);
            for form in forms {
                let mut d = tensor(cuda, &dy, precision);
                cuda.linear_gelu_backward(
                    s, &mut dx, &mut dw, &mut db, &mut d, &pre_d, &x_d, &w_d, shape, &recipe, r,
                    false, form,
                );
                let slope = |(d, x): (&f32, &f32)| {
                    f64::from(*d) * reference::gelu_derivative_of(form, f64::from(*x))
                };
                let d: Vec<f64> = dy.iter().zip(&pre).map(slope).collect();
                let (exact_dx, exact_dw, exact_db) =
                    reference::linear_backward(&d, &f64s(&x), &f64s(&w), shape);
                // d is rounded to the precision before it is multiplied.
                let loose = 2.0 * bound(precision);
                close("dx behind GELU", &values_of(cuda, &dx), &exact_dx, loose);
                close("dw behind GELU", &f32s_of(cuda, &dw), &exact_dw, loose.max(1e-5));
                close("db behind GELU", &f32s_of(cuda, &db), &exact_db, loose.max(1e-5));
            }
        }
    });
}

/// Backward passes in every recipe against the f64 product of what their operands are quantized to.
#[test]
fn mxfp4_linear_backward_is_the_product_of_its_operands() {
    let Some(cuda) = gpu() else { return };
    check_mxfp4_backward(&cuda);
}

pub(super) fn check_mxfp4_backward(cuda: &Cuda) {
    for (rows, inputs, outputs) in [(130, 40, 72), (64, 128, 96), (77, 96, 33), (320, 144, 208)] {
        for name in Recipe::NAMES.into_iter().skip(2) {
            let shape = LinearShape { rows, inputs, outputs };
            let values = |len, seed| rounded(&random(len, seed), Precision::Bf16);
            let (x, dy) = (values(rows * inputs, 1), values(rows * outputs, 4));
            let w = random(outputs * inputs, 2);
            let (x_d, w_d) = (tensor(cuda, &x, Precision::Bf16), param(cuda, &w));
            let dy_d = tensor(cuda, &dy, Precision::Bf16);
            let recipe: Recipe = name.parse().unwrap();
            let recipe = recipe.for_layer(0, 1, 0, 0);
            let Backward::Mxfp4(format) = recipe.dgrad else { panic!("{name} is not MXFP4") };
            let kept: Vec<f32> = if recipe.forward == Forward::Fp8 {
                let amax = x.iter().fold(0.0f32, |amax, v| amax.max(v.abs()));
                let scale = mx::e4m3_scale(amax);
                x.iter().map(|v| mx::round_to_e4m3(v / scale) * scale).collect()
            } else {
                x.clone()
            };
            let operand = |data, rows, depth, transposed, gemm, id| {
                let mut signs = vec![0.0; format.transform.map_or(0, |t| t.group)];
                RANDOM.signs(gemm).fill_signs(&mut signs);
                let source = Source { data, rows, depth, transposed };
                Mxfp4Matrix::quantize(source, &signs, format.dy, &RANDOM.rounding(id))
            };
            let product = |a: Mxfp4Matrix, b: Mxfp4Matrix| -> Vec<f64> {
                let alpha = f64::from(mx::product_scale(format.dy, format.other));
                let (m, n, k) = (a.rows, b.rows, a.depth);
                let exact =
                    reference::product(&f64s(&a.dequantize()), &f64s(&b.dequantize()), m, n, k);
                exact.into_iter().map(|v| alpha * v).collect()
            };
            use GemmId::{Dgrad, Wgrad};
            let exact_dx = product(
                operand(&dy, rows, outputs, false, Dgrad, OperandId::Dy),
                operand(&w, inputs, outputs, true, Dgrad, OperandId::W),
            );
            let exact_dw = product(
                operand(&dy, outputs, rows, true, Wgrad, OperandId::Dy),
                operand(&kept, inputs, rows, true, Wgrad, OperandId::X),
            );
            let (_, _, exact_db) =
                reference::linear_backward(&f64s(&dy), &f64s(&x), &f64s(&w), shape);
            let sequences = Sequences { batch: 1, length: rows };
            let all = workspace_shape(sequences, inputs.max(outputs), 1, 8, Precision::Bf16);
            cuda.gpu.scope(|| {
                let mut scratch = workspace(cuda, &all);
                let mut dx = poison(cuda, rows * inputs, Precision::Bf16);
                let mut dw = f32_buffer(cuda, &vec![0.0; outputs * inputs]);
                let mut db = f32_buffer(cuda, &vec![1.0; outputs]);
                let (s, r) = (&mut scratch, &RANDOM);
                cuda.linear_backward(
                    s, &mut dx, &mut dw, &mut db, &dy_d, &x_d, &w_d, shape, &recipe, r, true,
                );
                close(name, &values_of(cuda, &dx), &exact_dx, bound(Precision::Bf16));
                // FP8 tensor cores align what they add at once to the largest of it, and drop what
                // lies too far below: with these outliers up to 8e-6 of the result. The definition
                // allows 1e-5.
                let carrier = Carrier::of(Format::Mxfp4, cuda.gpu.capability, shape);
                let aligned = carrier != Carrier::Bf16 && rows > 64;
                close(name, &f32s_of(cuda, &dw), &exact_dw, if aligned { 1e-5 } else { 1e-6 });
                close(name, &f32s_of(cuda, &db), &plus_one(exact_db), 1e-5);
            });
        }
    }
}

/// Behind GELU a gradient that is quantized as it is made is the one that is made first, whether or
/// not the sample says enough of it; also as part of a recorded step, with the random numbers of
/// every step.
#[test]
fn gradients_behind_gelu_give_the_results_of_those_that_are_stored() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| check_gradients_behind_gelu(&cuda));
    cuda.gpu.synchronize().unwrap();
}

fn check_gradients_behind_gelu(cuda: &Cuda) {
    for (rows, inputs, outputs) in [(128, 64, 96), (320, 144, 208), (1024, 256, 1040)] {
        let shape = LinearShape { rows, inputs, outputs };
        let carrier = Carrier::of(Format::Mxfp4, cuda.gpu.capability, shape);
        let x = tensor(cuda, &random(rows * inputs, 1), Precision::Bf16);
        let w = param(cuda, &random(outputs * inputs, 2));
        let pre: Vec<f32> = random(rows * outputs, 3).iter().map(|v| 0.5 * v).collect();
        let sequences = Sequences { batch: 1, length: rows };
        let all = workspace_shape(sequences, inputs.max(outputs), 1, 8, Precision::Bf16);
        let mut scratch = workspace(cuda, &all);
        for (name, kind, form) in Recipe::NAMES
            .into_iter()
            .flat_map(|name| ["sampled", "above the sample", "not finite"].map(|kind| (name, kind)))
            .filter(|(name, _)| *name != "fp32")
            .flat_map(|(name, kind)| {
                [Activation::GeluTanh, Activation::Gelu].map(|form| (name, kind, form))
            })
        {
            let what = format!("({rows}, {inputs}, {outputs}) {name}, {kind}, {form}");
            let recipe = name.parse::<Recipe>().unwrap().for_layer(0, 1, 0, 0);
            let (mut pre, mut d) = (pre.clone(), random(rows * outputs, 4));
            // The largest one, in the first row, and its derivative is 1; or else there are larger
            // ones.
            (d[0], pre[0]) = (40.0, 10.0);
            match kind {
                "above the sample" => {
                    d[13 * outputs..14 * outputs].iter_mut().for_each(|v| *v *= 1e4)
                }
                "not finite" => d[13 * outputs + 5] = f32::INFINITY,
                _ => {}
            }
            let pre = tensor(cuda, &pre, Precision::Bf16);
            let mut dx = poison(cuda, rows * inputs, Precision::Bf16);
            let mut dw = f32_buffer(cuda, &vec![f32::NAN; outputs * inputs]);
            let mut db = f32_buffer(cuda, &vec![f32::NAN; outputs]);
            let results = |dx: &Tensor, dw: &F32, db: &F32| {
                let all = [values_of(cuda, dx), f32s_of(cuda, dw), f32s_of(cuda, db)];
                all.concat().iter().map(|v| if v.is_nan() { 0 } else { v.to_bits() }).collect()
            };
            let random = Random { step: 9, micro_step: 0, ..RANDOM };

            let mut dy = tensor(cuda, &d, Precision::Bf16);
            cuda.gelu_backward(&mut dy, &pre, rows * outputs, form);
            let (s, r) = (&mut scratch, &random);
            cuda.linear_backward(
                s, &mut dx, &mut dw, &mut db, &dy, &x, &w, shape, &recipe, r, false,
            );
            let expected: Vec<u32> = results(&dx, &dw, &db);
            assert_eq!(kind == "not finite", !f32s_of(cuda, &dw)[5 * inputs].is_finite(), "{what}");

            // Twice, the second time where no zeroed words are left; then as the third of three
            // steps, which is the second one recorded.
            let mut dy = tensor(cuda, &d, Precision::Bf16);
            let before = values_of(cuda, &dy);
            for words_left in [true, false] {
                let mut dy = tensor(cuda, &d, Precision::Bf16);
                while !words_left && dy.write().amax() != 0 {}
                cuda.linear_gelu_backward(
                    s, &mut dx, &mut dw, &mut db, &mut dy, &pre, &x, &w, shape, &recipe, r, false,
                    form,
                );
                assert!(results(&dx, &dw, &db) == expected, "{what}");
                let Backward::Mxfp4(format) = recipe.dgrad else { continue };
                let group = format.transform.map(|transform| transform.group);
                let fused =
                    form == Activation::GeluTanh && carrier == Carrier::Fp8 && group == Some(64);
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&values_of(cuda, &dy)) == bits(&before), fused, "{what}");
            }
            let mut recordings = cuda.recordings();
            let copy = tensor(cuda, &d, Precision::Bf16);
            for step in 7..10 {
                let kind = StepKind { accumulate: false, in_last_steps: false };
                cuda.recorded(&mut recordings, kind, [step, 0], || {
                    dy.begin_pass(&cuda.gpu);
                    // SAFETY: both have as many bytes.
                    let copied = unsafe {
                        let (to, from) = (dy.address(), copy.address());
                        sys::cuMemcpyDtoDAsync_v2(to, from, dy.bytes(), cuda.gpu.stream())
                    };
                    cuda.gpu.note("a copy", copied);
                    let r = &Random { step, ..random };
                    cuda.linear_gelu_backward(
                        s, &mut dx, &mut dw, &mut db, &mut dy, &pre, &x, &w, shape, &recipe, r,
                        false, form,
                    );
                });
            }
            assert!(results(&dx, &dw, &db) == expected, "{what}, recorded");
        }
    }
}

/// The FP8 forward pass: operands rounded as the definition says, products exact.
#[test]
fn fp8_forward() {
    let Some(cuda) = gpu() else { return };
    for (rows, inputs, outputs) in [(130, 48, 72), (144, 48, 80)] {
        let shape = LinearShape { rows, inputs, outputs };
        let x = rounded(&random(rows * inputs, 1), Precision::Bf16);
        let (w, b) = (random(outputs * inputs, 2), rounded(&random(outputs, 3), Precision::Bf16));
        let as_fp8 = |v: &[f32]| -> Vec<f64> {
            let scale = mx::e4m3_scale(v.iter().fold(0.0f32, |amax, v| amax.max(v.abs())));
            v.iter().map(|v| f64::from(mx::round_to_e4m3(v / scale) * scale)).collect()
        };
        let exact = reference::linear_forward(&as_fp8(&x), &as_fp8(&w), &f64s(&b), shape);
        let (x_d, w_d, b_d) =
            (tensor(&cuda, &x, Precision::Bf16), param(&cuda, &w), param(&cuda, &b));
        cuda.gpu.scope(|| {
            let sequences = Sequences { batch: 1, length: rows };
            let all = workspace_shape(sequences, outputs, 1, 8, Precision::Bf16);
            let mut scratch = workspace(&cuda, &all);
            let mut y = poison(&cuda, rows * outputs, Precision::Bf16);
            cuda.linear_forward(&mut scratch, &mut y, &x_d, &w_d, &b_d, shape, Forward::Fp8);
            close("y", &values_of(&cuda, &y), &exact, bound(Precision::Bf16));
        });
    }
}
