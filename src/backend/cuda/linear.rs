//! The linear layers of a block: y = x W^T + b and its backward pass, in the formats of a recipe.
//!
//! MXFP4 operands are quantized by one kernel each, transposed where the reduction runs down the
//! columns, so that every MXFP4 GEMM reads both operands along the reduction dimension.

use super::gemm::{Operand, Type};
use super::gpu::launch;
use super::memory::{F32, Param, Tensor};
use super::{Cuda, Product, Workspace, kernel, suffix};
use crate::backend::{LinearShape, Precision};
use crate::mx::{self, Draw, GemmId, OperandId, Random, Rounding};
use crate::recipe::{Backward, Forward, LinearRecipe, Mxfp4, Signs};

/// Threads of a block.
const BLOCK: usize = 256;

/// y (rows, outputs) = x (rows, inputs) W (outputs, inputs)^T + b
pub(super) fn forward(
    cuda: &Cuda,
    workspace: &Workspace,
    y: &mut Tensor,
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
    };
    cuda.product(workspace, &product);
}

/// dx (rows, inputs) = dy W; adds dy^T x to dw (outputs, inputs) and column sums of dy to db.
pub(super) fn backward(
    cuda: &Cuda,
    workspace: &Workspace,
    dx: &mut Tensor,
    dw: &mut F32,
    db: &mut F32,
    dy: &Tensor,
    x: &Tensor,
    w: &Param,
    shape: LinearShape,
    recipe: &LinearRecipe,
    random: &Random,
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
    };
    let dy_source = Source { address: dy.address(), precision };
    let master = Source { address: w.master.address(), precision: Precision::F32 };
    match recipe.dgrad {
        Backward::F32 | Backward::Bf16 => cuda.product(workspace, &dgrad),
        Backward::Mxfp4(format) => {
            let operands = [
                (Quantize { form: Form::Rows, rows, cols: outputs }, dy_source, OperandId::Dy),
                (
                    Quantize { form: Form::Columns, rows: outputs, cols: inputs },
                    master,
                    OperandId::W,
                ),
            ];
            mxfp4_product(cuda, workspace, dgrad, operands, format, GemmId::Dgrad, random);
        }
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
        accumulate: true,
        ..dgrad
    };
    match recipe.wgrad {
        Backward::F32 | Backward::Bf16 => cuda.product(workspace, &wgrad),
        Backward::Mxfp4(format) => {
            let operands = [
                (Quantize { form: Form::Columns, rows, cols: outputs }, dy_source, OperandId::Dy),
                (Quantize { form: Form::Columns, rows, cols: inputs }, x_source, OperandId::X),
            ];
            mxfp4_product(cuda, workspace, wgrad, operands, format, GemmId::Wgrad, random);
        }
    }
    bias_gradient(cuda, workspace, db, dy, rows, outputs);
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

/// `Codes` of the kernels.
#[cfg(test)]
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct CodesArgument {
    pub(super) codes: u64,
    pub(super) scales: u64,
}

/// Quantizes to what `out`, an argument of the kernels named by `what`, describes.
pub(super) fn quantize<Out: Copy>(
    cuda: &Cuda,
    what: &str,
    out: Out,
    source: Source,
    shape: Quantize,
    signs: &[f32],
    rounding: Rounding,
    draw: Draw,
) {
    let group = signs.len();
    let (vectors, depth) = shape.vectors_and_depth(group);
    let (form, grid) = match shape.form {
        Form::Rows => ("rows", [(vectors * depth / mx::BLOCK).div_ceil(BLOCK), 1, 1]),
        Form::Columns => {
            let group = group.max(mx::BLOCK);
            // A warp takes a group of so many columns.
            let columns = 32 * mx::BLOCK / group;
            ("columns", [vectors.div_ceil(columns * (BLOCK / 32)), depth / group, 1])
        }
    };
    let rounding = match rounding {
        Rounding::Nearest => "nearest",
        Rounding::Unbiased => "unbiased",
    };
    let name = format!("quantize_{form}_{what}_{}_g{group}_{rounding}", suffix(source.precision));
    launch!(cuda.gpu, &name, grid, BLOCK, 0;
        out, source.address, shape.rows as u32, shape.cols as u32, depth as u32,
        TransformArgument::new(signs), DrawArgument::from(draw));
}

