//! `mxt_trainer_run`: many steps with evaluation and checkpoints in one call.
//!
//! NOTE: the callback runs outside of the guard and without any lock. So it may call the library on
//! the very trainer that called it, and an exception that a C++ host throws from it passes through
//! this file's frames to the host's handler with the trainer whole, at a step boundary.
//!
//! A side job never costs the run: an evaluation or a checkpoint that fails is logged and counted,
//! and the steps go on. What its last try says is what the host is told at the end.

use std::ffi::{c_char, c_void};
use std::path::PathBuf;
use std::sync::Arc;

use super::dataset::mxt_dataset;
use super::files::{self, mxt_files};
use super::handle::keep;
use super::status::mxt_status_code::{
    MXT_ERROR_DEVICE, MXT_ERROR_MISMATCH, MXT_ERROR_PANIC, MXT_ERROR_PEER, MXT_ERROR_POISONED,
    MXT_STOPPED,
};
use super::status::{Failure, mxt_status};
use super::structs::{self, Options, Out, read, versioned};
use super::trainer::mxt_trainer;
use super::trainer_structs::{mxt_eval_stats, mxt_step_stats};
use super::{arguments, cancel, guard};
use crate::Cadence;

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_run_end {
    /// All steps are done.
    Finished = 0,
    /// The callback returned a number other than 0.
    Callback = 1,
    /// mxt_trainer_request_stop was called, maybe during a step or an evaluation, which was given
    /// up.
    Request = 2,
}

/// Sees every step of a run. `eval` is NULL except after a step that was followed by an evaluation,
/// and where that failed or was stopped.
/// Both structs are borrowed for the call. Returns 0 to go on; any other number ends the run.
///
/// Runs on the thread that called mxt_trainer_run, after the step, its evaluation and its
/// checkpoint. It may call the library, on this trainer too: save, eval, set_lr, generate, even
/// free. A C++ exception passes through mxt_trainer_run, which then saves nothing, and leaves the
/// trainer usable; do not longjmp.
pub type mxt_step_fn = Option<
    unsafe extern "C-unwind" fn(
        user_data: *mut c_void,
        step: *const mxt_step_stats,
        eval: *const mxt_eval_stats,
    ) -> i32,
>;

/// What mxt_trainer_run does. Fill it with mxt_run_options_init.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct mxt_run_options {
    /// Set by mxt_run_options_init.
    pub struct_size: usize,
    /// Steps to do in this call. Default 0.
    pub steps: u64,
    /// Data to evaluate on, or NULL (default). Borrowed for the call.
    pub eval_dataset: *const mxt_dataset,
    /// Evaluates whenever the number of steps done is a multiple of it, and after the last step.
    /// 0 (default): after the last step only.
    pub eval_every: u64,
    /// Most batches of one evaluation. 0 takes all of the dataset. Default 20.
    pub eval_batches: usize,
    /// Folder for the checkpoint, or NULL (default). Borrowed for the call.
    pub save_dir: *const c_char,
    /// Saves whenever the number of steps done is a multiple of it, and at the end of the run,
    /// however it ends; there once more where on_step may have changed the trainer or its model
    /// since, by any call that needs them for itself.
    /// 0 (default): at the end only.
    pub save_every: u64,
    /// Sees every step, or NULL (default).
    pub on_step: mxt_step_fn,
    /// Passed to on_step.
    pub user_data: *mut c_void,
    /// Files for the checkpoint in place of save_dir, or NULL (default). Borrowed for the call.
    /// They are in use only inside each checkpoint, not while the callback runs, which may free them:
    /// the run has them until it ends.
    pub save_files: *mut mxt_files,
}
versioned!(mxt_run_options, last = user_data: *mut c_void, then save_files: *mut mxt_files);

impl Options for mxt_run_options {
    fn defaults() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            steps: 0,
            eval_dataset: std::ptr::null(),
            eval_every: 0,
            eval_batches: 20,
            save_dir: std::ptr::null(),
            save_every: 0,
            on_step: None,
            user_data: std::ptr::null_mut(),
            save_files: std::ptr::null_mut(),
        }
    }
}

