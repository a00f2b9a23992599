//! A prepared folder: `train.bin`, `val.bin` and `meta.json`, which says how they were made.

use std::fs;
use std::path::{Path, PathBuf};

use mxfp4train::Dataset;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome};
use crate::tokenizer::Tokenizer;
use crate::tokens_file::write_whole;

/// File names inside a prepared folder.
pub(crate) const TRAIN_FILE: &str = "train.bin";
pub(crate) const VAL_FILE: &str = "val.bin";
const META_FILE: &str = "meta.json";
const VERSION: u32 = 1;

/// The contents of `meta.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Meta {
    /// Version of this file's layout.
    pub(crate) version: u32,
    /// How the text became tokens.
    pub(crate) tokenizer: Tokenizer,
    /// Tokens are below this number.
    pub(crate) vocab_size: usize,
    /// Tokens in `train.bin`.
    pub(crate) train_tokens: u64,
    /// Tokens in `val.bin`; 0 where there is no such file.
    pub(crate) val_tokens: u64,
    /// The input files, in their order.
    pub(crate) sources: Vec<Source>,
}

/// One input file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Source {
    /// Its path as it was given.
    pub(crate) path: PathBuf,
    /// Bytes at its beginning that became training tokens.
    pub(crate) train_bytes: u64,
    /// Bytes at its end that became validation tokens.
    pub(crate) val_bytes: u64,
}

impl Meta {
    /// A description of the present version.
    pub(crate) fn new(tokenizer: Tokenizer, sources: Vec<Source>) -> Self {
        Self {
            version: VERSION,
            tokenizer,
            vocab_size: tokenizer.vocab_size(),
            train_tokens: 0,
            val_tokens: 0,
            sources,
        }
    }

    /// Whether `dir` is a prepared folder.
    pub(crate) fn is_in(dir: &Path) -> bool {
        dir.join(META_FILE).is_file()
    }

    /// Reads a prepared folder's description.
    pub(crate) fn read(dir: &Path) -> Outcome<Self> {
        let path = dir.join(META_FILE);
        let text = fs::read_to_string(&path).map_err(|error| {
            let mut failure = Failure::io("read", &path)(error);
            failure.message.push_str(
                "; make the folder with `mxtrain prepare`, or name other token files with --train",
            );
            failure
        })?;
        let meta: Self = serde_json::from_str(&text)
            .map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
        if meta.version != VERSION {
            return Err(Failure::usage(format!(
                "{}: expected version {VERSION}, got {}; prepare the data again",
                path.display(),
                meta.version
            )));
        }
        Ok(meta)
    }

    /// Writes the description, which makes the folder a prepared one.
    pub(crate) fn write(&self, dir: &Path) -> Outcome {
        let mut text = serde_json::to_string_pretty(self).expect("plain data becomes JSON");
        text.push('\n');
        write_whole(&dir.join(META_FILE), text.as_bytes())
    }

    /// Opens `train.bin`.
    pub(crate) fn open_train(&self, dir: &Path) -> Outcome<Dataset> {
        open(&dir.join(TRAIN_FILE), self.train_tokens)
    }

    /// Opens `val.bin`, if any text was kept for validation.
    pub(crate) fn open_val(&self, dir: &Path) -> Outcome<Option<Dataset>> {
        if self.val_tokens == 0 {
            return Ok(None);
        }
        open(&dir.join(VAL_FILE), self.val_tokens).map(Some)
    }
}

fn open(path: &Path, expected: u64) -> Outcome<Dataset> {
    let data = Dataset::open_files(&[path])?;
    let found = data.token_count();
    if found != expected {
        return Err(Failure::usage(format!(
            "{}: {META_FILE} says {expected} tokens, the file holds {found}; prepare the data again",
            path.display()
        )));
    }
    Ok(data)
}
