//! What is kept of weights, against its definition, bit for bit.

use super::*;
use crate::formats::ema;

pub(super) fn slow_means<B: Harness>(backends: &[B]) {
    for (lens, decay) in [([1, 3], 0.998), ([33 * 7, 256], 0.5), ([100_003, 20], 0.9983)] {
        let [w, w_too] = [1, 2].map(|seed| random(lens[seed as usize - 1], seed));
        let [mean, mean_too] = [3, 4].map(|seed| random(lens[seed as usize - 3], seed));
        each(backends, |b| {
            let params = Params::of(b, &[&w, &w_too]);
            let mut means = Flat::of(b, &[&mean, &mean_too]);
            let slot = means.slots[0];
            b.update_mean(&mut means.buffer, slot, params.get(b, 0), decay);
            let expected: Vec<f32> = mean.iter().zip(&w).map(|(m, w)| ema(*m, *w, decay)).collect();
            let [ours, other] = means.read(b).try_into().expect("two pieces");
            assert!(bits(&ours) == bits(&expected), "{}: {} of {decay}", b.name(), ours.len());
            assert_eq!(other, mean_too);
            // What means begin as.
            b.update_mean(&mut means.buffer, slot, params.get(b, 0), 0.0);
            assert_eq!(means.read(b)[0], w);
        });
    }
}
