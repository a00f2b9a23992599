//! Number formats as data: an element, what shares a scale, and the scale's rule.
//!
//! Fields are private and there is no constructor: the constants are all that backends hold.

use std::fmt;

use super::BLOCK;

/// What one number is held in, besides its scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// f32.
    F32,
    /// bf16, rounded to nearest even.
    Bf16,
    /// FP8: 4 exponent bits, 3 mantissa bits.
    E4m3,
    /// FP4: 2 exponent bits, 1 mantissa bit.
    E2m1,
}

/// What shares one scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Block {
    /// All of a tensor.
    Tensor,
    /// So many elements that follow each other along the reduction dimension.
    Elements(usize),
}

/// The rule of a scale, from the largest magnitude (amax) of what shares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scale {
    /// Numbers are held as they are.
    One,
    /// 2^(floor(log2 amax) - 2), held as E8M0: the largest element lies in [4, 8) before rounding,
    /// and above 6 it saturates. OCP Microscaling Formats v1.0, section 6.3.
    Floor,
    /// The smallest power of two with which nothing saturates, held as f32 ([`super::e4m3_scale`]).
    Ceil,
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
    pub const F32: Self = Self { element: Element::F32, block: Block::Tensor, scale: Scale::One };
    /// bf16.
    pub const BF16: Self = Self { element: Element::Bf16, block: Block::Tensor, scale: Scale::One };
    /// FP8 E4M3 with one power of two a tensor, computed from the tensor ("current scaling").
    pub const E4M3: Self =
        Self { element: Element::E4m3, block: Block::Tensor, scale: Scale::Ceil };
    /// MXFP4: blocks of 32 along the reduction dimension.
    pub const MXFP4: Self =
        Self { element: Element::E2m1, block: Block::Elements(BLOCK), scale: Scale::Floor };

    /// What one number is held in.
    pub const fn element(self) -> Element {
        self.element
    }

    /// What shares one scale.
    pub const fn block(self) -> Block {
        self.block
    }

    /// The rule of the scale.
    pub const fn scale(self) -> Scale {
        self.scale
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.element {
            Element::F32 => "f32",
            Element::Bf16 => "bf16",
            Element::E4m3 => "FP8 E4M3",
            Element::E2m1 => "MXFP4",
        })
    }
}
