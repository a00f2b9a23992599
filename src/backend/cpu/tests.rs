//! Every operation against its scalar twin, on every instruction set of this processor, at sizes
//! that nothing divides; and independence of the number of threads.

use super::gemm::{
    Conversion, Matrix, Output, Packing, Role, Rotation, pack, pack_in, unpack_mxfp4, unpack_tiles,
};
use super::optimize::Reduction;
use super::*;
use std::sync::LazyLock;

use crate::backend::test_calls::{self, alone};
use crate::backend::{
    Activation, Attend, AttentionShape, ClassifierGradient, Linear, LinearShape, Memory,
    NormStatistics, Optimize, OptimizerStep, Precision, Sequences, Trained, WorkspaceShape,
    reference,
};
use crate::mx::{
    self, BLOCK, Draw, Element, Gemm, GemmId, LinearRecipe, Mxfp4Matrix, Operand, OperandId,
    OperandSource, Purpose, Random, Range, Rounding, Source, decode_e2m1, decode_e8m0, uniform,
};
use crate::recipe::Recipe;

fn each_isa(mut f: impl FnMut(Cpu)) {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        f(Cpu::with_isa(2, isa).unwrap());
    }
}

/// Values of a normal-like distribution with some outliers, or NaN poison, in an arena of its own.
fn buffer(len: usize, f: impl Fn(usize) -> f32) -> Buffer<f32> {
    let mut arena = Arena::mapped((len * 4).next_multiple_of(64)).unwrap();
    let mut buffer = arena.alloc(len);
    buffer.iter_mut().enumerate().for_each(|(i, v)| *v = f(i));
    buffer
}

fn random(len: usize, seed: u64) -> Buffer<f32> {
    let draw = Draw::of(seed, Purpose::Weights, 77, 0);
    buffer(len, |i| {
        let [a, b, c, d] = draw.bits(i as u32, 0);
        let value = (uniform(a, b) + uniform(c, d) + uniform(b, c) - 1.5) * 2.0;
        (if a % 97 == 0 { 9.0 * value } else { value }) as f32
    })
}

fn poison(len: usize) -> Buffer<f32> {
    buffer(len, |_| f32::NAN)
}

fn tokens(len: usize, vocab: usize, seed: u64) -> Buffer<u32> {
    let mut arena = Arena::mapped((len * 4).next_multiple_of(64)).unwrap();
    let mut buffer = arena.alloc(len);
    let draw = Draw::of(seed, Purpose::Order, 78, 0);
    buffer.iter_mut().enumerate().for_each(|(i, t)| *t = draw.bits(i as u32, 0)[0] % vocab as u32);
    buffer
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

#[track_caller]
fn close(ours: &[f32], exact: &[f64], bound: f64) {
    assert_eq!(ours.len(), exact.len());
    let difference: f64 = ours.iter().zip(exact).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    let norm: f64 = exact.iter().map(|v| v * v).sum();
    let error = (difference / norm.max(1e-300)).sqrt();
    assert!(error <= bound, "relative error {error:e} above {bound:e}");
}

/// Those that take the most memory.
static RECIPES: LazyLock<[LinearRecipe; 2]> =
    LazyLock::new(|| ["fp32", "mxfp4-rht,g=256"].map(linear_recipe));

fn linear_recipe(recipe: &str) -> LinearRecipe {
    *recipe.parse::<Recipe>().unwrap().linear()
}

fn workspace_shape(
    sequences: Sequences,
    channels: usize,
    heads: usize,
    vocab: usize,
) -> WorkspaceShape<'static> {
    test_calls::workspace_shape(sequences, channels, heads, vocab, Precision::F32, &*RECIPES)
}

fn workspace(cpu: &Cpu, shape: &WorkspaceShape) -> Workspace {
    let mut arena = Arena::measuring();
    cpu.workspace(&mut arena, shape);
    cpu.workspace(&mut Arena::mapped(arena.used()).unwrap(), shape)
}

const RANDOM: Random = Random { seed: 42, step: 7, micro_step: 1, layer: 3, linear: 2 };

fn signs_of(group: usize) -> Vec<f32> {
    let mut signs = vec![0.0; group];
    RANDOM.signs(GemmId::Wgrad).fill_signs(&mut signs);
    signs
}

