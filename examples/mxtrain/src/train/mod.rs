//! `mxtrain train`: the loop around the library's trainer, with its evaluations, samples, saves and
//! reports.

mod examples;
mod log;
mod saves;
mod setup;
mod side;
mod tensorboard;
mod updates;

use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use indicatif::{HumanCount, HumanDuration};
use mxfp4train::{
    Cadence, Dataset, Engine, EngineOptions, Error, GenerateOptions, Group, Model, ModelConfig,
    Schedule, ScheduleKind, StopHandle, TrainerOptions, carriers, emulation,
};

pub(crate) use setup::{
    Data, Start, Weights, adapters_in_words, check_lora, is_checkpoint, model_config,
    short_windows, trainer_options, vocabulary, vocabulary_of_shape,
};

use crate::cli::{ReportArgs, TrainArgs};
use crate::console::{self, Progress};
use crate::failure::{Failure, Outcome};
use crate::hugging_face;
use crate::lock::RunLock;
use crate::machine;
use crate::parse::Parsed;
use crate::plan;
use crate::ranks::{Follower, Launched, Leader, Place, Team, restart};
use crate::signals::{INTERRUPTED, Signals};
use crate::spikes::SpikeWatch;
use crate::tokenizer::{TextStream, Tokenizer};
use log::Log;
pub(crate) use log::{OfLogits, is_log};
use saves::Saves;
pub(crate) use side::{Failures, Side};
use tensorboard::TensorBoard;

/// Exit code of a run that is done and saved, but lost something on its side.
pub(crate) const LOST_ON_THE_SIDE: u8 = 3;
/// Exit code of a run that a panic ended, as Rust's own.
const PANICKED: u8 = 101;
/// Tokens of a sample on the way.
const SAMPLE_TOKENS: usize = 200;

/// Runs `mxtrain finetune`, which is `mxtrain train` of examples.
pub(crate) fn finetune(args: &TrainArgs, parsed: &Parsed) -> Outcome<ExitCode> {
    if args.start.init_from.is_none() && args.start.resume.is_none() {
        return Err(Failure::usage(
            "--init-from DIR is missing: the model to finetune (or --resume DIR of such a run)",
        ));
    }
    if args.data.examples.examples.is_none() {
        return Err(Failure::usage(
            "--examples FILE is missing: JSON lines with a prompt and an answer each (`mxtrain train \
             --init-from` trains on text)",
        ));
    }
    run(args, parsed)
}

/// Runs the command.
pub(crate) fn run(args: &TrainArgs, parsed: &Parsed) -> Outcome<ExitCode> {
    let launched = launched(args)?;
    let place = Place::of_this()?.or_else(|| launched.as_ref().map(|(place, _)| place.clone()));
    if let Some(place) = place.filter(|place| place.rank() > 0) {
        let local = launched.map(|(_, by)| by.local);
        return follow(args, parsed, &place, local);
    }
    let mut leader = None;
    let begun = Run::begin(args, parsed, &Signals::listen()?, &mut leader);
    let mut run = begun.inspect_err(|failure| {
        leader.iter_mut().for_each(|leader| leader.tell_reasons(failure));
    })?;
    let result = run.guarded(Run::train);
    run.progress.finish();
    let has_lost_one = run.trainer.model().engine().has_lost_its_group();
    let Err(failure) = &result else {
        if !has_lost_one {
            return result;
        }
        // Behind the last step: what it is missed for is said, or done without it.
        let lost = Failure::runtime("a process of the run was lost behind its last step");
        run.trainer.tell_reasons(&lost);
        console::note(&format!("mxtrain: {}; {}", lost.message, run.saves.held()));
        return Ok(ExitCode::from(LOST_ON_THE_SIDE));
    };
    run.trainer.tell_reasons(failure);
    let (out, restarts) = (run.saves.out.clone(), args.ranks.restarts);
    if restarts > 0 && has_lost_one {
        console::note(&format!("mxtrain: {}", failure.message));
        drop(run);
        return Err(restart(&out, restarts - 1));
    }
    result
}

