//! What ranks tell each other in every collective call: 256 bytes.

use std::fmt;

use bytemuck::{Pod, Zeroable};

use crate::{Error, Result};

/// "mxt", and the version of the layout.
const MAGIC: u32 = 0x74786d03;
const GOOD: u32 = 0;
const STOPPED: u32 = 1;
const FAILED: u32 = 2;

/// Tokens that ranks read.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Data {
    /// How many.
    pub(crate) tokens: u64,
    /// Of the first of them.
    pub(crate) checksum: u32,
}

impl fmt::Display for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a dataset of {} tokens (checksum {:08x})", self.tokens, self.checksum)
    }
}

/// A collective call, with what must be the same of it on all ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Call {
    /// An engine is made.
    Engine,
    /// Its GPU is linked with those of the others.
    Link,
    /// A trainer is made or loaded.
    Trainer,
    /// The gradients of a step, from 1 on, with a learning rate and the checksum of a schedule, on data,
    /// or on tokens that the host gives.
    Step { step: u64, lr: f32, schedule: u32, data: Option<Data> },
    /// An evaluation after so many steps, of so many windows, whose batches are dealt or not.
    Eval { step: u64, windows: u64, is_dealt: bool, data: Data },
    /// A checkpoint after so many steps is begun.
    Save { step: u64 },
    /// It is done.
    Saved { step: u64 },
    /// What ranks keep after so many steps is brought to rank 0.
    Gather { step: u64 },
}

impl Call {
    fn numbers(self) -> (u32, [u64; 4]) {
        match self {
            Self::Engine => (0, [0; 4]),
            Self::Trainer => (1, [0; 4]),
            Self::Step { step, lr, schedule, data } => {
                let how = u64::from(lr.to_bits()) | u64::from(schedule) << 32;
                let given = Data { tokens: GIVEN, checksum: 0 };
                let Data { tokens, checksum } = data.unwrap_or(given);
                (2, [step, how, tokens, checksum.into()])
            }
            Self::Eval { step, windows, is_dealt, data: Data { tokens, checksum } } => {
                let more = u64::from(checksum) | u64::from(is_dealt) << 32;
                (3, [step, windows, tokens, more])
            }
            Self::Save { step } => (4, [step, 0, 0, 0]),
            Self::Saved { step } => (5, [step, 0, 0, 0]),
            Self::Link => (6, [0; 4]),
            Self::Gather { step } => (7, [step, 0, 0, 0]),
        }
    }

    fn of_numbers(call: u32, [step, a, tokens, b]: [u64; 4]) -> Option<Self> {
        let data = Data { tokens, checksum: b as u32 };
        Some(match call {
            0 => Self::Engine,
            1 => Self::Trainer,
            2 => Self::Step {
                step,
                lr: f32::from_bits(a as u32),
                schedule: (a >> 32) as u32,
                data: (tokens != GIVEN).then_some(data),
            },
            3 => Self::Eval { step, windows: a, is_dealt: b >> 32 != 0, data },
            4 => Self::Save { step },
            5 => Self::Saved { step },
            6 => Self::Link,
            7 => Self::Gather { step },
            _ => return None,
        })
    }
}

/// In the place of the tokens of a dataset, where there is none.
const GIVEN: u64 = u64::MAX;

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Engine => f.write_str("makes an engine"),
            Self::Link => f.write_str("links its GPU with others"),
            Self::Trainer => f.write_str("makes a trainer"),
            Self::Step { step, lr, schedule, data } => {
                write!(f, "does step {step} at a rate of {lr:?} (schedule {schedule:08x}) on ")?;
                match data {
                    None => f.write_str("given tokens"),
                    Some(data) => data.fmt(f),
                }
            }
            Self::Eval { step, windows, is_dealt, data } => {
                let more = if *is_dealt { "" } else { " for more than their loss" };
                write!(f, "evaluates {windows} windows of {data} after step {step}{more}")
            }
            Self::Save { step } | Self::Saved { step } => write!(f, "saves step {step}"),
            Self::Gather { step } => write!(f, "copies step {step}"),
        }
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct News {
    magic: u32,
    call: u32,
    about: [u64; 4],
    outcome: u32,
    words_len: u32,
    words: [u8; 208],
}

impl News {
    pub(super) fn new(call: Call, mine: Result<(), &Error>) -> Self {
        let (number, about) = call.numbers();
        let mut news = Self { magic: MAGIC, call: number, about, ..Self::zeroed() };
        match mine {
            Ok(()) => {}
            Err(Error::Stopped) => news.outcome = STOPPED,
            Err(error) => {
                news.outcome = FAILED;
                let words = error.to_string();
                let end = words.floor_char_boundary(news.words.len());
                news.words[..end].copy_from_slice(&words.as_bytes()[..end]);
                news.words_len = end as u32;
            }
        }
        news
    }

    /// None of what is no news.
    fn call(&self) -> Option<Call> {
        match (self.magic, self.outcome) {
            (MAGIC, GOOD | STOPPED | FAILED) => Call::of_numbers(self.call, self.about),
            _ => None,
        }
    }

    pub(super) fn is_news(&self) -> bool {
        self.call().is_some()
    }

    fn words(&self) -> String {
        let len = (self.words_len as usize).min(self.words.len());
        String::from_utf8_lossy(&self.words[..len]).into_owned()
    }
}

/// What the news of all ranks come to, the same on every rank.
pub(super) fn judge(call: Call, news: &[News], hosts: &[String]) -> Result<()> {
    let name = |rank: usize| format!("rank {rank} on {}", hosts[rank]);
    // One that fails early does not know what the call is about.
    if let Some(rank) = news.iter().position(|news| news.outcome == FAILED) {
        let message = format!("{}: {}", name(rank), news[rank].words());
        return Err(Error::Peer { message });
    }
    if let Some((rank, other)) = news
        .iter()
        .enumerate()
        .find_map(|(rank, news)| Some((rank, news.call().filter(|other| *other != call)?)))
    {
        let message =
            format!("all ranks make the same calls; this one {call}, {} {other}", name(rank));
        return Err(Error::RanksDiffer { message });
    }
    if news.iter().any(|news| news.outcome == STOPPED) {
        return Err(Error::Stopped);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(call: Call, all: &[News]) -> Result<()> {
        judge(call, all, &["a".into(), "b".into()])
    }

    #[test]
    fn what_one_cannot_do_nobody_does() {
        let call = Call::Step { step: 3, lr: 0.5, schedule: 7, data: None };
        let good = News::new(call, Ok(()));
        judged(call, &[good, good]).unwrap();
        let stopped = News::new(call, Err(&Error::Stopped));
        assert!(matches!(judged(call, &[good, stopped]), Err(Error::Stopped)));
        // Longer than there is room for, cut within a letter.
        let long = format!("x{}", "é".repeat(300));
        let failed = News::new(call, Err(&Error::invalid("tokens", long)));
        let message = judged(call, &[stopped, failed]).unwrap_err().to_string();
        assert!(message.contains("rank 1 on b: tokens: x\u{e9}"), "{message}");
        let other = News::new(Call::Save { step: 3 }, Ok(()));
        let message = judged(call, &[good, other]).unwrap_err().to_string();
        let expected = "this one does step 3 at a rate of 0.5 (schedule 00000007) on given tokens, rank 1 on b \
             saves step 3";
        assert!(message.contains(expected), "{message}");
        assert!(good.is_news() && failed.is_news() && !News::zeroed().is_news());
        assert_eq!(size_of::<News>(), 256);
    }
}
