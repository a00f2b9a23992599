//! `mxtrain compare train`: one run for every seed and recipe, each with a record of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::time::Instant;

use indicatif::HumanCount;
use mxfp4train::formats::{BLOCK, Format, Gemm, LinearRecipe};
use mxfp4train::{
    Dataset, Error, EvalStats, ModelConfig, Recipe, Recompute, StepStats, StopHandle, Trainer,
    TrainerOptions, carriers,
};
use serde::{Deserialize, Serialize};

use super::RECIPES;
use super::cli::CompareTrainArgs;
use super::record::{self, CarriedRecord, DataRecord, Deviation, Origin, Point, Run, Settings};
use super::unfinished::Unfinished;
use crate::console::{self, Progress};
use crate::failure::{Failure, Outcome};
use crate::machine;
use crate::signals::{INTERRUPTED, Signals};
use crate::spikes::SpikeWatch;
use crate::tokenizer::Tokenizer;
use crate::tokens_file::write_whole;
use crate::train::{
    Data, Failures, LOST_ON_THE_SIDE, Side, Start, Weights, emulated, header, model_config,
    trainer_options, vocabulary, vocabulary_of_shape,
};

/// Runs the command.
pub(crate) fn run(args: &CompareTrainArgs) -> Outcome<ExitCode> {
    let data = Data::open(&args.data)?;
    if data.val.is_none() {
        return Err(Failure::usage(format!(
            "{}: has no validation text, and the validation loss is what is compared; prepare it with \
             --val-fraction, or name token files with --val",
            data.name
        )));
    }
    let given = args.data.vocab_size.or(vocabulary_of_shape(&args.model)?);
    let vocab_size = vocabulary(given, data.vocab_size)?;
    let config = model_config(&args.model, &args.variant, vocab_size)?;
    data.check(config.vocab_size, args.batch.sequence_length.unwrap_or(config.context_length))?;
    fs::create_dir_all(&args.out).map_err(Failure::io("create", &args.out))?;
    // Every record is looked at before the first run, and its place: a mistake should not show
    // after hours.
    let planned = plan(args, &config, &data)?;
    try_to_write(&args.out)?;
    let stop = StopHandle::default();
    Signals::listen()?.ask(stop.clone(), "and the same command goes on with the run");
    // What cannot be printed or saved on the way costs no run.
    let mut failures = Failures::default();
    let count = planned.len();
    for (index, planned) in planned.into_iter().enumerate() {
        let Settings { recipe, seed, .. } = &planned.settings;
        let name = format!("run {} of {count}: {recipe}, seed {seed}", index + 1);
        if planned.is_done {
            let line = format!("{name}: is there, {}\n", console::shown(&planned.path));
            failures.unless(Side::Output, console::print(&line));
            continue;
        }
        failures.unless(Side::Output, console::print(&format!("{name}\n")));
        if !planned.run(&config, &data, &args.machine, &stop, &mut failures)? {
            failures.unless(
                Side::Output,
                console::print("stopped; the same command goes on with this run\n"),
            );
            return Ok(ExitCode::from(INTERRUPTED));
        }
    }
    if let Some(lost) = failures.summary() {
        console::note(&format!("mxtrain: all runs are done, but: {lost}"));
        return Ok(ExitCode::from(LOST_ON_THE_SIDE));
    }
    Ok(ExitCode::SUCCESS)
}

/// Finds out whether records can be written. The name is that of one process, as others may run
/// their parts of the comparison.
fn try_to_write(folder: &Path) -> Outcome {
    let path = folder.join(format!(".mxt-try-{}", process::id()));
    write_whole(&path, b"\n")?;
    fs::remove_file(&path).map_err(Failure::io("remove", &path))
}

/// A run that is to be.
struct Planned {
    path: PathBuf,
    settings: Settings,
    options: TrainerOptions,
    /// Where it is kept when it is stopped.
    unfinished: Unfinished,
    /// Steps after which the model is saved, and where.
    saves: Vec<(u64, PathBuf)>,
    is_done: bool,
}

