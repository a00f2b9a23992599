//! Token dropping: blocks between the first and the last see a random part of each sequence, which
//! grows until they see all of it (random-LTD, arXiv 2211.11586).
//!
//! Which positions a block keeps is [`crate::formats::kept_positions`]; how many is a pure function
//! of the step here, as a learning rate is, so that a resumed run needs no state.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// Kept tokens are a multiple of it, but where all of a sequence are: blocks of 32 along wgrad's
/// reduction, which is over the kept rows, are then whole in any even number of sequences, and FP8
/// tensor cores take the rows as they are.
const UNIT: usize = 16;

/// Sizes that a sequence is divided into, unless `by` says otherwise. A GPU keeps a recording of the
/// step for each.
const STAGES: usize = 16;

/// How many tokens of each sequence the blocks between the first and the last keep in training.
/// Written as one string, such as `start=128,steps=60%`, which is also what files store.
///
/// - `start=N`: tokens at the first step, a multiple of 16.
/// - `steps=N` or `steps=P%`: steps of the schedule after which nothing is dropped any more, as a
///   number or a whole percentage of its `total_steps`. Evaluations drop nothing, so that the last
///   third of a run, or more, should not either. A new schedule counts them anew.
/// - `by=N`: what the tokens are rounded down to a multiple of on their way, itself a multiple of
///   16. A sixteenth of a sequence, rounded up to that, where it is left out.
///
/// ```
/// use mxfp4train::TokenDrop;
///
/// let drop: TokenDrop = "start=128,steps=60%".parse()?;
/// // Of 1,024 tokens, in a schedule of 1,000 steps.
/// let kept = |step| drop.kept(step, 1024, 1000);
/// assert_eq!([0, 300, 599, 600].map(kept), [128, 576, 960, 1024]);
/// # Ok::<(), mxfp4train::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenDrop {
    start: usize,
    steps: Steps,
    by: Option<usize>,
}

/// How long tokens are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Steps {
    Number(u64),
    /// Of the schedule's.
    Percent(u64),
}

impl TokenDrop {
    /// Tokens that a block keeps of `length` in step `step` of a schedule of `total_steps`: on a
    /// straight line from `start` to `length`, rounded down. At most `length`.
    ///
    /// NOTE: not inlined. Where there is nothing to drop the compiler may look at these fields before
    /// it asks whether there are any, which harms nothing, but valgrind tells every host of it.
    #[inline(never)]
    pub fn kept(&self, step: u64, length: usize, total_steps: u64) -> usize {
        let end = match self.steps {
            Steps::Number(steps) => steps,
            Steps::Percent(percent) => (u128::from(total_steps) * u128::from(percent) / 100) as u64,
        };
        if step >= end || self.start >= length {
            return length;
        }
        let way = (length - self.start) as u128;
        let kept = self.start + (way * u128::from(step) / u128::from(end)) as usize;
        (kept - kept % self.by(length)).max(self.start)
    }

    /// All sizes below `length` that [`TokenDrop::kept`] can have.
    pub(crate) fn sizes(&self, length: usize) -> impl Iterator<Item = usize> {
        let (start, by) = (self.start, self.by(length));
        let first = (start + 1).next_multiple_of(by);
        std::iter::once(start).chain((first..).step_by(by)).take_while(move |size| *size < length)
    }

    fn by(&self, length: usize) -> usize {
        self.by.unwrap_or_else(|| length.div_ceil(STAGES).next_multiple_of(UNIT))
    }

    /// Whether a model of so many layers can be trained so, on sequences of `length` tokens, in a
    /// schedule of `total_steps` (0 where there is no such number).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`].
    pub(crate) fn check(&self, layers: usize, length: usize, total_steps: u64) -> Result<()> {
        let message = if layers < 3 {
            format!(
                "blocks between the first and the last drop tokens, and a model of {layers} layers \
                 has none there; leave it out, or use 3 layers or more"
            )
        } else if self.start > length {
            format!(
                "start={}: expected at most the {length} tokens of a sequence (sequence_length)",
                self.start
            )
        } else if matches!(self.steps, Steps::Percent(_)) && total_steps == 0 {
            format!(
                "steps={} is a part of a schedule's steps, whose number (total_steps) is not set; \
                 set it, or give a number of steps",
                self.steps
            )
        } else {
            return Ok(());
        };
        Err(refused(message))
    }
}

impl fmt::Display for TokenDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "start={},steps={}", self.start, self.steps)?;
        self.by.map_or(Ok(()), |by| write!(f, ",by={by}"))
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(steps) => steps.fmt(f),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl FromStr for TokenDrop {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let (mut start, mut steps, mut by) = (None, None, None);
        for part in s.split(',').map(str::trim) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let twice = match key.trim() {
                "start" => start.replace(tokens("start", value)?).is_some(),
                "steps" => steps.replace(value.trim().parse::<Steps>()?).is_some(),
                "by" => by.replace(tokens("by", value)?).is_some(),
                key => {
                    let message = format!(
                        "expected start=N,steps=N or start=N,steps=P%, and by=N behind that; got \
                         {key:?} in {s:?}"
                    );
                    return Err(refused(message));
                }
            };
            if twice {
                return Err(refused(format!("{} is given twice in {s:?}", key.trim())));
            }
        }
        let (Some(start), Some(steps)) = (start, steps) else {
            let message = format!(
                "expected start and steps, as in start=128,steps=60%; {} is missing in {s:?}",
                if start.is_none() { "start" } else { "steps" }
            );
            return Err(refused(message));
        };
        Ok(Self { start, steps, by })
    }
}

