//! Text to tokens and back: bytes, GPT-2's byte-pair encoding, or what a `tokenizer.json`
//! describes.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tiktoken_rs::{CoreBPE, r50k_base_singleton};

use crate::failure::{Failure, Outcome};
use crate::tokenizer_file::{Cuts, TOKENIZER, TokenizerFile, last_word};

/// How text becomes tokens.
#[derive(Clone)]
pub(crate) enum Tokenizer {
    /// A token is a byte; vocabulary 256.
    Bytes,
    /// GPT-2's byte-pair encoding; vocabulary 50,257.
    Gpt2,
    /// Hugging Face's.
    File(Arc<TokenizerFile>),
}

/// Which tokenizer made tokens, as descriptions in JSON have it. A file lies beside them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Bytes,
    Gpt2,
    File {
        /// Of `tokenizer.json`.
        crc32: String,
        /// The token that ends a text, where one is known.
        end_of_text: Option<u32>,
    },
}

/// A tokenizer as a user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    Bytes,
    Gpt2,
    /// A `tokenizer.json`, or a folder with one.
    Path(PathBuf),
}

/// GPT-2's `<|endoftext|>`, which stands between documents.
pub(crate) const END_OF_TEXT: u32 = 50256;
/// How that token is written in a text.
pub(crate) const END_OF_TEXT_MARK: &str = "<|endoftext|>";

impl Tokenizer {
    /// Number of different tokens: all are below it.
    pub(crate) fn vocab_size(&self) -> usize {
        match self {
            Self::Bytes => 256,
            Self::Gpt2 => END_OF_TEXT as usize + 1,
            Self::File(file) => file.vocab_size(),
        }
    }