/// All runs of this part of the comparison, seed by seed. What is there must be what would be made.
fn plan(args: &CompareTrainArgs, config: &ModelConfig, data: &Data) -> Outcome<Vec<Planned>> {
    let recipes = match args.recipes.as_slice() {
        [] => RECIPES.iter().map(|name| name.parse()).collect::<Result<_, _>>()?,
        given => given.to_vec(),
    };
    recipes.iter().try_for_each(Recipe::check_trains)?;
    let record = DataRecord::of(data)?;
    let steps = args.optimizer.steps;
    let eval_every = match args.measure.eval_every.unwrap_or(steps / 10) {
        0 => steps,
        every => every,
    };
    let mut planned: Vec<Planned> = Vec::new();
    for (&seed, recipe) in args.seeds.iter().flat_map(|seed| recipes.iter().map(move |r| (seed, r)))
    {
        let options = trainer_options(&args.batch, recipe, Some(&args.optimizer), Weights::New, 1)?;
        let eval_batches = args.measure.eval_batches;
        let settings = Settings::new(seed, config, &options, eval_every, eval_batches, &record);
        let settings = Settings { sharpness: args.sharpness.sharpness, ..settings };
        // A range of 3/4 is no folder.
        let name = format!("{recipe}-seed{seed}").replace('/', "-");
        let path = args.out.join(format!("{name}.json"));
        if planned.iter().any(|other| other.path == path) {
            return Err(Failure::usage(format!(
                "{recipe} with seed {seed} comes twice; say each recipe and each seed once"
            )));
        }
        let saves = args.save_at.iter().map(|part| {
            let step = (part * steps as f64).round() as u64;
            (step, args.out.join("models").join(format!("{name}-step{step}")))
        });
        let saves: Vec<_> = saves.collect();
        let is_done = match record::read::<Run>(&path)? {
            None => false,
            Some(found) => {
                if let Some((option, here, there)) = settings.difference(&found.record.settings) {
                    return Err(Failure::usage(format!(
                        "{option}: {} was made with {there}, got {here}; say the same, name another \
                         folder with --out, or remove the file",
                        path.display()
                    )));
                }
                if let Some((_, missing)) = saves.iter().find(|(_, dir)| !dir.exists()) {
                    return Err(Failure::usage(format!(
                        "--save-at: {} is there, but not {}; leave the option out, or remove the file \
                         to run it again",
                        path.display(),
                        missing.display()
                    )));
                }
                // What is compared is missing where the last evaluation failed.
                found.record.validation_loss.is_some() || found.record.diverged.is_some()
            }
        };
        let unfinished = Unfinished::of(&args.out, &name);
        planned.push(Planned { path, settings, options, unfinished, saves, is_done });
    }
    Ok(planned.into_iter().skip(args.part.number - 1).step_by(args.part.of).collect())
}

impl Planned {
    /// Trains and writes the record; false where it was stopped.
    fn run(
        self,
        config: &ModelConfig,
        data: &Data,
        machine: &crate::cli::MachineArgs,
        stop: &StopHandle,
        failures: &mut Failures,
    ) -> Outcome<bool> {
        let began = Instant::now();
        let steps = self.settings.steps;
        let (engine, about) = machine::open(machine, self.settings.seed)?;
        let (start, mut tally) = match self.unfinished.load(&engine, &self.settings)? {
            Some((trainer, tally)) => (Start::Resumed(Box::new(trainer)), tally),
            None => (Start::New(config.clone(), self.options.clone()), Tally::default()),
        };
        let emulated = emulated(&engine, config, &self.options)?;
        let header = header(&start, data, steps, &about) + &emulated;
        failures.unless(Side::Output, console::print(&header));
        let carriers = carriers(&engine, config, &self.options)?;
        let mut trainer = start.trainer(&engine)?;
        trainer.set_stop_handle(stop.clone());
        trainer.set_sharpness(self.settings.sharpness)?;
        let in_bf16 = failures.unless(Side::Evaluation, self.in_bf16(&trainer, stop));
        let in_bf16 = in_bf16.unwrap_or(InBf16::None);
        let mut trainers = Trainers { trainer, in_bf16 };
        let mut progress = Progress::new(tally.steps_done(), steps);
        let finished = self.steps(&mut trainers, data, stop, &mut progress, &mut tally, failures);
        progress.finish();
        let is_finished = finished?;
        tally.seconds += began.elapsed().as_secs_f64();
        if !is_finished {
            self.unfinished.save(&mut trainers.trainer, &self.settings, &tally, &about)?;
            return Ok(false);
        }
        let run = tally.into_run(self.settings, config, &self.options);
        let carriers = Some(carriers.iter().map(CarriedRecord::of).collect());
        let run = Run { carriers, ..run };
        let loss =
            |loss: Option<f64>| loss.map_or_else(|| "none".into(), |loss| format!("{loss:.4}"));
        let line = format!(
            "done: train loss {}, validation loss {}, {} tokens/s{}; {}\n",
            loss(run.train_loss),
            loss(run.validation_loss),
            HumanCount(run.tokens_per_second as u64),
            run.diverged.as_ref().map_or_else(String::new, |why| format!("; diverged: {why}")),
            console::shown(&self.path),
        );
        let written = record::write(&self.path, Origin::here(&about), run);
        if failures.unless(Side::Record, written).is_some() {
            self.unfinished.remove();
        }
        failures.unless(Side::Output, console::print(&line));
        Ok(true)
    }

