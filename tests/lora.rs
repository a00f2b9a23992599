//! Adapters beside linear layers: what PEFT makes of the same (see tests/oracle/README.md;
//! `MXT_LORA_ORACLE` names another folder), weights that stay to the bit, files.

#[path = "common/engines.rs"]
mod engines;
#[path = "common/expected.rs"]
mod expected;
#[path = "common/ranks.rs"]
mod ranks;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use engines::{engines, is_gpu};
use expected::{read, relative_error};
use mxfp4train::{
    Batch, Dataset, Engine, Error, GenerateOptions, IGNORED, Lora, MemoryFiles, Model, ModelConfig,
    Optimizer, Recipe, Recompute, Schedule, StoredWeights, Trainer, TrainerOptions, plan,
};
use ranks::on_sharded_engines;

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 61,
        context_length: 16,
        layers: 3,
        heads: 2,
        channels: 64,
        ..ModelConfig::default()
    }
}

fn data() -> Dataset {
    Dataset::from_tokens((0..4000).map(|i| i * i % 59).collect()).unwrap()
}

fn options(recipe: &str) -> TrainerOptions {
    TrainerOptions {
        batch_size: 3,
        recipe: recipe.parse().unwrap(),
        schedule: Schedule { total_steps: 100, ..Schedule::default() },
        ..TrainerOptions::default()
    }
}

