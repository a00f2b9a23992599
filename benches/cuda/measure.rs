//! Measurements of kernels and of linear layers, which need what is private in `src/backend/cuda`
//! and so are compiled with its tests, which ignore them: on a machine with a GPU
//! `cargo test --release --lib cuda::tests::measure -- --ignored --nocapture --test-threads 1`.

use cudarc::driver::sys;

use super::device::gemm::{Operand as Factor, Product};
use super::device::memory::{Arena, F32, Piece, Tensor, Weights};
use super::quantization::errors_of_fp8_products;
use super::quantize::kept::{Keeping, Way};
use super::quantize::{Behind, Made, Quantization, Source, Target, fp8, values};
use super::{
    Cuda, Type, UNBIASED, Workspace, alone, f32s_of, gpu, gradient, of_dy, older_gpu, random,
    workspace,
};
use crate::backend::conformance::{Update, step};
use crate::backend::{
    Activation, Device, Epilogue, Linear as _, LinearBackward, LinearForward, LinearShape,
    Memory as _, OutputGradient, Precision, Sequences,
};
use crate::formats::{
    Draw, Element, Format, GemmId, LinearRecipe, Nvfp4Scale, Operand, OperandId, Purpose, Random,
    Rounding, Signs, Transform,
};
use crate::optim::{Master, Optimizer, ParamKind};
use crate::recipe::Recipe;
use crate::{Dataset, Engine, Model, ModelConfig, Schedule, Trainer, TrainerOptions};

const RANDOM: Random = Random { seed: 1, step: 1, micro_step: 0, layer: 0, linear: 2 };
/// Rounds in which all that is compared takes turns, and calls in a row of each.
const ROUNDS: usize = 15;
const CALLS: usize = 4;

/// Medians of the microseconds of a call.
fn medians<const N: usize>(cuda: &Cuda, mut calls: [&mut dyn FnMut(); N]) -> [f64; N] {
    let mut events = [std::ptr::null_mut(); 2];
    let mut times = [const { Vec::new() }; N];
    for event in &mut events {
        // SAFETY: writes a handle, which lives until the process ends.
        let result = unsafe { sys::cuEventCreate(event, 0) };
        cuda.gpu.note("making an event", result);
    }
    for round in 0..=ROUNDS {
        for (call, times) in calls.iter_mut().zip(&mut times) {
            let mut milliseconds = 0.0;
            // SAFETY: events and stream are alive.
            unsafe {
                cuda.gpu.note("an event", sys::cuEventRecord(events[0], cuda.gpu.stream()));
                (0..CALLS).for_each(|_| call());
                cuda.gpu.note("an event", sys::cuEventRecord(events[1], cuda.gpu.stream()));
                cuda.gpu.synchronize().unwrap();
                let result = sys::cuEventElapsedTime_v2(&mut milliseconds, events[0], events[1]);
                cuda.gpu.note("an event", result);
            }
            if round > 0 {
                times.push(f64::from(milliseconds) * 1e3 / CALLS as f64);
            }
        }
    }
    times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[ROUNDS / 2]
    })
}

/// A parameter of normal values.
fn param(cuda: &Cuda, len: usize, std: f32, seed: u64) -> Weights {
    let mut arena = Arena::allocated(&cuda.gpu, len * 6 + 1024).unwrap();
    let mut param = arena.weights(len, 1, Master::F32);
    cuda.draw_param(&mut param, alone(len), std, &Draw::of(seed, Purpose::Weights, 0, 0)).unwrap();
    param
}

/// A tensor of normal values as a training step leaves it: its largest magnitude is noted.
fn noted(cuda: &Cuda, rows: usize, cols: usize, std: f32, seed: u64) -> Tensor {
    let len = rows * cols;
    let values = param(cuda, len, std, seed);
    let mut measuring = Arena::measuring(&cuda.gpu);
    measuring.tensor(len, Precision::Bf16);
    let mut arena = Arena::allocated(&cuda.gpu, measuring.used()).unwrap();
    let mut tensor = arena.tensor(len, Precision::Bf16);
    copy(cuda, tensor.address(), values.copy.address, 2 * len);
    let mut amax = [0.0];
    cuda.read(values.amax.address, &mut amax).unwrap();
    let amax = half::bf16::from_f32(amax[0]).to_f32();
    cuda.write(tensor.write().amax(), &[amax]).unwrap();
    tensor
}

