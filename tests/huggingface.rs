//! Folders as transformers and its users leave them (tests/huggingface): losses, what survives
//! loading and saving, and training of models that differ from GPT-2.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mxfp4train::{
    Activation, Dataset, Engine, EngineOptions, GenerateOptions, Model, ModelConfig, Recipe,
    Recompute, Schedule, Trainer, TrainerOptions,
};
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

const NAMES: [&str; 6] =
    ["plain", "sharded", "head-instead-of-wte", "untied-head", "activation-function", "n-inner"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/huggingface")
}

fn engine() -> Engine {
    Engine::new(EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap()
}

fn data() -> Dataset {
    Dataset::open_files(&[root().join("eval.bin")]).unwrap()
}

fn options(recipe: &str) -> TrainerOptions {
    let schedule = Schedule { total_steps: 100, ..Schedule::default() };
    let recipe = recipe.parse().unwrap();
    TrainerOptions { batch_size: 3, recipe, schedule, ..TrainerOptions::default() }
}

fn loss_of(model: &Model) -> f32 {
    Trainer::new(model, options("fp32")).unwrap().eval(&data(), 0).unwrap().loss
}

/// The values of every tensor, as bits.
fn weights(model: &Model) -> BTreeMap<String, Vec<u32>> {
    let read = |tensor: &mxfp4train::TensorInfo| {
        let mut values = vec![0.0; tensor.len()];
        model.read_tensor(&tensor.name, &mut values).unwrap();
        (tensor.name.clone(), values.iter().map(|v| v.to_bits()).collect())
    };
    model.tensors().iter().map(read).collect()
}

fn config_of(dir: &Path) -> Map<String, Value> {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

#[test]
fn losses_are_those_of_transformers() {
    let expected: BTreeMap<String, f32> =
        serde_json::from_slice(&fs::read(root().join("expected-losses.json")).unwrap()).unwrap();
    assert_eq!(expected.len(), NAMES.len());
    for name in NAMES {
        let loss = loss_of(&Model::load(&engine(), &root().join(name)).unwrap());
        println!("{name}: {loss} ({})", expected[name]);
        assert!((loss - expected[name]).abs() <= 3e-4, "{name}: {loss}, not {}", expected[name]);
    }
}

/// What was loaded is what is saved, by a model and by its trainer, now and after another load.
#[test]
fn loading_and_saving_changes_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    for name in NAMES {
        let model = Model::load(&engine(), &root().join(name)).unwrap();
        let untied = name == "untied-head";
        assert_eq!(model.config().tied_head, !untied);
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        model.save(&first).unwrap();
        let mut trainer = Trainer::new(&model, options("bf16")).unwrap();
        trainer.save(&second).unwrap();
        let resumed = Trainer::load(&engine(), &second).unwrap().model().clone();
        for (again, dir) in [(Model::load(&engine(), &first).unwrap(), &first), (resumed, &second)]
        {
            assert_eq!(again.config(), model.config());
            assert!(weights(&again) == weights(&model), "{name}");
            let mut expected = config_of(&root().join(name));
            expected.insert("architectures".into(), json!(["GPT2LMHeadModel"]));
            expected.insert("tie_word_embeddings".into(), (!untied).into());
            assert_eq!(config_of(dir), expected, "{name}");
            let bytes = fs::read(dir.join("model.safetensors")).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(file.names().contains(&"lm_head.weight"), untied);
            assert!(file.tensor("transformer.wte.weight").is_ok());
        }
        let saves = [&first, &second].map(|dir| fs::read(dir.join("model.safetensors")).unwrap());
        assert!(saves[0] == saves[1], "{name}");
    }
}

/// Special tokens, dropout and whatever else a configuration says come out of a run that was
/// stopped and resumed.
#[test]
fn what_is_not_understood_survives_a_resumed_run() {
    let folder = tempfile::tempdir().unwrap();
    let [found, run, last] = ["found", "run", "last"].map(|name| folder.path().join(name));
    fs::create_dir(&found).unwrap();
    let mut config = config_of(&root().join("n-inner"));
    for (key, value) in [
        ("architectures", json!(["GPT2LMHeadModel"])),
        ("bos_token_id", json!(0)),
        ("eos_token_id", json!([0, 7])),
        ("pad_token_id", json!(63)),
        ("attn_pdrop", json!(0.25)),
        ("dtype", json!("bfloat16")),
        ("activation_function", json!("gelu_pytorch_tanh")),
        ("label2id", json!({"LABEL_0": 0})),
    ] {
        config.insert(key.into(), value);
    }
    fs::write(found.join("config.json"), Value::Object(config.clone()).to_string()).unwrap();
    let weights = "model.safetensors";
    fs::copy(root().join("n-inner").join(weights), found.join(weights)).unwrap();

    let model = Model::load(&engine(), &found).unwrap();
    let mut trainer = Trainer::new(&model, options("mxfp4-rht-sr")).unwrap();
    trainer.step(&data()).unwrap();
    trainer.save(&run).unwrap();
    let mut resumed = Trainer::load(&engine(), &run).unwrap();
    resumed.step(&data()).unwrap();
    resumed.save(&run).unwrap();
    resumed.model().save(&last).unwrap();
    // But for the type of the weights, which are f32 now.
    config.insert("dtype".into(), json!("float32"));
    assert_eq!(config_of(&run), config);
    assert_eq!(config_of(&last), config);
    assert_eq!(Model::load(&engine(), &last).unwrap().config(), model.config());
}

/// All that a model can differ in from GPT-2, one by one and together.
fn variants() -> Vec<(&'static str, ModelConfig)> {
    let gpt2 = ModelConfig {
        vocab_size: 64,
        context_length: 32,
        layers: 2,
        heads: 2,
        channels: 16,
        ..ModelConfig::default()
    };
    let all = ModelConfig {
        mlp_channels: 37,
        activation: Activation::Gelu,
        tied_head: false,
        scale_attention_by_layer: true,
        ..gpt2.clone()
    };
    vec![
        ("a narrow MLP", ModelConfig { mlp_channels: 5, ..gpt2.clone() }),
        ("a wide MLP", ModelConfig { mlp_channels: 131, ..gpt2.clone() }),
        ("exact GELU", ModelConfig { activation: Activation::Gelu, ..gpt2.clone() }),
        ("a head of its own", ModelConfig { tied_head: false, ..gpt2.clone() }),
        ("unscaled attention", ModelConfig { scale_attention: false, ..gpt2.clone() }),
        ("scaled by layer", ModelConfig { scale_attention_by_layer: true, ..gpt2.clone() }),
        ("all of it", all),
    ]
}

fn losses(trainer: &mut Trainer, steps: usize) -> Vec<u32> {
    (0..steps).map(|_| trainer.step(&data()).unwrap().loss.to_bits()).collect()
}

/// Every recipe trains every variant, with gradients that accumulate; the run repeats bit for bit,
/// with every way to save memory, and after a stop.
#[test]
fn every_recipe_trains_every_variant_and_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("run");
    for (name, config) in variants() {
        for recipe in Recipe::NAMES {
            let options = TrainerOptions { accumulation: 2, ..options(recipe) };
            let run = |recompute| {
                let model = Model::new(&engine(), &config).unwrap();
                Trainer::new(&model, TrainerOptions { recompute, ..options.clone() }).unwrap()
            };
            let mut trainer = run(Recompute::Nothing);
            let first = losses(&mut trainer, 2);
            trainer.save(&dir).unwrap();
            let rest = losses(&mut trainer, 3);
            let mut resumed = Trainer::load(&engine(), &dir).unwrap();
            assert_eq!(resumed.model().config(), &config);
            assert_eq!(losses(&mut resumed, 3), rest, "{name}, {recipe}: resumed");
            assert!(weights(resumed.model()) == weights(trainer.model()), "{name}, {recipe}");
            let all: Vec<_> = first.into_iter().chain(rest).collect();
            for recompute in [Recompute::Pointwise, Recompute::Block] {
                assert_eq!(losses(&mut run(recompute), 5), all, "{name}, {recipe}: {recompute}");
            }
            let last = f32::from_bits(all[4]);
            assert!(last < f32::from_bits(all[0]) && last > 0.0, "{name}, {recipe}: {all:?}");
        }
    }
}

