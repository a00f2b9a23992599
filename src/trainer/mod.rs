//! One optimizer step, readable top to bottom ([`Trainer::step`]); evaluation; stop requests.
//!
//! A step allocates nothing, which tests/allocations.rs counts.

mod batch;
mod carriers;
mod documents;
mod exchange;
mod follow;
mod memory;
mod merge;
mod owners;
mod parts;
mod ramping;
mod save;
mod sharpness;
mod source;
mod states;
mod track;
mod updates;
mod watch;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::{
    Backend, Device, HostLoss, Sequences, StateLayout, StepPlan, Trained, on_device,
};
use crate::checkpoint::{Checkpoint, Files, Kept, Scratch, StateValues, TensorRead};
use crate::comm::wire::Drawn;
use crate::comm::{Call, Counts, Data, Ranks};
use crate::data::{EvalWindows, Window};
use crate::engine::LogLevel;
use crate::gpt::{Pass, Place, Scales, Shapes};
use crate::model::{Model, OnDevice, Weights};
use crate::optim::ramping::impossible;
use crate::optim::spam::STATISTICS;
use crate::optim::{
    Bounds, Largest, MAX_STATES, Master, Optimizer, OptimizerStep, Schedule, State, StepSums,
};
use crate::reserve::{collect, reserve, zeros};
use crate::run::{TrainerOptions, TrainerState};
use crate::{Dataset, Engine, Error, Result};
use batch::{BatchBuffers, Weighed};
pub use carriers::{Carried, carriers, emulation};
use follow::Done;
use memory::{Buffers, Flat};
pub use memory::{Plan, plan};
use merge::Merges;
pub use merge::Spared;
pub(crate) use parts::Given;
pub use parts::{Batch, IGNORED};
use parts::{MicroStep, Pending, bad_divisor, is_good_divisor};
pub use save::Snapshot;
use sharpness::Sharp;
pub use sharpness::Sharpness;
use updates::Updates;
pub use updates::{TensorUpdate, UpdateMetrics};
pub use watch::{WeightChange, WeightMetrics};

/// What one optimizer step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepStats {
    /// Steps done, this one included.
    pub step: u64,
    /// Mean cross-entropy of the step's tokens before the update, in nats.
    pub loss: f32,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f32,
    /// Learning rate of the step.
    pub lr: f32,
    /// Tokens trained on in this step.
    pub tokens: u64,
    /// Wall-clock duration of the step.
    pub seconds: f64,
    /// Blocks of MXFP4 operands whose scale was raised to fit the format that a GPU multiplies them
    /// in.
    pub raised_blocks: u64,
    /// Of `seconds`, those in which this rank waited for others and exchanged gradients with them; 0
    /// without a group.
    pub exchange_seconds: f64,
}

/// What an evaluation found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EvalStats {
    /// Mean cross-entropy in nats a token.
    pub loss: f32,
    /// Tokens that were predicted.
    pub tokens: u64,
    /// Wall-clock duration.
    pub seconds: f64,
    /// What `haste` in a recipe would spare of the linear layers; None without it.
    pub spared: Option<Spared>,
    /// How sharp the loss is in the logits; None unless [`Trainer::set_sharpness`] asks for it.
    pub sharpness: Option<Sharpness>,
}

/// Asks a trainer to stop, from any thread or from a signal handler: one atomic store. The request
/// stands until [`StopHandle::clear`]. [`Trainer::eval`] sees it before each batch, and
/// [`Trainer::step_unless_stopped`] before each micro-step; [`Trainer::step`] does not look at it,
/// loops over steps do.
#[derive(Clone, Debug, Default)]
pub struct StopHandle(Arc<AtomicBool>);

impl StopHandle {
    /// Asks for a stop.
    pub fn request_stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether a stop is asked for.
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Takes the request back.
    pub fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Writes the window of (step aside, micro-step, row): None is the step itself, others are those that
/// ramping makes before it.
type FillWindow<'a> = dyn FnMut(Option<u64>, usize, usize, Window<'_>) -> Result<()> + 'a;

/// Writes the window of (micro-step, row) of one of them.
type FillStep<'a> = dyn FnMut(usize, usize, Window<'_>) -> Result<()> + 'a;

/// Trains a model: its gradients, what its optimizer keeps, and its place in the run.
pub struct Trainer {
    // NOTE: before the model, whose engine ends its device before what that may still log to.
    run: Device<Run<Cpu>, Run<Cuda>>,
    model: Model,
    state: TrainerState,
    plan: Plan,
    /// Of the optimizer's states; the bound of the weights is with them.
    bounds: Bounds,
    stop: StopHandle,
    /// Gradients that the host's batches have made since the last update.
    pending: Option<Pending>,
    /// Whether there is less than the gradients of a step or of batches, since some were dropped.
    dropped: bool,
}

/// Where the gradients of a step come from.
enum Gradients<'a, 'b> {
    /// Micro-steps on these windows, with weights or without.
    Of { fill: &'a mut FillWindow<'b>, weighted: bool },
    /// They are there, with losses that are divided by this.
    Made(f64),
}

/// What all ranks have of the gradients of a step.
struct OfAll {
    /// What losses are divided by.
    divisor: f64,
    /// What scales they raised; None of one that is alone.
    raised_blocks: Option<u64>,
}

impl OfAll {
    /// Where no target counts, whose weights are then all 0, neither losses nor gradients have anything
    /// to be divided by.
    fn of_windows(self, state: &TrainerState) -> Self {
        let divisor = if self.divisor == 0.0 { positions(state) } else { self.divisor };
        Self { divisor, ..self }
    }
}

/// Positions of a step, of all ranks.
fn positions(state: &TrainerState) -> f64 {
    let TrainerOptions { batch_size, sequence_length, accumulation, .. } = state.options;
    (batch_size * sequence_length * accumulation) as f64
}

/// What became of a step.
struct Updated {
    sums: StepSums,
    /// With what losses were divided by.
    step: OptimizerStep,
    divisor: f64,
}

/// What a trainer has on its device.
struct Run<B: Backend> {
    model: Arc<OnDevice<B>>,
    buffers: Buffers<B>,
    /// Of evaluations that are asked for it.
    sharp: Option<Sharp<B>>,
    /// Of steps whose updates are watched.
    updates: Option<Updates<B>>,
    /// Of the micro-step that is computed or was last.
    step_plan: StepPlan,
    /// [`crate::model::Weights::moves`] when recordings were begun, which are of one place.
    moves: u64,
    /// The same when ranks told each other where weights are.
    met: u64,
    /// [`crate::model::Weights::changes`] in the last update.
    changes: u64,
}

impl Trainer {
    /// A trainer at step 0 of `model`. All its memory is allocated here, none in a step.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] names the option; [`Error::OutOfMemory`] if the plan exceeds the
    /// engine's limit or what the system gives. In a group of ranks, [`Error::RanksDiffer`] and
    /// [`Error::Peer`].
    pub fn new(model: &Model, options: TrainerOptions) -> Result<Self> {
        let seed = model.engine().seed();
        let state = TrainerState { options, seed, step: 0, schedule_start: 0, lr_override: None };
        Self::met(model.engine(), || Self::with_state(model, state))
    }

    /// Checks what a checkpoint folder says of its run, as [`Trainer::load`] would; tensors are not
    /// read.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] and [`Error::Mismatch`], which name the file.
    pub fn inspect(dir: &Path) -> Result<()> {
        Checkpoint::open(dir)?.state().map(drop)
    }

    /// The text of `trainer.json` as [`Trainer::load`] reads it, which is not the file of this name
    /// where a kill has cut off a save that was done but for its last moves; None for a model without
    /// training state.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`], which name the file.
    pub fn read_state(dir: &Path) -> Result<Option<Vec<u8>>> {
        Checkpoint::open(dir)?.state_text()
    }

    /// Loads a checkpoint that [`Trainer::save`] wrote, model included. The run goes on bit for bit
    /// as if it had not stopped: options and seed are the saved ones.
    ///
    /// # Errors
    /// As [`Model::load`] and [`Trainer::new`].
    pub fn load(engine: &Engine, dir: &Path) -> Result<Self> {
        Self::load_with(engine, || Checkpoint::open(dir), None)
    }

    /// [`Trainer::load`] of files that lie elsewhere than in a folder. They are read in pieces and
    /// not held in memory as a whole. In a group every rank reads files of its own.
    ///
    /// # Errors
    /// As [`Trainer::load`].
    pub fn load_from(engine: &Engine, files: &dyn Files) -> Result<Self> {
        Self::load_with(engine, || Checkpoint::open_files(files), None)
    }

    /// [`Trainer::load`], with moments, master weights and gradients that are kept from here on in
    /// what `stored` has them in: they are rounded to it once, and the run goes on as one that was
    /// made so. All other settings of the optimizer are the saved ones; switches need not be named
    /// again.
    ///
    /// # Errors
    /// As [`Trainer::load`], and [`Error::InvalidArgument`] for another optimizer than the saved
    /// one, or other settings of it.
    pub fn load_as(engine: &Engine, dir: &Path, stored: &Optimizer) -> Result<Self> {
        Self::load_with(engine, || Checkpoint::open(dir), Some(stored))
    }

    /// [`Trainer::load_as`] of files that lie elsewhere than in a folder.
    ///
    /// # Errors
    /// As [`Trainer::load_as`].
    pub fn load_from_as(engine: &Engine, files: &dyn Files, stored: &Optimizer) -> Result<Self> {
        Self::load_with(engine, || Checkpoint::open_files(files), Some(stored))
    }

