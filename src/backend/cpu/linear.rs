//! The linear layers of a block: y = x W^T + b and its backward pass, in the formats of a recipe.
//!
//! Reduction dimensions: `inputs` forward, `outputs` in dgrad, `rows` in wgrad. Operands that packing
//! quantizes are packed where they lie, transposed or not; the others become numbers along the
//! reduction first (`quantize`), and these are packed.

use rayon::prelude::*;

use super::arena::Arena;
use super::gemm::{Conversion, Format, Matrix, Output, Packing, Quantization};
use super::isa::{Isa, simd_fn};
use super::quantize::{Source, conversion, packs_at_once, scale_result};
use super::restore::restore;
use super::workspace::{ScratchSize, Workspace};
use super::{Buffer, Cpu, JOB_ELEMENTS, gelu, swiglu};
use crate::backend::{
    Activation, Epilogue, Linear, LinearBackward, LinearForward, LinearShape, Numbers,
    OutputGradient, Part, WorkspaceShape,
};
use crate::formats::{
    self, Bits, Gemm, GemmId, LinearRecipe, Operand, OperandId, OperandSource, Random, Restoration,
    Rounding,
};

/// Columns that a job sums.
const COLUMNS_AT_ONCE: usize = 64;

/// What these layers need of a workspace for the recipes of a shape.
pub(super) fn scratch(isa: Isa, shape: &WorkspaceShape<'_>) -> ScratchSize {
    let mut size = ScratchSize::default();
    for LinearShape { rows, inputs, outputs } in shape.linears.iter().copied() {
        for recipe in shape.recipes {
            let forward = recipe.forward();
            let at_once = packs_at_once(forward, forward.b());
            add_gemm(isa, &mut size, forward, at_once, [rows, outputs, inputs]);
            if shape.backward {
                let w = (GemmId::Dgrad, recipe.dgrad(), forward.b(), [rows, outputs]);
                let x = (GemmId::Wgrad, recipe.wgrad(), forward.a(), [outputs, rows]);
                for (id, gemm, of_forward, [vectors, length]) in [w, x] {
                    let restoration = Restoration::of(recipe, id);
                    let columns = restoration.map_or(inputs, |restored| restored.depth(inputs));
                    let at_once = restoration.is_none() && packs_at_once(gemm, of_forward);
                    add_gemm(isa, &mut size, gemm, at_once, [vectors, columns, length]);
                    if gemm.b().source() == OperandSource::Forward {
                        size.values[2].add([length, inputs], forward.group());
                    }
                    if restoration.is_some() {
                        size.elements = size.elements.max(vectors * columns);
                    }
                }
            }
        }
    }
    size
}

/// Room for the operands of a product of m and n vectors of length k, packed at once or not.
fn add_gemm(isa: Isa, size: &mut ScratchSize, gemm: &Gemm, at_once: bool, [m, n, k]: [usize; 3]) {
    let group = gemm.group();
    if at_once {
        let format = Format::carrying(gemm.a().format());
        size.a.add(isa, [m, k], format, group);
        size.b[0].add(isa, [n, k], format, group);
    } else {
        // Padding is among the values.
        let (format, depth) = (conversion(gemm).format(), k.next_multiple_of(group));
        size.a.add(isa, [m, depth], format, 1);
        size.b[0].add(isa, [n, depth], format, 1);
        size.values[0].add([m, k], group);
        size.values[1].add([n, k], group);
        if gemm.is_corrected() {
            size.values[0].add_slope(m);
            size.values[1].add_slope(n);
        }
    }
}

impl Linear for Cpu {
    type Turned = ();

    fn turns(&self, _: LinearShape, _: &LinearRecipe) -> bool {
        false
    }

    fn turned(&self, _: &mut Arena, _: LinearShape) {}

