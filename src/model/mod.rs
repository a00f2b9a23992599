//! The GPT (skeleton)
mod config;
use std::path::Path;
pub use config::ModelConfig;
use crate::{Engine, GenerateOptions, Result};

/// Name and shape of a parameter, as Hugging Face's `gpt2` has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Hugging Face's name, such as `transformer.h.0.attn.c_attn.weight`.
    pub name: String,
    /// Its shape; linear weights are (in, out).
    pub shape: Vec<usize>,
}

/// A GPT on an engine's device. Cheap to clone: clones are the same model.
#[derive(Clone)]
pub struct Model;

impl Model {
    /// A model with GPT-2's random initial weights, drawn from the engine's seed.
    pub fn new(_engine: &Engine, _config: &ModelConfig) -> Result<Self> { todo!() }
    /// Loads a checkpoint folder, ours or Hugging Face's.
    pub fn load(_engine: &Engine, _dir: &Path) -> Result<Self> { todo!() }
    /// Saves weights and configuration as a Hugging Face `gpt2` folder.
    pub fn save(&self, _dir: &Path) -> Result<()> { todo!() }
    /// The engine it lives on.
    pub fn engine(&self) -> &Engine { todo!() }
    /// Its shape.
    pub fn config(&self) -> &ModelConfig { todo!() }
    /// Name and shape of every parameter.
    pub fn tensors(&self) -> &[TensorInfo] { todo!() }
    /// Copies a parameter out.
    pub fn read_tensor(&self, _name: &str, _out: &mut [f32]) -> Result<()> { todo!() }
    /// Overwrites a parameter.
    pub fn write_tensor(&self, _name: &str, _values: &[f32]) -> Result<()> { todo!() }
    /// Samples a continuation of `prompt`; `on_token` sees each token and returns false to stop.
    pub fn generate(&self, _prompt: &[u32], _options: &GenerateOptions, _on_token: &mut dyn FnMut(u32) -> bool) -> Result<Vec<u32>> { todo!() }
}
