//! Packed operands and the GEMMs of them, on every instruction set of this processor. What an
//! operation makes of them is in the suite of all backends.

use super::gemm::{
    Conversion, Matrix, Output, Packing, Quantization, Role, pack, pack_in, unpack_mxfp4,
    unpack_tiles,
};
use super::*;
use crate::backend::conformance::{Harness as _, RANDOM, f64s, random, relative_error, workspace};
use crate::backend::{Precision, Sequences, reference};
use crate::formats::{
    BLOCK, GemmId, Mxfp4Matrix, Operand, OperandId, Range, Rounding, Source, decode_e2m1,
    decode_e8m0,
};

fn each_isa(f: impl FnMut(Cpu)) {
    Cpu::all().into_iter().for_each(f);
}

fn poison(len: usize) -> Vec<f32> {
    vec![f32::NAN; len]
}

#[track_caller]
fn close(ours: &[f32], exact: &[f64], bound: f64) {
    let error = relative_error(&f64s(ours), exact);
    assert!(error <= bound, "relative error {error:e} above {bound:e}");
}

/// Scratch memory for layers of up to `channels` channels over `rows` tokens.
fn scratch(cpu: &Cpu, rows: usize, channels: usize) -> Workspace {
    let sequences = Sequences { batch: 1, length: rows };
    workspace(cpu, sequences, channels, 1, 8, Precision::F32)
}

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
        let mut memory = scratch(&cpu, 512, 64);
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
                        Conversion::Mxfp4(Quantization { signs: &signs, rounding, range, draw });
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
        let mut memory = scratch(&cpu, 1024, 256);
        // The last C is large enough to be stored past the caches.
        let shapes = [
            (1, 1, 1),
            (7, 50, 33),
            (130, 97, 1000),
            (16, 48, 64),
            (9, 200, 31),
            // Several passes over C.
            (9, 50, 4200),
            (603, 448, 40),
        ];
        for (m, n, k) in shapes {
            let (a, b) = (random(m * k, 1), random(n * k, 2));
            let draw = RANDOM.rounding(OperandId::Dy);
            let (rounding, range) = (Rounding::Nearest, Range::Full);
            let nearest = Quantization { signs: &[], rounding, range, draw };
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
            let value = |i| if i / 32 % 5 == 3 { 0.0 } else { values[i] * 0.1 * factor };
            (0..len).map(value).collect::<Vec<f32>>()
        };
        let (a, b) = (scaled(m * k, 1, small), scaled(n * k, 2, large));
        let draw = RANDOM.rounding(OperandId::Dy);
        let quantize = |data, rows| {
            let source = Source { data, rows, depth: k, transposed: false };
            Mxfp4Matrix::quantize(source, &[], Rounding::Unbiased, &draw)
        };
        let exact = quantize(&a, m).product(&quantize(&b, n));
        each_isa(|cpu| {
            let mut memory = scratch(&cpu, 128, 32);
            let (rounding, range) = (Rounding::Unbiased, Range::ThreeQuarters);
            let unbiased = Quantization { signs: &[], rounding, range, draw };
            let (ma, mb) = (Matrix::rows_by_depth(&a, m, k), Matrix::rows_by_depth(&b, n, k));
            let mut c = poison(m * n);
            let out = Output { c: &mut c, stride: n, alpha: 1.0, bias: None, accumulate: false };
            let memory = (memory.a.as_mut(), memory.b[0].as_mut());
            cpu.product([&ma, &mb].map(|m| (m, Conversion::Mxfp4(unbiased))), memory, out);
            assert_eq!(c[..], exact[..], "{small:e} by {large:e}");
        });
    }
}
