//! Runs that can be compared, and what they say about each recipe.

use std::collections::BTreeMap;

use mxfp4train::Recipe;
use serde::Serialize;
use serde_json::{Map, Value};

use super::plot::Line;
use crate::compare::record::{Recorded, Run, Settings};
use crate::console;
use crate::failure::{Failure, Outcome};
use crate::table::Table;

/// What every recipe is compared with.
pub(crate) const BASE: &str = "bf16";
/// Curves are drawn from this part of a run on: before it, all losses fall from the same height.
const SHOWN_FROM: f64 = 0.1;

/// Runs that differ by recipe and seed alone.
pub(crate) struct Group {
    runs: Vec<Recorded<Run>>,
}

/// What the runs of a recipe say.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) recipe: String,
    /// Seeds of the runs that came to their end.
    pub(crate) seeds: Vec<u64>,
    /// Seeds and reasons of the others.
    pub(crate) diverged: Vec<(u64, String)>,
    pub(crate) train_loss: Option<Spread>,
    pub(crate) validation_loss: Option<Spread>,
    /// Validation loss less that of bf16 with the same seed.
    pub(crate) difference: Option<Spread>,
    /// What its mean lies in with a probability of 95%, by Student's t over the seeds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) difference_interval: Option<Interval>,
    /// The same in percent of bf16's loss.
    pub(crate) difference_percent: Option<Spread>,
    /// As `difference`, of the same weights by a forward pass in bf16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) difference_in_bf16: Option<Spread>,
    /// Whether some of its GEMMs were emulated, so that the next is not the speed of its formats;
    /// none where records do not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) emulated: Option<bool>,
    /// Median over the runs.
    pub(crate) tokens_per_second: f64,
    pub(crate) raised_blocks: u64,
    pub(crate) quantized_blocks: u64,
    /// None where records do not say, or runs were too short.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) spikes: Option<SpikesOfRuns>,
    /// None where records do not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) deviations: Option<Deviations>,
}

/// How the runs of a recipe stray from those of bf16.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Deviations {
    pub(crate) runs: usize,
    /// Runs whose smoothed loss is more than a tenth above the median of bf16's after a twentieth of
    /// the steps, or that diverged before; none where bf16 was not run.
    pub(crate) early: Option<usize>,
    /// The smoothed training loss at the end, less that of bf16 with the same seed; none of bf16
    /// itself, or without such a run.
    pub(crate) difference: Option<Spread>,
    /// After the last step, where it was measured.
    pub(crate) sharpness: Option<Spread>,
}

/// Of all runs of a recipe that were looked at, diverged ones too.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct SpikesOfRuns {
    pub(crate) runs: usize,
    pub(crate) steps: u64,
    /// Events in which the loss was a spike.
    pub(crate) loss: u64,
    /// Runs that have such.
    pub(crate) runs_with_loss: usize,
    /// The largest norm of a gradient, over the mean of those before it.
    pub(crate) norm_over_mean: f64,
}

impl SpikesOfRuns {
    fn of(runs: &[&Run]) -> Option<Self> {
        let looked_at = |run: &&&Run| run.spikes.as_ref().is_some_and(|found| found.steps > 0);
        let found: Vec<_> =
            runs.iter().filter(looked_at).filter_map(|run| run.spikes.as_ref()).collect();
        (!found.is_empty()).then(|| Self {
            runs: found.len(),
            steps: found.iter().fold(0, |sum, found| sum.saturating_add(found.steps)),
            loss: found.iter().map(|found| found.loss.len() as u64).sum(),
            runs_with_loss: found.iter().filter(|found| !found.loss.is_empty()).count(),
            norm_over_mean: found.iter().fold(0.0, |most, found| found.norm_over_mean.max(most)),
        })
    }
}

/// Mean and sample standard deviation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) count: usize,
    pub(crate) mean: f64,
    /// None for a single value.
    pub(crate) deviation: Option<f64>,
}

