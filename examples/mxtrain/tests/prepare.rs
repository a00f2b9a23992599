//! `mxtrain prepare`: the bytes that it writes, and what it refuses.

mod common;

use std::fs;
use std::path::Path;

use common::{refuse, run_args, succeed, tokens};

#[test]
fn documents_stay_whole_and_meta_tells_where_they_went() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("a.txt"), "one\ntwo\nthree\nfour\n").unwrap();
    fs::write(path("b.txt"), "é\nü\n").unwrap();
    fs::write(path("c.txt"), "five\n").unwrap();
    let out = succeed(dir.path(), "prepare a.txt b.txt c.txt --out data/set --val-fraction 0.3");
    assert!(out.contains("train.bin: 24 tokens, 2 documents"), "{out}");
    assert!(out.contains("val.bin: 6 tokens, 1 document, 20.0% of the text"), "{out}");

    assert_eq!(text(&path("data/set/train.bin")), "one\ntwo\nthree\nfour\nfive\n");
    assert_eq!(text(&path("data/set/val.bin")), "é\nü\n");

    let meta = fs::read(path("data/set/meta.json")).unwrap();
    let meta: serde_json::Value = serde_json::from_slice(&meta).unwrap();
    let source = |path, documents: [u64; 2], bytes: [u64; 2]| {
        serde_json::json!({
            "path": path,
            "files": 1,
            "train_documents": documents[0],
            "val_documents": documents[1],
            "train_bytes": bytes[0],
            "val_bytes": bytes[1],
        })
    };
    let expected = serde_json::json!({
        "version": 1,
        "tokenizer": "bytes",
        "vocab_size": 256,
        "train_tokens": 24,
        "val_tokens": 6,
        "documents": {"train": 2, "val": 1, "cut": false},
        "sources": [
            source("a.txt", [1, 0], [19, 0]),
            source("b.txt", [0, 1], [0, 6]),
            source("c.txt", [1, 0], [5, 0]),
        ],
    });
    assert_eq!(meta, expected);
    // Nothing temporary is left.
    assert_eq!(fs::read_dir(path("data/set")).unwrap().count(), 3);
}

#[test]
fn a_single_document_is_cut_at_a_line() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.txt"), "one\ntwo\nthree\nfour\n").unwrap();
    let out = succeed(dir.path(), "prepare a.txt --out data --val-fraction 0.5");
    assert!(out.contains("train.bin: 14 tokens, the beginning of the only document"), "{out}");
    assert!(out.contains("val.bin: 5 tokens, its end from a line on, 26.3%"), "{out}");
    assert_eq!(text(&dir.path().join("data/train.bin")), "one\ntwo\nthree\n");
    assert_eq!(text(&dir.path().join("data/val.bin")), "four\n");
}

#[test]
fn without_validation_text_an_older_file_of_it_goes() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.txt"), "one\ntwo\n").unwrap();
    succeed(dir.path(), "prepare a.txt --out data --val-fraction 0.5");
    assert!(dir.path().join("data/val.bin").exists());
    succeed(dir.path(), "prepare a.txt --out data --val-fraction 0");
    assert!(!dir.path().join("data/val.bin").exists());
    assert_eq!(tokens(&dir.path().join("data/train.bin")).len(), 8);
}

#[test]
fn the_last_file_can_be_the_validation_text() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.txt"), "one\n").unwrap();
    fs::write(dir.path().join("b.txt"), "two\n").unwrap();
    succeed(dir.path(), "prepare a.txt b.txt --out data --val-last");
    assert_eq!(tokens(&dir.path().join("data/train.bin")), b"one\n".map(u16::from));
    assert_eq!(tokens(&dir.path().join("data/val.bin")), b"two\n".map(u16::from));
    let error = refuse(dir.path(), "prepare a.txt --out data --val-last");
    assert!(error.contains("two or more inputs"), "{error}");
}

