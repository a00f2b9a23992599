//! Comparing recipes with the built program: records, statistics of gradients, and the report.

mod common;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use common::{end, interrupt, mxtrain, refuse, run, start, succeed, wait_for};

/// A model that takes a step in about a millisecond.
const TINY: &str = "--layers 2 --heads 2 --channels 32 --context 32 --batch-size 4 --threads 1";

/// A folder with prepared text in `data`.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("text.txt"), include_str!("../../../tests/text/prose.txt")).unwrap();
    succeed(dir.path(), "prepare text.txt --out data");
    dir
}

fn read(dir: &Path, name: &str) -> Value {
    let path = dir.join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Panics unless every tag of an SVG is closed, in order.
fn well_formed(svg: &str) {
    let mut open = Vec::new();
    for tag in svg.split('<').skip(1) {
        let (tag, text) = tag.split_once('>').expect("a tag ends");
        assert!(!text.contains('&') || text.contains(';'), "{text}");
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap();
        match (tag.starts_with('/'), tag.ends_with('/')) {
            (true, _) => assert_eq!(open.pop(), Some(name)),
            (false, false) => open.push(name),
            (false, true) => {}
        }
    }
    assert!(svg.starts_with("<svg ") && open.is_empty(), "{open:?} stay open");
}

#[test]
fn a_name_that_is_no_text_loses_no_record() {
    let dir = tempfile::tempdir().unwrap();
    let out = OsStr::from_bytes(b"f\xfcr.json");
    let mut command = mxtrain();
    command.args("compare variance --lengths 32 --groups 32 --inputs 2 --draws 2".split(' '));
    let output = command.arg("--out").arg(out).current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let record: Value = serde_json::from_slice(&fs::read(dir.path().join(out)).unwrap()).unwrap();
    assert_eq!(record["origin"]["command"].as_array().unwrap().last().unwrap(), "f\u{fffd}r.json");
}

#[test]
fn runs_are_recorded_once_and_reported() {
    let dir = folder();
    let dir = dir.path();
    let line = format!(
        "compare train --data data --out runs --recipe bf16 --recipe mxfp4-rht-sr,g=32 --seeds 1,2 \
         --steps 20 --eval-every 1 --eval-batches 2 {TINY}"
    );
    let out = succeed(dir, &line);
    for part in
        ["run 4 of 4: mxfp4-rht-sr,g=32, seed 2", "step 20/20  train loss", "done: train loss"]
    {
        assert!(out.contains(part), "{part:?} is missing in\n{out}");
    }
    let names = ["bf16-seed1", "bf16-seed2", "mxfp4-rht-sr,g=32-seed1", "mxfp4-rht-sr,g=32-seed2"];
    let files = names.map(|name| format!("runs/{name}.json"));
    let runs = files.each_ref().map(|file| read(dir, file));
    for run in &runs {
        assert_eq!((&run["kind"], &run["version"]), (&json!("run"), &json!(1)));
        assert!(run["origin"]["machine"].as_str().unwrap().starts_with("device "), "{run}");
        assert_eq!(run["curve"].as_array().unwrap().len(), 20);
        assert_eq!(run["curve"][19]["tokens"], 20 * 4 * 32);
        assert_eq!(run["validation_loss"], run["curve"][19]["validation_loss"]);
        // The forward pass of both recipes is in bf16.
        assert_eq!(run["validation_loss_in_bf16"], run["validation_loss"]);
        assert_eq!(run["settings"]["warmup"], 0);
        assert_eq!(run["settings"]["data"]["name"], "data");
        assert!(number(&run["tokens_per_second"]) > 0.0);
    }
    // One seed: one beginning, then the recipe shows. Another seed: another beginning.
    let loss = |run: usize, point: usize| number(&runs[run]["curve"][point]["train_loss"]);
    assert_eq!((loss(0, 0), loss(1, 0)), (loss(2, 0), loss(3, 0)));
    assert_ne!(loss(0, 0), loss(1, 0));
    assert_ne!(loss(0, 19), loss(2, 19));
    assert_eq!(runs[0]["quantized_blocks"], 0);
    assert!(runs[2]["quantized_blocks"].as_u64().unwrap() > 0);

    // What is there is not run again.
    let before = files.each_ref().map(|file| fs::read(dir.join(file)).unwrap());
    let out = succeed(dir, &line);
    assert_eq!(out.matches("is there").count(), 4, "{out}");
    assert_eq!(files.each_ref().map(|file| fs::read(dir.join(file)).unwrap()), before);
    let error = refuse(dir, &format!("{line} --lr 0.01"));
    assert!(error.starts_with("--lr: runs"), "{error}");
    assert!(error.contains("was made with 0.001, got 0.01; say the same"), "{error}");
    let error = refuse(dir, &format!("{line} --save-at 1"));
    assert!(error.contains("models/bf16-seed1-step20; leave the option out"), "{error}");
    let error = refuse(dir, &format!("{line} --recipe bf16"));
    assert!(error.contains("bf16 with seed 1 comes twice"), "{error}");

    // Numbers that no run has are no reason to fall over.
    let mut large = runs[0].clone();
    for name in ["layers", "channels", "batch_size", "sequence_length", "accumulation", "steps"] {
        large["settings"][name] = json!(u64::MAX);
    }
    large["curve"][19]["step"] = json!(u64::MAX);
    large["raised_blocks"] = json!(u64::MAX);
    large["quantized_blocks"] = json!(u64::MAX);
    fs::create_dir(dir.join("large")).unwrap();
    for seed in [1, 2] {
        large["settings"]["seed"] = json!(seed);
        fs::write(dir.join(format!("large/{seed}.json")), large.to_string()).unwrap();
    }
    succeed(dir, "compare report large --out large");

    // A longer run stands in a table of its own; a file that is not understood is named.
    let longer = line.replace("--out runs", "--out longer").replace("--steps 20", "--steps 22");
    let out = succeed(dir, &format!("{longer} --part 2/4"));
    assert!(out.contains("run 1 of 1: mxfp4-rht-sr,g=32, seed 1"), "{out}");
    let mut future = runs[0].clone();
    future["version"] = json!(9);
    fs::write(dir.join("longer/future.json"), future.to_string()).unwrap();
    let out = succeed(dir, "compare report runs longer --out report");
    let markdown = fs::read_to_string(dir.join("report/compare.md")).unwrap();
    for text in [&out, &markdown] {
        assert_eq!(text.matches("2 layers x 32 channels x 2 heads").count(), 2, "{text}");
        assert!(
            text.contains("future.json:1: expected a record of kind \"run\", version 1"),
            "{text}"
        );
    }
    // Of 20 steps nobody knows what is usual.
    assert_eq!(runs[0]["spikes"]["steps"], 0);
    assert!(!markdown.contains("loss spikes"), "{markdown}");
    let mut spiked = runs[0].clone();
    spiked["spikes"] = json!({"steps": 9, "loss": [3], "norm_over_mean": 2.5, "norm_step": 4});
    fs::create_dir(dir.join("spiked")).unwrap();
    fs::write(dir.join("spiked/run.json"), spiked.to_string()).unwrap();
    let out = succeed(dir, "compare report spiked --out spiked-report");
    assert!(out.contains("loss spikes  runs with them"), "{out}");
    let spikes = &read(dir, "spiked-report/compare.json")["groups"][0]["rows"][0]["spikes"];
    assert_eq!((&spikes["loss"], &spikes["norm_over_mean"]), (&json!(1), &json!(2.5)));

    let summary = read(dir, "report/compare.json");
    let rows = &summary["groups"][0]["rows"];
    assert_eq!(rows[0]["recipe"], "bf16");
    assert_eq!(rows[0]["difference"], Value::Null);
    let of_seed = |run: usize| number(&runs[run]["validation_loss"]);
    let differences = [of_seed(2) - of_seed(0), of_seed(3) - of_seed(1)];
    let mean = (differences[0] + differences[1]) / 2.0;
    let deviation = (differences[0] - differences[1]).abs() / 2f64.sqrt();
    assert!((number(&rows[1]["difference"]["mean"]) - mean).abs() < 1e-9);
    assert!((number(&rows[1]["difference"]["deviation"]) - deviation).abs() < 1e-9);
    // The other group has no bf16 to compare with.
    assert_eq!(summary["groups"][1]["rows"][0]["difference"], Value::Null);
    for plot in ["validation-loss", "difference", "validation-loss-2"] {
        let svg = fs::read_to_string(dir.join(format!("report/{plot}.svg"))).unwrap();
        well_formed(&svg);
        assert!(svg.contains("mxfp4-rht-sr,g=32") && svg.contains("tokens (thousands)"));
        assert!(markdown.contains(&format!("({plot}.svg)")));
    }
    assert!(!dir.join("report/difference-2.svg").exists());
    // The report in its own folder is no record, and no obstacle.
    succeed(dir, "compare report runs report --out report");
    assert!(refuse(dir, "compare report data --out report").contains("meta.json:1: no record"));
}

/// What docs/near-lossless.md, docs/recipes.md and docs/optimizers.md show. `MXT_BLESS=1` writes it
/// anew.
#[test]
fn the_committed_records_give_the_committed_reports() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let of_main = "gradients.jsonl variance.jsonl main.jsonl short.jsonl long.jsonl";
    for (folder, parts, name) in [
        ("near-lossless", of_main, "report"),
        ("near-lossless", "cpu-toy.jsonl", "cpu-toy-report"),
        ("recipes", "large.jsonl", "report"),
        ("recipes", "small.jsonl", "small-report"),
        ("optimizers", "rates.jsonl", "rates-report"),
    ] {
        let docs = docs.join(folder);
        let made = tempfile::tempdir().unwrap();
        succeed(&docs, &format!("compare report {parts} --out {}", made.path().display()));
        let files = |folder: &Path| {
            let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
            entries.collect::<BTreeSet<_>>()
        };
        if std::env::var_os("MXT_BLESS").is_some() {
            let _ = fs::remove_dir_all(docs.join(name));
            fs::create_dir(docs.join(name)).unwrap();
            for file in files(made.path()) {
                fs::copy(made.path().join(&file), docs.join(name).join(&file)).unwrap();
            }
        }
        assert_eq!(files(made.path()), files(&docs.join(name)), "docs/{folder}/{name}");
        for file in files(made.path()) {
            let [new, old] = [made.path(), &docs.join(name)].map(|dir| fs::read(dir.join(&file)));
            assert!(
                new.unwrap() == old.unwrap(),
                "docs/{folder}/{name}/{}: MXT_BLESS=1 writes it anew",
                file.display()
            );
        }
    }
}

