//! A panic behind every function of the C API: an error for the host, never its end.
//!
//! Debug builds of the library can be told to panic, and release builds cannot.

#![cfg(debug_assertions)]

mod common;

use std::fs;

use common::{Link, SANITIZE, functions, root, run, run_with};

/// Functions that return a constant or do one atomic store. Nothing in them can panic.
const CANNOT_FAIL: [&str; 7] = [
    "mxt_status_string",
    "mxt_version",
    "mxt_version_number",
    "mxt_abi_version",
    "mxt_last_error",
    "mxt_trainer_clear_stop",
    "mxt_trainer_request_stop",
];

#[test]
fn a_panic_is_an_error_of_the_call() {
    run("faults.c", Link::Shared);
}

#[test]
fn a_panic_corrupts_and_leaks_nothing() {
    run_with("faults.c", Link::Shared, &[SANITIZE, "-fno-sanitize-recover=all"], &[]);
}

#[test]
fn every_function_is_tried() {
    let program = fs::read_to_string(root().join("tests/c/faults.c")).expect("the program");
    for function in functions() {
        let tried = program.contains(&format!("PANICS({function}("))
            || program.contains(&format!("IS_NOTHING({function}("))
            || program.contains(&format!("arm(\"{function}\")"));
        let exempt = CANNOT_FAIL.contains(&function.as_str());
        assert!(tried || exempt, "tests/c/faults.c does not try {function}");
    }
}
