//! Every operation against its scalar twin, in both precisions, at sizes that nothing divides; what
//! its files share is here. Without a GPU every test says so and passes.

mod attention;
mod carriers;
mod classifier;
mod embedding;
mod linear;
mod measure;
mod norm;
mod optimizer;
mod quantization;

use super::device::gemm::Type;
use super::quantize::Quantization;
use super::quantize::random::Drawn;
use super::*;
use crate::backend::BackwardWorkspace;
use crate::mx::{
    self, BLOCK, Draw, GemmId, LinearId, Mxfp4Matrix, OperandId, Purpose, Rounding, Source, uniform,
};
use crate::recipe::{Signs, Transform};

pub(super) const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

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

/// Relative error that rounding a result to the precision may leave, with some room for sums.
pub(super) fn bound(precision: Precision) -> f64 {
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

pub(super) fn tokens(cuda: &Cuda, values: &[u32]) -> Tokens {
    let mut measuring = Arena::measuring(&cuda.gpu);
    Tokens::new(&mut measuring, values.len()).unwrap();
    let mut arena = Arena::allocated(&cuda.gpu, measuring.used()).unwrap();
    let mut tokens = Tokens::new(&mut arena, values.len()).unwrap();
    tokens.write(values);
    tokens
}

pub(super) fn some_tokens(len: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let draw = Draw::of(seed, Purpose::Order, 80, 0);
    (0..len).map(|i| draw.bits(i as u32, 0)[0] % vocab as u32).collect()
}

/// Normal values.
pub(super) fn normal(len: usize, std: f32, seed: u64) -> Vec<f32> {
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
pub(super) fn poison(cuda: &Cuda, len: usize, precision: Precision) -> Tensor {
    tensor(cuda, &vec![f32::NAN; len], precision)
}

pub(super) fn f32_buffer(cuda: &Cuda, values: &[f32]) -> F32 {
    let mut arena = Arena::allocated(&cuda.gpu, values.len() * 4 + 256).unwrap();
    let mut buffer = arena.f32(values.len());
    cuda.write_f32(&mut buffer, values).unwrap();
    buffer
}

pub(super) fn param(cuda: &Cuda, values: &[f32]) -> Param {
    let mut arena = Arena::allocated(&cuda.gpu, values.len() * 6 + 1024).unwrap();
    let mut param = arena.param(values.len());
    cuda.write_param(&mut param, values).unwrap();
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

pub(super) fn values_of(cuda: &Cuda, tensor: &Tensor) -> Vec<f32> {
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
    cuda.read_f32(buffer, &mut values).unwrap();
    values
}

pub(super) fn workspace(cuda: &Cuda, shape: &WorkspaceShape) -> Workspace {
    let mut measuring = Arena::measuring(&cuda.gpu);
    Workspace::new(&mut measuring, shape);
    Workspace::new(&mut Arena::allocated(&cuda.gpu, measuring.used()).unwrap(), shape)
}

pub(super) fn workspace_shape(
    sequences: Sequences,
    channels: usize,
    heads: usize,
    vocab_size: usize,
    precision: Precision,
) -> WorkspaceShape {
    WorkspaceShape {
        sequences,
        channels,
        mlp_channels: 4 * channels,
        heads,
        vocab_size,
        forward: if precision == Precision::F32 { Forward::F32 } else { Forward::Fp8 },
        backward: Some(BackwardWorkspace {
            f32: precision == Precision::F32,
            mxfp4_group: Some(256),
        }),
    }
}

/// |a - b| / |b|, Frobenius.
pub(super) fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
    (difference / b.iter().map(|v| v * v).sum::<f64>().max(1e-300)).sqrt()
}

#[track_caller]
pub(super) fn close(what: &str, ours: &[f32], exact: &[f64], bound: f64) {
    let error = relative_error(&f64s(ours), exact);
    assert!(error <= bound, "{what}: relative error {error:e} above {bound:e}");
}

pub(super) fn plus_one(values: Vec<f64>) -> Vec<f64> {
    values.into_iter().map(|v| v + 1.0).collect()
}

/// The GPU as if it were of an older generation, whose kernels its own then have no part in.
pub(super) fn older_gpu() -> Option<Cuda> {
    let mut gpu = open()?;
    gpu.capability = (8, 0);
    Some(Cuda::of(gpu).unwrap())
}

/// Random numbers of all tests.
pub(super) const RANDOM: Random =
    Random { seed: 42, step: 7, micro_step: 1, layer: 3, linear: LinearId::Fc1 };

/// dy (rows, cols) with a transform of this group, no form of it yet.
pub(super) fn of_dy(
    source: quantize::Source,
    (rows, cols): (usize, usize),
    group: usize,
    rounding: Rounding,
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
        kept: false,
        rounding,
        drawn: Drawn {
            random: RANDOM,
            gemms: [GemmId::Dgrad, GemmId::Wgrad],
            operand: OperandId::Dy,
            transform: (group > 0).then_some(Transform { group, signs: Signs::Random }),
        },
    }
}

/// What the definition makes of it, along rows and down columns.
pub(super) fn exact_forms(
    data: &[f32],
    (rows, cols): (usize, usize),
    group: usize,
    rounding: Rounding,
) -> [Mxfp4Matrix; 2] {
    let forms = [(GemmId::Dgrad, rows, cols), (GemmId::Wgrad, cols, rows)];
    forms.map(|(gemm, rows, depth)| {
        let mut signs = vec![0.0; group];
        RANDOM.signs(gemm).fill_signs(&mut signs);
        let source = Source { data, rows, depth, transposed: gemm == GemmId::Wgrad };
        Mxfp4Matrix::quantize(source, &signs, rounding, &RANDOM.rounding(OperandId::Dy))
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