/// Copies on the device, by the driver.
fn copy(cuda: &Cuda, to: u64, from: u64, bytes: usize) {
    // SAFETY: both buffers are that long.
    let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, cuda.gpu.stream()) };
    cuda.gpu.note("a copy", result);
}

fn f32s(cuda: &Cuda, len: usize) -> F32 {
    Arena::allocated(&cuda.gpu, len * 4 + 256).unwrap().f32(len)
}

fn bytes(cuda: &Cuda, len: usize) -> Piece {
    Arena::allocated(&cuda.gpu, len + 256).unwrap().bytes(len)
}

/// Quantization against the rate of a copy by the driver.
#[test]
#[ignore = "a measurement"]
fn quantization() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| quantization_on(&cuda));
}

fn quantization_on(cuda: &Cuda) {
    println!("{:>16}  both+sums          rows E5M2          columns E4M3       f32 to E4M3", "");
    for (rows, cols) in [(16384, 768), (16384, 1024), (16384, 2048), (16384, 4096), (8192, 8192)] {
        let elements = rows * cols;
        let source = noted(cuda, rows, cols, 1.0, 1);
        let weights = param(cuda, elements, 1.0, 2);
        let weights = weights.param(alone(elements)).master();
        let out = [bytes(cuda, elements), bytes(cuda, elements)];
        let (words, sums) = (bytes(cuda, 8), f32s(cuda, (rows / 64 + 2) * cols));
        let amax = source.amax().unwrap();
        let copied = bytes(cuda, 4 * elements);
        let target = |form: usize, format| {
            Some(Target { format, out: out[form].address, scales: words.address })
        };
        let all = |source, by_rows, by_columns| {
            let of_dy = of_dy(source, (rows, cols), 64, UNBIASED);
            let clamped = words.address + 4;
            Quantization { by_rows, by_columns, amax, clamped, ..of_dy }.run(cuda);
        };
        let bf16 = Source::of(&source);
        let f32 = Source { address: weights, precision: Precision::F32 };
        let [copying, both, by_rows, columns, from_f32] = medians(
            cuda,
            [
                &mut || copy(cuda, copied.address, weights, 4 * elements),
                &mut || {
                    let of_dy = of_dy(bf16, (rows, cols), 64, UNBIASED);
                    let both = Quantization {
                        by_rows: target(0, Type::E5m2),
                        by_columns: target(1, Type::E5m2),
                        sums: sums.address(),
                        amax,
                        clamped: words.address + 4,
                        ..of_dy
                    };
                    both.run(cuda);
                },
                &mut || all(bf16, target(0, Type::E5m2), None),
                &mut || all(bf16, None, target(0, Type::E4m3)),
                &mut || all(f32, None, target(0, Type::E4m3)),
            ],
        );
        // Bytes an element: 8 copied; 2 read and 2 written; 2 and 1; 4 and 1.
        let rate = 8.0 / copying;
        let share =
            |bytes: f64, time: f64| format!("{time:7.1} us {:4.1}%", 100.0 * bytes / time / rate);
        println!(
            "({rows:5}, {cols:5})  {}    {}    {}    {}    (copy {:.2} TB/s)",
            share(4.0, both),
            share(3.0, by_rows),
            share(3.0, columns),
            share(5.0, from_f32),
            rate * elements as f64 * 1e-6
        );
    }
}

/// The end of a step, of 50 million parameters, against the rate of a copy by the driver: the update
/// alone, and with the reduction before it.
#[test]
#[ignore = "a measurement"]
fn updates() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| updates_on(&cuda));
}

