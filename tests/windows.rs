//! Data that the host fills, window by window, with weights for targets.

#[path = "common/ranks.rs"]
mod ranks;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mxfp4train::{
    Batch, Dataset, Decoder, DecoderOptions, DecoderWeights, Engine, EngineOptions, Error, Model,
    ModelConfig, Result, Trainer, TrainerOptions,
};
use ranks::on_engines;

const T: usize = 16;

fn engines() -> Vec<Engine> {
    let of = |device: &str| EngineOptions { device: device.into(), ..EngineOptions::default() };
    let mut engines = vec![Engine::new(of("cpu")).unwrap()];
    match Engine::new(of("cuda")) {
        Ok(engine) => engines.push(engine),
        Err(error) => println!("skipped: no GPU: {error}"),
    }
    engines
}

fn trainer(engine: &Engine, accumulation: usize, lanes: usize) -> Trainer {
    let config = ModelConfig {
        vocab_size: 61,
        context_length: T + 1,
        layers: 2,
        heads: 2,
        channels: 64,
        ..ModelConfig::default()
    };
    let options = TrainerOptions {
        batch_size: 3,
        sequence_length: T,
        accumulation,
        lanes,
        ..TrainerOptions::default()
    };
    Trainer::new(&Model::new(engine, &config).unwrap(), options).unwrap()
}

/// Window `number`: its tokens, of which the first says which it is, and weights.
fn window(number: u64) -> (Vec<u32>, Vec<f32>) {
    let token = |i: u64| ((i * i + 3 * number * i + number) % 59) as u32;
    let tokens = std::iter::once(number as u32).chain((1..=T as u64).map(token)).collect();
    let weights = (0..T as u64).map(|i| [0.0, 1.0, 0.5][((i + number) % 3) as usize]).collect();
    (tokens, weights)
}

/// `count` of them, with their weights or all 1.
fn data(count: u64, weighted: bool) -> Dataset {
    Dataset::from_windows(count, move |number, tokens, weights| {
        assert!(weights.iter().all(|weight| *weight == 1.0) && number < count);
        let (from, of) = window(number);
        tokens.copy_from_slice(&from);
        if weighted {
            weights.copy_from_slice(&of);
        }
        Ok(())
    })
    .unwrap()
}

fn weights(trainer: &Trainer) -> Vec<Vec<f32>> {
    let model = trainer.model();
    let read = model.tensors().iter().map(|info| {
        let mut values = vec![0.0; info.len()];
        model.read_tensor(&info.name, &mut values).unwrap();
        values
    });
    read.collect()
}

/// Which windows a step asks for, and that it is the step of batches with the same weights. Every epoch
/// has all of them once.
#[test]
fn steps_are_those_of_batches() {
    for engine in engines() {
        for weighted in [false, true] {
            let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
            let (sees, count) = (seen.clone(), 9);
            let data = Dataset::from_windows(count, move |number, tokens, weights| {
                sees.lock().unwrap().push(number);
                let (from, of) = window(number);
                tokens.copy_from_slice(&from);
                if weighted {
                    weights.copy_from_slice(&of);
                }
                Ok(())
            })
            .unwrap();
            let [mut by_data, mut by_batches] = [(); 2].map(|()| trainer(&engine, 2, 1));
            let mut all = Vec::new();
            for _ in 0..3 {
                let stats = by_data.step(&data).unwrap();
                let numbers: Vec<u64> = seen.lock().unwrap().drain(..).collect();
                assert_eq!(numbers.len(), 6);
                for of_batch in numbers.chunks(3) {
                    let (mut tokens, mut targets, mut of) = (vec![], vec![], vec![]);
                    for number in of_batch {
                        let (window, weights) = window(*number);
                        tokens.extend(&window[..T]);
                        targets.extend(&window[1..]);
                        of.extend(weights);
                    }
                    let weights = weighted.then_some(&of[..]);
                    let (tokens, targets) = (&tokens[..], &targets[..]);
                    let batch = Batch { tokens, targets, weights, ..Batch::default() };
                    by_batches.forward_backward(batch, None).unwrap();
                }
                let expected = by_batches.update().unwrap();
                assert_eq!(stats.loss.to_bits(), expected.loss.to_bits());
                assert_eq!(stats.grad_norm.to_bits(), expected.grad_norm.to_bits());
                all.extend(numbers);
            }
            assert!(weights(&by_data) == weights(&by_batches));
            for epoch in all.chunks(9) {
                let mut sorted = epoch.to_vec();
                sorted.sort_unstable();
                assert_eq!(sorted, (0..9).collect::<Vec<_>>(), "{all:?}");
            }
            assert_ne!(all[..9], all[9..], "an epoch has an order of its own");
        }
    }
}

