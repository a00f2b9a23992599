//! Recipes: which number format each GEMM of a block's four linear layers uses.
//!
//! A recipe is data. It has a name (the table below) and switches for comparing what published
//! work disagrees on; both are written in one string, which is also what a checkpoint stores:
//!
//! ```text
//! mxfp4-rht-sr                       the default
//! mxfp4-rht-sr,g=128,wgrad=bf16      groups of 128, only dgrad in MXFP4
//! ```
//!
//! | name | forward | backward |
//! | --- | --- | --- |
//! | `fp32` | f32 | f32 |
//! | `bf16` | bf16 | bf16 |
//! | `mxfp4` | bf16 | MXFP4, nearest |
//! | `mxfp4-rht` | bf16 | random Hadamard transform, nearest |
//! | `mxfp4-sr` | bf16 | unbiased (stochastic) |
//! | `mxfp4-rht-sr` | bf16 | random Hadamard transform, unbiased |
//! | `fp8-mxfp4-rht-sr` | FP8 E4M3 | random Hadamard transform, unbiased |
//!
//! | switch | values | meaning |
//! | --- | --- | --- |
//! | `g` | 32, 64, 128, 256 | group length of the transform (default 64) |
//! | `signs` | `random`, `fixed` | fresh signs for each GEMM call, or the same for all |
//! | `dgrad`, `wgrad` | `bf16` | that GEMM in bf16, the other stays in MXFP4 |
//! | `sr` | `both`, `dy`, `other` | which operand is rounded stochastically |
//! | `bf16-last-layers` | a count | the last N blocks run their backward pass in bf16 |
//! | `bf16-last-steps` | a fraction | the last part of the schedule's steps runs backward in bf16 |

use std::fmt;
use std::str::FromStr;

use crate::mx::Rounding;
use crate::{Error, Result};

/// Number format of the forward GEMMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    /// f32 operands.
    F32,
    /// Operands rounded to bf16, f32 accumulation.
    Bf16,
    /// Operands in FP8 E4M3 with one power-of-two scale a tensor ("current scaling"), f32
    /// accumulation. The weight gradient then sees the activations as FP8 kept them.
    Fp8,
}

/// Number format of one backward GEMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backward {
    /// f32 operands.
    F32,
    /// Operands rounded to bf16, f32 accumulation.
    Bf16,
    /// Both operands in MXFP4.
    Mxfp4(Mxfp4),
}

/// How the operands of an MXFP4 GEMM are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mxfp4 {
    /// Rounding of the output gradient dy.
    pub dy: Rounding,
    /// Rounding of the other operand: W in dgrad, x in wgrad.
    pub other: Rounding,
    /// The random Hadamard transform along the reduction dimension, if any.
    pub transform: Option<Transform>,
}

/// The random Hadamard transform of a GEMM's operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transform {
    /// Group length: 32, 64, 128 or 256.
    pub group: usize,
    /// Whether every GEMM call draws fresh signs.
    pub signs: Signs,
}

/// Where the signs of the transform come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signs {
    /// Fresh signs for every (step, micro-step, layer, GEMM).
    Random,
    /// One sign vector for the whole run.
    Fixed,
}

/// Which number format every GEMM of a linear layer uses. `Default` is `mxfp4-rht-sr`.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// y = x W^T + b.
    pub forward: Forward,
    /// dx = dy W.
    pub dgrad: Backward,
    /// dW = dy^T x.
    pub wgrad: Backward,
    /// The last N blocks run their backward GEMMs in bf16.
    pub bf16_last_layers: usize,
    /// The last part of the schedule's steps, 0 to 1, runs its backward GEMMs in bf16.
    pub bf16_last_steps: f64,
}

/// The recipe of the linear layers of one block in one step: what a backend sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearRecipe {
    /// y = x W^T + b.
    pub forward: Forward,
    /// dx = dy W.
    pub dgrad: Backward,
    /// dW = dy^T x.
    pub wgrad: Backward,
}