/// Codes and scales of the packed form are those of the definition, bit for bit.
#[test]
fn mxfp4_codes_are_those_of_the_definition() {
    let cases = [(1, 1), (5, 32), (16, 64), (17, 31), (33, 200), (48, 257), (50, 96)];
    each_isa(|cpu| {
        let shape = workspace_shape(Sequences { batch: 1, length: 512 }, 64, 1, 8);
        let mut memory = workspace(&cpu, &shape);
        for (case, (rows, depth)) in cases.into_iter().enumerate() {
            let data = random(rows * depth, case as u64);
            let part = Operand::from(Rounding::Nearest).with_range(Range::ThreeQuarters).unwrap();
            for (group, transposed, operand) in [
                (0, true, part),
                (64, false, part),
                (0, false, Operand::from(Rounding::Nearest)),
                (0, true, Operand::from(Rounding::Unbiased)),
                (32, false, Operand::from(Rounding::Unbiased)),
                (64, true, Operand::from(Rounding::Unbiased)),
                (128, false, Operand::from(Rounding::Nearest)),
                (256, true, Operand::from(Rounding::Nearest)),
                (256, false, Operand::from(Rounding::Unbiased)),
            ] {
                let signs = signs_of(group);
                let draw = RANDOM.rounding(OperandId::X);
                let source = Source { data: &data, rows, depth, transposed };
                let exact = Mxfp4Matrix::quantize(source, &signs, operand, &draw);
                let matrix = if transposed {
                    Matrix::depth_by_rows(&data, rows, depth)
                } else {
                    Matrix::rows_by_depth(&data, rows, depth)
                };
                for (role, offset) in [(Role::A, 0), (Role::B, 12)] {
                    let (rounding, range) = (operand.rounding(), operand.range());
                    let mxfp4 =
                        Conversion::Mxfp4(Rotation { signs: &signs, rounding, range, draw });
                    let to = memory.a.as_mut();
                    let in_panels = pack_in(Packing::Panels, &cpu, &matrix, mxfp4, role, to);
                    for r in 0..rows {
                        for k in 0..exact.depth {
                            let (byte, scale) = unpack_mxfp4(&in_panels, r, k, role);
                            let element = decode_e2m1(exact.code(r, k));
                            assert_eq!(f32::from(byte - offset), 2.0 * element, "({r}, {k})");
                            // A block of zeroes has no scale to speak of.
                            let exact_scale = exact.scale(r, k / BLOCK);
                            let zeroes = exact_scale == 0 && scale == 1.0;
                            assert!(scale == decode_e8m0(exact_scale) || zeroes, "({r}, {k})");
                        }
                    }
                    let to = memory.a.as_mut();
                    let in_tiles = pack_in(Packing::Tiles, &cpu, &matrix, mxfp4, role, to);
                    let values = exact.dequantize();
                    for (at, value) in values.iter().enumerate() {
                        let (r, k) = (at / exact.depth, at % exact.depth);
                        assert_eq!(unpack_tiles(&in_tiles, r, k, role), *value, "({r}, {k})");
                    }
                }
            }
        }
    });
}

/// The GEMM of each format against the f64 product of what its operands were rounded to.
#[test]
fn gemms_are_the_products_of_their_operands() {
    each_isa(|cpu| {
        let shape = workspace_shape(Sequences { batch: 1, length: 1024 }, 256, 1, 8);
        let mut memory = workspace(&cpu, &shape);
        // The last C is large enough to be stored past the caches.
        let shapes =
            [(1, 1, 1), (7, 50, 33), (130, 97, 1000), (16, 48, 64), (9, 200, 31), (603, 448, 40)];
        for (m, n, k) in shapes {
            let (a, b) = (random(m * k, 1), random(n * k, 2));
            let draw = RANDOM.rounding(OperandId::Dy);
            let (rounding, range) = (Rounding::Nearest, Range::Full);
            let nearest = Rotation { signs: &[], rounding, range, draw };
            for conversion in [Conversion::F32, Conversion::Bf16, Conversion::Mxfp4(nearest)] {
                let (ma, mb) = (Matrix::rows_by_depth(&a, m, k), Matrix::rows_by_depth(&b, n, k));
                let pa = pack(&cpu, &ma, conversion, Role::A, memory.a.as_mut());
                let pb = pack(&cpu, &mb, conversion, Role::B, memory.b[0].as_mut());
                let rounded = |x: &[f32], rows| match conversion {
                    Conversion::F32 => f64s(x),
                    Conversion::Bf16 => {
                        x.iter().map(|v| half::bf16::from_f32(*v).to_f64()).collect()
                    }
                    Conversion::Mxfp4(_) => {
                        let source = Source { data: x, rows, depth: k, transposed: false };
                        let q = Mxfp4Matrix::quantize(source, &[], Rounding::Nearest, &draw);
                        let depth = q.depth;
                        let values = q.dequantize();
                        values.chunks(depth).flat_map(|row| f64s(&row[..k])).collect()
                    }
                };
                let mut exact = reference::product(&rounded(&a, m), &rounded(&b, n), m, n, k);
                let mut c = poison(m * n);
                let offsets = random(n, 3);
                let bias = Some(&offsets[..]);
                let out = Output { c: &mut c, stride: n, alpha: 0.5, bias, accumulate: false };
                cpu.gemm(pa, pb, out);
                for (i, v) in exact.iter_mut().enumerate() {
                    *v = 0.5 * *v + f64::from(offsets[i % n]);
                }
                close(&c, &exact, 1e-6);
                cpu.gemm(
                    pa,
                    pb,
                    Output { c: &mut c, stride: n, alpha: 0.5, bias, accumulate: true },
                );
                exact.iter_mut().for_each(|v| *v *= 2.0);
                close(&c, &exact, 1e-6);
            }
        }
    });
}

