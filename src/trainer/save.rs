//! What a checkpoint has of a trainer: read from its device, or from a copy of it on the host.

use std::path::Path;

use super::memory::Flat;
use super::owners::Owners;
use super::source::Source;
use super::{Run, Trainer, follow, states};
use crate::backend::{Backend, HostBuffer, Slot, StateLayout, on_device};
use crate::checkpoint::{self, Files, Place, TensorRead, TrainerPart};
use crate::comm::{Call, Ranks};
use crate::gpt::{Matrix, ParamTable};
use crate::model::{Exported, Model, OnDevice, Weights};
use crate::optim::spam::STATISTICS;
use crate::optim::{Master, Optimizer, State, master};
use crate::reserve::{collect, zeros};
use crate::room::MemoryRoom;
use crate::run::TrainerState;
use crate::{Error, Result};

/// What else a checkpoint says, and how the buffers of a [`Source`] are laid out.
struct About<'a> {
    model: &'a Model,
    table: &'a ParamTable,
    layouts: &'a [StateLayout],
    state: &'a TrainerState,
    /// Weights of which the recipe keeps something, and what.
    matrices: &'a [Matrix],
    followed: &'a [State],
}

fn save(source: &dyn Source, about: &About<'_>, place: Place<'_>) -> Result<()> {
    let &About { model, table, layouts, state, matrices, followed } = about;
    let (tensors, optimizer) = (model.tensors(), &state.options.optimizer);
    let kept = layouts.iter().zip(optimizer.states()).enumerate();
    let export = |(number, (layout, of))| {
        let stored = states::Stored::of(tensors, layout)?;
        Ok(states::Exported { source, table, stored, layout, number, of })
    };
    let states = collect("the states of the optimizer", kept.map(export))?;
    let states = states.iter().map(|state| Ok(state as &dyn TensorRead));
    let states = collect("the states of the optimizer", states)?;
    let of_gradients = states::statistics(tensors, optimizer)?;
    let statistics = states::ExportedStatistics { source, tensors: &of_gradients };
    let of_blocks = follow::tensors(matrices, tensors)?;
    let exported = followed.iter().enumerate().map(|(number, state)| {
        let tensors = &of_blocks[..];
        Ok((*state, follow::Exported { source, table, tensors, matrices, number }))
    });
    let exported = collect("what the recipe keeps of weights", exported)?;
    let exported = exported.iter().map(|(state, values)| (*state, values as &dyn TensorRead));
    let statistics = (states::OF_GRADIENTS, &statistics as &dyn TensorRead);
    let statistics = optimizer.kind.normalizes().then_some(statistics);
    let others = statistics.into_iter().chain(exported).map(Ok);
    let others = collect("what the recipe keeps of weights", others)?;
    let part = TrainerPart { state, states: &states, others: &others };
    let read = |slot: Slot, out: &mut [f32]| source.weights(slot, out);
    let weights = Exported { table, tensors, read };
    checkpoint::save(place, model.part(&weights), Some(part))
}

/// A trainer as it is on its device.
struct Live<'a, B: Backend> {
    on: &'a OnDevice<B>,
    weights: &'a Weights<B>,
    flat: &'a Flat<B>,
    followed: Vec<&'a B::F32>,
}

impl<B: Backend> Source for Live<'_, B> {
    fn weights(&self, slot: Slot, out: &mut [f32]) -> Result<()> {
        self.on.backend.read_param(&self.weights.all, slot, out)
    }

    fn state(&self, state: usize, at: usize, out: &mut [u8]) -> Result<()> {
        self.on.backend.read_bytes(&self.flat.states[state], at, out)
    }

    fn statistics(&self, at: usize, out: &mut [f32]) -> Result<()> {
        self.on.backend.read_f32(&self.flat.statistics, at, out)
    }

    fn followed(&self, number: usize, at: usize, out: &mut [f32]) -> Result<()> {
        self.on.backend.read_f32(self.followed[number], at, out)
    }
}

