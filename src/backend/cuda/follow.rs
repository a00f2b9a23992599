//! Slow means of weights, and what is seen of weights from step to step: `follow.cu`.

use super::device::launch;
use super::device::memory::{Arena, F32, Param, Piece, Weights};
use super::quantize::Source;
use super::quantize::values::{self, Matrix};
use super::{Cuda, optimize};
use crate::Result;
use crate::backend::{Follow, Part, Precision, Slot, Track, Values, View, Viewed};
use crate::formats::{self, Observation, OperandId, Rounding};

const THREADS: usize = 256;
/// Thread blocks that observe a weight, and with that the number of partial sums.
const PARTS: usize = 256;
/// Numbers that are observed of a weight, as in the kernels.
const SUMS: usize = 9;

/// Both views of a weight, and what was observed of all.
pub(crate) struct Observer {
    views: [Seen; 2],
    /// One word: an amax.
    amax: Piece,
    /// ([`SUMS`], [`PARTS`]) f64
    partials: Piece,
    /// (weights, [`SUMS`]) f64
    sums: Piece,
    /// The same on the host.
    found: Vec<[f64; SUMS]>,
}

/// A view: (outputs, inputs) f32, and (outputs, blocks).
struct Seen {
    values: Piece,
    block_scales: Piece,
}

/// `Observed` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Observed {
    pub(super) w: u64,
    pub(super) before: u64,
    pub(super) moved: u64,
    pub(super) rounded_moved: u64,
    pub(super) rounded: [u64; 2],
    pub(super) block_scales: [u64; 2],
    pub(super) partials: u64,
    pub(super) len: u64,
    pub(super) inputs: u32,
    pub(super) blocks: u32,
    pub(super) block: u32,
}

fn grid(len: usize) -> [usize; 3] {
    [len.div_ceil(THREADS), 1, 1]
}

impl Follow for Cuda {
    type Observer = Observer;

    fn update_mean(&self, means: &mut F32, slot: Slot, w: Param<'_>, decay: f32) {
        launch!(self.gpu, "update_mean", grid(slot.len), THREADS, 0;
            means.at(slot.start), w.master(), slot.len as u64, decay);
    }

    fn observer(&self, arena: &mut Arena, shapes: &[[usize; 2]]) -> Result<Observer> {
        let padded =
            |[outputs, inputs]: &[usize; 2]| outputs * inputs.next_multiple_of(formats::BLOCK);
        let most = shapes.iter().map(padded).max().unwrap_or(0);
        let mut found: Vec<[f64; SUMS]> = arena.on_host("what is seen of weights", shapes.len())?;
        found.resize(found.capacity().min(shapes.len()), [0.0; SUMS]);
        let mut seen = || Seen {
            values: arena.bytes(4 * most),
            block_scales: arena.bytes(4 * most / formats::NVFP4_BLOCK),
        };
        Ok(Observer {
            found,
            views: [seen(), seen()],
            amax: arena.bytes(4),
            partials: arena.bytes(8 * SUMS * PARTS),
            sums: arena.bytes(8 * SUMS * shapes.len()),
        })
    }

    fn begin_track(&self, track: Track<'_, Self>, w: Param<'_>) {
        let Track { before, moved, rounded_moved, slot } = track;
        let [before, moved, rounded_moved] =
            [before, moved, rounded_moved].map(|flat| flat.at(slot.start));
        launch!(self.gpu, "begin_track", grid(slot.len), THREADS, 0;
            before, moved, rounded_moved, w.master(), slot.len as u64);
    }

    fn view(
        &self,
        observer: &mut Observer,
        view: View,
        values: Values<'_, Self>,
        mean: Option<Part<'_, Self>>,
        of: Viewed<'_>,
    ) {
        let [outputs, inputs] = of.shape;
        let matrix = match values {
            Values::Weight(w) => Matrix::master(&w, outputs, inputs),
            Values::Kept(Part { flat, slot }) => {
                let source = Source { address: flat.at(slot.start), precision: Precision::F32 };
                Matrix::rows(source, outputs, inputs, OperandId::W)
            }
        };
        let by_mean = of.operand.rounding() == Rounding::ByMean;
        let Seen { values, block_scales } = &observer.views[view as usize];
        let to = [values.address, block_scales.address, observer.amax.address];
        values::dequantize(self, matrix.with_mean(mean.filter(|_| by_mean)), of.operand, to);
    }

    fn observe(
        &self,
        observer: &mut Observer,
        track: Track<'_, Self>,
        w: Param<'_>,
        of: Viewed<'_>,
    ) {
        let Viewed { number, shape: [_, inputs], operand } = of;
        let Track { before, moved, rounded_moved, slot } = track;
        let block = operand.format().block().depth();
        let observed = Observed {
            w: w.master(),
            before: before.at(slot.start),
            moved: moved.at(slot.start),
            rounded_moved: rounded_moved.at(slot.start),
            rounded: observer.views.each_ref().map(|view| view.values.address),
            block_scales: observer.views.each_ref().map(|view| view.block_scales.address),
            partials: observer.partials.address,
            len: slot.len as u64,
            inputs: inputs as u32,
            blocks: inputs.div_ceil(block) as u32,
            block: block as u32,
        };
        launch!(self.gpu, "observe", [PARTS, 1, 1], THREADS, 0; observed);
        let sums = observer.sums.address + (8 * SUMS * number) as u64;
        launch!(self.gpu, "add_observations", [1, 1, 1], THREADS, 0;
            sums, observer.partials.address, PARTS as u32);
    }

    fn observations(&self, observer: &mut Observer, to: &mut [Observation]) -> Result<()> {
        self.read(observer.sums.address, &mut observer.found)?;
        to.iter_mut().zip(&observer.found).for_each(|(to, sums)| *to = observation(*sums));
        Ok(())
    }

    fn find_intervals(&self, to: &mut Piece, at: usize, track: Track<'_, Self>, period: f32) {
        let Track { moved, rounded_moved, slot, .. } = track;
        let [moved, rounded_moved] = [moved, rounded_moved].map(|flat| flat.at(slot.start));
        let to = to.address + at as u64;
        launch!(self.gpu, "find_intervals", grid(slot.len), THREADS, 0;
            to, moved, rounded_moved, slot.len as u64, period);
    }

    fn reset(
        &self,
        observer: &Observer,
        track: Track<'_, Self>,
        (weights, param): (&mut Weights, Slot),
        _of: Viewed<'_>,
        threshold: f32,
    ) {
        let Track { moved, rounded_moved, slot, .. } = track;
        let [moved, rounded_moved] = [moved, rounded_moved].map(|flat| flat.at(slot.start));
        let param = weights.param(param);
        let rounded = observer.views[View::After as usize].values.address;
        launch!(self.gpu, "reset_oscillating", grid(slot.len), THREADS, 0;
            param.master(), rounded, moved, rounded_moved, slot.len as u64, threshold);
        optimize::copy_to_bf16(self, &param);
    }
}

/// What the kernels' sums say.
pub(super) fn observation(sums: [f64; SUMS]) -> Observation {
    let [changes, before, rounded_changes, rounded_before, confidence, counts @ .., amax] = sums;
    let [flipped, clipped, oscillating] = counts.map(|count| count as u64);
    let amax = amax as f32;
    Observation {
        changes,
        before,
        rounded_changes,
        rounded_before,
        confidence,
        flipped,
        clipped,
        oscillating,
        amax,
    }
}
