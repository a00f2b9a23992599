//! A step allocates nothing: everything is planned and allocated when the trainer is made. Counted
//! where the allocator asks the system, on all threads but the process's first, which the test
//! harness reports on.

// The functions behind malloc have names in glibc only.
#![cfg(all(target_os = "linux", target_env = "gnu"))]

mod common;

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

use common::FIRST_RECIPES;
use mxfp4train::{
    Activation, Dataset, Engine, EngineOptions, Model, ModelConfig, Moments, Optimizer,
    OptimizerKind, Recipe, Schedule, Trainer, TrainerOptions, plan,
};

/// Weights are rounded by their means, tracked, reset and watched.
const FOLLOWED: &str = "tetrajet,ema=0.9,reset=4:2:8@0";

static CALLS: AtomicU64 = AtomicU64::new(0);

/// The system's functions in place of those of libc. NOTE: not a global allocator, which the crate
/// has itself in a build of the whole workspace, and of which a program has one.
mod counting {
    use super::*;

    unsafe extern "C" {
        fn __libc_malloc(size: usize) -> *mut c_void;
        fn __libc_calloc(count: usize, size: usize) -> *mut c_void;
        fn __libc_realloc(block: *mut c_void, size: usize) -> *mut c_void;
        fn __libc_memalign(align: usize, size: usize) -> *mut c_void;
    }

    fn count() {
        // SAFETY: neither has any precondition.
        if unsafe { libc::gettid() != libc::getpid() } {
            CALLS.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn malloc(size: usize) -> *mut c_void {
        count();
        // SAFETY: passed on.
        unsafe { __libc_malloc(size) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn calloc(elements: usize, size: usize) -> *mut c_void {
        count();
        // SAFETY: passed on.
        unsafe { __libc_calloc(elements, size) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn realloc(block: *mut c_void, size: usize) -> *mut c_void {
        count();
        // SAFETY: passed on.
        unsafe { __libc_realloc(block, size) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn posix_memalign(out: *mut *mut c_void, align: usize, size: usize) -> c_int {
        count();
        // SAFETY: passed on; `out` is the caller's.
        unsafe {
            *out = __libc_memalign(align, size);
            if (*out).is_null() { libc::ENOMEM } else { 0 }
        }
    }
}

#[test]
fn a_step_allocates_nothing() {
    let config = ModelConfig {
        vocab_size: 300,
        context_length: 64,
        layers: 2,
        heads: 2,
        channels: 64,
        ..ModelConfig::default()
    };
    let unlike_gpt2 = ModelConfig {
        mlp_channels: 37,
        activation: Activation::Gelu,
        tied_head: false,
        ..config.clone()
    };
    plan_takes_as_much_for_any_number_of_layers(&config);
    let tokens = (0..5000u32).map(|i| i * i % 299);
    let dir = tempfile::TempDir::new().unwrap();
    let file = dir.path().join("tokens.bin");
    std::fs::write(
        &file,
        tokens.clone().flat_map(|t| (t as u16).to_le_bytes()).collect::<Vec<_>>(),
    )
    .unwrap();
    let sources =
        [Dataset::from_tokens(tokens.collect()), Dataset::open(&file)].map(Result::unwrap);
    for threads in [1, 3] {
        let engine = Engine::new(EngineOptions { threads, ..EngineOptions::default() }).unwrap();
        let model = Model::new(&engine, &config).unwrap();
        let unlike_gpt2 = Model::new(&engine, &unlike_gpt2).unwrap();
        let deep = Model::new(&engine, &ModelConfig { layers: 3, ..config.clone() }).unwrap();
        let [adamw, stable, spam, ..] = OptimizerKind::ALL.map(Optimizer::new);
        let moments = |moments| Optimizer { moments, ..stable };
        let ramping = "adamw,ramping=2".parse().unwrap();
        let muon = |moments| Optimizer { moments, ..Optimizer::new(OptimizerKind::Muon) };
        let all = Recipe::NAMES.into_iter().map(|name| (&model, name, adamw, 1e-8));
        // With the smallest epsilon every step is tried before it is done.
        let others = [
            (&unlike_gpt2, "mxfp4-rht-sr", stable, 1e-8),
            (&model, "bf16", adamw, 1e-45),
            (&model, "bf16", stable, 1e-45),
            (&model, FOLLOWED, adamw, 1e-8),
            (&model, "bf16", moments(Moments::Bf16), 1e-8),
            (&model, "bf16", spam, 1e-8),
            (&model, "bf16", moments(Moments::Int8), 1e-45),
            (&unlike_gpt2, "bf16", muon(Moments::F32), 1e-8),
            (&model, "bf16", muon(Moments::Int8), 1e-45),
            // Of one step in two there are thirty more.
            (&model, "tetrajet", ramping, 1e-8),
            // This one drops tokens.
            (&deep, "mxfp4-rht-sr", adamw, 1e-8),
        ];
        for (model, name, optimizer, epsilon) in all.chain(others) {
            let drops = model.config().layers > 2;
            let options = TrainerOptions {
                batch_size: 2,
                accumulation: 2,
                recipe: name.parse().unwrap(),
                optimizer: Optimizer { epsilon, ..optimizer },
                schedule: Schedule { total_steps: 1000, ..Schedule::default() },
                token_drop: drops.then(|| "start=16,steps=20".parse().unwrap()),
                // That of a square.
                document_end: (model.config().mlp_channels == 37).then_some(4),
                ..TrainerOptions::default()
            };
            let mut trainer = Trainer::new(model, options).unwrap();
            if epsilon < 1e-8 {
                trainer.set_lr(Some(0.0)).unwrap();
            }
            if name == FOLLOWED {
                trainer.watch_weights(3).unwrap();
            }
            for data in &sources {
                trainer.step(data).unwrap();
                trainer.eval(data, 2).unwrap();
            }
            let before = CALLS.load(Ordering::Relaxed);
            assert!(before > 0, "nothing is counted");
            // Those of the seven first names have ways of their own through the kernels; what follows
            // weights begins after ten steps, and again in every period.
            let steps = match name {
                FOLLOWED => 14,
                _ if FIRST_RECIPES.contains(&name) => 32,
                _ => 2,
            };
            for step in 0..steps {
                trainer.step(&sources[step % 2]).unwrap();
            }
            for data in &sources {
                trainer.eval(data, 2).unwrap();
            }
            let calls = CALLS.load(Ordering::Relaxed) - before;
            assert_eq!(
                calls, 0,
                "{calls} allocations in {steps} steps of {name}, {optimizer}, {epsilon:e}, {threads} threads"
            );
        }
    }
}

fn plan_takes_as_much_for_any_number_of_layers(config: &ModelConfig) {
    let engine = Engine::new(EngineOptions { threads: 1, ..EngineOptions::default() }).unwrap();
    // A worker allocates as it starts, and a plan waits for none; initial weights do.
    Model::new(&engine, config).unwrap();
    let options = TrainerOptions::default();
    let [few, many] = [2, 4095].map(|layers| {
        let config = ModelConfig { layers, ..config.clone() };
        let before = CALLS.load(Ordering::Relaxed);
        plan(&engine, &config, &options).unwrap();
        CALLS.load(Ordering::Relaxed) - before
    });
    assert_eq!(few, many);
}
