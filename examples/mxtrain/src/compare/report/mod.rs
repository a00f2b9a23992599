//! `mxtrain compare report`: tables and plots from records.
//!
//! Runs stand in one table only where they differ by nothing but recipe and seed, or but optimizer,
//! its settings and seed. Whatever was not
//! understood is named, in the report too.

mod optimizers;
mod plot;
mod runs;
mod tables;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;
use serde_json::{Map, Value};

use super::cli::ReportArgs;
use super::gradients::{Gradients, Quantity};
use super::moments::Statistics;
use super::record::{self, Record, Recorded, Run};
use super::variance::Variances;
use crate::console;
use crate::failure::{Failure, Outcome};
use crate::files;
use crate::table::Table;
use crate::tokens_file::write_whole;
use optimizers::Comparison;
use plot::Axes;
use runs::{BASE, Group, Row};

/// The kind of the file that the report itself writes.
const KIND: &str = "report";
const VERSION: u32 = 1;

/// Runs the command.
pub(crate) fn run(args: &ReportArgs) -> Outcome<ExitCode> {
    let records = Records::read(&args.inputs)?;
    if records.is_empty() {
        return Err(Failure::usage(format!(
            "expected records of `mxtrain compare`, found none{}",
            records.left_out.iter().map(|why| format!("; {why}")).collect::<String>()
        )));
    }
    fs::create_dir_all(&args.out).map_err(Failure::io("create", &args.out))?;
    let mut report = Report { out: &args.out, text: String::new(), markdown: String::new() };
    let summary = report.all(records)?;
    let mut json = serde_json::to_string(&summary).expect("plain data becomes JSON");
    json.push('\n');
    write_whole(&args.out.join("compare.json"), json.as_bytes())?;
    write_whole(&args.out.join("compare.md"), report.markdown.as_bytes())?;
    console::print(&report.text)?;
    Ok(ExitCode::SUCCESS)
}

/// All that was found.
#[derive(Default)]
struct Records {
    runs: Vec<Recorded<Run>>,
    gradients: Vec<Recorded<Gradients>>,
    variances: Vec<Recorded<Variances>>,
    /// What is no record, or of a version that is not known, and why.
    left_out: Vec<String>,
}

impl Records {
    /// Reads files, and those in folders that end in .json or .jsonl.
    fn read(inputs: &[PathBuf]) -> Outcome<Self> {
        let mut all = Self::default();
        for input in inputs {
            if !input.is_dir() {
                all.add(input)?;
                continue;
            }
            let entries = fs::read_dir(input).map_err(Failure::io("read", input))?;
            let mut files = entries
                .map(|entry| entry.map(|entry| entry.path()))
                .collect::<std::io::Result<Vec<_>>>()
                .map_err(Failure::io("read", input))?;
            let is_json =
                |path: &Path| path.extension().is_some_and(|e| e == "json" || e == "jsonl");
            files.retain(|path| is_json(path) && path.is_file());
            files.sort();
            files.iter().try_for_each(|file| all.add(file))?;
        }
        Ok(all)
    }

    fn add(&mut self, path: &Path) -> Outcome {
        let text = files::read_text(path).map_err(Failure::io("read", path))?;
        for (place, text) in record::each(path, &text) {
            if let Err(why) = self.add_record(&place, text) {
                self.left_out.push(why.message);
            }
        }
        Ok(())
    }

    fn add_record(&mut self, place: &Path, text: &str) -> Outcome {
        match record::kind_of(place, text)?.0.as_str() {
            Run::KIND => self.runs.push(record::parse(place, text)?),
            Gradients::KIND => self.gradients.push(record::parse(place, text)?),
            Variances::KIND => self.variances.push(record::parse(place, text)?),
            KIND => {}
            kind => {
                return Err(Failure::usage(format!(
                    "{}: a record of kind {kind:?}, which is not known",
                    place.display()
                )));
            }
        }
        Ok(())
    }

    fn is_empty(&self) -> bool {
        self.runs.is_empty() && self.gradients.is_empty() && self.variances.is_empty()
    }
}

