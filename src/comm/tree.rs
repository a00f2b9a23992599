//! The one order in which partial sums are added, whoever has them.
//!
//! The sum of n parts is that of the first 2^k and of the others, with 2^k the largest power of two
//! below n, and so on. A rank that holds 2^j parts in a row, from a multiple of 2^j on, adds up a
//! subtree of it: so any such number of ranks gets the same bits, and one that has all parts as well.

/// Elements that are added up at once, of all parts, before the next: they stay in the cache.
const RUN: usize = 4096;

/// Adds up `parts` parts of the same length, one behind the other, into the first.
pub(crate) fn sum_parts(all: &mut [f32], parts: usize) {
    let len = all.len() / parts;
    for start in (0..len).step_by(RUN) {
        sum(all, len, start..(start + RUN).min(len), 0, parts);
    }
}

/// Adds up `count` parts from `first` on, within a range of each, into the first of them.
fn sum(all: &mut [f32], len: usize, range: std::ops::Range<usize>, first: usize, count: usize) {
    if count == 1 {
        return;
    }
    let left = left_of(count);
    sum(all, len, range.clone(), first, left);
    sum(all, len, range.clone(), first + left, count - left);
    let (to, from) = all.split_at_mut((first + left) * len);
    let to = &mut to[first * len..][range.clone()];
    to.iter_mut().zip(&from[range]).for_each(|(to, from)| *to += from);
}

/// The largest power of two below n, from 2 on.
fn left_of(n: usize) -> usize {
    1 << (usize::BITS - 1 - (n - 1).leading_zeros())
}

/// The same sum of `count` numbers from `first` on.
pub(super) fn sum_of(first: usize, count: usize, number: &impl Fn(usize) -> f64) -> f64 {
    match count {
        0 => 0.0,
        1 => number(first),
        _ => {
            let left = left_of(count);
            sum_of(first, left, number) + sum_of(first + left, count - left, number)
        }
    }
}

/// How parts that come one by one are joined to the same sum: which of those that are kept are added
/// to a new one, the last kept first, and whether it is kept then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Joins {
    /// How many of the kept ones are joined with it.
    pub(crate) joined: usize,
    /// Whether it is kept then; the last is not, which has all.
    pub(crate) is_kept: bool,
}

impl Joins {
    /// Of part `number`, from 0 on, of `count`.
    pub(crate) fn of(number: usize, count: usize) -> Self {
        let done = number + 1;
        match done == count {
            // As many as there are in the parts before, which binary digits say.
            true => Self { joined: (number.count_ones()) as usize, is_kept: false },
            false => Self { joined: done.trailing_zeros() as usize, is_kept: true },
        }
    }

    /// Most parts that are kept at once, while the next is made.
    pub(crate) fn most_kept(count: usize) -> usize {
        (0..count).map(|number| number.count_ones() as usize).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is added to what, as a text.
    fn symbolic(parts: &[String]) -> String {
        match parts {
            [one] => one.clone(),
            more => {
                let (left, right) = more.split_at(left_of(more.len()));
                format!("({}+{})", symbolic(left), symbolic(right))
            }
        }
    }

    fn joined(parts: &[String]) -> String {
        let mut kept: Vec<String> = Vec::new();
        for (number, part) in parts.iter().enumerate() {
            let Joins { joined, is_kept } = Joins::of(number, parts.len());
            let mut sum = part.clone();
            for _ in 0..joined {
                sum = format!("({}+{sum})", kept.pop().unwrap());
            }
            if !is_kept {
                assert!(kept.is_empty());
                return sum;
            }
            kept.push(sum);
            assert!(kept.len() <= Joins::most_kept(parts.len()));
        }
        unreachable!("the last is not kept")
    }

    /// Ranks that share lanes as `Share` lets them make the tree of one that has them all.
    #[test]
    fn any_number_of_ranks_adds_in_one_order() {
        for lanes in 1..=64 {
            let parts: Vec<_> = (0..lanes).map(|lane| lane.to_string()).collect();
            let whole = symbolic(&parts);
            assert_eq!(joined(&parts), whole);
            for ranks in 1..=lanes {
                let is_shared = super::super::Share::check(lanes, ranks).is_ok();
                if lanes % ranks != 0 {
                    assert!(!is_shared);
                    continue;
                }
                let of_ranks: Vec<_> = parts.chunks(lanes / ranks).map(joined).collect();
                assert_eq!(symbolic(&of_ranks) == whole, is_shared, "{lanes} by {ranks}");
            }
        }
    }

    #[test]
    fn parts_are_added_in_the_order_of_the_tree() {
        for (parts, len) in [(1, 5), (2, 7), (3, 1), (4, 2 * RUN + 3), (6, RUN), (7, 33)] {
            let value = |i: usize| ((i * 7919) % 1000) as f32 * 1e-3 + (i % 3) as f32 * 1e7;
            let mut all: Vec<f32> = (0..parts * len).map(value).collect();
            let expected: Vec<f32> = (0..len)
                .map(|i| {
                    fn of(values: &[f32]) -> f32 {
                        match values {
                            [one] => *one,
                            more => {
                                let (left, right) = more.split_at(left_of(more.len()));
                                of(left) + of(right)
                            }
                        }
                    }
                    of(&(0..parts).map(|part| value(part * len + i)).collect::<Vec<_>>())
                })
                .collect();
            sum_parts(&mut all, parts);
            assert_eq!(all[..len], expected);
        }
        let values = [1e17, 1.0, -1e17, 1.0, 0.3];
        assert_eq!(sum_of(0, 4, &|i| values[i]), (1e17 + 1.0) + (-1e17 + 1.0));
        assert_eq!(sum_of(2, 3, &|i| values[i]), (-1e17 + 1.0) + 0.3);
    }
}
