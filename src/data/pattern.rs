//! Files whose names match a pattern: `*`, `?`, `[..]` in any part of a path, `**` for any number of
//! folders.
//!
//! NOTE: the crate `glob` matches names, but does not look for them: its own search leaves out every
//! name that is not UTF-8. A name reaches it as text in which a byte that is not UTF-8 is a character
//! of a private plane, so that `?` and `*` match it and two names never look alike.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Component, Path, PathBuf};

use glob::Pattern;

use crate::{Error, Result};

/// Whether a path holds a character that only patterns need.
pub(super) fn is_pattern(path: &OsStr) -> bool {
    path.as_encoded_bytes().iter().any(|b| b"*?[".contains(b))
}

/// What matches, in the order of the names.
pub(super) fn search(pattern: &OsStr) -> Result<Vec<PathBuf>> {
    let mut parts = Vec::new();
    let mut found = PathBuf::new();
    for part in Path::new(pattern).components() {
        match part {
            Component::Normal(name) => {
                parts.push(Part::new(name).map_err(|e| {
                    Error::invalid("dataset", format!("bad pattern {pattern:?}: {e}"))
                })?)
            }
            // What a path begins with, and `..` within it.
            other if parts.is_empty() => found.push(other),
            other => parts.push(Part::Name(other.as_os_str().to_owned())),
        }
    }
    let mut matches = Vec::new();
    walk(&found, &parts, &mut matches)?;
    // Names that a `**` reaches by several roads, or in another order than that of their names.
    if parts.iter().any(|part| matches!(part, Part::Folders)) {
        matches.sort();
        matches.dedup();
    }
    Ok(matches)
}

/// One part of a path between slashes.
enum Part {
    /// A name as it is.
    Name(OsString),
    Matching(Pattern),
    /// `**`
    Folders,
}

impl Part {
    fn new(name: &OsStr) -> Result<Self, glob::PatternError> {
        if name == "**" {
            return Ok(Self::Folders);
        }
        if !is_pattern(name) {
            return Ok(Self::Name(name.to_owned()));
        }
        Pattern::new(&as_text(name)).map(Self::Matching)
    }
}

fn walk(folder: &Path, parts: &[Part], matches: &mut Vec<PathBuf>) -> Result<()> {
    let Some((part, rest)) = parts.split_first() else {
        matches.push(folder.to_owned());
        return Ok(());
    };
    match part {
        Part::Name(name) => {
            let path = folder.join(name);
            if path.symlink_metadata().is_ok() {
                walk(&path, rest, matches)?;
            }
        }
        Part::Matching(pattern) => {
            for name in names(folder)? {
                let path = folder.join(&name);
                if pattern.matches(&as_text(&name)) && (rest.is_empty() || path.is_dir()) {
                    walk(&path, rest, matches)?;
                }
            }
        }
        Part::Folders => {
            walk(folder, rest, matches)?;
            for name in names(folder)? {
                let path = folder.join(&name);
                // Not through links, which may lead in a circle.
                if path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
                    walk(&path, parts, matches)?;
                }
            }
        }
    }
    Ok(())
}

/// The names in a folder, sorted; none where there is no such folder.
fn names(folder: &Path) -> Result<Vec<OsString>> {
    let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    if !here.is_dir() {
        return Ok(Vec::new());
    }
    let names = fs::read_dir(here)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect());
    let mut names: Vec<OsString> = names.map_err(Error::io("search", here))?;
    names.sort();
    Ok(names)
}

/// A name as text: bytes that are not UTF-8 as characters of the last private plane.
fn as_text(name: &OsStr) -> String {
    const PLANE: u32 = 0x10_0000;
    let mut text = String::new();
    for chunk in name.as_encoded_bytes().utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().filter_map(|&b| char::from_u32(PLANE + u32::from(b))));
    }
    text
}
