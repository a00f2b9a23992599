//! `mxtrain`: trains GPT models on text files from the command line.
//!
//! It uses the library `mxfp4train` as any application would. One file a sub-command; options are
//! described in `cli`, failures and exit codes in `failure`.

mod cli;
mod compare;
mod config_file;
mod console;
mod eval;
mod export;
mod failure;
mod files;
mod fit;
mod generate;
mod hugging_face;
mod info;
mod lock;
mod machine;
mod parse;
mod plan;
mod prepare;
mod prepared;
mod ranks;
mod recipes;
mod run_file;
mod signals;
mod spikes;
mod stop;
mod table;
mod tokenizer;
mod tokenizer_file;
mod tokens_file;
mod train;

use std::env;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;

use cli::{Command, DataArgs};
use failure::{Failure, Outcome};
use parse::Parsed;
use run_file::RunFile;

fn main() -> ExitCode {
    let args: Vec<OsString> = env::args_os().collect();
    let result = match parse::parse(&args) {
        Ok(parsed) => signals::outlive_file_limits()
            .and_then(|()| add_files(&args, parsed))
            .and_then(|parsed| run(&parsed)),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                // Nothing can be done for a reader that has gone away.
                let _ = error.print();
                return ExitCode::from(error.exit_code() as u8);
            }
            _ => Err(Failure::usage(parse::one_line(&error))),
        },
    };
    result.unwrap_or_else(|failure| {
        console::note(&format!("mxtrain: {}", failure.message));
        ExitCode::from(failure.code)
    })
}

fn run(parsed: &Parsed) -> Outcome<ExitCode> {
    match &parsed.cli.command {
        Command::Prepare(args) => prepare::run(args),
        Command::Train(args) => train::run(args, parsed),
        Command::Finetune(args) => train::finetune(args, parsed),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Export(args) => export::run(args),
        Command::Info(args) => info::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Recipes(args) => recipes::run(args),
        Command::Compare(args) => compare::run(args),
    }
}

/// Adds the options of a configuration file, then those that a run to be resumed was started with.
/// The command line wins over the file, and the file over the run.
fn add_files(args: &[OsString], mut parsed: Parsed) -> Outcome<Parsed> {
    let mut options = Vec::new();
    let (config, sub) = match &parsed.cli.command {
        Command::Train(train) => (train.config.as_deref(), "train"),
        Command::Finetune(train) => (train.config.as_deref(), "finetune"),
        Command::Plan(plan) => (plan.config.as_deref(), "plan"),
        _ => return Ok(parsed),
    };
    if let Some(file) = config {
        options = config_file::read(file, sub)?;
        parsed = parse::parse_or_fail(&parse::insert(args, &options))?;
    }
    if let Command::Train(train) | Command::Finetune(train) = &parsed.cli.command
        && let Some(dir) = &train.start.resume
    {
        let DataArgs { data, train: files, examples, .. } = &train.data;
        let other_data = data.is_some() || files.is_some() || examples.examples.is_some();
        let Some(run) = RunFile::read(dir)? else {
            // Data that are not named should not be the first complaint.
            if !other_data && !train::is_checkpoint(dir) {
                let what = if dir.exists() { "no checkpoint in it" } else { "no such folder" };
                return Err(Failure::usage(format!("--resume: {}: {what}", dir.display())));
            }
            return Ok(parsed);
        };
        if parsed.given("seed")
            && let Some(seed) = run.options.get("seed")
            && *seed != train.seed.number().to_string()
        {
            return Err(Failure::usage(format!(
                "--seed: a resumed run keeps what it was started with, {seed}; leave the option out"
            )));
        }
        let mut of_run = run
            .to_args(other_data)
            .map_err(|failure| failure.within(dir.join(run_file::FILE).display()))?;
        // A run that is saved elsewhere leaves the folder as it is.
        if train.start.out.is_none() {
            of_run.extend(run.log_in(dir));
        }
        parsed = parse::parse_or_fail(&parse::insert(args, &[of_run, options].concat()))?;
    }
    Ok(parsed)
}
