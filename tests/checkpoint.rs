//! Checkpoints of real models through the public interface: what `transformers` reads, what a
//! damaged folder says, and what the other calls answer to bad input.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mxfp4train::{
    Dataset, DecoderWeights, Draft, Engine, EngineOptions, Error, GenerateOptions, Model,
    ModelConfig, Trainer, TrainerOptions,
};
use safetensors::SafeTensors;

fn engine() -> Engine {
    Engine::new(EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap()
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/gpt2-tiny")
}

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 64,
        context_length: 16,
        layers: 1,
        heads: 2,
        channels: 8,
        ..ModelConfig::default()
    }
}

fn data() -> Dataset {
    Dataset::from_tokens((0..500).map(|i| i * i % 61).collect()).unwrap()
}

fn trainer() -> Trainer {
    let options = TrainerOptions { batch_size: 2, ..TrainerOptions::default() };
    Trainer::new(&Model::new(&engine(), &config()).unwrap(), options).unwrap()
}

/// (dtype, shape, bytes) by name.
fn tensors(path: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, view)| {
            let value =
                (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec());
            (name.to_owned(), value)
        })
        .collect()
}

/// A folder that transformers wrote, loaded and saved by us, holds the same names, types, shapes
/// and bytes, and every key of its configuration that makes the model.
#[test]
fn saved_folders_are_those_of_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    Model::load(&engine(), &fixture()).unwrap().save(&dir).unwrap();
    let (ours, theirs) = (dir.join("model.safetensors"), fixture().join("model.safetensors"));
    assert!(tensors(&ours) == tensors(&theirs));

    let json = |dir: &Path| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
    };
    let (ours, theirs) = (json(&dir), json(&fixture()));
    for key in [
        "model_type",
        "architectures",
        "vocab_size",
        "n_positions",
        "n_embd",
        "n_layer",
        "n_head",
        "n_inner",
        "activation_function",
        "layer_norm_epsilon",
        "tie_word_embeddings",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "dtype",
    ] {
        assert_eq!(ours.get(key), theirs.get(key), "{key}");
    }
}

/// The logits that transformers computed from the same folder.
#[test]
fn logits_are_those_of_transformers() {
    let bytes = std::fs::read(fixture().join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> {
        file.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec()
    };
    let tokens: Vec<u32> = words("tokens").into_iter().map(u32::from_le_bytes).collect();
    let expected: Vec<f32> = words("logits_last").into_iter().map(f32::from_le_bytes).collect();
    let model = Model::load(&engine(), &fixture()).unwrap();
    let vocab = model.config().vocab_size;
    let window = file.tensor("tokens").unwrap().shape()[1];
    for (tokens, expected) in tokens.chunks(window).zip(expected.chunks(vocab)) {
        let mut logits = vec![0.0; vocab];
        model.next_logits(&tokens[..window - 1], &mut logits).unwrap();
        for (ours, theirs) in logits.iter().zip(expected) {
            assert!((ours - theirs).abs() <= 1e-4, "{ours} instead of {theirs}");
        }
    }
}

/// What each kind of damage to a checkpoint folder says, with the real trainer.
#[test]
fn damage_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("checkpoint");
    let mut trainer = trainer();
    trainer.step(&data()).unwrap();
    trainer.save(&dir).unwrap();
    let files = ["config.json", "model.safetensors", "trainer.json", "trainer.safetensors"];
    let sound = files.map(|file| std::fs::read(dir.join(file)).unwrap());
    let load = || Trainer::load(&engine(), &dir).map(|trainer| trainer.steps_done());
    assert_eq!(load().unwrap(), 1);

    let break_file = |index: usize, change: &dyn Fn(&mut Vec<u8>)| {
        let path = dir.join(files[index]);
        let mut bytes = sound[index].clone();
        change(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        let message = load().unwrap_err().to_string();
        assert!(message.contains(files[index]), "{message} does not name {}", files[index]);
        std::fs::write(&path, &sound[index]).unwrap();
        message
    };
    for index in [1, 3] {
        let message = break_file(index, &|b| b[3] = 0x7f); // length of the header
        assert!(message.contains("header"), "{message}");
        let message = break_file(index, &|b| b[40] ^= 1); // JSON of the header
        assert!(message.contains("header") || message.contains("tensor"), "{message}");
        let message = break_file(index, &|b| *b.last_mut().unwrap() ^= 1); // a tensor's bytes
        assert!(message.contains("transformer."), "{message} does not name the tensor");
        break_file(index, &|b| b.truncate(b.len() - 9));
    }
    for index in [0, 2] {
        let message = break_file(index, &|b| b.truncate(b.len() / 2));
        assert!(message.contains("line"), "{message}");
    }
    std::fs::remove_file(dir.join(files[2])).unwrap();
    let message = load().unwrap_err().to_string();
    assert!(message.contains("without its training state"), "{message}");
    // A model without a training state still loads as one.
    Model::load(&engine(), &dir).unwrap();
}

/// A save that cannot happen leaves the checkpoint before it whole.
#[test]
fn a_failed_save_leaves_the_last_one_whole() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("checkpoint");
    let mut trainer = trainer();
    trainer.save(&dir).unwrap();

    let below_a_file = dir.join("config.json/below");
    assert!(matches!(trainer.save(&below_a_file), Err(Error::Io { .. })));

    // A rate that overflows leaves weights that can be saved.
    trainer.set_lr(Some(f32::MAX)).unwrap();
    let error = trainer.step(&data()).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    trainer.save(&dir).unwrap();
    assert_eq!(Trainer::load(&engine(), &dir).unwrap().steps_done(), 0);
}