    /// What evaluates the weights of `trainer` in bf16.
    fn in_bf16(&self, trainer: &Trainer, stop: &StopHandle) -> Outcome<InBf16> {
        if self.options.recipe.all().iter().all(|linear| linear.forward().is_in(Format::BF16)) {
            return Ok(InBf16::Same);
        }
        // It takes no steps, so that the plan of least memory is as good as any.
        let options = TrainerOptions {
            recipe: RECIPES[0].parse()?,
            recompute: Recompute::Block,
            accumulation: 1,
            ..self.options.clone()
        };
        let mut evaluator = Trainer::new(trainer.model(), options)?;
        evaluator.set_stop_handle(stop.clone());
        Ok(InBf16::Other(Box::new(evaluator)))
    }

    /// All steps, or those until a loss is not finite; false where it was stopped.
    fn steps(
        &self,
        trainers: &mut Trainers,
        data: &Data,
        stop: &StopHandle,
        progress: &mut Progress,
        tally: &mut Tally,
        failures: &mut Failures,
    ) -> Outcome<bool> {
        loop {
            // Of a step before which the run was stopped, too.
            let evaluated = self.evaluate(trainers, data, progress, tally, failures)?;
            if evaluated != Evaluated::Done {
                return Ok(evaluated == Evaluated::Diverged);
            }
            failures.unless(Side::Save, self.save(&trainers.trainer));
            if trainers.trainer.steps_done() >= self.settings.steps {
                return Ok(true);
            }
            if stop.is_requested() {
                return Ok(false);
            }
            let stats = match trainers.trainer.step_unless_stopped(&data.train) {
                Ok(stats) => stats,
                Err(Error::Stopped) => return Ok(false),
                Err(error @ Error::NotFinite { .. }) => {
                    tally.diverged = Some(error.to_string());
                    return Ok(true);
                }
                Err(error) => return Err(error.into()),
            };
            progress.step(&stats);
            tally.step(&stats);
        }
    }

    /// A point of the curve, where one is due.
    fn evaluate(
        &self,
        trainers: &mut Trainers,
        data: &Data,
        progress: &mut Progress,
        tally: &mut Tally,
        failures: &mut Failures,
    ) -> Outcome<Evaluated> {
        let Settings { steps, eval_every, eval_batches, .. } = self.settings;
        let step = tally.steps_done();
        let is_due = step > tally.evaluated && (step.is_multiple_of(eval_every) || step == steps);
        let Some(val) = data.val.as_ref().filter(|_| is_due) else { return Ok(Evaluated::Done) };
        let measured = match trainers.eval(val, eval_batches) {
            Err(Error::Stopped) => return Ok(Evaluated::Stopped),
            measured => failures.unless(Side::Evaluation, measured.map_err(Into::into)),
        };
        tally.evaluated = step;
        let Some(Measured { own, in_bf16 }) = measured else { return Ok(Evaluated::Done) };
        let in_bf16 = in_bf16
            .and_then(|measured| failures.unless(Side::Evaluation, measured.map_err(Into::into)));
        let Some(point) = tally.measured(&self.settings, &own, in_bf16.as_ref()) else {
            tally.diverged = Some(format!("the validation loss of step {step} is not finite"));
            return Ok(Evaluated::Diverged);
        };
        let line = format!(
            "step {step}/{steps}  train loss {:.4}  validation {}\n",
            point.train_loss,
            console::loss_in_words(own.loss, data.tokenizer == Some(Tokenizer::Bytes))
        );
        failures.unless(Side::Output, progress.print(&line));
        Ok(Evaluated::Done)
    }