    fn load_with<'a>(
        engine: &Engine,
        open: impl FnOnce() -> Result<Checkpoint<'a>>,
        stored: Option<&Optimizer>,
    ) -> Result<Self> {
        Self::met(engine, || Self::load_alone(engine, &open()?, stored))
    }

    /// A trainer that is made on all ranks of a group, and is the same there.
    fn met(engine: &Engine, make: impl FnOnce() -> Result<Self>) -> Result<Self> {
        let Some(ranks) = engine.ranks() else { return make() };
        let _group = ranks.until_panic();
        let made = make();
        let agreed = ranks.agree(Call::Trainer, made.as_ref().map(drop));
        let mut trainer = made?;
        agreed?;
        let described = ranks.end_if_alone(trainer.description())?;
        ranks.compare(&described)?;
        let met = on_device!(&mut trainer.run, run => {
            let (on, flat) = (&run.model, &mut run.buffers.flat);
            on.read().and_then(|weights| flat.meet(&*on.backend, &weights.all, ranks))
        });
        ranks.end_if_alone(met)?;
        Ok(trainer)
    }

    /// Compares what all ranks of a group must have alike, a name and a value each.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`] and [`Error::Peer`].
    pub(crate) fn compare(&self, values: &[(&str, String)]) -> Result<()> {
        self.model.engine().ranks().map_or(Ok(()), |ranks| ranks.compare(values))
    }

    /// What is the same on all ranks.
    fn description(&self) -> Result<Vec<(&'static str, String)>> {
        let TrainerState { options, seed, step, schedule_start, lr_override } = &self.state;
        // Taken apart by name, so that a new field cannot be forgotten here.
        let TrainerOptions {
            batch_size,
            sequence_length,
            accumulation,
            lanes,
            recipe,
            recompute,
            optimizer,
            schedule,
            token_drop,
            frozen,
            document_end,
        } = options;
        let Optimizer { beta1, beta2, epsilon, weight_decay, clip, .. } = optimizer;
        let usual = format!("{beta1} {beta2} {epsilon} {weight_decay} {clip}");
        Ok(vec![
            ("the model", format!("{:?}", self.model.config())),
            ("batch_size", batch_size.to_string()),
            ("sequence_length", sequence_length.to_string()),
            ("accumulation", accumulation.to_string()),
            ("lanes", lanes.to_string()),
            ("recipe", recipe.to_string()),
            ("recompute", recompute.to_string()),
            ("optimizer", optimizer.to_string()),
            ("beta1, beta2, epsilon, weight_decay and clip", usual),
            ("schedule", format!("{schedule:?}")),
            ("token_drop", format!("{token_drop:?}")),
            ("frozen", frozen.to_string()),
            ("document_end", format!("{document_end:?}")),
            ("the run's seed", seed.to_string()),
            ("the steps done", step.to_string()),
            ("the step that the schedule counts from", schedule_start.to_string()),
            ("the rate that was set", format!("{lr_override:?}")),
            ("the checksum of the weights", self.model.checksum()?),
        ])
    }

    fn load_alone(
        engine: &Engine,
        checkpoint: &Checkpoint<'_>,
        stored: Option<&Optimizer>,
    ) -> Result<Self> {
        let mut state = checkpoint.state()?;
        if let Some(stored) = stored {
            let saved = &mut state.options.optimizer;
            let Optimizer { kind, moments, master, gradients, .. } = stored;
            let keeps = |what: String, got: String| {
                let place = checkpoint.path().display();
                let message =
                    format!("{place} was trained with {what}, which a run keeps; got {got}");
                Err(Error::invalid("optimizer", message))
            };
            if saved.kind != *kind {
                return keeps(saved.kind.to_string(), kind.to_string());
            }
            if stored.names_other_settings(saved) {
                return keeps(saved.to_string(), stored.to_string());
            }
            let before = *saved;
            (saved.moments, saved.master, saved.gradients) = (*moments, *master, *gradients);
            if before != *saved {
                let text = || format!("the optimizer is {saved} from here on, not {before}");
                engine.log(LogLevel::Warning, text);
            }
        }
        let model = Model::from_checkpoint(engine, checkpoint)?;
        let mut trainer = Self::with_state(&model, state)?;
        trainer.bounds = Bounds::UNKNOWN;
        let state = &trainer.state;
        on_device!(&mut trainer.run, run => run.load_states(checkpoint, &model, state)?);
        Ok(trainer)
    }

    /// Whether `dir` holds a checkpoint with the training state that [`Trainer::load`] wants; it
    /// may be damaged even so.
    pub fn is_saved_in(dir: &Path) -> bool {
        Checkpoint::open(dir).is_ok_and(|checkpoint| checkpoint.has_state())
    }

    /// One optimizer step on the dataset's next windows. Files shorter than a sequence and one
    /// token are never read; the engine's log warns of them once, and [`Dataset::coverage`] counts
    /// them. With an optimizer that has `ramping`, the first step of every period takes 30 steps
    /// longer, which are made on other windows and undone before it.
    ///
    /// # Errors
    /// [`Error::TokenRange`] for a token outside the vocabulary anywhere in the dataset, see
    /// [`Dataset::check_tokens`]; [`Error::Io`] where a file of it has become shorter or its disk
    /// fails; [`Error::InvalidArgument`] for a dataset that is too short; [`Error::NotFinite`] if
    /// the loss or the gradient is NaN or infinite, or a weight or moment would become so. Weights,
    /// moments and position are then those before the step. [`Error::InvalidArgument`] too for a
    /// recipe that is for evaluation ([`crate::Recipe::check_trains`]).
    pub fn step(&mut self, data: &Dataset) -> Result<StepStats> {
        self.step_on(data, false)
    }

    /// [`Trainer::step`], given up where a stop is asked for: a step of many micro-steps can take
    /// minutes.
    ///
    /// # Errors
    /// As [`Trainer::step`], and [`Error::Stopped`] if a stop was pending before a micro-step. The
    /// next step does the same from its beginning.
    pub fn step_unless_stopped(&mut self, data: &Dataset) -> Result<StepStats> {
        self.step_on(data, true)
    }

    fn step_on(&mut self, data: &Dataset, stops: bool) -> Result<StepStats> {
        let TrainerState { seed, step, ref options, .. } = self.state;
        let (batch, accumulation) = (options.batch_size as u64, options.accumulation as u64);
        let vocab_size = self.model.config().vocab_size;
        let (data_of, ready) = self.data_of(data);
        let ready = ready.and_then(|()| options.recipe.check_trains());
        let ready = ready.and_then(|()| data.check_tokens(vocab_size));
        if let (Ok(()), Some(warning)) = (&ready, data.warning(options.sequence_length)) {
            self.model.engine().log(LogLevel::Warning, || warning);
        }
        let number = |step: u64, micro_step, row| {
            let micro_steps = step.wrapping_mul(accumulation).wrapping_add(micro_step as u64);
            micro_steps.wrapping_mul(batch).wrapping_add(row as u64)
        };
        let mut fill = |aside, micro_step, row, window: Window<'_>| match aside {
            None => data.training_window(seed, number(step, micro_step, row), vocab_size, window),
            Some(of) => data.side_window(seed, number(of, micro_step, row), vocab_size, window),
        };
        let gradients = Gradients::Of { fill: &mut fill, weighted: data.is_weighted() };
        self.optimizer_step(ready, Some(data_of), stops, gradients)
    }

    /// One optimizer step on the host's own tokens: (accumulation B, T + 1), row-major; each row's
    /// first T tokens are inputs, its last T are targets. Of N ranks each gives the rows of its own
    /// micro-steps: accumulation / N of them, in a row, from rank times that on.
    ///
    /// # Errors
    /// As [`Trainer::step`], and [`Error::InvalidArgument`] for another number of tokens, and for
    /// an optimizer with `ramping`, which draws windows of its own from a dataset.
    pub fn step_tokens(&mut self, tokens: &[u32]) -> Result<StepStats> {
        self.step_copied_tokens(tokens.len(), &|from, to| {
            to.copy_from_slice(&tokens[from..][..to.len()]);
        })
    }

    /// [`Trainer::step_tokens`] on `count` tokens that `copy(from, to)` reads. They are checked
    /// before the step begins, and once more as they are used: a host's other threads may have
    /// changed them.
    pub(crate) fn step_copied_tokens(
        &mut self,
        count: usize,
        copy: &dyn Fn(usize, &mut [u32]),
    ) -> Result<StepStats> {
        let TrainerOptions { batch_size, sequence_length, .. } = self.state.options;
        let mine = on_device!(&self.run, run => run.buffers.flat.exchange.share).all();
        let (window_len, vocab_size) = (sequence_length + 1, self.model.config().vocab_size);
        let read = |row: usize, window: &mut [u32]| {
            copy(row * window_len, window);
            match window.iter().position(|token| *token as usize >= vocab_size) {
                None => Ok(()),
                Some(at) => Err(Error::TokenRange {
                    source_name: "the tokens of this step".into(),
                    offset: (row * window_len + at) as u64,
                    token: window[at].into(),
                    vocab_size,
                }),
            }
        };
        let ready = self.check_given(count, mine.len() * batch_size, &read);
        let mut fill = |_, micro_step, row, window: Window<'_>| {
            read((micro_step - mine.start) * batch_size + row, window.tokens)
        };
        let gradients = Gradients::Of { fill: &mut fill, weighted: false };
        self.optimizer_step(ready, None, false, gradients)
    }

    /// Whether a step can be done on so many given tokens, of which `read` reads rows.
    fn check_given(
        &mut self,
        count: usize,
        rows: usize,
        read: &dyn Fn(usize, &mut [u32]) -> Result<()>,
    ) -> Result<()> {
        let TrainerOptions { sequence_length, ref recipe, .. } = self.state.options;
        recipe.check_trains()?;
        self.check_no_ramping()?;
        let window_len = sequence_length + 1;
        let expected = rows * window_len;
        if count != expected {
            let message =
                format!("expected {rows} rows of {window_len}, which is {expected}; got {count}");
            return Err(Error::invalid("tokens", message));
        }
        let window = on_device!(&mut self.run, run => &mut run.buffers.batch.windows[..window_len]);
        (0..rows).try_for_each(|row| read(row, window))
    }

    /// What ranks compare of their data, and why they cannot; nothing where there are none.
    fn data_of(&self, data: &Dataset) -> (Data, Result<()>) {
        if self.model.engine().ranks().is_none() {
            return (Data::default(), Ok(()));
        }
        let tokens = match data.is_weighted() {
            false => data.token_count(),
            true => data.coverage(self.state.options.sequence_length).windows,
        };
        match data.checksum() {
            Ok(checksum) => (Data { tokens, checksum }, Ok(())),
            Err(error) => (Data::default(), Err(error)),
        }
    }

    /// Forward, backward, clip, update, where this rank is `ready` for it; given up at a stop request
    /// if it `stops`. `data` are those of a dataset, where there is one.
    fn optimizer_step(
        &mut self,
        ready: Result<()>,
        data: Option<Data>,
        stops: bool,
        gradients: Gradients<'_, '_>,
    ) -> Result<StepStats> {
        let ready = ready.and_then(|()| match gradients {
            Gradients::Of { .. } => self.check_nothing_waits(),
            Gradients::Made(_) => Ok(()),
        });
        let started = Instant::now();
        let TrainerOptions { batch_size, sequence_length, accumulation, optimizer, .. } =
            self.state.options;
        let sequences = Sequences { batch: batch_size, length: sequence_length };
        let tokens = (accumulation * sequences.rows()) as u64;
        let (lr, t, loss_scale) = (self.next_lr(), self.state.step + 1, 1.0 / tokens as f32);
        let largest_gradient = f32::INFINITY;
        let seed = self.state.seed;
        let total_steps = self.state.options.schedule.total_steps;
        let (optimizer, annealing) = optimizer.annealed(self.state.schedule_step(), total_steps);
        let step =
            OptimizerStep { optimizer, lr, t, seed, loss_scale, largest_gradient, annealing };

        let Self { run, model, state, bounds, stop, .. } = self;
        let ranks = model.engine().ranks();
        let schedule = ranks.map_or(0, |_| schedule_of(state));
        let call = Call::Step { step: t, lr, schedule, data };
        let _group = ranks.map(Ranks::until_panic);
        if let Err(error) = ready {
            return Err(Ranks::refuse(ranks, call, error));
        }
        let done = on_device!(run, run => {
            run.buffers.flat.exchange.seconds = 0.0;
            let of = (&step, call);
            match gradients {
                Gradients::Made(divisor) => {
                    run.gradients_and_update(model, state, bounds, of, Gradients::Made(divisor))
                }
                Gradients::Of { fill, weighted } => {
                    let mut fill = |aside, micro_step, row, window: Window<'_>| {
                        if row == 0 && stops && stop.is_requested() {
                            return Err(Error::Stopped);
                        }
                        fill(aside, micro_step, row, window)
                    };
                    let gradients = Gradients::Of { fill: &mut fill, weighted };
                    run.gradients_and_update(model, state, bounds, of, gradients)
                }
            }
        });
        let Updated { sums, step, divisor } = match ranks {
            Some(ranks) => ranks.end_if_alone(done)?,
            None => done?,
        };
        let positions = positions(&self.state);
        if !is_good_divisor(divisor, positions) {
            return Err(bad_divisor(divisor, positions));
        }
        check_finite(&sums, &step, format_args!("step {t}"))?;
        let (loss, grad_norm) = sums.loss_and_norm(&step);
        self.state.step = t;
        self.dropped = false;
        let seconds = started.elapsed().as_secs_f64();
        let raised_blocks = sums.raised_blocks;
        let exchange_seconds = on_device!(&self.run, run => run.buffers.flat.exchange.seconds);
        Ok(StepStats {
            step: t,
            loss,
            grad_norm,
            lr,
            tokens,
            seconds,
            raised_blocks,
            exchange_seconds,
        })
    }

    /// Mean loss over `max_batches` batches of windows spread evenly over `data`, the same windows
    /// at every call; 0 takes all windows. Nothing of the run changes.
    ///
    /// A recipe with `haste` merges the channels that linear layers read, and the result says what
    /// that would spare.
    ///
    /// Where no file has the tokens of a sequence and one more, each file with two tokens or more
    /// is one shorter window of all its tokens; the number of tokens in the result tells.
    ///
    /// # Errors
    /// As [`Trainer::step`], but [`Error::InvalidArgument`] only where no file has two tokens; a
    /// loss that is not finite is returned, not an error. [`Error::Stopped`] if a stop is pending
    /// before a batch.
    pub fn eval(&mut self, data: &Dataset, max_batches: usize) -> Result<EvalStats> {
        let started = Instant::now();
        let TrainerState { step, ref options, .. } = self.state;
        let TrainerOptions { batch_size, sequence_length, .. } = *options;
        let (data_of, checked) = self.data_of(data);
        let checked = checked.and_then(|()| data.check_tokens(self.model.config().vocab_size));
        let windows = checked.and_then(|()| data.eval_windows(sequence_length));
        let count = windows.as_ref().map_or(0, |windows| match max_batches {
            0 => windows.total(),
            n => windows.total().min((n as u64).saturating_mul(batch_size as u64)),
        });
        let engine = self.model.engine().clone();
        let _group = engine.ranks().map(Ranks::until_panic);
        let mut mine = windows.and_then(|windows| self.losses_of(&windows, count));
        if let Some(ranks) = engine.ranks() {
            let is_dealt = !self.tells_more_than_losses();
            let call = Call::Eval { step, windows: count, is_dealt, data: data_of };
            let agreed = ranks.agree(call, mine.as_ref().map(drop));
            mine = mine.and_then(|mine| {
                agreed.and_then(|()| ranks.end_if_alone(mine.of_all_ranks(ranks)))
            });
        }
        let Evaluated { sum, spared, sharpness, .. } = mine?;
        let [sum, divisor, tokens] = sum;
        if data.is_weighted() && divisor <= 0.0 {
            let message = "the weights of all targets are 0, so that there is no mean over them";
            return Err(Error::invalid("dataset", message));
        }
        let (loss, tokens) = ((sum / divisor) as f32, tokens as u64);
        let seconds = started.elapsed().as_secs_f64();
        Ok(EvalStats { loss, tokens, seconds, spared, sharpness })
    }

    fn tells_more_than_losses(&self) -> bool {
        on_device!(&self.run, run => run.buffers.merges.is_some() || run.sharp.is_some())
    }

    /// The sum of the losses of every batch of the first `count` windows, or of those that are this
    /// rank's: batches are dealt in turn, where they have nothing to tell but their losses.
    fn losses_of(&mut self, windows: &EvalWindows<'_>, count: u64) -> Result<Evaluated> {
        let TrainerState { seed, step, ref options, .. } = self.state;
        let TrainerOptions { batch_size, ref recipe, .. } = *options;
        // Short windows have lengths of their own, so each is a batch.
        let at_once = if windows.are_short { 1 } else { batch_size };
        let most = batch_size * options.sequence_length;
        let is_dealt = !self.tells_more_than_losses();
        let Self { run, model, stop, .. } = self;
        let vocab_size = model.config().vocab_size;
        let weighted = windows.are_weighted();
        on_device!(run, run => {
            let (rank, size) = match model.engine().ranks() {
                Some(ranks) if is_dealt => (ranks.rank() as u64, ranks.size() as u64),
                _ => (0, 1),
            };
            let batches = count.div_ceil(at_once as u64);
            let (mut sum, mut losses) = ([0.0; 3], Vec::new());
            let is_dealt = size > 1;
            if is_dealt {
                reserve(&mut losses, "losses of batches", batches.div_ceil(size) as usize)?;
            }
            run.buffers.merges.iter_mut().for_each(Merges::begin);
            if weighted && run.sharp.is_some() {
                let what = "sharpness over windows whose targets have weights".to_owned();
                let remedy = "evaluate without set_sharpness, or on token files".to_owned();
                return Err(Error::Unsupported { what, remedy });
            }
            run.sharp.iter_mut().for_each(Sharp::begin);
            recipe.set_step(&mut run.step_plan, false, (0, 0), step);
            run.step_plan.kept = None;
            let on = Arc::clone(&run.model);
            // For all batches: nobody changes the weights between them.
            let weights = on.read_as(options.optimizer.master)?;
            for number in 0..batches {
                if stop.is_requested() {
                    return Err(Error::Stopped);
                }
                let first = number * at_once as u64;
                let batch = (count - first).min(at_once as u64) as usize;
                let sequences = Sequences { batch, length: windows.length(first, count)? };
                if number % size != rank {
                    continue;
                }
                let mut fill = |row, window: Window<'_>| {
                    windows.read(first + row as u64, count, vocab_size, window)
                };
                let of = (sequences, most, seed, weighted);
                let found = run.sum_of_losses(&weights.all, model, of, &mut fill)?;
                match is_dealt {
                    false => sum = added(sum, found),
                    true => losses.push(found),
                }
            }
            let spared = run.buffers.merges.as_ref().map(Merges::spared);
            let sharpness = run.sharp.as_ref().map(Sharp::found);
            Ok(Evaluated { sum, losses, is_dealt, batches, spared, sharpness })
        })
    }

    /// Whether evaluations from here on also say how sharp the loss is in the logits, and how far a
    /// logit y may move for that: by `epsilon` (|y| + 1), from above 0 to 1 (1e-3 is usual). None
    /// ends it. The loss itself stays the same, bit for bit; it takes 20 bytes a token of a batch,
    /// and a look at all logits more. Checkpoints do not have it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another number, [`Error::OutOfMemory`].
    pub fn set_sharpness(&mut self, epsilon: Option<f32>) -> Result<()> {
        let Self { run, model, state, .. } = self;
        let rows = state.options.batch_size * state.options.sequence_length;
        on_device!(run, run => {
            let of = |epsilon| Sharp::new(&run.model, model, rows, epsilon);
            run.sharp = epsilon.map(of).transpose()?;
        });
        Ok(())
    }

    /// Overrides the schedule's learning rate from the next step on; `None` returns to the
    /// schedule.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a negative number, NaN or infinity.
    pub fn set_lr(&mut self, lr: Option<f32>) -> Result<()> {
        if let Some(lr) = lr.filter(|lr| !(lr.is_finite() && *lr >= 0.0)) {
            let message = format!("expected a number of at least 0, got {lr}");
            return Err(Error::invalid("lr", message));
        }
        self.state.lr_override = lr;
        Ok(())
    }

    /// Takes a new schedule in place of the present one, from the next step on. Its steps are
    /// counted from here: it begins with its warm-up and ends `schedule.total_steps` steps later, and
    /// tokens are dropped by it, where they are. A rate that [`Trainer::set_lr`] set is dropped. The
    /// schedule and where it began are saved with the run.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming the field; the present schedule then stays.
    pub fn set_schedule(&mut self, schedule: Schedule) -> Result<()> {
        let options = TrainerOptions { schedule, ..self.state.options.clone() };
        self.state.options = options.resolved(self.model.config(), self.model.engine().size())?;
        self.state.schedule_start = self.state.step;
        self.state.lr_override = None;
        Ok(())
    }

    /// The step that the schedule counts from: 0, or where [`Trainer::set_schedule`] set it.
    pub fn schedule_start(&self) -> u64 {
        self.state.schedule_start
    }

    /// The rate of [`Trainer::set_lr`], where one overrides the schedule.
    pub fn lr_override(&self) -> Option<f32> {
        self.state.lr_override
    }

    /// Learning rate of the next step.
    pub fn next_lr(&self) -> f32 {
        let state = &self.state;
        state.lr_override.unwrap_or_else(|| state.options.schedule.at(state.schedule_step()))
    }

    /// Optimizer steps done.
    pub fn steps_done(&self) -> u64 {
        self.state.step
    }

    /// The model that it trains.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The options it was made from, with the sequence length filled in and the schedule last set.
    pub fn options(&self) -> &TrainerOptions {
        &self.state.options
    }

    /// Seed of data order, rounding and transforms.
    pub fn seed(&self) -> u64 {
        self.state.seed
    }

    /// Memory that it takes, its model included.
    pub fn plan(&self) -> Plan {
        self.plan
    }

    /// Watches how the weights of blocks change, and what they are rounded to in the forward pass,
    /// over windows of `every` steps from here on: [`Trainer::weight_metrics`] has what each has
    /// shown. 0 ends it. It takes 12 bytes a weight and 8 for each element of the largest, and
    /// changes nothing of the run; checkpoints do not have it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a recipe whose forward pass rounds no weight to 4 bits, and for
    /// `master=split`; [`Error::OutOfMemory`].
    pub fn watch_weights(&mut self, every: u64) -> Result<()> {
        let Self { run, model, state, .. } = self;
        if every > 0 && state.options.optimizer.master == Master::Split {
            let message = "expected master=f32, since master=split keeps no weights in f32 whose \
                           movements could be watched";
            return Err(Error::invalid("optimizer", message));
        }
        on_device!(run, run => {
            let Run { model: on, buffers, .. } = run;
            buffers.flat.followed.watch(on, model, &state.options.recipe, every)
        })
    }

    /// Watches the update of every so many steps from here on: [`Trainer::update_metrics`] has what
    /// the last one did. 0 ends it. Such a step reads gradients and second moments once more and
    /// waits for the device; nothing of the run changes, and checkpoints do not have it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::InvalidArgument`] in a group that shards the optimizer's states.
    pub fn watch_updates(&mut self, every: u64) -> Result<()> {
        let Self { run, model, .. } = self;
        if every > 0 && model.engine().shards_states() {
            let message = "expected that every rank keeps all states, where updates are watched";
            return Err(Error::invalid("shard_states", message));
        }
        on_device!(run, run => {
            let of = || Updates::new(&run.model, model, every);
            run.updates = (every > 0).then(of).transpose()?;
        });
        Ok(())
    }

    /// What [`Trainer::watch_updates`] found of the last step that it watched; None before that, or
    /// where nobody watches.
    pub fn update_metrics(&self) -> Option<&UpdateMetrics> {
        on_device!(&self.run, run => run.updates.as_ref().and_then(Updates::metrics))
    }

    /// What the last whole window of [`Trainer::watch_weights`] has shown; None before its end, or
    /// where nobody watches.
    pub fn weight_metrics(&self) -> Option<&WeightMetrics> {
        on_device!(&self.run, run => run.buffers.flat.followed.metrics())
    }

    /// A handle that asks it to stop.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// Listens to `stop` in place of its own handle, so that one request can stop several trainers.
    pub fn set_stop_handle(&mut self, stop: StopHandle) {
        self.stop = stop;
    }

    /// Copies the gradient that the last step computed (before clipping) for a parameter into
    /// `out`, in the shape that [`Model::tensors`] gives; or, where batches wait for
    /// [`Trainer::update`], that of their loss so far (of this rank, and of the last lane). Gradients
    /// stay until the next step.
    ///
    /// # Errors
    /// As [`Model::read_tensor`]; [`Error::Unsupported`] where GPUs exchange gradients and states are
    /// sharded, of a tensor whose states another rank keeps.
    pub fn read_gradient(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let named = self.model.named(name, out.len())?;
        let index = named.index;
        if self.dropped && self.pending.is_none() {
            let message = "the gradients of the last batches were dropped; there are others after the \
                           next batch or step";
            return Err(Error::invalid("trainer", message));
        }
        self.check_trained_at(index, name)?;
        let factor = self.read_factor()?;
        on_device!(&self.run, run => {
            let Flat { owned, exchange, .. } = &run.buffers.flat;
            if exchange.gives_weights() && !owned.contains(&index) {
                let what = format!("the gradient of {name}, whose states another rank keeps");
                let remedy = "ask that rank, or run without shard_states".to_owned();
                return Err(Error::Unsupported { what, remedy });
            }
            let (tensors, gradients) = (self.model.tensors(), &run.buffers.flat.gradients);
            let exported = run.model.exported_gradients(tensors, gradients);
            named.read(out, |out| exported.read(index, out, &mut Scratch::default()))
        })?;
        if factor != 1.0 {
            out.iter_mut().for_each(|g| *g = (f64::from(*g) * factor) as f32);
        }
        Ok(())
    }

    /// What the last step on a GPU left of the first block's qkv layer: the gradient of its result
    /// (rows, 3 C), and its input (rows, C).
    #[cfg(test)]
    pub(crate) fn qkv_gradient_and_input(&self) -> [&<Cuda as crate::backend::Memory>::Tensor; 2] {
        let Device::Cuda(Run { buffers, .. }) = &self.run else { panic!("not on a GPU") };
        [buffers.d.of_first_qkv(), buffers.activations.first_qkv_input()]
    }

    fn with_state(model: &Model, mut state: TrainerState) -> Result<Self> {
        let engine = model.engine();
        state.options = state.options.resolved(model.config(), engine.size())?;
        let plan = plan(engine, model.config(), &state.options)?;
        let bytes = plan.total() - plan.weights;
        let master = state.options.optimizer.master;
        on_device!(model.on_device(), on => on.keep_as(&mut *on.lock()?, master)?);
        engine.check_memory("the model and its trainer", plan.total(), bytes)?;
        let (mut allocated, options) =
            (Plan { weights: plan.weights, ..Plan::default() }, &state.options);
        let run = match model.on_device() {
            Device::Cpu(on) => Device::Cpu(Run::new(model, on, options, bytes, &mut allocated)?),
            Device::Cuda(on) => Device::Cuda(Run::new(model, on, options, bytes, &mut allocated)?),
        };
        debug_assert_eq!(plan, allocated, "the plan is what is allocated");
        engine.log(LogLevel::Info, || {
            format!("trainer: recipe {}, {} bytes planned", state.options.recipe, plan.total())
        });
        if let Some(emulated) = emulation(&carriers(engine, model.config(), &state.options)?) {
            engine.log(LogLevel::Info, || format!("emulated: {emulated}"));
        }
        let (model, stop) = (model.clone(), StopHandle::default());
        Ok(Self {
            run,
            model,
            state,
            plan,
            bounds: Bounds::NEW,
            stop,
            pending: None,
            dropped: false,
        })
    }
}

