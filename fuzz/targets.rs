//! What the fuzz targets of the library do with their bytes. `tests/corpus.rs` runs the same
//! functions over the committed corpus, without a fuzzer.
//!
//! Nothing may panic, and what a reader accepts must be sound: the assertions say what that means.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};

use mxfp4train::{
    Dataset, DatasetOptions, Engine, EngineOptions, MemoryFiles, Model, ModelConfig, Recipe,
    TokenType, Trainer, TrainerOptions,
};

/// A token file: raw, llm.c's or NumPy's, or none at all.
pub(crate) fn tokens(data: &[u8]) {
    with_bench(|bench| {
        let path = bench.folder.path().join("tokens.bin");
        fs::write(&path, data).expect("a temporary file can be written");
        // Whatever it is, it can be read as bytes, unless a header or a magic says what it is.
        let bytes = DatasetOptions { token_type: Some(TokenType::U8) };
        for options in [DatasetOptions::default(), bytes] {
            if let Ok(dataset) = Dataset::open_files_with(&[&path], &options) {
                check_tokens(&mut bench.trainer, &dataset, data.len());
            }
        }
    });
}

/// Megatron's index beside 48 bytes of tokens.
pub(crate) fn megatron(data: &[u8]) {
    with_bench(|bench| {
        let path = bench.folder.path().join("pair.bin");
        let tokens: Vec<u8> = (0..48).map(|i| if i % 8 == 0 { i / 8 } else { 0 }).collect();
        fs::write(&path, &tokens).expect("a temporary file can be written");
        fs::write(path.with_extension("idx"), data).expect("a temporary file can be written");
        let named = [path.clone(), path.with_extension("idx")].map(Dataset::open);
        // Other bytes than Megatron's are nobody's index, and the tokens stand alone.
        let is_megatron = data.starts_with(b"MMIDIDX\0\0");
        if let [Ok(one), Ok(other)] = &named {
            assert!(!is_megatron || one.files() == other.files());
        }
        for dataset in named.into_iter().flatten() {
            check_tokens(&mut bench.trainer, &dataset, tokens.len().max(data.len()));
        }
    });
}

/// A dataset that opens can be counted, looked through and measured with, and what is no token of
/// the model is an error of all of that.
fn check_tokens(trainer: &mut Trainer, dataset: &Dataset, bytes: usize) {
    let count = dataset.token_count();
    assert!(count >= 1 && count <= bytes as u64);
    assert_eq!(dataset.files()[0].tokens, count);
    let vocab_size = trainer.model().config().vocab_size;
    let fits = dataset.max_token().is_ok_and(|most| (most as usize) < vocab_size);
    assert_eq!(dataset.check_tokens(vocab_size).is_ok(), fits);
    match trainer.eval(dataset, 2) {
        Ok(stats) => assert!(fits && stats.loss.is_finite() && stats.tokens < count),
        Err(error) => assert!(!fits || count < 2, "{count} sound tokens: {error}"),
    }
}

/// `model.safetensors` in a checkpoint that is otherwise sound.
pub(crate) fn safetensors(data: &[u8]) {
    with_bench(|bench| {
        let dir = bench.checkpoint_with("model.safetensors", data);
        check_model(&bench.engine, &dir);
        // The training state knows the file that it was saved with, and refuses another.
        let same = data == bench.model_file;
        assert_eq!(Trainer::load(&bench.engine, &dir).is_ok(), same);
    });
}

/// `config.json` in a checkpoint that is otherwise sound.
pub(crate) fn config(data: &[u8]) {
    with_bench(|bench| {
        let dir = bench.checkpoint_with("config.json", data);
        check_model(&bench.engine, &dir);
    });
}

/// `model.safetensors.index.json` beside sound weights in a file of another name.
pub(crate) fn index(data: &[u8]) {
    with_bench(|bench| {
        let dir = bench.folder.path().join("indexed");
        if !dir.exists() {
            let sound = bench.folder.path().join("checkpoint").join("config.json");
            fs::create_dir(&dir).expect("a temporary folder can be made");
            fs::copy(sound, dir.join("config.json")).expect("a temporary file can be copied");
            fs::write(dir.join("a.safetensors"), &bench.model_file).expect("a temporary file");
        }
        fs::write(dir.join("model.safetensors.index.json"), data).expect("a temporary file");
        check_model(&bench.engine, &dir);
    });
}

/// `trainer.json` in a checkpoint that is otherwise sound.
pub(crate) fn trainer_state(data: &[u8]) {
    with_bench(|bench| {
        let dir = bench.checkpoint_with("trainer.json", data);
        let loaded = Trainer::load(&bench.engine, &dir);
        let is_sound = bench.replaced.as_ref().is_some_and(|(_, sound)| sound == data);
        assert!(loaded.is_ok() || !is_sound, "what a save wrote must be read: {loaded:?}");
        let Ok(mut trainer) = loaded else { return };
        assert!(trainer.next_lr().is_finite());
        let schedule = &trainer.options().schedule;
        for step in [0, 1, trainer.steps_done(), u64::MAX] {
            assert!(schedule.at(step).is_finite());
        }
        // A step of a size that takes no time, if that is what the file asks for.
        let options = trainer.options();
        if options.batch_size * options.accumulation <= 16 {
            let _ = trainer.step(&bench.dataset);
        }
    });
}

