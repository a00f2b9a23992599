//! What happens beside the training of a tiny model costs the run nothing: signals at any moment,
//! full disks, readers that go away, folders that cannot be written, a second run.

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::Value;
use tempfile::TempDir;

use common::{end, interrupt, mxtrain, refuse, run, signal, start, succeed, wait_for};

/// A model that takes a step in about a millisecond.
const TINY: &str = "--layers 1 --heads 2 --channels 32 --context 32 --batch-size 2 --threads 1";

/// How long after a signal a run may take: two seconds and a batch, on a machine that is busy.
const SOON: Duration = Duration::from_secs(8);

/// A folder with prepared text in `data`, and raw tokens below 50 in `raw.bin`, and as many in
/// `many.bin` that an evaluation on all of them takes minutes.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("text.txt"), include_str!("../../../tests/text/prose.txt")).unwrap();
    succeed(dir.path(), "prepare text.txt --out data");
    let raw = |name: &str, count: u32| {
        let tokens = (0..count).flat_map(|i| ((i * 7 % 50) as u16).to_le_bytes());
        fs::write(dir.path().join(name), tokens.collect::<Vec<u8>>()).unwrap();
    };
    raw("raw.bin", 1000);
    raw("many.bin", 10_000_000);
    dir
}

/// Starts the program. SIGHUP has its meaning there, also where the tests run under nohup.
fn begin(dir: &Path, line: &str) -> Child {
    let mut program = Command::new("env");
    program.args(["--default-signal=HUP", env!("CARGO_BIN_EXE_mxtrain")]);
    start(dir, program.args(line.split_whitespace()))
}

/// Steps in the log.
fn steps(dir: &Path) -> u64 {
    let text = fs::read_to_string(dir.join("log.jsonl")).unwrap_or_default();
    text.lines().filter(|line| line.contains("\"type\":\"step\"")).count() as u64
}

/// The step that a checkpoint holds.
fn saved(dir: &Path, checkpoint: &str) -> u64 {
    let about: Value =
        serde_json::from_str(&succeed(dir, &format!("info {checkpoint} --json"))).unwrap();
    about["training"]["step"].as_u64().unwrap()
}

/// The folder beside `model` that a run has saved to.
fn beside(dir: &Path) -> Option<String> {
    let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("model.step-")).max()
}

#[test]
fn a_signal_at_any_moment_stops_and_saves() {
    let dir = folder();
    let dir = dir.path();
    let line = format!(
        "train --data data --out model --log log.jsonl --steps 100000 --eval-every 3 --sample-every 5 \
         --save-every 7 --accumulation 3 {TINY}"
    );
    let mut stopped_before = 0;
    let signals = [
        Signal::INT,
        Signal::TERM,
        Signal::USR1,
        Signal::HUP,
        Signal::USR2,
        Signal::XCPU,
        Signal::ALARM,
        Signal::VTALARM,
        Signal::PROF,
    ];
    for (round, number) in signals.iter().cycle().take(28).enumerate() {
        let _ = fs::remove_dir_all(dir.join("model"));
        let _ = fs::remove_file(dir.join("log.jsonl"));
        let child = begin(dir, &line);
        // The first ones come while the program loads.
        wait_for(|| fs::read_to_string(format!("/proc/{}/cmdline", child.id())).is_ok());
        wait_for(|| {
            let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
            u64::from_str_radix(caught.trim(), 16).unwrap() >> 14 & 1 == 1
        });
        sleep(Duration::from_millis(round as u64 * 17));
        let began = Instant::now();
        signal(&child, *number);
        let (code, out, error) = end(child);
        assert!(began.elapsed() < SOON, "{number:?} {round}: {:?}", began.elapsed());
        assert_eq!(code, Some(130), "{number:?} {round}: {out}{error}");
        if dir.join("model").exists() {
            assert_eq!(saved(dir, "model"), steps(dir), "{number:?} {round}: {error}");
            assert!(
                out.contains("go on with: mxtrain train --resume model --log log.jsonl\n"),
                "{out}"
            );
        } else {
            stopped_before += 1;
            assert_eq!(steps(dir), 0);
        }
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(names.into_iter().all(|name| !name.to_string_lossy().starts_with(".model")));
        assert!(!dir.join("model/.mxt-lock").exists());
    }
    assert!(stopped_before < 28, "no run came to its first save");
}

