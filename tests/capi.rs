//! C and C++ programs against the header and the built libraries.
//!
//! Each program of `tests/c` is compiled without a warning, linked with the shared library (through
//! its SONAME) or the static one, and run with an empty folder. It must succeed and, because the
//! library is silent, leave stdout and stderr empty.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// What a program is linked with.
#[derive(Clone, Copy)]
enum Link {
    Shared,
    Static,
    /// The static library that `dev/static-library.sh` makes.
    Packed,
    /// Nothing: the program loads the library itself.
    None,
}

#[test]
fn null_everywhere() {
    run("nulls.c", Link::Shared);
}

#[test]
fn struct_sizes() {
    run("structs.c", Link::Shared);
}

#[test]
fn bad_inputs() {
    run("inputs.c", Link::Shared);
}

#[test]
fn the_largest_numbers() {
    run("extremes.c", Link::Shared);
}

#[test]
fn handles_freed_in_any_order() {
    run("lifetime.c", Link::Shared);
}

#[test]
fn train_save_resume_generate() {
    run("train.c", Link::Shared);
}

#[test]
fn the_static_library_works_too() {
    run("train.c", Link::Static);
}

/// What `dev/static-library.sh` makes exports the header's functions only, and works.
#[test]
fn the_packed_static_library() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let packed = dir.path().join("libmxfp4train.a");
    pack(&packed);
    let output = Command::new("nm").args(["-g", "--defined-only"]).arg(&packed).output();
    let text = String::from_utf8(output.expect("nm can be started").stdout).expect("UTF-8");
    let names = text.lines().filter_map(|line| line.split_whitespace().nth(2));
    let (ours, others): (Vec<_>, Vec<_>) = names.partition(|name| name.starts_with("mxt_"));
    assert!(ours.len() > 50, "{ours:?}");
    assert_eq!(others, ["DW.ref.rust_eh_personality"]);
    run_with("exception.cpp", Link::Packed, &[]);
}

#[test]
fn runs_callbacks_and_signals() {
    run("run.c", Link::Shared);
}

#[test]
fn threads() {
    run("threads.c", Link::Shared);
}

#[test]
fn exceptions_pass_through_a_run() {
    run("exception.cpp", Link::Shared);
}

#[test]
fn loaded_at_run_time_and_closed() {
    let path = format!("-DLIBRARY=\"{}\"", library("so").display());
    run_with("load.c", Link::None, &[&path]);
}

/// The same programs with gcc's or clang's address sanitizer, which also finds what is not freed.
/// Skipped where the compiler has none.
#[test]
fn sanitizers_find_nothing() {
    let probe = tempfile::tempdir().expect("a temporary folder");
    let source = probe.path().join("probe.c");
    fs::write(&source, "int main(void) { return 0; }\n").expect("the file can be written");
    let program = probe.path().join("probe");
    let mut compile = Command::new("cc");
    compile.arg(SANITIZE).arg(&source).arg("-o").arg(&program);
    let works = compile.output().is_ok_and(|output| output.status.success())
        && Command::new(&program).output().is_ok_and(|output| output.status.success());
    if !works {
        eprintln!("skipped: cc {SANITIZE} makes no program that runs here");
        return;
    }
    for name in ["nulls.c", "structs.c", "inputs.c", "lifetime.c", "train.c", "run.c"] {
        run_with(name, Link::Shared, &[SANITIZE]);
    }
}

#[test]
fn the_example_trains_and_resumes() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = root().join("examples/c/train.c");
    assert!(lines(&source) < 150, "the example is to be read in one go");
    let as_cpp = dir.path().join("train.cpp");
    fs::copy(&source, &as_cpp).expect("the file can be copied");
    for source in [&source, &as_cpp] {
        let program = compile(source, Link::Shared, &[], dir.path());
        let output = finish(Command::new(program).current_dir(dir.path()));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("resumed at step"), "{text}");
        println!("{text}");
    }
}

