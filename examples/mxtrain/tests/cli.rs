//! The command line: help, usage errors, configuration files and exit codes.

mod common;

use std::fs;
use std::path::Path;

use common::{mxtrain, refuse, run, run_args, succeed};

#[test]
fn help_and_version_succeed() {
    let dir = tempfile::tempdir().unwrap();
    for sub in ["prepare", "train", "eval", "generate", "export", "info", "plan"] {
        assert!(succeed(dir.path(), &format!("{sub} --help")).contains("Usage: mxtrain"));
    }
    let help = succeed(dir.path(), "train --help");
    for part in [
        "Model:",
        "Optimizer:",
        "Machine:",
        "[default: 1e-3; 5e-5 with --init-from]",
        "[default: cosine]",
    ] {
        assert!(help.contains(part), "{part} is missing in {help}");
    }
    let help = succeed(dir.path(), "compare train --help");
    assert!(help.contains("[default: 1e-3]") && !help.contains("init-from"), "{help}");
    let version = format!("mxtrain {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(succeed(dir.path(), "--version"), version);
    assert_eq!(run(dir.path(), "").status.code(), Some(2));
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.txt"), "text\n").unwrap();
    let mut child = mxtrain()
        .current_dir(dir.path())
        .args(["prepare", "a.txt", "--out", "data"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn wrong_options_get_one_line_and_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("tokens")).unwrap();
    fs::write(dir.path().join("tokens/a.bin"), "").unwrap();
    for (line, expected) in [
        ("trian", "unrecognized subcommand 'trian'; did you mean 'train'?"),
        ("train --seed -1", "invalid value '-1' for '--seed <N>'"),
        ("generate --checkpoint none --prompt -x", "none"),
        ("compare variance --outliers nan --out v.json", "expected a number from 0 to 1,000,000"),
        ("train --stepz 3", "unexpected argument '--stepz' found; did you mean '--steps'?"),
        ("train --steps many", "invalid value 'many' for '--steps <N>'"),
        ("train --recipe fp4", "recipe: expected one of fp32, bf16"),
        ("train --optimizer sgd", "optimizer: expected one of adamw, stable-adamw, "),
        ("train --token-drop 60%", "token_drop: expected start=N,steps=N or start=N,steps=P%"),
        ("train --schedule up", "schedule: expected one of constant"),
        ("train --data a --train b", "--data and --train exclude each other"),
        ("train", "--data DIR is missing"),
        ("train --data none", "cannot read none/meta.json: No such file"),
        ("train --config none.toml", "cannot read none.toml"),
        ("eval --data x", "required arguments were not provided: --checkpoint <DIR>"),
        ("eval --checkpoint x --data .", "cannot read ./meta.json"),
        ("generate --checkpoint x --greedy --top-k 3", "cannot be used with"),
        ("info .", "expected a checkpoint (config.json) or a prepared folder"),
        ("info tokens", "found neither; for the token files in it name 'tokens/*.bin'"),
        ("plan --heads 3", "--heads: 3 heads do not divide 128 channels"),
        ("plan --fit much", "for '--fit <SIZE>': expected a size such as 80GiB, 500MB or a number"),
        ("plan --layers 0", "--layers: expected a number from 1"),
    ] {
        let error = refuse(dir.path(), line);
        assert!(error.contains(expected), "{line}: {error}");
    }
}

#[test]
fn a_wrong_configuration_file_is_named_with_the_entry() {
    let dir = tempfile::tempdir().unwrap();
    for (toml, expected) in [
        (
            "batch_size = 4",
            "run.toml: unknown option \"batch_size\"; the nearest known option is \
          \"batch-size\"",
        ),
        ("steps = \"many\"", "run.toml: invalid value 'many' for '--steps <N>'"),
        ("[model]\nlayers = 2", "run.toml: unknown option \"model\""),
        ("lr = 1e-3\nlr = 2e-3", "run.toml, line 2: duplicate key"),
        ("steps = ", "run.toml, line 1: "),
    ] {
        fs::write(dir.path().join("run.toml"), toml).unwrap();
        let error = refuse(dir.path(), "train --config run.toml");
        assert!(error.starts_with(expected), "{toml}: {error}");
    }
}

#[test]
fn damaged_metadata_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let meta = dir.path().join("meta.json");
    fs::write(&meta, "{").unwrap();
    assert!(refuse(dir.path(), "train --data .").starts_with("./meta.json: EOF"));
    fs::write(
        &meta,
        "{\"version\": 9, \"tokenizer\": \"bytes\", \"vocab_size\": 256, \
        \"train_tokens\": 1, \"val_tokens\": 0, \"sources\": []}",
    )
    .unwrap();
    assert!(refuse(dir.path(), "train --data .").contains("expected version 1, got 9"));
}

/// Whoever waits for a pipe's writer, or reads a device to its end, never answers.
#[test]
fn what_is_no_file_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("a.txt"), "text\n".repeat(100)).unwrap();
    succeed(dir, "prepare a.txt --out data");
    let train = "train --data data --layers 1 --channels 32 --context 16 --steps 1 --threads 1";
    succeed(dir, &format!("{train} --out model"));
    for (name, lines) in [
        ("run.toml", &["train --config run.toml", "plan --config run.toml"][..]),
        (
            "model/mxtrain.json",
            &["info model", "generate --checkpoint model", "train --resume model"],
        ),
        ("model/trainer.json", &["info model"]),
        (
            "data/meta.json",
            &["train --data data", "eval --checkpoint model --data data", "plan --data data"],
        ),
    ] {
        let path = dir.join(name);
        let kept = fs::read(&path).ok();
        let _ = fs::remove_file(&path);
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let fifo = rustix::fs::FileType::Fifo;
        for device in [false, true] {
            match device {
                false => rustix::fs::mknodat(rustix::fs::CWD, &path, fifo, mode, 0).unwrap(),
                true => std::os::unix::fs::symlink("/dev/zero", &path).unwrap(),
            }
            for line in lines {
                let error = refuse(dir, line);
                let expected = "expected a file, found a";
                assert!(error.contains(name) && error.contains(expected), "{line}: {error}");
            }
            fs::remove_file(&path).unwrap();
        }
        if let Some(bytes) = kept {
            fs::write(&path, bytes).unwrap();
        }
    }
    // A tokenizer that is none is not looked at.
    fs::remove_file(dir.join("model/mxtrain.json")).unwrap();
    fs::remove_file(dir.join("model/tokenizer.json")).unwrap();
    let (fifo, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
    let path = dir.join("model/tokenizer.json");
    rustix::fs::mknodat(rustix::fs::CWD, path, fifo, mode, 0).unwrap();
    succeed(dir, "info model");
    refuse(dir, "generate --checkpoint model");
}

