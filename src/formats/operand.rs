//! The recipe of a linear layer as data: three GEMMs of two operands each.
//!
//! Fields are private, and constructors refuse what no backend holds, so a backend that is handed a
//! [`LinearRecipe`] has nothing left to check but what is special to its device. What a new method
//! of training needs is a field or a variant here; `recipe` makes names and switches of them.

use std::fmt;

use super::{
    BLOCK, Block, Draw, Element, Format, GemmId, Kept, MAX_GROUP, Nvfp4Scale, OperandId, Outer,
    PowerRule, Random, Range, Rounding, Scale,
};
use crate::{Error, Result};

/// The random Hadamard transform of a GEMM's operands, along the reduction dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Transform {
    group: usize,
    signs: Signs,
}

/// Where the signs of the transform come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Signs {
    /// Fresh signs for every (step, micro-step, layer, GEMM).
    Random,
    /// One sign vector for the whole run.
    Fixed,
    /// The one of 16 signs that NVIDIA's TransformerEngine has (arXiv 2509.25149).
    Nvidia,
    /// None: the transform alone.
    Plain,
}

/// TransformerEngine's signs, a set bit being -1.
const NVIDIA_SIGNS: u16 = 0b1101_0111_1110_1000;

impl Transform {
    /// Groups of 64, fresh signs.
    pub const DEFAULT: Self = Self::of(64, Signs::Random);

    /// Groups of 16, 32, 64, 128 or 256 elements.
    pub fn new(group: usize, signs: Signs) -> Result<Self> {
        match group {
            _ if signs == Signs::Nvidia && group != 16 => {
                Err(invalid(format!("NVIDIA's signs are those of a group of 16; got {group}")))
            }
            16 | 32 | 64 | 128 | 256 => Ok(Self { group, signs }),
            _ => Err(invalid(format!("expected a group of 16, 32, 64, 128 or 256; got {group}"))),
        }
    }

    /// The same, for constants.
    pub(crate) const fn of(group: usize, signs: Signs) -> Self {
        assert!(group.is_power_of_two() && group >= 16 && group <= MAX_GROUP);
        Self { group, signs }
    }

    /// Length of a group.
    pub const fn group(self) -> usize {
        self.group
    }

    /// Where its signs come from.
    pub const fn signs(self) -> Signs {
        self.signs
    }
}

/// The signs of a GEMM's transform, as many as its group is long; none where there is no transform.
pub fn fill_signs<'a>(
    signs: &'a mut [f32; MAX_GROUP],
    transform: Option<Transform>,
    gemm: GemmId,
    random: &Random,
) -> &'a [f32] {
    let Some(transform) = transform else { return &[] };
    let signs = &mut signs[..transform.group];
    match transform.signs {
        Signs::Random => random.signs(gemm).fill_signs(signs),
        Signs::Fixed => Draw::fixed_signs(random.seed).fill_signs(signs),
        Signs::Plain => signs.fill(1.0),
        Signs::Nvidia => {
            for (i, sign) in signs.iter_mut().enumerate() {
                *sign = if NVIDIA_SIGNS >> i & 1 == 1 { -1.0 } else { 1.0 };
            }
        }
    }
    signs
}

/// What an operand is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperandSource {
    /// The tensor in the precision of activations, or of master weights.
    HighPrecision,
    /// What the forward pass dequantized of it, so that the gradient is that of what was computed.
    Forward,
}

/// One operand of a GEMM: its format, and how it gets there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Operand {
    format: Format,
    rounding: Rounding,
    range: Range,
    transform: Option<Transform>,
    source: OperandSource,
    corrected: bool,
    kept: Option<Kept>,
    steepness: Option<u8>,
}

impl Operand {
    /// In f32.
    pub const F32: Self = Self::of(Format::F32);
    /// In bf16.
    pub const BF16: Self = Self::of(Format::BF16);
    /// In FP8 E4M3.
    pub const E4M3: Self = Self::of(Format::E4M3);
    /// In FP8 E5M2.
    pub const E5M2: Self = Self::of(Format::E5M2);

