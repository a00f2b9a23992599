//! Runs that differ by their optimizer, its settings and the learning rate alone, side by side.

use std::collections::{BTreeMap, BTreeSet};

use mxfp4train::Optimizer;
use serde::Serialize;
use serde_json::{Map, Value};

use super::runs::{Interval, Spread, words};
use crate::compare::record::{Recorded, Run, Settings};
use crate::table::Table;

/// What belongs to an optimizer, in the order in which a row names it.
const OF_OPTIMIZER: [&str; 8] =
    ["optimizer", "lr", "min_lr", "beta1", "beta2", "epsilon", "weight_decay", "clip"];

/// Runs of one recipe, model and text.
pub(crate) struct Comparison<'a> {
    recipe: String,
    /// Seed by seed: those of one optimizer with one set of settings.
    variants: Vec<Variant<'a>>,
}

struct Variant<'a> {
    /// Its optimizer, and those settings that others of this optimizer have otherwise.
    name: String,
    optimizer: String,
    runs: Vec<&'a Run>,
}

/// What the runs of a variant come to.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) variant: String,
    pub(crate) optimizer: String,
    /// Whether no other settings of its optimizer have a lower mean.
    pub(crate) is_best: bool,
    pub(crate) seeds: Vec<u64>,
    pub(crate) diverged: Vec<u64>,
    pub(crate) validation_loss: Option<Spread>,
    /// Less that of the best of AdamW with the same seed; none of this itself.
    pub(crate) difference: Option<Spread>,
    pub(crate) difference_interval: Option<Interval>,
    /// Median over the runs.
    pub(crate) tokens_per_second: f64,
}

/// A run's settings, and those of them that are its optimizer's.
fn parts(settings: &Settings) -> (Map<String, Value>, Map<String, Value>) {
    let mut all = settings.compared();
    all.remove("seed");
    all.entry("optimizer").or_insert_with(|| Optimizer::default().to_string().into());
    all.into_iter().partition(|(name, _)| !OF_OPTIMIZER.contains(&name.as_str()))
}

/// What there is to compare: wherever more than one optimizer, or more than one set of its settings,
/// was run with all else the same.
pub(crate) fn comparisons(runs: &[Recorded<Run>]) -> Vec<Comparison<'_>> {
    let mut groups: BTreeMap<String, BTreeMap<String, Vec<&Run>>> = BTreeMap::new();
    for run in runs {
        let (shared, own) = parts(&run.record.settings);
        let group = groups.entry(Value::Object(shared).to_string()).or_default();
        group.entry(Value::Object(own).to_string()).or_default().push(&run.record);
    }
    let compared = groups.into_values().filter(|variants| variants.len() > 1);
    compared.map(|variants| Comparison::of(variants.into_values().collect())).collect()
}

impl<'a> Comparison<'a> {
    fn of(variants: Vec<Vec<&'a Run>>) -> Self {
        let own = |runs: &[&Run]| parts(&runs[0].settings).1;
        let optimizer = |own: &Map<String, Value>| shown(&own["optimizer"]);
        let all: Vec<_> = variants.iter().map(|runs| own(runs)).collect();
        let varies = |name: &str, of: &str| {
            let same = all.iter().filter(|own| optimizer(own) == of);
            same.map(|own| own[name].to_string()).collect::<BTreeSet<_>>().len() > 1
        };
        let variants = variants.into_iter().zip(&all).map(|(mut runs, own)| {
            runs.sort_by_key(|run| run.settings.seed);
            let optimizer = optimizer(own);
            let differing = OF_OPTIMIZER[1..].iter().filter(|name| varies(name, &optimizer));
            // The rate that it falls to is a part of the rate, if nobody says otherwise.
            let differing =
                differing.filter(|name| **name != "min_lr" || !varies("lr", &optimizer));
            let named = differing.map(|name| format!("; {name} {}", shown(&own[*name])));
            Variant { name: format!("{optimizer}{}", named.collect::<String>()), optimizer, runs }
        });
        let variants: Vec<_> = variants.collect();
        Self { recipe: variants[0].runs[0].settings.recipe.clone(), variants }
    }

