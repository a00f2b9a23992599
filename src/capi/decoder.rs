//! `mxt_decoder`: tokens in, logits out, for hosts that choose tokens themselves.

use std::ffi::c_char;
use std::sync::{Mutex, MutexGuard};

use super::generate::{self, mxt_decoder_weights, mxt_generate_options, weights};
use super::handle::{Handle, State, refused};
use super::message::Slot;
use super::model::mxt_model;
use super::status::mxt_status_code::MXT_ERROR_BUFFER_TOO_SMALL;
use super::status::{Failure, mxt_status};
use super::structs::{self, Options, read_or_default, versioned};
use super::{arguments, buffers, guard};
use crate::{Decoder, DecoderOptions, Engine};

/// What a decoder is made for. Fill it with mxt_decoder_options_init.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_decoder_options {
    /// Set by mxt_decoder_options_init.
    pub struct_size: usize,
    /// Texts beside each other, numbered from 0, up to 65536. Default 1.
    pub sequences: usize,
    /// Most tokens of each. 0 (default) is the model's context.
    pub room: usize,
    /// One of mxt_decoder_weights. Default MXT_DECODER_WEIGHTS_F32.
    pub weights: i32,
    /// 1 keeps the weights in MXFP4, too, for drafts of mxt_decoder_generate; on a GPU beside weights in
    /// bf16 alone, and not beside weights that are in MXFP4 themselves. Default 0.
    pub drafts: i32,
}
versioned!(mxt_decoder_options, last = drafts: i32);

impl Options for mxt_decoder_options {
    fn defaults() -> Self {
        let DecoderOptions { sequences, room, drafts, .. } = DecoderOptions::default();
        let weights = mxt_decoder_weights::F32 as i32;
        Self { struct_size: size_of::<Self>(), sequences, room, weights, drafts: drafts.into() }
    }
}

/// Texts of a model that grow: tokens in, the logits of what comes next out, of which keys and values
/// are kept, so that a token takes one row. A call needs the decoder for itself, and for logits the
/// model as one that reads it; several decoders of one model may run at once. It follows its model:
/// where weights have been changed, the next logits are those of the new ones. Make with
/// mxt_decoder_new, free with mxt_decoder_free.
pub struct mxt_decoder {
    state: State,
    decoder: Mutex<Decoder>,
    engine: Engine,
}

impl mxt_decoder {
    fn exclusive(&self) -> Result<MutexGuard<'_, Decoder>, Failure> {
        self.decoder.try_lock().map_err(refused)
    }
}

impl Handle for mxt_decoder {
    const SLOT: Slot = Slot::Decoder;
    const NAME: &'static str = "decoder";

    fn state(&self) -> &State {
        &self.state
    }
}

/// Fills `options` with the defaults. `struct_size` is sizeof(mxt_decoder_options) as the caller's
/// compiler sees it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_decoder_options_init(
    options: *mut mxt_decoder_options,
    struct_size: usize,
) -> mxt_status {
    // SAFETY: the caller's struct has `struct_size` bytes.
    guard::function("mxt_decoder_options_init", || unsafe { structs::init(options, struct_size) })
}

/// Makes a decoder of empty texts of `model` and stores it in `*decoder` for the caller to free. Its
/// memory is allocated here: keys and values, 8 bytes a channel, block and token of room (4 where a GPU
/// computes in bf16), a copy of the linear layers' weights, in less than f32 of the head's, too (on a
/// GPU in MXFP4 alone), one more in MXFP4 with drafts, and what a pass of some hundred tokens takes. On a GPU the driver takes besides
/// what a recorded pass of each text does, and where a trainer changes what weights are kept as, all may
/// be allocated again. `options` may be NULL for the defaults. The handle `model` stays the caller's,
/// and may be freed first.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (names the option),
/// MXT_ERROR_UNSUPPORTED (what the device cannot do), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY. The
/// message is in mxt_last_error and on the model.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_decoder_new(
    model: *const mxt_model,
    options: *const mxt_decoder_options,
    decoder: *mut *mut mxt_decoder,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::child("mxt_decoder_new", model, |model| {
            let out = arguments::place("decoder", decoder)?;
            let options = read_or_default("options", options)?;
            let mxt_decoder_options { sequences, room, .. } = options;
            let (weights, drafts) =
                (weights(options.weights)?, arguments::flag("drafts", options.drafts)?);
            let options = DecoderOptions { sequences, room, weights, drafts };
            let made = {
                let _reading = model.state().access().read()?;
                Decoder::new(&model.model, options)?
            };
            let state = State::sharing(model.state().access());
            let engine = model.model.engine().clone();
            out.put(mxt_decoder { state, decoder: Mutex::new(made), engine }.into_raw());
            Ok(())
        })
    }
}

