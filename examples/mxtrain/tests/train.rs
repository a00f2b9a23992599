//! Training a tiny model from end to end with the built program.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use common::{interrupt, mxtrain, refuse, run, run_args, start, succeed, wait_for};

/// A model that takes a step in about a millisecond.
const TINY: &str = "--layers 1 --heads 2 --channels 32 --context 32 --batch-size 2 --threads 1";

/// A folder with prepared text in `data`.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("text.txt"), include_str!("../../../tests/text/prose.txt")).unwrap();
    succeed(dir.path(), "prepare text.txt --out data");
    dir
}

/// The objects of a log of one type, by step; where a resumed run repeated a step, the last.
fn log(dir: &Path, name: &str, kind: &str) -> BTreeMap<u64, Value> {
    let text = fs::read_to_string(dir.join(name)).unwrap_or_default();
    text.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|object| object["type"] == kind)
        .map(|object| (object["step"].as_u64().unwrap(), object))
        .collect()
}

/// Loss and gradient norm of every step.
fn losses(dir: &Path, name: &str) -> Vec<(u64, f64, f64)> {
    let number = |v: &Value| v.as_f64().unwrap();
    log(dir, name, "step")
        .into_iter()
        .map(|(step, o)| (step, number(&o["loss"]), number(&o["grad_norm"])))
        .collect()
}

fn info(dir: &Path, path: &str) -> Value {
    serde_json::from_str(&succeed(dir, &format!("info {path} --json"))).unwrap()
}

/// Kept with the run, so that it need not be said again, and cannot be another.
#[test]
fn token_dropping_is_named_shown_and_kept() {
    let dir = folder();
    let dir = dir.path();
    let (deep, drop) =
        (TINY.replace("--layers 1", "--layers 3"), "--token-drop start=16,steps=50%");
    let line = format!("train --data data --out model --eval-batches 1 --steps 4 {drop}");
    let error = refuse(dir, &format!("{line} {TINY}"));
    assert!(error.contains("--token-drop: blocks between the first and the last"), "{error}");
    let out = succeed(dir, &format!("{line} {deep}"));
    assert!(out.contains(", token drop start=16,steps=50%\n"), "{out}");
    assert_eq!(info(dir, "model")["training"]["token_drop"], "start=16,steps=50%");
    assert!(succeed(dir, "info model").contains(", token drop start=16,steps=50%, seed 1337\n"));
    let other = "train --resume model --data data --token-drop start=16,steps=9 --steps 6";
    let error = refuse(dir, other);
    assert!(error.contains("started with, start=16,steps=50%; got start=16,steps=9"), "{error}");
    let out = succeed(dir, "train --resume model --data data --steps 6");
    assert!(out.contains("token drop start=16,steps=50%\n"), "{out}");
    let plan = |drop: &str| {
        let plan = succeed(dir, &format!("plan --data data {deep} --json {drop}"));
        serde_json::from_str::<Value>(&plan).unwrap()["activations"].as_u64().unwrap()
    };
    assert!(plan(drop) > plan(""));
}

/// Documents of GPT-2's tokens end with its own, which is saved with the run.
#[test]
fn a_document_mask_is_named_shown_and_kept() {
    let dir = folder();
    let dir = dir.path();
    let text: String = (0..300).map(|i| format!("Number {i} of some.<|endoftext|>")).collect();
    fs::write(dir.join("short.txt"), text).unwrap();
    succeed(dir, "prepare short.txt --tokenizer gpt2 --out short");
    let line = format!("train --data short {TINY} --eval-batches 1 --save-every 2");
    let mask = "--document-mask";
    let out = succeed(dir, &format!("{line} {mask} --steps 4 --out model --log a.jsonl"));
    assert!(out.contains(", documents apart that end with token 50256\n"), "{out}");
    assert_eq!(info(dir, "model")["training"]["document_end"], 50256);
    assert!(succeed(dir, "info model").contains(", documents end with 50256, seed 1337\n"));
    succeed(dir, &format!("{line} --steps 4 --out whole --log b.jsonl"));
    assert_ne!(losses(dir, "a.jsonl"), losses(dir, "b.jsonl"));
    assert!(info(dir, "whole")["training"].get("document_end").is_none());
    // A run that stops goes on so, whether it is named again or not.
    let out = succeed(dir, &format!("train --resume model --steps 5 {mask}"));
    assert!(out.contains(", documents apart that end with token 50256\n"), "{out}");
    let error = refuse(dir, &format!("train --resume whole --steps 5 {mask}"));
    assert!(
        error.contains("--document-mask: a resumed run keeps what it was started with"),
        "{error}"
    );
    for (line, words) in [
        (
            format!("train --data data --out bytes --steps 1 {mask} {TINY}"),
            "no token of --tokenizer bytes",
        ),
        (
            format!(
                "train --train short/train.bin --vocab-size 50257 --out x --steps 1 {mask} {TINY}"
            ),
            "name the tokenizer",
        ),
    ] {
        let error = refuse(dir, &line);
        assert!(error.contains("--document-mask: ") && error.contains(words), "{line}: {error}");
    }
}

