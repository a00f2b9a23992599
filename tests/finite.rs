//! No step leaves a weight or a moment that is NaN or infinite: it is done, or an error after which
//! everything is as before.

use mxfp4train::{
    Dataset, Engine, EngineOptions, Error, GenerateOptions, Model, ModelConfig, Optimizer, Recipe,
    Schedule, StepStats, Trainer, TrainerOptions,
};

fn dataset() -> Dataset {
    Dataset::from_tokens((0..4000u32).map(|i| (i * i + i / 7) % 29).collect()).unwrap()
}

fn engine() -> Engine {
    Engine::new(EngineOptions { threads: 1, ..EngineOptions::default() }).unwrap()
}

fn options(recipe: &str) -> TrainerOptions {
    let schedule = Schedule { total_steps: 1000, ..Schedule::default() };
    let recipe = recipe.parse().unwrap();
    TrainerOptions { batch_size: 2, recipe, schedule, ..TrainerOptions::default() }
}

fn trainer(engine: &Engine, options: TrainerOptions) -> Trainer {
    let config = ModelConfig {
        vocab_size: 32,
        context_length: 16,
        layers: 1,
        heads: 2,
        channels: 16,
        ..ModelConfig::default()
    };
    Trainer::new(&Model::new(engine, &config).unwrap(), options).unwrap()
}

/// All weights, each of which is finite.
fn weights(trainer: &Trainer) -> Vec<Vec<f32>> {
    let model = trainer.model();
    let read = |info: &mxfp4train::TensorInfo| {
        let mut values = vec![0.0; info.len()];
        model.read_tensor(&info.name, &mut values).unwrap();
        assert!(values.iter().all(|v| v.is_finite()), "{}", info.name);
        values
    };
    model.tensors().iter().map(read).collect()
}

fn write(trainer: &Trainer, weights: &[Vec<f32>]) {
    for (info, values) in trainer.model().tensors().iter().zip(weights) {
        trainer.model().write_tensor(&info.name, values).unwrap();
    }
}

/// Up to `most` steps; the number of those done and the message of the first that was not.
fn steps(trainer: &mut Trainer, data: &Dataset, most: u64) -> (u64, Option<String>) {
    for done in 0..most {
        let before = weights(trainer);
        match trainer.step(data) {
            Ok(stats) => assert!(stats.loss.is_finite() && stats.grad_norm.is_finite()),
            Err(error @ Error::NotFinite { .. }) => {
                assert_eq!(weights(trainer), before, "{error}");
                return (done, Some(error.to_string()));
            }
            Err(error) => panic!("{error}"),
        }
    }
    weights(trainer);
    (most, None)
}

/// What a step does, but for its time.
fn outcome(result: mxfp4train::Result<StepStats>) -> Result<StepStats, String> {
    result.map(|stats| StepStats { seconds: 0.0, ..stats }).map_err(|error| error.to_string())
}

fn assert_saves(trainer: &mut Trainer) {
    let folder = tempfile::tempdir().unwrap();
    trainer.save(&folder.path().join("saved")).unwrap();
}

/// After a step that was not done, training goes on bit for bit as if it had not been tried.
#[test]
fn rates_beyond_reason() {
    let (engine, data) = (engine(), dataset());
    for recipe in Recipe::NAMES {
        for lr in [1.0, 100.0, 1e6, 1e20, 1e37, 3e38f32] {
            let mut options = options(recipe);
            options.schedule.lr = lr;
            let mut tried = trainer(&engine, options.clone());
            let mut twin = trainer(&engine, options);
            let (done, message) = steps(&mut tried, &data, 20);
            assert_eq!(steps(&mut twin, &data, done), (done, None), "{recipe}, {lr}");
            assert_eq!(tried.steps_done(), done);
            if lr == 3e38 {
                let message = message.unwrap();
                assert!(
                    done == 0 && message.contains("lower the learning rate of 3e38"),
                    "{message}"
                );
                assert!(message.contains("after it a weight of transformer."), "{message}");
            }
            for trainer in [&mut tried, &mut twin] {
                trainer.set_lr(Some(1e-3)).unwrap();
            }
            for _ in 0..3 {
                let after = [tried.step(&data), twin.step(&data)].map(outcome);
                assert_eq!(after[0], after[1], "{recipe}, {lr}");
                assert!(after[0].is_ok() || done > 0, "{recipe}, {lr}: {after:?}");
            }
            assert_eq!(weights(&tried), weights(&twin));
            if recipe == "fp32" {
                assert_saves(&mut tried);
            }
        }
    }
}

#[test]
fn weights_at_the_ends_of_their_range() {
    let (engine, data) = (engine(), dataset());
    for recipe in Recipe::NAMES {
        for fill in [0.0, 1e-45, 1e-40, 1e-20, 1e5, 1e18, 1e19, 1e30, 1.7e38f32] {
            let mut trainer = trainer(&engine, options(recipe));
            let before = weights(&trainer);
            let numbers = |len| (0..len).map(move |i| fill * (((i * 7) % 5) as f32 - 2.0));
            let filled: Vec<Vec<f32>> = before.iter().map(|w| numbers(w.len()).collect()).collect();
            write(&trainer, &filled);
            let options = GenerateOptions { max_tokens: 4, ..GenerateOptions::default() };
            match trainer.model().generate(&[1], &options, &mut |_| true) {
                Ok(text) => assert!(fill < 1e30 && text.tokens.iter().all(|token| *token < 32)),
                Err(error) => assert!(matches!(error, Error::NotFinite { .. }), "{error}"),
            }
            let (done, _) = steps(&mut trainer, &data, 5);
            write(&trainer, &before);
            assert_eq!(steps(&mut trainer, &data, 3), (3, None), "{recipe}, {fill}");
            assert_eq!(trainer.steps_done(), done + 3);
        }
    }
}

/// Positions beyond the sequence have no gradient: a weight that nothing moves divides 0 by
/// epsilon.
#[test]
fn the_smallest_epsilons() {
    let (engine, data) = (engine(), dataset());
    for epsilon in [1e-45, 1e-38, 1e-30, 1e-20, 1e-8] {
        for recipe in ["fp32", "bf16", "mxfp4-rht-sr"] {
            let optimizer = Optimizer { epsilon, ..Optimizer::default() };
            let options = TrainerOptions { sequence_length: 8, optimizer, ..options(recipe) };
            let mut trainer = trainer(&engine, options);
            steps(&mut trainer, &data, 20);
            if recipe == "fp32" {
                assert_saves(&mut trainer);
            }
        }
    }
}

/// Without clipping a gradient may be finite and its square not.
#[test]
fn a_second_moment_beyond_f32() {
    let (engine, data) = (engine(), dataset());
    let optimizer = Optimizer { clip: 0.0, ..Optimizer::default() };
    let mut trainer = trainer(&engine, TrainerOptions { optimizer, ..options("fp32") });
    let before = weights(&trainer);
    let mut spiked = before.clone();
    spiked[0] = (0..512).map(|i| 1e22 * ((i * 7) % 5 - 2) as f32).collect();
    write(&trainer, &spiked);
    let (done, message) = steps(&mut trainer, &data, 1);
    let message = message.unwrap();
    assert!(done == 0 && message.contains("clip gradients, whose norm is "), "{message}");
    assert!(message.contains("after it a second moment of transformer."), "{message}");
    write(&trainer, &before);
    assert_eq!(steps(&mut trainer, &data, 50), (50, None));
    assert_saves(&mut trainer);
}
