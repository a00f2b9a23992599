//! Opens an input as a stream of decompressed bytes, once its content is what its name says.
//!
//! A file is never guessed to be something else than it is named: what contradicts is an error that
//! names the kind and the remedy. Standard input and pipes have no telling name, so they are taken
//! for what their beginning shows.

use std::fs::File;
use std::io::{self, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::read::MultiGzDecoder;

use super::inputs::{Compression, Format, Input};
use super::json;
use crate::failure::{Failure, Outcome};

/// Bytes at an input's beginning that are looked at.
const HEAD: u64 = 64 << 10;
/// zstd's largest window (2 GiB), so that files packed with --long=31 are read.
const ZSTD_WINDOW_LOG: u32 = 31;

/// An input that is being read.
pub(super) struct Content {
    pub(super) name: PathBuf,
    pub(super) format: Format,
    /// Bytes of text that it is believed to hold; `None` for pipes. Exact where nothing is packed.
    pub(super) expected: Option<u64>,
    /// The first bytes, decompressed, without a byte order mark.
    pub(super) head: Vec<u8>,
    rest: Box<dyn Read + Send>,
    compression: Compression,
    /// Its length as it lies there, and how much of that was read.
    length: Option<u64>,
    position: Arc<AtomicU64>,
}

impl Content {
    /// Opens an input that is not a Parquet file. `text_field` tells JSON lines from text on
    /// standard input.
    pub(super) fn open(input: &Input, text_field: &str) -> Outcome<Self> {
        let name = input.name();
        let position = Arc::new(AtomicU64::new(0));
        let file: Box<dyn Read + Send> = match &input.path {
            Some(path) => Box::new(File::open(path).map_err(Failure::io("open", path))?),
            None => Box::new(io::stdin()),
        };
        // A file that grows meanwhile ends where it ended when it was found.
        let file = file.take(input.length.unwrap_or(u64::MAX));
        let mut raw = Counted { inner: file, position: Arc::clone(&position) };
        let head = read_head(&mut raw).map_err(Failure::io("read", &name))?;
        let compression = input.compression.unwrap_or_else(|| match Packing::of(&head) {
            Some(Packing::Gzip) => Compression::Gzip,
            Some(Packing::Zstd) => Compression::Zstd,
            _ => Compression::None,
        });
        let promised = match compression {
            Compression::None => None,
            Compression::Gzip => Some((Packing::Gzip, "gzip")),
            Compression::Zstd => Some((Packing::Zstd, "zstd")),
        };
        if let Some((packing, what)) = promised
            && Packing::of(&head) != Some(packing)
        {
            let kind = kind_of(&head).map_or_else(|| something(&head), |(kind, _)| kind);
            return Err(Failure::usage(format!(
                "{}: expected data of {what} as its name says, found {kind}; rename the file, or \
                 fetch it again",
                name.display()
            )));
        }
        let raw = BufReader::with_capacity(256 << 10, Cursor::new(head).chain(raw));
        let mut rest: Box<dyn Read + Send> = match compression {
            Compression::None => Box::new(raw),
            Compression::Gzip => Box::new(MultiGzDecoder::new(raw)),
            Compression::Zstd => {
                let decoder = zstd::Decoder::with_buffer(raw).and_then(|mut decoder| {
                    decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                    Ok(decoder)
                });
                Box::new(decoder.map_err(Failure::io("read", &name))?)
            }
        };
        let mut head = read_head(&mut rest).map_err(|e| damaged(&name, compression, e))?;
        let mark = if head.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        head.drain(..mark);
        let format = input.format.unwrap_or_else(|| match json::begins_rows(&head, text_field) {
            true => Format::Json,
            false => Format::Text,
        });
        let content = Self {
            name,
            format,
            // Text shrinks to a third or so.
            expected: input.length.map(|length| match compression {
                Compression::None => length.saturating_sub(mark as u64),
                _ => length.saturating_mul(3),
            }),
            head,
            rest,
            compression,
            length: input.length,
            position,
        };
        content.check()?;
        Ok(content)
    }

    /// Appends up to `count` bytes to a buffer; fewer mean the end.
    pub(super) fn read(&mut self, buffer: &mut Vec<u8>, count: usize) -> Outcome<usize> {
        let read = (&mut self.rest)
            .take(count as u64)
            .read_to_end(buffer)
            .map_err(|e| damaged(&self.name, self.compression, e))?;
        let is_short = self.length.is_some_and(|length| self.position() < length);
        if read < count && is_short && self.compression == Compression::None {
            return Err(Failure::runtime(format!(
                "{} became shorter while it was read",
                self.name.display()
            )));
        }
        Ok(read)
    }

    /// Makes `bytes` the next that are read.
    #[cfg(test)]
    pub(super) fn put_back(&mut self, bytes: Vec<u8>) {
        let rest = std::mem::replace(&mut self.rest, Box::new(io::empty()));
        self.rest = Box::new(Cursor::new(bytes).chain(rest));
    }

    /// Bytes of the file that have been read, as they lie there.
    pub(super) fn position(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }

    /// Refuses what is no text.
    fn check(&self) -> Outcome {
        let Some((kind, remedy)) = kind_of(&self.head) else { return Ok(()) };
        let name = self.name.display().to_string();
        // A pipe has no name that a command could take, and what is in it may be unpacked there.
        let file = if self.length.is_some() { &name } else { "FILE" };
        let (kind, remedy) = match self.compression {
            Compression::None => (kind.to_owned(), remedy.replace("FILE", file)),
            // tar takes it as it is.
            _ if kind.contains("tar archive") => (format!("{kind}, compressed"), remedy.to_owned()),
            Compression::Gzip => (
                format!("{kind} within its gzip data"),
                format!("unpack it with `gzip -dc {file}` and give what comes out"),
            ),
            Compression::Zstd => (
                format!("{kind} within its zstd data"),
                format!("unpack it with `zstd -dc {file}` and give what comes out"),
            ),
        };
        let text = match self.format {
            Format::Json => "JSON",
            _ => "text",
        };
        Err(Failure::usage(format!("{name}: expected {text}, found {kind}; {remedy}")))
    }
}

/// Refuses a file that does not begin as Parquet files do.
pub(super) fn check_parquet(mut file: &File, path: &Path) -> Outcome {
    let head = read_head(&mut file).map_err(Failure::io("read", path))?;
    if head.starts_with(b"PAR1") {
        return Ok(());
    }
    let name = path.display().to_string();
    let (kind, remedy) = kind_of(&head).unwrap_or_else(|| match head.is_empty() {
        true => (something(&head), "fetch or make it again"),
        false => (something(&head), "rename it if it is text"),
    });
    let remedy = remedy.replace("FILE", &name);
    Err(Failure::usage(format!("{name}: expected a Parquet file, found {kind}; {remedy}")))
}

/// What a file holds that is of no known kind.
fn something(head: &[u8]) -> &'static str {
    if head.is_empty() { "an empty file" } else { "something else" }
}