    /// Rounded to nearest, of the tensor itself, with all of the format's range.
    pub const fn of(format: Format) -> Self {
        let source = OperandSource::HighPrecision;
        let (rounding, range) = (Rounding::Nearest, Range::Full);
        let (transform, corrected, kept, steepness) = (None, false, None, None);
        Self { format, rounding, range, transform, source, corrected, kept, steepness }
    }

    /// In MXFP4. Unbiased rounding leaves room above the largest element, the nearest does not.
    pub const fn mxfp4(rounding: Rounding, transform: Option<Transform>) -> Self {
        Self { transform, ..Self::of(Format::MXFP4).rounded(rounding) }
    }

    /// The same with a rounding, and the range that goes with it. [`Gemm::new`] checks the outcome.
    pub(crate) const fn rounded(self, rounding: Rounding) -> Self {
        let range = match (rounding, self.format.scale()) {
            (Rounding::Unbiased, Scale::Power(PowerRule::Floor | PowerRule::Even)) => {
                Range::ThreeQuarters
            }
            _ => Range::Full,
        };
        Self { rounding, range, ..self }
    }

    /// The same with a range, likewise.
    pub(crate) const fn within(self, range: Range) -> Self {
        Self { range, ..self }
    }

    /// The same with a transform, likewise.
    pub(crate) const fn rotated(self, transform: Transform) -> Self {
        Self { transform: Some(transform), ..self }
    }

    /// The same without a transform.
    pub(crate) const fn unrotated(self) -> Self {
        Self { transform: None, ..self }
    }

    /// The same in another format, with the range that goes with it there; likewise. Rounding to
    /// nearest keeps its own, which goes with any rule of the scale.
    pub(crate) const fn in_format(self, format: Format) -> Self {
        let there = Self { format, ..self }.rounded(self.rounding);
        match self.rounding {
            Rounding::Nearest if format.is_mxfp4() => Self { range: self.range, ..there },
            _ => there,
        }
    }

    /// The same, its product divided by the slope of its rounding ([`super::Slope`]), or not.
    pub fn with_correction(self, corrected: bool) -> Result<Self> {
        Self { corrected, ..self }.checked()
    }

    /// The same with what lies beyond the quantiles of a vector apart, in bf16. [`Gemm::new`] checks
    /// the outcome.
    pub(crate) const fn with_outliers(self, kept: Option<Kept>) -> Self {
        Self { kept, ..self }
    }

    /// The same with its gradient multiplied by [`super::dge_derivative`], likewise.
    pub(crate) const fn with_estimator(self, steepness: Option<u8>) -> Self {
        Self { steepness, ..self }
    }

    /// The same made from what the forward pass dequantized.
    pub const fn from_forward(self) -> Self {
        Self { source: OperandSource::Forward, ..self }
    }

    /// The same made from the tensor itself.
    pub(crate) const fn of_tensor_itself(self) -> Self {
        Self { source: OperandSource::HighPrecision, ..self }
    }

    /// The same in bf16, without a transform.
    pub const fn in_bf16(self) -> Self {
        Self { source: self.source, ..Self::BF16 }
    }

    /// The same with another rounding, and the range that goes with it.
    pub fn with_rounding(self, rounding: Rounding) -> Result<Self> {
        self.rounded(rounding).checked()
    }

    /// The same with another range.
    pub fn with_range(self, range: Range) -> Result<Self> {
        self.within(range).checked()
    }

    /// The same with another transform.
    pub fn with_transform(self, transform: Transform) -> Result<Self> {
        self.rotated(transform).checked()
    }

