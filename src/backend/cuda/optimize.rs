//! The end of a step: the sum of losses, the global norm of the gradients, clipping and AdamW, for
//! all parameters at once.
//!
//! The update looks at loss and norm on the device, so that the host waits only once a step, for
//! both numbers together.

use std::ops::Range;

use super::device::launch;
use super::device::memory::{Arena, F32, Masters, Param, Piece, Upload};
use super::step::{Entry, OfMoments, PIECE, Step, THREADS};
use super::{Cuda, Workspace, exchange, kernel, muon};
use crate::Result;
use crate::backend::{FlatGradients, Optimize, Precision, Slot, Trained};
use crate::optim::spam::{Factors, STATISTICS};
use crate::optim::{
    Gradients, Largest, Master, Moments, Optimizer, OptimizerKind, OptimizerStep, StepSums,
    UpdateSums, adamw,
};

/// Blocks a multiprocessor.
const BLOCKS: usize = 8;
/// The same of `update_stored`, as there: all that run at once.
const UPDATE_BLOCKS: usize = 4;
/// Blocks that share a parameter where an update is watched.
const WATCHED_PARTS: usize = 32;

/// What a reduction leaves, and where it finds all parameters.
pub(crate) struct Reduction {
    /// One [`Entry`] a parameter.
    table: Piece,
    upload: Upload,
    /// What the table holds.
    entries: Vec<Entry>,
    /// What it is to hold.
    wanted: Vec<Entry>,
    /// Pieces of all parameters.
    pieces: u64,
    /// (pieces) f64: sums of the squares of gradients.
    pub(super) partials: Piece,
    /// Four f64: losses, squares, clamped blocks, and the losses of an evaluation.
    sums: Piece,
    /// (parameters, 3) words: what a trial of an update found.
    trial: Piece,
    /// The same on the host.
    found: Vec<u32>,
    /// (parameters, 2) f32: scales of what is stored, while those of what will be are chosen; where
    /// the moments of a tensor have one.
    scales: Option<Piece>,
    /// Of StableAdamW alone.
    rates: Option<Rates>,
    /// Of optimizers that normalize gradients.
    normals: Option<Normals>,
    /// Of an optimizer that orthogonalizes.
    muon: Option<muon::Scratch>,
}

/// How the gradients of parameters are normalized, and what it is made from.
struct Normals {
    /// (pieces) u32: largest magnitudes.
    largest: Piece,
    /// (pieces) f64: sums of squares.
    partials: Piece,
    /// (parameters, 3 + [`STATISTICS`]) f32.
    normals: Piece,
}

/// Room for what is found of an update before it is made.
pub(crate) struct UpdateWatch {
    /// (parameters, [`WATCHED_PARTS`], 2) f64.
    partials: Piece,
    /// The same on the host.
    found: Vec<[f64; 2]>,
}

/// Learning rates of the parameters, and what they are made from.
struct Rates {
    /// (pieces) f64: sums of squares.
    partials: Piece,
    /// (parameters, 2) f32: the rate, and it with the correction of first moments.
    rates: Piece,
}

impl Reduction {
    /// Uploads the table, if it changed since the last step.
    fn update_table(&mut self, trained: &Trained<'_, Cuda>) {
        self.wanted.clear();
        let Trained { slots, weights, states, layouts, gradients, .. } = trained;
        let ([m, v, others @ ..], [of_m, of_v, of_others @ ..]) = (&**states, layouts) else {
            panic!("AdamW keeps two states")
        };
        let mut pieces = 0;
        let places = of_m.places.iter().zip(&of_v.places).zip(&gradients.places);
        for (slot, ((place, second), gradient)) in slots.iter().zip(places) {
            let of_one = weights.param(*slot);
            let (param, low) = match of_one.masters {
                Masters::F32(whole) => (whole, 0),
                Masters::Low(low) => (0, low),
            };
            let others = others.iter().zip(of_others);
            let mut others = others.map(|(state, of)| (state, &of.places[slot.index]));
            // Nothing where every step is one of AdamW.
            let ramping = [0; 3].map(|none| match others.next() {
                Some((state, place)) if place.len > 0 => state.address + place.start as u64,
                _ => none,
            });
            self.wanted.push(Entry {
                param,
                low,
                copy: of_one.copy.address,
                m: m.address + place.start as u64,
                // Nothing where there is no such moment, by which kernels pass over a matrix that is
                // updated otherwise, and over what other ranks update.
                v: if second.len > 0 { v.address + second.start as u64 } else { 0 },
                m_scales: m.address + place.scales as u64,
                v_scales: v.address + second.scales as u64,
                gradient: gradients.bytes.address + gradient.start as u64,
                len: slot.len as u64,
                first_piece: pieces,
                decays: u16::from(slot.decays()),
                narrow: u16::from(gradient.precision == Precision::Bf16),
                element: [place.element as u16, second.element as u16],
                amax: of_one.amax.address,
                interval: ramping[0],
                count: ramping[1],
                sum: ramping[2],
            });
            pieces += slot.len.div_ceil(PIECE) as u64;
        }
        self.pieces = pieces;
        if self.wanted != self.entries {
            let words: &[u32] = bytemuck::cast_slice(&self.wanted);
            self.upload.send(self.table.address, words.len(), |to| to.copy_from_slice(words));
            std::mem::swap(&mut self.entries, &mut self.wanted);
        }
    }

