//! Checkpoints: a Hugging Face `gpt2` folder plus the training state, written atomically.
//!
//! | file | content |
//! | --- | --- |
//! | `config.json` | the model's shape, for this library and for `transformers` |
//! | `model.safetensors` | the weights in f32, under Hugging Face's names |
//! | `trainer.json` | step, seed, options; only of a trainer |
//! | `trainer.safetensors` | AdamW's moments, `m.NAME` and `v.NAME`; only of a trainer |
//!
//! A folder is replaced as a whole or not at all. Every tensor has a checksum, the weights know the
//! shape that they were saved with, and the state knows the two tensor files beside it, so that
//! damage and mixed-up files are errors and not a worse model.

mod config;
mod folder;
mod in_place;
mod state;
mod tensors;

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::model::{ModelConfig, TensorInfo};
use crate::trainer::TrainerState;
use crate::{Error, Result};
use tensors::{Named, TensorFile};

const CONFIG: &str = "config.json";
const MODEL: &str = "model.safetensors";
const STATE: &str = "trainer.json";
const MOMENTS: &str = "trainer.safetensors";
const FILES: [&str; 4] = [CONFIG, MODEL, STATE, MOMENTS];

/// Prefixes of the moments' names.
const PREFIXES: [&str; 2] = ["m", "v"];

/// Metadata key of `model.safetensors`: the shape that the weights were saved with.
const SHAPE: &str = "mxfp4train.config";

/// No `config.json` or `trainer.json` comes near this size.
const MAX_JSON: u64 = 1 << 24;

/// Tensors that can be saved: f32, in the shape and order of Hugging Face's `gpt2`.
pub(crate) trait TensorRead {
    /// Name and shape of every tensor.
    fn tensors(&self) -> &[TensorInfo];
    /// Copies tensor `index` into `out` (row-major, as many elements as its shape says).
    fn read(&self, index: usize, out: &mut [f32]) -> Result<()>;
}

/// Takes the values of (moment, tensor).
type WriteMoment<'a> = dyn FnMut(usize, usize, &[f32]) -> Result<()> + 'a;

/// The training part of a checkpoint.
pub(crate) struct TrainerPart<'a> {
    pub(crate) state: &'a TrainerState,
    /// First and second moments, named as the weights that they belong to.
    pub(crate) moments: [&'a dyn TensorRead; 2],
}

/// Writes a whole checkpoint folder, or leaves the one that is there untouched.
///
/// `dir` and missing parents are created. Whatever else is in an existing checkpoint folder, such as
/// a tokenizer, stays; a training state is replaced by `trainer` or removed, as it would not fit the
/// new weights. Needs disk space for both checkpoints and memory for the largest tensor.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] for a `dir` that must not be written to (a file, a folder with
/// other content and no checkpoint); [`Error::NotFinite`] for a NaN or infinite weight or moment.
pub(crate) fn save(
    dir: &Path,
    config: &ModelConfig,
    weights: &dyn TensorRead,
    trainer: Option<TrainerPart<'_>>,
) -> Result<()> {
    folder::replace(dir, &FILES, MODEL, |new| {
        folder::write_file(&new.join(CONFIG), config::to_json(config).as_bytes())?;
        let extra = [(SHAPE, config::summary(config))];
        let named = name_all(weights, |name| name.to_owned());
        let model = tensors::write(&new.join(MODEL), &named, &extra)?;

        let Some(TrainerPart { state, moments }) = &trainer else { return Ok(()) };
        let named: Vec<_> = PREFIXES
            .iter()
            .zip(moments)
            .flat_map(|(prefix, moment)| name_all(*moment, move |name| format!("{prefix}.{name}")))
            .collect();
        let moments = tensors::write(&new.join(MOMENTS), &named, &[])?;
        let path = new.join(STATE);
        let text = state::to_json(&path, state, state::Sisters { model, moments })?;
        folder::write_file(&path, text.as_bytes())
    })
}

/// An open checkpoint folder. Its files are of one save, even while another save replaces it: use
/// one object for all parts of a load.
pub(crate) struct Checkpoint {
    /// The folder, for messages.
    dir: PathBuf,
    /// As [`FILES`]; None where there is no such file.
    files: [Option<File>; 4],
}