/// Each of these takes minutes, and a signal does not wait for it.
#[test]
fn a_signal_does_not_wait_for_the_rest_of_an_evaluation_a_sample_or_a_step() {
    let dir = folder();
    let dir = dir.path();
    let sample = format!(
        "--tokenizer bytes --vocab-size 256 --sample-every 1 --batch-size 2 --context 1024 \
         --sequence-length 32 --layers 8 --channels 128 --sample-prompt {}",
        "x".repeat(1000)
    );
    for (what, options) in [
        ("an evaluation", "--val many.bin --eval-every 1 --eval-batches 0 --batch-size 2"),
        ("a sample", &sample),
        ("a step", "--accumulation 16384 --batch-size 2"),
    ] {
        let _ = fs::remove_dir_all(dir.join("model"));
        let _ = fs::remove_file(dir.join("log.jsonl"));
        let child = begin(
            dir,
            &format!(
                "train --train raw.bin --vocab-size 50 --out model --log log.jsonl --steps 9 \
                 --context 32 --channels 64 --layers 1 --threads 1 {options}"
            ),
        );
        match what {
            "a step" => wait_for(|| dir.join("log.jsonl").exists()),
            _ => wait_for(|| steps(dir) == 1),
        }
        sleep(Duration::from_millis(200));
        let began = Instant::now();
        signal(&child, Signal::TERM);
        let (code, out, error) = end(child);
        assert!(began.elapsed() < SOON, "{what}: {:?}", began.elapsed());
        assert_eq!(code, Some(130), "{what}: {out}{error}");
        assert_eq!(saved(dir, "model"), steps(dir), "{what}");
        let evaluated = fs::read_to_string(dir.join("log.jsonl")).unwrap().contains("\"eval\"");
        assert!(!evaluated && !error.contains("warning"), "{what}: {error}");
    }

    for line in [
        "eval --checkpoint model --data many.bin --threads 1",
        "generate --checkpoint model --tokenizer bytes --tokens 100000000 --threads 1",
    ] {
        succeed(dir, &format!("train --data data --out model --overwrite --steps 1 {TINY}"));
        for number in [Signal::TERM, Signal::INT] {
            let mut child = mxtrain();
            child.args(line.split_whitespace()).current_dir(dir).stdout(Stdio::null());
            let child = child.stderr(Stdio::piped()).spawn().unwrap();
            sleep(Duration::from_millis(500));
            let began = Instant::now();
            signal(&child, number);
            assert_eq!(end(child).0, Some(130), "{line}");
            assert!(began.elapsed() < SOON, "{line}");
        }
    }
}

/// nohup starts programs with the signal ignored.
/// The reader of its output has stopped reading (a pager, a stopped terminal).
#[test]
fn a_signal_does_not_wait_for_a_reader() {
    let dir = folder();
    let dir = dir.path();
    let line = format!(
        "train --data data --out model --log log.jsonl --steps 100000 --eval-every 1 \
         --eval-batches 1 {TINY}"
    );
    for both in [false, true] {
        let _ = fs::remove_dir_all(dir.join("model"));
        let _ = fs::remove_file(dir.join("log.jsonl"));
        let (reader, writer) = std::io::pipe().unwrap();
        let mut full = writer.try_clone().unwrap();
        let mut command = mxtrain();
        command.current_dir(dir).args(line.split_whitespace());
        if both {
            command.stderr(writer.try_clone().unwrap());
        } else {
            command.stderr(Stdio::null());
        }
        let mut child = command.stdout(writer).spawn().unwrap();
        wait_for(|| steps(dir) > 0);
        rustix::io::ioctl_fionbio(&full, true).unwrap();
        while full.write(&[b'x'; 512]).is_ok() {}
        rustix::io::ioctl_fionbio(&full, false).unwrap();
        sleep(Duration::from_millis(100));
        let began = Instant::now();
        signal(&child, Signal::TERM);
        assert_eq!(child.wait().unwrap().code(), Some(130));
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
        assert_eq!(saved(dir, "model"), steps(dir));
        drop(reader);
    }
}

