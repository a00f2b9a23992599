//! Another C library written in Rust, as a static archive with all of Rust's runtime in it.

use std::panic::catch_unwind;

/// Panics inside, on a thread of its own and on the caller's, and tells how often it caught one.
#[unsafe(no_mangle)]
pub extern "C" fn other_panics_caught() -> u32 {
    std::panic::set_hook(Box::new(|_| {}));
    let thread = std::thread::spawn(|| panic!("other"));
    let caught = [thread.join().is_err(), catch_unwind(|| panic!("other")).is_err()];
    caught.map(u32::from).iter().sum()
}