/// A copy of all that a checkpoint has of a trainer, on the host, where another thread can save it
/// while training goes on: f32 weights, and what the optimizer and the recipe keep, in the bytes that
/// they take there. Made by [`Trainer::snapshot`]; the model stays alive with it.
pub struct Snapshot {
    model: Model,
    state: TrainerState,
    /// f32, or halves: of all parameters the copies, then what they lack.
    weights: HostBuffer,
    are_halves: bool,
    /// Rank 0's, where ranks shard the optimizer's states, or that of one that has all.
    is_whole: bool,
    /// Of all parameters, with what lies between.
    elements: usize,
    states: Vec<HostBuffer>,
    layouts: Vec<StateLayout>,
    statistics: HostBuffer,
    matrices: Vec<Matrix>,
    followed: Vec<(State, HostBuffer)>,
}

impl Source for Snapshot {
    fn weights(&self, slot: Slot, out: &mut [f32]) -> Result<()> {
        if !self.are_halves {
            out.copy_from_slice(&self.weights.as_floats()[slot.range()]);
            return Ok(());
        }
        let all: &[u16] = bytemuck::cast_slice(self.weights.bytes());
        let (copies, lows) = (&all[slot.range()], &all[self.elements..][slot.range()]);
        for ((to, copy), low) in out.iter_mut().zip(copies).zip(lows) {
            *to = master::join([*copy, *low]);
        }
        Ok(())
    }

    fn state(&self, state: usize, at: usize, out: &mut [u8]) -> Result<()> {
        out.copy_from_slice(&self.states[state].bytes()[at..][..out.len()]);
        Ok(())
    }

    fn statistics(&self, at: usize, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(&self.statistics.as_floats()[at..][..out.len()]);
        Ok(())
    }

    fn followed(&self, number: usize, at: usize, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(&self.followed[number].1.as_floats()[at..][..out.len()]);
        Ok(())
    }
}

const WHAT: &str = "a snapshot";

/// Bytes that ranks exchange at once.
const PART: usize = 1 << 24;

