//! Linear layers in every recipe, against the definition of its numbers: operands as [`Quantized`]
//! has them, bit for bit, and the f64 product of those.

use super::*;
use crate::formats::{
    self, BLOCK, Bits, Element, Format, Gemm, GemmId, LinearRecipe, Operand, OperandId,
    OperandSource, PowerRule, Quantized, Restoration, Rounding, Source,
};
use crate::optim::Gradients::{Bf16 as InBf16, F32 as InF32};

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
const SWITCHED: [&str; 58] = [
    "mxfp4-rht,g=32",
    "mxfp4-rht-sr,g=128,sr=dy,wgrad=bf16",
    "mxfp4-rht-sr,g=256,signs=fixed",
    "mxfp4-sr,sr=other,dgrad=bf16",
    "fp8-mxfp4-rht-sr,dgrad=bf16",
    "mxfp4,range=3/4",
    "mxfp4-rht,range=3/4",
    "mxfp4-rht-sr,sr=dy,range=3/4",
    "bf16,mantissa=4",
    "bf16,mantissa=3t",
    "mxfp4-rht-sr,scale=even",
    "mxfp4-sr,sr=dy,scale=ceil,w=2d",
    "mxfp4-mxfp4,scale-fwd=quest,scale=quest-floor",
    "mxfp4-mxfp4-rht-sr,from=q,g=32",
    "tetrajet,from=x",
    "tetrajet,fwd=bf16",
    "tetrajet,rht=wgrad,dgrad=bf16",
    "nvfp4-sr,headroom=1,rht=bwd,g=16",
    "nvfp4-nvfp4,46=fwd,w=2d",
    "nvfp4-nvfp4-rht-sr,from=q,g=16,signs=fixed",
    "nvfp4-eden,g=256,dgrad=bf16",
    "tetrajet2,outer=f32",
    "fp8-mxfp4-rht-sr,from=q",
    "zhou-fp4,from=q",
    "quartet,scale-fwd=quest-floor,dgrad=bf16",
    "quartet,scale-fwd=ceil,wgrad=bf16",
    "quartet,from=x,signs=plain",
    "quartet,scale-fwd=floor,g=128",
    "quartet,fwd=bf16",
    "msra-fp4,dge=off,occ=off",
    "msra-fp4,dge=3,occ=0.97",
    "msra-fp4,from=x,wgrad=bf16",
    "msra-fp4,fwd=bf16,dgrad=bf16",
    "msra-fp4,fp8=fc1",
    "quartet,unbias=tensor",
    "mxfp4-rht,range=3/4,unbias=tensor",
    "mxfp4-rht,g=256,unbias=tensor,wgrad=bf16",
    "nvfp4-rht,unbias=tensor",
    "quartet,fp8=proj",
    "tetrajet,fp8=fc2",
    "mxfp4-rht-sr,fwd=fp8",
    "mxfp4-rht-sr,scale=ceil,from=q,fwd=fp8",
    "tetrajet,fwd=fp8",
    "quartet,fwd=fp8,wgrad=bf16",
    "quartet2,fwd=fp8",
    "bf16,fwd=fp8,dgrad=fp8",
    "mxfp4-rht-sr,dgrad=fp8",
    "mxfp4-mxfp4-rht-sr,from=q,wgrad=fp8",
    "tetrajet,from=x,dgrad=fp8,wgrad=fp8",
    "int8-switchback,wgrad=fp8",
    "quartet,dgrad=fp8",
    "quartet2,rht=all,wgrad=fp8",
    "mxfp4-mxfp4,rht=all",
    "tetrajet,rht=all",
    "mxfp4-mxfp4-sr,scale-fwd=quest,from=q,rht=all,g=128,signs=fixed",
    "nvfp4-nvfp4-sr,rht=all",
    "nvfp4-nvfp4,46=fwd,from=q,rht=all,dgrad=bf16",
    "tetrajet2,outer=f32,rht=all",
];