impl<B: Backend> Run<B> {
    fn new(
        model: &Model,
        on: &Arc<OnDevice<B>>,
        options: &TrainerOptions,
        bytes: u64,
        allocated: &mut Plan,
    ) -> Result<Self> {
        let (backend, config) = (&*on.backend, model.config());
        let ranks = model.engine().ranks();
        let mut buffers = Buffers::new(backend, Some(bytes), config, options, ranks, allocated)?;
        let weights = on.read()?;
        backend.scope(|| buffers.flat.followed.begin(backend, &weights.all));
        let moves = weights.moves;
        drop(weights);
        let step_plan = options.recipe.step_plan(config.layers)?;
        let (model, met) = (on.clone(), moves);
        let (sharp, updates, changes) = (None, None, 0);
        Ok(Self { model, buffers, sharp, updates, step_plan, moves, met, changes })
    }

    fn load_states(
        &mut self,
        checkpoint: &Checkpoint<'_>,
        model: &Model,
        state: &TrainerState,
    ) -> Result<()> {
        let dir = checkpoint.path();
        let Self { model: on, buffers, .. } = self;
        let Flat { slots, states: flats, layouts, statistics, followed, .. } = &mut buffers.flat;
        let optimizer = state.options.optimizer;
        let (states, tensors) = (optimizer.states(), model.tensors());
        // Files have those of all ranks.
        let whole = StateLayout::of_all(slots, &optimizer, &(0..slots.len()), B::ALIGN)?;
        let of_blocks = follow::tensors(followed.matrices(), tensors)?;
        let owners = whole.iter().map(|layout| states::Owners::of(tensors, layout));
        let owners = collect("what is kept of weights", owners)?;
        let kept = states.iter().zip(&owners);
        let kept = kept.map(|(state, of)| Kept { state: *state, tensors: &of.tensors });
        let of_gradients = states::statistics(tensors, &optimizer)?;
        let tensors_of = Kept { state: states::OF_GRADIENTS, tensors: &of_gradients };
        let kept = kept.chain((!of_gradients.is_empty()).then_some(tensors_of));
        let others = followed.states(state).map(|state| Kept { state, tensors: &of_blocks });
        let kept = collect("what is kept of weights", kept.chain(others).map(Ok))?;
        let mut scratch = Scratch { numbers: on.table.room_for_a_tensor()?, ..Scratch::default() };
        checkpoint.states(&kept, &mut |state, index, values| {
            let least = values.least();
            let Kept { state: State { what, is_signed, .. }, tensors } = kept[state];
            if !is_signed && least < 0.0 {
                let name = &tensors[index].name;
                let message = format!(
                    "damaged or edited: expected {what}s of {name} from 0 on, found {least}; restore \
                     the folder from a copy"
                );
                return Err(Error::format(dir, message));
            }
            let numbers = || match values {
                StateValues::Numbers(values) => Ok(values),
                _ => {
                    let message = format!("codes of a {what}, which is never kept as such");
                    Err(Error::format(dir, message))
                }
            };
            if let Some(number) = state.checked_sub(states.len()) {
                let values = numbers()?;
                return match number.checked_sub(usize::from(!of_gradients.is_empty())) {
                    None => on.backend.write_f32(statistics, STATISTICS * index, values),
                    Some(number) => {
                        followed.load(on, (number, index), values, &mut scratch.numbers)
                    }
                };
            }
            if state >= MAX_STATES
                && let Some(value) = impossible(&optimizer, state, numbers()?)
            {
                let name = &tensors[index].name;
                let message = format!(
                    "damaged or edited: no {what} of {name} in a run with {optimizer} is {value}; \
                     restore the folder from a copy"
                );
                return Err(Error::format(dir, message));
            }
            let index = owners[state].parameters[index];
            if layouts[state].places[index].len == 0 {
                // Another rank's.
                return Ok(());
            }
            let into = (&mut flats[state], &layouts[state].places[index], &states[state]);
            states::load(&*on.backend, into, &on.table.specs()[index], values, &mut scratch)
        })
    }