impl FromStr for Steps {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let steps = match s.strip_suffix('%') {
            Some(percent) => percent.parse().ok().filter(|p| *p <= 100).map(Self::Percent),
            None => s.parse().ok().map(Self::Number),
        };
        let is_some = |steps: &Self| !matches!(steps, Self::Number(0) | Self::Percent(0));
        steps.filter(is_some).ok_or_else(|| {
            let message = format!(
                "steps: expected a whole number of steps from 1 on, or a whole percentage from 1% \
                 to 100%; got {s:?}"
            );
            refused(message)
        })
    }
}

/// A number of tokens that kept ones can be.
fn tokens(key: &str, value: &str) -> Result<usize> {
    let tokens = value.trim().parse().ok();
    let is_whole =
        |tokens: &usize| *tokens > 0 && *tokens <= 1 << 24 && tokens.is_multiple_of(UNIT);
    tokens.filter(is_whole).ok_or_else(|| {
        refused(format!("{key}: expected a multiple of {UNIT} tokens, got {:?}", value.trim()))
    })
}

fn refused(message: String) -> Error {
    Error::invalid("token_drop", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> TokenDrop {
        text.parse().unwrap()
    }

    /// The schedule `fixed_linear` of the paper's code: 128 to 2,048 tokens over 200,000 steps, by
    /// 16.
    #[test]
    fn kept_tokens_follow_the_schedule() {
        for text in ["start=128,steps=200000,by=16", "start=128,steps=20%,by=16"] {
            let kept = |step| parse(text).kept(step, 2048, 1_000_000);
            let steps = [0, 1_000, 50_000, 60_001, 100_000, 199_999, 200_000, u64::MAX];
            assert_eq!(steps.map(kept), [128, 128, 608, 704, 1088, 2032, 2048, 2048], "{text}");
        }
        // Sizes that nothing divides: all of them at the end, and never fewer than at the start.
        let kept = |step| parse("start=48,steps=10").kept(step, 1001, 0);
        assert_eq!([0, 1, 2, 9, 10].map(kept), [48, 128, 192, 896, 1001]);
        assert_eq!(parse("start=16,steps=8").kept(3, 16, 0), 16);
        assert_eq!(parse("start=16,steps=1%").kept(0, 64, 99), 64, "no step of a short schedule");
    }

    #[test]
    fn sizes_are_all_that_a_run_goes_through() {
        for (text, length) in [
            ("start=128,steps=1000", 2048),
            ("start=48,steps=1000", 1001),
            ("start=16,steps=1000,by=16", 70),
            ("start=64,steps=1000", 64),
        ] {
            let drop = parse(text);
            let mut seen: Vec<_> = (0..1000).map(|step| drop.kept(step, length, 0)).collect();
            seen.dedup();
            seen.retain(|size| *size < length);
            assert_eq!(drop.sizes(length).collect::<Vec<_>>(), seen, "{text} of {length}");
            assert!(seen.len() <= STAGES + 1);
        }
    }

    #[test]
    fn strings_survive_a_round_trip_and_what_is_wrong_is_named() {
        for text in ["start=128,steps=60%", "start=16,steps=1", "start=16,steps=100%,by=32"] {
            assert_eq!(parse(text).to_string(), text);
        }
        assert_eq!(parse(" steps = 7 , start=32").to_string(), "start=32,steps=7");
        for (text, part) in [
            ("", "expected start=N,steps=N or start=N,steps=P%"),
            ("start=128", "steps is missing in \"start=128\""),
            ("steps=60%", "start is missing"),
            ("start=128,steps=60%,max=3", "got \"max\""),
            ("start=128,start=128,steps=1", "start is given twice"),
            ("start=100,steps=1", "start: expected a multiple of 16 tokens, got \"100\""),
            ("start=0,steps=1", "start: expected a multiple of 16 tokens, got \"0\""),
            ("start=-16,steps=1", "start: expected a multiple of 16 tokens"),
            ("start=16,steps=1,by=8", "by: expected a multiple of 16 tokens, got \"8\""),
            ("start=16,steps=0", "steps: expected a whole number of steps from 1 on"),
            ("start=16,steps=101%", "from 1% to 100%; got \"101%\""),
            ("start=16,steps=0.6", "got \"0.6\""),
            ("start=16,steps=", "got \"\""),
        ] {
            let error = text.parse::<TokenDrop>().unwrap_err().to_string();
            assert!(error.starts_with("token_drop: ") && error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let check = |text: &str, layers, length, total_steps| {
            parse(text).check(layers, length, total_steps).map_err(|e| e.to_string())
        };
        assert_eq!(check("start=128,steps=60%", 3, 128, 1), Ok(()));
        assert_eq!(check("start=128,steps=60", 3, 128, 0), Ok(()));
        for (result, part) in [
            (check("start=128,steps=60%", 2, 128, 1), "a model of 2 layers has none there"),
            (check("start=128,steps=60%", 3, 127, 1), "at most the 127 tokens of a sequence"),
            (check("start=128,steps=60%", 3, 128, 0), "steps=60% is a part of a schedule's steps"),
        ] {
            let message = result.unwrap_err();
            assert!(message.starts_with("token_drop: ") && message.contains(part), "{message}");
        }
    }
}
