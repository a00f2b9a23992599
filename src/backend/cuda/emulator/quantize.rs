//! Quantization, byte for byte: `quantize_blocks.cu`, `quantize_fp8.cu`, `quantize_fp8_groups.cu`.
//!
//! Kernels, grids and arguments are those of a launch: all follow from a [`Quantization`].

use proptest::prelude::*;

use super::super::device::gemm::Type;
use super::super::quantize::carrier::{Carrier, tiled};
use super::super::quantize::{Behind, Kept, Launch, Made, Quantization, Source as Operand, Target};
use super::super::tests::{ROUNDINGS, amax_of, compare_fp8, decode_fp8, exact_forms, of_dy};
use super::gelu::GeluKernel;
use super::swiglu::SwiGluKernel;
use super::{Emulator, SCHEDULES, aligned};
use crate::backend::Precision;
use crate::backend::conformance::RANDOM;
use crate::formats::{
    self, BLOCK, Bits, Draw, Format, GemmId, MAX_GROUP, Mxfp4Matrix, OperandId, PowerRule, Purpose,
    Quantized, Range, Rounding, Source, Transform,
};

// ---- Scales in tiles ----

proptest! {
    /// Every scale has a place of its own, and the places fill what is planned for them but for the
    /// padding.
    #[test]
    fn tiles_hold_every_scale_once(vectors in 1usize..400, blocks in 1usize..40) {
        let bytes = Carrier::Mxfp8.scale_bytes(vectors, blocks * BLOCK);
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

// ---- Operands ----

/// Forms along rows and down columns.
type Forms = [bool; 2];
const ROWS: Forms = [true, false];
const COLUMNS: Forms = [false, true];
const BOTH: Forms = [true, true];

/// A source with what is hard: zeros, both ends of the range, and where `poisoned` NaN and
/// infinity.
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

fn bf16_bytes(values: &[f32]) -> Vec<u128> {
    let narrow = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes());
    aligned(&narrow.collect::<Vec<_>>())
}

fn run(emulator: &Emulator, schedule: (u32, u32), of: &Quantization) {
    emulator.launch(schedule, &of.kernel(), of.launch(), of.arguments());
}

/// The parts of column sums add up to those of the values.
fn check_sums(sums: &[f32], values: &[f32], cols: usize, what: &str) {
    for column in 0..cols {
        let terms = values.iter().skip(column).step_by(cols).map(|v| f64::from(*v));
        let (exact, size) = terms.fold((0.0, 0.0), |(s, z), v| (s + v, z + v.abs()));
        let ours: f64 = sums.iter().skip(column).step_by(cols).map(|v| f64::from(*v)).sum();
        let same = (ours - exact).abs() <= 1e-5 * size || !ours.is_finite() && !exact.is_finite();
        assert!(same, "{what}: sum {ours} of column {column} instead of {exact}");
    }
}

// ---- Blocks with scales of their own ----

/// One form of a result: elements and scales.
struct Form {
    format: Type,
    elements: Vec<u128>,
    scales: Vec<u128>,
}

impl Form {
    fn new(format: Type, exact: &Mxfp4Matrix) -> Self {
        let elements = exact.rows * exact.depth;
        let (bytes, carrier) = match format {
            Type::Bf16 => (2 * elements, Carrier::Bf16),
            Type::E2m1 => (elements / 2, Carrier::Fp4),
            _ => (elements, Carrier::Mxfp8),
        };
        let poison = |bytes: usize| vec![u128::from_le_bytes([0xaa; 16]); bytes.div_ceil(16)];
        let scales = poison(carrier.scale_bytes(exact.rows, exact.depth));
        Self { format, elements: poison(bytes), scales }
    }

    fn target(&mut self) -> Target {
        let [out, scales] = [&mut self.elements, &mut self.scales].map(|of| of.as_mut_ptr() as u64);
        Target { format: self.format, out, scales }
    }

    fn check(&self, exact: &Mxfp4Matrix, case: &str) {
        let (elements, scales): (&[u8], &[u8]) =
            (bytemuck::cast_slice(&self.elements), bytemuck::cast_slice(&self.scales));
        match self.format {
            Type::Mxfp8 => return check_mxfp8(elements, scales, exact, case),
            Type::Bf16 => {
                let values: &[u16] = bytemuck::cast_slice(&self.elements);
                for (value, exact) in values.iter().zip(exact.dequantize()) {
                    let value = half::bf16::from_bits(*value).to_f32();
                    let same = value == exact || value.is_nan() && exact.is_nan();
                    assert!(same, "{case}: {value} instead of {exact}");
                }
                return;
            }
            _ => {}
        }
        assert!(elements[..exact.codes.len()] == exact.codes, "{case}: codes differ");
        assert!(scales[..exact.scales.len()] == exact.scales, "{case}: scales differ");
    }
}

/// E4M3's bytes of the values of E2M1.
const E4M3: [u8; 8] = [0x00, 0x30, 0x38, 0x3c, 0x40, 0x44, 0x48, 0x4c];

/// MXFP8's elements and scales are the definition's, NaN in blocks whose scale is NaN, and what the
/// tiles have beyond the matrix is zero.
pub(in super::super) fn check_mxfp8(
    elements: &[u8],
    scales: &[u8],
    exact: &Mxfp4Matrix,
    case: &str,
) {
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

/// The kernels that give every block a scale of its own, in all their forms, against the
/// definition, byte for byte.
#[test]
fn quantized_operands_are_those_of_the_definition() {
    let Some(emulator) = Emulator::new("quantize_blocks") else { return };
    for (case, (rows, cols)) in [(1, 1), (17, 31), (33, 200), (130, 72)].into_iter().enumerate() {
        let values = source(rows, cols, case == 3);
        for (group, format, rounding) in [0, 32, 64, 128, 256].into_iter().flat_map(|group| {
            let all = [Type::Bf16, Type::E2m1, Type::Mxfp8];
            all.into_iter().flat_map(move |format| ROUNDINGS.map(|mode| (group, format, mode)))
        }) {
            let schedule = SCHEDULES[(case + group / 32) % 3];
            check_blocks(&emulator, schedule, &values, cols, format, group, rounding);
        }
    }
}

fn check_blocks(
    emulator: &Emulator,
    schedule: (u32, u32),
    values: &[f32],
    cols: usize,
    format: Type,
    group: usize,
    rounding: (Rounding, Range),
) {
    let shape = (values.len() / cols, cols);
    let (narrow, exact) = (bf16_bytes(values), exact_forms(values, shape, group, rounding));
    for (precision, address) in
        [(Precision::F32, values.as_ptr() as u64), (Precision::Bf16, narrow.as_ptr() as u64)]
    {
        for forms in [ROWS, COLUMNS, BOTH] {
            let never = precision == Precision::F32 || format == Type::Bf16 || group > 64;
            if forms == BOTH && never {
                continue;
            }
            let what =
                format!("{shape:?} g {group} {forms:?} {precision:?} {format:?} {rounding:?}");
            let of_dy = of_dy(Operand { address, precision }, shape, group, rounding);
            let [mut rows, mut columns] = exact.each_ref().map(|exact| Form::new(format, exact));
            let of_dy = Quantization {
                by_rows: forms[0].then(|| rows.target()),
                by_columns: forms[1].then(|| columns.target()),
                ..of_dy
            };
            let mut sums = vec![f32::NAN; of_dy.launch().grid[1] * cols];
            run(emulator, schedule, &Quantization { sums: sums.as_mut_ptr() as u64, ..of_dy });
            if forms[0] {
                rows.check(&exact[0], &what);
            }
            if forms[1] {
                columns.check(&exact[1], &what);
                check_sums(&sums, values, cols, &what);
            }
        }
    }
}

// ---- FP8 numbers ----

/// FP8 forms of an operand, the words beside them, and sums.
struct Fp8 {
    out: [Vec<u128>; 2],
    factor: f32,
    /// From [`Fp8::BEFORE`] on.
    clamped: u32,
    sums: Vec<f32>,
}

impl Fp8 {
    const BEFORE: u32 = 5;

    fn new(exact: &[Mxfp4Matrix; 2]) -> Self {
        let room = |exact: &Mxfp4Matrix| {
            vec![u128::from_le_bytes([0xaa; 16]); (exact.rows * exact.depth).div_ceil(16)]
        };
        // Parts of at least 64 rows, and one that the padding makes.
        let sums = vec![f32::NAN; (exact[1].depth / 64 + 1) * exact[1].rows];
        let out = exact.each_ref().map(room);
        Self { out, factor: f32::NAN, clamped: Self::BEFORE, sums }
    }

    /// `of`, whose forms go here.
    fn take(&mut self, of: Quantization, format: Type, forms: Forms) -> Quantization {
        let scales = &raw mut self.factor as u64;
        let [by_rows, by_columns] =
            self.out.each_mut().map(|out| Target { format, out: out.as_mut_ptr() as u64, scales });
        Quantization {
            by_rows: forms[0].then_some(by_rows),
            by_columns: forms[1].then_some(by_columns),
            sums: self.sums.as_mut_ptr() as u64,
            clamped: &raw mut self.clamped as u64,
            ..of
        }
    }

    /// Compares the numbers; how many blocks were clamped is returned.
    fn check(&self, exact: &[Mxfp4Matrix; 2], of: &Quantization, amax: u32, what: &str) -> u32 {
        let mut expected = 0;
        for (i, target) in [of.by_rows, of.by_columns].into_iter().enumerate() {
            let Some(Target { format, .. }) = target else { continue };
            let numbers = exact[i].rows * exact[i].depth;
            let bytes: &[u8] = &bytemuck::cast_slice(&self.out[i])[..numbers];
            let value = |byte: &u8| f64::from(self.factor) * decode_fp8(*byte, format);
            let ours: Vec<f64> = bytes.iter().map(value).collect();
            expected += compare_fp8(what, &ours, &exact[i], format, amax, of.drawn.group());
        }
        assert_eq!(self.clamped - Self::BEFORE, expected, "{what}: clamped blocks");
        expected
    }
}

/// The kernels of FP8 operands, against the definition: numbers, clamped blocks, sums of columns.
#[test]
fn fp8_operands_are_those_of_the_definition() {
    let Some(any) = Emulator::new("quantize_fp8") else { return };
    let Some(groups) = Emulator::new("quantize_fp8_groups") else { return };
    let mut clamped = 0;
    for (case, shape) in [(17, 31), (33, 200), (128, 72)].into_iter().enumerate() {
        let mut values = vec![0.0; shape.0 * shape.1];
        formats::fill_normal(&mut values, 1.0, &Draw::of(7, Purpose::Weights, 84, 0), 0);
        for (i, v) in values.iter_mut().enumerate() {
            match i / 37 % 29 {
                3 => *v = 0.0,
                7 => *v *= 2f32.powi(-(i as i32 % 40)),
                11 => *v *= 1e3,
                _ => {}
            }
            *v = half::bf16::from_f32(*v).to_f32();
        }
        let amax = amax_of(&values);
        let scale = formats::e4m3_scale(f32::from_bits(amax));
        let in_e4m3: Vec<f32> =
            values.iter().map(|v| formats::round_to_e4m3(v / scale) * scale).collect();
        let (narrow, wide) = (bf16_bytes(&values), aligned(bytemuck::cast_slice(&values)));
        for emulator in [&any, &groups] {
            emulator.may_read(&narrow, 2 * values.len());
            emulator.may_read(&wide, 4 * values.len());
        }
        let [narrow, wide] = [(Precision::Bf16, &narrow), (Precision::F32, &wide)]
            .map(|(precision, of)| Operand { address: of.as_ptr() as u64, precision });
        for (group, rounding) in [0, 32, 64, 128, 256]
            .into_iter()
            .flat_map(|group| ROUNDINGS.map(|rounding| (group, rounding)))
        {
            let emulator = if group == 64 { &groups } else { &any };
            let schedule = SCHEDULES[(case + group / 32) % 3];
            for (source, format, forms, kept) in [
                (narrow, Type::E4m3, COLUMNS, Kept::AsStored),
                (narrow, Type::E4m3, COLUMNS, Kept::AsE4m3),
                (wide, Type::E4m3, COLUMNS, Kept::AsStored),
                (narrow, Type::E5m2, COLUMNS, Kept::AsStored),
                (narrow, Type::E5m2, ROWS, Kept::AsStored),
                (narrow, Type::E5m2, BOTH, Kept::AsStored),
            ] {
                if forms == BOTH && group > 64 {
                    continue;
                }
                let what =
                    format!("{shape:?} g {group} {format:?} {forms:?} {rounding:?} {kept:?}");
                let values = if kept == Kept::AsE4m3 { &in_e4m3 } else { &values };
                let exact = exact_forms(values, shape, group, rounding);
                let mut fp8 = Fp8::new(&exact);
                let of_dy = of_dy(source, shape, group, rounding);
                let of_dy = Quantization { kept, amax: &raw const amax as u64, ..of_dy };
                let of_dy = fp8.take(of_dy, format, forms);
                run(emulator, schedule, &of_dy);
                clamped += fp8.check(&exact, &of_dy, amax_of(values), &what);
                if forms[1] {
                    let parts = of_dy.launch().grid[1];
                    check_sums(&fp8.sums[..parts * shape.1], values, shape.1, &what);
                }
            }
        }
    }
    assert!(clamped > 20, "only {clamped} blocks were clamped");
}

/// A form of an operand as its format defines it, and its vectors before they are quantized.
fn defined_form(
    values: &[f32],
    [rows, cols]: [usize; 2],
    operand: &formats::Operand,
    transform: Option<Transform>,
    transposed: bool,
) -> (Quantized, Vec<f32>) {
    let gemm = if transposed { GemmId::Wgrad } else { GemmId::Dgrad };
    let (vectors, length) = if transposed { (cols, rows) } else { (rows, cols) };
    let mut room = [0.0; MAX_GROUP];
    let signs = formats::fill_signs(&mut room, transform, gemm, &RANDOM);
    let source = Source { data: values, rows: vectors, depth: length, transposed };
    let [elements, scales] =
        [OperandId::Dy, OperandId::Dy.of_scales()].map(|id| RANDOM.rounding(id));
    let exact = Quantized::new(source, operand, signs, &Bits { elements, scales, transposed });
    let mut before = vec![0.0; vectors * exact.depth];
    for (vector, to) in before.chunks_exact_mut(exact.depth).enumerate() {
        to[..length].iter_mut().enumerate().for_each(|(k, to)| *to = source.at(vector, k));
        if !signs.is_empty() {
            to.chunks_exact_mut(signs.len()).for_each(|group| formats::rotate(group, signs));
        }
    }
    (exact, before)
}

/// Scales by every rule, and of what a forward pass in MXFP4 made of the source: numbers are the
/// definition's, and blocks too far below the tensor's largest magnitude are clamped and counted.
#[test]
fn fp8_operands_of_every_rule_are_those_of_the_definition() {
    let Some(any) = Emulator::new("quantize_fp8") else { return };
    let Some(groups) = Emulator::new("quantize_fp8_groups") else { return };
    let mut clamped = 0;
    for (case, shape @ [rows, cols]) in [[17, 31], [33, 200], [160, 72]].into_iter().enumerate() {
        let mut values = vec![0.0; rows * cols];
        formats::fill_normal(&mut values, 1.0, &Draw::of(8, Purpose::Weights, 84, 0), 0);
        for (i, v) in values.iter_mut().enumerate() {
            match i / 37 % 11 {
                3 => *v = 0.0,
                5 => *v *= 2f32.powi(-(i as i32 % 40)),
                // On both sides of where rules round up.
                7 => *v = [1.0, 1.5, 1.507_812_5, 1.742_187_5, 1.75, 1.992_187_5][i % 6],
                _ => {}
            }
            // Blocks far below all others.
            if i / cols >= 96 && i % cols >= 32 {
                *v *= 2f32.powi(-20);
            }
            *v = half::bf16::from_f32(*v).to_f32();
        }
        let amax = amax_of(&values);
        let (narrow, wide) = (bf16_bytes(&values), aligned(bytemuck::cast_slice(&values)));
        for emulator in [&any, &groups] {
            emulator.may_read(&narrow, 2 * values.len());
            emulator.may_read(&wide, 4 * values.len());
        }
        let [narrow, wide] = [(Precision::Bf16, &narrow), (Precision::F32, &wide)]
            .map(|(precision, of)| Operand { address: of.as_ptr() as u64, precision });
        let in_ceil = Kept::AsMxfp4(PowerRule::Ceil, Range::Full);
        let in_even = Kept::AsMxfp4(PowerRule::Even, Range::ThreeQuarters);
        let sources = [
            (narrow, Type::E4m3, ROWS, Kept::AsStored),
            (wide, Type::E4m3, ROWS, Kept::AsStored),
            (narrow, Type::E5m2, ROWS, Kept::AsStored),
            (narrow, Type::E5m2, BOTH, Kept::AsStored),
            (wide, Type::E4m3, COLUMNS, Kept::AsStored),
            (narrow, Type::E4m3, COLUMNS, in_ceil),
            (narrow, Type::E4m3, COLUMNS, in_even),
            (wide, Type::E4m3, COLUMNS, in_ceil),
            (wide, Type::E4m3, COLUMNS, in_even),
        ];
        let rules = [PowerRule::Floor, PowerRule::Ceil, PowerRule::Even];
        let roundings = [Rounding::Nearest, Rounding::Unbiased];
        let cases = sources.into_iter().flat_map(|source| {
            let all = rules.into_iter().flat_map(move |rule| roundings.map(|to| (rule, to)));
            all.flat_map(move |(rule, to)| [0, 64, 256].map(|group| (source, rule, to, group)))
        });
        for ((source, format, forms, kept), rule, rounding, group) in cases {
            let forward = format == Type::E4m3 && forms == ROWS;
            if forward && (rounding == Rounding::Unbiased || group > 0)
                || group == 256 && forms != COLUMNS
            {
                continue;
            }
            let what =
                format!("{shape:?} g {group} {format:?} {forms:?} {rule} {rounding:?} {kept:?}");
            let operand = formats::Operand::of(Format::mxfp4(rule, false)).rounded(rounding);
            let seen = match kept {
                Kept::AsMxfp4(rule, range) => {
                    let of = formats::Operand::of(Format::mxfp4(rule, false)).within(range);
                    defined_form(&values, shape, &of, None, false).0.dequantized(cols)
                }
                _ => values.clone(),
            };
            let of = of_dy(source, (rows, cols), group, (rounding, operand.range()));
            let of = Quantization { kept, rule, amax: &raw const amax as u64, ..of };
            let exact = [false, true].map(|transposed| {
                defined_form(&seen, shape, &operand, of.drawn.transform, transposed)
            });
            let room = |exact: &Quantized| {
                vec![u128::from_le_bytes([0xaa; 16]); exact.values.len().div_ceil(16)]
            };
            let sums = vec![f32::NAN; (exact[1].0.depth / 64 + 1) * cols];
            let out = exact.each_ref().map(|(exact, _)| room(exact));
            let mut fp8 = Fp8 { out, factor: f32::NAN, clamped: Fp8::BEFORE, sums };
            let of = fp8.take(of, format, forms);
            let emulator = if of.kernel().contains("<64,") { &groups } else { &any };
            run(emulator, SCHEDULES[(case + group / 64) % 3], &of);
            // As far as a rotation may raise the largest.
            let slack = [0, 3, 4][group.div_ceil(64).min(2)];
            let top = u32::from(rule.byte(&[f32::from_bits(amax_of(&seen))])) + slack;
            let lowest = top.saturating_sub(if format == Type::E4m3 { 14 } else { 28 });
            let mut expected = 0;
            for (i, (exact, before)) in exact.iter().enumerate().filter(|(i, _)| forms[*i]) {
                let bytes: &[u8] = bytemuck::cast_slice(&fp8.out[i]);
                let blocks = exact.values.chunks(BLOCK).zip(before.chunks(BLOCK));
                for (block, (exact, before)) in blocks.enumerate() {
                    let bytes = &bytes[block * BLOCK..][..BLOCK];
                    let value = |byte: &u8| f64::from(fp8.factor) * decode_fp8(*byte, format);
                    let ours: Vec<f64> = bytes.iter().map(value).collect();
                    if amax_of(before) == 0 || u32::from(rule.byte(before)) >= lowest {
                        let same = ours.iter().zip(exact).all(|(a, b)| *a == f64::from(*b));
                        assert!(same, "{what}: block {block} is {ours:?}, not {exact:?}");
                        continue;
                    }
                    expected += 1;
                    let unit = 2f64.powi(lowest as i32 - 127);
                    let grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
                    let valid = ours.iter().all(|v| grid.contains(&(v.abs() / unit)));
                    assert!(valid, "{what}: block {block} is clamped to {ours:?}");
                }
            }
            assert_eq!(fp8.clamped - Fp8::BEFORE, expected, "{what}: clamped blocks");
            clamped += expected;
        }
    }
    assert!(clamped > 20, "only {clamped} blocks were clamped");
}

// ---- The gradient behind an activation ----

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

/// Gradients quantized behind an activation are what its derivative's kernel and the one for both
/// forms make one after the other, given the scale that an attempt finds.
#[test]
fn gradients_behind_activations_are_quantized_as_if_they_were_stored() {
    let Some(emulator) = Emulator::new("quantize_fp8_groups") else { return };
    let Some(gelu) = Emulator::new("gelu") else { return };
    let Some(swiglu) = Emulator::new("swiglu") else { return };
    let mut clamped_in_all = [0; 2];
    // Of SwiGLU: without whole pieces, with tiles that have both of gate and up, and one of each.
    let shapes = [
        (Made::Gelu, (17, 31)),
        (Made::Gelu, (33, 200)),
        (Made::Gelu, (192, 136)),
        (Made::Gelu, (128, 72)),
        (Made::SwiGlu, (33, 74)),
        (Made::SwiGlu, (192, 208)),
        (Made::SwiGlu, (128, 128)),
    ];
    let kinds = [Kind::Ordinary, Kind::Outlier, Kind::NotFinite, Kind::NanInSample, Kind::Zero];
    let cases = shapes.into_iter().flat_map(|shape| kinds.map(|kind| (shape, kind)));
    for (case, ((made, shape @ (rows, cols)), kind)) in cases.enumerate() {
        let normal = |std, index, width| {
            let mut values = vec![0.0; rows * width];
            formats::fill_normal(&mut values, std, &Draw::of(9, Purpose::Weights, index, 0), 0);
            values
        };
        // Of d.
        let width = if made == Made::Gelu { cols } else { cols / 2 };
        let (mut d, mut pre) = (normal(1e-3, 85, width), normal(2.0, 86, cols));
        for (i, d) in d.iter_mut().enumerate() {
            // Whole groups far below the others.
            if i / width >= 64 && i % width >= 64 {
                *d *= 2f32.powi(-30);
            }
            match kind {
                Kind::Outlier if i / width == 13 => *d *= 1e4,
                Kind::NotFinite | Kind::NanInSample if i == 13 * width + 7 => *d = f32::INFINITY,
                Kind::NanInSample if i == 3 => *d = f32::NAN,
                Kind::Zero => *d = 0.0,
                _ => {}
            }
        }
        if made == Made::Gelu {
            // Results where GELU is straight.
            pre.iter_mut().skip(5).step_by(211).for_each(|pre| *pre *= 1e17);
        }
        let [d, pre] = [d, pre].map(|values| bf16_bytes(&values));
        let schedule = SCHEDULES[case % 3];

        // The gradient itself.
        let mut dy = if made == Made::Gelu { d.clone() } else { pre.clone() };
        let (to, len, mut amax) = (dy.as_mut_ptr().cast(), (rows * cols) as u64, 0);
        let at_amax = &raw mut amax;
        match made {
            Made::Gelu => {
                let kernel: GeluKernel<u16> = gelu.kernel("gelu_of_all<bf16,false,true>");
                gelu.run(schedule, [2, 1], 256, || {
                    // SAFETY: buffers and grid are what the comment of the kernel asks for.
                    unsafe { kernel(to, at_amax, pre.as_ptr().cast(), len) };
                });
            }
            Made::SwiGlu => {
                let kernel: SwiGluKernel = swiglu.kernel("swiglu_backward<bf16>");
                let from = d.as_ptr() as u64;
                swiglu.run(schedule, [2, 1], 256, || {
                    // SAFETY: the same.
                    unsafe { kernel(to as u64, at_amax, from, rows as u32, width as u32) };
                });
            }
        }
        emulator.may_read(&dy, 2 * rows * cols);
        let narrow: &[u16] = &bytemuck::cast_slice(&dy)[..rows * cols];
        let values: Vec<f32> = narrow.iter().map(|v| half::bf16::from_bits(*v).to_f32()).collect();
        assert_eq!(amax, amax_of(&values));

        let mut sampled = 0;
        let at_sampled = &raw mut sampled;
        type SampleKernel = unsafe extern "C" fn(*mut u32, *const u128, *const u128, u32);
        let (activation, name) = match made {
            Made::Gelu => (&gelu, "sample_gelu_gradient"),
            Made::SwiGlu => (&swiglu, "sample_swiglu_gradient"),
        };
        let kernel: SampleKernel = activation.kernel(name);
        activation.run(schedule, [width.div_ceil(2048), rows.div_ceil(32)], 256, || {
            // SAFETY: buffers and grid are what the comments of the kernels ask for.
            unsafe { kernel(at_sampled, d.as_ptr(), pre.as_ptr(), width as u32) };
        });
        let rows_sampled = values.chunks(cols).step_by(32).collect::<Vec<_>>().concat();
        assert_eq!(sampled, amax_of(&rows_sampled), "{made:?} {shape:?} {kind:?}");

        for rounding in ROUNDINGS {
            let what = format!("{made:?} {shape:?} {kind:?} {rounding:?}");
            let exact = exact_forms(&values, shape, 64, rounding);
            let [of_d, of_dy] = [&d, &dy].map(|source| {
                let source =
                    Operand { address: source.as_ptr() as u64, precision: Precision::Bf16 };
                of_dy(source, shape, 64, rounding)
            });
            let mut attempt = [sampled, 0, 0];
            let mut ours = Fp8::new(&exact);
            let behind = Behind {
                made,
                both: ours.take(of_d, Type::E5m2, BOTH),
                pre: pre.as_ptr() as u64,
                attempt: &raw mut attempt as u64,
            };
            let launch = behind.both.launch();
            let again = Launch { grid: [3, 1, 1], ..launch };
            for (launch, again) in [(launch, false), (again, true)] {
                let name = behind.kernel(again);
                emulator.launch(schedule, &name, launch, behind.arguments());
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
            let amax = if above == 0 { sampled } else { (above - 1) << 23 };

            let mut stored = Fp8::new(&exact);
            let of_dy = Quantization { amax: &raw const amax as u64, ..of_dy };
            run(&emulator, schedule, &stored.take(of_dy, Type::E5m2, BOTH));
            assert!(ours.out == stored.out, "{what}: numbers");
            let bits = |sums: &[f32]| sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&ours.sums), bits(&stored.sums), "{what}: sums");
            assert_eq!(ours.factor.to_bits(), stored.factor.to_bits(), "{what}: factor");
            assert_eq!(ours.clamped, stored.clamped, "{what}: clamped blocks");
            assert_eq!(ours.factor.is_nan(), above == 253, "{what}");
            if above != 253 {
                clamped_in_all[made as usize] += ours.check(&exact, &behind.both, amax, &what);
            }
        }
    }
    assert!(clamped_in_all.iter().all(|n| *n > 20), "only {clamped_in_all:?} blocks were clamped");
}
