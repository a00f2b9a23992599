//! The inner kernels: 8 rows by up to 48 columns of C over a range of steps.
//!
//! For each format there is one kernel for AVX-512, one for AVX2 and one in plain Rust.

use std::ops::Range;

use super::pack::ONE;
use super::{BLOCK_STEPS, Format, PANEL, Packed};
use crate::backend::cpu::isa::Isa;

/// Rows of a tile: 8 x 3 accumulators, 3 words of B and one of A fill the 32 registers.
pub(in crate::backend::cpu) const TILE_ROWS: usize = 8;
/// Columns of a tile: three panels of B.
pub(in crate::backend::cpu) const TILE_COLS: usize = 3 * PANEL;

/// The sums of one tile; a kernel overwrites all rows and the columns of its panels.
#[repr(C, align(64))]
pub(in crate::backend::cpu) struct Tile([[f32; TILE_COLS]; TILE_ROWS]);

impl Default for Tile {
    fn default() -> Self {
        Self([[0.0; TILE_COLS]; TILE_ROWS])
    }
}

impl Tile {
    /// (8, 48)
    pub(in crate::backend::cpu) fn sums(&self) -> &[f32] {
        self.0.as_flattened()
    }
}

/// An f32 operand A that is read where it lies: element (i, k) is `data[rows[i] + k * step]`.
pub(in crate::backend::cpu) struct Strided<'a> {
    pub(in crate::backend::cpu) data: &'a [f32],
    pub(in crate::backend::cpu) rows: [usize; TILE_ROWS],
    pub(in crate::backend::cpu) step: usize,
}

/// Sums of rows i .. i + 8 of A (i a multiple of 8) with `panels` panels of B from column j (a
/// multiple of 16), over `steps`.
pub(super) fn tile(
    isa: Isa,
    a: &Packed<'_>,
    b: &Packed<'_>,
    i: usize,
    j: usize,
    panels: usize,
    steps: Range<usize>,
    out: &mut Tile,
) {
    let length = steps.len();
    // 8 of the 16 lanes of A's panel, from the first step on.
    let a_at = (i / PANEL * a.steps + steps.start) * PANEL + i % PANEL;
    let a_words = &a.words[a_at..][..length * PANEL - i % PANEL];
    let b_panel = |p: usize| {
        // A tile of fewer than three panels repeats its last one, which nobody reads.
        let panel = j / PANEL + p.min(panels - 1);
        &b.words[(panel * b.steps + steps.start) * PANEL..][..length * PANEL]
    };
    let b_words = [b_panel(0), b_panel(1), b_panel(2)];
    match a.format {
        Format::F32 => {
            let a = Strided {
                data: bytemuck::cast_slice(a_words),
                rows: std::array::from_fn(|r| r),
                step: PANEL,
            };
            strided_tile(isa, &a, b_words.map(bytemuck::cast_slice), panels, length, out);
        }
        Format::Bf16 => match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the engine's set is available; slices hold `length` steps (cut above).
            Isa::Amx | Isa::Avx512 => unsafe {
                avx512::bf16(a_words, b_words, panels, length, out)
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the engine's set is available.
            Isa::Avx2 => unsafe { avx2::bf16(a_words, b_words, panels, length, out) },
            _ => portable::bf16::<false>(a_words, b_words, panels, length, out),
        },
        Format::Mxfp4 => {
            let block = |panel: usize, steps_of: usize| {
                (panel * steps_of + steps.start) / BLOCK_STEPS * PANEL
            };
            let blocks = length / BLOCK_STEPS * PANEL;
            let lane = i % PANEL;
            let a_block = block(i / PANEL, a.steps);
            let operands = Mxfp4Tile {
                a: a_words,
                a_scales: &a.scales[a_block + lane..][..blocks - lane],
                a_sums: &a.sums[a_block + lane..][..blocks - lane],
                b: b_words,
                b_scales: std::array::from_fn(|p| {
                    &b.scales[block(j / PANEL + p.min(panels - 1), b.steps)..][..blocks]
                }),
                blocks: length / BLOCK_STEPS,
                add_exponents: a.multiply_by_adding(b),
            };
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the engine's set is available; slices hold whole blocks (cut above).
                Isa::Amx | Isa::Avx512 => unsafe { avx512::mxfp4(&operands, panels, out) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the engine's set is available.
                Isa::Avx2 => unsafe { avx2::mxfp4(&operands, panels, out) },
                _ => portable::mxfp4(&operands, panels, out),
            }
        }
    }
}

