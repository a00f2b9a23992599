//! Sixteen lanes of 32 bits, as the packing kernels need them: one register of AVX-512, two of
//! AVX2, or an array.
//!
//! Kernels are generic over [`Lanes`] and compiled once for every instruction set. All operations
//! are exact or correctly rounded IEEE operations, so that every set computes the same bits.
//!
//! NOTE: plain Rust over `[f32; 16]` was tried first. The compiler turned the element-wise loops of
//! GELU or LayerNorm into full registers, but the butterfly and the rounding into a mix of partial
//! ones, many times slower.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use crate::formats::{M0, M1, W0, W1};
#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;
pub(super) use portable::Portable;

/// Sixteen lanes.
///
/// NOTE: no closures and no iterator over lanes in implementations and kernels. They would be
/// functions of their own, compiled without the instruction set, and every operation in them a
/// call.
///
/// # Safety
/// All methods need the instruction set of the implementation. They are `unsafe fn` where they also
/// touch memory.
pub(super) trait Lanes {
    /// 16 f32.
    type F: Copy;
    /// 16 u32.
    type U: Copy;

    /// Reads 16 values.
    unsafe fn load(from: *const f32) -> Self::F;
    /// Writes 16 values.
    unsafe fn store(to: *mut f32, v: Self::F);
    /// Reads 16 words.
    unsafe fn load_u(from: *const u32) -> Self::U;
    /// Writes 16 words.
    unsafe fn store_u(to: *mut u32, v: Self::U);

    /// Asks for the cache line of an address, which need not be anybody's, to be in the
    /// second-level cache.
    ///
    /// NOTE: not in the first: rows a power of two apart share few of its sets and throw each other
    /// out. Quantizing took 0.85 ns an element for 0.80 at a width of 384, the same for wider ones
    /// (Zen 4).
    unsafe fn prefetch(from: *const f32);

    unsafe fn splat(v: f32) -> Self::F;
    unsafe fn splat_u(v: u32) -> Self::U;
    unsafe fn bits(v: Self::F) -> Self::U;
    unsafe fn from_bits(v: Self::U) -> Self::F;

    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// (a < b) ? 1 : 0, as all ones or zero.
    unsafe fn less(a: Self::F, b: Self::F) -> Self::U;
    /// (a <= b), as all ones or zero.
    unsafe fn less_equal(a: Self::F, b: Self::F) -> Self::U;

    unsafe fn and(a: Self::U, b: Self::U) -> Self::U;
    unsafe fn or(a: Self::U, b: Self::U) -> Self::U;
    unsafe fn xor(a: Self::U, b: Self::U) -> Self::U;
    unsafe fn add_u(a: Self::U, b: Self::U) -> Self::U;
    unsafe fn sub_u(a: Self::U, b: Self::U) -> Self::U;
    /// Unsigned maximum.
    unsafe fn max_u(a: Self::U, b: Self::U) -> Self::U;
    /// All ones where a == b.
    unsafe fn equal(a: Self::U, b: Self::U) -> Self::U;
    unsafe fn shift_left<const N: u32>(v: Self::U) -> Self::U;
    unsafe fn shift_right<const N: u32>(v: Self::U) -> Self::U;
    /// High and low halves of the 64-bit products with `m`.
    unsafe fn multiply_wide(v: Self::U, m: u32) -> (Self::U, Self::U);
    /// `table[v]`, all lanes below 16.
    unsafe fn look_up(v: Self::U, table: &[u32; 16]) -> Self::U;
    /// sum + the sum of the four signed bytes of each word.
    unsafe fn add_bytes(sum: Self::U, words: Self::U) -> Self::U;
    /// Whether any lane has a bit set.
    unsafe fn any(v: Self::U) -> bool;

    /// Codes of y, 0 <= y <= 6, stochastically rounded as in `formats::quantize`; `bits` are in
    /// place.
    #[inline(always)]
    unsafe fn stochastic(y: Self::F, bits: Self::U) -> Self::U {
        // SAFETY: passed on.
        unsafe {
            let one = Self::splat(1.0);
            let below = Self::less(y, one);
            let u = Self::add(y, Self::from_bits(Self::and(below, Self::bits(one))));
            let code = Self::shift_right::<22>(Self::add_u(Self::bits(u), bits));
            let code = Self::sub_u(code, Self::splat_u(252));
            Self::sub_u(code, Self::and(below, Self::splat_u(2)))
        }
    }

