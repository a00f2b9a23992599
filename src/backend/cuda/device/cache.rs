//! Machine code that was compiled before, in a folder of the user's.
//!
//! Whoever writes a file there decides what a GPU of ours runs. So the folder and every file have
//! to belong to us, others must not be able to write them, and a file says by SHA-256 what it was
//! made from and what it holds. Anything else is as good as no file. Both are looked at through
//! their descriptors, and a file that the driver refuses is compiled anew.

use std::fmt;
use std::fs::{DirBuilder, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, fstat, openat, renameat, unlinkat};
use rustix::process::geteuid;
use sha2::{Digest, Sha256};

use crate::signals::file_limit_is_an_error;

/// What a file was made from, as one number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Key([u8; SUM]);

/// Bytes of a SHA-256.
const SUM: usize = 32;

impl Key {
    /// The key of everything that machine code depends on, part by part.
    pub(crate) fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            // With its length, so that no two lists run into the same bytes.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self(hash.finalize().into())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// How a file begins: this mark, its key, the SHA-256 of the code, then the code.
const MARK: &[u8; 8] = b"mxtcode1";
const HEADER: usize = MARK.len() + 2 * SUM;

/// More than any code of ours; a larger file is none.
const MAX_BYTES: usize = 64 << 20;

/// An open folder that is ours alone.
///
/// NOTE: files are reached by its descriptor, so they are those of the folder that was looked at,
/// whatever becomes of its name.
pub(crate) struct Cache(OwnedFd);

impl Cache {
    /// Opens `folder`, which is made where there is none; else the reason why it is not used.
    pub(crate) fn open(folder: &Path) -> Result<Self, String> {
        let refused = |why: String| format!("{} is not used: {why}", folder.display());
        let failed = |e: io::Error| refused(e.to_string());
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        // A link is followed: what it leads to is looked at.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = openat(CWD, folder, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        let stat = fstat(&open).map_err(|e| failed(e.into()))?;
        match stranger(&stat) {
            None => Ok(Self(open)),
            Some(why) => Err(refused(why)),
        }
    }

