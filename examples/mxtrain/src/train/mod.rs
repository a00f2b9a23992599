//! `mxtrain train`: the loop around the library's trainer, with its evaluations, samples, saves and
//! reports.

mod log;
mod setup;

use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::time::Instant;

use indicatif::{HumanCount, HumanDuration};
use mxfp4train::{Dataset, GenerateOptions, Schedule, ScheduleKind, StopHandle, Trainer};

pub(crate) use setup::{
    Data, Start, Weights, is_checkpoint, model_config, trainer_options, vocabulary,
};

use crate::cli::TrainArgs;
use crate::console::{self, Progress};
use crate::failure::{Failure, Outcome};
use crate::hugging_face;
use crate::machine;
use crate::parse::Parsed;
use crate::plan;
use crate::run_file::RunFile;
use crate::tokenizer::{TextStream, Tokenizer};
use log::Log;

/// What the shell reports for a program that Ctrl-C stopped.
pub(crate) const INTERRUPTED: u8 = 130;
/// Tokens of a sample on the way.
const SAMPLE_TOKENS: usize = 200;

/// Runs the command.
pub(crate) fn run(args: &TrainArgs, parsed: &Parsed) -> Outcome<ExitCode> {
    let data = Data::open(&args.data)?;
    if args.report.sample_every > 0 && data.tokenizer.is_none() {
        return Err(Failure::usage("--sample-every: needs --tokenizer to turn tokens into text"));
    }
    let out = setup::out_folder(args)?;
    let (engine, about) = machine::open(&args.machine, args.seed.seed)?;
    let start = Start::new(args, parsed, &data, &engine)?;
    let (step, steps) = (start.step(), args.optimizer.steps);
    if steps == 0 {
        return Err(Failure::usage("--steps: expected at least 1, got 0"));
    }
    let origin = [&args.start.resume, &args.start.init_from].into_iter().find_map(Option::as_deref);
    let mut files =
        hugging_face::Files::new(origin, data.tokenizer, start.config().context_length)?;
    let end_tokens = files.end_tokens(start.config().vocab_size)?;
    let plan = start.plan(&engine)?;
    let place = format!("checkpoint  {}\n", out.display());
    console::print(&(header(&start, &data, steps, &about) + &place))?;
    console::print(&plan::table(&plan))?;
    if let Start::Resumed(trainer) = &start
        && let Some(line) = setup::rates_ahead(trainer, steps)
    {
        console::print(&format!("schedule    {line}\n"))?;
    }

    let mut run_file = setup::run_file(args, &data);
    let mut run = Run {
        log: None,
        steps,
        eval_every: args.report.measure.eval_every.unwrap_or(steps / 10),
        eval_batches: args.report.measure.eval_batches,
        save_every: args.start.save_every.unwrap_or(steps / 10),
        sample_every: args.report.sample_every,
        sample_prompt: args.report.sample_prompt.clone(),
        saved: None,
        evaluated: None,
        losses: Default::default(),
        progress: Progress::new(step, steps),
        trainer: start.trainer(&engine)?,
        train: data.train,
        val: data.val,
        tokenizer: data.tokenizer,
        end_tokens,
        out,
    };
    // One that cannot be read lists nothing: what is in the folder is then taken for the user's.
    let before = RunFile::read(&run.out).ok().flatten().map(|file| file.files);
    // Saved before the first step too: a folder that cannot be written should not show after hours.
    run.save()?;
    run_file.files = files.put(&run.out, &before.unwrap_or_default())?;
    run_file.write(&run.out)?;
    for note in &files.notes {
        console::note(&format!("mxtrain: note: {note}"));
    }
    run.log = (args.report.log.as_deref())
        .map(|path| Log::open(path, args.start.resume.is_some()))
        .transpose()?;
    stop_on_ctrl_c(run.trainer.stop_handle(), "unsaved")?;
    let result = run.train();
    run.progress.finish();
    result
}

