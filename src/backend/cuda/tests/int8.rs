//! Products of int8 by integer tensor cores.

use super::device::gemm::{Operand, Product};
use super::*;
use crate::backend::{Epilogue, Linear as _, LinearForward, LinearShape, Numbers};
use crate::formats::{int8_scale, round_to_int8};
use crate::recipe::Recipe;

/// Sums are exact, also the largest there are.
#[test]
fn integer_products_are_exact() {
    let Some(cuda) = gpu() else { return };
    let sequences = Sequences { batch: 1, length: 16 };
    let scratch = workspace(&cuda, sequences, 32, 1, 8, Precision::Bf16);
    for (case, sizes) in
        [[32, 16, 16], [96, 48, 80], [160, 80, 48], [128, 208, 16384]].into_iter().enumerate()
    {
        cuda.gpu.scope(|| check_product(&cuda, &scratch, sizes, case as u64));
    }
}

fn check_product(cuda: &Cuda, scratch: &Workspace, [m, n, k]: [usize; 3], seed: u64) {
    let operand = |vectors: usize, seed| {
        let values = random(vectors * k, seed);
        let mut bytes: Vec<i8> =
            values.iter().map(|v| (60.0 * v).clamp(-127.0, 127.0) as i8).collect();
        bytes[..k].fill(127);
        bytes
    };
    let (a, b) = (operand(m, 2 * seed), operand(n, 2 * seed + 1));
    let mut arena = Arena::allocated(&cuda.gpu, (m + n) * k + 4 * m * n + 1024).unwrap();
    let pieces = [(m + n) * k, 4 * m * n].map(|bytes| arena.bytes(bytes));
    let [operands, c] = pieces.each_ref().map(|piece| piece.address);
    write_bytes(cuda, operands, bytemuck::cast_slice(&[&a[..], &b].concat()));
    write_bytes(cuda, c, &vec![0xaa; 4 * m * n]);
    let [left, right] =
        [operands, operands + (m * k) as u64].map(|address| Operand::rows(address, k));
    let product =
        Product { c_type: Type::Int32, ..Product::new(Type::Int8, [m, n, k], left, right, c) };
    cuda.product(scratch, &product);
    let ours = read_bytes(cuda, c, 4 * m * n);
    for (at, bytes) in ours.as_chunks::<4>().0.iter().enumerate() {
        let (row, column) = (at / n, at % n);
        let pairs = a[row * k..][..k].iter().zip(&b[column * k..][..k]);
        let exact: i32 = pairs.map(|(a, b)| i32::from(*a) * i32::from(*b)).sum();
        assert_eq!(i32::from_le_bytes(*bytes), exact, "({row}, {column}) of {m} {n} {k}");
    }
}

/// Results of few rows, and of so many that they take several pieces, the last of them shorter,
/// have the bits of their sums times both scales, plus the bias.
#[test]
fn results_are_their_sums_times_both_scales() {
    let Some(cuda) = gpu() else { return };
    let recipe = *"int8-switchback".parse::<Recipe>().unwrap().linear(0);
    for (rows, inputs, outputs) in [(1, 48, 80), (77, 80, 48), (4401, 32, 4096)] {
        let shape = LinearShape { rows, inputs, outputs };
        if cuda.numbers(shape, &recipe)[0] != Numbers::Int8 {
            println!("skipped: {} multiplies int8 as bf16 numbers", cuda.description());
            return;
        }
        cuda.gpu.scope(|| check_results(&cuda, shape, &recipe));
    }
}

fn check_results(cuda: &Cuda, shape: LinearShape, recipe: &formats::LinearRecipe) {
    let LinearShape { rows, inputs, outputs } = shape;
    let sequences = Sequences { batch: 1, length: rows };
    let channels = if rows < 100 { 80 } else { 1024 };
    let mut scratch = workspace(cuda, sequences, channels, 16, 8, Precision::Bf16);
    let [x, bias] = [(rows * inputs, 1), (outputs, 3)]
        .map(|(len, seed)| rounded(&random(len, seed), Precision::Bf16));
    let w = random(outputs * inputs, 2);
    let weights = [&w, &bias].map(|values| param(cuda, values));
    let mut y = poison(cuda, rows * outputs, Precision::Bf16);
    let operands = LinearForward {
        y: &mut y,
        x: &tensor(cuda, &x, Precision::Bf16),
        w: weights[0].param(alone(w.len())),
        b: Some(weights[1].param(alone(bias.len()))),
        mean: None,
        epilogue: Epilogue::None,
        turned: None,
    };
    cuda.linear_forward(&mut scratch, operands, shape, recipe);
    let ours = cuda.read_tensor(&y);

    let codes = |values: &[f32]| -> (Vec<i32>, f32) {
        let amax = f32::from_bits(amax_of(values));
        (values.iter().map(|v| round_to_int8(*v, amax) as i32).collect(), int8_scale(amax))
    };
    let (w, of_w) = codes(&w);
    for (row, (x, ours)) in x.chunks(inputs).zip(ours.chunks(outputs)).enumerate() {
        let (x, of_x) = codes(x);
        for (column, (w, ours)) in w.chunks(inputs).zip(ours).enumerate() {
            let sum: i32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            let exact = half::bf16::from_f32(sum as f32 * of_w * of_x + bias[column]);
            assert_eq!(ours.to_bits(), exact.to_f32().to_bits(), "({row}, {column})");
        }
    }
}
