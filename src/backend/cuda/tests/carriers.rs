//! What carries products on Blackwell chips, on whichever chip is there.

use super::device::compile;
use super::device::gemm::{Operand, Product};
use super::emulator::{check_mxfp8, operand};
use super::kernels::FILES;
use super::quantize::carrier::{Carrier, multiply_fp4, tiled};
use super::quantize::values::Of;
use super::quantize::{Source as From, Target};
use super::*;
use crate::backend::conformance::linear_layers_follow_their_recipes;
use crate::backend::{LinearShape, Numbers};
use crate::formats::decode_e8m0;
use crate::recipe::Recipe;

/// `multiply` of `product_sm120.cu` for chips without the instruction.
const SPELLED_OUT: &str = "
    #define EMULATED
    __device__ __forceinline__ float element(u32 codes, u32 i) {
      u32 code = codes >> 4 * i & 15, magnitude = code & 7;
      float v = magnitude < 2 ? 0.5f * magnitude : __uint_as_float((magnitude + 252) << 22);
      return code & 8 ? -v : v;
    }
    __device__ __forceinline__ float times_scale(float v, u32 scales, u32 block) {
      u32 byte = scales >> 8 * block & 255;
      return v * __uint_as_float(byte == 255 ? 0x7fc00000 : byte == 0 ? 0x00400000 : byte << 23);
    }
    __device__ __forceinline__ void multiply(float d[4], const u32 a[4], const u32 b[2],
                                             u32 a_scales, u32 b_scales) {
      u32 lane = threadIdx.x % WARP, row = lane / 4, column = lane % 4 * 2;
      u32 of_rows[2], of_columns[2];
      for (u32 i = 0; i < 2; i++) {
        of_rows[i] = __shfl_sync(FULL_WARP, a_scales, 4 * row + i);
        of_columns[i] = __shfl_sync(FULL_WARP, b_scales, 4 * (column + i));
      }
      for (u32 block = 0; block < 2; block++) {
        float dots[4] = {};
        for (u32 part = 0; part < 4; part++) {
          u32 x[2], y[2];
          for (u32 i = 0; i < 2; i++) {
            x[i] = __shfl_sync(FULL_WARP, a[2 * block + i], 4 * row + part);
            y[i] = __shfl_sync(FULL_WARP, b[block], 4 * (column + i) + part);
          }
          for (u32 i = 0; i < 32; i++)
            dots[i / 8] += element(x[i / 16], i % 8) * element(y[i / 8 % 2], i % 8);
        }
        for (u32 i = 0; i < 4; i++)
          d[i] += times_scale(times_scale(dots[i], of_rows[i / 2], block), of_columns[i % 2],
                              block);
      }
    }
    ";

/// The GPU as if it had this capability: what it lacks is spelled out, or done on the host. None,
/// after a line that says why, where it has not even the kernels.
fn gpu_as(capability: (i32, i32)) -> Option<Cuda> {
    let mut gpu = open()?;
    let own = gpu.capability;
    let best = |capability| Carrier::best(Format::MXFP4, capability);
    let carrier = best(capability);
    if best(own) == carrier {
        return Some(Cuda::of(gpu).unwrap());
    }
    if carrier == Carrier::Mxfp8 && own < (8, 9) {
        println!("skipped: {} has no FP8 numbers", gpu.name);
        return None;
    }
    if carrier == Carrier::Fp4 {
        let file = FILES.iter().find(|file| file.name == "product_sm120").unwrap();
        let (own_text, before) = file.texts.split_last().unwrap();
        let texts = [before, &[SPELLED_OUT, own_text]].concat();
        let kernels = (file.kernels)(capability);
        let architecture = compile::architecture(own);
        let compiled = compile::cubin(file.name, &texts, &kernels, &architecture).unwrap();
        gpu.load(&compiled).unwrap();
    }
    gpu.capability = capability;
    let mut cuda = Cuda::of(gpu).unwrap();
    cuda.stand_in = Some(multiply_on_host);
    Some(cuda)
}

