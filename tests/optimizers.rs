//! Every optimizer through the public interface: a run that is saved and resumed goes on bit for
//! bit, on any number of threads; a step that is not finite changes nothing; files of AdamW say
//! nothing of it.

#[path = "common/tiny.rs"]
mod tiny;

use std::fs;

use mxfp4train::{Error, Optimizer, OptimizerKind, Schedule, Trainer, TrainerOptions};
use tiny::{data, engine, losses, model, weights};

/// A high beta2, with which rates of StableAdamW fall.
fn options(kind: OptimizerKind) -> TrainerOptions {
    TrainerOptions {
        batch_size: 3,
        accumulation: 2,
        optimizer: Optimizer { beta2: 0.999, ..Optimizer::new(kind) },
        schedule: Schedule { lr: 3e-3, ..Schedule::default() },
        ..TrainerOptions::default()
    }
}

#[test]
fn runs_go_on_where_they_were_saved() {
    let mut runs = Vec::new();
    for kind in OptimizerKind::ALL {
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
        let named = format!("\"kind\": \"{kind}\"");
        assert_eq!(text.contains(&named), kind != OptimizerKind::AdamW, "{text}");
        runs.push(all);
    }
    // The first update has the whole rate.
    assert!((runs[0][1] - runs[1][1]).abs() < 1e-4, "{runs:?}");
    assert!((runs[0][11] - runs[1][11]).abs() > 1e-4, "{runs:?}");
}

#[test]
fn an_unknown_optimizer_in_a_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let kind = OptimizerKind::StableAdamW;
    let mut trainer = Trainer::new(&model(&engine(1)), options(kind)).unwrap();
    trainer.save(folder.path()).unwrap();
    let path = folder.path().join("trainer.json");
    let text = fs::read_to_string(&path).unwrap().replace("stable-adamw", "sophia");
    let kept: Vec<_> = text.lines().filter(|line| !line.starts_with("  \"crc32\"")).collect();
    fs::write(&path, kept.join("\n").replace("},\n}", "}\n}")).unwrap();
    let error = Trainer::load(&engine(1), folder.path()).unwrap_err().to_string();
    assert!(error.contains("expected one of adamw, stable-adamw; got \"sophia\""), "{error}");
}

#[test]
fn a_step_that_is_not_finite_changes_nothing() {
    for kind in OptimizerKind::ALL {
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
