//! The GPT itself: its shape, its named parameters, its forward and backward pass.
//!
//! The passes are written once over `Backend` and name none.
//!
//! Weights of linear layers are (out, in) in memory, so that both operands of the forward GEMM run
//! along the reduction. The (in, out) of Hugging Face's `gpt2` appears in files and in the tensor
//! interface alone.

mod activations;
mod config;
mod decode;
mod frozen;
mod init;
mod lora;
mod params;
mod pass;
mod recompute;
mod rope;
mod shapes;
mod sharpness;
mod token_drop;

pub(crate) use activations::{ActivationGradients, Activations, ForBackward};
pub use config::{Activation, Architecture, ModelConfig};
pub(crate) use decode::{Kept, Packed};
pub use frozen::Frozen;
pub(crate) use init::{initialize, initialize_adapters};
pub use lora::Lora;
pub use params::TensorInfo;
pub(crate) use params::{HEAD, Matrix, ParamSpec, ParamTable, TensorPart};
pub(crate) use pass::{Means, Merging, Pass, Place, Scales};
pub use recompute::Recompute;
pub use rope::{Rope, RopeScaling};
pub(crate) use shapes::Shapes;
pub(crate) use sharpness::WorstOf;
pub use token_drop::TokenDrop;
