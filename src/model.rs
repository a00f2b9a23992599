//! The handle that users hold of a model: its tensors by name, loading, saving.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::{Backend, Device, FlatGradients, Memory, Slot, on_device};
use crate::checkpoint::{
    self, AdapterFiles, Checkpoint, Files, FoundConfig, ModelPart, Place, Scratch, StoredTensor,
    StoredWeights, TensorRead,
};
use crate::engine::LogLevel;
use crate::gpt::{
    Lora, ModelConfig, ParamSpec, ParamTable, TensorInfo, initialize, initialize_adapters,
};
use crate::optim::Master;
use crate::reserve::{collect, reuse, zeros};
use crate::{Engine, Error, Result};

/// What a checkpoint folder has of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelFiles {
    /// The model's shape.
    pub config: ModelConfig,
    /// The tensors of all files, as they are stored.
    pub tensors: Vec<StoredTensor>,
}

/// A GPT on an engine's device. Cheap to clone: clones are the same model.
///
/// Calls that only read may run at once on several threads; those that write wait for them and for
/// each other. A trainer holds the model for one step at a time.
#[derive(Clone)]
pub struct Model(Arc<Inner>);

struct Inner {
    // NOTE: before the engine, which ends its device before what that may still log to.
    on_device: Device<Arc<OnDevice<Cpu>>, Arc<OnDevice<Cuda>>>,
    engine: Engine,
    config: ModelConfig,
    /// The configuration file that it was loaded with.
    found: Option<FoundConfig>,
    tensors: Vec<TensorInfo>,
}

/// A model's weights, where they are.
pub(crate) struct OnDevice<B: Backend> {
    pub(crate) backend: Arc<B>,
    pub(crate) table: ParamTable,
    weights: RwLock<Weights<B>>,
}

/// What training changes of a model.
pub(crate) struct Weights<B: Backend> {
    pub(crate) all: B::Weights,
    /// An upper bound of their magnitudes, infinite where none is known: several trainers and the
    /// host may write them in turn.
    pub(crate) largest: f64,
    /// What they are kept as.
    pub(crate) master: Master,
    /// How often that has changed, and with it where they lie.
    pub(crate) moves: u64,
    /// How often they have been locked, and may have been changed.
    pub(crate) changes: u64,
}

impl Model {
    /// A model with GPT-2's random initial weights, drawn from the engine's seed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a configuration that makes no model, [`Error::OutOfMemory`].
    pub fn new(engine: &Engine, config: &ModelConfig) -> Result<Self> {
        let model = Self::zeroed(engine, config, None)?;
        on_device!(model.on_device(), on => {
            initialize(&*on.backend, &mut on.lock()?.all, &on.table, engine.seed())?;
        });
        Ok(model)
    }

