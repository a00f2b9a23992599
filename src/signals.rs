//! Threads of ours are guests: the host's signal handlers do not run on them.

/// Runs `start` with signals blocked on this thread, which threads that it starts inherit: handlers
/// of the host then run on the host's threads, never on a worker's stack.
pub(crate) fn signals_blocked<R>(start: impl FnOnce() -> R) -> R {
    use std::mem::MaybeUninit;

    // A fault must reach the handler of the thread that made it: while blocked, it kills.
    const FAULTS: [libc::c_int; 7] = [
        libc::SIGABRT,
        libc::SIGBUS,
        libc::SIGFPE,
        libc::SIGILL,
        libc::SIGSEGV,
        libc::SIGSYS,
        libc::SIGTRAP,
    ];
    struct Restore(libc::sigset_t);
    impl Drop for Restore {
        fn drop(&mut self) {
            // SAFETY: the set is the one that the system gave.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
        }
    }

    let mut blocked = MaybeUninit::uninit();
    let mut before = MaybeUninit::uninit();
    // SAFETY: sigfillset fills the set before others use it; pthread_sigmask fills `before`. The
    // mask is the calling thread's own.
    let _restore = unsafe {
        libc::sigfillset(blocked.as_mut_ptr());
        for fault in FAULTS {
            libc::sigdelset(blocked.as_mut_ptr(), fault);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, blocked.as_ptr(), before.as_mut_ptr());
        Restore(before.assume_init())
    };
    start()
}
