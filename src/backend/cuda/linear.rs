//! The linear layers of a block: y = x W^T + b and its backward pass, in the formats of a recipe.
//!
//! MXFP4 operands are quantized by one kernel each, dy for both products by one, transposed where the
//! reduction runs down the columns, so that every MXFP4 GEMM reads both operands along the reduction
//! dimension.

use super::device::gemm::{Operand, Type};
use super::device::launch;
use super::device::memory::{F32, Param, Tensor, size_of_element};
use super::device::recordings::{self, Drawn};
use super::quantize::carrier::{self, Road};
use super::{Cuda, Product, Workspace, gelu, kernel};
use crate::backend::{Activation, LinearShape, Precision};
use crate::mx::{self, Draw, GemmId, OperandId, Random, Rounding};
use crate::recipe::{Backward, Forward, LinearRecipe, Mxfp4, Signs, Transform};

/// Threads of a block.
const BLOCK: usize = 256;

/// y (rows, outputs) = x (rows, inputs) W (outputs, inputs)^T + b, and with `gelu` that form of it
/// of y.
pub(super) fn forward(
    cuda: &Cuda,
    workspace: &Workspace,
    y: &mut Tensor,
    gelu: Option<(&mut Tensor, Activation)>,
    x: &Tensor,
    w: &Param,
    b: &Param,
    shape: LinearShape,
    format: Forward,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    let precision = x.precision;
    let (mut operands, mut scales) = ([precision.into(); 2], None);
    let (x, w) = if format == Forward::Fp8 {
        let master = Source { address: w.master.address(), precision: Precision::F32 };
        let weights = workspace.operands[1].address;
        let most = w.most.address;
        if cuda.multiplies_fp8(shape) {
            let (bytes, most_of_x) =
                (workspace.kept.address, largest_magnitude(cuda, workspace, 1, x));
            let source = Source { address: x.address(), precision };
            let factors = [0, 1].map(|i| workspace.scales[i].address);
            convert_to_e4m3(cuda, bytes, factors[0], source, most_of_x, rows * inputs);
            convert_to_e4m3(cuda, weights, factors[1], master, most, outputs * inputs);
            (operands, scales) = ([Type::E4m3; 2], Some(factors));
            (bytes, weights)
        } else {
            let kept_most = workspace.most[2].address;
            round_to_fp8(cuda, weights, kept_most, master, most, outputs * inputs);
            (keep_as_fp8(cuda, workspace, x, rows * inputs).0, weights)
        }
    } else {
        (x.address(), w.as_read_in(precision))
    };
    let product = Product {
        m: rows,
        n: outputs,
        k: inputs,
        operands,
        a: Operand::rows(x, inputs),
        b: Operand::rows(w, inputs),
        c: y.address(),
        c_stride: outputs,
        c_type: precision.into(),
        alpha: 1.0,
        accumulate: false,
        bias: Some(b.as_read_in(precision)),
        scales,
    };
    y.not_noting();
    cuda.product(workspace, &product);
    // NOTE: cuBLASLt could apply GELU as it stores y, and its derivative to dx. On an H200 that gains
    // 0.4 and 0.5 ms of a 63 ms step (its kernels with these epilogues are slower), and its bits are not
    // those of our kernel, which recomputing needs.
    if let Some((out, form)) = gelu {
        gelu::forward(cuda, out, y, rows * outputs, form);
    }
}

/// The gradient dy (rows, outputs) of a layer's result.
pub(super) enum Gradient<'a> {
    Whole(&'a Tensor),
    /// d gelu'(pre), where d is the gradient of gelu(pre).
    BehindGelu {
        d: &'a mut Tensor,
        pre: &'a Tensor,
        form: Activation,
    },
}

