//! `mxt_trainer`: a model, its optimizer, and the place in a run. The memory plan of one.

use std::ffi::{CString, c_char};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::dataset::mxt_dataset;
use super::engine::mxt_engine;
use super::handle::{Handle, State, keep};
use super::message::Slot;
use super::model::{mxt_model, mxt_model_config};
use super::status::{Failure, mxt_status};
use super::structs::{Out, read, read_or_default};
use super::trainer_structs::{
    Texts, mxt_eval_stats, mxt_memory_plan, mxt_step_stats, mxt_trainer_options,
};
use super::{arguments, buffers, guard, handle};
use crate::{Engine, LogLevel, StopHandle, Trainer, TrainerOptions, plan};

/// A model in training: weights, moments, schedule, and the number of steps done. It needs its
/// model for itself while a call is inside: then calls on the model, on the trainer and on other
/// trainers of that model return MXT_ERROR_BUSY. Make with mxt_trainer_new or mxt_trainer_load,
/// free with mxt_trainer_free.
pub struct mxt_trainer {
    state: State,
    /// Locked only under exclusive access of `state`.
    trainer: Mutex<Trainer>,
    model: mxt_model,
    stop: StopHandle,
    /// Whether the host has given it up.
    freed: AtomicBool,
    /// Steps done, to be read while a step is running.
    steps: AtomicU64,
    /// As `steps`.
    schedule_start: AtomicU64,
    /// A copy, to be read while a step is running.
    options: Mutex<TrainerOptions>,
    /// Texts that `mxt_trainer_options` borrows.
    recipe: CString,
    optimizer: CString,
    token_drop: Option<CString>,
    frozen: Option<CString>,
}

impl mxt_trainer {
    /// Of a trainer whose model has no handle yet.
    pub(super) fn with_model(trainer: Trainer) -> Result<*mut Self, Failure> {
        let model = mxt_model::new(trainer.model().clone())?;
        Self::new(trainer, model)
    }

    fn new(trainer: Trainer, model: mxt_model) -> Result<*mut Self, Failure> {
        let options = trainer.options().clone();
        let c_string = |what, name: String| {
            CString::new(name).map_err(|error| {
                Failure::invalid(what, format!("expected a name without zero bytes: {error}"))
            })
        };
        let recipe = c_string("recipe", options.recipe.to_string())?;
        let optimizer = c_string("optimizer", options.optimizer.to_string())?;
        let token_drop = options.token_drop.map(|drop| c_string("token_drop", drop.to_string()));
        let frozen = Some(&options.frozen).filter(|frozen| !frozen.is_empty());
        let frozen = frozen.map(|frozen| c_string("frozen", frozen.to_string()));
        let handle = Self {
            state: State::sharing(model.state().access()),
            stop: trainer.stop_handle(),
            freed: AtomicBool::new(false),
            steps: AtomicU64::new(trainer.steps_done()),
            schedule_start: AtomicU64::new(trainer.schedule_start()),
            trainer: Mutex::new(trainer),
            model,
            options: Mutex::new(options),
            recipe,
            optimizer,
            token_drop: token_drop.transpose()?,
            frozen: frozen.transpose()?,
        };
        Ok(handle.into_raw())
    }

    /// Runs `body` with the trainer and its model for itself, or refuses.
    pub(super) fn exclusive<R>(
        &self,
        body: impl FnOnce(&mut Trainer) -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        let _exclusive = self.state.access().write()?;
        let mut trainer = self.trainer.try_lock().map_err(handle::refused)?;
        let result = body(&mut trainer);
        self.steps.store(trainer.steps_done(), Ordering::Release);
        self.schedule_start.store(trainer.schedule_start(), Ordering::Release);
        result
    }

    pub(super) fn engine(&self) -> &Engine {
        self.model.model.engine()
    }

    /// Sends a warning to the engine's log.
    pub(super) fn warn(&self, line: impl FnOnce() -> String) {
        self.model.model.engine().log(LogLevel::Warning, line);
    }

    /// Whether other ranks make the same calls.
    pub(super) fn is_in_group(&self) -> bool {
        self.model.model.engine().ranks().is_some()
    }

    /// Whether its saves are written: of ranks, those of the first.
    pub(super) fn writes(&self) -> bool {
        self.model.model.engine().rank() == 0
    }

