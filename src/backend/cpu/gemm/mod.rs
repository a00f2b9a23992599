//! C (m, n) = A (m, k) B (n, k)^T for operands in f32, bf16 or MXFP4.
//!
//! Operands are packed first: 16 vectors of an operand make a *panel*, stored step after step, and
//! every step is one 32-bit word for each of the 16 lanes:
//!
//! | format | one word holds | step |
//! | --- | --- | --- |
//! | f32 | one element | 1 of the reduction dimension |
//! | bf16 | two elements | 2 |
//! | MXFP4 | four doubled elements, -12 .. 12, bytes in the order 0 2 1 3 | 4; scales lie beside |
//!
//! The inner kernel computes 8 x 48 elements of C: it broadcasts words of A and multiplies them
//! with one to three panels of B. With AMX, bf16 and MXFP4 lie in tiles instead (see `tiles`):
//! squares of 16 words by 16 lanes, two bf16 numbers a word, which MXFP4 elements times their
//! scales are. Every element of C is summed in the order of its steps, whatever the tiling, so
//! results do not depend on the number of threads. A kernel stores its sums itself, past the caches
//! where C is large.

mod kernels;
mod pack;
#[cfg(target_arch = "x86_64")]
pub(super) mod tiles;

pub(super) use kernels::{
    Panels, Strided, TILE_COLS, TILE_ROWS, TileOutput, bf16_tile, strided_tile,
};
pub use pack::{Conversion, Matrix, PackedMut, Quantization, pack};
pub(super) use pack::{Layout, PackMemory, PackSize, pack_bf16, pack_f32, pack_in};

#[cfg(test)]
pub(super) use pack::{unpack_mxfp4, unpack_tiles};

use super::Cpu;
use super::isa::Isa;
use crate::formats::{self, Element};

/// Vectors in a panel: the lanes of an AVX-512 register.
pub const PANEL: usize = 16;

/// Steps of MXFP4 in a block of 32 elements.
pub const BLOCK_STEPS: usize = 8;

/// Steps that one pass over the tiles takes. The operands of a job are then 640 KiB, which a
/// second-level cache of 1 MiB holds. A multiple of [`BLOCK_STEPS`].
///
/// NOTE: 192, which keeps three panels of B in a first-level cache of 48 KiB, was a tenth slower
/// for all formats: C is read and written more often. Measured on Zen 5, 2026-11-24.
const STEPS_PER_PASS: usize = 512;

/// Rows and columns of C that one job computes, operands in panels.
const JOB_ROWS: usize = 128;
const JOB_COLS: usize = 4 * TILE_COLS;

/// Elements of C from which on it is stored past the caches, 1 MiB. Memory is then written without
/// being read first, and caches keep the operands.
///
/// NOTE: storing as usual, bf16 ran at 78% to 88% of its peak and MXFP4 at 65% to 73%, for 85% to
/// 95% and 71% to 82%; a training step took 4% to 10% longer. Measured on Zen 4, 2026-11-24.
const STREAM_FROM: usize = 1 << 18;

/// Number format of a GEMM's operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// f32.
    F32,
    /// bf16, rounded to nearest even.
    Bf16,
    /// MXFP4.
    Mxfp4,
}

impl Format {
    /// The one that holds the operands of a format exactly. E4M3 values are bf16 values, too.
    pub fn carrying(format: formats::Format) -> Self {
        match format.element() {
            Element::F32 => Self::F32,
            _ if format == formats::Format::MXFP4 => Self::Mxfp4,
            _ => Self::Bf16,
        }
    }
}

/// How packed operands lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Words of each format's own kind.
    Panels,
    /// Squares of pairs of bf16, for AMX: bf16 and MXFP4.
    Tiles,
}

impl Packing {
    /// The faster one of an instruction set.
    pub fn best(isa: Isa, format: Format) -> Self {
        if isa == Isa::Amx && format != Format::F32 { Self::Tiles } else { Self::Panels }
    }