    /// It, or why no backend holds it.
    fn checked(self) -> Result<Self> {
        let Self { format, rounding, range, transform, corrected, kept, steepness, .. } = self;
        let by_vector = (Element::E2m1, Block::Vector, Scale::Power(PowerRule::Ceil));
        let is_by_vector = (format.element(), format.block(), format.scale()) == by_vector;
        if (kept.is_some() || steepness.is_some()) && !is_by_vector {
            let message = format!(
                "outliers apart and an estimator of the gradient need an operand in FP4 with powers \
                 of two for its vectors; got one in {format}"
            );
            return Err(invalid(message));
        }
        let blocks = format.is_mxfp4() || format.is_nvfp4();
        let needs = |what: &str, which: &str| {
            Err(invalid(format!("{what} needs an operand in {which}; got one in {format}")))
        };
        if rounding != Rounding::Nearest && !blocks {
            return needs("rounding other than to nearest", "MXFP4 or NVFP4");
        }
        if range != Range::Full && !format.is_mxfp4() {
            return needs("a range", "MXFP4");
        }
        if let Some(Transform { group, .. }) = transform {
            if !blocks {
                return needs("a transform", "MXFP4 or NVFP4");
            }
            if group < format.block().depth() {
                let depth = format.block().depth();
                let message =
                    format!("expected groups of at least a block of {depth}, got {group}");
                return Err(invalid(message));
            }
        }
        if corrected && rounding != Rounding::Nearest {
            let message = "a correction by the slope is for rounding to nearest: what is rounded \
                           stochastically has the mean of its source already";
            return Err(invalid(message));
        }
        if corrected && transform.is_none_or(|transform| transform.signs != Signs::Random) {
            let message = "a correction by the slope is unbiased over random rotations alone: \
                           expected a transform with random signs";
            return Err(invalid(message));
        }
        match (rounding, format.scale()) {
            (Rounding::Unbiased, Scale::Power(PowerRule::Quest | PowerRule::QuestFloor)) => {
                return Err(invalid("unbiased rounding needs a scale that leaves nothing above 6"));
            }
            (Rounding::Unbiased, Scale::Power(PowerRule::Floor | PowerRule::Even))
                if range == Range::Full =>
            {
                let message = "unbiased rounding needs range 3/4: what saturates is biased";
                return Err(invalid(message));
            }
            (Rounding::Unbiased | Rounding::Eden, Scale::TwoLevels(Nvfp4Scale::FourOverSix, _)) => {
                let message = "four over six is for rounding to nearest: choosing between two scales \
                               by what was rounded stochastically is biased";
                return Err(invalid(message));
            }
            (Rounding::Eden, Scale::TwoLevels(_, Outer::Tensor)) => {
                let random = transform.is_some_and(|t| t.signs == Signs::Random && t.group >= 128);
                if !random {
                    let message = "MS-EDEN is unbiased over random rotations of 128 or more alone: \
                                   expected a transform with g=128 or 256 and random signs";
                    return Err(invalid(message));
                }
            }
            (Rounding::Eden, _) => return needs("MS-EDEN", "NVFP4 with one scale of the tensor"),
            _ => {}
        }
        if rounding != Rounding::Nearest && matches!(format.block(), Block::Square(_)) {
            return Err(invalid("squares of one scale are rounded to nearest"));
        }
        Ok(self)
    }

    /// Whether it is E2M1 with scales of blocks or squares, not rotated: its codes are those of the
    /// elements themselves.
    pub(crate) fn has_codes(&self) -> bool {
        let blocks = matches!(self.format.block(), Block::Elements(_) | Block::Square(_));
        self.format.element() == Element::E2m1 && blocks && self.transform.is_none()
    }

    /// The number format.
    pub const fn format(&self) -> Format {
        self.format
    }

    /// How elements are rounded.
    pub const fn rounding(&self) -> Rounding {
        self.rounding
    }

    /// The part of the format's range that its scales use.
    pub const fn range(&self) -> Range {
        self.range
    }

    /// The transform before it is quantized, if any.
    pub const fn transform(&self) -> Option<Transform> {
        self.transform
    }

    /// The share of a vector beyond which numbers are apart, in bf16, if that is so.
    pub const fn outliers(&self) -> Option<Kept> {
        self.kept
    }

    /// The steepness of the estimator that its gradient is multiplied by, if any.
    pub const fn estimator(&self) -> Option<u8> {
        self.steepness
    }

