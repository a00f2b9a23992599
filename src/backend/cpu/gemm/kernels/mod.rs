//! The inner kernels: 8 rows by up to 48 columns of C over a range of steps, with what becomes of
//! the sums: they are scaled, get their bias and go to C.
//!
//! For each format there is one kernel for AVX-512, one for AVX2 and one in plain Rust.
//!
//! MXFP4 elements are doubled to integers, -12 .. 12, so that a block multiplies exactly in
//! `vpdpbusd`. That instruction takes one operand without a sign: B is stored plus 12, and `sums`
//! takes back what this adds.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

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
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "vector kernels ask"))]
    pub(in crate::backend::cpu) stream: bool,
}

impl TileOutput<'_> {
    /// The sums as they are, overwritten, `stride` elements from row to row.
    pub(in crate::backend::cpu) fn sums(
        c: *mut f32,
        stride: usize,
        rows: usize,
        columns: usize,
    ) -> Self {
        let (panel_stride, alpha, bias) = (PANEL, 1.0, None);
        Self { c, stride, panel_stride, rows, columns, alpha, bias, add: false, stream: false }
    }
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

/// An f32 operand A that is read where it lies: element (i, k) is `data[i * stride + k * step]`.
/// Rows beyond those of the output repeat the last one.
pub(in crate::backend::cpu) struct Strided<'a> {
    pub(in crate::backend::cpu) data: &'a [f32],
    pub(in crate::backend::cpu) stride: usize,
    pub(in crate::backend::cpu) step: usize,
}

/// Panels of B, `stride` elements from one to the next.
///
/// NOTE: not an array of slices. The compiler copies such arrays 16 bytes at a time right after it
/// wrote them in eights, which waits for all stores before, those to C included: a tenth of an
/// MXFP4 product of 12 blocks. Measured on Zen 4, 2026-11-24.
pub(in crate::backend::cpu) struct Panels<'a, T> {
    pub(in crate::backend::cpu) data: &'a [T],
    pub(in crate::backend::cpu) stride: usize,
}

impl<T> Panels<'_, T> {
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "vector kernels ask"))]
    fn pointer(&self, panel: usize) -> *const T {
        self.data.as_ptr().wrapping_add(panel * self.stride)
    }

    /// (elements / 16, 16)
    fn rows(&self, panel: usize) -> &[[T; PANEL]] {
        self.data[panel * self.stride..].as_chunks().0
    }
}

/// Stores the sums of rows i .. of A (i a multiple of 8) with columns from j (a multiple of 16) on
/// of B, over `steps`.
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
/// The instruction set; A has `steps` steps 16 apart, as have the panels; the caller owns the
/// elements that `to` names.
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
        Isa::Avx2 => unsafe {
            through_tile(isa, to, |out| avx2::bf16(a, b, to.rows, panels, steps, out))
        },
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
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "vector kernels ask"))]
    add_exponents: bool,
}
