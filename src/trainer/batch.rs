//! One micro-step's tokens, on the host and on the device.

use crate::Result;
use crate::backend::{Backend, Sequences};
use crate::reserve::zeros;

/// One micro-step's tokens, on the host and on the device.
pub(super) struct Batch<B: Backend> {
    pub(super) tokens: B::Tokens,
    pub(super) targets: B::Tokens,
    /// (B, T), then as many targets.
    pub(super) host: Vec<u32>,
    /// T + 1 tokens of one sequence.
    pub(super) window: Vec<u32>,
    /// Rows of the batch last filled.
    pub(super) rows: usize,
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
        let on_host = |len| if allocate { len } else { 0 };
        Ok(Self {
            tokens: backend.tokens(arena, rows)?,
            targets: backend.tokens(arena, rows)?,
            host: zeros("the tokens of a batch", on_host(2 * rows))?,
            window: zeros("the tokens of a sequence", on_host(sequences.length + 1))?,
            rows: 0,
        })
    }

    /// Takes the windows that `window(row, out)` writes apart into inputs and targets.
    pub(super) fn fill(
        &mut self,
        sequences: Sequences,
        mut window: impl FnMut(usize, &mut [u32]) -> Result<()>,
    ) -> Result<()> {
        let t = sequences.length;
        self.rows = sequences.rows();
        let (inputs, targets) = self.host[..2 * self.rows].split_at_mut(self.rows);
        let rows = inputs.chunks_exact_mut(t).zip(targets.chunks_exact_mut(t));
        for (row, (inputs, targets)) in rows.enumerate() {
            window(row, &mut self.window[..=t])?;
            inputs.copy_from_slice(&self.window[..t]);
            targets.copy_from_slice(&self.window[1..=t]);
        }
        Ok(())
    }

    pub(super) fn upload(&mut self, backend: &B) {
        let (inputs, targets) = self.host[..2 * self.rows].split_at(self.rows);
        backend.write_tokens(&mut self.tokens, inputs);
        backend.write_tokens(&mut self.targets, targets);
    }
}
