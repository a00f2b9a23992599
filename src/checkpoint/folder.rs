//! Replaces the files of a checkpoint as a whole, in one step that a kill or a power cut cannot split.
//!
//! Two ways. Mostly the new content is written into a temporary folder beside the target, flushed,
//! and exchanged with the target by one system call. Where the file system cannot exchange, the
//! target is renamed away first; [`existing`] finds it there if the process dies before the second
//! rename. Where the folder itself has to stay, the files change inside it (`in_place.rs`).
//!
//! Names beside the target NAME: `.NAME.mxt-tmp-PID-COUNTER` (being written, or a replaced folder
//! about to be removed) and `.NAME.mxt-old` (only without exchange). A lock on the folder itself,
//! which the system drops when a process dies, tells a folder in use from a leftover; a process id
//! could not, as it is used again and means nothing to another container or host.
//!
//! NOTE: a leftover may be a replaced folder whose process died before it moved a stranger's entries
//! on. So no folder is ever removed with what is in it: entries that are not ours are moved back
//! first, and a folder that is not empty then stays. Only a folder that says (by [`NEW`]) that it
//! was never exchanged holds nothing but copies.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirEntry, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::in_place;
use crate::{Error, Result};

/// A host's lock on the folder, which moves on with it and makes no stranger's folder of it.
const LOCK: &str = ".mxt-lock";

/// Lies in a folder that was written to take the target's place, and is removed once it has.
const NEW: &str = ".mxt-new";

/// Temporary folders in the target have this name and PID-COUNTER.
const INSIDE: &str = ".mxt-tmp-";

/// What a file system makes of its own accord in the top folder of a volume.
const OF_VOLUME: &str = "lost+found";

/// Replaces the files of `dir` by those that `write` writes; `dir` and missing parents are created.
///
/// Whatever else is in `dir` than `owned` stays. If anything fails before the commit, `dir` is
/// untouched. `write` is called again, for another folder, where the first way turns out to be
/// closed.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] for a `dir` that is no folder, or that is a stranger's: one with
/// other content but without `mark`. What `write` returns.
pub(super) fn replace(
    dir: &Path,
    owned: &[&str],
    mark: &str,
    write: impl Fn(&Path) -> Result<()>,
) -> Result<()> {
    let target = resolve(dir, owned)?;
    recover(&target, owned)?;
    if !target.exists() {
        remove_leftovers(&target, owned);
        let staging = Staging::create(&target, |name| sibling(&target, name))?;
        write(&staging.path)?;
        sync(&staging.path)?;
        rename(&staging.path, &target)?;
        return sync(parent(&target));
    }
    in_place::finish(&target, owned)?;
    check_replaceable(&target, owned, mark)?;
    remove_leftovers(&target, owned);
    // One that a killed save left in the target would make a copy of it, once it is replaced.
    let stale = target.join(NEW);
    if stale.symlink_metadata().is_ok() {
        remove_file(&stale)?;
        sync(&target)?;
    }
    if has_to_stay(&target, owned)? {
        return in_place::replace(&target, owned, write);
    }
    match exchange_whole(&target, owned, &write) {
        Err(Refusal::Place) => in_place::replace(&target, owned, write),
        Err(Refusal::Error(error)) => Err(error),
        Ok(()) => Ok(()),
    }
}

/// `dir`, or the folder that a save without exchange left in its place when it was killed.
pub(crate) fn existing(dir: &Path) -> PathBuf {
    left_behind(dir).map_or_else(|| dir.to_owned(), |(old, _)| old)
}

/// Gives [`existing`] its name back.
pub(crate) fn put_back(dir: &Path) -> Result<()> {
    match left_behind(dir) {
        Some((old, target)) if is_old(&old, &super::FILES) => rename(&old, &target),
        _ => Ok(()),
    }
}

/// The folder that a killed save has renamed away, and what it was before.
fn left_behind(dir: &Path) -> Option<(PathBuf, PathBuf)> {
    if dir.exists() {
        return None;
    }
    let target = resolve_missing(&follow(dir)).ok()?;
    let old = sibling(&target, "old");
    (!target.exists() && old.is_dir()).then_some((old, target))
}

