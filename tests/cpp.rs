//! The C++ classes: the programs of `tests/cpp`, compiled by every compiler and standard that a
//! host may use, run with an empty folder, and run again under sanitizers and valgrind.
//!
//! A program must succeed and, because the library is silent, write nothing.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Compiler, SANITIZE, finish, has_program, root, succeed_quietly, valgrind};

/// A program: its files in `tests/cpp` and what they need.
type Program = (&'static [&'static str], &'static [&'static str]);

const HANDLES: Program = (&["handles.cpp"], &[]);
const CALLBACKS: Program = (&["callbacks.cpp"], &[]);
const FILES: Program = (&["files.cpp"], &[]);
const RETURNING: Program = (&["returning.cpp"], &["-fno-exceptions"]);
/// Both modes in one program.
const MODES: Program = (&["returning.cpp", "modes.cpp"], &["-DWITH_OTHER_MODE"]);
const ALL: [Program; 5] = [HANDLES, CALLBACKS, FILES, RETURNING, MODES];

#[test]
fn gcc_cpp17() {
    run_all("g++", "-std=c++17", &[]);
}

#[test]
fn gcc_cpp20() {
    run_all("g++", "-std=c++20", &[]);
}

#[test]
fn clang_cpp17() {
    if has_program("clang++") {
        run_all("clang++", "-std=c++17", &[]);
    }
}

#[test]
fn clang_cpp20() {
    if has_program("clang++") {
        run_all("clang++", "-std=c++20", &[]);
    }
}

#[test]
fn gcc_sanitizers_find_nothing() {
    run_all("g++", "-std=c++17", &[SANITIZE]);
}

#[test]
fn clang_sanitizers_find_nothing() {
    if has_program("clang++") {
        run_all("clang++", "-std=c++20", &[SANITIZE]);
    }
}

/// Hosts compile the header with warnings of their own, which are then errors of ours.
#[test]
fn the_header_is_clean_under_strict_warnings() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = dir.path().join("include.cpp");
    let text = "#include \"mxfp4train.hpp\"\n#include \"mxfp4train.hpp\"\nint main() {}\n";
    fs::write(&source, text).expect("the file can be written");
    let strict = [
        ["-Wconversion", "-Wsign-conversion", "-Wold-style-cast", "-Wdouble-promotion"],
        ["-Wnon-virtual-dtor", "-Woverloaded-virtual", "-Wundef", "-Wextra-semi"],
    ];
    for command in ["g++", "clang++"] {
        if !has_program(command) {
            continue;
        }
        for mode in ["-fexceptions", "-fno-exceptions", "-DMXT_NO_EXCEPTIONS", "-fno-rtti"] {
            let flags = [strict.concat(), vec![mode]].concat();
            let compiler = Compiler { command, standard: "-std=c++17", flags: &flags };
            compiler.program(std::slice::from_ref(&source), dir.path());
        }
    }
}

/// No finding and no leak.
#[test]
fn a_run_under_valgrind_finds_nothing() {
    if !has_program("valgrind") {
        return;
    }
    for program in ALL {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = compile(program, "g++", "-std=c++17", &[], dir.path());
        let [program, arguments @ ..] = &valgrind(true)[..] else { unreachable!("a program") };
        run(Command::new(program).args(arguments).arg(path), dir.path());
    }
}

/// The example is one file that can be read in one go, and does what it says.
#[test]
fn the_example_trains_is_stopped_and_resumes() {
    let source = root().join("examples/cpp/train.cpp");
    let text = fs::read_to_string(&source).expect("the file can be read");
    assert!(text.lines().count() < 150, "the example is to be read in one go");
    for command in ["g++", "clang++"] {
        if !has_program(command) {
            continue;
        }
        let dir = tempfile::tempdir().expect("a temporary folder");
        let compiler = Compiler { command, standard: "-std=c++17", flags: &[] };
        let program = compiler.program(std::slice::from_ref(&source), dir.path());
        let text = succeed_quietly(Command::new(program).current_dir(dir.path()));
        assert!(text.contains("resumed at step"), "{text}");
        println!("{text}");
    }
}