    fn linear_forward(
        &self,
        workspace: &mut Workspace,
        operands: LinearForward<'_, Self>,
        shape: LinearShape,
        recipe: &LinearRecipe,
    ) {
        let LinearForward { y, x, w, b, mean, epilogue, turned: _ } = operands;
        let LinearShape { rows, inputs, outputs } = shape;
        let operands = [
            (Matrix::rows_by_depth(&x[..rows * inputs], rows, inputs), OperandId::X),
            (Matrix::rows_by_depth(w, outputs, inputs), OperandId::W),
        ];
        let (gemm, forward) = (recipe.forward(), recipe.forward().b());
        let (id, means, sums) = (GemmId::Dgrad, means_of(mean), false);
        let of = For { gemm, id, forward, means, random: &Random::NONE, sums, restored: None };
        let out = Output { c: y, stride: outputs, alpha: 1.0, bias: b, accumulate: false };
        self.multiply(workspace, operands, of, out);
        self.end_linear(y, epilogue, rows, outputs);
    }

    fn linear_backward(
        &self,
        workspace: &mut Workspace,
        operands: LinearBackward<'_, Self>,
        shape: LinearShape,
        recipe: &LinearRecipe,
        random: &Random,
    ) {
        let LinearBackward { dx, dw, db, dy, x, turned: _, w, mean, accumulate } = operands;
        let LinearShape { rows, inputs, outputs } = shape;
        let dy = match dy {
            OutputGradient::Whole(dy) => dy,
            OutputGradient::BehindGelu { d, y, form } => {
                self.gelu_backward(d, y, rows * outputs, form);
                &*d
            }
            OutputGradient::BehindSwiGlu { d, y } => {
                self.swiglu_backward(y, d, rows, outputs / 2);
                &*y
            }
        };
        let (dy, x) = (&dy[..rows * outputs], &x[..rows * inputs]);
        let dgrad = [
            (Matrix::rows_by_depth(dy, rows, outputs), OperandId::Dy),
            (Matrix::depth_by_rows(w, inputs, outputs), OperandId::W),
        ];
        let out = Output { c: dx, stride: inputs, alpha: 1.0, bias: None, accumulate: false };
        let gemm = recipe.dgrad();
        let id = GemmId::Dgrad;
        let restored = Restoration::of(recipe, id).map(|restoration| (restoration, x));
        let (forward, means, sums) = (recipe.forward().b(), means_of(mean), false);
        let of = For { gemm, id, forward, means, random, sums, restored };
        self.multiply(workspace, dgrad, of, out);

        let Some(dw) = dw else {
            if let Some(db) = db {
                let sums = &mut workspace.a.vector_sums_mut()[..outputs];
                column_sums(self, sums, dy);
                add_sums(db, sums, accumulate);
            }
            return;
        };
        let wgrad = [
            (Matrix::depth_by_rows(dy, outputs, rows), OperandId::Dy),
            (Matrix::depth_by_rows(x, inputs, rows), OperandId::X),
        ];
        let out = Output { c: dw, stride: inputs, alpha: 1.0, bias: None, accumulate };
        let (gemm, id) = (recipe.wgrad(), GemmId::Wgrad);
        let restored = Restoration::of(recipe, id).map(|restoration| (restoration, w));
        let (forward, means, sums) = (recipe.forward().a(), &[][..], true);
        let of = For { gemm, id, forward, means, random, sums, restored };
        self.multiply(workspace, wgrad, of, out);
        // dy^T passed through packing row by row; its row sums are the bias gradient.
        if let Some(db) = db {
            add_sums(db, workspace.a.vector_sums(), accumulate);
        }
    }

    fn numbers(&self, _shape: LinearShape, recipe: &LinearRecipe) -> [Numbers; 3] {
        let [x, w] = [recipe.forward().a(), recipe.forward().b()];
        [(recipe.forward(), w), (recipe.dgrad(), w), (recipe.wgrad(), x)].map(|(gemm, forward)| {
            let format = match packs_at_once(gemm, forward) {
                true => Format::carrying(gemm.a().format()),
                false => conversion(gemm).format(),
            };
            match format {
                Format::F32 => Numbers::F32,
                Format::Mxfp4 if Packing::best(self.isa(), format) == Packing::Panels => {
                    Numbers::Integers
                }
                Format::Bf16 | Format::Mxfp4 => Numbers::Bf16,
            }
        })
    }

