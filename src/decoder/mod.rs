//! Text from a model: what comes next, token by token.
//!
//! Keys and values of a sequence are kept, so that a token takes one row of products.

mod cached;
mod drafts;
mod options;
mod recomputing;
mod sampler;
mod score;

use std::fmt;

pub use crate::backend::DecoderWeights;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::{Device, Precision, on_device};
use crate::gpt::ModelConfig;
use crate::model::Model;
use crate::recipe::Recipe;
use crate::reserve::{collect, push, reserve, zeros};
use crate::{Error, Result};
use cached::{By, Cached};
use drafts::Checked;
pub use options::{Draft, GenerateOptions};
use sampler::Sampler;
pub use score::Score;

const TOKENS: &str = "the tokens of a text";

/// Texts of a decoder: more would take much memory only to be counted.
const MOST_SEQUENCES: usize = 1 << 16;

impl Model {
    /// Samples a continuation of `prompt`. `on_token` sees each token as it is drawn, and returns
    /// whether to go on; a token of `stop_tokens` is the last. Once prompt and continuation exceed
    /// the context, the oldest tokens fall out, one by one or with `slide` many at once.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an empty prompt or an option out of range,
    /// [`Error::TokenRange`], [`Error::NotFinite`] if the model's logits are,
    /// [`Error::Unsupported`] for what the device cannot do.
    pub fn generate(
        &self,
        prompt: &[u32],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Generated> {
        let config = self.config();
        options.validate(config.vocab_size)?;
        options.draft.check(options.weights)?;
        self.check_prompt(prompt)?;
        // What is further back than the context is never looked at.
        let total = prompt.len().saturating_add(options.max_tokens);
        let longest = total.min(config.context_length);
        let of_one = DecoderOptions {
            sequences: 1,
            room: longest,
            weights: options.weights,
            drafts: options.draft.is_of_model(),
        };
        let mut decoder = Decoder::new(self, of_one)?;
        decoder.push(0, &prompt[prompt.len().saturating_sub(longest)..])?;
        decoder.generate(0, options, on_token)
    }

    /// Writes the logits (V) of the token after `tokens`, in f32. Only the last tokens that fit the
    /// context count.
    ///
    /// # Errors
    /// As [`Model::generate`]; [`Error::InvalidArgument`] if `out` has another length.
    pub fn next_logits(&self, tokens: &[u32], out: &mut [f32]) -> Result<()> {
        self.check_prompt(tokens)?;
        check_logits(out, self.config())?;
        let context = &tokens[tokens.len().saturating_sub(self.config().context_length)..];
        on_device!(self.on_device(), on => recomputing::next_logits(self, on, context, out))
    }

    /// Writes the log-probability of every token of texts, after those before it in its own text; that of
    /// the first, before which there is none, as 0, so that those of a text add up to that of all the rest.
    /// Their negative mean is the loss. With `hidden` also what the norm behind the last block puts out at
    /// every token: (tokens, C), from which the head makes logits.
    ///
    /// `tokens` are those of all texts, one behind the other, and `lengths` how many each has: 0 up to the
    /// context. Nothing is kept of the call, nor is a [`crate::Trainer`] needed. In the
    /// precision of `weights`, of [`DecoderWeights::F32`] (on a GPU slow) and [`DecoderWeights::Bf16`],
    /// which a processor computes as the former. In a group of ranks it is a rank's own.
    ///
    /// ```
    /// use mxfp4train::{DecoderWeights, Engine, EngineOptions, Model, ModelConfig};
    ///
    /// # fn main() -> mxfp4train::Result<()> {
    /// let engine = Engine::new(EngineOptions::default())?;
    /// let config =
    ///     ModelConfig { vocab_size: 50, channels: 32, heads: 2, layers: 1, ..ModelConfig::default() };
    /// let model = Model::new(&engine, &config)?;
    /// let mut log_probabilities = [0.0; 5];
    /// let (tokens, lengths) = ([7, 4, 9, 1, 1], [3, 2]);
    /// model.score(DecoderWeights::F32, &tokens, &lengths, &mut log_probabilities, None)?;
    /// let of_first: f32 = log_probabilities[..3].iter().sum();
    /// assert!(of_first < 0.0 && log_probabilities[3] == 0.0);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for lengths that do not add up to the tokens, a text beyond the context,
    /// room for another number of results, and [`DecoderWeights::Mxfp4`]; [`Error::TokenRange`];
    /// [`Error::OutOfMemory`], and [`Error::Unsupported`] for what the device cannot do.
    pub fn score(
        &self,
        weights: DecoderWeights,
        tokens: &[u32],
        lengths: &[usize],
        log_probabilities: &mut [f32],
        hidden: Option<&mut [f32]>,
    ) -> Result<()> {
        let config = self.config();
        let ModelConfig { context_length, channels, .. } = *config;
        let of_all = lengths.iter().try_fold(0, |sum: usize, length| sum.checked_add(*length));
        if of_all != Some(tokens.len()) {
            let message = format!(
                "expected lengths of texts that add up to the {} tokens, got {}",
                tokens.len(),
                of_all.map_or_else(|| "more than there can be".into(), |sum| sum.to_string())
            );
            return Err(Error::invalid("lengths", message));
        }
        if let Some(text) = lengths.iter().position(|length| *length > context_length) {
            let message = format!(
                "expected texts of at most {context_length} tokens, the model's context; text {text} \
                 has {}: cut it into several, which may overlap",
                lengths[text]
            );
            return Err(Error::invalid("lengths", message));
        }
        if weights == DecoderWeights::Mxfp4 {
            let message = "expected f32 or bf16, got mxfp4; a Decoder's eval has the loss in MXFP4";
            return Err(Error::invalid("weights", message));
        }
        let room = [Some(log_probabilities.len()), hidden.as_ref().map(|hidden| hidden.len())];
        let wanted = [("log_probabilities", 1), ("hidden", channels)];
        for ((what, each), got) in wanted.into_iter().zip(room) {
            let expected = tokens.len() * each;
            if let Some(got) = got.filter(|got| *got != expected) {
                let message = format!("expected room for {expected} numbers, got {got}");
                return Err(Error::invalid(what, message));
            }
        }
        check_tokens("the texts", tokens, config.vocab_size)?;
        let (texts, out) = (recomputing::Texts { tokens, lengths }, (log_probabilities, hidden));
        on_device!(self.on_device(), on => recomputing::score(self, on, &texts, weights, out))
    }

    fn check_prompt(&self, prompt: &[u32]) -> Result<()> {
        let vocab_size = self.config().vocab_size;
        if prompt.is_empty() {
            let message = "expected at least one token to continue from, got none";
            return Err(Error::invalid("prompt", message));
        }
        check_tokens("the prompt", prompt, vocab_size)
    }
}

/// A continuation of a prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens.
    pub tokens: Vec<u32>,
    /// Tokens that were guessed by a draft.
    pub drafted: u64,
    /// Those of them that the model chose, too.
    pub accepted: u64,
}