/// dx (rows, inputs) = dy W, dw (outputs, inputs) = dy^T x and db = column sums of dy, the latter two
/// added with `accumulate`.
pub(super) fn backward(
    cuda: &Cuda,
    workspace: &Workspace,
    dx: &mut Tensor,
    dw: &mut F32,
    db: &mut F32,
    gradient: Gradient<'_>,
    x: &Tensor,
    w: &Param,
    shape: LinearShape,
    recipe: &LinearRecipe,
    random: &Random,
    accumulate: bool,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    let call = Call { cuda, workspace, random, road: cuda.road(shape) };
    // Where dy is quantized for both products at once, and with what.
    let both = match (recipe.dgrad, recipe.wgrad) {
        (Backward::Mxfp4(first), Backward::Mxfp4(second))
            if call.road != Road::Bf16
                && first == second
                && first.transform.is_none_or(|transform| transform.group <= 64) =>
        {
            Some(first)
        }
        _ => None,
    };
    let (dy, pre) = match gradient {
        Gradient::Whole(dy) => (dy, None),
        Gradient::BehindGelu { d, pre, form } => {
            let group = both.and_then(|format| format.transform).map(|transform| transform.group);
            // The kernels that quantize know the tanh form alone.
            let fused = form == Activation::GeluTanh
                && call.road == Road::Fp8
                && group == Some(BehindGelu::GROUP);
            if !fused {
                gelu::backward(cuda, d, pre, rows * outputs, form);
            }
            (&*d, fused.then_some(pre))
        }
    };
    let precision = dy.precision;
    let dgrad = Product {
        m: rows,
        n: inputs,
        k: outputs,
        operands: [precision.into(); 2],
        a: Operand::rows(dy.address(), outputs),
        b: Operand::columns(w.as_read_in(precision), inputs),
        c: dx.address(),
        c_stride: inputs,
        c_type: precision.into(),
        alpha: 1.0,
        accumulate: false,
        bias: None,
        scales: None,
    };
    let gradient = Source { address: dy.address(), precision };
    let most = match (recipe.dgrad, recipe.wgrad) {
        (Backward::Mxfp4(_), _) | (_, Backward::Mxfp4(_))
            if call.road == Road::Fp8 && pre.is_none() =>
        {
            largest_magnitude(cuda, workspace, 0, dy)
        }
        _ => 0,
    };
    let as_rows = Quantize { form: Form::Rows, rows, cols: outputs };
    let as_columns = Quantize { form: Form::Columns, ..as_rows };
    let by_rows = call.dy_operand(gradient, as_rows, most);
    let by_columns = call.dy_operand(gradient, as_columns, most);
    let sums = workspace.partials.address;
    let quantized_both = both.map(|format| match pre {
        // NOTE: on an H100, (16384, 4096) take 119 us; the forms by themselves take 74 and 77.
        None => call.quantize_both(&by_rows, &by_columns, format, sums),
        Some(pre) => call.quantize_both_behind_gelu(&by_rows, &by_columns, dy, pre, format, sums),
    });

    dx.not_noting();
    match recipe.dgrad {
        Backward::F32 | Backward::Bf16 => cuda.product(workspace, &dgrad),
        Backward::Mxfp4(format) => {
            if quantized_both.is_none() {
                call.quantize(&by_rows, format.dy, format, GemmId::Dgrad, 0);
            }
            let w = MxOperand {
                source: Source { address: w.master.address(), precision: Precision::F32 },
                shape: Quantize { form: Form::Columns, rows: outputs, cols: inputs },
                id: OperandId::W,
                most: w.most.address,
                ..call.other_operand()
            };
            call.quantize(&w, format.other, format, GemmId::Dgrad, 0);
            call.product(dgrad, [&by_rows, &w], format);
        }
    }

    // What the forward pass kept of x: in an FP8 recipe its FP8 form.
    let mut kept = Source { address: x.address(), precision };
    let (mut most_of_x, in_fp8) = (0, recipe.forward == Forward::Fp8);
    if call.road == Road::Fp8 && matches!(recipe.wgrad, Backward::Mxfp4(_)) {
        most_of_x = largest_magnitude(cuda, workspace, 1, x);
    } else if in_fp8 {
        (kept.address, most_of_x) = keep_as_fp8(cuda, workspace, x, rows * inputs);
    }
    let wgrad = Product {
        m: outputs,
        n: inputs,
        k: rows,
        a: Operand::columns(dy.address(), outputs),
        b: Operand::columns(kept.address, inputs),
        c: dw.address(),
        c_stride: inputs,
        c_type: Type::F32,
        accumulate,
        ..dgrad
    };
    match recipe.wgrad {
        Backward::F32 | Backward::Bf16 => {
            cuda.product(workspace, &wgrad);
            bias_gradient(cuda, workspace, db, dy, rows, outputs, accumulate);
        }
        Backward::Mxfp4(format) => {
            let parts = quantized_both.unwrap_or_else(|| {
                call.quantize(&by_columns, format.dy, format, GemmId::Wgrad, sums)
            });
            let x = MxOperand {
                source: kept,
                shape: Quantize { form: Form::Columns, rows, cols: inputs },
                id: OperandId::X,
                most: most_of_x,
                kept: in_fp8,
                ..call.other_operand()
            };
            call.quantize(&x, format.other, format, GemmId::Wgrad, 0);
            call.product(wgrad, [&by_columns, &x], format);
            add_partials(cuda, db, None, sums, parts, outputs, accumulate);
        }
    }
}

/// A matrix on the device, dense.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub(super) address: u64,
    pub(super) precision: Precision,
}

/// Which way the reduction runs through a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Along its rows.
    Rows,
    /// Down its columns: the result is transposed.
    Columns,
}