/// What a run did. Set struct_size to sizeof(mxt_run_result) before the call that fills it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_run_result {
    /// sizeof(mxt_run_result), set by the caller.
    pub struct_size: usize,
    /// Steps done in this call.
    pub steps: u64,
    /// Tokens trained on in this call.
    pub tokens: u64,
    /// Seconds spent in steps, without evaluations, checkpoints and callbacks.
    pub seconds: f64,
    /// Loss of the last step, NaN if there was none.
    pub last_loss: f32,
    /// Loss of the last evaluation that did not fail, NaN if there was none.
    pub last_eval_loss: f32,
    /// One of mxt_run_end.
    pub end: i32,
    /// 1 if save_dir or save_files holds the trainer as it is now, else 0.
    pub saved: i32,
    /// Evaluations of this call that failed. The log has their messages.
    pub eval_errors: u64,
    /// Checkpoints of this call that could not be saved. The log has their messages.
    pub save_errors: u64,
}
versioned!(
    mxt_run_result,
    last = saved: i32,
    then eval_errors: u64,
    then save_errors: u64
);

/// Fills `options` with the defaults. `struct_size` is sizeof(mxt_run_options) as the caller's
/// compiler sees it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_run_options_init(
    options: *mut mxt_run_options,
    struct_size: usize,
) -> mxt_status {
    // SAFETY: the caller's struct has `struct_size` bytes.
    guard::function("mxt_run_options_init", || unsafe { structs::init(options, struct_size) })
}

/// Does options->steps steps on `dataset`, with evaluations, checkpoints and a callback, until they
/// are done, the callback ends it or a stop is requested; stores what it did in `*result`
/// (struct_size set by the caller; NULL if not wanted).
///
/// The trainer is in use only inside each step, evaluation and checkpoint, not while the callback
/// runs.
///
/// An evaluation or a checkpoint that fails does not end the run: the log gets a warning, the
/// result counts it, and the next one is tried when it is due. Where the last evaluation of the run
/// failed, or its last checkpoint, the call returns that error, at its end: all steps that were to
/// be done are, and after a failed evaluation they are also saved. Only an error of a step, a
/// device that fails and a panic end the run; the steps before are then saved, if there is where to
/// and the trainer is usable, but not where ranks of a group differ (MXT_ERROR_MISMATCH): others may
/// have gone on. After any error mxt_trainer_steps_done counts the steps done, which
/// can be saved (again), and `*result` is not written.
///
/// Errors: those of mxt_trainer_step, mxt_trainer_eval and mxt_trainer_save, except MXT_STOPPED.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn mxt_trainer_run(
    trainer: *mut mxt_trainer,
    dataset: *const mxt_dataset,
    options: *const mxt_run_options,
    result: *mut mxt_run_result,
) -> mxt_status {
    // The callbacks are outside of the guard, and nothing may unwind through this function from
    // them.
    let _held = cancel::hold();
    let mut started = None;
    // SAFETY: pointers are NULL or valid, as the header asks.
    let status = unsafe {
        guard::method(NAME, trainer, |_| {
            let out = Out::optional("result", result)?;
            let run = Run::new(trainer, dataset, options)?;
            run.compare()?;
            started = Some((run, out));
            Ok(())
        })
    };
    let Some((mut run, out)) = started else { return status };
    let status = match run.drive() {
        Ok(()) => guard::method_of(NAME, &*run.trainer.clone(), |_| {
            let result = run.finish()?;
            // SAFETY: the host's struct is valid until this function returns.
            unsafe { out.put(result) };
            Ok(())
        }),
        Err(status) => status,
    };
    // Who asks again while the run ends means this run, not the next.
    if run.end == Some(mxt_run_end::Request) {
        run.trainer.stop().clear();
    }
    guard::release_behind(status, NAME, run);
    status
}

const NAME: &str = "mxt_trainer_run";

/// Where a run saves.
enum Place {
    Folder(PathBuf),
    Files(files::Borrowed),
}

/// A run between two steps.
struct Run {
    trainer: Arc<mxt_trainer>,
    dataset: Arc<mxt_dataset>,
    eval_dataset: Option<Arc<mxt_dataset>>,
    place: Option<Place>,
    options: mxt_run_options,
    result: mxt_run_result,
    /// Why the run ends before all steps are done.
    end: Option<mxt_run_end>,
    /// Whether the callback asked for that.
    has_asked: bool,
    /// Whether other ranks make the same steps.
    is_in_group: bool,
    /// The number of steps done at the last checkpoint of this run, unless the callback has changed
    /// something since.
    saved_at: Option<u64>,
    /// Why the last evaluation failed, if it did.
    eval_failure: Option<Failure>,
}