#[test]
fn an_optimizer_is_named_shown_and_kept() {
    let dir = folder();
    let dir = dir.path();
    let line = format!("train --data data --out model --eval-batches 1 --log log.jsonl {TINY}");
    let out = succeed(dir, &format!("{line} --optimizer stable-adamw --steps 4"));
    assert!(out.contains(", optimizer stable-adamw\n"), "{out}");
    assert_eq!(info(dir, "model")["training"]["optimizer"], "stable-adamw");
    let text = succeed(dir, "info model");
    assert!(
        text.contains("step 4, recipe mxfp4-rht-sr, optimizer stable-adamw, seed 1337\n"),
        "{text}"
    );
    let error = refuse(dir, "train --resume model --data data --optimizer adamw --steps 6");
    assert!(error.contains("model was trained with stable-adamw, which a run keeps; got adamw"));
    let out = succeed(dir, "train --resume model --data data --steps 6");
    assert!(out.contains("optimizer stable-adamw\n"), "{out}");
    // What its moments are kept in may change.
    let smaller =
        "train --resume model --data data --steps 8 --optimizer stable-adamw,moments=int8";
    let out = succeed(dir, smaller);
    assert!(out.contains("optimizer stable-adamw,moments=int8\n"), "{out}");
    let out = succeed(dir, "train --resume model --data data --steps 9");
    assert!(out.contains("optimizer stable-adamw,moments=int8\n"), "{out}");
}

#[test]
fn updates_are_in_the_log_when_asked_for() {
    let dir = folder();
    let dir = dir.path();
    let line = format!("train --data data --out model --steps 6 {TINY}");
    let error = refuse(dir, &format!("{line} --updates-every 2"));
    assert!(error.contains("--updates-every: needs --log or --tensorboard"), "{error}");
    succeed(dir, &format!("{line} --updates-every 2 --log log.jsonl --tensorboard runs"));
    let (updates, steps) = (log(dir, "log.jsonl", "update"), log(dir, "log.jsonl", "step"));
    assert_eq!(updates.keys().copied().collect::<Vec<_>>(), [2, 4, 6]);
    for (step, found) in &updates {
        let square = |value: &serde_json::Value| value.as_f64().unwrap().powi(2);
        let norm = |key: &str| {
            let groups = found[key].as_object().unwrap().values();
            groups.map(|of| square(of.get("grad_norm").unwrap_or(of))).sum::<f64>().sqrt()
        };
        let expected = steps[step]["grad_norm"].as_f64().unwrap();
        for key in ["grad_norms", "tensors"] {
            assert!((norm(key) / expected - 1.0).abs() < 1e-4, "{key}: {found}");
        }
        let name = found["update_rms_tensor"].as_str().unwrap();
        assert_eq!(found["tensors"][name]["rms"], found["update_rms_max"]);
    }
}

