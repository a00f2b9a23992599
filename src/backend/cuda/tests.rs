//! Every operation against its scalar twin, in both precisions, at sizes that nothing divides. Without
//! a GPU every test says so and passes.

use std::sync::LazyLock;

use super::adamw::Reduction;
use super::gemm::Type;
use super::*;
use crate::backend::test_calls::{self, alone};
use crate::backend::{
    Activation, ClassifierGradient, Device, Largest, Optimize, OptimizerStep, Sequences, StepPlan,
    Trained, reference,
};
use crate::mx::{
    self, BLOCK, Draw, GemmId, Mxfp4Matrix, OperandId, OperandSource, Purpose, Rounding, Source,
    uniform,
};
use crate::recipe::Recipe;
use crate::{Dataset, Engine, Model, ModelConfig, Schedule, Trainer, TrainerOptions};

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// The GPU, or None after a line that says why there is none.
pub(super) fn gpu() -> Option<Cuda> {
    open().map(|gpu| Cuda::of(gpu).unwrap())
}

/// The GPU, before anything else has it.
pub(super) fn open() -> Option<Gpu> {
    match Gpu::open(0, None, &|_| ()) {
        Ok(gpu) => Some(gpu),
        Err(error @ Error::Unsupported { .. }) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Runs `f` on the GPU in both precisions.
fn each_precision(f: impl Fn(&Cuda, Precision)) {
    let Some(cuda) = gpu() else { return };
    for precision in PRECISIONS {
        cuda.gpu.scope(|| f(&cuda, precision));
        cuda.gpu.synchronize().unwrap();
    }
}

/// Relative error that rounding a result to the precision may leave, with some room for sums.
fn bound(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 2e-6,
        Precision::Bf16 => 3e-3,
    }
}

/// Values of a normal-like distribution with some outliers.
pub(super) fn random(len: usize, seed: u64) -> Vec<f32> {
    let draw = Draw::of(seed, Purpose::Weights, 79, 0);
    let value = |i: usize| {
        let [a, b, c, d] = draw.bits(i as u32, 0);
        let value = (uniform(a, b) + uniform(c, d) + uniform(b, c) - 1.5) * 2.0;
        (if a % 97 == 0 { 9.0 * value } else { value }) as f32
    };
    (0..len).map(value).collect()
}

fn tokens(cuda: &Cuda, values: &[u32]) -> Tokens {
    let mut measuring = Arena::measuring(&cuda.gpu);
    Tokens::new(&mut measuring, values.len()).unwrap();
    let mut arena = Arena::allocated(&cuda.gpu, measuring.used()).unwrap();
    let mut tokens = Tokens::new(&mut arena, values.len()).unwrap();
    tokens.write(values);
    tokens
}

fn some_tokens(len: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let draw = Draw::of(seed, Purpose::Order, 80, 0);
    (0..len).map(|i| draw.bits(i as u32, 0)[0] % vocab as u32).collect()
}

/// Normal values.
fn normal(len: usize, std: f32, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; len];
    crate::mx::fill_normal(&mut values, std, &Draw::of(seed, Purpose::Weights, 81, 0), 0);
    values
}

/// `values` as the precision holds them.
pub(super) fn rounded(values: &[f32], precision: Precision) -> Vec<f32> {
    match precision {
        Precision::F32 => values.to_vec(),
        Precision::Bf16 => values.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect(),
    }
}

pub(super) fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

pub(super) fn tensor(cuda: &Cuda, values: &[f32], precision: Precision) -> Tensor {
    let mut measuring = Arena::measuring(&cuda.gpu);
    measuring.tensor(values.len(), precision);
    let mut arena = Arena::allocated(&cuda.gpu, measuring.used()).unwrap();
    let tensor = arena.tensor(values.len(), precision);
    let bytes: Vec<u8> = match precision {
        Precision::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Precision::Bf16 => {
            values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
        }
    };
    write_bytes(cuda, tensor.address(), &bytes);
    tensor
}

/// A tensor of NaN, to be overwritten.
fn poison(cuda: &Cuda, len: usize, precision: Precision) -> Tensor {
    tensor(cuda, &vec![f32::NAN; len], precision)
}

pub(super) fn f32_buffer(cuda: &Cuda, values: &[f32]) -> F32 {
    let mut arena = Arena::allocated(&cuda.gpu, values.len() * 4 + 256).unwrap();
    let mut buffer = arena.f32(values.len());
    cuda.write_f32(&mut buffer, 0, values).unwrap();
    buffer
}

fn param(cuda: &Cuda, values: &[f32]) -> Weights {
    let mut arena = Arena::allocated(&cuda.gpu, values.len() * 6 + 1024).unwrap();
    let mut param = arena.weights(values.len(), 1);
    cuda.write_param(&mut param, alone(values.len()), values).unwrap();
    param
}

pub(super) fn write_bytes(cuda: &Cuda, to: u64, bytes: &[u8]) {
    // SAFETY: the callers' buffers have this many bytes.
    let result = unsafe {
        sys::cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), bytes.len(), cuda.gpu.stream())
    };
    cuda.gpu.note("writing", result);
    cuda.gpu.synchronize().unwrap();
}

pub(super) fn read_bytes(cuda: &Cuda, from: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; len];
    // SAFETY: the callers' buffers have this many bytes.
    let result = unsafe {
        sys::cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), from, len, cuda.gpu.stream())
    };
    cuda.gpu.note("reading", result);
    cuda.gpu.synchronize().unwrap();
    bytes
}

fn values_of(cuda: &Cuda, tensor: &Tensor) -> Vec<f32> {
    let bytes = read_bytes(cuda, tensor.address(), tensor.bytes());
    match tensor.precision {
        Precision::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Precision::Bf16 => {
            let numbers = bytes.as_chunks::<2>().0.iter();
            numbers.map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
        }
    }
}

pub(super) fn f32s_of(cuda: &Cuda, buffer: &F32) -> Vec<f32> {
    let mut values = vec![0.0; buffer.len];
    cuda.read_f32(buffer, 0, &mut values).unwrap();
    values
}

pub(super) fn workspace(cuda: &Cuda, shape: &WorkspaceShape) -> Workspace {
    let mut measuring = Arena::measuring(&cuda.gpu);
    Workspace::new(&mut measuring, shape);
    Workspace::new(&mut Arena::allocated(&cuda.gpu, measuring.used()).unwrap(), shape)
}