/// Sums of 8 strided rows of A with `panels` panels of B, (steps, 16) each, in f32.
pub(in crate::backend::cpu) fn strided_tile(
    isa: Isa,
    a: &Strided<'_>,
    b: [&[f32]; 3],
    panels: usize,
    steps: usize,
    out: &mut Tile,
) {
    if steps > 0 {
        let last = a.rows.iter().max().map_or(0, |row| row + (steps - 1) * a.step);
        assert!(last < a.data.len() && b.iter().all(|b| b.len() >= steps * PANEL));
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the engine's set is available; the last elements read were checked above.
        Isa::Amx | Isa::Avx512 => unsafe { avx512::f32(a, b, panels, steps, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the engine's set is available.
        Isa::Avx2 => unsafe { avx2::f32(a, b, panels, steps, out) },
        _ => portable::f32::<false>(a, b, panels, steps, out),
    }
}

/// The operands of an MXFP4 tile.
///
/// A's bytes are signed; B's are B + 12, unsigned, as the dot-product instruction wants them. The
/// sum over (b + 12) a is 12 sum(a) too large, which `a_sums` takes back.
struct Mxfp4Tile<'a> {
    /// (steps, 16), from the tile's first lane on.
    a: &'a [u32],
    /// (blocks, 16), from the tile's first lane on.
    a_scales: &'a [f32],
    a_sums: &'a [i32],
    /// (steps, 16)
    b: [&'a [u32]; 3],
    /// (blocks, 16)
    b_scales: [&'a [f32]; 3],
    blocks: usize,
    /// See `Packed::multiply_by_adding`.
    add_exponents: bool,
}

/// Plain Rust; `FMA` says that fused multiply-adds are one instruction.
mod portable {
    use super::*;

    #[inline(always)]
    fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
        if FMA { a.mul_add(b, c) } else { a * b + c }
    }

    /// One panel at a time: 8 x 16 sums fit the registers of AVX2 about as well as anything.
    #[inline(always)]
    pub(super) fn f32<const FMA: bool>(
        a: &Strided<'_>,
        b: [&[f32]; 3],
        panels: usize,
        steps: usize,
        out: &mut Tile,
    ) {
        for p in 0..panels {
            for half in [0, TILE_ROWS / 2] {
                let mut sums = [[0.0f32; PANEL]; TILE_ROWS / 2];
                for (k, b) in b[p].as_chunks::<PANEL>().0[..steps].iter().enumerate() {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let a = a.data[a.rows[half + r] + k * a.step];
                        for l in 0..PANEL {
                            sums[l] = multiply_add::<FMA>(a, b[l], sums[l]);
                        }
                    }
                }
                for (r, sums) in sums.iter().enumerate() {
                    out.0[half + r][p * PANEL..][..PANEL].copy_from_slice(sums);
                }
            }
        }
    }

    #[inline(always)]
    pub(super) fn bf16<const FMA: bool>(
        a: &[u32],
        b: [&[u32]; 3],
        panels: usize,
        steps: usize,
        out: &mut Tile,
    ) {
        // A bf16 is the upper half of an f32.
        let (even, odd) = (|w: u32| f32::from_bits(w << 16), |w: u32| f32::from_bits(w & !0xffff));
        for p in 0..panels {
            for half in [0, TILE_ROWS / 2] {
                let mut sums = [[0.0f32; PANEL]; TILE_ROWS / 2];
                for (k, b) in b[p].as_chunks::<PANEL>().0[..steps].iter().enumerate() {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let a = a[k * PANEL + half + r];
                        for l in 0..PANEL {
                            let sum = multiply_add::<FMA>(odd(a), odd(b[l]), sums[l]);
                            sums[l] = multiply_add::<FMA>(even(a), even(b[l]), sum);
                        }
                    }
                }
                for (r, sums) in sums.iter().enumerate() {
                    out.0[half + r][p * PANEL..][..PANEL].copy_from_slice(sums);
                }
            }
        }
    }

    #[inline(always)]
    pub(super) fn mxfp4(t: &Mxfp4Tile<'_>, panels: usize, out: &mut Tile) {
        for p in 0..panels {
            let b = t.b[p].as_chunks::<PANEL>().0;
            let b_scales = t.b_scales[p].as_chunks::<PANEL>().0;
            for r in 0..TILE_ROWS {
                let mut sums = [0.0f32; PANEL];
                for block in 0..t.blocks {
                    let mut dots = [t.a_sums[block * PANEL + r]; PANEL];
                    for step in block * BLOCK_STEPS..(block + 1) * BLOCK_STEPS {
                        let a = t.a[step * PANEL + r].to_le_bytes().map(|v| i32::from(v as i8));
                        for l in 0..PANEL {
                            let b = b[step][l];
                            let byte = |i: u32| (b >> (8 * i) & 255) as i32;
                            dots[l] += a[0] * byte(0) + a[1] * byte(1);
                            dots[l] += a[2] * byte(2) + a[3] * byte(3);
                        }
                    }
                    let a_scale = t.a_scales[block * PANEL + r].to_bits();
                    let a_scale = f32::from_bits(a_scale.wrapping_add(ONE));
                    for l in 0..PANEL {
                        sums[l] += dots[l] as f32 * (a_scale * b_scales[block][l]);
                    }
                }
                out.0[r][p * PANEL..][..PANEL].copy_from_slice(&sums);
            }
        }
    }
}

