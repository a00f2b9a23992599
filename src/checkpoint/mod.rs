//! Checkpoints: a Hugging Face `gpt2` folder plus the training state, written atomically.
//!
//! | file | content |
//! | --- | --- |
//! | `config.json` | the model's shape, for this library and for `transformers`, and what else was in the one it was loaded with |
//! | `model.safetensors` | the weights under Hugging Face's names, in f32 or, of a model that is saved for others, as `stored.rs` says |
//! | `trainer.json` | step, seed, options; only of a trainer |
//! | `trainer.safetensors` | what the optimizer keeps, such as the moments `m.NAME` and `v.NAME`, and what the recipe keeps of weights, such as the means `ema.NAME`; only of a trainer |
//!
//! A folder is replaced as a whole or not at all. Every tensor has a checksum, the weights know the
//! shape that they were saved with, and the state knows the two tensor files beside it, so that
//! damage and mixed-up files are errors and not a worse model.

mod adapter;
mod adapter_parts;
mod config;
mod files;
mod folder;
mod found;
mod in_place;
mod keys;
mod llama;
mod parts;
mod state;
mod stored;
mod tensors;
mod weights;

use std::collections::HashSet;
use std::fs::{File, FileType};
use std::ops::Deref;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use crate::gpt::{ModelConfig, TensorInfo};
use crate::optim::State;
use crate::optim::moments::{E4m3, F16, GROUP, is_tensor_scale};
use crate::reserve::{self, Spare};
use crate::run::TrainerState;
use crate::{Error, Result};
pub(crate) use adapter::{AdapterFiles, save as save_adapters};
pub(crate) use config::FoundConfig;
pub(crate) use files::Place;
pub use files::{FileRead, FileSave, Files, MemoryFiles};
use files::{NewFiles, OpenFile};
pub(crate) use folder::{existing, put_back};
use parts::InParts;
pub(crate) use safetensors::tensor::Dtype;
use stored::Stored;
pub use stored::StoredWeights;
pub(crate) use tensors::decode;
use tensors::{FLOATS, Named, TensorFile};
use weights::{Index, Weights};

const CONFIG: &str = "config.json";
const MODEL: &str = "model.safetensors";
const STATE: &str = "trainer.json";
const MOMENTS: &str = "trainer.safetensors";
const FILES: [&str; 4] = [CONFIG, MODEL, STATE, MOMENTS];

/// Where the weights lie in several files, which transformers makes of large models: which file has
/// which tensor. Read, never written.
const INDEX: &str = "model.safetensors.index.json";

/// Metadata key of `model.safetensors`: the shape that the weights were saved with.
const SHAPE: &str = "mxfp4train.config";

/// No `config.json` or `trainer.json`, and no header of a tensor file, comes near this size.
const MAX_JSON: u64 = 1 << 24;

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its name there.
    pub name: String,
    /// Its number format, as safetensors calls it: `F32`, `BF16`...
    pub dtype: String,
    /// Its shape there.
    pub shape: Vec<usize>,
}

/// Tensors that can be saved, in the shapes and order of Hugging Face's.
pub(crate) trait TensorRead {
    /// Name and shape of every tensor.
    fn tensors(&self) -> &[TensorInfo];
    /// What a file has the elements of tensor `index` as, which can hold every one of them.
    fn dtype(&self, _index: usize) -> Dtype {
        Dtype::F32
    }
    /// Copies tensor `index` into `out` (row-major, as many elements as its shape says), by way of
    /// `scratch`.
    fn read(&self, index: usize, out: &mut [f32], scratch: &mut Scratch) -> Result<()>;
    /// The bytes of tensor `index` as the file has them, in the same order, where they are kept as
    /// such, one an element; then nothing else reads it.
    fn codes<'s>(&self, _index: usize, _scratch: &'s mut Scratch) -> Option<Result<&'s [u8]>> {
        None
    }
}

/// Memory for a tensor on its way, which the next one takes over.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) numbers: Vec<f32>,
    pub(crate) bytes: Vec<u8>,
    /// Bytes in another order.
    pub(crate) turned: Vec<u8>,
}

