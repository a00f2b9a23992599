//! Kernels on the processor, for chips that are not at hand and for CI, which has none: `on_cpu.cpp` and a
//! kernel file make a library, which a test calls block by block. The instruction of the FP4 tensor cores is modelled here, from PTX's
//! documentation alone.

use std::ffi::c_void;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::adamw::{Entry, Step};
use super::compile::{FILES, PRELUDE};
use super::gemm::Type;
use super::linear::{BehindGelu, DrawArgument, Tiles, TransformArgument, rows_at_once};
use super::roads::{Road, tiled};
use super::tests::{compare_fp8, decode_fp8, random};
use crate::Optimizer;
use crate::backend::{Activation, OptimizerStep, Precision, reference};
use crate::mx::{
    BLOCK, Draw, GemmId, LinearId, Mxfp4Matrix, OperandId, Purpose, Random, Rounding, Source,
    decode_e2m1, decode_e8m0,
};

/// A kernel file that runs on the processor.
struct OnCpu {
    library: libloading::Library,
    _folder: tempfile::TempDir,
}

/// What PTX the files hold, and what `on_cpu.cpp` has for it.
const PTX: [(&str, &str); 16] = [
    (
        "asm(\"cvt.rn.bf16x2.f32 %0, %1, %2;\" : \"=r\"(out) : \"f\"(high), \"f\"(low));",
        "out = ptx_bf16_pair(high, low);",
    ),
    (
        "asm(\"max.NaN.f32 %0, %1, %2;\" : \"=f\"(out) : \"f\"(a), \"f\"(b));",
        "out = ptx_max_nan(a, b);",
    ),
    (
        "asm(\"set.lt.f32.f32 %0, %1, %2;\" : \"=f\"(low) : \"f\"(y), \"f\"(unit));",
        "low = y < unit ? 1.0f : 0.0f;",
    ),
    // Kernels run one after the other here.
    (
        r#"asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");"#,
        ";",
    ),
    (
        "asm(\"rcp.approx.ftz.f32 %0, %1;\" : \"=f\"(reciprocal) : \"f\"((float)blocks));",
        "reciprocal = 1.0f / (float)blocks;",
    ),
    ("asm(\"ex2.approx.ftz.f32 %0, %1;\" : \"=f\"(out) : \"f\"(v));", "out = exp2f(v);"),
    ("asm(\"rcp.approx.ftz.f32 %0, %1;\" : \"=f\"(out) : \"f\"(v));", "out = 1.0f / v;"),
    (
        "asm(\"cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\" : \"=h\"(out) : \"f\"(high), \"f\"(low));",
        "out = ptx_e4m3_pair(high, low);",
    ),
    (
        "asm(\"cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;\" : \"=h\"(out) : \"f\"(high), \"f\"(low));",
        "out = ptx_e5m2_pair(high, low);",
    ),
    (
        "asm(\"prmt.b32 %0, %1, %2, %3;\" : \"=r\"(out) : \"r\"((u32)numbers), \"r\"((u32)(numbers >> 32)), ",
        "out = __byte_perm((u32)numbers, (u32)(numbers >> 32), (",
    ),
    ("\"r\"(odd * draw.shift4 + even));", "odd * draw.shift4 + even));"),
    ("asm(\"or.b32 %0, %0, %1;\" : \"+r\"(out) : \"r\"(signs));", "out |= signs;"),
    // Two bytes stand for the two halves that they become.
    (
        r#"asm("{.reg .b16 both; cvt.rn.satfinite.e4m3x2.f32 both, %2, %1; cvt.rn.f16x2.e4m3x2 %0, both;}"
      : "=r"(halves)
      : "f"(a * inverse), "f"(b * inverse));"#,
        "halves = ptx_e4m3_pair(b * inverse, a * inverse);",
    ),
    (
        r#"asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(a), "=f"(b)
      : "r"(halves));"#,
        "a = ptx_from_e4m3(halves & 0xff), b = ptx_from_e4m3(halves >> 8);",
    ),
    (
        r#"asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from));"#,
        "copy16(to, (const unsigned char *)from, true);",
    ),
    (r#"asm volatile("cp.async.wait_all;");"#, "end_copies(), wait_for_copies<0>();"),
];

/// In which order threads get their turn, and whether copies happen as late as they may.
const SCHEDULES: [(u32, u32); 3] = [(0, 1), (1, 0), (2, 1)];

impl OnCpu {
    /// None, after a line that says why, where there is no compiler; in CI there is one.
    fn new(file: &str) -> Option<Self> {
        let (_, kernels) = FILES.into_iter().find(|(name, _)| *name == file)?;
        let mut text = format!("{PRELUDE}\n{kernels}");
        for (ptx, twin) in PTX {
            text = text.replace(ptx, twin);
        }
        // It is there already.
        text = text.replace("extern __shared__ __align__(16) u8 shared[];", "");
        let folder = tempfile::tempdir().unwrap();
        let [source, library] = ["kernels.cpp", "kernels.so"].map(|name| folder.path().join(name));
        std::fs::write(&source, format!("{}\n{text}", include_str!("on_cpu.cpp"))).unwrap();
        // No warnings: much of a file's beginning is not used by the rest.
        let mut compiler = Command::new("c++");
        compiler.args(["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off"]);
        let output = match compiler.arg("-o").arg(&library).arg(&source).output() {
            Ok(output) => output,
            Err(error) => {
                assert!(std::env::var("CI").as_deref() != Ok("true"), "c++: {error}");
                println!("skipped: c++ cannot be started: {error}");
                return None;
            }
        };
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{file}.cu does not compile for the processor:\n{errors}");
        Some(Self { library: open(&library), _folder: folder })
    }