/// A product of MXFP8 operands.
fn multiply_on_host(cuda: &Cuda, product: &Product) {
    let &Product { m, n, k, c, c_stride, .. } = product;
    let values = |address, scales, vectors| -> Vec<f64> {
        let elements = read_bytes(cuda, address, vectors * k);
        let scales = read_bytes(cuda, scales, Carrier::Mxfp8.scale_bytes(vectors, k));
        let value = |(i, byte): (usize, &u8)| {
            let scale = scales[tiled(i / k, i % k / BLOCK, k / BLOCK)];
            decode_fp8(*byte, Type::E4m3) * f64::from(decode_e8m0(scale))
        };
        elements.iter().enumerate().map(value).collect()
    };
    let [a_scales, b_scales] = product.scales.unwrap();
    let (a, b) = (values(product.a.address, a_scales, m), values(product.b.address, b_scales, n));
    let exact = reference::product(&a, &b, m, n, k);
    let size = if product.c_type == Type::F32 { 4 } else { 2 };
    let mut bytes = read_bytes(cuda, c, m * c_stride * size);
    for (i, exact) in exact.into_iter().enumerate() {
        let at = (i / n * c_stride + i % n) * size;
        let here = &mut bytes[at..at + size];
        let mut value = f64::from(product.alpha) * exact;
        if size == 4 {
            if product.accumulate {
                value += f64::from(f32::from_le_bytes((&*here).try_into().unwrap()));
            }
            here.copy_from_slice(&(value as f32).to_le_bytes());
        } else {
            assert!(!product.accumulate, "activations are never added to");
            here.copy_from_slice(&half::bf16::from_f64(value).to_le_bytes());
        }
    }
    write_bytes(cuda, c, &bytes);
}

#[test]
fn chips_have_their_carriers() {
    use Carrier::{Bf16, Fp4, Fp8, Mxfp8};
    for (capability, fits, does_not, fp8) in [
        ((8, 0), Bf16, Bf16, Bf16),
        ((8, 9), Fp8, Bf16, Fp8),
        ((9, 0), Fp8, Bf16, Fp8),
        ((10, 0), Mxfp8, Bf16, Fp8),
        ((10, 3), Mxfp8, Bf16, Fp8),
        ((11, 0), Mxfp8, Bf16, Fp8),
        ((12, 0), Fp4, Fp4, Fp8),
        ((12, 1), Fp4, Fp4, Fp8),
        ((13, 0), Fp8, Bf16, Fp8),
    ] {
        let carrier = |format, n| {
            let layer = LinearShape { rows: 64, inputs: n, outputs: 96 };
            Carrier::of(format, capability, layer)
        };
        assert_eq!(carrier(Format::MXFP4, 48), fits, "{capability:?}");
        assert_eq!(carrier(Format::MXFP4, 40), does_not, "{capability:?}");
        assert_eq!(carrier(Format::E4M3, 48), fp8, "{capability:?}");
        assert_eq!(carrier(Format::E4M3, 40), Bf16, "{capability:?}");
    }
}

