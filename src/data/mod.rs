//! Memory-mapped token datasets and the order in which training reads them.
//!
//! A window is T inputs and one more token, the last target. Windows never cross files.
//! Every epoch each file starts its windows at another random phase, and visits all windows of all
//! files once in a random order, so that over the epochs every token is seen in every place of a
//! window.
//!
//! What a file holds is known before step 1: a header is believed, what has none is looked at
//! (`layout`), what is another kind of file is an error with its remedy (`magic`), and the largest
//! token of all files is found once (`scan`).

mod coverage;
mod file;
mod host;
mod layout;
mod look;
mod magic;
mod megatron;
mod npy;
mod order;
mod pattern;
mod scan;
mod source;

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

pub use coverage::Coverage;
pub use file::{DatasetFile, TokenFormat, TokenType};

use file::{TokenFile, owned};
use host::HostWindows;
pub use host::TokenMemory;
pub(crate) use host::Window;
use look::WHOLE;
use order::Permutation;
use scan::Scan;

use crate::reserve::zeros;
use crate::{Error, Result, reserve};

/// Tokens to train on: one or several files, mapped into memory, or a host's own. Cheap to
/// clone: clones share the maps.
///
/// All tokens are checked against a model's vocabulary before its first step or evaluation. Where
/// they are more than 256 MiB, a thread of the dataset does that beside the training, and what it
/// finds is the error of the next step. It ends when the last clone is gone.
#[derive(Clone, Debug)]
pub struct Dataset(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    // NOTE: before the files, so that its thread is not who drops them, with what a host gave for them.
    scan: Scan,
    files: Arc<Vec<TokenFile>>,
    /// In place of files.
    host: Option<HostWindows>,
    /// The sequence length whose windows the host knows to leave files out or not; 0 before.
    told_of: AtomicU64,
    ends: OnceLock<Ends>,
    /// Of the first tokens.
    checksum: OnceLock<u32>,
}

/// Windows of one sequence length in all files up to the end of each. With them, a step does not
/// add up those of all files for each of its rows.
#[derive(Debug)]
struct Ends {
    /// T.
    length: u64,
    windows: Vec<u64>,
}

/// How a dataset is opened. `Default` is right for nearly all files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DatasetOptions {
    /// What a token is in files without a header to say it; `None` finds out. A file may be refused
    /// without it, where its tokens can be read in two ways, or look like text.
    pub token_type: Option<TokenType>,
}

impl Dataset {
    /// Opens a file, or all files that a glob pattern matches, in the order of their names.
    ///
    /// An existing path is taken as it is, even where it holds `*`, `?` or `[`; `**` in a pattern
    /// stands for any number of folders, also behind links, each of which is entered once. A file
    /// that a pattern finds again through a link counts once. Paths and patterns need not be UTF-8.
    /// Each file may have any [`TokenFormat`]; raw tokens are u16, or u32 or i64 where they cannot
    /// be u16. Of Megatron's pair either file can be named, or what both names begin with, and the
    /// pair counts once where both are.
    ///
    /// Files are mapped, not read, until the last clone is gone. Nothing that happens to one ends
    /// the process: where tokens are not there any more, because the file has become shorter or its
    /// disk fails, the call that needs them gives [`Error::Io`]. Tokens that another process writes
    /// are checked like all others. Replacing a file by renaming another over it changes nothing.
    ///
    /// There may be any number of files: one takes some 250 bytes of memory and no descriptor.
    /// Those beyond 16,384 are not mapped but opened for every read, and so must keep their names.
    ///
    /// Windows do not cross files. Documents within a file are not told apart.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a pattern that is malformed or matches nothing, [`Error::Io`]
    /// for a file that cannot be opened, [`Error::Format`] for one that is empty, truncated, too
    /// long for its header, or no token file at all: it says what kind of file it is, where that is
    /// known, and what to do. [`Error::OutOfMemory`].
    pub fn open(pattern: impl AsRef<OsStr>) -> Result<Self> {
        Self::open_with(pattern, &DatasetOptions::default())
    }

