//! Operands of products, and what becomes of them.

use super::device::gemm::{Operand, Product};
use super::device::memory::Piece;
use super::quantize::{Source as From, Target};
use super::*;
use crate::backend::Device;
use crate::{Dataset, Engine, Model, ModelConfig, Schedule, Trainer, TrainerOptions};

/// Codes and scales are those of the scalar definition, bit for bit; values are what they stand
/// for.
#[test]
fn mxfp4_codes_are_those_of_the_definition() {
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
            for (group, transposed, rounding) in [0, 32, 64, 128, 256]
                .into_iter()
                .flat_map(|group| [(group, false), (group, true)])
                .flat_map(|(group, transposed)| {
                    ROUNDINGS.map(|rounding| (group, transposed, rounding))
                })
            {
                let what =
                    format!("{precision:?} ({rows}, {cols}) {group} {transposed} {rounding:?}");
                let exact = exact_forms(&values, (rows, cols), group, rounding);
                let exact = &exact[usize::from(transposed)];
                let elements = exact.rows * exact.depth;
                let mut arena = Arena::allocated(&cuda.gpu, 4 * elements + 1024).unwrap();
                let [codes, scales, out] =
                    [elements / 2, elements / BLOCK, 2 * elements].map(|n| arena.bytes(n));
                let poison = vec![0xaa; elements * 2];
                write_bytes(cuda, out.address, &poison);
                write_bytes(cuda, codes.address, &poison[..elements / 2]);
                write_bytes(cuda, scales.address, &poison[..elements / BLOCK]);
                let of_dy = of_dy(From::of(&source), (rows, cols), group, rounding);
                for (format, out) in [(Type::E2m1, &codes), (Type::Bf16, &out)] {
                    let target = Some(Target { format, out: out.address, scales: scales.address });
                    let (by_rows, by_columns) =
                        if transposed { (None, target) } else { (target, None) };
                    Quantization { by_rows, by_columns, ..of_dy }.run(cuda);
                }
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
    });
}

/// FP8 operands on the device: bytes of one or two forms; factor, clamped blocks and largest
/// magnitude; sums.
struct Fp8 {
    out: [Piece; 2],
    words: Piece,
    sums: Option<Piece>,
}

impl Fp8 {
    fn new(cuda: &Cuda, elements: usize, sums: usize, values: &[f32]) -> Self {
        let bytes = 2 * elements + 4 * sums + 4096;
        let mut arena = Arena::allocated(&cuda.gpu, bytes).unwrap();
        let out = [arena.bytes(elements), arena.bytes(elements)];
        let sums = (sums > 0).then(|| arena.bytes(4 * sums)).inspect(|piece| {
            write_bytes(cuda, piece.address, &vec![0xff; 4 * sums]);
        });
        let fp8 = Self { out, words: arena.bytes(12), sums };
        write_bytes(cuda, fp8.out[0].address, &vec![0xaa; elements]);
        write_bytes(cuda, fp8.out[1].address, &vec![0xaa; elements]);
        let words: Vec<u8> =
            [0, 0, amax_of(values)].into_iter().flat_map(u32::to_le_bytes).collect();
        write_bytes(cuda, fp8.words.address, &words);
        fp8
    }

    /// Makes these forms of `of` here; the number of parts of the sums is returned.
    fn make(&self, cuda: &Cuda, of: Quantization, format: Type, forms: [bool; 2]) -> usize {
        let [scales, clamped, amax] = [0, 4, 8].map(|offset| self.words.address + offset);
        let target =
            |i: usize| forms[i].then(|| Target { format, out: self.out[i].address, scales });
        let sums = self.sums.as_ref().map_or(0, |sums| sums.address);
        let (by_rows, by_columns) = (target(0), target(1));
        Quantization { by_rows, by_columns, sums, clamped, amax, ..of }.run(cuda)
    }

    fn factor(&self, cuda: &Cuda) -> f64 {
        f64::from(f32::from_bits(word(cuda, self.words.address)))
    }

    fn clamped(&self, cuda: &Cuda) -> u32 {
        word(cuda, self.words.address + 4)
    }

    /// Form `form` as values.
    fn values(&self, cuda: &Cuda, form: usize, elements: usize, format: Type) -> Vec<f64> {
        let factor = self.factor(cuda);
        let bytes = read_bytes(cuda, self.out[form].address, elements);
        bytes.into_iter().map(|byte| factor * decode_fp8(byte, format)).collect()
    }
}