/// Scales so small, so large or so far apart that their product is no normal f32 number, with
/// blocks of zeroes between: the same result on every set, and the one of the definition.
#[test]
fn extreme_scales_multiply_like_any_other() {
    let (m, n, k) = (9, 17, 96);
    for (small, large) in
        [(1e-30f32, 1e-30), (1e-38, 1e38), (1e38, 1e-45), (1e-20, 1e35), (3e18, 1e19), (0.0, 1.0)]
    {
        let scaled = |len, seed, factor: f32| {
            let values = random(len, seed);
            buffer(len, |i| if i / 32 % 5 == 3 { 0.0 } else { values[i] * 0.1 * factor })
        };
        let (a, b) = (scaled(m * k, 1, small), scaled(n * k, 2, large));
        let draw = RANDOM.rounding(OperandId::Dy);
        let quantize = |data, rows| {
            let source = Source { data, rows, depth: k, transposed: false };
            Mxfp4Matrix::quantize(source, &[], Rounding::Unbiased, &draw)
        };
        let exact = quantize(&a, m).product(&quantize(&b, n));
        each_isa(|cpu| {
            let shape = workspace_shape(Sequences { batch: 1, length: 128 }, 32, 1, 8);
            let mut memory = workspace(&cpu, &shape);
            let (rounding, range) = (Rounding::Unbiased, Range::ThreeQuarters);
            let unbiased = Rotation { signs: &[], rounding, range, draw };
            let (ma, mb) = (Matrix::rows_by_depth(&a, m, k), Matrix::rows_by_depth(&b, n, k));
            let mut c = poison(m * n);
            let out = Output { c: &mut c, stride: n, alpha: 1.0, bias: None, accumulate: false };
            let memory = (memory.a.as_mut(), memory.b[0].as_mut());
            cpu.product([&ma, &mb].map(|m| (m, Conversion::Mxfp4(unbiased))), memory, out);
            assert_eq!(c[..], exact[..], "{small:e} by {large:e}");
        });
    }
}

/// A recipe whose backward GEMMs have groups of their own.
fn groups_of_their_own(dgrad: usize, wgrad: usize) -> LinearRecipe {
    let gemm = |group| {
        let transform = mx::Transform::new(group, mx::Signs::Random).unwrap();
        Gemm::of(Operand::mxfp4(Rounding::Unbiased, Some(transform)))
    };
    LinearRecipe::new(Gemm::BF16, gemm(dgrad), gemm(wgrad)).unwrap()
}

