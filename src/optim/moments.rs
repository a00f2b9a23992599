//! The numbers that an optimizer keeps its states in: f32, bf16, or 8 bits with a scale for every
//! group of 32 elements, as FlashOptim (arXiv 2602.23349) has them but for three things.
//!
//! First moments are companded: what is stored of n = m / scale is 2 n / (1 + |n|), which gives half
//! of all codes to the lowest third. Of second moments the root is stored, because that is what
//! updates divide by.
//!
//! ```text
//! first:   y = code / 127,  m = y / (2 - |y|) scale         scale = max |m| of the group
//! second:  r = code / 255 scale,  v = r r                   scale = sqrt(max v)
//! ```
//!
//! The three: scales are f32, since those of 16 bits can neither follow the decay of a group without
//! gradients nor gradients of large batches down. What is stored is multiplied by the inverse of the
//! scale as it is stored. And no code of a second moment is 0 in a group whose scale is not: else an element that
//! is much smaller than its neighbours would have a first moment and no second one, and would move
//! by m / epsilon.
//!
//! What is stored is the state: an update decodes it, computes in f32, moves the weight by the
//! moments as they are then, and encodes. Decoding and encoding again gives the same codes, so a run
//! that is saved and loaded is none the wiser. All is IEEE arithmetic in an order that is given
//! here, so that every device stores the same bytes.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// The numbers that states are kept in. Of matrices that Muon moves there is one state, so half of the
/// bytes that are said here.
///
/// In 8 bits are the matrices of blocks alone. Embeddings, whose rare tokens are the known weak spot
/// of 8-bit states, are then kept in bf16, and vectors, which are few, in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Moments {
    /// `f32`: 8 bytes a parameter.
    #[default]
    F32,
    /// `bf16`: 4 bytes; to nearest, or stochastically where a decay rate is above 0.99, since
    /// what is added is then below the half of a last place.
    Bf16,
    /// `int8`: 2.25 bytes.
    Int8,
}

impl Moments {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Int8];

    fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// What a parameter's elements are kept in.
    pub(crate) fn element(self, kind: ParamKind) -> Element {
        match (self, kind) {
            (Self::F32, _) | (_, ParamKind::Vector) => Element::F32,
            (Self::Bf16, _) | (Self::Int8, ParamKind::Table) => Element::Bf16,
            (Self::Int8, ParamKind::Matrix) => Element::Int8,
        }
    }

    /// More than what storing can make a state's largest magnitude larger by, relatively.
    pub(super) fn slack(self) -> f64 {
        match self {
            Self::F32 => 1.0,
            // Half of a last place to nearest, a whole one stochastically.
            Self::Bf16 | Self::Int8 => 1.0 + 1.0 / 128.0,
        }
    }
}

impl fmt::Display for Moments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Moments {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|moments| moments.as_str() == s).ok_or_else(|| {
            let names = Self::ALL.map(Self::as_str).join(", ");
            Error::invalid("moments", format!("expected one of {names}; got {s:?}"))
        })
    }
}

/// What a parameter is to an optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ParamKind {
    /// A weight of a block's linear layers.
    Matrix,
    /// An embedding, or a head.
    Table,
    /// A bias, or what a norm multiplies by.
    Vector,
}

/// What the elements of one parameter's state are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Element {
    F32 = 0,
    Bf16 = 1,
    /// Codes, and a scale for each [`GROUP`].
    Int8 = 2,
}

/// Elements that share a scale: neighbours in memory, the last group of a parameter as many as are
/// left.
pub(crate) const GROUP: usize = 32;

/// Where decay rates are too close to 1 for rounding to nearest in bf16.
const NEAREST: f32 = 0.99;

/// Whether bf16 moments with this decay rate are rounded stochastically.
pub(crate) fn is_stochastic(beta: f32) -> bool {
    beta > NEAREST
}