/// FP8 operands are the definition's numbers, but for clamped blocks, which are counted; the sums
/// are those of the columns; a NaN makes the factor one.
#[test]
fn fp8_operands_are_those_of_the_definition() {
    let Some(cuda) = gpu() else { return };
    let cuda = &cuda;
    let mut clamped_in_all = 0;
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
            let amax = amax_of(&values);
            let sums: Vec<f64> = (0..cols)
                .map(|c| (0..rows).map(|r| f64::from(values[r * cols + c])).sum())
                .collect();
            for (group, rounding) in [0, 32, 64, 128, 256]
                .into_iter()
                .flat_map(|group| ROUNDINGS.map(|rounding| (group, rounding)))
            {
                let exact = exact_forms(&values, (rows, cols), group, rounding);
                let elements = exact.each_ref().map(|exact| exact.rows * exact.depth);
                let room = elements[0].max(elements[1]);
                let of_dy = of_dy(From::of(&source), (rows, cols), group, rounding);
                for (format, forms) in [
                    (Type::E4m3, [false, true]),
                    (Type::E5m2, [false, true]),
                    (Type::E5m2, [true, false]),
                    (Type::E5m2, [true, true]),
                ] {
                    let wide = precision == Precision::F32 && format == Type::E5m2;
                    if wide || forms == [true, true] && group > 64 {
                        continue;
                    }
                    let what = format!(
                        "{precision:?} ({rows}, {cols}) g {group} {forms:?} {rounding:?} {format:?}"
                    );
                    let fp8 = Fp8::new(cuda, room, (rows + 256) * cols, &values);
                    let parts = fp8.make(cuda, of_dy, format, forms);
                    let mut clamped = 0;
                    for i in (0..2).filter(|i| forms[*i]) {
                        let ours = fp8.values(cuda, i, elements[i], format);
                        clamped += compare_fp8(&what, &ours, &exact[i], format, amax, group);
                    }
                    assert_eq!(fp8.clamped(cuda), clamped, "{what}");
                    clamped_in_all += clamped;
                    if forms[1] {
                        let bytes =
                            read_bytes(cuda, fp8.sums.as_ref().unwrap().address, 4 * parts * cols);
                        let numbers = bytes.as_chunks::<4>().0.iter();
                        let numbers: Vec<f32> = numbers.map(|b| f32::from_le_bytes(*b)).collect();
                        let ours: Vec<f32> =
                            (0..cols).map(|c| numbers.iter().skip(c).step_by(cols).sum()).collect();
                        close(&what, &ours, &sums, 1e-5);
                    }
                    if forms == [true, true] {
                        let mut poisoned = values.clone();
                        poisoned[rows * cols / 2] = f32::NAN;
                        let fp8 = Fp8::new(cuda, room, (rows + 256) * cols, &poisoned);
                        let poisoned = tensor(cuda, &poisoned, precision);
                        let of_dy = Quantization { source: From::of(&poisoned), ..of_dy };
                        fp8.make(cuda, of_dy, format, forms);
                        assert!(fp8.factor(cuda).is_nan(), "{what}");
                    }
                }
            }
        }
    }
    assert!(clamped_in_all > 100, "only {clamped_in_all} blocks were clamped");
}

/// A matrix (rows, cols), which products read along its rows or down its columns.
struct Matrix {
    values: Vec<f32>,
    down_columns: bool,
    rows: usize,
    cols: usize,
}

