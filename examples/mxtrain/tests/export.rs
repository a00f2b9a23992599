//! Models for other programs: what is in the files of `mxtrain export`, and what is refused.
//!
//! dev/llama-cpp.sh and dev/check_transformers.py have these programs read them.

mod common;
#[path = "common/tokenizers.rs"]
mod samples;

use std::collections::{BTreeMap, HashMap};
use std::f64::consts::PI;
use std::fs;
use std::path::Path;
use std::process::Command;

use mxfp4train::{Architecture, Engine, EngineOptions, Model, ModelConfig, Rope, RopeScaling};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::Tokenizer;

use common::{failed, refuse, run, succeed};

/// A folder with prepared text and a model of `tokenizer` that was trained for a step, in `model`.
fn folder(tokenizer: &str, options: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("text.txt"), include_str!("../../../tests/text/prose.txt")).unwrap();
    succeed(dir.path(), &format!("prepare text.txt --out data --tokenizer {tokenizer}"));
    train(dir.path(), "model", options);
    dir
}

fn train(dir: &Path, out: &str, options: &str) {
    succeed(
        dir,
        &format!(
            "train --data data --out {out} --layers 2 --heads 2 --channels 32 --context 32 \
             --batch-size 2 --threads 1 --device cpu --steps 1 --lr 0.02 --eval-batches 1 {options}"
        ),
    );
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A tensor as a file has it: its type, its shape and its bytes.
type Stored = (String, Vec<usize>, Vec<u8>);

fn safetensors(dir: &Path) -> BTreeMap<String, Stored> {
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: BTreeMap<String, Value> = serde_json::from_slice(&bytes[8..start]).unwrap();
    let sizes = |value: &Value| -> Vec<usize> { serde_json::from_value(value.clone()).unwrap() };
    (header.into_iter().filter(|(name, _)| name != "__metadata__"))
        .map(|(name, info)| {
            let (dtype, at) = (info["dtype"].as_str().unwrap(), sizes(&info["data_offsets"]));
            let data = bytes[start + at[0]..start + at[1]].to_vec();
            (name, (dtype.to_owned(), sizes(&info["shape"]), data))
        })
        .collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// To nearest even, from the bits.
fn bf16(v: f32) -> [u8; 2] {
    let bits = v.to_bits();
    (((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16).to_le_bytes()
}

/// (rows, cols) as (cols, rows).
fn turned(values: &[f32], [rows, cols]: [usize; 2]) -> Vec<f32> {
    (0..cols).flat_map(|c| (0..rows).map(move |r| values[r * cols + c])).collect()
}

/// Reads a GGUF file by its specification.
struct Gguf {
    keys: BTreeMap<String, Value>,
    /// Type, dimensions from the innermost, bytes from where it begins to the end of the file.
    tensors: BTreeMap<String, (u32, Vec<u64>, Vec<u8>)>,
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (first, rest) = self.0.split_first_chunk().expect("the file goes on");
        self.0 = rest;
        *first
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn text(&mut self) -> String {
        let (text, rest) = self.0.split_at(self.u64_ahead());
        let text = String::from_utf8(text[8..].to_vec()).unwrap();
        self.0 = rest;
        text
    }

    /// Where a text that begins here ends.
    fn u64_ahead(&self) -> usize {
        8 + u64::from_le_bytes(self.0[..8].try_into().unwrap()) as usize
    }

    fn value(&mut self, kind: u32) -> Value {
        match kind {
            4 => self.u32().into(),
            5 => (self.u32() as i32).into(),
            6 => f32::from_le_bytes(self.take()).into(),
            7 => (self.take::<1>()[0] == 1).into(),
            8 => self.text().into(),
            9 => {
                let (kind, count) = (self.u32(), self.u64());
                (0..count).map(|_| self.value(kind)).collect()
            }
            other => panic!("type {other}"),
        }
    }
}

impl Gguf {
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let mut reader = Reader(&bytes);
        assert_eq!((reader.take(), reader.u32()), (*b"GGUF", 3));
        let (tensors, keys) = (reader.u64(), reader.u64());
        let key = |reader: &mut Reader<'_>| {
            let (key, kind) = (reader.text(), reader.u32());
            (key, reader.value(kind))
        };
        let keys = (0..keys).map(|_| key(&mut reader)).collect();
        let info = |reader: &mut Reader<'_>| {
            let (name, dimensions) = (reader.text(), reader.u32());
            let shape: Vec<_> = (0..dimensions).map(|_| reader.u64()).collect();
            (name, shape, reader.u32(), reader.u64() as usize)
        };
        let infos: Vec<_> = (0..tensors).map(|_| info(&mut reader)).collect();
        let start = (bytes.len() - reader.0.len()).next_multiple_of(32);
        let tensors = infos.into_iter().map(|(name, shape, kind, at)| {
            assert_eq!(at % 32, 0, "{name}");
            (name, (kind, shape, bytes[start + at..].to_vec()))
        });
        Self { keys, tensors: tensors.collect() }
    }

    /// The values of an f32 tensor.
    fn floats(&self, name: &str, dimensions: &[u64]) -> Vec<f32> {
        let (kind, shape, bytes) = &self.tensors[name];
        assert_eq!((*kind, &shape[..]), (0, dimensions), "{name}");
        floats(&bytes[..4 * dimensions.iter().product::<u64>() as usize])
    }
}

const BLOCK: usize = 32;

#[test]
fn a_folder_in_bf16_is_one_of_hugging_faces() {
    let dir = folder("bytes", "");
    let dir = dir.path();
    let out = succeed(dir, "export model new/out");
    assert!(out.starts_with("new/out: ") && out.contains(" parameters in bf16, "), "{out}");
    assert_eq!(json_of(&dir.join("new/out/config.json"))["dtype"], "bfloat16");
    let (whole, halves) = (safetensors(&dir.join("model")), safetensors(&dir.join("new/out")));
    assert_eq!(whole.keys().collect::<Vec<_>>(), halves.keys().collect::<Vec<_>>());
    for (name, (dtype, shape, data)) in &halves {
        let (_, expected, values) = &whole[name];
        assert_eq!((dtype.as_str(), shape), ("BF16", expected), "{name}");
        let expected: Vec<u8> = floats(values).into_iter().flat_map(bf16).collect();
        assert!(*data == expected, "{name}");
    }
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        let [a, b] = ["model", "new/out"].map(|at| fs::read(dir.join(at).join(file)).unwrap());
        assert!(a == b, "{file}");
    }
    let mut names: Vec<_> =
        fs::read_dir(dir.join("new/out")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    let expected = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(names, expected);
    succeed(dir, "generate --checkpoint new/out --greedy --tokens 4 --device cpu --prompt The");
    succeed(dir, "train --init-from new/out --data data --out on --steps 1 --batch-size 2");
    // Without rounding it is the model.
    succeed(dir, "export model f32 --weights f32 --format safetensors");
    assert!(safetensors(&dir.join("f32")) == whole);
}

/// Also a head of its own, and an MLP of blocks that are not whole.
#[test]
fn a_folder_in_mxfp4_writes_the_texts_of_its_checkpoint() {
    for options in ["", "--untied-head --mlp-channels 37 --activation gelu"] {
        let dir = folder("bytes", options);
        let dir = dir.path();
        succeed(dir, "export model small --weights mxfp4");
        let stored = safetensors(&dir.join("small"));
        let expected = |name: &str, dtype: &str, shape: &[usize]| {
            let (found, size, _) = &stored[name];
            assert_eq!((found.as_str(), &size[..]), (dtype, shape), "{name}");
        };
        expected("transformer.h.1.attn.c_attn.weight", "F4", &[96, 32]);
        expected("transformer.h.1.attn.c_attn.weight.scales", "F8_E8M0", &[96, 1]);
        expected("transformer.h.1.attn.c_attn.bias", "F32", &[96]);
        expected("transformer.wte.weight", "F32", &[256, 32]);
        if !options.is_empty() {
            expected("transformer.h.0.mlp.c_proj.weight", "F4", &[32, 64]);
            expected("transformer.h.0.mlp.c_proj.weight.scales", "F8_E8M0", &[32, 2]);
            expected("lm_head.weight", "F4", &[256, 32]);
        }
        let text = |checkpoint: &str| {
            let line = format!(
                "generate --checkpoint {checkpoint} --weights mxfp4 --tokens 60 --temperature 1.5 \
                 --prompt The --device cpu"
            );
            succeed(dir, &line)
        };
        assert_eq!(text("model"), text("small"));
        // Exported again, it is the same to the byte.
        succeed(dir, "export small again --weights mxfp4");
        let files = ["small", "again"].map(|at| fs::read(dir.join(at).join("model.safetensors")));
        let [small, again] = files.map(Result::unwrap);
        assert!(small == again);
    }
}

#[test]
fn a_file_for_llama_cpp_has_its_names_keys_and_tokens() {
    let dir = folder("gpt2", "--vocab-size 50304");
    let dir = dir.path();
    succeed(dir, "export model f32.gguf --weights f32");
    succeed(dir, "export model bf16 --format gguf");
    let (file, half) = (Gguf::read(&dir.join("f32.gguf")), Gguf::read(&dir.join("bf16")));
    for (key, value) in [
        ("general.architecture", json!("gpt2")),
        ("general.name", json!("model")),
        ("general.file_type", json!(0)),
        ("gpt2.context_length", json!(32)),
        ("gpt2.embedding_length", json!(32)),
        ("gpt2.block_count", json!(2)),
        ("gpt2.feed_forward_length", json!(128)),
        ("gpt2.attention.head_count", json!(2)),
        ("gpt2.attention.layer_norm_epsilon", json!(1e-5f32)),
        ("tokenizer.ggml.model", json!("gpt2")),
        ("tokenizer.ggml.pre", json!("gpt-2")),
        ("tokenizer.ggml.bos_token_id", json!(50256)),
        ("tokenizer.ggml.eos_token_id", json!(50256)),
        ("tokenizer.ggml.add_bos_token", json!(false)),
    ] {
        assert_eq!(file.keys[key], value, "{key}");
    }
    assert_eq!(half.keys["general.file_type"], 32);
    let (tokens, kinds) =
        (&file.keys["tokenizer.ggml.tokens"], &file.keys["tokenizer.ggml.token_type"]);
    let vocabulary = &json_of(&dir.join("model/tokenizer.json"))["model"];
    for (token, id) in vocabulary["vocab"].as_object().unwrap() {
        assert_eq!(tokens[id.as_u64().unwrap() as usize], *token);
    }
    assert_eq!(file.keys["tokenizer.ggml.merges"], vocabulary["merges"]);
    assert_eq!((&tokens[50256], &kinds[50256]), (&json!("<|endoftext|>"), &json!(3)));
    assert_eq!((&tokens[50303], &kinds[50303]), (&json!("[PAD50303]"), &json!(5)));
    assert_eq!([tokens, kinds].map(|list| list.as_array().unwrap().len()), [50304; 2]);

    let whole = safetensors(&dir.join("model"));
    let values = |name: &str| floats(&whole[name].2);
    assert_eq!(file.tensors.len(), whole.len());
    assert_eq!(file.floats("token_embd.weight", &[32, 50304]), values("transformer.wte.weight"));
    assert_eq!(file.floats("position_embd.weight", &[32, 32]), values("transformer.wpe.weight"));
    assert_eq!(half.floats("position_embd.weight", &[32, 32]), values("transformer.wpe.weight"));
    assert_eq!(file.floats("output_norm.bias", &[32]), values("transformer.ln_f.bias"));
    for (theirs, ours, [inputs, outputs]) in [
        ("attn_qkv", "attn.c_attn", [32, 96]),
        ("attn_output", "attn.c_proj", [32, 32]),
        ("ffn_up", "mlp.c_fc", [32, 128]),
        ("ffn_down", "mlp.c_proj", [128, 32]),
    ] {
        for layer in 0..2 {
            let [name, of] =
                [format!("blk.{layer}.{theirs}"), format!("transformer.h.{layer}.{ours}")];
            let expected = turned(&values(&format!("{of}.weight")), [inputs, outputs]);
            let weight = format!("{name}.weight");
            assert!(file.floats(&weight, &[inputs as u64, outputs as u64]) == expected, "{name}");
            let (kind, shape, bytes) = &half.tensors[&weight];
            assert_eq!((*kind, &shape[..]), (30, &[inputs as u64, outputs as u64][..]));
            let expected: Vec<u8> = expected.into_iter().flat_map(bf16).collect();
            assert!(bytes[..expected.len()] == expected, "{name}");
            let bias = values(&format!("{of}.bias"));
            assert_eq!(half.floats(&format!("{name}.bias"), &[outputs as u64]), bias);
        }
    }
    for (theirs, ours) in [("attn_norm", "ln_1"), ("ffn_norm", "ln_2")] {
        let weight = values(&format!("transformer.h.1.{ours}.weight"));
        assert_eq!(half.floats(&format!("blk.1.{theirs}.weight"), &[32]), weight);
    }
}

/// The blocks are those of the folder in MXFP4, with another order of codes; the head is there, too,
/// and the embedding in bf16.
#[test]
fn a_file_in_mxfp4_has_the_blocks_of_the_folder() {
    let dir = folder("bytes", "");
    let dir = dir.path();
    succeed(dir, "export model small.gguf --weights mxfp4");
    succeed(dir, "export model small --weights mxfp4");
    let (file, stored) = (Gguf::read(&dir.join("small.gguf")), safetensors(&dir.join("small")));
    assert_eq!(file.keys["general.file_type"], 38);
    let tokens = &file.keys["tokenizer.ggml.tokens"];
    assert_eq!((&tokens[65], &tokens[32], &tokens[10]), (&json!("A"), &json!("Ġ"), &json!("Ċ")));
    assert_eq!(tokens.as_array().unwrap().len(), 256);
    assert_eq!(file.keys["tokenizer.ggml.merges"], json!([]));
    assert_eq!(file.keys["tokenizer.ggml.eos_token_id"], 0);
    let (codes, scales) = (
        &stored["transformer.h.1.mlp.c_proj.weight"].2,
        &stored["transformer.h.1.mlp.c_proj.weight.scales"].2,
    );
    let (kind, shape, bytes) = &file.tensors["blk.1.ffn_down.weight"];
    assert_eq!((*kind, &shape[..]), (39, &[128, 32][..]));
    for (block, scale) in scales.iter().enumerate() {
        let found = &bytes[block * 17..][..17];
        assert_eq!(found[0], *scale);
        for i in 0..BLOCK {
            let theirs = found[1 + i % 16] >> (4 * (i / 16)) & 15;
            assert_eq!(theirs, codes[(block * BLOCK + i) / 2] >> (4 * (i % 2)) & 15);
        }
    }
    assert_eq!(file.tensors["output.weight"].0, 39);
    let (kind, shape, bytes) = &file.tensors["token_embd.weight"];
    assert_eq!((*kind, &shape[..]), (30, &[32, 256][..]));
    let wte = floats(&stored["transformer.wte.weight"].2);
    assert!(wte.into_iter().flat_map(bf16).eq(bytes[..2 * 32 * 256].iter().copied()));
    // Of the head's first block the scale, which the largest of its elements asks for.
    let (_, _, head) = &file.tensors["output.weight"];
    let largest = floats(&stored["transformer.wte.weight"].2)[..32]
        .iter()
        .fold(0.0f32, |most, v| most.max(v.abs()));
    let scale = 2f32.powi(i32::from(head[0]) - 127);
    assert!(largest / scale < 8.0 && largest / scale > 2.0, "{largest} by {scale}");
}

/// Llama's blocks, in sizes that tell rows from columns and heads from what they are made of.
fn llama() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 640,
        context_length: 48,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        channels: 64,
        mlp_channels: 96,
        layer_norm_epsilon: 1e-6,
        ..ModelConfig::default()
    }
}

