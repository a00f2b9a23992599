//! Files whose names match a pattern: `*`, `?`, `[..]` in any part of a path, `**` for any number
//! of folders.
//!
//! NOTE: the crate `glob` matches names, but does not look for them: its own search leaves out
//! every name that is not UTF-8. A name reaches it as text in which a byte that is not UTF-8 is a
//! character of a private plane, so that `?` and `*` match it and two names never look alike.
//!
//! Links are followed. What they lead to counts once: a `**` enters a folder through a link only
//! where it has not been in it, which also ends circles, and a file that is found through a link is
//! left out where it is found without one, or through a link before. The folders to enter are a
//! list, not a stack of calls, so their depth is limited by the length of a path alone.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet, TryReserveError};
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirEntry};
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};

use glob::Pattern;

use super::file::{joined, owned};
use super::source::{Id, id};
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
            Component::Normal(name) => match Part::new(name) {
                // Two in a row say no more than one.
                Ok(Part::Folders) if matches!(parts.last(), Some(Part::Folders)) => {}
                Ok(part) => parts.push(part),
                Err(e) => {
                    let message = format!("bad pattern {pattern:?}: {e}");
                    return Err(Error::invalid("dataset", message));
                }
            },
            // What a path begins with, and `..` within it.
            other if parts.is_empty() => found.push(other),
            other => parts.push(Part::Name(other.as_os_str().to_owned())),
        }
    }
    let mut search = Search::default();
    search.enter(Place { path: found, depth: 0, by_link: false })?;
    while let Some(place) = search.next() {
        search.step(place, &parts)?;
    }
    search.matches()
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

/// A path that fits the first `depth` parts of a pattern.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    path: PathBuf,
    depth: usize,
    /// Whether a part of it from the first wildcard on is a link.
    by_link: bool,
}

#[derive(Default)]
struct Search {
    /// To go on from.
    places: Vec<Place>,
    /// The same behind links, for when there are no others, in the order of their names.
    links: BinaryHeap<Reverse<Place>>,
    /// Folders in which a `**` has been, by its depth.
    entered: HashSet<(usize, Id)>,
    found: Vec<Place>,
}

impl Search {
    fn next(&mut self) -> Option<Place> {
        loop {
            if let Some(place) = self.places.pop() {
                return Some(place);
            }
            let Reverse(place) = self.links.pop()?;
            // Gone, or entered since.
            let folder = fs::metadata(&place.path).ok();
            if folder.is_some_and(|folder| !self.entered.contains(&(place.depth, id(&folder)))) {
                return Some(place);
            }
        }
    }

    fn enter(&mut self, place: Place) -> Result<()> {
        self.places.try_reserve(1).map_err(no_room)?;
        self.places.push(place);
        Ok(())
    }

    fn step(&mut self, place: Place, parts: &[Part]) -> Result<()> {
        let Place { path: folder, depth, by_link } = &place;
        let Some(part) = parts.get(*depth) else {
            self.found.try_reserve(1).map_err(no_room)?;
            self.found.push(place);
            return Ok(());
        };
        match part {
            Part::Name(name) => {
                let path = joined(folder, name)?;
                // Before the first wildcard there is one road only.
                let is_branch = parts[..*depth].iter().any(|part| !matches!(part, Part::Name(_)));
                match path.symlink_metadata() {
                    Ok(metadata) => {
                        let by_link = *by_link || is_branch && metadata.is_symlink();
                        self.enter(Place { path, depth: depth + 1, by_link })
                    }
                    Err(e) if is_missing(&e) => Ok(()),
                    Err(e) => Err(Error::io("search", &path)(e)),
                }
            }
            Part::Matching(pattern) => each_entry(folder, |entry| {
                let name = entry.file_name();
                if !pattern.matches(&as_text(&name)) {
                    return Ok(());
                }
                let path = joined(folder, &name)?;
                let kind = entry.file_type().map_err(Error::io("search", &path))?;
                if depth + 1 < parts.len() && !kind.is_dir() && !path.is_dir() {
                    return Ok(());
                }
                let by_link = *by_link || kind.is_symlink();
                self.enter(Place { path, depth: depth + 1, by_link })
            }),
            Part::Folders => {
                let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
                match fs::metadata(here) {
                    Ok(metadata) => {
                        self.entered.try_reserve(1).map_err(no_room)?;
                        self.entered.insert((*depth, id(&metadata)));
                    }
                    Err(e) if is_missing(&e) => return Ok(()),
                    Err(e) => return Err(Error::io("search", here)(e)),
                }
                self.enter(Place { path: owned(folder)?, depth: depth + 1, by_link: *by_link })?;
                each_entry(folder, |entry| {
                    let name = entry.file_name();
                    let kind = entry.file_type().map_err(Error::io("search", folder))?;
                    if !kind.is_dir() && !kind.is_symlink() {
                        return Ok(());
                    }
                    let (path, depth) = (joined(folder, &name)?, *depth);
                    if kind.is_dir() {
                        return self.enter(Place { path, depth, by_link: *by_link });
                    }
                    if path.is_dir() {
                        self.links.try_reserve(1).map_err(no_room)?;
                        self.links.push(Reverse(Place { path, depth, by_link: true }));
                    }
                    Ok(())
                })
            }
        }
    }

    /// The files found, each once, in the order of their names.
    fn matches(self) -> Result<Vec<PathBuf>> {
        let mut found = self.found;
        found.sort_unstable();
        // Names that a `**` reaches by several roads.
        found.dedup_by(|a, b| a.path == b.path);
        if found.iter().any(|place| place.by_link) {
            let mut files = HashSet::new();
            files.try_reserve(found.len()).map_err(no_room)?;
            let file = |place: &Place| fs::metadata(&place.path).ok().map(|file| id(&file));
            files.extend(found.iter().filter(|place| !place.by_link).filter_map(file));
            // What leads nowhere stays, for the error.
            found.retain(|p| !p.by_link || file(p).is_none_or(|file| files.insert(file)));
        }
        let mut paths = Vec::new();
        paths.try_reserve_exact(found.len()).map_err(no_room)?;
        paths.extend(found.into_iter().map(|place| place.path));
        Ok(paths)
    }
}

fn no_room(_: TryReserveError) -> Error {
    Error::OutOfMemory {
        what: "the names of the files that a pattern matches",
        needed: size_of::<Place>() as u64,
        limit: "more than the system gives; use a pattern that matches fewer".into(),
    }
}

/// Calls `each` for what is in a folder; for nothing where there is no such folder.
fn each_entry(folder: &Path, mut each: impl FnMut(DirEntry) -> Result<()>) -> Result<()> {
    let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    match fs::read_dir(here) {
        Ok(entries) => entries
            .into_iter()
            .try_for_each(|entry| each(entry.map_err(Error::io("search", here))?)),
        Err(e) if is_missing(&e) => Ok(()),
        Err(e) => Err(Error::io("search", here)(e)),
    }
}

/// Whether there is no such folder, or not any more.
fn is_missing(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
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