impl Spread {
    /// None where there are no values.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
        let deviation = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt());
        (!values.is_empty()).then_some(Self { count: values.len(), mean, deviation })
    }
}

impl Spread {
    /// What the mean of all seeds lies in with a probability of 95%, if values are normal; none of
    /// a single one, which says nothing of the others.
    pub(crate) fn interval(&self) -> Option<Interval> {
        let half = student_t(self.count - 1) * self.deviation? / (self.count as f64).sqrt();
        Some(Interval { from: self.mean - half, to: self.mean + half })
    }
}

/// Both its ends are in it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Interval {
    pub(crate) from: f64,
    pub(crate) to: f64,
}

impl Interval {
    pub(crate) fn in_words(&self) -> String {
        let Self { from, to } = self;
        format!("{from:+.4} to {to:+.4}")
    }

    fn contains(&self, value: f64) -> bool {
        self.from <= value && value <= self.to
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.from <= other.to && other.from <= self.to
    }
}

/// The 97.5% quantile of Student's t; that of 30 degrees of freedom, which is 2% too large for any
/// number, for more of them, and that of one for none.
fn student_t(degrees: usize) -> f64 {
    const QUANTILES: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
        2.052, 2.048, 2.045, 2.042,
    ];
    QUANTILES[degrees.clamp(1, QUANTILES.len()) - 1]
}

/// Sorts runs into groups, the longest runs of the largest models last.
pub(crate) fn groups(runs: Vec<Recorded<Run>>) -> Outcome<Vec<Group>> {
    let mut groups: BTreeMap<(u64, u64, String), Vec<Recorded<Run>>> = BTreeMap::new();
    for run in runs {
        let s = &run.record.settings;
        // A record can come from anyone.
        let size = s.channels.saturating_mul(s.channels).saturating_mul(s.layers) as u64;
        let key = Value::Object(without_run(s.compared())).to_string();
        groups.entry((size, s.steps.saturating_mul(s.step_tokens()), key)).or_default().push(run);
    }
    for runs in groups.values_mut() {
        runs.sort_by_key(|run| {
            let s = &run.record.settings;
            (order(&s.recipe), s.recipe.clone(), s.seed)
        });
        for pair in runs.windows(2) {
            let [a, b] = [&pair[0], &pair[1]].map(|run| &run.record.settings);
            if (&a.recipe, a.seed) == (&b.recipe, b.seed) {
                return Err(Failure::usage(format!(
                    "{} with seed {} is there twice with the same settings; name each record once",
                    a.recipe, a.seed
                )));
            }
        }
    }
    Ok(groups.into_values().map(|runs| Group { runs }).collect())
}

fn without_run(mut settings: Map<String, Value>) -> Map<String, Value> {
    settings.retain(|name, _| !["recipe", "seed"].contains(&name.as_str()));
    settings
}

/// The place of a recipe in tables: by name, switches after.
pub(crate) fn order(recipe: &str) -> usize {
    let name = recipe.split(',').next().unwrap_or_default();
    Recipe::NAMES.iter().position(|known| *known == name).unwrap_or(Recipe::NAMES.len())
}

impl Group {
    /// Settings of its runs, with the recipe and the seed of one of them.
    pub(crate) fn settings(&self) -> &Settings {
        &self.runs[0].record.settings
    }

    /// Settings without recipe and seed.
    pub(crate) fn shared_settings(&self) -> Map<String, Value> {
        without_run(self.settings().compared())
    }

    /// What distinguishes the group, in a line.
    pub(crate) fn title(&self) -> String {
        let s = self.settings();
        format!(
            "{} layers x {} channels x {} heads, sequences of {}, {} tokens in {} steps",
            s.layers,
            s.channels,
            s.heads,
            s.sequence_length,
            console::scaled(s.steps.saturating_mul(s.step_tokens())),
            s.steps,
        )
    }

