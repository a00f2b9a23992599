//! Number formats and the recipes of linear layers as data; rounding, the random Hadamard transform
//! and random bits.
//!
//! Everything here is scalar, written to be read, and is the definition that every backend's
//! kernels are tested against byte for byte. The module imports nothing of ours but the error.
//!
//! Sources: OCP Microscaling Formats (MX) Specification v1.0; "Training LLMs with MXFP4"
//! (arXiv 2502.20586), Algorithms 1 to 3; Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3" (2011).

mod dge;
mod e2m1;
mod e4m3;
mod e5m2;
mod e8m0;
mod ema;
mod format;
mod hadamard;
mod haste;
mod int8;
mod mantissa;
mod matrix;
mod normal;
mod nvfp4;
mod observe;
mod operand;
mod outlier;
mod philox;
mod quantize;
mod quantized;
mod reset;
mod restore;
mod slope;
mod stream;
mod subset;

pub use dge::{DGE_MAX, dge_derivative};
pub use e2m1::{E2M1_MAX, E2M1_VALUES, decode_e2m1, pack_e2m1, unpack_e2m1};
pub use e4m3::{E4M3_MAX, e4m3_scale, round_to_e4m3};
pub use e5m2::{E5M2_MAX, e5m2_scale, round_to_e5m2};
pub use e8m0::{E8M0_BIAS, E8M0_NAN, PowerRule, decode_e8m0};
pub use ema::{EMA_FROM_STEP, ema, round_by_mean};
pub use format::{Block, Element, Format, Outer, Scale};
pub use hadamard::{group_scale, rotate};
pub use haste::{MAX_HASHES, is_above, merge_channels, projection_entry, projections};
pub use int8::{INT8_MAX, int8_scale, round_to_int8};
pub use mantissa::{cut_mantissa, round_mantissa};
pub use matrix::{Mxfp4Matrix, Source};
pub use normal::fill_normal;
pub use nvfp4::{
    NVFP4_BLOCK, NVFP4_OUTER, Nvfp4Scale, Nvfp4Tensor, amax_of, nvfp4_outer, quantize_nvfp4,
    quantize_nvfp4_eden, quantize_nvfp4_within,
};
pub use observe::{OSCILLATING, Observation, Observed, confidence};
pub use operand::{
    Gemm, LINEAR_NAMES, LINEARS, LinearRecipe, Operand, OperandSource, Signs, Transform,
    fill_signs, product_scale,
};
pub use outlier::{Kept, clamped, outlier};
pub use philox::{Draw, GemmId, OperandId, Purpose, Random, philox4x32_10, uniform};
pub(crate) use philox::{M0, M1, W0, W1};
pub use quantize::{Range, Rounding, quantize_block, quantize_closest};
pub use quantized::{
    Bits, Quantized, VECTORS_AT_ONCE, Vectors, has_vector_scales, needs_amax, quantize_vectors,
    tensor_scale,
};
pub use reset::{Reset, ResetPhase, oscillates};
pub use restore::Restoration;
pub use slope::Slope;
pub use stream::Philox;
pub use subset::{kept_positions, position_key};

/// Elements that share one scale.
pub const BLOCK: usize = 32;

/// The longest group of the Hadamard transform.
pub const MAX_GROUP: usize = 256;
