//! The order of training windows: a pure function of (seed, epoch, position).
//!
//! Nothing is stored and nothing is shuffled in memory: a resumed run asks for the next window
//! number and gets the very window that it would have got without the interruption.
//!
//! All random bits are Philox4x32-10 with the seed as key. Counter words (laid out as in
//! `formats::philox`): c0 = block or file index, c1 = purpose << 24 | sub-purpose, c2 and c3 =
//! epoch, low and high half.

use crate::formats::{Draw, Purpose};

/// Sub-purpose: round keys of the permutation.
const PERMUTATION: u32 = 0;
/// Sub-purpose: the phase of each file.
const PHASE: u32 = 1;
/// Sub-purpose: the seed of windows besides.
const SIDE: u32 = 2;

/// Rounds of the Feistel network. Four are enough for a pseudo-random permutation with ideal round
/// functions; twice as many leave room for the cheap one used here.
const ROUNDS: usize = 8;

/// A bijection of 0..`size`, another one for every seed and epoch.
///
/// A balanced Feistel network permutes the smallest power of four that is at least `size`; values
/// outside of 0..`size` are sent through again until one falls inside ("cycle walking"), which
/// keeps the bijection exact and takes fewer than four passes on average.
pub(super) struct Permutation {
    size: u64,
    /// Bits of each half, 1 to 32.
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of epoch `epoch`. `size` is at least 1.
    pub(super) fn new(seed: u64, epoch: u64, size: u64) -> Self {
        debug_assert!(size > 0);
        let bits = u64::BITS - (size - 1).leading_zeros();
        let mut keys = [0; ROUNDS];
        for (block, pair) in keys.chunks_exact_mut(2).enumerate() {
            let [a, b, c, d] = draw(seed, epoch, block as u32, PERMUTATION);
            pair[0] = join(a, b);
            pair[1] = join(c, d);
        }
        Self { size, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// Where `position` (below `size`) is sent.
    pub(super) fn apply(&self, position: u64) -> u64 {
        debug_assert!(position < self.size);
        let mut x = position;
        loop {
            x = self.network(x);
            if x < self.size {
                return x;
            }
        }
    }

    fn network(&self, x: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// Start of the first window of file `file` in epoch `epoch`: uniform in 0..=`last`.
pub(super) fn phase(seed: u64, epoch: u64, file: usize, last: u64) -> u64 {
    let [a, b, ..] = draw(seed, epoch, file as u32, PHASE);
    ((u128::from(join(a, b)) * (u128::from(last) + 1)) >> 64) as u64
}

/// The seed in whose order windows come that a run does not train on.
pub(super) fn side_seed(seed: u64) -> u64 {
    let [a, b, ..] = draw(seed, 0, 0, SIDE);
    join(a, b)
}

fn draw(seed: u64, epoch: u64, index: u32, sub_purpose: u32) -> [u32; 4] {
    let draw = Draw::of(seed, Purpose::Order, epoch as u32, (epoch >> 32) as u32);
    draw.bits(index, sub_purpose)
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// Stafford's variant 13 of the 64-bit MurmurHash3 finalizer.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_window_is_visited_exactly_once(
            size in 1u64..5000, seed: u64, epoch: u64,
        ) {
            let permutation = Permutation::new(seed, epoch, size);
            let mut seen = vec![false; size as usize];
            for position in 0..size {
                let window = permutation.apply(position) as usize;
                prop_assert!(window < seen.len() && !seen[window]);
                seen[window] = true;
            }
        }

        #[test]
        fn huge_sizes_stay_in_range(size in 1u64.., seed: u64, position: u64) {
            prop_assert!(Permutation::new(seed, 0, size).apply(position % size) < size);
        }

        #[test]
        fn phases_stay_in_range(seed: u64, epoch: u64, file in 0usize..100, last: u64) {
            prop_assert!(phase(seed, epoch, file, last) <= last);
        }
    }

    #[test]
    fn seeds_and_epochs_give_different_orders() {
        let order = |seed, epoch| {
            let permutation = Permutation::new(seed, epoch, 1000);
            (0..1000).map(|i| permutation.apply(i)).collect::<Vec<_>>()
        };
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        assert_ne!(order(1, 0), order(1 | 1 << 32, 0));
        assert_ne!(order(1, 0), order(1, 1 << 32));
        assert_eq!(order(1, 0), order(1, 0));
    }

    /// Where a position is sent must not depend on where it is: each of 16 x 16 cells (position
    /// against image) holds its share of 16 x 4,096 points, by the chi-square statistic.
    #[test]
    fn images_are_spread_evenly() {
        const SIZE: u64 = 4096;
        let mut cells = [0u32; 256];
        for seed in 0..16 {
            let permutation = Permutation::new(seed, 7, SIZE);
            for position in 0..SIZE {
                let image = permutation.apply(position);
                cells[(position * 16 / SIZE * 16 + image * 16 / SIZE) as usize] += 1;
            }
        }
        let expected = 16.0 * SIZE as f64 / 256.0;
        let chi2: f64 = cells.iter().map(|&n| (f64::from(n) - expected).powi(2) / expected).sum();
        // 225 degrees of freedom: mean 225, standard deviation 21.
        assert!((120.0..330.0).contains(&chi2), "chi-square {chi2}");
    }

    #[test]
    fn phases_take_every_value() {
        let mut seen = [false; 17];
        for epoch in 0..500 {
            seen[phase(3, epoch, 0, 16) as usize] = true;
        }
        assert!(seen.iter().all(|&s| s));
    }
}
