//! What every handle has: a reference count, a lock that never waits, a poison flag, an error text,
//! the process that made it.
//!
//! A handle is an `Arc`. The host owns one count, given back by `_free`; a call that is inside the
//! library owns another, so that a callback may free the handle that called it.
//!
//! NOTE: the lock belongs to the data, not to the handle. A trainer changes the weights of its
//! model, so a model, its other handles and its trainers share one [`Access`]: reading a tensor
//! while another thread is inside a step is BUSY, not a data race and not a wait.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

use super::message::{Message, Slot};
use super::status::Failure;
use super::status::mxt_status_code::{MXT_ERROR_BUSY, MXT_ERROR_FORKED, MXT_ERROR_POISONED};

/// An opaque type of the C API.
pub(super) trait Handle: Send + Sync + Sized + 'static {
    /// The thread's buffer for error texts of this kind of handle.
    const SLOT: Slot;
    /// What the host calls it: "engine", "model"...
    const NAME: &'static str;

    fn state(&self) -> &State;

    /// Gives the handle to the host, who owns it until [`free`].
    fn into_raw(self) -> *mut Self {
        Arc::into_raw(Arc::new(self)).cast_mut()
    }
}

/// Takes a reference that holds for a call, or `None` for NULL.
///
/// # Safety
/// `handle` is NULL or comes from [`Handle::into_raw`] and is not freed yet.
pub(super) unsafe fn keep<H: Handle>(handle: *const H) -> Option<Arc<H>> {
    if handle.is_null() {
        return None;
    }
    // SAFETY: the host's count keeps the handle alive while this one is added.
    unsafe {
        Arc::increment_strong_count(handle);
        Some(Arc::from_raw(handle))
    }
}

/// The part of a handle that [`super::guard`] works on.
pub(super) struct State {
    access: Arc<Access>,
    error: Mutex<Message>,
    /// The process that the handle was made in.
    process: u32,
}

impl State {
    /// The state of a handle on data of its own.
    pub(super) fn new() -> Self {
        Self::sharing(&Arc::default())
    }

    /// The state of a handle on data that another handle reaches too.
    pub(super) fn sharing(access: &Arc<Access>) -> Self {
        let process = std::process::id();
        Self { access: access.clone(), error: Mutex::new(Message::EMPTY), process }
    }

    pub(super) fn access(&self) -> &Arc<Access> {
        &self.access
    }

    /// Why no call may use the handle any more, if so.
    pub(super) fn refusal(&self) -> Option<Failure> {
        if self.is_forked() {
            Some(Failure::forked())
        } else if self.access.is_poisoned() {
            Some(Failure::new(MXT_ERROR_POISONED, POISONED))
        } else {
            None
        }
    }

    /// Whether this is a child process of the one that made the handle. There the handle's locks
    /// may be held, for ever, by threads that exist in the parent only.
    pub(super) fn is_forked(&self) -> bool {
        self.process != std::process::id()
    }

    pub(super) fn set_error(&self, message: &Message) {
        if self.is_forked() {
            return;
        }
        // The buffer is whole whatever happened to an earlier holder of its lock.
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = *message;
    }

    pub(super) fn error(&self) -> Message {
        if self.is_forked() {
            return Message::new(FORKED);
        }
        *self.error.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Failure {
    pub(super) fn forked() -> Self {
        Self::new(MXT_ERROR_FORKED, FORKED)
    }
}

/// Who may touch the data behind one or several handles.
#[derive(Default)]
pub(super) struct Access {
    lock: RwLock<()>,
    poisoned: AtomicBool,
    /// How often a call had it for itself.
    changes: AtomicU64,
}

impl Access {
    /// Shared access, for calls with a `const` handle.
    pub(super) fn read(&self) -> Result<RwLockReadGuard<'_, ()>, Failure> {
        self.lock.try_read().map_err(refused)
    }

    /// Exclusive access.
    pub(super) fn write(&self) -> Result<RwLockWriteGuard<'_, ()>, Failure> {
        let guard = self.lock.try_write().map_err(refused)?;
        self.changes.fetch_add(1, Ordering::AcqRel);
        Ok(guard)
    }

    /// A number that grows whenever somebody has exclusive access, and may change the data.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    pub(super) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }
}

pub(super) fn refused<G>(error: TryLockError<G>) -> Failure {
    match error {
        TryLockError::WouldBlock => Failure::new(MXT_ERROR_BUSY, BUSY),
        TryLockError::Poisoned(_) => Failure::new(MXT_ERROR_POISONED, POISONED),
    }
}

pub(super) const BUSY: &str = "another call is inside this object or inside a model or trainer that \
     shares its weights; use them from one thread at a time, and not from a callback of that call";
pub(super) const POISONED: &str = "a panic in an earlier call left this object unusable; free it";

const FORKED: &str = "made before fork() in the parent process, whose threads this process does not \
     have; free it and make what you need anew, or call exec";

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn access_refuses_and_never_waits() {
        let access = Access::default();
        let reading = access.read();
        assert!(reading.is_ok() && access.read().is_ok(), "readers share");
        assert_eq!(access.write().map(drop).map_err(|f| f.status), Err(MXT_ERROR_BUSY));
        drop(reading);
        let writing = access.write();
        assert!(writing.is_ok());
        assert_eq!(access.read().map(drop).map_err(|f| f.status), Err(MXT_ERROR_BUSY));
        assert_eq!(access.write().map(drop).map_err(|f| f.status), Err(MXT_ERROR_BUSY));
    }

    #[test]
    fn a_panic_under_the_lock_poisons_it() {
        let access = Access::default();
        let _ = catch_unwind(AssertUnwindSafe(|| {
            let _held = access.write();
            std::panic::resume_unwind(Box::new("silent"));
        }));
        assert_eq!(access.read().map(drop).map_err(|f| f.status), Err(MXT_ERROR_POISONED));
    }
}
