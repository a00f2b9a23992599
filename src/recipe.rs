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
//! [`Recipe::NAMES`] has all names; README and docs/recipes.md say what they stand for, and
//! `mxtrain recipes` prints it.
//!
//! Switches may come in any order; of one that comes twice the last value counts.
//!
//! | switch | values | meaning |
//! | --- | --- | --- |
//! | `g` | 16, 32, 64, 128, 256 | group length of the transform |
//! | `signs` | `random`, `fixed`, `nvidia`, `plain` | fresh signs for each GEMM call, the same for all, or none |
//! | `rht` | `off`, `wgrad`, `bwd`, `all` | which GEMMs are transformed |
//! | `sr` | `both`, `dy`, `dy+x`, `other`, `off` | which operand is rounded stochastically |
//! | `range` | `1`, `3/4` | how much of its range MXFP4 uses; in 3/4 nothing saturates |
//! | `unbias` | `tensor`, `off` | divide products by what rounding to nearest shrinks their operands to |
//! | `headroom` | `1`, `17/16` | whether NVFP4's scales leave room for their own rounding |
//! | `46` | `fwd`, `off` | four over six: two scales to choose from, in the forward pass |
//! | `scale`, `scale-fwd` | `floor`, `ceil`, `even`, `quest`, `quest-floor` | MXFP4's rule of the scale |
//! | `w` | `1d`, `2d` | scales of W for blocks, or for squares |
//! | `outer` | `f32`, `power` | NVFP4's scales of 128 elements |
//! | `from` | `x`, `q` | backward operands of the tensor, or of what the forward pass made of it |
//! | `ema` | above 0, below 1 | decay of the slow mean that W in the forward pass is rounded by |
//! | `reset` | `PERIOD:TRACK:THRESHOLD@START` | when weights that oscillate are put onto their grid |
//! | `mantissa` | `1` to `7`, `1t` to `7t` | bits of mantissa that bf16 keeps; with t others are cut |
//! | `fp8` | `qkv`, `proj`, `fc1`, `fc2`, joined by `+`, or `none` | layers with a forward pass in FP8 |
//! | `dge` | a steepness from 1 to 255, `off` | the estimator that W's gradient is multiplied by |
//! | `occ` | a share like `0.99`, `off` | what lies beyond these quantiles of x's rows stays in bf16 |
//! | `haste` | 1 to 64 | bits of the hashes that x's channels are merged by, in evaluations alone |
//! | `fwd`, `dgrad`, `wgrad` | `bf16`, `fp8` | that GEMM in bf16, or in FP8 as in `fp8` |
//! | `bf16-first-layers`, `bf16-last-layers` | a count | blocks that run in bf16 |
//! | `bf16-last-steps` | a fraction | the last part of the schedule's steps that runs in bf16 |
//! | `bf16-layers-pass`, `bf16-steps-pass` | `bwd`, `fwd`, `all` | which passes of those do |
//!
//! `fwd`, `dgrad` and `wgrad` come before all others, which say nothing of a GEMM in bf16 or FP8
//! then. `g` and `signs` are those of the backward pass: a forward pass that is rotated, by
//! `rht=all`, is so in groups of 32 without signs, because an evaluation has no step to draw them for.

use std::fmt;
use std::str::FromStr;

use crate::backend::{Precision, StepPlan};
use crate::formats::{
    EMA_FROM_STEP, Element, Format, Gemm, GemmId, Kept, LINEAR_NAMES, LINEARS, LinearRecipe,
    MAX_HASHES, Nvfp4Scale, Operand, OperandId, OperandSource, Outer, PowerRule, Range, Reset,
    Rounding, Scale, Signs, Transform,
};
use crate::reserve::collect;
use crate::{Error, Result};

/// Which number format every GEMM of a linear layer uses. `Default` is `mxfp4-rht-sr`.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    name: &'static str,
    linears: [LinearRecipe; LINEARS],
    exceptions: Exceptions,
    /// Decay of the slow means of weights.
    ema: Option<f32>,
    reset: Option<Reset>,
    /// Bits of the hashes by which an evaluation merges channels.
    haste: Option<usize>,
}

/// Layers and steps that run in bf16.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Exceptions {
    first_layers: usize,
    last_layers: Layers,
    last_steps: f64,
    of_layers: Passes,
    of_steps: Passes,
}

/// How many of a model's blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layers {
    Count(usize),
    /// This share of them, to the nearest number.
    Share(f64),
}

/// Passes that an exception is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passes {
    Backward,
    Forward,
    All,
}

impl Layers {
    fn of(self, layers: usize) -> usize {
        match self {
            Self::Count(n) => n,
            Self::Share(share) => (share * layers as f64).round() as usize,
        }
    }
}

impl Passes {
    const ALL: [(&str, Self); 3] =
        [("bwd", Self::Backward), ("fwd", Self::Forward), ("all", Self::All)];

    const fn forward(self) -> bool {
        matches!(self, Self::Forward | Self::All)
    }

    const fn backward(self) -> bool {
        matches!(self, Self::Backward | Self::All)
    }

    fn name(self) -> String {
        let named = Self::ALL.iter().find(|(_, passes)| *passes == self);
        named.map_or_else(String::new, |(name, _)| (*name).into())
    }
}

/// What a name stands for.
struct Row {
    name: &'static str,
    /// x and W.
    forward: [Operand; 2],
    /// dy and W.
    dgrad: [Operand; 2],
    /// dy and x.
    wgrad: [Operand; 2],
    /// Linear layers whose forward pass is in FP8 E4M3 instead.
    fp8: [bool; LINEARS],
    exceptions: Exceptions,
}

const NONE: Exceptions = Exceptions {
    first_layers: 0,
    last_layers: Layers::Count(0),
    last_steps: 0.0,
    of_layers: Passes::Backward,
    of_steps: Passes::Backward,
};

const fn row(name: &'static str, forward: Operand, backward: Operand) -> Row {
    const fn both(operand: Operand) -> [Operand; 2] {
        [operand; 2]
    }
    let (forward, dgrad, wgrad) = (both(forward), both(backward), both(backward));
    Row { name, forward, dgrad, wgrad, fp8: [false; LINEARS], exceptions: NONE }
}

/// What falls back to bf16 in a recipe whose forward pass is in 4 bits does so in all passes.
const fn whole(row: Row) -> Row {
    let exceptions = Exceptions { of_layers: Passes::All, of_steps: Passes::All, ..NONE };
    Row { exceptions, ..row }
}

const NEAREST: Operand = Operand::mxfp4(Rounding::Nearest, None);
const RHT: Operand = NEAREST.rotated(Transform::DEFAULT);
const SR: Operand = Operand::mxfp4(Rounding::Unbiased, None);
const RHT_SR: Operand = SR.rotated(Transform::DEFAULT);
const CEIL: Operand = Operand::of(Format::mxfp4(PowerRule::Ceil, false));
const CEIL_SR: Operand = CEIL.rounded(Rounding::Unbiased);
const NV: Operand = Operand::of(Format::NVFP4);
const NV_SR: Operand = NV.rounded(Rounding::Unbiased);
const NV_ROOM: Operand =
    Operand::of(Format::nvfp4(Nvfp4Scale::Headroom, false)).rounded(Rounding::Unbiased);
const NV_EDEN: Operand = NV.rounded(Rounding::Eden).rotated(Transform::of(128, Signs::Random));
const NV_46: Operand = Operand::of(Format::nvfp4(Nvfp4Scale::FourOverSix, false));
const NV_SQUARE: Operand = Operand::of(Format::nvfp4(Nvfp4Scale::Full, true));
const NV_H16: Transform = Transform::of(16, Signs::Nvidia);
const WITHIN: Operand = Operand::of(Format::nvfp4_within(true));
const WITHIN_SR: Operand =
    WITHIN.rounded(Rounding::Unbiased).rotated(Transform::of(16, Signs::Random));
/// The one transform that a forward pass has: one of an evaluation has no step to draw signs for.
const OF_FORWARD: Transform = Transform::of(32, Signs::Plain);
const QUEST: Operand = Operand::of(Format::mxfp4(PowerRule::Quest, false)).rotated(OF_FORWARD);
const QUARTET: Operand =
    NEAREST.within(Range::ThreeQuarters).rotated(Transform::of(32, Signs::Random));
const ROWS_INT8: Operand = Operand::of(Format::INT8_VECTORS);
const TENSOR_INT8: Operand = Operand::of(Format::INT8_TENSOR);

const BY_VECTOR: Operand = Operand::of(Format::e2m1_vectors(true));
const FP8: Gemm = Gemm::of(Operand::E4M3);

