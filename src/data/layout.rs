//! Which bytes of a file are tokens, and of which type: by its header, or by a look at the tokens
//! where it has none.
//!
//! NOTE: a file without a header is u16 unless it cannot be. Its tokens are looked at for one
//! thing: numbers of 32 or 64 bits have high halves, which are zero for every vocabulary in use, so
//! that every second 16-bit word is zero and the ones between are not. What may be either is
//! refused, with the option that decides it: a wrong guess would train on rubbish for days.

use std::path::Path;

use super::file::{TokenFormat, TokenType};
use super::look::{Look, PART, WHOLE};
use super::{magic, npy};
use crate::{Error, Result, reserve};

/// Where the tokens of a file are.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) format: TokenFormat,
    pub(super) token_type: TokenType,
    /// First byte of the tokens.
    pub(super) start: usize,
    /// The byte after the last token.
    pub(super) end: usize,
    /// Documents, where the format tells of them.
    pub(super) documents: Option<u64>,
}

/// Layout of a non-empty file. A header is believed; `declared` is for files without one.
pub(super) fn layout(look: &Look<'_>, declared: Option<TokenType>) -> Result<Layout> {
    let path = look.path;
    if let Some(layout) = llm_c(look)? {
        return Ok(layout);
    }
    if let Some(layout) = npy::layout(look)? {
        return Ok(layout);
    }
    if let Some(kind) = magic::known(look) {
        return Err(Error::format(path, kind.to_string()));
    }
    let token_type = match declared {
        Some(token_type) => token_type,
        None => {
            if let Some(kind) = magic::text(look.head()) {
                return Err(Error::format(path, kind.to_string()));
            }
            guess(look)?
        }
    };
    let width = token_type.bytes();
    if !look.len().is_multiple_of(width) {
        let expected = match width {
            2 => "an even number of bytes".to_owned(),
            n => format!("a multiple of {n} bytes"),
        };
        return Err(Error::format(
            path,
            format!(
                "expected {token_type} tokens, so {expected}, found {} (a truncated copy, or not a \
                 token file?)",
                look.len()
            ),
        ));
    }
    let (start, end) = (0, look.len());
    Ok(Layout { format: TokenFormat::Raw, token_type, start, end, documents: None })
}

/// Bytes of llm.c's header.
const LLMC_HEADER: usize = 256 * 4;

/// llm.c's kinds of token file: magic, version, type of a token.
const LLMC_KINDS: [(u32, u32, TokenType); 2] =
    [(20240520, 1, TokenType::U16), (20240801, 7, TokenType::U32)];

fn llm_c(look: &Look<'_>) -> Result<Option<Layout>> {
    let word = |i: usize| look.at(i * 4).map(u32::from_le_bytes);
    let magic = LLMC_KINDS.iter().find(|kind| word(0) == Some(kind.0));
    let Some(&(magic, version, token_type)) = magic else { return Ok(None) };
    let (path, found) = (look.path, look.len());
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
    let expected = LLMC_HEADER as u64 + u64::from(tokens) * token_type.bytes() as u64;
    let what = format!("the {tokens} {token_type} tokens that its llm.c header announces");
    check_length(path, found as u64, expected, &what)?;
    if tokens == 0 {
        return Err(Error::format(path, "expected tokens, found an llm.c header that announces 0"));
    }
    let (start, end) = (LLMC_HEADER, found);
    Ok(Some(Layout { format: TokenFormat::LlmC, token_type, start, end, documents: None }))
}

/// An error unless a file has the length that its header announces.
pub(super) fn check_length(path: &Path, found: u64, expected: u64, what: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let cause = if found < expected {
        "a truncated copy or download?"
    } else {
        "two files joined, or a writer that did not update its header?"
    };
    Err(Error::format(
        path,
        format!("expected {expected} bytes for {what}, found {found} ({cause})"),
    ))
}

/// High halves up to this would be those of a vocabulary up to a million.
const HIGH: u32 = 15;