    /// A kernel, as a function of type `F`.
    fn kernel<F: Copy>(&self, name: &str) -> F {
        // SAFETY: callers give the type that the file declares.
        *unsafe { self.library.get::<F>(name.as_bytes()) }.unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Calls `f` as every thread of a grid.
    fn run<F: Fn()>(&self, (order, late): (u32, u32), grid: [usize; 2], block: usize, f: F) {
        extern "C" fn call<F: Fn()>(f: *const c_void) {
            // SAFETY: `run` hands on its own.
            unsafe { (*f.cast::<F>())() }
        }
        type RunGrid = unsafe extern "C" fn(
            u32,
            u32,
            u32,
            u32,
            u32,
            extern "C" fn(*const c_void),
            *const c_void,
            extern "C" fn(
                &mut [[f32; 4]; 32],
                &[[u32; 4]; 32],
                &[[u32; 2]; 32],
                &[u32; 32],
                &[u32; 32],
            ),
        );
        let run: RunGrid = self.kernel("run_grid");
        let [x, y] = grid.map(|n| n as u32);
        let context = std::ptr::from_ref(&f).cast();
        // SAFETY: `f` lives until the call returns, and the types are those of `on_cpu.cpp`.
        unsafe { run(order, late, x, y, block as u32, call::<F>, context, multiply) };
    }
}

fn open(library: &Path) -> libloading::Library {
    // SAFETY: made from the kernels a moment ago; nothing in it runs on being loaded.
    unsafe { libloading::Library::new(library) }.unwrap()
}

// ---- The instruction ----

/// Row and column of element `i` of a thread's fragment of A (16, 64), of B (64, 8), and of C (16, 8).
/// ref: PTX ISA, "Matrix Fragments for mma.m16n8k64".
fn place_in_a(lane: usize, i: usize) -> (usize, usize) {
    let (group_id, thread_in_group) = (lane >> 2, lane % 4);
    let row = if i < 8 || (16..24).contains(&i) { group_id } else { group_id + 8 };
    let column = thread_in_group * 8 + (i & 7);
    (row, if i < 16 { column } else { column + 32 })
}

fn place_in_b(lane: usize, i: usize) -> (usize, usize) {
    let (group_id, thread_in_group) = (lane >> 2, lane % 4);
    let row = thread_in_group * 8 + (i & 7);
    (if i < 8 { row } else { row + 32 }, group_id)
}

fn place_in_c(lane: usize, i: usize) -> (usize, usize) {
    let (group_id, thread_in_group) = (lane >> 2, lane % 4);
    (if i < 2 { group_id } else { group_id + 8 }, thread_in_group * 2 + (i & 1))
}

/// Selectors of the scales, {byte-id, thread-id}, of A and of B.
type Selectors = [(usize, usize); 2];

/// Thread and byte that hold the scale of chunk `chunk` of row `row` of A, and of column `column` of B, with
/// `.scale_vec::2X`: the thread-pair of a quad that thread-id-a selects has the rows of its fragment in order,
/// the thread of a quad that thread-id-b selects its column, and byte-id selects a pair of bytes.
/// ref: PTX ISA, "Block Scaling for mma.sync".
fn scale_of_a(row: usize, chunk: usize, (byte, thread): (usize, usize)) -> (usize, usize) {
    (4 * (row % 8) + 2 * thread + row / 8, byte + chunk)
}

fn scale_of_b(column: usize, chunk: usize, (byte, thread): (usize, usize)) -> (usize, usize) {
    (4 * column + thread, byte + chunk)
}

/// `mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0` of a
/// warp's registers, with the selectors that the kernel has.
extern "C" fn multiply(
    d: &mut [[f32; 4]; 32],
    a: &[[u32; 4]; 32],
    b: &[[u32; 2]; 32],
    a_scales: &[u32; 32],
    b_scales: &[u32; 32],
) {
    let [of_a, of_b]: Selectors = [(0, 0); 2];
    let code = |registers: &[u32], i: usize| (registers[i / 8] >> (4 * (i % 8)) & 15) as u8;
    let scale = |registers: &[u32; 32], (lane, byte): (usize, usize)| {
        f64::from(decode_e8m0((registers[lane] >> (8 * byte)) as u8))
    };
    let (mut x, mut y) = ([[0.0; 64]; 16], [[0.0; 8]; 64]);
    for lane in 0..32 {
        for i in 0..32 {
            let (row, k) = place_in_a(lane, i);
            let factor = scale(a_scales, scale_of_a(row, k / 32, of_a));
            x[row][k] = factor * f64::from(decode_e2m1(code(&a[lane], i)));
        }
        for i in 0..16 {
            let (k, column) = place_in_b(lane, i);
            let factor = scale(b_scales, scale_of_b(column, k / 32, of_b));
            y[k][column] = factor * f64::from(decode_e2m1(code(&b[lane], i)));
        }
    }
    for lane in 0..32 {
        for i in 0..4 {
            let (row, column) = place_in_c(lane, i);
            let sum: f64 = (0..64).map(|k| x[row][k] * y[k][column]).sum();
            d[lane][i] = (f64::from(d[lane][i]) + sum) as f32;
        }
    }
}

/// An index in a layout of CUTLASS: the parts of `i`, lowest first, times their strides.
fn in_layout(mut i: usize, layout: &[(usize, usize)]) -> usize {
    let mut index = 0;
    for (size, stride) in layout {
        index += i % size * stride;
        i /= size;
    }
    index
}

/// PTX's documentation and CUTLASS' layouts (`MMA_Traits<SM120_16x8x64_TN_VS>`, column-major) say the same, and
/// the kernel has the selectors that the model has.
#[test]
fn both_sources_know_the_same_fragments() {
    for lane in 0..32 {
        for i in 0..32 {
            let (row, k) = place_in_a(lane, i);
            let thread = in_layout(lane, &[(4, 128), (8, 1)]);
            assert_eq!(row + 16 * k, thread + in_layout(i, &[(8, 16), (2, 8), (2, 512)]));
        }
        for i in 0..16 {
            let (k, column) = place_in_b(lane, i);
            let thread = in_layout(lane, &[(4, 64), (8, 1)]);
            assert_eq!(column + 8 * k, thread + in_layout(i, &[(8, 8), (2, 256)]));
        }
        for i in 0..4 {
            let (row, column) = place_in_c(lane, i);
            let thread = in_layout(lane, &[(4, 32), (8, 1)]);
            assert_eq!(row + 16 * column, thread + in_layout(i, &[(2, 16), (2, 8)]));
        }
        let row = in_layout(lane, &[(2, 8), (2, 0), (8, 1)]);
        if lane % 4 < 2 {
            assert_eq!(scale_of_a(row, 0, (0, 0)), (lane, 0));
        }
        if lane % 4 == 0 {
            assert_eq!(scale_of_b(in_layout(lane, &[(4, 0), (8, 1)]), 1, (0, 0)), (lane, 1));
        }
    }
    let (_, kernels) = FILES.into_iter().find(|(name, _)| *name == "mxfp4_sm120").unwrap();
    assert!(kernels.contains("{%10}, {0, 0}, {%11}, {0, 0};"));
}

// ---- Products ----

/// Any codes, and scales of ordinary magnitude.
pub(super) fn operand(rows: usize, depth: usize, seed: u64) -> Mxfp4Matrix {
    let draw = Draw::of(seed, Purpose::Weights, 82, 0);
    let byte = |i: usize| draw.bits(i as u32, 0)[0] as u8;
    let scale = |i: usize| 118 + draw.bits(i as u32, 1)[0] as u8 % 18;
    Mxfp4Matrix {
        rows,
        depth,
        codes: (0..rows * depth / 2).map(byte).collect(),
        scales: (0..rows * depth / BLOCK).map(scale).collect(),
    }
}

/// Bytes that start at a multiple of 16, as those of the kernels do.
fn aligned(bytes: &[u8]) -> Vec<u128> {
    let mut out = vec![0u128; bytes.len().div_ceil(16)];
    bytemuck::cast_slice_mut::<_, u8>(&mut out)[..bytes.len()].copy_from_slice(bytes);
    out
}

type ProductKernel = unsafe extern "C" fn(
    *mut c_void,
    *const u128,
    *const u128,
    *const u128,
    *const u128,
    u32,
    u32,
    u32,
    u32,
    f32,
    u32,
);

/// The whole kernel of the FP4 tensor cores, at sizes that nothing divides, against the f64 product.
#[test]
fn fp4_products_are_those_of_their_operands() {
    let Some(on_cpu) = OnCpu::new("mxfp4_sm120") else { return };
    let product = |bf16| -> ProductKernel {
        on_cpu.kernel(if bf16 { "product_mxfp4_bf16" } else { "product_mxfp4_f32" })
    };
    let cases =
        [(1, 1, 32), (16, 8, 64), (130, 137, 96), (128, 128, 512), (77, 200, 1056), (257, 40, 640)];
    for (case, (m, n, k)) in cases.into_iter().enumerate() {
        let (mut a, b) = (operand(m, k, 1), operand(n, k, 2));
        if case == 2 {
            a.scales[5 * k / BLOCK + 1] = 255;
        }
        let (x, y) = (a.dequantize(), b.dequantize());
        let alpha = 16.0 / 9.0f32;
        let dot = |i: usize, j: usize| -> (f64, f64) {
            let terms = (0..k).map(|l| f64::from(x[i * k + l]) * f64::from(y[j * k + l]));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), v| (sum + v, size + v.abs()));
            (f64::from(alpha) * sum, f64::from(alpha) * size)
        };
        let [a_codes, b_codes] = [&a.codes, &b.codes].map(|bytes| aligned(bytes));
        let [a_scales, b_scales] = [&a.scales, &b.scales].map(|bytes| aligned(bytes));
        for (at, bytes) in [
            (&a_codes, &a.codes),
            (&b_codes, &b.codes),
            (&a_scales, &a.scales),
            (&b_scales, &b.scales),
        ] {
            let may_read: unsafe extern "C" fn(*const u128, usize) = on_cpu.kernel("may_read");
            // SAFETY: only notes the address.
            unsafe { may_read(at.as_ptr(), bytes.len()) };
        }
        let stride = n + case % 3;
        for (schedule, accumulate, bf16) in [
            (SCHEDULES[0], false, false),
            (SCHEDULES[1], true, false),
            (SCHEDULES[2], false, true),
            (SCHEDULES[0], true, true),
        ] {
            let before = if accumulate { 8.0f32 } else { f32::NAN };
            let mut wide = vec![before; m * stride];
            let mut narrow = vec![half::bf16::from_f32(before).to_bits(); m * stride];
            let c: *mut c_void =
                if bf16 { narrow.as_mut_ptr().cast() } else { wide.as_mut_ptr().cast() };
            let kernel = product(bf16);
            on_cpu.run(schedule, [n.div_ceil(128), m.div_ceil(128)], 256, || {
                // SAFETY: buffers and grid are what the comment of the kernels asks for.
                unsafe {
                    kernel(
                        c,
                        a_codes.as_ptr(),
                        a_scales.as_ptr(),
                        b_codes.as_ptr(),
                        b_scales.as_ptr(),
                        m as u32,
                        n as u32,
                        k as u32,
                        stride as u32,
                        alpha,
                        u32::from(accumulate),
                    );
                }
            });
            for i in 0..m * stride {
                let ours = if bf16 { half::bf16::from_bits(narrow[i]).to_f32() } else { wide[i] };
                let what = format!("({m}, {n}, {k}) accumulate {accumulate} bf16 {bf16}: {i}");
                if i % stride >= n {
                    assert!(ours.to_bits() == before.to_bits(), "{what} is beyond the matrix");
                    continue;
                }
                let (exact, size) = dot(i / stride, i % stride);
                let exact = if accumulate { exact + 8.0 } else { exact };
                let bound = 1e-6 * (size + 8.0) + if bf16 { exact.abs() / 256.0 } else { 0.0 };
                let same =
                    (f64::from(ours) - exact).abs() <= bound || ours.is_nan() && exact.is_nan();
                assert!(same, "{what}: {ours} instead of {exact}");
            }
        }
    }
}