    /// How the runs were made, in lines.
    pub(crate) fn about(&self) -> Vec<String> {
        let s = self.settings();
        let tokenizer =
            s.data.tokenizer.as_ref().map_or_else(String::new, |t| format!(", tokenizer {t}"));
        let drop = s.token_drop.as_ref().map(|drop| format!(", token drop {drop}"));
        let drop = drop.unwrap_or_default();
        let mut lines = vec![
            format!(
                "data {}: {} training tokens{tokenizer}, vocabulary {}, CRC-32 {}",
                s.data.name, s.data.train.tokens, s.vocab_size, s.data.train.crc32
            ),
            format!(
                "step of {} x {} x {} = {} tokens{drop}; {} schedule, lr {} to {}, warm-up {} steps",
                s.accumulation,
                s.batch_size,
                s.sequence_length,
                s.step_tokens(),
                s.schedule,
                console::short(s.lr),
                console::short(s.min_lr),
                s.warmup
            ),
            format!(
                "{}: beta {}, {}, weight decay {}, clip {}; measured every {} steps on {}",
                s.optimizer.as_deref().unwrap_or("AdamW"),
                s.beta1,
                s.beta2,
                s.weight_decay,
                s.clip,
                s.eval_every,
                match s.eval_batches {
                    0 => "all validation data".into(),
                    n => format!("{n} batches"),
                }
            ),
        ];
        let mut each = |what: &str, of: fn(&Recorded<Run>) -> String| {
            let mut all: Vec<_> = self.runs.iter().map(of).collect();
            all.sort();
            all.dedup();
            lines.push(format!("{what}: {}", all.join("; ")));
        };
        each("machine", |run| run.origin.machine.clone());
        each("program", |run| format!("{}, commit {}", run.origin.program, run.origin.commit));
        lines
    }

