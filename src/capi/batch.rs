//! A step in parts: `mxt_batch`, its loss, what is done with gradients, and the update.

use std::cell::Cell;
use std::ffi::{c_char, c_void};

use bytemuck::Pod;

use super::status::mxt_status_code::{MXT_ERROR_NULL, MXT_STOPPED};
use super::status::{Failure, mxt_status};
use super::structs::{self, Options, Out, read, versioned};
use super::trainer::mxt_trainer;
use super::trainer_structs::{mxt_eval_stats, mxt_step_stats};
use super::{arguments, buffers, float_mode, guard};
use crate::trainer::Given;
use crate::{Engine, Error, HostLoss, IGNORED, LogitRows, Trainer};

/// In place of a target: the position is no part of the loss, as -100 is in PyTorch.
pub const MXT_IGNORED: u32 = 0xffff_ffff;
const _: () = assert!(MXT_IGNORED == IGNORED);

/// Some rows of a batch on their way through a loss of the host's. Position t of sequence b is row
/// b * sequence_length + t.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_logits {
    /// sizeof(mxt_logits), set by the library.
    pub struct_size: usize,
    /// (rows, vocab_size), row-major, in the host's memory: logits, to be replaced by the gradient of
    /// each row's loss in them. Weights and divisor are not in it: the library multiplies.
    pub logits: *mut f32,
    /// (rows): the loss of each row, NaN before, to be written.
    pub losses: *mut f32,
    /// The number of the first row.
    pub first_row: u64,
    /// How many there are.
    pub rows: u64,
    /// Logits of a row.
    pub vocab_size: u64,
}
versioned!(mxt_logits, last = vocab_size: u64);

/// Makes losses of logits, and their gradients, for some rows of a batch: all rows come, in their
/// order, each once, some 32 MiB of logits at a time, or 64 rows where these take more. What is
/// written for rows whose target is ignored, or whose weight is 0, does not count. All that `rows`
/// points to is borrowed for the call.
///
/// Returns 0 to go on; any other number ends mxt_trainer_forward_backward with MXT_STOPPED. A number
/// that it writes and that is not finite shows at mxt_trainer_update, as MXT_ERROR_NOT_FINITE.
///
/// Runs on the thread that called mxt_trainer_forward_backward. Calls on that trainer and its model
/// return MXT_ERROR_BUSY. It must not throw or longjmp.
pub type mxt_loss_fn =
    Option<unsafe extern "C-unwind" fn(user_data: *mut c_void, rows: *const mxt_logits) -> i32>;

/// What a trainer learns from in one go: batch_size sequences of sequence_length positions, as the
/// trainer's options have them. Fill it with mxt_batch_init. Arrays have a number for each position,
/// sequence after sequence; they are borrowed for the call, and may lie in memory of the engine's GPU,
/// written before the call or on the engine's stream.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_batch {
    /// Set by mxt_batch_init.
    pub struct_size: usize,
    /// Numbers in each array: batch_size * sequence_length.
    pub count: usize,
    /// What the model reads.
    pub tokens: *const u32,
    /// What it is to predict at each position, or MXT_IGNORED. The next token, for a language model.
    /// May be NULL with `loss`, which is of all positions then.
    pub targets: *const u32,
    /// A factor of each position's loss: 0 for what is not to be learned, as a prompt or padding.
    /// NULL (default) is 1 for each.
    pub weights: *const f32,
    /// What the sum of weighted losses is divided by, together with the divisors of the step's other
    /// batches. 0 (default) is the sum of the weights of targets that are not ignored, so that the
    /// step's loss is the mean over what counts. Weights that may be below 0, as advantages are, need
    /// another one, such as `count`.
    pub divisor: f64,
    /// Where the loss of each position is written, without its weight, 0 where the target is ignored;
    /// or NULL (default).
    pub losses: *mut f32,
    /// In place of cross-entropy, or NULL (default).
    pub loss: mxt_loss_fn,
    /// Passed to `loss`.
    pub user_data: *mut c_void,
    /// The number of the document that each token is of. Where it changes along a sequence another
    /// document begins: attention looks at no document but a token's own, and positions are counted
    /// from where it begins, so that each has the logits that it has alone. What is predicted across
    /// an end counts unless its target is ignored or its weight is 0. Not with a token_drop or a
    /// recipe with "haste". The first batch with more than one document in a sequence allocates 8
    /// bytes a token. NULL (default) takes document_end of the trainer's options or, without it,
    /// each sequence as one document.
    pub documents: *const u32,
}
versioned!(mxt_batch, last = user_data: *mut c_void, then documents: *const u32);