fn updates_on(cuda: &Cuda) {
    // A matrix, a vector and a table, which are as much of a model of a billion parameters.
    const LENGTHS: [usize; 3] = [48 << 20, 1 << 14, 2 << 20];
    const COPIED: usize = 16 << 20;
    let positive = |len, seed| random(len, seed).iter().map(|x| x * x).collect::<Vec<_>>();
    let values = LENGTHS.map(|len| [0, 1, 2, 3].map(|seed| positive(len, seed)));
    for name in [
        "adamw",
        "adamw,master=split",
        "adamw,moments=bf16",
        "adamw,moments=int8",
        "adamw,moments=fp8",
        "adamw,moments=int8,master=split",
        "adamw,moments=int8,master=split,gradients=bf16",
        "stable-adamw",
        "stable-adamw,moments=int8,master=split",
        "stable-spam,moments=int8,master=split",
    ] {
        let optimizer: Optimizer = name.parse().unwrap();
        let step = step(optimizer);
        let mut update = Update::of(cuda, &values, optimizer);
        let room = bytes(cuda, 8 * COPIED);
        update.add_losses(cuda, &[1.0], false);
        let whole: &std::cell::RefCell<_> = &std::cell::RefCell::new(&mut update);
        let [copying, updating, both] = medians(
            cuda,
            [
                &mut || copy(cuda, room.address, room.address + 4 * COPIED as u64, 4 * COPIED),
                &mut || whole.borrow_mut().update(cuda, &step),
                &mut || {
                    whole.borrow_mut().step(cuda, &step);
                },
            ],
        );
        // Bytes of all parameters that an update reads and writes.
        let of = |kind: ParamKind| {
            let of_state = |state: usize| {
                let element = optimizer.moments.element(kind, state);
                let numbers = 2.0 * element.size() as f64;
                // Where all have one scale, the largest is found before.
                let before = if element.has_one_scale() { 0.5 * numbers } else { 0.0 };
                numbers + before + 8.0 * element.scales(COPIED) as f64 / COPIED as f64
            };
            let moments = of_state(0) + of_state(1);
            let weights = if optimizer.master == Master::Split { 8.0 } else { 10.0 };
            let gradients = if optimizer.gradients.are_in_bf16(kind) { 2.0 } else { 4.0 };
            gradients + weights + moments
        };
        let kinds = [ParamKind::Matrix, ParamKind::Vector, ParamKind::Table];
        let moved: f64 =
            std::iter::zip(kinds, LENGTHS).map(|(kind, len)| of(kind) * len as f64).sum();
        let rate = 8.0 * COPIED as f64 / copying;
        println!(
            "{name:40} update {updating:7.1} us, {:4.1}% of a copy's rate ({:.2} TB/s); step {both:7.1} us",
            100.0 * moved / updating / rate,
            rate * 1e-6
        );
    }
}

/// FP8 bytes and the numbers of NVFP4 and int8 against the rate of a copy by the driver.
#[test]
#[ignore = "a measurement"]
fn operands() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| operands_on(&cuda));
}

