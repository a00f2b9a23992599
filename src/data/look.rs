//! A look at a file of unknown kind: its beginning, its length, and a few bytes elsewhere.

use std::fs::File;
use std::path::Path;

use super::source::read_at;
use crate::Result;

/// Bytes of a part that is looked at.
pub(super) const PART: usize = 1 << 16;
/// Files up to this are looked at as a whole.
pub(super) const WHOLE: usize = 3 * PART;

/// A file to look at.
pub(super) struct Look<'a> {
    pub(super) path: &'a Path,
    file: &'a File,
    length: usize,
    head: &'a [u8],
}

impl<'a> Look<'a> {
    /// Reads the beginning into `buffer`, which holds [`WHOLE`] bytes.
    pub(super) fn new(
        path: &'a Path,
        file: &'a File,
        length: usize,
        buffer: &'a mut [u8],
    ) -> Result<Self> {
        let head = &mut buffer[..if length <= WHOLE { length } else { PART }];
        read_at(file, path, 0, head)?;
        Ok(Self { path, file, length, head })
    }

    /// Bytes of the file.
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// The beginning: all of a short file, else [`PART`] bytes.
    pub(super) fn head(&self) -> &'a [u8] {
        self.head
    }

    /// Fills `out` with bytes from `start` on.
    pub(super) fn read(&self, start: usize, out: &mut [u8]) -> Result<()> {
        read_at(self.file, self.path, start as u64, out)
    }

    /// N bytes from `start` on; `None` beyond the end, and where they cannot be read, which whoever
    /// reads the tokens will find out.
    pub(super) fn at<const N: usize>(&self, start: usize) -> Option<[u8; N]> {
        let end = start.checked_add(N).filter(|&end| end <= self.length)?;
        let mut bytes = [0; N];
        match self.head.get(start..end) {
            Some(known) => bytes.copy_from_slice(known),
            None => self.read(start, &mut bytes).ok()?,
        }
        Some(bytes)
    }

    /// Whether the file ends with these bytes.
    pub(super) fn ends_with<const N: usize>(&self, bytes: &[u8; N]) -> bool {
        self.length.checked_sub(N).and_then(|start| self.at(start)) == Some(*bytes)
    }
}