/// A folder with a model, of which no two numbers are the same, in `model`, and its tokenizer.
fn folder_of(config: &ModelConfig, tokenizer: &Value, end: &str) -> (TempDir, Model) {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::new(EngineOptions::default()).unwrap();
    let model = Model::new(&engine, config).unwrap();
    for info in model.tensors() {
        let mut values = vec![0.0; info.shape.iter().product()];
        model.read_tensor(&info.name, &mut values).unwrap();
        let count = values.len() as f32;
        (values.iter_mut().enumerate()).for_each(|(i, v)| *v += i as f32 / (8.0 * count));
        model.write_tensor(&info.name, &values).unwrap();
    }
    model.save(&dir.path().join("model")).unwrap();
    put(dir.path(), "tokenizer.json", tokenizer);
    put(dir.path(), "tokenizer_config.json", &json!({"eos_token": end}));
    (dir, model)
}

/// Puts a file beside the model.
fn put(dir: &Path, name: &str, contents: &Value) {
    fs::write(dir.join("model").join(name), contents.to_string()).unwrap();
}

/// A tensor of the model by the name that files have for it, and how it lies in a file.
fn values(model: &Model, name: &str, count: usize) -> Vec<f32> {
    let mut values = vec![0.0; count];
    model.read_tensor(name, &mut values).unwrap();
    values
}