    /// Loads the model of a checkpoint folder, ours or Hugging Face's `gpt2`: safetensors in f32,
    /// f16, bf16, f64 or the MXFP4 of [`Model::save_as`], in one file or several with an index, with or without the prefix
    /// `transformer.` in names. Weights of the head that differ from the embedding's are kept as
    /// such ([`ModelConfig::tied_head`] is then false).
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] and [`Error::Mismatch`] name the file and the tensor;
    /// [`Error::OutOfMemory`].
    pub fn load(engine: &Engine, dir: &Path) -> Result<Self> {
        Self::from_checkpoint(engine, &Checkpoint::open(dir)?)
    }

    /// [`Model::load`] of files that lie elsewhere than in a folder. They are read in pieces and
    /// not held in memory as a whole.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_from(engine: &Engine, files: &dyn Files) -> Result<Self> {
        Self::from_checkpoint(engine, &Checkpoint::open_files(files)?)
    }

    /// What a checkpoint folder holds, from its configuration and the headers of its files; weights
    /// are not loaded.
    ///
    /// # Errors
    /// As [`Model::load`], but for what only the weights themselves show.
    pub fn inspect(dir: &Path) -> Result<ModelFiles> {
        let checkpoint = Checkpoint::open(dir)?;
        let (config, _) = checkpoint.config()?;
        Ok(ModelFiles { config, tensors: checkpoint.stored_tensors()? })
    }

    pub(crate) fn from_checkpoint(engine: &Engine, checkpoint: &Checkpoint<'_>) -> Result<Self> {
        let (config, found) = checkpoint.config()?;
        let model = Self::zeroed(engine, &config, Some(found))?;
        on_device!(model.on_device(), on => {
            let (mut weights, mut ours) = (on.lock()?, on.table.room_for_a_tensor()?);
            checkpoint.weights(&config, model.tensors(), &mut |index, values| {
                let ours = on.table.specs()[index].import(values, &mut ours)?;
                on.backend.write_param(&mut weights.all, on.table.slots()[index], ours)
            })?;
        });
        Ok(model)
    }

    /// Whether `dir` holds a checkpoint that [`Model::load`] could read; it may be damaged even so.
    pub fn is_saved_in(dir: &Path) -> bool {
        Checkpoint::open(dir).is_ok()
    }

    /// The folder that the checkpoint `dir` is in: `dir`, or the one beside it that a killed save
    /// of an earlier version has left there, on a file system that cannot exchange two folders.
    /// Loading and saving look there of themselves; this is for a program that has files of its own
    /// in the folder.
    pub fn folder_of(dir: &Path) -> PathBuf {
        checkpoint::existing(dir)
    }

    /// Renames [`Model::folder_of`] to `dir` where these differ, as the next save would.
    ///
    /// # Errors
    /// [`Error::Io`]; the checkpoint is then where it was.
    pub fn put_back(dir: &Path) -> Result<()> {
        checkpoint::put_back(dir)
    }

    /// Saves weights and configuration as a Hugging Face `gpt2` folder, atomically. Whatever else
    /// is in the folder stays. The configuration of a model that was loaded is the one that it was
    /// loaded with: keys that this library does not use, such as special tokens, stay.
    ///
    /// # Errors
    /// [`Error::Io`]; the folder then holds the previous checkpoint, or the new one if only its
    /// flushing failed. [`Error::Format`] for a folder that holds other things and no checkpoint.
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.save_as(dir, StoredWeights::F32)
    }

    /// [`Model::save`] of weights that are stored as other numbers, for programs that run the model:
    /// training that goes on from them begins with what they were rounded to. In MXFP4 only
    /// [`Model::load`] reads them, as f32 numbers of which a [`crate::Decoder`] in MXFP4 makes the
    /// codes of the file again, and the logits of one of this model (unless a trainer on a GPU keeps
    /// its weights split, of which decoders read the bf16 halves).
    ///
    /// # Errors
    /// As [`Model::save`], and [`Error::InvalidArgument`] naming a number that is beyond the format.
    pub fn save_as(&self, dir: &Path, weights: StoredWeights) -> Result<()> {
        self.save_at(Place::Folder(dir), weights)
    }

    /// [`Model::save_as`] to files that lie elsewhere than in a folder; their bytes are the same.
    /// While it runs, `files` must not wait for anything that changes the model.
    ///
    /// # Errors
    /// As [`Model::save_as`]; but for an error of [`crate::FileSave::commit`] itself, of which
    /// `files` knows more, they are then what they were.
    pub fn save_to(&self, files: &mut dyn Files, weights: StoredWeights) -> Result<()> {
        self.save_at(Place::Files(files), weights)
    }

    fn save_at(&self, place: Place<'_>, weights: StoredWeights) -> Result<()> {
        on_device!(self.on_device(), on => {
            let values = on.read()?;
            let model = on.exported(self.tensors(), &values);
            checkpoint::save(place, ModelPart { stored: weights, ..self.part(&model) }, None)
        })
    }

    /// A model with these weights, and adapters beside its linear layers that change nothing yet: what
    /// a [`crate::Trainer`] of it trains. A is drawn from the engine's seed, B is 0. Weights are copied,
    /// so that both models take memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for numbers that make no adapters, and where there are some already;
    /// [`Error::OutOfMemory`].
    pub fn with_lora(&self, lora: Lora) -> Result<Self> {
        lora.validate()?;
        let adapted = self.copied(Some(lora))?;
        on_device!(adapted.on_device(), on => {
            let all = &mut on.lock()?.all;
            initialize_adapters(&*on.backend, all, &on.table, self.engine().seed())?;
        });
        Ok(adapted)
    }

    /// [`Model::with_lora`] of adapters that [`Model::save_lora`] or PEFT saved: LoRA of one rank,
    /// without DoRA, biases or further modules, the same in all blocks.
    ///
    /// # Errors
    /// As [`Model::with_lora`]; [`Error::Io`], [`Error::Format`] and [`Error::Mismatch`] name the file
    /// and the key or the tensor.
    pub fn load_lora(&self, dir: &Path) -> Result<Self> {
        self.with_adapters_of(&AdapterFiles::open(dir, self.config())?)
    }

    /// [`Model::load_lora`] of files without a folder.
    ///
    /// # Errors
    /// As [`Model::load_lora`].
    pub fn load_lora_from(&self, files: &dyn Files) -> Result<Self> {
        self.with_adapters_of(&AdapterFiles::open_in(files, self.config())?)
    }

    fn with_adapters_of(&self, files: &AdapterFiles<'_>) -> Result<Self> {
        let adapted = self.copied(Some(files.lora()))?;
        let tensors = adapted.adapters()?;
        on_device!(adapted.on_device(), on => {
            let mut weights = on.lock()?;
            let slots = collect(ADAPTERS, on.table.adapters().flatten().map(Ok))?;
            files.read(self.config(), &tensors, &mut |index, values| {
                on.backend.write_param(&mut weights.all, slots[index], values)
            })?;
        });
        Ok(adapted)
    }

    /// Saves the adapters alone, atomically, as a folder that PEFT opens beside the model that they
    /// were made for: `adapter_config.json` and `adapter_model.safetensors`.
    ///
    /// # Errors
    /// As [`Model::save`], and [`Error::InvalidArgument`] for a model without adapters.
    pub fn save_lora(&self, dir: &Path) -> Result<()> {
        self.save_lora_at(Place::Folder(dir))
    }

    /// [`Model::save_lora`] to files without a folder.
    ///
    /// # Errors
    /// As [`Model::save_to`], and [`Error::InvalidArgument`] for a model without adapters.
    pub fn save_lora_to(&self, files: &mut dyn Files) -> Result<()> {
        self.save_lora_at(Place::Files(files))
    }

    fn save_lora_at(&self, place: Place<'_>) -> Result<()> {
        let lora = self.config().lora.ok_or_else(no_adapters)?;
        let tensors = self.adapters()?;
        on_device!(self.on_device(), on => {
            let weights = on.read()?;
            let read = |slot, out: &mut [f32]| on.backend.read_param(&weights.all, slot, out);
            let slots = collect(ADAPTERS, on.table.adapters().flatten().map(Ok))?;
            let adapters = Adapters { tensors: &tensors, slots: &slots, read };
            checkpoint::save_adapters(place, self.config(), &lora, &adapters)
        })
    }

    /// A model of the same shape without adapters, whose products are added to the weights:
    /// W + alpha / rank B A, in f32.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a model without adapters, [`Error::NotFinite`] where a sum is
    /// beyond f32, [`Error::OutOfMemory`].
    pub fn merge_lora(&self) -> Result<Self> {
        let lora = self.config().lora.ok_or_else(no_adapters)?;
        let merged = self.copied(None)?;
        on_device!(self.on_device(), from => on_device!(merged.on_device(), to => {
            let (weights, mut all) = (from.read()?, to.lock()?);
            let [mut w, mut a, mut b] = [const { Vec::new() }; 3];
            let matrices = from.table.linears().zip(to.table.linears());
            for ((of_w, adapter), (slot, _)) in matrices {
                let read = |slot: Slot, values: &mut Vec<f32>| {
                    let values = reuse(values, "a tensor", slot.len)?;
                    from.backend.read_param(&weights.all, slot, values)
                };
                let Some([of_a, of_b]) = adapter else { continue };
                read(of_w, &mut w)?;
                read(of_a, &mut a)?;
                read(of_b, &mut b)?;
                lora.merge(&mut w[..of_w.len], &a[..of_a.len], &b[..of_b.len])?;
                if let Some(value) = w[..of_w.len].iter().find(|value| !value.is_finite()) {
                    let what = "a weight with its adapter added".to_owned();
                    return Err(Error::NotFinite { what, value: *value });
                }
                to.backend.write_param(&mut all.all, slot, &w[..of_w.len])?;
            }
        }));
        Ok(merged)
    }

    /// A model of these weights, with other adapters or none: those that there are stay behind, and
    /// new ones are 0.
    fn copied(&self, lora: Option<Lora>) -> Result<Self> {
        if lora.is_some() && self.config().lora.is_some() {
            let message = "the model has adapters; merge them into its weights first";
            return Err(Error::invalid("lora", message));
        }
        let config = ModelConfig { lora, ..self.config().clone() };
        let copy = Self::zeroed(self.engine(), &config, self.0.found.clone())?;
        on_device!(self.on_device(), from => on_device!(copy.on_device(), to => {
            let (weights, mut all) = (from.read()?, to.lock()?);
            let mut values = from.table.room_for_a_tensor()?;
            for (slot, from_slot) in to.table.without_adapters().zip(from.table.without_adapters()) {
                values.resize(slot.len, 0.0);
                from.backend.read_param(&weights.all, from_slot, &mut values)?;
                to.backend.write_param(&mut all.all, slot, &values)?;
            }
        }));
        Ok(copy)
    }

    /// Names and shapes of the adapters, in their order.
    fn adapters(&self) -> Result<Vec<TensorInfo>> {
        let specs = on_device!(self.on_device(), on => on.table.specs());
        let adapters = specs.iter().filter(|spec| spec.is_adapter).map(ParamSpec::info);
        collect(ADAPTERS, adapters)
    }

    /// The engine it lives on.
    pub fn engine(&self) -> &Engine {
        &self.0.engine
    }

    /// Its shape.
    pub fn config(&self) -> &ModelConfig {
        &self.0.config
    }

    /// Name and shape of every parameter.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.0.tensors
    }

    /// CRC-32 of all weights, as text.
    pub(crate) fn checksum(&self) -> Result<String> {
        on_device!(self.on_device(), on => {
            let (weights, mut values) = (on.read()?, on.table.room_for_a_tensor()?);
            let mut crc = crc32fast::Hasher::new();
            for slot in on.table.slots() {
                values.resize(slot.len, 0.0);
                on.backend.read_param(&weights.all, *slot, &mut values)?;
                crc.update(bytemuck::cast_slice(&values));
            }
            Ok(format!("{:08x}", crc.finalize()))
        })
    }

    /// Copies a parameter into `out`, in the shape that [`Model::tensors`] gives; or, of one that
    /// files have in parts, a part by its name there, such as `self_attn.q_proj.weight` of a block.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`]; [`Error::InvalidArgument`] if `out` has another length.
    pub fn read_tensor(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let named = self.named(name, out.len())?;
        on_device!(self.on_device(), on => {
            let weights = on.read()?;
            let exported = on.exported(self.tensors(), &weights);
            named.read(out, |out| exported.read(named.index, out, &mut Scratch::default()))
        })
    }

    /// Overwrites a parameter, or a part of one, in the shape that [`Model::read_tensor`] gives.
    ///
    /// # Errors
    /// As [`Model::read_tensor`], and [`Error::NotFinite`] for a NaN or infinity among the values.
    pub fn write_tensor(&self, name: &str, values: &[f32]) -> Result<()> {
        let named = self.named(name, values.len())?;
        if let Some((i, value)) = values.iter().enumerate().find(|(_, v)| !v.is_finite()) {
            return Err(Error::NotFinite { what: format!("element {i} of {name}"), value: *value });
        }
        let largest = values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        on_device!(self.on_device(), on => {
            let (mut weights, mut ours, mut whole) = (on.lock()?, Vec::new(), Vec::new());
            weights.largest = weights.largest.max(largest.into());
            let values = named.whole(values, &mut whole, |whole| {
                let exported = on.exported(self.tensors(), &weights);
                exported.read(named.index, whole, &mut Scratch::default())
            })?;
            let ours = on.table.specs()[named.index].import(values, &mut ours)?;
            on.backend.write_param(&mut weights.all, on.table.slots()[named.index], ours)
        })
    }

    /// Bytes that the weights of a model take which are kept as `master`.
    pub(crate) fn plan(engine: &Engine, config: &ModelConfig, master: Master) -> Result<u64> {
        on_device!(engine.backend(), backend => {
            let mut arena = backend.arena(None)?;
            let table = table_for(&**backend, config)?;
            backend.weights(&mut arena, table.len(), table.slots().len(), master);
            Ok(backend.arena_used(&arena) as u64)
        })
    }

    pub(crate) fn on_device(&self) -> &Device<Arc<OnDevice<Cpu>>, Arc<OnDevice<Cuda>>> {
        &self.0.on_device
    }

    /// The model as a checkpoint takes it, with these [`Model::exported`] weights.
    pub(crate) fn part<'a>(&'a self, weights: &'a dyn TensorRead) -> ModelPart<'a> {
        let found = self.0.found.as_ref();
        ModelPart { config: self.config(), found, weights, stored: StoredWeights::F32 }
    }

    fn zeroed(engine: &Engine, config: &ModelConfig, found: Option<FoundConfig>) -> Result<Self> {
        config.validate()?;
        let config = &config.clone().canonical();
        let bytes = Self::plan(engine, config, Master::F32)?;
        engine.check_memory("the weights", bytes, bytes)?;
        let on_device = match engine.backend() {
            Device::Cpu(cpu) => Device::Cpu(OnDevice::new(cpu, config, bytes)?),
            Device::Cuda(cuda) => Device::Cuda(OnDevice::new(cuda, config, bytes)?),
        };
        let specs = on_device!(&on_device, on => on.table.specs());
        let tensors = collect("the names of the tensors", specs.iter().map(ParamSpec::info))?;
        engine.log(LogLevel::Info, || {
            let ModelConfig { layers, heads, channels, context_length, vocab_size, .. } = config;
            format!(
                "model of {} parameters: {layers} layers, {heads} heads, {channels} channels, \
                 context {context_length}, vocabulary {vocab_size}",
                config.parameter_count(),
            )
        });
        let (engine, config) = (engine.clone(), config.clone());
        Ok(Self(Arc::new(Inner { on_device, engine, config, found, tensors })))
    }

    /// Which of [`Model::tensors`] has this name.
    pub(crate) fn number_of(&self, name: &str) -> Result<usize> {
        self.tensors().iter().position(|t| t.name == name).ok_or_else(|| {
            let part = self.part_of_file(name).ok().flatten();
            let hint = match part.map(|part| &self.tensors()[part.index].name) {
                Some(whole) => format!("it is a part of {whole:?}, which is one tensor here"),
                None => {
                    let example = &self.tensors()[0].name;
                    format!("the list of tensors has the names, such as {example:?}")
                }
            };
            Error::NoSuchTensor { name: name.to_owned(), hint }
        })
    }

    /// What a name is of, for a buffer of `len` numbers, which must be as many.
    pub(crate) fn named(&self, name: &str, len: usize) -> Result<Named> {
        let named = match self.part_of_file(name)? {
            Some(named) => named,
            None => {
                let index = self.number_of(name)?;
                let len = self.tensors()[index].len();
                Named { index, len, range: 0..len }
            }
        };
        if named.range.len() != len {
            let (shape, count) = (&self.tensors()[named.index].shape, named.range.len());
            let of = if count == named.len { "" } else { "a part of a tensor " };
            let message = format!(
                "{name}, {of}of shape {shape:?}, has {count} elements, the buffer has {len}"
            );
            return Err(Error::invalid("tensor", message));
        }
        Ok(named)
    }

    /// The part of a tensor that has this name in files.
    fn part_of_file(&self, name: &str) -> Result<Option<Named>> {
        if self.tensors().iter().any(|tensor| tensor.name == name) {
            return Ok(None);
        }
        for (index, tensor) in self.tensors().iter().enumerate() {
            let parts = self.config().parts_of(&tensor.name)?;
            let part = parts.into_iter().flatten().find(|part| part.name == name);
            if let Some(part) = part {
                let width: usize = tensor.shape[1..].iter().product();
                let range = part.rows.start * width..part.rows.end * width;
                return Ok(Some(Named { index, len: tensor.len(), range }));
            }
        }
        Ok(None)
    }
}