/// All recipes, plainest first.
const TABLE: [Row; 30] = [
    row("fp32", Operand::F32, Operand::F32),
    row("bf16", Operand::BF16, Operand::BF16),
    Row {
        dgrad: [Operand::E5M2, Operand::E4M3],
        wgrad: [Operand::E5M2, Operand::E4M3],
        ..row("fp8", Operand::E4M3, Operand::E4M3)
    },
    Row {
        forward: [ROWS_INT8, TENSOR_INT8],
        dgrad: [ROWS_INT8, TENSOR_INT8],
        ..row("int8-switchback", Operand::BF16, Operand::BF16)
    },
    row("mxfp4", Operand::BF16, NEAREST),
    row("mxfp4-rht", Operand::BF16, RHT),
    row("mxfp4-sr", Operand::BF16, SR),
    row("mxfp4-rht-sr", Operand::BF16, RHT_SR),
    Row {
        wgrad: [RHT_SR, RHT_SR.from_forward()],
        ..row("fp8-mxfp4-rht-sr", Operand::E4M3, RHT_SR)
    },
    whole(row("mxfp4-mxfp4", NEAREST, NEAREST)),
    whole(row("mxfp4-mxfp4-rht", NEAREST, RHT)),
    whole(row("mxfp4-mxfp4-sr", NEAREST, SR)),
    whole(row("mxfp4-mxfp4-rht-sr", NEAREST, RHT_SR)),
    row("nvfp4", Operand::BF16, NV),
    row("nvfp4-rht", Operand::BF16, NV.rotated(Transform::DEFAULT)),
    row("nvfp4-sr", Operand::BF16, NV_ROOM),
    row("nvfp4-rht-sr", Operand::BF16, NV_ROOM.rotated(Transform::DEFAULT)),
    row("nvfp4-eden", Operand::BF16, NV_EDEN),
    whole(row("nvfp4-nvfp4", NV, NV)),
    whole(row("nvfp4-nvfp4-rht", NV, NV.rotated(Transform::DEFAULT))),
    whole(row("nvfp4-nvfp4-sr", NV, NV_ROOM)),
    whole(row("nvfp4-nvfp4-rht-sr", NV, NV_ROOM.rotated(Transform::DEFAULT))),
    // "Oscillation-Reduced MXFP4 Training for Vision Transformers" (arXiv 2502.20853).
    whole(Row {
        dgrad: [CEIL_SR, CEIL_SR.from_forward()],
        wgrad: [CEIL_SR, CEIL_SR.from_forward()],
        ..row("tetrajet", CEIL, CEIL)
    }),
    // TetraJet-v2 (arXiv 2510.27527), its linear layers; the outer scales are powers of two.
    whole(Row {
        dgrad: [WITHIN_SR, WITHIN_SR.from_forward()],
        wgrad: [WITHIN_SR, WITHIN_SR.from_forward()],
        ..row("tetrajet2", WITHIN, WITHIN)
    }),
    // "Quartet: Native FP4 Training Can Be Optimal for Large Language Models" (arXiv 2505.14669,
    // version 4, whose backward pass rounds to nearest).
    whole(Row {
        dgrad: [QUARTET, QUARTET.from_forward()],
        wgrad: [QUARTET, QUARTET.from_forward()],
        ..row("quartet", QUEST, QUEST)
    }),
    // Quartet II (arXiv 2601.22813).
    whole(Row {
        dgrad: [NV_EDEN, NV_EDEN.from_forward()],
        wgrad: [NV_EDEN, NV_EDEN.from_forward()],
        ..row("quartet2", NV_46, NV_46)
    }),
    // "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149). W is the same numbers in
    // both products that it is in.
    Row {
        forward: [NV, NV_SQUARE],
        dgrad: [NV_SR, NV_SQUARE],
        wgrad: [NV_SR.rotated(NV_H16), NV.rotated(NV_H16)],
        exceptions: Exceptions {
            last_layers: Layers::Share(0.15),
            of_layers: Passes::All,
            of_steps: Passes::Forward,
            ..NONE
        },
        ..row("nvidia-nvfp4", NV, NV)
    },
    // "FP4 All the Way" (arXiv 2505.19115).
    Row {
        dgrad: [NV_SR, NV],
        wgrad: [NV_SR; 2],
        exceptions: Exceptions { of_layers: Passes::All, ..NONE },
        ..row("fp4-all-the-way", NV, NV)
    },
    // "Optimizing Large Language Model Training Using FP4 Quantization" (arXiv 2501.17116), whose
    // code has the backward pass in FP8.
    whole(Row {
        forward: [BY_VECTOR.with_outliers(Some(Kept::DEFAULT)), BY_VECTOR.with_estimator(Some(5))],
        dgrad: [Operand::E5M2, Operand::E4M3.from_forward()],
        wgrad: [Operand::E5M2, Operand::E4M3.from_forward()],
        ..row("msra-fp4", BY_VECTOR, BY_VECTOR)
    }),
    // "Towards Efficient Pre-training: Exploring FP4 Precision in Large Language Models" (arXiv
    // 2502.11458), which leaves open the block, its scale and the length of the last stage.
    Row {
        dgrad: [Operand::E5M2, Operand::E4M3],
        wgrad: [Operand::E5M2, Operand::E4M3],
        fp8: [true, true, false, false],
        exceptions: Exceptions {
            last_steps: 0.08,
            of_layers: Passes::All,
            of_steps: Passes::All,
            ..NONE
        },
        ..row("zhou-fp4", CEIL, CEIL)
    },
];

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
    pub(crate) fn fp32() -> Self {
        Self::named("fp32").expect("a name of the table")
    }

    /// Everything in bf16.
    pub(crate) fn bf16() -> Self {
        Self::named("bf16").expect("a name of the table")
    }

    /// The formats of linear layer `number` of all blocks and steps that no exception takes.
    pub fn linear(&self, number: usize) -> &LinearRecipe {
        &self.linears[number]
    }

    /// All that some linear layer may use in some step.
    pub fn all(&self) -> Vec<LinearRecipe> {
        let mut all = Vec::new();
        let by_mean = self.linears.map(|linear| linear.by_mean());
        for linear in
            self.linears.into_iter().chain(by_mean.into_iter().filter(|_| self.ema.is_some()))
        {
            for (forward, backward) in [(false, false), (false, true), (true, false), (true, true)]
            {
                let falls_back = linear.in_bf16(forward, backward);
                if !all.contains(&falls_back) {
                    all.push(falls_back);
                }
            }
        }
        all
    }

    /// The formats of the linear layers, where these are those of all blocks in all steps.
    pub(crate) fn everywhere(&self) -> Option<&[LinearRecipe; LINEARS]> {
        let Exceptions { first_layers, last_layers, last_steps, .. } = self.exceptions;
        let excepts = first_layers > 0 || last_layers != Layers::Count(0) || last_steps > 0.0;
        (!excepts && self.ema.is_none()).then_some(&self.linears)
    }

    /// The blocks and steps that run in bf16, in words; empty where there are none.
    pub fn excepted(&self) -> String {
        let Exceptions { first_layers, last_layers, last_steps, of_layers, of_steps } =
            self.exceptions;
        let of = |passes| match passes {
            Passes::Backward => "backward",
            Passes::Forward => "forward",
            Passes::All => "all passes",
        };
        let last = match last_layers {
            Layers::Count(count) => format!("{count} blocks"),
            Layers::Share(share) => format!("{}% of blocks", (100.0 * share).round()),
        };
        let parts = [
            (first_layers > 0)
                .then(|| format!("the first {first_layers} blocks, {}", of(of_layers))),
            (last_layers != Layers::Count(0))
                .then(|| format!("the last {last}, {}", of(of_layers))),
            (last_steps > 0.0).then(|| format!("the last {last_steps} of steps, {}", of(of_steps))),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join("; ")
    }

    /// Whether some steps are excepted, which are a part of the schedule's.
    pub fn excepts_steps(&self) -> bool {
        self.exceptions.last_steps > 0.0
    }

    /// Whether step `step` (of `total_steps`, 0 where not known) is an excepted one.
    pub(crate) fn is_in_last_steps(&self, step: u64, total_steps: u64) -> bool {
        self.excepts_steps()
            && total_steps > 0
            && step as f64 >= (1.0 - self.exceptions.last_steps) * total_steps as f64
    }

    /// The formats of the linear layers of block `layer` (of `layers`) in step `step` (of
    /// `total_steps`, where 0 means that the end is not known and no step is excepted).
    pub fn for_layer(
        &self,
        layer: usize,
        layers: usize,
        step: u64,
        total_steps: u64,
    ) -> [LinearRecipe; LINEARS] {
        let Exceptions { first_layers, last_layers, of_layers, of_steps, .. } = self.exceptions;
        let in_layers =
            layer < first_layers || layer.saturating_add(last_layers.of(layers)) >= layers;
        let in_steps = self.is_in_last_steps(step, total_steps);
        let forward = in_layers && of_layers.forward() || in_steps && of_steps.forward();
        let backward = in_layers && of_layers.backward() || in_steps && of_steps.backward();
        self.linears.map(|linear| linear.in_bf16(forward, backward))
    }

    /// What passes over `layers` blocks depend on; [`Recipe::set_step`] moves it on.
    pub(crate) fn step_plan(&self, layers: usize) -> Result<StepPlan> {
        let formats = (0..layers).map(|layer| Ok(self.for_layer(layer, layers, 0, 0)));
        Ok(StepPlan {
            accumulate: false,
            weighted: false,
            documents: false,
            precision: self.precision(),
            layers: collect("the formats of the blocks", formats)?,
            kept: None,
        })
    }

    /// Decay of the slow means of weights, by which the forward pass rounds them from the 11th step
    /// of a run on; None where it does not.
    pub fn ema(&self) -> Option<f32> {
        self.ema
    }

    /// Whether the forward pass holds W of this linear layer, by its number in all of `layers`
    /// blocks, in codes of E2M1 that are those of its own elements.
    pub(crate) fn has_codes(&self, number: usize, layers: usize) -> bool {
        let linears = self.for_layer(number / LINEARS, layers, 0, 0);
        linears[number % LINEARS].forward().b().has_codes()
    }

    /// An error where it is true of none, which ends in why that is needed.
    pub(crate) fn check_codes(&self, layers: usize, why: &str) -> Result<()> {
        if (0..layers * LINEARS).any(|number| self.has_codes(number, layers)) {
            return Ok(());
        }
        let message = format!(
            "expected one whose forward pass holds W in blocks of MXFP4 or NVFP4, unrotated, such \
             as tetrajet, because {why}; got {self}"
        );
        Err(Error::invalid("recipe", message))
    }

    /// When weights that oscillate are reset; None where they are not.
    pub fn reset(&self) -> Option<Reset> {
        self.reset
    }

    /// Bits of the hashes by which an evaluation merges the channels that linear layers read
    /// ([`crate::formats::merge_channels`]); None where it does not.
    pub fn haste(&self) -> Option<usize> {
        self.haste
    }

    /// The same with channels as they are.
    pub fn without_haste(&self) -> Self {
        Self { haste: None, ..self.clone() }
    }

    /// Whether it is for training, too.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] says why it is for evaluation alone.
    pub fn check_trains(&self) -> Result<()> {
        let Some(hashes) = self.haste else { return Ok(()) };
        let message = format!(
            "haste={hashes} is for evaluation: hashes that merge channels have no gradient; train \
             with {}, and evaluate with {self}",
            self.without_haste()
        );
        Err(Error::invalid("recipe", message))
    }

    /// Of activations.
    pub(crate) fn precision(&self) -> Precision {
        Precision::of(self.linears[0].forward())
    }

    /// Makes `plan` that of a micro-step in step `step` (of `total_steps`) of the schedule, in a run
    /// of which `steps_done` are done.
    pub(crate) fn set_step(
        &self,
        plan: &mut StepPlan,
        accumulate: bool,
        (step, total_steps): (u64, u64),
        steps_done: u64,
    ) {
        let by_mean = self.ema.is_some() && steps_done >= EMA_FROM_STEP;
        plan.accumulate = accumulate;
        let layers = plan.layers.len();
        for (layer, formats) in plan.layers.iter_mut().enumerate() {
            *formats = self.for_layer(layer, layers, step, total_steps);
            if by_mean {
                formats.iter_mut().for_each(|linear| *linear = linear.by_mean());
            }
        }
    }

    fn named(name: &str) -> Result<Self> {
        let Some(row) = TABLE.iter().find(|row| row.name == name) else {
            let names = Self::NAMES.join(", ");
            return Err(Error::invalid("recipe", format!("expected one of {names}; got {name:?}")));
        };
        let gemm = |[a, b]: [Operand; 2]| Gemm::new(a, b);
        let linear = LinearRecipe::new(gemm(row.forward)?, gemm(row.dgrad)?, gemm(row.wgrad)?)?;
        let mut linears = [linear; LINEARS];
        for (linear, _) in linears.iter_mut().zip(row.fp8).filter(|(_, fp8)| *fp8) {
            *linear = linear.with_forward(FP8)?;
        }
        let exceptions = row.exceptions;
        Ok(Self { name: row.name, linears, exceptions, ema: None, reset: None, haste: None })
    }

    /// The same with other linear layers.
    fn with_linears(
        &self,
        change: impl Fn(&LinearRecipe) -> Result<LinearRecipe>,
    ) -> Result<Self, Refused> {
        let mut linears = self.linears;
        for linear in &mut linears {
            *linear = change(linear)?;
        }
        Ok(Self { linears, ..self.clone() })
    }

    /// The same with other operands for those of the backward pass that switches are about.
    fn change(
        &self,
        change: impl Fn(GemmId, OperandId, Operand) -> Result<Operand>,
    ) -> Result<Self, Refused> {
        let switched = self.switched().map(|gemm| gemm.is_some());
        self.with_linears(|linear| {
            linear.change_backward(|gemm, id, operand| {
                let is_switched = switched[usize::from(gemm == GemmId::Wgrad)];
                if is_switched { change(gemm, id, operand) } else { Ok(operand) }
            })
        })
    }

    /// The same with other operands x and W of the forward pass.
    fn change_forward(
        &self,
        change: impl Fn(OperandId, Operand) -> Result<Operand>,
    ) -> Result<Self, Refused> {
        self.with_linears(|linear| {
            let gemm = linear.forward();
            let (x, w) = (change(OperandId::X, *gemm.a())?, change(OperandId::W, *gemm.b())?);
            linear.with_forward(Gemm::new(x, w)?)
        })
    }

    fn with_transform(&self, group: usize, signs: Signs) -> Result<Self, Refused> {
        let transform = Transform::new(group, signs)?;
        self.change(|_, _, operand| match operand.transform() {
            Some(_) => operand.with_transform(transform),
            None => Ok(operand),
        })
    }

    /// The same with `id` of the backward pass in FP8, or in bf16 if that leaves another GEMM that is
    /// quantized. What its second operand is made from stays.
    fn with_format_in(&self, id: GemmId, value: &str) -> Result<Self, Refused> {
        let words = [("bf16", false), ("fp8", true)];
        let in_fp8 = choice(value, &words, "bf16 or fp8")?;
        let turned = |gemm: &Gemm| match (in_fp8, gemm.b().source()) {
            (false, _) => Gemm::new(gemm.a().in_bf16(), gemm.b().in_bf16()),
            (true, OperandSource::HighPrecision) => Gemm::new(Operand::E5M2, Operand::E4M3),
            (true, OperandSource::Forward) => {
                Gemm::new(Operand::E5M2, Operand::E4M3.from_forward())
            }
        };
        if !in_fp8 {
            self.quantized()?;
        }
        let recipe = self.with_linears(|linear| {
            let of = |gemm: &Gemm, its: GemmId| if its == id { turned(gemm) } else { Ok(*gemm) };
            let (dgrad, wgrad) = (linear.dgrad(), linear.wgrad());
            let (dgrad, wgrad) = (of(dgrad, GemmId::Dgrad)?, of(wgrad, GemmId::Wgrad)?);
            LinearRecipe::new(*linear.forward(), dgrad, wgrad)
        })?;
        let in_bf16 = recipe.linears[0].forward().is_unscaled() && recipe.quantized().is_err();
        if in_bf16 {
            let message = "dgrad=bf16,wgrad=bf16 leaves nothing quantized; use bf16";
            return Err(Error::invalid("recipe", message).into());
        }
        Ok(recipe)
    }

    /// The linear layer that switches are about: the first that has a forward pass in 4 bits, or
    /// else the first. Their backward passes are alike.
    fn typical(&self) -> &LinearRecipe {
        self.linears.iter().find(|linear| is_in_4_bits(linear)).unwrap_or(&self.linears[0])
    }

    /// Dgrad and wgrad, as far as switches are about them: those in 4 bits or, where none is, those
    /// that are quantized.
    fn switched(&self) -> [Option<&Gemm>; 2] {
        let in_4_bits = |gemm: &Gemm| gemm.element() == Element::E2m1;
        let backward = self.typical().backward();
        let any = backward.into_iter().any(in_4_bits);
        let takes = |gemm: &&Gemm| if any { in_4_bits(gemm) } else { !gemm.is_unscaled() };
        backward.map(|gemm| Some(gemm).filter(takes))
    }

    /// The first of these.
    fn quantized(&self) -> Result<&Gemm, Refused> {
        let gemm = self.switched().into_iter().flatten().next();
        gemm.ok_or(Refused::HasNo("quantized backward GEMM"))
    }

    /// All operands of that linear layer, of which quantized ones are asked for.
    fn operands(&self) -> [&Operand; 6] {
        self.typical().operands().map(|(_, operand)| operand)
    }

    /// A forward GEMM in FP4 with scales of vectors.
    fn by_vector(&self) -> Result<&Gemm, Refused> {
        let gemm = self.typical().forward();
        let found = is_by_vector(gemm.a()).then_some(gemm);
        found.ok_or(Refused::HasNo("forward GEMM in FP4 with scales of vectors"))
    }

    /// The transform of the backward GEMMs.
    fn transform(&self) -> Result<Transform, Refused> {
        let backward = self.typical().backward();
        let transform = backward.into_iter().find_map(Gemm::transform);
        transform.ok_or(Refused::HasNo("transform"))
    }

    /// Whether there is anything that an exception would turn to bf16, where one is `asked` for.
    fn falls_back(&self, asked: bool) -> Result<(), Refused> {
        let stays = |linear: &LinearRecipe| linear.in_bf16(true, true) == *linear;
        match asked && self.linears.iter().all(stays) {
            true => Err(Refused::HasNo("quantized GEMM")),
            false => Ok(()),
        }
    }

    fn with_exceptions(&self, exceptions: Exceptions) -> Self {
        Self { exceptions, ..self.clone() }
    }
}

