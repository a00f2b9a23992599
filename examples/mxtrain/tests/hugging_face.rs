//! Folders that Hugging Face's programs read: what a run finds, keeps and writes there, and where
//! the texts of such models end.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use common::{mxtrain, refuse, run_args, succeed};

/// A model that takes a step in about a millisecond.
const TINY: &str = "--layers 1 --heads 2 --channels 32 --context 32 --batch-size 2 --threads 1";

/// A folder with prepared bytes in `data`, and GPT-2's tokens in `tokens`.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("text.txt"), include_str!("../../../tests/text/prose.txt")).unwrap();
    succeed(dir.path(), "prepare text.txt --out data");
    dir
}

/// A model with a tokenizer that is none of ours, as transformers saves it, and tokens of it.
fn foreign() -> (PathBuf, PathBuf) {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    (data.join("with-tokenizer"), data.join("with-tokenizer.bin"))
}

fn same(a: &Path, b: &Path) -> bool {
    fs::read(a).unwrap() == fs::read(b).unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn finetuning_keeps_the_tokenizer_and_what_the_user_put_there() {
    let (model, tokens) = foreign();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let files = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"];
    // A template of the model's, and one file that the user has put into the new folder already.
    let origin = dir.join("origin");
    fs::create_dir(&origin).unwrap();
    for file in files.iter().chain(&["config.json", "model.safetensors"]) {
        fs::copy(model.join(file), origin.join(file)).unwrap();
    }
    fs::write(origin.join("chat_template.jinja"), "{{ messages }}").unwrap();
    fs::write(origin.join("README.md"), "# A model").unwrap();
    succeed(
        dir,
        &format!(
            "train --out tuned --init-from origin --train {} --steps 2 \
        --batch-size 2 --recipe bf16 --threads 1",
            tokens.display()
        ),
    );
    for file in files.iter().chain(&["chat_template.jinja"]) {
        assert!(same(&origin.join(file), &dir.join("tuned").join(file)), "{file}");
    }
    assert!(!dir.join("tuned/README.md").exists());

    // Resumed into the folder and into another one, with a file that was changed meanwhile.
    fs::write(dir.join("tuned/tokenizer_config.json"), "{\"mine\": 1}").unwrap();
    fs::remove_file(dir.join("tuned/chat_template.jinja")).unwrap();
    succeed(dir, "train --resume tuned --steps 3 --threads 1");
    assert_eq!(json(&dir.join("tuned/tokenizer_config.json"))["mine"], 1);
    assert!(!dir.join("tuned/chat_template.jinja").exists());
    succeed(dir, "train --resume tuned --out moved --steps 4 --threads 1");
    assert_eq!(json(&dir.join("moved/tokenizer_config.json"))["mine"], 1);
    assert!(same(&origin.join("tokenizer.json"), &dir.join("moved/tokenizer.json")));

    // Its text is told without being asked for.
    let text = succeed(dir, "generate --checkpoint moved --prompt the --tokens 8 --greedy");
    assert!(text.starts_with("the"), "{text:?}");
    assert!(succeed(dir, "info moved").contains("tokenizer   tokenizer.json (CRC-32 "));
    // Files that only another program makes sense of.
    fs::remove_file(dir.join("moved/tokenizer.json")).unwrap();
    fs::write(dir.join("moved/vocab.json"), "{\"a\": 0}").unwrap();
    let error = refuse(dir, "generate --checkpoint moved --prompt x");
    assert!(error.contains("the tokenizer in moved/vocab.json is not GPT-2's"), "{error}");
}

#[test]
fn a_run_writes_the_tokenizer_of_its_data() {
    let dir = folder();
    let dir = dir.path();
    succeed(dir, &format!("train --data data --out model --steps 2 {TINY}"));
    let tokenizer = json(&dir.join("model/tokenizer.json"));
    let vocabulary = tokenizer["model"]["vocab"].as_object().unwrap();
    assert_eq!(vocabulary.len(), 256);
    assert_eq!((&vocabulary["A"], &vocabulary["Ġ"]), (&b'A'.into(), &b' '.into()));
    assert_eq!(tokenizer["model"]["merges"], Value::Array(Vec::new()));
    assert_eq!(json(&dir.join("model/tokenizer_config.json"))["model_max_length"], 32);
    // Without mxtrain.json, the tokenizer is still known.
    fs::create_dir(dir.join("given")).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(dir.join("model").join(file), dir.join("given").join(file)).unwrap();
    }
    let greedy = "--prompt the --tokens 20 --greedy";
    assert_eq!(
        succeed(dir, &format!("generate --checkpoint given {greedy}")),
        succeed(dir, &format!("generate --checkpoint model {greedy}"))
    );
    assert!(succeed(dir, "info given").contains("tokenizer   bytes"));

    // Another tokenizer in the same folder takes the place of the first run's, but not of a user's.
    succeed(dir, "prepare text.txt --out tokens --tokenizer gpt2");
    let gpt2 =
        format!("train --data tokens --out model --overwrite --steps 1 --vocab-size 50304 {TINY}");
    let output = run_args(dir, gpt2.split_whitespace());
    assert!(output.status.success());
    assert!(!String::from_utf8_lossy(&output.stderr).contains("note:"));
    let tokenizer = json(&dir.join("model/tokenizer.json"));
    assert_eq!(tokenizer["model"]["merges"].as_array().unwrap().len(), 50_000);
    assert_eq!(tokenizer["model"]["vocab"]["<|endoftext|>"], 50_256);
    assert_eq!(json(&dir.join("model/tokenizer_config.json"))["eos_token"], "<|endoftext|>");
    // GPT-2's own file by its path is not another tokenizer to its model.
    succeed(dir, "prepare text.txt --out named --tokenizer model");
    assert!(json(&dir.join("named/meta.json"))["tokenizer"]["file"].is_object());
    let line =
        "train --data named --init-from model --out again --steps 1 --batch-size 2 --threads 1";
    let output = run_args(dir, line.split_whitespace());
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && !error.contains("note:"), "{error}");
    assert!(same(&dir.join("model/tokenizer.json"), &dir.join("again/tokenizer.json")));

    let theirs = foreign().0.join("tokenizer.json");
    fs::copy(&theirs, dir.join("model/tokenizer.json")).unwrap();
    let output = run_args(dir, gpt2.split_whitespace());
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("note: model/tokenizer.json was there before this run and stays"),
        "{error}"
    );
    assert!(same(&theirs, &dir.join("model/tokenizer.json")));
}