// ---- Scales in tiles ----

proptest! {
    /// Every scale has a place of its own, and the places fill what is planned for them but for the padding.
    #[test]
    fn tiles_hold_every_scale_once(vectors in 1usize..400, blocks in 1usize..40) {
        let bytes = Road::Mxfp8.scale_bytes(vectors, blocks * BLOCK);
        prop_assert_eq!(bytes % 512, 0);
        prop_assert!(bytes < (vectors + 128) * (blocks + 4));
        let mut seen = vec![false; bytes];
        for vector in 0..vectors.next_multiple_of(128) {
            for block in 0..blocks.next_multiple_of(4) {
                let at = tiled(vector, block, blocks);
                prop_assert!(!seen[at], "({}, {}) is at {} like another", vector, block, at);
                seen[at] = true;
                // Back, as cuBLAS' documentation has it within a tile.
                let within = at % 512;
                prop_assert_eq!(vector % 128, within % 16 / 4 * 32 + within / 16);
                prop_assert_eq!(block % 4, within % 4);
            }
        }
        prop_assert!(seen.into_iter().all(|seen| seen));
    }
}

// ---- Quantization ----

const RANDOM: Random = Random { seed: 9, step: 3, micro_step: 1, layer: 2, linear: LinearId::Qkv };

/// A source with what is hard: zeros, both ends of the range, and where `poisoned` NaN and infinity.
fn source(rows: usize, cols: usize, poisoned: bool) -> Vec<f32> {
    let draw = Draw::of(5, Purpose::Weights, 83, 0);
    let value = |i: usize| {
        let [a, b, c, _] = draw.bits(i as u32, 0);
        let v = (f64::from(a) + f64::from(b) - f64::from(c) - 2f64.powi(31)) / 2f64.powi(31);
        let v = match i / 37 % 29 {
            3 => 0.0,
            7 => v * 1e-38,
            11 => v * 1e36,
            13 => v * 1e-30,
            _ => v,
        };
        half::bf16::from_f64(if a % 97 == 0 { 9.0 * v } else { v }).to_f32()
    };
    let mut values: Vec<f32> = (0..rows * cols).map(value).collect();
    if poisoned {
        values[rows * cols / 3] = f32::NAN;
        values[rows * cols - 1] = f32::NEG_INFINITY;
    }
    values
}

/// What a kernel makes of one form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Codes,
    Mxfp8,
}

/// One form of a result: elements and scales.
struct Form {
    elements: Vec<u128>,
    scales: Vec<u128>,
}

impl Form {
    fn new(what: What, vectors: usize, depth: usize) -> Self {
        let (bytes, road) = match what {
            What::Codes => (vectors * depth / 2, Road::Fp4),
            What::Mxfp8 => (vectors * depth, Road::Mxfp8),
        };
        let poison = |bytes: usize| vec![u128::from_le_bytes([0xaa; 16]); bytes.div_ceil(16)];
        Self { elements: poison(bytes), scales: poison(road.scale_bytes(vectors, depth)) }
    }

    fn pointers(&mut self) -> (*mut u8, *mut u8) {
        (self.elements.as_mut_ptr().cast(), self.scales.as_mut_ptr().cast())
    }

    fn check(&self, what: What, exact: &Mxfp4Matrix, case: &str) {
        let (elements, scales): (&[u8], &[u8]) =
            (bytemuck::cast_slice(&self.elements), bytemuck::cast_slice(&self.scales));
        match what {
            What::Codes => {
                assert!(elements[..exact.codes.len()] == exact.codes, "{case}: codes differ");
                assert!(scales[..exact.scales.len()] == exact.scales, "{case}: scales differ");
            }
            What::Mxfp8 => check_mxfp8(elements, scales, exact, case),
        }
    }
}

/// E4M3's bytes of the values of E2M1.
const E4M3: [u8; 8] = [0x00, 0x30, 0x38, 0x3c, 0x40, 0x44, 0x48, 0x4c];

/// MXFP8's elements and scales are the definition's, NaN in blocks whose scale is NaN, and what the tiles have
/// beyond the matrix is zero.
pub(super) fn check_mxfp8(elements: &[u8], scales: &[u8], exact: &Mxfp4Matrix, case: &str) {
    let blocks = exact.depth / BLOCK;
    for vector in 0..exact.rows.next_multiple_of(128) {
        for block in 0..blocks.next_multiple_of(4) {
            let inside = vector < exact.rows && block < blocks;
            let (ours, exact) = (
                scales[tiled(vector, block, blocks)],
                if inside { exact.scale(vector, block) } else { 0 },
            );
            assert_eq!(ours, exact, "{case}: scale of block {block} of vector {vector}");
        }
    }
    for vector in 0..exact.rows {
        for k in 0..exact.depth {
            let code = exact.code(vector, k);
            let byte = match exact.scale(vector, k / BLOCK) {
                255 => 0x7f,
                _ => E4M3[usize::from(code & 7)] | (code & 8) << 4,
            };
            let ours = elements[vector * exact.depth + k];
            assert_eq!(ours, byte, "{case}: element {k} of vector {vector}, of code {code}");
        }
    }
}

