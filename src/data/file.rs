//! One source of tokens: a mapped file in one of the known layouts, or a host's own tokens.
//!
//! A file is mapped, never read whole: opening it costs nothing and the page cache is shared with
//! every other process that trains on it. Which bytes are tokens is decided in `layout`.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use memmap2::Mmap;

use super::layout::{Layout, layout};
use super::megatron;
use crate::{Error, Result};

/// How a token file is laid out. All numbers are little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenFormat {
    /// Raw tokens without a header (nanoGPT), of any [`TokenType`].
    Raw,
    /// llm.c: a header of 256 i32 (magic, version, token count), then tokens: u16 for magic 20240520
    /// version 1, u32 for magic 20240801 version 7.
    LlmC,
    /// NumPy's `.npy`, as `numpy.save` writes it.
    Npy,
    /// Megatron's `.bin`, described by the `.idx` beside it.
    Megatron,
    /// Tokens handed in by the host.
    Memory,
}

impl fmt::Display for TokenFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::LlmC => "llm.c",
            Self::Npy => "npy",
            Self::Megatron => "Megatron",
            Self::Memory => "memory",
        })
    }
}

/// The integer that a token is in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenType {
    /// One unsigned byte.
    U8,
    /// Two unsigned bytes, what most GPT-2 data is.
    U16,
    /// Four unsigned bytes.
    U32,
    /// Four signed bytes.
    I32,
    /// Eight signed bytes, PyTorch's and NumPy's default.
    I64,
}

impl TokenType {
    const NAMES: [(&str, Self); 5] = [
        ("u8", Self::U8),
        ("u16", Self::U16),
        ("u32", Self::U32),
        ("i32", Self::I32),
        ("i64", Self::I64),
    ];

    /// Bytes of a token.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::U32 | Self::I32 => 4,
            Self::I64 => 8,
        }
    }
}

impl fmt::Display for TokenType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(_, value)| value == self);
        f.write_str(name.map_or("u16", |(name, _)| name))
    }
}

impl FromStr for TokenType {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(name, _)| *name == s).map(|(_, value)| *value).ok_or_else(|| {
            let message = format!("expected u8, u16, u32, i32 or i64, got {s:?}");
            Error::invalid("token_type", message)
        })
    }
}

/// One file of a dataset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetFile {
    /// Its path, or `<memory>` for tokens handed in by the host.
    pub path: PathBuf,
    /// Its layout.
    pub format: TokenFormat,
    /// What a token is in it.
    pub token_type: TokenType,
    /// Tokens that it holds.
    pub tokens: u64,
    /// Documents that it tells of, which only Megatron's index does.
    pub documents: Option<u64>,
}

/// A source of tokens, ready to be copied from.
#[derive(Debug)]
pub(super) struct TokenFile {
    pub(super) info: DatasetFile,
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    /// Tokens from byte `start` to byte `end`.
    Map {
        map: Mmap,
        start: usize,
        end: usize,
    },
    Memory(Vec<u32>),
}

/// What a pass over tokens has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extent {
    /// The largest of the tokens that are none below 0 or above u32.
    pub(super) largest: u32,
    /// Whether there is a number below 0 or above u32, which is no token.
    pub(super) has_strays: bool,
}