    /// Gradients of the mean loss over all micro-steps, then the update.
    fn gradients_and_update(
        &mut self,
        model: &Model,
        state: &TrainerState,
        known: &mut Bounds,
        (step, call): (&OptimizerStep, Call),
        gradients: Gradients<'_, '_>,
    ) -> Result<Updated> {
        let (on, ranks) = (Arc::clone(&self.model), model.engine().ranks());
        let backend = &*on.backend;
        let refused = |error| Ranks::refuse(ranks, call, error);
        let mut weights = on.lock().map_err(refused)?;
        // Another trainer of the model may have them otherwise.
        on.keep_as(&mut weights, state.options.optimizer.master).map_err(refused)?;
        self.record_anew(&weights);
        if std::mem::replace(&mut self.met, weights.moves) != weights.moves
            && let Some(ranks) = ranks.filter(|_| self.buffers.flat.exchange.gives_weights())
        {
            // Whoever goes on with what it met before would write to where weights were.
            let met = self.buffers.flat.meet(backend, &weights.all, ranks);
            met.inspect_err(|error| ranks.end(&error.to_string()))?;
        }
        let drawn = (state.step, step.loss_scale);
        let all = match gradients {
            Gradients::Made(divisor) => {
                // An evaluation since the last batch has had a plan of its own.
                let at = (state.schedule_step(), state.options.schedule.total_steps);
                state.options.recipe.set_step(&mut self.step_plan, false, at, state.step);
                self.gradients(&weights, model, (state, call), drawn, &mut |_, _| Ok(divisor))?
            }
            Gradients::Of { fill, weighted } => {
                let of = (&*known, step, call);
                self.begin_period(&mut weights, model, state, of, (&mut *fill, weighted))?;
                let mut fill =
                    |micro_step, row, window: Window<'_>| fill(None, micro_step, row, window);
                self.gradients(&weights, model, (state, call), drawn, &mut |run, weights| {
                    run.own_gradients(weights, model, state, drawn, (&mut fill, weighted))
                })?
                .of_windows(state)
            }
        };
        let step = &self.divided(state, step, all.divisor);
        let mut sums = self.update(&mut weights, model, known, step, true)?;
        sums.raised_blocks = all.raised_blocks.unwrap_or(sums.raised_blocks);
        if sums.gradient_scale(step).is_some() {
            let Self { buffers, updates, step_plan, .. } = self;
            if let Some(updates) = updates {
                updates.keep(&on, step);
            }
            let (recipe, followed) = (&state.options.recipe, &mut buffers.flat.followed);
            let Done { steps, of, run } = Done::of(state);
            let (all, done) = (&mut weights.all, Done { steps: steps + 1, of, run: run + 1 });
            if backend.scope(|| followed.after_update(backend, all, step_plan, recipe, done))? {
                weights.largest = Bounds::UNKNOWN.weight;
            }
        }
        Ok(Updated { sums, step: *step, divisor: all.divisor })
    }