type RowsKernel<T> = unsafe extern "C" fn(
    *mut u8,
    *mut u8,
    *const T,
    u32,
    u32,
    u32,
    u32,
    u32,
    TransformArgument,
    DrawArgument,
);
type ColumnsKernel<T> = unsafe extern "C" fn(
    *mut u8,
    *mut u8,
    *mut f32,
    *const T,
    u32,
    u32,
    u32,
    u32,
    TransformArgument,
    DrawArgument,
);
type BothKernel = unsafe extern "C" fn(
    *mut u8,
    *mut u8,
    *mut u8,
    *mut u8,
    *mut f32,
    *const u16,
    u32,
    u32,
    u32,
    u32,
    u32,
    TransformArgument,
    TransformArgument,
    DrawArgument,
);

/// The kernels that give every block a scale of its own, in all their forms, against the definition, byte for
/// byte.
#[test]
fn quantized_operands_are_those_of_the_definition() {
    let Some(on_cpu) = OnCpu::new("mxfp4") else { return };
    let cases = [(1, 1), (17, 31), (33, 200), (130, 72)];
    for (case, (rows, cols)) in cases.into_iter().enumerate() {
        for group in [0, 32, 64, 128, 256] {
            for what in [What::Codes, What::Mxfp8] {
                for rounding in [Rounding::Nearest, Rounding::Unbiased] {
                    let schedule = SCHEDULES[(case + group / 32) % 3];
                    let values = source(rows, cols, case == 3);
                    let case = Case { on_cpu: &on_cpu, schedule, values: &values, rows, cols };
                    case.check(what, group, rounding);
                }
            }
        }
    }
}

/// A source and how kernels run on it.
struct Case<'a> {
    on_cpu: &'a OnCpu,
    schedule: (u32, u32),
    values: &'a [f32],
    rows: usize,
    cols: usize,
}

impl Case<'_> {
    fn check(&self, what: What, group: usize, rounding: Rounding) {
        let &Case { on_cpu, schedule, values, rows, cols } = self;
        let narrow: Vec<u16> = values.iter().map(|v| half::bf16::from_f32(*v).to_bits()).collect();
        let mut signs = [vec![0.0; group], vec![0.0; group]];
        RANDOM.signs(GemmId::Dgrad).fill_signs(&mut signs[0]);
        RANDOM.signs(GemmId::Wgrad).fill_signs(&mut signs[1]);
        let draw = RANDOM.rounding(OperandId::Dy);
        let exact = |transposed, signs: &[f32]| {
            let (vectors, depth) = if transposed { (cols, rows) } else { (rows, cols) };
            let source = Source { data: values, rows: vectors, depth, transposed };
            Mxfp4Matrix::quantize(source, signs, rounding, &draw)
        };
        let exact = [exact(false, &signs[0]), exact(true, &signs[1])];
        let [first, second] = [0, 1].map(|i| TransformArgument::new(&signs[i]));
        let draw = DrawArgument::from(draw);
        let (r, c, g) = (rows as u32, cols as u32, group as u32);
        let depths = [0, 1].map(|i| exact[i].depth);
        let [rows_depth, depth] = depths.map(|depth| depth as u32);
        let covered = |n: usize| if what == What::Mxfp8 { n.next_multiple_of(128) } else { n };
        let kind = format!("{what:?}").to_lowercase();
        let mode = format!("{rounding:?}").to_lowercase();
        let label = |form: &str| format!("({rows}, {cols}) g {group} {form} {kind} {mode}");
        let sums_of = |tiles: usize| vec![f32::NAN; tiles * cols];
        let check_sums = |sums: &[f32], label: &str| {
            for column in 0..cols {
                let terms = (0..rows).map(|row| f64::from(values[row * cols + column]));
                let (exact, size) = terms.fold((0.0, 0.0), |(s, z), v| (s + v, z + v.abs()));
                let ours: f64 = sums.iter().skip(column).step_by(cols).map(|v| f64::from(*v)).sum();
                let same =
                    (ours - exact).abs() <= 1e-5 * size || !ours.is_finite() && !exact.is_finite();
                assert!(same, "{label}: sum {ours} of column {column} instead of {exact}");
            }
        };

        // Along rows, from f32 and from bf16.
        let blocks = depths[0] / BLOCK;
        let each = rows_at_once(blocks);
        let (grid, block) =
            ([covered(rows).div_ceil(each), 1], (each * blocks).next_multiple_of(32));
        let mut form = Form::new(what, rows, depths[0]);
        let (out, scales) = form.pointers();
        let kernel: RowsKernel<f32> = on_cpu.kernel(&format!("quantize_rows_{kind}_f32_{mode}"));
        let from = values.as_ptr();
        on_cpu.run(schedule, grid, block, || {
            // SAFETY: buffers and grid are what the comment of the kernels asks for.
            unsafe {
                kernel(out, scales, from, r, c, rows_depth, g, each as u32, first, draw);
            }
        });
        form.check(what, &exact[0], &label("rows, f32,"));
        let mut form = Form::new(what, rows, depths[0]);
        let (out, scales) = form.pointers();
        let kernel: RowsKernel<u16> = on_cpu.kernel(&format!("quantize_rows_{kind}_bf16_{mode}"));
        let from = narrow.as_ptr();
        on_cpu.run(schedule, grid, block, || {
            // SAFETY: buffers and grid are what the comment of the kernels asks for.
            unsafe {
                kernel(out, scales, from, r, c, rows_depth, g, each as u32, first, draw);
            }
        });
        form.check(what, &exact[0], &label("rows, bf16,"));

        // Down columns.
        let halves = if group == 256 { 2 } else { 1 };
        let tiles = depths[1].div_ceil(128 * halves);
        let mut form = Form::new(what, cols, depths[1]);
        let (out, scales) = form.pointers();
        let mut sums = sums_of(tiles);
        let to = sums.as_mut_ptr();
        let kernel: ColumnsKernel<f32> =
            on_cpu.kernel(&format!("quantize_columns_{kind}_f32_{mode}"));
        let from = values.as_ptr();
        on_cpu.run(schedule, [covered(cols).div_ceil(32 / halves), tiles], 128, || {
            // SAFETY: buffers and grid are what the comment of the kernels asks for.
            unsafe {
                kernel(out, scales, to, from, r, c, depth, g, second, draw);
            }
        });
        form.check(what, &exact[1], &label("columns, f32,"));
        check_sums(&sums, &label("columns, f32,"));
        let mut form = Form::new(what, cols, depths[1]);
        let (out, scales) = form.pointers();
        let mut sums = sums_of(tiles);
        let to = sums.as_mut_ptr();
        let kernel: ColumnsKernel<u16> =
            on_cpu.kernel(&format!("quantize_columns_{kind}_bf16_{mode}"));
        let from = narrow.as_ptr();
        on_cpu.run(schedule, [covered(cols).div_ceil(64 / halves), tiles], 256, || {
            // SAFETY: buffers and grid are what the comment of the kernels asks for.
            unsafe {
                kernel(out, scales, to, from, r, c, depth, g, second, draw);
            }
        });
        form.check(what, &exact[1], &label("columns, bf16,"));
        check_sums(&sums, &label("columns, bf16,"));
        if group > 64 {
            return;
        }

        // Both at once.
        let mut forms = [0, 1].map(|i| Form::new(what, exact[i].rows, exact[i].depth));
        let [(by_rows, row_scales), (out, scales)] = forms.each_mut().map(Form::pointers);
        let mut sums = sums_of(tiles);
        let to = sums.as_mut_ptr();
        let kernel: BothKernel = on_cpu.kernel(&format!("quantize_both_{kind}_bf16_{mode}"));
        let columns = covered(cols).max(depths[0]);
        on_cpu.run(schedule, [columns.div_ceil(64), tiles], 256, || {
            // SAFETY: buffers and grid are what the comment of the kernels asks for.
            unsafe {
                kernel(
                    by_rows, row_scales, out, scales, to, from, r, c, rows_depth, depth, g, first,
                    second, draw,
                );
            }
        });
        for (form, exact) in forms.iter().zip(&exact) {
            form.check(what, exact, &label("both"));
        }
        check_sums(&sums, &label("both"));
    }
}