/// Writes a new file and flushes it to the disk.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = attempt(|| File::create_new(path)).map_err(Error::io("create", path))?;
    attempt(|| file.write_all(bytes)).map_err(Error::io("write", path))?;
    attempt(|| file.sync_all()).map_err(Error::io("flush", path))
}

/// Every file operation of a save that changes something goes through here, so that tests can make
/// each of them fail, or the last one before a kill.
pub(super) fn attempt<T>(operation: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    #[cfg(test)]
    super::tests::faults::before_operation()?;
    operation()
}

/// Why a folder was not replaced.
enum Refusal {
    /// Its parent may not be changed, or the folder not be moved.
    Place,
    Error(Error),
}

impl Refusal {
    /// The refusal of an operation on folders in the target's parent.
    fn of(error: Error) -> Self {
        use io::ErrorKind as K;
        match &error {
            Error::Io { source, .. } => match source.kind() {
                K::PermissionDenied
                | K::ReadOnlyFilesystem
                | K::ResourceBusy
                | K::CrossesDevices
                | K::InvalidFilename
                | K::NotADirectory
                | K::DirectoryNotEmpty
                | K::AlreadyExists => Self::Place,
                _ => Self::Error(error),
            },
            _ => Self::Error(error),
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// Puts a new folder in the place of `target`.
fn exchange_whole(
    target: &Path,
    owned: &[&str],
    write: &impl Fn(&Path) -> Result<()>,
) -> Result<(), Refusal> {
    let staging = Staging::create(target, |name| sibling(target, name)).map_err(Refusal::of)?;
    let owner = |path: &Path| fs::metadata(path).map(|m| (m.uid(), m.gid())).ok();
    if owner(target) != owner(&staging.path) {
        // The folder is another's, who wants to keep it.
        return Err(Refusal::Place);
    }
    write_file(&staging.path.join(NEW), b"")?;
    write(&staging.path)?;
    carry_over(target, &staging.path, owned)?;
    sync(&staging.path)?;
    // Keeps another save from taking the replaced folder for a leftover before its entries are moved.
    // Where there are no locks, nothing is taken for a leftover.
    let replaced = open_folder(target).map_err(Error::io("open", target))?;
    let _ = replaced.try_lock();
    let old = swap(&staging.path, target, owned).map_err(Refusal::of)?;
    // Its path names the replaced folder now, and that may hold entries of others.
    staging.keep();
    remove_file(&target.join(NEW))?;
    // What came into the old folder after `carry_over` looked would be lost.
    let moved = move_back(&old, target, &|name| is_ours(name, owned));
    sync(target)?;
    sync(parent(target))?;
    // The save is done. What cannot be moved or removed now is a leftover for the next save.
    if moved.is_ok() {
        discard(&old, owned);
    }
    Ok(())
}

/// A temporary folder, removed unless it became the target.
pub(super) struct Staging {
    pub(super) path: PathBuf,
    /// Locked, where the file system can.
    _lock: File,
    is_ours: bool,
}

impl Staging {
    /// Makes the folder at `place("tmp-PID-COUNTER")`, with the mode of `target` if that exists.
    pub(super) fn create(target: &Path, place: impl Fn(&str) -> PathBuf) -> Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        loop {
            let n = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = place(&format!("tmp-{}-{n}", std::process::id()));
            match attempt(|| fs::create_dir(&path)) {
                // Another container may have this process id, too.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other.map_err(Error::io("create", &path))?,
            }
            // Between its creation and its locking, another save may take it for a leftover.
            let lock = match open_folder(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(Error::io("open", &path))?,
            };
            if matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock)) || !path.exists() {
                continue;
            }
            let staging = Self { path, _lock: lock, is_ours: true };
            if let Ok(metadata) = fs::metadata(target) {
                attempt(|| fs::set_permissions(&staging.path, metadata.permissions()))
                    .map_err(Error::io("set the permissions of", &staging.path))?;
            }
            return Ok(staging);
        }
    }

    /// Leaves what is at the path alone.
    pub(super) fn keep(mut self) {
        self.is_ours = false;
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.is_ours {
            // Never exchanged: everything in it was put there by this save.
            let _ = attempt(|| fs::remove_dir_all(&self.path));
        }
    }
}

