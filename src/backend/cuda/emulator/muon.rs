//! Muon's updates of matrices: `optimize_muon.cu`, with products of the scalar kind between them.

use super::super::step::{Entry, OfMoments, Step};
use super::super::tests::random;
use super::adamw::AdamWKernel;
use super::moments::{Memory, ScalesKernel, UpdateKernel};
use super::{Emulator, SCHEDULES};
use crate::backend::conformance::{loaded, step, stored};
use crate::backend::{OptimizerStep, Slot, StateLayout};
use crate::formats::{Draw, Purpose};
use crate::optim::moments::is_stochastic;
use crate::optim::muon::{self, Momentum, Movement, QUINTIC};
use crate::optim::{Gradients, Master, Moments, Muon, Optimizer, OptimizerKind, ParamKind, master};

type MomentumKernel = unsafe extern "C" fn(
    *mut u16,
    *mut f64,
    *const Entry,
    u32,
    *const f64,
    *mut u32,
    Step,
    OfMoments,
    *const [f32; 2],
);
type NormalizeKernel = unsafe extern "C" fn(*mut u16, *const f64, u64);
type AddKernel = unsafe extern "C" fn(*mut u16, *const u16, f32, f32, u64);
type MoveKernel =
    unsafe extern "C" fn(*const Entry, u32, *const u16, *const f64, *mut u32, Step, f32, f32);

/// Of two pieces and a rest that ends within a group and a vector: (71, 127).
const SHAPE: [usize; 2] = [71, 127];
const LENGTHS: [usize; 3] = [7, SHAPE[0] * SHAPE[1], 5];

fn numbers(bits: &[u16]) -> Vec<f32> {
    bits.iter().map(|bits| half::bf16::from_bits(*bits).to_f32()).collect()
}

