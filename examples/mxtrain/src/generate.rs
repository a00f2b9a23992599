//! `mxtrain generate`: continues a text, printing it as it comes.

use std::io::{self, Write};
use std::process::ExitCode;

use mxfp4train::{GenerateOptions, Model};

use crate::cli::GenerateArgs;
use crate::failure::{Failure, Outcome};
use crate::machine;
use crate::run_file::tokenizer_of;
use crate::signals::Signals;
use crate::tokenizer::{TextStream, Tokenizer};

/// Runs the command.
pub(crate) fn run(args: &GenerateArgs) -> Outcome<ExitCode> {
    // There is nothing to save: whichever signal comes ends the command at once.
    let _signals = Signals::listen()?;
    let (engine, _) = machine::open(&args.machine, args.seed.seed)?;
    let model = Model::load(&engine, &args.checkpoint)?;
    let vocab_size = model.config().vocab_size;
    let tokenizer = match args.tokenizer {
        Some(tokenizer) => tokenizer,
        None => tokenizer_of(&args.checkpoint)?.or_else(|| guess(vocab_size)).ok_or_else(|| {
            Failure::usage(format!(
                "--tokenizer is missing: {} does not say how its text became tokens",
                args.checkpoint.display()
            ))
        })?,
    };
    if tokenizer.vocab_size() > vocab_size {
        return Err(Failure::usage(format!(
            "--tokenizer: {tokenizer} has {} tokens, the checkpoint's vocabulary is {vocab_size}",
            tokenizer.vocab_size()
        )));
    }
    let options = GenerateOptions {
        max_tokens: args.tokens,
        temperature: if args.sampling.greedy { 0.0 } else { args.sampling.temperature },
        top_k: args.sampling.top_k,
        top_p: args.sampling.top_p,
        seed: args.seed.seed,
    };

    let mut out = io::stdout().lock();
    let mut written = Ok(());
    let mut stream = TextStream::new(tokenizer);
    // Printed with the first token: a wrong option should not come after half an answer.
    let mut text = args.prompt.clone();
    let prompt = tokenizer.encode_prompt(&args.prompt);
    model.generate(&prompt, &options, &mut |token| {
        text.push_str(&stream.push(token));
        written = write(&mut out, &text);
        text.clear();
        written.is_ok()
    })?;
    text.push_str(&stream.finish());
    text.push('\n');
    match written.and_then(|()| write(&mut out, &text)) {
        // The reader has what it wanted (`mxtrain generate | head`).
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        Err(e) => Err(Failure::runtime(format!("cannot write to standard output: {e}"))),
        Ok(()) => Ok(ExitCode::SUCCESS),
    }
}

fn write(out: &mut impl Write, text: &str) -> io::Result<()> {
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Hugging Face's GPT-2 models have its vocabulary, and no file of ours.
fn guess(vocab_size: usize) -> Option<Tokenizer> {
    (vocab_size == Tokenizer::Gpt2.vocab_size()).then_some(Tokenizer::Gpt2)
}
