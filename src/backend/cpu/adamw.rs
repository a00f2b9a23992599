//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) and the gradient's norm.

use rayon::prelude::*;

use super::isa::{Isa, simd_fn};
use super::math::{AHEAD, prefetch_after};
use super::{Cpu, JOB_ELEMENTS};
use crate::backend::{AdamWStep, Trained};

/// Sum of squares in f64: by chunks of fixed size, then halves of halves, whatever the threads.
pub(super) fn sum_of_squares(cpu: &Cpu, x: &[f32]) -> f64 {
    fn halves(isa: Isa, x: &[f32]) -> f64 {
        if x.len() <= JOB_ELEMENTS {
            return chunk_sum_of_squares(isa, x);
        }
        let middle = (x.len() / 2).next_multiple_of(JOB_ELEMENTS);
        let (left, right) = x.split_at(middle);
        let (left, right) = rayon::join(|| halves(isa, left), || halves(isa, right));
        left + right
    }
    cpu.install(|| halves(cpu.isa(), x))
}

/// One update of a parameter and its moments, by `gradient_scale` times its gradient.
pub(super) fn update(cpu: &Cpu, all: Trained<'_, Cpu>, step: &AdamWStep, gradient_scale: f32) {
    let Trained { param, m, v, gradient, decays } = all;
    let weight_decay = if decays { step.weight_decay } else { 0.0 };
    let step = AdamWStep { weight_decay, ..*step };
    cpu.install(|| {
        param
            .par_chunks_mut(JOB_ELEMENTS)
            .zip(m.par_chunks_mut(JOB_ELEMENTS))
            .zip(v.par_chunks_mut(JOB_ELEMENTS))
            .zip(gradient.par_chunks(JOB_ELEMENTS))
            .for_each(|(((p, m), v), g)| {
                update_chunk(cpu.isa(), p, m, v, g, &step, gradient_scale);
            });
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
    fn update_chunk(
        p: &mut [f32],
        m: &mut [f32],
        v: &mut [f32],
        g: &[f32],
        step: &AdamWStep,
        gradient_scale: f32,
    ) {
        // The corrections for moments that start at 0, in f64: beta^t is close to 1 for long.
        let correction = |beta: f32| 1.0 - f64::from(beta).powf(step.t as f64);
        let size = (f64::from(step.lr) / correction(step.beta1)) as f32;
        let root = (1.0 / correction(step.beta2).sqrt()) as f32;
        let keep = 1.0 - step.lr * step.weight_decay;
        let moments = m.chunks_mut(AHEAD).zip(v.chunks_mut(AHEAD));
        for ((p, (m, v)), g) in p.chunks_mut(AHEAD).zip(moments).zip(g.chunks(AHEAD)) {
            prefetch_after(p);
            prefetch_after(m);
            prefetch_after(v);
            prefetch_after(g);
            let n = p.len();
            let (m, v, g) = (&mut m[..n], &mut v[..n], &g[..n]);
            for i in 0..n {
                let gradient = g[i] * gradient_scale;
                m[i] = step.beta1 * m[i] + (1.0 - step.beta1) * gradient;
                v[i] = step.beta2 * v[i] + (1.0 - step.beta2) * (gradient * gradient);
                p[i] = p[i] * keep - size * (m[i] / (v[i].sqrt() * root + step.epsilon));
            }
        }
    }
}