/// Every kernel does what the scalar arithmetic does, to the bit; a trial stores nothing and tells
/// the largest; and of a step that is not done nothing changes.
#[test]
fn matrices_are_updated_as_defined() {
    let Some(emulator) = Emulator::new("optimize_muon") else { return };
    let update: MomentumKernel = emulator.kernel("update_momentum");
    let normalize: NormalizeKernel = emulator.kernel("normalize_momentum");
    let add: AddKernel = emulator.kernel("add_multiples");
    let move_matrix: MoveKernel = emulator.kernel("move_matrix");
    let Some(of_moments) = Emulator::new("optimize_moments") else { return };
    let choose: ScalesKernel = of_moments.kernel("choose_scales");
    let kinds = [ParamKind::Vector, ParamKind::Matrix, ParamKind::Table];
    let slots: Vec<_> = std::iter::zip(kinds, LENGTHS)
        .enumerate()
        .map(|(index, (kind, len))| Slot { index, start: 0, len, rows: SHAPE[0], kind })
        .collect();
    let len = LENGTHS[1];
    let mut values: [[Vec<f32>; 4]; 3] =
        std::array::from_fn(|i| [0, 1, 2, 3].map(|k| random(LENGTHS[i], 10 * i as u64 + k)));
    // With it the scale of a tensor becomes another.
    values[1][3][5] = 32768.0;
    for (case, (moments, momentum, master, gradients)) in [
        (Moments::F32, 0.95, Master::F32, Gradients::F32),
        (Moments::Bf16, 0.95, Master::Split, Gradients::Bf16),
        (Moments::Bf16, 0.995, Master::F32, Gradients::F32),
        (Moments::Int8, 0.95, Master::Split, Gradients::Bf16),
        (Moments::Fp8, 0.95, Master::F32, Gradients::F32),
    ]
    .into_iter()
    .enumerate()
    {
        let muon = Muon { momentum, ratio: 3.0 };
        let usual = Optimizer::new(OptimizerKind::Muon);
        let optimizer = Optimizer { muon, moments, master, gradients, ..usual };
        let narrow = kinds.map(|kind| gradients.are_in_bf16(kind));
        let step = step(optimizer);
        let layouts = StateLayout::of_all(&slots, &optimizer, &(0..slots.len()), 128).unwrap();
        let place = layouts[0].places[1];
        let [p, m, _, g] = &values[1];
        let half = |g: &f32| if narrow[1] { half::bf16::from_f32(*g).to_f32() } else { *g };
        let g: &Vec<f32> = &g.iter().map(half).collect();
        for schedule in SCHEDULES {
            let what = format!("{optimizer}, {schedule:?}");
            let mut one = Memory::of([&layouts[0], &layouts[1]], &values, master, narrow);
            let table = one.table();
            let entries = table.as_ptr();
            let (mut x, mut partials) = (vec![0x7fc0u16; len], [f64::NAN; 3]);
            let mut trial = [0u32; 9];
            let (of_x, of_partials) = (x.as_mut_ptr(), partials.as_mut_ptr());
            let sums = [1.0, 4.0, 0.0];
            let sums = sums.as_ptr();
            let momentum_of = |trial: *mut u32, before: *const [f32; 2], step: &OptimizerStep| {
                let (of_kernel, of_moments) = (Step::new(step), OfMoments::of_momentum(step));
                emulator.run(schedule, [2, 1], 256, || {
                    // SAFETY: buffers are as long as the table and the grid say, here and below.
                    unsafe {
                        update(
                            of_x,
                            of_partials,
                            entries,
                            1,
                            sums,
                            trial,
                            of_kernel,
                            of_moments,
                            before,
                        );
                    }
                });
            };
            let Movement { keep, size } = Movement::new(&step, SHAPE);
            let moved = |trial: *mut u32, step: &OptimizerStep| {
                let of_kernel = Step::new(step);
                emulator.run(schedule, [2, 1], 256, || {
                    // SAFETY: as above.
                    unsafe { move_matrix(entries, 1, of_x, sums, trial, of_kernel, keep, size) };
                });
            };
            let before = one.clone();
            let none = std::ptr::null_mut();
            let below = OptimizerStep { largest_gradient: 1.0, ..step };
            let [unscaled, mut scales] = [std::ptr::null::<[f32; 2]>(); 2];
            momentum_of(none, unscaled, &below);
            moved(none, &below);
            assert!(one == before && x.iter().all(|x| *x == 0x7fc0), "{what}: no step");
            momentum_of(trial.as_mut_ptr(), unscaled, &step);
            assert!(one == before, "{what}: a trial stores nothing");
            let mut of_stored = [[f32::NAN; 2]; 3];
            if place.element.has_one_scale() {
                let (to, largest, of_kernel) =
                    (of_stored.as_mut_ptr(), trial.as_ptr(), Step::new(&step));
                of_moments.run(schedule, [1, 1], 256, || {
                    // SAFETY: as above.
                    unsafe { choose(to, largest, entries, 1, 1, sums, of_kernel) };
                });
                scales = of_stored.as_ptr();
            }
            momentum_of(none, scales, &step);

            // Momentum.
            let arithmetic = Momentum::new(&step, 1.0);
            let old = loaded(&place, false, &stored(&place, false, m, None));
            let (new, u): (Vec<f32>, Vec<f32>) =
                old.iter().zip(g).map(|(m, g)| arithmetic.of(*m, *g)).unzip();
            let draw = Draw::of(step.seed, Purpose::Moments, step.t as u32, 1);
            let expected = stored(&place, false, &new, is_stochastic(momentum).then_some(&draw));
            assert!(one.bytes(1)[0] == expected, "{what}: momentum");
            let second = |of: &Memory| [0, 1, 2].map(|i| of.bytes(i)[1].clone());
            assert!(second(&one) == second(&before), "{what}: no second moment");
            assert!(numbers(&x) == u, "{what}: u");
            let largest = |x: &[f32]| x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            assert_eq!(f32::from_bits(trial[4]), largest(&new), "{what}");
            let squares: f64 = u.iter().map(|u| f64::from(*u).powi(2)).sum();
            let ours: f64 = partials.iter().sum();
            assert!((ours / squares - 1.0).abs() < 1e-12, "{what}: {ours}, not {squares}");

            // What lies between products.
            emulator.run(schedule, [2, 1], 256, || {
                // SAFETY: as above.
                unsafe { normalize(of_x, of_partials, len as u64) };
            });
            let divisor = muon::divisor(ours);
            let expected: Vec<f32> = u.iter().map(|u| muon::normalized(*u, divisor)).collect();
            assert!(numbers(&x) == expected, "{what}: X");
            let mut product = vec![0u16; len];
            let bits = |x: f32| half::bf16::from_f32(x).to_bits();
            product.iter_mut().zip(random(len, 77)).for_each(|(to, x)| *to = bits(x));
            // One that is too small, and one that its like takes away.
            (product[5], x[5]) = (bits(1e-17), bits(1e-18));
            (product[6], x[6]) = (bits(3.4445), bits(-1.0));
            let factors = [QUINTIC[0], 1.0];
            let pairs = numbers(&x).into_iter().zip(numbers(&product));
            let expected: Vec<f32> = pairs.map(|(x, p)| muon::combined(factors, x, p)).collect();
            assert_eq!(expected[5], 0.0);
            let to = product.as_mut_ptr();
            emulator.run(schedule, [2, 1], 256, || {
                // SAFETY: as above.
                unsafe { add(to, of_x, factors[0], factors[1], len as u64) };
            });
            assert!(numbers(&product) == expected, "{what}: sums of multiples");

            // Weights, along numbers of which one is beyond all and one is none.
            product.iter_mut().zip(expected).for_each(|(to, x)| *to = bits(0.2 * x));
            (product[9], product[10]) = (bits(f32::NEG_INFINITY), bits(f32::NAN));
            x.copy_from_slice(&product);
            moved(trial.as_mut_ptr(), &step);
            let movement = Movement { keep, size };
            let split = |p: f32| match master {
                Master::F32 => p,
                Master::Split => master::splittable(p),
            };
            let next: Vec<f32> =
                p.iter().zip(numbers(&x)).map(|(p, x)| movement.of(split(*p), x)).collect();
            assert_eq!(f32::from_bits(trial[3]), largest(&next), "{what}");
            assert!(one.weights(1) == before.weights(1), "{what}: a trial");
            // With an infinite rate, what is loaded as 0 behind the end would become NaN.
            let ones = vec![0x3f80u16; len];
            let (of_ones, tried, of_kernel) = (ones.as_ptr(), trial.as_mut_ptr(), Step::new(&step));
            let size = f32::INFINITY;
            emulator.run(schedule, [2, 1], 256, || {
                // SAFETY: as above.
                unsafe { move_matrix(entries, 1, of_ones, sums, tried, of_kernel, keep, size) };
            });
            assert_eq!(f32::from_bits(trial[3]), f32::INFINITY, "{what}");
            moved(none, &step);
            let next: Vec<f32> = next.into_iter().map(split).collect();
            assert!(one.weights(1) == next, "{what}: weights");
            let copies: Vec<_> = next.iter().map(|p| half::bf16::from_f32(*p)).collect();
            assert!(one.copies(1) == copies, "{what}: copies");
            let of_copies = copies.iter().map(|p| p.to_f32()).collect::<Vec<_>>();
            let noted = if master == Master::Split { &of_copies } else { &next };
            assert_eq!(f32::from_bits(one.amax[1]), largest(noted), "{what}: the largest");
            assert_eq!(trial[5] | trial[0] | trial[8], 0, "{what}, case {case}");
        }
    }
}