/// As it is after a kill on a file system that cannot exchange folders.
#[test]
fn a_checkpoint_that_was_renamed_away_is_resumed() {
    let dir = folder();
    let dir = dir.path();
    let line = format!("train --data data --out model --steps 4 {TINY}");
    succeed(dir, &line);
    let rename_away = || fs::rename(dir.join("model"), dir.join(".model.mxt-old")).unwrap();
    rename_away();
    assert!(refuse(dir, &line).contains("already holds a checkpoint"));
    succeed(dir, "generate --checkpoint model --prompt x --tokens 1");
    succeed(dir, "train --resume model --steps 6");
    assert_eq!(saved(dir, "model"), 6);
    assert!(!dir.join(".model.mxt-old").exists());
    assert!(refuse(dir, "train --resume nowhere").contains("nowhere: no such folder"));
    assert!(refuse(dir, "train --resume data").contains("data: no checkpoint in it"));
}

#[test]
fn a_log_that_cannot_be_is_refused_without_a_trace() {
    let dir = folder();
    let dir = dir.path();
    for log in ["data", "text.txt/log.jsonl"] {
        let line = format!("train --data data --out model --log {log} --steps 4 {TINY}");
        assert!(refuse(dir, &line).contains("cannot open"));
        assert!(!dir.join("model").exists());
    }
}

#[test]
fn a_hangup_that_is_ignored_stays_ignored() {
    let dir = folder();
    let dir = dir.path();
    let program = env!("CARGO_BIN_EXE_mxtrain");
    let line = format!(
        "trap '' HUP; exec {program} train --data data --out model --log log.jsonl --steps 100000 {TINY}"
    );
    let child = start(dir, Command::new("sh").args(["-c", &line]));
    wait_for(|| steps(dir) > 2);
    signal(&child, Signal::HUP);
    let before = steps(dir);
    wait_for(|| steps(dir) > before + 200);
    interrupt(&child);
    assert_eq!(end(child).0, Some(130));
}

#[test]
fn what_fails_on_the_side_is_said_and_counted_and_does_not_end_the_run() {
    let dir = folder();
    let dir = dir.path();
    let raw = format!("train --train raw.bin --vocab-size 50 --out model --steps 40 {TINY}");
    let output = run(dir, &format!("{raw} --log /dev/full"));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{error}");
    let lost = "mxtrain: warning: a line of the log is lost: cannot write /dev/full";
    assert!(error.contains(lost), "{error}");
    assert!(error.lines().last().unwrap().ends_with("40 log lines lost"), "{error}");
    assert!(error.matches("warning").count() <= 2, "{error}");
    assert_eq!(saved(dir, "model"), 40);
    assert!(String::from_utf8(output.stdout).unwrap().contains("done: 40 steps"));

    // Data of this size are checked beside the training, so that a token outside of the vocabulary
    // shows in one of the evaluations.
    let mut large = File::create(dir.join("large.bin")).unwrap();
    large.set_len(300 << 20).unwrap();
    large.seek(SeekFrom::End(0)).unwrap();
    large.write_all(&60u16.to_le_bytes()).unwrap();
    let mut child = begin(
        dir,
        &format!(
            "train --train raw.bin --val large.bin --token-type u16 --vocab-size 50 --out model \
             --steps 1000000 --eval-every 10 --eval-batches 1 --log log.jsonl --overwrite {TINY}"
        ),
    );
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let failed = "mxtrain: warning: an evaluation failed: large.bin: token 60";
    assert!(lines.any(|line| line.starts_with(failed)));
    let before = steps(dir);
    wait_for(|| steps(dir) > before + 20);
    interrupt(&child);
    assert!(!lines.any(|line| line.starts_with(failed)), "it is said sparingly");
    assert_eq!(end(child).0, Some(130));
    assert_eq!(saved(dir, "model"), steps(dir));

    let mut full = mxtrain();
    full.args(format!("{raw} --overwrite").split_whitespace()).current_dir(dir);
    let full = full.stdout(File::create("/dev/full").unwrap()).output().unwrap();
    let error = String::from_utf8(full.stderr).unwrap();
    assert_eq!(full.status.code(), Some(3), "{error}");
    assert!(error.contains("a line of the output is lost: cannot write to standard"), "{error}");
    assert_eq!(saved(dir, "model"), 40);

    // Who has closed the other end of a pipe, of either stream, wants to see no more.
    let mut child = begin(dir, &format!("{raw} --overwrite"));
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(saved(dir, "model"), 40);
}

