//! FP8 bytes, along rows and transposed: `fp8.cu`.

use super::{Emulator, SCHEDULES};
use crate::backend::cuda::quantize::fp8::{CONVERTED, TILE};
use crate::formats::{self, Draw, Purpose, e4m3_scale, e5m2_scale, round_to_e4m3, round_to_e5m2};

/// As `convert_to_fp8`, `turn_to_fp8` and `convert_both_to_fp8` are declared.
type Convert = unsafe extern "C" fn(*mut u8, *mut f32, *const f32, *const u32, u64);
type Turn = unsafe extern "C" fn(*mut u8, *mut f32, *const f32, *const u32, u32, u32);
type Both<T> =
    unsafe extern "C" fn(*mut u8, *mut u8, *mut f32, *mut f32, *const T, *const u32, u32, u32);

/// The number of an FP8 byte.
fn decode(byte: u8, e5m2: bool) -> f32 {
    let (mantissa, bias) = if e5m2 { (2, 15) } else { (3, 7) };
    let magnitude = u32::from(byte & 127);
    let (exponent, low) = ((magnitude >> mantissa) as i32, magnitude & ((1 << mantissa) - 1));
    let step = 2f32.powi(exponent.max(1) - bias - mantissa);
    let whole = if exponent == 0 { low } else { low | 1 << mantissa };
    let value = whole as f32 * step;
    if byte > 127 { -value } else { value }
}

/// NOTE: one after the other, since emulators of one file in one process share what is static in
/// its templates.
#[test]
fn bytes_are_those_of_the_definition_along_rows_and_transposed() {
    let Some(emulator) = Emulator::new("fp8") else { return };
    check_each_form(&emulator);
    check_both_forms(&emulator);
}

fn check_each_form(emulator: &Emulator) {
    for (case, (rows, cols)) in [(16, 16), (48, 80), (144, 64), (128, 208)].into_iter().enumerate()
    {
        let mut v = super::aligned(&vec![0; 4 * rows * cols]);
        let v: &mut [f32] = bytemuck::cast_slice_mut(&mut v);
        formats::fill_normal(v, 1.0, &Draw::of(case as u64, Purpose::Weights, 0, 0), 0);
        v.iter_mut().for_each(|v| *v *= v.abs().powi(4));
        let amax = v.iter().fold(0.0f32, |amax, v| amax.max(v.abs()));
        let bits = amax.to_bits();
        for e5m2 in [false, true] {
            let exact_scale = if e5m2 { e5m2_scale(amax) } else { e4m3_scale(amax) };
            let round = if e5m2 { round_to_e5m2 } else { round_to_e4m3 };
            let exact: Vec<f32> = v.iter().map(|v| round(v / exact_scale)).collect();
            let mut out = super::aligned(&vec![0xaa; rows * cols]);
            let to = out.as_mut_ptr().cast::<u8>();
            let mut scale = f32::NAN;
            let at_scale = &raw mut scale;
            let convert: Convert = emulator.kernel(&format!("convert_to_fp8<float,{e5m2}>"));
            let grid = [v.len().div_ceil(CONVERTED * 256), 1];
            emulator.run(SCHEDULES[case % 3], grid, 256, || {
                // SAFETY: buffers and grid are what the comment of the kernel asks for.
                unsafe { convert(to, at_scale, v.as_ptr(), &raw const bits, v.len() as u64) };
            });
            assert_eq!(scale, exact_scale);
            let bytes: Vec<u8> = bytemuck::cast_slice(&out)[..v.len()].to_vec();
            for (i, exact) in exact.iter().enumerate() {
                assert_eq!(decode(bytes[i], e5m2), *exact, "{rows} {cols} {e5m2} {i}");
            }
            let turn: Turn = emulator.kernel(&format!("turn_to_fp8<float,{e5m2}>"));
            let grid = [cols.div_ceil(TILE), rows.div_ceil(TILE)];
            (scale, out) = (f32::NAN, super::aligned(&vec![0xaa; rows * cols]));
            let (to, at_scale) = (out.as_mut_ptr().cast::<u8>(), &raw mut scale);
            emulator.run(SCHEDULES[case % 3], grid, 256, || {
                // SAFETY: as above.
                unsafe {
                    turn(to, at_scale, v.as_ptr(), &raw const bits, rows as u32, cols as u32);
                }
            });
            assert_eq!(scale, exact_scale);
            let turned: &[u8] = &bytemuck::cast_slice(&out)[..v.len()];
            for row in 0..rows {
                for col in 0..cols {
                    assert_eq!(turned[col * rows + row], bytes[row * cols + col], "{row} {col}");
                }
            }
        }
    }
}

