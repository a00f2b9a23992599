//! A step in parts: batches of the host's own with masks, weights and losses, what PyTorch and
//! transformers make of them (see tests/oracle/README.md; `MXT_LOSS_ORACLE` names another folder), and
//! the bits of whole steps.

#[path = "common/engines.rs"]
mod engines;
#[path = "common/expected.rs"]
mod expected;
#[path = "common/ranks.rs"]
mod ranks;

use std::path::PathBuf;

use engines::{engines, is_gpu};
use expected::{read, relative_error};
use mxfp4train::{
    Batch, Dataset, Engine, Error, HostLoss, IGNORED, LogitRows, Model, ModelConfig, Result,
    Schedule, StepStats, Trainer, TrainerOptions,
};
use ranks::on_engines;

const VOCAB: usize = 61;
/// Of the models below.
const T: usize = 16;

fn trainer(engine: &Engine, options: TrainerOptions) -> Trainer {
    let config = ModelConfig {
        vocab_size: VOCAB,
        context_length: T,
        layers: 3,
        heads: 2,
        channels: 64,
        ..ModelConfig::default()
    };
    Trainer::new(&Model::new(engine, &config).unwrap(), options).unwrap()
}

fn options(recipe: &str, accumulation: usize, lanes: usize) -> TrainerOptions {
    TrainerOptions {
        batch_size: 3,
        accumulation,
        lanes,
        recipe: recipe.parse().unwrap(),
        ..TrainerOptions::default()
    }
}

/// Rows of windows of a batch: inputs and targets.
fn windows(seed: u32, rows: usize) -> Vec<u32> {
    (0..(rows * (T + 1)) as u32).map(|i| (i * i + seed * (i + 7)) % 59).collect()
}

fn inputs(windows: &[u32]) -> Vec<u32> {
    windows.chunks(T + 1).flat_map(|window| window[..T].to_vec()).collect()
}

fn targets(windows: &[u32]) -> Vec<u32> {
    windows.chunks(T + 1).flat_map(|window| window[1..].to_vec()).collect()
}

fn weights(trainer: &Trainer) -> Vec<Vec<f32>> {
    let model = trainer.model();
    let names = model.tensors().iter();
    let read = names.map(|info| {
        let mut values = vec![0.0; info.len()];
        model.read_tensor(&info.name, &mut values).unwrap();
        values
    });
    read.collect()
}

fn bits(stats: &StepStats) -> (u64, u32, u32, u64, u64) {
    let StepStats { step, loss, grad_norm, tokens, raised_blocks, .. } = *stats;
    (step, loss.to_bits(), grad_norm.to_bits(), tokens, raised_blocks)
}

/// Adds a batch of windows, all weights 1 where there are any.
fn add(trainer: &mut Trainer, windows: &[u32], weighted: bool) -> Result<()> {
    let (tokens, targets) = (inputs(windows), targets(windows));
    let ones = vec![1.0; tokens.len()];
    let weights = weighted.then_some(&ones[..]);
    let batch = Batch { tokens: &tokens, targets: &targets, weights, ..Batch::default() };
    trainer.forward_backward(batch, None)
}

/// Mean cross-entropy with label smoothing, as a host writes it.
fn smoothed(of: LogitRows<'_>, targets: &[u32], vocab: usize, smoothing: f64) {
    let LogitRows { first, logits, losses } = of;
    for (row, (logits, loss)) in logits.chunks_mut(vocab).zip(losses).enumerate() {
        let max = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
        let sum: f64 = logits.iter().map(|l| (f64::from(*l) - max).exp()).sum();
        *loss = 0.0;
        for (token, logit) in logits.iter_mut().enumerate() {
            let is_target = token == targets[first + row] as usize;
            let wanted = smoothing / vocab as f64 + if is_target { 1.0 - smoothing } else { 0.0 };
            let log_p = f64::from(*logit) - max - sum.ln();
            *loss -= (wanted * log_p) as f32;
            *logit = (log_p.exp() - wanted) as f32;
        }
    }
}