    /// Whether nothing collective can be done any more.
    pub(super) fn has_lost_its_group(&self) -> bool {
        self.model.model.engine().has_lost_its_group()
    }

    pub(super) fn stop(&self) -> &StopHandle {
        &self.stop
    }

    /// Whether the host has given it up, in a call that is still inside.
    pub(super) fn is_freed(&self) -> bool {
        self.freed.load(Ordering::Acquire)
    }

    /// How often something may have changed it or its model so far.
    pub(super) fn changes(&self) -> u64 {
        self.state.access().changes()
    }

    pub(super) fn steps_done(&self) -> u64 {
        self.steps.load(Ordering::Acquire)
    }

    fn schedule_start(&self) -> u64 {
        self.schedule_start.load(Ordering::Acquire)
    }
}

impl Handle for mxt_trainer {
    const SLOT: Slot = Slot::Trainer;
    const NAME: &'static str = "trainer";

    fn state(&self) -> &State {
        &self.state
    }
}

/// Makes a trainer at step 0 of `model` and stores it in `*trainer` for the caller to free. All
/// memory of training is allocated here; see mxt_plan. `options` may be NULL for the defaults.
///
/// The trainer changes the weights of `model`. The handle `model` stays the caller's.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (names
/// the option), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_UNSUPPORTED, MXT_ERROR_BUSY. The message is in
/// mxt_last_error and on the model.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_new(
    model: *mut mxt_model,
    options: *const mxt_trainer_options,
    trainer: *mut *mut mxt_trainer,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::child("mxt_trainer_new", model.cast_const(), |model| {
            let out = arguments::place("trainer", trainer)?;
            let options = read_or_default("options", options)?.parse()?;
            let made = {
                let _exclusive = model.state().access().write()?;
                Trainer::new(&model.model, options)?
            };
            out.put(mxt_trainer::new(made, model.another())?);
            Ok(())
        })
    }
}

/// Loads what mxt_trainer_save wrote, model, moments, options and position, and stores the trainer
/// in `*trainer` for the caller to free. The next steps are the same, bit for bit, as if the run
/// had never stopped. The number of threads may differ; the seed is the checkpoint's.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO, MXT_ERROR_FORMAT (a damaged
/// file; names the tensor), MXT_ERROR_MISMATCH, MXT_ERROR_NOT_FINITE (a number in a file),
/// MXT_ERROR_UNSUPPORTED (what the device cannot do), MXT_ERROR_OUT_OF_MEMORY. The message is in
/// mxt_last_error and on the engine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_load(
    engine: *const mxt_engine,
    dir: *const c_char,
    trainer: *mut *mut mxt_trainer,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::child("mxt_trainer_load", engine, |engine| {
            let out = arguments::place("trainer", trainer)?;
            let dir = arguments::path("dir", dir)?;
            out.put(mxt_trainer::with_model(Trainer::load(&engine.engine, &dir)?)?);
            Ok(())
        })
    }
}

/// mxt_trainer_load, with moments, weights and gradients that are kept from here on in what
/// `optimizer` says, such as "adamw,moments=int8": they are rounded to it once, and the run goes on
/// as one that was made so. The optimizer itself must be the saved one; other switches need not be
/// named again, and cannot be changed. `optimizer` is borrowed for the call.
///
/// Errors: as mxt_trainer_load; MXT_ERROR_INVALID_ARGUMENT for another optimizer, too.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_load_as(
    engine: *const mxt_engine,
    dir: *const c_char,
    optimizer: *const c_char,
    trainer: *mut *mut mxt_trainer,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::child("mxt_trainer_load_as", engine, |engine| {
            let out = arguments::place("trainer", trainer)?;
            let dir = arguments::path("dir", dir)?;
            let optimizer = arguments::text("optimizer", optimizer)?.parse()?;
            let loaded = Trainer::load_as(&engine.engine, &dir, &optimizer)?;
            out.put(mxt_trainer::with_model(loaded)?);
            Ok(())
        })
    }
}