/// Appends the `count` tokens of `tokens` to text `sequence`. They are computed when logits are asked
/// for. `tokens` may lie in memory of the engine's GPU.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence, more tokens than there is
/// room for), MXT_ERROR_TOKEN_RANGE, MXT_ERROR_BUSY; the text is then as before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_decoder_push(
    decoder: *mut mxt_decoder,
    sequence: usize,
    tokens: *const u32,
    count: usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_decoder_push", decoder, |decoder| {
            let mut texts = decoder.exclusive()?;
            buffers::read(&decoder.engine, "tokens", tokens, count, |tokens| {
                Ok(texts.push(sequence, tokens)?)
            })
        })
    }
}

/// Computes the logits of the token after the last one of text `sequence`, which has at least one.
/// `logits` has room for `count` numbers, which must be the model's vocab_size, and may lie in memory
/// of the engine's GPU.
///
/// In f32 they are those of mxt_model_next_logits of all tokens of the text: on a processor bit for
/// bit. In any numbers they are the same bits however the tokens came.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence, no token, another count),
/// MXT_ERROR_OUT_OF_MEMORY (on a GPU, where a trainer has changed what weights are kept as),
/// MXT_ERROR_BUSY (also while the model is being trained).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_decoder_logits(
    decoder: *mut mxt_decoder,
    sequence: usize,
    logits: *mut f32,
    count: usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_decoder_logits", decoder, |decoder| {
            let _reading = decoder.state().access().read()?;
            let mut texts = decoder.exclusive()?;
            buffers::fill(&decoder.engine, "logits", logits, count, |logits| {
                Ok(texts.logits(sequence, logits)?)
            })
        })
    }
}

/// Computes the logits of what comes after each token of text `sequence` from number `from` on, as
/// mxt_decoder_logits has them after each: what it takes to score a text, or to check tokens that were
/// guessed. With n such tokens, `logits` has room for `count` numbers, which must be n times the
/// model's vocab_size, and may lie in memory of the engine's GPU. All n are computed together, again if
/// they were before.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence or token, another count),
/// MXT_ERROR_OUT_OF_MEMORY (on a GPU, where a trainer has changed what weights are kept as),
/// MXT_ERROR_BUSY (also while the model is being trained).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_decoder_logits_from(
    decoder: *mut mxt_decoder,
    sequence: usize,
    from: usize,
    logits: *mut f32,
    count: usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_decoder_logits_from", decoder, |decoder| {
            let _reading = decoder.state().access().read()?;
            let mut texts = decoder.exclusive()?;
            buffers::fill(&decoder.engine, "logits", logits, count, |logits| {
                Ok(texts.logits_from(sequence, from, logits)?)
            })
        })
    }
}

/// Computes the logits of the tokens after the last ones of the `sequence_count` different texts of
/// `sequences`, those of mxt_decoder_logits of each. The last tokens of 32 texts at a time share a look
/// at the weights; what is missing before them is computed text by text. `logits` has room for `count` numbers, which must be sequence_count times the model's vocab_size, and may lie in
/// memory of the engine's GPU.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence, one that comes twice or has no
/// token, another count), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY (also while the model is being
/// trained).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_decoder_logits_of(
    decoder: *mut mxt_decoder,
    sequences: *const usize,
    sequence_count: usize,
    logits: *mut f32,
    count: usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_decoder_logits_of", decoder, |decoder| {
            let sequences = arguments::copied("sequences", sequences, sequence_count)?;
            let _reading = decoder.state().access().read()?;
            let mut texts = decoder.exclusive()?;
            buffers::fill(&decoder.engine, "logits", logits, count, |logits| {
                Ok(texts.logits_of(&sequences, logits)?)
            })
        })
    }
}

/// mxt_decoder_generate of `sequence_count` different texts at once, which read the weights together.
/// The first has the seed of the options, each other one the next; so each is what it would be alone.
/// New tokens of text number i of `sequences` are written to `tokens` from number i * `capacity` on,
/// where there is room for `capacity` of each, at least max_tokens; their number to number i of
/// `written`.
///
/// Errors: those of mxt_decoder_generate and mxt_decoder_logits_of; MXT_ERROR_INVALID_ARGUMENT also for
/// a draft and for on_token, which would not know whose token it is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_decoder_generate_each(
    decoder: *mut mxt_decoder,
    sequences: *const usize,
    sequence_count: usize,
    options: *const mxt_generate_options,
    tokens: *mut u32,
    capacity: usize,
    written: *mut usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_decoder_generate_each", decoder, |decoder| {
            let sequences = arguments::copied("sequences", sequences, sequence_count)?;
            let (options, how) = generate::options_of(options)?;
            if options.on_token.is_some() {
                let message = "expected NULL, for it would not know whose token it is";
                return Err(Failure::invalid("on_token", message));
            }
            let room = capacity.saturating_mul(sequence_count);
            if room > 0 {
                arguments::check("tokens", tokens, room)?;
            }
            if sequence_count > 0 {
                arguments::check("written", written, sequence_count)?;
            }
            for (name, to) in [("drafted", options.drafted), ("accepted", options.accepted)] {
                if !to.is_null() {
                    arguments::check(name, to, 1)?;
                }
            }
            if sequence_count > 0 && capacity < how.max_tokens {
                let most = how.max_tokens;
                let message = format!(
                    "tokens: expected room for {most} tokens of each (max_tokens of the options), got \
                     {capacity}"
                );
                return Err(Failure::new(MXT_ERROR_BUFFER_TOO_SMALL, message));
            }
            let texts = {
                let _reading = decoder.state().access().read()?;
                decoder.exclusive()?.generate_each(&sequences, &how, &mut |_, _| true)?
            };
            for (n, text) in texts.iter().enumerate() {
                std::ptr::copy_nonoverlapping(text.as_ptr(), tokens.add(n * capacity), text.len());
                written.add(n).write(text.len());
            }
            for to in [options.drafted, options.accepted] {
                if !to.is_null() {
                    to.write(0);
                }
            }
            Ok(())
        })
    }
}

