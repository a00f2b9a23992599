//! Token files as users bring them: every one is read for what it is, or refused with what to do.

mod common;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use common::{failed, refuse, run, run_args, succeed};
use serde_json::Value;

const TINY: &str =
    "--layers 1 --heads 1 --channels 16 --batch-size 2 --threads 1 --device cpu --recipe bf16";

/// The committed files.
fn files() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/tokens")
}

fn raw(tokens: impl IntoIterator<Item = u16>) -> Vec<u8> {
    tokens.into_iter().flat_map(u16::to_le_bytes).collect()
}

fn info(dir: &Path, what: &str) -> Value {
    serde_json::from_str(&succeed(dir, &format!("info {what} --json"))).unwrap()
}

/// The training losses in a log.
fn losses(dir: &Path, name: &str) -> Vec<Value> {
    let lines = fs::read_to_string(dir.join(name)).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["type"] == "step").map(|line| line["loss"].clone()).collect()
}

#[test]
fn info_says_what_a_file_is() {
    let dir = files();
    for (name, file, format, token_type) in [
        ("uint16.npy", "uint16.npy", "npy", "u16"),
        ("uint32.bin", "uint32.bin", "raw", "u32"),
        ("megatron16.idx", "megatron16.bin", "Megatron", "u16"),
        ("megatron16.*", "megatron16.bin", "Megatron", "u16"),
    ] {
        let about = info(&dir, name);
        let described = &about["files"][0];
        assert_eq!(about["files"].as_array().unwrap().len(), 1, "{name}");
        assert_eq!((&described["path"], &described["format"]), (&file.into(), &format.into()));
        assert_eq!(described["token_type"], token_type);
        assert_eq!(
            (&described["tokens"], &described["largest_token"]),
            (&4000.into(), &49579.into())
        );
    }
    let text = succeed(&dir, "info megatron16.bin");
    assert_eq!(
        text,
        "tokens     megatron16.bin: 4,000 in 20 documents, Megatron u16, the largest is 49,579\n\
         total      4,000 tokens; a vocabulary of 49,580 would do\n"
    );
    let text = succeed(&dir, "info uint*");
    assert!(text.contains("total      8,000 tokens"), "{text}");
    assert!(text.contains("npy u16") && text.contains("raw u32"), "{text}");
    let error = refuse(&dir, "info plain-text.txt");
    assert!(error.contains("found text") && error.contains("mxtrain prepare"), "{error}");
    let error = refuse(&dir, "info npy/negative.npy");
    assert!(error.contains("token -100 at offset 2"), "{error}");
    // Whatever a pattern matches must be tokens.
    let error = refuse(&dir, "info *");
    assert!(error.contains("folder") || error.contains("found text"), "{error}");
}

#[test]
fn runs_on_every_format_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::copy(files().join("megatron16.bin"), dir.join("raw.bin")).unwrap();
    for name in ["uint16.npy", "uint32.bin", "megatron16.bin", "megatron16.idx"] {
        fs::copy(files().join(name), dir.join(name)).unwrap();
    }
    let train = |pattern: &str| {
        let line = format!(
            "train --train {pattern} --vocab-size 50257 --steps 3 --context 32 --overwrite --log l {TINY}"
        );
        succeed(dir, &line);
        losses(dir, "l")
    };
    let expected = train("raw.bin");
    assert_eq!(expected.len(), 3);
    for pattern in ["uint16.npy", "uint32.bin", "megatron16.idx", "megatron16.*"] {
        assert_eq!(train(pattern), expected, "{pattern}");
    }
}

#[test]
fn what_is_wrong_with_data_is_said_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let tokens = |n: u32| (0..n).map(|i| (i * i % 99) as u16);
    fs::write(dir.join("good.bin"), raw(tokens(20_000))).unwrap();
    fs::write(dir.join("one-bad-token.bin"), raw(tokens(39_999).chain([60_000]))).unwrap();
    fs::write(dir.join("tiny.bin"), raw([1, 2, 3])).unwrap();
    fs::write(dir.join("single.bin"), raw([1])).unwrap();
    fs::write(dir.join("text.txt"), "to be, or not to be, that is the question ".repeat(20))
        .unwrap();
    fs::write(dir.join("pointer.bin"), "version https://git-lfs.github.com/spec/v1\noid x\n")
        .unwrap();
    fs::create_dir(dir.join("folder")).unwrap();
    succeed(dir, "prepare text.txt --out prepared");
    for (options, expected) in [
        ("--train one-bad-token.bin", "one-bad-token.bin: token 60000 at offset 39999"),
        ("--train good.bin --val one-bad-token.bin", "one-bad-token.bin: token 60000"),
        ("--train tiny.bin", "--sequence-length: a window of 64 tokens and the one after"),
        ("--train good.bin --val single.bin", "nothing to predict"),
        ("--train text.txt", "found text; turn it into tokens with `mxtrain prepare`"),
        ("--train pointer.bin", "run `git lfs pull`"),
        ("--train folder", "found a folder; name a file in it or a pattern such as"),
        (
            "--train prepared",
            "--train: prepared is a folder made by `mxtrain prepare`; name it with --data",
        ),
        ("--train good.bin --val prepared", "--val: prepared is a folder"),
        ("--train good.bin --token-type u64", "expected u8, u16, u32, i32 or i64, got \"u64\""),
        ("--train good.bin --token-type u32", "outside the vocabulary of 100"),
        ("--train none*.bin", "expected files that match"),
    ] {
        let line = format!("train {options} --vocab-size 100 --out out --context 64 {TINY}");
        let output = run(dir, &line);
        let error = failed(&output, &line);
        assert!(error.contains(expected), "{line}: {error}");
        assert!(output.stdout.is_empty() && !dir.join("out").exists(), "{line}");
    }
}