/// What a name is of: a tensor, or rows of one that files have in parts.
pub(crate) struct Named {
    /// Which of [`Model::tensors`].
    pub(crate) index: usize,
    /// Its elements.
    len: usize,
    /// Those that are meant.
    range: Range<usize>,
}

impl Named {
    /// Copies what is meant to `out`, of a tensor that `read` reads whole.
    pub(crate) fn read(
        &self,
        out: &mut [f32],
        read: impl FnOnce(&mut [f32]) -> Result<()>,
    ) -> Result<()> {
        if self.range.len() == self.len {
            return read(out);
        }
        let mut whole = zeros("a tensor", self.len)?;
        read(&mut whole)?;
        out.copy_from_slice(&whole[self.range.clone()]);
        Ok(())
    }

    /// The whole tensor, with `values` where they are meant; `read` reads what it has elsewhere.
    pub(crate) fn whole<'v>(
        &self,
        values: &'v [f32],
        room: &'v mut Vec<f32>,
        read: impl FnOnce(&mut [f32]) -> Result<()>,
    ) -> Result<&'v [f32]> {
        if self.range.len() == self.len {
            return Ok(values);
        }
        let whole = reuse(room, "a tensor", self.len)?;
        read(whole)?;
        whole[self.range.clone()].copy_from_slice(values);
        Ok(whole)
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("config", self.config()).finish_non_exhaustive()
    }
}