/// A recipe's name with its switches.
pub(crate) fn recipe(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(recipe) = text.parse::<Recipe>() else { return };
    let again = recipe.to_string().parse::<Recipe>();
    assert_eq!(again.expect("a recipe's own name is a recipe"), recipe);
    for layer in 0..3 {
        for step in [0, 9, u64::MAX] {
            // What workspaces are made for.
            let used = recipe.for_layer(layer, 3, step, 10);
            assert!(used.iter().all(|linear| recipe.all().contains(linear)));
        }
    }
}

/// A model that loads has finite weights and the shape that it says. What loads from a folder loads
/// from memory.
fn check_model(engine: &Engine, dir: &Path) {
    let loaded = Model::load(engine, dir);
    let mut files = MemoryFiles::new();
    for entry in fs::read_dir(dir).expect("the temporary folder").flatten() {
        let bytes = fs::read(entry.path()).expect("a temporary file can be read");
        files.put(entry.file_name().to_string_lossy(), bytes);
    }
    let in_memory = Model::load_from(engine, &files);
    assert_eq!(loaded.is_ok(), in_memory.is_ok(), "{loaded:?}, but {in_memory:?}");
    let Ok(model) = loaded else { return };
    model.config().validate().expect("a loaded shape is a shape");
    let mut count = 0;
    for tensor in model.tensors() {
        let mut values = vec![0.0; tensor.shape.iter().product()];
        model.read_tensor(&tensor.name, &mut values).expect("a listed tensor can be read");
        assert!(values.iter().all(|value| value.is_finite()));
        count += values.len() as u64;
    }
    assert_eq!(count, model.config().parameter_count());
}

/// What the targets need and would take too long to make for every input.
struct Bench {
    engine: Engine,
    trainer: Trainer,
    dataset: Dataset,
    folder: tempfile::TempDir,
    /// The sound `model.safetensors`.
    model_file: Vec<u8>,
    /// The file of `checkpoint` that is not the sound one, and its sound content.
    replaced: Option<(PathBuf, Vec<u8>)>,
}

impl Bench {
    fn new() -> Self {
        let engine = Engine::new(EngineOptions {
            threads: 1,
            // A file that announces a large model must not make the fuzzer run out of memory.
            memory_limit: 1 << 26,
            ..EngineOptions::default()
        });
        let engine = engine.expect("an engine");
        let config = ModelConfig {
            vocab_size: 16,
            context_length: 8,
            layers: 1,
            heads: 1,
            channels: 8,
            ..ModelConfig::default()
        };
        let model = Model::new(&engine, &config).expect("a model");
        let options = TrainerOptions { batch_size: 1, ..TrainerOptions::default() };
        // The same bytes in every file on every processor, for the corpus to fit.
        for tensor in model.tensors() {
            let count = tensor.shape.iter().product();
            let values: Vec<f32> = (0..count).map(|i| (i % 7) as f32 / 8.0 - 0.25).collect();
            model.write_tensor(&tensor.name, &values).expect("finite weights");
        }
        let mut trainer = Trainer::new(&model, options).expect("a trainer");
        let dataset = Dataset::from_tokens((0..200).map(|i| i % 16).collect()).expect("tokens");
        // In memory where there is such a folder: a save flushes its files to the disk.
        let shm = Path::new("/dev/shm");
        let place = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let folder = tempfile::tempdir_in(place).expect("a temporary folder");
        let checkpoint = folder.path().join("checkpoint");
        trainer.save(&checkpoint).expect("a checkpoint");
        let model_file = fs::read(checkpoint.join("model.safetensors")).expect("the weights");
        Self { engine, trainer, dataset, folder, model_file, replaced: None }
    }

    /// The sound checkpoint with one other file.
    fn checkpoint_with(&mut self, name: &str, data: &[u8]) -> PathBuf {
        let dir = self.folder.path().join("checkpoint");
        let path = dir.join(name);
        if self.replaced.as_ref().is_none_or(|(replaced, _)| *replaced != path) {
            if let Some((other, sound)) = self.replaced.take() {
                fs::write(other, sound).expect("a temporary file can be written");
            }
            let sound = fs::read(&path).expect("the checkpoint has this file");
            self.replaced = Some((path.clone(), sound));
        }
        fs::write(path, data).expect("a temporary file can be written");
        dir
    }
}

fn with_bench(run: impl FnOnce(&mut Bench)) {
    thread_local! {
        static BENCH: RefCell<Option<Bench>> = const { RefCell::new(None) };
    }
    BENCH.with(|bench| run(bench.borrow_mut().get_or_insert_with(Bench::new)));
}
