//! The gradients of a step that lanes and ranks share: which micro-steps are made here, and how what
//! comes of them becomes the same sum on every rank.
//!
//! A lane adds its micro-steps up where gradients lie, in the products themselves. A rank joins its
//! lanes to a part of one tree of sums (`comm/tree.rs`); then each rank gets a slice of all parts, adds
//! them in the order of the tree, and hands the sum to all others. So every rank has the same
//! gradients, bit for bit, of which it makes the same update.
//!
//! Devices that reach each other do it bucket by bucket, while the backward pass goes on
//! (`backend/exchange.rs`). Others do it behind the pass, through the host's memory.
//!
//! Every rank keeps all states of the optimizer and makes all of the update, or those of its own
//! parameters alone, which it then gives to all others. Devices that reach each other give a rank then
//! the sums of its own gradients alone.

use std::ops::Range;
use std::time::Instant;

use super::owners::Owners;
use crate::backend::{Backend, Bucket, FlatGradients, Reached, Slot, as_one};
use crate::comm::wire::{self, Drawn, Sent};
use crate::comm::{Call, Counts, Joins, Ranks, Share, Wire, sum_parts};
use crate::gpt::ParamTable;
use crate::optim::{Largest, StepSums};
use crate::reserve::{collect, reserve, zeros};
use crate::{Error, Result};

/// Slices are of whole pieces, so that none ends within a vector of any kernel.
const PIECE: usize = 4096;
/// Elements that are exchanged at once through the host.
const BUCKET: usize = 1 << 22;
/// Bytes that devices exchange at once: at least so many where a block has less, since short messages
/// are slow, and twice as many at most, for which there has to be room.
const MESSAGE: usize = 64 << 20;

/// What a step needs besides gradients where it has lanes.
pub(super) struct Exchange<B: Backend> {
    pub(super) share: Share,
    /// Sums of lanes, with their losses, until others are added to them.
    kept: Vec<B::Bytes>,
    losses: Vec<f64>,
    in_use: usize,
    /// In which this rank waited for others, in a step.
    pub(super) seconds: f64,
    /// Of devices that reach each other; others go through the host.
    buckets: Option<B::Buckets>,
    pub(super) owners: Owners,
    /// On the host: what goes to others and comes back, and what comes from them.
    send: Vec<f32>,
    receive: Vec<f32>,
    /// Both again, as they are sent, where that is not f32.
    packed: Vec<u8>,
    /// The same of a tensor, and those of all ranks, where these are given around.
    mine: Vec<f32>,
    all: Vec<f32>,
}

impl<B: Backend> Exchange<B> {
    pub(super) fn new(
        backend: &B,
        arena: &mut B::Arena,
        ((table, slots), gradients, owners): ((&ParamTable, &[Slot]), &FlatGradients<B>, Owners),
        share: Share,
        ranks: Option<&Ranks>,
        allocates: bool,
    ) -> Result<(Self, Vec<Range<usize>>)> {
        const WHAT: &str = "gradients that ranks exchange";
        let mut parts = owners.in_parts(slots)?;
        let wire = ranks.map_or(Wire::F32, |ranks| ranks.wire);
        let buckets = match ranks {
            Some(_) => {
                let all = buckets(table, gradients)?;
                backend.buckets(arena, all, (slots, gradients), &parts, wire)?
            }
            None => None,
        };
        let most = Joins::most_kept(share.lanes);
        let kept = (0..most).map(|_| backend.bytes(arena, gradients.len())).collect();
        let parts = match ranks.filter(|_| owners.is_shared()) {
            Some(ranks) => parts.swap_remove(ranks.rank()),
            None => collect(WHAT, [Ok(0..slots.len())])?,
        };
        let elements = gradients.len() / size_of::<f32>();
        let staged = ranks.filter(|_| allocates && buckets.is_none());
        let bucket = staged.map_or(0, |ranks| bucket(elements, ranks.size()));
        // A tensor of this rank, and one of each.
        let [mine, all] = staged.map_or([0; 2], |ranks| most_at_once(slots, &owners, ranks));
        let exchange = Self {
            share,
            kept,
            losses: zeros(WHAT, most)?,
            in_use: 0,
            seconds: 0.0,
            buckets,
            owners,
            mine: zeros(WHAT, mine)?,
            all: zeros(WHAT, all)?,
            send: zeros(WHAT, bucket)?,
            receive: zeros(WHAT, bucket)?,
            packed: zeros(WHAT, if wire == Wire::F32 { 0 } else { 2 * wire.bytes(bucket) })?,
        };
        Ok((exchange, parts))
    }

