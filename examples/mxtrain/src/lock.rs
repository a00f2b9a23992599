//! The lock that a run has on the folder that it writes, so that no second run writes there.
//!
//! It is the system's lock (flock) on the small file `.mxt-lock` in the folder, which is gone with
//! the process. The library takes the file along when it replaces the folder, as the same inode, so
//! the lock holds. What the file says is for people only.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use rustix::fs::OFlags;

use crate::console;
use crate::failure::{Failure, Outcome};
use crate::files::is_at;

/// The library knows the name.
pub(crate) const FILE: &str = ".mxt-lock";

/// How long a run that is ending is waited for, and how long until it is looked at again.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(50);

/// A folder that is this run's, as long as it lives.
pub(crate) struct RunLock {
    path: PathBuf,
    /// Locked; `None` where that could not be, which other checks then have to do without.
    file: Option<File>,
    /// Folders that were made for it, the innermost first.
    made: Vec<PathBuf>,
}

impl RunLock {
    /// Locks the folder, which is made if it is not there.
    ///
    /// A folder that cannot be made or written is no failure here: the first save will say why. Nor
    /// is a file system without locks, after a warning.
    pub(crate) fn take(folder: &Path) -> Outcome<Self> {
        let is_missing = |folder: &&Path| folder.symlink_metadata().is_err();
        let missing = folder.ancestors().filter(|f| !f.as_os_str().is_empty());
        let made: Vec<_> = missing.take_while(is_missing).map(Path::to_owned).collect();
        let mut lock = Self { path: folder.join(FILE), file: None, made };
        if fs::create_dir_all(folder).is_ok() {
            lock.file = lock.open()?;
        }
        Ok(lock)
    }

    /// What to remove for a run that never began.
    pub(crate) fn traces(&self) -> Vec<PathBuf> {
        self.file.iter().map(|_| self.path.clone()).chain(self.made.clone()).collect()
    }

    /// Locks the folder anew if it was removed and made again, or if the file was copied because
    /// the file system has no links.
    pub(crate) fn renew(&mut self) {
        if let Some(file) = &self.file
            && !is_at(file, &self.path)
            && let Ok(Some(file)) = self.open()
        {
            self.file = Some(file);
        }
    }

    fn open(&self) -> Outcome<Option<File>> {
        let mut waited = Duration::ZERO;
        loop {
            let mut file = match open(&self.path) {
                Ok(file) => file,
                Err(error) if self.path.symlink_metadata().is_ok() => {
                    self.warn(&error);
                    return Ok(None);
                }
                // A folder that may not be written: the first save will say so.
                Err(_) => return Ok(None),
            };
            match file.try_lock() {
                Err(TryLockError::WouldBlock) => {
                    let mut holder = String::new();
                    let _ = (&file).take(1 << 10).read_to_string(&mut holder);
                    // A run that was killed lets go when its memory is gone, which takes seconds where
                    // a GPU holds much of it.
                    if let Some(process) = process_of(&holder).filter(|process| is_ending(*process))
                        && waited < PATIENCE
                    {
                        if waited.is_zero() {
                            console::note(&format!(
                                "mxtrain: the run of process {process}, which is ending, still has \
                                 {}; waiting for it",
                                self.path.parent().unwrap_or(&self.path).display()
                            ));
                        }
                        sleep(PAUSE);
                        waited += PAUSE;
                        continue;
                    }
                    return Err(Failure::usage(format!(
                        "--out: another run ({}) is using {}; wait for it, stop it, or name another \
                         folder",
                        holder.trim(),
                        self.path.parent().unwrap_or(&self.path).display()
                    )));
                }
                Err(TryLockError::Error(error)) => {
                    self.warn(&error);
                    return Ok(None);
                }
                Ok(()) => {}
            }
            // The run that had it may have removed it meanwhile.
            if is_at(&file, &self.path) {
                let _ = describe(&mut file);
                return Ok(Some(file));
            }
        }
    }

    fn warn(&self, error: &io::Error) {
        console::note(&format!(
            "mxtrain: warning: cannot lock {}: {error}; see to it yourself that no second run \
             writes to that folder",
            self.path.display()
        ));
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        if let Some(file) = &self.file
            && is_at(file, &self.path)
        {
            let _ = fs::remove_file(&self.path);
            // Those that are empty.
            self.made.iter().all(|folder| fs::remove_dir(folder).is_ok());
        }
    }
}

/// Opens the lock's file, and nothing else that has its name: what a link leads to would be written
/// over.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.custom_flags(flags.bits() as i32).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file")),
    }
}

fn host() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// The process of this machine that [`describe`] named.
fn process_of(line: &str) -> Option<u32> {
    let (process, rest) = line.strip_prefix("process ")?.split_once(" on ")?;
    let (name, _) = rest.split_once(" since ")?;
    (name == host()).then(|| process.parse().ok()).flatten()
}