/// A step that fails changes nothing: the next one is what it would have been.
#[test]
fn a_failed_step_changes_nothing() {
    let (mut a, mut b) = (trainer(), trainer());
    let bad = Dataset::from_tokens(vec![64; 500]).unwrap();
    let error = a.step(&bad).unwrap_err().to_string();
    assert!(error.contains("token 64") && error.contains("offset"), "{error}");
    let error = a.step_tokens(&[0; 10]).unwrap_err().to_string();
    assert!(error.contains("2 rows of 17") && error.contains("got 10"), "{error}");
    let error = a.step_tokens(&[64; 34]).unwrap_err();
    assert!(matches!(error, Error::TokenRange { token: 64, vocab_size: 64, .. }), "{error}");
    let short = Dataset::from_tokens(vec![1; 16]).unwrap();
    let error = a.step(&short).unwrap_err().to_string();
    assert!(error.contains("17 tokens"), "{error}");
    assert_eq!(a.step(&data()).unwrap().loss, b.step(&data()).unwrap().loss);
}

#[test]
fn bad_options_name_themselves() {
    let model = Model::new(&engine(), &config()).unwrap();
    let base = TrainerOptions::default();
    for (options, part) in [
        (TrainerOptions { batch_size: 0, ..base.clone() }, "batch_size: expected"),
        (TrainerOptions { accumulation: 1 << 20, ..base.clone() }, "accumulation: expected"),
        (TrainerOptions { sequence_length: 17, ..base.clone() }, "context of 16"),
        (
            TrainerOptions { recipe: "mxfp4,bf16-last-steps=0.5".parse().unwrap(), ..base },
            "total_steps",
        ),
    ] {
        let error = Trainer::new(&model, options).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    for (config, part) in [
        (ModelConfig { vocab_size: 0, ..config() }, "vocab_size: expected"),
        (ModelConfig { heads: 3, ..config() }, "do not divide"),
        (ModelConfig { layer_norm_epsilon: f32::NAN, ..config() }, "layer_norm_epsilon"),
    ] {
        let error = Model::new(&engine(), &config).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    for device in ["cuda:12345", "cuda:x", "tpu"] {
        let options = EngineOptions { device: device.into(), ..EngineOptions::default() };
        assert!(Engine::new(options).unwrap_err().to_string().contains(device));
    }
    let limited = EngineOptions { memory_limit: 1000, ..EngineOptions::default() };
    let error = Model::new(&Engine::new(limited).unwrap(), &config()).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    let generate = |prompt: &[u32], options| model.generate(prompt, &options, &mut |_| true);
    let options = GenerateOptions::default();
    assert!(generate(&[], options.clone()).unwrap_err().to_string().contains("prompt"));
    assert!(matches!(generate(&[64], options.clone()), Err(Error::TokenRange { .. })));
    let of = |change: fn(&mut GenerateOptions)| {
        let mut options = options.clone();
        change(&mut options);
        generate(&[1], options).unwrap_err().to_string()
    };
    assert!(of(|options| options.temperature = -1.0).contains("temperature"));
    assert!(of(|options| options.top_p = 0.0).contains("top_p"));
    assert!(of(|options| options.min_p = 1.5).contains("min_p"));
    assert!(of(|options| options.repetition_penalty = 0.0).contains("repetition_penalty"));
    assert!(of(|options| options.repetition_penalty = f32::NAN).contains("repetition_penalty"));
    assert!(
        of(|options| options.draft_tokens = 16).contains("draft_tokens: expected from 1 to 15")
    );
    let of_itself = of(|options| {
        options.draft = Draft::Mxfp4;
        options.weights = DecoderWeights::Mxfp4;
    });
    assert!(of_itself.contains("use none or ngram, or weights f32 or bf16"), "{of_itself}");
    let mut tensor = vec![f32::NAN; 64 * 8];
    let error = model.write_tensor("transformer.wte.weight", &tensor).unwrap_err().to_string();
    assert!(error.contains("element 0 of transformer.wte.weight"), "{error}");
    tensor.pop();
    let error = model.write_tensor("transformer.wte.weight", &tensor).unwrap_err().to_string();
    assert!(error.contains("[64, 8]") && error.contains("511"), "{error}");
    let error = model.read_tensor("wte", &mut tensor).unwrap_err().to_string();
    assert!(error.contains("\"wte\"") && error.contains("transformer.wte.weight"), "{error}");
}

/// Generation continues past the context, repeats for a seed, and stops when told.
#[test]
fn generation_slides_and_stops() {
    let model = Model::new(&engine(), &config()).unwrap();
    let options =
        GenerateOptions { max_tokens: 40, temperature: 1.0, ..GenerateOptions::default() };
    let all = model.generate(&[1, 2, 3], &options, &mut |_| true).unwrap().tokens;
    assert_eq!(all.len(), 40);
    let again = model.generate(&[1, 2, 3], &options, &mut |_| true).unwrap();
    assert_eq!(again.tokens, all);
    let mut seen = 0;
    let mut stop_at_five = |_| {
        seen += 1;
        seen < 5
    };
    let stopped = model.generate(&[1, 2, 3], &options, &mut stop_at_five).unwrap();
    assert_eq!(stopped.tokens, all[..5]);
}
