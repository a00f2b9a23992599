//! A step in parts: gradients of batches that the host gives, with losses of its own if it likes,
//! which add up until an update is made of them; and what it reads and writes of them before that.
//!
//! Gradients lie there as a step of all its micro-steps makes them: of the sum of weighted losses over
//! the number of its positions. What the sum is really divided by is known at the update, which
//! multiplies them by the ratio, and does not where that is 1. So batches of which every position
//! counts once have the bits of [`Trainer::step`].

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::batch::Weighed;
use super::memory::Buffers;
use super::{Gradients, Run, Trainer};
use crate::backend::{Backend, HostLoss, Sequences, on_device};
use crate::checkpoint::{Scratch, TensorRead};
use crate::gpt::{Pass, Place, TensorInfo};
use crate::model::{Model, Named};
use crate::reserve::reserve;
use crate::run::TrainerState;
use crate::{Error, EvalStats, Result, StepStats};

/// In place of a target: the position is no part of the loss.
pub const IGNORED: u32 = u32::MAX;

/// What [`Trainer::forward_backward`] learns from: B = batch_size sequences of T = sequence_length
/// tokens, and as many of all else, row-major.
#[derive(Default)]
pub struct Batch<'a> {
    /// (B, T): inputs.
    pub tokens: &'a [u32],
    /// (B, T): what each position is to predict, or [`IGNORED`]. May be empty with `loss`, which then
    /// is of all positions.
    pub targets: &'a [u32],
    /// (B, T): the number of the document that each token is of. Where it changes along a sequence
    /// another document begins: attention looks at no other than a token's own, and positions are
    /// counted from where it begins, so that each has the logits that it has alone. None takes
    /// [`crate::TrainerOptions::document_end`] or, without it, each sequence as one document.
    pub documents: Option<&'a [u32]>,
    /// (B, T): a factor of each position's loss, such as 0 for what is not an answer. None is 1 for
    /// each. Those of ignored targets do not matter.
    pub weights: Option<&'a [f32]>,
    /// What the sum of weighted losses is divided by, together with those of the step's other batches.
    /// None is the sum of the weights, so that the step's loss is the mean over what counts.
    pub divisor: Option<f64>,
    /// In place of cross-entropy: gets logits of some rows at a time, never of all, and makes losses
    /// and gradients of them, on the thread of the call. Its error ends the call.
    pub loss: Option<&'a mut HostLoss<'a>>,
}

impl Batch<'_> {
    /// Gives `work` what copies its numbers, and its loss.
    fn read<R>(self, work: impl FnOnce(&Given<'_>, Option<&mut HostLoss<'_>>) -> R) -> R {
        let Self { tokens, targets, documents, weights, divisor, loss } = self;
        let copy_tokens = |to: &mut [u32]| to.copy_from_slice(tokens);
        let copy_targets = |to: &mut [u32]| to.copy_from_slice(targets);
        let copy_documents = |to: &mut [u32]| to.copy_from_slice(documents.unwrap_or_default());
        let copy_weights = |to: &mut [f32]| to.copy_from_slice(weights.unwrap_or_default());
        let given = Given {
            tokens: &copy_tokens,
            targets: (!targets.is_empty()).then_some(&copy_targets),
            documents: documents.is_some().then_some(&copy_documents),
            weights: weights.is_some().then_some(&copy_weights),
            divisor,
        };
        work(&given, loss.map(|loss| loss as _))
    }
}

impl fmt::Debug for Batch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("tokens", &self.tokens.len()).finish_non_exhaustive()
    }
}

/// Fills an array from another.
type Copying<'a, T> = &'a dyn Fn(&mut [T]);

/// A [`Batch`] whose numbers are copied once, from wherever they are.
pub(crate) struct Given<'a> {
    pub(crate) tokens: Copying<'a, u32>,
    pub(crate) targets: Option<Copying<'a, u32>>,
    pub(crate) documents: Option<Copying<'a, u32>>,
    pub(crate) weights: Option<Copying<'a, f32>>,
    pub(crate) divisor: Option<f64>,
}

/// Gradients that wait for an update.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    /// What they are of; none where the host has written all of them.
    batches: usize,
    /// What the sum of losses is divided by.
    divisor: f64,
    /// Whether the host has written or scaled any.
    is_changed: bool,
}

impl Pending {
    const NONE: Self = Self { batches: 0, divisor: 0.0, is_changed: false };
}