/// The folder that `dir` means, absolute and without links; it may not exist yet, its parent does.
fn resolve(dir: &Path, owned: &[&str]) -> Result<PathBuf> {
    match fs::symlink_metadata(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty()) {
                attempt(|| fs::create_dir_all(parent)).map_err(Error::io("create", parent))?;
            }
            return resolve_missing(dir);
        }
        other => other.map_err(Error::io("open", dir))?,
    };
    let target = match fs::canonicalize(dir) {
        Err(e) => {
            // A link to a folder that a killed save has renamed away.
            return match resolve_missing(&follow(dir)) {
                Ok(target) if is_old(&sibling(&target, "old"), owned) => Ok(target),
                _ => Err(Error::io("follow", dir)(e)),
            };
        }
        Ok(target) => target,
    };
    let metadata = fs::metadata(&target).map_err(Error::io("open", &target))?;
    if !metadata.is_dir() {
        let message = "expected a folder or a new name, found a file; name another folder";
        return Err(Error::format(dir, message));
    }
    Ok(target)
}

/// As [`resolve`], for a folder that is not there but whose parent is.
fn resolve_missing(dir: &Path) -> Result<PathBuf> {
    let Some(name) = dir.file_name() else {
        return Err(Error::format(dir, "expected the name of a folder"));
    };
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Ok(fs::canonicalize(parent).map_err(Error::io("open", parent))?.join(name))
}

/// Where the links at the end of a path lead, also where nothing is there.
fn follow(path: &Path) -> PathBuf {
    /// Linux gives up after as many.
    const MOST: usize = 40;
    let mut path = path.to_owned();
    for _ in 0..MOST {
        let Ok(link) = fs::read_link(&path) else { break };
        // An absolute link replaces the whole path.
        path = path.parent().unwrap_or_else(|| Path::new("")).join(link);
    }
    path
}

/// The parent of a resolved path; the root's is the root.
fn parent(target: &Path) -> &Path {
    target.parent().unwrap_or(target)
}

/// `.NAME.mxt-SUFFIX` beside the target NAME.
fn sibling(target: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(".mxt-");
    name.push(suffix);
    target.with_file_name(name)
}

/// Whether the folder cannot be replaced by another one: whoever has it as the current folder would
/// be left in the old one, a mount point does not move, nor does one that lies in it, and other
/// programs may be at work in the folders inside.
fn has_to_stay(target: &Path, owned: &[&str]) -> Result<bool> {
    let here = fs::metadata(target).map_err(Error::io("open", target))?;
    let above = fs::metadata(parent(target)).map_err(Error::io("open", parent(target)))?;
    let current = std::env::current_dir().and_then(fs::metadata);
    let is_current = current.is_ok_and(|c| (c.dev(), c.ino()) == (here.dev(), here.ino()));
    if is_current || above.dev() != here.dev() || target.parent().is_none() {
        return Ok(true);
    }
    // Folders of ours too: of another process that saves here.
    let entries = fs::read_dir(target).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let stays = |entry: &DirEntry| {
        !owned.iter().any(|name| entry.file_name() == *name)
            && !entry.file_type().is_ok_and(|kind| kind.is_file() || kind.is_symlink())
    };
    Ok(entries.map_err(Error::io("list", target))?.iter().any(stays))
}

/// Ends what a save without exchange left undone when it was killed.
fn recover(target: &Path, owned: &[&str]) -> Result<()> {
    let old = sibling(target, "old");
    if !is_old(&old, owned) {
        return Ok(());
    }
    if !target.exists() {
        return rename(&old, target);
    }
    move_back(&old, target, &|name| is_ours(name, owned)).map_err(Error::io("empty", &old))?;
    discard(&old, owned);
    Ok(())
}

/// Whether it is a replaced folder, and not a stranger's that happens to have the name.
fn is_old(old: &Path, owned: &[&str]) -> bool {
    old.symlink_metadata().is_ok_and(|m| m.is_dir())
        && (owned.iter().any(|name| old.join(name).exists())
            || fs::read_dir(old).is_ok_and(|mut entries| entries.next().is_none()))
}