    /// The update of some parameters in a row, or with the address of a `trial` what it would leave.
    fn launch_update(
        &mut self,
        cuda: &Cuda,
        workspace: &Workspace,
        (slots, part): (&[Slot], &Range<usize>),
        trial: u64,
        step: &OptimizerStep,
    ) {
        self.launch_updates_by_element(cuda, part, trial, step);
        let (table, sums, largest) = (self.table.address, self.sum(0), self.trial.address);
        let scales = self.scales.as_ref().map_or(0, |scales| scales.address);
        let Some(muon) = &mut self.muon else { return };
        let place = muon::Place { table, sums, trial, largest, scales };
        let matrices = slots[part.clone()].iter();
        let moves = |slot: &&Slot| slot.len > 0 && step.optimizer.orthogonalizes(slot.kind);
        for slot in matrices.filter(moves) {
            muon.update(cuda, workspace, *slot, place, step);
        }
    }

    /// Of those that have a second moment, which are all but matrices of Muon.
    fn launch_updates_by_element(
        &self,
        cuda: &Cuda,
        part: &Range<usize>,
        trial: u64,
        step: &OptimizerStep,
    ) {
        let (table, entries) = (self.table.address, self.entries.len() as u32);
        let Range { start, end } = self.pieces_of(part);
        if start == end {
            return;
        }
        let grid = grid(cuda, BLOCKS, end - start);
        let Optimizer { moments, master, gradients, kind, .. } = step.optimizer;
        if step.optimizer.ramping > 0 {
            launch!(cuda.gpu, "update_ramping", grid, THREADS, 0;
                table, entries, start, end, self.sum(0), trial, Step::new(step));
            return;
        }
        let in_f32 = (Moments::F32, Master::F32, Gradients::F32);
        let is_plain = (moments, master, gradients) == in_f32 && !kind.normalizes();
        if !is_plain {
            let rates = self.rates.as_ref().map_or(0, |rates| rates.rates.address);
            let normals = self.normals.as_ref().map_or(0, |normals| normals.normals.address);
            let scales = match &self.scales {
                Some(scales) if trial == 0 => scales.address,
                _ => 0,
            };
            let kernel = match trial {
                0 => update_kernel(moments, master),
                _ => "update_stored<ANY,EITHER>",
            };
            let grid = self::grid(cuda, UPDATE_BLOCKS, end - start);
            // Blocks whose pieces were all of matrices of Muon would have nothing to do, so that pieces are
            // dealt one by one.
            let run = match kind.orthogonalizes() {
                true => 1,
                false => (end - start).div_ceil(grid[0] as u64),
            };
            launch!(cuda.gpu, kernel, grid, THREADS, 0;
                table, entries, start, end, run, self.sum(0), rates, normals, trial,
                Step::new(step), OfMoments::new(step), scales);
            return;
        }
        match &self.rates {
            None => launch!(cuda.gpu, "adamw", grid, THREADS, 0;
                table, entries, start, end, self.sum(0), trial, Step::new(step)),
            Some(Rates { rates, .. }) => launch!(cuda.gpu, "stable_adamw", grid, THREADS, 0;
                table, entries, start, end, self.sum(0), rates.address, trial, Step::new(step)),
        };
    }

