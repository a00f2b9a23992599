//! Muon's updates of matrices.

use super::optimize::{LENGTHS, Update, Values, some_values, step, stored};
use super::*;
use crate::optim::moments::is_stochastic;
use crate::optim::{Muon, muon};

/// What roundings to bf16 make of X, relatively: 2e-2, and of two that differ 3e-2. One that falls to
/// the other side grows with the small singular values, so sums in another order can differ as much.
const BOUND: f64 = 0.04;

fn muon() -> Optimizer {
    Optimizer::new(OptimizerKind::Muon)
}

/// What X of a matrix is after a step with this gradient: weights and momentum are 0 before.
fn orthogonalized<B: Harness>(b: &B, g: &[f32], [rows, cols]: [usize; 2]) -> Vec<f32> {
    let zeros = || vec![0.0; g.len()];
    let values: [Values; 1] = [[zeros(), zeros(), zeros(), g.to_vec()]];
    let step = step(muon());
    let mut update = Update::with_rows(b, &values, step.optimizer, Some(rows));
    update.add_losses(b, &[1.0], false);
    let sums = update.step(b, &step);
    assert!(sums.gradient_scale(&step).is_some(), "{}", b.name());
    let size = muon::Movement::new(&step, [rows, cols]).size;
    let [p, ..] = &update.read(b)[0];
    p.iter().map(|p| -p / size).collect()
}

/// What bf16 makes of a number.
fn to_bf16(x: f64) -> f64 {
    half::bf16::from_f64(x).to_f64()
}

/// The singular values of a matrix (rows, cols), of at least as many columns: its rows are turned
/// against each other until all are at right angles (Jacobi).
fn singular_values(x: &[f32], cols: usize) -> Vec<f64> {
    let mut rows: Vec<Vec<f64>> = x.chunks(cols).map(f64s).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for _ in 0..30 {
        for j in 1..rows.len() {
            let (before, rest) = rows.split_at_mut(j);
            for a in before {
                let b = &mut rest[0];
                let (square_a, square_b, both) = (dot(a, a), dot(b, b), dot(a, b));
                if both.abs() <= 1e-14 * (square_a * square_b).sqrt() {
                    continue;
                }
                let cot = (square_b - square_a) / (2.0 * both);
                let t = cot.signum() / (cot.abs() + (1.0 + cot * cot).sqrt());
                let (cos, sin) = (1.0 / (1.0 + t * t).sqrt(), t / (1.0 + t * t).sqrt());
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (cos * *a - sin * *b, sin * *a + cos * *b);
                }
            }
        }
    }
    rows.iter().map(|row| dot(row, row).sqrt()).collect()
}

fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols * rows).map(|i| x[i % rows * cols + i / rows]).collect()
}

/// Wide ones, tall ones and a square, at sizes that nothing divides; and the rule of one step.
pub(super) fn matrices_move_along_their_orthogonalized_momentum<B: Harness>(backends: &[B]) {
    for shape @ [rows, cols] in [[24, 61], [61, 24], [109, 367], [130, 33], [48, 48], [1, 7]] {
        let (len, seed) = (rows * cols, (1000 * rows + cols) as u64);
        let g = random(len, seed);
        // As the first step rounds it: 0.0975 of the gradient.
        let u = |m: &[f32], step: &OptimizerStep| -> Vec<f64> {
            let momentum = muon::Momentum::new(step, 1.0);
            m.iter().zip(&g).map(|(m, g)| f64::from(momentum.of(*m, *g).1)).collect()
        };
        let first = u(&vec![0.0; len], &step(muon()));
        let rounded = reference::orthogonalized(&first, shape, to_bf16);
        let exact = reference::orthogonalized(&f64s(&g), shape, |x| x);
        each(backends, |b| {
            let x = orthogonalized(b, &g, shape);
            within(b, &format!("X of {shape:?}"), &x, &rounded, BOUND);
            within(b, &format!("X of {shape:?} before roundings"), &x, &exact, BOUND);
            if rows != cols {
                let x = if rows < cols { x } else { transposed(&x, rows, cols) };
                let found = singular_values(&x, rows.max(cols));
                let within = found.iter().all(|s| (0.65..1.25).contains(s));
                assert!(within, "{}, {shape:?}: {found:?}", b.name());
            }
            // The next step, from weights and momentum that are something.
            let optimizer = Optimizer { muon: Muon { momentum: 0.8, ratio: 3.0 }, ..muon() };
            let step = step(optimizer);
            let (p, m) = (random(len, seed + 1), random(len, seed + 2));
            let values: [Values; 1] = [[p.clone(), m.clone(), vec![0.0; len], g.clone()]];
            let mut update = Update::with_rows(b, &values, optimizer, Some(rows));
            update.add_losses(b, &[1.0], false);
            update.step(b, &step);
            let [after, momentum, second] = &update.read(b)[0];
            assert!(second.is_empty(), "a matrix has no second moment");
            let beta = f64::from(0.8f32);
            let mean = |old: &[f64]| -> Vec<f64> {
                old.iter().zip(&g).map(|(m, g)| beta * m + (1.0 - beta) * f64::from(*g)).collect()
            };
            let exact = mean(&f64s(&m));
            within(b, "momentum", momentum, &exact, 1e-6);
            let next = u(&m, &step);
            let error = relative_error(&next, &mean(&exact));
            assert!(error < 3e-3, "Nesterov's momentum: {error}");
            let x = reference::orthogonalized(&next, shape, to_bf16);
            let rate = 3.0 * f64::from(step.lr);
            let size = rate * (rows as f64 / cols as f64).max(1.0).sqrt();
            let keep = 1.0 - rate * f64::from(optimizer.weight_decay);
            let moved: Vec<f32> =
                after.iter().zip(&p).map(|(w, p)| w - (keep * f64::from(*p)) as f32).collect();
            let expected: Vec<f64> = x.iter().map(|x| -size * x).collect();
            within(b, &format!("weights of {shape:?}"), &moved, &expected, BOUND);
        });
    }
}

