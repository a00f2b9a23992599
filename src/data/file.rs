//! One source of tokens: a mapped file in one of the known layouts, or a host's own tokens.
//!
//! A file is mapped, never read whole: opening it costs nothing and the page cache is shared with
//! every other process that trains on it. How bytes leave a map is told in `source`, which of them
//! are tokens is decided in `layout`.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::host::TokenMemory;
use super::layout::{Layout, layout};
use super::look::Look;
use super::megatron;
use super::source::{Source, open_file, read_at};
use crate::{Error, Result};

/// How a token file is laid out. All numbers are little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenFormat {
    /// Raw tokens without a header (nanoGPT), of any [`TokenType`].
    Raw,
    /// llm.c: a header of 256 i32 (magic, version, token count), then tokens: u16 for magic
    /// 20240520 version 1, u32 for magic 20240801 version 7.
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
    /// Tokens from byte `start` on.
    File {
        source: Source,
        start: u64,
    },
    Memory(Box<dyn TokenMemory>),
}

/// Bytes that are read at once, on the stack: a step allocates nothing.
const WINDOW: usize = 1 << 13;
/// The same where all tokens are read: as fast as larger ones, and small enough for any stack.
const PIECE: usize = 1 << 15;

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
    /// header to say it; `buffer` has room for a [`Look`].
    pub(super) fn open(
        path: &Path,
        declared: Option<TokenType>,
        buffer: &mut [u8],
    ) -> Result<Self> {
        // Megatron's pair goes by the name of the file that holds the tokens.
        let pair = megatron::pair(path)?;
        let path = pair.as_ref().map_or(path, |pair| pair.tokens.as_path());
        let (file, metadata) = open_file(path)?;
        let Ok(length @ 1..) = usize::try_from(metadata.len()) else {
            return Err(Error::format(
                path,
                "expected tokens, found an empty file (did the program that wrote it fail? one of the \
                 kernel's, as in /proc?)",
            ));
        };
        let index = pair.as_ref().map(|pair| pair.read(length)).transpose()?;
        let Layout { format, token_type, start, end, documents } = match index {
            Some(layout) => layout,
            None => layout(&Look::new(path, &file, length, buffer)?, declared)?,
        };
        let tokens = ((end - start) / token_type.bytes()) as u64;
        let source = Source::new(path, &file, &metadata);
        let path = owned(path)?;
        Ok(Self {
            info: DatasetFile { path, format, token_type, tokens, documents },
            storage: Storage::File { source, start: start as u64 },
        })
    }

    /// Takes a host's own tokens.
    pub(super) fn from_memory(tokens: Box<dyn TokenMemory>) -> Result<Self> {
        if tokens.count() == 0 {
            return Err(Error::invalid("tokens", "expected at least one token, got none"));
        }
        let info = DatasetFile {
            path: PathBuf::from("<memory>"),
            format: TokenFormat::Memory,
            token_type: tokens.token_type(),
            tokens: tokens.count() as u64,
            documents: None,
        };
        Ok(Self { info, storage: Storage::Memory(tokens) })
    }

    /// Copies tokens `offset`.. into `out`; the caller stays within the file.
    ///
    /// # Errors
    /// [`Error::TokenRange`] for the first token that is not below `vocab_size`; [`Error::Io`]
    /// where the file does not hold them any more.
    pub(super) fn copy(&self, offset: u64, vocab_size: usize, out: &mut [u32]) -> Result<()> {
        let is_in_range = |out: &[u32]| out.iter().all(|&token| (token as usize) < vocab_size);
        let (source, start) = match &self.storage {
            Storage::File { source, start } => (source, start),
            Storage::Memory(tokens) => {
                tokens.copy(offset as usize, out);
                if is_in_range(out) {
                    return Ok(());
                }
                return self.check(offset, out.iter().map(|&token| token.into()), vocab_size);
            }
        };
        let token_type = self.info.token_type;
        let (mut buffer, width) = ([0; WINDOW], token_type.bytes());
        let firsts = (offset..).step_by(WINDOW / width);
        for (out, first) in out.chunks_mut(WINDOW / width).zip(firsts) {
            let bytes = &mut buffer[..out.len() * width];
            source.read(&self.info.path, start + first * width as u64, bytes)?;
            let has_strays = decode(bytes, token_type, out);
            if has_strays || !is_in_range(out) {
                // NOTE: looked for in what was read: another process may change the file.
                self.check(first, numbers(bytes, token_type), vocab_size)?;
            }
        }
        Ok(())
    }

    /// The extent of tokens `first`.. of `count`, which are in the file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn extent(&self, first: u64, count: u64) -> Result<Extent> {
        let mut sum = Extent::default();
        let mut add = |part: Extent| {
            sum.largest = sum.largest.max(part.largest);
            sum.has_strays |= part.has_strays;
        };
        self.each_part(first, count, |_, tokens| {
            add(Extent { largest: tokens.iter().fold(0, |a, &b| a.max(b)), has_strays: false });
            Ok(())
        })?;
        self.each_piece(first, count, |_, bytes| {
            add(extent(bytes, self.info.token_type));
            Ok(())
        })?;
        Ok(sum)
    }

    /// # Errors
    /// [`Error::TokenRange`] for the first of tokens `first`.. of `count` that is not below
    /// `vocab_size`; [`Error::Io`].
    pub(super) fn find_outside(&self, first: u64, count: u64, vocab_size: usize) -> Result<()> {
        self.each_part(first, count, |first, tokens| {
            self.check(first, tokens.iter().map(|&token| token.into()), vocab_size)
        })?;
        self.each_piece(first, count, |first, bytes| {
            self.check(first, numbers(bytes, self.info.token_type), vocab_size)
        })
    }

    /// Copies tokens `first`.. of `count` in memory in parts, and gives the number of a part's first
    /// token.
    fn each_part(
        &self,
        first: u64,
        count: u64,
        mut see: impl FnMut(u64, &[u32]) -> Result<()>,
    ) -> Result<()> {
        let Storage::Memory(tokens) = &self.storage else { return Ok(()) };
        let mut buffer = [0; PIECE / 4];
        for first_of_part in (first..first + count).step_by(buffer.len()) {
            let here = (first + count - first_of_part).min(buffer.len() as u64);
            let part = &mut buffer[..here as usize];
            tokens.copy(first_of_part as usize, part);
            see(first_of_part, part)?;
        }
        Ok(())
    }

    /// Reads tokens `first`.. of `count` of a file in pieces, and gives the number of a piece's
    /// first token and its bytes.
    fn each_piece(
        &self,
        first: u64,
        count: u64,
        mut add: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let Storage::File { source, start } = &self.storage else { return Ok(()) };
        let (path, width) = (&self.info.path, self.info.token_type.bytes() as u64);
        let mut buffer = [0; PIECE];
        let file = source.reopen(path)?;
        for first_of_piece in (first..first + count).step_by(PIECE / width as usize) {
            let length = PIECE as u64 / width * width;
            let length = length.min((first + count - first_of_piece) * width);
            let (bytes, at) = (&mut buffer[..length as usize], start + first_of_piece * width);
            match &file {
                Some(file) => read_at(file, path, at, bytes)?,
                None => source.read(path, at, bytes)?,
            }
            add(first_of_piece, bytes)?;
        }
        Ok(())
    }

    /// # Errors
    /// [`Error::TokenRange`] for the first number, from token `first` on, that is none below
    /// `vocab_size`.
    fn check(
        &self,
        first: u64,
        numbers: impl Iterator<Item = i64>,
        vocab_size: usize,
    ) -> Result<()> {
        let is_token = |n: i64| u32::try_from(n).is_ok_and(|n| (n as usize) < vocab_size);
        match (first..).zip(numbers).find(|(_, n)| !is_token(*n)) {
            None => Ok(()),
            Some((offset, token)) => Err(Error::TokenRange {
                source_name: self.info.path.display().to_string(),
                offset,
                token,
                vocab_size,
            }),
        }
    }
}