#[test]
fn a_model_is_trained_measured_shown_and_sampled() {
    let dir = folder();
    let dir = dir.path();
    let out = succeed(
        dir,
        &format!(
            "train --data data --out model --steps 20 --eval-every 10 --eval-batches 0 --log a/log.jsonl \
             --lr 1e-2 --sample-every 10 {TINY}"
        ),
    );
    for part in [
        "1 layers x 32 channels x 2 heads, context 32: 22.0 k parameters, new",
        "recipe mxfp4-rht-sr, optimizer adamw",
        "memory  ",
        "optimizer ",
        "step 10/20  train loss ",
        "step 20/20  train loss ",
        " bits a byte",
        "--- sample at step 20 ---",
        "done: 20 steps",
    ] {
        assert!(out.contains(part), "{part:?} is missing in\n{out}");
    }
    let losses = losses(dir, "a/log.jsonl");
    assert_eq!(losses.len(), 20);
    assert!(losses[19].1 < losses[0].1 - 0.5, "{losses:?}");
    let evals = log(dir, "a/log.jsonl", "eval");
    assert_eq!(evals.keys().copied().collect::<Vec<_>>(), [10, 20]);

    let eval = succeed(dir, "eval --checkpoint model --data data --json");
    let eval: Value = serde_json::from_str(&eval).unwrap();
    assert_eq!(eval["loss"], evals[&20]["loss"]);
    let words =
        succeed(dir, "eval --checkpoint model --data data/val.bin --batch-size 1 --recipe fp32");
    assert!(words.contains("bits a byte, perplexity"), "{words}");
    // By the weights that text is written with, on the same windows.
    let eval = |options: &str| {
        let line = format!("eval --checkpoint model --data data --batches 3 --json {options}");
        let found: Value = serde_json::from_str(&succeed(dir, &line)).unwrap();
        (found["loss"].as_f64().unwrap(), found["tokens"].clone(), found["weights"].clone())
    };
    let [trained, decoded, in_mxfp4] =
        ["--recipe fp32", "--weights f32", "--weights mxfp4"].map(eval);
    assert!((trained.0 - decoded.0).abs() < 1e-5 && trained.1 == decoded.1, "{decoded:?}");
    assert!(trained.2.is_null() && in_mxfp4.2 == "mxfp4", "{in_mxfp4:?}");
    let lost = in_mxfp4.0 - decoded.0;
    assert!(lost != 0.0 && lost.abs() < 0.1, "{in_mxfp4:?}, {decoded:?}");
    let error = refuse(dir, "eval --checkpoint model --data data --weights f32 --recipe bf16");
    assert!(error.contains("cannot be used with"), "{error}");

    let about = info(dir, "model");
    assert_eq!(about["kind"], "checkpoint");
    assert_eq!(about["parameters"], 21984);
    assert_eq!(about["training"]["step"], 20);
    assert_eq!(about["training"]["recipe"], "mxfp4-rht-sr");
    assert_eq!(about["training"]["optimizer"], "adamw");
    assert_eq!(about["tokenizer"], "bytes");
    assert_eq!(about["tensors"].as_array().unwrap().len(), 16);
    let text = succeed(dir, "info model --tensors");
    assert!(text.contains("transformer.wte.weight"), "{text}");

    let greedy = "generate --checkpoint model --prompt the --tokens 40 --greedy";
    let text = succeed(dir, greedy);
    assert!(text.starts_with("the"), "{text}");
    assert_eq!(text, succeed(dir, greedy));
    let wild = |seed| {
        let line = format!("generate --checkpoint model --tokens 40 --temperature 2 --seed {seed}");
        succeed(dir, &line)
    };
    assert_ne!(wild(1), wild(2));
    assert_eq!(wild(3), wild(3));

    // Whoever guesses, it is the same text, and one of two is what it is alone.
    let two = "generate --checkpoint model --prompt abab --tokens 30 --samples 2 --seed 5";
    let plain = succeed(dir, two);
    for draft in ["ngram", "mxfp4", "mxfp4-ngram"] {
        let output = run(dir, &format!("{two} --draft {draft} --draft-tokens 3"));
        assert_eq!(String::from_utf8(output.stdout).unwrap(), plain, "{draft}");
        let note = String::from_utf8(output.stderr).unwrap();
        assert!(note.contains(" guesses right ("), "{draft}: {note}");
    }
    let alone = succeed(dir, &two.replace("--samples 2 --seed 5", "--seed 6"));
    assert!(plain.ends_with(&format!("seed 6 ---\n{alone}")), "{plain}, {alone}");
    let error = refuse(dir, "generate --checkpoint model --draft mxfp4 --weights mxfp4");
    assert!(error.starts_with("--draft: mxfp4 guesses with weights in MXFP4"), "{error}");
    let error = refuse(dir, "generate --checkpoint model --draft ngram --draft-tokens 16");
    assert!(error.contains("--draft-tokens: expected from 1 to 15"), "{error}");

    // A line each, the same as by itself; an empty one begins a new text.
    let mut lines = mxtrain();
    lines.args(["generate", "--checkpoint", "model", "--tokens", "20", "--seed", "5", "--lines"]);
    lines.stdin(Stdio::piped());
    let mut lines = start(dir, &mut lines);
    lines.stdin.take().unwrap().write_all(b"abab\n\nab c").unwrap();
    let output = lines.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let of = |prompt: &str| {
        let line = ["generate", "--checkpoint", "model", "--tokens", "20", "--seed", "5"];
        run_args(dir, line.iter().chain(&["--prompt", prompt])).stdout
    };
    assert_eq!(output.stdout, [of("abab"), of(""), of("ab c")].concat());
    let error = refuse(dir, "generate --checkpoint model --lines --prompt x");
    assert!(error.contains("cannot be used with"), "{error}");
}

#[test]
fn a_model_that_differs_from_gpt2_is_trained_resumed_and_shown() {
    let dir = folder();
    let dir = dir.path();
    let variant = "--mlp-channels 37 --activation gelu --untied-head";
    succeed(dir, &format!("train --data data --out model --steps 4 {TINY} {variant}"));
    let about = info(dir, "model");
    let config = &about["config"];
    assert_eq!(config["n_inner"], 37);
    assert_eq!(config["activation_function"], "gelu");
    assert_eq!(config["tie_word_embeddings"], false);
    let text = succeed(dir, "info model --tensors");
    assert!(text.contains("37 channels in the MLP, activation gelu, a head of its own"), "{text}");
    assert!(text.contains("lm_head.weight"), "{text}");
    // 256 x 32 more for the head, and (128 - 37) x 65 fewer in the MLP.
    assert_eq!(about["parameters"], 21984 + 256 * 32 - 91 * 65);
    let plan = succeed(dir, &format!("plan --data data --json {TINY} {variant}"));
    let plan: Value = serde_json::from_str(&plan).unwrap();
    assert_eq!(plan["parameters"], about["parameters"]);

    // A loaded model is what it is; options that say the same do no harm.
    succeed(dir, "train --resume model --steps 6 --activation gelu --untied-head");
    for options in ["--mlp-channels 38", "--activation gelu_new"] {
        let error = refuse(dir, &format!("train --resume model {options}"));
        assert!(error.contains("leave the option out"), "{error}");
    }
    let error = refuse(dir, "train --data data --out other --mlp-channels 0");
    assert!(error.contains("--mlp-channels: expected a number from 1 on"), "{error}");
    let error = refuse(dir, "train --data data --out other --activation relu");
    assert!(error.contains("expected gelu_new"), "{error}");
    succeed(dir, &format!("train --data data --out tied --steps 1 {TINY}"));
    let error = refuse(dir, "train --resume tied --untied-head");
    assert!(error.contains("--untied-head"), "{error}");
}

