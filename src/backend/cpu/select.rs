//! Positions that blocks keep, and their rows.
//!
//! A selection has T words for every sequence of every block: first the keys of its positions, then
//! the kept ones in their place, so that drawing needs no other memory.

use std::ops::Range;

use rayon::prelude::*;

use super::isa::simd_fn;
use super::{Arena, Buffer, Cpu, rows_per_job};
use crate::backend::{Memory, Select, SelectShape, Selected, SelectedSum, Sequences};
use crate::formats::{Draw, Random};

/// Positions of sequences that blocks keep.
pub struct Selection {
    /// (layers, stride): of a layer (B, T), each sequence's kept positions first.
    positions: Buffer<u32>,
    stride: usize,
}

impl Selection {
    /// The kept positions of a sequence.
    fn of(&self, layer: usize, sequence: usize, shape: SelectShape) -> &[u32] {
        let start = layer * self.stride + sequence * shape.sequences.length;
        &self.positions[start..][..shape.kept]
    }
}

impl Select for Cpu {
    type Selection = Selection;

    fn selection(&self, arena: &mut Arena, sequences: Sequences, layers: usize) -> Selection {
        let stride = sequences.rows().next_multiple_of(Self::ALIGN);
        Selection { positions: arena.alloc(layers * stride), stride }
    }

    fn select_positions(
        &self,
        selection: &mut Selection,
        layers: Range<usize>,
        SelectShape { sequences, kept, .. }: SelectShape,
        random: &Random,
    ) {
        let (first, stride) = (layers.start, selection.stride);
        let of_layers = &mut selection.positions[first * stride..layers.end * stride];
        self.install(|| {
            of_layers.par_chunks_exact_mut(stride).enumerate().for_each(|(i, positions)| {
                let draw = Random { layer: (first + i) as u32, ..*random }.positions();
                let sequences = positions[..sequences.rows()].par_chunks_mut(sequences.length);
                sequences.enumerate().for_each(|(sequence, positions)| {
                    draw_keys(positions, &draw, sequence as u32);
                    keep(self.isa(), positions, kept);
                });
            });
        });
    }

    fn gather_rows(
        &self,
        out: &mut Buffer<f32>,
        x: &Buffer<f32>,
        Selected { selection, layer }: Selected<'_, Self>,
        shape: SelectShape,
    ) {
        let SelectShape { sequences, kept, channels } = shape;
        self.for_each_row(out, sequences.batch * kept, channels, |row, out| {
            let sequence = row / kept;
            let position = selection.of(layer, sequence, shape)[row % kept] as usize;
            let from = (sequence * sequences.length + position) * channels;
            out.copy_from_slice(&x[from..][..channels]);
        });
    }

    fn scatter_rows(
        &self,
        to: &mut Buffer<f32>,
        x: &Buffer<f32>,
        Selected { selection, layer }: Selected<'_, Self>,
        shape: SelectShape,
    ) {
        let channels = shape.channels;
        self.for_each_row(to, shape.sequences.rows(), channels, |row, to| {
            if let Some(kept) = kept_row(selection, layer, row, shape) {
                to.copy_from_slice(&x[kept * channels..][..channels]);
            }
        });
    }

    fn scatter_sum(
        &self,
        SelectedSum { out, base, x, y }: SelectedSum<'_, Self>,
        Selected { selection, layer }: Selected<'_, Self>,
        shape: SelectShape,
    ) {
        let channels = shape.channels;
        self.for_each_row(out, shape.sequences.rows(), channels, |row, out| {
            match kept_row(selection, layer, row, shape) {
                Some(kept) => {
                    let [x, y] = [x, y].map(|rows| &rows[kept * channels..][..channels]);
                    add(self.isa(), out, x, y);
                }
                None => out.copy_from_slice(&base[row * channels..][..channels]),
            }
        });
    }
}

impl Cpu {
    /// Calls `f(number, row)` for the first `rows` rows.
    fn for_each_row(
        &self,
        tensor: &mut [f32],
        rows: usize,
        channels: usize,
        f: impl Fn(usize, &mut [f32]) + Sync + Send,
    ) {
        let per_job = rows_per_job(channels);
        let jobs = tensor[..rows * channels].par_chunks_mut(per_job * channels).enumerate();
        self.install(|| {
            jobs.for_each(|(job, rows)| {
                let rows = rows.chunks_exact_mut(channels).zip(job * per_job..);
                rows.for_each(|(row, number)| f(number, row));
            });
        });
    }
}

/// Which of the kept rows a row is.
fn kept_row(selection: &Selection, layer: usize, row: usize, shape: SelectShape) -> Option<usize> {
    let SelectShape { sequences, kept, .. } = shape;
    let (sequence, position) = (row / sequences.length, row % sequences.length);
    let found = selection.of(layer, sequence, shape).binary_search(&(position as u32));
    found.ok().map(|number| sequence * kept + number)
}

/// [`crate::formats::position_key`] of all positions of a sequence.
fn draw_keys(keys: &mut [u32], draw: &Draw, sequence: u32) {
    for (four, keys) in keys.chunks_mut(4).enumerate() {
        keys.copy_from_slice(&draw.bits(four as u32, sequence)[..keys.len()]);
    }
}

simd_fn! {
    /// Makes keys the positions of the `kept` smallest of them, which begin the result.
    fn keep(keys: &mut [u32], kept: usize) {
        let below = |keys: &[u32], bound: u32| -> usize {
            keys.iter().map(|key| u32::from(*key < bound)).sum::<u32>() as usize
        };
        // The largest number that fewer than `kept` keys are below: the last key that is kept.
        let mut last = 0;
        for bit in (0..32).rev() {
            let larger = last | 1 << bit;
            if below(keys, larger) < kept {
                last = larger;
            }
        }
        let mut equal = kept - below(keys, last);
        let mut found = 0;
        for position in 0..keys.len() {
            let key = keys[position];
            let is_last = key == last && equal > 0;
            equal -= usize::from(is_last);
            if key < last || is_last {
                keys[found] = position as u32;
                found += 1;
            }
        }
    }
}

simd_fn! {
    fn add(sum: &mut [f32], x: &[f32], y: &[f32]) {
        for ((sum, x), y) in sum.iter_mut().zip(x).zip(y) {
            *sum = x + y;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Isa;

    /// Of equal keys, which draws hardly ever have, the first are kept.
    #[test]
    fn the_first_of_equal_keys_are_kept() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for (keys, kept, expected) in [
                (vec![7, 3, 7, 7, 9, 7], 3, vec![0, 1, 2]),
                (vec![u32::MAX; 5], 2, vec![0, 1]),
                (vec![0, u32::MAX, 0, 0], 2, vec![0, 2]),
                (vec![5, 4, u32::MAX], 3, vec![0, 1, 2]),
            ] {
                let mut found = keys.clone();
                keep(isa, &mut found, kept);
                assert_eq!(found[..kept], expected, "{keys:?} on {}", isa.name());
            }
        }
    }
}