impl Trainer {
    /// Computes the gradients of a batch, and adds them to those of the batches since the last
    /// update: of the loss that these have together, the sum of all weighted losses over the sum of
    /// divisors. [`Trainer::update`] makes the step of them. `losses` (B, T) gets each position's
    /// own, without its weight; 0 where the target is ignored.
    ///
    /// With `accumulation` such batches, all weights 1, a step has the bits of
    /// [`Trainer::step_tokens`] on the same tokens. Other numbers of batches are as good, but with
    /// lanes, or in a group of ranks: there each rank gives its accumulation / ranks. It is no
    /// collective call.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for other lengths, a divisor or a weight that is not finite, an
    /// optimizer with `ramping`, more batches than a step has, which is one with `gradients=bf16`, and
    /// where gradients were written or scaled; [`Error::TokenRange`]; [`Error::NotFinite`] for a weight. The batches before still wait then. After any other error,
    /// that of the host's loss included, none of them does.
    pub fn forward_backward(&mut self, batch: Batch<'_>, losses: Option<&mut [f32]>) -> Result<()> {
        self.check_lengths(&batch)?;
        batch.read(|given, loss| self.forward_backward_given(given, loss, losses))
    }

    fn check_lengths(&self, batch: &Batch<'_>) -> Result<()> {
        let Batch { tokens, targets, documents, weights, loss, .. } = batch;
        let expected = self.rows();
        let lengths = [
            ("tokens", tokens.len(), true),
            ("targets", targets.len(), loss.is_none() || !targets.is_empty()),
            ("documents", documents.map_or(0, <[u32]>::len), documents.is_some()),
            ("weights", weights.map_or(0, <[f32]>::len), weights.is_some()),
        ];
        let mut lengths = lengths.into_iter().filter(|(_, _, counts)| *counts);
        lengths.try_for_each(|(what, len, _)| self.check_len(what, len, expected))
    }

    /// The loss of a batch, without gradients: the sum of its weighted losses over its divisor; the
    /// tokens are the targets whose weight is not 0. Like [`Trainer::eval`] it changes nothing of the
    /// run, batches that wait for an update included, and a loss that is not finite is a result. It is
    /// no collective call.
    ///
    /// # Errors
    /// As [`Trainer::forward_backward`], which a recipe or an optimizer may stop besides;
    /// [`Error::InvalidArgument`] where the divisor is not above 0.
    pub fn forward(&mut self, batch: Batch<'_>, losses: Option<&mut [f32]>) -> Result<EvalStats> {
        self.check_lengths(&batch)?;
        batch.read(|given, loss| self.forward_given(given, loss, losses))
    }

    /// [`Trainer::forward`] of what is read by functions.
    pub(crate) fn forward_given(
        &mut self,
        given: &Given<'_>,
        loss: Option<&mut HostLoss<'_>>,
        losses: Option<&mut [f32]>,
    ) -> Result<EvalStats> {
        let started = Instant::now();
        self.check_given_batch(given, losses.as_deref())?;
        let Self { run, model, state, .. } = self;
        let [sum, divisor, targets] =
            on_device!(run, run => run.batch_loss(model, state, given, (loss, losses))?);
        let divisor = given.divisor.unwrap_or(divisor);
        let nominal = self.nominal_divisor();
        if !is_good_divisor(divisor, nominal) {
            return Err(bad_divisor(divisor, nominal));
        }
        Ok(EvalStats {
            loss: (sum / divisor) as f32,
            tokens: targets as u64,
            seconds: started.elapsed().as_secs_f64(),
            spared: None,
            sharpness: None,
        })
    }

    /// Positions of a batch.
    pub(crate) fn rows(&self) -> usize {
        let options = &self.state.options;
        options.batch_size * options.sequence_length
    }

    /// Whether there are as many numbers as positions.
    pub(crate) fn check_len(&self, what: &'static str, len: usize, expected: usize) -> Result<()> {
        if len == expected {
            return Ok(());
        }
        let options = &self.state.options;
        let (b, t) = (options.batch_size, options.sequence_length);
        let message = format!("expected {b} sequences of {t}, which is {expected}; got {len}");
        Err(Error::invalid(what, message))
    }

