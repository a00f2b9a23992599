//! Muon's update of a matrix, by the arithmetic of `optim/muon.rs` compiled for each instruction
//! set: momentum in jobs, five steps of three products each, weights in jobs.
//!
//! Products multiply bf16 operands in panels, in tiles nowhere: their sums have one order on every
//! instruction set (AVX-512's instruction for pairs is two fused additions, the second one's first),
//! and with numbers that are not too small (`optim/muon.rs`) every product in them is exact, so that
//! the results are the same to the bit. Tiles would be faster, and would sum in another order.
//!
//! NOTE: a matrix that has more rows than columns is not transposed. Its columns are the vectors of
//! A then, and X B^T stands for B X.

use std::ops::Add;

use rayon::prelude::*;

use super::gemm::{
    Conversion, Format, Matrix, Output, PackMemory, PackSize, Packed, Packing, Role, pack_in,
};
use super::isa::{Isa, simd_fn};
use super::linear::amax_bits;
use super::memory::gradients_of;
use super::moments::{Moment, PIECE, Rounding, Stored, Then};
use super::{Arena, Buffer, Cpu, JOB_ELEMENTS, middle};
use crate::backend::{Slot, Trained};
use crate::optim::muon::{self, Momentum, Movement, QUINTIC, STEPS};
use crate::optim::{Largest, Optimizer, OptimizerStep};

/// What the update of one matrix after the other is computed in.
pub(super) struct Scratch {
    /// X and B X: (rows, columns).
    x: Buffer<f32>,
    product: Buffer<f32>,
    /// A and B, of the shorter dimension.
    gram: Buffer<f32>,
    polynomial: Buffer<f32>,
    /// Operands.
    a: PackMemory,
    b: PackMemory,
}

/// A step's update of one matrix.
pub(super) struct Update<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) step: &'a OptimizerStep,
    /// Of clipping.
    pub(super) gradient_scale: f32,
    /// The parameter.
    pub(super) index: usize,
}

impl Scratch {
    /// For the largest of the matrices that an optimizer orthogonalizes.
    pub(super) fn new(arena: &mut Arena, isa: Isa, slots: &[Slot], optimizer: &Optimizer) -> Self {
        let (mut whole, mut square) = (0, 0);
        let [mut a, mut b] = [PackSize::default(); 2];
        for slot in slots.iter().filter(|slot| optimizer.orthogonalizes(slot.kind)) {
            let [rows, cols] = slot.shape();
            let (short, long) = (rows.min(cols), rows.max(cols));
            (whole, square) = (whole.max(slot.len), square.max(short * short));
            a.add(isa, [short, long], Format::Bf16, 1);
            a.add(isa, [rows, short], Format::Bf16, 1);
            b.add(isa, [cols, short], Format::Bf16, 1);
        }
        let [x, product, gram, polynomial] =
            [whole, whole, square, square].map(|len| arena.alloc(len));
        let [a, b] = [a, b].map(|size| PackMemory::new(arena, size));
        Self { x, product, gram, polynomial, a, b }
    }
}

