//! Adapters of linear layers.

use super::Cpu;
use super::gemm::{Conversion, Matrix, Output, PackMemory};
use super::isa::Isa;
use super::workspace::{ScratchSize, Workspace};
use crate::backend::{Adapt, LoraBackward, LoraForward, LoraShape, WorkspaceShape};

/// What adapters need of a workspace.
pub(super) fn scratch(isa: Isa, shape: &WorkspaceShape<'_>) -> ScratchSize {
    let mut size = ScratchSize::default();
    for LoraShape { rows, inputs, outputs, rank, precision, .. } in shape.adapters.iter().copied() {
        let format = Conversion::to(precision).format();
        let mut product = |[m, n, k]: [usize; 3]| {
            size.a.add(isa, [m, k], format, 1);
            size.b[0].add(isa, [n, k], format, 1);
        };
        product([rows, rank, inputs]);
        product([rows, outputs, rank]);
        if shape.backward {
            product([rows, rank, outputs]);
            product([rows, inputs, rank]);
            product([rank, inputs, rows]);
            product([outputs, rank, rows]);
            size.elements = size.elements.max(rows * rank);
        }
    }
    size
}

impl Adapt for Cpu {
    fn lora_forward(
        &self,
        workspace: &mut Workspace,
        LoraForward { y, low, x, a, b }: LoraForward<'_, Self>,
        LoraShape { rows, inputs, outputs, rank, scale, precision }: LoraShape,
    ) {
        let Workspace { a: left, b: [right, ..], .. } = workspace;
        let mut multiply = |a: Matrix<'_>, b: Matrix<'_>, out: Output<'_>| {
            self.multiply_numbers(
                [a, b],
                Conversion::to(precision),
                (&mut *left, &mut *right),
                out,
            );
        };
        let x = Matrix::rows_by_depth(&x[..rows * inputs], rows, inputs);
        let out = Output { c: low, stride: rank, alpha: 1.0, bias: None, accumulate: false };
        multiply(x, Matrix::rows_by_depth(a, rank, inputs), out);
        let low = Matrix::rows_by_depth(&low[..rows * rank], rows, rank);
        let out = Output { c: y, stride: outputs, alpha: scale, bias: None, accumulate: true };
        multiply(low, Matrix::rows_by_depth(b, outputs, rank), out);
    }

    fn lora_backward(
        &self,
        workspace: &mut Workspace,
        operands: LoraBackward<'_, Self>,
        LoraShape { rows, inputs, outputs, rank, scale, precision }: LoraShape,
    ) {
        let LoraBackward { dx, da, db, dy, x, low, a, b, accumulate } = operands;
        let Workspace { a: left, b: [right, ..], elements, .. } = workspace;
        let mut multiply = |a: Matrix<'_>, b: Matrix<'_>, out: Output<'_>| {
            self.multiply_numbers(
                [a, b],
                Conversion::to(precision),
                (&mut *left, &mut *right),
                out,
            );
        };
        let (dy, x) = (&dy[..rows * outputs], &x[..rows * inputs]);
        // The gradient of `low`.
        let d = &mut elements[..rows * rank];
        let out = Output { c: &mut *d, stride: rank, alpha: scale, bias: None, accumulate: false };
        let by_outputs = Matrix::rows_by_depth(dy, rows, outputs);
        multiply(by_outputs, Matrix::depth_by_rows(b, rank, outputs), out);
        let out = Output { c: dx, stride: inputs, alpha: 1.0, bias: None, accumulate: true };
        let by_rank = Matrix::rows_by_depth(d, rows, rank);
        multiply(by_rank, Matrix::depth_by_rows(a, inputs, rank), out);
        if let Some(da) = da {
            let out = Output { c: da, stride: inputs, alpha: 1.0, bias: None, accumulate };
            let by_rows = Matrix::depth_by_rows(d, rank, rows);
            multiply(by_rows, Matrix::depth_by_rows(x, inputs, rows), out);
        }
        if let Some(db) = db {
            let out = Output { c: db, stride: rank, alpha: scale, bias: None, accumulate };
            let by_rows = Matrix::depth_by_rows(dy, outputs, rows);
            multiply(by_rows, Matrix::depth_by_rows(&low[..rows * rank], rank, rows), out);
        }
    }
}

impl Cpu {
    /// A product of two operands in f32 or bf16.
    fn multiply_numbers(
        &self,
        [a, b]: [Matrix<'_>; 2],
        conversion: Conversion<'_>,
        (left, right): (&mut PackMemory, &mut PackMemory),
        out: Output<'_>,
    ) {
        let operands = [(&a, conversion), (&b, conversion)];
        self.product(operands, (left.as_mut(), right.as_mut()), out);
    }
}
