//! The GPU as operations see it: memory, launches of kernels, products, recorded steps.
//!
//! Imports run one way: `memory`, `gemm`, `recordings`, `beside` -> `gpu` -> `compile` -> `cache`;
//! `gpu` also uses `folders`, and it and those above it `capture`; `peers` -> `beside`, `memory`.
//! `nccl` stands alone. Nothing here knows an operation.

pub(super) mod beside;
pub(super) mod cache;
pub(super) mod capture;
pub(super) mod compile;
pub(super) mod folders;
pub(super) mod gemm;
pub(super) mod gpu;
pub(super) mod memory;
pub(super) mod nccl;
pub(super) mod peers;
pub(super) mod recordings;

pub(super) use gpu::launch;