/// Takes the values of (state, tensor).
type WriteState<'a> = dyn FnMut(usize, usize, StateValues<'_>) -> Result<()> + 'a;

/// What is behind the name of a weight where its state is kept in numbers that have scales.
pub(crate) const CODES: &str = ".codes";
/// And of these scales.
pub(crate) const SCALES: &str = ".scales";

/// What a file holds of a state of one weight.
#[derive(Clone, Copy)]
pub(crate) enum StateValues<'a> {
    /// In the order of the file.
    Numbers(&'a [f32]),
    /// Codes in the order of the file, and the scale of each group of neighbours in memory.
    Codes { codes: &'a [u8], scales: &'a [f32] },
    /// In the order of the file, all to be multiplied by the same: of E4M3 where the state is signed,
    /// else of fp16.
    Scaled { numbers: &'a [f32], scale: f32 },
}

impl<'a> StateValues<'a> {
    /// The least number, or a scale below 0, which there are none.
    pub(crate) fn least(&self) -> f32 {
        let (Self::Numbers(values)
        | Self::Codes { scales: values, .. }
        | Self::Scaled { numbers: values, .. }) = self;
        values.iter().fold(0.0, |least, value| least.min(*value))
    }
}

/// The model of a checkpoint.
pub(crate) struct ModelPart<'a> {
    pub(crate) config: &'a ModelConfig,
    /// `config.json` as it was found, of a model that was loaded.
    pub(crate) found: Option<&'a FoundConfig>,
    pub(crate) weights: &'a dyn TensorRead,
    /// What its file has them as.
    pub(crate) stored: StoredWeights,
}

/// The training part of a checkpoint.
pub(crate) struct TrainerPart<'a> {
    pub(crate) state: &'a TrainerState,
    /// Each state that the optimizer of `state` keeps, named as the weights that it belongs to.
    pub(crate) states: &'a [&'a dyn TensorRead],
    /// What else is kept of some weights, likewise.
    pub(crate) others: &'a [(State, &'a dyn TensorRead)],
}

/// A number that is kept of each element of some tensors.
#[derive(Clone, Copy)]
pub(crate) struct Kept<'a> {
    pub(crate) state: State,
    pub(crate) tensors: &'a [TensorInfo],
}

/// Writes a whole checkpoint, or leaves the one that is there untouched.
///
/// A folder and its missing parents are created. Whatever else is in an existing checkpoint folder,
/// such as a tokenizer, stays; a training state is replaced by `trainer` or removed, as it would
/// not fit the new weights. Needs disk space for both checkpoints and memory for the largest
/// tensor.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] for a folder that must not be written to (a file, a folder with
/// other content and no checkpoint); [`Error::NotFinite`] for a NaN or infinite weight or moment.
pub(crate) fn save(
    place: Place<'_>,
    model: ModelPart<'_>,
    trainer: Option<TrainerPart<'_>>,
) -> Result<()> {
    let ModelPart { config, found, weights, stored } = model;
    // Of its names, too, which MXFP4 doubles.
    let _spare_for_names = room_for_headers(weights.tensors().iter())?;
    let weights = &InParts::new(config, weights)?;
    let weights = &Stored::new(weights, stored) as &dyn TensorRead;
    let states = trainer.iter().flat_map(|trainer| trainer.states).copied();
    let others = trainer.iter().flat_map(|trainer| trainer.others).map(|(_, values)| *values);
    let tensors = states.chain(others).chain([weights]).flat_map(TensorRead::tensors);
    let _spare = room_for_headers(tensors)?;
    let model = ModelPart { config, found, weights, stored };
    place.replace(&FILES, MODEL, |new| write_files(new, &model, trainer.as_ref()))
}