/// Folders that others wrote, of weights in several files and under the head's name.
#[test]
fn folders_of_others_are_shown_and_measured() {
    let dir = folder();
    let others = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/huggingface");
    for (name, tensors) in [("sharded", 28), ("head-instead-of-wte", 28), ("untied-head", 29)] {
        let folder = others.join(name).canonicalize().unwrap();
        let about = info(dir.path(), folder.to_str().unwrap());
        assert_eq!(about["tensors"].as_array().unwrap().len(), tensors, "{name}");
        let tokens = others.join("eval.bin").canonicalize().unwrap();
        let eval = format!(
            "eval --checkpoint {} --data {} --recipe fp32 --batches 0 --json",
            folder.display(),
            tokens.display()
        );
        let eval: Value = serde_json::from_str(&succeed(dir.path(), &eval)).unwrap();
        let expected = if name == "untied-head" { 5.85357 } else { 4.37211 };
        let loss = eval["loss"].as_f64().unwrap();
        assert!((loss - expected).abs() < 3e-4, "{name}: {eval}");
    }
}

#[test]
fn info_describes_data() {
    let dir = folder();
    let about = info(dir.path(), "data");
    assert_eq!(about["kind"], "data");
    assert_eq!(about["vocab_size"], 256);
    assert_eq!(about["sources"][0]["path"], "text.txt");
    let file = info(dir.path(), "data/train.bin");
    assert_eq!(file["files"][0], about["files"][0]);
    // The text has letters of two bytes.
    assert_eq!(file["files"][0]["largest_token"], 195);
    assert!(succeed(dir.path(), "info data").contains("tokenizer  bytes, vocabulary 256"));
    assert!(refuse(dir.path(), "info none").contains("cannot open none"));
}

#[test]
fn the_plan_is_what_training_says() {
    let dir = folder();
    let plan = succeed(dir.path(), &format!("plan --data data {TINY}"));
    let memory = plan.lines().find(|line| line.starts_with("memory")).unwrap();
    let train = succeed(dir.path(), &format!("train --data data --steps 1 {TINY}"));
    assert!(train.contains(memory), "{memory}\n{train}");
    assert!(
        plan.lines().any(|line| line.starts_with("limit       ") && line.contains("available"))
    );

    let json = succeed(
        dir.path(),
        "plan --layers 12 --channels 768 --heads 12 --context 1024 \
        --vocab-size 50257 --json",
    );
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["parameters"], 124_439_808);
    let part = |name: &str| json[name].as_u64().unwrap();
    let parts = ["weights", "gradients", "optimizer", "activations", "workspace"].map(part);
    assert_eq!(parts.iter().sum::<u64>(), part("total"));
    assert!(parts[0] >= 4 * part("parameters"));
    assert!(part("limit") >= part("available"));

    // More than any machine of today has.
    let huge = "--layers 200 --channels 16384 --heads 128 --batch-size 64";
    assert!(succeed(dir.path(), &format!("plan {huge}")).contains("; the plan does not fit"));
    let error = refuse(dir.path(), &format!("train --data data --out huge {huge}"));
    assert!(
        error.contains("bytes are needed for") && error.contains("and the limit is"),
        "{error}"
    );
    let smallest =
        "; no batch size fits: 1 with --recompute block --optimizer adamw,moments=int8 takes ";
    assert!(error.contains(smallest), "{error}");
    assert!(!dir.path().join("huge").exists());
}

/// Ctrl-C stops at a step boundary and saves; the resumed run gives the losses of one that was
/// never stopped, bit for bit, and needs no option but --resume and --log.
#[test]
fn a_stopped_run_goes_on_as_if_it_had_not_been() {
    let dir = folder();
    let dir = dir.path();
    let line = format!("--data data --steps 400 --eval-every 100 {TINY}");
    succeed(dir, &format!("train --out whole --log whole.jsonl {line}"));

    let mut child = mxtrain();
    child.args("train --out parts --log parts.jsonl".split(' ')).args(line.split(' '));
    let child = start(dir, &mut child);
    wait_for(|| losses(dir, "parts.jsonl").len() >= 3);
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    let (out, error) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr));
    let (out, error) = (out.unwrap(), error.unwrap());
    assert_eq!(output.status.code(), Some(130), "{out}{error}");
    assert!(
        out.contains("of 400; go on with: mxtrain train --resume parts --log parts.jsonl\n"),
        "{out}"
    );
    assert!(error.contains("mxtrain: stopping; Ctrl-C again ends at once"), "{error}");
    let stopped_at = info(dir, "parts")["training"]["step"].as_u64().unwrap();
    assert!((3..400).contains(&stopped_at));
    assert_eq!(losses(dir, "parts.jsonl").len() as u64, stopped_at);

    // From another folder, on another number of threads.
    fs::create_dir(dir.join("elsewhere")).unwrap();
    let resume = "train --resume ../parts --threads 2 --log ../parts.jsonl";
    let out = succeed(&dir.join("elsewhere"), resume);
    assert!(out.contains(&format!("resumed at step {stopped_at}")), "{out}");
    assert_eq!(losses(dir, "parts.jsonl"), losses(dir, "whole.jsonl"));
    let evals = |name| log(dir, name, "eval").into_iter().map(|(s, o)| (s, o["loss"].clone()));
    assert!(evals("parts.jsonl").eq(evals("whole.jsonl")));
    let weights = |name: &str| fs::read(dir.join(name).join("model.safetensors")).unwrap();
    assert!(weights("parts") == weights("whole"));
}

