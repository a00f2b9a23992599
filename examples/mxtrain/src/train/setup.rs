//! From options to a trainer and its data, with every check before anything is allocated or
//! written.

use std::collections::BTreeMap;
use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indicatif::HumanCount;
use mxfp4train::{
    Activation, Architecture, Dataset, Engine, Frozen, Lora, Model, ModelConfig, Optimizer, Plan,
    Recipe, Rope, Schedule, ScheduleKind, TokenDrop, Trainer, TrainerOptions,
};

use super::examples::{self, Examples, Size};
use super::log::Log;
use super::saves::{FILES, Origin};
use super::tensorboard::TensorBoard;
use crate::cli::{
    BatchArgs, DataArgs, ExampleArgs, LoraArgs, ModelArgs, OptimizerArgs, StartArgs, TokenArgs,
    TrainArgs, VariantArgs,
};
use crate::console;
use crate::failure::{Failure, Outcome};
use crate::fit;
use crate::hugging_face;
use crate::lock;
use crate::parse::Parsed;
use crate::prepared::Meta;
use crate::run_file::RunFile;
use crate::tokenizer::{Kind, Named, Tokenizer};

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
    /// Where they are examples.
    pub(crate) examples: Option<OfExamples>,
}

/// Examples of a run.
pub(crate) struct OfExamples {
    pub(crate) train: Size,
    val: Option<Size>,
    /// Themselves, for training and for validation.
    all: (Arc<Examples>, Option<Arc<Examples>>),
    /// Of training.
    pub(crate) windows: u64,
    /// Whether several share a window.
    are_packed: bool,
    /// Tokens of each, for training and for validation.
    lengths: [Vec<usize>; 2],
}

impl Data {
    /// Opens what a run learns from.
    pub(crate) fn of_run(args: &TrainArgs) -> Outcome<Self> {
        let Some(path) = &args.data.examples.examples else {
            if args.data.examples.val_examples.is_some() {
                return Err(Failure::usage("--val-examples goes with --examples"));
            }
            let mut data = Self::open(&args.data)?;
            if let (None, Some(dir)) = (&data.tokenizer, &args.start.resume)
                && let Some(kind @ Kind::File { .. }) =
                    RunFile::read(dir)?.and_then(|run| run.tokenizer)
            {
                data.tokenizer = Some(kind.open(&Model::folder_of(dir))?);
            }
            return Ok(data);
        };
        for (option, is_given) in [
            ("data", args.data.data.is_some()),
            ("train", args.data.train.is_some()),
            ("val", args.data.val.is_some()),
        ] {
            if is_given {
                return Err(Failure::usage(format!(
                    "--{option} and --examples exclude each other"
                )));
            }
        }
        let StartArgs { resume, init_from, .. } = &args.start;
        if args.report.sharpness.sharpness.is_some() {
            return Err(Failure::usage(
                "--sharpness: is of all targets, and of --examples only answers count; leave it out",
            ));
        }
        let DataArgs { tokenizer, end_of_text, .. } = &args.data;
        let tokenizer = match (tokenizer, resume.as_ref().or(init_from.as_ref())) {
            (Some(named), _) => named.open(end_of_text.as_deref())?,
            (None, Some(dir)) => hugging_face::tokenizer_to_read(dir, None, usize::MAX)?,
            (None, None) => {
                return Err(Failure::usage(
                    "--tokenizer is missing: how the text of --examples becomes tokens; bytes, gpt2, or the \
                     path of a tokenizer.json",
                ));
            }
        };
        let read = |path: &Path| Examples::read(path, &args.data.examples, &tokenizer);
        let train = Arc::new(read(path)?);
        let val = args.data.examples.val_examples.as_deref().map(read).transpose()?.map(Arc::new);
        let lengths = |of: &Arc<Examples>| of.lengths();
        let examples = OfExamples {
            train: train.size(),
            val: val.as_ref().map(|val| val.size()),
            lengths: [train.lengths(), val.as_ref().map_or_else(Vec::new, lengths)],
            all: (train.clone(), val.clone()),
            windows: train.size().examples,
            are_packed: args.document_mask,
        };
        Ok(Self {
            train: train.dataset()?,
            val: val.as_ref().map(Examples::dataset).transpose()?,
            name: path.display().to_string(),
            vocab_size: Some(tokenizer.vocab_size()),
            tokenizer: Some(tokenizer),
            examples: Some(examples),
        })
    }

    /// Packs examples that are to share windows into such of this length.
    pub(crate) fn pack(&mut self, sequence_length: usize) -> Outcome {
        let Some(of) = self.examples.as_mut().filter(|of| of.are_packed) else { return Ok(()) };
        let (train, val) = &of.all;
        (self.train, of.windows) = train.packed(sequence_length)?;
        self.val = val.as_ref().map(|val| val.packed(sequence_length)).transpose()?.map(|of| of.0);
        Ok(())
    }

    /// The token that ends a document, where a run keeps such apart that are no examples.
    fn document_end(&self, args: &TrainArgs) -> Outcome<Option<u32>> {
        if !args.document_mask || self.examples.is_some() {
            return Ok(None);
        }
        match self.tokenizer.as_ref().map(Tokenizer::end_of_text).transpose()? {
            Some(Some(end)) => Ok(Some(end)),
            Some(None) => Err(Failure::usage(
                "--document-mask: no token of --tokenizer bytes ends a document; prepare the data with \
                 --tokenizer gpt2, or leave the option out",
            )),
            None => Err(Failure::usage(
                "--document-mask: nothing says which token ends a document; name the tokenizer of the \
                 data with --tokenizer gpt2, or leave the option out",
            )),
        }
    }

