//! `mxtrain compare variance`: the variance of an unbiased MXFP4 product by its reduction length,
//! with and without the transform: Figure 2 of the paper, as a table.
//!
//! Inputs are N(0, 1) with some outliers. The products are those of the library's scalar
//! definition, which every device computes.

use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use mxfp4train::formats::{
    Draw, GemmId, MAX_GROUP, Mxfp4Matrix, OperandId, Purpose, Random, Rounding, Source,
    fill_normal, product_scale,
};
use serde::{Deserialize, Serialize};

use super::cli::VarianceArgs;
use super::record::{self, Origin, Record};
use crate::console;
use crate::failure::{Failure, Outcome};

/// Variances by reduction length.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Variances {
    pub(crate) settings: VarianceSettings,
    pub(crate) rows: Vec<VarianceRow>,
}

/// What they are of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VarianceSettings {
    /// Part of the entries that are outliers.
    pub(crate) outlier_share: f64,
    /// Their standard deviation; that of the others is 1.
    pub(crate) outlier_deviation: f64,
    /// Pairs of matrices, of `vectors` vectors each.
    pub(crate) inputs: usize,
    pub(crate) vectors: usize,
    /// Products of each pair with other random bits.
    pub(crate) draws: u32,
    pub(crate) seed: u64,
}

/// The variance at one reduction length.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct VarianceRow {
    pub(crate) length: usize,
    /// Group of the transform; none without one.
    pub(crate) group: Option<usize>,
    /// Mean over the entries of the products of the variance over draws.
    pub(crate) variance: f64,
    /// Its standard error, from the spread over pairs.
    pub(crate) variance_error: f64,
    /// Mean square of how many standard errors the mean over draws is off from the exact product: 1
    /// where there is no bias.
    pub(crate) bias_in_errors: f64,
}

impl Record for Variances {
    const KIND: &'static str = "variance";
    const VERSION: u32 = 1;
}

/// Vectors of a matrix: few, for they are what one pair's entries have in common.
const VECTORS: usize = 4;
/// One entry in this many is an outlier.
const OUTLIER_EVERY: u32 = 100;

/// Runs the command.
pub(crate) fn run(args: &VarianceArgs) -> Outcome<ExitCode> {
    args.seed.say_if_drawn();
    if args.draws < 2 || args.inputs < 2 {
        return Err(Failure::usage("--draws, --inputs: expected at least 2 of each"));
    }
    if args.lengths.contains(&0) {
        return Err(Failure::usage("--lengths: expected numbers from 1 on, got 0"));
    }
    for &group in &args.groups {
        if !(32..=MAX_GROUP).contains(&group) || !group.is_power_of_two() {
            return Err(Failure::usage(format!(
                "--groups: expected 32, 64, 128 or 256, got {group}"
            )));
        }
    }
    let settings = VarianceSettings {
        outlier_share: 1.0 / f64::from(OUTLIER_EVERY),
        outlier_deviation: args.outliers,
        inputs: args.inputs,
        vectors: VECTORS,
        draws: args.draws,
        seed: args.seed.number(),
    };
    let groups: Vec<_> = [None].into_iter().chain(args.groups.iter().copied().map(Some)).collect();
    let mut rows = Vec::new();
    for &length in &args.lengths {
        // A group longer than that would be filled up with zeros, and be measured instead.
        let groups: Vec<_> =
            groups.iter().copied().filter(|g| g.is_none_or(|g| g <= length)).collect();
        let of_length = at_length(&settings, length, &groups);
        let words = of_length.iter().map(|row| {
            let what = row.group.map_or_else(|| "without".into(), |group| format!("g={group}"));
            format!("{what} {:.2} +- {:.2}", row.variance, row.variance_error)
        });
        console::print(&format!("{length}: {}\n", words.collect::<Vec<_>>().join(", ")))?;
        rows.extend(of_length);
    }
    let record = Variances { settings, rows };
    record::write(&args.out, Origin::here("scalar definition on the CPU"), record)?;
    console::print(&format!("{}\n", console::shown(&args.out)))?;
    Ok(ExitCode::SUCCESS)
}