/// A second Ctrl-C does not wait for the batch.
#[test]
fn the_second_interrupt_ends_at_once() {
    let dir = folder();
    let line = "train --data data --out model --log log.jsonl --steps 9 --layers 16 --channels 256 \
        --batch-size 64 --recompute block --threads 1";
    let mut child = start(dir.path(), mxtrain().args(line.split(' ')));
    wait_for(|| dir.path().join("log.jsonl").exists());
    sleep(Duration::from_millis(300));
    let began = Instant::now();
    interrupt(&child);
    sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "the first one waits for the batch");
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(began.elapsed() < Duration::from_secs(20));
    assert_eq!(info(dir.path(), "model")["training"]["step"], 0);
}

/// What stands in the files is looked at where they are written, and by `dev/check_tensorboard.py`.
/// At the end of a run that is long enough; which steps are spikes is tested where they are found.
#[test]
fn a_run_ends_with_its_spikes() {
    let dir = folder();
    let dir = dir.path();
    let line = format!("train --data data --out model --warmup 20 --steps 260 {TINY}");
    let out = succeed(dir, &line);
    let spikes = out.lines().find(|line| line.starts_with("spikes: ")).unwrap();
    assert!(spikes.contains(" in 40 steps; largest gradient norm "), "{spikes}");
    // What is usual is found anew.
    assert!(!succeed(dir, "train --resume model --steps 270").contains("spikes: "));
}

/// Beside the loss, which stays as it is; and a resumed run goes on with it.
#[test]
fn evaluations_say_how_sharp_the_loss_is() {
    let dir = folder();
    let dir = dir.path();
    let line = format!("train --data data --out model --steps 2 --log log.jsonl {TINY}");
    let out = succeed(dir, &format!("{line} --sharpness --tensorboard runs"));
    assert!(
        out.contains("  sharpness ") && out.contains(" at last tokens, epsilon 0.001)"),
        "{out}"
    );
    let found = log(dir, "log.jsonl", "eval")[&2].clone();
    let number = |value: &Value, name: &str| value[name].as_f64().unwrap();
    assert_eq!(found["sharpness_epsilon"], 0.001);
    // Logits are small as yet, so that every loss can rise by about 2 epsilon.
    for name in ["sharpness", "sharpness_last"] {
        assert!((0.01..0.2).contains(&number(&found, name)), "{found}");
    }
    assert!((0.0..2.0).contains(&number(&found, "logit_amax")), "{found}");
    let events = fs::read_dir(dir.join("runs")).unwrap().next().unwrap().unwrap().path();
    let tag = b"validation/sharpness";
    assert!(fs::read(events).unwrap().windows(tag.len()).any(|part| part == tag));
    succeed(dir, "train --resume model --steps 3 --log log.jsonl");
    assert_eq!(log(dir, "log.jsonl", "eval")[&3]["sharpness_epsilon"], 0.001);

    let eval = |options: &str| {
        let line = format!("eval --checkpoint model --data data --threads 1 --json {options}");
        serde_json::from_str::<Value>(&succeed(dir, &line)).unwrap()
    };
    let plain = eval("");
    assert!(plain.get("sharpness").is_none(), "{plain}");
    let [sharp, sharper] = ["--sharpness", "--sharpness 2e-3"].map(eval);
    assert_eq!((&sharp["loss"], &sharp["tokens"]), (&plain["loss"], &plain["tokens"]));
    let ratio = number(&sharper, "sharpness") / number(&sharp, "sharpness");
    assert!((ratio - 2.0).abs() < 0.02, "{sharp} {sharper}");
    let words = succeed(dir, "eval --checkpoint model --data data --sharpness=0.01");
    assert!(words.lines().nth(1).unwrap().starts_with("sharpness "), "{words}");
    assert!(words.contains("epsilon 0.01), largest logits "), "{words}");
    let error = refuse(dir, "eval --checkpoint model --data data --sharpness 0");
    assert_eq!(error, "--sharpness: expected a number from above 0 to 1, got 0");
}