/// What multiplies forward, dgrad and wgrad of some recipes on an A100, an H100 and two Blackwells.
#[test]
fn chips_multiply_recipes_in_their_numbers() {
    use Numbers::{Bf16, F32, Fp4, Fp8, Int8, Mxfp8};
    let fits = LinearShape { rows: 64, inputs: 48, outputs: 96 };
    let does_not = LinearShape { inputs: 40, ..fits };
    for (recipe, capability, shape, expected) in [
        ("fp32", (9, 0), fits, [F32; 3]),
        ("bf16", (9, 0), fits, [Bf16; 3]),
        ("bf16,mantissa=3", (9, 0), fits, [Bf16; 3]),
        ("fp8", (8, 0), fits, [Bf16; 3]),
        ("fp8", (9, 0), fits, [Fp8; 3]),
        ("fp8", (9, 0), does_not, [Bf16; 3]),
        ("mxfp4-rht-sr", (8, 0), fits, [Bf16; 3]),
        ("mxfp4-rht-sr", (9, 0), fits, [Bf16, Fp8, Fp8]),
        ("mxfp4-rht-sr,wgrad=bf16", (9, 0), fits, [Bf16, Fp8, Bf16]),
        ("mxfp4-rht-sr", (10, 0), fits, [Bf16, Mxfp8, Mxfp8]),
        ("fp8-mxfp4-rht-sr", (12, 0), fits, [Fp8, Fp4, Fp4]),
        ("tetrajet", (8, 0), fits, [Bf16; 3]),
        ("tetrajet", (9, 0), fits, [Fp8; 3]),
        ("tetrajet", (9, 0), does_not, [Bf16; 3]),
        ("tetrajet", (10, 0), fits, [Bf16; 3]),
        ("mxfp4-mxfp4-rht-sr,scale=even", (9, 0), fits, [Fp8; 3]),
        ("quartet", (9, 0), fits, [Bf16; 3]),
        ("mxfp4-rht-sr,fwd=fp8", (8, 0), fits, [Bf16; 3]),
        ("mxfp4-rht-sr,fwd=fp8", (9, 0), fits, [Fp8; 3]),
        ("mxfp4-rht-sr,dgrad=fp8", (10, 0), fits, [Bf16, Fp8, Mxfp8]),
        ("nvfp4,wgrad=fp8", (9, 0), fits, [Bf16, Bf16, Fp8]),
        ("nvfp4,wgrad=fp8", (9, 0), does_not, [Bf16; 3]),
        // Of what the forward pass made.
        ("tetrajet,dgrad=fp8", (9, 0), fits, [Fp8, Bf16, Fp8]),
        ("tetrajet,fwd=fp8", (9, 0), fits, [Fp8, Bf16, Bf16]),
        ("mxfp4-mxfp4,rht=all", (9, 0), fits, [Bf16, Fp8, Fp8]),
        ("tetrajet,rht=all", (9, 0), fits, [Bf16; 3]),
        ("tetrajet2,outer=f32,rht=all", (9, 0), fits, [F32; 3]),
        ("nvidia-nvfp4", (9, 0), fits, [Bf16; 3]),
        ("nvidia-nvfp4", (12, 0), fits, [Bf16; 3]),
        ("tetrajet2,outer=f32", (9, 0), fits, [F32; 3]),
        ("int8-switchback", (8, 0), fits, [Int8, Int8, Bf16]),
        ("int8-switchback", (9, 0), LinearShape { rows: 77, ..fits }, [Int8, Int8, Bf16]),
        ("int8-switchback", (9, 0), does_not, [Bf16; 3]),
        ("int8-switchback", (9, 0), LinearShape { inputs: 32768, ..fits }, [Bf16; 3]),
        ("int8-switchback", (10, 3), fits, [Bf16; 3]),
    ] {
        let linear = *recipe.parse::<Recipe>().unwrap().linear(0);
        let found = Of::ALL.map(|of| of.numbers(&linear, capability, shape));
        assert_eq!(found, expected, "{recipe} {capability:?} {shape:?}");
    }
}

/// Elements and scales are the definition's, in each form and in both at once.
#[test]
fn operands_with_block_scales_are_those_of_the_definition() {
    let Some(cuda) = gpu_as((10, 0)) else { return };
    let cuda = &cuda;
    let cases = [(1, 1), (17, 31), (33, 200), (64, 96), (130, 520), (300, 40)];
    for (case, (rows, cols)) in cases.into_iter().enumerate() {
        let mut values = random(rows * cols, 40 + case as u64);
        for (i, v) in values.iter_mut().enumerate() {
            match i / 37 % 29 {
                3 => *v = 0.0,
                7 => *v *= 1e-38,
                11 => *v *= 1e36,
                _ => {}
            }
            *v = half::bf16::from_f32(*v).to_f32();
        }
        if case == 4 {
            values[100] = f32::NAN;
            values[20_000] = f32::NEG_INFINITY;
        }
        for group in [0, 32, 64, 128, 256] {
            for rounding in ROUNDINGS {
                check_operands(cuda, &values, (rows, cols), group, rounding);
            }
        }
    }
}