/// Those that take the most memory, two with activations in f32 and one with bf16.
static RECIPES: LazyLock<[LinearRecipe; 3]> =
    LazyLock::new(|| ["fp32", "mxfp4-rht,g=256", "fp8-mxfp4-rht-sr,g=256"].map(linear_recipe));

fn linear_recipe(recipe: &str) -> LinearRecipe {
    *recipe.parse::<Recipe>().unwrap().linear()
}

pub(super) fn workspace_shape(
    sequences: Sequences,
    channels: usize,
    heads: usize,
    vocab_size: usize,
    precision: Precision,
) -> WorkspaceShape<'static> {
    let recipes = if precision == Precision::F32 { &RECIPES[..2] } else { &RECIPES[2..] };
    test_calls::workspace_shape(sequences, channels, heads, vocab_size, precision, recipes)
}

/// |a - b| / |b|, Frobenius.
fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
    (difference / b.iter().map(|v| v * v).sum::<f64>().max(1e-300)).sqrt()
}

#[track_caller]
pub(super) fn close(what: &str, ours: &[f32], exact: &[f64], bound: f64) {
    let error = relative_error(&f64s(ours), exact);
    assert!(error <= bound, "{what}: relative error {error:e} above {bound:e}");
}

fn plus_one(values: Vec<f64>) -> Vec<f64> {
    values.into_iter().map(|v| v + 1.0).collect()
}

#[test]
fn embedding() {
    each_precision(|cuda, precision| {
        for (batch, length, c, vocab) in [(1, 1, 1, 2), (3, 17, 40, 11), (2, 100, 33, 500)] {
            let sequences = Sequences { batch, length };
            let rows = sequences.rows();
            let ids = some_tokens(rows, vocab, 1);
            let device_ids = tokens(cuda, &ids);
            let (wte, wpe) = (random(vocab * c, 2), random((length + 3) * c, 3));
            let (wte_d, wpe_d) = (param(cuda, &wte), param(cuda, &wpe));
            let (wte, wpe) = (rounded(&wte, precision), rounded(&wpe, precision));
            let mut out = poison(cuda, rows * c, precision);
            cuda.embedding_forward(&mut out, &device_ids, &wte_d, &wpe_d, sequences, c);
            let exact = reference::embedding_forward(&ids, &f64s(&wte), &f64s(&wpe), sequences, c);
            close("embedding", &values_of(cuda, &out), &exact, bound(precision));

            let dout = rounded(&random(rows * c, 4), precision);
            let dout_d = tensor(cuda, &dout, precision);
            let (mut dwte, mut dwpe) = (vec![1.0f64; vocab * c], vec![1.0f64; (length + 3) * c]);
            for (row, id) in ids.iter().enumerate() {
                for i in 0..c {
                    dwte[*id as usize * c + i] += f64::from(dout[row * c + i]);
                    dwpe[row % length * c + i] += f64::from(dout[row * c + i]);
                }
            }
            let mut dwte_d = f32_buffer(cuda, &vec![1.0; dwte.len()]);
            let mut dwpe_d = f32_buffer(cuda, &vec![1.0; dwpe.len()]);
            cuda.embedding_backward(
                &mut dwte_d,
                &mut dwpe_d,
                &dout_d,
                &device_ids,
                sequences,
                c,
                true,
            );
            close("dwte", &f32s_of(cuda, &dwte_d), &dwte, 2e-6);
            close("dwpe", &f32s_of(cuda, &dwpe_d), &dwpe, 2e-6);
            let mut dwpe_d = f32_buffer(cuda, &vec![f32::NAN; dwpe.len()]);
            let (te, pe) = (&mut dwte_d, &mut dwpe_d);
            cuda.embedding_backward(te, pe, &dout_d, &device_ids, sequences, c, false);
            dwpe.iter_mut().for_each(|v| *v -= 1.0);
            close("dwpe alone", &f32s_of(cuda, &dwpe_d), &dwpe, 2e-6);
        }
    });
}

#[test]
fn normal_values_are_those_of_the_definition() {
    let Some(cuda) = gpu() else { return };
    for (len, index) in [(1, 0), (511, 1), (513, 2), (1_000_003, 3)] {
        let draw = Draw::of(99, Purpose::Weights, index, 0);
        let mut param = param(&cuda, &vec![f32::NAN; len]);
        cuda.draw_param(&mut param, alone(len), 0.02, &draw).unwrap();
        let mut exact = vec![0.0; len];
        crate::mx::fill_normal(&mut exact, 0.02, &draw, 0);
        assert_eq!(f32s_of(&cuda, &param.master), exact, "{len}");
        let most = exact.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        assert_eq!(read_bytes(&cuda, param.most.address, 4), most.to_le_bytes());
        let copy: Vec<u8> =
            exact.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        assert_eq!(read_bytes(&cuda, param.copy.address, 2 * len), copy);
    }
}

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

/// The GPU as if it were of an older generation, whose kernels its own then have no part in.
pub(super) fn older_gpu() -> Option<Cuda> {
    let mut gpu = open()?;
    gpu.capability = (8, 0);
    Some(Cuda::of(gpu).unwrap())
}

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
        let kv_heads = heads;
        let shape =
            AttentionShape { sequences, heads, kv_heads, head_size, score_factor, precision };
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