/// Trains as a rank that another process, rank 0, has started. It says nothing itself.
fn follow(
    args: &TrainArgs,
    parsed: &Parsed,
    place: &Place,
    local: Option<usize>,
) -> Outcome<ExitCode> {
    let (group, mut follower) = place.follow()?;
    let device = device_of(args, local.unwrap_or_else(|| follower.rank()));
    let result = follow_with(args, parsed, (group, device), &mut follower);
    if let Err(failure) = &result {
        follower.tell(failure);
    }
    Ok(ExitCode::from(u8::from(result.is_err())))
}

fn follow_with(
    args: &TrainArgs,
    parsed: &Parsed,
    (group, device): (Group, String),
    follower: &mut Follower,
) -> Outcome {
    let group = Some(args.ranks.with(group));
    let (threads, seed) = (args.machine.threads, follower.seed());
    // Without a log: rank 0 says what there is to say.
    let engine =
        Engine::new(EngineOptions { device, threads, seed, group, ..EngineOptions::default() })?;
    let mut data = Data::of_run(args)?;
    let start = Start::new(args, parsed, &data, &engine)?;
    data.pack(start.sequence_length())?;
    let mut trainer = start.trainer(&engine)?;
    trainer.set_sharpness(args.report.sharpness.sharpness)?;
    let batches = args.report.measure.eval_batches;
    follower.follow(&mut trainer, &data.train, (data.val.as_ref(), batches));
    Ok(())
}

/// The device of a rank, by its number on its machine.
fn device_of(args: &TrainArgs, local: usize) -> String {
    let device = &args.machine.device;
    match args.ranks.gpus.is_some() || (args.ranks.group.is_some() && device == "cuda") {
        true => format!("cuda:{local}"),
        false => device.clone(),
    }
}

/// The place among ranks that a launcher has given this process, where it is asked for.
fn launched(args: &TrainArgs) -> Outcome<Option<(Place, Launched)>> {
    if args.ranks.group.is_none() {
        return Ok(None);
    }
    let by = Launched::find(|name| env::var(name).ok())?;
    let Some(rendezvous) = &args.ranks.rendezvous else {
        return Err(Failure::usage(
            "--rendezvous HOST:PORT is missing: where rank 0 listens, on a free port (that of \
             torchrun, MASTER_PORT, is taken)",
        ));
    };
    Ok(Some((Place::launched(by, rendezvous), by)))
}

/// A run in progress.
struct Run {
    trainer: Team,
    stop: StopHandle,
    train: Dataset,
    val: Option<Dataset>,
    tokenizer: Option<Tokenizer>,
    saves: Saves,
    /// Tokens that end a sample.
    end_tokens: Vec<u32>,
    log: Option<Log>,
    tensorboard: Option<TensorBoard>,
    steps: u64,
    cadence: Cadence,
    eval_batches: usize,
    sample_every: u64,
    sample_prompt: String,
    weights_every: u64,
    updates_every: u64,
    /// Step of the last evaluation.
    evaluated: Option<u64>,
    /// Sum and number of the training losses since the last report.
    losses: (f64, u32),
    spikes: SpikeWatch,
    failures: Failures,
    progress: Progress,
}

