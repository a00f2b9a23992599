//! Whole training steps: tokens a second for each recipe, in turn, medians.
//!
//! `cargo bench --bench train_step -- [d4|d6|d12] [RECIPE..]`; `MXT_BENCH_THREADS` and `MXT_CPU_ISA`
//! choose threads and instruction set. The models are
//!
//! | name | layers x channels x heads | batch x sequence | vocabulary |
//! | --- | --- | --- | --- |
//! | d4 | 4 x 128 x 4 | 16 x 256 | 256 |
//! | d6 | 6 x 384 x 6 | 8 x 256 | 128 |
//! | d12 | 12 x 768 x 12 | 1 x 512 | 50304 |

use mxfp4train::{
    Dataset, Engine, EngineOptions, Model, ModelConfig, Recipe, Trainer, TrainerOptions,
};

const STEPS: usize = 5;

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let size = if args.is_empty() { "d6".to_owned() } else { args.remove(0) };
    let (layers, channels, heads, batch_size, context_length, vocab_size) = match size.as_str() {
        "d4" => (4, 128, 4, 16, 256, 256),
        "d6" => (6, 384, 6, 8, 256, 128),
        "d12" => (12, 768, 12, 1, 512, 50304),
        other => panic!("expected d4, d6 or d12, got {other}"),
    };
    let recipes = if args.is_empty() { Recipe::NAMES.map(str::to_owned).to_vec() } else { args };

    let threads = std::env::var("MXT_BENCH_THREADS").map_or(0, |n| n.parse().unwrap());
    let options = EngineOptions { threads, ..EngineOptions::default() };
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
    let tokens = (0..100_000u64).map(|i| (i * i % 1_000_003 % vocab_size as u64) as u32).collect();
    let data = Dataset::from_tokens(tokens).unwrap();
    println!("{size}: {} parameters, {} threads", config.parameter_count(), engine.threads());
    for name in recipes {
        let recipe: Recipe = name.parse().unwrap();
        let options = TrainerOptions { batch_size, recipe, ..TrainerOptions::default() };
        let mut trainer = Trainer::new(&model, options).unwrap();
        trainer.step(&data).unwrap();
        let mut seconds: Vec<f64> =
            (0..STEPS).map(|_| trainer.step(&data).unwrap().seconds).collect();
        seconds.sort_by(f64::total_cmp);
        let median = seconds[STEPS / 2];
        let tokens = (batch_size * context_length) as f64;
        println!("{name:18} {:8.1} ms {:8.0} tokens/s", median * 1e3, tokens / median);
    }
}
