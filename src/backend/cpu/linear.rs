//! The linear layers of a block: y = x W^T + b and its backward pass, in the formats of a recipe.
//!
//! Reduction dimensions: `inputs` forward, `outputs` in dgrad, `rows` (tokens) in wgrad. Operands
//! are packed where they lie, transposed or not; no transposed copy is made.

use rayon::prelude::*;

use super::gemm::{Conversion, Format, Matrix, Output, PackedMut, Rotation};
use super::isa::{Isa, simd_fn};
use super::workspace::{ScratchSize, Workspace};
use super::{Cpu, JOB_ELEMENTS};
use crate::backend::{BackwardWorkspace, LinearShape, Precision};
use crate::mx::{self, Draw, GemmId, OperandId, Random, Rounding};
use crate::recipe::{Backward, Forward, LinearRecipe, Signs};

/// What these layers need of a workspace; with `backward`, their backward passes too.
pub(super) fn scratch(
    isa: Isa,
    layers: &[LinearShape],
    forward: Forward,
    backward: Option<BackwardWorkspace>,
) -> ScratchSize {
    let mut size = ScratchSize::default();
    let (a, [b, ..]) = (&mut size.a, &mut size.b);
    let plain = Conversion::of(Precision::of(forward)).format();
    for LinearShape { rows, inputs, outputs } in layers.iter().copied() {
        a.add(isa, [rows, inputs], plain, 1);
        b.add(isa, [outputs, inputs], plain, 1);
        let Some(backward) = backward else { continue };
        // bf16 always: a recipe may run some layers or steps in it.
        let f32 = backward.f32.then_some((Format::F32, 1));
        let mxfp4 = backward.mxfp4_group.map(|group| (Format::Mxfp4, group));
        for (format, group) in [(Format::Bf16, 1)].into_iter().chain(f32).chain(mxfp4) {
            a.add(isa, [rows, outputs], format, group); // dgrad: dy
            b.add(isa, [inputs, outputs], format, group); // dgrad: W
            a.add(isa, [outputs, rows], format, group); // wgrad: dy
            b.add(isa, [inputs, rows], format, group); // wgrad: x
        }
    }
    size
}

/// y (rows, outputs) = x (rows, inputs) W (outputs, inputs)^T + b
pub(super) fn forward(
    cpu: &Cpu,
    workspace: &mut Workspace,
    y: &mut [f32],
    x: &[f32],
    w: &[f32],
    b: &[f32],
    shape: LinearShape,
    format: Forward,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    let mut x = Matrix::rows_by_depth(&x[..rows * inputs], rows, inputs);
    let mut w = Matrix::rows_by_depth(w, outputs, inputs);
    if format == Forward::Fp8 {
        x = x.as_fp8(Some(fp8_scale(cpu, x.data)));
        w = w.as_fp8(Some(fp8_scale(cpu, w.data)));
    }
    let conversion = Conversion::of(Precision::of(format));
    let memory = (workspace.a.as_mut(), workspace.b[0].as_mut());
    let out = Output { c: y, stride: outputs, alpha: 1.0, bias: Some(b), accumulate: false };
    cpu.product([(&x, conversion), (&w, conversion)], memory, out);
}

/// dx (rows, inputs) = dy W, dw (outputs, inputs) = dy^T x and db = column sums of dy, the latter
/// two added with `accumulate`.
pub(super) fn backward(
    cpu: &Cpu,
    workspace: &mut Workspace,
    dx: &mut [f32],
    dw: &mut [f32],
    db: &mut [f32],
    dy: &[f32],
    x: &[f32],
    w: &[f32],
    shape: LinearShape,
    recipe: &LinearRecipe,
    random: &Random,
    accumulate: bool,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    let (dy, x) = (&dy[..rows * outputs], &x[..rows * inputs]);
    let memory = (workspace.a.as_mut(), workspace.b[0].as_mut());
    let operands = [
        (Matrix::rows_by_depth(dy, rows, outputs), OperandId::Dy),
        (Matrix::depth_by_rows(w, inputs, outputs), OperandId::W),
    ];
    let out = Output { c: dx, stride: inputs, alpha: 1.0, bias: None, accumulate: false };
    product(cpu, memory, operands, recipe.dgrad, GemmId::Dgrad, random, out);

    // What the forward pass kept of x: in an FP8 recipe its FP8 form.
    let kept = (recipe.forward == Forward::Fp8).then(|| fp8_scale(cpu, x));
    let memory = (workspace.a.with_vector_sums(), workspace.b[0].as_mut());
    let operands = [
        (Matrix::depth_by_rows(dy, outputs, rows), OperandId::Dy),
        (Matrix::depth_by_rows(x, inputs, rows).as_fp8(kept), OperandId::X),
    ];
    let out = Output { c: dw, stride: inputs, alpha: 1.0, bias: None, accumulate };
    product(cpu, memory, operands, recipe.wgrad, GemmId::Wgrad, random, out);
    // dy^T passed through packing row by row; its row sums are the bias gradient.
    for (db, sum) in db.iter_mut().zip(workspace.a.vector_sums()) {
        *db = if accumulate { *db + sum } else { *sum };
    }
}

/// One backward GEMM, its first operand being dy.
fn product(
    cpu: &Cpu,
    memory: (PackedMut<'_>, PackedMut<'_>),
    [(a, a_id), (b, b_id)]: [(Matrix<'_>, OperandId); 2],
    format: Backward,
    gemm: GemmId,
    random: &Random,
    out: Output<'_>,
) {
    let mxfp4 = match format {
        Backward::F32 => return cpu.product([&a, &b].map(|m| (m, Conversion::F32)), memory, out),
        Backward::Bf16 => return cpu.product([&a, &b].map(|m| (m, Conversion::Bf16)), memory, out),
        Backward::Mxfp4(mxfp4) => mxfp4,
    };
    let mut signs = [0.0; mx::MAX_GROUP];
    let signs = &mut signs[..mxfp4.transform.map_or(0, |t| t.group)];
    if let Some(transform) = mxfp4.transform {
        let draw = match transform.signs {
            Signs::Random => random.signs(gemm),
            Signs::Fixed => Draw::fixed_signs(random.seed),
        };
        draw.fill_signs(signs);
    }
    let rotated = |rounding: Rounding, operand| {
        Conversion::Mxfp4(Rotation { signs, rounding, draw: random.rounding(operand) })
    };
    let operands = [(&a, rotated(mxfp4.dy, a_id)), (&b, rotated(mxfp4.other, b_id))];
    let alpha = mx::product_scale(mxfp4.dy, mxfp4.other);
    cpu.product(operands, memory, Output { alpha, ..out });
}

/// The scale that FP8 gives to a tensor.
fn fp8_scale(cpu: &Cpu, x: &[f32]) -> f32 {
    let max = cpu.install(|| {
        x.par_chunks(JOB_ELEMENTS).map(|x| max_magnitude(cpu.isa(), x)).reduce(|| 0, u32::max)
    });
    mx::e4m3_scale(f32::from_bits(max))
}

simd_fn! {
    /// Bits of the largest magnitude; a NaN is larger than everything.
    fn max_magnitude(x: &[f32]) -> u32 {
        x.iter().fold(0, |max, v| max.max(v.to_bits() & 0x7fff_ffff))
    }
}