    /// Makes scales of tensors, if these have any, those of what the update will store. Matrices of
    /// Muon have theirs chosen when it is their turn.
    fn choose_scales(&self, cuda: &Cuda, step: &OptimizerStep) {
        let Some(scales) = &self.scales else { return };
        let normals = self.normals.as_ref().map_or(0, |normals| normals.normals.address);
        let (table, entries, sums) = (self.table.address, self.entries.len() as u32, self.sum(0));
        let largest = self.trial.address;
        cuda.clear(largest, 3 * 4 * self.entries.len());
        if step.optimizer.kind.orthogonalizes() {
            return;
        }
        launch!(cuda.gpu, "largest_moments", grid(cuda, BLOCKS, self.pieces), THREADS, 0;
            largest, table, entries, self.pieces, sums, normals, Step::new(step),
            OfMoments::new(step));
        launch!(cuda.gpu, "choose_scales", [1, 1, 1], THREADS, 0;
            scales.address, largest, table, 0u32, entries, sums, Step::new(step));
    }

    /// Pieces of some parameters in a row.
    fn pieces_of(&self, part: &Range<usize>) -> Range<u64> {
        let before = |index: usize| {
            self.entries.get(index).map_or(self.pieces, |entry: &Entry| entry.first_piece)
        };
        before(part.start)..before(part.end)
    }

    fn sum(&self, index: u64) -> u64 {
        self.sums.address + 8 * index
    }
}

/// So many blocks a multiprocessor, or as many as there are pieces.
fn grid(cuda: &Cuda, blocks: usize, pieces: u64) -> [usize; 3] {
    let most = blocks * cuda.gpu.multiprocessors as usize;
    [(pieces as usize).min(most), 1, 1]
}

/// Updates states and weights that are kept in these.
pub(super) fn update_kernel(moments: Moments, master: Master) -> &'static str {
    match (moments, master) {
        (Moments::F32, Master::F32) => "update_stored<F32,WHOLE>",
        (Moments::F32, Master::Split) => "update_stored<F32,HALVES>",
        (Moments::Bf16, Master::F32) => "update_stored<BF16,WHOLE>",
        (Moments::Bf16, Master::Split) => "update_stored<BF16,HALVES>",
        (Moments::Int8, Master::F32) => "update_stored<INT8,WHOLE>",
        (Moments::Int8, Master::Split) => "update_stored<INT8,HALVES>",
        (Moments::Fp8, Master::F32) => "update_stored<E4M3,WHOLE>",
        (Moments::Fp8, Master::Split) => "update_stored<E4M3,HALVES>",
    }
}

impl Optimize for Cuda {
    type Reduction = Reduction;
    type UpdateWatch = UpdateWatch;

    fn reduction(
        &self,
        arena: &mut Arena,
        slots: &[Slot],
        optimizer: &Optimizer,
    ) -> Result<Reduction> {
        let (parameters, what) = (slots.len(), "a table of the parameters");
        let pieces: usize = slots.iter().map(|slot| slot.len.div_ceil(PIECE)).sum();
        let bytes = parameters * size_of::<Entry>();
        let mut found: Vec<u32> = arena.on_host(what, 3 * parameters)?;
        found.resize(found.capacity(), 0);
        Ok(Reduction {
            table: arena.bytes(bytes),
            upload: arena.upload(bytes / 4),
            entries: arena.on_host(what, parameters)?,
            wanted: arena.on_host(what, parameters)?,
            pieces: 0,
            partials: arena.bytes(8 * pieces),
            sums: arena.bytes(4 * 8),
            trial: arena.bytes(3 * 4 * parameters),
            found,
            scales: (optimizer.moments == Moments::Fp8).then(|| arena.bytes(2 * 4 * parameters)),
            rates: (optimizer.kind == OptimizerKind::StableAdamW).then(|| Rates {
                partials: arena.bytes(8 * pieces),
                rates: arena.bytes(2 * 4 * parameters),
            }),
            normals: optimizer.kind.normalizes().then(|| Normals {
                largest: arena.bytes(4 * pieces),
                partials: arena.bytes(8 * pieces),
                normals: arena.bytes(4 * (3 + STATISTICS) * parameters),
            }),
            muon: (optimizer.kind.orthogonalizes())
                .then(|| muon::Scratch::new(arena, slots, optimizer)),
        })
    }

    fn begin_step(&self, workspace: &mut Workspace) {
        self.clear(workspace.clamped.address, 4);
    }

    fn add_losses(
        &self,
        reduction: &mut Reduction,
        (losses, weights): (&F32, Option<&F32>),
        rows: usize,
        accumulate: bool,
    ) {
        let weights = weights.map_or(0, F32::address);
        launch!(self.gpu, "sum_losses", [1, 1, 1], 1024, 0;
            reduction.sum(0), losses.address(), weights, rows as u32, u32::from(accumulate));
    }