/// Rows of heads of `size`, the second half of each between the first.
fn paired(values: &[f32], width: usize, size: usize) -> Vec<f32> {
    let row = |row: usize| {
        let (head, i) = (row / size, row % size);
        let from = head * size + i / 2 + (i % 2) * (size / 2);
        values[from * width..][..width].to_vec()
    };
    (0..values.len() / width).flat_map(row).collect()
}

/// Names, shapes and numbers of a Llama, of Qwen2 with its biases and of Qwen3 with its norms, whose
/// heads are wider than the model.
#[test]
fn files_of_llamas_have_llama_cpps_names_and_order() {
    let qwen3 = ModelConfig { qk_norm: true, head_size: 24, tied_head: false, ..llama() };
    let qwen2 = ModelConfig { qkv_bias: true, ..llama() };
    let wide = ModelConfig { head_size: 24, ..llama() };
    for (architecture, config) in
        [("llama", llama()), ("llama", wide), ("qwen2", qwen2), ("qwen3", qwen3)]
    {
        let (dir, model) = folder_of(&config, &samples::llama3(), "<|end|>");
        let dir = dir.path();
        succeed(dir, "export model f32.gguf --weights f32");
        succeed(dir, "export model bf16.gguf");
        succeed(dir, "export model f16.gguf --weights f16");
        let [file, half, other] =
            ["f32", "bf16", "f16"].map(|name| Gguf::read(&dir.join(format!("{name}.gguf"))));
        let size = config.head_width();
        for (key, value) in [
            ("vocab_size", json!(640)),
            ("context_length", json!(48)),
            ("embedding_length", json!(64)),
            ("block_count", json!(2)),
            ("feed_forward_length", json!(96)),
            ("attention.head_count", json!(4)),
            ("attention.head_count_kv", json!(2)),
            ("attention.key_length", json!(size)),
            ("attention.value_length", json!(size)),
            ("attention.layer_norm_rms_epsilon", json!(1e-6f32)),
            ("rope.freq_base", json!(1e4f32)),
            ("rope.dimension_count", json!(size)),
        ] {
            assert_eq!(file.keys[&format!("{architecture}.{key}")], value, "{key}");
        }
        assert_eq!(file.keys["general.architecture"], architecture);
        assert_eq!(file.keys.keys().filter(|key| key.starts_with(architecture)).count(), 12);

        let (q, kv) = (4 * size, 2 * size);
        let mut tensors = vec![
            ("token_embd.weight".to_owned(), "model.embed_tokens.weight".to_owned(), vec![64, 640]),
            ("output_norm.weight".into(), "model.norm.weight".into(), vec![64]),
        ];
        if !config.tied_head {
            tensors.push(("output.weight".into(), "lm_head.weight".into(), vec![64, 640]));
        }
        for layer in 0..2 {
            let mut add = |theirs: &str, ours: &str, shape: &[usize]| {
                let names =
                    (format!("blk.{layer}.{theirs}"), format!("model.layers.{layer}.{ours}"));
                tensors.push((names.0, names.1, shape.to_vec()));
            };
            add("attn_norm.weight", "input_layernorm.weight", &[64]);
            add("attn_q.weight", "self_attn.q_proj.weight", &[64, q]);
            add("attn_k.weight", "self_attn.k_proj.weight", &[64, kv]);
            add("attn_v.weight", "self_attn.v_proj.weight", &[64, kv]);
            add("attn_output.weight", "self_attn.o_proj.weight", &[q, 64]);
            add("ffn_norm.weight", "post_attention_layernorm.weight", &[64]);
            add("ffn_gate.weight", "mlp.gate_proj.weight", &[64, 96]);
            add("ffn_up.weight", "mlp.up_proj.weight", &[64, 96]);
            add("ffn_down.weight", "mlp.down_proj.weight", &[96, 64]);
            if config.qkv_bias {
                add("attn_q.bias", "self_attn.q_proj.bias", &[q]);
                add("attn_k.bias", "self_attn.k_proj.bias", &[kv]);
                add("attn_v.bias", "self_attn.v_proj.bias", &[kv]);
            }
            if config.qk_norm {
                add("attn_q_norm.weight", "self_attn.q_norm.weight", &[size]);
                add("attn_k_norm.weight", "self_attn.k_norm.weight", &[size]);
            }
        }
        assert_eq!(file.tensors.len(), tensors.len());
        for (theirs, ours, shape) in tensors {
            let mut expected = values(&model, &ours, shape.iter().product());
            let is_turned = theirs.ends_with("attn_q.weight") || theirs.ends_with("attn_k.weight");
            if architecture == "llama" && is_turned {
                let kept = expected.clone();
                expected = paired(&kept, 64, size);
                // The first rows of a head are the first of both halves.
                assert!(expected[..64] == kept[..64]);
                assert!(expected[64..128] == kept[64 * size / 2..][..64]);
                assert!(expected[64 * size..][..64] == kept[64 * size..][..64]);
            }
            let shape: Vec<_> = shape.iter().map(|size| *size as u64).collect();
            assert!(file.floats(&theirs, &shape) == expected, "{architecture}: {theirs}");
            if shape.len() == 1 {
                assert!(half.floats(&theirs, &shape) == expected, "{theirs}");
                continue;
            }
            let bytes = [
                expected.iter().flat_map(|v| bf16(*v)).collect::<Vec<u8>>(),
                expected.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
            ];
            for (file, kind, bytes) in [(&half, 30, &bytes[0]), (&other, 1, &bytes[1])] {
                let (found, dimensions, data) = &file.tensors[&theirs];
                assert_eq!((*found, dimensions), (kind, &shape), "{theirs}");
                assert!(data[..bytes.len()] == *bytes, "{theirs}");
            }
        }
    }
}