impl Update<'_> {
    /// Moves the matrix, and stores its momentum.
    pub(super) fn run(&self, scratch: &mut Scratch, trained: &mut Trained<'_, Cpu>) {
        let slot = trained.slots[self.index];
        self.orthogonalize(scratch, trained, Then::Store);
        let (movement, isa) = (Movement::new(self.step, slot.shape()), self.cpu.isa());
        let p = trained.weights[slot.range()].par_chunks_mut(JOB_ELEMENTS);
        p.zip(scratch.x.par_chunks(JOB_ELEMENTS))
            .for_each(|(p, x)| move_chunk(isa, p, x, movement));
    }

    /// What [`Update::run`] would leave.
    pub(super) fn attempt(&self, scratch: &mut Scratch, trained: &mut Trained<'_, Cpu>) -> Largest {
        let slot = trained.slots[self.index];
        let momentum = self.orthogonalize(scratch, trained, Then::Forget);
        let (movement, isa) = (Movement::new(self.step, slot.shape()), self.cpu.isa());
        let p = trained.weights[slot.range()].par_chunks(JOB_ELEMENTS);
        let x = scratch.x.par_chunks(JOB_ELEMENTS);
        let weight = p.zip(x).map(|(p, x)| try_chunk(isa, p, x, movement)).reduce(|| 0, u32::max);
        Largest { weight: f32::from_bits(weight), states: [momentum, 0.0] }
    }

    /// Leaves X of the matrix in scratch memory; the largest magnitude of its momentum, a NaN being
    /// larger than everything.
    fn orthogonalize(
        &self,
        scratch: &mut Scratch,
        trained: &mut Trained<'_, Cpu>,
        then: Then,
    ) -> f32 {
        let Self { cpu, step, index, .. } = *self;
        let slot = trained.slots[index];
        let Trained { states, layouts, gradients, .. } = trained;
        let beta = step.optimizer.muon.momentum;
        let rounding = Rounding::of(step, beta, index);
        let (isa, momentum) = (cpu.isa(), Momentum::new(step, self.gradient_scale));
        let place = &layouts[0].places[index];
        let mut up_to = |largest: f32, then: Then| {
            let part = Part {
                x: &mut scratch.x[..slot.len],
                m: Stored::of(&mut states[0], place, rounding, largest),
                g: gradients_of(gradients, index),
            };
            part.in_jobs(isa, momentum, then)
        };
        let largest = match then == Then::Store && place.element.has_one_scale() {
            true => f32::from_bits(up_to(0.0, Then::Forget).largest),
            false => 0.0,
        };
        let Found { squares, largest } = up_to(largest, then);
        scratch.orthogonalize(cpu, slot.shape(), muon::divisor(squares));
        f32::from_bits(largest)
    }
}

impl Scratch {
    /// X of u, which is where X is.
    fn orthogonalize(&mut self, cpu: &Cpu, [rows, cols]: [usize; 2], divisor: f32) {
        let Self { x, product, gram, polynomial, a, b } = self;
        let (isa, short, len) = (cpu.isa(), rows.min(cols), rows * cols);
        let [of_gram, of_square, of_x] = [QUINTIC[1], QUINTIC[2], QUINTIC[0]];
        let square = short * short;
        x[..len].par_chunks_mut(JOB_ELEMENTS).for_each(|x| normalize_chunk(isa, x, divisor));
        for _ in 0..STEPS {
            let vectors = match rows <= cols {
                true => Matrix::rows_by_depth(&x[..len], rows, cols),
                false => Matrix::depth_by_rows(&x[..len], cols, rows),
            };
            // Element (i, j) of A is the same sum as (j, i), in the same order.
            let packed = panels(cpu, &vectors, a);
            cpu.gemm(packed, packed, sums(gram, short));
            gram[..square].par_chunks_mut(JOB_ELEMENTS).for_each(|gram| round_chunk(isa, gram));
            let packed = panels(cpu, &Matrix::rows_by_depth(&gram[..square], short, short), a);
            cpu.gemm(packed, packed, sums(polynomial, short));
            combine(isa, &mut polynomial[..square], &gram[..square], [of_gram, of_square]);
            let of_polynomial = Matrix::rows_by_depth(&polynomial[..square], short, short);
            let [first, second] = match rows <= cols {
                true => [of_polynomial, Matrix::depth_by_rows(&x[..len], cols, rows)],
                false => [Matrix::rows_by_depth(&x[..len], rows, cols), of_polynomial],
            };
            let (first, second) = (panels(cpu, &first, a), panels(cpu, &second, b));
            cpu.gemm(first, second, sums(product, cols));
            combine(isa, &mut product[..len], &x[..len], [of_x, 1.0]);
            std::mem::swap(x, product);
        }
    }
}