#[test]
fn oracle_of_masks_weights_and_a_loss_of_the_host() {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/gpt2-variant");
    let folder = std::env::var_os("MXT_LOSS_ORACLE").map_or(default, PathBuf::from);
    let expected = read(folder.join("losses.safetensors"));
    let of_name = |name: &str| -> Vec<u32> {
        let values = expected[name].iter();
        values.map(|v| if *v < 0.0 { IGNORED } else { *v as u32 }).collect()
    };
    let (tokens, labels, targets) = (of_name("tokens"), of_name("labels"), of_name("targets"));
    let weights: Vec<f32> = expected["weights"].iter().map(|w| *w as f32).collect();
    for engine in engines() {
        let (of_loss, of_gradient) = if is_gpu(&engine) { (1e-4, 1e-3) } else { (1e-5, 2e-5) };
        let model = Model::load(&engine, &folder).unwrap();
        let vocab = model.config().vocab_size;
        // Position t predicts label t + 1, as transformers has it: rows are known by the first, of
        // which all labels are masked.
        let masked = labels.iter().take_while(|label| **label == IGNORED).count();
        let length = (1..=masked).rev().find(|t| tokens.len().is_multiple_of(*t)).unwrap();
        let shifted: Vec<u32> = labels
            .chunks(length)
            .flat_map(|row| row[1..].iter().copied().chain([IGNORED]))
            .collect();
        let rows = tokens.len() / length;
        let trainer = |batch_size: usize| {
            let options = TrainerOptions {
                batch_size,
                sequence_length: length,
                recipe: "fp32".parse().unwrap(),
                ..TrainerOptions::default()
            };
            Trainer::new(&model, options).unwrap()
        };
        let check = |name: &str, trainer: &mut Trainer| {
            for (when, updates) in [("pending", false), ("updated", true)] {
                if updates {
                    // No weight is to move, since others are tried behind this.
                    trainer.set_lr(Some(0.0)).unwrap();
                    let loss = trainer.update().unwrap().loss;
                    let exact = expected[&format!("{name}.loss")][0];
                    let off = (f64::from(loss) - exact).abs();
                    assert!(off <= of_loss, "{name}: loss {loss}, expected {exact}");
                }
                for info in model.tensors() {
                    let mut gradient = vec![0.0; info.len()];
                    trainer.read_gradient(&info.name, &mut gradient).unwrap();
                    let exact = &expected[&format!("{name}.grad.{}", info.name)];
                    let error = relative_error(&gradient, exact);
                    println!("{name}, {when}: {} {error:.1e}", info.name);
                    assert!(error <= of_gradient, "{name}, {when}: {} {error:e}", info.name);
                }
            }
        };

        let mut all = trainer(rows);
        let batch = |targets| Batch { tokens: &tokens, targets, ..Batch::default() };
        all.forward_backward(batch(&shifted), None).unwrap();
        check("masked", &mut all);

        let mut losses = vec![f32::NAN; tokens.len()];
        let weighted = Batch { weights: Some(&weights), ..batch(&targets) };
        all.forward_backward(weighted, Some(&mut losses)).unwrap();
        for (ours, exact) in losses.iter().zip(&expected["losses"]) {
            assert!((f64::from(*ours) - exact).abs() <= of_loss, "{ours} {exact}");
        }
        check("weighted", &mut all);

        let mut loss = |of: LogitRows<'_>| {
            smoothed(of, &targets, vocab, 0.1);
            Ok(())
        };
        let own = Batch { loss: Some(&mut loss), ..batch(&[]) };
        all.forward_backward(own, None).unwrap();
        check("smoothed", &mut all);

        let mut halves = trainer(rows / 2);
        for (tokens, targets) in
            tokens.chunks(tokens.len() / 2).zip(shifted.chunks(tokens.len() / 2))
        {
            let batch = Batch { tokens, targets, ..Batch::default() };
            halves.forward_backward(batch, None).unwrap();
        }
        check("accumulated", &mut halves);
    }
}

