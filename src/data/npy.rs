//! NumPy's `.npy`: a magic, a version, the length of a header, the header, the numbers.
//!
//! The header is the text of a Python dictionary with three keys, for example `{'descr': '<u2',
//! 'fortran_order': False, 'shape': (4000,), }`. It is read for what it says, in any order and with
//! any blanks, and nothing of it is executed. Two dimensions are read row by row, as they are
//! stored.

use super::file::{TokenFormat, TokenType};
use super::layout::{Layout, check_length};
use super::look::Look;
use crate::{Error, Result};

const MAGIC: &[u8] = b"\x93NUMPY";
/// NumPy itself refuses to read headers longer than this from files that it does not trust.
const MAX_HEADER: usize = 10_000;

/// The types that are read: NumPy's name without the byte order, ours.
const TYPES: [(&str, TokenType); 5] = [
    ("u1", TokenType::U8),
    ("u2", TokenType::U16),
    ("u4", TokenType::U32),
    ("i4", TokenType::I32),
    ("i8", TokenType::I64),
];

/// The layout of a `.npy` file; `None` for another kind of file.
pub(super) fn layout(look: &Look<'_>) -> Result<Option<Layout>> {
    // No header that is read reaches beyond.
    let (path, bytes) = (look.path, look.head());
    let Some(rest) = bytes.strip_prefix(MAGIC) else { return Ok(None) };
    let fail = |message: String| Err(Error::format(path, message));
    let cut =
        || fail(format!("npy: its header is cut off at {} bytes (a truncated copy?)", bytes.len()));
    let Some((&[major, minor], rest)) = rest.split_first_chunk() else { return cut() };
    let (length, rest) = match (major, rest.split_first_chunk(), rest.split_first_chunk()) {
        (1, Some((length, rest)), _) => (u16::from_le_bytes(*length) as usize, rest),
        (2 | 3, _, Some((length, rest))) => (u32::from_le_bytes(*length) as usize, rest),
        (1..=3, ..) => return cut(),
        _ => return fail(format!("npy: expected version 1, 2 or 3, found {major}.{minor}")),
    };
    if length > MAX_HEADER {
        return fail(format!(
            "npy: expected a header of at most {MAX_HEADER} bytes, found {length}; save the array \
             of tokens alone with numpy.save"
        ));
    }
    let Some(text) = rest.get(..length) else { return cut() };
    let header = match Header::parse(text) {
        Ok(header) => header,
        Err(problem) => return fail(format!("npy: {problem}")),
    };

    let token_type = match header.token_type() {
        Ok(token_type) => token_type,
        Err(problem) => return fail(format!("npy: {problem}")),
    };
    let shape = &header.shape;
    if !matches!(shape.len(), 1 | 2) {
        return fail(format!(
            "npy: expected 1 or 2 dimensions, found the shape {shape:?}; save a.reshape(-1)"
        ));
    }
    if header.fortran_order && shape.len() > 1 {
        return fail(
            "npy: expected rows one after the other, found columns (Fortran order); save \
             numpy.ascontiguousarray(a)"
                .into(),
        );
    }
    let start = bytes.len() - rest.len() + length;
    let tokens = shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n));
    let expected = tokens
        .and_then(|tokens| tokens.checked_mul(token_type.bytes() as u64))
        .and_then(|bytes| bytes.checked_add(start as u64));
    let Some(expected) = expected else {
        return fail(format!("npy: no file holds the shape {shape:?} that its header announces"));
    };
    let what = format!("the {token_type} tokens of shape {shape:?} that its npy header announces");
    check_length(path, look.len() as u64, expected, &what)?;
    if tokens == Some(0) {
        return fail(format!("expected tokens, found an npy array of shape {shape:?}"));
    }
    let end = look.len();
    Ok(Some(Layout { format: TokenFormat::Npy, token_type, start, end, documents: None }))
}

/// What a header says.
#[derive(Debug, PartialEq)]
struct Header {
    /// Such as `<u2`; the text of the list where the numbers are records of several.
    descr: String,
    fortran_order: bool,
    /// Slowest dimension first.
    shape: Vec<u64>,
}

impl Header {
    fn parse(text: &[u8]) -> Result<Self, String> {
        let broken = || {
            let start = String::from_utf8_lossy(&text[..text.len().min(80)]);
            format!(
                "expected a header with descr, fortran_order and shape, found {:?}",
                start.trim()
            )
        };
        let mut parser = Parser(text);
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        parser.expect(b'{').ok_or_else(broken)?;
        while !parser.take(b'}') {
            let key = parser.string().ok_or_else(broken)?;
            parser.expect(b':').ok_or_else(broken)?;
            match key {
                "descr" => descr = Some(parser.descr().ok_or_else(broken)?),
                "fortran_order" => fortran_order = Some(parser.boolean().ok_or_else(broken)?),
                "shape" => shape = Some(parser.tuple().ok_or_else(broken)?),
                _ => return Err(broken()),
            }
            if !parser.take(b',') {
                parser.expect(b'}').ok_or_else(broken)?;
                break;
            }
        }
        match (descr, fortran_order, shape, parser.is_at_end()) {
            (Some(descr), Some(fortran_order), Some(shape), true) => {
                Ok(Self { descr, fortran_order, shape })
            }
            _ => Err(broken()),
        }
    }