    /// Steps of a reduction dimension of `depth` elements.
    pub fn steps(self, format: Format, depth: usize) -> usize {
        match (self, format) {
            (Self::Tiles, _) => depth.div_ceil(2).next_multiple_of(PANEL),
            (Self::Panels, Format::F32) => depth,
            (Self::Panels, Format::Bf16) => depth.div_ceil(2),
            (Self::Panels, Format::Mxfp4) => depth.div_ceil(formats::BLOCK) * BLOCK_STEPS,
        }
    }
}

/// Which operand of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The first, whose vectors are rows of C.
    A,
    /// The second, whose vectors are columns of C.
    B,
}

/// A packed operand.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    /// Of all elements.
    pub format: Format,
    /// Of the words.
    pub packing: Packing,
    /// Vectors that hold data; the rest of the last panel is zero.
    pub rows: usize,
    /// Steps of the (padded) reduction dimension.
    pub steps: usize,
    /// (panels, steps, 16); operand A in tiles: (panels, steps / 16, 16 lanes, 16 steps)
    pub words: &'a [u32],
    /// MXFP4 in panels: half of each block's scale, (panels, steps / 8, 16). For operand A the bits
    /// of 1.0 are subtracted from the bits, so that adding the bits of one scale of each operand
    /// multiplies.
    pub scales: &'a [f32],
    /// MXFP4 in panels, operand A: -12 times the sum of each block's doubled elements,
    /// (panels, steps / 8, 16).
    pub sums: &'a [i32],
    /// MXFP4: the smallest and the largest scale byte, 255 for NaN.
    pub scale_bytes: (u32, u32),
}

impl Packed<'_> {
    /// Whether half of every scale, and every product of two of them, is a normal f32, so that
    /// adding exponents multiplies them. With bytes a and b the product is 2^(a + b - 256).
    fn multiply_by_adding(&self, other: &Self) -> bool {
        let ((min_a, max_a), (min_b, max_b)) = (self.scale_bytes, other.scale_bytes);
        let normal = min_a >= 2 && min_b >= 2 && max_a < 255 && max_b < 255;
        normal && min_a + min_b >= 130 && max_a + max_b <= 383
    }

    /// Whether tiles multiply these operands as they are. MXFP4 operands need that every element
    /// times its scale is a normal bf16 number, as tiles take others for zero; so is every product
    /// of two; and no sum on the way, of up to 2^20 products below 2^102, overflows where the whole
    /// one does not.
    fn exact_in_tiles(&self, other: &Self) -> bool {
        let in_range = || self.scale_bytes.1 + other.scale_bytes.1 <= 350;
        self.format != Format::Mxfp4 || (self.multiply_by_adding(other) && in_range())
    }
}

/// Where the result goes: `c[i * stride + j] (+)= alpha * sum + bias[j]`.
pub struct Output<'a> {
    /// C, `stride` elements from row to row.
    pub c: &'a mut [f32],
    /// Elements between rows of C.
    pub stride: usize,
    /// Factor of the sum.
    pub alpha: f32,
    /// Added to each row, (n).
    pub bias: Option<&'a [f32]>,
    /// Whether C is added to, or overwritten.
    pub accumulate: bool,
}

