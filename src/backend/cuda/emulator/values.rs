//! Operands in numbers: `quantize_values.cu`, `quantize_nvfp4.cu` and `int8.cu`, bit for bit.

use super::super::quantize::Launch;
use super::super::quantize::Source as Address;
use super::super::quantize::values::{Matrix, Outliers, Quantization, Scaling, To};
use super::{Emulator, SCHEDULES, aligned};
use crate::backend::Precision;
use crate::backend::conformance::RANDOM;
use crate::formats::{
    self, Bits, Draw, Format, GemmId, Nvfp4Scale, Operand, OperandId, PowerRule, Purpose,
    Quantized, Range, Rounding, Signs, Source, Transform,
};

/// One of every kind, and of every switch.
fn operands() -> Vec<Operand> {
    let of = Operand::of;
    let mut all = vec![Operand::BF16, Operand::E4M3, Operand::E5M2];
    for bits in 1..=7 {
        all.extend([false, true].map(|cut| of(Format::mantissa(bits, cut))));
    }
    all.extend([Format::INT8_VECTORS, Format::INT8_TENSOR].map(of));
    all.extend([false, true].map(|powers| of(Format::e2m1_vectors(powers))));
    for share in [0.99, 0.9] {
        all.push(of(Format::e2m1_vectors(true)).with_outliers(formats::Kept::new(share)));
    }
    for rule in PowerRule::ALL {
        for square in [false, true] {
            let operand = of(Format::mxfp4(rule, square));
            all.extend([operand, operand.within(Range::ThreeQuarters)]);
            let deviation = matches!(rule, PowerRule::Quest | PowerRule::QuestFloor);
            if !square && !deviation {
                all.push(operand.rounded(Rounding::Unbiased));
            }
        }
    }
    for rule in [Nvfp4Scale::Full, Nvfp4Scale::Headroom, Nvfp4Scale::FourOverSix] {
        all.extend([false, true].map(|square| of(Format::nvfp4(rule, square))));
        if rule != Nvfp4Scale::FourOverSix {
            all.push(of(Format::nvfp4(rule, false)).rounded(Rounding::Unbiased));
        }
    }
    for powers in [false, true] {
        let operand = of(Format::nvfp4_within(powers));
        all.extend([operand, operand.rounded(Rounding::Unbiased)]);
    }
    // With each transform, of those that blocks let be.
    let transforms = [
        (16, Signs::Nvidia),
        (16, Signs::Random),
        (32, Signs::Fixed),
        (32, Signs::Plain),
        (64, Signs::Fixed),
        (128, Signs::Random),
        (256, Signs::Random),
    ];
    let plain = all.clone();
    for (i, operand) in plain.iter().enumerate() {
        let format = operand.format();
        if !(format.is_mxfp4() || format.is_nvfp4()) {
            continue;
        }
        let fits = |(group, _): &&(usize, Signs)| *group >= format.block().depth();
        let fitting: Vec<_> = transforms.iter().filter(fits).collect();
        // All are met, two with each.
        for j in [i, i + 1] {
            let (group, signs) = *fitting[j % fitting.len()];
            all.push(operand.rotated(Transform::of(group, signs)));
        }
    }
    // As a forward pass rotates them.
    let of_forward = |format: &Format| {
        let blocks = format.is_mxfp4() || format.is_nvfp4();
        blocks && !format.is_square()
    };
    for operand in plain.iter().filter(|operand| of_forward(&operand.format())) {
        if operand.rounding() == Rounding::Nearest {
            all.push(operand.rotated(Transform::of(32, Signs::Plain)));
        }
    }
    let eden = of(Format::NVFP4).rounded(Rounding::Eden);
    all.extend([128, 256].map(|group| eden.rotated(Transform::of(group, Signs::Random))));
    let blocks = PowerRule::ALL.map(|rule| Format::mxfp4(rule, false)).into_iter();
    let sixteens = [Nvfp4Scale::Full, Nvfp4Scale::Headroom, Nvfp4Scale::FourOverSix];
    let blocks = blocks.chain(sixteens.map(|rule| Format::nvfp4(rule, false)));
    let blocks = blocks.chain([false, true].map(Format::nvfp4_within));
    all.extend(blocks.map(|format| of(format).rounded(Rounding::ByMean)));
    all
}

/// What data are like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Data {
    Normal,
    /// Numbers of all sizes, zeros, whole blocks at the ends of the range.
    Tailed,
    NotFinite,
    Zero,
}