    /// Whether its product is divided by the slope of its rounding.
    pub const fn is_corrected(&self) -> bool {
        self.corrected
    }

    /// What it is made from.
    pub const fn source(&self) -> OperandSource {
        self.source
    }
}

/// In a few words: the format and what scales it, the range, the rounding where that is not to
/// nearest, the transform as H and its group, `/c` for what is divided by its slope, `q` for what is
/// made from the forward pass's numbers.
impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { format, rounding, range, transform, source, corrected, kept, steepness } = self;
        write!(f, "{format}")?;
        match (format.element(), format.block(), format.scale()) {
            (Element::Int8, Block::Vector, _) => f.write_str(" by vector")?,
            (Element::Int8, ..) => f.write_str(" by tensor")?,
            (Element::E2m1, Block::Vector, _) => f.write_str(" by vector")?,
            (Element::E2m1, _, Scale::Power(rule)) => write!(f, " {rule}")?,
            (_, _, Scale::TwoLevels(Nvfp4Scale::Headroom, _)) => f.write_str(" 17/16")?,
            (_, _, Scale::TwoLevels(Nvfp4Scale::FourOverSix, _)) => f.write_str(" 4/6")?,
            (_, _, Scale::TwoLevels(_, Outer::Elements)) => f.write_str(" in 128")?,
            (_, _, Scale::TwoLevels(_, Outer::Powers)) => f.write_str(" in 128 of a power")?,
            _ => {}
        }
        if let Block::Square(n) = format.block() {
            write!(f, " {n}x{n}")?;
        }
        if *range == Range::ThreeQuarters {
            f.write_str(" 3/4")?;
        }
        f.write_str(match rounding {
            Rounding::Nearest => "",
            Rounding::Unbiased => " SR",
            Rounding::Eden => " EDEN",
            Rounding::ByMean => " EMA",
        })?;
        if let Some(Transform { group, signs }) = transform {
            write!(f, " H{group}")?;
            f.write_str(match signs {
                Signs::Random => "",
                Signs::Fixed => " fixed",
                Signs::Nvidia => " NVIDIA",
                Signs::Plain => " plain",
            })?;
        }
        if let Some(kept) = kept {
            write!(f, " OCC {}", kept.share())?;
        }
        if let Some(steepness) = steepness {
            write!(f, " DGE {steepness}")?;
        }
        f.write_str(if *corrected { " /c" } else { "" })?;
        f.write_str(if *source == OperandSource::Forward { " q" } else { "" })
    }
}

/// MXFP4 without a transform.
impl From<Rounding> for Operand {
    fn from(rounding: Rounding) -> Self {
        Self::mxfp4(rounding, None)
    }
}

/// One GEMM: a b^T, both read along the reduction dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gemm {
    a: Operand,
    b: Operand,
}

impl Gemm {
    /// Of two operands in bf16.
    pub const BF16: Self = Self::of(Operand::BF16);

    /// Two operands alike, known to be sound.
    pub const fn of(operand: Operand) -> Self {
        Self { a: operand, b: operand }
    }

    /// Two operands whose formats a product can take together. Transforms cancel in the product
    /// where they are the same.
    pub fn new(a: Operand, b: Operand) -> Result<Self> {
        let (a, b) = (a.checked()?, b.checked()?);
        if !a.format.goes_with(b.format) {
            let message = format!(
                "expected operands of a GEMM in formats that go together; got {} and {}",
                a.format, b.format
            );
            return Err(invalid(message));
        }
        if a.transform != b.transform {
            let message = format!(
                "expected one transform for both operands of a GEMM, which cancels in the product; \
                 got {:?} and {:?}",
                a.transform, b.transform
            );
            return Err(invalid(message));
        }
        if a.corrected != b.corrected {
            return Err(invalid("expected both operands of a GEMM to be corrected, or none"));
        }
        Ok(Self { a, b })
    }

    /// The first operand: x forward, dy backward.
    pub const fn a(&self) -> &Operand {
        &self.a
    }