/// What a [`Decoder`] is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderOptions {
    /// Texts beside each other, up to 65536. Default 1.
    pub sequences: usize,
    /// Most tokens of each; 0 (default) is the model's context.
    pub room: usize,
    /// What logits are computed in.
    pub weights: DecoderWeights,
    /// Whether weights are kept in MXFP4, too, for drafts of [`Decoder::generate`]; on a GPU beside
    /// weights in bf16 alone, and not beside weights that are in MXFP4 themselves.
    pub drafts: bool,
}

impl Default for DecoderOptions {
    fn default() -> Self {
        Self { sequences: 1, room: 0, weights: DecoderWeights::default(), drafts: false }
    }
}

/// Texts that grow: tokens in, the logits of what comes next out. They share what is made of the
/// weights, and are numbered from 0.
///
/// In f32 logits are those of [`Model::next_logits`] of all tokens of a text: on a processor bit for
/// bit; a GPU sums products of few rows in an order of its own. In any numbers they are the same bits
/// however the tokens came. A decoder follows its model: where weights have been changed, by a trainer
/// or by [`Model::write_tensor`], the next logits are those of the new ones.
///
/// ```
/// # use mxfp4train::{Decoder, DecoderOptions, Engine, EngineOptions, Model, ModelConfig};
/// # let engine = Engine::new(EngineOptions::default())?;
/// # let config = ModelConfig { layers: 1, heads: 2, channels: 8, vocab_size: 50, ..Default::default() };
/// # let model = Model::new(&engine, &config)?;
/// let mut decoder = Decoder::new(&model, DecoderOptions { sequences: 2, ..Default::default() })?;
/// let mut logits = vec![0.0; 50];
/// decoder.push(0, &[1, 2, 3])?;
/// decoder.logits(0, &mut logits)?;
/// // Two ways to go on, of which the beginning is computed once.
/// decoder.fork(0, 1)?;
/// decoder.push(0, &[4])?;
/// decoder.push(1, &[5])?;
/// # assert_eq!(decoder.tokens(1), [1, 2, 3, 5]);
/// # Ok::<(), mxfp4train::Error>(())
/// ```
pub struct Decoder {
    on_device: Device<Cached<Cpu>, Cached<Cuda>>,
    model: Model,
    sequences: Vec<Vec<u32>>,
    /// As asked for, and the room that there is.
    options: DecoderOptions,
}