#[test]
fn gradients_show_which_recipes_are_biased() {
    let dir = folder();
    let dir = dir.path();
    succeed(
        dir,
        &format!(
            "compare train --data data --out runs --recipe bf16 --steps 60 --lr 3e-3 --eval-batches 1 \
             --save-at 0.5,1 {TINY}"
        ),
    );
    let models = "runs/models/bf16-seed1337-step30 runs/models/bf16-seed1337-step60";
    let recipes = "--recipe bf16 --recipe mxfp4 --recipe mxfp4-rht --recipe mxfp4-rht-sr";
    let line = format!(
        "compare gradients --checkpoint {models} --data data --out g.json --draws 160 --threads 1 {recipes}"
    );
    succeed(dir, &line);
    let record = read(dir, "g.json");
    assert_eq!((&record["kind"], &record["version"]), (&json!("gradients"), &json!(1)));
    assert_eq!(record["sequence_length"], 32);
    for checkpoint in record["checkpoints"].as_array().unwrap() {
        let recipes = checkpoint["recipes"].as_array().unwrap();
        assert_eq!(
            recipes.iter().map(|r| number(&r["draws"])).collect::<Vec<_>>(),
            [2.0, 2.0, 160.0, 160.0]
        );
        for (index, recipe) in recipes.iter().enumerate() {
            let tensors = recipe["tensors"].as_array().unwrap();
            assert_eq!(tensors.len(), 2 * 6 + 1);
            for tensor in tensors {
                let of = |name: &str| number(&tensor[name]);
                let (bias, error) = (of("bias_squared"), of("bias_squared_error"));
                let what = format!("{} {tensor}", recipe["recipe"]);
                match index {
                    0 => assert_eq!((bias, of("variance")), (0.0, 0.0), "{what}"),
                    1 => assert!(bias > 1e-3 && of("variance") == 0.0, "{what}"),
                    // 26 tensors are looked at, so that one lies beyond 3 errors now and then.
                    3 => assert!(bias.abs() < 4.5 * error && of("variance") > 1e-3, "{what}"),
                    _ => assert!(of("variance") > 1e-3, "{what}"),
                }
            }
            // The transform with rounding to nearest is random, yet biased.
            if index == 2 {
                let all = |name: &'static str| tensors.iter().map(move |t| number(&t[name]));
                let bias: f64 = all("bias_squared").sum();
                let error = all("bias_squared_error").map(|e| e * e).sum::<f64>().sqrt();
                assert!(bias > 6.0 * error, "{bias} +- {error}");
            }
        }
    }
    // The same seed draws the same.
    succeed(dir, &line.replace("g.json", "again.json"));
    assert_eq!(read(dir, "again.json")["checkpoints"], record["checkpoints"]);

    succeed(
        dir,
        "compare variance --lengths 32,64 --groups 32,64 --inputs 2 --draws 4 --out v.json",
    );
    assert_eq!(read(dir, "v.json")["rows"].as_array().unwrap().len(), 5);
    let out = succeed(dir, "compare report g.json v.json --out report");
    assert!(out.contains("Gradients at bf16-seed1337-step30"), "{out}");
    // Of each block, of recipes with random bits.
    let mut by_block = out.lines().skip_while(|line| !line.ends_with("block 0  block 1"));
    let rows: Vec<_> = by_block.by_ref().skip(1).take_while(|line| !line.is_empty()).collect();
    assert_eq!(rows.len(), 6 * 2, "{out}");
    assert!(rows.iter().all(|row| row.contains("mxfp4-rht")), "{rows:?}");
    assert!(out.contains("Variance of the unbiased product"), "{out}");
    well_formed(&fs::read_to_string(dir.join("report/variance.svg")).unwrap());

    let mut large = read(dir, "g.json");
    large["checkpoints"][0]["layers"] = json!(u64::MAX);
    fs::write(dir.join("large.json"), large.to_string()).unwrap();
    succeed(dir, "compare report large.json --out report");

    for (line, expected) in [
        ("compare gradients --checkpoint none --data data --out x.json", "none"),
        (&format!("{line} --draws 1"), "--draws: expected at least 2"),
        ("compare variance --groups 48 --out x.json", "expected 32, 64, 128 or 256, got 48"),
        ("compare report none --out x", "cannot read none"),
        ("compare train --data data --out x --part 3/2", "expected K/N"),
        ("compare train --data data --out x --recipe fp4", "expected one of fp32"),
    ] {
        let error = refuse(dir, line);
        assert!(error.contains(expected), "{line}: {error}");
    }
}

