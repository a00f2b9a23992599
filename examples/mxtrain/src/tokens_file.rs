//! Writes token files in llm.c's formats: a header of 256 little-endian i32 (magic number, version,
//! number of tokens, zeros), then the tokens as little-endian u16, or as u32 where a vocabulary has
//! more than 65,536 tokens.
//!
//! A file is written under a temporary name and renamed when it is complete, so that a reader never
//! meets half a file and an interrupted `prepare` leaves an older file whole.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome};

const HEADER_INTS: usize = 256;
/// The header counts tokens in an i32.
const MAX_TOKENS: u64 = i32::MAX as u64;
/// Tokens that are turned into bytes at a time.
const BLOCK: usize = 1 << 12;

/// What a token is in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Width {
    #[default]
    U16,
    U32,
}

impl Width {
    /// The narrower one that holds every token of a vocabulary.
    pub(crate) fn of(vocab_size: usize) -> Self {
        if vocab_size <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    /// Whether it is what all files had once.
    pub(crate) fn is_u16(&self) -> bool {
        *self == Self::U16
    }

    fn bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }

    /// Magic number and version.
    fn kind(self) -> [i32; 2] {
        match self {
            Self::U16 => [20240520, 1],
            Self::U32 => [20240801, 7],
        }
    }

    /// Where a token lies in a file.
    fn place(self, token: u64) -> u64 {
        HEADER_INTS as u64 * 4 + token * self.bytes() as u64
    }

    fn encode(self, tokens: &[u32], bytes: &mut Vec<u8>) {
        bytes.resize(tokens.len() * self.bytes(), 0);
        match self {
            Self::U16 => {
                for (to, token) in bytes.as_chunks_mut().0.iter_mut().zip(tokens) {
                    debug_assert!(*token <= u16::MAX.into(), "the vocabulary was to be smaller");
                    *to = (*token as u16).to_le_bytes();
                }
            }
            Self::U32 => {
                for (to, token) in bytes.as_chunks_mut().0.iter_mut().zip(tokens) {
                    *to = token.to_le_bytes();
                }
            }
        }
    }

    fn decode(self, bytes: &[u8]) -> Vec<u32> {
        match self {
            Self::U16 => {
                bytes.as_chunks().0.iter().map(|token| u16::from_le_bytes(*token).into()).collect()
            }
            Self::U32 => {
                bytes.as_chunks().0.iter().map(|token| u32::from_le_bytes(*token)).collect()
            }
        }
    }
}

/// A token file that is being written.
pub(crate) struct TokensFile {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    width: Width,
    tokens: u64,
    last: Option<u32>,
    /// For the bytes of tokens.
    bytes: Vec<u8>,
}

impl TokensFile {
    /// Begins a file that will be called `path` in the end.
    pub(crate) fn create(path: PathBuf, width: Width) -> Outcome<Self> {
        let temporary = temporary_name(&path);
        let mut file = create_anew(&temporary)
            .map(|file| BufWriter::with_capacity(1 << 18, file))
            .map_err(Failure::io("create", &temporary))?;
        file.write_all(&header(width, 0)).map_err(Failure::io("write", &temporary))?;
        Ok(Self { path, temporary, file, width, tokens: 0, last: None, bytes: Vec::new() })
    }

    /// Appends tokens.
    pub(crate) fn push(&mut self, tokens: &[u32]) -> Outcome {
        if self.tokens + tokens.len() as u64 > MAX_TOKENS {
            return Err(Failure::usage(format!(
                "{}: a token file holds at most {MAX_TOKENS} tokens; prepare the inputs in parts, \
                 each into a folder of its own, and train with --train 'parts/*/train.bin'",
                self.path.display()
            )));
        }
        for block in tokens.chunks(BLOCK) {
            self.width.encode(block, &mut self.bytes);
            self.file.write_all(&self.bytes).map_err(Failure::io("write", &self.temporary))?;
        }
        self.tokens += tokens.len() as u64;
        self.last = tokens.last().copied().or(self.last);
        Ok(())
    }

    /// Tokens written so far.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The last token written.
    pub(crate) fn last(&self) -> Option<u32> {
        self.last
    }

