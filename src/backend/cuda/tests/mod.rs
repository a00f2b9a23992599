//! What concerns a GPU alone: codes and FP8 operands as they lie in memory, amax, fused and
//! recorded kernels. What an operation makes of them is in the suite of all backends. Without a GPU
//! every test says so and passes. What the files share is here.

mod amax;
mod carriers;
mod int8;
mod linear;
/// They time what is private here, so they are compiled with the tests.
#[path = "../../../../benches/cuda/measure.rs"]
mod measure;
mod parameters;
mod quantization;

use super::device::memory::{Arena, F32, Gradient, Tensor, Weights};
use super::quantize::random::Drawn;
use super::quantize::{Kept, Quantization};
use super::*;
use crate::backend::conformance::{Harness as _, RANDOM, relative_error};
pub(super) use crate::backend::conformance::{f64s, rounded, workspace};
use crate::backend::{GradientPlace, Memory as _, Precision, Sequences, Slot, reference};
use crate::formats::{
    self, BLOCK, Draw, GemmId, Mxfp4Matrix, OperandId, PowerRule, Purpose, Range, Rounding, Signs,
    Source, Transform, uniform,
};
use crate::optim::{Master, ParamKind};

pub(super) const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// How MXFP4 is rounded, and in which part of its range: all that is defined.
pub(super) const ROUNDINGS: [(Rounding, Range); 3] =
    [(Rounding::Nearest, Range::Full), (Rounding::Nearest, Range::ThreeQuarters), UNBIASED];

pub(super) const UNBIASED: (Rounding, Range) = (Rounding::Unbiased, Range::ThreeQuarters);

/// The GPU, or None after a line that says why there is none.
pub(super) fn gpu() -> Option<Cuda> {
    open().map(|gpu| Cuda::of(gpu).unwrap())
}

/// The GPU, before anything else has it.
pub(super) fn open() -> Option<Gpu> {
    match Gpu::open(0, None, &kernels::FILES, &|_| ()) {
        Ok(gpu) => Some(gpu),
        Err(error @ Error::Unsupported { .. }) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Runs `f` on the GPU in both precisions.
pub(super) fn each_precision(f: impl Fn(&Cuda, Precision)) {
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

pub(super) fn normal(len: usize, std: f32, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; len];
    crate::formats::fill_normal(&mut values, std, &Draw::of(seed, Purpose::Weights, 81, 0), 0);
    values
}

/// `values` as the precision holds them.
pub(super) fn tensor(cuda: &Cuda, values: &[f32], precision: Precision) -> Tensor {
    let mut measuring = Arena::measuring(&cuda.gpu);
    measuring.tensor(values.len(), precision);
    let mut arena = Arena::allocated(&cuda.gpu, measuring.used()).unwrap();
    let mut tensor = arena.tensor(values.len(), precision);
    cuda.write_tensor(&mut tensor, values);
    tensor
}

/// A tensor of NaN, to be overwritten.
pub(super) fn poison(cuda: &Cuda, len: usize, precision: Precision) -> Tensor {
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
    Slot { index: 0, start: 0, len, rows: 1, kind: ParamKind::Matrix }
}

pub(super) fn param(cuda: &Cuda, values: &[f32]) -> Weights {
    let mut arena = Arena::allocated(&cuda.gpu, values.len() * 6 + 1024).unwrap();
    let mut param = arena.weights(values.len(), 1, Master::F32);
    cuda.write_param(&mut param, alone(values.len()), values).unwrap();
    param
}

pub(super) fn write_bytes(cuda: &Cuda, to: u64, bytes: &[u8]) {
    cuda.write(to, bytes).unwrap();
}

pub(super) fn read_bytes(cuda: &Cuda, from: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; len];
    cuda.read(from, &mut bytes).unwrap();
    bytes
}

/// A buffer as the gradient of one parameter.
pub(super) fn gradient(buffer: &mut F32) -> Gradient<'_> {
    let place = GradientPlace { precision: Precision::F32, start: 0, len: buffer.len };
    Gradient::at(&buffer.piece, place)
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

/// The GPU as if it were of an older generation, whose kernels its own then have no part in.
pub(super) fn older_gpu() -> Option<Cuda> {
    let mut gpu = open()?;
    gpu.capability = (8, 0);
    Some(Cuda::of(gpu).unwrap())
}

/// dy (rows, cols) with a transform of this group, no form of it yet.
pub(super) fn of_dy(
    source: quantize::Source,
    (rows, cols): (usize, usize),
    group: usize,
    (rounding, range): (Rounding, Range),
) -> Quantization {
    Quantization {
        source,
        rows,
        cols,
        by_rows: None,
        by_columns: None,
        sums: 0,
        amax: 0,
        clamped: 0,
        kept: Kept::AsStored,
        rounding,
        rule: PowerRule::Floor,
        range,
        drawn: Drawn {
            random: RANDOM,
            gemms: [GemmId::Dgrad, GemmId::Wgrad],
            operand: OperandId::Dy,
            transform: (group > 0).then(|| Transform::new(group, Signs::Random).unwrap()),
        },
    }
}

/// What the definition makes of it, along rows and down columns.
pub(super) fn exact_forms(
    data: &[f32],
    (rows, cols): (usize, usize),
    group: usize,
    (rounding, range): (Rounding, Range),
) -> [Mxfp4Matrix; 2] {
    let operand = formats::Operand::from(rounding).with_range(range).unwrap();
    let forms = [(GemmId::Dgrad, rows, cols), (GemmId::Wgrad, cols, rows)];
    forms.map(|(gemm, rows, depth)| {
        let mut signs = vec![0.0; group];
        RANDOM.signs(gemm).fill_signs(&mut signs);
        let source = Source { data, rows, depth, transposed: gemm == GemmId::Wgrad };
        Mxfp4Matrix::quantize(source, &signs, operand, &RANDOM.rounding(OperandId::Dy))
    })
}

/// The bits of the largest magnitude, NaN being larger than everything.
pub(super) fn amax_of(values: &[f32]) -> u32 {
    values.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap_or(0)
}

/// A word on the device.
pub(super) fn word(cuda: &Cuda, address: u64) -> u32 {
    u32::from_le_bytes(read_bytes(cuda, address, 4).try_into().unwrap())
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

/// Compares FP8 values with the definition's, of which those in blocks too far below `amax` have
/// their scale clamped. Their number is returned.
pub(super) fn compare_fp8(
    what: &str,
    ours: &[f64],
    exact: &Mxfp4Matrix,
    format: Type,
    amax: u32,
    group: usize,
) -> u32 {
    let range = if format == Type::E5m2 { 28 } else { 14 };
    let slack = match group {
        0 => 0,
        32 | 64 => 3,
        _ => 4,
    };
    let top = ((amax >> 23).saturating_sub(2) + slack).max(16);
    let mut clamped = 0;
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
        clamped += 1;
        // Valid MXFP4 of the lowest scale that fits.
        let unit = 2f64.powi(top as i32 - range as i32 - 127);
        let grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        let valid = ours.iter().all(|v| grid.contains(&(v.abs() / unit)));
        assert!(valid, "{what}: block {block} clamped to {ours:?}");
    }
    clamped
}
