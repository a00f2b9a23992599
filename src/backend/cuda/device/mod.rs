//! The GPU as operations see it: memory, launches of kernels, products, recorded steps.
//!
//! Imports run one way: `cache`, `folders`, `compile`, `gpu` -> `memory`, `gemm`,
//! `recordings`. Nothing here knows an operation.

mod cache;
pub(super) mod compile;
mod folders;
pub(super) mod gemm;
pub(super) mod gpu;
pub(super) mod memory;
pub(super) mod recordings;

pub(super) use gpu::launch;