fn tensors(model: &Model) -> BTreeMap<String, Vec<f32>> {
    let read = |info: &mxfp4train::TensorInfo| {
        let mut values = vec![0.0; info.len()];
        model.read_tensor(&info.name, &mut values).unwrap();
        (info.name.clone(), values)
    };
    model.tensors().iter().map(read).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// That all tensors of `base` are in `other`, to the bit.
#[track_caller]
fn has_all_of(other: &Model, base: &Model) {
    let (other, base) = (tensors(other), tensors(base));
    for (name, values) in &base {
        assert_eq!(bits(values), bits(&other[name]), "{name}");
    }
}

/// Adapters that do something, as if they had been trained.
fn moved(model: &Model) {
    for info in model.tensors().iter().filter(|info| info.name.ends_with("lora_B.weight")) {
        let values: Vec<_> =
            (0..info.len()).map(|i| ((i * 7 + 3) % 11) as f32 * 0.2 - 1.0).collect();
        model.write_tensor(&info.name, &values).unwrap();
    }
}

#[test]
fn oracle_of_losses_gradients_and_logits() {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/gpt2-variant");
    let folder = std::env::var_os("MXT_LORA_ORACLE").map_or(default, PathBuf::from);
    let expected = read(folder.join("lora/expected.safetensors"));
    let tokens: Vec<u32> = expected["tokens"].iter().map(|token| *token as u32).collect();
    for engine in engines() {
        let bound = if is_gpu(&engine) { 1e-3 } else { 1e-4 };
        let base = Model::load(&engine, &folder).unwrap();
        let model = base.load_lora(&folder.join("lora")).unwrap();
        let vocab = model.config().vocab_size;
        let length = expected["length"][0] as usize;
        let rows = tokens.len() / length;
        for (model, logits) in [(&model, "logits"), (&model.merge_lora().unwrap(), "merged")] {
            for (row, exact) in expected[logits].chunks(vocab).enumerate() {
                let mut ours = vec![0.0; vocab];
                let context = &tokens[row / length * length..=row];
                model.next_logits(context, &mut ours).unwrap();
                let error = relative_error(&ours, exact);
                assert!(error <= bound, "{logits} {row}: {error:e}");
            }
        }
        for recompute in [Recompute::Nothing, Recompute::Pointwise, Recompute::Block] {
            let options = TrainerOptions {
                batch_size: rows,
                sequence_length: length,
                recompute,
                ..options("fp32")
            };
            let mut trainer = Trainer::new(&model, options).unwrap();
            let next = |row: &[u32]| [&row[1..], &[IGNORED]].concat();
            let targets: Vec<_> = tokens.chunks(length).flat_map(next).collect();
            let batch = Batch { tokens: &tokens, targets: &targets, ..Batch::default() };
            trainer.forward_backward(batch, None).unwrap();
            for info in model.tensors() {
                let mut ours = vec![f32::NAN; info.len()];
                let result = trainer.read_gradient(&info.name, &mut ours);
                let Some(exact) = expected.get(&format!("grad.{}", info.name)) else {
                    assert!(result.unwrap_err().to_string().contains("is frozen"));
                    continue;
                };
                result.unwrap();
                let error = relative_error(&ours, exact);
                println!("{} {error:.1e}", info.name);
                assert!(error <= bound, "{}: {error:e}", info.name);
            }
            trainer.set_lr(Some(0.0)).unwrap();
            let loss = trainer.update().unwrap().loss;
            let exact = expected["loss"][0];
            assert!((f64::from(loss) - exact).abs() <= bound, "{loss} {exact}");
        }
    }
}

/// In every recipe: what trains is the adapters, and everything else stays to the bit.
#[test]
fn adapters_alone_move() {
    for engine in engines() {
        let base = Model::new(&engine, &config()).unwrap();
        let lora = Lora { rank: 4, alpha: 8.0, ..Lora::default() };
        for recipe in Recipe::NAMES {
            let model = base.with_lora(lora).unwrap();
            let before = tensors(&model);
            let mut trainer = Trainer::new(&model, options(recipe)).unwrap();
            let data = data();
            trainer.set_lr(Some(1e-2)).unwrap();
            let first = trainer.step(&data).unwrap().loss;
            let mut last = first;
            for _ in 0..12 {
                last = trainer.step(&data).unwrap().loss;
            }
            assert!(last < first - 0.01, "{recipe}: {first} to {last}");
            has_all_of(&model, &base);
            for (name, values) in tensors(&model).iter().filter(|(name, _)| name.contains("lora")) {
                assert_ne!(bits(values), bits(&before[name]), "{recipe}: {name} has not moved");
            }
        }
    }
}

/// Adapters that are 0 add nothing: losses are those of the model.
#[test]
fn new_adapters_change_no_loss() {
    for engine in engines() {
        let base = Model::new(&engine, &config()).unwrap();
        for layers in ["all", "attn.c_attn", "mlp.c_fc,mlp.c_proj"] {
            let lora = Lora { layers: Lora::layers_of(layers).unwrap(), ..Lora::default() };
            let adapted = base.with_lora(lora).unwrap();
            has_all_of(&adapted, &base);
            for recipe in ["fp32", "bf16", "fp8-mxfp4-rht-sr"] {
                let loss = |model: &Model| {
                    let mut trainer = Trainer::new(model, options(recipe)).unwrap();
                    trainer.eval(&data(), 3).unwrap().loss
                };
                assert_eq!(loss(&base).to_bits(), loss(&adapted).to_bits(), "{recipe}, {layers}");
            }
        }
    }
}

#[test]
fn a_decoder_writes_what_whole_passes_do() {
    for engine in engines() {
        let model = Model::new(&engine, &config()).unwrap().with_lora(Lora::default()).unwrap();
        moved(&model);
        let generate = GenerateOptions { max_tokens: 12, temperature: 0.0, ..Default::default() };
        let written = model.generate(&[1, 2, 3], &generate, &mut |_| true).unwrap();
        let mut context = vec![1, 2, 3];
        for token in &written.tokens {
            let mut logits = vec![0.0; 61];
            model.next_logits(&context, &mut logits).unwrap();
            let best = (0..61).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
            assert_eq!(best, *token as usize, "behind {context:?}");
            context.push(*token);
        }
        let other = Model::new(&engine, &config())
            .unwrap()
            .generate(&[1, 2, 3], &generate, &mut |_| true)
            .unwrap();
        assert_ne!(other.tokens, written.tokens, "adapters do nothing");
    }
}

#[test]
fn a_resumed_run_goes_on_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    for engine in engines() {
        let base = Model::new(&engine, &config()).unwrap();
        // Of muon nothing is left that has a second moment.
        for (recipe, optimizer) in [
            ("fp32", "adamw"),
            ("fp8-mxfp4-rht-sr", "adamw,moments=int8"),
            ("bf16", "muon"),
            ("fp8", "muon,moments=int8"),
        ] {
            let model = base.with_lora(Lora { rank: 3, ..Lora::default() }).unwrap();
            let (data, folder) = (data(), dir.path().join(recipe));
            let optimizer = optimizer.parse().unwrap();
            let options = TrainerOptions { optimizer, ..options(recipe) };
            let mut trainer = Trainer::new(&model, options).unwrap();
            for _ in 0..3 {
                trainer.step(&data).unwrap();
            }
            trainer.save(&folder).unwrap();
            let expected: Vec<_> = (0..3).map(|_| trainer.step(&data).unwrap().loss).collect();
            let mut again = Trainer::load(&engine, &folder).unwrap();
            assert_eq!(again.model().config(), model.config());
            let losses: Vec<_> = (0..3).map(|_| again.step(&data).unwrap().loss).collect();
            assert_eq!(bits(&losses), bits(&expected));
            has_all_of(again.model(), &model);
            // A model of it alone, too, and as other numbers.
            has_all_of(&Model::load(&engine, &folder).unwrap(), &base);
            let stored = dir.path().join("stored");
            model.save_as(&stored, StoredWeights::Bf16).unwrap();
            assert_eq!(Model::load(&engine, &stored).unwrap().config(), model.config());
        }
    }
}

