//! What a host passes for its callbacks, and how it gets it back.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};

use super::float_mode;

/// A host's `user_data` with what gives it back. It is shared by the call that is given it, which may
/// still fail, and by what calls back.
pub(super) struct UserData {
    pub(super) pointer: *mut c_void,
    free: Option<unsafe extern "C-unwind" fn(user_data: *mut c_void)>,
    /// Whether the call succeeded, and with it passed the user data to the library.
    owned: AtomicBool,
}

impl UserData {
    pub(super) fn new(
        pointer: *mut c_void,
        free: Option<unsafe extern "C-unwind" fn(user_data: *mut c_void)>,
    ) -> Self {
        Self { pointer, free, owned: AtomicBool::new(false) }
    }

    /// From here on it is the library's, to be given back when it is dropped.
    pub(super) fn keep(&self) {
        self.owned.store(true, Ordering::Relaxed);
    }
}

// SAFETY: the header asks for callbacks that may run on any thread that uses the engine; the
// pointer is only handed back to them.
unsafe impl Send for UserData {}
// SAFETY: as above.
unsafe impl Sync for UserData {}

impl Drop for UserData {
    fn drop(&mut self) {
        if let Some(free) = self.free.filter(|_| *self.owned.get_mut()) {
            // SAFETY: the header asks for a function that takes this pointer, once.
            float_mode::in_hosts(|| unsafe { free(self.pointer) });
        }
    }
}