impl Decoder {
    /// Empty texts of `model`; their memory is allocated here (on a GPU again where a trainer changes
    /// what weights are kept as). That is, for each of them, keys and values, 8 bytes a channel, block
    /// and token of room (4 where a GPU computes in bf16), and, for all, a copy of the
    /// linear layers' weights, in less than f32 of the head's, too; a GPU makes a copy in MXFP4 alone,
    /// and has room for one layer of it in bf16; and one more in MXFP4 for drafts.
    /// The copy is made with the first logits, and again with the first after the weights may have
    /// been changed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless there are from 1 to 65536 sequences and `room` is at most the
    /// model's context, [`Error::Unsupported`] for what the device cannot do, [`Error::OutOfMemory`].
    pub fn new(model: &Model, options: DecoderOptions) -> Result<Self> {
        let context = model.config().context_length;
        let room = if options.room == 0 { context } else { options.room };
        if room > context {
            let message = format!(
                "expected from 1 to {context} tokens, the context, or 0 for all of it; got {room}"
            );
            return Err(Error::invalid("room", message));
        }
        if options.drafts && options.weights == DecoderWeights::Mxfp4 {
            let message = "expected none beside weights in MXFP4, for the model itself has those";
            return Err(Error::invalid("drafts", message));
        }
        if !(1..=MOST_SEQUENCES).contains(&options.sequences) {
            let message = format!("expected from 1 to {MOST_SEQUENCES}, got {}", options.sequences);
            return Err(Error::invalid("sequences", message));
        }
        let options = DecoderOptions { room, ..options };
        let on_device = match model.on_device() {
            Device::Cpu(on) => Device::Cpu(Cached::new(model, on, options)?),
            Device::Cuda(on) => Device::Cuda(Cached::new(model, on, options)?),
        };
        let tokens = |_| {
            let mut tokens = Vec::new();
            reserve(&mut tokens, TOKENS, room)?;
            Ok(tokens)
        };
        let sequences = collect(TOKENS, (0..options.sequences).map(tokens))?;
        Ok(Self { on_device, model: model.clone(), sequences, options })
    }

    /// Appends tokens to a text. They are computed when logits are asked for.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there is no such sequence or where tokens are more than there
    /// is room for, and [`Error::TokenRange`]; the text is then as before.
    pub fn push(&mut self, sequence: usize, tokens: &[u32]) -> Result<()> {
        self.check(sequence)?;
        let vocab_size = self.model.config().vocab_size;
        let left = self.options.room - self.sequences[sequence].len();
        if tokens.len() > left {
            let message = format!(
                "expected at most {left}, for which there is room; got {}; rewind, or make a decoder \
                 with more room",
                tokens.len()
            );
            return Err(Error::invalid("tokens", message));
        }
        check_tokens("pushed tokens", tokens, vocab_size)?;
        self.sequences[sequence].extend_from_slice(tokens);
        Ok(())
    }

    /// Writes the logits (V) of the token after the last one of a text.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there is no such sequence, for an empty text, or if `out` has
    /// another length, and what the device says.
    pub fn logits(&mut self, sequence: usize, out: &mut [f32]) -> Result<()> {
        self.check(sequence)?;
        if self.sequences[sequence].is_empty() {
            let message = "expected at least one token before logits are asked for, got none";
            return Err(Error::invalid("tokens", message));
        }
        check_logits(out, self.model.config())?;
        self.compute((sequence, By::Own), self.sequences[sequence].len() - 1, out)
    }

