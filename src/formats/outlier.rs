//! Outliers of a vector: what lies beyond its quantiles is clamped before it is quantized, and what
//! that took is added again in bf16 ("outlier clamping and compensation", arXiv 2501.17116).

use super::round_mantissa;

/// The share of a vector that is kept as it is, in ten-thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kept(u16);

impl Kept {
    /// 99%, as the paper has it.
    pub const DEFAULT: Self = Self(9900);

    /// A share above a half and below 1.
    pub fn new(share: f64) -> Option<Self> {
        let parts = (share * 10_000.0).round();
        (parts > 5000.0 && parts < 10_000.0).then_some(Self(parts as u16))
    }

    /// The same as a fraction.
    pub fn share(self) -> f64 {
        f64::from(self.0) / 10_000.0
    }

    /// Where the quantiles lie in a sorted vector: int((1 - a) n) and int(a n).
    pub fn ranks(self, len: usize) -> [usize; 2] {
        [10_000 - usize::from(self.0), usize::from(self.0)].map(|parts| parts * len / 10_000)
    }

    /// The quantiles of a vector, which are two of its numbers; NaN where one is not finite.
    pub fn bounds(self, vector: &[f32]) -> [f32; 2] {
        if vector.iter().any(|v| !v.is_finite()) {
            return [f32::NAN; 2];
        }
        self.ranks(vector.len()).map(|rank| of_rank(vector, rank))
    }
}

/// The number with so many smaller ones, found bit by bit: no memory, and no order of the vector.
fn of_rank(vector: &[f32], rank: usize) -> f32 {
    let mut found = 0u32;
    for bit in (0..32).rev() {
        let tried = found | 1 << bit;
        if vector.iter().filter(|v| key(**v) < tried).count() <= rank {
            found = tried;
        }
    }
    f32::from_bits(if found >> 31 == 1 { found ^ 1 << 31 } else { !found })
}

/// A number that orders as the float does.
fn key(v: f32) -> u32 {
    let bits = v.to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// A number between the bounds.
pub fn clamped(v: f32, [low, high]: [f32; 2]) -> f32 {
    if v < low {
        low
    } else if v > high {
        high
    } else {
        v
    }
}

/// What clamping took, in bf16.
pub fn outlier(v: f32, bounds: [f32; 2]) -> f32 {
    round_mantissa(v - clamped(v, bounds), 7)
}

#[cfg(test)]
mod tests {
    use super::super::{Draw, Purpose, fill_normal};
    use super::*;

    fn normal(len: usize) -> Vec<f32> {
        let mut values = vec![0.0; len];
        fill_normal(&mut values, 1.0, &Draw::of(len as u64, Purpose::Weights, 0, 0), 0);
        values
    }

    #[test]
    fn bounds_are_those_of_the_sorted_vector() {
        for len in [1, 5, 99, 100, 768, 3001] {
            for share in [0.97, 0.99, 0.999] {
                let (kept, x) = (Kept::new(share).unwrap(), normal(len));
                let mut sorted = x.clone();
                sorted.sort_by(f32::total_cmp);
                let exact = kept.ranks(len).map(|rank| sorted[rank]);
                assert_eq!(kept.bounds(&x).map(f32::to_bits), exact.map(f32::to_bits), "{len}");
            }
        }
        assert_eq!(Kept::DEFAULT.ranks(1000), [10, 990]);
        assert_eq!(Kept::DEFAULT.bounds(&[-0.0, 0.0]).map(f32::to_bits), [1 << 31, 0]);
        assert!(Kept::DEFAULT.bounds(&[1.0, f32::INFINITY])[0].is_nan());
    }

    /// Both parts of a number in bf16 are the number. Of a vector 2 (1 - a) n, give or take two, have
    /// a second part, where no two are alike.
    #[test]
    fn outliers_are_what_clamping_took() {
        for (len, share) in [(768, 0.99), (3072, 0.99), (3072, 0.999), (1000, 0.97)] {
            let (kept, x) = (Kept::new(share).unwrap(), normal(len));
            let bounds = kept.bounds(&x);
            let held: Vec<_> = x.iter().map(|v| round_mantissa(*v, 7)).collect();
            let of_held = kept.bounds(&held);
            assert!(held.iter().all(|v| clamped(*v, of_held) + (v - clamped(*v, of_held)) == *v));
            let found = x.iter().filter(|v| outlier(**v, bounds) != 0.0).count();
            let expected = 2.0 * (1.0 - share) * len as f64;
            assert!((found as f64 - expected).abs() <= 2.0, "{len} {share}: {found}");
        }
    }

    #[test]
    fn shares_are_those_that_leave_something_and_take_something() {
        for share in [0.0, 0.5, 1.0, 2.0, f64::NAN] {
            assert_eq!(Kept::new(share), None, "{share}");
        }
        assert_eq!(Kept::new(0.99), Some(Kept::DEFAULT));
        assert_eq!(Kept::DEFAULT.share(), 0.99);
    }
}