/// Of each kind of recomputation the largest batch: one sequence more does not fit.
#[test]
fn the_largest_batches_that_fit_are_planned_and_said() {
    let dir = folder();
    let dir = dir.path();
    let json = |line: &str| serde_json::from_str::<Value>(&succeed(dir, line)).unwrap();
    let plan = "plan --data data --device cpu --threads 1 --json";
    let found = json(&format!("{plan} --fit 300MB --batch-size 4"));
    let fit = &found["fit"];
    assert_eq!(fit["bytes"], 300_000_000);
    let total = |size: u64, recompute: &str| {
        let plan = json(&format!("{plan} --batch-size {size} --recompute {recompute}"));
        plan["total"].as_u64().unwrap()
    };
    let mut sizes = Vec::new();
    for (setting, name) in
        fit["settings"].as_array().unwrap().iter().zip(["nothing", "pointwise", "block"])
    {
        assert_eq!((&setting["recompute"], &setting["optimizer"]), (&name.into(), &"adamw".into()));
        let size = setting["batch_size"].as_u64().unwrap();
        assert_eq!(setting["total"], total(size, name));
        assert!(total(size, name) <= 300_000_000 && total(size + 1, name) > 300_000_000);
        sizes.push(size);
    }
    assert!(sizes[0] >= 4 && sizes[0] < sizes[1] && sizes[1] < sizes[2], "{sizes:?}");
    assert_eq!(found["recommended"], fit["settings"][0]);
    let words = succeed(
        dir,
        &format!("plan --data data --device cpu --fit 300MB --batch-size {}", sizes[2]),
    );
    let expected = format!("use         --batch-size {} --recompute block\n", sizes[2]);
    assert!(words.ends_with(&expected), "{words}");
    let words = succeed(dir, "plan --data data --fit 300MB --optimizer adamw,moments=int8");
    assert!(words.ends_with(" --recompute nothing --optimizer adamw,moments=int8\n"), "{words}");
    let words = succeed(dir, "plan --data data --device cpu --fit 1KiB");
    assert!(words.contains("fit         no batch size fits: 1 with --recompute "), "{words}");
    assert!(json(&format!("{plan} --fit 1024"))["recommended"].is_null());

    // A run that is too large for the machine says what it could be.
    let error = refuse(dir, "train --data data --out model --device cpu --batch-size 1048576");
    let words = error.rsplit_once("; batch size ").expect("it says so").1;
    let (fits, rest) = words.split_once(" fits, ").unwrap();
    let (most, rest) = rest.split_once(" with --recompute block, or ").unwrap();
    assert!(rest.contains(" with --recompute block --optimizer adamw,moments=int8"), "{error}");
    let limit = json(plan)["limit"].as_u64().unwrap();
    for (size, recompute) in [(fits, "nothing"), (most, "block")] {
        let size: u64 = size.parse().unwrap();
        assert!(total(size, recompute) <= limit && total(size + 1, recompute) > limit, "{error}");
    }
}

#[test]
fn a_run_writes_for_tensorboard_and_goes_on_in_the_same_folder() {
    let dir = folder();
    let dir = dir.path();
    let line = format!("train --data data --out model --steps 3 --tensorboard runs/a {TINY}");
    let error = refuse(dir, &line.replace("runs/a", "text.txt"));
    assert!(error.starts_with("--tensorboard: cannot make an event file in text.txt"), "{error}");
    assert!(!dir.join("model").exists());
    succeed(dir, &line);
    let files = || {
        let files = fs::read_dir(dir.join("runs/a")).unwrap().map(|entry| entry.unwrap().path());
        files.map(|path| fs::read(path).unwrap()).collect::<Vec<_>>()
    };
    let count = |tag: &str| {
        let tag = tag.as_bytes();
        files().iter().flat_map(|file| file.windows(tag.len())).filter(|part| *part == tag).count()
    };
    assert_eq!((files().len(), count("train/loss"), count("validation/loss")), (1, 3, 1));
    // Where else to write is not for a checkpoint to say.
    let out = succeed(dir, "train --resume model --steps 4");
    assert!(out.contains("left out    --tensorboard /"), "{out}");
    assert_eq!(files().len(), 1);
    succeed(dir, "train --resume model --steps 6 --tensorboard runs/a");
    assert_eq!((files().len(), count("train/loss"), count("validation/loss")), (2, 5, 2));
}

#[test]
fn a_run_is_kept_from_accidents() {
    let dir = folder();
    let dir = dir.path();
    let begin = format!("train --data data --out model --steps 3 --seed 5 {TINY}");
    succeed(dir, &begin);
    for (line, expected) in [
        (begin.as_str(), "model already holds a checkpoint; go on with it (--resume model)"),
        ("train --resume model", "the run has done 3 steps, expected more than that; got 3"),
        ("train --resume model --steps 5 --lr 1", "a resumed run keeps what it was started with"),
        ("train --resume model --steps 5 --seed 6", "a resumed run keeps"),
        ("train --resume model --steps 5 --layers 2", "the checkpoint of --resume has 1, got 2"),
        ("train --resume model --init-from model", "exclude each other"),
        ("train --data data --out b --init-from model --heads 4", "has 2, got 4"),
        ("train --data data --out b --init-from data", "config.json"),
        ("train --data data --out b --resume none", "none"),
        ("train --data data --out b --sequence-length 999", "--sequence-length: "),
        ("train --data data --out b --device tpu", "--device: "),
        ("train --data data --out text.txt", "text.txt"),
        ("generate --checkpoint model --tokenizer gpt2", "gpt2 has 50257 tokens"),
        ("generate --checkpoint none", "none"),
        ("generate --checkpoint model --prompt x --top-p 0", "--top-p: expected a number above 0"),
        ("eval --checkpoint none --data data", "none"),
        ("eval --checkpoint model --data none.bin", "none.bin"),
    ] {
        let error = refuse(dir, line);
        assert!(error.contains(expected), "{line}: {error}");
    }
    assert_eq!(info(dir, "model")["training"]["step"], 3);
    assert!(!dir.join("b").exists());

    // The same setting said again, and more steps, are no accident.
    succeed(dir, "train --resume model --steps 5 --lr 1e-3 --batch-size 2 --seed 5");
    assert_eq!(info(dir, "model")["training"]["step"], 5);
    // Weights alone start a new run.
    let options = "--batch-size 2 --threads 1 --recipe bf16 --steps 2";
    let out = succeed(dir, &format!("train --data data --out b --init-from model {options}"));
    assert!(out.contains("loaded weights"), "{out}");
    succeed(dir, &format!("{begin} --overwrite"));
    assert_eq!(info(dir, "model")["training"]["step"], 3);
}

