//! Decoding: tokens a second of one text, beside what reading the weights alone would take.
//!
//! `cargo bench --bench decode [-- MODEL..]`; `MXT_BENCH_DEVICE` chooses the device ("cpu"). Models
//! have the shapes of GPT-2's and random weights: 124M (default), 345M, d6 (384 wide), 1.3B. Prefill is
//! given in tokens a second of 499 tokens; decoding for the tokens behind them, one at a time, with
//! logits on the host; and the whole computation in f32, which each of them took without what is kept.
//! Medians. Then a text is written with drafts and without in turn; what random weights guess right of
//! their own choices is no measure of trained ones.
//!
//! On a processor there stands beside a token the time in which all threads together read as many
//! bytes as the weights of the linear layers and of the head have, from a buffer of that size, which a
//! large cache may hold as it may hold the weights; on a GPU tokens a second of 999 tokens at once, and
//! of the forward pass of training, `bf16` with 8 sequences of 1,024 tokens.

use std::hint::black_box;
use std::time::Instant;

use mxfp4train::{
    Dataset, Decoder, DecoderOptions, DecoderWeights, Draft, Engine, EngineOptions,
    GenerateOptions, Model, ModelConfig, Trainer, TrainerOptions,
};

const PROMPT: usize = 500;
const TOKENS: usize = 24;
/// Tokens of a text that is written with drafts.
const TEXT: usize = 96;