/// A name may hold anything but a slash and NUL, and a terminal must not obey it.
#[test]
fn names_do_not_reach_the_terminal_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let name = "a\u{1b}[31m\n\r\u{7}\u{7f}\u{9b}2J\u{202e}\u{2066}b";
    let shown = r"a\u{1b}[31m\n\r\u{7}\u{7f}\u{9b}2J\u{202e}\u{2066}b";
    fs::create_dir(dir.path().join(name)).unwrap();
    let dir = dir.path().join(name);
    fs::write(dir.join(name), "text\n".repeat(100)).unwrap();
    let [data, model] = ["data", "model"].map(|what| format!("{name}-{what}"));
    let tiny = ["--layers=1", "--channels=32", "--context=16", "--steps=2", "--threads=1"];
    let train = ["train", "--data", &data, "--out", &model, "--eval-every", "1"];
    let train = [&train[..], &tiny].concat();
    for (args, code) in [
        (&["prepare", name, "--out", &data][..], 0),
        (&["prepare", "missing\u{1b}", name, "--out", &data], 2),
        (&["prepare", ".", "--out", "."], 2),
        (&train, 0),
        (&train, 2),
        (&["train", "--resume", &model], 2),
        (&["train", "--data", name], 2),
        (&["train", name], 2),
        (&["train", "--steps", name], 2),
        (&["eval", "--checkpoint", &model, "--data", &data], 0),
        (&["eval", "--checkpoint", name, "--data", &data], 2),
        (&["eval", "--checkpoint", &model, "--data", name], 2),
        (&["generate", "--checkpoint", &model, "--tokens", "1"], 0),
        (&["generate", "--checkpoint", name], 2),
        (&["info", &data], 0),
        (&["info", &data, "--json"], 0),
        (&["info", &model], 0),
        (&["info", name], 2),
        (&["info", "."], 2),
        (&["compare", "report", name, "--out", "report"], 2),
    ] {
        let output = run_args(&dir, args);
        let all = [output.stdout.clone(), output.stderr].concat();
        let all = String::from_utf8(all).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {all}");
        let is_odd = |c: &char| *c != '\n' && (c.is_control() || "\u{202e}\u{2066}".contains(*c));
        assert_eq!(all.chars().find(is_odd), None, "{args:?}: {all:?}");
        // A name is in one line.
        if all.contains("[31m") && !args.contains(&"--json") {
            assert!(all.contains(shown) || all.contains(r"[31m\x0a"), "{args:?}: {all}");
        }
        if args.contains(&"--json") {
            let about: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(about["sources"][0]["path"], name);
        }
    }
}