impl Run {
    /// Checks everything, takes the memory, and sees to it that the run can be saved. Other processes
    /// that it has started are the `leader`'s if it fails.
    fn begin(
        args: &TrainArgs,
        parsed: &Parsed,
        signals: &Signals,
        leader: &mut Option<Leader>,
    ) -> Outcome<Self> {
        let mut data = Data::of_run(args)?;
        if args.report.sample_every > 0 && data.tokenizer.is_none() {
            return Err(Failure::usage(
                "--sample-every: needs --tokenizer to turn tokens into text",
            ));
        }
        let is_kept = args.report.log.is_some() || args.report.tensorboard.is_some();
        let ReportArgs { weights_every, updates_every, .. } = args.report;
        for (option, every) in [("weights", weights_every), ("updates", updates_every)] {
            if every > 0 && !is_kept {
                return Err(Failure::usage(format!(
                    "--{option}-every: needs --log or --tensorboard, which it adds to"
                )));
            }
        }
        setup::check_places(args)?;
        setup::out_folder(args)?;
        // The lock lies in the folder, so that has to have its name.
        for dir in [setup::out(args)].into_iter().chain(args.start.init_from.as_deref()) {
            Model::put_back(dir)?;
        }
        let lock = signals.making(|| RunLock::take(setup::out(args)), RunLock::traces)?;
        // Asked again: a run that has ended since may have saved there.
        let out = setup::out_folder(args)?;
        let (seed, launched) = (args.seed.number(), launched(args)?);
        let met = match &launched {
            Some((place, _)) if place.size() > 1 => Some(Leader::of_launched(place, seed)?),
            None if args.ranks.size() > 1 => Some(Leader::start(args.ranks.size(), seed, signals)?),
            _ => None,
        };
        let mut group = None;
        if let Some((of_all, others)) = met {
            (group, *leader) = (Some(args.ranks.with(of_all)), Some(others));
        }
        let local = launched.map_or(0, |(_, by)| by.local);
        let (device, threads) = (device_of(args, local), args.machine.threads);
        let (engine, mut about) = machine::open_as(device, threads, args.seed.number(), group)?;
        about.push_str(&args.seed.in_words());
        let start = Start::new(args, parsed, &data, &engine)?;
        let (step, steps) = (start.step(), args.optimizer.steps);
        if steps == 0 {
            return Err(Failure::usage("--steps: expected at least 1, got 0"));
        }
        data.pack(start.sequence_length())?;
        data.check(start.config().vocab_size, start.sequence_length())?;
        let origin =
            [&args.start.resume, &args.start.init_from].into_iter().find_map(Option::as_deref);
        let files = hugging_face::Files::new(
            origin,
            data.tokenizer.clone(),
            start.config().context_length,
        )?;
        let end_tokens = files.end_tokens(start.config().vocab_size)?;
        let plan = start.plan(&engine)?;
        let mut failures = Failures::default();
        let place = format!("checkpoint  {}\n", console::shown(&out));
        let emulated = emulated(&engine, start.config(), start.options())?;
        let mut about =
            header(&start, &data, steps, &about) + &emulated + &place + &plan::table(&plan);
        if let Some(line) = setup::other_tokens(args, &data)? {
            about.push_str(&format!("data        {line}\n"));
        }
        if let Start::Resumed(trainer) = &start
            && let Some(line) = setup::rates_ahead(trainer, steps)
        {
            about.push_str(&format!("schedule    {line}\n"));
        }
        for (name, value) in setup::left_out(args, parsed)? {
            about.push_str(&format!(
                "left out    --{} {}: a checkpoint may not say where to write; give it again to \
                 have it\n",
                console::plain(&name),
                console::shell_word(&value)
            ));
        }
        failures.unless(Side::Output, console::print(&about));

        let warm_up = start.schedule_start().saturating_add(start.options().schedule.warmup_steps);
        let run_file = setup::run_file(args, &data);
        let places = setup::Places::new(args);
        let mut run = Self {
            log: None,
            tensorboard: None,
            steps,
            cadence: Cadence {
                eval_every: args.report.measure.eval_every.unwrap_or(steps / 10),
                save_every: args.start.save_every.unwrap_or(steps / 10),
            },
            eval_batches: args.report.measure.eval_batches,
            sample_every: args.report.sample_every,
            sample_prompt: args.report.sample_prompt.clone(),
            weights_every: args.report.weights_every,
            updates_every: args.report.updates_every,
            saves: Saves::new(
                out,
                places,
                vec![("weights-every", weights_every), ("updates-every", updates_every)],
                run_file,
                files,
                lock,
            )
            .in_background(args.start.save_in_background)
            .among(args.ranks.again()),
            evaluated: None,
            losses: Default::default(),
            spikes: SpikeWatch::new(warm_up),
            failures,
            progress: Progress::new(step, steps),
            trainer: Team::new(start.trainer(&engine)?, leader.take()),
            stop: StopHandle::default(),
            train: data.train,
            val: data.val,
            tokenizer: data.tokenizer,
            end_tokens,
        };
        run.stop = run.trainer.stop_handle();
        run.trainer.set_sharpness(args.report.sharpness.sharpness)?;
        if run.weights_every > 0 {
            run.trainer.watch_weights(run.weights_every)?;
        }
        run.trainer.watch_updates(run.updates_every)?;
        signals.ask(run.stop.clone(), "and what is not saved is lost");
        run.saves.first(&mut run.trainer, setup::origin(args, parsed, &run.saves.out))?;
        run.log = (args.report.log.as_deref())
            .map(|path| Log::open(path, args.start.resume.is_some()))
            .transpose()?;
        run.tensorboard = (args.report.tensorboard.as_deref())
            .map(|dir| TensorBoard::begin(dir, step))
            .transpose()?;
        Ok(run)
    }