    /// Forgets recordings of weights that lie elsewhere now.
    fn record_anew(&mut self, weights: &Weights<B>) {
        if std::mem::replace(&mut self.moves, weights.moves) != weights.moves {
            self.buffers.recordings = self.model.backend.recordings();
        }
    }

    /// Divides losses and gradients by this, in place of the number of all positions of a step.
    fn divided(
        &mut self,
        state: &TrainerState,
        step: &OptimizerStep,
        divisor: f64,
    ) -> OptimizerStep {
        let positions = positions(state);
        if divisor == positions {
            return *step;
        }
        if !is_good_divisor(divisor, positions) {
            // Which is no loss, so that nothing is updated.
            return OptimizerStep { loss_scale: f32::NAN, ..*step };
        }
        let Self { model: on, buffers: Buffers { flat, .. }, .. } = self;
        let backend = &*on.backend;
        // Others may still read what is not summed up here.
        let summed = flat.exchange.summed(&flat.parts, flat.slots.len());
        let factor = (positions / divisor) as f32;
        backend.scope(|| backend.scale_gradients(&mut flat.gradients, &summed, factor));
        OptimizerStep { loss_scale: (1.0 / divisor) as f32, ..*step }
    }

    /// Gradients of the loss over all micro-steps, of all ranks, of which `own` makes those of this one
    /// and tells what their losses are divided by. What is sent to others is rounded by random numbers
    /// that are drawn for a step.
    fn gradients(
        &mut self,
        weights: &Weights<B>,
        model: &Model,
        (state, call): (&TrainerState, Call),
        drawn: (u64, f32),
        own: &mut dyn FnMut(&mut Self, &Weights<B>) -> Result<f64>,
    ) -> Result<OfAll> {
        let mine = own(self, weights);
        let Some(ranks) = model.engine().ranks() else {
            return mine.map(|divisor| OfAll { divisor, raised_blocks: None });
        };
        let agreed = ranks.agree(call, mine.as_ref().map(drop));
        let divisor = mine?;
        agreed?;
        let Self { model: on, buffers: Buffers { flat, workspace, .. }, .. } = self;
        let Flat { gradients, reduction, exchange, .. } = flat;
        let by = (ranks, Drawn { seed: state.seed, step: drawn.0 });
        let counts = (&*workspace, reduction);
        let summed = exchange.sum(&*on.backend, counts, gradients, divisor, by);
        let Counts { divisor, raised_blocks, .. } =
            summed.inspect_err(|error| ranks.end(&error.to_string()))?;
        Ok(OfAll { divisor, raised_blocks: Some(raised_blocks) })
    }

