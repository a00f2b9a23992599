//! Frozen tensors stay as they are to the bit, take nothing, and change nothing of how all others move.

#[path = "common/engines.rs"]
#[allow(dead_code, reason = "not all tests need all of it")]
mod engines;
#[path = "common/ranks.rs"]
mod ranks;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use engines::engines;
use mxfp4train::{
    Dataset, Engine, EngineOptions, Error, Frozen, Model, ModelConfig, Optimizer, Schedule,
    Trainer, TrainerOptions, plan,
};
use ranks::{on_engines, on_sharded_engines};

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 61,
        context_length: 16,
        layers: 2,
        heads: 2,
        channels: 64,
        ..ModelConfig::default()
    }
}

fn data() -> Dataset {
    Dataset::from_tokens((0..4000).map(|i| i * i % 59).collect()).unwrap()
}

/// Without clipping, which looks at all gradients together.
fn options(recipe: &str, optimizer: &str, frozen: &str) -> TrainerOptions {
    let optimizer = Optimizer { clip: 0.0, ..optimizer.parse().unwrap() };
    TrainerOptions {
        batch_size: 3,
        recipe: recipe.parse().unwrap(),
        optimizer,
        frozen: frozen.parse().unwrap(),
        ..TrainerOptions::default()
    }
}

fn tensors(model: &Model) -> BTreeMap<String, Vec<u32>> {
    let read = |info: &mxfp4train::TensorInfo| {
        let mut values = vec![0.0; info.len()];
        model.read_tensor(&info.name, &mut values).unwrap();
        (info.name.clone(), values.iter().map(|v| v.to_bits()).collect())
    };
    model.tensors().iter().map(read).collect()
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    entries.map(|path| (name(&path), fs::read(&path).unwrap())).collect()
}

/// Weights, biases and tables by themselves, whole blocks, and all but the norms.
const PATTERNS: [&str; 8] = [
    "transformer.wte.weight",
    "transformer.wpe.*",
    "*.c_attn.weight, *.mlp.c_fc.weight",
    "*.c_proj.bias",
    "*.ln_1.weight,*.ln_2.bias",
    "transformer.h.0.*",
    "transformer.h.?.attn.*,transformer.h.?.mlp.*,transformer.w*",
    "lm_head.weight,*.[a-l]*",
];

#[test]
fn all_else_moves_as_it_did() {
    let recipes = ["fp32", "bf16", "mxfp4-rht-sr", "fp8-mxfp4-rht-sr", "nvidia-nvfp4", "tetrajet"];
    let optimizers =
        ["adamw", "muon", "stable-adamw,moments=bf16", "adamw,moments=int8", "stable-spam"];
    for engine in engines() {
        let is_cpu = engine.device() == "cpu";
        for (i, frozen) in PATTERNS.into_iter().enumerate() {
            let of_head = frozen.contains("lm_head");
            for (recipe, optimizer) in
                recipes.into_iter().zip(optimizers.iter().cycle().skip(i)).skip(i % 2)
            {
                let config = ModelConfig { tied_head: !of_head, ..config() };
                let train = |frozen: &str| {
                    let model = Model::new(&engine, &config).unwrap();
                    let before = tensors(&model);
                    let mut trainer =
                        Trainer::new(&model, options(recipe, optimizer, frozen)).unwrap();
                    let stats = trainer.step(&data()).unwrap();
                    (before, tensors(&model), stats)
                };
                let what = format!("{} {recipe} {optimizer} {frozen}", engine.device());
                let ((before, with, of), (_, without, plain)) = (train(frozen), train(""));
                assert_eq!(of.loss.to_bits(), plain.loss.to_bits(), "{what}");
                assert!(of.grad_norm < plain.grad_norm, "{what}: {of:?} {plain:?}");
                let patterns = frozen.split(',').map(str::trim);
                let patterns: Vec<_> =
                    patterns.map(|text| glob::Pattern::new(text).unwrap()).collect();
                let mut counts = [0; 2];
                for (name, values) in &with {
                    let is_frozen = patterns.iter().any(|pattern| pattern.matches(name));
                    counts[usize::from(is_frozen)] += 1;
                    if is_frozen {
                        assert!(values == &before[name], "{what}: {name} has moved");
                        continue;
                    }
                    // The sum of a bias is another one where no product reads dy for a weight.
                    let alone = name.strip_suffix("bias").map(|of| format!("{of}weight"));
                    let alone = alone.is_some_and(|of| patterns.iter().any(|p| p.matches(&of)));
                    if !alone || (is_cpu && recipe == "fp32") {
                        assert!(values == &without[name], "{what}: {name} differs");
                    } else {
                        assert!(values != &before[name], "{what}: {name} has not moved");
                    }
                }
                assert!(counts[0] > 0 && counts[1] > 0, "{what}");
            }
        }
    }
}