    fn train(&mut self) -> Outcome<ExitCode> {
        let began = Instant::now();
        while self.trainer.steps_done() < self.steps && !self.stop.is_requested() {
            let Some(step) = self.step()? else { break };
            if self.cadence.evaluates(step) {
                self.eval();
            }
            if Cadence::is_due(self.sample_every, step) {
                self.sample();
            }
            let saved = match self.cadence.saves(step) {
                true => self.saves.begin(&mut self.trainer),
                false => self.saves.look(&mut self.trainer),
            };
            if let Err(failure) = saved {
                self.saves.warn(&failure);
            }
        }
        let step = self.trainer.steps_done();
        let is_done = step >= self.steps;
        if is_done && self.evaluated != Some(step) {
            self.eval();
            if self.val.is_some() && self.evaluated != Some(step) {
                let failure =
                    Failure::runtime("the last one was stopped; mxtrain eval makes it up");
                self.failures.note(Side::Evaluation, &failure);
            }
        }
        self.saves.save(&mut self.trainer).map_err(|failure| {
            Failure::runtime(format!("{}; {}", failure.message, self.saves.held()))
        })?;
        if let Some(spikes) = self.spikes.found().in_words() {
            self.print(&format!("spikes: {spikes}\n"));
        }
        let out = console::shown(&self.saves.out);
        if !self.saves.is_in_out(step) {
            let what = if is_done { "the run is done" } else { "stopped" };
            let held = self.saves.held();
            return Err(Failure::runtime(format!(
                "{what}, but {out} could not be written; {held}"
            )));
        }
        if !is_done {
            self.print(&format!(
                "stopped at step {step} of {}; go on with: {}\n",
                self.steps,
                self.saves.resume(&self.saves.out)
            ));
            return Ok(ExitCode::from(INTERRUPTED));
        }
        self.print(&format!(
            "done: {} steps in {:#}; checkpoint in {out}\n",
            HumanCount(step),
            HumanDuration(began.elapsed()),
        ));
        if let Some(lost) = self.failures.summary() {
            console::note(&format!("mxtrain: the run is done and saved in {out}, but: {lost}"));
            return Ok(ExitCode::from(LOST_ON_THE_SIDE));
        }
        Ok(ExitCode::SUCCESS)
    }