    /// Saves the model where it is asked for.
    fn save(&self, trainer: &Trainer) -> Outcome {
        for (_, dir) in self.saves.iter().filter(|(step, _)| *step == trainer.steps_done()) {
            if let Some(parent) = dir.parent() {
                fs::create_dir_all(parent).map_err(Failure::io("create", parent))?;
            }
            trainer.model().save(dir)?;
        }
        Ok(())
    }
}

/// What trains, and what evaluates the same weights in bf16.
struct Trainers {
    trainer: Trainer,
    in_bf16: InBf16,
}

/// What evaluates weights in bf16.
enum InBf16 {
    /// The trainer itself, whose forward pass that is.
    Same,
    /// Another one of the same model.
    Other(Box<Trainer>),
    /// Nothing, as it could not be made.
    None,
}

/// How an evaluation went.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Evaluated {
    /// It is done, or none is due, or it failed, which is noted.
    Done,
    /// It is due still.
    Stopped,
    /// Its loss is not finite.
    Diverged,
}

/// Losses of the same weights.
struct Measured {
    /// By the recipe's own forward pass.
    own: EvalStats,
    /// In bf16, where something measures that.
    in_bf16: Option<mxfp4train::Result<EvalStats>>,
}

impl Trainers {
    fn eval(&mut self, val: &Dataset, batches: usize) -> mxfp4train::Result<Measured> {
        let own = self.trainer.eval(val, batches)?;
        let in_bf16 = match &mut self.in_bf16 {
            InBf16::Same => Some(Ok(own)),
            InBf16::Other(evaluator) => match evaluator.eval(val, batches) {
                Err(Error::Stopped) => return Err(Error::Stopped),
                measured => Some(measured),
            },
            InBf16::None => None,
        };
        Ok(Measured { own, in_bf16 })
    }
}

/// What a run has shown so far.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Tally {
    /// Loss and norm of the gradient of every step.
    steps: Vec<(f64, f64)>,
    /// Steps up to the last point of the curve.
    drawn: usize,
    curve: Vec<Point>,
    /// The last step that was evaluated.
    evaluated: u64,
    tokens_per_second: Vec<f64>,
    raised_blocks: u64,
    diverged: Option<String>,
    /// Wall-clock duration of its parts.
    seconds: f64,
}

impl Tally {
    pub(super) fn steps_done(&self) -> u64 {
        self.steps.len() as u64
    }

    /// Whether its parts go together, as those of a file that somebody edited may not.
    pub(super) fn is_whole(&self) -> bool {
        let done = self.steps_done();
        let drawn = self.curve.last().map_or(0, |point| point.step);
        self.drawn as u64 == drawn && drawn <= done && self.evaluated <= done
    }

    fn step(&mut self, stats: &StepStats) {
        self.steps.push((stats.loss.into(), stats.grad_norm.into()));
        self.tokens_per_second.push(stats.tokens as f64 / stats.seconds.max(1e-9));
        self.raised_blocks += stats.raised_blocks;
    }

    /// Adds a point to the curve, unless its validation loss is not finite.
    fn measured(
        &mut self,
        settings: &Settings,
        own: &EvalStats,
        in_bf16: Option<&EvalStats>,
    ) -> Option<Point> {
        let step = self.steps.len();
        let since = &self.steps[self.drawn..];
        let mean = |of: fn(&(f64, f64)) -> f64| {
            since.iter().map(of).sum::<f64>() / since.len().max(1) as f64
        };
        let point = Point {
            step: step as u64,
            tokens: step as u64 * settings.step_tokens(),
            train_loss: mean(|step| step.0),
            validation_loss: own.loss.into(),
            validation_loss_in_bf16: in_bf16
                .map(|measured| measured.loss.into())
                .filter(|loss: &f64| loss.is_finite()),
            grad_norm: mean(|step| step.1),
            sharpness: own.sharpness.map(|found| found.all.into()),
        };
        self.drawn = step;
        point.validation_loss.is_finite().then(|| {
            self.curve.push(point);
            point
        })
    }