    /// Whether ranks give weights to each other from device to device, so that they have to meet again
    /// where weights have moved.
    pub(super) fn gives_weights(&self) -> bool {
        self.buckets.is_some() && self.owners.is_shared()
    }

    /// The parameters whose gradients are the sum of all ranks' here, by their numbers, of `all`; those
    /// that this rank updates are in parts.
    pub(super) fn summed(&self, owned: &[Range<usize>], all: usize) -> Range<usize> {
        if self.gives_weights() { as_one(owned) } else { 0..all }
    }

    /// Lets the devices of ranks reach each other's memory, which all ranks do before a step.
    pub(super) fn meet(&mut self, backend: &B, of: &Reached<'_, B>, ranks: &Ranks) -> Result<()> {
        let Some(buckets) = &mut self.buckets else { return Ok(()) };
        let exported = backend.export(buckets, of).and_then(|exported| {
            let all = zeros("what ranks reach memory by", exported.len() * ranks.size())?;
            Ok((exported, all))
        });
        let agreed = ranks.agree(Call::Link, exported.as_ref().map(drop));
        let (exported, mut all) = exported?;
        agreed?;
        ranks.all_gather(&exported, &mut all)?;
        let mapped = backend.map(buckets, of, &all);
        let agreed = ranks.agree(Call::Link, mapped.as_ref().copied());
        mapped.and(agreed)
    }

    /// Gives all ranks what this one has summed up of its gradients, behind
    /// [`crate::backend::Optimize::square_gradients`], where it has the sums of these alone.
    pub(super) fn give_squares(&mut self, backend: &B) -> Result<()> {
        let Some(mut buckets) = self.buckets.take_if(|_| self.owners.is_shared()) else {
            return Ok(());
        };
        let started = Instant::now();
        let given = backend.give_squares(&mut buckets);
        self.seconds += started.elapsed().as_secs_f64();
        self.keep(backend, buckets, given)
    }

    /// Makes an update of the parameters that this rank owns, of which it gives every part to all
    /// ranks, and takes theirs, where devices do that by themselves.
    pub(super) fn update(
        &mut self,
        backend: &B,
        make: impl FnOnce(&mut (dyn FnMut(usize) -> Result<()> + Send)) -> Result<StepSums> + Send,
    ) -> Result<StepSums> {
        let Some(mut buckets) = self.buckets.take_if(|_| self.owners.is_shared()) else {
            return backend.scope(|| make(&mut |_| Ok(())));
        };
        backend.begin_gather(&mut buckets);
        let mut seconds = 0.0;
        let made = backend.scope(|| {
            make(&mut |part| {
                seconds += backend.give(&buckets, part)?;
                Ok(())
            })
        });
        self.seconds += seconds;
        let given = made.and_then(|sums| backend.end_exchange(&mut buckets).map(|()| sums));
        self.keep(backend, buckets, given)
    }

    /// Keeps buckets for the next exchange, whatever came of this one.
    fn keep<T>(&mut self, backend: &B, mut buckets: B::Buckets, of: Result<T>) -> Result<T> {
        if of.is_err() {
            backend.abort_exchange(&mut buckets);
        }
        self.buckets = Some(buckets);
        of
    }