    /// How much there is, in words.
    pub(crate) fn in_words(&self) -> String {
        let Some(OfExamples { train, val, windows, are_packed, .. }) = &self.examples else {
            return format!(
                "{} tokens, {} for validation",
                HumanCount(self.train.token_count()),
                HumanCount(self.val.as_ref().map_or(0, Dataset::token_count))
            );
        };
        let packed = match are_packed {
            true => format!(" and packed into {} sequences", HumanCount(*windows)),
            false => String::new(),
        };
        format!(
            "{} examples of {} tokens, of which {} are learned{packed}, {} examples for validation",
            HumanCount(train.examples),
            HumanCount(train.tokens),
            HumanCount(train.learned),
            HumanCount(val.map_or(0, |val| val.examples))
        )
    }

    /// Training tokens, by which a resumed run knows them.
    fn tokens(&self) -> u64 {
        match &self.examples {
            Some(OfExamples { train, .. }) => train.tokens,
            None => self.train.token_count(),
        }
    }

    /// The shortest sequence that holds every example, or as much as a model can see, which packed
    /// ones take.
    fn sequence_length(&self, context: usize) -> Option<usize> {
        let OfExamples { lengths, are_packed, .. } = self.examples.as_ref()?;
        let longest = lengths.iter().flatten().max().filter(|_| !are_packed)?;
        // The last token of a window is only predicted.
        Some((longest - 1).next_multiple_of(16).min(context))
    }

    /// Opens the files that the options name.
    pub(crate) fn open(args: &DataArgs) -> Outcome<Self> {
        if args.examples.examples.is_some() {
            return Err(Failure::usage(
                "--examples goes with `mxtrain train` and `mxtrain finetune`",
            ));
        }
        match (&args.data, &args.train) {
            (Some(_), Some(_)) => Err(Failure::usage("--data and --train exclude each other")),
            (None, None) => Err(Failure::usage(
                "--data DIR is missing: a folder made by `mxtrain prepare` (or token files with \
                 --train GLOB, or prompts and answers with --examples FILE)",
            )),
            (Some(_), None) if args.val.is_some() => {
                Err(Failure::usage("--val goes with --train; the folder of --data has its own"))
            }
            (Some(_), None) if args.end_of_text.is_some() => Err(Failure::usage(
                "--end-of-text: the folder of --data says which token that is; leave the option out",
            )),
            (Some(dir), None) => {
                let open = |meta: &Meta| {
                    Ok((meta.open_train(dir)?, meta.open_val(dir)?, meta.tokenizer.open(dir)?))
                };
                let (meta, (train, val, tokenizer)) = Meta::read_with(dir, open)?;
                let named = args.tokenizer.as_ref().map(|named| named.open(None)).transpose()?;
                if named.is_some_and(|named| named != tokenizer) {
                    return Err(Failure::usage(format!(
                        "--tokenizer: {} was prepared with {}; leave the option out",
                        dir.display(),
                        meta.tokenizer
                    )));
                }
                Ok(Self {
                    train,
                    val,
                    name: dir.display().to_string(),
                    tokenizer: Some(tokenizer),
                    vocab_size: Some(meta.vocab_size),
                    examples: None,
                })
            }
            (None, Some(pattern)) => {
                let end = args.end_of_text.as_deref();
                let named = args.tokenizer.as_ref();
                let tokenizer = named.map(|named| named.open(end)).transpose()?;
                Ok(Self {
                    train: open("--train", pattern, &args.tokens)?,
                    val: (args.val.as_deref())
                        .map(|val| open("--val", val, &args.tokens))
                        .transpose()?,
                    name: pattern.display().to_string(),
                    vocab_size: tokenizer.as_ref().map(Tokenizer::vocab_size),
                    tokenizer,
                    examples: None,
                })
            }
        }
    }
}

impl Data {
    /// Finds out before anything is allocated or written whether the data can be used with this
    /// vocabulary and sequence length. Large data are looked at in the background, and tell later.
    pub(crate) fn check(&self, vocab_size: usize, sequence_length: usize) -> Outcome {
        self.train.check_tokens(vocab_size)?;
        self.train.windows(sequence_length)?;
        let Some(val) = self.val.as_ref().filter(|_| self.examples.is_none()) else {
            return Ok(());
        };
        val.check_tokens(vocab_size)?;
        if val.coverage(sequence_length).longest < 2 {
            return Err(Failure::usage(format!(
                "{}: its validation data has no file of two tokens, so there is nothing to predict",
                self.name
            )));
        }
        Ok(())
    }

    /// What should be known of data that these windows do not fit, one line each, of a model that sees
    /// so much context.
    pub(crate) fn notes(&self, sequence_length: usize, context: usize) -> Vec<String> {
        if let Some(OfExamples { lengths: [train, val], .. }) = &self.examples {
            let train = examples::note(train, sequence_length, context);
            let val = examples::note(val, sequence_length, context);
            return train
                .into_iter()
                .chain(val.map(|note| format!("validation: {note}")))
                .collect();
        }
        let train = self.train.coverage(sequence_length).warning("--sequence-length");
        let val = self.val.as_ref().and_then(|val| short_windows(val, sequence_length));
        train.into_iter().chain(val.map(|note| format!("validation: {note}"))).collect()
    }
}

/// What to know of an evaluation in which no file has a whole window, or some are left out.
pub(crate) fn short_windows(data: &Dataset, sequence_length: usize) -> Option<String> {
    let coverage = data.coverage(sequence_length);
    let window = HumanCount(sequence_length as u64 + 1);
    match (coverage.windows, coverage.files) {
        (0, 1) => Some(format!(
            "{} tokens are less than a window of {window}, and are measured as one shorter window",
            HumanCount(coverage.tokens)
        )),
        (0, files) => Some(format!(
            "none of {} files has a window of {window} tokens; each is measured as one shorter window",
            HumanCount(files)
        )),
        _ => coverage.warning("--sequence-length"),
    }
}

/// Opens the token files of an option.
fn open(option: &str, pattern: &OsStr, tokens: &TokenArgs) -> Outcome<Dataset> {
    if Meta::is_in(Path::new(pattern)) {
        return Err(Failure::usage(format!(
            "{option}: {} is a folder made by `mxtrain prepare`; name it with --data",
            pattern.display()
        )));
    }
    Ok(Dataset::open_with(pattern, &tokens.options())?)
}

