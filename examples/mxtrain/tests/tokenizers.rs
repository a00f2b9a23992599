//! Tokenizers of other models: their files in every command, beside the tokens and the model.

mod common;
#[path = "common/tokenizers.rs"]
mod samples;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::Tokenizer;

use common::{refuse, run, run_args, succeed, tokens};

const PROSE: &str = include_str!("../../../tests/text/prose.txt");
/// A model that takes a step in about a millisecond.
const TINY: &str = "--layers 1 --heads 2 --channels 32 --context 32 --batch-size 2 --threads 1";

/// A folder with a tokenizer and what lies beside it, in `hub`.
fn folder(file: &Value, end: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let hub = dir.path().join("hub");
    fs::create_dir(&hub).unwrap();
    for (name, contents) in [
        ("tokenizer.json", file.to_string()),
        ("tokenizer_config.json", json!({"eos_token": end}).to_string()),
        ("special_tokens_map.json", "{ \"eos_token\" : 1}\n".into()),
        ("chat_template.jinja", "{{ messages }}".into()),
        ("README.md", "# A model".into()),
    ] {
        fs::write(hub.join(name), contents).unwrap();
    }
    dir
}

/// The files that go where the tokenizer goes.
const FILES: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

fn same_files(a: &Path, b: &Path) {
    for name in FILES {
        assert_eq!(fs::read(a.join(name)).unwrap(), fs::read(b.join(name)).unwrap(), "{name}");
    }
}

/// The crate's tokens of a text in which special tokens are text.
fn encoded(file: &Value, text: &str) -> Vec<u32> {
    let mut tokenizer: Tokenizer = file.to_string().parse().unwrap();
    tokenizer.set_encode_special_tokens(true);
    tokenizer.encode(text, true).unwrap().get_ids().to_vec()
}

fn narrow(path: &Path) -> Vec<u32> {
    tokens(path).into_iter().map(u32::from).collect()
}

