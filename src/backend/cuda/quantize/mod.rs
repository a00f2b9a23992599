//! What the operands of products become: MXFP4 in the form that the chip's products take. What else
//! there is becomes numbers that are multiplied exactly (`values`).
//!
//! An operand is quantized by one kernel, dy for both products by one, transposed where the
//! reduction runs down the columns, so that every product reads both operands along the reduction
//! dimension. A [`Quantization`] says what is made from what; the kernel's name, its launch and its
//! one argument follow from that alone, here and on the processor (`emulator`).
//!
//! dy is read once for both of its forms, along rows for dgrad and transposed for wgrad: one tile
//! in shared memory, one drawing of random bits, and the bias gradient's column sums on the way.
//!
//! The gradient behind GELU or SwiGLU is never stored where both FP8 forms of it are made (groups of
//! 64): the tile is computed from the gradient of what that puts out and the layer's result as it is
//! loaded. Nobody knows its amax then, so the scale is made from every 32nd row, with the room of 8
//! times that which rotating needs in any case. Should a block lie above it even so, a kernel behind
//! does all once more with the scale that the highest one asks for; otherwise it ends at once. The
//! host learns of neither, and the result depends on the gradient alone.

pub(super) mod carrier;
pub(super) mod fp8;
pub(super) mod int8;
pub(super) mod kept;
pub(super) mod random;
pub(super) mod sums;
pub(super) mod values;

use std::ffi::c_void;

use super::Cuda;
use super::device::capture::Redraw;
use super::device::gemm::Type;
use super::device::memory::{Param, Tensor};
use super::{gelu, swiglu};
use crate::backend::Precision;
use crate::formats::{self, Operand, PowerRule, Random, Range, Rounding, Scale};
use carrier::TILE_VECTORS;
use random::{Drawn, Draws};

/// Longest reduction along rows that the row kernels take.
pub(super) const MAX_DEPTH: usize = 1024 * formats::BLOCK;

/// The group of transforms that has kernels of its own.
const OWN_GROUP: usize = 64;

/// A matrix on the device, dense.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub(super) address: u64,
    pub(super) precision: Precision,
}

impl Source {
    pub(super) fn of(tensor: &Tensor) -> Self {
        Self { address: tensor.address(), precision: tensor.precision }
    }

    /// What operands are made from of a parameter.
    pub(super) fn weights(param: &Param<'_>) -> Self {
        let (address, precision) = param.source();
        Self { address, precision }
    }
}

/// Where a form of an operand goes, and in which format: bf16 values, FP8 numbers, MXFP8 or codes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) format: Type,
    pub(super) out: u64,
    /// FP8's one factor, or the scales of blocks; both are written.
    pub(super) scales: u64,
}

/// Which of a source's numbers are quantized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kept {
    AsStored,
    /// What E4M3 with a scale of the tensor holds of them.
    AsE4m3,
    /// What MXFP4 in blocks along rows holds of them, by this rule of the scale, rounded to nearest
    /// in this range.
    AsMxfp4(PowerRule, Range),
}

/// What an operand of MXFP4 products is made from, and its forms. Of FP8 forms E5M2 is made from
/// bf16 alone; E4M3 along rows is rounded to nearest, without a transform; both at once have one
/// format and one factor, groups of at most 64, and a bf16 source.
#[derive(Clone, Copy)]
pub(super) struct Quantization {
    /// (rows, cols).
    pub(super) source: Source,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// The form along rows (rows, cols padded).
    pub(super) by_rows: Option<Target>,
    /// The form down columns, transposed (cols, rows padded).
    pub(super) by_columns: Option<Target>,
    /// Where it is not 0 and there is a form down columns, gets the column sums of every tile of
    /// rows.
    pub(super) sums: u64,
    /// FP8: the address of the bits of the source's largest magnitude.
    pub(super) amax: u64,
    /// FP8: counts blocks whose scale was clamped, because they lie too far below the largest of
    /// their tensor.
    pub(super) clamped: u64,
    /// FP8, down columns: whether the source is first rounded as a forward pass in FP8 keeps it, of
    /// bf16 numbers.
    pub(super) kept: Kept,
    pub(super) rounding: Rounding,
    /// FP8 alone has others than the first.
    pub(super) rule: PowerRule,
    pub(super) range: Range,
    pub(super) drawn: Drawn,
}