/// How far the FP8 product of these, quantized, is from the f64 product of the same numbers. `a` is
/// dy.
fn error_of_fp8_product(cuda: &Cuda, what: &str, [a, b]: &[Matrix; 2]) -> f64 {
    let made = |factor: &Matrix, operand, format| {
        let &Matrix { ref values, down_columns, rows, cols } = factor;
        let source = tensor(cuda, values, Precision::Bf16);
        let fp8 = Fp8::new(cuda, rows * cols, 0, values);
        let of_dy = of_dy(From::of(&source), (rows, cols), 64, UNBIASED);
        let drawn = of_dy.drawn.of_other(GemmId::Dgrad, operand);
        let form = usize::from(down_columns);
        let forms = [!down_columns, down_columns];
        fp8.make(cuda, Quantization { drawn, ..of_dy }, format, forms);
        let numbers = fp8.values(cuda, form, rows * cols, format);
        let [vectors, depth] = if down_columns { [cols, rows] } else { [rows, cols] };
        (fp8.out[form].address, fp8, numbers, vectors, depth)
    };
    let (at_a, a, a_numbers, m, k) = made(a, OperandId::Dy, Type::E5m2);
    let (at_b, b, b_numbers, n, _) = made(b, OperandId::W, Type::E4m3);
    let exact = reference::product(&a_numbers, &b_numbers, m, n, k);
    let sequences = Sequences { batch: 1, length: 16 };
    let scratch = workspace(cuda, sequences, 16, 1, 8, Precision::Bf16);
    let c = f32_buffer(cuda, &vec![f32::NAN; m * n]);
    let product = Product {
        m,
        n,
        k,
        operands: [Type::E5m2, Type::E4m3],
        a: Operand::rows(at_a, k),
        b: Operand::rows(at_b, k),
        c: c.address(),
        c_stride: n,
        c_type: Type::F32,
        alpha: 1.0,
        factors: None,
        accumulate: false,
        bias: None,
        scales: Some([a.words.address, b.words.address]),
    };
    cuda.product(&scratch, &product);
    let error = relative_error(&f64s(&f32s_of(cuda, &c)), &exact);
    let clamped = [&a, &b].map(|fp8| fp8.clamped(cuda));
    println!("{what} ({m}, {n}, {k}): error {error:.1e}, clamped {clamped:?}");
    error
}

/// Products of FP8 operands against the f64 product of the same numbers, on ordinary, heavy-tailed
/// and widely spread values, and on a gradient, weights and inputs of a model in training.
#[test]
fn fp8_products_are_exact() {
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
        let a = Matrix { values: values(m * k, 1), down_columns: false, rows: m, cols: k };
        let b = Matrix { values: values(n * k, 2), down_columns: true, rows: k, cols: n };
        let error = cuda.gpu.scope(|| error_of_fp8_product(&cuda, kind, &[a, b]));
        assert!(error <= 1e-6, "{kind}: {error:e}");
    }

    // A model that has been trained on prose for a while.
    let text = include_bytes!("../../../../tests/text/prose.txt");
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
    // NOTE: what the definition allows every backend. Where scales of neighbouring blocks lie far
    // apart, as those of the gradients of different heads do, tensor cores lose bits of the lower
    // one: up to 2.8e-6 was seen.
    for error in errors_of_fp8_products(&trainer, 1024, 768) {
        assert!(error <= 1e-5, "{error:e}");
    }
}

/// The errors of the FP8 products, dgrad and wgrad, of the first qkv layer after a training step.
/// Of wgrad the first `width` results and inputs, over the first `rows` rows; of dgrad the first
/// 256 rows and `width` inputs, over all results.
pub(super) fn errors_of_fp8_products(trainer: &Trainer, rows: usize, width: usize) -> [f64; 2] {
    let model = trainer.model();
    let Device::Cuda(cuda) = model.engine().backend() else { unreachable!("trained on one") };
    let inputs = model.config().channels;
    let outputs = 3 * inputs;
    let [dy, x] =
        trainer.qkv_gradient_and_input().map(|tensor| cuda.gpu.scope(|| cuda.read_tensor(tensor)));
    let mut w = vec![0.0; inputs * outputs];
    model.read_tensor("transformer.h.0.attn.c_attn.weight", &mut w).unwrap();
    // Of a matrix with rows this long.
    let corner = |values: &[f32], length: usize, down_columns, rows: usize, cols: usize| {
        let rows_of = values.chunks(length).take(rows);
        let values = rows_of.flat_map(|row| row[..cols].iter().copied()).collect();
        Matrix { values, down_columns, rows, cols }
    };
    let w: Vec<_> = (0..outputs * inputs).map(|i| w[i % inputs * outputs + i / inputs]).collect();
    let w = rounded(&w, Precision::Bf16);
    let dgrad = [
        corner(&dy, outputs, false, rows.min(256), outputs),
        corner(&w, inputs, true, outputs, width.min(inputs)),
    ];
    let wgrad = [
        corner(&dy, outputs, true, rows, width.min(outputs)),
        corner(&x, inputs, true, rows, width.min(inputs)),
    ];
    [("dgrad of a model", dgrad), ("wgrad of a model", wgrad)]
        .map(|(what, factors)| cuda.gpu.scope(|| error_of_fp8_product(cuda, what, &factors)))
}
