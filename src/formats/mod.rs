//! Number formats and the recipes of linear layers as data; rounding, the random Hadamard transform
//! and random bits.
//!
//! Everything here is scalar, written to be read, and is the definition that every backend's
//! kernels are tested against byte for byte. The module imports nothing of ours but the error.
//!
//! Sources: OCP Microscaling Formats (MX) Specification v1.0; "Training LLMs with MXFP4"
//! (arXiv 2502.20586), Algorithms 1 to 3; Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3" (2011).

mod e2m1;
mod e4m3;
mod e8m0;
mod format;
mod hadamard;
mod matrix;
mod normal;
mod operand;
mod philox;
mod quantize;
mod stream;

pub use e2m1::{E2M1_MAX, E2M1_VALUES, decode_e2m1, pack_e2m1, unpack_e2m1};
pub use e4m3::{E4M3_MAX, e4m3_scale, round_to_e4m3};
pub use e8m0::{E8M0_BIAS, E8M0_NAN, decode_e8m0};
pub use format::{Block, Element, Format, Scale};
pub use hadamard::{group_scale, rotate};
pub use matrix::{Mxfp4Matrix, Source};
pub use normal::fill_normal;
pub use operand::{
    Gemm, LinearRecipe, Operand, OperandSource, Signs, Transform, fill_signs, product_scale,
};
pub use philox::{Draw, GemmId, OperandId, Purpose, Random, philox4x32_10, uniform};
pub(crate) use philox::{M0, M1, W0, W1};
pub use quantize::{Range, Rounding, quantize_block};
pub use stream::Philox;

/// Elements that share one scale.
pub const BLOCK: usize = 32;

/// The longest group of the Hadamard transform.
pub const MAX_GROUP: usize = 256;
