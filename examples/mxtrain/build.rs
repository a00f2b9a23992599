//! The commit that the program is built from, for the records of `mxtrain compare`.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // NOTE: not in debug builds, where every commit would mean to compile the program anew.
    if std::env::var("PROFILE").as_deref() == Ok("release")
        && let Some(commit) = commit()
    {
        println!("cargo:rustc-env=MXTRAIN_COMMIT={commit}");
    }
}

/// The commit that is checked out, with "-dirty" if the sources are not those of the commit; none
/// where this is no git working tree or git is not there.
fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        output.status.success().then_some(text)
    };
    // A copy of these sources inside another project's working tree has no commit of its own.
    if !Path::new("../../.git").exists() {
        return None;
    }
    // HEAD changes with the branch, the log of HEAD with every commit.
    for file in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", file])?;
        if Path::new(&path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    let sources = ["src", "Cargo.toml", "../../src", "../../kernels", "../../Cargo.toml"];
    for path in sources {
        println!("cargo:rerun-if-changed={path}");
    }
    let changed = git(&[&["status", "--porcelain", "--"][..], &sources].concat())?;
    let mut commit = git(&["rev-parse", "--short=12", "HEAD"]).filter(|hash| !hash.is_empty())?;
    if !changed.is_empty() {
        commit.push_str("-dirty");
    }
    Some(commit)
}
