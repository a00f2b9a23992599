//! The committed corpus of the fuzz targets, replayed without a fuzzer: seeds for every kind of
//! file, and every input that once found a defect.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

#[test]
fn tokens() {
    replay("tokens", targets::tokens);
}

#[test]
fn megatron() {
    replay("megatron", targets::megatron);
}

#[test]
fn safetensors() {
    replay("safetensors", targets::safetensors);
}

#[test]
fn config() {
    replay("config", targets::config);
}

#[test]
fn index() {
    replay("index", targets::index);
}

#[test]
fn trainer_state() {
    replay("trainer_state", targets::trainer_state);
}

#[test]
fn recipe() {
    replay("recipe", targets::recipe);
}

fn replay(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut inputs = 0;
    for entry in fs::read_dir(folder).expect("the corpus is there") {
        let path = entry.expect("the entry can be read").path();
        let data = fs::read(&path).expect("the input can be read");
        // Printed with a failure, to say which input it was.
        println!("{}", path.display());
        run(&data);
        run(&data[..data.len() / 2]);
        inputs += 1;
    }
    assert!(inputs >= 3, "{target}: {inputs} inputs");
}
