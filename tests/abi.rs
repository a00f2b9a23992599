//! The binary interface is what is committed: the exported symbols, and size and place of every
//! field of every public struct, and every value of every enum.
//!
//! `tests/abi/symbols.txt` and `tests/abi/layout.txt` are what programs that exist were compiled
//! against. A difference is either a mistake or one of two kinds of change:
//!
//! - an addition (a function, an enum value, a field at the end of a struct): programs that were
//!   compiled before still run. `MXT_BLESS=1 cargo test --test abi` writes the files anew.
//! - anything else (removed or renamed, moved, resized, another value): programs that were compiled
//!   before break. Raise `MXT_ABI_VERSION` in src/capi/version.rs and `ABI` in build.rs, which is
//!   the SONAME, then write the files anew.
//!
//! The test tells the two apart and does not bless a break under the old number.

mod common;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::process::Command;

use common::{Link, compile, library, root, succeed};

#[test]
fn exported_symbols() {
    let text = succeed(Command::new("nm").args(["-D", "--defined-only"]).arg(library("so")));
    let mut names: Vec<_> =
        text.lines().filter_map(|line| line.split_whitespace().next_back()).collect();
    names.sort_unstable();
    compare("symbols.txt", &(names.join("\n") + "\n"));
}

/// Asked of the compiler, for the header as it is; 64-bit targets have one layout.
#[test]
#[cfg(target_pointer_width = "64")]
fn layout() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = dir.path().join("layout.c");
    fs::write(&source, layout_program()).expect("the file can be written");
    let program = compile(&source, Link::None, &[], dir.path());
    let layout = succeed(&mut Command::new(program));
    check_fields_cover_structs(&layout);
    compare("layout.txt", &layout);
}

/// Compares with the committed file; writes it under MXT_BLESS=1, if that is allowed.
fn compare(name: &str, now: &str) {
    let path = root().join("tests/abi").join(name);
    let now = format!("abi {}\n{now}", abi_version());
    let committed = fs::read_to_string(&path).unwrap_or_default();
    let kept: Vec<&str> = now.lines().collect();
    let broken: Vec<&str> = committed.lines().filter(|line| !kept.contains(line)).collect();
    // A struct's size may grow; then its fields are where they were.
    let broken: Vec<&str> = broken.into_iter().filter(|line| !has_grown(line, &now)).collect();
    let new_number = committed.lines().next() != now.lines().next();
    assert!(
        broken.is_empty() || new_number || committed.is_empty(),
        "{name}: programs compiled before would break, for these are gone or changed:\n  {}\n\
         Take the change back. If it must be: raise MXT_ABI_VERSION in src/capi/version.rs and ABI \
         in build.rs (the number in the SONAME), then run MXT_BLESS=1 cargo test --test abi",
        broken.join("\n  "),
    );
    if std::env::var_os("MXT_BLESS").is_some() {
        fs::create_dir_all(path.parent().expect("a folder")).expect("the folder can be made");
        fs::write(&path, &now).expect("the file can be written");
        return;
    }
    let added: Vec<&str> = now.lines().filter(|l| !committed.lines().any(|c| c == *l)).collect();
    assert!(
        committed == now,
        "{name}: an addition to the interface, or another order:\n  {}\n\
         If it is meant: MXT_BLESS=1 cargo test --test abi writes the file anew; commit it",
        added.join("\n  "),
    );
}

/// "struct NAME SIZE" with a larger size now.
fn has_grown(line: &str, now: &str) -> bool {
    let parse = |line: &str| {
        let (name, size) = line.strip_prefix("struct ")?.split_once(' ')?;
        Some((name.to_owned(), size.parse::<usize>().ok()?))
    };
    let Some((name, before)) = parse(line) else { return false };
    now.lines().filter_map(parse).any(|(other, size)| other == name && size > before)
}

/// A C program that prints the layout: one line a struct, a field, an enum value.
fn layout_program() -> String {
    let header = header();
    let mut body = String::new();
    let mut kind = None;
    for line in header.lines().filter(|line| !line.trim_start().starts_with("//")) {
        if let Some(name) = line.strip_prefix("typedef struct ").and_then(|l| l.strip_suffix(" {"))
        {
            writeln!(body, "  printf(\"struct {name} %zu\\n\", sizeof({name}));").unwrap();
            kind = Some(name);
        } else if line.starts_with("typedef enum ") {
            kind = Some("enum");
        } else if line.starts_with('}') {
            kind = None;
        } else if kind == Some("enum") {
            let name = line.trim().split([' ', ',']).next().expect("an enum value");
            writeln!(body, "  printf(\"enum {name} %d\\n\", (int){name});").unwrap();
        } else if let Some(of) = kind {
            let name = line.trim().trim_end_matches(';').split('[').next().expect("a field");
            let field = name.rsplit([' ', '*']).next().expect("a field has a name");
            let place = format!("offsetof({of}, {field}), sizeof((({of} *)0)->{field})");
            writeln!(body, "  printf(\"{of}.{field} at %zu size %zu\\n\", {place});").unwrap();
        }
    }
    format!(
        "#include \"mxfp4train.h\"\n#include <stdio.h>\nint main(void) {{\n{body}  return 0;\n}}\n"
    )
}

/// The fields of a struct follow each other without a gap up to its size: so none was overlooked.
fn check_fields_cover_structs(layout: &str) {
    let mut ends = BTreeMap::new();
    let mut sizes = BTreeMap::new();
    for line in layout.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |i: usize| words[i].parse::<usize>().expect("a number");
        match words[..] {
            ["struct", name, _] => {
                sizes.insert(name, number(2));
            }
            [field, "at", _, "size", _] => {
                let (of, _) = field.split_once('.').expect("struct.field");
                let end = ends.entry(of).or_insert(0);
                assert_eq!(*end, number(2), "{field} does not follow the field before it");
                *end += number(4);
            }
            ["enum", _, _] => {}
            _ => panic!("unexpected line: {line}"),
        }
    }
    assert_eq!(ends, sizes);
    assert!(sizes.len() >= 10, "{sizes:?}");
}

fn abi_version() -> String {
    let header = header();
    let number = header.lines().find_map(|line| line.strip_prefix("#define MXT_ABI_VERSION "));
    number.expect("MXT_ABI_VERSION is in the header").to_owned()
}

fn header() -> String {
    fs::read_to_string(root().join("include/mxfp4train.h")).expect("the header")
}