    fn into_run(
        mut self,
        settings: Settings,
        config: &ModelConfig,
        options: &TrainerOptions,
    ) -> Run {
        let done = self.steps.len();
        let mut spikes = SpikeWatch::new(settings.warmup);
        for (step, (loss, norm)) in (1..).zip(&self.steps) {
            spikes.step(step, *loss, *norm, None);
        }
        let deviation = Deviation::of(self.steps.iter().map(|step| step.0), settings.steps);
        let last = &self.steps[done - (done / 20).max(1).min(done)..];
        let train_loss = last.iter().map(|step| step.0).sum::<f64>() / last.len().max(1) as f64;
        let is_whole = self.diverged.is_none();
        let of_last_step =
            self.curve.last().copied().filter(|p| is_whole && p.step == settings.steps);
        self.tokens_per_second.sort_by(f64::total_cmp);
        Run {
            quantized_blocks: (0..done as u64)
                .map(|step| blocks_of_step(config, options, settings.sequence_length, step))
                .sum(),
            settings,
            train_loss: is_whole.then_some(train_loss),
            validation_loss: of_last_step.map(|p| p.validation_loss),
            validation_loss_in_bf16: of_last_step.and_then(|p| p.validation_loss_in_bf16),
            curve: self.curve,
            diverged: self.diverged,
            spikes: Some(spikes.found().clone()),
            deviation,
            raised_blocks: self.raised_blocks,
            carriers: None,
            tokens_per_second: self.tokens_per_second.get(done / 2).copied().unwrap_or(0.0),
            seconds: self.seconds,
        }
    }
}

/// Blocks of MXFP4 operands that a step quantizes: both operands of every product of every linear
/// layer that takes such.
fn blocks_of_step(config: &ModelConfig, options: &TrainerOptions, length: usize, step: u64) -> u64 {
    let total_steps = options.schedule.total_steps;
    let kept = options.token_drop.map_or(length, |drop| drop.kept(step, length, total_steps));
    // A product of (m, depth) and (n, depth).
    let blocks = |gemm: &Gemm, m: usize, n: usize, depth: usize| match gemm.a().format().is_mxfp4()
    {
        true => (m + n) * depth.next_multiple_of(gemm.group()) / BLOCK,
        false => 0,
    };
    let of_layer = |layer| {
        let recipes = options.recipe.for_layer(layer, config.layers, step, total_steps);
        let is_between = layer > 0 && layer + 1 < config.layers;
        let rows = options.batch_size * if is_between { kept } else { length };
        let of_linear = |([inputs, outputs], recipe): ([usize; 2], LinearRecipe)| {
            blocks(recipe.forward(), rows, outputs, inputs)
                + blocks(recipe.dgrad(), rows, inputs, outputs)
                + blocks(recipe.wgrad(), outputs, inputs, rows)
        };
        config.linears().into_iter().zip(recipes).map(of_linear).sum::<usize>()
    };
    ((0..config.layers).map(of_layer).sum::<usize>() * options.accumulation) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_those_of_both_operands_of_every_product() {
        let config = ModelConfig { layers: 2, heads: 4, channels: 64, ..ModelConfig::default() };
        let blocks = |recipe: &str| {
            let recipe = recipe.parse().unwrap();
            let options =
                TrainerOptions { recipe, batch_size: 1, accumulation: 3, ..Default::default() };
            blocks_of_step(&config, &options, 32, 0)
        };
        // dgrad: (32 + in) vectors of out / 32 blocks; wgrad: (out + in) vectors of one block.
        let linears = [(64, 192), (64, 64), (64, 256), (256, 64)];
        let layer = linears.map(|(i, o)| (32 + i) * o / 32 + (o + i)).iter().sum::<u64>();
        let forward = linears.map(|(i, o)| (32 + o) * i / 32).iter().sum::<u64>();
        assert_eq!(blocks("mxfp4"), 3 * 2 * layer);
        for name in ["mxfp4-mxfp4", "tetrajet"] {
            assert_eq!(blocks(name), 3 * 2 * (layer + forward), "{name}");
        }
        assert_eq!(blocks("mxfp4,bf16-last-layers=1"), 3 * layer);
        assert!(blocks("mxfp4-rht") > 3 * 2 * layer, "the reduction is padded to the group");
        assert_eq!(blocks("bf16"), 0);

        // Of four layers the two between see 64 of 96 tokens.
        let config = ModelConfig { layers: 4, ..config };
        let with = |length, drop: Option<&str>| {
            let token_drop = drop.map(|drop| drop.parse().unwrap());
            let options = TrainerOptions {
                recipe: "mxfp4".parse().unwrap(),
                batch_size: 1,
                token_drop,
                ..Default::default()
            };
            blocks_of_step(&config, &options, length, 1)
        };
        let dropping = with(96, Some("start=32,steps=2"));
        assert_eq!(2 * dropping, with(96, None) + with(64, None));
    }
}
