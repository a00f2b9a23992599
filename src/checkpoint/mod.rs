//! Checkpoints: a Hugging Face `gpt2` folder plus the training state, written atomically.
use std::path::Path;
use crate::model::{ModelConfig, TensorInfo};
use crate::trainer::TrainerState;
use crate::Result;

/// Tensors that can be saved: f32, in the shape and order of Hugging Face's `gpt2`.
pub(crate) trait TensorRead {
    /// Name and shape of every tensor.
    fn tensors(&self) -> &[TensorInfo];
    /// Copies tensor `index` into `out` (row-major, as many elements as its shape says).
    fn read(&self, index: usize, out: &mut [f32]);
}

/// The training part of a checkpoint.
pub(crate) struct TrainerPart<'a> {
    pub(crate) state: &'a TrainerState,
    /// First and second moments, named as the weights that they belong to.
    pub(crate) moments: [&'a dyn TensorRead; 2],
}

/// Writes a whole checkpoint folder, or leaves the one that is there untouched.
pub(crate) fn save(_dir: &Path, _config: &ModelConfig, _weights: &dyn TensorRead, _trainer: Option<TrainerPart<'_>>) -> Result<()> { todo!() }
/// Reads `config.json`.
pub(crate) fn load_config(_dir: &Path) -> Result<ModelConfig> { todo!() }
/// Reads `model.safetensors`: calls `write(index, values)` once for every entry of `tensors`.
pub(crate) fn load_weights(_dir: &Path, _tensors: &[TensorInfo], _write: &mut dyn FnMut(usize, &[f32])) -> Result<()> { todo!() }
/// Reads `trainer.json`.
pub(crate) fn load_state(_dir: &Path) -> Result<TrainerState> { todo!() }
/// Reads `trainer.safetensors`: calls `write(moment, index, values)` for moments 0 and 1 of every entry of `tensors`.
pub(crate) fn load_moments(_dir: &Path, _tensors: &[TensorInfo], _write: &mut dyn FnMut(usize, usize, &[f32])) -> Result<()> { todo!() }