    /// One optimizer step; gives the number of steps done, or `None` if a stop request cut it off.
    /// If it fails, the steps before are saved.
    fn step(&mut self) -> Outcome<Option<u64>> {
        let stats = match self.trainer.step_unless_stopped(&self.train) {
            Err(Error::Stopped) => return Ok(None),
            Err(error @ Error::NotFinite { .. }) => {
                let mut failure = Failure::from(error);
                // The run's folder stays as it was saved last: weights that a forward pass makes NaN
                // of are finite themselves.
                if let Err(second) = self.saves.save_apart(&mut self.trainer) {
                    failure.message.push_str(&format!("; {}", second.message));
                }
                failure.message.push_str(&format!(
                    "; {}; go on from an earlier step with a lower --lr (--new-schedule), or start \
                     with another --recipe",
                    self.saves.held()
                ));
                return Err(failure);
            }
            Err(error) => return Err(self.end(error.into())),
            Ok(stats) => stats,
        };
        let found = self.trainer.weight_metrics().filter(|found| found.step == stats.step);
        let update = self.trainer.update_metrics().filter(|found| found.step == stats.step);
        if let Some(log) = &mut self.log {
            self.failures.unless(Side::Log, log.step(&stats));
            if let Some(found) = found {
                self.failures.unless(Side::Log, log.weights(found));
            }
            if let Some(update) = update {
                self.failures.unless(Side::Log, log.update(update));
            }
        }
        if let Some(tensorboard) = &self.tensorboard {
            self.failures.unless(Side::TensorBoard, tensorboard.step(&stats));
            if let Some(found) = found {
                self.failures.unless(Side::TensorBoard, tensorboard.weights(found));
            }
            if let Some(update) = update {
                self.failures.unless(Side::TensorBoard, tensorboard.update(update));
            }
        }
        self.losses = (self.losses.0 + f64::from(stats.loss), self.losses.1 + 1);
        let rms = update.and_then(|found| Some((found.largest()?.1.into(), found.ceiling)));
        self.spikes.step(stats.step, stats.loss.into(), stats.grad_norm.into(), rms);
        self.progress.step(&stats);
        Ok(Some(stats.step))
    }

    /// Does a part of the run. A panic in it is a mistake of ours or of a library, and costs no
    /// step: those before are saved. The exit code is that of any Rust program.
    fn guarded(&mut self, part: impl FnOnce(&mut Self) -> Outcome<ExitCode>) -> Outcome<ExitCode> {
        let panicked = || Failure {
            code: PANICKED,
            message: "a mistake in mxtrain ended the run, please report the lines above".into(),
        };
        // Sound although it was broken off: nothing is used any more but what saves, and the
        // trainer knows whether its state is whole.
        if let Ok(result) = catch_unwind(AssertUnwindSafe(|| part(self))) {
            return result;
        }
        let ended = catch_unwind(AssertUnwindSafe(|| self.end(panicked())));
        Err(ended.unwrap_or_else(|_| panicked()))
    }

    /// Saves the steps before one that failed, and adds to its failure what is saved.
    fn end(&mut self, mut failure: Failure) -> Failure {
        if let Err(second) = self.saves.save(&mut self.trainer) {
            failure.message.push_str(&format!("; {}", second.message));
        }
        failure.message.push_str(&format!("; {}", self.saves.held()));
        failure
    }

    /// Measures the validation loss, where there is validation data, and reports it beside the mean
    /// training loss since the last report. Nothing, if a stop is asked for.
    fn eval(&mut self) {
        let step = self.trainer.steps_done();
        let measured = match &self.val {
            None => None,
            Some(val) => match self.trainer.eval(val, self.eval_batches) {
                Err(Error::Stopped) => return,
                measured => self.failures.unless(Side::Evaluation, measured.map_err(Into::into)),
            },
        };
        let (sum, count) = std::mem::take(&mut self.losses);
        let mut line = format!("step {step}/{}", self.steps);
        if count > 0 {
            line.push_str(&format!("  train loss {:.4}", sum / f64::from(count)));
        }
        if let Some(stats) = measured {
            if let Some(log) = &mut self.log {
                self.failures.unless(Side::Log, log.eval(step, &stats));
            }
            if let Some(tensorboard) = &self.tensorboard {
                self.failures.unless(Side::TensorBoard, tensorboard.eval(step, &stats));
            }
            line.push_str(&format!(
                "  validation {}",
                console::loss_in_words(stats.loss, self.tokenizer == Some(Tokenizer::Bytes))
            ));
            if let Some(sharpness) = &stats.sharpness {
                line.push_str(&format!("  {}", console::sharpness_in_words(sharpness)));
            }
            if !stats.loss.is_finite() {
                let failure = format!("the validation loss is not finite ({})", stats.loss);
                self.failures.note(Side::Evaluation, &Failure::runtime(failure));
            }
        }
        self.evaluated = Some(step);
        self.print(&(line + "\n"));
    }