#[test]
fn classifier_and_logits() {
    each_precision(|cuda, precision| {
        for (rows, c, vocab) in [(1, 8, 3), (130, 40, 301), (260, 64, 1000)] {
            let shape = LinearShape { rows, inputs: c, outputs: vocab };
            let x = rounded(&random(rows * c, 1), precision);
            let small: Vec<f32> = random(vocab * c, 2).iter().map(|v| v * 0.2).collect();
            let wte = rounded(&small, precision);
            let ids = some_tokens(rows, vocab, 3);
            let (x_d, wte_d) = (tensor(cuda, &x, precision), param(cuda, &wte));
            let targets = tokens(cuda, &ids);
            let sequences = Sequences { batch: 1, length: rows };
            let mut scratch = workspace(cuda, &workspace_shape(sequences, c, 1, vocab, precision));
            let mut losses = f32_buffer(cuda, &vec![f32::NAN; rows]);
            let mut dx = poison(cuda, rows * c, precision);
            let mut dwte = f32_buffer(cuda, &vec![1.0; vocab * c]);
            let dw = cuda.whole(&mut dwte);
            let gradient = ClassifierGradient { dx: &mut dx, dw, scale: 0.5, accumulate: true };
            let s = &mut scratch;
            cuda.classifier(
                s,
                &mut losses,
                Some(gradient),
                &x_d,
                &wte_d,
                &targets,
                rows,
                c,
                vocab,
                precision,
            );
            let (exact, exact_dx, exact_dwte) =
                reference::classifier(&f64s(&x), &f64s(&wte), &ids, shape, 0.5);
            // Logits and their gradients are held in the precision: twice the error that this alone
            // makes, and in f32 that of its sums.
            let format = classifier_with_rounded_logits(&x, &wte, &ids, shape, 0.5, precision);
            let (rounded_losses, rounded_dx, rounded_dwte) = format;
            let loose = |rounded: &[f64], exact: &[f64]| {
                2.0 * relative_error(rounded, exact) + 2.0 * bound(precision).min(1e-3)
            };
            let (l, x_, w) = (
                loose(&rounded_losses, &exact),
                loose(&rounded_dx, &exact_dx),
                loose(&rounded_dwte, &exact_dwte),
            );
            println!("rounding the logits allows {l:.1e} for losses, {x_:.1e} dx, {w:.1e} dwte");
            close("losses", &f32s_of(cuda, &losses), &exact, l);
            close("dx", &values_of(cuda, &dx), &exact_dx, x_);
            close("dwte", &f32s_of(cuda, &dwte), &plus_one(exact_dwte), w);
            let mut logits = f32_buffer(cuda, &vec![f32::NAN; vocab]);
            let last = rows - 1;
            let s = &mut scratch;
            cuda.logits(s, &mut logits, &x_d, last, &wte_d, c, vocab, precision);
            let one = LinearShape { rows: 1, ..shape };
            let row = f64s(&x[last * c..]);
            let exact = reference::linear_forward(&row, &f64s(&wte), &vec![0.0; vocab], one);
            close("logits", &f32s_of(cuda, &logits), &exact, 1e-5);
        }
    });
}

/// The classifier in f64, but for logits and dlogits rounded to the precision.
fn classifier_with_rounded_logits(
    x: &[f32],
    wte: &[f32],
    targets: &[u32],
    shape: LinearShape,
    scale: f64,
    precision: Precision,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let round = |v: Vec<f64>| -> Vec<f64> {
        let v: Vec<f32> = v.iter().map(|v| *v as f32).collect();
        f64s(&rounded(&v, precision))
    };
    let (x, wte, zeros) = (f64s(x), f64s(wte), vec![0.0; shape.outputs]);
    let mut logits = round(reference::linear_forward(&x, &wte, &zeros, shape));
    let mut losses = Vec::new();
    for (row, target) in logits.chunks_mut(shape.outputs).zip(targets) {
        let most = row.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = row.iter().map(|l| (l - most).exp()).sum();
        losses.push(most + sum.ln() - row[*target as usize]);
        row.iter_mut().for_each(|l| *l = scale * (*l - most).exp() / sum);
        row[*target as usize] -= scale;
    }
    let (dx, dwte, _) = reference::linear_backward(&round(logits), &x, &wte, shape);
    (losses, dx, dwte)
}

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
            let recipe = match precision {
                Precision::F32 => LinearRecipe::F32,
                Precision::Bf16 => LinearRecipe::BF16,
            };
            cuda.linear_forward(&mut scratch, &mut y, &x_d, &w_d, &b_d, shape, &recipe);
            let exact = reference::linear_forward(&f64s(&x), &f64s(&w), &f64s(&b), shape);
            close("y", &values_of(cuda, &y), &exact, bound(precision));
            let mut dx = poison(cuda, rows * inputs, precision);
            let mut dw = f32_buffer(cuda, &vec![1.0; outputs * inputs]);
            let mut db = f32_buffer(cuda, &vec![1.0; outputs]);
            let (s, r) = (&mut scratch, &RANDOM);
            cuda.linear_backward(
                s, &mut dx, &mut dw, &mut db, &dy_d, &x_d, &w_d, shape, &recipe, r, true,
            );
            let (exact_dx, exact_dw, exact_db) =
                reference::linear_backward(&f64s(&dy), &f64s(&x), &f64s(&w), shape);
            close("dx", &values_of(cuda, &dx), &exact_dx, bound(precision));
            close("dw", &f32s_of(cuda, &dw), &plus_one(exact_dw.clone()), 1e-5);
            close("db", &f32s_of(cuda, &db), &plus_one(exact_db.clone()), 1e-5);

            // The same with gradients that are overwritten, and with GELU after the forward product and
            // before the backward ones.
            cuda.write_f32(&mut dw, 0, &vec![f32::NAN; outputs * inputs]).unwrap();
            cuda.write_f32(&mut db, 0, &vec![f32::NAN; outputs]).unwrap();
            let (mut pre, mut out) =
                (poison(cuda, rows * outputs, precision), poison(cuda, rows * outputs, precision));
            let (s, forms) = (&mut scratch, [Activation::Gelu, Activation::GeluTanh]);
            for form in forms {
                cuda.linear_gelu_forward(
                    s, &mut out, &mut pre, &x_d, &w_d, &b_d, shape, &recipe, form,
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

const RANDOM: Random = Random { seed: 42, step: 7, micro_step: 1, layer: 3, linear: 2 };

#[test]
fn optimizer_steps() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| {
        let lengths = [40_003, 7, 4096];
        let step = OptimizerStep {
            optimizer: crate::Optimizer { clip: 20.0, ..Default::default() },
            lr: 0.01,
            t: 3,
            loss_scale: 0.25,
            largest_gradient: f32::INFINITY,
        };
        let host: Vec<[Vec<f32>; 4]> = lengths
            .iter()
            .zip(1..)
            .map(|(n, s)| {
                let v = random(*n, 10 * s + 3).iter().map(|v| v * v).collect();
                [random(*n, 10 * s), random(*n, 10 * s + 1), random(*n, 10 * s + 2), v]
            })
            .collect();
        // Flat buffers, with what lies between slots as it comes.
        let (mut slots, mut len) = (Vec::new(), 0usize);
        for (index, n) in lengths.into_iter().enumerate() {
            slots.push(Slot { index, start: len, len: n, decays: index != 1 });
            len = (len + n).next_multiple_of(Cuda::ALIGN);
        }
        let flat = |which: usize| {
            let mut values = vec![0.0; len];
            for (slot, host) in slots.iter().zip(&host) {
                values[slot.range()].copy_from_slice(&host[which]);
            }
            f32_buffer(&cuda, &values)
        };
        let (mut gradients, mut states) = (flat(0), [flat(2), flat(3)]);
        let mut measuring = Arena::measuring(&cuda.gpu);
        measuring.weights(len, lengths.len());
        let mut arena = Arena::allocated(&cuda.gpu, measuring.used()).unwrap();
        let mut weights = arena.weights(len, lengths.len());
        for (slot, [_, p, ..]) in slots.iter().zip(&host) {
            cuda.write_param(&mut weights, *slot, p).unwrap();
        }
        let mut measuring = Arena::measuring(&cuda.gpu);
        Reduction::new(&mut measuring, lengths.len()).unwrap();
        let mut arena = Arena::allocated(&cuda.gpu, measuring.used()).unwrap();
        let mut optimizer = Reduction::new(&mut arena, lengths.len()).unwrap();
        let norm: f64 = host.iter().flat_map(|[g, ..]| f64s(g)).map(|g| g * g).sum::<f64>().sqrt();
        let scale = 20.0 / norm;
        assert!(scale < 1.0);

        let small = workspace_shape(Sequences { batch: 1, length: 1 }, 8, 1, 8, Precision::Bf16);
        let mut scratch = workspace(&cuda, &small);
        let losses = f32_buffer(&cuda, &[0.5, 1.5, 2.5, f32::NAN]);
        let mut all = Trained {
            slots: &slots,
            weights: &mut weights,
            states: &mut states,
            gradients: &mut gradients,
        };
        assert_eq!(cuda.sum_losses(&mut optimizer, &losses, 2).unwrap(), 2.0);
        cuda.add_losses(&mut optimizer, &losses, 2, false);
        cuda.add_losses(&mut optimizer, &losses, 3, true);
        // Above the limit nothing is done, and what would be done can be asked.
        let within = OptimizerStep { largest_gradient: 19.0, ..step };
        let sums = cuda.finish_step(&mut scratch, &mut optimizer, &mut all, &within);
        assert_eq!(sums.gradient_scale(&within), None);
        let mut tried = Vec::new();
        cuda.try_update(&mut optimizer, &mut all, &step, &sums, &mut |largest| tried.push(largest))
            .unwrap();
        let sums = cuda.finish_step(&mut scratch, &mut optimizer, &mut all, &step);
        assert_eq!(sums.losses, 6.5);
        assert!((sums.squares.sqrt() / norm - 1.0).abs() < 1e-9);
        let mut after = Vec::new();
        for (i, ([g, p, m, v], slot)) in host.iter().zip(&slots).enumerate() {
            let param = cuda.param(all.weights, *slot);
            let exact: Vec<f64> = (0..g.len())
                .map(|k| {
                    let before = [p[k], m[k], v[k]].map(f64::from);
                    reference::adamw(before, scale * f64::from(g[k]), i != 1, &step)[0]
                })
                .collect();
            let mut ours = vec![0.0; p.len()];
            cuda.read_param(all.weights, *slot, &mut ours).unwrap();
            close("weights", &ours, &exact, 1e-6);
            let most =
                u32::from_le_bytes(read_bytes(&cuda, param.most.address, 4).try_into().unwrap());
            assert_eq!(most, ours.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap());
            let [mut m, mut v] = [vec![0.0; p.len()], vec![0.0; p.len()]];
            cuda.read_f32(&all.states[0], slot.start, &mut m).unwrap();
            cuda.read_f32(&all.states[1], slot.start, &mut v).unwrap();
            let most = |x: &[f32]| x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let largest = Largest { weight: most(&ours), states: [most(&m), most(&v)] };
            assert_eq!(tried[i], largest);
            let copy = read_bytes(&cuda, param.copy.address, 2 * p.len());
            let copy = copy.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b));
            assert!(copy.eq(ours.iter().map(|v| half::bf16::from_f32(*v))));
            after.push(ours);
        }

        // Without a finite loss nothing moves.
        let nan = f32_buffer(&cuda, &[f32::NAN]);
        cuda.add_losses(&mut optimizer, &nan, 1, true);
        assert!(cuda.finish_step(&mut scratch, &mut optimizer, &mut all, &step).losses.is_nan());
        for (slot, before) in slots.iter().zip(&after) {
            let mut ours = vec![0.0; before.len()];
            cuda.read_param(all.weights, *slot, &mut ours).unwrap();
            assert!(ours == *before);
        }
    });
}

