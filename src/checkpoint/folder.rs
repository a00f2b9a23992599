//! Replaces the files of a checkpoint as a whole, in one step that a kill or a power cut cannot
//! split.
//!
//! The new content is written into a temporary folder beside the target and flushed. Where the
//! target holds a checkpoint and nothing else, one system call exchanges both. Where it holds
//! anything of others, who may be at work on it, or cannot be exchanged, the new folder moves into
//! the target and the files change inside it (`in_place.rs`): what is not ours is then never
//! copied, moved or linked.
//!
//! Temporary folders beside the target NAME are called `.NAME.mxt-tmp-PID-COUNTER` (being written,
//! or a replaced folder about to be removed). A lock on the folder itself, which the system drops
//! when a process dies, tells a folder in use from a leftover; a process id could not, as it is
//! used again and means nothing to another container or host. `.NAME.mxt-old` is what earlier
//! versions left where the file system cannot exchange: they renamed the target away first.
//! [`existing`] finds it there.
//!
//! NOTE: a leftover may be a replaced folder whose process died before it moved on what had come
//! into it just before the exchange. So no folder is ever removed with what is in it: entries that
//! are not ours are moved back first, and a folder that is not empty then stays.
//!
//! NOTE: anybody may make folders of such names where the folder that they lie in is open to all.
//! Nothing is read from, moved from or removed in one whose owner could not have saved here
//! ([`is_trusted`]).

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirEntry, File, Metadata, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::in_place;
use crate::{Error, Result};

/// A host's lock on the folder, which stays where it is and makes no stranger's folder of it.
const LOCK: &str = ".mxt-lock";

/// Temporary folders in the target have this name and PID-COUNTER.
const INSIDE: &str = ".mxt-tmp-";

/// What a file system makes of its own accord in the top folder of a volume.
const OF_VOLUME: &str = "lost+found";

/// Replaces the files of `dir` by those that `write` writes; `dir` and missing parents are created.
///
/// Whatever else is in `dir` than `owned` stays. If anything fails before the commit, `dir` is
/// untouched; if something fails after it, the error says so. `write` is called again, for another
/// folder, where the first one turns out to be of no use.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] for a `dir` that is no folder, or that is a stranger's: one
/// with other content but without `mark`. What `write` returns.
pub(super) fn replace(
    dir: &Path,
    owned: &[&str],
    mark: &str,
    write: impl Fn(&Path) -> Result<()>,
) -> Result<()> {
    let target = resolve(dir, owned)?;
    recover(&target, owned)?;
    if !target.exists() && is_made(&target, owned, &write)? {
        return Ok(());
    }
    in_place::finish(&target, owned)?;
    check_replaceable(&target, owned, mark)?;
    remove_leftovers(&target, owned);
    // Its parent may not be ours to change.
    let beside = if has_to_stay(&target, owned)? {
        None
    } else {
        Staging::create(&target, |name| sibling(&target, name)).ok()
    };
    let Some(staging) = beside else { return in_place::replace(&target, owned, write) };
    write(&staging.path)?;
    keep_access(&target, &staging.path, owned)?;
    sync(&staging.path)?;
    // Asked again: writing has taken its time. What comes between this and the exchange is moved.
    if !has_to_stay(&target, owned)? && is_exchanged(&staging, &target) {
        return after_commit(end_exchange(staging, &target, owned));
    }
    match staging.moved_to(|name| in_place::temporary(&target, name)) {
        Ok(staging) => in_place::commit(staging, &target, owned),
        // What lies beside a mount point, say, does not move into it.
        Err(_) => in_place::replace(&target, owned, write),
    }
}

/// Makes `target`, which is not there; false if another save was first.
fn is_made(target: &Path, owned: &[&str], write: &impl Fn(&Path) -> Result<()>) -> Result<bool> {
    remove_leftovers(target, owned);
    let staging = Staging::create(target, |name| sibling(target, name))?;
    write(&staging.path)?;
    sync(&staging.path)?;
    match rename(&staging.path, target) {
        Err(_) if target.is_dir() => return Ok(false),
        other => other?,
    }
    staging.keep();
    after_commit(sync(parent(target)))?;
    Ok(true)
}