type Fp8RowsKernel = unsafe extern "C" fn(
    *mut u8,
    *mut f32,
    *mut u32,
    *const u32,
    *const c_void,
    u32,
    u32,
    u32,
    u32,
    u32,
    TransformArgument,
    DrawArgument,
);
type Fp8GroupsOfRowsKernel = unsafe extern "C" fn(
    *mut u8,
    *mut f32,
    *mut u32,
    *const u32,
    *const c_void,
    u32,
    u32,
    u32,
    u32,
    TransformArgument,
    DrawArgument,
);
type Fp8ColumnsKernel = unsafe extern "C" fn(
    *mut u8,
    *mut f32,
    *mut u32,
    *const u32,
    *mut f32,
    *const c_void,
    u32,
    u32,
    u32,
    u32,
    TransformArgument,
    DrawArgument,
);
type Fp8BothKernel = unsafe extern "C" fn(
    *mut u8,
    *mut u8,
    *mut f32,
    *mut u32,
    *const u32,
    *mut f32,
    *const c_void,
    u32,
    u32,
    u32,
    u32,
    u32,
    TransformArgument,
    TransformArgument,
    DrawArgument,
);

/// The kernels of FP8 operands, against the definition: numbers, raised blocks, sums of columns.
#[test]
fn fp8_operands_are_those_of_the_definition() {
    let Some(on_cpu) = OnCpu::new("mxfp4_fp8") else { return };
    let may_read: unsafe extern "C" fn(*const u128, usize) = on_cpu.kernel("may_read");
    let mut raised_in_all = 0;
    for (case, (rows, cols)) in [(17, 31), (33, 200), (128, 72)].into_iter().enumerate() {
        let mut values = vec![0.0; rows * cols];
        let draw = Draw::of(7, Purpose::Weights, 84, 0);
        crate::mx::fill_normal(&mut values, 1.0, &draw, 0);
        for (i, v) in values.iter_mut().enumerate() {
            match i / 37 % 29 {
                3 => *v = 0.0,
                7 => *v *= 2f32.powi(-(i as i32 % 40)),
                11 => *v *= 1e3,
                _ => {}
            }
            *v = half::bf16::from_f32(*v).to_f32();
        }
        let most = values.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap();
        let bytes: Vec<u8> =
            values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        let (narrow, wide) = (aligned(&bytes), aligned(bytemuck::cast_slice(&values)));
        for (source, len) in [(&narrow, 2 * rows * cols), (&wide, 4 * rows * cols)] {
            // SAFETY: only notes the address.
            unsafe { may_read(source.as_ptr(), len) };
        }
        for (group, rounding) in [0, 32, 64, 128, 256]
            .into_iter()
            .flat_map(|group| [(group, Rounding::Nearest), (group, Rounding::Unbiased)])
        {
            let schedule = SCHEDULES[(case + group / 32) % 3];
            let mode = format!("{rounding:?}").to_lowercase();
            let infix = if group == 64 { "_g64" } else { "" };
            let mut signs = [vec![0.0; group], vec![0.0; group]];
            RANDOM.signs(GemmId::Dgrad).fill_signs(&mut signs[0]);
            RANDOM.signs(GemmId::Wgrad).fill_signs(&mut signs[1]);
            let draw = RANDOM.rounding(OperandId::Dy);
            let exact = |transposed, signs: &[f32]| {
                let (vectors, depth) = if transposed { (cols, rows) } else { (rows, cols) };
                let source = Source { data: &values, rows: vectors, depth, transposed };
                Mxfp4Matrix::quantize(source, signs, rounding, &draw)
            };
            let exact = [exact(false, &signs[0]), exact(true, &signs[1])];
            let [first, second] = [0, 1].map(|i| TransformArgument::new(&signs[i]));
            let draw = DrawArgument::from(draw);
            let [rows_depth, depth] = [0, 1].map(|i| exact[i].depth);
            let (r, c, g, d) = (rows as u32, cols as u32, group as u32, depth as u32);
            let mut check =
                |label: &str, format, forms: &[(&[u128], &Mxfp4Matrix)], factor: f32, raised| {
                    let what = format!("({rows}, {cols}) g {group} {label} {mode}");
                    let mut expected = 0;
                    for (bytes, exact) in forms {
                        let bytes: &[u8] = bytemuck::cast_slice(bytes);
                        let ours: Vec<f64> = bytes[..exact.rows * exact.depth]
                            .iter()
                            .map(|byte| f64::from(factor) * decode_fp8(*byte, format))
                            .collect();
                        expected += compare_fp8(&what, &ours, exact, format, most, group);
                    }
                    assert_eq!(raised, expected, "{what}: raised blocks");
                    raised_in_all += raised;
                };
            let room = |exact: &Mxfp4Matrix| {
                vec![u128::from_le_bytes([0xaa; 16]); (exact.rows * exact.depth).div_ceil(16)]
            };
            for (name, format, precision) in [
                (format!("e4m3{infix}_bf16"), Type::E4m3, Precision::Bf16),
                (format!("e4m3{infix}_f32"), Type::E4m3, Precision::F32),
                (format!("e5m2{infix}_bf16"), Type::E5m2, Precision::Bf16),
            ] {
                let tiles = Tiles::new(precision, cols, depth, group);
                let mut out = room(&exact[1]);
                let (to, mut factor, mut raised) = (out.as_mut_ptr().cast(), f32::NAN, 0);
                let mut sums = vec![f32::NAN; tiles.grid[1] * cols];
                let (at_factor, at_raised, at_sums) =
                    (&raw mut factor, &raw mut raised, sums.as_mut_ptr());
                let from = if precision == Precision::F32 { &wide } else { &narrow };
                let from = from.as_ptr().cast();
                let kernel: Fp8ColumnsKernel =
                    on_cpu.kernel(&format!("quantize_columns_{name}_{mode}"));
                on_cpu.run(schedule, [tiles.grid[0], tiles.grid[1]], tiles.block, || {
                    // SAFETY: buffers and grid are what the comment of the kernels asks for.
                    unsafe {
                        kernel(
                            to, at_factor, at_raised, &most, at_sums, from, r, c, d, g, second,
                            draw,
                        );
                    }
                });
                check(&name, format, &[(&out, &exact[1])], factor, raised);
                for column in 0..cols {
                    let terms = (0..rows).map(|row| f64::from(values[row * cols + column]));
                    let (sum, size) = terms.fold((0.0, 0.0), |(s, z), v| (s + v, z + v.abs()));
                    let ours: f64 =
                        sums.iter().skip(column).step_by(cols).map(|v| f64::from(*v)).sum();
                    assert!((ours - sum).abs() <= 1e-5 * size, "{name}: sum of column {column}");
                }
            }
            let mut out = room(&exact[0]);
            let (to, mut factor, mut raised) = (out.as_mut_ptr().cast(), f32::NAN, 0);
            let (at_factor, at_raised) = (&raw mut factor, &raw mut raised);
            let (from, rd) = (narrow.as_ptr().cast(), rows_depth as u32);
            let kernel = format!("quantize_rows_e5m2{infix}_bf16_{mode}");
            if group == Tiles::GROUP {
                let tiles = Tiles::new(Precision::Bf16, rows_depth, rows, group);
                let kernel: Fp8GroupsOfRowsKernel = on_cpu.kernel(&kernel);
                on_cpu.run(schedule, [tiles.grid[0], tiles.grid[1]], tiles.block, || {
                    // SAFETY: buffers and grid are what the comment of the kernels asks for.
                    unsafe {
                        kernel(to, at_factor, at_raised, &most, from, r, c, rd, g, first, draw);
                    }
                });
            } else {
                let blocks = rows_depth / BLOCK;
                let each = rows_at_once(blocks);
                let block = (each * blocks).next_multiple_of(32);
                let kernel: Fp8RowsKernel = on_cpu.kernel(&kernel);
                on_cpu.run(schedule, [rows.div_ceil(each), 1], block, || {
                    // SAFETY: as above.
                    unsafe {
                        kernel(
                            to,
                            at_factor,
                            at_raised,
                            &most,
                            from,
                            r,
                            c,
                            rd,
                            g,
                            each as u32,
                            first,
                            draw,
                        );
                    }
                });
            }
            check("rows", Type::E5m2, &[(&out, &exact[0])], factor, raised);
            if group > 64 {
                continue;
            }
            let tiles = Tiles::new(Precision::Bf16, rows_depth, depth, group);
            let mut out = exact.each_ref().map(room);
            let [by_rows, by_columns] = out.each_mut().map(|out| out.as_mut_ptr().cast());
            let (mut factor, mut raised) = (f32::NAN, 0);
            let (at_factor, at_raised) = (&raw mut factor, &raw mut raised);
            let kernel: Fp8BothKernel =
                on_cpu.kernel(&format!("quantize_both_e5m2{infix}_bf16_{mode}"));
            let from = narrow.as_ptr().cast();
            on_cpu.run(schedule, [tiles.grid[0], tiles.grid[1]], tiles.block, || {
                // SAFETY: buffers and grid are what the comment of the kernels asks for.
                unsafe {
                    kernel(
                        by_rows,
                        by_columns,
                        at_factor,
                        at_raised,
                        &most,
                        std::ptr::null_mut(),
                        from,
                        r,
                        c,
                        rows_depth as u32,
                        d,
                        g,
                        first,
                        second,
                        draw,
                    );
                }
            });
            let forms = [(&out[0][..], &exact[0]), (&out[1][..], &exact[1])];
            check("both", Type::E5m2, &forms, factor, raised);
        }
    }
    assert!(raised_in_all > 20, "only {raised_in_all} blocks were raised");
}

