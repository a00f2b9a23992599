//! Whole training steps: tokens a second for each recipe, in turn, medians.
//!
//! `cargo bench --bench train_step -- [MODEL] [RECIPE..]`; `MXT_BENCH_DEVICE` chooses the device
//! ("cpu" for the models whose names begin with d, "cuda" for the others), `MXT_BENCH_STEPS` the
//! steps whose median counts, `MXT_BENCH_RECOMPUTE` what is computed again, `MXT_BENCH_THREADS` and
//! `MXT_CPU_ISA` threads and instruction set. The models are
//!
//! | name | layers x channels x heads | batch x sequence | vocabulary |
//! | --- | --- | --- | --- |
//! | d4 | 4 x 128 x 4 | 16 x 256 | 256 |
//! | d6 | 6 x 384 x 6 | 8 x 256 | 128 |
//! | d12 | 12 x 768 x 12 | 1 x 512 | 50304 |
//! | 124M | 12 x 768 x 12 | 32 x 1024 | 50304 |
//! | 345M | 24 x 1024 x 16 | 16 x 1024 | 50304 |
//! | 1.3B | 24 x 2048 x 16 | 8 x 1024 | 50304 |
//!
//! The last column is the memory of the plan.

use mxfp4train::{
    Dataset, Engine, EngineOptions, Model, ModelConfig, Recipe, Schedule, Trainer, TrainerOptions,
};

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let size = if args.is_empty() { "d6".to_owned() } else { args.remove(0) };
    let (layers, channels, heads, batch_size, context_length, vocab_size) = match size.as_str() {
        "d4" => (4, 128, 4, 16, 256, 256),
        "d6" => (6, 384, 6, 8, 256, 128),
        "d12" => (12, 768, 12, 1, 512, 50304),
        "124M" => (12, 768, 12, 32, 1024, 50304),
        "345M" => (24, 1024, 16, 16, 1024, 50304),
        "1.3B" => (24, 2048, 16, 8, 1024, 50304),
        other => panic!("expected d4, d6, d12, 124M, 345M or 1.3B, got {other}"),
    };
    let recipes = if args.is_empty() { Recipe::NAMES.map(str::to_owned).to_vec() } else { args };

    let threads = std::env::var("MXT_BENCH_THREADS").map_or(0, |n| n.parse().unwrap());
    let device = if size.starts_with('d') { "cpu" } else { "cuda" };
    let device = std::env::var("MXT_BENCH_DEVICE").unwrap_or_else(|_| device.to_owned());
    let steps = std::env::var("MXT_BENCH_STEPS")
        .map_or(if device == "cpu" { 5 } else { 20 }, |n| n.parse().unwrap());
    let options = EngineOptions { device, threads, ..EngineOptions::default() };
    let started = std::time::Instant::now();
    let engine = Engine::new(options).unwrap();
    let config = ModelConfig {
        vocab_size,
        context_length,
        layers,
        heads,
        channels,
        ..ModelConfig::default()
    };
    let model = Model::new(&engine, &config).unwrap();
    let tokens =
        (0..1_000_000u64).map(|i| (i * i % 10_000_019 % vocab_size as u64) as u32).collect();
    let data = Dataset::from_tokens(tokens).unwrap();
    println!(
        "{size}: {} parameters, {}, {} worker threads, opened in {:.1} s",
        config.parameter_count(),
        engine.device(),
        engine.threads(),
        started.elapsed().as_secs_f64()
    );
    for name in recipes {
        let recipe: Recipe = name.parse().unwrap();
        let recompute = std::env::var("MXT_BENCH_RECOMPUTE").unwrap_or_else(|_| "nothing".into());
        let recompute = recompute.parse().unwrap();
        let optimizer = std::env::var("MXT_BENCH_OPTIMIZER").unwrap_or_else(|_| "adamw".into());
        let optimizer = optimizer.parse().unwrap();
        let schedule = Schedule { total_steps: 1_000_000, ..Schedule::default() };
        let options = TrainerOptions {
            batch_size,
            recipe,
            recompute,
            optimizer,
            schedule,
            ..TrainerOptions::default()
        };
        let mut trainer = Trainer::new(&model, options).unwrap();
        let first = trainer.step(&data).unwrap().seconds;
        let mut seconds: Vec<f64> =
            (0..steps).map(|_| trainer.step(&data).unwrap().seconds).collect();
        seconds.sort_by(f64::total_cmp);
        // Without further steps the first one counts: a profiler looks at that.
        let median = seconds.get(steps / 2).copied().unwrap_or(first);
        let tokens = (batch_size * context_length) as f64;
        let gib = trainer.plan().total() as f64 / (1u64 << 30) as f64;
        println!(
            "{name:18} {:8.1} ms {:8.0} tokens/s {gib:6.2} GiB (first step {first:.2} s)",
            median * 1e3,
            tokens / median
        );
    }
}
