//! FP8 bytes, along rows and transposed: `fp8.cu`.

use super::{Emulator, SCHEDULES};
use crate::backend::cuda::quantize::fp8::{TURNED_COLUMNS, TURNED_ROWS};
use crate::formats::{self, Draw, Purpose, e4m3_scale, e5m2_scale, round_to_e4m3, round_to_e5m2};

/// As `convert_to_fp8` and `turn_to_fp8` are declared.
type Convert = unsafe extern "C" fn(*mut u8, *mut f32, *const f32, *const u32, u64);
type Turn = unsafe extern "C" fn(*mut u8, *mut f32, *const f32, *const u32, u32, u32);

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

#[test]
fn bytes_are_those_of_the_definition_along_rows_and_transposed() {
    let Some(emulator) = Emulator::new("fp8") else { return };
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
            let grid = [v.len().div_ceil(8 * 256), 1];
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
            let grid = [cols.div_ceil(TURNED_COLUMNS), rows.div_ceil(TURNED_ROWS)];
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