/// The gradient of every tensor is the slope of the loss in its own direction.
#[test]
fn gradients_are_slopes() {
    for (name, config) in variants() {
        let model = Model::new(&engine(), &config).unwrap();
        // Away from where biases are 0 and probabilities equal.
        for (place, tensor) in model.tensors().iter().enumerate() {
            let mut values = vec![0.0; tensor.len()];
            model.read_tensor(&tensor.name, &mut values).unwrap();
            for (i, value) in values.iter_mut().enumerate() {
                *value = *value * 8.0_f32.min(0.9 / value.abs().max(0.01))
                    + 0.1 * ((i * 7 + place) as f32).sin();
            }
            model.write_tensor(&tensor.name, &values).unwrap();
        }
        let tokens: Vec<u32> = (0..33).map(|i| i * i % 61).collect();
        let one = TrainerOptions { batch_size: 1, ..options("fp32") };
        let dataset = Dataset::from_tokens(tokens.clone()).unwrap();
        let mut still = Trainer::new(&model, TrainerOptions { ..one.clone() }).unwrap();
        // A step that moves nothing.
        still.set_lr(Some(0.0)).unwrap();
        still.step_tokens(&tokens).unwrap();
        for tensor in model.tensors() {
            let (mut values, mut gradient) = (vec![0.0; tensor.len()], vec![0.0; tensor.len()]);
            model.read_tensor(&tensor.name, &mut values).unwrap();
            still.read_gradient(&tensor.name, &mut gradient).unwrap();
            let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let mut moved = |by: f64| {
                let step =
                    |(v, g): (&f32, &f32)| (f64::from(*v) + by * f64::from(*g) / norm) as f32;
                let moved: Vec<f32> = values.iter().zip(&gradient).map(step).collect();
                model.write_tensor(&tensor.name, &moved).unwrap();
                f64::from(still.eval(&dataset, 0).unwrap().loss)
            };
            const BY: f64 = 4e-3;
            let slope = (moved(BY) - moved(-BY)) / (2.0 * BY);
            model.write_tensor(&tensor.name, &values).unwrap();
            // An f32 loss of about 5 is off by 5e-7.
            let bound = 2e-3 * norm + 4e-4;
            assert!((slope - norm).abs() < bound, "{name}, {}: {slope} {norm}", tensor.name);
        }
    }
}

