//! What can go wrong, as one enum with fields.
//!
//! Messages are lower-case and say what was expected, what came and, where one is known, the fix.
//! Each variant has one status code in the C API (`capi::status`).

use std::path::{Path, PathBuf};

/// The result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option or argument has a value that the call cannot use.
    #[error("{what}: {message}")]
    InvalidArgument {
        /// The option or argument, by the name that the caller knows.
        what: &'static str,
        /// What was expected and what came.
        message: String,
    },

    /// A file operation failed.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried: "open", "write", "rename to"...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },

    /// A file is damaged, truncated or of a kind that this version does not read.
    #[error("{path}: {message}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found; names the tensor where there is one.
        message: String,
    },

    /// A file is sound but does not fit what it is used with (another shape, another run).
    #[error("{path}: {message}", path = path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        message: String,
    },

    /// A token is not below the model's vocabulary size, or is a number that no token can be.
    #[error(
        "{source_name}: token {token} at offset {offset} is outside the vocabulary of {vocab_size} \
         ({cause})",
        cause = token_cause(*token)
    )]
    TokenRange {
        /// The file, or a name for tokens that came from memory.
        source_name: String,
        /// Index of the token, counted in tokens from the start of the data.
        offset: u64,
        /// The number found; below 0 or above u32 where it is no token at all.
        token: i64,
        /// The model's vocabulary size; 2^32 where no model is asked.
        vocab_size: usize,
    },

    /// More memory is needed than the limit allows or the system gives.
    #[error("{needed} bytes are needed for {what}, {limit}")]
    OutOfMemory {
        /// What the memory is for.
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// The limit met and the remedy, in words.
        limit: String,
    },

    /// The device or this build cannot do it.
    #[error("{what} is not supported: {remedy}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What can be done instead.
        remedy: String,
    },

    /// A loss, a gradient norm or a weight is NaN or infinite.
    #[error("{what} is not finite ({value})")]
    NotFinite {
        /// Which number, with its place.
        what: String,
        /// The value found.
        value: f32,
    },

    /// No tensor has this name.
    #[error("no tensor is named {name:?}; {hint}")]
    NoSuchTensor {
        /// The name asked for.
        name: String,
        /// Where the names can be found.
        hint: String,
    },

    /// A GPU failed. What it holds is not known any more: free what was made on it.
    #[error("the device failed: {message}")]
    Device {
        /// What it was doing and what the driver says.
        message: String,
    },

    /// A stop was asked for while the call was at work. Nothing is changed.
    #[error("stopped, as asked")]
    Stopped,

    /// Ranks of a group do not have alike what they must. Nothing is changed.
    #[error("the ranks of the group differ: {message}")]
    RanksDiffer {
        /// What differs, and on which ranks.
        message: String,
    },

    /// Another rank of the group failed, or is gone, or does not answer. Where it said why, the call
    /// has changed nothing and the group goes on; otherwise the group has ended.
    #[error("the group of ranks: {message}")]
    Peer {
        /// Which rank, and its words.
        message: String,
    },

    /// An earlier call panicked while it changed this object, which can only be freed now.
    #[error("a panic in an earlier call left this object unusable; free it")]
    Poisoned,
}

/// What a token outside a vocabulary is likely to come from.
fn token_cause(token: i64) -> &'static str {
    match token {
        ..0 => "a mark for padding or masking? take such marks out of the data",
        _ if token > u32::MAX.into() => "is the file damaged, or of another token_type?",
        _ => "was the data made with another tokenizer?",
    }
}

impl Error {
    /// An [`Error::InvalidArgument`].
    pub(crate) fn invalid(what: &'static str, message: impl Into<String>) -> Self {
        Self::InvalidArgument { what, message: message.into() }
    }

    /// An [`Error::Format`].
    pub(crate) fn format(path: &Path, message: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), message: message.into() }
    }

    /// An [`Error::Mismatch`].
    pub(crate) fn mismatch(path: &Path, message: impl Into<String>) -> Self {
        Self::Mismatch { path: path.to_owned(), message: message.into() }
    }

    /// Turns an I/O error into an [`Error::Io`], for `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}
