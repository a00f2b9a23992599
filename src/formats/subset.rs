//! Which positions of a sequence a block keeps in training: a random part of them, the same on every
//! device (random-LTD, arXiv 2211.11586).
//!
//! Each position has a key of 32 random bits, and those with the smallest keys are kept. So every
//! subset is as likely as another, but where two keys at its border are equal, of which the first is
//! taken: once in two million draws from 2,048 positions. Nothing of it is a run's state.

use super::philox::{Draw, Random};

/// The key of a position, from a draw for a layer ([`Random::positions`]): a call of the generator
/// serves four positions.
pub fn position_key(draw: &Draw, sequence: u32, position: u32) -> u32 {
    draw.bits(position / 4, sequence)[(position % 4) as usize]
}

/// The `kept` positions of a sequence of `length` whose keys are the smallest, of equal ones the
/// first, in ascending order.
pub fn kept_positions(random: &Random, sequence: u32, length: usize, kept: usize) -> Vec<u32> {
    let draw = random.positions();
    let mut positions: Vec<u32> = (0..length as u32).collect();
    positions.sort_by_key(|position| position_key(&draw, sequence, *position));
    positions.truncate(kept);
    positions.sort_unstable();
    positions
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::philox4x32_10;

    const RANDOM: Random = Random { seed: 5, step: 9, micro_step: 2, layer: 3, linear: 0 };

    #[test]
    fn keys_are_words_of_the_generator() {
        let draw = RANDOM.positions();
        for (position, sequence) in [(0u32, 0u32), (5, 1), (1023, 70_000)] {
            let counter = [position / 4, 8 << 24 | sequence, 9, 2 << 18 | 3 << 6];
            let words = philox4x32_10(counter, [5, 0]);
            assert_eq!(position_key(&draw, sequence, position), words[position as usize % 4]);
        }
    }

    #[test]
    fn subsets_are_sorted_and_keep_what_smaller_ones_have() {
        let of = |kept| kept_positions(&RANDOM, 1, 100, kept);
        for kept in 1..100 {
            let (smaller, larger) = (of(kept), of(kept + 1));
            assert!(smaller.len() == kept && smaller.is_sorted_by(|a, b| a < b));
            assert!(smaller.iter().all(|position| larger.contains(position)));
        }
        assert_eq!(of(100), (0..100).collect::<Vec<_>>());
        let others = [
            Random { seed: 6, ..RANDOM },
            Random { step: 10, ..RANDOM },
            Random { micro_step: 3, ..RANDOM },
            Random { layer: 4, ..RANDOM },
        ];
        for other in others {
            assert_ne!(kept_positions(&other, 1, 100, 50), of(50), "{other:?}");
        }
        assert_ne!(kept_positions(&RANDOM, 2, 100, 50), of(50));
    }

    /// Every position, and every pair of neighbours, as often as chance has it, within 5 standard
    /// deviations.
    #[test]
    fn positions_are_kept_evenly() {
        const DRAWS: u32 = 20_000;
        let (mut counts, mut pairs) = ([0.0f64; 12], 0.0f64);
        for sequence in 0..DRAWS {
            let kept = kept_positions(&RANDOM, sequence, counts.len(), 4);
            kept.iter().for_each(|position| counts[*position as usize] += 1.0);
            pairs += kept.windows(2).filter(|pair| pair[0] + 1 == pair[1]).count() as f64;
        }
        let (draws, part) = (f64::from(DRAWS), 4.0 / 12.0);
        let deviation = (draws * part * (1.0 - part)).sqrt();
        assert!(counts.iter().all(|count| (count - draws * part).abs() < 5.0 * deviation));
        // A pair of neighbours is kept with a chance of (4 3) / (12 11), and there are 11 of them: one
        // in the mean. Their number in a draw is from 0 to 3, so its deviation is at most 1.5.
        assert!((pairs - draws).abs() < 5.0 * 1.5 * draws.sqrt(), "{pairs}");
    }
}