fn operands_on(cuda: &Cuda) {
    for (rows, cols) in [(16384, 1024), (8192, 2048), (8192, 8192)] {
        let elements = rows * cols;
        let source = noted(cuda, rows, cols, 1.0, 1);
        let weights = param(cuda, elements, 1.0, 2);
        let weights = weights.param(alone(elements)).master();
        let out = [bytes(cuda, 4 * elements), bytes(cuda, elements)];
        let turned = bytes(cuda, 2 * elements);
        let (words, sums) = (bytes(cuda, 32), f32s(cuda, (rows / 64 + 2) * cols));
        let amax = source.amax().unwrap();
        let bf16 = Source::of(&source);
        let f32 = Source { address: weights, precision: Precision::F32 };
        let (to, shape) = ([out[0].address, words.address], [rows, cols]);
        let both = [to[0], out[1].address, to[1], sums.address()];
        let (e4m3, e5m2) = (Element::E4m3, Element::E5m2);
        let nvfp4 = |source, transposed, rounding, group: usize| {
            let [vectors, length] = if transposed { [cols, rows] } else { shape };
            let matrix = values::Matrix::rows(source, vectors, length, OperandId::X);
            let transform = (group > 0).then(|| Transform::of(group, Signs::Random));
            if group > 0 {
                // Once for all in a pass.
                cuda.clear(words.address + 4, 4);
            }
            values::Quantization {
                matrix: values::Matrix { transposed, amax: Some(amax), ..matrix },
                operand: Operand::of(Format::NVFP4).rounded(rounding),
                transform,
                gemm: GemmId::Wgrad,
                random: RANDOM,
                to: values::To { out: to[0], amax: words.address + 4, ..values::To::default() },
            }
            .run(cuda);
        };
        let int8 = |source, format, bytes, transposed| {
            let [vectors, length] = if transposed { [cols, rows] } else { shape };
            let matrix = values::Matrix::rows(source, vectors, length, OperandId::X);
            values::Quantization {
                matrix: values::Matrix { transposed, amax: Some(amax), ..matrix },
                operand: Operand::of(format),
                transform: None,
                gemm: GemmId::Dgrad,
                random: RANDOM,
                to: values::To {
                    out: to[0],
                    bytes,
                    vector_scales: sums.address(),
                    ..values::To::default()
                },
            }
            .run(cuda);
        };
        let (nearest, unbiased, eden) = (Rounding::Nearest, Rounding::Unbiased, Rounding::Eden);
        // What the forward pass rounded in rows, down columns.
        let of_kept = |source, forward: Format, backward: Operand| {
            let matrix = values::Matrix::rows(source, rows, cols, OperandId::X);
            let of = |matrix, operand: Operand, out: &Piece, word| values::Quantization {
                matrix,
                operand,
                transform: operand.transform(),
                gemm: GemmId::Wgrad,
                random: RANDOM,
                to: values::To {
                    out: out.address,
                    scale: words.address + word,
                    amax: words.address + word + 4,
                    ..values::To::default()
                },
            };
            let noted = values::Matrix { amax: Some(amax), ..matrix };
            let forward = of(noted, Operand::of(forward), &out[0], 8);
            let backward = of(matrix.turned(), backward, &turned, 16);
            let way = Way::of(&forward.operand, &backward.operand).expect("there are kernels");
            cuda.clear(words.address + 20, 4);
            Keeping { forward, backward }.run(cuda, way);
        };
        let [four_over_six, within] =
            [Format::nvfp4(Nvfp4Scale::FourOverSix, false), Format::nvfp4_within(true)];
        let random = |group| Transform::of(group, Signs::Random);
        let eden_of_kept = Operand::of(Format::NVFP4).rounded(eden).rotated(random(128));
        let within_of_kept = Operand::of(within).rounded(unbiased).rotated(random(16));
        let times = medians(
            cuda,
            [
                &mut || copy(cuda, to[0], weights, 4 * elements),
                &mut || fp8::convert(cuda, e4m3, to, bf16, amax, elements),
                &mut || fp8::turn(cuda, e4m3, to, bf16, amax, shape),
                &mut || {
                    fp8::convert_both(cuda, e5m2, both, bf16, amax, shape);
                },
                &mut || fp8::convert(cuda, e4m3, to, f32, amax, elements),
                &mut || fp8::turn(cuda, e4m3, to, f32, amax, shape),
                &mut || nvfp4(bf16, false, nearest, 0),
                &mut || nvfp4(bf16, false, unbiased, 0),
                &mut || nvfp4(bf16, true, unbiased, 0),
                &mut || nvfp4(f32, true, nearest, 0),
                &mut || nvfp4(bf16, false, unbiased, 64),
                &mut || nvfp4(bf16, true, unbiased, 64),
                &mut || nvfp4(bf16, true, eden, 128),
                &mut || int8(bf16, Format::INT8_VECTORS, false, false),
                &mut || int8(f32, Format::INT8_TENSOR, false, false),
                &mut || int8(bf16, Format::INT8_VECTORS, true, false),
                &mut || int8(f32, Format::INT8_TENSOR, true, false),
                &mut || int8(f32, Format::INT8_TENSOR, true, true),
                &mut || nvfp4(bf16, false, eden, 128),
                &mut || nvfp4(f32, true, eden, 128),
                &mut || nvfp4(bf16, true, unbiased, 16),
                &mut || of_kept(bf16, four_over_six, eden_of_kept),
                &mut || of_kept(f32, four_over_six, eden_of_kept),
                &mut || of_kept(bf16, within, within_of_kept),
                &mut || of_kept(f32, within, within_of_kept),
            ],
        );
        // Bytes an element; with a transform the source is read twice.
        let of = [
            ("copy", 8.0),
            ("FP8 rows", 3.0),
            ("FP8 columns", 3.0),
            ("FP8 both and sums", 4.0),
            ("FP8 rows of f32", 5.0),
            ("FP8 columns of f32", 5.0),
            ("NVFP4 rows", 4.0),
            ("NVFP4 rows SR", 4.0),
            ("NVFP4 columns SR", 4.0),
            ("NVFP4 columns of f32", 6.0),
            ("NVFP4 rows SR H64", 6.0),
            ("NVFP4 columns SR H64", 6.0),
            ("NVFP4 columns EDEN H128", 6.0),
            ("int8 rows as bf16", 4.0),
            ("int8 of f32 as bf16", 6.0),
            ("int8 rows", 3.0),
            ("int8 of f32", 5.0),
            ("int8 columns of f32", 5.0),
            ("NVFP4 rows EDEN H128", 6.0),
            ("NVFP4 columns EDEN H128 of f32", 10.0),
            ("NVFP4 columns SR H16", 6.0),
            ("quartet2: columns of q", 8.0),
            ("quartet2: columns of q of f32", 10.0),
            ("tetrajet2: columns of q", 4.0),
            ("tetrajet2: columns of q of f32", 6.0),
        ];
        println!("({rows}, {cols})");
        for (time, (what, bytes)) in times.iter().zip(of) {
            let rates = [1e-3 * elements as f64 / time, 1e-6 * bytes * elements as f64 / time];
            println!("{what:30} {time:7.1} us {:6.0} G/s {:5.2} TB/s", rates[0], rates[1]);
        }
    }
}

