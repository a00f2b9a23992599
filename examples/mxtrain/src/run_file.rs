//! `mxtrain.json` in a checkpoint folder: what this program, not the library, must remember of a
//! run.
//!
//! The library's checkpoint holds the model, the optimizer and the position; this file adds the
//! tokenizer and where the data is, so that `train --resume DIR` needs no other option. The library
//! carries the file from one save to the next.
//!
//! A checkpoint may come from anyone. So the file says what a resumed run computes and which data
//! it reads, and never where anything is written: what else stands in it is shown and left out
//! ([`RunFile::left_out`]). `save-fallback` is kept for that line alone, and so is `log`, unless
//! the log lies in the folder itself and is named without a path ([`RunFile::log_in`]).
//!
//! A path that is not UTF-8 cannot stand in JSON. It stands under `encoded`, with every byte but
//! letters, digits and `/-._` as `%XX`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path};

use mxfp4train::Model;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome};
use crate::files;
use crate::parse;
use crate::tokenizer::Kind;
use crate::tokens_file::write_whole;
use crate::train;

/// Its name in the checkpoint folder.
pub(crate) const FILE: &str = "mxtrain.json";
const VERSION: u32 = 1;
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'.').remove(b'_');

/// The options that it may set: those that name data,
const DATA_OPTIONS: [&str; 11] = [
    "data",
    "train",
    "val",
    "token-type",
    "vocab-size",
    "tokenizer",
    "examples",
    "val-examples",
    "prompt-field",
    "answer-field",
    "between",
];
/// and those that say what a run does.
const RUN_OPTIONS: [&str; 9] = [
    "steps",
    "eval-every",
    "eval-batches",
    "sharpness",
    "save-every",
    "sample-every",
    "sample-prompt",
    "seed",
    "document-mask",
];

/// The contents of `mxtrain.json`.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunFile {
    /// Version of this file's layout.
    version: u32,
    /// The tokenizer of the training data, where it is known.
    pub(crate) tokenizer: Option<Kind>,
    /// Options of `mxtrain train` that the library's own files do not hold, by name.
    pub(crate) options: BTreeMap<String, String>,
    /// Those among them whose values are not UTF-8, encoded.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    encoded: BTreeMap<String, String>,
    /// Tokens of the training data, by which a resumed run knows whether they are still the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) train_tokens: Option<u64>,
    /// Files of `hugging_face` in the folder that this program put there, with their checksums.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) files: BTreeMap<String, String>,
}

impl RunFile {
    /// A description of the present version.
    pub(crate) fn new(tokenizer: Option<Kind>, options: BTreeMap<String, OsString>) -> Self {
        let (mut plain, mut encoded) = (BTreeMap::new(), BTreeMap::new());
        for (name, value) in options {
            match value.into_string() {
                Ok(value) => drop(plain.insert(name, value)),
                Err(value) => {
                    let value = percent_encode(value.as_bytes(), ENCODED).to_string();
                    encoded.insert(name, value);
                }
            }
        }
        Self {
            version: VERSION,
            tokenizer,
            options: plain,
            encoded,
            train_tokens: None,
            files: BTreeMap::new(),
        }
    }

