//! Which documents are for training and which for validation, and the two token files.
//!
//! Documents stay whole and come one by one, so each is decided on as it comes, whatever the chunks
//! and threads, and any input fits in constant memory. Two cases are known only at the end and are
//! put right in the finished files: a single document is cut at a line, and of a few large ones the
//! smallest is moved to validation.

use std::ops::Range;

use super::encode::{Encoded, Part};
use crate::failure::Outcome;
use crate::prepared::{Documents, Source};
use crate::tokenizer::Tokenizer;
use crate::tokens_file::TokensFile;

/// A document that is longer is decided on before its end is seen. (Decisions depend on the text
/// alone, never on how it was cut into chunks.)
const LONG: u64 = 1 << 20;
/// Validation takes up to this many times its share of all documents, so that many short ones do
/// not pay at once for a long one before them.
const CROWD: f64 = 4.0;
/// How far behind the wanted place the cut of a single document looks for a line end, in bytes.
const SPLIT_SEARCH: u64 = 64 << 10;
/// Text around that cut in which a place is looked for where encoding may be cut.
const MARGIN: u64 = 4 << 10;

/// How documents are chosen for validation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Rule {
    /// About this part of the bytes.
    Fraction(f64),
    /// All of this input, nothing of the others.
    Source(usize),
}

/// One of the two token files.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Set {
    Train,
    Val,
}

/// The token files that are being written.
pub(super) struct Sets {
    rule: Rule,
    tokenizer: Tokenizer,
    special: bool,
    pub(super) train: TokensFile,
    pub(super) val: TokensFile,
    pub(super) sources: Vec<Source>,
    /// Documents and bytes so far, `[train, val]`.
    documents: [u64; 2],
    bytes: [u64; 2],
    document: Document,
    /// Where the last document of the present text went.
    previous: Option<Set>,
    /// The smallest training document, for the case that validation gets none.
    smallest: Option<Written>,
    /// Whether the only document was cut in two.
    pub(super) cut: bool,
}

/// The document that is being read.
#[derive(Default)]
struct Document {
    /// Tokens that are held back until it is decided where they go.
    tokens: Vec<u32>,
    bytes: u64,
    blank: bool,
    /// Where it goes, and where it begins there, once that is decided.
    place: Option<(Set, u64)>,
    /// Whether a separator was written before it.
    separated: bool,
    /// Bytes from its beginning to the end of its text, as far as they are known.
    left: Option<u64>,
}

/// A document in the training file.
#[derive(Clone)]
struct Written {
    source: usize,
    separated: bool,
    tokens: Range<u64>,
    bytes: u64,
}

impl Sets {
    pub(super) fn new(
        rule: Rule,
        tokenizer: Tokenizer,
        special: bool,
        [train, val]: [TokensFile; 2],
        sources: Vec<Source>,
    ) -> Self {
        Self {
            rule,
            tokenizer,
            special,
            train,
            val,
            sources,
            documents: [0; 2],
            bytes: [0; 2],
            document: Document { blank: true, ..Document::default() },
            previous: None,
            smallest: None,
            cut: false,
        }
    }

    /// Documents in both sets.
    pub(super) fn documents(&self) -> Documents {
        let [train, val] = self.documents;
        Documents { train, val, cut: self.cut }
    }

    /// Bytes of text in both sets.
    pub(super) fn bytes(&self) -> [u64; 2] {
        self.bytes
    }

    /// Takes the next tokens.
    pub(super) fn take(&mut self, encoded: &Encoded) -> Outcome {
        let mut rest = encoded.tokens.as_slice();
        for part in &encoded.parts {
            let tokens;
            (tokens, rest) = rest.split_at(part.tokens);
            self.part(part, tokens)?;
        }
        Ok(())
    }

    fn part(&mut self, part: &Part, tokens: &[u32]) -> Outcome {
        if part.begins {
            self.previous = None;
            self.begin(part.text);
        }
        let source = part.source;
        self.document.bytes += part.bytes;
        self.document.blank &= part.blank;
        match self.document.place {
            Some((set, _)) => self.file(set).push(tokens)?,
            None => self.document.tokens.extend_from_slice(tokens),
        }
        let ends = part.mark || part.ends;
        let is_long = self.document.bytes > LONG;
        if self.document.place.is_none() {
            // Whitespace between marks is no document: it goes with the one before, or after.
            let blank = self.document.blank && !is_long;
            let set = match (self.rule, self.previous) {
                (_, None) if blank && !part.ends => return Ok(()),
                _ if !ends && !is_long => return Ok(()),
                (Rule::Source(val), _) if source == val => Set::Val,
                (Rule::Source(_), _) => Set::Train,
                (_, previous) if blank => previous.unwrap_or(Set::Train),
                (Rule::Fraction(fraction), _) => self.choose(fraction, is_long),
            };
            self.place(set)?;
        }
        if ends {
            self.end(source);
            let left = self.document.left.map(|left| left.saturating_sub(self.document.bytes));
            self.begin(left);
        }
        Ok(())
    }