    /// What descriptions say of it.
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Bytes => Kind::Bytes,
            Self::Gpt2 => Kind::Gpt2,
            Self::File(file) => {
                Kind::File { crc32: file.checksum(), end_of_text: file.end_of_text() }
            }
        }
    }

    /// The file that describes it, where one does.
    pub(crate) fn file(&self) -> Option<&TokenizerFile> {
        match self {
            Self::File(file) => Some(file),
            Self::Bytes | Self::Gpt2 => None,
        }
    }

    /// The token that stands between two documents, if there is one.
    pub(crate) fn separator(&self) -> Option<u32> {
        match self {
            Self::Bytes => None,
            Self::Gpt2 => Some(END_OF_TEXT),
            Self::File(file) => file.end_of_text(),
        }
    }

    /// That token of a tokenizer which has to have one.
    pub(crate) fn end_of_text(&self) -> Outcome<Option<u32>> {
        match (self, self.separator()) {
            (Self::File(file), None) => Err(Failure::usage(format!(
                "{0}: nothing says which token ends a text; name it with --tokenizer {0} \
                 --end-of-text TOKEN",
                file.path().display()
            ))),
            (_, end) => Ok(end),
        }
    }

    /// What ends a document inside a text.
    pub(crate) fn mark(&self) -> Option<&str> {
        match self {
            Self::Bytes | Self::Gpt2 => Some(END_OF_TEXT_MARK),
            Self::File(file) => file.mark(),
        }
    }

    /// The tokens that a document begins with before those of its text.
    pub(crate) fn begin(&self) -> &[u32] {
        self.file().map_or(&[], TokenizerFile::begin)
    }

    /// Encodes a text. A literal `<|endoftext|>` in it is text like any other.
    pub(crate) fn encode(&self, text: &str) -> Outcome<Vec<u32>> {
        match self {
            Self::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Self::Gpt2 => Ok(bpe().encode_ordinary(text)),
            Self::File(file) => file.encode(text),
        }
    }

    /// Encodes a text that goes on where another ends.
    pub(crate) fn encode_behind(&self, text: &str) -> Outcome<Vec<u32>> {
        match self {
            Self::Bytes | Self::Gpt2 => self.encode(text),
            Self::File(file) => file.encode_behind(text),
        }
    }

    /// Encodes a prompt, in which `<|endoftext|>` is the token, as in prepared text; an empty one
    /// becomes the token after which a new text begins.
    pub(crate) fn encode_prompt(&self, text: &str) -> Outcome<Vec<u32>> {
        if let Self::File(file) = self {
            let tokens = file.encode_prompt(text)?;
            return match self.separator() {
                _ if !tokens.is_empty() => Ok(tokens),
                Some(end) => Ok(vec![end]),
                None => Ok([file.encode("\n")?, vec![0]].concat()[..1].to_vec()),
            };
        }
        let separator = self.separator();
        if text.is_empty() {
            return Ok(vec![separator.unwrap_or_else(|| b'\n'.into())]);
        }
        let Some(separator) = separator else { return self.encode(text) };
        let parts = text.split(END_OF_TEXT_MARK).map(|part| self.encode(part));
        Ok(parts.collect::<Outcome<Vec<_>>>()?.join(&separator))
    }

    /// The bytes of text that each token stands for.
    pub(crate) fn token_lengths(&self) -> Vec<u32> {
        (0..self.vocab_size() as u32).map(|token| self.bytes(token).len() as u32).collect()
    }

    /// The bytes of a token; none for one that the tokenizer does not have.
    pub(crate) fn bytes(&self, token: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.decode(token, &mut bytes);
        bytes
    }

    /// Appends the bytes of a token. One that the tokenizer does not have (a vocabulary padded to
    /// a round size) stands for nothing.
    pub(crate) fn decode(&self, token: u32, out: &mut Vec<u8>) {
        match self {
            Self::Bytes => out.extend(u8::try_from(token)),
            Self::Gpt2 => out.extend(bpe().decode_bytes(&[token]).unwrap_or_default()),
            Self::File(file) => out.extend(file.bytes(token)),
        }
    }

    /// The last place where `text` can be cut so that encoding the two parts gives the tokens of
    /// the whole.
    ///
    /// GPT-2's splitting pattern never puts a visible character and a whitespace character after it
    /// into one piece, and looks ahead only inside a run of whitespace, so a whitespace character
    /// that follows a visible one always begins a piece.
    pub(crate) fn cut_point(&self, text: &str) -> Option<usize> {
        match self {
            Self::Bytes | Self::Gpt2 => Cuts::Whitespace,
            Self::File(file) => file.cuts(),
        }
        .last_in(text)
    }

    /// Whether no such place is known of any text.
    pub(crate) fn is_cut_nowhere(&self) -> bool {
        self.file().is_some_and(|file| file.cuts() == Cuts::Nowhere)
    }

    /// A place for a cut where there is none of those.
    pub(crate) fn forced_cut(&self, text: &str) -> Option<usize> {
        self.file().and_then(|_| last_word(text)).filter(|at| *at > 0)
    }
}

/// Which token ends a text may be said anew; the tokens of texts are the same.
impl PartialEq for Tokenizer {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Bytes, Self::Bytes) | (Self::Gpt2, Self::Gpt2) => true,
            (Self::File(a), Self::File(b)) => a.contents()[TOKENIZER] == b.contents()[TOKENIZER],
            _ => false,
        }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind().fmt(f)
    }
}

impl fmt::Display for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.kind(), f)
    }
}