    /// Values of those codes: the two highest bits of a significand are all that a value has.
    #[inline(always)]
    unsafe fn stochastic_value(y: Self::F, bits: Self::U) -> Self::F {
        // SAFETY: passed on.
        unsafe {
            let one = Self::bits(Self::splat(1.0));
            let one = Self::from_bits(Self::and(Self::less(y, Self::splat(1.0)), one));
            let sum = Self::add_u(Self::bits(Self::add(y, one)), bits);
            let cut = Self::and(sum, Self::splat_u(0xffc0_0000));
            Self::sub(Self::from_bits(cut), one)
        }
    }

    /// `formats::philox4x32_10` of a counter in each lane, of which words 2 and 3 are the same in
    /// all.
    #[inline(always)]
    unsafe fn philox(
        keys: &[[u32; 2]; 10],
        c0: Self::U,
        c1: Self::U,
        [c2, c3]: [u32; 2],
    ) -> [Self::U; 4] {
        // SAFETY: passed on.
        unsafe {
            let [mut c0, mut c1, mut c2, mut c3] = [c0, c1, Self::splat_u(c2), Self::splat_u(c3)];
            for [k0, k1] in *keys {
                let (high0, low0) = Self::multiply_wide(c0, M0);
                let (high1, low1) = Self::multiply_wide(c2, M1);
                c0 = Self::xor(Self::xor(high1, c1), Self::splat_u(k0));
                c2 = Self::xor(Self::xor(high0, c3), Self::splat_u(k1));
                (c1, c3) = (low1, low0);
            }
            [c0, c1, c2, c3]
        }
    }

    /// Eight elements x of each lane, times `factor`, stochastically rounded as in
    /// `formats::quantize` and looked up by code: bytes 0 2 1 3, then 4 6 5 7, of two words.
    /// `random` has 16 bits an element, those of elements 2 i and 2 i + 1 in word i.
    ///
    /// The grid below 1 is even and that above has a mantissa bit: max(y, (y + 1) / 2) makes one of
    /// both.
    #[inline(always)]
    unsafe fn stochastic_bytes(
        x: [Self::F; 8],
        factor: Self::F,
        random: [Self::U; 4],
        table: &[u32; 16],
    ) -> [Self::U; 2] {
        // SAFETY: passed on.
        unsafe {
            let mut words = [Self::splat_u(0); 2];
            for i in 0..8 {
                let word = random[i / 2];
                let half = Self::and(word, Self::splat_u(0xffff));
                let half = if i % 2 == 0 { half } else { Self::shift_right::<16>(word) };
                let x = Self::bits(x[i]);
                let y =
                    Self::mul(Self::from_bits(Self::and(x, Self::splat_u(0x7fff_ffff))), factor);
                let code = Self::stochastic(y, place::<Self>(half));
                let sign = Self::and(Self::shift_right::<28>(x), Self::splat_u(8));
                let byte = Self::look_up(Self::or(code, sign), table);
                let byte = match i % 4 {
                    0 => byte,
                    1 => Self::shift_left::<16>(byte),
                    2 => Self::shift_left::<8>(byte),
                    _ => Self::shift_left::<24>(byte),
                };
                words[i / 4] = Self::or(words[i / 4], byte);
            }
            words
        }
    }

    /// Pairs of bf16, `low` in the low halves, rounded to nearest even; NaN stays NaN. Subnormal
    /// numbers may become 0, which is what products of bf16 take them for.
    #[inline(always)]
    unsafe fn bf16_pairs(low: Self::F, high: Self::F) -> Self::U {
        // SAFETY: passed on.
        unsafe {
            let high = Self::and(round_to_bf16::<Self>(high), Self::splat_u(0xffff_0000));
            Self::or(Self::shift_right::<16>(round_to_bf16::<Self>(low)), high)
        }
    }

    /// Rows to columns.
    unsafe fn transpose(rows: [Self::F; 16]) -> [Self::F; 16];
    /// Of four vectors w, vector j of the result holds w0 w1 w2 w3 of lanes j, 4 + j, 8 + j, 12 +
    /// j.
    unsafe fn interleave(w: [Self::U; 4]) -> [Self::U; 4];
    /// The 16-bit halves of words 0 to 7 as low halves, those of words 8 to 15 as high ones.
    unsafe fn zip(v: Self::U) -> Self::U;
    /// The upper halves of 32 words, as 16 words.
    unsafe fn narrow(v: [Self::U; 2]) -> Self::U;
}

