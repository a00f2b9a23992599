//! Replaces the files of a checkpoint inside a folder that stays: the current folder, a mount point,
//! one whose parent may not be changed, one with folders of others in it.
//!
//! The new files are written into a temporary folder inside, `.mxt-tmp-PID-COUNTER`, with a list of
//! their names. Renaming it to [`COMMIT`] is the commit; then the files move out, one by one.
//!
//! NOTE: as long as the list is there, the checkpoint is what it names: each file in [`COMMIT`] or,
//! if it is not there any more, in the folder itself. A file of the folder that is not on the list is
//! the old checkpoint's. [`Committed`] reads by this rule, and [`finish`] ends what a kill cut off.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, openat};
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
    let place = |name: &str| target.join(format!(".mxt-{name}"));
    let staging = Staging::create(target, place)?;
    write(&staging.path)?;
    let is_there = |name: &&&str| staging.path.join(name).exists();
    let names: String = owned.iter().filter(is_there).flat_map(|name| [name, "\n"]).collect();
    folder::write_file(&staging.path.join(NAMES), names.as_bytes())?;
    folder::sync(&staging.path)?;
    // An earlier one was finished; if its folder is still there, it is empty.
    folder::rename(&staging.path, &target.join(COMMIT))?;
    folder::sync(target)?;
    move_out(target, owned)
    // `staging` has kept its lock until here, so that no other save did the same.
}

/// Ends a save that was killed after its commit.
///
/// # Errors
/// [`Error::Io`], also where another process saves here and does not come to its end.
pub(super) fn finish(target: &Path, owned: &[&str]) -> Result<()> {
    const TRIES: u32 = 50;
    let commit = target.join(COMMIT);
    for _ in 0..TRIES {
        let Ok(folder) = folder::open_folder(&commit) else { return Ok(()) };
        match folder.try_lock() {
            Err(fs::TryLockError::WouldBlock) => sleep(Duration::from_millis(100)),
            // Without locks it cannot be told whether someone is at it. Either of us may move a file.
            _ => return move_out(target, owned),
        }
    }
    let message = "another save to this folder is under way; try again when it is done";
    Err(Error::io("finish", &commit)(io::Error::new(io::ErrorKind::WouldBlock, message)))
}

fn move_out(target: &Path, owned: &[&str]) -> Result<()> {
    let commit = target.join(COMMIT);
    let names = match fs::read_to_string(commit.join(NAMES)) {
        Ok(names) => names,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            // Cut off between the removal of the list and that of the folder.
            folder::discard(&commit, &[]);
            return Ok(());
        }
        Err(e) => return Err(Error::io("read", &commit.join(NAMES))(e)),
    };
    for name in owned {
        let (from, to) = (commit.join(name), target.join(name));
        if !names.lines().any(|listed| listed == *name) {
            folder::remove_file(&to)?;
            continue;
        }
        match attempt(|| fs::rename(&from, &to)) {
            // It has moved before.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => other.map_err(Error::io("move to", &to))?,
        }
    }
    folder::sync(&commit)?;
    folder::sync(target)?;
    folder::remove_file(&commit.join(NAMES))?;
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
        let folder = match openat(folder, COMMIT, flags, Mode::empty()) {
            Ok(folder) => folder,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(e) => return Err(e),
        };
        let Some(file) = open_file(&folder, NAMES)? else { return Ok(None) };
        /// No list comes near this size.
        const MOST: u64 = 1 << 16;
        let mut names = String::new();
        match file.take(MOST).read_to_string(&mut names) {
            Ok(_) => Ok(Some(Self { folder, names })),
            Err(e) => Err(Errno::from_io_error(&e).unwrap_or(Errno::IO)),
        }
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