/// Whatever a run opens must not get a number below 3: what is printed would go there.
#[test]
fn a_run_without_standard_streams_is_a_run() {
    let dir = folder();
    let dir = dir.path();
    let program = env!("CARGO_BIN_EXE_mxtrain");
    let line = format!("train --data data --out model --log log.jsonl --steps 9 {TINY}");
    for closed in ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"] {
        let line = format!("exec {program} {line} --overwrite {closed}");
        let child = start(dir, Command::new("sh").args(["-c", &line]));
        let (code, out, error) = end(child);
        assert_eq!(code, Some(0), "{closed}: {out}{error}");
        assert_eq!((saved(dir, "model"), steps(dir)), (9, 9), "{closed}");
        succeed(dir, "generate --checkpoint model --tokens 1");
    }
}

/// Data are checked beside the training where they are large, so that their last token fails a
/// step.
#[test]
fn steps_before_one_that_fails_are_saved() {
    let dir = folder();
    let dir = dir.path();
    let mut large = File::create(dir.join("large.bin")).unwrap();
    large.set_len(257 << 20).unwrap();
    large.seek(SeekFrom::End(0)).unwrap();
    large.write_all(&60u16.to_le_bytes()).unwrap();
    let options = "--train large.bin --token-type u16 --vocab-size 50 --log log.jsonl";
    let output = run(dir, &format!("train {options} --out model --steps 100000000 {TINY}"));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    let last = error.lines().last().unwrap();
    assert!(last.starts_with("mxtrain: large.bin: token 60"), "{error}");
    // Another rate would not help.
    assert!(last.ends_with(&format!("; model holds step {}", steps(dir))), "{error}");
    assert_eq!(saved(dir, "model"), steps(dir));
}

/// A checkpoint can come from anyone.
#[test]
fn a_checkpoint_does_not_say_where_to_write() {
    let dir = folder();
    let dir = dir.path();
    succeed(dir, &format!("train --data data --out model --steps 3 --log log.jsonl {TINY}"));
    let out = succeed(dir, "train --resume model --steps 4");
    assert!(out.contains("left out    --log /") && out.contains("give it again"), "{out}");
    assert!(out.contains(&format!("data        {}", dir.join("data").display())), "{out}");
    assert_eq!(steps(dir), 3);
    // It is said once: from here on the run has none.
    assert!(!succeed(dir, "train --resume model --steps 5").contains("left out"));

    let path = dir.join("model/mxtrain.json");
    let mut file: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    fs::write(dir.join("victim"), "precious").unwrap();
    for (name, value) in [
        ("log", "../victim"),
        ("out", "elsewhere"),
        ("save-fallback", "elsewhere"),
        ("config", "victim"),
        ("\u{1b}[2J\nx", "1\n2"),
    ] {
        file["options"][name] = value.into();
    }
    fs::write(&path, file.to_string()).unwrap();
    let out = succeed(dir, "train --resume model --steps 6");
    assert_eq!(out.matches("left out ").count(), 5, "{out}");
    let shown = r"left out    --\u{1b}[2J\nx $'1\x0a2': a checkpoint";
    assert!(out.contains(shown) && !out.contains('\u{1b}'), "{out}");
    assert_eq!(fs::read_to_string(dir.join("victim")).unwrap(), "precious");
    assert!(!dir.join("elsewhere").exists());
    assert_eq!(saved(dir, "model"), 6);

    file["options"]["eval-every"] = "often".into();
    fs::write(&path, file.to_string()).unwrap();
    let error = refuse(dir, "train --resume model --steps 7");
    let expected = "model/mxtrain.json: invalid value 'often' for '--eval-every <N>'";
    assert!(error.starts_with(expected), "{error}");
}

