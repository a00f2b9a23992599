//! AVX2: 4 rows by one panel at a time, 8 accumulators of the 16 registers.

use std::arch::x86_64::*;

use super::*;

const ROWS: usize = TILE_ROWS / 2;

/// The plain loop becomes the same code that intrinsics would.
#[target_feature(enable = "avx2,fma")]
pub(super) fn f32(
    a: &Strided<'_>,
    b: &Panels<'_, f32>,
    rows: usize,
    panels: usize,
    steps: usize,
    out: &mut Tile,
) {
    portable::f32::<true>(a, b, rows, panels, steps, out);
}

/// A bf16 is the upper half of an f32: both halves of a word are multiplied as f32.
///
/// # Safety
/// AVX2 and FMA; the operands hold `steps` steps.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn bf16(
    a: &[u32],
    b: &Panels<'_, u32>,
    rows: usize,
    panels: usize,
    steps: usize,
    out: &mut Tile,
) {
    let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    for p in 0..panels {
        for first in [0, ROWS].into_iter().take_while(|first| *first < rows) {
            let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
            for k in 0..steps {
                // SAFETY: k < steps; lanes first .. first + 4 are in A's panel.
                unsafe {
                    let b = b.pointer(p).add(k * PANEL);
                    let words = [loadu(b), loadu(b.add(8))];
                    for r in 0..ROWS {
                        let a = *a.as_ptr().add(k * PANEL + first + r) as i32;
                        let a = _mm256_set1_epi32(a);
                        let even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a));
                        let odd = _mm256_castsi256_ps(_mm256_and_si256(a, upper));
                        for h in 0..2 {
                            let b_odd = _mm256_castsi256_ps(_mm256_and_si256(words[h], upper));
                            let b_even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words[h]));
                            let sum = _mm256_fmadd_ps(odd, b_odd, sums[r][h]);
                            sums[r][h] = _mm256_fmadd_ps(even, b_even, sum);
                        }
                    }
                }
            }
            store(&sums, first, p, out);
        }
    }
}

/// `maddubs` sums pairs of products in 16 bits: at most 2 x 24 x 12 = 576 a step, 4,608 a block.
///
/// # Safety
/// AVX2 and FMA; the operands hold their blocks.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn mxfp4(t: &Mxfp4Tile<'_>, panels: usize, out: &mut Tile) {
    let ones = _mm256_set1_epi16(1);
    for p in 0..panels {
        for first in [0, ROWS] {
            let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
            for block in 0..t.blocks {
                let mut pairs = [[_mm256_setzero_si256(); 2]; ROWS];
                // SAFETY: block < blocks; all slices were cut to whole blocks.
                unsafe {
                    for step in block * BLOCK_STEPS..(block + 1) * BLOCK_STEPS {
                        let b = t.b.pointer(p).add(step * PANEL);
                        let words = [loadu(b), loadu(b.add(8))];
                        for r in 0..ROWS {
                            let a = *t.a.as_ptr().add(step * PANEL + first + r) as i32;
                            let a = _mm256_set1_epi32(a);
                            for h in 0..2 {
                                let products = _mm256_maddubs_epi16(words[h], a);
                                pairs[r][h] = _mm256_add_epi16(pairs[r][h], products);
                            }
                        }
                    }
                    let b_scales = t.b_scales.pointer(p).add(block * PANEL);
                    let b_scales = [_mm256_loadu_ps(b_scales), _mm256_loadu_ps(b_scales.add(8))];
                    for r in 0..ROWS {
                        let at = block * PANEL + first + r;
                        let a_scale = (*t.a_scales.as_ptr().add(at)).to_bits();
                        let a_scale = f32::from_bits(a_scale.wrapping_add(ONE));
                        let a_scale = _mm256_set1_ps(a_scale);
                        let a_sum = _mm256_set1_epi32(*t.a_sums.as_ptr().add(at));
                        for h in 0..2 {
                            let dot = _mm256_madd_epi16(pairs[r][h], ones);
                            let dot = _mm256_cvtepi32_ps(_mm256_add_epi32(dot, a_sum));
                            let scale = _mm256_mul_ps(a_scale, b_scales[h]);
                            sums[r][h] = _mm256_fmadd_ps(dot, scale, sums[r][h]);
                        }
                    }
                }
            }
            store(&sums, first, p, out);
        }
    }
}

/// # Safety
/// Eight words are readable.
#[target_feature(enable = "avx2")]
unsafe fn loadu(from: *const u32) -> __m256i {
    // SAFETY: passed on.
    unsafe { _mm256_loadu_si256(from.cast()) }
}

#[target_feature(enable = "avx2")]
fn store(sums: &[[__m256; 2]; ROWS], first: usize, panel: usize, out: &mut Tile) {
    for (row, sums) in out.0[first..].iter_mut().zip(sums) {
        for (h, sum) in sums.iter().enumerate() {
            let to = &mut row[panel * PANEL + 8 * h..][..8];
            // SAFETY: eight elements.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), *sum) };
        }
    }
}