/// Writes the files of a model that is named as it is stored.
fn write_files(
    new: &mut NewFiles<'_>,
    &ModelPart { config, found, weights, stored }: &ModelPart<'_>,
    trainer: Option<&TrainerPart<'_>>,
) -> Result<()> {
    new.put(CONFIG, config::to_json(config, found, stored).as_bytes())?;
    let extra = [(SHAPE, config::summary(config))];
    let named = name_all(weights, |name| name.to_owned());
    let model = tensors::write(new, MODEL, &named, &extra)?;

    let Some(TrainerPart { state, states, others }) = trainer else { return Ok(()) };
    let kept = state.options.optimizer.states().iter().zip(*states);
    let kept = kept.chain(others.iter().map(|(state, values)| (state, values)));
    let named: Vec<_> =
        kept.flat_map(|(state, values)| name_all(*values, |name| state.tensor(name))).collect();
    let moments = tensors::write(new, MOMENTS, &named, &[])?;
    let text = state::to_json(&new.path(STATE), state, state::Sisters { model, moments })?;
    new.put(STATE, text.as_bytes())
}

/// An open checkpoint. The files of a folder are of one save, even while another save replaces it:
/// use one object for all parts of a load.
pub(crate) struct Checkpoint<'a> {
    /// The folder, for messages; empty where there is none.
    dir: PathBuf,
    /// As [`FILES`]; None where there is no such file.
    files: [Option<OpenFile<'a>>; 4],
    /// In place of [`MODEL`]: the index, and the files that it names.
    shards: Option<(Index, Vec<OpenFile<'a>>)>,
}

impl<'a> Checkpoint<'a> {
    /// Opens the folder and the files that are there.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a folder without `config.json` or weights, or with a
    /// damaged index.
    pub(crate) fn open(dir: &Path) -> Result<Checkpoint<'static>> {
        const TRIES: usize = 16;
        for attempt in 1.. {
            let dir = folder::existing(dir);
            let io = |e: Errno| Error::io("open", &dir)(e.into());
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let folder = openat(CWD, &dir, flags, Mode::empty()).map_err(io)?;
            let files = open_files(&folder, &dir)?;
            let open = |name: &str| {
                let opened = in_place::open_file(&folder, name);
                let opened = opened.map_err(|e| cannot_open(&dir.join(name), e))?;
                Ok(opened.map(OpenFile::Disk))
            };
            let shards = if files[1].is_none() { open_shards(&dir, &open)? } else { None };
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
            let files = files.map(|file| file.map(OpenFile::Disk));
            let checkpoint = Checkpoint { dir, files, shards };
            checkpoint.check_complete()?;
            return Ok(checkpoint);
        }
        unreachable!("the last attempt returns")
    }

    /// Opens those of a set of files that there are.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub(crate) fn open_files(files: &'a dyn Files) -> Result<Self> {
        let open = |name: &str| {
            let opened = files.open(name).map_err(Error::io("open", Path::new(name)))?;
            Ok(opened.map(OpenFile::Host))
        };
        let dir = PathBuf::new();
        let [config, model, state, moments] = FILES.map(open);
        let files = [config?, model?, state?, moments?];
        let shards = if files[1].is_none() { open_shards(&dir, &open)? } else { None };
        let checkpoint = Self { dir, files, shards };
        checkpoint.check_complete()?;
        Ok(checkpoint)
    }

    /// What messages call it.
    pub(crate) fn path(&self) -> &Path {
        if self.is_folder() { &self.dir } else { Path::new(MOMENTS) }
    }

    fn is_folder(&self) -> bool {
        !self.dir.as_os_str().is_empty()
    }

    /// The model's shape, and the file that it was read from.
    ///
    /// # Errors
    /// [`Error::Format`] for a damaged `config.json` or one of a model that is not supported,
    /// naming the key; [`Error::Mismatch`] where the weights were saved with another shape or are
    /// too small for this one.
    pub(crate) fn config(&self) -> Result<(ModelConfig, FoundConfig)> {
        let path = self.dir.join(CONFIG);
        let (mut config, found) = config::from_json(&path, &self.json(0)?)?;
        let weights = self.weight_files()?;
        config.tied_head = weights.is_tied(&config)?;
        if let Some(saved) = weights.metadata(SHAPE)
            && saved != config::summary(&config)
        {
            let found = config::summary(&config);
            let message = format!(
                "the weights beside it were saved with {saved}; this file says {found}: it was \
                 damaged, edited or taken from another model"
            );
            return Err(Error::mismatch(&path, message));
        }
        // Before anyone allocates memory for what a damaged file announces.
        let (count, bytes) = (config.parameter_count(), weights.bytes());
        if count.saturating_mul(weights.least_bits()) / 8 > bytes {
            let name = if self.shards.is_some() { "its weights" } else { MODEL };
            let message = format!(
                "a model of this shape has {count} parameters, and {name} has only {bytes} bytes"
            );
            return Err(Error::mismatch(&path, message));
        }
        Ok((config, found))
    }

    /// The weights: calls `write(index, values)` once for every entry of `tensors`, in order.
    ///
    /// Names may lack the prefix `transformer.` or `model.`. Buffers (`attn.bias`, `attn.masked_bias`,
    /// `rotary_emb.inv_freq`) are passed over, and so is a head where the model has none of its own; but one that stands in
    /// place of the embedding is read.
    ///
    /// # Errors
    /// [`Error::Format`] for a missing or damaged tensor, [`Error::Mismatch`] for one of another
    /// shape or one that the model does not have, [`Error::NotFinite`] for a NaN or infinite
    /// weight.
    pub(crate) fn weights(
        &self,
        config: &ModelConfig,
        tensors: &[TensorInfo],
        write: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        self.weight_files()?.read(config, tensors, write)
    }

    /// All tensors of the files with the weights, in their order.
    ///
    /// # Errors
    /// [`Error::Format`] for a damaged header.
    pub(crate) fn stored_tensors(&self) -> Result<Vec<StoredTensor>> {
        Ok(self.weight_files()?.files.iter().flat_map(TensorFile::stored).collect())
    }

    /// Whether there is a training state.
    pub(crate) fn has_state(&self) -> bool {
        self.files[2].is_some()
    }

    /// The text of the training state, if there is any.
    pub(crate) fn state_text(&self) -> Result<Option<Vec<u8>>> {
        self.has_state().then(|| Ok(self.json(2)?.text)).transpose()
    }

    /// The training state, after a check that the tensor files beside it are those of its save.
    ///
    /// # Errors
    /// [`Error::Format`] for a missing or damaged `trainer.json`; [`Error::Mismatch`] where a
    /// tensor file is another one than this state was saved with.
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

    /// What is kept of weights: calls `write(number, index, values)` for each of `kept` and every
    /// one of its tensors, in order.
    ///
    /// # Errors
    /// As [`Checkpoint::weights`], and [`Error::Mismatch`] where one of `kept` is not there at all.
    pub(crate) fn states(&self, kept: &[Kept<'_>], write: &mut WriteState<'_>) -> Result<()> {
        let file = self.tensors(3)?;
        let known: HashSet<_> = kept
            .iter()
            .flat_map(|Kept { state, tensors }| tensors.iter().map(|t| (state.name, &*t.name)))
            .collect();
        let parts = |name: &str| {
            let whole = [CODES, SCALES].iter().find_map(|part| name.strip_suffix(part));
            whole.unwrap_or(name).split_once('.').is_some_and(|name| known.contains(&name))
        };
        file.check_surplus(parts)?;
        let names = file.names();
        let (mut values, mut codes, mut scales) = (Vec::new(), Vec::new(), Vec::new());
        for (number, Kept { state, tensors }) in kept.iter().enumerate() {
            let is_of =
                |name: &String| name.split_once('.').is_some_and(|(of, _)| of == state.name);
            // Of a state that no tensor has which is trained, there is nothing.
            if !tensors.is_empty() && !names.iter().any(is_of) {
                let State { name, what, .. } = state;
                let message = format!(
                    "holds no {what} of any weight, {name}.NAME, which the recipe and the optimizer \
                     in {STATE} go on from: it was saved by others; start a new trainer from the \
                     model"
                );
                return Err(Error::mismatch(file.path(), message));
            }
            for (index, tensor) in tensors.iter().enumerate() {
                let name = state.tensor(&tensor.name);
                let [of_codes, of_scales] = [CODES, SCALES].map(|part| format!("{name}{part}"));
                if !file.contains(&of_codes) {
                    file.read(&name, &tensor.shape, &FLOATS, &mut values)?;
                    write(number, index, StateValues::Numbers(&values))?;
                    continue;
                }
                let [code, float] = match state.is_signed {
                    true => [Dtype::I8, Dtype::F8_E4M3],
                    false => [Dtype::U8, Dtype::F16],
                };
                let damaged = |expected: std::fmt::Arguments<'_>| {
                    let message = format!(
                        "damaged or edited: expected {expected}; restore the file from a copy"
                    );
                    Err(Error::format(file.path(), message))
                };
                if file.contains(&name) {
                    return damaged(format_args!("{of_codes} or {name}, found both"));
                }
                if file.dtype(&of_codes) == Some(code) {
                    file.read_codes(&of_codes, &tensor.shape, &mut codes)?;
                    let groups = tensor.len().div_ceil(GROUP);
                    file.read(&of_scales, &[groups], &FLOATS, &mut scales)?;
                    if let Some(scale) = scales.iter().find(|scale| **scale < 0.0) {
                        return damaged(format_args!("{of_scales} from 0 on, found {scale:e}"));
                    }
                    // Codes of first moments go from -127 to 127.
                    if state.is_signed && codes.contains(&(-128i8 as u8)) {
                        return damaged(format_args!("codes of {name} from -127 on, found -128"));
                    }
                    write(number, index, StateValues::Codes { codes: &codes, scales: &scales })?;
                    continue;
                }
                file.read(&of_codes, &tensor.shape, &[code, float], &mut values)?;
                file.read(&of_scales, &[1], &FLOATS, &mut scales)?;
                let scale = scales[0];
                let is_one = match state.is_signed {
                    true => is_tensor_scale::<E4m3>(scale),
                    false => is_tensor_scale::<F16>(scale),
                };
                if !is_one {
                    return damaged(format_args!(
                        "of {of_scales} a power of two, or 0 where nothing is stored, found {scale:e}"
                    ));
                }
                write(number, index, StateValues::Scaled { numbers: &values, scale })?;
            }
        }
        Ok(())
    }

    /// An error for a folder that has no model in it, with the best reason that can be found.
    fn check_complete(&self) -> Result<()> {
        let has_config = self.files[0].is_some();
        if has_config && (self.files[1].is_some() || self.shards.is_some()) {
            return Ok(());
        }
        if has_config {
            // Whoever has a model of another kind need not convert it first to be told.
            config::from_json(&self.dir.join(CONFIG), &self.json(0)?)?;
        }
        if self.is_folder() {
            return Err(found::no_checkpoint(&self.dir, has_config));
        }
        let (missing, or) =
            if has_config { (MODEL, ", and no index of several") } else { (CONFIG, "") };
        let message =
            format!("expected a file of this name, for a checkpoint has one; found none{or}");
        Err(Error::format(Path::new(missing), message))
    }

    fn weight_files(&self) -> Result<Weights<'_>> {
        let Some((index, files)) = &self.shards else {
            let file = self.tensors(1)?;
            let path = file.path().to_owned();
            return Ok(Weights { path, files: vec![file], index: None });
        };
        let files = index.files.iter().zip(files).map(|(name, file)| {
            let path = self.dir.join(name);
            file.check_is_file(&path)?;
            TensorFile::open(&path, file)
        });
        let (path, files) = (self.dir.join(INDEX), files.collect::<Result<_>>()?);
        Ok(Weights { path, files, index: Some(index) })
    }

    fn tensors(&self, index: usize) -> Result<TensorFile<'_>> {
        let (path, file) = self.file(index)?;
        TensorFile::open(&path, file)
    }

    fn json(&self, index: usize) -> Result<JsonText> {
        let (path, file) = self.file(index)?;
        read_json(&path, file)
    }

    fn file(&self, index: usize) -> Result<(PathBuf, &OpenFile<'_>)> {
        let path = self.dir.join(FILES[index]);
        let Some(file) = &self.files[index] else {
            let message = "no such file: there is a model without its training state, \
                           which a new trainer can start from but not resume";
            return Err(Error::format(&path, message));
        };
        file.check_is_file(&path)?;
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
        *file = opened.map_err(|e| cannot_open(&dir.join(name), e))?;
    }
    Ok(files)
}

