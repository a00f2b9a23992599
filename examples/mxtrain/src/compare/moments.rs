//! Mean and variance of a gradient over draws of its random bits, against a reference, as they come
//! in: one vector of sums is kept, not the draws.
//!
//! With d the difference of a draw from the reference, n draws give
//!
//! - the sum over pairs of different draws of <d, d'>, whose mean over pairs estimates the square
//!   of the bias without the part that too few draws leave in |mean d|^2, which is variance / n;
//! - each draw's product with the sum of those before it, which tells how well the former is known.

use std::thread;

use serde::{Deserialize, Serialize};

/// Elements that are added up at a time, so that sums do not depend on the number of threads.
const CHUNK: usize = 1 << 14;

/// Sums over the draws of one tensor.
pub(crate) struct Moments {
    /// What the draws are compared with.
    reference: Vec<f32>,
    /// |reference|^2
    size: f64,
    /// Sum of d, by element.
    sum: Vec<f64>,
    /// Of every draw: |d|^2, <d, reference> and <d, sum of d before>.
    draws: Vec<[f64; 3]>,
}

/// What the draws say. Squares are relative to that of the reference's norm.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Statistics {
    /// Norm of the reference.
    pub(crate) norm: f64,
    /// |E g - reference|^2, estimated without bias, hence below 0 now and then where it is 0.
    pub(crate) bias_squared: f64,
    /// Standard error of the former if there were no bias: a few of these are noise.
    pub(crate) bias_squared_error: f64,
    /// |mean g - reference|^2 of these draws as it is, variance / draws included.
    pub(crate) bias_squared_uncorrected: f64,
    /// E |g - E g|^2
    pub(crate) variance: f64,
    /// Mean cosine of the angle between a draw and the reference.
    pub(crate) cosine: f64,
    /// <E g, reference>: 1 where the mean keeps the reference's length along its direction.
    pub(crate) scale: f64,
}

impl Moments {
    /// No draws yet.
    pub(crate) fn new(reference: Vec<f32>) -> Self {
        let size = reference.iter().map(|r| f64::from(*r).powi(2)).sum();
        Self { sum: vec![0.0; reference.len()], reference, size, draws: Vec::new() }
    }

    /// Adds a draw.
    pub(crate) fn push(&mut self, draw: &[f32]) {
        assert_eq!(draw.len(), self.reference.len(), "draws have the shape of the reference");
        let threads = thread::available_parallelism().map_or(1, |n| n.get().min(16));
        let each = self.sum.len().div_ceil(threads).next_multiple_of(CHUNK);
        let parts = self.sum.chunks_mut(each).zip(draw.chunks(each));
        let parts = parts.zip(self.reference.chunks(each));
        let chunks: Vec<[f64; 3]> = thread::scope(|scope| {
            let work: Vec<_> = parts
                .map(|((sum, draw), reference)| scope.spawn(move || add(sum, draw, reference)))
                .collect();
            work.into_iter().flat_map(|part| part.join().expect("additions do not panic")).collect()
        });
        self.draws.push(chunks.into_iter().fold([0.0; 3], plus));
    }

    /// What at least two draws say.
    pub(crate) fn statistics(&self) -> Statistics {
        let n = self.draws.len() as f64;
        assert!(n >= 2.0, "a variance needs two draws");
        // A gradient that is zero has nothing that could be relative to it.
        let size = if self.size > 0.0 { self.size } else { f64::NAN };
        let [squares, along, products] = self.draws.iter().copied().fold([0.0; 3], plus);
        let pairs = n * (n - 1.0) / 2.0;
        let bias_squared = products / pairs;
        let mean_squared = (squares + 2.0 * products) / (n * n);
        let mut variance = (squares - n * mean_squared) / (n - 1.0);
        // Draws that are all the same leave the rounding errors of the sums.
        if variance < 1e-12 * squares / n {
            variance = 0.0;
        }
        // Were there no bias, the products of different draws would not depend on each other.
        let residues = self
            .draws
            .iter()
            .enumerate()
            .map(|(before, [_, _, product])| (product - before as f64 * bias_squared).powi(2));
        let error = if variance > 0.0 { residues.sum::<f64>().sqrt() / pairs } else { 0.0 };
        let cosine = |[square, along, _]: &[f64; 3]| {
            let dot = along + size;
            dot / (size * (square + 2.0 * along + size)).sqrt()
        };
        Statistics {
            norm: self.size.sqrt(),
            bias_squared: bias_squared / size,
            bias_squared_error: error / size,
            bias_squared_uncorrected: mean_squared / size,
            variance: variance / size,
            cosine: self.draws.iter().map(cosine).sum::<f64>() / n,
            scale: 1.0 + along / n / size,
        }
    }
}

