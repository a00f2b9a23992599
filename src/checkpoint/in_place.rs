//! Replaces the files of a checkpoint inside a folder that stays: one that holds anything of
//! others, the current folder, a mount point, one whose parent may not be changed, one on a file
//! system that cannot exchange two folders.
//!
//! The new files lie in a temporary folder inside, `.mxt-tmp-PID-COUNTER`, written there or moved
//! in from beside the target, with a list of their names. Renaming it to [`COMMIT`] in the target
//! is the commit; then the files move out, one by one.
//!
//! NOTE: as long as the list is there, the checkpoint is what it names: each file in [`COMMIT`] or,
//! if it is not there any more, in the folder itself. A file of the folder that is not on the list
//! is the old checkpoint's. [`Committed`] reads by this rule, and [`finish`] ends what a kill cut
//! off.

use std::fs::{self, File};
use std::io::{self, ErrorKind as K, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, fstat, openat};
use rustix::io::Errno;

use super::folder::{self, Staging, attempt};
use crate::{Error, Result};

/// The folder of a save that is done and whose files are not all in their place.
pub(super) const COMMIT: &str = ".mxt-commit";

/// In it, the names of the save's files, one a line.
pub(super) const NAMES: &str = "names";

/// Replaces the `owned` files of `target` by those that `write` writes.
///
/// # Errors
/// [`Error::Io`], what `write` returns. `target` holds one of the two checkpoints whole even so.
pub(super) fn replace(
    target: &Path,
    owned: &[&str],
    write: impl Fn(&Path) -> Result<()>,
) -> Result<()> {
    let staging = Staging::create(target, |name| temporary(target, name))?;
    write(&staging.path)?;
    folder::keep_access(target, &staging.path, owned)?;
    commit(staging, target, owned)
}

/// The path of a temporary folder inside.
pub(super) fn temporary(target: &Path, name: &str) -> PathBuf {
    target.join(format!(".mxt-{name}"))
}

/// Makes the files in `staging`, which lies in `target`, its checkpoint and moves them to their
/// places.
///
/// # Errors
/// [`Error::Io`], which says so where the new checkpoint is there.
pub(super) fn commit(mut staging: Staging, target: &Path, owned: &[&str]) -> Result<()> {
    /// Other saves to this folder that may be done meanwhile.
    const MOST: usize = 100;
    let is_there = |name: &&&str| staging.path.join(name).exists();
    let names: String = owned.iter().filter(is_there).flat_map(|name| [name, "\n"]).collect();
    folder::write_file(&staging.path.join(NAMES), names.as_bytes())?;
    folder::sync(&staging.path)?;
    let place = target.join(COMMIT);
    for _ in 0..MOST {
        match attempt(|| fs::rename(&staging.path, &place)) {
            // Another save's, which comes to its end first.
            Err(e) if matches!(e.kind(), K::DirectoryNotEmpty | K::AlreadyExists) => {
                finish(target, owned)?;
                continue;
            }
            other => other.map_err(Error::io("rename a folder to", &place))?,
        }
        // A process of another container may have the same number, and takes the name anew.
        staging.let_go();
        let moved = folder::sync(target).and_then(|()| move_out(target, owned));
        return folder::after_commit(moved);
        // `staging` has kept its lock until here, so that no other save did the same.
    }
    Err(under_way(&place))
}

/// Ends a save that was killed after its commit.
///
/// # Errors
/// [`Error::Io`], also where another process saves here and does not come to its end;
/// [`Error::Format`] for what has the folder's name and is something else.
pub(super) fn finish(target: &Path, owned: &[&str]) -> Result<()> {
    const TRIES: u32 = 500;
    let commit = target.join(COMMIT);
    for _ in 0..TRIES {
        let folder = match folder::open_folder(&commit) {
            Err(e) if e.kind() == K::NotFound => return Ok(()),
            Err(_) if commit.symlink_metadata().is_ok_and(|m| !m.is_dir()) => {
                let message = "expected the folder of a save or nothing, found something else; \
                               move it";
                return Err(Error::format(&commit, message));
            }
            other => other.map_err(Error::io("open", &commit))?,
        };
        let owner = folder.metadata().map_err(Error::io("open", &commit))?.uid();
        let here = fs::metadata(target).map_err(Error::io("open", target))?;
        if !folder::may_have_saved(owner, here.mode(), here.uid()) {
            let message = format!(
                "expected the folder of a save or nothing, found one of user {owner}, who may not \
                 replace what is here; move it"
            );
            return Err(Error::format(&commit, message));
        }
        match folder.try_lock() {
            Err(fs::TryLockError::WouldBlock) => sleep(Duration::from_millis(10)),
            // Without locks it cannot be told whether someone is at it. Either of us may move a
            // file.
            _ => return move_out(target, owned),
        }
    }
    Err(under_way(&commit))
}

