//! mxfp4train (skeleton)
pub mod backend;
pub mod capi;
mod checkpoint;
mod data;
mod engine;
mod error;
mod generate;
mod model;
pub mod mx;
mod optim;
mod recipe;
mod trainer;

pub use data::{Dataset, DatasetFile, TokenFormat};
pub use engine::{Engine, EngineOptions, LogFn, LogLevel};
pub use error::{Error, Result};
pub use generate::GenerateOptions;
pub use model::{Model, ModelConfig, TensorInfo};
pub use optim::{AdamW, Schedule, ScheduleKind};
pub use recipe::Recipe;
pub use trainer::{EvalStats, Plan, StepStats, StopHandle, Trainer, TrainerOptions, plan};