fn config(name: &str) -> ModelConfig {
    let (layers, heads, channels) = match name {
        "d6" => (6, 6, 384),
        "124M" => (12, 12, 768),
        "345M" => (24, 16, 1024),
        "1.3B" => (24, 16, 2048),
        other => panic!("expected d6, 124M, 345M or 1.3B, got {other}"),
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

/// Tokens a second of the forward pass of training.
fn forward_rate(model: &Model) -> f64 {
    let batches = 4;
    let options =
        TrainerOptions { batch_size: 8, recipe: "bf16".parse().unwrap(), ..Default::default() };
    let mut trainer = Trainer::new(model, options).unwrap();
    let tokens = (0..100_000u32).map(|i| i * 31 % 50_000).collect();
    let data = Dataset::from_tokens(tokens).unwrap();
    trainer.eval(&data, 1).unwrap();
    let seconds = median((0..3).map(|_| time(|| drop(trainer.eval(&data, batches)))).collect());
    (8 * 1024 * batches) as f64 / seconds
}

fn main() {
    let device = std::env::var("MXT_BENCH_DEVICE").unwrap_or_else(|_| "cpu".into());
    let is_gpu = device != "cpu";
    let names: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let names = if names.is_empty() { vec!["124M".to_owned()] } else { names };
    for name in names {
        let config = config(&name);
        let options = EngineOptions { device: device.clone(), ..EngineOptions::default() };
        let engine = Engine::new(options).unwrap();
        let model = Model::new(&engine, &config).unwrap();
        let text: Vec<u32> = (0..PROMPT + TOKENS).map(|i| (i * i * 31 % 50_000) as u32).collect();
        let mut logits = vec![0.0; config.vocab_size];
        let whole = |_| time(|| model.next_logits(&text[..PROMPT], &mut logits).unwrap());
        let whole = median((0..3).map(whole).collect());
        let of_block = 12 * config.channels * config.channels;
        let read = config.layers * of_block + config.vocab_size * config.channels;
        let forward = is_gpu.then(|| forward_rate(&model));
        for weights in DecoderWeights::ALL {
            let mut decoder = Decoder::new(
                &model,
                DecoderOptions { room: config.context_length, weights, ..Default::default() },
            )
            .unwrap();
            // Weights are packed with the first token.
            decoder.push(0, &text[..1]).unwrap();
            let first = time(|| decoder.logits(0, &mut logits).unwrap());
            decoder.push(0, &text[1..PROMPT]).unwrap();
            let prefill = time(|| decoder.logits(0, &mut logits).unwrap());
            let of_token = |token: &u32| {
                time(|| {
                    decoder.push(0, &[*token]).unwrap();
                    decoder.logits(0, &mut logits).unwrap();
                })
            };
            let token = median(text[PROMPT..].iter().map(of_token).collect());
            let bytes = match weights {
                DecoderWeights::F32 => 4.0,
                DecoderWeights::Bf16 => 2.0,
                DecoderWeights::Mxfp4 => 4.25 / 8.0,
            };
            let bytes = bytes * read as f64;
            let beside = match forward {
                None => format!("{:.1} ms to read the weights", 1e3 * time_to_read(bytes as usize)),
                Some(forward) => {
                    let long: Vec<u32> = text.iter().copied().cycle().take(999).collect();
                    let whole = |_| {
                        decoder.rewind(0, 0).unwrap();
                        decoder.push(0, &long).unwrap();
                        time(|| decoder.logits(0, &mut logits).unwrap())
                    };
                    let rate = 999.0 / median((0..5).map(whole).collect());
                    let gigabytes = bytes / token / 1e9;
                    format!(
                        "{gigabytes:.0} GB/s of weights; 999 tokens at once {rate:.0} tokens/s, \
                         {:.2} of training's forward pass, {forward:.0}",
                        rate / forward
                    )
                }
            };
            println!(
                "{name}, {weights}: packing {first:.2} s, prefill {:.0} tokens/s; a token {:.2} ms, \
                 {:.1} tokens/s, {beside}; {:.1} times as fast as the whole computation in f32, \
                 {:.0} ms",
                (PROMPT - 1) as f64 / prefill,
                1e3 * token,
                1.0 / token,
                whole / token,
                1e3 * whole,
            );
            if weights != DecoderWeights::Mxfp4 {
                drop(decoder);
                drafts(&model, weights, &text[..64]);
            }
        }
    }
}

/// What drafts gain, in turn with none.
fn drafts(model: &Model, weights: DecoderWeights, prompt: &[u32]) {
    let options = DecoderOptions { weights, drafts: true, ..Default::default() };
    // A GPU has none beside weights in f32.
    let Ok(mut decoder) = Decoder::new(model, options) else { return };
    decoder.push(0, prompt).unwrap();
    let mut run = |draft, draft_tokens, seed| {
        decoder.rewind(0, prompt.len()).unwrap();
        let options =
            GenerateOptions { max_tokens: TEXT, draft, draft_tokens, seed, ..Default::default() };
        let (mut begun, mut count) = (Instant::now(), 0);
        let text = decoder.generate(0, &options, &mut |_| {
            // The first token comes with the prompt.
            if count == 0 {
                begun = Instant::now();
            }
            count += 1;
            true
        });
        let text = text.unwrap();
        ((TEXT - 1) as f64 / begun.elapsed().as_secs_f64(), text)
    };
    run(Draft::Mxfp4, 0, 0);
    let ways = [(Draft::None, 0), (Draft::Mxfp4, 0), (Draft::Mxfp4, 4), (Draft::Mxfp4Ngram, 0)];
    let mut rates = [const { Vec::new() }; 4];
    let mut guesses = [[0; 2]; 4];
    for seed in 0..5 {
        let mut plain = Vec::new();
        for (n, (draft, length)) in ways.into_iter().enumerate() {
            let (rate, text) = run(draft, length, seed);
            rates[n].push(1.0 / rate);
            guesses[n] = [guesses[n][0] + text.accepted, guesses[n][1] + text.drafted];
            match draft {
                Draft::None => plain = text.tokens,
                _ => assert!(text.tokens == plain, "whoever guesses, the text is the same"),
            }
        }
    }
    let rates = rates.map(|seconds| 1.0 / median(seconds));
    for (n, (draft, length)) in ways.into_iter().enumerate() {
        println!(
            "  draft {draft}, {length} tokens: {:.1} tokens/s, {:.2} of plain; {} of {} guesses right",
            rates[n],
            rates[n] / rates[0],
            guesses[n][0],
            guesses[n][1],
        );
    }
}