impl Run {
    /// Checks everything before the first step.
    ///
    /// # Safety
    /// Pointers are NULL or valid.
    unsafe fn new(
        trainer: *const mxt_trainer,
        dataset: *const mxt_dataset,
        options: *const mxt_run_options,
    ) -> Result<Self, Failure> {
        // SAFETY: as promised by the caller.
        unsafe {
            let options = read("options", options)?;
            let trainer = keep(trainer).ok_or_else(|| Failure::null("trainer"))?;
            let is_in_group = trainer.is_in_group();
            let place = match (options.save_dir.is_null(), options.save_files.is_null()) {
                (true, true) => None,
                (true, false) => Some(Place::Files(files::borrowed(options.save_files)?)),
                (false, true) => {
                    let writes = trainer.writes();
                    let dir = arguments::path_of_save("save_dir", options.save_dir, writes)?;
                    Some(Place::Folder(dir))
                }
                (false, false) => {
                    let message = "expected NULL where save_dir is given, too; got both";
                    return Err(Failure::invalid("save_files", message));
                }
            };
            Ok(Self {
                trainer,
                dataset: keep(dataset).ok_or_else(|| Failure::null("dataset"))?,
                eval_dataset: keep(options.eval_dataset),
                place,
                options,
                result: mxt_run_result {
                    struct_size: size_of::<mxt_run_result>(),
                    steps: 0,
                    tokens: 0,
                    seconds: 0.0,
                    last_loss: f32::NAN,
                    last_eval_loss: f32::NAN,
                    end: mxt_run_end::Finished as i32,
                    saved: 0,
                    eval_errors: 0,
                    save_errors: 0,
                },
                end: None,
                has_asked: false,
                is_in_group,
                saved_at: None,
                eval_failure: None,
            })
        }
    }

    /// Whether all ranks have the same run before them.
    fn compare(&self) -> Result<(), Failure> {
        if !self.is_in_group {
            return Ok(());
        }
        let mxt_run_options { steps, eval_every, eval_batches, save_every, .. } = self.options;
        let has = |is_there: bool| if is_there { "some" } else { "none" }.to_owned();
        let values = [
            ("steps of the run", steps.to_string()),
            ("eval_every", eval_every.to_string()),
            ("eval_batches", eval_batches.to_string()),
            ("eval_dataset", has(self.eval_dataset.is_some())),
            ("save_every", save_every.to_string()),
            ("save_dir or save_files", has(self.place.is_some())),
        ];
        self.trainer.exclusive(|trainer| Ok(trainer.compare(&values)?))
    }

    /// Does the steps. An error's message is already where it belongs.
    fn drive(&mut self) -> Result<(), mxt_status> {
        let trainer = self.trainer.clone();
        while self.is_due() {
            let mut seen = None;
            let status = guard::method_of(NAME, &*trainer, |_| {
                seen = Some(self.step().map_err(|failure| self.save_before(failure))?);
                Ok(())
            });
            let Some((step, eval)) = seen.ok_or(status)? else {
                self.stopped();
                continue;
            };
            if let Some(on_step) = self.options.on_step {
                let eval = eval.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
                let before = trainer.changes();
                // SAFETY: the header asks for a function that can be called until the run ends.
                if unsafe { on_step(self.options.user_data, &step, eval) } != 0 {
                    self.has_asked = true;
                    if self.is_in_group {
                        // An answer for all ranks, who hear of it in the next step's vote.
                        trainer.stop().request_stop();
                    } else {
                        self.end = Some(mxt_run_end::Callback);
                    }
                }
                // In a group all ranks save, or none.
                if !self.is_in_group && trainer.changes() != before {
                    self.saved_at = None;
                }
            }
        }
        Ok(())
    }

    /// Whether another step is to be done. Uses up a stop request, but in a group, where a step's vote
    /// tells all ranks of it.
    fn is_due(&mut self) -> bool {
        if self.trainer.is_freed() {
            // Also where a run inside the callback has used that up.
            self.trainer.stop().request_stop();
        }
        let is_done = self.result.steps == self.options.steps;
        let sees = !self.is_in_group || is_done;
        if self.end.is_none() && sees && self.trainer.stop().is_requested() {
            self.stopped();
        }
        self.end.is_none() && !is_done
    }

    fn stopped(&mut self) {
        self.trainer.stop().clear();
        let end = if self.has_asked { mxt_run_end::Callback } else { mxt_run_end::Request };
        self.end = Some(end);
    }

