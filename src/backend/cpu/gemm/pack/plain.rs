//! Packing of f32 and bf16: the elements as they are, or rounded to nearest even, in pairs.

use super::{Matrix, Strip, add_to_sums, turn_square};
use crate::backend::cpu::gemm::{Format, PANEL, Packing, Role};
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::lanes::{Lanes, lanes_fn, round_to_bf16};

/// Elements along the reduction dimension that plain packing fetches ahead.
const AHEAD: usize = 2 * PANEL;

/// Packs all vectors as f32, in this thread: `out` is (panels, depth, 16).
pub(in crate::backend::cpu) fn pack_f32(isa: Isa, source: &Matrix<'_>, out: &mut [f32]) {
    let strip = Strip { source, r0: 0, panels: 1, packing: Packing::Panels, role: Role::A };
    for (panel, out) in out.chunks_exact_mut(source.depth * PANEL).enumerate() {
        f32_strip(isa, Strip { r0: panel * PANEL, ..strip }, out, &mut []);
    }
}

/// The same as bf16: `out` is (panels, steps, 16), see [`Packed::words`].
pub(in crate::backend::cpu) fn pack_bf16(
    isa: Isa,
    source: &Matrix<'_>,
    packing: Packing,
    role: Role,
    out: &mut [u32],
) {
    let strip = Strip { source, r0: 0, panels: 1, packing, role };
    let in_panel = packing.steps(Format::Bf16, source.depth) * PANEL;
    let panels = out.chunks_exact_mut(in_panel).take(source.rows.div_ceil(PANEL));
    for (panel, out) in panels.enumerate() {
        bf16_strip(isa, Strip { r0: panel * PANEL, ..strip }, out, &mut []);
    }
}

lanes_fn! {
    /// `out` is (panels, depth, 16), `vector_sums` (panels, 16) or empty.
    pub(super) fn f32_strip(
        strip: Strip<'_>,
        out: &mut [f32],
        vector_sums: &mut [f32],
    ) = f32_lanes;
}

lanes_fn! {
    /// `out` is (panels, steps, 16), `vector_sums` (panels, 16) or empty.
    pub(super) fn bf16_strip(
        strip: Strip<'_>,
        out: &mut [u32],
        vector_sums: &mut [f32],
    ) = bf16_lanes;
}

#[inline(always)]
unsafe fn f32_lanes<L: Lanes>(strip: Strip<'_>, out: &mut [f32], vector_sums: &mut [f32]) {
    let Strip { source, r0, panels, .. } = strip;
    let (depth, rows) = (source.depth, out.as_chunks_mut::<PANEL>().0);
    vector_sums.fill(0.0);
    for k0 in (0..depth).step_by(PANEL) {
        for panel in 0..panels {
            // SAFETY: passed on; rows of 16 elements.
            unsafe {
                let values = source.load::<L>(r0 + panel * PANEL, k0);
                source.prefetch::<L>(r0 + panel * PANEL, k0 + AHEAD, panels);
                let rows = &mut rows[panel * depth + k0..][..PANEL.min(depth - k0)];
                for (i, to) in rows.iter_mut().enumerate() {
                    L::store(to.as_mut_ptr(), values[i]);
                }
                add_to_sums::<L>(&values, vector_sums, panel);
            }
        }
    }
}

/// Pairs of bf16, the lower index in the low half.
#[inline(always)]
unsafe fn bf16_lanes<L: Lanes>(strip: Strip<'_>, out: &mut [u32], vector_sums: &mut [f32]) {
    let Strip { source, r0, panels, packing, role } = strip;
    let steps = packing.steps(Format::Bf16, source.depth);
    let rows = out.as_chunks_mut::<PANEL>().0;
    vector_sums.fill(0.0);
    let by_lanes = (packing, role) == (Packing::Tiles, Role::A);
    if by_lanes && !source.transposed {
        // SAFETY: passed on.
        unsafe { bf16_rows::<L>(strip, steps, rows) };
        return;
    }
    for step in (0..steps).step_by(PANEL / 2) {
        for panel in 0..panels {
            // SAFETY: passed on; rows of 16 words.
            unsafe {
                let values = source.load::<L>(r0 + panel * PANEL, 2 * step);
                source.prefetch::<L>(r0 + panel * PANEL, 2 * step + AHEAD, panels);
                let count = (PANEL / 2).min(steps - step);
                let at = panel * steps + step;
                for (i, to) in rows[at..][..count].iter_mut().enumerate() {
                    L::store_u(to.as_mut_ptr(), L::bf16_pairs(values[2 * i], values[2 * i + 1]));
                }
                add_to_sums::<L>(&values, vector_sums, panel);
                if by_lanes && step % PANEL > 0 {
                    turn_square::<L>(&mut rows[at - PANEL / 2..][..PANEL]);
                }
            }
        }
    }
}

/// The squares of tiles of operand A from a source that has them as rows already.
#[inline(always)]
unsafe fn bf16_rows<L: Lanes>(strip: Strip<'_>, steps: usize, out: &mut [[u32; PANEL]]) {
    let Strip { source, r0, panels, .. } = strip;
    for panel in 0..panels {
        for step in (0..steps).step_by(PANEL) {
            // SAFETY: passed on; rows of 16 words.
            unsafe {
                let r0 = r0 + panel * PANEL;
                let first = source.load_square::<L>(r0, 2 * step);
                let second = source.load_square::<L>(r0, 2 * step + PANEL);
                source.prefetch::<L>(r0, 2 * step + AHEAD, 1);
                source.prefetch::<L>(r0, 2 * step + PANEL + AHEAD, 1);
                let rows = &mut out[panel * steps + step..][..PANEL];
                for (i, to) in rows.iter_mut().enumerate() {
                    let (low, high) = (round_to_bf16::<L>(first[i]), round_to_bf16::<L>(second[i]));
                    L::store_u(to.as_mut_ptr(), L::narrow([low, high]));
                }
            }
        }
    }
}
