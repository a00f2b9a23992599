//! The GPT itself: its shape, its named parameters, its forward and backward pass.
//!
//! The passes are written once over `Backend` and name none.

mod activations;
mod config;
mod init;
mod params;
mod pass;
mod recompute;

pub(crate) use activations::{ActivationGradients, Activations};
pub use config::{Activation, ModelConfig};
pub(crate) use init::initialize;
pub use params::TensorInfo;
pub(crate) use params::{HEAD, ParamSpec, Params, WTE, parameter_tensors, specs};
pub(crate) use pass::{Pass, Place};
pub use recompute::Recompute;

use crate::Result;

/// What `measure` finds for the model of `config`, by a look at models of one block and of two: every
/// further block takes as much as the second.
pub(crate) fn for_all_layers<const N: usize>(
    config: &ModelConfig,
    measure: impl Fn(&ModelConfig) -> Result<[u64; N]>,
) -> Result<[u64; N]> {
    let of = |layers| measure(&ModelConfig { layers, ..config.clone() });
    let (one, two) = (of(1)?, of(2)?);
    Ok(std::array::from_fn(|i| one[i] + (two[i] - one[i]) * (config.layers as u64 - 1)))
}
