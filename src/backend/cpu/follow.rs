//! Slow means of weights, and what is seen of weights from step to step.

use std::ops::Range;

use rayon::prelude::*;

use super::disjoint::DisjointSlice;
use super::{Arena, Buffer, Cpu, JOB_ELEMENTS};
use crate::Result;
use crate::backend::{Follow, Part, Slot, Track, Values, View, Viewed};
use crate::formats::{
    self, Bits, Observation, Observed, Operand, OperandId, Random, Rounding, VECTORS_AT_ONCE,
    Vectors, ema, oscillates,
};
use crate::optim::ramping;
use crate::reserve::zeros;

/// Both views of a weight, and what was observed of all.
pub struct Observer {
    views: [Seen; 2],
    observations: Vec<Observation>,
}

/// A view.
struct Seen {
    /// (outputs, padded inputs)
    values: Buffer<f32>,
    /// (outputs, blocks)
    block_scales: Buffer<f32>,
}

/// How long a weight's vectors are in a view, and how many scales they have.
fn lengths(operand: &Operand, inputs: usize) -> [usize; 2] {
    let block = operand.format().block().depth();
    let depth = inputs.next_multiple_of(block);
    [depth, depth / block]
}

impl Follow for Cpu {
    type Observer = Observer;

    fn update_mean(&self, means: &mut Buffer<f32>, slot: Slot, w: &[f32], decay: f32) {
        self.install(|| {
            means[slot.range()]
                .par_chunks_mut(JOB_ELEMENTS)
                .zip(w.par_chunks(JOB_ELEMENTS))
                .for_each(|(means, w)| {
                    means.iter_mut().zip(w).for_each(|(mean, w)| *mean = ema(*mean, *w, decay));
                });
        });
    }

    fn observer(&self, arena: &mut Arena, shapes: &[[usize; 2]]) -> Result<Observer> {
        let padded =
            |[outputs, inputs]: &[usize; 2]| outputs * inputs.next_multiple_of(formats::BLOCK);
        let most = shapes.iter().map(padded).max().unwrap_or(0);
        let mut seen = || Seen {
            values: arena.alloc(most),
            block_scales: arena.alloc(most / formats::NVFP4_BLOCK),
        };
        let views = [seen(), seen()];
        Ok(Observer { views, observations: zeros("what is seen of weights", shapes.len())? })
    }

    fn begin_track(&self, track: Track<'_, Self>, w: &[f32]) {
        let range = track.slot.range();
        track.before[range.clone()].copy_from_slice(w);
        self.zero(&mut track.moved[range.clone()]);
        self.zero(&mut track.rounded_moved[range]);
    }

    fn view(
        &self,
        observer: &mut Observer,
        view: View,
        values: Values<'_, Self>,
        mean: Option<Part<'_, Self>>,
        of: Viewed<'_>,
    ) {
        let data = match values {
            Values::Weight(w) => w,
            Values::Kept(Part { flat, slot }) => &flat[slot.range()],
        };
        let by_mean = of.operand.rounding() == Rounding::ByMean;
        let means =
            mean.filter(|_| by_mean).map_or(&[][..], |Part { flat, slot }| &flat[slot.range()]);
        self.see(&mut observer.views[view as usize], data, means, of);
    }

    fn observe(&self, observer: &mut Observer, track: Track<'_, Self>, w: &[f32], of: Viewed<'_>) {
        let Viewed { number, shape: [outputs, inputs], operand } = of;
        let [before, after] = &observer.views;
        let range = track.slot.range();
        let rows = Rows {
            inputs,
            lengths: lengths(operand, inputs),
            w,
            before: DisjointSlice::new(&mut track.before[range.clone()]),
            moved: DisjointSlice::new(&mut track.moved[range.clone()]),
            rounded_moved: DisjointSlice::new(&mut track.rounded_moved[range]),
            views: [before, after],
        };
        observer.observations[number] = self.install(|| rows.observe(0..outputs));
    }

    fn observations(&self, observer: &mut Observer, to: &mut [Observation]) -> Result<()> {
        to.copy_from_slice(&observer.observations);
        Ok(())
    }

    fn find_intervals(&self, to: &mut Buffer<u8>, at: usize, track: Track<'_, Self>, period: f32) {
        let range = track.slot.range();
        let to: &mut [f32] = bytemuck::cast_slice_mut(&mut to[at..][..4 * range.len()]);
        let (moved, rounded_moved) = (&track.moved[range.clone()], &track.rounded_moved[range]);
        self.install(|| {
            let all = to.par_iter_mut().with_min_len(JOB_ELEMENTS);
            let moved = moved.par_iter().zip(rounded_moved);
            all.zip(moved).for_each(|(to, (moved, rounded_moved))| {
                *to = ramping::interval(*moved, *rounded_moved, period);
            });
        });
    }