/// The mean over what counts, of all windows or of some, by a trainer and by a decoder.
#[test]
fn evaluations_weigh() {
    for engine in engines() {
        let mut trainer = trainer(&engine, 1, 1);
        for _ in 0..5 {
            trainer.step(&data(9, true)).unwrap();
        }
        let (mut sum, mut divisor, mut targets) = (0.0, 0.0, 0);
        for number in 0..7 {
            let (tokens, weights) = window(number);
            let mut found = vec![0.0; T + 1];
            let model = trainer.model();
            model.score(DecoderWeights::F32, &tokens, &[T + 1], &mut found, None).unwrap();
            for (log_p, weight) in found[1..].iter().zip(&weights) {
                sum -= f64::from(*weight) * f64::from(*log_p);
                divisor += f64::from(*weight);
                targets += u64::from(*weight != 0.0);
            }
        }
        let exact = sum / divisor;
        let found = trainer.eval(&data(7, true), 0).unwrap();
        assert!((f64::from(found.loss) - exact).abs() < 2e-2, "{} {exact}", found.loss);
        assert_eq!(found.tokens, targets);
        let plain = trainer.eval(&data(7, false), 0).unwrap();
        assert!(plain.tokens == 7 * T as u64 && (plain.loss - found.loss).abs() > 1e-4);
        assert_eq!(trainer.eval(&data(7, true), 1).unwrap().tokens, {
            // A batch is three windows, spread evenly: 0, 2 and 4.
            let counts = [0, 2, 4].map(|number| {
                window(number).1.iter().filter(|weight| **weight != 0.0).count() as u64
            });
            counts.iter().sum::<u64>()
        });
        let mut decoder = Decoder::new(trainer.model(), DecoderOptions::default()).unwrap();
        let score = decoder.eval(&data(7, true), T, 0).unwrap();
        assert!((f64::from(score.loss) - exact).abs() < 2e-2, "{} {exact}", score.loss);
        assert_eq!(score.tokens, targets);

        // A step of windows of which nothing counts learns nothing, and a run goes on.
        let nothing = Dataset::from_windows(3, |number, tokens, weights| {
            tokens.copy_from_slice(&window(number).0);
            weights.fill(0.0);
            Ok(())
        });
        let nothing = nothing.unwrap();
        let error = trainer.eval(&nothing, 0).unwrap_err().to_string();
        assert!(error.contains("weights of all targets are 0"), "{error}");
        let steps = trainer.steps_done();
        let stats = trainer.step(&nothing).unwrap();
        assert_eq!((stats.step, stats.loss, stats.grad_norm), (steps + 1, 0.0, 0.0));
        trainer.set_sharpness(Some(1e-3)).unwrap();
        let error = trainer.eval(&data(7, true), 0).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
}

/// A run that stops and goes on is the run that does not, and so is one of ranks.
#[test]
fn runs_resume_and_are_shared() {
    let folder = tempfile::tempdir().unwrap();
    for engine in engines() {
        let data = data(10, true);
        let mut straight = trainer(&engine, 2, 1);
        let losses: Vec<_> = (0..6).map(|_| straight.step(&data).unwrap().loss.to_bits()).collect();
        let mut stopped = trainer(&engine, 2, 1);
        for loss in &losses[..3] {
            assert_eq!(stopped.step(&data).unwrap().loss.to_bits(), *loss);
        }
        stopped.save(folder.path()).unwrap();
        let mut resumed = Trainer::load(&engine, folder.path()).unwrap();
        for loss in &losses[3..] {
            assert_eq!(resumed.step(&data).unwrap().loss.to_bits(), *loss);
        }
    }
    let train = |engine: &Engine| {
        let mut trainer = trainer(engine, 4, 4);
        let steps: Vec<_> = (0..3)
            .map(|_| {
                let stats = trainer.step(&data(10, true)).unwrap();
                (stats.loss.to_bits(), stats.grad_norm.to_bits())
            })
            .collect();
        let evals = [0, 1, 3].map(|batches| {
            let found = trainer.eval(&data(10, true), batches).unwrap();
            (found.loss.to_bits(), found.tokens)
        });
        (steps, evals)
    };
    let alone = on_engines(1, train).remove(0);
    for size in [2, 4] {
        assert!(on_engines(size, train).into_iter().all(|of_rank| of_rank == alone), "{size}");
    }
}

/// What the host says is wrong, or does wrong, is the error of the call, and changes nothing.
#[test]
fn errors_of_the_host() {
    let engine = Engine::new(EngineOptions { threads: 1, ..EngineOptions::default() }).unwrap();
    let mut straight = trainer(&engine, 2, 1);
    let mut trainer = trainer(&engine, 2, 1);
    let before = weights(&trainer);
    let calls = Arc::new(AtomicU64::new(0));
    let failing = |what: u32| {
        let calls = calls.clone();
        calls.store(0, Ordering::Relaxed);
        let fill = move |number, tokens: &mut [u32], weights: &mut [f32]| -> Result<()> {
            let (from, of) = window(number);
            tokens.copy_from_slice(&from);
            weights.copy_from_slice(&of);
            if calls.fetch_add(1, Ordering::Relaxed) == 4 {
                match what {
                    0 => return Err(Error::Stopped),
                    1 => tokens[5] = 61,
                    2 => weights[7] = f32::INFINITY,
                    4 => weights[7] = -1.0,
                    _ => {
                        let (path, source) = ("here".into(), io::Error::other("lost"));
                        return Err(Error::Io { action: "reading", path, source });
                    }
                }
            }
            Ok(())
        };
        Dataset::from_windows(10, fill).unwrap()
    };
    for (what, words) in [(0, "stop"), (1, "61"), (2, "weight 7 of window"), (3, "lost")] {
        let error = trainer.step(&failing(what)).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        let error = trainer.eval(&failing(what), 0).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert!(weights(&trainer) == before && trainer.steps_done() == 0);
    }
    let data = data(10, true);
    let [a, b] = [&mut straight, &mut trainer].map(|t| t.step(&data).unwrap().loss);
    assert_eq!(a, b);

    assert!(Dataset::from_windows(0, |_, _, _| Ok(())).is_err());
    assert_eq!((data.token_count(), data.files().len()), (0, 0));
    assert_eq!(data.windows(5).unwrap(), 10);
    assert_eq!(data.coverage(7).windows, 10);
    data.check_tokens(1).unwrap();
    for error in [
        data.max_token().map(drop).unwrap_err(),
        data.max_tokens().map(drop).unwrap_err(),
        data.read(0, &mut [0]).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
}