impl Cpu {
    /// C (a.rows, b.rows) = alpha A B^T + bias, parallel over tiles of C.
    pub fn gemm(&self, a: Packed<'_>, b: Packed<'_>, out: Output<'_>) {
        let kind = |p: &Packed<'_>| (p.format, p.packing, p.steps);
        assert_eq!(kind(&a), kind(&b), "operands are packed alike");
        let takes_tiles = a.packing == Packing::Panels || self.isa() == Isa::Amx;
        assert!(takes_tiles, "tiles are multiplied by AMX alone");
        let (m, n) = (a.rows, b.rows);
        assert!(out.stride >= n && out.c.len() >= (m - 1) * out.stride + n, "C holds the result");
        let (job_rows, job_cols) = match a.packing {
            // Of few rows it takes as long as B does to be read, and one that ends late is waited for.
            Packing::Panels if m <= TILE_ROWS => (JOB_ROWS, TILE_COLS),
            Packing::Panels => (JOB_ROWS, JOB_COLS),
            #[cfg(target_arch = "x86_64")]
            Packing::Tiles => tiles::job_shape(n, a.steps),
            #[cfg(not(target_arch = "x86_64"))]
            Packing::Tiles => unreachable!("no other processor has AMX"),
        };
        let (down, across) = (m.div_ceil(job_rows), n.div_ceil(job_cols));
        let c = SharedOutput {
            c: out.c.as_mut_ptr(),
            stride: out.stride,
            alpha: out.alpha,
            bias: out.bias,
            accumulate: out.accumulate,
            stream: m * n >= STREAM_FROM,
        };
        self.parallel(down * across, |job| {
            // Neighbouring jobs share the panels of B, which are the larger part.
            let (i0, j0) = (job % down * job_rows, job / down * job_cols);
            let (i1, j1) = ((i0 + job_rows).min(m), (j0 + job_cols).min(n));
            // SAFETY: jobs cover disjoint rectangles of C, each within its bounds (asserted above).
            // Tiles are multiplied where there is AMX (asserted, too).
            unsafe {
                match a.packing {
                    Packing::Panels => rectangle(self.isa(), &a, &b, (i0, i1), (j0, j1), &c),
                    #[cfg(target_arch = "x86_64")]
                    Packing::Tiles => tiles::rectangle(&a, &b, i0..i1, j0..j1, &c),
                    #[cfg(not(target_arch = "x86_64"))]
                    Packing::Tiles => unreachable!("no other processor has AMX"),
                }
            }
        });
    }

    /// [`Cpu::gemm`] of two operands that are packed here: in the faster way, unless MXFP4 products
    /// are not exact in it.
    pub fn product(
        &self,
        [a, b]: [(&Matrix<'_>, Conversion<'_>); 2],
        (mut a_memory, mut b_memory): (PackedMut<'_>, PackedMut<'_>),
        out: Output<'_>,
    ) {
        let packed_a = pack(self, a.0, a.1, Role::A, a_memory.reborrow());
        let packed_b = pack(self, b.0, b.1, Role::B, b_memory.reborrow());
        if packed_a.packing == Packing::Panels || packed_a.exact_in_tiles(&packed_b) {
            return self.gemm(packed_a, packed_b, out);
        }
        let a = pack_in(Packing::Panels, self, a.0, a.1, Role::A, a_memory);
        let b = pack_in(Packing::Panels, self, b.0, b.1, Role::B, b_memory);
        self.gemm(a, b, out);
    }
}

/// An [`Output`] that threads share; they write disjoint parts.
struct SharedOutput<'a> {
    c: *mut f32,
    stride: usize,
    alpha: f32,
    bias: Option<&'a [f32]>,
    accumulate: bool,
    /// See [`STREAM_FROM`].
    stream: bool,
}

// SAFETY: `rectangle`'s callers hand out disjoint parts of C.
unsafe impl Sync for SharedOutput<'_> {}

/// Computes rows i0..i1, columns j0..j1 of C.
///
/// # Safety
/// The rectangle lies within C and nothing else accesses it meanwhile.
unsafe fn rectangle(
    isa: Isa,
    a: &Packed<'_>,
    b: &Packed<'_>,
    (i0, i1): (usize, usize),
    (j0, j1): (usize, usize),
    out: &SharedOutput<'_>,
) {
    for s0 in (0..a.steps).step_by(STEPS_PER_PASS) {
        let s1 = (s0 + STEPS_PER_PASS).min(a.steps);
        let bias = out.bias.filter(|_| s1 == a.steps);
        for j in (j0..j1).step_by(TILE_COLS) {
            let columns = (j1 - j).min(TILE_COLS);
            for i in (i0..i1).step_by(TILE_ROWS) {
                let c = out.c.wrapping_add(i * out.stride + j);
                let to = TileOutput {
                    alpha: out.alpha,
                    bias: bias.map(|bias| &bias[j..j + columns]),
                    add: out.accumulate || s0 > 0,
                    // What a later pass reads again had better stay.
                    stream: out.stream && s1 == a.steps,
                    ..TileOutput::sums(c, out.stride, (i1 - i).min(TILE_ROWS), columns)
                };
                // SAFETY: these rows and columns lie in the rectangle.
                unsafe { kernels::tile(isa, a, b, i, j, s0..s1, &to) };
            }
        }
    }
    if out.stream {
        kernels::fence();
    }
}