    fn token_type(&self) -> Result<TokenType, String> {
        let descr = self.descr.as_str();
        let (order, name) = descr.split_at_checked(1).unwrap_or_default();
        let Some((_, token_type)) = TYPES.iter().find(|(ours, _)| *ours == name) else {
            let what = match name.chars().next() {
                _ if descr.starts_with('[') => "records",
                Some('O') => "Python objects",
                Some('f' | 'c') => "floating-point numbers",
                Some('U' | 'S') => "texts",
                _ => "numbers",
            };
            return Err(format!(
                "expected tokens as uint8, uint16, uint32, int32 or int64, found {what} of dtype \
                 {descr:?}; save numpy.array(tokens, dtype=numpy.uint16), or numpy.uint32 for a \
                 vocabulary above 65,536"
            ));
        };
        match order {
            // One byte has no order; "=" is the order of the machine that reads.
            "<" => Ok(*token_type),
            "|" if token_type.bytes() == 1 => Ok(*token_type),
            "=" if cfg!(target_endian = "little") => Ok(*token_type),
            _ => Err(format!(
                "expected little-endian tokens, found dtype {descr:?}; save \
                 a.astype(a.dtype.newbyteorder('<'))"
            )),
        }
    }
}

/// The rest of a header's text.
struct Parser<'a>(&'a [u8]);

impl<'a> Parser<'a> {
    fn skip_blanks(&mut self) {
        self.0 = self.0.trim_ascii_start();
    }

    /// Takes one character, if it is the next.
    fn take(&mut self, character: u8) -> bool {
        self.skip_blanks();
        match self.0.split_first() {
            Some((&first, rest)) if first == character => {
                self.0 = rest;
                true
            }
            _ => false,
        }
    }

    fn expect(&mut self, character: u8) -> Option<()> {
        self.take(character).then_some(())
    }

    fn is_at_end(&mut self) -> bool {
        self.skip_blanks();
        self.0.is_empty()
    }

    /// A string in either kind of quotes, without escapes, which no key or dtype needs.
    fn string(&mut self) -> Option<&'a str> {
        self.skip_blanks();
        let (&quote, rest) = self.0.split_first()?;
        if quote != b'\'' && quote != b'"' {
            return None;
        }
        let end = rest.iter().position(|&c| c == quote || c == b'\\')?;
        let (text, rest) = rest.split_at(end);
        self.0 = rest.strip_prefix(&[quote])?;
        std::str::from_utf8(text).ok()
    }

    fn boolean(&mut self) -> Option<bool> {
        self.skip_blanks();
        for (name, value) in [(&b"True"[..], true), (b"False", false)] {
            if let Some(rest) = self.0.strip_prefix(name) {
                self.0 = rest;
                return Some(value);
            }
        }
        None
    }

    /// Numbers in parentheses: `()`, `(3,)`, `(3, 4)`. Python 2 wrote `3L`.
    fn tuple(&mut self) -> Option<Vec<u64>> {
        let mut numbers = Vec::new();
        self.expect(b'(')?;
        while !self.take(b')') {
            self.skip_blanks();
            let digits = self.0.iter().take_while(|c| c.is_ascii_digit()).count();
            let (number, rest) = self.0.split_at(digits);
            numbers.push(std::str::from_utf8(number).ok()?.parse().ok()?);
            self.0 = rest;
            self.take(b'L');
            if !self.take(b',') {
                self.expect(b')')?;
                break;
            }
        }
        Some(numbers)
    }

    /// A dtype: a string, or the text of a list up to the bracket that closes it.
    fn descr(&mut self) -> Option<String> {
        self.skip_blanks();
        if self.0.first() != Some(&b'[') {
            return self.string().map(str::to_owned);
        }
        let mut depth = 0;
        let end = self.0.iter().position(|&c| {
            depth += i32::from(c == b'[') - i32::from(c == b']');
            depth == 0
        })?;
        let (list, rest) = self.0.split_at(end + 1);
        self.0 = rest;
        Some(String::from_utf8_lossy(list).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(String, bool, Vec<u64>), String> {
        Header::parse(text.as_bytes()).map(|h| (h.descr, h.fortran_order, h.shape))
    }

    #[test]
    fn a_header_may_be_written_in_many_ways() {
        let plain = Ok(("<u2".to_owned(), false, vec![7]));
        for text in [
            "{'descr': '<u2', 'fortran_order': False, 'shape': (7,), }          \n",
            "{\"shape\":(7L,),\"fortran_order\":False,\"descr\":\"<u2\"}",
            " { 'shape' : ( 7 ) , 'descr' : '<u2' , 'fortran_order' : False , } ",
        ] {
            assert_eq!(parse(text), plain, "{text}");
        }
        let (_, order, shape) =
            parse("{'descr': '|O', 'fortran_order': True, 'shape': (2, 3)}").unwrap();
        assert!(order && shape == [2, 3]);
        let records = "{'descr': [('a', '<u2'), ('b', '<i8', (2,))], 'fortran_order': False, \
                       'shape': ()}";
        assert_eq!(parse(records).unwrap().0, "[('a', '<u2'), ('b', '<i8', (2,))]");
    }

    #[test]
    fn what_is_no_header_is_shown() {
        for text in [
            "",
            "{}",
            "{'descr': '<u2'}",
            "{'descr': '<u2', 'fortran_order': 0, 'shape': (1,)}",
            "{'descr': '<u2', 'fortran_order': False, 'shape': (-1,)}",
            "{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999,)}",
            "{'descr': '<u2', 'fortran_order': False, 'shape': (1,), 'more': 1}",
            "{'descr': '<u2', 'fortran_order': False, 'shape': (1,)} trailing",
            "{'descr': '<u2', 'fortran_order': False, 'shape': (1,",
            "{'descr': '\\x3cu2', 'fortran_order': False, 'shape': (1,)}",
            "{'descr': [[', 'fortran_order': False, 'shape': (1,)}",
        ] {
            let problem = parse(text).unwrap_err();
            assert!(problem.starts_with("expected a header with descr"), "{text}: {problem}");
        }
    }
}