/// The beginning of a stream.
fn read_head(reader: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    reader.take(HEAD).read_to_end(&mut head)?;
    Ok(head)
}

/// A failure to read, in terms of the compression where there is one.
fn damaged(name: &Path, compression: Compression, error: io::Error) -> Failure {
    let packing = match compression {
        Compression::None => return Failure::io("read", name)(error),
        Compression::Gzip => "gzip",
        Compression::Zstd => "zstd",
    };
    // An archive may name a dictionary that is not in it.
    if error.to_string().contains("ictionary") {
        return Failure::usage(format!(
            "{}: its zstd data was made with a dictionary, which is not in it; unpack it with \
             `zstd -d -D DICTIONARY`",
            name.display()
        ));
    }
    use io::ErrorKind as K;
    let what = match error.kind() {
        K::UnexpectedEof => "cut off",
        K::InvalidData | K::InvalidInput | K::Other => "damaged",
        _ => return Failure::io("read", name)(error),
    };
    Failure::usage(format!(
        "{}: its {packing} data is {what} ({error}); fetch or make the file again",
        name.display()
    ))
}

/// The compressions that are read.
#[derive(Clone, Copy, PartialEq)]
enum Packing {
    Gzip,
    Zstd,
}

impl Packing {
    fn of(head: &[u8]) -> Option<Self> {
        match head {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// What a file that is no text holds, and what to do about it; FILE stands for its name.
fn kind_of(head: &[u8]) -> Option<(&'static str, &'static str)> {
    const OTHER: &str = "give its text as a UTF-8 file";
    const KINDS: &[(&[u8], &str, &str)] = &[
        (
            b"version https://git-lfs.github.com/spec/",
            "a Git LFS pointer, which stands for the file itself",
            "fetch that with `git lfs pull`",
        ),
        (
            b"\x1f\x8b",
            "data compressed with gzip",
            "rename it to FILE.gz, or use `gzip -dc FILE | mxtrain prepare -`",
        ),
        (
            b"\x28\xb5\x2f\xfd",
            "data compressed with zstd",
            "rename it to FILE.zst, or use `zstd -dc FILE | mxtrain prepare -`",
        ),
        (b"\xfd7zXZ\0", "data compressed with xz", "use `xz -dc FILE | mxtrain prepare -`"),
        (b"BZh", "data compressed with bzip2", "use `bzip2 -dc FILE | mxtrain prepare -`"),
        (b"\x04\x22\x4d\x18", "data compressed with lz4", "use `lz4 -dc FILE | mxtrain prepare -`"),
        (
            b"PK\x03\x04",
            "a zip archive (or a document of an office program)",
            "unpack it, or use `unzip -p FILE | mxtrain prepare -`",
        ),
        (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it"),
        (
            b"PAR1",
            "a Parquet table",
            "rename it to FILE.parquet, or use --format parquet with the file's name",
        ),
        (b"ARROW1", "an Arrow table", "write its texts as JSON lines or Parquet"),
        (b"%PDF-", "a PDF document", "use `pdftotext FILE - | mxtrain prepare -`"),
        (b"\x88\xd8\x34\x01", "a token file of llm.c", "train on it with `mxtrain train --train`"),
        (
            b"\x93NUMPY",
            "an array of NumPy",
            "train on it with `mxtrain train --train` if it holds tokens",
        ),
        (b"SQLite format 3\0", "an SQLite database", OTHER),
        (b"\x89PNG", "an image", OTHER),
        (b"\xff\xd8\xff", "an image", OTHER),
        (b"GIF8", "an image", OTHER),
        (b"\x7fELF", "a program", OTHER),
        (b"{\\rtf", "a document in RTF", OTHER),
        (b"\xff\xfe\0\0", "UTF-32 text", "use `iconv -f UTF-32 -t UTF-8 FILE`"),
        (b"\0\0\xfe\xff", "UTF-32 text", "use `iconv -f UTF-32 -t UTF-8 FILE`"),
        (b"\xff\xfe", "UTF-16 text", "use `iconv -f UTF-16 -t UTF-8 FILE`"),
        (b"\xfe\xff", "UTF-16 text", "use `iconv -f UTF-16 -t UTF-8 FILE`"),
    ];
    let found = KINDS.iter().find(|(magic, ..)| head.starts_with(magic));
    // Letters may begin a text: bzip2 goes on with a digit and those of pi, tables have NULs.
    let found = found.filter(|(magic, ..)| match *magic {
        b"BZh" => head.get(4..10) == Some(b"\x31\x41\x59\x26\x53\x59"),
        b"PAR1" | b"ARROW1" | b"GIF8" => head.contains(&0),
        _ => true,
    });
    if let Some((_, kind, remedy)) = found {
        return Some((kind, remedy));
    }
    if head.get(257..262) == Some(b"ustar") {
        return Some(("a tar archive", "unpack it with `tar -xf` and give the folder"));
    }
    if !head.contains(&0) {
        return None;
    }
    // Text in UTF-16 of European languages has a NUL as every second byte.
    let zeros = |first: usize| head.iter().skip(first).step_by(2).filter(|&&b| b == 0).count();
    for (first, kind, remedy) in [
        (1, "UTF-16 text", "use `iconv -f UTF-16LE -t UTF-8 FILE`"),
        (0, "UTF-16 text", "use `iconv -f UTF-16BE -t UTF-8 FILE`"),
    ] {
        if zeros(first) * 4 > head.len() && zeros(1 - first) * 100 < head.len() {
            return Some((kind, remedy));
        }
    }
    Some(("binary data (NUL bytes)", OTHER))
}

/// Counts the bytes that go through.
struct Counted<R> {
    inner: R,
    position: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.position.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_text_is_named() {
        let tar = [&[b'a'; 257][..], b"ustar\0"].concat();
        for (head, expected) in [
            (&b"\x1f\x8b\x08\0"[..], "gzip"),
            (b"BZh91AY&SY\0\0", "bzip2"),
            (b"\xff\xfea\0b\0", "UTF-16"),
            (b"a\0b\0c\0d\0", "UTF-16"),
            (b"\0a\0b\0c\0d", "UTF-16"),
            (b"\xff\xfe\0\0a\0\0\0", "UTF-32"),
            (b"text\0more", "binary"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
            (&tar, "tar archive"),
        ] {
            let (kind, _) = kind_of(head).unwrap();
            assert!(kind.contains(expected), "{kind}, not {expected}");
        }
    }

    #[test]
    fn text_is_let_through() {
        for head in [
            &b""[..],
            b"BZh is a name",
            b"PK",
            b"PAR1 is short",
            b"caf\xe9",
            "語".as_bytes(),
            b"{\"a\": 1}",
        ] {
            assert!(kind_of(head).is_none(), "{head:?}");
        }
    }
}