/// Codes and scales are those of the scalar definition, bit for bit; values are what they stand for.
#[test]
fn mxfp4_codes_are_those_of_the_definition() {
    use super::linear::{Form, Quantize, Source as Operand, Target, quantize};
    each_precision(|cuda, precision| {
        let cases = [(1, 1), (5, 32), (17, 31), (33, 200), (48, 257), (64, 96), (130, 520)];
        for (case, (rows, cols)) in cases.into_iter().enumerate() {
            let mut values = random(rows * cols, case as u64);
            // Blocks of zeroes, subnormals, numbers near the ends of the range, NaN, infinity.
            for (i, v) in values.iter_mut().enumerate() {
                match i / 37 % 29 {
                    3 => *v = 0.0,
                    7 => *v *= 1e-38,
                    11 => *v *= 1e36,
                    13 => *v *= 1e-30,
                    _ => {}
                }
            }
            if case == 5 {
                values[100] = f32::NAN;
                values[2000] = f32::NEG_INFINITY;
            }
            let values = rounded(&values, precision);
            let source = tensor(cuda, &values, precision);
            let operand = Operand { address: source.address(), precision };
            for group in [0, 32, 64, 128, 256] {
                for transposed in [false, true] {
                    for rounding in [Rounding::Nearest, Rounding::Unbiased] {
                        let mut signs = vec![0.0; group];
                        RANDOM.signs(GemmId::Wgrad).fill_signs(&mut signs);
                        let draw = RANDOM.rounding(OperandId::X);
                        let (vectors, depth) = if transposed { (cols, rows) } else { (rows, cols) };
                        let exact = Mxfp4Matrix::quantize(
                            Source { data: &values, rows: vectors, depth, transposed },
                            &signs,
                            rounding,
                            &draw,
                        );
                        let elements = vectors * exact.depth;
                        let form = if transposed { Form::Columns } else { Form::Rows };
                        let shape = Quantize { form, rows, cols };
                        let mut arena = Arena::allocated(&cuda.gpu, 4 * elements + 1024).unwrap();
                        let [codes, scales, out] =
                            [elements / 2, elements / BLOCK, 2 * elements].map(|n| arena.bytes(n));
                        let poison = vec![0xaa; elements * 2];
                        write_bytes(cuda, out.address, &poison);
                        write_bytes(cuda, codes.address, &poison[..elements / 2]);
                        write_bytes(cuda, scales.address, &poison[..elements / BLOCK]);
                        let both = [
                            Target::Codes { codes: codes.address, scales: scales.address },
                            Target::Values { out: out.address },
                        ];
                        for target in both {
                            quantize(cuda, target, operand, shape, 0, &signs, rounding, draw);
                        }
                        let what = format!(
                            "{precision:?} ({rows}, {cols}) g {group} {form:?} {rounding:?}"
                        );
                        let codes = read_bytes(cuda, codes.address, elements / 2);
                        let scales = read_bytes(cuda, scales.address, elements / BLOCK);
                        assert!(scales == exact.scales, "{what}: scales differ");
                        assert!(codes == exact.codes, "{what}: codes differ");
                        let values = read_bytes(cuda, out.address, 2 * elements);
                        let values = values.as_chunks::<2>().0.iter();
                        let values = values.map(|b| half::bf16::from_le_bytes(*b).to_f32());
                        for (value, exact) in values.zip(exact.dequantize()) {
                            let same = value == exact || value.is_nan() && exact.is_nan();
                            assert!(same, "{what}: {value} instead of {exact}");
                        }
                    }
                }
            }
        }
    });
}

