//! The bytes of a file that is mapped, and that another process may change, shorten or replace, or
//! whose disk may fail, at any time.
//!
//! NOTE: nobody looks at a map. A page that is not there any more would end the process with
//! SIGBUS, so there is no slice of one and no reference into one: the kernel copies out of the map
//! (`process_vm_readv`, or a pipe where that is forbidden), and answers EFAULT where a page is
//! gone. A map is thus an address that the kernel reads from. It is still the right thing to hold:
//! unlike a descriptor it is not counted against RLIMIT_NOFILE, and it keeps the file that was
//! opened, whatever becomes of its name.
//!
//! Reading goes another way in three cases, all by the file's path:
//! - A pass over a whole file opens it for as long as a block takes, because the kernel reads twice
//!   as fast from a file as from a map.
//! - Files beyond [`MOST_MAPS`] have no map, and none that the system does not want to map.
//! - What the map does not give is asked for again, for the sake of the system's error.

use std::fs::{File, Metadata};
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use crate::{Error, Result};

/// Most maps that all datasets of a process hold. Linux gives a process 65,530 in all, and a host
/// whose memory allocator gets none any more dies.
const MOST_MAPS: usize = 1 << 14;

static MAPS: AtomicUsize = AtomicUsize::new(0);

/// Device and inode: what a file is, whatever its name.
pub(super) type Id = (u64, u64);

pub(super) fn id(metadata: &Metadata) -> Id {
    (metadata.dev(), metadata.ino())
}

/// A file that was opened once.
#[derive(Debug)]
pub(super) struct Source {
    id: Id,
    map: Option<Map>,
    /// Where the path given is relative: the folder that it begins in may change.
    absolute: Option<PathBuf>,
}

impl Source {
    /// Maps a file that is open.
    pub(super) fn new(path: &Path, file: &File, metadata: &Metadata) -> Self {
        Self::with_limit(path, file, metadata, MOST_MAPS)
    }

    fn with_limit(path: &Path, file: &File, metadata: &Metadata, most_maps: usize) -> Self {
        let map = Map::new(file, metadata.len(), most_maps);
        // Without a current folder the path given has to do.
        let absolute = if path.is_absolute() { None } else { std::path::absolute(path).ok() };
        Self { id: id(metadata), map, absolute }
    }

    /// Fills `out` with bytes `at`.. of the file at `path`. A step does it, so it allocates
    /// nothing.
    ///
    /// # Errors
    /// [`Error::Io`] where they are not there any more.
    pub(super) fn read(&self, path: &Path, at: u64, out: &mut [u8]) -> Result<()> {
        let failure = match self.map.as_ref().map(|map| map.copy(at, out)) {
            Some(Ok(())) => return self.check_end(path, at, out),
            Some(Err(failure)) => Some(failure),
            None => None,
        };
        if let Some(file) = self.reopen(path)? {
            return read_at(&file, path, at, out);
        }
        Err(Error::io("read", path)(match failure {
            Some(failure) if failure.raw_os_error() != Some(libc::EFAULT) => failure,
            _ => io::Error::other(
                "a part of the file cannot be read any more: it has become shorter, or its disk fails",
            ),
        }))
    }

    /// The file opened anew: with a map where its path still leads to it, else `None`; without one
    /// whatever file the path leads to.
    pub(super) fn reopen(&self, path: &Path) -> Result<Option<File>> {
        let opened = open_file(self.path(path));
        if self.map.is_none() {
            return opened.map(|(file, _)| Some(file));
        }
        Ok(opened.ok().filter(|(_, metadata)| id(metadata) == self.id).map(|(file, _)| file))
    }

    fn path<'a>(&'a self, given: &'a Path) -> &'a Path {
        self.absolute.as_deref().unwrap_or(given)
    }

    /// NOTE: the page in which a file ends goes on with zeros, and a file that ends earlier now
    /// gives zeros up to the end of a page instead of an error. Bytes copied that end so are looked
    /// into.
    fn check_end(&self, path: &Path, at: u64, out: &[u8]) -> Result<()> {
        if out.last() != Some(&0) {
            return Ok(());
        }
        let end = at + out.len() as u64;
        match std::fs::metadata(self.path(path)) {
            Ok(metadata) if id(&metadata) == self.id && metadata.len() < end => {
                Err(shorter(path, metadata.len(), end))
            }
            // A file that has been replaced or removed is no longer written to.
            _ => Ok(()),
        }
    }
}

