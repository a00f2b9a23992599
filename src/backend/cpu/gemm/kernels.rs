//! The inner kernels: 8 rows by up to 48 columns of C over a range of steps, with what becomes of the
//! sums: they are scaled, get their bias and go to C.
//!
//! For each format there is one kernel for AVX-512, one for AVX2 and one in plain Rust.

use std::ops::Range;

use super::pack::ONE;
use super::{BLOCK_STEPS, Format, PANEL, Packed};
use crate::backend::cpu::isa::{Isa, simd_fn};

/// Rows of a tile: 8 x 3 accumulators, 3 words of B and one of A fill the 32 registers.
pub(in crate::backend::cpu) const TILE_ROWS: usize = 8;
/// Columns of a tile: three panels of B.
pub(in crate::backend::cpu) const TILE_COLS: usize = 3 * PANEL;

/// Where the sums of a tile go: element (r, 16 p + l) to `c[r * stride + p * panel_stride + l]`, as
/// `c (+)= alpha * sum + bias[16 p + l]`. Who makes one owns these elements.
pub(in crate::backend::cpu) struct TileOutput<'a> {
    pub(in crate::backend::cpu) c: *mut f32,
    pub(in crate::backend::cpu) stride: usize,
    /// 16, unless every panel of columns lies in a place of its own.
    pub(in crate::backend::cpu) panel_stride: usize,
    /// At most [`TILE_ROWS`] by [`TILE_COLS`]; those beyond are not stored.
    pub(in crate::backend::cpu) rows: usize,
    pub(in crate::backend::cpu) columns: usize,
    pub(in crate::backend::cpu) alpha: f32,
    pub(in crate::backend::cpu) bias: Option<&'a [f32]>,
    pub(in crate::backend::cpu) add: bool,
    /// Whether stores may go past the caches; who asks for it ends with [`fence`].
    pub(in crate::backend::cpu) stream: bool,
}

/// Orders streamed stores before whatever tells other threads of them.
pub(super) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has SSE.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// The sums of one tile, where a kernel does not store them itself.
#[repr(C, align(64))]
struct Tile([[f32; TILE_COLS]; TILE_ROWS]);

/// An f32 operand A that is read where it lies: element (i, k) is `data[i * stride + k * step]`. Rows
/// beyond those of the output repeat the last one.
pub(in crate::backend::cpu) struct Strided<'a> {
    pub(in crate::backend::cpu) data: &'a [f32],
    pub(in crate::backend::cpu) stride: usize,
    pub(in crate::backend::cpu) step: usize,
}

/// Panels of B, `stride` elements from one to the next.
///
/// NOTE: not an array of slices. The compiler copies such arrays 16 bytes at a time right after it
/// wrote them in eights, which waits for all stores before, those to C included: a tenth of an MXFP4
/// product of 12 blocks. Measured on Zen 4, 2026-11-24.
pub(in crate::backend::cpu) struct Panels<'a, T> {
    pub(in crate::backend::cpu) data: &'a [T],
    pub(in crate::backend::cpu) stride: usize,
}

impl<T> Panels<'_, T> {
    fn pointer(&self, panel: usize) -> *const T {
        self.data.as_ptr().wrapping_add(panel * self.stride)
    }

    /// (elements / 16, 16)
    fn rows(&self, panel: usize) -> &[[T; PANEL]] {
        self.data[panel * self.stride..].as_chunks().0
    }
}