/// Llamas' blocks have other layers, and norms in place of biases.
#[test]
fn gradients_of_llamas_are_compared() {
    let dir = folder();
    let dir = dir.path();
    let llama = "--arch llama --kv-heads 1 --qk-norm";
    succeed(dir, &format!("train --data data --out model --steps 60 --lr 3e-3 {llama} {TINY}"));
    succeed(dir, &format!("train --data data --out gpt2 --steps 1 {TINY}"));
    let recipes = "--recipe bf16 --recipe mxfp4 --recipe mxfp4-rht-sr";
    succeed(
        dir,
        &format!(
            "compare gradients --checkpoint model gpt2 --data data --out g.json --draws 160 --threads 1 \
             {recipes}"
        ),
    );
    let record = read(dir, "g.json");
    let recipes = record["checkpoints"][0]["recipes"].as_array().unwrap();
    let tensors = recipes.iter().map(|recipe| recipe["tensors"].as_array().unwrap());
    for (index, tensors) in tensors.enumerate() {
        let names: Vec<_> = tensors.iter().map(|t| t["quantity"].as_str().unwrap()).collect();
        let block = ["qkv", "attention-output", "gate-up", "down", "qkv-norm", "gate-up-norm"];
        assert_eq!(names, [&block[..], &block, &["model-input"]].concat());
        for tensor in tensors {
            let of = |name: &str| number(&tensor[name]);
            let (bias, error) = (of("bias_squared"), of("bias_squared_error"));
            match index {
                0 => assert_eq!((bias, of("variance")), (0.0, 0.0), "{tensor}"),
                1 => assert!(bias > 1e-3 && of("variance") == 0.0, "{tensor}"),
                // As above: 13 tensors are looked at.
                _ => assert!(bias.abs() < 4.5 * error && of("variance") > 1e-3, "{tensor}"),
            }
        }
    }
    let out = succeed(dir, "compare report g.json --out report");
    let (llama, gpt2) = out.split_once("Gradients at gpt2").unwrap();
    for (name, of_llama) in
        [("dW of gate and up ", true), ("dx of FC1", false), ("dW of FC2", false)]
    {
        assert_eq!((llama.contains(name), gpt2.contains(name)), (of_llama, !of_llama), "{out}");
    }
}

