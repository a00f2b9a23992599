//! A thread whose start can fail.
//!
//! NOTE: not `std::thread`, which keeps what it knows of a thread in memory of the system's
//! allocator, past that of the program, and ends the process where there is none.
//!
//! So does glibc where a thread's variable has a destructor. A new thread therefore sees to that
//! first, and says whether there is memory for it.

use std::cell::Cell;
use std::ffi::{CString, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// A thread, to be joined or detached.
#[derive(Debug)]
pub(crate) struct Thread(libc::pthread_t);

// SAFETY: the name of a thread is a number that any thread may use.
unsafe impl Send for Thread {}
// SAFETY: as above.
unsafe impl Sync for Thread {}

impl Thread {
    /// Starts a thread that runs `main` on a stack of `stack` bytes. A panic ends the thread alone.
    pub(crate) fn start(
        name: CString,
        stack: usize,
        main: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        type Main = Box<dyn FnOnce() + Send>;
        extern "C" fn run(main: *mut c_void) -> *mut c_void {
            // SAFETY: `start` gave it to this thread alone.
            let main = unsafe { Box::from_raw(main.cast::<Main>()) };
            main();
            std::ptr::null_mut()
        }
        let answer = Arc::new(Answer::default());
        let told = answer.clone();
        let main: Main = Box::new(move || {
            // For debuggers and lists of threads; at most 15 bytes.
            #[cfg(target_os = "linux")]
            // SAFETY: the thread is this one, the name ends with a zero byte.
            unsafe {
                libc::pthread_setname_np(libc::pthread_self(), name.as_ptr())
            };
            drop(name);
            let has_memory = has_memory();
            told.give(has_memory);
            drop(told);
            if has_memory {
                mark_as_ours();
                let _ = catch_unwind(AssertUnwindSafe(main));
            }
        });
        let main = Box::into_raw(Box::new(main)).cast::<c_void>();
        let (mut thread, mut attributes) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: the attributes are made before they are used, and given back; `run` takes `main`.
        let error = unsafe {
            let mut error = libc::pthread_attr_init(attributes.as_mut_ptr());
            if error == 0 {
                error = libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), stack);
                if error == 0 {
                    error =
                        libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), run, main);
                }
                libc::pthread_attr_destroy(attributes.as_mut_ptr());
            }
            error
        };
        if error != 0 {
            // SAFETY: no thread has it.
            drop(unsafe { Box::from_raw(main.cast::<Main>()) });
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: written, for the thread was made.
        let thread = Self(unsafe { thread.assume_init() });
        if !answer.wait() {
            thread.join();
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(thread)
    }

    /// Waits for its end.
    pub(crate) fn join(self) {
        // SAFETY: it was neither joined nor detached, as `self` is used up by both.
        unsafe { libc::pthread_join(self.0, std::ptr::null_mut()) };
    }

    /// Lets it go on by itself.
    pub(crate) fn detach(self) {
        // SAFETY: as in `join`.
        unsafe { libc::pthread_detach(self.0) };
    }
}

thread_local! {
    static IS_OURS: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread was started by the library, and not by its host. Nothing is allocated, so a
/// panic hook may ask.
pub(crate) fn is_ours() -> bool {
    // A panic may come while the thread's variables are being destroyed.
    IS_OURS.try_with(Cell::get).unwrap_or(false)
}

/// Makes [`is_ours`] true on this thread, for those that [`Thread::start`] did not start.
pub(crate) fn mark_as_ours() {
    IS_OURS.set(true);
}

/// What a new thread says once.
#[derive(Default)]
struct Answer(Mutex<Option<bool>>, Condvar);

impl Answer {
    fn give(&self, answer: bool) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        self.1.notify_one();
    }

    fn wait(&self) -> bool {
        let mut answer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match *answer {
                Some(answer) => return answer,
                None => answer = self.1.wait(answer).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Whether there is memory for what this thread keeps until its end. Then it keeps it already.
///
/// It is the variable of rayon's queues, for whose destructor glibc ends the process if it gets no
/// memory.
fn has_memory() -> bool {
    /// More than what the C library keeps in a thread's cache, which it does not look at here.
    const ENOUGH: usize = 8192;
    // SAFETY: freed, and not used. The compiler must not see that.
    let has_memory = unsafe {
        let block = std::hint::black_box(libc::malloc(ENOUGH));
        libc::free(block);
        !block.is_null()
    };
    if has_memory {
        drop(crossbeam_epoch::pin());
    }
    has_memory
}
