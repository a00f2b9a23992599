//! Channels that are merged: `merge.cu`.

use super::super::merge::{Merge, grids};
use super::super::quantize::{Launch, random};
use super::{Emulator, SCHEDULES};
use crate::backend::conformance::{random as values, rounded};
use crate::backend::{MergeShape, Precision, Sequences};
use crate::formats::{merge_channels, projections};

/// Sizes that no thread block divides, hashes of few bits, of a part of what goes at once, and of
/// all.
#[test]
fn channels_are_merged_as_the_definition_has_it() {
    let Some(emulator) = Emulator::new("merge") else { return };
    let draw = projections(11, 3, 1);
    for ([batch, length, channels, hashes], schedule) in
        [[2, 37, 70, 4], [1, 9, 300, 23], [3, 1, 5, 64]].into_iter().zip(SCHEDULES)
    {
        let sequences = Sequences { batch, length };
        let shape = MergeShape { sequences, channels, hashes };
        for precision in [Precision::F32, Precision::Bf16] {
            let x = rounded(&values(batch * length * channels, 1), precision);
            let mut expected = x.clone();
            let counts: Vec<_> = expected
                .chunks_mut(length * channels)
                .map(|x| merge_channels(x, channels, hashes, &draw) as f32)
                .collect();
            let expected = rounded(&expected, precision);

            let mut floats = x.clone();
            let mut halves: Vec<u16> =
                x.iter().map(|v| half::bf16::from_f32(*v).to_bits()).collect();
            let mut entries = vec![9i8; hashes * length];
            let (mut of_channels, mut next) =
                (vec![u64::MAX; batch * channels], vec![u32::MAX; batch * channels]);
            let mut buckets = vec![f32::NAN; batch];
            let (name, x) = match precision {
                Precision::F32 => ("float", floats.as_mut_ptr() as u64),
                Precision::Bf16 => ("bf16", halves.as_mut_ptr() as u64),
            };
            let merge = Merge {
                x,
                projections: entries.as_mut_ptr() as u64,
                hashes: of_channels.as_mut_ptr() as u64,
                next: next.as_mut_ptr() as u64,
                buckets: buckets.as_mut_ptr() as u64,
                batch: batch as u32,
                tokens: length as u32,
                channels: channels as u32,
                bits: hashes as u32,
                draw: random::Draw::from(draw),
            };
            let [drawing, hashing] = grids(shape);
            for (kernel, blocks) in [
                ("draw_projections".into(), drawing),
                (format!("hash_channels<{name}>"), hashing),
                ("link_channels".into(), batch),
                (format!("average_channels<{name}>"), sequences.rows()),
            ] {
                let launch = Launch { grid: [blocks, 1, 1], block: 256, shared: 0 };
                emulator.launch(schedule, &kernel, launch, merge);
            }
            let ours = match precision {
                Precision::F32 => floats,
                Precision::Bf16 => {
                    halves.iter().map(|bits| half::bf16::from_bits(*bits).to_f32()).collect()
                }
            };
            assert_eq!(buckets, counts, "{shape:?}");
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert!(bits(&ours) == bits(&expected), "{shape:?} in {precision:?}");
        }
    }
}