/// With weights and without, and whatever the host does between the parts.
#[test]
fn parts_have_the_bits_of_whole_steps() {
    for engine in engines() {
        for (recipe, accumulation, lanes) in [
            ("fp32", 1, 1),
            ("bf16", 3, 1),
            ("mxfp4-rht-sr", 2, 1),
            ("fp8-mxfp4-rht-sr", 4, 2),
            ("tetrajet,ema=0.99", 4, 4),
            ("tetrajet,reset=4:2:1@0.0,bf16-last-steps=0.5", 2, 1),
        ] {
            let data = Dataset::from_tokens((0..400).map(|i| i * i % 59).collect()).unwrap();
            // Some recipes end in other formats.
            let schedule = Schedule { total_steps: 8, ..Schedule::default() };
            let options = TrainerOptions { schedule, ..options(recipe, accumulation, lanes) };
            let mut whole = trainer(&engine, options.clone());
            let mut parts = trainer(&engine, options);
            for step in 0..8 {
                let rows = windows(step, 3 * accumulation);
                let expected = whole.step_tokens(&rows).unwrap();
                for (number, batch) in rows.chunks(3 * (T + 1)).enumerate() {
                    add(&mut parts, batch, step % 2 == 1).unwrap();
                    if number == 0 || number + 1 == accumulation {
                        parts.eval(&data, 2).unwrap();
                        // What is refused changes nothing.
                        let refused = parts.step(&data).unwrap_err().to_string();
                        assert!(refused.contains("wait for an update"), "{refused}");
                        add(&mut parts, &batch[1..], false).unwrap_err();
                    }
                }
                let stats = parts.update().unwrap();
                let what = format!("{recipe}, {lanes} lanes, step {step}");
                let (mut ours, mut theirs) = (bits(&stats), bits(&expected));
                // An evaluation counts scales, too.
                (ours.4, theirs.4) = (0, 0);
                assert_eq!(ours, theirs, "{what}");
            }
            assert!(weights(&parts) == weights(&whole), "{recipe}");
        }
    }
}

/// Ranks give batches of their own weights; the sum is that of one that gives all of them.
#[test]
fn ranks_add_up_weighted_batches() {
    let train = |engine: &Engine| {
        let mut trainer = trainer(engine, options("mxfp4-rht-sr", 4, 4));
        let (rank, size) = (engine.rank(), engine.size());
        let mine = rank * 4 / size..(rank + 1) * 4 / size;
        let steps = (0..3).map(|step| {
            for batch in mine.clone() {
                let rows = windows(5 * step + batch as u32, 3);
                let (tokens, targets) = (inputs(&rows), targets(&rows));
                let weights: Vec<f32> = (0..3 * T).map(|i| ((i + batch) % 3) as f32).collect();
                let weights = Some(&weights[..]);
                let batch =
                    Batch { tokens: &tokens, targets: &targets, weights, ..Batch::default() };
                trainer.forward_backward(batch, None).unwrap();
            }
            bits(&trainer.update().unwrap())
        });
        (steps.collect::<Vec<_>>(), weights(&trainer))
    };
    let mut alone = on_engines(1, train);
    let alone = alone.remove(0);
    for size in [2, 4] {
        for of_rank in on_engines(size, train) {
            assert_eq!(of_rank.0, alone.0, "{size} ranks");
            assert!(of_rank.1 == alone.1, "weights of {size} ranks");
        }
    }
}

