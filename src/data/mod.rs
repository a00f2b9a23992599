//! Memory-mapped token datasets and the order in which training reads them.
//!
//! A sample is a window of T inputs and one more token, the last target. Windows never cross files.
//! Every epoch each file starts its windows at another random phase, and visits all windows of all
//! files once in a random order, so that over the epochs every token is seen in every place of a
//! window.

mod file;
mod order;

use std::path::Path;
use std::sync::Arc;

pub use file::{DatasetFile, TokenFormat};

use file::TokenFile;
use order::Permutation;

use crate::{Error, Result};

/// Tokens to train on: one or several files, mapped into memory, or a host's own tokens. Cheap to
/// clone: clones share the maps.
#[derive(Clone, Debug)]
pub struct Dataset(Arc<[TokenFile]>);

impl Dataset {
    /// Opens a file, or all files that a glob pattern matches, in the order of their names.
    ///
    /// An existing path is taken as it is, even where it holds `*`, `?` or `[`. Each file may have
    /// any [`TokenFormat`]. Files are mapped, not read, and stay open until the last clone is gone;
    /// no process may make one shorter in that time (the system would end this process with
    /// SIGBUS). Replacing a file by renaming another over it is safe.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a pattern that is malformed or matches nothing, [`Error::Io`]
    /// for a file that cannot be opened, [`Error::Format`] for one that is empty, truncated, too
    /// long for its header, or no token file at all.
    pub fn open(pattern: &str) -> Result<Self> {
        if Path::new(pattern).exists() || !pattern.contains(['*', '?', '[']) {
            return Self::open_files(&[pattern]);
        }
        let paths = glob::glob(pattern)
            .map_err(|e| Error::invalid("dataset", format!("bad pattern {pattern:?}: {e}")))?
            .map(|path| {
                path.map_err(|e| Error::Io {
                    action: "search",
                    path: e.path().to_owned(),
                    source: e.into(),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        if paths.is_empty() {
            let message = format!("expected files that match {pattern:?}, found none");
            return Err(Error::invalid("dataset", message));
        }
        Self::open_files(&paths)
    }

    /// Opens a list of files, in the order given. See [`Dataset::open`].
    ///
    /// # Errors
    /// As [`Dataset::open`]; [`Error::InvalidArgument`] for an empty list.
    pub fn open_files<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        if paths.is_empty() {
            return Err(Error::invalid("dataset", "expected at least one file, got none"));
        }
        paths.iter().map(|path| TokenFile::open(path.as_ref())).collect::<Result<_>>().map(Self)
    }

    /// A dataset of tokens in memory, which act like one file.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there are none.
    pub fn from_tokens(tokens: Vec<u32>) -> Result<Self> {
        Ok(Self(Arc::new([TokenFile::from_tokens(tokens)?])))
    }

    /// Tokens of all files.
    pub fn token_count(&self) -> u64 {
        self.0.iter().map(|file| file.info.tokens).sum()
    }

    /// The files, in order.
    pub fn files(&self) -> Vec<DatasetFile> {
        self.0.iter().map(|file| file.info.clone()).collect()
    }

    /// The largest token; reads everything.
    pub fn max_token(&self) -> u32 {
        self.0.iter().map(TokenFile::max_token).max().unwrap_or(0)
    }

    /// Copies the tokens from number `first` on, counted from 0 over all files in their order, until
    /// `tokens` is full. Unlike a training window, what is read may cross from file to file.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where the dataset ends before; `tokens` is then unchanged.
    pub fn read(&self, first: u64, tokens: &mut [u32]) -> Result<()> {
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
        for file in self.0.iter() {
            let here = file.info.tokens.saturating_sub(skip).min(rest.len() as u64);
            if here > 0 {
                let part;
                (part, rest) = rest.split_at_mut(here as usize);
                // No token is out of the range of a vocabulary that is as large as can be.
                file.copy(skip, usize::MAX, part)?;
            }
            skip = skip.saturating_sub(file.info.tokens);
        }
        Ok(())
    }

    /// Training windows of `sequence_length` + 1 tokens in one epoch, at least 1.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where no file is long enough for one.
    pub(crate) fn windows(&self, sequence_length: usize) -> Result<u64> {
        let t = sequence_length as u64;
        if t == 0 {
            return Err(Error::invalid("sequence_length", "expected at least 1, got 0"));
        }
        let windows = self.0.iter().map(|file| windows_of(file.info.tokens, t)).sum();
        if windows == 0 {
            let longest = self.0.iter().map(|file| file.info.tokens).max().unwrap_or(0);
            return Err(Error::invalid(
                "sequence_length",
                format!(
                    "a window of {t} tokens and the one after them needs a file of {} tokens; the \
                     longest file of the dataset has {longest}; use a shorter sequence or more data",
                    u128::from(t) + 1
                ),
            ));
        }
        Ok(windows)
    }

    /// Fills `out` (T + 1 tokens) with training sample `sample`: 0, 1, 2... over the whole run;
    /// epochs follow each other. The same arguments give the same tokens, always.
    ///
    /// # Errors
    /// As [`Dataset::windows`]; [`Error::TokenRange`] for a token that is not below `vocab_size`.
    pub(crate) fn training_window(
        &self,
        seed: u64,
        sample: u64,
        vocab_size: usize,
        out: &mut [u32],
    ) -> Result<()> {
        let t = out.len().saturating_sub(1) as u64;
        let windows = self.windows(t as usize)?;
        let (epoch, position) = (sample / windows, sample % windows);
        let window = Permutation::new(seed, epoch, windows).apply(position);
        let (index, window) = self.locate(window, t);
        let file = &self.0[index];
        let phase = order::phase(seed, epoch, index, last_phase(file.info.tokens, t));
        file.copy(phase + window * t, vocab_size, out)
    }

    /// Fills `out` (T + 1 tokens) with evaluation window `index` of `count` windows that are spread
    /// evenly over the data, the same for every call. `count` is at most [`Dataset::windows`].
    ///
    /// # Errors
    /// As [`Dataset::training_window`]; [`Error::InvalidArgument`] for a `count` or `index` out of
    /// range.
    pub(crate) fn eval_window(
        &self,
        index: u64,
        count: u64,
        vocab_size: usize,
        out: &mut [u32],
    ) -> Result<()> {
        let t = out.len().saturating_sub(1) as u64;
        let windows = self.windows(t as usize)?;
        if count > windows || index >= count {
            let message = format!("window {index} of {count} is beyond the {windows} of the data");
            return Err(Error::invalid("evaluation window", message));
        }
        let window = (u128::from(index) * u128::from(windows) / u128::from(count)) as u64;
        let (file, window) = self.locate(window, t);
        self.0[file].copy(window * t, vocab_size, out)
    }

    /// File of a window of the whole dataset, and the window's index in it.
    fn locate(&self, mut window: u64, t: u64) -> (usize, u64) {
        for (index, file) in self.0.iter().enumerate() {
            let windows = windows_of(file.info.tokens, t);
            if window < windows {
                return (index, window);
            }
            window -= windows;
        }
        unreachable!("callers pass a window below the sum of all files")
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
