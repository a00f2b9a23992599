//! The committed corpus of the fuzz targets (`fuzz/corpus`), through the program: whatever a file
//! holds, the answer is success or one line with exit code 2.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{failed, run_args};

#[test]
fn options_files_and_descriptions() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    fs::create_dir(file("data")).unwrap();
    fs::create_dir(file("run")).unwrap();
    for input in corpus("mxtrain") {
        let data = fs::read(&input).unwrap();
        let (reader, data) = data.split_first().unwrap();
        match reader {
            b'o' => {
                fs::write(file("options.toml"), data).unwrap();
                check(dir.path(), "plan --config options.toml", &input);
            }
            b'm' => {
                fs::write(file("data/meta.json"), data).unwrap();
                check(dir.path(), "info data", &input);
            }
            b'r' => {
                fs::write(file("run/mxtrain.json"), data).unwrap();
                check(dir.path(), "train --resume run", &input);
            }
            b't' => {
                fs::write(file("text.txt"), data).unwrap();
                for tokenizer in ["bytes", "gpt2"] {
                    let _ = fs::remove_dir_all(file("out"));
                    let line = format!("prepare text.txt --out out --tokenizer {tokenizer}");
                    check(dir.path(), &line, &input);
                }
            }
            b'p' => {
                let (kind, data) = data.split_first().unwrap();
                let name = match kind {
                    b'l' => "input.jsonl",
                    b'a' => "input.json",
                    b'q' => "input.parquet",
                    b'g' => "input.txt.gz",
                    b'z' => "input.jsonl.zst",
                    _ => panic!("{}: no input", input.display()),
                };
                fs::write(file(name), data).unwrap();
                check(dir.path(), &format!("prepare {name} --out out"), &input);
            }
            b'k' => {}
            _ => panic!("{}: no reader", input.display()),
        }
    }
}

#[test]
fn token_files() {
    let dir = tempfile::tempdir().unwrap();
    for input in corpus("tokens") {
        fs::copy(&input, dir.path().join("tokens.bin")).unwrap();
        check(dir.path(), "info tokens.bin --json", &input);
    }
}

#[test]
fn checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = dir.path().join("checkpoint");
    fs::create_dir(&checkpoint).unwrap();
    let sound = |target: &str| corpus_folder(target).join("sound");
    fs::copy(sound("config"), checkpoint.join("config.json")).unwrap();
    fs::copy(sound("safetensors"), checkpoint.join("model.safetensors")).unwrap();
    fs::copy(sound("trainer_state"), checkpoint.join("trainer.json")).unwrap();
    let files = [
        ("safetensors", "model.safetensors"),
        ("config", "config.json"),
        ("trainer_state", "trainer.json"),
    ];
    for (target, name) in files {
        let path = checkpoint.join(name);
        let before = fs::read(&path).unwrap();
        for input in corpus(target) {
            fs::copy(&input, &path).unwrap();
            check(dir.path(), "info checkpoint --tensors", &input);
        }
        fs::write(path, before).unwrap();
    }
}

fn check(dir: &Path, line: &str, input: &Path) {
    let output = run_args(dir, line.split_whitespace());
    if !output.status.success() {
        println!("{}: {}", input.display(), failed(&output, line));
    }
}

fn corpus(target: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(corpus_folder(target)).expect("the corpus is there");
    let mut inputs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    inputs.sort();
    assert!(inputs.len() >= 3);
    inputs
}

fn corpus_folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target)
}