/// What is frozen has neither gradients nor states, in the plan, in memory and in files.
#[test]
fn what_is_frozen_takes_nothing() {
    for engine in engines() {
        let [all, some] = ["", "transformer.h.*"]
            .map(|frozen| plan(&engine, &config(), &options("bf16", "adamw", frozen)).unwrap());
        let of_blocks = config().parameter_count() - (61 + 16 + 2) * 64;
        // On a GPU there is more between tensors.
        let between = if engine.device() == "cpu" { 1 } else { 24 * 256 };
        let is_near = |bytes: u64, exact: u64| (exact..exact + between).contains(&bytes);
        assert!(is_near(all.gradients - some.gradients, 4 * of_blocks));
        assert!(is_near((all.optimizer - some.optimizer) / 2, 4 * of_blocks));
        assert_eq!(all.weights, some.weights);

        let model = Model::new(&engine, &config()).unwrap();
        let mut trainer =
            Trainer::new(&model, options("bf16", "adamw", "transformer.h.*")).unwrap();
        assert_eq!(trainer.plan(), some);
        trainer.step(&data()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        trainer.save(folder.path()).unwrap();
        let states = fs::read(folder.path().join("trainer.safetensors")).unwrap();
        let states = safetensors::SafeTensors::deserialize(&states).unwrap();
        assert_eq!(states.len(), 2 * 4, "{:?}", states.names());
        let mut gradient = [0.0; 64];
        trainer.read_gradient("transformer.ln_f.weight", &mut gradient).unwrap();
        for error in [
            trainer.read_gradient("transformer.h.0.ln_1.bias", &mut gradient).unwrap_err(),
            trainer.write_gradient("transformer.h.0.ln_1.bias", &gradient).unwrap_err(),
        ] {
            assert!(error.to_string().contains("transformer.h.0.ln_1.bias is frozen"), "{error}");
        }
    }
}

#[test]
fn a_run_goes_on_as_if_it_had_not_stopped() {
    for engine in engines() {
        for (recipe, optimizer) in
            [("mxfp4-rht-sr", "adamw,moments=int8"), ("fp8", "muon"), ("bf16", "stable-spam")]
        {
            let made = || {
                let model = Model::new(&engine, &config()).unwrap();
                let options = options(recipe, optimizer, "*.c_fc.*,transformer.wpe.weight");
                Trainer::new(&model, options).unwrap()
            };
            let folder = tempfile::tempdir().unwrap();
            let (mut whole, mut first) = (made(), made());
            for _ in 0..4 {
                whole.step(&data()).unwrap();
            }
            for _ in 0..2 {
                first.step(&data()).unwrap();
            }
            first.save(folder.path()).unwrap();
            let mut second = Trainer::load(&engine, folder.path()).unwrap();
            assert_eq!(second.options().frozen.to_string(), "*.c_fc.*,transformer.wpe.weight");
            for _ in 0..2 {
                second.step(&data()).unwrap();
            }
            assert!(tensors(whole.model()) == tensors(second.model()), "{recipe} {optimizer}");
        }
    }
}

/// Also where they share the states of what is left.
#[test]
fn ranks_freeze_alike() {
    for shards in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let of_size = |size: usize| {
            let dir = folder.path().join(format!("{size}"));
            let work = |engine: &Engine| {
                let options = TrainerOptions {
                    lanes: 2,
                    ..options("mxfp4-rht-sr", "adamw", "transformer.wte.weight,*.1.mlp.*,*.0.ln*")
                };
                let model = Model::new(engine, &config()).unwrap();
                let mut trainer = Trainer::new(&model, options).unwrap();
                let steps = (0..4).map(|_| trainer.step(&data()).unwrap());
                let losses: Vec<_> = steps.map(|of| (of.loss, of.grad_norm)).collect();
                trainer.save(&dir).unwrap();
                losses
            };
            let all = match shards {
                true => on_sharded_engines(size, work),
                false => on_engines(size, work),
            };
            assert!(all.iter().all(|one| *one == all[0]));
            (all[0].clone(), files(&dir))
        };
        let (one, two) = (of_size(1), of_size(2));
        assert_eq!(one.0, two.0);
        assert!(one.1 == two.1, "files differ");
    }
}

