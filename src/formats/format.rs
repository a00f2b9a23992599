//! Number formats as data: an element, what shares a scale, and how the scale is made.
//!
//! Fields are private, and functions make what backends hold and nothing else.

use std::fmt;

use super::{BLOCK, NVFP4_BLOCK, Nvfp4Scale, PowerRule};

/// What one number is held in, besides its scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// f32.
    F32,
    /// bf16, rounded to nearest even.
    Bf16,
    /// bf16 with fewer bits of mantissa, E8Mx: how many, and whether the others are cut off instead
    /// of rounded.
    Mantissa(u8, bool),
    /// FP8: 4 exponent bits, 3 mantissa bits.
    E4m3,
    /// FP8: 5 exponent bits, 2 mantissa bits.
    E5m2,
    /// -127 to 127.
    Int8,
    /// FP4: 2 exponent bits, 1 mantissa bit.
    E2m1,
}

/// What shares one scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Block {
    /// All of a tensor.
    Tensor,
    /// A vector along the reduction dimension.
    Vector,
    /// So many elements that follow each other along the reduction dimension.
    Elements(usize),
    /// A square of so many vectors and elements: the same along either dimension, so that what is
    /// quantized for one product is quantized for the transposed one, too.
    Square(usize),
}

impl Block {
    /// What the reduction dimension is padded to whole ones of.
    pub const fn depth(self) -> usize {
        match self {
            Self::Tensor | Self::Vector => 1,
            Self::Elements(n) | Self::Square(n) => n,
        }
    }

    /// Vectors that share scales.
    pub const fn vectors(self) -> usize {
        match self {
            Self::Tensor | Self::Vector | Self::Elements(_) => 1,
            Self::Square(n) => n,
        }
    }
}

/// What lies above the E4M3 scales of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outer {
    /// One f32 for the tensor, which multiplies the sums of products.
    Tensor,
    /// One f32 for every 128 elements along the reduction dimension.
    Elements,
    /// The same, made a power of two, which products in bf16 hold.
    Powers,
}

/// How a scale is made from what shares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scale {
    /// Numbers are held as they are.
    One,
    /// A power of two.
    Power(PowerRule),
    /// f32: the largest magnitude over the largest value of an element.
    Amax,
    /// E4M3, below an outer scale.
    TwoLevels(Nvfp4Scale, Outer),
}

/// A number format of GEMM operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    element: Element,
    block: Block,
    scale: Scale,
}

impl Format {
    /// f32.
    pub const F32: Self = Self::unscaled(Element::F32);
    /// bf16.
    pub const BF16: Self = Self::unscaled(Element::Bf16);
    /// FP8 E4M3 with one power of two a tensor, the smallest with which nothing saturates, computed
    /// from the tensor ("current scaling").
    pub const E4M3: Self = Self::fp8(Element::E4m3);
    /// FP8 E5M2, likewise.
    pub const E5M2: Self = Self::fp8(Element::E5m2);
    /// MXFP4 of OCP: blocks of 32 along the reduction dimension.
    pub const MXFP4: Self = Self::mxfp4(PowerRule::Floor, false);
    /// NVFP4: blocks of 16 along the reduction dimension, below one scale of the tensor.
    pub const NVFP4: Self = Self::nvfp4(Nvfp4Scale::Full, false);
    /// Integers of 8 bits with a scale for every vector.
    pub const INT8_VECTORS: Self = Self::int8(Block::Vector);
    /// The same with one for the tensor.
    pub const INT8_TENSOR: Self = Self::int8(Block::Tensor);

    const fn unscaled(element: Element) -> Self {
        Self { element, block: Block::Tensor, scale: Scale::One }
    }

    const fn fp8(element: Element) -> Self {
        Self { element, block: Block::Tensor, scale: Scale::Power(PowerRule::Ceil) }
    }

    const fn int8(block: Block) -> Self {
        Self { element: Element::Int8, block, scale: Scale::Amax }
    }

