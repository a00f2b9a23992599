//! The same seed gives the same bytes: on any number of threads, and across a stop and a resume in
//! another process.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use mxfp4train::{
    Dataset, Engine, EngineOptions, Model, ModelConfig, Recipe, Schedule, ScheduleKind, Trainer,
    TrainerOptions,
};

const STEPS_BEFORE: u64 = 3;
const STEPS_AFTER: u64 = 20;

/// Set for the process that resumes: the checkpoint folder.
const RESUME_FROM: &str = "MXT_TEST_RESUME_FROM";

fn engine(threads: usize) -> Engine {
    Engine::new(EngineOptions { threads, seed: 99, ..EngineOptions::default() }).unwrap()
}

fn data() -> Dataset {
    let text = include_str!("determinism.rs");
    Dataset::from_tokens(text.bytes().map(u32::from).collect()).unwrap()
}

/// A small model of awkward sizes, and a run with everything in it that a resume must carry on.
fn trainer(engine: &Engine, recipe: &str) -> Trainer {
    let model = Model::new(engine, &config()).unwrap();
    Trainer::new(&model, options(recipe)).unwrap()
}

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 257,
        context_length: 37,
        layers: 2,
        heads: 3,
        channels: 42,
        ..ModelConfig::default()
    }
}

fn options(recipe: &str) -> TrainerOptions {
    TrainerOptions {
        batch_size: 3,
        accumulation: 2,
        recipe: recipe.parse().unwrap(),
        schedule: Schedule {
            kind: ScheduleKind::Cosine,
            lr: 1e-2,
            min_lr: 1e-3,
            warmup_steps: 5,
            total_steps: 30,
            ..Schedule::default()
        },
        ..TrainerOptions::default()
    }
}

fn new_schedule() -> Schedule {
    let kind = ScheduleKind::Linear;
    Schedule { kind, lr: 2e-3, warmup_steps: 3, total_steps: 5, ..Schedule::default() }
}

/// A schedule that cannot be leaves the present one, and a new one ends a rate of the host's.
#[test]
fn a_new_schedule_counts_from_where_it_is_set() {
    let mut trainer = trainer(&engine(1), "bf16");
    run(&mut trainer, 2);
    trainer.set_lr(Some(0.5)).unwrap();
    let endless = Schedule { kind: ScheduleKind::Cosine, ..Schedule::default() };
    let error = trainer.set_schedule(endless).unwrap_err().to_string();
    assert!(error.starts_with("total_steps: "), "{error}");
    assert_eq!((trainer.next_lr(), trainer.schedule_start()), (0.5, 0));
    trainer.set_schedule(new_schedule()).unwrap();
    assert_eq!((trainer.lr_override(), trainer.schedule_start()), (None, 2));
    let rates: Vec<_> = (0..6).map(|_| trainer.step(&data()).unwrap().lr).collect();
    let expected: Vec<_> = (0..6).map(|step| new_schedule().at(step)).collect();
    assert_eq!(rates, expected);
}

/// Bits of the losses and norms of `steps` steps.
fn run(trainer: &mut Trainer, steps: u64) -> Vec<(u32, u32)> {
    let data = data();
    let step = |_| {
        let stats = trainer.step(&data).unwrap();
        (stats.loss.to_bits(), stats.grad_norm.to_bits())
    };
    (0..steps).map(step).collect()
}

fn weights(model: &Model) -> Vec<u32> {
    let mut all = Vec::new();
    for info in model.tensors() {
        let mut values = vec![0.0; info.len()];
        model.read_tensor(&info.name, &mut values).unwrap();
        all.extend(values.into_iter().map(f32::to_bits));
    }
    all
}

/// What is computed again is what was computed the first time; the plan is smaller by it.
#[test]
fn recomputing_changes_no_bit() {
    let engine = engine(2);
    for recipe in ["fp32", "mxfp4-rht-sr", "fp8-mxfp4-rht-sr"] {
        let results = ["nothing", "pointwise", "block"].map(|recompute| {
            let model = Model::new(&engine, &ModelConfig { layers: 3, ..config() }).unwrap();
            let recompute = recompute.parse().unwrap();
            let options = TrainerOptions { recompute, ..options(recipe) };
            let mut trainer = Trainer::new(&model, options).unwrap();
            (trainer.plan().activations, run(&mut trainer, 3), weights(trainer.model()))
        });
        let [(all, ..), (fewer, ..), (fewest, ..)] = &results;
        assert!(all > fewer && fewer > fewest);
        for (_, losses, weights) in &results[1..] {
            assert!((losses, weights) == (&results[0].1, &results[0].2), "{recipe}");
        }
    }
}

/// All names, and of switches some that no name has.
fn recipes() -> impl Iterator<Item = &'static str> {
    Recipe::NAMES.into_iter().chain(["tetrajet,fwd=fp8,wgrad=fp8", "quartet2,rht=all,dgrad=fp8"])
}