#[test]
fn options_come_from_a_file_and_the_command_line_wins() {
    let dir = folder();
    let toml = "data = \"data\"\nout = \"model\"\nlog = \"log.jsonl\"\nsteps = 9\nlayers = 1\nheads = 2\n\
        channels = 32\ncontext = 32\nbatch-size = 2\nthreads = 1\n\
        recipe = \"mxfp4-rht,range=3/4\"\nlr = 0.5\n";
    fs::write(dir.path().join("run.toml"), toml).unwrap();
    succeed(dir.path(), "train --config run.toml --steps 3 --lr 1e-3");
    let log = log(dir.path(), "log.jsonl", "step");
    assert_eq!(log.len(), 3);
    assert!(log[&1]["lr"].as_f64().unwrap() <= 1e-3);
    assert_eq!(info(dir.path(), "model")["training"]["recipe"], "mxfp4-rht,range=3/4");
    // The file of a run serves to resume it, and to plan it.
    let error = refuse(dir.path(), "train --config run.toml --resume model");
    assert!(error.contains("--lr: a resumed run keeps what it was started with, 0.001; got 0.5"));
    succeed(dir.path(), "train --config run.toml --resume model --lr 1e-3");
    assert_eq!(info(dir.path(), "model")["training"]["step"], 9);
    assert!(succeed(dir.path(), "plan --config run.toml").contains("22.0 k"));
}

#[test]
fn token_files_of_others_can_be_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let raw = |range: std::ops::Range<u16>| -> Vec<u8> {
        range.flat_map(|i| (i * 7 % 50).to_le_bytes()).collect()
    };
    fs::write(dir.join("part-1.bin"), raw(0..500)).unwrap();
    fs::write(dir.join("part-2.bin"), raw(500..900)).unwrap();
    fs::write(dir.join("held-out.bin"), raw(900..1000)).unwrap();
    let line = format!("train --train part-*.bin --val held-out.bin --steps 2 {TINY}");
    assert!(refuse(dir, &line).starts_with("--vocab-size N is missing"));
    let error = refuse(dir, &format!("{line} --vocab-size 40 --steps 30"));
    assert!(error.contains(".bin: token 4") && error.contains("outside the vocabulary of 40"));
    let out = succeed(dir, &format!("{line} --vocab-size 50 --overwrite"));
    assert!(out.contains("900 tokens, 100 for validation, vocabulary 50"), "{out}");
    assert!(!out.contains("bits a byte"), "{out}");
    let error = refuse(dir, "generate --checkpoint checkpoint");
    assert!(error.starts_with("--tokenizer is missing"), "{error}");
}

/// A run that blows up ends with exit code 1 and what to do, and leaves the last good checkpoint.
#[test]
fn a_loss_that_is_not_finite_ends_the_run() {
    let dir = folder();
    let line = format!(
        "train --data data --out model --log log.jsonl --steps 50 --warmup 0 --lr 1e30 {TINY}"
    );
    let output = run(dir.path(), &line);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    let last = error.lines().last().unwrap();
    assert!(last.starts_with("mxtrain: ") && last.contains("a lower --lr"), "{error}");
    // What was saved last stays, and the state before the step that failed is beside it.
    assert_eq!(info(dir.path(), "model")["training"]["step"], 0);
    let done = losses(dir.path(), "log.jsonl").len() as u64;
    assert!((1..50).contains(&done), "{error}");
    let apart = format!("model.step-{done}");
    assert_eq!(info(dir.path(), &apart)["training"]["step"], done);
    assert!(
        last.contains(&format!("{apart} holds step {done}; go on from an earlier step")),
        "{error}"
    );
    assert!(error.contains("warning: model holds step 0, as what is behind it"), "{error}");
}

/// Weights may be finite and too large to evaluate: the run is done and saved, and says that.
#[test]
fn a_validation_loss_that_is_not_finite_is_lost_on_the_side() {
    let dir = folder();
    let line = format!(
        "train --data data --out model --log log.jsonl --steps 1 --warmup 0 --lr 1e30 {TINY}"
    );
    let output = run(dir.path(), &line);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{error}");
    assert!(error.contains("an evaluation failed: the validation loss is not finite"), "{error}");
    assert!(error.contains("the run is done and saved in model, but: "), "{error}");
    assert_eq!(info(dir.path(), "model")["training"]["step"], 1);
}

fn rates(dir: &Path, name: &str) -> Vec<f64> {
    let steps = log(dir, name, "step");
    steps.values().map(|step| step["lr"].as_f64().unwrap()).collect()
}

