//! Sampling from a model.

use std::ffi::c_void;

use super::handle::Handle;
use super::model::mxt_model;
use super::status::mxt_status_code::MXT_ERROR_BUFFER_TOO_SMALL;
use super::status::{Failure, mxt_status};
use super::structs::{self, Options, read_or_default, versioned};
use super::{arguments, buffers, float_mode, guard};
use crate::{DecoderWeights, Draft, GenerateOptions, Generated};

/// Receives each token as it is sampled. Returns 0 to go on; any other number ends the text with
/// this token.
///
/// Runs on the thread that called mxt_model_generate or mxt_decoder_generate. It must not throw or
/// longjmp, and of the first call's model, its trainer and its decoders' logits, of the second's decoder
/// and its model's trainer, calls return MXT_ERROR_BUSY.
pub type mxt_token_fn =
    Option<unsafe extern "C-unwind" fn(user_data: *mut c_void, token: u32) -> i32>;

/// What a model's linear layers and its head are computed in where it writes text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_decoder_weights {
    /// f32; on a GPU bf16 where a trainer keeps the weights with master=split.
    F32 = 0,
    /// bf16, with sums in f32.
    Bf16 = 1,
    /// MXFP4, 4.25 bits a weight; what they are multiplied with is in bf16 on a GPU, and on a
    /// processor in 8 bits.
    Mxfp4 = 2,
}

/// Who guesses the next tokens, for the model to check several at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_draft {
    /// Nobody: a token takes a pass of its own.
    None = 0,
    /// The text: what followed its last three, two or one tokens where they stood before. Gains where
    /// a text repeats itself, as code does.
    Ngram = 1,
    /// The model with its weights in MXFP4, a copy that takes 4.25 bits a weight more. On a GPU for
    /// weights in bf16.
    Mxfp4 = 2,
    /// The same, which the text guesses for.
    Mxfp4Ngram = 3,
}

/// How tokens are sampled. Fill it with mxt_generate_options_init.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct mxt_generate_options {
    /// Set by mxt_generate_options_init.
    pub struct_size: usize,
    /// Most tokens to generate. Default 256.
    pub max_tokens: usize,
    /// Keeps the k most likely tokens. 0 (default) keeps all.
    pub top_k: usize,
    /// Seed of the draws: the same seed gives the same text. Default 1337.
    pub seed: u64,
    /// Divides the logits: lower is more certain; 0 always takes the most likely token.
    /// Default 0.8.
    pub temperature: f32,
    /// Keeps the most likely tokens whose probabilities add up to p. 1 (default) keeps all.
    pub top_p: f32,
    /// Receives each token as it is sampled, or NULL (default).
    pub on_token: mxt_token_fn,
    /// Passed to on_token.
    pub user_data: *mut c_void,
    /// Tokens that end the text, such as the one that stands between documents. The one that was
    /// sampled is the last of the new tokens, and on_token receives it. NULL (default) is none.
    /// Borrowed for the call.
    pub stop_tokens: *const u32,
    /// Number of stop_tokens. Default 0.
    pub stop_token_count: usize,
    /// Keeps the tokens that are at least this part as likely as the most likely one. 0 (default)
    /// keeps all.
    pub min_p: f32,
    /// Divides the logits above 0 of tokens that the text has, prompt included, and multiplies those
    /// below: above 1 the text repeats itself less. 1 (default) changes nothing.
    pub repetition_penalty: f32,
    /// One of mxt_decoder_weights. Default MXT_DECODER_WEIGHTS_F32. Not looked at by
    /// mxt_decoder_generate.
    pub weights: i32,
    /// 1 where a quarter of the context falls out of a text that exceeds it at once, so that all is
    /// computed again only then; 0 (default) where a token falls out for each that comes, every one of
    /// which takes the whole computation.
    pub slide: i32,
    /// One of mxt_draft: who guesses the next tokens, for several to be checked in one pass. The text
    /// is the same whoever does. Default MXT_DRAFT_NONE.
    pub draft: i32,
    /// Tokens that are guessed at a time, up to 15; 0 (default) is as many as gain most.
    pub draft_tokens: u32,
    /// Receives the number of tokens that were guessed, or NULL (default).
    pub drafted: *mut u64,
    /// Receives how many of them the model chose, too, or NULL (default).
    pub accepted: *mut u64,
}
versioned!(
    mxt_generate_options,
    last = user_data: *mut c_void,
    then stop_tokens: *const u32,
    then stop_token_count: usize,
    then slide: i32,
    then accepted: *mut u64
);