fn check_operands(
    cuda: &Cuda,
    values: &[f32],
    (rows, cols): (usize, usize),
    group: usize,
    rounding: (Rounding, Range),
) {
    let exact = exact_forms(values, (rows, cols), group, rounding);
    let room = exact.iter().map(|exact| exact.rows * exact.depth).max().unwrap();
    let scales_room = exact.iter().map(|e| Carrier::Mxfp8.scale_bytes(e.rows, e.depth)).max();
    let scales_room = scales_room.unwrap().next_multiple_of(16);
    let mut arena = Arena::allocated(&cuda.gpu, 2 * (room + scales_room) + 4096).unwrap();
    let pieces = [0, 1].map(|_| (arena.bytes(room), arena.bytes(scales_room)));
    for (precision, format, forms) in PRECISIONS.into_iter().flat_map(|precision| {
        let formats = [Type::E2m1, Type::Mxfp8].into_iter();
        let forms = [[true, false], [false, true], [true, true]];
        formats.flat_map(move |format| forms.map(|forms| (precision, format, forms)))
    }) {
        if forms == [true, true] && (precision == Precision::F32 || group > 64) {
            continue;
        }
        for (elements, scales) in &pieces {
            write_bytes(cuda, elements.address, &vec![0xaa; room]);
            write_bytes(cuda, scales.address, &vec![0xaa; scales_room]);
        }
        let source = tensor(cuda, values, precision);
        let target = |i: usize| {
            let (out, scales) = (pieces[i].0.address, pieces[i].1.address);
            forms[i].then_some(Target { format, out, scales })
        };
        let (by_rows, by_columns) = (target(0), target(1));
        let of_dy = of_dy(From::of(&source), (rows, cols), group, rounding);
        Quantization { by_rows, by_columns, ..of_dy }.run(cuda);
        for i in (0..2).filter(|i| forms[*i]) {
            let what = format!(
                "({rows}, {cols}) g {group} {rounding:?} {precision:?} {format:?} {forms:?} {i}"
            );
            let exact = &exact[i];
            let elements = read_bytes(cuda, pieces[i].0.address, room);
            let scales = read_bytes(cuda, pieces[i].1.address, scales_room);
            if format == Type::Mxfp8 {
                check_mxfp8(&elements, &scales, exact, &what);
            } else {
                assert!(elements[..exact.codes.len()] == exact.codes, "{what}: codes differ");
                assert!(scales[..exact.scales.len()] == exact.scales, "{what}: scales differ");
            }
        }
    }
}

/// The kernel of the FP4 tensor cores on a GPU, with the instruction spelled out where it has none.
#[test]
fn fp4_products_on_a_gpu() {
    let Some(cuda) = gpu_as((12, 0)) else { return };
    for (m, n, k) in [(1, 1, 32), (130, 137, 96), (256, 128, 2048), (77, 300, 1056)] {
        let (a, b) = (operand(m, k, 1), operand(n, k, 2));
        let exact = reference::product(&f64s(&a.dequantize()), &f64s(&b.dequantize()), m, n, k);
        let sizes = [&a.codes, &a.scales, &b.codes, &b.scales];
        let mut arena =
            Arena::allocated(&cuda.gpu, sizes.map(Vec::len).iter().sum::<usize>() + 2048).unwrap();
        let pieces = sizes.map(|bytes| {
            let piece = arena.bytes(bytes.len());
            write_bytes(&cuda, piece.address, bytes);
            piece
        });
        let [a, a_scales, b, b_scales] = pieces.each_ref().map(|piece| piece.address);
        for accumulate in [false, true] {
            let before = if accumulate { 1.0 } else { f32::NAN };
            let c = f32_buffer(&cuda, &vec![before; m * n]);
            let product = Product {
                m,
                n,
                k,
                operands: [Type::E2m1; 2],
                a: Operand::rows(a, k),
                b: Operand::rows(b, k),
                c: c.address(),
                c_stride: n,
                c_type: Type::F32,
                alpha: 0.5,
                factors: None,
                accumulate,
                bias: None,
                scales: Some([a_scales, b_scales]),
            };
            cuda.gpu.scope(|| multiply_fp4(&cuda, &product));
            let exact: Vec<f64> =
                exact.iter().map(|v| 0.5 * v + if accumulate { 1.0 } else { 0.0 }).collect();
            close(&format!("({m}, {n}, {k})"), &f32s_of(&cuda, &c), &exact, 1e-5);
        }
    }
}

#[test]
fn mxfp4_linear_backward_carried_by_mxfp8() {
    let Some(cuda) = gpu_as((10, 0)) else { return };
    linear_layers_follow_their_recipes(&[cuda]);
}

#[test]
fn mxfp4_linear_backward_carried_by_fp4() {
    let Some(cuda) = gpu_as((12, 0)) else { return };
    linear_layers_follow_their_recipes(&[cuda]);
}
