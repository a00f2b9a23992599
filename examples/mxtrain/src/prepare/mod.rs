//! `mxtrain prepare`: text as people have it to token files.
//!
//! Inputs become a stream of documents (`inputs`, `content`, then `text`, `json` or `parquet`),
//! threads turn them into tokens (`encode`), and each document goes whole to training or to
//! validation (`split`). Nothing is held in memory for longer than that takes.

mod content;
mod encode;
mod inputs;
mod json;
mod parquet;
mod split;
mod text;

use std::fs;
use std::process::ExitCode;
use std::thread;

use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};

use crate::cli::PrepareArgs;
use crate::console;
use crate::failure::{Failure, Outcome};
use crate::prepared::{Documents, Lock, Meta, Source, TRAIN_FILE, VAL_FILE};
use crate::tokens_file::TokensFile;
use encode::Options;
pub(crate) use inputs::Format;
use inputs::{Inputs, counted};
use split::{Rule, Sets};

/// A window that people train with; shorter validation text is worth a word.
const USUAL_WINDOW: u64 = 1024;

/// Runs the command.
pub(crate) fn run(args: &PrepareArgs) -> Outcome<ExitCode> {
    let last = args.inputs.len() - 1;
    if args.val_last && last == 0 {
        return Err(Failure::usage(
            "--val-last: expected two or more inputs, the last for validation; got one",
        ));
    }
    let inputs = Inputs::find(&args.inputs, args.format, args.val_last, &args.out)?;
    let mut sources: Vec<Source> = (args.inputs.iter())
        .map(|path| Source { path: path.clone(), ..Source::default() })
        .collect();
    for input in &inputs.list {
        sources[input.source].files += 1;
    }
    fs::create_dir_all(&args.out).map_err(Failure::io("create", &args.out))?;
    let _lock = Lock::take(&args.out)?;

    let options = Options {
        tokenizer: args.tokenizer,
        special: !args.no_special,
        text_field: args.text_field.clone(),
        threads: match args.threads {
            0 => thread::available_parallelism().map_or(1, |n| n.get()),
            threads => threads,
        },
        chunk: encode::CHUNK,
    };
    let rule = match args.val_last {
        true => Rule::Source(last),
        false => Rule::Fraction(args.val_fraction),
    };
    let writer = |name| TokensFile::create(args.out.join(name));
    let files = [writer(TRAIN_FILE)?, writer(VAL_FILE)?];
    let mut sets = Sets::new(rule, args.tokenizer, options.special, files, sources);
    let skipped = inputs.skipped.in_words();
    let bar = progress_bar(&inputs);
    let mut empty = 0;
    encode::encode(inputs.list, &options, |encoded| {
        sets.take(&encoded)?;
        empty += encoded.empty;
        bar.inc(encoded.input);
        Ok(())
    })?;
    bar.finish_and_clear();
    sets.finish()?;
    if sets.train.tokens() == 0 {
        return Err(Failure::usage(
            "the inputs hold no training text; give more text or a smaller --val-fraction",
        ));
    }

    let (bytes, documents) = (sets.bytes(), sets.documents());
    let mut meta = Meta::new(args.tokenizer, sets.sources);
    meta.documents = Some(documents);
    let train = sets.train.seal()?;
    let val = (sets.val.tokens() > 0).then(|| sets.val.seal()).transpose()?;
    meta.train_tokens = train.tokens();
    meta.val_tokens = val.as_ref().map_or(0, |val| val.tokens());
    meta.publish(&args.out, train, val)?;

    console::print(&summary(args, &meta, documents, bytes))?;
    let empty = (empty > 0).then(|| format!("skipped {} without text", counted(empty, "row")));
    for note in [skipped, empty, short_validation(&meta)].into_iter().flatten() {
        console::note(&format!("note: {note}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Bytes of input that are done; without a length if a pipe is among them.
fn progress_bar(inputs: &Inputs) -> ProgressBar {
    let length: Option<u64> = inputs.list.iter().map(|input| input.length).sum();
    let (bar, template) = match length {
        Some(length) => (
            ProgressBar::new(length),
            "{wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
        ),
        None => (ProgressBar::no_length(), "{spinner} {decimal_bytes} {decimal_bytes_per_sec}"),
    };
    bar.with_style(ProgressStyle::with_template(template).expect("the template is valid"))
}

/// What was made, for the user.
fn summary(args: &PrepareArgs, meta: &Meta, documents: Documents, bytes: [u64; 2]) -> String {
    let all = bytes[0] + bytes[1];
    let files = meta.sources.iter().map(|source| source.files).sum();
    let share = 100.0 * bytes[1] as f64 / all.max(1) as f64;
    let [train, val] = [documents.train, documents.val].map(|count| counted(count, "document"));
    let (train, val) = match documents.cut {
        true => (
            "the beginning of the only document".to_owned(),
            format!("its end from a line on, {share:.1}% of the text"),
        ),
        false => (train, format!("{val}, {share:.1}% of the text")),
    };
    format!(
        "{}: {} of text in {}, tokenizer {}, vocabulary {}\n  {TRAIN_FILE}: {} tokens, {train}\n  \
         {VAL_FILE}: {} tokens{}\n",
        args.out.display(),
        HumanBytes(all),
        counted(files, "file"),
        meta.tokenizer,
        HumanCount(meta.vocab_size as u64),
        HumanCount(meta.train_tokens),
        HumanCount(meta.val_tokens),
        if meta.val_tokens > 0 { format!(", {val}") } else { String::new() },
    )
}

/// What to say of validation text that is shorter than people's windows.
fn short_validation(meta: &Meta) -> Option<String> {
    let (train, val) = (meta.train_tokens, meta.val_tokens);
    if val == 0 || val > USUAL_WINDOW {
        return None;
    }
    let wanted = (USUAL_WINDOW + 1) as f64 / (train + val) as f64;
    let remedy = match (wanted * 100.0).ceil() / 100.0 {
        wanted if wanted <= 0.5 => format!("prepare it with --val-fraction {wanted}"),
        _ => "give more text".to_owned(),
    };
    Some(format!(
        "{VAL_FILE} has {} tokens: shorter than a window of {} tokens and the one behind it; \
         {remedy}, or train with a --context below {val}",
        HumanCount(val),
        HumanCount(USUAL_WINDOW),
    ))
}