/// The bf16 nearest to v, ties to even, in the upper half of each word; NaN stays NaN.
#[inline(always)]
pub(super) unsafe fn round_to_bf16<L: Lanes + ?Sized>(v: L::F) -> L::U {
    // SAFETY: passed on.
    unsafe {
        let bits = L::bits(v);
        let odd = L::and(L::shift_right::<16>(bits), L::splat_u(1));
        let rounded = L::add_u(bits, L::add_u(odd, L::splat_u(0x7fff)));
        // A number is ordered with itself, a NaN is not: keep its bits, and make it quiet.
        let number = L::less_equal(v, v);
        let nan = L::or(bits, L::splat_u(0x0040_0000));
        L::xor(nan, L::and(L::xor(nan, rounded), number))
    }
}

/// 16 bits where stochastic rounding adds them: from bit 6 up, and the half step below.
#[inline(always)]
pub(super) unsafe fn place<L: Lanes + ?Sized>(halves: L::U) -> L::U {
    // SAFETY: passed on.
    unsafe { L::or(L::shift_left::<6>(halves), L::splat_u(32)) }
}

/// The keys of Philox's rounds.
pub(super) fn round_keys([k0, k1]: [u32; 2]) -> [[u32; 2]; 10] {
    std::array::from_fn(|round| {
        let after = |key: u32, add: u32| key.wrapping_add(add.wrapping_mul(round as u32));
        [after(k0, W0), after(k1, W1)]
    })
}