/// A source (rows, cols) and the form of its result.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quantize {
    pub(super) form: Form,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl Quantize {
    /// Vectors, and their length padded to whole groups.
    fn vectors_and_depth(self, group: usize) -> (usize, usize) {
        let (vectors, depth) = match self.form {
            Form::Rows => (self.rows, self.cols),
            Form::Columns => (self.cols, self.rows),
        };
        (vectors, depth.next_multiple_of(group.max(mx::BLOCK)))
    }
}

/// `Transform` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct TransformArgument {
    signs: [u32; 8],
    scale: f32,
}

impl TransformArgument {
    /// For the group that `signs` (+1 and -1) is as long as; none where it is empty.
    pub(super) fn new(signs: &[f32]) -> Self {
        let mut bits = [0; 8];
        for (i, sign) in signs.iter().enumerate() {
            bits[i / 32] |= u32::from(*sign < 0.0) << (i % 32);
        }
        Self { signs: bits, scale: mx::group_scale(signs.len().max(1)) }
    }
}

/// `Draw` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct DrawArgument {
    words: [u32; 3],
    /// As every round of Philox adds it.
    keys: [[u32; 2]; 10],
    constants: [u32; 5],
}

impl From<Draw> for DrawArgument {
    fn from(draw: Draw) -> Self {
        let key = |round: u32| {
            let step = |key: u32, by: u32| key.wrapping_add(by.wrapping_mul(round));
            [step(draw.key[0], mx::W0), step(draw.key[1], mx::W1)]
        };
        let words = [draw.word1, draw.word2, draw.word3];
        let keys = std::array::from_fn(|round| key(round as u32));
        Self { words, keys, constants: [1 << 16, 1 << 8, 1 << 4, 1 << 2, 0x80] }
    }
}

/// Where the result of a quantization goes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// bf16 values, exactly.
    Values { out: u64 },
    /// FP8 numbers.
    Fp8 { out: u64, format: Type, scaling: Scaling },
    /// E4M3 elements, and the scales of their blocks in cuBLASLt's tiles.
    Mxfp8 { out: u64, scales: u64 },
    /// The definition's own bytes.
    Codes { codes: u64, scales: u64 },
}

/// How FP8 numbers are scaled: by a power of two for the whole tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scaling {
    /// The f32 factor that gives the values back, written.
    pub(super) scale: u64,
    /// Counts the blocks that were raised, because they lie too far below the largest of their tensor.
    pub(super) raised: u64,
    /// The bits of the source's largest magnitude, read.
    pub(super) most: u64,
    /// Whether the source is first rounded as an FP8 forward pass keeps it (to E4M3, down columns, bf16).
    pub(super) kept: bool,
}

/// Rows that a thread block of the row kernels takes: the fewest that make whole warps of threads, some
/// 96 to 192 of them.
pub(super) fn rows_at_once(blocks: usize) -> usize {
    let mut rows = (32 >> blocks.trailing_zeros().min(5)).max(1);
    while rows > 1 && rows * blocks > 256 {
        rows = rows.div_ceil(2);
    }
    while 2 * rows * blocks <= 128 && 2 * rows <= 63 {
        rows *= 2;
    }
    rows
}

/// Rows and columns of a tile of the column kernels.
fn tile(group: usize, columns: usize) -> (usize, usize) {
    if group == 256 { (256, columns / 2) } else { (128, columns) }
}

/// Columns of a tile of the bf16 and FP8 kernels.
pub(super) const TILE_COLUMNS: usize = 64;

/// How the tile kernels in `mxfp4_fp8.cu` are launched.
pub(super) struct Tiles {
    pub(super) grid: [usize; 3],
    pub(super) block: usize,
    /// Of shared memory: the source, random bits, signs.
    bytes: usize,
}

impl Tiles {
    /// The group that has kernels of its own.
    pub(super) const GROUP: usize = 64;

    /// For a source of this precision that tiles cover in `cols` columns and `rows` rows.
    pub(super) fn new(precision: Precision, cols: usize, rows: usize, group: usize) -> Self {
        // Lines of 64 numbers, each 32 of them shifted by at most 64 bytes.
        let bytes = |size, lines| lines * (64 * size + 16) + lines / 32 * 64;
        let size = size_of_element(precision);
        if group == Self::GROUP {
            return Self {
                grid: [cols.div_ceil(group), rows.div_ceil(group), 1],
                block: 2 * group,
                bytes: bytes(size, group) + bytes(2, group) + 3 * 8 * 36,
            };
        }
        let (tile_rows, tile_cols) = tile(group, TILE_COLUMNS);
        let lines = 128;
        Self {
            grid: [cols.div_ceil(tile_cols), rows.div_ceil(tile_rows), 1],
            block: 2 * lines,
            bytes: bytes(size, lines) + bytes(2, lines) + 8 * 256 + 8 * 36,
        }
    }
}

