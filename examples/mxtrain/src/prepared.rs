//! A prepared folder: `train.bin`, `val.bin` and `meta.json`, which says how they were made; with
//! the files of the tokenizer, where that is Hugging Face's.
//!
//! They are replaced one after the other. Before the first of them `meta.json.new` is there,
//! and it becomes `meta.json` behind the last, so a folder where that was interrupted is never
//! taken for a whole one.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use mxfp4train::Dataset;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::failure::{Failure, Outcome};
use crate::files;
use crate::tokenizer::{Kind, Tokenizer};
use crate::tokens_file::{SealedFile, Width, write_whole};

/// File names inside a prepared folder.
pub(crate) const TRAIN_FILE: &str = "train.bin";
pub(crate) const VAL_FILE: &str = "val.bin";
const META_FILE: &str = "meta.json";
/// What the description is called while the token files are being replaced.
const PENDING_FILE: &str = "meta.json.new";
const VERSION: u32 = 1;

/// The contents of `meta.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Meta {
    /// Version of this file's layout.
    pub(crate) version: u32,
    /// How the text became tokens.
    pub(crate) tokenizer: Kind,
    /// Tokens are below this number.
    pub(crate) vocab_size: usize,
    /// What a token is in the two files; u16 in descriptions by older programs.
    #[serde(default, skip_serializing_if = "Width::is_u16")]
    pub(crate) token_type: Width,
    /// Tokens in `train.bin`.
    pub(crate) train_tokens: u64,
    /// Tokens in `val.bin`; 0 where there is no such file.
    pub(crate) val_tokens: u64,
    /// Documents in the two files; none in descriptions by older programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) documents: Option<Documents>,
    /// The inputs, in their order.
    pub(crate) sources: Vec<Source>,
    /// Files of the tokenizer that were put beside it, with their checksums.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    files: BTreeMap<String, String>,
}

/// Documents in `train.bin` and `val.bin`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Documents {
    pub(crate) train: u64,
    pub(crate) val: u64,
    /// Whether there is a single document, whose end is the validation text.
    pub(crate) cut: bool,
}

/// One input of the command line: a file, a folder, or `-`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Source {
    /// Its path as it was given: a string, or `{"unix_bytes": [..]}` if it is not UTF-8.
    #[serde(serialize_with = "write_path", deserialize_with = "read_path")]
    pub(crate) path: PathBuf,
    /// Files that were read; 0 in descriptions by older programs.
    #[serde(default)]
    pub(crate) files: u64,
    /// Documents that became training tokens.
    #[serde(default)]
    pub(crate) train_documents: u64,
    /// Documents that became validation tokens.
    #[serde(default)]
    pub(crate) val_documents: u64,
    /// Bytes of text that became training tokens.
    pub(crate) train_bytes: u64,
    /// Bytes of text that became validation tokens.
    pub(crate) val_bytes: u64,
}

impl Source {
    /// The count of its documents in one of the two files.
    pub(crate) fn documents_mut(&mut self, val: bool) -> &mut u64 {
        if val { &mut self.val_documents } else { &mut self.train_documents }
    }
}

impl Meta {
    /// A description of the present version.
    pub(crate) fn new(tokenizer: &Tokenizer, sources: Vec<Source>) -> Self {
        let files = contents(tokenizer).map(|(name, bytes)| (name.clone(), files::checksum(bytes)));
        Self {
            version: VERSION,
            tokenizer: tokenizer.kind(),
            vocab_size: tokenizer.vocab_size(),
            token_type: Width::of(tokenizer.vocab_size()),
            files: files.collect(),
            train_tokens: 0,
            val_tokens: 0,
            documents: None,
            sources,
        }
    }

    /// Whether `dir` is a prepared folder.
    pub(crate) fn is_in(dir: &Path) -> bool {
        [META_FILE, PENDING_FILE].iter().any(|name| dir.join(name).is_file())
    }

    /// Reads a prepared folder's description.
    pub(crate) fn read(dir: &Path) -> Outcome<Self> {
        Self::read_with(dir, |_| Ok(())).map(|(meta, ())| meta)
    }

