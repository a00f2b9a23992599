//! Models with Llama's blocks, from end to end with the built program.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use common::{refuse, succeed};

const TINY: &str = "--layers 2 --heads 4 --kv-heads 2 --channels 32 --context 32 --batch-size 2 \
                    --threads 1 --arch llama";

/// A folder with prepared text in `data`.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("text.txt"), include_str!("../../../tests/text/prose.txt")).unwrap();
    succeed(dir.path(), "prepare text.txt --out data");
    dir
}

fn json(dir: &Path, command: &str) -> Value {
    serde_json::from_str(&succeed(dir, command)).unwrap()
}

fn oracle(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/oracle").join(name)
}

#[test]
fn a_llama_is_trained_resumed_shown_and_writes_text() {
    let dir = folder();
    let dir = dir.path();
    let variant = "--qkv-bias --rope-theta 500 --mlp-channels 40 --schedule constant --warmup 0";
    succeed(dir, &format!("train --data data --out whole --steps 6 {TINY} {variant} --log log"));
    let about = json(dir, "info whole --json");
    let config = &about["config"];
    assert_eq!(config["architecture"], "llama");
    assert_eq!((&config["num_key_value_heads"], &config["n_inner"]), (&2.into(), &40.into()));
    let text = succeed(dir, "info whole --tensors");
    let said = "Llama, 2 layers x 32 channels x 4 heads, context 32, vocabulary 256, 2 heads of keys and \
                values, 40 channels in the MLP, biases of q, k and v, rotary positions of 500";
    assert!(text.contains(said), "{text}");
    assert!(text.contains("model.layers.1.self_attn.k_proj.bias"), "{text}");
    let shape = "--qkv-bias --mlp-channels 40";
    let plan = json(dir, &format!("plan --data data --json {TINY} {shape}"));
    assert_eq!(plan["parameters"], about["parameters"]);

    // Half of it, and the rest, are the whole.
    succeed(dir, &format!("train --data data --out half --steps 3 {TINY} {variant}"));
    succeed(dir, "train --resume half --steps 6 --kv-heads 2 --arch llama");
    let [whole, half] =
        ["whole", "half"].map(|of| fs::read(dir.join(of).join("model.safetensors")));
    assert!(whole.unwrap() == half.unwrap(), "a resumed run is the same");

    let text = succeed(dir, "generate --checkpoint whole --prompt The --tokens 5 --greedy");
    assert!(text.starts_with("The"), "{text}");
    succeed(dir, "eval --checkpoint whole --data data");
    succeed(dir, "export whole less --weights bf16");
    assert_eq!(json(dir, "info less --json")["config"], *config);
}

#[test]
fn what_a_llama_is_cannot_be_changed() {
    let dir = folder();
    let dir = dir.path();
    succeed(dir, &format!("train --data data --out model --steps 1 {TINY}"));
    for options in ["--kv-heads 4", "--arch gpt2", "--qk-norm", "--rope-theta 7", "--preset 60M"] {
        let error = refuse(dir, &format!("train --resume model {options}"));
        assert!(error.contains("leave the option out"), "{options}: {error}");
    }
    let with = |options: &str| refuse(dir, &format!("train --data data --out other {options}"));
    let error = with("--kv-heads 2");
    assert!(error.contains("kv_heads") && error.contains("architecture llama has"), "{error}");
    let error = with("--arch llama --kv-heads 3");
    assert!(error.contains("3 do not divide 4 heads"), "{error}");
    let error = with("--arch llama --kv-heads 0");
    assert!(error.contains("--kv-heads: expected a number from 1 on, got 0"), "{error}");
    let error = with("--arch gpt2 --preset 60M");
    assert!(error.contains("--preset: of llama, and --arch says gpt2"), "{error}");
    let error = with("--preset 70B");
    assert!(error.contains("expected one of 60M, 125M, 350M, 1B"), "{error}");
    let error = with("--arch llama --activation gelu");
    assert!(error.contains("--activation: Llama's blocks have SwiGLU, got gelu"), "{error}");
    let error = with("--arch mamba");
    assert!(error.contains("expected gpt2 or llama"), "{error}");
}

/// Their names are true with a usual vocabulary, and what is given counts more.
#[test]
fn presets_have_the_sizes_that_they_are_called_by() {
    let dir = folder();
    let dir = dir.path();
    let parameters = |options: &str| {
        json(dir, &format!("plan {options} --json --device cpu"))["parameters"].as_f64().unwrap()
    };
    for (name, size, vocabulary) in [
        ("60M", 60e6, 32_000),
        ("125M", 125e6, 32_000),
        ("350M", 350e6, 32_000),
        ("1B", 1.1e9, 32_000),
        ("124m", 124.4e6, 50_257),
        ("1.5B", 1.558e9, 50_257),
    ] {
        let found = parameters(&format!("--preset {name} --vocab-size {vocabulary}"));
        assert!((found / size - 1.0).abs() < 0.05, "{name}: {found}");
    }
    let [of_preset, changed] = ["", "--layers 3 --kv-heads 1"]
        .map(|more| parameters(&format!("--arch llama --preset 60M --vocab-size 256 {more}")));
    assert!(changed < of_preset);
}

/// The shape of a folder of the hub, with weights of one's own.
#[test]
fn a_shape_is_taken_from_a_file_of_the_hub() {
    let dir = folder();
    let dir = dir.path();
    let shape = oracle("qwen3-tiny");
    let options =
        format!("--shape {} --vocab-size 256 --batch-size 2 --threads 1", shape.display());
    succeed(dir, &format!("train --data data --out model --steps 2 {options}"));
    let config = &json(dir, "info model --json")["config"];
    assert_eq!((&config["head_dim"], &config["qk_norm"]), (&16.into(), &true.into()));
    // Its vocabulary, too, unless another is given; which has to hold the data's.
    let of_shape = json(dir, &format!("plan --json --shape {}", shape.display()));
    let given = json(dir, &format!("plan --json --shape {} --vocab-size 113", shape.display()));
    assert_eq!(of_shape["parameters"], given["parameters"]);
    let error = refuse(dir, &format!("train --data data --out other --shape {}", shape.display()));
    assert!(error.contains("tokenizer has 256 tokens, got 113"), "{error}");
    let error = refuse(dir, "plan --shape nowhere.json --vocab-size 9");
    assert!(error.contains("nowhere.json"), "{error}");
}

/// Weights of others are trained on, whole and beside adapters.
#[test]
fn weights_of_others_are_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let tokens: Vec<u8> = (0..3000u32).flat_map(|i| ((i * i % 83) as u16).to_le_bytes()).collect();
    fs::write(dir.join("tokens.bin"), tokens).unwrap();
    let from = oracle("llama-tiny");
    let common =
        format!("--train tokens.bin --init-from {} --steps 2 --batch-size 2", from.display());
    succeed(dir, &format!("train {common} --out tuned --log log"));
    succeed(dir, &format!("train {common} --out adapted --lora 2"));
    succeed(dir, "export adapted alone --format peft");
    let text = fs::read_to_string(dir.join("alone/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["target_modules"].as_array().unwrap().len(), 7);
    let config = fs::read_to_string(dir.join("tuned/config.json")).unwrap();
    assert!(
        config.contains("\"LlamaForCausalLM\"") && config.contains("\"pad_token_id\""),
        "{config}"
    );
}
