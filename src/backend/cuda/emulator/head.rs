//! The worst losses of moved logits: `head.cu`.

use super::super::head::{THREADS, Worst, stride};
use super::super::quantize::Launch;
use super::{Emulator, SCHEDULES};
use crate::backend::conformance::{random, rounded};
use crate::backend::{Precision, reference};

/// Fewer logits than a block has threads, some more than it reads at once, and logits so far apart
/// that one alone counts, which is the target or not.
#[test]
fn worst_losses_are_those_of_the_definition() {
    let Some(emulator) = Emulator::new("head") else { return };
    let cases = [(3, 5, 1.0), (2, 1, 1.0), (3, 8203, 3.0), (2, 37, 500.0)];
    for (case, (rows, vocab, size)) in cases.into_iter().enumerate() {
        for (precision, epsilon) in [(Precision::F32, 1e-3), (Precision::Bf16, 0.75)] {
            let values: Vec<f32> = random(rows * vocab, 5).iter().map(|v| size * v).collect();
            let values = rounded(&values, precision);
            let largest = |row: &[f32]| (0..vocab).max_by(|i, j| row[*i].total_cmp(&row[*j]));
            let targets: Vec<u32> = values
                .chunks(vocab)
                .enumerate()
                .map(|(r, row)| match r % 2 {
                    0 => largest(row).unwrap_or(0) as u32,
                    _ => vocab as u32 / 2,
                })
                .collect();
            let wide: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
            let exact = reference::worst_losses(&wide, &targets, vocab, f64::from(epsilon));

            // Behind a row lies what nobody may look at.
            let stride = stride(vocab);
            let mut floats = vec![f32::NAN; rows * stride];
            for (to, from) in floats.chunks_mut(stride).zip(values.chunks(vocab)) {
                to[..vocab].copy_from_slice(from);
            }
            let halves: Vec<u16> =
                floats.iter().map(|v| half::bf16::from_f32(*v).to_bits()).collect();
            let (name, logits) = match precision {
                Precision::F32 => ("float", floats.as_ptr() as u64),
                Precision::Bf16 => ("bf16", halves.as_ptr() as u64),
            };
            let (mut worst, mut amax) = (vec![f32::NAN; rows], vec![f32::NAN; rows]);
            let argument = Worst {
                logits,
                worst: worst.as_mut_ptr() as u64,
                amax: amax.as_mut_ptr() as u64,
                targets: targets.as_ptr() as u64,
                vocab: vocab as u32,
                stride: stride as u32,
                epsilon,
            };
            let launch = Launch { grid: [rows, 1, 1], block: THREADS, shared: 0 };
            let kernel = format!("worst_loss<{name}>");
            emulator.launch(SCHEDULES[case % SCHEDULES.len()], &kernel, launch, argument);
            for (ours, exact) in [worst, amax].iter().zip(&exact) {
                for (ours, exact) in ours.iter().zip(exact) {
                    let off = (f64::from(*ours) - exact).abs() / exact.abs().max(1.0);
                    assert!(off < 2e-6, "{vocab} in {precision:?}: {ours} {exact}");
                }
            }
        }
    }
}