/// Blocks are those of the folder in MXFP4, rows of q and k in llama.cpp's order.
#[test]
fn files_of_llamas_in_mxfp4_have_the_blocks_of_the_folder() {
    let (dir, model) = folder_of(&llama(), &samples::llama3(), "<|end|>");
    let dir = dir.path();
    succeed(dir, "export model small.gguf --weights mxfp4");
    succeed(dir, "export model small --weights mxfp4");
    let (file, stored) = (Gguf::read(&dir.join("small.gguf")), safetensors(&dir.join("small")));
    assert_eq!(file.keys["general.file_type"], 38);
    for (theirs, ours, [outputs, inputs], size) in [
        ("attn_q", "self_attn.q_proj", [64, 64], 16),
        ("attn_k", "self_attn.k_proj", [32, 64], 16),
        ("attn_v", "self_attn.v_proj", [32, 64], 0),
        ("attn_output", "self_attn.o_proj", [64, 64], 0),
        ("ffn_gate", "mlp.gate_proj", [96, 64], 0),
        ("ffn_up", "mlp.up_proj", [96, 64], 0),
        ("ffn_down", "mlp.down_proj", [64, 96], 0),
    ] {
        let (kind, shape, bytes) = &file.tensors[&format!("blk.1.{theirs}.weight")];
        assert_eq!((*kind, &shape[..]), (39, &[inputs, outputs].map(|n| n as u64)[..]), "{theirs}");
        let name = format!("model.layers.1.{ours}.weight");
        let (codes, scales) = (&stored[&name].2, &stored[&format!("{name}.scales")].2);
        let blocks = inputs / BLOCK;
        for row in 0..outputs {
            let from = match size {
                0 => row,
                size => row / size * size + row % size / 2 + row % 2 * (size / 2),
            };
            for block in 0..blocks {
                let found = &bytes[(row * blocks + block) * 17..][..17];
                assert_eq!(found[0], scales[from * blocks + block], "{theirs}");
                for i in 0..BLOCK {
                    let code =
                        codes[((from * blocks + block) * BLOCK + i) / 2] >> (4 * (i % 2)) & 15;
                    assert_eq!(found[1 + i % 16] >> (4 * (i / 16)) & 15, code, "{theirs}");
                }
            }
        }
    }
    assert_eq!([file.tensors["output.weight"].0, file.tensors["token_embd.weight"].0], [39, 30]);
    let norm = values(&model, "model.layers.1.input_layernorm.weight", 64);
    assert_eq!(file.floats("blk.1.attn_norm.weight", &[64]), norm);
}

