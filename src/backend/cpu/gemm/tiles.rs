//! AMX: products of tiles, 16 x 16 sums of 32 bf16 products each in one instruction.
//!
//! Operands lie as the instruction reads them, a square of 16 x 16 words after the other: B as in a
//! panel, 16 steps of 16 lanes; A with its 16 lanes as rows. MXFP4 is multiplied as bf16 too: an
//! element times its scale is a bf16 number, and the product of two is exact in f32.
//!
//! NOTE: a K of 64 bytes on integer tiles was thought of: it would need scales within a block of
//! two alike, and a pass over C for every 64.
//!
//! Operands whose scales are NaN or too far out for bf16 are packed again, in panels. Sums run
//! element by element here, not block by block, so the last bits of a product differ from those of
//! other sets; codes never do. Tile registers are asked of Linux once for the process, loaded by
//! each job and released at its end; `MXT_CPU_ISA=avx512` does without.
//!
//! Jobs are shaped for the second-level cache: tiles outrun everything behind it.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::{PANEL, Packed, SharedOutput, TileOutput};

/// Steps of a square, and words of a row of it.
pub(in crate::backend::cpu) const SQUARE: usize = 16;

/// Rows and columns of C that the inner kernel computes: 2 x 2 tiles.
pub(in crate::backend::cpu) const SIDE: usize = 2 * SQUARE;

/// Steps that one pass over C takes. Panels of A then leave the first-level cache, which costs less
/// than another pass: 512 was 8% to 14% slower where there are as many. Measured as below.
const STEPS_PER_PASS: usize = 1024;

/// Words of B that a job reads in one pass, at most: 1.25 MiB, which stay in a second-level cache
/// of 2 MiB while all rows of the job pass by.
///
/// NOTE: tiles outrun the third-level cache by far. Jobs of 192 columns, which read A twice to
/// eight times as often, made steps 5% longer. Measured on a Xeon with AMX, 2026-11-24.
const WORDS_OF_B: usize = 320 << 10;

/// Rows and columns of C of one job, where C has `columns` and operands have `steps`.
pub(super) fn job_shape(columns: usize, steps: usize) -> (usize, usize) {
    let most = WORDS_OF_B / steps.min(STEPS_PER_PASS);
    let jobs = columns.div_ceil(most);
    (4 * SIDE, columns.div_ceil(jobs).next_multiple_of(SIDE))
}

/// Bytes of a square, and of one of its rows.
const SQUARE_BYTES: usize = SQUARE * ROW_BYTES;
const ROW_BYTES: usize = 4 * SQUARE;

/// The sums of 2 x 2 tiles.
#[repr(C, align(64))]
struct Sums([[f32; SIDE]; SIDE]);

/// Where 2 x 2 tiles of sums lie: two of the first panel of A, then two of the second.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Quad {
    pub(in crate::backend::cpu) squares: [*mut f32; 4],
    /// Elements from row to row of a square.
    pub(in crate::backend::cpu) stride: usize,
}

impl Quad {
    /// Squares beside and below each other.
    pub(in crate::backend::cpu) fn of(first: *mut f32, stride: usize) -> Self {
        let squares = [0, SQUARE, SQUARE * stride, SQUARE * stride + SQUARE];
        Self { squares: squares.map(|at| first.wrapping_add(at)), stride }
    }
}