#[test]
fn files_shorter_than_a_window_are_said_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let piece = |n: u16| raw((0..n).map(|i| i * 7 % 100));
    fs::write(dir.join("a_long.bin"), piece(1200)).unwrap();
    for i in 0..10 {
        fs::write(dir.join(format!("doc_{i}.bin")), piece(450)).unwrap();
    }
    let line = format!("--vocab-size 100 --context 512 --steps 2 --overwrite {TINY}");
    let output = run(dir, &format!("train --train *.bin --val doc_0.bin {line}"));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && !error.contains("warning"), "said once: {error}");
    let out = String::from_utf8(output.stdout).unwrap();
    let expected = "10 of 11 files are shorter than a window of 513 tokens and will never be read: \
                    4,500 of 5,700 tokens (79%); use --sequence-length 449 or join them\n";
    assert!(out.contains(expected), "{out}");
    let expected = "validation: 450 tokens are less than a window of 513, and are measured as one \
                    shorter window\n";
    assert!(out.contains(expected), "{out}");
    assert!(out.contains("step 2/2  train loss"), "{out}");
    let output = run(dir, "eval --checkpoint checkpoint --data doc_[0-3].bin --json --device cpu");
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("none of 4 files has a window of 513 tokens"), "{error}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["tokens"], 4 * 449);
    // The remedy that was named.
    let out = succeed(dir, &format!("train --train *.bin {line} --sequence-length 449"));
    assert!(!out.contains("never be read"), "{out}");
}

#[test]
fn a_run_keeps_the_type_and_the_name_of_its_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let name = OsStr::from_bytes(b"f\xfcr-train.bin");
    // Tokens above 65,535 are in no doubt only where they are named.
    let tokens = (0..2000u32).map(|i| i * 7919 % 70_000);
    fs::write(dir.join(name), tokens.flat_map(u32::to_le_bytes).collect::<Vec<_>>()).unwrap();
    let args = |words: &[&str], pattern: &[u8]| -> Vec<OsString> {
        let mut args: Vec<OsString> = words.iter().map(OsString::from).collect();
        args.extend(["--train".into(), OsStr::from_bytes(pattern).to_owned()]);
        args.extend(TINY.split(' ').map(OsString::from));
        args
    };
    let begin = ["train", "--vocab-size", "70000", "--context", "16", "--steps", "2", "--out", "m"];
    let output = run_args(dir, args(&begin, b"f\xfc*.bin"));
    let error = failed(&output, "train");
    assert!(error.contains("--token-type"), "{error}");
    let output =
        run_args(dir, args(&[&begin[..], &["--token-type", "u32"]].concat(), b"f\xfc*.bin"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let kept = fs::read_to_string(dir.join("m/mxtrain.json")).unwrap();
    assert!(kept.contains("f%FC%2A.bin") && kept.contains("\"token-type\": \"u32\""), "{kept}");
    let out = succeed(dir, "train --resume m --steps 4 --threads 1 --device cpu");
    assert!(out.contains("2,000 tokens") && out.contains("resumed at step 2"), "{out}");
    assert_eq!(info(dir, "m")["training"]["step"], 4);

    let mut line: Vec<OsString> =
        ["eval", "--checkpoint", "m", "--device", "cpu", "--token-type", "u32", "--data"]
            .map(Into::into)
            .into();
    line.push(name.into());
    assert!(run_args(dir, line).status.success());
    let mut line: Vec<OsString> = ["info", "--token-type=u32"].map(Into::into).into();
    line.push(name.into());
    let output = run_args(dir, line);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("2,000, raw u32, the largest is 69,"), "{text}");
}

/// Data that are too large to look at first: a thread finds the token while the run goes on, and
/// the run ends with what it has done.
#[test]
fn a_token_far_inside_large_data_ends_the_run_with_everything_saved() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // Zeros that take no room on the disk, a length that no call looks at by itself, and one token.
    let mut file = fs::File::create(dir.join("large.bin")).unwrap();
    let place = (300 << 20) - 2;
    file.seek(SeekFrom::Start(place)).unwrap();
    file.write_all(&60_000u16.to_le_bytes()).unwrap();
    drop(file);
    let line = format!(
        "train --train large.bin --vocab-size 100 --context 8 --steps 10000000 --save-every 0 \
         --eval-every 0 --out m {TINY}"
    );
    let output = run(dir, &line);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    let last = error.lines().last().unwrap();
    let expected = format!("large.bin: token 60000 at offset {}", place / 2);
    assert!(last.contains(&expected), "{error}");
    let step = &info(dir, "m")["training"]["step"];
    assert!(last.ends_with(&format!("; m holds step {step}")), "{last}");
}

#[test]
fn a_resumed_run_finds_its_pattern_and_says_that_its_tokens_changed() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("run [1]*");
    fs::create_dir(&folder).unwrap();
    let tokens = || (0..2000).map(|i| i % 100);
    fs::write(folder.join("a.bin"), raw(tokens())).unwrap();
    let line =
        format!("train --train *.bin --vocab-size 100 --steps 1 --context 32 --out m {TINY}");
    succeed(&folder, &line);
    let out = succeed(&folder, "train --resume m --steps 2 --threads 1 --device cpu");
    assert!(!out.contains("the run was saved with"), "{out}");
    fs::write(folder.join("b.bin"), raw(tokens())).unwrap();
    let out = succeed(&folder, "train --resume m --steps 3 --threads 1 --device cpu");
    assert!(out.contains("data        the run was saved with 2,000 training tokens"), "{out}");
    let out = succeed(&folder, "train --resume m --steps 4 --threads 1 --device cpu");
    assert!(!out.contains("the run was saved with"), "{out}");
}
