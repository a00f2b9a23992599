//! Ranks that train one model: the same bits as one that does it alone, whatever their number, and no
//! rank that waits for one that cannot go on.

#[path = "common/ranks.rs"]
mod ranks;

use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};

use mxfp4train::{
    Dataset, Engine, EngineOptions, Error, EvalStats, FileRead, FileSave, Files, MemoryFiles,
    Model, ModelConfig, Optimizer, Schedule, Trainer, TrainerOptions, Wire,
};
use ranks::{on_engines, on_ranks};

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 61,
        context_length: 16,
        layers: 2,
        heads: 2,
        channels: 36,
        ..ModelConfig::default()
    }
}

fn data() -> Dataset {
    Dataset::from_tokens((0..4000).map(|i| i * i % 59).collect()).unwrap()
}

fn options(recipe: &str, optimizer: &str, accumulation: usize, lanes: usize) -> TrainerOptions {
    let mut optimizer: Optimizer = optimizer.parse().unwrap();
    if optimizer.to_string().contains("ramping") || optimizer.to_string().contains("spam") {
        optimizer.clip = 0.0;
    }
    TrainerOptions {
        batch_size: 2,
        accumulation,
        lanes,
        recipe: recipe.parse().unwrap(),
        optimizer,
        schedule: Schedule { total_steps: 10, ..Schedule::default() },
        ..TrainerOptions::default()
    }
}

fn trainer(engine: &Engine, options: TrainerOptions) -> Result<Trainer, Error> {
    Trainer::new(&Model::new(engine, &config()).unwrap(), options)
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    entries.map(|path| (name(&path), fs::read(&path).unwrap())).collect()
}

/// What is to be the same whatever ranks there are: losses and norms of steps, of evaluations, files.
#[derive(Debug, PartialEq)]
struct Trained {
    steps: Vec<(u64, u32, u32, u64)>,
    evals: Vec<(u32, u64)>,
}

fn train(trainer: &mut Trainer, steps: usize, data: &Dataset) -> Trained {
    let of_steps = (0..steps).map(|_| {
        let stats = trainer.step(data).unwrap();
        (stats.step, stats.loss.to_bits(), stats.grad_norm.to_bits(), stats.tokens)
    });
    let steps = of_steps.collect();
    let of_eval = |EvalStats { loss, tokens, .. }| (loss.to_bits(), tokens);
    let evals = [0, 1, 5].map(|batches| of_eval(trainer.eval(data, batches).unwrap()));
    Trained { steps, evals: evals.to_vec() }
}

/// Every kind of recipe and optimizer, at every number of ranks that lanes allow.
#[test]
fn any_number_of_ranks_has_the_same_bits() {
    for (recipe, optimizer, accumulation, lanes, sizes) in [
        ("mxfp4-rht-sr", "adamw", 4, 4, &[1, 2, 4][..]),
        ("bf16", "adamw,moments=int8", 8, 4, &[1, 2, 4]),
        ("fp32", "stable-adamw,moments=bf16", 6, 6, &[1, 3, 6]),
        ("fp8-mxfp4-rht-sr", "muon", 6, 3, &[1, 3]),
        ("nvfp4-eden", "stable-spam", 4, 2, &[1, 2]),
        ("tetrajet,ema=0.99,reset=4:2:2@0.0", "adamw", 4, 4, &[1, 4]),
        ("tetrajet", "adamw,ramping=3", 2, 2, &[1, 2]),
    ] {
        let data = data();
        let folder = tempfile::tempdir().unwrap();
        let of_size = |size: usize| {
            let dir = folder.path().join(size.to_string());
            let mut all = on_engines(size, |engine| {
                let options = options(recipe, optimizer, accumulation, lanes);
                let mut trainer = trainer(engine, options).unwrap();
                let trained = train(&mut trainer, 5, &data);
                trainer.save(&dir).unwrap();
                trained
            });
            let first = all.remove(0);
            assert!(all.iter().all(|other| *other == first), "{recipe}: ranks of {size} differ");
            (first, files(&dir))
        };
        let alone = of_size(sizes[0]);
        for size in &sizes[1..] {
            let (trained, files) = of_size(*size);
            assert_eq!(trained, alone.0, "{recipe}, {optimizer}: {size} ranks");
            assert!(files == alone.1, "{recipe}, {optimizer}: files of {size} ranks");
        }
    }
}

