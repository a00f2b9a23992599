//! The worker threads of an engine: started as guests of the host's process, joined when it ends.
//!
//! NOTE: rayon ends its threads without waiting for them. Here they are started by hand and joined,
//! so that an engine that is gone has left nothing running: a host may exit, fork or close files
//! right after, and a leak checker sees their memory returned.
//!
//! Tasks reach the workers over a place of their own (`Handoff`), for rayon's queue allocates now
//! and then, and a step allocates nothing.

use std::any::Any;
use std::ffi::CString;
use std::io;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::arena::Arena;
use crate::reserve::{is_short, reserve};
use crate::signals::signals_blocked;
use crate::thread::Thread;
use crate::{Error, Result};

/// Most worker threads of an engine.
const MAX_THREADS: usize = 1024;

/// Bytes of a worker's stack, whatever the environment says (`RUST_MIN_STACK`).
const STACK: usize = 2 << 20;

/// More than what rayon and the standard library allocate for a thread in many small pieces.
const BYTES_OF_A_THREAD: usize = 16 << 10;

/// A pool of threads with which every parallel operation of an engine runs.
pub(super) struct Workers {
    pool: ManuallyDrop<ThreadPool>,
    handoff: Arc<Handoff>,
    threads: Threads,
    /// The process that the threads live in. A forked child has none of them.
    process: u32,
}

impl Workers {
    /// Starts `threads` workers; 0 takes one for each core that the process may use.
    pub(super) fn start(threads: usize) -> Result<Self> {
        let count = match threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS),
            n if n <= MAX_THREADS => n,
            n => {
                let message = format!("expected at most {MAX_THREADS}, got {n}");
                return Err(Error::invalid("threads", message));
            }
        };
        // Nobody asks before those pieces are allocated, so they are asked for together, here.
        const WHAT: &str = "worker threads";
        reserve(&mut Vec::<u8>::new(), WHAT, count * BYTES_OF_A_THREAD)?;
        let mut threads = Threads(Vec::new());
        reserve(&mut threads.0, WHAT, count)?;
        let mut memory_fails = false;
        let mut spawn = |worker: rayon::ThreadBuilder| -> io::Result<()> {
            if is_short() {
                memory_fails = true;
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            let name = CString::new(format!("mxt-{}", worker.index())).unwrap_or_default();
            let thread = Thread::start(name, STACK, || worker.run()).inspect_err(|e| {
                // The system may give one answer for too many threads and for too little memory.
                memory_fails =
                    e.kind() == io::ErrorKind::OutOfMemory || Arena::mapped(STACK).is_err();
            });
            threads.0.push(thread?);
            Ok(())
        };
        let pool = signals_blocked(|| {
            ThreadPoolBuilder::new().num_threads(count).spawn_handler(&mut spawn).build()
        });
        let pool = pool.map_err(|e| match memory_fails {
            true => Error::OutOfMemory {
                what: WHAT,
                needed: (count * (STACK + BYTES_OF_A_THREAD)) as u64,
                limit: format!("for {count} of them, which the system refuses; use fewer threads"),
            },
            false => Error::Unsupported {
                what: format!("an engine of {count} threads"),
                remedy: format!("the system refuses to start them ({e}); use fewer"),
            },
        })?;
        // All of them have started before the host goes on. If it forks while one still does, the
        // child inherits the locks of that moment; those of a sanitizer's allocator stay locked for
        // ever.
        pool.broadcast(|_| ());
        let handoff = Arc::new(Handoff::default());
        let conductor = handoff.clone();
        pool.spawn(move || conductor.conduct());
        Ok(Self { pool: ManuallyDrop::new(pool), handoff, threads, process: std::process::id() })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `f` on a worker, where parallel iterators use the workers and no other threads. A panic
    /// of `f` comes out of this call.
    pub(super) fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        if self.pool.current_thread_index().is_some() {
            return f();
        }
        assert!(
            self.process == std::process::id(),
            "the threads of an engine are those of the process before fork()"
        );
        let (mut f, mut result) = (Some(f), None);
        self.handoff.run(&mut || result = f.take().map(|f| f()));
        result.expect("the conductor ran the task")
    }
}