    /// [`Trainer::forward_backward`] of what is read by functions; with a loss of the host's,
    /// targets are needed no more.
    pub(crate) fn forward_backward_given(
        &mut self,
        given: &Given<'_>,
        loss: Option<&mut HostLoss<'_>>,
        losses: Option<&mut [f32]>,
    ) -> Result<()> {
        self.check_given_batch(given, losses.as_deref())?;
        self.state.options.recipe.check_trains()?;
        self.check_no_ramping()?;
        let before = self.pending.unwrap_or(Pending::NONE);
        if before.is_changed {
            let message = "gradients that were written or scaled wait for an update, to which no \
                           batch can be added; call update, or zero_gradients to drop them";
            return Err(Error::invalid("trainer", message));
        }
        let next = self.next_micro_step(before.batches)?;
        let Self { run, model, state, pending, dropped, .. } = self;
        let options = &state.options;
        let sequences = Sequences { batch: options.batch_size, length: options.sequence_length };
        let sum = on_device!(&mut *run, run => {
            run.buffers.batch.take(sequences, given, model.config().vocab_size)
        })?
        .sum;
        // Whatever goes wrong from here on leaves less than a sum of gradients.
        (*pending, *dropped) = (None, true);
        on_device!(run, run => run.batch_gradients(model, state, next, loss)?);
        if let Some(losses) = losses {
            on_device!(run, run => run.read_losses(losses)?);
        }
        let divisor = before.divisor + given.divisor.unwrap_or(sum);
        *pending = Some(Pending { batches: before.batches + 1, divisor, is_changed: false });
        Ok(())
    }

    fn check_given_batch(&self, given: &Given<'_>, losses: Option<&[f32]>) -> Result<()> {
        if let Some(losses) = losses {
            self.check_len("losses", losses.len(), self.rows())?;
        }
        if let Some(divisor) = given.divisor.filter(|divisor| !divisor.is_finite()) {
            let message = format!("expected a finite number, got {divisor}");
            return Err(Error::invalid("divisor", message));
        }
        Ok(())
    }

    /// Where the next batch belongs, after so many.
    fn next_micro_step(&self, done: usize) -> Result<MicroStep> {
        // They have 14 bits in the counter of the random numbers.
        const MOST: usize = 1 << 14;
        let share = on_device!(&self.run, run => run.buffers.flat.exchange.share);
        if done > 0 && self.state.options.optimizer.gradients == crate::Gradients::Bf16 {
            let message = "gradients=bf16 would round the sum after each batch: expected one before an \
                           update; use gradients=f32, or a larger batch_size";
            return Err(Error::invalid("optimizer", message));
        }
        let most = if self.has_shares() { share.all().len() } else { MOST };
        if done >= most {
            let message = format!(
                "expected at most {most} batches before an update, for which that many wait; call \
                 update, or zero_gradients to begin anew"
            );
            return Err(Error::invalid("batch", message));
        }
        let (lane, number) = match self.has_shares() {
            false => (0, done),
            true => share.lanes_and_micro_steps().nth(done).unwrap_or_default(),
        };
        let of_lane = share.micro_steps(lane);
        let is_last = self.has_shares() && number + 1 == of_lane.end;
        Ok(MicroStep {
            number,
            lane,
            is_first: done == 0,
            accumulates: if self.has_shares() { number > of_lane.start } else { done > 0 },
            ends_lane: is_last,
        })
    }

    /// Whether a step is the sum of lanes, here or on other ranks, which fixes how many batches it
    /// has.
    fn has_shares(&self) -> bool {
        self.state.options.lanes > 1
    }

    /// One optimizer step by the gradients of all batches since the last one: clips, and updates. Its
    /// stats are those of [`Trainer::step`]. Collective in a group of ranks.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where no batch waits, or too few with lanes or in a group; or where
    /// the divisors of all batches are not above 0 together, as where every target was ignored: pass
    /// one. Else as [`Trainer::step_tokens`]. Weights and moments are then those before. Batches still
    /// wait where there are too few, here or on another rank, and where ranks ask for different things;
    /// after any other error none does.
    pub fn update(&mut self) -> Result<StepStats> {
        let ready = self.check_whole();
        let is_ready = ready.is_ok();
        let Pending { batches, divisor, .. } = self.pending.unwrap_or(Pending::NONE);
        let nominal = self.nominal_divisor();
        let rows = self.rows() as u64;
        // Gradients that the host has written are what they are.
        let divisor = if batches == 0 { nominal } else { divisor };
        let done = self.optimizer_step(ready, None, false, Gradients::Made(divisor));
        // What ranks refuse before anything is done leaves all of them their batches.
        let is_refused =
            matches!(done, Err(Error::Peer { .. } | Error::RanksDiffer { .. } | Error::Stopped))
                && !self.model.engine().has_lost_its_group();
        if is_ready && !is_refused {
            self.pending = None;
            self.dropped |= done.is_err();
        }
        let stats = done?;
        let is_alone = !self.has_shares();
        Ok(StepStats {
            tokens: if is_alone { batches as u64 * rows } else { stats.tokens },
            ..stats
        })
    }