/// The variances at one reduction length; all groups see the same inputs.
fn at_length(
    settings: &VarianceSettings,
    length: usize,
    groups: &[Option<usize>],
) -> Vec<VarianceRow> {
    let inputs = settings.inputs;
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let job = next.fetch_add(1, Ordering::Relaxed);
            let Some(&group) = groups.get(job / inputs) else { return done };
            done.push((job, of_pair(settings, length, group, job % inputs)));
        }
    };
    let mut pairs: Vec<(usize, [f64; 2])> = thread::scope(|scope| {
        let threads = thread::available_parallelism().map_or(1, |n| n.get());
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|w| w.join().expect("products do not panic")).collect()
    });
    pairs.sort_by_key(|(job, _)| *job);
    groups
        .iter()
        .zip(pairs.chunks(inputs))
        .map(|(&group, pairs)| {
            let n = inputs as f64;
            let mean = |i: usize| pairs.iter().map(|(_, pair)| pair[i]).sum::<f64>() / n;
            let variance = mean(0);
            let spread = pairs.iter().map(|(_, pair)| (pair[0] - variance).powi(2)).sum::<f64>();
            let variance_error = (spread / (n - 1.0) / n).sqrt();
            VarianceRow { length, group, variance, variance_error, bias_in_errors: mean(1) }
        })
        .collect()
}

/// Means over the entries of one pair's product: of the variance, and of the squared distance of
/// the mean from the exact entry in standard errors.
fn of_pair(
    settings: &VarianceSettings,
    length: usize,
    group: Option<usize>,
    input: usize,
) -> [f64; 2] {
    let VarianceSettings { draws, seed, .. } = *settings;
    let [a, b] = [0, 1].map(|side| {
        let draw = Draw::of(seed, Purpose::Weights, length as u32, (2 * input + side) as u32);
        normal(&draw, VECTORS * length, settings.outlier_deviation)
    });
    let mut exact = Vec::new();
    for x in a.chunks(length) {
        for y in b.chunks(length) {
            let products = x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y));
            exact.push(products.sum::<f64>());
        }
    }
    let mut signs = vec![0.0; group.unwrap_or(0)];
    // Differences from the exact entry, so that nothing cancels.
    let (mut sums, mut squares) = (vec![0.0; exact.len()], vec![0.0; exact.len()]);
    let scale = f64::from(product_scale(Rounding::Unbiased, Rounding::Unbiased));
    for step in 0..draws {
        let random = Random { seed, step, micro_step: input as u32, layer: 0, linear: 0 };
        random.signs(GemmId::Wgrad).fill_signs(&mut signs);
        let quantize = |data, operand| {
            let source = Source { data, rows: VECTORS, depth: length, transposed: false };
            Mxfp4Matrix::quantize(source, &signs, Rounding::Unbiased, &random.rounding(operand))
        };
        let product = quantize(&a, OperandId::Dy).product(&quantize(&b, OperandId::X));
        for (i, entry) in product.into_iter().enumerate() {
            let d = f64::from(entry) * scale - exact[i];
            sums[i] += d;
            squares[i] += d * d;
        }
    }
    let n = f64::from(draws);
    let moments = sums.iter().zip(&squares).map(|(sum, square)| {
        let variance = ((square - sum * sum / n) / (n - 1.0)).max(0.0);
        (variance, (sum / n).powi(2) / (variance / n))
    });
    let moments: Vec<_> = moments.collect();
    // Of few draws, all of an entry may be one number, which says nothing of its error.
    let distances: Vec<_> =
        moments.iter().filter(|(variance, _)| *variance > 0.0).map(|(_, d)| *d).collect();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let variances: Vec<_> = moments.iter().map(|(variance, _)| *variance).collect();
    [mean(&variances), mean(&distances)]
}

/// N(0, 1), with one entry in [`OUTLIER_EVERY`] of N(0, `outlier`^2).
fn normal(draw: &Draw, len: usize, outlier: f64) -> Vec<f32> {
    let mut values = vec![0.0; len];
    fill_normal(&mut values, 1.0, draw, 0);
    for (value, i) in values.iter_mut().zip(0..) {
        if draw.bits(i, 1)[0].is_multiple_of(OUTLIER_EVERY) {
            *value *= outlier as f32;
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_transform_lowers_the_variance_and_keeps_the_mean() {
        let settings = VarianceSettings {
            outlier_share: 0.01,
            outlier_deviation: 5.0,
            inputs: 8,
            vectors: VECTORS,
            draws: 64,
            seed: 3,
        };
        let rows = at_length(&settings, 512, &[None, Some(64)]);
        let [without, with] = [rows[0], rows[1]];
        assert!(with.variance < 0.8 * without.variance, "{rows:?}");
        assert!(rows.iter().all(|row| (row.bias_in_errors - 1.0).abs() < 0.5), "{rows:?}");
        let longer = at_length(&settings, 1024, &[None]);
        assert!(longer[0].variance > 1.5 * without.variance, "{longer:?}");
        // The seed alone decides.
        assert_eq!(at_length(&settings, 512, &[Some(64)])[0].variance, with.variance);
    }
}
