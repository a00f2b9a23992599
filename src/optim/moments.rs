//! The numbers that an optimizer keeps its states in: f32, bf16, 8 bits with a scale for every
//! group of 32 elements, or, for comparison, floats of 8 and 16 bits with a scale for a whole tensor.
//!
//! The 8 bits are as FlashOptim (arXiv 2602.23349) has them but for three things. First moments are
//! companded: what is stored of n = m / scale is 2 n / (1 + |n|), which gives half of all codes to
//! the lowest third. Of second moments the root is stored, because that is what updates divide by.
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
//! The floats are FP8-LM's (arXiv 2310.18313, as its code MS-AMP has them): first moments in E4M3,
//! second ones in fp16, which are read by
//!
//! ```text
//! t = code scale,  scale = 2^-floor(log2(largest of the format / max |t| of the tensor))
//! ```
//!
//! and where all are 0, the scale stays as it was. They take more than the 8 bits, and are worse:
//! first moments are off by 2.2 % (root mean square) where those are by 0.6 %, and one scale for a
//! tensor leaves nothing of what is far below its largest, of first moments at about 2^-18. Second
//! ones, of which an element that has a first one must not lose its own, or it moves by m / epsilon,
//! need 16 bits therefore, which reach to 2^-40, so to gradients of 2^-20; in E4M3 runs diverge.
//! The 8 bits store roots, which have half of the exponents, and no code of theirs is 0.
//!
//! What is stored is the state: an update decodes it, computes in f32, moves the weight by the
//! moments as they are then, and encodes. Decoding and encoding again gives the same codes, so a run
//! that is saved and loaded is none the wiser. All is IEEE arithmetic in an order that is given
//! here, so that every device stores the same bytes.

/// The numbers that states are kept in. Of matrices that Muon moves there is one state, so half of the
/// bytes that are said here, and of `fp8` 1 byte.
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
    /// `fp8`: 3 bytes of the matrices of blocks, all else as `f32`: FP8-LM's (arXiv 2310.18313), for
    /// comparison.
    Fp8,
}

impl Moments {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Int8, Self::Fp8];

    fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        }
    }

    /// What the elements of a parameter's state of this number are kept in: first moments are the
    /// first.
    pub(crate) fn element(self, kind: ParamKind, state: usize) -> Element {
        match (self, kind) {
            (Self::F32, _) | (_, ParamKind::Vector) | (Self::Fp8, ParamKind::Table) => Element::F32,
            (Self::Bf16, _) | (Self::Int8, ParamKind::Table) => Element::Bf16,
            (Self::Int8, ParamKind::Matrix) => Element::Int8,
            (Self::Fp8, ParamKind::Matrix) if state == 0 => Element::E4m3,
            (Self::Fp8, ParamKind::Matrix) => Element::F16,
        }
    }

    /// More than what storing can make a state's largest magnitude larger by, relatively.
    pub(super) fn slack(self) -> f64 {
        match self {
            Self::F32 => 1.0,
            // Half of a last place to nearest, a whole one stochastically.
            Self::Bf16 | Self::Int8 => 1.0 + 1.0 / 128.0,
            // Half of a last place of E4M3.
            Self::Fp8 => 1.0 + 1.0 / 16.0,
        }
    }
}

named!(Moments, "moments");

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
    /// [`E4m3`], and one scale.
    E4m3 = 3,
    /// [`F16`], and one scale.
    F16 = 4,
}

impl Element {
    /// Bytes of one.
    pub(crate) fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Int8 | Self::E4m3 => 1,
        }
    }

    /// Scales of so many.
    pub(crate) fn scales(self, len: usize) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 0,
            Self::Int8 => len.div_ceil(GROUP),
            Self::E4m3 | Self::F16 => len.min(1),
        }
    }

    /// Whether all have the same scale, so that an update has to know the largest before it stores.
    pub(crate) fn has_one_scale(self) -> bool {
        matches!(self, Self::E4m3 | Self::F16)
    }
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