/// A function on recipes, with a value.
struct Switch {
    key: &'static str,
    apply: fn(&Recipe, &str) -> Result<Recipe, Refused>,
    /// The value that it has, unless that is what other values ask for anyway.
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

/// What a word stands for.
fn choice<T: Copy>(value: &str, words: &[(&str, T)], expected: &'static str) -> Result<T, Refused> {
    let found = words.iter().find(|(word, _)| *word == value);
    found.map(|(_, choice)| *choice).ok_or(Refused::Expected(expected))
}

/// The word that stands for it.
fn word<T: PartialEq>(of: T, words: &[(&str, T)]) -> Option<String> {
    words.iter().find(|(_, choice)| *choice == of).map(|(word, _)| (*word).into())
}

/// Whether the forward pass of a linear layer is in 4 bits.
fn is_in_4_bits(linear: &LinearRecipe) -> bool {
    linear.forward().element() == Element::E2m1
}

/// Whether an operand is in FP4 with scales of vectors.
fn is_by_vector(operand: &Operand) -> bool {
    operand.format() == Format::e2m1_vectors(true)
}

/// Linear layers by their names, joined by +; `none` for none of them.
fn linears(value: &str) -> Result<[bool; LINEARS], Refused> {
    let mut named = [false; LINEARS];
    if value != "none" {
        for part in value.split('+') {
            let number = LINEAR_NAMES.iter().position(|name| *name == part);
            let expected = "qkv, proj, fc1 and fc2, some of them joined by +, or none";
            named[number.ok_or(Refused::Expected(expected))?] = true;
        }
    }
    Ok(named)
}

const SIGNS: [(&str, Signs); 4] = [
    ("random", Signs::Random),
    ("fixed", Signs::Fixed),
    ("nvidia", Signs::Nvidia),
    ("plain", Signs::Plain),
];

fn rule(value: &str) -> Result<PowerRule, Refused> {
    let found = PowerRule::ALL.into_iter().find(|rule| rule.to_string() == value);
    found.ok_or(Refused::Expected("floor, ceil, even, quest or quest-floor"))
}

/// MXFP4 operands by this rule, others as they are.
fn by_rule(operand: Operand, rule: PowerRule) -> Operand {
    let format = operand.format();
    if !format.is_mxfp4() {
        return operand;
    }
    let square = format.is_square();
    operand.in_format(Format::mxfp4(rule, square))
}

fn rule_of<'a>(operands: impl IntoIterator<Item = &'a Operand>) -> Option<String> {
    let mut operands = operands.into_iter().filter(|operand| operand.format().is_mxfp4());
    match operands.next()?.format().scale() {
        Scale::Power(rule) => Some(rule.to_string()),
        _ => None,
    }
}

