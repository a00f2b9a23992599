//! Runs of several processes.

mod common;

use std::fs;
use std::path::Path;
use std::process::Child;

use common::{end, failed, interrupt, mxtrain, refuse, run, start, succeed, wait_for};

const MODEL: &str = "--train raw.bin --val raw.bin --vocab-size 64 --layers 1 --heads 2 --channels 32 \
                     --context 16 --batch-size 2 --device cpu --eval-batches 3";

fn data(dir: &Path) {
    let tokens = (0..4000u32).flat_map(|i| ((i * i % 61) as u16).to_le_bytes());
    fs::write(dir.join("raw.bin"), tokens.collect::<Vec<_>>()).unwrap();
}

/// The processes that a run has started.
fn followers(child: &Child) -> Vec<String> {
    let path = format!("/proc/{0}/task/{0}/children", child.id());
    let children = fs::read_to_string(path).unwrap_or_default();
    children.split_whitespace().map(str::to_owned).collect()
}

fn is_there(pid: &str) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !status.is_empty() && !status.contains(") Z ")
}

fn steps(log: &Path) -> Vec<String> {
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines().map(|line| line.split(",\"seconds\"").next().unwrap().to_owned()).collect()
}

/// One process, two and four: the same log, the same checkpoint; and they go on from one another.
#[test]
fn any_number_of_processes_makes_the_same_run() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    data(dir);
    for ranks in [1, 2, 4] {
        let line = format!(
            "train {MODEL} --steps 6 --eval-every 2 --lanes 4 --ranks {ranks} --out {ranks} --log \
             {ranks}.jsonl --sharpness 1e-3"
        );
        succeed(dir, &line);
        assert_eq!(steps(&dir.join("1.jsonl")), steps(&dir.join(format!("{ranks}.jsonl"))));
        for file in ["model.safetensors", "trainer.safetensors", "trainer.json"] {
            let of = |ranks: i32| fs::read(dir.join(ranks.to_string()).join(file)).unwrap();
            assert!(of(1) == of(ranks), "{file} of {ranks}");
        }
    }
    for (ranks, how) in [(2, ""), (4, "--save-every 2 --save-in-background")] {
        let line = format!(
            "train {MODEL} --steps 6 --eval-every 2 --lanes 4 --ranks {ranks} --out sharded --log \
             sharded.jsonl --sharpness 1e-3 --shard-states {how}"
        );
        succeed(dir, &line);
        assert_eq!(steps(&dir.join("1.jsonl")), steps(&dir.join("sharded.jsonl")));
        for file in ["model.safetensors", "trainer.safetensors", "trainer.json"] {
            let of = |name: &str| fs::read(dir.join(name).join(file)).unwrap();
            assert!(of("1") == of("sharded"), "{file} of {ranks}");
        }
        fs::remove_dir_all(dir.join("sharded")).unwrap();
        fs::remove_file(dir.join("sharded.jsonl")).unwrap();
    }
    succeed(dir, &format!("train {MODEL} --steps 3 --lanes 4 --out moved --lr 1e-3"));
    succeed(dir, &format!("train {MODEL} --steps 6 --schedule constant --lanes 4 --out straight"));
    succeed(dir, &format!("train {MODEL} --steps 3 --schedule constant --ranks 4 --out moved2"));
    succeed(dir, "train --resume moved2 --steps 5 --ranks 2 --device cpu");
    succeed(dir, "train --resume moved2 --steps 6 --device cpu");
    let weights = |name: &str| fs::read(dir.join(name).join("model.safetensors")).unwrap();
    assert!(weights("straight") == weights("moved2"));
    let refused = run(dir, "train --resume moved2 --steps 7 --ranks 3 --device cpu");
    assert_eq!(
        failed(&refused, "train"),
        "--lanes: a step is the sum of 4, which 3 ranks cannot share and get the same bits; ranks may \
         be 1, 2, 4"
    );
}

