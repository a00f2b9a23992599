//! Operands made from what the forward pass made: `requantize_nvfp4.cu`, bit for bit.

use super::super::quantize::Source as Address;
use super::super::quantize::kept::{Keeping, Way};
use super::super::quantize::values::{Matrix, Quantization, To};
use super::values::{Data, data, word};
use super::{Emulator, SCHEDULES, aligned};
use crate::backend::Precision;
use crate::backend::conformance::RANDOM;
use crate::formats::{
    self, Bits, Format, GemmId, Nvfp4Scale, Operand, OperandId, Quantized, Rounding, Signs, Source,
    Transform,
};

fn emulators() -> Option<[Emulator; 2]> {
    Some([Emulator::new("quantize_nvfp4")?, Emulator::new("requantize_nvfp4")?])
}

#[test]
fn operands_of_numbers_are_those_of_what_they_stand_for() {
    let Some(emulators) = emulators() else { return };
    let nvfp4 = Operand::of(Format::NVFP4);
    let within = Operand::of(Format::nvfp4_within(true)).rounded(Rounding::Unbiased);
    let random = |group| Transform::of(group, Signs::Random);
    let backward = [
        nvfp4.rounded(Rounding::Eden).rotated(random(128)),
        nvfp4.rounded(Rounding::Eden).rotated(random(256)),
        nvfp4.rounded(Rounding::Unbiased).rotated(Transform::of(16, Signs::Nvidia)),
        nvfp4,
        within.rotated(random(16)),
    ];
    let shapes = [(33, 70), (300, 21), (5, 3), (256, 64)];
    let mut cases = 0;
    for rule in [Nvfp4Scale::Full, Nvfp4Scale::Headroom, Nvfp4Scale::FourOverSix] {
        let forward = Operand::of(Format::nvfp4(rule, false));
        for (i, backward) in backward.iter().enumerate() {
            assert_eq!(Way::of(&forward, backward), Some(Way::FromNumbers), "{backward}");
            for (j, shape) in shapes.into_iter().enumerate() {
                let kinds = [Data::Normal, Data::NotFinite, Data::Zero];
                let kind = if j == 0 { Data::Tailed } else { kinds[(i + j) % 3] };
                let precision = [Precision::F32, Precision::Bf16][(i + j) % 2];
                let schedule = SCHEDULES[cases % 3];
                check(&emulators, schedule, (&forward, backward), (shape, kind), precision);
                cases += 1;
            }
        }
    }
}

#[test]
fn operands_within_128_elements_are_those_of_what_the_forward_pass_made() {
    let Some(emulators) = emulators() else { return };
    let mut cases = 0;
    for powers in [false, true] {
        let within = Operand::of(Format::nvfp4_within(powers));
        let random = |group| Transform::of(group, Signs::Random);
        let unbiased = within.rounded(Rounding::Unbiased);
        let backward = [
            unbiased.rotated(random(16)),
            unbiased.rotated(random(128)),
            within.rotated(random(32)),
            unbiased,
        ];
        for (i, backward) in backward.iter().enumerate() {
            assert_eq!(Way::of(&within, backward), Some(Way::InRegisters), "{backward}");
            for (j, shape) in [(33, 70), (300, 21), (5, 3), (128, 256)].into_iter().enumerate() {
                let kinds = [Data::Normal, Data::NotFinite, Data::Zero];
                let kind = if j == 0 { Data::Tailed } else { kinds[(i + j) % 3] };
                let precision = [Precision::F32, Precision::Bf16][(i + j) % 2];
                let schedule = SCHEDULES[cases % 3];
                check(&emulators, schedule, (&within, backward), (shape, kind), precision);
                cases += 1;
            }
        }
        assert_eq!(Way::of(&within, &within.rotated(random(256))), None);
        assert_eq!(Way::of(&within, &Operand::of(Format::NVFP4)), None);
    }
}