/// A checkpoint that a run says it holds can be resumed.
#[test]
fn a_description_that_is_damaged_under_a_run_is_written_again() {
    let dir = folder();
    let dir = dir.path();
    let line = format!("train --data data --out model --log log.jsonl --steps 100000000 {TINY}");
    let child = begin(dir, &line);
    wait_for(|| steps(dir) >= 3);
    fs::write(dir.join("model/mxtrain.json"), "").unwrap();
    interrupt(&child);
    let (code, out, error) = end(child);
    assert_eq!(code, Some(130), "{out}{error}");
    let file: Value =
        serde_json::from_str(&fs::read_to_string(dir.join("model/mxtrain.json")).unwrap()).unwrap();
    assert!(file["files"]["tokenizer.json"].is_string(), "{file}");
    succeed(dir, &format!("train --resume model --steps {}", saved(dir, "model") + 1));
}

/// A checkpoint may be gigabytes: what a run goes on from in its own folder is not written again.
#[test]
fn a_resumed_run_does_not_save_what_its_folder_holds() {
    let dir = folder();
    let dir = dir.path();
    let state = || fs::metadata(dir.join("model/trainer.safetensors")).unwrap().ino();
    succeed(dir, &format!("train --data data --out model --steps 3 {TINY}"));
    for (change, is_saved) in [("", false), (" --new-schedule", true)] {
        let (before, held) = (state(), saved(dir, "model"));
        // As long as it is open its number is no other's.
        let _open = File::open(dir.join("model/trainer.safetensors")).unwrap();
        let _ = fs::remove_file(dir.join("log.jsonl"));
        let line = "train --resume model --log log.jsonl --steps 100000000 --save-every 0";
        let child = begin(dir, &format!("{line}{change}"));
        wait_for(|| steps(dir) > 2);
        assert_eq!(state() != before, is_saved, "{change}");
        interrupt(&child);
        let (code, out, error) = end(child);
        assert_eq!(code, Some(130), "{out}{error}");
        assert!(state() != before && saved(dir, "model") == held + steps(dir), "{out}");
    }
}

/// Saves that the run does not wait for are those of their steps, however it ends.
#[test]
fn saves_in_the_background_are_whole() {
    let dir = folder();
    let dir = dir.path();
    let files = |name: &str| {
        ["model.safetensors", "trainer.safetensors", "trainer.json", "mxtrain.json"]
            .map(|file| fs::read(dir.join(name).join(file)).unwrap())
    };
    let line =
        |name: &str| format!("train --data data --out {name} --steps 9 --save-every 1 {TINY}");
    succeed(dir, &line("model"));
    let waited = files("model");
    succeed(dir, &format!("{} --save-in-background --overwrite", line("model")));
    assert!(files("model") == waited);

    let line = "train --data data --out model --overwrite --log log.jsonl --steps 100000000 \
                --save-every 2 --save-in-background";
    let child = begin(dir, &format!("{line} {TINY}"));
    let tasks = format!("/proc/{}/task", child.id());
    wait_for(|| {
        let mut tasks = fs::read_dir(&tasks).unwrap().flatten();
        let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm"));
        tasks.any(|task| name(task).is_ok_and(|name| name == "save\n"))
    });
    wait_for(|| steps(dir) > 9);
    interrupt(&child);
    let (code, out, error) = end(child);
    assert_eq!(code, Some(130), "{out}{error}");
    let resume = "train --resume model --log log.jsonl --save-in-background";
    assert!(out.contains(&format!("go on with: mxtrain {resume}\n")), "{out}");
    assert_eq!(saved(dir, "model"), steps(dir));

    // One that fails is made up for beside it, and by the next that does not.
    let mut child = begin(dir, &format!("{resume} --steps 100000000 --save-every 2"));
    let before = steps(dir);
    wait_for(|| steps(dir) > before + 4);
    fs::rename(dir.join("model"), dir.join("away")).unwrap();
    fs::write(dir.join("model"), "in the way").unwrap();
    wait_for(|| beside(dir).is_some());
    fs::remove_file(dir.join("model")).unwrap();
    fs::rename(dir.join("away"), dir.join("model")).unwrap();
    wait_for(|| beside(dir).is_none());
    signal(&child, Signal::KILL);
    child.wait().unwrap();
    let until = saved(dir, "model") + 3;
    succeed(dir, &format!("train --resume model --steps {until}"));
    assert_eq!(saved(dir, "model"), until);
}