/// A rank whose batches are too few says so to the others, who wait no longer; all can go on.
#[test]
fn a_rank_with_too_few_batches_is_heard() {
    let results = on_engines(2, |engine| {
        let mut trainer = trainer(engine, options("fp32", 2, 2));
        let give = |trainer: &mut Trainer| add(trainer, &windows(3, 3), false).unwrap();
        let refused = if engine.rank() == 0 {
            give(&mut trainer);
            trainer.update()
        } else {
            trainer.update()
        };
        let refused = refused.unwrap_err().to_string();
        if engine.rank() == 1 {
            give(&mut trainer);
        } else {
            // One more than there may be: that of before still waits.
            add(&mut trainer, &windows(3, 3), false).unwrap_err();
        }
        (refused, bits(&trainer.update().unwrap()))
    });
    // Nothing was done, so each has what it gave.
    assert!(results[0].0.contains("rank 1"), "{}", results[0].0);
    assert!(results[1].0.contains("expected gradients"), "{}", results[1].0);
    assert_eq!(results[0].1, results[1].1);
}

/// Cross-entropy that the host makes is the library's own, up to rounding.
#[test]
fn a_loss_of_the_host_trains() {
    for engine in engines() {
        for recipe in ["fp32", "mxfp4-rht-sr"] {
            let [mut own, mut hosts] = [(); 2].map(|()| trainer(&engine, options(recipe, 2, 1)));
            for step in 0..5 {
                for number in 0..2 {
                    let rows = windows(2 * step + number, 3);
                    let (tokens, targets) = (inputs(&rows), targets(&rows));
                    let weights: Vec<f32> = (0..3 * T).map(|i| [0.5, 1.0][i % 2]).collect();
                    let weights = Some(&weights[..]);
                    let batch =
                        Batch { tokens: &tokens, targets: &targets, weights, ..Batch::default() };
                    own.forward_backward(batch, None).unwrap();
                    let mut loss = |of: LogitRows<'_>| {
                        smoothed(of, &targets, VOCAB, 0.0);
                        Ok(())
                    };
                    let loss: Option<&mut HostLoss<'_>> = Some(&mut loss);
                    let batch = Batch { tokens: &tokens, weights, loss, ..Batch::default() };
                    let mut losses = vec![f32::NAN; 3 * T];
                    hosts.forward_backward(batch, Some(&mut losses)).unwrap();
                    assert!(losses.iter().all(|loss| *loss > 0.0));
                }
                let [own, hosts] = [&mut own, &mut hosts].map(|t| t.update().unwrap());
                let off = (own.loss - hosts.loss).abs();
                let bound = if recipe == "fp32" { 1e-5 } else { 2e-2 };
                assert!(off < bound, "{recipe}, step {step}: {} {}", own.loss, hosts.loss);
            }
        }
    }
}

/// Neither a loss that fails nor one that panics leaves half a step behind.
#[test]
fn a_loss_that_fails_drops_the_batches() {
    for engine in engines() {
        let [mut plain, mut failing] = [(); 2].map(|()| trainer(&engine, options("fp32", 2, 1)));
        let (first, second) = (windows(1, 3), windows(2, 3));
        let expected = plain.step_tokens(&[first.clone(), second.clone()].concat()).unwrap();
        add(&mut failing, &windows(9, 3), false).unwrap();
        let (before, tokens) = (weights(&failing), inputs(&first));
        let mut fails = |_: LogitRows<'_>| Err(Error::Stopped);
        let batch = Batch { tokens: &tokens, loss: Some(&mut fails), ..Batch::default() };
        let failed = failing.forward_backward(batch, None).unwrap_err();
        assert!(matches!(failed, Error::Stopped), "{failed}");
        let mut panics = |_: LogitRows<'_>| panic!("in a loss");
        let batch = Batch { tokens: &tokens, loss: Some(&mut panics), ..Batch::default() };
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            failing.forward_backward(batch, None)
        }));
        assert!(panicked.is_err());
        let nothing = failing.update().unwrap_err().to_string();
        assert!(nothing.contains("call forward_backward first"), "{nothing}");
        assert!(weights(&failing) == before && failing.steps_done() == 0);
        add(&mut failing, &first, false).unwrap();
        add(&mut failing, &second, false).unwrap();
        assert_eq!(bits(&failing.update().unwrap()), bits(&expected));
    }
}