/// A path of one's own, or an error where a plain copy would end the process.
pub(super) fn owned(path: &Path) -> Result<PathBuf> {
    joined(path, OsStr::new(""))
}

/// [`owned`] with a name behind it.
pub(super) fn joined(folder: &Path, name: &OsStr) -> Result<PathBuf> {
    let mut path = PathBuf::new();
    let needed = folder.as_os_str().len() + name.len() + 1;
    path.try_reserve_exact(needed).map_err(|_| Error::OutOfMemory {
        what: "the path of a file",
        needed: needed as u64,
        limit: "which the system refuses; use fewer files".into(),
    })?;
    path.push(folder);
    if !name.is_empty() {
        path.push(name);
    }
    Ok(path)
}

/// The numbers that bytes hold.
fn numbers(bytes: &[u8], token_type: TokenType) -> impl Iterator<Item = i64> {
    bytes.chunks_exact(token_type.bytes()).map(move |bytes| {
        // The bytes of the sign, or zeros.
        let is_signed = matches!(token_type, TokenType::I32 | TokenType::I64);
        let is_negative = is_signed && bytes.last().is_some_and(|b| b >> 7 == 1);
        let mut wide = [if is_negative { 0xff } else { 0 }; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        i64::from_le_bytes(wide)
    })
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