impl Snapshot {
    /// Saves it as [`Trainer::save`] would have, when it was made.
    ///
    /// # Errors
    /// Those of [`Trainer::save`]; [`Error::InvalidArgument`] for one of a rank that has only a part.
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.save_at(Place::Folder(dir))
    }

    /// Saves it as [`Trainer::save_to`] would have, when it was made.
    ///
    /// # Errors
    /// Those of [`Trainer::save_to`]; [`Error::InvalidArgument`] for one of a rank that has only a
    /// part.
    pub fn save_to(&self, files: &mut dyn Files) -> Result<()> {
        self.save_at(Place::Files(files))
    }

    fn save_at(&self, place: Place<'_>) -> Result<()> {
        if !self.is_whole {
            let message = "expected that of rank 0, which has the states of all ranks";
            return Err(Error::invalid("snapshot", message));
        }
        let Self { model, state, layouts, matrices, .. } = self;
        let followed = self.followed.iter().map(|(state, _)| Ok(*state));
        let followed = collect(WHAT, followed)?;
        on_device!(model.on_device(), on => {
            let table = &on.table;
            let about = About { model, table, layouts, state, matrices, followed: &followed };
            save(self, &about, place)
        })
    }

    /// Steps that the trainer had done.
    pub fn steps_done(&self) -> u64 {
        self.state.step
    }

    /// Bytes of host memory that it takes, those of a longer one before it included.
    pub fn bytes(&self) -> u64 {
        let of_buffer = |buffer: &HostBuffer| buffer.bytes().len() as u64;
        let states: u64 = self.states.iter().map(of_buffer).sum();
        let followed: u64 = self.followed.iter().map(|(_, values)| of_buffer(values)).sum();
        of_buffer(&self.weights) + states + of_buffer(&self.statistics) + followed
    }

    fn empty(model: &Model, state: &TrainerState) -> Self {
        Self {
            model: model.clone(),
            state: state.clone(),
            weights: HostBuffer::default(),
            are_halves: false,
            is_whole: true,
            elements: 0,
            states: Vec::new(),
            layouts: Vec::new(),
            statistics: HostBuffer::default(),
            matrices: Vec::new(),
            followed: Vec::new(),
        }
    }
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Trainer {
    /// Saves weights, moments and position to a checkpoint folder, atomically: a kill at any
    /// instant leaves the previous checkpoint whole, or the new one. Whatever else is in the folder
    /// stays. In a group rank 0 writes, to its `dir`; any number of ranks that the lanes allow can go
    /// on from it.
    ///
    /// # Errors
    /// [`Error::Io`]; the folder then holds the previous checkpoint, or the new one if only its
    /// flushing failed. [`Error::Format`] for a folder that holds other things and no checkpoint.
    pub fn save(&mut self, dir: &Path) -> Result<()> {
        self.save_at(Place::Folder(dir))
    }

    /// [`Trainer::save`] to files that lie elsewhere than in a folder; their bytes are the same.
    /// While it runs, `files` must not wait for anything that changes the model.
    ///
    /// # Errors
    /// As [`Trainer::save`]; but for an error of [`crate::FileSave::commit`] itself, of which
    /// `files` knows more, they are then what they were.
    pub fn save_to(&mut self, files: &mut dyn Files) -> Result<()> {
        self.save_at(Place::Files(files))
    }

    fn save_at(&mut self, place: Place<'_>) -> Result<()> {
        let engine = self.model.engine().clone();
        let Some(ranks) = engine.ranks() else { return self.save_alone(place) };
        let _group = ranks.until_panic();
        let step = self.state.step;
        ranks.agree(Call::Save { step }, Ok(()))?;
        let weights = self.model.checksum().inspect_err(|error| ranks.end(&error.to_string()))?;
        ranks.compare(&[("the checksum of the weights", weights)])?;
        let saved = match ranks.shards_states {
            true => self.snapshot(None).and_then(|copy| match ranks.rank() {
                0 => copy.save_at(place),
                _ => Ok(()),
            }),
            false if ranks.rank() == 0 => self.save_alone(place),
            false => Ok(()),
        };
        let agreed = ranks.agree(Call::Saved { step }, saved.as_ref().copied());
        saved.and(agreed)
    }

    fn save_alone(&mut self, place: Place<'_>) -> Result<()> {
        let (model, state) = (&self.model, &self.state);
        on_device!(&self.run, run => {
            let (weights, kept) = (run.model.read()?, run.buffers.flat.followed.kept(state));
            let (live, followed) = run.live(&weights, kept)?;
            let about = About {
                model,
                table: &run.model.table,
                layouts: &run.buffers.flat.layouts,
                state,
                matrices: run.buffers.flat.followed.matrices(),
                followed: &followed,
            };
            save(&live, &about, place)
        })
    }

    /// Copies all that [`Trainer::save`] would save to the host, for another thread to save while
    /// training goes on. Not collective: every rank of a group has all of it, also when the group has
    /// ended. But where ranks shard the optimizer's states it is, and only that of rank 0 can be saved.
    /// Takes over the memory of an earlier snapshot, of this trainer or another, as
    /// long as that is: memory that is new is slower. After an error that is gone.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], also where the host has less memory free; [`Error::Device`];
    /// [`Error::Peer`].
    pub fn snapshot(&mut self, earlier: Option<Snapshot>) -> Result<Snapshot> {
        self.agree_on_snapshot()?;
        self.snapshot_in(earlier)
    }

    /// Whether all ranks make one that have to, before an earlier one is given up for it.
    pub(crate) fn agree_on_snapshot(&self) -> Result<()> {
        let ranks = self.model.engine().ranks().filter(|ranks| ranks.shards_states);
        ranks.map_or(Ok(()), |ranks| ranks.agree(Call::Gather { step: self.state.step }, Ok(())))
    }

    /// [`Trainer::snapshot`] behind that.
    pub(crate) fn snapshot_in(&mut self, earlier: Option<Snapshot>) -> Result<Snapshot> {
        let (model, state) = (&self.model, &self.state);
        let mut copy = earlier.unwrap_or_else(|| Snapshot::empty(model, state));
        (copy.model, copy.state, copy.is_whole) = (model.clone(), state.clone(), true);
        let Some(ranks) = model.engine().ranks().filter(|ranks| ranks.shards_states) else {
            on_device!(&self.run, run => run.copy_to(state, &mut copy)?);
            return Ok(copy);
        };
        let _group = ranks.until_panic();
        copy.is_whole = ranks.rank() == 0;
        on_device!(&self.run, run => {
            // All memory is taken before the vote.
            let copied = if copy.is_whole { run.copy_to(state, &mut copy) } else { Ok(()) };
            let ready = copied.and_then(|()| Gather::new(run, &state.options.optimizer, ranks));
            let call = Call::Gather { step: state.step };
            let agreed = ranks.agree(call, ready.as_ref().map(drop));
            let ready = ready?;
            agreed?;
            let gathered = run.gather_states(ready, &mut copy, ranks);
            gathered.inspect_err(|error| ranks.end(&error.to_string()))?;
        });
        Ok(copy)
    }
}

