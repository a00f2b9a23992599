//! Random bits: Philox4x32-10, a counter-based generator (Salmon et al. 2011).
//!
//! There is no state. Bits are a function of the seed (the key) and of a counter that says what
//! they are for, so they do not depend on threads, on the order of execution or on resuming.
//!
//! # The counter
//!
//! | word | bits | for rounding and signs | for the other purposes |
//! | --- | --- | --- | --- |
//! | 0 | 32 | row of the element in its source tensor, or sign group | an index |
//! | 1 | 31..24 | [`Purpose`] | [`Purpose`] |
//! | 1 | 23..0 | column of the element / 8 | a sub-purpose |
//! | 2 | 32 | optimizer step | free |
//! | 3 | 31..18 | micro-step | free |
//! | 3 | 17..6 | layer | free |
//! | 3 | 5..4 | linear layer of the block | free |
//! | 3 | 3..0 | [`OperandId`] or [`GemmId`] | free |
//!
//! Rounding takes 16 bits an element: one call serves the 8 elements whose columns share column/8,
//! column % 8 = j taking half j % 2 (low half first) of word j / 2. "Row" and "column" are those of
//! the tensor as it is stored: dy and x are (rows, channels), W is (outputs, inputs). Both
//! quantized forms of dy therefore share bits, which each GEMM allows, since its two operands never
//! do. Elements that padding adds lie beyond the last row or column and have bits of their own.

/// 128 random bits for a counter under a key.
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let p0 = u64::from(c0) * u64::from(M0);
        let p1 = u64::from(c2) * u64::from(M1);
        (c0, c1, c2, c3) =
            ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(W0);
        k1 = k1.wrapping_add(W1);
    }
    [c0, c1, c2, c3]
}

/// Multipliers of a round.
pub(crate) const M0: u32 = 0xd251_1f53;
pub(crate) const M1: u32 = 0xcd9e_8d57;
/// Added to the key after a round.
pub(crate) const W0: u32 = 0x9e37_79b9;
pub(crate) const W1: u32 = 0xbb67_ae85;

/// What random bits are drawn for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Stochastic rounding.
    Rounding = 1,
    /// Signs of the Hadamard transform.
    Signs = 2,
    /// Initial weights.
    Weights = 3,
    /// Order of the training data.
    Order = 4,
    /// Sampling from a model.
    Sampling = 5,
    /// What a host draws ([`super::Philox`]).
    Host = 6,
    /// Projections that channels are hashed by ([`super::projections`]).
    Projections = 7,
    /// Positions of a sequence that a block keeps ([`super::kept_positions`]).
    Tokens = 8,
    /// Stochastic rounding of an optimizer's moments.
    Moments = 9,
    /// Stochastic rounding of gradients that ranks send to each other, and the signs of their rotation.
    Wire = 10,
}

/// The tensors that are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OperandId {
    /// Output gradient, in dgrad and wgrad.
    Dy = 0,
    /// Input, in wgrad.
    X = 1,
    /// Weight, in dgrad.
    W = 2,
    /// Scales of blocks of these, where they are rounded stochastically.
    DyScales = 3,
    /// Likewise.
    XScales = 4,
    /// Likewise.
    WScales = 5,
}

impl OperandId {
    /// What the scales of its blocks are drawn for.
    pub fn of_scales(self) -> Self {
        match self {
            Self::Dy | Self::DyScales => Self::DyScales,
            Self::X | Self::XScales => Self::XScales,
            Self::W | Self::WScales => Self::WScales,
        }
    }
}

/// The GEMMs of a backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum GemmId {
    /// dx = dy W.
    Dgrad = 0,
    /// dW = dy^T x.
    Wgrad = 1,
}

/// The place of a linear layer's backward pass in a run: everything that its bits depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Random {
    /// The run's seed.
    pub seed: u64,
    /// Optimizer step.
    pub step: u32,
    /// Micro-step within the step, below 16,384.
    pub micro_step: u32,
    /// Layer, below 4,096.
    pub layer: u32,
    /// Linear layer within it, below 4.
    pub linear: u32,
}

impl Random {
    /// That of a forward pass, which draws nothing.
    pub(crate) const NONE: Self = Self { seed: 0, step: 0, micro_step: 0, layer: 0, linear: 0 };
}

/// Draws for one operand or one GEMM: key and counter words but for row and column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// The seed, low half first.
    pub key: [u32; 2],
    /// Word 1 of the counter without the column.
    pub word1: u32,
    /// Word 2 of the counter.
    pub word2: u32,
    /// Word 3 of the counter.
    pub word3: u32,
}

impl Random {
    /// Bits for rounding `operand`.
    pub fn rounding(&self, operand: OperandId) -> Draw {
        self.draw(Purpose::Rounding, operand as u32)
    }

    /// Bits for the signs of `gemm`.
    pub fn signs(&self, gemm: GemmId) -> Draw {
        self.draw(Purpose::Signs, gemm as u32)
    }

    /// Bits for the positions that a layer keeps: of call [`Draw::bits`], the row is a position / 4
    /// and the column group a sequence.
    pub fn positions(&self) -> Draw {
        Self { linear: 0, ..*self }.draw(Purpose::Tokens, 0)
    }

    fn draw(&self, purpose: Purpose, which: u32) -> Draw {
        debug_assert!(self.micro_step < 1 << 14 && self.layer < 1 << 12 && self.linear < 1 << 2);
        Draw {
            key: key(self.seed),
            word1: (purpose as u32) << 24,
            word2: self.step,
            word3: self.micro_step << 18 | self.layer << 6 | self.linear << 4 | which,
        }
    }
}