    /// The second operand: W, or x in wgrad.
    pub const fn b(&self) -> &Operand {
        &self.b
    }

    /// Whether both operands are in `format`.
    pub fn is_in(&self, format: Format) -> bool {
        [self.a.format, self.b.format] == [format; 2]
    }

    /// Whether numbers lose nothing but bits of mantissa.
    pub const fn is_unscaled(&self) -> bool {
        self.a.format.is_unscaled()
    }

    /// Whether the product is divided by the slopes of both operands.
    pub const fn is_corrected(&self) -> bool {
        self.a.corrected
    }

    /// The element of the first operand, which is that of both but for FP8.
    pub const fn element(&self) -> Element {
        self.a.format.element()
    }

    /// The transform of both operands.
    pub const fn transform(&self) -> Option<Transform> {
        self.a.transform
    }

    /// What the reduction dimension is padded to a multiple of: whole groups of the transform, or
    /// else whole blocks.
    pub const fn group(&self) -> usize {
        match self.a.transform {
            Some(transform) => transform.group,
            None => self.a.format.block().depth(),
        }
    }

    /// What the sum of products is multiplied by, besides the operands' own scales.
    pub fn alpha(&self) -> f32 {
        product_scale(self.a, self.b)
    }
}

/// Operands of range 3/4 hold three quarters of their values each, so the product of two is
/// multiplied by (4/3)^2, and that with one of them by 4/3.
pub fn product_scale(a: impl Into<Operand>, b: impl Into<Operand>) -> f32 {
    match (a.into().range, b.into().range) {
        (Range::Full, Range::Full) => 1.0,
        (Range::ThreeQuarters, Range::ThreeQuarters) => 16.0 / 9.0,
        _ => 4.0 / 3.0,
    }
}

/// Linear layers of a block that a recipe tells apart: qkv, attention's projection, and the two of
/// the MLP.
pub const LINEARS: usize = 4;

/// Their names, by number.
pub const LINEAR_NAMES: [&str; LINEARS] = ["qkv", "proj", "fc1", "fc2"];

/// The three GEMMs of a linear layer y = x W^T + b in one step: what a backend sees of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinearRecipe {
    forward: Gemm,
    dgrad: Gemm,
    wgrad: Gemm,
}

impl LinearRecipe {
    /// Everything in f32.
    pub const F32: Self = Self::of(Gemm::of(Operand::F32));
    /// Everything in bf16.
    pub const BF16: Self = Self::of(Gemm::BF16);

    const fn of(gemm: Gemm) -> Self {
        Self { forward: gemm, dgrad: gemm, wgrad: gemm }
    }

    /// y = x W^T + b, dx = dy W and dW = dy^T x, in formats that go together.
    pub fn new(forward: Gemm, dgrad: Gemm, wgrad: Gemm) -> Result<Self> {
        let recipe = Self { forward, dgrad, wgrad };
        let in_f32 = [forward, dgrad, wgrad].map(|gemm| gemm.element() == Element::F32);
        if in_f32.contains(&true) && in_f32.contains(&false) {
            return Err(invalid("expected f32 in all three GEMMs or in none"));
        }
        let operands = recipe.operands();
        let (of_forward, of_backward) = operands.split_at(2);
        for (what, operand) in of_forward {
            if operand.source == OperandSource::Forward {
                return Err(invalid(format!("{what} is what others are made from")));
            }
            if !matches!(operand.rounding, Rounding::Nearest | Rounding::ByMean) {
                let message = format!(
                    "{what} is rounded to nearest: the forward pass is no mean over random bits"
                );
                return Err(invalid(message));
            }
        }
        let by_mean = |operand: &Operand| operand.rounding == Rounding::ByMean;
        let others = operands.iter().filter(|(what, _)| *what != "W in the forward pass");
        if let Some((what, _)) = others.into_iter().find(|(_, operand)| by_mean(operand)) {
            return Err(invalid(format!("{what} has no slow mean: W in the forward pass has one")));
        }
        recipe.checked_rotation()?;
        for (what, operand) in operands {
            let is_x = what == "x in the forward pass";
            let is_w = what == "W in the forward pass";
            if operand.kept.is_some() && !is_x || operand.steepness.is_some() && !is_w {
                let message = format!(
                    "expected outliers apart of x in the forward pass alone, and an estimator of \
                     the gradient of W there; got {operand} as {what}"
                );
                return Err(invalid(message));
            }
        }
        let missing = |(what, operand): &(&'static str, &Operand)| {
            let kept = match *what {
                "W in dgrad" => forward.b,
                "x in wgrad" => forward.a,
                _ => return (operand.source == OperandSource::Forward).then_some(*what),
            };
            (operand.source == OperandSource::Forward && kept.format.is_unscaled()).then_some(*what)
        };
        if let Some(what) = of_backward.iter().find_map(missing) {
            let message = format!(
                "{what} cannot be made from what the forward pass dequantized, which is x and W \
                 where that quantizes them; use the tensor itself"
            );
            return Err(invalid(message));
        }
        if [wgrad.a, wgrad.b].iter().any(|operand| super::has_vector_scales(operand.format)) {
            let message =
                "wgrad adds to what is there: expected operands without scales of vectors";
            return Err(invalid(message));
        }
        Ok(recipe)
    }