/// Recipes whose W is rounded by its slow mean, too.
const BY_MEAN: [&str; 6] = [
    "tetrajet",
    "mxfp4-mxfp4-rht-sr",
    "mxfp4-mxfp4,scale-fwd=quest,from=q",
    "nvfp4-nvfp4",
    "quartet2",
    "tetrajet2,outer=f32",
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
    let named = named.flat_map(|name| {
        linear_recipes(name).into_iter().map(move |recipe| (name.to_owned(), recipe))
    });
    let built = [[32, 256], [256, 32]];
    let by_mean = BY_MEAN.map(|name| (format!("{name} by means"), linear_recipe(name).by_mean()));
    named
        .chain(by_mean)
        .chain(built.map(|groups| (format!("groups of {groups:?}"), groups_of_their_own(groups))))
}

/// A layer on the host, x and dy as tensors of a precision hold them.
struct Layer {
    shape: LinearShape,
    precision: Precision,
    x: Vec<f32>,
    w: Vec<f32>,
    /// Not far from w.
    mean: Vec<f32>,
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
        let w = random(outputs * inputs, 2);
        let mean = w.iter().zip(random(w.len(), 8)).map(|(w, far)| w + 0.2 * far).collect();
        Self {
            shape: LinearShape { rows, inputs, outputs },
            precision,
            x: activations(rows * inputs, 1),
            w,
            mean,
            b: activations(outputs, 3),
            dy: activations(rows * outputs, 4),
        }
    }

    fn exact(&self, recipe: &LinearRecipe) -> Exact {
        let LinearShape { rows, inputs, outputs } = self.shape;
        let Self { x, w, b, dy, .. } = self;
        let source = |data, rows, depth, transposed| Source { data, rows, depth, transposed };
        let of_x = source(x, rows, inputs, false);
        let of_w = source(w, outputs, inputs, false);
        let gemm = recipe.forward();
        let transform = gemm.transform();
        let mut signs = [0.0; formats::MAX_GROUP];
        let signs = formats::fill_signs(&mut signs, transform, GemmId::Dgrad, &RANDOM);
        let [made_x, made_w] =
            [quantized(of_x, gemm.a(), signs, OperandId::X), self.forward_w(recipe, signs)];
        let mut y = product_of(gemm, &made_x, &made_w);
        y.iter_mut().enumerate().for_each(|(i, y)| *y += f64::from(b[i % outputs]));
        // A backward operand is made from the tensor, or from what the forward pass made of it.
        let seen = |of: Source<'_>, operand: &Operand, made: &Quantized| match operand.source() {
            OperandSource::HighPrecision => of.data.to_vec(),
            OperandSource::Forward => {
                made.dequantized(if transform.is_some() { made.depth } else { inputs })
            }
        };
        let (dgrad, wgrad) = (recipe.dgrad(), recipe.wgrad());
        let seen_w = seen(of_w, dgrad.b(), &made_w);
        let seen_x = seen(of_x, wgrad.b(), &made_x);
        let of_dy = (source(dy, rows, outputs, false), OperandId::Dy);
        let of_w = (source(&seen_w, seen_w.len() / outputs, outputs, true), OperandId::W);
        let dx = product(GemmId::Dgrad, dgrad, of_dy, of_w);
        let dx = restored(dx, recipe, GemmId::Dgrad, x, inputs);
        let of_dy = (source(dy, outputs, rows, true), OperandId::Dy);
        let of_x = (source(&seen_x, seen_x.len() / rows, rows, true), OperandId::X);
        let dw = product(GemmId::Wgrad, wgrad, of_dy, of_x);
        let dw = restored(dw, recipe, GemmId::Wgrad, w, inputs);
        let mut db = vec![0.0; outputs];
        dy.iter().enumerate().for_each(|(i, dy)| db[i % outputs] += f64::from(*dy));
        Exact { y, dx, dw, db }
    }

    fn rounds_by_mean(&self, recipe: &LinearRecipe) -> bool {
        recipe.forward().b().rounding() == Rounding::ByMean
    }

    /// W as the forward pass makes it.
    fn forward_w(&self, recipe: &LinearRecipe, signs: &[f32]) -> Quantized {
        let LinearShape { inputs, outputs, .. } = self.shape;
        let source = Source { data: &self.w, rows: outputs, depth: inputs, transposed: false };
        let operand = recipe.forward().b();
        match self.rounds_by_mean(recipe) {
            true => Quantized::by_means(source, &self.mean, operand, &bits_of(OperandId::W, false)),
            false => quantized(source, operand, signs, OperandId::W),
        }
    }

    /// Scratch memory for the recipe and this layer alone; None where the backend cannot do it.
    fn workspace<B: Harness>(&self, b: &B, recipe: &LinearRecipe) -> Option<B::Workspace> {
        let LinearShape { rows, inputs, .. } = self.shape;
        let (sequences, precision) = (Sequences { batch: 1, length: rows }, self.precision);
        let shape = WorkspaceShape {
            linears: &[self.shape],
            norm: NormShape { rows, channels: inputs, epsilon: 0.0, kind: NormKind::Layer },
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
            merge: None,
            packed: &[],
            adapters: &[],
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

/// An operand as its format defines it.
fn quantized(of: Source<'_>, operand: &Operand, signs: &[f32], id: OperandId) -> Quantized {
    Quantized::new(of, operand, signs, &bits_of(id, of.transposed))
}

fn bits_of(id: OperandId, transposed: bool) -> Bits {
    let [elements, scales] = [id, id.of_scales()].map(|id| RANDOM.rounding(id));
    Bits { elements, scales, transposed }
}

/// Slow means of a weight, behind others in a flat buffer.
struct Means<B: Memory>(Flat<B>);

impl<B: Harness> Means<B> {
    fn of(b: &B, means: &[f32]) -> Self {
        Self(Flat::of(b, &[&[9.0; 5], means]))
    }

    fn part(&self) -> Part<'_, B> {
        Part { flat: &self.0.buffer, slot: self.0.slots[1] }
    }
}

/// A GEMM as the formats of its operands define it.
fn product(
    id: GemmId,
    gemm: &Gemm,
    (a, a_id): (Source<'_>, OperandId),
    (b, b_id): (Source<'_>, OperandId),
) -> Vec<f64> {
    let mut signs = [0.0; formats::MAX_GROUP];
    let signs = formats::fill_signs(&mut signs, gemm.transform(), id, &RANDOM);
    let a = quantized(a, gemm.a(), signs, a_id);
    let b = quantized(b, gemm.b(), signs, b_id);
    product_of(gemm, &a, &b)
}

fn product_of(gemm: &Gemm, a: &Quantized, b: &Quantized) -> Vec<f64> {
    let mut out = reference::product(&a.dequantize(), &b.dequantize(), a.rows, b.rows, a.depth);
    let factor = [gemm.alpha(), a.correction, b.correction].map(f64::from);
    out.iter_mut().for_each(|v| *v *= factor.iter().product::<f64>());
    out
}

/// The gradient of `tensor` (rows, `columns`) from the result of a GEMM: the matrix of the transform
/// written out, behind numbers that its scale did not cut off.
fn restored(
    result: Vec<f64>,
    recipe: &LinearRecipe,
    id: GemmId,
    tensor: &[f32],
    columns: usize,
) -> Vec<f64> {
    let Some(restoration) = Restoration::of(recipe, id) else { return result };
    if let Some(steepness) = restoration.estimator() {
        let rows = result.chunks(columns).zip(tensor.chunks(columns));
        let slopes = rows.flat_map(|(result, w)| {
            let scale = formats::decode_e8m0(PowerRule::Ceil.byte(w));
            let slope = move |w: &f32| formats::dge_derivative(w / scale, steepness.into());
            result.iter().zip(w).map(move |(g, w)| g * f64::from(slope(w)))
        });
        return slopes.collect();
    }
    let depth = restoration.depth(columns);
    let mut gradient = Vec::new();
    for (result, x) in result.chunks(depth).zip(tensor.chunks(columns)) {
        let mut x = x.to_vec();
        x.resize(depth, 0.0);
        for (result, x) in result.chunks(BLOCK).zip(x.chunks_mut(BLOCK)) {
            formats::rotate(x, &[1.0; BLOCK]);
            let scale = restoration
                .clips()
                .map_or(f32::INFINITY, |rule| formats::decode_e8m0(rule.byte(x)));
            let passes = |j: usize| if x[j].abs() < 6.0 * scale { result[j] } else { 0.0 };
            gradient.extend((0..BLOCK).map(|i| {
                let sign =
                    |j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                (0..BLOCK).map(|j| sign(j) * passes(j)).sum::<f64>() / (BLOCK as f64).sqrt()
            }));
        }
    }
    gradient.chunks(depth).flat_map(|row| row[..columns].to_vec()).collect()
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
                let means = layer.rounds_by_mean(&recipe).then(|| Means::of(b, &layer.mean));
                let [x, dy] = [&layer.x, &layer.dy].map(|values| input(b, values, precision));
                let mut y = poison(b, rows * outputs, precision);
                let operands = LinearForward {
                    y: &mut y,
                    x: &x,
                    w: params.get(b, 0),
                    b: Some(params.get(b, 1)),
                    mean: means.as_ref().map(Means::part),
                    epilogue: Epilogue::None,
                    turned: None,
                };
                b.linear_forward(&mut scratch, operands, shape, &recipe);
                close(b, &what("y"), &read(b, &y), &exact.y, Of::Activation, precision);

                let of_dw = match recipe.wgrad().element() {
                    _ if recipe.wgrad().is_in(Format::MXFP4) => Of::Mxfp4Wgrad(shape),
                    Element::E4m3 | Element::E5m2 => Of::Fp8Wgrad(shape),
                    _ => Of::ParameterGradient,
                };
                let forms = [(true, InF32), (false, InF32), (false, InBf16)];
                let mut in_f32: Vec<Vec<f32>> = Vec::new();
                // What is made of a product and W needs both in f32, and so does a product of f32.
                let in_f32_alone = Restoration::of(&recipe, GemmId::Wgrad).is_some()
                    || precision == Precision::F32;
                for (accumulate, kept) in forms.into_iter().take(if in_f32_alone { 2 } else { 3 }) {
                    let before = [(outputs * inputs, 5), (outputs, 6)].map(|(len, seed)| {
                        if accumulate { random(len, seed) } else { vec![f32::NAN; len] }
                    });
                    let pieces: [&[f32]; 2] = [&before[0], &before[1]];
                    let mut flat = Gradients::kept_in(b, &pieces, kept);
                    let mut dx = poison(b, rows * inputs, precision);
                    let [dw, db] = flat.get(b);
                    let (of_y, w) = (OutputGradient::Whole(&dy), params.get(b, 0));
                    let mean = means.as_ref().map(Means::part);
                    let operands = LinearBackward {
                        dx: &mut dx,
                        dw,
                        db,
                        dy: of_y,
                        x: &x,
                        turned: None,
                        w,
                        mean,
                        accumulate,
                    };
                    b.linear_backward(&mut scratch, operands, shape, &recipe, &RANDOM);
                    close(b, &what("dx"), &read(b, &dx), &exact.dx, Of::Activation, precision);
                    for wanted in SOME_WANTED.into_iter().filter(|_| kept == InF32 && !accumulate) {
                        let mut some = Gradients::of(b, &pieces);
                        let mut dx_of_some = poison(b, rows * inputs, precision);
                        let [dw, db] = some.wanted(b, wanted);
                        let operands = LinearBackward {
                            dx: &mut dx_of_some,
                            dw,
                            db,
                            dy: OutputGradient::Whole(&dy),
                            x: &x,
                            turned: None,
                            w: params.get(b, 0),
                            mean: means.as_ref().map(Means::part),
                            accumulate,
                        };
                        b.linear_backward(&mut scratch, operands, shape, &recipe, &RANDOM);
                        let some = some.read(b);
                        let mut all = flat.read(b);
                        if wanted == [false, true] {
                            // The sum of a bias is another one where no product reads dy besides.
                            let [of_b, some] = [&all[1], &some[1]];
                            let of_b = f64s(of_b);
                            close(b, &what("db"), some, &of_b, Of::ParameterGradient, precision);
                            all[1] = some.clone();
                        }
                        let dx = [read(b, &dx), read(b, &dx_of_some)];
                        let what = format!("{}: {}", b.name(), what("gradients"));
                        are_as_wanted(&what, wanted, [&before, &all, &some], [&dx[0], &dx[1]]);
                    }
                    if kept == InBf16 {
                        let [dw, db]: [Vec<f32>; 2] = flat.read(b).try_into().unwrap();
                        assert!(bits(&db) == bits(&in_f32[1]), "{}: {}", b.name(), what("db"));
                        is_rounded(b, &what("dw"), &dw, &in_f32[0]);
                        continue;
                    }
                    in_f32 = flat.read(b);
                    let gradients = in_f32.iter().zip(&before);
                    let expected =
                        [("dw", &exact.dw, of_dw), ("db", &exact.db, Of::ParameterGradient)];
                    for ((ours, before), (name, exact, of)) in gradients.zip(expected) {
                        let before = before.iter().map(|v| f64::from(*v));
                        let sums = exact.iter().zip(before).map(|(exact, before)| {
                            if accumulate { exact + before } else { *exact }
                        });
                        let sums: Vec<f64> = sums.collect();
                        close(b, &what(name), ours, &sums, of, precision);
                    }
                }
            });
        }
    }
}