    fn gelu_forward(&self, out: &mut Buffer<f32>, x: &Buffer<f32>, len: usize, form: Activation) {
        gelu::forward(self, &mut out[..len], &x[..len], form);
    }

    fn gelu_backward(&self, d: &mut Buffer<f32>, x: &Buffer<f32>, len: usize, form: Activation) {
        gelu::backward(self, &mut d[..len], &x[..len], form);
    }

    fn swiglu_forward(&self, out: &mut Buffer<f32>, y: &Buffer<f32>, rows: usize, m: usize) {
        swiglu::forward(self, &mut out[..rows * m], &y[..2 * rows * m], m);
    }

    fn swiglu_backward(&self, y: &mut Buffer<f32>, d: &Buffer<f32>, rows: usize, m: usize) {
        swiglu::backward(self, &mut y[..2 * rows * m], &d[..rows * m], m);
    }
}

/// What a GEMM is computed for.
#[derive(Clone, Copy)]
struct For<'a> {
    gemm: &'a Gemm,
    /// Of the transform's signs; of a forward pass none are drawn.
    id: GemmId,
    /// What the forward pass made of operand B, where B is made from that.
    forward: &'a Operand,
    /// The slow means of operand B as the forward pass has it, where that rounds it by them.
    means: &'a [f32],
    random: &'a Random,
    /// Whether the sums of A's vectors are wanted, which is transposed then: in the memory of A.
    sums: bool,
    /// What the result goes through, and the tensor that it then is the gradient of.
    restored: Option<(Restoration, &'a [f32])>,
}

impl Cpu {
    /// What y (rows, outputs) passes through behind its layer.
    pub(super) fn end_linear(
        &self,
        y: &Buffer<f32>,
        epilogue: Epilogue<'_, Self>,
        rows: usize,
        outputs: usize,
    ) {
        match epilogue {
            Epilogue::None => {}
            Epilogue::Gelu { out, form } => self.gelu_forward(out, y, rows * outputs, form),
            Epilogue::SwiGlu { out } => self.swiglu_forward(out, y, rows, outputs / 2),
        }
    }