/// Floats of few bits without infinities, for numbers of a tensor that have one scale.
pub(crate) trait Float {
    type Bits;
    /// The largest.
    const LARGEST: f32;
    /// What is nearest to a number, of two the even one, with the [`inverse`] of the scale. Numbers are
    /// finite.
    fn encode(value: f32, inverse: f32) -> Self::Bits;
    /// The number.
    fn decode(bits: Self::Bits, scale: f32) -> f32;
}

/// 4 bits of exponent, 3 of mantissa.
pub(crate) struct E4m3;

/// 5 bits of exponent, 10 of mantissa.
pub(crate) struct F16;

impl Float for E4m3 {
    type Bits = u8;
    const LARGEST: f32 = 448.0;

    #[inline(always)]
    fn encode(value: f32, inverse: f32) -> u8 {
        let (negative, steps) = encode_float::<3, -6>(value * inverse, Self::LARGEST);
        (steps | negative << 7) as u8
    }

    #[inline(always)]
    fn decode(bits: u8, scale: f32) -> f32 {
        let bits = u32::from(bits);
        decode_float::<3, -6>(bits & 0x7f, bits >> 7) * scale
    }
}

impl Float for F16 {
    type Bits = u16;
    const LARGEST: f32 = 65504.0;

    #[inline(always)]
    fn encode(value: f32, inverse: f32) -> u16 {
        let (negative, steps) = encode_float::<10, -14>(value * inverse, Self::LARGEST);
        (steps | negative << 15) as u16
    }

    #[inline(always)]
    fn decode(bits: u16, scale: f32) -> f32 {
        let bits = u32::from(bits);
        decode_float::<10, -14>(bits & 0x7fff, bits >> 15) * scale
    }
}

/// The sign and the other bits of the float nearest to `x`, with `MANTISSA` bits and normal numbers
/// from 2^`LOWEST` on.
///
/// Added to 1.5 * 2^23 last places, a number is rounded to a whole number of them, which the sum's
/// lowest bits then are.
#[inline(always)]
fn encode_float<const MANTISSA: i32, const LOWEST: i32>(x: f32, largest: f32) -> (u32, u32) {
    let magnitude = x.abs().min(largest);
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(LOWEST);
    let shift = ((exponent - MANTISSA + 23 + 127) as u32) << 23 | 1 << 22;
    let places = (magnitude + f32::from_bits(shift)).to_bits() - shift;
    (x.to_bits() >> 31, (((exponent - LOWEST) as u32) << MANTISSA) + places)
}

/// The number of these bits and this sign.
///
/// NOTE: below the normal ones not by way of f32's numbers below its own, which a host may have
/// switched off.
#[inline(always)]
fn decode_float<const MANTISSA: i32, const LOWEST: i32>(bits: u32, negative: u32) -> f32 {
    let place = f32::from_bits(((LOWEST - MANTISSA + 127) as u32) << 23);
    let small = (bits as i32 as f32 * place).to_bits();
    let normal = (bits << (23 - MANTISSA)).wrapping_add(((LOWEST + 126) as u32) << 23);
    f32::from_bits(if bits >> MANTISSA == 0 { small } else { normal } | negative << 31)
}

