//! AVX-512: sums stay in registers and go from there to C.

use std::arch::x86_64::*;

use super::*;

/// # Safety
/// AVX-512 F; A's elements and `steps` words of each panel are readable; the caller owns `to`.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn f32(
    a: &Strided<'_>,
    b: &Panels<'_, f32>,
    panels: usize,
    steps: usize,
    to: &TileOutput<'_>,
) {
    // SAFETY: passed on.
    unsafe {
        match to.rows {
            1 => f32_rows::<1>(a, b, panels, steps, to),
            2..=4 => f32_rows::<4>(a, b, panels, steps, to),
            _ => f32_rows::<TILE_ROWS>(a, b, panels, steps, to),
        }
    }
}

/// `R`: rows that are computed. NOTE: one row alone is what a token takes where a text is written; all
/// eight would be eight times the arithmetic beside the same words of B, which then are not read as
/// fast as memory gives them.
#[target_feature(enable = "avx512f")]
unsafe fn f32_rows<const R: usize>(
    a: &Strided<'_>,
    b: &Panels<'_, f32>,
    panels: usize,
    steps: usize,
    to: &TileOutput<'_>,
) {
    let packed = a.step == PANEL && a.stride == 1;
    // SAFETY: passed on.
    unsafe {
        match (panels, packed) {
            (1, true) => f32_panels::<1, R, true>(a, b, steps, to),
            (1, false) => f32_panels::<1, R, false>(a, b, steps, to),
            (2, true) => f32_panels::<2, R, true>(a, b, steps, to),
            (2, false) => f32_panels::<2, R, false>(a, b, steps, to),
            (_, true) => f32_panels::<3, R, true>(a, b, steps, to),
            (_, false) => f32_panels::<3, R, false>(a, b, steps, to),
        }
    }
}

/// How far ahead of its use a step of B is fetched, in steps.
const STEPS_AHEAD: usize = 24;

/// `PACKED`: row r of A is lane r of its panel, which makes every offset a constant.
#[target_feature(enable = "avx512f")]
unsafe fn f32_panels<const P: usize, const R: usize, const PACKED: bool>(
    a: &Strided<'_>,
    b: &Panels<'_, f32>,
    steps: usize,
    to: &TileOutput<'_>,
) {
    let mut sums = [[_mm512_setzero_ps(); P]; R];
    let b: [*const f32; P] = std::array::from_fn(|p| b.pointer(p));
    let base = a.data.as_ptr();
    let rows: [usize; R] = std::array::from_fn(|r| r.min(to.rows - 1) * a.stride);
    for k in 0..steps {
        // SAFETY: k < steps; the caller vouches for the operands' lengths.
        unsafe {
            for b in b {
                let next = b.wrapping_add((k + STEPS_AHEAD) * PANEL);
                _mm_prefetch::<_MM_HINT_T0>(next.cast());
            }
            let b: [__m512; P] = std::array::from_fn(|p| _mm512_loadu_ps(b[p].add(k * PANEL)));
            for r in 0..R {
                let at = if PACKED { k * PANEL + r } else { rows[r] + k * a.step };
                let a = _mm512_set1_ps(*base.add(at));
                for p in 0..P {
                    sums[r][p] = _mm512_fmadd_ps(a, b[p], sums[r][p]);
                }
            }
        }
    }
    // SAFETY: passed on.
    unsafe { store(&sums, 0, to) };
}

/// # Safety
/// AVX-512 F and BF16; the operands hold `steps` steps; the caller owns `to`.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn bf16(
    a: &[u32],
    b: &Panels<'_, u32>,
    panels: usize,
    steps: usize,
    to: &TileOutput<'_>,
) {
    // SAFETY: passed on.
    unsafe {
        match to.rows {
            1 => bf16_rows::<1>(a, b, panels, steps, to),
            2..=4 => bf16_rows::<4>(a, b, panels, steps, to),
            _ => bf16_rows::<TILE_ROWS>(a, b, panels, steps, to),
        }
    }
}

