//! What gradients are sent as between ranks, where links are slower than what computes them.
//!
//! Each rank sends slices of its gradients rounded, adds what comes in f32, in the order of the tree, to
//! what it has itself, which is not rounded, and sends the sum rounded once more. Every rank takes the
//! sums as they were sent, the one that made them as well, so that all have the same bits; these depend
//! on how many ranks there are.
//!
//! In MXFP4 groups of [`GROUP`] numbers are rotated (a random Hadamard transform, of one draw a step)
//! and rounded stochastically, so that the mean over draws is the gradient; sums are made of rotated
//! numbers. Blocks are those of the backward pass, by its Algorithm 2 ("Training LLMs with MXFP4",
//! arXiv 2502.20586). Codes of all numbers come first, then the scales of their blocks of [`BLOCK`].

use std::fmt;
use std::str::FromStr;

use half::bf16;

use crate::formats::{
    BLOCK, Draw, E2M1_VALUES, E8M0_NAN, PowerRule, Purpose, Range, decode_e8m0, e4m3_scale,
};
use crate::optim::moments::{E4m3, Float};
use crate::{Error, Result};

/// Numbers that are rotated together.
pub(crate) const GROUP: usize = 64;

/// What gradients are sent as from rank to rank. All but the first changes bits, and makes them depend
/// on the number of ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// As they are, 4 bytes a number (`f32`).
    #[default]
    F32,
    /// To nearest, 2 bytes (`bf16`).
    Bf16,
    /// E4M3 to nearest, with a scale for 32 numbers: 1.03 bytes (`fp8`).
    Fp8,
    /// Rotated and rounded stochastically, so that the mean is the gradient: 0.53 bytes (`mxfp4`).
    Mxfp4,
}

impl Wire {
    const NAMES: [(&str, Self); 4] =
        [("f32", Self::F32), ("bf16", Self::Bf16), ("fp8", Self::Fp8), ("mxfp4", Self::Mxfp4)];

    /// Bytes of codes of so many numbers, a multiple of [`GROUP`].
    fn codes(self, numbers: usize) -> usize {
        match self {
            Self::F32 => 4 * numbers,
            Self::Bf16 => 2 * numbers,
            Self::Fp8 => numbers,
            Self::Mxfp4 => numbers / 2,
        }
    }

    /// Bytes that these are sent as.
    pub(crate) fn bytes(self, numbers: usize) -> usize {
        debug_assert!(numbers.is_multiple_of(GROUP));
        let scales = match self {
            Self::F32 | Self::Bf16 => 0,
            Self::Fp8 | Self::Mxfp4 => numbers / BLOCK,
        };
        self.codes(numbers) + scales
    }

    /// Whether it is sums of rotated numbers that ranks make.
    pub(crate) fn rotates(self) -> bool {
        self == Self::Mxfp4
    }
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(_, value)| value == self);
        f.write_str(name.map_or("f32", |(name, _)| name))
    }
}

impl FromStr for Wire {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(name, _)| *name == s).map(|(_, value)| *value).ok_or_else(|| {
            Error::invalid("wire", format!("expected f32, bf16, fp8 or mxfp4, got {s:?}"))
        })
    }
}

/// What is sent: a rank's own gradients, or the sum of those of all.
#[derive(Clone, Copy)]
pub(crate) enum Sent {
    Own = 0,
    Sum = 1,
}

/// What a step's random numbers are drawn by.
#[derive(Clone, Copy)]
pub struct Drawn {
    pub(crate) seed: u64,
    pub(crate) step: u64,
}

impl Drawn {
    /// Bits that round what a rank sends; the 8 numbers from number 8 i of the gradients on have those
    /// of row i, column 0.
    pub(crate) fn rounding(self, rank: usize, sent: Sent) -> Draw {
        let word = (rank as u32) << 1 | sent as u32;
        Draw::of(self.seed, Purpose::Wire, self.step as u32, word)
    }

    /// Signs of the rotation, of the same on all ranks: sign i is bit i, a set bit being -1.
    pub(crate) fn signs(self) -> u64 {
        let [low, high, ..] = self.rounding(0, Sent::Own).bits(0, 1);
        u64::from(high) << 32 | u64::from(low)
    }
}

/// The signs as factors.
fn factors(signs: u64) -> [f32; GROUP] {
    std::array::from_fn(|i| if signs >> i & 1 == 1 { -1.0 } else { 1.0 })
}

/// Rotates numbers in groups.
pub(crate) fn rotate_all(numbers: &mut [f32], signs: u64) {
    let signs = factors(signs);
    for group in numbers.as_chunks_mut::<GROUP>().0 {
        group.iter_mut().zip(signs).for_each(|(number, sign)| *number *= sign);
        transform(group);
    }
}

