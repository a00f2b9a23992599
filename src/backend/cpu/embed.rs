//! Token and position embedding. The backward pass adds in the order of the tokens, whatever the
//! threads: each job owns some columns of the tables.

use rayon::prelude::*;

use super::attend::pieces;
use super::disjoint::DisjointSlice;
use super::isa::simd_fn;
use super::{Buffer, Cpu, rows_per_job};
use crate::backend::{Documents, Embed, EmbeddingGradients, EmbeddingShape, Sequences};

impl Cpu {
    /// out (rows, C) = the tokens of wte (V, C) and, where there is one, what `position` gives of a
    /// row.
    pub(super) fn embed_rows<'a>(
        &self,
        out: &mut Buffer<f32>,
        tokens: &Buffer<u32>,
        wte: &[f32],
        (rows, channels): (usize, usize),
        position: Option<impl Fn(usize) -> &'a [f32] + Sync>,
    ) {
        let out = &mut out[..rows * channels];
        let per_job = rows_per_job(channels);
        self.install(|| {
            out.par_chunks_mut(per_job * channels).enumerate().for_each(|(job, out)| {
                for (i, out) in out.chunks_exact_mut(channels).enumerate() {
                    let row = job * per_job + i;
                    let token = &wte[tokens[row] as usize * channels..][..channels];
                    match &position {
                        Some(position) => add_rows(self.isa(), out, token, position(row)),
                        None => out.copy_from_slice(token),
                    }
                }
            });
        });
    }
}

/// The position of a row of whole sequences, counted from where its document begins.
pub(super) fn position_of(
    documents: Option<Documents<'_, Cpu>>,
    sequences: Sequences,
    row: usize,
) -> usize {
    let start = documents.map_or(0, |starts| starts[row] as usize);
    (row % sequences.length).saturating_sub(start)
}

/// The position of a row behind others, of which `starts` has one, or one for each.
pub(super) fn position_behind(starts: &[usize], row: usize) -> usize {
    starts.get(row).copied().unwrap_or(starts[0] + row)
}

impl Embed for Cpu {
    fn embedding_forward(
        &self,
        out: &mut Buffer<f32>,
        tokens: &Buffer<u32>,
        documents: Option<Documents<'_, Self>>,
        wte: &[f32],
        wpe: Option<&[f32]>,
        EmbeddingShape { sequences, channels }: EmbeddingShape,
    ) {
        let position = wpe.map(|wpe| {
            move |row| &wpe[position_of(documents, sequences, row) * channels..][..channels]
        });
        self.embed_rows(out, tokens, wte, (sequences.rows(), channels), position);
    }

    fn embedding_backward(
        &self,
        gradients: EmbeddingGradients<'_, Self>,
        dout: &Buffer<f32>,
        tokens: &Buffer<u32>,
        documents: Option<Documents<'_, Self>>,
        EmbeddingShape { sequences, channels }: EmbeddingShape,
    ) {
        let EmbeddingGradients { dwte, dwpe, accumulate } = gradients;
        let t = sequences.length;
        if let Some(dwpe) = dwpe {
            if !accumulate {
                self.zero(dwpe);
            }
            let positions = dwpe[..t * channels].par_chunks_mut(channels).enumerate();
            self.install(|| {
                positions.for_each(|(position, d)| {
                    for b in 0..sequences.batch {
                        for of in pieces(documents, sequences, b).filter(|of| of.len() > position) {
                            let row = b * t + of.start + position;
                            add(self.isa(), d, &dout[row * channels..][..channels]);
                        }
                    }
                });
            });
        }
        let Some(dwte) = dwte else { return };
        // NOTE: tokens repeat, so rows of dwte cannot be given out; columns can.
        const COLUMNS: usize = 64;
        let table = DisjointSlice::new(dwte);
        self.parallel(channels.div_ceil(COLUMNS), |job| {
            let columns = job * COLUMNS..((job + 1) * COLUMNS).min(channels);
            for (row, token) in tokens[..sequences.rows()].iter().enumerate() {
                let from = &dout[row * channels..][columns.clone()];
                let start = *token as usize * channels + columns.start;
                // SAFETY: jobs own disjoint columns.
                let to = unsafe { table.part(start, from.len()) };
                add(self.isa(), to, from);
            }
        });
    }
}

simd_fn! {
    fn add_rows(out: &mut [f32], a: &[f32], b: &[f32]) {
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            *out = a + b;
        }
    }
}

simd_fn! {
    fn add(to: &mut [f32], from: &[f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to += from;
        }
    }
}
