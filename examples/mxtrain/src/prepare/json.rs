//! JSON objects, each with a document: one a line, or in an array, or one behind the other.
//!
//! The reader only finds where objects begin and end; threads parse them. So a file of any length
//! takes constant memory, and an error still names its line.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::error::Category;

use super::content::Content;
use crate::failure::{Failure, Outcome};

/// The longest object, which is held in memory as a whole.
pub(super) const MAX_ROW: usize = 64 << 20;
/// A first line of this length is enough to know the layout.
const FIRST_LINE: usize = 64 << 10;

/// Objects that were read and not yet parsed.
pub(super) struct Rows {
    bytes: Vec<u8>,
    rows: Vec<Row>,
}

/// Where an object lies, and the line on which it begins, from 1.
struct Row {
    bytes: Range<usize>,
    line: u64,
}

/// Whether a stream begins with a JSON object that has a text, on its first line.
pub(super) fn begins_rows(head: &[u8], field: &str) -> bool {
    let line = head.split(|&b| b == b'\n').next().unwrap_or_default();
    line.trim_ascii_start().starts_with(b"{") && matches!(text_of(line, field), Ok(Some(_)))
}

/// Reads a file's objects in groups.
pub(super) struct RowReader {
    content: Content,
    pending: Vec<u8>,
    /// The line on which `pending` begins, from 1.
    line: u64,
    /// `None` until the first character tells.
    layout: Option<Layout>,
    chunk: usize,
    max_row: usize,
    at_end: bool,
    /// Whether an array's closing bracket is what came last.
    is_closed: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Layout {
    /// An object a line.
    Lines,
    /// Objects with anything between braces, one behind the other.
    Sequence,
    /// The same between brackets, with commas.
    Array,
}

impl RowReader {
    /// Reads groups of about `chunk` bytes.
    pub(super) fn new(mut content: Content, chunk: usize) -> Self {
        let pending = std::mem::take(&mut content.head);
        Self {
            content,
            pending,
            line: 1,
            layout: None,
            chunk,
            max_row: MAX_ROW,
            at_end: false,
            is_closed: false,
        }
    }

    /// Bytes of the file that have been read.
    pub(super) fn position(&self) -> u64 {
        self.content.position()
    }

    /// The next group; `None` at the end.
    pub(super) fn next(&mut self) -> Outcome<Option<Rows>> {
        let mut target = self.chunk;
        loop {
            let missing = target.saturating_sub(self.pending.len());
            if !self.at_end {
                self.at_end = self.content.read(&mut self.pending, missing)? < missing;
            }
            let layout = match self.layout {
                Some(layout) => layout,
                None => match self.find_layout() {
                    Some(layout) => *self.layout.insert(layout),
                    None => {
                        target = self.pending.len() + self.chunk;
                        continue;
                    }
                },
            };
            let (rows, used) = match layout {
                Layout::Lines => self.lines(),
                Layout::Sequence | Layout::Array => self.objects(layout == Layout::Array)?,
            };
            if rows.is_empty() && !self.at_end {
                if self.pending.len() > self.max_row {
                    return Err(Failure::usage(format!(
                        "{}: expected objects of at most {}, found a longer one; split its text, \
                         or write the documents as plain text with {} between them",
                        self.place(self.line),
                        indicatif::HumanBytes(self.max_row as u64),
                        crate::tokenizer::END_OF_TEXT_MARK,
                    )));
                }
                if used == 0 {
                    target = self.pending.len() + self.chunk.max(self.pending.len() / 2);
                    continue;
                }
            }
            let rest = self.pending.split_off(used);
            let bytes = std::mem::replace(&mut self.pending, rest);
            self.line += memchr::memchr_iter(b'\n', &bytes).count() as u64;
            if rows.is_empty() {
                if self.at_end && layout == Layout::Array && !self.is_closed {
                    return Err(Failure::usage(format!(
                        "{}: expected ] at the end of the array, found the end of the file, which \
                         is cut off or damaged",
                        self.place(self.line)
                    )));
                }
                if self.at_end {
                    return Ok(None);
                }
                continue;
            }
            return Ok(Some(Rows { bytes, rows }));
        }
    }

