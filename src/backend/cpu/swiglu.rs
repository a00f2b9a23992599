//! SwiGLU: the gate of an MLP, silu(gate) up, and its gradient (Shazeer, arXiv 2002.05202).

use rayon::prelude::*;

use super::isa::simd_fn;
use super::math::{self, prefetch_after};
use super::{Cpu, rows_per_job};

/// out (rows, M) = silu(gate) up of y = [gate | up] (rows, 2 M).
pub(super) fn forward(cpu: &Cpu, out: &mut [f32], y: &[f32], m: usize) {
    let per_job = rows_per_job(2 * m);
    cpu.install(|| {
        let rows = out.par_chunks_mut(per_job * m).zip(y.par_chunks(per_job * 2 * m));
        rows.for_each(|(out, y)| {
            for (out, y) in out.chunks_exact_mut(m).zip(y.chunks_exact(2 * m)) {
                let (gate, up) = y.split_at(m);
                forward_row(cpu.isa(), out, gate, up);
            }
        });
    });
}

/// y becomes its gradient, of d (rows, M).
pub(super) fn backward(cpu: &Cpu, y: &mut [f32], d: &[f32], m: usize) {
    let per_job = rows_per_job(2 * m);
    cpu.install(|| {
        let rows = y.par_chunks_mut(per_job * 2 * m).zip(d.par_chunks(per_job * m));
        rows.for_each(|(y, d)| {
            for (y, d) in y.chunks_exact_mut(2 * m).zip(d.chunks_exact(m)) {
                let (gate, up) = y.split_at_mut(m);
                backward_row(cpu.isa(), gate, up, d);
            }
        });
    });
}

simd_fn! {
    fn forward_row(out: &mut [f32], gate: &[f32], up: &[f32]) {
        prefetch_after(up);
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = math::silu(*gate) * up;
        }
    }
}

simd_fn! {
    fn backward_row(gate: &mut [f32], up: &mut [f32], d: &[f32]) {
        prefetch_after(up);
        prefetch_after(d);
        for ((gate, up), d) in gate.iter_mut().zip(up).zip(d) {
            let (g, u) = (*gate, *up);
            *gate = d * u * math::silu_derivative(g);
            *up = d * math::silu(g);
        }
    }
}
