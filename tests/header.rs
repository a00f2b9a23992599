//! The committed header is the one that the sources make, its version is the crate's, and C and C++
//! compilers take it without a warning.
//!
//! `MXT_BLESS=1 cargo test --test header` writes the header after a change of `src/capi`.

mod common;

use std::fs;
use std::process::Command;

use common::{has_program, root, succeed};

/// The files that declare something, in the order of the header.
const SOURCES: [&str; 17] = [
    "status",
    "version",
    "message",
    "group",
    "engine",
    "model",
    "generate",
    "decoder",
    "dataset",
    "trainer_structs",
    "trainer",
    "batch",
    "snapshot",
    "file_callbacks",
    "files",
    "watch",
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
        let declares = line.contains(" mxt_") && line.contains('(')
            || line.starts_with("typedef struct mxt_") && line.ends_with('{')
            || line.starts_with("#define MXT_")
            || line.starts_with("  MXT_")
            || line.starts_with("  ") && line.ends_with(';') && !line.starts_with("   ");
        if declares && !line.trim_start().starts_with("//") {
            assert!(before.trim_start().starts_with("//"), "not documented: {line}");
        }
        before = line;
    }
}

/// Enums cross the interface as numbers, so none is in the header but by name (cbindgen.toml).
#[test]
fn what_a_field_is_one_of_is_declared() {
    let header = generate();
    let mentioned: Vec<_> = header
        .split("ne of mxt_")
        .skip(1)
        .map(|rest| rest.split(|c: char| c != '_' && !c.is_ascii_alphanumeric()).next().unwrap())
        .collect();
    assert!(mentioned.len() > 5, "{mentioned:?}");
    for name in mentioned {
        assert!(header.contains(&format!("\n}} mxt_{name};")), "mxt_{name} is not declared");
    }
}

/// Every standard from C99 and C++11 on, with gcc and with clang.
#[test]
fn compilers_take_it_without_a_warning() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = dir.path().join("include.c");
    // Twice, and used: some warnings come with the first use of a declaration.
    let program = "#include \"mxfp4train.h\"\n#include \"mxfp4train.h\"\n\
        int use(void);\nint use(void) { return mxt_version_number() == MXT_VERSION_NUMBER; }\n";
    fs::write(&source, program).expect("the file can be written");
    const COMMON: [&str; 9] = [
        "-Wall",
        "-Wextra",
        "-pedantic",
        "-Werror",
        "-Wconversion",
        "-Wshadow",
        "-Wundef",
        "-Wpadded",
        "-fsyntax-only",
    ];
    const C: [&str; 5] =
        ["-Wstrict-prototypes", "-Wmissing-prototypes", "-Wold-style-definition", "-x", "c"];
    const CPP: [&str; 4] = ["-Wold-style-cast", "-Wzero-as-null-pointer-constant", "-x", "c++"];
    for (c, cpp) in [("gcc", "g++"), ("clang", "clang++")] {
        if !has_program(c) || !has_program(cpp) {
            continue;
        }
        let check = |compiler: &str, flags: &[&str], standard: &str| {
            let mut command = Command::new(compiler);
            command.args(COMMON).args(flags).arg(format!("-std={standard}")).arg("-I");
            succeed(command.arg(root().join("include")).arg(&source));
        };
        // C23 is c2x to the compilers of its time.
        for standard in ["c99", "c11", "c17", "c2x"] {
            check(c, &C, standard);
        }
        for standard in ["c++11", "c++14", "c++17", "c++20"] {
            check(cpp, &CPP, standard);
        }
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