    /// The layout by the file's first line; `None` while too little of it is there.
    fn find_layout(&mut self) -> Option<Layout> {
        let text = self.pending.trim_ascii_start();
        if !self.at_end && text.len() < FIRST_LINE && !text.contains(&b'\n') {
            return None;
        }
        if text.starts_with(b"[") {
            let skipped = self.pending.len() - text.len() + 1;
            let before: Vec<u8> = self.pending.drain(..skipped).collect();
            self.line += memchr::memchr_iter(b'\n', &before).count() as u64;
            return Some(Layout::Array);
        }
        // An object that begins on a line and ends on another.
        let line = text.split(|&b| b == b'\n').next().unwrap_or_default().trim_ascii();
        Some(match line {
            b"{" | [b'{', .., b',' | b'{' | b'['] => Layout::Sequence,
            _ => Layout::Lines,
        })
    }

    /// Whole lines, and the bytes that they take.
    fn lines(&self) -> (Vec<Row>, usize) {
        let end = match memchr::memrchr(b'\n', &self.pending) {
            _ if self.at_end => self.pending.len(),
            Some(last) => last + 1,
            None => return (Vec::new(), 0),
        };
        let mut rows = Vec::new();
        let (mut begin, mut line) = (0, self.line);
        let ends = memchr::memchr_iter(b'\n', &self.pending[..end]).chain([end]);
        for at in ends {
            if !self.pending[begin..at].trim_ascii().is_empty() {
                rows.push(Row { bytes: begin..at, line });
            }
            begin = (at + 1).min(end);
            line += 1;
        }
        (rows, end)
    }

    /// Whole objects wherever their lines end, and the bytes that they take.
    fn objects(&mut self, array: bool) -> Outcome<(Vec<Row>, usize)> {
        let mut rows = Vec::new();
        let (mut line, mut used, mut at) = (self.line, 0, 0);
        let mut is_closed = self.is_closed;
        let bytes = &self.pending;
        while let Some(&byte) = bytes.get(at) {
            match byte {
                b'\n' => line += 1,
                b' ' | b'\t' | b'\r' => {}
                b',' if array => is_closed = false,
                b']' if array => is_closed = true,
                b'{' => {
                    let Some(length) = object_length(&bytes[at..]) else {
                        if self.at_end {
                            return Err(Failure::usage(format!(
                                "{}: expected a JSON object, found one that does not end; the \
                                 file is cut off or damaged",
                                self.place(line)
                            )));
                        }
                        break;
                    };
                    is_closed = false;
                    rows.push(Row { bytes: at..at + length, line });
                    line += memchr::memchr_iter(b'\n', &bytes[at..at + length]).count() as u64;
                    at += length;
                    used = at;
                    continue;
                }
                _ => {
                    return Err(Failure::usage(format!(
                        "{}: expected a JSON object, found {:?}",
                        self.place(line),
                        byte as char
                    )));
                }
            }
            at += 1;
            used = at;
        }
        self.is_closed = is_closed;
        Ok((rows, used))
    }

    fn place(&self, line: u64) -> String {
        format!("{}:{line}", self.content.name.display())
    }
}

/// Bytes from an opening brace to the one that closes it.
fn object_length(bytes: &[u8]) -> Option<usize> {
    let (mut depth, mut at) = (0_u32, 0);
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => {
                depth -= 1;
                if depth == 0 {
                    return Some(at);
                }
            }
            b'"' => loop {
                // To the end of the string, over what is escaped.
                let found = memchr::memchr2(b'"', b'\\', bytes.get(at..)?)?;
                at += found + 1;
                match bytes[at - 1] {
                    b'"' => break,
                    _ => at += 1,
                }
            },
            _ => {}
        }
    }
    None
}

