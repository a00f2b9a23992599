//! Documents that are packed into the sequences of a batch, which attention keeps apart: where each
//! begins and ends, on the host and on the device.
//!
//! A batch of which every sequence is one document takes none of this: it is the batch that it would be
//! if nobody had asked. Nor does it take memory, unless the options have a token that ends documents: a
//! host that gives them makes the first batch that has any allocate.

use crate::backend::{Backend, Documents, Sequences, document_bytes};
use crate::model::OnDevice;
use crate::reserve::zeros;
use crate::run::TrainerOptions;
use crate::{Engine, Error, Result};

/// The documents of the batch last taken.
pub(super) struct Packed<B: Backend> {
    /// The token that ends one, where nobody says which token belongs to which.
    end: Option<u32>,
    /// (B, T): numbers of documents, as the host gives them.
    pub(super) given: Vec<u32>,
    /// (2, B, T): [`Documents`], and the same on the device, from the first batch on that has any.
    words: Vec<u32>,
    on_device: Option<B::Bytes>,
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
        let has_room = |rows| if end.is_some() && allocate { rows } else { 0 };
        Ok(Self {
            end,
            given: zeros(WHAT, has_room(rows))?,
            words: zeros(WHAT, has_room(2 * rows))?,
            on_device: end.map(|_| backend.bytes(arena, document_bytes(rows))),
            are_there: false,
            mixes,
        })
    }

    /// What the pass over the batch is told.
    pub(super) fn documents(&self) -> Option<Documents<'_, B>> {
        self.on_device.as_ref().filter(|_| self.are_there)
    }

    /// Room for the numbers that the host gives of so many rows, each 0.
    pub(super) fn zeroed(&mut self, rows: usize) -> Result<&mut [u32]> {
        if self.given.len() < rows {
            self.given = zeros(WHAT, rows)?;
        }
        let given = &mut self.given[..rows];
        given.fill(0);
        Ok(given)
    }

    /// Finds where documents begin: where the numbers `given` change, where there are such and they
    /// do, or else behind tokens that end one, in rows `tokens` that begin a `stride` apart.
    pub(super) fn find(
        &mut self,
        sequences: Sequences,
        (tokens, stride): (&[u32], usize),
        is_given: bool,
    ) -> Result<()> {
        let Self { end, given, words, are_there, mixes, .. } = self;
        let Sequences { length, .. } = sequences;
        let rows = sequences.rows();
        *are_there = false;
        let of_row = |row: usize| (row / length, row % length);
        let changes = |row: usize| given[row] != given[row - 1];
        let is_end = |row: usize| {
            let (sequence, position) = of_row(row);
            Some(tokens[sequence * stride + position - 1]) == *end
        };
        let within = || (0..rows).filter(|row| row % length > 0);
        let is_given = is_given && within().any(changes);
        let begins = |row: usize| if is_given { changes(row) } else { is_end(row) };
        if !is_given && (end.is_none() || !within().any(is_end)) {
            return Ok(());
        }
        if let Some(message) = mixes {
            return Err(Error::invalid("documents", message.clone()));
        }
        if words.len() < 2 * rows {
            *words = zeros(WHAT, 2 * rows)?;
        }
        let (starts, ends) = words[..2 * rows].split_at_mut(rows);
        let mut start = 0;
        for (row, to) in starts.iter_mut().enumerate() {
            let (_, position) = of_row(row);
            if position == 0 || begins(row) {
                start = position as u32;
            }
            *to = start;
        }
        let mut end = 0;
        for (row, to) in ends.iter_mut().enumerate().rev() {
            let (_, position) = of_row(row);
            if position + 1 == length || begins(row + 1) {
                end = position as u32 + 1;
            }
            *to = end;
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
            let cut = |arena: &mut B::Arena| Ok(on.backend.bytes(arena, document_bytes(most)));
            self.on_device = Some(on.allocate(engine, WHAT, cut)?);
        }
        Ok(())
    }

    /// Brings those of so many rows to the device.
    pub(super) fn upload(&mut self, backend: &B, rows: usize) -> Result<()> {
        match self.on_device.as_mut().filter(|_| self.are_there) {
            None => Ok(()),
            Some(to) => backend.write_bytes(to, 0, bytemuck::cast_slice(&self.words[..2 * rows])),
        }
    }
}

const WHAT: &str = "where documents begin and end";
