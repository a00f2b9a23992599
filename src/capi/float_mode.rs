//! The floating-point mode of the calling thread: the library's own inside a call, the host's
//! outside.
//!
//! A host may flush denormals to zero, round upwards or unmask exceptions; games and audio programs
//! do. Results must not depend on it, so every call computes in the mode that Rust expects: to
//! nearest, with denormals, without traps. Worker threads are started inside a call and inherit it.
//! The host's mode and its exception flags come back when the call ends, by return or by a panic,
//! and while one of its callbacks runs.

use std::cell::Cell;

/// Runs `body` in the default mode.
pub(super) fn in_default<R>(body: impl FnOnce() -> R) -> R {
    let host = Mode::current();
    let outer = HOST.replace(host);
    let _back = Restore { mode: host, host: outer };
    Mode::DEFAULT.set();
    body()
}

/// Runs a callback of the host in the mode that the host called the library with.
pub(super) fn in_hosts<R>(callback: impl FnOnce() -> R) -> R {
    let host = HOST.get();
    let _back = Restore { mode: Mode::current(), host };
    host.set();
    callback()
}

thread_local! {
    /// The mode that this thread had when it came into the library.
    static HOST: Cell<Mode> = const { Cell::new(Mode::DEFAULT) };
}

struct Restore {
    mode: Mode,
    host: Mode,
}

impl Drop for Restore {
    fn drop(&mut self) {
        self.mode.set();
        HOST.set(self.host);
    }
}

/// What the processor's control register says: rounding, denormals, traps, and the flags raised.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Mode(u64);

#[cfg(target_arch = "x86_64")]
impl Mode {
    /// MXCSR: all exceptions masked, to nearest, no flags.
    const DEFAULT: Self = Self(0x1f80);

    fn current() -> Self {
        let mut mxcsr = 0_u32;
        // SAFETY: the instruction stores 4 bytes.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr, options(nostack)) };
        Self(mxcsr.into())
    }

    fn set(self) {
        let mxcsr = self.0 as u32;
        // SAFETY: the value is the default or one that the register held, so no reserved bit is
        // set.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mxcsr, options(nostack)) };
    }
}

#[cfg(target_arch = "aarch64")]
impl Mode {
    /// FPCR: no traps, to nearest, no flushing. Its flags are in another register, FPSR.
    const DEFAULT: Self = Self(0);

    fn current() -> Self {
        let mode: u64;
        // SAFETY: the instruction reads a register.
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) mode, options(nostack)) };
        Self(mode)
    }

    fn set(self) {
        // SAFETY: the value is the default or one that the register held.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) self.0, options(nostack)) };
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
impl Mode {
    const DEFAULT: Self = Self(0);

    fn current() -> Self {
        Self::DEFAULT
    }

    fn set(self) {}
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    /// Flush to zero, denormals are zero, round up, with the inexact flag raised.
    const ODD: Mode = Mode(0x1f80 | 1 << 15 | 1 << 6 | 2 << 13 | 1 << 5);

    #[test]
    fn the_hosts_mode_comes_back_after_calls_panics_and_callbacks() {
        let before = Mode::current();
        ODD.set();
        let modes = in_default(|| {
            let inside = Mode::current();
            let callback = in_hosts(|| {
                let in_callback = Mode::current();
                (in_callback, in_default(Mode::current), Mode::current())
            });
            (inside, callback, Mode::current())
        });
        let after = Mode::current();
        let panicked =
            std::panic::catch_unwind(|| in_default(|| std::panic::resume_unwind(Box::new(0))));
        let after_panic = Mode::current();
        before.set();
        assert_eq!(modes, (Mode::DEFAULT, (ODD, Mode::DEFAULT, ODD), Mode::DEFAULT));
        assert_eq!((after, after_panic), (ODD, ODD));
        assert!(panicked.is_err());
    }
}
