mod damage;
pub(super) mod faults;
mod folder;
mod found;
mod reading;
mod stored;

use std::collections::HashMap;
use std::fs;
use std::io;

use safetensors::tensor::{Dtype, TensorView, serialize};
use tempfile::TempDir;

use super::*;
use crate::gpt::HEAD;
use crate::run::TrainerOptions;

fn load_config(dir: &Path) -> Result<ModelConfig> {
    Ok(Checkpoint::open(dir)?.config()?.0)
}

/// Saves a model of a configuration of its own.
fn save(
    dir: &Path,
    config: &ModelConfig,
    weights: &dyn TensorRead,
    trainer: Option<TrainerPart<'_>>,
) -> Result<()> {
    super::save(
        Place::Folder(dir),
        ModelPart { config, found: None, weights, stored: StoredWeights::F32 },
        trainer,
    )
}

fn load_weights(
    dir: &Path,
    tensors: &[TensorInfo],
    write: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    let tied_head = !tensors.iter().any(|tensor| tensor.name == HEAD);
    let config = ModelConfig { tied_head, ..ModelConfig::default() };
    Checkpoint::open(dir)?.weights(&config, tensors, write)
}

fn load_state(dir: &Path) -> Result<TrainerState> {
    Checkpoint::open(dir)?.state()
}

fn load_states(dir: &Path, tensors: &[TensorInfo], write: &mut WriteState<'_>) -> Result<()> {
    Checkpoint::open(dir)?.states(&kept(&TrainerOptions::default(), tensors), write)
}

/// What an optimizer keeps of all tensors.
fn kept<'a>(options: &TrainerOptions, tensors: &'a [TensorInfo]) -> Vec<Kept<'a>> {
    options.optimizer.states().iter().map(|state| Kept { state: *state, tensors }).collect()
}

/// Tensors in memory.
struct Toy {
    infos: Vec<TensorInfo>,
    values: Vec<Vec<f32>>,
}

impl Toy {
    fn new(config: &ModelConfig, value: impl Fn(usize, usize) -> f32) -> Self {
        let infos = infos(config);
        let fill = |(i, info): (usize, &TensorInfo)| {
            (0..info.shape.iter().product()).map(|j| value(i, j)).collect()
        };
        let values = infos.iter().enumerate().map(fill).collect();
        Self { infos, values }
    }
}

impl TensorRead for Toy {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read(&self, index: usize, out: &mut [f32], _: &mut Scratch) -> Result<()> {
        out.copy_from_slice(&self.values[index]);
        Ok(())
    }
}

fn infos(config: &ModelConfig) -> Vec<TensorInfo> {
    let (v, t, c) = (config.vocab_size, config.context_length, config.channels);
    let mut infos = vec![("wte.weight".into(), vec![v, c]), ("wpe.weight".into(), vec![t, c])];
    for layer in 0..config.layers {
        for (name, shape) in [
            ("ln_1.weight", vec![c]),
            ("ln_1.bias", vec![c]),
            ("attn.c_attn.weight", vec![c, 3 * c]),
            ("attn.c_attn.bias", vec![3 * c]),
            ("attn.c_proj.weight", vec![c, c]),
            ("attn.c_proj.bias", vec![c]),
            ("ln_2.weight", vec![c]),
            ("ln_2.bias", vec![c]),
            ("mlp.c_fc.weight", vec![c, 4 * c]),
            ("mlp.c_fc.bias", vec![4 * c]),
            ("mlp.c_proj.weight", vec![4 * c, c]),
            ("mlp.c_proj.bias", vec![c]),
        ] {
            infos.push((format!("h.{layer}.{name}"), shape));
        }
    }
    infos.extend([("ln_f.weight".into(), vec![c]), ("ln_f.bias".into(), vec![c])]);
    let named = |(name, shape)| TensorInfo { name: format!("transformer.{name}"), shape };
    let head = (!config.tied_head).then(|| TensorInfo { name: HEAD.into(), shape: vec![v, c] });
    infos.into_iter().map(named).chain(head).collect()
}

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 11,
        context_length: 5,
        layers: 2,
        heads: 2,
        channels: 4,
        ..ModelConfig::default()
    }
}

fn state(step: u64) -> TrainerState {
    // As resolved options are.
    let options = TrainerOptions {
        accumulation: 1,
        lanes: 1,
        batch_size: 3,
        recipe: "mxfp4-rht-sr,g=128,bf16-last-steps=0.1".parse().unwrap(),
        ..TrainerOptions::default()
    };
    let lr_override = Some(0.1 + 1e-7);
    TrainerState { options, seed: u64::MAX - 1, step, schedule_start: step.min(1), lr_override }
}

/// Weights that no two elements of which are equal.
fn weights() -> Toy {
    Toy::new(&config(), |i, j| (i as f32 + 1.0) * 0.37 + j as f32 * 1e-3)
}

fn save_full(dir: &Path, step: u64) -> Result<()> {
    let (m, v) = (Toy::new(&config(), |i, j| -((i + j) as f32)), Toy::new(&config(), |_, _| 2e-9));
    let state = state(step);
    save(
        dir,
        &config(),
        &weights(),
        Some(TrainerPart { state: &state, states: &[&m, &v], others: &[] }),
    )
}

