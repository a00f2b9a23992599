//! Normal random values, the same on every backend and any number of threads. Every operation
//! rounds once, so that kernels make the same bits.

use super::Draw;

/// Pairs of values that are computed together, in loops that the compiler turns into vectors.
const TOGETHER: usize = 64;

/// Fills `values` with normal values of a standard deviation by Box and Muller's method, two for
/// each counter (row, 0) of `draw` from row `first` on.
///
/// Every operation rounds once, to nearest, so that all backends make the same bits.
pub fn fill_normal(values: &mut [f32], std: f32, draw: &Draw, first: u32) {
    for (i, part) in values.chunks_mut(2 * TOGETHER).enumerate() {
        let first = first + (i * TOGETHER) as u32;
        let (mut radius, mut turns) = ([0.0; TOGETHER], [0.0; TOGETHER]);
        for k in 0..part.len().div_ceil(2) {
            let [a, _, b, _] = draw.bits(first + k as u32, 0);
            // The first lies in (0, 1], so its logarithm is finite.
            (radius[k], turns[k]) = (1.0 - unit(a), unit(b));
        }
        for radius in &mut radius {
            *radius = std * (-2.0 * ln(*radius)).sqrt();
        }
        let pairs: [_; TOGETHER] = std::array::from_fn(|k| cos_sin(turns[k]));
        for ((pair, radius), (cos, sin)) in part.chunks_mut(2).zip(radius).zip(pairs) {
            for (value, part) in pair.iter_mut().zip([cos, sin]) {
                *value = radius * part;
            }
        }
    }
}

/// A number in [0, 1) with 24 random bits.
fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

// NOTE: not std's functions, which are those of the system's libm: slower by far (four seconds for
// the weights of 1.3 billion parameters), and on another system they may round otherwise.

/// The natural logarithm of a normal positive number, within 2e-7 relatively or of 1.
fn ln(x: f32) -> f32 {
    // x = m 2^e with m in [0.7, 1.4]; ln m = 2 atanh((m - 1) / (m + 1)).
    let shifted = x.to_bits().wrapping_add(0x3f80_0000 - 0x3f35_04f3);
    let exponent = (shifted >> 23) as i32 - 127;
    let m = f32::from_bits((shifted & 0x007f_ffff) + 0x3f35_04f3);
    let s = (m - 1.0) / (m + 1.0);
    let q = s * s;
    let series = 1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * (1.0 / 9.0))));
    2.0 * s * series + exponent as f32 * std::f32::consts::LN_2
}

/// Cosine and sine of so many turns, from 0 to 1, within 2e-7.
fn cos_sin(turns: f32) -> (f32, f32) {
    // The nearest quarter, and the angle from there.
    let quarter = (turns * 4.0 + 0.5) as i32;
    let angle = (turns - quarter as f32 * 0.25) * std::f32::consts::TAU;
    let q = angle * angle;
    let sin =
        1.0 + q * (-1.0 / 6.0 + q * (1.0 / 120.0 + q * (-1.0 / 5040.0 + q * (1.0 / 362_880.0))));
    let sin = angle * sin;
    let cos = 1.0 + q * (-0.5 + q * (1.0 / 24.0 + q * (-1.0 / 720.0 + q * (1.0 / 40320.0))));
    let (cos, sin) = if quarter & 1 == 0 { (cos, sin) } else { (-sin, cos) };
    if quarter & 2 == 0 { (cos, sin) } else { (-cos, -sin) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::Purpose;

    fn filled(index: u32) -> Vec<f32> {
        let mut values = vec![0.0; 200_001];
        fill_normal(&mut values, 0.02, &Draw::of(1, Purpose::Weights, index, 0), 0);
        values
    }

    #[test]
    fn moments_are_those_of_the_normal_distribution() {
        let values = filled(0);
        let moment = |p: i32| {
            values.iter().map(|v| (f64::from(*v) / 0.02).powi(p)).sum::<f64>() / values.len() as f64
        };
        for (power, expected, slack) in
            [(1, 0.0, 0.01), (2, 1.0, 0.01), (3, 0.0, 0.03), (4, 3.0, 0.1)]
        {
            assert!((moment(power) - expected).abs() < slack, "moment {power}: {}", moment(power));
        }
    }

    #[test]
    fn functions_are_those_of_the_system() {
        for word in (0..1 << 24).step_by(999) {
            let u = unit(word << 8);
            let (x, turns) = (f64::from(1.0 - u), f64::from(u));
            let close = |ours: f32, exact: f64| {
                assert!((f64::from(ours) - exact).abs() <= 2e-7 * exact.abs().max(1.0), "{u}");
            };
            close(ln(1.0 - u), x.ln());
            let (sin, cos) = (std::f64::consts::TAU * turns).sin_cos();
            close(cos_sin(u).0, cos);
            close(cos_sin(u).1, sin);
        }
    }

    #[test]
    fn pieces_make_the_whole_and_draws_differ() {
        let whole = filled(3);
        let mut piece = vec![0.0; 1000];
        fill_normal(&mut piece, 0.02, &Draw::of(1, Purpose::Weights, 3, 0), 250);
        assert_eq!(piece, whole[500..1500]);
        assert_ne!(filled(4)[..8], whole[..8]);
    }
}