/// A run that diverges is a result, too; one that is stopped has none yet, and goes on.
#[test]
fn diverged_runs_are_recorded_and_stopped_ones_go_on() {
    let dir = folder();
    let dir = dir.path();
    let line = "compare train --data data --out runs --recipe bf16 --recipe mxfp4 --eval-batches 1";
    let out = succeed(dir, &format!("{line} --steps 50 --warmup 0 --lr 1e30 {TINY}"));
    assert!(out.contains("; diverged: the loss of step"), "{out}");
    let run = read(dir, "runs/mxfp4-seed1337.json");
    assert_eq!(run["validation_loss"], Value::Null);
    assert!(run["diverged"].as_str().unwrap().contains("is not finite"), "{run}");
    let out = succeed(dir, "compare report runs --out report");
    assert!(out.contains("0 (1 diverged)"), "{out}");
    assert!(out.contains("mxfp4 with seed 1337 diverged: the loss of step"), "{out}");

    let mut child = mxtrain();
    let line = "compare train --data data --out stopped --recipe nvfp4-nvfp4-rht-sr --seeds 1 \
                --eval-batches 1 --eval-every 100";
    let line = format!("{line} --steps 400 {TINY}");
    let child = start(dir, child.args(line.split_whitespace()));
    wait_for(|| dir.join("stopped").exists());
    // The signal is taken from the first step on.
    std::thread::sleep(std::time::Duration::from_millis(300));
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let out = String::from_utf8(output.stdout).unwrap();
    assert!(out.contains("stopped; the same command goes on with this run"), "{out}");
    let names = |folder: &str| {
        let entries = fs::read_dir(dir.join(folder)).unwrap().map(|entry| entry.unwrap());
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.collect::<BTreeSet<_>>()
    };
    let name = "nvfp4-nvfp4-rht-sr-seed1".to_owned();
    assert_eq!(names("stopped"), BTreeSet::from(["unfinished".to_owned()]));
    assert_eq!(names("stopped/unfinished"), BTreeSet::from([name.clone(), format!("{name}.json")]));
    let out = succeed(dir, &line);
    assert!(out.contains("resumed at step "), "{out}");
    // As if it had not stopped.
    assert_eq!(names("stopped"), BTreeSet::from([format!("{name}.json")]));
    succeed(dir, &line.replace("--out stopped", "--out whole"));
    let [stopped, whole] =
        ["stopped", "whole"].map(|folder| read(dir, &format!("{folder}/{name}.json")));
    for part in ["curve", "train_loss", "validation_loss", "validation_loss_in_bf16", "settings"] {
        assert_eq!(stopped[part], whole[part], "{part}");
    }
}