/// Fails unless a gradient in bf16 is what it is in f32 but for rounding; of a device that keeps f32
/// it is the same. Sums may have been made in another order.
#[track_caller]
fn is_rounded<B: Harness>(b: &B, what: &str, ours: &[f32], in_f32: &[f32]) {
    let largest = in_f32.iter().fold(0.0, |largest: f32, v| largest.max(v.abs()));
    for (ours, exact) in ours.iter().zip(in_f32) {
        let bound = if B::HAS_COPIES { exact.abs() / 256.0 + 1e-5 * largest } else { 0.0 };
        assert!((ours - exact).abs() <= bound, "{}: {what}: {ours} for {exact}", b.name());
        assert!(half::bf16::from_f32(*ours).to_f32() == *ours || !B::HAS_COPIES, "{what}: {ours}");
    }
}

/// GELU behind a layer and its derivative before the layer's gradients: the same bits as of the
/// operations one after the other, which recomputing needs.
pub(super) fn linear_layers_with_gelu<B: Harness>(backends: &[B]) {
    for size @ [rows, inputs, outputs] in [[77, 96, 33], [128, 64, 96]] {
        for (name, recipe, form) in Recipe::NAMES
            .into_iter()
            .flat_map(|name| linear_recipes(name).into_iter().map(move |recipe| (name, recipe)))
            .flat_map(|(name, recipe)| {
                [Activation::GeluTanh, Activation::Gelu].map(|form| (name, recipe, form))
            })
        {
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
                        b: Some(params.get(b, 1)),
                        mean: None,
                        epilogue,
                        turned: None,
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
                    let mut flat = Gradients::of(b, &[&lens[0], &lens[1]]);
                    let mut dx = poison(b, rows * inputs, precision);
                    let ([dw, db], w) = (flat.get(b), params.get(b, 0));
                    let (accumulate, mean) = (false, None);
                    let operands = LinearBackward {
                        dx: &mut dx,
                        dw,
                        db,
                        dy,
                        x: &x,
                        turned: None,
                        w,
                        mean,
                        accumulate,
                    };
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

/// What a forward pass turns is, to the bit, what the backward pass would make of W and of x, which
/// it then does not read.
pub(super) fn operands_turned_ahead<B: Harness>(backends: &[B]) {
    let recipe = linear_recipe("fp8");
    for size @ [rows, inputs, outputs] in SIZES {
        let layer = Layer::new::<B>(size, &recipe);
        let (shape, precision) = (layer.shape, layer.precision);
        each(backends, |b| {
            if !b.turns(shape, &recipe) {
                return;
            }
            let mut scratch = layer.workspace(b, &recipe).expect("what turns multiplies");
            let params = Params::of(b, &[&layer.w, &layer.b]);
            let [x, dy] = [&layer.x, &layer.dy].map(|values| input(b, values, precision));
            let unread = dense(b, &vec![f32::NAN; rows * inputs], precision);
            let mut results = |turned: Option<B::Turned>| {
                let mut turned = turned;
                let [mut y, mut dx] =
                    [outputs, inputs].map(|width| poison(b, rows * width, precision));
                let operands = LinearForward {
                    y: &mut y,
                    x: &x,
                    w: params.get(b, 0),
                    b: Some(params.get(b, 1)),
                    mean: None,
                    epilogue: Epilogue::None,
                    turned: turned.as_mut(),
                };
                b.linear_forward(&mut scratch, operands, shape, &recipe);
                let lens = [outputs * inputs, outputs].map(|len| vec![f32::NAN; len]);
                let mut flat = Gradients::of(b, &[&lens[0], &lens[1]]);
                let ([dw, db], turned) = (flat.get(b), turned.as_ref());
                let operands = LinearBackward {
                    dx: &mut dx,
                    dw,
                    db,
                    dy: OutputGradient::Whole(&dy),
                    x: if turned.is_some() { &unread } else { &x },
                    turned,
                    w: params.get(b, 0),
                    mean: None,
                    accumulate: false,
                };
                b.linear_backward(&mut scratch, operands, shape, &recipe, &RANDOM);
                let all = [vec![read(b, &y), read(b, &dx)], flat.read(b)].concat();
                all.iter().map(|values| bits(values)).collect::<Vec<_>>()
            };
            let ahead = results(Some(cut(b, |arena| b.turned(arena, shape))));
            assert!(ahead == results(None), "{}: {size:?}", b.name());
            assert!(!ahead.iter().flatten().any(|bits| f32::from_bits(*bits).is_nan()));
        });
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
            let [x, dy] = [&layer.x, &layer.dy].map(|values| input(b, values, precision));
            let mut flat = Gradients::of(b, &[&vec![0.0; outputs * inputs], &vec![0.0; outputs]]);
            let mut dx = output(b, &vec![0.0; rows * inputs], precision);
            let ([dw, db], w) = (flat.get(b), params.get(b, 0));
            let dy = OutputGradient::Whole(&dy);
            let (accumulate, mean) = (true, None);
            let operands = LinearBackward {
                dx: &mut dx,
                dw,
                db,
                dy,
                x: &x,
                turned: None,
                w,
                mean,
                accumulate,
            };
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

pub(super) fn swiglu<B: Harness>(backends: &[B]) {
    for [rows, m] in [[1, 1], [7, 33], [20, 256], [33, 1000], [5, 4104]] {
        for precision in precisions::<B>() {
            let [y, d] = [(2 * rows * m, 1), (rows * m, 2)]
                .map(|(len, seed)| rounded(&random(len, seed), precision));
            let [y64, d64] = [&y, &d].map(|values| f64s(values));
            let exact = reference::swiglu_forward(&y64, m);
            let exact_dy = reference::swiglu_backward(&y64, &d64, m);
            each(backends, |b| {
                let what = format!("({rows}, {m})");
                let of_y = input(b, &y, precision);
                let mut out = poison(b, rows * m, precision);
                b.swiglu_forward(&mut out, &of_y, rows, m);
                close(b, &what, &read(b, &out), &exact, Of::Activation, precision);
                let (mut dy, d) = (output(b, &y, precision), input(b, &d, precision));
                b.swiglu_backward(&mut dy, &d, rows, m);
                let what = format!("gradient of {what}");
                close(b, &what, &read(b, &dy), &exact_dy, Of::Activation, precision);
            });
        }
    }
}

/// A layer without a bias whose result passes through SwiGLU gives, to the bit, what the two by
/// themselves do.
pub(super) fn layers_with_swiglu<B: Harness>(backends: &[B]) {
    for recipe in ["fp32", "bf16", "fp8", "mxfp4-rht-sr", "fp8-mxfp4-rht-sr"].map(linear_recipe) {
        for size @ [rows, inputs, outputs] in [[33, 40, 48], [64, 64, 128], [128, 256, 256]] {
            let layer = Layer::new::<B>(size, &recipe);
            let (shape, precision, m) = (layer.shape, layer.precision, outputs / 2);
            each(backends, |b| {
                let what = format!("{}: {size:?}", b.name());
                let Some(mut scratch) = layer.workspace(b, &recipe) else { return };
                let params = Params::of(b, &[&layer.w]);
                let x = input(b, &layer.x, precision);
                let mut forward = |epilogue| {
                    let mut y = poison(b, rows * outputs, precision);
                    let operands = LinearForward {
                        y: &mut y,
                        x: &x,
                        w: params.get(b, 0),
                        b: None,
                        mean: None,
                        epilogue,
                        turned: None,
                    };
                    b.linear_forward(&mut scratch, operands, shape, &recipe);
                    y
                };
                let y = forward(Epilogue::None);
                let mut apart = poison(b, rows * m, precision);
                b.swiglu_forward(&mut apart, &y, rows, m);
                let mut out = poison(b, rows * m, precision);
                let again = forward(Epilogue::SwiGlu { out: &mut out });
                assert!(bits(&read(b, &again)) == bits(&read(b, &y)), "{what}: y");
                assert!(bits(&read(b, &out)) == bits(&read(b, &apart)), "{what}: swiglu(y)");

                let pre = random(rows * outputs, 7);
                let d = dense(b, &layer.dy[..rows * m], precision);
                let mut backward = |dy| {
                    let mut flat = Gradients::of(b, &[&vec![f32::NAN; outputs * inputs]]);
                    let mut dx = poison(b, rows * inputs, precision);
                    let [dw] = flat.get(b);
                    let operands = LinearBackward {
                        dx: &mut dx,
                        dw,
                        db: None,
                        dy,
                        x: &x,
                        turned: None,
                        w: params.get(b, 0),
                        mean: None,
                        accumulate: false,
                    };
                    b.linear_backward(&mut scratch, operands, shape, &recipe, &RANDOM);
                    let all = [vec![read(b, &dx)], flat.read(b)].concat();
                    assert!(!all.iter().flatten().any(|v| v.is_nan()), "{what}: gradients");
                    all.iter().map(|v| bits(v)).collect::<Vec<_>>()
                };
                let mut dy = dense(b, &pre, precision);
                b.swiglu_backward(&mut dy, &d, rows, m);
                let apart = backward(OutputGradient::Whole(&dy));
                let mut y = dense(b, &pre, precision);
                let behind = backward(OutputGradient::BehindSwiGlu { d: &d, y: &mut y });
                assert!(behind == apart, "{what}: gradients");
            });
        }
    }
}
