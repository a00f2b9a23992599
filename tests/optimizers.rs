//! Every optimizer through the public interface: a run that is saved and resumed goes on bit for
//! bit, on any number of threads; a step that is not finite changes nothing; files of AdamW say
//! nothing of it.

#[path = "common/tiny.rs"]
mod tiny;

use std::fs;

use mxfp4train::{
    Error, Master, Model, ModelConfig, Moments, Optimizer, OptimizerKind, Schedule, Trainer,
    TrainerOptions,
};
use safetensors::{Dtype, SafeTensors};
use tiny::{data, engine, losses, model, weights};

/// Every optimizer, with its moments in everything.
fn all() -> impl Iterator<Item = Optimizer> {
    let with = |kind| Moments::ALL.map(|moments| Optimizer { moments, ..Optimizer::new(kind) });
    OptimizerKind::ALL.into_iter().flat_map(with)
}

/// A high beta2, with which rates of StableAdamW fall, and moments that start again within a run.
fn options(mut optimizer: Optimizer) -> TrainerOptions {
    if matches!(optimizer.kind, OptimizerKind::StableSpam | OptimizerKind::StableSpamRef) {
        optimizer.normalization.reset = 5;
    }
    TrainerOptions {
        batch_size: 3,
        accumulation: 2,
        optimizer: Optimizer { beta2: 0.999, ..optimizer },
        schedule: Schedule { lr: 3e-3, ..Schedule::default() },
        ..TrainerOptions::default()
    }
}

#[test]
fn runs_go_on_where_they_were_saved() {
    let mut runs = Vec::new();
    for kind in all() {
        let mut straight = Trainer::new(&model(&engine(1)), options(kind)).unwrap();
        let all = losses(&mut straight, 12);
        assert!(all[11] < all[0] - 0.1, "{kind}: {all:?}");
        let folder = tempfile::tempdir().unwrap();
        let mut before = Trainer::new(&model(&engine(3)), options(kind)).unwrap();
        assert_eq!(losses(&mut before, 7), all[..7], "{kind}");
        before.save(folder.path()).unwrap();
        let mut resumed = Trainer::load(&engine(2), folder.path()).unwrap();
        assert_eq!(resumed.options().optimizer, options(kind).optimizer);
        assert_eq!(losses(&mut resumed, 5), all[7..], "{kind}");
        assert_eq!(weights(&resumed), weights(&straight), "{kind}");
        let text = fs::read_to_string(folder.path().join("trainer.json")).unwrap();
        let named = format!("\"kind\": \"{}\"", options(kind).optimizer);
        assert_eq!(text.contains(&named), kind != Optimizer::default(), "{text}");
        runs.push(all);
    }
    // The first update has the whole rate.
    let [adamw, stable] = [&runs[0], &runs[Moments::ALL.len()]];
    assert!((adamw[1] - stable[1]).abs() < 1e-4, "{runs:?}");
    assert!((adamw[11] - stable[11]).abs() > 1e-4, "{runs:?}");
    // What moments are kept in changes every run, and none by much.
    for (i, run) in runs.iter().enumerate() {
        let as_f32 = &runs[i - i % Moments::ALL.len()];
        assert_eq!(run == as_f32, i % Moments::ALL.len() == 0, "{runs:?}");
        assert!((run[11] - as_f32[11]).abs() < 0.05, "{runs:?}");
    }
}

#[test]
fn an_unknown_optimizer_in_a_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let kind = Optimizer::new(OptimizerKind::StableAdamW);
    let mut trainer = Trainer::new(&model(&engine(1)), options(kind)).unwrap();
    trainer.save(folder.path()).unwrap();
    let path = folder.path().join("trainer.json");
    let text = fs::read_to_string(&path).unwrap().replace("stable-adamw", "sophia");
    let kept: Vec<_> = text.lines().filter(|line| !line.starts_with("  \"crc32\"")).collect();
    fs::write(&path, kept.join("\n").replace("},\n}", "}\n}")).unwrap();
    let error = Trainer::load(&engine(1), folder.path()).unwrap_err().to_string();
    assert!(error.contains("expected one of adamw, stable-adamw, stable-spam, stable-spam-ref, gradstab, muon; got \"sophia\""), "{error}");
}