/// Opens a file that holds bytes, and waits for nothing: not for a pipe's writer, a device or a
/// terminal. A step does it, so a path is copied for an error alone.
pub(super) fn open_file(path: &Path) -> Result<(File, Metadata)> {
    let fail = |e| Error::io("open", path)(e);
    // First by its name, because opening some devices does something.
    check_kind(path, &std::fs::metadata(path).map_err(fail)?)?;
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open(path).map_err(fail)?;
    // The name may be another file's by now.
    let metadata = file.metadata().map_err(fail)?;
    check_kind(path, &metadata)?;
    Ok((file, metadata))
}

fn check_kind(path: &Path, metadata: &Metadata) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    Err(Error::format(
        path,
        if metadata.is_dir() {
            "expected a token file, found a folder; name a file in it or a pattern such as \
             FOLDER/*.bin"
        } else {
            "expected a token file, found a pipe or device"
        },
    ))
}

/// Fills `out` with bytes `at`.. of an open file.
pub(super) fn read_at(file: &File, path: &Path, at: u64, out: &mut [u8]) -> Result<()> {
    let fail = |e| Error::io("read", path)(e);
    match file.read_exact_at(out, at) {
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => {
            let found = file.metadata().map_err(fail)?.len();
            Err(shorter(path, found, at + out.len() as u64))
        }
        result => result.map_err(fail),
    }
}

fn shorter(path: &Path, found: u64, needed: u64) -> Error {
    let message = match found < needed {
        true => format!("the file has become shorter: {found} bytes where {needed} are needed"),
        // As some files do that are made as they are read, in /sys for example.
        false => {
            format!("the file ends before byte {needed}, although it has {found} by its length")
        }
    };
    Error::io("read", path)(io::Error::new(ErrorKind::UnexpectedEof, message))
}

/// A map that only the kernel reads.
#[derive(Debug)]
struct Map(MmapRaw);

impl Map {
    /// `None` where there are enough maps, or the system refuses one.
    fn new(file: &File, length: u64, most: usize) -> Option<Self> {
        let length = usize::try_from(length).ok()?;
        if MAPS.fetch_add(1, Ordering::Relaxed) < most
            && let Ok(map) = MmapOptions::new().len(length).map_raw_read_only(file)
        {
            return Some(Self(map));
        }
        MAPS.fetch_sub(1, Ordering::Relaxed);
        None
    }

    fn copy(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        let end = at.checked_add(out.len() as u64).filter(|&end| end <= self.0.len() as u64);
        if end.is_none() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        // What the map holds lies in memory.
        let from = self.0.as_ptr().wrapping_add(at as usize);
        copy_in_process(from, out).unwrap_or_else(|| copy_through_pipe(from, out))
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        MAPS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Copies from an address at which there may be nothing, by the call that reads another process'
/// memory, here our own. `None` where there is no such call: it is Linux's, and sandboxes may
/// forbid it.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn copy_in_process(from: *const u8, out: &mut [u8]) -> Option<io::Result<()>> {
    use std::sync::atomic::AtomicBool;
    static IS_REFUSED: AtomicBool = AtomicBool::new(false);
    if IS_REFUSED.load(Ordering::Relaxed) {
        return None;
    }
    let mut done = 0;
    while done < out.len() {
        let rest = &mut out[done..];
        let to = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        let from = libc::iovec {
            iov_base: from.wrapping_add(done).cast_mut().cast(),
            iov_len: rest.len(),
        };
        // SAFETY: the kernel writes at most the rest of `out`; where it reads from it checks
        // itself.
        let count = unsafe { libc::process_vm_readv(libc::getpid(), &to, 1, &from, 1, 0) };
        match usize::try_from(count) {
            Ok(0) => return Some(Err(io::Error::from_raw_os_error(libc::EFAULT))),
            Ok(count) => done += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::ENOSYS | libc::EPERM | libc::EACCES) => {
                        IS_REFUSED.store(true, Ordering::Relaxed);
                        return None;
                    }
                    _ => return Some(Err(error)),
                }
            }
        }
    }
    Some(Ok(()))
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn copy_in_process(_: *const u8, _: &mut [u8]) -> Option<io::Result<()>> {
    None
}

