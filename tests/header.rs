//! The committed header is the one that the sources make, its version is the crate's, and C and C++
//! compilers take it without a warning.
//!
//! `MXT_BLESS=1 cargo test --test header` writes the header after a change of `src/capi`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The files that declare something, in the order of the header.
const SOURCES: [&str; 10] = [
    "status",
    "version",
    "message",
    "engine",
    "model",
    "generate",
    "dataset",
    "trainer_structs",
    "trainer",
    "run",
];

#[test]
fn header_is_what_the_sources_make() {
    let made = generate();
    let path = root().join("include/mxfp4train.h");
    if std::env::var_os("MXT_BLESS").is_some() {
        fs::write(&path, &made).expect("the header can be written");
    }
    let committed = fs::read_to_string(&path).expect("the header is there");
    let lines = made.lines().zip(committed.lines());
    for (number, (made, committed)) in lines.enumerate() {
        assert_eq!(made, committed, "line {}; MXT_BLESS=1 writes the header anew", number + 1);
    }
    assert_eq!(made.len(), committed.len(), "MXT_BLESS=1 writes the header anew");
}

#[test]
fn every_declaring_file_is_a_source() {
    for entry in fs::read_dir(root().join("src/capi")).expect("the folder is there") {
        let path = entry.expect("the entry can be read").path();
        let text = fs::read_to_string(&path).expect("the file can be read");
        let stem = path.file_stem().and_then(|s| s.to_str()).expect("file names are UTF-8");
        let declares = text.contains("#[unsafe(no_mangle)]") || text.contains("\npub const MXT_");
        assert_eq!(declares, SOURCES.contains(&stem), "{stem}.rs: SOURCES must list it");
    }
}

#[test]
fn version_macros_are_the_crates() {
    let header = generate();
    let macro_of = |name: &str| -> String {
        let line = header.lines().find_map(|line| line.strip_prefix(&format!("#define {name} ")));
        line.unwrap_or_else(|| panic!("{name} is not in the header")).to_owned()
    };
    assert_eq!(macro_of("MXT_VERSION_MAJOR"), env!("CARGO_PKG_VERSION_MAJOR"));
    assert_eq!(macro_of("MXT_VERSION_MINOR"), env!("CARGO_PKG_VERSION_MINOR"));
    assert_eq!(macro_of("MXT_VERSION_PATCH"), env!("CARGO_PKG_VERSION_PATCH"));
    let build = fs::read_to_string(root().join("build.rs")).expect("build.rs is there");
    let abi = format!("const ABI: u32 = {};", macro_of("MXT_ABI_VERSION"));
    assert!(build.contains(&abi), "build.rs and the header differ in the ABI version");
}

#[test]
fn every_function_and_field_is_documented() {
    let header = generate();
    let mut before = "";
    for line in header.lines() {
        let declares = line.contains(" mxt_") && line.contains('(') && !line.starts_with("//")
            || line.starts_with("typedef struct mxt_") && line.ends_with('{')
            || line.starts_with("#define MXT_")
            || line.starts_with("  MXT_")
            || line.starts_with("  ") && line.ends_with(';') && !line.starts_with("   ");
        if declares {
            assert!(before.trim_start().starts_with("//"), "not documented: {line}");
        }
        before = line;
    }
}

#[test]
fn compilers_take_it_without_a_warning() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = dir.path().join("include.c");
    fs::write(&source, "#include \"mxfp4train.h\"\n#include \"mxfp4train.h\"\nint unused_file;\n")
        .expect("the file can be written");
    let flags = ["-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only"];
    for (compiler, language, standard) in
        [("cc", "c", "-std=c99"), ("cc", "c", "-std=c11"), ("c++", "c++", "-std=c++17")]
    {
        let output = Command::new(compiler)
            .args(flags)
            .args(["-x", language, standard, "-I"])
            .arg(root().join("include"))
            .arg(&source)
            .output()
            .unwrap_or_else(|error| panic!("{compiler} cannot be started: {error}"));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{compiler} {standard}:\n{text}");
    }
}

fn generate() -> String {
    let root = root();
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let builder = cbindgen::Builder::new().with_config(config);
    let builder = SOURCES
        .iter()
        .fold(builder, |builder, name| builder.with_src(root.join(format!("src/capi/{name}.rs"))));
    let mut text = Vec::new();
    builder.generate().expect("the sources parse").write(&mut text);
    String::from_utf8(text).expect("headers are UTF-8")
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}
