//! Tables of gradient statistics and of variances.

use std::collections::BTreeSet;

use super::plot::Line;
use crate::compare::gradients::CheckpointGradients;
use crate::compare::moments::Statistics;
use crate::compare::variance::{VarianceRow, Variances};
use crate::table::Table;

/// Standard errors within which a bias counts as noise.
const NOISE: f64 = 3.0;

/// A row for each quantity and recipe of a checkpoint, means over its blocks.
pub(crate) fn gradients(checkpoint: &CheckpointGradients) -> Table {
    let mut table = Table::new(
        2,
        [
            "gradient",
            "recipe",
            "draws",
            "relative bias",
            "relative variance",
            "signal to noise",
            "cosine",
        ],
    );
    for quantity in checkpoint.quantities() {
        for recipe in &checkpoint.recipes {
            let mut cells =
                vec![quantity.name().to_owned(), recipe.recipe.clone(), recipe.draws.to_string()];
            match recipe.mean(quantity) {
                None => cells.extend(["-"; 4].map(String::from)),
                Some(mean) => cells.extend([
                    bias(&mean),
                    format!("{:.2e}", mean.variance),
                    signal_to_noise_of(mean.variance),
                    format!("{:.4}", mean.cosine),
                ]),
            }
            table.row(cells);
        }
    }
    table
}

/// A row for each quantity and recipe that has noise: how far the gradient of each block stands
/// above it, in dB.
pub(crate) fn signal_to_noise(checkpoint: &CheckpointGradients) -> Table {
    // Those that there are: a record can come from anyone and say that there are any number of
    // layers.
    let tensors = checkpoint.recipes.iter().flat_map(|recipe| &recipe.tensors);
    let blocks: BTreeSet<usize> = tensors.filter_map(|tensor| tensor.block).collect();
    let header = ["gradient", "recipe"].map(String::from);
    let names = blocks.iter().map(|block| format!("block {block}"));
    let mut table = Table::new(2, header.into_iter().chain(names));
    for quantity in checkpoint.quantities() {
        for recipe in &checkpoint.recipes {
            let of_block = |&block| {
                let mut tensors = recipe.tensors.iter().filter(|t| t.quantity == quantity);
                tensors.find(|t| t.block == Some(block)).map(|t| t.statistics.variance)
            };
            let variances: Vec<_> = blocks.iter().map(of_block).collect();
            if variances.iter().any(|v| v.is_some_and(|v| v > 0.0)) {
                let cells = variances.iter().map(|v| v.map_or_else(|| "-".into(), decibels));
                let names = [quantity.name().to_owned(), recipe.recipe.clone()];
                table.row(names.into_iter().chain(cells));
            }
        }
    }
    table
}

/// The bias in percent of the reference's norm, or what it is surely below where it is not more
/// than noise.
fn bias(s: &Statistics) -> String {
    let noise = NOISE * s.bias_squared_error;
    if s.bias_squared > noise || noise == 0.0 {
        format!("{:.2} %", 100.0 * s.bias_squared.max(0.0).sqrt())
    } else {
        format!("< {:.2} %", 100.0 * (s.bias_squared.max(0.0) + noise).sqrt())
    }
}

/// How far the gradient stands above the noise of its rounding.
fn signal_to_noise_of(variance: f64) -> String {
    if variance > 0.0 { format!("{} dB", decibels(variance)) } else { "no noise".into() }
}

fn decibels(variance: f64) -> String {
    format!("{:.1}", -10.0 * variance.log10())
}

/// A row for each reduction length.
pub(crate) fn variances(record: &Variances) -> Table {
    let groups = groups(record);
    let names = groups.iter().map(|group| name(*group));
    let ratio = groups.iter().flatten().next().map(|group| format!("without / g={group}"));
    let header = ["reduction length".to_owned()].into_iter().chain(names).chain(ratio.clone());
    let mut table = Table::new(0, header);
    let mut lengths: Vec<usize> = record.rows.iter().map(|row| row.length).collect();
    lengths.dedup();
    for length in lengths {
        let at = |group: Option<usize>| {
            record.rows.iter().find(|row| row.length == length && row.group == group)
        };
        let cell = |row: Option<&VarianceRow>| {
            row.map_or_else(
                || "-".into(),
                |row| format!("{:.1} +- {:.1}", row.variance, row.variance_error),
            )
        };
        let cells = groups.iter().map(|group| cell(at(*group)));
        let first = groups.iter().copied().find(Option::is_some).flatten();
        let ratio = ratio.is_some().then(|| match (at(None), at(first)) {
            (Some(without), Some(with)) => format!("{:.2}", without.variance / with.variance),
            _ => "-".into(),
        });
        table.row([length.to_string()].into_iter().chain(cells).chain(ratio));
    }
    table
}

/// A line for each group.
pub(crate) fn variance_lines(record: &Variances) -> Vec<Line> {
    let lines = groups(record).into_iter().enumerate().map(|(look, group)| {
        let rows = record.rows.iter().filter(|row| row.group == group);
        let points = rows.map(|row| (row.length as f64, row.variance, row.variance_error));
        Line { name: name(group), points: points.collect(), look }
    });
    lines.collect()
}

fn groups(record: &Variances) -> Vec<Option<usize>> {
    let mut groups: Vec<_> = record.rows.iter().map(|row| row.group).collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

fn name(group: Option<usize>) -> String {
    group.map_or_else(|| "without transform".into(), |group| format!("g={group}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_within_noise_is_a_bound() {
        let s = |bias_squared, bias_squared_error| Statistics {
            norm: 1.0,
            bias_squared,
            bias_squared_error,
            bias_squared_uncorrected: 0.0,
            variance: 0.01,
            cosine: 1.0,
            scale: 1.0,
        };
        assert_eq!(bias(&s(0.04, 0.0001)), "20.00 %");
        assert_eq!(bias(&s(0.0001, 0.0001)), "< 2.00 %");
        assert_eq!(bias(&s(-0.0001, 0.0003)), "< 3.00 %");
        assert_eq!(bias(&s(0.0, 0.0)), "0.00 %");
        assert_eq!(signal_to_noise_of(0.01), "20.0 dB");
        assert_eq!(signal_to_noise_of(0.0), "no noise");
    }
}