fn check(
    [plain, again]: &[Emulator; 2],
    schedule: (u32, u32),
    (forward, backward): (&Operand, &Operand),
    ((rows, columns), kind): ((usize, usize), Data),
    precision: Precision,
) {
    let way = Way::of(forward, backward).unwrap();
    let what = format!("{forward}, {backward} ({rows}, {columns}) {kind:?} {precision:?}");
    let mut values = data(rows * columns, kind);
    let narrow = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes());
    let narrow = aligned(&narrow.collect::<Vec<_>>());
    if precision == Precision::Bf16 {
        let bits: &[u16] = bytemuck::cast_slice(&narrow);
        values = bits[..values.len()].iter().map(|v| half::bf16::from_bits(*v).to_f32()).collect();
    }
    let (id, gemm, transform) = (OperandId::X, GemmId::Wgrad, backward.transform());
    let [elements, scales] = [id, id.of_scales()].map(|id| RANDOM.rounding(id));
    let bits = |transposed| Bits { elements, scales, transposed };
    let source = Source { data: &values, rows, depth: columns, transposed: false };
    let made = Quantized::new(source, forward, &[], &bits(false));
    let dequantized = made.dequantized(columns);
    let source = Source { data: &dequantized, rows: columns, depth: rows, transposed: true };
    let mut room = [0.0; formats::MAX_GROUP];
    let signs = formats::fill_signs(&mut room, transform, gemm, &RANDOM);
    let exact = Quantized::new(source, backward, signs, &bits(true));

    let wide = aligned(bytemuck::cast_slice(&values));
    let address = match precision {
        Precision::F32 => wide.as_ptr() as u64,
        Precision::Bf16 => narrow.as_ptr() as u64,
    };
    let [mut kept, mut out] =
        [rows * columns, columns * exact.depth].map(|len| aligned(&vec![0xaa; 2 * len]));
    let (mut amaxes, mut scales) = ([0u32; 2], [f32::NAN; 2]);
    let source = Address { address, precision };
    let matrix = Matrix::rows(source, rows, columns, id);
    let mut of = |matrix, operand: &Operand, transform, (out, place): (&mut Vec<u128>, usize)| {
        let to = To {
            out: out.as_mut_ptr() as u64,
            amax: amaxes[place..].as_mut_ptr() as u64,
            scale: scales[place..].as_mut_ptr() as u64,
            ..To::default()
        };
        Quantization { matrix, operand: *operand, transform, gemm, random: RANDOM, to }
    };
    let forward = of(matrix, forward, None, (&mut kept, 0));
    let backward = of(matrix.turned(), backward, transform, (&mut out, 1));
    let keeping = Keeping { forward, backward };
    let numbers = way == Way::FromNumbers;
    if numbers {
        let [find, _] = forward.kernels();
        plain.launch(schedule, &find, forward.launches()[0], forward.arguments());
    }
    again.launch(schedule, &keeping.kernel(way), keeping.launch(way), keeping.arguments());
    if numbers {
        let [_, round] = keeping.kept().kernels();
        plain.launch(schedule, &round, backward.launches()[1], keeping.kept().arguments());
        let scale = word(made.scale, true);
        assert_eq!(word(scales[0], true), scale, "{what}: scale of the forward pass");
    }
    assert_eq!(word(scales[1], true), word(exact.scale, true), "{what}: scale");
    let kept: &[u16] = if numbers { bytemuck::cast_slice(&kept) } else { &[] };
    for (at, (ours, row)) in kept.chunks(columns).zip(made.values.chunks(made.depth)).enumerate() {
        for (ours, number) in ours.iter().zip(row) {
            let ours = half::bf16::from_bits(*ours).to_f32();
            assert_eq!(word(ours, true), word(*number, true), "{what}: numbers of row {at}");
        }
    }
    let numbers: &[u16] = bytemuck::cast_slice(&out);
    for (at, (ours, exact_number)) in numbers.iter().zip(&exact.values).enumerate() {
        let ours = half::bf16::from_bits(*ours).to_f32();
        let place = (at / exact.depth, at % exact.depth);
        assert_eq!(word(ours, false), word(*exact_number, false), "{what}: {ours} at {place:?}");
    }
}