/// Whatever a gradient is, X is finite, within its bound, and of zeros nothing.
pub(super) fn hard_matrices_stay_within_bounds<B: Harness>(backends: &[B]) {
    let shapes = [[40, 72], [72, 40], [64, 64], [1, 1], [1, 90], [90, 1]];
    for (shape, [rows, cols]) in shapes.map(|shape| (shape, shape)) {
        let len = rows * cols;
        let noise = random(len, 3);
        let of = |f: &dyn Fn(usize, usize) -> f32| -> Vec<f32> {
            (0..len).map(|i| f(i / cols, i % cols)).collect()
        };
        let sign =
            |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        let cases: [(&str, Vec<f32>, [f64; 2]); 12] = [
            ("zeros", vec![0.0; len], [0.0, 0.0]),
            ("rank one", of(&|i, j| (1.0 + i as f32) * (j as f32 - 7.5)), [0.65, 1.25]),
            ("identical rows", of(&|_, j| noise[j]), [0.65, 1.25]),
            ("all the same", vec![0.3; len], [0.65, 1.25]),
            ("one number", of(&|i, j| if i + j == 0 { -2.0 } else { 0.0 }), [0.65, 1.25]),
            ("signs", of(&|i, j| sign(i, j)), [0.65, 1.25]),
            // Above and below the middle of two neighbours in bf16 by a pattern of its own.
            (
                "signs, rounded apart",
                of(&|i, j| sign(i, j) * if (i + j) % 3 == 0 { 1.00391 } else { 1.0039 }),
                [0.65, 1.25],
            ),
            (
                "a row far below",
                of(&|i, j| noise[i * cols + j] * if i == 0 { 1e-20 } else { 1.0 }),
                [0.0, 1.25],
            ),
            (
                "a row far above",
                of(&|i, j| noise[i * cols + j] * if i == 0 { 1e6 } else { 1.0 }),
                [0.6, 1.25],
            ),
            ("huge", noise.iter().map(|x| x * 1e17).collect(), [0.6, 1.25]),
            ("tiny", noise.iter().map(|x| x * 1e-12).collect(), [0.0, 1.25]),
            ("denormal", noise.iter().map(|x| x * 1e-40).collect(), [0.0, 1e-20]),
        ];
        for (what, g, [low, high]) in cases {
            each(backends, |b| {
                let what = format!("{}, {shape:?}, {what}", b.name());
                let x = orthogonalized(b, &g, shape);
                let x = if rows <= cols { x } else { transposed(&x, rows, cols) };
                assert!(x.iter().all(|x| x.abs() <= 1.25), "{what}: a number");
                let found = singular_values(&x, rows.max(cols));
                let largest = found.iter().fold(0.0f64, |most, s| most.max(*s));
                assert!((low..=high).contains(&largest), "{what}: {largest} of {found:?}");
            });
        }
    }
}

/// What is stored of momentum after 20 steps is what the scalar arithmetic stores, byte by byte,
/// whatever it is kept in and master weights are.
pub(super) fn momentum_is_stored_to_the_byte<B: Harness>(backends: &[B]) {
    let (values, len) = (some_values(), LENGTHS[0]);
    for (moments, momentum, master) in [
        (Moments::F32, 0.95, Master::F32),
        (Moments::Bf16, 0.95, Master::Split),
        (Moments::Bf16, 0.995, Master::F32),
        (Moments::Int8, 0.95, Master::Split),
        (Moments::Fp8, 0.95, Master::F32),
    ] {
        let of_muon = Muon { momentum, ..muon().muon };
        let optimizer = Optimizer { moments, master, muon: of_muon, ..muon() };
        let steps = (3..23).map(|t| OptimizerStep { t, ..step(optimizer) });
        let gradient = |t: u64| random(len, 1000 * t);
        each(backends, |b| {
            let what = format!("{}, {optimizer}", b.name());
            let mut update = Update::of(b, &values, optimizer);
            let place = update.place(0);
            let mut kept = stored(&place, false, &values[0][1], None);
            update.add_losses(b, &[1.0], false);
            for step in steps.clone() {
                let (g, [_, _, _, of_vector]) = (gradient(step.t), &values[1]);
                update.set_gradients(b, &[&g, of_vector, &values[2][3]]);
                let momentum = muon::Momentum::new(&step, 1.0);
                let mut m = super::optimize::loaded(&place, false, &kept);
                m.iter_mut().zip(g).for_each(|(m, g)| *m = momentum.of(*m, g).0);
                let draw = Draw::of(step.seed, Purpose::Moments, step.t as u32, 0);
                kept = stored(&place, false, &m, is_stochastic(of_muon.momentum).then_some(&draw));
                // A trial before it stores nothing.
                let below = OptimizerStep { largest_gradient: 1.0, ..step };
                let sums = update.step(b, &below);
                update.tried(b, &step, &sums);
                update.step(b, &step);
            }
            let [m, v] = &update.bytes(b)[0];
            assert!(*m == kept, "{what}");
            assert!(v.0.is_empty() && v.1.is_empty(), "{what}");
        });
    }
}
