//! Recipes: which number format each GEMM of a block's four linear layers uses.
//!
//! A recipe is data: a name stands for a row of a table, which expands to GEMMs of two operands
//! ([`LinearRecipe`]), and a switch is a function on these, for comparing what published work
//! disagrees on. Both are written in one string, which is also what a checkpoint stores:
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
//! Switches may come in any order; of one that comes twice the last value counts.
//!
//! | switch | values | meaning |
//! | --- | --- | --- |
//! | `g` | 32, 64, 128, 256 | group length of the transform (default 64) |
//! | `signs` | `random`, `fixed` | fresh signs for each GEMM call, or the same for all |
//! | `range` | `1`, `3/4` | how much of its range nearest rounding uses; in 3/4 nothing saturates |
//! | `dgrad`, `wgrad` | `bf16` | that GEMM in bf16, the other stays in MXFP4 |
//! | `sr` | `both`, `dy`, `other` | which operand is rounded stochastically |
//! | `bf16-last-layers` | a count | the last N blocks run their backward pass in bf16 |
//! | `bf16-last-steps` | a fraction | the last part of the schedule's steps runs backward in bf16 |

use std::fmt;
use std::str::FromStr;

use crate::backend::{Precision, StepPlan};
use crate::formats::{
    Format, Gemm, GemmId, LinearRecipe, Operand, OperandId, Range, Rounding, Signs, Transform,
};
use crate::reserve::collect;
use crate::{Error, Result};

/// Which number format every GEMM of a linear layer uses. `Default` is `mxfp4-rht-sr`.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    name: &'static str,
    /// What layers and steps use, and what those use that fall back to bf16.
    linear: [LinearRecipe; 2],
    bf16_last_layers: usize,
    bf16_last_steps: f64,
}

/// What a name stands for.
struct Row {
    name: &'static str,
    /// x and W forward.
    forward: Operand,
    /// dy and W backward.
    backward: Operand,
    /// x backward.
    x: Operand,
}

const NEAREST: Operand = Operand::mxfp4(Rounding::Nearest, None);
const RHT: Operand = Operand::mxfp4(Rounding::Nearest, Some(Transform::DEFAULT));
const SR: Operand = Operand::mxfp4(Rounding::Unbiased, None);
const RHT_SR: Operand = Operand::mxfp4(Rounding::Unbiased, Some(Transform::DEFAULT));

/// All recipes, plainest first.
const TABLE: [Row; 7] = [
    row("fp32", Operand::F32, Operand::F32),
    row("bf16", Operand::BF16, Operand::BF16),
    row("mxfp4", Operand::BF16, NEAREST),
    row("mxfp4-rht", Operand::BF16, RHT),
    row("mxfp4-sr", Operand::BF16, SR),
    row("mxfp4-rht-sr", Operand::BF16, RHT_SR),
    Row { x: RHT_SR.from_forward(), ..row("fp8-mxfp4-rht-sr", Operand::E4M3, RHT_SR) },
];

const fn row(name: &'static str, forward: Operand, backward: Operand) -> Row {
    Row { name, forward, backward, x: backward }
}

impl Recipe {
    /// Names of all recipes, plainest first.
    pub const NAMES: [&str; TABLE.len()] = {
        let (mut names, mut i) = ([""; TABLE.len()], 0);
        while i < names.len() {
            names[i] = TABLE[i].name;
            i += 1;
        }
        names
    };

    /// Everything in f32.
    pub(crate) const FP32: Self = Self {
        name: TABLE[0].name,
        linear: [LinearRecipe::F32; 2],
        bf16_last_layers: 0,
        bf16_last_steps: 0.0,
    };

    /// The formats of all layers and steps that no exception takes.
    pub fn linear(&self) -> &LinearRecipe {
        &self.linear[0]
    }

    /// All that layers may use in some step, and what they could fall back to.
    pub fn all(&self) -> &[LinearRecipe] {
        &self.linear
    }

    /// The last N blocks run their backward GEMMs in bf16.
    pub fn bf16_last_layers(&self) -> usize {
        self.bf16_last_layers
    }