/// `Quantize` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Arguments {
    source: u64,
    by_rows: u64,
    by_columns: u64,
    row_scales: u64,
    column_scales: u64,
    sums: u64,
    amax: u64,
    clamped: u64,
    pre: u64,
    attempt: u64,
    rows: u32,
    cols: u32,
    rows_depth: u32,
    depth: u32,
    group: u32,
    each: u32,
    draws: Draws,
    range: f32,
    rounds_up: u32,
    forward_range: f32,
    forward_rounds_up: u32,
}

/// The rule of an operand's scales, where these are powers of two of blocks along the reduction
/// that depend on the largest magnitude alone, and the product on nothing else.
pub(super) fn power_rule(operand: &Operand) -> Option<PowerRule> {
    let format = operand.format();
    if operand.is_corrected() || operand.rounding() == Rounding::ByMean {
        return None;
    }
    match format.scale() {
        Scale::Power(rule @ (PowerRule::Floor | PowerRule::Ceil | PowerRule::Even))
            if format.is_mxfp4() && !format.is_square() =>
        {
            Some(rule)
        }
        _ => None,
    }
}

/// What is added to the bits of an amax before its exponent becomes a scale: [`PowerRule::byte`].
fn rounds_up(rule: PowerRule) -> u32 {
    match rule {
        PowerRule::Ceil => 0x003f_ffff,
        PowerRule::Even => 0x0020_0000,
        _ => 0,
    }
}

/// Grid, threads of a block, and bytes of dynamic shared memory.
#[derive(Clone, Copy)]
pub(super) struct Launch {
    pub(super) grid: [usize; 3],
    pub(super) block: usize,
    pub(super) shared: usize,
}

impl Quantization {
    /// Makes the forms. Of a form down columns the number of parts of the sums is returned, else 0.
    pub(super) fn run(&self, cuda: &Cuda) -> usize {
        let launch = self.launch();
        self.start(cuda, &self.kernel(), launch, self.arguments());
        if self.by_columns.is_some() { launch.grid[1] } else { 0 }
    }

    fn start(&self, cuda: &Cuda, kernel: &str, launch: Launch, arguments: Arguments) {
        let Launch { grid, block, shared } = launch;
        let drawing = Drawing { arguments, drawn: self.drawn };
        cuda.gpu.launch_drawn(kernel, grid, block, shared, drawing);
    }

    /// Lengths of the vectors along rows and down columns, padded to whole groups.
    pub(super) fn depths(&self) -> [usize; 2] {
        let whole = self.drawn.group().max(formats::BLOCK);
        [self.cols, self.rows].map(|n| n.next_multiple_of(whole))
    }

    /// The name of its kernel.
    pub(super) fn kernel(&self) -> String {
        let number = match self.source.precision {
            Precision::F32 => "float",
            Precision::Bf16 => "bf16",
        };
        let format = match self.format() {
            Type::Bf16 => "VALUES",
            Type::E2m1 => "CODES",
            Type::Mxfp8 => "MXFP8",
            Type::E4m3 => "E4M3",
            Type::E5m2 => "E5M2",
            Type::F32 | Type::Int8 | Type::Int32 => {
                unreachable!("an operand of MXFP4 products")
            }
        };
        let group = if self.has_own_group() { OWN_GROUP } else { 0 };
        let kept = match self.kept {
            Kept::AsStored => "AS_STORED",
            Kept::AsE4m3 => "AS_E4M3",
            Kept::AsMxfp4(..) => "AS_MXFP4",
        };
        let unbiased = self.rounding == Rounding::Unbiased;
        match (self.by_rows, self.by_columns, self.is_fp8()) {
            (Some(_), Some(_), true) => format!("quantize_fp8_both<{group},{unbiased}>"),
            (Some(_), None, true) => {
                format!("quantize_fp8_rows<{group},{number},{format},{unbiased}>")
            }
            (None, _, true) => {
                format!("quantize_fp8_columns<{group},{number},{format},{kept},{unbiased}>")
            }
            (Some(_), Some(_), false) => format!("quantize_both<{format},{unbiased}>"),
            (Some(_), None, false) => format!("quantize_rows<{number},{format},{unbiased}>"),
            (None, _, false) => format!("quantize_columns<{number},{format},{unbiased}>"),
        }
    }

