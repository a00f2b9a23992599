//! Linear layers in every recipe, against the definition of its numbers: operands as
//! [`Mxfp4Matrix`] and E4M3 have them, bit for bit, and the f64 product of those.
//!
//! NOTE: inputs have nothing behind them here. A device may look for the largest magnitude of a
//! whole tensor that no operation of its own has written.

use super::*;
use crate::formats::{
    self, Element, Format, Gemm, GemmId, LinearRecipe, Mxfp4Matrix, Operand, OperandId,
    OperandSource, Rounding, Source,
};

/// Rows, inputs and outputs: some that nothing divides, then those that tensor cores take whole.
const SIZES: [[usize; 3]; 7] = [
    [1, 8, 16],
    [70, 40, 120],
    [130, 40, 72],
    [77, 96, 33],
    [64, 128, 96],
    [144, 48, 80],
    [320, 144, 208],
];

/// Recipes that switches make, of what no name alone is.
const SWITCHED: [&str; 8] = [
    "mxfp4-rht,g=32",
    "mxfp4-rht-sr,g=128,sr=dy,wgrad=bf16",
    "mxfp4-rht-sr,g=256,signs=fixed",
    "mxfp4-sr,sr=other,dgrad=bf16",
    "fp8-mxfp4-rht-sr,dgrad=bf16",
    "mxfp4,range=3/4",
    "mxfp4-rht,range=3/4",
    "mxfp4-rht-sr,sr=dy,range=3/4",
];

/// A recipe whose backward GEMMs have groups of their own.
fn groups_of_their_own([dgrad, wgrad]: [usize; 2]) -> LinearRecipe {
    let gemm = |group| {
        let transform = formats::Transform::new(group, formats::Signs::Random).unwrap();
        Gemm::of(Operand::mxfp4(Rounding::Unbiased, Some(transform)))
    };
    LinearRecipe::new(Gemm::BF16, gemm(dgrad), gemm(wgrad)).unwrap()
}

/// All of them, with their names.
fn recipes() -> impl Iterator<Item = (String, LinearRecipe)> {
    let named = Recipe::NAMES.into_iter().chain(SWITCHED);
    let named = named.map(|name| (name.to_owned(), linear_recipe(name)));
    let built = [[32, 256], [256, 32]];
    named.chain(built.map(|groups| (format!("groups of {groups:?}"), groups_of_their_own(groups))))
}

/// A layer on the host, x and dy as tensors of a precision hold them.
struct Layer {
    shape: LinearShape,
    precision: Precision,
    x: Vec<f32>,
    w: Vec<f32>,
    b: Vec<f32>,
    dy: Vec<f32>,
}

/// What its two passes make.
struct Exact {
    y: Vec<f64>,
    dx: Vec<f64>,
    dw: Vec<f64>,
    db: Vec<f64>,
}

impl Layer {
    fn new<B: Harness>([rows, inputs, outputs]: [usize; 3], recipe: &LinearRecipe) -> Self {
        let precision = Precision::of(recipe.forward());
        let activations = |len, seed| rounded(&random(len, seed), B::held(precision));
        Self {
            shape: LinearShape { rows, inputs, outputs },
            precision,
            x: activations(rows * inputs, 1),
            w: random(outputs * inputs, 2),
            b: activations(outputs, 3),
            dy: activations(rows * outputs, 4),
        }
    }

    fn exact(&self, recipe: &LinearRecipe) -> Exact {
        let LinearShape { rows, inputs, outputs } = self.shape;
        let Self { x, w, b, dy, .. } = self;
        let forward = |values: &[f32]| match recipe.forward().format().element() {
            Element::F32 => values.to_vec(),
            Element::Bf16 => rounded(values, Precision::Bf16),
            Element::E4m3 => as_fp8(values),
            Element::E2m1 => unreachable!("no forward pass is in MXFP4"),
        };
        let y =
            reference::linear_forward(&f64s(&forward(x)), &f64s(&forward(w)), &f64s(b), self.shape);
        let source = |data, rows, depth, transposed| Source { data, rows, depth, transposed };
        let of_w = (source(w, inputs, outputs, true), OperandId::W);
        let dx = product(GemmId::Dgrad, recipe.dgrad(), source(dy, rows, outputs, false), of_w);
        // What the forward pass kept of x.
        let is_kept = recipe.wgrad().b().source() == OperandSource::Forward;
        let kept = if is_kept { as_fp8(x) } else { x.clone() };
        let of_x = (source(&kept, inputs, rows, true), OperandId::X);
        let dw = product(GemmId::Wgrad, recipe.wgrad(), source(dy, outputs, rows, true), of_x);
        let mut db = vec![0.0; outputs];
        dy.iter().enumerate().for_each(|(i, dy)| db[i % outputs] += f64::from(*dy));
        Exact { y, dx, dw, db }
    }

