//! Channels merged by their hashes: HASTE ("Data-Free Dynamic Compression of CNNs for Tractable
//! Efficiency", arXiv 2309.17211), for the linear layers of a GPT, in evaluations.
//!
//! A patch of an image is a sequence here: a channel of x (T, C) is the vector of its T numbers.
//! Each is centred, less its own mean, and hashed to the signs of L projections whose entries are 1
//! and -1 for a sixth of them each and 0 for the rest. Channels with equal hashes are a bucket, and
//! every channel of a bucket becomes the bucket's mean. Then x W^T is what K columns of means and K
//! columns of sums of W give, where there are K buckets; the product that follows has all C columns,
//! so nothing is faster, and what it would spare is counted (`trainer/merge.rs`).
//!
//! What the paper's abstract leaves open is our reading: a channel is centred by its mean over the
//! sequence, and not divided by its length, on which signs do not depend. Projections are drawn for
//! a linear layer of a block and are the same for every sequence; those of a shorter one are the
//! beginning of a longer one's.
//!
//! Sums are f64 and in order, so that hashes and means are the same on every device, and the mean of
//! equal channels is what they are.

use super::philox::{Draw, Purpose};

/// Most projections: a hash is 64 bits.
pub const MAX_HASHES: usize = 64;

/// What the projections of a linear layer of a block are drawn from.
pub fn projections(seed: u64, layer: u32, linear: u32) -> Draw {
    Draw::of(seed, Purpose::Projections, layer, linear)
}

/// Entry `token` of projection `number`.
pub fn projection_entry(draw: &Draw, number: usize, token: usize) -> i8 {
    match draw.element(number as u32, token as u32) {
        0..SIXTH => 1,
        SIXTH..TWO_SIXTHS => -1,
        TWO_SIXTHS.. => 0,
    }
}

/// A sixth of 2^16, to the nearest.
const SIXTH: u16 = 10_923;
const TWO_SIXTHS: u16 = 2 * SIXTH;

/// A bit of a hash: whether the projection of a channel of `tokens` numbers less their mean is above
/// 0. `dot` is the projection of the channel as it is, `entries` the sum of the projection's entries,
/// `sum` that of the channel.
#[inline]
pub fn is_above(tokens: usize, dot: f64, entries: i32, sum: f64) -> bool {
    tokens as f64 * dot > f64::from(entries) * sum
}

/// Merges the channels of `x` (T, channels) by hashes of `hashes` bits; the number of buckets.
pub fn merge_channels(x: &mut [f32], channels: usize, hashes: usize, draw: &Draw) -> usize {
    let codes: Vec<u64> = (0..channels).map(|c| hash(x, c, channels, hashes, draw)).collect();
    let mut buckets = 0;
    for first in 0..channels {
        if codes[..first].contains(&codes[first]) {
            continue;
        }
        buckets += 1;
        let bucket: Vec<_> = (first..channels).filter(|c| codes[*c] == codes[first]).collect();
        for row in x.chunks_exact_mut(channels) {
            let sum: f64 = bucket.iter().map(|c| f64::from(row[*c])).sum();
            let mean = (sum / bucket.len() as f64) as f32;
            bucket.iter().for_each(|c| row[*c] = mean);
        }
    }
    buckets
}

