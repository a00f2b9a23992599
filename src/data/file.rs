//! One source of tokens: a mapped file in one of the known layouts, or a host's own tokens.
//!
//! A file is mapped, never read whole: opening it costs nothing and the page cache is shared with
//! every other process that trains on it.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::{Error, Result};

/// How a token file is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenFormat {
    /// Raw little-endian u16 tokens without a header (nanoGPT).
    RawU16,
    /// llm.c: a header of 256 little-endian i32 (magic, version, token count), then little-endian
    /// tokens: u16 for magic 20240520 version 1, u32 for magic 20240801 version 7.
    LlmC,
    /// Tokens handed in by the host.
    Memory,
}

/// One file of a dataset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetFile {
    /// Its path, or `<memory>` for tokens handed in by the host.
    pub path: PathBuf,
    /// Its layout.
    pub format: TokenFormat,
    /// Tokens that it holds.
    pub tokens: u64,
}

/// A source of tokens, ready to be copied from.
#[derive(Debug)]
pub(super) struct TokenFile {
    pub(super) info: DatasetFile,
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    /// Tokens of `width` bytes (2 or 4) from byte `start` on.
    Map {
        map: Mmap,
        start: usize,
        width: usize,
    },
    Memory(Vec<u32>),
}

/// Bytes of llm.c's header.
const LLMC_HEADER: usize = 256 * 4;

/// llm.c's kinds of token file: magic, version, bytes of a token.
const LLMC_KINDS: [(u32, u32, usize); 2] = [(20240520, 1, 2), (20240801, 7, 4)];

impl TokenFile {
    /// Maps a file and finds out its layout.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if metadata.is_dir() {
            return Err(Error::format(
                path,
                "expected a token file, found a folder; name a file in it or a pattern such as \
                 FOLDER/*.bin",
            ));
        }
        if !metadata.is_file() {
            return Err(Error::format(path, "expected a token file, found a pipe or device"));
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        let length = file.metadata().map_err(Error::io("open", path))?.len();
        if length == 0 {
            return Err(Error::format(
                path,
                "expected tokens, found an empty file (did the program that wrote it fail?)",
            ));
        }
        // SAFETY: the map is only read, byte by byte, so any content is valid. Another process that
        // changes the file changes tokens, which are checked on every copy; one that truncates it
        // while it is open is ruled out in the documentation of `Dataset::open`.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let (format, start, width) = layout(path, &map)?;
        let tokens = ((map.len() - start) / width) as u64;
        Ok(Self {
            info: DatasetFile { path: path.to_owned(), format, tokens },
            storage: Storage::Map { map, start, width },
        })
    }

    /// Takes a host's own tokens.
    pub(super) fn from_tokens(tokens: Vec<u32>) -> Result<Self> {
        if tokens.is_empty() {
            return Err(Error::invalid("tokens", "expected at least one token, got none"));
        }
        let info = DatasetFile {
            path: PathBuf::from("<memory>"),
            format: TokenFormat::Memory,
            tokens: tokens.len() as u64,
        };
        Ok(Self { info, storage: Storage::Memory(tokens) })
    }

    /// Copies tokens `offset`.. into `out`; the caller stays within the file.
    ///
    /// # Errors
    /// [`Error::TokenRange`] for the first token that is not below `vocab_size`.
    pub(super) fn copy(&self, offset: u64, vocab_size: usize, out: &mut [u32]) -> Result<()> {
        // Within the file, so within memory.
        let first = offset as usize;
        match &self.storage {
            Storage::Map { map, start, width } => {
                let bytes = &map[start + first * width..][..out.len() * width];
                decode(bytes, *width, out.iter_mut());
            }
            Storage::Memory(tokens) => out.copy_from_slice(&tokens[first..][..out.len()]),
        }
        match out.iter().position(|&token| token as usize >= vocab_size) {
            None => Ok(()),
            Some(i) => Err(Error::TokenRange {
                source_name: self.info.path.display().to_string(),
                offset: offset + i as u64,
                token: out[i],
                vocab_size,
            }),
        }
    }

    /// The largest token; reads everything.
    pub(super) fn max_token(&self) -> u32 {
        match &self.storage {
            Storage::Map { map, start, width: 2 } => {
                let tokens = map[*start..].as_chunks().0.iter();
                tokens.map(|&b| u32::from(u16::from_le_bytes(b))).max().unwrap_or(0)
            }
            Storage::Map { map, start, .. } => {
                let tokens = map[*start..].as_chunks().0.iter();
                tokens.map(|&b| u32::from_le_bytes(b)).max().unwrap_or(0)
            }
            Storage::Memory(tokens) => tokens.iter().copied().max().unwrap_or(0),
        }
    }
}

fn decode<'a>(bytes: &[u8], width: usize, out: impl Iterator<Item = &'a mut u32>) {
    if width == 2 {
        for (token, &b) in out.zip(bytes.as_chunks().0) {
            *token = u16::from_le_bytes(b).into();
        }
    } else {
        for (token, &b) in out.zip(bytes.as_chunks().0) {
            *token = u32::from_le_bytes(b);
        }
    }
}

/// Layout of a non-empty file: its format, the first byte of its tokens, the bytes of each.
fn layout(path: &Path, bytes: &[u8]) -> Result<(TokenFormat, usize, usize)> {
    let word = |i: usize| {
        let bytes = bytes.get(i * 4..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    };
    let magic = LLMC_KINDS.iter().find(|kind| word(0) == Some(kind.0));
    let Some(&(magic, version, width)) = magic else {
        if !bytes.len().is_multiple_of(2) {
            return Err(Error::format(
                path,
                format!(
                    "expected u16 tokens, so an even number of bytes, found {} (a truncated copy, \
                     or not a token file?)",
                    bytes.len()
                ),
            ));
        }
        return Ok((TokenFormat::RawU16, 0, 2));
    };
    let found = bytes.len();
    // NOTE: the magic with another version is refused, not taken for raw tokens: reading a header
    // as text would go unnoticed, and both magics hold a u16 beyond GPT-2's vocabulary.
    if let Some(other) = word(1).filter(|&v| v != version) {
        return Err(Error::format(
            path,
            format!("expected version {version} of llm.c's magic {magic}, found version {other}"),
        ));
    }
    let Some(tokens) = word(2).filter(|_| found >= LLMC_HEADER) else {
        return Err(Error::format(
            path,
            format!(
                "expected llm.c's header of {LLMC_HEADER} bytes, found {found} (a truncated copy \
                 or download?)"
            ),
        ));
    };
    let expected = LLMC_HEADER as u64 + u64::from(tokens) * width as u64;
    if found as u64 != expected {
        let cause = if (found as u64) < expected {
            "a truncated copy or download?"
        } else {
            "two files joined, or a writer that did not update its header?"
        };
        return Err(Error::format(
            path,
            format!(
                "expected {expected} bytes for the {tokens} u{} tokens that its llm.c header \
                 announces, found {found} ({cause})",
                width * 8
            ),
        ));
    }
    if tokens == 0 {
        return Err(Error::format(path, "expected tokens, found an llm.c header that announces 0"));
    }
    Ok((TokenFormat::LlmC, LLMC_HEADER, width))
}
