//! Documents that are packed into the sequences of a batch, which attention keeps apart: where each
//! begins and ends, on the host and on the device.
//!
//! A batch of which every sequence is one document takes none of this: it is the batch that it would be
//! if nobody had asked. Nor does it take memory, unless the options have a token that ends documents: a
//! host that gives them makes the first batch that has any allocate.

use crate::backend::{Backend, Documents, Sequences};
use crate::model::OnDevice;
use crate::reserve::zeros;
use crate::run::TrainerOptions;
use crate::{Engine, Error, Result};

/// Whose numbers of documents there are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Numbers {
    None,
    /// Of windows that the host fills: one whose numbers are all the same says nothing of documents.
    OfWindows,
    /// Of a batch of the host's.
    OfBatch,
}

/// The documents of the batch last taken.
pub(super) struct Packed<B: Backend> {
    /// The token that ends one, where nobody says which token belongs to which.
    end: Option<u32>,
    /// (B, T): numbers of documents, as the host gives them.
    pub(super) given: Vec<u32>,
    /// (2, B, T): [`Documents`], and the same on the device; unless options say that there are any,
    /// from the first batch on that has some.
    words: Vec<u32>,
    on_device: Option<B::Tokens>,
    /// Whether a sequence of the batch has more than one.
    are_there: bool,
    /// Why there must not be any.
    mixes: Option<String>,
}

impl<B: Backend> Packed<B> {
    /// With room for those of all rows where the options say that there are some, from the arena;
    /// `allocate` is false where that only measures.
    pub(super) fn new(
        backend: &B,
        arena: &mut B::Arena,
        options: &TrainerOptions,
        allocate: bool,
    ) -> Result<Self> {
        let (end, mixes) = (options.document_end, options.mixes_documents());
        let rows = options.batch_size * options.sequence_length;
        let here = |len| if allocate { len } else { 0 };
        let words = if end.is_some() { here(2 * rows) } else { 0 };
        Ok(Self {
            end,
            given: zeros(WHAT, here(rows))?,
            words: zeros(WHAT, words)?,
            on_device: end.map(|_| backend.tokens(arena, 2 * rows, false)).transpose()?,
            are_there: false,
            mixes,
        })
    }

    /// What the pass over the batch is told.
    pub(super) fn documents(&self) -> Option<Documents<'_, B>> {
        self.on_device.as_ref().filter(|_| self.are_there)
    }

    /// Finds where documents begin in sequences of which `tokens` have those that begin a `stride` apart.
    pub(super) fn find(
        &mut self,
        Sequences { batch, length }: Sequences,
        (tokens, stride): (&[u32], usize),
        numbers: Numbers,
    ) -> Result<()> {
        let Self { end, given, words, are_there, mixes, .. } = self;
        *are_there = false;
        if end.is_none() && numbers == Numbers::None {
            return Ok(());
        }
        let (given, end): (&[u32], _) = (given, *end);
        // Where documents begin in a sequence, besides its first position.
        let begins_of = |sequence: usize| {
            let tokens = &tokens[sequence * stride..][..length];
            let numbered =
                Some(&given[sequence * length..][..length]).filter(|all| match numbers {
                    Numbers::None => false,
                    Numbers::OfWindows => all.windows(2).any(|pair| pair[0] != pair[1]),
                    Numbers::OfBatch => true,
                });
            move |position: usize| match numbered {
                Some(numbers) => numbers[position] != numbers[position - 1],
                None => Some(tokens[position - 1]) == end,
            }
        };
        if !(0..batch).any(|sequence| (1..length).any(begins_of(sequence))) {
            return Ok(());
        }
        if let Some(message) = mixes {
            return Err(Error::invalid("documents", message.clone()));
        }
        let rows = batch * length;
        if words.len() < 2 * rows {
            *words = zeros(WHAT, 2 * rows)?;
        }
        let (starts, ends) = words[..2 * rows].split_at_mut(rows);
        let sequences = starts.chunks_exact_mut(length).zip(ends.chunks_exact_mut(length));
        for (sequence, (starts, ends)) in sequences.enumerate() {
            let begins = begins_of(sequence);
            let (mut start, mut last) = (0, length as u32);
            for (position, to) in starts.iter_mut().enumerate() {
                if position > 0 && begins(position) {
                    start = position as u32;
                }
                *to = start;
            }
            for (position, to) in ends.iter_mut().enumerate().rev() {
                *to = last;
                if position > 0 && begins(position) {
                    last = position as u32;
                }
            }
        }
        *are_there = true;
        Ok(())
    }

    /// Makes room on the device for those of `most` rows, where the batch is the first to have any.
    pub(super) fn make_room(
        &mut self,
        on: &OnDevice<B>,
        engine: &Engine,
        most: usize,
    ) -> Result<()> {
        if self.are_there && self.on_device.is_none() {
            let cut = |arena: &mut B::Arena| on.backend.tokens(arena, 2 * most, false);
            self.on_device = Some(on.allocate(engine, WHAT, cut)?);
        }
        Ok(())
    }

    /// Brings those of so many rows to the device.
    pub(super) fn upload(&mut self, backend: &B, rows: usize) {
        if let Some(to) = self.on_device.as_mut().filter(|_| self.are_there) {
            let words = &self.words[..2 * rows];
            backend.write_tokens(to, words.len(), |to| to.copy_from_slice(words));
        }
    }
}

const WHAT: &str = "where documents begin and end";