    /// Reads a prepared folder's description, and what `read` opens or reads of the token files,
    /// which are those that it describes.
    pub(crate) fn read_with<T>(
        dir: &Path,
        read: impl FnOnce(&Self) -> Outcome<T>,
    ) -> Outcome<(Self, T)> {
        let replaced = || {
            Failure::usage(format!(
                "{}: its files are being replaced, or `mxtrain prepare` was stopped while it did \
                 that; wait for it, or prepare the data again",
                dir.display()
            ))
        };
        let is_pending = || dir.join(PENDING_FILE).symlink_metadata().is_ok();
        if is_pending() {
            return Err(replaced());
        }
        let path = dir.join(META_FILE);
        let (file, meta) = Self::parse(&path)?;
        let result = read(&meta);
        // As long as it is open, no other file can be taken for it.
        if is_pending() || !files::is_at(&file, &path) {
            return Err(replaced());
        }
        Ok((meta, result?))
    }

    fn parse(path: &Path) -> Outcome<(File, Self)> {
        let read = || files::open(path).and_then(|file| Ok((files::contents(&file)?, file)));
        let (text, file) = read().map_err(|error| {
            let mut failure = Failure::io("read", path)(error);
            failure.message.push_str(
                "; make the folder with `mxtrain prepare`, or name token files themselves (--train \
                 'FILES' of train, --data 'FILES' of eval)",
            );
            failure
        })?;
        let meta: Self = files::parse_json(path, &text).map_err(|mut failure| {
            failure.message.push_str("; prepare the data again");
            failure
        })?;
        if meta.version != VERSION {
            return Err(Failure::usage(format!(
                "{}: expected version {VERSION}, got {}; prepare the data again",
                path.display(),
                meta.version
            )));
        }
        Ok((file, meta))
    }

    /// A failure where a file of `tokenizer` would replace one that `prepare` has not put there.
    pub(crate) fn check_place(dir: &Path, tokenizer: &Tokenizer) -> Outcome {
        let before = Self::files_of(dir);
        for (name, bytes) in contents(tokenizer) {
            let path = dir.join(name);
            let there = match path.symlink_metadata() {
                Ok(_) => files::read(&path).map_err(Failure::io("read", &path))?,
                Err(_) => continue,
            };
            if there != *bytes && before.get(name) != Some(&files::checksum(&there)) {
                let message = "is there already and not of `mxtrain prepare`, which would put the \
                               tokenizer's beside the tokens; name another folder with --out";
                return Err(Failure::usage(message).within(path.display()));
            }
        }
        Ok(())
    }

    /// The tokenizer's files that an earlier `prepare` has put into a folder.
    fn files_of(dir: &Path) -> BTreeMap<String, String> {
        Self::parse(&dir.join(META_FILE)).map(|(_, meta)| meta.files).unwrap_or_default()
    }

    /// Gives the token files their names and writes the description, which makes the folder a
    /// prepared one. What was there before is whole until then.
    pub(crate) fn publish(
        &self,
        dir: &Path,
        tokenizer: &Tokenizer,
        train: SealedFile,
        val: Option<SealedFile>,
    ) -> Outcome {
        let mut text = serde_json::to_string_pretty(self).expect("plain data becomes JSON");
        text.push('\n');
        let pending = dir.join(PENDING_FILE);
        let before = Self::files_of(dir);
        write_whole(&pending, text.as_bytes())?;
        sync(dir);
        train.publish().inspect_err(|_| {
            let _ = fs::remove_file(&pending);
        })?;
        match val {
            Some(val) => val.publish()?,
            // An older run's validation text does not belong to this data.
            None => remove_if_there(&dir.join(VAL_FILE))?,
        }
        // As is another tokenizer's file.
        for (name, checksum) in before.iter().filter(|(name, _)| !self.files.contains_key(*name)) {
            let path = dir.join(name);
            let is_a_name = Path::new(name).file_name().is_some_and(|file| file == name.as_str());
            if is_a_name
                && files::read(&path).is_ok_and(|there| files::checksum(&there) == *checksum)
            {
                remove_if_there(&path)?;
            }
        }
        for (name, bytes) in contents(tokenizer) {
            let path = dir.join(name);
            if !files::read(&path).is_ok_and(|there| there == *bytes) {
                write_whole(&path, bytes)?;
            }
        }
        sync(dir);
        let path = dir.join(META_FILE);
        fs::rename(&pending, &path).map_err(Failure::io("create", &path))?;
        sync(dir);
        Ok(())
    }

