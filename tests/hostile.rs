//! Hosts that do something unusual, and tools that see what a test cannot: sanitizers and valgrind
//! over every program of `tests/c`.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{
    Link, SANITIZE, compile, has_program, has_tool, library, root, run, run_with, succeed, valgrind,
};

/// Programs that load the library by themselves, need a library that is built with faults, or leave
/// no room for a tool's own memory.
const SPECIAL: [&str; 5] = ["load.c", "faults.c", "exhausted.c", "address_space.c", "stack.c"];

#[test]
fn the_process_is_left_as_it_was() {
    run("guest.c", Link::Shared);
}

/// Numbers in files have a point, whatever the host's locale says.
#[test]
fn a_decimal_comma_changes_nothing() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut make = Command::new("localedef");
    make.args(["-i", "de_DE", "-f", "UTF-8"]).arg(dir.path().join("de_DE.UTF-8"));
    if !has_tool("localedef with de_DE", make.output().is_ok_and(|o| o.status.success())) {
        return;
    }
    let path = format!("LOCPATH={}", dir.path().display());
    let wrapper = ["env", &path, "LC_ALL=de_DE.UTF-8", "EXPECT_COMMA=1"];
    run_with("guest.c", Link::Shared, &[], &wrapper);
}

#[test]
fn fork_is_noticed() {
    run("fork.c", Link::Shared);
}

#[test]
fn memory_that_is_not_there() {
    run("memory.c", Link::Shared);
}

/// Every allocation and every mapping of every call fails; only some of them here, for there are
/// thousands.
#[test]
fn memory_that_runs_out_inside_a_call() {
    run_with("exhausted.c", Link::Shared, &["-DSTRIDE=17"], &[]);
}

#[test]
fn address_space_that_runs_out() {
    run("address_space.c", Link::Shared);
}

#[test]
fn callers_with_small_stacks() {
    run_with("stack.c", Link::Shared, &["-pthread"], &[]);
}

/// The allocator with a reserve is in the C library that users get, but not in the crate as others
/// use it: there, no package but mxtrain asks for it.
#[test]
fn only_the_c_library_has_an_allocator() {
    let symbols = succeed(Command::new("nm").args(["-C"]).arg(library("so")));
    assert!(symbols.contains("mxfp4train::emergency::"), "the C library has no reserve");
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("the manifest");
    assert!(manifest.contains("\nc-library = []\n") && !manifest.contains("\ndefault = ["));
}

/// gcc's address sanitizer, which also finds what is not freed, and its check of undefined
/// behaviour.
#[test]
fn sanitizers_find_nothing() {
    let probe = tempfile::tempdir().expect("a temporary folder");
    let source = probe.path().join("probe.c");
    fs::write(&source, "int main(int n, char **v) { return v[0][0] + n == 1 << 30; }\n")
        .expect("the file can be written");
    let program = probe.path().join("probe");
    let mut build = Command::new("cc");
    build.arg(SANITIZE).arg(&source).arg("-o").arg(&program);
    let works = build.output().is_ok_and(|output| output.status.success())
        && Command::new(&program).output().is_ok_and(|output| output.status.success());
    if !has_tool("a compiler with -fsanitize=address,undefined", works) {
        return;
    }
    for name in programs() {
        is_sanitized(&compile(
            &root().join("tests/c").join(&name),
            Link::Shared,
            &[SANITIZE],
            probe.path(),
        ));
        // A sanitizer's first word makes the program fail.
        run_with(&name, Link::Shared, &[SANITIZE, "-fno-sanitize-recover=all"], &[]);
    }
}

#[test]
fn a_run_under_valgrind_finds_nothing() {
    if !has_program("valgrind") {
        return;
    }
    for name in programs() {
        // A forked child has to leave the threads of its parent as they are, with their memory.
        let valgrind = valgrind(name != "fork.c");
        // Of /proc and of a memory limit, the programs would see what valgrind makes of them.
        let mut wrapper = vec!["env", "UNDER_VALGRIND=1"];
        wrapper.extend(valgrind.iter().map(String::as_str));
        run_with(&name, Link::Shared, &[], &wrapper);
    }
}

/// The programs of `tests/c` that are simply linked with the library.
fn programs() -> Vec<String> {
    let entries = fs::read_dir(root().join("tests/c")).expect("the folder is there");
    let names = entries.map(|entry| entry.expect("the entry can be read").file_name());
    let names = names.map(|name| name.into_string().expect("file names are UTF-8"));
    let is_program = |name: &String| {
        (name.ends_with(".c") || name.ends_with(".cpp")) && !SPECIAL.contains(&name.as_str())
    };
    let mut names: Vec<String> = names.filter(is_program).collect();
    names.sort();
    assert!(names.len() >= 11, "{names:?}");
    names
}

/// The sanitizers are really in the program: it calls their runtimes.
fn is_sanitized(program: &Path) {
    let symbols = succeed(Command::new("nm").arg(program));
    for symbol in ["__asan_init", "__asan_report_", "__ubsan_handle_"] {
        assert!(symbols.contains(symbol), "{} does not use {symbol}", program.display());
    }
}