/// A run takes hours; a line that is lost and a model that cannot be saved cost none.
#[test]
fn what_fails_beside_a_run_costs_no_record() {
    let dir = folder();
    let dir = dir.path();
    fs::create_dir(dir.join("runs")).unwrap();
    fs::write(dir.join("runs/models"), "a file").unwrap();
    let line = format!(
        "compare train --data data --out runs --recipe bf16 --steps 4 --save-at 0.5 {TINY}"
    );
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output =
        mxtrain().current_dir(dir).args(line.split_whitespace()).stdout(full).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{error}");
    assert!(error.contains("output lines lost, 1 models not saved"), "{error}");
    assert!(number(&read(dir, "runs/bf16-seed1337.json")["validation_loss"]) > 0.0);
}

/// Neither does an evaluation that fails, nor a record that cannot be written.
#[test]
fn a_failed_evaluation_and_a_full_disk_cost_no_run() {
    let dir = folder();
    let dir = dir.path();
    fs::write(dir.join("raw.bin"), [1, 0, 2, 0].repeat(500)).unwrap();
    // Large data are checked beside the training, so that a token outside of the vocabulary shows
    // in one of the evaluations.
    let large = fs::File::create(dir.join("large.bin")).unwrap();
    large.set_len(257 << 20).unwrap();
    large.write_all_at(&60u16.to_le_bytes(), 257 << 20).unwrap();
    let line = format!(
        "compare train --train raw.bin --val large.bin --token-type u16 --vocab-size 50 --out runs \
         --recipe bf16 --steps 2500 --eval-every 100 --eval-batches 1 {TINY}"
    );
    let output = run(dir, &line);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{error}");
    assert!(error.contains("an evaluation failed: large.bin: token 60"), "{error}");
    assert!(error.contains(" evaluations failed\n"), "{error}");
    let record = read(dir, "runs/bf16-seed1337.json");
    assert!(number(&record["train_loss"]) > 0.0);
    assert_eq!((&record["validation_loss"], &record["diverged"]), (&Value::Null, &Value::Null));
    assert!(succeed(dir, "compare report runs --out report").contains("bf16"));

    fs::create_dir_all(dir.join("full/bf16-seed1337.json.tmp/in the way")).unwrap();
    let line = "compare train --data data --out full --recipe bf16 --recipe mxfp4 --steps 3";
    let output = run(dir, &format!("{line} {TINY}"));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{error}");
    assert!(error.contains("the record is in standard output instead"), "{error}");
    assert!(error.ends_with(": 1 records not written\n"), "{error}");
    let out = String::from_utf8(output.stdout).unwrap();
    let json = &out[out.find("{\n").unwrap()..]
        [..out.find("\n}\n").unwrap() + 2 - out.find("{\n").unwrap()];
    let record: Value = serde_json::from_str(json).unwrap();
    assert_eq!(record["settings"]["recipe"], "bf16");
    assert_eq!(read(dir, "full/mxfp4-seed1337.json")["settings"]["recipe"], "mxfp4");
}

