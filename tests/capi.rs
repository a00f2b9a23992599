//! C and C++ programs against the header and the built libraries.
//!
//! Each program of `tests/c` is compiled without a warning, linked with the shared library (through
//! its SONAME) or the static one, and run with an empty folder. It must succeed and, because the
//! library is silent, leave stdout and stderr empty.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{
    Link, compile, finish, functions, has_tool, library, pack, root, run, run_with, succeed,
};

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
fn decoders() {
    run("decode.c", Link::Shared);
}

#[test]
fn a_step_in_parts() {
    run("parts.c", Link::Shared);
}

#[test]
fn llamas() {
    run("llama.c", Link::Shared);
}

#[test]
fn adapters_and_frozen_tensors() {
    run("lora.c", Link::Shared);
}

#[test]
fn documents_that_share_a_sequence() {
    run("documents.c", Link::Shared);
}

#[test]
fn data_of_the_host() {
    run("windows.c", Link::Shared);
}

#[test]
fn checkpoints_without_a_folder() {
    run("archive.c", Link::Shared);
}

#[test]
fn what_a_trainer_watches() {
    run("watch.c", Link::Shared);
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
    let text = succeed(Command::new("nm").args(["-g", "--defined-only"]).arg(&packed));
    let names = text.lines().filter_map(|line| line.split_whitespace().nth(2));
    let (ours, others): (Vec<_>, Vec<_>) = names.partition(|name| name.starts_with("mxt_"));
    assert!(ours.len() > 50, "{ours:?}");
    assert_eq!(others, ["DW.ref.rust_eh_personality"]);
    run_with("exception.cpp", Link::Packed, &[], &[]);
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
fn ranks_as_processes() {
    run("ranks.c", Link::Shared);
}

#[test]
fn cancelled_threads() {
    run("cancel.c", Link::Shared);
}

#[test]
fn arguments_that_change() {
    run("races.c", Link::Shared);
}

/// A host that runs under ThreadSanitizer with the suppressions that are installed hears nothing of
/// the library, and still of its own races.
#[test]
fn thread_sanitizer_finds_the_hosts_races_only() {
    const RACE: &str = r#"
#include "mxfp4train.h"
#include <pthread.h>
#include <stdio.h>

static int lines;

static void on_log(void *user_data, int32_t level, const char *line) {
  (void)user_data, (void)level, (void)line;
#ifdef RACE
  lines++;
#else
  __atomic_fetch_add(&lines, 1, __ATOMIC_RELAXED);
#endif
}

static void *start(void *unused) {
  mxt_engine_options options;
  mxt_engine *engine = NULL;
  mxt_engine_options_init(&options, sizeof options);
  options.threads = 2;
  options.log = on_log;
  if (mxt_engine_new(&options, &engine) != MXT_OK) puts(mxt_last_error());
  mxt_engine_free(engine);
  return unused;
}

int main(void) {
  pthread_t threads[2];
  for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, start, NULL);
  for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
  return lines > 0 ? 0 : 1;
}
"#;
    let dir = tempfile::tempdir().expect("a temporary folder");
    let suppressions = root().join("packaging/tsan.supp");
    let run = |source: &Path, flags: &[&str]| {
        let flags = [&["-fsanitize=thread"], flags].concat();
        let program = compile(source, Link::Shared, &flags, dir.path());
        let options = format!("suppressions={}", suppressions.display());
        let output = finish(Command::new(program).env("TSAN_OPTIONS", options));
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let empty = dir.path().join("empty.c");
    fs::write(&empty, "int main(void) { return 0; }\n").expect("the file can be written");
    // Older ones cannot place their shadow memory under some kernels.
    if !has_tool("a ThreadSanitizer that starts", run(&empty, &[]).0) {
        return;
    }
    let race = dir.path().join("race.c");
    fs::write(&race, RACE).expect("the file can be written");
    for source in [&root().join("tests/c/threads.c"), &race] {
        let (success, text) = run(source, &[]);
        assert!(success && text.is_empty(), "{}:\n{text}", source.display());
    }
    let (success, text) = run(&race, &["-DRACE"]);
    assert!(!success && text.contains("data race") && text.contains("on_log"), "{text}");
}

#[test]
fn exceptions_pass_through_a_run() {
    run("exception.cpp", Link::Shared);
}

#[test]
fn loaded_at_run_time_and_closed() {
    let path = format!("-DLIBRARY=\"{}\"", library("so").display());
    run_with("load.c", Link::None, &[&path], &[]);
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

/// A model that is shown the answers of sums alone learns to add.
#[test]
fn the_example_of_an_own_loss() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = root().join("examples/c/train_own_loss.c");
    assert!(lines(&source) < 150, "the example is to be read in one go");
    let program = compile(&source, Link::Shared, &[], dir.path());
    let output = finish(Command::new(program).current_dir(dir.path()));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let right = text.lines().last().and_then(|line| line.split(' ').next()?.parse::<u32>().ok());
    assert!(right.is_some_and(|right| right >= 90), "{text}");
}

/// Ranks that are threads of one process print what one thread does.
#[test]
fn the_example_of_ranks_on_threads() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = root().join("examples/c/train_threads.c");
    let program = compile(&source, Link::Shared, &["-pthread"], dir.path());
    let of = |ranks: &str| finish(Command::new(&program).arg(ranks).current_dir(dir.path()));
    let text = |ranks| {
        let output = of(ranks);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let alone = text("1");
    assert_eq!(alone.lines().count(), 20, "{alone}");
    assert!(text("2") == alone && text("4") == alone);
    let refused = of("3");
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(error.contains("ranks may be 1, 2, 4"), "{error}");
    assert_eq!(of("5").status.code(), Some(2));
}

#[test]
fn only_mxt_symbols_are_exported() {
    let text = succeed(Command::new("nm").args(["-D", "--defined-only"]).arg(library("so")));
    let mut exported: Vec<&str> =
        text.lines().filter_map(|line| line.split_whitespace().last()).collect();
    exported.sort_unstable();
    let mut declared = functions();
    declared.sort_unstable();
    assert_eq!(exported, declared, "the library (left) and the header (right) differ");
}

#[test]
fn soname_and_nodelete() {
    let text = succeed(Command::new("readelf").arg("-d").arg(library("so")));
    assert!(text.contains("soname: [libmxfp4train.so.0]"), "{text}");
    assert!(text.contains("NODELETE"), "{text}");
    for line in text.lines().filter(|line| line.contains("(NEEDED)")) {
        let known = ["libc.so", "libgcc_s.so", "libm.so", "ld-linux"];
        assert!(known.iter().any(|name| line.contains(name)), "needs more than libc: {line}");
    }
}

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).expect("the file can be read").lines().count()
}
