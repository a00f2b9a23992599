//! How far rotary positions turn: the frequencies of a head's pairs, as transformers makes them
//! (its `modeling_rope_utils`), in f32, so that angles are its own far out, too.

use std::f32::consts::PI;

use crate::reserve::collect;
use crate::{Error, Result};

/// Rotary positions of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Pair i of a head of D channels turns by theta^(-2 i / D) a position.
    pub theta: f32,
    /// What stretches positions beyond those that a model began with.
    pub scaling: RopeScaling,
}

/// How rotary positions are stretched.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// All alike: positions are divided by `factor`.
    Linear {
        /// From 1 on.
        factor: f32,
    },
    /// As Llama 3.1 has it: pairs that turn less than `low` times in `original_context` positions
    /// are divided by `factor`, those that turn more than `high` times stay, those between lie
    /// between.
    Llama3 {
        /// From 1 on.
        factor: f32,
        /// Turns below which a pair is stretched whole.
        low: f32,
        /// Turns above which it is not; more than `low`.
        high: f32,
        /// Positions that the model saw before.
        original_context: usize,
    },
}

impl Default for Rope {
    fn default() -> Self {
        Self { theta: 1e4, scaling: RopeScaling::None }
    }
}

impl Rope {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming what was expected and what came.
    pub(super) fn validate(&self) -> Result<()> {
        let least = |what, value: f32, least: f32| {
            if value >= least && value.is_finite() {
                return Ok(());
            }
            let message = match value.is_infinite() && value > 0.0 {
                true => format!("expected a number up to {:e}, got {value}", f32::MAX),
                false if least < 1.0 => format!("expected a number above 0, got {value}"),
                false => format!("expected a number from {least} on, got {value}"),
            };
            Err(Error::invalid(what, message))
        };
        least("rope_theta", self.theta, 1.0)?;
        match self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => least("rope_factor", factor, 1.0),
            RopeScaling::Llama3 { factor, low, high, original_context } => {
                least("rope_factor", factor, 1.0)?;
                least("rope_low_frequency", low, f32::MIN_POSITIVE)?;
                if !(high > low && high.is_finite()) {
                    let message =
                        format!("expected more than rope_low_frequency ({low}), got {high}");
                    return Err(Error::invalid("rope_high_frequency", message));
                }
                if original_context == 0 || original_context > 1 << 24 {
                    let message =
                        format!("expected a number from 1 to {}, got {original_context}", 1 << 24);
                    return Err(Error::invalid("rope_original_context", message));
                }
                Ok(())
            }
        }
    }

    /// What each pair of a head of `size` channels turns by a position.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(super) fn frequencies(&self, size: usize) -> Result<Vec<f32>> {
        let frequency = |pair: usize| {
            let exponent = (2 * pair) as f32 / size as f32;
            let power = libm::pow(self.theta.into(), exponent.into()) as f32;
            Ok(self.scaling.of(1.0 / power))
        };
        collect("the frequencies of rotary positions", (0..size / 2).map(frequency))
    }
}

impl RopeScaling {
    /// What it makes of a frequency.
    fn of(self, frequency: f32) -> f32 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low, high, original_context } => {
                let (context, length) = (original_context as f32, 2.0 * PI / frequency);
                if length > context / low {
                    return frequency / factor;
                }
                if length < context / high {
                    return frequency;
                }
                let smooth = (context / length - low) / (high - low);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_fall_from_one_to_theta() {
        let of = Rope { theta: 500_000.0, scaling: RopeScaling::None }.frequencies(64).unwrap();
        assert_eq!((of.len(), of[0]), (32, 1.0));
        assert!((f64::from(of[31]) / 500_000f64.powf(-62.0 / 64.0) - 1.0).abs() < 2e-7);
        assert!(of.windows(2).all(|pair| pair[1] < pair[0]));
    }

    /// Llama 3.2's, as transformers 5 makes them.
    #[test]
    fn llama_3_stretches_slow_pairs_alone() {
        let (factor, low, high) = (32.0, 1.0, 4.0);
        let scaling = RopeScaling::Llama3 { factor, low, high, original_context: 8192 };
        let plain = Rope { theta: 500_000.0, scaling: RopeScaling::None }.frequencies(64).unwrap();
        let of = Rope { theta: 500_000.0, scaling }.frequencies(64).unwrap();
        let turns = |i: usize| 8192.0 * plain[i] / (2.0 * PI);
        for i in 0..32 {
            let ratio = of[i] / plain[i];
            match turns(i) {
                t if t > high => assert_eq!(ratio, 1.0, "{i}"),
                t if t < low => assert!((ratio * factor - 1.0).abs() < 1e-6, "{i}"),
                _ => assert!(ratio < 1.0 && ratio > 1.0 / factor, "{i}: {ratio}"),
            }
        }
        assert!((0..32).any(|i| turns(i) > low && turns(i) < high), "some lie between");
    }
}
