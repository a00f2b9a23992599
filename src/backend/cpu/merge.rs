//! Channels merged by their hashes. What makes a hash and a mean is the definition's
//! ([`crate::formats::merge_channels`]), in its order of sums, so that every result is the same bits.
//!
//! Jobs hash some channels of a sequence, then sort the channels of a sequence by hash, then average
//! rows: equal hashes lie next to each other in the order, and channels of a bucket ascend.

use rayon::prelude::*;

use super::isa::simd_fn;
use super::workspace::{MergeMemory, MergeSize, ScratchSize, Workspace};
use super::{Cpu, rows_per_job};
use crate::backend::{Merge, MergeShape, Merged};
use crate::formats::{Draw, is_above, projection_entry};

/// Channels that a job hashes: as many f64 sums as registers hold.
const CHANNELS_AT_ONCE: usize = 32;

/// What merging needs of a workspace.
pub(super) fn scratch(shape: Option<MergeShape>) -> ScratchSize {
    let merge = shape.map_or_else(MergeSize::default, |shape| {
        let MergeShape { sequences, channels, hashes } = shape;
        MergeSize { entries: hashes * sequences.length, channels: sequences.batch * channels }
    });
    ScratchSize { merge, ..ScratchSize::default() }
}

impl Merge for Cpu {
    fn merge_channels(
        &self,
        workspace: &mut Workspace,
        Merged { x, buckets, at }: Merged<'_, Self>,
        MergeShape { sequences, channels, hashes: bits }: MergeShape,
        draw: &Draw,
    ) {
        let (batch, tokens) = (sequences.batch, sequences.length);
        let MergeMemory { projections, hashes, order } = &mut workspace.merge;
        let projections = &mut projections[..bits * tokens];
        let (hashes, order) = (&mut hashes[..batch * channels], &mut order[..batch * channels]);
        let x = &mut x[..batch * tokens * channels];
        self.draw_projections(projections, tokens, draw);
        self.hash_channels(hashes, x, channels, projections);
        self.sort_channels(order, &mut buckets[at..][..batch], hashes);
        self.average_channels(x, channels, order, hashes);
    }
}

impl Cpu {
    /// Entries (L, T).
    fn draw_projections(&self, projections: &mut [i8], tokens: usize, draw: &Draw) {
        self.install(|| {
            projections.par_chunks_exact_mut(tokens).enumerate().for_each(|(number, entries)| {
                for (token, entry) in entries.iter_mut().enumerate() {
                    *entry = projection_entry(draw, number, token);
                }
            });
        });
    }

    /// Hashes (B, C) of x (B T, C).
    fn hash_channels(&self, hashes: &mut [u64], x: &[f32], channels: usize, projections: &[i8]) {
        let of_sequence = x.len() / (hashes.len() / channels);
        self.install(|| {
            hashes.par_chunks_exact_mut(channels).zip(x.par_chunks_exact(of_sequence)).for_each(
                |(hashes, x)| {
                    let some = hashes.par_chunks_mut(CHANNELS_AT_ONCE).enumerate();
                    some.with_max_len(1).for_each(|(job, hashes)| {
                        let x = &x[job * CHANNELS_AT_ONCE..];
                        hash(self.isa(), hashes, x, channels, projections);
                    });
                },
            );
        });
    }

    /// The channels of each sequence by hash (B, C), and its number of buckets (B).
    fn sort_channels(&self, order: &mut [u32], buckets: &mut [f32], hashes: &[u64]) {
        let channels = order.len() / buckets.len();
        let hashes = hashes.par_chunks_exact(channels);
        let of_sequences = order.par_chunks_exact_mut(channels).zip(hashes);
        self.install(|| {
            of_sequences.zip(buckets).for_each(|((order, hashes), buckets)| {
                order.iter_mut().zip(0..).for_each(|(channel, number)| *channel = number);
                order.sort_unstable_by_key(|channel| (hashes[*channel as usize], *channel));
                *buckets = buckets_of(order, hashes).count() as f32;
            });
        });
    }

    /// Every number of x (B T, C) becomes the mean of its bucket.
    fn average_channels(&self, x: &mut [f32], channels: usize, order: &[u32], hashes: &[u64]) {
        let of_sequence = x.len() / (hashes.len() / channels);
        let of_job = rows_per_job(channels) * channels;
        let buckets = order.par_chunks_exact(channels).zip(hashes.par_chunks_exact(channels));
        self.install(|| {
            x.par_chunks_exact_mut(of_sequence).zip(buckets).for_each(|(x, (order, hashes))| {
                x.par_chunks_mut(of_job).for_each(|rows| {
                    let rows = rows.chunks_exact_mut(channels);
                    rows.for_each(|row| average(row, buckets_of(order, hashes)));
                });
            });
        });
    }
}

/// The channels of each bucket.
fn buckets_of<'a>(order: &'a [u32], hashes: &'a [u64]) -> impl Iterator<Item = &'a [u32]> {
    order.chunk_by(|a, b| hashes[*a as usize] == hashes[*b as usize])
}

/// Every number of a row becomes the mean of its bucket.
fn average<'a>(row: &mut [f32], buckets: impl Iterator<Item = &'a [u32]>) {
    for bucket in buckets.filter(|bucket| bucket.len() > 1) {
        let sum: f64 = bucket.iter().map(|c| f64::from(row[*c as usize])).sum();
        let mean = (sum / bucket.len() as f64) as f32;
        bucket.iter().for_each(|c| row[*c as usize] = mean);
    }
}

simd_fn! {
    /// Hashes of some channels, with which the rows of x begin that lie `channels` apart.
    fn hash(hashes: &mut [u64], x: &[f32], channels: usize, projections: &[i8]) {
        let n = hashes.len();
        let tokens = x.len().div_ceil(channels);
        let mut sums = [0.0f64; CHANNELS_AT_ONCE];
        for row in x.chunks(channels) {
            sums.iter_mut().zip(&row[..n]).for_each(|(sum, v)| *sum += f64::from(*v));
        }
        hashes.fill(0);
        for (number, projection) in projections.chunks_exact(tokens).enumerate() {
            let (mut dots, mut entries) = ([0.0f64; CHANNELS_AT_ONCE], 0);
            for (row, entry) in x.chunks(channels).zip(projection) {
                let row = dots.iter_mut().zip(&row[..n]);
                match entry {
                    1 => row.for_each(|(dot, v)| *dot += f64::from(*v)),
                    -1 => row.for_each(|(dot, v)| *dot -= f64::from(*v)),
                    _ => {}
                }
                entries += i32::from(*entry);
            }
            for ((hash, dot), sum) in hashes.iter_mut().zip(dots).zip(sums) {
                *hash |= u64::from(is_above(tokens, dot, entries, sum)) << number;
            }
        }
    }
}
