//! What a trainer watches for whoever asks: what updates do to tensors.

use std::ffi::c_char;

use super::status::{Failure, mxt_status};
use super::structs::{Out, versioned};
use super::trainer::mxt_trainer;
use super::{arguments, guard};

/// What an update did to a tensor. Set struct_size to sizeof(mxt_tensor_update) before the call
/// that fills it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_tensor_update {
    /// sizeof(mxt_tensor_update), set by the caller.
    pub struct_size: usize,
    /// The step that made it, from 1 on.
    pub step: u64,
    /// Norm of the tensor's gradient, before clipping and normalization.
    pub grad_norm: f32,
    /// How far the gradient is beyond what the second moment has seen coming: root of the mean of
    /// g^2 / max(u, epsilon^2) over the tensor's numbers, where g is the gradient that the moments
    /// take in and u the corrected second moment after that. 1 while gradients stay as they were,
    /// and never above 1 / sqrt(1 - beta2); 2.3 and above in the first layers comes before most
    /// spikes of the loss (arXiv 2304.13013). NaN of a tensor that has no second moment, as the
    /// matrices of "muon".
    pub rms: f32,
}
versioned!(mxt_tensor_update, last = rms: f32);

/// Watches the updates of the steps that `every` divides, from here on, those of mxt_trainer_run
/// too: the stats of such a step have update_rms_max and update_rms_tensor, and
/// mxt_trainer_tensor_update has what each tensor's update was. 0 ends it, and a new watch forgets
/// what the one before has found. A step that is watched reads gradients and second moments once
/// more. It changes nothing of the run, bit for bit, and is not saved with it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_OUT_OF_MEMORY (the watch before stays), MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_watch_updates(
    trainer: *mut mxt_trainer,
    every: u64,
) -> mxt_status {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe {
        guard::method("mxt_trainer_watch_updates", trainer, |trainer| {
            trainer.exclusive(|trainer| Ok(trainer.watch_updates(every)?))
        })
    }
}

/// Stores what the last update that was watched (mxt_trainer_watch_updates) did to the tensor of
/// this name in `*update`, whose struct_size the caller has set. `tensor` is borrowed for the call.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR,
/// MXT_ERROR_INVALID_ARGUMENT (no update was watched yet), MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_tensor_update(
    trainer: *mut mxt_trainer,
    tensor: *const c_char,
    update: *mut mxt_tensor_update,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_tensor_update", trainer, |trainer| {
            let out = Out::required("update", update)?;
            let tensor = arguments::text("tensor", tensor)?;
            out.put(trainer.exclusive(|trainer| {
                let number = trainer.model().number_of(&tensor)?;
                let found = trainer.update_metrics().ok_or_else(|| {
                    let message = "no update was watched yet; call mxt_trainer_watch_updates, then \
                                   do a step that it watches";
                    Failure::invalid("trainer", message)
                })?;
                let (_, of) = &found.tensors[number];
                Ok(mxt_tensor_update {
                    struct_size: size_of::<mxt_tensor_update>(),
                    step: found.step,
                    grad_norm: of.grad_norm,
                    rms: of.rms,
                })
            })?);
            Ok(())
        })
    }
}