/// The type of raw tokens, by the beginning, the middle and the end of the file.
fn guess(look: &Look<'_>) -> Result<TokenType> {
    let length = look.len();
    let middle = (length / 2).next_multiple_of(8);
    let last = length.saturating_sub(PART) / 8 * 8;
    let starts: &[usize] = if length <= WHOLE { &[] } else { &[middle, last] };
    let mut buffer =
        reserve::zeros("a look at the tokens", if length <= WHOLE { 0 } else { PART })?;

    let (mut wide, mut words) = (Halves::default(), Halves::default());
    // Whether all 16-bit words have a low byte of 0, as big-endian bytes do.
    let mut is_shifted = true;
    let mut add = |part: &[u8]| {
        for number in part.as_chunks().0 {
            let number = u64::from_le_bytes(*number);
            wide.add(number as u32, (number >> 32) as u32, u32::MAX, 0xffff);
        }
        for number in part.as_chunks().0 {
            let number = u32::from_le_bytes(*number);
            words.add(number & 0xffff, number >> 16, 0xffff, 0xff);
            is_shifted &= number & 0x00ff_00ff == 0;
        }
    };
    add(look.head());
    for &start in starts {
        let part = &mut buffer[..PART.min(length - start)];
        look.read(start, part)?;
        add(part);
    }
    let is_shifted = is_shifted && words.low + words.high >= 32;
    if is_shifted || wide.is_swapped() || words.is_swapped() {
        return Err(Error::format(
            look.path,
            "expected little-endian tokens, found numbers whose low bytes are 0 (big-endian tokens, \
             floating-point numbers, or text in UTF-16); save tokens with numpy.save, as \
             numpy.uint16 or numpy.uint32, text goes through `mxtrain prepare`; if these are tokens all the same, say what they are with the option \
             token_type (--token-type of mxtrain)",
        ));
    }
    // Of the length nothing is concluded here: a truncated file is told by it later.
    match (wide.verdict(), words.verdict()) {
        (Verdict::Yes, _) => Ok(TokenType::I64),
        (Verdict::No, Verdict::Yes) if words.marks > 0 => Ok(TokenType::I32),
        (Verdict::No, Verdict::Yes) => Ok(TokenType::U32),
        (Verdict::No, Verdict::No) => Ok(TokenType::U16),
        _ => Err(Error::format(
            look.path,
            "expected u16 tokens, found every second 16-bit word small as if they were u32 or i64; \
             say which it is with the option token_type (--token-type of mxtrain): u16, u32 or i64",
        )),
    }
}

/// What the halves of numbers are like.
#[derive(Default)]
struct Halves {
    count: usize,
    /// Numbers whose high half is not 0.
    high: usize,
    /// The largest high half.
    highest: u32,
    /// Numbers whose low half is not 0.
    low: usize,
    /// Numbers whose low half is above [`HIGH`].
    low_above: usize,
    /// Small negative numbers.
    marks: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// The high halves are the zeros of wide tokens.
    Yes,
    /// They may be.
    Maybe,
    No,
}

impl Halves {
    /// Adds a number whose halves go up to `most`, and which marks something from -1 - `marks` on.
    fn add(&mut self, low: u32, high: u32, most: u32, marks: u32) {
        self.count += 1;
        // A small negative number marks padding or masking, and is no token, but is a signed
        // number.
        let is_mark = high == most && low >= most - marks;
        self.marks += usize::from(is_mark);
        let high = if is_mark { 0 } else { high };
        self.high += usize::from(high != 0);
        self.highest = self.highest.max(high);
        self.low += usize::from(low != 0);
        self.low_above += usize::from(low > HIGH);
    }

    /// Whether the halves that should be the high ones hold everything: see [`Halves::verdict`].
    /// Their own high byte then is a token's low one. Without it they are a few tokens that take
    /// turns.
    fn is_swapped(&self) -> bool {
        self.low == 0 && self.high >= 32 && self.highest > 0xff
    }

    /// Whether the numbers are as wide as they were read, or pairs of half the width.
    ///
    /// Were they pairs of independent tokens, a zero would be as likely in either place. Of k
    /// tokens that are not zero, all then stand in the first places with a probability of 2^-k: one
    /// in four billion for the 32 that decide. Where half of the first places or more are taken,
    /// zeros in all n second ones are rarer still. Bytes as tokens have some 3% of zeros at most,
    /// GPT-2's have none to speak of; a vocabulary of two, in a file of sixteen tokens, is
    /// suspected once in 400 times, and named.
    fn verdict(&self) -> Verdict {
        let is_dense = 2 * self.low >= self.count;
        if self.high == 0 {
            return match self.low {
                64.. => Verdict::Yes,
                32.. if is_dense => Verdict::Yes,
                16.. => Verdict::Maybe,
                _ if is_dense && self.count >= 8 => Verdict::Maybe,
                _ => Verdict::No,
            };
        }
        // Tokens above 65,535 among them? Or tokens that take turns with small ones? Not for us to
        // say.
        let is_odd = self.highest <= HIGH && 2 * self.low_above >= self.count && self.count >= 8;
        if is_odd { Verdict::Maybe } else { Verdict::No }
    }
}
