//! Which tensor cores multiply MXFP4 operands, and what those of Blackwell need that others do not: a
//! scale for every block, in cuBLASLt's layout or the definition's, and on some a kernel of our own.

use super::Cuda;
use super::gemm::{Product, Type};
use super::gpu::launch;
use super::linear::{DrawArgument, TILE_COLUMNS, Target, TransformArgument};
use crate::backend::LinearShape;
use crate::mx::{BLOCK, Draw, Rounding};

/// How MXFP4 operands are held and multiplied. All of them hold MXFP4 values exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Road {
    /// As bf16 numbers, everywhere.
    Bf16,
    /// As FP8 numbers with one power of two a tensor: dy in E5M2, whose 28 binades blocks need most, the
    /// other in E4M3, because no product takes E5M2 twice. Blocks below that range are raised.
    Fp8,
    /// As MXFP8 by cuBLASLt: E4M3 elements, and every block's own scale.
    Mxfp8,
    /// As they are, by `mxfp4_sm120.cu`.
    Fp4,
}

impl Road {
    /// The best one of a chip.
    pub(super) fn of(capability: (i32, i32)) -> Self {
        match capability {
            // NOTE: 10.x and 11.0 have FP4 products too, but of another kind (`tcgen05`).
            (12, 0 | 1) => Self::Fp4,
            (10..=12, _) => Self::Mxfp8,
            capability if capability >= (8, 9) => Self::Fp8,
            _ => Self::Bf16,
        }
    }

    /// This one, if it takes a layer of these sizes. cuBLASLt wants FP8 operands in rows of whole 16 bytes;
    /// that their length is a multiple of 32, as MXFP8 needs, padding to whole blocks sees to.
    pub(super) fn for_layer(self, LinearShape { rows, inputs, outputs }: LinearShape) -> Self {
        let fits = [rows, inputs, outputs].iter().all(|n| n.is_multiple_of(16));
        if fits || self == Self::Fp4 { self } else { Self::Bf16 }
    }

    /// Whether every block has a scale.
    pub(super) fn has_block_scales(self) -> bool {
        matches!(self, Self::Mxfp8 | Self::Fp4)
    }

    /// Bytes of the scales of an operand (vectors, depth) that has one for every block.
    pub(super) fn scale_bytes(self, vectors: usize, depth: usize) -> usize {
        let blocks = depth / BLOCK;
        match self {
            Self::Bf16 | Self::Fp8 => 0,
            Self::Mxfp8 => {
                vectors.next_multiple_of(TILE_VECTORS) * blocks.next_multiple_of(TILE_BLOCKS)
            }
            Self::Fp4 => vectors * blocks,
        }
    }
}

/// Vectors of a tile of MXFP8's scales.
pub(super) const TILE_VECTORS: usize = 128;

/// Blocks of each of them.
const TILE_BLOCKS: usize = 4;

/// Where the scale of a vector's block lies among those of MXFP8, of `blocks` a vector: in tiles of 128
/// vectors and 4 blocks, which follow each other along the vectors. The twin of `tiled` in `mxfp4.cu`.
/// ref: cuBLAS documentation, "1D Block Scaling Factors Layout".
#[cfg(test)]
pub(super) fn tiled(vector: usize, block: usize, blocks: usize) -> usize {
    let tile = vector / TILE_VECTORS * blocks.div_ceil(TILE_BLOCKS) + block / TILE_BLOCKS;
    let (outer, inner) = (vector % TILE_VECTORS, block % TILE_BLOCKS);
    tile * TILE_VECTORS * TILE_BLOCKS + outer % 32 * 16 + outer / 32 * 4 + inner
}

/// Both forms of a source (rows, cols) of bf16 numbers, along rows to `targets[0]` and down columns to
/// `targets[1]`, both codes or both MXFP8, with one group for both, of at most 64. `sums` and the result as of
/// [`super::linear::quantize`].
pub(super) fn quantize_both(
    cuda: &Cuda,
    targets: [Target; 2],
    source: u64,
    (rows, cols): (usize, usize),
    sums: u64,
    signs: [&[f32]; 2],
    rounding: Rounding,
    draw: Draw,
) -> usize {
    let group = signs[0].len();
    let [rows_depth, depth] = [cols, rows].map(|n| n.next_multiple_of(group.max(BLOCK)));
    let nearest = rounding == Rounding::Nearest;
    let (name, columns, by_rows, by_columns) = match targets {
        [
            Target::Codes { codes: by_rows, scales: row_scales },
            Target::Codes { codes: by_columns, scales },
        ] => {
            let names = ["quantize_both_codes_bf16_unbiased", "quantize_both_codes_bf16_nearest"];
            (names, rows_depth, (by_rows, row_scales), (by_columns, scales))
        }
        [
            Target::Mxfp8 { out: by_rows, scales: row_scales },
            Target::Mxfp8 { out: by_columns, scales },
        ] => {
            let names = ["quantize_both_mxfp8_bf16_unbiased", "quantize_both_mxfp8_bf16_nearest"];
            let columns = cols.next_multiple_of(TILE_VECTORS);
            (names, columns, (by_rows, row_scales), (by_columns, scales))
        }
        _ => unreachable!("both forms are of one kind that has a scale for every block"),
    };
    let grid = [columns.div_ceil(TILE_COLUMNS), depth.div_ceil(128), 1];
    launch!(cuda.gpu, name[usize::from(nearest)], grid, 256, 0;
        by_rows.0, by_rows.1, by_columns.0, by_columns.1, sums, source, rows as u32, cols as u32,
        rows_depth as u32, depth as u32, group as u32, TransformArgument::new(signs[0]),
        TransformArgument::new(signs[1]), DrawArgument::from(draw));
    grid[1]
}

