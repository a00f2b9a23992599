//! The way back from the basis of a rotated forward pass: `restore.cu`, bit for bit.

use super::super::quantize::Launch;
use super::super::quantize::values::{Output, Restore};
use super::{Emulator, SCHEDULES};
use crate::backend::Precision;
use crate::backend::conformance::random;
use crate::formats::{
    Format, Gemm, GemmId, LinearRecipe, Operand, PowerRule, Restoration, Signs, Transform,
};

fn restoration(rule: PowerRule) -> Restoration {
    let forward = Operand::of(Format::mxfp4(rule, false)).rotated(Transform::of(32, Signs::Plain));
    let backward = Gemm::new(Operand::BF16, Operand::BF16.from_forward()).unwrap();
    let recipe = LinearRecipe::new(Gemm::of(forward), backward, backward).unwrap();
    Restoration::of(&recipe, GemmId::Dgrad).unwrap()
}

fn narrow(values: &[f32]) -> Vec<u16> {
    values.iter().map(|v| half::bf16::from_f32(*v).to_bits()).collect()
}

fn wide(values: &[u16]) -> Vec<f32> {
    values.iter().map(|v| half::bf16::from_bits(*v).to_f32()).collect()
}

#[test]
fn gradients_are_those_of_the_definition() {
    let Some(emulator) = Emulator::new("restore") else { return };
    let sizes = [(1, 5), (3, 96), (33, 70), (70, 264)];
    for (case, ((rows, columns), rule)) in
        sizes.into_iter().flat_map(|size| PowerRule::ALL.map(|rule| (size, rule))).enumerate()
    {
        let restoration = restoration(rule);
        let depth = restoration.depth(columns);
        let c = random(rows * depth, 1);
        // bf16 numbers, which both precisions hold.
        let mut tensor = wide(&narrow(&random(rows * columns, 2)));
        if case % 4 == 3 {
            tensor[columns / 2] = f32::NAN;
            tensor[rows * columns - 1] = f32::INFINITY;
        }
        for (precision, accumulate) in
            [(Precision::F32, false), (Precision::F32, true), (Precision::Bf16, false)]
        {
            let before = wide(&narrow(&random(rows * columns, 3)));
            let mut expected = before.clone();
            for row in 0..rows {
                let mut gradient = c[row * depth..][..depth].to_vec();
                restoration.apply(&mut gradient, &tensor[row * columns..][..columns]);
                for (to, g) in expected[row * columns..][..columns].iter_mut().zip(gradient) {
                    *to = if accumulate { *to + g } else { g };
                }
            }
            let (mut out, mut out_narrow, tensor_narrow) =
                (before.clone(), narrow(&before), narrow(&tensor));
            let (address, of) = match precision {
                Precision::F32 => (out.as_mut_ptr() as u64, tensor.as_ptr() as u64),
                Precision::Bf16 => (out_narrow.as_mut_ptr() as u64, tensor_narrow.as_ptr() as u64),
            };
            let (bias, pass) = (None, None);
            let to = Output { address, precision, bias, accumulate, tensor: of, pass };
            let restore = Restore::new(restoration, to, c.as_ptr() as u64, [rows, columns]);
            let launch =
                Launch { grid: [restore.grid(), 1, 1], block: Restore::THREADS, shared: 0 };
            let name = match precision {
                Precision::F32 => "restore<float>",
                Precision::Bf16 => "restore<bf16>",
            };
            emulator.launch(SCHEDULES[case % 3], name, launch, restore);
            if precision == Precision::Bf16 {
                (out, expected) = (wide(&out_narrow), wide(&narrow(&expected)));
            }
            for (at, (ours, exact)) in out.iter().zip(&expected).enumerate() {
                let same = ours.to_bits() == exact.to_bits() || ours.is_nan() && exact.is_nan();
                assert!(same, "{rule} ({rows}, {columns}): {ours}, not {exact}, at {at}");
            }
        }
    }
}