fn under_way(commit: &Path) -> Error {
    let message = "another save to this folder is under way; try again when it is done";
    Error::io("finish", commit)(io::Error::new(K::WouldBlock, message))
}

/// Moves the files of a committed save to their places.
fn move_out(target: &Path, owned: &[&str]) -> Result<()> {
    let commit = target.join(COMMIT);
    // A save's that has come to its end meanwhile.
    let Ok(folder) = folder::open_folder(&commit) else { return folder::sync(target) };
    let list = commit.join(NAMES);
    let Some(names) = read_names(&folder).map_err(|e| Error::io("read", &list)(e.into()))? else {
        // Cut off between the removal of the list and that of the folder. All files have been in
        // their place by then; a power cut may have kept their former names as well.
        folder::discard(&commit, owned);
        if fs::read_dir(&commit).is_ok_and(|mut entries| entries.next().is_some()) {
            let message = "expected the folder of a save or nothing, found one without a list of \
                           its files; move it";
            return Err(Error::format(&commit, message));
        }
        return Ok(());
    };
    for name in owned {
        let (from, to) = (commit.join(name), target.join(name));
        if !names.lines().any(|listed| listed == *name) {
            folder::remove_file(&to)?;
            continue;
        }
        match attempt(|| fs::rename(&from, &to)) {
            // It has moved before.
            Err(e) if e.kind() == K::NotFound => {}
            other => other.map_err(Error::io("move to", &to))?,
        }
    }
    folder::sync(target)?;
    folder::remove_file(&list)?;
    folder::discard(&commit, &[]);
    Ok(())
}

/// A committed save whose files are not all in their place, for readers.
pub(super) struct Committed {
    folder: OwnedFd,
    names: String,
}

impl Committed {
    /// Looks for one in an open checkpoint folder.
    pub(super) fn open(folder: impl AsFd) -> Result<Option<Self>, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let here = fstat(&folder)?;
        let folder = match openat(folder, COMMIT, flags, Mode::empty()) {
            Ok(folder) => folder,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(e) => return Err(e),
        };
        // What anybody may have put there says nothing of the files beside it.
        if !folder::may_have_saved(fstat(&folder)?.st_uid, here.st_mode as u32, here.st_uid) {
            return Ok(None);
        }
        Ok(read_names(&folder)?.map(|names| Self { folder, names }))
    }

    /// Opens a file of the save, whose folder is `folder`.
    pub(super) fn file(&self, folder: impl AsFd, name: &str) -> Result<Option<File>, Errno> {
        if !self.names.lines().any(|listed| listed == name) {
            return Ok(None);
        }
        match open_file(&self.folder, name)? {
            Some(file) => Ok(Some(file)),
            None => open_file(folder, name),
        }
    }
}

/// The list of names in a folder, if there is one.
fn read_names(folder: impl AsFd) -> Result<Option<String>, Errno> {
    /// No list comes near this size.
    const MOST: u64 = 1 << 16;
    let Some(file) = open_file(folder, NAMES)? else { return Ok(None) };
    let mut names = String::new();
    match file.take(MOST).read_to_string(&mut names) {
        Ok(_) => Ok(Some(names)),
        Err(e) => Err(Errno::from_io_error(&e).unwrap_or(Errno::IO)),
    }
}

/// Opens a file of a folder for reading, if there is one of this name.
pub(super) fn open_file(folder: impl AsFd, name: &str) -> Result<Option<File>, Errno> {
    // Without NONBLOCK a pipe of this name would wait for its writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    match openat(folder, name, flags, Mode::empty()) {
        Ok(file) => Ok(Some(File::from(file))),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e),
    }
}
