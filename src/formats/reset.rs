//! OsciReset: weights that oscillate about a threshold of their grid are put onto it.
//!
//! Once a period weights are tracked for some steps: how far they moved, and how far what they are
//! rounded to did. One whose numbers moved many times as far as itself becomes its number.
//!
//! Source: TetraJet-v2 (arXiv 2510.27527) and its code.

use std::fmt;
use std::str::FromStr;

/// When weights are tracked and reset. Written `PERIOD:TRACK:THRESHOLD@START`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reset {
    period: u64,
    track: u64,
    threshold: f32,
    start: f64,
}

/// What is due after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetPhase {
    /// Nothing.
    Rest,
    /// Tracking begins with the weights as they are.
    Begin,
    /// What the step changed is added up.
    Track,
    /// Weights that oscillated are reset.
    Reset,
}

impl Reset {
    /// How many times as far as the weight its number has to have moved.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// What is due after step `done` (1 is the first) of a schedule of `total_steps`. The first
    /// period begins at the multiple of its length that is nearest to the start's part of them.
    pub fn phase(&self, done: u64, total_steps: u64) -> ResetPhase {
        let first = (self.start * total_steps as f64 / self.period as f64).round() as u64;
        let within = done % self.period;
        // Step 0 has no end that something could begin at.
        if done / self.period < first.max(1) {
            return ResetPhase::Rest;
        }
        match within {
            0 => ResetPhase::Begin,
            _ if within <= self.track => ResetPhase::Track,
            _ if within == self.track + 1 => ResetPhase::Reset,
            _ => ResetPhase::Rest,
        }
    }

    /// Whether something is tracked between step `done` and the next.
    pub fn is_tracking(&self, done: u64, total_steps: u64) -> bool {
        matches!(self.phase(done, total_steps), ResetPhase::Begin | ResetPhase::Track)
    }
}

/// Whether a weight that moved by `moved` in all, and its number by `rounded_moved`, oscillates.
pub fn oscillates(moved: f32, rounded_moved: f32, threshold: f32) -> bool {
    moved > 0.0 && rounded_moved / moved >= threshold
}

impl FromStr for Reset {
    type Err = &'static str;

    /// # Errors
    /// What was expected.
    fn from_str(s: &str) -> Result<Self, &'static str> {
        const EXPECTED: &str = "PERIOD:TRACK:THRESHOLD@START like 200:50:8@0.6, steps, steps below PERIOD - 1, a \
             number above 0 and a fraction of the schedule";
        let parse = || {
            let (numbers, start) = s.split_once('@')?;
            let mut numbers = numbers.split(':');
            let reset = Self {
                period: numbers.next()?.parse().ok()?,
                track: numbers.next()?.parse().ok()?,
                threshold: numbers.next()?.parse().ok()?,
                start: start.parse().ok()?,
            };
            let Self { period, track, threshold, start } = reset;
            let sound = track > 0
                && track < period.saturating_sub(1)
                && threshold > 0.0
                && threshold.is_finite()
                && (0.0..=1.0).contains(&start);
            (sound && numbers.next().is_none()).then_some(reset)
        };
        parse().ok_or(EXPECTED)
    }
}

impl fmt::Display for Reset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { period, track, threshold, start } = self;
        write!(f, "{period}:{track}:{threshold}@{start}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_begin_at_multiples_behind_the_start() {
        let reset: Reset = "10:3:8@0.6".parse().unwrap();
        // 60% of 40 steps are 24, so the third period is the first.
        for (done, expected) in [
            (1, ResetPhase::Rest),
            (10, ResetPhase::Rest),
            (19, ResetPhase::Rest),
            (20, ResetPhase::Begin),
            (21, ResetPhase::Track),
            (23, ResetPhase::Track),
            (24, ResetPhase::Reset),
            (25, ResetPhase::Rest),
            (30, ResetPhase::Begin),
        ] {
            assert_eq!(reset.phase(done, 40), expected, "{done}");
        }
        let at_once: Reset = "10:3:8@0".parse().unwrap();
        assert_eq!([3, 10, 14].map(|done| at_once.phase(done, 40)), {
            [ResetPhase::Rest, ResetPhase::Begin, ResetPhase::Reset]
        });
        let tracking = (0..30).filter(|done| reset.is_tracking(*done, 40));
        assert_eq!(tracking.collect::<Vec<_>>(), [20, 21, 22, 23]);
    }

    #[test]
    fn strings_survive_a_round_trip_and_nonsense_is_refused() {
        for text in ["200:50:8@0.6", "400:50:16@0.59", "3:1:0.5@1"] {
            assert_eq!(text.parse::<Reset>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "200:50:8",
            "200:50@0.6",
            "50:49:8@0.6",
            "0:0:8@0.6",
            "200:0:8@0.6",
            "200:50:0@0.6",
            "200:50:inf@0.6",
            "200:50:8@1.1",
            "200:50:8:1@0.6",
            "200:50:NaN@0.6",
            "200:50:8@NaN",
        ] {
            assert!(text.parse::<Reset>().unwrap_err().contains("200:50:8@0.6"), "{text}");
        }
    }

    /// Four moves of .0065 in all across a threshold of the grid with scale 1/2.
    #[test]
    fn a_weight_about_a_threshold_oscillates() {
        let weights = [0.374f32, 0.376, 0.374, 0.3755, 0.3745];
        let numbers = [0.25f32, 0.5, 0.25, 0.5, 0.25];
        let moved = |x: [f32; 5]| x.windows(2).map(|x| (x[1] - x[0]).abs()).sum::<f32>();
        let (of_weight, of_number) = (moved(weights), moved(numbers));
        assert!((of_weight - 0.0065).abs() < 1e-6 && of_number == 1.0);
        assert!((of_number / of_weight - 153.8).abs() < 0.1);
        assert!(oscillates(of_weight, of_number, 8.0) && !oscillates(of_weight, of_number, 154.0));
        assert!(!oscillates(0.0, 0.0, 8.0) && !oscillates(0.0, 1.0, 8.0));
    }
}