    /// What its forward pass rotates, products turn back ([`super::Restoration`]).
    fn checked_rotation(&self) -> Result<()> {
        let Some(Transform { group, signs }) = self.forward.transform() else { return Ok(()) };
        if (group, signs) != (BLOCK, Signs::Plain) {
            let message = format!(
                "a forward pass is rotated in groups of {BLOCK} without signs, or not at all; got \
                 groups of {group} with signs {signs:?}"
            );
            return Err(invalid(message));
        }
        if [self.forward.a, self.forward.b].iter().any(|operand| operand.format.is_square()) {
            return Err(invalid(
                "what a forward pass rotates has scales of blocks, not of squares; use w=1d",
            ));
        }
        let turned = |gemm: &Gemm| gemm.b.source == OperandSource::Forward;
        let by_vector = |gemm: &Gemm| super::has_vector_scales(gemm.a.format);
        if self.backward().into_iter().any(|gemm| turned(gemm) && by_vector(gemm)) {
            return Err(invalid("what is turned back has no scales of vectors"));
        }
        Ok(())
    }

    /// The same with backward operands that `change` makes of those that are quantized.
    pub fn change_backward(
        &self,
        change: impl Fn(GemmId, OperandId, Operand) -> Result<Operand>,
    ) -> Result<Self> {
        let change = |gemm, id, operand: Operand| {
            if operand.format.is_unscaled() { Ok(operand) } else { change(gemm, id, operand) }
        };
        let gemm = |id, gemm: &Gemm, other| {
            Gemm::new(change(id, OperandId::Dy, gemm.a)?, change(id, other, gemm.b)?)
        };
        Self::new(
            self.forward,
            gemm(GemmId::Dgrad, &self.dgrad, OperandId::W)?,
            gemm(GemmId::Wgrad, &self.wgrad, OperandId::X)?,
        )
    }

    /// The same with another forward GEMM.
    pub fn with_forward(&self, forward: Gemm) -> Result<Self> {
        Self::new(forward, self.dgrad, self.wgrad)
    }

    /// What falls back to bf16 of it: the forward pass, or the backward pass, or both, as far as
    /// they are quantized. Backward operands are then made from what they can be made from.
    pub(crate) fn in_bf16(&self, forward: bool, backward: bool) -> Self {
        let Self { forward: was, dgrad, wgrad } = *self;
        let turned = |gemm: Gemm| {
            let in_f32 = gemm.element() == Element::F32;
            if in_f32 { gemm } else { Gemm { a: gemm.a.in_bf16(), b: gemm.b.in_bf16() } }
        };
        let of_tensor = |gemm: Gemm| match forward {
            true => Gemm { a: gemm.a, b: gemm.b.of_tensor_itself() },
            false => gemm,
        };
        let forward = if forward { turned(was) } else { was };
        let [dgrad, wgrad] =
            [dgrad, wgrad].map(|gemm| of_tensor(if backward { turned(gemm) } else { gemm }));
        Self { forward, dgrad, wgrad }
    }