type GeluKernel<T> = unsafe extern "C" fn(*mut T, *mut u32, *const T, u64);
type SampleKernel = unsafe extern "C" fn(*mut u32, *const c_void, *const c_void, u32);
type BehindGeluKernel = unsafe extern "C" fn(
    *mut u8,
    *mut u8,
    *mut f32,
    *mut u32,
    *mut [u32; BehindGelu::WORDS as usize],
    *mut f32,
    *const c_void,
    *const c_void,
    u32,
    u32,
    u32,
    u32,
    TransformArgument,
    TransformArgument,
    DrawArgument,
);

/// GELU and its derivative to f32's accuracy relative to 1 or x, and no NaN that no NaN made.
#[test]
fn gelu_is_that_of_the_definition() {
    let Some(on_cpu) = OnCpu::new("gelu") else { return };
    let mut x: Vec<f32> = (-12_000..=12_000).map(|i| i as f32 * 1e-3).collect();
    x.extend([1e-40, 1e-20, 20.0, 1e4, 1e12, 1e15, 1e18].iter().flat_map(|v| [*v, -*v]));
    x.extend([0.0, -0.0, f32::NAN]);
    let apply = |name: &str, out: &mut [f32]| {
        let kernel: GeluKernel<f32> = on_cpu.kernel(name);
        let (to, len, mut most) = (out.as_mut_ptr(), x.len(), 0);
        let at_most = &raw mut most;
        on_cpu.run(SCHEDULES[0], [len.div_ceil(8 * 256), 1], 256, || {
            // SAFETY: buffers and grid are what the comment of the kernels asks for.
            unsafe { kernel(to, at_most, x.as_ptr(), len as u64) };
        });
    };
    for (form, forward, backward, bounds) in [
        (Activation::GeluTanh, "gelu_forward_f32", "gelu_backward_f32", [2e-7, 6e-7]),
        (Activation::Gelu, "exact_gelu_forward_f32", "exact_gelu_backward_f32", [2e-7, 6e-7]),
    ] {
        let (mut out, mut slope) = (vec![f32::NAN; x.len()], vec![1.0f32; x.len()]);
        apply(forward, &mut out);
        apply(backward, &mut slope);
        let mut worst = [0.0f64; 2];
        for (i, x) in x.iter().enumerate() {
            let wide = f64::from(*x);
            let pairs = [
                (out[i], reference::gelu_of(form, wide)),
                (slope[i], reference::gelu_derivative_of(form, wide)),
            ];
            for ((ours, exact), worst) in pairs.into_iter().zip(&mut worst) {
                if x.is_nan() {
                    assert!(ours.is_nan());
                    continue;
                }
                *worst = worst.max((f64::from(ours) - exact).abs() / wide.abs().max(1.0));
                assert!(ours.is_finite(), "{x}: {ours}");
            }
        }
        println!("{form}: off by {:.1e} and {:.1e}", worst[0], worst[1]);
        assert!(worst[0] < bounds[0] && worst[1] < bounds[1], "{form}: {worst:?}");
    }
}

/// What the gradients are like that are quantized as they are made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Ordinary,
    /// A row that is not sampled lies far above the others.
    Outlier,
    /// That row has a number that is not finite.
    NotFinite,
    /// The sample has one, too.
    NanInSample,
    Zero,
}