/// A game that is trained in what frames leave of their time goes on, and learns.
#[test]
fn the_example_of_a_game_loop() {
    let source = root().join("examples/cpp/game_loop.cpp");
    let text = fs::read_to_string(&source).expect("the file can be read");
    assert!(text.lines().count() < 150, "the example is to be read in one go");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let compiler = Compiler { command: "g++", standard: "-std=c++17", flags: &[] };
    let program = compiler.program(std::slice::from_ref(&source), dir.path());
    let text = succeed_quietly(Command::new(program).current_dir(dir.path()));
    println!("{text}");
    let losses: Vec<f32> =
        text.lines().filter_map(|line| line.split("loss ").nth(1)?.parse().ok()).collect();
    // How many batches fit depends on what else the machine does: of some there is something to learn,
    // and after many there is nothing left.
    let batches = text.lines().last().and_then(|line| line.split(' ').next()?.parse::<u32>().ok());
    let batches = batches.unwrap_or_else(|| panic!("{text}"));
    let most = if batches > 400 { 2.0 } else { f32::INFINITY };
    assert!(losses.len() == 4 && losses[3] < most && text.contains("240 frames"), "{text}");
}

fn run_all(command: &str, standard: &str, flags: &[&str]) {
    for program in ALL {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = compile(program, command, standard, flags, dir.path());
        if flags.contains(&SANITIZE) {
            assert_sanitized(&path);
        }
        run(&mut Command::new(path), dir.path());
    }
}

fn compile(
    (files, own_flags): Program,
    command: &str,
    standard: &str,
    flags: &[&str],
    dir: &Path,
) -> PathBuf {
    let folder = root().join("tests/cpp");
    let sources: Vec<PathBuf> = files.iter().map(|name| folder.join(name)).collect();
    let flags = [flags, own_flags].concat();
    Compiler { command, standard, flags: &flags }.program(&sources, dir)
}

fn run(command: &mut Command, dir: &Path) {
    let folder = dir.join("files");
    fs::create_dir(&folder).expect("the folder can be made");
    let text = succeed_quietly(command.arg(&folder));
    assert!(text.is_empty(), "{command:?} is to be silent:\n{text}");
}

/// A sanitizer that was not linked finds nothing either.
fn assert_sanitized(program: &Path) {
    let output = finish(Command::new("nm").arg(program));
    let symbols = String::from_utf8_lossy(&output.stdout);
    for symbol in ["__asan_init", "__ubsan_handle_"] {
        assert!(symbols.contains(symbol), "{} has no {symbol}", program.display());
    }
}

/// What the C interface has grown by is not forgotten in C++: every field of its options, and every
/// constant but codes of errors.
#[test]
fn the_header_has_all_fields_and_constants_of_c() {
    let cpp = read("bindings/cpp/mxfp4train.hpp");
    let structs = [
        ("mxt_engine_options", "struct EngineOptions "),
        ("mxt_model_config", "struct ModelConfig "),
        ("mxt_trainer_options", "struct TrainerOptions "),
        ("mxt_dataset_options", "struct DatasetOptions "),
        ("mxt_decoder_options", "struct DecoderOptions "),
        ("mxt_generate_options", "struct GenerateOptions "),
        ("mxt_run_options", "struct RunOptions "),
        ("mxt_run_result", "struct RunResult "),
    ];
    let layout = read("tests/abi/layout.txt");
    for (c, of_cpp) in structs {
        let body = cpp.split_once(of_cpp).expect(of_cpp).1;
        let body = body.split_once("\n};\n").expect("an end").0;
        let words: Vec<_> = body.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
        let fields = layout.lines().filter_map(|line| line.strip_prefix(c)?.strip_prefix('.'));
        for field in fields.map(|field| field.split(' ').next().unwrap_or(field)) {
            let is_plain = ["reserved", "struct_size"].contains(&field);
            assert!(is_plain || words.contains(&field), "{of_cpp}lacks {field}");
        }
    }
    let constants = layout.lines().filter_map(|line| line.strip_prefix("enum "));
    for constant in constants.filter_map(|line| line.split(' ').next()) {
        // Of failures, of what tensors are, and of groups, whose struct is C's own.
        let is_of_c = ["MXT_OK", "MXT_STOPPED", "MXT_DTYPE_F32"].contains(&constant)
            || ["MXT_ERROR_", "MXT_TRANSPORT_", "MXT_WIRE_"]
                .iter()
                .any(|of| constant.starts_with(of));
        assert!(is_of_c || cpp.contains(constant), "{constant} is not in C++");
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).expect(path)
}
