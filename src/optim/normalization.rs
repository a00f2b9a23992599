//! The settings of optimizers that normalize gradients (`spam.rs`), and the switches that they are
//! written as.

use std::fmt;

use crate::{Error, Result};

/// How gradients are normalized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalization {
    /// `gamma1=`: decay of the mean of norms.
    pub gamma1: f64,
    /// `gamma2=`: decay of the mean of their squares; above the square of gamma1.
    pub gamma2: f64,
    /// `gamma3=`: decay of the mean of largest magnitudes.
    pub gamma3: f64,
    /// `reset=`: steps after which moments start again; 0 for never.
    pub reset: u32,
    /// `s=cosine`, else `s=1`: whether beta1 and gamma1 are multiplied by s, which falls from 1 to a
    /// half over the schedule's steps, as half a cosine does. The authors' code does so where it is
    /// told a run's length, and advises it for language models; their paper has none of it.
    pub anneals: bool,
}

impl Normalization {
    /// That of Stable-SPAM's class; of optimizers without any, which do not read it, too.
    pub(super) const USUAL: Self =
        Self { gamma1: 0.7, gamma2: 0.9, gamma3: 0.999, reset: 1000, anneals: false };

    /// Sets what a switch names; whether it is one of these.
    pub(super) fn set(&mut self, switch: &str, value: &str) -> Result<bool> {
        let value = value.trim();
        let bad =
            |what, expected| Error::invalid(what, format!("expected {expected}, got {value:?}"));
        let number = |what| value.parse().map_err(|_| bad(what, "a number"));
        match switch {
            "gamma1" => self.gamma1 = number("gamma1")?,
            "gamma2" => self.gamma2 = number("gamma2")?,
            "gamma3" => self.gamma3 = number("gamma3")?,
            "reset" => {
                self.reset = value.parse().map_err(|_| bad("reset", "a whole number of steps"))?;
            }
            "s" => {
                self.anneals = match value {
                    "1" => false,
                    "cosine" => true,
                    _ => return Err(bad("s", "one of 1, cosine")),
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Writes those switches that are not the usual ones.
    pub(super) fn switches(&self, usual: &Self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, ours, usual) in [
            ("gamma1", self.gamma1, usual.gamma1),
            ("gamma2", self.gamma2, usual.gamma2),
            ("gamma3", self.gamma3, usual.gamma3),
        ] {
            if ours != usual {
                write!(f, ",{name}={ours}")?;
            }
        }
        if self.reset != usual.reset {
            write!(f, ",reset={}", self.reset)?;
        }
        if self.anneals {
            write!(f, ",s=cosine")?;
        }
        Ok(())
    }
}