/// Records that cannot be written show before the first run, and one whose last evaluation failed
/// is made again when it is asked for again.
#[test]
fn a_comparison_is_made_of_records_with_a_loss() {
    let dir = folder();
    let dir = dir.path();
    let line = format!("compare train --data data --out runs --recipe bf16 --steps 3 {TINY}");
    let limited = format!("ulimit -f 0; exec {} {line}", env!("CARGO_BIN_EXE_mxtrain"));
    let child = start(dir, std::process::Command::new("sh").args(["-c", &limited]));
    let (code, out, error) = end(child);
    assert_eq!(code, Some(1), "{out}{error}");
    assert!(error.contains("mxtrain: cannot write runs/") && !out.contains("run 1 of"), "{error}");
    assert_eq!(fs::read_dir(dir.join("runs")).unwrap().count(), 0);

    succeed(dir, &line);
    let mut record = read(dir, "runs/bf16-seed1337.json");
    let loss = record["validation_loss"].take();
    fs::write(dir.join("runs/bf16-seed1337.json"), record.to_string()).unwrap();
    assert!(!succeed(dir, &line).contains("is there"));
    assert_eq!(read(dir, "runs/bf16-seed1337.json")["validation_loss"], loss);
    assert!(succeed(dir, &line).contains("is there"));
}