    /// A GEMM of two operands by its recipe.
    fn multiply(
        &self,
        workspace: &mut Workspace,
        [(a, a_id), (mut b, b_id)]: [(Matrix<'_>, OperandId); 2],
        of: For<'_>,
        out: Output<'_>,
    ) {
        let For { gemm, id, forward, means, random, sums, restored } = of;
        let Workspace { a: a_memory, b: [b_memory, ..], values, elements, .. } = workspace;
        let [a_values, b_values, forward_values] = values;
        let mut signs = [0.0; formats::MAX_GROUP];
        let signs = formats::fill_signs(&mut signs, gemm.transform(), id, random);
        let from_forward = gemm.b().source() == OperandSource::Forward;
        if restored.is_none() && packs_at_once(gemm, forward) {
            let seen = if from_forward { forward } else { gemm.b() };
            let (a, b) =
                (dequantized(self, a, gemm.a().format()), dequantized(self, b, seen.format()));
            let converted = |operand: &Operand, id| {
                if operand.format() != formats::Format::MXFP4 {
                    return plain(operand.format());
                }
                let (rounding, range) = (operand.rounding(), operand.range());
                let draw = random.rounding(id);
                Conversion::Mxfp4(Quantization { signs, rounding, range, draw })
            };
            let operands = [(&a, converted(gemm.a(), a_id)), (&b, converted(gemm.b(), b_id))];
            let a_memory = if sums { a_memory.with_vector_sums() } else { a_memory.as_mut() };
            let out = Output { alpha: gemm.alpha(), ..out };
            return self.product(operands, (a_memory, b_memory.as_mut()), out);
        }
        if sums {
            column_sums(self, &mut a_memory.vector_sums_mut()[..a.rows], a.data);
        }
        if from_forward {
            let matrix = Matrix::rows_by_depth(b.data, b.depth, b.rows);
            let mut signs = [0.0; formats::MAX_GROUP];
            let signs = formats::fill_signs(&mut signs, forward.transform(), id, random);
            let bits = bits(random, b_id, false);
            let means = by_mean(forward, means);
            let source = Source { matrix, operand: forward, signs, bits, means };
            let data = forward_values.dequantized(self, source);
            b = Matrix::depth_by_rows(data, data.len() / b.depth, b.depth);
        }
        let (of_a, of_b) = (bits(random, a_id, a.transposed), bits(random, b_id, b.transposed));
        let a = Source { matrix: a, operand: gemm.a(), signs, bits: of_a, means: &[] };
        let means = by_mean(gemm.b(), means);
        let b = Source { matrix: b, operand: gemm.b(), signs, bits: of_b, means };
        let (a, b) = (a_values.quantize(self, a), b_values.quantize(self, b));
        let conversion = conversion(gemm);
        let operands = [(&a.matrix, conversion), (&b.matrix, conversion)];
        let memory = (a_memory.as_mut(), b_memory.as_mut());
        let alpha = gemm.alpha() * (a.scale * b.scale) * (a.correction * b.correction);
        if let Some((restoration, tensor)) = restored {
            let columns = b.matrix.rows;
            let c = &mut elements[..a.matrix.rows * columns];
            let in_its_basis =
                Output { c: &mut *c, stride: columns, alpha, bias: None, accumulate: false };
            self.product(operands, memory, in_its_basis);
            return restore(self, restoration, c, tensor, out);
        }
        let scales = [a.vector_scales, b.vector_scales];
        if scales.iter().all(|scales| scales.is_empty()) {
            return self.product(operands, memory, Output { alpha, ..out });
        }
        let (rows, columns) = (a.matrix.rows, b.matrix.rows);
        let Output { c, stride, bias, accumulate, .. } = out;
        assert!(stride == columns && !accumulate, "results that vectors scale are overwritten");
        let without = Output { c, stride, alpha, bias: None, accumulate };
        self.product(operands, memory, without);
        scale_result(self, &mut c[..rows * columns], columns, scales, bias);
    }
}

fn add_sums(to: &mut [f32], sums: &[f32], accumulate: bool) {
    for (to, sum) in to.iter_mut().zip(sums) {
        *to = if accumulate { *to + sum } else { *sum };
    }
}

/// A weight's slow means; empty where there are none.
fn means_of(mean: Option<Part<'_, Cpu>>) -> &[f32] {
    mean.map_or(&[], |Part { flat, slot }| &flat[slot.range()])
}

/// The means that an operand is rounded by.
fn by_mean<'a>(operand: &Operand, means: &'a [f32]) -> &'a [f32] {
    if operand.rounding() == Rounding::ByMean { means } else { &[] }
}

/// The random bits of an operand.
fn bits(random: &Random, id: OperandId, transposed: bool) -> Bits {
    Bits { elements: random.rounding(id), scales: random.rounding(id.of_scales()), transposed }
}

/// The sums of the columns of `x`, in the order of its rows.
fn column_sums(cpu: &Cpu, sums: &mut [f32], x: &[f32]) {
    let columns = sums.len();
    cpu.install(|| {
        sums.par_chunks_mut(COLUMNS_AT_ONCE).enumerate().for_each(|(i, sums)| {
            sums.fill(0.0);
            for row in x.chunks_exact(columns) {
                let row = &row[i * COLUMNS_AT_ONCE..][..sums.len()];
                sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
            }
        });
    });
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
    formats::e4m3_scale(cpu.amax_of(x))
}

impl Cpu {
    /// The largest magnitude; a NaN is larger than everything.
    pub(super) fn amax_of(&self, x: &[f32]) -> f32 {
        f32::from_bits(self.install(|| {
            x.par_chunks(JOB_ELEMENTS).map(|x| amax_bits(self.isa(), x)).reduce(|| 0, u32::max)
        }))
    }
}

simd_fn! {
    /// Bits of the largest magnitude; a NaN is larger than everything.
    pub(super) fn amax_bits(x: &[f32]) -> u32 {
        x.iter().fold(0, |max, v| max.max(v.to_bits() & 0x7fff_ffff))
    }
}