    /// Reads tokens from `first` on.
    pub(crate) fn read(&mut self, first: u64, tokens: &mut [u32]) -> Outcome {
        let mut bytes = vec![0; self.width.bytes() * tokens.len()];
        self.file.flush().map_err(Failure::io("write", &self.temporary))?;
        (self.file.get_ref().read_exact_at(&mut bytes, self.width.place(first)))
            .map_err(Failure::io("read", &self.temporary))?;
        tokens.copy_from_slice(&self.width.decode(&bytes));
        Ok(())
    }

    /// Appends some of the tokens to another file.
    pub(crate) fn copy(&mut self, range: Range<u64>, to: &mut Self) -> Outcome {
        self.blocks(range, |_, block| to.push(block))
    }

    /// Takes some of the tokens out.
    pub(crate) fn remove(&mut self, range: Range<u64>) -> Outcome {
        let (gap, temporary) = (range.end - range.start, self.temporary.clone());
        let file = self.file.get_ref().try_clone().map_err(Failure::io("write", &temporary))?;
        let (mut bytes, width) = (Vec::new(), self.width);
        self.blocks(range.end..self.tokens, |first, block| {
            width.encode(block, &mut bytes);
            let place = width.place(first - gap);
            file.write_all_at(&bytes, place).map_err(Failure::io("write", &temporary))
        })?;
        self.tokens -= gap;
        let end = width.place(self.tokens);
        self.file
            .flush()
            .and_then(|()| file.set_len(end))
            .and_then(|()| self.file.seek(SeekFrom::Start(end)))
            .map_err(Failure::io("write", &temporary))?;
        let mut last = [0];
        if self.tokens > 0 {
            self.read(self.tokens - 1, &mut last)?;
        }
        self.last = (self.tokens > 0).then_some(last[0]);
        Ok(())
    }

    /// Gives tokens in blocks, each with its place.
    fn blocks(
        &mut self,
        range: Range<u64>,
        mut give: impl FnMut(u64, &[u32]) -> Outcome,
    ) -> Outcome {
        let mut block = vec![0; 1 << 16];
        let mut first = range.start;
        while first < range.end {
            let count = (range.end - first).min(block.len() as u64) as usize;
            self.read(first, &mut block[..count])?;
            give(first, &block[..count])?;
            first += count as u64;
        }
        Ok(())
    }

    /// Writes the header, so that the file is complete, though under its temporary name.
    pub(crate) fn seal(mut self) -> Outcome<SealedFile> {
        let write = |file: &mut BufWriter<File>| -> io::Result<()> {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header(self.width, self.tokens as i32))?;
            file.flush()?;
            file.get_ref().sync_all()
        };
        write(&mut self.file).map_err(Failure::io("write", &self.temporary))?;
        Ok(SealedFile { file: self })
    }
}

/// A complete token file that does not have its name yet.
pub(crate) struct SealedFile {
    file: TokensFile,
}

impl SealedFile {
    /// Tokens in it.
    pub(crate) fn tokens(&self) -> u64 {
        self.file.tokens
    }

    /// Gives the file its name, in place of an older one.
    pub(crate) fn publish(self) -> Outcome {
        let TokensFile { temporary, path, .. } = &self.file;
        fs::rename(temporary, path).map_err(Failure::io("create", path))
    }
}

