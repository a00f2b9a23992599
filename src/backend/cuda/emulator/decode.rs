//! A few rows behind others: `decode.cu` and `attend_behind.cu`.

use half::bf16;

use super::super::attend::Heads;
use super::super::decode::{
    Behind, Few, FewRows, PackMxfp4, attention_on_tensor_cores, keep_grid, whole_positions,
};
use super::super::quantize::Launch;
use super::{Emulator, SCHEDULES, aligned};
use crate::backend::conformance::{f64s, random, rounded};
use crate::backend::{
    AttentionShape, DecoderWeights, LinearShape, Precision, Sequences, reference,
};
use crate::formats::{BLOCK, decode_e2m1, decode_e8m0, quantize_closest};

fn halves(values: &[f32]) -> Vec<u16> {
    values.iter().map(|v| bf16::from_f32(*v).to_bits()).collect()
}

/// Numbers as they lie in memory, and where.
fn placed(values: &[f32], precision: Precision) -> Vec<u128> {
    match precision {
        Precision::F32 => aligned(bytemuck::cast_slice(values)),
        Precision::Bf16 => aligned(bytemuck::cast_slice(&halves(values))),
    }
}

fn read(memory: &[u128], len: usize, precision: Precision) -> Vec<f32> {
    match precision {
        Precision::F32 => bytemuck::cast_slice::<_, f32>(memory)[..len].to_vec(),
        Precision::Bf16 => bytemuck::cast_slice::<_, u16>(memory)[..len]
            .iter()
            .map(|bits| bf16::from_bits(*bits).to_f32())
            .collect(),
    }
}

/// W (outputs, inputs) as `pack_mxfp4` makes it: codes and scales.
fn packed(
    emulator: &Emulator,
    w: &[f32],
    precision: Precision,
    [outputs, inputs]: [usize; 2],
) -> [Vec<u128>; 2] {
    let elements = outputs * inputs.next_multiple_of(64);
    let mut codes = vec![u128::MAX; elements / 2 / 16];
    let mut scales = vec![u128::MAX; (elements / BLOCK).div_ceil(16)];
    let w = placed(w, precision);
    let argument = PackMxfp4 {
        codes: codes.as_mut_ptr() as u64,
        scales: scales.as_mut_ptr() as u64,
        w: w.as_ptr() as u64,
        inputs: inputs as u32,
        outputs: outputs as u32,
    };
    let grid = [(elements / BLOCK).div_ceil(128), 1, 1];
    let name = match precision {
        Precision::F32 => "pack_mxfp4<float>",
        Precision::Bf16 => "pack_mxfp4<bf16>",
    };
    emulator.launch(SCHEDULES[0], name, Launch { grid, block: 128, shared: 0 }, argument);
    [codes, scales]
}

/// Codes and scales are those of `quantize_closest`, and what is behind the inputs is zero.
#[test]
fn weights_are_packed_to_the_byte() {
    let Some(emulator) = Emulator::new("decode") else { return };
    for (outputs, inputs, precision) in
        [(5, 200, Precision::F32), (3, 64, Precision::Bf16), (2, 72, Precision::F32)]
    {
        let mut w = random(outputs * inputs, 3);
        // Blocks of zeros, of tiny and of huge numbers, with NaN, and those that saturate.
        w[..BLOCK].fill(0.0);
        for (i, v) in w[inputs..].iter_mut().take(BLOCK).enumerate() {
            *v = if i % 2 == 0 { 7.9 } else { 4.0 };
        }
        w[inputs + 40] = f32::NAN;
        if outputs > 2 {
            w[2 * inputs..][..BLOCK].iter_mut().for_each(|v| *v *= 1e-38);
            w[2 * inputs + BLOCK..][..BLOCK].iter_mut().for_each(|v| *v *= 1e37);
        }
        let w = rounded(&w, precision);
        let [codes, scales] = packed(&emulator, &w, precision, [outputs, inputs]);
        let (codes, scales): (&[u8], &[u8]) =
            (bytemuck::cast_slice(&codes), bytemuck::cast_slice(&scales));
        let line = inputs.next_multiple_of(64);
        for output in 0..outputs {
            for block in 0..line / BLOCK {
                let first = block * BLOCK;
                let v: [f32; BLOCK] = std::array::from_fn(|i| {
                    w[output * inputs..][..inputs].get(first + i).copied().unwrap_or(0.0)
                });
                let (scale, expected) = quantize_closest(&v);
                let at = output * line + first;
                assert_eq!(scales[at / BLOCK], scale, "{output}, {block}: {v:?}");
                let found: [u8; BLOCK] =
                    std::array::from_fn(|i| codes[(at + i) / 2] >> (i % 2 * 4) & 15);
                assert_eq!(found, expected, "{output}, {block}: {v:?}");
            }
        }
    }
}

