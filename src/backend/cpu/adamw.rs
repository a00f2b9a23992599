//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) and the gradient's norm.

use rayon::prelude::*;

use super::isa::simd_fn;
use super::{Cpu, JOB_ELEMENTS};
use crate::backend::AdamWStep;

/// Sum of squares: f32 products, summed in f64 by chunks of fixed size, in order.
pub(super) fn sum_of_squares(cpu: &Cpu, x: &[f32]) -> f64 {
    // A sum over an indexed parallel iterator would depend on how it is split, hence the two steps.
    let jobs = x.len().div_ceil(JOB_ELEMENTS);
    let mut sums = vec![0.0f64; jobs];
    cpu.install(|| {
        sums.par_iter_mut().zip(x.par_chunks(JOB_ELEMENTS)).for_each(|(sum, x)| {
            *sum = chunk_sum_of_squares(cpu.isa(), x);
        });
    });
    sums.iter().sum()
}

/// One update of a parameter and its moments.
pub(super) fn update(
    cpu: &Cpu,
    param: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    gradient: &[f32],
    step: &AdamWStep,
) {
    cpu.install(|| {
        param
            .par_chunks_mut(JOB_ELEMENTS)
            .zip(m.par_chunks_mut(JOB_ELEMENTS))
            .zip(v.par_chunks_mut(JOB_ELEMENTS))
            .zip(gradient.par_chunks(JOB_ELEMENTS))
            .for_each(|(((p, m), v), g)| update_chunk(cpu.isa(), p, m, v, g, step));
    });
}

simd_fn! {
    fn chunk_sum_of_squares(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 8];
        let (whole, rest) = x.as_chunks::<8>();
        for chunk in whole {
            for l in 0..8 {
                lanes[l] += f64::from(chunk[l]) * f64::from(chunk[l]);
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(*x) * f64::from(*x);
        }
        lanes.iter().sum()
    }
}

simd_fn! {
    fn update_chunk(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], step: &AdamWStep) {
        // The corrections for moments that start at 0, in f64: beta^t is close to 1 for long.
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(step.t as f64);
        let size = (f64::from(step.lr) / correction(step.beta1)) as f32;
        let root = (1.0 / correction(step.beta2).sqrt()) as f32;
        let keep = 1.0 - step.lr * step.weight_decay;
        let n = p.len();
        let (m, v, g) = (&mut m[..n], &mut v[..n], &g[..n]);
        for i in 0..n {
            let gradient = g[i] * step.gradient_scale;
            m[i] = step.beta1 * m[i] + (1.0 - step.beta1) * gradient;
            v[i] = step.beta2 * v[i] + (1.0 - step.beta2) * (gradient * gradient);
            p[i] = p[i] * keep - size * (m[i] / (v[i].sqrt() * root + step.epsilon));
        }
    }
}
