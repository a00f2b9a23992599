//! One micro-step's tokens, on the host and on the device.

use super::documents::{Numbers, Packed};
use super::parts::{Given, IGNORED};
use crate::backend::{Backend, Sequences};
use crate::data::Window;
use crate::reserve::zeros;
use crate::run::TrainerOptions;
use crate::{Error, Result};

/// One micro-step's tokens, on the host and on the device.
pub(super) struct BatchBuffers<B: Backend> {
    pub(super) tokens: B::Tokens,
    pub(super) targets: B::Tokens,
    /// (rows): of losses, where they have any.
    pub(super) weights: B::F32,
    /// The documents that sequences are packed with.
    pub(super) packed: Packed<B>,
    /// (B, T + 1), read once: inputs are the first T of each row, targets the last T. Of a batch that
    /// the host gives the inputs alone, (B, T).
    pub(super) windows: Vec<u32>,
    /// (rows): targets that the host gives, [`IGNORED`] ones included, and weights.
    given: Vec<u32>,
    given_weights: Vec<f32>,
    /// Of the batch last filled.
    sequences: Sequences,
    filled: Filled,
    weighted: bool,
}

/// What is on the host.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Filled {
    Windows,
    Given,
}

impl<B: Backend> BatchBuffers<B> {
    /// `allocate` is false where the arena only measures.
    pub(super) fn new(
        backend: &B,
        arena: &mut B::Arena,
        options: &TrainerOptions,
        allocate: bool,
    ) -> Result<Self> {
        const WHAT: &str = "the tokens of a batch";
        let sequences = Sequences { batch: options.batch_size, length: options.sequence_length };
        let rows = sequences.rows();
        let here = |len| if allocate { len } else { 0 };
        Ok(Self {
            tokens: backend.tokens(arena, rows, true)?,
            targets: backend.tokens(arena, rows, false)?,
            weights: backend.f32(arena, rows),
            packed: Packed::new(backend, arena, options, allocate)?,
            windows: zeros(WHAT, here(rows + sequences.batch))?,
            given: zeros(WHAT, here(rows))?,
            given_weights: zeros(WHAT, here(rows))?,
            sequences,
            filled: Filled::Windows,
            weighted: false,
        })
    }

    /// Takes the windows that `window(row, out)` writes, with weights where they are `weighted`; tells
    /// their sum, and how many are not 0.
    pub(super) fn fill(
        &mut self,
        sequences: Sequences,
        weighted: bool,
        mut window: impl FnMut(usize, Window<'_>) -> Result<()>,
    ) -> Result<Weighed> {
        (self.sequences, self.filled, self.weighted) = (sequences, Filled::Windows, weighted);
        let (t, rows) = (sequences.length, sequences.rows());
        let windows = self.windows.chunks_exact_mut(t + 1).take(sequences.batch).enumerate();
        if weighted {
            let documents = self.packed.given.chunks_exact_mut(t);
            let weights = self.given_weights.chunks_exact_mut(t);
            for (((row, tokens), weights), documents) in windows.zip(weights).zip(documents) {
                window(row, Window { tokens, weights, documents })?;
            }
        } else {
            for (row, tokens) in windows {
                window(row, Window { tokens, weights: &mut [], documents: &mut [] })?;
            }
        }
        let numbers = if weighted { Numbers::OfWindows } else { Numbers::None };
        self.packed.find(sequences, (&self.windows, t + 1), numbers)?;
        Ok(match weighted {
            true => Weighed::of(&self.given_weights[..rows]),
            false => Weighed { sum: rows as f64, targets: rows as u64 },
        })
    }

    /// Takes what the host gives, and tells of its weights.
    pub(super) fn take(
        &mut self,
        sequences: Sequences,
        given: &Given<'_>,
        vocab_size: usize,
    ) -> Result<Weighed> {
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
        if let Some(read) = given.documents {
            read(&mut self.packed.given[..rows]);
        }
        let tokens = (&self.windows[..rows], sequences.length);
        let numbers = given.documents.map_or(Numbers::None, |_| Numbers::OfBatch);
        self.packed.find(sequences, tokens, numbers)?;
        let weights = &mut self.given_weights[..rows];
        let mut weighted = given.weights.is_some();
        match given.weights {
            None => weights.fill(1.0),
            Some(read) => read(weights),
        }
        for (weight, _) in weights.iter_mut().zip(&*targets).filter(|(_, t)| **t == IGNORED) {
            weighted = true;
            *weight = 0.0;
        }
        if let Some((at, weight)) = weights.iter().enumerate().find(|(_, w)| !w.is_finite()) {
            let what = format!("weight {at} of this batch");
            return Err(Error::NotFinite { what, value: *weight });
        }
        (self.sequences, self.filled, self.weighted) = (sequences, Filled::Given, weighted);
        Ok(Weighed::of(weights))
    }

    /// Whether losses have weights.
    pub(super) fn is_weighted(&self) -> bool {
        self.weighted
    }

    /// Whether the host has given row `row` no target.
    pub(super) fn is_ignored(&self, row: usize) -> bool {
        self.filled != Filled::Windows && self.given[row] == IGNORED
    }

    pub(super) fn upload(&mut self, backend: &B) -> Result<()> {
        let Self { tokens, targets, windows, sequences, .. } = self;
        let (t, rows) = (sequences.length, sequences.rows());
        match self.filled {
            Filled::Windows => {
                for (to, first) in [(tokens, 0), (targets, 1)] {
                    backend.write_tokens(to, rows, |to| {
                        let windows = windows.chunks_exact(t + 1);
                        for (to, window) in to.chunks_exact_mut(t).zip(windows) {
                            to.copy_from_slice(&window[first..][..t]);
                        }
                    });
                }
            }
            Filled::Given => {
                backend.write_tokens(tokens, rows, |to| to.copy_from_slice(&windows[..rows]));
                backend.write_tokens(targets, rows, |to| {
                    // Whatever is no target has no weight.
                    let given = self.given.iter().map(|t| if *t == IGNORED { 0 } else { *t });
                    to.iter_mut().zip(given).for_each(|(to, target)| *to = target);
                });
            }
        }
        self.packed.upload(backend, rows);
        match self.weighted {
            true => backend.write_f32(&mut self.weights, 0, &self.given_weights[..rows]),
            false => Ok(()),
        }
    }
}

/// Weights of targets.
#[derive(Clone, Copy)]
pub(super) struct Weighed {
    pub(super) sum: f64,
    /// Those with a weight that is not 0.
    pub(super) targets: u64,
}

impl Weighed {
    fn of(weights: &[f32]) -> Self {
        let sum = weights.iter().map(|weight| f64::from(*weight)).sum();
        let targets = weights.iter().filter(|weight| **weight != 0.0).count() as u64;
        Self { sum, targets }
    }
}

fn out_of_range(what: &str, at: usize, token: u32, vocab_size: usize) -> Error {
    let (source_name, offset) = (format!("the {what} of this batch"), at as u64);
    Error::TokenRange { source_name, offset, token: token.into(), vocab_size }
}