    /// Scratch memory for the recipe and this layer alone; None where the backend cannot do it.
    fn workspace<B: Harness>(&self, b: &B, recipe: &LinearRecipe) -> Option<B::Workspace> {
        let LinearShape { rows, inputs, .. } = self.shape;
        let (sequences, precision) = (Sequences { batch: 1, length: rows }, self.precision);
        let shape = WorkspaceShape {
            linears: &[self.shape],
            norm: NormShape { rows, channels: inputs, epsilon: 0.0 },
            attention: AttentionShape {
                sequences,
                heads: 1,
                kv_heads: 1,
                head_size: 8,
                score_factor: 1.0,
                precision,
            },
            head: HeadShape { rows, channels: 8, vocab_size: 8, precision },
            recipes: &[*recipe],
            backward: true,
        };
        match b.supports(&shape) {
            Ok(()) => Some(cut(b, |arena| b.workspace(arena, &shape))),
            Err(error) => {
                println!("{}: passed over, {error}", b.name());
                None
            }
        }
    }
}

/// Values in E4M3 with one scale.
fn as_fp8(values: &[f32]) -> Vec<f32> {
    let scale = formats::e4m3_scale(values.iter().fold(0.0, |amax: f32, v| amax.max(v.abs())));
    values.iter().map(|v| formats::round_to_e4m3(v / scale) * scale).collect()
}

