//! `mxt_snapshot`: what a save of a trainer would write, on the host, for another thread to save.

use std::ffi::c_char;
use std::sync::{Mutex, MutexGuard};

use super::handle::{Handle, State, keep, refused};
use super::message::Slot;
use super::status::mxt_status_code::MXT_ERROR_DEVICE;
use super::status::{Failure, mxt_status};
use super::trainer::mxt_trainer;
use super::{arguments, guard};
use crate::Snapshot;

/// A copy in the host's memory of all that mxt_trainer_save would write, which a thread of the host
/// saves while training goes on: weights in f32, and what the optimizer and the recipe keep, in the
/// bytes that they take on the device. It shares nothing with its trainer but the model, which stays
/// alive with it, so that calls on either do not meet. Make with mxt_trainer_snapshot, free with
/// mxt_snapshot_free.
pub struct mxt_snapshot {
    state: State,
    /// None behind a renewal that failed.
    copy: Mutex<Option<Snapshot>>,
}

impl mxt_snapshot {
    fn exclusive(&self) -> Result<MutexGuard<'_, Option<Snapshot>>, Failure> {
        self.copy.try_lock().map_err(refused)
    }

    /// Runs `body` with what it holds.
    pub(super) fn copy<R>(
        &self,
        body: impl FnOnce(&Snapshot) -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        let copy = self.exclusive()?;
        let Some(copy) = &*copy else {
            let message = "holds nothing, for mxt_snapshot_renew failed; call that again";
            return Err(Failure::invalid("snapshot", message));
        };
        body(copy)
    }
}

impl Handle for mxt_snapshot {
    const SLOT: Slot = Slot::Snapshot;
    const NAME: &'static str = "snapshot";

    fn state(&self) -> &State {
        &self.state
    }
}

/// Copies all that mxt_trainer_save would write to the host, and stores the copy in `*snapshot` for the
/// caller to free. It takes as much memory as the two tensor files of a checkpoint together. The
/// trainer may be freed before it. Not collective, but with shard_states of mxt_group: then all ranks
/// make it, and that of rank 0 has all that there is to save.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_OUT_OF_MEMORY (also where the host has less memory free),
/// MXT_ERROR_DEVICE, MXT_ERROR_BUSY, MXT_ERROR_MISMATCH, MXT_ERROR_PEER. The message is in mxt_last_error and on the
/// trainer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_snapshot(
    trainer: *mut mxt_trainer,
    snapshot: *mut *mut mxt_snapshot,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::child("mxt_trainer_snapshot", trainer.cast_const(), |trainer| {
            let out = arguments::place("snapshot", snapshot)?;
            let copy = copy_of(trainer, None)?;
            out.put(mxt_snapshot { state: State::new(), copy: Mutex::new(Some(copy)) }.into_raw());
            Ok(())
        })
    }
}

/// Copies `trainer` as it is now into a snapshot that was made before, of this trainer or another, in
/// place of what it held: its memory is used again, which is faster than new memory, and kept where
/// less is needed.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_OUT_OF_MEMORY, after which the snapshot may hold nothing,
/// MXT_ERROR_DEVICE, after which neither can be used, MXT_ERROR_BUSY (another call is inside one of
/// them: the snapshot is then as it was). Where it is collective (mxt_group's shard_states),
/// MXT_ERROR_MISMATCH and MXT_ERROR_PEER, after which it is as it was, unless a rank is lost while
/// others bring what they have: then it holds nothing. The message is in mxt_last_error and on the snapshot.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_snapshot_renew(
    snapshot: *mut mxt_snapshot,
    trainer: *mut mxt_trainer,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_snapshot_renew", snapshot, |snapshot| {
            let trainer = keep(trainer.cast_const()).ok_or_else(|| Failure::null("trainer"))?;
            if let Some(refusal) = trainer.state().refusal() {
                return Err(refusal);
            }
            let mut copy = snapshot.exclusive()?;
            *copy = Some(copy_of(&trainer, Some(&mut copy))?);
            Ok(())
        })
    }
}

/// A snapshot of the trainer in the memory of `earlier`, which is taken once the trainer is free.
fn copy_of(
    trainer: &mxt_trainer,
    earlier: Option<&mut Option<Snapshot>>,
) -> Result<Snapshot, Failure> {
    let copied = trainer.exclusive(|trainer| {
        trainer.agree_on_snapshot()?;
        let earlier = earlier.and_then(Option::take);
        Ok(trainer.snapshot_in(earlier)?)
    });
    copied.inspect_err(|failure| {
        // What a failed GPU holds is not known any more.
        if failure.status == MXT_ERROR_DEVICE {
            trainer.state().access().poison();
        }
    })
}

/// Saves what the trainer was to the folder `dir`, as mxt_trainer_save would have done then. Any thread
/// may call it, also while the trainer is in a step.
///
/// Errors: those of mxt_trainer_save; MXT_ERROR_INVALID_ARGUMENT behind a mxt_snapshot_renew that
/// failed, and where another rank than 0 has only a part (mxt_group's shard_states).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_snapshot_save(
    snapshot: *mut mxt_snapshot,
    dir: *const c_char,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_snapshot_save", snapshot, |snapshot| {
            let dir = arguments::path("dir", dir)?;
            snapshot.copy(|copy| Ok(copy.save(&dir)?))
        })
    }
}

/// The message of the last call with this handle that failed, on whichever thread; the empty string
/// when there is none.
///
/// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
/// call of mxt_snapshot_last_error. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_snapshot_last_error(snapshot: *const mxt_snapshot) -> *const c_char {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::last_error("mxt_snapshot_last_error", snapshot) }
}

/// Gives the handle up, and its memory; NULL does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_snapshot_free(snapshot: *mut mxt_snapshot) {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::free("mxt_snapshot_free", snapshot) }
}