/// A run in progress.
struct Run {
    trainer: Trainer,
    train: Dataset,
    val: Option<Dataset>,
    tokenizer: Option<Tokenizer>,
    /// Tokens that end a sample.
    end_tokens: Vec<u32>,
    out: PathBuf,
    log: Option<Log>,
    steps: u64,
    eval_every: u64,
    eval_batches: usize,
    save_every: u64,
    sample_every: u64,
    sample_prompt: String,
    /// Step of the last save.
    saved: Option<u64>,
    /// Step of the last evaluation.
    evaluated: Option<u64>,
    /// Sum and number of the training losses since the last report.
    losses: (f64, u32),
    progress: Progress,
}

impl Run {
    fn train(&mut self) -> Outcome<ExitCode> {
        let began = Instant::now();
        let stop = self.trainer.stop_handle();
        let due = |step: u64, every: u64| every > 0 && step.is_multiple_of(every);
        while self.trainer.steps_done() < self.steps && !stop.is_requested() {
            let step = self.step()?;
            if due(step, self.eval_every) && !stop.is_requested() {
                self.eval()?;
            }
            if due(step, self.sample_every) && !stop.is_requested() {
                self.sample()?;
            }
            if due(step, self.save_every) {
                self.save()?;
            }
        }
        let step = self.trainer.steps_done();
        if step < self.steps {
            self.save()?;
            self.progress.print(&format!(
                "stopped at step {step} of {}; go on with: mxtrain train --resume {}\n",
                self.steps,
                shell_word(&self.out.display().to_string())
            ))?;
            return Ok(ExitCode::from(INTERRUPTED));
        }
        if self.evaluated != Some(step) {
            self.eval()?;
        }
        self.save()?;
        self.progress.print(&format!(
            "done: {} steps in {:#}; checkpoint in {}\n",
            HumanCount(step),
            HumanDuration(began.elapsed()),
            self.out.display()
        ))?;
        Ok(ExitCode::SUCCESS)
    }

    /// One optimizer step; gives the number of steps done.
    fn step(&mut self) -> Outcome<u64> {
        let stats = self.trainer.step(&self.train).map_err(|e| self.explain(e.into()))?;
        if let Some(log) = &self.log {
            log.step(&stats)?;
        }
        self.losses = (self.losses.0 + f64::from(stats.loss), self.losses.1 + 1);
        self.progress.step(&stats);
        Ok(stats.step)
    }

    /// Adds what the user can do to the failure of a step.
    fn explain(&self, mut failure: Failure) -> Failure {
        if failure.code == 1 {
            let saved = self.saved.unwrap_or_default();
            failure.message.push_str(&format!(
                "; {} holds step {saved}; a lower --lr or another --recipe may help",
                self.out.display()
            ));
        }
        failure
    }

    /// Measures the validation loss, where there is validation data, and reports it beside the mean
    /// training loss since the last report.
    fn eval(&mut self) -> Outcome {
        let step = self.trainer.steps_done();
        let (sum, count) = std::mem::take(&mut self.losses);
        let mut line = format!("step {step}/{}", self.steps);
        if count > 0 {
            line.push_str(&format!("  train loss {:.4}", sum / f64::from(count)));
        }
        if let Some(val) = &self.val {
            let stats = self.trainer.eval(val, self.eval_batches)?;
            if let Some(log) = &self.log {
                log.eval(step, &stats)?;
            }
            line.push_str(&format!(
                "  validation {}",
                console::loss_in_words(stats.loss, self.tokenizer)
            ));
        }
        self.evaluated = Some(step);
        self.progress.print(&(line + "\n"))
    }