/// Device and inode of each file, as long as it is open no other's.
fn identities(files: &[Option<File>; 4]) -> [Option<(u64, u64)>; 4] {
    let identity = |file: &File| file.metadata().ok().map(|m| (m.dev(), m.ino()));
    files.each_ref().map(|file| file.as_ref().and_then(identity))
}

/// The index of a folder and the files that it names, where there is one; `open` opens a file of
/// the folder.
fn open_shards<'a>(
    dir: &Path,
    open: &impl Fn(&str) -> Result<Option<OpenFile<'a>>>,
) -> Result<Option<(Index, Vec<OpenFile<'a>>)>> {
    let Some(file) = open(INDEX)? else { return Ok(None) };
    let path = dir.join(INDEX);
    file.check_is_file(&path)?;
    let index = Index::from_json(&path, &read_json(&path, &file)?)?;
    let files = index.files.iter().map(|name| {
        if let Some(file) = open(name)? {
            return Ok(file);
        }
        if !dir.as_os_str().is_empty() {
            found::check_link(&dir.join(name))?;
        }
        let message = format!(
            "names the file {name}, which is not there; get all {} files of the weights",
            index.files.len()
        );
        Err(Error::format(&path, message))
    });
    let files = files.collect::<Result<_>>()?;
    Ok(Some((index, files)))
}