impl<B: Backend> Run<B> {
    fn live<'a>(
        &'a self,
        weights: &'a Weights<B>,
        kept: impl Iterator<Item = (State, &'a B::F32)>,
    ) -> Result<(Live<'a, B>, Vec<State>)> {
        let kept = collect("what the recipe keeps of weights", kept.map(Ok))?;
        let followed = collect(WHAT, kept.iter().map(|(_, flat)| Ok(*flat)))?;
        let states = collect(WHAT, kept.iter().map(|(state, _)| Ok(*state)))?;
        let flat = &self.buffers.flat;
        Ok((Live { on: &self.model, weights, flat, followed }, states))
    }

    fn copy_to(&self, state: &TrainerState, copy: &mut Snapshot) -> Result<()> {
        let (table, flat) = (&self.model.table, &self.buffers.flat);
        let (weights, optimizer) = (self.model.read()?, &state.options.optimizer);
        let (live, followed) = self.live(&weights, flat.followed.kept(state))?;
        let slots = &flat.slots;
        copy.layouts = StateLayout::of_all(slots, optimizer, &(0..slots.len()), B::ALIGN)?;
        copy.matrices = collect(WHAT, flat.followed.matrices().iter().map(|of| Ok(*of)))?;
        let normalizes = optimizer.kind.normalizes();
        let statistics = if normalizes { table.slots().len() * STATISTICS } else { 0 };
        let ends = copy.matrices.iter().map(|matrix| matrix.own.start + matrix.own.len);
        let of_blocks = ends.max().unwrap_or(0);
        let of_floats = |count: usize| 4 * count as u64;
        let needed = of_floats(table.len() + statistics + followed.len() * of_blocks)
            + copy.layouts.iter().map(|layout| layout.bytes as u64).sum::<u64>();
        // NOTE: a system gives memory that it does not have, and ends who uses it.
        let fresh = needed.saturating_sub(copy.bytes());
        if let Some(room) = MemoryRoom::of_host(Path::new("/"))
            && fresh > room.available
        {
            let free = room.available;
            let limit = format!("of which {free} are free on the host; save the trainer itself");
            return Err(Error::OutOfMemory { what: WHAT, needed: fresh, limit });
        }
        let backend = &*self.model.backend;
        (copy.elements, copy.are_halves) = (table.len(), weights.master == Master::Split);
        let to = copy.weights.room(backend, WHAT, of_floats(table.len()) as usize)?;
        // NOTE: halves are put together when they are saved, which is another thread's time.
        if copy.are_halves {
            let (copies, lows) = bytemuck::cast_slice_mut(to).split_at_mut(table.len());
            for slot in table.slots() {
                let [copies, lows] = [&mut copies[slot.range()], &mut lows[slot.range()]];
                backend.read_halves(&weights.all, *slot, copies, lows)?;
            }
        } else {
            let to: &mut [f32] = bytemuck::cast_slice_mut(to);
            for slot in table.slots() {
                live.weights(*slot, &mut to[slot.range()])?;
            }
        }
        copy.states.resize_with(copy.layouts.len(), HostBuffer::default);
        for (number, (layout, to)) in copy.layouts.iter().zip(&mut copy.states).enumerate() {
            let (to, own) = (to.room(backend, WHAT, layout.bytes)?, &flat.layouts[number]);
            if flat.owned.len() == slots.len() {
                live.state(number, 0, to)?;
                continue;
            }
            for index in flat.owned.clone() {
                let (own, place) = (&own.places[index], &layout.places[index]);
                live.state(number, own.start, &mut to[place.start..][..own.bytes()])?;
                let scales = 4 * own.groups();
                live.state(number, own.scales, &mut to[place.scales..][..scales])?;
            }
        }
        live.statistics(0, copy.statistics.floats(backend, WHAT, statistics)?)?;
        copy.followed.truncate(followed.len());
        copy.followed.resize_with(followed.len(), || (followed[0], HostBuffer::default()));
        for (number, (of, to)) in copy.followed.iter_mut().enumerate() {
            *of = followed[number];
            live.followed(number, 0, to.floats(backend, WHAT, of_blocks)?)?;
        }
        Ok(())
    }
}