#[test]
fn a_step_that_is_not_finite_changes_nothing() {
    for kind in all() {
        let mut trainer = Trainer::new(&model(&engine(2)), options(kind)).unwrap();
        let mut twin = Trainer::new(&model(&engine(2)), options(kind)).unwrap();
        assert_eq!(losses(&mut trainer, 3), losses(&mut twin, 3));
        let before = weights(&trainer);
        // Beyond what a weight can become.
        trainer.set_lr(Some(3e38)).unwrap();
        let error = trainer.step(&data()).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{kind}: {error}");
        assert_eq!(weights(&trainer), before, "{kind}");
        trainer.set_lr(None).unwrap();
        // A loss that is none.
        let name = "transformer.ln_f.weight";
        trainer.model().write_tensor(name, &[3e38; 36]).unwrap();
        let error = trainer.step(&data()).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{kind}: {error}");
        let index = trainer.model().tensors().iter().position(|t| t.name == name).unwrap();
        trainer.model().write_tensor(name, &before[index]).unwrap();
        assert_eq!(weights(&trainer), before, "{kind}");
        assert_eq!(losses(&mut trainer, 3), losses(&mut twin, 3), "{kind}");
    }
}

/// What one form has saved, every other can go on from, and what comes of it is close to the run
/// that was never changed; from 8 bits to f32 and back nothing is lost, and the file is the same but
/// where a tensor's scale could have been another for the same numbers.
#[test]
fn states_are_loaded_into_other_forms() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    for saved in all() {
        let mut trainer = Trainer::new(&model(&engine(1)), options(saved)).unwrap();
        losses(&mut trainer, 6);
        trainer.save(path).unwrap();
        let files = || {
            ["model.safetensors", "trainer.safetensors"].map(|f| fs::read(path.join(f)).unwrap())
        };
        let before = files();
        let straight = losses(&mut trainer, 6);
        for wanted in all().filter(|wanted| wanted.kind == saved.kind) {
            let mut loaded = Trainer::load_as(&engine(2), path, &wanted).unwrap();
            assert_eq!(loaded.options().optimizer, options(wanted).optimizer);
            let next = losses(&mut loaded, 6);
            assert_eq!(next == straight, wanted == saved, "{saved} to {wanted}");
            assert!((next[5] - straight[5]).abs() < 0.02, "{saved} to {wanted}: {next:?}");
        }
        if matches!(saved.moments, Moments::Int8 | Moments::Fp8) {
            let wide = Optimizer { moments: Moments::F32, ..saved };
            Trainer::load_as(&engine(1), path, &wide).unwrap().save(path).unwrap();
            assert!(files()[1].len() > before[1].len() + before[1].len() / 3);
            let mut again = Trainer::load_as(&engine(1), path, &saved).unwrap();
            again.save(path).unwrap();
            assert!(files() == before || saved.moments == Moments::Fp8, "{saved}");
            assert_eq!(losses(&mut again, 6), straight, "{saved}");
        }
    }
    let error = Trainer::load_as(&engine(1), path, &Optimizer::default()).unwrap_err();
    let expected = format!("{} was trained with muon", path.display());
    assert!(error.to_string().contains(&expected), "{error}");
}

/// The same codes are in the file again, and a file that has codes which are none is refused.
#[test]
fn damaged_codes_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let small = Optimizer { moments: Moments::Int8, ..Optimizer::default() };
    let mut trainer = Trainer::new(&model(&engine(1)), options(small)).unwrap();
    losses(&mut trainer, 2);
    trainer.save(folder.path()).unwrap();
    let path = folder.path().join("trainer.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = Trainer::load(&engine(1), folder.path()).unwrap_err().to_string();
    assert!(error.contains("damaged: expected CRC-32"), "{error}");
}

