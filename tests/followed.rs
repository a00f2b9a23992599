//! What recipes keep of weights, through the public interface: a run that is saved and resumed goes
//! on bit for bit, on any number of threads, and what a folder lacks is said.

#[path = "common/tiny.rs"]
mod tiny;

use std::fs;
use std::path::Path;

use mxfp4train::{Error, Recipe, Schedule, Trainer, TrainerOptions};
use tiny::{data, engine, losses, model, weights};

fn options(recipe: &str) -> TrainerOptions {
    TrainerOptions {
        batch_size: 3,
        accumulation: 2,
        recipe: recipe.parse().unwrap(),
        schedule: Schedule { lr: 3e-3, total_steps: 20, ..Schedule::default() },
        ..TrainerOptions::default()
    }
}

fn trainer(threads: usize, recipe: &str) -> Trainer {
    Trainer::new(&model(&engine(threads)), options(recipe)).unwrap()
}

/// Saved before means count, and after.
#[test]
fn runs_with_means_go_on_where_they_were_saved() {
    for recipe in ["tetrajet,ema=0.9", "mxfp4-mxfp4-rht-sr,ema=0.9,bf16-last-layers=1"] {
        let mut straight = trainer(1, recipe);
        let all = losses(&mut straight, 16);
        let eval = straight.eval(&data(), 2).unwrap().loss;
        for saved_after in [5, 13] {
            let folder = tempfile::tempdir().unwrap();
            let mut before = trainer(3, recipe);
            assert_eq!(losses(&mut before, saved_after), all[..saved_after], "{recipe}");
            before.save(folder.path()).unwrap();
            let mut resumed = Trainer::load(&engine(2), folder.path()).unwrap();
            assert_eq!(resumed.options().recipe.to_string(), recipe);
            assert_eq!(losses(&mut resumed, 16 - saved_after), all[saved_after..], "{recipe}");
            assert_eq!(weights(&resumed), weights(&straight), "{recipe}");
            assert_eq!(resumed.eval(&data(), 2).unwrap().loss, eval, "{recipe}");
        }
    }
}

/// The first ten steps are those without means, and the eleventh is not, nor an evaluation then.
#[test]
fn means_count_from_the_eleventh_step_on() {
    let [mut plain, mut by_means] = ["tetrajet", "tetrajet,ema=0.9"].map(|name| trainer(1, name));
    let [a, b] = [&mut plain, &mut by_means].map(|trainer| losses(trainer, 9));
    assert_eq!(a, b);
    let eval = |trainer: &mut Trainer| trainer.eval(&data(), 1).unwrap().loss;
    assert_eq!(eval(&mut plain), eval(&mut by_means));
    assert_eq!(losses(&mut plain, 1), losses(&mut by_means, 1));
    assert_ne!(eval(&mut plain), eval(&mut by_means));
    assert_ne!(losses(&mut plain, 1), losses(&mut by_means, 1));
}

/// A mean that follows at once is the weight, and rounding by it is rounding to nearest: no weight
/// of this run lies in the middle.
#[test]
fn means_that_follow_at_once_change_nothing() {
    let [mut plain, mut by_means] =
        ["tetrajet", "tetrajet,ema=1e-30"].map(|recipe| trainer(1, recipe));
    assert_eq!(losses(&mut plain, 14), losses(&mut by_means, 14));
}

