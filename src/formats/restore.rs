//! What a gradient passes on its way back through the forward pass's quantization.
//!
//! Quartet (arXiv 2505.14669): a forward pass that rotates x and W multiplies Q(x H) by Q(W H).
//! Backward operands that are made from these numbers leave the gradient of x H or W H. Of what the
//! scale cut off nothing passes (the straight-through estimator of a clipped number), and H turns
//! the rest back.
//!
//! The differentiable estimator (arXiv 2501.17116): the gradient of W is multiplied by the slope of
//! a smooth curve through E2M1's steps ([`dge_derivative`]).

use super::{
    BLOCK, E2M1_MAX, E8M0_NAN, GemmId, LinearRecipe, Operand, OperandSource, PowerRule, Scale,
    decode_e8m0, dge_derivative, rotate,
};

/// What a backward GEMM's result goes through to become the gradient of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Restoration {
    /// What the forward pass made of the tensor.
    forward: Operand,
}

impl Restoration {
    /// That of a GEMM; none where its result is the gradient already.
    pub fn of(recipe: &LinearRecipe, gemm: GemmId) -> Option<Self> {
        // dx passes where x was, dW where W was.
        let (backward, forward) = match gemm {
            GemmId::Dgrad => (recipe.dgrad(), recipe.forward().a()),
            GemmId::Wgrad => (recipe.wgrad(), recipe.forward().b()),
        };
        let turned = backward.b().source() == OperandSource::Forward;
        let rotated = turned && forward.transform().is_some();
        (rotated || forward.estimator().is_some()).then_some(Self { forward: *forward })
    }

    /// Columns of the result, of a gradient that has so many: whole groups.
    pub fn depth(&self, columns: usize) -> usize {
        if self.forward.transform().is_some() { columns.next_multiple_of(BLOCK) } else { columns }
    }

    /// The steepness of the estimator, where that is what a gradient passes.
    pub fn estimator(&self) -> Option<u8> {
        self.forward.estimator()
    }

    /// The rule by which scales cut numbers off, if they do so on purpose.
    pub fn clips(&self) -> Option<PowerRule> {
        match self.forward.format().scale() {
            Scale::Power(rule @ (PowerRule::Quest | PowerRule::QuestFloor)) => Some(rule),
            _ => None,
        }
    }

    /// Restores a row of the result in place, given that row of the tensor, which need not fill the
    /// last group.
    pub fn apply(&self, gradient: &mut [f32], tensor: &[f32]) {
        if let Some(steepness) = self.estimator() {
            return estimate(gradient, tensor, steepness);
        }
        let plain = [1.0; BLOCK];
        for (gradient, x) in gradient.chunks_exact_mut(BLOCK).zip(tensor.chunks(BLOCK)) {
            if let Some(rule) = self.clips() {
                let mut rotated = [0.0; BLOCK];
                rotated[..x.len()].copy_from_slice(x);
                rotate(&mut rotated, &plain);
                let cut_off = cut_off(&rotated, rule);
                gradient
                    .iter_mut()
                    .zip(cut_off)
                    .for_each(|(g, cut)| *g = if cut { 0.0 } else { *g });
            }
            rotate(gradient, &plain);
        }
    }
}

/// Multiplies the gradient of a row of weights by the slope of the curve at each of them.
fn estimate(gradient: &mut [f32], weights: &[f32], steepness: u8) {
    let byte = PowerRule::Ceil.byte(weights);
    let inverse = if byte == E8M0_NAN { f32::NAN } else { decode_e8m0(254 - byte) };
    for (g, w) in gradient.iter_mut().zip(weights) {
        // NOTE: of weights before they are rounded.
        let y = w * inverse;
        *g *= if y.is_nan() { f32::NAN } else { dge_derivative(y, steepness.into()) };
    }
}