/// The scale of a tensor whose largest magnitude is `largest`, and that had another before: a power
/// of two, 0 where there has been no number but 0. It is at least 2^-100, so that what the smallest
/// codes stand for is among f32's normal numbers, and never so large that what the largest stands for
/// is not finite: then the largest numbers are held at it.
///
/// NOTE: it is the inverse of FP8-LM's, by which numbers are multiplied to become codes; here codes
/// are multiplied by it, as by every scale of states. 0 then is the one of memory that nothing was
/// stored in.
pub(crate) fn tensor_scale<F: Float>(before: f32, largest: f32) -> f32 {
    if largest <= 0.0 || !largest.is_finite() {
        return before;
    }
    let [bits, most] = [largest, F::LARGEST].map(f32::to_bits);
    // One more where the mantissa is above that of the format's largest.
    let above = i32::from(bits & 0x007f_ffff > most & 0x007f_ffff);
    let of_most = (most >> 23) as i32;
    let exponent = ((bits >> 23) as i32 - of_most + above).clamp(-100, 254 - of_most);
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// Whether it can be the scale of a tensor.
pub(crate) fn is_tensor_scale<F: Float>(scale: f32) -> bool {
    scale == 0.0 || tensor_scale::<F>(0.0, F::LARGEST * scale) == scale
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
        for (moments, first, second) in [
            (Moments::F32, [F32, F32, F32], [F32, F32, F32]),
            (Moments::Bf16, [Bf16, Bf16, F32], [Bf16, Bf16, F32]),
            (Moments::Int8, [Int8, Bf16, F32], [Int8, Bf16, F32]),
            (Moments::Fp8, [E4m3, F32, F32], [F16, F32, F32]),
        ] {
            assert_eq!(kinds.map(|kind| moments.element(kind, 0)), first);
            assert_eq!(kinds.map(|kind| moments.element(kind, 1)), second);
        }
    }

    /// In FP8-LM's own terms: what numbers are multiplied by.
    #[test]
    fn vectors_of_tensor_scales() {
        for (largest, multiplier) in [
            (3.0, 128.0),
            (448.0, 1.0),
            (448.0f32.next_up(), 0.5),
            (500.0, 0.5),
            (1e-6, 2f32.powi(28)),
            (1e-40, 2f32.powi(100)),
            (f32::from_bits(1), 2f32.powi(100)),
            (1e38, 2f32.powi(-118)),
            (f32::MAX, 2f32.powi(-119)),
        ] {
            let scale = tensor_scale::<E4m3>(3.0, largest);
            assert_eq!(1.0 / scale, multiplier, "{largest:e}");
        }
        assert_eq!(E4m3::decode(E4m3::encode(3.0, 128.0), 1.0), 384.0);
        for (largest, multiplier) in [
            (3.0, 16384.0),
            (65504.0, 1.0),
            (65504.0f32.next_up(), 0.5),
            (65520.0, 0.5),
            (1e6, 0.0625),
        ] {
            assert_eq!(1.0 / tensor_scale::<F16>(3.0, largest), multiplier, "{largest}");
        }
        // By the definition's own formula, wherever f32 can say it.
        for largest in scales().filter(|largest| (1e-28..1e37).contains(largest)) {
            let exact = |most: f32| (f64::from(most) / f64::from(largest)).log2().floor();
            let ours = |scale: f32| -f64::from(scale).log2();
            let of_e4m3 = tensor_scale::<E4m3>(0.0, largest);
            assert_eq!(ours(of_e4m3), exact(448.0).min(100.0), "{largest:e}");
            let of_f16 = tensor_scale::<F16>(0.0, largest);
            assert_eq!(ours(of_f16), exact(65504.0).min(100.0), "{largest:e}");
            assert!(is_tensor_scale::<E4m3>(of_e4m3) && is_tensor_scale::<F16>(of_f16));
        }
        for nothing in [0.0, -0.0, f32::NAN, f32::INFINITY] {
            assert_eq!(tensor_scale::<E4m3>(0.25, nothing), 0.25);
            assert_eq!(tensor_scale::<F16>(0.0, nothing), 0.0);
        }
        assert!(is_tensor_scale::<E4m3>(0.0) && is_tensor_scale::<F16>(-0.0));
        let bad = [0.75, -1.0, f32::NAN, f32::INFINITY, 1e-40, -f32::INFINITY, 2f32.powi(120)];
        assert!(
            !bad.into_iter()
                .any(|scale| { is_tensor_scale::<E4m3>(scale) || is_tensor_scale::<F16>(scale) })
        );
        // What is stored of the largest numbers is finite.
        for largest in [f32::MAX, 3.2e38, 3e38, 2f32.powi(127)] {
            let (of_m, of_v) =
                (tensor_scale::<E4m3>(0.0, largest), tensor_scale::<F16>(0.0, largest));
            let m = E4m3::decode(E4m3::encode(-largest, inverse(of_m)), of_m);
            let v = F16::decode(F16::encode(largest, inverse(of_v)), of_v);
            assert!(
                (-m / largest - 0.9).abs() < 0.13 && (v / largest - 1.0).abs() < 1e-3,
                "{m} {v}"
            );
        }
    }

    #[test]
    fn encoding_what_floats_stand_for_gives_them() {
        let powers = [-100, -24, 0, 30, 100].map(|exponent| 2f32.powi(exponent));
        for scale in powers {
            for bits in (0..=u8::MAX).filter(|bits| bits & 0x7f != 0x7f) {
                let value = E4m3::decode(bits, scale);
                assert!(value.is_finite(), "{bits:x} of {scale:e}");
                assert_eq!(E4m3::encode(value, inverse(scale)), bits, "{value:e} of {scale:e}");
            }
            for bits in (0..=u16::MAX).filter(|bits| bits & 0x7fff < 0x7c00) {
                let value = F16::decode(bits, scale);
                let expected = half::f16::from_bits(bits).to_f32() * scale;
                assert_eq!(value.to_bits(), expected.to_bits(), "{bits:x} of {scale:e}");
                assert_eq!(F16::encode(value, inverse(scale)), bits, "{value:e} of {scale:e}");
            }
        }
        // What has never been stored is zeros as well, and stays it.
        assert_eq!((E4m3::decode(0, 0.0), F16::decode(0, 0.0)), (0.0, 0.0));
        assert_eq!((E4m3::encode(0.0, inverse(0.0)), F16::encode(0.0, inverse(0.0))), (0, 0));
    }

    /// Of E4M3 by looking at all of them, of fp16 by another implementation.
    #[test]
    fn floats_are_rounded_to_the_nearest_and_of_two_to_the_even_one() {
        let of_e4m3 = |code: u32| {
            let (exponent, mantissa) = ((code >> 3) as i32, (code & 7) as f32);
            match exponent {
                0 => mantissa * 2f32.powi(-9),
                _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
            }
        };
        assert_eq!(of_e4m3(0x7e), E4m3::LARGEST);
        for code in 0..0x7e {
            let (low, high) = (of_e4m3(code), of_e4m3(code + 1));
            let middle = (low + high) / 2.0;
            let even = (code + code % 2) as u8;
            assert_eq!(E4m3::decode(code as u8, 1.0), low);
            assert_eq!(E4m3::encode(middle, 1.0), even, "between {low} and {high}");
            assert_eq!(E4m3::encode(-middle, 1.0), even | 0x80);
            assert_eq!(E4m3::encode(middle.next_down(), 1.0), code as u8);
            assert_eq!(E4m3::encode(middle.next_up(), 1.0), code as u8 + 1);
        }
        assert_eq!(E4m3::encode(-1e9, 1.0), 0xfe);
        let drawn = (0..200_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b1)));
        let near = drawn.clone().map(|x| x % 1e-4);
        for x in drawn.chain(near).filter(|x| x.is_finite()) {
            let expected = half::f16::from_f32(x.clamp(-F16::LARGEST, F16::LARGEST));
            assert_eq!(F16::encode(x, 1.0), expected.to_bits(), "{x:e}");
        }
    }

    /// What a tensor's scale costs: an element with a small gradient keeps no second moment, or no
    /// moments at all. As long as its gradient stays, it moves as others do; without one it moves by
    /// its first moment over epsilon, as the definition has it, which is finite and within the
    /// bounds that hold for every update.
    #[test]
    fn second_moments_that_vanish_do_what_the_definition_does() {
        use crate::optim::{Bounds, Optimizer, OptimizerStep, adamw};

        let moments = Moments::Fp8;
        let optimizer = Optimizer { moments, weight_decay: 0.0, clip: 0.0, ..Optimizer::default() };
        let step = |t| OptimizerStep {
            optimizer,
            lr: 1e-3,
            t,
            seed: 0,
            loss_scale: 1.0,
            largest_gradient: f32::INFINITY,
            annealing: 1.0,
        };
        // The first one is large for one step alone.
        let gradients = |t: u64| -> [f32; 5] {
            let first = if t == 1 { 1.0 } else { 0.0 };
            [first, 1e-3, 1e-5, 3e-8, 1e-10].map(|g: f32| if t > 60 { 0.0 } else { g })
        };
        let (mut p, mut codes, mut halves) = ([0.0f32; 5], [0u8; 5], [0u16; 5]);
        let [mut of_m, mut of_v] = [0.0f32; 2];
        let mut bounds = Bounds { weight: 0.0, ..Bounds::NEW };
        let mut vanished = [0; 5];
        for t in 1..100 {
            let step = step(t);
            let update = adamw::Update::new(&step, step.lr, false, 1.0);
            let mut m = codes.map(|code| E4m3::decode(code, of_m));
            let mut v = halves.map(|half| F16::decode(half, of_v));
            let before = (p, m, v);
            let g = gradients(t);
            for k in 0..5 {
                (p[k], m[k], v[k]) = update.of(p[k], m[k], v[k], g[k]);
                let moved = (p[k] - before.0[k]).abs();
                if before.2[k] == 0.0 && before.1[k] != 0.0 && g[k] == 0.0 {
                    vanished[k] += 1;
                    let by = 0.9 * before.1[k].abs() * adamw::size(&step, step.lr) / 1e-8;
                    assert!((moved / by - 1.0).abs() < 1e-3, "{t}, {k}: {moved} {by}");
                } else {
                    // The gradient alone is 0.05 of its square in the second moment.
                    assert!(moved <= 10.0 * step.lr, "{t}, {k}: {moved}");
                }
            }
            let largest = |x: [f32; 5]| x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            of_m = tensor_scale::<E4m3>(of_m, largest(m));
            of_v = tensor_scale::<F16>(of_v, largest(v));
            codes = m.map(|m| E4m3::encode(m, inverse(of_m)));
            halves = v.map(|v| F16::encode(v, inverse(of_v)));
            // A first moment of one gradient never outlives the second one.
            assert!(
                t > 1 || (0..5).all(|k| codes[k] == 0 || halves[k] != 0),
                "{codes:?} {halves:?}"
            );
            bounds = bounds.after(&step, largest(g) * 2.0);
            let stored = [
                largest(p),
                largest(codes.map(|code| E4m3::decode(code, of_m))),
                largest(halves.map(|half| F16::decode(half, of_v))),
            ];
            let most = [bounds.weight, bounds.states[0], bounds.states[1]];
            for (x, most) in stored.into_iter().zip(most) {
                assert!(x.is_finite() && f64::from(x) <= most, "{t}: {stored:?} {bounds:?}");
            }
        }
        assert!(vanished[3] > 0 && vanished[..3] == [0; 3], "{vanished:?}");
    }

    /// Half of a last place is more than what rounding adds to the largest.
    #[test]
    fn slack_is_more_than_what_storing_adds() {
        for i in 0..100_000u32 {
            let largest = f32::from_bits((i << 9) + 0x3f80_0000);
            let (of_m, of_v) =
                (tensor_scale::<E4m3>(0.0, largest), tensor_scale::<F16>(0.0, largest));
            let m = E4m3::decode(E4m3::encode(largest, inverse(of_m)), of_m);
            let v = F16::decode(F16::encode(largest, inverse(of_v)), of_v);
            let most = f64::from(largest) * Moments::Fp8.slack();
            assert!(f64::from(m) <= most && f64::from(v) <= most, "{largest}: {m} {v}");
        }
    }
}