/// The names of what a folder keeps beside moments.
fn kept(folder: &Path) -> Vec<String> {
    let bytes = fs::read(folder.join("trainer.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names: Vec<String> =
        file.names().into_iter().filter_map(|name| Some(name.split_once('.')?.0.into())).collect();
    names.sort();
    names.dedup();
    names.retain(|name| name != "m" && name != "v");
    names
}

/// Weights are tracked from the end of step 6 to that of step 10, in which they are reset.
#[test]
fn runs_with_resets_go_on_within_a_window() {
    for recipe in ["tetrajet,reset=6:3:3@0.3", "nvidia-nvfp4,reset=6:3:3@0.3,bf16-last-layers=1"] {
        let mut straight = trainer(1, recipe);
        let all = losses(&mut straight, 14);
        for (saved_after, is_tracking) in [(5, false), (6, true), (8, true), (9, true), (10, false)]
        {
            let folder = tempfile::tempdir().unwrap();
            let mut before = trainer(3, recipe);
            assert_eq!(losses(&mut before, saved_after), all[..saved_after], "{recipe}");
            before.save(folder.path()).unwrap();
            let expected: &[&str] =
                if is_tracking { &["reset_before", "reset_moved", "reset_rounded"] } else { &[] };
            assert_eq!(kept(folder.path()), expected, "{saved_after}");
            let mut resumed = Trainer::load(&engine(2), folder.path()).unwrap();
            assert_eq!(losses(&mut resumed, 14 - saved_after), all[saved_after..], "{recipe}");
            assert_eq!(weights(&resumed), weights(&straight), "{recipe}");
        }
    }
}

/// Nothing but the reset of step 10 makes a difference, and that lies on the grid: rounding does
/// not move what it made.
#[test]
fn resets_put_weights_that_oscillate_onto_their_grid() {
    let [mut plain, mut resets] = ["tetrajet", "tetrajet,reset=6:3:3@0.3"].map(|r| trainer(1, r));
    assert_eq!(losses(&mut plain, 9), losses(&mut resets, 9));
    assert_eq!(weights(&plain), weights(&resets));
    let before = losses(&mut plain, 1);
    assert_eq!(losses(&mut resets, 1), before);
    let (plain_weights, reset) = (weights(&plain), weights(&resets));
    let changed = |names: &dyn Fn(&str) -> bool| {
        let infos = plain.model().tensors().iter().zip(plain_weights.iter().zip(&reset));
        let of_these = infos.filter(|(info, _)| names(&info.name));
        let pairs = of_these.flat_map(|(_, (a, b))| a.iter().zip(b));
        let (mut all, mut changed) = (0, 0);
        pairs.for_each(|(a, b)| (all, changed) = (all + 1, changed + i32::from(a != b)));
        (all, changed)
    };
    let is_linear = |name: &str| name.contains(".h.") && name.ends_with("c_fc.weight");
    let (all, of_linear) = changed(&is_linear);
    assert!(of_linear > 0 && of_linear < all / 2, "{of_linear} of {all}");
    let others =
        changed(&|name| name.contains("ln_") || name.contains("bias") || name.contains("wte"));
    assert_eq!(others.1, 0);
    assert_ne!(losses(&mut plain, 1), losses(&mut resets, 1));
}

/// Weights that rest do not oscillate.
#[test]
fn frozen_weights_are_not_reset() {
    let mut frozen = trainer(1, "tetrajet,reset=6:3:0.001@0");
    let before = weights(&frozen);
    frozen.set_lr(Some(0.0)).unwrap();
    losses(&mut frozen, 12);
    assert_eq!(weights(&frozen), before);
}

/// Over windows of five steps: nothing of the run changes, and what rests has codes that rest.
#[test]
fn weights_are_watched() {
    let recipe = "tetrajet,ema=0.9,bf16-last-layers=1";
    let [mut plain, mut watched] = [1, 3].map(|threads| trainer(threads, recipe));
    assert_eq!(watched.weight_metrics(), None);
    watched.watch_weights(5).unwrap();
    assert_eq!(losses(&mut watched, 4), losses(&mut plain, 4));
    assert_eq!(watched.weight_metrics(), None);
    assert_eq!(losses(&mut watched, 8), losses(&mut plain, 8));
    assert_eq!(weights(&watched), weights(&plain));
    let found = watched.weight_metrics().unwrap().clone();
    assert_eq!((found.step, found.steps, found.tensors.len()), (10, 5, 4), "{found:?}");
    let all = found.all;
    assert!(all.change > 1e-4 && all.change < 0.2, "{all:?}");
    assert!(all.rounded_change > all.change && all.flipped > 0.0 && all.flipped < 0.5, "{all:?}");
    assert!(all.confidence > 0.3 && all.confidence < 0.8, "{all:?}");
    assert!(all.oscillating < 0.2 && all.clipped == 0.0, "{all:?}");
    let amax = found.tensors.iter().map(|(_, of)| of.amax).fold(0.0, f32::max);
    assert_eq!(amax, all.amax);
    for (name, of) in &found.tensors {
        assert!(name.starts_with("transformer.h.0.") && name.ends_with(".weight"), "{name}");
        assert!(of.change > 0.0 && of.rounded_change > 0.0, "{name}: {of:?}");
    }
    // A slow mean that hardly moves any more.
    watched.set_lr(Some(0.0)).unwrap();
    losses(&mut watched, 8);
    let frozen = &watched.weight_metrics().unwrap().all;
    assert_eq!((watched.weight_metrics().unwrap().step, frozen.change), (20, 0.0));

    let mut frozen = trainer(1, "tetrajet");
    frozen.set_lr(Some(0.0)).unwrap();
    frozen.watch_weights(2).unwrap();
    losses(&mut frozen, 2);
    let found = frozen.weight_metrics().unwrap().all;
    assert_eq!((found.change, found.rounded_change, found.flipped), (0.0, 0.0, 0.0));
    frozen.watch_weights(0).unwrap();
    assert_eq!(frozen.weight_metrics(), None);
    let error = trainer(1, "mxfp4-rht-sr").watch_weights(3).unwrap_err().to_string();
    assert!(error.contains("in blocks of MXFP4 or NVFP4, unrotated"), "{error}");
}

/// What they are for: weights that move a little keep the codes that their means have.
#[test]
fn means_make_numbers_move_less() {
    let [plain, by_means] = ["tetrajet", "tetrajet,ema=0.998"].map(|recipe| {
        let mut trainer = trainer(2, recipe);
        trainer.set_lr(Some(0.0)).unwrap();
        losses(&mut trainer, 12);
        trainer.set_lr(Some(1e-4)).unwrap();
        trainer.watch_weights(6).unwrap();
        losses(&mut trainer, 6);
        trainer.weight_metrics().unwrap().all
    });
    assert!(by_means.rounded_change < 0.5 * plain.rounded_change, "{by_means:?} {plain:?}");
    assert!(plain.flipped > 0.0 && by_means.flipped < 0.5 * plain.flipped, "{by_means:?}");
    assert!((by_means.change / plain.change - 1.0).abs() < 0.2, "{by_means:?} {plain:?}");
}

#[test]
fn a_reset_needs_a_schedule_with_an_end() {
    let without_end =
        TrainerOptions { schedule: Schedule::default(), ..options("tetrajet,reset=200:50:8@0.6") };
    let error = Trainer::new(&model(&engine(1)), without_end).unwrap_err().to_string();
    assert!(error.contains("total_steps"), "{error}");
}

#[test]
fn a_folder_without_the_means_of_its_recipe_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut plain = trainer(1, "tetrajet");
    losses(&mut plain, 2);
    plain.save(folder.path()).unwrap();
    edit(folder.path(), "\"tetrajet\"", "\"tetrajet,ema=0.998\"");
    let error = Trainer::load(&engine(1), folder.path()).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    let message = error.to_string();
    for part in ["trainer.safetensors", "no slow mean of any weight, ema.NAME", "start a new"] {
        assert!(message.contains(part), "{message}");
    }
    // And means that nobody asks for.
    trainer(1, "tetrajet,ema=0.998").save(folder.path()).unwrap();
    edit(folder.path(), "tetrajet,ema=0.998", "tetrajet");
    let message = Trainer::load(&engine(1), folder.path()).unwrap_err().to_string();
    assert!(message.contains("ema.transformer.h.0.attn.c_attn.weight"), "{message}");
}

/// Changes `trainer.json` on purpose.
fn edit(folder: &Path, from: &str, to: &str) {
    let path = folder.join("trainer.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    let mut json: serde_json::Value = serde_json::from_str(&text.replace(from, to)).unwrap();
    json.as_object_mut().unwrap().remove("crc32");
    fs::write(&path, json.to_string()).unwrap();
}

/// 4 bytes for each weight of a block's linear layers.
#[test]
fn means_are_in_the_plan() {
    let bytes = |recipe: &str| {
        let model = model(&engine(1));
        mxfp4train::plan(&engine(1), model.config(), &options(recipe)).unwrap().optimizer
    };
    let weights = 2 * 12 * 36 * 36;
    assert_eq!(bytes("tetrajet,ema=0.998") - bytes("tetrajet"), 4 * weights);
    assert!("tetrajet,ema=0.998".parse::<Recipe>().unwrap().ema() == Some(0.998));
}