/// A wire changes what is learnt a little; ranks say so alike, and a run that is repeated is the same.
#[test]
fn gradients_may_be_sent_in_less() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    data(dir);
    let losses = |name: &str, wire: &str| {
        let log = format!("{name}.jsonl");
        let line = format!("train {MODEL} --steps 4 --ranks 2 --out {name} --log {log} {wire}");
        succeed(dir, &line);
        steps(&dir.join(log))
    };
    let plain = losses("plain", "");
    let rounded = losses("rounded", "--gradient-wire mxfp4");
    assert!(plain != rounded && rounded == losses("again", "--gradient-wire mxfp4 --shard-states"));
    // Whoever stops such a run is told how to go on with it.
    let child = long_run_with(dir, "--gradient-wire fp8");
    interrupt(&child);
    let (_, out, error) = end(child);
    assert!(out.contains("--ranks 3 --gradient-wire fp8"), "{out}{error}");
}

#[test]
fn what_one_rank_takes_is_planned() {
    let dir = tempfile::tempdir().unwrap();
    let plan = |of: &str| -> serde_json::Value {
        let line = format!("plan --layers 8 --channels 64 --threads 1 --json {of}");
        let mut plan: serde_json::Value =
            serde_json::from_str(&succeed(dir.path(), &line)).unwrap();
        // What the machine has free changes from one call to the next.
        plan.as_object_mut().unwrap().remove("available");
        plan
    };
    let (alone, whole) = (plan(""), plan("--ranks 4"));
    assert_eq!(alone, whole);
    let sharded = plan("--ranks 4 --shard-states");
    let optimizer = |plan: &serde_json::Value| plan["optimizer"].as_f64().unwrap();
    assert!(optimizer(&sharded) < 0.3 * optimizer(&whole), "{sharded} {whole}");
    assert_eq!(sharded["gradients"], whole["gradients"]);
    let joined = plan("--ranks 2 --lanes 8");
    assert_eq!(joined["exchange"].as_f64(), Some(2.0 * whole["gradients"].as_f64().unwrap()));
    let message = refuse(dir.path(), "plan --shard-states");
    assert!(message.contains("not provided: --ranks"), "{message}");
    for alone in ["--shard-states", "--gradient-wire fp8", "--transport host"] {
        let message = refuse(dir.path(), &format!("train --data data --out x {alone}"));
        assert!(message.contains("not provided"), "{message}");
    }
}

#[test]
fn what_cannot_be_is_refused_before_any_process_starts() {
    let dir = tempfile::tempdir().unwrap();
    data(dir.path());
    for (line, expected) in [
        ("--ranks 0", "expected a number from 1 to 64"),
        ("--ranks 65", "expected a number from 1 to 64"),
        ("--ranks 2 --gpus 2", "cannot be used with"),
        ("--gpus 2", "cannot be used with"),
    ] {
        let message = refuse(dir.path(), &format!("train {MODEL} --out x {line}"));
        assert!(message.contains(expected), "{line}: {message}");
    }
    for (line, expected) in [
        ("--ranks 2 --accumulation 3", "--accumulation: expected a multiple of 2, the lanes"),
        ("--ranks 2 --lanes 3 --accumulation 3", "ranks may be 1, 3"),
        ("--ranks 2 --heads 3", "3 heads do not divide"),
        ("--ranks 2 --transport nccl", "use transport auto or host"),
        ("--ranks 2 --transport rdma", "expected auto, host, nccl or peer"),
        ("--ranks 2 --gradient-wire int8", "expected f32, bf16, fp8 or mxfp4"),
        (
            "--ranks 2 --shard-states --optimizer stable-adamw",
            "--shard-states: expected adamw or muon, without ramping, got stable-adamw",
        ),
    ] {
        let message = refuse(dir.path(), &format!("train {MODEL} --out x {line}"));
        assert!(message.contains(expected), "{line}: {message}");
        assert!(!dir.path().join("x").exists());
    }
}