impl Draw {
    /// Bits for a purpose other than rounding and signs; `a` and `b` are words 2 and 3.
    pub fn of(seed: u64, purpose: Purpose, a: u32, b: u32) -> Self {
        Self { key: key(seed), word1: (purpose as u32) << 24, word2: a, word3: b }
    }

    /// Bits for the signs of a run with fixed signs.
    pub fn fixed_signs(seed: u64) -> Self {
        Self { key: key(seed), word1: (Purpose::Signs as u32) << 24, word2: 0, word3: u32::MAX }
    }

    /// 128 bits for (row, column / 8).
    pub fn bits(&self, row: u32, column_group: u32) -> [u32; 4] {
        philox4x32_10([row, self.word1 | column_group, self.word2, self.word3], self.key)
    }

    /// [`Draw::bits`] for N groups of columns from `first` on, word by word. NOTE: in steps that a
    /// compiler makes vectors of, which takes half as long.
    pub(crate) fn bits_of_groups<const N: usize>(&self, row: u32, first: u32) -> [[u32; N]; 4] {
        let columns = std::array::from_fn(|i| self.word1 | first.wrapping_add(i as u32));
        self.bits_of([row; N], columns)
    }

    /// Of first and second words of N counters.
    #[inline(always)]
    fn bits_of<const N: usize>(&self, first: [u32; N], second: [u32; N]) -> [[u32; N]; 4] {
        let mut words = [first, second, [self.word2; N], [self.word3; N]];
        let [mut k0, mut k1] = self.key;
        for _ in 0..10 {
            let [c0, c1, c2, c3] = &mut words;
            for i in 0..N {
                let p0 = u64::from(c0[i]) * u64::from(M0);
                let p1 = u64::from(c2[i]) * u64::from(M1);
                (c0[i], c2[i]) = ((p1 >> 32) as u32 ^ c1[i] ^ k0, (p0 >> 32) as u32 ^ c3[i] ^ k1);
                (c1[i], c3[i]) = (p1 as u32, p0 as u32);
            }
            k0 = k0.wrapping_add(W0);
            k1 = k1.wrapping_add(W1);
        }
        words
    }

    /// [`Draw::bits`] for N rows from `first` on, word by word, likewise.
    pub(crate) fn bits_of_rows<const N: usize>(
        &self,
        first: u32,
        column_group: u32,
    ) -> [[u32; N]; 4] {
        self.bits_of(
            std::array::from_fn(|i| first.wrapping_add(i as u32)),
            [self.word1 | column_group; N],
        )
    }

    /// The 16 bits of one element of the source tensor.
    pub fn element(&self, row: u32, column: u32) -> u16 {
        let words = self.bits(row, column / 8);
        let j = column % 8;
        (words[(j / 2) as usize] >> (16 * (j % 2))) as u16
    }

    /// Fills `signs` with +1 and -1: sign i is bit i % 32 of word (i / 32) % 4 of call i / 128, a
    /// set bit being -1.
    pub fn fill_signs(&self, signs: &mut [f32]) {
        for (call, chunk) in signs.chunks_mut(128).enumerate() {
            let words = self.bits(call as u32, 0);
            for (i, sign) in chunk.iter_mut().enumerate() {
                *sign = if words[i / 32] >> (i % 32) & 1 == 1 { -1.0 } else { 1.0 };
            }
        }
    }
}

/// The Philox key of a seed.
fn key(seed: u64) -> [u32; 2] {
    [seed as u32, (seed >> 32) as u32]
}

/// A number in [0, 1) with 53 random bits, from two words.
pub fn uniform(high: u32, low: u32) -> f64 {
    ((u64::from(high) << 32 | u64::from(low)) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution.
    #[test]
    fn known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn every_field_of_the_counter_matters() {
        let base = Random { seed: 1, step: 2, micro_step: 3, layer: 4, linear: 1 };
        let draws = [
            base.rounding(OperandId::X),
            Random { seed: 1 << 32, ..base }.rounding(OperandId::X),
            Random { step: 3, ..base }.rounding(OperandId::X),
            Random { micro_step: 4, ..base }.rounding(OperandId::X),
            Random { layer: 5, ..base }.rounding(OperandId::X),
            Random { linear: 2, ..base }.rounding(OperandId::X),
            base.rounding(OperandId::Dy),
            base.signs(GemmId::Wgrad),
            Draw::fixed_signs(1),
        ];
        let mut seen = std::collections::HashSet::new();
        for draw in draws {
            assert!(seen.insert(draw.bits(0, 0)) && seen.insert(draw.bits(1, 0)));
            assert!(seen.insert(draw.bits(0, 1)));
        }
    }

    #[test]
    fn elements_take_halves_of_words_in_order() {
        let draw = Draw::fixed_signs(9);
        let words = draw.bits(5, 2);
        for j in 0..8 {
            let half = (words[j / 2] >> (16 * (j % 2))) as u16;
            assert_eq!(draw.element(5, 16 + j as u32), half);
        }
    }

    #[test]
    fn signs_are_balanced_and_not_constant() {
        let mut signs = [0.0; 256];
        Draw::fixed_signs(7).fill_signs(&mut signs);
        let sum: f32 = signs.iter().sum();
        assert!(signs.iter().all(|s| s.abs() == 1.0) && sum.abs() < 64.0);
        assert_ne!(signs[..128], signs[128..]);
    }

    #[test]
    fn bits_of_groups_are_those_of_each() {
        let draw = Draw { word2: 7, word3: 9, ..Draw::of(3, Purpose::Sampling, 0, 0) };
        for (row, first) in [(0, 0), (5, 1000), (u32::MAX, 0x00ff_fff0), (1, 0x01ff_fff8)] {
            let words = draw.bits_of_groups::<16>(row, first);
            for i in 0..16 {
                assert_eq!(words.map(|word| word[i]), draw.bits(row, first + i as u32));
            }
        }
    }
}
