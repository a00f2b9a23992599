//! Llama's blocks through the public interface: every recipe runs, repeats and goes on where it was
//! saved; folders of Hugging Face are read as they are found and written as they came; what is not
//! supported is named.

#[path = "common/engines.rs"]
mod engines;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use engines::{engines, is_gpu};
use mxfp4train::{
    Architecture, Dataset, Engine, EngineOptions, Error, GenerateOptions, Lora, Model, ModelConfig,
    Recipe, Recompute, Rope, RopeScaling, Schedule, StoredWeights, Trainer, TrainerOptions,
};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};

fn cpu() -> Engine {
    Engine::new(EngineOptions::default()).unwrap()
}

/// Sizes that nothing divides.
fn config() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 35,
        context_length: 34,
        layers: 3,
        heads: 6,
        kv_heads: 2,
        channels: 36,
        mlp_channels: 50,
        ..ModelConfig::default()
    }
}

/// Of each class that there is.
fn configs() -> [ModelConfig; 3] {
    let rope = Rope {
        theta: 100.0,
        scaling: RopeScaling::Llama3 { factor: 4.0, low: 1.0, high: 4.0, original_context: 16 },
    };
    [
        config(),
        ModelConfig { qkv_bias: true, kv_heads: 1, rope, ..config() },
        ModelConfig { qk_norm: true, head_size: 10, tied_head: false, ..config() },
    ]
}

fn data() -> Dataset {
    Dataset::from_tokens((0..3000u32).map(|i| i * i % 31).collect()).unwrap()
}

fn options(recipe: &str) -> TrainerOptions {
    TrainerOptions {
        batch_size: 2,
        accumulation: 2,
        recipe: recipe.parse().unwrap(),
        schedule: Schedule { lr: 5e-3, total_steps: 40, ..Schedule::default() },
        ..TrainerOptions::default()
    }
}

fn losses(trainer: &mut Trainer, steps: usize) -> Vec<f32> {
    (0..steps).map(|_| trainer.step(&data()).unwrap().loss).collect()
}

/// All tensors, by name.
fn weights(model: &Model) -> HashMap<String, Vec<f32>> {
    let read = |info: &mxfp4train::TensorInfo| {
        let mut values = vec![0.0; info.len()];
        model.read_tensor(&info.name, &mut values).unwrap();
        (info.name.clone(), values)
    };
    model.tensors().iter().map(read).collect()
}

#[test]
fn every_recipe_repeats_and_goes_on_where_it_was_saved() {
    for engine in engines() {
        for (recipe, config) in Recipe::NAMES.into_iter().zip(configs().into_iter().cycle()) {
            let new = || Trainer::new(&Model::new(&engine, &config).unwrap(), options(recipe));
            let mut straight = match new() {
                Ok(trainer) => trainer,
                // Sizes that the recipe does not take, which it says.
                Err(Error::Unsupported { remedy, .. }) => {
                    println!("{recipe} on {}: {remedy}", engine.device());
                    continue;
                }
                Err(error) => panic!("{recipe}: {error}"),
            };
            let all = losses(&mut straight, 8);
            assert!(
                all.iter().all(|loss| loss.is_finite()) && all[7] < all[0],
                "{recipe}: {all:?}"
            );
            let mut again = new().unwrap();
            assert_eq!(losses(&mut again, 5), all[..5], "{recipe}");
            let folder = tempfile::tempdir().unwrap();
            again.save(folder.path()).unwrap();
            let mut resumed = Trainer::load(&engine, folder.path()).unwrap();
            assert_eq!(resumed.model().config(), &config.clone());
            assert_eq!(losses(&mut resumed, 3), all[5..], "{recipe}");
            assert!(weights(resumed.model()) == weights(straight.model()), "{recipe}: weights");
        }
    }
}