    pub(crate) fn title(&self) -> String {
        let s = &self.variants[0].runs[0].settings;
        format!(
            "Optimizers under {}: {} layers x {} channels, {} steps of {} tokens",
            self.recipe,
            s.layers,
            s.channels,
            s.steps,
            s.step_tokens()
        )
    }

    /// The best settings of each optimizer first, in the order of their losses, then all others.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let loss = |variant: &Variant<'_>| {
            let finished = variant.runs.iter().filter(|run| run.diverged.is_none());
            Spread::of(&finished.filter_map(|run| run.validation_loss).collect::<Vec<_>>())
        };
        // One that diverged with some seeds is behind all that did not, and of fewer seeds, whose
        // mean says less and is of others, behind those of more.
        let place = |variant: &Variant<'_>| {
            let diverged = variant.runs.iter().filter(|run| run.diverged.is_some()).count();
            let found = loss(variant);
            let missing = usize::MAX - found.map_or(0, |loss| loss.count);
            (diverged, missing, found.map_or(f64::INFINITY, |loss| loss.mean))
        };
        let best = |optimizer: &str| {
            let same = self.variants.iter().filter(|variant| variant.optimizer == optimizer);
            same.min_by(|a, b| {
                let (a, b) = (place(a), place(b));
                (a.0, a.1).cmp(&(b.0, b.1)).then(a.2.total_cmp(&b.2))
            })
        };
        let usual = best(&Optimizer::default().to_string());
        let mut rows: Vec<_> = self
            .variants
            .iter()
            .map(|variant| {
                let is_usual = usual.is_some_and(|usual| usual.name == variant.name);
                let pair = |run: &&&Run| {
                    let base = usual?.runs.iter().find(|b| b.settings.seed == run.settings.seed)?;
                    Some(run.validation_loss? - base.validation_loss?)
                };
                let finished =
                    variant.runs.iter().filter(|run| run.diverged.is_none() && !is_usual);
                let difference =
                    Spread::of(&finished.filter_map(|run| pair(&run)).collect::<Vec<_>>());
                let mut speeds: Vec<_> =
                    variant.runs.iter().map(|run| run.tokens_per_second).collect();
                speeds.sort_by(f64::total_cmp);
                let seeds = |diverged| {
                    let of =
                        variant.runs.iter().filter(move |run| run.diverged.is_some() == diverged);
                    of.map(|run| run.settings.seed).collect()
                };
                Row {
                    variant: variant.name.clone(),
                    optimizer: variant.optimizer.clone(),
                    is_best: best(&variant.optimizer).is_some_and(|best| best.name == variant.name),
                    seeds: seeds(false),
                    diverged: seeds(true),
                    validation_loss: loss(variant),
                    difference,
                    difference_interval: difference.and_then(|difference| difference.interval()),
                    tokens_per_second: speeds[speeds.len() / 2],
                }
            })
            .collect();
        // By differences where there are, which are of the same seeds.
        let usual = usual.map(|usual| usual.name.as_str());
        rows.sort_by(|a, b| {
            let place = |row: &Row| match row.difference {
                Some(difference) => (0, difference.mean),
                None if Some(row.variant.as_str()) == usual => (0, 0.0),
                None => (1, row.validation_loss.map_or(f64::INFINITY, |loss| loss.mean)),
            };
            let [(of_a, a_mean), (of_b, b_mean)] = [a, b].map(place);
            (b.is_best.cmp(&a.is_best))
                .then(a.diverged.len().cmp(&b.diverged.len()))
                .then(of_a.cmp(&of_b))
                .then(a_mean.total_cmp(&b_mean))
        });
        rows
    }

    pub(crate) fn table(rows: &[Row]) -> Table {
        let mut table = Table::new(
            1,
            [
                "optimizer",
                "best",
                "seeds",
                "validation loss",
                "less the best adamw",
                "95% interval",
                "tokens/s",
            ],
        );
        for row in rows {
            let seeds = row.seeds.len();
            table.row([
                row.variant.clone(),
                if row.is_best { "*" } else { "" }.into(),
                match row.diverged.len() {
                    0 => seeds.to_string(),
                    n => format!("{seeds} ({n} diverged)"),
                },
                words(row.validation_loss, seeds, false, 4),
                words(row.difference, seeds, true, 4),
                row.difference_interval.map_or_else(|| "-".into(), |interval| interval.in_words()),
                indicatif::HumanCount(row.tokens_per_second as u64).to_string(),
            ]);
        }
        table
    }
}