/// FP8-LM's form: of matrices of blocks floats of 8 and 16 bits with a scale each, of all else f32;
/// the plan is smaller by that.
#[test]
fn fp8_is_of_matrices_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut plans = Vec::new();
    for text in ["adamw", "adamw,moments=fp8", "muon", "muon,moments=fp8"] {
        let optimizer: Optimizer = text.parse().unwrap();
        let mut trainer = Trainer::new(&model(&engine(1)), options(optimizer)).unwrap();
        losses(&mut trainer, 2);
        trainer.save(folder.path()).unwrap();
        let file = fs::read(folder.path().join("trainer.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let (mut spared, is_muon) = (0, optimizer.kind == OptimizerKind::Muon);
        for info in trainer.model().tensors() {
            let is_matrix = info.name.contains(".h.")
                && info.name.ends_with(".weight")
                && !info.name.contains("ln_");
            let form = |state: &str, part: &str| {
                let view = tensors.tensor(&format!("{state}.{}{part}", info.name)).ok()?;
                Some((view.dtype(), view.shape().to_vec()))
            };
            let len: usize = info.shape.iter().product();
            if !(is_matrix && optimizer.moments == Moments::Fp8) {
                assert_eq!(form("m", ""), Some((Dtype::F32, info.shape.clone())), "{text}");
                assert_eq!(form("v", "").is_none(), is_matrix && is_muon, "{text}");
                continue;
            }
            assert_eq!(form("m", ".codes"), Some((Dtype::F8_E4M3, info.shape.clone())), "{text}");
            assert_eq!(form("m", ".scales"), Some((Dtype::F32, vec![1])), "{text}");
            let second = |form: Option<_>| if is_muon { None } else { form };
            assert_eq!(form("v", ".codes"), second(Some((Dtype::F16, info.shape.clone()))));
            assert_eq!(form("v", ".scales"), second(Some((Dtype::F32, vec![1]))));
            spared += if is_muon { 3 * len } else { 5 * len };
        }
        plans.push((trainer.plan().optimizer, spared as u64));
    }
    for [f32, fp8] in plans.as_chunks().0 {
        // Scales, each of which begins on a line of its own, and what lines leave free.
        let lines = f32.0 - fp8.1..f32.0 - fp8.1 + 64 * 4 * 64;
        assert!(lines.contains(&fp8.0), "{plans:?}");
    }
}

/// Split master weights are for recipes that make operands from copies of them; a processor, which
/// has no copies, computes the same with them.
#[test]
fn what_needs_weights_in_f32_refuses_to_split_them() {
    let split = Optimizer { master: Master::Split, ..Optimizer::default() };
    for (recipe, why) in [
        ("fp32", "the recipe fp32 multiplies them"),
        ("tetrajet,ema=0.9", "follows how they move"),
        ("msra-fp4", "makes their gradients with them"),
    ] {
        let options = TrainerOptions { recipe: recipe.parse().unwrap(), ..options(split) };
        let error = Trainer::new(&model(&engine(1)), options).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("master=f32"), "{error}");
    }
    let [mut with, mut without] = [split, Optimizer::default()]
        .map(|optimizer| Trainer::new(&model(&engine(1)), options(optimizer)).unwrap());
    assert_eq!(losses(&mut with, 3), losses(&mut without, 3));
    assert_eq!(with.options().optimizer.to_string(), "adamw,master=split");
}

/// Gradients in bf16 are what products leave, rounded once; a processor keeps them in f32, and
/// computes the same.
#[test]
fn what_needs_gradients_in_f32_refuses_bf16() {
    let narrow: Optimizer = "adamw,gradients=bf16".parse().unwrap();
    for (recipe, accumulation, why) in [
        (
            "bf16",
            2,
            "would round the sum of 2 micro-steps after each of them; set accumulation to 1",
        ),
        ("fp32", 1, "the recipe fp32 keeps everything in f32"),
        ("msra-fp4", 1, "makes gradients of products and of weights in f32"),
        ("quartet", 1, "makes gradients of products and of weights in f32"),
    ] {
        let recipe = recipe.parse().unwrap();
        let options = TrainerOptions { recipe, accumulation, ..options(narrow) };
        let error = Trainer::new(&model(&engine(1)), options).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("gradients=f32"), "{error}");
    }
    let [mut with, mut without] = [narrow, Optimizer::default()].map(|optimizer| {
        let options = TrainerOptions { accumulation: 1, ..options(optimizer) };
        Trainer::new(&model(&engine(1)), options).unwrap()
    });
    assert_eq!(losses(&mut with, 3), losses(&mut without, 3));
    assert_eq!(with.options().optimizer.to_string(), "adamw,gradients=bf16");
}