impl Kind {
    /// The tokenizer, whose file is in `dir`, where it has one.
    pub(crate) fn open(&self, dir: &Path) -> Outcome<Tokenizer> {
        let Self::File { crc32, end_of_text } = self else {
            return Ok(if *self == Self::Bytes { Tokenizer::Bytes } else { Tokenizer::Gpt2 });
        };
        if !dir.join(TOKENIZER).exists() {
            return Err(Failure::usage(format!(
                "{}: is missing, which says what the tokens beside it stand for; put it back, or \
                 prepare the data again",
                dir.join(TOKENIZER).display()
            )));
        }
        let file = TokenizerFile::open(&dir.join(TOKENIZER), None)?;
        if file.checksum() != *crc32 {
            return Err(Failure::usage(format!(
                "{}: expected the tokenizer that the tokens beside it were made with (CRC-32 {crc32}), \
                 found {}; put that one back, or prepare the data again",
                dir.join(TOKENIZER).display(),
                file.checksum()
            )));
        }
        Ok(Tokenizer::File(Arc::new(file.with_end(*end_of_text))))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes => f.write_str("bytes"),
            Self::Gpt2 => f.write_str("gpt2"),
            // It may be anybody's word.
            Self::File { crc32, .. } => write!(f, "{TOKENIZER} (CRC-32 {})", crc32.escape_debug()),
        }
    }
}

impl Named {
    /// The tokenizer; `end` names the token that ends a text.
    pub(crate) fn open(&self, end: Option<&str>) -> Outcome<Tokenizer> {
        let Self::Path(path) = self else {
            if end.is_some() {
                return Err(Failure::usage(format!(
                    "--end-of-text: goes with the path of a tokenizer.json; {self} has what ends a \
                     text, so leave the option out"
                )));
            }
            return Ok(if *self == Self::Bytes { Tokenizer::Bytes } else { Tokenizer::Gpt2 });
        };
        match TokenizerFile::open(path, end) {
            Ok(file) => Ok(Tokenizer::File(Arc::new(file))),
            Err(failure) if end.is_some() && failure.message.starts_with("--") => Err(failure),
            Err(failure) => Err(failure.within("--tokenizer")),
        }
    }
}

impl From<OsString> for Named {
    fn from(name: OsString) -> Self {
        match name.to_str() {
            Some("bytes") => Self::Bytes,
            Some("gpt2") => Self::Gpt2,
            _ => Self::Path(name.into()),
        }
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes => f.write_str("bytes"),
            Self::Gpt2 => f.write_str("gpt2"),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

/// Tokens before one that its text may depend on.
const BEFORE: usize = 4;

/// Turns tokens into text as they come. A character whose bytes lie in several tokens is held back
/// until it is whole, so that every piece is valid UTF-8.
#[derive(Clone)]
pub(crate) struct TextStream {
    tokenizer: Tokenizer,
    /// The beginning of a character; at most 3 bytes between two calls.
    pending: Vec<u8>,
    /// The last tokens, where the text of one depends on those before it.
    last: Vec<u32>,
    /// Whether the next space may be one that the tokenizer puts before a text.
    at_start: bool,
}

impl TextStream {
    /// A stream of tokens behind those of a prompt.
    pub(crate) fn behind(tokenizer: &Tokenizer, prompt: &[u32]) -> Self {
        let file = tokenizer.file();
        let is_known = file.is_none_or(TokenizerFile::knows_bytes);
        let last = prompt[prompt.len().saturating_sub(BEFORE)..].to_vec();
        let is_start =
            prompt == tokenizer.begin() || tokenizer.separator().is_some_and(|end| prompt == [end]);
        Self {
            tokenizer: tokenizer.clone(),
            pending: Vec::new(),
            last: if is_known { Vec::new() } else { last },
            at_start: is_start && file.is_some_and(TokenizerFile::adds_space),
        }
    }

    /// Takes a token and gives the text that is now certain; bytes that are not UTF-8 become
    /// U+FFFD.
    pub(crate) fn push(&mut self, token: u32) -> String {
        match self.tokenizer.file().filter(|file| !file.knows_bytes()) {
            None => self.tokenizer.decode(token, &mut self.pending),
            Some(file) => {
                let before = file.decode(&self.last);
                self.last.push(token);
                let all = file.decode(&self.last);
                self.last.drain(..self.last.len().saturating_sub(BEFORE));
                self.pending.extend(all.strip_prefix(&before).unwrap_or(&all).bytes());
            }
        }
        if self.at_start && !self.pending.is_empty() {
            self.at_start = false;
            self.pending.drain(..usize::from(self.pending.starts_with(b" ")));
        }
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let (valid, tail) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(bad) = error.error_len() else {
                        self.pending = tail.to_vec();
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &tail[bad..];
                }
            }
        }
    }

