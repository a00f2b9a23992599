//! What master weights are kept as: f32, or the bf16 copy that products read and the 16 bits that it
//! lacks.
//!
//! Nothing is lost in the two halves but this: where the low one is exactly half of a last place,
//! rounding to even would not tell which of two neighbours the copy came from. So such a number
//! becomes the next one away from 0, a last place of f32 further, before it is split.

/// What master weights are kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Master {
    /// `f32`: on a GPU 6 bytes a parameter, 4 of them beside the copy.
    #[default]
    F32,
    /// `split`: on a GPU 4 bytes, 2 of them beside the copy, from which operands are made. A
    /// processor has no copy, and keeps f32.
    Split,
}

impl Master {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::F32, Self::Split];

    fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Split => "split",
        }
    }
}

named!(Master, "master");

/// A number that can be split: itself, or its neighbour where half of a last place of bf16 is left.
pub(crate) fn splittable(p: f32) -> f32 {
    let bits = p.to_bits();
    if bits & 0xffff == 0x8000 { f32::from_bits(bits + 1) } else { p }
}

/// The copy, to nearest, and the low half of [`splittable`].
pub(crate) fn split(p: f32) -> [u16; 2] {
    let bits = splittable(p).to_bits();
    [((bits + 0x7fff) >> 16) as u16, bits as u16]
}

/// What was split.
pub(crate) fn join([copy, low]: [u16; 2]) -> f32 {
    // Rounded up, the copy is as much too large as the low half is below 0 with a sign.
    f32::from_bits((u32::from(copy) << 16).wrapping_add_signed((low as i16).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joining_gives_what_was_split() {
        let edges = [0.0, -0.0, 1.0, -1.0, f32::MIN_POSITIVE, 1e-45, -1e-45, 1e37, -1e37];
        let halves = [0x3f80_8000, 0x3f81_8000, 0xbf80_8000, 0x0000_8000, 0x3f80_7fff, 0x3f80_8001];
        let drawn = (0..2_000_000u32).map(|i| i.wrapping_mul(0x9e37_79b1));
        let all = edges.into_iter().chain(halves.into_iter().chain(drawn).map(f32::from_bits));
        let mut moved = 0;
        for p in all.filter(|p| p.abs() < 3e38) {
            let [copy, low] = split(p);
            let joined = join([copy, low]);
            assert_eq!(joined.to_bits(), splittable(p).to_bits(), "{p:e}");
            assert!(joined.to_bits() - p.to_bits() <= 1, "{p:e}");
            assert_eq!(copy, half::bf16::from_f32(joined).to_bits(), "{p:e}");
            moved += u32::from(joined != p);
        }
        // One in 65,536, and the four halves.
        assert!((4 + 15..4 + 60).contains(&moved), "{moved}");
    }
}