fn wide(path: &Path) -> Vec<u32> {
    let bytes = fs::read(path).unwrap();
    let ints: Vec<u32> = bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
    assert_eq!(ints[..3], [20240801, 7, ints.len() as u32 - 256]);
    ints[256..].to_vec()
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn generate(dir: &Path, checkpoint: &str, prompt: &str, more: &str) -> String {
    let line = ["generate", "--checkpoint", checkpoint, "--prompt", prompt, "--greedy"];
    let output = run_args(dir, line.into_iter().chain(more.split_whitespace()));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn documents_have_the_tokens_of_the_crate() {
    let file = samples::llama3();
    let dir = folder(&file, "<|end|>");
    let dir = dir.path();
    let marked = "One <|im|> two.<|end|>\n  Three naïve 語 🦀\n<|end|>\n";
    fs::write(dir.join("a.txt"), marked).unwrap();
    fs::write(dir.join("b.jsonl"), "{\"text\": \"row one\"}\n{\"text\": \" row <|begin|>\"}\n")
        .unwrap();
    let line = "prepare a.txt b.jsonl --tokenizer hub --out data --val-fraction 0";
    let out = succeed(dir, line);
    assert!(out.contains("tokenizer tokenizer.json (CRC-32 "), "{out}");
    let of = |text: &str| encoded(&file, text);
    let end = vec![1];
    // Whitespace alone begins no document.
    let blank = of("\n")[1..].to_vec();
    let rows = [of("row one"), end.clone(), of(" row <|begin|>")].concat();
    let expected = [
        [of("One <|im|> two."), end.clone(), of("\n  Three naïve 語 🦀\n"), end.clone()].concat(),
        [blank, end.clone(), rows.clone()].concat(),
    ];
    assert_eq!(narrow(&dir.join("data/train.bin")), expected.concat());
    assert_eq!(expected.concat().iter().filter(|token| **token == 0).count(), 4);

    let meta = json_of(&dir.join("data/meta.json"));
    let bytes = fs::read(dir.join("hub/tokenizer.json")).unwrap();
    let crc32 = format!("{:08x}", crc32fast::hash(&bytes));
    assert_eq!(meta["tokenizer"], json!({"file": {"crc32": crc32, "end_of_text": 1}}));
    assert_eq!((&meta["vocab_size"], &meta["token_type"]), (&500.into(), &Value::Null));
    same_files(&dir.join("hub"), &dir.join("data"));
    assert!(!dir.join("data/README.md").exists());
    assert!(succeed(dir, "info data").contains(&format!("tokenizer.json (CRC-32 {crc32}), voc")));

    // Marks are text, too; another token may end a text.
    succeed(dir, &format!("{line} --no-special --end-of-text <|im|>"));
    let of_rows = [of("row one"), vec![2], of(" row <|begin|>")].concat();
    let expected = [of(marked), vec![2], of_rows].concat();
    assert_eq!(narrow(&dir.join("data/train.bin")), expected);
    // The file itself is a name, too, without what may be another's beside it.
    fs::copy(dir.join("hub/tokenizer.json"), dir.join("hub/other.json")).unwrap();
    let line = line.replace("--tokenizer hub", "--tokenizer hub/other.json");
    let error = refuse(dir, &line);
    assert!(
        error.contains("which token ends a text; name it with --tokenizer hub/other"),
        "{error}"
    );
    succeed(dir, &format!("{line} --end-of-text <|end|>"));
    assert!(dir.join("data/tokenizer.json").exists());
    assert!(!dir.join("data/chat_template.jinja").exists(), "it was the other's");
    // And with bytes nothing of it is left.
    succeed(dir, "prepare a.txt --out data --val-fraction 0");
    let left = fs::read_dir(dir.join("data")).unwrap().count();
    assert_eq!(left, 2, "train.bin and meta.json");
}

/// A long text goes in parts to several threads, in a file or as a row.
#[test]
fn long_texts_have_the_tokens_of_the_whole() {
    let text = PROSE.repeat(11);
    assert!(text.len() > 1 << 20);
    for (file, end, token) in
        [(samples::smol(), "<|endoftext|>", 0), (samples::llama2(), "</s>", 2)]
    {
        let dir = folder(&file, end);
        let dir = dir.path();
        let marked = format!("One.{end}{text}");
        fs::write(dir.join("a.txt"), &marked).unwrap();
        fs::write(dir.join("b.jsonl"), json!({"text": marked}).to_string()).unwrap();
        let expected = [encoded(&file, "One."), vec![token], encoded(&file, &text)].concat();
        for input in ["a.txt", "b.jsonl"] {
            let line = format!("prepare {input} --tokenizer hub --out data --val-fraction 0");
            succeed(dir, &format!("{line} --threads 2"));
            assert!(narrow(&dir.join("data/train.bin")) == expected, "{end} {input}");
        }
    }
}

/// A text of several documents goes in whole ones, where no place for a cut is known.
#[test]
fn documents_are_whole_whose_tokens_cross_words() {
    let mut file = samples::llama2();
    file["model"]["vocab"]["e\u{2581}"] = 600.into();
    file["model"]["merges"].as_array_mut().unwrap().insert(0, json!(["e", "\u{2581}"]));
    let dir = folder(&file, "</s>");
    let dir = dir.path();
    let document = "one more made ".repeat(30_000);
    let of_one = encoded(&file, &document);
    assert!(of_one.contains(&600));
    fs::write(dir.join("a.txt"), [&*document; 3].join("</s>")).unwrap();
    succeed(dir, "prepare a.txt --tokenizer hub --out data --val-fraction 0 --threads 2");
    let expected = [&of_one[..], &of_one, &of_one].join(&2);
    assert!(narrow(&dir.join("data/train.bin")) == expected);
}

#[test]
fn a_single_document_is_cut_at_a_line() {
    for (file, end) in [(samples::llama3(), "<|end|>"), (samples::llama2(), "</s>")] {
        let dir = folder(&file, end);
        let dir = dir.path();
        let text = "one\ntwo words\nthree\nfour\nfive\n";
        fs::write(dir.join("a.txt"), text).unwrap();
        let out = succeed(dir, "prepare a.txt --tokenizer hub --out data --val-fraction 0.4");
        assert!(out.contains("its end from a line on"), "{out}");
        let [train, val] =
            ["train", "val"].map(|name| narrow(&dir.join(format!("data/{name}.bin"))));
        let begin = &encoded(&file, "x")[..1];
        assert_eq!((&train[..1], &val[..1]), (begin, begin));
        assert_eq!([&train[..], &val[1..]].concat(), encoded(&file, text));
        let source = &json_of(&dir.join("data/meta.json"))["sources"][0];
        let bytes = [&source["train_bytes"], &source["val_bytes"]].map(|n| n.as_u64().unwrap());
        let tokenizer: Tokenizer = file.to_string().parse().unwrap();
        let kept = tokenizer.decode(&val[1..], false).unwrap();
        assert!(
            text.ends_with(&kept) && text[..text.len() - kept.len()].ends_with('\n'),
            "{kept:?}"
        );
        assert!(bytes[1].abs_diff(kept.len() as u64) < 2, "{bytes:?} {kept:?}");
        assert_eq!(bytes[0] + bytes[1], text.len() as u64);
    }
}

/// OPT's does both. Such a token stands once between documents, also where one is taken out.
#[test]
fn a_token_may_begin_and_end_a_text() {
    let mut file = samples::smol();
    file["post_processor"] = samples::begins_with("<|endoftext|>", 0);
    let dir = folder(&file, "<|endoftext|>");
    let dir = dir.path();
    for (name, text) in [("a", "first"), ("b", "second one"), ("c", "third one")] {
        fs::write(dir.join(format!("{name}.txt")), text).unwrap();
    }
    succeed(dir, "prepare a.txt b.txt c.txt --tokenizer hub --out data");
    let of = |text: &str| encoded(&file, text);
    assert_eq!(of("x")[0], 0);
    let [train, val] = ["train", "val"].map(|name| narrow(&dir.join(format!("data/{name}.bin"))));
    assert_eq!(train, [of("second one"), of("third one")].concat());
    assert_eq!(val, of("first"));
}

/// From text to text with nothing named but the tokenizer, once.
#[test]
fn a_model_keeps_its_tokenizer() {
    let file = samples::llama3();
    let dir = folder(&file, "<|end|>");
    let dir = dir.path();
    let [one, two] = ["one.txt", "two.txt"];
    fs::write(dir.join(one), PROSE).unwrap();
    fs::write(dir.join(two), PROSE.lines().rev().collect::<Vec<_>>().join("\n")).unwrap();
    succeed(dir, "prepare one.txt two.txt --tokenizer hub --out data");
    fs::rename(dir.join("hub"), dir.join("away")).unwrap();
    let line = format!("train --data data --out model --steps 40 --lr 1e-2 {TINY}");
    let out = succeed(dir, &format!("{line} --sample-every 40 --document-mask"));
    assert!(
        out.contains("tokenizer tokenizer.json (CRC-32 ") && out.contains("vocabulary 500"),
        "{out}"
    );
    assert!(out.contains("documents apart that end with token 1"), "{out}");
    same_files(&dir.join("away"), &dir.join("model"));
    assert_eq!(json_of(&dir.join("model/mxtrain.json"))["tokenizer"]["file"]["end_of_text"], 1);
    assert!(succeed(dir, "info model").contains("tokenizer   tokenizer.json (CRC-32 "));

    // Another program's folder says as much by its files.
    fs::create_dir(dir.join("given")).unwrap();
    for name in FILES.iter().chain(&["config.json", "model.safetensors"]) {
        fs::copy(dir.join("model").join(name), dir.join("given").join(name)).unwrap();
    }
    let text = generate(dir, "model", "The ", "--tokens 20");
    assert!(text.starts_with("The ") && text.len() > 10, "{text:?}");
    assert_eq!(generate(dir, "given", "The ", "--tokens 20"), text);
    assert_eq!(generate(dir, "given", "The ", "--tokens 20 --tokenizer away"), text);
    assert!(succeed(dir, "info given").contains("tokenizer   tokenizer.json (CRC-32 "));
    let eval = "eval --data data --batch-size 2 --sequence-length 32 --threads 1 --batches 2";
    let loss = |folder: &str| {
        let out = succeed(dir, &format!("{eval} --checkpoint {folder} --json"));
        let report: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(report["bits_per_byte"], Value::Null);
        report["loss"].as_f64().unwrap()
    };
    assert!((loss("model") - loss("given")).abs() < 0.01);

    // Exports take it along.
    succeed(dir, "export model exported");
    same_files(&dir.join("away"), &dir.join("exported"));
    succeed(dir, "export model model.gguf");

    // Resumed elsewhere, by its own files.
    succeed(dir, "train --resume model --out moved --steps 41 --threads 1");
    same_files(&dir.join("away"), &dir.join("moved"));
    // On token files alone, whose tokenizer is then known from the model.
    let line =
        format!("train --train data/train.bin --tokenizer away --out other --steps 1 {TINY}");
    succeed(dir, &line);
    fs::rename(dir.join("away"), dir.join("gone")).unwrap();
    let out = succeed(dir, "train --resume other --steps 2 --threads 1 --sample-every 1");
    assert!(out.contains("--- sample at step 2 ---"), "{out}");
    same_files(&dir.join("gone"), &dir.join("other"));
}

/// Prompts and answers have the tokens that the text of both would have.
#[test]
fn answers_are_learned_with_the_models_tokenizer() {
    let file = samples::llama2();
    let dir = folder(&file, "</s>");
    let dir = dir.path();
    fs::write(dir.join("a.txt"), PROSE).unwrap();
    succeed(dir, "prepare a.txt --tokenizer hub --out data");
    let line = format!("train --data data --out base --steps 20 --lr 1e-2 {TINY}");
    succeed(dir, &line);
    // Special tokens are text in an answer, and tokens in a prompt.
    let rows = [("red</s>x", "Rose"), ("blue", "Sky</s>"), ("green", "Leaf")];
    let text: String = (rows.iter())
        .map(|(prompt, answer)| format!("{}\n", json!({"prompt": prompt, "answer": answer})))
        .collect();
    fs::write(dir.join("qa.jsonl"), text).unwrap();
    let out = succeed(
        dir,
        "finetune --init-from base --examples qa.jsonl --out tuned --steps 80 --lr 1e-2 \
         --batch-size 3 --threads 1",
    );
    // `<s>` before each and `</s>` behind.
    let tokenizer: Tokenizer = file.to_string().parse().unwrap();
    let of_prompt = |text: String| tokenizer.encode(text, true).unwrap().len();
    let prompts: usize = rows.iter().map(|(prompt, _)| of_prompt(format!("{prompt}\n"))).sum();
    let of_answer = |text: &str| encoded(&file, &format!("\n{text}")).len() - 3;
    let answers: usize = rows.iter().map(|(_, answer)| of_answer(answer) + 1).sum();
    let all = prompts + answers;
    let words = format!("3 examples of {all} tokens, of which {answers} are learned");
    assert!(out.contains(&words), "{words}: {out}");
    for (prompt, answer) in rows {
        let text = generate(dir, "tuned", &format!("{prompt}\n"), "--tokens 20");
        assert_eq!(text, format!("{prompt}\n{answer}\n"));
    }
    same_files(&dir.join("hub"), &dir.join("tuned"));
}

#[test]
fn large_vocabularies_have_tokens_of_32_bits() {
    let file = samples::wide();
    let dir = folder(&file, "</s>");
    let dir = dir.path();
    fs::write(dir.join("a.txt"), "the path\nthe rest of the path\n".repeat(40)).unwrap();
    fs::write(dir.join("b.txt"), "then this\n".repeat(20)).unwrap();
    let line = "prepare a.txt b.txt --tokenizer hub/tokenizer.json --out data --val-fraction 0.1";
    succeed(dir, line);
    let text = fs::read_to_string(dir.join("a.txt")).unwrap();
    assert_eq!(wide(&dir.join("data/train.bin")), encoded(&file, &text));
    assert!(wide(&dir.join("data/train.bin")).contains(&70_000));
    let of_val = encoded(&file, &"then this\n".repeat(20));
    assert_eq!(wide(&dir.join("data/val.bin")), of_val);
    let meta = json_of(&dir.join("data/meta.json"));
    assert_eq!((&meta["token_type"], &meta["vocab_size"]), (&"u32".into(), &70_002.into()));
    let info = succeed(dir, "info data");
    assert!(info.contains("llm.c u32, the largest is 70,000"), "{info}");

    let tiny = "--layers 1 --heads 1 --channels 16 --context 16 --batch-size 2 --threads 1";
    succeed(dir, &format!("train --data data --out model --steps 2 {tiny}"));
    succeed(dir, "eval --checkpoint model --data data --batches 1 --threads 1");
    assert!(generate(dir, "model", "the", "--tokens 2").starts_with("the"));
    succeed(
        dir,
        "compare gradients --data data --checkpoint model --batch-size 2 --sequence-length 16 \
         --draws 2 --recipe mxfp4 --out record.json --threads 1",
    );
    // A vocabulary that is smaller than the tokenizer's.
    succeed(dir, "prepare a.txt --out bytes");
    succeed(dir, &format!("train --data bytes --out small --steps 1 {tiny}"));
    let error = refuse(dir, "generate --checkpoint small --tokenizer hub");
    assert!(error.contains("has 70002 tokens, the checkpoint's vocabulary is 256"), "{error}");
    let error = refuse(dir, "train --init-from small --data data --out x --steps 1 --threads 1");
    assert!(
        error.contains("its tokenizer has 70002 tokens, the checkpoint's vocabulary"),
        "{error}"
    );
}

#[test]
fn what_is_no_tokenizer_is_named() {
    let dir = folder(&samples::llama3(), "<|end|>");
    let dir = dir.path();
    fs::write(dir.join("a.txt"), "some text\n".repeat(30)).unwrap();
    fs::write(dir.join("text.json"), "{\"version\": 1}").unwrap();
    fs::write(dir.join("pointer.json"), "version https://git-lfs.github.com/spec/v1\noid x\n")
        .unwrap();
    for (name, file) in [("sentencepiece", "tokenizer.model"), ("empty", "other")] {
        fs::create_dir(dir.join(name)).unwrap();
        fs::write(dir.join(name).join(file), "x").unwrap();
    }
    for (options, expected) in [
        ("bpe", "--tokenizer: bpe: no such file or folder; expected bytes, gpt2, or the path of a"),
        ("text.json", "text.json: expected a tokenizer.json of Hugging Face's tokenizers, found"),
        ("pointer.json", "pointer.json: a Git LFS pointer"),
        ("empty", "empty: no tokenizer.json in this folder"),
        ("sentencepiece", "tokenizer.model: a SentencePiece model, which is not read; make a"),
        ("sentencepiece", "T.from_pretrained('sentencepiece').save_pretrained('sentencepiece')"),
        ("sentencepiece/tokenizer.model", "a SentencePiece model, which is not read"),
        (
            "hub --end-of-text x|y|z",
            "--end-of-text: expected one token of hub/tokenizer.json, found",
        ),
        ("gpt2 --end-of-text x", "--end-of-text: goes with the path of a tokenizer.json; gpt2 has"),
    ] {
        let error = refuse(dir, &format!("prepare a.txt --out out --tokenizer {options}"));
        assert!(error.contains(expected), "{options}: {error}");
        assert!(!dir.join("out").exists(), "{options}");
    }

    // Nobody's file is replaced.
    let line = "prepare a.txt --tokenizer hub --val-fraction 0.3 --out";
    fs::create_dir(dir.join("mine")).unwrap();
    fs::write(dir.join("mine/tokenizer_config.json"), "{}").unwrap();
    let error = refuse(dir, &format!("{line} mine"));
    assert!(error.contains("mine/tokenizer_config.json: is there already and not of"), "{error}");
    assert_eq!(fs::read_dir(dir.join("mine")).unwrap().count(), 1);
    // Tokens stay with the tokenizer that made them.
    succeed(dir, &format!("{line} data"));
    fs::write(dir.join("data/tokenizer.json"), samples::smol().to_string()).unwrap();
    let train = format!("train --out model --steps 1 {TINY} --data data");
    let error = refuse(dir, &train);
    assert!(
        error.contains("expected the tokenizer that the tokens beside it were made"),
        "{error}"
    );
    fs::remove_file(dir.join("data/tokenizer.json")).unwrap();
    assert!(refuse(dir, &train).contains("data/tokenizer.json: is missing, which says what"));
    fs::remove_file(dir.join("data/meta.json")).unwrap();
    succeed(dir, &format!("{line} data2"));
    let train = train.replace("data data", "data data2");
    assert!(
        refuse(dir, &format!("{train} --tokenizer gpt2"))
            .contains("was prepared with tokenizer.json")
    );
    succeed(dir, &format!("{train} --tokenizer hub"));

    // A model whose tokenizer.json is the user's now.
    fs::write(dir.join("model/tokenizer.json"), "{}").unwrap();
    let error = refuse(dir, "generate --checkpoint model");
    assert!(error.contains("model/tokenizer.json: expected a tokenizer.json"), "{error}");
    assert!(run(dir, "info model").status.success());
    // Tokens that are there need none.
    let line = "train --init-from model --train data2/train.bin --out on --steps 1 --batch-size 2";
    succeed(dir, &format!("{line} --threads 1"));
    assert_eq!(fs::read(dir.join("on/tokenizer.json")).unwrap(), b"{}");
    fs::remove_file(dir.join("model/tokenizer.json")).unwrap();
    fs::write(dir.join("model/tokenizer.model"), "x").unwrap();
    let error = refuse(dir, "generate --checkpoint model");
    assert!(error.contains("a SentencePiece model") && error.contains("('model')"), "{error}");
}
