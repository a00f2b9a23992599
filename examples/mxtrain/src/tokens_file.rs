//! Writes token files in llm.c's format: a header of 256 little-endian i32 (magic number, version,
//! number of tokens, zeros), then the tokens as little-endian u16.
//!
//! A file is written under a temporary name and renamed when it is complete, so that a reader never
//! meets half a file and an interrupted `prepare` leaves an older file whole.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Outcome};

const MAGIC: i32 = 20240520;
const VERSION: i32 = 1;
const HEADER_INTS: usize = 256;
/// The header counts tokens in an i32.
const MAX_TOKENS: u64 = i32::MAX as u64;

/// A token file that is being written.
pub(crate) struct TokensFile {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    tokens: u64,
}

impl TokensFile {
    /// Begins a file that will be called `path` in the end.
    pub(crate) fn create(path: PathBuf) -> Outcome<Self> {
        let temporary = temporary_name(&path);
        let mut file = File::create(&temporary)
            .map(|file| BufWriter::with_capacity(1 << 18, file))
            .map_err(Failure::io("create", &temporary))?;
        file.write_all(&header(0)).map_err(Failure::io("write", &temporary))?;
        Ok(Self { path, temporary, file, tokens: 0 })
    }

    /// Appends tokens.
    pub(crate) fn push(&mut self, tokens: impl IntoIterator<Item = u16>) -> Outcome {
        for token in tokens {
            self.file
                .write_all(&token.to_le_bytes())
                .map_err(Failure::io("write", &self.temporary))?;
            self.tokens += 1;
        }
        if self.tokens > MAX_TOKENS {
            return Err(Failure::usage(format!(
                "{}: a token file holds at most {MAX_TOKENS} tokens; prepare the inputs in parts, \
                 each into a folder of its own, and train with --train 'parts/*/train.bin'",
                self.path.display()
            )));
        }
        Ok(())
    }

    /// Tokens written so far.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Writes the header and gives the file its name.
    pub(crate) fn finish(mut self) -> Outcome<u64> {
        let write = |file: &mut BufWriter<File>| -> io::Result<()> {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header(self.tokens as i32))?;
            file.flush()?;
            file.get_ref().sync_all()
        };
        write(&mut self.file).map_err(Failure::io("write", &self.temporary))?;
        fs::rename(&self.temporary, &self.path).map_err(Failure::io("create", &self.path))?;
        Ok(self.tokens)
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
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(HEADER_INTS as u64 * 4 + first * 2))?;
        let mut bytes = vec![0; length * 2];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(Failure::io("read", path))?;
    Ok(bytes.as_chunks::<2>().0.iter().map(|token| u16::from_le_bytes(*token).into()).collect())
}

/// Writes a small file under a temporary name, then renames it.
pub(crate) fn write_whole(path: &Path, contents: &[u8]) -> Outcome {
    let temporary = temporary_name(path);
    let write = || -> io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(Failure::io("write", path)).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

fn header(tokens: i32) -> [u8; HEADER_INTS * 4] {
    let mut bytes = [0; HEADER_INTS * 4];
    for (i, value) in [MAGIC, VERSION, tokens].into_iter().enumerate() {
        bytes[i * 4..][..4].copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_llm_cs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.bin");
        let mut file = TokensFile::create(path.clone()).unwrap();
        file.push([1, 513]).unwrap();
        file.push([50256]).unwrap();
        assert!(!path.exists());
        assert_eq!(file.finish().unwrap(), 3);

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
    fn an_unfinished_file_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.bin");
        fs::write(&path, "old").unwrap();
        drop(TokensFile::create(path.clone()).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
