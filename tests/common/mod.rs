//! What tests that build C and C++ programs share: compilers, the library that cargo built, and
//! programs that have to end, succeed and be silent.

// Every test program uses a part of it.
#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// What a program is linked with.
#[derive(Clone, Copy)]
pub(crate) enum Link {
    Shared,
    Static,
    /// The static library that `dev/static-library.sh` makes.
    Packed,
    /// Nothing: the program loads the library itself.
    None,
}

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
            std::os::unix::fs::symlink(library("so"), &installed).expect("a link can be made");
        }
        let program = dir.join("program");
        let mut command = Command::new(self.command);
        command.args([self.standard, "-O1", "-g", "-pthread"]);
        command.args(["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"]);
        command.args(self.flags);
        for include in ["include", "bindings/cpp"] {
            command.arg("-I").arg(root().join(include));
        }
        command.args(sources).arg(installed).arg(search(dir));
        command.arg("-o").arg(&program).arg("-lm");
        succeed(&mut command);
        program
    }
}

/// Builds and runs a program of `tests/c` with an empty folder as its argument. It must succeed
/// and, because the library is silent, leave stdout and stderr empty.
pub(crate) fn run(name: &str, link: Link) {
    run_with(name, link, &[], &[]);
}

/// [`run`] with flags for the compiler, and under the program `wrapper` with its arguments.
pub(crate) fn run_with(name: &str, link: Link, flags: &[&str], wrapper: &[&str]) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let program = compile(&root().join("tests/c").join(name), link, flags, dir.path());
    let files = dir.path().join("files");
    fs::create_dir(&files).expect("the folder can be made");
    let mut command = match wrapper {
        [] => Command::new(program),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(program);
            command
        }
    };
    let output = finish(command.arg(&files));
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name}: {}\n{out}{err}", output.status);
    assert!(out.is_empty() && err.is_empty(), "{name} is to be silent:\n{out}{err}");
}

/// Compiles without a warning to a program of the source's name in `dir`.
pub(crate) fn compile(source: &Path, link: Link, flags: &[&str], dir: &Path) -> PathBuf {
    let cpp = source.extension().is_some_and(|extension| extension == "cpp");
    let program = dir.join(source.with_extension("").file_name().expect("a file name"));
    let mut command = Command::new(if cpp { "c++" } else { "cc" });
    command.arg(if cpp { "-std=c++17" } else { "-std=c99" }).args(["-O1", "-g"]);
    command.args(["-Wall", "-Wextra", "-pedantic", "-Werror"]);
    command.args(flags).arg("-I").arg(root().join("include"));
    command.arg(source).arg("-o").arg(&program);
    match link {
        Link::Shared => {
            // The loader looks for the SONAME, which only an installed library has as a file.
            let installed = dir.join("libmxfp4train.so.0");
            if !installed.exists() {
                std::os::unix::fs::symlink(library("so"), &installed).expect("a link can be made");
            }
            command.arg(installed).arg(search(dir));
        }
        Link::Static => {
            command.arg(library("a"));
        }
        Link::None => {}
        Link::Packed => {
            let packed = dir.join("libmxfp4train.a");
            pack(&packed);
            command.arg(packed);
        }
    }
    succeed(command.args(["-lpthread", "-ldl", "-lm"]));
    program
}

/// Where programs find the library, whatever LD_LIBRARY_PATH says: cargo's has the folder in it where
/// `cargo build` may have left an older one.
fn search(dir: &Path) -> String {
    format!("-Wl,--disable-new-dtags,-rpath,{}", dir.display())
}

/// Makes the static library whose only symbols are those of the header.
pub(crate) fn pack(packed: &Path) {
    let script = root().join("dev/static-library.sh");
    succeed(Command::new(script).arg(library("a")).arg(packed));
}

/// Runs a command that must succeed, and gives its stdout.
pub(crate) fn succeed(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    out.into_owned()
}

/// Runs a program that must succeed and write nothing to stderr, and gives its stdout.
pub(crate) fn succeed_quietly(command: &mut Command) -> String {
    let output = finish(command);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}{errors}", output.status);
    assert!(errors.is_empty(), "{command:?} wrote to stderr:\n{errors}");
    text
}

/// Runs a program to its end, which a deadlock must not keep from coming.
pub(crate) fn finish(command: &mut Command) -> Output {
    finish_within(Duration::from_secs(240), command)
}

/// [`finish`] for a program that may take longer, or must not take as long.
pub(crate) fn finish_within(limit: Duration, command: &mut Command) -> Output {
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
        if start.elapsed() > limit {
            let _ = child.kill();
            let text = fs::read_to_string(&stderr).unwrap_or_default();
            panic!("{command:?} did not end in {limit:?}\n{text}");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let [stdout, stderr] = [stdout, stderr].map(|path| fs::read(path).expect("a file of ours"));
    Output { status, stdout, stderr }
}

/// valgrind, to be followed by a program: no finding and, with `leaks`, no leak. It knows no
/// AVX-512, which the library sees and does without.
pub(crate) fn valgrind(leaks: bool) -> Vec<String> {
    let suppressions = root().join("packaging/valgrind.supp");
    let leaks = if leaks { "full" } else { "no" };
    [
        "valgrind",
        "--quiet",
        "--error-exitcode=99",
        "--fair-sched=yes",
        "--errors-for-leak-kinds=definite,indirect,possible",
        &format!("--leak-check={leaks}"),
        &format!("--suppressions={}", suppressions.display()),
    ]
    .map(str::to_owned)
    .into()
}

/// Whether a tool is there. Without it the test that asks is skipped with a line that says so,
/// except in continuous integration (CI=true), where nothing may be skipped.
pub(crate) fn has_tool(tool: &str, works: bool) -> bool {
    if !works {
        let ci = std::env::var("CI").is_ok_and(|value| value == "true");
        assert!(!ci, "{tool} is not there, and under CI=true no test may be skipped; install it");
        eprintln!("skipped: {tool} is not there");
    }
    works
}

/// [`has_tool`] for a program that knows `--version`.
pub(crate) fn has_program(name: &str) -> bool {
    let works = Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
    has_tool(name, works)
}

/// The library that cargo built for this test: it lies beside the test's own program.
pub(crate) fn library(extension: &str) -> PathBuf {
    let program = std::env::current_exe().expect("the test knows its path");
    let path = program.with_file_name(format!("libmxfp4train.{extension}"));
    assert!(path.exists(), "{} is not there; run through cargo test", path.display());
    path
}

/// The functions that the header declares, in its order.
pub(crate) fn functions() -> Vec<String> {
    let header = fs::read_to_string(root().join("include/mxfp4train.h")).expect("the header");
    let code = header.lines().filter(|line| !line.starts_with("//") && !line.starts_with(' '));
    // A declaration is a line that begins with a type and has "name(" in it.
    let names = code.filter_map(|line| {
        let name = line.split_once('(')?.0.rsplit([' ', '*']).next()?;
        name.starts_with("mxt_").then(|| name.to_owned())
    });
    let names: Vec<String> = names.collect();
    assert!(names.len() > 50, "{names:?}");
    names
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// The recipes with a backward pass in MXFP4 of the paper, and what these are compared with: the
/// ones that kernels are made for.
pub(crate) const FIRST_RECIPES: [&str; 7] =
    ["fp32", "bf16", "mxfp4", "mxfp4-rht", "mxfp4-sr", "mxfp4-rht-sr", "fp8-mxfp4-rht-sr"];