/// `R` as in [`f32_rows`].
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn bf16_rows<const R: usize>(
    a: &[u32],
    b: &Panels<'_, u32>,
    panels: usize,
    steps: usize,
    to: &TileOutput<'_>,
) {
    // SAFETY: passed on.
    unsafe {
        match panels {
            1 => bf16_panels::<1, R>(a, b, steps, to),
            2 => bf16_panels::<2, R>(a, b, steps, to),
            _ => bf16_panels::<3, R>(a, b, steps, to),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn bf16_panels<const P: usize, const R: usize>(
    a: &[u32],
    b: &Panels<'_, u32>,
    steps: usize,
    to: &TileOutput<'_>,
) {
    let mut sums = [[_mm512_setzero_ps(); P]; R];
    let (a, b): (_, [*const u32; P]) = (a.as_ptr(), std::array::from_fn(|p| b.pointer(p)));
    for k in 0..steps {
        // SAFETY: k < steps; a vector of bf16 pairs has the size of one of words.
        unsafe {
            for b in b {
                let next = b.wrapping_add((k + STEPS_AHEAD) * PANEL);
                _mm_prefetch::<_MM_HINT_T0>(next.cast());
            }
            let b: [__m512bh; P] = std::array::from_fn(|p| {
                std::mem::transmute(_mm512_loadu_si512(b[p].add(k * PANEL).cast()))
            });
            for r in 0..R {
                let a = _mm512_set1_epi32(*a.add(k * PANEL + r) as i32);
                let a: __m512bh = std::mem::transmute(a);
                for p in 0..P {
                    sums[r][p] = _mm512_dpbf16_ps(sums[r][p], a, b[p]);
                }
            }
        }
    }
    // SAFETY: passed on.
    unsafe { store(&sums, 0, to) };
}

/// # Safety
/// AVX-512 F and VNNI; the operands hold their blocks; the caller owns `to`.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) unsafe fn mxfp4(t: &Mxfp4Tile<'_>, panels: usize, to: &TileOutput<'_>) {
    // SAFETY: passed on.
    unsafe {
        match (panels, t.add_exponents) {
            (1, true) => mxfp4_panels::<1, true>(t, to),
            (1, false) => mxfp4_panels::<1, false>(t, to),
            (2, true) => mxfp4_panels::<2, true>(t, to),
            (2, false) => mxfp4_panels::<2, false>(t, to),
            (_, true) => mxfp4_panels::<3, true>(t, to),
            (_, false) => mxfp4_panels::<3, false>(t, to),
        }
    }
}

/// Rows of an MXFP4 tile that are computed together: 4 x 3 sums in integers and as many in f32
/// take 24 registers.
///
/// NOTE: all 8 rows at once, with 24 integer sums in registers and the f32 sums in the first-level
/// cache, ran at 57% of the peak of `vpdpbusd`, this at 88%: 24 stores of 64 bytes a block are more
/// than they look, at two cycles each. 8 rows by one panel are as fast. Measured on Zen 4,
/// 2026-11-24.
const MXFP4_ROWS: usize = TILE_ROWS / 2;

/// NOTE: dot products and multiplications share two execution units, so every multiplication
/// that ends a block costs: adding exponents instead gains a tenth.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn mxfp4_panels<const P: usize, const ADD: bool>(t: &Mxfp4Tile<'_>, to: &TileOutput<'_>) {
    let b: [*const u32; P] = std::array::from_fn(|p| t.b.pointer(p));
    let b_scales: [*const f32; P] = std::array::from_fn(|p| t.b_scales.pointer(p));
    for first in (0..TILE_ROWS).step_by(MXFP4_ROWS) {
        let mut sums = [[_mm512_setzero_ps(); P]; MXFP4_ROWS];
        for block in 0..t.blocks {
            // SAFETY: block < blocks; all slices were cut to whole blocks; lanes first .. first + 4
            // are in A's panel.
            unsafe {
                let at = block * PANEL + first;
                let mut dots = [[_mm512_setzero_si512(); P]; MXFP4_ROWS];
                for r in 0..MXFP4_ROWS {
                    dots[r] = [_mm512_set1_epi32(*t.a_sums.as_ptr().add(at + r)); P];
                }
                for step in block * BLOCK_STEPS..(block + 1) * BLOCK_STEPS {
                    let mut words = [_mm512_setzero_si512(); P];
                    for p in 0..P {
                        words[p] = _mm512_loadu_si512(b[p].add(step * PANEL).cast());
                        let next = b[p].wrapping_add((step + STEPS_AHEAD) * PANEL);
                        _mm_prefetch::<_MM_HINT_T0>(next.cast());
                    }
                    for r in 0..MXFP4_ROWS {
                        let a = *t.a.as_ptr().add(step * PANEL + first + r) as i32;
                        let a = _mm512_set1_epi32(a);
                        for p in 0..P {
                            dots[r][p] = _mm512_dpbusd_epi32(dots[r][p], words[p], a);
                        }
                    }
                }
                let mut scales = [_mm512_setzero_ps(); P];
                for p in 0..P {
                    scales[p] = _mm512_loadu_ps(b_scales[p].add(block * PANEL));
                }
                for r in 0..MXFP4_ROWS {
                    let a_word = *t.a_scales.as_ptr().add(at + r).cast::<i32>();
                    let mut a_scale = _mm512_set1_epi32(a_word);
                    if !ADD {
                        a_scale = _mm512_add_epi32(a_scale, _mm512_set1_epi32(ONE as i32));
                    }
                    for p in 0..P {
                        let scale = if ADD {
                            let b_scale = _mm512_castps_si512(scales[p]);
                            _mm512_castsi512_ps(_mm512_add_epi32(a_scale, b_scale))
                        } else {
                            _mm512_mul_ps(_mm512_castsi512_ps(a_scale), scales[p])
                        };
                        // The product is exact (integers of 14 bits by powers of two), so fusing
                        // it changes nothing.
                        let dot = _mm512_cvtepi32_ps(dots[r][p]);
                        sums[r][p] = _mm512_fmadd_ps(dot, scale, sums[r][p]);
                    }
                }
            }
        }
        // SAFETY: passed on.
        unsafe { store(&sums, first, to) };
    }
}

/// Stores the sums of rows `first ..` of a tile, as far as it has rows and columns.
///
/// NOTE: inlined, with bounds known at compile time, or else all sums pass through the stack, which
/// cost bf16 a tenth at 192 steps.
///
/// # Safety
/// AVX-512 F; the caller owns the destination.
#[inline(always)]
unsafe fn store<const P: usize, const R: usize>(
    sums: &[[__m512; P]; R],
    first: usize,
    to: &TileOutput<'_>,
) {
    // SAFETY: passed on; masks leave lanes beyond the columns alone, and the bias has as many
    // elements as C has columns.
    unsafe {
        let alpha = _mm512_set1_ps(to.alpha);
        let (mut masks, mut bias) = ([0; P], [_mm512_setzero_ps(); P]);
        for p in 0..P {
            let columns = to.columns.saturating_sub(p * PANEL).min(PANEL);
            masks[p] = ((1u32 << columns) - 1) as __mmask16;
            if let Some(b) = to.bias {
                bias[p] = _mm512_maskz_loadu_ps(masks[p], b.as_ptr().wrapping_add(p * PANEL));
            }
        }
        let c = to.c.wrapping_add(first * to.stride);
        let whole = to.rows >= first + R && to.columns == P * PANEL && !to.add;
        let line = |n: usize| (n * size_of::<f32>()).is_multiple_of(64);
        let stream =
            to.stream && c.addr().is_multiple_of(64) && line(to.stride) && line(to.panel_stride);
        if whole {
            for r in 0..R {
                for p in 0..P {
                    let c = c.wrapping_add(r * to.stride + p * to.panel_stride);
                    let mut v = _mm512_mul_ps(alpha, sums[r][p]);
                    if to.bias.is_some() {
                        v = _mm512_add_ps(v, bias[p]);
                    }
                    if stream { _mm512_stream_ps(c, v) } else { _mm512_storeu_ps(c, v) }
                }
            }
            return;
        }
        for r in 0..R {
            if first + r >= to.rows {
                break;
            }
            for p in 0..P {
                let c = c.wrapping_add(r * to.stride + p * to.panel_stride);
                let mut v = _mm512_mul_ps(alpha, sums[r][p]);
                if to.bias.is_some() {
                    v = _mm512_add_ps(v, bias[p]);
                }
                if to.add {
                    v = _mm512_add_ps(_mm512_maskz_loadu_ps(masks[p], c), v);
                }
                _mm512_mask_storeu_ps(c, masks[p], v);
            }
        }
    }
}