/// Ranks that keep states of some tensors each are those that keep all: bits, files of a save and of a
/// snapshot, and runs that go on from them in either way.
#[test]
fn sharded_states_change_no_bit() {
    let (data, folder) = (data(), tempfile::tempdir().unwrap());
    for (recipe, optimizer) in [
        ("mxfp4-rht-sr", "adamw"),
        ("bf16", "adamw,moments=int8"),
        ("fp32", "adamw,moments=bf16"),
        ("bf16", "adamw,moments=fp8"),
        ("fp8-mxfp4-rht-sr", "muon"),
        ("mxfp4-rht-sr", "muon,moments=fp8"),
        ("tetrajet,ema=0.99,reset=4:2:2@0.0", "adamw"),
    ] {
        let dir = |name: &str| folder.path().join(name);
        let run = |engine: &Engine, name: &str| {
            let mut trainer = trainer(engine, options(recipe, optimizer, 4, 4)).unwrap();
            let trained = train(&mut trainer, 3, &data);
            trainer.save(&dir(name)).unwrap();
            let copied = trainer.snapshot(None).unwrap().save(&dir(&format!("{name}-copied")));
            let after = trainer.step(&data).unwrap().loss.to_bits();
            (trained, after, copied.is_ok(), trainer.plan())
        };
        let (trained, after, _, plan) = on_engines(1, |engine| run(engine, "alone")).remove(0);
        for size in [2, 4] {
            let name = format!("of {size}");
            let all = ranks::on_sharded_engines(size, |engine| run(engine, &name));
            for (rank, (of_rank, step, is_copied, _)) in all.iter().enumerate() {
                let what = format!("{recipe}, {optimizer}: rank {rank} of {size}");
                assert_eq!((of_rank, *step), (&trained, after), "{what}");
                assert_eq!(*is_copied, rank == 0, "{what}");
            }
            // What Muon computes in, and what a recipe keeps of weights, is there on every rank.
            if !optimizer.starts_with("muon") && !recipe.contains("ema") {
                let states: u64 = all.iter().map(|(.., of_rank)| of_rank.optimizer).sum();
                let others = plan.optimizer * (size as u64 - 1);
                assert!(states < plan.optimizer + others / 2, "{optimizer}: {states}, {plan:?}");
            }
            for name in [name.clone(), format!("{name}-copied")] {
                assert!(
                    files(&dir(&name)) == files(&dir("alone")),
                    "{recipe}, {optimizer}: {name}"
                );
            }
            // Each from the other's.
            let step = |engine: &Engine| {
                let mut trainer = Trainer::load(engine, &dir(&name)).unwrap();
                trainer.step(&data).unwrap().loss.to_bits()
            };
            assert_eq!(on_engines(1, step), [after]);
            let step = |engine: &Engine| {
                let mut trainer = Trainer::load(engine, &dir("alone")).unwrap();
                trainer.step(&data).unwrap().loss.to_bits()
            };
            assert_eq!(ranks::on_sharded_engines(size, step), vec![after; size]);
        }
    }
    // What would be no number on one rank, all say, as one that is alone does.
    let too_fast = |engine: &Engine| {
        let mut trainer = trainer(engine, options("bf16", "adamw", 2, 2)).unwrap();
        trainer.set_lr(Some(f32::MAX)).unwrap();
        let error = trainer.step(&data).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        trainer.set_lr(None).unwrap();
        (error.to_string(), trainer.step(&data).unwrap().loss.to_bits())
    };
    let alone = on_engines(1, too_fast).remove(0);
    assert_eq!(ranks::on_sharded_engines(2, too_fast), [alone.clone(), alone]);
    let refused = ranks::on_sharded_engines(2, |engine| {
        let of = |optimizer| trainer(engine, options("bf16", optimizer, 2, 2)).unwrap_err();
        let kinds = ["stable-adamw", "stable-spam"].map(|kind| of(kind).to_string());
        let mut trainer = trainer(engine, options("bf16", "adamw", 2, 2)).unwrap();
        (kinds, trainer.watch_updates(1).unwrap_err().to_string())
    });
    for (kinds, watched) in &refused {
        assert!(kinds.iter().all(|error| error.contains("got stable-")), "{kinds:?}");
        assert!(watched.contains("keeps all states"), "{watched}");
    }
}