/// Longest reduction along rows that the row kernels take.
pub(super) const MAX_DEPTH: usize = 1024 * mx::BLOCK;

fn kernel_name(
    form: Form,
    target: Target,
    precision: Precision,
    rounding: Rounding,
    group: usize,
) -> &'static str {
    /// By precision and rounding.
    macro_rules! names {
        ($form:literal, $what:literal) => {
            [
                concat!("quantize_", $form, "_", $what, "_f32_nearest"),
                concat!("quantize_", $form, "_", $what, "_f32_unbiased"),
                concat!("quantize_", $form, "_", $what, "_bf16_nearest"),
                concat!("quantize_", $form, "_", $what, "_bf16_unbiased"),
            ]
        };
    }
    let names = match (form, target) {
        (Form::Rows, Target::Values { .. }) => names!("rows", "values"),
        (Form::Rows, Target::Fp8 { .. }) => match group {
            Tiles::GROUP => names!("rows", "e5m2_g64"),
            _ => names!("rows", "e5m2"),
        },
        (Form::Columns, Target::Values { .. }) => names!("columns", "values"),
        (Form::Columns, Target::Fp8 { format: Type::E5m2, .. }) => match group {
            Tiles::GROUP => names!("columns", "e5m2_g64"),
            _ => names!("columns", "e5m2"),
        },
        (Form::Columns, Target::Fp8 { scaling, .. }) => match (scaling.kept, group) {
            (false, Tiles::GROUP) => names!("columns", "e4m3_g64"),
            (false, _) => names!("columns", "e4m3"),
            (true, Tiles::GROUP) => names!("columns", "e4m3_kept_g64"),
            (true, _) => names!("columns", "e4m3_kept"),
        },
        (Form::Rows, Target::Mxfp8 { .. }) => names!("rows", "mxfp8"),
        (Form::Columns, Target::Mxfp8 { .. }) => names!("columns", "mxfp8"),
        (Form::Rows, Target::Codes { .. }) => names!("rows", "codes"),
        (Form::Columns, Target::Codes { .. }) => names!("columns", "codes"),
    };
    let bf16 = usize::from(precision == Precision::Bf16);
    names[2 * bf16 + usize::from(rounding == Rounding::Unbiased)]
}

/// Quantizes a source to `target`. `sums`, where it is not 0 and the reduction runs down columns, gets
/// the column sums of every tile of rows; their number is returned. FP8: E5M2 is made from bf16 alone, and
/// along rows nothing else is made.
pub(super) fn quantize(
    cuda: &Cuda,
    target: Target,
    source: Source,
    shape: Quantize,
    sums: u64,
    signs: &[f32],
    rounding: Rounding,
    draw: Draw,
) -> usize {
    let group = signs.len();
    let (vectors, depth) = shape.vectors_and_depth(group);
    let name = kernel_name(shape.form, target, source.precision, rounding, group);
    let (transform, draw) = (TransformArgument::new(signs), DrawArgument::from(draw));
    let [rows, cols, length, group_length] =
        [shape.rows, shape.cols, depth, group].map(|n| n as u32);
    // Scales in tiles are written for as many vectors as these hold.
    let covered = match target {
        Target::Mxfp8 { .. } => vectors.next_multiple_of(carrier::TILE_VECTORS),
        _ => vectors,
    };
    if shape.form == Form::Rows {
        let blocks = depth / mx::BLOCK;
        let each = rows_at_once(blocks);
        let (grid, block) = ([covered.div_ceil(each), 1, 1], (each * blocks).next_multiple_of(32));
        let each = each as u32;
        match target {
            Target::Values { out } => launch!(cuda.gpu, name, grid, block, 0;
                out, source.address, rows, cols, length, group_length, each, transform, draw),
            Target::Fp8 { out, scaling: Scaling { scale, raised, most, .. }, .. }
                if group == Tiles::GROUP =>
            {
                let tiles = Tiles::new(Precision::Bf16, depth, vectors, group);
                launch!(cuda.gpu, name, tiles.grid, tiles.block, tiles.bytes;
                    out, scale, raised, most, source.address, rows, cols, length, group_length,
                    transform, draw);
            }
            Target::Fp8 { out, scaling: Scaling { scale, raised, most, .. }, .. } => {
                launch!(cuda.gpu, name, grid, block, 0;
                    out, scale, raised, most, source.address, rows, cols, length, group_length, each,
                    transform, draw);
            }
            Target::Mxfp8 { out, scales } | Target::Codes { codes: out, scales } => {
                launch!(cuda.gpu, name, grid, block, 0;
                    out, scales, source.address, rows, cols, length, group_length, each, transform,
                    draw);
            }
        }
        return 0;
    }
    let (columns, block) = match source.precision {
        Precision::Bf16 => (TILE_COLUMNS, 256),
        Precision::F32 => (TILE_COLUMNS / 2, 128),
    };
    let (tile_rows, columns) = tile(group, columns);
    let tiles = depth.div_ceil(tile_rows);
    let grid = [covered.div_ceil(columns), tiles, 1];
    match target {
        Target::Values { out } => launch!(cuda.gpu, name, grid, block, 0;
            out, sums, source.address, rows, cols, length, group_length, transform, draw),
        Target::Fp8 { out, scaling: Scaling { scale, raised, most, .. }, .. } => {
            let tiles = Tiles::new(source.precision, vectors, depth, group);
            launch!(cuda.gpu, name, tiles.grid, tiles.block, tiles.bytes;
                out, scale, raised, most, sums, source.address, rows, cols, length, group_length,
                transform, draw);
            return tiles.grid[1];
        }
        Target::Mxfp8 { out, scales } | Target::Codes { codes: out, scales } => {
            launch!(cuda.gpu, name, grid, block, 0;
                out, scales, sums, source.address, rows, cols, length, group_length, transform, draw);
        }
    }
    tiles
}

