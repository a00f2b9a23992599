//! The arithmetic of rows of scores: softmax and its gradient, 16 queries at a time, lane by lane.

use crate::backend::cpu::gemm::PANEL;
use crate::backend::cpu::isa::{Isa, simd_fn};
use crate::backend::cpu::lanes::{Lanes, lanes_fn};
use crate::backend::cpu::math::{exp, lane_sum};

/// A number for each of 16 queries.
type PerQuery = [f32; PANEL];

/// What the backward pass knows of 16 queries: the log of the sum of their scores' exponentials,
/// and D.
pub(super) struct QuerySums {
    pub(super) lse: PerQuery,
    pub(super) d: PerQuery,
}

simd_fn! {
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
        lane_sum([a, b], |[a, b]| a * b)
    }
}

/// Turns scores (keys, 16 queries) of queries first .. into probabilities in place, 0 for keys that
/// a query does not see, over keys 0 .. `keys`. Returns log sum exp of each query.
pub(super) fn softmax_panel(
    isa: Isa,
    scores: &mut [f32],
    first: usize,
    keys: usize,
    scale: f32,
) -> PerQuery {
    let (max, sum) = exp_panel(isa, scores, first, keys, scale);
    scale_rows(isa, &mut scores[..keys * PANEL], &sum.map(|s| 1.0 / s));
    std::array::from_fn(|l| max[l] * scale + sum[l].ln())
}

simd_fn! {
    /// Turns scores into e^(scale (score - max)), and returns the largest score and the sum of each
    /// query.
    ///
    /// NOTE: keys that all queries see are a loop of their own; comparing positions for each took
    /// longer than the exponentials.
    fn exp_panel(
        scores: &mut [f32],
        first: usize,
        keys: usize,
        scale: f32,
    ) -> (PerQuery, PerQuery) {
        let (seen, diagonal) = scores.as_chunks_mut::<PANEL>().0[..keys].split_at_mut(first);
        let mut max = [f32::MIN; PANEL];
        for row in seen.iter() {
            for l in 0..PANEL {
                max[l] = if row[l] > max[l] { row[l] } else { max[l] };
            }
        }
        for (key, row) in diagonal.iter_mut().enumerate() {
            for l in 0..PANEL {
                row[l] = if key <= l { row[l] } else { f32::NEG_INFINITY };
                max[l] = if row[l] > max[l] { row[l] } else { max[l] };
            }
        }
        let mut sum = [0.0; PANEL];
        for row in scores.as_chunks_mut::<PANEL>().0[..keys].iter_mut() {
            for l in 0..PANEL {
                row[l] = exp((row[l] - max[l]) * scale);
                sum[l] += row[l];
            }
        }
        (max, sum)
    }
}

lanes_fn! {
    /// Multiplies rows of 16 by `factors`.
    ///
    /// NOTE: with whole registers. Of the plain loop the compiler made gathers and scatters.
    fn scale_rows(rows: &mut [f32], factors: &[f32; PANEL]) = scale_lanes;
}

#[inline(always)]
unsafe fn scale_lanes<L: Lanes>(rows: &mut [f32], factors: &[f32; PANEL]) {
    for row in rows.as_chunks_mut::<PANEL>().0 {
        // SAFETY: passed on; rows of 16 elements.
        unsafe {
            let v = L::mul(L::load(row.as_ptr()), L::load(factors.as_ptr()));
            L::store(row.as_mut_ptr(), v);
        }
    }
}

simd_fn! {
    /// scores -> P and dscores -> dS times `scale`, both in place, for queries first .. over
    /// keys 0 .. `keys`.
    pub(super) fn gradient_panel(
        scores: &mut [f32],
        dscores: &mut [f32],
        first: usize,
        keys: usize,
        scale: f32,
        queries: &QuerySums,
    ) {
        let QuerySums { lse, d } = queries;
        let rows = &mut scores.as_chunks_mut::<PANEL>().0[..keys];
        let drows = &mut dscores.as_chunks_mut::<PANEL>().0[..keys];
        for (key, (row, drow)) in rows.iter_mut().zip(drows).enumerate() {
            for l in 0..PANEL {
                let visible = key <= first + l;
                let p = exp(row[l] * scale - lse[l]);
                let p = if visible { p } else { 0.0 };
                row[l] = p;
                drow[l] = p * (drow[l] - d[l]) * scale;
            }
        }
    }
}