/// The hash of a channel: projection l gives bit l.
fn hash(x: &[f32], channel: usize, channels: usize, hashes: usize, draw: &Draw) -> u64 {
    let tokens = x.len() / channels;
    let numbers = || x.iter().skip(channel).step_by(channels).map(|v| f64::from(*v));
    let sum = numbers().sum();
    let mut code = 0;
    for number in 0..hashes {
        let (mut dot, mut entries) = (0.0, 0);
        for (token, v) in numbers().enumerate() {
            let entry = projection_entry(draw, number, token);
            entries += i32::from(entry);
            match entry {
                1 => dot += v,
                -1 => dot -= v,
                _ => {}
            }
        }
        code |= u64::from(is_above(tokens, dot, entries, sum)) << number;
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw() -> Draw {
        projections(7, 1, 2)
    }

    /// (T, C), any numbers.
    fn some(tokens: usize, channels: usize) -> Vec<f32> {
        let draw = Draw::of(5, Purpose::Host, 0, 0);
        let value = |i: usize| f32::from(draw.element(i as u32, 0)) / 65_536.0 - 0.4;
        (0..tokens * channels).map(value).collect()
    }

    #[test]
    fn a_third_of_the_entries_is_not_zero() {
        let draw = draw();
        let mut counts = [0; 3];
        for (number, token) in (0..64).flat_map(|number| (0..1024).map(move |t| (number, t))) {
            counts[(projection_entry(&draw, number, token) + 1) as usize] += 1;
        }
        // Deviations of 65,536 draws: 95 for a sixth.
        let [minus, zero, plus] = counts;
        for count in [minus, plus] {
            assert!((count - 65_536i32 / 6).abs() < 400, "{counts:?}");
        }
        assert_eq!(minus + zero + plus, 65_536);
    }

    #[test]
    fn every_linear_layer_has_projections_of_its_own() {
        let entries = |draw: Draw| (0..256).map(move |token| projection_entry(&draw, 0, token));
        let base: Vec<_> = entries(draw()).collect();
        for other in [projections(8, 1, 2), projections(7, 0, 2), projections(7, 1, 3)] {
            assert!(!entries(other).eq(base.iter().copied()));
        }
        let second: Vec<_> = (0..256).map(|token| projection_entry(&draw(), 1, token)).collect();
        assert_ne!(second, base);
    }

    /// One token: a channel less its mean is 0, so nothing tells channels apart.
    #[test]
    fn one_bucket_has_the_mean_of_all_channels() {
        let mut x = [1.0, 2.0, 6.0, -1.0];
        assert_eq!(merge_channels(&mut x, 4, 64, &draw()), 1);
        assert_eq!(x, [2.0; 4]);
        // Constants, too.
        let mut x = [[3.0, -1.0, 1.0]; 9].concat();
        assert_eq!(merge_channels(&mut x, 3, 64, &draw()), 1);
        assert_eq!(x, [1.0; 27]);
    }

    /// Two projections of three tokens, as they are drawn, on four channels: by hand.
    #[test]
    fn a_small_example() {
        let draw = projections(0, 0, 0);
        let entries = |number| [0, 1, 2].map(|token| projection_entry(&draw, number, token));
        assert_eq!([entries(0), entries(1)], [[0, 1, 0], [-1, 0, 0]]);
        // Less their means: (1, 0, -1), (3, -2, -1), (-1, -1, 2), (10, 20, -30).
        let mut x = [[2.0, 8.0, 0.0, 10.0], [1.0, 3.0, 0.0, 20.0], [0.0, 4.0, 3.0, -30.0]].concat();
        // Projections (0, -1), (-2, -3), (-1, 1), (20, -10), of which those above 0 are bits.
        assert_eq!([0, 1, 2, 3].map(|c| hash(&x, c, 4, 2, &draw)), [0b00, 0b00, 0b10, 0b01]);
        assert_eq!(merge_channels(&mut x, 4, 2, &draw), 3);
        assert_eq!(
            x,
            [[5.0, 5.0, 0.0, 10.0], [2.0, 2.0, 0.0, 20.0], [2.0, 2.0, 3.0, -30.0]].concat()
        );
    }

    #[test]
    fn equal_channels_are_merged_and_stay_what_they_are() {
        let (tokens, channels) = (19, 12);
        let half = some(tokens, channels / 2);
        let x: Vec<f32> = half.chunks(6).flat_map(|row| [row, row].concat()).collect();
        let mut merged = x.clone();
        let buckets = merge_channels(&mut merged, channels, 64, &draw());
        assert!(buckets <= 6, "{buckets}");
        assert_eq!(merged, x);
    }

    /// Scale and offset do not count, but for which side of a projection it is.
    #[test]
    fn a_hash_sees_a_channel_less_its_mean_and_its_length() {
        let v = some(33, 1);
        let x: Vec<f32> = v.iter().flat_map(|v| [*v, 4.0 * v, v + 2.0, -v]).collect();
        let codes = [0, 1, 2, 3].map(|c| hash(&x, c, 4, 64, &draw()));
        assert_eq!(codes[0], codes[1]);
        // What adding 2 rounds away is too little for a sign.
        assert_eq!(codes[0], codes[2]);
        assert_eq!(codes[0], !codes[3]);
    }

    #[test]
    fn more_projections_tell_more_channels_apart() {
        let x = some(64, 96);
        let buckets = [1, 2, 4, 8, 16, 32, 64].map(|hashes| {
            let mut merged = x.clone();
            let buckets = merge_channels(&mut merged, 96, hashes, &draw());
            assert!(buckets <= 1usize.checked_shl(hashes as u32).unwrap_or(usize::MAX));
            if buckets == 96 {
                assert_eq!(merged, x);
            }
            buckets
        });
        assert!(buckets.is_sorted() && buckets[0] == 2 && buckets[6] == 96, "{buckets:?}");
    }
}