/// Adds the draw's difference from the reference to `sum`; gives, of every chunk, its square and
/// its products with the reference and with the sum before.
fn add(sum: &mut [f64], draw: &[f32], reference: &[f32]) -> Vec<[f64; 3]> {
    let chunks = sum.chunks_mut(CHUNK).zip(draw.chunks(CHUNK)).zip(reference.chunks(CHUNK));
    chunks
        .map(|((sum, draw), reference)| {
            // Several sums at a time, for one alone waits for every addition.
            let mut lanes = [[0.0; 3]; 8];
            for (i, sum) in sum.iter_mut().enumerate() {
                let reference = f64::from(reference[i]);
                let d = f64::from(draw[i]) - reference;
                lanes[i % 8] = plus(lanes[i % 8], [d * d, d * reference, d * *sum]);
                *sum += d;
            }
            lanes.into_iter().fold([0.0; 3], plus)
        })
        .collect()
}

fn plus(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use mxfp4train::formats::{Draw, Purpose, uniform};

    /// `n` draws of noise of variance 0.25 an element around the reference plus `bias`.
    fn draws(n: u32, len: usize, bias: f32, seed: u64) -> Statistics {
        let reference: Vec<f32> = (0..len).map(|i| if i % 3 == 0 { 2.0 } else { -1.0 }).collect();
        let mut moments = Moments::new(reference.clone());
        for k in 0..n {
            let random = Draw::of(seed, Purpose::Sampling, k, 0);
            let draw: Vec<f32> = (reference.iter().enumerate())
                .map(|(i, r)| {
                    let [a, b, ..] = random.bits(i as u32, 0);
                    r + bias + (0.75f64.sqrt() * (2.0 * uniform(a, b) - 1.0)) as f32
                })
                .collect();
            moments.push(&draw);
        }
        moments.statistics()
    }

    #[test]
    fn a_variance_and_no_bias_are_told_apart() {
        let s = draws(16, 6000, 0.0, 1);
        // |reference|^2 = 2 an element, the variance 0.25.
        assert!((s.variance - 0.125).abs() < 0.002, "{s:?}");
        assert!((s.bias_squared_uncorrected - 0.125 / 16.0).abs() < 0.001, "{s:?}");
        assert!(s.bias_squared.abs() < 4.0 * s.bias_squared_error, "{s:?}");
        assert!((s.cosine - (1.0f64 / 1.125).sqrt()).abs() < 0.002, "{s:?}");
        assert!((s.scale - 1.0).abs() < 0.005, "{s:?}");
    }

    #[test]
    fn a_bias_shows_through_the_noise() {
        let s = draws(16, 6000, 0.1, 1);
        assert!((s.bias_squared - 0.005).abs() < 4.0 * s.bias_squared_error + 1e-4, "{s:?}");
        assert!(s.bias_squared > 10.0 * s.bias_squared_error, "{s:?}");
    }

    /// The standard error is what estimates of other draws spread by.
    #[test]
    fn the_error_is_the_spread_of_estimates() {
        let all: Vec<_> = (0..200).map(|seed| draws(6, 300, 0.0, seed)).collect();
        let n = all.len() as f64;
        let mean = all.iter().map(|s| s.bias_squared).sum::<f64>() / n;
        let spread = (all.iter().map(|s| s.bias_squared.powi(2)).sum::<f64>() / n).sqrt();
        let said = (all.iter().map(|s| s.bias_squared_error.powi(2)).sum::<f64>() / n).sqrt();
        assert!(mean.abs() < 4.0 * spread / n.sqrt(), "mean {mean}, spread {spread}");
        assert!((said / spread - 1.0).abs() < 0.25, "said {said}, spread {spread}");
    }

    #[test]
    fn draws_that_are_all_the_same_have_no_variance() {
        let mut moments = Moments::new(vec![3.0, 4.0]);
        for _ in 0..3 {
            moments.push(&[3.3, 4.0]);
        }
        let s = moments.statistics();
        assert_eq!((s.norm, s.variance, s.bias_squared_error), (5.0, 0.0, 0.0));
        assert!((s.bias_squared - 0.09 / 25.0).abs() < 1e-8, "{s:?}");
    }
}