    /// [`Dataset::open`] with options.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn open_with(pattern: impl AsRef<OsStr>, options: &DatasetOptions) -> Result<Self> {
        let pattern = pattern.as_ref();
        check_length(pattern)?;
        if Path::new(pattern).exists() || !pattern::is_pattern(pattern) {
            return Self::open_files_with(&[pattern], options);
        }
        let paths = pattern::search(pattern)?;
        if paths.is_empty() {
            let message = format!("expected files that match {pattern:?}, found none");
            return Err(Error::invalid("dataset", message));
        }
        Self::open_files_with(&paths, options)
    }

    /// Opens a list of files, in the order given. See [`Dataset::open`].
    ///
    /// # Errors
    /// As [`Dataset::open`]; [`Error::InvalidArgument`] for an empty list.
    pub fn open_files<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        Self::open_files_with(paths, &DatasetOptions::default())
    }

    /// [`Dataset::open_files`] with options.
    ///
    /// # Errors
    /// As [`Dataset::open_files`].
    pub fn open_files_with<P: AsRef<Path>>(paths: &[P], options: &DatasetOptions) -> Result<Self> {
        if paths.is_empty() {
            return Err(Error::invalid("dataset", "expected at least one file, got none"));
        }
        let mut files = Vec::new();
        reserve::reserve(&mut files, "the files of a dataset", paths.len())?;
        let mut buffer = reserve::zeros("a look at the tokens", WHOLE)?;
        let mut halves = Halves::default();
        for path in paths {
            let path = path.as_ref();
            check_length(path.as_os_str())?;
            if !halves.is_second(path)? {
                files.push(TokenFile::open(path, options.token_type, &mut buffer)?);
            }
        }
        Ok(Self::of(files))
    }

    /// A dataset of tokens in memory, which act like one file.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there are none.
    pub fn from_tokens(tokens: Vec<u32>) -> Result<Self> {
        Self::from_memory(tokens)
    }

    /// The same of tokens of 16 or 32 bits in memory of the host's, which is not copied: an
    /// `Arc<[u16]>`, or whatever lends the tokens.
    ///
    /// # Errors
    /// As [`Dataset::from_tokens`].
    pub fn from_memory(tokens: impl TokenMemory + 'static) -> Result<Self> {
        Ok(Self::of(vec![TokenFile::from_memory(Box::new(tokens))?]))
    }

    /// A dataset of `count` windows that `fill(number, tokens, weights)` writes, from number 0 on,
    /// each time that one is wanted: T + 1 tokens, T of them inputs and each the target of the one
    /// before it, and a weight for each target, at least 0 and 1 before: 0 for what is not to be
    /// learned, as a prompt or padding. T is the trainer's sequence length. A loss is then the
    /// weighted sum over the sum of weights of its step or evaluation; a step whose weights are all
    /// 0 has a loss of 0, and no gradient. Ranks compare the number of windows, and not what is in
    /// them.
    ///
    /// Each epoch of training asks for all windows once, in an order of its own; an evaluation for
    /// some spread evenly, in their order. The same number has to give the same window whenever it
    /// is asked for: then a run that is resumed goes on bit for bit. `fill` runs on the thread of
    /// the call that needs the window, on several at once where several trainers use the dataset.
    /// Its error ends that call; it must not use the trainer that the call is of, or its model.
    /// Nothing is known of the tokens but what `fill` writes: [`Dataset::read`] and the like are
    /// [`Error::Unsupported`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a count of 0.
    pub fn from_windows(
        count: u64,
        fill: impl Fn(u64, &mut [u32], &mut [f32]) -> Result<()> + Send + Sync + 'static,
    ) -> Result<Self> {
        Self::from_packed_windows(count, move |number, tokens, weights, _| {
            fill(number, tokens, weights)
        })
    }

    /// [`Dataset::from_windows`] of windows that are packed with documents: `fill(number, tokens,
    /// weights, documents)` writes the number of the document that each of the T inputs is of, too,
    /// which is 0 before. Where it changes along the window another document begins, as in
    /// [`crate::Batch::documents`]; a window of one number is cut at
    /// [`crate::TrainerOptions::document_end`], where there is such a token. The last position of a
    /// document has the first token of the next as its target, unless its weight is 0.
    ///
    /// # Errors
    /// As [`Dataset::from_windows`].
    pub fn from_packed_windows(
        count: u64,
        fill: impl Fn(u64, &mut [u32], &mut [f32], &mut [u32]) -> Result<()> + Send + Sync + 'static,
    ) -> Result<Self> {
        let host = HostWindows::new(count, Box::new(fill))?;
        Ok(Self::with(Vec::new(), Some(host)))
    }

    fn of(files: Vec<TokenFile>) -> Self {
        Self::with(files, None)
    }

    fn with(files: Vec<TokenFile>, host: Option<HostWindows>) -> Self {
        Self(Arc::new(Inner {
            files: Arc::new(files),
            host,
            scan: Scan::new(),
            told_of: AtomicU64::new(0),
            ends: OnceLock::new(),
            checksum: OnceLock::new(),
        }))
    }

    /// Whether targets have weights.
    pub(crate) fn is_weighted(&self) -> bool {
        self.0.host.is_some()
    }

    /// An error where the host fills windows.
    fn check_has_tokens(&self) -> Result<()> {
        if self.0.host.is_some() { Err(HostWindows::no_tokens()) } else { Ok(()) }
    }

    /// Tokens of all files; 0 where the host fills windows.
    pub fn token_count(&self) -> u64 {
        self.sources().iter().map(|file| file.info.tokens).sum()
    }

    /// CRC-32 of the first tokens, by which ranks know that their data are the same: read once.
    ///
    /// # Errors
    /// As [`Dataset::read`].
    pub(crate) fn checksum(&self) -> Result<u32> {
        const FIRST: u64 = 1 << 16;
        if let Some(HostWindows { count, .. }) = &self.0.host {
            return Ok(crc32fast::hash(&count.to_le_bytes()));
        }
        if let Some(checksum) = self.0.checksum.get() {
            return Ok(*checksum);
        }
        let mut tokens: Vec<u32> =
            zeros("the first tokens", self.token_count().min(FIRST) as usize)?;
        self.read(0, &mut tokens)?;
        Ok(*self.0.checksum.get_or_init(|| crc32fast::hash(bytemuck::cast_slice(&tokens))))
    }

    /// The files, in order.
    pub fn files(&self) -> Vec<DatasetFile> {
        self.sources().iter().map(|file| file.info.clone()).collect()
    }

    /// The largest token. Reads everything, unless that has been done.
    ///
    /// # Errors
    /// [`Error::TokenRange`] for a number below 0 or above u32, which is no token; [`Error::Io`]
    /// where a file has become shorter or its disk fails.
    pub fn max_token(&self) -> Result<u32> {
        self.check_has_tokens()?;
        self.0.scan.largest(&self.0.files)
    }

    /// The largest token of each file, in their order. Reads everything.
    ///
    /// # Errors
    /// As [`Dataset::max_token`].
    pub fn max_tokens(&self) -> Result<Vec<u32>> {
        // Read in the same order, so that the first stray is named either way.
        self.max_token()?;
        let mut largest = Vec::new();
        reserve::reserve(&mut largest, "the largest token of each file", self.sources().len())?;
        for file in self.sources() {
            largest.push(file.extent(0, file.info.tokens)?.largest);
        }
        Ok(largest)
    }

    /// Checks all tokens against a vocabulary. More than 256 MiB of them are read by a thread that
    /// this call starts, and the answer is then what is known by now; ask again for more. Training
    /// and evaluation do that by themselves: the call is for knowing early.
    ///
    /// # Errors
    /// [`Error::TokenRange`] for the first token that is not below `vocab_size`; [`Error::Io`]
    /// where a file has become shorter or its disk fails.
    pub fn check_tokens(&self, vocab_size: usize) -> Result<()> {
        self.0.scan.check(&self.0.files, vocab_size)
    }

    /// What windows of `sequence_length` tokens, and one more for the last target, read of the
    /// files. A trainer's first step warns in the engine's log of files that are never read, unless
    /// this was asked before for its length: whoever asks knows.
    pub fn coverage(&self, sequence_length: usize) -> Coverage {
        self.0.told_of.store(sequence_length as u64, Ordering::Relaxed);
        let coverage =
            Coverage::of(self.sources().iter().map(|file| file.info.tokens), sequence_length);
        match &self.0.host {
            None => coverage,
            Some(HostWindows { count: windows, .. }) => {
                Coverage { windows: *windows, shortest: 0, ..coverage }
            }
        }
    }

    /// What a user should be told of files that training with this length leaves out, once.
    pub(crate) fn warning(&self, sequence_length: usize) -> Option<String> {
        if self.0.told_of.load(Ordering::Relaxed) == sequence_length as u64 {
            return None;
        }
        self.coverage(sequence_length).warning("sequence_length")
    }

    fn sources(&self) -> &[TokenFile] {
        &self.0.files
    }

    /// Copies the tokens from number `first` on, counted from 0 over all files in their order,
    /// until `tokens` is full. Unlike a training window, what is read may cross from file to file.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where the dataset ends before; `tokens` is then unchanged.
    /// [`Error::TokenRange`] for a number below 0 or above u32, which is no token; [`Error::Io`].
    pub fn read(&self, first: u64, tokens: &mut [u32]) -> Result<()> {
        self.check_has_tokens()?;
        let (count, total) = (tokens.len(), self.token_count());
        if first.checked_add(count as u64).is_none_or(|end| end > total) {
            let message = format!(
                "expected {count} tokens from number {first} on, but the dataset has {total}; read \
                 within numbers 0 to {}",
                total - 1
            );
            return Err(Error::invalid("first", message));
        }
        let (mut skip, mut rest) = (first, tokens);
        for file in self.sources() {
            let here = file.info.tokens.saturating_sub(skip).min(rest.len() as u64);
            if here > 0 {
                let part;
                (part, rest) = rest.split_at_mut(here as usize);
                // No token is out of the range of a vocabulary that is as large as can be.
                file.copy(skip, 1 << 32, part)?;
            }
            skip = skip.saturating_sub(file.info.tokens);
        }
        Ok(())
    }

    /// Training windows of `sequence_length` + 1 tokens in one epoch, at least 1.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where no file is long enough for one.
    pub fn windows(&self, sequence_length: usize) -> Result<u64> {
        let t = sequence_length as u64;
        if t == 0 {
            return Err(Error::invalid("sequence_length", "expected at least 1, got 0"));
        }
        if let Some(HostWindows { count, .. }) = self.0.host {
            return Ok(count);
        }
        let windows = match self.0.ends.get() {
            Some(ends) if ends.length == t => ends.windows.last().copied().unwrap_or(0),
            _ => self.sources().iter().map(|file| windows_of(file.info.tokens, t)).sum(),
        };
        if windows == 0 {
            let Coverage { files, tokens, longest, .. } = self.coverage(sequence_length);
            let remedy = match longest {
                0 | 1 => "use more data".to_owned(),
                n => format!(
                    "use a sequence of at most {} tokens, join files, or use more data",
                    n - 1
                ),
            };
            return Err(Error::invalid(
                "sequence_length",
                format!(
                    "a window of {t} tokens and the one after them needs a file of {} tokens; the \
                     longest of the {files} in the dataset has {longest} ({tokens} in all); {remedy}",
                    u128::from(t) + 1
                ),
            ));
        }
        Ok(windows)
    }

    /// Fills `out` with training window `number`: 0, 1, 2... over the whole run;
    /// epochs follow each other. The same arguments give the same tokens, always.
    ///
    /// # Errors
    /// As [`Dataset::windows`]; [`Error::TokenRange`] for a token that is not below `vocab_size`;
    /// [`Error::Io`].
    pub(crate) fn training_window(
        &self,
        seed: u64,
        number: u64,
        vocab_size: usize,
        out: Window<'_>,
    ) -> Result<()> {
        let t = out.tokens.len().saturating_sub(1) as u64;
        let windows = self.windows(t as usize)?;
        let (epoch, position) = (number / windows, number % windows);
        let window = Permutation::new(seed, epoch, windows).apply(position);
        if let Some(host) = &self.0.host {
            return host.read(window, vocab_size, out);
        }
        let (index, window) = self.locate(window, t);
        let file = &self.sources()[index];
        let phase = order::phase(seed, epoch, index, last_phase(file.info.tokens, t));
        file.copy(phase + window * t, vocab_size, out.tokens)
    }

    /// The same of windows that the optimizer looks at besides those that a run trains on, in an
    /// order of their own.
    ///
    /// # Errors
    /// As [`Dataset::training_window`].
    pub(crate) fn side_window(
        &self,
        seed: u64,
        number: u64,
        vocab_size: usize,
        out: Window<'_>,
    ) -> Result<()> {
        self.training_window(order::side_seed(seed), number, vocab_size, out)
    }

    /// The windows of an evaluation with this sequence length.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a length of 0, or where no file has two tokens.
    pub(crate) fn eval_windows(&self, sequence_length: usize) -> Result<EvalWindows<'_>> {
        let t = sequence_length as u64;
        let is_long = self.sources().iter().any(|file| file.info.tokens > t);
        let pairs = self.sources().iter().filter(|file| file.info.tokens > 1).count() as u64;
        if is_long || pairs == 0 || t == 0 || self.0.host.is_some() {
            let total = self.windows(sequence_length)?;
            return Ok(EvalWindows { data: self, length: t, total, are_short: false });
        }
        Ok(EvalWindows { data: self, length: t, total: pairs, are_short: true })
    }

    /// The windows up to the end of each file, for the length that is read first; `None` for
    /// others, and where there is no memory for them.
    fn ends(&self, t: u64) -> Option<&[u64]> {
        if self.0.ends.get().is_none() {
            let mut windows = Vec::new();
            reserve::reserve(&mut windows, "the windows of each file", self.sources().len())
                .ok()?;
            windows.extend(self.sources().iter().scan(0, |end, file| {
                *end += windows_of(file.info.tokens, t);
                Some(*end)
            }));
            // Made before, so that nobody waits: a child of a fork would for ever.
            let _ = self.0.ends.set(Ends { length: t, windows });
        }
        self.0.ends.get().filter(|ends| ends.length == t).map(|ends| &ends.windows[..])
    }

    /// File of a window of the whole dataset, and the window's index in it.
    fn locate(&self, mut window: u64, t: u64) -> (usize, u64) {
        if let Some(ends) = self.ends(t) {
            let index = ends.partition_point(|&end| end <= window);
            return (index, window - index.checked_sub(1).map_or(0, |before| ends[before]));
        }
        for (index, file) in self.sources().iter().enumerate() {
            let windows = windows_of(file.info.tokens, t);
            if window < windows {
                return (index, window);
            }
            window -= windows;
        }
        unreachable!("callers pass a window below the sum of all files")
    }
}