pub(super) fn data(len: usize, kind: Data) -> Vec<f32> {
    let mut values = vec![0.0; len];
    formats::fill_normal(&mut values, 1.0, &Draw::of(3, Purpose::Weights, 87, 0), 0);
    for (i, v) in values.iter_mut().enumerate() {
        match kind {
            Data::Normal => {}
            Data::Zero => *v = if i % 2 == 0 { 0.0 } else { -0.0 },
            Data::Tailed | Data::NotFinite => {
                *v *= v.abs().powi(3);
                match i / 37 % 29 {
                    3 => *v = 0.0,
                    7 => *v *= 1e-38,
                    11 => *v *= 1e35,
                    13 => *v *= 1e-30,
                    17 => *v = 1.5 * 2f32.powi(i as i32 % 7 - 3),
                    _ => {}
                }
            }
        }
    }
    if kind == Data::NotFinite {
        values[len / 3] = f32::NAN;
        values[len - 1] = f32::NEG_INFINITY;
    }
    values
}

/// As bits of bf16 numbers or f32 ones, NaN being NaN.
pub(super) fn word(v: f32, wide: bool) -> u32 {
    match (v.is_nan(), wide) {
        (true, _) => u32::MAX,
        (false, true) => v.to_bits(),
        (false, false) => u32::from(half::bf16::from_f32(v).to_bits()) << 16,
    }
}

/// Numbers, scales and dequantized values of every format are those of the definition.
#[test]
fn values_are_those_of_the_definition() {
    let Some(plain) = Emulator::new("quantize_values") else { return };
    let Some(nvfp4) = Emulator::new("quantize_nvfp4") else { return };
    let Some(int8) = Emulator::new("int8") else { return };
    let Some(bounds_of) = Emulator::new("outliers") else { return };
    let emulators = [&plain, &nvfp4, &int8, &bounds_of];
    let mut cases = 0;
    for (i, operand) in operands().iter().enumerate() {
        let own = operand.format().is_nvfp4();
        // The last has whole tiles alone.
        let shapes = [(33, 70), (21, 300), (3, 5), (64, 256)];
        for (j, shape) in shapes.into_iter().take(if own { 4 } else { 3 }).enumerate() {
            // Tails, which have much of the rest, in all orientations; the others in turn.
            let others = [Data::Normal, Data::NotFinite, Data::Zero];
            let kind = if j == 0 { Data::Tailed } else { others[(i + j) % 3] };
            let by_mean = operand.rounding() == Rounding::ByMean;
            for transposed in [false, true].into_iter().filter(|turned| !(*turned && by_mean)) {
                let precision = [Precision::F32, Precision::Bf16][(i / 4 + j) % 2];
                let schedule = SCHEDULES[cases % 3];
                // Where numbers go does not depend on how they are made.
                let (wide, dequantized) = [(true, false), (false, false), (true, true)][cases % 3];
                let to = To { wide, dequantized, ..To::default() };
                // Outliers are those of vectors that are stored as such.
                if transposed && operand.outliers().is_some() {
                    continue;
                }
                check(emulators, schedule, operand, (shape, kind), (precision, transposed), to);
                cases += 1;
            }
        }
    }
    check_int8(emulators);
}

/// Sizes that int8 has kernels of its own for: several vectors a thread block, and one alone.
fn check_int8(emulators: [&Emulator; 4]) {
    let kinds = [Data::Normal, Data::Tailed, Data::NotFinite, Data::Zero];
    for (i, shape) in [(16, 16), (21, 80), (48, 544), (16, 4112)].into_iter().enumerate() {
        for (j, kind) in kinds.into_iter().enumerate() {
            let schedule = SCHEDULES[(i + j) % 3];
            // Every other kind of long vectors, which take long, in bf16 alone.
            let both = [Precision::F32, Precision::Bf16];
            for precision in both.into_iter().skip(if i == 3 { j % 2 } else { 0 }) {
                for (format, transposed, bytes) in [
                    (Format::INT8_VECTORS, false, false),
                    (Format::INT8_TENSOR, false, false),
                    (Format::INT8_TENSOR, true, false),
                    (Format::INT8_VECTORS, false, true),
                    (Format::INT8_TENSOR, false, true),
                    (Format::INT8_TENSOR, true, true),
                ] {
                    if format == Format::INT8_TENSOR && shape.0 % 16 != 0 {
                        continue;
                    }
                    let (operand, of) = (Operand::of(format), (precision, transposed));
                    let to = To { bytes, ..To::default() };
                    check(emulators, schedule, &operand, (shape, kind), of, to);
                }
            }
        }
    }
}