/// What is computed again is what it was, to the bit, and so is what blocks make of fewer tokens.
#[test]
fn recomputing_changes_no_bit() {
    for engine in engines() {
        for config in configs() {
            for token_drop in ["", "start=16,steps=2"] {
                let run = |recompute| {
                    let model = Model::new(&engine, &config).unwrap();
                    let token_drop = (!token_drop.is_empty()).then(|| token_drop.parse().unwrap());
                    let options =
                        TrainerOptions { recompute, token_drop, ..options("mxfp4-rht-sr") };
                    let mut trainer = Trainer::new(&model, options).unwrap();
                    (losses(&mut trainer, 3), weights(&model))
                };
                let kept = run(Recompute::Nothing);
                for recompute in [Recompute::Pointwise, Recompute::Block] {
                    assert!(run(recompute) == kept, "{recompute}, {token_drop:?}");
                }
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let run = |threads| {
        let engine = Engine::new(EngineOptions { threads, ..EngineOptions::default() }).unwrap();
        let [.., config] = configs();
        let mut trainer =
            Trainer::new(&Model::new(&engine, &config).unwrap(), options("mxfp4-rht-sr")).unwrap();
        losses(&mut trainer, 3)
    };
    assert_eq!(run(1), run(3));
}

/// A file of tensors as bytes by name.
fn tensors(path: &Path) -> HashMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let of = |(name, view): (&str, TensorView<'_>)| {
        (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.iter().map(of).collect()
}

fn oracle(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle").join(name)
}

const ORACLES: [&str; 4] = ["llama-tiny", "qwen2-odd", "qwen3-tiny", "llama-stretched"];

#[test]
fn a_folder_is_written_as_it_came() {
    for name in ORACLES {
        let (from, to) = (oracle(name), tempfile::tempdir().unwrap());
        let model = Model::load(&cpu(), &from).unwrap();
        model.save(to.path()).unwrap();
        let file = "model.safetensors";
        assert!(tensors(&to.path().join(file)) == tensors(&from.join(file)), "{name}");
        let read = |dir: &Path| -> Map<String, Value> {
            serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
        };
        assert_eq!(read(to.path()), read(&from), "{name}");
        assert_eq!(Model::load(&cpu(), to.path()).unwrap().config(), model.config());
    }
}

/// A new model's folder says all that it is, in each class's words.
#[test]
fn new_models_are_of_the_class_that_has_them() {
    let [llama, qwen2, qwen3] = configs();
    for (config, kind) in [(llama, "llama"), (qwen2, "qwen2"), (qwen3, "qwen3")] {
        let (model, dir) = (Model::new(&cpu(), &config).unwrap(), tempfile::tempdir().unwrap());
        model.save(dir.path()).unwrap();
        let text = fs::read(dir.path().join("config.json")).unwrap();
        let json: Map<String, Value> = serde_json::from_slice(&text).unwrap();
        assert_eq!(json["model_type"], kind);
        let loaded = Model::load(&cpu(), dir.path()).unwrap();
        assert_eq!(loaded.config(), model.config());
        assert!(weights(&loaded) == weights(&model));
        let names = tensors(&dir.path().join("model.safetensors"));
        assert!(names.contains_key("model.layers.2.self_attn.v_proj.weight"), "{kind}");
        assert!(!names.keys().any(|name| name.contains("qkv_proj")), "{kind}");
    }
}

/// Several files and an index, in half the bits, without the prefix, and with what old versions saved.
#[test]
fn folders_are_read_as_they_are_found() {
    let from = oracle("qwen3-tiny");
    let model = Model::load(&cpu(), &from).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(from.join("config.json")).unwrap();
    // As transformers 4 wrote it.
    let mut config: Map<String, Value> = serde_json::from_str(&text).unwrap();
    config.remove("rope_parameters");
    config.insert("rope_theta".into(), json!(10000.0));
    config.insert("rope_scaling".into(), Value::Null);
    fs::write(dir.path().join("config.json"), serde_json::to_string(&config).unwrap()).unwrap();
    let mut files = [Vec::new(), Vec::new()];
    let mut map = Map::new();
    let buffer = (Dtype::F32, vec![8], vec![0; 32]);
    let all = tensors(&from.join("model.safetensors"));
    let old = [("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), buffer)];
    let mut expected = HashMap::new();
    for (i, (name, (_, shape, bytes))) in all.into_iter().chain(old).enumerate() {
        let half: Vec<u8> = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .flat_map(|word| half::bf16::from_f32(f32::from_le_bytes(*word)).to_le_bytes())
            .collect();
        let values: Vec<f32> = half
            .as_chunks::<2>()
            .0
            .iter()
            .map(|word| half::bf16::from_le_bytes(*word).to_f32())
            .collect();
        let short = name.strip_prefix("model.").unwrap_or(&name).to_owned();
        expected.insert(name, values);
        map.insert(short.clone(), json!(format!("part-{}.safetensors", i % 2)));
        files[i % 2].push((short, shape, half));
    }
    for (i, file) in files.iter().enumerate() {
        let views = file.iter().map(|(name, shape, bytes)| {
            (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap())
        });
        let path = dir.path().join(format!("part-{i}.safetensors"));
        safetensors::serialize_to_file(views, None, &path).unwrap();
    }
    let index = json!({ "metadata": {}, "weight_map": map });
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let found = Model::load(&cpu(), dir.path()).unwrap();
    assert_eq!(found.config(), model.config());
    for (name, values) in expected {
        if name.ends_with("inv_freq") {
            continue;
        }
        let mut ours = vec![0.0; values.len()];
        found.read_tensor(&name, &mut ours).unwrap();
        assert!(ours == values, "{name}");
    }
}

#[test]
fn parts_are_read_and_written_by_their_names() {
    let [_, config, _] = configs();
    let model = Model::new(&cpu(), &config).unwrap();
    let whole = |model: &Model| {
        let mut values = vec![0.0; (6 + 2) * 6 * 36];
        model.read_tensor("model.layers.1.self_attn.qkv_proj.weight", &mut values).unwrap();
        values
    };
    let before = whole(&model);
    let [mut q, mut k] = [6 * 6 * 36, 6 * 36].map(|len| vec![0.0; len]);
    model.read_tensor("model.layers.1.self_attn.q_proj.weight", &mut q).unwrap();
    model.read_tensor("model.layers.1.self_attn.k_proj.weight", &mut k).unwrap();
    assert!(q == before[..q.len()] && k == before[q.len()..][..k.len()]);
    let new = vec![0.25; k.len()];
    model.write_tensor("model.layers.1.self_attn.k_proj.weight", &new).unwrap();
    let mut expected = before;
    expected[q.len()..][..k.len()].copy_from_slice(&new);
    assert!(whole(&model) == expected);

    let wrong = model.read_tensor("model.layers.1.self_attn.k_proj.weight", &mut q).unwrap_err();
    assert!(wrong.to_string().contains("k_proj.weight, a part of a tensor"), "{wrong}");
    let mut trainer = Trainer::new(&model, options("fp32")).unwrap();
    trainer.step(&data()).unwrap();
    let mut gradient = vec![0.0; k.len()];
    trainer.read_gradient("model.layers.1.self_attn.k_proj.weight", &mut gradient).unwrap();
    assert!(gradient.iter().any(|g| *g != 0.0));
    let part = trainer.is_trained("model.layers.1.mlp.up_proj.weight").unwrap_err().to_string();
    assert!(part.contains("a part of \"model.layers.1.mlp.gate_up_proj.weight\""), "{part}");
}

#[test]
fn what_is_not_supported_is_named() {
    let of = |name: &str, key: &str, value: Value| {
        let text = fs::read_to_string(oracle(name).join("config.json")).unwrap();
        let mut config: Map<String, Value> = serde_json::from_str(&text).unwrap();
        config.insert(key.into(), value);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), serde_json::to_string(&config).unwrap()).unwrap();
        let file = "model.safetensors";
        fs::copy(oracle(name).join(file), dir.path().join(file)).unwrap();
        Model::load(&cpu(), dir.path())
    };
    let (llama, qwen3) = ("llama-tiny", "qwen3-tiny");
    let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4 });
    let half = json!({ "rope_type": "default", "partial_rotary_factor": 0.5 });
    let cases = [
        (llama, "hidden_act", json!("gelu"), ["expected \"silu\"", "found \"gelu\""]),
        (llama, "attention_bias", json!(true), ["attention_bias: expected false", "found true"]),
        (llama, "mlp_bias", json!(true), ["mlp_bias: expected false", "found true"]),
        (llama, "rope_parameters", yarn, ["\"default\", \"linear\" or \"llama3\"", "yarn"]),
        (
            llama,
            "rope_parameters",
            json!({ "full_attention": { "rope_type": "default" } }),
            ["one set of numbers", "full_attention"],
        ),
        (llama, "rope_parameters", json!(4), ["an object, or null", "found 4"]),
        (llama, "rope_parameters", half, ["partial_rotary_factor: expected 1", "found 0.5"]),
        (
            llama,
            "rope_parameters",
            json!({"rope_type": "linear"}),
            ["factor: expected a number", "no such"],
        ),
        (
            llama,
            "num_attention_heads",
            json!(7),
            ["num_key_value_heads: 2 do not divide 7", "heads"],
        ),
        (llama, "head_dim", json!(7), ["head_dim: expected an even number", "got 7"]),
        (llama, "head_dim", json!(0), ["head_dim: expected a number from 1 on", "found 0"]),
        (llama, "num_key_value_heads", json!("2"), ["a whole number", "found \"2\""]),
        (llama, "model_type", json!("mixtral"), ["mixtures of experts", "found \"mixtral\""]),
        (llama, "model_type", json!("qwen3_moe"), ["mixtures of experts", "qwen3_moe"]),
        (llama, "model_type", json!("gemma2"), ["differ from Llama's", "gemma2"]),
        (llama, "rms_norm_eps", json!(0.0), ["rms_norm_eps: expected a number between", "got 0"]),
        (
            qwen3,
            "use_sliding_window",
            json!(1),
            ["use_sliding_window: expected true or false", "1"],
        ),
        (
            qwen3,
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
            ["layer_types", "sliding windows"],
        ),
    ];
    for (name, key, value, parts) in cases {
        let error = of(name, key, value.clone()).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, Error::Format { .. }), "{message}");
        assert!(parts.iter().all(|part| message.contains(part)), "{key} {value}: {message}");
    }
    // Another shape than the weights have.
    let error = of(llama, "intermediate_size", json!(127)).unwrap_err().to_string();
    assert!(error.contains("gate_proj.weight: expected shape [127, 48]"), "{error}");
    // A window over all positions is none.
    assert!(of(qwen3, "sliding_window", json!(64)).is_ok());
}