    /// The code under `name`, if it was made from what `key` stands for and is whole.
    pub(crate) fn read(&self, name: &str, key: &Key) -> Option<Vec<u8>> {
        // Neither a link is followed nor a pipe waited for.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(&self.0, name, flags, Mode::empty()).ok()?;
        let stat = fstat(&file).ok()?;
        let size = usize::try_from(stat.st_size).ok()?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !is_file || stranger(&stat).is_some() || !(HEADER..=MAX_BYTES).contains(&size) {
            return None;
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(size).ok()?;
        File::from(file).take(size as u64).read_to_end(&mut bytes).ok()?;
        let (found, code) = bytes.split_at_checked(HEADER)?;
        if found != header(key, code) {
            return None;
        }
        // In place: what is as large as that asks for memory first.
        bytes.drain(..HEADER);
        Some(bytes)
    }

    /// Keeps `code` under `name`. It is written under another name first, so that no reader sees
    /// half a file.
    pub(crate) fn write(&self, name: &str, key: &Key, code: &[u8]) -> io::Result<()> {
        // Its keys are random numbers of the system, which nobody guesses.
        let random = RandomState::new().hash_one(name);
        let temporary = format!(".{name}.{random:016x}.part");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let mode = Mode::RUSR | Mode::WUSR;
        let mut file = File::from(openat(&self.0, &temporary, flags | OFlags::CLOEXEC, mode)?);
        let written = file_limit_is_an_error(|| {
            file.write_all(&header(key, code))?;
            file.write_all(code)
        });
        let kept = written.and_then(|()| Ok(renameat(&self.0, &temporary, &self.0, name)?));
        if kept.is_err() {
            let _ = unlinkat(&self.0, &temporary, AtFlags::empty());
        }
        kept
    }
}

fn header(key: &Key, code: &[u8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let (mark, sums) = header.split_at_mut(MARK.len());
    mark.copy_from_slice(MARK);
    sums[..SUM].copy_from_slice(&key.0);
    sums[SUM..].copy_from_slice(&Sha256::digest(code));
    header
}

/// Who else may have written a file or folder, if anybody.
fn stranger(stat: &Stat) -> Option<String> {
    let (owner, user) = (stat.st_uid, geteuid().as_raw());
    if owner != user {
        return Some(format!("it belongs to user {owner} and not to {user}, who runs this"));
    }
    let mode = Mode::from_raw_mode(stat.st_mode);
    let others = mode.intersects(Mode::WGRP | Mode::WOTH);
    others.then(|| "others may write it; take that from them (chmod go-w)".into())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
    use std::path::PathBuf;

    use rustix::fs::mknodat;
    use tempfile::TempDir;

    use super::*;

    const NAME: &str = "file-sm_90a";

    struct Test {
        dir: TempDir,
        cache: Cache,
        key: Key,
    }

    impl Test {
        /// A cache that holds "code".
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let cache = Cache::open(&dir.path().join("a/b")).unwrap();
            let key = Key::of([&b"source"[..], b"options"]);
            cache.write(NAME, &key, b"code").unwrap();
            Self { dir, cache, key }
        }

        fn folder(&self) -> PathBuf {
            self.dir.path().join("a/b")
        }

        fn file(&self) -> PathBuf {
            self.folder().join(NAME)
        }

        fn read(&self) -> Option<Vec<u8>> {
            self.cache.read(NAME, &self.key)
        }

        /// What is in the way is replaced.
        fn heals(&self) {
            assert_eq!(self.read(), None);
            self.cache.write(NAME, &self.key, b"new").unwrap();
            assert_eq!(self.read().unwrap(), b"new");
            assert_eq!(fs::read_dir(self.folder()).unwrap().count(), 1, "something is left");
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_was_written_comes_back_and_is_the_users_alone() {
        let test = Test::new();
        assert_eq!(test.read().unwrap(), b"code");
        assert_eq!(mode(&test.file()) & 0o177, 0);
        assert_eq!([mode(&test.folder()), mode(test.folder().parent().unwrap())], [0o700; 2]);
        assert_eq!(fs::read_dir(test.folder()).unwrap().count(), 1);
        assert_eq!(test.cache.read("other", &test.key), None);
        test.cache.write(NAME, &test.key, b"").unwrap();
        assert_eq!(test.read().unwrap(), b"");
    }

    /// A key is what SHA-256 makes of each part behind its length, for ever.
    #[test]
    fn keys_are_of_all_parts() {
        let key = |parts: &[&[u8]]| Key::of(parts.iter().copied());
        let sum = "ce91dc5eec0139adf091900d225971d6ad246a845bad791b5693a9d0d55dd391";
        assert_eq!(key(&[b"abc"]).to_string(), sum);
        assert_ne!(key(&[b"ab", b"c"]), key(&[b"a", b"bc"]));
        assert_ne!(key(&[b"ab"]), key(&[b"ab", b""]));
        assert_ne!(key(&[b"ab"]), key(&[b"ac"]));
    }

    #[test]
    fn what_was_made_from_something_else_is_not_taken() {
        let test = Test::new();
        let other = Key::of([&b"source"[..], b"other options"]);
        assert_eq!(test.cache.read(NAME, &other), None);
        test.cache.write(NAME, &other, b"code").unwrap();
        test.heals();
    }

    #[test]
    fn damaged_files_are_not_taken() {
        let whole = fs::read(Test::new().file()).unwrap();
        let mut damaged: Vec<Vec<u8>> = (0..whole.len()).map(|n| whole[..n].to_vec()).collect();
        damaged.extend((0..whole.len()).map(|n| {
            let mut bytes = whole.clone();
            bytes[n] ^= 1;
            bytes
        }));
        damaged.push([&whole[..], b"x"].concat());
        damaged.push(vec![0xa5; 4096]);
        // As earlier versions wrote them: length, CRC-32, code.
        damaged.push(
            [&4u64.to_le_bytes()[..], &crc32fast::hash(b"code").to_le_bytes(), b"code"].concat(),
        );
        let test = Test::new();
        for bytes in damaged {
            fs::write(test.file(), &bytes).unwrap();
            assert_eq!(test.read(), None, "{bytes:?}");
        }
        test.heals();
        // A size that no code has. It takes no room on the disk.
        let file = fs::OpenOptions::new().write(true).open(test.file()).unwrap();
        file.set_len(1 << 40).unwrap();
        test.heals();
    }

    #[test]
    fn links_pipes_and_folders_are_not_taken() {
        let test = Test::new();
        let elsewhere = test.dir.path().join("elsewhere");
        fs::rename(test.file(), &elsewhere).unwrap();
        symlink(&elsewhere, test.file()).unwrap();
        test.heals();
        assert!(elsewhere.is_file(), "the link was followed");

        fs::remove_file(test.file()).unwrap();
        mknodat(CWD, test.file(), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        test.heals();

        fs::remove_file(test.file()).unwrap();
        fs::create_dir(test.file()).unwrap();
        assert_eq!(test.read(), None);
        assert!(test.cache.write(NAME, &test.key, b"new").is_err());
        assert_eq!(fs::read_dir(test.folder()).unwrap().count(), 1, "the temporary file is left");
    }

    #[test]
    fn what_others_may_write_is_not_taken() {
        for mode in [0o620, 0o602, 0o666] {
            let test = Test::new();
            set_mode(&test.file(), mode);
            test.heals();
        }
        for mode in [0o770, 0o707, 0o1777] {
            let test = Test::new();
            set_mode(&test.folder(), mode);
            let error = Cache::open(&test.folder()).map(drop).unwrap_err();
            assert!(error.contains("others may write it"), "{error}");
            set_mode(&test.folder(), 0o755);
            let cache = Cache::open(&test.folder()).unwrap();
            assert_eq!(cache.read(NAME, &test.key).unwrap(), b"code");
        }
    }

    /// Only root can give files away.
    #[test]
    fn what_belongs_to_others_is_not_taken() {
        let test = Test::new();
        if chown(test.file(), Some(12345), None).is_err() {
            println!("skipped: not root");
            return;
        }
        test.heals();
        chown(test.folder(), Some(12345), None).unwrap();
        let error = Cache::open(&test.folder()).map(drop).unwrap_err();
        assert!(error.contains("belongs to user 12345"), "{error}");
    }

    #[test]
    fn a_folder_that_cannot_be_is_an_error_with_the_reason() {
        let test = Test::new();
        let error = Cache::open(&test.file().join("below")).map(drop).unwrap_err();
        assert!(error.contains("is not used: ") && error.contains(NAME), "{error}");
        assert!(Cache::open(&test.file()).is_err());
        let link = test.dir.path().join("link");
        symlink(test.folder(), &link).unwrap();
        assert_eq!(Cache::open(&link).unwrap().read(NAME, &test.key).unwrap(), b"code");
    }
}