    /// The same with W in the forward pass rounded by its slow mean; as it is where W is not rounded
    /// to nearest by blocks of E2M1, or rotated before.
    pub(crate) fn by_mean(&self) -> Self {
        let Gemm { a, b } = self.forward;
        let Operand { format, rounding, transform, .. } = b;
        let blocks = matches!(format.block(), Block::Elements(_)) && transform.is_none();
        if format.element() != Element::E2m1 || !blocks || rounding != Rounding::Nearest {
            return *self;
        }
        let b = Operand { rounding: Rounding::ByMean, ..b };
        Self { forward: Gemm { a, b }, ..*self }
    }

    /// y = x W^T + b.
    pub const fn forward(&self) -> &Gemm {
        &self.forward
    }

    /// dx = dy W.
    pub const fn dgrad(&self) -> &Gemm {
        &self.dgrad
    }

    /// dW = dy^T x.
    pub const fn wgrad(&self) -> &Gemm {
        &self.wgrad
    }

    /// Both GEMMs of the backward pass.
    pub const fn backward(&self) -> [&Gemm; 2] {
        [&self.dgrad, &self.wgrad]
    }

    /// All three.
    pub const fn gemms(&self) -> [&Gemm; 3] {
        [&self.forward, &self.dgrad, &self.wgrad]
    }

