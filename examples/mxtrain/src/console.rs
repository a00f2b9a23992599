//! What the user sees: text on standard output, and a progress bar, notes and errors on standard
//! error.

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::stdio::{stderr, stdout};

use crate::failure::{Failure, Outcome};
use crate::tokenizer::Tokenizer;

/// Whether the program is to end soon.
static HURRIES: AtomicBool = AtomicBool::new(false);
/// How long output may then wait for its reader.
const PATIENCE: Duration = Duration::from_millis(200);

/// From now on, what the reader of a pipe or a stopped terminal does not take is given up: the program
/// is to end, and does not wait for it.
pub(crate) fn hurry() {
    HURRIES.store(true, Ordering::Relaxed);
}

/// Writes to standard output. A reader that has gone away (`mxtrain info | head`) is no failure.
pub(crate) fn print(text: &str) -> Outcome {
    // Held, so that a text stays whole.
    let _lock = io::stdout().lock();
    match write(stdout(), text.as_bytes()) {
        Err(Errno::PIPE | Errno::BADF) | Ok(()) => Ok(()),
        Err(e) => Err(Failure::runtime(format!("cannot write to standard output: {e}"))),
    }
}

/// Writes a line to standard error. Where even that fails there is no one left to tell.
pub(crate) fn note(line: &str) {
    let _lock = io::stderr().lock();
    let _ = write(stderr(), format!("{line}\n").as_bytes());
}

fn write(to: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    /// A pipe that has room has room for as much (PIPE_BUF), and a write of more may wait.
    const PIECE: usize = 4096;
    let mut waits_since = None;
    while !bytes.is_empty() {
        let mut polled = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
        let slice = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        match poll(&mut polled, Some(&slice)) {
            // Not yet, or a signal came.
            Ok(0) | Err(Errno::INTR) => {
                if HURRIES.load(Ordering::Relaxed)
                    && waits_since.get_or_insert_with(Instant::now).elapsed() >= PATIENCE
                {
                    return Err(Errno::TIMEDOUT);
                }
                continue;
            }
            // Where that cannot be told, the write will.
            _ => {}
        }
        match rustix::io::write(to, &bytes[..bytes.len().min(PIECE)]) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// A learning rate or a gradient norm in a few characters.
pub(crate) fn short(value: f32) -> String {
    if value == 0.0 || (1e-2..1e4).contains(&value.abs()) {
        format!("{value:.3}")
    } else {
        format!("{value:.2e}")
    }
}

/// A count in millions or thousands: "124.44 M".
pub(crate) fn scaled(count: u64) -> String {
    match count {
        1_000_000_000.. => format!("{:.2} G", count as f64 / 1e9),
        1_000_000.. => format!("{:.2} M", count as f64 / 1e6),
        1_000.. => format!("{:.1} k", count as f64 / 1e3),
        _ => count.to_string(),
    }
}

/// A loss with its unit, and in bits a byte where a token is a byte.
pub(crate) fn loss_in_words(loss: f32, tokenizer: Option<Tokenizer>) -> String {
    let mut text = format!("loss {loss:.4} nats a token");
    if tokenizer == Some(Tokenizer::Bytes) {
        text.push_str(&format!(", {:.4} bits a byte", bits(loss)));
    }
    text
}

/// Nats in bits.
pub(crate) fn bits(nats: f32) -> f64 {
    f64::from(nats) / std::f64::consts::LN_2
}

/// The progress of a run of steps: a bar on a terminal, elsewhere a line now and then.
pub(crate) struct Progress {
    bar: ProgressBar,
    /// Steps between two lines; `None` where the bar is shown.
    line_every: Option<u64>,
    first_step: u64,
    steps: u64,
    /// Tokens and seconds of the last steps, so that the speed shown is the present one.
    recent: VecDeque<(u64, f64)>,
    seconds: f64,
}

/// Steps over which the speed is averaged.
const RECENT: usize = 20;

impl Progress {
    /// Progress of a run that stands at `step` of `steps`.
    pub(crate) fn new(step: u64, steps: u64) -> Self {
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg} {eta} left");
        let bar = ProgressBar::new(steps).with_style(style.expect("the template is valid"));
        bar.set_position(step);
        bar.reset_eta();
        let line_every = (!io::stderr().is_terminal()).then(|| ((steps - step) / 50).max(1));
        Self { bar, line_every, first_step: step, steps, recent: Default::default(), seconds: 0.0 }
    }

    /// Shows a step.
    pub(crate) fn step(&mut self, stats: &mxfp4train::StepStats) {
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back((stats.tokens, stats.seconds));
        self.seconds += stats.seconds;
        let (tokens, seconds) =
            self.recent.iter().fold((0, 0.0), |(t, s), (tokens, secs)| (t + tokens, s + secs));
        let speed = (tokens as f64 / seconds.max(1e-9)).round() as u64;
        let message = format!(
            "loss {:.4}  lr {}  norm {}  {} tokens/s",
            stats.loss,
            short(stats.lr),
            short(stats.grad_norm),
            indicatif::HumanCount(speed),
        );
        match self.line_every {
            None => {
                self.bar.set_message(message);
                self.bar.set_position(stats.step);
            }
            Some(every) => {
                let done = stats.step - self.first_step;
                if done == 1 || done.is_multiple_of(every) {
                    let left = self.seconds / done as f64 * (self.steps - stats.step) as f64;
                    let left = HumanDuration(Duration::from_secs_f64(left));
                    note(&format!("step {}/{}  {message}  {left:#} left", stats.step, self.steps));
                }
            }
        }
    }

    /// Writes a line to standard output without disturbing the bar.
    pub(crate) fn print(&self, text: &str) -> Outcome {
        self.bar.suspend(|| print(text))
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!(short(0.001), "1.00e-3");
        assert_eq!(short(1.25), "1.250");
        assert_eq!(scaled(124_439_808), "124.44 M");
        assert_eq!(scaled(999), "999");
    }

    #[test]
    fn losses_have_units() {
        let loss = std::f32::consts::LN_2;
        assert_eq!(loss_in_words(loss, Some(Tokenizer::Gpt2)), "loss 0.6931 nats a token");
        let words = loss_in_words(loss, Some(Tokenizer::Bytes));
        assert_eq!(words, "loss 0.6931 nats a token, 1.0000 bits a byte");
    }
}
