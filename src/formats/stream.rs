//! Philox as a stream of random numbers, for whoever draws with the `rand` crate: the bits of a
//! seed in order, with nothing to save but how far it has come.
//!
//! The library itself draws by counter (see [`super::Draw`]) and never from a stream, which would
//! depend on who draws first. These bits are of a purpose of their own, so a host that seeds a
//! stream as its engine gets other numbers than training does.

use std::convert::Infallible;

use rand::{SeedableRng, TryRng};

use super::{Draw, Purpose};

/// Random numbers of a seed: Philox4x32-10 (Salmon et al. 2011), through the traits of `rand`.
///
/// ```
/// use mxfp4train::Philox;
/// use rand::{RngExt, SeedableRng};
///
/// let mut rng = Philox::seed_from_u64(1337);
/// let index = rng.random_range(0..50_257);
/// assert!(index < 50_257);
/// // Another stream of the same seed, for another thread, say.
/// assert_ne!(Philox::new(1337, 1).random::<u64>(), Philox::new(1337, 0).random::<u64>());
/// ```
///
/// It is no generator for secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Philox {
    draw: Draw,
    /// Calls of the generator so far, of 2^56.
    calls: u64,
    words: [u32; 4],
    /// Words of the last call that are not given out yet, which are the last ones.
    left: usize,
}

impl Philox {
    /// Stream number `stream` of a seed, from its beginning.
    pub fn new(seed: u64, stream: u64) -> Self {
        let draw = Draw::of(seed, Purpose::Host, stream as u32, (stream >> 32) as u32);
        Self { draw, calls: 0, words: [0; 4], left: 0 }
    }
}

impl TryRng for Philox {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        if self.left == 0 {
            let (index, rest) = (self.calls as u32, (self.calls >> 32) as u32 & 0xff_ffff);
            self.words = self.draw.bits(index, rest);
            self.calls = self.calls.wrapping_add(1);
            self.left = self.words.len();
        }
        let word = self.words[self.words.len() - self.left];
        self.left -= 1;
        Ok(word)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let [low, high] = [self.try_next_u32()?, self.try_next_u32()?];
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    fn try_fill_bytes(&mut self, to: &mut [u8]) -> Result<(), Infallible> {
        for bytes in to.chunks_mut(4) {
            let word = self.try_next_u32()?.to_le_bytes();
            bytes.copy_from_slice(&word[..bytes.len()]);
        }
        Ok(())
    }
}

/// Stream 0 of a seed.
impl SeedableRng for Philox {
    /// The seed in 64 bits, low byte first.
    type Seed = [u8; 8];

    fn from_seed(seed: [u8; 8]) -> Self {
        Self::new(u64::from_le_bytes(seed), 0)
    }

    fn seed_from_u64(seed: u64) -> Self {
        Self::new(seed, 0)
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, RngExt};

    use super::*;
    use crate::formats::philox4x32_10;

    #[test]
    fn words_are_those_of_the_generator_in_order() {
        let (seed, stream) = (0x0123_4567_89ab_cdef_u64, 7 << 32 | 5);
        let mut rng = Philox::new(seed, stream);
        for call in 0..3 {
            let key = [seed as u32, (seed >> 32) as u32];
            for word in philox4x32_10([call, 6 << 24, 5, 7], key) {
                assert_eq!(rng.next_u32(), word);
            }
        }
        // Bytes and longer numbers take the same words.
        let [mut words, mut bytes] = [Philox::new(3, 0), Philox::new(3, 0)];
        let expected: Vec<u8> = (0..3).flat_map(|_| words.next_u32().to_le_bytes()).collect();
        let mut found = [0; 11];
        bytes.fill_bytes(&mut found);
        assert_eq!(found, expected[..11]);
        let long = Philox::seed_from_u64(3).next_u64().to_le_bytes();
        assert_eq!(long, expected[..8]);
        assert_eq!(Philox::from_seed(3u64.to_le_bytes()), Philox::seed_from_u64(3));
    }

    /// Moments and counts of what `rand` makes of it, within 5 standard deviations.
    #[test]
    fn numbers_are_spread_evenly() {
        const N: usize = 100_000;
        let mut rng = Philox::seed_from_u64(20);
        let values: Vec<f64> = (0..N).map(|_| rng.random()).collect();
        let mean = values.iter().sum::<f64>() / N as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / N as f64;
        // The mean of uniform numbers has a standard deviation of sqrt(1/12 / N), their variance
        // sqrt(1/180 / N).
        assert!((mean - 0.5).abs() < 5.0 * (1.0 / 12.0 / N as f64).sqrt(), "{mean}");
        assert!(
            (variance - 1.0 / 12.0).abs() < 5.0 * (1.0 / 180.0 / N as f64).sqrt(),
            "{variance}"
        );
        let mut counts = [0.0f64; 10];
        (0..N).for_each(|_| counts[rng.random_range(0..10)] += 1.0);
        // Chi-squared of 9 degrees of freedom: mean 9, standard deviation sqrt(18).
        let expected = N as f64 / 10.0;
        let chi = counts.iter().map(|n| (n - expected).powi(2) / expected).sum::<f64>();
        assert!(chi < 9.0 + 5.0 * 18.0f64.sqrt(), "{counts:?}");
        let heads = (0..N).filter(|_| rng.random_bool(0.3)).count() as f64 / N as f64;
        assert!((heads - 0.3).abs() < 5.0 * (0.21 / N as f64).sqrt(), "{heads}");
    }
}