/// Steps beyond the schedule are told, and a new schedule is taken on purpose only. A run with one
/// goes on bit for bit, too.
#[test]
fn a_resumed_run_can_have_a_new_schedule() {
    let dir = folder();
    let dir = dir.path();
    let first =
        format!("train --data data --out model --steps 10 --lr 1e-2 {TINY} --log log.jsonl");
    succeed(dir, &first);
    assert!(refuse(dir, "train --data data --out b --new-schedule").contains("goes with --resume"));
    let error = refuse(dir, "train --resume model --steps 20 --lr 2e-3");
    assert!(error.contains("leave the option out, add --new-schedule, or start"), "{error}");

    let out = succeed(dir, "train --resume model --steps 12 --log log.jsonl");
    let told = "schedule    ended at step 10: steps beyond use lr 1.00e-3 (its lowest); \
        --new-schedule starts a new one\n";
    assert!(out.contains(told), "{out}");
    let near = |rate: f64, expected: f64| (rate - expected).abs() < 1e-9;
    assert!(rates(dir, "log.jsonl")[10..].iter().all(|rate| near(*rate, 1e-3)));

    // Eight steps from step 12 on: up in two, then down in a line.
    let new = "train --resume model --out new --new-schedule --steps 20 --lr 4e-3 --min-lr 1e-3 \
        --warmup 2 --schedule linear --log new.jsonl";
    let out = succeed(dir, new);
    assert!(
        out.contains("linear schedule from step 12 on, lr 4.00e-3 to 1.00e-3, warm-up 2"),
        "{out}"
    );
    assert!(!out.contains("steps beyond"), "{out}");
    let expected = [2e-3, 4e-3, 4e-3, 3.5e-3, 3e-3, 2.5e-3, 2e-3, 1.5e-3];
    for (rate, expected) in rates(dir, "new.jsonl").into_iter().zip(expected) {
        assert!(near(rate, expected), "{rate}, expected {expected}");
    }

    // The same in two parts, the second of which knows the schedule from the checkpoint.
    let mut child = mxtrain();
    let long =
        "train --resume model --out NAME --new-schedule --steps 300 --lr 4e-3 --log NAME.jsonl";
    succeed(dir, &long.replace("NAME", "whole"));
    child.args(long.replace("NAME", "parts").split(' '));
    let child = start(dir, &mut child);
    wait_for(|| losses(dir, "parts.jsonl").len() >= 3);
    interrupt(&child);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    succeed(dir, "train --resume parts --log parts.jsonl");
    assert_eq!(losses(dir, "parts.jsonl"), losses(dir, "whole.jsonl"));
    assert_eq!(rates(dir, "parts.jsonl"), rates(dir, "whole.jsonl"));
    let out = succeed(dir, "train --resume parts --steps 301");
    assert!(out.contains("schedule    ended at step 300: steps beyond use lr 4.00e-4"), "{out}");
}

#[test]
fn loaded_weights_are_trained_at_a_lower_rate() {
    let dir = folder();
    let dir = dir.path();
    let out = succeed(dir, &format!("train --data data --out model --steps 100 {TINY}"));
    assert!(out.contains("cosine schedule, lr 1.00e-3 to 1.00e-4, warm-up 2 steps"), "{out}");
    let tuned =
        "train --data data --out tuned --init-from model --steps 100 --batch-size 2 --threads 1";
    let out = succeed(dir, tuned);
    assert!(out.contains("cosine schedule, lr 5.00e-5 to 5.00e-6, warm-up 5 steps"), "{out}");
    assert!(succeed(dir, "train --help").contains("[default: 1e-3; 5e-5 with --init-from]"));
}

/// A seed that the system draws is said, kept, and gives the same run again.
#[test]
fn a_random_seed_is_said_and_kept() {
    let dir = folder();
    let dir = dir.path();
    let train = |seed: &str, name: &str| {
        let options = format!("--steps 2 --log {name}.jsonl --seed {seed}");
        succeed(dir, &format!("train --data data --out {name} {options} {TINY}"))
    };
    let seed_of = |out: &str| {
        let rest = out.split_once("; seed ").unwrap_or_else(|| panic!("no seed in {out}")).1;
        rest.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let [first, second] = ["a", "b"].map(|name| seed_of(&train("random", name)));
    assert_ne!(first, second);
    assert_eq!(seed_of(&train(&first.to_string(), "again")), first);
    assert_eq!(losses(dir, "again.jsonl"), losses(dir, "a.jsonl"));
    succeed(dir, "train --resume a --steps 3");
    assert_eq!(info(dir, "a")["training"]["seed"], first);
}

/// Somebody has changed the file that says how to go on: that is shown, and by whom it is refused.
#[test]
fn what_cannot_be_resumed_is_shown_as_such() {
    let dir = folder();
    let dir = dir.path();
    succeed(dir, &format!("train --data data --out model --steps 2 --eval-every 0 {TINY}"));
    assert!(!succeed(dir, "info model").contains("cannot be resumed"));
    let path = dir.join("model/trainer.json");
    let text = fs::read_to_string(&path).unwrap().replace("mxfp4-rht-sr", "mxfp4-rht");
    fs::write(&path, text).unwrap();
    let out = succeed(dir, "info model");
    assert!(out.contains("cannot be resumed: ") && out.contains("trainer.json"), "{out}");
    assert!(info(dir, "model")["cannot_resume"].is_string());
    refuse(dir, "train --resume model --data data --steps 4");
}
