//! The weights of a model as they lie in a folder: in one tensor file, or in several and an index.
//!
//! Writers differ in names, too. The prefix `transformer.`, or `model.` of Llama's, may be missing; and of the two names
//! that tied weights have, the embedding's and the head's, either may be the one that was kept.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;
use serde::Deserialize;

use super::SCALES;
use super::parts::{self, Part};
use super::stored::Linear;
use super::tensors::{FLOATS, TensorFile, check_finite};
use crate::formats::BLOCK;
use crate::gpt::{HEAD, ModelConfig, TensorInfo};
use crate::reserve::reuse;
use crate::{Error, Result};

/// More files than any model comes in: each is kept open.
const MAX_FILES: usize = 512;

/// `model.safetensors.index.json`: which file has which tensor.
pub(super) struct Index {
    /// Names of files in the same folder.
    pub(super) files: Vec<String>,
    /// The number of each tensor's file.
    places: BTreeMap<String, usize>,
}

impl Index {
    /// Reads the index's text; messages call it `path`.
    ///
    /// # Errors
    /// [`Error::Format`], also for a name that leads out of the folder.
    pub(super) fn from_json(path: &Path, text: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Document {
            weight_map: BTreeMap<String, String>,
        }
        let Document { weight_map } = serde_json::from_slice(text).map_err(|e| {
            Error::format(path, format!("expected an index of tensors in JSON: {e}"))
        })?;
        let mut files: Vec<_> = weight_map.values().cloned().collect();
        files.sort_unstable();
        files.dedup();
        if files.is_empty() || files.len() > MAX_FILES {
            let message = format!("expected 1 to {MAX_FILES} files, found {}", files.len());
            return Err(Error::format(path, message));
        }
        if let Some(name) = files.iter().find(|name| !is_plain(name)) {
            let message = format!("expected names of files in its own folder, found {name:?}");
            return Err(Error::format(path, message));
        }
        let place = |file: &String| files.binary_search(file).expect("every file is listed");
        let places = weight_map.iter().map(|(name, file)| (name.clone(), place(file))).collect();
        Ok(Self { files, places })
    }
}

/// Whether it is one component of a path.
fn is_plain(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', '\0'])
}

/// The open files of a model's weights.
pub(super) struct Weights<'a> {
    /// What names the files, for messages: the index, or the only one itself.
    pub(super) path: PathBuf,
    pub(super) files: Vec<TensorFile<'a>>,
    /// None where there is only one.
    pub(super) index: Option<&'a Index>,
}

