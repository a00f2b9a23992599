//! What products are divided by: the sums that `quantize_values.cu` leaves of an operand, and
//! `correct.cu`.

use super::super::quantize::Source as Address;
use super::super::quantize::values::{Correct, Matrix, Measured, Quantization, To};
use super::{Emulator, SCHEDULES};
use crate::backend::Precision;
use crate::backend::conformance::{RANDOM, random};
use crate::backend::cuda::quantize::Launch;
use crate::formats::{
    self, Bits, Format, GemmId, Operand, OperandId, Quantized, Range, Signs, Source, Transform,
};

fn operand(format: Format, group: usize, range: Range) -> Operand {
    let operand = Operand::of(format).within(range).rotated(Transform::of(group, Signs::Random));
    operand.with_correction(true).unwrap()
}

/// To 1e-6 they are those of the definition, and the same in every order of threads.
#[test]
fn corrections_are_those_of_the_definition() {
    let Some(values) = Emulator::new("quantize_values") else { return };
    let Some(correct) = Emulator::new("correct") else { return };
    let gemm = GemmId::Wgrad;
    for (operand, [vectors, length], transposed) in [
        (operand(Format::MXFP4, 32, Range::ThreeQuarters), [33, 70], false),
        (operand(Format::MXFP4, 256, Range::Full), [70, 300], true),
        (operand(Format::NVFP4, 64, Range::Full), [40, 300], false),
    ] {
        let data = random(vectors * length, 1);
        let mut room = [0.0; formats::MAX_GROUP];
        let signs = formats::fill_signs(&mut room, operand.transform(), gemm, &RANDOM);
        let source = Source { data: &data, rows: vectors, depth: length, transposed };
        let [elements, scales] = [OperandId::X, OperandId::XScales].map(|id| RANDOM.rounding(id));
        let exact = Quantized::new(source, &operand, signs, &Bits { elements, scales, transposed });
        assert!(exact.correction > 1.0 && exact.correction < 1.05, "{}", exact.correction);

        let address = data.as_ptr() as u64;
        let mut found = SCHEDULES.map(|schedule| {
            let (mut out, mut amax) = (vec![0.0f32; vectors * exact.depth], 0u32);
            let (mut scale, mut factors, mut sums) = (f32::NAN, [f32::NAN; 2], vec![f64::NAN; 999]);
            let of = Quantization {
                matrix: Matrix {
                    source: Address { address, precision: Precision::F32 },
                    amax: None,
                    vectors,
                    length,
                    transposed,
                    id: OperandId::X,
                    scale: 0,
                    mean: 0,
                    fp8: None,
                },
                operand,
                transform: operand.transform(),
                gemm,
                random: RANDOM,
                to: To {
                    out: out.as_mut_ptr() as u64,
                    wide: true,
                    amax: &raw mut amax as u64,
                    scale: &raw mut scale as u64,
                    factors: factors.as_mut_ptr() as u64,
                    sums: sums.as_mut_ptr() as u64,
                    alpha: 1.0,
                    ..To::default()
                },
            };
            let [find, round] = of.launches();
            if of.finds_amax() {
                values.launch(schedule, "find_value_amax<float>", find, of.arguments());
            }
            values.launch(schedule, "round_values<float>", round, of.arguments());
            let before = factors[0];
            let operands = [Measured::of(&of); 2];
            let argument = Correct { operands, factors: factors.as_mut_ptr() as u64 };
            let launch = Launch { grid: [1, 1, 1], block: 256, shared: 0 };
            correct.launch(schedule, "correct_factors", launch, argument);
            assert_eq!(out, exact.values);
            // Of both operands, which are the same one.
            (factors[0] / before).sqrt()
        });
        for ours in &found {
            assert!((ours / exact.correction - 1.0).abs() < 1e-6, "{ours}, {}", exact.correction);
        }
        found.iter_mut().for_each(|ours| *ours -= exact.correction);
        assert!(found.iter().all(|difference| *difference == found[0]), "{found:?}");
    }
}