/// GELU's derivative and the quantization of what it makes, one after the other and in one.
#[test]
#[ignore = "a measurement"]
fn quantization_behind_gelu() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| quantization_behind_gelu_on(&cuda));
}

fn quantization_behind_gelu_on(cuda: &Cuda) {
    println!("{:>16}  derivative   both   sample   both behind GELU   again: not   done", "us");
    for (rows, cols) in [(16384, 4096), (8192, 8192)] {
        let elements = rows * cols;
        let mut d = noted(cuda, rows, cols, 1e-4, 1);
        let (dy, pre) = (noted(cuda, rows, cols, 1e-4, 2), noted(cuda, rows, cols, 1.0, 3));
        let out = [bytes(cuda, elements), bytes(cuda, elements)];
        let (words, sums) = (bytes(cuda, 32), f32s(cuda, (rows / 64 + 2) * cols));
        let target = |form: usize| {
            Some(Target { format: Type::E5m2, out: out[form].address, scales: words.address })
        };
        let of = |tensor: &Tensor| Quantization {
            by_rows: target(0),
            by_columns: target(1),
            sums: sums.address(),
            amax: dy.amax().unwrap(),
            clamped: words.address + 4,
            ..of_dy(Source::of(tensor), (rows, cols), 64, UNBIASED)
        };
        let (stored, both) = (of(&dy), of(&d));
        let pre_address = pre.address();
        let behind = |place| {
            let attempt = words.address + place;
            Behind { made: Made::Gelu, both, pre: pre_address, attempt }
        };
        // One attempt that the sample is enough for, and one that failed.
        let (fitting, failed) = (behind(8), behind(20));
        cuda.write(failed.attempt, &[0u32, 120]).unwrap();
        fitting.sample(cuda);
        let times = medians(
            cuda,
            [
                &mut || cuda.gelu_backward(&mut d, &pre, elements, Activation::GeluTanh),
                &mut || {
                    stored.run(cuda);
                },
                &mut || fitting.sample(cuda),
                &mut || {
                    fitting.quantize(cuda);
                },
                &mut || fitting.requantize(cuda),
                &mut || failed.requantize(cuda),
            ],
        );
        let mut attempt = [0u32; 2];
        cuda.read(fitting.attempt, &mut attempt).unwrap();
        assert_eq!(attempt[1], 0, "the sample is enough");
        let [derivative, both, sample, fused, not, done] = times;
        print!("({rows:5}, {cols:5})  {derivative:10.1} {both:6.1} {sample:8.1} ");
        println!("{fused:18.1} {not:12.1} {done:6.1}");
    }
}