/// [`Tiles::multiply`], which begins in one of two ways. B, which streams by, is asked for
/// two squares ahead; that gains 7%.
macro_rules! products {
    (($a:expr, $b:expr, $squares:expr, $to:expr), $($begin:literal,)*) => {
        asm!(
            $($begin,)*
            "test {n}, {n}",
            "jz 3f",
            "2:",
            "tileloadd tmm4, [{a0} + {row}]",
            "tileloadd tmm6, [{b0} + {row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            ".irp at, 2048, 2112, 2176, 2240, 2304, 2368, 2432, 2496",
            "prefetcht0 [{b0} + \\at]",
            "prefetcht0 [{b0} + \\at + 512]",
            ".endr",
            "tileloadd tmm7, [{b1} + {row}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            ".irp at, 2048, 2112, 2176, 2240, 2304, 2368, 2432, 2496",
            "prefetcht0 [{b1} + \\at]",
            "prefetcht0 [{b1} + \\at + 512]",
            ".endr",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, {square}",
            "add {a1}, {square}",
            "add {b0}, {square}",
            "add {b1}, {square}",
            "dec {n}",
            "jnz 2b",
            "3:",
            "tilestored [{to0} + {to_row}], tmm0",
            "tilestored [{to1} + {to_row}], tmm1",
            "tilestored [{to2} + {to_row}], tmm2",
            "tilestored [{to3} + {to_row}], tmm3",
            a0 = inout(reg) $a[0] => _,
            a1 = inout(reg) $a[1] => _,
            b0 = inout(reg) $b[0] => _,
            b1 = inout(reg) $b[1] => _,
            n = inout(reg) $squares => _,
            row = in(reg) ROW_BYTES,
            square = const SQUARE_BYTES,
            to0 = in(reg) $to.squares[0],
            to1 = in(reg) $to.squares[1],
            to2 = in(reg) $to.squares[2],
            to3 = in(reg) $to.squares[3],
            to_row = in(reg) 4 * $to.stride,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// The tile registers of this thread, configured as 8 squares for as long as this lives.
pub(in crate::backend::cpu) struct Tiles;

impl Tiles {
    /// # Safety
    /// The process may use AMX.
    pub(in crate::backend::cpu) unsafe fn configure() -> Self {
        #[repr(C, align(64))]
        struct Configuration {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        configuration.row_bytes[..8].fill(ROW_BYTES as u16);
        configuration.rows[..8].fill(SQUARE as u8);
        // SAFETY: passed on; the instruction reads these 64 bytes.
        unsafe {
            asm!(
                "ldtilecfg [{}]", in(reg) &configuration,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            );
        }
        Self
    }

    /// The sums of two panels of A with two of B, which `to` is overwritten with, or which are
    /// added to it.
    ///
    /// # Safety
    /// All panels hold that many squares, and `to` its four.
    pub(in crate::backend::cpu) unsafe fn multiply<const ADDS: bool>(
        &self,
        a: [*const u32; 2],
        b: [*const u32; 2],
        squares: usize,
        to: Quad,
    ) {
        // SAFETY: tiles are configured (self exists); the caller vouches for the memory.
        unsafe {
            if ADDS {
                products!(
                    (a, b, squares, to),
                    "tileloadd tmm0, [{to0} + {to_row}]",
                    "tileloadd tmm1, [{to1} + {to_row}]",
                    "tileloadd tmm2, [{to2} + {to_row}]",
                    "tileloadd tmm3, [{to3} + {to_row}]",
                );
            } else {
                products!(
                    (a, b, squares, to),
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                );
            }
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // The thread then carries no tiles from one context switch to the next.
        // SAFETY: AMX is available, for `configure` ran.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nomem, nostack, preserves_flags),
            );
        }
    }
}

/// Computes some rows and columns of C, operands in tiles; both ranges start at multiples of 16.
///
/// # Safety
/// The process may use AMX. The rectangle lies within C and nothing else accesses it meanwhile.
pub(super) unsafe fn rectangle(
    a: &Packed<'_>,
    b: &Packed<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
    out: &SharedOutput<'_>,
) {
    // SAFETY: passed on.
    let tiles = unsafe { Tiles::configure() };
    let mut sums = Sums([[0.0; SIDE]; SIDE]);
    for s0 in (0..a.steps).step_by(STEPS_PER_PASS) {
        let steps = (a.steps - s0).min(STEPS_PER_PASS);
        let add = out.accumulate || s0 > 0;
        let bias = out.bias.filter(|_| s0 + steps == a.steps);
        for i in rows.clone().step_by(SIDE) {
            let down = (rows.end - i).min(SIDE);
            let a_panels = panels(a, i, down, s0, steps);
            for j in columns.clone().step_by(SIDE) {
                let across = (columns.end - j).min(SIDE);
                let b_panels = panels(b, j, across, s0, steps);
                // SAFETY: the panels were cut to `steps`, whole squares. Rows i .. i + down and
                // columns j .. j + across lie in the rectangle.
                unsafe {
                    let to = sums.0.as_mut_ptr().cast();
                    tiles.multiply::<false>(a_panels, b_panels, steps / SQUARE, Quad::of(to, SIDE));
                    let c = out.c.add(i * out.stride + j);
                    let bias = bias.map(|bias| &bias[j..j + across]);
                    let to = TileOutput::sums(c, out.stride, down, across);
                    store(&sums, &TileOutput { alpha: out.alpha, bias, add, ..to });
                }
            }
        }
    }
}

/// Stores the first rows and columns of the sums.
///
/// # Safety
/// AVX-512; the caller owns the destination.
#[target_feature(enable = "avx512f")]
unsafe fn store(sums: &Sums, to: &TileOutput<'_>) {
    let TileOutput { rows, columns, .. } = *to;
    let alpha = _mm512_set1_ps(to.alpha);
    for j in (0..columns).step_by(SQUARE) {
        let mask = (0xffff_u32 >> SQUARE.saturating_sub(columns - j)) as u16;
        let bias = match to.bias {
            // SAFETY: the mask leaves what the slice holds from j on.
            Some(bias) => unsafe { _mm512_maskz_loadu_ps(mask, bias[j..].as_ptr()) },
            None => _mm512_setzero_ps(),
        };
        for (r, sums) in sums.0[..rows].iter().enumerate() {
            // SAFETY: 16 sums; the mask leaves elements that the caller owns.
            unsafe {
                let c = to.c.add(r * to.stride + j);
                let mut v = _mm512_mul_ps(alpha, _mm512_load_ps(sums[j..].as_ptr()));
                if to.bias.is_some() {
                    v = _mm512_add_ps(v, bias);
                }
                if to.add {
                    v = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, c), v);
                }
                _mm512_mask_storeu_ps(c, mask, v);
            }
        }
    }
}

/// Steps s0 .. s0 + steps of the panels of vectors i .. i + count; where there is one, twice.
fn panels(from: &Packed<'_>, i: usize, count: usize, s0: usize, steps: usize) -> [*const u32; 2] {
    let last = count.div_ceil(PANEL) - 1;
    [0, last].map(|p| {
        let start = ((i / PANEL + p) * from.steps + s0) * PANEL;
        from.words[start..][..steps * PANEL].as_ptr()
    })
}
