//! NVFP4: E2M1 elements, an E4M3 scale for every 16 of them, and one f32 above the scales, of the
//! whole tensor or of 128 elements.
//!
//! value = code * scale * outer. The elements times their scale are bf16 numbers; the outer scale of
//! a tensor is no part of what a product multiplies, but of what its sums are multiplied by.
//!
//! Every step below is one f32 operation, rounded to nearest even, in this order.
//!
//! Sources: "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149) and NVIDIA's
//! TransformerEngine for the two levels; Four Over Six (arXiv 2512.02010); Quartet II (arXiv
//! 2601.22813) for MS-EDEN; TetraJet-v2 (arXiv 2510.27527) for 128 elements.

use super::e2m1::{E2M1_MAX, decode_e2m1};
use super::e4m3::{E4M3_MAX, round_to_e4m3};
use super::quantize::{nearest, stochastic};

/// Elements that share one scale.
pub const NVFP4_BLOCK: usize = 16;

/// Elements that share the outer scale where it is not the tensor's.
pub const NVFP4_OUTER: usize = 128;

/// 1/6 as f32 has it.
const SIXTH: f32 = 1.0 / 6.0;

/// What unbiased rounding lets the largest magnitude of a block come to: rounding the scale to
/// E4M3 raises it by up to 17/16, to 6.
const WITH_HEADROOM: f32 = 96.0 / 17.0;

/// The largest scale that choosing between two leaves: 1.5 times it is still an E4M3 number, 384.
const LARGEST_OF_TWO: f32 = 256.0;

/// What MS-EDEN lets the largest magnitude of a block come to, which leaves its correction room.
const EDEN_MAX: f32 = 6.0 / (17.0 / 16.0 * 0.93);

/// MS-EDEN's largest scale before correction: below 256, so that it stays below 448 behind it.
const EDEN_SCALE: f32 = 255.99;

/// How a block's scale is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Nvfp4Scale {
    /// The largest magnitude comes to 6, and above by the rounding of the scale, where it
    /// saturates.
    Full,
    /// It comes to at most 6: nothing saturates.
    Headroom,
    /// It comes to 6 or to 4, whichever leaves the smaller squared error: "four over six".
    FourOverSix,
}

impl Nvfp4Scale {
    /// What the largest magnitude of a block is divided by, and the largest scale.
    const fn limits(self) -> (f32, f32) {
        match self {
            Self::Full => (E2M1_MAX, E4M3_MAX),
            Self::Headroom => (WITH_HEADROOM, E4M3_MAX),
            Self::FourOverSix => (E2M1_MAX, LARGEST_OF_TWO),
        }
    }
}

/// The f32 scale of a tensor, with its inverse, which is computed first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nvfp4Tensor {
    /// Its values are multiplied by it before their blocks are scaled.
    pub encode: f32,
    /// What gives them back.
    pub decode: f32,
}

impl Nvfp4Tensor {
    /// That of a tensor with this largest magnitude; NaN if it is not finite.
    pub fn new(amax: f32, rule: Nvfp4Scale) -> Self {
        let (largest, scale) = rule.limits();
        Self::of(largest * scale, amax)
    }

    /// For blocks by [`quantize_nvfp4_eden`].
    pub fn eden(amax: f32) -> Self {
        if !amax.is_finite() {
            return Self { encode: f32::NAN, decode: f32::NAN };
        }
        // NOTE: in this order, which decides the last bit.
        let decode = if amax == 0.0 { 1.0 } else { amax / EDEN_SCALE / EDEN_MAX };
        let decode = decode.max(f32::MIN_POSITIVE);
        Self { encode: 1.0 / decode, decode }
    }

    fn of(largest: f32, amax: f32) -> Self {
        if !amax.is_finite() {
            return Self { encode: f32::NAN, decode: f32::NAN };
        }
        let encode = (largest / amax).min(f32::MAX);
        let encode = if amax == 0.0 || encode == 0.0 { 1.0 } else { encode };
        Self { encode, decode: 1.0 / encode }
    }
}