/// Stores the sums of rows i .. of A (i a multiple of 8) with columns from j (a multiple of 16) on of
/// B, over `steps`.
///
/// # Safety
/// The caller owns the elements that `to` names.
pub(super) unsafe fn tile(
    isa: Isa,
    a: &Packed<'_>,
    b: &Packed<'_>,
    i: usize,
    j: usize,
    steps: Range<usize>,
    to: &TileOutput<'_>,
) {
    let (length, panels) = (steps.len(), to.columns.div_ceil(PANEL));
    // 8 of the 16 lanes of A's panel, from the first step on.
    let a_at = (i / PANEL * a.steps + steps.start) * PANEL + i % PANEL;
    let a_words = &a.words[a_at..][..length * PANEL - i % PANEL];
    let b_words = &b.words[(j / PANEL * b.steps + steps.start) * PANEL..]
        [..((panels - 1) * b.steps + length) * PANEL];
    let b_stride = b.steps * PANEL;
    // SAFETY of every kernel: the engine's set is available; slices hold `length` steps, or whole
    // blocks (cut above and below); the caller owns the destination.
    match a.format {
        Format::F32 => {
            let a = Strided { data: bytemuck::cast_slice(a_words), stride: 1, step: PANEL };
            let b = Panels { data: bytemuck::cast_slice(b_words), stride: b_stride };
            // SAFETY: see above.
            unsafe { strided_tile(isa, &a, &b, length, to) };
        }
        Format::Bf16 => {
            let b = Panels { data: b_words, stride: b_stride };
            // SAFETY: see above.
            unsafe { bf16_tile(isa, a_words, &b, length, to) };
        }
        Format::Mxfp4 => {
            let first = |vector: usize, steps_of: usize| {
                (vector / PANEL * steps_of + steps.start) / BLOCK_STEPS * PANEL
            };
            let blocks = length / BLOCK_STEPS * PANEL;
            let (lane, a_block) = (i % PANEL, first(i, a.steps));
            let b_stride_scales = b_stride / BLOCK_STEPS;
            let operands = Mxfp4Tile {
                a: a_words,
                a_scales: &a.scales[a_block + lane..][..blocks - lane],
                a_sums: &a.sums[a_block + lane..][..blocks - lane],
                b: Panels { data: b_words, stride: b_stride },
                b_scales: Panels {
                    data: &b.scales[first(j, b.steps)..][..(panels - 1) * b_stride_scales + blocks],
                    stride: b_stride_scales,
                },
                blocks: length / BLOCK_STEPS,
                add_exponents: a.multiply_by_adding(b),
            };
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: see above.
                Isa::Amx | Isa::Avx512 => unsafe { avx512::mxfp4(&operands, panels, to) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: see above.
                Isa::Avx2 => unsafe {
                    through_tile(isa, to, |out| avx2::mxfp4(&operands, panels, out));
                },
                // SAFETY: see above.
                _ => unsafe {
                    through_tile(isa, to, |out| portable::mxfp4(&operands, panels, out))
                },
            }
        }
    }
}

/// Stores the sums of 8 rows of A, pairs of bf16 as [`Packed::words`] has them, with panels of B,
/// (steps, 16) each.
///
/// # Safety
/// The instruction set; A has `steps` steps 16 apart, as have the panels; the caller owns the elements
/// that `to` names.
pub(in crate::backend::cpu) unsafe fn bf16_tile(
    isa: Isa,
    a: &[u32],
    b: &Panels<'_, u32>,
    steps: usize,
    to: &TileOutput<'_>,
) {
    let panels = to.columns.div_ceil(PANEL);
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: passed on.
        Isa::Amx | Isa::Avx512 => unsafe { avx512::bf16(a, b, panels, steps, to) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: passed on.
        Isa::Avx2 => unsafe { through_tile(isa, to, |out| avx2::bf16(a, b, panels, steps, out)) },
        // SAFETY: passed on.
        _ => unsafe {
            through_tile(isa, to, |out| portable::bf16::<false>(a, b, panels, steps, out));
        },
    }
}

/// Stores the sums of 8 strided rows of A with panels of B, (steps, 16) each, in f32.
///
/// # Safety
/// The caller owns the elements that `to` names.
pub(in crate::backend::cpu) unsafe fn strided_tile(
    isa: Isa,
    a: &Strided<'_>,
    b: &Panels<'_, f32>,
    steps: usize,
    to: &TileOutput<'_>,
) {
    let panels = to.columns.div_ceil(PANEL);
    if steps > 0 {
        let last = (to.rows - 1) * a.stride + (steps - 1) * a.step;
        assert!(last < a.data.len() && b.data.len() >= (panels - 1) * b.stride + steps * PANEL);
    }
    // SAFETY of all: the engine's set is available; the last elements read were checked above; the
    // destination is the caller's.
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: see above.
        Isa::Amx | Isa::Avx512 => unsafe { avx512::f32(a, b, panels, steps, to) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: see above.
        Isa::Avx2 => unsafe {
            through_tile(isa, to, |out| avx2::f32(a, b, to.rows, panels, steps, out))
        },
        // SAFETY: see above.
        _ => unsafe {
            through_tile(isa, to, |out| portable::f32::<false>(a, b, to.rows, panels, steps, out));
        },
    }
}

/// Stores what `kernel` leaves in a tile.
///
/// # Safety
/// The caller owns the elements that `to` names.
unsafe fn through_tile(isa: Isa, to: &TileOutput<'_>, kernel: impl FnOnce(&mut Tile)) {
    let mut tile = Tile([[0.0; TILE_COLS]; TILE_ROWS]);
    kernel(&mut tile);
    store_tile(isa, &tile, to);
}