/// Few rows are never taken as many, whatever the layer, and what many lay out has its room.
#[test]
fn few_rows_are_taken_as_few() {
    let is_many = |shape, in_mxfp4, logits| {
        let few = Few::on_tensor_cores(shape, in_mxfp4, logits);
        let weights = if in_mxfp4 { DecoderWeights::Mxfp4 } else { DecoderWeights::Bf16 };
        let room = Few::laid_out(shape, weights, Precision::Bf16);
        assert_eq!(Few::laid_out(shape, weights, Precision::F32), 0);
        assert_eq!(few.kernel.starts_with("many"), few.lay_out.is_some());
        assert!(logits || few.lay_out.map_or(0, |lay_out| lay_out.bytes()) == room);
        few.lay_out.is_some()
    };
    for (rows, many) in [(1, false), (8, false), (9, false), (64, false), (65, true), (999, true)] {
        let shape = LinearShape { rows, inputs: 4096, outputs: 16_384 };
        for in_mxfp4 in [false, true] {
            let many = many && (!in_mxfp4 || rows > 191);
            assert_eq!(is_many(shape, in_mxfp4, false), many, "{rows}");
            assert!(!is_many(shape, in_mxfp4, true));
        }
    }
    // Too few blocks, and outputs that are not taken 8 at a time.
    for (rows, outputs) in [(895, 768), (999, 16_385)] {
        assert!(!is_many(LinearShape { rows, inputs: 768, outputs }, true, false));
    }
}

