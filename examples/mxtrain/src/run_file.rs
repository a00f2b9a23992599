//! `mxtrain.json` in a checkpoint folder: what this program, not the library, must remember of a run.
//!
//! The library's checkpoint holds the model, the optimizer and the position; this file adds the
//! tokenizer and where the data is, so that `train --resume DIR` needs no other option. The library
//! carries the file from one save to the next.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome};
use crate::tokenizer::Tokenizer;
use crate::tokens_file::write_whole;

const FILE: &str = "mxtrain.json";
const VERSION: u32 = 1;

/// The contents of `mxtrain.json`.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunFile {
    /// Version of this file's layout.
    version: u32,
    /// The tokenizer of the training data, where it is known.
    pub(crate) tokenizer: Option<Tokenizer>,
    /// Options of `mxtrain train` that the library's own files do not hold, by name.
    pub(crate) options: BTreeMap<String, String>,
    /// Files of `hugging_face` in the folder that this program put there, with their checksums.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) files: BTreeMap<String, String>,
}

impl RunFile {
    /// A description of the present version.
    pub(crate) fn new(tokenizer: Option<Tokenizer>, options: BTreeMap<String, String>) -> Self {
        Self { version: VERSION, tokenizer, options, files: BTreeMap::new() }
    }

    /// Reads the file of a checkpoint folder; `None` where another program made the checkpoint.
    pub(crate) fn read(checkpoint: &Path) -> Outcome<Option<Self>> {
        let path = checkpoint.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Failure::io("read", &path)(e)),
        };
        let file: Self = serde_json::from_str(&text)
            .map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
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

    /// The options as command-line arguments; data options are left out where others replace them.
    pub(crate) fn to_args(&self, other_data: bool) -> Vec<OsString> {
        let is_data =
            |key: &str| ["data", "train", "val", "vocab-size", "tokenizer"].contains(&key);
        (self.options.iter())
            .filter(|(key, _)| !(other_data && is_data(key)))
            .map(|(key, value)| format!("--{key}={value}").into())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(RunFile::read(dir.path()).unwrap(), None);
        let options =
            BTreeMap::from([("data".into(), "/a b".into()), ("steps".into(), "9".into())]);
        let file = RunFile::new(Some(Tokenizer::Gpt2), options);
        file.write(dir.path()).unwrap();
        let read = RunFile::read(dir.path()).unwrap().unwrap();
        assert_eq!(read, file);
        assert_eq!(read.to_args(false), ["--data=/a b", "--steps=9"]);
        assert_eq!(read.to_args(true), ["--steps=9"]);
    }

    #[test]
    fn a_damaged_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "{\"version\": 1").unwrap();
        let failure = RunFile::read(dir.path()).unwrap_err();
        assert!(failure.message.contains("mxtrain.json: EOF"), "{}", failure.message);
        assert_eq!(failure.code, 2);
    }
}