/// Compiles a kernel that is generic over [`Lanes`] for every instruction set; the first argument
/// of the result picks.
macro_rules! lanes_fn {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $kernel:ident;
    ) => {
        $crate::backend::cpu::isa::isa_fn! {
            $(#[$meta])*
            $vis fn $name($($arg: $ty),*);
            "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16" => {
                // SAFETY: compiled for the set.
                unsafe { $kernel::<$crate::backend::cpu::lanes::Avx512>($($arg),*) }
            }
            avx2 => {
                // SAFETY: compiled for the set.
                unsafe { $kernel::<$crate::backend::cpu::lanes::Avx2>($($arg),*) }
            }
            portable => {
                // SAFETY: arrays need no set.
                unsafe { $kernel::<$crate::backend::cpu::lanes::Portable>($($arg),*) }
            }
        }
    };
}
pub(super) use lanes_fn;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::{E2M1_VALUES, philox4x32_10};

    /// Every operation of a set gives what the arrays give.
    fn agrees<L: Lanes>() {
        let words: [u32; 16] = std::array::from_fn(|i| (i as u32).wrapping_mul(0x9e37_79b9) ^ 0x55);
        let other: [u32; 16] = std::array::from_fn(|i| words[15 - i].rotate_left(7));
        let floats: [f32; 16] = std::array::from_fn(|i| (i as f32 - 7.3) * 1.7);
        let more: [f32; 16] = std::array::from_fn(|i| floats[(i * 5) % 16]);
        // SAFETY: the caller checked that the set is available; arrays hold 16 lanes.
        unsafe {
            let (u, v) = (L::load_u(words.as_ptr()), L::load_u(other.as_ptr()));
            let (f, g) = (L::load(floats.as_ptr()), L::load(more.as_ptr()));
            let out_u = |v: L::U| {
                let mut out = [0; 16];
                L::store_u(out.as_mut_ptr(), v);
                out
            };
            let out = |v: L::F| out_u(L::bits(v));
            type P = Portable;
            let p_out = |v: [f32; 16]| v.map(f32::to_bits);
            assert_eq!(out(L::add(f, g)), p_out(P::add(floats, more)));
            assert_eq!(out(L::sub(f, g)), p_out(P::sub(floats, more)));
            assert_eq!(out(L::mul(f, g)), p_out(P::mul(floats, more)));
            assert_eq!(out_u(L::less(f, g)), P::less(floats, more));
            assert_eq!(out_u(L::less_equal(f, g)), P::less_equal(floats, more));
            assert_eq!(out_u(L::and(u, v)), P::and(words, other));
            assert_eq!(out_u(L::or(u, v)), P::or(words, other));
            assert_eq!(out_u(L::xor(u, v)), P::xor(words, other));
            assert_eq!(out_u(L::add_u(u, v)), P::add_u(words, other));
            assert_eq!(out_u(L::sub_u(u, v)), P::sub_u(words, other));
            assert_eq!(out_u(L::max_u(u, v)), P::max_u(words, other));
            assert_eq!(out_u(L::equal(u, u)), P::equal(words, words));
            assert_eq!(out_u(L::equal(u, v)), P::equal(words, other));
            assert_eq!(out_u(L::shift_left::<6>(u)), P::shift_left::<6>(words));
            assert_eq!(out_u(L::shift_right::<22>(u)), P::shift_right::<22>(words));
            assert_eq!(out_u(L::splat_u(77)), P::splat_u(77));
            assert_eq!(out(L::splat(7.5)), p_out(P::splat(7.5)));
            let (high, low) = L::multiply_wide(u, 0xd251_1f53);
            let expected = P::multiply_wide(words, 0xd251_1f53);
            assert_eq!((out_u(high), out_u(low)), expected);
            let small = L::and(u, L::splat_u(15));
            assert_eq!(out_u(L::look_up(small, &other)), P::look_up(words.map(|w| w & 15), &other));
            let bytes = words.map(|w| w & 0x0c0c_0c0c);
            assert_eq!(
                out_u(L::add_bytes(v, L::load_u(bytes.as_ptr()))),
                P::add_bytes(other, bytes)
            );
            assert_eq!((L::any(u), L::any(L::xor(u, u))), (true, false));
            let y: [f32; 16] = std::array::from_fn(|i| i as f32 * 0.4);
            let draws = words.map(|w| (w & 0xffff) << 6 | 32);
            assert_eq!(
                out_u(L::stochastic(L::load(y.as_ptr()), L::load_u(draws.as_ptr()))),
                P::stochastic(y, draws)
            );
            let values = L::stochastic_value(L::load(y.as_ptr()), L::load_u(draws.as_ptr()));
            let codes = P::stochastic(y, draws);
            let expected = codes.map(|code| E2M1_VALUES[code as usize].to_bits());
            assert_eq!(out(values), expected);
            let keys = round_keys([7, !7]);
            let drawn = L::philox(&keys, u, v, [words[3], other[2]]).map(out_u);
            for l in 0..16 {
                let counter = [words[l], other[l], words[3], other[2]];
                assert_eq!(drawn.map(|w| w[l]), philox4x32_10(counter, [7, !7]));
            }
            let values: [[f32; 16]; 8] = std::array::from_fn(|i| {
                std::array::from_fn(|l| if l == i { 0.0 } else { floats[(l + i) % 16] * 0.4 })
            });
            let draws = [words, other, words.map(|w| !w), other.map(|w| !w)];
            let table = std::array::from_fn(|code| 3 * code as u32 + 200);
            let got = L::stochastic_bytes(
                values.map(|v| L::load(v.as_ptr())),
                L::splat(0.75),
                draws.map(|w| L::load_u(w.as_ptr())),
                &table,
            );
            let expected = P::stochastic_bytes(values, [0.75; 16], draws, &table);
            assert_eq!(got.map(out_u), expected);
            let four = [0, 1, 2, 3].map(|i| words.map(|w| w.wrapping_add(i)));
            let got = L::interleave(four.map(|w| L::load_u(w.as_ptr()))).map(out_u);
            assert_eq!(got, P::interleave(four));
            assert_eq!(out_u(L::zip(u)), P::zip(words));
            assert_eq!(out_u(L::narrow([u, v])), P::narrow([words, other]));
            let special = {
                let mut values = floats;
                values[..4].copy_from_slice(&[f32::NAN, f32::INFINITY, -0.0, f32::MAX]);
                values
            };
            let got = out_u(L::bf16_pairs(L::load(special.as_ptr()), g));
            assert_eq!(got, P::bf16_pairs(special, more));
            let square: [[f32; 16]; 16] =
                std::array::from_fn(|i| std::array::from_fn(|j| (16 * i + j) as f32));
            let got = L::transpose(square.map(|row| L::load(row.as_ptr()))).map(out);
            assert_eq!(got, P::transpose(square).map(p_out));
        }
    }

    #[test]
    fn all_sets_agree() {
        agrees::<Portable>();
        #[cfg(target_arch = "x86_64")]
        {
            use crate::backend::cpu::Isa;
            if Isa::Avx2.is_available() {
                agrees::<Avx2>();
            }
            if Isa::Avx512.is_available() {
                agrees::<Avx512>();
            }
        }
    }
}