/// Windows to measure with: those of T + 1 tokens, or where no file is that long one for each file,
/// of all its tokens.
pub(crate) struct EvalWindows<'a> {
    data: &'a Dataset,
    /// T.
    length: u64,
    total: u64,
    /// Whether a window is a file, and so has a length of its own.
    pub(crate) are_short: bool,
}

impl EvalWindows<'_> {
    /// Whether targets have weights.
    pub(crate) fn are_weighted(&self) -> bool {
        self.data.is_weighted()
    }

    /// How many there are.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Inputs of window `index` of `count` windows that are spread evenly over all of them; one
    /// token more is read. The same for every call. `count` is at most [`EvalWindows::total`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a `count` or `index` out of range.
    pub(crate) fn length(&self, index: u64, count: u64) -> Result<usize> {
        let (file, _) = self.place(index, count)?;
        let whole = || self.data.sources()[file].info.tokens - 1;
        Ok(if self.are_short { whole() } else { self.length } as usize)
    }

    /// Fills `out`, which has room for one token more than [`EvalWindows::length`] says.
    ///
    /// # Errors
    /// As [`EvalWindows::length`]; [`Error::TokenRange`] for a token that is not below
    /// `vocab_size`; [`Error::Io`].
    pub(crate) fn read(
        &self,
        index: u64,
        count: u64,
        vocab_size: usize,
        out: Window<'_>,
    ) -> Result<()> {
        let (file, first) = self.place(index, count)?;
        match &self.data.0.host {
            Some(host) => host.read(first, vocab_size, out),
            None => self.data.sources()[file].copy(first, vocab_size, out.tokens),
        }
    }

    /// File of a window, and its first token; of the host's its number.
    fn place(&self, index: u64, count: u64) -> Result<(usize, u64)> {
        if count > self.total || index >= count {
            let message =
                format!("window {index} of {count} is beyond the {} of the data", self.total);
            return Err(Error::invalid("evaluation window", message));
        }
        let window = (u128::from(index) * u128::from(self.total) / u128::from(count)) as u64;
        if self.data.0.host.is_some() {
            return Ok((0, window));
        }
        if !self.are_short {
            let (file, window) = self.data.locate(window, self.length);
            return Ok((file, window * self.length));
        }
        let files = self.data.sources().iter().enumerate();
        let mut pairs = files.filter(|(_, file)| file.info.tokens > 1);
        let (file, _) = pairs.nth(window as usize).expect("the total counts these files");
        Ok((file, 0))
    }
}

