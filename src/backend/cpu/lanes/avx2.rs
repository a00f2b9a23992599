//! Sixteen lanes in two registers of AVX2.

use std::arch::x86_64::*;

use super::Lanes;

/// Two registers.
pub(in crate::backend::cpu) struct Avx2;

type F = [__m256; 2];
type U = [__m256i; 2];

// SAFETY of every block below: the caller vouches for the instruction set (and for the memory).
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx2 {
    type F = F;
    type U = U;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> F {
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: F) {
        unsafe {
            _mm256_storeu_ps(to, v[0]);
            _mm256_storeu_ps(to.add(8), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_u(from: *const u32) -> U {
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast())] }
    }
    #[inline(always)]
    unsafe fn store_u(to: *mut u32, v: U) {
        unsafe {
            _mm256_storeu_si256(to.cast(), v[0]);
            _mm256_storeu_si256(to.add(8).cast(), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(v: f32) -> F {
        unsafe { [_mm256_set1_ps(v); 2] }
    }
    #[inline(always)]
    unsafe fn splat_u(v: u32) -> U {
        unsafe { [_mm256_set1_epi32(v as i32); 2] }
    }
    #[inline(always)]
    unsafe fn bits(v: F) -> U {
        unsafe { [_mm256_castps_si256(v[0]), _mm256_castps_si256(v[1])] }
    }
    #[inline(always)]
    unsafe fn from_bits(v: U) -> F {
        unsafe { [_mm256_castsi256_ps(v[0]), _mm256_castsi256_ps(v[1])] }
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn less(a: F, b: F) -> U {
        unsafe {
            Self::bits([
                _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]),
                _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1]),
            ])
        }
    }
    #[inline(always)]
    unsafe fn less_equal(a: F, b: F) -> U {
        unsafe {
            Self::bits([
                _mm256_cmp_ps::<_CMP_LE_OQ>(a[0], b[0]),
                _mm256_cmp_ps::<_CMP_LE_OQ>(a[1], b[1]),
            ])
        }
    }
    #[inline(always)]
    unsafe fn and(a: U, b: U) -> U {
        unsafe { [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn or(a: U, b: U) -> U {
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn xor(a: U, b: U) -> U {
        unsafe { [_mm256_xor_si256(a[0], b[0]), _mm256_xor_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn add_u(a: U, b: U) -> U {
        unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn sub_u(a: U, b: U) -> U {
        unsafe { [_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn max_u(a: U, b: U) -> U {
        unsafe { [_mm256_max_epu32(a[0], b[0]), _mm256_max_epu32(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn equal(a: U, b: U) -> U {
        unsafe { [_mm256_cmpeq_epi32(a[0], b[0]), _mm256_cmpeq_epi32(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn shift_left<const N: u32>(v: U) -> U {
        unsafe {
            let n = _mm_cvtsi32_si128(N as i32);
            [_mm256_sll_epi32(v[0], n), _mm256_sll_epi32(v[1], n)]
        }
    }
    #[inline(always)]
    unsafe fn shift_right<const N: u32>(v: U) -> U {
        unsafe {
            let n = _mm_cvtsi32_si128(N as i32);
            [_mm256_srl_epi32(v[0], n), _mm256_srl_epi32(v[1], n)]
        }
    }
    #[inline(always)]
    unsafe fn multiply_wide(v: U, m: u32) -> (U, U) {
        unsafe {
            let m = _mm256_set1_epi32(m as i32);
            let (mut high, mut low) = (v, v);
            for i in 0..2 {
                let even = _mm256_mul_epu32(v[i], m);
                let odd = _mm256_mul_epu32(_mm256_srli_epi64::<32>(v[i]), m);
                high[i] = _mm256_blend_epi32::<0xaa>(_mm256_srli_epi64::<32>(even), odd);
                low[i] = _mm256_blend_epi32::<0xaa>(even, _mm256_slli_epi64::<32>(odd));
            }
            (high, low)
        }
    }
    #[inline(always)]
    unsafe fn look_up(v: U, table: &[u32; 16]) -> U {
        unsafe {
            let [low, high] = Self::load_u(table.as_ptr());
            let mut out = v;
            for i in 0..2 {
                // Bit 3 of the index, moved to the sign, picks the half of the table.
                let pick = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(v[i]));
                let low = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(low, v[i]));
                let high = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(high, v[i]));
                out[i] = _mm256_castps_si256(_mm256_blendv_ps(low, high, pick));
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn add_bytes(sum: U, words: U) -> U {
        unsafe {
            let mut out = sum;
            for i in 0..2 {
                let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), words[i]);
                let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                out[i] = _mm256_add_epi32(sum[i], fours);
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn any(v: U) -> bool {
        unsafe {
            let v = _mm256_or_si256(v[0], v[1]);
            _mm256_testz_si256(v, v) == 0
        }
    }
    #[inline(always)]
    unsafe fn transpose(r: [F; 16]) -> [F; 16] {
        unsafe {
            let mut out = r;
            // Four blocks of 8 x 8: rows 8 down .. , columns 8 across ..
            for (down, across) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let mut quads = [[r[0][0]; 4]; 2];
                for q in 0..2 {
                    let first = 8 * down + 4 * q;
                    let (a, b) = (r[first][across], r[first + 1][across]);
                    let (c, d) = (r[first + 2][across], r[first + 3][across]);
                    let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                    let (low2, high2) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                    quads[q] = [
                        _mm256_shuffle_ps::<0x44>(low, low2),
                        _mm256_shuffle_ps::<0xee>(low, low2),
                        _mm256_shuffle_ps::<0x44>(high, high2),
                        _mm256_shuffle_ps::<0xee>(high, high2),
                    ];
                }
                for c in 0..4 {
                    let (a, b) = (quads[0][c], quads[1][c]);
                    out[8 * across + c][down] = _mm256_permute2f128_ps::<0x20>(a, b);
                    out[8 * across + 4 + c][down] = _mm256_permute2f128_ps::<0x31>(a, b);
                }
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn interleave(w: [U; 4]) -> [U; 4] {
        unsafe {
            let mut out = w;
            for h in 0..2 {
                let (a, b) = (w[0][h], w[1][h]);
                let (low, high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
                let (c, d) = (w[2][h], w[3][h]);
                let (low2, high2) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
                out[0][h] = _mm256_unpacklo_epi64(low, low2);
                out[1][h] = _mm256_unpackhi_epi64(low, low2);
                out[2][h] = _mm256_unpacklo_epi64(high, high2);
                out[3][h] = _mm256_unpackhi_epi64(high, high2);
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn zip(v: U) -> U {
        unsafe {
            let mut out = v;
            for i in 0..2 {
                let quarter = |h: usize| {
                    if i == 0 {
                        _mm256_castsi256_si128(v[h])
                    } else {
                        _mm256_extracti128_si256::<1>(v[h])
                    }
                };
                let low = _mm256_cvtepu16_epi32(quarter(0));
                let high = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(quarter(1)));
                out[i] = _mm256_or_si256(low, high);
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn narrow(v: [U; 2]) -> U {
        unsafe {
            let mut out = v[0];
            for i in 0..2 {
                let low = _mm256_srli_epi32::<16>(v[i][0]);
                let high = _mm256_srli_epi32::<16>(v[i][1]);
                let halves = _mm256_packus_epi32(low, high);
                out[i] = _mm256_permute4x64_epi64::<0xd8>(halves);
            }
            out
        }
    }
}