/// What a process that is killed has kept alone is lost, and it is said how to go on.
#[test]
fn a_process_that_is_killed_takes_its_states() {
    let dir = tempfile::tempdir().unwrap();
    data(dir.path());
    let child = long_run_with(dir.path(), "--shard-states --save-every 5");
    wait_for(|| steps(&dir.path().join("log")).len() > 12);
    let victim = &followers(&child)[0];
    assert!(std::process::Command::new("kill").args(["-9", victim]).status().unwrap().success());
    let (code, _, error) = end(child);
    assert_eq!(code, Some(1), "{error}");
    assert!(error.contains("is lost with the states that another process kept"), "{error}");
    let (_, command) = error.split_once("go on with: mxtrain ").expect("a command");
    let command = command.split([';', '\n']).next().unwrap();
    let (_, step) = error.rsplit_once("x holds step ").expect("a step");
    let step: u64 = step.trim().parse().expect("a number");
    succeed(dir.path(), &format!("{command} --steps {} --device cpu", step + 3));
}

/// A run that goes on for long, when it has begun.
fn long_run(dir: &Path) -> Child {
    long_run_with(dir, "")
}

fn long_run_with(dir: &Path, how: &str) -> Child {
    let line =
        format!("train {MODEL} --steps 1000000 --eval-every 0 --ranks 3 --out x --log log {how}");
    let child = start(dir, mxtrain().args(line.split_whitespace()));
    wait_for(|| !steps(&dir.join("log")).is_empty());
    child
}

#[test]
fn all_processes_stop_at_one_step() {
    let dir = tempfile::tempdir().unwrap();
    data(dir.path());
    let child = long_run(dir.path());
    let others = followers(&child);
    assert_eq!(others.len(), 2);
    interrupt(&child);
    let (code, out, error) = end(child);
    assert_eq!(code, Some(130), "{error}");
    assert!(out.contains("stopped at step"), "{out}");
    assert!(!others.iter().any(|pid| is_there(pid)));
}

/// Killed: whichever it is, none is left, and the checkpoint is that of the last step.
#[test]
fn a_process_that_is_killed_ends_the_run() {
    for victim in [0, 1, 2] {
        let dir = tempfile::tempdir().unwrap();
        data(dir.path());
        let child = long_run(dir.path());
        let others = followers(&child);
        let pid = if victim == 0 { child.id().to_string() } else { others[victim - 1].clone() };
        assert!(std::process::Command::new("kill").args(["-9", &pid]).status().unwrap().success());
        let (code, _, error) = end(child);
        wait_for(|| !others.iter().any(|pid| is_there(pid)));
        if victim > 0 {
            assert_eq!(code, Some(1));
            // One that misses it may be missed first, but has nothing to say of itself.
            let expected = format!("mxtrain: rank {victim}: its process has ended: signal: 9");
            let lines: Vec<_> =
                error.lines().filter(|line| line.starts_with("mxtrain: ")).collect();
            assert!(lines.len() == 2 && lines[0].starts_with(&expected), "{error}");
            assert!(lines[1].contains("is gone; x holds step"), "{error}");
            // No step is lost.
            let done = steps(&dir.path().join("log")).len();
            assert!(lines[1].ends_with(&format!("x holds step {done}")), "{error}");
        }
        succeed(dir.path(), "info x");
    }
}

/// Processes that a launcher starts find each other over a network.
#[test]
fn launched_processes_make_the_same_run() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    data(dir);
    succeed(dir, &format!("train {MODEL} --steps 5 --lanes 4 --out alone --log alone.jsonl"));
    for (size, names) in [
        (2, ["RANK", "WORLD_SIZE"]),
        (4, ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"]),
        (1, ["PMI_RANK", "PMI_SIZE"]),
    ] {
        // A port that is free now.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let line = format!(
            "train {MODEL} --steps 5 --lanes 4 --out {size} --log {size}.jsonl --group env \
             --rendezvous localhost:{port}"
        );
        let launch = |rank: usize| {
            let mut command = mxtrain();
            command.args(line.split_whitespace());
            command.env(names[0], rank.to_string()).env(names[1], size.to_string());
            start(dir, &mut command)
        };
        // The last first: others wait for rank 0.
        let all: Vec<_> = (0..size).rev().map(launch).collect();
        for child in all {
            let (code, _, error) = end(child);
            assert_eq!(code, Some(0), "{error}");
        }
        assert_eq!(steps(&dir.join("alone.jsonl")), steps(&dir.join(format!("{size}.jsonl"))));
        for file in ["model.safetensors", "trainer.safetensors", "trainer.json"] {
            let of = |name: &str| fs::read(dir.join(name).join(file)).unwrap();
            assert!(of("alone") == of(&size.to_string()), "{file} of {size}");
        }
    }
    for (line, expected) in [
        ("--group env", "started by one of torchrun (RANK, WORLD_SIZE), Open MPI"),
        ("--group mpi", "invalid value"),
        ("--rendezvous x:1", "required"),
        ("--group env --rendezvous x", "expected HOST:PORT"),
    ] {
        let message = refuse(dir, &format!("train {MODEL} --out x {line}"));
        assert!(message.contains(expected), "{line}: {message}");
    }
    let mut command = mxtrain();
    command.args(format!("train {MODEL} --out x --group env").split_whitespace());
    let (_, _, error) = end(start(dir, command.env("RANK", "0").env("WORLD_SIZE", "2")));
    assert!(error.contains("--rendezvous HOST:PORT is missing"), "{error}");
}