/// Rotates them back.
pub(crate) fn rotate_back(numbers: &mut [f32], signs: u64) {
    let signs = factors(signs);
    for group in numbers.as_chunks_mut::<GROUP>().0 {
        transform(group);
        group.iter_mut().zip(signs).for_each(|(number, sign)| *number *= sign);
    }
}

/// x H / 8, in the order of [`crate::formats::rotate`]: strides of 1, 2 and 4, then 8, 16 and 32. NOTE: as
/// rows of 8 numbers, of which a compiler makes vectors, first of those that lie 8 apart.
fn transform(x: &mut [f32; GROUP]) {
    let mut turned = [[0.0; 8]; 8];
    for (i, x) in x.iter().enumerate() {
        turned[i % 8][i / 8] = *x;
    }
    add_and_subtract(&mut turned);
    let mut rows = [[0.0; 8]; 8];
    for (r, row) in rows.iter_mut().enumerate() {
        for (x, turned) in row.iter_mut().zip(&turned) {
            *x = turned[r];
        }
    }
    add_and_subtract(&mut rows);
    for (x, row) in x.as_chunks_mut::<8>().0.iter_mut().zip(rows) {
        *x = row.map(|x| x * 0.125);
    }
}

/// Of rows that lie 1, 2 and 4 apart.
#[inline(always)]
fn add_and_subtract(rows: &mut [[f32; 8]; 8]) {
    for stride in [1, 2, 4] {
        for r in (0..8).filter(|r| r & stride == 0) {
            let (low, high) = (rows[r], rows[r + stride]);
            rows[r] = std::array::from_fn(|i| low[i] + high[i]);
            rows[r + stride] = std::array::from_fn(|i| low[i] - high[i]);
        }
    }
}

/// Writes numbers as they are sent, in MXFP4 such that are rotated; they are those from number `first`
/// of the gradients on, a multiple of [`GROUP`].
pub(crate) fn pack(wire: Wire, numbers: &[f32], first: usize, draw: &Draw, to: &mut [u8]) {
    let (codes, scales) = to.split_at_mut(wire.codes(numbers.len()));
    match wire {
        Wire::F32 => codes.copy_from_slice(bytemuck::cast_slice(numbers)),
        Wire::Bf16 => {
            for (code, number) in codes.as_chunks_mut().0.iter_mut().zip(numbers) {
                *code = rounded_to_bf16(*number).to_le_bytes();
            }
        }
        Wire::Fp8 => {
            let blocks = numbers.as_chunks::<BLOCK>().0.iter().zip(scales);
            for ((numbers, byte), codes) in blocks.zip(codes.as_chunks_mut::<BLOCK>().0) {
                let amax = numbers.iter().map(|n| n.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
                let scale = e4m3_scale(f32::from_bits(amax));
                (*byte, *codes) = (E8M0_NAN, [0; BLOCK]);
                if !scale.is_nan() {
                    *byte = (scale.to_bits() >> 23) as u8;
                    *codes = numbers.map(|number| E4m3::encode(number, 1.0 / scale));
                }
            }
        }
        Wire::Mxfp4 => {
            let groups = numbers.as_chunks::<GROUP>().0.iter();
            let codes = codes.as_chunks_mut::<{ GROUP / 2 }>().0.iter_mut();
            let scales = scales.as_chunks_mut::<{ GROUP / BLOCK }>().0.iter_mut();
            for (number, ((group, codes), scales)) in groups.zip(codes).zip(scales).enumerate() {
                let row = (first / GROUP + number) * (GROUP / 8);
                round_group(group, draw.bits_of_rows(row as u32, 0), codes, scales);
            }
        }
    }
}

/// A group as codes and scales, as [`crate::formats::quantize_block`] makes them of each block with
/// [`crate::formats::Rounding::Unbiased`] and [`Range::ThreeQuarters`]. NOTE: in steps that a compiler makes
/// vectors of; half j % 2 of word j / 2 of each eight rounds its number j.
fn round_group(
    numbers: &[f32; GROUP],
    words: [[u32; GROUP / 8]; 4],
    codes: &mut [u8; GROUP / 2],
    scales: &mut [u8; GROUP / BLOCK],
) {
    let mut bits = [0u32; GROUP];
    for (eight, bits) in bits.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *bits = std::array::from_fn(|j| words[j / 2][eight] >> (16 * (j % 2)) & 0xffff);
    }
    let mut rounded = [0u32; GROUP];
    let blocks = numbers.as_chunks::<BLOCK>().0.iter().zip(rounded.as_chunks_mut::<BLOCK>().0);
    let blocks = blocks.zip(bits.as_chunks::<BLOCK>().0).zip(scales);
    for (((numbers, rounded), bits), scale) in blocks {
        *scale = PowerRule::Floor.byte(numbers);
        if *scale == E8M0_NAN {
            continue;
        }
        let factor = Range::ThreeQuarters.factor() * decode_e8m0(254 - *scale);
        for ((rounded, number), bits) in rounded.iter_mut().zip(numbers).zip(bits) {
            let y = number.abs() * factor;
            let (u, first) = if y < 1.0 { (y + 1.0, 254) } else { (y, 252) };
            let magnitude = ((u.to_bits() + (bits << 6 | 32)) >> 22).wrapping_sub(first);
            *rounded = magnitude | number.to_bits() >> 31 << 3;
        }
    }
    for (code, pair) in codes.iter_mut().zip(rounded.as_chunks::<2>().0) {
        *code = (pair[0] | pair[1] << 4) as u8;
    }
}