/// The report for programs.
#[derive(Serialize)]
struct Summary {
    kind: &'static str,
    version: u32,
    groups: Vec<GroupSummary>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    optimizers: Vec<OptimizersSummary>,
    gradients: Vec<CheckpointSummary>,
    variances: Vec<Variances>,
    left_out: Vec<String>,
}

#[derive(Serialize)]
struct OptimizersSummary {
    title: String,
    rows: Vec<optimizers::Row>,
}

#[derive(Serialize)]
struct GroupSummary {
    title: String,
    settings: Map<String, Value>,
    rows: Vec<Row>,
}

/// Means over the blocks of a checkpoint.
#[derive(Serialize)]
struct CheckpointSummary {
    name: String,
    rows: Vec<QuantitySummary>,
}

#[derive(Serialize)]
struct QuantitySummary {
    quantity: Quantity,
    recipe: String,
    draws: usize,
    /// None where the gradient is zero.
    mean: Option<Statistics>,
}

/// The report for people, as it grows.
struct Report<'a> {
    out: &'a Path,
    text: String,
    markdown: String,
}

impl Report<'_> {
    fn all(&mut self, records: Records) -> Outcome<Summary> {
        self.markdown.push_str("# What each recipe costs\n");
        let optimizers = optimizers::comparisons(&records.runs);
        let optimizers = optimizers.iter().map(|of| self.optimizers(of)).collect();
        let mut groups = Vec::new();
        for (index, group) in runs::groups(records.runs)?.iter().enumerate() {
            groups.push(self.group(group, index)?);
        }
        let mut gradients = Vec::new();
        for record in &records.gradients {
            gradients.extend(self.gradients(&record.record));
        }
        for (index, record) in records.variances.iter().enumerate() {
            self.variances(&record.record, index)?;
        }
        if !records.left_out.is_empty() {
            self.heading("Left out");
            self.list(&records.left_out);
        }
        Ok(Summary {
            kind: KIND,
            version: VERSION,
            groups,
            optimizers,
            gradients,
            variances: records.variances.into_iter().map(|r| r.record).collect(),
            left_out: records.left_out,
        })
    }

    fn optimizers(&mut self, comparison: &Comparison<'_>) -> OptimizersSummary {
        let (title, rows) = (comparison.title(), comparison.rows());
        self.heading(&title);
        self.table(&Comparison::table(&rows));
        self.note(
            "Losses in nats a token after the last step; means over seeds, +- their sample standard \
             deviation. Differences are from adamw with the same seed, at those of its settings whose \
             mean is lowest, and their means lie in the interval by Student's t. *: of each optimizer \
             the settings with the lowest mean, of those with the fewest diverged runs and the most \
             seeds.",
        );
        OptimizersSummary { title, rows }
    }

    fn group(&mut self, group: &Group, index: usize) -> Outcome<GroupSummary> {
        self.heading(&group.title());
        self.list(&group.about());
        let rows = group.rows();
        self.table(&Group::table(&rows));
        self.note(
            "Losses in nats a token: training over the last twentieth of the steps, validation after \
             the last. Means over seeds, +- their sample standard deviation; differences are from \
             bf16 with the same seed, in the order of their means, which lie in the interval by \
             Student's t. What is evaluated in bf16 is the same weights, whatever they were trained \
             by.",
        );
        self.list(&Group::hidden_by_seeds(&rows));
        if let Some(table) = Group::table_of_spikes(&rows) {
            self.table(&table);
            self.note(
                "Spikes of the training loss: above the mean of the 200 steps before by more than \
                 3.2 of their standard deviations, within ten steps of another the same one; of \
                 all runs, but for the warm-up and the 200 steps behind it. One run proves nothing: \
                 bf16 has spikes, too.",
            );
        }
        if let Some(table) = Group::table_of_deviations(&rows) {
            self.table(&table);
            self.note(
                "Smoothed: a mean of the training loss that decays by 0.99 a step, at the end, less \
                 that of bf16 with the same seed. Far above early: runs with one that is more than a \
                 tenth above the median of bf16's after a twentieth of the steps, or that diverged \
                 before. Sharpness of the validation loss in the logits, where it was measured.",
            );
        }
        for row in &rows {
            let reasons: Vec<_> = (row.diverged.iter())
                .map(|(seed, why)| format!("{} with seed {seed} diverged: {why}", row.recipe))
                .collect();
            self.list(&reasons);
        }
        let x = group.tokens();
        let y = "validation loss (nats a token)";
        self.plot("validation-loss", index, &group.losses(), &Axes { x, y, logarithmic: false })?;
        let differences = group.differences();
        if differences.iter().any(|line| line.name != BASE) {
            let y = "validation loss less that of bf16 (nats a token)";
            self.plot("difference", index, &differences, &Axes { x, y, logarithmic: false })?;
        }
        Ok(GroupSummary { title: group.title(), settings: group.shared_settings(), rows })
    }

    fn gradients(&mut self, record: &Gradients) -> Vec<CheckpointSummary> {
        let of_checkpoint = |checkpoint: &super::gradients::CheckpointGradients| {
            self.heading(&format!("Gradients at {}", checkpoint.name));
            self.table(&tables::gradients(checkpoint));
            self.note(&format!(
                "Against the gradient of {} on {} sequences of {} training tokens (dx of the model's \
                 input: on the first of them); means over {} blocks. Bias is |E g - reference|, \
                 corrected for the number of draws; below three standard errors a bound is given. \
                 Variance is E |g - E g|^2. Both are relative to the reference's norm or its square.",
                record.reference, record.batch_size, record.sequence_length, checkpoint.layers
            ));
            self.table(&tables::signal_to_noise(checkpoint));
            self.note("The signal to noise of each block, in dB; recipes without random bits have no noise.");
            let rows = checkpoint.quantities().into_iter().flat_map(|quantity| {
                checkpoint.recipes.iter().map(move |recipe| QuantitySummary {
                    quantity,
                    recipe: recipe.recipe.clone(),
                    draws: recipe.draws,
                    mean: recipe.mean(quantity),
                })
            });
            CheckpointSummary { name: checkpoint.name.clone(), rows: rows.collect() }
        };
        record.checkpoints.iter().map(of_checkpoint).collect()
    }

    fn variances(&mut self, record: &Variances, index: usize) -> Outcome {
        let s = &record.settings;
        self.heading("Variance of the unbiased product");
        self.table(&tables::variances(record));
        self.note(&format!(
            "Mean over the entries of {} products of matrices of {} vectors, over {} draws of each, +- \
             standard error. Inputs are N(0, 1) with {} % outliers of standard deviation {}.",
            s.inputs,
            s.vectors,
            s.draws,
            100.0 * s.outlier_share,
            s.outlier_deviation
        ));
        let (x, y) = ("reduction length", "variance of an entry");
        let axes = Axes { x, y, logarithmic: true };
        self.plot("variance", index, &tables::variance_lines(record), &axes)
    }

    fn heading(&mut self, title: &str) {
        self.text.push_str(&format!("\n{title}\n"));
        self.markdown.push_str(&format!("\n## {title}\n\n"));
    }

    fn list(&mut self, lines: &[String]) {
        for line in lines {
            self.text.push_str(&format!("  {line}\n"));
            self.markdown.push_str(&format!("- {line}\n"));
        }
    }

    fn table(&mut self, table: &Table) {
        self.text.push_str(&format!("\n{}", table.text()));
        self.markdown.push_str(&format!("\n{}\n", table.markdown()));
    }

    /// Words that stand in the document alone.
    fn note(&mut self, text: &str) {
        self.markdown.push_str(&format!("{text}\n"));
    }

    /// Writes a plot, numbered from the second of its kind on.
    fn plot(&mut self, name: &str, index: usize, lines: &[plot::Line], axes: &Axes<'_>) -> Outcome {
        let number = if index == 0 { String::new() } else { format!("-{}", index + 1) };
        let file = format!("{name}{number}.svg");
        let svg = plot::draw(lines, axes)?;
        write_whole(&self.out.join(&file), svg.as_bytes())?;
        self.text.push_str(&format!("  {}\n", self.out.join(&file).display()));
        self.markdown.push_str(&format!("\n![{}]({file})\n", axes.y));
        Ok(())
    }
}
