//! What the tests of the built program share.
// Each test file uses a part of it, as a module of its own.
#![allow(dead_code, unreachable_pub)]

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// The built program.
pub fn mxtrain() -> Command {
    Command::new(env!("CARGO_BIN_EXE_mxtrain"))
}

/// Runs the program in `dir` with a line of arguments that hold no spaces.
pub fn run(dir: &Path, line: &str) -> Output {
    run_args(dir, line.split_whitespace())
}

/// Runs the program in `dir`.
pub fn run_args(dir: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Output {
    mxtrain().current_dir(dir).args(args).output().expect("the program starts")
}

/// Standard output of a run that must succeed.
pub fn succeed(dir: &Path, line: &str) -> String {
    let output = run(dir, line);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "mxtrain {line}: {:?}: {error}", output.status);
    String::from_utf8(output.stdout).expect("output is UTF-8")
}

/// The line on standard error of a run that must fail with exit code 2.
pub fn refuse(dir: &Path, line: &str) -> String {
    failed(&run(dir, line), line)
}

/// The line on standard error of a run that failed with exit code 2.
pub fn failed(output: &Output, line: &str) -> String {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "mxtrain {line}: {error}");
    assert_eq!(error.lines().count(), 1, "mxtrain {line}: {error}");
    // Only `train` may have said what it is about to do.
    assert!(
        output.stdout.is_empty() || line.starts_with("train") || line.starts_with("finetune"),
        "mxtrain {line}"
    );
    error.trim_end().strip_prefix("mxtrain: ").expect("the line names the program").to_owned()
}

/// The tokens of a file in llm.c's format, whose header must be right.
pub fn tokens(path: &Path) -> Vec<u16> {
    let bytes = std::fs::read(path).expect("the token file exists");
    let int = |i: usize| i32::from_le_bytes(bytes[i * 4..][..4].try_into().unwrap());
    let tokens: Vec<u16> =
        bytes[1024..].chunks_exact(2).map(|t| u16::from_le_bytes([t[0], t[1]])).collect();
    assert_eq!((int(0), int(1)), (20240520, 1));
    assert_eq!(int(2) as usize, tokens.len());
    assert!(bytes[12..1024].iter().all(|&b| b == 0));
    assert_eq!(bytes.len(), 1024 + 2 * tokens.len());
    tokens
}

/// Starts a command in `dir` without waiting for it.
pub fn start(dir: &Path, command: &mut Command) -> Child {
    command.current_dir(dir).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Sends Ctrl-C.
pub fn interrupt(child: &Child) {
    signal(child, Signal::INT);
}

pub fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// The end of a started program: its exit code, standard output and standard error.
pub fn end(child: Child) -> (Option<i32>, String, String) {
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// Waits for what a started program brings about.
pub fn wait_for(condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(60), "it never came to that");
        sleep(Duration::from_millis(2));
    }
}