    /// Gives all ranks the weights that this one has updated, where each updates some and that goes
    /// through the host: the first tensors of all ranks, then the second ones.
    pub(super) fn gather(
        &mut self,
        backend: &B,
        weights: &mut B::Weights,
        slots: &[Slot],
        ranks: &Ranks,
    ) -> Result<()> {
        if self.buckets.is_some() {
            return Ok(());
        }
        let started = Instant::now();
        let (all, mine) = (0..ranks.size(), ranks.rank());
        for round in 0..self.owners.most() {
            let of = |rank: usize| {
                let slot = slots[self.owners.of(rank)].get(round);
                slot.filter(|slot| slot.len > 0)
            };
            let len = |rank: usize| of(rank).map_or(0, |slot| slot.len);
            // Where those of a rank come, behind all before.
            let place = |rank: usize| (0..rank).map(len).sum::<usize>();
            let longest = all.clone().map(len).max().unwrap_or(0);
            if longest == 0 {
                continue;
            }
            let own = &mut self.mine[..len(mine)];
            if let Some(slot) = of(mine) {
                backend.read_param(weights, *slot, own)?;
            }
            let gathered = &mut self.all[..place(ranks.size())];
            let to: &mut [u8] = bytemuck::cast_slice_mut(gathered);
            let mut take = |rank: usize, at: usize, part: &[u8]| {
                let rest = (4 * len(rank)).saturating_sub(at).min(part.len());
                to[4 * place(rank)..][at.min(4 * len(rank))..][..rest]
                    .copy_from_slice(&part[..rest]);
            };
            let (own, room) = (bytemuck::cast_slice(own), &mut self.receive);
            let room = bytemuck::cast_slice_mut(room);
            ranks.all_gather_in_parts(own, 4 * longest, room, &mut take)?;
            for rank in all.clone().filter(|rank| *rank != mine) {
                if let Some(slot) = of(rank) {
                    backend.write_param(weights, *slot, &gathered[place(rank)..][..slot.len])?;
                }
            }
        }
        self.seconds += started.elapsed().as_secs_f64();
        Ok(())
    }

    /// Whether a step is the sum of several.
    pub(super) fn has_lanes(&self) -> bool {
        !self.kept.is_empty()
    }

    /// In a backward pass, behind that of a block.
    pub(super) fn block_is_done(&self, backend: &B, block: usize) {
        if let Some(buckets) = &self.buckets {
            backend.block_is_done(buckets, block);
        }
    }

    /// Takes what a lane has added up, and adds it to what was kept, as far as the tree is known.
    /// The last is left to [`Exchange::sum`] where it is joined while it is exchanged.
    pub(super) fn join(
        &mut self,
        backend: &B,
        workspace: &B::Workspace,
        reduction: &mut B::Reduction,
        gradients: &mut FlatGradients<B>,
        lane: usize,
    ) -> Result<()> {
        if lane == 0 {
            self.in_use = 0;
        }
        let Joins { joined, is_kept } = Joins::of(lane, self.share.lanes);
        if !is_kept && self.buckets.is_some() {
            debug_assert_eq!(joined, self.in_use);
            return Ok(());
        }
        let (mut losses, _) = backend.counts(workspace, reduction)?;
        for _ in 0..joined {
            self.in_use -= 1;
            backend.scope(|| backend.join_gradients(&self.kept[self.in_use], gradients));
            losses += self.losses[self.in_use];
        }
        if is_kept {
            let len = gradients.len();
            backend.scope(|| {
                backend.copy_bytes(gradients.all(), len, &mut self.kept[self.in_use]);
            });
            self.losses[self.in_use] = losses;
            self.in_use += 1;
            return Ok(());
        }
        backend.set_losses(reduction, losses)
    }

    /// Makes the gradients of this rank and its losses the sum of all ranks'; what all of them count,
    /// given what this one divides its losses by. What it queues comes behind the backward pass of this
    /// rank.
    pub(super) fn sum(
        &mut self,
        backend: &B,
        (workspace, reduction): (&B::Workspace, &mut B::Reduction),
        gradients: &mut FlatGradients<B>,
        divisor: f64,
        (ranks, drawn): (&Ranks, Drawn),
    ) -> Result<Counts> {
        let Some(mut buckets) = self.buckets.take() else {
            let counts = self.sum_counts(backend, workspace, reduction, divisor, ranks)?;
            let started = Instant::now();
            match ranks.wire {
                Wire::F32 => self.sum_on_host(backend, gradients, ranks)?,
                _ => self.sum_rounded_on_host(backend, gradients, (ranks, drawn))?,
            }
            self.seconds += started.elapsed().as_secs_f64();
            backend.set_losses(reduction, counts.losses)?;
            return Ok(counts);
        };
        let exchanged = (|| {
            let kept = &self.kept[..self.in_use];
            backend.begin_exchange(&mut buckets, gradients, kept, drawn)?;
            // While the last of it is on its way, and broken connections show at once.
            let counts = self.sum_counts(backend, workspace, reduction, divisor, ranks)?;
            backend.set_losses(reduction, counts.losses)?;
            let started = Instant::now();
            backend.end_exchange(&mut buckets)?;
            self.seconds += started.elapsed().as_secs_f64();
            Ok(counts)
        })();
        self.keep(backend, buckets, exchanged)
    }