/// Both forms of a source (rows, cols) of bf16 numbers in E5M2, along rows to `out[0]` and down columns to
/// `out[1]`, with one group for both, of at most 64, and one scale. `sums` and the result as of [`quantize`].
pub(super) fn quantize_both(
    cuda: &Cuda,
    out: [u64; 2],
    scaling: Scaling,
    source: u64,
    (rows, cols): (usize, usize),
    sums: u64,
    signs: [&[f32]; 2],
    rounding: Rounding,
    draw: Draw,
) -> usize {
    let group = signs[0].len();
    let [rows_depth, depth] = [cols, rows].map(|n| n.next_multiple_of(group.max(mx::BLOCK)));
    let name = match (group, rounding) {
        (Tiles::GROUP, Rounding::Nearest) => "quantize_both_e5m2_g64_bf16_nearest",
        (Tiles::GROUP, Rounding::Unbiased) => "quantize_both_e5m2_g64_bf16_unbiased",
        (_, Rounding::Nearest) => "quantize_both_e5m2_bf16_nearest",
        (_, Rounding::Unbiased) => "quantize_both_e5m2_bf16_unbiased",
    };
    let tiles = Tiles::new(Precision::Bf16, rows_depth, depth, group);
    let Scaling { scale, raised, most, .. } = scaling;
    launch!(cuda.gpu, name, tiles.grid, tiles.block, tiles.bytes;
        out[0], out[1], scale, raised, most, sums, source, rows as u32, cols as u32,
        rows_depth as u32, depth as u32, group as u32, TransformArgument::new(signs[0]),
        TransformArgument::new(signs[1]), DrawArgument::from(draw));
    tiles.grid[1]
}

/// Both forms of the gradient d gelu'(pre) (rows, cols) of bf16 numbers, as of [`quantize_both`], without storing
/// the gradient itself. Its scale is made from a sample; where that leaves no room for a block, all is done once more.
pub(super) struct BehindGelu<'a> {
    pub(super) out: [u64; 2],
    /// As of [`Scaling`].
    pub(super) scale: u64,
    pub(super) raised: u64,
    /// `Attempt` of the kernels: zeroed words.
    pub(super) attempt: u64,
    pub(super) sums: u64,
    pub(super) d: u64,
    pub(super) pre: u64,
    pub(super) shape: (usize, usize),
    pub(super) signs: [&'a [f32]; 2],
    pub(super) rounding: Rounding,
    pub(super) draw: Draw,
}