simd_fn! {
    /// The caller owns the elements that `to` names.
    fn store_tile(sums: &Tile, to: &TileOutput<'_>) {
        let alpha = to.alpha;
        for p in 0..to.columns.div_ceil(PANEL) {
            let columns = p * PANEL..((p + 1) * PANEL).min(to.columns);
            for (r, sums) in sums.0.iter().enumerate().take(to.rows) {
                let c = to.c.wrapping_add(r * to.stride + p * to.panel_stride);
                // SAFETY: the caller passes rows and columns of its own.
                let c = unsafe { std::slice::from_raw_parts_mut(c, columns.len()) };
                let sums = &sums[columns.clone()];
                match (to.bias.map(|bias| &bias[columns.clone()]), to.add) {
                    (None, false) => c.iter_mut().zip(sums).for_each(|(c, s)| *c = alpha * s),
                    (None, true) => c.iter_mut().zip(sums).for_each(|(c, s)| *c += alpha * s),
                    (Some(bias), false) => {
                        let terms = c.iter_mut().zip(sums).zip(bias);
                        terms.for_each(|((c, s), b)| *c = alpha * s + b);
                    }
                    (Some(bias), true) => {
                        let terms = c.iter_mut().zip(sums).zip(bias);
                        terms.for_each(|((c, s), b)| *c += alpha * s + b);
                    }
                }
            }
        }
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
    b: Panels<'a, u32>,
    /// (blocks, 16)
    b_scales: Panels<'a, f32>,
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
        b: &Panels<'_, f32>,
        rows: usize,
        panels: usize,
        steps: usize,
        out: &mut Tile,
    ) {
        for p in 0..panels {
            for half in [0, TILE_ROWS / 2] {
                let mut sums = [[0.0f32; PANEL]; TILE_ROWS / 2];
                for (k, b) in b.rows(p)[..steps].iter().enumerate() {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let a = a.data[(half + r).min(rows - 1) * a.stride + k * a.step];
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
        b: &Panels<'_, u32>,
        panels: usize,
        steps: usize,
        out: &mut Tile,
    ) {
        // A bf16 is the upper half of an f32.
        let (even, odd) = (|w: u32| f32::from_bits(w << 16), |w: u32| f32::from_bits(w & !0xffff));
        for p in 0..panels {
            for half in [0, TILE_ROWS / 2] {
                let mut sums = [[0.0f32; PANEL]; TILE_ROWS / 2];
                for (k, b) in b.rows(p)[..steps].iter().enumerate() {
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
            let (b, b_scales) = (t.b.rows(p), t.b_scales.rows(p));
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

/// AVX-512: sums stay in registers and go from there to C.
#[cfg(target_arch = "x86_64")]
mod avx512 {
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
        let packed = a.step == PANEL && a.stride == 1;
        // SAFETY: passed on.
        unsafe {
            match (panels, packed) {
                (1, true) => f32_panels::<1, true>(a, b, steps, to),
                (1, false) => f32_panels::<1, false>(a, b, steps, to),
                (2, true) => f32_panels::<2, true>(a, b, steps, to),
                (2, false) => f32_panels::<2, false>(a, b, steps, to),
                (_, true) => f32_panels::<3, true>(a, b, steps, to),
                (_, false) => f32_panels::<3, false>(a, b, steps, to),
            }
        }
    }

    /// How far ahead of its use a step of B is fetched, in steps.
    const STEPS_AHEAD: usize = 24;

    /// `PACKED`: row r of A is lane r of its panel, which makes every offset a constant.
    #[target_feature(enable = "avx512f")]
    unsafe fn f32_panels<const P: usize, const PACKED: bool>(
        a: &Strided<'_>,
        b: &Panels<'_, f32>,
        steps: usize,
        to: &TileOutput<'_>,
    ) {
        let mut sums = [[_mm512_setzero_ps(); P]; TILE_ROWS];
        let b: [*const f32; P] = std::array::from_fn(|p| b.pointer(p));
        let base = a.data.as_ptr();
        let rows: [usize; TILE_ROWS] = std::array::from_fn(|r| r.min(to.rows - 1) * a.stride);
        for k in 0..steps {
            // SAFETY: k < steps; the caller vouches for the operands' lengths.
            unsafe {
                for b in b {
                    let next = b.wrapping_add((k + STEPS_AHEAD) * PANEL);
                    _mm_prefetch::<_MM_HINT_T0>(next.cast());
                }
                let b: [__m512; P] = std::array::from_fn(|p| _mm512_loadu_ps(b[p].add(k * PANEL)));
                for r in 0..TILE_ROWS {
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
            match panels {
                1 => bf16_panels::<1>(a, b, steps, to),
                2 => bf16_panels::<2>(a, b, steps, to),
                _ => bf16_panels::<3>(a, b, steps, to),
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn bf16_panels<const P: usize>(
        a: &[u32],
        b: &Panels<'_, u32>,
        steps: usize,
        to: &TileOutput<'_>,
    ) {
        let mut sums = [[_mm512_setzero_ps(); P]; TILE_ROWS];
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
                for r in 0..TILE_ROWS {
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
    unsafe fn mxfp4_panels<const P: usize, const ADD: bool>(
        t: &Mxfp4Tile<'_>,
        to: &TileOutput<'_>,
    ) {
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
            let line = |n: usize| n * size_of::<f32>() % 64 == 0;
            let stream =
                to.stream && c.addr() % 64 == 0 && line(to.stride) && line(to.panel_stride);
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
}