const ADAPTERS: &str = "the names of the adapters";

fn no_adapters() -> Error {
    Error::invalid("lora", "expected a model with adapters, got one without; with_lora makes one")
}

/// Values of the adapters alone, which lie in memory as files have them.
struct Adapters<'a, F> {
    tensors: &'a [TensorInfo],
    slots: &'a [Slot],
    read: F,
}

impl<F: Fn(Slot, &mut [f32]) -> Result<()>> TensorRead for Adapters<'_, F> {
    fn tensors(&self) -> &[TensorInfo] {
        self.tensors
    }

    fn read(&self, index: usize, out: &mut [f32], _: &mut Scratch) -> Result<()> {
        (self.read)(self.slots[index], out)
    }
}

/// The table of a model's parameters on a device.
pub(crate) fn table_for<B: Memory>(_: &B, config: &ModelConfig) -> Result<ParamTable> {
    ParamTable::new(config, B::ALIGN)
}

impl<B: Backend> OnDevice<B> {
    /// Weights of 0, for which `bytes` were planned.
    fn new(backend: &Arc<B>, config: &ModelConfig, bytes: u64) -> Result<Arc<Self>> {
        let table = table_for(&**backend, config)?;
        let (arena, count) = (&mut backend.arena(Some(bytes as usize))?, table.slots().len());
        let all = backend.weights(arena, table.len(), count, Master::F32);
        let (largest, master) = (f64::INFINITY, Master::F32);
        let weights = RwLock::new(Weights { all, largest, master, moves: 0, changes: 0 });
        Ok(Arc::new(Self { backend: backend.clone(), table, weights }))
    }