/// An operand in bf16.
fn panels<'a>(cpu: &Cpu, source: &Matrix<'_>, memory: &'a mut PackMemory) -> Packed<'a> {
    pack_in(Packing::Panels, cpu, source, Conversion::Bf16, Role::B, memory.as_mut())
}

/// A product as it is.
fn sums(c: &mut [f32], stride: usize) -> Output<'_> {
    Output { c, stride, alpha: 1.0, bias: None, accumulate: false }
}

/// Elements of `product` become multiples of those of `x` and of their own.
fn combine(isa: Isa, product: &mut [f32], x: &[f32], factors: [f32; 2]) {
    let product = product.par_chunks_mut(JOB_ELEMENTS);
    product
        .zip(x.par_chunks(JOB_ELEMENTS))
        .for_each(|(product, x)| combine_chunk(isa, product, x, factors));
}

/// A matrix whose momentum takes in its gradient, or a part of it.
struct Part<'a> {
    /// Becomes u.
    x: &'a mut [f32],
    m: Stored<'a>,
    g: &'a [f32],
}

/// What is found on the way.
struct Found {
    /// Sum of squares of u.
    squares: f64,
    /// Bits of the largest magnitude of m.
    largest: u32,
}

impl Add for Found {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let largest = self.largest.max(other.largest);
        Self { squares: self.squares + other.squares, largest }
    }
}

impl Part<'_> {
    /// All of it, summed in one order.
    fn in_jobs(self, isa: Isa, momentum: Momentum, then: Then) -> Found {
        let Self { x, m, g } = self;
        let Some(middle) = middle(g.len()) else {
            return Part { x, m, g }.run(isa, momentum, then);
        };
        let ((x, right_x), [m, right_m]) = (x.split_at_mut(middle), m.split_at(middle));
        let (g, right_g) = g.split_at(middle);
        let (left, right) = rayon::join(
            || Part { x, m, g }.in_jobs(isa, momentum, then),
            || Part { x: right_x, m: right_m, g: right_g }.in_jobs(isa, momentum, then),
        );
        left + right
    }

    fn run(self, isa: Isa, momentum: Momentum, then: Then) -> Found {
        let Self { x, mut m, g } = self;
        let mut found = Found { squares: 0.0, largest: 0 };
        let mut decoded = [0.0; PIECE];
        for (i, (x, g)) in x.chunks_mut(PIECE).zip(g.chunks(PIECE)).enumerate() {
            let (first, decoded) = (i * PIECE, &mut decoded[..g.len()]);
            m.load(isa, Moment::First, first, decoded);
            let squares = momentum_chunk(isa, x, decoded, g, momentum);
            found = found + Found { squares, largest: amax_bits(isa, decoded) };
            if then == Then::Store {
                m.store(isa, Moment::First, first, decoded);
            }
        }
        found
    }
}

simd_fn! {
    /// The sum of squares of u.
    fn momentum_chunk(u: &mut [f32], m: &mut [f32], g: &[f32], momentum: Momentum) -> f64 {
        let mut lanes = [0.0f64; 8];
        for ((u, m), g) in u.chunks_mut(8).zip(m.chunks_mut(8)).zip(g.chunks(8)) {
            for (((lane, u), m), g) in lanes.iter_mut().zip(u).zip(m).zip(g) {
                (*m, *u) = momentum.of(*m, *g);
                *lane += f64::from(*u) * f64::from(*u);
            }
        }
        lanes.iter().sum()
    }
}

simd_fn! {
    fn normalize_chunk(x: &mut [f32], divisor: f32) {
        x.iter_mut().for_each(|x| *x = muon::normalized(*x, divisor));
    }
}

simd_fn! {
    fn round_chunk(x: &mut [f32]) {
        x.iter_mut().for_each(|x| *x = muon::rounded(*x));
    }
}

simd_fn! {
    fn combine_chunk(product: &mut [f32], x: &[f32], factors: [f32; 2]) {
        let pairs = product.iter_mut().zip(x);
        pairs.for_each(|(product, x)| *product = muon::combined(factors, *x, *product));
    }
}