/// Quantizes a block: its scale, an E4M3 number, and the codes. `bits(i)` gives the 16 random bits
/// of element i, where there are such.
///
/// `amax` is the largest magnitude of what shares the scale, which may be more than this block. A
/// block whose `amax` is tiny against the tensor's has the scale 0.
pub fn quantize_nvfp4(
    v: &[f32; NVFP4_BLOCK],
    amax: f32,
    tensor: Nvfp4Tensor,
    rule: Nvfp4Scale,
    bits: Option<&dyn Fn(usize) -> u16>,
) -> (f32, [u8; NVFP4_BLOCK]) {
    let scale = nvfp4_scale(v, amax, tensor, rule);
    (scale, nvfp4_codes(v, scale, tensor, bits))
}

/// The scale of blocks that share one, of which `amax` is the largest magnitude.
pub(super) fn nvfp4_scale(blocks: &[f32], amax: f32, tensor: Nvfp4Tensor, rule: Nvfp4Scale) -> f32 {
    let full = full_scale(amax, tensor, rule);
    if rule != Nvfp4Scale::FourOverSix {
        return full;
    }
    // 1.5 times the scale, of which the largest magnitude is 4.
    let wide = round_to_e4m3((amax * inverse_unit(tensor, rule) * 1.5).min(E4M3_MAX));
    let error = |scale| {
        let blocks = blocks.as_chunks::<NVFP4_BLOCK>().0;
        blocks.iter().map(|v| squared_error(v, scale, tensor)).sum::<f64>()
    };
    if error(wide) < error(full) { wide } else { full }
}

/// 1/6 of the tensor's encoding scale: what a block's largest magnitude is multiplied by.
fn inverse_unit(tensor: Nvfp4Tensor, rule: Nvfp4Scale) -> f32 {
    let inverse = match rule {
        Nvfp4Scale::Full | Nvfp4Scale::FourOverSix => SIXTH,
        Nvfp4Scale::Headroom => 1.0 / WITH_HEADROOM,
    };
    // NOTE: (amax / 6) * encode differs from amax * (encode / 6) for one block of a thousand.
    tensor.encode * inverse
}

fn full_scale(amax: f32, tensor: Nvfp4Tensor, rule: Nvfp4Scale) -> f32 {
    // NaN stays.
    let scale = amax * inverse_unit(tensor, rule);
    round_to_e4m3(if scale > E4M3_MAX { E4M3_MAX } else { scale })
}

/// The codes with a given scale.
pub(super) fn nvfp4_codes(
    v: &[f32; NVFP4_BLOCK],
    scale: f32,
    tensor: Nvfp4Tensor,
    bits: Option<&dyn Fn(usize) -> u16>,
) -> [u8; NVFP4_BLOCK] {
    let encode = encoding(scale, tensor);
    let mut codes = [0; NVFP4_BLOCK];
    for (i, (code, x)) in codes.iter_mut().zip(v).enumerate() {
        let y = (x * encode).abs().min(E2M1_MAX);
        let magnitude = bits.map_or_else(|| nearest(y), |bits| stochastic(y, bits(i)));
        *code = magnitude | sign(*x);
    }
    codes
}

/// What values are multiplied by to become elements of a block with this scale.
pub(super) fn encoding(scale: f32, tensor: Nvfp4Tensor) -> f32 {
    (1.0 / (scale * tensor.decode)).min(f32::MAX)
}

fn sign(x: f32) -> u8 {
    ((x.to_bits() >> 31) as u8) << 3
}

/// Of a block rounded to nearest with a scale, in units of the tensor's; f32, in order.
fn squared_error(v: &[f32; NVFP4_BLOCK], scale: f32, tensor: Nvfp4Tensor) -> f64 {
    let encode = encoding(scale, tensor);
    let codes = nvfp4_codes(v, scale, tensor, None);
    let sum = v.iter().zip(codes).fold(0.0f32, |sum, (x, code)| {
        let error = (decode_e2m1(code) - x * encode) * scale;
        sum + error * error
    });
    f64::from(sum)
}