impl BehindGelu<'_> {
    /// Of both transforms.
    pub(super) const GROUP: usize = Tiles::GROUP;
    /// Of an attempt.
    pub(super) const WORDS: u64 = 3;

    fn depths(&self) -> [usize; 2] {
        let (rows, cols) = self.shape;
        [cols, rows].map(|n| n.next_multiple_of(Self::GROUP))
    }

    fn tiles(&self) -> Tiles {
        let [rows_depth, depth] = self.depths();
        Tiles::new(Precision::Bf16, rows_depth, depth, Self::GROUP)
    }

    /// First.
    pub(super) fn sample(&self, cuda: &Cuda) {
        gelu::sample_gradient(cuda, self.attempt, self.d, self.pre, self.shape);
    }

    /// Second. The result as of [`quantize`].
    pub(super) fn quantize(&self, cuda: &Cuda) -> usize {
        let name = match self.rounding {
            Rounding::Nearest => "quantize_both_gelu_e5m2_g64_bf16_nearest",
            Rounding::Unbiased => "quantize_both_gelu_e5m2_g64_bf16_unbiased",
        };
        let grid = self.tiles().grid;
        self.launch(cuda, name, grid);
        grid[1]
    }

    /// Last, in any case: the host does not know whether there is anything to do.
    pub(super) fn requantize(&self, cuda: &Cuda) {
        let name = match self.rounding {
            Rounding::Nearest => "requantize_both_gelu_e5m2_g64_bf16_nearest",
            Rounding::Unbiased => "requantize_both_gelu_e5m2_g64_bf16_unbiased",
        };
        // As many as run at once: there is hardly ever anything to do, and every block has to be started.
        let at_once = 4 * cuda.gpu.multiprocessors as usize;
        let [x, y, _] = self.tiles().grid;
        self.launch(cuda, name, [(x * y).min(at_once), 1, 1]);
    }

    fn launch(&self, cuda: &Cuda, name: &str, grid: [usize; 3]) {
        let Tiles { block, bytes, .. } = self.tiles();
        let [rows_depth, depth] = self.depths();
        let &Self { out, scale, raised, attempt, sums, d, pre, shape: (rows, cols), .. } = self;
        launch!(cuda.gpu, name, grid, block, bytes;
            out[0], out[1], scale, raised, attempt, sums, d, pre, rows as u32, cols as u32,
            rows_depth as u32, depth as u32, TransformArgument::new(self.signs[0]),
            TransformArgument::new(self.signs[1]), DrawArgument::from(self.draw));
    }
}

/// The signs of a GEMM's transform; none where there is no transform.
pub(super) fn fill_signs<'a>(
    signs: &'a mut [f32; mx::MAX_GROUP],
    transform: Option<Transform>,
    gemm: GemmId,
    random: &Random,
) -> &'a [f32] {
    let Some(transform) = transform else { return &[] };
    let signs = &mut signs[..transform.group];
    let draw = match transform.signs {
        Signs::Random => random.signs(gemm),
        Signs::Fixed => Draw::fixed_signs(random.seed),
    };
    draw.fill_signs(signs);
    signs
}

/// An operand of an MXFP4 product: what is quantized, whose bits round it, and where it goes.
#[derive(Clone, Copy)]
struct MxOperand {
    source: Source,
    shape: Quantize,
    id: OperandId,
    out: u64,
    /// The address of FP8's factor, or of the blocks' scales.
    scale: u64,
    /// FP8: the format, and the address of the bits of the source's largest magnitude.
    format: Type,
    most: u64,
    /// Whether it is what an FP8 forward pass kept of the source.
    kept: bool,
}

/// What the products of one backward pass have in common.
struct Call<'a> {
    cuda: &'a Cuda,
    workspace: &'a Workspace,
    random: &'a Random,
    road: Road,
}