/// A part of what PEFT trained is no adapter.
#[test]
fn damaged_adapters_are_refused() {
    let base = Model::load(&cpu(), &oracle("llama-tiny")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    base.with_lora(Lora { rank: 2, ..Lora::default() }).unwrap().save_lora(dir.path()).unwrap();
    let path = dir.path().join("adapter_model.safetensors");
    let whole = tensors(&path);
    let load = |is_left_out: &dyn Fn(&str) -> bool| {
        let left = whole.iter().filter(|(name, _)| !is_left_out(name));
        let views = left.map(|(name, (dtype, shape, bytes))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &path).unwrap();
        base.load_lora(dir.path())
    };
    assert!(load(&|_| false).is_ok());
    let missing = |part: &str| {
        let error = load(&|name| name.contains(part)).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        error
    };
    for part in ["0.self_attn.q_proj.lora_A", "1.self_attn.q_proj.lora_B", "0.mlp.up_proj.lora_A"] {
        assert!(missing(part).contains("missing; every block has the same"), "{part}");
    }
    missing("0.self_attn.v_proj");
    assert!(missing("self_attn.q_proj").contains("target_modules"));
    assert!(missing("mlp.down_proj").contains("target_modules"));
}

/// PEFT adapts whatever it was told: here keys alone, which are narrower than all heads by far.
#[test]
fn an_adapter_of_keys_alone_is_one() {
    let sizes = ModelConfig { heads: 8, kv_heads: 1, head_size: 64, channels: 16, ..config() };
    let base = Model::new(&cpu(), &sizes).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let layers = [true, false, false, false];
    base.with_lora(Lora { rank: 16, alpha: 8.0, layers }).unwrap().save_lora(dir.path()).unwrap();
    let path = dir.path().join("adapter_model.safetensors");
    let a: Vec<f32> = (0..16 * 16).map(|i| (i as f32 * 0.37).sin()).collect();
    let b: Vec<f32> = (0..64 * 16).map(|i| (i as f32 * 0.21).cos()).collect();
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
    let (bytes_a, bytes_b) = (bytes(&a), bytes(&b));
    let views = tensors(&path).into_keys().filter(|name| name.contains("k_proj")).map(|name| {
        let (shape, bytes) = match name.contains("lora_A") {
            true => (vec![16, 16], &bytes_a),
            false => (vec![64, 16], &bytes_b),
        };
        (name, TensorView::new(Dtype::F32, shape, bytes).unwrap())
    });
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &path).unwrap();
    let about = dir.path().join("adapter_config.json");
    let mut config: Map<String, Value> =
        serde_json::from_str(&fs::read_to_string(&about).unwrap()).unwrap();
    config.insert("target_modules".into(), json!(["k_proj"]));
    fs::write(&about, Value::from(config).to_string()).unwrap();

    let merged = base.load_lora(dir.path()).unwrap().merge_lora().unwrap();
    let weights = |model: &Model, part: &str| {
        let rows = if part == "q" { 512 } else { 64 };
        let mut values = vec![0.0; rows * 16];
        let name = format!("model.layers.1.self_attn.{part}_proj.weight");
        model.read_tensor(&name, &mut values).unwrap();
        values
    };
    for part in ["q", "v"] {
        assert_eq!(weights(&merged, part), weights(&base, part));
    }
    let added = weights(&merged, "k").into_iter().zip(weights(&base, "k")).map(|(k, of)| k - of);
    for (i, added) in added.enumerate() {
        let (row, column) = (i / 16, i % 16);
        let product: f32 = (0..16).map(|r| b[row * 16 + r] * a[r * 16 + column]).sum();
        assert!((added - 0.5 * product).abs() < 1e-5, "{i}: {added}, {product}");
    }
}