#[test]
fn adapters_survive_their_files() {
    let dir = tempfile::tempdir().unwrap();
    for engine in engines() {
        let base = Model::new(&engine, &config()).unwrap();
        let layers = Lora::layers_of("attn.c_proj,mlp.c_fc").unwrap();
        for alpha in [16.0, 0.7] {
            let model = base.with_lora(Lora { rank: 7, alpha, layers }).unwrap();
            moved(&model);
            model.save_lora(dir.path()).unwrap();
            let again = base.load_lora(dir.path()).unwrap();
            assert_eq!(again.config(), model.config());
            has_all_of(&again, &model);
            let mut files = MemoryFiles::new();
            model.save_lora_to(&mut files).unwrap();
            for name in files.names() {
                assert_eq!(files.get(name).unwrap(), fs::read(dir.path().join(name)).unwrap());
            }
            assert_eq!(files.names().len(), 2);
            has_all_of(&base.load_lora_from(&files).unwrap(), &model);
            files.remove("adapter_model.safetensors");
            refused(base.load_lora_from(&files), "adapter_model.safetensors");
        }
    }
}

#[test]
fn ranks_train_the_same_adapters() {
    let run = |engine: &Engine| {
        let model = Model::new(engine, &config()).unwrap().with_lora(Lora::default()).unwrap();
        let options = TrainerOptions { accumulation: 4, lanes: 4, ..options("fp8-mxfp4-rht-sr") };
        let mut trainer = Trainer::new(&model, options).unwrap();
        let losses: Vec<_> = (0..3).map(|_| trainer.step(&data()).unwrap().loss).collect();
        (bits(&losses), tensors(&model))
    };
    let alone = run(&engines()[0]);
    for of_rank in on_sharded_engines(2, run) {
        assert_eq!(of_rank, alone);
    }
}

#[test]
fn nothing_else_takes_memory() {
    let engine = &engines()[0];
    let config = ModelConfig { layers: 6, channels: 128, ..config() };
    let base = plan(engine, &config, &options("fp32")).unwrap();
    let adapted = ModelConfig { lora: Some(Lora::default()), ..config.clone() };
    let lora = plan(engine, &adapted, &options("fp32")).unwrap();
    let adapters = adapted.parameter_count() - config.parameter_count();
    assert!(lora.gradients < 2 * 4 * adapters && lora.gradients < base.gradients / 5);
    assert!(lora.optimizer < base.optimizer / 5, "{lora:?}");
}

/// A message of an error.
#[track_caller]
fn refused<T>(result: mxfp4train::Result<T>, words: &str) {
    let error = result.err().expect(words);
    assert!(error.to_string().contains(words), "{words}: {error}");
}