/// Positions that are stretched evenly are a key, those of Llama 3.1 a tensor.
#[test]
fn stretched_positions_are_told() {
    let scaling = RopeScaling::Linear { factor: 4.0 };
    let linear = ModelConfig { rope: Rope { theta: 5e5, scaling }, ..llama() };
    let (dir, _) = folder_of(&linear, &samples::llama3(), "<|end|>");
    succeed(dir.path(), "export model out.gguf");
    let Gguf { keys, tensors } = Gguf::read(&dir.path().join("out.gguf"));
    assert_eq!(keys["llama.rope.scaling.type"], "linear");
    assert_eq!(keys["llama.rope.scaling.factor"], 4.0);
    assert_eq!(keys["llama.rope.freq_base"], 5e5);
    assert!(!tensors.contains_key("rope_freqs.weight"));

    let scaling = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original_context: 128 };
    let rope = Rope { theta: 1e4, scaling };
    let (dir, _) = folder_of(&ModelConfig { rope, ..llama() }, &samples::llama3(), "<|end|>");
    succeed(dir.path(), "export model out.gguf");
    let file = Gguf::read(&dir.path().join("out.gguf"));
    assert!(!file.keys.contains_key("llama.rope.scaling.type"));
    let factors = file.floats("rope_freqs.weight", &[8]);
    let expected = (0..8).map(|pair| {
        let turns = 128.0 * 1e4f64.powf(-f64::from(pair) / 8.0) / (2.0 * PI);
        let smooth = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / 8.0 + smooth)
    });
    for (found, expected) in factors.iter().zip(expected) {
        assert!((f64::from(*found) / expected - 1.0).abs() < 1e-5, "{found} {expected}");
    }
    assert_eq!((factors[0], factors[7]), (1.0, 8.0));
    assert!(factors[2] > 1.0 && factors[2] < 8.0);
    // llama.cpp would not look at the tensor.
    let (dir, _) =
        folder_of(&ModelConfig { rope, qk_norm: true, ..llama() }, &samples::llama3(), "<|end|>");
    let error = refuse(dir.path(), "export model out.gguf");
    assert!(error.contains("llama.cpp's qwen3 has no positions that are stretched as"), "{error}");
}

/// A `tokenizer.json` with a pattern in the place of Llama 3's.
fn with_pattern(pattern: &str, takes_whole: bool) -> Value {
    let mut file = samples::llama3();
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern.into();
    file["model"]["ignore_merges"] = takes_whole.into();
    file
}