impl Options for mxt_batch {
    fn defaults() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            count: 0,
            tokens: std::ptr::null(),
            targets: std::ptr::null(),
            weights: std::ptr::null(),
            divisor: 0.0,
            losses: std::ptr::null_mut(),
            loss: None,
            user_data: std::ptr::null_mut(),
            documents: std::ptr::null(),
        }
    }
}

/// Fills `batch` with the defaults. `struct_size` is sizeof(mxt_batch) as the caller's header has it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_batch_init(batch: *mut mxt_batch, struct_size: usize) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::function("mxt_batch_init", || unsafe { structs::init(batch, struct_size) })
}

/// Computes the gradients of a batch, and adds them to those of the batches since the last update:
/// of the sum of all weighted losses over the sum of divisors. mxt_trainer_update makes the step of
/// them. Where `accumulation` such batches have no weights but 1, that step has the bits of
/// mxt_trainer_step_tokens; any other number of batches is as good, but where the trainer has
/// lanes, or is in a group of ranks, of which each gives its accumulation / ranks; or keeps
/// gradients in bf16, which take one.
///
/// It is not collective. mxt_trainer_step and its like return MXT_ERROR_INVALID_ARGUMENT while batches
/// wait for an update; evaluating and saving go on, and a checkpoint does not have them.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (another `count`; more
/// batches than a step has; gradients that were written or scaled; an optimizer with "ramping";
/// documents with a token_drop or "haste"),
/// MXT_ERROR_TOKEN_RANGE, MXT_ERROR_NOT_FINITE (a weight), MXT_ERROR_BUSY: the batches before still
/// wait then. MXT_STOPPED (`loss` returned another number than 0): none of them does any more, and
/// the step begins anew.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_forward_backward(
    trainer: *mut mxt_trainer,
    batch: *const mxt_batch,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_forward_backward", trainer, |trainer| {
            with_batch(trainer, batch, |trainer, given, loss, losses| {
                trainer.forward_backward_given(given, loss, losses)
            })
        })
    }
}

/// Computes the loss of a batch, without gradients, and stores it in `*stats` (struct_size set by
/// the caller): the sum of its weighted losses over its divisor; the tokens are the targets whose
/// weight is not 0. Like mxt_trainer_eval it changes nothing of the run, batches that wait for an
/// update included, and a loss that is NaN or infinite is a result, not an error. What a `loss` of
/// the batch writes for gradients is dropped. It is not collective.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (another `count`; a
/// divisor that is not above 0, as where every target is ignored), MXT_ERROR_TOKEN_RANGE,
/// MXT_ERROR_NOT_FINITE (a weight), MXT_STOPPED (`loss` returned another number than 0),
/// MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_forward(
    trainer: *mut mxt_trainer,
    batch: *const mxt_batch,
    stats: *mut mxt_eval_stats,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_forward", trainer, |trainer| {
            let out = Out::required("stats", stats)?;
            let stats = with_batch(trainer, batch, |trainer, given, loss, losses| {
                trainer.forward_given(given, loss, losses)
            })?;
            out.put(stats.into());
            Ok(())
        })
    }
}

/// What is done with a batch: its numbers, its loss, and where the losses of positions go.
type Work<R> =
    fn(&mut Trainer, &Given<'_>, Option<&mut HostLoss<'_>>, Option<&mut [f32]>) -> crate::Result<R>;