    /// Reads the file of a checkpoint folder; `None` where another program made the checkpoint.
    pub(crate) fn read(checkpoint: &Path) -> Outcome<Option<Self>> {
        let path = Model::folder_of(checkpoint).join(FILE);
        let text = match files::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Failure::io("read", &path)(e)),
        };
        let file: Self = files::parse_json(&path, &text)?;
        if file.version != VERSION {
            return Err(Failure::usage(format!(
                "{}: expected version {VERSION}, got {}; it was written by another mxtrain",
                path.display(),
                file.version
            )));
        }
        Ok(Some(file))
    }

    /// Writes the file into a checkpoint folder.
    pub(crate) fn write(&self, checkpoint: &Path) -> Outcome {
        let mut text = serde_json::to_string_pretty(self).expect("plain data becomes JSON");
        text.push('\n');
        write_whole(&checkpoint.join(FILE), text.as_bytes())
    }

    /// The options that it may set, as command-line arguments; those of data are left out where
    /// others replace them.
    pub(crate) fn to_args(&self, other_data: bool) -> Outcome<Vec<OsString>> {
        let data = DATA_OPTIONS.iter().filter(|_| !other_data);
        let mut args = Vec::new();
        for name in data.chain(&RUN_OPTIONS) {
            let Some(value) = self.option(name) else { continue };
            let mut argument = OsString::from(format!("--{name}="));
            argument.push(value);
            // Alone first, so that a wrong value is reported as what it is: one of this file.
            parse::parse_or_fail(&["mxtrain".into(), "train".into(), argument.clone()])?;
            args.push(argument);
        }
        Ok(args)
    }

    /// The option of a log that lies in the checkpoint folder, as an argument. There may be no
    /// other file of that name, and no link: it could lead anywhere, and a folder may hold more
    /// than its checkpoint.
    pub(crate) fn log_in(&self, checkpoint: &Path) -> Option<OsString> {
        let name = self.option("log")?;
        let mut parts = Path::new(&name).components();
        let is_name = parts.next() == Some(Component::Normal(&name)) && parts.next().is_none();
        // Looked at where a killed save has left it.
        let is_log = is_name && train::is_log(&Model::folder_of(checkpoint).join(&name));
        is_log.then(|| {
            let mut argument = OsString::from("--log=");
            argument.push(checkpoint.join(name));
            argument
        })
    }

    /// Options that it has and may not set.
    pub(crate) fn left_out(&self) -> impl Iterator<Item = (&str, OsString)> {
        let names = self.options.keys().chain(self.encoded.keys()).map(String::as_str);
        let others =
            names.filter(|name| !DATA_OPTIONS.contains(name) && !RUN_OPTIONS.contains(name));
        others.filter_map(|name| Some((name, self.option(name)?)))
    }

    fn option(&self, name: &str) -> Option<OsString> {
        let decode = |value| OsString::from_vec(percent_decode_str(value).collect());
        let encoded = || self.encoded.get(name).map(|value| decode(value));
        self.options.get(name).map(OsString::from).or_else(encoded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_is_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(RunFile::read(dir.path()).unwrap(), None);
        let latin_1 = OsString::from_vec(b"/f\xfcr %41/*.bin".to_vec());
        let options = BTreeMap::from([
            ("data".into(), "/a b".into()),
            ("steps".into(), "9".into()),
            ("val".into(), latin_1.clone()),
        ]);
        let file = RunFile::new(Some(Kind::Gpt2), options);
        file.write(dir.path()).unwrap();
        let read = RunFile::read(dir.path()).unwrap().unwrap();
        assert_eq!(read, file);
        let mut val = OsString::from("--val=");
        val.push(latin_1);
        let args = read.to_args(false).unwrap();
        assert_eq!(args, ["--data=/a b".into(), val, OsString::from("--steps=9")]);
        assert_eq!(read.to_args(true).unwrap(), ["--steps=9"]);
    }

    #[test]
    fn where_a_run_writes_is_left_out() {
        let options = ["log", "out", "save-fallback", "config", "overwrite", "steps", "resume"];
        let options = options.map(|name| (name.to_owned(), OsString::from("7")));
        let file = RunFile::new(None, options.into());
        assert_eq!(file.to_args(false).unwrap(), ["--steps=7"]);
        let left: Vec<_> = file.left_out().map(|(name, _)| name).collect();
        assert_eq!(left, ["config", "log", "out", "overwrite", "resume", "save-fallback"]);
        // A value is no further option.
        let options = BTreeMap::from([("sample-prompt".into(), "x --log=y".into())]);
        let args = RunFile::new(None, options).to_args(false).unwrap();
        assert_eq!(args, ["--sample-prompt=x --log=y"]);
    }

    #[test]
    fn only_a_log_in_the_folder_goes_on_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let [dir, outside] = ["model", "outside"].map(|name| dir.path().join(name));
        fs::create_dir(&dir).unwrap();
        let log = |name: &str| {
            let options = BTreeMap::from([("log".to_owned(), name.into())]);
            RunFile::new(None, options).log_in(&dir).map(|arg| arg.into_string().unwrap())
        };
        let there = format!("--log={}/log", dir.display());
        assert_eq!(log("log"), Some(there.clone()));
        let path = dir.join("log");
        let line = "{\"type\":\"step\"}\n";
        for (text, is_log) in [("", true), (line, true), ("export PATH", false), ("{}", false)] {
            fs::write(&path, text).unwrap();
            assert_eq!(log("log").is_some(), is_log, "{text}");
        }
        fs::write(&outside, line).unwrap();
        for name in ["../outside", "./log", "log/", "log/.", "/log", "", ".", ".."] {
            assert_eq!(log(name), None, "{name}");
        }
        fs::remove_file(&path).unwrap();
        fs::hard_link(&outside, &path).unwrap();
        assert_eq!(log("log"), None);
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&outside, &path).unwrap();
        assert_eq!(log("log"), None);
    }

    #[test]
    fn a_wrong_value_is_named_with_its_field() {
        let dir = tempfile::tempdir().unwrap();
        for (options, expected) in [
            (r#"{"steps": 9}"#, "mxtrain.json: options.steps: invalid type: integer"),
            (r#"{"steps": "-1"}"#, "invalid value '-1' for '--steps <N>'"),
            (r#"{"seed": "x"}"#, "invalid value 'x' for '--seed <N>'"),
            (r#"{"token-type": "u7"}"#, "--token-type <TYPE>"),
            ("[]", "mxtrain.json: options: invalid type: sequence"),
        ] {
            let text = format!(r#"{{"version": 1, "tokenizer": null, "options": {options}}}"#);
            fs::write(dir.path().join(FILE), text).unwrap();
            let read = RunFile::read(dir.path()).and_then(|file| file.unwrap().to_args(false));
            let message = read.unwrap_err().message;
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn a_damaged_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "{\"version\": 1").unwrap();
        let failure = RunFile::read(dir.path()).unwrap_err();
        assert!(failure.message.contains("mxtrain.json: EOF"), "{}", failure.message);
        assert_eq!(failure.code, 2);
    }

    #[test]
    fn it_is_found_where_a_killed_save_has_left_it() {
        let dir = tempfile::tempdir().unwrap();
        let left = dir.path().join(".run.mxt-old");
        fs::create_dir(&left).unwrap();
        let file = RunFile::new(None, BTreeMap::new());
        file.write(&left).unwrap();
        assert_eq!(RunFile::read(&dir.path().join("run")).unwrap(), Some(file));
    }

    #[test]
    fn a_pipe_is_not_waited_for() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let dir = tempfile::tempdir().unwrap();
        mknodat(CWD, dir.path().join(FILE), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let failure = RunFile::read(dir.path()).unwrap_err();
        assert!(failure.message.contains("found a folder, pipe"), "{}", failure.message);
    }
}