/// MS-EDEN of a block: rounds to nearest, and then the block's scale stochastically, so that over
/// random rotations the mean is the value. `bits` are the 16 of the scale.
///
/// ref: Quartet II, Algorithm 1. NOTE: the correction is that of each 16 elements, not of the
/// rotation's group, over which sums weight blocks by their scales and 0.06% of bias stays.
pub fn quantize_nvfp4_eden(
    v: &[f32; NVFP4_BLOCK],
    tensor: Nvfp4Tensor,
    bits: u16,
) -> (f32, [u8; NVFP4_BLOCK]) {
    let amax = amax_of(v);
    let scale = round_to_e4m3(amax / EDEN_MAX / tensor.decode);
    let scale = if scale == 0.0 { 1.0 } else { scale };
    let codes = nvfp4_codes(v, scale, tensor, None);
    let encode = encoding(scale, tensor);
    let (mut squares, mut products) = (0.0, 0.0);
    for (x, code) in v.iter().zip(&codes) {
        let r = x * encode;
        squares += r * r;
        products += r * decode_e2m1(*code);
    }
    let correction = if products == 0.0 { 1.0 } else { squares / products };
    (e4m3_stochastic(scale * correction, bits), codes)
}

/// The E4M3 neighbour of `v` >= 0 above it with probability (v - lo) / (hi - lo), to the nearest
/// 2^-16.
fn e4m3_stochastic(v: f32, bits: u16) -> f32 {
    if !v.is_finite() {
        return f32::NAN;
    }
    let v = v.min(E4M3_MAX);
    // Steps of the grid are 2^-9 up to 2^-5, then 2^-3 of the binade.
    let exponent = ((v.to_bits() >> 23) as i32 - 127).max(-6);
    let power = |e: i32| f32::from_bits(((e + 127) as u32) << 23);
    // Exact: v has as many bits behind its first, and the step is a power of two.
    let steps = v * power(3 - exponent);
    let whole = steps.floor();
    let up = (f32::from(bits) + 0.5) * (1.0 / 65536.0) < steps - whole;
    (whole + f32::from(u8::from(up))) * power(exponent - 3)
}

/// The largest magnitude; NaN where there is one.
pub fn amax_of(v: &[f32]) -> f32 {
    // Comparing magnitudes as integers lets NaN win.
    f32::from_bits(v.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0))
}

/// The f32 scale of 128 elements with this largest magnitude. `power` makes it the power of two
/// above, which products in bf16 hold.
pub fn nvfp4_outer(amax: f32, power: bool) -> f32 {
    if !amax.is_finite() {
        return f32::NAN;
    }
    let outer = amax / E4M3_MAX / E2M1_MAX;
    if outer < f32::MIN_POSITIVE {
        return 1.0;
    }
    let bits = outer.to_bits();
    if power { f32::from_bits((bits + 0x007f_ffff) & 0xff80_0000) } else { outer }
}

/// Quantizes a block within 128 elements of the scale `outer`: its own scale, and codes.
///
/// ref: TetraJet-v2's code, whose smallest scale is E4M3's smallest number.
pub fn quantize_nvfp4_within(
    v: &[f32; NVFP4_BLOCK],
    outer: f32,
    bits: Option<&dyn Fn(usize) -> u16>,
) -> (f32, [u8; NVFP4_BLOCK]) {
    let scale = nvfp4_scale_within(v, outer);
    let unit = scale * outer;
    let mut codes = [0; NVFP4_BLOCK];
    for (i, (code, x)) in codes.iter_mut().zip(v).enumerate() {
        let y = (x / unit).abs().min(E2M1_MAX);
        let magnitude = bits.map_or_else(|| nearest(y), |bits| stochastic(y, bits(i)));
        *code = magnitude | sign(*x);
    }
    (scale, codes)
}