/// Tokens of another tokenizer than the model's are most likely a mistake.
#[test]
fn another_tokenizer_than_the_models_is_told() {
    let dir = folder();
    let line = format!(
        "train --data data --out tuned --init-from {} --steps 1 --batch-size 2 \
        --threads 1",
        foreign().0.display()
    );
    let output = run_args(dir.path(), line.split_whitespace());
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{error}");
    assert!(error.contains("mxtrain: note: the text that "), "{error}");
    assert!(error.contains("this run's data by bytes"), "{error}");
    let tokenizer = json(&dir.path().join("tuned/tokenizer.json"));
    assert_eq!(tokenizer["model"]["vocab"].as_object().unwrap().len(), 256);
    assert!(!dir.path().join("tuned/generation_config.json").exists());
}

#[test]
fn a_text_ends_at_the_models_end_or_at_the_users() {
    let dir = folder();
    let dir = dir.path();
    succeed(dir, &format!("train --data data --out model --steps 60 --lr 1e-2 {TINY}"));
    let greedy = "generate --checkpoint model --prompt th --tokens 60 --greedy";
    let whole = succeed(dir, greedy);
    let text = &whole[2..whole.len() - 1];
    assert!(text.is_ascii(), "{text:?}");

    // Two characters in the middle of the text, and a stop that never comes.
    let stop = &text[30..32];
    let before = &text[..text.find(stop).unwrap()];
    let mut command = mxtrain();
    command.current_dir(dir).args(greedy.split(' ')).args(["--stop", "\u{1}", "--stop", stop]);
    let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
    assert_eq!(output, format!("th{before}\n"));
    // The end of the text might be the beginning of a stop, but is none.
    let mut command = mxtrain();
    let stop = format!("{}\u{1}", &text[text.len() - 1..]);
    command.current_dir(dir).args(greedy.split(' ')).args(["--stop", &stop]);
    assert_eq!(String::from_utf8(command.output().unwrap().stdout).unwrap(), whole);

    // The token that the folder names ends the text and is not printed.
    let end = text.as_bytes()[20];
    let before = &text[..text.find(char::from(end)).unwrap()];
    let config = format!("{{\"eos_token_id\": [{end}, 255]}}");
    fs::write(dir.join("model/generation_config.json"), config).unwrap();
    assert_eq!(succeed(dir, greedy), format!("th{before}\n"));
    assert_eq!(succeed(dir, &format!("{greedy} --ignore-eos")), whole);
    // Some write -1 for none.
    fs::write(dir.join("model/generation_config.json"), "{\"eos_token_id\": -1}").unwrap();
    assert_eq!(succeed(dir, greedy), whole);
    fs::write(dir.join("model/generation_config.json"), "{\"eos_token_id\": 1.5}").unwrap();
    assert!(refuse(dir, greedy).contains("eos_token_id: expected tokens"));
    assert!(refuse(dir, &format!("{greedy} --stop=")).contains("a value is required"));
}

