//! From options to a trainer and its data, with every check before anything is allocated or written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mxfp4train::{
    AdamW, Dataset, Engine, Model, ModelConfig, Plan, Recipe, Schedule, Trainer, TrainerOptions,
};

use crate::cli::{BatchArgs, DataArgs, ModelArgs, OptimizerArgs, TrainArgs, VariantArgs};
use crate::failure::{Failure, Outcome};
use crate::parse::Parsed;
use crate::prepared::Meta;
use crate::run_file::RunFile;
use crate::tokenizer::Tokenizer;

/// Tokens to train on and to measure with.
pub(crate) struct Data {
    pub(crate) train: Dataset,
    pub(crate) val: Option<Dataset>,
    /// Where the training tokens come from, for the user.
    pub(crate) name: String,
    /// How they were made, where it is known.
    pub(crate) tokenizer: Option<Tokenizer>,
    /// Tokens are below this number, where it is known.
    pub(crate) vocab_size: Option<usize>,
}

impl Data {
    /// Opens the files that the options name.
    pub(crate) fn open(args: &DataArgs) -> Outcome<Self> {
        match (&args.data, &args.train) {
            (Some(_), Some(_)) => Err(Failure::usage("--data and --train exclude each other")),
            (None, None) => Err(Failure::usage(
                "--data DIR is missing: a folder made by `mxtrain prepare` (or token files with \
                 --train GLOB)",
            )),
            (Some(_), None) if args.val.is_some() => {
                Err(Failure::usage("--val goes with --train; the folder of --data has its own"))
            }
            (Some(dir), None) => {
                let meta = Meta::read(dir)?;
                if args.tokenizer.is_some_and(|tokenizer| tokenizer != meta.tokenizer) {
                    return Err(Failure::usage(format!(
                        "--tokenizer: {} was prepared with {}; leave the option out",
                        dir.display(),
                        meta.tokenizer
                    )));
                }
                Ok(Self {
                    train: meta.open_train(dir)?,
                    val: meta.open_val(dir)?,
                    name: dir.display().to_string(),
                    tokenizer: Some(meta.tokenizer),
                    vocab_size: Some(meta.vocab_size),
                })
            }
            (None, Some(pattern)) => Ok(Self {
                train: Dataset::open(pattern)?,
                val: args.val.as_deref().map(Dataset::open).transpose()?,
                name: pattern.clone(),
                tokenizer: args.tokenizer,
                vocab_size: args.tokenizer.map(Tokenizer::vocab_size),
            }),
        }
    }
}

/// The shape of a new model.
pub(crate) fn model_config(
    args: &ModelArgs,
    variant: &VariantArgs,
    vocab_size: usize,
) -> Outcome<ModelConfig> {
    if variant.mlp_channels == Some(0) {
        return Err(Failure::usage("--mlp-channels: expected a number from 1 on, got 0"));
    }
    let config = ModelConfig {
        vocab_size,
        context_length: args.context,
        layers: args.layers,
        heads: args.heads,
        channels: args.channels,
        mlp_channels: variant.mlp_channels.unwrap_or(0),
        activation: variant.activation,
        tied_head: !variant.untied_head,
        ..ModelConfig::default()
    };
    config.validate()?;
    Ok(config)
}

/// The vocabulary of a new model: what the user says, which may be rounded up, else the data's.
pub(crate) fn vocabulary(given: Option<usize>, of_data: Option<usize>) -> Outcome<usize> {
    match (given, of_data) {
        (Some(given), Some(of_data)) if given < of_data => Err(Failure::usage(format!(
            "--vocab-size: the data's tokenizer has {of_data} tokens, got {given}"
        ))),
        (Some(vocab_size), _) | (None, Some(vocab_size)) => Ok(vocab_size),
        (None, None) => Err(Failure::usage(
            "--vocab-size N is missing: token files do not say how many different tokens there are \
             (--tokenizer would tell too)",
        )),
    }
}