impl Options for mxt_generate_options {
    fn defaults() -> Self {
        let options = GenerateOptions::default();
        Self {
            struct_size: size_of::<Self>(),
            max_tokens: options.max_tokens,
            top_k: options.top_k,
            seed: options.seed,
            temperature: options.temperature,
            top_p: options.top_p,
            on_token: None,
            user_data: std::ptr::null_mut(),
            stop_tokens: std::ptr::null(),
            stop_token_count: 0,
            min_p: options.min_p,
            repetition_penalty: options.repetition_penalty,
            weights: mxt_decoder_weights::F32 as i32,
            slide: options.slide.into(),
            draft: mxt_draft::None as i32,
            draft_tokens: options.draft_tokens as u32,
            drafted: std::ptr::null_mut(),
            accepted: std::ptr::null_mut(),
        }
    }
}

pub(super) fn weights(value: i32) -> Result<DecoderWeights, Failure> {
    use mxt_decoder_weights as C;
    let all = [
        (C::F32 as i32, "MXT_DECODER_WEIGHTS_F32", DecoderWeights::F32),
        (C::Bf16 as i32, "MXT_DECODER_WEIGHTS_BF16", DecoderWeights::Bf16),
        (C::Mxfp4 as i32, "MXT_DECODER_WEIGHTS_MXFP4", DecoderWeights::Mxfp4),
    ];
    arguments::one_of("weights", value, &all)
}

fn draft(value: i32) -> Result<Draft, Failure> {
    use mxt_draft as C;
    let all = [
        (C::None as i32, "MXT_DRAFT_NONE", Draft::None),
        (C::Ngram as i32, "MXT_DRAFT_NGRAM", Draft::Ngram),
        (C::Mxfp4 as i32, "MXT_DRAFT_MXFP4", Draft::Mxfp4),
        (C::Mxfp4Ngram as i32, "MXT_DRAFT_MXFP4_NGRAM", Draft::Mxfp4Ngram),
    ];
    arguments::one_of("draft", value, &all)
}

/// Fills `options` with the defaults. `struct_size` is sizeof(mxt_generate_options) as the caller's
/// compiler sees it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_generate_options_init(
    options: *mut mxt_generate_options,
    struct_size: usize,
) -> mxt_status {
    // SAFETY: the caller's struct has `struct_size` bytes.
    guard::function("mxt_generate_options_init", || unsafe { structs::init(options, struct_size) })
}

/// Samples a continuation of the `prompt_count` tokens of `prompt`, at least one. The new tokens
/// (without the prompt) go to `tokens`, their number to `*written`.
///
/// `options` may be NULL for the defaults. `capacity` is the number of tokens that `tokens` has
/// room for, at least max_tokens of the options; with `tokens` NULL and `capacity` 0 the new tokens
/// go to on_token only.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_BUFFER_TOO_SMALL,
/// MXT_ERROR_INVALID_ARGUMENT (an empty prompt, a negative temperature, a stop token outside the
/// vocabulary and the like),
/// MXT_ERROR_TOKEN_RANGE, MXT_ERROR_NOT_FINITE, MXT_ERROR_UNSUPPORTED (what the device cannot do),
/// MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_generate(
    model: *mut mxt_model,
    options: *const mxt_generate_options,
    prompt: *const u32,
    prompt_count: usize,
    tokens: *mut u32,
    capacity: usize,
    written: *mut usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_generate", model, |model| {
            let prompt = arguments::copied("prompt", prompt, prompt_count)?;
            with(options, (tokens, capacity, written), |options, on_token| {
                let _exclusive = model.state().access().write()?;
                Ok(model.model.generate(&prompt, options, on_token)?)
            })
        })
    }
}

/// A host's options, and what they are here.
///
/// # Safety
/// The pointer is NULL or valid, as the header asks.
pub(super) unsafe fn options_of(
    options: *const mxt_generate_options,
) -> Result<(mxt_generate_options, GenerateOptions), Failure> {
    // SAFETY: as promised by the caller.
    let (options, stop_tokens) = unsafe {
        let options = read_or_default("options", options)?;
        let stop_tokens =
            arguments::copied("stop_tokens", options.stop_tokens, options.stop_token_count)?;
        (options, stop_tokens)
    };
    let how = GenerateOptions {
        max_tokens: options.max_tokens,
        temperature: options.temperature,
        top_k: options.top_k,
        top_p: options.top_p,
        min_p: options.min_p,
        repetition_penalty: options.repetition_penalty,
        seed: options.seed,
        stop_tokens,
        weights: weights(options.weights)?,
        draft: draft(options.draft)?,
        draft_tokens: options.draft_tokens as usize,
        slide: arguments::flag("slide", options.slide)?,
    };
    Ok((options, how))
}