impl Checkpoint {
    /// Opens the folder and the files that are there.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a folder without `config.json` or `model.safetensors`.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        const TRIES: usize = 16;
        for attempt in 1.. {
            let dir = folder::existing(dir);
            let io = |e: rustix::io::Errno| Error::io("open", &dir)(e.into());
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let folder = openat(CWD, &dir, flags, Mode::empty()).map_err(io)?;
            let files = open_files(&folder, &dir)?;
            // A save may have replaced some of them, or the whole folder, while we opened them.
            let stat = |s: rustix::fs::Stat| (s.st_dev, s.st_ino);
            let opened = rustix::fs::fstat(&folder).map(stat).map_err(io)?;
            let current = rustix::fs::stat(&dir).map(stat).ok();
            let is_whole = current == Some(opened) && {
                let again = open_files(&folder, &dir)?;
                identities(&files) == identities(&again)
            };
            if !is_whole && attempt < TRIES {
                continue;
            }
            for (file, name) in files.iter().zip([CONFIG, MODEL]) {
                if file.is_none() {
                    return Err(Error::format(
                        &dir,
                        format!(
                            "expected a checkpoint folder, found no {name} in it (other formats, \
                             such as pytorch_model.bin or weights in several files, are not read)"
                        ),
                    ));
                }
            }
            return Ok(Self { dir, files });
        }
        unreachable!("the last attempt returns")
    }

    /// The model's shape.
    ///
    /// # Errors
    /// [`Error::Format`] for a damaged `config.json` or one of a model that is not supported,
    /// naming the key; [`Error::Mismatch`] where `model.safetensors` was saved with another shape
    /// or is too small for this one.
    pub(crate) fn config(&self) -> Result<ModelConfig> {
        let path = self.dir.join(CONFIG);
        let config = config::from_json(&path, &self.json(0)?)?;
        let model = self.tensors(1)?;
        if let Some(saved) = model.metadata(SHAPE)
            && saved != config::summary(&config)
        {
            let found = config::summary(&config);
            let message = format!(
                "the weights beside it were saved with {saved}; this file says {found}: it was \
                 damaged, edited or taken from another model"
            );
            return Err(Error::mismatch(&path, message));
        }
        // Before anyone allocates memory for what a damaged file announces. 2 bytes: F16, BF16.
        let (count, bytes) = (config.parameter_count(), model.bytes());
        if count.saturating_mul(2) > bytes {
            let message = format!(
                "a model of this shape has {count} parameters, and {MODEL} has only {bytes} bytes"
            );
            return Err(Error::mismatch(&path, message));
        }
        Ok(config)
    }

    /// The weights: calls `write(index, values)` once for every entry of `tensors`, in order.
    ///
    /// Names may lack the prefix `transformer.`. A head of its own (`lm_head.weight`) and buffers
    /// (`attn.bias`, `attn.masked_bias`) are passed over.
    ///
    /// # Errors
    /// [`Error::Format`] for a missing or damaged tensor, [`Error::Mismatch`] for one of another
    /// shape or one that the model does not have, [`Error::NotFinite`] for a NaN or infinite weight.
    pub(crate) fn weights(
        &self,
        tensors: &[TensorInfo],
        write: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let file = self.tensors(1)?;
        let names: Vec<_> = tensors
            .iter()
            .map(|tensor| match tensor.name.strip_prefix("transformer.") {
                Some(short) if !file.contains(&tensor.name) && file.contains(short) => short,
                _ => tensor.name.as_str(),
            })
            .collect();
        let ignored = |name: &str| {
            let buffer = name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias");
            buffer || name == "lm_head.weight"
        };
        let known: HashSet<_> = names.iter().copied().collect();
        self.check_surplus(1, &file, |name| ignored(name) || known.contains(name))?;
        let mut values = Vec::new();
        for (index, (name, tensor)) in names.iter().zip(tensors).enumerate() {
            file.read(name, &tensor.shape, &mut values)?;
            write(index, &values)?;
        }
        Ok(())
    }

    /// Whether there is a training state.
    pub(crate) fn has_state(&self) -> bool {
        self.files[2].is_some()
    }

    /// The training state, after a check that the tensor files beside it are those of its save.
    ///
    /// # Errors
    /// [`Error::Format`] for a missing or damaged `trainer.json`; [`Error::Mismatch`] where a tensor
    /// file is another one than this state was saved with.
    pub(crate) fn state(&self) -> Result<TrainerState> {
        let path = self.dir.join(STATE);
        let (state, sisters) = state::from_json(&path, &self.json(2)?)?;
        for (index, expected) in [(1, sisters.model), (3, sisters.moments)] {
            if self.tensors(index)?.fingerprint() != expected {
                let message = format!(
                    "belongs to another {} than the one beside it; files of two checkpoints were \
                     mixed, or that file is damaged",
                    FILES[index]
                );
                return Err(Error::mismatch(&path, message));
            }
        }
        Ok(state)
    }

    /// AdamW's moments: calls `write(moment, index, values)` for moments 0 and 1 of every entry of
    /// `tensors`, in order.
    ///
    /// # Errors
    /// As [`Checkpoint::weights`].
    pub(crate) fn moments(
        &self,
        tensors: &[TensorInfo],
        write: &mut WriteMoment<'_>,
    ) -> Result<()> {
        let file = self.tensors(3)?;
        let known: HashSet<_> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        self.check_surplus(3, &file, |name| {
            let parts = name.split_once('.');
            parts.is_some_and(|(prefix, name)| PREFIXES.contains(&prefix) && known.contains(name))
        })?;
        let mut values = Vec::new();
        for (moment, prefix) in PREFIXES.iter().enumerate() {
            for (index, tensor) in tensors.iter().enumerate() {
                let name = format!("{prefix}.{}", tensor.name);
                file.read(&name, &tensor.shape, &mut values)?;
                write(moment, index, &values)?;
            }
        }
        Ok(())
    }

    /// A tensor that the model has no place for is a sign of a wrong `config.json`.
    fn check_surplus(
        &self,
        index: usize,
        file: &TensorFile,
        known: impl Fn(&str) -> bool,
    ) -> Result<()> {
        match file.names().into_iter().find(|name| !known(name)) {
            None => Ok(()),
            Some(name) => {
                let message = format!("holds the tensor {name}, which the model does not have");
                Err(Error::mismatch(&self.dir.join(FILES[index]), message))
            }
        }
    }

    fn tensors(&self, index: usize) -> Result<TensorFile> {
        let (path, file) = self.file(index)?;
        TensorFile::open(&path, file)
    }

    fn json(&self, index: usize) -> Result<Vec<u8>> {
        let (path, file) = self.file(index)?;
        let mut text = Vec::new();
        let mut from_start = PositionedRead { file, offset: 0 };
        let read = (&mut from_start).take(MAX_JSON + 1).read_to_end(&mut text);
        read.map_err(Error::io("read", &path))?;
        if text.len() as u64 > MAX_JSON {
            let message = format!("expected JSON of at most {MAX_JSON} bytes, found more");
            return Err(Error::format(&path, message));
        }
        Ok(text)
    }

    fn file(&self, index: usize) -> Result<(PathBuf, &File)> {
        let path = self.dir.join(FILES[index]);
        let Some(file) = &self.files[index] else {
            let message = "no such file: the folder holds a model without its training state, \
                           which a new trainer can start from but not resume";
            return Err(Error::format(&path, message));
        };
        if !file.metadata().map_err(Error::io("open", &path))?.is_file() {
            return Err(Error::format(&path, "expected a file, found a folder, pipe or device"));
        }
        Ok((path, file))
    }
}

