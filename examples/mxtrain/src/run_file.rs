//! `mxtrain.json` in a checkpoint folder: what this program, not the library, must remember of a run.
//!
//! The library's checkpoint holds the model, the optimizer and the position; this file adds the
//! tokenizer and where the data is, so that `train --resume DIR` needs no other option. The library
//! carries the file from one save to the next.
//!
//! A path that is not UTF-8 cannot stand in JSON. It stands under `encoded`, with every byte but
//! letters, digits and `/-._` as `%XX`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use mxfp4train::Model;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome};
use crate::tokenizer::Tokenizer;
use crate::tokens_file::write_whole;

/// Its name in the checkpoint folder.
pub(crate) const FILE: &str = "mxtrain.json";
const VERSION: u32 = 1;
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'.').remove(b'_');

/// The contents of `mxtrain.json`.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunFile {
    /// Version of this file's layout.
    version: u32,
    /// The tokenizer of the training data, where it is known.
    pub(crate) tokenizer: Option<Tokenizer>,
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
    pub(crate) fn new(tokenizer: Option<Tokenizer>, options: BTreeMap<String, OsString>) -> Self {
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
        let text = match read_file(&path) {
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
        let is_data = |key: &str| {
            ["data", "train", "val", "token-type", "vocab-size", "tokenizer"].contains(&key)
        };
        let plain = self.options.iter().map(|(key, value)| (key, OsString::from(value)));
        let encoded = self.encoded.iter().map(|(key, value)| {
            (key, OsString::from_vec(percent_decode_str(value).collect::<Vec<u8>>()))
        });
        plain
            .chain(encoded)
            .filter(|(key, _)| !(other_data && is_data(key)))
            .map(|(key, value)| {
                let mut argument = OsString::from(format!("--{key}="));
                argument.push(value);
                argument
            })
            .collect()
    }
}

/// Reads a file, and nothing else: a pipe of this name would wait for its writer.
fn read_file(path: &Path) -> io::Result<String> {
    let nonblocking = OFlags::NONBLOCK.bits() as i32;
    let mut file = File::options().read(true).custom_flags(nonblocking).open(path)?;
    if !file.metadata()?.is_file() {
        let message = "expected a file, found a folder, pipe or device";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
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
        let file = RunFile::new(Some(Tokenizer::Gpt2), options);
        file.write(dir.path()).unwrap();
        let read = RunFile::read(dir.path()).unwrap().unwrap();
        assert_eq!(read, file);
        let mut val = OsString::from("--val=");
        val.push(latin_1);
        assert_eq!(read.to_args(false), ["--data=/a b".into(), "--steps=9".into(), val]);
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