/// What one linear layer's backward pass works on.
struct Layer {
    shape: LinearShape,
    dy: Tensor,
    /// The layer's result, where GELU follows.
    pre: Tensor,
    x: Tensor,
    w: Weights,
    bias: Weights,
    dx: Tensor,
    dw: F32,
    db: F32,
}

impl Layer {
    fn new(cuda: &Cuda, rows: usize, inputs: usize, outputs: usize) -> Self {
        let w = param(cuda, outputs * inputs, 0.02, 3);
        // GELU is straight at 8: dy stays what it is wherever the derivative is applied in place.
        let pre = noted(cuda, rows, outputs, 1.0, 7);
        let eight = half::bf16::from_f32(8.0).to_bits();
        // SAFETY: the tensor has as many elements.
        let result =
            unsafe { sys::cuMemsetD16Async(pre.address(), eight, pre.len, cuda.gpu.stream()) };
        cuda.gpu.note("filling a tensor", result);
        Self {
            shape: LinearShape { rows, inputs, outputs },
            dy: noted(cuda, rows, outputs, 1e-4, 4),
            pre,
            x: noted(cuda, rows, inputs, 1.0, 5),
            w,
            bias: param(cuda, outputs, 0.02, 8),
            dx: noted(cuda, rows, inputs, 1.0, 6),
            dw: f32s(cuda, outputs * inputs),
            db: f32s(cuda, outputs),
        }
    }

    fn forward(&mut self, cuda: &Cuda, workspace: &mut Workspace, recipe: &LinearRecipe) {
        let Self { shape, pre, x, w, bias, .. } = self;
        let operands = LinearForward {
            y: pre,
            x,
            w: w.param(alone(shape.outputs * shape.inputs)),
            b: Some(bias.param(alone(shape.outputs))),
            mean: None,
            epilogue: Epilogue::None,
            turned: None,
        };
        cuda.linear_forward(workspace, operands, *shape, recipe);
    }

    /// With GELU's derivative, or without.
    fn backward(
        &mut self,
        cuda: &Cuda,
        workspace: &mut Workspace,
        recipe: &LinearRecipe,
        gelu: bool,
    ) {
        let Self { shape, dy, pre, x, w, dx, dw, db, .. } = self;
        let [dw, db] = [dw, db].map(|sums| Some(gradient(sums)));
        let w = w.param(alone(shape.outputs * shape.inputs));
        let dy = if gelu {
            OutputGradient::BehindGelu { d: dy, y: pre, form: Activation::GeluTanh }
        } else {
            OutputGradient::Whole(dy)
        };
        let (mean, accumulate) = (None, false);
        let operands = LinearBackward { dx, dw, db, dy, x, turned: None, w, mean, accumulate };
        cuda.linear_backward(workspace, operands, *shape, recipe, &RANDOM);
    }
}

/// The backward pass of linear layers, everything included, in bf16 and in MXFP4; of fc1 also with
/// GELU's derivative before it, as a training step has it.
#[test]
#[ignore = "a measurement"]
fn linear_backward() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| linear_backward_on(&cuda));
}

