//! GELU, tanh form (Hendrycks and Gimpel, arXiv 1606.08415), and its derivative.

use rayon::prelude::*;

use super::isa::simd_fn;
use super::math::{self, AHEAD};
use super::{Cpu, JOB_ELEMENTS};

/// out = gelu(x)
pub(super) fn forward(cpu: &Cpu, out: &mut [f32], x: &[f32]) {
    cpu.install(|| {
        let x = x.par_chunks(JOB_ELEMENTS);
        let pairs = out.par_chunks_mut(JOB_ELEMENTS).zip(x);
        pairs.for_each(|(out, x)| forward_chunk(cpu.isa(), out, x));
    });
}

/// d = d * gelu'(x)
pub(super) fn backward(cpu: &Cpu, d: &mut [f32], x: &[f32]) {
    cpu.install(|| {
        let x = x.par_chunks(JOB_ELEMENTS);
        let pairs = d.par_chunks_mut(JOB_ELEMENTS).zip(x);
        pairs.for_each(|(d, x)| backward_chunk(cpu.isa(), d, x));
    });
}

simd_fn! {
    fn forward_chunk(out: &mut [f32], x: &[f32]) {
        for (out, x) in out.chunks_mut(AHEAD).zip(x.chunks(AHEAD)) {
            math::prefetch_after(x);
            for (out, x) in out.iter_mut().zip(x) {
                *out = math::gelu(*x);
            }
        }
    }
}

simd_fn! {
    fn backward_chunk(d: &mut [f32], x: &[f32]) {
        for (d, x) in d.chunks_mut(AHEAD).zip(x.chunks(AHEAD)) {
            math::prefetch_after(d);
            math::prefetch_after(x);
            for (d, x) in d.iter_mut().zip(x) {
                *d *= math::gelu_derivative(*x);
            }
        }
    }
}