/// # Safety
/// `batch` and its pointers are NULL or valid, as the header asks.
unsafe fn with_batch<R>(
    trainer: &mxt_trainer,
    batch: *const mxt_batch,
    work: Work<R>,
) -> Result<R, Failure> {
    // SAFETY: as promised by the caller.
    unsafe {
        let batch = read("batch", batch)?;
        if batch.targets.is_null() && batch.loss.is_none() {
            let message = "targets is NULL; pass what each position is to predict, or a loss";
            return Err(Failure::new(MXT_ERROR_NULL, message));
        }
        if batch.losses.is_null() {
            return with_losses(trainer, &batch, None, work);
        }
        buffers::fill(trainer.engine(), "losses", batch.losses, batch.count, |losses| {
            with_losses(trainer, &batch, Some(losses), work)
        })
    }
}

/// # Safety
/// The pointers of `batch` are NULL or valid, as the header asks.
unsafe fn with_losses<R>(
    trainer: &mxt_trainer,
    batch: &mxt_batch,
    losses: Option<&mut [f32]>,
    work: Work<R>,
) -> Result<R, Failure> {
    let engine = trainer.engine();
    let mxt_batch { count, tokens, targets, weights, divisor, loss, user_data, documents, .. } =
        *batch;
    // What the host wants instead of going on.
    let code = Cell::new(0);
    let mut call = |rows: LogitRows<'_>| {
        let LogitRows { first, logits, losses } = rows;
        let of_rows = mxt_logits {
            struct_size: size_of::<mxt_logits>(),
            vocab_size: (logits.len() / losses.len().max(1)) as u64,
            logits: logits.as_mut_ptr(),
            losses: losses.as_mut_ptr(),
            first_row: first as u64,
            rows: losses.len() as u64,
        };
        let Some(loss) = loss else { return Ok(()) };
        // SAFETY: the header asks for a function that takes user data and such rows.
        code.set(float_mode::in_hosts(|| unsafe { loss(user_data, &of_rows) }));
        if code.get() == 0 { Ok(()) } else { Err(Error::Stopped) }
    };
    let mut of_host = loss.is_some().then_some(&mut call);
    // SAFETY: as promised by the caller.
    let done = unsafe {
        buffers::read_in_parts(engine, "tokens", tokens, count, |tokens| {
            optional(engine, "targets", targets, count, |targets| {
                optional(engine, "documents", documents, count, |documents| {
                    optional(engine, "weights", weights, count, |weights| {
                        trainer.exclusive(|trainer| {
                            trainer.check_len("count", count, trainer.rows())?;
                            let tokens = |to: &mut [u32]| tokens(0, to);
                            let targets = targets.map(|copy| move |to: &mut [u32]| copy(0, to));
                            let documents = documents.map(|copy| move |to: &mut [u32]| copy(0, to));
                            let weights = weights.map(|copy| move |to: &mut [f32]| copy(0, to));
                            let given = Given {
                                tokens: &tokens,
                                targets: targets.as_ref().map(|copy| copy as _),
                                documents: documents.as_ref().map(|copy| copy as _),
                                weights: weights.as_ref().map(|copy| copy as _),
                                divisor: Some(divisor).filter(|divisor| *divisor != 0.0),
                            };
                            let loss = of_host.as_mut().map(|call| &mut **call as _);
                            Ok(work(trainer, &given, loss, losses)?)
                        })
                    })
                })
            })
        })
    };
    match code.get() {
        0 => done,
        code => Err(Failure::new(MXT_STOPPED, format!("the loss callback returned {code}"))),
    }
}

/// [`buffers::read_in_parts`] of an array that may be NULL.
///
/// # Safety
/// As there.
unsafe fn optional<T: Pod + Default, R>(
    engine: &Engine,
    what: &'static str,
    data: *const T,
    count: usize,
    body: impl FnOnce(Option<&dyn Fn(usize, &mut [T])>) -> Result<R, Failure>,
) -> Result<R, Failure> {
    if data.is_null() {
        return body(None);
    }
    // SAFETY: as promised by the caller.
    unsafe { buffers::read_in_parts(engine, what, data, count, |copy| body(Some(copy))) }
}

