//! Reads packed operands, so that tests can compare them with their definition.

use super::ONE;
use crate::backend::cpu::gemm::{BLOCK_STEPS, PANEL, Packed, Role};
use crate::formats::BLOCK;

/// The byte of element k of vector `row`, and its block's scale, of MXFP4 in panels.
pub(in crate::backend::cpu) fn unpack_mxfp4(
    packed: &Packed<'_>,
    row: usize,
    k: usize,
    role: Role,
) -> (i8, f32) {
    let (panel, lane) = (row / PANEL, row % PANEL);
    let word = packed.words[(panel * packed.steps + k / 4) * PANEL + lane];
    let block = (panel * packed.steps / BLOCK_STEPS + k / BLOCK) * PANEL + lane;
    let half = packed.scales[block];
    let half =
        if role == Role::B { half } else { f32::from_bits(half.to_bits().wrapping_add(ONE)) };
    (word.to_le_bytes()[[0, 2, 1, 3][k % 4]] as i8, 2.0 * half)
}

/// Element k of vector `row` of an operand in tiles.
pub(in crate::backend::cpu) fn unpack_tiles(
    packed: &Packed<'_>,
    row: usize,
    k: usize,
    role: Role,
) -> f32 {
    let (panel, lane, step) = (row / PANEL, row % PANEL, k / 2);
    let square = panel * packed.steps + step / PANEL * PANEL;
    let word = match role {
        Role::A => packed.words[(square + lane) * PANEL + step % PANEL],
        Role::B => packed.words[(square + step % PANEL) * PANEL + lane],
    };
    half::bf16::from_bits((word >> (16 * (k % 2))) as u16).to_f32()
}
