//! What a trainer watches for whoever asks: what updates do to tensors, and how weights change.

use std::ffi::c_char;

use super::status::{Failure, mxt_status};
use super::structs::{Out, versioned};
use super::trainer::mxt_trainer;
use super::{arguments, guard};
use crate::{WeightChange, WeightMetrics};

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

/// How weights changed over a window of steps, and what they are rounded to in the forward pass.
/// Set struct_size to sizeof(mxt_weight_metrics) before the call that fills it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_weight_metrics {
    /// sizeof(mxt_weight_metrics), set by the caller.
    pub struct_size: usize,
    /// The last step of the window.
    pub step: u64,
    /// Steps of the window.
    pub steps: u64,
    /// Mean over the steps of |W - W before| / |W before|, Frobenius norms.
    pub change: f64,
    /// The same of the rounded weights.
    pub rounded_change: f64,
    /// Mean over the steps of the share of weights whose codes changed, 0 to 1.
    pub flipped: f64,
    /// Mean over the weights, after the last step, of their distance from the nearest threshold at
    /// which their code changes, over the largest such distance of any weight with that code.
    pub confidence: f64,
    /// Share of weights whose rounded numbers moved more than 16 times as far as themselves, in the
    /// whole window.
    pub oscillating: f64,
    /// Share of weights above the largest number of their blocks, after the last step.
    pub clipped: f64,
    /// The largest magnitude of a weight after the last step.
    pub amax: f32,
    /// Number of tensors that this is of: 1, or all that are watched.
    pub tensors: u32,
}
versioned!(mxt_weight_metrics, last = tensors: u32);

impl mxt_weight_metrics {
    fn new(found: &WeightMetrics, change: &WeightChange, tensors: usize) -> Self {
        let WeightChange {
            change,
            rounded_change,
            flipped,
            confidence,
            oscillating,
            clipped,
            amax,
        } = *change;
        Self {
            struct_size: size_of::<Self>(),
            step: found.step,
            steps: found.steps,
            change,
            rounded_change,
            flipped,
            confidence,
            oscillating,
            clipped,
            amax,
            tensors: tensors as u32,
        }
    }
}

/// Watches the updates of the steps that `every` divides, from here on, those of mxt_trainer_run
/// too: the stats of such a step have update_rms_max and update_rms_tensor, and
/// mxt_trainer_tensor_update has what each tensor's update was. 0 ends it, and a new watch forgets
/// what the one before has found. A step that is watched reads gradients and second moments once
/// more. It changes nothing of the run, bit for bit, and is not saved with it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_OUT_OF_MEMORY (the watch before stays), MXT_ERROR_BUSY,
/// MXT_ERROR_INVALID_ARGUMENT in a group with shard_states.
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

/// Watches how the weights of blocks change, and what they are rounded to in the forward pass, over
/// windows of `every` steps from here on, those of mxt_trainer_run too: mxt_trainer_weight_metrics
/// has what each window has shown. 0 ends it; so does any call, also one that fails, of the watch
/// before. It takes 12 bytes a weight and 8 for each element of the largest. It changes nothing of
/// the run, bit for bit, and is not saved with it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a recipe whose forward pass holds no weights
/// in blocks of MXFP4 or NVFP4, unrotated, as "tetrajet" does; an optimizer with "master=split"),
/// MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_watch_weights(
    trainer: *mut mxt_trainer,
    every: u64,
) -> mxt_status {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe {
        guard::method("mxt_trainer_watch_weights", trainer, |trainer| {
            trainer.exclusive(|trainer| Ok(trainer.watch_weights(every)?))
        })
    }
}

/// Stores what the last whole window of steps (mxt_trainer_watch_weights) has shown in `*metrics`,
/// whose struct_size the caller has set: of the tensor of this name or, where `tensor` is NULL, of
/// all that are watched. `tensor` is borrowed for the call.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR,
/// MXT_ERROR_INVALID_ARGUMENT (no window is whole yet, or the tensor is none of those that are
/// watched), MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_weight_metrics(
    trainer: *mut mxt_trainer,
    tensor: *const c_char,
    metrics: *mut mxt_weight_metrics,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_weight_metrics", trainer, |trainer| {
            let out = Out::required("metrics", metrics)?;
            let tensor = match tensor.is_null() {
                true => None,
                false => Some(arguments::text("tensor", tensor)?),
            };
            out.put(trainer.exclusive(|trainer| {
                if let Some(name) = &tensor {
                    trainer.model().number_of(name)?;
                }
                let found = trainer.weight_metrics().ok_or_else(|| {
                    let message = "no window of steps is whole yet; call mxt_trainer_watch_weights, \
                                   then do the steps of a window";
                    Failure::invalid("trainer", message)
                })?;
                Ok(match &tensor {
                    None => mxt_weight_metrics::new(found, &found.all, found.tensors.len()),
                    Some(name) => mxt_weight_metrics::new(found, change_of(found, name)?, 1),
                })
            })?);
            Ok(())
        })
    }
}

/// What was found of a tensor of the model.
fn change_of<'a>(found: &'a WeightMetrics, name: &str) -> Result<&'a WeightChange, Failure> {
    let of = found.tensors.iter().find(|(watched, _)| watched == name);
    let (_, change) = of.ok_or_else(|| {
        let watched = &found.tensors;
        let example = watched.first().map_or("", |(name, _)| name);
        let message = format!(
            "expected one of the {} that are watched, such as {example:?}, which the forward pass \
             holds in blocks of MXFP4 or NVFP4, unrotated; got {name:?}",
            watched.len()
        );
        Failure::invalid("tensor", message)
    })?;
    Ok(change)
}