/// One optimizer step by the gradients of all batches since the last one
/// (mxt_trainer_forward_backward) and stores what it did in `*stats` (struct_size set by the
/// caller; NULL if not wanted): clips, and moves the weights. Collective in a group of ranks.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (no batch waits, or
/// too few with lanes; or the divisors of all of them are not above 0 together, as where every
/// target is ignored, or beyond 1e-20 or 1e20 a position), MXT_ERROR_NOT_FINITE, MXT_ERROR_BUSY.
/// Weights and moments are then as before. Batches still wait where there are too few, here or on
/// another rank, and where ranks ask for different things; after any other error none does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_update(
    trainer: *mut mxt_trainer,
    stats: *mut mxt_step_stats,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_update", trainer, |trainer| {
            let out = Out::optional("stats", stats)?;
            out.put(trainer.exclusive(|trainer| {
                let stats = trainer.update()?;
                Ok(mxt_step_stats::new(stats, trainer))
            })?);
            Ok(())
        })
    }
}

/// Drops the gradients that wait for an update; the next batch begins a step anew.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_zero_gradients(trainer: *mut mxt_trainer) -> mxt_status {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe {
        guard::method("mxt_trainer_zero_gradients", trainer, |trainer| {
            trainer.exclusive(|trainer| {
                trainer.zero_gradients();
                Ok(())
            })
        })
    }
}

/// Multiplies the gradient that waits for an update by `factor`, of the tensor of this name or, where
/// `tensor` is NULL, of all. No batch can be added then. `tensor` is borrowed for the call.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT (a
/// factor that is not finite; no gradient waits), MXT_ERROR_UNSUPPORTED (with lanes, or in a group),
/// MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_scale_gradients(
    trainer: *mut mxt_trainer,
    tensor: *const c_char,
    factor: f32,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_scale_gradients", trainer, |trainer| {
            let tensor = match tensor.is_null() {
                true => None,
                false => Some(arguments::text("tensor", tensor)?),
            };
            trainer.exclusive(|trainer| Ok(trainer.scale_gradients(tensor.as_deref(), factor)?))
        })
    }
}

/// Stores 1 in `*is_trained` where a tensor is trained, so that it has a gradient, and 0 where it is
/// frozen or beside adapters.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_is_trained(
    trainer: *mut mxt_trainer,
    tensor: *const c_char,
    is_trained: *mut i32,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_is_trained", trainer, |trainer| {
            let out = arguments::place("is_trained", is_trained)?;
            let tensor = arguments::text("tensor", tensor)?;
            out.put(trainer.exclusive(|trainer| Ok(trainer.is_trained(&tensor)?))?.into());
            Ok(())
        })
    }
}

/// Copies the gradient of a tensor to `values`, which has room for `count` numbers, in the shape
/// that mxt_model_tensor_info gives: of the last step, before clipping; or, where batches wait for
/// an update, of their loss so far (of this rank, and of its last lane). Gradients that were
/// dropped, by mxt_trainer_zero_gradients or an error, are not read. `values` may lie on the
/// engine's GPU.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT
/// (another count; dropped gradients; the divisors of the batches are not above 0 together),
/// MXT_ERROR_UNSUPPORTED (a tensor of which another rank has the gradient), MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_read_gradient(
    trainer: *mut mxt_trainer,
    tensor: *const c_char,
    values: *mut f32,
    count: usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_read_gradient", trainer, |trainer| {
            let tensor = arguments::text("tensor", tensor)?;
            buffers::fill(trainer.engine(), "values", values, count, |values| {
                trainer.exclusive(|trainer| Ok(trainer.read_gradient(&tensor, values)?))
            })
        })
    }
}

/// Overwrites the gradient of a tensor that waits for an update, in the shape that
/// mxt_model_tensor_info gives; mxt_trainer_read_gradient then reads the same. Where none waits,
/// those of all other tensors are 0: a host may bring all gradients itself. No batch can be added
/// then. `values` may lie on the engine's GPU.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT (as
/// for mxt_trainer_read_gradient), MXT_ERROR_NOT_FINITE, MXT_ERROR_UNSUPPORTED (with lanes, or in a
/// group), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_write_gradient(
    trainer: *mut mxt_trainer,
    tensor: *const c_char,
    values: *const f32,
    count: usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_write_gradient", trainer, |trainer| {
            let tensor = arguments::text("tensor", tensor)?;
            buffers::read(trainer.engine(), "values", values, count, |values| {
                trainer.exclusive(|trainer| Ok(trainer.write_gradient(&tensor, values)?))
            })
        })
    }
}