    /// The last part of the schedule's steps, 0 to 1, runs its backward GEMMs in bf16.
    pub fn bf16_last_steps(&self) -> f64 {
        self.bf16_last_steps
    }

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
        let in_last_layers = layer.saturating_add(self.bf16_last_layers) >= layers;
        let falls_back = in_last_layers || self.is_in_last_steps(step, total_steps);
        self.linear[usize::from(falls_back)]
    }

    /// What passes over `layers` blocks depend on; [`Recipe::set_step`] moves it on.
    pub(crate) fn step_plan(&self, layers: usize) -> Result<StepPlan> {
        let formats = (0..layers).map(|layer| Ok(self.for_layer(layer, layers, 0, 0)));
        Ok(StepPlan {
            accumulate: false,
            precision: Precision::of(self.linear().forward()),
            layers: collect("the formats of the blocks", formats)?,
        })
    }

    /// Makes `plan` that of a micro-step in step `step` (of `total_steps`).
    pub(crate) fn set_step(
        &self,
        plan: &mut StepPlan,
        micro_step: usize,
        step: u64,
        total_steps: u64,
    ) {
        plan.accumulate = micro_step > 0;
        let layers = plan.layers.len();
        for (layer, formats) in plan.layers.iter_mut().enumerate() {
            *formats = self.for_layer(layer, layers, step, total_steps);
        }
    }

    fn named(name: &str) -> Result<Self> {
        let Some(row) = TABLE.iter().find(|row| row.name == name) else {
            let names = Self::NAMES.join(", ");
            return Err(Error::invalid("recipe", format!("expected one of {names}; got {name:?}")));
        };
        let [forward, dgrad] = [row.forward, row.backward].map(Gemm::of);
        let linear = LinearRecipe::new(forward, dgrad, Gemm::new(row.backward, row.x)?)?;
        Self { name: row.name, ..Self::FP32 }.with_linear(linear)
    }

    fn with_linear(&self, linear: LinearRecipe) -> Result<Self> {
        let in_bf16 = linear.change_mxfp4(|_, _, operand| Ok(operand.in_bf16()))?;
        Ok(Self { linear: [linear, in_bf16], ..self.clone() })
    }

    /// The same with other operands for those in MXFP4.
    fn change(
        &self,
        change: impl Fn(GemmId, OperandId, Operand) -> Result<Operand>,
    ) -> Result<Self, Refused> {
        Ok(self.with_linear(self.linear().change_mxfp4(change)?)?)
    }

    fn with_transform(&self, group: usize, signs: Signs) -> Result<Self, Refused> {
        let transform = Transform::new(group, signs)?;
        self.change(|_, _, operand| operand.with_transform(transform))
    }

    /// The same with `gemm` in bf16, if that leaves another in MXFP4.
    fn with_bf16_in(&self, gemm: GemmId, value: &str) -> Result<Self, Refused> {
        self.mxfp4()?;
        if value != "bf16" {
            return Err(Refused::Expected("bf16"));
        }
        let recipe = self.change(|id, _, o| Ok(if id == gemm { o.in_bf16() } else { o }))?;
        if recipe.mxfp4().is_err() {
            let message = "dgrad=bf16,wgrad=bf16 leaves nothing in MXFP4; use bf16";
            return Err(Error::invalid("recipe", message).into());
        }
        Ok(recipe)
    }

    /// A GEMM in MXFP4.
    fn mxfp4(&self) -> Result<&Gemm, Refused> {
        let gemm = self.linear().backward().into_iter().find(|g| g.format() == Format::MXFP4);
        gemm.ok_or(Refused::HasNo("MXFP4 GEMM"))
    }

    /// The transform of all GEMMs in MXFP4.
    fn transform(&self) -> Result<Transform, Refused> {
        let transform = self.mxfp4().ok().and_then(Gemm::transform);
        transform.ok_or(Refused::HasNo("transform"))
    }

    /// Of a switch that turns a GEMM of the name's to bf16.
    fn shown_as_bf16(&self, gemm: &Gemm) -> Option<String> {
        (self.mxfp4().is_ok() && gemm.format() == Format::BF16).then(|| "bf16".into())
    }
}

/// A function on recipes, with a value.
struct Switch {
    key: &'static str,
    apply: fn(&Recipe, &str) -> Result<Recipe, Refused>,
    /// The value that it was given, unless that changes nothing.
    show: fn(&Recipe) -> Option<String>,
}