/// Rank 0 writes to files without a folder, those of others stay as they are, and all go on from
/// them, sharded or not. What fails there fails on all.
#[test]
fn files_without_a_folder_are_those_of_rank_0() {
    struct Full;
    impl Files for Full {
        fn open(&self, _: &str) -> io::Result<Option<Box<dyn FileRead + '_>>> {
            Ok(None)
        }

        fn save(&mut self) -> io::Result<Box<dyn FileSave + '_>> {
            Err(io::Error::other("no room is left"))
        }
    }

    let data = data();
    let run = |engine: &Engine| {
        let mut trainer = trainer(engine, options("bf16", "adamw", 4, 4)).unwrap();
        train(&mut trainer, 2, &data);
        let error = match engine.rank() {
            0 => trainer.save_to(&mut Full).unwrap_err(),
            _ => trainer.save_to(&mut MemoryFiles::new()).unwrap_err(),
        };
        assert!(error.to_string().contains("no room is left"), "{error}");
        assert_eq!(matches!(error, Error::Peer { .. }), engine.rank() > 0, "{error}");
        let mut saved = MemoryFiles::new();
        saved.put("other", vec![1]);
        trainer.save_to(&mut saved).unwrap();
        let bytes = |name: &str| saved.get(name).unwrap().to_vec();
        saved.names().map(|name| (name.to_owned(), bytes(name))).collect::<BTreeMap<_, _>>()
    };
    let alone = on_engines(1, run).remove(0);
    assert_eq!(alone.len(), 5);
    for mut all in [on_engines(2, run), ranks::on_sharded_engines(2, run)] {
        let other = all.pop().unwrap();
        assert_eq!(other.into_keys().collect::<Vec<_>>(), ["other"]);
        assert!(all.pop().unwrap() == alone, "rank 0 saves what one alone does");
    }
    let go_on = |engine: &Engine| {
        let mut files = MemoryFiles::new();
        alone.iter().for_each(|(name, bytes)| files.put(name.as_str(), bytes.clone()));
        train(&mut Trainer::load_from(engine, &files).unwrap(), 2, &data)
    };
    let straight = on_engines(1, go_on).remove(0);
    for all in [on_engines(2, go_on), ranks::on_sharded_engines(2, go_on)] {
        assert!(all.iter().all(|trained| *trained == straight));
    }
}