/// The error for what the system does not open, of which sockets are a part.
fn cannot_open(path: &Path, error: Errno) -> Error {
    match path.metadata().map(|metadata| metadata.file_type()) {
        Ok(kind) if error == Errno::NXIO && !kind.is_file() => {
            Error::format(path, not_a_file(kind))
        }
        _ => Error::io("open", path)(error.into()),
    }
}

/// Why nothing is read from what is no file.
fn not_a_file(kind: FileType) -> String {
    let kind = match kind {
        kind if kind.is_dir() => "folder",
        kind if kind.is_fifo() => "pipe",
        kind if kind.is_socket() => "socket",
        _ => "device",
    };
    format!("expected a file, found a {kind}")
}

/// The text of a small file that should be JSON, and memory for its values.
struct JsonText {
    text: Vec<u8>,
    _spare: Spare,
}

impl Deref for JsonText {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.text
    }
}

fn read_json(path: &Path, file: &OpenFile<'_>) -> Result<JsonText> {
    let length = file.size(path)?;
    if length > MAX_JSON {
        let message = format!("expected JSON of at most {MAX_JSON} bytes, found {length}");
        return Err(Error::format(path, message));
    }
    let mut text = reserve::zeros("a file of JSON", length as usize)?;
    file.read_exact_at(path, &mut text, 0)?;
    found::check_fetched(path, &text)?;
    let spare = room_for_json(text.len())?;
    Ok(JsonText { text, _spare: spare })
}

