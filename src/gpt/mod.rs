//! The GPT itself: its shape, its named parameters, its forward and backward pass.
//!
//! The passes are written once over `Backend` and name none.

mod activations;
mod config;
mod init;
mod params;
mod pass;
mod recompute;
mod shapes;

pub(crate) use activations::{ActivationGradients, Activations};
pub use config::{Activation, ModelConfig};
pub(crate) use init::initialize;
pub use params::TensorInfo;
pub(crate) use params::{HEAD, ParamSpec, ParamTable, WTE};
pub(crate) use pass::{Pass, Place};
pub use recompute::Recompute;
pub(crate) use shapes::Shapes;