/// Whether a process was killed, but is still there; false where the system does not say.
fn is_ending(process: u32) -> bool {
    let read =
        |name: &str| fs::read_to_string(format!("/proc/{process}/{name}")).unwrap_or_default();
    // Behind the name, in brackets: the state, five numbers, and the kernel's flags.
    let stat = read("stat");
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let (state, flags) = (fields.next(), fields.nth(5));
    let exits = flags.and_then(|flags| flags.parse::<u64>().ok()).is_some_and(|f| f & 4 != 0);
    // A signal 9 that has not come through yet.
    let status = read("status");
    let pending = status.lines().filter_map(|line| {
        let mask = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    });
    state == Some("Z") || exits || pending.into_iter().any(|mask| mask >> 8 & 1 == 1)
}

/// Writes who has the lock. Not into a file that has another name too and holds something else: a
/// checkpoint that was unpacked can have made this name one for any file of its user. What is left
/// of a killed save has two names as well, but holds our line.
fn describe(file: &mut File) -> io::Result<()> {
    let metadata = file.metadata()?;
    if metadata.nlink() > 1 {
        let mut line = String::new();
        file.take(1 << 10).read_to_string(&mut line)?;
        let is_ours = line.is_empty() || line.starts_with("process ") && line.lines().count() == 1;
        if !is_ours || metadata.len() != line.len() as u64 {
            return Ok(());
        }
    }
    let host = host();
    let since = humantime::format_rfc3339_seconds(SystemTime::now());
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "process {} on {host} since {since}", process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_run() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a/out");
        let lock = RunLock::take(&out).unwrap();
        let failure = RunLock::take(&out).err().unwrap();
        assert_eq!(failure.code, 2);
        let holder = format!("another run (process {} on ", process::id());
        assert!(failure.message.contains(&holder), "{}", failure.message);
        drop(lock);
        assert!(!dir.path().join("a").exists());
        // What a killed run has left is no lock.
        fs::create_dir_all(&out).unwrap();
        fs::write(out.join(FILE), "process 1 on nowhere").unwrap();
        let lock = RunLock::take(&out).unwrap();
        assert!(fs::read_to_string(out.join(FILE)).unwrap().contains(&process::id().to_string()));
        drop(lock);
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_run_that_is_ending_is_waited_for() {
        assert!(!is_ending(process::id()) && !is_ending(u32::MAX));
        // One that has ended, which nobody has asked for its end yet.
        let mut ended = process::Command::new("true").spawn().unwrap();
        while !is_ending(ended.id()) {
            sleep(Duration::from_millis(1));
        }
        let dir = tempfile::tempdir().unwrap();
        let lock = RunLock::take(dir.path()).unwrap();
        let line = format!("process {} on {} since yesterday\n", ended.id(), host());
        assert_eq!(process_of(&line), Some(ended.id()));
        assert_eq!(
            process_of(&format!("process {} on elsewhere since yesterday", ended.id())),
            None
        );
        fs::write(dir.path().join(FILE), line).unwrap();
        let letting_go = std::thread::spawn(move || {
            sleep(Duration::from_millis(200));
            drop(lock);
        });
        let taken = RunLock::take(dir.path());
        ended.wait().unwrap();
        letting_go.join().unwrap();
        assert!(taken.is_ok());
    }

    #[test]
    fn what_is_no_file_of_a_lock_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let precious = dir.path().join("precious");
        fs::write(&precious, "words").unwrap();
        std::os::unix::fs::symlink(&precious, dir.path().join(FILE)).unwrap();
        drop(RunLock::take(dir.path()).unwrap());
        assert_eq!(fs::read_to_string(&precious).unwrap(), "words");
        fs::remove_file(dir.path().join(FILE)).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, dir.path().join(FILE), fifo, mode, 0).unwrap();
        let lock = RunLock::take(dir.path()).unwrap();
        assert!(lock.file.is_none());
        drop(lock);
        assert!(dir.path().join(FILE).symlink_metadata().is_ok());
    }

    #[test]
    fn another_name_of_a_file_is_no_place_to_write_to() {
        let dir = tempfile::tempdir().unwrap();
        let [lock, other] = [FILE, "other"].map(|name| dir.path().join(name));
        for words in ["words", "process of law\nwords\n"] {
            fs::write(&other, words).unwrap();
            fs::hard_link(&other, &lock).unwrap();
            let taken = RunLock::take(dir.path()).unwrap();
            assert!(RunLock::take(dir.path()).is_err());
            drop(taken);
            assert_eq!(fs::read_to_string(&other).unwrap(), words);
        }
        // A save gives the lock a second name, and a killed one leaves it.
        fs::write(&other, "process 1 on nowhere since long\n").unwrap();
        fs::hard_link(&other, &lock).unwrap();
        let taken = RunLock::take(dir.path()).unwrap();
        let text = fs::read_to_string(&lock).unwrap();
        assert!(text.starts_with(&format!("process {} on ", process::id())), "{text}");
        drop(taken);
    }

    #[test]
    fn a_folder_that_was_made_again_is_locked_again() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut lock = RunLock::take(&out).unwrap();
        fs::remove_dir_all(&out).unwrap();
        fs::create_dir(&out).unwrap();
        lock.renew();
        assert!(RunLock::take(&out).is_err());
    }
}