impl Call<'_> {
    /// dy in one of its forms. Where both are made at once, they share the room of one bf16 form.
    fn dy_operand(&self, source: Source, shape: Quantize, most: u64) -> MxOperand {
        let room = &self.workspace.operands[0];
        let (mut out, mut scale) = (room.address, self.workspace.scales[0].address);
        if shape.form == Form::Columns && self.road != Road::Bf16 {
            out += self.workspace.second_form;
            if self.road.has_block_scales() {
                scale += self.workspace.second_scales;
            }
        }
        MxOperand {
            source,
            shape,
            id: OperandId::Dy,
            out,
            format: Type::E5m2,
            scale,
            most,
            kept: false,
        }
    }

    /// The room and format of W or x.
    fn other_operand(&self) -> MxOperand {
        let source = Source { address: 0, precision: Precision::Bf16 };
        let shape = Quantize { form: Form::Columns, rows: 0, cols: 0 };
        let (out, scale) = (self.workspace.operands[1].address, self.workspace.scales[1].address);
        MxOperand {
            source,
            shape,
            id: OperandId::X,
            out,
            format: Type::E4m3,
            scale,
            most: 0,
            kept: false,
        }
    }

    fn target(&self, operand: &MxOperand) -> Target {
        let &MxOperand { out, scale: scales, format, .. } = operand;
        match self.road {
            Road::Bf16 => Target::Values { out },
            Road::Fp8 => Target::Fp8 { out, format, scaling: self.scaling(operand) },
            Road::Mxfp8 => Target::Mxfp8 { out, scales },
            Road::Fp4 => Target::Codes { codes: out, scales },
        }
    }

    fn scaling(&self, operand: &MxOperand) -> Scaling {
        let raised = self.workspace.raised.address;
        let MxOperand { scale, most, kept, .. } = *operand;
        Scaling { scale, raised, most, kept }
    }

    /// Quantizes an operand for `gemm`. `sums` and the result as of [`quantize`].
    fn quantize(
        &self,
        operand: &MxOperand,
        rounding: Rounding,
        format: Mxfp4,
        gemm: GemmId,
        sums: u64,
    ) -> usize {
        let gemms: &[GemmId] = match gemm {
            GemmId::Dgrad => &[GemmId::Dgrad],
            GemmId::Wgrad => &[GemmId::Wgrad],
        };
        let mut signs = [0.0; mx::MAX_GROUP];
        let signs = fill_signs(&mut signs, format.transform, gemm, self.random);
        let &MxOperand { source, shape, id, .. } = operand;
        let target = self.target(operand);
        let draw = self.random.rounding(id);
        let parts = quantize(self.cuda, target, source, shape, sums, signs, rounding, draw);
        self.note_drawn(gemms, id, format);
        parts
    }

    /// Quantizes dy for both products.
    fn quantize_both(
        &self,
        by_rows: &MxOperand,
        by_columns: &MxOperand,
        format: Mxfp4,
        sums: u64,
    ) -> usize {
        let mut signs = [[0.0; mx::MAX_GROUP]; 2];
        let signs = self.both_signs(&mut signs, format);
        let (cuda, source) = (self.cuda, by_rows.source.address);
        let Quantize { rows, cols, .. } = by_rows.shape;
        let (shape, rounding) = ((rows, cols), format.dy);
        let draw = self.random.rounding(OperandId::Dy);
        let parts = if self.road.has_block_scales() {
            let targets = [by_rows, by_columns].map(|operand| self.target(operand));
            carrier::quantize_both(cuda, targets, source, shape, sums, signs, rounding, draw)
        } else {
            let (out, scaling) = ([by_rows.out, by_columns.out], self.scaling(by_rows));
            quantize_both(cuda, out, scaling, source, shape, sums, signs, rounding, draw)
        };
        self.note_drawn(&[GemmId::Dgrad, GemmId::Wgrad], OperandId::Dy, format);
        parts
    }

    /// The same of dy = d gelu'(pre), which the operands' source does not hold.
    fn quantize_both_behind_gelu(
        &self,
        by_rows: &MxOperand,
        by_columns: &MxOperand,
        d: &Tensor,
        pre: &Tensor,
        format: Mxfp4,
        sums: u64,
    ) -> usize {
        let (cuda, workspace) = (self.cuda, self.workspace);
        let mut signs = [[0.0; mx::MAX_GROUP]; 2];
        let attempt = d.zeroed_words(BehindGelu::WORDS).unwrap_or_else(|| {
            cuda.clear(workspace.attempt.address, 4 * BehindGelu::WORDS as usize);
            workspace.attempt.address
        });
        let gradient = BehindGelu {
            out: [by_rows.out, by_columns.out],
            scale: by_rows.scale,
            raised: workspace.raised.address,
            attempt,
            sums,
            d: d.address(),
            pre: pre.address(),
            shape: (by_rows.shape.rows, by_rows.shape.cols),
            signs: self.both_signs(&mut signs, format),
            rounding: format.dy,
            draw: self.random.rounding(OperandId::Dy),
        };
        let gemms = &[GemmId::Dgrad, GemmId::Wgrad];
        gradient.sample(cuda);
        let parts = gradient.quantize(cuda);
        self.note_drawn(gemms, OperandId::Dy, format);
        gradient.requantize(cuda);
        self.note_drawn(gemms, OperandId::Dy, format);
        parts
    }

    /// The signs of both products' transforms.
    fn both_signs<'a>(
        &self,
        [first, second]: &'a mut [[f32; mx::MAX_GROUP]; 2],
        format: Mxfp4,
    ) -> [&'a [f32]; 2] {
        [(first, GemmId::Dgrad), (second, GemmId::Wgrad)]
            .map(|(signs, gemm)| fill_signs(signs, format.transform, gemm, self.random))
    }

    fn note_drawn(&self, gemms: &'static [GemmId], operand: OperandId, format: Mxfp4) {
        let drawn = Drawn { random: *self.random, gemms, operand, transform: format.transform };
        recordings::note_drawn(&self.cuda.gpu, drawn);
    }

    /// `plain` with these quantized operands.
    fn product(&self, plain: Product, [a, b]: [&MxOperand; 2], format: Mxfp4) {
        let group = format.transform.map_or(0, |transform| transform.group);
        let (_, depth) = a.shape.vectors_and_depth(group);
        let product = Product {
            k: depth,
            operands: match self.road {
                Road::Bf16 => [Type::Bf16; 2],
                Road::Fp8 => [a.format, b.format],
                Road::Mxfp8 => [Type::Mxfp8; 2],
                Road::Fp4 => [Type::E2m1; 2],
            },
            a: Operand::rows(a.out, depth),
            b: Operand::rows(b.out, depth),
            alpha: mx::product_scale(format.dy, format.other),
            scales: (self.road != Road::Bf16).then_some([a.scale, b.scale]),
            ..plain
        };
        self.cuda.product(self.workspace, &product);
    }
}