    /// The weights, to be changed for as long as the guard lives.
    pub(crate) fn lock(&self) -> Result<RwLockWriteGuard<'_, Weights<B>>> {
        let mut weights = self.weights.write().map_err(|_| Error::Poisoned)?;
        weights.changes += 1;
        Ok(weights)
    }

    /// The weights, for as long as the guard lives, which others may read as well.
    pub(crate) fn read(&self) -> Result<RwLockReadGuard<'_, Weights<B>>> {
        self.weights.read().map_err(|_| Error::Poisoned)
    }

    /// Keeps the weights as `master` from here on, whatever they were kept as; of a device without
    /// copies they are in f32 always. For a moment both forms are there.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn keep_as(&self, weights: &mut Weights<B>, master: Master) -> Result<()> {
        if weights.master == master || !B::HAS_COPIES {
            return Ok(());
        }
        let (table, all) = (&self.table, &mut weights.all);
        self.backend.keep_weights_as(all, table.len(), table.slots(), master)?;
        (weights.master, weights.moves) = (master, weights.moves + 1);
        Ok(())
    }

    /// [`OnDevice::read`] of weights that are kept as `master`; others may read them as well, unless
    /// they had to be changed first.
    pub(crate) fn read_as(&self, master: Master) -> Result<RwLockReadGuard<'_, Weights<B>>> {
        loop {
            let weights = self.read()?;
            if weights.master == master || !B::HAS_COPIES {
                return Ok(weights);
            }
            drop(weights);
            self.keep_as(&mut *self.lock()?, master)?;
        }
    }

    /// What `cut` cuts from memory that is mapped for it alone, if the engine's limit lets it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], and those of `cut`.
    pub(crate) fn allocate<T>(
        &self,
        engine: &Engine,
        what: &'static str,
        cut: impl Fn(&mut B::Arena) -> Result<T>,
    ) -> Result<T> {
        let mut measuring = self.backend.arena(None)?;
        cut(&mut measuring)?;
        let bytes = self.backend.arena_used(&measuring);
        engine.check_memory(what, bytes as u64, bytes as u64)?;
        cut(&mut self.backend.arena(Some(bytes))?)
    }

    /// The weights as a checkpoint holds them.
    pub(crate) fn exported<'a>(
        &'a self,
        tensors: &'a [TensorInfo],
        weights: &'a Weights<B>,
    ) -> impl TensorRead {
        let read = |slot, out: &mut [f32]| self.backend.read_param(&weights.all, slot, out);
        Exported { table: &self.table, tensors, read }
    }

    /// Gradients as a checkpoint would hold them.
    pub(crate) fn exported_gradients<'a>(
        &'a self,
        tensors: &'a [TensorInfo],
        gradients: &'a FlatGradients<B>,
    ) -> impl TensorRead {
        let read = |slot: Slot, out: &mut [f32]| gradients.read(&*self.backend, slot, out);
        Exported { table: &self.table, tensors, read }
    }
}

