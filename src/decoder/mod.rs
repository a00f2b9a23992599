//! Text from a model: what comes next, token by token.
//!
//! Keys and values of a sequence are kept, so that a token takes one row of products.

mod cached;
mod recomputing;
mod sampler;

use std::fmt;

pub use crate::backend::DecoderWeights;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::{Device, on_device};
use crate::gpt::ModelConfig;
use crate::model::Model;
use crate::reserve::{push, reserve};
use crate::{Error, Result};
use cached::Cached;
pub use sampler::GenerateOptions;
use sampler::Sampler;

const TOKENS: &str = "the tokens of a text";

impl Model {
    /// Samples a continuation of `prompt`. `on_token` sees each token as it is drawn, and returns
    /// whether to go on; a token of `stop_tokens` is the last. Once prompt and continuation exceed
    /// the context, the oldest tokens fall out, one by one or with `slide` many at once.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an empty prompt or an option out of range,
    /// [`Error::TokenRange`], [`Error::NotFinite`] if the model's logits are.
    pub fn generate(
        &self,
        prompt: &[u32],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Vec<u32>> {
        let config = self.config();
        options.validate(config.vocab_size)?;
        self.check_prompt(prompt)?;
        let total = prompt.len().saturating_add(options.max_tokens);
        let longest = total.min(config.context_length);
        let mut decoder = Decoder::new(self, longest, options.weights)?;
        let mut sampler = Sampler::new(options, config.vocab_size)?;
        prompt.iter().for_each(|token| sampler.note(*token));
        // What is further back than the context is never looked at.
        decoder.push(&prompt[prompt.len().saturating_sub(longest)..])?;
        let mut tokens = Vec::new();
        for drawn in 0..options.max_tokens {
            decoder.logits(&mut sampler.logits)?;
            let token = sampler.choose(drawn as u32)?;
            sampler.note(token);
            push(&mut tokens, TOKENS, token)?;
            if !on_token(token) || options.stop_tokens.contains(&token) {
                break;
            }
            if decoder.len() == longest {
                decoder.drop_first(if options.slide { longest.div_ceil(4) } else { 1 });
            }
            decoder.push(&[token])?;
        }
        Ok(tokens)
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

    fn check_prompt(&self, prompt: &[u32]) -> Result<()> {
        let vocab_size = self.config().vocab_size;
        if prompt.is_empty() {
            let message = "expected at least one token to continue from, got none";
            return Err(Error::invalid("prompt", message));
        }
        check_tokens("the prompt", prompt, vocab_size)
    }
}

/// A text that grows: tokens in, the logits of what comes next out.
///
/// In f32 logits are those of [`Model::next_logits`] of all its tokens: on a processor bit for bit; a
/// GPU sums products of few rows in an order of its own. In any numbers they are the same bits however
/// the tokens came. A decoder follows its model: where weights have been changed, by a trainer or by
/// [`Model::write_tensor`], the next logits are those of the new ones.
pub struct Decoder {
    on_device: Device<Cached<Cpu>, Cached<Cuda>>,
    model: Model,
    tokens: Vec<u32>,
    room: usize,
}

impl Decoder {
    /// An empty text of `model`, with room for `room` tokens; its memory is allocated here (on a GPU
    /// again where a trainer changes what weights are kept as). That is keys and values, 8 bytes a
    /// channel, block and token (on a GPU 4 beside weights in less than f32), and a copy of the linear
    /// layers' weights, in less than f32 of the head's, too; a GPU makes a copy in MXFP4 alone. The
    /// copy is made with the first logits, and again with the first after the weights may have been
    /// changed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless `room` is from 1 to the model's context,
    /// [`Error::Unsupported`] for what the device cannot do, [`Error::OutOfMemory`].
    pub fn new(model: &Model, room: usize, weights: DecoderWeights) -> Result<Self> {
        let context = model.config().context_length;
        if !(1..=context).contains(&room) {
            let message = format!("expected from 1 to {context} tokens, the context; got {room}");
            return Err(Error::invalid("room", message));
        }
        let on_device = match model.on_device() {
            Device::Cpu(on) => Device::Cpu(Cached::new(model, on, room, weights)?),
            Device::Cuda(on) => Device::Cuda(Cached::new(model, on, room, weights)?),
        };
        let mut tokens = Vec::new();
        reserve(&mut tokens, TOKENS, room)?;
        Ok(Self { on_device, model: model.clone(), tokens, room })
    }

    /// Appends tokens. They are computed when logits are asked for.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where they are more than there is room for and
    /// [`Error::TokenRange`]; the text is then as before.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        let vocab_size = self.model.config().vocab_size;
        let left = self.room - self.tokens.len();
        if tokens.len() > left {
            let message = format!(
                "expected at most {left}, for which there is room; got {}; rewind, or make a decoder \
                 with more room",
                tokens.len()
            );
            return Err(Error::invalid("tokens", message));
        }
        check_tokens("pushed tokens", tokens, vocab_size)?;
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }

    /// Writes the logits (V) of the token after the last one.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an empty text or if `out` has another length, and what the
    /// device says.
    pub fn logits(&mut self, out: &mut [f32]) -> Result<()> {
        let Self { on_device, model, tokens, .. } = self;
        if tokens.is_empty() {
            let message = "expected at least one token before logits are asked for, got none";
            return Err(Error::invalid("tokens", message));
        }
        check_logits(out, model.config())?;
        on_device!(on_device, on => on.next_logits(model, tokens, out))
    }

    /// Takes the tokens from number `len` on out again; without memory of them, others can follow.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there are fewer.
    pub fn rewind(&mut self, len: usize) -> Result<()> {
        let count = self.tokens.len();
        if len > count {
            let message = format!("expected at most {count}, the tokens that there are; got {len}");
            return Err(Error::invalid("len", message));
        }
        self.tokens.truncate(len);
        on_device!(&mut self.on_device, on => on.rewind(len));
        Ok(())
    }

    /// The text so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of its tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens that it has room for in all.
    pub fn room(&self) -> usize {
        self.room
    }

    /// Takes the oldest tokens out: all others move, so that everything is computed again.
    fn drop_first(&mut self, count: usize) {
        self.tokens.drain(..count);
        on_device!(&mut self.on_device, on => on.rewind(0));
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, tokens, room, .. } = self;
        f.debug_struct("Decoder")
            .field("model", model)
            .field("tokens", tokens)
            .field("room", room)
            .finish_non_exhaustive()
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
