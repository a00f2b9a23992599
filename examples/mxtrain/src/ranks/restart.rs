//! A run that begins again, in this process's place, after it has lost another one.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::{env, process::Command};

use crate::console;
use crate::failure::Failure;

/// Options that say where a run begins and how often it may, with whether a value follows.
const OF_BEGINNING: [(&str, bool); 5] = [
    ("out", true),
    ("overwrite", false),
    ("init-from", true),
    ("resume", true),
    ("restarts", true),
];

/// Goes on with the run that `out` holds, which may begin again `left` times more. Returns only if that
/// cannot be.
pub(crate) fn restart(out: &Path, left: u32) -> Failure {
    let program = match env::current_exe() {
        Ok(program) => program,
        Err(e) => return Failure::runtime(format!("cannot find this program's file: {e}")),
    };
    let mut args = without_beginning(env::args_os().skip(1));
    args.extend(["--resume".into(), out.into(), "--restarts".into(), left.to_string().into()]);
    console::note(&format!("mxtrain: begins again from {}", out.display()));
    let e = Command::new(program).args(args).exec();
    Failure::runtime(format!("cannot begin again: {e}"))
}

fn without_beginning(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let (mut kept, mut is_value) = (Vec::new(), false);
    for arg in args {
        if std::mem::take(&mut is_value) {
            continue;
        }
        let name = arg.as_bytes().strip_prefix(b"--").map(|rest| {
            let end = rest.iter().position(|byte| *byte == b'=');
            (OsStr::from_bytes(&rest[..end.unwrap_or(rest.len())]).to_owned(), end.is_some())
        });
        let known = name.and_then(|(name, has_value)| {
            let known = OF_BEGINNING.iter().find(|(of, _)| name == *of)?;
            Some(known.1 && !has_value)
        });
        match known {
            Some(value_follows) => is_value = value_follows,
            None => kept.push(arg),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_computes_stays_and_where_it_began_does_not() {
        let line = "train --data d --out x --overwrite --init-from=w --lr 1e-3 --ranks 2 --restarts=3 \
                    --resume y --log out";
        let kept = without_beginning(line.split_whitespace().map(Into::into));
        let expected = "train --data d --lr 1e-3 --ranks 2 --log out";
        assert_eq!(kept, expected.split_whitespace().map(OsString::from).collect::<Vec<_>>());
    }
}
