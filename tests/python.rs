//! The Python package: its own tests, by pytest, with the library that cargo built.

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use common::{finish_within, has_tool, library, root};

#[test]
fn the_package_passes_its_tests() {
    let Some(python) = python() else { return };
    let package = root().join("bindings/python");
    let mut command = Command::new(python);
    command.args(["-m", "pytest", "-q", "-p", "no:cacheprovider"]).current_dir(&package);
    command.env("MXFP4TRAIN_LIBRARY", library("so")).env("PYTHONPATH", package.join("src"));
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    // Some seconds' work, in which tests that run beside take their share.
    let output = finish_within(Duration::from_secs(600), &mut command);
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{text}{errors}", output.status);
    println!("{}", text.lines().last().unwrap_or_default());
}

/// The program that README.md shows.
#[test]
fn the_example_trains() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let data = dir.path().join("data");
    fs::create_dir(&data).expect("a folder can be made");
    let text = b"Humpty Dumpty sat on a wall, Humpty Dumpty had a great fall; ";
    let tokens = text.iter().cycle().take(6000).flat_map(|&b| u16::from(b).to_le_bytes());
    fs::write(data.join("train.bin"), tokens.collect::<Vec<_>>()).expect("a file can be written");
    let mut command = Command::new(python);
    command.arg(root().join("examples/python/ten_lines.py")).current_dir(dir.path());
    command.env("MXFP4TRAIN_LIBRARY", library("so"));
    command.env("PYTHONPATH", root().join("bindings/python/src"));
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    let output = finish_within(Duration::from_secs(300), &mut command);
    let (text, errors) = (output.stdout, String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{errors}", output.status);
    let text = String::from_utf8_lossy(&text);
    let losses: Vec<f32> =
        text.lines().filter_map(|line| line.strip_prefix("loss ")?.parse().ok()).collect();
    assert!(losses.len() == 100 && losses[99] < 0.5 * losses[0], "{text}");
    assert!(dir.path().join("out/model.safetensors").exists(), "nothing was saved");
}

/// Both models learn, as near to each other as the paper says, and pictures are drawn.
#[test]
fn the_example_with_pictures() {
    let Some(python) = python() else { return };
    let has_plots = Command::new(&python).args(["-c", "import matplotlib"]).output();
    if !has_tool("matplotlib", has_plots.is_ok_and(|output| output.status.success())) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut command = Command::new(python);
    command.arg(root().join("examples/python/answers.py")).arg("answers.png");
    command.env("MXFP4TRAIN_LIBRARY", library("so")).current_dir(dir.path());
    command.env("PYTHONPATH", root().join("bindings/python/src"));
    command.env("PYTHONDONTWRITEBYTECODE", "1").env("MPLCONFIGDIR", dir.path());
    let output = finish_within(Duration::from_secs(300), &mut command);
    let (text, errors) = (output.stdout, String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{errors}", output.status);
    let text = String::from_utf8_lossy(&text);
    let last = |recipe: &str| -> f32 {
        let line = text.lines().find(|line| line.starts_with(recipe)).expect("a recipe");
        line.rsplit(' ').next().and_then(|loss| loss.parse().ok()).expect("a loss")
    };
    let [bf16, mxfp4] = ["bf16:", "mxfp4-rht-sr:"].map(last);
    assert!(bf16 < 0.5 && mxfp4 < 0.5, "{text}");
    let picture = fs::read(dir.path().join("answers.png")).expect("a picture");
    assert!(picture.starts_with(b"\x89PNG") && picture.len() > 10_000);
}

/// A Python with the packages that the tests need: the system's, or one in the target folder.
fn python() -> Option<PathBuf> {
    let works = |python: &PathBuf| {
        let imports = Command::new(python).args(["-c", "import cffi, numpy, pytest"]).output();
        imports.is_ok_and(|output| output.status.success())
    };
    let own = root().join("target/python/bin/python");
    let found = ["python3".into(), own].into_iter().find(works);
    let wanted =
        "python3 with cffi, numpy and pytest (or target/python, an environment that has them)";
    has_tool(wanted, found.is_some());
    found
}