    /// Prints a sample of the model's text. The same seed every time, so that samples show what
    /// training changes.
    fn sample(&mut self) {
        let Some(tokenizer) = &self.tokenizer else { return };
        let options = GenerateOptions {
            max_tokens: SAMPLE_TOKENS,
            stop_tokens: self.end_tokens.clone(),
            ..GenerateOptions::default()
        };
        let mut text = format!("--- sample at step {} ---\n", self.trainer.steps_done());
        text.push_str(&self.sample_prompt);
        let prompt = tokenizer.encode_prompt(&self.sample_prompt);
        let Some(prompt) = self.failures.unless(Side::Sample, prompt) else { return };
        let mut stream = TextStream::behind(tokenizer, &prompt);
        let sampled = self.trainer.model().generate(&prompt, &options, &mut |token| {
            if !options.stop_tokens.contains(&token) {
                text.push_str(&stream.push(token));
            }
            !self.stop.is_requested()
        });
        text.push_str(&stream.finish());
        text.push_str("\n---\n");
        let sampled = self.failures.unless(Side::Sample, sampled.map_err(Into::into));
        if sampled.is_some() && !self.stop.is_requested() {
            self.failures.unless(Side::Output, self.progress.print_content(&text));
        }
    }

    fn print(&mut self, text: &str) {
        self.failures.unless(Side::Output, self.progress.print(text));
    }
}

/// A line of the header that says which GEMMs are emulated; empty where none is.
pub(crate) fn emulated(
    engine: &Engine,
    config: &ModelConfig,
    options: &TrainerOptions,
) -> Outcome<String> {
    let emulated = emulation(&carriers(engine, config, options)?);
    Ok(emulated.map_or_else(String::new, |words| format!("emulated    {words}\n")))
}

/// What is about to run.
pub(crate) fn header(start: &Start, data: &Data, steps: u64, about: &str) -> String {
    let (config, options) = (start.config(), start.options());
    let sequence = start.sequence_length();
    let step_tokens = (options.batch_size * options.accumulation * sequence) as u64;
    let run_tokens = steps.saturating_mul(step_tokens);
    let passes = match &data.examples {
        Some(of) => (run_tokens / sequence as u64) as f64 / of.windows as f64,
        None => run_tokens as f64 / data.train.token_count().max(1) as f64,
    };
    let tokenizer =
        data.tokenizer.as_ref().map_or_else(String::new, |t| format!(", tokenizer {t}"));
    let from = match start {
        Start::New(..) => "new".to_owned(),
        Start::Weights(..) => "loaded weights".to_owned(),
        Start::Resumed(_) => format!("resumed at step {}", start.step()),
    };
    let schedule = &options.schedule;
    let drop = options.token_drop.map_or_else(String::new, |drop| format!(", token drop {drop}"));
    let frozen = match options.frozen.is_empty() {
        true => String::new(),
        false => format!(", frozen {}", options.frozen),
    };
    let adapters = config.lora.as_ref().map_or_else(String::new, |lora| {
        format!("            with {}\n", adapters_in_words(lora, config.architecture))
    });
    let apart = match options.document_end {
        None => String::new(),
        Some(end) => format!(", documents apart that end with token {end}"),
    };
    let notes: String = data
        .notes(sequence, config.context_length)
        .iter()
        .map(|note| format!("            {note}\n"))
        .collect();
    format!(
        "machine     {about}\n\
         data        {}: {}{tokenizer}, vocabulary {}\n{notes}\
         model       {} layers x {} channels x {} heads, context {}: {} parameters, {from}\n{adapters}\
         step        {} x {} x {sequence} = {} tokens, recipe {}, optimizer {}{drop}{frozen}{apart}\n\
         run         {} steps, {} tokens, {passes:.2} passes over the data; {}\n",
        console::plain(&data.name),
        data.in_words(),
        HumanCount(config.vocab_size as u64),
        config.layers,
        config.channels,
        config.heads,
        config.context_length,
        console::scaled(config.parameter_count()),
        options.accumulation,
        options.batch_size,
        HumanCount(step_tokens),
        options.recipe,
        options.optimizer,
        HumanCount(steps),
        console::scaled(run_tokens),
        schedule_in_words(schedule, start.schedule_start(), steps),
    )
}