    /// What all ranks count, once this one's device has done its part.
    fn sum_counts(
        &mut self,
        backend: &B,
        workspace: &B::Workspace,
        reduction: &B::Reduction,
        divisor: f64,
        ranks: &Ranks,
    ) -> Result<Counts> {
        let (mut losses, raised_blocks) = backend.counts(workspace, reduction)?;
        // Those that are joined while they are exchanged.
        while self.in_use > 0 {
            self.in_use -= 1;
            losses += self.losses[self.in_use];
        }
        let started = Instant::now();
        let counts = ranks.sum(Counts { losses, divisor, raised_blocks });
        self.seconds += started.elapsed().as_secs_f64();
        counts
    }

    fn sum_on_host(
        &mut self,
        backend: &B,
        gradients: &mut FlatGradients<B>,
        ranks: &Ranks,
    ) -> Result<()> {
        let (size, elements) = (ranks.size(), gradients.len() / size_of::<f32>());
        let Self { send, receive, .. } = self;
        let (mut start, most) = (0, send.len());
        while start < elements {
            let here = most.min(elements - start);
            let slice = here.div_ceil(size).next_multiple_of(PIECE);
            let (send, receive) = (&mut send[..slice * size], &mut receive[..slice * size]);
            let at = start * size_of::<f32>();
            backend.read_bytes(gradients.all(), at, bytemuck::cast_slice_mut(&mut send[..here]))?;
            send[here..].fill(0.0);
            ranks.all_to_all(bytemuck::cast_slice(send), bytemuck::cast_slice_mut(receive))?;
            sum_parts(receive, size);
            let sum = bytemuck::cast_slice(&receive[..slice]);
            ranks.all_gather(sum, bytemuck::cast_slice_mut(send))?;
            backend.write_bytes(gradients.all_mut(), at, bytemuck::cast_slice(&send[..here]))?;
            start += here;
        }
        Ok(())
    }

    /// The same of what is rounded where it is sent.
    fn sum_rounded_on_host(
        &mut self,
        backend: &B,
        gradients: &mut FlatGradients<B>,
        (ranks, drawn): (&Ranks, Drawn),
    ) -> Result<()> {
        let (size, rank, wire) = (ranks.size(), ranks.rank(), ranks.wire);
        let elements = gradients.len() / size_of::<f32>();
        let Self { send: numbers, receive: parts, packed, .. } = self;
        let [own, of_sum] = [Sent::Own, Sent::Sum].map(|sent| drawn.rounding(rank, sent));
        let (mut start, most, signs) = (0, numbers.len(), drawn.signs());
        while start < elements {
            let here = most.min(elements - start);
            let slice = here.div_ceil(size).next_multiple_of(PIECE);
            let (numbers, parts) = (&mut numbers[..slice * size], &mut parts[..slice * size]);
            let message = wire.bytes(slice);
            let (sent, rest) = packed.split_at_mut(message * size);
            let came = &mut rest[..message * size];
            let at = start * size_of::<f32>();
            backend.read_bytes(
                gradients.all(),
                at,
                bytemuck::cast_slice_mut(&mut numbers[..here]),
            )?;
            numbers[here..].fill(0.0);
            if wire.rotates() {
                wire::rotate_all(numbers, signs);
            }
            let first = |rank: usize| start + rank * slice;
            let to_all = numbers.chunks_exact(slice).zip(sent.chunks_exact_mut(message));
            for (to, (numbers, sent)) in to_all.enumerate() {
                wire::pack(wire, numbers, first(to), &own, sent);
            }
            ranks.all_to_all(sent, came)?;
            let of_all = parts.chunks_exact_mut(slice).zip(came.chunks_exact(message));
            for (from, (part, came)) in of_all.enumerate() {
                match from == rank {
                    true => part.copy_from_slice(&numbers[rank * slice..][..slice]),
                    false => wire::unpack(wire, came, part),
                }
            }
            sum_parts(parts, size);
            let sum = &mut sent[..message];
            wire::pack(wire, &parts[..slice], first(rank), &of_sum, sum);
            ranks.all_gather(sum, came)?;
            let of_all = numbers.chunks_exact_mut(slice).zip(came.chunks_exact(message));
            of_all.for_each(|(sum, came)| wire::unpack(wire, came, sum));
            if wire.rotates() {
                wire::rotate_back(numbers, signs);
            }
            // What was rotated with the ends of parameters stays 0.
            for tail in gradients.tails().filter(|_| wire.rotates()) {
                let [from, to] = [tail.start, tail.end]
                    .map(|byte| (byte / size_of::<f32>()).clamp(start, start + here) - start);
                numbers[from..to].fill(0.0);
            }
            let sums = bytemuck::cast_slice(&numbers[..here]);
            backend.write_bytes(gradients.all_mut(), at, sums)?;
            start += here;
        }
        Ok(())
    }
}