/// Calls `generate` with a host's options and callback, and hands out what it returns: `capacity`
/// tokens to `tokens`, and their number to `written`.
///
/// # Safety
/// Pointers are NULL or valid, as the header asks.
pub(super) unsafe fn with(
    options: *const mxt_generate_options,
    (tokens, capacity, written): (*mut u32, usize, *mut usize),
    generate: impl FnOnce(&GenerateOptions, &mut dyn FnMut(u32) -> bool) -> Result<Generated, Failure>,
) -> Result<(), Failure> {
    // SAFETY: as promised by the caller.
    unsafe {
        let out = arguments::place("written", written)?;
        let (options, how) = options_of(options)?;
        let stream_only = tokens.is_null() && capacity == 0;
        if !stream_only && capacity < options.max_tokens {
            let message = format!(
                "tokens: expected room for {} tokens (max_tokens of the options), got {capacity}",
                options.max_tokens
            );
            return Err(Failure::new(MXT_ERROR_BUFFER_TOO_SMALL, message));
        }
        if !stream_only {
            arguments::check("tokens", tokens, capacity)?;
        }
        for (name, to) in [("drafted", options.drafted), ("accepted", options.accepted)] {
            if !to.is_null() {
                arguments::check(name, to, 1)?;
            }
        }
        let Generated { tokens: all, drafted, accepted } = generate(&how, &mut |token| {
            options.on_token.is_none_or(|on_token| {
                float_mode::in_hosts(|| on_token(options.user_data, token)) == 0
            })
        })?;
        if !stream_only {
            // NOTE: no slice is made of `tokens`: a host may pass one buffer for the prompt and
            // for the tokens.
            std::ptr::copy_nonoverlapping(all.as_ptr(), tokens, all.len());
        }
        for (to, count) in [(options.drafted, drafted), (options.accepted, accepted)] {
            if !to.is_null() {
                to.write(count);
            }
        }
        out.put(all.len());
        Ok(())
    }
}

/// Computes the logits of the token after the `token_count` tokens of `tokens`, at least one, in
/// f32. Of more tokens than the context holds, the last ones count. `logits` has room for `count`
/// numbers, which must be the model's vocab_size. Both arrays may lie in memory of the engine's
/// GPU.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no token, another count),
/// MXT_ERROR_TOKEN_RANGE, MXT_ERROR_UNSUPPORTED (what the device cannot do),
/// MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_next_logits(
    model: *const mxt_model,
    tokens: *const u32,
    token_count: usize,
    logits: *mut f32,
    count: usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_next_logits", model, |model| {
            let _reading = model.state().access().read()?;
            let engine = model.model.engine();
            buffers::read(engine, "tokens", tokens, token_count, |tokens| {
                buffers::fill(engine, "logits", logits, count, |logits| {
                    Ok(model.model.next_logits(tokens, logits)?)
                })
            })
        })
    }
}

/// Writes the log-probability of every token of `text_count` texts, after those before it in its own
/// text; that of the first, before which there is none, as 0, so that those of a text add up to that of
/// all the rest. Their negative mean is the loss. Nothing but the model is needed, and nothing is kept.
///
/// `tokens` are those of all texts, one behind the other, `token_count` in all, and `lengths` how many
/// each has: 0 up to the model's context_length. Arrays may be NULL where they have no elements.
/// `log_probabilities` has room for token_count numbers. On a processor they are those of each text
/// alone, bit for bit. `hidden` is NULL, or has room for token_count times the model's channels: what
/// the norm behind the last block puts out at every token, (tokens, channels), from which the head
/// makes logits. `weights` is MXT_DECODER_WEIGHTS_F32, on a GPU slow, or MXT_DECODER_WEIGHTS_BF16, which
/// a processor computes as the former. Arrays may lie in memory of the engine's GPU, but for `lengths`.
/// In a group of ranks the call is a rank's own.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (lengths that do not add up to token_count, a
/// text beyond the context, other weights), MXT_ERROR_TOKEN_RANGE, MXT_ERROR_UNSUPPORTED (what the
/// device cannot do), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_score(
    model: *const mxt_model,
    weights: i32,
    tokens: *const u32,
    token_count: usize,
    lengths: *const usize,
    text_count: usize,
    log_probabilities: *mut f32,
    hidden: *mut f32,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_score", model, |model| {
            use mxt_decoder_weights as C;
            let all = [
                (C::F32 as i32, "MXT_DECODER_WEIGHTS_F32", DecoderWeights::F32),
                (C::Bf16 as i32, "MXT_DECODER_WEIGHTS_BF16", DecoderWeights::Bf16),
            ];
            let weights = arguments::one_of("weights", weights, &all)?;
            let _reading = model.state().access().read()?;
            let (engine, of) = (model.model.engine(), &model.model);
            let channels = of.config().channels;
            buffers::read(engine, "tokens", tokens, token_count, |tokens| {
                buffers::read(engine, "lengths", lengths, text_count, |lengths| {
                    let name = "log_probabilities";
                    buffers::fill(engine, name, log_probabilities, token_count, |found| {
                        if hidden.is_null() {
                            return Ok(of.score(weights, tokens, lengths, found, None)?);
                        }
                        let count = token_count.saturating_mul(channels);
                        buffers::fill(engine, "hidden", hidden, count, |hidden| {
                            Ok(of.score(weights, tokens, lengths, found, Some(hidden))?)
                        })
                    })
                })
            })
        })
    }
}
