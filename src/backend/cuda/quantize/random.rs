//! Random signs and bits as kernels take them: `random.cuh`.
//!
//! NOTE: what a draw is made for stays on the host beside it ([`Drawn`]), because a recorded kernel
//! gets the draws of every step anew.

use crate::formats::{self, GemmId, OperandId, Random};

/// `Transform` of the kernels.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(super) struct Transform {
    /// Sign i is bit i % 32 of word i / 32, a set bit being -1. A group of 16 fills its word twice.
    signs: [u32; formats::MAX_GROUP / 32],
    scale: f32,
}

impl Transform {
    /// With the signs of [`formats::fill_signs`].
    pub(super) fn of(transform: Option<formats::Transform>, gemm: GemmId, random: &Random) -> Self {
        let mut room = [0.0; formats::MAX_GROUP];
        let drawn = formats::fill_signs(&mut room, transform, gemm, random);
        let mut signs = [0; formats::MAX_GROUP / 32];
        for (i, sign) in drawn.iter().enumerate() {
            signs[i / 32] |= u32::from(*sign < 0.0) << (i % 32);
        }
        if drawn.len() == 16 {
            signs[0] |= signs[0] << 16;
        }
        Self { signs, scale: formats::group_scale(drawn.len().max(1)) }
    }
}

/// `Draw` of the kernels.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct Draw {
    words: [u32; 3],
    /// As every round of Philox adds it.
    keys: [[u32; 2]; 10],
    constants: [u32; 5],
}

impl From<formats::Draw> for Draw {
    fn from(draw: formats::Draw) -> Self {
        let key = |round: u32| {
            let step = |key: u32, by: u32| key.wrapping_add(by.wrapping_mul(round));
            [step(draw.key[0], formats::W0), step(draw.key[1], formats::W1)]
        };
        let words = [draw.word1, draw.word2, draw.word3];
        let keys = std::array::from_fn(|round| key(round as u32));
        Self { words, keys, constants: [1 << 16, 1 << 8, 1 << 4, 1 << 2, 0x80] }
    }
}

/// `Draws` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Draws {
    by_rows: Transform,
    by_columns: Transform,
    draw: Draw,
}

/// What the random numbers of a quantization are drawn for.
#[derive(Clone, Copy)]
pub(crate) struct Drawn {
    pub(crate) random: Random,
    /// The products that the forms along rows and down columns are for.
    pub(crate) gemms: [GemmId; 2],
    pub(crate) operand: OperandId,
    pub(crate) transform: Option<formats::Transform>,
}

impl Drawn {
    /// The same for another operand, in one product alone.
    pub(crate) fn of_other(self, gemm: GemmId, operand: OperandId) -> Self {
        Self { gemms: [gemm; 2], operand, ..self }
    }

    /// Of the transform, 0 without one.
    pub(crate) fn group(&self) -> usize {
        self.transform.map_or(0, formats::Transform::group)
    }

    pub(super) fn draws(&self) -> Draws {
        let Self { random, gemms: [first, second], operand, transform } = self;
        let of = |gemm| Transform::of(*transform, gemm, random);
        let by_rows = of(*first);
        let by_columns = if first == second { by_rows } else { of(*second) };
        Draws { by_rows, by_columns, draw: random.rounding(*operand).into() }
    }
}