    /// Begins a document in a text of which `left` bytes are left.
    fn begin(&mut self, left: Option<u64>) {
        let mut tokens = std::mem::take(&mut self.document.tokens);
        tokens.clear();
        self.document = Document { tokens, blank: true, left, ..Document::default() };
    }

    /// Validation, if the document brings its share nearer to the fraction than it would be
    /// without.
    fn choose(&self, fraction: f64, is_long: bool) -> Set {
        let [documents, bytes] = [self.documents, self.bytes].map(|n| (n[0] + n[1]) as f64);
        // Something must be left to train on.
        if fraction == 0.0 || documents == 0.0 {
            return Set::Train;
        }
        let document = &self.document;
        let size = match (is_long, document.left) {
            (false, _) => document.bytes as f64,
            (true, Some(left)) => left.max(LONG) as f64,
            (true, None) => bytes / documents,
        };
        let missing = fraction * (bytes + size) - self.bytes[1] as f64;
        // Shorter ones than the average count as such, or they would fill every small gap.
        let average = (bytes + size) / (documents + 1.0);
        let val_documents = self.documents[1] as f64;
        let is_crowded =
            val_documents > 0.0 && val_documents + 1.0 > CROWD * fraction * (documents + 1.0);
        match missing > size.max(average) / 2.0 && !is_crowded {
            true => Set::Val,
            false => Set::Train,
        }
    }

    /// Writes what was held back of the document, behind a separator where one is missing.
    fn place(&mut self, set: Set) -> Outcome {
        let tokens = std::mem::take(&mut self.document.tokens);
        let separator = self.tokenizer.separator();
        let document = &self.document;
        let continues = document.blank && document.bytes <= LONG && self.previous.is_some();
        let file = self.file(set);
        let needs_none = file.last().is_none()
            || continues
            || tokens.is_empty()
            || file.last() == separator
            || tokens.first().copied() == separator;
        if !needs_none {
            file.push(separator.as_slice())?;
        }
        let first = file.tokens();
        file.push(&tokens)?;
        self.document.tokens = tokens;
        self.document.place = Some((set, first));
        self.document.separated = !needs_none && separator.is_some();
        Ok(())
    }

    /// Counts the document, which is written.
    fn end(&mut self, source: usize) {
        let Some((set, first)) = self.document.place else { return };
        let bytes = self.document.bytes;
        let is_one = !self.document.blank || bytes > LONG;
        let count = &mut self.sources[source];
        match set {
            Set::Train => count.train_bytes += bytes,
            Set::Val => count.val_bytes += bytes,
        }
        self.bytes[set as usize] += bytes;
        if !is_one {
            return;
        }
        self.previous = Some(set);
        self.documents[set as usize] += 1;
        *self.sources[source].documents_mut(set == Set::Val) += 1;
        let separated = self.document.separated;
        let written = Written { source, separated, tokens: first..self.train.tokens(), bytes };
        if set == Set::Train && self.smallest.as_ref().is_none_or(|s| written.bytes < s.bytes) {
            self.smallest = Some(written);
        }
    }

    /// Puts right what only the end shows.
    pub(super) fn finish(&mut self) -> Outcome {
        let Rule::Fraction(fraction) = self.rule else { return Ok(()) };
        if fraction == 0.0 || self.documents[1] > 0 {
            return Ok(());
        }
        match (self.documents[0], self.smallest.clone()) {
            (1, Some(document)) => self.cut_document(fraction, &document),
            (2.., Some(document)) => self.move_document(&document),
            _ => Ok(()),
        }
    }

    /// Moves a document to validation, with the separator that is one too many without it.
    fn move_document(&mut self, document: &Written) -> Outcome {
        let mut range = document.tokens.clone();
        let separator = self.tokenizer.separator();
        let mut token_at = |place: Option<u64>| -> Outcome<Option<u32>> {
            let Some(place) = place.filter(|&place| place < self.train.tokens()) else {
                return Ok(None);
            };
            let mut token = [0];
            self.train.read(place, &mut token)?;
            Ok(Some(token[0]))
        };
        let before = token_at(range.start.checked_sub(1))?;
        let behind = token_at(Some(range.end))?;
        self.train.copy(range.clone(), &mut self.val)?;
        // Its own mark goes with it; of two separators around it, one is left. One that begins
        // documents is theirs.
        if document.separated {
            range.start -= 1;
        } else if separator.is_some()
            && self.tokenizer.begin().first().copied() != separator
            && behind == separator
            && (before.is_none() || before == separator)
        {
            range.end += 1;
        }
        self.train.remove(range)?;

        let count = &mut self.sources[document.source];
        count.train_bytes -= document.bytes;
        count.val_bytes += document.bytes;
        count.train_documents -= 1;
        count.val_documents += 1;
        self.bytes = [self.bytes[0] - document.bytes, document.bytes];
        self.documents = [self.documents[0] - 1, 1];
        Ok(())
    }