/// Bounds of weights that a trainer of some tensors keeps are no bounds of all: who moves all of them
/// finds them anew.
#[test]
fn another_trainer_of_all_tensors_sees_large_weights() {
    let engine = Engine::new(EngineOptions::default()).unwrap();
    let model = Model::new(&engine, &config()).unwrap();
    let mut some = Trainer::new(&model, options("fp32", "adamw", "*.ln_f.bias")).unwrap();
    let mut bias = [0.0; 64];
    bias[3] = 3.0e38;
    some.step(&data()).unwrap();
    model.write_tensor("transformer.ln_f.bias", &bias).unwrap();
    // Its trainer has to look once more, and then knows.
    for _ in 0..2 {
        let failed = some.step(&data()).unwrap_err();
        assert!(matches!(failed, Error::NotFinite { .. }), "{failed}");
    }
    bias[3] = 0.5;
    model.write_tensor("transformer.ln_f.bias", &bias).unwrap();
    some.step(&data()).unwrap();
    let all = TrainerOptions { frozen: Frozen::default(), ..some.options().clone() };
    let mut all = Trainer::new(&model, all).unwrap();
    for _ in 0..3 {
        all.step(&data()).unwrap();
    }
    for _ in 0..3 {
        some.step(&data()).unwrap();
    }
    for _ in 0..3 {
        all.step(&data()).unwrap();
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let engine = Engine::new(EngineOptions::default()).unwrap();
    let model = Model::new(&engine, &config()).unwrap();
    let made = |recipe, optimizer, frozen| {
        Trainer::new(&model, options(recipe, optimizer, frozen)).unwrap_err().to_string()
    };
    let unknown = made("bf16", "adamw", "transformer.wte.*,h.0.*");
    assert!(
        unknown.contains("\"h.0.*\"") && unknown.contains("transformer.wte.weight"),
        "{unknown}"
    );
    assert!(made("bf16", "adamw", "*").contains("some tensor is trained"));
    assert!(made("tetrajet", "adamw,ramping=3", "*.ln_f.*").contains("ramping"));
    let schedule = Schedule { total_steps: 10, ..Schedule::default() };
    let reset = "tetrajet,ema=0.99,reset=4:2:2@0.0";
    let resetting = TrainerOptions { schedule, ..options(reset, "adamw", "*.ln_f.*") };
    assert!(Trainer::new(&model, resetting).unwrap_err().to_string().contains("take reset out"));
    for text in ["a,,b", "[", "a,"] {
        let error = text.parse::<Frozen>().unwrap_err().to_string();
        assert!(error.contains("frozen"), "{error}");
    }
    assert!("".parse::<Frozen>().unwrap().is_empty());
}
