//! What the user sees: text on standard output, and a progress bar, notes and errors on standard
//! error.
//!
//! NOTE: names of files, and what stands in them, come from anywhere. A terminal would obey the
//! escape sequences in them, and a line could pass for another, so nothing leaves here but through
//! [`plain`]. A name that stands in a text of several lines has to go through [`shown`] before.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, IsTerminal};
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use mxfp4train::Sharpness;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::stdio::{stderr, stdout};
use serde::Serialize;

use crate::failure::{Failure, Outcome};

/// Whether the program is to end soon.
static HURRIES: AtomicBool = AtomicBool::new(false);
/// How long output may then wait for its reader.
const PATIENCE: Duration = Duration::from_millis(200);

/// From now on, what the reader of a pipe or a stopped terminal does not take is given up: the
/// program is to end, and does not wait for it.
pub(crate) fn hurry() {
    HURRIES.store(true, Ordering::Relaxed);
}

/// A text in which what a terminal would obey is visible as an escape.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    escaped(text, is_obeyed, |c| c.escape_default().to_string())
}

/// Control characters, and those that change the direction or the line of what follows.
pub(crate) fn is_obeyed(c: char) -> bool {
    const DIRECTIONS: [RangeInclusive<char>; 4] = [
        '\u{61c}'..='\u{61c}',
        '\u{200e}'..='\u{200f}',
        '\u{2028}'..='\u{202e}',
        '\u{2066}'..='\u{2069}',
    ];
    c.is_control() || DIRECTIONS.iter().any(|range| range.contains(&c))
}

/// A path as part of a text for the user.
pub(crate) fn shown(path: &Path) -> String {
    plain(&path.to_string_lossy()).into_owned()
}

/// A word that a shell reads as it is.
pub(crate) fn shell_word(word: &OsStr) -> String {
    let Some(word) = word.to_str().filter(|word| !word.contains(is_obeyed)) else {
        // Bytes that are no text, or none to look at.
        let bytes = |bytes: &[u8]| bytes.iter().map(|b| format!("\\x{b:02x}")).collect::<String>();
        let quoted = word.as_bytes().utf8_chunks().map(|chunk| {
            let valid = chunk.valid().chars().map(|c| match c {
                '\\' | '\'' => format!("\\{c}"),
                c if is_obeyed(c) => bytes(c.encode_utf8(&mut [0; 4]).as_bytes()),
                c => c.into(),
            });
            valid.collect::<String>() + &bytes(chunk.invalid())
        });
        return format!("$'{}'", quoted.collect::<String>());
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn escaped(
    text: &str,
    is_odd: impl Fn(char) -> bool,
    escape: impl Fn(char) -> String,
) -> Cow<'_, str> {
    if !text.contains(&is_odd) {
        return text.into();
    }
    text.chars().map(|c| if is_odd(c) { escape(c) } else { c.into() }).collect()
}

/// Writes lines to standard output. A reader that has gone away (`mxtrain info | head`) is no
/// failure.
pub(crate) fn print(text: &str) -> Outcome {
    let lines: Vec<_> = text.split('\n').map(plain).collect();
    print_as_it_is(&lines.join("\n"))
}

/// Writes a value as a JSON object to standard output.
pub(crate) fn print_json(value: &impl Serialize) -> Outcome {
    let json = serde_json::to_string_pretty(value).expect("plain data becomes JSON");
    // JSON itself escapes some control characters only. Outside of strings there are none.
    let escape = |c| format!("\\u{:04x}", u32::from(c));
    let lines = json.split('\n').map(|line| escaped(line, is_obeyed, escape));
    print_as_it_is(&(lines.collect::<Vec<_>>().join("\n") + "\n"))
}

/// What a model has written, for standard output: as it is in a file or a pipe, but a terminal need
/// not obey it.
pub(crate) fn content(text: &str) -> Cow<'_, str> {
    static IS_TERMINAL: LazyLock<bool> = LazyLock::new(|| io::stdout().is_terminal());
    match *IS_TERMINAL {
        true => visible(text),
        false => text.into(),
    }
}