/// 4, 2, 1, and again 4 ranks that go on from each other's checkpoints are a run that never stopped.
#[test]
fn a_run_goes_on_on_another_number_of_ranks() {
    let (data, folder) = (data(), tempfile::tempdir().unwrap());
    let [straight, moved] = ["straight", "moved"].map(|name| folder.path().join(name));
    let options = || options("mxfp4-rht-sr", "adamw", 8, 4);
    let alone = on_engines(1, |engine| {
        let mut trainer = trainer(engine, options()).unwrap();
        let steps: Vec<_> = (0..8).map(|_| trainer.step(&data).unwrap().loss.to_bits()).collect();
        trainer.save(&straight).unwrap();
        steps
    });
    let mut steps = Vec::new();
    for (size, is_first) in [(4, true), (2, false), (1, false), (4, false)] {
        let mut all = on_engines(size, |engine| {
            let mut trainer = match is_first {
                true => trainer(engine, options()).unwrap(),
                false => Trainer::load(engine, &moved).unwrap(),
            };
            let steps = [0; 2].map(|_| trainer.step(&data).unwrap().loss.to_bits());
            trainer.save(&moved).unwrap();
            steps
        });
        steps.extend(all.remove(0));
    }
    assert_eq!(steps, alone[0]);
    assert!(files(&straight) == files(&moved));
    let refused = on_engines(3, |engine| Trainer::load(engine, &moved).unwrap_err().to_string());
    assert!(refused[0].contains("ranks may be 1, 2, 4"), "{refused:?}");
}

/// Of given tokens each rank brings its own micro-steps.
#[test]
fn ranks_bring_their_own_tokens() {
    let tokens: Vec<u32> = (0..4 * 2 * 17).map(|i| i * i % 57).collect();
    let of_size = |size: usize| {
        on_engines(size, |engine| {
            let mut trainer = trainer(engine, options("bf16", "adamw", 4, 4)).unwrap();
            let share = tokens.len() / size;
            let mine = &tokens[engine.rank() * share..][..share];
            let stats = [0; 2].map(|_| trainer.step_tokens(mine).unwrap());
            stats.map(|stats| (stats.loss.to_bits(), stats.grad_norm.to_bits(), stats.tokens))
        })
        .remove(0)
    };
    assert_eq!(of_size(1), of_size(2));
    assert_eq!(of_size(1), of_size(4));
}

/// What one rank cannot do fails on all, changes nothing, and the next good step is done.
#[test]
fn what_fails_on_one_rank_fails_on_all() {
    let good: Vec<u32> = (0..2 * 17).map(|i| i * i % 57).collect();
    let bad: Vec<u32> = good.iter().map(|token| if *token == 36 { 61 } else { *token }).collect();
    let results = on_engines(3, |engine| {
        let options = options("bf16", "adamw", 3, 3);
        let mut trainer = trainer(engine, options).unwrap();
        let weights = |trainer: &Trainer| {
            let mut values = vec![0.0; 61 * 36];
            trainer.model().read_tensor("transformer.wte.weight", &mut values).unwrap();
            values
        };
        let before = weights(&trainer);
        let is_second = engine.rank() == 1;
        let failed = trainer.step_tokens(if is_second { &bad } else { &good }).unwrap_err();
        match (is_second, &failed) {
            (true, Error::TokenRange { token: 61, .. }) => {}
            (false, Error::Peer { message }) => {
                assert!(message.starts_with("rank 1 on "), "{message}");
                assert!(message.contains("token 61"), "{message}");
            }
            _ => panic!("{failed}"),
        }
        // Too few, on another rank.
        let tokens = if engine.rank() == 2 { &good[1..] } else { &good };
        assert!(trainer.step_tokens(tokens).is_err());
        // A dataset with another vocabulary, on the first.
        let others = Dataset::from_tokens((0..4000).map(|i| i % 99).collect()).unwrap();
        let data = data();
        assert!(trainer.step(if engine.rank() == 0 { &others } else { &data }).is_err());
        // One that is longer, and nothing is wrong with it.
        let longer = Dataset::from_tokens((0..4001).map(|i| i * i % 59).collect()).unwrap();
        let differ = trainer.step(if is_second { &longer } else { &data }).unwrap_err();
        assert!(matches!(differ, Error::RanksDiffer { .. }), "{differ}");
        // As many tokens, and others, for a step and for an evaluation.
        let others = Dataset::from_tokens((0..4000).map(|i| i * i % 58).collect()).unwrap();
        let of_one = if is_second { &others } else { &data };
        let differ = trainer.step(of_one).unwrap_err();
        assert!(differ.to_string().contains("4000 tokens (checksum "), "{differ}");
        let differ = trainer.eval(of_one, 2).unwrap_err();
        assert!(differ.to_string().contains("4000 tokens (checksum "), "{differ}");
        // A schedule of another length, at the same rate.
        let schedule = trainer.options().schedule.clone();
        if is_second {
            trainer.set_schedule(Schedule { total_steps: 11, ..schedule.clone() }).unwrap();
        }
        let differ = trainer.step(&data).unwrap_err();
        assert!(differ.to_string().contains("(schedule "), "{differ}");
        trainer.set_schedule(schedule).unwrap();
        // A rate that one has set.
        if is_second {
            trainer.set_lr(Some(0.5)).unwrap();
        }
        let differ = trainer.step(&data).unwrap_err();
        assert!(differ.to_string().contains("at a rate of 0.5"), "{differ}");
        trainer.set_lr(None).unwrap();
        // A stop, of a step and of an evaluation.
        if is_second {
            trainer.stop_handle().request_stop();
        }
        assert!(matches!(trainer.step_unless_stopped(&data), Err(Error::Stopped)));
        assert!(matches!(trainer.eval(&data, 0), Err(Error::Stopped)));
        trainer.stop_handle().clear();
        // A folder that cannot be written.
        let saved = trainer.save(Path::new("/proc/self/none"));
        assert_eq!(matches!(saved, Err(Error::Peer { .. })), engine.rank() != 0, "{saved:?}");
        assert!(saved.is_err());
        assert_eq!((trainer.steps_done(), weights(&trainer)), (0, before));
        trainer.step_tokens(&good).unwrap().loss.to_bits()
    });
    assert!(results.iter().all(|loss| *loss == results[0]));
}