/// The scale of a block within 128 elements of the scale `outer`.
pub(super) fn nvfp4_scale_within(v: &[f32; NVFP4_BLOCK], outer: f32) -> f32 {
    let scale = round_to_e4m3((amax_of(v) / outer / E2M1_MAX).min(E4M3_MAX));
    if scale == 0.0 { 1.0 / 512.0 } else { scale }
}

#[cfg(test)]
mod tests {
    use super::super::rotate;
    use super::*;

    /// x_i = (((37 i + 11) mod 64) - 31.5) / 16.
    fn series(i: usize) -> f32 {
        (((37 * i + 11) % 64) as f32 - 31.5) / 16.0
    }

    fn sixteen(first: usize, scale: f32) -> [f32; NVFP4_BLOCK] {
        std::array::from_fn(|i| series(first + i) * scale)
    }

    /// Codes as hexadecimal digits, element 0 first.
    fn digits(codes: &[u8; NVFP4_BLOCK]) -> String {
        codes.iter().map(|code| format!("{code:x}")).collect()
    }

    #[test]
    fn the_vector_of_two_levels() {
        let blocks = [sixteen(0, 1.0), sixteen(16, 1.0 / 64.0)];
        let amax = amax_of(blocks.as_flattened());
        assert_eq!(amax, 1.84375);
        let tensor = Nvfp4Tensor::new(amax, Nvfp4Scale::Full);
        assert_eq!(tensor.encode.to_bits(), 0x44b6_3cbf);
        assert_eq!(tensor.decode.to_bits(), 0x3a33_cf3d);
        for (block, scale, codes) in
            [(blocks[0], 448.0, "e5c78f4e6b71e5d6"), (blocks[1], 7.5, "af2e5c69f3e6b71e")]
        {
            let found = quantize_nvfp4(&block, amax_of(&block), tensor, Nvfp4Scale::Full, None);
            assert_eq!((found.0, digits(&found.1).as_str()), (scale, codes));
        }
        // Within 128 elements it is the same.
        let outer = nvfp4_outer(amax, false);
        for (block, scale, codes) in
            [(blocks[0], 448.0, "e5c78f4e6b71e5d6"), (blocks[1], 7.5, "af2e5c69f3e6b71e")]
        {
            let found = quantize_nvfp4_within(&block, outer, None);
            assert_eq!((found.0, digits(&found.1).as_str()), (scale, codes));
        }
    }

    #[test]
    fn the_order_of_operations_decides_a_tie() {
        let tensor = Nvfp4Tensor::new(65.0 / 64.0, Nvfp4Scale::Full);
        let mut block = [0.0; NVFP4_BLOCK];
        block[3] = 195.0 / 256.0;
        let (scale, _) = quantize_nvfp4(&block, amax_of(&block), tensor, Nvfp4Scale::Full, None);
        assert_eq!(scale, 352.0);
    }

    #[test]
    fn the_vector_of_a_rotated_block() {
        let signs: [f32; 16] = [
            1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -1.0,
            -1.0,
        ];
        let mut block = sixteen(0, 1.0);
        rotate(&mut block, &signs);
        let expected =
            [-32, -172, 224, -148, -288, -148, -32, -44, 8, -132, -16, -68, -16, 284, 88, -164];
        assert_eq!(block.map(|v| (v * 128.0) as i32), expected);
        let amax = amax_of(&block);
        assert_eq!(amax, 2.25);
        let tensor = Nvfp4Tensor::new(amax, Nvfp4Scale::Full);
        let (scale, codes) = quantize_nvfp4(&block, amax, tensor, Nvfp4Scale::Full, None);
        assert_eq!((scale, digits(&codes).as_str()), (448.0, "9e6dfd9a0d9b974d"));
    }

