//! The command line: help, usage errors, configuration files and exit codes.

mod common;

use std::fs;

use common::{mxtrain, refuse, run, succeed};

#[test]
fn help_and_version_succeed() {
    let dir = tempfile::tempdir().unwrap();
    for sub in ["prepare", "train", "eval", "generate", "info", "plan"] {
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
    for (line, expected) in [
        ("trian", "unrecognized subcommand 'trian'; did you mean 'train'?"),
        ("train --stepz 3", "unexpected argument '--stepz' found; did you mean '--steps'?"),
        ("train --steps many", "invalid value 'many' for '--steps <N>'"),
        ("train --recipe fp4", "recipe: expected one of fp32, bf16"),
        ("train --schedule up", "schedule: expected one of constant"),
        ("train --data a --train b", "--data and --train exclude each other"),
        ("train", "--data DIR is missing"),
        ("train --data none", "cannot read none/meta.json: No such file"),
        ("train --config none.toml", "cannot read none.toml"),
        ("eval --data x", "required arguments were not provided: --checkpoint <DIR>"),
        ("eval --checkpoint x --data .", "cannot read ./meta.json"),
        ("generate --checkpoint x --greedy --top-k 3", "cannot be used with"),
        ("info .", "expected a checkpoint (config.json) or a prepared folder"),
        ("plan --heads 3", "--heads: 3 heads do not divide 128 channels"),
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