/// A log in the run's own folder leads nowhere else, so it goes on without a word.
#[test]
fn a_log_in_the_folder_goes_on_by_itself() {
    let dir = folder();
    let dir = dir.path();
    let lines = || fs::read_to_string(dir.join("model/log.jsonl")).unwrap().lines().count();
    succeed(dir, &format!("train --data data --out model --steps 3 --log model/log.jsonl {TINY}"));
    let before = lines();
    let error = refuse(dir, "train --resume model --save-fallback raw.bin --steps 5");
    assert!(error.starts_with("--save-fallback: expected a folder"), "{error}");
    let error = refuse(dir, "train --resume model --log ./model/trainer.json --steps 5");
    assert!(
        error.starts_with("--log: ./model/trainer.json is a file of the checkpoint"),
        "{error}"
    );
    let out = succeed(dir, "train --resume model --steps 5");
    assert!(!out.contains("left out") && lines() > before + 1, "{out}");
    let before = lines();
    // One that is saved elsewhere does not touch the folder.
    let out = succeed(dir, "train --resume model --out other --steps 7");
    assert!(out.contains("left out    --log log.jsonl: ") && lines() == before, "{out}");

    fs::write(dir.join("victim"), "{\"type\":").unwrap();
    fs::remove_file(dir.join("model/log.jsonl")).unwrap();
    std::os::unix::fs::symlink("../victim", dir.join("model/log.jsonl")).unwrap();
    assert!(
        succeed(dir, "train --resume model --steps 7").contains("left out    --log log.jsonl: ")
    );
    assert_eq!(fs::read_to_string(dir.join("victim")).unwrap(), "{\"type\":");
}

/// As after a kill between the first save and what comes behind it.
#[test]
fn a_run_that_replaces_another_never_has_its_description() {
    let dir = folder();
    let dir = dir.path();
    succeed(dir, &format!("train --data data --out model --steps 3 {TINY}"));
    let names = ["mxtrain.json", "tokenizer.json", "tokenizer_config.json"];
    let before = names.map(|name| fs::read(dir.join("model").join(name)).unwrap());
    let raw = format!("--train raw.bin --vocab-size 50 --out model --overwrite --steps 2 {TINY}");

    // Nothing is replaced, so nothing is lost.
    let line = format!("ulimit -f 4; exec {} train {raw}", env!("CARGO_BIN_EXE_mxtrain"));
    let child = start(dir, Command::new("sh").args(["-c", &line]));
    let (code, _, error) = end(child);
    assert_eq!(code, Some(1), "{error}");
    assert!(error.contains("File too large"), "{error}");
    assert_eq!(names.map(|name| fs::read(dir.join("model").join(name)).unwrap()), before);
    assert_eq!(saved(dir, "model"), 3);

    // The weights are, and then comes the end.
    fs::create_dir_all(dir.join("model/mxtrain.json.tmp/in the way")).unwrap();
    let error = run(dir, &format!("train {raw}")).stderr;
    let error = String::from_utf8(error).unwrap();
    assert!(error.contains("cannot write model/mxtrain.json"), "{error}");
    assert_eq!(saved(dir, "model"), 0);
    assert!(names.iter().all(|name| !dir.join("model").join(name).exists()));
}

