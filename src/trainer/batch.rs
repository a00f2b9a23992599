//! One micro-step's tokens, on the host and on the device.

use super::parts::{Given, IGNORED};
use crate::backend::{Backend, Sequences};
use crate::reserve::zeros;
use crate::{Error, Result};

/// One micro-step's tokens, on the host and on the device.
pub(super) struct BatchBuffers<B: Backend> {
    pub(super) tokens: B::Tokens,
    pub(super) targets: B::Tokens,
    /// (rows): of losses, where they have any.
    pub(super) weights: B::F32,
    /// (B, T + 1), read once: inputs are the first T of each row, targets the last T. Of a batch that
    /// the host gives the inputs alone, (B, T).
    pub(super) windows: Vec<u32>,
    /// (rows): targets that the host gives, [`IGNORED`] ones included, and weights.
    given: Vec<u32>,
    given_weights: Vec<f32>,
    /// Of the batch last filled.
    sequences: Sequences,
    filled: Filled,
}

/// What the host has filled last.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Filled {
    Windows,
    /// With or without weights.
    Given {
        weighted: bool,
    },
}

impl<B: Backend> BatchBuffers<B> {
    /// `allocate` is false where the arena only measures.
    pub(super) fn new(
        backend: &B,
        arena: &mut B::Arena,
        sequences: Sequences,
        allocate: bool,
    ) -> Result<Self> {
        const WHAT: &str = "the tokens of a batch";
        let rows = sequences.rows();
        let here = |len| if allocate { len } else { 0 };
        Ok(Self {
            tokens: backend.tokens(arena, rows, true)?,
            targets: backend.tokens(arena, rows, false)?,
            weights: backend.f32(arena, rows),
            windows: zeros(WHAT, here(rows + sequences.batch))?,
            given: zeros(WHAT, here(rows))?,
            given_weights: zeros(WHAT, here(rows))?,
            sequences,
            filled: Filled::Windows,
        })
    }

    /// Takes the windows that `window(row, out)` writes.
    pub(super) fn fill(
        &mut self,
        sequences: Sequences,
        mut window: impl FnMut(usize, &mut [u32]) -> Result<()>,
    ) -> Result<()> {
        (self.sequences, self.filled) = (sequences, Filled::Windows);
        let rows = self.windows.chunks_exact_mut(sequences.length + 1).take(sequences.batch);
        rows.enumerate().try_for_each(|(row, to)| window(row, to))
    }

    /// Takes what the host gives, and tells the sum of its weights.
    pub(super) fn take(
        &mut self,
        sequences: Sequences,
        given: &Given<'_>,
        vocab_size: usize,
    ) -> Result<f64> {
        let rows = sequences.rows();
        let tokens = &mut self.windows[..rows];
        (given.tokens)(tokens);
        if let Some(at) = tokens.iter().position(|token| *token as usize >= vocab_size) {
            return Err(out_of_range("tokens", at, tokens[at], vocab_size));
        }
        let targets = &mut self.given[..rows];
        match given.targets {
            None => targets.fill(0),
            Some(read) => read(targets),
        }
        if let Some(at) = targets.iter().position(|t| *t != IGNORED && *t as usize >= vocab_size) {
            return Err(out_of_range("targets", at, targets[at], vocab_size));
        }
        let weights = &mut self.given_weights[..rows];
        let mut weighted = given.weights.is_some();
        match given.weights {
            None => weights.fill(1.0),
            Some(read) => read(weights),
        }
        if let Some((at, weight)) = weights.iter().enumerate().find(|(_, w)| !w.is_finite()) {
            let what = format!("weight {at} of this batch");
            return Err(Error::NotFinite { what, value: *weight });
        }
        for (weight, _) in weights.iter_mut().zip(&*targets).filter(|(_, t)| **t == IGNORED) {
            weighted = true;
            *weight = 0.0;
        }
        (self.sequences, self.filled) = (sequences, Filled::Given { weighted });
        Ok(weights.iter().map(|weight| f64::from(*weight)).sum())
    }

    /// Whether losses have weights.
    pub(super) fn is_weighted(&self) -> bool {
        self.filled == Filled::Given { weighted: true }
    }

    /// Whether the host has given row `row` no target.
    pub(super) fn is_ignored(&self, row: usize) -> bool {
        self.filled != Filled::Windows && self.given[row] == IGNORED
    }

    pub(super) fn upload(&mut self, backend: &B) -> Result<()> {
        let Self { tokens, targets, windows, sequences, .. } = self;
        let (t, rows) = (sequences.length, sequences.rows());
        let Filled::Given { weighted } = self.filled else {
            for (to, first) in [(tokens, 0), (targets, 1)] {
                backend.write_tokens(to, rows, |to| {
                    for (to, window) in to.chunks_exact_mut(t).zip(windows.chunks_exact(t + 1)) {
                        to.copy_from_slice(&window[first..][..t]);
                    }
                });
            }
            return Ok(());
        };
        backend.write_tokens(tokens, rows, |to| to.copy_from_slice(&windows[..rows]));
        backend.write_tokens(targets, rows, |to| {
            // Whatever is no target has no weight.
            let given = self.given.iter().map(|t| if *t == IGNORED { 0 } else { *t });
            to.iter_mut().zip(given).for_each(|(to, target)| *to = target);
        });
        match weighted {
            true => backend.write_f32(&mut self.weights, 0, &self.given_weights[..rows]),
            false => Ok(()),
        }
    }
}

fn out_of_range(what: &str, at: usize, token: u32, vocab_size: usize) -> Error {
    let (source_name, offset) = (format!("the {what} of this batch"), at as u64);
    Error::TokenRange { source_name, offset, token: token.into(), vocab_size }
}
