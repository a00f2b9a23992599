//! Threads that turn inputs into tokens, in the order of the inputs.
//!
//! One thread reads, some encode, and the caller's takes the results. What is on its way is bounded
//! in bytes, so memory stays constant however fast one of them is.

use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use super::content::Content;
use super::inputs::{Format, Input};
use super::json::{RowReader, Rows};
use super::parquet::{self, Texts};
use super::text::{TextReader, longest_chunk};
use crate::failure::{Failure, Outcome};
use crate::tokenizer::Tokenizer;

/// Bytes of text that a thread encodes at a time.
pub(super) const CHUNK: usize = 1 << 20;
/// Bytes on their way for each thread.
const AHEAD: usize = 4 * CHUNK;

/// How text becomes tokens.
#[derive(Clone, Debug)]
pub(super) struct Options {
    pub(super) tokenizer: Tokenizer,
    /// Whether the mark (`<|endoftext|>`) in a text stands between documents and is one token.
    pub(super) special: bool,
    /// The field or column with the documents.
    pub(super) text_field: String,
    pub(super) threads: usize,
    /// Bytes of a chunk.
    pub(super) chunk: usize,
}

/// Tokens of a piece of the inputs.
#[derive(Debug, Default)]
pub(super) struct Encoded {
    pub(super) tokens: Vec<u32>,
    /// What the tokens are, in their order.
    pub(super) parts: Vec<Part>,
    /// Rows without a text, or with nothing but whitespace.
    pub(super) empty: u64,
    /// Bytes of input that are done with it, as they lie in the files.
    pub(super) input: u64,
}

/// Tokens of a document, or of a part of one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Part {
    /// Place of the command line's argument that it comes from.
    pub(super) source: usize,
    pub(super) tokens: usize,
    /// Bytes of text, a mark at the end included.
    pub(super) bytes: u64,
    /// Nothing but ASCII whitespace, apart from the mark.
    pub(super) blank: bool,
    /// A text (a file, or a row) begins with it.
    pub(super) begins: bool,
    /// A mark between documents ends it.
    pub(super) mark: bool,
    /// The text ends with it.
    pub(super) ends: bool,
    /// Bytes of the text that it belongs to, as far as they are known.
    pub(super) text: Option<u64>,
}

/// Encodes all inputs and gives the results in order to `take`.
pub(super) fn encode(
    inputs: Vec<Input>,
    options: &Options,
    mut take: impl FnMut(Encoded) -> Outcome,
) -> Outcome {
    let (work, receiver) = mpsc::channel::<(Job, Sender<Outcome<Encoded>>)>();
    let (ordered, results) = mpsc::channel();
    let receiver = Arc::new(Mutex::new(receiver));
    for _ in 0..options.threads {
        let (receiver, options) = (Arc::clone(&receiver), options.clone());
        thread::spawn(move || {
            loop {
                let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok((job, result)) = next else { return };
                // Nobody takes it any more if another piece has failed.
                let _ = result.send(job.encode(&options));
            }
        });
    }
    let room = Arc::new(Room::new(options.threads * AHEAD));
    let mut reader = Reader {
        options: options.clone(),
        work,
        ordered,
        room: Arc::clone(&room),
        job: Job::default(),
        stopped: false,
    };
    // Not joined: a failure must not wait for a pipe that nobody writes to.
    thread::spawn(move || {
        let outcome = reader.read(inputs);
        reader.finish(outcome);
    });
    let take_all = || {
        for (bytes, result) in results {
            let encoded: Result<Outcome<Encoded>, _> = Receiver::recv(&result);
            take(encoded.map_err(|_| Failure::runtime("an encoding thread panicked"))??)?;
            room.give_back(bytes);
        }
        Ok(())
    };
    let outcome = take_all();
    room.close();
    outcome
}

/// Some text for a thread to encode.
#[derive(Default)]
struct Job {
    pieces: Vec<Piece>,
    bytes: usize,
    input: u64,
}

struct Piece {
    source: usize,
    name: Arc<PathBuf>,
    contents: Contents,
}

enum Contents {
    /// A part of a text; valid UTF-8 for byte-pair encoding.
    Text {
        bytes: Vec<u8>,
        begins: bool,
        ends: bool,
        /// Whether its first document began before it.
        continues: bool,
        text: Option<u64>,
    },
    Rows(Rows),
    Texts(Texts),
}

/// The reading thread.
struct Reader {
    options: Options,
    work: Sender<(Job, Sender<Outcome<Encoded>>)>,
    ordered: Sender<(usize, Receiver<Outcome<Encoded>>)>,
    room: Arc<Room>,
    job: Job,
    /// Nobody takes results any more.
    stopped: bool,
}

