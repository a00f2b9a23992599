//! mxfp4train trains GPT models with the backward pass in MXFP4, inside any program.
//!
//! The backward GEMMs of every block run in a 4-bit format, made near-lossless by stochastic
//! rounding and the random Hadamard transform ("Training LLMs with MXFP4", arXiv 2502.20586). The
//! library is self-contained: no framework, no global state that you can see, no output but what
//! the host asks for.
//! C programs use it through `include/mxfp4train.h` ([`capi`]); this is the same engine for Rust.
//!
//! # A tour
//!
//! An [`Engine`] is a device with its threads and its seed. A [`Model`] is a GPT-2 or a Llama of
//! some [`ModelConfig`], new or loaded from a Hugging Face folder. A [`Dataset`] is a set of
//! memory-mapped token files. A [`Trainer`] takes optimizer steps, evaluates, saves and resumes;
//! its [`Recipe`] says which number format each GEMM uses. Checkpoints lie in folders, or in
//! [`Files`] elsewhere; [`Engine::memory`] says what memory is in use.
//!
//! ```
//! use mxfp4train::{Dataset, Engine, EngineOptions, Model, ModelConfig, Trainer, TrainerOptions};
//!
//! # fn main() -> mxfp4train::Result<()> {
//! let engine = Engine::new(EngineOptions { threads: 1, ..EngineOptions::default() })?;
//! let config = ModelConfig {
//!     vocab_size: 256,
//!     context_length: 16,
//!     layers: 1,
//!     heads: 2,
//!     channels: 32,
//!     ..ModelConfig::default()
//! };
//! let model = Model::new(&engine, &config)?;
//! let text = b"to be, or not to be, that is the question: ".repeat(20);
//! let data = Dataset::from_tokens(text.iter().map(|byte| u32::from(*byte)).collect())?;
//!
//! let mut options = TrainerOptions { batch_size: 4, ..TrainerOptions::default() };
//! options.schedule.lr = 1e-2;
//! let mut trainer = Trainer::new(&model, options)?;
//! let first = trainer.step(&data)?.loss;
//! for _ in 0..30 {
//!     trainer.step(&data)?;
//! }
//! assert!(trainer.eval(&data, 0)?.loss < first - 1.0);
//! # Ok(())
//! # }
//! ```
//!
//! # Determinism
//!
//! One seed gives one run, bit for bit, on any number of threads; a run that is saved and resumed
//! goes on bit for bit as if it had not stopped. Ranks of a [`Group`] share every step, and have the bits
//! of one that has all [`TrainerOptions::lanes`]. Instruction sets (portable, AVX2, AVX-512, AMX)
//! and kinds of GPU differ in the last bits of sums; the environment variable `MXT_CPU_ISA` names a
//! set that machines of different kinds have in common ([`backend::cpu::Isa`]).
//!
//! # Platforms
//!
//! Linux on x86-64 is what this is made for, tested on, and where it is fast. Other 64-bit,
//! little-endian Unix systems get the portable kernels, on which nothing has run yet. Windows is
//! refused by the compiler.

// Locks, atomic renames and signal masks are those of Unix, addresses in the C API have 64 bits,
// and token files and checkpoints are read as they lie on disk.
#[cfg(not(unix))]
compile_error!(
    "mxfp4train needs a Unix system: it is made for Linux. On Windows, build it in WSL 2"
);
#[cfg(not(all(target_pointer_width = "64", target_endian = "little")))]
compile_error!("mxfp4train needs a 64-bit little-endian target, such as x86_64-unknown-linux-gnu");

pub mod backend;
pub mod capi;
mod checkpoint;
mod comm;
mod data;
mod decoder;
#[cfg(feature = "c-library")]
mod emergency;
mod engine;
mod error;
pub mod formats;
mod gpt;
mod model;
mod optim;
pub mod recipe;
mod reserve;
mod room;
mod run;
mod signals;
mod thread;
mod trainer;

pub use backend::{Allocator, CudaStream, HostLoss, LogitRows};
pub use checkpoint::{FileRead, FileSave, Files, MemoryFiles, StoredTensor, StoredWeights};
pub use comm::{Collectives, Group, Transport, Wire};
pub use data::{
    Coverage, Dataset, DatasetFile, DatasetOptions, TokenFormat, TokenMemory, TokenType,
};
pub use decoder::{
    Decoder, DecoderOptions, DecoderWeights, Draft, GenerateOptions, Generated, Score,
};
pub use engine::{Engine, EngineMemory, EngineOptions, LogFn, LogLevel, MemoryUse};
pub use error::{Error, Result};
pub use formats::Philox;
pub use gpt::{
    Activation, Architecture, Frozen, Lora, ModelConfig, Recompute, Rope, RopeScaling, TensorInfo,
    TokenDrop,
};
pub use model::{Model, ModelFiles};
pub use optim::{
    Gradients, Master, Moments, Muon, Normalization, Optimizer, OptimizerKind, Schedule,
    ScheduleKind,
};
pub use recipe::Recipe;
pub use room::MemoryRoom;
pub use run::{Cadence, TrainerOptions};
pub use trainer::{
    Batch, Carried, EvalStats, IGNORED, Plan, Sharpness, Snapshot, Spared, StepStats, StopHandle,
    TensorUpdate, Trainer, UpdateMetrics, WeightChange, WeightMetrics, carriers, emulation, plan,
};