/// A text without its quotes, a number as it was given.
fn shown(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::super::runs::tests::recorded;
    use super::*;

    /// (optimizer, lr, seed, loss); none where it diverged.
    fn runs(all: &[(Option<&str>, f32, u64, Option<f64>)]) -> Vec<Recorded<Run>> {
        let one = |&(optimizer, lr, seed, loss): &(Option<&str>, f32, u64, Option<f64>)| {
            let mut run = recorded("bf16", seed, loss.unwrap_or(9.0), None);
            run.record.settings.optimizer = optimizer.map(str::to_owned);
            run.record.settings.lr = lr;
            if loss.is_none() {
                run.record.diverged = Some("NaN".into());
            }
            run
        };
        all.iter().map(one).collect()
    }

    #[test]
    fn each_optimizer_stands_by_its_best_settings() {
        let runs = runs(&[
            (None, 1e-3, 1, Some(3.0)),
            (None, 1e-3, 2, Some(3.2)),
            (None, 2e-3, 1, Some(3.5)),
            (None, 2e-3, 2, Some(3.5)),
            (Some("muon"), 1e-3, 1, Some(2.5)),
            (Some("muon"), 1e-3, 2, Some(2.9)),
            // Better where it did not diverge.
            (Some("muon"), 2e-3, 1, Some(1.0)),
            (Some("muon"), 2e-3, 2, None),
            // A lower mean of a seed that is easier.
            (Some("muon"), 3e-3, 2, Some(2.6)),
            (Some("gradstab"), 1e-3, 1, Some(3.75)),
        ]);
        let all = comparisons(&runs);
        assert_eq!(all.len(), 1);
        assert!(
            all[0].title().starts_with("Optimizers under bf16: 1 layers"),
            "{}",
            all[0].title()
        );
        let rows = all[0].rows();
        let names: Vec<_> = rows.iter().map(|row| (row.variant.as_str(), row.is_best)).collect();
        let expected = [
            ("muon; lr 0.001", true),
            ("adamw; lr 0.001", true),
            ("gradstab", true),
            ("muon; lr 0.003", false),
            ("adamw; lr 0.002", false),
            ("muon; lr 0.002", false),
        ];
        assert_eq!(names, expected);
        let difference = rows[0].difference.unwrap();
        assert!((difference.mean + 0.4).abs() < 1e-12 && difference.count == 2, "{difference:?}");
        assert!(rows[0].difference_interval.is_some() && rows[1].difference.is_none());
        assert!((rows[2].difference.unwrap().mean - 0.75).abs() < 1e-12);
        assert_eq!((&rows[5].seeds, &rows[5].diverged), (&vec![1], &vec![2]));
        let table = Comparison::table(&rows).text();
        assert!(table.contains("1 (1 diverged)") && table.contains("-0.4000 +- 0.1414"), "{table}");
    }

    #[test]
    fn one_optimizer_is_no_comparison() {
        assert!(
            comparisons(&runs(&[(None, 1e-3, 1, Some(3.0)), (None, 1e-3, 2, Some(3.0))]))
                .is_empty()
        );
    }
}