/// What gradients are read, scaled and written as, and an update of gradients from elsewhere.
#[test]
fn gradients_are_the_hosts_to_change() {
    for engine in engines() {
        let [mut source, mut scaled, mut written] =
            [(); 3].map(|()| trainer(&engine, options("fp32", 2, 1)));
        let names: Vec<_> =
            source.model().tensors().iter().map(|info| (info.name.clone(), info.len())).collect();
        let gradients = |trainer: &Trainer| -> Vec<Vec<f32>> {
            let of = |(name, len): &(String, usize)| {
                let mut values = vec![f32::NAN; *len];
                trainer.read_gradient(name, &mut values).unwrap();
                values
            };
            names.iter().map(of).collect()
        };
        // One batch, where a step has two of them: its mean is over its own positions.
        add(&mut source, &windows(4, 3), false).unwrap();
        let of_source = gradients(&source);
        let mut single = trainer(&engine, options("fp32", 1, 1));
        let of_single = single.step_tokens(&windows(4, 3)).unwrap();
        for (ours, exact) in of_source.iter().zip(gradients(&single)) {
            let exact: Vec<f64> = exact.iter().map(|g| f64::from(*g)).collect();
            assert!(relative_error(ours, &exact) < 1e-6);
        }
        let stats = source.update().unwrap();
        assert_eq!(stats.tokens, 3 * T as u64);
        assert!((stats.loss - of_single.loss).abs() < 1e-6, "{} {}", stats.loss, of_single.loss);
        let of_source = gradients(&source);

        // All gradients from elsewhere: the same step.
        for ((name, _), gradient) in names.iter().zip(&of_source) {
            written.write_gradient(name, gradient).unwrap();
        }
        assert_eq!(gradients(&written), of_source);
        let by_written = written.update().unwrap();
        assert_eq!(by_written.grad_norm.to_bits(), stats.grad_norm.to_bits());
        assert_eq!((by_written.loss, by_written.tokens), (0.0, 0));
        assert!(weights(&written) == weights(&source));

        // Twice, and then half of it; one tensor's by itself.
        add(&mut scaled, &windows(4, 3), false).unwrap();
        scaled.scale_gradients(None, 2.0).unwrap();
        scaled.scale_gradients(None, 0.5).unwrap();
        let (frozen, _) = &names[3];
        scaled.scale_gradients(Some(frozen), 0.0).unwrap();
        let by_scaled = scaled.update().unwrap();
        assert_eq!(by_scaled.loss.to_bits(), stats.loss.to_bits());
        for (i, (ours, theirs)) in gradients(&scaled).iter().zip(&of_source).enumerate() {
            let is_expected = if i == 3 { ours.iter().all(|g| *g == 0.0) } else { ours == theirs };
            assert!(is_expected, "{}", names[i].0);
        }

        // Written among others, it is read as it was written; no batch is added to it.
        add(&mut scaled, &windows(5, 3), false).unwrap();
        let values: Vec<f32> = (0..names[2].1).map(|i| i as f32 * 1e-3).collect();
        scaled.write_gradient(&names[2].0, &values).unwrap();
        let exact: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
        assert!(relative_error(&gradients(&scaled)[2], &exact) < 1e-7);
        let refused = add(&mut scaled, &windows(5, 3), false).unwrap_err().to_string();
        assert!(refused.contains("written or scaled"), "{refused}");
        assert!(relative_error(&gradients(&scaled)[2], &exact) < 1e-7);
        scaled.zero_gradients();
        assert!(scaled.read_gradient(&names[2].0, &mut vec![0.0; names[2].1]).is_err());
        let nothing = scaled.update().unwrap_err().to_string();
        assert!(nothing.contains("call forward_backward first"), "{nothing}");
    }
}

