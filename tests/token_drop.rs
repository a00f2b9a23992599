//! Token dropping through the public interface: a run that drops tokens goes on bit for bit where it
//! was saved, on any number of threads and whatever is computed again; where nothing is dropped it
//! is the run without; and its gradients are those of its loss.

#[path = "common/tiny.rs"]
mod tiny;

use std::fs;

use mxfp4train::{Model, ModelConfig, Recipe, Recompute, Schedule, Trainer, TrainerOptions};
use tiny::{data, engine, losses, weights};

/// Tokens of a sequence: 16 are kept at first, then 32, then all.
const LENGTH: usize = 48;

/// Steps in which tokens are dropped.
const DROPPING: usize = 6;

/// Of five blocks, so that three drop tokens.
fn model(threads: usize) -> Model {
    let config = ModelConfig {
        vocab_size: 33,
        context_length: LENGTH,
        layers: 5,
        heads: 2,
        channels: 36,
        ..ModelConfig::default()
    };
    Model::new(&engine(threads), &config).unwrap()
}

fn options(recipe: &str, token_drop: &str) -> TrainerOptions {
    TrainerOptions {
        batch_size: 3,
        accumulation: 2,
        recipe: recipe.parse().unwrap(),
        schedule: Schedule { lr: 3e-3, total_steps: 12, ..Schedule::default() },
        token_drop: (!token_drop.is_empty()).then(|| token_drop.parse().unwrap()),
        ..TrainerOptions::default()
    }
}

fn trainer(threads: usize, options: TrainerOptions) -> Trainer {
    Trainer::new(&model(threads), options).unwrap()
}

const RECIPES: [&str; 3] = ["fp32", "mxfp4-rht-sr", "fp8-mxfp4-rht-sr"];

#[test]
fn runs_go_on_where_they_were_saved() {
    for recipe in RECIPES {
        let options = options(recipe, "start=16,steps=50%");
        let mut straight = trainer(1, options.clone());
        let all = losses(&mut straight, 10);
        let folder = tempfile::tempdir().unwrap();
        let mut before = trainer(3, options.clone());
        assert_eq!(losses(&mut before, 3), all[..3], "{recipe}");
        before.save(folder.path()).unwrap();
        let text = fs::read_to_string(folder.path().join("trainer.json")).unwrap();
        assert!(text.contains("\"token_drop\": \"start=16,steps=50%\""), "{text}");
        let mut resumed = Trainer::load(&engine(2), folder.path()).unwrap();
        assert_eq!(resumed.options().token_drop, options.token_drop);
        assert_eq!(losses(&mut resumed, 7), all[3..], "{recipe}");
        assert_eq!(weights(&resumed), weights(&straight), "{recipe}");
    }
}

#[test]
fn recomputing_changes_no_bit() {
    for recipe in RECIPES {
        let all = [Recompute::Nothing, Recompute::Pointwise, Recompute::Block].map(|recompute| {
            let options = TrainerOptions { recompute, ..options(recipe, "start=16,steps=50%") };
            let mut trainer = trainer(2, options);
            (losses(&mut trainer, 4), weights(&trainer))
        });
        assert!(all[0] == all[1] && all[0] == all[2], "{recipe}");
    }
}

/// Where all tokens are kept, and once they are, nothing tells that they were not.
#[test]
fn a_run_that_drops_nothing_is_the_run_without() {
    for recipe in RECIPES {
        let mut without = trainer(2, options(recipe, ""));
        let expected = losses(&mut without, 4);
        for drop in ["start=48,steps=50%", "start=16,steps=1%"] {
            let mut with = trainer(2, options(recipe, drop));
            assert_eq!(losses(&mut with, 4), expected, "{recipe}, {drop}");
            assert_eq!(weights(&with), weights(&without), "{recipe}, {drop}");
        }
        let folder = tempfile::tempdir().unwrap();
        without.save(folder.path()).unwrap();
        let text = fs::read_to_string(folder.path().join("trainer.json")).unwrap();
        assert!(!text.contains("token_drop"), "{text}");
    }
}

/// In the midst of dropping as well.
#[test]
fn evaluations_see_every_token() {
    for recipe in RECIPES {
        let [mut with, mut without] =
            ["start=16,steps=50%", ""].map(|drop| trainer(2, options(recipe, drop)));
        let eval = |trainer: &mut Trainer| trainer.eval(&data(), 0).unwrap().loss;
        assert_eq!(eval(&mut with), eval(&mut without), "{recipe}");
        assert_ne!(losses(&mut with, 1), losses(&mut without, 1), "{recipe}");
        let folder = tempfile::tempdir().unwrap();
        with.save(folder.path()).unwrap();
        let loaded = Model::load(&engine(1), folder.path()).unwrap();
        let mut alone = Trainer::new(&loaded, options(recipe, "")).unwrap();
        assert_eq!(eval(&mut with), eval(&mut alone), "{recipe}");
    }
}

