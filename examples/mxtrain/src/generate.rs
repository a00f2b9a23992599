//! `mxtrain generate`: continues a text, printing it as it comes.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Instant;

use mxfp4train::{Decoder, DecoderOptions, DecoderWeights, Draft, GenerateOptions, Generated};

use crate::cli::{GenerateArgs, SamplingArgs};
use crate::console::{content, note};
use crate::failure::{Failure, Outcome};
use crate::hugging_face::{end_tokens, load, tokenizer_to_read};
use crate::machine;
use crate::signals::Signals;
use crate::stop::Stops;
use crate::tokenizer::{TextStream, Tokenizer};

/// Most texts that come at once, whose keys and values all take memory.
const AT_ONCE: u64 = 8;

/// Runs the command.
pub(crate) fn run(args: &GenerateArgs) -> Outcome<ExitCode> {
    // There is nothing to save: whichever signal comes ends the command at once.
    let _signals = Signals::listen()?;
    let temperature = if args.sampling.greedy { 0.0 } else { args.sampling.temperature };
    if args.samples > 1 && temperature == 0.0 {
        return Err(Failure::usage(
            "--samples: without chance (--greedy, --temperature 0) all would be the same; leave one \
             of the options out",
        ));
    }
    let (engine, _) = machine::open(&args.machine, args.seed.number())?;
    let model = load(&engine, &args.checkpoint)?;
    let vocab_size = model.config().vocab_size;
    let tokenizer = tokenizer_to_read(&args.checkpoint, args.tokenizer.as_ref(), vocab_size)?;
    let stop_tokens = match args.ignore_eos {
        true => Vec::new(),
        false => end_tokens(Some(&args.checkpoint), Some(&tokenizer), vocab_size)?,
    };
    args.seed.say_if_drawn();
    let prompt = tokenizer.encode_prompt(&args.prompt)?;
    let context = model.config().context_length;
    let room = match args.lines {
        true => context,
        false => context.min(prompt.len().saturating_add(args.tokens)),
    };
    let SamplingArgs { weights, draft, .. } = args.sampling;
    let drafts = draft.is_of_model() && weights != DecoderWeights::Mxfp4;
    let sequences = if draft == Draft::None { args.samples.min(AT_ONCE) as usize } else { 1 };
    let decoder = Decoder::new(&model, DecoderOptions { sequences, room, weights, drafts })?;
    let options = GenerateOptions {
        max_tokens: args.tokens,
        temperature,
        top_k: args.sampling.top_k,
        top_p: args.sampling.top_p,
        min_p: args.sampling.min_p,
        repetition_penalty: args.sampling.repetition_penalty,
        seed: args.seed.number(),
        stop_tokens,
        weights,
        draft,
        draft_tokens: args.sampling.draft_tokens,
        slide: args.sampling.slide,
    };
    let mut writer = Writer { args, decoder, vocab_size, tokenizer, options };
    let written = if args.lines { writer.lines()? } else { writer.samples(&args.prompt)? };
    match written {
        // The reader has what it wanted (`mxtrain generate | head`).
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::runtime(format!("cannot write to standard output: {e}")))
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Texts of one model, whose weights are made ready once.
struct Writer<'a> {
    args: &'a GenerateArgs,
    decoder: Decoder,
    vocab_size: usize,
    tokenizer: Tokenizer,
    options: GenerateOptions,
}