/// transformers' class `llama` wants a width that heads divide; another of the same blocks does not.
#[test]
fn widths_that_heads_do_not_divide_are_of_another_class() {
    let odd = ModelConfig { channels: 64, heads: 5, kv_heads: 0, head_size: 6, ..config() };
    let (model, dir) = (Model::new(&cpu(), &odd).unwrap(), tempfile::tempdir().unwrap());
    model.save(dir.path()).unwrap();
    let text = fs::read_to_string(dir.path().join("config.json")).unwrap();
    assert!(text.contains("\"MistralForCausalLM\"") && text.contains("\"sliding_window\": null"));
    assert_eq!(Model::load(&cpu(), dir.path()).unwrap().config(), model.config());
}

#[test]
fn patterns_of_parts_are_told_the_whole() {
    let model = Model::new(&cpu(), &config()).unwrap();
    let frozen = "*.q_proj.*".parse().unwrap();
    let error = Trainer::new(&model, TrainerOptions { frozen, ..options("bf16") }).unwrap_err();
    let said = "a part of one tensor in training, \"model.layers.0.self_attn.qkv_proj.weight\"";
    assert!(error.to_string().contains(said), "{error}");
}

#[test]
fn a_window_is_refused_unless_it_is_as_long_as_the_context() {
    let [llama, ..] = configs();
    let dir = tempfile::tempdir().unwrap();
    Model::new(&cpu(), &llama).unwrap().save(dir.path()).unwrap();
    let path = dir.path().join("config.json");
    let mut config: Map<String, Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config.insert("model_type".into(), json!("mistral"));
    for (window, is_ok) in [(json!(null), true), (json!(34), true), (json!(33), false)] {
        config.insert("sliding_window".into(), window.clone());
        fs::write(&path, serde_json::to_string(&config).unwrap()).unwrap();
        let model = Model::load(&cpu(), dir.path());
        assert_eq!(model.is_ok(), is_ok, "{window}");
        match model {
            // And stays a Mistral.
            Ok(model) => {
                let to = tempfile::tempdir().unwrap();
                model.save(to.path()).unwrap();
                let text = fs::read_to_string(to.path().join("config.json")).unwrap();
                assert!(text.contains("\"MistralForCausalLM\""), "{text}");
            }
            Err(error) => {
                let said = "Up to 33 tokens are the same with max_position_embeddings 33";
                assert!(error.to_string().contains(said), "{error}");
            }
        }
    }
}