    /// Writes the logits (n, V) of the tokens after the last ones of n different texts, those of
    /// [`Decoder::logits`] of each. The last tokens of 32 texts at a time share a look at the weights;
    /// what is missing before them is computed text by text.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there is no such sequence or one comes twice, for an empty text,
    /// or if `out` has another length, and what the device says.
    pub fn logits_of(&mut self, sequences: &[usize], out: &mut [f32]) -> Result<()> {
        self.check_each(sequences)?;
        let vocab_size = self.vocab_size();
        if out.len() != sequences.len() * vocab_size {
            let message = format!(
                "expected room for {} times {vocab_size} numbers, got {}",
                sequences.len(),
                out.len()
            );
            return Err(Error::invalid("logits", message));
        }
        let Self { on_device, model, sequences: all, .. } = self;
        let texts = sequences.iter().map(|sequence| Ok((*sequence, &all[*sequence][..])));
        let texts = collect(TOKENS, texts)?;
        on_device!(on_device, on => on.logits_of(model, &texts, out))
    }

    /// They are different texts, with a token or more.
    fn check_each(&self, sequences: &[usize]) -> Result<()> {
        let mut is_asked = zeros("which texts are asked for", self.sequences.len())?;
        for sequence in sequences {
            self.check(*sequence)?;
            if std::mem::replace(&mut is_asked[*sequence], true) {
                let message = format!("expected different ones, got {sequence} twice");
                return Err(Error::invalid("sequences", message));
            }
            if self.sequences[*sequence].is_empty() {
                let message =
                    format!("expected at least one token in each text, got none in {sequence}");
                return Err(Error::invalid("tokens", message));
            }
        }
        Ok(())
    }

    /// Writes the logits (n, V) of what comes after each token of a text from number `from` on, n of
    /// them, as [`Decoder::logits`] has them after each: what it takes to score a text, or to check
    /// tokens that were guessed. Those tokens are computed together, again if they were before.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there is no such sequence, where it has no token of this
    /// number, or if `out` has another length, and what the device says.
    pub fn logits_from(&mut self, sequence: usize, from: usize, out: &mut [f32]) -> Result<()> {
        self.check(sequence)?;
        let len = self.sequences[sequence].len();
        if from >= len {
            let message = match len {
                0 => format!("expected a text of at least one token, got none (from {from})"),
                len => format!("expected a token of the text, from 0 to {}; got {from}", len - 1),
            };
            return Err(Error::invalid("from", message));
        }
        let (rows, vocab_size) = (len - from, self.vocab_size());
        if out.len() != rows * vocab_size {
            let message =
                format!("expected room for {rows} times {vocab_size} numbers, got {}", out.len());
            return Err(Error::invalid("logits", message));
        }
        self.compute((sequence, By::Own), from, out)
    }

    /// The same of what was checked, by weights of either kind.
    fn compute(&mut self, (sequence, by): (usize, By), from: usize, out: &mut [f32]) -> Result<()> {
        let Self { on_device, model, sequences, .. } = self;
        let tokens = &sequences[sequence];
        on_device!(on_device, on => on.logits(model, (sequence, tokens, by), from, out))
    }

    /// Takes the model's weights as they are now; whether they had changed.
    fn follow(&mut self) -> Result<bool> {
        let Self { on_device, model, .. } = self;
        on_device!(on_device, on => on.follow_model(model))
    }