/// What bringing the states of all ranks together needs.
struct Gather<'a> {
    /// The layouts of all.
    whole: Vec<StateLayout>,
    owners: &'a Owners,
    /// A state of a tensor of this rank, with its scales, and on rank 0 those of one of each.
    mine: Vec<u8>,
    all: Vec<u8>,
    /// What is exchanged at once.
    room: Vec<u8>,
}

impl<'a> Gather<'a> {
    fn new<B: Backend>(run: &'a Run<B>, optimizer: &Optimizer, ranks: &Ranks) -> Result<Self> {
        let (slots, size) = (&run.buffers.flat.slots, ranks.size());
        let whole = StateLayout::of_all(slots, optimizer, &(0..slots.len()), B::ALIGN)?;
        let owners = &run.buffers.flat.exchange.owners;
        let (mine, all, room) = (Vec::new(), Vec::new(), zeros(WHAT, PART)?);
        let mut made = Self { whole, owners, mine, all, room };
        let (mut mine, mut all) = (0, 0);
        for state in 0..made.whole.len() {
            for round in 0..made.owners.most() {
                let of = |rank| made.len(state, rank, round);
                mine = mine.max(of(ranks.rank()));
                all = all.max((0..size).map(of).sum());
            }
        }
        made.mine = zeros(WHAT, mine)?;
        made.all = zeros(WHAT, if ranks.rank() == 0 { all } else { 0 })?;
        Ok(made)
    }

    /// The tensor of a rank in a round.
    fn tensor(&self, rank: usize, round: usize) -> Option<usize> {
        self.owners.of(rank).nth(round)
    }

    /// Bytes of a state of it, and of its scales.
    fn parts(&self, state: usize, tensor: usize) -> [usize; 2] {
        let place = &self.whole[state].places[tensor];
        [place.bytes(), 4 * place.groups()]
    }

    fn len(&self, state: usize, rank: usize, round: usize) -> usize {
        let tensor = self.tensor(rank, round);
        tensor.map_or(0, |tensor| self.parts(state, tensor).iter().sum())
    }
}