impl Reader {
    fn read(&mut self, inputs: Vec<Input>) -> Outcome {
        for input in inputs {
            if self.stopped {
                return Ok(());
            }
            if input.length.is_none() {
                self.send(); // what came before does not wait for a pipe
            }
            let name = Arc::new(input.name());
            let (source, chunk) = (input.source, self.options.chunk);
            let mut position = 0;
            if let (Some(Format::Parquet), Some(path)) = (input.format, &input.path) {
                let length = input.length.unwrap_or(0) as f64;
                let field = self.options.text_field.clone();
                parquet::read(path, &field, chunk, |texts, done| {
                    let bytes = texts.iter().flatten().map(String::len).sum();
                    let contents = Contents::Texts(texts);
                    let now = (length * done) as u64;
                    self.push(source, &name, contents, bytes, now - position);
                    position = now;
                    // An error is only a way out of the loop; `stopped` has the reason.
                    if self.stopped { Err(Failure::runtime("stopped")) } else { Ok(()) }
                })?;
                continue;
            }
            let content = Content::open(&input, &self.options.text_field)?;
            if content.format == Format::Json {
                let mut reader = RowReader::new(content, chunk);
                while !self.stopped
                    && let Some(rows) = reader.next()?
                {
                    let (bytes, read) = (rows.len(), reader.position() - position);
                    position += read;
                    self.push(source, &name, Contents::Rows(rows), bytes, read);
                }
                continue;
            }
            let text = content.expected;
            let (tokenizer, mark) = (&self.options.tokenizer, self.options.tokenizer.mark());
            // (Of our tokenizers it decides about no token whether the mark is one.)
            let is_mark = self.options.special || tokenizer.file().is_none();
            let mark = mark.filter(|_| is_mark).map(str::to_owned);
            let mut reader = TextReader::new(content, tokenizer.clone(), mark.clone(), chunk);
            let (mut begins, mut continues) = (true, false);
            while !self.stopped
                && let Some((bytes, ends)) = reader.next()?
            {
                let (length, read) = (bytes.len(), reader.position() - position);
                position += read;
                let is_whole = mark.as_ref().is_some_and(|mark| bytes.ends_with(mark.as_bytes()));
                let contents = Contents::Text { bytes, begins, ends, continues, text };
                self.push(source, &name, contents, length, read);
                (begins, continues) = (false, !is_whole);
            }
        }
        self.send();
        Ok(())
    }

    /// Adds a piece to the job, and sends the job if it is large enough.
    fn push(
        &mut self,
        source: usize,
        name: &Arc<PathBuf>,
        contents: Contents,
        bytes: usize,
        input: u64,
    ) {
        if self.job.bytes > 0 && self.job.bytes + bytes > self.options.chunk {
            self.send();
        }
        self.job.pieces.push(Piece { source, name: Arc::clone(name), contents });
        // A piece takes some memory even if it is empty.
        self.job.bytes += bytes + 64;
        self.job.input += input;
    }

    fn send(&mut self) {
        let job = std::mem::take(&mut self.job);
        if job.pieces.is_empty() {
            return;
        }
        let bytes = job.bytes;
        let (sender, result) = mpsc::channel();
        self.stopped |= !self.room.take(bytes)
            || self.ordered.send((bytes, result)).is_err()
            || self.work.send((job, sender)).is_err();
    }

    /// Reports a failure behind everything that was read before it.
    fn finish(&mut self, outcome: Outcome) {
        if let Err(failure) = outcome
            && !self.stopped
        {
            self.send();
            let (sender, result) = mpsc::channel();
            let _ = sender.send(Err(failure));
            let _ = self.ordered.send((0, result));
        }
    }
}

/// Bounds the bytes that are on their way.
struct Room {
    limit: usize,
    taken: Mutex<Taken>,
    changed: Condvar,
}

#[derive(Default)]
struct Taken {
    bytes: usize,
    closed: bool,
}

impl Room {
    fn new(limit: usize) -> Self {
        Self { limit, taken: Mutex::default(), changed: Condvar::new() }
    }

    /// Waits for room; one piece has it always. False if nobody needs the bytes any more.
    fn take(&self, bytes: usize) -> bool {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = |t: &mut Taken| !t.closed && t.bytes > 0 && t.bytes + bytes > self.limit;
        let waited = self.changed.wait_while(taken, is_full);
        let mut taken = waited.unwrap_or_else(PoisonError::into_inner);
        taken.bytes += bytes;
        !taken.closed
    }