/// Samples a continuation of text `sequence`, which has at least one token, and appends it to the text;
/// where there is no more room, the oldest tokens fall out. The new tokens are written to `tokens`,
/// which has room for `capacity` of them, at least max_tokens; their number to `*written`. With
/// `tokens` NULL and `capacity` 0 they are only given to on_token. `options` may be NULL for the
/// defaults; its weights are not looked at, for the decoder has its own. Draws are numbered from 0 in
/// every call, so a text that is continued again wants another seed.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (no such sequence, no
/// token, an option out of range, a draft in MXFP4 without drafts in the decoder's options),
/// MXT_ERROR_BUFFER_TOO_SMALL, MXT_ERROR_NOT_FINITE (the logits), MXT_ERROR_OUT_OF_MEMORY,
/// MXT_ERROR_BUSY. After MXT_ERROR_NOT_FINITE and MXT_ERROR_OUT_OF_MEMORY the text may have new tokens
/// (mxt_decoder_tokens).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_decoder_generate(
    decoder: *mut mxt_decoder,
    sequence: usize,
    options: *const mxt_generate_options,
    tokens: *mut u32,
    capacity: usize,
    written: *mut usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_decoder_generate", decoder, |decoder| {
            generate::with(options, (tokens, capacity, written), |options, on_token| {
                let _reading = decoder.state().access().read()?;
                Ok(decoder.exclusive()?.generate(sequence, options, on_token)?)
            })
        })
    }
}

/// Takes the tokens of text `sequence` from number `len` on out again; others can follow. 0 empties
/// it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence, one with fewer tokens),
/// MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_decoder_rewind(
    decoder: *mut mxt_decoder,
    sequence: usize,
    len: usize,
) -> mxt_status {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe {
        guard::method("mxt_decoder_rewind", decoder, |decoder| {
            Ok(decoder.exclusive()?.rewind(sequence, len)?)
        })
    }
}

/// Makes text `to` that of sequence `from`, with what is computed of it, so that both can go on in
/// their own ways.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence), MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_decoder_fork(
    decoder: *mut mxt_decoder,
    from: usize,
    to: usize,
) -> mxt_status {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe {
        guard::method("mxt_decoder_fork", decoder, |decoder| {
            Ok(decoder.exclusive()?.fork(from, to)?)
        })
    }
}

/// Copies the tokens of text `sequence` into `tokens`, which has room for `capacity` of them, and
/// stores their number in `*written`. With `tokens` NULL and `capacity` 0 their number alone.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no such sequence), MXT_ERROR_BUFFER_TOO_SMALL,
/// MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_decoder_tokens(
    decoder: *mut mxt_decoder,
    sequence: usize,
    tokens: *mut u32,
    capacity: usize,
    written: *mut usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_decoder_tokens", decoder, |decoder| {
            let out = arguments::place("written", written)?;
            let texts = decoder.exclusive()?;
            let text = texts.text(sequence)?;
            let is_wanted = !(tokens.is_null() && capacity == 0);
            if is_wanted && capacity < text.len() {
                let message =
                    format!("tokens: expected room for {} tokens, got {capacity}", text.len());
                return Err(Failure::new(MXT_ERROR_BUFFER_TOO_SMALL, message));
            }
            if is_wanted {
                arguments::check("tokens", tokens, capacity)?;
                std::ptr::copy_nonoverlapping(text.as_ptr(), tokens, text.len());
            }
            out.put(text.len());
            Ok(())
        })
    }
}

/// The message of the last call with this handle that failed, on whichever thread; the empty string
/// when there is none.
///
/// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
/// call of mxt_decoder_last_error. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_decoder_last_error(decoder: *const mxt_decoder) -> *const c_char {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::last_error("mxt_decoder_last_error", decoder) }
}

/// Gives the handle up; NULL does nothing. Its memory goes with it, and the model stays.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_decoder_free(decoder: *mut mxt_decoder) {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::free("mxt_decoder_free", decoder) }
}