#[test]
fn shapes_that_cannot_be_are_refused() {
    let gpt2 = ModelConfig { architecture: Architecture::Gpt2, kv_heads: 0, ..config() };
    let cases = [
        (ModelConfig { kv_heads: 4, ..config() }, "kv_heads", "4 do not divide 6 heads"),
        (ModelConfig { head_size: 5, ..config() }, "head_size", "an even number"),
        (ModelConfig { qkv_bias: true, qk_norm: true, ..config() }, "qkv_bias", "no bias beside"),
        (ModelConfig { scale_attention: false, ..config() }, "scale_attention", "no such choice"),
        (ModelConfig { qk_norm: true, ..gpt2.clone() }, "qk_norm", "architecture llama has"),
        (ModelConfig { kv_heads: 3, ..gpt2.clone() }, "kv_heads", "architecture llama has"),
        (
            ModelConfig { rope: Rope { theta: 0.5, scaling: RopeScaling::None }, ..config() },
            "rope_theta",
            "from 1 on, got 0.5",
        ),
        (
            ModelConfig {
                rope: Rope { theta: 1e4, scaling: RopeScaling::Linear { factor: f32::NAN } },
                ..config()
            },
            "rope_factor",
            "from 1 on, got NaN",
        ),
    ];
    for (config, field, part) in cases {
        let error = Model::new(&cpu(), &config).unwrap_err();
        let Error::InvalidArgument { what, message } = &error else { panic!("{error}") };
        assert!(*what == field && message.contains(part), "{error}");
    }
    // What 0 stands for is the same model.
    let said = ModelConfig { kv_heads: 6, head_size: 6, ..config() };
    let usual = ModelConfig { kv_heads: 0, ..config() };
    assert_eq!(
        Model::new(&cpu(), &said).unwrap().config(),
        Model::new(&cpu(), &usual).unwrap().config()
    );
}