/// docs/recipes.md has what the program prints, which is made from what it trains with.
#[test]
fn the_table_of_recipes_is_in_the_documents() {
    let table = succeed(Path::new("."), "recipes");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/recipes.md");
    let document = fs::read_to_string(&path).unwrap();
    let (before, rest) = document.split_once("<!-- recipes -->\n").unwrap();
    let (found, behind) = rest.split_once("<!-- /recipes -->\n").unwrap();
    if std::env::var_os("MXT_BLESS").is_some() {
        let all = [before, "<!-- recipes -->\n", &table, "<!-- /recipes -->\n", behind].concat();
        return fs::write(path, all).unwrap();
    }
    assert_eq!(found, table, "MXT_BLESS=1 cargo test -p mxtrain --test cli writes it");
}

/// Beside the loss stand the loss without it and what it would spare; nothing trains with it.
#[test]
fn merged_channels_are_evaluated_and_not_trained() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("a.txt"), "Some text, and more of it.\n".repeat(100)).unwrap();
    succeed(dir, "prepare a.txt --out data");
    let train = "train --data data --layers 2 --channels 32 --context 16 --steps 2 --threads 1";
    let refused = refuse(dir, &format!("{train} --out model --recipe bf16,haste=4"));
    assert!(refused.contains("--recipe: haste=4 is for evaluation: hashes"), "{refused}");
    assert!(refused.contains("train with bf16, and evaluate with bf16,haste=4"), "{refused}");
    let compare = "compare train --data data --out runs --steps 2 --seeds 1";
    let refused = refuse(dir, &format!("{compare} --recipe fp8,haste=1"));
    assert!(refused.contains("haste=1 is for evaluation"), "{refused}");

    // What an evaluation takes, training set aside.
    let plan = |recipe: &str| succeed(dir, &format!("plan --layers 2 --recipe {recipe} --json"));
    assert_ne!(plan("bf16,haste=4"), plan("bf16"));

    succeed(dir, &format!("{train} --out model --recipe bf16"));
    let eval = |options: &str| {
        let line = format!("eval --checkpoint model --data data --threads 1 --json {options}");
        serde_json::from_str::<serde_json::Value>(&succeed(dir, &line)).unwrap()
    };
    let plain = eval("");
    assert!(plain.get("haste").is_none(), "{plain}");
    let number = |value: &serde_json::Value| value.as_f64().unwrap();
    for bits in [1, 64] {
        let merged = eval(&format!("--recipe bf16,haste={bits}"));
        let haste = &merged["haste"];
        assert_eq!((&haste["bits"], &haste["loss_without"]), (&bits.into(), &plain["loss"]));
        assert_eq!(merged["tokens"], plain["tokens"]);
        let [products, all] = ["spared_products", "spared_all"].map(|key| number(&haste[key]));
        assert!(all < products && (0.0..1.0).contains(&products), "{merged}");
        if bits == 1 {
            // At most two buckets of 32 channels, and of 128.
            assert!(products >= 1.0 - 2.0 / 32.0, "{merged}");
            assert_ne!(merged["loss"], plain["loss"]);
        }
    }
    let words = succeed(dir, "eval --checkpoint model --data data --recipe bf16,haste=2");
    let lines: Vec<_> = words.lines().collect();
    assert!(lines[1].starts_with("without haste=2: loss ") && lines.len() == 3, "{words}");
    assert!(lines[1].ends_with(" nats a token"), "{words}");
    assert!(lines[2].starts_with("merging would spare 9"), "{words}");
    let table = succeed(dir, "recipes bf16,haste=12");
    assert!(table.contains("| bf16 haste 12 | bf16 "), "{table}");
}

#[test]
fn a_recipe_is_shown_with_its_switches() {
    let table = succeed(Path::new("."), "recipes mxfp4-rht-sr,g=128,bf16-last-layers=2 nvfp4-eden");
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines.len(), 4, "{table}");
    assert!(lines[2].contains("| MXFP4 floor 3/4 SR H128 |"), "{table}");
    assert!(lines[2].contains("the last 2 blocks, backward |"), "{table}");
    assert!(lines[3].contains("| bf16 ") && lines[3].contains("| NVFP4 EDEN H128 "), "{table}");
    assert!(refuse(Path::new("."), "recipes fp4").contains("expected one of fp32"));
}