/// Bytes of the longest path or pattern. No system takes a path as long, and what the standard
/// library makes of one is memory that is not asked for.
const LONGEST_PATH: usize = 1 << 16;

fn check_length(path: &OsStr) -> Result<()> {
    if path.len() <= LONGEST_PATH {
        return Ok(());
    }
    let message = format!(
        "expected a path or pattern of at most {LONGEST_PATH} bytes, got one of {}; name a list of files",
        path.len()
    );
    Err(Error::invalid("dataset", message))
}

/// The halves of Megatron pairs that were named so far.
#[derive(Default)]
struct Halves(HashSet<PathBuf>);

impl Halves {
    /// Whether the other half of this one was named before.
    fn is_second(&mut self, path: &Path) -> Result<bool> {
        let Some(tokens) = megatron::tokens_of(path) else { return Ok(false) };
        let is_index = tokens != path;
        // NOTE: a file named twice is read twice, as one without an index is.
        let other = if is_index { tokens } else { path.with_extension("idx") };
        let is_second = self.0.contains(&other);
        self.0.try_reserve(1).map_err(|_| Error::OutOfMemory {
            what: "the files of a dataset",
            needed: (2 * self.0.len() * size_of::<PathBuf>()) as u64,
            limit: "which the system refuses; use fewer files".into(),
        })?;
        self.0.insert(owned(path)?);
        Ok(is_second)
    }
}

/// Windows of T inputs that a file of `tokens` tokens has in one epoch. One fewer than would fit,
/// where there are several, so that the phase can take any value below T.
fn windows_of(tokens: u64, t: u64) -> u64 {
    if tokens > t { ((tokens - t) / t).max(1) } else { 0 }
}

/// The last place where the first window may start so that the last one ends within the file.
/// NOTE: not capped at T - 1, or else the tail of a file (up to T - 1 tokens) would never be seen.
fn last_phase(tokens: u64, t: u64) -> u64 {
    tokens - 1 - windows_of(tokens, t) * t
}

#[cfg(test)]
mod tests;