/// A run that loses a process goes on by itself, and ends as one that lost none.
#[test]
fn a_run_begins_again_after_a_loss() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    data(dir);
    let line = |name: &str, more: &str| {
        format!(
            "train {MODEL} --steps 1000 --eval-every 0 --save-every 50 --out {name} --log {name}.jsonl \
             --lanes 2 {more}"
        )
    };
    let restarted = line("restarted", "--ranks 2 --restarts 2");
    let child = start(dir, mxtrain().args(restarted.split_whitespace()));
    for kill in 1..3 {
        let log = dir.join("restarted.jsonl");
        wait_for(|| steps(&log).len() > 300 * kill && followers(&child).len() == 1);
        let victim = followers(&child).remove(0);
        assert!(
            std::process::Command::new("kill").args(["-9", &victim]).status().unwrap().success()
        );
        wait_for(|| !is_there(&victim));
    }
    let (code, out, error) = end(child);
    assert_eq!(code, Some(0), "{error}");
    assert_eq!(error.matches("begins again from restarted").count(), 2, "{error}");
    assert!(out.contains("done: 1,000 steps"), "{out}");
    succeed(dir, &line("straight", ""));
    for file in ["model.safetensors", "trainer.safetensors", "trainer.json"] {
        let of = |name: &str| fs::read(dir.join(name).join(file)).unwrap();
        assert!(of("restarted") == of("straight"), "{file}");
    }
    let message = refuse(dir, &format!("train {MODEL} --out x --group env --restarts 1"));
    assert!(message.contains("cannot be used with"), "{message}");
}

/// Before they have met, too: nobody stays, and no folder.
#[test]
fn an_end_while_ranks_meet_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, meeting) = (dir.path(), dir.path().join("meeting"));
    data(dir);
    fs::create_dir(&meeting).unwrap();
    let line = format!("train {MODEL} --steps 2 --out x --overwrite --ranks 4");
    for (round, signal) in ["-INT", "-TERM", "-9"].iter().cycle().take(30).enumerate() {
        let mut command = mxtrain();
        let child = start(dir, command.args(line.split_whitespace()).env("TMPDIR", &meeting));
        std::thread::sleep(std::time::Duration::from_millis(2 + round as u64));
        let others = followers(&child);
        let pid = child.id().to_string();
        // It may be done already.
        let _ = std::process::Command::new("kill").args([*signal, &pid]).status().unwrap();
        end(child);
        wait_for(|| !others.iter().any(|pid| is_there(pid)));
        if *signal == "-9" {
            let _ = fs::remove_dir_all(&meeting);
            fs::create_dir(&meeting).unwrap();
        }
        let left: Vec<_> = fs::read_dir(&meeting).unwrap().flatten().map(|e| e.path()).collect();
        assert!(left.is_empty(), "{round}, {signal}: {left:?}");
    }
    for text in ["1 0 x", "5 2 x", "x", "0 2 /tmp", "1 100000000000 x"] {
        let mut command = mxtrain();
        command.args(line.split_whitespace()).env("MXTRAIN_RANK", text);
        let (code, _, error) = end(start(dir, &mut command));
        assert!(code == Some(2) && error.contains("MXTRAIN_RANK: is set by"), "{text}: {error}");
    }
}