/// Opens the [`FILES`] of the checkpoint in `folder`, which messages call `dir`.
fn open_files(folder: &OwnedFd, dir: &Path) -> Result<[Option<File>; 4]> {
    let committed = in_place::Committed::open(folder)
        .map_err(|e| Error::io("open", &dir.join(in_place::COMMIT))(e.into()))?;
    let mut files = [const { None }; 4];
    for (file, name) in files.iter_mut().zip(FILES) {
        let opened = match &committed {
            Some(committed) => committed.file(folder, name),
            None => in_place::open_file(folder, name),
        };
        *file = opened.map_err(|e| Error::io("open", &dir.join(name))(e.into()))?;
    }
    Ok(files)
}

/// Device and inode of each file, as long as it is open no other's.
fn identities(files: &[Option<File>; 4]) -> [Option<(u64, u64)>; 4] {
    let identity = |file: &File| file.metadata().ok().map(|m| (m.dev(), m.ino()));
    files.each_ref().map(|file| file.as_ref().and_then(identity))
}

/// Reads a shared file without moving its position.
struct PositionedRead<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for PositionedRead<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = std::os::unix::fs::FileExt::read_at(self.file, out, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}

fn name_all<'a>(source: &'a dyn TensorRead, name: impl Fn(&str) -> String) -> Vec<Named<'a>> {
    let named =
        |(index, tensor): (usize, &TensorInfo)| Named { name: name(&tensor.name), source, index };
    source.tensors().iter().enumerate().map(named).collect()
}

#[cfg(test)]
mod tests;
