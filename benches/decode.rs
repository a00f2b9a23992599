//! Decoding: tokens a second of one text, beside what reading the weights alone would take.
//!
//! `cargo bench --bench decode [-- MODEL..]`. Models have the shapes of GPT-2's and random weights:
//! 124M (default), 345M, d6 (384 wide). Prefill is given in tokens a second of 499 tokens; decoding
//! for the tokens behind them, one at a time; and the whole computation in f32, which each of them
//! took without what is kept. Beside a token stands the time in which all threads together read as
//! many bytes as the weights of the linear layers and of the head have, from a buffer of that size,
//! which a large cache may hold as it may hold the weights. Medians.

use std::hint::black_box;
use std::time::Instant;

use mxfp4train::{Decoder, DecoderWeights, Engine, EngineOptions, Model, ModelConfig};

const PROMPT: usize = 500;
const TOKENS: usize = 24;

fn config(name: &str) -> ModelConfig {
    let (layers, heads, channels) = match name {
        "d6" => (6, 6, 384),
        "124M" => (12, 12, 768),
        "345M" => (24, 16, 1024),
        other => panic!("expected d6, 124M or 345M, got {other}"),
    };
    ModelConfig { layers, heads, channels, ..ModelConfig::default() }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn time(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

/// Seconds in which all threads together read so many bytes, again and again.
fn time_to_read(bytes: usize) -> f64 {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let data = vec![1u64; bytes / 8];
    let read = || {
        std::thread::scope(|scope| {
            for part in data.chunks(data.len().div_ceil(threads)) {
                scope.spawn(move || black_box(part.iter().fold(0u64, |a, b| a | b)));
            }
        });
    };
    median((0..9).map(|_| time(read)).collect())
}

fn main() {
    let names: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let names = if names.is_empty() { vec!["124M".to_owned()] } else { names };
    for name in names {
        let config = config(&name);
        let engine = Engine::new(EngineOptions::default()).unwrap();
        let model = Model::new(&engine, &config).unwrap();
        let text: Vec<u32> = (0..PROMPT + TOKENS).map(|i| (i * i * 31 % 50_000) as u32).collect();
        let mut logits = vec![0.0; config.vocab_size];
        let whole = |_| time(|| model.next_logits(&text[..PROMPT], &mut logits).unwrap());
        let whole = median((0..3).map(whole).collect());
        let of_block = 12 * config.channels * config.channels;
        let read = config.layers * of_block + config.vocab_size * config.channels;
        for weights in DecoderWeights::ALL {
            let mut decoder = Decoder::new(&model, config.context_length, weights).unwrap();
            // Weights are packed with the first token.
            decoder.push(&text[..1]).unwrap();
            let first = time(|| decoder.logits(&mut logits).unwrap());
            decoder.push(&text[1..PROMPT]).unwrap();
            let prefill = time(|| decoder.logits(&mut logits).unwrap());
            let of_token = |token: &u32| {
                time(|| {
                    decoder.push(&[*token]).unwrap();
                    decoder.logits(&mut logits).unwrap();
                })
            };
            let token = median(text[PROMPT..].iter().map(of_token).collect());
            let bytes = match weights {
                DecoderWeights::F32 => 4.0,
                DecoderWeights::Bf16 => 2.0,
                DecoderWeights::Mxfp4 => 4.25 / 8.0,
            };
            let floor = time_to_read((bytes * read as f64) as usize);
            println!(
                "{name}, {weights}: packing {first:.2} s, prefill {:.0} tokens/s; a token {:.1} ms, \
                 {:.1} tokens/s, {:.1} ms to read the weights; {:.1} times as fast as the whole \
                 computation in f32, {:.0} ms",
                (PROMPT - 1) as f64 / prefill,
                1e3 * token,
                1.0 / token,
                1e3 * floor,
                whole / token,
                1e3 * whole,
            );
        }
    }
}