/// How codes stand for numbers between 0 and a scale. Codes are bytes; of first moments, whose
/// codes are signed, in two's complement.
pub(crate) trait Code {
    /// The scale of a group with these numbers.
    fn scale(largest: f32) -> f32;
    /// The code of a number of a group, with the [`inverse`] of its scale.
    fn encode(value: f32, inverse: f32) -> u8;
    /// What it stands for.
    fn decode(code: u8, scale: f32) -> f32;
}

/// First moments: signed and companded.
pub(crate) struct First;

/// Second moments: their roots.
pub(crate) struct Second;

impl Code for First {
    #[inline(always)]
    fn scale(largest: f32) -> f32 {
        largest
    }

    #[inline(always)]
    fn encode(value: f32, inverse: f32) -> u8 {
        let n = value * inverse;
        rint(127.0 * ((2.0 * n) / (1.0 + n.abs()))) as i32 as u8
    }

    #[inline(always)]
    fn decode(code: u8, scale: f32) -> f32 {
        let y = f32::from(code as i8) / 127.0;
        (y / (2.0 - y.abs())) * scale
    }
}

impl Code for Second {
    #[inline(always)]
    fn scale(largest: f32) -> f32 {
        largest.sqrt()
    }

    #[inline(always)]
    fn encode(value: f32, inverse: f32) -> u8 {
        rint(255.0 * (value.sqrt() * inverse)).max(1.0) as i32 as u8
    }

    #[inline(always)]
    fn decode(code: u8, scale: f32) -> f32 {
        let r = (f32::from(code) / 255.0) * scale;
        r * r
    }
}

/// What numbers of a group are multiplied by: a number whatever the scale, which may be 0 or too
/// small to have an inverse.
///
/// NOTE: a division for each group, not for each number, of which a GPU has too many otherwise.
#[inline(always)]
pub(crate) fn inverse(scale: f32) -> f32 {
    (1.0 / scale).min(f32::MAX)
}

/// To the nearest whole number, of two to the even one; |x| below 2^22.
///
/// NOTE: not `round_ties_even`, which is a call for each number where the processor has no
/// instruction for it.
#[inline(always)]
fn rint(x: f32) -> f32 {
    const SHIFT: f32 = 1.5 * (1 << 23) as f32;
    (x + SHIFT) - SHIFT
}

/// Stores a group, and gives its scale.
#[inline(always)]
pub(crate) fn encode_group<C: Code>(values: &[f32], codes: &mut [u8]) -> f32 {
    let scale = C::scale(values.iter().fold(0.0f32, |largest, v| largest.max(v.abs())));
    let inverse = inverse(scale);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = C::encode(*value, inverse);
    }
    scale
}