fn check(
    [plain, nvfp4, int8, bounds_of]: [&Emulator; 4],
    schedule: (u32, u32),
    operand: &Operand,
    ((vectors, length), kind): ((usize, usize), Data),
    (precision, transposed): (Precision, bool),
    to: To,
) {
    let To { wide, dequantized, bytes, .. } = to;
    let what = format!("{operand:?} ({vectors}, {length}) {kind:?} {transposed} {precision:?}");
    let mut values = data(vectors * length, kind);
    let narrow = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes());
    let narrow = aligned(&narrow.collect::<Vec<_>>());
    let narrow: &[u16] = &bytemuck::cast_slice(&narrow)[..values.len()];
    if precision == Precision::Bf16 {
        values = narrow.iter().map(|v| half::bf16::from_bits(*v).to_f32()).collect();
    }
    let (id, gemm, transform) = (OperandId::X, GemmId::Wgrad, operand.transform());
    let mut room = [0.0; formats::MAX_GROUP];
    let signs = formats::fill_signs(&mut room, transform, gemm, &RANDOM);
    let source = Source { data: &values, rows: vectors, depth: length, transposed };
    let [elements, scales] = [id, id.of_scales()].map(|id| RANDOM.rounding(id));
    let bits = Bits { elements, scales, transposed };
    let means: Vec<f32> = values.iter().rev().zip(&values).map(|(far, v)| v + 0.1 * far).collect();
    let exact = match operand.rounding() {
        Rounding::ByMean => Quantized::by_means(source, &means, operand, &bits),
        _ => Quantized::new(source, operand, signs, &bits),
    };

    let wide_values = aligned(bytemuck::cast_slice(&values));
    let address = match precision {
        Precision::F32 => wide_values.as_ptr() as u64,
        Precision::Bf16 => narrow.as_ptr() as u64,
    };
    let has_scales = formats::has_vector_scales(operand.format());
    let mut out = aligned(&vec![0xaa; 4 * vectors * exact.depth]);
    let mut amaxes = vec![0u32; vectors];
    let mut vector_scales = vec![f32::NAN; vectors];
    // Of NVFP4 kernels note them that are not its own, which round weights of a forward pass alone:
    // to nearest, or by means.
    let in_forward = matches!(operand.rounding(), Rounding::Nearest | Rounding::ByMean);
    let notes = !operand.format().is_nvfp4() || in_forward && vectors < 8;
    let mut block_scales = vec![f32::NAN; if notes { exact.block_scales.len() } else { 0 }];
    let mut bounds = vec![f32::NAN; 2 * vectors];
    let (mut scale, mut factors, other) = (f32::NAN, [f32::NAN; 2], 3.0f32);
    let of = Quantization {
        matrix: Matrix {
            source: Address { address, precision },
            amax: None,
            scale: 0,
            mean: means.as_ptr() as u64,
            vectors,
            length,
            transposed,
            id,
            fp8: None,
        },
        operand: *operand,
        transform,
        gemm,
        random: RANDOM,
        to: To {
            out: out.as_mut_ptr() as u64,
            block_scales: if block_scales.is_empty() {
                0
            } else {
                block_scales.as_mut_ptr() as u64
            },
            amax: amaxes.as_mut_ptr() as u64,
            vector_scales: if has_scales { vector_scales.as_mut_ptr() as u64 } else { 0 },
            scale: &raw mut scale as u64,
            other: &raw const other as u64,
            factors: factors.as_mut_ptr() as u64,
            bounds: bounds.as_mut_ptr() as u64 * u64::from(operand.outliers().is_some()),
            sums: 0,
            alpha: 4.0 / 3.0,
            beta: 1.0,
            ..to
        },
    };
    let number = if precision == Precision::F32 { "float" } else { "bf16" };
    let ([find_launch, launch], [find, round]) = (of.launches(), of.kernels());
    let of_nvfp4 = |name: &str| name.contains("_nvfp4");
    let finder = if of_nvfp4(&find) { nvfp4 } else { plain };
    let rounder = match round.as_str() {
        name if of_nvfp4(name) => nvfp4,
        name if name.contains("int8") => int8,
        _ => plain,
    };
    if let Some(outliers) = Outliers::of(&of) {
        let launch = Launch { grid: [vectors, 1, 1], block: 256, shared: 0 };
        bounds_of.launch(schedule, &format!("find_bounds<{number}>"), launch, outliers);
    } else if of.finds_amax() {
        finder.launch(schedule, &find, find_launch, of.arguments());
    }
    rounder.launch(schedule, &round, launch, of.arguments());

    assert_eq!(of.depth(), exact.depth, "{what}");
    assert_eq!(word(scale, true), word(exact.scale, true), "{what}: scale");
    let factor = 4.0 / 3.0 * (other * exact.scale);
    assert_eq!(factors.map(|v| word(v, true)), [factor, 1.0].map(|v| word(v, true)), "{what}");
    for (ours, exact) in block_scales.iter().zip(&exact.block_scales) {
        assert_eq!(word(*ours, true), word(*exact, true), "{what}: scales of blocks");
    }
    if has_scales {
        for (ours, exact) in vector_scales.iter().zip(&exact.vector_scales) {
            assert_eq!(word(*ours, true), word(*exact, true), "{what}: scales of vectors");
        }
    }
    let kept = if transform.is_some() { exact.depth } else { length };
    let expected = if dequantized { exact.dequantized(kept) } else { exact.values.clone() };
    let (words, narrow, integers): (&[u32], &[u16], &[i8]) =
        (bytemuck::cast_slice(&out), bytemuck::cast_slice(&out), bytemuck::cast_slice(&out));
    for (index, expected) in expected.iter().enumerate() {
        let at = match of.is_as_stored() {
            true => index % length * vectors + index / length,
            false => index,
        };
        let ours = match (wide, bytes) {
            (true, _) => f32::from_bits(words[at]),
            (false, false) => half::bf16::from_bits(narrow[at]).to_f32(),
            // Scales are NaN instead, and zeros have no sign.
            (false, true) if expected.is_nan() => f32::NAN,
            (false, true) => f32::from(integers[at]).copysign(*expected),
        };
        let depth = if dequantized { kept } else { exact.depth };
        assert!(
            word(ours, wide) == word(*expected, wide),
            "{what}: {ours} instead of {expected} at {:?}",
            (index / depth, index % depth)
        );
    }
}

