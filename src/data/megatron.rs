//! Megatron's pair of files: a `.bin` of tokens without a header, and an `.idx` that says what they
//! are.
//!
//! The index is a magic of 9 bytes, a version (u64), a code for the type of a token (u8), the
//! number of sequences and of document boundaries (u64 each), then for every sequence its length
//! (i32) and its first byte (i64), then the boundaries (i64).
//!
//! NOTE: windows take no notice of documents, as they do not in files without an index: the tokens
//! of a pair are read as one text, in the order of the file.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::file::{TokenFormat, TokenType};
use super::layout::{Layout, check_length};
use super::source::{open_file, read_at};
use crate::{Error, Result};

pub(super) const MAGIC: &[u8] = b"MMIDIDX\0\0";
const VERSION: u64 = 1;
/// Bytes in front of the lengths.
const HEADER: usize = 9 + 8 + 1 + 8 + 8;

/// Megatron's codes of types, and what they stand for where tokens are none of them.
const TYPES: [(u8, Result<TokenType, &str>); 8] = [
    (1, Ok(TokenType::U8)),
    (2, Err("int8")),
    (3, Err("int16")),
    (4, Ok(TokenType::I32)),
    (5, Ok(TokenType::I64)),
    (6, Err("float64")),
    (7, Err("float32")),
    (8, Ok(TokenType::U16)),
];

/// Two files that belong together.
pub(super) struct Pair {
    pub(super) tokens: PathBuf,
    index: PathBuf,
}

/// The pair that a file is one half of; `None` where it stands alone.
///
/// # Errors
/// [`Error::Format`] for an index without its tokens.
pub(super) fn pair(path: &Path) -> Result<Option<Pair>> {
    let Some(tokens) = tokens_of(path) else { return Ok(None) };
    if tokens != path && !tokens.exists() {
        return Err(Error::format(
            path,
            format!(
                "expected the tokens of this Megatron index in {} beside it, found no such file; a \
                 pair is copied together",
                tokens.display()
            ),
        ));
    }
    Ok(Some(Pair { index: tokens.with_extension("idx"), tokens }))
}

/// The `.bin` of the pair that a path names one file of, or both, as Megatron does, by what their
/// names begin with.
pub(super) fn tokens_of(path: &Path) -> Option<PathBuf> {
    let index = match path.extension() {
        Some(extension) if extension == "bin" || extension == "idx" => path.with_extension("idx"),
        _ if path.exists() => return None,
        _ => {
            let mut name = path.as_os_str().to_owned();
            name.push(".idx");
            name.into()
        }
    };
    is_index(&index).then(|| index.with_extension("bin"))
}

fn is_index(path: &Path) -> bool {
    let mut start = [0; MAGIC.len()];
    open_file(path).and_then(|(file, _)| read_at(&file, path, 0, &mut start)).is_ok()
        && start == MAGIC
}

impl Pair {
    /// Reads the index of a file of `length` bytes.
    pub(super) fn read(&self, length: usize) -> Result<Layout> {
        let path = &self.index;
        let (file, metadata) = open_file(path)?;
        let found = metadata.len();
        if found < HEADER as u64 {
            return Err(Error::format(
                path,
                format!(
                    "expected Megatron's header of {HEADER} bytes, found {found} (a truncated copy?)"
                ),
            ));
        }
        let header: [u8; HEADER] = bytes_at(&file, path, 0)?;
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let (version, code, sequences, boundaries) = (word(9), header[17], word(18), word(26));
        if version != VERSION {
            let message =
                format!("expected version {VERSION} of Megatron's index, found version {version}");
            return Err(Error::format(path, message));
        }
        let token_type = match TYPES.iter().find(|(known, _)| *known == code) {
            Some((_, Ok(token_type))) => *token_type,
            other => {
                let name = other.and_then(|(_, found)| found.err()).unwrap_or("of an unknown type");
                return Err(Error::format(
                    path,
                    format!(
                        "expected tokens as uint8, uint16, int32 or int64, found numbers {name} \
                         (code {code})"
                    ),
                ));
            }
        };
        let announced = (HEADER as u128) + u128::from(sequences) * 12 + u128::from(boundaries) * 8;
        // Indices of several modes have one byte more for each sequence.
        if u128::from(found) != announced + u128::from(sequences) {
            let announced = u64::try_from(announced).unwrap_or(u64::MAX);
            let what = format!(
                "the {sequences} sequences and {boundaries} document boundaries that this Megatron \
                 index announces"
            );
            check_length(path, found, announced, &what)?;
        }
        let end = if sequences == 0 {
            0
        } else {
            let last_length = bytes_at(&file, path, HEADER as u64 + (sequences - 1) * 4)?;
            let last_start = bytes_at(&file, path, HEADER as u64 + sequences * 12 - 8)?;
            let last_length = i32::from_le_bytes(last_length);
            let last_start = i64::from_le_bytes(last_start);
            let last_bytes = i64::from(last_length) * token_type.bytes() as i64;
            let end = last_start.checked_add(last_bytes);
            end.filter(|_| last_length >= 0 && last_start >= 0).ok_or_else(|| {
                let message = format!(
                    "expected the place of the last sequence, found byte {last_start} and \
                     {last_length} tokens; the index is damaged"
                );
                Error::format(path, message)
            })?
        };
        let what = format!("the {token_type} tokens that {} announces", path.display());
        check_length(&self.tokens, length as u64, end as u64, &what)?;
        if !length.is_multiple_of(token_type.bytes()) {
            let message = format!("expected {token_type} tokens, found {length} bytes");
            return Err(Error::format(&self.tokens, message));
        }
        // The boundaries are the beginnings of documents and the end of the last one.
        let documents = Some(boundaries.saturating_sub(1));
        let (start, end) = (0, length);
        Ok(Layout { format: TokenFormat::Megatron, token_type, start, end, documents })
    }
}

fn bytes_at<const N: usize>(file: &File, path: &Path, at: u64) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    read_at(file, path, at, &mut bytes)?;
    Ok(bytes)
}