/// Calls that do not belong together are seen, whatever they are.
#[test]
fn ranks_that_are_not_alike_do_not_begin() {
    let differ = |change: &(dyn Fn(usize, &mut TrainerOptions) + Sync)| {
        let messages = on_engines(2, |engine| {
            let mut options = options("bf16", "adamw", 2, 2);
            change(engine.rank(), &mut options);
            trainer(engine, options).unwrap_err().to_string()
        });
        assert_eq!(messages[0], messages[1]);
        messages[0].clone()
    };
    let message = differ(&|rank, options| options.batch_size += rank);
    assert!(message.contains("batch_size must be the same on all ranks"), "{message}");
    assert!(message.ends_with("have 2 and 3"), "{message}");
    let message = differ(&|rank, options| {
        options.recipe = ["bf16", "mxfp4"][rank].parse().unwrap();
    });
    assert!(message.ends_with("have bf16 and mxfp4"), "{message}");
    let message = differ(&|rank, options| options.optimizer.beta2 += rank as f32 * 1e-3);
    assert!(message.contains("beta2"), "{message}");
    let message = differ(&|rank, options| options.schedule.lr *= 1.0 + rank as f32);
    assert!(message.contains("schedule"), "{message}");

    let seeds = on_ranks(2, |rank, ranks| {
        let mut options = ranks::options(rank, 2, ranks);
        options.seed += rank as u64;
        Engine::new(options).unwrap_err().to_string()
    });
    assert!(seeds[0].contains("seed must be the same") && seeds[0] == seeds[1], "{seeds:?}");

    let weights = on_engines(2, |engine| {
        let model = Model::new(engine, &config()).unwrap();
        if engine.rank() == 1 {
            model.write_tensor("transformer.ln_f.bias", &[0.5; 36]).unwrap();
        }
        let options = options("bf16", "adamw", 2, 2);
        Trainer::new(&model, options.clone()).unwrap_err().to_string()
    });
    assert!(weights[0].contains("checksum of the weights"), "{weights:?}");

    let calls = on_engines(2, |engine| {
        let mut trainer = trainer(engine, options("bf16", "adamw", 2, 2)).unwrap();
        match engine.rank() {
            0 => trainer.step(&data()).map(drop),
            _ => trainer.eval(&data(), 1).map(drop),
        }
        .unwrap_err()
        .to_string()
    });
    assert!(calls[0].contains("evaluates 2 windows of a dataset of 4000 tokens"), "{calls:?}");
    assert!(calls[1].contains("does step 1 at a rate"), "{calls:?}");
}