/// Values of all parameters in Hugging Face's order and shape; `read` gets them in ours.
pub(crate) struct Exported<'a, F> {
    pub(crate) table: &'a ParamTable,
    pub(crate) tensors: &'a [TensorInfo],
    pub(crate) read: F,
}

impl<F: Fn(Slot, &mut [f32]) -> Result<()>> TensorRead for Exported<'_, F> {
    fn tensors(&self) -> &[TensorInfo] {
        self.tensors
    }

    fn read(&self, index: usize, out: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        let read = |ours: &mut [f32]| (self.read)(self.table.slots()[index], ours);
        self.table.specs()[index].export(out, &mut scratch.numbers, read)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;
    use crate::EngineOptions;

    /// Whoever reads weights does not wait for a save or a generation, which read them for long.
    #[test]
    fn readers_do_not_wait_for_each_other() {
        let engine = Engine::new(EngineOptions { threads: 1, ..Default::default() }).unwrap();
        let config = ModelConfig {
            vocab_size: 32,
            context_length: 16,
            layers: 1,
            heads: 2,
            channels: 16,
            ..ModelConfig::default()
        };
        let model = Model::new(&engine, &config).unwrap();
        let Device::Cpu(on) = model.on_device() else { panic!("made on the CPU") };
        let reading = on.read().unwrap();
        let (done, all_done) = channel();
        let other = model.clone();
        let thread = std::thread::spawn(move || {
            other.read_tensor("transformer.ln_f.weight", &mut [0.0; 16]).unwrap();
            other.next_logits(&[1, 2], &mut [0.0; 32]).unwrap();
            done.send(()).unwrap();
        });
        let in_time = all_done.recv_timeout(Duration::from_secs(60));
        drop(reading);
        thread.join().unwrap();
        assert_eq!(in_time, Ok(()));
    }
}