impl Recipe {
    /// Names of the seven recipes, plainest first.
    pub const NAMES: [&str; 7] =
        ["fp32", "bf16", "mxfp4", "mxfp4-rht", "mxfp4-sr", "mxfp4-rht-sr", "fp8-mxfp4-rht-sr"];

    /// Everything in f32.
    pub(crate) const FP32: Self = Self {
        forward: Forward::F32,
        dgrad: Backward::F32,
        wgrad: Backward::F32,
        bf16_last_layers: 0,
        bf16_last_steps: 0.0,
    };

    /// Whether step `step` (of `total_steps`, 0 where not known) is one of those that
    /// `bf16_last_steps` concerns.
    pub(crate) fn is_in_last_steps(&self, step: u64, total_steps: u64) -> bool {
        self.bf16_last_steps > 0.0
            && total_steps > 0
            && step as f64 >= (1.0 - self.bf16_last_steps) * total_steps as f64
    }

    /// The formats of block `layer` (of `layers`) in step `step` (of `total_steps`, where 0 means
    /// that the end is not known and `bf16_last_steps` has no effect).
    pub fn for_layer(
        &self,
        layer: usize,
        layers: usize,
        step: u64,
        total_steps: u64,
    ) -> LinearRecipe {
        let last_layers = layer.saturating_add(self.bf16_last_layers) >= layers;
        let last_steps = self.is_in_last_steps(step, total_steps);
        let pick = |gemm| match gemm {
            Backward::Mxfp4(_) if last_layers || last_steps => Backward::Bf16,
            gemm => gemm,
        };
        LinearRecipe { forward: self.forward, dgrad: pick(self.dgrad), wgrad: pick(self.wgrad) }
    }

    /// Whether any GEMM is in MXFP4.
    pub fn uses_mxfp4(&self) -> bool {
        [self.dgrad, self.wgrad].iter().any(|g| matches!(g, Backward::Mxfp4(_)))
    }

    /// The length that MXFP4 GEMMs pad their reduction dimension to a multiple of; None where no GEMM
    /// is in MXFP4.
    pub(crate) fn mxfp4_group(&self) -> Option<usize> {
        self.mxfp4().map(|m| m.transform.map_or(crate::mx::BLOCK, |t| t.group))
    }

    /// Whether any backward GEMM is in f32.
    pub(crate) fn uses_f32_backward(&self) -> bool {
        [self.dgrad, self.wgrad].contains(&Backward::F32)
    }

    fn named(name: &str) -> Option<Self> {
        let transform = Some(Transform { group: 64, signs: Signs::Random });
        let mx = |rounding, transform| {
            Backward::Mxfp4(Mxfp4 { dy: rounding, other: rounding, transform })
        };
        let (forward, backward) = match name {
            "fp32" => (Forward::F32, Backward::F32),
            "bf16" => (Forward::Bf16, Backward::Bf16),
            "mxfp4" => (Forward::Bf16, mx(Rounding::Nearest, None)),
            "mxfp4-rht" => (Forward::Bf16, mx(Rounding::Nearest, transform)),
            "mxfp4-sr" => (Forward::Bf16, mx(Rounding::Unbiased, None)),
            "mxfp4-rht-sr" => (Forward::Bf16, mx(Rounding::Unbiased, transform)),
            "fp8-mxfp4-rht-sr" => (Forward::Fp8, mx(Rounding::Unbiased, transform)),
            _ => return None,
        };
        Some(Self {
            forward,
            dgrad: backward,
            wgrad: backward,
            bf16_last_layers: 0,
            bf16_last_steps: 0.0,
        })
    }

    /// The MXFP4 settings, which both backward GEMMs share.
    fn mxfp4(&self) -> Option<Mxfp4> {
        [self.dgrad, self.wgrad].into_iter().find_map(|gemm| match gemm {
            Backward::Mxfp4(m) => Some(m),
            _ => None,
        })
    }