#[test]
fn a_checkpoint_that_cannot_be_saved_goes_beside_until_it_can() {
    let dir = folder();
    let dir = dir.path();
    let line = format!(
        "train --data data --out model --log log.jsonl --steps 1000000 --save-every 20 {TINY}"
    );
    let child = begin(dir, &line);
    wait_for(|| steps(dir) >= 3);
    fs::rename(dir.join("model"), dir.join("away")).unwrap();
    fs::write(dir.join("model"), "in the way").unwrap();
    wait_for(|| beside(dir).is_some_and(|name| dir.join(name).join("mxtrain.json").exists()));
    // One that it made before is not kept, one by another is.
    let first = beside(dir).unwrap();
    fs::create_dir(dir.join("model.step-0")).unwrap();
    wait_for(|| !dir.join(&first).exists());
    assert!(beside(dir).is_some());
    fs::remove_file(dir.join("model")).unwrap();
    wait_for(|| beside(dir).unwrap() == "model.step-0");
    interrupt(&child);
    let (code, out, error) = end(child);
    assert_eq!(code, Some(130), "{out}{error}");
    assert!(
        error.contains("mxtrain: warning: model: expected a folder or a new name, found a file")
    );
    let resume = "go on from it with: mxtrain train --resume ";
    assert!(error.contains(resume) && error.contains("is saved in model again"), "{error}");
    assert_eq!(saved(dir, "model"), steps(dir));
    // The folder was made anew, with all that a resumed run needs.
    let until = steps(dir) + 2;
    succeed(dir, &format!("train --resume model --steps {until}"));

    // It cannot be saved at the end, either.
    fs::remove_file(dir.join("log.jsonl")).unwrap();
    let child = begin(dir, &format!("{line} --overwrite"));
    wait_for(|| steps(dir) >= 3);
    // At once, as a save may come in between.
    fs::write(dir.join("block"), "in the way").unwrap();
    let exchange = rustix::fs::RenameFlags::EXCHANGE;
    let [block, model] = ["block", "model"].map(|name| dir.join(name));
    rustix::fs::renameat_with(rustix::fs::CWD, block, rustix::fs::CWD, model, exchange).unwrap();
    interrupt(&child);
    let (code, out, error) = end(child);
    assert_eq!(code, Some(1), "{out}{error}");
    let last = beside(dir).unwrap();
    let held = format!("{last} holds step {}", steps(dir));
    assert!(error.lines().last().unwrap().ends_with(&held), "{error}");
    assert_eq!(saved(dir, &last), steps(dir));
    succeed(dir, &format!("train --resume {last} --steps {}", steps(dir) + 2));
}

/// The disk is full for a while: neither the log nor a checkpoint can be written anywhere.
#[test]
fn a_full_disk_is_waited_out() {
    let dir = folder();
    let dir = dir.path();
    let line = format!(
        "train --data data --out model --log log.jsonl --steps 1000000 --save-every 20 {TINY}"
    );
    let mut child = begin(dir, &line);
    let errors = BufReader::new(child.stderr.take().unwrap());
    let (send, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || errors.lines().for_each(|line| send.send(line.unwrap()).unwrap()));
    // In whatever order: a save may have been at work when the disk became full.
    let wait_for_lines = |parts: [&str; 3]| {
        let mut text = String::new();
        while !parts.iter().all(|part| text.contains(part)) {
            match lines.recv_timeout(Duration::from_secs(60)) {
                Ok(line) => text += &(line + "\n"),
                Err(e) => panic!("{e}, behind {text}"),
            }
        }
    };
    wait_for(|| steps(dir) >= 30);
    let limit = |bytes| {
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let limit = Rlimit { current: bytes, maximum: None };
        prlimit(pid, Resource::Fsize, limit).unwrap();
    };
    limit(Some(1000));
    wait_for_lines([
        "a line of the log is lost",
        "could not be saved: cannot write",
        "warning: no save is possible, 2 in a row have failed; model holds step ",
    ]);
    let last = saved(dir, "model");
    limit(None);
    wait_for(|| saved(dir, "model") > last);
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    // Only the line that the full disk tore is none.
    let text = fs::read_to_string(dir.join("log.jsonl")).unwrap();
    let torn = text.lines().filter(|line| serde_json::from_str::<Value>(line).is_err()).count();
    assert!(torn <= 1, "{torn} lines");
    assert!(steps(dir) < saved(dir, "model"));
    assert_eq!(beside(dir), None);
}

