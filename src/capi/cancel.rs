//! Cancellation of the calling thread (`pthread_cancel`), which waits while a call is inside.
//!
//! A thread that is cancelled unwinds from wherever it waits or writes, which in our own frames
//! would leave locks held and work half done. So it is held off at the boundary and takes effect
//! where the host's next cancellation point is. The host's callbacks run inside of calls, and
//! nothing may unwind through those either.

/// Holds cancellation off for as long as it lives.
pub(super) struct Held {
    #[cfg(target_os = "linux")]
    before: libc::c_int,
}

#[cfg(target_os = "linux")]
mod system {
    /// In glibc and musl.
    pub(super) const PTHREAD_CANCEL_DISABLE: libc::c_int = 1;

    // NOTE: with asynchronous cancellation a pending one unwinds from the call that allows it
    // again.
    unsafe extern "C-unwind" {
        pub(super) fn pthread_setcancelstate(
            state: libc::c_int,
            before: *mut libc::c_int,
        ) -> libc::c_int;
    }
}

/// Holds cancellation off until the result is dropped. Calls may nest.
#[cfg(target_os = "linux")]
pub(super) fn hold() -> Held {
    let mut before = 0;
    // SAFETY: stores one number. It fails for no valid state.
    unsafe { system::pthread_setcancelstate(system::PTHREAD_CANCEL_DISABLE, &mut before) };
    Held { before }
}

#[cfg(target_os = "linux")]
impl Drop for Held {
    fn drop(&mut self) {
        let mut ours = 0;
        // SAFETY: as above, with the state that was there before.
        unsafe { system::pthread_setcancelstate(self.before, &mut ours) };
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn hold() -> Held {
    Held {}
}