/// Where a thread of the host hands a task to the conductor, the worker that waits for it.
///
/// NOTE: not `ThreadPool::install`. Its queue allocates now and then, and a step allocates nothing.
#[derive(Default)]
struct Handoff {
    state: Mutex<HandoffState>,
    /// The conductor waits for a task, or for the end.
    posted: Condvar,
    /// The host's thread waits for its outcome.
    finished: Condvar,
    /// Other threads of the host wait for their turn.
    free: Condvar,
}

#[derive(Default)]
struct HandoffState {
    taken: bool,
    closed: bool,
    task: Option<Task>,
    outcome: Option<Result<(), Box<dyn Any + Send>>>,
}

/// A task on the stack of the thread that waits for it.
struct Task(*mut (dyn FnMut() + Send));

// SAFETY: the task is Send, and `Handoff::run` does not return before it has been run.
unsafe impl Send for Task {}

impl Handoff {
    /// Has the conductor run `task`, and waits for it.
    fn run(&self, task: &mut (dyn FnMut() + Send)) {
        let mut state = self.lock();
        while state.taken {
            state = self.free.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.taken = true;
        // SAFETY: only the lifetime changes; this function waits until the task is done with.
        state.task = Some(Task(unsafe {
            std::mem::transmute::<*mut (dyn FnMut() + Send + '_), *mut (dyn FnMut() + Send)>(task)
        }));
        self.posted.notify_one();
        let outcome = loop {
            match state.outcome.take() {
                Some(outcome) => break outcome,
                None => {
                    state = self.finished.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        state.taken = false;
        self.free.notify_one();
        drop(state);
        if let Err(panic) = outcome {
            resume_unwind(panic);
        }
    }

    /// Runs tasks until the handoff closes.
    fn conduct(&self) {
        let mut state = self.lock();
        while !state.closed {
            let Some(task) = state.task.take() else {
                state = self.posted.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            // SAFETY: its owner waits in `run`, and gave it away.
            let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { (*task.0)() }));
            state = self.lock();
            state.outcome = Some(outcome);
            self.finished.notify_one();
        }
    }

    fn close(&self) {
        self.lock().closed = true;
        self.posted.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, HandoffState> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            // NOTE: in a forked child the pool is left alone. Its locks may be held, for ever, by
            // threads that exist in the parent only.
            self.threads.0.clear();
            return;
        }
        self.handoff.close();
        // A worker that drops the last handle of its own pool must not wait for itself.
        if self.pool.current_thread_index().is_some() {
            self.threads.0.drain(..).for_each(Thread::detach);
        }
        // SAFETY: dropped here, once, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.pool) };
        // Then `threads` are joined.
    }
}

/// Threads that are joined when this is dropped, also where not all of them could be started.
struct Threads(Vec<Thread>);

impl Drop for Threads {
    fn drop(&mut self) {
        // A panic of a worker has been carried to the caller by rayon.
        self.0.drain(..).for_each(Thread::join);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn threads_are_gone_when_the_workers_are() {
        struct Count(Arc<AtomicUsize>);
        impl Drop for Count {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        thread_local! {
            static ENDED: RefCell<Option<Count>> = const { RefCell::new(None) };
        }
        let ended = Arc::new(AtomicUsize::new(0));
        let workers = Workers::start(3).unwrap();
        workers.install(|| {
            rayon::broadcast(|_| {
                ENDED.with(|cell| *cell.borrow_mut() = Some(Count(ended.clone())));
            });
        });
        drop(workers);
        assert_eq!(ended.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn a_worker_may_drop_the_workers() {
        let workers = Arc::new(Workers::start(2).unwrap());
        let inside = workers.clone();
        let (sender, receiver) = std::sync::mpsc::channel();
        workers.install(|| {
            rayon::spawn(move || {
                // Wait until this is the last handle.
                while Arc::strong_count(&inside) > 1 {
                    std::thread::yield_now();
                }
                drop(inside);
                sender.send(()).unwrap();
            });
        });
        drop(workers);
        receiver.recv().unwrap();
    }

    #[test]
    fn panics_come_out_and_threads_take_turns() {
        let workers = Workers::start(2).unwrap();
        let panic = catch_unwind(AssertUnwindSafe(|| workers.install(|| panic!("seven"))));
        assert_eq!(panic.unwrap_err().downcast_ref::<&str>(), Some(&"seven"));
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for i in 0..8 {
                let (workers, sum) = (&workers, &sum);
                scope.spawn(move || {
                    for _ in 0..100 {
                        let nested = workers.install(|| workers.install(|| i));
                        sum.fetch_add(nested, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 2800);
    }
}