    fn scale_gradients(&self, gradients: &mut FlatGradients<Self>, of: &Range<usize>, factor: f32) {
        let all = gradients.all().address;
        // What lies between two of them is 0 and stays so.
        for places in gradients.places[of.clone()].chunk_by(|a, b| a.precision == b.precision) {
            let (Some(first), Some(last)) = (places.first(), places.last()) else { continue };
            let bytes = (last.start + last.bytes() - first.start)
                .next_multiple_of(8 * first.precision.size());
            let elements = bytes / first.precision.size();
            let grid = grid(self, BLOCKS, elements.div_ceil(8 * THREADS) as u64);
            launch!(self.gpu, kernel!(first, "scale_gradients"), grid, THREADS, 0;
                all + first.start as u64, elements as u64, factor);
        }
    }

    fn counts(&self, workspace: &Workspace, reduction: &Reduction) -> Result<(f64, u64)> {
        let (mut losses, mut clamped) = ([0.0], [0u32]);
        self.read(reduction.sum(0), &mut losses)?;
        self.read(workspace.clamped.address, &mut clamped)?;
        Ok((losses[0], clamped[0].into()))
    }

    fn set_losses(&self, reduction: &mut Reduction, losses: f64) -> Result<()> {
        self.write(reduction.sum(0), &[losses])
    }

    fn join_gradients(&self, others: &Piece, gradients: &mut FlatGradients<Self>) {
        exchange::join(&self.gpu, (gradients.all().address, gradients.len()), others.address);
    }

    fn square_gradients(
        &self,
        reduction: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        of: &Range<usize>,
    ) {
        reduction.update_table(trained);
        let (table, entries) = (reduction.table.address, reduction.entries.len() as u32);
        let Range { start, end } = reduction.pieces_of(of);
        if start < end {
            // A warp takes a piece.
            let grid = grid(self, BLOCKS, (end - start).div_ceil(THREADS as u64 / 32));
            launch!(self.gpu, "square_gradients", grid, THREADS, 0;
                reduction.partials.address, table, entries, start, end);
        }
    }

    fn reduce(
        &self,
        workspace: &mut Workspace,
        reduction: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
    ) {
        reduction.update_table(trained);
        let (table, entries) = (reduction.table.address, reduction.entries.len() as u32);
        let (partials, sums, pieces) =
            (reduction.partials.address, reduction.sum(0), reduction.pieces);
        let owned = trained.owned();
        launch!(self.gpu, "sum_squares", [1, 1, 1], 1024, 0;
            sums, workspace.clamped.address, partials, pieces, table, owned.start as u32,
            owned.len() as u32, Step::new(step));
        let grid = grid(self, BLOCKS, pieces);
        if let Some(Normals { largest, partials, normals }) = &reduction.normals {
            let (kept, factors) = (trained.statistics.address(), Factors::new(step));
            let (largest, partials, normals) = (largest.address, partials.address, normals.address);
            launch!(self.gpu, "largest_of_pieces", grid, THREADS, 0;
                largest, table, entries, pieces);
            launch!(self.gpu, "find_limits", [entries as usize, 1, 1], 32, 0;
                normals, largest, kept, table, factors);
            launch!(self.gpu, "squares_of_clipped", grid, THREADS, 0;
                partials, table, entries, pieces, normals);
            launch!(self.gpu, "find_scales", [entries as usize, 1, 1], THREADS, 0;
                normals, partials, table, factors);
        }
        if let Some(Rates { partials, rates }) = &reduction.rates {
            let correction = adamw::correction(step, step.optimizer.beta1);
            match (step.optimizer.moments, step.optimizer.gradients) {
                (Moments::F32, Gradients::F32) => {
                    launch!(self.gpu, "square_ratios", grid, THREADS, 0;
                    partials.address, table, entries, pieces, sums, Step::new(step))
                }
                _ => launch!(self.gpu, "square_stored_ratios", grid, THREADS, 0;
                    partials.address, table, entries, pieces, sums, Step::new(step)),
            };
            launch!(self.gpu, "find_rates", [entries as usize, 1, 1], THREADS, 0;
                rates.address, partials.address, table, correction, Step::new(step));
        }
    }