/// Forward and backward of a linear layer in every recipe, against the definition of its numbers. Each runs
/// in a workspace for itself alone, of which this layer is the largest.
#[test]
fn linear_layers_follow_their_recipes() {
    let shape = LinearShape { rows: 70, inputs: 40, outputs: 120 };
    let LinearShape { rows, inputs, outputs } = shape;
    let (x, w, b) = (random(rows * inputs, 1), random(outputs * inputs, 2), random(outputs, 3));
    let dy = random(rows * outputs, 4);
    let sequences = Sequences { batch: 2, length: 35 };
    each_isa(|cpu| {
        let switched = [
            "mxfp4-rht-sr,g=128,sr=dy,wgrad=bf16",
            "mxfp4-sr,sr=other,dgrad=bf16",
            "mxfp4,range=3/4",
            "mxfp4-rht,range=3/4",
            "mxfp4-rht-sr,sr=dy,range=3/4",
        ];
        let built = [(32, 256), (256, 32)].map(|(dgrad, wgrad)| groups_of_their_own(dgrad, wgrad));
        let named = Recipe::NAMES.into_iter().chain(switched).map(linear_recipe);
        for recipe in named.chain(built) {
            let all = workspace_shape(sequences, inputs, 1, 8);
            let all = WorkspaceShape { recipes: &[recipe], linears: &[shape], ..all };
            let mut memory = workspace(&cpu, &all);
            let as_bf16 = |x: &[f32]| -> Vec<f64> {
                x.iter().map(|v| half::bf16::from_f32(*v).to_f64()).collect()
            };
            let as_fp8 = |x: &[f32]| -> Vec<f32> {
                let scale = mx::e4m3_scale(x.iter().fold(0.0, |m: f32, v| m.max(v.abs())));
                x.iter().map(|v| mx::round_to_e4m3(v / scale) * scale).collect()
            };

            let mut y = poison(rows * outputs);
            cpu.linear_forward(&mut memory, &mut y, &x, &w, &b, shape, &recipe);
            let (fx, fw) = match recipe.forward().format().element() {
                Element::F32 => (f64s(&x), f64s(&w)),
                Element::Bf16 => (as_bf16(&x), as_bf16(&w)),
                Element::E4m3 => (f64s(&as_fp8(&x)), f64s(&as_fp8(&w))),
                Element::E2m1 => unreachable!("no forward pass is in MXFP4"),
            };
            close(&y, &reference::linear_forward(&fx, &fw, &f64s(&b), shape), 1e-6);

            let (mut dx, mut dw, mut db) =
                (poison(rows * inputs), random(outputs * inputs, 5), random(outputs, 6));
            let (old_dw, old_db) = (f64s(&dw), f64s(&db));
            cpu.linear_backward(
                &mut memory,
                &mut dx,
                &mut dw,
                &mut db,
                &dy,
                &x,
                &w,
                shape,
                &recipe,
                &RANDOM,
                true,
            );
            // The definition: (rows a, rows b) from operands that lie as `Source` says.
            let product = |id, gemm: &Gemm, a: Source<'_>, b: Source<'_>, b_id| match gemm.format()
            {
                mx::Format::MXFP4 => {
                    let mut signs = [0.0; mx::MAX_GROUP];
                    let signs = mx::fill_signs(&mut signs, gemm.transform(), id, &RANDOM);
                    let dy = RANDOM.rounding(OperandId::Dy);
                    let a = Mxfp4Matrix::quantize(a, signs, *gemm.a(), &dy);
                    let b = Mxfp4Matrix::quantize(b, signs, *gemm.b(), &RANDOM.rounding(b_id));
                    let (va, vb) = (f64s(&a.dequantize()), f64s(&b.dequantize()));
                    let factor = f64::from(gemm.alpha());
                    let mut out = reference::product(&va, &vb, a.rows, b.rows, a.depth);
                    out.iter_mut().for_each(|v| *v *= factor);
                    out
                }
                format => {
                    let values = |s: Source<'_>| -> Vec<f64> {
                        let round = |v: f32| match format {
                            mx::Format::BF16 => half::bf16::from_f32(v).to_f64(),
                            _ => f64::from(v),
                        };
                        (0..s.rows * s.depth)
                            .map(|i| round(s.at(i / s.depth, i % s.depth)))
                            .collect()
                    };
                    reference::product(&values(a), &values(b), a.rows, b.rows, a.depth)
                }
            };
            let source = |data, rows, depth, transposed| Source { data, rows, depth, transposed };
            let exact = product(
                GemmId::Dgrad,
                recipe.dgrad(),
                source(&dy, rows, outputs, false),
                source(&w, inputs, outputs, true),
                OperandId::W,
            );
            close(&dx, &exact, 1e-6);
            let kept = if recipe.wgrad().b().source() == OperandSource::Forward {
                as_fp8(&x)
            } else {
                x.iter().copied().collect()
            };
            let mut exact = product(
                GemmId::Wgrad,
                recipe.wgrad(),
                source(&dy, outputs, rows, true),
                source(&kept, inputs, rows, true),
                OperandId::X,
            );
            let (_, _, mut exact_db) =
                reference::linear_backward(&f64s(&dy), &f64s(&x), &f64s(&w), shape);
            let (mut fresh_dw, mut fresh_db) = (poison(outputs * inputs), poison(outputs));
            cpu.linear_backward(
                &mut memory,
                &mut dx,
                &mut fresh_dw,
                &mut fresh_db,
                &dy,
                &x,
                &w,
                shape,
                &recipe,
                &RANDOM,
                false,
            );
            close(&fresh_dw, &exact, 1e-6);
            close(&fresh_db, &exact_db, 1e-6);
            exact.iter_mut().zip(old_dw).for_each(|(v, old)| *v += old);
            close(&dw, &exact, 1e-6);
            exact_db.iter_mut().zip(old_db).for_each(|(v, old)| *v += old);
            close(&db, &exact_db, 1e-6);
        }
    });
}

