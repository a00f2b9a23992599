//! What `mxtrain` reads: its options file (TOML), `meta.json`, `mxtrain.json`, text, tokens, and
//! what `prepare` takes: JSON, Parquet, gzip, zstd.
//!
//! The program is no library, so its sources are compiled in here. The first byte picks the reader.
#![no_main]
#![allow(dead_code)]

#[path = "../../examples/mxtrain/src/cli.rs"]
mod cli;
#[path = "../../examples/mxtrain/src/compare/mod.rs"]
mod compare;
#[path = "../../examples/mxtrain/src/config_file.rs"]
mod config_file;
#[path = "../../examples/mxtrain/src/console.rs"]
mod console;
#[path = "../../examples/mxtrain/src/eval.rs"]
mod eval;
#[path = "../../examples/mxtrain/src/failure.rs"]
mod failure;
#[path = "../../examples/mxtrain/src/files.rs"]
mod files;
#[path = "../../examples/mxtrain/src/fit.rs"]
mod fit;
#[path = "../../examples/mxtrain/src/generate.rs"]
mod generate;
#[path = "../../examples/mxtrain/src/hugging_face.rs"]
mod hugging_face;
#[path = "../../examples/mxtrain/src/info.rs"]
mod info;
#[path = "../../examples/mxtrain/src/lock.rs"]
mod lock;
#[path = "../../examples/mxtrain/src/machine.rs"]
mod machine;
#[path = "../../examples/mxtrain/src/parse.rs"]
mod parse;
#[path = "../../examples/mxtrain/src/plan.rs"]
mod plan;
#[path = "../../examples/mxtrain/src/prepare/mod.rs"]
mod prepare;
#[path = "../../examples/mxtrain/src/prepared.rs"]
mod prepared;
#[path = "../../examples/mxtrain/src/run_file.rs"]
mod run_file;
#[path = "../../examples/mxtrain/src/signals.rs"]
mod signals;
#[path = "../../examples/mxtrain/src/spikes.rs"]
mod spikes;
#[path = "../../examples/mxtrain/src/stop.rs"]
mod stop;
#[path = "../../examples/mxtrain/src/table.rs"]
mod table;
#[path = "../../examples/mxtrain/src/tokenizer.rs"]
mod tokenizer;
#[path = "../../examples/mxtrain/src/tokens_file.rs"]
mod tokens_file;
#[path = "../../examples/mxtrain/src/train/mod.rs"]
mod train;

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use signals::Signals;
use tokenizer::{TextStream, Tokenizer, cut_point};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((&reader, data)) = data.split_first() else { return };
    match reader {
        b'o' => options(data),
        b'm' => meta(data),
        b'r' => run(data),
        b't' => text(data),
        b'k' => tokens(data),
        b'p' => prepare_input(data),
        _ => {}
    }
});

/// Options that are accepted are options of the command line, and failures are one line.
fn options(data: &[u8]) {
    let file = folder().join("options.toml");
    fs::write(&file, data).expect("a temporary file can be written");
    for sub in ["train", "plan"] {
        match config_file::read(&file, sub) {
            Ok(options) => {
                let args: Vec<OsString> = vec!["mxtrain".into(), sub.into()];
                // Options may exclude each other, but no more than that.
                let _ = parse::parse_or_fail(&parse::insert(&args, &options));
            }
            Err(failure) => assert_eq!(failure.code, 2, "{}", failure.message),
        }
    }
}

fn meta(data: &[u8]) {
    fs::write(folder().join("meta.json"), data).expect("a temporary file can be written");
    let Ok(meta) = prepared::Meta::read(folder()) else { return };
    let json = serde_json::to_vec(&meta).expect("what was read can be written");
    fs::write(folder().join("meta.json"), json).expect("a temporary file can be written");
    assert_eq!(prepared::Meta::read(folder()).expect("what was written can be read"), meta);
}

fn run(data: &[u8]) {
    fs::write(folder().join("mxtrain.json"), data).expect("a temporary file can be written");
    let Ok(Some(run)) = run_file::RunFile::read(folder()) else { return };
    for other_data in [false, true] {
        let args: Vec<OsString> = vec!["mxtrain".into(), "train".into()];
        let Ok(options) = run.to_args(other_data) else { return };
        let _ = parse::parse_or_fail(&parse::insert(&args, &options));
    }
}

/// Text comes back from its tokens, and may be cut where `cut_point` says.
fn text(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for tokenizer in [Tokenizer::Bytes, Tokenizer::Gpt2] {
        let tokens = tokenizer.encode(text);
        let mut stream = TextStream::new(tokenizer);
        let mut back: String = tokens.iter().map(|t| stream.push(u32::from(*t))).collect();
        back.push_str(&stream.finish());
        assert_eq!(back, text);
        if let Some(at) = cut_point(text) {
            let parts = [tokenizer.encode(&text[..at]), tokenizer.encode(&text[at..])];
            assert_eq!(parts.concat(), tokens);
        }
    }
}

/// Any tokens are some text.
fn tokens(data: &[u8]) {
    for tokenizer in [Tokenizer::Bytes, Tokenizer::Gpt2] {
        let mut stream = TextStream::new(tokenizer);
        for token in data.as_chunks::<4>().0 {
            let _ = stream.push(u32::from_le_bytes(*token) & 0x1_ffff);
        }
        let _ = stream.finish();
    }
}

/// An input of `prepare`, whose first byte picks its name: tokens, or a failure in one line.
fn prepare_input(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    let name = match kind {
        b'l' => "input.jsonl",
        b'a' => "input.json",
        b'q' => "input.parquet",
        b'g' => "input.txt.gz",
        b'z' => "input.jsonl.zst",
        _ => "input.txt",
    };
    let (input, out) = (folder().join(name), folder().join("out"));
    fs::write(&input, data).expect("a temporary file can be written");
    let line = ["mxtrain", "prepare", "--threads=1", "--out"].map(OsString::from);
    let line = [&line[..], &[out.clone().into(), input.into()]].concat();
    let parsed = parse::parse_or_fail(&line).expect("the options are right");
    let cli::Command::Prepare(args) = &parsed.cli.command else { unreachable!() };
    static SIGNALS: LazyLock<Signals> =
        LazyLock::new(|| Signals::listen().expect("signals can be listened to"));
    match prepare::run_with(args, &SIGNALS) {
        Ok(_) => assert!(prepared::Meta::read(&out).expect("it was written").train_tokens > 0),
        Err(failure) => assert_eq!(failure.code, 2, "{}", failure.message),
    }
}

fn folder() -> &'static Path {
    static FOLDER: std::sync::OnceLock<tempfile::TempDir> = std::sync::OnceLock::new();
    let shm = Path::new("/dev/shm");
    let make = || match shm.is_dir() {
        true => tempfile::tempdir_in(shm),
        false => tempfile::tempdir(),
    };
    FOLDER.get_or_init(|| make().expect("a temporary folder")).path()
}