/// Removes temporary folders whose process is gone, after what strangers had in them is moved back.
/// Failing to do so fails no save.
fn remove_leftovers(target: &Path, owned: &[&str]) {
    let beside = sibling(target, "tmp-");
    let beside = beside.file_name().unwrap_or_default();
    let inside = OsStr::new(INSIDE);
    for (folder, prefix) in [(parent(target), beside), (target, inside)] {
        let Ok(entries) = fs::read_dir(folder) else { continue };
        for entry in entries.flatten() {
            let (name, path) = (entry.file_name(), entry.path());
            let suffix = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes());
            // One in use is locked.
            let Ok(leftover) = open_folder(&path) else { continue };
            if !suffix.is_some_and(is_pid_and_counter) || leftover.try_lock().is_err() {
                continue;
            }
            if prefix == inside || is_emptied(&path, target, owned) {
                discard(&path, owned);
            }
        }
    }
}

/// Rids a leftover beside the target of everything that is not part of a save.
fn is_emptied(leftover: &Path, target: &Path, owned: &[&str]) -> bool {
    if leftover.join(NEW).exists() {
        // Never exchanged: what is not ours are copies, files and links.
        let copies = fs::read_dir(leftover).into_iter().flatten().flatten();
        for copy in copies.filter(|entry| entry.file_name() != NEW) {
            let _ = attempt(|| fs::remove_file(copy.path()));
        }
        return true;
    }
    !target.exists() || move_back(leftover, target, &|name| is_ours(name, owned)).is_ok()
}

fn is_pid_and_counter(suffix: &[u8]) -> bool {
    let is_number = |part: &[u8]| !part.is_empty() && part.iter().all(u8::is_ascii_digit);
    let parts: Vec<_> = suffix.split(|&byte| byte == b'-').collect();
    parts.len() == 2 && parts.into_iter().all(is_number)
}

/// Whether an entry of a checkpoint folder is part of a save.
fn is_ours(name: &OsStr, owned: &[&str]) -> bool {
    owned.iter().any(|owned| name == *owned)
        || name == NEW
        || name == in_place::COMMIT
        || name.as_encoded_bytes().strip_prefix(INSIDE.as_bytes()).is_some_and(is_pid_and_counter)
}

/// The entries of a folder that are not ours.
fn foreign(dir: &Path, owned: &[&str]) -> Result<Vec<DirEntry>> {
    let entries = fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut entries = entries.map_err(Error::io("list", dir))?;
    entries.retain(|entry| !is_ours(&entry.file_name(), owned));
    entries.sort_by_key(DirEntry::file_name);
    Ok(entries)
}

fn check_replaceable(target: &Path, owned: &[&str], mark: &str) -> Result<()> {
    // Only files are replaced: a folder would stay, with what is in it, where nobody looks for it.
    let is_folder = |path: &PathBuf| path.symlink_metadata().is_ok_and(|m| m.is_dir());
    if let Some(folder) = owned.iter().map(|name| target.join(name)).find(is_folder) {
        return Err(Error::format(&folder, "expected a file or nothing, found a folder; move it"));
    }
    let foreign = foreign(target, owned)?;
    let stranger = foreign.iter().map(DirEntry::file_name).find(|n| n != LOCK && n != OF_VOLUME);
    match stranger {
        Some(first) if !target.join(mark).exists() => {
            let message = format!(
                "expected a checkpoint or an empty folder, found {first:?} and no {mark}; name a \
                 new folder"
            );
            Err(Error::format(target, message))
        }
        _ => Ok(()),
    }
}

/// Puts the foreign files of `from` into `to` as well: linked, or copied where that is not allowed.
/// Folders and the like that have come since they were looked for are moved after the exchange.
fn carry_over(from: &Path, to: &Path, owned: &[&str]) -> Result<()> {
    for entry in foreign(from, owned)? {
        let (source, copy) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().map_err(Error::io("open", &source))?;
        if kind.is_symlink() {
            let link = fs::read_link(&source).map_err(Error::io("read the link", &source))?;
            attempt(|| std::os::unix::fs::symlink(&link, &copy))
                .map_err(Error::io("link", &copy))?;
        } else if kind.is_file() && attempt(|| fs::hard_link(&source, &copy)).is_err() {
            attempt(|| copy_file(&source, &copy)).map_err(Error::io("copy", &source))?;
        }
    }
    Ok(())
}