/// The library's training options for a new run; whatever is not known of it stays at its default.
pub(crate) fn trainer_options(
    batch: &BatchArgs,
    recipe: &Recipe,
    optimizer: Option<&OptimizerArgs>,
) -> Outcome<TrainerOptions> {
    let mut options = TrainerOptions {
        batch_size: batch.batch_size,
        sequence_length: batch.sequence_length.unwrap_or(0),
        accumulation: batch.accumulation,
        recipe: recipe.clone(),
        recompute: batch.recompute,
        ..TrainerOptions::default()
    };
    if let Some(args) = optimizer {
        options.optimizer = AdamW {
            beta1: args.beta1,
            beta2: args.beta2,
            weight_decay: args.weight_decay,
            clip: args.clip,
            ..AdamW::default()
        };
        options.schedule = Schedule {
            kind: args.schedule,
            lr: args.lr,
            min_lr: args.min_lr.unwrap_or(args.lr / 10.0),
            warmup_steps: args.warmup.unwrap_or(args.steps / 50),
            total_steps: args.steps,
            decay_steps: args.decay_steps.unwrap_or(args.steps / 5),
        };
        options.optimizer.validate()?;
        options.schedule.validate()?;
    }
    Ok(options)
}

/// What a run begins with: everything is checked, a new model's memory is not yet taken.
pub(crate) enum Start {
    New(ModelConfig, TrainerOptions),
    Weights(Model, TrainerOptions),
    Resumed(Box<Trainer>),
}

impl Start {
    /// Decides by --resume and --init-from; a loaded model keeps its shape and, with --resume, all
    /// settings that it was trained with.
    pub(crate) fn new(
        args: &TrainArgs,
        parsed: &Parsed,
        data: &Data,
        engine: &Engine,
    ) -> Outcome<Self> {
        let recipe = &args.recipe.recipe;
        let start = match (&args.start.resume, &args.start.init_from) {
            (Some(_), Some(_)) => {
                return Err(Failure::usage("--resume and --init-from exclude each other"));
            }
            (None, None) => {
                let vocab_size = vocabulary(args.data.vocab_size, data.vocab_size)?;
                let config = model_config(&args.model, &args.variant, vocab_size)?;
                Self::New(config, trainer_options(&args.batch, recipe, Some(&args.optimizer))?)
            }
            (None, Some(dir)) => {
                let options = trainer_options(&args.batch, recipe, Some(&args.optimizer))?;
                let model = Model::load(engine, dir)?;
                require_shape(args, parsed, model.config(), "--init-from")?;
                Self::Weights(model, options)
            }
            (Some(dir), None) => {
                let trainer = Trainer::load(engine, dir)?;
                require_shape(args, parsed, trainer.model().config(), "--resume")?;
                require_settings(args, parsed, trainer.options())?;
                Self::Resumed(Box::new(trainer))
            }
        };
        let vocab_size = start.config().vocab_size;
        if let Some(needed) = data.vocab_size.filter(|&needed| needed > vocab_size) {
            return Err(Failure::usage(format!(
                "{}: its tokenizer has {needed} tokens, the checkpoint's vocabulary is {vocab_size}",
                data.name
            )));
        }
        Ok(start)
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        match self {
            Self::New(config, _) => config,
            Self::Weights(model, _) => model.config(),
            Self::Resumed(trainer) => trainer.model().config(),
        }
    }

    pub(crate) fn options(&self) -> &TrainerOptions {
        match self {
            Self::New(_, options) | Self::Weights(_, options) => options,
            Self::Resumed(trainer) => trainer.options(),
        }
    }

    pub(crate) fn step(&self) -> u64 {
        match self {
            Self::New(..) | Self::Weights(..) => 0,
            Self::Resumed(trainer) => trainer.steps_done(),
        }
    }

    pub(crate) fn plan(&self, engine: &Engine) -> Outcome<Plan> {
        Ok(mxfp4train::plan(engine, self.config(), self.options())?)
    }

    /// Takes the memory.
    pub(crate) fn trainer(self, engine: &Engine) -> Outcome<Trainer> {
        Ok(match self {
            Self::New(config, options) => Trainer::new(&Model::new(engine, &config)?, options)?,
            Self::Weights(model, options) => Trainer::new(&model, options)?,
            Self::Resumed(trainer) => *trainer,
        })
    }
}

/// Whether a folder holds a checkpoint.
pub(crate) fn is_checkpoint(dir: &Path) -> bool {
    ["model.safetensors", "config.json"].iter().any(|file| dir.join(file).exists())
}