/// The kernels that update element by element leave a matrix that has no second moment as it is.
#[test]
fn matrices_without_a_second_moment_are_passed_over() {
    let [Some(plain), Some(of_moments)] = ["optimize", "optimize_moments"].map(Emulator::new)
    else {
        return;
    };
    let adamw: AdamWKernel = plain.kernel("adamw");
    let update_stored: UpdateKernel = of_moments.kernel("update_stored<F32,WHOLE>");
    let slots: Vec<_> = LENGTHS
        .into_iter()
        .enumerate()
        .map(|(index, len)| Slot { index, start: 0, len, rows: 1, kind: ParamKind::Table })
        .collect();
    let positive = |x: Vec<f32>| x.into_iter().map(f32::abs).collect::<Vec<_>>();
    let values: [[Vec<f32>; 4]; 3] = std::array::from_fn(|i| {
        [0, 1, 2, 3].map(|k| positive(random(LENGTHS[i], 10 * i as u64 + k)))
    });
    let step = step(Optimizer::new(OptimizerKind::Muon));
    let layout = StateLayout::new(&slots, &step.optimizer, 0, &(0..slots.len()), 128).unwrap();
    for stored in [false, true] {
        let mut one = Memory::of([&layout; 2], &values, Master::F32, [false; 3]);
        let mut table = one.table();
        table[1].v = 0;
        let before = one.clone();
        let (entries, sums) = (table.as_ptr(), [1.0, 4.0, 0.0]);
        let (of_kernel, sums, none) = (Step::new(&step), sums.as_ptr(), std::ptr::null_mut());
        let (pieces, drawn) = (5, OfMoments::new(&step));
        let emulator = if stored { &of_moments } else { &plain };
        emulator.run(SCHEDULES[0], [2, 1], 256, || {
            // SAFETY: buffers are as long as the table says.
            unsafe {
                match stored {
                    false => adamw(entries, 3, 0, pieces, sums, none, of_kernel),
                    true => {
                        let (rates, normals) = (std::ptr::null(), std::ptr::null());
                        update_stored(
                            entries,
                            3,
                            0,
                            pieces,
                            1,
                            sums,
                            rates,
                            normals,
                            none,
                            of_kernel,
                            drawn,
                            std::ptr::null(),
                        );
                    }
                }
            }
        });
        for i in 0..3 {
            let same = (one.weights(i), one.bytes(i), one.amax[i])
                == (before.weights(i), before.bytes(i), before.amax[i]);
            assert_eq!(same, i == 1, "{i}");
        }
    }
}