#[test]
fn only_mxt_symbols_are_exported() {
    let output = Command::new("nm").args(["-D", "--defined-only"]).arg(library("so")).output();
    let output = output.expect("nm can be started");
    let text = String::from_utf8(output.stdout).expect("nm writes UTF-8");
    let exported: Vec<&str> = text.lines().filter_map(|l| l.split_whitespace().last()).collect();
    let header = fs::read_to_string(root().join("include/mxfp4train.h")).expect("the header");
    for symbol in &exported {
        assert!(symbol.starts_with("mxt_"), "{symbol} is exported");
        assert!(header.contains(&format!("{symbol}(")), "{symbol} is not in the header");
    }
    // Every function of the header is there: its declaration is a line that ends in "name(...".
    let declared = header.lines().filter(|line| !line.starts_with("//"));
    let declared = declared.filter_map(|line| {
        let name = line.split('(').next()?.rsplit([' ', '*']).next()?;
        (line.contains('(') && name.starts_with("mxt_")).then_some(name)
    });
    let declared: Vec<&str> = declared.collect();
    assert!(declared.len() > 50, "{declared:?}");
    for name in declared {
        assert!(exported.contains(&name), "{name} is in the header, but not in the library");
    }
}

#[test]
fn soname_and_nodelete() {
    let output = Command::new("readelf").arg("-d").arg(library("so")).output();
    let text =
        String::from_utf8_lossy(&output.expect("readelf can be started").stdout).into_owned();
    assert!(text.contains("soname: [libmxfp4train.so.0]"), "{text}");
    assert!(text.contains("NODELETE"), "{text}");
    for line in text.lines().filter(|line| line.contains("(NEEDED)")) {
        let known = ["libc.so", "libgcc_s.so", "libm.so", "ld-linux"];
        assert!(known.iter().any(|name| line.contains(name)), "needs more than libc: {line}");
    }
}

fn run(name: &str, link: Link) {
    run_with(name, link, &[]);
}

fn run_with(name: &str, link: Link, flags: &[&str]) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let program = compile(&root().join("tests/c").join(name), link, flags, dir.path());
    let files = dir.path().join("files");
    fs::create_dir(&files).expect("the folder can be made");
    let output = finish(Command::new(program).arg(&files));
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name}: {}\n{out}{err}", output.status);
    assert!(out.is_empty() && err.is_empty(), "{name} is to be silent:\n{out}{err}");
}

const SANITIZE: &str = "-fsanitize=address,undefined";
const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-pedantic", "-Werror"];

fn compile(source: &Path, link: Link, flags: &[&str], dir: &Path) -> PathBuf {
    let cpp = source.extension().is_some_and(|extension| extension == "cpp");
    let program = dir.join("program");
    let mut command = Command::new(if cpp { "c++" } else { "cc" });
    command.arg(if cpp { "-std=c++17" } else { "-std=c99" }).args(["-O1", "-g"]);
    command.args(WARNINGS).args(flags).arg("-I").arg(root().join("include"));
    command.arg(source).arg("-o").arg(&program);
    match link {
        Link::Shared => {
            // The loader looks for the SONAME, which only an installed library has as a file.
            let installed = dir.join("libmxfp4train.so.0");
            if !installed.exists() {
                std::os::unix::fs::symlink(library("so"), &installed).expect("a link can be made");
            }
            command.arg(installed).arg(format!("-Wl,-rpath,{}", dir.display()));
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
    command.args(["-lpthread", "-ldl", "-lm"]);
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}:\n{text}", source.display());
    program
}

fn pack(packed: &Path) {
    let script = root().join("dev/static-library.sh");
    let output = Command::new(script).arg(library("a")).arg(packed).output();
    let output = output.expect("the script can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Runs a program to its end, which a deadlock must not keep from coming.
fn finish(command: &mut Command) -> Output {
    const LIMIT: Duration = Duration::from_secs(240);
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program can be started");
    let start = Instant::now();
    while child.try_wait().expect("a child can be waited for").is_none() {
        if start.elapsed() > LIMIT {
            let _ = child.kill();
            panic!("{command:?} did not end in {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("a child can be waited for")
}

/// The library that cargo built for this test: it lies beside the test's own program.
fn library(extension: &str) -> PathBuf {
    let program = std::env::current_exe().expect("the test knows its path");
    let path = program.with_file_name(format!("libmxfp4train.{extension}"));
    assert!(path.exists(), "{} is not there; run through cargo test", path.display());
    path
}

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).expect("the file can be read").lines().count()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}