/// The number that an FP8 byte stands for.
pub(super) fn decode_fp8(byte: u8, format: Type) -> f64 {
    let (exponent_bits, bias) = if format == Type::E5m2 { (5, 15) } else { (4, 7) };
    let mantissa_bits = 7 - exponent_bits;
    let exponent = i32::from(byte & 0x7f) >> mantissa_bits;
    let fraction = f64::from(byte & ((1 << mantissa_bits) - 1)) / f64::from(1 << mantissa_bits);
    let magnitude = match exponent {
        0 => fraction * 2f64.powi(1 - bias),
        _ => (1.0 + fraction) * 2f64.powi(exponent - bias),
    };
    if byte >> 7 == 1 { -magnitude } else { magnitude }
}

/// FP8 operands on the device: bytes of one or two forms, factor, raised blocks, largest magnitude, sums.
struct Fp8 {
    out: [super::memory::Piece; 2],
    words: super::memory::Piece,
    sums: super::memory::Piece,
}

impl Fp8 {
    fn new(cuda: &Cuda, elements: usize, sums: usize, values: &[f32]) -> Self {
        let bytes = 2 * elements + 4 * sums + 4096;
        let mut arena = Arena::allocated(&cuda.gpu, bytes).unwrap();
        let out = [arena.bytes(elements), arena.bytes(elements)];
        let fp8 = Self { out, words: arena.bytes(12), sums: arena.bytes(4 * sums) };
        write_bytes(cuda, fp8.out[0].address, &vec![0xaa; elements]);
        write_bytes(cuda, fp8.out[1].address, &vec![0xaa; elements]);
        write_bytes(cuda, fp8.sums.address, &vec![0xff; 4 * sums]);
        let most = values.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        let words: Vec<u8> = [0, 0, most].iter().flat_map(|w: &u32| w.to_le_bytes()).collect();
        write_bytes(cuda, fp8.words.address, &words);
        fp8
    }

    fn scaling(&self) -> super::linear::Scaling {
        let [scale, raised, most] = [0, 4, 8].map(|offset| self.words.address + offset);
        super::linear::Scaling { scale, raised, most, kept: false }
    }

    /// The factor and the number of raised blocks.
    fn factor_and_raised(&self, cuda: &Cuda) -> (f64, u32) {
        let bytes = read_bytes(cuda, self.words.address, 8);
        let [factor, raised] =
            [0, 4].map(|i| u32::from_le_bytes(bytes[i..i + 4].try_into().unwrap()));
        (f64::from(f32::from_bits(factor)), raised)
    }

    /// Form `form` as values.
    fn values(&self, cuda: &Cuda, form: usize, elements: usize, format: Type) -> Vec<f64> {
        let (factor, _) = self.factor_and_raised(cuda);
        let bytes = read_bytes(cuda, self.out[form].address, elements);
        bytes.into_iter().map(|byte| factor * decode_fp8(byte, format)).collect()
    }
}

/// Compares FP8 values with the definition's, of which those in blocks too far below `most` are raised. Their
/// number is returned.
pub(super) fn compare_fp8(
    what: &str,
    ours: &[f64],
    exact: &Mxfp4Matrix,
    format: Type,
    most: u32,
    group: usize,
) -> u32 {
    let range = if format == Type::E5m2 { 28 } else { 14 };
    let slack = match group {
        0 => 0,
        32 | 64 => 3,
        _ => 4,
    };
    let top = ((most >> 23).saturating_sub(2) + slack).max(16);
    let mut raised = 0;
    for (block, (ours, exact_values)) in
        ours.chunks(BLOCK).zip(exact.dequantize().chunks(BLOCK)).enumerate()
    {
        let byte = u32::from(exact.scales[block]);
        let zero =
            exact.codes[block * BLOCK / 2..][..BLOCK / 2].iter().all(|codes| codes & 0x77 == 0);
        if byte + range >= top || byte == 0 && zero {
            let same = ours.iter().zip(exact_values).all(|(a, b)| *a == f64::from(*b));
            assert!(
                same,
                "{what}: block {block} of scale {byte}: {ours:?} instead of {exact_values:?}"
            );
            continue;
        }
        raised += 1;
        // Valid MXFP4 of the lowest scale that fits.
        let unit = 2f64.powi(top as i32 - range as i32 - 127);
        let grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        let valid = ours.iter().all(|v| grid.contains(&(v.abs() / unit)));
        assert!(valid, "{what}: block {block} raised to {ours:?}");
    }
    raised
}