    /// What is left at the end: a character that was never completed, as U+FFFD.
    pub(crate) fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}

/// The vocabulary is inside the program; it takes some 60 ms to load, once.
fn bpe() -> &'static CoreBPE {
    r50k_base_singleton()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(tokenizer: Tokenizer, tokens: impl IntoIterator<Item = u32>) -> String {
        let mut stream = TextStream::behind(&tokenizer, &[]);
        let mut text: String = tokens.into_iter().map(|t| stream.push(t)).collect();
        text.push_str(&stream.finish());
        text
    }

    #[test]
    fn gpt2_tokens_are_the_known_ones() {
        assert_eq!(Tokenizer::Gpt2.encode("Hello, world!").unwrap(), [15496, 11, 995, 0]);
        assert_eq!(Tokenizer::Gpt2.encode_prompt("").unwrap(), [50256]);
        assert_eq!(
            Tokenizer::Gpt2.encode_prompt("<|endoftext|>Hello,").unwrap(),
            [50256, 15496, 11]
        );
        assert_eq!(Tokenizer::Bytes.encode_prompt("<|endoftext|>").unwrap().len(), 13);
        let literal = Tokenizer::Gpt2.encode("<|endoftext|>").unwrap();
        assert!(literal.len() > 1 && !literal.contains(&END_OF_TEXT));
    }

    #[test]
    fn text_survives_a_round_trip() {
        let text = "To be, or not to be: naïve 語 — 🦀\n\n";
        for tokenizer in [Tokenizer::Bytes, Tokenizer::Gpt2] {
            let tokens = tokenizer.encode(text).unwrap();
            assert_eq!(decode(tokenizer.clone(), tokens), text, "{tokenizer}");
        }
    }

    #[test]
    fn every_streamed_piece_is_whole_characters() {
        let mut stream = TextStream::behind(&Tokenizer::Bytes, &[]);
        let pieces: Vec<String> = "é🦀".bytes().map(|b| stream.push(u32::from(b))).collect();
        assert_eq!(pieces, ["", "é", "", "", "", "🦀"]);
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn bytes_that_are_no_text_become_replacement_characters() {
        assert_eq!(decode(Tokenizer::Bytes, [0xff, 0x41, 0xe8, 0xaa]), "\u{fffd}A\u{fffd}");
        assert_eq!(decode(Tokenizer::Bytes, [0xe8, 0x42]), "\u{fffd}B");
        assert_eq!(decode(Tokenizer::Gpt2, [60_000, 15496]), "Hello");
    }

    #[test]
    fn cutting_before_whitespace_keeps_the_tokens() {
        let text =
            "ROMEO:  O, she doth teach\n\n\t the torches'll burn…  bright 123 456!\u{a0} x\n";
        let whole = Tokenizer::Gpt2.encode(text).unwrap();
        let mut cuts = 0;
        for end in (1..=text.len()).filter(|&i| text.is_char_boundary(i)) {
            let Some(at) = Tokenizer::Gpt2.cut_point(&text[..end]) else { continue };
            let mut parts = Tokenizer::Gpt2.encode(&text[..at]).unwrap();
            parts.extend(Tokenizer::Gpt2.encode(&text[at..]).unwrap());
            assert_eq!(parts, whole, "cut at {at}");
            cuts += 1;
        }
        assert!(cuts > 40);
        assert_eq!(Tokenizer::Gpt2.cut_point("word"), None);
        assert_eq!(Tokenizer::Gpt2.cut_point("  \n "), None);
    }
}