/// Both forms from one reading are those of the kernels that make one each, and the parts of the
/// column sums add up to these.
fn check_both_forms(emulator: &Emulator) {
    for (case, (rows, cols)) in [(16, 16), (144, 80), (272, 208)].into_iter().enumerate() {
        let mut v = vec![0.0; rows * cols];
        formats::fill_normal(&mut v, 1.0, &Draw::of(case as u64, Purpose::Weights, 1, 0), 0);
        for (i, v) in v.iter_mut().enumerate() {
            *v = match i % 53 {
                7 => 0.0,
                11 => *v * 1e-30,
                13 => *v * 1e-7,
                17 => -0.0,
                _ => half::bf16::from_f32(*v * v.abs().powi(3)).to_f32(),
            };
            *v = half::bf16::from_f32(*v).to_f32();
        }
        if case == 2 {
            v[rows * cols / 2] = f32::NAN;
        }
        let narrow = v.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes());
        let narrow = super::aligned(&narrow.collect::<Vec<_>>());
        let wide = super::aligned(bytemuck::cast_slice(&v));
        let bits = v.iter().map(|v| v.to_bits() & 0x7fff_ffff).max().unwrap();
        let sums: Vec<f64> =
            (0..cols).map(|c| v[c..].iter().step_by(cols).map(|v| f64::from(*v)).sum()).collect();
        let sizes: Vec<f64> = (0..cols)
            .map(|c| v[c..].iter().step_by(cols).map(|v| f64::from(v.abs())).sum())
            .collect();
        for e5m2 in [false, true] {
            let (schedule, poison) = (SCHEDULES[case % 3], vec![0xaa; rows * cols]);
            let grid = [cols.div_ceil(TILE), rows.div_ceil(TILE)];
            let [mut by_rows, mut by_columns] = [0; 2].map(|_| super::aligned(&poison));
            let mut scale = f32::NAN;
            let at_scale = &raw mut scale;
            let [to_rows, to_columns] =
                [&mut by_rows, &mut by_columns].map(|to| to.as_mut_ptr().cast::<u8>());
            let convert: Convert = emulator.kernel(&format!("convert_to_fp8<float,{e5m2}>"));
            let turn: Turn = emulator.kernel(&format!("turn_to_fp8<float,{e5m2}>"));
            let from = wide.as_ptr().cast();
            emulator.run(schedule, [(rows * cols).div_ceil(CONVERTED * 256), 1], 256, || {
                // SAFETY: buffers and grid are what the comment of the kernel asks for.
                unsafe { convert(to_rows, at_scale, from, &raw const bits, v.len() as u64) };
            });
            emulator.run(schedule, grid, 256, || {
                // SAFETY: as above.
                unsafe {
                    turn(to_columns, at_scale, from, &raw const bits, rows as u32, cols as u32);
                }
            });
            for number in ["float", "bf16"] {
                let mut out = [0; 2].map(|_| super::aligned(&poison));
                let mut parts = vec![f32::NAN; grid[1] * cols];
                let [to_rows, to_columns] = out.each_mut().map(|to| to.as_mut_ptr().cast::<u8>());
                let to_parts = parts.as_mut_ptr();
                let mut own_scale = f32::NAN;
                let at_scale = &raw mut own_scale;
                let name = format!("convert_both_to_fp8<{number},{e5m2}>");
                let both: Both<u128> = emulator.kernel(&name);
                let from = if number == "float" { wide.as_ptr() } else { narrow.as_ptr() };
                emulator.run(schedule, grid, 256, || {
                    let (rows, cols, amax) = (rows as u32, cols as u32, &raw const bits);
                    // SAFETY: as above.
                    unsafe {
                        both(to_rows, to_columns, at_scale, to_parts, from, amax, rows, cols);
                    }
                });
                assert!(out == [by_rows.clone(), by_columns.clone()], "{rows} {cols} {name}");
                assert_eq!(own_scale.to_bits(), scale.to_bits());
                let mut out = [0; 2].map(|_| super::aligned(&poison));
                let [to_rows, to_columns] = out.each_mut().map(|to| to.as_mut_ptr().cast::<u8>());
                emulator.run(schedule, grid, 256, || {
                    let (rows, cols, amax) = (rows as u32, cols as u32, &raw const bits);
                    let no_sums = std::ptr::null_mut();
                    // SAFETY: as above.
                    unsafe {
                        both(to_rows, to_columns, at_scale, no_sums, from, amax, rows, cols);
                    }
                });
                assert!(out == [by_rows.clone(), by_columns.clone()], "{rows} {cols} {name}");
                for (c, exact) in sums.iter().enumerate() {
                    let ours: f64 = parts[c..].iter().step_by(cols).map(|v| f64::from(*v)).sum();
                    let same = (ours - exact).abs() <= 1e-6 * sizes[c];
                    assert!(same || ours.is_nan() && exact.is_nan(), "{name}: {ours} {exact}");
                }
            }
        }
    }
}