    /// Cuts the only document: its last `fraction` is for validation, from the beginning of a line
    /// where one is near, else of a character. Both parts have the tokens that they have alone.
    fn cut_document(&mut self, fraction: f64, document: &Written) -> Outcome {
        let length = self.bytes[0];
        let wanted = (length as f64 * (1.0 - fraction)).round() as u64;
        if wanted >= length {
            return Ok(());
        }
        let tokenizer = self.tokenizer.clone();
        let lengths = tokenizer.token_lengths();
        if tokenizer.file().is_some() {
            return self.cut_tokens(fraction, document, &lengths);
        }
        let size = |token: u32| u64::from(lengths[token as usize]);

        // The tokens around the wanted place, found from the end.
        let (mut first, mut offset) = (self.train.tokens(), length);
        let mut block = vec![0; 1 << 16];
        'blocks: while first > 0 {
            let count = first.min(block.len() as u64) as usize;
            let begin = first - count as u64;
            self.train.read(begin, &mut block[..count])?;
            for &token in block[..count].iter().rev() {
                if offset + MARGIN <= wanted {
                    break 'blocks;
                }
                first -= 1;
                offset -= size(token);
            }
        }
        let mut window = Vec::new(); // the text from `offset` on
        let mut bounds = Vec::new(); // where each token begins in it
        let mut next = first;
        let until = (wanted + SPLIT_SEARCH + MARGIN - offset) as usize;
        while next < self.train.tokens() && window.len() < until {
            let count = (self.train.tokens() - next).min(1 << 12) as usize;
            self.train.read(next, &mut block[..count])?;
            for &token in &block[..count] {
                bounds.push(window.len());
                tokenizer.decode(token, &mut window);
            }
            next += count as u64;
        }
        bounds.push(window.len());

        let inside = line_or_character(&window, wanted, offset, length);
        let cut = offset + inside as u64;
        // Tokens before `left` and from `right` on are the same whether the text is cut or not.
        let is_bound = |at: &usize| bounds.binary_search(at).is_ok();
        // Where there is no such place in the window, its ends will do, or the token's nearest.
        let near = |at: &usize| is_character(&window, *at);
        let left = safe_before(&tokenizer, &window, inside).filter(is_bound).unwrap_or_else(|| {
            let bound = bounds.iter().rev().copied().find(|at| *at <= inside && near(at));
            bound.filter(|_| offset > 0).unwrap_or(0)
        });
        let right = safe_behind(&window, inside).filter(is_bound).unwrap_or_else(|| {
            let bound = bounds.iter().copied().find(|at| *at >= inside && near(at));
            let is_whole = offset + window.len() as u64 == length;
            bound.filter(|_| !is_whole).unwrap_or(window.len())
        });
        let place = |at: usize| first + bounds.binary_search(&at).unwrap_or(0) as u64;
        let (keep, tail) = (place(left), place(right));
        let before = self.encode(&window[left..inside])?;
        let behind = self.encode(&window[inside..right])?;
        self.val.push(&behind)?;
        self.train.copy(tail..self.train.tokens(), &mut self.val)?;
        self.train.remove(keep..self.train.tokens())?;
        self.train.push(&before)?;

