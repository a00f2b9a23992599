//! Memory-mapped token datasets and the order in which training reads them.
use std::path::{Path, PathBuf};
use crate::Result;

/// How a token file is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenFormat { /// Raw little-endian u16 tokens (nanoGPT).
    RawU16, /// llm.c: 256 little-endian i32 of header, then u16 or u32 tokens.
    LlmC, /// Tokens handed in by the host.
    Memory }

/// One file of a dataset.
#[derive(Clone, Debug)]
pub struct DatasetFile { /// Its path, or a name for tokens from memory.
    pub path: PathBuf, /// Its layout.
    pub format: TokenFormat, /// Tokens that it holds.
    pub tokens: u64 }

/// Tokens to train on: one or several files, mapped into memory, or a host's own tokens.
#[derive(Clone, Debug)]
pub struct Dataset;

impl Dataset {
    /// Opens a file, or all files that a glob pattern matches, in the order of their names.
    pub fn open(_pattern: &str) -> Result<Self> { todo!() }
    /// Opens a list of files, in the order given.
    pub fn open_files<P: AsRef<Path>>(_paths: &[P]) -> Result<Self> { todo!() }
    /// A dataset of tokens in memory.
    pub fn from_tokens(_tokens: Vec<u32>) -> Result<Self> { todo!() }
    /// Tokens of all files.
    pub fn token_count(&self) -> u64 { todo!() }
    /// The files.
    pub fn files(&self) -> Vec<DatasetFile> { todo!() }
    /// The largest token; reads everything.
    pub fn max_token(&self) -> u32 { todo!() }

    /// Training windows of `sequence_length` + 1 tokens in one epoch; an error where there is none.
    pub(crate) fn windows(&self, _sequence_length: usize) -> Result<u64> { todo!() }
    /// Fills `out` (T + 1 tokens) with training sample `sample` (0, 1, 2... over the whole run; epochs follow each other)
    pub(crate) fn training_window(&self, _seed: u64, _sample: u64, _vocab_size: usize, _out: &mut [u32]) -> Result<()> { todo!() }
    /// Fills `out` (T + 1 tokens) with evaluation window `index` of `count` windows spread evenly over the data, the same for every call.
    pub(crate) fn eval_window(&self, _index: u64, _count: u64, _vocab_size: usize, _out: &mut [u32]) -> Result<()> { todo!() }
}