    fn update(
        &self,
        workspace: &mut Workspace,
        reduction: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
        updated: &mut (dyn FnMut(usize) -> Result<()> + Send),
    ) -> Result<StepSums> {
        reduction.update_table(trained);
        reduction.choose_scales(self, step);
        for (number, part) in trained.parts.iter().enumerate() {
            reduction.launch_update(self, workspace, (trained.slots, part), 0, step);
            updated(number)?;
        }
        if let Some(Normals { normals, .. }) = &reduction.normals {
            let (kept, parameters) = (trained.statistics.address(), trained.slots.len());
            launch!(self.gpu, "keep_statistics", [parameters.div_ceil(THREADS), 1, 1], THREADS, 0;
                kept, normals.address, parameters as u32, reduction.sum(0), Step::new(step));
        }
        let mut found = [0.0; 3];
        self.read(reduction.sum(0), &mut found)?;
        let [losses, squares, clamped] = found;
        Ok(StepSums { losses, squares, raised_blocks: clamped as u64 })
    }

    fn try_update(
        &self,
        workspace: &mut Workspace,
        reduction: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
        _sums: &StepSums,
        largest: &mut (dyn FnMut(Largest) + Send),
    ) -> Result<()> {
        reduction.update_table(trained);
        let (trial, entries) = (reduction.trial.address, reduction.entries.len());
        self.clear(trial, 3 * 4 * entries);
        reduction.launch_update(self, workspace, (trained.slots, &trained.owned()), trial, step);
        let found = &mut reduction.found[..3 * entries];
        self.read(trial, found)?;
        for bits in found.as_chunks::<3>().0 {
            let [weight, m, v] = bits.map(f32::from_bits);
            largest(Largest { weight, states: [m, v] });
        }
        Ok(())
    }

    fn update_watch(&self, arena: &mut Arena, parameters: usize) -> Result<UpdateWatch> {
        let count = parameters * WATCHED_PARTS;
        let mut found: Vec<[f64; 2]> = arena.on_host("what is found of an update", count)?;
        found.resize(found.capacity(), [0.0; 2]);
        Ok(UpdateWatch { partials: arena.bytes(16 * count), found })
    }

    fn watch_update(
        &self,
        UpdateWatch { partials, found: host }: &mut UpdateWatch,
        reduction: &mut Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
        found: &mut (dyn FnMut(UpdateSums) + Send),
    ) -> Result<()> {
        reduction.update_table(trained);
        let (table, entries) = (reduction.table.address, reduction.entries.len());
        let normals = reduction.normals.as_ref().map_or(0, |normals| normals.normals.address);
        launch!(self.gpu, "watch_update", [WATCHED_PARTS, entries, 1], THREADS, 0;
            partials.address, table, reduction.sum(0), normals, Step::new(step),
            OfMoments::new(step));
        let host = &mut host[..entries * WATCHED_PARTS];
        self.read(partials.address, host)?;
        for parts in host.as_chunks::<WATCHED_PARTS>().0 {
            let sum = |of: usize| parts.iter().map(|part| part[of]).sum();
            found(UpdateSums { squares: sum(0), ratios: sum(1) });
        }
        Ok(())
    }

    fn sum_losses(
        &self,
        reduction: &mut Reduction,
        (losses, weights): (&F32, Option<&F32>),
        rows: usize,
    ) -> Result<f64> {
        let weights = weights.map_or(0, F32::address);
        launch!(self.gpu, "sum_losses", [1, 1, 1], 1024, 0;
            reduction.sum(3), losses.address(), weights, rows as u32, 0u32);
        let mut sum = [0.0];
        self.read(reduction.sum(3), &mut sum)?;
        Ok(sum[0])
    }
}

/// Makes the bf16 copy of a parameter that was written.
pub(super) fn copy_to_bf16(cuda: &Cuda, param: &Param<'_>) {
    let len = param.len;
    cuda.clear(param.amax.address, 4);
    launch!(cuda.gpu, "copy_to_bf16", [len.div_ceil(THREADS), 1, 1], THREADS, 0;
        param.copy.address, param.amax.address, param.master(), len as u64);
}

/// Writes a parameter anew, as its master values are kept there, which is another form than here.
pub(super) fn keep_as(cuda: &Cuda, from: &Param<'_>, to: &Param<'_>) {
    let (len, grid) = (from.len as u64, [from.len.div_ceil(THREADS), 1, 1]);
    match (from.masters, to.masters) {
        (Masters::F32(whole), Masters::Low(low)) => {
            cuda.clear(to.amax.address, 4);
            launch!(cuda.gpu, "split_master", grid, THREADS, 0;
                low, to.copy.address, to.amax.address, whole, len);
        }
        (Masters::Low(low), Masters::F32(whole)) => {
            launch!(cuda.gpu, "join_master", grid, THREADS, 0; whole, from.copy.address, low, len);
            copy_to_bf16(cuda, to);
        }
        _ => unreachable!("the forms differ"),
    }
}