#[test]
fn tokens_of_a_file_are_told_with_the_name_of_their_pattern() {
    let mut file = with_pattern(samples::PATTERN, true);
    let added = file["added_tokens"].as_array_mut().unwrap();
    for (id, content) in [(500, "<|tool|>"), (501, "\u{2581}and "), (502, "<pad>")] {
        added.push(json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": content == "<pad>",
        }));
    }
    let (dir, _) = folder_of(&llama(), &file, "<|end|>");
    let dir = dir.path();
    put(
        dir,
        "tokenizer_config.json",
        &json!({
            "bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>", "pad_token": "<pad>",
            "chat_template": "{{ messages }}",
        }),
    );
    put(dir, "generation_config.json", &json!({"eos_token_id": [1, 2]}));
    succeed(dir, "export model out.gguf");
    let keys = Gguf::read(&dir.join("out.gguf")).keys;
    for (key, value) in [
        ("tokenizer.ggml.model", json!("gpt2")),
        ("tokenizer.ggml.pre", json!("llama-bpe")),
        ("tokenizer.ggml.bos_token_id", json!(0)),
        ("tokenizer.ggml.eos_token_id", json!(1)),
        ("tokenizer.ggml.eot_token_id", json!(2)),
        ("tokenizer.ggml.padding_token_id", json!(502)),
        ("tokenizer.ggml.add_bos_token", json!(true)),
        ("tokenizer.ggml.add_eos_token", json!(false)),
        ("tokenizer.chat_template", json!("{{ messages }}")),
    ] {
        assert_eq!(keys[key], value, "{key}");
    }
    let (tokens, kinds) = (&keys["tokenizer.ggml.tokens"], &keys["tokenizer.ggml.token_type"]);
    assert_eq!([tokens, kinds].map(|list| list.as_array().unwrap().len()), [640; 2]);
    let vocabulary = file["model"]["vocab"].as_object().unwrap();
    assert_eq!(vocabulary.len(), 500);
    for (token, id) in vocabulary {
        let id = id.as_u64().unwrap() as usize;
        assert_eq!((&tokens[id], &kinds[id]), (&json!(token), &json!(if id < 3 { 3 } else { 1 })));
    }
    for (id, token, kind) in [
        (500, "<|tool|>", 3),
        (501, " and ", 4),
        (502, "<pad>", 3),
        (503, "[PAD503]", 5),
        (639, "[PAD639]", 5),
    ] {
        assert_eq!((&tokens[id], &kinds[id]), (&json!(token), &json!(kind)), "{id}");
    }
    let merges: Vec<_> = (file["model"]["merges"].as_array().unwrap().iter())
        .map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()))
        .collect();
    assert!(merges.len() > 200);
    assert_eq!(keys["tokenizer.ggml.merges"], json!(merges));
    // As older files write them.
    file["model"]["merges"] = json!(merges);
    put(dir, "tokenizer.json", &file);
    succeed(dir, "export model out.gguf --overwrite");
    assert_eq!(Gguf::read(&dir.join("out.gguf")).keys["tokenizer.ggml.merges"], json!(merges));

    let qwen2 = samples::PATTERN.replace("{1,3}", "");
    for (file, expected, begins) in [
        (with_pattern(samples::PATTERN, false), "smaug-bpe", true),
        (with_pattern(&qwen2, false), "qwen2", true),
        (samples::smol(), "smollm", false),
    ] {
        put(dir, "tokenizer.json", &file);
        succeed(dir, "export model out.gguf --overwrite");
        let keys = Gguf::read(&dir.join("out.gguf")).keys;
        assert_eq!(keys["tokenizer.ggml.pre"], expected);
        assert_eq!(keys["tokenizer.ggml.add_bos_token"], begins);
    }
    let other = r"\S+|\s+";
    let mut strips = samples::llama3();
    strips["normalizer"] = json!({"type": "Strip", "strip_left": true, "strip_right": true});
    for (file, expected) in [
        (
            with_pattern(other, false),
            r#"the splitting pattern "\\S+|\\s+", for which no name of l"#,
        ),
        (with_pattern(&qwen2, true), "ignore_merges beside the splitting pattern"),
        (strips, r#"the normalizer "Strip", for which"#),
    ] {
        put(dir, "tokenizer.json", &file);
        let error = refuse(dir, "export model new.gguf");
        assert!(error.contains(expected), "{error}");
        assert!(error.contains("--format safetensors, and convert the folder with"), "{error}");
    }
    succeed(dir, "export model copy");
}

/// All splits of every token into two, in the order of tokens, as converters of SentencePiece's
/// models make merges.
fn all_merges(file: &Value) -> Value {
    let vocabulary = file["model"]["vocab"].as_object().unwrap();
    let mut tokens: Vec<_> = vocabulary.iter().map(|(token, id)| (id.as_u64(), token)).collect();
    tokens.sort_unstable();
    let splits = |token: &'_ str| -> Vec<Value> {
        let places = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        places
            .filter(|(a, b)| vocabulary.contains_key(*a) && vocabulary.contains_key(*b))
            .map(|(a, b)| json!([a, b]))
            .collect()
    };
    tokens.into_iter().flat_map(|(_, token)| splits(token)).collect()
}

/// The tokens that SentencePiece's algorithm makes: the two neighbours that make the token with the
/// highest score are joined first, of several the first two.
fn by_scores(names: &[String], scores: &[f64], text: &str) -> Vec<String> {
    let scores: HashMap<&str, f64> =
        names.iter().map(String::as_str).zip(scores.iter().copied()).collect();
    let mut parts: Vec<String> =
        format!(" {text}").replace(' ', "\u{2581}").chars().map(String::from).collect();
    loop {
        let mut best: Option<(f64, usize)> = None;
        for i in 1..parts.len() {
            let score = scores.get([&*parts[i - 1], &*parts[i]].concat().as_str());
            if let Some(&score) = score
                && best.is_none_or(|(most, _)| score > most)
            {
                best = Some((score, i));
            }
        }
        let Some((_, i)) = best else { break };
        let right = parts.remove(i);
        parts[i - 1].push_str(&right);
    }
    let bytes = |part: String| match scores.contains_key(&*part) {
        true => vec![part],
        false => part.bytes().map(|byte| format!("<0x{byte:02X}>")).collect(),
    };
    parts.into_iter().flat_map(bytes).collect()
}

