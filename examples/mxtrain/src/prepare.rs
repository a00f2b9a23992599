//! `mxtrain prepare`: UTF-8 text files to token files.
//!
//! Inputs are read in chunks, so memory stays constant however large they are. Byte-pair encoding
//! cuts chunks where it makes no difference (`tokenizer::cut_point`) and encodes several at a time.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};

use crate::cli::PrepareArgs;
use crate::console;
use crate::failure::{Failure, Outcome};
use crate::prepared::{Meta, Source, TRAIN_FILE, VAL_FILE};
use crate::tokenizer::{Tokenizer, cut_point};
use crate::tokens_file::TokensFile;

/// Bytes of text that one thread encodes at a time.
const CHUNK: usize = 1 << 20;
/// A chunk grows to this size in search of a place to cut. Text without a space or a line break in
/// 4 MiB is cut between two characters, which costs a token or so.
const MAX_CHUNK: usize = 4 << 20;
/// How far behind the wanted place the split into training and validation text looks for a line end.
const SPLIT_SEARCH: u64 = 64 << 10;

/// Runs the command.
pub(crate) fn run(args: &PrepareArgs) -> Outcome<ExitCode> {
    let last = args.inputs.len() - 1;
    let sources = (args.inputs.iter().enumerate())
        .map(|(i, path)| match args.val_last {
            true if last == 0 => Err(Failure::usage(
                "--val-last: expected two or more inputs, the last for validation; got one",
            )),
            true => split(path, if i == last { 1.0 } else { 0.0 }),
            false => split(path, args.val_fraction),
        })
        .collect::<Outcome<Vec<Source>>>()?;
    let bytes: u64 = sources.iter().map(|s| s.train_bytes + s.val_bytes).sum();
    if sources.iter().all(|s| s.train_bytes == 0) {
        return Err(Failure::usage(
            "the inputs hold no training text; give more text or a smaller --val-fraction",
        ));
    }

    fs::create_dir_all(&args.out).map_err(Failure::io("create", &args.out))?;
    let bar = ProgressBar::new(bytes).with_style(
        ProgressStyle::with_template(
            "{wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
        )
        .expect("the template is valid"),
    );
    let writer = |name| TokensFile::create(args.out.join(name));
    let mut writers = [writer(TRAIN_FILE)?, writer(VAL_FILE)?];
    for source in &sources {
        let end = source.train_bytes + source.val_bytes;
        for (range, out) in
            [0..source.train_bytes, source.train_bytes..end].iter().zip(&mut writers)
        {
            if range.is_empty() {
                continue;
            }
            if out.tokens() > 0 {
                out.push(args.tokenizer.separator())?;
            }
            let chunks = Chunks::open(&source.path, range.clone(), args.tokenizer)?;
            encode(chunks, args.tokenizer, out, &bar)?;
        }
    }
    bar.finish_and_clear();

    let mut meta = Meta::new(args.tokenizer, sources);
    let [train, val] = writers;
    meta.train_tokens = train.finish()?;
    if val.tokens() > 0 {
        meta.val_tokens = val.finish()?;
    } else {
        // An older run's validation text does not belong to this data.
        remove_if_there(&args.out.join(VAL_FILE))?;
    }
    meta.write(&args.out)?;

    console::print(&format!(
        "{}: {} of text in {} files, tokenizer {}, vocabulary {}\n  {TRAIN_FILE}: {} tokens\n  \
         {VAL_FILE}: {} tokens\n",
        args.out.display(),
        HumanBytes(bytes),
        meta.sources.len(),
        meta.tokenizer,
        HumanCount(meta.vocab_size as u64),
        HumanCount(meta.train_tokens),
        HumanCount(meta.val_tokens),
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// Decides which bytes of a file are for validation: its last `fraction`, from the beginning of a
/// line where one is near, else from the beginning of a character.
fn split(path: &Path, fraction: f64) -> Outcome<Source> {
    let open = |path| -> io::Result<(File, u64)> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok((file, metadata.len()))
    };
    let (mut file, length) = open(path).map_err(Failure::io("read", path))?;
    let source = |cut| Source { path: path.to_owned(), train_bytes: cut, val_bytes: length - cut };
    let wanted = (length as f64 * (1.0 - fraction)).round() as u64;
    if wanted == 0 || wanted >= length {
        return Ok(source(wanted.min(length)));
    }
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(wanted - 1))
        .and_then(|_| file.take(SPLIT_SEARCH).read_to_end(&mut tail))
        .map_err(Failure::io("read", path))?;
    // `tail` begins one byte early: a line may begin exactly at `wanted`.
    let line = tail.iter().position(|&b| b == b'\n').map(|i| wanted + i as u64);
    let is_inside = |cut: &u64| *cut < length;
    let character = || {
        let continues = tail[1..].iter().take_while(|&&b| b & 0xc0 == 0x80).count();
        wanted + continues as u64
    };
    Ok(source(line.filter(is_inside).unwrap_or_else(character)))
}

/// Encodes all chunks, as many at a time as there are threads, and writes them in their order.
fn encode(
    mut chunks: Chunks,
    tokenizer: Tokenizer,
    out: &mut TokensFile,
    bar: &ProgressBar,
) -> Outcome {
    let threads = match tokenizer {
        Tokenizer::Bytes => 1, // nothing to compute
        Tokenizer::Gpt2 => thread::available_parallelism().map_or(1, |n| n.get().min(8)),
    };
    loop {
        let mut batch = Vec::new();
        while batch.len() < threads
            && let Some(text) = chunks.next()?
        {
            batch.push(text);
        }
        if batch.is_empty() {
            return Ok(());
        }
        let encoded: Vec<Vec<u16>> = match (tokenizer, batch.as_slice()) {
            (Tokenizer::Bytes, [text]) => {
                vec![text.iter().map(|&b| u16::from(b)).collect()]
            }
            _ => thread::scope(|scope| {
                let work: Vec<_> = (batch.iter())
                    .map(|text| {
                        // `Chunks` gives valid UTF-8 to byte-pair encoding.
                        scope.spawn(|| tokenizer.encode(&String::from_utf8_lossy(text)))
                    })
                    .collect();
                work.into_iter().map(|w| w.join()).collect::<Result<_, _>>()
            })
            .map_err(|_| Failure::runtime("the byte-pair encoder panicked"))?,
        };
        for (text, tokens) in batch.iter().zip(encoded) {
            out.push(tokens)?;
            bar.inc(text.len() as u64);
        }
    }
}

/// Reads a part of a file in chunks. For byte-pair encoding each is valid UTF-8 and ends where
/// encoding may be cut.
struct Chunks {
    path: PathBuf,
    file: io::Take<File>,
    tokenizer: Tokenizer,
    /// Read, not yet given out.
    pending: Vec<u8>,
    /// Place of `pending` in the file.
    offset: u64,
    chunk: usize,
}

impl Chunks {
    fn open(path: &Path, range: Range<u64>, tokenizer: Tokenizer) -> Outcome<Self> {
        let mut file = File::open(path).map_err(Failure::io("open", path))?;
        file.seek(SeekFrom::Start(range.start)).map_err(Failure::io("read", path))?;
        Ok(Self {
            path: path.to_owned(),
            file: file.take(range.end - range.start),
            tokenizer,
            pending: Vec::new(),
            offset: range.start,
            chunk: CHUNK,
        })
    }

    /// The next chunk; `None` at the end.
    fn next(&mut self) -> Outcome<Option<Vec<u8>>> {
        let mut target = self.chunk;
        loop {
            let missing = target.saturating_sub(self.pending.len()) as u64;
            let read = (&mut self.file)
                .take(missing)
                .read_to_end(&mut self.pending)
                .map_err(Failure::io("read", &self.path))?;
            let at_end = (read as u64) < missing;
            if at_end && self.file.limit() > 0 {
                return Err(Failure::runtime(format!(
                    "{} became shorter while it was read",
                    self.path.display()
                )));
            }
            if self.pending.is_empty() {
                return Ok(None);
            }
            let Some(cut) = self.cut(at_end, target)? else {
                target += self.chunk;
                continue;
            };
            let rest = self.pending.split_off(cut);
            self.offset += cut as u64;
            return Ok(Some(std::mem::replace(&mut self.pending, rest)));
        }
    }

    /// Where the pending bytes may be cut; `None` asks for more of them.
    fn cut(&self, at_end: bool, target: usize) -> Outcome<Option<usize>> {
        if self.tokenizer == Tokenizer::Bytes {
            return Ok(Some(self.pending.len()));
        }
        let valid = match std::str::from_utf8(&self.pending) {
            Ok(text) => text,
            // A character that the chunk's end cuts is not an error yet.
            Err(e) if e.error_len().is_none() && !at_end => {
                std::str::from_utf8(&self.pending[..e.valid_up_to()])
                    .expect("the bytes up to the error are valid")
            }
            Err(e) => {
                let place = self.offset + e.valid_up_to() as u64;
                return Err(Failure::usage(format!(
                    "{}: expected UTF-8 text, found byte 0x{:02x} at offset {place}; convert the \
                     file, or use --tokenizer bytes",
                    self.path.display(),
                    self.pending[e.valid_up_to()],
                )));
            }
        };
        Ok(match cut_point(valid) {
            _ if at_end => Some(valid.len()),
            Some(cut) => Some(cut),
            None if target >= MAX_CHUNK => Some(valid.len()),
            None => None,
        })
    }
}

fn remove_if_there(path: &Path) -> Outcome {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Failure::io("remove", path)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(contents: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), contents).unwrap();
        file
    }

    fn cut(contents: &str, fraction: f64) -> u64 {
        split(file(contents).path(), fraction).unwrap().train_bytes
    }

    #[test]
    fn validation_text_begins_with_a_line_or_else_a_character() {
        assert_eq!(cut("one\ntwo\nsix\nten\n", 0.5), 8); // a line begins exactly there
        assert_eq!(cut("one\ntwo\nsix\nten\n", 0.45), 12);
        assert_eq!(cut("one two six ten\n", 0.25), 12); // the only line end is the file's
        assert_eq!(cut("ééé", 0.5), 4); // byte 3 is inside the second character
        assert_eq!(cut("one\n", 0.0), 4);
        assert_eq!(cut("one\n", 1.0), 0);
        assert_eq!(cut("", 0.1), 0);
    }

    #[test]
    fn chunks_of_any_size_encode_like_the_whole_file() {
        let text = "KING:\n  “Well, we'll see 1234 naïve things…” \n\n語 語語 🦀\t tabs\r\nend  "
            .repeat(3);
        let whole = Tokenizer::Gpt2.encode(&text);
        let input = file(&text);
        for chunk in (1..40).chain([200, 1000]) {
            let range = 0..text.len() as u64;
            let mut chunks = Chunks::open(input.path(), range, Tokenizer::Gpt2).unwrap();
            chunks.chunk = chunk;
            let mut tokens = Vec::new();
            while let Some(part) = chunks.next().unwrap() {
                tokens.extend(Tokenizer::Gpt2.encode(str::from_utf8(&part).unwrap()));
            }
            assert_eq!(tokens, whole, "chunks of {chunk} bytes");
        }
    }

    #[test]
    fn what_is_not_utf8_is_named_with_its_place() {
        let input = tempfile::NamedTempFile::new().unwrap();
        fs::write(input.path(), b"good text \xff bad").unwrap();
        let mut chunks = Chunks::open(input.path(), 0..15, Tokenizer::Gpt2).unwrap();
        let failure = chunks.next().unwrap_err();
        assert_eq!(failure.code, 2);
        assert!(failure.message.contains("byte 0xff at offset 10"), "{}", failure.message);
    }
}