impl Rows {
    /// Bytes that the objects take.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Gives the text of each object in turn; `None` where it is null.
    pub(super) fn each(
        &self,
        file: &std::path::Path,
        field: &str,
        mut give: impl FnMut(Option<&str>) -> Outcome,
    ) -> Outcome {
        for Row { bytes, line } in &self.rows {
            let text = text_of(&self.bytes[bytes.clone()], field).map_err(|error| {
                let line = line + (error.line() as u64).saturating_sub(1);
                let message = error.to_string();
                // serde_json counts lines in this object alone.
                let message = message.split(" at line ").next().unwrap_or_default();
                let remedy = remedy(&error, message);
                Failure::usage(format!("{}:{line}: {message}{remedy}", file.display()))
            })?;
            give(text.as_deref())?;
        }
        Ok(())
    }
}

/// What to say behind a parser's message about JSON that is none.
fn remedy(error: &serde_json::Error, message: &str) -> &'static str {
    match error.classify() {
        Category::Eof => "; the object is cut off",
        Category::Syntax if message.contains("hex escape") => {
            "; a character of two \\u escapes lacks one of them (half of a surrogate pair), correct \
             it or leave the line out"
        }
        Category::Syntax if message.contains("unicode code point") => {
            "; JSON is UTF-8, convert the file with iconv"
        }
        Category::Syntax => "; expected JSON objects, one a line or in an array",
        Category::Data | Category::Io => "",
    }
}

/// The text in an object's field.
fn text_of<'a>(object: &'a [u8], field: &str) -> serde_json::Result<Option<Cow<'a, str>>> {
    let mut deserializer = serde_json::Deserializer::from_slice(object);
    let text = Object { field }.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(text)
}

/// Reads one field of an object and passes over the others.
struct Object<'f> {
    field: &'f str,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = Option<Cow<'de, str>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = Option<Cow<'de, str>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a JSON object with the field {:?}", self.field)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        const NAMED: usize = 8;
        let mut text = None;
        let mut others = Vec::new();
        while let Some(Text(key)) = map.next_key()? {
            let key = key.unwrap_or_default();
            if key == self.field {
                text = Some(map.next_value::<Text<'de>>()?.0);
            } else {
                if others.len() < NAMED {
                    others.push(key.into_owned());
                }
                map.next_value::<IgnoredAny>()?;
            }
        }
        text.ok_or_else(|| {
            A::Error::custom(format!(
                "expected the field {:?} with a document, found {}; name another with --text-field",
                self.field,
                match others.as_slice() {
                    [] => "no field".to_owned(),
                    names => names.join(", "),
                }
            ))
        })
    }
}

/// A string or null, borrowed where nothing in it is escaped.
struct Text<'de>(Option<Cow<'de, str>>);