/// SentencePiece's tokens have scores where all that can be joined is merged in their order.
#[test]
fn scores_are_made_of_merges_that_are_made_of_scores() {
    let mut file = samples::llama2();
    let (dir, _) = folder_of(&llama(), &file, "</s>");
    let dir = dir.path();
    let error = refuse(dir, "export model out.gguf");
    assert!(error.contains("llama.cpp has scores of tokens in place of merges, and"), "{error}");
    assert!(
        error.contains("but no merge of ") && error.ends_with("--format safetensors"),
        "{error}"
    );
    file["model"]["merges"] = all_merges(&file);
    put(dir, "tokenizer.json", &file);
    put(dir, "tokenizer_config.json", &json!({"eos_token": "</s>", "unk_token": "<unk>"}));
    succeed(dir, "export model out.gguf");
    let keys = Gguf::read(&dir.join("out.gguf")).keys;
    for (key, value) in [
        ("tokenizer.ggml.model", json!("llama")),
        ("tokenizer.ggml.pre", json!("default")),
        ("tokenizer.ggml.bos_token_id", json!(1)),
        ("tokenizer.ggml.eos_token_id", json!(2)),
        ("tokenizer.ggml.unknown_token_id", json!(0)),
        ("tokenizer.ggml.add_bos_token", json!(true)),
        ("tokenizer.ggml.add_space_prefix", json!(true)),
    ] {
        assert_eq!(keys[key], value, "{key}");
    }
    assert!(!keys.contains_key("tokenizer.ggml.merges"));
    let list = |name: &str| keys[&format!("tokenizer.ggml.{name}")].as_array().unwrap().clone();
    let (tokens, kinds, scores) = (list("tokens"), list("token_type"), list("scores"));
    assert_eq!([tokens.len(), kinds.len(), scores.len()], [640; 3]);
    assert_eq!(kinds[..4], [2, 3, 3, 6]);
    assert_eq!(
        (&tokens[3 + 0x0a], &kinds[258], &kinds[259]),
        (&json!("<0x0A>"), &json!(6), &json!(1))
    );
    assert_eq!((&tokens[639], &kinds[639]), (&json!("[PAD639]"), &json!(5)));
    // Higher ones are joined first.
    let is_joined = |id: &usize| tokens[*id].as_str().unwrap().chars().count() > 1;
    let joined: Vec<_> =
        (259..600).filter(is_joined).map(|id| scores[id].as_f64().unwrap()).collect();
    assert!(joined.len() > 100);
    assert!((0u32..).zip(&joined).all(|(n, score)| *score == -f64::from(n)));

    let names: Vec<String> = tokens.iter().map(|t| t.as_str().unwrap().to_owned()).collect();
    let scores: Vec<f64> = scores.iter().map(|score| score.as_f64().unwrap()).collect();
    let tokenizer: Tokenizer = file.to_string().parse().unwrap();
    for text in [include_str!("../../../tests/text/prose.txt"), " a  b\n\n naïve 語 <s"] {
        for line in text.split_inclusive('\n') {
            let expected = tokenizer.encode(line, false).unwrap();
            assert_eq!(by_scores(&names, &scores, line), expected.get_tokens(), "{line:?}");
        }
    }

    let merges = file["model"]["merges"].as_array().unwrap().clone();
    let change = |change: &dyn Fn(&mut Value)| {
        let mut file = file.clone();
        change(&mut file);
        put(dir, "tokenizer.json", &file);
        refuse(dir, "export model new.gguf")
    };
    // A merge of the last token comes first.
    let moved = |file: &mut Value| {
        let last = &merges[merges.len() - 1..];
        file["model"]["merges"] = [last, &merges[..]].concat().into();
    };
    let error = change(&moved);
    assert!(error.contains("in several places of their order"), "{error}");
    let error = change(&|file| file["normalizer"] = json!({"type": "NFKC"}));
    assert!(error.contains("tokens for bytes, but not the spaces of Llama 2's"), "{error}");
    let error = change(&|file| {
        file["model"]["vocab"].as_object_mut().unwrap().remove("<0x0A>");
    });
    assert!(error.contains("no token <0x0A> beside others for bytes"), "{error}");
}