#[test]
fn threads_do_not_change_a_bit() {
    for recipe in recipes() {
        let results = [1, 2, 3].map(|threads| {
            let mut trainer = trainer(&engine(threads), recipe);
            let losses = run(&mut trainer, 4);
            let eval = trainer.eval(&data(), 0).unwrap().loss.to_bits();
            (losses, eval, weights(trainer.model()))
        });
        assert!(results[0] == results[1] && results[0] == results[2], "{recipe}");
    }
}

/// An evaluation that merges channels, and what that would spare. Nothing trains with it.
#[test]
fn threads_do_not_change_which_channels_are_merged() {
    let results = [1, 2, 3].map(|threads| {
        let engine = engine(threads);
        let mut merging = trainer(&engine, "bf16,haste=5");
        let refused = [merging.step(&data()), merging.step_tokens(&[0; 6 * 38])];
        for error in refused.map(|step| step.unwrap_err().to_string()) {
            assert!(error.contains("haste=5 is for evaluation"), "{error}");
        }
        let merged = merging.eval(&data(), 0).unwrap();
        assert_eq!(merging.steps_done(), 0);
        let plain = Trainer::new(merging.model(), options("bf16")).unwrap().eval(&data(), 0);
        let plain = plain.unwrap();
        assert!(plain.spared.is_none() && plain.loss != merged.loss);
        let spared = merged.spared.unwrap();
        // No more than 32 of 42 channels, and of 168 behind fc1.
        assert!(spared.products > 0.4 && spared.all < spared.products, "{spared:?}");
        let again = merging.eval(&data(), 0).unwrap();
        assert_eq!((again.loss, again.spared), (merged.loss, merged.spared));
        (merged.loss.to_bits(), spared.products.to_bits(), spared.all.to_bits())
    });
    assert!(results[0] == results[1] && results[0] == results[2], "{results:?}");
}

#[test]
fn another_process_resumes_bit_for_bit() {
    for recipe in recipes() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = folder.path().join("checkpoint");
        let mut uninterrupted = trainer(&engine(2), recipe);
        run(&mut uninterrupted, STEPS_BEFORE - 1);
        // One set on the way is a part of what is resumed.
        uninterrupted.set_schedule(new_schedule()).unwrap();
        run(&mut uninterrupted, 1);
        uninterrupted.save(&checkpoint).unwrap();
        let expected = run(&mut uninterrupted, STEPS_AFTER);

        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "resume_in_a_child", "--nocapture"])
            .env(RESUME_FROM, &checkpoint)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}");
        let resumed: Vec<(u32, u32)> = text
            .lines()
            .filter_map(|line| line.strip_prefix("bits "))
            .map(|line| {
                let mut words = line.split(' ').map(|word| word.parse().unwrap());
                (words.next().unwrap(), words.next().unwrap())
            })
            .collect();
        assert_eq!(resumed, expected, "{recipe}");
    }
}

/// The other process of the test above; on its own it has nothing to do.
#[test]
fn resume_in_a_child() {
    let Some(checkpoint) = std::env::var_os(RESUME_FROM) else { return };
    // Another seed and other threads: the checkpoint's seed counts, and threads do not.
    let options = EngineOptions { threads: 3, seed: 1, ..EngineOptions::default() };
    let mut trainer =
        Trainer::load(&Engine::new(options).unwrap(), Path::new(&checkpoint)).unwrap();
    assert_eq!(trainer.steps_done(), STEPS_BEFORE);
    assert_eq!(trainer.schedule_start(), STEPS_BEFORE - 1);
    assert_eq!(trainer.options().schedule, new_schedule());
    assert_eq!(trainer.next_lr(), new_schedule().at(1));
    println!();
    for (loss, norm) in run(&mut trainer, STEPS_AFTER) {
        println!("bits {loss} {norm}");
    }
}

#[test]
fn seeds_differ() {
    let other = EngineOptions { seed: 100, ..EngineOptions::default() };
    let mut other = trainer(&Engine::new(other).unwrap(), "mxfp4-rht-sr");
    assert_ne!(run(&mut other, 1), run(&mut trainer(&engine(2), "mxfp4-rht-sr"), 1));
}

/// Weights that another thread writes meanwhile are seen before an evaluation or after it, never
/// between two of its batches.
#[test]
fn an_evaluation_sees_one_state_of_the_weights() {
    let mut trainer = trainer(&engine(1), "fp32");
    let (model, data) = (trainer.model().clone(), data());
    let name = "transformer.ln_f.weight";
    let [small, large] = [0.5, 2.0].map(|value| vec![value; config().channels]);
    let losses = [&small, &large].map(|values| {
        model.write_tensor(name, values).unwrap();
        trainer.eval(&data, 40).unwrap().loss
    });
    let ends = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for values in [&small, &large].into_iter().cycle() {
                if ends.load(Ordering::Relaxed) {
                    break;
                }
                model.write_tensor(name, values).unwrap();
            }
        });
        for _ in 0..20 {
            let loss = trainer.eval(&data, 40).unwrap().loss;
            if !losses.contains(&loss) {
                ends.store(true, Ordering::Relaxed);
                panic!("{loss} is of no state: {losses:?}");
            }
        }
        ends.store(true, Ordering::Relaxed);
    });
}
