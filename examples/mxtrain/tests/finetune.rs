//! Teaching a small model answers with the built program.

mod common;

use std::fs;
use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use common::{refuse, run_args, succeed};

const PLACES: [(&str, &str); 6] = [
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Japan", "Tokyo"),
    ("Egypt", "Cairo"),
    ("Peru", "Lima"),
    ("Norway", "Oslo"),
];

/// A folder with a model of bytes in `base`, and examples.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("text.txt"), include_str!("../../../tests/text/prose.txt")).unwrap();
    succeed(dir.path(), "prepare text.txt --out data");
    succeed(
        dir.path(),
        "train --data data --out base --steps 20 --layers 2 --heads 2 --channels 64 --context 64 \
         --batch-size 4 --threads 1 --eval-batches 1",
    );
    let line = |(place, capital): (&str, &str)| {
        format!("{{\"prompt\": \"The capital of {place} is?\", \"answer\": \"{capital}\"}}\n")
    };
    let text: String = PLACES.into_iter().map(line).collect();
    fs::write(dir.path().join("capitals.jsonl"), text).unwrap();
    dir
}

fn steps(dir: &Path, name: &str) -> Vec<(u64, f64)> {
    let text = fs::read_to_string(dir.join(name)).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let number = |row: &Value| (row["step"].as_u64().unwrap(), row["loss"].as_f64().unwrap());
    rows.filter(|row| row["type"] == "step").map(|row| number(&row)).collect()
}

/// The model answers what it was taught, in as much as it was asked; a run that stops goes on with
/// nothing but its folder, to the bit, and so does one of two processes.
#[test]
fn answers_are_learned_and_given() {
    let dir = folder();
    let dir = dir.path();
    let settings = "--init-from base --examples capitals.jsonl --lr 3e-3 --threads 1 \
                    --val-examples capitals.jsonl --eval-every 60 --batch-size 6";
    let out = succeed(dir, &format!("finetune {settings} --out tuned --steps 120 --log a.jsonl"));
    let data = "data        capitals.jsonl: 6 examples of 184 tokens, of which 33 are learned, 6 \
                examples for validation, tokenizer bytes";
    assert!(out.contains(data), "{out}");
    // The longest is 32 tokens, of which the last is only predicted.
    assert!(out.contains(" x 6 x 32 = "), "{out}");
    assert!(out.contains("120.00 passes over the data"), "{out}");
    for (place, capital) in PLACES {
        let prompt = format!("The capital of {place} is?\n");
        let output = run_args(
            dir,
            ["generate", "--checkpoint", "tuned", "--prompt", &prompt, "--greedy", "--stop", "\n"],
        );
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(capital), "{place}: {text}");
    }

    // Stopped after 60 of 120 steps.
    succeed(dir, &format!("train {settings} --out half --steps 120 --log b.jsonl --save-every 60"));
    let whole = steps(dir, "a.jsonl");
    assert_eq!(whole, steps(dir, "b.jsonl"), "finetune is train of examples");
    succeed(dir, "train --resume half --steps 125 --log c.jsonl");
    assert_eq!(steps(dir, "c.jsonl").len(), 5);
    let two = format!("finetune {settings} --out two --steps 5 --accumulation 2 --lanes 2");
    succeed(dir, &format!("{two} --log d.jsonl"));
    succeed(dir, &format!("{two} --ranks 2 --log e.jsonl --overwrite"));
    assert_eq!(steps(dir, "d.jsonl"), steps(dir, "e.jsonl"));
}