/// Why a switch was not applied.
enum Refused {
    /// It takes other values.
    Expected(&'static str),
    /// The recipe lacks what it changes.
    HasNo(&'static str),
    Error(Error),
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// All switches, in the order in which they are written.
const SWITCHES: [Switch; 8] = [
    Switch {
        key: "g",
        apply: |recipe, value| {
            let signs = recipe.transform()?.signs();
            let group = match value {
                "32" => 32,
                "64" => 64,
                "128" => 128,
                "256" => 256,
                _ => return Err(Refused::Expected("32, 64, 128 or 256")),
            };
            recipe.with_transform(group, signs)
        },
        show: |recipe| {
            let group = recipe.transform().ok()?.group();
            (group != Transform::DEFAULT.group()).then(|| group.to_string())
        },
    },
    Switch {
        key: "signs",
        apply: |recipe, value| {
            let group = recipe.transform()?.group();
            let signs = match value {
                "random" => Signs::Random,
                "fixed" => Signs::Fixed,
                _ => return Err(Refused::Expected("random or fixed")),
            };
            recipe.with_transform(group, signs)
        },
        show: |recipe| (recipe.transform().ok()?.signs() == Signs::Fixed).then(|| "fixed".into()),
    },
    Switch {
        key: "sr",
        apply: |recipe, value| {
            let gemm = recipe.mxfp4()?;
            if [gemm.a(), gemm.b()].iter().all(|o| o.rounding() == Rounding::Nearest) {
                return Err(Refused::HasNo("stochastic rounding"));
            }
            let (dy, other) = match value {
                "both" => (Rounding::Unbiased, Rounding::Unbiased),
                "dy" => (Rounding::Unbiased, Rounding::Nearest),
                "other" => (Rounding::Nearest, Rounding::Unbiased),
                _ => return Err(Refused::Expected("both, dy or other")),
            };
            recipe.change(|_, id, operand| {
                operand.with_rounding(if id == OperandId::Dy { dy } else { other })
            })
        },
        show: |recipe| {
            let gemm = recipe.mxfp4().ok()?;
            match (gemm.a().rounding(), gemm.b().rounding()) {
                (Rounding::Unbiased, Rounding::Nearest) => Some("dy".into()),
                (Rounding::Nearest, Rounding::Unbiased) => Some("other".into()),
                _ => None,
            }
        },
    },
    Switch {
        key: "range",
        apply: |recipe, value| {
            let gemm = recipe.mxfp4()?;
            if [gemm.a(), gemm.b()].iter().all(|o| o.rounding() == Rounding::Unbiased) {
                return Err(Refused::HasNo("rounding to nearest"));
            }
            let range = match value {
                "1" => Range::Full,
                "3/4" => Range::ThreeQuarters,
                _ => return Err(Refused::Expected("1 or 3/4")),
            };
            recipe.change(|_, _, operand| match operand.rounding() {
                Rounding::Nearest => operand.with_range(range),
                Rounding::Unbiased => Ok(operand),
            })
        },
        show: |recipe| {
            let gemm = recipe.mxfp4().ok()?;
            let differs = |o: &&Operand| o.range() != Operand::from(o.rounding()).range();
            [gemm.a(), gemm.b()].iter().any(differs).then(|| "3/4".into())
        },
    },
    Switch {
        key: "dgrad",
        apply: |recipe, value| recipe.with_bf16_in(GemmId::Dgrad, value),
        show: |recipe| recipe.shown_as_bf16(recipe.linear().dgrad()),
    },
    Switch {
        key: "wgrad",
        apply: |recipe, value| recipe.with_bf16_in(GemmId::Wgrad, value),
        show: |recipe| recipe.shown_as_bf16(recipe.linear().wgrad()),
    },
    Switch {
        key: "bf16-last-layers",
        apply: |recipe, value| {
            let bf16_last_layers = value.parse().map_err(|_| Refused::Expected("a count"))?;
            if bf16_last_layers > 0 {
                recipe.mxfp4()?;
            }
            Ok(Recipe { bf16_last_layers, ..recipe.clone() })
        },
        show: |recipe| (recipe.bf16_last_layers > 0).then(|| recipe.bf16_last_layers.to_string()),
    },
    Switch {
        key: "bf16-last-steps",
        apply: |recipe, value| {
            let fraction = value.parse().map_err(|_| Refused::Expected("a fraction"))?;
            if !(0.0..=1.0).contains(&fraction) {
                return Err(Refused::Expected("a fraction from 0 to 1"));
            }
            if fraction > 0.0 {
                recipe.mxfp4()?;
            }
            Ok(Recipe { bf16_last_steps: fraction, ..recipe.clone() })
        },
        show: |recipe| (recipe.bf16_last_steps > 0.0).then(|| recipe.bf16_last_steps.to_string()),
    },
];

impl Default for Recipe {
    fn default() -> Self {
        Self::named("mxfp4-rht-sr").expect("the default's name is in the table")
    }
}

impl FromStr for Recipe {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let mut parts = s.split(',').map(str::trim);
        let mut recipe = Self::named(parts.next().unwrap_or_default())?;
        let mut values = [None; SWITCHES.len()];
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| {
                Error::invalid("recipe", format!("expected a switch like g=64, got {part:?}"))
            })?;
            let (key, value) = (key.trim(), value.trim());
            let Some(switch) = SWITCHES.iter().position(|switch| switch.key == key) else {
                let known = SWITCHES.map(|switch| switch.key).join(", ");
                let message = format!("unknown switch {key:?}; known are {known}");
                return Err(Error::invalid("recipe", message));
            };
            values[switch] = Some(value);
        }
        for (switch, value) in SWITCHES.iter().zip(values) {
            let (key, Some(value)) = (switch.key, value) else { continue };
            recipe = (switch.apply)(&recipe, value).map_err(|refused| {
                let message = match refused {
                    Refused::Expected(what) => format!("{key}: expected {what}, got {value:?}"),
                    Refused::HasNo(what) => format!("{key}: {} has no {what}", recipe.name),
                    Refused::Error(error) => return error,
                };
                Error::invalid("recipe", message)
            })?;
        }
        Ok(recipe)
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        for Switch { key, show, .. } in &SWITCHES {
            if let Some(value) = show(self) {
                write!(f, ",{key}={value}")?;
            }
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
            "mxfp4,range=3/4",
            "mxfp4-rht,g=32,range=3/4,wgrad=bf16",
            "mxfp4-rht-sr,sr=dy,range=3/4",
        ];
        for s in Recipe::NAMES.into_iter().chain(switched) {
            assert_eq!(s.parse::<Recipe>().unwrap().to_string(), s);
        }
        assert_eq!(Recipe::default().to_string(), "mxfp4-rht-sr");
        for (long, short) in [
            ("mxfp4-rht,g=64,signs=random,range=1", "mxfp4-rht"),
            ("mxfp4-rht , range=3/4 ,g=32", "mxfp4-rht,g=32,range=3/4"),
            ("mxfp4,range=3/4,range=1", "mxfp4"),
            ("mxfp4-sr,sr=other,sr=both", "mxfp4-sr"),
            ("mxfp4-rht-sr,range=3/4,sr=dy", "mxfp4-rht-sr,sr=dy,range=3/4"),
            ("mxfp4-rht-sr,sr=dy,range=3/4,sr=other", "mxfp4-rht-sr,sr=other,range=3/4"),
        ] {
            let recipe = long.parse::<Recipe>().unwrap();
            assert_eq!((recipe.to_string().as_str(), &recipe), (short, &short.parse().unwrap()));
        }
    }