    /// Opens `train.bin`, within [`Meta::read_with`].
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

/// The files of a tokenizer, which go where its tokens go.
fn contents(tokenizer: &Tokenizer) -> impl Iterator<Item = (&String, &Vec<u8>)> {
    tokenizer.file().into_iter().flat_map(|file| file.contents())
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

/// Makes renames lasting, as far as the file system can.
fn sync(dir: &Path) {
    let _ = File::open(dir).and_then(|dir| dir.sync_all());
}

fn remove_if_there(path: &Path) -> Outcome {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Failure::io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// A path in JSON.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum JsonPath {
    Text(String),
    Bytes { unix_bytes: Vec<u8> },
}

fn write_path<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    let path = match path.to_str() {
        Some(text) => JsonPath::Text(text.to_owned()),
        None => JsonPath::Bytes { unix_bytes: path.as_os_str().as_bytes().to_vec() },
    };
    path.serialize(serializer)
}

fn read_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    Ok(match JsonPath::deserialize(deserializer)? {
        JsonPath::Text(text) => text.into(),
        JsonPath::Bytes { unix_bytes } => OsString::from_vec(unix_bytes).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens_file::TokensFile;

    fn write(dir: &Path, token: u32, with_val: bool) -> Outcome {
        let sealed = |name| {
            let mut file = TokensFile::create(dir.join(name), Width::U16).unwrap();
            file.push(&[token]).unwrap();
            file.seal().unwrap()
        };
        let mut meta = Meta::new(&Tokenizer::Bytes, Vec::new());
        (meta.train_tokens, meta.val_tokens) = (1, u64::from(with_val));
        meta.publish(dir, &Tokenizer::Bytes, sealed(TRAIN_FILE), with_val.then(|| sealed(VAL_FILE)))
    }

    #[test]
    fn a_folder_that_is_half_replaced_is_not_taken_for_whole() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        write(dir, 1, true).unwrap();
        assert!(Meta::read(dir).unwrap().open_val(dir).unwrap().is_some());
        // What a kill between two renames leaves.
        fs::copy(dir.join(META_FILE), dir.join(PENDING_FILE)).unwrap();
        let failure = Meta::read(dir).unwrap_err();
        assert!(failure.message.contains("prepare the data again"), "{}", failure.message);
        // The next run puts it right.
        write(dir, 2, false).unwrap();
        assert!(Meta::read(dir).unwrap().open_val(dir).unwrap().is_none());
        assert_eq!(fs::read_dir(dir).unwrap().count(), 2);
    }

    #[test]
    fn a_folder_that_is_replaced_while_it_is_read_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        write(dir, 1, true).unwrap();
        // The same description, word for word.
        let again = |_: &Meta| write(dir, 2, true);
        let failure = Meta::read_with(dir, again).unwrap_err();
        assert!(failure.message.contains("its files are being replaced"), "{}", failure.message);
        let (_, tokens) = Meta::read_with(dir, |meta| meta.open_train(dir)).unwrap();
        assert_eq!(tokens.token_count(), 1);
    }

    #[test]
    fn where_nothing_can_be_replaced_the_older_result_stays() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        fs::create_dir_all(dir.join(TRAIN_FILE).join("in the way")).unwrap();
        fs::write(dir.join(META_FILE), "old").unwrap();
        assert!(write(dir, 1, false).unwrap_err().message.contains("cannot create"));
        assert!(!dir.join(PENDING_FILE).exists());
        assert_eq!(fs::read(dir.join(META_FILE)).unwrap(), b"old");
    }

    #[test]
    fn any_path_survives_json() {
        for bytes in [&b"a/b.txt"[..], b"caf\xe9", "語".as_bytes(), b"{\"unix_bytes\": []}"] {
            let path = PathBuf::from(OsString::from_vec(bytes.to_vec()));
            let source = Source { path, ..Source::default() };
            let json = serde_json::to_string(&source).unwrap();
            assert_eq!(serde_json::from_str::<Source>(&json).unwrap(), source, "{json}");
        }
        let old = r#"{"path": "a", "train_bytes": 1, "val_bytes": 2}"#;
        assert_eq!(serde_json::from_str::<Source>(old).unwrap().val_bytes, 2);
    }
}
