//! Engines that tests run on: the processor, and a GPU where there is one.

use mxfp4train::{Engine, EngineOptions};

/// The processor's, and that of the first GPU, or none after a line that says why.
pub(crate) fn engines() -> Vec<Engine> {
    let of = |device: &str| EngineOptions { device: device.into(), ..EngineOptions::default() };
    let mut engines = vec![Engine::new(of("cpu")).unwrap()];
    match Engine::new(of("cuda")) {
        Ok(engine) => engines.push(engine),
        Err(error) => println!("skipped: no GPU: {error}"),
    }
    engines
}

/// Whether it is a GPU's.
pub(crate) fn is_gpu(engine: &Engine) -> bool {
    engine.device().starts_with("cuda")
}
