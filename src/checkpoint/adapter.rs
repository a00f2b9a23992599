//! Adapters alone, as PEFT's folders have them: `adapter_config.json` and
//! `adapter_model.safetensors`.
//!
//! PEFT names tensors by the modules of the model that it wraps, `base_model.model.` and our name, or
//! of a layer that files have in parts those (`adapter_parts`).
//! Which layers are adapted is read from the tensors, not from `target_modules`, in which one word
//! may stand for several layers and be a pattern; a list there is only checked to have them all, as
//! PEFT leaves out what it does not have.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::adapter_parts::{Found, InParts, PREFIX, names_in_files};
use super::files::{Files, OpenFile, Place};
use super::tensors::{self, TensorFile};
use super::{TensorRead, cannot_open, folder, in_place, name_all, read_json, room_for_headers};
use crate::gpt::{Lora, ModelConfig, ParamSpec, ParamTable, TensorInfo};
use crate::reserve::collect;
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// Writes both files, or leaves those that are there untouched; `adapters` reads nothing else.
///
/// # Errors
/// As of `save` beside.
pub(crate) fn save(
    place: Place<'_>,
    config: &ModelConfig,
    lora: &Lora,
    adapters: &dyn TensorRead,
) -> Result<()> {
    let adapters = &InParts::new(config, adapters)? as &dyn TensorRead;
    let _spare = room_for_headers(adapters.tensors().iter())?;
    place.replace(&[CONFIG, TENSORS], TENSORS, |new| {
        new.put(CONFIG, to_json(config, lora).as_bytes())?;
        let named = name_all(adapters, |name| format!("{PREFIX}{name}"));
        tensors::write(new, TENSORS, &named, &[("format", "pt".into())])?;
        Ok(())
    })
}

fn to_json(config: &ModelConfig, lora: &Lora) -> String {
    let Lora { rank, alpha, .. } = lora;
    // PEFT's own is a whole number.
    let alpha =
        if alpha.fract() == 0.0 && *alpha < 1e9 { json!(*alpha as u64) } else { json!(alpha) };
    let layers = modules_of(config).into_iter().zip(lora.layers).filter(|(_, is)| *is);
    let targets: Vec<_> = layers.flat_map(|(modules, _)| modules.iter().copied()).collect();
    let object = json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": null,
        "bias": "none",
        "fan_in_fan_out": !config.is_llama(),
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": null,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": false,
    });
    format!("{object:#}\n")
}

/// The open files of adapters.
pub(crate) struct AdapterFiles<'a> {
    path: PathBuf,
    file: OpenFile<'a>,
    lora: Lora,
    /// The modules that have one.
    modules: Vec<&'static str>,
    /// What the file says of the rank.
    rank: usize,
    /// By how much that of ours is larger.
    stacked: usize,
}

/// The layers of a block as PEFT names them, by number.
fn modules_of(config: &ModelConfig) -> [&'static [&'static str]; 4] {
    match config.is_llama() {
        false => [&["attn.c_attn"], &["attn.c_proj"], &["mlp.c_fc"], &["mlp.c_proj"]],
        true => [
            &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            &["self_attn.o_proj"],
            &["mlp.gate_proj", "mlp.up_proj"],
            &["mlp.down_proj"],
        ],
    }
}

impl<'a> AdapterFiles<'a> {
    /// Opens a folder of adapters for a model of this shape.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for what is no such folder or has adapters of another kind;
    /// [`Error::Mismatch`] for those of another model.
    pub(crate) fn open(dir: &Path, model: &ModelConfig) -> Result<Self> {
        let folder = folder::open_folder(dir).map_err(Error::io("open", dir))?;
        Self::open_by(model, |name| {
            let path = dir.join(name);
            let file = in_place::open_file(&folder, name).map_err(|e| cannot_open(&path, e))?;
            let none = || Error::io("open", &path)(io::ErrorKind::NotFound.into());
            let file = OpenFile::Disk(file.ok_or_else(none)?);
            Ok((path, file))
        })
    }

    /// The same of files without a folder.
    pub(crate) fn open_in(files: &'a dyn Files, model: &ModelConfig) -> Result<Self> {
        Self::open_by(model, |name| {
            let path = Path::new(name);
            let file = files.open(name).map_err(Error::io("open", path))?;
            let none = || {
                Error::format(
                    path,
                    "expected a file of this name, for adapters have one; found none",
                )
            };
            Ok((path.to_owned(), OpenFile::Host(file.ok_or_else(none)?)))
        })
    }