/// Rows and columns of C of a thread block of `product_mxfp4_*`, its threads, and its stages of codes and scales.
const FP4_TILE: usize = 128;
const FP4_THREADS: usize = 256;
const FP4_SHARED: usize = 4 * 2 * FP4_TILE * (64 + 4);

/// A product of operands in [`Type::E2m1`], dense, the reduction along their rows.
pub(super) fn multiply_fp4(cuda: &Cuda, product: &Product) {
    let &Product { m, n, k, a, b, c, c_stride, c_type, alpha, accumulate, scales, .. } = product;
    let name = match c_type {
        Type::Bf16 => "product_mxfp4_bf16",
        Type::F32 => "product_mxfp4_f32",
        Type::E4m3 | Type::E5m2 | Type::Mxfp8 | Type::E2m1 => {
            unreachable!("results are activations or gradients")
        }
    };
    let [a_scales, b_scales] = scales.expect("MXFP4 operands have scales");
    let grid = [n.div_ceil(FP4_TILE), m.div_ceil(FP4_TILE), 1];
    launch!(cuda.gpu, name, grid, FP4_THREADS, FP4_SHARED;
        c, a.address, a_scales, b.address, b_scales, m as u32, n as u32, k as u32, c_stride as u32,
        alpha, u32::from(accumulate));
}

#[cfg(test)]
mod tests {

    use super::super::compile::{self, FILES};
    use super::super::gemm::Operand;
    use super::super::linear::{Form, Quantize, Source as Operands, quantize};
    use super::super::memory::Arena;
    use super::super::on_cpu::{check_mxfp8, operand};
    use super::super::tests::{
        close, decode_fp8, f32_buffer, f32s_of, f64s, open, random, read_bytes, tensor, write_bytes,
    };
    use super::*;
    use crate::backend::conformance::linear_layers_follow_their_recipes;
    use crate::backend::{Precision, reference};
    use crate::mx::{GemmId, LinearId, Mxfp4Matrix, OperandId, Random, Source, decode_e8m0};

    const RANDOM: Random =
        Random { seed: 11, step: 5, micro_step: 1, layer: 2, linear: LinearId::Qkv };

    /// `multiply` of `mxfp4_sm120.cu` for chips without the instruction.
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