    /// A row for each recipe: what others are compared with, then by their difference from it, then
    /// those that have none.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let mut rows: Vec<_> = self.recipes().into_iter().map(|recipe| self.row(recipe)).collect();
        let place = |row: &Row| row.difference.map_or(f64::INFINITY, |difference| difference.mean);
        rows.sort_by(|a, b| {
            (b.recipe == BASE).cmp(&(a.recipe == BASE)).then(place(a).total_cmp(&place(b)))
        });
        rows
    }

    fn recipes(&self) -> Vec<&str> {
        let mut all: Vec<_> =
            self.runs.iter().map(|run| run.record.settings.recipe.as_str()).collect();
        all.dedup();
        all
    }

    fn of<'a>(&'a self, recipe: &'a str) -> impl Iterator<Item = &'a Run> {
        self.runs.iter().map(|run| &run.record).filter(move |run| run.settings.recipe == recipe)
    }

    fn row(&self, recipe: &str) -> Row {
        let runs: Vec<&Run> = self.of(recipe).collect();
        let finished: Vec<&Run> = runs.iter().copied().filter(|r| r.diverged.is_none()).collect();
        let spread = |of: fn(&Run) -> Option<f64>| {
            Spread::of(&finished.iter().filter_map(|run| of(run)).collect::<Vec<_>>())
        };
        // A loss of each run beside that of bf16 with the same seed.
        let difference = |loss: fn(&Run) -> Option<f64>, of: fn((f64, f64)) -> f64| {
            let pair = |run: &&Run| {
                let base = self.of(BASE).find(|base| base.settings.seed == run.settings.seed)?;
                Some(of((loss(run)?, loss(base)?)))
            };
            let runs = finished.iter().filter(|_| recipe != BASE);
            Spread::of(&runs.filter_map(pair).collect::<Vec<_>>())
        };
        let less = |(loss, base): (f64, f64)| loss - base;
        let less_bf16 = difference(|run| run.validation_loss, less);
        let total =
            |of: fn(&Run) -> u64| runs.iter().fold(0u64, |sum, run| sum.saturating_add(of(run)));
        let mut speeds: Vec<f64> = runs.iter().map(|run| run.tokens_per_second).collect();
        speeds.sort_by(f64::total_cmp);
        Row {
            recipe: recipe.into(),
            seeds: finished.iter().map(|run| run.settings.seed).collect(),
            diverged: (runs.iter())
                .filter_map(|run| Some((run.settings.seed, run.diverged.clone()?)))
                .collect(),
            train_loss: spread(|run| run.train_loss),
            validation_loss: spread(|run| run.validation_loss),
            difference: less_bf16,
            difference_interval: less_bf16.and_then(|difference| difference.interval()),
            difference_percent: difference(
                |run| run.validation_loss,
                |(loss, base)| 100.0 * (loss / base - 1.0),
            ),
            difference_in_bf16: difference(|run| run.validation_loss_in_bf16, less),
            emulated: (runs.iter())
                .filter_map(|run| Some(run.carriers.as_ref()?.iter().any(|gemm| gemm.emulated)))
                .max(),
            tokens_per_second: speeds[speeds.len() / 2],
            raised_blocks: total(|run| run.raised_blocks),
            quantized_blocks: total(|run| run.quantized_blocks),
            spikes: SpikesOfRuns::of(&runs),
            deviations: self.deviations(recipe, &runs),
        }
    }

    fn deviations(&self, recipe: &str, runs: &[&Run]) -> Option<Deviations> {
        let early = |run: &Run| run.deviation.and_then(|deviation| deviation.early_loss);
        let mut base: Vec<f64> = self.of(BASE).filter_map(early).collect();
        base.sort_by(f64::total_cmp);
        let known: Vec<_> = runs.iter().filter(|run| run.deviation.is_some()).collect();
        let above = |median: f64| {
            let is_above = |run: &&&&Run| early(run).is_none_or(|loss| loss > 1.1 * median);
            known.iter().filter(is_above).count()
        };
        let smoothed = |run: &Run| Some(run.deviation?.smoothed_loss);
        let pair = |run: &&&Run| {
            let base = self.of(BASE).find(|base| base.settings.seed == run.settings.seed)?;
            Some(smoothed(run)? - smoothed(base)?)
        };
        let finished = known.iter().filter(|run| run.diverged.is_none());
        let pairs = finished.clone().filter(|_| recipe != BASE).filter_map(pair);
        let last = finished.filter_map(|run| run.curve.last()?.sharpness);
        (!known.is_empty()).then(|| Deviations {
            runs: known.len(),
            early: base.get(base.len() / 2).map(|median| above(*median)),
            difference: Spread::of(&pairs.collect::<Vec<_>>()),
            sharpness: Spread::of(&last.collect::<Vec<_>>()),
        })
    }

    /// The table of its rows.
    pub(crate) fn table(rows: &[Row]) -> Table {
        let mut table = Table::new(
            1,
            [
                "recipe",
                "seeds",
                "train loss",
                "validation loss",
                "less bf16",
                "95% interval",
                "in percent",
                "evaluated in bf16, less bf16",
                "tokens/s",
                "raised blocks",
            ],
        );
        for row in rows {
            let seeds = match row.diverged.len() {
                0 => row.seeds.len().to_string(),
                n => format!("{} ({n} diverged)", row.seeds.len()),
            };
            let share = 100.0 * row.raised_blocks as f64 / row.quantized_blocks.max(1) as f64;
            table.row([
                row.recipe.clone(),
                seeds,
                words(row.train_loss, row.seeds.len(), false, 4),
                words(row.validation_loss, row.seeds.len(), false, 4),
                words(row.difference, row.seeds.len(), true, 4),
                row.difference_interval.map_or_else(|| "-".into(), |interval| interval.in_words()),
                words(row.difference_percent, row.seeds.len(), true, 2),
                words(row.difference_in_bf16, row.seeds.len(), true, 4),
                format!(
                    "{}{}",
                    indicatif::HumanCount(row.tokens_per_second as u64),
                    if row.emulated == Some(true) { " (emulated)" } else { "" }
                ),
                match (row.quantized_blocks, row.raised_blocks) {
                    (0, _) => "-".into(),
                    (_, 0) => "0".into(),
                    (_, raised) => format!("{raised} ({share:.2e} %)"),
                },
            ]);
        }
        table
    }

    /// The table of how runs stray; None where no record says.
    pub(crate) fn table_of_deviations(rows: &[Row]) -> Option<Table> {
        let mut table = Table::new(
            1,
            [
                "recipe",
                "runs",
                "smoothed train loss less bf16",
                "far above bf16 early",
                "sharpness",
            ],
        );
        let found: Vec<_> = rows.iter().filter_map(|row| Some((row, row.deviations?))).collect();
        for (row, found) in &found {
            table.row([
                row.recipe.clone(),
                found.runs.to_string(),
                words(found.difference, found.runs, true, 4),
                found.early.map_or_else(|| "-".into(), |early| early.to_string()),
                words(found.sharpness, found.runs, false, 3),
            ]);
        }
        (!found.is_empty()).then_some(table)
    }

    /// The table of spikes; None where no row has been looked at.
    pub(crate) fn table_of_spikes(rows: &[Row]) -> Option<Table> {
        let mut table = Table::new(
            1,
            ["recipe", "runs", "loss spikes", "runs with them", "largest norm / mean before"],
        );
        let found: Vec<_> = rows.iter().filter_map(|row| Some((row, row.spikes?))).collect();
        for (row, found) in &found {
            table.row([
                row.recipe.clone(),
                found.runs.to_string(),
                found.loss.to_string(),
                found.runs_with_loss.to_string(),
                format!("{:.2}", found.norm_over_mean),
            ]);
        }
        (!found.is_empty()).then_some(table)
    }

    /// What the seeds of these rows, in their order, cannot tell apart, in sentences.
    pub(crate) fn hidden_by_seeds(rows: &[Row]) -> Vec<String> {
        let measured: Vec<_> =
            rows.iter().filter_map(|row| Some((row, row.difference?.count))).collect();
        let single = measured.iter().filter(|(_, seeds)| *seeds == 1);
        let single: Vec<_> = single.map(|(row, _)| row.recipe.as_str()).collect();
        let mut sentences = Vec::new();
        if !single.is_empty() {
            sentences.push(format!(
                "One seed says nothing of how much of a difference is chance: {}.",
                single.join("; ")
            ));
        }
        let with_intervals: Vec<_> = (measured.iter())
            .filter_map(|(row, seeds)| Some((row, seeds, row.difference_interval?)))
            .collect();
        for (row, seeds, interval) in &with_intervals {
            if interval.contains(0.0) {
                sentences.push(format!(
                    "{}: the interval includes 0, so that {seeds} seeds cannot tell it from {BASE}.",
                    row.recipe
                ));
            }
        }
        for pair in with_intervals.windows(2) {
            let [(better, _, one), (worse, _, other)] = pair else { continue };
            if one.overlaps(other) {
                sentences.push(format!(
                    "{} and {}: their intervals overlap, so that the seeds hide which is better.",
                    better.recipe, worse.recipe
                ));
            }
        }
        sentences
    }

    /// The validation loss by tokens, a line for each recipe: the mean over its seeds.
    pub(crate) fn losses(&self) -> Vec<Line> {
        self.lines(at)
    }

    /// The difference from bf16 with the same seed by tokens; its spread over seeds as error bars.
    pub(crate) fn differences(&self) -> Vec<Line> {
        self.lines(|run, step| {
            let base = self.of(BASE).find(|base| base.settings.seed == run.settings.seed)?;
            Some(at(run, step)? - at(base, step)?)
        })
    }

    /// Tokens that the axis of tokens counts in, and its name.
    fn unit(&self) -> (f64, &'static str) {
        let s = self.settings();
        match s.steps.saturating_mul(s.step_tokens()) {
            10_000_000_000.. => (1e9, "tokens (billions)"),
            1_000_000.. => (1e6, "tokens (millions)"),
            _ => (1e3, "tokens (thousands)"),
        }
    }

    /// What the plots' axis of tokens is called.
    pub(crate) fn tokens(&self) -> &'static str {
        self.unit().1
    }

    fn lines(&self, value: impl Fn(&Run, u64) -> Option<f64>) -> Vec<Line> {
        let s = self.settings();
        let lines = self.recipes().into_iter().enumerate().map(|(look, recipe)| {
            let mut steps: Vec<u64> =
                self.of(recipe).flat_map(|run| run.curve.iter().map(|point| point.step)).collect();
            steps.sort_unstable();
            steps.dedup();
            let from = (SHOWN_FROM * s.steps as f64) as u64;
            let points = steps.into_iter().filter(|step| *step >= from).filter_map(|step| {
                let values: Vec<f64> = self.of(recipe).filter_map(|run| value(run, step)).collect();
                let spread = Spread::of(&values)?;
                let tokens = step.saturating_mul(s.step_tokens()) as f64 / self.unit().0;
                Some((tokens, spread.mean, spread.deviation.unwrap_or(0.0)))
            });
            Line { name: recipe.into(), points: points.collect(), look }
        });
        lines.filter(|line| !line.points.is_empty()).collect()
    }
}