/// The same through a pipe, which any system and sandbox has. A pipe for each call, so that neither
/// threads nor forked processes share one.
fn copy_through_pipe(from: *const u8, out: &mut [u8]) -> io::Result<()> {
    /// An empty pipe takes as much without waiting.
    const ROOM: usize = 4096;
    let (mut reader, writer) = io::pipe()?;
    let mut done = 0;
    while done < out.len() {
        let length = ROOM.min(out.len() - done);
        let from = from.wrapping_add(done).cast();
        // SAFETY: the kernel checks itself where it reads from.
        let count = unsafe { libc::write(writer.as_raw_fd(), from, length) };
        match usize::try_from(count) {
            Ok(0) => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
            Ok(count) => {
                reader.read_exact(&mut out[done..done + count])?;
                done += count;
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: usize = 64 << 10;

    fn file(dir: &tempfile::TempDir) -> (PathBuf, File, Vec<u8>) {
        let bytes: Vec<u8> = (0..2 * PAGES as u32 + 100).map(|i| 1 + (i % 251) as u8).collect();
        let path = dir.path().join("f");
        std::fs::write(&path, &bytes).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        (path, file, bytes)
    }

    #[test]
    fn every_way_out_of_a_map_ends_without_a_signal() {
        let dir = tempfile::TempDir::new().unwrap();
        let (_, file, bytes) = file(&dir);
        let map = Map::new(&file, bytes.len() as u64, usize::MAX).unwrap();
        type Way = fn(*const u8, &mut [u8]) -> io::Result<()>;
        let mut ways: Vec<Way> = vec![copy_through_pipe];
        // A sandbox may do without the other one.
        let pointer = map.0.as_ptr();
        if copy_in_process(pointer, &mut [0]).is_some() {
            ways.push(|from, out| copy_in_process(from, out).unwrap());
        }
        for way in &ways {
            for (at, length) in [(0, 0), (5, 1), (0, 4096), (4095, 4098), (77, 2 * PAGES)] {
                let mut out = vec![0; length];
                way(pointer.wrapping_add(at), &mut out).unwrap();
                assert_eq!(out, bytes[at..at + length]);
            }
        }
        assert!(map.copy(2 * PAGES as u64, &mut [0; 101]).is_err(), "beyond the map");
        file.set_len(PAGES as u64).unwrap();
        for way in ways {
            for at in [PAGES, PAGES - 1, 0] {
                let mut out = vec![0; PAGES + 1];
                let error = way(pointer.wrapping_add(at), &mut out).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{error}");
            }
        }
    }

    #[test]
    fn a_file_without_a_map_is_read_by_its_name() {
        for most in [0, usize::MAX] {
            let dir = tempfile::TempDir::new().unwrap();
            let (path, file, bytes) = file(&dir);
            let metadata = file.metadata().unwrap();
            let source = Source::with_limit(&path, &file, &metadata, most);
            assert_eq!(source.map.is_some(), most > 0);
            let mut out = [0; 5000];
            source.read(&path, 3000, &mut out).unwrap();
            assert_eq!(out, bytes[3000..8000]);
            // Zeros at the end of what is read are no sign of an end.
            file.write_all_at(&[0; 100], 7900).unwrap();
            source.read(&path, 3000, &mut out).unwrap();
            assert_eq!(out[4900..], [0; 100]);
            for keep in [7999, 3001, 0] {
                file.set_len(keep).unwrap();
                let error = source.read(&path, 3000, &mut out).unwrap_err().to_string();
                let expected = format!("become shorter: {keep} bytes where 8000 are needed");
                assert!(error.contains(&expected), "{error}");
            }
            // A file of that name is not the one that is mapped.
            let other = dir.path().join("other");
            std::fs::write(&other, &bytes).unwrap();
            std::fs::rename(&other, &path).unwrap();
            match source.read(&path, 3000, &mut out) {
                Ok(()) => assert!(most == 0 && out == bytes[3000..8000]),
                Err(e) => assert!(most > 0 && e.to_string().contains("its disk fails"), "{e}"),
            }
            std::fs::remove_file(&path).unwrap();
            assert!(source.read(&path, 3000, &mut out).is_err());
        }
    }
}