/// "cosine schedule from step 500 on, lr 1.00e-3 to 1.00e-4, warm-up 40 steps", and where it ends if
/// that is not where the run of so many `steps` does.
fn schedule_in_words(schedule: &Schedule, start: u64, steps: u64) -> String {
    let from = if start > 0 { format!(" from step {start} on") } else { String::new() };
    let mut words = format!("{} schedule{from}, lr {}", schedule.kind, console::short(schedule.lr));
    if schedule.kind != ScheduleKind::Constant {
        words.push_str(&format!(" to {}", console::short(schedule.min_lr)));
    }
    if schedule.warmup_steps > 0 {
        words.push_str(&format!(", warm-up {} steps", HumanCount(schedule.warmup_steps)));
    }
    let end = start.saturating_add(schedule.total_steps);
    if schedule.kind != ScheduleKind::Constant && end != steps {
        let end = HumanCount(end);
        words.push_str(&format!(
            "; it ends at step {end}, not with the run (--new-schedule begins one that does)"
        ));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Command;
    use crate::parse;

    #[test]
    fn a_schedule_that_does_not_end_with_the_run_is_told() {
        let schedule = Schedule {
            kind: ScheduleKind::Cosine,
            lr: 1e-3,
            min_lr: 1e-4,
            warmup_steps: 40,
            total_steps: 4000,
            ..Schedule::default()
        };
        let plain = "cosine schedule, lr 1.00e-3 to 1.00e-4, warm-up 40 steps";
        assert_eq!(schedule_in_words(&schedule, 0, 4000), plain);
        let told =
            "; it ends at step 4,000, not with the run (--new-schedule begins one that does)";
        assert_eq!(schedule_in_words(&schedule, 0, 500), format!("{plain}{told}"));
        let from = schedule_in_words(&schedule, 100, 4100);
        assert!(from.starts_with("cosine schedule from step 100 on, ") && !from.contains("ends"));
        let constant = Schedule { kind: ScheduleKind::Constant, warmup_steps: 0, ..schedule };
        assert_eq!(schedule_in_words(&constant, 0, 500), "constant schedule, lr 1.00e-3");
    }

    #[test]
    fn a_panic_ends_a_run_and_loses_no_step() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().display();
        std::fs::write(format!("{dir}/raw.bin"), [1, 0, 2, 0].repeat(100)).unwrap();
        let line = format!(
            "mxtrain train --train {dir}/raw.bin --vocab-size 9 --out {dir}/out --steps 9 --layers 1 \
             --heads 1 --channels 16 --context 16 --batch-size 2 --threads 2 --device cpu"
        );
        let line: Vec<_> = line.split_whitespace().map(Into::into).collect();
        let parsed = parse::parse_or_fail(&line).unwrap();
        let Command::Train(args) = &parsed.cli.command else { panic!("expected train") };
        let mut run = Run::begin(args, &parsed, &Signals::listen().unwrap(), &mut None).unwrap();
        let two_steps = |run: &mut Run| {
            run.step()?;
            run.step()?;
            panic!("of a test");
        };
        let failure = run.guarded(two_steps).unwrap_err();
        assert_eq!(failure.code, 101);
        let held = format!("please report the lines above; {dir}/out holds step 2");
        assert!(failure.message.ends_with(&held), "{}", failure.message);
        assert!(run.saves.is_in_out(2) && run.trainer.steps_done() == 2);
    }
}