impl Weights<'_> {
    /// Size of all files in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.files.iter().map(TensorFile::bytes).sum()
    }

    /// Bits of an element, at least.
    pub(super) fn least_bits(&self) -> u64 {
        let in_4 = |file: &TensorFile<'_>| file.names().iter().any(|name| file.is_mxfp4(name));
        if self.files.iter().any(in_4) { 4 } else { 16 }
    }

    /// An entry of the metadata. Files that were split have none of ours.
    pub(super) fn metadata(&self, key: &str) -> Option<&str> {
        self.files.iter().find_map(|file| file.metadata(key))
    }

    /// Whether head and embedding are one tensor, given what `config.json` says. A head of its own
    /// that is there counts for more, unless it is the embedding once more.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::OutOfMemory`].
    pub(super) fn is_tied(&self, config: &ModelConfig) -> Result<bool> {
        let name = self.own_name(config.embedding_name());
        let (Some(wte), Some(head)) = (self.file_of(name), self.file_of(HEAD)) else {
            return Ok(config.tied_head);
        };
        Ok(config.tied_head && head.holds_same(HEAD, wte, name)?)
    }

    /// Calls `write(index, values)` once for every entry of `tensors`, in order.
    ///
    /// # Errors
    /// As of `Checkpoint::weights`.
    pub(super) fn read(
        &self,
        config: &ModelConfig,
        tensors: &[TensorInfo],
        write: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let parts = parts::parts(config, tensors)?;
        let (tied, wte) = (config.tied_head, config.embedding_name());
        let names: Vec<_> = parts
            .iter()
            .map(|part| match self.own_name(&part.info.name) {
                // The same weights by their other name.
                name if part.info.name == wte && tied && self.file_of(name).is_none() => {
                    self.file_of(HEAD).map_or(name, |_| HEAD)
                }
                name => name,
            })
            .collect();
        let known: HashSet<_> = names.iter().copied().collect();
        self.check_surplus(|name| {
            // What older versions saved, masks and frequencies; and a head that is tied.
            let ends = ["attn.bias", "attn.masked_bias", "rotary_emb.inv_freq"];
            let buffer = ends.iter().any(|end| name.ends_with(end));
            let scales = name.strip_suffix(SCALES).is_some_and(|name| {
                known.contains(name) && self.file_of(name).is_some_and(|file| file.is_mxfp4(name))
            });
            buffer || scales || known.contains(name) || (tied && name == HEAD)
        })?;
        let (mut values, mut whole) = (Vec::new(), Vec::new());
        for (name, Part { info, index, range }) in names.iter().zip(&parts) {
            let file = self.file_of(name).ok_or_else(|| self.missing(name))?;
            match Linear::of(info).filter(|_| file.is_mxfp4(name)) {
                Some(linear) => self.read_mxfp4(file, name, linear, &mut values)?,
                None => file.read(name, &info.shape, &FLOATS, &mut values)?,
            }
            let len = tensors[*index].len();
            if range.len() == len {
                write(*index, &values)?;
                continue;
            }
            let whole = reuse(&mut whole, "a tensor", len)?;
            whole[range.clone()].copy_from_slice(&values);
            if range.end == len {
                write(*index, whole)?;
            }
        }
        Ok(())
    }

    /// Reads the numbers that codes and scales stand for, as `stored.rs` has them.
    fn read_mxfp4(
        &self,
        file: &TensorFile<'_>,
        name: &str,
        linear: Linear,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        let [outputs, blocks] = [linear.outputs, linear.blocks()];
        file.read(name, &[outputs, blocks * BLOCK], &[Dtype::F4], &mut codes)?;
        let of_scales = format!("{name}{SCALES}");
        let file = self.file_of(&of_scales).ok_or_else(|| self.missing(&of_scales))?;
        file.read(&of_scales, &[outputs, blocks], &[Dtype::F8_E8M0], &mut scales)?;
        linear.dequantized(&mut codes, &scales, out)?;
        // The largest scales make numbers that f32 does not have.
        check_finite(file.path(), name, out)
    }

    /// The name that the files have for one of our tensors.
    fn own_name<'n>(&self, name: &'n str) -> &'n str {
        let short = ["transformer.", "model."].iter().find_map(|prefix| name.strip_prefix(prefix));
        match short {
            Some(short) if self.file_of(name).is_none() && self.file_of(short).is_some() => short,
            _ => name,
        }
    }

    /// The file that should have a tensor; None where none should.
    fn file_of(&self, name: &str) -> Option<&TensorFile<'_>> {
        match self.index {
            Some(index) => index.places.get(name).map(|place| &self.files[*place]),
            None => self.files.first().filter(|file| file.contains(name)),
        }
    }

    fn missing(&self, name: &str) -> Error {
        let why = match name {
            HEAD => {
                "; config.json says tie_word_embeddings: false, so the head has weights of its own: \
                 if it has not, say true there"
            }
            _ => "",
        };
        Error::format(&self.path, format!("tensor {name}: missing{why}"))
    }

    /// A tensor that the model has no place for is a sign of a wrong `config.json`.
    fn check_surplus(&self, known: impl Fn(&str) -> bool) -> Result<()> {
        for (place, file) in self.files.iter().enumerate() {
            file.check_surplus(&known)?;
            let Some(index) = self.index else { continue };
            let listed = |name: &String| index.places.get(name) == Some(&place);
            if let Some(name) = file.names().iter().find(|name| !listed(name)) {
                let message =
                    format!("holds the tensor {name}, which the index does not have there");
                return Err(Error::mismatch(file.path(), message));
            }
        }
        Ok(())
    }
}