fn linear_backward_on(cuda: &Cuda) {
    let recipe = |name: &str| *name.parse::<Recipe>().unwrap().linear(0);
    let (bf16, mxfp4) = (recipe("bf16"), recipe("mxfp4-rht-sr"));
    let rows = 16384;
    println!("backward pass, {rows} tokens         bf16 us   mxfp4-rht-sr us   ratio");
    println!("(\"with GELU\": its derivative is part of fc1's, as in a training step)");
    for width in [768, 1024, 2048, 4096] {
        let sequences = Sequences { batch: rows / 1024, length: 1024 };
        let mut scratch = workspace(cuda, sequences, width, width / 64, 64, Precision::Bf16);
        let (mut totals, mut with_gelu) = ([0.0; 2], [0.0; 2]);
        for (name, inputs, outputs) in [
            ("qkv", width, 3 * width),
            ("projection", width, width),
            ("fc1", width, 4 * width),
            ("fc2", 4 * width, width),
        ] {
            let mut layer = Layer::new(cuda, rows, inputs, outputs);
            let shared = std::cell::RefCell::new((&mut layer, &mut scratch));
            let run = |recipe, gelu| {
                let (layer, scratch) = &mut *shared.borrow_mut();
                layer.backward(cuda, scratch, recipe, gelu);
            };
            let mut times = medians(cuda, [&mut || run(&bf16, false), &mut || run(&mxfp4, false)]);
            totals = [totals[0] + times[0], totals[1] + times[1]];
            print(&format!("{width} {name} ({inputs} to {outputs})"), times);
            if name == "fc1" {
                let both: [&mut dyn FnMut(); 2] =
                    [&mut || run(&bf16, true), &mut || run(&mxfp4, true)];
                times = medians(cuda, both);
                print(&format!("{width} {name} with GELU"), times);
            }
            with_gelu = [with_gelu[0] + times[0], with_gelu[1] + times[1]];
            assert!(f32s_of(cuda, &layer.dw).iter().all(|v| v.is_finite()));
        }
        print(&format!("{width} all four"), totals);
        print(&format!("{width} all four with GELU"), with_gelu);
    }
}

/// Linear layers of int8 against those of bf16, and integer products of all their rows at once.
#[test]
#[ignore = "a measurement"]
fn int8_layers() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| int8_layers_on(&cuda));
}

