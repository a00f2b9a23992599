//! The linear layers of a block: y = x W^T + b and its backward pass, in the formats of a recipe.
//!
//! MXFP4 operands are quantized by one kernel each, transposed where the reduction runs down the
//! columns, so that every MXFP4 GEMM reads both operands along the reduction dimension.

use super::gemm::{Operand, Type};
use super::gpu::launch;
use super::graph::{self, Drawn};
use super::memory::{F32, Param, Tensor};
use super::{Cuda, Product, Workspace, gelu, kernel};
use crate::backend::{LinearShape, Precision};
use crate::mx::{self, Draw, GemmId, OperandId, Random, Rounding};
use crate::recipe::{Backward, Forward, LinearRecipe, Mxfp4, Signs, Transform};

/// Threads of a block.
const BLOCK: usize = 256;

/// y (rows, outputs) = x (rows, inputs) W (outputs, inputs)^T + b, and with `gelu` that of y.
pub(super) fn forward(
    cuda: &Cuda,
    workspace: &Workspace,
    y: &mut Tensor,
    gelu: Option<&mut Tensor>,
    x: &Tensor,
    w: &Param,
    b: &Param,
    shape: LinearShape,
    format: Forward,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    let precision = x.precision;
    let (x, w) = if format == Forward::Fp8 {
        let weights = workspace.operands[1].address;
        let master = Source { address: w.master.address(), precision: Precision::F32 };
        round_to_fp8(cuda, workspace, weights, master, outputs * inputs);
        (keep_as_fp8(cuda, workspace, x, rows * inputs), weights)
    } else {
        (x.address(), w.as_read_in(precision))
    };
    let product = Product {
        m: rows,
        n: outputs,
        k: inputs,
        operands: precision.into(),
        a: Operand::rows(x, inputs),
        b: Operand::rows(w, inputs),
        c: y.address(),
        c_stride: outputs,
        c_type: precision.into(),
        alpha: 1.0,
        accumulate: false,
        bias: Some(b.as_read_in(precision)),
        scales: None,
    };
    cuda.product(workspace, &product);
    // NOTE: cuBLASLt could apply GELU as it stores y, and its derivative to dx. On an H200 that gains
    // 0.4 and 0.5 ms of a 63 ms step (its kernels with these epilogues are slower), and its bits are not
    // those of our kernel, which recomputing needs.
    if let Some(out) = gelu {
        gelu::forward(cuda, out, y, rows * outputs);
    }
}

