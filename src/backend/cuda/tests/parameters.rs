//! Copies and amax of parameters, drawn and updated.

use super::*;
use crate::backend::conformance::{Update, some_values, step};
use crate::{Moments, Optimizer, OptimizerKind};

#[test]
fn normal_values_are_those_of_the_definition() {
    let Some(cuda) = gpu() else { return };
    for (len, index) in [(1, 0), (511, 1), (513, 2), (1_000_003, 3)] {
        let draw = Draw::of(99, Purpose::Weights, index, 0);
        let mut param = param(&cuda, &vec![f32::NAN; len]);
        cuda.draw_param(&mut param, alone(len), 0.02, &draw).unwrap();
        let mut exact = vec![0.0; len];
        crate::formats::fill_normal(&mut exact, 0.02, &draw, 0);
        let mut values = vec![0.0; len];
        cuda.read_param(&param, alone(len), &mut values).unwrap();
        assert_eq!(values, exact, "{len}");
        let amax = exact.iter().fold(0.0f32, |amax, v| amax.max(v.abs()));
        assert_eq!(read_bytes(&cuda, param.amax.address, 4), amax.to_le_bytes());
        let copy: Vec<u8> =
            exact.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        assert_eq!(read_bytes(&cuda, param.copy.address, 2 * len), copy);
    }
}

/// An update makes the copies that GEMMs read, and notes the largest magnitudes, of what it leaves.
#[test]
fn updates_leave_copies_and_largest_magnitudes() {
    let Some(cuda) = gpu() else { return };
    for (kind, moments) in
        OptimizerKind::ALL.into_iter().flat_map(|kind| Moments::ALL.map(|m| (kind, m)))
    {
        let optimizer = Optimizer { moments, ..Optimizer::new(kind) };
        let mut update = Update::of(&cuda, &some_values(), optimizer);
        cuda.gpu.scope(|| update.step(&cuda, &step(optimizer)));
        for (param, values) in update.parameters(&cuda) {
            assert_eq!(word(&cuda, param.amax.address), amax_of(&values), "{optimizer}");
            let copy = read_bytes(&cuda, param.copy.address, 2 * values.len());
            let copy = copy.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b));
            assert!(copy.eq(values.iter().map(|v| half::bf16::from_f32(*v))), "{optimizer}");
        }
    }
}
