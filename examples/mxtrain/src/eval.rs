//! `mxtrain eval`: a checkpoint's loss on token files.

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

use indicatif::HumanCount;
use mxfp4train::{
    Dataset, DatasetOptions, Decoder, DecoderOptions, DecoderWeights, Engine, EvalStats, Model,
    Recipe, Score, Spared, Trainer, TrainerOptions,
};
use serde::{Deserialize, Serialize};

use crate::cli::EvalArgs;
use crate::console;
use crate::failure::{Failure, Outcome};
use crate::files;
use crate::hugging_face::{self, known_tokenizer};
use crate::machine;
use crate::prepared::Meta;
use crate::signals::Signals;
use crate::tokenizer::Kind;
use crate::train::{OfLogits, short_windows};

/// Runs the command.
pub(crate) fn run(args: &EvalArgs) -> Outcome<ExitCode> {
    // There is nothing to save: whichever signal comes ends the command at once.
    let _signals = Signals::listen()?;
    let (data, of_data) = open(&args.data, &args.tokens.options())?;
    let tokenizer = match of_data {
        Some(tokenizer) => Some(tokenizer),
        None => known_tokenizer(&args.checkpoint)?,
    };
    let of_bytes = tokenizer == Some(Kind::Bytes);
    let (engine, _) = machine::open(&args.machine, 0)?;
    let (stats, merged) = match args.weights {
        Some(weights) => (decoded(args, &engine, &data, weights)?, None),
        None => trained(args, &engine, &data)?,
    };
    for loss in [Some(stats.loss), merged.as_ref().map(|merged| merged.loss_without)] {
        if let Some(loss) = loss.filter(|loss| !loss.is_finite()) {
            return Err(Failure::runtime(format!(
                "{}: the loss is not finite ({loss})",
                args.checkpoint.display()
            )));
        }
    }

    let speed = stats.tokens as f64 / stats.seconds.max(1e-9);
    if args.json {
        let result = Report {
            loss: stats.loss,
            perplexity: f64::from(stats.loss).exp(),
            weights: args.weights.map(DecoderWeights::as_str),
            bits_per_byte: of_bytes.then(|| console::bits(stats.loss)),
            tokens: stats.tokens,
            seconds: stats.seconds,
            sharpness: stats.sharpness.map(Into::into),
            haste: merged,
        };
        console::print_json(&result)?;
    } else {
        console::print(&format!(
            "{}, perplexity {:.3}; {} tokens, {} tokens/s\n",
            console::loss_in_words(stats.loss, of_bytes),
            f64::from(stats.loss).exp(),
            HumanCount(stats.tokens),
            HumanCount(speed as u64),
        ))?;
        if let Some(sharpness) = &stats.sharpness {
            console::print(&format!("{}\n", console::sharpness_in_words(sharpness)))?;
        }
        if let Some(merged) = merged {
            console::print(&merged.in_words(stats.loss, of_bytes))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// By the trainer that the checkpoint or the options say.
fn trained(
    args: &EvalArgs,
    engine: &Engine,
    data: &Dataset,
) -> Outcome<(EvalStats, Option<Merged>)> {
    let mut trainer = load(args, engine)?;
    say_if_short(args, data, trainer.options().sequence_length);
    trainer.set_sharpness(args.sharpness.sharpness)?;
    let stats = trainer.eval(data, args.batches)?;
    let merged = match stats.spared {
        Some(spared) => Some(Merged::of(trainer, data, args.batches, spared)?),
        None => None,
    };
    Ok((stats, merged))
}

/// By the weights that text is written with, on the same windows.
fn decoded(
    args: &EvalArgs,
    engine: &Engine,
    data: &Dataset,
    weights: DecoderWeights,
) -> Outcome<EvalStats> {
    // The model alone, as text is written with it: what a trainer keeps weights as is another thing.
    let model = hugging_face::load(engine, &args.checkpoint)?;
    let saved = match Trainer::read_state(&args.checkpoint)? {
        Some(text) => files::parse_json(&args.checkpoint.join("trainer.json"), &text)?,
        None => Shape::default(),
    };
    let default = TrainerOptions::default();
    let of =
        |asked: Option<usize>, saved: Option<usize>, default| asked.or(saved).unwrap_or(default);
    let batch_size = of(args.batch_size, saved.batch_size, default.batch_size);
    let sequence_length = of(args.sequence_length, saved.sequence_length, default.sequence_length);
    let context = model.config().context_length;
    let length = if sequence_length == 0 { context } else { sequence_length };
    if length > context {
        return Err(Failure::usage(format!(
            "--sequence-length: expected at most {context}, the model's context; got {length}"
        )));
    }
    say_if_short(args, data, length);
    let of_one = DecoderOptions { room: length, weights, ..DecoderOptions::default() };
    let windows = (args.batches as u64).saturating_mul(batch_size as u64);
    let Score { loss, tokens, seconds } =
        Decoder::new(&model, of_one)?.eval(data, length, windows)?;
    Ok(EvalStats { loss, tokens, seconds, spared: None, sharpness: None })
}

fn say_if_short(args: &EvalArgs, data: &Dataset, sequence_length: usize) {
    if let Some(note) = short_windows(data, sequence_length) {
        console::note(&format!("mxtrain: {}: {note}", args.data.display()));
    }
}

/// Opens a prepared folder's validation tokens or the files of a pattern.
fn open(data: &OsStr, options: &DatasetOptions) -> Outcome<(Dataset, Option<Kind>)> {
    let dir = Path::new(data);
    if !dir.is_dir() {
        return Ok((Dataset::open_with(data, options)?, None));
    }
    let (meta, val) = Meta::read_with(dir, |meta| meta.open_val(dir))?;
    let val = val.ok_or_else(|| {
        Failure::usage(format!(
            "{0}: was prepared without validation text; name a token file, such as {0}/train.bin",
            dir.display()
        ))
    })?;
    Ok((val, Some(meta.tokenizer)))
}

/// Loads the checkpoint with the shape of batches that it was trained with, or the one asked for.
fn load(args: &EvalArgs, engine: &Engine) -> Outcome<Trainer> {
    let is_saved = Trainer::is_saved_in(&args.checkpoint);
    let given = args.batch_size.is_some() || args.sequence_length.is_some();
    if is_saved && !given && args.recipe.is_none() {
        return Ok(Trainer::load(engine, &args.checkpoint)?);
    }
    let (model, options) = model_of(args, engine)?;
    if let Some(share) = options.recipe.ema().filter(|_| is_saved) {
        console::note(&format!(
            "mxtrain: {}: W is rounded to nearest here, not by the slow means of ema={share} that \
             the checkpoint has; leave out --recipe, --batch-size and --sequence-length to use them",
            args.checkpoint.display()
        ));
    }
    let recipe = args.recipe.clone().unwrap_or(options.recipe);
    Ok(Trainer::new(&model, TrainerOptions { recipe, ..options })?)
}

/// A checkpoint's model, its recipe, and the shape of batches that it was trained with, or the one
/// asked for.
fn model_of(args: &EvalArgs, engine: &Engine) -> Outcome<(Model, TrainerOptions)> {
    let (model, options) = if Trainer::is_saved_in(&args.checkpoint) {
        let trainer = Trainer::load(engine, &args.checkpoint)?;
        (trainer.model().clone(), trainer.options().clone())
    } else {
        let bf16: Recipe = "bf16".parse()?;
        let options = TrainerOptions { recipe: bf16, ..TrainerOptions::default() };
        (hugging_face::load(engine, &args.checkpoint)?, options)
    };
    let options = TrainerOptions {
        batch_size: args.batch_size.unwrap_or(options.batch_size),
        sequence_length: args.sequence_length.unwrap_or(options.sequence_length),
        ..options
    };
    Ok((model, options))
}

/// Keys of `trainer.json`.
#[derive(Default, Deserialize)]
struct Shape {
    batch_size: Option<usize>,
    sequence_length: Option<usize>,
}

/// The result for programs.
#[derive(Serialize)]
struct Report {
    /// Nats a token.
    loss: f32,
    perplexity: f64,
    /// What the model wrote text with, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    weights: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bits_per_byte: Option<f64>,
    tokens: u64,
    seconds: f64,
    #[serde(flatten)]
    sharpness: Option<OfLogits>,
    #[serde(skip_serializing_if = "Option::is_none")]
    haste: Option<Merged>,
}

/// What merging channels costs and would spare.
#[derive(Serialize)]
struct Merged {
    /// Bits of a hash.
    bits: usize,
    /// Nats a token with channels as they are, on the same windows.
    loss_without: f32,
    /// The part of the linear layers' operations: of their products alone, and with those of
    /// merging.
    spared_products: f64,
    spared_all: f64,
}

impl Merged {
    /// Evaluates once more without, in place of the trainer that has evaluated.
    fn of(trainer: Trainer, data: &Dataset, batches: usize, spared: Spared) -> Outcome<Self> {
        let (model, options) = (trainer.model().clone(), trainer.options().clone());
        drop(trainer);
        let recipe = options.recipe.without_haste();
        let bits = options.recipe.haste().unwrap_or_default();
        let stats =
            Trainer::new(&model, TrainerOptions { recipe, ..options })?.eval(data, batches)?;
        let Spared { products: spared_products, all: spared_all } = spared;
        Ok(Self { bits, loss_without: stats.loss, spared_products, spared_all })
    }

    fn in_words(&self, loss: f32, of_bytes: bool) -> String {
        let Self { bits, loss_without, spared_products, spared_all } = *self;
        format!(
            "without haste={bits}: {}; merging costs {:+.4} nats a token\n\
             merging would spare {:.1}% of the operations of linear layers, {:.1}% with its own \
             counted\n",
            console::loss_in_words(loss_without, of_bytes),
            loss - loss_without,
            100.0 * spared_products,
            100.0 * spared_all,
        )
    }
}
