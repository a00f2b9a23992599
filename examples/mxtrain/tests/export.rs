//! Models for other programs: what is in the files of `mxtrain export`, and what is refused.
//!
//! dev/llama-cpp.sh and dev/check_transformers.py have these programs read them.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

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
        (
            "export foreign x.gguf",
            "is written with GPT-2's tokens or bytes, this model has tokenizer.j",
        ),
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
    // What is a stranger's to GGUF is none to transformers.
    succeed(dir, "export foreign copy");
    let [a, b] = ["foreign", "copy"].map(|at| fs::read(dir.join(at).join("tokenizer.json")));
    assert!(a.unwrap() == b.unwrap());
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
