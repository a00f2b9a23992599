//! How much smaller rounding to nearest makes a tensor, and what that is corrected by.
//!
//! Rounding to nearest shrinks what lies between two numbers of a grid: along x, what becomes of it
//! is c x, c = sum x q / sum x^2, and the rest is noise. Behind a transform with random signs that
//! noise has no direction of its own, so q / c has the mean of x as good as exactly, with half of
//! the error of stochastic rounding. c is near 0.99 and is measured for every tensor.

use super::Range;

/// Sums over a tensor x, rotated, and the numbers that it became.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slope {
    /// Of products of both.
    pub products: f64,
    /// Of squares of x.
    pub squares: f64,
}

impl Slope {
    /// Adds elements, in order.
    pub fn add(&mut self, x: &[f32], numbers: &[f32]) {
        for (x, number) in x.iter().zip(numbers) {
            self.products += f64::from(*x) * f64::from(*number);
            self.squares += f64::from(*x) * f64::from(*x);
        }
    }

    /// The same for sums.
    pub fn add_sums(&mut self, other: Self) {
        self.products += other.products;
        self.squares += other.squares;
    }

    /// 1 / c, where numbers times `scale` stand for `range` of x; 1 where there is nothing to
    /// measure.
    pub fn correction(self, scale: f32, range: Range) -> f32 {
        let whole = f64::from(range.factor()) * self.squares;
        let correction = (whole / (self.products * f64::from(scale))) as f32;
        if correction.is_finite() && correction > 0.0 { correction } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_corrected_has_slope_one() {
        let (x, numbers) = ([1.0, -2.0, 3.5, 0.25], [1.0, -2.0, 3.0, 0.0]);
        let mut all = Slope::default();
        all.add(&x, &numbers);
        assert_eq!((all.products, all.squares), (15.5, 17.3125));
        assert_eq!(all.correction(1.0, Range::Full), 17.3125 / 15.5);
        assert_eq!(all.correction(0.5, Range::Full), 2.0 * 17.3125 / 15.5);
        assert_eq!(all.correction(1.0, Range::ThreeQuarters), 0.75 * 17.3125 / 15.5);
        let mut parts = Slope::default();
        for i in [0, 2] {
            let mut part = Slope::default();
            part.add(&x[i..i + 2], &numbers[i..i + 2]);
            parts.add_sums(part);
        }
        assert_eq!(parts, all);
    }

    #[test]
    fn what_cannot_be_measured_is_left_alone() {
        for (x, number) in [(0.0, 0.0), (1.0, 0.0), (f32::NAN, 1.0), (f32::INFINITY, 6.0)] {
            let mut slope = Slope::default();
            slope.add(&[x], &[number]);
            assert_eq!(slope.correction(1.0, Range::Full), 1.0, "{x}, {number}");
        }
    }
}