    #[test]
    fn a_wrong_recipe_says_what_is_wrong() {
        for (s, part) in [
            ("fp4", "expected one of fp32"),
            ("mxfp4-rht-sr,g=48", "32, 64, 128 or 256"),
            ("mxfp4,g=64", "no transform"),
            ("bf16,sr=dy", "no MXFP4 GEMM"),
            ("mxfp4-rht,sr=dy", "no stochastic rounding"),
            ("mxfp4-rht-sr,range=3/4", "range: mxfp4-rht-sr has no rounding to nearest"),
            ("bf16,range=3/4", "range: bf16 has no MXFP4 GEMM"),
            ("mxfp4,range=0.75", "range: expected 1 or 3/4, got \"0.75\""),
            ("mxfp4,dgrad=bf16,wgrad=bf16", "nothing in MXFP4"),
            ("mxfp4,bf16-last-steps=2", "from 0 to 1"),
            ("fp32,bf16-last-layers=2", "bf16-last-layers: fp32 has no MXFP4 GEMM"),
            ("bf16,bf16-last-steps=0.1", "bf16-last-steps: bf16 has no MXFP4 GEMM"),
            ("mxfp4,colour=red", "known are g, signs, sr, range, dgrad, wgrad, bf16-last-layers"),
        ] {
            let error = s.parse::<Recipe>().unwrap_err().to_string();
            assert!(error.contains(part), "{s}: {error}");
        }
    }

    #[test]
    fn last_layers_and_last_steps_fall_back_to_bf16() {
        let r: Recipe = "mxfp4,bf16-last-layers=1,bf16-last-steps=0.25".parse().unwrap();
        let is_bf16 =
            |layer, step| r.for_layer(layer, 3, step, 100).dgrad().format() == Format::BF16;
        assert!(!is_bf16(0, 0) && !is_bf16(1, 74));
        assert!(is_bf16(2, 0) && is_bf16(0, 75));
        let all: Recipe = format!("mxfp4,bf16-last-layers={}", usize::MAX).parse().unwrap();
        assert!((0..3).all(|layer| all.for_layer(layer, 3, 0, 0).dgrad().format() == Format::BF16));
    }
}