/// A copy as old as its source, so that `move_back` can tell whether anyone has written to it since.
fn copy_file(source: &Path, copy: &Path) -> io::Result<()> {
    fs::copy(source, copy)?;
    let file = File::options().write(true).open(copy)?;
    file.set_modified(fs::metadata(source)?.modified()?)?;
    file.sync_all()
}

/// Moves the entries of the replaced folder `from` that are not `ours` into `to`. Of two files of one
/// name the one written later stays, which for links to one file is either; folders are merged. What
/// cannot be merged keeps a name beside the other's.
fn move_back(from: &Path, to: &Path, ours: &dyn Fn(&OsStr) -> bool) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let name = entry?.file_name();
        if ours(&name) {
            continue;
        }
        let (source, place) = (from.join(&name), to.join(&name));
        let here = source.symlink_metadata()?;
        let there = match place.symlink_metadata() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                attempt(|| fs::rename(&source, &place))?;
                continue;
            }
            other => other?,
        };
        if here.is_dir() && there.is_dir() {
            move_back(&source, &place, &|_| false)?;
            attempt(|| fs::remove_dir(&source))?;
        } else if here.is_dir() || there.is_dir() {
            attempt(|| fs::rename(&source, free_name(&place)))?;
        } else if (here.dev(), here.ino()) == (there.dev(), there.ino())
            || here.modified()? < there.modified()?
        {
            attempt(|| fs::remove_file(&source))?;
        } else {
            attempt(|| fs::rename(&source, &place))?;
        }
    }
    Ok(())
}

/// `PATH.kept-N` with the first N that is free.
fn free_name(path: &Path) -> PathBuf {
    let named = |n: u64| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".kept-{n}"));
        PathBuf::from(name)
    };
    (1..).map(named).find(|path| path.symlink_metadata().is_err()).unwrap_or_else(|| named(0))
}

/// Removes the files of a save and then the folder, if nothing else is in it.
pub(super) fn discard(folder: &Path, owned: &[&str]) {
    // The mark last: without it, the files of others would be no copies.
    for name in owned.iter().chain([&in_place::NAMES, &NEW]) {
        let _ = attempt(|| fs::remove_file(folder.join(name)));
    }
    let _ = attempt(|| fs::remove_dir(folder));
}

/// Makes `new` the target and returns where the former target is now.
fn swap(new: &Path, target: &Path, owned: &[&str]) -> Result<PathBuf> {
    match exchange(new, target) {
        Ok(()) => return Ok(new.to_owned()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
        Err(e) => return Err(Error::io("exchange", target)(e.into())),
    }
    let old = sibling(target, "old");
    // What is there is a stranger's, or was emptied by `recover`.
    if old.symlink_metadata().is_ok() && !is_old(&old, owned) {
        let taken = io::Error::from(io::ErrorKind::AlreadyExists);
        return Err(Error::io("rename a folder to", &old)(taken));
    }
    rename(target, &old)?;
    if let Err(e) = rename(new, target) {
        rename(&old, target)?;
        return Err(e);
    }
    Ok(old)
}

#[cfg(any(target_os = "linux", target_os = "android", target_os = "macos"))]
fn exchange(a: &Path, b: &Path) -> Result<(), Errno> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    #[cfg(test)]
    if super::tests::faults::has_no_exchange() {
        return Err(Errno::NOSYS);
    }
    attempt(|| Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?))
        .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "macos")))]
fn exchange(_: &Path, _: &Path) -> Result<(), Errno> {
    Err(Errno::NOSYS)
}

pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    attempt(|| fs::rename(from, to)).map_err(Error::io("rename a file or folder to", to))
}

/// Removes a file, which may be gone already.
pub(super) fn remove_file(path: &Path) -> Result<()> {
    match attempt(|| fs::remove_file(path)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Opens a folder, and nothing else: a pipe of this name would wait for its writer.
pub(super) fn open_folder(path: &Path) -> io::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW;
    File::options().read(true).custom_flags(flags.bits() as i32).open(path)
}

/// Flushes the names in a folder to the disk.
pub(super) fn sync(folder: &Path) -> Result<()> {
    match attempt(|| File::open(folder)?.sync_all()) {
        // Some network file systems have no such thing for a folder.
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(()),
        other => other.map_err(Error::io("flush", folder)),
    }
}
