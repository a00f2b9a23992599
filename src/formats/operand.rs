//! The recipe of a linear layer as data: three GEMMs of two operands each.
//!
//! Fields are private, and constructors refuse what no backend holds, so a backend that is handed a
//! [`LinearRecipe`] has nothing left to check but what is special to its device. What a new method
//! of training needs is a field or a variant here; `recipe` makes names and switches of them.

use super::{Block, Draw, Format, GemmId, MAX_GROUP, OperandId, Random, Range, Rounding};
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
}

impl Transform {
    /// Groups of 64, fresh signs.
    pub const DEFAULT: Self = Self { group: 64, signs: Signs::Random };

    /// Groups of 32, 64, 128 or 256 elements.
    pub fn new(group: usize, signs: Signs) -> Result<Self> {
        match group {
            32 | 64 | 128 | 256 => Ok(Self { group, signs }),
            _ => Err(invalid(format!("expected a group of 32, 64, 128 or 256; got {group}"))),
        }
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
    let draw = match transform.signs {
        Signs::Random => random.signs(gemm),
        Signs::Fixed => Draw::fixed_signs(random.seed),
    };
    draw.fill_signs(signs);
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
}

impl Operand {
    /// In f32.
    pub const F32: Self = Self::plain(Format::F32);
    /// In bf16.
    pub const BF16: Self = Self::plain(Format::BF16);
    /// In FP8 E4M3.
    pub const E4M3: Self = Self::plain(Format::E4M3);

    const fn plain(format: Format) -> Self {
        let source = OperandSource::HighPrecision;
        Self { format, rounding: Rounding::Nearest, range: Range::Full, transform: None, source }
    }

    /// In MXFP4. Unbiased rounding leaves room above the largest element, the nearest does not.
    pub const fn mxfp4(rounding: Rounding, transform: Option<Transform>) -> Self {
        let range = match rounding {
            Rounding::Nearest => Range::Full,
            Rounding::Unbiased => Range::ThreeQuarters,
        };
        Self { rounding, range, transform, ..Self::plain(Format::MXFP4) }
    }

    /// The same made from what the forward pass dequantized.
    pub const fn from_forward(self) -> Self {
        Self { source: OperandSource::Forward, ..self }
    }

    /// The same in bf16, without a transform.
    pub const fn in_bf16(self) -> Self {
        Self { source: self.source, ..Self::BF16 }
    }

    /// The same with another rounding, and the range that goes with it.
    pub fn with_rounding(self, rounding: Rounding) -> Result<Self> {
        self.needs_mxfp4("rounding other than to nearest")?;
        Ok(Self { source: self.source, ..Self::mxfp4(rounding, self.transform) })
    }

    /// The same with another range.
    pub fn with_range(self, range: Range) -> Result<Self> {
        self.needs_mxfp4("a range")?;
        if self.rounding == Rounding::Unbiased && range == Range::Full {
            let message = "unbiased rounding needs range 3/4: what saturates is biased";
            return Err(invalid(message));
        }
        Ok(Self { range, ..self })
    }

    /// The same with another transform.
    pub fn with_transform(self, transform: Transform) -> Result<Self> {
        self.needs_mxfp4("a transform")?;
        Ok(Self { transform: Some(transform), ..self })
    }

    fn needs_mxfp4(self, what: &str) -> Result<()> {
        if self.format == Format::MXFP4 {
            return Ok(());
        }
        Err(invalid(format!("{what} needs an operand in MXFP4; got one in {}", self.format)))
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

    /// What it is made from.
    pub const fn source(&self) -> OperandSource {
        self.source
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

    /// Two operands alike.
    pub const fn of(operand: Operand) -> Self {
        Self { a: operand, b: operand }
    }

    /// Two operands of one format. Transforms cancel in the product where they are the same.
    pub fn new(a: Operand, b: Operand) -> Result<Self> {
        if a.format != b.format {
            let message = format!(
                "expected both operands of a GEMM in one format; got {} and {}",
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

    /// The format of both operands.
    pub const fn format(&self) -> Format {
        self.a.format
    }

    /// The transform of both operands.
    pub const fn transform(&self) -> Option<Transform> {
        self.a.transform
    }

    /// What the reduction dimension is padded to a multiple of: whole groups of the transform, or
    /// else whole blocks.
    pub const fn group(&self) -> usize {
        match (self.a.transform, self.a.format.block()) {
            (Some(transform), _) => transform.group,
            (None, Block::Elements(n)) => n,
            (None, Block::Tensor) => 1,
        }
    }

    /// What the sum of products is multiplied by.
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
        let in_f32 = [forward, dgrad, wgrad].map(|gemm| gemm.format() == Format::F32);
        if in_f32.contains(&true) && in_f32.contains(&false) {
            return Err(invalid("expected f32 in all three GEMMs or in none"));
        }
        if forward.format() == Format::MXFP4 {
            return Err(invalid("expected a forward GEMM in f32, bf16 or FP8 E4M3; got MXFP4"));
        }
        if recipe.backward().iter().any(|gemm| gemm.format() == Format::E4M3) {
            return Err(invalid("expected backward GEMMs in f32, bf16 or MXFP4; got FP8 E4M3"));
        }
        // x in wgrad, the last one, is what a forward pass in FP8 keeps.
        let others = if forward.format() == Format::E4M3 { 5 } else { 6 };
        let operands = recipe.operands();
        let missing = operands[..others].iter().find(|(_, o)| o.source == OperandSource::Forward);
        if let Some((what, _)) = missing {
            let message = format!(
                "{what} cannot be made from what the forward pass dequantized, which is kept of x \
                 alone, and where that is in FP8; use the tensor itself"
            );
            return Err(invalid(message));
        }
        Ok(recipe)
    }

    /// The same with backward operands that `change` makes of those in MXFP4.
    pub fn change_mxfp4(
        &self,
        change: impl Fn(GemmId, OperandId, Operand) -> Result<Operand>,
    ) -> Result<Self> {
        let change = |gemm, id, operand: Operand| match operand.format {
            Format::MXFP4 => change(gemm, id, operand),
            _ => Ok(operand),
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
        for group in [0, 1, 16, 48, 512] {
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
        says(Gemm::new(rotated, Operand::BF16), "in one format; got MXFP4 and bf16");
        says(rotated.with_range(Range::Full), "needs range 3/4");
        says(Operand::BF16.with_range(Range::ThreeQuarters), "in MXFP4; got one in bf16");
        says(Operand::F32.with_transform(Transform::DEFAULT), "in MXFP4; got one in f32");
        says(Operand::E4M3.with_rounding(Rounding::Unbiased), "in MXFP4; got one in FP8 E4M3");

        let [f32, bf16, e4m3] = [Operand::F32, Operand::BF16, Operand::E4M3].map(Gemm::of);
        let mxfp4 = Gemm::of(rotated);
        says(LinearRecipe::new(f32, mxfp4, mxfp4), "all three GEMMs or in none");
        says(LinearRecipe::new(mxfp4, mxfp4, mxfp4), "got MXFP4");
        says(LinearRecipe::new(e4m3, mxfp4, e4m3), "got FP8 E4M3");
        let from_forward = |a: Operand| Gemm::new(a, a.from_forward()).unwrap();
        says(LinearRecipe::new(bf16, mxfp4, from_forward(rotated)), "x in wgrad");
        says(LinearRecipe::new(e4m3, from_forward(rotated), mxfp4), "W in dgrad");
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