#[test]
fn it_learns() {
    let mut trainer = trainer(2, options("mxfp4-rht-sr", "start=16,steps=20"));
    let first = trainer.eval(&data(), 0).unwrap().loss;
    losses(&mut trainer, 40);
    let last = trainer.eval(&data(), 0).unwrap().loss;
    assert!(last < first - 1.0, "{first} to {last}");
}

/// The windows of a step.
fn tokens() -> Vec<u32> {
    (0..6 * (LENGTH as u32 + 1)).map(|i| (i * i + i / 7) % 31).collect()
}

/// Loss of the first step from weights that `change` has changed, and its gradients.
fn first_step(change: impl Fn(usize, &mut [f32])) -> (f64, Vec<Vec<f32>>) {
    let model = model(2);
    let names: Vec<_> =
        model.tensors().iter().map(|info| (info.name.clone(), info.len())).collect();
    for (number, (name, len)) in names.iter().enumerate() {
        let mut values = vec![0.0; *len];
        model.read_tensor(name, &mut values).unwrap();
        // Away from where GPT-2 begins, at which many gradients are small.
        values
            .iter_mut()
            .zip(0u32..)
            .for_each(|(v, i)| *v += 0.05 * (1.7 * (i * i % 1009) as f32).sin());
        change(number, &mut values);
        model.write_tensor(name, &values).unwrap();
    }
    let options = options("fp32", "start=16,steps=50%");
    let mut trainer = Trainer::new(&model, options).unwrap();
    let loss = trainer.step_tokens(&tokens()).unwrap().loss;
    let read = |(name, len): &(String, usize)| {
        let mut values = vec![0.0; *len];
        trainer.read_gradient(name, &mut values).unwrap();
        values
    };
    (f64::from(loss), names.iter().map(read).collect())
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

/// Central differences along the gradient of each tensor, which is its norm there.
#[test]
fn gradients_are_those_of_finite_differences() {
    let (_, gradients) = first_step(|_, _| ());
    let whole = gradients.iter().map(|g| norm(g).powi(2)).sum::<f64>().sqrt();
    for (number, gradient) in gradients.iter().enumerate() {
        let norm = norm(gradient);
        let step = 5e-3 / norm.max(1e-6);
        let at = |sign: f64| {
            let along = |tensor: usize, values: &mut [f32]| {
                if tensor == number {
                    let moved = values.iter_mut().zip(gradient);
                    moved.for_each(|(v, g)| *v += (sign * step * f64::from(*g)) as f32);
                }
            };
            first_step(along).0
        };
        let found = (at(1.0) - at(-1.0)) / (2.0 * step * norm);
        let error = (found - norm).abs();
        assert!(error < 2e-4 * whole, "tensor {number}: {found}, expected {norm}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let error = |options| Trainer::new(&model(1), options).unwrap_err().to_string();
    let long = error(options("bf16", "start=64,steps=50%"));
    assert!(long.contains("token_drop: start=64: expected at most the 48 tokens"), "{long}");
    let endless =
        TrainerOptions { schedule: Schedule::default(), ..options("bf16", "start=16,steps=50%") };
    assert!(error(endless).contains("(total_steps) is not set"));
    // A new schedule is held to the same, and the present one stays where it is refused.
    let mut trainer = trainer(1, options("bf16", "start=16,steps=50%"));
    assert!(trainer.set_schedule(Schedule::default()).is_err());
    assert_eq!(trainer.options().schedule.total_steps, 12);
    let shallow = tiny::model(&engine(1));
    let error = Trainer::new(&shallow, options("bf16", "start=16,steps=50%")).unwrap_err();
    assert!(error.to_string().contains("a model of 2 layers has none there"), "{error}");
}

/// Of `DROPPING` steps the sizes are 16 and 32; steps of a new schedule are counted anew.
#[test]
fn a_new_schedule_drops_tokens_again() {
    let drop = format!("start=16,steps={DROPPING}");
    let mut with = trainer(2, options("fp32", &drop));
    losses(&mut with, DROPPING);
    // From here on as if nothing had been dropped.
    let folder = tempfile::tempdir().unwrap();
    with.save(folder.path()).unwrap();
    let mut twin = Trainer::load(&engine(1), folder.path()).unwrap();
    let schedule = Schedule { lr: 3e-3, total_steps: 12, ..Schedule::default() };
    twin.set_schedule(schedule).unwrap();
    assert_ne!(losses(&mut twin, 1), losses(&mut with, 1));
}

#[test]
fn every_recipe_can_drop_tokens() {
    for recipe in Recipe::NAMES {
        let mut trainer = trainer(2, options(recipe, "start=16,steps=50%"));
        let losses = losses(&mut trainer, 4);
        assert!(losses.iter().all(|loss| loss.is_finite()), "{recipe}: {losses:?}");
    }
}