/// The shape of a new model.
pub(crate) fn model_config(
    args: &ModelArgs,
    variant: &VariantArgs,
    vocab_size: usize,
) -> Outcome<ModelConfig> {
    for (option, given) in [
        ("mlp-channels", variant.mlp_channels),
        ("kv-heads", variant.kv_heads),
        ("head-size", variant.head_size),
    ] {
        if given == Some(0) {
            return Err(Failure::usage(format!("--{option}: expected a number from 1 on, got 0")));
        }
    }
    let begun = begun(args, variant)?;
    if begun.architecture == Architecture::Llama && variant.activation != Activation::default() {
        return Err(Failure::usage(format!(
            "--activation: Llama's blocks have SwiGLU, got {}; leave the option out",
            variant.activation
        )));
    }
    let rope = Rope { theta: variant.rope_theta.unwrap_or(begun.rope.theta), ..begun.rope };
    let config = ModelConfig {
        vocab_size,
        context_length: args.context.unwrap_or(begun.context_length),
        layers: args.layers.unwrap_or(begun.layers),
        heads: args.heads.unwrap_or(begun.heads),
        kv_heads: variant.kv_heads.unwrap_or(begun.kv_heads),
        head_size: variant.head_size.unwrap_or(begun.head_size),
        channels: args.channels.unwrap_or(begun.channels),
        mlp_channels: variant.mlp_channels.unwrap_or(begun.mlp_channels),
        activation: if args.shape.is_some() { begun.activation } else { variant.activation },
        qkv_bias: variant.qkv_bias || begun.qkv_bias,
        qk_norm: variant.qk_norm || begun.qk_norm,
        rope,
        tied_head: begun.tied_head && !variant.untied_head,
        ..begun
    };
    config.validate()?;
    Ok(config)
}

/// What options of sizes are put upon: a file's shape, a preset, or sizes for a first try.
fn begun(args: &ModelArgs, variant: &VariantArgs) -> Outcome<ModelConfig> {
    let (begun, option) = match (&args.shape, &args.preset) {
        (Some(path), _) => (ModelConfig::read(path)?, "--shape"),
        (None, Some(preset)) => (preset.config(), "--preset"),
        (None, None) => {
            let architecture = variant.arch.unwrap_or_default();
            let (layers, heads, channels, context_length) = (4, 4, 128, 256);
            return Ok(ModelConfig {
                architecture,
                layers,
                heads,
                channels,
                context_length,
                ..ModelConfig::default()
            });
        }
    };
    match variant.arch.filter(|arch| *arch != begun.architecture) {
        None => Ok(begun),
        Some(arch) => Err(Failure::usage(format!(
            "{option}: of {}, and --arch says {arch}; leave one of them out",
            begun.architecture
        ))),
    }
}

/// The vocabulary that a file of --shape says.
pub(crate) fn vocabulary_of_shape(args: &ModelArgs) -> Outcome<Option<usize>> {
    let config = args.shape.as_deref().map(ModelConfig::read).transpose()?;
    Ok(config.map(|config| config.vocab_size))
}

/// The vocabulary of a new model: what the user says, which may be rounded up, else the data's.
pub(crate) fn vocabulary(given: Option<usize>, of_data: Option<usize>) -> Outcome<usize> {
    match (given, of_data) {
        (Some(given), Some(of_data)) if given < of_data => Err(Failure::usage(format!(
            "--vocab-size: the data's tokenizer has {of_data} tokens, got {given} (by this option, or else \
             by --shape, which it overrides)"
        ))),
        (Some(vocab_size), _) | (None, Some(vocab_size)) => Ok(vocab_size),
        (None, None) => Err(Failure::usage(
            "--vocab-size N is missing: token files do not say how many different tokens there are \
             (--tokenizer would tell too, and `mxtrain info` shows the largest)",
        )),
    }
}

/// Highest learning rate of a new model.
const NEW_LR: f32 = 1e-3;
/// Highest learning rate of a model that was trained before. It is what Hugging Face's finetuning
/// scripts take; the rates that such models are trained with undo in a few steps what they know.
const FINETUNING_LR: f32 = 5e-5;
/// That of adapters, which begin by adding nothing: what is usual for LoRA.
const LORA_LR: f32 = 2e-4;

/// What the weights of a run begin as, which its default schedule depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Weights {
    New,
    Trained,
    /// Of adapters beside such weights.
    Adapters,
}

/// The library's training options for a new run; whatever is not known of it stays at its default.
pub(crate) fn trainer_options(
    batch: &BatchArgs,
    recipe: &Recipe,
    optimizer: Option<&OptimizerArgs>,
    weights: Weights,
    ranks: usize,
) -> Outcome<TrainerOptions> {
    let lanes = batch.lanes.unwrap_or(ranks);
    let mut options = TrainerOptions {
        batch_size: batch.batch_size,
        sequence_length: batch.sequence_length.unwrap_or(0),
        accumulation: batch.accumulation.unwrap_or(lanes),
        lanes,
        recipe: recipe.clone(),
        recompute: batch.recompute,
        token_drop: batch.token_drop,
        frozen: batch.freeze.clone(),
        ..TrainerOptions::default()
    };
    if let Some(args) = optimizer {
        let usual = args.optimizer;
        options.optimizer = Optimizer {
            beta1: args.beta1,
            beta2: args.beta2.unwrap_or(usual.beta2),
            weight_decay: args.weight_decay,
            clip: args.clip.unwrap_or(usual.clip),
            ..usual
        };
        let (lr, warmup) = match weights {
            Weights::New => (NEW_LR, args.steps / 50),
            // AdamW's moments begin at zero, so its first steps are as long as the rate allows,
            // whatever the gradient. What the model knows is at stake: they stay short for longer.
            Weights::Trained => (FINETUNING_LR, args.steps / 20),
            Weights::Adapters => (LORA_LR, args.steps / 20),
        };
        let lr = args.lr.unwrap_or(lr);
        options.schedule = Schedule {
            kind: args.schedule,
            lr,
            min_lr: args.min_lr.unwrap_or(lr / 10.0),
            warmup_steps: args.warmup.unwrap_or(warmup),
            total_steps: args.steps,
            decay_steps: args.decay_steps.unwrap_or(args.steps / 5),
        };
        options.optimizer.validate()?;
        options.schedule.validate()?;
        require_descent(&options.schedule)?;
    }
    Ok(options)
}