/// `plain` with its operands in MXFP4, dy being the first: exactly dequantized, which bf16 holds.
fn mxfp4_product(
    cuda: &Cuda,
    workspace: &Workspace,
    plain: Product,
    operands: [(Quantize, Source, OperandId); 2],
    format: Mxfp4,
    gemm: GemmId,
    random: &Random,
) {
    let mut signs = [0.0; mx::MAX_GROUP];
    let signs = &mut signs[..format.transform.map_or(0, |t| t.group)];
    if let Some(transform) = format.transform {
        let draw = match transform.signs {
            Signs::Random => random.signs(gemm),
            Signs::Fixed => Draw::fixed_signs(random.seed),
        };
        draw.fill_signs(signs);
    }
    let [a, b] = [0, 1].map(|i| workspace.operands[i].address);
    for ((out, (shape, source, id)), rounding) in
        [a, b].into_iter().zip(operands).zip([format.dy, format.other])
    {
        let draw = random.rounding(id);
        quantize(cuda, "values", out, source, shape, signs, rounding, draw);
    }
    let (_, depth) = operands[0].0.vectors_and_depth(signs.len());
    let product = Product {
        k: depth,
        operands: Type::Bf16,
        a: Operand::rows(a, depth),
        b: Operand::rows(b, depth),
        alpha: mx::product_scale(format.dy, format.other),
        ..plain
    };
    cuda.product(workspace, &product);
}

/// The address of x (len) as FP8 keeps it.
fn keep_as_fp8(cuda: &Cuda, workspace: &Workspace, x: &Tensor, len: usize) -> u64 {
    let source = Source { address: x.address(), precision: x.precision };
    round_to_fp8(cuda, workspace, workspace.kept.address, source, len);
    workspace.kept.address
}

/// `out` (len, bf16) = the source as FP8 holds it with a scale for the whole tensor.
fn round_to_fp8(cuda: &Cuda, workspace: &Workspace, out: u64, source: Source, len: usize) {
    let (most, blocks) = (workspace.magnitude.address, len.div_ceil(8 * BLOCK));
    cuda.clear(most, 4);
    let grid = [blocks.min(8 * cuda.gpu.multiprocessors as usize), 1, 1];
    launch!(cuda.gpu, kernel!(source, "max_magnitude"), grid, BLOCK, 0;
        most, source.address, len as u64);
    launch!(cuda.gpu, kernel!(source, "round_to_fp8"), [blocks, 1, 1], BLOCK, 0;
        out, source.address, most, len as u64);
}

/// Stretches of rows whose column sums are kept apart.
fn parts(rows: usize) -> usize {
    rows.div_ceil(64).min(128)
}

/// Floats of scratch that the bias gradient needs: (parts, outputs).
pub(super) fn partials(rows: usize, outputs: usize) -> usize {
    parts(rows) * outputs
}

/// Adds the column sums of dy (rows, outputs) to db (outputs).
fn bias_gradient(
    cuda: &Cuda,
    workspace: &Workspace,
    db: &mut F32,
    dy: &Tensor,
    rows: usize,
    outputs: usize,
) {
    let (partials, parts) = (workspace.partials.address, parts(rows));
    launch!(cuda.gpu, kernel!(dy, "bias_gradient"), [outputs.div_ceil(256), parts, 1], BLOCK, 0;
        partials, dy.address(), rows as u32, outputs as u32);
    add_partials(cuda, db, partials, parts, outputs, outputs);
}

/// Adds the sums of the first `n` columns of partials (parts, stride) to `to` (n).
pub(super) fn add_partials(
    cuda: &Cuda,
    to: &mut F32,
    partials: u64,
    parts: usize,
    stride: usize,
    n: usize,
) {
    launch!(cuda.gpu, "add_partials", [n.div_ceil(32), 1, 1], BLOCK, 0;
        to.address(), partials, parts as u32, stride as u32, n as u32);
}