    /// Of its forms.
    fn format(&self) -> Type {
        self.by_rows.or(self.by_columns).expect("an operand has a form").format
    }

    fn is_fp8(&self) -> bool {
        matches!(self.format(), Type::E4m3 | Type::E5m2)
    }

    fn has_own_group(&self) -> bool {
        self.drawn.group() == OWN_GROUP && !matches!(self.kept, Kept::AsMxfp4(..))
    }

    pub(super) fn launch(&self) -> Launch {
        let Self { rows, cols, source: Source { precision, .. }, .. } = *self;
        let ([rows_depth, depth], group) = (self.depths(), self.drawn.group());
        let (format, fp8) = (self.format(), self.is_fp8());
        // Scales in tiles are written for as many vectors as these hold.
        let covered = |n: usize| match format {
            Type::Mxfp8 => n.next_multiple_of(TILE_VECTORS),
            _ => n,
        };
        if self.by_columns.is_none() && !(fp8 && self.has_own_group()) {
            let blocks = rows_depth / formats::BLOCK;
            let each = rows_at_once(blocks);
            let grid = [covered(rows).div_ceil(each), 1, 1];
            return Launch { grid, block: (each * blocks).next_multiple_of(32), shared: 0 };
        }
        if fp8 {
            let cols = if self.by_rows.is_some() { rows_depth } else { cols };
            let rows = if self.by_columns.is_some() { depth } else { rows };
            return tiles(precision, cols, rows, group, self.has_own_group());
        }
        let (columns, block) = match precision {
            Precision::Bf16 => (TILE_COLUMNS, 256),
            Precision::F32 => (TILE_COLUMNS / 2, 128),
        };
        let (tile_rows, tile_columns) = tile(group, columns);
        let columns = match (self.by_rows, format) {
            (Some(_), Type::E2m1) => rows_depth,
            _ => covered(cols),
        };
        let grid = [columns.div_ceil(tile_columns), depth.div_ceil(tile_rows), 1];
        Launch { grid, block, shared: 0 }
    }

    pub(super) fn arguments(&self) -> Arguments {
        let [rows_depth, depth] = self.depths();
        let addresses = |target: Option<Target>| target.map_or((0, 0), |to| (to.out, to.scales));
        let (by_rows, row_scales) = addresses(self.by_rows);
        let (by_columns, column_scales) = addresses(self.by_columns);
        let (forward_rule, forward_range) = match self.kept {
            Kept::AsMxfp4(rule, range) => (rule, range),
            Kept::AsStored | Kept::AsE4m3 => (PowerRule::Floor, Range::Full),
        };
        Arguments {
            source: self.source.address,
            by_rows,
            by_columns,
            row_scales,
            column_scales,
            sums: self.sums,
            amax: self.amax,
            clamped: self.clamped,
            pre: 0,
            attempt: 0,
            rows: self.rows as u32,
            cols: self.cols as u32,
            rows_depth: rows_depth as u32,
            depth: depth as u32,
            group: self.drawn.group() as u32,
            each: rows_at_once(rows_depth / formats::BLOCK) as u32,
            draws: self.drawn.draws(),
            range: self.range.factor(),
            rounds_up: rounds_up(self.rule),
            forward_range: forward_range.factor(),
            forward_rounds_up: rounds_up(forward_rule),
        }
    }
}

/// What a layer's result passes through, by whose gradient its own is made as it is quantized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Made {
    /// d gelu'(pre), in GELU's tanh form.
    Gelu,
    /// Of pre = [gate | up], d being half as wide.
    SwiGlu,
}

/// Both FP8 forms of the gradient behind an activation of bf16 numbers, without storing the gradient
/// itself. Its scale is made from a sample; where that leaves no room for a block, all is done once
/// more.
pub(super) struct Behind {
    pub(super) made: Made,
    /// Of d, with the rows and columns of `pre`, and a transform and a rule of the scale that
    /// [`Behind::takes`].
    pub(super) both: Quantization,
    pub(super) pre: u64,
    /// `Attempt` of the kernels: zeroed words.
    pub(super) attempt: u64,
}

impl Behind {
    /// Of an attempt.
    pub(super) const WORDS: u64 = 3;

    pub(super) fn takes(operand: &Operand) -> bool {
        operand.transform().is_some_and(|transform| transform.group() == OWN_GROUP)
            && power_rule(operand) == Some(PowerRule::Floor)
    }

