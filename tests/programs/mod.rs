//! Compiles C and C++ programs against the header and the library that cargo built, and runs them.

// Each test file takes what it needs.
#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The flag that links gcc's and clang's address and undefined behaviour sanitizers.
pub(crate) const SANITIZE: &str = "-fsanitize=address,undefined";

/// How programs are compiled.
#[derive(Clone, Copy)]
pub(crate) struct Compiler<'a> {
    /// Such as `g++`.
    pub(crate) command: &'a str,
    /// Such as `-std=c++17`.
    pub(crate) standard: &'a str,
    /// Flags beside the warnings, which are all on and errors.
    pub(crate) flags: &'a [&'a str],
}

impl Compiler<'_> {
    /// Makes a program in `dir` from `sources`, linked with the shared library through its SONAME.
    pub(crate) fn program(&self, sources: &[PathBuf], dir: &Path) -> PathBuf {
        // The loader looks for the SONAME, which only an installed library has as a file.
        let installed = dir.join("libmxfp4train.so.0");
        if !installed.exists() {
            std::os::unix::fs::symlink(library(), &installed).expect("a link can be made");
        }
        let program = dir.join("program");
        let mut command = Command::new(self.command);
        command.args([self.standard, "-O1", "-g", "-pthread"]);
        command.args(["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"]);
        command.args(self.flags);
        for include in ["include", "bindings/cpp"] {
            command.arg("-I").arg(root().join(include));
        }
        command.args(sources).arg(installed).arg(format!("-Wl,-rpath,{}", dir.display()));
        command.arg("-o").arg(&program).arg("-lm");
        let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}:\n{text}");
        program
    }
}

/// Runs a program to its end, which a deadlock must not keep from coming.
pub(crate) fn finish(command: &mut Command) -> Output {
    const LIMIT: Duration = Duration::from_secs(240);
    // NOTE: to files, not to pipes, which a program that writes a lot would fill and wait for.
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [stdout, stderr] = ["stdout", "stderr"].map(|name| dir.path().join(name));
    let create = |path: &Path| fs::File::create(path).expect("a file can be made");
    command.stdin(Stdio::null()).stdout(create(&stdout)).stderr(create(&stderr));
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            break status;
        }
        if start.elapsed() > LIMIT {
            let _ = child.kill();
            panic!("{command:?} did not end in {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let [stdout, stderr] = [stdout, stderr].map(|path| fs::read(path).expect("a file of ours"));
    Output { status, stdout, stderr }
}

/// Runs a program that must succeed; what it wrote to stdout.
pub(crate) fn succeed(command: &mut Command) -> String {
    let output = finish(command);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}{errors}", output.status);
    assert!(errors.is_empty(), "{command:?} wrote to stderr:\n{errors}");
    text
}

/// Whether a tool can be started. Where it cannot, this says which test is skipped for the lack of
/// it, except in CI, which has to have it.
pub(crate) fn have(tool: &str, what_for: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        let message = format!("{tool} is not installed: {what_for}");
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{message}");
        eprintln!("skipped: {message}");
    }
    found
}

/// Writes a token file of a sentence, over and over, for a program to train on.
pub(crate) fn write_tokens(path: &Path) {
    let text = b"Humpty Dumpty sat on a wall, Humpty Dumpty had a great fall; ";
    let tokens = text.iter().cycle().take(6000);
    let bytes: Vec<u8> = tokens.flat_map(|&byte| u16::from(byte).to_le_bytes()).collect();
    fs::write(path, bytes).expect("the file can be written");
}

/// The shared library that cargo built for this test: it lies beside the test's own program.
pub(crate) fn library() -> PathBuf {
    let program = std::env::current_exe().expect("the test knows its path");
    let path = program.with_file_name("libmxfp4train.so");
    assert!(path.exists(), "{} is not there; run through cargo test", path.display());
    path
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}