#[test]
fn what_makes_no_adapters_is_refused() {
    let engine = &engines()[0];
    let base = Model::new(engine, &config()).unwrap();
    let lora = Lora::default();
    refused(base.with_lora(Lora { rank: 0, ..lora }), "lora rank");
    refused(base.with_lora(Lora { rank: 1 << 40, ..lora }), "lora rank");
    refused(base.with_lora(Lora { alpha: f32::NAN, ..lora }), "lora alpha");
    refused(base.with_lora(Lora { alpha: -1.0, ..lora }), "lora alpha");
    refused(base.with_lora(Lora { layers: [false; 4], ..lora }), "lora layers");
    refused(Lora::layers_of("c_attn"), "attn.c_attn");
    refused(base.merge_lora(), "adapters");
    refused(base.save_lora(Path::new("/nowhere")), "adapters");
    let adapted = base.with_lora(lora).unwrap();
    refused(adapted.with_lora(lora), "merge");
    let ramping: Optimizer = "adamw,ramping=10".parse().unwrap();
    let ramping = TrainerOptions { optimizer: ramping, ..options("tetrajet") };
    refused(Trainer::new(&adapted, ramping).map(drop), "ramping");
}

#[test]
fn files_of_other_adapters_are_refused() {
    let engine = &engines()[0];
    let base = Model::new(engine, &config()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    base.with_lora(Lora::default()).unwrap().save_lora(dir).unwrap();
    let path = dir.join("adapter_config.json");
    let text = fs::read_to_string(&path).unwrap();
    for (from, to, words) in [
        ("\"LORA\"", "\"IA3\"", "peft_type"),
        ("\"use_dora\": false", "\"use_dora\": true", "use_dora"),
        ("\"use_rslora\": false", "\"use_rslora\": true", "use_rslora"),
        ("\"none\"", "\"all\"", "bias"),
        ("\"rank_pattern\": {}", "\"rank_pattern\": {\"c_attn\": 3}", "rank_pattern"),
        ("\"init_lora_weights\": true", "\"init_lora_weights\": \"pissa\"", "init_lora_weights"),
        ("\"attn.c_attn\",", "", "target_modules"),
        ("{", "{ \"alora_invocation_tokens\": [7],", "alora_invocation_tokens"),
        ("\"r\": 8", "\"r\": -8", "r: expected a whole number"),
        ("\"r\": 8", "\"r\": 9", "shape"),
        ("\"r\": 8", "\"r\": 16000", "has only"),
        ("\"lora_alpha\": 16", "\"lora_alpha\": null", "lora_alpha"),
        ("{", "", "JSON"),
    ] {
        assert!(text.contains(from), "{from}");
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        refused(base.load_lora(dir), words);
    }
    fs::write(&path, &text).unwrap();
    base.load_lora(dir).unwrap();
    // Another model, a damaged file, none.
    let other = Model::new(engine, &ModelConfig { channels: 32, ..config() }).unwrap();
    refused(other.load_lora(dir), "shape");
    let fewer = Model::new(engine, &ModelConfig { layers: 2, ..config() }).unwrap();
    refused(fewer.load_lora(dir), "h.2.");
    let more = Model::new(engine, &ModelConfig { layers: 4, ..config() }).unwrap();
    refused(more.load_lora(dir), "h.3.");
    let path = dir.join("adapter_model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for cut in [0, 7, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..cut]).unwrap();
        assert!(matches!(base.load_lora(dir), Err(Error::Format { .. } | Error::Mismatch { .. })));
    }
    fs::remove_file(&path).unwrap();
    assert!(matches!(base.load_lora(dir), Err(Error::Io { .. })));
    // Nobody writes to it.
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    refused(base.load_lora(dir), "pipe");
}

#[test]
fn what_is_beyond_f32_is_not_merged() {
    let engine = &engines()[0];
    let model = Model::new(engine, &config()).unwrap().with_lora(Lora::default()).unwrap();
    for matrix in ["lora_A", "lora_B"] {
        let name = format!("transformer.h.1.mlp.c_fc.{matrix}.weight");
        let len = model.tensors().iter().find(|info| info.name == name).unwrap().len();
        model.write_tensor(&name, &vec![3e38; len]).unwrap();
    }
    assert!(matches!(model.merge_lora(), Err(Error::NotFinite { .. })));
}
