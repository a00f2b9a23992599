//! The Julia package, run and checked. Its tests and the programs of `examples/julia` run on Julia
//! with the library that cargo built; `dev/julia.sh` gets one where there is none. And it is
//! compared with the header by `dev/check_julia.py`: it parses, binds every function with its
//! types, has every struct's layout, and is the one that the header makes.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::Duration;

use common::{finish_within, has_tool, library, root};

/// NOTE: both levels, because what the optimizer does with callbacks differs; of the other one only
/// what calls back.
#[test]
fn the_package_runs_optimized() {
    runs("-O2", "all");
}

#[test]
fn the_package_runs_optimized_most() {
    runs("-O3", "callbacks");
}

/// Runs all of it at a level of the optimizer, in one process: most of the time is Julia's
/// compiler's.
fn runs(level: &str, tests: &str) {
    let Some(julia) = julia() else { return };
    let programs = ["bindings/julia/test/runtests.jl", TEN_LINES, "examples/julia/train.jl"];
    let dir = tempfile::tempdir().expect("a temporary folder");
    let data = dir.path().join("data");
    fs::create_dir(&data).expect("a folder can be made");
    fs::write(data.join("train.bin"), tokens()).expect("the file can be written");
    // Each in a module of its own, as if it were alone.
    let script = programs.map(|program| {
        format!("println(\"== {program}\"); Base.include(Module(), {:?})\n", root().join(program))
    });
    let mut command = Command::new(julia);
    command.args([level, "--startup-file=no", "-e", &script.concat()]).current_dir(dir.path());
    command.arg(format!("--project={}", root().join("bindings/julia").display()));
    command.env("MXFP4TRAIN_LIBRARY", library("so")).env("JULIA_NUM_THREADS", "2");
    command.env("MXFP4TRAIN_TESTS", tests);
    // What Julia compiles ahead it keeps in a depot.
    command.env("JULIA_DEPOT_PATH", dir.path().join("depot"));
    // A minute's work, in which tests that run beside take their share.
    let output = finish_within(Duration::from_secs(900), &mut command);
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{level}: {}\n{text}{errors}", output.status);
    let (_, text) = text.split_once(TEN_LINES).expect("the program ran");
    let losses = text.lines().filter_map(|line| line.strip_prefix("loss ")?.parse().ok());
    let losses: Vec<f32> = losses.collect();
    assert_eq!(losses.len(), 100, "{text}");
    assert!(losses[99] < 0.5 * losses[0], "it did not learn:\n{text}");
    assert!(text.contains("resumed at step 100"), "{text}");
    for saved in ["out", "checkpoint"] {
        assert!(dir.path().join(saved).join("model.safetensors").exists(), "{saved} was not saved");
    }
}

/// A file of tokens that say a sentence, over and over.
fn tokens() -> Vec<u8> {
    let text = b"Humpty Dumpty sat on a wall, Humpty Dumpty had a great fall; ";
    text.iter().cycle().take(6000).flat_map(|&byte| u16::from(byte).to_le_bytes()).collect()
}

const TEN_LINES: &str = "examples/julia/ten_lines.jl";

/// Julia: the one on PATH, or the one that `dev/julia.sh` has put into the target folder.
fn julia() -> Option<PathBuf> {
    let works = |julia: &PathBuf| {
        Command::new(julia).arg("--version").output().is_ok_and(|o| o.status.success())
    };
    let own = root().join("target/julia/julia");
    let found = ["julia".into(), own].into_iter().find(works);
    has_tool("julia (dev/julia.sh unpacks one)", found.is_some());
    found
}

/// Julia installs the package's folder alone, so it holds the terms itself.
#[test]
fn the_package_has_the_terms() {
    for name in ["LICENSE-APACHE", "LICENSE-MIT"] {
        let text = |folder: &str| fs::read(root().join(folder).join(name)).expect(name);
        assert!(text("bindings/julia") == text(""), "bindings/julia/{name}: copy ../../{name}");
    }
}