    /// Prints a sample of the model's text. The same seed every time, so that samples show what
    /// training changes.
    fn sample(&mut self) -> Outcome {
        let Some(tokenizer) = self.tokenizer else { return Ok(()) };
        let options = GenerateOptions {
            max_tokens: SAMPLE_TOKENS,
            stop_tokens: self.end_tokens.clone(),
            ..GenerateOptions::default()
        };
        let mut text = format!("--- sample at step {} ---\n", self.trainer.steps_done());
        text.push_str(&self.sample_prompt);
        let mut stream = TextStream::new(tokenizer);
        let prompt = tokenizer.encode_prompt(&self.sample_prompt);
        self.trainer.model().generate(&prompt, &options, &mut |token| {
            if !options.stop_tokens.contains(&token) {
                text.push_str(&stream.push(token));
            }
            true
        })?;
        text.push_str(&stream.finish());
        text.push_str("\n---\n");
        self.progress.print(&text)
    }

    fn save(&mut self) -> Outcome {
        let step = self.trainer.steps_done();
        if self.saved != Some(step) {
            self.trainer.save(&self.out)?;
            self.saved = Some(step);
        }
        Ok(())
    }
}

/// The first Ctrl-C asks for a stop at the next step boundary, the second ends the program, with the
/// `loss` that the first one tells of.
pub(crate) fn stop_on_ctrl_c(stop: StopHandle, loss: &'static str) -> Outcome {
    ctrlc::set_handler(move || {
        if stop.is_requested() {
            process::exit(i32::from(INTERRUPTED));
        }
        stop.request_stop();
        console::note(&format!(
            "mxtrain: stopping after this step; Ctrl-C again ends at once, {loss}"
        ));
    })
    .map_err(|e| Failure::runtime(format!("cannot listen to Ctrl-C: {e}")))
}

/// What is about to run.
pub(crate) fn header(start: &Start, data: &Data, steps: u64, about: &str) -> String {
    let (config, options) = (start.config(), start.options());
    let sequence = match options.sequence_length {
        0 => config.context_length,
        length => length,
    };
    let step_tokens = (options.batch_size * options.accumulation * sequence) as u64;
    let run_tokens = steps.saturating_mul(step_tokens);
    let train_tokens = data.train.token_count();
    let passes = run_tokens as f64 / train_tokens.max(1) as f64;
    let tokenizer = data.tokenizer.map_or_else(String::new, |t| format!(", tokenizer {t}"));
    let from = match start {
        Start::New(..) => "new".to_owned(),
        Start::Weights(..) => "loaded weights".to_owned(),
        Start::Resumed(_) => format!("resumed at step {}", start.step()),
    };
    let schedule = &options.schedule;
    format!(
        "machine     {about}\n\
         data        {}: {} tokens, {} for validation{tokenizer}, vocabulary {}\n\
         model       {} layers x {} channels x {} heads, context {}: {} parameters, {from}\n\
         step        {} x {} x {sequence} = {} tokens, recipe {}\n\
         run         {} steps, {} tokens, {passes:.2} passes over the data; {}\n",
        data.name,
        HumanCount(train_tokens),
        HumanCount(data.val.as_ref().map_or(0, Dataset::token_count)),
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
        HumanCount(steps),
        console::scaled(run_tokens),
        schedule_in_words(schedule, start.schedule_start()),
    )
}

/// "cosine schedule from step 500 on, lr 1.00e-3 to 1.00e-4, warm-up 40 steps"
fn schedule_in_words(schedule: &Schedule, start: u64) -> String {
    let from = if start > 0 { format!(" from step {start} on") } else { String::new() };
    let mut words = format!("{} schedule{from}, lr {}", schedule.kind, console::short(schedule.lr));
    if schedule.kind != ScheduleKind::Constant {
        words.push_str(&format!(" to {}", console::short(schedule.min_lr)));
    }
    if schedule.warmup_steps > 0 {
        words.push_str(&format!(", warm-up {} steps", HumanCount(schedule.warmup_steps)));
    }
    words
}

/// A word that a shell reads as it is.
fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_a_space_can_be_pasted() {
        assert_eq!(shell_word("out/a-1"), "out/a-1");
        assert_eq!(shell_word("it's mine"), r"'it'\''s mine'");
    }
}