impl Drop for TokensFile {
    /// Takes an unfinished file away; a finished one no longer has its temporary name.
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Reads `length` tokens from token `first` on of a file that [`TokensFile`] wrote.
pub(crate) fn read_window(path: &Path, first: u64, length: usize) -> Outcome<Vec<u32>> {
    let read = || -> io::Result<Vec<u32>> {
        let mut file = File::open(path)?;
        let mut magic = [0; 4];
        file.read_exact(&mut magic)?;
        let is_wide = i32::from_le_bytes(magic) == Width::U32.kind()[0];
        let width = if is_wide { Width::U32 } else { Width::U16 };
        let mut bytes = vec![0; length * width.bytes()];
        file.read_exact_at(&mut bytes, width.place(first))?;
        Ok(width.decode(&bytes))
    };
    read().map_err(Failure::io("read", path))
}

/// Writes a small file under a temporary name, then renames it.
pub(crate) fn write_whole(path: &Path, contents: &[u8]) -> Outcome {
    let temporary = temporary_name(path);
    let write = || -> io::Result<()> {
        let mut file = create_anew(&temporary)?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(Failure::io("write", path)).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Creates a file in the place of what a killed process has left. Anything else of the name must
/// not be written to: a pipe would wait for its reader, a link leads elsewhere.
pub(crate) fn create_anew(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => File::options().read(true).write(true).create_new(true).open(path),
    }
}

/// What a file is called until it is complete.
pub(crate) fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

fn header(width: Width, tokens: i32) -> [u8; HEADER_INTS * 4] {
    let mut bytes = [0; HEADER_INTS * 4];
    let [magic, version] = width.kind();
    for (i, value) in [magic, version, tokens].into_iter().enumerate() {
        bytes[i * 4..][..4].copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_in_the_place_of_the_temporary_file_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let [path, precious] = ["a.json", "precious"].map(|name| dir.path().join(name));
        fs::write(&precious, "words").unwrap();
        std::os::unix::fs::symlink(&precious, temporary_name(&path)).unwrap();
        write_whole(&path, b"new").unwrap();
        assert_eq!(fs::read_to_string(&precious).unwrap(), "words");
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    }

    #[test]
    fn the_bytes_are_llm_cs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.bin");
        let mut file = TokensFile::create(path.clone(), Width::U16).unwrap();
        file.push(&[1, 513]).unwrap();
        file.push(&[50256]).unwrap();
        let sealed = file.seal().unwrap();
        assert!(!path.exists());
        assert_eq!(sealed.tokens(), 3);
        sealed.publish().unwrap();

        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 1024 + 6);
        assert_eq!(bytes[..12], [0x88, 0xd8, 0x34, 0x01, 1, 0, 0, 0, 3, 0, 0, 0]);
        assert!(bytes[12..1024].iter().all(|&b| b == 0));
        assert_eq!(bytes[1024..], [1, 0, 1, 2, 0x50, 0xc4]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(read_window(&path, 1, 2).unwrap(), [513, 50256]);
        assert!(read_window(&path, 2, 2).is_err());
    }

    #[test]
    fn the_bytes_of_large_tokens_are_llm_cs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.bin");
        assert_eq!([65_535, 65_536, 65_537].map(|size| Width::of(size).bytes()), [2, 2, 4]);
        let mut file = TokensFile::create(path.clone(), Width::U32).unwrap();
        file.push(&[1, 0x0102_0304]).unwrap();
        file.seal().unwrap().publish().unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes[..12], [0xa1, 0xd9, 0x34, 0x01, 7, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(bytes[1024..], [1, 0, 0, 0, 4, 3, 2, 1]);
        assert_eq!(read_window(&path, 1, 1).unwrap(), [0x0102_0304]);
        assert!(read_window(&path, 1, 2).is_err());
    }

    #[test]
    fn tokens_can_be_moved_to_another_file() {
        for width in [Width::U16, Width::U32] {
            let dir = tempfile::tempdir().unwrap();
            let create = |name| TokensFile::create(dir.path().join(name), width).unwrap();
            let (mut from, mut to) = (create("a"), create("b"));
            let last = if width.is_u16() { 49_999 } else { 99_999 };
            let tokens: Vec<u32> = (0..200_000_u32).map(|t| t % (last + 1)).collect();
            from.push(&tokens).unwrap();
            from.copy(5..70_005, &mut to).unwrap();
            from.remove(5..70_005).unwrap();
            assert_eq!((from.tokens(), from.last()), (130_000, Some(last)));
            from.push(&[7]).unwrap();
            let mut found = vec![0; 130_001];
            from.read(0, &mut found).unwrap();
            assert_eq!(found, [&tokens[..5], &tokens[70_005..], &[7]].concat());
            let mut moved = vec![0; 70_000];
            to.read(0, &mut moved).unwrap();
            assert_eq!(moved, tokens[5..70_005]);
            from.remove(0..130_001).unwrap();
            assert_eq!((from.tokens(), from.last()), (0, None));
        }
    }

    #[test]
    fn an_unfinished_file_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.bin");
        fs::write(&path, "old").unwrap();
        drop(TokensFile::create(path.clone(), Width::U16).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
