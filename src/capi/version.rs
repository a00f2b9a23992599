//! Which library this is: numbers, and everything else as JSON.

use std::ffi::{CString, c_char};
use std::sync::OnceLock;

use serde_json::json;

use super::guard;
use crate::Recipe;
use crate::backend::cpu::Isa;

/// Version of this header, major part. It grows when programs have to be changed.
pub const MXT_VERSION_MAJOR: u32 = 0;
/// Version of this header, minor part. It grows with additions.
pub const MXT_VERSION_MINOR: u32 = 1;
/// Version of this header, patch part. It grows with corrections.
pub const MXT_VERSION_PATCH: u32 = 0;
/// Version of this header as one number that can be compared: 1,002,003 for 1.2.3.
pub const MXT_VERSION_NUMBER: u32 =
    MXT_VERSION_MAJOR * 1000000 + MXT_VERSION_MINOR * 1000 + MXT_VERSION_PATCH;
/// Version of the binary interface, the number in libmxfp4train.so.N. It changes only when
/// programs that were compiled with an earlier header could not run with the library.
pub const MXT_ABI_VERSION: u32 = 0;

/// The version of the library that is running, such as "0.1.0".
///
/// Never NULL; the text is static. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub extern "C" fn mxt_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The version of the library that is running; compare with MXT_VERSION_NUMBER, the version of the
/// header that the program was compiled with.
///
/// Any thread may call it at any time.
#[unsafe(no_mangle)]
pub extern "C" fn mxt_version_number() -> u32 {
    MXT_VERSION_NUMBER
}

/// The binary interface of the library that is running. A program that loads the library at run
/// time must not go on if this is not MXT_ABI_VERSION.
///
/// Any thread may call it at any time.
#[unsafe(no_mangle)]
pub extern "C" fn mxt_abi_version() -> u32 {
    MXT_ABI_VERSION
}

/// What this build is, as a JSON object: "version", "abi", "commit" (null in debug builds and if
/// not known), "target", "profile", "devices" (the kinds that it can drive), "recipes", and
/// "kernels" with the instruction sets that are "compiled", those that this processor has
/// ("available") and the one that an engine takes ("selected"). Later versions may add keys.
///
/// Never NULL; the text is static. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub extern "C" fn mxt_build_info() -> *const c_char {
    static INFO: OnceLock<CString> = OnceLock::new();
    let mut text = c"{}".as_ptr();
    guard::function("mxt_build_info", || {
        text = INFO.get_or_init(build_info).as_ptr();
        Ok(())
    });
    text
}

fn build_info() -> CString {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(Isa::name);
    let available = available.collect::<Vec<_>>();
    let info = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "abi": MXT_ABI_VERSION,
        "commit": option_env!("MXT_COMMIT"),
        "target": env!("MXT_TARGET"),
        "profile": env!("MXT_PROFILE"),
        "devices": ["cpu", "cuda"],
        "recipes": Recipe::NAMES,
        "kernels": {
            "compiled": Isa::ALL.map(Isa::name),
            "available": available,
            "selected": Isa::best().name(),
        },
    });
    // serde_json escapes control characters, so no zero byte is inside.
    CString::new(info.to_string()).unwrap_or_default()
}

// The macros in the header are numbers that a person can read; they must be the crate's.
const _: () = {
    const fn number(text: &str) -> u32 {
        match u32::from_str_radix(text, 10) {
            Ok(number) => number,
            Err(_) => panic!("a version number has digits only"),
        }
    }
    assert!(MXT_VERSION_MAJOR == number(env!("CARGO_PKG_VERSION_MAJOR")));
    assert!(MXT_VERSION_MINOR == number(env!("CARGO_PKG_VERSION_MINOR")));
    assert!(MXT_VERSION_PATCH == number(env!("CARGO_PKG_VERSION_PATCH")));
    // The SONAME that build.rs gives the shared library ends with this number.
    assert!(MXT_ABI_VERSION == number(env!("MXT_ABI")));
};