/// Products of any number of rows are those of their operands, and a row has the same bits alone.
#[test]
fn few_rows_have_the_bits_of_each() {
    let Some(emulator) = Emulator::new("decode") else { return };
    let shapes = [
        (1, 264, 18),
        (3, 40, 16),
        (8, 1096, 5),
        (9, 136, 70),
        (67, 72, 40),
        (130, 1112, 24),
        (66, 360, 136),
        (5, 37, 9),
    ];
    for (case, (rows, inputs, outputs)) in shapes.into_iter().enumerate() {
        let shape = LinearShape { rows, inputs, outputs };
        let kinds = [
            (Precision::Bf16, false, false),
            (Precision::Bf16, false, true),
            (Precision::Bf16, true, false),
            (Precision::Bf16, true, true),
            (Precision::F32, false, false),
        ];
        for (precision, in_mxfp4, logits) in kinds {
            let odd = !inputs.is_multiple_of(8);
            if in_mxfp4 && odd {
                continue;
            }
            let x = rounded(&random(rows * inputs, 1), precision);
            let mut w = rounded(&random(outputs * inputs, 2), precision);
            let bias = rounded(&random(outputs, 4), precision);
            let to = if logits { Precision::F32 } else { precision };
            let of_w = if in_mxfp4 {
                let [codes, scales] = packed(&emulator, &w, precision, [outputs, inputs]);
                let line = inputs.next_multiple_of(64);
                let bytes = [&codes, &scales].map(|all| bytemuck::cast_slice::<_, u8>(all));
                w = (0..outputs * inputs)
                    .map(|i| {
                        let at = i / inputs * line + i % inputs;
                        let code = bytes[0][at / 2] >> (at % 2 * 4) & 15;
                        decode_e2m1(code) * decode_e8m0(bytes[1][at / BLOCK])
                    })
                    .collect();
                [codes, scales]
            } else {
                [placed(&w, precision), Vec::new()]
            };
            // As of products that are larger.
            let of = |shape: LinearShape| match (precision, odd, logits) {
                (Precision::Bf16, false, false) if shape.rows > 64 => Few::of_many(shape, in_mxfp4),
                (Precision::F32, ..) => Few::in_f32(shape),
                (_, true, true) => Few::plain("few_rows_plain<bf16,float>", shape),
                (_, true, false) => Few::plain("few_rows_plain<bf16,bf16>", shape),
                _ => Few::on_tensor_cores(shape, in_mxfp4, logits),
            };
            let run = |x: &[f32], schedule, form| {
                let shape = LinearShape { rows: x.len() / inputs, ..shape };
                let nan = vec![f32::NAN; shape.rows * outputs];
                let [mut y, mut activated] = [placed(&nan, to), placed(&nan, to)];
                let (placed_x, bias) = (placed(x, precision), placed(&bias, precision));
                let few = of(shape);
                emulator.may_read(&placed_x, x.len() * precision.size());
                emulator.may_read(&of_w[0], 16 * of_w[0].len());
                let mut argument = FewRows {
                    y: y.as_mut_ptr() as u64,
                    activated: activated.as_mut_ptr() as u64,
                    x: placed_x.as_ptr() as u64,
                    w: of_w[0].as_ptr() as u64,
                    scales: of_w[1].as_ptr() as u64,
                    bias: if logits { 0 } else { bias.as_ptr() as u64 },
                    rows: shape.rows as u32,
                    inputs: inputs as u32,
                    outputs: outputs as u32,
                    form,
                };
                let bytes = few.lay_out.map_or(0, |lay_out| lay_out.bytes());
                let mut laid_out = vec![u128::MAX; bytes / 16];
                if let Some(lay_out) = few.lay_out {
                    let (room, lines) = (laid_out.as_mut_ptr() as u64, lay_out.lines as u32);
                    let w = if lay_out.of_x { argument.x } else { argument.w };
                    let of_lines = FewRows { y: room, w, outputs: lines, ..argument };
                    let launch = Launch { grid: lay_out.grid(), block: 256, shared: 0 };
                    emulator.launch(schedule, lay_out.kernel, launch, of_lines);
                    emulator.may_read(&laid_out, bytes);
                    *if lay_out.of_x { &mut argument.x } else { &mut argument.w } = room;
                }
                let launch = Launch { grid: few.grid, block: few.block, shared: few.shared };
                emulator.launch(schedule, few.kernel, launch, argument);
                [y, activated].map(|all| read(&all, nan.len(), to))
            };
            let what = format!("{shape:?} in {precision:?}, {in_mxfp4}, {logits}");
            let [y, activated] = run(&x, SCHEDULES[case % 3], 1 + case as u32 % 2);
            let some = |row: &usize| rows < 16 || row % 32 == 1 || row + 1 == rows;
            for row in (0..rows).filter(some) {
                let of_row = &x[row * inputs..][..inputs];
                let [alone, activated_alone] = run(of_row, SCHEDULES[1], 1 + case as u32 % 2);
                let same = |a: &[f32], b: &[f32]| {
                    a.iter().zip(&b[row * outputs..]).all(|(a, b)| a.to_bits() == b.to_bits())
                };
                assert!(same(&alone, &y) && same(&activated_alone, &activated), "{what}: {row}");
                for output in 0..outputs {
                    let terms = of_row.iter().zip(&w[output * inputs..]);
                    let terms = terms.map(|(x, w)| f64::from(*x) * f64::from(*w));
                    let bias = if logits { 0.0 } else { f64::from(bias[output]) };
                    let (sum, size) =
                        terms.fold((bias, bias.abs()), |(sum, size), v| (sum + v, size + v.abs()));
                    let step = if to == Precision::Bf16 { 1.0 / 250.0 } else { 1e-7 };
                    let bound = 1e-6 * size + step * sum.abs();
                    let off = (f64::from(y[row * outputs + output]) - sum).abs();
                    assert!(off <= bound, "{what}: {row}, {output}: off by {off}");
                }
            }
            let form = [crate::backend::Activation::GeluTanh, crate::backend::Activation::Gelu];
            for (y, activated) in y.iter().zip(&activated) {
                let exact = reference::gelu_of(form[case % 2], f64::from(*y));
                let step = if to == Precision::Bf16 { 1.0 / 250.0 } else { 1e-6 };
                let off = (f64::from(*activated) - exact).abs();
                assert!(off <= step * (exact.abs() + 1e-3), "{what}: {y} {activated}");
            }
        }
    }
}

