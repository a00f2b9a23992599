//! Data that lie in no token file: tokens in the host's memory, and windows that the host fills, with
//! a weight for each target.

use std::fmt;
use std::sync::Arc;

use super::TokenType;
use crate::{Error, Result};

/// Tokens in memory, which stay where they are, and what they are, as long as this lives.
pub trait TokenMemory: Send + Sync {
    /// How many there are.
    fn count(&self) -> usize;
    /// What each takes: 16 or 32 bits.
    fn token_type(&self) -> TokenType;
    /// Copies those from number `first` on, which are there, until `to` is full.
    fn copy(&self, first: usize, to: &mut [u32]);
}

impl fmt::Debug for dyn TokenMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenMemory").field("count", &self.count()).finish_non_exhaustive()
    }
}

macro_rules! token_memory {
    ($($memory:ty, $kind:ident;)*) => {$(
        impl TokenMemory for $memory {
            fn count(&self) -> usize {
                self.len()
            }

            fn token_type(&self) -> TokenType {
                TokenType::$kind
            }

            fn copy(&self, first: usize, to: &mut [u32]) {
                let from = &self[first..][..to.len()];
                to.iter_mut().zip(from).for_each(|(to, token)| *to = (*token).into());
            }
        }
    )*};
}

token_memory! {
    Vec<u32>, U32;
    Vec<u16>, U16;
    Arc<[u32]>, U32;
    Arc<[u16]>, U16;
}

/// Writes window number so-and-so: T + 1 tokens, a weight for each of its T targets, which are 1
/// before, and the number of the document that each of its T inputs is of, which are 0 before.
pub(super) type Fill = dyn Fn(u64, &mut [u32], &mut [f32], &mut [u32]) -> Result<()> + Send + Sync;

/// All windows of an epoch.
pub(super) struct HostWindows {
    pub(super) count: u64,
    fill: Box<Fill>,
}

impl HostWindows {
    pub(super) fn new(count: u64, fill: Box<Fill>) -> Result<Self> {
        if count == 0 {
            return Err(Error::invalid("windows", "expected at least 1, got 0"));
        }
        Ok(Self { count, fill })
    }

    /// Fills a window, and checks it.
    pub(super) fn read(&self, number: u64, vocab_size: usize, window: Window<'_>) -> Result<()> {
        let Window { tokens, weights, documents } = window;
        // The host writes as many of each.
        assert!(weights.len() + 1 == tokens.len() && documents.len() == weights.len());
        weights.fill(1.0);
        documents.fill(0);
        (self.fill)(number, tokens, weights, documents)?;
        let source_name = || format!("window {number} of the host's");
        if let Some(at) = tokens.iter().position(|token| *token as usize >= vocab_size) {
            let (source_name, offset, token) = (source_name(), at as u64, tokens[at].into());
            return Err(Error::TokenRange { source_name, offset, token, vocab_size });
        }
        for (at, weight) in weights.iter().enumerate() {
            let name = || format!("weight {at} of {}", source_name());
            if !weight.is_finite() {
                return Err(Error::NotFinite { what: name(), value: *weight });
            }
            if *weight < 0.0 {
                let message = format!("{}: expected at least 0, got {weight}", name());
                return Err(Error::invalid("weights", message));
            }
        }
        Ok(())
    }

    /// An error for what needs tokens in a row.
    pub(super) fn no_tokens() -> Error {
        Error::Unsupported {
            what: "tokens in a row of a dataset whose windows the host fills".to_owned(),
            remedy: "ask the host's own data".to_owned(),
        }
    }
}

impl fmt::Debug for HostWindows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostWindows").field("count", &self.count).finish_non_exhaustive()
    }
}

/// A window to be filled: T + 1 tokens, and where the host fills it a weight for each of its T targets
/// and the number of the document that each of its T inputs is of.
pub(crate) struct Window<'a> {
    pub(crate) tokens: &'a mut [u32],
    pub(crate) weights: &'a mut [f32],
    pub(crate) documents: &'a mut [u32],
}