/// The folder that the run saves to. A checkpoint that is there and is not the one that the run goes
/// on with is kept, unless the user says otherwise.
pub(crate) fn out_folder(args: &TrainArgs) -> Outcome<PathBuf> {
    let start = &args.start;
    let out = [&start.out, &start.resume].into_iter().find_map(|dir| dir.as_deref());
    let out = out.unwrap_or_else(|| Path::new("checkpoint"));
    let same = |a: &Path, b: &Path| match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    };
    let goes_on = start.resume.as_deref().is_some_and(|resume| same(resume, out));
    if is_checkpoint(out) && !goes_on && !start.overwrite {
        return Err(Failure::usage(format!(
            "--out: {0} already holds a checkpoint; go on with it (--resume {0}), replace it \
             (--overwrite) or name another folder",
            out.display()
        )));
    }
    Ok(out.to_owned())
}

/// What `mxtrain.json` keeps, so that --resume needs no other option.
pub(crate) fn run_file(args: &TrainArgs, data: &Data) -> RunFile {
    let mut options = BTreeMap::from(
        [
            ("steps", args.optimizer.steps),
            ("eval-batches", args.report.measure.eval_batches as u64),
            ("sample-every", args.report.sample_every),
            ("seed", args.seed.seed),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_string())),
    );
    let mut keep = |name: &str, value: Option<String>| {
        options.extend(value.map(|value| (name.to_owned(), value)));
    };
    // Absolute, so that the run can be resumed from any folder. A path that is not UTF-8 cannot
    // stand in JSON; its option must then be given again.
    let path = |path: &Path| std::path::absolute(path).ok()?.to_str().map(str::to_owned);
    keep("data", args.data.data.as_deref().and_then(path));
    keep("train", args.data.train.as_deref().and_then(|glob| path(Path::new(glob))));
    keep("val", args.data.val.as_deref().and_then(|glob| path(Path::new(glob))));
    keep("vocab-size", args.data.vocab_size.map(|n| n.to_string()));
    keep("tokenizer", args.data.tokenizer.map(|t| t.to_string()));
    keep("eval-every", args.report.measure.eval_every.map(|n| n.to_string()));
    keep("save-every", args.start.save_every.map(|n| n.to_string()));
    keep("sample-prompt", Some(args.report.sample_prompt.clone()));
    keep("log", args.report.log.as_deref().and_then(path));
    RunFile::new(data.tokenizer, options)
}

/// The shape of a loaded model cannot change; an option that agrees with it does no harm.
fn require_shape(args: &TrainArgs, parsed: &Parsed, config: &ModelConfig, origin: &str) -> Outcome {
    for (option, wanted, found) in [
        ("layers", args.model.layers, config.layers),
        ("heads", args.model.heads, config.heads),
        ("channels", args.model.channels, config.channels),
        ("context", args.model.context, config.context_length),
        ("mlp-channels", args.variant.mlp_channels.unwrap_or(0), config.mlp_width()),
    ] {
        if parsed.given(option) && wanted != found {
            return Err(Failure::usage(format!(
                "--{option}: the checkpoint of {origin} has {found}, got {wanted}; leave the option \
                 out"
            )));
        }
    }
    if parsed.given("activation") && args.variant.activation != config.activation {
        return Err(Failure::usage(format!(
            "--activation: the checkpoint of {origin} has {}, got {}; leave the option out",
            config.activation, args.variant.activation
        )));
    }
    if args.variant.untied_head && config.tied_head {
        return Err(Failure::usage(format!(
            "--untied-head: the head of {origin} is its embedding; leave the option out"
        )));
    }
    if let Some(wanted) = args.data.vocab_size.filter(|&wanted| wanted != config.vocab_size) {
        return Err(Failure::usage(format!(
            "--vocab-size: the checkpoint of {origin} has {}, got {wanted}; leave the option out",
            config.vocab_size
        )));
    }
    Ok(())
}

