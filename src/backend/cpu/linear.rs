//! The linear layers of a block: y = x W^T + b and its backward pass, in the formats of a recipe.
//!
//! Reduction dimensions: `inputs` forward, `outputs` in dgrad, `rows` in wgrad. Operands
//! are packed where they lie, transposed or not; no transposed copy is made.

use rayon::prelude::*;

use super::gemm::{Conversion, Format, Matrix, Output, PackedMut, Quantization};
use super::isa::{Isa, simd_fn};
use super::workspace::{ScratchSize, Workspace};
use super::{Buffer, Cpu, JOB_ELEMENTS, gelu};
use crate::backend::{
    Activation, Epilogue, Linear, LinearBackward, LinearForward, LinearShape, OutputGradient,
    WorkspaceShape,
};
use crate::formats::{self, Gemm, GemmId, LinearRecipe, Operand, OperandId, OperandSource, Random};

/// What these layers need of a workspace for the recipes of a shape.
pub(super) fn scratch(isa: Isa, shape: &WorkspaceShape<'_>) -> ScratchSize {
    let mut size = ScratchSize::default();
    let (a, [b, ..]) = (&mut size.a, &mut size.b);
    for LinearShape { rows, inputs, outputs } in shape.linears.iter().copied() {
        for gemm in shape.recipes.iter().map(LinearRecipe::forward) {
            let (format, group) = (Format::carrying(gemm.format()), gemm.group());
            a.add(isa, [rows, inputs], format, group);
            b.add(isa, [outputs, inputs], format, group);
        }
        // As if both products were as each is, which costs next to nothing.
        for gemm in shape.backward_gemms() {
            let (format, group) = (Format::carrying(gemm.format()), gemm.group());
            a.add(isa, [rows, outputs], format, group); // dgrad: dy
            b.add(isa, [inputs, outputs], format, group); // dgrad: W
            a.add(isa, [outputs, rows], format, group); // wgrad: dy
            b.add(isa, [inputs, rows], format, group); // wgrad: x
        }
    }
    size
}

impl Linear for Cpu {
    fn linear_forward(
        &self,
        workspace: &mut Workspace,
        operands: LinearForward<'_, Self>,
        shape: LinearShape,
        recipe: &LinearRecipe,
    ) {
        let LinearForward { y, x, w, b, epilogue } = operands;
        let LinearShape { rows, inputs, outputs } = shape;
        let format = recipe.forward().format();
        let x = Matrix::rows_by_depth(&x[..rows * inputs], rows, inputs);
        let w = Matrix::rows_by_depth(w, outputs, inputs);
        let [x, w] = [x, w].map(|matrix| dequantized(self, matrix, format));
        let memory = (workspace.a.as_mut(), workspace.b[0].as_mut());
        let out = Output { c: y, stride: outputs, alpha: 1.0, bias: Some(b), accumulate: false };
        self.product([&x, &w].map(|matrix| (matrix, plain(format))), memory, out);
        if let Epilogue::Gelu { out, form } = epilogue {
            self.gelu_forward(out, y, rows * outputs, form);
        }
    }

