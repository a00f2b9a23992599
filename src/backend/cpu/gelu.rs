//! GELU (Hendrycks and Gimpel, arXiv 1606.08415) in its tanh form and itself, and their
//! derivatives.

use rayon::prelude::*;

use super::isa::simd_fn;
use super::math::{self, AHEAD};
use super::{Cpu, JOB_ELEMENTS};
use crate::backend::Activation;

/// out = gelu(x)
pub(super) fn forward(cpu: &Cpu, out: &mut [f32], x: &[f32], form: Activation) {
    let chunk = match form {
        Activation::GeluTanh => forward_chunk,
        Activation::Gelu => exact_forward_chunk,
    };
    cpu.install(|| {
        let x = x.par_chunks(JOB_ELEMENTS);
        let pairs = out.par_chunks_mut(JOB_ELEMENTS).zip(x);
        pairs.for_each(|(out, x)| chunk(cpu.isa(), out, x));
    });
}

/// d = d * gelu'(x)
pub(super) fn backward(cpu: &Cpu, d: &mut [f32], x: &[f32], form: Activation) {
    let chunk = match form {
        Activation::GeluTanh => backward_chunk,
        Activation::Gelu => exact_backward_chunk,
    };
    cpu.install(|| {
        let x = x.par_chunks(JOB_ELEMENTS);
        let pairs = d.par_chunks_mut(JOB_ELEMENTS).zip(x);
        pairs.for_each(|(d, x)| chunk(cpu.isa(), d, x));
    });
}

/// The two loops of one form.
macro_rules! loops {
    ($forward:ident, $backward:ident, $gelu:path, $derivative:path) => {
        simd_fn! {
            fn $forward(out: &mut [f32], x: &[f32]) {
                for (out, x) in out.chunks_mut(AHEAD).zip(x.chunks(AHEAD)) {
                    math::prefetch_after(x);
                    for (out, x) in out.iter_mut().zip(x) {
                        *out = $gelu(*x);
                    }
                }
            }
        }

        simd_fn! {
            fn $backward(d: &mut [f32], x: &[f32]) {
                for (d, x) in d.chunks_mut(AHEAD).zip(x.chunks(AHEAD)) {
                    math::prefetch_after(d);
                    math::prefetch_after(x);
                    for (d, x) in d.iter_mut().zip(x) {
                        *d *= $derivative(*x);
                    }
                }
            }
        }
    };
}

loops!(forward_chunk, backward_chunk, math::gelu, math::gelu_derivative);
loops!(exact_forward_chunk, exact_backward_chunk, math::exact_gelu, math::exact_gelu_derivative);