    #[test]
    fn four_over_six_takes_the_smaller_error() {
        let rule = Nvfp4Scale::FourOverSix;
        let tensor = Nvfp4Tensor::new(1536.0, rule);
        assert_eq!(tensor.encode, 1.0);
        let block = |first: [f32; 8]| {
            let mut block = [0.0; NVFP4_BLOCK];
            block[..8].copy_from_slice(&first);
            block
        };
        let wide = block([12.0, 9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 4.0]);
        let (scale, codes) = quantize_nvfp4(&wide, 12.0, tensor, rule, None);
        assert_eq!(scale, 3.0);
        assert_eq!(
            codes[..8].iter().map(|c| decode_e2m1(*c)).collect::<Vec<_>>(),
            [4.0, 3.0, 3.0, 3.0, 0.5, 0.5, 1.0, 1.5]
        );
        let full = block([12.0, 8.0, 8.0, 6.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(quantize_nvfp4(&full, 12.0, tensor, rule, None).0, 2.0);
    }

    #[test]
    fn the_vector_of_eden() {
        let blocks = [sixteen(0, 1.0), sixteen(16, 0.25)];
        let tensor = Nvfp4Tensor::eden(amax_of(blocks.as_flattened()));
        let values = [
            [-4.0, 3.0, -2.0, 6.0, 0.0, -6.0, 2.0, -4.0, 4.0, -1.5, 6.0, 0.5, -6.0, 3.0, -3.0, 4.0],
            [
                -1.0, -6.0, 1.0, -4.0, 3.0, -2.0, 4.0, -0.5, -6.0, 1.5, -3.0, 3.0, -1.5, 6.0, 0.5,
                -4.0,
            ],
        ];
        let scales = [(240.0, 256.0, 0.576_258_92), (64.0, 72.0, 0.936_240_44)];
        for ((block, values), (lo, hi, p)) in blocks.iter().zip(values).zip(scales) {
            let (_, found) = quantize_nvfp4_eden(block, tensor, 0);
            assert_eq!(found.map(decode_e2m1), values);
            let scales = (0..=u16::MAX).map(|bits| quantize_nvfp4_eden(block, tensor, bits).0);
            let mut ups = 0u32;
            for scale in scales {
                assert!(scale == lo || scale == hi, "{scale}");
                ups += u32::from(scale == hi);
            }
            assert!((f64::from(ups) / 65536.0 - p).abs() < 1e-4, "{ups} of 65536, not {p}");
        }
    }

    #[test]
    fn scales_of_e4m3_round_without_bias() {
        for v in [0.0, 1e-9, 0.001, 0.0137, 0.9, 1.0, 1.06, 17.3, 300.0, 447.0, 448.0, 500.0] {
            let mean = (0..=u16::MAX).map(|bits| f64::from(e4m3_stochastic(v, bits))).sum::<f64>()
                / 65536.0;
            let v = f64::from(v.min(E4M3_MAX));
            assert!((mean - v).abs() <= 2f64.powi(-16) * v.max(2f64.powi(-6)), "{v}: {mean}");
        }
        assert!(e4m3_stochastic(f32::NAN, 3).is_nan());
    }

    #[test]
    fn what_is_not_finite_poisons_the_tensor() {
        for amax in [f32::NAN, f32::INFINITY] {
            assert!(Nvfp4Tensor::new(amax, Nvfp4Scale::Full).decode.is_nan());
            assert!(Nvfp4Tensor::eden(amax).decode.is_nan());
            assert!(nvfp4_outer(amax, true).is_nan());
        }
        let zero = Nvfp4Tensor::new(0.0, Nvfp4Scale::Full);
        assert_eq!((zero.encode, zero.decode), (1.0, 1.0));
        let zeros = [0.0; NVFP4_BLOCK];
        assert_eq!(quantize_nvfp4(&zeros, 0.0, zero, Nvfp4Scale::Full, None).1, [0; 16]);
        assert_eq!(quantize_nvfp4_within(&zeros, nvfp4_outer(0.0, true), None).1, [0; 16]);
        for amax in [1e-45f32, 1e-38, f32::MAX] {
            for tensor in [Nvfp4Tensor::new(amax, Nvfp4Scale::Full), Nvfp4Tensor::eden(amax)] {
                assert!(tensor.encode.is_finite() && tensor.decode.is_finite(), "{amax}");
            }
        }
    }
}
