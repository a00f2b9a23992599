//! E8M0, the scale of a block: one byte e, value 2^(e - 127); 255 is NaN.

use std::fmt;

/// The byte of the scale 1.
pub const E8M0_BIAS: i32 = 127;

/// The byte of a block that holds NaN or infinity.
pub const E8M0_NAN: u8 = 255;

/// The scale's value, NaN for 255.
pub fn decode_e8m0(byte: u8) -> f32 {
    match byte {
        E8M0_NAN => f32::NAN,
        0 => f32::from_bits(1 << 22), // 2^-127 is subnormal in f32
        e => f32::from_bits(u32::from(e) << 23),
    }
}

/// How the scale of a block is made from its values, a power of two. All but the last two look at
/// the largest magnitude alone, of which e is the exponent and m the mantissa.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PowerRule {
    /// e - 2: the largest lies in [4, 8), and above 6 it saturates. OCP Microscaling Formats v1.0,
    /// section 6.3.
    Floor,
    /// The smallest with which nothing saturates: the largest lies in (3, 6]. TetraJet (arXiv
    /// 2502.20853), "truncation-free scaling".
    Ceil,
    /// e - 2 of the largest rounded to one bit of mantissa: it lies in [3.5, 7), and above 6 it
    /// saturates.
    Even,
    /// 0.48707976 standard deviations of the block, to the nearest power of two, as the error that
    /// Quartet (arXiv 2505.14669) gives for QuEST asks for.
    Quest,
    /// The same, to the power of two below, as its code has it.
    QuestFloor,
}

/// As switches of recipes name it.
impl fmt::Display for PowerRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Floor => "floor",
            Self::Ceil => "ceil",
            Self::Even => "even",
            Self::Quest => "quest",
            Self::QuestFloor => "quest-floor",
        })
    }
}

impl PowerRule {
    /// All rules.
    pub const ALL: [Self; 5] = [Self::Floor, Self::Ceil, Self::Even, Self::Quest, Self::QuestFloor];

    /// The byte of a block's scale: 255 where it holds NaN or infinity, 0 for zeros.
    pub fn byte(self, block: &[f32]) -> u8 {
        // Comparing magnitudes as integers also lets NaN win.
        let amax = block.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        match self {
            Self::Floor | Self::Ceil | Self::Even => self.byte_of(amax),
            Self::Quest | Self::QuestFloor => self.byte_of_deviation(block, amax),
        }
    }

    /// That of a block whose largest magnitude has these bits, by a rule that needs no more.
    ///
    /// Read from the bits: exponents below -127 end there, which is byte 0. NOTE: TetraJet's code
    /// takes a logarithm in bf16, which near powers of two can be a binade off.
    fn byte_of(self, amax: u32) -> u8 {
        if amax >> 23 == 255 {
            return E8M0_NAN;
        }
        let rounded = match self {
            // 6 is 1.5 * 2^2: above a mantissa of 1.5 the next exponent.
            Self::Ceil => amax + 0x003f_ffff,
            Self::Even => amax + 0x0020_0000,
            _ => amax,
        };
        (rounded >> 23).saturating_sub(2) as u8
    }

    fn byte_of_deviation(self, block: &[f32], amax: u32) -> u8 {
        if amax >> 23 == 255 {
            return E8M0_NAN;
        }
        if amax == 0 {
            return 0;
        }
        // By a power of two, so that squares neither overflow nor vanish.
        let exponent = (amax >> 23).clamp(1, 253);
        let [down, up] = [254 - exponent, exponent].map(|biased| f32::from_bits(biased << 23));
        let (mut sum, mut squares) = (0.0f32, 0.0f32);
        for x in block {
            let x = x * down;
            sum += x;
            squares += x * x;
        }
        let part = 1.0 / block.len() as f32;
        let mean = sum * part;
        let deviation = (squares * part - mean * mean).max(0.0).sqrt() * up;
        let unit = 0.487_079_76 * deviation + 1e-8;
        // floor(log2), of what is sqrt(2) times as large where that rounds to nearest.
        let unit = if self == Self::Quest { unit * std::f32::consts::SQRT_2 } else { unit };
        (unit.to_bits() >> 23).min(253) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_bytes_follow_the_definition() {
        for byte in 0..255u8 {
            assert_eq!(f64::from(decode_e8m0(byte)), 2f64.powi(i32::from(byte) - E8M0_BIAS));
        }
        assert!(decode_e8m0(E8M0_NAN).is_nan());
        for max in [0.0, 1e-45, 1.1e-38, 2.4e-38, 0.49, 0.5, 1.0, 5.99, 6.0, 7.99, 8.0, 3e38f32] {
            let exponent = if max == 0.0 { -127.0 } else { f64::from(max).log2().floor() - 2.0 };
            let byte = (exponent.clamp(-127.0, 127.0) as i32 + E8M0_BIAS) as u8;
            assert_eq!(PowerRule::Floor.byte(&[max]), byte, "{max}");
            // The definition of the others, in f64.
            let fits = |e: i32| f64::from(max) <= 6.0 * 2f64.powi(e);
            let ceil = (-127..=127).find(|e| fits(*e)).unwrap_or(127);
            assert_eq!(i32::from(PowerRule::Ceil.byte(&[-max, 0.0])) - E8M0_BIAS, ceil, "{max}");
        }
        for rule in PowerRule::ALL {
            for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN] {
                assert_eq!(rule.byte(&[1.0, bad]), E8M0_NAN);
            }
            assert_eq!(rule.byte(&[0.0; 32]), 0);
            // What a deviation is raised by, 1e-8, is 2^-27.
            assert!(rule.byte(&[f32::MAX; 32]) < E8M0_NAN && rule.byte(&[1e-45; 32]) < 101);
        }
    }

    /// Largest magnitudes and the exponents that three rules make of them.
    #[test]
    fn rules_differ_where_they_should() {
        for (amax, exponents) in [
            (1.0, [-2, -2, -2]),
            (1.5, [-2, -2, -2]),
            (1.5001, [-2, -1, -2]),
            (1.75, [-2, -1, -1]),
            (2.0, [-1, -1, -1]),
            (3.01, [-1, 0, -1]),
            (6.0, [0, 0, 0]),
            (6.001, [0, 1, 0]),
            (31.0, [2, 3, 3]),
        ] {
            let rules = [PowerRule::Floor, PowerRule::Ceil, PowerRule::Even];
            let found = rules.map(|rule| i32::from(rule.byte(&[0.1, -amax])) - E8M0_BIAS);
            assert_eq!(found, exponents, "{amax}");
        }
    }

    #[test]
    fn deviations_round_down_or_to_nearest() {
        // Of +-a the standard deviation is a: 0.487 a.
        let exponent = |rule: PowerRule, a: f32| i32::from(rule.byte(&[a, -a])) - E8M0_BIAS;
        for (a, floor, nearest) in [(1.0, -2, -1), (2.06, 0, 0), (2.9, 0, 0), (2.91, 0, 1)] {
            for scale in [1.0f32, 1024.0] {
                let more = scale.log2() as i32;
                assert_eq!(exponent(PowerRule::QuestFloor, a * scale), floor + more, "{a}");
                assert_eq!(exponent(PowerRule::Quest, a * scale), nearest + more, "{a}");
            }
        }
        let huge = exponent(PowerRule::QuestFloor, 1e38);
        assert_eq!(huge, exponent(PowerRule::QuestFloor, 1e38 / 1024.0) + 10);
    }
}