    fn give_back(&self, bytes: usize) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).bytes -= bytes;
        self.changed.notify_all();
    }

    fn close(&self) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.changed.notify_all();
    }
}

impl Job {
    fn encode(self, options: &Options) -> Outcome<Encoded> {
        let mut out = Encoded { input: self.input, ..Encoded::default() };
        // A token of GPT-2's takes four bytes of text or so.
        let expected = match options.tokenizer {
            Tokenizer::Bytes => self.bytes,
            _ => self.bytes / 3,
        };
        out.tokens.reserve(expected);
        for piece in self.pieces {
            let part = Part { source: piece.source, ..Part::default() };
            let whole = Part { begins: true, ends: true, ..part };
            match piece.contents {
                Contents::Text { bytes, begins, ends, continues, text } => {
                    let part = Part { begins, ends, text, ..part };
                    options.encode(&bytes, part, continues, &mut out)?;
                }
                Contents::Rows(rows) => {
                    rows.each(&piece.name, &options.text_field, |text| {
                        options.encode_row(text, whole, &mut out)
                    })?;
                }
                Contents::Texts(texts) => {
                    for text in &texts {
                        options.encode_row(text.as_deref(), whole, &mut out)?;
                    }
                }
            }
        }
        Ok(out)
    }
}

impl Options {
    fn encode_row(&self, text: Option<&str>, part: Part, out: &mut Encoded) -> Outcome {
        match text.filter(|text| !text.trim_ascii().is_empty()) {
            Some(text) => {
                let part = Part { text: Some(text.len() as u64), ..part };
                self.encode(text.as_bytes(), part, false, out)
            }
            None => {
                out.empty += 1;
                Ok(())
            }
        }
    }

    /// Encodes a text or a part of it, as `part` says, from one mark to the next. Its first
    /// document may continue what came before.
    fn encode(&self, text: &[u8], part: Part, mut continues: bool, out: &mut Encoded) -> Outcome {
        let mark = self.tokenizer.mark().filter(|_| self.special).map(str::as_bytes);
        let mut rest = text;
        let mut begins = part.begins;
        loop {
            let found = mark.and_then(|mark| memchr::memmem::find(rest, mark));
            let length = found.unwrap_or(rest.len());
            let first = out.tokens.len();
            let blank = rest[..length].iter().all(u8::is_ascii_whitespace);
            if !continues && !blank {
                out.tokens.extend(self.tokenizer.begin());
            }
            self.encode_plain(&rest[..length], continues, &mut out.tokens)?;
            let mut used = length;
            if let (Some(at), Some(mark)) = (found, mark) {
                match self.tokenizer.separator() {
                    None => out.tokens.extend(mark.iter().map(|&b| u32::from(b))),
                    Some(separator) => out.tokens.push(separator),
                }
                used = at + mark.len();
            }
            let ends = part.ends && used == rest.len();
            // Behind a mark at the end there is nothing more to tell.
            if used > 0 || begins || ends {
                out.parts.push(Part {
                    tokens: out.tokens.len() - first,
                    bytes: used as u64,
                    blank,
                    begins,
                    mark: found.is_some(),
                    ends,
                    ..part
                });
            }
            rest = &rest[used..];
            (begins, continues) = (false, false);
            if rest.is_empty() {
                return Ok(());
            }
        }
    }

    /// Encodes text without marks, which may continue a document.
    fn encode_plain(&self, text: &[u8], mut continues: bool, tokens: &mut Vec<u32>) -> Outcome {
        if self.tokenizer == Tokenizer::Bytes {
            tokens.extend(text.iter().map(|&b| u32::from(b)));
            return Ok(());
        }
        let mut rest = str::from_utf8(text).expect("byte-pair encoding gets valid UTF-8");
        let mut encode = |text: &str, continues| {
            tokens.extend(match continues {
                false => self.tokenizer.encode(text)?,
                true => self.tokenizer.encode_behind(text)?,
            });
            Ok(())
        };
        // Long rows are cut as long texts are.
        let longest = longest_chunk(&self.tokenizer);
        while rest.len() > longest {
            let head = &rest[..rest.floor_char_boundary(longest)];
            let cut = self.tokenizer.cut_point(head).filter(|&cut| cut > 0);
            let cut = cut.or_else(|| self.tokenizer.forced_cut(head)).unwrap_or(head.len());
            encode(&rest[..cut], continues)?;
            rest = &rest[cut..];
            continues = true;
        }
        encode(rest, continues)
    }
}