/// A backward GEMM as its formats define it, of dy and another operand.
fn product(
    id: GemmId,
    gemm: &Gemm,
    dy: Source<'_>,
    (other, other_id): (Source<'_>, OperandId),
) -> Vec<f64> {
    if gemm.format() != Format::MXFP4 {
        let f32 = gemm.format() == Format::F32;
        let precision = if f32 { Precision::F32 } else { Precision::Bf16 };
        let [a, b] = [dy, other].map(|operand| {
            let at = |i| operand.at(i / operand.depth, i % operand.depth);
            let values: Vec<f32> = (0..operand.rows * operand.depth).map(at).collect();
            f64s(&rounded(&values, precision))
        });
        return reference::product(&a, &b, dy.rows, other.rows, dy.depth);
    }
    let mut signs = [0.0; formats::MAX_GROUP];
    let signs = formats::fill_signs(&mut signs, gemm.transform(), id, &RANDOM);
    let quantized = |source, operand: &Operand, id| {
        Mxfp4Matrix::quantize(source, signs, *operand, &RANDOM.rounding(id))
    };
    let a = quantized(dy, gemm.a(), OperandId::Dy);
    let b = quantized(other, gemm.b(), other_id);
    let [of_a, of_b] = [&a, &b].map(|matrix| f64s(&matrix.dequantize()));
    let mut out = reference::product(&of_a, &of_b, a.rows, b.rows, a.depth);
    out.iter_mut().for_each(|v| *v *= f64::from(gemm.alpha()));
    out
}

pub(in crate::backend) fn linear_layers_follow_their_recipes<B: Harness>(backends: &[B]) {
    for size @ [rows, inputs, outputs] in SIZES {
        if rows > B::LONGEST {
            continue;
        }
        for (name, recipe) in recipes() {
            let layer = Layer::new::<B>(size, &recipe);
            let (shape, precision) = (layer.shape, layer.precision);
            let exact = layer.exact(&recipe);
            each(backends, |b| {
                let what = |what: &str| format!("{what} of {size:?} by {name}");
                let Some(mut scratch) = layer.workspace(b, &recipe) else { return };
                let params = Params::of(b, &[&layer.w, &layer.b]);
                let [x, dy] = [&layer.x, &layer.dy].map(|values| dense(b, values, precision));
                let mut y = poison(b, rows * outputs, precision);
                let operands = LinearForward {
                    y: &mut y,
                    x: &x,
                    w: params.get(b, 0),
                    b: params.get(b, 1),
                    epilogue: Epilogue::None,
                };
                b.linear_forward(&mut scratch, operands, shape, &recipe);
                close(b, &what("y"), &read(b, &y), &exact.y, Of::Activation, precision);

                let in_mxfp4 = recipe.wgrad().format() == Format::MXFP4;
                let of_dw = if in_mxfp4 { Of::Mxfp4Wgrad(shape) } else { Of::ParameterGradient };
                for accumulate in [true, false] {
                    let before = [(outputs * inputs, 5), (outputs, 6)].map(|(len, seed)| {
                        if accumulate { random(len, seed) } else { vec![f32::NAN; len] }
                    });
                    let mut flat = Flat::of(b, &[&before[0], &before[1]]);
                    let mut dx = poison(b, rows * inputs, precision);
                    let [dw, db] = flat.gradients(b);
                    let (dy, w) = (OutputGradient::Whole(&dy), params.get(b, 0));
                    let operands = LinearBackward { dx: &mut dx, dw, db, dy, x: &x, w, accumulate };
                    b.linear_backward(&mut scratch, operands, shape, &recipe, &RANDOM);
                    close(b, &what("dx"), &read(b, &dx), &exact.dx, Of::Activation, precision);
                    let gradients = flat.read(b).into_iter().zip(&before);
                    let expected =
                        [("dw", &exact.dw, of_dw), ("db", &exact.db, Of::ParameterGradient)];
                    for ((ours, before), (name, exact, of)) in gradients.zip(expected) {
                        let before = before.iter().map(|v| f64::from(*v));
                        let sums = exact.iter().zip(before).map(|(exact, before)| {
                            if accumulate { exact + before } else { *exact }
                        });
                        let sums: Vec<f64> = sums.collect();
                        close(b, &what(name), &ours, &sums, of, precision);
                    }
                }
            });
        }
    }
}

/// GELU behind a layer and its derivative before the layer's gradients: the same bits as of the
/// operations one after the other, which recomputing needs.
pub(super) fn linear_layers_with_gelu<B: Harness>(backends: &[B]) {
    for size @ [rows, inputs, outputs] in [[77, 96, 33], [128, 64, 96]] {
        for (name, form) in Recipe::NAMES
            .into_iter()
            .flat_map(|name| [Activation::GeluTanh, Activation::Gelu].map(|form| (name, form)))
        {
            let recipe = linear_recipe(name);
            let layer = Layer::new::<B>(size, &recipe);
            let (shape, precision) = (layer.shape, layer.precision);
            let len = rows * outputs;
            each(backends, |b| {
                let what = format!("{}: {size:?} by {name}, {form}", b.name());
                let Some(mut scratch) = layer.workspace(b, &recipe) else { return };
                let params = Params::of(b, &[&layer.w, &layer.b]);
                let x = dense(b, &layer.x, precision);
                let mut forward = |epilogue| {
                    let mut y = poison(b, len, precision);
                    let operands = LinearForward {
                        y: &mut y,
                        x: &x,
                        w: params.get(b, 0),
                        b: params.get(b, 1),
                        epilogue,
                    };
                    b.linear_forward(&mut scratch, operands, shape, &recipe);
                    y
                };
                let y = forward(Epilogue::None);
                let mut apart = poison(b, len, precision);
                b.gelu_forward(&mut apart, &y, len, form);
                let mut out = poison(b, len, precision);
                let again = forward(Epilogue::Gelu { out: &mut out, form });
                assert!(bits(&read(b, &again)) == bits(&read(b, &y)), "{what}: y");
                assert!(bits(&read(b, &out)) == bits(&read(b, &apart)), "{what}: gelu(y)");

                let pre = dense(b, &random(len, 7), precision);
                let mut backward = |dy| {
                    let lens = [outputs * inputs, outputs].map(|len| vec![f32::NAN; len]);
                    let mut flat = Flat::of(b, &[&lens[0], &lens[1]]);
                    let mut dx = poison(b, rows * inputs, precision);
                    let ([dw, db], w) = (flat.gradients(b), params.get(b, 0));
                    let operands =
                        LinearBackward { dx: &mut dx, dw, db, dy, x: &x, w, accumulate: false };
                    b.linear_backward(&mut scratch, operands, shape, &recipe, &RANDOM);
                    [vec![read(b, &dx)], flat.read(b)]
                        .concat()
                        .iter()
                        .map(|v| bits(v))
                        .collect::<Vec<_>>()
                };
                let mut dy = dense(b, &layer.dy, precision);
                b.gelu_backward(&mut dy, &pre, len, form);
                let apart = backward(OutputGradient::Whole(&dy));
                let mut d = dense(b, &layer.dy, precision);
                let behind = backward(OutputGradient::BehindGelu { d: &mut d, y: &pre, form });
                assert!(behind == apart, "{what}: gradients");
            });
        }
    }
}

/// NaN in dy reaches every product that it enters. Where nothing asks for one scale a tensor, it
/// reaches no other.
pub(super) fn nan_poisons_the_products_that_it_enters<B: Harness>(backends: &[B]) {
    for rows in [40, 64] {
        let recipe = linear_recipe("mxfp4-rht-sr");
        let (inputs, outputs) = (32, 64);
        let mut layer = Layer::new::<B>([rows, inputs, outputs], &recipe);
        layer.dy[5 * outputs + 10] = f32::NAN;
        let (shape, precision) = (layer.shape, layer.precision);
        each(backends, |b| {
            let Some(mut scratch) = layer.workspace(b, &recipe) else { return };
            let params = Params::of(b, &[&layer.w]);
            let [x, dy] = [&layer.x, &layer.dy].map(|values| dense(b, values, precision));
            let mut flat = Flat::of(b, &[&vec![0.0; outputs * inputs], &vec![0.0; outputs]]);
            let mut dx = output(b, &vec![0.0; rows * inputs], precision);
            let ([dw, db], w) = (flat.gradients(b), params.get(b, 0));
            let dy = OutputGradient::Whole(&dy);
            let operands = LinearBackward { dx: &mut dx, dw, db, dy, x: &x, w, accumulate: true };
            b.linear_backward(&mut scratch, operands, shape, &recipe, &RANDOM);
            // NOTE: FP8 tensor cores, which have such a scale, take sizes that 16 divides.
            let alone = !rows.is_multiple_of(16);
            let check = |what: &str, values: &[f32], poisoned: usize| {
                for (row, values) in values.chunks(inputs).enumerate() {
                    let nan = values.iter().filter(|v| v.is_nan()).count();
                    let what = format!("{}: {nan} NaN in row {row} of {what}", b.name());
                    assert!(row != poisoned || nan == inputs, "{what}");
                    assert!(row == poisoned || nan == 0 || !alone, "{what}");
                }
            };
            check("dx", &read(b, &dx), 5);
            check("dw", &flat.read(b)[0], 10);
        });
    }
}

pub(super) fn gelu<B: Harness>(backends: &[B]) {
    for len in [1, 231, 4096, 100_003] {
        for form in [Activation::GeluTanh, Activation::Gelu] {
            for precision in precisions::<B>() {
                let [x, d] = [1, 2].map(|seed| rounded(&random(len, seed), precision));
                let [x64, d64] = [&x, &d].map(|values| f64s(values));
                let exact: Vec<f64> = x64.iter().map(|x| reference::gelu_of(form, *x)).collect();
                let slope = |(x, d): (&f64, &f64)| d * reference::gelu_derivative_of(form, *x);
                let exact_d: Vec<f64> = x64.iter().zip(&d64).map(slope).collect();
                each(backends, |b| {
                    let x = input(b, &x, precision);
                    let mut out = poison(b, len, precision);
                    b.gelu_forward(&mut out, &x, len, form);
                    let what = format!("{len} of {form}");
                    close(b, &what, &read(b, &out), &exact, Of::Activation, precision);
                    let mut d = output(b, &d, precision);
                    b.gelu_backward(&mut d, &x, len, form);
                    let what = format!("gradient of {what}");
                    close(b, &what, &read(b, &d), &exact_d, Of::Activation, precision);
                });
            }
        }
    }
}