    /// Whether there is all that an update needs.
    fn check_whole(&self) -> Result<()> {
        let share = on_device!(&self.run, run => run.buffers.flat.exchange.share);
        let expected = share.all().len();
        match self.pending {
            None => {
                let message = "expected gradients; call forward_backward first";
                Err(Error::invalid("trainer", message))
            }
            Some(Pending { batches, .. }) if self.has_shares() && batches != expected => {
                let message = format!(
                    "expected {expected} batches before an update, the share of this rank in \
                     accumulation, whose lanes are added up in one order; got {batches}"
                );
                Err(Error::invalid("trainer", message))
            }
            Some(_) => Ok(()),
        }
    }

    /// What losses are divided by while they are added up.
    pub(super) fn nominal_divisor(&self) -> f64 {
        self.state.options.accumulation as f64 * self.rows() as f64
    }

    /// An error where gradients wait, which a step would overwrite.
    pub(super) fn check_nothing_waits(&self) -> Result<()> {
        let Some(Pending { batches, .. }) = self.pending else { return Ok(()) };
        let message = format!(
            "gradients of {batches} batches wait for an update; call update, or zero_gradients to drop \
             them"
        );
        Err(Error::invalid("trainer", message))
    }

    /// Drops the gradients that wait for an update.
    pub fn zero_gradients(&mut self) {
        self.dropped |= self.pending.take().is_some();
    }

    /// Multiplies the gradient that waits for an update by `factor`, of the tensor of this name, or of
    /// all where there is none. No batch can be added then.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`]; [`Error::InvalidArgument`] for a factor that is not finite, and where no
    /// gradient waits; [`Error::Unsupported`] with lanes or in a group, whose gradients are not one
    /// sum before the update.
    pub fn scale_gradients(&mut self, name: Option<&str>, factor: f32) -> Result<()> {
        if !factor.is_finite() {
            let message = format!("expected a finite number, got {factor}");
            return Err(Error::invalid("factor", message));
        }
        let all = 0..self.model.tensors().len();
        let of = match name {
            None => all,
            Some(name) => {
                let number = self.model.number_of(name)?;
                self.check_trained(name)?;
                number..number + 1
            }
        };
        self.check_is_one_sum()?;
        if self.pending.is_none() {
            let message = "expected gradients; call forward_backward first";
            return Err(Error::invalid("trainer", message));
        }
        on_device!(&mut self.run, run => run.scale_gradients(&of, factor));
        if let Some(pending) = &mut self.pending {
            pending.is_changed = true;
        }
        Ok(())
    }

    /// Overwrites the gradient that waits for an update, of a tensor in the shape that
    /// [`crate::Model::tensors`] gives, as [`Trainer::read_gradient`] would read it. Where none waits,
    /// those of all others are 0. No batch can be added then.
    ///
    /// # Errors
    /// As [`crate::Model::write_tensor`]; [`Error::InvalidArgument`] where the divisors of the batches
    /// that wait are not above 0 together; [`Error::Unsupported`] as for [`Trainer::scale_gradients`].
    pub fn write_gradient(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let named = self.model.named(name, values.len())?;
        self.check_trained_at(named.index, name)?;
        if let Some((i, value)) = values.iter().enumerate().find(|(_, v)| !v.is_finite()) {
            let what = format!("element {i} of the gradient of {name}");
            return Err(Error::NotFinite { what, value: *value });
        }
        self.check_is_one_sum()?;
        let factor = self.read_factor()?;
        let is_new = self.pending.is_none();
        let Self { run, model, pending, dropped, .. } = self;
        *dropped |= is_new;
        on_device!(run, run => {
            if is_new {
                run.clear_gradients()?;
            }
            run.write_gradient(&named, model.tensors(), values, factor)?;
        });
        pending.get_or_insert(Pending::NONE).is_changed = true;
        Ok(())
    }