/// The bits of the nearest bf16, of two the even one; of no number, as GPUs have it, 0x7fff. NOTE: the
/// crate's own, which has other bits of no number, took several times as long.
fn rounded_to_bf16(number: f32) -> u16 {
    let bits = number.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if number.is_nan() { 0x7fff } else { rounded as u16 }
}

/// What is lost by [`Range::ThreeQuarters`].
const BACK: f32 = 4.0 / 3.0;

/// Reads numbers that were sent, in MXFP4 as they are rotated.
pub(crate) fn unpack(wire: Wire, from: &[u8], numbers: &mut [f32]) {
    let (codes, scales) = from.split_at(wire.codes(numbers.len()));
    let blocks = numbers.as_chunks_mut::<BLOCK>().0.iter_mut();
    match wire {
        Wire::F32 => bytemuck::cast_slice_mut(numbers).copy_from_slice(codes),
        Wire::Bf16 => {
            for (number, code) in numbers.iter_mut().zip(codes.as_chunks().0) {
                *number = bf16::from_le_bytes(*code).to_f32();
            }
        }
        Wire::Fp8 => {
            for ((numbers, codes), byte) in blocks.zip(codes.as_chunks::<BLOCK>().0).zip(scales) {
                *numbers = codes.map(|code| E4m3::decode(code, decode_e8m0(*byte)));
            }
        }
        Wire::Mxfp4 => {
            for ((numbers, codes), byte) in
                blocks.zip(codes.as_chunks::<{ BLOCK / 2 }>().0).zip(scales)
            {
                let scale = decode_e8m0(*byte);
                for (i, number) in numbers.iter_mut().enumerate() {
                    let code = codes[i / 2] >> (4 * (i % 2));
                    let magnitude = E2M1_VALUES[usize::from(code & 7)] * scale * BACK;
                    *number = f32::from_bits(magnitude.to_bits() | u32::from(code & 8) << 28);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::{Rounding, quantize_block, rotate};

    const WIRES: [Wire; 4] = [Wire::F32, Wire::Bf16, Wire::Fp8, Wire::Mxfp4];

    /// Of several binades, with zeros.
    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let draw = Draw::of(seed, Purpose::Host, 0, 0);
        let number = |i: usize| {
            let [a, b, ..] = draw.bits(i as u32, 0);
            let value = (f64::from(a) / f64::from(u32::MAX) * 2.0 - 1.0) as f32;
            if b % 37 == 0 { 0.0 } else { value * 2f32.powi((b >> 8) as i32 % 9 - 20) }
        };
        (0..count).map(number).collect()
    }

    fn sent(wire: Wire, numbers: &[f32], step: u64) -> Vec<f32> {
        let drawn = Drawn { seed: 7, step };
        let (mut bytes, mut rotated) = (vec![0xa5; wire.bytes(numbers.len())], numbers.to_vec());
        if wire.rotates() {
            rotate_all(&mut rotated, drawn.signs());
        }
        pack(wire, &rotated, 128, &drawn.rounding(1, Sent::Own), &mut bytes);
        let mut back = vec![f32::NAN; numbers.len()];
        unpack(wire, &bytes, &mut back);
        if wire.rotates() {
            rotate_back(&mut back, drawn.signs());
        }
        back
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
        let squares: f64 = a.iter().zip(b).map(square).sum();
        let of_b: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
        (squares / of_b).sqrt()
    }

    #[test]
    fn names_survive_a_round_trip() {
        for wire in WIRES {
            assert_eq!(wire.to_string().parse::<Wire>().unwrap(), wire);
        }
        assert!("fp4".parse::<Wire>().unwrap_err().to_string().contains("fp8 or mxfp4"));
    }

    /// Numbers come back as near as their format has them.
    #[test]
    fn numbers_come_back() {
        let numbers = numbers(1024, 1);
        let most = [0.0, 2e-3, 3e-2, 0.2];
        for (wire, most) in WIRES.into_iter().zip(most) {
            let distance = distance(&sent(wire, &numbers, 3), &numbers);
            assert!(
                distance <= most && (wire == Wire::F32 || distance > most / 20.0),
                "{distance}"
            );
        }
        assert_eq!(sent(Wire::Bf16, &[1.0 + 1.0 / 256.0; 64], 0), [1.0; 64]);
    }

    /// What a block cannot hold is not hidden; of a rotated group none is left then.
    #[test]
    fn what_is_not_finite_stays_so() {
        for wire in WIRES {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut numbers = numbers(256, 2);
                numbers[70] = value;
                let back = sent(wire, &numbers, 1);
                assert!(!back[70].is_finite(), "{wire}: {value}");
                assert!(back[..64].iter().chain(&back[128..]).all(|x| x.is_finite()), "{wire}");
            }
        }
    }

    /// Codes, scales, rotations and bf16 are those of definitions elsewhere.
    #[test]
    fn groups_are_those_of_the_definition() {
        let (drawn, count) = (Drawn { seed: 3, step: 9 }, 64 * 50);
        let (mut numbers, draw) = (numbers(count, 4), drawn.rounding(2, Sent::Sum));
        numbers[70..100].fill(0.0);
        numbers[200] = f32::NAN;
        numbers[300] = f32::MAX;
        numbers[400..500].iter_mut().for_each(|x| *x *= 1e-36);
        let mut bytes = vec![0; Wire::Mxfp4.bytes(count)];
        pack(Wire::Mxfp4, &numbers, 640, &draw, &mut bytes);
        let (codes, scales) = bytes.split_at(count / 2);
        for (i, block) in numbers.as_chunks::<BLOCK>().0.iter().enumerate() {
            let bits = |k: usize| {
                let at = 640 + i * BLOCK + k;
                let words = draw.bits((at / 8) as u32, 0);
                (words[at % 8 / 2] >> (16 * (at % 2))) as u16
            };
            let (scale, of_block) =
                quantize_block(block, Rounding::Unbiased, Range::ThreeQuarters, bits);
            assert_eq!(scales[i], scale, "{i}");
            for (k, code) in of_block.into_iter().enumerate() {
                let at = i * BLOCK + k;
                assert_eq!(codes[at / 2] >> (4 * (at % 2)) & 15, code, "{i}, {k}");
            }
        }
        let mut rotated = numbers.clone();
        rotate_all(&mut rotated, drawn.signs());
        let signs = factors(drawn.signs());
        numbers.as_chunks_mut::<GROUP>().0.iter_mut().for_each(|group| rotate(group, &signs));
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(&rotated[256..]) == bits(&numbers[256..]));
        for number in numbers {
            let exact = bf16::from_f32(number).to_bits();
            let ours = rounded_to_bf16(number);
            assert!(ours == exact || number.is_nan() && ours == 0x7fff, "{number}");
        }
    }

    /// The mean of 10,000 draws is the number: off by what so many draws are, and no more.
    #[test]
    fn mxfp4_is_unbiased() {
        const DRAWS: usize = 10_000;
        let numbers = numbers(128, 3);
        let (mut sums, mut squares) = (vec![0.0f64; 128], vec![0.0f64; 128]);
        for step in 0..DRAWS {
            for (i, number) in sent(Wire::Mxfp4, &numbers, step as u64).into_iter().enumerate() {
                let off = f64::from(number) - f64::from(numbers[i]);
                sums[i] += off;
                squares[i] += off * off;
            }
        }
        for (i, (sum, square)) in sums.iter().zip(&squares).enumerate() {
            let (mean, of_mean) = (sum / DRAWS as f64, (square / (DRAWS * DRAWS) as f64).sqrt());
            assert!(mean.abs() < 5.0 * of_mean, "{i}: {mean} +- {of_mean}");
        }
        let off: f64 = sums.iter().map(|sum| (sum / DRAWS as f64).powi(2)).sum();
        let one: f64 = squares.iter().map(|square| square / DRAWS as f64).sum();
        assert!((off / one).sqrt() < 1.5 / (DRAWS as f64).sqrt(), "{off} {one}");
    }

    /// Each rank and each of the two ways has bits of its own; all have the same signs.
    #[test]
    fn ranks_draw_for_themselves() {
        let drawn = Drawn { seed: 7, step: 3 };
        let bits = |rank, sent| drawn.rounding(rank, sent).bits(5, 0);
        assert_ne!(bits(0, Sent::Own), bits(1, Sent::Own));
        assert_ne!(bits(0, Sent::Own), bits(0, Sent::Sum));
        assert_ne!(drawn.signs(), Drawn { seed: 7, step: 4 }.signs());
    }
}