/// A collective that fails, whichever it is, is an error on every rank, soon and for good.
#[test]
fn a_collective_that_fails_ends_the_group() {
    let folder = tempfile::tempdir().unwrap();
    let data = data();
    let run = |fails: usize, rank: usize, mut ranks: ranks::Threads| -> Result<(), Error> {
        if rank == 1 {
            ranks.until_failure = fails;
        }
        let engine = Engine::new(ranks::options(rank, 2, ranks))?;
        let mut trainer = trainer(&engine, options("bf16", "adamw", 2, 2))?;
        let mut all = || {
            trainer.step(&data)?;
            trainer.eval(&data, 3)?;
            trainer.save(folder.path())?;
            trainer.step(&data)?;
            Ok(())
        };
        let done: Result<(), Error> = all();
        if let Err(error) = &done {
            assert!(matches!(error, Error::Peer { .. }), "{error}");
            let again = trainer.step(&data).unwrap_err();
            assert!(again.to_string().contains("the group has ended"), "{again}");
        }
        done
    };
    let mut fails = 0;
    loop {
        let results = on_ranks(2, |rank, ranks| run(fails, rank, ranks));
        if results.iter().all(Result::is_ok) {
            break;
        }
        for result in &results {
            assert!(matches!(result, Err(Error::Peer { .. })), "{fails}: {results:?}");
        }
        if Trainer::is_saved_in(folder.path()) {
            Trainer::inspect(folder.path()).unwrap();
        }
        fails += 1;
    }
    assert!(fails > 15, "{fails}");
}

/// Gradients that are sent in less than f32: losses are near those of f32 and others, all ranks have
/// the same bits, again and sharded as well, and what lies behind parameters stays 0, which would grow
/// from step to step.
#[test]
fn wires_train_nearly_as_f32_does() {
    let data = data();
    let run = |wire: Wire, size: usize, shards: bool| {
        let mut all = on_ranks(size, |rank, ranks| {
            let options = ranks::options(rank, size, ranks);
            let group =
                options.group.map(|group| group.with_wire(wire).with_sharded_states(shards));
            let engine = Engine::new(EngineOptions { group, ..options }).unwrap();
            let mut trainer = trainer(&engine, self::options("bf16", "adamw", size, size)).unwrap();
            (0..40)
                .map(|_| {
                    let stats = trainer.step(&data).unwrap();
                    [stats.loss, stats.grad_norm]
                })
                .collect::<Vec<_>>()
        });
        let first = all.remove(0);
        assert!(all.iter().all(|other| *other == first), "{wire}: ranks of {size} differ");
        first
    };
    for size in [2, 3] {
        let plain = run(Wire::F32, size, false);
        for (wire, of_norm) in [(Wire::Bf16, 0.01), (Wire::Fp8, 0.03), (Wire::Mxfp4, 0.25)] {
            let rounded = run(wire, size, false);
            assert_eq!(rounded[0][0], plain[0][0], "{wire}");
            for (of_rounded, of_plain) in rounded.iter().zip(&plain) {
                let off = |i: usize| (of_rounded[i] - of_plain[i]).abs() / of_plain[i];
                assert!(off(0) < 0.05, "{wire}: {of_rounded:?}, {of_plain:?}");
                assert!(off(1) < of_norm * 2.0, "{wire}: {of_rounded:?}, {of_plain:?}");
            }
            let off = (rounded[0][1] - plain[0][1]).abs() / plain[0][1];
            assert!(off > 0.0 && off < of_norm, "{wire}: {off}");
            assert_eq!(run(wire, size, true), rounded, "{wire}");
        }
    }
}
