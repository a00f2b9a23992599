//! A step allocates nothing: everything is planned and allocated when the trainer is made. Counted by
//! the allocator itself, on all threads.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use mxfp4train::{
    Activation, AdamW, Dataset, Engine, EngineOptions, Model, ModelConfig, Recipe, Trainer,
    TrainerOptions,
};

struct Counting;

static CALLS: AtomicU64 = AtomicU64::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

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
        let all = Recipe::NAMES.into_iter().map(|name| (&model, name, 1e-8));
        // With the smallest epsilon every step is tried before it is done.
        let others = [(&unlike_gpt2, "mxfp4-rht-sr", 1e-8), (&model, "bf16", 1e-45)];
        for (model, name, epsilon) in all.chain(others) {
            let options = TrainerOptions {
                batch_size: 4,
                accumulation: 2,
                recipe: name.parse().unwrap(),
                optimizer: AdamW { epsilon, ..AdamW::default() },
                ..TrainerOptions::default()
            };
            let mut trainer = Trainer::new(model, options).unwrap();
            if epsilon < 1e-8 {
                trainer.set_lr(Some(0.0)).unwrap();
            }
            for data in &sources {
                trainer.step(data).unwrap();
                trainer.eval(data, 2).unwrap();
            }
            let before = CALLS.load(Ordering::Relaxed);
            for step in 0..100 {
                trainer.step(&sources[step % 2]).unwrap();
            }
            for data in &sources {
                trainer.eval(data, 2).unwrap();
            }
            let calls = CALLS.load(Ordering::Relaxed) - before;
            assert_eq!(
                calls, 0,
                "{calls} allocations in 100 steps of {name}, {epsilon:e}, {threads} threads"
            );
        }
    }
}