#[test]
fn the_package_is_what_the_header_says() {
    let Some(python) = python() else { return };
    let output = check(python, &root());
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    println!("{text}");
}

/// A check that finds nothing is worth nothing: these mistakes are all found.
#[test]
fn mistakes_are_found() {
    let Some(python) = python() else { return };
    let low = "src/LibMXFP4Train.jl";
    for (file, right, wrong, finding) in [
        (low, "    seed::UInt64", "    seed::UInt32", "layout of mxt_engine_options"),
        (low, "        lr::Cfloat", "        lr::Cdouble", "arguments of mxt_trainer_set_lr"),
        (low, "    )::mxt_status", "    )::Cvoid", "result of mxt_"),
        (low, "Int32(-5)", "Int32(-6)", "constant MXT_ERROR_BUSY"),
        (low, "# Made from", "# From", "run bindings/julia/gen/generate.py"),
        ("src/callbacks.jl", "token::UInt32)", "token::UInt64)", "types of on_token"),
        ("src/callbacks.jl", "(on_log, Cvoid,", "(on_log, Int64,", "types of a callback"),
        ("src/model.jl", "mxt_model_save_as(model, ", "mxt_model_save_as(", "number of arguments"),
        ("src/model.jl", "Lib.mxt_model_save", "Lib.mxt_save", "expected a name of"),
        ("src/engine.jl", "text_or_nothing(", "text_or_nothin(", "that is defined"),
        ("src/run.jl", "    return nothing\nend", "    return nothing", "syntax error"),
    ] {
        let copy = tempfile::tempdir().expect("a temporary folder");
        for name in ["bindings", "include", "examples", "Cargo.toml"] {
            let status =
                Command::new("cp").arg("-r").arg(root().join(name)).arg(copy.path()).status();
            assert!(status.is_ok_and(|status| status.success()), "{name} can be copied");
        }
        let path = copy.path().join("bindings/julia").join(file);
        let text = fs::read_to_string(&path).expect("the file can be read");
        assert!(text.contains(right), "{file} has no {right:?} to change");
        fs::write(&path, text.replacen(right, wrong, 1)).expect("the file can be written");
        let output = check(python, copy.path());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{file}: {wrong:?} was not found");
        assert!(errors.contains(finding), "{wrong:?}: expected {finding:?} in:\n{errors}");
        assert!(!errors.contains("Traceback"), "{errors}");
    }
}

fn check(python: &Path, project: &Path) -> Output {
    let mut command = Command::new(python);
    command.arg(root().join("dev/check_julia.py")).arg(project);
    command.env("MXFP4TRAIN_LIBRARY", library("so")).env("PYTHONDONTWRITEBYTECODE", "1");
    command.output().expect("Python can be started")
}

/// A Python that has what the check needs: the system's, or one that is made in the target folder.
fn python() -> Option<&'static Path> {
    static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
    let python = PYTHON.get_or_init(|| {
        let system = PathBuf::from("python3");
        let own = Path::new(env!("CARGO_TARGET_TMPDIR")).join("julia-check");
        let own_python = own.join("bin/python");
        for python in [&system, &own_python] {
            if has_packages(python) {
                return Some(python.clone());
            }
        }
        let made = run(Command::new(&system).args(["-m", "venv"]).arg(&own)).and_then(|()| {
            let mut install = Command::new(&own_python);
            install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]);
            run(install.arg(root().join("dev/check_julia.txt")))
        });
        if let Err(error) = made {
            let message = format!("the Julia package is not checked: {error}");
            assert!(std::env::var("CI").as_deref() != Ok("true"), "{message}");
            eprintln!("skipped: {message}");
            return None;
        }
        Some(own_python)
    });
    python.as_deref()
}

fn has_packages(python: &Path) -> bool {
    let imports = "import pycparser, tomllib, tree_sitter, tree_sitter_julia";
    Command::new(python).args(["-c", imports]).output().is_ok_and(|o| o.status.success())
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}