/// A resumed run keeps its settings: changing one would break the promise that it goes on as if it
/// had never stopped.
fn require_settings(args: &TrainArgs, parsed: &Parsed, kept: &TrainerOptions) -> Outcome {
    let (batch, opt) = (&args.batch, &args.optimizer);
    let (adamw, schedule) = (&kept.optimizer, &kept.schedule);
    /// A given option, and what it is set against if they differ.
    fn differs<T: PartialEq + ToString>(given: &T, kept: &T) -> Option<[String; 2]> {
        (given != kept).then(|| [given.to_string(), kept.to_string()])
    }
    fn differs_from<T: PartialEq + ToString>(given: &Option<T>, kept: &T) -> Option<[String; 2]> {
        given.as_ref().and_then(|given| differs(given, kept))
    }
    for (option, difference) in [
        ("batch-size", differs(&batch.batch_size, &kept.batch_size)),
        ("sequence-length", differs_from(&batch.sequence_length, &kept.sequence_length)),
        ("accumulation", differs(&batch.accumulation, &kept.accumulation)),
        ("recipe", differs(&args.recipe.recipe, &kept.recipe)),
        ("recompute", differs(&batch.recompute, &kept.recompute)),
        ("lr", differs(&opt.lr, &schedule.lr)),
        ("min-lr", differs_from(&opt.min_lr, &schedule.min_lr)),
        ("warmup", differs_from(&opt.warmup, &schedule.warmup_steps)),
        ("schedule", differs(&opt.schedule, &schedule.kind)),
        ("decay-steps", differs_from(&opt.decay_steps, &schedule.decay_steps)),
        ("weight-decay", differs(&opt.weight_decay, &adamw.weight_decay)),
        ("beta1", differs(&opt.beta1, &adamw.beta1)),
        ("beta2", differs(&opt.beta2, &adamw.beta2)),
        ("clip", differs(&opt.clip, &adamw.clip)),
    ] {
        if let Some([given, kept]) = difference
            && parsed.given(option)
        {
            return Err(Failure::usage(format!(
                "--{option}: a resumed run keeps what it was started with, {kept}; got {given}; \
                 leave the option out, or start a new run with --init-from"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Command;
    use crate::parse;

    fn train(line: &str) -> (Box<TrainArgs>, Parsed) {
        let line: Vec<_> = format!("mxtrain train {line}").split(' ').map(Into::into).collect();
        let parse = || parse::parse(&line).unwrap();
        let Command::Train(args) = parse().cli.command else { panic!("expected train") };
        (args, parse())
    }

    #[test]
    fn defaults_follow_from_what_is_given() {
        let (args, _) = train("--steps 1000 --lr 2e-3");
        let schedule = trainer_options(&args.batch, &args.recipe.recipe, Some(&args.optimizer))
            .unwrap()
            .schedule;
        assert_eq!((schedule.min_lr, schedule.warmup_steps), (2e-3 / 10.0, 20));
        assert_eq!((schedule.total_steps, schedule.decay_steps), (1000, 200));
        let (args, _) = train("--steps 10 --warmup 20");
        let failure =
            trainer_options(&args.batch, &args.recipe.recipe, Some(&args.optimizer)).unwrap_err();
        assert!(failure.message.starts_with("--steps: "), "{}", failure.message);
    }

    #[test]
    fn a_resumed_run_refuses_other_settings_and_takes_the_same() {
        let (args, _) = train("--lr 1e-3 --steps 100");
        let kept =
            trainer_options(&args.batch, &args.recipe.recipe, Some(&args.optimizer)).unwrap();
        let check = |line| {
            let (args, parsed) = train(line);
            require_settings(&args, &parsed, &kept).map_err(|f| f.message)
        };
        assert_eq!(check("--lr 0.001 --steps 500 --warmup 2"), Ok(()));
        assert!(check("--lr 2e-3").unwrap_err().contains("started with, 0.001; got 0.002"));
        assert!(check("--recipe bf16").unwrap_err().starts_with("--recipe: "));
        assert!(check("--warmup 3").unwrap_err().starts_with("--warmup: "));
    }

    #[test]
    fn the_vocabulary_may_be_rounded_up_but_not_down() {
        assert_eq!(vocabulary(None, Some(256)).unwrap(), 256);
        assert_eq!(vocabulary(Some(50304), Some(50257)).unwrap(), 50304);
        assert!(vocabulary(Some(100), Some(256)).is_err());
        assert!(vocabulary(None, None).is_err());
    }
}
