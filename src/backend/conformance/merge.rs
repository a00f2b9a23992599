//! Channels that are merged, against the definition, bit for bit.

use super::*;
use crate::formats::{merge_channels, projections};

/// B, T, C and L: sizes that no job divides, one token, one channel, one bit and all 64.
const SIZES: [[usize; 4]; 7] = [
    [1, 1, 8, 5],
    [3, 7, 1, 3],
    [2, 33, 100, 1],
    [3, 65, 33, 7],
    [1, 128, 96, 12],
    [2, 41, 257, 24],
    [1, 9, 1600, 64],
];

pub(super) fn channels_are_merged_by_their_hashes<B: Harness>(backends: &[B]) {
    let draw = projections(RANDOM.seed, RANDOM.layer, RANDOM.linear);
    for [batch, length, channels, hashes] in SIZES {
        let sequences = Sequences { batch, length };
        let shape = MergeShape { sequences, channels, hashes };
        for precision in precisions::<B>() {
            let mut x = random(sequences.rows() * channels, 1);
            // The last channel is the first, which has to be seen.
            x.chunks_mut(channels).for_each(|row| row[channels - 1] = row[0]);
            let x = rounded(&x, precision);
            let mut exact = x.clone();
            let counts: Vec<_> = exact
                .chunks_mut(length * channels)
                .map(|x| merge_channels(x, channels, hashes, &draw) as f32)
                .collect();
            assert!(counts.iter().all(|count| *count < channels.max(2) as f32));
            let exact = rounded(&exact, precision);
            each(backends, |b| {
                let mut workspace = workspace(b, sequences, channels, 1, 8, precision);
                let mut ours = output(b, &x, precision);
                let mut buckets = f32_poison(b, batch + 2);
                let merged = Merged { x: &mut ours, buckets: &mut buckets, at: 2 };
                b.merge_channels(&mut workspace, merged, shape, &draw);
                let what = format!("{}: {shape:?} in {precision:?}", b.name());
                assert!(bits(&read(b, &ours)) == bits(&exact), "{what}");
                let found = read_f32(b, &buckets, batch + 2);
                assert!(found[..2].iter().all(|v| v.is_nan()) && found[2..] == counts, "{what}");
            });
        }
    }
}
