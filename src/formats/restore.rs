//! The way back from a product in the basis of a rotated forward pass, as Quartet has it (arXiv
//! 2505.14669).
//!
//! A forward pass that rotates x and W multiplies Q(x H) by Q(W H). Backward operands that are made
//! from these numbers leave the gradient of x H or W H. Of what the scale cut off nothing passes
//! (the straight-through estimator of a clipped number), and H turns the rest back.

use super::{
    BLOCK, E2M1_MAX, E8M0_NAN, GemmId, LinearRecipe, Operand, OperandSource, PowerRule, Scale,
    decode_e8m0, rotate,
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
        (turned && forward.transform().is_some()).then_some(Self { forward: *forward })
    }

    /// Columns of the result, of a gradient that has so many: whole groups.
    pub fn depth(&self, columns: usize) -> usize {
        columns.next_multiple_of(BLOCK)
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
