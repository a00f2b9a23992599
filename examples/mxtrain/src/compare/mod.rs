//! `mxtrain compare`: what each recipe costs in loss, measured.
//!
//! Every sub-command but `report` writes JSON records that say how they came about; `report` makes
//! tables and plots from any number of them.

mod cli;
mod gradients;
mod moments;
mod record;
mod report;
mod train;
mod unfinished;
mod variance;

use std::process::ExitCode;

pub(crate) use cli::CompareArgs;

use crate::failure::Outcome;
use cli::CompareCommand;

/// What is compared where no recipe is named: bf16, and what has a backward pass in MXFP4.
const RECIPES: [&str; 6] =
    ["bf16", "mxfp4", "mxfp4-rht", "mxfp4-sr", "mxfp4-rht-sr", "fp8-mxfp4-rht-sr"];

/// Runs the command.
pub(crate) fn run(args: &CompareArgs) -> Outcome<ExitCode> {
    match &args.command {
        CompareCommand::Train(args) => train::run(args),
        CompareCommand::Gradients(args) => gradients::run(args),
        CompareCommand::Variance(args) => variance::run(args),
        CompareCommand::Report(args) => report::run(args),
    }
}