/// Saves model, moments, options and position to the folder `dir`, which is made if it is not
/// there. A failure, or a kill at any instant, leaves a whole checkpoint there, the one before or
/// the new one. Whatever else is in the folder stays. Hugging Face transformers opens the folder as
/// gpt2.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO, MXT_ERROR_FORMAT (a file, or a
/// folder that holds other things and no checkpoint), MXT_ERROR_NOT_FINITE (a weight or a moment),
/// MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_save(
    trainer: *mut mxt_trainer,
    dir: *const c_char,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_save", trainer, |trainer| {
            let dir = arguments::path_of_save("dir", dir, trainer.writes())?;
            trainer.exclusive(|trainer| Ok(trainer.save(&dir)?))
        })
    }
}

/// Does one optimizer step on the next windows of `dataset` and stores what it did in `*stats`
/// (struct_size set by the caller; NULL if not wanted). A stop request does not concern it, as it does
/// mxt_trainer_step_unless_stopped.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (a dataset shorter
/// than a sequence; batches that wait for mxt_trainer_update), MXT_ERROR_TOKEN_RANGE (a token outside
/// of the vocabulary anywhere in the dataset, also where this step does not read it), MXT_ERROR_IO (a
/// file of the dataset has become shorter, or its disk fails), MXT_ERROR_NOT_FINITE (loss or gradient
/// are not, or a weight or moment would not be), MXT_ERROR_BUSY. Whatever the error, weights and
/// moments are as before the step.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_step(
    trainer: *mut mxt_trainer,
    dataset: *const mxt_dataset,
    stats: *mut mxt_step_stats,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_step", trainer, |trainer| {
            let out = Out::optional("stats", stats)?;
            let dataset = keep(dataset).ok_or_else(|| Failure::null("dataset"))?;
            out.put(trainer.exclusive(|trainer| {
                let stats = trainer.step(&dataset.data)?;
                Ok(mxt_step_stats::new(stats, trainer))
            })?);
            Ok(())
        })
    }
}

/// mxt_trainer_step, given up where a stop is asked for (mxt_trainer_request_stop, from any thread
/// or signal handler, or a callback that fills windows): it is seen before each batch of the step.
/// The next step then does the same from its beginning. The request stands until
/// mxt_trainer_clear_stop.
///
/// Errors: as mxt_trainer_step, and MXT_STOPPED: weights and moments are as before the step.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_step_unless_stopped(
    trainer: *mut mxt_trainer,
    dataset: *const mxt_dataset,
    stats: *mut mxt_step_stats,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_step_unless_stopped", trainer, |trainer| {
            let out = Out::optional("stats", stats)?;
            let dataset = keep(dataset).ok_or_else(|| Failure::null("dataset"))?;
            out.put(trainer.exclusive(|trainer| {
                let stats = trainer.step_unless_stopped(&dataset.data)?;
                Ok(mxt_step_stats::new(stats, trainer))
            })?);
            Ok(())
        })
    }
}

/// Does one optimizer step on the caller's own tokens and stores what it did in `*stats`
/// (struct_size set by the caller; NULL if not wanted).
///
/// `tokens` holds accumulation * batch_size rows of sequence_length + 1 tokens, row after row (of N
/// ranks each brings those of its own batches: accumulation / N, from rank * accumulation / N on), and
/// `count` is their number. Position t of a row learns to predict position t + 1. `tokens` may lie
/// in memory of the engine's GPU, written before the call or on the engine's stream.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (a wrong count; an
/// optimizer with "ramping", which draws windows of its own; batches that wait for
/// mxt_trainer_update), MXT_ERROR_TOKEN_RANGE, MXT_ERROR_NOT_FINITE (the weights are as before the
/// step), MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_step_tokens(
    trainer: *mut mxt_trainer,
    tokens: *const u32,
    count: usize,
    stats: *mut mxt_step_stats,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_step_tokens", trainer, |trainer| {
            let out = Out::optional("stats", stats)?;
            let engine = trainer.model.model.engine();
            let stats = buffers::read_in_parts(engine, "tokens", tokens, count, |copy| {
                trainer.exclusive(|trainer| {
                    let stats = trainer.step_copied_tokens(count, copy)?;
                    Ok(mxt_step_stats::new(stats, trainer))
                })
            })?;
            out.put(stats);
            Ok(())
        })
    }
}