/// Results, also integers, times scales of rows and columns, with a bias, one or eight at a time.
#[test]
fn results_are_scaled_by_their_vectors() {
    let Some(emulator) = Emulator::new("quantize_values") else { return };
    for columns in [300, 1088] {
        for has in [[true, false, true], [true, true, false], [false, true, true], [false; 3]] {
            for integers in [false, true] {
                check_scaling(&emulator, columns, has, integers);
            }
        }
    }
}

fn check_scaling(emulator: &Emulator, columns: usize, has: [bool; 3], integers: bool) {
    let rows = 5;
    let c = data(rows * columns, Data::Normal);
    // Some that f32 does not hold.
    let (whole, factor) = (c.iter().map(|v| (v * 2e8) as i32).collect::<Vec<_>>(), 1.3e-5f32);
    let all = [rows, columns, columns].map(|len| data(len, Data::Normal));
    let mut address = [0; 3];
    for ((address, all), has) in address.iter_mut().zip(&all).zip(has) {
        *address = if has { all.as_ptr() as u64 } else { 0 };
    }
    let [of_rows, of_columns, bias] = address;
    let (launch, schedule) = (Launch { grid: [rows, 1, 1], block: 96, shared: 0 }, SCHEDULES[0]);
    let number =
        |which: usize, at: usize, none: f32| if has[which] { all[which][at] } else { none };
    let mut out = vec![f32::NAN; rows * columns];
    let scaling = Scaling {
        out: out.as_mut_ptr() as u64,
        c: if integers { whole.as_ptr() as u64 } else { c.as_ptr() as u64 },
        factor: &raw const factor as u64,
        of_rows,
        of_columns,
        bias,
        rows: rows as u32,
        columns: columns as u32,
    };
    emulator.launch(schedule, &format!("scale_result<float,{integers}>"), launch, scaling);
    for (at, ours) in out.iter().enumerate() {
        let (row, column) = (at / columns, at % columns);
        let c = if integers { whole[at] as f32 * factor } else { c[at] };
        let scale = number(0, row, 1.0) * number(1, column, 1.0);
        let expected = c * scale + number(2, column, 0.0);
        assert_eq!(ours.to_bits(), expected.to_bits(), "({row}, {column}) {has:?} {integers}");
    }
}