/// NaN in an operand reaches every product that it enters, and no other.
#[test]
fn nan_blocks_poison_their_products() {
    let shape = LinearShape { rows: 40, inputs: 32, outputs: 64 };
    let (x, w) = (random(40 * 32, 1), random(64 * 32, 2));
    let mut dy = random(40 * 64, 3);
    dy[5 * 64 + 10] = f32::NAN;
    let recipe = linear_recipe("mxfp4-rht-sr");
    each_isa(|cpu| {
        let sequences = Sequences { batch: 1, length: 40 };
        let mut memory = workspace(&cpu, &workspace_shape(sequences, 32, 1, 8));
        let (mut dx, mut dw, mut db) =
            (poison(40 * 32), buffer(64 * 32, |_| 0.0), buffer(64, |_| 0.0));
        cpu.linear_backward(
            &mut memory,
            &mut dx,
            &mut dw,
            &mut db,
            &dy,
            &x,
            &w,
            shape,
            &recipe,
            &RANDOM,
            true,
        );
        for (row, dx) in dx.chunks(32).enumerate() {
            assert!(dx.iter().all(|v| v.is_nan() == (row == 5)), "row {row} of dx");
        }
        for (row, dw) in dw.chunks(32).enumerate() {
            assert!(dw.iter().all(|v| v.is_nan() == (row == 10)), "row {row} of dw");
        }
    });
}