    /// bf16 with `bits` bits of mantissa, 1 to 7, rounded to nearest even, or with the others `cut`
    /// off.
    pub const fn mantissa(bits: u8, cut: bool) -> Self {
        assert!(bits >= 1 && bits <= 7, "bf16 has 7 bits of mantissa");
        Self::unscaled(Element::Mantissa(bits, cut))
    }

    /// MXFP4 with another rule of the scale, of 32 elements or `square`.
    pub const fn mxfp4(rule: PowerRule, square: bool) -> Self {
        let block = if square { Block::Square(BLOCK) } else { Block::Elements(BLOCK) };
        Self { element: Element::E2m1, block, scale: Scale::Power(rule) }
    }

    /// NVFP4 below one scale of the tensor, of 16 elements or `square`.
    pub const fn nvfp4(rule: Nvfp4Scale, square: bool) -> Self {
        let block = if square { Block::Square(NVFP4_BLOCK) } else { Block::Elements(NVFP4_BLOCK) };
        Self { element: Element::E2m1, block, scale: Scale::TwoLevels(rule, Outer::Tensor) }
    }

    /// NVFP4 below a scale for every 128 elements.
    pub const fn nvfp4_within(powers: bool) -> Self {
        let outer = if powers { Outer::Powers } else { Outer::Elements };
        Self {
            element: Element::E2m1,
            block: Block::Elements(NVFP4_BLOCK),
            scale: Scale::TwoLevels(Nvfp4Scale::Full, outer),
        }
    }

    /// E2M1 with a scale for every vector, f32 or a power of two.
    pub const fn e2m1_vectors(powers: bool) -> Self {
        let scale = if powers { Scale::Power(PowerRule::Ceil) } else { Scale::Amax };
        Self { element: Element::E2m1, block: Block::Vector, scale }
    }

    /// What one number is held in.
    pub const fn element(self) -> Element {
        self.element
    }

    /// What shares one scale.
    pub const fn block(self) -> Block {
        self.block
    }

    /// Whether several vectors share one scale.
    pub const fn is_square(self) -> bool {
        matches!(self.block, Block::Square(_))
    }

    /// How the scale is made.
    pub const fn scale(self) -> Scale {
        self.scale
    }

    /// Whether it is MXFP4, by whatever rule.
    pub const fn is_mxfp4(self) -> bool {
        let blocks = matches!(self.block, Block::Elements(_) | Block::Square(_));
        matches!((self.element, self.scale), (Element::E2m1, Scale::Power(_))) && blocks
    }

    /// Whether it is NVFP4.
    pub const fn is_nvfp4(self) -> bool {
        matches!(self.scale, Scale::TwoLevels(..))
    }

    /// Whether numbers lose nothing but bits of mantissa.
    pub const fn is_unscaled(self) -> bool {
        matches!(self.scale, Scale::One)
    }

    /// What a product can take together: one element, or two of FP8 that are not both E5M2, with
    /// blocks as long and scales of one kind.
    pub fn goes_with(self, other: Self) -> bool {
        let fp8 = |f: Self| matches!(f.element, Element::E4m3 | Element::E5m2);
        if fp8(self) && fp8(other) {
            return (self.element, other.element) != (Element::E5m2, Element::E5m2);
        }
        let kind = |f: Self| match f.scale {
            Scale::TwoLevels(_, outer) => Some(outer),
            _ => None,
        };
        let depth = |f: Self| f.block.depth();
        self.element == other.element
            && (self.is_mxfp4(), kind(self)) == (other.is_mxfp4(), kind(other))
            && depth(self) == depth(other)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.element {
            Element::F32 => f.write_str("f32"),
            Element::Bf16 => f.write_str("bf16"),
            Element::Mantissa(bits, cut) => {
                write!(f, "E8M{bits}{}", if cut { ", cut" } else { "" })
            }
            Element::E4m3 => f.write_str("FP8 E4M3"),
            Element::E5m2 => f.write_str("FP8 E5M2"),
            Element::Int8 => f.write_str("int8"),
            Element::E2m1 if self.is_mxfp4() => f.write_str("MXFP4"),
            Element::E2m1 if self.is_nvfp4() => f.write_str("NVFP4"),
            Element::E2m1 => f.write_str("FP4"),
        }
    }
}