impl<B: Backend> Run<B> {
    /// Brings what other ranks keep to rank 0's copy: the first tensors of all of them, then the second
    /// ones.
    fn gather_states(
        &self,
        mut gather: Gather<'_>,
        copy: &mut Snapshot,
        ranks: &Ranks,
    ) -> Result<()> {
        let (backend, flat) = (&*self.model.backend, &self.buffers.flat);
        let [mut mine, mut all, mut room] =
            [&mut gather.mine, &mut gather.all, &mut gather.room].map(std::mem::take);
        let gather = gather;
        for state in 0..gather.whole.len() {
            for round in 0..gather.owners.most() {
                let len = |rank| gather.len(state, rank, round);
                let place = |rank: usize| (0..rank).map(len).sum::<usize>();
                let longest = (0..ranks.size()).map(len).max().unwrap_or(0);
                let mine = &mut mine[..len(ranks.rank())];
                if let Some(tensor) = gather.tensor(ranks.rank(), round) {
                    let place = &flat.layouts[state].places[tensor];
                    let [numbers, _] = gather.parts(state, tensor);
                    let (numbers, scales) = mine.split_at_mut(numbers);
                    backend.read_bytes(&flat.states[state], place.start, numbers)?;
                    backend.read_bytes(&flat.states[state], place.scales, scales)?;
                }
                let mut take = |rank: usize, at: usize, part: &[u8]| {
                    let rest = len(rank).saturating_sub(at).min(part.len());
                    if copy.is_whole && rest > 0 {
                        all[place(rank) + at..][..rest].copy_from_slice(&part[..rest]);
                    }
                };
                ranks.all_gather_in_parts(mine, longest, &mut room, &mut take)?;
                for rank in 1..ranks.size() {
                    let tensor = gather.tensor(rank, round).filter(|_| copy.is_whole);
                    let Some(tensor) = tensor else { continue };
                    let [numbers, _] = gather.parts(state, tensor);
                    let (numbers, scales) = all[place(rank)..][..len(rank)].split_at(numbers);
                    let layout = &gather.whole[state];
                    let place = &layout.places[tensor];
                    let to = copy.states[state].room(backend, WHAT, layout.bytes)?;
                    to[place.start..][..numbers.len()].copy_from_slice(numbers);
                    to[place.scales..][..scales.len()].copy_from_slice(scales);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use super::*;
    use crate::{Dataset, Engine, EngineOptions, ModelConfig, Schedule, TrainerOptions};

    fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        entries.map(|path| (name(&path), fs::read(&path).unwrap())).collect()
    }

    /// A snapshot that another thread saves, while steps are done, has the bytes of a save at its
    /// step, in new memory and in that of an earlier one.
    #[test]
    fn a_snapshot_is_saved_as_the_trainer_was() {
        let engine = Engine::new(EngineOptions { threads: 1, ..Default::default() }).unwrap();
        let data = Dataset::from_tokens((0..3000).map(|i| i * i % 47).collect()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let [straight, copied] = ["straight", "copied"].map(|name| folder.path().join(name));
        // Each in the memory of the one before, whatever that was of.
        let mut earlier = None;
        for (channels, (recipe, optimizer)) in [51, 48, 63, 45, 57, 51, 54].into_iter().zip([
            ("bf16", "adamw"),
            ("mxfp4-rht-sr", "adamw,moments=int8"),
            ("fp32", "stable-spam,moments=bf16"),
            ("bf16", "adamw,moments=fp8"),
            ("bf16", "muon"),
            ("tetrajet,ema=0.99,reset=6:2:2@0.0", "adamw"),
            ("tetrajet", "adamw,ramping=3"),
        ]) {
            let config = ModelConfig {
                vocab_size: 47,
                context_length: 16,
                layers: 2,
                heads: 3,
                channels,
                tied_head: optimizer == "muon",
                ..ModelConfig::default()
            };
            let mut of: crate::Optimizer = optimizer.parse().unwrap();
            if optimizer.contains("ramping") || optimizer.contains("spam") {
                of.clip = 0.0;
            }
            let options = TrainerOptions {
                batch_size: 2,
                recipe: recipe.parse().unwrap(),
                optimizer: of,
                schedule: Schedule { total_steps: 12, ..Schedule::default() },
                ..TrainerOptions::default()
            };
            let trainer = || Trainer::new(&Model::new(&engine, &config).unwrap(), options.clone());
            let [mut first, mut second] = [trainer().unwrap(), trainer().unwrap()];
            for round in 0..3 {
                for _ in 0..2 {
                    first.step(&data).unwrap();
                    second.step(&data).unwrap();
                }
                first.save(&straight).unwrap();
                let snapshot = second.snapshot(earlier.take()).unwrap();
                assert_eq!(snapshot.steps_done(), first.steps_done());
                let snapshot = std::thread::scope(|scope| {
                    let saved = scope.spawn(|| snapshot.save(&copied).map(|()| snapshot));
                    second.step(&data).unwrap();
                    saved.join().unwrap().unwrap()
                });
                first.step(&data).unwrap();
                assert!(files(&straight) == files(&copied), "{recipe}, {optimizer}: {round}");
                let states = &files(&copied)["trainer.safetensors"];
                assert!(snapshot.bytes() as usize > states.len() / 2);
                earlier = Some(snapshot);
            }
            let mut resumed = Trainer::load(&engine, &copied).unwrap();
            let mut again = Trainer::load(&engine, &straight).unwrap();
            assert_eq!(resumed.step(&data).unwrap().loss, again.step(&data).unwrap().loss);
        }
    }
}
