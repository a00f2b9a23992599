//! A run that takes moments, through the public interface: what tests of training share.

use mxfp4train::{Dataset, Engine, EngineOptions, Model, ModelConfig, TensorInfo, Trainer};

/// An engine of the CPU.
pub(crate) fn engine(threads: usize) -> Engine {
    Engine::new(EngineOptions { threads, ..EngineOptions::default() }).unwrap()
}

/// A model of two blocks, whose sizes nothing divides.
pub(crate) fn model(engine: &Engine) -> Model {
    let config = ModelConfig {
        vocab_size: 33,
        context_length: 16,
        layers: 2,
        heads: 2,
        channels: 36,
        ..ModelConfig::default()
    };
    Model::new(engine, &config).unwrap()
}

/// Tokens that it learns quickly.
pub(crate) fn data() -> Dataset {
    Dataset::from_tokens((0..2000).map(|i| i * i % 31).collect()).unwrap()
}

/// All tensors of what is trained.
pub(crate) fn weights(trainer: &Trainer) -> Vec<Vec<f32>> {
    let model = trainer.model();
    let read = |info: &TensorInfo| {
        let mut values = vec![0.0; info.len()];
        model.read_tensor(&info.name, &mut values).unwrap();
        values
    };
    model.tensors().iter().map(read).collect()
}

/// Of steps on [`data`].
pub(crate) fn losses(trainer: &mut Trainer, steps: usize) -> Vec<f32> {
    (0..steps).map(|_| trainer.step(&data()).unwrap().loss).collect()
}