#[test]
fn embedding_layernorm_and_gelu() {
    let sequences = Sequences { batch: 3, length: 7 };
    for c in [1usize, 24, 100] {
        let (vocab, rows) = (11, sequences.rows());
        let (wte, wpe) = (random(vocab * c, 1), random(9 * c, 2));
        let tokens = tokens(rows, vocab, 3);
        let (w, b, x, dy) = (random(c, 4), random(c, 5), random(rows * c, 6), random(rows * c, 7));
        each_isa(|cpu| {
            let mut out = poison(rows * c);
            cpu.embedding_forward(&mut out, &tokens, &wte, &wpe, sequences, c);
            let exact =
                reference::embedding_forward(&tokens, &f64s(&wte), &f64s(&wpe), sequences, c);
            close(&out, &exact, 1e-7);
            let (mut dwte, mut dwpe) = (buffer(vocab * c, |_| 1.0), buffer(9 * c, |_| 1.0));
            cpu.embedding_backward(&mut dwte, &mut dwpe, &dy, &tokens, sequences, c, true);
            let (mut exact_te, mut exact_pe) = (vec![1.0; vocab * c], vec![1.0; 9 * c]);
            for i in 0..rows * c {
                let (row, channel) = (i / c, i % c);
                exact_te[tokens[row] as usize * c + channel] += f64::from(dy[i]);
                exact_pe[row % 7 * c + channel] += f64::from(dy[i]);
            }
            close(&dwte, &exact_te, 1e-6);
            close(&dwpe, &exact_pe, 1e-6);
            let mut fresh = poison(9 * c);
            cpu.embedding_backward(&mut dwte, &mut fresh, &dy, &tokens, sequences, c, false);
            exact_pe.iter_mut().for_each(|v| *v -= 1.0);
            close(&fresh, &exact_pe, 1e-6);

            let epsilon = 1e-5;
            let mut statistics = NormStatistics { mean: poison(rows), rstd: poison(rows) };
            let (mut normed, mut sum) = (poison(rows * c), poison(rows * c));
            cpu.add_layernorm_forward(
                &mut normed,
                &mut sum,
                statistics.as_mut(),
                &x,
                &dy,
                &w,
                &b,
                rows,
                c,
                epsilon,
            );
            let exact_sum: Vec<f64> =
                x.iter().zip(dy.iter()).map(|(a, b)| f64::from(a + b)).collect();
            let (exact, _, _) =
                reference::layernorm_forward(&exact_sum, &f64s(&w), &f64s(&b), f64::from(epsilon));
            close(&sum, &exact_sum, 0.0);
            close(&normed, &exact, 1e-6);
            cpu.layernorm_forward(&mut normed, statistics.as_mut(), &x, &w, &b, rows, c, epsilon);
            let (exact, mean, rstd) =
                reference::layernorm_forward(&f64s(&x), &f64s(&w), &f64s(&b), f64::from(epsilon));
            close(&normed, &exact, 1e-6);
            close(&statistics.mean, &mean, 1e-6);
            close(&statistics.rstd, &rstd, 1e-6);
            let (mut dx, mut dw, mut db) =
                (buffer(rows * c, |_| 1.0), buffer(c, |_| 1.0), buffer(c, |_| 1.0));
            let shape = workspace_shape(Sequences { batch: 1, length: 1 }, 8, 1, 8);
            let mut memory = workspace(&cpu, &shape);
            let stats = || statistics.as_ref();
            let (dx_out, m) = (&mut dx, &mut memory);
            cpu.layernorm_backward(
                m,
                dx_out,
                &mut dw,
                &mut db,
                &dy,
                &x,
                stats(),
                &w,
                rows,
                c,
                true,
            );
            let (exact_dx, exact_dw, exact_db) =
                reference::layernorm_backward(&f64s(&dy), &f64s(&x), &f64s(&w), f64::from(epsilon));
            let plus_one = |v: Vec<f64>| v.into_iter().map(|v| v + 1.0).collect::<Vec<_>>();
            close(&dx, &plus_one(exact_dx), 1e-5);
            close(&dw, &plus_one(exact_dw.clone()), 1e-6);
            close(&db, &plus_one(exact_db.clone()), 1e-6);
            let (mut dw, mut db, m) = (poison(c), poison(c), &mut memory);
            cpu.layernorm_backward(
                m,
                &mut dx,
                &mut dw,
                &mut db,
                &dy,
                &x,
                stats(),
                &w,
                rows,
                c,
                false,
            );
            close(&dw, &exact_dw, 1e-6);
            close(&db, &exact_db, 1e-6);

            for form in [Activation::GeluTanh, Activation::Gelu] {
                let mut out = poison(rows * c);
                cpu.gelu_forward(&mut out, &x, rows * c, form);
                let exact: Vec<_> =
                    x.iter().map(|v| reference::gelu_of(form, f64::from(*v))).collect();
                close(&out, &exact, 1e-6);
                out.copy_from_slice(&dy);
                cpu.gelu_backward(&mut out, &x, rows * c, form);
                let slope = |(x, dy): (&f32, &f32)| {
                    reference::gelu_derivative_of(form, f64::from(*x)) * f64::from(*dy)
                };
                close(&out, &x.iter().zip(dy.iter()).map(slope).collect::<Vec<_>>(), 1e-6);
            }
        });
    }
}

#[test]
fn attention() {
    for (batch, length, heads, head_size, score_factor) in [
        (1, 1, 1, 1, 1.0),
        (2, 5, 3, 8, 1.0),
        (1, 48, 1, 16, 1.0),
        (2, 97, 2, 20, 1.0),
        (1, 130, 1, 64, 1.0),
        (1, 50, 1, 100, 1.0),
        // Without the root of the head size, and divided by a layer's number.
        (1, 70, 2, 4, 2.0),
        (2, 51, 1, 24, 1.0 / 3.0),
    ] {
        let sequences = Sequences { batch, length };
        let (rows, c) = (sequences.rows(), heads * head_size);
        let (qkv, dout) = (random(rows * 3 * c, 1), random(rows * c, 2));
        for precision in [Precision::F32, Precision::Bf16] {
            let kv_heads = heads;
            let shape =
                AttentionShape { sequences, heads, kv_heads, head_size, score_factor, precision };
            let (exact, exact_lse) = reference::attention_forward(&f64s(&qkv), shape);
            let exact_dqkv = reference::attention_backward(&f64s(&dout), &f64s(&qkv), shape);
            each_isa(|cpu| {
                // bf16 operands are off by up to 2^-9, relative, and five roundings add up.
                let has_bf16 = matches!(cpu.isa(), Isa::Amx | Isa::Avx512);
                let in_bf16 = precision == Precision::Bf16 && has_bf16;
                let bound = if in_bf16 { 6e-3 } else { 1e-6 };
                // An error of a score is relative to the score, and the softmax sees it as it is.
                let bound = bound * f64::from(score_factor.max(1.0));
                let shape_of_workspace =
                    WorkspaceShape { attention: shape, ..workspace_shape(sequences, c, heads, 8) };
                let mut memory = workspace(&cpu, &shape_of_workspace);
                let (mut out, mut lse) = (poison(rows * c), poison(rows * heads));
                cpu.attention_forward(&mut memory, &mut out, &mut lse, &qkv, shape);
                close(&out, &exact, bound);
                close(&lse, &exact_lse, bound);
                let mut dqkv = poison(rows * 3 * c);
                cpu.attention_backward(&mut memory, &mut dqkv, &dout, &out, &lse, &qkv, shape);
                // A single visible key makes exact zeroes of dq and dk; the rest is compared as a
                // whole.
                close(&dqkv, &exact_dqkv, 2.0 * bound);
            });
        }
    }
}