/// FP8 operands are the definition's numbers, but for raised blocks, which are counted; the sums are those of the
/// columns; a NaN makes the factor one.
#[test]
fn fp8_operands_are_those_of_the_definition() {
    use super::linear::{Form, Quantize, Source as Operand, Target, quantize, quantize_both};
    let Some(cuda) = gpu() else { return };
    let cuda = &cuda;
    let mut raised_in_all = 0;
    let cases = [(1, 1), (17, 31), (33, 200), (128, 192), (64, 96), (300, 520)];
    for (case, (rows, cols)) in cases.into_iter().enumerate() {
        let mut values = random(rows * cols, 20 + case as u64);
        for (i, v) in values.iter_mut().enumerate() {
            match i / 37 % 29 {
                3 => *v = 0.0,
                7 => *v *= 2f32.powi(-(i as i32 % 40)),
                11 => *v *= 1e3,
                _ => {}
            }
        }
        for precision in PRECISIONS {
            let values = rounded(&values, precision);
            let source = tensor(cuda, &values, precision);
            let operand = Operand { address: source.address(), precision };
            let most = values.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap();
            let sums: Vec<f64> = (0..cols)
                .map(|c| (0..rows).map(|r| f64::from(values[r * cols + c])).sum())
                .collect();
            for (group, rounding) in [0, 32, 64, 128, 256]
                .into_iter()
                .flat_map(|group| [(group, Rounding::Nearest), (group, Rounding::Unbiased)])
            {
                let mut signs = [vec![0.0; group], vec![0.0; group]];
                RANDOM.signs(GemmId::Dgrad).fill_signs(&mut signs[0]);
                RANDOM.signs(GemmId::Wgrad).fill_signs(&mut signs[1]);
                let draw = RANDOM.rounding(OperandId::Dy);
                let exact = |form, signs: &[f32]| {
                    let transposed = form == Form::Columns;
                    let (vectors, depth) = if transposed { (cols, rows) } else { (rows, cols) };
                    let source = Source { data: &values, rows: vectors, depth, transposed };
                    Mxfp4Matrix::quantize(source, signs, rounding, &draw)
                };
                let forms = [(Form::Rows, &signs[0]), (Form::Columns, &signs[1])];
                let exact = forms.map(|(form, signs)| exact(form, signs));
                let elements = exact.each_ref().map(|exact| exact.rows * exact.depth);
                let room = elements[0].max(elements[1]);
                let check_sums = |what: &str, fp8: &Fp8, parts: usize| {
                    let bytes = read_bytes(cuda, fp8.sums.address, 4 * parts * cols);
                    let numbers: Vec<f32> =
                        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                    let ours: Vec<f32> =
                        (0..cols).map(|c| numbers.iter().skip(c).step_by(cols).sum()).collect();
                    close(what, &ours, &sums, 1e-5);
                };
                let mut run = |form: Form, format: Type| {
                    let what = format!(
                        "{precision:?} ({rows}, {cols}) g {group} {form:?} {rounding:?} {format:?}"
                    );
                    let fp8 = Fp8::new(cuda, room, (rows + 256) * cols, &values);
                    let index = usize::from(form == Form::Columns);
                    let out = fp8.out[index].address;
                    let target = Target::Fp8 { out, format, scaling: fp8.scaling() };
                    let shape = Quantize { form, rows, cols };
                    let to = if form == Form::Columns { fp8.sums.address } else { 0 };
                    let signs = forms[index].1;
                    let parts = quantize(cuda, target, operand, shape, to, signs, rounding, draw);
                    let ours = fp8.values(cuda, index, elements[index], format);
                    let raised = compare_fp8(&what, &ours, &exact[index], format, most, group);
                    assert_eq!(fp8.factor_and_raised(cuda).1, raised, "{what}");
                    if form == Form::Columns {
                        check_sums(&what, &fp8, parts);
                    }
                    raised_in_all += raised;
                };
                run(Form::Columns, Type::E4m3);
                if precision == Precision::F32 {
                    continue;
                }
                run(Form::Columns, Type::E5m2);
                run(Form::Rows, Type::E5m2);
                if group > 64 {
                    continue;
                }
                let what = format!("({rows}, {cols}) g {group} both {rounding:?}");
                let fp8 = Fp8::new(cuda, room, (rows + 256) * cols, &values);
                let out = [fp8.out[0].address, fp8.out[1].address];
                let (scaling, to) = (fp8.scaling(), fp8.sums.address);
                let both = [&signs[0][..], &signs[1][..]];
                let shape = (rows, cols);
                let from = source.address();
                let parts =
                    quantize_both(cuda, out, scaling, from, shape, to, both, rounding, draw);
                let mut raised = 0;
                for (form, exact) in exact.iter().enumerate() {
                    let ours = fp8.values(cuda, form, elements[form], Type::E5m2);
                    raised += compare_fp8(&what, &ours, exact, Type::E5m2, most, group);
                }
                assert_eq!(fp8.factor_and_raised(cuda).1, raised, "{what}");
                check_sums(&what, &fp8, parts);
                raised_in_all += raised;

                let mut poisoned = values.clone();
                poisoned[rows * cols / 2] = f32::NAN;
                let fp8 = Fp8::new(cuda, room, (rows + 256) * cols, &poisoned);
                let out = [fp8.out[0].address, fp8.out[1].address];
                let poisoned = tensor(cuda, &poisoned, precision);
                let (scaling, from) = (fp8.scaling(), poisoned.address());
                quantize_both(cuda, out, scaling, from, shape, 0, both, rounding, draw);
                assert!(fp8.factor_and_raised(cuda).0.is_nan(), "{what}");
            }
        }
    }
    assert!(raised_in_all > 100, "only {raised_in_all} blocks were raised");
}

/// A matrix (rows, cols) and how a product reads it.
struct Factor {
    values: Vec<f32>,
    form: super::linear::Form,
    rows: usize,
    cols: usize,
}