/// A text whose lines, tabs and languages stay as they are, without further control characters.
fn visible(text: &str) -> Cow<'_, str> {
    let is_odd = |c: char| c.is_control() && !['\n', '\t'].contains(&c);
    escaped(text, is_odd, |c| c.escape_default().to_string())
}

/// Writes to standard output what is fit for it.
pub(crate) fn print_as_it_is(text: &str) -> Outcome {
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
    let _ = write(stderr(), format!("{}\n", plain(line)).as_bytes());
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
pub(crate) fn loss_in_words(loss: f32, of_bytes: bool) -> String {
    let mut text = format!("loss {loss:.4} nats a token");
    if of_bytes {
        text.push_str(&format!(", {:.4} bits a byte", bits(loss)));
    }
    text
}

/// "sharpness 0.213 (0.224 at last tokens, epsilon 0.001), largest logits 9.34"
pub(crate) fn sharpness_in_words(found: &Sharpness) -> String {
    let &Sharpness { epsilon, all, last, logit_amax } = found;
    format!(
        "sharpness {} ({} at last tokens, epsilon {epsilon}), largest logits {}",
        short(all),
        short(last),
        short(logit_amax)
    )
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
                    // Of a run that has no end there may be more than can be counted.
                    let left = Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX);
                    let left = HumanDuration(left);
                    note(&format!("step {}/{}  {message}  {left:#} left", stats.step, self.steps));
                }
            }
        }
    }

    /// Writes lines to standard output without disturbing the bar.
    pub(crate) fn print(&self, text: &str) -> Outcome {
        self.bar.suspend(|| print(text))
    }

    /// The same with what a model has written.
    pub(crate) fn print_content(&self, text: &str) -> Outcome {
        self.bar.suspend(|| print_as_it_is(&content(text)))
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
    fn what_a_terminal_would_obey_is_shown() {
        let odd = "a\u{1b}[31m\n\r\u{7}\u{7f}\u{9b}\u{202e}\u{2066}b";
        let shown = r"a\u{1b}[31m\n\r\u{7}\u{7f}\u{9b}\u{202e}\u{2066}b";
        assert_eq!(plain(odd), shown);
        assert_eq!(super::shown(Path::new(odd)), shown);
        for text in ["", "naïve/語/🦀 \\ 'x'", "שלום", "e\u{301}"] {
            assert!(matches!(plain(text), Cow::Borrowed(same) if same == text), "{text}");
        }
        assert_eq!(visible("a\n\tb\r\u{1b}\u{200f}"), "a\n\tb\\r\\u{1b}\u{200f}");
    }

    #[test]
    fn a_folder_with_a_space_can_be_pasted() {
        let word = |bytes: &[u8]| shell_word(OsStr::from_bytes(bytes));
        assert_eq!(word(b"out/a-1"), "out/a-1");
        assert_eq!(word(b"it's mine"), r"'it'\''s mine'");
        assert_eq!(word(b"f\xfcr 'm"), r"$'f\xfcr \'m'");
        assert_eq!(word("a\u{1b}\n\\ü\u{9b}".as_bytes()), r"$'a\x1b\x0a\\ü\xc2\x9b'");
    }

    #[test]
    fn a_run_without_end_has_a_time_left() {
        let mut progress = Progress::new(0, u64::MAX);
        progress.line_every = Some(1);
        progress.step(&mxfp4train::StepStats {
            step: 1,
            loss: 1.0,
            grad_norm: 1.0,
            lr: 1.0,
            tokens: 1,
            seconds: 1e3,
            raised_blocks: 0,
            exchange_seconds: 0.0,
        });
    }

    #[test]
    fn sharpness_says_what_of() {
        let found = Sharpness { epsilon: 1e-3, all: 0.2134, last: 0.004, logit_amax: 12.0 };
        let expected = "sharpness 0.213 (4.00e-3 at last tokens, epsilon 0.001), largest logits \
                        12.000";
        assert_eq!(sharpness_in_words(&found), expected);
    }

    #[test]
    fn losses_have_units() {
        let loss = std::f32::consts::LN_2;
        assert_eq!(loss_in_words(loss, false), "loss 0.6931 nats a token");
        let words = loss_in_words(loss, true);
        assert_eq!(words, "loss 0.6931 nats a token, 1.0000 bits a byte");
    }
}