/// Each refusal says what was expected, and what waits still does.
#[test]
fn refusals_leave_what_waits() {
    for engine in engines() {
        let [mut plain, mut refusing] = [(); 2].map(|()| trainer(&engine, options("bf16", 2, 1)));
        let (first, second) = (windows(1, 3), windows(2, 3));
        for windows in [&first, &second] {
            add(&mut plain, windows, false).unwrap();
        }
        let expected = plain.update().unwrap();
        add(&mut refusing, &first, false).unwrap();
        let (tokens, mut bad) = (inputs(&second), targets(&second));
        let good = bad.clone();
        bad[17] = VOCAB as u32;
        let mut unfit = vec![1.0; tokens.len()];
        unfit[5] = f32::NAN;
        let batch = || Batch { tokens: &tokens, targets: &good, ..Batch::default() };
        let mut short = [0.0; 5];
        for (batch, losses, words) in [
            (Batch { tokens: &bad, ..batch() }, None, "the tokens of this batch"),
            (Batch { targets: &bad, ..batch() }, None, "the targets of this batch"),
            (Batch { targets: &bad[1..], ..batch() }, None, "expected 3 sequences of 16"),
            (Batch { targets: &[], ..batch() }, None, "expected 3 sequences of 16"),
            (Batch { weights: Some(&[]), ..batch() }, None, "weights"),
            (Batch { weights: Some(&unfit), ..batch() }, None, "weight 5 of this batch"),
            (Batch { divisor: Some(f64::NAN), ..batch() }, None, "expected a finite number"),
            (batch(), Some(&mut short[..]), "losses"),
        ] {
            let refused = refusing.forward_backward(batch, losses).unwrap_err().to_string();
            assert!(refused.contains(words), "{refused}");
        }
        refusing.scale_gradients(None, f32::INFINITY).unwrap_err();
        refusing.scale_gradients(Some("no such"), 1.0).unwrap_err();
        refusing.write_gradient("no such", &[]).unwrap_err();
        refusing.write_gradient("transformer.ln_f.bias", &[f32::NAN; 64]).unwrap_err();
        add(&mut refusing, &second, false).unwrap();
        assert_eq!(bits(&refusing.update().unwrap()), bits(&expected));
        refusing.scale_gradients(None, 1.0).unwrap_err();

        // With lanes there are parts of a sum.
        let mut lanes = trainer(&engine, options("fp32", 2, 2));
        add(&mut lanes, &first, false).unwrap();
        for refused in [
            lanes.scale_gradients(None, 1.0),
            lanes.write_gradient("transformer.ln_f.bias", &[0.0; 64]),
        ] {
            assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
        }
        let few = lanes.update().unwrap_err().to_string();
        assert!(few.contains("expected 2 batches before an update"), "{few}");
        add(&mut lanes, &second, false).unwrap();
        let more = add(&mut lanes, &first, false).unwrap_err().to_string();
        assert!(more.contains("expected at most 2 batches"), "{more}");
        lanes.update().unwrap();

        let mut ramping = trainer(
            &engine,
            TrainerOptions {
                optimizer: "adamw,ramping=9"
                    .parse()
                    .map(|mut o: mxfp4train::Optimizer| {
                        o.clip = 0.0;
                        o
                    })
                    .unwrap(),
                ..options("tetrajet", 1, 1)
            },
        );
        let refused = add(&mut ramping, &first, false).unwrap_err().to_string();
        assert!(refused.contains("draws windows of its own"), "{refused}");
    }
}