/// All switches, in the order in which they are written.
const SWITCHES: [Switch; 28] = [
    Switch {
        key: "sr",
        apply: |recipe, value| {
            let gemm = recipe.quantized()?;
            if [gemm.a(), gemm.b()].iter().all(|o| o.rounding() != Rounding::Unbiased) {
                return Err(Refused::HasNo("stochastic rounding"));
            }
            let unbiased: fn(GemmId, OperandId) -> bool = match value {
                "both" => |_, _| true,
                "dy" => |_, id| id == OperandId::Dy,
                "dy+x" => |_, id| id != OperandId::W,
                "other" => |_, id| id != OperandId::Dy,
                "off" => |_, _| false,
                _ => return Err(Refused::Expected("both, dy, dy+x, other or off")),
            };
            recipe.change(|gemm, id, operand| {
                let unbiased = unbiased(gemm, id);
                operand.with_rounding(if unbiased { Rounding::Unbiased } else { Rounding::Nearest })
            })
        },
        show: |recipe| {
            let dy = recipe.quantized().ok()?.a();
            // What one GEMM does not say, the other does.
            let [dgrad, wgrad] = recipe.switched();
            let is = |operand: &Operand| operand.rounding() == Rounding::Unbiased;
            let other = |gemm: Option<&Gemm>| gemm.is_some_and(|gemm| is(gemm.b()));
            Some(
                match (is(dy), other(dgrad), other(wgrad.or(dgrad))) {
                    (true, true, true) => "both",
                    (true, false, true) => "dy+x",
                    (true, _, false) => "dy",
                    (false, false, false) => "off",
                    (false, ..) => "other",
                }
                .into(),
            )
        },
    },
    Switch {
        key: "scale",
        apply: |recipe, value| {
            let rule = rule(value)?;
            if recipe.operands()[2..].iter().all(|operand| !operand.format().is_mxfp4()) {
                return Err(Refused::HasNo("backward GEMM in MXFP4"));
            }
            recipe.change(|_, _, operand| Ok(by_rule(operand, rule)))
        },
        show: |recipe| rule_of(recipe.operands().into_iter().skip(2)),
    },
    Switch {
        key: "scale-fwd",
        apply: |recipe, value| {
            let rule = rule(value)?;
            if !recipe.operands()[0].format().is_mxfp4() {
                return Err(Refused::HasNo("forward GEMM in MXFP4"));
            }
            recipe.change_forward(|_, operand| Ok(by_rule(operand, rule)))
        },
        show: |recipe| rule_of(recipe.operands().into_iter().take(2)),
    },
    Switch {
        key: "w",
        apply: |recipe, value| {
            let square = choice(value, &[("1d", false), ("2d", true)], "1d or 2d")?;
            let turned = |operand: Operand| match operand.format().scale() {
                Scale::Power(rule) if operand.format().is_mxfp4() => {
                    operand.in_format(Format::mxfp4(rule, square))
                }
                Scale::TwoLevels(rule, Outer::Tensor) => {
                    operand.in_format(Format::nvfp4(rule, square))
                }
                _ => operand,
            };
            let recipe = recipe.change(|_, id, operand| {
                Ok(if id == OperandId::W { turned(operand) } else { operand })
            })?;
            recipe.change_forward(|id, operand| {
                Ok(if id == OperandId::W { turned(operand) } else { operand })
            })
        },
        show: |recipe| {
            let [_, forward, _, dgrad, ..] = recipe.operands();
            let is_square = |o: &Operand| o.format().is_square();
            let blocks = |o: &Operand| o.format().is_mxfp4() || o.format().is_nvfp4();
            let any = blocks(forward) || blocks(dgrad);
            let square = is_square(forward) || is_square(dgrad);
            any.then(|| if square { "2d" } else { "1d" }.into())
        },
    },
    Switch {
        key: "46",
        apply: |recipe, value| {
            let on = choice(value, &[("fwd", true), ("off", false)], "fwd or off")?;
            let rule = if on { Nvfp4Scale::FourOverSix } else { Nvfp4Scale::Full };
            let is_nvfp4 =
                |o: &Operand| matches!(o.format().scale(), Scale::TwoLevels(_, Outer::Tensor));
            if !is_nvfp4(recipe.operands()[0]) {
                return Err(Refused::HasNo("forward GEMM in NVFP4"));
            }
            recipe.change_forward(|_, operand| {
                let format = Format::nvfp4(rule, operand.format().is_square());
                Ok(if is_nvfp4(&operand) { operand.in_format(format) } else { operand })
            })
        },
        show: |recipe| match recipe.operands()[0].format().scale() {
            Scale::TwoLevels(Nvfp4Scale::FourOverSix, _) => Some("fwd".into()),
            Scale::TwoLevels(_, Outer::Tensor) => Some("off".into()),
            _ => None,
        },
    },
    Switch {
        key: "headroom",
        apply: |recipe, value| {
            let words = [("1", Nvfp4Scale::Full), ("17/16", Nvfp4Scale::Headroom)];
            let rule = choice(value, &words, "1 or 17/16")?;
            let takes = |o: &Operand| {
                let nvfp4 = matches!(o.format().scale(), Scale::TwoLevels(_, Outer::Tensor));
                nvfp4 && o.rounding() == Rounding::Unbiased
            };
            if !recipe.operands().into_iter().any(takes) {
                return Err(Refused::HasNo("stochastic rounding to NVFP4 below one scale"));
            }
            recipe.change(|_, _, operand| {
                let format = Format::nvfp4(rule, operand.format().is_square());
                Ok(if takes(&operand) { operand.in_format(format) } else { operand })
            })
        },
        show: |recipe| {
            recipe.operands().into_iter().find_map(|o| match (o.rounding(), o.format().scale()) {
                (Rounding::Unbiased, Scale::TwoLevels(rule, Outer::Tensor)) => {
                    Some(if rule == Nvfp4Scale::Headroom { "17/16" } else { "1" }.into())
                }
                _ => None,
            })
        },
    },
    Switch {
        key: "outer",
        apply: |recipe, value| {
            let powers = choice(value, &[("f32", false), ("power", true)], "f32 or power")?;
            let format = Format::nvfp4_within(powers);
            let takes = |o: &Operand| {
                matches!(o.format().scale(), Scale::TwoLevels(_, Outer::Elements | Outer::Powers))
            };
            if !recipe.operands().into_iter().any(takes) {
                return Err(Refused::HasNo("scales of 128 elements"));
            }
            let turned = |o: Operand| Ok(if takes(&o) { o.in_format(format) } else { o });
            // Both at once: what the backward pass is made from has to be there.
            recipe.with_linears(|linear| {
                let gemm = |gemm: &Gemm| Gemm::new(turned(*gemm.a())?, turned(*gemm.b())?);
                let [forward, dgrad, wgrad] = linear.gemms().map(gemm);
                LinearRecipe::new(forward?, dgrad?, wgrad?)
            })
        },
        show: |recipe| {
            recipe.operands().into_iter().find_map(|o| match o.format().scale() {
                Scale::TwoLevels(_, Outer::Elements) => Some("f32".into()),
                Scale::TwoLevels(_, Outer::Powers) => Some("power".into()),
                _ => None,
            })
        },
    },
    Switch {
        key: "from",
        apply: |recipe, value| {
            let forward = choice(value, &[("x", false), ("q", true)], "x or q")?;
            let made = |o: &Operand| if forward { o.from_forward() } else { o.of_tensor_itself() };
            recipe.falls_back(true)?;
            // Those in bf16, too.
            recipe.with_linears(|linear| {
                let of = |gemm: &Gemm| Gemm::new(*gemm.a(), made(gemm.b()));
                LinearRecipe::new(*linear.forward(), of(linear.dgrad())?, of(linear.wgrad())?)
            })
        },
        show: |recipe| {
            let [.., w, _, x] = recipe.operands();
            let of = [w, x].map(|operand| operand.source() == OperandSource::Forward);
            match of {
                [true, true] => Some("q".into()),
                [false, false] => Some("x".into()),
                // As `fp8-mxfp4-rht-sr` has it, and no value of the switch.
                _ => None,
            }
        },
    },
    Switch {
        key: "rht",
        apply: |recipe, value| {
            // Forward, dgrad, wgrad. NOTE: all but the last leave a forward pass as it is, that of
            // `quartet` rotated: checkpoints have such recipes from before there was `all`.
            let words = [
                ("off", [false; 3]),
                ("wgrad", [false, false, true]),
                ("bwd", [false, true, true]),
                ("all", [true; 3]),
            ];
            let [forward, which @ ..] = choice(value, &words, "off, wgrad, bwd or all")?;
            recipe.quantized()?;
            let mut wanted = which.into_iter().zip(recipe.switched()).filter(|(wanted, _)| *wanted);
            if which.contains(&true) && wanted.all(|(_, gemm)| gemm.is_none()) {
                return Err(Refused::HasNo("such backward GEMM in 4 bits"));
            }
            let blocks = |o: &Operand| o.format().is_mxfp4() || o.format().is_nvfp4();
            if forward && !blocks(recipe.typical().forward().a()) {
                return Err(Refused::HasNo("forward GEMM in MXFP4 or NVFP4"));
            }
            let transform = recipe.transform().unwrap_or(Transform::DEFAULT);
            let recipe = recipe.change(|gemm, _, operand| {
                let wanted = which[usize::from(gemm == GemmId::Wgrad)];
                if wanted { operand.with_transform(transform) } else { Ok(operand.unrotated()) }
            })?;
            if !forward {
                return Ok(recipe);
            }
            recipe.change_forward(|_, operand| {
                let rotated = blocks(&operand);
                if rotated { operand.with_transform(OF_FORWARD) } else { Ok(operand) }
            })
        },
        show: |recipe| {
            recipe.quantized().ok()?;
            // What one GEMM does not say, the other does.
            let [dgrad, wgrad] = recipe.switched();
            let is = |gemm: Option<&Gemm>| gemm.and_then(Gemm::transform).is_some();
            let (dgrad, wgrad) = (is(dgrad.or(wgrad)), is(wgrad.or(dgrad)));
            let forward = is(Some(recipe.typical().forward()));
            Some(
                match (dgrad, wgrad) {
                    (false, false) => "off",
                    (false, true) => "wgrad",
                    (true, _) if forward => "all",
                    (true, _) => "bwd",
                }
                .into(),
            )
        },
    },
    Switch {
        key: "g",
        apply: |recipe, value| {
            let signs = recipe.transform()?.signs();
            let group = match value {
                "16" => 16,
                "32" => 32,
                "64" => 64,
                "128" => 128,
                "256" => 256,
                _ => return Err(Refused::Expected("16, 32, 64, 128 or 256")),
            };
            recipe.with_transform(group, signs)
        },
        show: |recipe| Some(recipe.transform().ok()?.group().to_string()),
    },
    Switch {
        key: "signs",
        apply: |recipe, value| {
            let group = recipe.transform()?.group();
            let signs = choice(value, &SIGNS, "random, fixed, nvidia or plain")?;
            recipe.with_transform(group, signs)
        },
        show: |recipe| word(recipe.transform().ok()?.signs(), &SIGNS),
    },
    Switch {
        key: "range",
        apply: |recipe, value| {
            let takes = |o: &Operand| o.format().is_mxfp4() && o.rounding() == Rounding::Nearest;
            let mxfp4 = |o: &&Operand| o.format().is_mxfp4();
            let operands = recipe.operands();
            if !operands[2..].iter().any(mxfp4) {
                return Err(Refused::HasNo("MXFP4 GEMM"));
            }
            if !operands[2..].iter().any(|o| takes(o)) {
                return Err(Refused::HasNo("rounding to nearest"));
            }
            let range = match value {
                "1" => Range::Full,
                "3/4" => Range::ThreeQuarters,
                _ => return Err(Refused::Expected("1 or 3/4")),
            };
            recipe.change(|_, _, o| if takes(&o) { o.with_range(range) } else { Ok(o) })
        },
        show: |recipe| {
            let takes = |o: &&Operand| o.format().is_mxfp4() && o.rounding() == Rounding::Nearest;
            let operand = recipe.operands().into_iter().skip(2).find(takes)?;
            Some(if operand.range() == Range::Full { "1" } else { "3/4" }.into())
        },
    },
    Switch {
        key: "ema",
        apply: |recipe, value| {
            let decay = value.parse().ok().filter(|decay| *decay > 0.0 && *decay < 1.0);
            let ema = Some(decay.ok_or(Refused::Expected("a number above 0 and below 1"))?);
            if recipe.linears.iter().all(|linear| linear.by_mean() == *linear) {
                return Err(Refused::HasNo(
                    "W in the forward pass in blocks of MXFP4 or NVFP4, unrotated",
                ));
            }
            Ok(Recipe { ema, ..recipe.clone() })
        },
        show: |recipe| recipe.ema.map(|decay| decay.to_string()),
    },
    Switch {
        key: "reset",
        apply: |recipe, value| {
            let reset = Some(value.parse().map_err(Refused::Expected)?);
            if recipe.linears.iter().all(|linear| !linear.forward().b().has_codes()) {
                return Err(Refused::HasNo("W in the forward pass in MXFP4 or NVFP4, unrotated"));
            }
            Ok(Recipe { reset, ..recipe.clone() })
        },
        show: |recipe| recipe.reset.map(|reset| reset.to_string()),
    },
    Switch {
        key: "unbias",
        apply: |recipe, value| {
            let on = choice(value, &[("tensor", true), ("off", false)], "tensor or off")?;
            recipe.quantized()?;
            let switched = recipe.switched().map(|gemm| gemm.is_some());
            recipe.with_linears(|linear| {
                // Both operands of a GEMM at once, as it asks for.
                let of = |gemm: &Gemm, is_switched: bool| match is_switched {
                    false => Ok(*gemm),
                    true => Gemm::new(gemm.a().with_correction(on)?, gemm.b().with_correction(on)?),
                };
                let (dgrad, wgrad) = (linear.dgrad(), linear.wgrad());
                let (dgrad, wgrad) = (of(dgrad, switched[0])?, of(wgrad, switched[1])?);
                LinearRecipe::new(*linear.forward(), dgrad, wgrad)
            })
        },
        show: |recipe| {
            let corrected = recipe.quantized().ok()?.is_corrected();
            Some(if corrected { "tensor" } else { "off" }.into())
        },
    },
    Switch {
        key: "mantissa",
        apply: |recipe, value| {
            let (bits, cut) = match value.strip_suffix('t') {
                Some(bits) => (bits, true),
                None => (value, false),
            };
            let expected = "1 to 7 bits, with a t where others are cut off";
            let bits = bits.parse().ok().filter(|bits| (1..=7).contains(bits));
            let bits = bits.ok_or(Refused::Expected(expected))?;
            let in_bf16 =
                |gemm: &Gemm| matches!(gemm.element(), Element::Bf16 | Element::Mantissa(..));
            if !recipe.linear(0).gemms().into_iter().all(in_bf16) {
                return Err(Refused::HasNo("bf16 in all three GEMMs"));
            }
            let format = if bits == 7 { Format::BF16 } else { Format::mantissa(bits, cut) };
            let gemm = Gemm::of(Operand::of(format));
            recipe.with_linears(|_| LinearRecipe::new(gemm, gemm, gemm))
        },
        show: |recipe| match recipe.linear(0).forward().element() {
            Element::Mantissa(bits, cut) => Some(format!("{bits}{}", if cut { "t" } else { "" })),
            _ => None,
        },
    },
    Switch {
        key: "fp8",
        apply: |recipe, value| {
            let fp8 = linears(value)?;
            let typical = recipe.typical();
            if !is_in_4_bits(typical) {
                return Err(Refused::HasNo("forward GEMM in 4 bits"));
            }
            if fp8 == [true; LINEARS] {
                let message = format!("fp8={value} leaves no forward pass in 4 bits; use fwd=fp8");
                return Err(Error::invalid("recipe", message).into());
            }
            let of = |fp8| typical.with_forward(if fp8 { FP8 } else { *typical.forward() });
            let [of_others, of_named] = [of(false)?, of(true)?];
            let linears = fp8.map(|fp8| if fp8 { of_named } else { of_others });
            Ok(Recipe { linears, ..recipe.clone() })
        },
        show: |recipe| {
            is_in_4_bits(recipe.typical()).then_some(())?;
            let named = LINEAR_NAMES.iter().zip(&recipe.linears);
            let fp8: Vec<_> =
                named.filter(|(_, linear)| !is_in_4_bits(linear)).map(|(name, _)| *name).collect();
            Some(if fp8.is_empty() { "none".into() } else { fp8.join("+") })
        },
    },
    Switch {
        key: "dge",
        apply: |recipe, value| {
            let steepness = match value {
                "off" => None,
                _ => Some(
                    value
                        .parse()
                        .ok()
                        .filter(|k| *k > 0)
                        .ok_or(Refused::Expected("a steepness from 1 to 255, or off"))?,
                ),
            };
            recipe.by_vector()?;
            recipe.change_forward(|id, operand| {
                let takes = id == OperandId::W && is_by_vector(&operand);
                Ok(if takes { operand.with_estimator(steepness) } else { operand })
            })
        },
        show: |recipe| {
            recipe.by_vector().ok()?;
            let steepness = recipe.typical().forward().b().estimator();
            Some(steepness.map_or_else(|| "off".into(), |steepness| steepness.to_string()))
        },
    },
    Switch {
        key: "occ",
        apply: |recipe, value| {
            let share = || value.parse().ok().and_then(Kept::new);
            let kept = match value {
                "off" => None,
                _ => Some(
                    share()
                        .ok_or(Refused::Expected("a share between 0.5 and 1, like 0.99, or off"))?,
                ),
            };
            recipe.by_vector()?;
            recipe.change_forward(|id, operand| {
                let takes = id == OperandId::X && is_by_vector(&operand);
                Ok(if takes { operand.with_outliers(kept) } else { operand })
            })
        },
        show: |recipe| {
            recipe.by_vector().ok()?;
            let kept = recipe.typical().forward().a().outliers();
            Some(kept.map_or_else(|| "off".into(), |kept| kept.share().to_string()))
        },
    },
    Switch {
        key: "haste",
        apply: |recipe, value| {
            let haste = value.parse().ok().filter(|bits| (1..=MAX_HASHES).contains(bits));
            let haste = Some(haste.ok_or(Refused::Expected("1 to 64 bits of a hash"))?);
            Ok(Recipe { haste, ..recipe.clone() })
        },
        show: |recipe| recipe.haste.map(|bits| bits.to_string()),
    },
    Switch {
        key: "fwd",
        apply: |recipe, value| {
            if choice(value, &[("bf16", false), ("fp8", true)], "bf16 or fp8")? {
                return recipe.with_linears(|linear| linear.with_forward(FP8));
            }
            if recipe.linear(0).forward().is_unscaled() {
                return Err(Refused::HasNo("quantized forward GEMM"));
            }
            recipe.quantized()?;
            recipe.with_linears(|linear| Ok(linear.in_bf16(true, false)))
        },
        show: |recipe| shown_format(recipe.typical().forward()),
    },
    Switch {
        key: "dgrad",
        apply: |recipe, value| recipe.with_format_in(GemmId::Dgrad, value),
        show: |recipe| shown_format(recipe.linear(0).dgrad()),
    },
    Switch {
        key: "wgrad",
        apply: |recipe, value| recipe.with_format_in(GemmId::Wgrad, value),
        show: |recipe| shown_format(recipe.linear(0).wgrad()),
    },
    Switch {
        key: "bf16-first-layers",
        apply: |recipe, value| {
            let first_layers = value.parse().map_err(|_| Refused::Expected("a count"))?;
            recipe.falls_back(first_layers > 0)?;
            Ok(recipe.with_exceptions(Exceptions { first_layers, ..recipe.exceptions }))
        },
        show: |recipe| Some(recipe.exceptions.first_layers.to_string()),
    },
    Switch {
        key: "bf16-last-layers",
        apply: |recipe, value| {
            let count = value.parse().map_err(|_| Refused::Expected("a count"))?;
            recipe.falls_back(count > 0)?;
            let last_layers = Layers::Count(count);
            Ok(recipe.with_exceptions(Exceptions { last_layers, ..recipe.exceptions }))
        },
        show: |recipe| match recipe.exceptions.last_layers {
            Layers::Count(count) => Some(count.to_string()),
            Layers::Share(_) => None,
        },
    },
    Switch {
        key: "bf16-last-steps",
        apply: |recipe, value| {
            let last_steps = value.parse().map_err(|_| Refused::Expected("a fraction"))?;
            if !(0.0..=1.0).contains(&last_steps) {
                return Err(Refused::Expected("a fraction from 0 to 1"));
            }
            recipe.falls_back(last_steps > 0.0)?;
            Ok(recipe.with_exceptions(Exceptions { last_steps, ..recipe.exceptions }))
        },
        show: |recipe| Some(recipe.exceptions.last_steps.to_string()),
    },
    Switch {
        key: "bf16-layers-pass",
        apply: |recipe, value| {
            let of_layers = choice(value, &Passes::ALL, "bwd, fwd or all")?;
            Ok(recipe.with_exceptions(Exceptions { of_layers, ..recipe.exceptions }))
        },
        show: |recipe| Some(recipe.exceptions.of_layers.name()),
    },
    Switch {
        key: "bf16-steps-pass",
        apply: |recipe, value| {
            let of_steps = choice(value, &Passes::ALL, "bwd, fwd or all")?;
            Ok(recipe.with_exceptions(Exceptions { of_steps, ..recipe.exceptions }))
        },
        show: |recipe| Some(recipe.exceptions.of_steps.name()),
    },
];