/// Adapters of a Llama are trained, and their products added to its weights compute the same.
#[test]
fn adapters_are_trained_and_merged() {
    for engine in engines() {
        for config in configs() {
            let base = Model::new(&engine, &config).unwrap();
            let adapted = base.with_lora(Lora { rank: 3, ..Lora::default() }).unwrap();
            let mut trainer = Trainer::new(&adapted, options("fp32")).unwrap();
            let all = losses(&mut trainer, 12);
            assert!(all[11] < all[0], "{all:?}");
            for (name, values) in weights(&base) {
                let mut ours = vec![0.0; values.len()];
                adapted.read_tensor(&name, &mut ours).unwrap();
                assert!(ours == values, "{name} moved");
            }
            let merged = adapted.merge_lora().unwrap();
            let [mut ours, mut exact] = [(); 2].map(|()| vec![0.0; config.vocab_size]);
            merged.next_logits(&[1, 2, 3, 4, 5], &mut ours).unwrap();
            adapted.next_logits(&[1, 2, 3, 4, 5], &mut exact).unwrap();
            let bound = if is_gpu(&engine) { 2e-2 } else { 1e-4 };
            let near = |(a, b): (&f32, &f32)| (a - b).abs() < bound * (1.0 + b.abs());
            assert!(ours.iter().zip(&exact).all(near), "{ours:?} {exact:?}");
        }
    }
}

/// In 4 bits as in whole numbers, a saved model writes a text.
#[test]
fn models_are_stored_in_less() {
    let model = Model::load(&cpu(), &oracle("llama-tiny")).unwrap();
    for stored in StoredWeights::ALL {
        let dir = tempfile::tempdir().unwrap();
        model.save_as(dir.path(), stored).unwrap();
        let found = Model::load(&cpu(), dir.path()).unwrap();
        let how = GenerateOptions { max_tokens: 5, ..GenerateOptions::default() };
        let text = found.generate(&[1, 2, 3], &how, &mut |_| true).unwrap().tokens;
        assert_eq!(text.len(), 5, "{stored}");
        let far = weights(&model).into_iter().map(|(name, values)| {
            let mut ours = vec![0.0; values.len()];
            found.read_tensor(&name, &mut ours).unwrap();
            let off: f32 = ours.iter().zip(&values).map(|(a, b)| (a - b).powi(2)).sum();
            (off / values.iter().map(|v| v * v).sum::<f32>()).sqrt()
        });
        let most = far.fold(0.0, f32::max);
        assert!(most < 0.2 && (stored != StoredWeights::F32 || most == 0.0), "{stored}: {most}");
    }
}
