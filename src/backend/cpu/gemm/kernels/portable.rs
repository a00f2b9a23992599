//! Plain Rust; `FMA` says that fused multiply-adds are one instruction.

use super::*;

#[inline(always)]
fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// One panel at a time: 8 x 16 sums fit the registers of AVX2 about as well as anything.
#[inline(always)]
pub(super) fn f32<const FMA: bool>(
    a: &Strided<'_>,
    b: &Panels<'_, f32>,
    rows: usize,
    panels: usize,
    steps: usize,
    out: &mut Tile,
) {
    for p in 0..panels {
        for half in [0, TILE_ROWS / 2] {
            let mut sums = [[0.0f32; PANEL]; TILE_ROWS / 2];
            for (k, b) in b.rows(p)[..steps].iter().enumerate() {
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = a.data[(half + r).min(rows - 1) * a.stride + k * a.step];
                    for l in 0..PANEL {
                        sums[l] = multiply_add::<FMA>(a, b[l], sums[l]);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                out.0[half + r][p * PANEL..][..PANEL].copy_from_slice(sums);
            }
        }
    }
}

#[inline(always)]
pub(super) fn bf16<const FMA: bool>(
    a: &[u32],
    b: &Panels<'_, u32>,
    panels: usize,
    steps: usize,
    out: &mut Tile,
) {
    // A bf16 is the upper half of an f32.
    let (even, odd) = (|w: u32| f32::from_bits(w << 16), |w: u32| f32::from_bits(w & !0xffff));
    for p in 0..panels {
        for half in [0, TILE_ROWS / 2] {
            let mut sums = [[0.0f32; PANEL]; TILE_ROWS / 2];
            for (k, b) in b.rows(p)[..steps].iter().enumerate() {
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = a[k * PANEL + half + r];
                    for l in 0..PANEL {
                        let sum = multiply_add::<FMA>(odd(a), odd(b[l]), sums[l]);
                        sums[l] = multiply_add::<FMA>(even(a), even(b[l]), sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                out.0[half + r][p * PANEL..][..PANEL].copy_from_slice(sums);
            }
        }
    }
}

#[inline(always)]
pub(super) fn mxfp4(t: &Mxfp4Tile<'_>, panels: usize, out: &mut Tile) {
    for p in 0..panels {
        let (b, b_scales) = (t.b.rows(p), t.b_scales.rows(p));
        for r in 0..TILE_ROWS {
            let mut sums = [0.0f32; PANEL];
            for block in 0..t.blocks {
                let mut dots = [t.a_sums[block * PANEL + r]; PANEL];
                for step in block * BLOCK_STEPS..(block + 1) * BLOCK_STEPS {
                    let a = t.a[step * PANEL + r].to_le_bytes().map(|v| i32::from(v as i8));
                    for l in 0..PANEL {
                        let b = b[step][l];
                        let byte = |i: u32| (b >> (8 * i) & 255) as i32;
                        dots[l] += a[0] * byte(0) + a[1] * byte(1);
                        dots[l] += a[2] * byte(2) + a[3] * byte(3);
                    }
                }
                let a_scale = t.a_scales[block * PANEL + r].to_bits();
                let a_scale = f32::from_bits(a_scale.wrapping_add(ONE));
                for l in 0..PANEL {
                    sums[l] += dots[l] as f32 * (a_scale * b_scales[block][l]);
                }
            }
            out.0[r][p * PANEL..][..PANEL].copy_from_slice(&sums);
        }
    }
}