/// Gradients quantized behind GELU are what the derivative's kernel and the one for both forms make one after the
/// other, given the scale that an attempt finds.
#[test]
fn gradients_behind_gelu_are_quantized_as_if_they_were_stored() {
    let Some(on_cpu) = OnCpu::new("mxfp4_fp8") else { return };
    let Some(gelu) = OnCpu::new("gelu") else { return };
    let may_read: unsafe extern "C" fn(*const u128, usize) = on_cpu.kernel("may_read");
    let mut raised_in_all = 0;
    let shapes = [(17, 31), (33, 200), (192, 136), (128, 72)];
    let kinds = [Kind::Ordinary, Kind::Outlier, Kind::NotFinite, Kind::NanInSample, Kind::Zero];
    let cases = shapes.into_iter().flat_map(|shape| kinds.map(|kind| (shape, kind)));
    for (case, ((rows, cols), kind)) in cases.enumerate() {
        let normal = |std, index| {
            let mut values = vec![0.0; rows * cols];
            let draw = Draw::of(9, Purpose::Weights, index, 0);
            crate::mx::fill_normal(&mut values, std, &draw, 0);
            values
        };
        let (mut d, mut pre) = (normal(1e-3, 85), normal(2.0, 86));
        for (i, (d, pre)) in d.iter_mut().zip(&mut pre).enumerate() {
            // Whole groups far below the others, and results where GELU is straight.
            if i / cols >= 64 && i % cols >= 64 {
                *d *= 2f32.powi(-30);
            }
            if i % 211 == 5 {
                *pre *= 1e17;
            }
            match kind {
                Kind::Outlier if i / cols == 13 => *d *= 1e4,
                Kind::NotFinite | Kind::NanInSample if i == 13 * cols + 7 => *d = f32::INFINITY,
                Kind::NanInSample if i == 3 => *d = f32::NAN,
                Kind::Zero => *d = 0.0,
                _ => {}
            }
        }
        let [d, pre] = [d, pre].map(|values| {
            let narrow = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes());
            aligned(&narrow.collect::<Vec<_>>())
        });
        let [from, from_pre] = [&d, &pre].map(|values| values.as_ptr().cast::<c_void>());
        let schedule = SCHEDULES[case % 3];

        // The gradient itself.
        let mut dy = d.clone();
        let (to, len, mut most) = (dy.as_mut_ptr().cast(), (rows * cols) as u64, 0);
        let at_most = &raw mut most;
        let kernel: GeluKernel<u16> = gelu.kernel("gelu_backward_bf16");
        gelu.run(schedule, [2, 1], 256, || {
            // SAFETY: buffers and grid are what the comment of the kernels asks for.
            unsafe { kernel(to, at_most, from_pre.cast(), len) };
        });
        // SAFETY: only notes the address.
        unsafe { may_read(dy.as_ptr(), 2 * rows * cols) };
        let from_dy = dy.as_ptr().cast::<c_void>();
        let narrow: &[u16] = &bytemuck::cast_slice(&dy)[..rows * cols];
        let values: Vec<f32> = narrow.iter().map(|v| half::bf16::from_bits(*v).to_f32()).collect();
        let magnitude = |v: &f32| v.to_bits() & 0x7fff_ffff;
        assert_eq!(most, values.iter().map(magnitude).max().unwrap());

        let mut sampled = 0;
        let at_sampled = &raw mut sampled;
        let kernel: SampleKernel = gelu.kernel("sample_gelu_gradient_bf16");
        gelu.run(schedule, [cols.div_ceil(2048), rows.div_ceil(32)], 256, || {
            // SAFETY: buffers and grid are what the comment of the kernels asks for.
            unsafe { kernel(at_sampled, from, from_pre, cols as u32) };
        });
        let exact = values.chunks(cols).step_by(32).flatten().map(magnitude).max();
        assert_eq!(sampled, exact.unwrap(), "({rows}, {cols}) {kind:?}");

        for rounding in [Rounding::Nearest, Rounding::Unbiased] {
            let what = format!("({rows}, {cols}) {kind:?} {rounding:?}");
            let mode = format!("{rounding:?}").to_lowercase();
            let mut signs = [vec![0.0; 64], vec![0.0; 64]];
            RANDOM.signs(GemmId::Dgrad).fill_signs(&mut signs[0]);
            RANDOM.signs(GemmId::Wgrad).fill_signs(&mut signs[1]);
            let draw = RANDOM.rounding(OperandId::Dy);
            let exact = |transposed, signs: &[f32]| {
                let (vectors, depth) = if transposed { (cols, rows) } else { (rows, cols) };
                let source = Source { data: &values, rows: vectors, depth, transposed };
                Mxfp4Matrix::quantize(source, signs, rounding, &draw)
            };
            let exact = [exact(false, &signs[0]), exact(true, &signs[1])];
            let [first, second] = [0, 1].map(|i| TransformArgument::new(&signs[i]));
            let draw = DrawArgument::from(draw);
            let [rows_depth, depth] = [0, 1].map(|i| exact[i].depth);
            let [r, c, rd, dp] = [rows, cols, rows_depth, depth].map(|n| n as u32);
            let tiles = Tiles::new(Precision::Bf16, rows_depth, depth, 64);
            let grid = [tiles.grid[0], tiles.grid[1]];
            let room = || {
                let bytes = |exact: &Mxfp4Matrix| (exact.rows * exact.depth).div_ceil(16);
                let out = exact.each_ref().map(|exact| vec![u128::MAX / 3; bytes(exact)]);
                (out, f32::NAN, 5u32, vec![f32::NAN; tiles.grid[1] * cols])
            };

            let (mut out, mut factor, mut raised, mut sums) = room();
            let mut attempt = [sampled, 0, 0];
            let [by_rows, by_columns] = out.each_mut().map(|out| out.as_mut_ptr().cast());
            let (at_factor, at_raised, at_sums) =
                (&raw mut factor, &raw mut raised, sums.as_mut_ptr());
            let at_attempt = &raw mut attempt;
            for (name, grid) in [("quantize", grid), ("requantize", [3, 1])] {
                let kernel: BehindGeluKernel =
                    on_cpu.kernel(&format!("{name}_both_gelu_e5m2_g64_bf16_{mode}"));
                on_cpu.run(schedule, grid, tiles.block, || {
                    // SAFETY: buffers and grid are what the comment of the kernels asks for.
                    unsafe {
                        kernel(
                            by_rows, by_columns, at_factor, at_raised, at_attempt, at_sums, from,
                            from_pre, r, c, rd, dp, first, second, draw,
                        );
                    }
                });
            }

            // What fits is 8 times the sample; else the highest block says the scale.
            let top = ((sampled >> 23).saturating_sub(2) + 3).max(16);
            let highest = exact.iter().flat_map(|exact| &exact.scales).max().copied().unwrap();
            let above = match kind {
                Kind::NotFinite | Kind::NanInSample => 253,
                _ => Some(u32::from(highest)).filter(|highest| *highest > top).unwrap_or(0),
            };
            assert_eq!(attempt[..2], [sampled, above], "{what}");
            assert_eq!(above > 0, !matches!(kind, Kind::Ordinary | Kind::Zero), "{what}");
            let most = if above == 0 { sampled } else { (above - 1) << 23 };

            let (mut expected, mut its_factor, mut its_raised, mut its_sums) = room();
            let [by_rows, by_columns] = expected.each_mut().map(|out| out.as_mut_ptr().cast());
            let (at_factor, at_raised, at_sums) =
                (&raw mut its_factor, &raw mut its_raised, its_sums.as_mut_ptr());
            let kernel: Fp8BothKernel =
                on_cpu.kernel(&format!("quantize_both_e5m2_g64_bf16_{mode}"));
            on_cpu.run(schedule, grid, tiles.block, || {
                // SAFETY: buffers and grid are what the comment of the kernels asks for.
                unsafe {
                    kernel(
                        by_rows, by_columns, at_factor, at_raised, &most, at_sums, from_dy, r, c,
                        rd, dp, 64, first, second, draw,
                    );
                }
            });
            assert!(out == expected, "{what}: numbers");
            let bits = |sums: &[f32]| sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&sums), bits(&its_sums), "{what}: sums");
            assert_eq!(factor.to_bits(), its_factor.to_bits(), "{what}: factor");
            assert_eq!(raised, its_raised, "{what}: raised blocks");
            assert_eq!(factor.is_nan(), above == 253, "{what}");
            if above == 253 {
                continue;
            }
            let mut expected = 5;
            for (bytes, exact) in out.iter().zip(&exact) {
                let bytes: &[u8] = &bytemuck::cast_slice(bytes)[..exact.rows * exact.depth];
                let value = |byte: &u8| f64::from(factor) * decode_fp8(*byte, Type::E5m2);
                let ours: Vec<f64> = bytes.iter().map(value).collect();
                expected += compare_fp8(&what, &ours, exact, Type::E5m2, most, 64);
            }
            assert_eq!(raised, expected, "{what}: raised blocks");
            raised_in_all += raised - 5;
        }
    }
    assert!(raised_in_all > 20, "only {raised_in_all} blocks were raised");
}