/// Whether a new folder took the place of `target`, which then is where the new one was.
fn is_exchanged(staging: &Staging, target: &Path) -> bool {
    let (Ok(new), Ok(old)) = (staging.lock.metadata(), fs::metadata(target)) else { return false };
    // The folder of another stays that other's.
    if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
        return false;
    }
    // Servers have been known to say that they failed where they did not.
    exchange(&staging.path, target).is_ok()
        || fs::metadata(target).is_ok_and(|m| (m.dev(), m.ino()) == (new.dev(), new.ino()))
}

/// What remains to be done once the checkpoint is replaced.
fn end_exchange(staging: Staging, target: &Path, owned: &[&str]) -> Result<()> {
    let old = staging.path.clone();
    // Its path names the replaced folder now, and that may hold entries of others.
    staging.keep();
    // Keeps another save from taking the replaced folder for a leftover before its entries are
    // moved. Where there are no locks, nothing is taken for a leftover.
    let replaced = open_folder(&old);
    let _locked = replaced.as_ref().map(File::try_lock);
    let moved = move_back(&old, target, &|name| is_ours(name, owned));
    sync(target)?;
    sync(parent(target))?;
    // The save is done. What cannot be moved or removed now is a leftover for the next save.
    if moved.is_ok() {
        discard(&old, owned);
    }
    Ok(())
}

/// Lets a failure after the commit say which checkpoint is there.
pub(super) fn after_commit(result: Result<()>) -> Result<()> {
    result.map_err(|error| match error {
        Error::Io { action, path, source } => {
            let message = format!(
                "{source}; the new checkpoint is in its place and whole, but might not outlast a \
                 power cut"
            );
            let source = io::Error::new(source.kind(), message);
            Error::Io { action, path, source }
        }
        other => other,
    })
}

/// `dir`, or the folder that a save without exchange left in its place when it was killed.
pub(crate) fn existing(dir: &Path) -> PathBuf {
    left_behind(dir).map_or_else(|| dir.to_owned(), |(old, _)| old)
}

/// Gives [`existing`] its name back.
pub(crate) fn put_back(dir: &Path) -> Result<()> {
    match left_behind(dir) {
        Some((old, target)) if is_old(&old, &target, &super::FILES) => rename(&old, &target),
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
    let found = old.symlink_metadata().ok()?;
    let is_left = !target.exists() && found.is_dir() && is_trusted(&found, &target);
    is_left.then_some((old, target))
}

/// Writes a new file and flushes it to the disk.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = attempt(|| File::create_new(path)).map_err(Error::io("create", path))?;
    attempt(|| file.write_all(bytes)).map_err(Error::io("write", path))?;
    attempt(|| file.sync_all()).map_err(Error::io("flush", path))
}