    /// The GPU as if it had this capability: what it lacks is spelled out, or done on the host. None, after a line
    /// that says why, where it has not even the kernels.
    fn gpu_as(capability: (i32, i32)) -> Option<Cuda> {
        let mut gpu = open()?;
        let own = gpu.capability;
        let road = Road::of(capability);
        if Road::of(own) == road {
            return Some(Cuda::of(gpu).unwrap());
        }
        if own < (8, 9) {
            println!("skipped: {} has no FP8 numbers", gpu.name);
            return None;
        }
        if road == Road::Fp4 {
            let (name, source) =
                FILES.into_iter().find(|(name, _)| *name == "mxfp4_sm120").unwrap();
            let source = format!("{SPELLED_OUT}{source}");
            gpu.load(&compile::cubin(name, &source, &compile::architecture(own)).unwrap()).unwrap();
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
            let scales = read_bytes(cuda, scales, Road::Mxfp8.scale_bytes(vectors, k));
            let value = |(i, byte): (usize, &u8)| {
                let scale = scales[tiled(i / k, i % k / BLOCK, k / BLOCK)];
                decode_fp8(*byte, Type::E4m3) * f64::from(decode_e8m0(scale))
            };
            elements.iter().enumerate().map(value).collect()
        };
        let [a_scales, b_scales] = product.scales.unwrap();
        let (a, b) =
            (values(product.a.address, a_scales, m), values(product.b.address, b_scales, n));
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
    fn chips_have_their_roads() {
        let road = |capability, n| {
            let layer = LinearShape { rows: 64, inputs: n, outputs: 96 };
            Road::of(capability).for_layer(layer)
        };
        for (capability, fits, does_not) in [
            ((8, 0), Road::Bf16, Road::Bf16),
            ((8, 9), Road::Fp8, Road::Bf16),
            ((9, 0), Road::Fp8, Road::Bf16),
            ((10, 0), Road::Mxfp8, Road::Bf16),
            ((10, 3), Road::Mxfp8, Road::Bf16),
            ((11, 0), Road::Mxfp8, Road::Bf16),
            ((12, 0), Road::Fp4, Road::Fp4),
            ((12, 1), Road::Fp4, Road::Fp4),
            ((13, 0), Road::Fp8, Road::Bf16),
        ] {
            assert_eq!(road(capability, 48), fits, "{capability:?}");
            assert_eq!(road(capability, 40), does_not, "{capability:?}");
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
                for rounding in [Rounding::Nearest, Rounding::Unbiased] {
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
        rounding: Rounding,
    ) {
        let mut signs = [vec![0.0; group], vec![0.0; group]];
        RANDOM.signs(GemmId::Dgrad).fill_signs(&mut signs[0]);
        RANDOM.signs(GemmId::Wgrad).fill_signs(&mut signs[1]);
        let draw = RANDOM.rounding(OperandId::Dy);
        let forms = [(Form::Rows, rows, cols), (Form::Columns, cols, rows)];
        let exact = [0, 1].map(|i| {
            let (form, vectors, depth) = forms[i];
            let transposed = form == Form::Columns;
            let source = Source { data: values, rows: vectors, depth, transposed };
            Mxfp4Matrix::quantize(source, &signs[i], rounding, &draw)
        });
        let both_precisions = [Precision::F32, Precision::Bf16];
        let sources = both_precisions.map(|precision| tensor(cuda, values, precision));
        let room = exact.iter().map(|exact| exact.rows * exact.depth).max().unwrap();
        let scales_room = exact.iter().map(|e| Road::Mxfp8.scale_bytes(e.rows, e.depth)).max();
        let scales_room = scales_room.unwrap().next_multiple_of(16);
        let mut arena = Arena::allocated(&cuda.gpu, 2 * (room + scales_room) + 4096).unwrap();
        let pieces = [0, 1].map(|_| (arena.bytes(room), arena.bytes(scales_room)));
        let poison = || {
            for (elements, scales) in &pieces {
                write_bytes(cuda, elements.address, &vec![0xaa; room]);
                write_bytes(cuda, scales.address, &vec![0xaa; scales_room]);
            }
        };
        let target = |mxfp8, i: usize| {
            let (elements, scales) = (pieces[i].0.address, pieces[i].1.address);
            if mxfp8 {
                Target::Mxfp8 { out: elements, scales }
            } else {
                Target::Codes { codes: elements, scales }
            }
        };
        let check = |what: &str, mxfp8, i: usize| {
            let what = format!("({rows}, {cols}) g {group} {rounding:?} {what} mxfp8 {mxfp8}");
            let exact = &exact[i];
            let elements = read_bytes(cuda, pieces[i].0.address, room);
            let scales = read_bytes(cuda, pieces[i].1.address, scales_room);
            if mxfp8 {
                check_mxfp8(&elements, &scales, exact, &what);
            } else {
                assert!(elements[..exact.codes.len()] == exact.codes, "{what}: codes differ");
                assert!(scales[..exact.scales.len()] == exact.scales, "{what}: scales differ");
            }
        };
        for mxfp8 in [false, true] {
            for (i, (form, ..)) in forms.into_iter().enumerate() {
                for source in &sources {
                    poison();
                    let (precision, address) = (source.precision, source.address());
                    let (from, shape) =
                        (Operands { address, precision }, Quantize { form, rows, cols });
                    quantize(cuda, target(mxfp8, i), from, shape, 0, &signs[i], rounding, draw);
                    check(&format!("{form:?} {precision:?}"), mxfp8, i);
                }
            }
            if group > 64 {
                continue;
            }
            poison();
            let targets = [target(mxfp8, 0), target(mxfp8, 1)];
            let (from, signs) = (sources[1].address(), [&signs[0][..], &signs[1][..]]);
            quantize_both(cuda, targets, from, (rows, cols), 0, signs, rounding, draw);
            check("both", mxfp8, 0);
            check("both", mxfp8, 1);
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
                Arena::allocated(&cuda.gpu, sizes.map(Vec::len).iter().sum::<usize>() + 2048)
                    .unwrap();
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
    fn linear_layers_on_the_road_of_mxfp8() {
        let Some(cuda) = gpu_as((10, 0)) else { return };
        linear_layers_follow_their_recipes(&[cuda]);
    }

    #[test]
    fn linear_layers_on_the_road_of_fp4() {
        let Some(cuda) = gpu_as((12, 0)) else { return };
        linear_layers_follow_their_recipes(&[cuda]);
    }
}