/// The memory that the values of a JSON text of `len` bytes take at most: serde_json, and the maps
/// and lists that are made of them, end the process where there is none.
fn room_for_json(len: usize) -> Result<Spare> {
    /// An array of objects with one entry each: a node of a map for 8 bytes.
    const FOR_ONE: usize = 100;
    Spare::new("the values of a JSON text", len * FOR_ONE)
}

/// The memory that the names of `tensors` and the headers of their files take at most while they
/// are saved.
fn room_for_headers<'a>(tensors: impl Iterator<Item = &'a TensorInfo>) -> Result<Spare> {
    /// The entries of four lists and maps, while they grow, and what stands beside a name in the
    /// texts.
    const A_TENSOR: usize = 2048;
    /// In two lists, two maps and three texts, while they grow.
    const A_LETTER: usize = 20;
    let size = |tensor: &TensorInfo| A_TENSOR + A_LETTER * tensor.name.len();
    Spare::new("the headers of tensor files", tensors.map(size).sum())
}

fn name_all<'a>(source: &'a dyn TensorRead, name: impl Fn(&str) -> String) -> Vec<Named<'a>> {
    let named =
        |(index, tensor): (usize, &TensorInfo)| Named { name: name(&tensor.name), source, index };
    source.tensors().iter().enumerate().map(named).collect()
}

#[cfg(test)]
mod tests;