    /// Tokens of a text that are computed, by weights of either kind.
    fn computed(&self, sequence: usize, by: By) -> usize {
        on_device!(&self.on_device, on => on.computed(sequence, by))
    }

    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    /// Samples a continuation of a text, which has at least one token, and appends it. `on_token` sees
    /// each token as it is drawn, and returns whether to go on; a token of `stop_tokens` is the last.
    /// Where there is no more room, the oldest tokens fall out, one by one or with `slide` many at
    /// once. `weights` of the options are not looked at: the decoder has its own. Draws are numbered
    /// from 0 in every call, so a text that is continued again wants another seed. The repetition
    /// penalty is for what the text has, and for what fell out of it in this call.
    ///
    /// # Errors
    /// As [`Model::generate`]; [`Error::InvalidArgument`] where there is no such sequence, for an
    /// empty text, and for a draft of weights that the decoder does not have. Tokens that `on_token` saw
    /// before the device failed, or logits were not finite, are in the text. Where `on_token` panics,
    /// there may be guesses behind them.
    pub fn generate(
        &mut self,
        sequence: usize,
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Generated> {
        self.check(sequence)?;
        let vocab_size = self.vocab_size();
        options.validate(vocab_size)?;
        options.draft.check(self.options.weights)?;
        if options.draft.is_of_model() && !self.options.drafts {
            let message = format!(
                "{} guesses with weights in MXFP4, and the decoder has none beside its own; make it \
                 with drafts, or use none or ngram",
                options.draft
            );
            return Err(Error::invalid("draft", message));
        }
        if self.sequences[sequence].is_empty() {
            let message = "expected at least one token to continue from, got none";
            return Err(Error::invalid("tokens", message));
        }
        let mut sampler = Sampler::new(options, vocab_size)?;
        self.sequences[sequence].iter().for_each(|token| sampler.note(*token));
        let checked = options.draft.checked(options.draft_tokens, vocab_size)?;
        self.go_on(sequence, (options, sampler, checked), on_token)
    }

    /// [`Decoder::generate`] of several texts at once, which read the weights together. The first has
    /// the seed of the options, each other one the next; so each is what it would be alone. `on_token`
    /// also sees which of `sequences` a token is for, and ends that text alone. Takes 20 bytes a text and
    /// token of the vocabulary meanwhile.
    ///
    /// # Errors
    /// As [`Decoder::generate`] and [`Decoder::logits_of`]; [`Error::InvalidArgument`] for a draft.
    pub fn generate_each(
        &mut self,
        sequences: &[usize],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(usize, u32) -> bool,
    ) -> Result<Vec<Vec<u32>>> {
        let vocab_size = self.vocab_size();
        options.validate(vocab_size)?;
        self.check_each(sequences)?;
        if options.draft != Draft::None {
            let message = format!(
                "expected none where several texts come at once, for those fill a pass; got {}",
                options.draft
            );
            return Err(Error::invalid("draft", message));
        }
        let each = |n: usize| GenerateOptions {
            seed: options.seed.wrapping_add(n as u64),
            ..options.clone()
        };
        let each = collect(TOKENS, (0..sequences.len()).map(|n| Ok(each(n))))?;
        let mut samplers =
            collect(TOKENS, each.iter().map(|options| Sampler::new(options, vocab_size)))?;
        let mut texts = collect(TOKENS, sequences.iter().map(|_| Ok(Vec::new())))?;
        let mut logits = zeros("the logits", sequences.len() * vocab_size)?;
        // Which of them go on, and their sequences.
        let mut open = collect(TOKENS, (0..sequences.len()).map(Ok))?;
        let mut of_open = collect(TOKENS, sequences.iter().map(|sequence| Ok(*sequence)))?;
        if options.max_tokens == 0 {
            open.clear();
        }
        for (sampler, sequence) in samplers.iter_mut().zip(sequences) {
            self.sequences[*sequence].iter().for_each(|token| sampler.note(*token));
        }
        while !open.is_empty() {
            self.logits_of(&of_open, &mut logits[..open.len() * vocab_size])?;
            let rows = logits.chunks_exact_mut(vocab_size);
            let mut ended = false;
            for (n, logits) in open.iter_mut().zip(rows) {
                let (text, sampler): (&mut Vec<u32>, _) = (&mut texts[*n], &mut samplers[*n]);
                let token = sampler.choose(logits, text.len() as u32)?;
                sampler.note(token);
                push(text, TOKENS, token)?;
                self.append(sequences[*n], token, options.slide)?;
                let goes_on = on_token(*n, token) && !options.stop_tokens.contains(&token);
                if !goes_on || text.len() == options.max_tokens {
                    (*n, ended) = (usize::MAX, true);
                }
            }
            if ended {
                open.retain(|n| *n != usize::MAX);
                of_open.clear();
                of_open.extend(open.iter().map(|n| sequences[*n]));
            }
        }
        Ok(texts)
    }

    /// Appends tokens as they are drawn.
    fn go_on(
        &mut self,
        sequence: usize,
        (options, mut sampler, mut checked): (&GenerateOptions, Sampler<'_>, Checked),
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Generated> {
        let (mut tokens, mut goes_on) = (Vec::new(), options.max_tokens > 0);
        while goes_on {
            let (index, left) = (tokens.len() as u32, options.max_tokens - tokens.len());
            let mut emit = |token| {
                push(&mut tokens, TOKENS, token)?;
                goes_on = on_token(token) && !options.stop_tokens.contains(&token);
                Ok(goes_on)
            };
            let by = (&mut sampler, By::Own);
            checked.advance((self, sequence), by, index, left, &mut emit)?;
            goes_on &= tokens.len() < options.max_tokens;
            self.append(sequence, checked.last, options.slide)?;
        }
        Ok(Generated { tokens, drafted: checked.drafted, accepted: checked.accepted })
    }

    /// Takes the tokens of a text from number `len` on out again; without memory of them, others can
    /// follow.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there is no such sequence, or where it has fewer.
    pub fn rewind(&mut self, sequence: usize, len: usize) -> Result<()> {
        self.check(sequence)?;
        let count = self.sequences[sequence].len();
        if len > count {
            let message = format!("expected at most {count}, the tokens that there are; got {len}");
            return Err(Error::invalid("len", message));
        }
        self.sequences[sequence].truncate(len);
        on_device!(&mut self.on_device, on => on.rewind(sequence, len));
        Ok(())
    }

    /// Makes a text that of another, with what is computed of it, which is copied.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there is no such sequence.
    pub fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        self.check(from)?;
        self.check(to)?;
        if let Ok([from, to]) = self.sequences.get_disjoint_mut([from, to]) {
            to.clear();
            to.extend_from_slice(from);
        }
        on_device!(&mut self.on_device, on => on.fork(from, to));
        Ok(())
    }

    /// A text so far.
    ///
    /// # Panics
    /// Where there is no such sequence.
    pub fn tokens(&self, sequence: usize) -> &[u32] {
        &self.sequences[sequence]
    }

    /// The same, or an error.
    pub(crate) fn text(&self, sequence: usize) -> Result<&[u32]> {
        self.check(sequence)?;
        Ok(self.tokens(sequence))
    }

    /// Number of texts.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Tokens that each has room for in all.
    pub fn room(&self) -> usize {
        self.options.room
    }

    fn check(&self, sequence: usize) -> Result<()> {
        let last = self.sequences.len() - 1;
        if sequence > last {
            let message = format!("expected a number from 0 to {last}, got {sequence}");
            return Err(Error::invalid("sequence", message));
        }
        Ok(())
    }

    /// Appends a token, for which the oldest fall out where there is no room: all others move then, so
    /// that everything is computed again.
    fn append(&mut self, sequence: usize, token: u32, slide: bool) -> Result<()> {
        let room = self.options.room;
        if self.sequences[sequence].len() == room {
            let oldest = if slide { room.div_ceil(4) } else { 1 };
            self.sequences[sequence].drain(..oldest);
            on_device!(&mut self.on_device, on => on.rewind(sequence, 0));
        }
        self.push(sequence, &[token])
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, sequences, options, .. } = self;
        f.debug_struct("Decoder")
            .field("model", model)
            .field("sequences", sequences)
            .field("options", options)
            .finish_non_exhaustive()
    }
}

/// What computes in a precision, without quantization.
fn recipe_in(precision: Precision) -> Recipe {
    match precision {
        Precision::F32 => Recipe::fp32(),
        Precision::Bf16 => Recipe::bf16(),
    }
}

fn check_tokens(source_name: &str, tokens: &[u32], vocab_size: usize) -> Result<()> {
    match tokens.iter().position(|token| *token as usize >= vocab_size) {
        Some(offset) => Err(Error::TokenRange {
            source_name: source_name.into(),
            offset: offset as u64,
            token: tokens[offset].into(),
            vocab_size,
        }),
        None => Ok(()),
    }
}

fn check_logits(out: &[f32], config: &ModelConfig) -> Result<()> {
    let vocab_size = config.vocab_size;
    if out.len() != vocab_size {
        let message = format!("expected room for {vocab_size} numbers, got {}", out.len());
        return Err(Error::invalid("logits", message));
    }
    Ok(())
}