simd_fn! {
    fn move_chunk(p: &mut [f32], x: &[f32], movement: Movement) {
        p.iter_mut().zip(x).for_each(|(p, x)| *p = movement.of(*p, *x));
    }
}

simd_fn! {
    /// The bits of the largest magnitude that [`move_chunk`] would leave.
    fn try_chunk(p: &[f32], x: &[f32], movement: Movement) -> u32 {
        p.iter().zip(x).fold(0, |most, (p, x)| most.max(movement.of(*p, *x).abs().to_bits()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::conformance::random;
    use crate::optim::{OptimizerKind, ParamKind};

    /// A (m, k) B (n, k)^T with sums in the order of products in panels.
    fn product(a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
        let dot = |a: &[f32], b: &[f32]| {
            let pairs = a.chunks(2).zip(b.chunks(2));
            let terms = pairs.flat_map(|(a, b)| a.iter().zip(b).rev());
            terms.fold(0.0f32, |sum, (a, b)| sum + a * b)
        };
        a.chunks(k).flat_map(|a| b.chunks(k).map(move |b| dot(a, b))).collect()
    }

    fn transpose(x: &[f32], cols: usize) -> Vec<f32> {
        (0..cols).flat_map(|j| x.iter().skip(j).step_by(cols).copied()).collect()
    }

    /// X of u by the definition, of no more rows than columns.
    fn plain(u: &[f32], [rows, cols]: [usize; 2], divisor: f32) -> Vec<f32> {
        let mut x: Vec<f32> = u.iter().map(|u| muon::normalized(*u, divisor)).collect();
        let combined = |factors, x: &[f32], product: Vec<f32>| -> Vec<f32> {
            x.iter().zip(product).map(|(x, p)| muon::combined(factors, *x, p)).collect()
        };
        for _ in 0..STEPS {
            let a: Vec<f32> = product(&x, &x, cols).into_iter().map(muon::rounded).collect();
            let square = product(&a, &transpose(&a, rows), rows);
            let b = combined([-4.7750, 2.0315], &a, square);
            x = combined([3.4445, 1.0], &x, product(&b, &transpose(&x, cols), rows));
        }
        x
    }

    /// On any number of threads, and with rows so small that what they leave of each other would be
    /// below f32's ordinary numbers.
    #[test]
    fn every_instruction_set_has_the_bits_of_plain_loops() {
        for (rows, cols) in [(1, 1), (7, 19), (19, 7), (48, 130), (130, 48), (33, 33)] {
            let mut u = random(rows * cols, 5);
            let last = rows * cols - cols;
            u[..cols].iter_mut().for_each(|u| *u *= 1e-38);
            u[last..].iter_mut().for_each(|u| *u *= 1e-14);
            let squares = u.iter().map(|u| f64::from(*u).powi(2)).sum();
            let divisor = muon::divisor(squares);
            let expected = match rows <= cols {
                true => plain(&u, [rows, cols], divisor),
                false => transpose(&plain(&transpose(&u, cols), [cols, rows], divisor), rows),
            };
            let (index, start, len, kind) = (0, 0, rows * cols, ParamKind::Matrix);
            let slot = Slot { index, start, len, rows, kind };
            let optimizer = Optimizer::new(OptimizerKind::Muon);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                for threads in [1, 3] {
                    let cpu = Cpu::with_isa(threads, isa).unwrap();
                    let scratch = |arena: &mut Arena| Scratch::new(arena, isa, &[slot], &optimizer);
                    let mut measuring = Arena::measuring();
                    scratch(&mut measuring);
                    let mut scratch = scratch(&mut Arena::mapped(measuring.used()).unwrap());
                    scratch.x.copy_from_slice(&u);
                    cpu.install(|| scratch.orthogonalize(&cpu, [rows, cols], divisor));
                    assert!(*scratch.x == expected[..], "{}, ({rows}, {cols})", isa.name());
                }
            }
        }
    }
}