fn int8_layers_on(cuda: &Cuda) {
    let recipe = |name: &str| *name.parse::<Recipe>().unwrap().linear(0);
    let (bf16, int8) = (recipe("bf16"), recipe("int8-switchback"));
    let rows = 16384;
    println!("us of {rows} tokens: forward bf16, int8, integers alone; backward bf16, int8");
    for width in [1024, 2048, 4096] {
        let sequences = Sequences { batch: rows / 1024, length: 1024 };
        let mut scratch = workspace(cuda, sequences, width, width / 64, 64, Precision::Bf16);
        for (inputs, outputs) in
            [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        {
            let mut layer = Layer::new(cuda, rows, inputs, outputs);
            let [a, b, c] =
                [rows * inputs, outputs * inputs, 4 * rows * outputs].map(|len| bytes(cuda, len));
            let product = Product {
                c_type: Type::Int32,
                ..Product::new(
                    Type::Int8,
                    [rows, outputs, inputs],
                    Factor::rows(a.address, inputs),
                    Factor::rows(b.address, inputs),
                    c.address,
                )
            };
            let shared = std::cell::RefCell::new((&mut layer, &mut scratch));
            let forward = |recipe| {
                let (layer, scratch) = &mut *shared.borrow_mut();
                layer.forward(cuda, scratch, recipe);
            };
            let backward = |recipe| {
                let (layer, scratch) = &mut *shared.borrow_mut();
                layer.backward(cuda, scratch, recipe, false);
            };
            let times = medians(
                cuda,
                [
                    &mut || forward(&bf16),
                    &mut || forward(&int8),
                    &mut || cuda.product(shared.borrow().1, &product),
                    &mut || backward(&bf16),
                    &mut || backward(&int8),
                ],
            );
            println!("{inputs:6} to {outputs:6} {}", times.map(|t| format!("{t:9.1}")).concat());
        }
    }
}

fn print(what: &str, [bf16, mxfp4]: [f64; 2]) {
    println!("{what:32} {bf16:9.1} {mxfp4:17.1} {:7.3}", bf16 / mxfp4);
}

/// Losses of 500 steps of a 124M model when MXFP4 operands are multiplied as FP8, and when the same
/// are multiplied as bf16, on the tokens of the file that `MXT_MEASURE_TOKENS` names, else on
/// `tests/text/prose.txt`. What training makes of a small difference is shown beside: a run as FP8
/// that begins with every second value of the embeddings of positions off by a part in a million.
/// `MXT_MEASURE_SCHEDULE`: learning rate and steps of warm-up. After a run, the errors of FP8
/// products of its operands.
#[test]
#[ignore = "a measurement"]
fn losses_of_both_carriers() {
    let data = match std::env::var("MXT_MEASURE_TOKENS") {
        Ok(path) => Dataset::open(&path).unwrap(),
        Err(_) => {
            let bytes = std::fs::read("tests/text/prose.txt").unwrap();
            Dataset::from_tokens(bytes.into_iter().map(u32::from).collect()).unwrap()
        }
    };
    let chosen = std::env::var("MXT_MEASURE_SCHEDULE").unwrap_or_else(|_| "1.5e-4 50".into());
    let (lr, warmup_steps) = chosen.split_once(' ').expect("rate and steps");
    let (lr, warmup_steps) = (lr.parse().unwrap(), warmup_steps.parse().unwrap());
    println!("learning rate {lr:e}, reached after {warmup_steps} steps");
    let losses = |cuda: Option<Cuda>, moved: bool| {
        let engine = Engine::on(Device::Cuda(cuda?.into()));
        let config = ModelConfig {
            vocab_size: 50304,
            context_length: 1024,
            layers: 12,
            heads: 12,
            channels: 768,
            ..ModelConfig::default()
        };
        let model = Model::new(&engine, &config).unwrap();
        if moved {
            let name = "transformer.wpe.weight";
            let mut values = vec![0.0; 1024 * 768];
            model.read_tensor(name, &mut values).unwrap();
            values.iter_mut().step_by(2).for_each(|v| *v *= 1.0 + 1e-6);
            model.write_tensor(name, &values).unwrap();
        }
        let schedule = Schedule { lr, warmup_steps, total_steps: 500, ..Schedule::default() };
        let options = TrainerOptions { batch_size: 16, schedule, ..TrainerOptions::default() };
        let mut trainer = Trainer::new(&model, options).unwrap();
        let mut clamped = 0;
        let losses = (0..10).map(|_| {
            for _ in 0..50 {
                clamped += trainer.step(&data).unwrap().raised_blocks;
            }
            trainer.eval(&data, 24).unwrap().loss
        });
        let losses: Vec<_> = losses.collect();
        println!("{clamped} blocks clamped in 500 steps");
        if clamped > 0 {
            errors_of_fp8_products(&trainer, 4096, 128);
        }
        Some(losses)
    };
    let (Some(fast), Some(slow), Some(moved)) =
        (losses(gpu(), false), losses(older_gpu(), false), losses(gpu(), true))
    else {
        return;
    };
    println!("step   as FP8  as bf16   difference   begun off by 1e-6");
    for (i, ((fast, slow), moved)) in fast.iter().zip(&slow).zip(&moved).enumerate() {
        let percent = |other: &f32| 100.0 * (other - fast) / fast;
        let (slow_off, moved_off) = (percent(slow), percent(moved));
        println!("{:4}  {fast:.5}  {slow:.5}   {slow_off:+.3}%   {moved_off:+.3}%", 50 * (i + 1));
    }
}
