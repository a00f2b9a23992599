//! The options of `mxtrain compare`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use mxfp4train::Recipe;

use crate::cli::{
    BatchArgs, DataArgs, MachineArgs, MeasureArgs, ModelArgs, OptimizerArgs, SeedArgs,
    SharpnessArgs, VariantArgs,
};

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    #[command(subcommand)]
    pub(crate) command: CompareCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CompareCommand {
    /// Train the same model with several recipes and seeds, one record a run
    Train(Box<CompareTrainArgs>),
    /// Measure bias and variance that recipes give the gradient of a trained model
    Gradients(GradientsArgs),
    /// Measure the variance of the unbiased MXFP4 product by its reduction length
    Variance(VarianceArgs),
    /// Make tables and plots from records
    Report(ReportArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Runs of one seed have the same initial weights and the same order of the data. A run whose record is
there is left out, so that the same command goes on with an interrupted comparison; a run that was
stopped goes on where it was, from the folder unfinished in --out.

Example:
  mxtrain compare train --data data --out runs --recipe bf16 --recipe mxfp4-rht-sr,g=128 --seeds 1,2")]
pub(crate) struct CompareTrainArgs {
    /// Folder for the records, RECIPE-seedN.json with - for every /
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// Recipe of a run, with switches as in `mxtrain train`; one option for each [default: bf16
    /// and all whose backward pass is in MXFP4]
    #[arg(long = "recipe", value_name = "NAME")]
    pub(crate) recipes: Vec<Recipe>,

    /// Seeds, each of which runs with every recipe
    #[arg(long, value_name = "N,N..", value_delimiter = ',', default_value = "1337")]
    pub(crate) seeds: Vec<u64>,

    /// Run only every N-th of the runs, from the K-th on: 1/2 and 2/2 share them between two GPUs
    #[arg(long, value_name = "K/N", default_value = "1/1")]
    pub(crate) part: Part,

    /// Save the model at these parts of a run (0 to 1), in models/RECIPE-seedN-stepS of --out
    #[arg(long, value_name = "X,X..", value_delimiter = ',', value_parser = part_of_a_run)]
    pub(crate) save_at: Vec<f64>,

    #[command(flatten)]
    pub(crate) data: DataArgs,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) variant: VariantArgs,

    #[command(flatten)]
    pub(crate) batch: BatchArgs,

    #[command(flatten)]
    pub(crate) optimizer: OptimizerArgs,

    #[command(flatten)]
    pub(crate) measure: MeasureArgs,

    #[command(flatten)]
    pub(crate) sharpness: SharpnessArgs,

    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

#[derive(Debug, Args)]
pub(crate) struct GradientsArgs {
    /// Checkpoint folders, this program's or Hugging Face's gpt2
    #[arg(long = "checkpoint", value_name = "DIR", required = true, num_args = 1..)]
    pub(crate) checkpoints: Vec<PathBuf>,

    /// Folder made by `mxtrain prepare`, whose training text the gradients are of
    #[arg(long, value_name = "DIR")]
    pub(crate) data: PathBuf,

    /// Recipe to measure; one option for each [default: all whose backward
    /// pass is in MXFP4]
    #[arg(long = "recipe", value_name = "NAME")]
    pub(crate) recipes: Vec<Recipe>,

    /// Gradients of the same text with other random bits, for each recipe
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) draws: usize,

    /// Sequences of the text
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) batch_size: usize,

    /// Tokens of a sequence [default: the checkpoint's context]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) sequence_length: Option<usize>,

    /// File for the record
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,

    #[command(flatten)]
    pub(crate) seed: SeedArgs,

    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

#[derive(Debug, Args)]
pub(crate) struct VarianceArgs {
    /// Reduction lengths
    #[arg(
        long,
        value_name = "N,N..",
        value_delimiter = ',',
        default_value = "128,256,512,1024,2048,4096,8192"
    )]
    pub(crate) lengths: Vec<usize>,

    /// Groups of the transform, beside the product without one; of those up to a reduction length
    #[arg(long, value_name = "N,N..", value_delimiter = ',', default_value = "32,64,128,256")]
    pub(crate) groups: Vec<usize>,

    /// Standard deviation of the outliers, which are 1 percent of the inputs; that of the others is
    /// 1
    #[arg(long, value_name = "X", default_value_t = 5.0, value_parser = deviation)]
    pub(crate) outliers: f64,

    /// Pairs of matrices
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) inputs: usize,

    /// Products of each pair with other random bits
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) draws: u32,

    /// File for the record
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,

    #[command(flatten)]
    pub(crate) seed: SeedArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// Folders with records, and records
    #[arg(required = true, value_name = "DIR|FILE")]
    pub(crate) inputs: Vec<PathBuf>,

    /// Folder for compare.md, compare.json and the plots
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}

/// Every `of`-th of a list, from the `number`-th on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Part {
    /// From 1 on.
    pub(crate) number: usize,
    pub(crate) of: usize,
}

impl std::str::FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, of) = text.split_once('/').unwrap_or_default();
        match (number.parse(), of.parse()) {
            (Ok(number), Ok(of)) if (1..=of).contains(&number) => Ok(Self { number, of }),
            _ => Err("expected K/N with K from 1 to N, such as 1/2".into()),
        }
    }
}

fn part_of_a_run(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("expected numbers from 0 to 1".into()),
    }
}

fn deviation(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=1e6).contains(&value) => Ok(value),
        _ => Err("expected a number from 0 to 1,000,000".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_counted_from_one() {
        assert_eq!("2/3".parse(), Ok(Part { number: 2, of: 3 }));
        for wrong in ["", "2", "0/2", "3/2", "1/0", "a/b"] {
            assert!(wrong.parse::<Part>().is_err(), "{wrong}");
        }
    }
}
