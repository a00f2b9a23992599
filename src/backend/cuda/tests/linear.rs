//! Kernels that fuse the derivative of an activation with quantization.

use super::quantize::carrier::Carrier;
use super::*;
use crate::backend::{Activation, Linear as _, LinearBackward, LinearShape, OutputGradient};
use crate::formats::Random;
use crate::recipe::Recipe;

/// Behind an activation a gradient that is quantized as it is made is the one that is made first,
/// whether or not the sample says enough of it; also as part of a recorded step, with the random
/// numbers of every step.
#[test]
fn gradients_behind_activations_give_the_results_of_those_that_are_stored() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| check_gradients_behind_activations(&cuda));
    cuda.gpu.synchronize().unwrap();
}

/// Of GELU in one of its forms, or of SwiGLU, whose d is half as wide and in whose y dy is put.
fn behind<'a>(
    form: Option<Activation>,
    d: &'a mut Tensor,
    y: &'a mut Tensor,
) -> OutputGradient<'a, Cuda> {
    match form {
        Some(form) => OutputGradient::BehindGelu { d, y, form },
        None => OutputGradient::BehindSwiGlu { d, y },
    }
}

fn check_gradients_behind_activations(cuda: &Cuda) {
    for (rows, inputs, outputs) in [(128, 64, 96), (320, 144, 208), (1024, 256, 1040)] {
        let shape = LinearShape { rows, inputs, outputs };
        let carrier = Carrier::of(Format::MXFP4, cuda.gpu.capability, shape);
        let x = tensor(cuda, &random(rows * inputs, 1), Precision::Bf16);
        let w = param(cuda, &random(outputs * inputs, 2));
        let pre: Vec<f32> = random(rows * outputs, 3).iter().map(|v| 0.5 * v).collect();
        let sequences = Sequences { batch: 1, length: rows };
        let mut scratch = workspace(cuda, sequences, inputs.max(outputs), 1, 8, Precision::Bf16);
        for (name, kind, form) in Recipe::NAMES
            .into_iter()
            .chain(["mxfp4-rht,range=3/4"])
            .flat_map(|name| ["sampled", "above the sample", "not finite"].map(|kind| (name, kind)))
            .filter(|(name, _)| *name != "fp32")
            .flat_map(|(name, kind)| {
                let forms = [Some(Activation::GeluTanh), Some(Activation::Gelu), None];
                forms.map(|form| (name, kind, form))
            })
        {
            let what = format!("({rows}, {inputs}, {outputs}) {name}, {kind}, {form:?}");
            // Of d.
            let width = if form.is_some() { outputs } else { outputs / 2 };
            let recipe = name.parse::<Recipe>().unwrap().for_layer(0, 1, 0, 0)[0];
            let (mut pre, mut d) = (pre.clone(), random(rows * width, 4));
            // The largest one, in the first row, and its derivative is 1; or else there are larger
            // ones.
            (d[0], pre[0]) = (40.0, 10.0);
            match kind {
                "above the sample" => d[13 * width..14 * width].iter_mut().for_each(|v| *v *= 1e4),
                "not finite" => d[13 * width + 5] = f32::INFINITY,
                _ => {}
            }
            let pre_values = pre;
            let pre = || tensor(cuda, &pre_values, Precision::Bf16);
            let mut dx = poison(cuda, rows * inputs, Precision::Bf16);
            let mut dw = f32_buffer(cuda, &vec![f32::NAN; outputs * inputs]);
            let mut db = f32_buffer(cuda, &vec![f32::NAN; outputs]);
            let results = |dx: &Tensor, dw: &F32, db: &F32| {
                let all = [cuda.read_tensor(dx), f32s_of(cuda, dw), f32s_of(cuda, db)];
                all.concat().iter().map(|v| if v.is_nan() { 0 } else { v.to_bits() }).collect()
            };
            let random = Random { step: 9, micro_step: 0, ..RANDOM };

            let (mut dy, mut y) = (tensor(cuda, &d, Precision::Bf16), pre());
            match form {
                Some(form) => cuda.gelu_backward(&mut dy, &y, rows * outputs, form),
                None => {
                    cuda.swiglu_backward(&mut y, &dy, rows, width);
                    dy = y;
                }
            }
            let mut backward = |dx: &mut Tensor,
                                dw: &mut F32,
                                db: &mut F32,
                                dy: OutputGradient<'_, Cuda>,
                                random: &Random| {
                let [dw, db] = [dw, db].map(|sums| Some(gradient(sums)));
                let (w, accumulate) = (w.param(alone(outputs * inputs)), false);
                let operands = LinearBackward {
                    dx,
                    dw,
                    db,
                    dy,
                    x: &x,
                    turned: None,
                    w,
                    mean: None,
                    accumulate,
                };
                cuda.linear_backward(&mut scratch, operands, shape, &recipe, random);
            };
            backward(&mut dx, &mut dw, &mut db, OutputGradient::Whole(&dy), &random);
            let expected: Vec<u32> = results(&dx, &dw, &db);
            assert_eq!(kind == "not finite", !f32s_of(cuda, &dw)[5 * inputs].is_finite(), "{what}");

            // Twice, the second time where no zeroed words are left; then as the third of three
            // steps, which is the second one recorded.
            let mut dy = tensor(cuda, &d, Precision::Bf16);
            for words_left in [true, false] {
                let (mut dy, mut y) = (tensor(cuda, &d, Precision::Bf16), pre());
                let of_both = |dy: &Tensor, y: &Tensor| {
                    [dy, y].map(|tensor| cuda.read_tensor(tensor)).concat()
                };
                let before = of_both(&dy, &y);
                while !words_left && dy.write().amax() != 0 {}
                let behind = behind(form, &mut dy, &mut y);
                backward(&mut dx, &mut dw, &mut db, behind, &random);
                assert!(results(&dx, &dw, &db) == expected, "{what}");
                if !recipe.dgrad().is_in(Format::MXFP4) {
                    continue;
                }
                let fused = form != Some(Activation::Gelu)
                    && carrier == Carrier::Fp8
                    && recipe.dgrad().transform().is_some_and(|t| t.group() == 64);
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&of_both(&dy, &y)) == bits(&before), fused, "{what}");
            }
            let mut recordings = cuda.recordings();
            let (copy, of_y, mut y) = (tensor(cuda, &d, Precision::Bf16), pre(), pre());
            for step in 7..10 {
                let plan = StepPlan {
                    accumulate: false,
                    weighted: false,
                    documents: false,
                    precision: Precision::Bf16,
                    layers: vec![[recipe; 4]],
                    kept: None,
                };
                cuda.recorded(&mut recordings, &plan, [step, 0], || {
                    // Each has an arena of its own here.
                    dy.begin_pass(&cuda.gpu);
                    y.begin_pass(&cuda.gpu);
                    for (to, from) in [(&dy, &copy), (&y, &of_y)] {
                        cuda.copy(from.address(), from.bytes(), to.address());
                    }
                    let behind = behind(form, &mut dy, &mut y);
                    backward(&mut dx, &mut dw, &mut db, behind, &Random { step, ..random });
                });
            }
            assert!(results(&dx, &dw, &db) == expected, "{what}, recorded");
        }
    }
}