/// Every file operation of a save that changes something goes through here, so that tests can make
/// each of them fail, or the last one before a kill. A signal that interrupts one, as a host's may
/// on network file systems, is no failure.
pub(super) fn attempt<T>(mut operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match attempt_once(&mut operation) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// As [`attempt`], for what must not be done twice.
fn attempt_once<T>(operation: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    #[cfg(test)]
    super::tests::faults::before_operation()?;
    operation()
}

/// A temporary folder, removed unless it became the target.
pub(super) struct Staging {
    pub(super) path: PathBuf,
    /// Locked, where the file system can.
    lock: File,
    is_ours: bool,
}

impl Staging {
    /// Makes the folder at `place("tmp-PID-COUNTER")`, closed to others until [`keep_access`] if
    /// there is a `target` to take after.
    pub(super) fn create(target: &Path, place: impl Fn(&str) -> PathBuf) -> Result<Self> {
        let model = fs::metadata(target).ok();
        loop {
            let path = place(&Self::name());
            let mut builder = fs::DirBuilder::new();
            builder.mode(if model.is_some() { 0o700 } else { 0o777 });
            match attempt(|| builder.create(&path)) {
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
            let staging = Self { path, lock, is_ours: true };
            if let Some(model) = &model {
                // The group's bit now, for the files in it.
                take_after(model, &staging.path, 0o7700)?;
            }
            return Ok(staging);
        }
    }

    /// Renames it to `place("tmp-PID-COUNTER")`.
    fn moved_to(mut self, place: impl Fn(&str) -> PathBuf) -> Result<Self> {
        let to = place(&Self::name());
        rename(&self.path, &to)?;
        self.path = to;
        Ok(self)
    }

    /// One that no other folder of this process has.
    fn name() -> String {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        format!("tmp-{}-{n}", std::process::id())
    }

    /// Leaves what is at the path alone, and unlocks the folder.
    fn keep(mut self) {
        self.let_go();
    }

    /// Leaves alone what is at the path, or comes to be there; the folder, wherever it is, stays
    /// locked.
    pub(super) fn let_go(&mut self) {
        self.is_ours = false;
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.is_ours {
            // Everything in it was put there by this save.
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
                Ok(target) if is_old(&sibling(&target, "old"), &target, owned) => Ok(target),
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

/// `.NAME.mxt-SUFFIX` beside the target NAME, of which a long one is replaced by its checksum.
pub(super) fn sibling(target: &Path, suffix: &str) -> PathBuf {
    /// With what is added it is still below 143 bytes, the least that file systems of today take.
    const LONGEST: usize = 100;
    let own = target.file_name().unwrap_or_default();
    let mut name = OsString::from(".");
    if own.len() > LONGEST {
        name.push(format!("{:08x}", crc32fast::hash(own.as_encoded_bytes())));
    } else {
        name.push(own);
    }
    name.push(".mxt-");
    name.push(suffix);
    target.with_file_name(name)
}

/// Whether the folder cannot be replaced by another one: whoever has it as the current folder would
/// be left in the old one, a mount point does not move, and other programs may be at work on what
/// they have in it, or in the temporary folder of a save of theirs.
fn has_to_stay(target: &Path, owned: &[&str]) -> Result<bool> {
    let here = fs::metadata(target).map_err(Error::io("open", target))?;
    let above = fs::metadata(parent(target)).map_err(Error::io("open", parent(target)))?;
    let current = std::env::current_dir().and_then(fs::metadata);
    let is_current = current.is_ok_and(|c| (c.dev(), c.ino()) == (here.dev(), here.ino()));
    if is_current || above.dev() != here.dev() || target.parent().is_none() {
        return Ok(true);
    }
    let mut entries = fs::read_dir(target).map_err(Error::io("list", target))?;
    let is_owned = |entry: DirEntry| owned.iter().any(|name| entry.file_name() == *name);
    Ok(!entries.all(|entry| entry.is_ok_and(is_owned)))
}

/// Gives the new files in `staging`, and then that folder, the modes and owners of those that they
/// replace, as far as the system allows.
pub(super) fn keep_access(target: &Path, staging: &Path, owned: &[&str]) -> Result<()> {
    for name in owned {
        let new = staging.join(name);
        // A link has no mode of its own.
        match target.join(name).symlink_metadata() {
            Ok(old) if old.is_file() && new.exists() => take_after(&old, &new, 0o7777)?,
            _ => {}
        }
    }
    let folder = fs::metadata(target).map_err(Error::io("open", target))?;
    take_after(&folder, staging, 0o7777)
}

/// Gives `path` those bits of the mode of `old` that are in `mask`, and its owner, where it has
/// others.
fn take_after(old: &Metadata, path: &Path, mask: u32) -> Result<()> {
    use io::ErrorKind as K;
    let new = fs::metadata(path).map_err(Error::io("open", path))?;
    let mode = old.mode() & mask;
    if new.mode() & 0o7777 != mode {
        // The mode first: whoever may give a file away may not change it then in any case.
        match attempt(|| fs::set_permissions(path, Permissions::from_mode(mode))) {
            // Some file systems have no modes.
            Err(e)
                if !matches!(e.kind(), K::PermissionDenied | K::Unsupported | K::InvalidInput) =>
            {
                return Err(Error::io("set the permissions of", path)(e));
            }
            _ => {}
        }
    }
    let (uid, gid) = (Some(old.uid()), Some(old.gid()));
    // Only root gives files away, and others give them to groups of theirs.
    if (new.uid(), new.gid()) != (old.uid(), old.gid())
        && attempt(|| chown(path, uid, gid)).is_err()
    {
        let _ = attempt(|| chown(path, None, gid));
    }
    Ok(())
}

/// Whether what is beside or in `target` may be of a save of ours: made by this user, or by one who
/// may change everything here in any case.
fn is_trusted(found: &Metadata, target: &Path) -> bool {
    let is_owner = |of: &Path| fs::metadata(of).is_ok_and(|m| m.uid() == found.uid());
    // SAFETY: it has no arguments and cannot fail.
    let user = unsafe { libc::geteuid() };
    found.uid() == user || is_owner(target) || is_owner(parent(target))
}

/// Whether the `owner` of a folder in a checkpoint's folder, of which mode and owner are given, may
/// have saved there. Who may write in it may, except where names belong to whoever made them, as in
/// /tmp.
pub(super) fn may_have_saved(owner: u32, mode: u32, folder_owner: u32) -> bool {
    const STICKY: u32 = 0o1000;
    const ROOT: u32 = 0;
    // SAFETY: it has no arguments and cannot fail.
    let user = unsafe { libc::geteuid() };
    mode & STICKY == 0 || [user, folder_owner, ROOT].contains(&owner)
}

/// Ends what a save without exchange left undone when it was killed.
fn recover(target: &Path, owned: &[&str]) -> Result<()> {
    let old = sibling(target, "old");
    if !is_old(&old, target, owned) {
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
fn is_old(old: &Path, target: &Path, owned: &[&str]) -> bool {
    old.symlink_metadata().is_ok_and(|m| m.is_dir() && is_trusted(&m, target))
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
            if !suffix.is_some_and(is_pid_and_counter) {
                continue;
            }
            // One in use is locked.
            let Ok(leftover) = open_folder(&path) else { continue };
            let is_trusted = leftover.metadata().is_ok_and(|m| is_trusted(&m, target));
            if !is_trusted || leftover.try_lock().is_err() {
                continue;
            }
            if prefix == inside
                || !target.exists()
                || move_back(&path, target, &|name| is_ours(name, owned)).is_ok()
            {
                discard(&path, owned);
            }
        }
    }
}

fn is_pid_and_counter(suffix: &[u8]) -> bool {
    let is_number = |part: &[u8]| !part.is_empty() && part.iter().all(u8::is_ascii_digit);
    let parts: Vec<_> = suffix.split(|&byte| byte == b'-').collect();
    parts.len() == 2 && parts.into_iter().all(is_number)
}

/// Whether an entry of a checkpoint folder is part of a save.
fn is_ours(name: &OsStr, owned: &[&str]) -> bool {
    owned.iter().any(|owned| name == *owned)
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

/// Moves the entries of the replaced folder `from` that are not `ours` into `to`. What has one of
/// the same name there, made since, keeps another beside it; folders are merged.
fn move_back(from: &Path, to: &Path, ours: &dyn Fn(&OsStr) -> bool) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let name = entry?.file_name();
        if ours(&name) {
            continue;
        }
        let (source, place) = (from.join(&name), to.join(&name));
        let is_folder = |path: &Path| path.symlink_metadata().is_ok_and(|m| m.is_dir());
        match attempt(|| rename_new(&source, &place)) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            Err(_) if is_folder(&source) && is_folder(&place) => {
                move_back(&source, &place, &|_| false)?;
                attempt(|| fs::remove_dir(&source))?;
            }
            Err(_) => attempt(|| rename_beside(&source, &place))?,
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Renames to `PATH.kept-N` with the first N that is free.
fn rename_beside(source: &Path, path: &Path) -> io::Result<()> {
    let mut n = 1u64;
    loop {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".kept-{n}"));
        match rename_new(source, Path::new(&name)) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => n += 1,
            other => return other,
        }
    }
}

/// Removes the files of a save and then the folder, if nothing else is in it.
pub(super) fn discard(folder: &Path, owned: &[&str]) {
    for name in owned.iter().chain([&in_place::NAMES]) {
        let _ = attempt(|| fs::remove_file(folder.join(name)));
    }
    let _ = attempt(|| fs::remove_dir(folder));
}

#[cfg(any(target_os = "linux", target_os = "android", target_os = "macos"))]
fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    #[cfg(test)]
    if super::tests::faults::has_no_exchange() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    attempt_once(|| Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?))
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "macos")))]
fn exchange(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Renames where the new name is free, in one step if the file system can.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "android", target_os = "macos"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
            other => return Ok(other?),
        }
    }
    match to.symlink_metadata() {
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(_) => fs::rename(from, to),
    }
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
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    File::options().read(true).custom_flags(flags.bits() as i32).open(path)
}

/// Flushes the names in a folder to the disk.
pub(super) fn sync(folder: &Path) -> Result<()> {
    match attempt(|| open_folder(folder)?.sync_all()) {
        // Some network file systems have no such thing for a folder.
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
            Ok(())
        }
        other => other.map_err(Error::io("flush", folder)),
    }
}