/// The validation loss of a run after a step.
fn at(run: &Run, step: u64) -> Option<f64> {
    run.curve.iter().find(|point| point.step == step).map(|point| point.validation_loss)
}

/// A mean and its spread, and how many seeds it is of where that is not all `seeds`.
pub(crate) fn words(spread: Option<Spread>, seeds: usize, signed: bool, digits: usize) -> String {
    let Some(Spread { count, mean, deviation }) = spread else { return "-".into() };
    let mut text = if signed { format!("{mean:+.digits$}") } else { format!("{mean:.digits$}") };
    if let Some(deviation) = deviation {
        text.push_str(&format!(" +- {deviation:.digits$}"));
    }
    if count < seeds {
        text.push_str(&format!(" ({count} seeds)"));
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::compare::record::{Deviation, parse};
    use crate::spikes::Spikes;

    #[test]
    fn spreads_are_sample_deviations() {
        assert_eq!(Spread::of(&[]), None);
        let one = Spread { count: 1, mean: 3.0, deviation: None };
        assert_eq!(Spread::of(&[3.0]), Some(one));
        let three = Spread { count: 3, mean: 2.0, deviation: Some(1.0) };
        assert_eq!(Spread::of(&[1.0, 2.0, 3.0]), Some(three));
        assert_eq!(words(Some(three), 3, true, 2), "+2.00 +- 1.00");
        assert_eq!(words(Some(one), 2, false, 1), "3.0 (1 seeds)");
        assert_eq!(words(None, 2, false, 1), "-");
    }

    /// A run of 10 steps.
    pub(crate) fn recorded(
        recipe: &str,
        seed: u64,
        loss: f64,
        in_bf16: Option<f64>,
    ) -> Recorded<Run> {
        let data = json!({
            "name": "d", "tokenizer": null, "train": {"tokens": 99, "crc32": "0"},
            "validation": null
        });
        let mut run = json!({
            "kind": "run", "version": 1,
            "origin": {
                "program": "p", "commit": "c", "machine": "m", "date": "d", "command": []
            },
            "settings": {
                "recipe": recipe, "seed": seed, "layers": 1, "heads": 1, "channels": 8,
                "context": 8, "vocab_size": 9, "batch_size": 1, "sequence_length": 8,
                "accumulation": 1, "recompute": "nothing", "steps": 10, "lr": 0.1,
                "min_lr": 0.1, "warmup": 0, "schedule": "constant", "decay_steps": 0,
                "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.9, "epsilon": 1e-8, "clip": 0.0,
                "eval_every": 10, "eval_batches": 1, "data": data
            },
            "curve": [], "train_loss": loss, "validation_loss": loss, "diverged": null,
            "raised_blocks": 0, "quantized_blocks": 0, "tokens_per_second": 1.0, "seconds": 1.0
        });
        // What records of older programs do not have.
        if let Some(loss) = in_bf16 {
            run["validation_loss_in_bf16"] = json!(loss);
        }
        parse::<Run>(Path::new("f"), &run.to_string()).unwrap()
    }

    /// Runs that differ by recipe, seed and validation losses alone.
    fn group(runs: &[(&str, u64, f64, Option<f64>)]) -> Group {
        let runs = runs
            .iter()
            .map(|(recipe, seed, loss, in_bf16)| recorded(recipe, *seed, *loss, *in_bf16));
        let mut groups = groups(runs.collect()).unwrap();
        assert_eq!(groups.len(), 1);
        groups.remove(0)
    }

    #[test]
    fn rows_go_by_what_they_cost_with_the_interval_of_their_seeds() {
        let rows = group(&[
            ("mxfp4", 1, 3.5, Some(3.25)),
            ("mxfp4", 2, 3.7, Some(3.5)),
            ("mxfp4", 3, 3.6, Some(3.4)),
            ("nvfp4-sr", 1, 9.0, None),
            ("bf16", 1, 3.0, Some(3.0)),
            ("bf16", 2, 3.1, Some(3.1)),
            ("bf16", 3, 3.2, Some(3.2)),
            ("fp8", 1, 2.875, None),
            ("mxfp4-sr", 4, 1.0, None),
        ])
        .rows();
        let order: Vec<_> = rows.iter().map(|row| row.recipe.as_str()).collect();
        assert_eq!(order, ["bf16", "fp8", "mxfp4", "nvfp4-sr", "mxfp4-sr"]);
        assert!([&rows[0], &rows[4]].iter().all(|row| row.difference.is_none()));
        // One seed has a difference and no interval.
        assert_eq!(rows[1].difference.map(|d| d.mean), Some(-0.125));
        assert_eq!(rows[1].difference_interval, None);
        // Of +0.5, +0.6 and +0.4: deviation 0.1, t of two degrees of freedom 4.303.
        let Interval { from, to } = rows[2].difference_interval.unwrap();
        let half = 4.303 * 0.1 / 3f64.sqrt();
        assert!((from - (0.5 - half)).abs() < 1e-9 && (to - (0.5 + half)).abs() < 1e-9);
        assert!((rows[2].difference_in_bf16.unwrap().mean - 0.85 / 3.0).abs() < 1e-9);
        assert!(rows[1].difference_in_bf16.is_none());
    }

    #[test]
    fn spikes_are_those_of_all_runs_that_were_looked_at() {
        let mut group = group(&[
            ("bf16", 1, 3.0, None),
            ("bf16", 2, 3.0, None),
            ("fp8", 1, 3.0, None),
            ("mxfp4", 1, 3.0, None),
        ]);
        assert!(Group::table_of_spikes(&group.rows()).is_none());
        let spikes = |steps, loss: &[u64], norm_over_mean| {
            Some(Spikes { steps, loss: loss.to_vec(), norm_over_mean, norm_step: 1, updates: None })
        };
        group.runs[0].record.spikes = spikes(100, &[250, 270], 3.0);
        group.runs[1].record.spikes = spikes(50, &[], 4.5);
        // Too short for anything to be usual.
        group.runs[2].record.spikes = spikes(0, &[], 0.0);
        let rows = group.rows();
        let expected =
            SpikesOfRuns { runs: 2, steps: 150, loss: 2, runs_with_loss: 1, norm_over_mean: 4.5 };
        let found: Vec<_> = rows.iter().map(|row| row.spikes).collect();
        assert_eq!(found, [Some(expected), None, None]);
        let table = Group::table_of_spikes(&rows).unwrap().text();
        let row: Vec<_> = table.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!((row, table.lines().count()), (vec!["bf16", "2", "2", "1", "4.50"], 2));
    }

    #[test]
    fn runs_stray_by_their_smoothed_losses() {
        let mut group = group(&[
            ("bf16", 1, 3.0, None),
            ("bf16", 2, 3.0, None),
            ("bf16", 3, 3.0, None),
            ("fp8", 1, 3.0, None),
            ("fp8", 2, 3.0, None),
            ("mxfp4", 1, 3.0, None),
        ]);
        assert!(Group::table_of_deviations(&group.rows()).is_none());
        let set = |run: &mut Recorded<Run>, early_loss, smoothed_loss| {
            run.record.deviation = Some(Deviation { early_loss, smoothed_loss });
        };
        set(&mut group.runs[0], Some(5.0), 3.0);
        set(&mut group.runs[1], Some(9.0), 3.1);
        set(&mut group.runs[2], Some(4.0), 3.2);
        // A tenth above the median, and a little more; one that had diverged by then.
        set(&mut group.runs[3], Some(5.49), 3.25);
        set(&mut group.runs[4], Some(5.51), 3.25);
        set(&mut group.runs[5], None, 7.0);
        group.runs[5].record.diverged = Some("NaN".into());
        let rows = group.rows();
        let of = |recipe: &str| {
            rows.iter().find(|row| row.recipe == recipe).unwrap().deviations.unwrap()
        };
        assert_eq!(of("bf16").early, Some(1));
        assert_eq!((of("bf16").difference, of("bf16").runs), (None, 3));
        assert_eq!((of("fp8").early, of("mxfp4").early), (Some(1), Some(1)));
        let difference = of("fp8").difference.unwrap();
        assert!((difference.mean - 0.2).abs() < 1e-9 && difference.count == 2, "{difference:?}");
        assert_eq!(of("mxfp4").difference, None);
        let table = Group::table_of_deviations(&rows).unwrap().text();
        assert!(table.contains("fp8") && table.contains("+0.2000 +- 0.0707"), "{table}");
    }

    #[test]
    fn what_seeds_hide_is_said() {
        let of = |runs: &[(&str, u64, f64, Option<f64>)]| {
            let base = [("bf16", 1, 3.0, None), ("bf16", 2, 3.0, None)];
            Group::hidden_by_seeds(&group(&[&base, runs].concat()).rows())
        };
        let hidden = of(&[
            ("fp8", 1, 3.0, None),
            ("fp8", 2, 3.1, None),
            ("mxfp4", 1, 4.0, None),
            ("mxfp4", 2, 4.001, None),
            ("mxfp4-rht", 1, 4.01, None),
            ("mxfp4-rht", 2, 4.0, None),
            ("mxfp4-sr", 1, 6.0, None),
            ("mxfp4-sr", 2, 6.001, None),
            ("mxfp4-rht-sr", 2, 3.0, None),
        ]);
        let starts = [
            "One seed says nothing of how much of a difference is chance: mxfp4-rht-sr.",
            "fp8: the interval includes 0, so that 2 seeds cannot tell it from bf16.",
            "mxfp4 and mxfp4-rht: their intervals overlap",
        ];
        assert_eq!(hidden.len(), starts.len(), "{hidden:?}");
        assert!(hidden.iter().zip(starts).all(|(line, start)| line.starts_with(start)));
        assert!(of(&[("mxfp4", 1, 4.0, None), ("mxfp4", 2, 4.001, None)]).is_empty());
    }

    #[test]
    fn intervals_of_many_seeds_are_a_little_too_wide() {
        assert_eq!([1, 2, 30, 31, 1000].map(student_t), [12.706, 4.303, 2.042, 2.042, 2.042]);
    }

    #[test]
    fn recipes_stand_in_the_order_of_the_library() {
        assert!(order("bf16") < order("mxfp4") && order("mxfp4") < order("mxfp4-rht-sr,g=128"));
        assert_eq!(order("mxfp4-rht-sr"), order("mxfp4-rht-sr,g=128"));
    }
}