/// Nothing that stands where a target is ignored counts: neither its weight nor what the host's loss
/// writes there; and a loss that is not written is no number.
#[test]
fn what_is_ignored_may_be_anything() {
    for engine in engines() {
        let [mut plain, mut wild] = [(); 2].map(|()| trainer(&engine, options("fp32", 1, 1)));
        let (tokens, mut targets) = (inputs(&windows(1, 3)), targets(&windows(1, 3)));
        targets[5] = IGNORED;
        targets[40] = IGNORED;
        let mut weights = vec![0.5; 3 * T];
        let give = |trainer: &mut Trainer, weights: &[f32], ignored: f32| {
            let of_rows = targets.clone();
            let mut loss = |of: LogitRows<'_>| {
                let LogitRows { first, logits, losses } = of;
                assert!(losses.iter().all(|loss| loss.is_nan()));
                let rows = logits.chunks_mut(VOCAB).zip(losses).enumerate();
                for (row, (logits, loss)) in rows {
                    let is_ignored = of_rows[first + row] == IGNORED;
                    *loss = if is_ignored { ignored } else { logits.iter().map(|y| y * y).sum() };
                    logits
                        .iter_mut()
                        .for_each(|y| *y = if is_ignored { ignored } else { 2.0 * *y });
                }
                Ok(())
            };
            let weights = Some(weights);
            let loss: Option<&mut HostLoss<'_>> = Some(&mut loss);
            let batch =
                Batch { tokens: &tokens, targets: &targets, weights, loss, ..Batch::default() };
            trainer.forward_backward(batch, None).unwrap();
            trainer.update().unwrap()
        };
        let expected = give(&mut plain, &weights, 0.0);
        weights[5] = f32::NAN;
        let found = give(&mut wild, &weights, f32::NAN);
        assert_eq!(bits(&found), bits(&expected));
        let mut nothing = |_: LogitRows<'_>| Ok(());
        let batch = Batch { tokens: &tokens, loss: Some(&mut nothing), ..Batch::default() };
        wild.forward_backward(batch, None).unwrap();
        let error = wild.update().unwrap_err().to_string();
        assert!(error.contains("the loss of step 2"), "{error}");
    }
}

/// The loss alone, with weights and of the host, is that of a step; it leaves batches that wait alone,
/// and is to be had where nothing can be trained.
#[test]
fn forward_is_the_loss_of_a_step() {
    for engine in engines() {
        let [mut plain, mut asked] = [(); 2].map(|()| trainer(&engine, options("bf16", 1, 1)));
        let (tokens, targets) = (inputs(&windows(1, 3)), targets(&windows(1, 3)));
        let weights: Vec<f32> = (0..3 * T).map(|i| [0.0, 1.0, 2.5][i % 3]).collect();
        let batch = || Batch {
            tokens: &tokens,
            targets: &targets,
            weights: Some(&weights),
            ..Batch::default()
        };
        for _ in 0..3 {
            for trainer in [&mut plain, &mut asked] {
                trainer.forward_backward(batch(), None).unwrap();
            }
            let mut losses = vec![f32::NAN; 3 * T];
            let found = asked.forward(batch(), Some(&mut losses)).unwrap();
            let mut loss = |of: LogitRows<'_>| {
                smoothed(of, &targets, VOCAB, 0.0);
                Ok(())
            };
            let own = Batch { loss: Some(&mut loss), ..batch() };
            let by_host = asked.forward(own, None).unwrap();
            let [expected, stats] = [&mut plain, &mut asked].map(|t| t.update().unwrap());
            assert_eq!(bits(&stats), bits(&expected));
            assert!((found.loss - stats.loss).abs() < 2e-3, "{} {}", found.loss, stats.loss);
            assert!((by_host.loss - found.loss).abs() < 1e-4, "{} {}", by_host.loss, found.loss);
            assert_eq!((found.tokens, by_host.tokens), (2 * T as u64, 2 * T as u64));
            assert!(losses.iter().all(|loss| *loss > 0.0));
        }
        let nothing = vec![IGNORED; 3 * T];
        assert!(asked.forward(Batch { targets: &nothing, ..batch() }, None).is_err());
    }
}