    /// The name in [`Recipe::NAMES`] whose switches give this recipe.
    fn base_name(&self) -> &'static str {
        match (self.forward, self.mxfp4()) {
            (Forward::F32, _) => "fp32",
            (Forward::Fp8, _) => "fp8-mxfp4-rht-sr",
            (Forward::Bf16, None) => "bf16",
            (Forward::Bf16, Some(m)) => {
                let unbiased = m.dy == Rounding::Unbiased || m.other == Rounding::Unbiased;
                match (m.transform.is_some(), unbiased) {
                    (false, false) => "mxfp4",
                    (true, false) => "mxfp4-rht",
                    (false, true) => "mxfp4-sr",
                    (true, true) => "mxfp4-rht-sr",
                }
            }
        }
    }

    fn apply(&mut self, key: &str, value: &str) -> Result<()> {
        let bad = |expected: &str| {
            Error::invalid("recipe", format!("{key}: expected {expected}, got {value:?}"))
        };
        let needs = |wanted: &str| {
            let name = self.base_name();
            Error::invalid("recipe", format!("{key}: {name} has no {wanted}"))
        };
        match key {
            "g" | "signs" => {
                let mut transform =
                    self.mxfp4().and_then(|m| m.transform).ok_or_else(|| needs("transform"))?;
                match (key, value) {
                    ("g", "32" | "64" | "128" | "256") => {
                        transform.group = value.parse().map_err(|_| bad("a number"))?;
                    }
                    ("g", _) => return Err(bad("32, 64, 128 or 256")),
                    (_, "random") => transform.signs = Signs::Random,
                    (_, "fixed") => transform.signs = Signs::Fixed,
                    _ => return Err(bad("random or fixed")),
                }
                self.change_mxfp4(|m| m.transform = Some(transform));
            }
            "sr" => {
                let m = self.mxfp4().ok_or_else(|| needs("MXFP4 GEMM"))?;
                if m.dy != Rounding::Unbiased && m.other != Rounding::Unbiased {
                    return Err(needs("stochastic rounding"));
                }
                let (dy, other) = match value {
                    "both" => (Rounding::Unbiased, Rounding::Unbiased),
                    "dy" => (Rounding::Unbiased, Rounding::Nearest),
                    "other" => (Rounding::Nearest, Rounding::Unbiased),
                    _ => return Err(bad("both, dy or other")),
                };
                self.change_mxfp4(|m| (m.dy, m.other) = (dy, other));
            }
            "dgrad" | "wgrad" => {
                if self.mxfp4().is_none() {
                    return Err(needs("MXFP4 GEMM"));
                }
                if value != "bf16" {
                    return Err(bad("bf16"));
                }
                let gemm = if key == "dgrad" { &mut self.dgrad } else { &mut self.wgrad };
                *gemm = Backward::Bf16;
                if !self.uses_mxfp4() {
                    let message = "dgrad=bf16,wgrad=bf16 leaves nothing in MXFP4; use bf16";
                    return Err(Error::invalid("recipe", message));
                }
            }
            "bf16-last-layers" => {
                self.bf16_last_layers = value.parse().map_err(|_| bad("a count"))?;
            }
            "bf16-last-steps" => {
                let fraction: f64 = value.parse().map_err(|_| bad("a fraction"))?;
                if !(0.0..=1.0).contains(&fraction) {
                    return Err(bad("a fraction from 0 to 1"));
                }
                self.bf16_last_steps = fraction;
            }
            _ => {
                let known = "g, signs, sr, dgrad, wgrad, bf16-last-layers, bf16-last-steps";
                let message = format!("unknown switch {key:?}; known are {known}");
                return Err(Error::invalid("recipe", message));
            }
        }
        Ok(())
    }

    fn change_mxfp4(&mut self, change: impl Fn(&mut Mxfp4)) {
        for gemm in [&mut self.dgrad, &mut self.wgrad] {
            if let Backward::Mxfp4(m) = gemm {
                change(m);
            }
        }
    }
}