    /// What makes gradients as they lie there those of the loss of the batches that wait.
    pub(super) fn read_factor(&self) -> Result<f64> {
        let Some(Pending { batches: 1.., divisor, .. }) = self.pending else { return Ok(1.0) };
        let nominal = self.nominal_divisor();
        if is_good_divisor(divisor, nominal) {
            return Ok(nominal / divisor);
        }
        Err(bad_divisor(divisor, nominal))
    }

    /// Whether a tensor is trained, so that it has a gradient: neither frozen nor beside adapters.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn is_trained(&self, name: &str) -> Result<bool> {
        let index = self.model.number_of(name)?;
        Ok(self.is_trained_at(index))
    }

    fn is_trained_at(&self, index: usize) -> bool {
        on_device!(&self.run, run => run.buffers.flat.slots[index].len > 0)
    }

    /// An error where this tensor has no gradient.
    pub(super) fn check_trained(&self, name: &str) -> Result<()> {
        self.check_trained_at(self.model.number_of(name)?, name)
    }

    /// The same of the tensor of this number, which `name` is of.
    pub(super) fn check_trained_at(&self, index: usize, name: &str) -> Result<()> {
        if self.is_trained_at(index) {
            return Ok(());
        }
        let message = format!("{name} is frozen, so that it has no gradient");
        Err(Error::invalid("tensor", message))
    }

    fn check_is_one_sum(&self) -> Result<()> {
        if !self.has_shares() {
            return Ok(());
        }
        let what = "changing gradients between batches and update with lanes, or in a group";
        let remedy = "use weights of the batches, or a trainer with one lane".to_owned();
        Err(Error::Unsupported { what: what.to_owned(), remedy })
    }

    /// An error for an optimizer that draws windows of its own.
    pub(super) fn check_no_ramping(&self) -> Result<()> {
        let optimizer = &self.state.options.optimizer;
        if optimizer.ramping == 0 {
            return Ok(());
        }
        let message = format!(
            "ramping draws windows of its own from a dataset, which given tokens are none of; make \
             steps on a dataset, or use adamw without it, got {optimizer}"
        );
        Err(Error::invalid("optimizer", message))
    }
}

/// How far a mean weight may be from 1: gradients are added up before they are divided, in f32.
const MOST: f64 = 1e20;

/// Whether losses of a step of so many positions can be divided by this.
pub(super) fn is_good_divisor(divisor: f64, positions: f64) -> bool {
    // False of NaN.
    (positions / MOST..=positions * MOST).contains(&divisor)
}

/// Why they cannot.
pub(super) fn bad_divisor(divisor: f64, positions: f64) -> Error {
    let message = format!(
        "expected that the weights of a step's batches, or the divisors that they have instead, are \
         above 0 together, and from {:e} to {:e}; got {divisor:e}. Where every target is ignored, or \
         weights are below 0, pass a divisor",
        positions / MOST,
        positions * MOST
    );
    Error::invalid("divisor", message)
}

/// One of a step's micro-steps.
#[derive(Clone, Copy)]
pub(super) struct MicroStep {
    pub(super) number: usize,
    pub(super) lane: usize,
    /// Of those that this rank makes.
    pub(super) is_first: bool,
    /// Whether its gradients are added to what is there.
    pub(super) accumulates: bool,
    /// Whether a lane is joined with others behind it.
    pub(super) ends_lane: bool,
}

impl<B: Backend> Run<B> {
    /// The gradients of the batch that is in the buffers.
    fn batch_gradients(
        &mut self,
        model: &Model,
        state: &TrainerState,
        micro_step: MicroStep,
        loss: Option<&mut HostLoss<'_>>,
    ) -> Result<()> {
        let on = Arc::clone(&self.model);
        // NOTE: to be read, so that a host's loss that panics poisons nothing.
        let weights = on.read_as(state.options.optimizer.master)?;
        self.record_anew(&weights);
        let place = Place { seed: state.seed, step: state.step, micro_step: micro_step.number };
        let options = &state.options;
        let positions = options.batch_size * options.sequence_length * options.accumulation;
        let scale = 1.0 / positions as u64 as f32;
        self.micro_step(&weights, model, state, (micro_step, place, scale), loss)
    }

