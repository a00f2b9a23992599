//! Whole training steps: tokens a second for each recipe, in turn, medians.
//!
//! `cargo bench --bench train_step -- [MODEL] [RECIPE..]`; `MXT_BENCH_DEVICE` chooses the device
//! ("cpu" for the models whose names begin with d, "cuda" for the others), `MXT_BENCH_STEPS` the
//! steps whose median counts, `MXT_BENCH_ACCUMULATION` the batches of a step, `MXT_BENCH_BATCH` another
//! batch size, `MXT_BENCH_RECOMPUTE` what is computed again, `MXT_BENCH_THREADS` and
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
//! | llama-d6 | 6 x 384 x 6, 2 kv heads | 8 x 256 | 128 |
//! | llama-350M | 24 x 1024 x 16, 4 kv heads | 8 x 2048 | 32000 |
//! | llama-1.1B | 22 x 2048 x 32, 4 kv heads (TinyLlama) | 4 x 2048 | 32000 |
//! | qwen2-0.5B | 24 x 896 x 14, 2 kv heads (Qwen2.5) | 32 x 1024 | 151936 |
//! | qwen2-1.5B | 28 x 1536 x 12, 2 kv heads (Qwen2.5) | 32 x 1024 | 151936 |
//!
//! The last column is the memory of the plan.

use mxfp4train::{
    Architecture, Dataset, Engine, EngineOptions, Model, ModelConfig, Recipe, Schedule, Trainer,
    TrainerOptions,
};

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let size = if args.is_empty() { "d6".to_owned() } else { args.remove(0) };
    let gpt2 = |(layers, channels, heads, batch_size, context_length, vocab_size)| {
        let sizes = ModelConfig { layers, channels, heads, context_length, ..Default::default() };
        (ModelConfig { vocab_size, ..sizes }, batch_size)
    };
    let llama = |sizes: [usize; 5], [batch_size, length, vocab]: [usize; 3]| {
        let [layers, channels, heads, kv_heads, mlp_channels] = sizes;
        let config = ModelConfig {
            architecture: Architecture::Llama,
            layers,
            channels,
            heads,
            kv_heads,
            mlp_channels,
            context_length: length,
            vocab_size: vocab,
            tied_head: false,
            ..ModelConfig::default()
        };
        (config, batch_size)
    };
    let qwen2 = |sizes: [usize; 5]| {
        let (config, batch_size) = llama(sizes, [32, 1024, 151_936]);
        (ModelConfig { qkv_bias: true, tied_head: true, ..config }, batch_size)
    };
    let (config, batch_size) = match size.as_str() {
        "d4" => gpt2((4, 128, 4, 16, 256, 256)),
        "d6" => gpt2((6, 384, 6, 8, 256, 128)),
        "d12" => gpt2((12, 768, 12, 1, 512, 50304)),
        "124M" => gpt2((12, 768, 12, 32, 1024, 50304)),
        "345M" => gpt2((24, 1024, 16, 16, 1024, 50304)),
        "1.3B" => gpt2((24, 2048, 16, 8, 1024, 50304)),
        "llama-d6" => llama([6, 384, 6, 2, 1024], [8, 256, 128]),
        "llama-350M" => llama([24, 1024, 16, 4, 2816], [8, 2048, 32_000]),
        "llama-1.1B" => llama([22, 2048, 32, 4, 5632], [4, 2048, 32_000]),
        "qwen2-0.5B" => qwen2([24, 896, 14, 2, 4864]),
        "qwen2-1.5B" => qwen2([28, 1536, 12, 2, 8960]),
        other => panic!("expected one of the models that this file's head lists, got {other}"),
    };
    let recipes = if args.is_empty() { Recipe::NAMES.map(str::to_owned).to_vec() } else { args };

    let threads = std::env::var("MXT_BENCH_THREADS").map_or(0, |n| n.parse().unwrap());
    let number = |name: &str, usual: usize| {
        std::env::var(name).map_or(usual, |n| n.parse().expect("a number"))
    };
    let batch_size = number("MXT_BENCH_BATCH", batch_size);
    let accumulation = number("MXT_BENCH_ACCUMULATION", 1);
    let device = if size.contains('d') { "cpu" } else { "cuda" };
    let device = std::env::var("MXT_BENCH_DEVICE").unwrap_or_else(|_| device.to_owned());
    let steps = std::env::var("MXT_BENCH_STEPS")
        .map_or(if device == "cpu" { 5 } else { 20 }, |n| n.parse().unwrap());
    let options = EngineOptions { device, threads, ..EngineOptions::default() };
    let started = std::time::Instant::now();
    let engine = Engine::new(options).unwrap();
    let ModelConfig { vocab_size, context_length, .. } = config;
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
            accumulation,
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
        let tokens = (accumulation * batch_size * context_length) as f64;
        let gib = trainer.plan().total() as f64 / (1u64 << 30) as f64;
        println!(
            "{name:18} {:8.1} ms {:8.0} tokens/s {gib:6.2} GiB (first step {first:.2} s)",
            median * 1e3,
            tokens / median
        );
    }
}
