//! The random Hadamard transform: x <- (x * s) H_g / sqrt(g), along the reduction dimension.
//!
//! H is the Sylvester matrix, applied as a butterfly. The order of its stages (strides 1, 2, 4 ..
//! g/2) is part of the definition: f32 sums depend on it, and codes must be the same everywhere.

/// The factor that makes H_g orthogonal: the f32 nearest to 1/sqrt(g).
pub fn group_scale(group: usize) -> f32 {
    (1.0 / (group as f64).sqrt()) as f32
}

/// Transforms one group in place. `x` and `signs` have the same power-of-two length; `signs` holds
/// +1 and -1.
pub fn rotate(x: &mut [f32], signs: &[f32]) {
    let g = x.len();
    assert!(g.is_power_of_two() && signs.len() == g, "a group and its signs have one length");
    for (v, s) in x.iter_mut().zip(signs) {
        *v *= s;
    }
    let mut stride = 1;
    while stride < g {
        for pair in x.chunks_exact_mut(2 * stride) {
            let (low, high) = pair.split_at_mut(stride);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        stride *= 2;
    }
    let scale = group_scale(g);
    for v in x {
        *v *= scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_sylvester_matrix() {
        for g in [32usize, 64, 128, 256] {
            for k in [0, 1, g / 2 + 3, g - 1] {
                let mut x = vec![0.0; g];
                x[k] = 1.0;
                let mut signs = vec![1.0; g];
                signs[k] = -1.0;
                rotate(&mut x, &signs);
                for (j, v) in x.iter().enumerate() {
                    // H[k][j] = (-1)^popcount(k & j)
                    let h = if (k & j).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
                    assert_eq!(*v, -h * group_scale(g));
                }
            }
        }
    }

    #[test]
    fn keeps_inner_products() {
        let g = 64;
        let signs: Vec<f32> = (0..g).map(|i| if i * 7 % 5 < 2 { -1.0 } else { 1.0 }).collect();
        let mut a: Vec<f32> = (0..g).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let mut b: Vec<f32> = (0..g).map(|i| ((i * 53 % 97) as f32 - 48.0) / 48.0).collect();
        let dot = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>()
        };
        let before = dot(&a, &b);
        rotate(&mut a, &signs);
        rotate(&mut b, &signs);
        assert!((dot(&a, &b) - before).abs() < 1e-5);
    }
}