/// Whoever watches updates learns how long gradients are and how far beyond what moments have seen
/// coming, and changes nothing.
#[test]
fn updates_can_be_watched() {
    for optimizer in all() {
        let options = options(optimizer);
        let mut plain = Trainer::new(&model(&engine(2)), options.clone()).unwrap();
        let mut watched = Trainer::new(&model(&engine(2)), options).unwrap();
        watched.watch_updates(2).unwrap();
        assert_eq!(watched.update_metrics(), None);
        for step in 1..=6 {
            let (expected, stats) = (plain.step(&data()).unwrap(), watched.step(&data()).unwrap());
            assert_eq!((stats.loss, stats.grad_norm), (expected.loss, expected.grad_norm));
            let Some(found) = watched.update_metrics() else { continue };
            assert_eq!(found.step, step / 2 * 2, "{optimizer}");
            assert_eq!(found.tensors.len(), watched.model().tensors().len());
            if found.step < step {
                continue;
            }
            let squares = found.tensors.iter().map(|(_, of)| f64::from(of.grad_norm).powi(2));
            let norm = squares.sum::<f64>().sqrt();
            assert!((norm / f64::from(stats.grad_norm) - 1.0).abs() < 1e-5, "{optimizer}");
            let (name, rms) = found.largest().unwrap();
            assert!(found.tensors.iter().any(|(n, of)| n == name && of.rms == rms));
            assert!(rms > 0.5 && rms <= found.ceiling, "{optimizer}: {rms} of {name}");
            assert!((found.ceiling / 31.6228 - 1.0).abs() < 1e-3, "of 0.999: {}", found.ceiling);
        }
    }
    // Moments that have just taken in their first gradient have seen it coming.
    let mut first = Trainer::new(&model(&engine(1)), options(Optimizer::default())).unwrap();
    first.watch_updates(1).unwrap();
    first.step(&data()).unwrap();
    let found = first.update_metrics().unwrap();
    let moving = found.tensors.iter().filter(|(_, of)| of.grad_norm > 1e-3);
    assert!(moving.clone().count() > 5);
    assert!(
        moving.clone().all(|(name, of)| of.rms < 1.0001 && (name.contains("wte") || of.rms > 0.9)),
        "{found:?}"
    );
    first.watch_updates(0).unwrap();
    assert_eq!(first.update_metrics(), None);
}

/// At the rates of Muon's authors it learns what AdamW learns at its own, and faster.
#[test]
fn muon_learns() {
    let [adamw, muon] = ["adamw", "muon"].map(|name| {
        let schedule = Schedule { lr: 3e-4, ..Schedule::default() };
        let options = TrainerOptions { schedule, ..options(name.parse().unwrap()) };
        let mut trainer = Trainer::new(&model(&engine(2)), options).unwrap();
        losses(&mut trainer, 60)
    });
    assert_eq!(adamw[0], muon[0]);
    assert!(muon[59] < adamw[59], "{adamw:?} {muon:?}");
}