/// AVX2: 4 rows by one panel at a time, 8 accumulators of the 16 registers.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::*;

    const ROWS: usize = TILE_ROWS / 2;

    /// The plain loop becomes the same code that intrinsics would.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn f32(
        a: &Strided<'_>,
        b: [&[f32]; 3],
        panels: usize,
        steps: usize,
        out: &mut Tile,
    ) {
        portable::f32::<true>(a, b, panels, steps, out);
    }

    /// A bf16 is the upper half of an f32: both halves of a word are multiplied as f32.
    ///
    /// # Safety
    /// AVX2 and FMA; the operands hold `steps` steps.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn bf16(
        a: &[u32],
        b: [&[u32]; 3],
        panels: usize,
        steps: usize,
        out: &mut Tile,
    ) {
        let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        for p in 0..panels {
            for first in [0, ROWS] {
                let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
                for k in 0..steps {
                    // SAFETY: k < steps; lanes first .. first + 4 are in A's panel.
                    unsafe {
                        let b = b[p].as_ptr().add(k * PANEL);
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
                            let b = t.b[p].as_ptr().add(step * PANEL);
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
                        let b_scales = t.b_scales[p].as_ptr().add(block * PANEL);
                        let b_scales =
                            [_mm256_loadu_ps(b_scales), _mm256_loadu_ps(b_scales.add(8))];
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
}

/// AVX-512: 24 accumulators stay in registers.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::*;

    /// # Safety
    /// AVX-512 F; A's elements and `steps` words of each panel are readable.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn f32(
        a: &Strided<'_>,
        b: [&[f32]; 3],
        panels: usize,
        steps: usize,
        out: &mut Tile,
    ) {
        let packed = a.step == PANEL && a.rows == std::array::from_fn(|r| r);
        // SAFETY: passed on.
        unsafe {
            match (panels, packed) {
                (1, true) => f32_panels::<1, true>(a, b, steps, out),
                (1, false) => f32_panels::<1, false>(a, b, steps, out),
                (2, true) => f32_panels::<2, true>(a, b, steps, out),
                (2, false) => f32_panels::<2, false>(a, b, steps, out),
                (_, true) => f32_panels::<3, true>(a, b, steps, out),
                (_, false) => f32_panels::<3, false>(a, b, steps, out),
            }
        }
    }

    /// `PACKED`: row r of A is lane r of its panel, which makes every offset a constant.
    #[target_feature(enable = "avx512f")]
    unsafe fn f32_panels<const P: usize, const PACKED: bool>(
        a: &Strided<'_>,
        b: [&[f32]; 3],
        steps: usize,
        out: &mut Tile,
    ) {
        let mut sums = [[_mm512_setzero_ps(); P]; TILE_ROWS];
        let b: [*const f32; P] = std::array::from_fn(|p| b[p].as_ptr());
        let base = a.data.as_ptr();
        for k in 0..steps {
            // SAFETY: k < steps; the caller vouches for the operands' lengths.
            unsafe {
                for b in b {
                    let next = b.wrapping_add((k + STEPS_AHEAD) * PANEL);
                    _mm_prefetch::<_MM_HINT_T0>(next.cast());
                }
                let b: [__m512; P] = std::array::from_fn(|p| _mm512_loadu_ps(b[p].add(k * PANEL)));
                for r in 0..TILE_ROWS {
                    let at = if PACKED { k * PANEL + r } else { a.rows[r] + k * a.step };
                    let a = _mm512_set1_ps(*base.add(at));
                    for p in 0..P {
                        sums[r][p] = _mm512_fmadd_ps(a, b[p], sums[r][p]);
                    }
                }
            }
        }
        store(&sums, out);
    }

    /// # Safety
    /// AVX-512 F and BF16; the operands hold `steps` steps.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn bf16(
        a: &[u32],
        b: [&[u32]; 3],
        panels: usize,
        steps: usize,
        out: &mut Tile,
    ) {
        // SAFETY: passed on.
        unsafe {
            match panels {
                1 => bf16_panels::<1>(a, b, steps, out),
                2 => bf16_panels::<2>(a, b, steps, out),
                _ => bf16_panels::<3>(a, b, steps, out),
            }
        }
    }

    /// How far ahead of its use a step of B is fetched, in steps.
    const STEPS_AHEAD: usize = 24;

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn bf16_panels<const P: usize>(a: &[u32], b: [&[u32]; 3], steps: usize, out: &mut Tile) {
        let mut sums = [[_mm512_setzero_ps(); P]; TILE_ROWS];
        let (a, b): (_, [*const u32; P]) = (a.as_ptr(), std::array::from_fn(|p| b[p].as_ptr()));
        for k in 0..steps {
            // SAFETY: k < steps; a vector of bf16 pairs has the size of one of words.
            unsafe {
                let b: [__m512bh; P] = std::array::from_fn(|p| {
                    std::mem::transmute(_mm512_loadu_si512(b[p].add(k * PANEL).cast()))
                });
                for r in 0..TILE_ROWS {
                    let a = _mm512_set1_epi32(*a.add(k * PANEL + r) as i32);
                    let a: __m512bh = std::mem::transmute(a);
                    for p in 0..P {
                        sums[r][p] = _mm512_dpbf16_ps(sums[r][p], a, b[p]);
                    }
                }
            }
        }
        store(&sums, out);
    }

    /// # Safety
    /// AVX-512 F and VNNI; the operands hold their blocks.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn mxfp4(t: &Mxfp4Tile<'_>, panels: usize, out: &mut Tile) {
        // SAFETY: passed on.
        unsafe {
            match (panels, t.add_exponents) {
                (1, true) => mxfp4_panels::<1, true>(t, out),
                (1, false) => mxfp4_panels::<1, false>(t, out),
                (2, true) => mxfp4_panels::<2, true>(t, out),
                (2, false) => mxfp4_panels::<2, false>(t, out),
                (_, true) => mxfp4_panels::<3, true>(t, out),
                (_, false) => mxfp4_panels::<3, false>(t, out),
            }
        }
    }

    /// The integer accumulators take the registers; the f32 sums stay in the tile, in the
    /// first-level cache, which one block of 8 steps easily hides.
    ///
    /// NOTE: dot products and multiplications share two execution units, so every multiplication
    /// that ends a block costs: adding exponents instead gains a tenth.
    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn mxfp4_panels<const P: usize, const ADD: bool>(t: &Mxfp4Tile<'_>, out: &mut Tile) {
        // SAFETY: passed on; the first block overwrites the tile, the others add to it.
        unsafe {
            mxfp4_blocks::<P, ADD, true>(t, 0..t.blocks.min(1), out);
            mxfp4_blocks::<P, ADD, false>(t, 1..t.blocks, out);
        }
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn mxfp4_blocks<const P: usize, const ADD: bool, const FIRST: bool>(
        t: &Mxfp4Tile<'_>,
        blocks: Range<usize>,
        out: &mut Tile,
    ) {
        let b: [*const u32; P] = std::array::from_fn(|p| t.b[p].as_ptr());
        let b_scales: [*const f32; P] = std::array::from_fn(|p| t.b_scales[p].as_ptr());
        for block in blocks {
            // SAFETY: block < blocks; all slices were cut to whole blocks.
            unsafe {
                let mut dots = [[_mm512_setzero_si512(); P]; TILE_ROWS];
                for r in 0..TILE_ROWS {
                    dots[r] = [_mm512_set1_epi32(*t.a_sums.as_ptr().add(block * PANEL + r)); P];
                }
                for step in block * BLOCK_STEPS..(block + 1) * BLOCK_STEPS {
                    let mut words = [_mm512_setzero_si512(); P];
                    for p in 0..P {
                        words[p] = _mm512_loadu_si512(b[p].add(step * PANEL).cast());
                    }
                    for r in 0..TILE_ROWS {
                        let a = _mm512_set1_epi32(*t.a.as_ptr().add(step * PANEL + r) as i32);
                        for p in 0..P {
                            dots[r][p] = _mm512_dpbusd_epi32(dots[r][p], words[p], a);
                        }
                    }
                }
                let mut scales = [_mm512_setzero_ps(); P];
                for p in 0..P {
                    scales[p] = _mm512_loadu_ps(b_scales[p].add(block * PANEL));
                }
                for r in 0..TILE_ROWS {
                    let a_word = *t.a_scales.as_ptr().add(block * PANEL + r).cast::<i32>();
                    let mut a_scale = _mm512_set1_epi32(a_word);
                    if !ADD {
                        a_scale = _mm512_add_epi32(a_scale, _mm512_set1_epi32(ONE as i32));
                    }
                    for p in 0..P {
                        let sum = out.0[r].as_mut_ptr().add(p * PANEL);
                        // The product is exact (integers of 14 bits by powers of two), so fusing
                        // it changes nothing.
                        let scale = if ADD {
                            let b_scale = _mm512_castps_si512(scales[p]);
                            _mm512_castsi512_ps(_mm512_add_epi32(a_scale, b_scale))
                        } else {
                            _mm512_mul_ps(_mm512_castsi512_ps(a_scale), scales[p])
                        };
                        let dot = _mm512_cvtepi32_ps(dots[r][p]);
                        // NOTE: volatile, or else the compiler keeps a second copy of all sums on
                        // the stack and stores each of them twice a block.
                        let new = if FIRST {
                            _mm512_mul_ps(dot, scale)
                        } else {
                            let old = sum.cast::<__m512>().read_volatile();
                            _mm512_fmadd_ps(dot, scale, old)
                        };
                        _mm512_store_ps(sum, new);
                    }
                }
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    fn store<const P: usize>(sums: &[[__m512; P]; TILE_ROWS], out: &mut Tile) {
        for (row, sums) in out.0.iter_mut().zip(sums) {
            for (p, sum) in sums.iter().enumerate() {
                // SAFETY: a row holds three panels of 16.
                unsafe { _mm512_storeu_ps(row[p * PANEL..][..PANEL].as_mut_ptr(), *sum) };
            }
        }
    }
}