/// All that a trainer loads; f32 as bits.
#[derive(Debug, PartialEq)]
struct Loaded {
    config: ModelConfig,
    weights: Vec<Vec<u32>>,
    state: TrainerState,
    states: Vec<Vec<u32>>,
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn load_model(checkpoint: &Checkpoint) -> Result<(ModelConfig, Vec<Vec<u32>>)> {
    let (config, _) = checkpoint.config()?;
    let mut weights = Vec::new();
    checkpoint.weights(&config, &infos(&config), &mut |index, values| {
        assert_eq!(index, weights.len());
        weights.push(bits(values));
        Ok(())
    })?;
    Ok((config, weights))
}

fn load(dir: &Path) -> Result<Loaded> {
    let checkpoint = Checkpoint::open(dir)?;
    let (config, weights) = load_model(&checkpoint)?;
    let state = checkpoint.state()?;
    let mut states = Vec::new();
    let infos = infos(&config);
    checkpoint.states(&kept(&state.options, &infos), &mut |number, index, values| {
        assert_eq!(number * infos.len() + index, states.len());
        let StateValues::Numbers(values) = values else { panic!("no codes were saved") };
        states.push(bits(values));
        Ok(())
    })?;
    Ok(Loaded { config, weights, state, states })
}

/// The error of loading a whole checkpoint, which names `file`.
fn failure(dir: &Path, file: &str) -> String {
    let message = load(dir).unwrap_err().to_string();
    assert!(message.contains(&*dir.join(file).to_string_lossy()), "{message}");
    message
}

fn temp() -> (TempDir, PathBuf) {
    let root = TempDir::new().unwrap();
    let dir = root.path().join("run");
    (root, dir)
}

fn make_pipe(path: &Path) {
    rustix::fs::mknodat(CWD, path, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
}

fn names(dir: &Path) -> Vec<String> {
    let entry = |e: io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(entry).collect();
    names.sort_unstable();
    names
}

#[test]
fn round_trip_is_exact_and_equal_models_give_equal_files() {
    let (root, dir) = temp();
    save_full(&dir, 7).unwrap();
    let first: Vec<_> = FILES.iter().map(|name| fs::read(dir.join(name)).unwrap()).collect();
    let loaded = load(&dir).unwrap();
    assert_eq!(loaded.config, config());
    assert_eq!(loaded.state, state(7));
    assert_eq!(loaded.weights, weights().values.iter().map(|v| bits(v)).collect::<Vec<_>>());
    assert_eq!(loaded.states.len(), 2 * loaded.weights.len());

    save_full(&dir, 7).unwrap();
    let second: Vec<_> = FILES.iter().map(|name| fs::read(dir.join(name)).unwrap()).collect();
    assert!(first == second);
    assert_eq!(names(root.path()), ["run"]);
    assert_eq!(load_config(&dir).unwrap(), config());
    assert_eq!(load_state(&dir).unwrap(), state(7));
    load_weights(&dir, &infos(&config()), &mut |_, _| Ok(())).unwrap();
    load_states(&dir, &infos(&config()), &mut |_, _, _| Ok(())).unwrap();
}

#[test]
fn a_saved_model_drops_the_training_state_that_it_does_not_fit() {
    let (_root, dir) = temp();
    save_full(&dir, 7).unwrap();
    save(&dir, &config(), &weights(), None).unwrap();
    assert_eq!(names(&dir), [CONFIG, MODEL]);
    load_weights(&dir, &infos(&config()), &mut |_, _| Ok(())).unwrap();
    assert!(failure(&dir, STATE).contains("without its training state"));
}

/// Writes the weights of a Hugging Face file without prefix, with buffers;
/// the elements of tensor i, in the order of their names, are `value(i)`.
fn foreign(dir: &Path, dtype: Dtype, value: impl Fn(usize) -> f32) {
    let mut tensors = HashMap::new();
    let mut names: Vec<_> = infos(&config());
    names.sort_by(|a, b| a.name.cmp(&b.name));
    for (i, info) in names.into_iter().enumerate() {
        let elements = (0..info.shape.iter().product()).map(|_: usize| value(i));
        let bytes: Vec<u8> = match dtype {
            Dtype::F32 => elements.flat_map(f32::to_le_bytes).collect(),
            Dtype::F16 => elements.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
            Dtype::BF16 => elements.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
            _ => elements.flat_map(|v| f64::from(v).to_le_bytes()).collect(),
        };
        let name = info.name.strip_prefix("transformer.").unwrap().to_owned();
        tensors.insert(name, (dtype, info.shape, bytes));
    }
    for name in ["h.0.attn.bias", "h.1.attn.masked_bias"] {
        tensors.insert(name.to_owned(), (Dtype::U8, vec![3], vec![1, 2, 3]));
    }
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(MODEL), serialize(views, None).unwrap()).unwrap();
    fs::write(dir.join(CONFIG), config::to_json(&config(), None, StoredWeights::F32)).unwrap();
}

#[test]
fn weights_of_others_load_in_four_precisions() {
    let (_root, dir) = temp();
    // 1638 / 2^14 and 205 / 2^11 are 0.1 rounded to 11 and to 8 bits.
    for (dtype, value) in [
        (Dtype::F32, 0.1),
        (Dtype::F64, 0.1),
        (Dtype::F16, 1638.0 / 16384.0),
        (Dtype::BF16, 205.0 / 2048.0),
    ] {
        foreign(&dir, dtype, |_| 0.1);
        let (config, weights) = load_model(&Checkpoint::open(&dir).unwrap()).unwrap();
        assert!(weights.iter().flatten().all(|&w| w == f32::to_bits(value)));
        assert_eq!(weights.len(), infos(&config).len());
    }
    // A shape that would take terabytes is refused before anyone allocates them.
    let huge = ModelConfig { vocab_size: 1 << 24, channels: 1 << 18, ..config() };
    fs::write(dir.join(CONFIG), config::to_json(&huge, None, StoredWeights::F32)).unwrap();
    let message = load_config(&dir).unwrap_err().to_string();
    assert!(message.contains("parameters, and model.safetensors has only"), "{message}");
}