/// A matrix of a block has no second moment, in memory or in files, and moves by its own rate.
#[test]
fn muon_keeps_momentum_alone_of_matrices() {
    let folder = tempfile::tempdir().unwrap();
    let is_matrix =
        |name: &str| name.contains(".h.") && name.ends_with(".weight") && !name.contains("ln_");
    let mut plans = Vec::new();
    for text in ["adamw", "muon", "muon,moments=int8", "muon,ratio=0"] {
        let optimizer = Optimizer { weight_decay: 0.0, ..text.parse().unwrap() };
        let mut trainer = Trainer::new(&model(&engine(1)), options(optimizer)).unwrap();
        plans.push(trainer.plan().optimizer);
        let before = weights(&trainer);
        losses(&mut trainer, 2);
        for (info, (before, after)) in
            trainer.model().tensors().iter().zip(before.iter().zip(weights(&trainer)))
        {
            let stays = text == "muon,ratio=0" && is_matrix(&info.name);
            assert_eq!(*before == after, stays, "{text}: {}", info.name);
        }
        trainer.save(folder.path()).unwrap();
        let file = fs::read(folder.path().join("trainer.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let names = tensors.names();
        for info in trainer.model().tensors() {
            let has = |state: &str| {
                let name = format!("{state}.{}", info.name);
                names.iter().any(|known| **known == name || **known == format!("{name}.codes"))
            };
            assert!(has("m"), "{text}: {}", info.name);
            let has_second = text == "adamw" || !is_matrix(&info.name);
            assert_eq!(has("v"), has_second, "{text}: {}", info.name);
        }
    }
    assert!(plans[1] < plans[0] && plans[2] < plans[1] && plans[3] == plans[1], "{plans:?}");
}

/// Decay rates that fall over a schedule: such a run goes on where it was saved, too, and learns
/// otherwise; without a schedule's end it is refused.
#[test]
fn decay_rates_fall_over_a_schedule() {
    let annealed: Optimizer = "stable-spam,s=cosine".parse().unwrap();
    let with = |optimizer, total_steps| {
        let usual = options(optimizer);
        let schedule = Schedule { total_steps, ..usual.schedule };
        Trainer::new(&model(&engine(1)), TrainerOptions { schedule, ..usual })
    };
    let error = with(annealed, 0).unwrap_err().to_string();
    assert!(error.starts_with("optimizer: s=cosine falls over a schedule's steps"), "{error}");
    let mut straight = with(annealed, 8).unwrap();
    let all = losses(&mut straight, 8);
    let mut other = with(Optimizer::new(OptimizerKind::StableSpam), 8).unwrap();
    let others = losses(&mut other, 8);
    // Only what comes behind the second update knows of it.
    assert_eq!(all[..2], others[..2]);
    assert!(all[7] != others[7] && (all[7] - others[7]).abs() < 0.2, "{all:?} {others:?}");
    let folder = tempfile::tempdir().unwrap();
    let mut before = with(annealed, 8).unwrap();
    losses(&mut before, 4);
    before.save(folder.path()).unwrap();
    let mut resumed = Trainer::load(&engine(2), folder.path()).unwrap();
    assert_eq!(losses(&mut resumed, 4), all[4..]);
}

/// What a run's optimizer is set to stays, and need not be named again.
#[test]
fn settings_of_a_run_stay() {
    let folder = tempfile::tempdir().unwrap();
    for (saved, same, other) in [
        ("stable-spam,gamma1=0.5", "stable-spam,moments=int8,gamma1=0.5", "stable-spam,gamma1=0.6"),
        ("muon,ratio=30", "muon,ratio=30,moments=bf16", "muon,ratio=40"),
    ] {
        let optimizer = saved.parse().unwrap();
        let mut trainer = Trainer::new(&model(&engine(1)), options(optimizer)).unwrap();
        losses(&mut trainer, 1);
        trainer.save(folder.path()).unwrap();
        let load = |text: &str| {
            Trainer::load_as(&engine(1), folder.path(), &text.parse().unwrap())
                .map(|trainer| trainer.options().optimizer.to_string())
        };
        let kept = options(optimizer).optimizer.to_string();
        let unnamed = format!("{},moments=bf16", optimizer.kind);
        assert!(load(same).unwrap().starts_with(&optimizer.kind.to_string()));
        let (name, switches) = kept.split_once(',').unwrap();
        assert_eq!(load(&unnamed).unwrap(), format!("{name},moments=bf16,{switches}"));
        let error = load(other).unwrap_err().to_string();
        let expected = format!("was trained with {kept}, which a run keeps; got {other}");
        assert!(error.contains(&expected), "{error}");
    }
}

fn ramping(threads: usize, recipe: &str, lr: f32, period: u32) -> Trainer {
    let optimizer: Optimizer = format!("adamw,ramping={period}").parse().unwrap();
    let usual = options(optimizer);
    let recipe = recipe.parse().unwrap();
    let schedule = Schedule { lr, total_steps: 20, ..usual.schedule };
    let options = TrainerOptions { recipe, schedule, ..usual };
    Trainer::new(&model(&engine(threads)), options).unwrap()
}

/// What a trainer keeps of weights besides moments, by its saved folder.
fn ramping_states(trainer: &mut Trainer) -> Vec<[Vec<f32>; 3]> {
    let folder = tempfile::tempdir().unwrap();
    trainer.save(folder.path()).unwrap();
    let file = fs::read(folder.path().join("trainer.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let of_one = |name: &str| {
        ["interval", "count", "sum"].map(|state| {
            let name = format!("ramping_{state}.{name}");
            let bytes = tensors.tensor(&name).map_or(&[][..], |view| view.data());
            bytes.as_chunks().0.iter().map(|v| f32::from_le_bytes(*v)).collect()
        })
    };
    trainer.model().tensors().iter().map(|info| of_one(&info.name)).collect()
}

/// Periods of three steps: saved within one, where one begins, and before the first.
#[test]
fn runs_that_ramp_up_go_on_where_they_were_saved() {
    for recipe in ["tetrajet,ema=0.9", "nvidia-nvfp4,reset=6:3:3@0.3,bf16-last-layers=1"] {
        let mut straight = ramping(1, recipe, 1e-4, 3);
        let all = losses(&mut straight, 10);
        let intervals = ramping_states(&mut straight);
        let waiting = intervals.iter().flat_map(|[interval, ..]| interval).filter(|n| **n > 1.0);
        assert!(waiting.count() > 50, "{recipe}");
        for saved_after in [0, 4, 6] {
            let folder = tempfile::tempdir().unwrap();
            let mut before = ramping(3, recipe, 1e-4, 3);
            assert_eq!(losses(&mut before, saved_after), all[..saved_after], "{recipe}");
            before.save(folder.path()).unwrap();
            let mut resumed = Trainer::load(&engine(2), folder.path()).unwrap();
            assert_eq!(resumed.options().optimizer.to_string(), "adamw,ramping=3");
            assert_eq!(losses(&mut resumed, 10 - saved_after), all[saved_after..], "{recipe}");
            assert_eq!(weights(&resumed), weights(&straight), "{recipe}");
            assert_eq!(ramping_states(&mut resumed), intervals, "{recipe}");
        }
    }
}

/// Where weights move so far that no number moves many times as far, steps aside leave no trace.
#[test]
fn a_run_in_which_nothing_oscillates_is_one_of_adamw() {
    let mut ramping = ramping(2, "tetrajet", 0.03, 3);
    let plain = Optimizer { ramping: 0, ..ramping.options().optimizer };
    let plain = TrainerOptions { optimizer: plain, ..ramping.options().clone() };
    let mut plain = Trainer::new(&model(&engine(2)), plain).unwrap();
    assert_eq!(losses(&mut ramping, 8), losses(&mut plain, 8));
    assert_eq!(weights(&ramping), weights(&plain));
    for [interval, count, sum] in ramping_states(&mut ramping) {
        assert!(interval.iter().all(|n| *n == 1.0));
        assert!(count.iter().chain(&sum).all(|v| *v == 0.0));
    }
}

/// Weights that wait rest but for weight decay, and then move by all that has come meanwhile.
#[test]
fn weights_that_oscillate_wait() {
    let mut trainer = ramping(2, "tetrajet", 1e-5, 50);
    let decay = 1.0 - 1e-5 * trainer.options().optimizer.weight_decay;
    losses(&mut trainer, 1);
    let (mut before, mut waited, mut moved) = (weights(&trainer), 0, 0);
    for step in 2..=13 {
        losses(&mut trainer, 1);
        let after = weights(&trainer);
        for (i, [interval, count, _]) in ramping_states(&mut trainer).iter().enumerate() {
            let info = &trainer.model().tensors()[i];
            let is_matrix = info.shape.len() == 2 && info.name.contains(".h.");
            assert_eq!(interval.len(), if is_matrix { info.len() } else { 0 }, "{}", info.name);
            for (k, n) in interval.iter().enumerate() {
                assert_eq!(count[k], (step % *n as u32) as f32, "{}", info.name);
                let rests = after[i][k] == before[i][k] * decay;
                if count[k] > 0.0 {
                    assert!(rests, "{}", info.name);
                    waited += 1;
                } else if *n > 1.0 {
                    moved += usize::from(!rests);
                }
            }
        }
        before = after;
    }
    assert!(waited > 1000 && moved > 50, "{waited} {moved}");
}

#[test]
fn what_ramping_needs_is_said() {
    let refused = |optimizer: Optimizer, recipe: &str| {
        let recipe = recipe.parse().unwrap();
        let options = TrainerOptions { optimizer, recipe, ..TrainerOptions::default() };
        Trainer::new(&model(&engine(1)), options).unwrap_err().to_string()
    };
    let good: Optimizer = "adamw,ramping=3".parse().unwrap();
    for recipe in ["bf16", "mxfp4-rht-sr", "quartet", "msra-fp4"] {
        let error = refused(good, recipe);
        let expected = "unrotated, such as tetrajet, because ramping updates those less often";
        assert!(error.starts_with("recipe: ") && error.contains(expected), "{error}");
    }
    let error = refused(Optimizer { clip: 1.0, ..good }, "tetrajet");
    assert!(error.contains("clip: ramping adds up the gradients of several steps"), "{error}");
    let mut trainer = ramping(1, "tetrajet", 1e-4, 3);
    let error = trainer.step_tokens(&[0; 6 * 17]).unwrap_err().to_string();
    assert!(
        error.contains("ramping draws windows of its own from a dataset, which given tokens"),
        "{error}"
    );
    // A run keeps it, whether it is named again or not.
    let folder = tempfile::tempdir().unwrap();
    losses(&mut trainer, 1);
    trainer.save(folder.path()).unwrap();
    let load = |text: &str| Trainer::load_as(&engine(1), folder.path(), &text.parse().unwrap());
    for same in ["adamw", "adamw,ramping=3"] {
        assert_eq!(load(same).unwrap().options().optimizer, trainer.options().optimizer);
    }
    let error = load("adamw,ramping=4").unwrap_err().to_string();
    let expected = "was trained with adamw,ramping=3, which a run keeps; got adamw,ramping=4";
    assert!(error.contains(expected), "{error}");
    let error = load("adamw,moments=int8").unwrap_err().to_string();
    assert!(error.contains("use moments=f32, got moments=int8"), "{error}");
}

/// Tokens that are dropped are in steps aside, too.
#[test]
fn ramping_goes_with_dropped_tokens() {
    let config = ModelConfig {
        vocab_size: 33,
        context_length: 33,
        layers: 3,
        heads: 2,
        channels: 36,
        ..ModelConfig::default()
    };
    let trainer = |threads| {
        let model = Model::new(&engine(threads), &config).unwrap();
        let usual = options("adamw,ramping=3".parse().unwrap());
        let token_drop = Some("start=16,steps=6".parse().unwrap());
        let recipe = "tetrajet".parse().unwrap();
        Trainer::new(&model, TrainerOptions { token_drop, recipe, ..usual }).unwrap()
    };
    let all = losses(&mut trainer(1), 8);
    let (folder, mut before) = (tempfile::tempdir().unwrap(), trainer(2));
    losses(&mut before, 4);
    before.save(folder.path()).unwrap();
    assert_eq!(losses(&mut Trainer::load(&engine(1), folder.path()).unwrap(), 4), all[4..]);
}
