//! Replaces a folder as a whole, in one step that a kill or a power cut cannot split.
//!
//! The new content is written into a temporary folder beside the target, flushed, and exchanged
//! with the target by one system call. Where the file system cannot exchange, the target is renamed
//! away first; [`existing`] finds it there if the process dies before the second rename.
//!
//! Names beside the target NAME: `.NAME.mxt-tmp-PID-COUNTER` (being written, or a replaced folder
//! about to be removed) and `.NAME.mxt-old` (only without exchange). A lock on the folder itself,
//! which the system drops when a process dies, tells a folder in use from a leftover; a process id
//! could not, as it is used again and means nothing to another container or host.

use std::ffi::OsString;
use std::fs::{self, DirEntry, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use crate::{Error, Result};

/// Replaces `dir` by a folder that `write` fills; `dir` and missing parents are created.
///
/// Other files of `dir` than `owned` move on into the new folder. If anything fails before the
/// exchange, `dir` is untouched.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] for a `dir` that is no folder, or that must not be replaced: one
/// with other content but without `mark`, one with folders inside, a mount point, the current
/// folder. What `write` returns.
pub(super) fn replace(
    dir: &Path,
    owned: &[&str],
    mark: &str,
    write: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let target = resolve(dir)?;
    recover(&target)?;
    let exists = target.exists();
    if exists {
        check_replaceable(&target, owned, mark)?;
    }
    remove_leftovers(&target);

    let staging = Staging::create(&target)?;
    write(&staging.path)?;
    if exists {
        carry_over(&target, &staging.path, owned)?;
    }
    sync(&staging.path)?;
    if exists {
        // Keeps another save from taking the replaced folder for a leftover before `rescue`. Where
        // there are no locks, nothing is taken for a leftover.
        let replaced = File::open(&target).map_err(Error::io("open", &target))?;
        let _ = replaced.try_lock();
        let old = swap(&staging.path, &target)?;
        // A file that came into the old folder after `carry_over` looked would be lost.
        rescue(&old, &target, owned);
        sync(&target)?;
        sync(parent(&target))?;
        // The save is done. What cannot be removed now is a leftover for the next save.
        let _ = fs::remove_dir_all(&old);
    } else {
        rename(&staging.path, &target)?;
        sync(parent(&target))?;
    }
    Ok(())
}

/// `dir`, or the folder that a save without exchange left in its place when it was killed.
pub(super) fn existing(dir: &Path) -> PathBuf {
    if !dir.exists()
        && let Ok(target) = resolve_missing(dir)
        && !target.exists()
        && sibling(&target, "old").is_dir()
    {
        return sibling(&target, "old");
    }
    dir.to_owned()
}

/// Writes a new file and flushes it to the disk.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create_new(path).map_err(Error::io("create", path))?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("flush", path))
}

/// A temporary folder beside the target, removed unless it became the target.
struct Staging {
    path: PathBuf,
    /// Locked, where the file system can.
    _lock: File,
}

