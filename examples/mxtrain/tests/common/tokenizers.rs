//! Small tokenizers as models have them.
// Unit tests share it, where nothing is anybody else's; each test file uses a part.
#![allow(dead_code, unreachable_pub)]

use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// What they are trained on.
const PROSE: &str = include_str!("../../../../tests/text/prose.txt");
/// How Llama 3's splits text, and Qwen's but for numbers.
pub const PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Byte-level BPE as Llama 3's: tokens `<|begin|>` before a text (0), `<|end|>` (1) and `<|im|>`
/// (2).
pub fn llama3() -> Value {
    let split = json!({
        "type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": false,
    });
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    let pre_tokenizer = json!({"type": "Sequence", "pretokenizers": [split, bytes]});
    let mut file =
        trained(Value::Null, pre_tokenizer, &["<|begin|>", "<|end|>", "<|im|>"], true, 500);
    file["post_processor"] = begins_with("<|begin|>", 0);
    file["decoder"] = bytes;
    file
}

/// That without the token before a text, and with GPT-2's pattern.
pub fn smol() -> Value {
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let digits = json!({"type": "Digits", "individual_digits": true});
    let pre_tokenizer = json!({"type": "Sequence", "pretokenizers": [digits, bytes]});
    let mut file = trained(Value::Null, pre_tokenizer, &["<|endoftext|>", "<|im|>"], true, 400);
    file["decoder"] = bytes;
    file
}

/// BPE with tokens for bytes as Llama 2's: `<unk>`, `<s>` before a text (1), `</s>` (2), then
/// bytes.
pub fn llama2() -> Value {
    let spaces = json!({
        "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true,
    });
    let bytes: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut first = vec!["<unk>", "<s>", "</s>"];
    first.extend(bytes.iter().map(String::as_str));
    let mut file = trained(Value::Null, spaces, &first, false, 600);
    let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let before = json!({"type": "Prepend", "prepend": "\u{2581}"});
    file["normalizer"] = json!({"type": "Sequence", "normalizers": [before, space]});
    file["pre_tokenizer"] = Value::Null;
    file["post_processor"] = begins_with("<s>", 1);
    file["decoder"] = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]});
    // Bytes are no tokens of a text.
    file["added_tokens"].as_array_mut().unwrap().truncate(3);
    file["model"]["byte_fallback"] = true.into();
    file["model"]["unk_token"] = "<unk>".into();
    file["model"]["fuse_unk"] = true.into();
    file
}

/// A token of a byte each, but for `th` (70,000) and `</s>` (70,001).
pub fn wide() -> Value {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut vocabulary: Value = (alphabet.into_iter().enumerate())
        .map(|(id, character)| (character.to_string(), Value::from(id)))
        .collect();
    vocabulary["th"] = 70_000.into();
    vocabulary["</s>"] = 70_001.into();
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let mut file = empty(Value::Null, bytes.clone());
    file["model"]["vocab"] = vocabulary;
    file["model"]["merges"] = json!([["t", "h"]]);
    file["decoder"] = bytes;
    file["added_tokens"] = json!([{
        "id": 70_001, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    }]);
    file
}

fn empty(normalizer: Value, pre_tokenizer: Value) -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": null,
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": {}, "merges": [],
        },
    })
}

fn trained(
    normalizer: Value,
    pre_tokenizer: Value,
    first: &[&str],
    of_bytes: bool,
    size: usize,
) -> Value {
    let mut tokenizer: Tokenizer =
        empty(normalizer, pre_tokenizer).to_string().parse().expect("it is a tokenizer");
    let mut trainer = BpeTrainer::builder()
        .vocab_size(size)
        .show_progress(false)
        .special_tokens(first.iter().map(|name| AddedToken::from(*name, true)).collect());
    if of_bytes {
        trainer = trainer.initial_alphabet(ByteLevel::alphabet().into_iter().collect());
    }
    let mut trainer: TrainerWrapper = trainer.build().into();
    // With line breaks, where these are characters like others.
    let lines =
        PROSE.split_inclusive('\n').map(|line| if of_bytes { line } else { line.trim_end() });
    tokenizer.train(&mut trainer, lines).expect("it is trained");
    serde_json::to_value(&tokenizer).expect("a tokenizer becomes JSON")
}

/// A post-processor that puts a token before a text.
pub fn begins_with(token: &str, id: u32) -> Value {
    let before = json!({"SpecialToken": {"id": token, "type_id": 0}});
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    json!({
        "type": "TemplateProcessing",
        "single": [before, text("A")],
        "pair": [before, text("A"), before, text("B")],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    })
}