/// Attention of rows in any pieces is that of the whole sequence, each row with the same bits.
#[test]
fn attention_behind_has_the_bits_of_the_whole() {
    let Some(emulator) = Emulator::new("attend_behind") else { return };
    // Two rounds of the warps at most, and a stretch of keys and some more of the plain kernel.
    let cases = [
        (2, 2, 64, 70, Precision::Bf16),
        (1, 1, 64, 530, Precision::Bf16),
        (1, 1, 128, 45, Precision::Bf16),
        (2, 2, 40, 33, Precision::Bf16),
        (1, 1, 72, 40, Precision::Bf16),
        (2, 2, 17, 30, Precision::Bf16),
        (1, 1, 150, 12, Precision::F32),
        (1, 1, 8, 1030, Precision::F32),
        (4, 2, 64, 40, Precision::Bf16),
        (3, 1, 18, 25, Precision::Bf16),
        (4, 1, 10, 20, Precision::F32),
    ];
    for (heads, kv_heads, head_size, length, precision) in cases {
        let (c, of_kept) = (heads * head_size, kv_heads * head_size);
        let wide = c + 2 * of_kept;
        let qkv = rounded(&random(length * wide, 6), precision);
        let shape = |length| AttentionShape {
            sequences: Sequences { batch: 1, length },
            heads,
            kv_heads,
            head_size,
            score_factor: 0.75,
            precision,
        };
        let exact = reference::attention_forward(&f64s(&qkv), shape(length)).0;
        let positions = whole_positions(length);
        let on_tensor_cores =
            attention_on_tensor_cores(head_size).filter(|_| precision == Precision::Bf16);
        let run = |pieces: &[usize], schedule, qkv: &[f32]| {
            // Whatever lies behind what was kept is not looked at.
            let mut kept = placed(&vec![f32::NAN; 2 * positions * of_kept], precision);
            let (mut start, mut all) = (0, Vec::new());
            for rows in pieces.iter().cycle() {
                let rows = (*rows).min(length - start);
                let of_rows = placed(&qkv[start * wide..][..rows * wide], precision);
                let mut out = placed(&vec![f32::NAN; rows * c], precision);
                let keeps = on_tensor_cores.is_some() && rows <= 16;
                let at = start as u32;
                let argument = Behind {
                    out: out.as_mut_ptr() as u64,
                    qkv: of_rows.as_ptr() as u64,
                    kept: kept.as_mut_ptr() as u64,
                    start: &raw const at as u64,
                    rows: rows as u32,
                    positions: positions as u32,
                    keeps: u32::from(keeps),
                    heads: Heads::from(shape(rows)),
                };
                let number = if precision == Precision::F32 { "float" } else { "bf16" };
                if !keeps {
                    let grid = keep_grid(rows, shape(rows));
                    let launch = Launch { grid, block: 256, shared: 0 };
                    emulator.launch(schedule, &format!("keep_rows<{number}>"), launch, argument);
                }
                let (name, launch) = match on_tensor_cores {
                    Some((name, [block, shared])) => {
                        let grid = [rows.div_ceil(16), heads, 1];
                        (name.to_owned(), Launch { grid, block, shared })
                    }
                    None => {
                        let grid = [rows, heads, 1];
                        let name = format!("attend_behind_plain<{number}>");
                        (name, Launch { grid, block: 128, shared: 0 })
                    }
                };
                emulator.launch(schedule, &name, launch, argument);
                all.extend(read(&out, rows * c, precision));
                start += rows;
                if start == length {
                    break;
                }
            }
            all
        };
        let what = format!("{heads} and {kv_heads} heads of {head_size}, {length}");
        let whole = run(&[length], SCHEDULES[0], &qkv);
        let size = exact.iter().fold(0.0f64, |size, v| size.max(v.abs()));
        let bound = if precision == Precision::F32 { 2e-6 } else { 1.2e-2 };
        for (i, (ours, exact)) in whole.iter().zip(&exact).enumerate() {
            let off = (f64::from(*ours) - exact).abs() / size;
            assert!(off < bound, "{what}: {i}: {ours} {exact}");
        }
        let pieces: &[&[usize]] = match length {
            ..=100 => &[&[1], &[17, 1, 3, 16], &[40, 2]],
            _ => &[&[length - 5, 4, 1]],
        };
        for (i, pieces) in pieces.iter().enumerate() {
            let parts = run(pieces, SCHEDULES[i], &qkv);
            let same = parts.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{what}: in pieces of {pieces:?}");
        }
        // Neither does a row see what is not finite behind it, where it comes with it.
        let last = length - 5;
        let values = [
            (last, 1, f32::NAN),
            (last, 2, f32::NAN),
            (last, 2, f32::INFINITY),
            (3, 2, f32::NEG_INFINITY),
        ];
        for (row, part, value) in values.into_iter().filter(|_| length <= 100) {
            let mut qkv = qkv.clone();
            let first = row * wide + c + (part - 1) * of_kept;
            qkv[first..][..of_kept / 2].fill(value);
            let poisoned = run(&[length], SCHEDULES[1], &qkv);
            let parts = run(&[row, 1, 1], SCHEDULES[2], &qkv);
            let bits = |v: &f32| if v.is_nan() { None } else { Some(v.to_bits()) };
            assert!(
                parts.iter().map(bits).eq(poisoned.iter().map(bits)),
                "{what}: {row}, {part}, {value}"
            );
            let before = std::iter::zip(&whole, &poisoned).take(row * c);
            assert!(before.into_iter().all(|(a, b)| a.to_bits() == b.to_bits()));
            assert!(poisoned[row * c..].iter().any(|v| !v.is_finite()));
        }
    }
}