/// Elements of a bucket: of so many ranks whole pieces each, and no more than there are in all.
fn bucket(elements: usize, ranks: usize) -> usize {
    let most = BUCKET.min(elements);
    most.div_ceil(ranks).next_multiple_of(PIECE) * ranks
}

/// Elements of the longest tensor that this rank owns, and of those that all ranks give around at once.
fn most_at_once(slots: &[Slot], owners: &Owners, ranks: &Ranks) -> [usize; 2] {
    if !owners.is_shared() {
        return [0; 2];
    }
    let of = |rank: usize| slots[owners.of(rank)].iter().map(|slot| slot.len);
    let in_round = |round| (0..ranks.size()).filter_map(|rank| of(rank).nth(round)).sum();
    let most = (0..owners.most()).map(in_round).max().unwrap_or(0);
    [of(ranks.rank()).max().unwrap_or(0), most]
}

/// The gradients in ranges that are made one behind the other, from the last block on.
fn buckets<B: Backend>(table: &ParamTable, gradients: &FlatGradients<B>) -> Result<Vec<Bucket>> {
    let mut all = Vec::new();
    let blocks = table.first_of_blocks();
    reserve(
        &mut all,
        "gradients that ranks exchange",
        gradients.len() / MESSAGE + blocks.len() + 1,
    )?;
    let mut end = gradients.len();
    let behind_blocks = blocks.map(|slot| gradients.start(slot)).enumerate().rev();
    let behind_blocks = behind_blocks.map(|(block, start)| (start, Some(block)));
    for (start, behind) in behind_blocks.chain([(0, None)]) {
        let is_last = matches!(behind, None | Some(0));
        if end - start < MESSAGE && !is_last {
            continue;
        }
        let parts = (end - start).div_ceil(2 * MESSAGE);
        let len = (end - start).div_ceil(parts.max(1)).next_multiple_of(4 * PIECE);
        while start < end {
            let range = end.saturating_sub(len).max(start)..end;
            end = range.start;
            all.push(Bucket { range, behind });
        }
    }
    Ok(all)
}

/// What all ranks have found by trying an update, of whose parameters each has some: what is not finite
/// anywhere, all ranks say of the first.
pub(super) fn largest_of_all(ranks: &Ranks, found: Result<Largest>) -> Result<Largest> {
    // The bits of a value, and what it is.
    let said = match &found {
        Err(Error::NotFinite { what, value }) => format!("{:08x}{what}", value.to_bits()),
        _ => String::new(),
    };
    let found = match found {
        Err(Error::NotFinite { .. }) => Ok(Largest::default()),
        found => ranks.end_if_alone(found),
    };
    let mut largest = found?;
    let all = ranks.gather(&said)?;
    if let Some((bits, what)) = all.iter().find_map(|said| said.split_at_checked(8)) {
        let value = f32::from_bits(u32::from_str_radix(bits, 16).unwrap_or_default());
        return Err(Error::NotFinite { what: what.to_owned(), value });
    }
    let numbers = |of: &Largest| [&[of.weight], &of.states[..]].concat();
    let mine = numbers(&largest);
    let mut all = zeros("what ranks find of an update", mine.len() * ranks.size())?;
    ranks.all_gather(bytemuck::cast_slice(&mine), bytemuck::cast_slice_mut(&mut all))?;
    for of_rank in all.chunks_exact(mine.len()) {
        let mut other = Largest { weight: of_rank[0], ..Largest::default() };
        other.states.copy_from_slice(&of_rank[1..]);
        largest.include(other);
    }
    Ok(largest)
}