impl Default for Recipe {
    fn default() -> Self {
        Self::named("mxfp4-rht-sr").expect("the default's name is in the table")
    }
}

impl FromStr for Recipe {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let mut parts = s.split(',').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let mut recipe = Self::named(name).ok_or_else(|| {
            let names = Self::NAMES.join(", ");
            Error::invalid("recipe", format!("expected one of {names}; got {name:?}"))
        })?;
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| {
                Error::invalid("recipe", format!("expected a switch like g=64, got {part:?}"))
            })?;
            recipe.apply(key.trim(), value.trim())?;
        }
        Ok(recipe)
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.base_name())?;
        if let Some(m) = self.mxfp4() {
            if let Some(t) = m.transform {
                if t.group != 64 {
                    write!(f, ",g={}", t.group)?;
                }
                if t.signs == Signs::Fixed {
                    f.write_str(",signs=fixed")?;
                }
            }
            match (m.dy, m.other) {
                (Rounding::Unbiased, Rounding::Nearest) => f.write_str(",sr=dy")?,
                (Rounding::Nearest, Rounding::Unbiased) => f.write_str(",sr=other")?,
                _ => {}
            }
            for (name, gemm) in [("dgrad", self.dgrad), ("wgrad", self.wgrad)] {
                if gemm == Backward::Bf16 {
                    write!(f, ",{name}=bf16")?;
                }
            }
        }
        if self.bf16_last_layers > 0 {
            write!(f, ",bf16-last-layers={}", self.bf16_last_layers)?;
        }
        if self.bf16_last_steps > 0.0 {
            write!(f, ",bf16-last-steps={}", self.bf16_last_steps)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_and_switch_survives_a_round_trip() {
        let switched = [
            "mxfp4-rht-sr,g=128,signs=fixed,sr=dy,wgrad=bf16",
            "mxfp4-sr,sr=other,bf16-last-layers=2,bf16-last-steps=0.1",
            "fp8-mxfp4-rht-sr,g=32,dgrad=bf16",
        ];
        for s in Recipe::NAMES.into_iter().chain(switched) {
            assert_eq!(s.parse::<Recipe>().unwrap().to_string(), s);
        }
        assert_eq!(Recipe::default().to_string(), "mxfp4-rht-sr");
    }

    #[test]
    fn a_wrong_recipe_says_what_is_wrong() {
        for (s, part) in [
            ("fp4", "expected one of fp32"),
            ("mxfp4-rht-sr,g=48", "32, 64, 128 or 256"),
            ("mxfp4,g=64", "no transform"),
            ("bf16,sr=dy", "no MXFP4 GEMM"),
            ("mxfp4-rht,sr=dy", "no stochastic rounding"),
            ("mxfp4,dgrad=bf16,wgrad=bf16", "nothing in MXFP4"),
            ("mxfp4,bf16-last-steps=2", "from 0 to 1"),
            ("mxfp4,colour=red", "unknown switch"),
        ] {
            let error = s.parse::<Recipe>().unwrap_err().to_string();
            assert!(error.contains(part), "{s}: {error}");
        }
    }

    #[test]
    fn last_layers_and_last_steps_fall_back_to_bf16() {
        let r: Recipe = "mxfp4,bf16-last-layers=1,bf16-last-steps=0.25".parse().unwrap();
        let is_bf16 = |layer, step| r.for_layer(layer, 3, step, 100).dgrad == Backward::Bf16;
        assert!(!is_bf16(0, 0) && !is_bf16(1, 74));
        assert!(is_bf16(2, 0) && is_bf16(0, 75));
        let all: Recipe = format!("mxfp4,bf16-last-layers={}", usize::MAX).parse().unwrap();
        assert!((0..3).all(|layer| all.for_layer(layer, 3, 0, 0).dgrad == Backward::Bf16));
    }
}
