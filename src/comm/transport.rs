//! How gradients get from rank to rank.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// How gradients get from rank to rank. It changes no bit where they are sent as f32 ([`super::Wire`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// From GPU to GPU where these are of one host and reach each other's memory, else by NCCL where all
    /// have it, else through the host (`auto`).
    #[default]
    Auto,
    /// By the host's collectives, through its memory (`host`).
    Host,
    /// By NCCL (`nccl`); an engine that cannot says what is missing.
    Nccl,
    /// From GPU to GPU, in each other's memory (`peer`), likewise.
    Peer,
}

impl Transport {
    const NAMES: [(&str, Self); 4] =
        [("auto", Self::Auto), ("host", Self::Host), ("nccl", Self::Nccl), ("peer", Self::Peer)];
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(_, value)| value == self);
        f.write_str(name.map_or("auto", |(name, _)| name))
    }
}

impl FromStr for Transport {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(name, _)| *name == s).map(|(_, value)| *value).ok_or_else(|| {
            Error::invalid("transport", format!("expected auto, host, nccl or peer, got {s:?}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_a_round_trip() {
        for (name, value) in Transport::NAMES {
            assert_eq!(name.parse::<Transport>().unwrap(), value);
            assert_eq!(value.to_string(), name);
        }
        assert!("NCCL".parse::<Transport>().unwrap_err().to_string().contains("nccl or peer"));
    }
}
