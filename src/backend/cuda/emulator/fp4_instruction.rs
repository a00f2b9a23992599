//! The instruction of the FP4 tensor cores, modelled from PTX's documentation alone.
//!
//! NOTE: nothing here may be read off the kernel, which would prove nothing. CUTLASS' layouts of
//! the same instruction are the second source.

use super::super::kernels::FILES;
use crate::formats::{decode_e2m1, decode_e8m0};

/// Row and column of element `i` of a thread's fragment of A (16, 64), of B (64, 8), and of C (16,
/// 8).
/// ref: PTX ISA, "Matrix Fragments for mma.m16n8k64".
fn place_in_a(lane: usize, i: usize) -> (usize, usize) {
    let (group_id, thread_in_group) = (lane >> 2, lane % 4);
    let row = if i < 8 || (16..24).contains(&i) { group_id } else { group_id + 8 };
    let column = thread_in_group * 8 + (i & 7);
    (row, if i < 16 { column } else { column + 32 })
}

fn place_in_b(lane: usize, i: usize) -> (usize, usize) {
    let (group_id, thread_in_group) = (lane >> 2, lane % 4);
    let row = thread_in_group * 8 + (i & 7);
    (if i < 8 { row } else { row + 32 }, group_id)
}

fn place_in_c(lane: usize, i: usize) -> (usize, usize) {
    let (group_id, thread_in_group) = (lane >> 2, lane % 4);
    (if i < 2 { group_id } else { group_id + 8 }, thread_in_group * 2 + (i & 1))
}

/// Selectors of the scales, {byte-id, thread-id}, of A and of B.
type Selectors = [(usize, usize); 2];

/// Thread and byte that hold the scale of chunk `chunk` of row `row` of A, and of column `column`
/// of B, with `.scale_vec::2X`: the thread-pair of a quad that thread-id-a selects has the rows of
/// its fragment in order, the thread of a quad that thread-id-b selects its column, and byte-id
/// selects a pair of bytes.
/// ref: PTX ISA, "Block Scaling for mma.sync".
fn scale_of_a(row: usize, chunk: usize, (byte, thread): (usize, usize)) -> (usize, usize) {
    (4 * (row % 8) + 2 * thread + row / 8, byte + chunk)
}

fn scale_of_b(column: usize, chunk: usize, (byte, thread): (usize, usize)) -> (usize, usize) {
    (4 * column + thread, byte + chunk)
}

/// `mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0`
/// of a warp's registers, with the selectors that the kernel has.
pub(super) extern "C" fn multiply(
    d: &mut [[f32; 4]; 32],
    a: &[[u32; 4]; 32],
    b: &[[u32; 2]; 32],
    a_scales: &[u32; 32],
    b_scales: &[u32; 32],
) {
    let [of_a, of_b]: Selectors = [(0, 0); 2];
    let code = |registers: &[u32], i: usize| (registers[i / 8] >> (4 * (i % 8)) & 15) as u8;
    let scale = |registers: &[u32; 32], (lane, byte): (usize, usize)| {
        f64::from(decode_e8m0((registers[lane] >> (8 * byte)) as u8))
    };
    let (mut x, mut y) = ([[0.0; 64]; 16], [[0.0; 8]; 64]);
    for lane in 0..32 {
        for i in 0..32 {
            let (row, k) = place_in_a(lane, i);
            let factor = scale(a_scales, scale_of_a(row, k / 32, of_a));
            x[row][k] = factor * f64::from(decode_e2m1(code(&a[lane], i)));
        }
        for i in 0..16 {
            let (k, column) = place_in_b(lane, i);
            let factor = scale(b_scales, scale_of_b(column, k / 32, of_b));
            y[k][column] = factor * f64::from(decode_e2m1(code(&b[lane], i)));
        }
    }
    for lane in 0..32 {
        for i in 0..4 {
            let (row, column) = place_in_c(lane, i);
            let sum: f64 = (0..64).map(|k| x[row][k] * y[k][column]).sum();
            d[lane][i] = (f64::from(d[lane][i]) + sum) as f32;
        }
    }
}

/// An index in a layout of CUTLASS: the parts of `i`, lowest first, times their strides.
fn in_layout(mut i: usize, layout: &[(usize, usize)]) -> usize {
    let mut index = 0;
    for (size, stride) in layout {
        index += i % size * stride;
        i /= size;
    }
    index
}

/// PTX's documentation and CUTLASS' layouts (`MMA_Traits<SM120_16x8x64_TN_VS>`, column-major) say
/// the same, and the kernel has the selectors that the model has.
#[test]
fn both_sources_know_the_same_fragments() {
    for lane in 0..32 {
        for i in 0..32 {
            let (row, k) = place_in_a(lane, i);
            let thread = in_layout(lane, &[(4, 128), (8, 1)]);
            assert_eq!(row + 16 * k, thread + in_layout(i, &[(8, 16), (2, 8), (2, 512)]));
        }
        for i in 0..16 {
            let (k, column) = place_in_b(lane, i);
            let thread = in_layout(lane, &[(4, 64), (8, 1)]);
            assert_eq!(column + 8 * k, thread + in_layout(i, &[(8, 8), (2, 256)]));
        }
        for i in 0..4 {
            let (row, column) = place_in_c(lane, i);
            let thread = in_layout(lane, &[(4, 32), (8, 1)]);
            assert_eq!(row + 16 * column, thread + in_layout(i, &[(2, 16), (2, 8)]));
        }
        let row = in_layout(lane, &[(2, 8), (2, 0), (8, 1)]);
        if lane % 4 < 2 {
            assert_eq!(scale_of_a(row, 0, (0, 0)), (lane, 0));
        }
        if lane % 4 == 0 {
            assert_eq!(scale_of_b(in_layout(lane, &[(4, 0), (8, 1)]), 1, (0, 0)), (lane, 1));
        }
    }
    let file = FILES.iter().find(|file| file.name == "product_sm120").unwrap();
    assert!(file.texts.concat().contains("{%10}, {0, 0}, {%11}, {0, 0};"));
}