/// Computes the mean loss over at most `max_batches` batches spread evenly over `dataset`, the same
/// ones in every call, and stores it in `*stats` (struct_size set by the caller). 0 takes all of
/// the dataset. Changes nothing of the run. A loss that is NaN or infinite is a result, not an
/// error.
///
/// A recipe with "haste" merges the channels that linear layers read, and `*stats` says what that
/// would spare.
///
/// Where no file has the tokens of a sequence and one more, each file of two tokens or more is one
/// shorter sequence of all its tokens; stats->tokens tells how many were predicted.
///
/// A stop request is seen before each batch; it stays for mxt_trainer_run, which may have called
/// back the caller.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (no file of two
/// tokens), MXT_ERROR_TOKEN_RANGE (anywhere in the dataset), MXT_ERROR_IO, MXT_ERROR_BUSY,
/// MXT_STOPPED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_eval(
    trainer: *mut mxt_trainer,
    dataset: *const mxt_dataset,
    max_batches: usize,
    stats: *mut mxt_eval_stats,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_eval", trainer, |trainer| {
            let out = Out::required("stats", stats)?;
            let dataset = keep(dataset).ok_or_else(|| Failure::null("dataset"))?;
            let stats = trainer.exclusive(|t| Ok(t.eval(&dataset.data, max_batches)?))?;
            out.put(stats.into());
            Ok(())
        })
    }
}

/// Asks evaluations from here on, those of mxt_trainer_run too, how sharp the loss is in the
/// logits: how much it could rise if each logit y moved by up to `epsilon` (|y| + 1), from above 0
/// to 1 (1e-3 is usual); 0 ends it. The loss itself stays the same, bit for bit. It takes 20 bytes
/// for each token of a batch, and is not saved with the run.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (another number), MXT_ERROR_OUT_OF_MEMORY,
/// MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_set_sharpness(
    trainer: *mut mxt_trainer,
    epsilon: f32,
) -> mxt_status {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe {
        guard::method("mxt_trainer_set_sharpness", trainer, |trainer| {
            let epsilon = Some(epsilon).filter(|epsilon| *epsilon != 0.0);
            trainer.exclusive(|trainer| Ok(trainer.set_sharpness(epsilon)?))
        })
    }
}

/// Takes `lr` as the learning rate from the next step on, in place of the schedule's. It is saved
/// with the run; mxt_trainer_use_schedule takes it back.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (negative or not finite), MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_set_lr(trainer: *mut mxt_trainer, lr: f32) -> mxt_status {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe {
        guard::method("mxt_trainer_set_lr", trainer, |trainer| {
            trainer.exclusive(|trainer| Ok(trainer.set_lr(Some(lr))?))
        })
    }
}

/// Takes a new schedule from the next step on: `schedule`, `lr`, `min_lr`, `warmup_steps`,
/// `total_steps` and `decay_steps` of `options`; nothing else of it is read. Its steps are counted
/// from here: it begins with its warm-up and ends total_steps steps later. A rate that
/// mxt_trainer_set_lr set is dropped. The schedule, and where it began, are saved with the run.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (names the field; the
/// present schedule stays), MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_set_schedule(
    trainer: *mut mxt_trainer,
    options: *const mxt_trainer_options,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_set_schedule", trainer, |handle| {
            let schedule = read("options", options)?.schedule()?;
            handle.exclusive(|trainer| {
                trainer.set_schedule(schedule.clone())?;
                handle.options.lock().unwrap_or_else(PoisonError::into_inner).schedule = schedule;
                Ok(())
            })
        })
    }
}

/// Returns to the schedule's learning rate after mxt_trainer_set_lr.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_use_schedule(trainer: *mut mxt_trainer) -> mxt_status {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe {
        guard::method("mxt_trainer_use_schedule", trainer, |trainer| {
            trainer.exclusive(|trainer| Ok(trainer.set_lr(None)?))
        })
    }
}

/// The step that the schedule counts from: 0, or the number of steps that were done when
/// mxt_trainer_set_schedule set it. 0 if `trainer` is NULL. Any thread may call it at any time,
/// also while a step is running.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_schedule_start(trainer: *const mxt_trainer) -> u64 {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::getter("mxt_trainer_schedule_start", trainer, mxt_trainer::schedule_start) }
}

