//! Threads of ours are guests: the host's signal handlers do not run on them, and what the library
//! writes sends the host no signal.

use std::mem::MaybeUninit;

/// Runs `start` with signals blocked on this thread, which threads that it starts inherit: handlers
/// of the host then run on the host's threads, never on a worker's stack.
pub(crate) fn signals_blocked<R>(start: impl FnOnce() -> R) -> R {
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
    let mut blocked = MaybeUninit::uninit();
    // SAFETY: sigfillset fills the set before others use it.
    let blocked = unsafe {
        libc::sigfillset(blocked.as_mut_ptr());
        for fault in FAULTS {
            libc::sigdelset(blocked.as_mut_ptr(), fault);
        }
        blocked.assume_init()
    };
    let _restore = block(&blocked);
    start()
}

/// Runs `write`, which writes files on this thread. A write beyond the limit of a file's size
/// (`ulimit -f`) is an error then, EFBIG; the signal that the system sends with it, SIGXFSZ, would
/// end the process.
pub(crate) fn file_limit_is_an_error<R>(write: impl FnOnce() -> R) -> R {
    /// Takes the signal back, before the mask is the host's again.
    struct Take(libc::sigset_t);
    impl Drop for Take {
        fn drop(&mut self) {
            if !is_pending(libc::SIGXFSZ) {
                return;
            }
            // SAFETY: the set is whole. Should the signal be gone, nothing is waited for.
            #[cfg(target_os = "linux")]
            unsafe {
                let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
                libc::sigtimedwait(&self.0, std::ptr::null_mut(), &now);
            }
            // SAFETY: the set is whole; the signal was sent to this thread, so it is there.
            #[cfg(not(target_os = "linux"))]
            unsafe {
                libc::sigwait(&self.0, &mut 0);
            }
        }
    }

    let mut limit = MaybeUninit::uninit();
    // SAFETY: sigemptyset fills the set before others use it.
    let limit = unsafe {
        libc::sigemptyset(limit.as_mut_ptr());
        libc::sigaddset(limit.as_mut_ptr(), libc::SIGXFSZ);
        limit.assume_init()
    };
    // One that waits already is the host's, and stays.
    let from_host = is_pending(libc::SIGXFSZ);
    let _restore = block(&limit);
    let _take = (!from_host).then(|| Take(limit));
    write()
}

/// Whether this thread has a signal that waits to be unblocked.
fn is_pending(signal: libc::c_int) -> bool {
    let mut pending = MaybeUninit::uninit();
    // SAFETY: sigpending fills the set before it is asked.
    unsafe {
        libc::sigpending(pending.as_mut_ptr()) == 0
            && libc::sigismember(pending.as_ptr(), signal) == 1
    }
}

/// Blocks signals on this thread, until the result is dropped.
fn block(signals: &libc::sigset_t) -> Restore {
    let mut before = MaybeUninit::uninit();
    // SAFETY: the set is whole; pthread_sigmask fills `before`, and the mask is the calling
    // thread's own.
    unsafe {
        libc::pthread_sigmask(libc::SIG_BLOCK, signals, before.as_mut_ptr());
        Restore(before.assume_init())
    }
}

/// The mask of this thread from before.
struct Restore(libc::sigset_t);

impl Drop for Restore {
    fn drop(&mut self) {
        // SAFETY: the set is the one that the system gave.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use rustix::process::{Resource, getrlimit, setrlimit};

    use super::*;

    /// In a process of its own, whose limit is lowered.
    #[test]
    fn a_write_beyond_the_limit_of_a_file_is_an_error() {
        const ALONE: &str = "MXT_TEST_FILE_LIMIT";
        if std::env::var_os(ALONE).is_none() {
            let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
            alone.args([
                "--exact",
                "signals::tests::a_write_beyond_the_limit_of_a_file_is_an_error",
            ]);
            let output = alone.arg("--nocapture").env(ALONE, "1").output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && text.contains("alone"), "{output:?}");
            return;
        }
        println!("alone");
        let mut file: File = tempfile::tempfile().unwrap();
        let mut limit = getrlimit(Resource::Fsize);
        limit.current = Some(4096);
        setrlimit(Resource::Fsize, limit).unwrap();
        for _ in 0..2 {
            let written = file_limit_is_an_error(|| file.write_all(&[1; 8192]));
            assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::EFBIG));
            assert!(!is_pending(libc::SIGXFSZ));
        }
        // The host's own signal is left to it, and so is its mask.
        let mut host = MaybeUninit::uninit();
        // SAFETY: sigemptyset fills the set; a signal that this thread blocks waits.
        let _restore = unsafe {
            libc::sigemptyset(host.as_mut_ptr());
            libc::sigaddset(host.as_mut_ptr(), libc::SIGXFSZ);
            let restore = block(host.assume_init_ref());
            libc::raise(libc::SIGXFSZ);
            restore
        };
        assert!(file_limit_is_an_error(|| file.write_all(&[1; 8192])).is_err());
        assert!(is_pending(libc::SIGXFSZ));
        // Unblocked, it would end this process.
        std::process::exit(0);
    }
}
