//! Muon's updates of matrices (`optim/muon.rs`): a matrix after the other, with its products by
//! cuBLASLt and what lies between them by `kernels/optimize_muon.cu`.
//!
//! Whether there is an update is decided on the device, as of everything else: products of a step
//! that is not done multiply what lies there, and nobody looks at them.
//!
//! NOTE: 28 launches a matrix. Matrices of one shape could be multiplied in one batch; that takes
//! room for all of them.

use super::device::gemm::{Operand, Product, Type};
use super::device::launch;
use super::device::memory::{Arena, Piece};
use super::step::{OfMoments, PIECE, Step, THREADS};
use super::{Cuda, Workspace};
use crate::backend::Slot;
use crate::optim::muon::{Movement, QUINTIC, STEPS};
use crate::optim::{Optimizer, OptimizerStep};

/// What the update of one matrix after the other is computed in, in bf16.
pub(super) struct Scratch {
    /// X and B X: (rows, columns).
    x: Piece,
    product: Piece,
    /// A and B, of the shorter dimension.
    gram: Piece,
    polynomial: Piece,
    /// (pieces) f64: sums of squares.
    partials: Piece,
}

/// Where a step finds and leaves things, as addresses.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Of all parameters.
    pub(super) table: u64,
    pub(super) sums: u64,
    /// Of a trial; else 0.
    pub(super) trial: u64,
    /// Zeros of each parameter, where its momentum has one scale, and that is being chosen.
    pub(super) largest: u64,
    /// Of what is stored then; else 0.
    pub(super) scales: u64,
}

impl Scratch {
    /// For the largest of the matrices that an optimizer orthogonalizes.
    pub(super) fn new(arena: &mut Arena, slots: &[Slot], optimizer: &Optimizer) -> Self {
        let (mut whole, mut square) = (0, 0);
        for slot in slots.iter().filter(|slot| optimizer.orthogonalizes(slot.kind)) {
            let short = slot.shape()[0].min(slot.shape()[1]);
            (whole, square) = (whole.max(slot.len), square.max(short * short));
        }
        let [x, product, gram, polynomial] =
            [whole, whole, square, square].map(|len| arena.bytes(2 * len));
        Self { x, product, gram, polynomial, partials: arena.bytes(8 * whole.div_ceil(PIECE)) }
    }

    /// Moves a matrix and stores its momentum, or tries it.
    pub(super) fn update(
        &mut self,
        cuda: &Cuda,
        workspace: &Workspace,
        slot: Slot,
        place: Place,
        step: &OptimizerStep,
    ) {
        let Place { table, sums, trial, largest, scales } = place;
        let (number, grid) = (slot.index as u32, grid(cuda, slot.len));
        let (x, partials) = (self.x.address, self.partials.address);
        let update_momentum = |trial: u64, scales: u64| {
            launch!(cuda.gpu, "update_momentum", grid, THREADS, 0;
                x, partials, table, number, sums, trial, Step::new(step),
                OfMoments::of_momentum(step), scales);
        };
        if trial == 0 && scales != 0 {
            update_momentum(largest, 0);
            launch!(cuda.gpu, "choose_scales", [1, 1, 1], THREADS, 0;
                scales, largest, table, number, 1u32, sums, Step::new(step));
        }
        update_momentum(trial, if trial == 0 { scales } else { 0 });
        launch!(cuda.gpu, "normalize_momentum", grid, THREADS, 0; x, partials, slot.len as u64);
        self.orthogonalize(cuda, workspace, slot.shape());
        let Movement { keep, size } = Movement::new(step, slot.shape());
        launch!(cuda.gpu, "move_matrix", grid, THREADS, 0;
            table, number, self.x.address, sums, trial, Step::new(step), keep, size);
    }

    /// The five steps.
    fn orthogonalize(&mut self, cuda: &Cuda, workspace: &Workspace, [rows, cols]: [usize; 2]) {
        let (short, long) = (rows.min(cols), rows.max(cols));
        let [gram, polynomial] = [self.gram.address, self.polynomial.address];
        let [of_gram, of_square, of_x] = [QUINTIC[1], QUINTIC[2], QUINTIC[0]];
        let multiply = |sizes, a, b, c| {
            cuda.product(workspace, &Product::new(Type::Bf16, sizes, a, b, c));
        };
        let add = |product: u64, x: u64, of_x: f32, of_product: f32, len: usize| {
            launch!(cuda.gpu, "add_multiples", grid(cuda, len), THREADS, 0;
                product, x, of_x, of_product, len as u64);
        };
        for _ in 0..STEPS {
            let [x, product] = [self.x.address, self.product.address];
            // A matrix that has more rows than columns is not transposed: its columns are the
            // vectors of A then, and X B^T stands for B X.
            let vectors = match rows <= cols {
                true => Operand::rows(x, cols),
                false => Operand::columns(x, cols),
            };
            multiply([short, short, long], vectors, vectors, gram);
            let [by_rows, by_columns] = [Operand::rows(gram, short), Operand::columns(gram, short)];
            multiply([short; 3], by_rows, by_columns, polynomial);
            add(polynomial, gram, of_gram, of_square, short * short);
            let of_polynomial = Operand::rows(polynomial, short);
            let [first, second] = match rows <= cols {
                true => [of_polynomial, Operand::columns(x, cols)],
                false => [Operand::rows(x, cols), of_polynomial],
            };
            multiply([rows, cols, short], first, second, product);
            add(product, x, of_x, 1.0, rows * cols);
            std::mem::swap(&mut self.x, &mut self.product);
        }
    }
}

/// Blocks of threads that take 4 elements each, or pieces.
fn grid(cuda: &Cuda, len: usize) -> [usize; 3] {
    let most = 8 * cuda.gpu.multiprocessors as usize;
    [len.div_ceil(PIECE).min(most), 1, 1]
}
