//! Signals that ask the program to stop: Ctrl-C, those of a scheduler (SIGTERM, SIGUSR1, SIGUSR2,
//! and SIGXCPU, which comes before a limit of processor time), those of timers (SIGALRM, SIGVTALRM,
//! SIGPROF), which whoever starts the program can set and leave to it, and that of a terminal that
//! goes away. SIGQUIT keeps its meaning: the end at once, for whoever wants a core.
//!
//! As long as there is nothing to save, the first one ends the program. A command that has
//! something hands in a stop handle ([`Signals::ask`]); then the first one asks, and only another
//! Ctrl-C ends the program at once: a scheduler sends several signals, a person who repeats means
//! it.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use mxfp4train::StopHandle;
use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGPROF, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU, SIGXFSZ,
};

use crate::console;
use crate::failure::{Failure, Outcome};

/// What the shell reports for a program that Ctrl-C stopped; here whichever signal it was.
pub(crate) const INTERRUPTED: u8 = 130;

/// A Ctrl-C can arrive twice, from the terminal and from a program that passes it on.
const ONE_CTRL_C: Duration = Duration::from_millis(100);

/// What a signal does.
pub(crate) struct Signals {
    state: Arc<Mutex<State>>,
    /// Whether one has come, which the listener may not have heard of yet.
    came: Arc<AtomicBool>,
}

enum State {
    /// Ends the program, after these files and then folders are removed, as far as they can be.
    Ends(Vec<PathBuf>),
    Asks {
        stop: StopHandle,
        /// What Ctrl-C again would lose.
        loss: &'static str,
        asked: Option<Instant>,
    },
}

impl Signals {
    /// Listens from now on; every signal ends the program.
    pub(crate) fn listen() -> Outcome<Self> {
        let came = Arc::new(AtomicBool::new(false));
        for number in numbers() {
            signal_hook::flag::register(number, Arc::clone(&came)).map_err(cannot)?;
        }
        let mut signals = signal_hook::iterator::Signals::new(numbers()).map_err(cannot)?;
        let state = Arc::new(Mutex::new(State::Ends(Vec::new())));
        let shared = Arc::clone(&state);
        let listener = thread::Builder::new().name("signals".into());
        let listen = move || {
            for number in signals.forever() {
                receive(number, &mut shared.lock().unwrap_or_else(PoisonError::into_inner));
            }
        };
        listener.spawn(listen).map_err(cannot)?;
        Ok(Self { state, came })
    }

    /// Makes something, in the midst of which no signal ends the program; one that comes later
    /// removes its `traces` before: files, and folders that are empty then. One that has come
    /// before ends it now, however busy the machine is: nothing is made behind it.
    pub(crate) fn making<T>(
        &self,
        make: impl FnOnce() -> Outcome<T>,
        traces: impl FnOnce(&T) -> Vec<PathBuf>,
    ) -> Outcome<T> {
        let mut state = self.lock();
        if let State::Ends(paths) = &*state
            && self.came.load(Ordering::SeqCst)
        {
            end(paths);
        }
        let made = make()?;
        *state = State::Ends(traces(&made));
        Ok(made)
    }

    /// A signal that ends the program removes these before, too.
    pub(crate) fn also_remove(&self, traces: impl IntoIterator<Item = PathBuf>) {
        if let State::Ends(paths) = &mut *self.lock() {
            paths.splice(0..0, traces);
        }
    }

    /// From now on a signal asks `stop`; a second Ctrl-C ends the program, which loses what `loss`
    /// says.
    pub(crate) fn ask(&self, stop: StopHandle, loss: &'static str) {
        self.set(State::Asks { stop, loss, asked: None });
    }

    fn set(&self, state: State) {
        *self.lock() = state;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Signals do nothing in a process that ends when rank 0 does, which gets them, too.
pub(crate) fn leave_to_rank_0() -> Outcome {
    let ignore = |number| signal_hook::flag::register(number, Arc::default()).map(drop);
    numbers().into_iter().try_for_each(ignore).map_err(cannot)
}

/// Those that ask to stop.
fn numbers() -> Vec<i32> {
    let mut numbers = vec![SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU, SIGALRM, SIGVTALRM, SIGPROF];
    // nohup has it ignored.
    if !is_ignored(SIGHUP) {
        numbers.push(SIGHUP);
    }
    numbers
}

/// A file that has reached its largest size is from now on an error of the write, and not our end.
pub(crate) fn outlive_file_limits() -> Outcome {
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map(drop).map_err(cannot)
}

fn cannot(e: io::Error) -> Failure {
    Failure::runtime(format!("cannot listen to signals: {e}"))
}

/// Ends the program without a trace of what it has begun.
fn end(traces: &[PathBuf]) -> ! {
    for path in traces {
        let _ = fs::remove_file(path).or_else(|_| fs::remove_dir(path));
    }
    process::exit(i32::from(INTERRUPTED));
}

fn receive(number: i32, state: &mut State) {
    match state {
        State::Ends(paths) => end(paths),
        State::Asks { stop, loss, asked: asked @ None } => {
            *asked = Some(Instant::now());
            stop.request_stop();
            // The run may be waiting for the reader of its output, who may never come.
            console::hurry();
            console::note(&format!("mxtrain: stopping; Ctrl-C again ends at once, {loss}"));
        }
        State::Asks { asked: Some(asked), .. } => {
            if number == SIGINT && asked.elapsed() > ONE_CTRL_C {
                process::exit(i32::from(INTERRUPTED));
            }
        }
    }
}

/// Whether the program was started with the signal ignored, as far as Linux tells.
fn is_ignored(number: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (number - 1) & 1 == 1)
}