    fn linear_backward(
        &self,
        workspace: &mut Workspace,
        operands: LinearBackward<'_, Self>,
        shape: LinearShape,
        recipe: &LinearRecipe,
        random: &Random,
    ) {
        let LinearBackward { dx, dw, db, dy, x, w, accumulate } = operands;
        let LinearShape { rows, inputs, outputs } = shape;
        let dy = match dy {
            OutputGradient::Whole(dy) => dy,
            OutputGradient::BehindGelu { d, y, form } => {
                self.gelu_backward(d, y, rows * outputs, form);
                &*d
            }
        };
        let (dy, x) = (&dy[..rows * outputs], &x[..rows * inputs]);
        let memory = (workspace.a.as_mut(), workspace.b[0].as_mut());
        let operands = [
            (Matrix::rows_by_depth(dy, rows, outputs), OperandId::Dy),
            (Matrix::depth_by_rows(w, inputs, outputs), OperandId::W),
        ];
        let out = Output { c: dx, stride: inputs, alpha: 1.0, bias: None, accumulate: false };
        product(self, memory, operands, recipe.dgrad(), GemmId::Dgrad, random, out);

        let mut x = Matrix::depth_by_rows(x, inputs, rows);
        if recipe.wgrad().b().source() == OperandSource::Forward {
            x = dequantized(self, x, recipe.forward().format());
        }
        let memory = (workspace.a.with_vector_sums(), workspace.b[0].as_mut());
        let dy = Matrix::depth_by_rows(dy, outputs, rows);
        let operands = [(dy, OperandId::Dy), (x, OperandId::X)];
        let out = Output { c: dw, stride: inputs, alpha: 1.0, bias: None, accumulate };
        product(self, memory, operands, recipe.wgrad(), GemmId::Wgrad, random, out);
        // dy^T passed through packing row by row; its row sums are the bias gradient.
        for (db, sum) in db.iter_mut().zip(workspace.a.vector_sums()) {
            *db = if accumulate { *db + sum } else { *sum };
        }
    }

    fn gelu_forward(&self, out: &mut Buffer<f32>, x: &Buffer<f32>, len: usize, form: Activation) {
        gelu::forward(self, &mut out[..len], &x[..len], form);
    }

    fn gelu_backward(&self, d: &mut Buffer<f32>, x: &Buffer<f32>, len: usize, form: Activation) {
        gelu::backward(self, &mut d[..len], &x[..len], form);
    }
}

/// One backward GEMM.
fn product(
    cpu: &Cpu,
    memory: (PackedMut<'_>, PackedMut<'_>),
    [(a, a_id), (b, b_id)]: [(Matrix<'_>, OperandId); 2],
    gemm: &Gemm,
    id: GemmId,
    random: &Random,
    out: Output<'_>,
) {
    if gemm.format() != formats::Format::MXFP4 {
        let conversion = plain(gemm.format());
        return cpu.product([(&a, conversion), (&b, conversion)], memory, out);
    }
    let mut signs = [0.0; formats::MAX_GROUP];
    let signs = formats::fill_signs(&mut signs, gemm.transform(), id, random);
    let quantized = |operand: &Operand, id| {
        let (rounding, range) = (operand.rounding(), operand.range());
        Conversion::Mxfp4(Quantization { signs, rounding, range, draw: random.rounding(id) })
    };
    let operands = [(&a, quantized(gemm.a(), a_id)), (&b, quantized(gemm.b(), b_id))];
    cpu.product(operands, memory, Output { alpha: gemm.alpha(), ..out });
}

/// To what carries a format other than MXFP4. E4M3 values are bf16 values too, so FP8 products are
/// exact in the bf16 kernel.
fn plain(format: formats::Format) -> Conversion<'static> {
    if format == formats::Format::F32 { Conversion::F32 } else { Conversion::Bf16 }
}

/// A matrix seen as `format` holds it, where what carries that would not round it so.
fn dequantized<'a>(cpu: &Cpu, matrix: Matrix<'a>, format: formats::Format) -> Matrix<'a> {
    let scale = (format == formats::Format::E4M3).then(|| fp8_scale(cpu, matrix.data));
    matrix.as_fp8(scale)
}

/// The scale that FP8 gives to a tensor.
fn fp8_scale(cpu: &Cpu, x: &[f32]) -> f32 {
    let max = cpu.install(|| {
        x.par_chunks(JOB_ELEMENTS).map(|x| amax_bits(cpu.isa(), x)).reduce(|| 0, u32::max)
    });
    formats::e4m3_scale(f32::from_bits(max))
}

simd_fn! {
    /// Bits of the largest magnitude; a NaN is larger than everything.
    fn amax_bits(x: &[f32]) -> u32 {
        x.iter().fold(0, |max, v| max.max(v.to_bits() & 0x7fff_ffff))
    }
}