/// Which numbers of a block lie at E2M1's largest or beyond. None of one that is not finite: its NaN
/// is to be seen.
fn cut_off(block: &[f32; BLOCK], rule: PowerRule) -> [bool; BLOCK] {
    match rule.byte(block) {
        E8M0_NAN => [false; BLOCK],
        byte => {
            let inverse = decode_e8m0(254 - byte);
            block.map(|x| x.abs() * inverse >= E2M1_MAX)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Draw, Format, Gemm, Purpose, Signs, Transform, fill_normal};
    use super::*;

    fn normal(len: usize, seed: u64) -> Vec<f32> {
        let mut values = vec![0.0; len];
        fill_normal(&mut values, 1.0, &Draw::of(seed, Purpose::Weights, 0, 0), 0);
        values
    }

    fn restoration(rule: PowerRule) -> Restoration {
        let forward = Operand::of(Format::mxfp4(rule, false));
        let forward = Gemm::of(forward.rotated(Transform::of(BLOCK, Signs::Plain)));
        let backward = Operand::of(Format::MXFP4);
        let backward = Gemm::new(backward, backward.from_forward()).unwrap();
        let recipe = LinearRecipe::new(forward, backward, backward).unwrap();
        let [dx, dw] = [GemmId::Dgrad, GemmId::Wgrad].map(|id| Restoration::of(&recipe, id));
        assert_eq!(dx, dw);
        dx.unwrap()
    }

    /// Where nothing is rounded or cut off, dy (W H) turned back is dy W, at sizes that groups do
    /// not divide, too.
    #[test]
    fn without_rounding_it_is_the_product_itself() {
        let (rows, outputs) = (3, 5);
        for inputs in [32, 40, 77] {
            let restoration = restoration(PowerRule::Floor);
            let depth = restoration.depth(inputs);
            let (dy, w) = (normal(rows * outputs, 1), normal(outputs * inputs, 2));
            let mut rotated = vec![0.0; outputs * depth];
            for (to, from) in rotated.chunks_exact_mut(depth).zip(w.chunks_exact(inputs)) {
                to[..inputs].copy_from_slice(from);
                to.chunks_exact_mut(BLOCK).for_each(|group| rotate(group, &[1.0; BLOCK]));
            }
            let dot = |row: usize, column: usize, w: &[f32], columns: usize| -> f32 {
                (0..outputs).map(|k| dy[row * outputs + k] * w[k * columns + column]).sum()
            };
            for row in 0..rows {
                let product = (0..depth).map(|column| dot(row, column, &rotated, depth));
                let mut gradient: Vec<f32> = product.collect();
                restoration.apply(&mut gradient, &normal(inputs, 3));
                for (column, ours) in gradient[..inputs].iter().enumerate() {
                    let exact = dot(row, column, &w, inputs);
                    assert!((ours - exact).abs() < 1e-5, "{inputs}: {ours} instead of {exact}");
                }
                assert!(gradient[inputs..].iter().all(|v| v.abs() < 1e-5), "padding");
            }
        }
    }

    /// Normal numbers are cut off at 6 scales, of 0.487 deviations each, made a power of two: at
    /// 2.07 to 4.13 deviations, or by the lower rule at 1.46 to 2.92.
    #[test]
    fn what_the_scale_cut_off_passes_nothing() {
        for (rule, range) in
            [(PowerRule::Quest, 0.0005..0.03), (PowerRule::QuestFloor, 0.005..0.14)]
        {
            let (mut cut, blocks) = (0, 512);
            for seed in 0..blocks {
                let sigma = (seed as f32 / blocks as f32).exp2();
                let x: Vec<f32> = normal(BLOCK, seed).iter().map(|v| v * sigma).collect();
                let block: [f32; BLOCK] = x.clone().try_into().unwrap();
                let scale = decode_e8m0(rule.byte(&block));
                let cut_off = cut_off(&block, rule);
                for (x, cut) in x.iter().zip(cut_off) {
                    assert_eq!(cut, f64::from(x.abs()) / f64::from(scale) >= 6.0, "{x} {scale}");
                }
                cut += cut_off.iter().filter(|cut| **cut).count();
                // A gradient of one number that is cut off is gone; others are what they were.
                let mut turned = x;
                rotate(&mut turned, &[1.0; BLOCK]);
                for (i, cut) in cut_off.into_iter().enumerate() {
                    let mut gradient = [0.0; BLOCK];
                    gradient[i] = 1.0;
                    // The tensor whose rotated block is the one above, but for rounding.
                    let near = (block[i].abs() / scale / 6.0 - 1.0).abs() < 1e-5;
                    restoration(rule).apply(&mut gradient, &turned);
                    let norm = gradient.iter().map(|g| g * g).sum::<f32>();
                    assert!(near || (norm - if cut { 0.0 } else { 1.0 }).abs() < 1e-5, "{norm}");
                }
            }
            let share = cut as f64 / (blocks as usize * BLOCK) as f64;
            assert!(range.contains(&share), "{rule}: {share}");
        }
    }

    /// With a steepness of 1 the curve is a straight line, and gradients are what they were; with
    /// others they are multiplied by known slopes, whatever the scale of the row.
    #[test]
    fn weights_have_the_slope_of_the_estimator() {
        let of = |steepness| {
            let forward = Operand::of(Format::e2m1_vectors(true));
            let w = forward.with_estimator(Some(steepness));
            let backward = Gemm::new(Operand::E5M2, Operand::E4M3.from_forward()).unwrap();
            let forward = Gemm::new(forward, w).unwrap();
            let recipe = LinearRecipe::new(forward, backward, backward).unwrap();
            assert_eq!(Restoration::of(&recipe, GemmId::Dgrad), None);
            Restoration::of(&recipe, GemmId::Wgrad).unwrap()
        };
        let (weights, g) = (normal(70, 7), normal(70, 8));
        let mut straight = g.clone();
        of(1).apply(&mut straight, &weights);
        assert_eq!(straight, g);
        for scale in [1.0, 2f32.powi(-20), 2f32.powi(9)] {
            let weights = [0.1, -0.24, 2.4, 6.0, 0.5].map(|w| w * scale);
            let mut gradient = [1.0, 1.0, -1.0, 2.0, 1.0];
            of(5).apply(&mut gradient, &weights);
            for (ours, exact) in gradient.iter().zip([0.300_960, 2.626_528, -0.724_780, 0.4, 0.2]) {
                assert!((ours / exact - 1.0f32).abs() < 2e-4, "{ours}, {exact}");
            }
        }
        let mut gradient = [1.0, 1.0];
        of(5).apply(&mut gradient, &[f32::NAN, 1.0]);
        assert!(gradient.iter().all(|g| g.is_nan()));
    }

    #[test]
    fn what_is_not_finite_stays() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = normal(BLOCK, 5);
            x[7] = bad;
            let mut gradient = [1.0; BLOCK];
            restoration(PowerRule::Quest).apply(&mut gradient, &x);
            let mut expected = [1.0; BLOCK];
            rotate(&mut expected, &[1.0; BLOCK]);
            assert_eq!(gradient, expected);
            let mut gradient = [f32::NAN; BLOCK];
            restoration(PowerRule::Quest).apply(&mut gradient, &normal(BLOCK, 5));
            assert!(gradient.iter().all(|g| g.is_nan()));
        }
        let mut zeros = [1.0; BLOCK];
        restoration(PowerRule::Quest).apply(&mut zeros, &[0.0; BLOCK]);
        assert!(zeros[0] > 5.0, "zeros pass everything: {zeros:?}");
    }
}