/// A head of its own is what logits are made with, has a gradient and moments of its own, decays as
/// the embedding does, and counts.
#[test]
fn a_head_of_its_own_is_a_parameter_like_others() {
    let model = Model::load(&engine(), &root().join("untied-head")).unwrap();
    let head = "lm_head.weight";
    assert_eq!(model.tensors().last().unwrap().name, head);
    assert_eq!(model.tensors().last().unwrap().shape, [64, 16]);
    let tied = ModelConfig { tied_head: true, ..model.config().clone() };
    assert_eq!(model.config().parameter_count(), tied.parameter_count() + 64 * 16);

    let mut logits = vec![0.0; 64];
    model.next_logits(&[1, 2, 3], &mut logits).unwrap();
    let prompt = GenerateOptions { max_tokens: 3, temperature: 0.0, ..GenerateOptions::default() };
    let first = model.generate(&[1, 2, 3], &prompt, &mut |_| true).unwrap().tokens[0];
    let best = (0..64).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
    assert_eq!(first as usize, best);
    // Without the head every token is as likely as any other, whatever the embedding.
    let mut values = vec![0.0; 64 * 16];
    model.read_tensor(head, &mut values).unwrap();
    model.write_tensor(head, &vec![0.0; 64 * 16]).unwrap();
    assert!((loss_of(&model) - 64f32.ln()).abs() < 1e-6);
    model.write_tensor(head, &values).unwrap();

    // A gradient of its own, beside which the embedding's is that of the tokens that come in.
    let mut trainer = Trainer::new(&model, options("fp32")).unwrap();
    let before = weights(&model);
    trainer.step(&data()).unwrap();
    let gradient = |name: &str| {
        let mut values = vec![0.0; 64 * 16];
        trainer.read_gradient(name, &mut values).unwrap();
        values
    };
    let (of_head, of_wte) = (gradient(head), gradient("transformer.wte.weight"));
    assert!(of_head.iter().all(|g| *g != 0.0), "every token has a part in the softmax");
    assert!(of_head != of_wte);
    // Tokens that the batch does not have leave the embedding's gradient 0, at every step anew.
    trainer.step(&data()).unwrap();
    let mut values = vec![0.0; 64 * 16];
    trainer.read_gradient("transformer.wte.weight", &mut values).unwrap();
    let in_first_only = of_wte.chunks(16).zip(values.chunks(16)).filter(|(first, second)| {
        first.iter().any(|g| *g != 0.0) && second.iter().all(|g| *g == 0.0)
    });
    assert!(in_first_only.count() > 0);
    assert!(before != weights(&model));
}