/// dx (rows, inputs) = dy W, dw (outputs, inputs) = dy^T x and db = column sums of dy, the latter two
/// added with `accumulate`.
pub(super) fn backward(
    cuda: &Cuda,
    workspace: &Workspace,
    dx: &mut Tensor,
    dw: &mut F32,
    db: &mut F32,
    dy: &Tensor,
    x: &Tensor,
    pre: Option<&Tensor>,
    w: &Param,
    shape: LinearShape,
    recipe: &LinearRecipe,
    random: &Random,
    accumulate: bool,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    let precision = dy.precision;
    let dgrad = Product {
        m: rows,
        n: inputs,
        k: outputs,
        operands: precision.into(),
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
    let dy_source = Source { address: dy.address(), precision };
    let master = Source { address: w.master.address(), precision: Precision::F32 };
    let mut most_is_known = false;
    match recipe.dgrad {
        Backward::F32 | Backward::Bf16 => cuda.product(workspace, &dgrad),
        Backward::Mxfp4(format) => {
            let dy = MxOperand {
                source: dy_source,
                shape: Quantize { form: Form::Rows, rows, cols: outputs },
                id: OperandId::Dy,
                most_is_known,
                sums: 0,
            };
            let w = MxOperand {
                source: master,
                shape: Quantize { form: Form::Columns, rows: outputs, cols: inputs },
                id: OperandId::W,
                ..dy
            };
            mxfp4_product(cuda, workspace, dgrad, [dy, w], format, GemmId::Dgrad, random);
            // Quantizing dy along its rows found it.
            most_is_known = cuda.multiplies_fp8(rows, inputs);
        }
    }
    if let Some(pre) = pre {
        gelu::backward(cuda, dx, pre, rows * inputs);
    }

    // What the forward pass kept of x: in an FP8 recipe its FP8 form.
    let mut x_source = Source { address: x.address(), precision };
    if recipe.forward == Forward::Fp8 {
        x_source.address = keep_as_fp8(cuda, workspace, x, rows * inputs);
    }
    let wgrad = Product {
        m: outputs,
        n: inputs,
        k: rows,
        a: Operand::columns(dy.address(), outputs),
        b: Operand::columns(x_source.address, inputs),
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
            let sums = workspace.partials.address;
            let dy = MxOperand {
                source: dy_source,
                shape: Quantize { form: Form::Columns, rows, cols: outputs },
                id: OperandId::Dy,
                most_is_known,
                sums,
            };
            let x = MxOperand {
                source: x_source,
                shape: Quantize { form: Form::Columns, rows, cols: inputs },
                id: OperandId::X,
                most_is_known: false,
                sums: 0,
            };
            let parts =
                mxfp4_product(cuda, workspace, wgrad, [dy, x], format, GemmId::Wgrad, random);
            add_partials(cuda, db, sums, parts, outputs, outputs, accumulate);
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
pub(super) struct DrawArgument([u32; 5]);

impl From<Draw> for DrawArgument {
    fn from(draw: Draw) -> Self {
        Self([draw.key[0], draw.key[1], draw.word1, draw.word2, draw.word3])
    }
}

/// Where the result of a quantization goes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// bf16 values, exactly.
    Values { out: u64 },
    /// E4M3 bytes with an f32 factor for each vector; blocks too far below the largest of their vector
    /// are raised, and counted. `most` holds the bits of the source's largest magnitude: written where
    /// the reduction runs along rows, read where it runs down columns.
    E4m3 { out: u64, scales: u64, raised: u64, most: u64 },
    /// The definition's own bytes.
    #[cfg(test)]
    Codes { codes: u64, scales: u64 },
}

/// Rows that a thread block of the row kernels takes: the fewest that make whole warps of threads, some
/// 96 to 192 of them.
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

/// Rows of a tile of the column kernels.
fn tile_rows(group: usize) -> usize {
    if group == 256 { 256 } else { 128 }
}

/// Longest reduction along rows that the row kernels take.
pub(super) const MAX_DEPTH: usize = 1024 * mx::BLOCK;

fn kernel_name(
    form: Form,
    target: Target,
    precision: Precision,
    rounding: Rounding,
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
        (Form::Rows, Target::E4m3 { .. }) => names!("rows", "fp8"),
        (Form::Columns, Target::Values { .. }) => names!("columns", "values"),
        (Form::Columns, Target::E4m3 { .. }) => names!("columns", "fp8"),
        #[cfg(test)]
        (Form::Rows, Target::Codes { .. }) => names!("rows", "codes"),
        #[cfg(test)]
        (Form::Columns, Target::Codes { .. }) => names!("columns", "codes"),
    };
    let bf16 = usize::from(precision == Precision::Bf16);
    names[2 * bf16 + usize::from(rounding == Rounding::Unbiased)]
}

/// Quantizes a source to `target`. `sums`, where it is not 0 and the reduction runs down columns, gets
/// the column sums of every tile of rows; their number is returned.
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
    let name = kernel_name(shape.form, target, source.precision, rounding);
    let (transform, draw) = (TransformArgument::new(signs), DrawArgument::from(draw));
    let [rows, cols, length, group_length] =
        [shape.rows, shape.cols, depth, group].map(|n| n as u32);
    if shape.form == Form::Rows {
        let blocks = depth / mx::BLOCK;
        let each = rows_at_once(blocks);
        let (grid, block) = ([vectors.div_ceil(each), 1, 1], (each * blocks).next_multiple_of(32));
        let each = each as u32;
        match target {
            Target::Values { out } => launch!(cuda.gpu, name, grid, block, 0;
                out, source.address, rows, cols, length, group_length, each, transform, draw),
            Target::E4m3 { out, scales, raised, most } => launch!(cuda.gpu, name, grid, block, 0;
                out, scales, raised, most, source.address, rows, cols, length, group_length, each,
                transform, draw),
            #[cfg(test)]
            Target::Codes { codes, scales } => launch!(cuda.gpu, name, grid, block, 0;
                codes, scales, source.address, rows, cols, length, group_length, each, transform,
                draw),
        }
        return 0;
    }
    let (columns, block) = match source.precision {
        Precision::Bf16 => (64, 256),
        Precision::F32 => (32, 128),
    };
    let columns = if group == 256 { columns / 2 } else { columns };
    let tiles = depth.div_ceil(tile_rows(group));
    let grid = [vectors.div_ceil(columns), tiles, 1];
    match target {
        Target::Values { out } => launch!(cuda.gpu, name, grid, block, 0;
            out, sums, source.address, rows, cols, length, group_length, transform, draw),
        Target::E4m3 { out, scales, raised, most } => launch!(cuda.gpu, name, grid, block, 0;
            out, scales, raised, most, 0u32, sums, source.address, rows, cols, length,
            group_length, transform, draw),
        #[cfg(test)]
        Target::Codes { codes, scales } => launch!(cuda.gpu, name, grid, block, 0;
            codes, scales, sums, source.address, rows, cols, length, group_length, transform, draw),
    }
    tiles
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

/// An operand of an MXFP4 product: what is quantized, whose bits round it, and where the column sums
/// go, if anywhere.
#[derive(Clone, Copy)]
struct MxOperand {
    source: Source,
    shape: Quantize,
    id: OperandId,
    /// The bits of the source's largest magnitude are there already.
    most_is_known: bool,
    sums: u64,
}

/// `plain` with its operands in MXFP4, dy being the first. On chips with FP8 tensor cores they are E4M3
/// numbers with a factor for each vector, else bf16 numbers; both hold MXFP4 values exactly. Returns
/// the number of partial sums that the first operand left.
fn mxfp4_product(
    cuda: &Cuda,
    workspace: &Workspace,
    plain: Product,
    operands: [MxOperand; 2],
    format: Mxfp4,
    gemm: GemmId,
    random: &Random,
) -> usize {
    let mut signs = [0.0; mx::MAX_GROUP];
    let signs = fill_signs(&mut signs, format.transform, gemm, random);
    let fp8 = cuda.multiplies_fp8(plain.m, plain.n);
    let [a, b] = [0, 1].map(|i| workspace.operands[i].address);
    let scales = [0, 1].map(|i| workspace.scales[i].address);
    let mut parts = 0;
    for (i, (operand, rounding)) in operands.into_iter().zip([format.dy, format.other]).enumerate()
    {
        let MxOperand { source, shape, id, most_is_known, sums } = operand;
        let out = [a, b][i];
        let target = if fp8 {
            let (raised, most) = (workspace.raised.address, workspace.most[i].address);
            if shape.form == Form::Rows {
                cuda.clear(most, 4);
            } else if !most_is_known {
                max_magnitude(cuda, most, source, shape.rows * shape.cols);
            }
            Target::E4m3 { out, scales: scales[i], raised, most }
        } else {
            Target::Values { out }
        };
        let draw = random.rounding(id);
        parts = parts.max(quantize(cuda, target, source, shape, sums, signs, rounding, draw));
        let drawn = Drawn { random: *random, gemm, operand: id, transform: format.transform };
        graph::note_drawn(&cuda.gpu, drawn);
    }
    let (_, depth) = operands[0].shape.vectors_and_depth(signs.len());
    let product = Product {
        k: depth,
        operands: if fp8 { Type::E4m3 } else { Type::Bf16 },
        a: Operand::rows(a, depth),
        b: Operand::rows(b, depth),
        alpha: mx::product_scale(format.dy, format.other),
        scales: fp8.then_some(scales),
        ..plain
    };
    cuda.product(workspace, &product);
    parts
}

/// The address of x (len) as FP8 keeps it.
fn keep_as_fp8(cuda: &Cuda, workspace: &Workspace, x: &Tensor, len: usize) -> u64 {
    let source = Source { address: x.address(), precision: x.precision };
    round_to_fp8(cuda, workspace, workspace.kept.address, source, len);
    workspace.kept.address
}

/// `out` (len, bf16) = the source as FP8 holds it with a scale for the whole tensor.
fn round_to_fp8(cuda: &Cuda, workspace: &Workspace, out: u64, source: Source, len: usize) {
    let most = workspace.most[1].address;
    max_magnitude(cuda, most, source, len);
    let grid = [len.div_ceil(8 * BLOCK), 1, 1];
    launch!(cuda.gpu, kernel!(source, "round_to_fp8"), grid, BLOCK, 0;
        out, source.address, most, len as u64);
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
    parts(rows).max(rows.div_ceil(tile_rows(0)) + 1) * outputs
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
    add_partials(cuda, db, partials, parts, outputs, outputs, accumulate);
}

/// `to` (n) = the sums of the first n columns of partials (parts, stride), or with `accumulate` they are
/// added.
pub(super) fn add_partials(
    cuda: &Cuda,
    to: &mut F32,
    partials: u64,
    parts: usize,
    stride: usize,
    n: usize,
    accumulate: bool,
) {
    launch!(cuda.gpu, "add_partials", [n.div_ceil(32), 1, 1], BLOCK, 0;
        to.address(), partials, parts as u32, stride as u32, n as u32, u32::from(accumulate));
}