#[test]
fn classifier_and_logits() {
    for (rows, channels, vocab) in [(1, 4, 1), (5, 24, 37), (200, 16, 50_000)] {
        let shape = LinearShape { rows, inputs: channels, outputs: vocab };
        let (x, wte) = (random(rows * channels, 1), random(vocab * channels, 2));
        let targets = tokens(rows, vocab, 3);
        let scale = 0.25;
        let (losses, dx, dwte) =
            reference::classifier(&f64s(&x), &f64s(&wte), &targets, shape, f64::from(scale));
        each_isa(|cpu| {
            if rows * vocab > 1 << 20 && cpu.isa() != Isa::best() {
                return; // several chunks of rows are the same on every set
            }
            let sequences = Sequences { batch: 1, length: rows };
            let mut memory = workspace(&cpu, &workspace_shape(sequences, channels, 1, vocab));
            let (mut our_losses, mut our_dx) = (poison(rows), poison(rows * channels));
            let mut our_dwte = poison(vocab * channels);
            let gradient = ClassifierGradient {
                dx: &mut our_dx,
                dw: &mut our_dwte[..],
                scale,
                accumulate: false,
            };
            let precision = Precision::F32;
            cpu.classifier(
                &mut memory,
                &mut our_losses,
                Some(gradient),
                &x,
                &wte,
                &targets,
                rows,
                channels,
                vocab,
                precision,
            );
            close(&our_losses, &losses, 2e-6);
            close(&our_dx, &dx, 2e-6);
            close(&our_dwte, &dwte, 2e-6);
            our_losses.fill(f32::NAN);
            cpu.classifier(
                &mut memory,
                &mut our_losses,
                None,
                &x,
                &wte,
                &targets,
                rows,
                channels,
                vocab,
                precision,
            );
            close(&our_losses, &losses, 2e-6);

            let mut logits = poison(vocab);
            cpu.logits(&mut memory, &mut logits, &x, rows - 1, &wte, channels, vocab, precision);
            let last = LinearShape { rows: 1, ..shape };
            let row = f64s(&x[(rows - 1) * channels..]);
            let exact = reference::linear_forward(&row, &f64s(&wte), &vec![0.0; vocab], last);
            close(&logits, &exact, 1e-6);
        });
    }
}

#[test]
fn optimizer_steps() {
    let n = 40_003; // several jobs and a rest
    let (mut g, p0) = (random(n, 1), random(n, 2));
    let norm = f64s(&g).iter().map(|v| v * v).sum::<f64>().sqrt();
    let step = OptimizerStep {
        optimizer: crate::Optimizer { clip: (0.5 * norm) as f32, ..Default::default() },
        lr: 0.01,
        t: 3,
        loss_scale: 0.25,
        largest_gradient: f32::INFINITY,
    };
    each_isa(|cpu| {
        let mut p = buffer(n, |i| p0[i]);
        let mut states = [random(n, 3), buffer(n, |i| i as f32 * 1e-5)];
        let [m0, v0] = [f64s(&states[0]), f64s(&states[1])];
        let mut optimizer = Reduction::default();
        let shape = workspace_shape(Sequences { batch: 1, length: 1 }, 8, 1, 8);
        let mut scratch = workspace(&cpu, &shape);
        cpu.add_losses(&mut optimizer, &buffer(3, |i| i as f32 + 0.5), 3, true);
        let sums = {
            let (weights, states, gradients) = (&mut p, &mut states, &mut g);
            let mut all = Trained { slots: &[alone(n)], weights, states, gradients };
            cpu.finish_step(&mut scratch, &mut optimizer, &mut all, &step)
        };
        let (loss, found) = sums.loss_and_norm(&step);
        assert_eq!(loss, 4.5 * 0.25);
        assert!((f64::from(found) / norm - 1.0).abs() < 1e-6);
        let exact: Vec<f64> = (0..n)
            .map(|i| {
                let before = [f64::from(p0[i]), m0[i], v0[i]];
                reference::adamw(before, 0.5 * f64::from(g[i]), true, &step)[0]
            })
            .collect();
        close(&p, &exact, 1e-6);

        // Without a finite loss nothing moves.
        let before = p.to_vec();
        cpu.add_losses(&mut optimizer, &buffer(1, |_| f32::NAN), 1, false);
        let (weights, states, gradients) = (&mut p, &mut states, &mut g);
        let mut all = Trained { slots: &[alone(n)], weights, states, gradients };
        cpu.finish_step(&mut scratch, &mut optimizer, &mut all, &step);
        assert_eq!(p[..], before[..]);
    });
}