impl TokenFile {
    /// Maps a file and finds out its layout. `declared` is what tokens are in a file that has no
    /// header to say it.
    pub(super) fn open(path: &Path, declared: Option<TokenType>) -> Result<Self> {
        // Megatron's pair goes by the name of the file that holds the tokens.
        let pair = megatron::pair(path)?;
        let path = pair.as_ref().map_or(path, |pair| pair.tokens.as_path());
        let map = map(path)?;
        let index = pair.as_ref().map(|pair| pair.read(map.len())).transpose()?;
        let Layout { format, token_type, start, end, documents } = match index {
            Some(layout) => layout,
            None => layout(path, &map, declared)?,
        };
        let tokens = ((end - start) / token_type.bytes()) as u64;
        Ok(Self {
            info: DatasetFile { path: path.to_owned(), format, token_type, tokens, documents },
            storage: Storage::Map { map, start, end },
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
            token_type: TokenType::U32,
            tokens: tokens.len() as u64,
            documents: None,
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
        let strays = match self.bytes(first, out.len()) {
            Bytes::Of(bytes, token_type) => decode(bytes, token_type, out),
            Bytes::Memory(tokens) => {
                out.copy_from_slice(tokens);
                false
            }
        };
        if !strays && out.iter().all(|&token| (token as usize) < vocab_size) {
            return Ok(());
        }
        self.check(first, out.len(), vocab_size)
    }

    /// The extent of tokens `first`.. of `count`, which are in the file.
    pub(super) fn extent(&self, first: usize, count: usize) -> Extent {
        match self.bytes(first, count) {
            Bytes::Of(bytes, token_type) => extent(bytes, token_type),
            Bytes::Memory(tokens) => {
                Extent { largest: tokens.iter().fold(0, |a, &b| a.max(b)), has_strays: false }
            }
        }
    }

    /// # Errors
    /// [`Error::TokenRange`] for the first of tokens `first`.. of `count` that is not below
    /// `vocab_size`.
    pub(super) fn check(&self, first: usize, count: usize, vocab_size: usize) -> Result<()> {
        let is_token = |n: i64| u32::try_from(n).is_ok_and(|n| (n as usize) < vocab_size);
        let mut numbers = (first..first + count).map(|i| (i, self.number(i)));
        match numbers.find(|(_, n)| !is_token(*n)) {
            None => Ok(()),
            Some((offset, token)) => Err(Error::TokenRange {
                source_name: self.info.path.display().to_string(),
                offset: offset as u64,
                token,
                vocab_size,
            }),
        }
    }

    /// The number at the place of token `index`.
    fn number(&self, index: usize) -> i64 {
        match self.bytes(index, 1) {
            Bytes::Memory(tokens) => tokens[0].into(),
            Bytes::Of(bytes, token_type) => match (token_type, bytes) {
                (TokenType::U8, &[a]) => a.into(),
                (TokenType::U16, &[a, b]) => u16::from_le_bytes([a, b]).into(),
                (TokenType::U32, &[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]).into(),
                (TokenType::I32, &[a, b, c, d]) => i32::from_le_bytes([a, b, c, d]).into(),
                (TokenType::I64, &[a, b, c, d, e, f, g, h]) => {
                    i64::from_le_bytes([a, b, c, d, e, f, g, h])
                }
                _ => unreachable!("a token has the bytes of its type"),
            },
        }
    }

    fn bytes(&self, first: usize, count: usize) -> Bytes<'_> {
        match &self.storage {
            Storage::Map { map, start, end } => {
                let width = self.info.token_type.bytes();
                let bytes = &map[*start..*end][first * width..][..count * width];
                Bytes::Of(bytes, self.info.token_type)
            }
            Storage::Memory(tokens) => Bytes::Memory(&tokens[first..][..count]),
        }
    }
}

/// Some tokens as they are stored.
enum Bytes<'a> {
    Of(&'a [u8], TokenType),
    Memory(&'a [u32]),
}

/// Maps a whole file, which must be one and not be empty.
fn map(path: &Path) -> Result<Mmap> {
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
    unsafe { Mmap::map(&file) }.map_err(Error::map(path, length))
}

/// Decodes as many tokens as `out` holds. Gives whether one of them is below 0 or above u32, which
/// is then not what `out` says.
fn decode(bytes: &[u8], token_type: TokenType, out: &mut [u32]) -> bool {
    let mut strays = 0;
    match token_type {
        TokenType::U8 => out.iter_mut().zip(bytes).for_each(|(out, &b)| *out = b.into()),
        TokenType::U16 => {
            for (out, &b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = u16::from_le_bytes(b).into();
            }
        }
        TokenType::U32 => {
            for (out, &b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = u32::from_le_bytes(b);
            }
        }
        TokenType::I32 => {
            for (out, &b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = u32::from_le_bytes(b);
                strays |= *out >> 31;
            }
        }
        TokenType::I64 => {
            for (out, &b) in out.iter_mut().zip(bytes.as_chunks().0) {
                let wide = u64::from_le_bytes(b);
                *out = wide as u32;
                strays |= (wide >> 32) as u32;
            }
        }
    }
    strays != 0
}

/// Loops that the compiler makes vectors of, a few GB/s on any processor.
fn extent(bytes: &[u8], token_type: TokenType) -> Extent {
    let (largest, strays) = match token_type {
        TokenType::U8 => (bytes.iter().fold(0, |a: u8, &b| a.max(b)).into(), 0),
        TokenType::U16 => {
            let tokens = bytes.as_chunks().0.iter();
            (tokens.fold(0, |a: u16, &b| a.max(u16::from_le_bytes(b))).into(), 0)
        }
        TokenType::U32 => {
            let tokens = bytes.as_chunks().0.iter();
            (tokens.fold(0, |a: u32, &b| a.max(u32::from_le_bytes(b))), 0)
        }
        TokenType::I32 => {
            bytes.as_chunks().0.iter().fold((0, 0), |(largest, strays): (u32, u32), &b| {
                let token = i32::from_le_bytes(b);
                (largest.max(token.max(0) as u32), strays | (token as u32 >> 31))
            })
        }
        TokenType::I64 => {
            bytes.as_chunks().0.iter().fold((0, 0), |(largest, strays): (u32, u32), &b| {
                let (token, high) = split(u64::from_le_bytes(b));
                (largest.max(if high == 0 { token } else { 0 }), strays | high)
            })
        }
    };
    Extent { largest, has_strays: strays != 0 }
}

/// The low and the high half.
fn split(wide: u64) -> (u32, u32) {
    (wide as u32, (wide >> 32) as u32)
}