    fn open_by(
        model: &ModelConfig,
        open: impl Fn(&str) -> Result<(PathBuf, OpenFile<'a>)>,
    ) -> Result<Self> {
        let open = |name: &str| {
            let (path, file) = open(name)?;
            file.check_is_file(&path)?;
            Ok::<_, Error>((path, file))
        };
        let (config, text) = open(CONFIG)?;
        let Settings { rank, alpha, targets } = parse(&config, &read_json(&config, &text)?)?;
        let (path, file) = open(TENSORS)?;
        let tensors = TensorFile::open(&path, &file)?;
        let (layers, modules) = layers_of(model, &tensors);
        if layers == [false; 4] {
            let [example, blocks] = match model.is_llama() {
                false => ["transformer.h.0.attn.c_attn", "GPT-2"],
                true => ["model.layers.0.self_attn.q_proj", "Llama"],
            };
            let message = format!(
                "expected adapters such as {PREFIX}{example}.lora_A.weight, found none of a linear \
                 layer of {blocks}'s blocks"
            );
            return Err(Error::format(&path, message));
        }
        check_targets(&config, &targets, &modules, &modules_of(model).concat())?;
        let lora = Lora { rank, alpha, layers };
        lora.validate().map_err(|error| Error::format(&config, error.to_string()))?;
        let adapted = ModelConfig { lora: Some(lora), ..model.clone() };
        // Before anyone allocates memory for what a damaged file announces. Of a layer in parts there
        // need not be more than the A of one.
        let least = model.linears().into_iter().zip(layers).filter(|(_, is)| *is);
        let least = least.map(|([inputs, _], _)| (rank * inputs) as u64).sum::<u64>();
        let count = match model.is_llama() {
            false => adapted.parameter_count() - model.parameter_count(),
            true => model.layers as u64 * least,
        };
        let bytes = file.size(&path)?;
        if count.saturating_mul(2) > bytes {
            let message = format!(
                "{} adapters of rank {rank} for this model have {count} numbers, and the file has \
                 only {bytes} bytes: it is cut off, or of another model",
                lora.layer_names().count() * model.layers
            );
            return Err(Error::mismatch(&path, message));
        }
        let mut files = Self { path, file, lora, modules, rank, stacked: 1 };
        files.stacked = files.with(model, |found| found.stacked(&infos(&adapted)?))?;
        files.lora.rank *= files.stacked;
        files.lora.alpha *= files.stacked as f32;
        let Lora { rank, .. } = files.lora;
        files.lora.validate().map_err(|error| {
            let message = format!("r: of several modules that are one layer here, {rank}: {error}");
            Error::format(&config, message)
        })?;
        Ok(files)
    }

    /// Calls `f` with what is in the file.
    fn with<T>(&self, config: &ModelConfig, f: impl FnOnce(&Found<'_>) -> Result<T>) -> Result<T> {
        let file = TensorFile::open(&self.path, &self.file)?;
        let names = file.names();
        // By the names that the model has.
        let by_ours: HashMap<_, _> = names
            .iter()
            .filter_map(|name| Some((whole_name(config, name.strip_prefix(PREFIX)?), name)))
            .collect();
        let named = |name: &str| by_ours.get(name).map(|name| (*name).clone());
        let modules = &self.modules;
        f(&Found { file: &file, named: &named, config, modules, rank: self.rank })
    }

    /// What it says of them.
    pub(crate) fn lora(&self) -> Lora {
        self.lora
    }

    /// Calls `write(index, values)` for every entry of `tensors`, in order.
    ///
    /// # Errors
    /// [`Error::Format`] for a missing or damaged tensor, [`Error::Mismatch`] for one of another
    /// shape or one that the model has no place for, [`Error::NotFinite`].
    pub(crate) fn read(
        &self,
        config: &ModelConfig,
        tensors: &[TensorInfo],
        write: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let known: HashSet<_> = names_in_files(config, tensors)?.into_iter().collect();
        self.with(config, |found| {
            found.file.check_surplus(|name| {
                let ours = name.strip_prefix(PREFIX).map(|name| whole_name(config, name));
                ours.is_some_and(|name| known.contains(&name))
            })?;
            let mut values = Vec::new();
            for (index, tensor) in tensors.iter().enumerate() {
                found.read(tensor, self.stacked, &mut values)?;
                write(index, &values)?;
            }
            Ok(())
        })
    }
}

/// Name and shape of every adapter of such a model.
fn infos(config: &ModelConfig) -> Result<Vec<TensorInfo>> {
    let table = ParamTable::new(config, 1)?;
    let adapters = table.specs().iter().filter(|spec| spec.is_adapter).map(ParamSpec::info);
    collect("the names of the adapters", adapters)
}

/// Of a model without its head, names lack this.
fn whole_name(config: &ModelConfig, name: &str) -> String {
    let prefix = if config.is_llama() { "model." } else { "transformer." };
    if name.starts_with(prefix) { name.to_owned() } else { format!("{prefix}{name}") }
}

/// Which layers of any block have an adapter, and which modules.
fn layers_of(config: &ModelConfig, file: &TensorFile<'_>) -> ([bool; 4], Vec<&'static str>) {
    let (names, mut modules) = (file.names(), Vec::new());
    let layers = modules_of(config).map(|of_layer| {
        let has = |module: &&&str| {
            let end = format!(".{module}.lora_A.weight");
            names.iter().any(|name| name.ends_with(&end))
        };
        let before = modules.len();
        modules.extend(of_layer.iter().filter(has));
        modules.len() > before
    });
    (layers, modules)
}

/// What a configuration says of adapters.
struct Settings {
    rank: usize,
    alpha: f32,
    /// Modules that have one; empty where a text names them, a pattern or "all-linear".
    targets: Vec<String>,
}

/// An error where PEFT would leave out modules that have tensors, or take those of `all` for adapted
/// that have none.
fn check_targets(path: &Path, targets: &[String], modules: &[&str], all: &[&str]) -> Result<()> {
    // Those of single blocks are modules that PEFT has found itself.
    let of_block = |target: &String| target.contains("h.") || target.contains("layers.");
    if targets.is_empty() || targets.iter().any(of_block) {
        return Ok(());
    }
    let is_target = |module: &str| {
        targets.iter().filter_map(|target| module.strip_suffix(target.as_str())).any(|rest| {
            // A whole name, or what is behind a point of it.
            rest.is_empty() || rest.ends_with('.')
        })
    };
    if let Some(module) = all.iter().find(|module| is_target(module) && !modules.contains(module)) {
        let message = format!(
            "target_modules: {targets:?} names {module}, of which the file of tensors has no adapter"
        );
        return Err(Error::format(path, message));
    }
    match modules.iter().find(|module| !is_target(module)) {
        None => Ok(()),
        Some(module) => {
            let message = format!(
                "target_modules: expected {module}, of which the file of tensors has adapters, found \
                 {targets:?}"
            );
            Err(Error::format(path, message))
        }
    }
}

/// What a configuration says, where nothing else than LoRA itself is asked for.
fn parse(path: &Path, text: &[u8]) -> Result<Settings> {
    let object: Map<String, Value> = serde_json::from_slice(text)
        .map_err(|e| Error::format(path, format!("expected a JSON object: {e}")))?;
    let error = |key: &str, expected: &str| {
        let found = object.get(key).map_or_else(|| "no such key".to_owned(), Value::to_string);
        Error::format(path, format!("{key}: expected {expected}, found {found}"))
    };
    if object.get("peft_type") != Some(&json!("LORA")) {
        return Err(error("peft_type", "\"LORA\""));
    }
    // What each of them may say without changing what adapters compute.
    let is_empty = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        _ => false,
    };
    for key in [
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "exclude_modules",
        "kasa_config",
        "layer_replication",
        "layers_to_transform",
        "lora_bias",
        "modules_to_save",
        "rank_pattern",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    ] {
        if object.get(key).is_some_and(|value| !is_empty(value)) {
            return Err(error(key, "none: adapters here are of one rank, without further parts"));
        }
    }
    if object.get("bias").is_some_and(|value| *value != json!("none")) {
        return Err(error("bias", "\"none\""));
    }
    // Others change the weights of the base as well, before adapters come to them.
    let beginnings = ["gaussian", "orthogonal", "eva", "mica"].map(|name| json!(name));
    let beginnings = [json!(true), json!(false), Value::Null].into_iter().chain(beginnings);
    if let Some(found) = object.get("init_lora_weights")
        && !beginnings.into_iter().any(|known| known == *found)
    {
        let expected = "true, false, \"gaussian\", \"orthogonal\" or \"eva\": others change the weights \
                        of the model, too; let PEFT convert the adapters to LoRA's own \
                        (path_initial_model_for_weight_conversion)";
        return Err(error("init_lora_weights", expected));
    }
    let rank = object.get("r").and_then(Value::as_u64).and_then(|rank| rank.try_into().ok());
    let alpha = match object.get("lora_alpha") {
        Some(Value::Number(number)) => number.to_string().parse().ok(),
        _ => None,
    };
    let targets = object.get("target_modules").and_then(Value::as_array).into_iter().flatten();
    let targets = targets.filter_map(Value::as_str).map(str::to_owned).collect();
    match (rank, alpha) {
        (None, _) => Err(error("r", "a whole number")),
        (_, None) => Err(error("lora_alpha", "a number")),
        (Some(rank), Some(alpha)) => Ok(Settings { rank, alpha, targets }),
    }
}