    /// The sum of the weighted losses of a batch, of its weights, and how many are not 0.
    fn batch_loss(
        &mut self,
        model: &Model,
        state: &TrainerState,
        given: &Given<'_>,
        (loss, losses): (Option<&mut HostLoss<'_>>, Option<&mut [f32]>),
    ) -> Result<[f64; 3]> {
        let on = Arc::clone(&self.model);
        let options = &state.options;
        let sequences = Sequences { batch: options.batch_size, length: options.sequence_length };
        let weights = on.read_as(options.optimizer.master)?;
        let Self { buffers, step_plan: plan, .. } = self;
        let Buffers { flat, activations, batch, workspace, .. } = buffers;
        let Weighed { sum: divisor, targets: counted } =
            batch.take(sequences, given, model.config().vocab_size)?;
        options.recipe.set_step(plan, false, (0, 0), state.step);
        (plan.kept, plan.weighted) = (None, batch.is_weighted());
        let (backend, config) = (&*on.backend, model.config());
        batch.packed.make_room(&on, model.engine(), sequences.rows())?;
        plan.documents = batch.packed.documents().is_some();
        backend.scope(|| batch.upload(backend))?;
        let documents = batch.packed.documents();
        let mut pass = Pass {
            backend,
            config,
            table: &on.table,
            weights: &weights.all,
            means: flat.followed.means(),
            trains: false,
            merge: None,
            workspace,
            sequences,
            documents,
            plan,
        };
        let (tokens, targets) = (&mut batch.tokens, &mut batch.targets);
        backend.scope(|| {
            let tokens: &mut _ = tokens;
            pass.forward(activations, tokens);
        });
        match loss {
            None => backend.scope(|| {
                let targets: &mut _ = targets;
                pass.loss(activations, targets);
            }),
            // On this thread, which is the host's.
            Some(loss) => pass.loss_of_host(activations, loss)?,
        }
        let of_targets = (&activations.losses, batch.is_weighted().then_some(&batch.weights));
        let sum = backend
            .scope(|| backend.sum_losses(&mut flat.reduction, of_targets, sequences.rows()))?;
        losses.map_or(Ok(()), |losses| self.read_losses(losses))?;
        Ok([sum, divisor, counted as f64])
    }

    /// Losses of the batch that is in the buffers.
    fn read_losses(&self, to: &mut [f32]) -> Result<()> {
        let Buffers { activations, batch, .. } = &self.buffers;
        self.model.backend.read_f32(&activations.losses, 0, to)?;
        let ignored = to.iter_mut().enumerate().filter(|(row, _)| batch.is_ignored(*row));
        ignored.for_each(|(_, loss)| *loss = 0.0);
        Ok(())
    }

    fn scale_gradients(&mut self, of: &Range<usize>, factor: f32) {
        let (backend, gradients) = (&*self.model.backend, &mut self.buffers.flat.gradients);
        backend.scope(|| backend.scale_gradients(gradients, of, factor));
    }

    /// Makes all gradients, and what is counted of a step, 0.
    fn clear_gradients(&mut self) -> Result<()> {
        let (on, Buffers { flat, workspace, .. }) = (&*self.model, &mut self.buffers);
        let (backend, gradients) = (&*on.backend, &mut flat.gradients);
        backend.scope(|| {
            for slot in on.table.slots() {
                let gradient = gradients.of(backend, [*slot]);
                gradient.into_iter().flatten().for_each(|gradient| backend.zero_gradient(gradient));
            }
            backend.begin_step(workspace);
        });
        backend.set_losses(&mut flat.reduction, 0.0)
    }

    /// Writes a gradient that is read times `factor`.
    fn write_gradient(
        &mut self,
        named: &Named,
        tensors: &[TensorInfo],
        values: &[f32],
        factor: f64,
    ) -> Result<()> {
        let (index, mut whole) = (named.index, Vec::new());
        let (on, gradients) = (&*self.model, &mut self.buffers.flat.gradients);
        let (mut scaled, mut ours) = (Vec::new(), Vec::new());
        let mut values = values;
        if factor != 1.0 {
            reserve(&mut scaled, "a gradient", values.len())?;
            scaled.extend(values.iter().map(|value| (f64::from(*value) / factor) as f32));
            values = &scaled;
        }
        let values = named.whole(values, &mut whole, |whole| {
            let exported = on.exported_gradients(tensors, gradients);
            exported.read(index, whole, &mut Scratch::default())
        })?;
        let ours = on.table.specs()[index].import(values, &mut ours)?;
        gradients.write(&*on.backend, on.table.slots()[index], ours)
    }
}