    fn reset(
        &self,
        observer: &Observer,
        track: Track<'_, Self>,
        (weights, slot): (&mut Buffer<f32>, Slot),
        of: Viewed<'_>,
        threshold: f32,
    ) {
        let Viewed { shape: [_, inputs], operand, .. } = of;
        let [depth, _] = lengths(operand, inputs);
        let Seen { values, .. } = &observer.views[View::After as usize];
        let range = track.slot.range();
        let (moved, rounded_moved) = (&track.moved[range.clone()], &track.rounded_moved[range]);
        let rows = weights[slot.range()].chunks_exact_mut(inputs).zip(values.chunks(depth));
        let moved = moved.chunks(inputs).zip(rounded_moved.chunks(inputs));
        for ((w, values), (moved, rounded_moved)) in rows.zip(moved) {
            for i in 0..inputs {
                if oscillates(moved[i], rounded_moved[i], threshold) {
                    w[i] = values[i];
                }
            }
        }
    }
}

impl Cpu {
    fn see(&self, seen: &mut Seen, data: &[f32], means: &[f32], of: Viewed<'_>) {
        let Viewed { shape: [outputs, inputs], operand, .. } = of;
        let [depth, blocks] = lengths(operand, inputs);
        let needs_amax = formats::needs_amax(operand.format());
        let amax = if needs_amax { self.amax_of(data) } else { 0.0 };
        let tensor = formats::tensor_scale(operand, amax);
        let draw = Random::NONE.rounding(OperandId::W);
        let bits = Bits { elements: draw, scales: draw, transposed: false };
        let (values, block_scales) =
            (DisjointSlice::new(&mut seen.values), DisjointSlice::new(&mut seen.block_scales));
        self.parallel(outputs.div_ceil(VECTORS_AT_ONCE), |job| {
            let first = job * VECTORS_AT_ONCE;
            let count = VECTORS_AT_ONCE.min(outputs - first);
            let of_these = first * inputs..(first + count) * inputs;
            // SAFETY: jobs own disjoint vectors.
            let (values, block_scales) = unsafe {
                (
                    values.part(first * depth, count * depth),
                    block_scales.part(first * blocks, count * blocks),
                )
            };
            let rows = data[of_these.clone()].chunks_exact(inputs);
            for (to, row) in values.chunks_exact_mut(depth).zip(rows) {
                to[..inputs].copy_from_slice(row);
                to[inputs..].fill(0.0);
            }
            let means = means.get(of_these).unwrap_or_default();
            let vectors = Vectors { values, scales: &mut [], depth, first, means, block_scales };
            formats::quantize_vectors(vectors, operand, tensor, &bits);
            values.iter_mut().for_each(|v| *v *= tensor.decode);
        });
    }
}

/// The rows of a weight that is observed.
struct Rows<'a> {
    inputs: usize,
    /// Of the views.
    lengths: [usize; 2],
    w: &'a [f32],
    before: DisjointSlice<f32>,
    moved: DisjointSlice<f32>,
    rounded_moved: DisjointSlice<f32>,
    views: [&'a Seen; 2],
}

impl Rows<'_> {
    /// Sums in halves of halves, whatever the threads.
    fn observe(&self, rows: Range<usize>) -> Observation {
        if rows.len() > 1 && rows.len() * self.inputs > JOB_ELEMENTS {
            let middle = rows.start + rows.len() / 2;
            let (left, right) =
                rayon::join(|| self.observe(rows.start..middle), || self.observe(middle..rows.end));
            return left.and(right);
        }
        let mut sums = Observation::default();
        rows.for_each(|row| self.observe_row(row, &mut sums));
        sums
    }

    fn observe_row(&self, row: usize, sums: &mut Observation) {
        let Self { inputs, lengths: [depth, blocks], w, views, .. } = *self;
        let block = depth / blocks;
        let start = row * inputs;
        // SAFETY: every row is observed once.
        let (before, moved, rounded_moved) = unsafe {
            (
                self.before.part(start, inputs),
                self.moved.part(start, inputs),
                self.rounded_moved.part(start, inputs),
            )
        };
        for (i, after) in w[start..start + inputs].iter().enumerate() {
            let seen = Observed {
                weights: [before[i], *after],
                rounded: views.map(|view| view.values[row * depth + i]),
                block_scales: views.map(|view| view.block_scales[row * blocks + i / block]),
            };
            seen.add_to(sums, [&mut moved[i], &mut rounded_moved[i]]);
            before[i] = *after;
        }
    }
}