    /// All six operands, with words for messages.
    pub const fn operands(&self) -> [(&'static str, &Operand); 6] {
        let Self { forward, dgrad, wgrad } = self;
        [
            ("x in the forward pass", &forward.a),
            ("W in the forward pass", &forward.b),
            ("dy in dgrad", &dgrad.a),
            ("W in dgrad", &dgrad.b),
            ("dy in wgrad", &wgrad.a),
            ("x in wgrad", &wgrad.b),
        ]
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::invalid("recipe", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says<T>(result: Result<T>, part: &str) {
        let error = result.err().map_or_else(String::new, |error| error.to_string());
        assert!(error.contains(part), "expected {part:?} in {error:?}");
    }

    #[test]
    fn what_no_backend_holds_cannot_be_built() {
        let transform = |group, signs| Transform::new(group, signs).unwrap();
        for group in [0, 1, 8, 48, 512] {
            says(Transform::new(group, Signs::Random), "32, 64, 128 or 256");
        }
        let mxfp4 = |transform| Operand::mxfp4(Rounding::Unbiased, transform);
        let rotated = mxfp4(Some(Transform::DEFAULT));
        for other in [
            mxfp4(None),
            mxfp4(Some(transform(32, Signs::Random))),
            mxfp4(Some(transform(64, Signs::Fixed))),
        ] {
            says(Gemm::new(rotated, other), "one transform");
        }
        says(Gemm::new(rotated, Operand::BF16), "that go together; got MXFP4 and bf16");
        says(rotated.with_range(Range::Full), "needs range 3/4");
        says(Operand::BF16.with_range(Range::ThreeQuarters), "in MXFP4; got one in bf16");
        says(Operand::F32.with_transform(Transform::DEFAULT), "MXFP4 or NVFP4; got one in f32");
        let unbiased = Operand::E4M3.with_rounding(Rounding::Unbiased);
        says(unbiased, "MXFP4 or NVFP4; got one in FP8 E4M3");
        says(Gemm::new(Operand::E5M2, Operand::E5M2), "got FP8 E5M2 and FP8 E5M2");
        says(mxfp4(None).with_correction(true), "is for rounding to nearest");
        let nearest = |transform| Operand::mxfp4(Rounding::Nearest, transform);
        for transform in [None, Some(transform(64, Signs::Fixed))] {
            says(nearest(transform).with_correction(true), "over random rotations alone");
        }
        let both = nearest(Some(Transform::DEFAULT));
        says(Gemm::new(both.with_correction(true).unwrap(), both), "to be corrected, or none");
        let nvfp4 = |rule| Operand::of(Format::nvfp4(rule, false));
        says(nvfp4(Nvfp4Scale::FourOverSix).with_rounding(Rounding::Unbiased), "is biased");
        for transform in [None, Some((64, Signs::Random)), Some((128, Signs::Fixed))] {
            let operand = nvfp4(Nvfp4Scale::Full).rounded(Rounding::Eden);
            let operand = Operand {
                transform: transform.map(|(group, signs)| Transform::of(group, signs)),
                ..operand
            };
            says(Gemm::new(operand, operand), "random rotations of 128 or more");
        }

        let [f32, bf16, e4m3] = [Operand::F32, Operand::BF16, Operand::E4M3].map(Gemm::of);
        let mxfp4 = Gemm::of(rotated);
        says(LinearRecipe::new(f32, mxfp4, mxfp4), "all three GEMMs or in none");
        says(LinearRecipe::new(mxfp4, mxfp4, mxfp4), "x in the forward pass is rounded to nearest");
        let vectors = Gemm::of(Operand::of(Format::INT8_VECTORS));
        says(LinearRecipe::new(bf16, mxfp4, vectors), "without scales of vectors");
        let rotated_forward = |group, signs, square| {
            let operand = Operand::of(Format::mxfp4(PowerRule::Ceil, square));
            Gemm::of(operand.rotated(Transform::of(group, signs)))
        };
        for (group, signs) in [(64, Signs::Plain), (32, Signs::Fixed), (32, Signs::Random)] {
            let recipe = LinearRecipe::new(rotated_forward(group, signs, false), mxfp4, mxfp4);
            says(recipe, "rotated in groups of 32 without signs");
        }
        let squares = rotated_forward(32, Signs::Plain, true);
        says(LinearRecipe::new(squares, mxfp4, mxfp4), "of blocks, not of squares");
        let plain = rotated_forward(32, Signs::Plain, false);
        let int8 = Operand::of(Format::INT8_VECTORS);
        let from_forward = Gemm::new(int8, int8.from_forward()).unwrap();
        says(LinearRecipe::new(plain, from_forward, mxfp4), "no scales of vectors");
        LinearRecipe::new(plain, mxfp4, mxfp4).unwrap();
        let from_forward = |a: Operand| Gemm::new(a, a.from_forward()).unwrap();
        says(LinearRecipe::new(bf16, mxfp4, from_forward(rotated)), "x in wgrad");
        says(LinearRecipe::new(bf16, from_forward(rotated), mxfp4), "W in dgrad");
        says(LinearRecipe::new(e4m3, mxfp4, Gemm::of(rotated.from_forward())), "dy in wgrad");
        says(LinearRecipe::new(from_forward(Operand::E4M3), mxfp4, mxfp4), "W in the forward");
        LinearRecipe::new(e4m3, mxfp4, from_forward(rotated)).unwrap();
    }

    #[test]
    fn a_reduction_is_padded_to_whole_groups_or_blocks() {
        for (operand, group) in [
            (Operand::BF16, 1),
            (Operand::E4M3, 1),
            (Rounding::Nearest.into(), 32),
            (Operand::mxfp4(Rounding::Nearest, Some(Transform::DEFAULT)), 64),
        ] {
            assert_eq!(Gemm::of(operand).group(), group);
        }
    }

    #[test]
    fn ranges_leave_the_product_as_it_is() {
        let [full, part] = [Rounding::Nearest, Rounding::Unbiased].map(Operand::from);
        let alpha = |a, b| Gemm::new(a, b).unwrap().alpha();
        assert_eq!((alpha(full, full), alpha(full, part)), (1.0, 4.0 / 3.0));
        assert_eq!((alpha(part, full), alpha(part, part)), (4.0 / 3.0, 16.0 / 9.0));
    }
}
