//! Plain text in chunks, cut where it makes no difference to the tokens.

use std::mem;

use super::content::Content;
use crate::failure::{Failure, Outcome};
use crate::tokenizer::Tokenizer;

/// How long a chunk may grow in search of a place to cut. Text without a space or a line break in
/// 4 MiB is cut between two characters, which costs a token or so.
///
/// Of some tokenizers no place is known where a text may be cut. Their documents are encoded whole
/// up to 1 MiB, of which encoding takes some 150; longer ones are cut before a word, as their
/// tokens of words mostly allow, or between two characters. So memory is bounded, however long a
/// document is.
pub(super) fn longest_chunk(tokenizer: &Tokenizer) -> usize {
    if tokenizer.is_cut_nowhere() { 1 << 20 } else { 4 << 20 }
}

/// Reads a text in chunks. But for bytes each is valid UTF-8 and ends where encoding may be cut, or
/// where a document does; no chunk ends inside a mark between documents.
pub(super) struct TextReader {
    content: Content,
    tokenizer: Tokenizer,
    /// What ends a document inside the text.
    mark: Option<String>,
    /// Read, not yet given out.
    pending: Vec<u8>,
    /// Place of `pending` in the text.
    offset: u64,
    chunk: usize,
    at_end: bool,
}

impl TextReader {
    /// Reads chunks of about `chunk` bytes.
    pub(super) fn new(
        mut content: Content,
        tokenizer: Tokenizer,
        mark: Option<String>,
        chunk: usize,
    ) -> Self {
        let pending = mem::take(&mut content.head);
        Self { content, tokenizer, mark, pending, offset: 0, chunk, at_end: false }
    }

    /// Bytes of the file that have been read.
    pub(super) fn position(&self) -> u64 {
        self.content.position()
    }

    /// The next chunk, and whether it is the last; `None` behind that. An empty text has one chunk.
    pub(super) fn next(&mut self) -> Outcome<Option<(Vec<u8>, bool)>> {
        if self.at_end && (self.pending.is_empty() && self.offset > 0) {
            return Ok(None);
        }
        let mut target = self.chunk;
        loop {
            let missing = target.saturating_sub(self.pending.len());
            if !self.at_end {
                // One byte more tells whether this is the end.
                self.at_end = self.content.read(&mut self.pending, missing + 1)? <= missing;
            }
            let whole = self.at_end && self.pending.len() <= target;
            let Some(cut) = self.cut(whole, target)? else {
                target += self.chunk;
                continue;
            };
            let rest = self.pending.split_off(cut);
            self.offset += cut as u64;
            let last = self.at_end && rest.is_empty();
            let chunk = mem::replace(&mut self.pending, rest);
            if last && self.offset == 0 {
                self.offset = 1; // so that an empty text ends, too
            }
            return Ok(Some((chunk, last)));
        }
    }

    /// Where the pending bytes may be cut; `None` asks for more of them.
    fn cut(&self, whole: bool, target: usize) -> Outcome<Option<usize>> {
        let pending = &self.pending[..self.pending.len().min(target)];
        if whole {
            return match self.tokenizer {
                Tokenizer::Bytes => Ok(Some(pending.len())),
                _ => Ok(Some(self.valid(pending, true)?.len())),
            };
        }
        let mark = self.mark.as_deref().unwrap_or_default();
        let forced =
            |length| Some(before_partial_mark(&pending[..length], mark)).filter(|&cut| cut > 0);
        if self.tokenizer == Tokenizer::Bytes {
            return Ok(forced(pending.len()));
        }
        let valid = self.valid(pending, false)?;
        let behind_mark = || {
            let is_wanted = self.tokenizer.file().is_some() && !mark.is_empty();
            valid.rfind(mark).filter(|_| is_wanted).map(|at| at + mark.len())
        };
        Ok(match self.tokenizer.cut_point(valid).or_else(behind_mark) {
            None if target >= longest_chunk(&self.tokenizer) => {
                let length = forced(valid.len());
                length.and_then(|length| self.tokenizer.forced_cut(&valid[..length])).or(length)
            }
            found => found,
        })
    }

    /// The beginning that is valid UTF-8. Only a character that the end cuts may be missing, and
    /// not at the `end` of the text.
    fn valid<'b>(&self, bytes: &'b [u8], end: bool) -> Outcome<&'b str> {
        let error = match str::from_utf8(bytes) {
            Ok(text) => return Ok(text),
            Err(error) => error,
        };
        let (valid, bad) = bytes.split_at(error.valid_up_to());
        if error.error_len().is_none() && !end {
            return Ok(str::from_utf8(valid).expect("the bytes up to the error are valid"));
        }
        let place = self.offset + valid.len() as u64;
        let name = self.content.name.display();
        // Latin-1's letters stand alone among ASCII.
        let guess = match bad {
            [0xa0..=0xff, next, ..] if next.is_ascii() => {
                format!("it may be Latin-1: convert it with `iconv -f LATIN1 -t UTF-8 {name}`")
            }
            _ => "convert the file".to_owned(),
        };
        Err(Failure::usage(format!(
            "{name}: expected UTF-8 text, found byte 0x{:02x} at offset {place}; {guess}, or use \
             --tokenizer bytes",
            bad[0],
        )))
    }
}

/// The end of `bytes`, or where a mark begins that goes on behind them.
fn before_partial_mark(bytes: &[u8], mark: &str) -> usize {
    let mark = mark.as_bytes();
    let longest = (1..mark.len()).rev().find(|&n| bytes.ends_with(&mark[..n])).unwrap_or(0);
    bytes.len() - longest
}