/// Several chunks of 1 MiB, encoded by several threads, give the tokens of the whole text; multi-byte
/// characters lie across the chunk borders.
#[test]
fn gpt2_tokens_in_a_stream_are_those_of_the_whole_text() {
    let source = concat!(include_str!("../src/tokenizer.rs"), include_str!("../src/cli.rs"));
    let mut text = String::new();
    for i in 0.. {
        if text.len() >= 5 << 19 {
            break;
        }
        text.push_str(source);
        text.push_str(&format!("{i}: „Größe“ — 語語語 🦀🦀 naïve…\u{3000}x\r\n\n\n   \t"));
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.txt"), &text).unwrap();
    fs::write(dir.path().join("b.txt"), "The end").unwrap();
    succeed(dir.path(), "prepare a.txt b.txt --out data --tokenizer gpt2 --val-fraction 0");

    let bpe = tiktoken_rs::r50k_base_singleton();
    let mut expected = bpe.encode_with_special_tokens(&text);
    assert!(expected.contains(&50256)); // the sources speak of it
    expected.push(50256);
    expected.extend(bpe.encode_ordinary("The end"));
    let found = tokens(&dir.path().join("data/train.bin"));
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().map(|&t| u32::from(t)).eq(expected));
}

/// What breaks naive encoders: no place to cut for megabytes, and nothing but whitespace.
#[test]
fn monotonous_text_takes_no_long_time() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("words.txt"), "語".repeat(3 << 20)).unwrap();
    fs::write(dir.path().join("spaces.txt"), " ".repeat(9 << 20)).unwrap();
    let line = "prepare words.txt spaces.txt --out data --tokenizer gpt2 --val-fraction 0";
    succeed(dir.path(), line);
    let bpe = tiktoken_rs::r50k_base_singleton();
    let found: Vec<u32> =
        tokens(&dir.path().join("data/train.bin")).iter().map(|&t| t.into()).collect();
    let text = bpe.decode_bytes(&found).unwrap();
    let separator = "<|endoftext|>".len();
    assert_eq!(text.len(), (9 << 20) + (9 << 20) + separator);
}

#[test]
fn wrong_inputs_are_refused_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("latin1.txt"), b"caf\xe9 noir\n").unwrap();
    fs::write(dir.path().join("empty.txt"), "").unwrap();
    fs::create_dir(dir.path().join("empty")).unwrap();
    for (line, expected) in [
        ("prepare none.txt --out data", "cannot read none.txt: No such file"),
        ("prepare empty --out data", "empty: expected files named .txt"),
        ("prepare empty.txt --out data", "no training text"),
        ("prepare latin1.txt --out latin1.txt/data", "cannot create latin1.txt/data"),
        ("prepare latin1.txt --out data --tokenizer gpt2", "byte 0xe9 at offset 3"),
        ("prepare latin1.txt --out data --val-fraction 1", "from 0 to below 1"),
        ("prepare latin1.txt --out data --tokenizer bpe", "[possible values: bytes, gpt2]"),
        ("prepare --out data", "required arguments were not provided: <INPUT>..."),
    ] {
        let error = refuse(dir.path(), line);
        assert!(error.contains(expected), "{line}: {error}");
    }
    let left = fs::read_dir(dir.path().join("data")).unwrap();
    assert_eq!(left.count(), 0);
    // Bytes need not be UTF-8.
    succeed(dir.path(), "prepare latin1.txt --out data --val-fraction 0");
    assert_eq!(tokens(&dir.path().join("data/train.bin"))[3], 0xe9);
}

/// The text of a file of byte tokens.
fn text(path: &Path) -> String {
    let bytes = tokens(path).into_iter().map(|token| u8::try_from(token).unwrap()).collect();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn file_names_may_hold_anything() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a [b] *.txt"), "text\n").unwrap();
    let args = ["prepare", "a [b] *.txt", "--out", "data [1]", "--val-fraction=0"];
    assert!(run_args(dir.path(), args).status.success());
    assert_eq!(tokens(&dir.path().join("data [1]/train.bin")).len(), 5);
}
