//! Initial weights, drawn from the seed: the same on every backend and any number of threads.

use rayon::prelude::*;

use super::params::Init;
use crate::mx::{Draw, Purpose, uniform};

/// Values that one job draws. Even, for a call of the generator makes two.
const JOB: usize = 1 << 16;

/// Fills `values` with the initial values of parameter number `index`, on the threads of the pool
/// that it is called on.
pub(super) fn fill(values: &mut [f32], init: Init, seed: u64, index: usize) {
    let std = match init {
        Init::Zeros => return values.fill(0.0),
        Init::Ones => return values.fill(1.0),
        Init::Normal { std } => std,
    };
    let draw = Draw::of(seed, Purpose::Weights, index as u32, 0);
    let jobs = values.par_chunks_mut(JOB).enumerate();
    jobs.for_each(|(i, part)| normal(part, std, &draw, (i * JOB / 2) as u32));
}

/// Normal values by Box and Muller's method, two for each counter from `first` on.
fn normal(values: &mut [f32], std: f32, draw: &Draw, first: u32) {
    for (i, pair) in values.chunks_mut(2).enumerate() {
        let [a, b, c, d] = draw.bits(first + i as u32, 0);
        // 1 - u lies in (0, 1], so the logarithm is finite.
        let radius = (-2.0 * (1.0 - uniform(a, b)).ln()).sqrt();
        let (sin, cos) = (2.0 * std::f64::consts::PI * uniform(c, d)).sin_cos();
        for (value, part) in pair.iter_mut().zip([cos, sin]) {
            *value = (radius * part * f64::from(std)) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(threads: usize, index: usize) -> Vec<f32> {
        let mut values = vec![0.0; 200_001];
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| fill(&mut values, Init::Normal { std: 0.02 }, 1, index));
        values
    }

    #[test]
    fn moments_are_those_of_the_normal_distribution() {
        let values = filled(2, 0);
        let moment = |p: i32| {
            values.iter().map(|v| (f64::from(*v) / 0.02).powi(p)).sum::<f64>() / values.len() as f64
        };
        for (power, expected, slack) in
            [(1, 0.0, 0.01), (2, 1.0, 0.01), (3, 0.0, 0.03), (4, 3.0, 0.1)]
        {
            assert!((moment(power) - expected).abs() < slack, "moment {power}: {}", moment(power));
        }
    }

    #[test]
    fn threads_do_not_matter_and_parameters_differ() {
        assert_eq!(filled(1, 3), filled(3, 3));
        assert_ne!(filled(1, 3)[..8], filled(1, 4)[..8]);
    }
}
