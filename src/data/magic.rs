//! Files that are no token files, told by how they begin, each with what to do about it.
//!
//! Everything here is checked on raw files, which have no header of their own, so it must never hit
//! sound tokens. Two rules see to that.
//!
//! 1. A magic counts only with as much around it as makes it one in a billion of random u16 tokens
//!    or rarer: five fixed bytes or more, or fewer with a check of the structure behind them. Two
//!    fixed bytes are one token: one in 50,257 of GPT-2's, or a common one.
//! 2. Text is at least 32 bytes without a control byte, or with one in 128 bytes at most. A token
//!    below 2,048, as nearly all of a text's most frequent ones are, has a high byte that is a
//!    control byte; so has every byte-level token. Of random GPT-2 tokens one in four passes, so 16
//!    of them do so once in four billion times, and a real file holds many more. Where tokens do
//!    look like text, the host says what they are with `token_type`, and text is not looked for.

use std::fmt;

use super::look::Look;
use super::megatron;

/// A kind of file, and the remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    name: &'static str,
    remedy: &'static str,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expected a token file, found {}; {}", self.name, self.remedy)
    }
}

/// A way in which a kind of file begins.
struct Magic {
    at: usize,
    bytes: &'static [u8],
    /// What must hold besides.
    also: fn(&Look<'_>) -> bool,
    kind: Kind,
}

const fn magic(
    at: usize,
    bytes: &'static [u8],
    also: fn(&Look<'_>) -> bool,
    name: &'static str,
    remedy: &'static str,
) -> Magic {
    Magic { at, bytes, also, kind: Kind { name, remedy } }
}

const NOT_TOKENS: &str = "name the token files alone";
const NUMPY: &str = "save the tokens with numpy.save, as numpy.uint16 or numpy.uint32";
const COLUMN: &str = "turn a column of text into tokens with `mxtrain prepare`, or save a column of \
                      tokens with numpy.save";
const MODEL: &str = "name files of tokens; a model is loaded from its folder";

/// The first that fits counts.
const MAGICS: &[Magic] = &[
    magic(
        0,
        b"version https://git-lfs.github.com/spec/",
        any,
        "a Git LFS pointer in place of the file",
        "run `git lfs pull`",
    ),
    magic(
        0,
        b"version https://hawser.github.com/spec/",
        any,
        "a Git LFS pointer in place of the file",
        "run `git lfs pull`",
    ),
    magic(0, b"", is_html, "an HTML page (a download that failed?)", "fetch the file again"),
    magic(0, &[0x1f, 0x8b, 8], is_gzip, "data compressed with gzip", "unpack it with `gunzip`"),
    magic(
        0,
        &[0x28, 0xb5, 0x2f, 0xfd],
        is_zstd,
        "data compressed with zstd",
        "unpack it with `zstd -d`",
    ),
    magic(
        0,
        b"",
        is_zstd_behind_skippable,
        "data compressed with zstd",
        "unpack it with `zstd -d`",
    ),
    magic(
        0,
        b"\xff\x06\0\0sNaPpY",
        any,
        "data compressed with Snappy",
        "unpack it with `snzip -d`",
    ),
    magic(0, b"\xfd7zXZ\0", any, "data compressed with xz", "unpack it with `xz -d`"),
    magic(0, b"BZh", is_bzip2, "data compressed with bzip2", "unpack it with `bunzip2`"),
    magic(0, &[4, 0x22, 0x4d, 0x18], is_lz4, "data compressed with lz4", "unpack it with `lz4 -d`"),
    magic(0, b"7z\xbc\xaf\x27\x1c", any, "a 7-Zip archive", "unpack it"),
    magic(0, b"Rar!\x1a\x07", any, "a RAR archive", "unpack it"),
    magic(0, b"PK\x03\x04", is_npz, "NumPy's archive of several arrays (npz)", NUMPY),
    magic(0, b"PK\x03\x04", is_torch_zip, "a file of torch.save", NUMPY),
    magic(0, b"PK\x03\x04", is_zip, "a zip archive", "unpack it"),
    magic(0, b"PK\x05\x06", is_empty_zip, "an empty zip archive", "unpack it"),
    magic(257, b"ustar", any, "a tar archive", "unpack it with `tar -xf`"),
    magic(0, b"PAR1", is_parquet, "a Parquet table", COLUMN),
    magic(0, b"ARROW1\0\0", any, "an Arrow table (Feather)", COLUMN),
    magic(0, b"FEA1", is_feather, "a Feather table", COLUMN),
    magic(0, &[0xff; 4], is_arrow_stream, "an Arrow table (a stream)", COLUMN),
    magic(0, b"ORC", is_orc, "an ORC table", COLUMN),
    magic(0, b"Obj\x01", is_avro, "an Avro table", COLUMN),
    // The pickle of torch.save before 1.6 begins with a number of its own.
    magic(
        0,
        b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19",
        any,
        "a file of torch.save",
        NUMPY,
    ),
    magic(0, &[0x80], is_pickle, "a Python pickle", NUMPY),
    magic(8, b"{", is_safetensors, "tensors in safetensors' format", MODEL),
    magic(0, b"GGUF", is_gguf, "a GGUF model", MODEL),
    // llm.c writes a day's date and counts up from it.
    magic(0, &20240326u32.to_le_bytes(), is_llmc, "a model of llm.c", MODEL),
    magic(0, &20240327u32.to_le_bytes(), is_llmc, "a debugging state of llm.c", NOT_TOKENS),
    magic(0, &20240328u32.to_le_bytes(), is_llmc, "a tokenizer of llm.c", NOT_TOKENS),
    magic(0, &20240522u32.to_le_bytes(), is_llmc, "questions of llm.c (HellaSwag)", NOT_TOKENS),
    magic(0, &20240527u32.to_le_bytes(), is_llmc, "an optimizer's state of llm.c", NOT_TOKENS),
    magic(
        0,
        b"\x89HDF\r\n\x1a\n",
        any,
        "an HDF5 file",
        "read the tokens with h5py and save them with numpy.save, as numpy.uint16 or numpy.uint32",
    ),
    magic(0, &[0x0a], is_sentencepiece, "a SentencePiece tokenizer", NOT_TOKENS),
    magic(
        0,
        megatron::MAGIC,
        any,
        "a Megatron index under another name than *.idx",
        "name the .bin, and keep its .idx beside it",
    ),
    magic(
        0,
        b"TNTIDX\0\0",
        any,
        "an index of an old Megatron",
        "make the pair again with a newer Megatron, or name the .bin with the option token_type",
    ),
    magic(0, b"SQLite format 3\0", any, "an SQLite database", NOT_TOKENS),
    magic(
        0,
        b"%PDF-",
        is_pdf,
        "a PDF document",
        "make text of it, then tokens with `mxtrain prepare`",
    ),
    magic(0, b"\x7fELF", is_elf, "a program or library (ELF)", NOT_TOKENS),
    magic(0, b"\x89PNG\r\n\x1a\n", any, "a PNG image", NOT_TOKENS),
    magic(0, &[0xff, 0xd8, 0xff], is_jpeg, "a JPEG image", NOT_TOKENS),
    magic(0, b"GIF87a", any, "a GIF image", NOT_TOKENS),
    magic(0, b"GIF89a", any, "a GIF image", NOT_TOKENS),
    magic(8, b"WEBP", is_riff, "a WebP image", NOT_TOKENS),
    magic(8, b"WAVE", is_riff, "sound (WAV)", NOT_TOKENS),
    magic(4, b"ftyp", is_iso_media, "a film, a sound or an image (MP4)", NOT_TOKENS),
    magic(0, b"fLaC\0\0\0\x22", any, "sound (FLAC)", NOT_TOKENS),
    magic(0, b"OggS\0\x02", any, "sound (Ogg)", NOT_TOKENS),
    magic(0, b"ID3", is_id3, "sound (MP3)", NOT_TOKENS),
    magic(0, b"\x1a\x45\xdf\xa3", is_matroska, "a film or sound (Matroska)", NOT_TOKENS),
    magic(0, b"BM", is_bmp, "a BMP image", NOT_TOKENS),
    magic(0, b"II*\0", is_tiff, "a TIFF image", NOT_TOKENS),
    magic(
        0,
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        any,
        "a document of an office program",
        "make text of it, then tokens with `mxtrain prepare`",
    ),
    magic(
        0,
        b"MATLAB 5.0 MAT-file",
        any,
        "a file of MATLAB",
        "read the tokens with scipy.io.loadmat and save them with numpy.save, as numpy.uint16 or \
         numpy.uint32",
    ),
    magic(0, b"MZ", is_windows_program, "a program or library (Windows)", NOT_TOKENS),
    magic(0, b"!<arch>\n", any, "an archive (ar)", "unpack it"),
    magic(
        0,
        b"",
        is_tfrecord,
        "TensorFlow's records",
        "read the tokens with TensorFlow and save them with numpy.save, as numpy.uint16 or \
         numpy.uint32",
    ),
    magic(
        0,
        &[0, 0],
        is_idx,
        "an array of MNIST's kind (IDX)",
        "save the tokens with numpy.save, as numpy.uint16 or numpy.uint32",
    ),
    magic(16, b"\xde\xc0\xef\xbe\x01\0\0\0", any, "an LMDB database", NOT_TOKENS),
];

const PREPARE: &str = "turn it into tokens with `mxtrain prepare`; if these are tokens all the same, say \
                       what they are with the option token_type (--token-type of mxtrain)";

/// The kind of a file that begins like no token file, whatever its tokens.
pub(super) fn known(look: &Look<'_>) -> Option<Kind> {
    let fits = |magic: &&Magic| {
        look.head().get(magic.at..).is_some_and(|rest| rest.starts_with(magic.bytes))
            && (magic.also)(look)
    };
    MAGICS.iter().find(fits).map(|magic| magic.kind)
}

/// Bytes that are looked at for text.
const LOOK: usize = 1 << 14;
/// Shorter files are not told from tokens.
const LEAST: usize = 32;
/// Text has at most one control byte in as many bytes.
const BYTES_A_CONTROL: usize = 128;
/// Text in an old encoding of one byte a character needs more to be sure of.
const LEAST_8_BIT: usize = 256;

/// The kind of a file that begins as text.
pub(super) fn text(bytes: &[u8]) -> Option<Kind> {
    let kind = |name| Some(Kind { name, remedy: PREPARE });
    let head = &bytes[..bytes.len().min(LOOK)];
    if is_utf_16(head) {
        return kind("text in UTF-16");
    }
    if is_utf_32(head) {
        return kind("text in UTF-32");
    }
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    // The end of a file of DOS, a page break with its backspace: a few in a long text are no
    // matter.
    let controls = head.iter().filter(|&&b| is_control(b)).count();
    if head.len() < LEAST || controls > head.len() / BYTES_A_CONTROL {
        return None;
    }
    match std::str::from_utf8(head) {
        // A character may be cut in two where we stop looking.
        Err(e) if e.error_len().is_some() || e.valid_up_to() + 4 <= head.len() => {}
        _ => {
            return match head.trim_ascii_start().first() {
                Some(b'{') => kind("text (JSON or JSON lines)"),
                Some(b'[') if is_json_array(head) => kind("text (JSON)"),
                _ => kind("text"),
            };
        }
    }
    let ascii = head.iter().filter(|b| b.is_ascii()).count();
    (head.len() >= LEAST_8_BIT && 8 * ascii >= 7 * head.len())
        .then_some(())
        .and_then(|()| kind("text that is not UTF-8"))
}

/// A byte that text does not hold: blanks, line ends and escapes are none.
fn is_control(b: u8) -> bool {
    (b < 0x20 && !matches!(b, b'\t'..=b'\r' | 0x1b)) || b == 0x7f
}

/// A mark of the byte order, and text behind it.
fn is_utf_16(head: &[u8]) -> bool {
    let little = match head {
        [0xff, 0xfe, ..] => true,
        [0xfe, 0xff, ..] => false,
        _ => return false,
    };
    let (units, _) = head[2..].as_chunks::<2>();
    let units =
        units.iter().map(|&u| if little { u16::from_le_bytes(u) } else { u16::from_be_bytes(u) });
    // Without the last unit, which may be the first half of a pair that is cut.
    let units = units.take((head.len() / 2).saturating_sub(2));
    let (mut count, mut ascii) = (0, 0);
    let is_text = char::decode_utf16(units).all(|c| {
        let c = c.unwrap_or('\0');
        count += 1;
        ascii += usize::from(c.is_ascii());
        !c.is_control() || c.is_whitespace()
    });
    is_text && (count >= LEAST_8_BIT || count >= LEAST / 2 && 2 * ascii >= count)
}

/// A mark of the byte order, and characters behind it.
fn is_utf_32(head: &[u8]) -> bool {
    let little = match head {
        [0xff, 0xfe, 0, 0, ..] => true,
        [0, 0, 0xfe, 0xff, ..] => false,
        _ => return false,
    };
    let (units, _) = head[4..].as_chunks::<4>();
    let is_text = |&u: &[u8; 4]| {
        let code = if little { u32::from_le_bytes(u) } else { u32::from_be_bytes(u) };
        char::from_u32(code).is_some_and(|c| !c.is_control() || c.is_whitespace())
    };
    units.len() >= LEAST / 2 && units.iter().all(is_text)
}

/// Prose may begin with a bracket too.
fn is_json_array(head: &[u8]) -> bool {
    let inside = head.trim_ascii_start()[1..].trim_ascii_start();
    matches!(inside.first(), Some(b'{' | b'[' | b'"' | b'0'..=b'9' | b']'))
}

fn any(_: &Look<'_>) -> bool {
    true
}

fn byte(b: &Look<'_>, at: usize) -> Option<u8> {
    b.at(at).map(u8::from_le_bytes)
}

fn u16_at(b: &Look<'_>, at: usize) -> Option<u16> {
    b.at(at).map(u16::from_le_bytes)
}

fn u32_at(b: &Look<'_>, at: usize) -> Option<u32> {
    b.at(at).map(u32::from_le_bytes)
}

fn u64_at(b: &Look<'_>, at: usize) -> Option<u64> {
    b.at(at).map(u64::from_le_bytes)
}

fn is_html(b: &Look<'_>) -> bool {
    let b = b.head();
    let start = b[..b.len().min(256)].trim_ascii_start();
    [&b"<!doctype html"[..], b"<html>", b"<html ", b"<head>"]
        .iter()
        .any(|tag| start.get(..tag.len()).is_some_and(|s| s.eq_ignore_ascii_case(tag)))
}

/// No reserved flag, a known level and a known system.
fn is_gzip(b: &Look<'_>) -> bool {
    byte(b, 3).is_some_and(|flags| flags < 0x20)
        && matches!(byte(b, 8), Some(0 | 2 | 4))
        && matches!(byte(b, 9), Some(0..=13 | 255))
}

/// The reserved bit of the frame's descriptor.
fn is_zstd(b: &Look<'_>) -> bool {
    byte(b, 4).is_some_and(|descriptor| descriptor & 8 == 0) && b.len() >= 9
}

/// Frames that are skipped, as parallel programs write them, and an ordinary one.
fn is_zstd_behind_skippable(b: &Look<'_>) -> bool {
    let length = match b.head() {
        [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => u32_at(b, 4).map(|n| n as usize),
        _ => None,
    };
    length.and_then(|length| b.at(8 + length)) == Some([0x28, 0xb5, 0x2f, 0xfd])
}

/// A level, and the first six digits of pi or, for an empty file, of its root.
fn is_bzip2(b: &Look<'_>) -> bool {
    matches!(byte(b, 3), Some(b'1'..=b'9'))
        && [&b"\x31\x41\x59\x26\x53\x59"[..], b"\x17\x72\x45\x38\x50\x90"]
            .iter()
            .any(|digits| b.head()[4..].starts_with(digits))
}

/// Version 1 without the reserved bit, and a block size.
fn is_lz4(b: &Look<'_>) -> bool {
    byte(b, 4).is_some_and(|flags| flags & 0xc2 == 0x40)
        && byte(b, 5).is_some_and(|block| block & 0x8f == 0 && block >= 0x40)
}

/// The name of a zip archive's first file.
fn zip_name<'a>(b: &Look<'a>) -> Option<&'a [u8]> {
    let (version, method) = (u16_at(b, 4)?, u16_at(b, 8)?);
    let length = u16_at(b, 26)? as usize;
    let name = b.head().get(30..30 + length)?;
    let is_sound = version <= 63
        && matches!(method, 0 | 8 | 9 | 12 | 14 | 93 | 95)
        && (1..=1024).contains(&length)
        && !name.iter().any(|&c| is_control(c));
    is_sound.then_some(name)
}

fn is_zip(b: &Look<'_>) -> bool {
    zip_name(b).is_some()
}

fn is_npz(b: &Look<'_>) -> bool {
    zip_name(b).is_some_and(|name| name.ends_with(b".npy"))
}

fn is_torch_zip(b: &Look<'_>) -> bool {
    zip_name(b)
        .is_some_and(|name| name.ends_with(b"/data.pkl") || name.ends_with(b"/.format_version"))
}

fn is_empty_zip(b: &Look<'_>) -> bool {
    b.len() >= 22 && b.head()[4..20].iter().all(|&c| c == 0)
}

/// The same at the end, or in a truncated file the header of a page.
fn is_parquet(b: &Look<'_>) -> bool {
    let is_page = matches!(b.head(), [_, _, _, _, 0x15, 0 | 2 | 4 | 6, 0x15, ..]);
    b.len() >= 12 && (is_page || b.ends_with(b"PAR1"))
}

fn is_feather(b: &Look<'_>) -> bool {
    b.len() >= 12 && b.ends_with(b"FEA1")
}

/// Metadata of a plausible length, whose first word points near.
fn is_arrow_stream(b: &Look<'_>) -> bool {
    let length = u32_at(b, 4).unwrap_or(0);
    (8..1 << 24).contains(&length)
        && length.is_multiple_of(8)
        && u32_at(b, 8).is_some_and(|root| (4..=64).contains(&root) && root.is_multiple_of(4))
}

fn is_orc(b: &Look<'_>) -> bool {
    b.len() >= 8 && b.at(b.len() - 4) == Some(*b"ORC")
}

/// A map of metadata, which names the schema.
fn is_avro(b: &Look<'_>) -> bool {
    let b = b.head();
    b[..b.len().min(4096)]
        .windows(11)
        .any(|word| word == b"avro.schema" || word.starts_with(b"avro.codec"))
}

/// Protocols from 2 on: a frame of a length below a TiB, or up to the file's last opcode a list, a
/// dictionary, bytes or a global name, as what people save begin.
fn is_pickle(b: &Look<'_>) -> bool {
    let is_whole = b.ends_with(b".");
    match b.head() {
        // Also of a file that is truncated.
        [_, 4 | 5, 0x95, _, _, _, _, _, 0, 0, 0, ..] => true,
        [_, 2 | 3, b']' | b'}', b'q', 0, ..] => is_whole,
        [_, 3, b'B', ..] => {
            is_whole && u32_at(b, 3).is_some_and(|n| u64::from(n) + 10 == b.len() as u64)
        }
        [_, 2 | 3, b'c', name @ ..] => {
            let length =
                name.iter().take_while(|c| c.is_ascii_alphanumeric() || b"._".contains(c)).count();
            is_whole && length >= 4 && name.get(length) == Some(&b'\n')
        }
        _ => false,
    }
}

/// A header of JSON with the length that the first word says.
fn is_safetensors(b: &Look<'_>) -> bool {
    let room = b.len() as u64 - 8;
    let Some(length) = u64_at(b, 0).filter(|&n| n >= 2 && n <= room) else { return false };
    if !matches!(byte(b, 9), Some(b'"' | b'}')) {
        return false;
    }
    // Blanks at the end are padding: a few, where it is safetensors.
    let end = 8 + length as usize;
    let mut last = (8..end).rev().take(4096).map_while(|at| byte(b, at));
    last.find(|c| !c.is_ascii_whitespace()) == Some(b'}')
}

fn is_gguf(b: &Look<'_>) -> bool {
    u32_at(b, 4).is_some_and(|version| (1..=99).contains(&version))
}

fn is_llmc(b: &Look<'_>) -> bool {
    u32_at(b, 4).is_some_and(|version| (1..=99).contains(&version)) && b.len() >= 1024
}

/// The first piece: a name in angle brackets, and its score.
fn is_sentencepiece(b: &Look<'_>) -> bool {
    let [_, _, 0x0a, length, name @ ..] = b.head() else { return false };
    let length = usize::from(*length);
    let Some((name, rest)) = name.split_at_checked(length) else { return false };
    length >= 3 && name.starts_with(b"<") && name.ends_with(b">") && rest.first() == Some(&0x15)
}

fn is_pdf(b: &Look<'_>) -> bool {
    matches!((byte(b, 5), byte(b, 6)), (Some(b'0'..=b'9'), Some(b'.')))
}

/// 32 or 64 bits, a byte order, version 1.
fn is_elf(b: &Look<'_>) -> bool {
    matches!((byte(b, 4), byte(b, 5), byte(b, 6)), (Some(1 | 2), Some(1 | 2), Some(1)))
}

fn is_jpeg(b: &Look<'_>) -> bool {
    matches!(byte(b, 3), Some(0xdb | 0xe0..=0xef))
        && (b.at(6).is_some_and(|name| [b"JFIF", b"Exif"].contains(&&name))
            || b.ends_with(&[0xff, 0xd9]))
}

fn is_riff(b: &Look<'_>) -> bool {
    b.head().starts_with(b"RIFF")
}

fn is_iso_media(b: &Look<'_>) -> bool {
    let is_brand = |brand: [u8; 4]| brand.iter().all(|&c| c == b' ' || c.is_ascii_graphic());
    b.at(0) == Some([0, 0, 0]) && b.at(8).is_some_and(is_brand)
}

/// A known version without the reserved flags, and a length of 7 bits a byte.
fn is_id3(b: &Look<'_>) -> bool {
    let b = b.head();
    matches!(b, [_, _, _, 2..=4, 0, flags, sizes @ ..]
        if flags & 0x0f == 0 && sizes.len() > 4 && sizes[..4].iter().all(|&n| n < 0x80))
        && b[10..].iter().take(4).all(|&c| c == 0 || c.is_ascii_alphanumeric())
}

/// The name of the kind follows within the header.
fn is_matroska(b: &Look<'_>) -> bool {
    let b = b.head();
    b[..b.len().min(64)].windows(4).any(|word| word == b"matr" || word == b"webm")
}

/// The file's length, two reserved words and the length of a known header.
fn is_bmp(b: &Look<'_>) -> bool {
    u32_at(b, 2) == u32::try_from(b.len()).ok()
        && u32_at(b, 6) == Some(0)
        && matches!(u32_at(b, 14), Some(12 | 40 | 108 | 124))
}

/// The first directory: tags in their order, of known types.
fn is_tiff(b: &Look<'_>) -> bool {
    let at = u32_at(b, 4).unwrap_or(0) as usize;
    let Some(count) = u16_at(b, at).filter(|&n| at >= 8 && n >= 4) else { return false };
    (0..usize::from(count)).all(|i| {
        let entry = at + 2 + 12 * i;
        u16_at(b, entry + 2).is_some_and(|kind| (1..=13).contains(&kind))
    })
}

/// The place of the new header, and its magic.
fn is_windows_program(b: &Look<'_>) -> bool {
    let at = u32_at(b, 0x3c).unwrap_or(0) as usize;
    at >= 0x40 && b.at(at) == Some(*b"PE\0\0")
}

/// The length of the first record, and the checksum of this length.
fn is_tfrecord(b: &Look<'_>) -> bool {
    let (Some(length), Some(sum)) = (u64_at(b, 0), u32_at(b, 8)) else { return false };
    // CRC-32C, rotated and moved, as the format wants it.
    let mut crc = u32::MAX;
    for byte in length.to_le_bytes() {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    length < 1 << 40 && (!crc).rotate_right(15).wrapping_add(0xa282_ead8) == sum
}

/// A type, dimensions, and the length that they give.
fn is_idx(b: &Look<'_>) -> bool {
    let [_, _, kind, dimensions @ 1..=8, ..] = *b.head() else { return false };
    let width = match kind {
        0x08 | 0x09 => 1,
        0x0b => 2,
        0x0c | 0x0d => 4,
        0x0e => 8,
        _ => return false,
    };
    let header = 4 + 4 * usize::from(dimensions);
    let Some(sizes) = b.head().get(4..header) else { return false };
    let numbers = sizes.as_chunks().0.iter().map(|&size| u64::from(u32::from_be_bytes(size)));
    let bytes = numbers.fold(width, u64::saturating_mul);
    bytes.saturating_add(header as u64) == b.len() as u64
}