    /// One step with the evaluation and the checkpoint that are due after it; `None` if it was
    /// given up because of a stop request, of this rank or another.
    fn step(&mut self) -> Result<Option<(mxt_step_stats, Option<mxt_eval_stats>)>, Failure> {
        let data = &self.dataset.data;
        let stepped = self.trainer.exclusive(|trainer| {
            let stats = trainer.step_unless_stopped(data)?;
            Ok(mxt_step_stats::new(stats, trainer))
        });
        let stats = match stepped {
            Err(failure) if failure.status == MXT_STOPPED => return Ok(None),
            other => other?,
        };
        self.result.steps += 1;
        self.result.tokens += stats.tokens;
        self.result.seconds += stats.seconds;
        self.result.last_loss = stats.loss;

        let last = self.result.steps == self.options.steps;
        let mxt_run_options { eval_every, save_every, .. } = self.options;
        let cadence = Cadence { eval_every, save_every };
        let evaluates = last || cadence.evaluates(stats.step);
        let eval = if evaluates { self.eval(stats.step)? } else { None };
        if last || cadence.saves(stats.step) {
            match self.save(stats.step) {
                Err(failure) if self.is_fatal(&failure) => return Err(failure),
                // The last one is tried once more, in `finish`.
                _ => {}
            }
        }
        Ok(Some((stats, eval)))
    }

    /// Saves what a stop has left behind.
    fn finish(&mut self) -> Result<mxt_run_result, Failure> {
        let step = self.trainer.steps_done();
        // NOTE: a stop saves but does not evaluate: whoever asks to stop is waiting.
        if self.saved_at != Some(step)
            && let Err(mut failure) = self.save(step)
        {
            if let Some(first) = &self.eval_failure {
                let failed = format!("; the run's last evaluation failed, too: {}", first.message);
                failure.message.to_mut().push_str(&failed);
            }
            return Err(failure);
        }
        if let Some(mut failure) = self.eval_failure.take() {
            let saved = if self.saved_at == Some(step) { "done and saved" } else { "done" };
            failure.message.to_mut().push_str(&format!(
                "; this was the run's last evaluation, and its {} steps are {saved}",
                self.result.steps
            ));
            return Err(failure);
        }
        self.result.end = self.end.unwrap_or(mxt_run_end::Finished) as i32;
        self.result.saved = i32::from(self.saved_at == Some(step));
        Ok(self.result)
    }

    /// Saves the steps before the one that failed, and adds to its failure if that fails as well.
    fn save_before(&mut self, mut failure: Failure) -> Failure {
        let step = self.trainer.steps_done();
        if !self.is_fatal(&failure)
            && self.saved_at != Some(step)
            && let Err(second) = self.save(step)
        {
            let steps = format!("; nor could the {step} steps before it be saved: ");
            failure.message.to_mut().push_str(&(steps + &second.message));
        }
        failure
    }

    fn eval(&mut self, step: u64) -> Result<Option<mxt_eval_stats>, Failure> {
        let Some(data) = &self.eval_dataset else { return Ok(None) };
        let batches = self.options.eval_batches;
        match self.trainer.exclusive(|trainer| Ok(trainer.eval(&data.data, batches)?)) {
            Ok(stats) => {
                self.eval_failure = None;
                self.result.last_eval_loss = stats.loss;
                Ok(Some(stats.into()))
            }
            Err(failure) if failure.status == MXT_STOPPED => Ok(None),
            Err(failure) if self.is_fatal(&failure) => Err(failure),
            Err(failure) => {
                self.result.eval_errors += 1;
                let why = &failure.message;
                self.trainer.warn(|| format!("the evaluation after step {step} failed: {why}"));
                self.eval_failure = Some(failure);
                Ok(None)
            }
        }
    }

    fn save(&mut self, step: u64) -> Result<(), Failure> {
        let trainer = &self.trainer;
        let saved = match &self.place {
            None => return Ok(()),
            Some(Place::Folder(dir)) => trainer.exclusive(|trainer| Ok(trainer.save(dir)?)),
            Some(Place::Files(files)) => files.save_trainer(trainer),
        };
        match saved {
            Ok(()) => {
                self.saved_at = Some(step);
                Ok(())
            }
            Err(failure) => {
                self.result.save_errors += 1;
                let why = &failure.message;
                self.trainer.warn(|| format!("step {step} could not be saved: {why}"));
                Err(failure)
            }
        }
    }

    /// Whether the trainer is of no use any more.
    fn is_fatal(&self, failure: &Failure) -> bool {
        match failure.status {
            MXT_ERROR_DEVICE | MXT_ERROR_POISONED | MXT_ERROR_PANIC => true,
            MXT_ERROR_PEER => self.trainer.has_lost_its_group(),
            // Others may not have seen it, and go on.
            MXT_ERROR_MISMATCH => self.is_in_group,
            _ => false,
        }
    }
}