/// What a run that is saved in `out` begins from.
pub(crate) fn origin(args: &TrainArgs, parsed: &Parsed, out: &Path) -> Origin {
    let Some(dir) = &args.start.resume else { return Origin::New };
    let is_changed = parsed.given("optimizer") || args.start.new_schedule;
    match !is_changed && is_same(dir, out) && has_room_for_another(out).unwrap_or(false) {
        true => Origin::Held,
        false => Origin::Resumed,
    }
}

/// Whether two names are of one folder.
fn is_same(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// Whether there is room for another checkpoint beside the one in `folder`, as far as the system
/// tells, and nothing that a save which was cut off has left there: else a save has to show what
/// comes of it.
fn has_room_for_another(folder: &Path) -> std::io::Result<bool> {
    /// For names, tokenizers, and blocks that are not full.
    const MARGIN: u64 = 1 << 20;
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name();
        if name != lock::FILE && name.as_bytes().starts_with(b".mxt-") {
            return Ok(false);
        }
    }
    let (mut bytes, mut longest) = (MARGIN, 0);
    for file in FILES {
        let len = folder.join(file).metadata()?.len();
        (bytes, longest) = (bytes + len, longest.max(len));
    }
    let system = rustix::fs::statvfs(folder)?;
    let free = system.f_bavail.saturating_mul(system.f_frsize);
    // Of some file systems nobody knows how many files they take.
    let takes_files = system.f_files == 0 || system.f_favail > 100;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
    let is_allowed = limit.is_none_or(|limit| limit > longest);
    Ok(free > bytes + bytes / 64 && takes_files && is_allowed)
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
        recipe.check_trains()?;
        check_lora(&args.lora)?;
        if args.start.new_schedule && args.start.resume.is_none() {
            return Err(Failure::usage(
                "--new-schedule: goes with --resume; a new run has a schedule of its own anyway",
            ));
        }
        let start = match (&args.start.resume, &args.start.init_from) {
            (Some(_), Some(_)) => {
                return Err(Failure::usage("--resume and --init-from exclude each other"));
            }
            (None, None) => {
                if args.lora.lora.is_some() {
                    return Err(Failure::usage(
                        "--lora: adapters are trained beside weights that stay; name those with \
                         --init-from",
                    ));
                }
                let given = args.data.vocab_size.or(vocabulary_of_shape(&args.model)?);
                let vocab_size = vocabulary(given, data.vocab_size)?;
                let config = model_config(&args.model, &args.variant, vocab_size)?;
                let optimizer = Some(&args.optimizer);
                let ranks = engine.size();
                let mut options =
                    trainer_options(&args.batch, recipe, optimizer, Weights::New, ranks)?;
                if options.sequence_length == 0 {
                    options.sequence_length =
                        data.sequence_length(config.context_length).unwrap_or(0);
                }
                options.document_end = data.document_end(args)?;
                Self::New(config, options)
            }
            (None, Some(dir)) => {
                let optimizer = Some(&args.optimizer);
                let ranks = engine.size();
                let mut model = hugging_face::load(engine, dir)?;
                if let Some(lora) = args.lora.wanted() {
                    if model.config().lora.is_some() {
                        return Err(Failure::usage(format!(
                            "--lora: the checkpoint of --init-from has adapters; leave the option out \
                             to train those on, or add them to its weights first (mxtrain export \
                             {} FOLDER --weights f32)",
                            dir.display()
                        )));
                    }
                    model = model.with_lora(lora)?;
                }
                let weights = match model.config().lora {
                    Some(_) => Weights::Adapters,
                    None => Weights::Trained,
                };
                let mut options = trainer_options(&args.batch, recipe, optimizer, weights, ranks)?;
                if options.sequence_length == 0 {
                    let of_data = data.sequence_length(model.config().context_length);
                    options.sequence_length = of_data.unwrap_or(0);
                }
                options.document_end = data.document_end(args)?;
                require_shape(args, parsed, model.config(), "--init-from")?;
                Self::Weights(model, options)
            }
            (Some(dir), None) => {
                let mut trainer = match parsed.given("optimizer") {
                    true => Trainer::load_as(engine, dir, &args.optimizer.optimizer)?,
                    false => Trainer::load(engine, dir)?,
                };
                require_shape(args, parsed, trainer.model().config(), "--resume")?;
                require_settings(args, parsed, trainer.options())?;
                let is_kept =
                    |file: RunFile| file.options.get("document-mask").is_some_and(|v| v == "true");
                let kept = match data.examples {
                    Some(_) => RunFile::read(dir)?.is_some_and(is_kept),
                    None => trainer.options().document_end.is_some(),
                };
                if parsed.given("document-mask") && args.document_mask != kept {
                    return Err(Failure::usage(format!(
                        "--document-mask: a resumed run keeps what it was started with, which is {}; \
                         leave the option out, or start a new run with --init-from",
                        if kept { "documents apart" } else { "whole sequences" }
                    )));
                }
                let (done, steps) = (trainer.steps_done(), args.optimizer.steps);
                if steps <= done {
                    return Err(Failure::usage(format!(
                        "--steps: the run has done {done} steps, expected more than that; got {steps}"
                    )));
                }
                if args.start.new_schedule {
                    let kept = &trainer.options().schedule;
                    let schedule = new_schedule(args, parsed, kept, steps - done);
                    require_descent(&schedule)?;
                    trainer.set_schedule(schedule)?;
                }
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

    /// Tokens of a sequence.
    pub(crate) fn sequence_length(&self) -> usize {
        match self.options().sequence_length {
            0 => self.config().context_length,
            length => length,
        }
    }

    pub(crate) fn step(&self) -> u64 {
        match self {
            Self::New(..) | Self::Weights(..) => 0,
            Self::Resumed(trainer) => trainer.steps_done(),
        }
    }

    /// The step that the schedule counts from.
    pub(crate) fn schedule_start(&self) -> u64 {
        match self {
            Self::New(..) | Self::Weights(..) => 0,
            Self::Resumed(trainer) => trainer.schedule_start(),
        }
    }

    pub(crate) fn plan(&self, engine: &Engine) -> Outcome<Plan> {
        Ok(mxfp4train::plan(engine, self.config(), self.options())?)
    }

    /// Takes the memory; where there is not as much, the failure says what would fit.
    pub(crate) fn trainer(self, engine: &Engine) -> Outcome<Trainer> {
        let (config, options) = (self.config().clone(), self.options().clone());
        let made = match self {
            Self::New(config, options) => {
                Model::new(engine, &config).and_then(|model| Trainer::new(&model, options))
            }
            Self::Weights(model, options) => Trainer::new(&model, options),
            Self::Resumed(trainer) => Ok(*trainer),
        };
        made.map_err(|error| fit::failure(error, engine, &config, &options))
    }
}

/// A rate that rises to its "lowest" is a slip of the keyboard.
fn require_descent(schedule: &Schedule) -> Outcome {
    let &Schedule { kind, lr, min_lr, .. } = schedule;
    if kind != ScheduleKind::Constant && min_lr > lr {
        return Err(Failure::usage(format!(
            "--min-lr: expected at most the highest learning rate (--lr), {lr}; got {min_lr}"
        )));
    }
    Ok(())
}

/// The schedule that a resumed run takes for the `steps` that it has to go. What is not given stays
/// as it was, but lengths, which belonged to another number of steps, and the last rate where a new
/// highest one is given.
fn new_schedule(args: &TrainArgs, parsed: &Parsed, kept: &Schedule, steps: u64) -> Schedule {
    let given = &args.optimizer;
    Schedule {
        kind: if parsed.given("schedule") { given.schedule } else { kept.kind },
        lr: given.lr.unwrap_or(kept.lr),
        min_lr: given.min_lr.unwrap_or_else(|| given.lr.map_or(kept.min_lr, |lr| lr / 10.0)),
        warmup_steps: given.warmup.unwrap_or(steps / 50),
        total_steps: steps,
        decay_steps: given.decay_steps.unwrap_or(steps / 5),
    }
}

/// What the user of a resumed run should know of the rate of its steps up to `steps`, in a line.
pub(crate) fn rates_ahead(trainer: &Trainer, steps: u64) -> Option<String> {
    let (schedule, start) = (&trainer.options().schedule, trainer.schedule_start());
    if let Some(lr) = trainer.lr_override() {
        let lr = console::short(lr);
        return Some(format!("not followed: lr {lr} was set in its place and stays"));
    }
    let end = start.saturating_add(schedule.total_steps);
    if schedule.kind == ScheduleKind::Constant || steps <= end {
        return None;
    }
    let ends = if trainer.steps_done() >= end { "ended" } else { "ends" };
    Some(format!(
        "{ends} at step {end}: steps beyond use lr {} (its lowest); --new-schedule \
         starts a new one",
        console::short(schedule.at(schedule.total_steps))
    ))
}

/// Whether a folder holds a checkpoint.
pub(crate) fn is_checkpoint(dir: &Path) -> bool {
    // The library also knows one that a killed save has left half in its place.
    ["model.safetensors", "config.json"].iter().any(|file| dir.join(file).exists())
        || Model::is_saved_in(dir)
}

/// The folder that the run saves to.
pub(crate) fn out(args: &TrainArgs) -> &Path {
    let given = [&args.start.out, &args.start.resume].into_iter().find_map(|dir| dir.as_deref());
    given.unwrap_or_else(|| Path::new("checkpoint"))
}

/// [`out`]. A checkpoint that is there and is not the one that the run goes on with is kept, unless
/// the user says otherwise.
pub(crate) fn out_folder(args: &TrainArgs) -> Outcome<PathBuf> {
    let (start, out) = (&args.start, out(args));
    let goes_on = start.resume.as_deref().is_some_and(|resume| is_same(resume, out));
    if is_checkpoint(out) && !goes_on && !start.overwrite {
        return Err(Failure::usage(format!(
            "--out: {0} already holds a checkpoint; go on with it (--resume {0}), replace it \
             (--overwrite) or name another folder",
            out.display()
        )));
    }
    Ok(out.to_owned())
}

/// Checks where else the run writes; a line of the log in a file of the checkpoint would be the end
/// of that.
pub(crate) fn check_places(args: &TrainArgs) -> Outcome {
    if let Some(fallback) = &args.start.save_fallback
        && fallback.metadata().is_ok_and(|found| !found.is_dir())
    {
        return Err(Failure::usage(format!(
            "--save-fallback: expected a folder or a new name, found that {} is neither; name another",
            fallback.display()
        )));
    }
    if let Some(dir) = &args.report.tensorboard {
        TensorBoard::check(dir).map_err(|failure| failure.within("--tensorboard"))?;
    }
    let Some(log) = &args.report.log else { return Ok(()) };
    let folder = |path: &Path| path.canonicalize().or_else(|_| std::path::absolute(path)).ok();
    let parent = std::path::absolute(log).ok().and_then(|log| folder(log.parent()?));
    let is_file = |name: &OsStr| FILES.iter().any(|file| name == *file);
    if parent == folder(out(args)) && log.file_name().is_some_and(is_file) {
        return Err(Failure::usage(format!(
            "--log: {} is a file of the checkpoint; name another",
            log.display()
        )));
    }
    Log::check(log)
}

/// Where a run writes besides its checkpoint, which no checkpoint may say: the user names them
/// again for a resumed run, but for a log in the folder itself.
pub(crate) struct Places {
    log: Option<PathBuf>,
    tensorboard: Option<PathBuf>,
    /// Where to save if neither the run's folder nor its parent can be written.
    pub(crate) fallback: Option<PathBuf>,
}

impl Places {
    pub(crate) fn new(args: &TrainArgs) -> Self {
        Self {
            log: args.report.log.clone(),
            tensorboard: args.report.tensorboard.clone(),
            fallback: args.start.save_fallback.clone(),
        }
    }

    /// Those that there are, by their options.
    pub(crate) fn by_name(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let all = [
            ("log", self.log.as_deref()),
            ("tensorboard", self.tensorboard.as_deref()),
            ("save-fallback", self.fallback.as_deref()),
        ];
        all.into_iter().filter_map(|(name, place)| Some((name, place?)))
    }
}

/// Options that the checkpoint of --resume has and may not set, unless the user has given them.
pub(crate) fn left_out(args: &TrainArgs, parsed: &Parsed) -> Outcome<Vec<(String, OsString)>> {
    let Some(dir) = &args.start.resume else { return Ok(Vec::new()) };
    let places = ["log", "tensorboard", "save-fallback"];
    let given = |name: &str| places.contains(&name) && parsed.given(name);
    let file = RunFile::read(dir)?;
    let left = file.iter().flat_map(RunFile::left_out).filter(|(name, _)| !given(name));
    Ok(left.map(|(name, value)| (name.to_owned(), value)).collect())
}

/// What `mxtrain.json` keeps, so that --resume needs no other option.
pub(crate) fn run_file(args: &TrainArgs, data: &Data) -> RunFile {
    let mut options = BTreeMap::from(
        [
            ("steps", args.optimizer.steps),
            ("eval-batches", args.report.measure.eval_batches as u64),
            ("sample-every", args.report.sample_every),
            ("seed", args.seed.number()),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_string().into())),
    );
    let mut keep = |name: &str, value: Option<OsString>| {
        options.extend(value.map(|value| (name.to_owned(), value)));
    };
    fn text(value: impl ToString) -> OsString {
        value.to_string().into()
    }
    // Absolute, so that the run can be resumed from any folder.
    let path = |path: &Path| std::path::absolute(path).ok().map(PathBuf::into_os_string);
    keep("data", args.data.data.as_deref().and_then(path));
    keep("train", args.data.train.as_deref().and_then(absolute_pattern));
    keep("val", args.data.val.as_deref().and_then(absolute_pattern));
    keep("token-type", args.data.tokens.token_type.0.map(text));
    keep("vocab-size", args.data.vocab_size.map(text));
    let ExampleArgs { examples, val_examples, prompt_field, answer_field, between } =
        &args.data.examples;
    keep("examples", examples.as_deref().and_then(path));
    keep("val-examples", val_examples.as_deref().and_then(path));
    if examples.is_some() {
        keep("prompt-field", Some(text(prompt_field)));
        keep("answer-field", Some(text(answer_field)));
        keep("between", Some(text(between)));
    }
    if examples.is_some() && args.document_mask {
        keep("document-mask", Some(text(true)));
    }
    // Of examples the checkpoint may say it, which they are read by.
    let of_data = || data.tokenizer.as_ref().filter(|_| examples.is_some());
    let tokenizer = match (&args.data.tokenizer, of_data()) {
        // Beside the checkpoint, from where it is read again wherever that is.
        (Some(Named::Path(_)), _) | (None, Some(Tokenizer::File(_)) | None) => None,
        (Some(named), _) => Some(text(named)),
        (None, Some(tokenizer)) => Some(text(tokenizer)),
    };
    keep("tokenizer", tokenizer);
    keep("eval-every", args.report.measure.eval_every.map(text));
    keep("sharpness", args.report.sharpness.sharpness.map(text));
    keep("save-every", args.start.save_every.map(text));
    keep("sample-prompt", Some(text(&args.report.sample_prompt)));
    for (name, place) in Places::new(args).by_name() {
        // A log in the run's own folder by its name alone: --resume then goes on with it.
        let is_inside = |place: &PathBuf| {
            name == "log" && place.parent() == std::path::absolute(out(args)).ok().as_deref()
        };
        let place = std::path::absolute(place).ok();
        let inside = place.as_ref().filter(|place| is_inside(place)).and_then(|p| p.file_name());
        keep(name, inside.map(OsStr::to_owned).or_else(|| place.map(PathBuf::into_os_string)));
    }
    let kind = data.tokenizer.as_ref().map(Tokenizer::kind);
    let mut file = RunFile::new(kind, options);
    file.train_tokens = Some(data.tokens());
    file
}

/// A file or pattern as it is named from any folder.
fn absolute_pattern(pattern: &OsStr) -> Option<OsString> {
    let path = Path::new(pattern);
    if path.is_absolute() || path.exists() || !pattern.as_bytes().iter().any(|b| b"*?[".contains(b))
    {
        return std::path::absolute(path).ok().map(PathBuf::into_os_string);
    }
    // What is a name in the folder's path must not become a pattern.
    let mut found = Vec::new();
    for &byte in env::current_dir().ok()?.as_os_str().as_bytes() {
        match byte {
            b'*' | b'?' | b'[' => found.extend([b'[', byte, b']']),
            _ => found.push(byte),
        }
    }
    Some(PathBuf::from(OsString::from_vec(found)).join(path).into_os_string())
}

/// What a resumed run should say of training data that are not those it was saved with.
pub(crate) fn other_tokens(args: &TrainArgs, data: &Data) -> Outcome<Option<String>> {
    let Some(dir) = &args.start.resume else { return Ok(None) };
    let before = RunFile::read(dir)?.and_then(|file| file.train_tokens);
    let now = data.tokens();
    Ok(before.filter(|&before| before != now).map(|before| {
        format!(
            "the run was saved with {} training tokens: from here on it sees others than it would have",
            HumanCount(before)
        )
    }))
}

/// The shape of a loaded model cannot change; an option that agrees with it does no harm.
fn require_shape(args: &TrainArgs, parsed: &Parsed, config: &ModelConfig, origin: &str) -> Outcome {
    for (option, wanted, found) in [
        ("layers", args.model.layers, config.layers),
        ("heads", args.model.heads, config.heads),
        ("channels", args.model.channels, config.channels),
        ("context", args.model.context, config.context_length),
        ("mlp-channels", args.variant.mlp_channels, config.mlp_width()),
        ("kv-heads", args.variant.kv_heads, config.kv_head_count()),
        ("head-size", args.variant.head_size, config.head_width()),
    ] {
        if let Some(wanted) = wanted.filter(|wanted| parsed.given(option) && *wanted != found) {
            return Err(Failure::usage(format!(
                "--{option}: the checkpoint of {origin} has {found}, got {wanted}; leave the option \
                 out"
            )));
        }
    }
    let other = [
        ("arch", args.variant.arch.is_some_and(|arch| arch != config.architecture)),
        ("preset", args.model.preset.is_some()),
        ("shape", args.model.shape.is_some()),
        ("qkv-bias", args.variant.qkv_bias && !config.qkv_bias),
        ("qk-norm", args.variant.qk_norm && !config.qk_norm),
        ("rope-theta", args.variant.rope_theta.is_some_and(|theta| theta != config.rope.theta)),
    ];
    if let Some((option, _)) = other.iter().find(|(option, is)| *is && parsed.given(option)) {
        return Err(Failure::usage(format!(
            "--{option}: the checkpoint of {origin} is what it is, a {}; leave the option out",
            config.architecture
        )));
    }
    // Those of --init-from are made here.
    if origin == "--resume"
        && let Some(wanted) = args.lora.wanted()
        && Some(wanted) != config.lora
    {
        let in_words = |lora: &Lora| adapters_in_words(lora, config.architecture);
        let found = config.lora.as_ref().map_or_else(|| "none".to_owned(), in_words);
        return Err(Failure::usage(format!(
            "--lora: the checkpoint of {origin} has {found}, got {}; leave the option out",
            in_words(&wanted)
        )));
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

/// Options of adapters without any are a slip.
pub(crate) fn check_lora(args: &LoraArgs) -> Outcome {
    let given = match args {
        LoraArgs { lora: Some(_), .. } => return Ok(()),
        LoraArgs { lora_alpha: Some(_), .. } => "--lora-alpha",
        LoraArgs { lora_layers, .. } if *lora_layers != [true; 4] => "--lora-layers",
        _ => return Ok(()),
    };
    Err(Failure::usage(format!("{given}: goes with --lora RANK, which is missing")))
}

/// "adapters of rank 8, alpha 16, beside attn.c_attn".
pub(crate) fn adapters_in_words(lora: &Lora, architecture: Architecture) -> String {
    let names = match architecture {
        Architecture::Gpt2 => Lora::LAYERS,
        Architecture::Llama => Lora::LAYERS_OF_LLAMA,
    };
    let adapted = names.into_iter().zip(lora.layers).filter(|(_, is)| *is);
    let beside = match lora.layers {
        [true, true, true, true] => "all linear layers".to_owned(),
        _ => adapted.map(|(name, _)| name).collect::<Vec<_>>().join(", "),
    };
    format!("adapters of rank {}, alpha {}, beside {beside}", lora.rank, lora.alpha)
}

/// A resumed run keeps its settings: changing one would break the promise that it goes on as if it
/// had never stopped.
fn require_settings(args: &TrainArgs, parsed: &Parsed, kept: &TrainerOptions) -> Outcome {
    let (batch, opt) = (&args.batch, &args.optimizer);
    let (optimizer, schedule) = (&kept.optimizer, &kept.schedule);
    /// A given option, and what it is set against if they differ.
    fn differs<T: PartialEq + ToString>(given: &T, kept: &T) -> Option<[String; 2]> {
        (given != kept).then(|| [given.to_string(), kept.to_string()])
    }
    fn differs_from<T: PartialEq + ToString>(given: &Option<T>, kept: &T) -> Option<[String; 2]> {
        given.as_ref().and_then(|given| differs(given, kept))
    }
    let drop =
        |drop: Option<TokenDrop>| drop.map_or_else(|| "none".to_owned(), |drop| drop.to_string());
    let frozen = |of: &Frozen| if of.is_empty() { "none".to_owned() } else { of.to_string() };
    let of_schedule = ["lr", "min-lr", "warmup", "schedule", "decay-steps"];
    for (option, difference) in [
        ("batch-size", differs(&batch.batch_size, &kept.batch_size)),
        ("sequence-length", differs_from(&batch.sequence_length, &kept.sequence_length)),
        ("accumulation", differs_from(&batch.accumulation, &kept.accumulation)),
        ("lanes", differs_from(&batch.lanes, &kept.lanes)),
        ("recipe", differs(&args.recipe.recipe, &kept.recipe)),
        ("recompute", differs(&batch.recompute, &kept.recompute)),
        ("token-drop", differs(&drop(batch.token_drop), &drop(kept.token_drop))),
        ("freeze", differs(&frozen(&batch.freeze), &frozen(&kept.frozen))),
        ("lr", differs_from(&opt.lr, &schedule.lr)),
        ("min-lr", differs_from(&opt.min_lr, &schedule.min_lr)),
        ("warmup", differs_from(&opt.warmup, &schedule.warmup_steps)),
        ("schedule", differs(&opt.schedule, &schedule.kind)),
        ("decay-steps", differs_from(&opt.decay_steps, &schedule.decay_steps)),
        ("weight-decay", differs(&opt.weight_decay, &optimizer.weight_decay)),
        ("beta1", differs(&opt.beta1, &optimizer.beta1)),
        ("beta2", differs_from(&opt.beta2, &optimizer.beta2)),
        ("clip", differs_from(&opt.clip, &optimizer.clip)),
    ] {
        let is_of_schedule = of_schedule.contains(&option);
        if let Some([given, kept]) = difference
            && parsed.given(option)
            && !(is_of_schedule && args.start.new_schedule)
        {
            let otherwise = if is_of_schedule { ", add --new-schedule" } else { "" };
            return Err(Failure::usage(format!(
                "--{option}: a resumed run keeps what it was started with, {kept}; got {given}; \
                 leave the option out{otherwise}, or start a new run with --init-from"
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
        let line: Vec<_> =
            format!("mxtrain train {line}").split_whitespace().map(Into::into).collect();
        let parse = || parse::parse(&line).unwrap();
        let Command::Train(args) = parse().cli.command else { panic!("expected train") };
        (args, parse())
    }

    fn options(args: &TrainArgs, weights: Weights) -> Outcome<TrainerOptions> {
        trainer_options(&args.batch, &args.recipe.recipe, Some(&args.optimizer), weights, 1)
    }

    #[test]
    fn defaults_follow_from_what_is_given() {
        let (args, _) = train("--steps 1000 --lr 2e-3");
        let schedule = options(&args, Weights::New).unwrap().schedule;
        assert_eq!((schedule.min_lr, schedule.warmup_steps), (2e-3 / 10.0, 20));
        assert_eq!((schedule.total_steps, schedule.decay_steps), (1000, 200));
        let (args, _) = train("--steps 1000");
        assert_eq!(options(&args, Weights::New).unwrap().schedule.lr, 1e-3);
        let finetuning = options(&args, Weights::Trained).unwrap().schedule;
        assert_eq!((finetuning.lr, finetuning.warmup_steps), (5e-5, 50));
        for line in ["--lr 1e-4 --min-lr 1e-3", "--min-lr 2e-3", "--schedule linear --min-lr 1"] {
            let failure = options(&train(line).0, Weights::New).unwrap_err();
            assert!(failure.message.starts_with("--min-lr: expected at most"), "{line}");
        }
        assert!(options(&train("--schedule constant --min-lr 1").0, Weights::New).is_ok());
        let (args, _) = train("--steps 10 --warmup 20");
        let failure = options(&args, Weights::New).unwrap_err();
        assert!(failure.message.starts_with("--steps: "), "{}", failure.message);
    }

    #[test]
    fn a_resumed_run_refuses_other_settings_and_takes_the_same() {
        let (args, _) = train("--lr 1e-3 --steps 100");
        let kept = options(&args, Weights::New).unwrap();
        let check = |line| {
            let (args, parsed) = train(line);
            require_settings(&args, &parsed, &kept).map_err(|f| f.message)
        };
        assert_eq!(check("--lr 0.001 --steps 500 --warmup 2"), Ok(()));
        assert!(check("--lr 2e-3").unwrap_err().contains("started with, 0.001; got 0.002"));
        assert!(check("--recipe bf16").unwrap_err().starts_with("--recipe: "));
        assert!(check("--warmup 3").unwrap_err().starts_with("--warmup: "));
        assert!(check("--lr 2e-3").unwrap_err().contains("add --new-schedule"));
        assert_eq!(check("--new-schedule --lr 2e-3 --warmup 3 --schedule linear"), Ok(()));
        assert!(check("--new-schedule --clip 2").unwrap_err().starts_with("--clip: "));
        let other = check("--token-drop start=16,steps=60%").unwrap_err();
        assert!(other.contains("started with, none; got start=16,steps=60%"), "{other}");
    }

    #[test]
    fn an_optimizer_has_its_usual_settings() {
        let clip = |line| options(&train(line).0, Weights::New).unwrap().optimizer.clip;
        assert_eq!(clip(""), 1.0);
        assert_eq!(clip("--optimizer stable-adamw"), 0.0);
        assert_eq!(clip("--optimizer stable-adamw --clip 2"), 2.0);
        assert_eq!(clip("--optimizer adamw,ramping=500"), 0.0);
        let beta2 = |line| options(&train(line).0, Weights::New).unwrap().optimizer.beta2;
        assert_eq!(beta2(""), 0.95);
        assert_eq!(beta2("--optimizer stable-spam"), 0.999);
        assert_eq!(beta2("--optimizer stable-spam --beta2 0.9"), 0.9);
    }

    #[test]
    fn a_new_schedule_keeps_what_is_not_given() {
        let (args, _) = train("--lr 1e-3 --min-lr 5e-4 --steps 100 --schedule linear");
        let kept = options(&args, Weights::New).unwrap().schedule;
        let new = |line: &str| {
            let (args, parsed) = train(&format!("--resume x --new-schedule --steps 600 {line}"));
            new_schedule(&args, &parsed, &kept, 500)
        };
        let plain = new("");
        assert_eq!((plain.kind, plain.lr, plain.min_lr), (kept.kind, 1e-3, 5e-4));
        assert_eq!((plain.warmup_steps, plain.total_steps, plain.decay_steps), (10, 500, 100));
        let changed = new("--lr 2e-4 --schedule trapezoid --decay-steps 50 --warmup 0");
        assert_eq!((changed.lr, changed.min_lr), (2e-4, 2e-4 / 10.0));
        assert_eq!(changed.kind, ScheduleKind::Trapezoid);
        assert_eq!((changed.warmup_steps, changed.decay_steps), (0, 50));
    }

    #[test]
    fn the_vocabulary_may_be_rounded_up_but_not_down() {
        assert_eq!(vocabulary(None, Some(256)).unwrap(), 256);
        assert_eq!(vocabulary(Some(50304), Some(50257)).unwrap(), 50304);
        assert!(vocabulary(Some(100), Some(256)).is_err());
        assert!(vocabulary(None, None).is_err());
    }
}