impl<'de> serde::Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string with a document")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Some(Cow::Borrowed(text))))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Some(Cow::Owned(text.to_owned()))))
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Text(None))
            }
        }
        deserializer.deserialize_any(TextVisitor)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::prepare::inputs::{Compression, Format, Input};

    fn reader(json: &str, chunk: usize) -> (tempfile::TempDir, RowReader) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in.json");
        fs::write(&path, json).unwrap();
        let input = Input {
            source: 0,
            path: Some(path),
            format: Some(Format::Json),
            compression: Some(Compression::None),
            length: Some(json.len() as u64),
        };
        let mut reader = RowReader::new(Content::open(&input, "text").unwrap(), chunk);
        // What the check of the content has read would hide the chunk's size.
        let head = std::mem::take(&mut reader.pending);
        reader.content.put_back(head);
        (dir, reader)
    }

    fn texts(json: &str, chunk: usize) -> Outcome<Vec<Option<String>>> {
        let (_dir, mut reader) = reader(json, chunk);
        let mut texts = Vec::new();
        while let Some(rows) = reader.next()? {
            rows.each(Path::new("in.json"), "text", |text| {
                texts.push(text.map(str::to_owned));
                Ok(())
            })?;
        }
        Ok(texts)
    }

    #[test]
    fn every_layout_gives_the_texts_at_any_chunk_size() {
        let expected: Vec<_> =
            ["one", "t\"w}o\\", "", "語\n{"].iter().map(|t| Some(t.to_string())).collect();
        let lines = "{\"text\": \"one\"}\n\n{\"id\": {\"a\": [1]}, \"text\": \"t\\\"w}o\\\\\"}\r\n\
                     {\"text\": \"\"}\n{\"text\": \"\\u8a9e\\n{\"}";
        let array = format!(" \n[{}]\n", lines.replace("}\n{", "},\n{"));
        let pretty = lines.replace("{\"text", "{\n  \"text").replace("{\"id", "{\n\"id");
        for layout in [lines, &format!("{lines}\n"), &array, &pretty] {
            for chunk in (1..60).chain([1 << 20]) {
                assert_eq!(texts(layout, chunk).unwrap(), expected, "{layout} by {chunk}");
            }
        }
        assert!(texts("", 10).unwrap().is_empty());
        assert!(texts("[]", 10).unwrap().is_empty());
        assert_eq!(texts("{\"text\": null}\n", 10).unwrap(), [None]);
    }

    #[test]
    fn errors_name_the_line_and_what_is_there() {
        for (json, expected) in [
            (
                "{\"text\": \"a\"}\n{\"body\": 1, \"id\": 2}\n",
                "in.json:2: expected the field \"text\" with a document, found body, id; name another",
            ),
            (
                "{\"text\": \"a\"}\n\n{\"text\": 5}\n",
                "in.json:3: invalid type: integer `5`, expected a string",
            ),
            (
                "{\"text\": \"a\"}\n{\"text\": \"b\n",
                "in.json:2: EOF while parsing a string; the object",
            ),
            ("{\"text\": \"a\"} x\n", "in.json:1: trailing characters"),
            ("\"text\"\n", "in.json:1: invalid type: string \"text\", expected a JSON object"),
            ("[\n{\"text\": \"a\"},\n7]", "in.json:3: expected a JSON object, found '7'"),
            (
                "[\n{\"text\": \"a\"",
                "in.json:2: expected a JSON object, found one that does not end",
            ),
            ("{\n \"text\": \"a\",\n \"b\": x\n}", "in.json:3: expected value"),
            ("no json\n", "in.json:1: expected ident; expected JSON objects, one a line"),
            ("[{\"text\": \"a\"},\n{\"text\": \"b\"}\n", "in.json:3: expected ] at the end"),
            ("[\n{\"text\": \"a\"},", "in.json:2: expected ] at the end"),
            ("[", "in.json:1: expected ] at the end"),
            (
                "{\"text\": \"\\ud83d b\"}\n",
                "in.json:1: unexpected end of hex escape; a character of",
            ),
        ] {
            for chunk in [7, 1 << 20] {
                let message = texts(json, chunk).unwrap_err().message;
                let name = message.rsplit('/').next().unwrap();
                assert!(name.starts_with(expected), "{json}: {name}");
            }
        }
    }

    #[test]
    fn an_object_without_end_is_refused_before_it_fills_the_memory() {
        for json in ["{\"text\": \"", "[{\"text\": \""] {
            let (_dir, mut reader) = reader(&(json.to_owned() + &"a".repeat(400_000)), 1000);
            reader.max_row = 20_000;
            let failure = reader.next().err().unwrap();
            assert!(failure.message.contains("at most 19.53 KiB"), "{}", failure.message);
            assert!(reader.pending.len() < 110_000);
        }
    }

    #[test]
    fn a_stream_is_taken_for_json_only_with_a_text() {
        assert!(begins_rows(b"{\"id\": 1, \"text\": \"a\"}\nmore", "text"));
        for head in [&b"{\"id\": 1}\n"[..], b"{ a set }\n", b"text\n", b"", b"{\"text\": 5}"] {
            assert!(!begins_rows(head, "text"));
        }
    }
}