/// Tokens that were added to GPT-2's, and a second token that ends texts.
#[test]
fn added_tokens_and_other_ends_are_told() {
    let dir = folder("gpt2", "--vocab-size 50304");
    let dir = dir.path();
    let path = dir.join("model/tokenizer.json");
    let mut tokenizer = json_of(&path);
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    added.push(json!({"id": 50257, "content": "<|end|>", "special": true}));
    added.push(json!({"id": 50300, "content": "  ", "special": false}));
    fs::write(&path, tokenizer.to_string()).unwrap();
    fs::write(dir.join("model/generation_config.json"), r#"{"eos_token_id": 50257}"#).unwrap();
    succeed(dir, "export model out.gguf");
    let Gguf { keys, .. } = Gguf::read(&dir.join("out.gguf"));
    let (tokens, kinds) = (&keys["tokenizer.ggml.tokens"], &keys["tokenizer.ggml.token_type"]);
    assert_eq!((&tokens[50257], &kinds[50257]), (&json!("<|end|>"), &json!(3)));
    assert_eq!((&tokens[50300], &kinds[50300]), (&json!("  "), &json!(4)));
    assert_eq!((&tokens[50258], &kinds[50258]), (&json!("[PAD50258]"), &json!(5)));
    assert_eq!(keys["tokenizer.ggml.eos_token_id"], 50256);
    assert_eq!(keys["tokenizer.ggml.eot_token_id"], 50257);
}

#[test]
fn what_cannot_be_is_refused_with_the_remedy() {
    let dir = folder("bytes", "");
    let dir = dir.path();
    train(dir, "narrow", "--mlp-channels 40");
    train(dir, "exact", "--activation gelu");
    let foreign = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/with-tokenizer");
    std::os::unix::fs::symlink(foreign, dir.join("foreign")).unwrap();
    fs::create_dir(dir.join("folder")).unwrap();
    fs::write(dir.join("notes.gguf"), "words").unwrap();
    succeed(dir, "export model out");
    succeed(dir, "export model out.gguf");
    for (line, expected) in [
        ("export model", "required arguments were not provided: <OUT>"),
        ("export none new", "none: No such file"),
        ("export gpt2 new", "hf download gpt2"),
        ("export data new", "expected a checkpoint folder, found no config.json"),
        ("export model new --weights q4_0", "expected one of f32, f16, bf16, mxfp4; got \"q4_0\""),
        ("export model new --format onnx", "invalid value 'onnx' for '--format <NAME>'"),
        ("export model out", "out: there already is a model; replace it (--overwrite) or name"),
        ("export model out.gguf", "out.gguf: there already is a GGUF file; replace it (--ov"),
        (
            "export model model --overwrite",
            "model: the checkpoint itself, which an export does not",
        ),
        (
            "export model narrow --overwrite",
            "narrow: holds a run of mxtrain train (mxtrain.json), ",
        ),
        ("export model data", "found \"meta.json\" and no model.safetensors; name a new folder"),
        ("export model x.safetensors", "are written as a folder, with config.json and the tokeni"),
        ("export model folder --format gguf", "folder: a folder, and --format gguf writes a file"),
        ("export model notes.gguf --overwrite", "notes.gguf: there is a file that is no GGUF, wh"),
        ("export model none/x.gguf", "cannot create none/x.gguf.tmp: No such file"),
        ("export model x.gguf --tokenizer gpt2", "gpt2 has 50257 tokens, the checkpoint's vocab"),
        ("export exact x.gguf", "gelu_new alone, this model has gelu; choose --format safetensors"),
        (
            "export narrow x.gguf --weights mxfp4",
            "do not divide this model's width 40; choose bf16",
        ),
    ] {
        let error = refuse(dir, line);
        assert!(error.contains(expected), "{line}: {error}");
    }
    assert!(!dir.join("new").exists() && !dir.join("x.gguf").exists());
    succeed(dir, "export foreign copy");
    let [a, b] = ["foreign", "copy"].map(|at| fs::read(dir.join(at).join("tokenizer.json")));
    assert!(a.unwrap() == b.unwrap());
    succeed(dir, "export foreign copy.gguf");
    succeed(dir, "export narrow narrow.gguf");
}

#[test]
fn an_export_is_replaced_as_a_whole() {
    let dir = folder("bytes", "");
    let dir = dir.path();
    succeed(dir, "export model out");
    succeed(dir, "export model out.gguf");
    fs::write(dir.join("out/README.md"), "# A model").unwrap();
    succeed(dir, "prepare text.txt --out data --tokenizer gpt2");
    train(dir, "other", "");
    succeed(dir, "export other out --overwrite --weights f16");
    assert_eq!(json_of(&dir.join("out/config.json"))["vocab_size"], 50257);
    let [a, b] = ["other", "out"].map(|at| fs::read(dir.join(at).join("tokenizer.json")).unwrap());
    assert!(a == b);
    assert_eq!(fs::read_to_string(dir.join("out/README.md")).unwrap(), "# A model");
    let before = Gguf::read(&dir.join("out.gguf")).keys;
    succeed(dir, "export other out.gguf --overwrite");
    assert!(before != Gguf::read(&dir.join("out.gguf")).keys);
}

/// A disk that takes no more than 100 KiB of a file.
#[test]
fn a_full_disk_leaves_what_was_there() {
    let dir = folder("bytes", "");
    let dir = dir.path();
    succeed(dir, "export model out --weights f16");
    succeed(dir, "export model out.gguf --weights f16");
    let files = ["out/model.safetensors", "out.gguf"].map(|name| dir.join(name));
    let before = files.each_ref().map(|file| fs::read(file).unwrap());
    let names = || {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let were = names();
    for out in ["out", "out.gguf", "new", "new.gguf"] {
        let line = format!(
            "ulimit -f 100; exec {} export model {out} --overwrite --weights f32",
            env!("CARGO_BIN_EXE_mxtrain")
        );
        let output = Command::new("bash").args(["-c", &line]).current_dir(dir).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.starts_with("mxtrain: cannot write ") && error.contains("File too large"));
        assert_eq!(names(), were);
    }
    assert!(before == files.each_ref().map(|file| fs::read(file).unwrap()));
}

#[test]
fn numbers_beyond_a_format_are_named() {
    let dir = folder("bytes", "");
    let dir = dir.path();
    succeed(dir, "export model large --weights f32");
    // An element of a matrix, where the file has it.
    let path = dir.join("large/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header = json_of_bytes(&bytes[8..start]);
    let name = "transformer.h.0.mlp.c_fc.weight";
    let at = start + header[name]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..at + 4].copy_from_slice(&1e6f32.to_le_bytes());
    // Its checksum would be another.
    header.as_object_mut().unwrap().remove("__metadata__");
    let text = header.to_string();
    let changed = [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &bytes[start..]].concat();
    fs::write(&path, changed).unwrap();
    for out in ["new", "new.gguf"] {
        let line = format!("export large {out} --weights f16");
        let error = failed(&run(dir, &line), &line);
        assert!(error.starts_with("--weights"), "{error}");
        assert!(error.contains(&format!("tensor {name} has the number 1e6, which ")), "{error}");
        assert!(error.ends_with("does not have; choose f32"), "{error}");
        assert!(!dir.join(out).exists());
    }
    succeed(dir, "export large new.gguf --weights bf16");
}

fn json_of_bytes(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}
