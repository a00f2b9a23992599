//! What concerns a GPU alone: codes and FP8 operands as they lie in memory, largest magnitudes, fused and
//! recorded kernels. What an operation makes of them is in the suite of all backends. Without a GPU every
//! test says so and passes.

use super::gemm::Type;
use super::*;
use crate::backend::conformance::{
    Harness as _, RANDOM, STEP, Update, relative_error, some_values,
};
pub(super) use crate::backend::conformance::{f64s, rounded, workspace};
use crate::backend::{
    Activation, Device, LinearBackward, NormParams, NormShape, OutputGradient, ResidualSum,
    Sequences, StepPlan, reference,
};
use crate::mx::{BLOCK, Draw, GemmId, Mxfp4Matrix, OperandId, Purpose, Rounding, Source, uniform};
use crate::recipe::{Backward, Recipe};
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

/// Normal values.
fn normal(len: usize, std: f32, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; len];
    crate::mx::fill_normal(&mut values, std, &Draw::of(seed, Purpose::Weights, 81, 0), 0);
    values
}

pub(super) fn tensor(cuda: &Cuda, values: &[f32], precision: Precision) -> Tensor {
    let mut measuring = Arena::measuring(&cuda.gpu);
    measuring.tensor(values.len(), precision);
    let mut arena = Arena::allocated(&cuda.gpu, measuring.used()).unwrap();
    let mut tensor = arena.tensor(values.len(), precision);
    cuda.write_tensor(&mut tensor, values);
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

/// The slot of a parameter that lies alone in its buffer.
pub(super) fn alone(len: usize) -> Slot {
    Slot { index: 0, start: 0, len, decays: true }
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

pub(super) fn f32s_of(cuda: &Cuda, buffer: &F32) -> Vec<f32> {
    let mut values = vec![0.0; buffer.len];
    cuda.read_f32(buffer, 0, &mut values).unwrap();
    values
}

#[track_caller]
pub(super) fn close(what: &str, ours: &[f32], exact: &[f64], bound: f64) {
    let error = relative_error(&f64s(ours), exact);
    assert!(error <= bound, "{what}: relative error {error:e} above {bound:e}");
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

/// The GPU as if it were of an older generation, whose kernels its own then have no part in.
pub(super) fn older_gpu() -> Option<Cuda> {
    let mut gpu = open()?;
    gpu.capability = (8, 0);
    Some(Cuda::of(gpu).unwrap())
}

/// An update makes the copies that GEMMs read, and notes the largest magnitudes, of what it leaves.
#[test]
fn updates_leave_copies_and_largest_magnitudes() {
    let Some(cuda) = gpu() else { return };
    let mut update = Update::of(&cuda, &some_values());
    cuda.gpu.scope(|| update.step(&cuda, &STEP));
    for (param, values) in update.parameters(&cuda) {
        let most = u32::from_le_bytes(read_bytes(&cuda, param.most.address, 4).try_into().unwrap());
        assert_eq!(most, values.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap());
        let copy = read_bytes(&cuda, param.copy.address, 2 * values.len());
        let copy = copy.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b));
        assert!(copy.eq(values.iter().map(|v| half::bf16::from_f32(*v))));
    }
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
    let scratch = workspace(cuda, sequences, 16, 1, 8, Precision::Bf16);
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
        trainer.qkv_gradient_and_input().map(|tensor| cuda.gpu.scope(|| cuda.read_tensor(tensor)));
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
            let stored = cuda.read_tensor(tensor);
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
        let mut scratch = workspace(cuda, sequences, inputs.max(outputs), 1, 8, Precision::Bf16);
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
                let all = [cuda.read_tensor(dx), f32s_of(cuda, dw), f32s_of(cuda, db)];
                all.concat().iter().map(|v| if v.is_nan() { 0 } else { v.to_bits() }).collect()
            };
            let random = Random { step: 9, micro_step: 0, ..RANDOM };

            let mut dy = tensor(cuda, &d, Precision::Bf16);
            cuda.gelu_backward(&mut dy, &pre, rows * outputs, form);
            let mut backward = |dx: &mut Tensor,
                                dw: &mut F32,
                                db: &mut F32,
                                dy: OutputGradient<'_, Cuda>,
                                random: &Random| {
                let [dw, db] = [dw, db].map(|flat| flat.gradient(alone(flat.len)));
                let (w, accumulate) = (w.param(alone(outputs * inputs)), false);
                let operands = LinearBackward { dx, dw, db, dy, x: &x, w, accumulate };
                cuda.linear_backward(&mut scratch, operands, shape, &recipe, random);
            };
            backward(&mut dx, &mut dw, &mut db, OutputGradient::Whole(&dy), &random);
            let expected: Vec<u32> = results(&dx, &dw, &db);
            assert_eq!(kind == "not finite", !f32s_of(cuda, &dw)[5 * inputs].is_finite(), "{what}");

            // Twice, the second time where no zeroed words are left; then as the third of three steps, which
            // is the second one recorded.
            let mut dy = tensor(cuda, &d, Precision::Bf16);
            let before = cuda.read_tensor(&dy);
            for words_left in [true, false] {
                let mut dy = tensor(cuda, &d, Precision::Bf16);
                while !words_left && dy.noting() != 0 {}
                let behind = OutputGradient::BehindGelu { d: &mut dy, y: &pre, form };
                backward(&mut dx, &mut dw, &mut db, behind, &random);
                assert!(results(&dx, &dw, &db) == expected, "{what}");
                let Backward::Mxfp4(format) = recipe.dgrad else { continue };
                let group = format.transform.map(|transform| transform.group);
                let fused = form == Activation::GeluTanh
                    && cuda.road(shape) == Road::Fp8
                    && group == Some(64);
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&cuda.read_tensor(&dy)) == bits(&before), fused, "{what}");
            }
            let mut recordings = cuda.recordings();
            let copy = tensor(cuda, &d, Precision::Bf16);
            for step in 7..10 {
                let plan = StepPlan {
                    accumulate: false,
                    precision: Precision::Bf16,
                    head: Precision::Bf16,
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
                    let behind = OutputGradient::BehindGelu { d: &mut dy, y: &pre, form };
                    backward(&mut dx, &mut dw, &mut db, behind, &Random { step, ..random });
                });
            }
            assert!(results(&dx, &dw, &db) == expected, "{what}, recorded");
        }
    }
}