#[test]
fn a_third_place_can_be_named() {
    let dir = folder();
    let dir = dir.path();
    let child = begin(
        dir,
        &format!(
            "train --data data --out a/model --log log.jsonl --steps 1000000 --save-every 20 \
             --save-fallback third {TINY}"
        ),
    );
    wait_for(|| steps(dir) >= 3);
    fs::rename(dir.join("a"), dir.join("away")).unwrap();
    fs::write(dir.join("a"), "in the way").unwrap();
    wait_for(|| dir.join("third").exists());
    interrupt(&child);
    let (code, _, error) = end(child);
    assert_eq!(code, Some(1), "{error}");
    let name = fs::read_dir(dir.join("third")).unwrap().next().unwrap().unwrap().file_name();
    let place = format!("third/{}", name.to_string_lossy());
    assert_eq!(saved(dir, &place), steps(dir), "{error}");
}

#[test]
fn a_second_run_is_refused_and_a_killed_one_is_none() {
    let dir = folder();
    let dir = dir.path();
    let line = format!("train --data data --out model --steps 1000000 --save-every 5 {TINY}");
    let mut child = begin(dir, &format!("{line} --log log.jsonl"));
    wait_for(|| steps(dir) >= 12);
    let holder = format!("another run (process {} on ", child.id());
    // Again and again, as the folder is replaced meanwhile.
    for _ in 0..5 {
        for second in ["train --resume model", &format!("{line} --overwrite")] {
            let error = refuse(dir, second);
            assert!(error.contains(&holder) && error.contains("is using model"), "{error}");
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let until = saved(dir, "model") + 2;
    succeed(dir, &format!("train --resume model --steps {until}"));
    assert_eq!(saved(dir, "model"), until);
    assert!(!dir.join("model/.mxt-lock").exists());
}

/// Between the moment that a save counts and the last move of its files, the folder's own files are
/// those of the save before.
#[test]
fn a_save_that_a_kill_cut_off_is_told_of_as_it_is_resumed() {
    let dir = folder();
    let dir = dir.path();
    succeed(dir, &format!("train --data data --out model --steps 3 --save-every 3 {TINY}"));
    succeed(dir, &format!("train --data data --out later --steps 5 --save-every 5 {TINY}"));
    let commit = dir.join("model/.mxt-commit");
    fs::create_dir(&commit).unwrap();
    let mut names = String::new();
    for name in ["config.json", "model.safetensors", "trainer.json", "trainer.safetensors"] {
        fs::copy(dir.join("later").join(name), commit.join(name)).unwrap();
        names.push_str(name);
        names.push('\n');
    }
    fs::write(commit.join("names"), names).unwrap();
    assert_eq!(saved(dir, "model"), 5);
    succeed(dir, "train --resume model --steps 6");
    assert_eq!(saved(dir, "model"), 6);
    assert!(!commit.exists());
}

#[test]
fn the_current_folder_and_one_with_folders_in_it_can_be_saved_to() {
    let dir = folder();
    let here = dir.path().join("here");
    fs::create_dir(&here).unwrap();
    succeed(&here, &format!("train --data ../data --out . --steps 3 --save-every 1 {TINY}"));
    fs::create_dir(here.join("samples")).unwrap();
    succeed(&here, "train --resume . --steps 5");
    assert_eq!(saved(&here, "."), 5);
    succeed(dir.path(), "train --resume here --steps 7");
    assert_eq!(saved(dir.path(), "here"), 7);
    let mut names: Vec<_> = fs::read_dir(&here)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let files = [
        "config.json",
        "model.safetensors",
        "mxtrain.json",
        "samples",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer.json",
        "trainer.safetensors",
    ];
    assert_eq!(names, files);
}
