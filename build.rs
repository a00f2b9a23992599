//! Facts of the build for `mxt_build_info`, and how the shared library is linked.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The number in the SONAME. `capi::version` asserts that `MXT_ABI_VERSION` is the same.
const ABI: u32 = 0;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-env=MXT_ABI={ABI}");
    for (name, variable) in [("MXT_TARGET", "TARGET"), ("MXT_PROFILE", "PROFILE")] {
        println!("cargo:rustc-env={name}={}", std::env::var(variable).unwrap_or_default());
    }
    // NOTE: not in debug builds, where every commit would mean to compile the crate anew.
    if std::env::var("PROFILE").as_deref() == Ok("release")
        && let Some(commit) = commit()
    {
        println!("cargo:rustc-env=MXT_COMMIT={commit}");
    }
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libmxfp4train.so.{ABI}");
        // Worker threads may be running our code while a host calls dlclose.
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
        link_by_soname();
    }
}

/// Puts `libmxfp4train.so.0` beside `libmxfp4train.so`, for that is the name that the loader asks
/// for: without it, a program linked with cargo's own output does not start.
///
/// NOTE: this is outside of OUT_DIR, where a build script is to stay, but inside of the folder that
/// cargo fills and cleans. Where the layout is another, nothing is made, and only `make install`
/// has the name.
fn link_by_soname() {
    let Some(out) = std::env::var_os("OUT_DIR").map(PathBuf::from) else { return };
    // PROFILE/build/mxfp4train-HASH/out
    let Some(folder) = out.ancestors().nth(3).filter(|folder| folder.join("deps").is_dir()) else {
        return;
    };
    let link = folder.join(format!("libmxfp4train.so.{ABI}"));
    #[cfg(unix)]
    if let Err(error) = std::os::unix::fs::symlink("libmxfp4train.so", &link)
        && error.kind() != std::io::ErrorKind::AlreadyExists
    {
        println!("cargo:warning={} cannot be made: {error}", link.display());
    }
}

/// The commit that is checked out, if this is a git working tree and git is there.
fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && !text.is_empty()).then_some(text)
    };
    // A copy of these sources inside another project's working tree has no commit of its own.
    if !Path::new(".git").exists() {
        return None;
    }
    // HEAD changes with the branch, the log of HEAD with every commit.
    for file in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", file])?;
        if Path::new(&path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}