/// How far the FP8 product of these, quantized, is from the f64 product of the same numbers. `a` is dy.
fn error_of_fp8_product(cuda: &Cuda, what: &str, [a, b]: &[Factor; 2]) -> f64 {
    use super::linear::{Form, Quantize, Source as Operand, Target, quantize};
    let mut signs = vec![0.0; 64];
    RANDOM.signs(GemmId::Dgrad).fill_signs(&mut signs);
    let made = |factor: &Factor, id, format| {
        let &Factor { ref values, form, rows, cols } = factor;
        let source = tensor(cuda, values, Precision::Bf16);
        let fp8 = Fp8::new(cuda, rows * cols, 0, values);
        let target = Target::Fp8 { out: fp8.out[0].address, format, scaling: fp8.scaling() };
        let operand = Operand { address: source.address(), precision: Precision::Bf16 };
        let shape = Quantize { form, rows, cols };
        let draw = RANDOM.rounding(id);
        quantize(cuda, target, operand, shape, 0, &signs, Rounding::Unbiased, draw);
        let numbers = fp8.values(cuda, 0, rows * cols, format);
        let [vectors, depth] = if form == Form::Rows { [rows, cols] } else { [cols, rows] };
        (fp8, numbers, vectors, depth)
    };
    let (a, a_numbers, m, k) = made(a, OperandId::Dy, Type::E5m2);
    let (b, b_numbers, n, _) = made(b, OperandId::W, Type::E4m3);
    let exact = reference::product(&a_numbers, &b_numbers, m, n, k);
    let sequences = Sequences { batch: 1, length: 16 };
    let scratch = workspace(cuda, &workspace_shape(sequences, 16, 1, 8, Precision::Bf16));
    let c = f32_buffer(cuda, &vec![f32::NAN; m * n]);
    let product = super::gemm::Product {
        m,
        n,
        k,
        operands: [Type::E5m2, Type::E4m3],
        a: super::gemm::Operand::rows(a.out[0].address, k),
        b: super::gemm::Operand::rows(b.out[0].address, k),
        c: c.address(),
        c_stride: n,
        c_type: Type::F32,
        alpha: 1.0,
        accumulate: false,
        bias: None,
        scales: Some([a.scaling().scale, b.scaling().scale]),
    };
    cuda.product(&scratch, &product);
    let error = relative_error(&f64s(&f32s_of(cuda, &c)), &exact);
    let raised = [&a, &b].map(|fp8| fp8.factor_and_raised(cuda).1);
    println!("{what} ({m}, {n}, {k}): error {error:.1e}, raised {raised:?}");
    error
}

/// Products of FP8 operands against the f64 product of the same numbers, on ordinary, heavy-tailed and widely spread
/// values, and on a gradient, weights and inputs of a model in training.
#[test]
fn fp8_products_are_exact() {
    use super::linear::Form;
    let Some(cuda) = gpu() else { return };
    if cuda.gpu.capability < (8, 9) {
        return println!("skipped: {} has no FP8 products", cuda.gpu.name);
    }
    for kind in ["normal", "heavy-tailed", "spread over 2^20"] {
        let values = |len, seed| -> Vec<f32> {
            let mut values = normal(len, 1.0, seed);
            for (i, v) in values.iter_mut().enumerate() {
                match kind {
                    "heavy-tailed"
                        if RANDOM
                            .rounding(OperandId::Dy)
                            .element(i as u32, 0)
                            .is_multiple_of(100) =>
                    {
                        *v *= 5.0
                    }
                    "spread over 2^20" => *v *= 2f32.powi(-((i / 64 % 21) as i32)),
                    _ => {}
                }
            }
            rounded(&values, Precision::Bf16)
        };
        let (m, n, k) = (96, 64, 512);
        let a = Factor { values: values(m * k, 1), form: Form::Rows, rows: m, cols: k };
        let b = Factor { values: values(n * k, 2), form: Form::Columns, rows: k, cols: n };
        let error = cuda.gpu.scope(|| error_of_fp8_product(&cuda, kind, &[a, b]));
        assert!(error <= 1e-6, "{kind}: {error:e}");
    }

    // A model that has been trained on this project's prose for a while.
    let text = include_bytes!("../../../ARCHITECTURE.md");
    let data = Dataset::from_tokens(text.iter().map(|byte| u32::from(*byte)).collect()).unwrap();
    let config = ModelConfig {
        vocab_size: 256,
        context_length: 128,
        layers: 2,
        heads: 4,
        channels: 256,
        ..ModelConfig::default()
    };
    let engine = Engine::on(Device::Cuda(cuda.into()));
    let model = Model::new(&engine, &config).unwrap();
    let schedule = Schedule { lr: 1e-3, warmup_steps: 10, total_steps: 100, ..Schedule::default() };
    let options = TrainerOptions { batch_size: 8, schedule, ..TrainerOptions::default() };
    let mut trainer = Trainer::new(&model, options).unwrap();
    let losses: Vec<_> = (0..60).map(|_| trainer.step(&data).unwrap().loss).collect();
    assert!(losses[59] < 0.7 * losses[0], "{losses:?}");
    // NOTE: what the definition allows every backend. Where scales of neighbouring blocks lie far apart, as those of the
    // gradients of different heads do, tensor cores lose bits of the lower one: up to 2.8e-6 was seen.
    for error in errors_of_fp8_products(&trainer, 1024, 768) {
        assert!(error <= 1e-5, "{error:e}");
    }
}

/// The errors of the FP8 products, dgrad and wgrad, of the first qkv layer after a training step. Of wgrad the first `width`
/// results and inputs, over the first `rows` rows; of dgrad the first 256 rows and `width` inputs, over all results.
pub(super) fn errors_of_fp8_products(trainer: &Trainer, rows: usize, width: usize) -> [f64; 2] {
    use super::linear::Form;
    let model = trainer.model();
    let Device::Cuda(cuda) = model.engine().backend() else { unreachable!("trained on one") };
    let inputs = model.config().channels;
    let outputs = 3 * inputs;
    let [dy, x] =
        trainer.qkv_gradient_and_input().map(|tensor| cuda.gpu.scope(|| values_of(cuda, tensor)));
    let mut w = vec![0.0; inputs * outputs];
    model.read_tensor("transformer.h.0.attn.c_attn.weight", &mut w).unwrap();
    // Of a matrix with rows this long.
    let corner = |values: &[f32], length: usize, form, rows: usize, cols: usize| {
        let rows_of = values.chunks(length).take(rows);
        let values = rows_of.flat_map(|row| row[..cols].iter().copied()).collect();
        Factor { values, form, rows, cols }
    };
    let w: Vec<_> = (0..outputs * inputs).map(|i| w[i % inputs * outputs + i / inputs]).collect();
    let w = rounded(&w, Precision::Bf16);
    let dgrad = [
        corner(&dy, outputs, Form::Rows, rows.min(256), outputs),
        corner(&w, inputs, Form::Columns, outputs, width.min(inputs)),
    ];
    let wgrad = [
        corner(&dy, outputs, Form::Columns, rows, width.min(outputs)),
        corner(&x, inputs, Form::Columns, rows, width.min(inputs)),
    ];
    [("dgrad of a model", dgrad), ("wgrad of a model", wgrad)]
        .map(|(what, factors)| cuda.gpu.scope(|| error_of_fp8_product(cuda, what, &factors)))
}