/// The address of the bits of a tensor's largest magnitude: what the kernel noted that wrote the tensor, or
/// else word `place` of the workspace, after reading the tensor once more.
fn largest_magnitude(cuda: &Cuda, workspace: &Workspace, place: usize, tensor: &Tensor) -> u64 {
    tensor.largest_magnitude().unwrap_or_else(|| {
        let most = workspace.most[place].address;
        let source = Source { address: tensor.address(), precision: tensor.precision };
        max_magnitude(cuda, most, source, tensor.len);
        most
    })
}

/// The addresses of x (len) as FP8 keeps it, and of the bits of the largest magnitude of that.
fn keep_as_fp8(cuda: &Cuda, workspace: &Workspace, x: &Tensor, len: usize) -> (u64, u64) {
    let source = Source { address: x.address(), precision: x.precision };
    let most = largest_magnitude(cuda, workspace, 1, x);
    let (kept, kept_most) = (workspace.kept.address, workspace.most[2].address);
    round_to_fp8(cuda, kept, kept_most, source, most, len);
    (kept, kept_most)
}

/// `out` (len, bf16) = the source as FP8 holds it with a scale for the whole tensor, whose largest magnitude
/// is at `most`; that of the result goes to `kept_most`.
fn round_to_fp8(cuda: &Cuda, out: u64, kept_most: u64, source: Source, most: u64, len: usize) {
    let grid = [len.div_ceil(8 * BLOCK), 1, 1];
    launch!(cuda.gpu, kernel!(source, "round_to_fp8"), grid, BLOCK, 0;
        out, kept_most, source.address, most, len as u64);
}

/// `out` (len) = the E4M3 bytes of the source with a scale for the whole tensor, which goes to `scale`.
fn convert_to_e4m3(cuda: &Cuda, out: u64, scale: u64, source: Source, most: u64, len: usize) {
    let grid = [len.div_ceil(8 * BLOCK), 1, 1];
    launch!(cuda.gpu, kernel!(source, "convert_to_e4m3"), grid, BLOCK, 0;
        out, scale, source.address, most, len as u64);
}

/// *most = the bits of the largest magnitude of a source.
fn max_magnitude(cuda: &Cuda, most: u64, source: Source, len: usize) {
    cuda.clear(most, 4);
    let blocks = len.div_ceil(8 * BLOCK).min(8 * cuda.gpu.multiprocessors as usize);
    launch!(cuda.gpu, kernel!(source, "max_magnitude"), [blocks, 1, 1], BLOCK, 0;
        most, source.address, len as u64);
}

/// Stretches of rows whose column sums are kept apart.
fn parts(rows: usize) -> usize {
    rows.div_ceil(64).min(128)
}

/// Floats of scratch that the bias gradient needs: (parts, outputs), from dy or from quantizing it.
pub(super) fn partials(rows: usize, outputs: usize) -> usize {
    parts(rows).max(rows.div_ceil(64) + 2) * outputs
}

/// db (outputs) = the column sums of dy (rows, outputs), or with `accumulate` they are added.
fn bias_gradient(
    cuda: &Cuda,
    workspace: &Workspace,
    db: &mut F32,
    dy: &Tensor,
    rows: usize,
    outputs: usize,
    accumulate: bool,
) {
    let (partials, parts) = (workspace.partials.address, parts(rows));
    launch!(cuda.gpu, kernel!(dy, "bias_gradient"), [outputs.div_ceil(256), parts, 1], BLOCK, 0;
        partials, dy.address(), rows as u32, outputs as u32);
    add_partials(cuda, db, None, partials, parts, outputs, accumulate);
}

/// `to` (n) = the sums of the columns of partials (parts, n), or with `accumulate` they are added. With
/// `second`, a part has n more columns for that.
pub(super) fn add_partials(
    cuda: &Cuda,
    to: &mut F32,
    second: Option<&mut F32>,
    partials: u64,
    parts: usize,
    n: usize,
    accumulate: bool,
) {
    let columns = if second.is_some() { 2 * n } else { n };
    let second = second.map_or(0, |second| second.address());
    launch!(cuda.gpu, "add_partials", [columns.div_ceil(32), 1, 1], 1024, 0;
        to.address(), second, partials, parts as u32, n as u32, u32::from(accumulate));
}
