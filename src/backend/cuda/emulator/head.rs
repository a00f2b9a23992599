//! Losses, and the worst ones of moved logits: `head.cu`.

use super::super::head::{Losses, THREADS, Worst, stride};
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

/// Losses are of rows as such; gradients are times their weights, and 0 behind the vocabulary.
#[test]
fn weighted_losses_are_those_of_the_definition() {
    let Some(emulator) = Emulator::new("head") else { return };
    for (case, (rows, vocab)) in [(3, 5), (2, 1), (3, 8203)].into_iter().enumerate() {
        for weighted in [false, true] {
            let values: Vec<f32> = random(rows * vocab, 5);
            let targets: Vec<u32> = (0..rows as u32).map(|r| r * 7 % vocab as u32).collect();
            let weights = [0.5f32, 0.0, -3.0];
            let stride = stride(vocab);
            let mut logits = vec![f32::NAN; rows * stride];
            for (to, from) in logits.chunks_mut(stride).zip(values.chunks(vocab)) {
                to[..vocab].copy_from_slice(from);
            }
            let mut losses = vec![f32::NAN; rows];
            let argument = Losses {
                logits: logits.as_mut_ptr() as u64,
                losses: losses.as_mut_ptr() as u64,
                targets: targets.as_ptr() as u64,
                weights: if weighted { weights.as_ptr() as u64 } else { 0 },
                vocab: vocab as u32,
                stride: stride as u32,
                scale: 0.25,
                gradient: 1,
            };
            let launch = Launch { grid: [rows, 1, 1], block: THREADS, shared: 0 };
            let schedule = SCHEDULES[case % SCHEDULES.len()];
            emulator.launch(schedule, "softmax_loss<float>", launch, argument);
            for (row, of_row) in values.chunks(vocab).enumerate() {
                let target = targets[row] as usize;
                let sum: f64 = of_row.iter().map(|v| f64::from(*v).exp()).sum();
                let loss = sum.ln() - f64::from(of_row[target]);
                let off = (f64::from(losses[row]) - loss).abs();
                assert!(off < 2e-6 * loss.abs().max(1.0), "{vocab}: {loss} {}", losses[row]);
                let scale = 0.25 * if weighted { f64::from(weights[row]) } else { 1.0 };
                for (i, found) in logits[row * stride..][..stride].iter().enumerate() {
                    let one_hot = f64::from(u8::from(i == target));
                    let softmax = of_row.get(i).map_or(0.0, |v| f64::from(*v).exp() / sum);
                    let exact = scale * (softmax - one_hot);
                    assert!((f64::from(*found) - exact).abs() < 2e-6, "{vocab}, {row}, {i}");
                }
            }
        }
    }
}