/// Samples on the way end where the texts of the finished model do.
#[test]
fn samples_of_a_run_end_at_the_models_end() {
    let (model, tokens) = foreign();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(model.join(file), dir.join(file)).unwrap();
    }
    // Every token but a few ends a text, so a sample of 200 tokens would not come to its end.
    let ends: Vec<u32> = (40..300).collect();
    fs::write(dir.join("generation_config.json"), format!("{{\"eos_token_id\": {ends:?}}}"))
        .unwrap();
    let out = succeed(
        dir,
        &format!(
            "train --out tuned --init-from . --train {} --tokenizer bytes \
        --steps 1 --batch-size 2 --threads 1 --sample-every 1",
            tokens.display()
        ),
    );
    let sample = out.split("--- sample at step 1 ---\n").nth(1).unwrap();
    let sample = sample.split("\n---").next().unwrap();
    assert!(sample.len() < 100, "{sample:?}");
}

#[test]
fn several_samples_have_seeds_in_a_row() {
    let dir = folder();
    let dir = dir.path();
    succeed(dir, &format!("train --data data --out model --steps 2 {TINY}"));
    let line = "generate --checkpoint model --prompt the --tokens 12";
    let one = |seed| succeed(dir, &format!("{line} --seed {seed}"));
    let three = succeed(dir, &format!("{line} --seed 7 --samples 3"));
    let expected: String = (1..=3)
        .map(|n| format!("--- sample {n} of 3, seed {} ---\n{}", n + 6, one(n + 6)))
        .collect();
    assert_eq!(three, expected);
    assert_ne!(one(7), one(8));
    assert!(refuse(dir, &format!("{line} --samples 2 --greedy")).starts_with("--samples: "));
    assert!(refuse(dir, &format!("{line} --samples 0")).contains("0 is not in 1.."));
}

#[test]
fn a_name_on_the_hub_or_a_file_is_no_folder() {
    let dir = folder();
    let dir = dir.path();
    let (model, _) = foreign();
    let train = format!("train --data data --out model --steps 2 {TINY} --init-from");
    let fetch = "; a model of Hugging Face's hub has to be fetched first: `hf download";
    for command in [&train, "generate --checkpoint", "eval --data data --checkpoint"] {
        for name in ["gpt2", "openai-community/gpt2"] {
            let message = refuse(dir, &format!("{command} {name}"));
            assert!(message.contains(&format!("{fetch} {name} ")), "{command}: {message}");
        }
        let message = refuse(dir, &format!("{command} ./runs/a/b"));
        assert!(!message.contains("hub"), "{command}: {message}");
        let file = model.join("model.safetensors");
        let message = refuse(dir, &format!("{command} {}", file.display()));
        assert!(message.contains("name the folder that it lies in"), "{command}: {message}");
    }
}