/// Number of optimizer steps done since step 0, those before a save and load included. 0 if
/// `trainer` is NULL. Any thread may call it at any time, also while a step is running.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_steps_done(trainer: *const mxt_trainer) -> u64 {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::getter("mxt_trainer_steps_done", trainer, mxt_trainer::steps_done) }
}

/// Stores a new handle on the trainer's model in `*model`, for the caller to free. It is the same
/// model: the next step changes what the handle reads.
///
/// Any thread may call it at any time. Errors: MXT_ERROR_NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_model(
    trainer: *const mxt_trainer,
    model: *mut *mut mxt_model,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_model", trainer, |trainer| {
            let out = arguments::place("model", model)?;
            out.put(trainer.model.another().into_raw());
            Ok(())
        })
    }
}

/// Stores the options that the trainer was made from, or loaded with, and the schedule last set, in
/// `*options` (struct_size set by the caller). Its texts are valid as long as the trainer.
///
/// Any thread may call it at any time. Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_get_options(
    trainer: *const mxt_trainer,
    options: *mut mxt_trainer_options,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_get_options", trainer, |trainer| {
            let out = Out::required("options", options)?;
            let options = trainer.options.lock().unwrap_or_else(PoisonError::into_inner);
            let texts = Texts {
                recipe: Some(&trainer.recipe),
                optimizer: Some(&trainer.optimizer),
                token_drop: trainer.token_drop.as_deref(),
                frozen: trainer.frozen.as_deref(),
            };
            out.put(mxt_trainer_options::new(&options, texts));
            Ok(())
        })
    }
}

/// Asks mxt_trainer_run to stop: before its next step, or before the next batch of a step of
/// several batches or of an evaluation, which then count as not done. A run that is not started yet
/// stops at once. mxt_trainer_eval stops with MXT_STOPPED. The request stands until a run uses it
/// up, and with it all that come before that run has returned, or mxt_trainer_clear_stop takes it
/// back. NULL does nothing.
///
/// Any thread and any signal handler may call it at any time: it is one atomic store. The handle
/// must not be freed meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_request_stop(trainer: *const mxt_trainer) {
    // NOTE: no guard. It would touch thread-local storage, whose first use may allocate.
    // SAFETY: a live handle or NULL, as the header asks.
    if let Some(trainer) = unsafe { trainer.as_ref() } {
        trainer.stop.request_stop();
    }
}

/// Takes a stop request back that no run has used up. NULL does nothing.
///
/// Any thread and any signal handler may call it at any time, as mxt_trainer_request_stop.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_clear_stop(trainer: *const mxt_trainer) {
    // SAFETY: a live handle or NULL, as the header asks.
    if let Some(trainer) = unsafe { trainer.as_ref() } {
        trainer.stop.clear();
    }
}

/// The message of the last call with this trainer that failed, on whichever thread; the empty
/// string when there is none.
///
/// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
/// call of mxt_trainer_last_error. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_last_error(trainer: *const mxt_trainer) -> *const c_char {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::last_error("mxt_trainer_last_error", trainer) }
}

/// Gives the trainer up; NULL does nothing. Nothing is saved. Its model stays usable through other
/// handles. A callback may free the trainer that called it: the run then stops before its next
/// step.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_free(trainer: *mut mxt_trainer) {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe {
        mxt_trainer_request_stop(trainer);
        if let Some(trainer) = trainer.as_ref() {
            trainer.freed.store(true, Ordering::Release);
        }
        guard::free("mxt_trainer_free", trainer);
    }
}

/// Computes the bytes that a model of this shape with its trainer will take, before anything is
/// allocated, and stores them in `*result` (struct_size set by the caller). `options` may be NULL
/// for the defaults. The engine's memory limit does not concern it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT,
/// MXT_ERROR_UNSUPPORTED (what the device cannot do).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_plan(
    engine: *const mxt_engine,
    config: *const mxt_model_config,
    options: *const mxt_trainer_options,
    result: *mut mxt_memory_plan,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::child("mxt_plan", engine, |engine| {
            let out = Out::required("result", result)?;
            let config = read("config", config)?.parse()?;
            let options = read_or_default("options", options)?.parse()?;
            out.put(plan(&engine.engine, &config, &options)?.into());
            Ok(())
        })
    }
}
