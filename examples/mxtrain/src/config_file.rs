//! Options from a TOML file: its entries become command-line arguments that stand before the user's
//! own, so that one parser checks both and the user's win.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use clap::ArgAction;
use toml::Value;

use crate::failure::{Failure, Outcome};
use crate::files;
use crate::parse;

/// Reads the options of a file that sub-command `sub` has, as arguments. Those that only `train`
/// has are left out for another sub-command, so that `plan` takes a run's file as it is.
pub(crate) fn read(file: &Path, sub: &str) -> Outcome<Vec<OsString>> {
    let text = files::read_text(file).map_err(Failure::io("read", file))?;
    let table: BTreeMap<String, Value> = toml::from_str(&text).map_err(|e| {
        let line = e.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count());
        let message = e.message().replace('\n', ", ");
        Failure::usage(format!("{}, line {line}: {message}", file.display()))
    })?;

    let own = options_of(sub);
    let known = options_of("train");
    let mut accepted = BTreeMap::new();
    for (key, value) in table {
        if !known.contains_key(&key) {
            return Err(unknown(file, &key, known.keys()));
        }
        let Some(&kind) = own.get(&key) else { continue };
        let wrong = |expected: &str| {
            let message = format!("{key}: expected {expected}, got {} {value}", value.type_str());
            Failure::usage(message).within(file.display())
        };
        match (kind, &value) {
            (Kind::Flag | Kind::Either, Value::Boolean(_)) => {}
            (Kind::Flag | Kind::Either, _) => return Err(wrong("true or false")),
            (Kind::Value, Value::String(_) | Value::Integer(_) | Value::Float(_)) => {}
            (Kind::Value, _) => return Err(wrong("a number or a string")),
        }
        // Alone first, so that a wrong value is reported with the file that it came from.
        let option = BTreeMap::from([(key, value)]);
        let alone = [vec!["mxtrain".into(), sub.into()], to_args(&option)].concat();
        parse::parse_or_fail(&alone).map_err(|failure| failure.within(file.display()))?;
        accepted.extend(option);
    }
    Ok(to_args(&accepted))
}

/// Options as arguments, in the form that the parser takes for every type.
fn to_args(options: &BTreeMap<String, Value>) -> Vec<OsString> {
    let to_arg = |(key, value): (&String, &Value)| match value {
        Value::Boolean(true) => Some(format!("--{key}").into()),
        Value::Boolean(false) => None,
        Value::String(text) => Some(format!("--{key}={text}").into()),
        other => Some(format!("--{key}={other}").into()),
    };
    options.iter().filter_map(to_arg).collect()
}

/// What may stand behind an option in a file.
#[derive(Clone, Copy)]
enum Kind {
    Flag,
    Value,
    Either,
}

/// The long options of a sub-command that a file may hold.
fn options_of(sub: &str) -> BTreeMap<String, Kind> {
    let command = parse::command();
    let options = command.find_subcommand(sub).into_iter().flat_map(|sub| sub.get_arguments());
    options
        .filter_map(|arg| {
            let kind = match arg.get_action() {
                ArgAction::SetTrue => Kind::Flag,
                // One that has a value as well, so that a run can keep it.
                _ if arg.get_value_names().is_some_and(|names| names[0] == "BOOL") => Kind::Either,
                _ => Kind::Value,
            };
            arg.get_long().map(|long| (long.to_owned(), kind))
        })
        .filter(|(long, _)| !["config", "help", "version", "json"].contains(&long.as_str()))
        .collect()
}

fn unknown<'a>(file: &Path, key: &str, known: impl Iterator<Item = &'a String>) -> Failure {
    let wanted = key.replace('_', "-").to_lowercase();
    let nearest = known
        .map(|name| (strsim::jaro_winkler(&wanted, name), name))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| format!("; the nearest known option is {name:?}"));
    Failure::usage(format!(
        "{}: unknown option {key:?}{}",
        file.display(),
        nearest.unwrap_or_default()
    ))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cli::{Command, TrainArgs};

    fn parse(toml: &str, line: &str) -> Outcome<(TrainArgs, parse::Parsed)> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), toml).unwrap();
        let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let options = read(file.path(), "train")?;
        let mut parsed = parse::parse_or_fail(&parse::insert(&args, &options))?;
        let dummy = parse::parse(&["mxtrain".into(), "info".into(), "x".into()]).unwrap();
        let command = std::mem::replace(&mut parsed.cli, dummy.cli).command;
        let Command::Train(train) = command else { panic!("expected train") };
        Ok((*train, parsed))
    }

    fn failure(toml: &str) -> String {
        let failure = parse(toml, "mxtrain train").err().expect("expected a failure");
        assert_eq!(failure.code, 2);
        assert!(!failure.message.contains('\n'), "{}", failure.message);
        failure.message
    }

    #[test]
    fn the_command_line_wins_over_the_file_and_the_file_over_defaults() {
        let toml = "lr = 2e-3\nlayers = 7\nschedule = \"linear\"\noverwrite = true\nclip = 2\n";
        let (train, parsed) = parse(toml, "mxtrain train --layers 3").unwrap();
        assert_eq!(train.model.layers, Some(3));
        assert_eq!(train.optimizer.lr, Some(2e-3));
        assert_eq!(train.optimizer.clip, Some(2.0));
        assert_eq!(train.optimizer.schedule, mxfp4train::ScheduleKind::Linear);
        assert_eq!(train.model.heads, None);
        assert!(train.start.overwrite);
        assert!(parsed.given("lr") && !parsed.given("heads"));
        let (train, _) =
            parse("document-mask = true\nlora-alpha = 2\nlora = 4\n", "mxtrain train").unwrap();
        assert!(train.document_mask && train.lora.lora_alpha == Some(2.0));
    }

    #[test]
    fn text_that_looks_like_an_option_is_a_value() {
        let (train, _) = parse("sample-prompt = \"--steps\"", "mxtrain train").unwrap();
        assert_eq!(train.report.sample_prompt, "--steps");
        assert_eq!(train.optimizer.steps, 2000);
    }

    #[test]
    fn a_wrong_entry_is_named_with_its_file() {
        let message = failure("batch_size = 3");
        assert!(message.contains("unknown option \"batch_size\""), "{message}");
        assert!(message.ends_with("nearest known option is \"batch-size\""), "{message}");

        assert!(failure("layrs = 3").ends_with("\"layers\""));
        assert!(failure("config = \"x\"").contains("unknown option"));
        assert!(failure("layers = -1").contains("invalid value '-1' for '--layers <N>'"));
        assert!(failure("layers = [1]").contains("layers: expected a number or a string"));
        assert!(failure("overwrite = 1").contains("expected true or false, got integer 1"));
        assert!(failure("recipe = \"fp4\"").contains("expected one of fp32"));
        assert!(failure("lr = 1\nsteps = = 2").contains(", line 2: "));
    }

    #[test]
    fn plan_reads_a_training_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "layers = 7\nsteps = 10\n").unwrap();
        assert_eq!(read(file.path(), "plan").unwrap(), ["--layers=7"]);
    }
}