    /// What this rank's micro-steps add to the gradients, as one sum, but for what is left to the
    /// exchange with other ranks; and what their losses are divided by. A device may still be at it.
    fn own_gradients(
        &mut self,
        weights: &Weights<B>,
        model: &Model,
        state: &TrainerState,
        (drawn_for, scale): (u64, f32),
        (fill, weighted): (&mut FillStep<'_>, bool),
    ) -> Result<f64> {
        let TrainerOptions { batch_size, sequence_length, .. } = state.options;
        let sequences = Sequences { batch: batch_size, length: sequence_length };
        let (share, mut divisor) = (self.buffers.flat.exchange.share, 0.0);
        for (lane, number) in share.lanes_and_micro_steps() {
            let of_lane = share.micro_steps(lane);
            let batch = &mut self.buffers.batch;
            divisor +=
                batch.fill(sequences, weighted, |row, window| fill(number, row, window))?.sum;
            let micro_step = MicroStep {
                number,
                lane,
                is_first: number == share.all().start,
                accumulates: number > of_lane.start,
                ends_lane: number + 1 == of_lane.end,
            };
            let place = Place { seed: state.seed, step: drawn_for, micro_step: number };
            self.micro_step(weights, model, state, (micro_step, place, scale), None)?;
        }
        Ok(divisor)
    }

    /// What the batch that is in the buffers adds to the gradients, by cross-entropy or by a loss of the
    /// host's.
    fn micro_step(
        &mut self,
        weights: &Weights<B>,
        model: &Model,
        state: &TrainerState,
        (micro_step, place, scale): (MicroStep, Place, f32),
        loss: Option<&mut HostLoss<'_>>,
    ) -> Result<()> {
        let MicroStep { number, lane, is_first, accumulates, ends_lane } = micro_step;
        let Self { model: on, buffers, step_plan, .. } = self;
        let OnDevice { backend, table, .. } = &**on;
        let (backend, config) = (&**backend, model.config());
        let TrainerOptions { batch_size, sequence_length, ref recipe, .. } = state.options;
        let sequences = Sequences { batch: batch_size, length: sequence_length };
        let total_steps = state.options.schedule.total_steps;
        let Buffers { flat, activations, d, batch, workspace, recordings, .. } = buffers;
        let Flat { gradients, reduction, followed, exchange, .. } = flat;
        recipe.set_step(step_plan, accumulates, (state.schedule_step(), total_steps), state.step);
        (step_plan.kept, step_plan.weighted) = (state.kept(), batch.is_weighted());
        batch.packed.make_room(on, model.engine(), batch_size * sequence_length)?;
        step_plan.documents = batch.packed.documents().is_some();
        let (plan, means) = (&*step_plan, followed.means());
        backend.scope(|| {
            if is_first {
                backend.begin_step(workspace);
            }
            batch.upload(backend)
        })?;
        let BatchBuffers { tokens, targets, weights: of_targets, packed, .. } = batch;
        let documents = packed.documents();
        let mut pass = Pass {
            backend,
            config,
            table,
            weights: &weights.all,
            means,
            trains: true,
            merge: None,
            workspace,
            sequences,
            documents,
            plan,
        };
        let weights = plan.weighted.then_some(&*of_targets);
        let scales = &Scales { weights, scale };
        let block_is_done = |block| exchange.block_is_done(backend, block);
        let (rows, accumulate) = (sequences.rows(), plan.accumulate);
        match loss {
            None => backend.scope(|| {
                // NOTE: the whole of each goes to the thread, since threads cannot share tokens.
                let (tokens, targets): (&mut _, &mut _) = (tokens, targets);
                let random = [place.step as u32, number as u32];
                backend.recorded(recordings, plan, random, || {
                    pass.draw_kept(activations, place);
                    pass.forward(activations, tokens);
                    pass.loss_and_gradients(activations, d, gradients, targets, scales);
                    pass.backward(activations, d, gradients, place, block_is_done);
                    let losses = (&activations.losses, weights);
                    backend.add_losses(reduction, losses, rows, accumulate);
                });
                pass.embedding_backward(d, gradients, tokens);
            }),
            Some(loss) => {
                backend.scope(|| {
                    let tokens: &mut _ = tokens;
                    pass.draw_kept(activations, place);
                    pass.forward(activations, tokens);
                });
                // On this thread, which is the host's.
                pass.loss_and_gradients_of_host(activations, d, gradients, scales, loss)?;
                backend.scope(|| {
                    let tokens: &mut _ = tokens;
                    pass.backward(activations, d, gradients, place, block_is_done);
                    let losses = (&activations.losses, weights);
                    backend.add_losses(reduction, losses, rows, accumulate);
                    pass.embedding_backward(d, gradients, tokens);
                });
            }
        }
        if exchange.has_lanes() && ends_lane {
            exchange.join(backend, workspace, reduction, gradients, lane)?;
        }
        Ok(())
    }

    /// The update that gradients make, and what is known of magnitudes after it; whoever watches
    /// updates `sees` it.
    fn update(
        &mut self,
        weights: &mut Weights<B>,
        model: &Model,
        known: &mut Bounds,
        step: &OptimizerStep,
        sees: bool,
    ) -> Result<StepSums> {
        let Self { model: on, buffers, updates, changes, .. } = self;
        let backend = &on.backend;
        let (backend, updates) = (&**backend, updates.as_mut().filter(|_| sees));
        let ranks = model.engine().ranks().filter(|ranks| ranks.shards_states);
        let Buffers { flat, workspace, .. } = buffers;
        let Flat {
            slots, gradients, states, layouts, parts, statistics, reduction, exchange, ..
        } = flat;
        // Whoever moves some tensors alone knows the bound of these, as long as nobody else moves any.
        let moves_all = slots.iter().all(|slot| slot.len > 0);
        let of_others = if moves_all { 0.0 } else { weights.largest };
        let is_own = std::mem::replace(changes, weights.changes) + 1 == weights.changes;
        let weight = if moves_all || !is_own { weights.largest } else { known.weight };
        let bounds = Bounds { weight, ..*known };
        // Whatever goes wrong: nothing is known then.
        (weights.largest, *known) = (Bounds::UNKNOWN.weight, Bounds::UNKNOWN);
        let mut trained = Trained {
            slots,
            weights: &mut weights.all,
            states,
            layouts,
            statistics,
            gradients,
            parts,
        };
        let within = OptimizerStep { largest_gradient: bounds.largest_gradient(step), ..*step };
        let summed = exchange.summed(trained.parts, trained.slots.len());
        backend.scope(|| backend.square_gradients(reduction, &mut trained, &summed));
        let ended = |error: &Error| {
            if let Some(ranks) = ranks {
                ranks.end(&error.to_string());
            }
        };
        exchange.give_squares(backend).inspect_err(ended)?;
        let made = exchange.update(backend, |updated| {
            backend.reduce(workspace, reduction, &mut trained, &within);
            if let Some(updates) = updates {
                updates.look(backend, reduction, &mut trained, step)?;
            }
            backend.update(workspace, reduction, &mut trained, &within, updated)
        });
        let mut sums = made.inspect_err(ended)?;
        let bounds = if sums.gradient_scale(&within).is_some() {
            bounds.after(step, sums.clipped_norm(step))
        } else if sums.gradient_scale(step).is_none() {
            bounds
        } else {
            // The bounds cannot vouch for the update, so it is tried first.
            let found = backend.scope(|| {
                let (mut found, mut tensors) = (Ok(Largest::default()), model.tensors().iter());
                backend.try_update(
                    workspace,
                    reduction,
                    &mut trained,
                    step,
                    &sums,
                    &mut |of_one| {
                        let tensor = tensors.next();
                        if let (Ok(largest), Some(tensor)) = (&mut found, tensor) {
                            match not_finite(&of_one, &tensor.name, (step, !sees), &sums) {
                                None => largest.include(of_one),
                                Some(error) => found = Err(error),
                            }
                        }
                    },
                )?;
                found
            });
            let found = match ranks {
                Some(ranks) => exchange::largest_of_all(ranks, found)?,
                None => found?,
            };
            let StepSums { raised_blocks, .. } = sums;
            let made = exchange.update(backend, |updated| {
                backend.reduce(workspace, reduction, &mut trained, step);
                backend.update(workspace, reduction, &mut trained, step, updated)
            });
            sums = made.inspect_err(ended)?;
            sums.raised_blocks = raised_blocks;
            Bounds::found(found, step)
        };
        if let Some(ranks) = ranks.filter(|_| sums.gradient_scale(step).is_some()) {
            let gathered = exchange.gather(backend, trained.weights, trained.slots, ranks);
            gathered.inspect_err(|error| ranks.end(&error.to_string()))?;
        }
        (weights.largest, *known) = (bounds.weight.max(of_others), bounds);
        Ok(sums)
    }

    /// The sum of the losses of a batch that `fill(row, window)` writes, what it is divided by, and how
    /// many targets count; projections are drawn by the seed.
    fn sum_of_losses(
        &mut self,
        weights: &B::Weights,
        model: &Model,
        (sequences, most, seed, weighted): (Sequences, usize, u64, bool),
        fill: &mut dyn FnMut(usize, Window<'_>) -> Result<()>,
    ) -> Result<[f64; 3]> {
        let Self { model: on, buffers, sharp, step_plan: plan, .. } = self;
        let OnDevice { backend, table, .. } = &**on;
        let (backend, config) = (&**backend, model.config());
        let Buffers { flat, activations, batch, merges, workspace, .. } = buffers;
        let Weighed { sum: divisor, targets } = batch.fill(sequences, weighted, fill)?;
        batch.packed.make_room(on, model.engine(), most)?;
        plan.documents = batch.packed.documents().is_some();
        let sum = backend.scope(|| {
            batch.upload(backend)?;
            let documents = batch.packed.documents();
            let means = flat.followed.means();
            let (trains, merge) = (false, merges.as_mut().map(|merges| merges.merging(seed)));
            let mut pass = Pass {
                backend,
                config,
                table,
                weights,
                means,
                trains,
                merge,
                workspace,
                sequences,
                documents,
                plan,
            };
            pass.forward(activations, &batch.tokens);
            match sharp {
                None => pass.loss(activations, &batch.targets),
                Some(sharp) => pass.worst_losses(activations, &batch.targets, sharp.worst_of()),
            }
            let losses = (&activations.losses, weighted.then_some(&batch.weights));
            backend.sum_losses(&mut flat.reduction, losses, sequences.rows())
        })?;
        let shapes = Shapes { config, sequences, precision: plan.precision };
        merges.iter_mut().try_for_each(|merges| merges.count(backend, shapes))?;
        let losses = &activations.losses;
        sharp.iter_mut().try_for_each(|sharp| sharp.add(backend, losses, sequences))?;
        Ok([sum, divisor, targets as f64])
    }
}

impl fmt::Debug for Trainer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trainer")
            .field("model", &self.model)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// Of the schedule and where it counts from: what is not in a rate depends on them, too.
fn schedule_of(state: &TrainerState) -> u32 {
    let Schedule { kind, lr, min_lr, warmup_steps, total_steps, decay_steps } =
        state.options.schedule;
    let numbers = [warmup_steps, total_steps, decay_steps, state.schedule_start];
    let mut crc = crc32fast::Hasher::new();
    crc.update(&[kind as u8]);
    [lr, min_lr].iter().for_each(|rate| crc.update(&rate.to_le_bytes()));
    numbers.iter().for_each(|number| crc.update(&number.to_le_bytes()));
    crc.finalize()
}

/// What an evaluation found, maybe of some batches only.
struct Evaluated {
    /// Of the losses, in the order of the batches, of what they are divided by, and of the targets that
    /// count.
    sum: [f64; 3],
    /// Where batches are dealt, those of this rank, before they are in the sum.
    losses: Vec<[f64; 3]>,
    is_dealt: bool,
    /// In all.
    batches: u64,
    spared: Option<Spared>,
    sharpness: Option<Sharpness>,
}

impl Evaluated {
    /// With the losses of all batches, in their order.
    fn of_all_ranks(mut self, ranks: &Ranks) -> Result<Self> {
        const WHAT: &str = "losses of batches";
        if !self.is_dealt {
            return Ok(self);
        }
        let (size, batches) = (ranks.size(), self.batches as usize);
        let of_rank = batches.div_ceil(size);
        self.losses.resize(of_rank, [0.0; 3]);
        let mut all: Vec<[f64; 3]> = zeros(WHAT, of_rank * size)?;
        let mine = bytemuck::cast_slice(&self.losses);
        ranks.all_gather(mine, bytemuck::cast_slice_mut(&mut all))?;
        let in_order = (0..batches).map(|number| all[number % size * of_rank + number / size]);
        self.sum = in_order.fold([0.0; 3], added);
        Ok(self)
    }
}

fn added(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    std::array::from_fn(|i| a[i] + b[i])
}

/// An error where a step has not been done for its loss or gradient.
fn check_finite(sums: &StepSums, step: &OptimizerStep, which: fmt::Arguments<'_>) -> Result<()> {
    let (loss, norm) = sums.loss_and_norm(step);
    for (what, value) in [("loss", loss), ("gradient norm", norm)] {
        if !value.is_finite() {
            let what = format!("the {what} of {which}");
            return Err(Error::NotFinite { what, value });
        }
    }
    Ok(())
}

/// Why an update must not be made that would leave these magnitudes of a parameter, of a step of the
/// run or of one aside.
fn not_finite(
    of_one: &Largest,
    name: &str,
    (step, is_aside): (&OptimizerStep, bool),
    sums: &StepSums,
) -> Option<Error> {
    let OptimizerStep { t, lr, optimizer, .. } = step;
    let error = |remedy: fmt::Arguments<'_>, what: &str, value| {
        let which = if is_aside { "one".to_owned() } else { format!("step {t}") };
        let what = format!("{which} is not done ({remedy}): after it a {what} of {name}");
        Some(Error::NotFinite { what, value })
    };
    if !of_one.weight.is_finite() {
        let epsilon = optimizer.epsilon;
        let remedy =
            format_args!("lower the learning rate of {lr:?} or raise epsilon, {epsilon:?}");
        return error(remedy, "weight", of_one.weight);
    }
    let mut states = optimizer.states().iter().zip(of_one.states);
    let (state, value) = states.find(|(_, value)| !value.is_finite())?;
    let (_, norm) = sums.loss_and_norm(step);
    let ramps = optimizer.ramping > 0;
    let clip = if ramps || is_aside { "take ramping out and clip" } else { "clip" };
    // What gradients add up to is looked at with the first moment.
    let what = if ramps && state.is_signed { "moment or sum of gradients" } else { state.what };
    error(format_args!("{clip} gradients, whose norm is {norm:?}"), what, value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::{Random, kept_positions};
    use crate::{
        Activation, EngineOptions, ModelConfig, Moments, OptimizerKind, Recipe, Recompute,
    };

    fn small() -> ModelConfig {
        ModelConfig {
            vocab_size: 32,
            context_length: 16,
            layers: 1,
            heads: 2,
            channels: 16,
            ..ModelConfig::default()
        }
    }

    /// A plan looks at one block and at two, whatever the model has.
    #[test]
    fn the_plan_is_what_is_allocated() {
        let engine = Engine::new(EngineOptions { threads: 2, ..Default::default() }).unwrap();
        let plain = ModelConfig {
            vocab_size: 33,
            context_length: 7,
            heads: 1,
            channels: 32,
            ..ModelConfig::default()
        };
        let odd = ModelConfig {
            vocab_size: 31,
            context_length: 9,
            heads: 3,
            channels: 51,
            mlp_channels: 77,
            activation: Activation::Gelu,
            tied_head: false,
            ..ModelConfig::default()
        };
        let followed =
            ["tetrajet,ema=0.998,reset=9:3:8@0.5", "nvidia-nvfp4,reset=9:3:8@0.5", "bf16,haste=13"];
        let recipes: Vec<_> =
            Recipe::NAMES.into_iter().chain(followed).map(|name| name.parse().unwrap()).collect();
        let kinds = OptimizerKind::ALL.into_iter().flat_map(|kind| {
            Moments::ALL.map(|moments| Optimizer { moments, ..Optimizer::new(kind) })
        });
        let mut optimizers = kinds.cycle();
        let mut made = 0;
        let all = [Recompute::Nothing, Recompute::Pointwise, Recompute::Block];
        for (config, layers) in [plain, odd].iter().flat_map(|c| (1..=5).map(move |l| (c, l))) {
            let config = ModelConfig { layers, ..config.clone() };
            let model = Model::new(&engine, &config).unwrap();
            for (recipe, recompute) in recipes.iter().flat_map(|r| all.map(|c| (r, c))) {
                let optimizer = optimizers.next().unwrap();
                let options = TrainerOptions {
                    batch_size: layers,
                    recipe: Recipe::clone(recipe),
                    recompute,
                    optimizer,
                    schedule: Schedule { total_steps: 10, ..Schedule::default() },
                    ..TrainerOptions::default()
                };
                made += usize::from(is_planned_exactly(&model, &options).is_some());
            }
        }
        assert!(made > 100, "{made}");
    }

    /// The plan of a trainer, which is what it takes; None where there is no such trainer.
    fn is_planned_exactly(model: &Model, options: &TrainerOptions) -> Option<Plan> {
        let (engine, config) = (model.engine(), model.config());
        let plan = plan(engine, config, options).ok()?;
        let options = options.resolved(config, 1).unwrap();
        let mut taken = Plan { weights: plan.weights, ..Plan::default() };
        let bytes = Some(plan.total() - plan.weights);
        on_device!(engine.backend(), backend => {
            Buffers::new(&**backend, bytes, config, &options, None, &mut taken).map(drop)
        })
        .unwrap();
        assert_eq!(plan, taken, "{config:?} {options:?}");
        Trainer::new(model, options).unwrap();
        Some(plan)
    }

    /// A model of three blocks, the second of which alone may drop tokens.
    fn three_blocks(engine: &Engine) -> Model {
        let config = ModelConfig { context_length: 33, layers: 3, ..small() };
        Model::new(engine, &config).unwrap()
    }

    fn dropping() -> TrainerOptions {
        TrainerOptions {
            batch_size: 2,
            recipe: Recipe::fp32(),
            token_drop: Some("start=16,steps=4".parse().unwrap()),
            ..TrainerOptions::default()
        }
    }

    #[test]
    fn the_plan_of_dropping_is_positions_and_rows() {
        let engine = Engine::new(EngineOptions { threads: 2, ..Default::default() }).unwrap();
        for layers in 3..6 {
            let config = ModelConfig { layers, ..three_blocks(&engine).config().clone() };
            let model = Model::new(&engine, &config).unwrap();
            for recipe in Recipe::NAMES {
                let with = TrainerOptions { recipe: recipe.parse().unwrap(), ..dropping() };
                let without = TrainerOptions { token_drop: None, ..with.clone() };
                let [Some(with), Some(without)] =
                    [with, without].map(|options| is_planned_exactly(&model, &options))
                else {
                    continue;
                };
                let rows = 2 * 33u64;
                let positions = layers as u64 * (4 * rows).next_multiple_of(64);
                let kept = 2 * (4 * 16 * rows).next_multiple_of(64);
                let expected = without.activations + positions + kept;
                assert_eq!(with.activations, expected, "{recipe}");
                assert_eq!(with.workspace, without.workspace, "{recipe}");
            }
        }
    }

    /// What is put aside is weights and moments; of linear layers six numbers more, and room for
    /// two views of the largest.
    #[test]
    fn the_plan_of_ramping_is_what_is_put_aside() {
        let engine = Engine::new(EngineOptions { threads: 2, ..Default::default() }).unwrap();
        let lines = |len: u64| (4 * len).next_multiple_of(64);
        for (layers, channels) in [(1, 16), (2, 48), (3, 51)] {
            let config = ModelConfig { layers, channels, heads: 1, ..small() };
            let model = Model::new(&engine, &config).unwrap();
            let of = |optimizer: &str, recipe: &str| {
                let options = TrainerOptions {
                    batch_size: 2,
                    recipe: recipe.parse().unwrap(),
                    optimizer: optimizer.parse().unwrap(),
                    ..TrainerOptions::default()
                };
                is_planned_exactly(&model, &options)
            };
            for recipe in ["tetrajet,ema=0.9", "nvidia-nvfp4,bf16-last-layers=0", "mxfp4-mxfp4"] {
                let [with, without] =
                    ["adamw,ramping=9", "adamw"].map(|name| of(name, recipe).unwrap());
                let c = channels as u64;
                let all: u64 =
                    model.tensors().iter().map(|tensor| lines(tensor.len() as u64)).sum();
                let matrices: u64 =
                    [3 * c * c, c * c, 4 * c * c, 4 * c * c].map(lines).iter().sum();
                let padded = [3 * c, c, 4 * c].map(|rows| rows * c.next_multiple_of(32));
                let widest = padded.into_iter().chain([c * (4 * c).next_multiple_of(32)]).max();
                let widest = widest.unwrap();
                let views = 2 * (lines(widest) + lines(widest / 16));
                let expected = 3 * all + 6 * layers as u64 * matrices + views;
                assert_eq!(with.optimizer - without.optimizer, expected, "{recipe}");
                let without = Plan { optimizer: with.optimizer, ..without };
                assert_eq!(with, without, "{recipe}");
            }
            assert!(of("adamw,ramping=9", "mxfp4-rht-sr").is_none());
        }
    }

    /// Positions that the second block drops do not change what it makes of others: with the first
    /// and the last block deaf to other positions, a token there is in the loss of its own alone.
    #[test]
    fn dropped_tokens_are_not_seen() {
        let engine = Engine::new(EngineOptions { threads: 2, ..Default::default() }).unwrap();
        let losses = |token_drop, tokens: &[u32]| {
            let model = three_blocks(&engine);
            for block in [0, 2] {
                for (part, len) in [("weight", 16 * 16), ("bias", 16)] {
                    let name = format!("transformer.h.{block}.attn.c_proj.{part}");
                    model.write_tensor(&name, &vec![0.0; len]).unwrap();
                }
            }
            let options = TrainerOptions { token_drop, ..dropping() };
            let mut trainer = Trainer::new(&model, options).unwrap();
            trainer.step_tokens(tokens).unwrap();
            let Device::Cpu(run) = &trainer.run else { panic!("made on the CPU") };
            run.buffers.activations.losses.to_vec()
        };
        let random = Random { seed: engine.seed(), step: 0, micro_step: 0, layer: 1, linear: 0 };
        let kept: Vec<_> =
            (0..2).map(|sequence| kept_positions(&random, sequence, 33, 16)).collect();
        let is_kept = |row: usize| kept[row / 33].contains(&(row as u32 % 33));
        // The last token of a window is only predicted.
        let stays = |i: usize| i % 34 == 33 || is_kept(i / 34 * 33 + i % 34);
        let tokens: Vec<u32> = (0..2 * 34).map(|i| i * i % 29).collect();
        let other = |(i, token): (usize, &u32)| if stays(i) { *token } else { (token + 5) % 32 };
        let changed: Vec<u32> = tokens.iter().enumerate().map(other).collect();
        // Losses of kept positions whose targets stay.
        let of_kept = |row: &usize| is_kept(*row) && stays(row / 33 * 34 + row % 33 + 1);
        let unseen: Vec<usize> = (0..66).filter(of_kept).collect();
        assert!(unseen.len() > 5 && tokens != changed);
        let [before, after] = [&tokens, &changed].map(|t| losses(dropping().token_drop, t));
        assert!(unseen.iter().all(|row| before[*row] == after[*row]), "{before:?} {after:?}");
        // Without dropping every one of them is heard by those behind it.
        let [before, after] = [&tokens, &changed].map(|t| losses(None, t));
        let heard = unseen.iter().filter(|row| before[**row] != after[**row]).count();
        assert!(heard + 3 > unseen.len(), "{heard} of {}", unseen.len());
    }

    #[test]
    fn a_second_moment_below_zero_is_not_loaded() {
        let engine = Engine::new(EngineOptions { threads: 1, ..Default::default() }).unwrap();
        let config = small();
        let model = Model::new(&engine, &config).unwrap();
        let mut trainer = Trainer::new(&model, TrainerOptions::default()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut moments = vec![0.0; 16 * 16];
        for (value, is_loaded) in [(-0.0, true), (1e30, true), (-1e-45, false), (-1.0, false)] {
            moments[100] = value;
            let Device::Cpu(run) = &mut trainer.run else { panic!("made on the CPU") };
            let wpe = run.model.table.slots()[1].range();
            let states: &mut [f32] = bytemuck::cast_slice_mut(&mut run.buffers.flat.states[1]);
            states[wpe].copy_from_slice(&moments);
            trainer.save(folder.path()).unwrap();
            let loaded = Trainer::load(&engine, folder.path());
            assert_eq!(loaded.is_ok(), is_loaded, "{value}");
            if let Err(error) = loaded {
                assert!(matches!(error, Error::Format { .. }), "{error}");
                let message = error.to_string();
                let expected = format!("transformer.wpe.weight from 0 on, found {value}");
                assert!(message.contains(&expected), "{message}");
            }
        }
    }

    /// The first step is tried before it is done, later ones are not; nor are they after the host
    /// has written a tensor or another trainer has trained, but after loading one is.
    #[test]
    fn bounds_are_found_once() {
        let engine = Engine::new(EngineOptions { threads: 1, ..Default::default() }).unwrap();
        let config = small();
        let data = Dataset::from_tokens((0..400).map(|i| i * i % 29).collect()).unwrap();
        for kind in [OptimizerKind::AdamW, OptimizerKind::Muon] {
            bounds_are_found_once_by(&engine, &config, &data, kind);
        }
    }

    fn bounds_are_found_once_by(
        engine: &Engine,
        config: &ModelConfig,
        data: &Dataset,
        kind: OptimizerKind,
    ) {
        let model = Model::new(engine, config).unwrap();
        let optimizer = Optimizer::new(kind);
        let options = TrainerOptions { batch_size: 2, optimizer, ..TrainerOptions::default() };
        let mut first = Trainer::new(&model, options.clone()).unwrap();
        let mut second = Trainer::new(&model, options).unwrap();
        // A trial replaces bounds by what is there, which is less than any bound computed.
        let weights = |trainer: &Trainer| {
            let mut largest = 0.0f32;
            for info in trainer.model().tensors() {
                let mut values = vec![0.0; info.len()];
                trainer.model().read_tensor(&info.name, &mut values).unwrap();
                largest = values.iter().fold(largest, |most, v| most.max(v.abs()));
            }
            f64::from(largest)
        };
        let Device::Cpu(on) = model.on_device() else { panic!("made on the CPU") };
        let bound = || on.read().unwrap().largest;
        assert_eq!(bound(), f64::INFINITY);
        first.step(data).unwrap();
        assert_eq!(bound(), weights(&first), "tried");
        first.step(data).unwrap();
        second.step(data).unwrap();
        assert!(bound() > weights(&first) && bound() < 1e9, "not tried");
        model.write_tensor("transformer.wte.weight", &[1e10; 512]).unwrap();
        assert_eq!(bound(), 1e10);
        assert!(first.step(data).is_ok() && bound() > 1e10);
        let folder = tempfile::tempdir().unwrap();
        first.save(folder.path()).unwrap();
        let mut loaded = Trainer::load(engine, folder.path()).unwrap();
        assert_eq!(loaded.bounds, Bounds::UNKNOWN);
        loaded.step(data).unwrap();
        assert_eq!(loaded.bounds.weight, weights(&loaded));
        assert!(loaded.bounds.states.iter().all(|bound| *bound < 1.0));
    }
}
