//! One micro-step's tokens, on the host and on the device.

use crate::Result;
use crate::backend::{Backend, Sequences};
use crate::reserve::zeros;

/// One micro-step's tokens, on the host and on the device.
pub(super) struct Batch<B: Backend> {
    pub(super) tokens: B::Tokens,
    pub(super) targets: B::Tokens,
    /// (B, T + 1), read once: inputs are the first T of each row, targets the last T.
    pub(super) windows: Vec<u32>,
    /// Of the batch last filled.
    sequences: Sequences,
}

impl<B: Backend> Batch<B> {
    /// `allocate` is false where the arena only measures.
    pub(super) fn new(
        backend: &B,
        arena: &mut B::Arena,
        sequences: Sequences,
        allocate: bool,
    ) -> Result<Self> {
        let rows = sequences.rows();
        let tokens = if allocate { sequences.batch * (sequences.length + 1) } else { 0 };
        Ok(Self {
            tokens: backend.tokens(arena, rows, true)?,
            targets: backend.tokens(arena, rows, false)?,
            windows: zeros("the tokens of a batch", tokens)?,
            sequences,
        })
    }

    /// Takes the windows that `window(row, out)` writes.
    pub(super) fn fill(
        &mut self,
        sequences: Sequences,
        mut window: impl FnMut(usize, &mut [u32]) -> Result<()>,
    ) -> Result<()> {
        self.sequences = sequences;
        let rows = self.windows.chunks_exact_mut(sequences.length + 1).take(sequences.batch);
        rows.enumerate().try_for_each(|(row, to)| window(row, to))
    }

    pub(super) fn upload(&mut self, backend: &B) {
        let Self { tokens, targets, windows, sequences } = self;
        let t = sequences.length;
        for (to, first) in [(tokens, 0), (targets, 1)] {
            backend.write_tokens(to, sequences.rows(), |to| {
                for (to, window) in to.chunks_exact_mut(t).zip(windows.chunks_exact(t + 1)) {
                    to.copy_from_slice(&window[first..][..t]);
                }
            });
        }
    }
}