/// What a trial says an update would leave is what it leaves, to the bit, NaN and infinity
/// included; a norm above the limit changes nothing.
#[test]
fn a_tried_update_is_the_update() {
    let n = 40_003;
    let step = OptimizerStep {
        optimizer: crate::Optimizer { clip: 0.0, ..Default::default() },
        lr: 0.01,
        t: 3,
        loss_scale: 1.0,
        largest_gradient: f32::INFINITY,
    };
    let fast = OptimizerStep { lr: 3e38, ..step };
    // Extreme values at a place that no vector and no job begins with.
    let cases: [(&str, OptimizerStep, [f32; 4], [bool; 3]); 6] = [
        ("ordinary", step, [1.0, 1.0, 1.0, 1.0], [true; 3]),
        ("a large weight", step, [3e38, 1.0, 1.0, 1.0], [true; 3]),
        ("a large moment", step, [1.0, 3e37, 1.0, 1.0], [true; 3]),
        ("a tiny second moment", step, [1.0, 3e37, 0.0, 0.0], [false, true, true]),
        ("a large gradient", step, [1.0, 1.0, 1.0, 1e20], [true, true, false]),
        ("a large rate", fast, [1.0, 1.0, 1.0, 1.0], [false, true, true]),
    ];
    let shape = workspace_shape(Sequences { batch: 1, length: 1 }, 8, 1, 8);
    each_isa(|cpu| {
        for (what, step, [p1, m1, v1, g1], finite) in cases {
            let with = |mut x: Buffer<f32>, extreme| {
                x[33_333] = extreme;
                x
            };
            let mut p = with(random(n, 2), p1);
            let v = with(buffer(n, |i| i as f32 * 1e-5), v1);
            let mut states = [with(random(n, 3), m1), v];
            let mut gradient = with(random(n, 1), g1);
            let before = [p.to_vec(), states[0].to_vec(), states[1].to_vec()];
            let mut scratch = workspace(&cpu, &shape);
            let (mut optimizer, mut tried) = (Reduction::default(), Vec::new());
            let mut all = Trained {
                slots: &[alone(n)],
                weights: &mut p,
                states: &mut states,
                gradients: &mut gradient,
            };
            let within = OptimizerStep { largest_gradient: 1.0, ..step };
            let sums = cpu.finish_step(&mut scratch, &mut optimizer, &mut all, &within);
            assert_eq!(sums.gradient_scale(&within), None, "{what}");
            cpu.try_update(&mut optimizer, &mut all, &step, &sums, &mut |largest| {
                tried.push(largest);
            })
            .unwrap();
            assert_eq!([p.to_vec(), states[0].to_vec(), states[1].to_vec()], before, "{what}");

            let mut all = Trained {
                slots: &[alone(n)],
                weights: &mut p,
                states: &mut states,
                gradients: &mut gradient,
            };
            cpu.finish_step(&mut scratch, &mut optimizer, &mut all, &step);
            let most = |x: &[f32]| x.iter().map(|x| x.abs().to_bits()).max().unwrap();
            let [found] = tried[..] else { panic!("{tried:?}") };
            let found = [found.weight, found.states[0], found.states[1]];
            let left = [most(&p), most(&states[0]), most(&states[1])];
            assert_eq!(found.map(f32::to_bits), left, "{what}");
            assert_eq!(found.map(f32::is_finite), finite, "{what}");
        }
    });
}