        self.count_cut(cut, document);
        Ok(())
    }

    /// Cuts the only document of a tokenizer that a file describes: behind a token that ends a line
    /// where one is near, else before one that begins a character. What its tokens have of the text
    /// is known nearly enough, so they stay as they are, behind those that begin a document.
    fn cut_tokens(&mut self, fraction: f64, document: &Written, lengths: &[u32]) -> Outcome {
        let begin = self.tokenizer.begin().to_vec();
        let (all, length) = (self.train.tokens(), self.bytes[0]);
        let first = document.tokens.start + begin.len() as u64;
        let share = (all.saturating_sub(first) as f64 * (1.0 - fraction)).round() as u64;
        let wanted = (first + share.max(1)).min(all);
        let mut near = vec![0; (all - wanted).min(SPLIT_SEARCH) as usize];
        self.train.read(wanted, &mut near)?;
        let texts = near.iter().map(|&token| self.tokenizer.bytes(token));
        let mut line = texts.clone().enumerate().filter(|(_, text)| text.ends_with(b"\n"));
        let line = line.next().map(|(at, _)| wanted + at as u64 + 1).filter(|&at| at < all);
        let mut character = texts.enumerate().filter(|(_, text)| is_character(text, 0));
        let character = || character.next().map(|(at, _)| wanted + at as u64);
        let Some(cut) = line.or_else(character) else { return Ok(()) };

        let (mut parts, mut block) = ([0, 0], vec![0; 1 << 16]);
        let mut next = first;
        while next < all {
            let count = (all - next).min(block.len() as u64) as usize;
            self.train.read(next, &mut block[..count])?;
            for (at, token) in (next..).zip(&block[..count]) {
                parts[usize::from(at >= cut)] += u64::from(lengths[*token as usize]);
            }
            next += count as u64;
        }
        let [before, behind] = parts.map(|bytes| bytes as f64);
        let bytes = (length as f64 * before / (before + behind).max(1.0)).round() as u64;
        self.val.push(&begin)?;
        self.train.copy(cut..all, &mut self.val)?;
        self.train.remove(cut..all)?;
        self.count_cut(bytes, document);
        Ok(())
    }

    /// Counts the parts of the only document, which was cut at this byte.
    fn count_cut(&mut self, cut: u64, document: &Written) {
        let length = self.bytes[0];
        self.cut = true;
        self.bytes = [cut, length - cut];
        self.documents = [u64::from(cut > 0), u64::from(cut < length)];
        for source in &mut self.sources {
            source.train_bytes = 0;
        }
        let count = &mut self.sources[document.source];
        (count.train_bytes, count.val_bytes) = (cut, length - cut);
        [count.train_documents, count.val_documents] = self.documents;
    }

    /// Tokens of a text, marks in it included. What is no UTF-8 lies outside of what it is given.
    fn encode(&self, text: &[u8]) -> Outcome<Vec<u32>> {
        if self.tokenizer == Tokenizer::Bytes {
            return Ok(text.iter().map(|&b| b.into()).collect());
        }
        let text = String::from_utf8_lossy(text);
        let mut tokens = Vec::new();
        let pieces = match self.tokenizer.mark().filter(|_| self.special) {
            Some(mark) => text.split(mark).collect(),
            None => vec![&*text],
        };
        for (i, piece) in pieces.into_iter().enumerate() {
            tokens.extend(self.tokenizer.separator().filter(|_| i > 0));
            tokens.extend(self.tokenizer.encode(piece)?);
        }
        Ok(tokens)
    }

    fn file(&mut self, set: Set) -> &mut TokensFile {
        match set {
            Set::Train => &mut self.train,
            Set::Val => &mut self.val,
        }
    }
}

/// Where the document is cut, as a place in `window`, which begins at `offset` of `length` bytes.
fn line_or_character(window: &[u8], wanted: u64, offset: u64, length: u64) -> usize {
    let wanted = (wanted - offset) as usize;
    // One byte early: a line may begin exactly there.
    let begin = wanted.saturating_sub(1);
    let end = window.len().min(begin + SPLIT_SEARCH as usize);
    let line = memchr::memchr(b'\n', &window[begin..end]).map(|at| begin + at + 1);
    line.filter(|&at| offset + (at as u64) < length && wanted > 0).unwrap_or_else(|| {
        let continues = window[wanted..].iter().take_while(|&&b| b & 0xc0 == 0x80).count();
        wanted + continues
    })
}

/// The last place before `end` where encoding may be cut.
fn safe_before(tokenizer: &Tokenizer, window: &[u8], end: usize) -> Option<usize> {
    let text = &window[..end];
    let begin = text.iter().position(|&b| b & 0xc0 != 0x80)?;
    tokenizer.cut_point(str::from_utf8(&text[begin..]).ok()?).map(|at| begin + at)
}

/// The first place behind `begin` where encoding may be cut.
fn safe_behind(window: &[u8], begin: usize) -> Option<usize> {
    let text = &window[begin..];
    let text = match str::from_utf8(text) {
        Ok(text) => text,
        Err(error) => str::from_utf8(&text[..error.valid_up_to()]).ok()?,
    };
    let mut visible = false;
    for (at, character) in text.char_indices() {
        if visible && matches!(character, ' ' | '\n') {
            return Some(begin + at);
        }
        visible = !character.is_whitespace();
    }
    None
}

/// Whether a character begins there, or the text ends.
fn is_character(window: &[u8], at: usize) -> bool {
    window.get(at).is_none_or(|&b| b & 0xc0 != 0x80)
}
