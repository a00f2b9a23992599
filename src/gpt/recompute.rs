//! What the backward pass computes again instead of the forward pass keeping it.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// Trades time for memory; results are the same bit for bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Everything is kept: 16 C numbers a token and layer. In `fp8` on FP8 tensor cores 6 C of them
    /// are bytes, 1 C is kept as bytes, too, and so are the layer's weights, 12 C^2: less in all
    /// from 2.4 C tokens on.
    #[default]
    Nothing,
    /// Outputs of norms and GELU are computed again, which costs little: 10 C are kept.
    Pointwise,
    /// Only the input of each block is kept, and the block's forward pass runs again: C are kept,
    /// and a step takes up to a third longer.
    Block,
}

impl Recompute {
    const NAMES: [(&str, Self); 3] =
        [("nothing", Self::Nothing), ("pointwise", Self::Pointwise), ("block", Self::Block)];
}

impl fmt::Display for Recompute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(_, value)| value == self);
        f.write_str(name.map_or("nothing", |(name, _)| name))
    }
}

impl FromStr for Recompute {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(name, _)| *name == s).map(|(_, value)| *value).ok_or_else(|| {
            let message = format!("expected nothing, pointwise or block, got {s:?}");
            Error::invalid("recompute", message)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_a_round_trip() {
        for (name, value) in Recompute::NAMES {
            assert_eq!(name.parse::<Recompute>().unwrap(), value);
            assert_eq!(value.to_string(), name);
        }
        assert!("all".parse::<Recompute>().unwrap_err().to_string().contains("pointwise"));
    }
}
