//! Parsing the command line: which options were given, and usage errors in one line.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches};

use crate::cli::Cli;
use crate::failure::{Failure, Outcome};

/// Parsed options, and which of them were given rather than left at their defaults.
pub(crate) struct Parsed {
    pub(crate) cli: Cli,
    matches: ArgMatches,
}

impl Parsed {
    /// Whether an option of the sub-command was given, by its name without the dashes.
    pub(crate) fn given(&self, option: &str) -> bool {
        let id = option.replace('-', "_");
        self.matches
            .subcommand()
            .is_some_and(|(_, options)| options.value_source(&id) == Some(ValueSource::CommandLine))
    }
}

/// Parses a command line, the program's name included. An option that comes twice counts as its
/// last, which is how the command line wins over a file.
///
/// `Err` holds what to print and the exit code; asking for help is one of its cases.
pub(crate) fn parse(args: &[OsString]) -> Result<Parsed, clap::Error> {
    let matches = command().try_get_matches_from(args)?;
    let cli = Cli::from_arg_matches(&matches)?;
    Ok(Parsed { cli, matches })
}

/// Like [`parse`], with a usage error as one line.
pub(crate) fn parse_or_fail(args: &[OsString]) -> Outcome<Parsed> {
    parse(args).map_err(|error| Failure::usage(one_line(&error)))
}

/// A command line with options inserted behind its sub-command, so that those already there win.
pub(crate) fn insert(args: &[OsString], options: &[OsString]) -> Vec<OsString> {
    [&args[..2], options, &args[2..]].concat()
}

/// The description of the whole command line.
pub(crate) fn command() -> clap::Command {
    // A number below 0 is a value, which its parser refuses in better words.
    let adapted = |sub: clap::Command| {
        sub.args_override_self(true).mut_args(|arg| match arg.get_action().takes_values() {
            true => arg.allow_negative_numbers(true),
            false => arg,
        })
    };
    let command = Cli::command().mut_subcommands(|sub| adapted(sub).mut_subcommands(adapted));
    // Those of `train`, which has another default for trained weights; here all models are new.
    let of_new_models = |compared: clap::Command| {
        compared.mut_arg("lr", |lr| lr.help("Highest learning rate [default: 1e-3]")).mut_arg(
            "warmup",
            |warmup| {
                warmup.help(
                    "Steps over which the learning rate rises [default: 2 percent of --steps]",
                )
            },
        )
    };
    command.mut_subcommand("compare", |compare| compare.mut_subcommand("train", of_new_models))
}

/// A usage error in one line: what is wrong, and clap's suggestion where it has one.
pub(crate) fn one_line(error: &clap::Error) -> String {
    // Rendered: "error: what is wrong", its details indented below, a blank line, tips, usage.
    let rendered = error.render().to_string();
    let what = rendered.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = what.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let mut line = words.join(" ").trim_start_matches("error: ").to_owned();
    let wants_name = [ErrorKind::UnknownArgument, ErrorKind::InvalidSubcommand];
    let suggested = [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand]
        .into_iter()
        .find_map(|kind| error.get(kind));
    if wants_name.contains(&error.kind())
        && let Some(name) = suggested
    {
        line.push_str(&format!("; did you mean '{name}'?"));
    } else if error.kind() == ErrorKind::UnknownArgument
        && let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg)
        && !argument.starts_with('-')
    {
        // What a shell makes of a pattern, or of a prompt of several words.
        line.push_str("; a pattern, or a value with blanks, goes in quotes");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Command;

    fn args(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn the_description_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn the_last_of_two_counts_and_defaults_are_not_given() {
        let parsed = parse(&args("mxtrain train --lr=1 --steps=5 --lr 2")).unwrap();
        assert!(parsed.given("lr") && parsed.given("steps") && !parsed.given("layers"));
        let Command::Train(train) = parsed.cli.command else { panic!() };
        assert_eq!(
            (train.optimizer.lr, train.optimizer.steps, train.model.layers),
            (Some(2.0), 5, None)
        );
    }

    #[test]
    fn usage_errors_are_one_line() {
        for (line, expected) in [
            (
                "mxtrain train --step 5",
                "unexpected argument '--step' found; did you mean '--steps'?",
            ),
            (
                "mxtrain train --steps many",
                "invalid value 'many' for '--steps <N>': invalid digit found in string",
            ),
            (
                "mxtrain train --train a.bin b.bin",
                "unexpected argument 'b.bin' found; a pattern, or a value with blanks, goes in quotes",
            ),
            ("mxtrain trian", "unrecognized subcommand 'trian'; did you mean 'train'?"),
            (
                "mxtrain prepare",
                "the following required arguments were not provided: --out <DIR> <INPUT>...",
            ),
        ] {
            assert_eq!(one_line(&parse(&args(line)).err().unwrap()), expected);
        }
    }
}
