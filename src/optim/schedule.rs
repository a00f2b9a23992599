//! Learning-rate schedules: a pure function of the step, so that a resumed run needs no state.
//!
//! Steps count from where the schedule was set: the run's first step, or the one at which
//! `Trainer::set_schedule` took a new one.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// The curve after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScheduleKind {
    /// `lr` for ever.
    Constant,
    /// Half a cosine from `lr` down to `min_lr` at `total_steps`.
    Cosine,
    /// A straight line from `lr` down to `min_lr` at `total_steps`.
    Linear,
    /// `lr`, then a straight line down to `min_lr` over the last `decay_steps`.
    Trapezoid,
}

impl ScheduleKind {
    /// Names that [`FromStr`] takes.
    pub const NAMES: [&str; 4] = ["constant", "cosine", "linear", "trapezoid"];
}

impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::NAMES[*self as usize])
    }
}

impl FromStr for ScheduleKind {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "constant" => Ok(Self::Constant),
            "cosine" => Ok(Self::Cosine),
            "linear" => Ok(Self::Linear),
            "trapezoid" => Ok(Self::Trapezoid),
            _ => {
                let names = Self::NAMES.join(", ");
                Err(Error::invalid("schedule", format!("expected one of {names}; got {s:?}")))
            }
        }
    }
}

/// Learning rate as a function of the step.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// The curve.
    pub kind: ScheduleKind,
    /// Peak learning rate.
    pub lr: f32,
    /// Learning rate at the end of the curve.
    pub min_lr: f32,
    /// Steps over which the rate rises linearly to `lr`.
    pub warmup_steps: u64,
    /// Step at which the curve ends; later steps keep `min_lr`. Not read by `Constant`.
    pub total_steps: u64,
    /// Length of the final descent of `Trapezoid`.
    pub decay_steps: u64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            kind: ScheduleKind::Constant,
            lr: 3e-4,
            min_lr: 0.0,
            warmup_steps: 0,
            total_steps: 0,
            decay_steps: 0,
        }
    }
}

impl Schedule {
    /// Learning rate of `step` (0 is the first).
    pub fn at(&self, step: u64) -> f32 {
        if step < self.warmup_steps {
            return (f64::from(self.lr) * (step + 1) as f64 / self.warmup_steps as f64) as f32;
        }
        let (hi, lo) = (f64::from(self.lr), f64::from(self.min_lr));
        // Progress along the descent that starts at step `from` and ends at `total_steps`.
        let progress = |from: u64| {
            let length = self.total_steps.saturating_sub(from).max(1) as f64;
            (step.saturating_sub(from) as f64 / length).min(1.0)
        };
        let lr = match self.kind {
            ScheduleKind::Constant => hi,
            ScheduleKind::Cosine => {
                let turn = std::f64::consts::PI * progress(self.warmup_steps);
                lo + (hi - lo) * 0.5 * (1.0 + turn.cos())
            }
            ScheduleKind::Linear => hi + (lo - hi) * progress(self.warmup_steps),
            ScheduleKind::Trapezoid => {
                let from = self.total_steps.saturating_sub(self.decay_steps);
                hi + (lo - hi) * progress(from.max(self.warmup_steps))
            }
        };
        lr as f32
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming the field.
    pub fn validate(&self) -> Result<()> {
        for (what, lr) in [("lr", self.lr), ("min_lr", self.min_lr)] {
            if !(lr.is_finite() && lr >= 0.0) {
                let message = format!("expected a number of at least 0, got {lr}");
                return Err(Error::invalid(what, message));
            }
        }
        if self.kind != ScheduleKind::Constant && self.total_steps <= self.warmup_steps {
            return Err(Error::invalid(
                "total_steps",
                format!(
                    "a {} schedule ends after its warm-up of {} steps; got {}",
                    self.kind, self.warmup_steps, self.total_steps
                ),
            ));
        }
        if self.kind == ScheduleKind::Trapezoid && self.decay_steps > self.total_steps {
            return Err(Error::invalid(
                "decay_steps",
                format!("{} is more than total_steps {}", self.decay_steps, self.total_steps),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind) -> Schedule {
        Schedule { kind, lr: 1.0, min_lr: 0.1, warmup_steps: 10, total_steps: 110, decay_steps: 20 }
    }

    #[test]
    fn curves_pass_through_their_corners() {
        for (kind, points) in [
            (ScheduleKind::Constant, vec![(0, 0.1), (9, 1.0), (10, 1.0), (1000, 1.0)]),
            (ScheduleKind::Cosine, vec![(4, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (999, 0.1)]),
            (ScheduleKind::Linear, vec![(10, 1.0), (60, 0.55), (110, 0.1), (999, 0.1)]),
            (ScheduleKind::Trapezoid, vec![(10, 1.0), (90, 1.0), (100, 0.55), (110, 0.1)]),
        ] {
            for (step, lr) in points {
                let got = schedule(kind).at(step);
                assert!((got - lr).abs() < 1e-6, "{kind} at {step}: {got}, expected {lr}");
            }
        }
    }

    #[test]
    fn names_round_trip_and_bad_fields_are_named() {
        for name in ScheduleKind::NAMES {
            assert_eq!(name.parse::<ScheduleKind>().unwrap().to_string(), name);
        }
        let bad = |s: Schedule| s.validate().unwrap_err().to_string();
        assert!(bad(Schedule { lr: f32::NAN, ..Schedule::default() }).starts_with("lr"));
        assert!(
            bad(Schedule { total_steps: 5, ..schedule(ScheduleKind::Cosine) })
                .starts_with("total_steps")
        );
        assert!(
            bad(Schedule { decay_steps: 200, ..schedule(ScheduleKind::Trapezoid) })
                .starts_with("decay_steps")
        );
    }
}