    /// All of it. The number of parts of the sums is returned.
    pub(super) fn run(&self, cuda: &Cuda) -> usize {
        self.sample(cuda);
        let parts = self.quantize(cuda);
        self.requantize(cuda);
        parts
    }

    pub(super) fn kernel(&self, again: bool) -> String {
        let (made, unbiased) = (self.made, self.both.rounding == Rounding::Unbiased);
        format!("quantize_fp8_behind<{OWN_GROUP},{made:?},{again},{unbiased}>")
    }

    pub(super) fn arguments(&self) -> Arguments {
        Arguments { pre: self.pre, attempt: self.attempt, ..self.both.arguments() }
    }

    pub(super) fn sample(&self, cuda: &Cuda) {
        let Quantization { source: Source { address: d, .. }, rows, cols, .. } = self.both;
        let (amax, pre) = (self.attempt, self.pre);
        match self.made {
            Made::Gelu => gelu::sample_gradient(cuda, amax, d, pre, (rows, cols)),
            Made::SwiGlu => swiglu::sample_gradient(cuda, amax, d, pre, (rows, cols / 2)),
        }
    }

    pub(super) fn quantize(&self, cuda: &Cuda) -> usize {
        let launch = self.both.launch();
        self.both.start(cuda, &self.kernel(false), launch, self.arguments());
        launch.grid[1]
    }

    /// In any case: the host does not know whether there is anything to do.
    pub(super) fn requantize(&self, cuda: &Cuda) {
        // As many as run at once: there is hardly ever anything to do, and every block has to be
        // started.
        let at_once = 4 * cuda.gpu.multiprocessors as usize;
        let launch = self.both.launch();
        let [x, y, _] = launch.grid;
        let launch = Launch { grid: [(x * y).min(at_once), 1, 1], ..launch };
        self.both.start(cuda, &self.kernel(true), launch, self.arguments());
    }
}

/// A kernel's argument, with what its random numbers are drawn for.
struct Drawing {
    arguments: Arguments,
    drawn: Drawn,
}

impl Redraw for Drawing {
    fn redraw(&mut self, [step, micro_step]: [u32; 2]) {
        self.drawn.random = Random { step, micro_step, ..self.drawn.random };
        self.arguments.draws = self.drawn.draws();
    }

    fn argument(&mut self) -> *mut c_void {
        std::ptr::from_mut(&mut self.arguments).cast()
    }
}

// ---- Launches ----

/// Rows that a thread block of the row kernels takes: the fewest that make whole warps of threads,
/// some 96 to 192 of them.
fn rows_at_once(blocks: usize) -> usize {
    let mut rows = (32 >> blocks.trailing_zeros().min(5)).max(1);
    while rows > 1 && rows * blocks > 256 {
        rows = rows.div_ceil(2);
    }
    while 2 * rows * blocks <= 128 && 2 * rows <= 63 {
        rows *= 2;
    }
    rows
}

/// Columns of a tile of the bf16 and FP8 kernels.
const TILE_COLUMNS: usize = 64;

/// Rows and columns of a tile of the column kernels.
fn tile(group: usize, columns: usize) -> (usize, usize) {
    if group == 256 { (256, columns / 2) } else { (128, columns) }
}

/// How the tile kernels of FP8 numbers are launched, for a source of this precision that tiles
/// cover in `cols` columns and `rows` rows; `own` are those of [`OWN_GROUP`].
fn tiles(precision: Precision, cols: usize, rows: usize, group: usize, own: bool) -> Launch {
    // Lines of 64 numbers, each 32 of them shifted by at most 64 bytes: the source, then random
    // bits.
    let lines_of = |size, lines| lines * (64 * size + 16) + lines / 32 * 64;
    let lines_of = |lines| lines_of(precision.size(), lines) + lines_of(2, lines);
    if own {
        let grid = [cols.div_ceil(group), rows.div_ceil(group), 1];
        return Launch { grid, block: 2 * group, shared: lines_of(group) + 3 * 8 * 36 };
    }
    let (tile_rows, tile_cols) = tile(group, TILE_COLUMNS);
    let lines = 128;
    Launch {
        grid: [cols.div_ceil(tile_cols), rows.div_ceil(tile_rows), 1],
        block: 2 * lines,
        // Then signs.
        shared: lines_of(lines) + 8 * 256 + 8 * 36,
    }
}