/// When a switch with this value is applied: first the formats of whole GEMMs, of which others then
/// ask nothing. FP8 comes before bf16, which leaves something quantized.
fn turn(switch: &Switch, value: &str) -> usize {
    match (["fwd", "dgrad", "wgrad"].contains(&switch.key), value) {
        (true, "fp8") => 0,
        (true, _) => 1,
        (false, _) => 2,
    }
}

/// How many turns there are.
const TURNS: usize = 3;

/// Of such a switch.
fn shown_format(gemm: &Gemm) -> Option<String> {
    match gemm.element() {
        Element::Bf16 => Some("bf16".into()),
        Element::E4m3 | Element::E5m2 => Some("fp8".into()),
        _ => None,
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
        let given = || SWITCHES.iter().zip(values).filter_map(|(switch, v)| Some((switch, v?)));
        let ordered =
            (0..TURNS).flat_map(|now| given().filter(move |(switch, v)| turn(switch, v) == now));
        for (switch, value) in ordered {
            let key = switch.key;
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

/// The name, and the switches that make of it what it is not by itself.
impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut written = Self::named(self.name).map_err(|_| fmt::Error)?;
        let mut values = [const { None }; SWITCHES.len()];
        // In the order in which they are applied.
        for now in 0..TURNS {
            for (switch, to) in SWITCHES.iter().zip(&mut values) {
                let Switch { show, apply, .. } = switch;
                let value = show(self).filter(|value| Some(value) != show(&written).as_ref());
                if let Some(value) = value.filter(|value| turn(switch, value) == now) {
                    // What one switch sets another may follow from.
                    written = apply(&written, &value).unwrap_or(written);
                    *to = Some(value);
                }
            }
        }
        f.write_str(self.name)?;
        SWITCHES.iter().zip(values).try_for_each(|(switch, value)| match value {
            Some(value) => write!(f, ",{}={value}", switch.key),
            None => Ok(()),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    #[test]
    fn every_name_and_switch_survives_a_round_trip() {
        let switched = [
            "mxfp4-rht-sr,sr=dy,g=128,signs=fixed,wgrad=bf16",
            "mxfp4-sr,sr=other,bf16-last-layers=2,bf16-last-steps=0.1",
            "fp8-mxfp4-rht-sr,g=32,dgrad=bf16",
            "mxfp4,range=3/4",
            "mxfp4-rht,g=32,range=3/4,wgrad=bf16",
            "mxfp4-rht-sr,sr=dy,range=3/4",
            "mxfp4-rht,range=3/4,unbias=tensor",
            "quartet,g=64,unbias=tensor,wgrad=bf16",
            "mxfp4-sr,scale=ceil",
            "mxfp4-mxfp4-rht,scale=even,scale-fwd=quest-floor,from=q",
            "nvfp4-nvfp4-sr,46=fwd,headroom=1,rht=wgrad,g=16,signs=nvidia",
            "nvfp4-nvfp4,w=2d",
            "nvfp4-eden,g=256,wgrad=bf16",
            "tetrajet2,sr=dy+x,outer=f32",
            "tetrajet,sr=off,fwd=bf16,bf16-last-steps=0.1,bf16-steps-pass=bwd",
            "nvidia-nvfp4,bf16-first-layers=1,bf16-last-layers=3,bf16-layers-pass=fwd",
            "quartet,scale-fwd=quest-floor,g=64,range=1",
            "quartet,from=x,rht=off",
            "msra-fp4,dge=off,occ=0.999",
            "msra-fp4,fp8=qkv,dge=3,occ=off,bf16-last-steps=0.1",
            "quartet2,46=off",
            "quartet2,fp8=qkv",
            "zhou-fp4,scale-fwd=floor,fp8=proj+fc2,bf16-last-steps=0.1",
            "zhou-fp4,fp8=none,wgrad=bf16",
            "bf16,mantissa=4t",
            "fp8,bf16-first-layers=2",
            "tetrajet,ema=0.998,bf16-last-layers=1",
            "nvidia-nvfp4,reset=200:50:8@0.6",
            "tetrajet,ema=0.998,reset=400:50:16@0.59",
            "nvfp4-nvfp4-sr,46=fwd,ema=0.9983",
            "fp32,haste=16",
            "msra-fp4,occ=off,haste=64,bf16-last-layers=1",
            "mxfp4-rht-sr,fwd=fp8",
            "mxfp4-rht-sr,sr=dy,g=32,dgrad=fp8",
            "nvfp4-rht-sr,rht=wgrad,fwd=fp8",
            "mxfp4-rht,unbias=tensor,dgrad=fp8",
            "tetrajet,fwd=fp8,wgrad=bf16,bf16-last-steps=0.1",
            "quartet,g=64,fwd=fp8,wgrad=fp8",
            "quartet,rht=off,dgrad=fp8",
            "bf16,fwd=fp8,wgrad=fp8",
            "zhou-fp4,fwd=fp8",
            "fp8,fwd=bf16,dgrad=bf16",
            "int8-switchback,fwd=bf16,dgrad=bf16,wgrad=fp8",
            "mxfp4-mxfp4,rht=all,g=128,signs=fixed",
            "nvfp4-nvfp4-sr,46=fwd,from=q,rht=all,fp8=fc1",
            "tetrajet2,rht=off,dgrad=fp8",
            "tetrajet,rht=all,dgrad=fp8",
            "nvidia-nvfp4,w=1d,rht=all",
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
            ("zhou-fp4,fp8=proj+qkv", "zhou-fp4"),
            ("fp8,wgrad=fp8,fwd=fp8,dgrad=fp8", "fp8"),
            ("fp8-mxfp4-rht-sr,fwd=fp8", "fp8-mxfp4-rht-sr"),
            ("msra-fp4,dgrad=fp8", "msra-fp4"),
            ("mxfp4,wgrad=fp8,wgrad=bf16", "mxfp4,wgrad=bf16"),
            // Rotated forward by its name; what is about the backward pass alone leaves that.
            ("quartet,rht=all", "quartet"),
            ("quartet,rht=bwd", "quartet"),
            ("mxfp4-mxfp4,g=32,rht=all", "mxfp4-mxfp4,rht=all,g=32"),
            ("mxfp4-rht-sr,range=3/4,sr=dy", "mxfp4-rht-sr,sr=dy,range=3/4"),
            ("mxfp4-rht-sr,sr=dy,range=3/4,sr=other", "mxfp4-rht-sr,sr=other,range=3/4"),
            (
                "mxfp4-rht-sr,wgrad=bf16,signs=fixed,g=128,sr=dy",
                "mxfp4-rht-sr,sr=dy,g=128,signs=fixed,wgrad=bf16",
            ),
        ] {
            let recipe = long.parse::<Recipe>().unwrap();
            assert_eq!((recipe.to_string().as_str(), &recipe), (short, &short.parse().unwrap()));
        }
    }

    /// What a checkpoint stores is what it is made with, whatever switches were given.
    #[test]
    fn any_switches_survive_a_round_trip() {
        const VALUES: [(&str, &[&str]); SWITCHES.len()] = [
            ("sr", &["both", "dy", "dy+x", "other", "off"]),
            ("scale", &["floor", "ceil", "even", "quest", "quest-floor"]),
            ("scale-fwd", &["floor", "ceil", "even", "quest", "quest-floor"]),
            ("w", &["1d", "2d"]),
            ("46", &["fwd", "off"]),
            ("headroom", &["1", "17/16"]),
            ("outer", &["f32", "power"]),
            ("from", &["x", "q"]),
            ("rht", &["off", "wgrad", "bwd", "all"]),
            ("g", &["16", "32", "64", "128", "256"]),
            ("signs", &["random", "fixed", "nvidia", "plain"]),
            ("range", &["1", "3/4"]),
            ("ema", &["0.998", "0.5"]),
            ("reset", &["200:50:8@0.6", "10:3:0.5@0"]),
            ("unbias", &["tensor", "off"]),
            ("mantissa", &["2", "7", "5t"]),
            ("fp8", &["none", "qkv+proj", "fc2"]),
            ("dge", &["off", "1", "5"]),
            ("occ", &["off", "0.99", "0.97"]),
            ("haste", &["1", "12", "64"]),
            ("fwd", &["bf16", "fp8"]),
            ("dgrad", &["bf16", "fp8"]),
            ("wgrad", &["bf16", "fp8"]),
            ("bf16-first-layers", &["0", "3"]),
            ("bf16-last-layers", &["0", "2"]),
            ("bf16-last-steps", &["0", "0.25"]),
            ("bf16-layers-pass", &["bwd", "fwd", "all"]),
            ("bf16-steps-pass", &["bwd", "fwd", "all"]),
        ];
        assert_eq!(VALUES.map(|(key, _)| key), SWITCHES.each_ref().map(|switch| switch.key));
        let mut word = 1u32;
        let mut below = |n: usize| {
            word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (word >> 8) as usize % n
        };
        let mut taken = 0;
        for _ in 0..30_000 {
            let mut text = Recipe::NAMES[below(Recipe::NAMES.len())].to_owned();
            for _ in 0..1 + below(4) {
                let (key, values) = VALUES[below(VALUES.len())];
                text.push_str(&format!(",{key}={}", values[below(values.len())]));
            }
            let Ok(recipe) = text.parse::<Recipe>() else { continue };
            let mut shown = String::new();
            assert!(write!(shown, "{recipe}").is_ok(), "{text} is shown up to {shown}");
            let again = shown.parse::<Recipe>().unwrap_or_else(|e| panic!("{text}, {shown}: {e}"));
            assert!(again == recipe, "{text} is shown as {shown}");
            taken += 1;
        }
        assert!(taken > 5000, "{taken}");
    }

    #[test]
    fn a_wrong_recipe_says_what_is_wrong() {
        for (s, part) in [
            ("fp4", "expected one of fp32"),
            ("mxfp4-rht-sr,g=48", "32, 64, 128 or 256"),
            ("mxfp4,g=64", "no transform"),
            ("bf16,sr=dy", "no quantized backward GEMM"),
            ("mxfp4-rht,sr=dy", "no stochastic rounding"),
            ("mxfp4-rht-sr,range=3/4", "range: mxfp4-rht-sr has no rounding to nearest"),
            ("bf16,range=3/4", "range: bf16 has no MXFP4 GEMM"),
            ("mxfp4,range=0.75", "range: expected 1 or 3/4, got \"0.75\""),
            ("mxfp4,dgrad=bf16,wgrad=bf16", "nothing quantized"),
            ("mxfp4,bf16-last-steps=2", "from 0 to 1"),
            ("fp32,bf16-last-layers=2", "bf16-last-layers: fp32 has no quantized GEMM"),
            ("bf16,bf16-last-steps=0.1", "bf16-last-steps: bf16 has no quantized GEMM"),
            ("nvfp4-eden,signs=fixed", "unbiased over random rotations"),
            ("quartet2,g=64", "unbiased over random rotations"),
            ("nvfp4-sr,46=fwd", "46: nvfp4-sr has no forward GEMM in NVFP4"),
            ("mxfp4-rht,g=16", "at least a block of 32, got 16"),
            ("mxfp4-rht-sr,from=q", "use the tensor itself"),
            ("mxfp4-sr,scale=quest", "leaves nothing above 6"),
            ("mxfp4-rht-sr,signs=nvidia", "those of a group of 16; got 64"),
            ("quartet,w=2d", "has scales of blocks, not of squares"),
            ("quartet,signs=any", "signs: expected random, fixed, nvidia or plain"),
            ("tetrajet,w=2d", "squares of one scale are rounded to nearest"),
            ("fp8,rht=bwd", "needs an operand in MXFP4 or NVFP4; got one in FP8 E5M2"),
            ("fp8,mantissa=3", "mantissa: fp8 has no bf16 in all three GEMMs"),
            ("bf16,mantissa=8", "1 to 7 bits"),
            ("mxfp4-rht-sr,unbias=tensor", "is for rounding to nearest"),
            ("quartet2,unbias=tensor", "is for rounding to nearest"),
            ("mxfp4,unbias=tensor", "expected a transform with random signs"),
            ("mxfp4-rht,signs=fixed,unbias=tensor", "expected a transform with random signs"),
            ("bf16,unbias=tensor", "unbias: bf16 has no quantized backward GEMM"),
            ("msra-fp4,dge=0", "dge: expected a steepness from 1 to 255, or off"),
            ("msra-fp4,occ=1", "occ: expected a share between 0.5 and 1"),
            ("quartet,occ=0.99", "occ: quartet has no forward GEMM in FP4 with scales of vectors"),
            ("nvfp4,fp8=qkv", "fp8: nvfp4 has no forward GEMM in 4 bits"),
            ("tetrajet,fp8=head", "qkv, proj, fc1 and fc2, some of them joined by +, or none"),
            ("tetrajet,fp8=qkv+proj+fc1+fc2", "leaves no forward pass in 4 bits"),
            ("zhou-fp4,scale=ceil", "scale: zhou-fp4 has no backward GEMM in MXFP4"),
            ("bf16,fwd=bf16", "fwd: bf16 has no quantized forward GEMM"),
            ("mxfp4,fwd=fp4", "fwd: expected bf16 or fp8, got \"fp4\""),
            ("mxfp4,dgrad=int8", "dgrad: expected bf16 or fp8, got \"int8\""),
            ("mxfp4,wgrad=e4m3", "wgrad: expected bf16 or fp8, got \"e4m3\""),
            ("fp32,fwd=fp8", "expected f32 in all three GEMMs or in none"),
            ("fp32,dgrad=fp8", "expected f32 in all three GEMMs or in none"),
            ("bf16,fwd=fp8,mantissa=4", "mantissa: bf16 has no bf16 in all three GEMMs"),
            ("bf16,fwd=fp8,from=q,fwd=bf16", "fwd: bf16 has no quantized forward GEMM"),
            ("mxfp4-sr,dgrad=fp8,wgrad=fp8,sr=dy", "sr: mxfp4-sr has no stochastic rounding"),
            ("tetrajet,fwd=fp8,fp8=qkv", "fp8: tetrajet has no forward GEMM in 4 bits"),
            ("tetrajet,fwd=fp8,ema=0.998", "has no W in the forward pass in blocks"),
            ("tetrajet,fwd=fp8,reset=200:50:8@0.6", "reset: tetrajet has no W in the forward pass"),
            ("msra-fp4,fwd=fp8,dge=3", "dge: msra-fp4 has no forward GEMM in FP4 with scales of"),
            (
                "msra-fp4,fwd=fp8,occ=0.99",
                "occ: msra-fp4 has no forward GEMM in FP4 with scales of",
            ),
            ("quartet2,fwd=fp8,46=fwd", "46: quartet2 has no forward GEMM in NVFP4"),
            ("mxfp4,rht=every", "rht: expected off, wgrad, bwd or all, got \"every\""),
            ("bf16,rht=all", "rht: bf16 has no quantized backward GEMM"),
            ("mxfp4-rht-sr,rht=all", "rht: mxfp4-rht-sr has no forward GEMM in MXFP4 or NVFP4"),
            ("fp8,rht=all", "rht: fp8 has no forward GEMM in MXFP4 or NVFP4"),
            ("tetrajet,fwd=fp8,rht=all", "rht: tetrajet has no forward GEMM in MXFP4 or NVFP4"),
            ("msra-fp4,rht=all", "rht: msra-fp4 has no forward GEMM in MXFP4 or NVFP4"),
            ("int8-switchback,rht=all", "has no forward GEMM in MXFP4 or NVFP4"),
            ("zhou-fp4,rht=all", "needs an operand in MXFP4 or NVFP4; got one in FP8 E5M2"),
            ("mxfp4-mxfp4,w=2d,rht=all", "has scales of blocks, not of squares"),
            ("nvidia-nvfp4,rht=all", "has scales of blocks, not of squares; use w=1d"),
            ("tetrajet,rht=all,ema=0.998", "in blocks of MXFP4 or NVFP4, unrotated"),
            ("tetrajet,rht=all,reset=200:50:8@0.6", "in MXFP4 or NVFP4, unrotated"),
            ("mxfp4-mxfp4,rht=all,g=16", "at least a block of 32, got 16"),
            ("mxfp4-rht-sr,ema=0.998", "ema: mxfp4-rht-sr has no W in the forward pass in blocks"),
            ("nvidia-nvfp4,ema=0.998", "ema: nvidia-nvfp4 has no W in the forward pass in blocks"),
            ("tetrajet,fwd=bf16,ema=0.998", "has no W in the forward pass in blocks"),
            ("tetrajet,ema=1", "ema: expected a number above 0 and below 1, got \"1\""),
            ("tetrajet,ema=NaN", "above 0 and below 1"),
            ("quartet,ema=0.998", "in blocks of MXFP4 or NVFP4, unrotated"),
            ("fp8,reset=200:50:8@0.6", "reset: fp8 has no W in the forward pass in MXFP4 or NVFP4"),
            ("tetrajet,reset=200", "expected PERIOD:TRACK:THRESHOLD@START like 200:50:8@0.6"),
            ("bf16,haste=0", "haste: expected 1 to 64 bits of a hash, got \"0\""),
            ("bf16,haste=65", "haste: expected 1 to 64 bits of a hash"),
            ("mxfp4,colour=red", "known are sr, scale, scale-fwd, w"),
        ] {
            let error = s.parse::<Recipe>().unwrap_err().to_string();
            assert!(error.contains(part), "{s}: {error}");
        }
    }

    /// In FP8 as in `fp8`, and otherwise as it was; others then say nothing of that GEMM.
    #[test]
    fn gemms_by_themselves_are_in_fp8() {
        let of = |recipe: &str| *recipe.parse::<Recipe>().unwrap().linear(3);
        let fp8 = of("fp8");
        for name in ["bf16", "int8-switchback", "mxfp4-rht-sr", "nvidia-nvfp4", "quartet2"] {
            let was = of(name);
            let forward = of(&format!("{name},fwd=fp8"));
            assert_eq!(forward, was.with_forward(*fp8.forward()).unwrap());
            let dgrad = of(&format!("{name},dgrad=fp8"));
            assert_eq!((dgrad.forward(), dgrad.wgrad()), (was.forward(), was.wgrad()));
            assert_eq!(dgrad.dgrad().a(), fp8.dgrad().a());
            assert_eq!(dgrad.dgrad().b().format(), Format::E4M3);
            assert_eq!(dgrad.dgrad().b().source(), was.dgrad().b().source(), "{name}");
            let wgrad = of(&format!("{name},wgrad=fp8"));
            assert_eq!((wgrad.forward(), wgrad.dgrad()), (was.forward(), was.dgrad()));
            assert_eq!(wgrad.wgrad().a(), fp8.wgrad().a());
            assert_eq!(wgrad.wgrad().b().format(), Format::E4M3);
            assert_eq!(wgrad.wgrad().b().source(), was.wgrad().b().source(), "{name}");
        }
        assert_eq!(of("bf16,fwd=fp8,dgrad=fp8,wgrad=fp8"), fp8);
        // What the forward pass in FP8 leaves of x and W is what backward operands are made from.
        let q = of("tetrajet,fwd=fp8");
        assert_eq!(q.backward(), of("tetrajet").backward());
        assert_eq!(of("fp8-mxfp4-rht-sr,from=q"), of("mxfp4-rht-sr,fwd=fp8,from=q"));
        let [first, second] = ["mxfp4-rht-sr,dgrad=fp8,g=128,sr=dy", "mxfp4-rht-sr,g=128,sr=dy"];
        assert_eq!(of(first).wgrad(), of(second).wgrad());
        assert!(of("mxfp4-sr,wgrad=fp8,rht=bwd").dgrad().transform().is_some());
    }

    /// In groups of 32 without signs, whatever the groups and signs of the backward pass.
    #[test]
    fn a_forward_pass_can_be_rotated() {
        let of = |recipe: &str| *recipe.parse::<Recipe>().unwrap().linear(0);
        for (name, group) in [("mxfp4-mxfp4", 64), ("tetrajet2", 16), ("nvfp4-nvfp4-rht-sr", 64)] {
            let (was, rotated) = (of(name), of(&format!("{name},rht=all")));
            let forward = [rotated.forward().a(), rotated.forward().b()];
            assert!(forward.iter().all(|o| o.transform() == Some(Transform::of(32, Signs::Plain))));
            assert_eq!(forward.map(|o| o.unrotated()), [*was.forward().a(), *was.forward().b()]);
            assert_eq!(rotated.backward(), of(&format!("{name},rht=bwd")).backward());
            let transform = Some(Transform::of(group, Signs::Random));
            assert!(rotated.backward().iter().all(|gemm| gemm.transform() == transform), "{name}");
        }
        let fixed = of("mxfp4-mxfp4,rht=all,signs=fixed,g=256");
        assert_eq!(fixed.forward(), of("mxfp4-mxfp4,rht=all").forward());
        assert_eq!(fixed.dgrad().transform(), Some(Transform::of(256, Signs::Fixed)));
        // Layers in FP8 are not, nor are GEMMs of the backward pass in FP8 or bf16.
        let recipe: Recipe = "tetrajet,fp8=qkv,rht=all,wgrad=fp8".parse().unwrap();
        let rotated = |gemm: &Gemm| gemm.transform().is_some();
        assert_eq!(recipe.linear(0).gemms().map(rotated), [false, true, false]);
        assert_eq!(recipe.linear(1).gemms().map(rotated), [true, true, false]);
    }

    #[test]
    fn what_merges_channels_is_for_evaluation() {
        let recipe: Recipe = "mxfp4-rht,haste=12,g=32".parse().unwrap();
        assert_eq!(recipe.haste(), Some(12));
        assert_eq!(
            recipe.check_trains().unwrap_err().to_string(),
            "recipe: haste=12 is for evaluation: hashes that merge channels have no \
             gradient; train with mxfp4-rht,g=32, and evaluate with mxfp4-rht,g=32,haste=12"
        );
        let without = recipe.without_haste();
        assert_eq!(without, "mxfp4-rht,g=32".parse().unwrap());
        assert!(without.check_trains().is_ok() && without.haste().is_none());
        assert_eq!(without.all(), recipe.all());
    }

    /// From the 11th step of the run on, wherever its schedule began, in what is not in bf16.
    #[test]
    fn weights_are_rounded_by_their_means_after_ten_steps() {
        let recipe: Recipe = "tetrajet,ema=0.998,bf16-last-layers=1".parse().unwrap();
        let mut plan = recipe.step_plan(3).unwrap();
        for (steps_done, by_mean) in [(0, false), (9, false), (10, true), (1000, true)] {
            recipe.set_step(&mut plan, false, (0, 0), steps_done);
            let roundings = plan.layers.iter().map(|layer| layer[3].forward().b().rounding());
            let found: Vec<_> = roundings.map(|r| r == Rounding::ByMean).collect();
            assert_eq!(found, [by_mean, by_mean, false], "{steps_done}");
            let known = recipe.all();
            assert!(plan.layers.iter().flatten().all(|linear| known.contains(linear)));
        }
        let without: Recipe = "tetrajet".parse().unwrap();
        without.set_step(&mut plan, false, (0, 0), 1000);
        assert_eq!(plan.layers[0], without.for_layer(0, 3, 0, 0));
    }

    #[test]
    fn last_layers_and_last_steps_fall_back_to_bf16() {
        let r: Recipe = "mxfp4,bf16-last-layers=1,bf16-last-steps=0.25".parse().unwrap();
        let is_bf16 = |layer, step| r.for_layer(layer, 3, step, 100)[1].dgrad().is_in(Format::BF16);
        assert!(!is_bf16(0, 0) && !is_bf16(1, 74));
        assert!(is_bf16(2, 0) && is_bf16(0, 75));
        let all: Recipe = format!("mxfp4,bf16-last-layers={}", usize::MAX).parse().unwrap();
        assert!((0..3).all(|layer| all.for_layer(layer, 3, 0, 0)[3].dgrad().is_in(Format::BF16)));
    }

    /// Which passes of which blocks and steps of each fall back, forward and backward.
    #[test]
    fn exceptions_take_the_passes_that_they_name() {
        let unscaled = |recipe: &str, layer, layers, step| {
            let recipe: Recipe = recipe.parse().unwrap();
            let linear = recipe.for_layer(layer, layers, step, 100)[0];
            (linear.forward().is_unscaled(), linear.dgrad().is_unscaled())
        };
        for (recipe, layer, layers, step, expected) in [
            // 15% of 12, 24, 36 and 48 blocks are 2, 4, 5 and 7.
            ("nvidia-nvfp4", 9, 12, 0, (false, false)),
            ("nvidia-nvfp4", 10, 12, 0, (true, true)),
            ("nvidia-nvfp4", 19, 24, 0, (false, false)),
            ("nvidia-nvfp4", 20, 24, 0, (true, true)),
            ("nvidia-nvfp4", 30, 36, 0, (false, false)),
            ("nvidia-nvfp4", 31, 36, 0, (true, true)),
            ("nvidia-nvfp4", 41, 48, 0, (true, true)),
            ("nvidia-nvfp4,bf16-last-steps=0.18", 0, 12, 81, (false, false)),
            ("nvidia-nvfp4,bf16-last-steps=0.18", 0, 12, 82, (true, false)),
            ("nvidia-nvfp4,bf16-last-layers=0", 11, 12, 0, (false, false)),
            ("fp4-all-the-way,bf16-last-steps=0.1", 0, 12, 90, (false, true)),
            ("tetrajet,bf16-first-layers=1", 0, 12, 0, (true, true)),
            ("tetrajet,bf16-first-layers=1,bf16-layers-pass=bwd", 0, 12, 0, (false, true)),
            ("tetrajet,bf16-last-steps=0.5,bf16-steps-pass=fwd", 0, 12, 50, (true, false)),
            ("fp8-mxfp4-rht-sr,bf16-last-layers=1", 11, 12, 0, (false, true)),
        ] {
            assert_eq!(unscaled(recipe, layer, layers, step), expected, "{recipe} {layer} {step}");
        }
    }

    /// Two linear layers are those of `fp8`, and the others differ from them in the forward pass
    /// alone.
    #[test]
    fn zhou_fp4_is_fp8_but_for_two_forward_gemms() {
        let [zhou, fp8] = ["zhou-fp4", "fp8"].map(|name| name.parse::<Recipe>().unwrap());
        for number in 0..LINEARS {
            let (ours, theirs) = (zhou.linear(number), fp8.linear(number));
            assert_eq!(ours == theirs, number < 2, "{number}");
            assert_eq!(ours.backward(), theirs.backward(), "{number}");
        }
        let format = Format::mxfp4(PowerRule::Ceil, false);
        assert!([2, 3].iter().all(|number| zhou.linear(*number).forward().is_in(format)));
        // The last 8% of steps, all passes.
        for (step, bf16) in [(91, false), (92, true)] {
            let layers = zhou.for_layer(0, 2, step, 100);
            let all = layers.iter().flat_map(|linear| linear.gemms());
            assert_eq!(all.into_iter().all(|gemm| gemm.is_in(Format::BF16)), bf16, "{step}");
        }
    }
}
