//! Adapters of linear layers: products by cuBLASLt, in the precision of activations.

use super::device::gemm::{Operand, Product};
use super::{Cuda, Workspace};
use crate::backend::{Adapt, LoraBackward, LoraForward, LoraShape};

impl Adapt for Cuda {
    fn lora_forward(
        &self,
        workspace: &mut Workspace,
        LoraForward { y, low, x, a, b }: LoraForward<'_, Self>,
        LoraShape { rows, inputs, outputs, rank, scale, .. }: LoraShape,
    ) {
        let precision = x.precision;
        let [a, b] = [a, b].map(|param| param.as_read_in(precision));
        let operands = [Operand::rows(x.address(), inputs), Operand::rows(a, inputs)];
        let to = low.write().address;
        let product =
            Product::new(precision.into(), [rows, rank, inputs], operands[0], operands[1], to);
        self.product(workspace, &product);
        let operands = [Operand::rows(to, rank), Operand::rows(b, rank)];
        let (sizes, to) = ([rows, outputs, rank], y.write().address);
        let product = Product {
            alpha: scale,
            accumulate: true,
            ..Product::new(precision.into(), sizes, operands[0], operands[1], to)
        };
        self.product(workspace, &product);
    }

    fn lora_backward(
        &self,
        workspace: &mut Workspace,
        operands: LoraBackward<'_, Self>,
        LoraShape { rows, inputs, outputs, rank, scale, .. }: LoraShape,
    ) {
        let LoraBackward { dx, da, db, dy, x, low, a, b, accumulate } = operands;
        let precision = dy.precision;
        let [a, b] = [a, b].map(|param| param.as_read_in(precision));
        let new = |sizes, left, right, to| Product::new(precision.into(), sizes, left, right, to);
        // The gradient of `low`.
        let d = workspace.low.address;
        let [left, right] = [Operand::rows(dy.address(), outputs), Operand::columns(b, rank)];
        let product = Product { alpha: scale, ..new([rows, rank, outputs], left, right, d) };
        self.product(workspace, &product);
        let ([left, right], to) =
            ([Operand::rows(d, rank), Operand::columns(a, inputs)], dx.write().address);
        let product = Product { accumulate: true, ..new([rows, inputs, rank], left, right, to) };
        self.product(workspace, &product);
        if let Some(da) = da {
            let [left, right] = [Operand::columns(d, rank), Operand::columns(x.address(), inputs)];
            let product = Product {
                c_type: da.place.precision.into(),
                accumulate,
                ..new([rank, inputs, rows], left, right, da.address())
            };
            self.product(workspace, &product);
        }
        if let Some(db) = db {
            let [left, right] =
                [Operand::columns(dy.address(), outputs), Operand::columns(low.address(), rank)];
            let product = Product {
                alpha: scale,
                c_type: db.place.precision.into(),
                accumulate,
                ..new([outputs, rank, rows], left, right, db.address())
            };
            self.product(workspace, &product);
        }
    }
}
