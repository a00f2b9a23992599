//! Which micro-steps of a step a rank makes.
//!
//! The micro-steps of a step are dealt to lanes, in a row, and lanes to ranks, in a row. A lane adds
//! its micro-steps up as it makes them; lanes are added in the order of `tree.rs`. So what a step is
//! depends on the number of lanes, and not on that of ranks.

use std::ops::Range;

use super::Ranks;
use crate::{Error, Result};

/// What a rank does of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    /// Its first lane.
    first: usize,
    /// Its lanes.
    pub(crate) lanes: usize,
    /// Micro-steps of a lane.
    per_lane: usize,
}

impl Share {
    /// Of a rank, or of one that is alone. Lanes divide the micro-steps, and were [`Share::check`]ed.
    pub(crate) fn new(accumulation: usize, lanes: usize, ranks: Option<&Ranks>) -> Self {
        let (rank, size) = ranks.map_or((0, 1), |ranks| (ranks.rank(), ranks.size()));
        let of_rank = lanes / size;
        Self { first: rank * of_rank, lanes: of_rank, per_lane: accumulation / lanes }
    }

    /// The micro-steps of one of its lanes, by their numbers in the step.
    pub(crate) fn micro_steps(&self, lane: usize) -> Range<usize> {
        let first = (self.first + lane) * self.per_lane;
        first..first + self.per_lane
    }

    /// All of its micro-steps in their order, each with the lane that it is of.
    pub(crate) fn lanes_and_micro_steps(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.lanes).flat_map(move |lane| self.micro_steps(lane).map(move |step| (lane, step)))
    }

    /// All of its micro-steps.
    pub(crate) fn all(&self) -> Range<usize> {
        let first = self.first * self.per_lane;
        first..first + self.lanes * self.per_lane
    }

    /// Whether ranks that share so many lanes add up subtrees of them.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that lists how many ranks could.
    pub(crate) fn check(lanes: usize, ranks: usize) -> Result<()> {
        let fits = |ranks: usize| {
            lanes.is_multiple_of(ranks) && (ranks == 1 || (lanes / ranks).is_power_of_two())
        };
        if fits(ranks) {
            return Ok(());
        }
        let fitting: Vec<_> =
            (1..=lanes).filter(|ranks| fits(*ranks)).map(|ranks| ranks.to_string()).collect();
        let message = format!(
            "a step is the sum of {lanes}, which {ranks} ranks cannot share and get the same bits; \
             ranks may be {}",
            fitting.join(", ")
        );
        Err(Error::invalid("lanes", message))
    }
}

/// The parameters whose states one of `size` ranks keeps, of these sizes: some in a row, with about as
/// many elements as others have.
pub(crate) fn owned(
    sizes: impl Iterator<Item = usize> + Clone,
    rank: usize,
    size: usize,
) -> Range<usize> {
    let total: usize = sizes.clone().sum();
    let mut end = 0;
    // By where the middle of each lies among all elements.
    let owners = sizes.map(|size_of_one| {
        let middle = end + size_of_one / 2;
        end += size_of_one;
        (middle as u128 * size as u128 / total.max(1) as u128) as usize
    });
    let (mut first, mut count) = (0, 0);
    for owner in owners {
        first += usize::from(owner < rank);
        count += usize::from(owner == rank);
    }
    first..first + count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_micro_step_is_made_once_and_in_its_order() {
        for (accumulation, lanes, size) in [(1, 1, 1), (8, 4, 2), (12, 6, 3), (6, 6, 1), (8, 8, 8)]
        {
            let mut all = Vec::new();
            for rank in 0..size {
                let of_rank = lanes / size;
                let share =
                    Share { first: rank * of_rank, lanes: of_rank, per_lane: accumulation / lanes };
                let steps: Vec<_> = (0..of_rank).flat_map(|lane| share.micro_steps(lane)).collect();
                assert_eq!(steps, share.all().collect::<Vec<_>>());
                all.extend(steps);
            }
            assert_eq!(all, (0..accumulation).collect::<Vec<_>>());
        }
    }

    #[test]
    fn every_parameter_has_one_owner() {
        let sizes = [700, 16, 3, 3, 90, 30, 30, 10, 90, 30, 30, 10, 3, 3, 0, 1];
        for size in 1..=9 {
            let ranges: Vec<_> =
                (0..size).map(|rank| owned(sizes.iter().copied(), rank, size)).collect();
            assert_eq!(ranges[0].start, 0);
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start), "{ranges:?}");
            assert_eq!(ranges[size - 1].end, sizes.len());
        }
        let even = [10; 12].into_iter();
        assert!((0..4).all(|rank| owned(even.clone(), rank, 4).len() == 3));
    }

    #[test]
    fn a_refusal_lists_what_would_fit() {
        let message = Share::check(12, 2).unwrap_err().to_string();
        assert!(message.ends_with("ranks may be 1, 3, 6, 12"), "{message}");
        assert!(Share::check(1, 2).is_err() && Share::check(8, 2).is_ok());
    }
}