/// Adapters learn the answers beside weights that stay; they go on from a checkpoint, are merged by
/// an export, and are written alone.
#[test]
fn adapters_learn_answers() {
    let dir = folder();
    let dir = dir.path();
    let settings = "--init-from base --examples capitals.jsonl --lora 8 --lr 1e-2 --threads 1 \
                    --batch-size 6";
    let out = succeed(dir, &format!("finetune {settings} --out tuned --steps 150 --log a.jsonl"));
    assert!(out.contains("with adapters of rank 8, alpha 16, beside all linear layers"), "{out}");
    let info = succeed(dir, "info tuned");
    assert!(info.contains("adapters of rank 8, alpha 16"), "{info}");
    succeed(dir, "export tuned merged --weights f32");
    let answers = |folder: &str| {
        PLACES.map(|(place, _)| {
            let prompt = format!("The capital of {place} is?\n");
            let line = ["generate", "--checkpoint", folder, "--prompt", &prompt, "--greedy"];
            String::from_utf8(run_args(dir, [&line[..], &["--stop", "\n"]].concat()).stdout)
                .unwrap()
        })
    };
    let tuned = answers("tuned");
    for ((place, capital), text) in PLACES.iter().zip(&tuned) {
        assert!(text.contains(capital), "{place}: {text}");
    }
    assert_eq!(answers("merged"), tuned);
    assert!(!succeed(dir, "info merged").contains("adapters"));

    let out = succeed(dir, "export tuned adapters --format peft");
    assert!(out.contains("adapters: adapters of rank 8"), "{out}");
    let text = fs::read_to_string(dir.join("adapters/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&config["r"], &config["peft_type"]), (&Value::from(8), &Value::from("LORA")));
    succeed(dir, "export tuned adapters --format peft --overwrite");
    succeed(dir, "export base again --lora adapters --weights f32");
    assert_eq!(answers("again"), tuned);
    let error = refuse(dir, "generate --checkpoint adapters");
    assert!(error.contains("mxtrain export MODEL MERGED --lora adapters"), "{error}");

    // Two runs of one, and of two processes.
    let run = |steps: u64, more: &str| {
        succeed(dir, &format!("finetune {settings} --steps {steps} --overwrite {more}"));
    };
    run(3, "--out half --schedule constant --warmup 0 --accumulation 2");
    succeed(dir, "train --resume half --steps 6 --log b.jsonl");
    run(6, "--out whole --schedule constant --warmup 0 --accumulation 2 --log c.jsonl");
    run(
        6,
        "--out two --schedule constant --warmup 0 --accumulation 2 --ranks 2 --log d.jsonl \
            --lanes 2 --threads 2",
    );
    assert_eq!(steps(dir, "b.jsonl"), steps(dir, "c.jsonl")[3..]);
    assert_eq!(steps(dir, "d.jsonl").len(), 6);
    let out = succeed(dir, "plan --lora 8 --json");
    let of =
        |text: &str| serde_json::from_str::<Value>(text).unwrap()["optimizer"].as_u64().unwrap();
    assert!(of(&out) < of(&succeed(dir, "plan --json")) / 4);

    for (line, words) in [
        ("train --data data --lora 8 --steps 1", "name those with --init-from"),
        (
            "train --data data --init-from base --lora 0 --steps 1",
            "--lora: expected a number from 1",
        ),
        (
            "train --data data --init-from base --lora 8 --lora-layers c_attn --steps 1",
            "attn.c_attn",
        ),
        (
            "train --data data --init-from base --lora-alpha 8 --steps 1",
            "--lora-alpha: goes with --lora RANK",
        ),
        (
            "train --data data --init-from base --lora 8 --lora-alpha=-1 --steps 1",
            "--lora-alpha: expected a number above 0",
        ),
        ("train --data data --init-from tuned --lora 8 --steps 1", "has adapters"),
        ("train --resume tuned --lora 4 --steps 200", "adapters of rank 8"),
        ("export base out --format peft", "has no adapters"),
        ("export base out --lora nowhere", "--lora"),
        ("export tuned out --lora adapters", "the model has adapters"),
        ("export tuned base --format peft", "holds a model"),
        ("export tuned adapters --format peft", "--overwrite"),
    ] {
        let error = refuse(dir, line);
        assert!(error.contains(words), "{line}: {error}");
    }
}

#[test]
fn frozen_tensors_stay() {
    let dir = folder();
    let dir = dir.path();
    let run =
        "train --data data --init-from base --steps 2 --threads 1 --eval-batches 1 --out frozen";
    let out = succeed(dir, &format!("{run} --freeze transformer.w*,*.ln_?.*"));
    assert!(out.contains("frozen transformer.w*,*.ln_?.*"), "{out}");
    assert!(succeed(dir, "info frozen").contains("frozen transformer.w*,*.ln_?.*"));
    succeed(dir, "train --resume frozen --steps 3");
    for (line, words) in [
        ("train --resume frozen --steps 4 --freeze *.bias", "--freeze: a resumed run keeps"),
        ("train --data data --freeze no.such --steps 1", "no tensor is named like \"no.such\""),
        ("train --data data --freeze [ --steps 1", "pattern"),
    ] {
        let error = refuse(dir, line);
        assert!(error.contains(words), "{line}: {error}");
    }
}

#[test]
fn what_cannot_be_finetuned_is_named() {
    let dir = folder();
    let dir = dir.path();
    fs::write(dir.join("other.jsonl"), "{\"question\": \"a\", \"reply\": \"b\"}\n").unwrap();
    for (line, words) in [
        ("finetune --examples capitals.jsonl --steps 1", "--init-from DIR is missing"),
        ("finetune --init-from base --steps 1", "--examples FILE is missing"),
        ("finetune --init-from base --examples nowhere.jsonl --steps 1", "nowhere.jsonl"),
        ("finetune --init-from base --examples text.txt --steps 1", "expected JSON objects"),
        (
            "finetune --init-from base --examples other.jsonl --steps 1",
            "found question, reply; name others with --prompt-field",
        ),
        (
            "finetune --init-from base --examples capitals.jsonl --data data --steps 1",
            "--data and --examples exclude each other",
        ),
        ("train --data data --val-examples capitals.jsonl --steps 1", "--val-examples goes with"),
        ("train --examples capitals.jsonl --steps 1", "--tokenizer is missing"),
        ("finetune --init-from base --examples capitals.jsonl --tokenizer gpt2 --steps 1", "50257"),
    ] {
        let error = refuse(dir, line);
        assert!(error.contains(words), "{line}: {error}");
    }
    // Too long for its windows.
    let out = succeed(
        dir,
        "finetune --init-from base --examples capitals.jsonl --sequence-length 16 --steps 1 \
         --out short --threads 1",
    );
    let note = "6 of 6 examples are longer than 17 tokens (the longest has 32): there the prompt";
    assert!(out.contains(note), "{out}");
    // For validation alone, and of a model that sees no more.
    let long = "x".repeat(100);
    fs::write(dir.join("long.jsonl"), format!("{{\"prompt\": \"{long}\", \"answer\": \"b\"}}\n"))
        .unwrap();
    let out = succeed(
        dir,
        "finetune --init-from base --examples capitals.jsonl --val-examples long.jsonl --steps 1 \
         --out long --threads 1",
    );
    let note = "validation: 1 of 1 examples are longer than 65 tokens (the longest has 103)";
    assert!(out.contains(note) && out.contains(", since the model sees no more"), "{out}");
    // By other fields.
    succeed(
        dir,
        "finetune --init-from base --examples other.jsonl --prompt-field question \
         --answer-field reply --between => --steps 1 --out fields --threads 1",
    );
    succeed(dir, "train --resume fields --steps 2");
}

/// Examples that share a sequence are learned as those that have one each: of all of them at once, the
/// first step has the same loss and gradient.
#[test]
fn packed_examples_are_as_if_each_were_alone() {
    let dir = folder();
    let dir = dir.path();
    let settings = "finetune --init-from base --examples capitals.jsonl --lr 1e-3 --threads 1 \
                    --recipe fp32 --val-examples capitals.jsonl --eval-every 2 --steps 4";
    succeed(dir, &format!("{settings} --batch-size 6 --out alone --log alone.jsonl"));
    let packed = format!("{settings} --batch-size 3 --document-mask");
    let out = succeed(dir, &format!("{packed} --out packed --log packed.jsonl"));
    // Two of at most 32 tokens each in 65.
    assert!(out.contains("33 are learned and packed into 3 sequences, 6 examples for"), "{out}");
    assert!(out.contains(" x 3 x 64 = ") && out.contains("4.00 passes over the data"), "{out}");
    let rows = |name: &str| -> Vec<Value> {
        let text = fs::read_to_string(dir.join(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let numbers = |name: &str, kind: &str, field: &str| -> Vec<f64> {
        let of_kind = rows(name).into_iter().filter(|row| row["type"] == kind);
        of_kind.map(|row| row[field].as_f64().unwrap()).collect()
    };
    for (kind, field) in [("step", "loss"), ("step", "grad_norm"), ("eval", "loss")] {
        let [alone, packed] =
            ["alone.jsonl", "packed.jsonl"].map(|name| numbers(name, kind, field));
        assert!(!alone.is_empty() && alone.len() == packed.len(), "{kind} {field}");
        for (a, b) in alone.iter().zip(&packed) {
            assert!((a - b).abs() <= 2e-4 * a.abs(), "{kind} {field}: {alone:?} {packed:?}");
        }
    }
    // Without the mask in what is saved a resumed run would go on with other sequences.
    succeed(dir, &format!("{packed} --steps 2 --out half"));
    let error = refuse(dir, "train --resume half --steps 4 --document-mask=false");
    assert!(error.contains("--document-mask: a resumed run keeps"), "{error}");
    succeed(dir, "train --resume half --steps 4 --log half.jsonl");
    let [whole, rest] = ["packed.jsonl", "half.jsonl"].map(|name| numbers(name, "step", "tokens"));
    assert_eq!(whole[..2], rest[..]);
    let two = format!("{packed} --accumulation 2 --lanes 2 --steps 3");
    succeed(dir, &format!("{two} --out one --log one.jsonl"));
    succeed(dir, &format!("{two} --ranks 2 --out two --log two.jsonl"));
    assert_eq!(steps(dir, "one.jsonl"), steps(dir, "two.jsonl"));
}