/// How runs stray from bf16 is in their records and in the report, sharpness where it is asked for,
/// which makes no other run of it.
#[test]
fn runs_say_how_they_stray() {
    let dir = folder();
    let dir = dir.path();
    let line = format!(
        "compare train --data data --out runs --recipe bf16 --recipe mxfp4 --seeds 1 --steps 40 \
         --eval-every 20 --eval-batches 1 --sharpness 2e-3 --device cpu {TINY}"
    );
    succeed(dir, &line);
    for recipe in ["bf16", "mxfp4"] {
        let record = read(dir, &format!("runs/{recipe}-seed1.json"));
        assert_eq!(record["settings"]["sharpness"], 0.002);
        let points = record["curve"].as_array().unwrap();
        assert!(points.iter().all(|point| point["sharpness"].as_f64().unwrap() > 0.0), "{record}");
        let of = |name: &str| record["deviation"][name].as_f64().unwrap();
        assert!(of("smoothed_loss") < of("early_loss"), "{record}");
    }
    assert!(succeed(dir, &line.replace("--sharpness 2e-3 ", "")).contains("is there"));
    let out =
        succeed(dir, "compare report runs/bf16-seed1.json runs/mxfp4-seed1.json --out report");
    assert!(out.contains("smoothed train loss less bf16") && out.contains("sharpness"), "{out}");
    let report = read(dir, "report/compare.json");
    let rows = report["groups"][0]["rows"].as_array().unwrap();
    assert_eq!(rows[1]["deviations"]["early"], 0);
    assert!(rows[1]["deviations"]["difference"]["mean"].is_number(), "{report}");
}

/// Every point has the loss of the recipe's own forward pass, which is what `eval` measures, and that
/// of the same weights in bf16.
#[test]
fn weights_are_evaluated_in_bf16_too() {
    let dir = folder();
    let dir = dir.path();
    let line = format!(
        "compare train --data data --out runs --recipe nvfp4-nvfp4 --seeds 1 --steps 6 --eval-every 3 \
         --eval-batches 2 --save-at 1 --device cpu {TINY}"
    );
    let out = succeed(dir, &line);
    let expected =
        "emulated    forward of NVFP4 as bf16, dgrad of NVFP4 as bf16, wgrad of NVFP4 as bf16";
    assert!(out.contains(&format!("\n{expected}: exact, and not faster than bf16\n")), "{out}");
    let run = read(dir, "runs/nvfp4-nvfp4-seed1.json");
    let last = &run["curve"][1];
    for name in ["validation_loss", "validation_loss_in_bf16"] {
        assert_eq!(run[name], last[name]);
    }
    assert_ne!(run["curve"][0]["validation_loss_in_bf16"], Value::Null);
    let formats = json!(["NVFP4", "NVFP4"]);
    let emulated =
        |gemm: &str| json!({"gemm": gemm, "formats": formats, "numbers": "bf16", "emulated": true});
    assert_eq!(run["carriers"], json!(["forward", "dgrad", "wgrad"].map(emulated)));
    let loss_in = |recipe: &str| {
        let line = format!(
            "eval --checkpoint runs/models/nvfp4-nvfp4-seed1-step6 --data data --recipe {recipe} \
             --batch-size 4 --batches 2 --threads 1 --json"
        );
        number(&serde_json::from_str::<Value>(&succeed(dir, &line)).unwrap()["loss"])
    };
    let (own, in_bf16) = (loss_in("nvfp4-nvfp4"), loss_in("bf16"));
    assert!((number(&last["validation_loss"]) - own).abs() < 1e-6, "{last} {own}");
    assert!((number(&last["validation_loss_in_bf16"]) - in_bf16).abs() < 1e-6, "{last} {in_bf16}");
    assert_ne!(own, in_bf16);
}

/// A run whose record has a `/` in its recipe, and one of two draws a number.
#[test]
fn names_of_recipes_are_no_folders() {
    let dir = folder();
    let dir = dir.path();
    succeed(
        dir,
        &format!(
            "compare train --data data --out runs --recipe mxfp4,range=3/4 --steps 2 --eval-batches 1 \
             --save-at 1 {TINY}"
        ),
    );
    let record = read(dir, "runs/mxfp4,range=3-4-seed1337.json");
    assert_eq!(record["settings"]["recipe"], "mxfp4,range=3/4");
    assert!(dir.join("runs/models/mxfp4,range=3-4-seed1337-step2/config.json").exists());
    succeed(
        dir,
        "compare variance --lengths 32 --groups 32 --inputs 2 --draws 2 --seed 1 --out v.json",
    );
    succeed(dir, "compare report runs v.json --out report");
}
