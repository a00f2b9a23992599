//! Sixteen lanes in one register of AVX-512.

use std::arch::x86_64::*;

use super::{Lanes, M0, M1};

/// One register.
pub(in crate::backend::cpu) struct Avx512;

// SAFETY of every block below: the caller vouches for the instruction set (and for the memory).
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx512 {
    type F = __m512;
    type U = __m512i;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn load_u(from: *const u32) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store_u(to: *mut u32, v: __m512i) {
        unsafe { _mm512_storeu_si512(to.cast(), v) }
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(v: f32) -> __m512 {
        unsafe { _mm512_set1_ps(v) }
    }
    #[inline(always)]
    unsafe fn splat_u(v: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(v as i32) }
    }
    #[inline(always)]
    unsafe fn bits(v: __m512) -> __m512i {
        unsafe { _mm512_castps_si512(v) }
    }
    #[inline(always)]
    unsafe fn from_bits(v: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(v) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn less(a: __m512, b: __m512) -> __m512i {
        unsafe { _mm512_movm_epi32(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b)) }
    }
    #[inline(always)]
    unsafe fn less_equal(a: __m512, b: __m512) -> __m512i {
        unsafe { _mm512_movm_epi32(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b)) }
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn xor(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_xor_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn add_u(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub_u(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_sub_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn max_u(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_max_epu32(a, b) }
    }
    #[inline(always)]
    unsafe fn equal(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_movm_epi32(_mm512_cmpeq_epi32_mask(a, b)) }
    }
    #[inline(always)]
    unsafe fn shift_left<const N: u32>(v: __m512i) -> __m512i {
        unsafe { _mm512_slli_epi32::<N>(v) }
    }
    #[inline(always)]
    unsafe fn shift_right<const N: u32>(v: __m512i) -> __m512i {
        unsafe { _mm512_srli_epi32::<N>(v) }
    }
    #[inline(always)]
    unsafe fn multiply_wide(v: __m512i, m: u32) -> (__m512i, __m512i) {
        unsafe {
            let m = _mm512_set1_epi32(m as i32);
            let even = _mm512_mul_epu32(v, m);
            let odd = _mm512_mul_epu32(_mm512_srli_epi64::<32>(v), m);
            let high = _mm512_mask_mov_epi32(_mm512_srli_epi64::<32>(even), 0xaaaa, odd);
            (high, _mm512_mullo_epi32(v, m))
        }
    }
    #[inline(always)]
    unsafe fn look_up(v: __m512i, table: &[u32; 16]) -> __m512i {
        unsafe { _mm512_permutexvar_epi32(v, Self::load_u(table.as_ptr())) }
    }
    #[inline(always)]
    unsafe fn add_bytes(sum: __m512i, words: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), words) }
    }
    #[inline(always)]
    unsafe fn any(v: __m512i) -> bool {
        unsafe { _mm512_test_epi32_mask(v, v) != 0 }
    }
    #[inline(always)]
    unsafe fn stochastic(y: __m512, bits: __m512i) -> __m512i {
        unsafe {
            // The same with mask registers.
            let one = _mm512_set1_ps(1.0);
            let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(y, one);
            let u = _mm512_castps_si512(_mm512_mask_add_ps(y, below, y, one));
            let code = _mm512_srli_epi32::<22>(_mm512_add_epi32(u, bits));
            let code = _mm512_sub_epi32(code, _mm512_set1_epi32(252));
            _mm512_mask_sub_epi32(code, below, code, _mm512_set1_epi32(2))
        }
    }
    /// Even and odd lanes apart, each word in the lower half of 64 bits, which is where the
    /// multiplication reads it; whatever stands in the upper half is never read. Words 2 and 3 of
    /// the counter, the same in all lanes, spare the first round a multiplication.
    #[inline(always)]
    unsafe fn philox(
        keys: &[[u32; 2]; 10],
        c0: __m512i,
        c1: __m512i,
        [c2, c3]: [u32; 2],
    ) -> [__m512i; 4] {
        unsafe {
            let (m0, m1) = (_mm512_set1_epi64(M0 as i64), _mm512_set1_epi64(M1 as i64));
            let p1 = u64::from(c2) * u64::from(M1);
            let first = _mm512_set1_epi32((p1 >> 32) as i32 ^ keys[0][0] as i32);
            let low1 = _mm512_set1_epi32(p1 as i32);
            let second = _mm512_set1_epi32((c3 ^ keys[0][1]) as i32);
            let mut c = [[low1; 4]; 2];
            for half in 0..2 {
                let (mut c0, mut c1) = (c0, c1);
                if half == 1 {
                    (c0, c1) = (_mm512_srli_epi64::<32>(c0), _mm512_srli_epi64::<32>(c1));
                }
                let p0 = _mm512_mul_epu32(c0, m0);
                let c2 = _mm512_xor_si512(_mm512_srli_epi64::<32>(p0), second);
                c[half] = [_mm512_xor_si512(c1, first), low1, c2, p0];
            }
            for [k0, k1] in &keys[1..] {
                let keys = (_mm512_set1_epi32(*k0 as i32), _mm512_set1_epi32(*k1 as i32));
                for half in 0..2 {
                    let [c0, c1, c2, c3] = c[half];
                    let (p0, p1) = (_mm512_mul_epu32(c0, m0), _mm512_mul_epu32(c2, m1));
                    let (high0, high1) = (_mm512_srli_epi64::<32>(p0), _mm512_srli_epi64::<32>(p1));
                    let c0 = _mm512_ternarylogic_epi32::<0x96>(high1, c1, keys.0);
                    let c2 = _mm512_ternarylogic_epi32::<0x96>(high0, c3, keys.1);
                    c[half] = [c0, p1, c2, p0];
                }
            }
            let mut out = c[0];
            for w in 0..4 {
                let odd = _mm512_slli_epi64::<32>(c[1][w]);
                out[w] = _mm512_mask_blend_epi32(0xaaaa, c[0][w], odd);
            }
            out
        }
    }
    /// The 16 bits that are drawn meet those of the element that they are added to: two elements a
    /// word, and what is left above is the code.
    #[inline(always)]
    unsafe fn stochastic_bytes(
        x: [__m512; 8],
        factor: __m512,
        random: [__m512i; 4],
        table: &[u32; 16],
    ) -> [__m512i; 2] {
        const ODD: __mmask32 = 0xaaaa_aaaa;
        unsafe {
            let (half, step) = (_mm512_set1_ps(0.5), _mm512_set1_epi32(32));
            let magnitude = _mm512_set1_ps(f32::from_bits(0x7fff_ffff));
            let mut codes = [step; 4];
            for i in 0..4 {
                let mut u = [step; 2];
                for j in 0..2 {
                    let y = _mm512_mul_ps(x[2 * i + j], factor);
                    let middle = _mm512_fmadd_ps(_mm512_and_ps(y, magnitude), half, half);
                    // The larger magnitude, with the sign of y.
                    let larger = _mm512_castps_si512(_mm512_range_ps::<0b0011>(y, middle));
                    u[j] = _mm512_add_epi32(larger, step);
                }
                let (even, odd) = (_mm512_srli_epi32::<6>(u[0]), _mm512_slli_epi32::<10>(u[1]));
                let below = _mm512_mask_blend_epi16(ODD, even, odd);
                let (even, odd) = (_mm512_srli_epi32::<22>(u[0]), _mm512_srli_epi32::<6>(u[1]));
                let above = _mm512_mask_blend_epi16(ODD, even, odd);
                let sum = _mm512_add_epi16(below, random[i]);
                let carry = _mm512_cmplt_epu16_mask(sum, random[i]);
                let code = _mm512_mask_sub_epi16(above, carry, above, _mm512_set1_epi16(-1));
                // Bits 0 to 2 hold code ^ 4; the sign, bit 9, goes to bit 3.
                let sign = _mm512_srli_epi16::<6>(code);
                let mask = _mm512_set1_epi16(8);
                codes[i] = _mm512_ternarylogic_epi32::<0xca>(mask, sign, code);
            }
            let mut bytes = [0u8; 16];
            for (i, byte) in bytes.iter_mut().enumerate() {
                *byte = table[i ^ 4] as u8;
            }
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(bytes.as_ptr().cast()));
            let mut words = [step; 2];
            for i in 0..2 {
                let high = _mm512_slli_epi16::<8>(codes[2 * i + 1]);
                let both = _mm512_mask_blend_epi8(0xaaaa_aaaa_aaaa_aaaa, codes[2 * i], high);
                let both = _mm512_and_si512(both, _mm512_set1_epi8(15));
                words[i] = _mm512_shuffle_epi8(table, both);
            }
            words
        }
    }
    #[inline(always)]
    unsafe fn bf16_pairs(low: __m512, high: __m512) -> __m512i {
        // SAFETY: 32 bf16 are as large as 16 words.
        unsafe {
            Self::zip(std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)))
        }
    }
    #[inline(always)]
    unsafe fn transpose(r: [__m512; 16]) -> [__m512; 16] {
        unsafe {
            // quads[q][c]: columns c, 4 + c, 8 + c, 12 + c of rows 4 q .. 4 q + 4.
            let mut quads = [[r[0]; 4]; 4];
            for q in 0..4 {
                let (a, b, c, d) = (r[4 * q], r[4 * q + 1], r[4 * q + 2], r[4 * q + 3]);
                let (low, high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (low, high) = (_mm512_castps_pd(low), _mm512_castps_pd(high));
                let (low2, high2) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                let (low2, high2) = (_mm512_castps_pd(low2), _mm512_castps_pd(high2));
                quads[q] = [
                    _mm512_castpd_ps(_mm512_unpacklo_pd(low, low2)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(low, low2)),
                    _mm512_castpd_ps(_mm512_unpacklo_pd(high, high2)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(high, high2)),
                ];
            }
            // Then the quarters of 128 bits: 0x88 takes the even ones of two registers, 0xdd
            // the odd ones.
            let mut out = r;
            for c in 0..4 {
                let [q0, q1, q2, q3] = [quads[0][c], quads[1][c], quads[2][c], quads[3][c]];
                let even01 = _mm512_shuffle_f32x4::<0x88>(q0, q1);
                let odd01 = _mm512_shuffle_f32x4::<0xdd>(q0, q1);
                let even23 = _mm512_shuffle_f32x4::<0x88>(q2, q3);
                let odd23 = _mm512_shuffle_f32x4::<0xdd>(q2, q3);
                out[c] = _mm512_shuffle_f32x4::<0x88>(even01, even23);
                out[4 + c] = _mm512_shuffle_f32x4::<0x88>(odd01, odd23);
                out[8 + c] = _mm512_shuffle_f32x4::<0xdd>(even01, even23);
                out[12 + c] = _mm512_shuffle_f32x4::<0xdd>(odd01, odd23);
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn interleave(w: [__m512i; 4]) -> [__m512i; 4] {
        unsafe {
            let (a, b) = (_mm512_unpacklo_epi32(w[0], w[1]), _mm512_unpackhi_epi32(w[0], w[1]));
            let (c, d) = (_mm512_unpacklo_epi32(w[2], w[3]), _mm512_unpackhi_epi32(w[2], w[3]));
            [
                _mm512_unpacklo_epi64(a, c),
                _mm512_unpackhi_epi64(a, c),
                _mm512_unpacklo_epi64(b, d),
                _mm512_unpackhi_epi64(b, d),
            ]
        }
    }
    #[inline(always)]
    unsafe fn zip(v: __m512i) -> __m512i {
        const HALVES: [u16; 32] = {
            let (mut at, mut i) = ([0; 32], 0);
            while i < 32 {
                at[i] = (i / 2 + 16 * (i % 2)) as u16;
                i += 1;
            }
            at
        };
        unsafe { _mm512_permutexvar_epi16(_mm512_loadu_si512(HALVES.as_ptr().cast()), v) }
    }
    #[inline(always)]
    unsafe fn narrow(v: [__m512i; 2]) -> __m512i {
        const UPPER: [u16; 32] = {
            let (mut at, mut i) = ([0; 32], 0);
            while i < 32 {
                at[i] = 2 * i as u16 + 1;
                i += 1;
            }
            at
        };
        unsafe {
            let at = _mm512_loadu_si512(UPPER.as_ptr().cast());
            _mm512_permutex2var_epi16(v[0], at, v[1])
        }
    }
}
