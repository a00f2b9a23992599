//! Text to tokens and back: bytes, or GPT-2's byte-pair encoding.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tiktoken_rs::{CoreBPE, r50k_base_singleton};

/// How text becomes tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Tokenizer {
    /// A token is a byte; vocabulary 256.
    Bytes,
    /// GPT-2's byte-pair encoding; vocabulary 50,257.
    Gpt2,
}

/// GPT-2's `<|endoftext|>`, which stands between documents.
pub(crate) const END_OF_TEXT: u16 = 50256;
/// How that token is written in a text.
pub(crate) const END_OF_TEXT_MARK: &str = "<|endoftext|>";

impl Tokenizer {
    /// Number of different tokens.
    pub(crate) fn vocab_size(self) -> usize {
        match self {
            Self::Bytes => 256,
            Self::Gpt2 => END_OF_TEXT as usize + 1,
        }
    }

    /// The token that stands between two documents, if there is one.
    pub(crate) fn separator(self) -> Option<u16> {
        match self {
            Self::Bytes => None,
            Self::Gpt2 => Some(END_OF_TEXT),
        }
    }

    /// Encodes a text. A literal `<|endoftext|>` in it is text like any other.
    pub(crate) fn encode(self, text: &str) -> Vec<u16> {
        match self {
            Self::Bytes => text.bytes().map(u16::from).collect(),
            // Ranks of the GPT-2 vocabulary are below 50,257, so they fit.
            Self::Gpt2 => bpe().encode_ordinary(text).into_iter().map(|t| t as u16).collect(),
        }
    }

    /// Encodes a prompt, in which `<|endoftext|>` is the token, as in prepared text; an empty one
    /// becomes the token after which a new text begins.
    pub(crate) fn encode_prompt(self, text: &str) -> Vec<u32> {
        if text.is_empty() {
            return vec![self.separator().map_or_else(|| b'\n'.into(), u32::from)];
        }
        let Some(separator) = self.separator() else {
            return self.encode(text).into_iter().map(u32::from).collect();
        };
        let parts: Vec<_> = text.split(END_OF_TEXT_MARK).map(|part| self.encode(part)).collect();
        parts.join(&separator).into_iter().map(u32::from).collect()
    }

    /// The bytes of text that each token stands for.
    pub(crate) fn token_lengths(self) -> Vec<u8> {
        let length =
            |token| u8::try_from(self.bytes(token).len()).expect("the longest token has 128 bytes");
        (0..self.vocab_size() as u32).map(length).collect()
    }

    /// The bytes of a token; none for one that the tokenizer does not have.
    pub(crate) fn bytes(self, token: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.decode(token, &mut bytes);
        bytes
    }

    /// Appends the bytes of a token. One that the tokenizer does not have (a vocabulary padded to
    /// a round size) stands for nothing.
    pub(crate) fn decode(self, token: u32, out: &mut Vec<u8>) {
        match self {
            Self::Bytes => out.extend(u8::try_from(token)),
            Self::Gpt2 => out.extend(bpe().decode_bytes(&[token]).unwrap_or_default()),
        }
    }
}

impl fmt::Display for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bytes => "bytes",
            Self::Gpt2 => "gpt2",
        })
    }
}

/// Turns tokens into text as they come. A character whose bytes lie in several tokens is held back
/// until it is whole, so that every piece is valid UTF-8.
pub(crate) struct TextStream {
    tokenizer: Tokenizer,
    /// The beginning of a character; at most 3 bytes between two calls.
    pending: Vec<u8>,
}

impl TextStream {
    /// A stream at its beginning.
    pub(crate) fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, pending: Vec::new() }
    }

    /// Takes a token and gives the text that is now certain; bytes that are not UTF-8 become
    /// U+FFFD.
    pub(crate) fn push(&mut self, token: u32) -> String {
        self.tokenizer.decode(token, &mut self.pending);
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

/// The last place where `text` can be cut so that encoding the two parts gives the tokens of the
/// whole: before a whitespace character that follows a visible one.
///
/// GPT-2's splitting pattern never puts a visible character and a whitespace character after it
/// into one piece, and looks ahead only inside a run of whitespace, so such a place always ends a
/// piece.
pub(crate) fn cut_point(text: &str) -> Option<usize> {
    let visible_before =
        |at: &usize| text[..*at].chars().next_back().is_some_and(|before| !before.is_whitespace());
    text.rmatch_indices([' ', '\n']).map(|(at, _)| at).find(visible_before)
}

/// The vocabulary is inside the program; it takes some 60 ms to load, once.
fn bpe() -> &'static CoreBPE {
    r50k_base_singleton()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(tokenizer: Tokenizer, tokens: impl IntoIterator<Item = u32>) -> String {
        let mut stream = TextStream::new(tokenizer);
        let mut text: String = tokens.into_iter().map(|t| stream.push(t)).collect();
        text.push_str(&stream.finish());
        text
    }

    #[test]
    fn gpt2_tokens_are_the_known_ones() {
        assert_eq!(Tokenizer::Gpt2.encode("Hello, world!"), [15496, 11, 995, 0]);
        assert_eq!(Tokenizer::Gpt2.encode_prompt(""), [50256]);
        assert_eq!(Tokenizer::Gpt2.encode_prompt("<|endoftext|>Hello,"), [50256, 15496, 11]);
        assert_eq!(Tokenizer::Bytes.encode_prompt("<|endoftext|>").len(), 13);
        let literal = Tokenizer::Gpt2.encode("<|endoftext|>");
        assert!(literal.len() > 1 && !literal.contains(&END_OF_TEXT));
    }

    #[test]
    fn text_survives_a_round_trip() {
        let text = "To be, or not to be: naïve 語 — 🦀\n\n";
        for tokenizer in [Tokenizer::Bytes, Tokenizer::Gpt2] {
            let tokens = tokenizer.encode(text).into_iter().map(u32::from);
            assert_eq!(decode(tokenizer, tokens), text, "{tokenizer}");
        }
    }

    #[test]
    fn every_streamed_piece_is_whole_characters() {
        let mut stream = TextStream::new(Tokenizer::Bytes);
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
        let whole = Tokenizer::Gpt2.encode(text);
        let mut cuts = 0;
        for end in (1..=text.len()).filter(|&i| text.is_char_boundary(i)) {
            let Some(at) = cut_point(&text[..end]) else { continue };
            let mut parts = Tokenizer::Gpt2.encode(&text[..at]);
            parts.extend(Tokenizer::Gpt2.encode(&text[at..]));
            assert_eq!(parts, whole, "cut at {at}");
            cuts += 1;
        }
        assert!(cuts > 40);
        assert_eq!(cut_point("word"), None);
        assert_eq!(cut_point("  \n "), None);
    }
}
