//! Products of MXFP4 operands on the FP4 tensor cores: `product_sm120.cu`.

use super::super::quantize::Launch;
use super::super::quantize::carrier::Fp4Product;
use super::{Emulator, SCHEDULES, aligned};
use crate::formats::{BLOCK, Draw, Mxfp4Matrix, Purpose};

/// Any codes, and scales of ordinary magnitude.
pub(in super::super) fn operand(rows: usize, depth: usize, seed: u64) -> Mxfp4Matrix {
    let draw = Draw::of(seed, Purpose::Weights, 82, 0);
    let byte = |i: usize| draw.bits(i as u32, 0)[0] as u8;
    let scale = |i: usize| 118 + draw.bits(i as u32, 1)[0] as u8 % 18;
    Mxfp4Matrix {
        rows,
        depth,
        codes: (0..rows * depth / 2).map(byte).collect(),
        scales: (0..rows * depth / BLOCK).map(scale).collect(),
    }
}

/// The whole kernel of the FP4 tensor cores, at sizes that nothing divides, against the f64
/// product.
#[test]
fn fp4_products_are_those_of_their_operands() {
    let Some(emulator) = Emulator::new("product_sm120") else { return };
    let cases =
        [(1, 1, 32), (16, 8, 64), (130, 137, 96), (128, 128, 512), (77, 200, 1056), (257, 40, 640)];
    for (case, (m, n, k)) in cases.into_iter().enumerate() {
        let (mut a, b) = (operand(m, k, 1), operand(n, k, 2));
        if case == 2 {
            a.scales[5 * k / BLOCK + 1] = 255;
        }
        let (x, y) = (a.dequantize(), b.dequantize());
        let alpha = 16.0 / 9.0f32;
        let dot = |i: usize, j: usize| -> (f64, f64) {
            let terms = (0..k).map(|l| f64::from(x[i * k + l]) * f64::from(y[j * k + l]));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), v| (sum + v, size + v.abs()));
            (f64::from(alpha) * sum, f64::from(alpha) * size)
        };
        let [a_codes, b_codes] = [&a.codes, &b.codes].map(|bytes| aligned(bytes));
        let [a_scales, b_scales] = [&a.scales, &b.scales].map(|bytes| aligned(bytes));
        for (at, bytes) in [
            (&a_codes, &a.codes),
            (&b_codes, &b.codes),
            (&a_scales, &a.scales),
            (&b_scales, &b.scales),
        ] {
            emulator.may_read(at, bytes.len());
        }
        let stride = n + case % 3;
        for (schedule, accumulate, bf16) in [
            (SCHEDULES[0], false, false),
            (SCHEDULES[1], true, false),
            (SCHEDULES[2], false, true),
            (SCHEDULES[0], true, true),
        ] {
            let before = if accumulate { 8.0f32 } else { f32::NAN };
            let mut wide = vec![before; m * stride];
            let mut narrow = vec![half::bf16::from_f32(before).to_bits(); m * stride];
            let c = if bf16 { narrow.as_mut_ptr().addr() } else { wide.as_mut_ptr().addr() };
            let address = |bytes: &[u128]| bytes.as_ptr().addr() as u64;
            let argument = Fp4Product {
                c: c as u64,
                a: address(&a_codes),
                a_scales: address(&a_scales),
                b: address(&b_codes),
                b_scales: address(&b_scales),
                m: m as u32,
                n: n as u32,
                k: k as u32,
                stride: stride as u32,
                alpha,
                accumulate: u32::from(accumulate),
            };
            let grid = [n.div_ceil(128), m.div_ceil(128), 1];
            let name = if bf16 { "product_mxfp4<bf16>" } else { "product_mxfp4<float>" };
            emulator.launch(schedule, name, Launch { grid, block: 256, shared: 0 }, argument);
            for i in 0..m * stride {
                let ours = if bf16 { half::bf16::from_bits(narrow[i]).to_f32() } else { wide[i] };
                let what = format!("({m}, {n}, {k}) accumulate {accumulate} bf16 {bf16}: {i}");
                if i % stride >= n {
                    assert!(ours.to_bits() == before.to_bits(), "{what} is beyond the matrix");
                    continue;
                }
                let (exact, size) = dot(i / stride, i % stride);
                let exact = if accumulate { exact + 8.0 } else { exact };
                let bound = 1e-6 * (size + 8.0) + if bf16 { exact.abs() / 256.0 } else { 0.0 };
                let same =
                    (f64::from(ours) - exact).abs() <= bound || ours.is_nan() && exact.is_nan();
                assert!(same, "{what}: {ours} instead of {exact}");
            }
        }
    }
}