/// What kernels note is the largest magnitude of what they stored, NaN being larger than everything.
#[test]
fn largest_magnitudes_are_noted() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| {
        let noted = |what: &str, tensor: &Tensor| {
            let address =
                tensor.largest_magnitude().unwrap_or_else(|| panic!("{what} was not noted"));
            let bits = u32::from_le_bytes(read_bytes(&cuda, address, 4).try_into().unwrap());
            let stored = values_of(&cuda, tensor);
            let most = stored.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap();
            assert_eq!(bits, most, "{what}");
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
                assert!(out.largest_magnitude().is_none());
                let most =
                    u32::from_le_bytes(read_bytes(&cuda, w.most.address, 4).try_into().unwrap());
                assert_eq!(
                    most,
                    random(c, 2).iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap()
                );
            }
        }
        // After the words of a pass are used up, nothing is noted until the next one.
        let mut out = poison(&cuda, 8, Precision::Bf16);
        let taken = (0..5000).filter(|_| out.noting() != 0).count();
        assert_eq!(taken, 4095);
        assert!(out.zeroed_words(3).is_none());
        out.begin_pass(&cuda.gpu);
        assert!(out.noting() != 0);
        assert!(out.zeroed_words(3).is_some());
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
            let recipe = linear_recipe(name);
            let kept: Vec<f32> = if recipe.wgrad().b().source() == OperandSource::Forward {
                let most = x.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                let scale = mx::e4m3_scale(most);
                x.iter().map(|v| mx::round_to_e4m3(v / scale) * scale).collect()
            } else {
                x.clone()
            };
            let operand = |data, rows, depth, transposed, gemm, id| {
                let mut signs = [0.0; mx::MAX_GROUP];
                let dy = *recipe.dgrad().a();
                let signs = mx::fill_signs(&mut signs, dy.transform(), gemm, &RANDOM);
                let source = Source { data, rows, depth, transposed };
                Mxfp4Matrix::quantize(source, signs, dy, &RANDOM.rounding(id))
            };
            let product = |a: Mxfp4Matrix, b: Mxfp4Matrix| -> Vec<f64> {
                let alpha = f64::from(recipe.dgrad().alpha());
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
                // FP8 tensor cores align what they add at once to the largest of it, and drop what lies too
                // far below: with these outliers up to 8e-6 of the result. The definition allows 1e-5.
                let aligned = cuda.road(shape) != Road::Bf16 && rows > 64;
                close(name, &f32s_of(cuda, &dw), &exact_dw, if aligned { 1e-5 } else { 1e-6 });
                close(name, &f32s_of(cuda, &db), &plus_one(exact_db), 1e-5);
            });
        }
    }
}

/// Behind GELU a gradient that is quantized as it is made is the one that is made first, whether or not the sample
/// says enough of it; also as part of a recorded step, with the random numbers of every step.
#[test]
fn gradients_behind_gelu_give_the_results_of_those_that_are_stored() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| check_gradients_behind_gelu(&cuda));
    cuda.gpu.synchronize().unwrap();
}

fn check_gradients_behind_gelu(cuda: &Cuda) {
    for (rows, inputs, outputs) in [(128, 64, 96), (320, 144, 208), (1024, 256, 1040)] {
        let shape = LinearShape { rows, inputs, outputs };
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
            let recipe = linear_recipe(name);
            let (mut pre, mut d) = (pre.clone(), random(rows * outputs, 4));
            // The largest one, in the first row, and its derivative is 1; or else there are larger ones.
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

            // Twice, the second time where no zeroed words are left; then as the third of three steps, which
            // is the second one recorded.
            let mut dy = tensor(cuda, &d, Precision::Bf16);
            let before = values_of(cuda, &dy);
            for words_left in [true, false] {
                let mut dy = tensor(cuda, &d, Precision::Bf16);
                while !words_left && dy.noting() != 0 {}
                cuda.linear_gelu_backward(
                    s, &mut dx, &mut dw, &mut db, &mut dy, &pre, &x, &w, shape, &recipe, r, false,
                    form,
                );
                assert!(results(&dx, &dw, &db) == expected, "{what}");
                if recipe.dgrad().format() != mx::Format::MXFP4 {
                    continue;
                }
                let group = recipe.dgrad().transform().map(mx::Transform::group);
                let fused = form == Activation::GeluTanh
                    && cuda.road(shape) == Road::Fp8
                    && group == Some(64);
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&values_of(cuda, &dy)) == bits(&before), fused, "{what}");
            }
            let mut recordings = cuda.recordings();
            let copy = tensor(cuda, &d, Precision::Bf16);
            for step in 7..10 {
                let plan = StepPlan {
                    accumulate: false,
                    precision: Precision::Bf16,
                    layers: vec![recipe],
                };
                cuda.recorded(&mut recordings, &plan, [step, 0], || {
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

#[test]
fn what_no_kernel_makes_is_refused_by_name() {
    for name in Recipe::NAMES {
        holds(&linear_recipe(name)).unwrap();
    }
    for (recipe, operand) in [
        ("mxfp4-rht,range=3/4", "dy in dgrad"),
        ("mxfp4,range=3/4,dgrad=bf16", "dy in wgrad"),
        ("mxfp4-sr,sr=dy,range=3/4", "W in dgrad"),
    ] {
        let message = holds(&linear_recipe(recipe)).unwrap_err().to_string();
        assert!(message.starts_with(operand) && message.contains("without range=3/4"), "{message}");
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
            let scale = mx::e4m3_scale(v.iter().fold(0.0f32, |most, v| most.max(v.abs())));
            v.iter().map(|v| f64::from(mx::round_to_e4m3(v / scale) * scale)).collect()
        };
        let exact = reference::linear_forward(&as_fp8(&x), &as_fp8(&w), &f64s(&b), shape);
        let (x_d, w_d, b_d) =
            (tensor(&cuda, &x, Precision::Bf16), param(&cuda, &w), param(&cuda, &b));
        cuda.gpu.scope(|| {
            let sequences = Sequences { batch: 1, length: rows };
            let all = workspace_shape(sequences, outputs, 1, 8, Precision::Bf16);
            let (mut scratch, recipe) = (workspace(&cuda, &all), linear_recipe("fp8-mxfp4-rht-sr"));
            let mut y = poison(&cuda, rows * outputs, Precision::Bf16);
            cuda.linear_forward(&mut scratch, &mut y, &x_d, &w_d, &b_d, shape, &recipe);
            close("y", &values_of(&cuda, &y), &exact, bound(Precision::Bf16));
        });
    }
}