impl Staging {
    fn create(target: &Path) -> Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        loop {
            let n = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = sibling(target, &format!("tmp-{}-{n}", std::process::id()));
            match fs::create_dir(&path) {
                // Another container may have this process id, too.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other.map_err(Error::io("create", &path))?,
            }
            // Between its creation and its locking, another save may take it for a leftover.
            let lock = match File::open(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(Error::io("open", &path))?,
            };
            if matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock)) || !path.exists() {
                continue;
            }
            let staging = Self { path, _lock: lock };
            if let Ok(metadata) = fs::metadata(target) {
                fs::set_permissions(&staging.path, metadata.permissions())
                    .map_err(Error::io("set the permissions of", &staging.path))?;
            }
            return Ok(staging);
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After the swap this is the name of nothing, or of a replaced folder to be removed.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The folder that `dir` means, absolute and without links; it may not exist yet, its parent does.
fn resolve(dir: &Path) -> Result<PathBuf> {
    match fs::symlink_metadata(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty()) {
                fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
            }
            return resolve_missing(dir);
        }
        other => other.map_err(Error::io("open", dir))?,
    };
    let target = fs::canonicalize(dir).map_err(Error::io("follow", dir))?;
    let metadata = fs::metadata(&target).map_err(Error::io("open", &target))?;
    if !metadata.is_dir() {
        let message = "expected a folder or a new name, found a file; name another folder";
        return Err(Error::format(dir, message));
    }
    let is_current = std::env::current_dir().is_ok_and(|current| current == target);
    let above = target.parent().map(fs::metadata).transpose();
    let above = above.map_err(Error::io("open the parent of", &target))?;
    // A save puts a new folder in the place of the old one, which these two cannot survive.
    if is_current || above.is_none_or(|above| above.dev() != metadata.dev()) {
        let what = if is_current { "the current folder" } else { "a mount point" };
        return Err(Error::format(
            dir,
            format!("a save replaces its folder, and this is {what}; name a folder inside of it"),
        ));
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

/// The parent of a resolved path, which is absolute and not the root.
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

/// Ends what a save without exchange left undone when it was killed.
fn recover(target: &Path) -> Result<()> {
    let old = sibling(target, "old");
    if !old.is_dir() {
        return Ok(());
    }
    if target.exists() {
        fs::remove_dir_all(&old).map_err(Error::io("remove", &old))
    } else {
        rename(&old, target)
    }
}

/// Removes temporary folders whose process is gone. Failing to do so fails no save.
fn remove_leftovers(target: &Path) {
    let Ok(entries) = fs::read_dir(parent(target)) else { return };
    let prefix = sibling(target, "tmp-");
    for entry in entries.flatten() {
        let path = entry.path();
        let name = prefix.file_name().unwrap_or_default().as_encoded_bytes();
        if !entry.file_name().as_encoded_bytes().starts_with(name) {
            continue;
        }
        let Ok(folder) = File::open(&path) else { continue };
        if folder.try_lock().is_ok() {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

/// The entries of a folder that are not ours.
fn foreign(dir: &Path, owned: &[&str]) -> Result<Vec<DirEntry>> {
    let entries = fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut entries = entries.map_err(Error::io("list", dir))?;
    entries.retain(|entry| !owned.iter().any(|name| entry.file_name() == *name));
    entries.sort_by_key(DirEntry::file_name);
    Ok(entries)
}

fn check_replaceable(target: &Path, owned: &[&str], mark: &str) -> Result<()> {
    let foreign = foreign(target, owned)?;
    if let Some(first) = foreign.first()
        && !target.join(mark).exists()
    {
        let message = format!(
            "expected a checkpoint or an empty folder, found {:?} and no {mark}; name a new folder",
            first.file_name()
        );
        return Err(Error::format(target, message));
    }
    foreign.iter().try_for_each(|entry| check_movable(target, entry))
}

/// Refuses what cannot be linked into a second folder: above all, folders.
fn check_movable(target: &Path, entry: &DirEntry) -> Result<()> {
    let kind = entry.file_type().map_err(Error::io("open", &entry.path()))?;
    if kind.is_file() || kind.is_symlink() {
        return Ok(());
    }
    let what = if kind.is_dir() { "folder" } else { "pipe, socket or device" };
    let message = format!(
        "expected only files beside the checkpoint, found the {what} {:?}; a save replaces the \
         whole folder, so move it elsewhere or name another folder",
        entry.file_name()
    );
    Err(Error::format(target, message))
}

/// Puts the foreign files of `from` into `to` as well: linked, or copied where that is not allowed.
fn carry_over(from: &Path, to: &Path, owned: &[&str]) -> Result<()> {
    for entry in foreign(from, owned)? {
        check_movable(from, &entry)?;
        let (source, copy) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().map_err(Error::io("open", &source))?;
        if kind.is_symlink() {
            let link = fs::read_link(&source).map_err(Error::io("read the link", &source))?;
            std::os::unix::fs::symlink(link, &copy).map_err(Error::io("link", &copy))?;
        } else if fs::hard_link(&source, &copy).is_err() {
            fs::copy(&source, &copy).map_err(Error::io("copy", &source))?;
            sync(&copy)?;
        }
    }
    Ok(())
}

/// Moves the foreign entries of the replaced folder, which are the newest, over those in the new
/// one. For a hard link to the same file that does nothing.
fn rescue(old: &Path, target: &Path, owned: &[&str]) {
    for entry in foreign(old, owned).unwrap_or_default() {
        let _ = fs::rename(entry.path(), target.join(entry.file_name()));
    }
}

/// Makes `new` the target and returns where the former target is now.
fn swap(new: &Path, target: &Path) -> Result<PathBuf> {
    match exchange(new, target) {
        Ok(()) => return Ok(new.to_owned()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
        Err(e) => return Err(Error::io("exchange", target)(e.into())),
    }
    let old = sibling(target, "old");
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
    if std::env::var_os(super::tests::NO_EXCHANGE).is_some() {
        return Err(Errno::NOSYS);
    }
    renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "macos")))]
fn exchange(_: &Path, _: &Path) -> Result<(), Errno> {
    Err(Errno::NOSYS)
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(Error::io("rename a folder to", to))
}

/// Flushes a file, or the names in a folder, to the disk.
fn sync(path: &Path) -> Result<()> {
    match File::open(path).and_then(|file| file.sync_all()) {
        // Some network file systems have no such thing for a folder.
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(()),
        other => other.map_err(Error::io("flush", path)),
    }
}