/// Weights so small or so large that gradients would be lost before they are divided are refused.
#[test]
fn the_mean_weight_is_within_reason() {
    for engine in engines() {
        let mut plain = trainer(&engine, options("fp32", 1, 1));
        let (tokens, targets) = (inputs(&windows(1, 3)), targets(&windows(1, 3)));
        let norm = |trainer: &mut Trainer, weight: f32| {
            let weights = [weight; 3 * T];
            let weights = Some(&weights[..]);
            let batch = Batch { tokens: &tokens, targets: &targets, weights, ..Batch::default() };
            trainer.forward_backward(batch, None)?;
            trainer.update().map(|stats| stats.grad_norm)
        };
        plain.set_lr(Some(0.0)).unwrap();
        let expected = norm(&mut plain, 1.0).unwrap();
        for weight in [1e-19, 1e19] {
            let found = norm(&mut plain, weight).unwrap();
            assert!((found - expected).abs() < 1e-4 * expected, "{weight}: {found} {expected}");
        }
        for weight in [1e-21, 1e21, 1e-40, f32::MIN_POSITIVE] {
            let error = norm(&mut plain, weight).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { what: "divisor", .. }), "{error}");
        }
    }
}

/// A sum that is rounded after each batch would be another one.
#[test]
fn gradients_in_bf16_are_of_one_batch() {
    for engine in engines() {
        let optimizer = "adamw,gradients=bf16".parse().unwrap();
        let options = TrainerOptions { optimizer, ..options("bf16", 1, 1) };
        let mut trainer = trainer(&engine, options);
        add(&mut trainer, &windows(1, 3), false).unwrap();
        let refused = add(&mut trainer, &windows(1, 3), false).unwrap_err().to_string();
        assert!(refused.contains("gradients=bf16"), "{refused}");
        trainer.update().unwrap();
    }
}

/// A mean over nothing is none; a divisor says what it is.
#[test]
fn all_targets_may_be_ignored() {
    for engine in engines() {
        let mut trainer = trainer(&engine, options("fp32", 2, 1));
        let before = weights(&trainer);
        let (tokens, nothing) = (inputs(&windows(1, 3)), vec![IGNORED; 3 * T]);
        let batch = || Batch { tokens: &tokens, targets: &nothing, ..Batch::default() };
        let mut losses = vec![f32::NAN; 3 * T];
        trainer.forward_backward(batch(), Some(&mut losses)).unwrap();
        assert!(losses.iter().all(|loss| *loss == 0.0), "{losses:?}");
        let mut gradient = vec![0.0; 64];
        assert!(trainer.read_gradient("transformer.ln_f.bias", &mut gradient).is_err());
        let error = trainer.update().unwrap_err().to_string();
        assert!(error.contains("every target is ignored"), "{error}");
        assert!(weights(&trainer) == before && trainer.steps_done() == 0);

        // Beside another batch it counts for nothing; by a divisor of its own it would.
        let rows = windows(2, 3);
        add(&mut trainer, &rows, false).unwrap();
        trainer.forward_backward(batch(), None).unwrap();
        let stats = trainer.update().unwrap();
        let mut again = Trainer::new(
            &Model::new(&engine, trainer.model().config()).unwrap(),
            options("fp32", 2, 1),
        )
        .unwrap();
        add(&mut again, &rows, false).unwrap();
        let divisor = Some(3.0 * T as f64);
        again.forward_backward(Batch { divisor, ..batch() }, None).unwrap();
        let halved = again.update().unwrap();
        assert!((halved.loss * 2.0 - stats.loss).abs() < 1e-6, "{} {}", halved.loss, stats.loss);
        let off = (halved.grad_norm * 2.0 - stats.grad_norm).abs();
        assert!(off < 1e-5 * stats.grad_norm, "{} {}", halved.grad_norm, stats.grad_norm);

        // Weights below 0, as of advantages, need one.
        let weights = vec![-1.0; 3 * T];
        let targets = targets(&rows);
        let push = |divisor| Batch {
            tokens: &tokens,
            targets: &targets,
            weights: Some(&weights),
            divisor,
            ..Batch::default()
        };
        again.forward_backward(push(None), None).unwrap();
        assert!(again.update().is_err());
        again.forward_backward(push(Some(48.0)), None).unwrap();
        assert!(again.update().unwrap().loss < 0.0);
    }
}