impl Writer<'_> {
    /// Continues every line of standard input.
    fn lines(&mut self) -> Outcome<io::Result<()>> {
        for line in io::stdin().lines() {
            let line = line.map_err(|e| {
                Failure::runtime(format!("cannot read a line of standard input: {e}"))
            })?;
            if let Err(e) = self.samples(&line)? {
                return Ok(Err(e));
            }
        }
        Ok(Ok(()))
    }

    /// Prints as many texts as the user wants.
    fn samples(&mut self, prompt: &str) -> Outcome<io::Result<()>> {
        if self.decoder.sequences() > 1 {
            return self.samples_at_once(prompt);
        }
        let first = self.options.seed;
        let mut written = Ok(());
        for number in 0..self.args.samples {
            self.options.seed = first.wrapping_add(number);
            let title = self.title(number);
            written = self.sample(prompt, title)?;
            if written.is_err() {
                break;
            }
        }
        self.options.seed = first;
        Ok(written)
    }

    /// What stands above a text; nothing where it is the only one.
    fn title(&self, number: u64) -> String {
        match self.args.samples {
            1 => String::new(),
            samples => {
                let seed = self.options.seed;
                format!("--- sample {} of {samples}, seed {seed} ---\n", number + 1)
            }
        }
    }

    /// The tokens of a prompt, which are the first text then; others may have begun with the same ones,
    /// which are computed already. Gives the stream of what comes behind them.
    fn begin(&mut self, prompt: &str) -> Outcome<TextStream> {
        let decoder = &mut self.decoder;
        let prompt = self.tokenizer.encode_prompt(prompt)?;
        let stream = TextStream::behind(&self.tokenizer, &prompt);
        // What is further back than the context is never looked at.
        let prompt = &prompt[prompt.len().saturating_sub(decoder.room())..];
        let begun_alike =
            decoder.tokens(0).iter().zip(prompt).take_while(|(one, other)| one == other).count();
        decoder.rewind(0, begun_alike)?;
        decoder.push(0, &prompt[begun_alike..])?;
        Ok(stream)
    }

    /// Prints as many texts as the user wants, which come together and are printed when they are whole.
    fn samples_at_once(&mut self, prompt: &str) -> Outcome<io::Result<()>> {
        let (samples, first_seed) = (self.args.samples, self.options.seed);
        for first in (0..samples).step_by(self.decoder.sequences()) {
            let stream = self.begin(prompt)?;
            let mut logits = vec![0.0; self.vocab_size];
            self.decoder.logits(0, &mut logits)?;
            let sequences: Vec<usize> =
                (0..self.decoder.sequences().min((samples - first) as usize)).collect();
            for sequence in &sequences[1..] {
                self.decoder.fork(0, *sequence)?;
            }
            self.options.seed = first_seed.wrapping_add(first);
            let Self { args, decoder, options, .. } = self;
            let mut texts: Vec<_> = sequences
                .iter()
                .map(|_| (prompt.to_owned(), stream.clone(), Stops::new(&args.stop)))
                .collect();
            let begun = Instant::now();
            let tokens = decoder.generate_each(&sequences, options, &mut |n, token| {
                let (text, stream, stops) = &mut texts[n];
                if !options.stop_tokens.contains(&token) {
                    text.push_str(&stops.push(&stream.push(token)));
                }
                !stops.found()
            })?;
            let seconds = begun.elapsed().as_secs_f64();
            for (number, (mut text, stream, mut stops)) in (first..).zip(texts) {
                self.options.seed = first_seed.wrapping_add(number);
                text.push_str(&stops.push(&stream.finish()));
                text.push_str(&stops.finish());
                let text = self.title(number) + &text + "\n";
                if let Err(e) = write(&mut io::stdout().lock(), &text) {
                    return Ok(Err(e));
                }
            }
            let count: usize = tokens.iter().map(Vec::len).sum();
            note(&format!("{count} tokens, {:.1} tokens/s", count as f64 / seconds.max(1e-9)));
        }
        self.options.seed = first_seed;
        Ok(Ok(()))
    }

    /// Prints `title`, the prompt and a continuation, each token as it comes.
    fn sample(&mut self, prompt: &str, title: String) -> Outcome<io::Result<()>> {
        let mut stream = self.begin(prompt)?;
        let Self { args, decoder, options, .. } = self;
        let mut out = io::stdout().lock();
        let mut written = Ok(());
        let mut stops = Stops::new(&args.stop);
        // Printed with the first token: a wrong option should not come after half an answer.
        let mut text = title + prompt;
        // Without what the reader takes; the first token comes with the prompt.
        let (mut begun, mut seconds, mut count) = (Instant::now(), 0.0, 0u32);
        let Generated { drafted, accepted, .. } = decoder.generate(0, options, &mut |token| {
            if count > 0 {
                seconds += begun.elapsed().as_secs_f64();
            }
            count += 1;
            if !options.stop_tokens.contains(&token) {
                text.push_str(&stops.push(&stream.push(token)));
            }
            written = write(&mut out, &text);
            text.clear();
            begun = Instant::now();
            written.is_ok() && !stops.found()
        })?;
        text.push_str(&stops.push(&stream.finish()));
        text.push_str(&stops.finish());
        text.push('\n');
        let written = written.and_then(|()| write(&mut out, &text));
        if written.is_ok() && seconds > 0.0 {
            let rate = f64::from(count - 1) / seconds;
            let mut words = format!("{count} tokens, {rate:.1} tokens/s");
            if drafted > 0 {
                let share = 100.0 * accepted as f64 / drafted as f64;
                words += &format!(", {accepted} of {drafted} guesses right ({share:.0} %)");
            }
            note(&words);
        }
        Ok(written)
    }
}

fn write(out: &mut impl Write, text: &str) -> io::Result<()> {
    out.write_all(content(text).as_bytes())?;
    out.flush()
}