// ---- AdamW ----

type SquaresKernel = unsafe extern "C" fn(*mut f64, *const Entry, u32, u64);
type SumSquaresKernel =
    unsafe extern "C" fn(*mut f64, *mut u32, *const f64, u32, *const Entry, u32, Step);
type AdamWKernel = unsafe extern "C" fn(*const Entry, u32, u64, *const f64, *mut u32, Step);

/// An update is that of the definition; above the limit there is none; and a trial changes nothing and
/// tells what the update leaves, NaN and infinity included.
#[test]
fn updates_are_those_of_the_definition_and_can_be_tried() {
    let Some(library) = OnCpu::new("adamw") else { return };
    let squares: SquaresKernel = library.kernel("square_gradients");
    let sum_squares: SumSquaresKernel = library.kernel("sum_squares");
    let adamw: AdamWKernel = library.kernel("adamw");
    let lengths = [5003, 7, 4096];
    let with = |lr: f32, clip: f32, largest_gradient: f32| OptimizerStep {
        optimizer: Optimizer { clip, ..Optimizer::default() },
        lr,
        t: 3,
        loss_scale: 1.0,
        largest_gradient,
    };
    // The norm of the gradients is some 55.
    for (case, (lr, clip, m_of_one, v_of_one, g_of_one)) in [
        (0.01, 20.0, 1.0f32, 1.0f32, 1.0f32),
        (3e38, 0.0, 1.0, 1.0, 1.0),
        (0.01, 0.0, 1.0, 1.0, 1e20),
        (0.01, 20.0, 3e37, 0.0, 0.0),
    ]
    .into_iter()
    .enumerate()
    {
        // A parameter, its moments, its gradient; a place in the rest of the first one is special.
        let host = lengths.map(|n| {
            let seed = n as u64;
            let mut all = [0, 1, 2, 3].map(|i| random(n, 10 * seed + i));
            all[2].iter_mut().for_each(|v| *v *= *v);
            if n == 5003 {
                (all[1][5001], all[2][5001], all[3][5001]) = (m_of_one, v_of_one, g_of_one);
            }
            all
        });
        let norm = host.iter().flat_map(|all| &all[3]).map(|g| f64::from(*g).powi(2)).sum::<f64>();
        let norm = norm.sqrt();
        for schedule in SCHEDULES {
            let mut device = host.clone();
            let mut copies = lengths.map(|n| vec![0u16; n]);
            let mut most = [77u32; 3];
            let mut first_piece = 0;
            let table: Vec<Entry> = device
                .iter_mut()
                .zip(&mut copies)
                .zip(&mut most)
                .enumerate()
                .map(|(i, (([param, m, v, gradient], copy), most))| {
                    let len = param.len() as u64;
                    let pieces = len.div_ceil(4096);
                    first_piece += pieces;
                    Entry {
                        param: param.as_mut_ptr().addr() as u64,
                        copy: copy.as_mut_ptr().addr() as u64,
                        m: m.as_mut_ptr().addr() as u64,
                        v: v.as_mut_ptr().addr() as u64,
                        gradient: gradient.as_mut_ptr().addr() as u64,
                        len,
                        first_piece: first_piece - pieces,
                        decays: u64::from(i != 1),
                        most: std::ptr::from_mut(most).addr() as u64,
                    }
                })
                .collect();
            let (mut sums, mut partials, mut raised) = ([2.5, 0.0, 0.0], [0.0; 4], 6u32);
            let (sums, partials, raised) = (&raw mut sums, partials.as_mut_ptr(), &raw mut raised);
            let sums = sums.cast::<f64>();
            let entries = table.as_ptr();
            let run = |step: &OptimizerStep, trial: *mut u32| {
                let step = Step::new(step);
                // SAFETY: buffers are as long as the table and the grids say.
                unsafe {
                    library.run(schedule, [4, 1], 256, || squares(partials, entries, 3, 4));
                    library.run(schedule, [1, 1], 256, || {
                        sum_squares(sums, raised, partials, 4, entries, 3, step);
                    });
                    library.run(schedule, [3, 1], 256, || {
                        adamw(entries, 3, 4, sums, trial, step);
                    });
                }
            };
            // Above the limit: nothing.
            run(&with(lr, clip, 19.0), std::ptr::null_mut());
            let mut trial = [0u32; 9];
            // SAFETY: read between kernels.
            let found = unsafe { std::slice::from_raw_parts(sums, 3) };
            assert!((found[1].sqrt() / norm - 1.0).abs() < 1e-9 && found[2] == 6.0);
            let step = with(lr, clip, f32::INFINITY);
            run(&with(lr, clip, 19.0), trial.as_mut_ptr());
            assert_eq!((&device, most, trial), (&host, [77; 3], [0; 9]), "{case}");
            // Tried, then done.
            run(&step, trial.as_mut_ptr());
            assert_eq!(device, host, "{case}");
            run(&step, std::ptr::null_mut());
            for (i, [p, m, v, _]) in device.iter().enumerate() {
                let bits = |x: &[f32]| x.iter().map(|x| x.abs().to_bits()).max().unwrap();
                // Which NaN it is does not matter.
                let is_same = |a: u32, b: u32| a == b || a.min(b) > 0x7f80_0000;
                for (k, x) in [p, m, v].into_iter().enumerate() {
                    assert!(is_same(trial[3 * i + k], bits(x)), "case {case}, {i}, {k}");
                }
                assert!(is_same(most[i], bits(p)), "case {case}, {i}");
                let scale = if clip > 0.0 { f64::from(clip) / norm } else { 1.0 };
                for k in 0..p.len() {
                    let before = [0, 1, 2].map(|j| f64::from(host[i][j][k]));
                    let gradient = scale * f64::from(host[i][3][k]);
                    let exact = reference::adamw(before, gradient, i != 1, &step);
                    let ours = [p[k], m[k], v[k]];
                    if case > 0 && ours.iter().any(|x| !x.is_finite()) {
                        continue;
                    }
                    for (ours, exact) in ours.into_iter().zip(exact) {
                        let distance = (f64::from(ours) - exact).abs();
                        assert!(distance <= 1e-5 * (1.0 + exact.abs()), "{case}: {ours} {exact}");
                    }
                }
            }
            let is_finite = |i: usize| trial[i] < 0x7f80_0000;
            let expected =
                [[true; 3], [false, true, true], [true, true, false], [false, true, true]];
            assert_eq!([0, 1, 2].map(is_finite), expected[case], "case {case}");
        }
    }
}

mod stable_adamw;
