//! Gradients of weights through the differentiable estimator: `estimate.cu`.

use super::super::quantize::Launch;
use super::super::quantize::values::Estimate;
use super::{Emulator, SCHEDULES};
use crate::backend::conformance::random;
use crate::formats::{Format, Gemm, GemmId, LinearRecipe, Operand, Restoration};

/// But for the last bit of a power, which C++ and Rust may round apart.
#[test]
fn gradients_are_those_of_the_definition() {
    let Some(emulator) = Emulator::new("estimate") else { return };
    for (case, (rows, columns)) in [(1, 5), (7, 300), (3, 256)].into_iter().enumerate() {
        for steepness in [1, 3, 5] {
            let x = Operand::of(Format::e2m1_vectors(true));
            let forward = Gemm::new(x, x.with_estimator(Some(steepness))).unwrap();
            let recipe = LinearRecipe::new(forward, Gemm::BF16, Gemm::BF16).unwrap();
            let restoration = Restoration::of(&recipe, GemmId::Wgrad).unwrap();
            let mut weights = random(rows * columns, 1);
            weights[..columns].iter_mut().for_each(|w| *w *= 1e-30);
            if case == 1 {
                weights[columns..2 * columns].fill(0.0);
                weights[5 * columns + 3] = f32::NAN;
            }
            let c = random(rows * columns, 2);
            for accumulate in [false, true] {
                let before = random(rows * columns, 3);
                let mut out = before.clone();
                let estimate = Estimate {
                    out: out.as_mut_ptr() as u64,
                    c: c.as_ptr() as u64,
                    tensor: weights.as_ptr() as u64,
                    columns: columns as u32,
                    accumulate: u32::from(accumulate),
                    steepness: steepness.into(),
                };
                let launch = Launch { grid: [rows, 1, 1], block: 256, shared: 0 };
                emulator.launch(SCHEDULES[case], "estimate", launch, estimate);
                let mut expected = c.clone();
                for (g, w) in expected.chunks_mut(columns).zip(weights.chunks(columns)) {
                    restoration.apply(g, w);
                }
                for (at, (ours, exact)) in out.iter().zip(&expected).enumerate() {
                    let exact = if accumulate { before[at] + exact } else { *exact };
                    let near = (ours - exact).abs() <= 1e-6 * exact.abs().max(c[at].abs());
                    assert!(near || ours.is_nan() && exact.is_nan(), "{ours}, {exact} at {at}");
                }
            }
        }
    }
}