/// Loads a group.
#[inline(always)]
pub(crate) fn decode_group<C: Code>(codes: &[u8], scale: f32, values: &mut [f32]) {
    for (value, code) in values.iter_mut().zip(codes) {
        *value = C::decode(*code, scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f32, b: f64) -> bool {
        (f64::from(a) - b).abs() <= 1e-6 * b.abs()
    }

    #[test]
    fn vectors_of_first_moments() {
        let m = [1.0, -0.5, 0.25, 0.1, 0.01, -0.001, 0.003, 0.0];
        let mut codes = [0; 8];
        assert_eq!(encode_group::<First>(&m, &mut codes), 1.0);
        assert_eq!(codes.map(|code| code as i8), [127, -85, 51, 23, 3, 0, 1, 0]);
        let mut values = [0.0; 8];
        decode_group::<First>(&codes, 1.0, &mut values);
        let expected = [1.0, -0.5029585, 0.2512315, 0.0995671, 0.01195219, 0.0, 0.003952569, 0.0];
        assert!(values.into_iter().zip(expected).all(|(a, b)| close(a, b)), "{values:?}");
    }

    #[test]
    fn vectors_of_second_moments() {
        let v = [1.0, 0.25, 0.01, 1e-4, 1e-6, 0.0];
        let mut codes = [0; 6];
        assert_eq!(encode_group::<Second>(&v, &mut codes), 1.0);
        assert_eq!(codes, [255, 128, 26, 3, 1, 1]);
        let mut values = [0.0; 6];
        decode_group::<Second>(&codes, 1.0, &mut values);
        let expected = [1.0, 0.2519647, 0.010396, 1.384083e-4, 1.537870e-5, 1.537870e-5];
        assert!(values.into_iter().zip(expected).all(|(a, b)| close(a, b)), "{values:?}");
    }

    /// Scales from the smallest to the largest numbers, and a thousand in between.
    fn scales() -> impl Iterator<Item = f32> {
        let between = (0..1000).map(|i| 10f64.powf(-37.0 + 0.0747 * f64::from(i)) as f32);
        between.chain([f32::MIN_POSITIVE, 1.0, 3e38])
    }

    fn is_identity<C: Code>(scale: f32, codes: impl Iterator<Item = u8>) {
        for code in codes {
            let value = C::decode(code, scale);
            assert!(value.is_finite(), "{code} of {scale}");
            assert_eq!(C::encode(value, inverse(scale)), code, "{value} of {scale}");
        }
    }

    /// -128 is no code of a first moment, 0 none of a second one.
    #[test]
    fn encoding_what_was_decoded_gives_the_code() {
        let signed = || (-127..=127i8).map(|code| code as u8);
        for scale in scales() {
            is_identity::<First>(scale, signed());
            // Its square has to be a number: what is stored is a root.
            let root = scale.sqrt();
            is_identity::<Second>(root, 1..=255);
            // And the scale is found again from the largest.
            let largest = First::decode(127, scale);
            assert_eq!(First::scale(largest), scale);
            let again = Second::scale(Second::decode(255, root));
            assert!((again / root - 1.0).abs() <= 2.0 * f32::EPSILON, "{again} {root}");
        }
    }

    /// Where a scale has no inverse, codes are smaller than they could be, and what they stand for
    /// is never larger than what was stored.
    #[test]
    fn the_smallest_numbers_are_stored() {
        for largest in [f32::from_bits(1), 1e-42, 2e-39, 5e-39] {
            let values = [largest, -largest / 3.0, 0.0];
            let mut codes = [0; 3];
            let scale = encode_group::<First>(&values, &mut codes);
            let decoded = codes.map(|code| First::decode(code, scale).abs());
            assert!(scale == largest && decoded.iter().all(|m| *m <= largest), "{decoded:?}");
            let values = values.map(f32::abs);
            let scale = encode_group::<Second>(&values, &mut codes);
            let decoded = codes.map(|code| Second::decode(code, scale));
            assert!(decoded.iter().all(|v| *v <= largest * 1.001), "{decoded:?} {largest:e}");
        }
    }

    #[test]
    fn a_group_of_zeros_stays_one() {
        let mut codes = [9; GROUP];
        assert_eq!(encode_group::<First>(&[0.0; GROUP], &mut codes), 0.0);
        assert_eq!(codes, [0; GROUP]);
        assert_eq!(encode_group::<Second>(&[0.0; GROUP], &mut codes), 0.0);
        assert_eq!(codes, [1; GROUP]);
        assert_eq!(Second::decode(1, 0.0), 0.0);
        // What has never been stored is zeros as well.
        assert_eq!([First::decode(0, 0.0), Second::decode(0, 0.0)], [0.0; 2]);
    }

    #[test]
    fn matrices_alone_are_kept_in_8_bits() {
        use Element::*;
        let kinds = [ParamKind::Matrix, ParamKind::Table, ParamKind::Vector];
        for (moments, elements) in [
            (Moments::F32, [F32, F32, F32]),
            (Moments::Bf16, [Bf16, Bf16, F32]),
            (Moments::Int8, [Int8, Bf16, F32]),
        ] {
            assert_eq!(kinds.map(|kind| moments.element(kind)), elements);
        }
    }
}
