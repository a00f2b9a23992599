//! Training on a GPU: against PyTorch's oracle, against the CPU backend, against itself.
//!
//! Without a GPU (or a driver, or NVRTC) every test says so and passes.

#[path = "common/ranks.rs"]
mod ranks;

use std::collections::HashMap;
use std::path::Path;

use mxfp4train::{
    Activation, Dataset, Decoder, DecoderOptions, DecoderWeights, Draft, Engine, EngineOptions,
    Error, GenerateOptions, Master, Model, ModelConfig, Optimizer, OptimizerKind, Recipe, Schedule,
    Trainer, TrainerOptions, Transport, Wire,
};
use safetensors::{Dtype, SafeTensors};

/// An engine on the first GPU, or None after a line that says why there is none.
fn gpu() -> Option<Engine> {
    match engine("cuda") {
        Ok(engine) => Some(engine),
        Err(error @ Error::Unsupported { .. }) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn engine(device: &str) -> mxfp4train::Result<Engine> {
    Engine::new(EngineOptions { device: device.into(), ..EngineOptions::default() })
}

/// Prose, as bytes: what this project's documents said one day. NOTE: not what they say now, for
/// bounds of these tests were measured with it, and documents may change without a look at a GPU.
fn text() -> Dataset {
    let bytes = std::fs::read("tests/text/prose.txt").unwrap();
    Dataset::from_tokens(bytes.into_iter().map(u32::from).collect()).unwrap()
}

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 256,
        context_length: 128,
        layers: 3,
        heads: 4,
        channels: 256,
        ..ModelConfig::default()
    }
}

fn options(recipe: &str) -> TrainerOptions {
    TrainerOptions {
        batch_size: 8,
        recipe: recipe.parse().unwrap(),
        // Without a warm-up, the first updates are chaotic, and no two number formats agree on
        // them.
        schedule: Schedule { lr: 3e-4, warmup_steps: 50, total_steps: 500, ..Schedule::default() },
        ..TrainerOptions::default()
    }
}

/// All names, and what rounds like none of them.
fn recipes() -> impl Iterator<Item = &'static str> {
    Recipe::NAMES.into_iter().chain(["mxfp4-rht,range=3/4"])
}

fn train(engine: &Engine, recipe: &str, steps: usize) -> Vec<(f32, f32)> {
    let model = Model::new(engine, &config()).unwrap();
    let mut trainer = Trainer::new(&model, options(recipe)).unwrap();
    let data = text();
    let mut numbers = |_| {
        let stats = trainer.step(&data).unwrap();
        (stats.loss, stats.grad_norm)
    };
    (0..steps).map(&mut numbers).collect()
}

/// Losses of PyTorch in f32 within 1e-4, every gradient within 1e-3.
#[test]
fn fp32_is_pytorchs_oracle() {
    let Some(engine) = gpu() else { return };
    if let Ok(folder) = std::env::var("MXT_ORACLE") {
        return check_oracle(&engine, Path::new(&folder));
    }
    let gpt2 = ["gpt2-tiny", "gpt2-variant", "gpt2-unscaled"];
    let llama = ["llama-tiny", "llama-stretched", "qwen2-odd", "qwen3-tiny"];
    for name in gpt2.into_iter().chain(llama) {
        check_oracle(&engine, &Path::new("tests/oracle").join(name));
    }
}

fn check_oracle(engine: &Engine, folder: &Path) {
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    let number = |key: String| metadata[&key].parse::<f32>().unwrap();
    let expected: HashMap<String, (Vec<usize>, Vec<f64>)> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| {
            let words = view.data().as_chunks::<4>().0.iter().copied();
            let values = match view.dtype() {
                Dtype::F32 => words.map(|w| f64::from(f32::from_le_bytes(w))).collect(),
                Dtype::I32 => words.map(|w| f64::from(i32::from_le_bytes(w))).collect(),
                other => panic!("{name} has dtype {other:?}"),
            };
            (name.to_owned(), (view.shape().to_vec(), values))
        })
        .collect();
    let (shape, tokens) = &expected["tokens"];
    let tokens: Vec<u32> = tokens.iter().map(|t| *t as u32).collect();

    let model = Model::load(engine, folder).unwrap();
    let mut options = TrainerOptions {
        batch_size: shape[0],
        sequence_length: shape[1] - 1,
        recipe: "fp32".parse().unwrap(),
        schedule: Schedule { lr: 1e-3, ..Schedule::default() },
        ..TrainerOptions::default()
    };
    options.optimizer.clip = 0.5;
    let mut trainer = Trainer::new(&model, options).unwrap();
    for step in 0..3 {
        let stats = trainer.step_tokens(&tokens).unwrap();
        let (loss, norm) = (number(format!("loss_{step}")), number(format!("grad_norm_{step}")));
        println!("step {step}: loss {} ({loss}), norm {} ({norm})", stats.loss, stats.grad_norm);
        assert!((stats.loss - loss).abs() <= 1e-4);
        assert!((stats.grad_norm - norm).abs() <= 1e-3 * norm);
        if step > 0 {
            continue;
        }
        let mut worst = 0.0f64;
        let of_file = |name: &String| name.strip_prefix("grad.").map(str::to_owned);
        for name in expected.keys().filter_map(of_file) {
            let exact = &expected[&format!("grad.{name}")].1;
            let mut gradient = vec![0.0; exact.len()];
            trainer.read_gradient(&name, &mut gradient).unwrap();
            let difference: f64 =
                gradient.iter().zip(exact).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
            let error = (difference / exact.iter().map(|b| b * b).sum::<f64>()).sqrt();
            assert!(error <= 1e-3, "{name}: {error:e}");
            worst = worst.max(error);
        }
        println!("largest relative error of a gradient: {worst:.1e}");
    }
}

/// 200 steps on real text: bf16 losses within 0.5% of the CPU's.
#[test]
fn bf16_losses_are_those_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let ours = train(&gpu, "bf16", 200);
    let theirs = train(&engine("cpu").unwrap(), "bf16", 200);
    let mut worst = 0.0f32;
    for (step, ((ours, _), (theirs, _))) in ours.iter().zip(&theirs).enumerate() {
        let difference = (ours / theirs - 1.0).abs();
        assert!(difference <= 0.005, "step {step}: {ours} instead of {theirs}");
        worst = worst.max(difference);
    }
    println!("loss {} after 200 steps, largest difference {:.3}%", ours[199].0, worst * 100.0);
}

/// Every recipe learns, at the pace of the CPU, and twice the same bit for bit.
#[test]
fn every_recipe_learns_and_repeats_itself() {
    let Some(gpu) = gpu() else { return };
    let cpu = engine("cpu").unwrap();
    for recipe in recipes() {
        let first = train(&gpu, recipe, 30);
        let again = train(&gpu, recipe, 30);
        assert!(first == again, "{recipe}: two runs differ");
        let (ours, theirs) = (first[29].0, train(&cpu, recipe, 30)[29].0);
        println!("{recipe}: {ours} after 30 steps, {theirs} on the CPU");
        assert!((ours / theirs - 1.0).abs() <= 0.03, "{recipe}: {ours} instead of {theirs}");
    }
}

/// What is computed again is what was computed the first time.
#[test]
fn recomputing_changes_no_bit() {
    let Some(gpu) = gpu() else { return };
    let data = text();
    // In fp8 what is not computed again lies turned, and is read in no other form.
    for recipe in ["bf16", "fp8"] {
        let results = ["nothing", "pointwise", "block"].map(|recompute| {
            let model = Model::new(&gpu, &config()).unwrap();
            let recompute = recompute.parse().unwrap();
            let mut trainer =
                Trainer::new(&model, TrainerOptions { recompute, ..options(recipe) }).unwrap();
            let losses: Vec<_> = (0..5).map(|_| trainer.step(&data).unwrap().loss).collect();
            println!("{recipe}, {recompute}: {} bytes", trainer.plan().total());
            losses
        });
        assert!(results[1..].iter().all(|losses| *losses == results[0]), "{recipe}: {results:?}");
    }
}

/// Blocks that see a part of each sequence see that of the CPU, in recorded steps too: in f32 losses
/// within 1e-4 and norms within 1e-3. What is computed again, and a stop, change no bit.
#[test]
fn dropping_tokens_is_that_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let (cpu, data) = (engine("cpu").unwrap(), text());
    let trainer = |engine: &Engine, recipe: &str, recompute: &str| {
        let model = Model::new(engine, &ModelConfig { layers: 4, ..config() }).unwrap();
        let token_drop = Some("start=16,steps=8,by=32".parse().unwrap());
        let recompute = recompute.parse().unwrap();
        let options = TrainerOptions { token_drop, recompute, ..options(recipe) };
        Trainer::new(&model, options).unwrap()
    };
    let steps = |trainer: &mut Trainer, count: usize| -> Vec<_> {
        let stats = (0..count).map(|_| trainer.step(&data).unwrap());
        stats.map(|stats| (stats.loss, stats.grad_norm)).collect()
    };
    for recipe in recipes() {
        let ours = steps(&mut trainer(&gpu, recipe, "nothing"), 10);
        for recompute in ["pointwise", "block"] {
            let again = steps(&mut trainer(&gpu, recipe, recompute), 10);
            assert_eq!(again, ours, "{recipe}, {recompute}");
        }
        let mut stopped = trainer(&gpu, recipe, "nothing");
        assert_eq!(steps(&mut stopped, 5), ours[..5], "{recipe}");
        let folder = tempfile::tempdir().unwrap();
        stopped.save(folder.path()).unwrap();
        let mut resumed = Trainer::load(&gpu, folder.path()).unwrap();
        assert_eq!(steps(&mut resumed, 5), ours[5..], "{recipe}");

        let theirs = steps(&mut trainer(&cpu, recipe, "nothing"), 10);
        println!("{recipe}: {:?} after 10 steps, {:?} on the CPU", ours[9], theirs[9]);
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert!((ours.0 / theirs.0 - 1.0).abs() <= 0.03, "{recipe}: {ours:?}, {theirs:?}");
            if recipe == "fp32" {
                assert!((ours.0 - theirs.0).abs() <= 1e-4, "{ours:?}, {theirs:?}");
                assert!((ours.1 - theirs.1).abs() <= 1e-3 * theirs.1, "{ours:?}, {theirs:?}");
            }
        }
    }
}

/// Two steps, of which the second is recorded, of a model so small that a sanitizer gets through
/// with it; no tile divides its sequences.
#[test]
fn every_recipe_takes_two_steps() {
    let Some(engine) = gpu() else { return };
    let config = ModelConfig {
        vocab_size: 256,
        context_length: 72,
        layers: 1,
        heads: 1,
        channels: 64,
        ..ModelConfig::default()
    };
    let data = text();
    for recipe in recipes() {
        let model = Model::new(&engine, &config).unwrap();
        let options = TrainerOptions { batch_size: 2, ..options(recipe) };
        let mut trainer = Trainer::new(&model, options).unwrap();
        for _ in 0..2 {
            let stats = trainer.step(&data).unwrap();
            assert!(
                (4.0..7.0).contains(&stats.loss) && stats.grad_norm > 0.0,
                "{recipe}: {stats:?}"
            );
        }
    }
}

/// Trainers of one engine work at the same time, each as if it were alone: while one records its
/// step, the other meets products for the first time.
#[test]
fn trainers_of_one_engine_do_not_disturb_each_other() {
    let Some(engine) = gpu() else { return };
    let losses = |channels: usize| {
        let config = ModelConfig { channels, ..config() };
        let model = Model::new(&engine, &config).unwrap();
        let mut trainer = Trainer::new(&model, options("mxfp4-rht-sr")).unwrap();
        let data = text();
        [0; 4].map(|_| trainer.step(&data).unwrap().loss)
    };
    let sizes = [128, 192, 256, 320];
    // Together first: alone, they would meet all products before.
    let together = std::thread::scope(|scope| {
        let losses = &losses;
        sizes.map(|channels| scope.spawn(move || losses(channels))).map(|t| t.join().unwrap())
    });
    assert_eq!(together, sizes.map(losses));
}

/// A run that is saved, loaded and continued is the run that was not; accumulation included.
#[test]
fn resuming_changes_no_bit() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    for recipe in ["fp32", "bf16", "mxfp4-rht-sr", "fp8-mxfp4-rht-sr"] {
        let model = Model::new(&gpu, &config()).unwrap();
        let options = TrainerOptions { accumulation: 2, ..options(recipe) };
        let mut trainer = Trainer::new(&model, options).unwrap();
        let data = text();
        for _ in 0..3 {
            trainer.step(&data).unwrap();
        }
        trainer.save(&path).unwrap();
        let mut resumed = Trainer::load(&gpu, &path).unwrap();
        for _ in 0..3 {
            let (a, b) = (trainer.step(&data).unwrap(), resumed.step(&data).unwrap());
            assert_eq!((a.loss, a.grad_norm), (b.loss, b.grad_norm), "{recipe}");
        }
    }
}

/// What a model can differ in from GPT-2, at sizes that nothing divides and at sizes that tensor
/// cores like: every recipe trains it, as the processor does, repeats and resumes.
#[test]
fn variants_train_as_on_the_processor_and_resume() {
    let Some(gpu) = gpu() else { return };
    let cpu = engine("cpu").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let data = text();
    let all = ModelConfig {
        context_length: 32,
        mlp_channels: 37,
        activation: Activation::Gelu,
        tied_head: false,
        scale_attention_by_layer: true,
        ..config()
    };
    let even = ModelConfig { mlp_channels: 640, ..all.clone() };
    let odd = ModelConfig { channels: 60, heads: 3, scale_attention: false, ..all.clone() };
    let narrow = ModelConfig { mlp_channels: 5, tied_head: true, ..all.clone() };
    for config in [all, even, odd, narrow] {
        for recipe in Recipe::NAMES {
            let what = format!("{recipe}, {config:?}");
            let start = |engine: &Engine| {
                let options = TrainerOptions { accumulation: 2, ..options(recipe) };
                Trainer::new(&Model::new(engine, &config).unwrap(), options).unwrap()
            };
            let steps = |trainer: &mut Trainer, n: usize| -> Vec<f32> {
                (0..n).map(|_| trainer.step(&data).unwrap().loss).collect()
            };
            let mut trainer = start(&gpu);
            let first = steps(&mut trainer, 4);
            trainer.save(&path).unwrap();
            let rest = steps(&mut trainer, 3);
            assert_eq!(steps(&mut Trainer::load(&gpu, &path).unwrap(), 3), rest, "{what}");
            let all: Vec<_> = first.into_iter().chain(rest).collect();
            assert_eq!(steps(&mut start(&gpu), 7), all, "{what}: repeated");
            let bound = if recipe == "fp32" { 1e-4 } else { 2e-2 };
            for (ours, theirs) in all.iter().zip(steps(&mut start(&cpu), 7)) {
                assert!((ours - theirs).abs() < bound, "{what}: {ours} and {theirs}");
            }
            let loaded = Trainer::load(&cpu, &path).unwrap();
            assert_eq!(loaded.model().config(), &config, "{what}");
        }
    }
}

/// A checkpoint moves between the devices both ways.
#[test]
fn checkpoints_move_between_devices() {
    let Some(gpu) = gpu() else { return };
    let cpu = engine("cpu").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let data = text();
    for (from, to) in [(&gpu, &cpu), (&cpu, &gpu)] {
        let model = Model::new(from, &config()).unwrap();
        let mut trainer = Trainer::new(&model, options("bf16")).unwrap();
        for _ in 0..20 {
            trainer.step(&data).unwrap();
        }
        trainer.save(&path).unwrap();
        let mut moved = Trainer::load(to, &path).unwrap();
        for info in model.tensors() {
            let (mut a, mut b) = (vec![0.0; info.len()], vec![0.0; info.len()]);
            model.read_tensor(&info.name, &mut a).unwrap();
            moved.model().read_tensor(&info.name, &mut b).unwrap();
            assert!(a == b, "{} changed on its way", info.name);
        }
        let (a, b) = (trainer.eval(&data, 4).unwrap().loss, moved.eval(&data, 4).unwrap().loss);
        assert!((a / b - 1.0).abs() < 0.005, "{a} {b}");
        for _ in 0..5 {
            let (a, b) = (trainer.step(&data).unwrap().loss, moved.step(&data).unwrap().loss);
            assert!((a / b - 1.0).abs() < 0.005, "{a} {b}");
        }
    }
}

/// The same text from both devices, token for token where the choice is clear.
#[test]
fn generation_uses_the_gpu() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let model = Model::new(&gpu, &config()).unwrap();
    model.save(&path).unwrap();
    let twin = Model::load(&engine("cpu").unwrap(), &path).unwrap();
    let prompt: Vec<u32> = b"The architecture".iter().map(|b| u32::from(*b)).collect();
    let (mut ours, mut theirs) = (vec![0.0; 256], vec![0.0; 256]);
    model.next_logits(&prompt, &mut ours).unwrap();
    twin.next_logits(&prompt, &mut theirs).unwrap();
    for (a, b) in ours.iter().zip(&theirs) {
        assert!((a - b).abs() <= 1e-4, "logit {a} instead of {b}");
    }
}

/// Too large a plan is an error before anything starts, and the engine goes on.
#[test]
fn a_plan_beyond_the_memory_is_an_error() {
    let Some(gpu) = gpu() else { return };
    let model = Model::new(&gpu, &config()).unwrap();
    let huge = TrainerOptions { batch_size: 1 << 20, ..options("bf16") };
    let error = Trainer::new(&model, huge).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    assert!(error.to_string().contains("bytes free"), "{error}");
    let mut trainer = Trainer::new(&model, options("bf16")).unwrap();
    trainer.step(&text()).unwrap();
}

/// A loss that is not finite leaves everything as it was.
#[test]
fn a_step_that_is_not_finite_changes_nothing() {
    let Some(gpu) = gpu() else { return };
    let model = Model::new(&gpu, &config()).unwrap();
    let mut trainer = Trainer::new(&model, options("bf16")).unwrap();
    let data = text();
    trainer.step(&data).unwrap();
    let name = "transformer.h.1.mlp.c_fc.weight";
    let mut before = vec![0.0; 256 * 1024];
    model.read_tensor(name, &mut before).unwrap();
    // Large enough for activations to overflow.
    let huge = vec![1e30; before.len()];
    model.write_tensor(name, &huge).unwrap();
    let error = trainer.step(&data).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    let mut after = vec![0.0; before.len()];
    model.read_tensor(name, &mut after).unwrap();
    assert!(after == huge, "an update was made");
    model.write_tensor(name, &before).unwrap();
    trainer.step(&data).unwrap();
}

#[test]
fn a_device_that_is_not_there_says_what_to_do() {
    for (device, part) in [("cuda:99", "cpu"), ("cuda:x", "cuda:N"), ("gpu", "\"auto\"")] {
        let error = engine(device).unwrap_err().to_string();
        assert!(gpu().is_some() || error.contains(part), "{device}: {error}");
        println!("{device}: {error}");
    }
    // Whatever there is.
    let engine = engine("auto").unwrap();
    println!("auto: {}", engine.device());
}

/// Every optimizer learns with every form of its state, repeats itself, and goes on after a save bit
/// for bit; forms change a run by little, and one form can go on from another.
#[test]
fn optimizers_learn_in_every_form_and_resume() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (path, data) = (folder.path().join("run"), text());
    for kind in OptimizerKind::ALL {
        let mut whole = Vec::new();
        for form in [
            "",
            ",master=split",
            ",gradients=bf16",
            ",moments=bf16",
            ",moments=int8,master=split,gradients=bf16",
            ",moments=fp8,master=split",
        ] {
            let optimizer = format!("{kind}{form}").parse().unwrap();
            let optimizer = Optimizer { beta2: 0.999, ..optimizer };
            let options = TrainerOptions { optimizer, ..options("fp8-mxfp4-rht-sr") };
            let run = || {
                let model = Model::new(&gpu, &config()).unwrap();
                let mut trainer = Trainer::new(&model, options.clone()).unwrap();
                let losses: Vec<_> = (0..40).map(|_| trainer.step(&data).unwrap().loss).collect();
                (trainer, losses)
            };
            let (mut trainer, losses) = run();
            assert_eq!(run().1, losses, "{optimizer} repeats itself");
            assert!(losses[39] < losses[0] - 0.5, "{optimizer}: {losses:?}");
            if whole.is_empty() {
                whole = losses.clone();
            }
            assert!((losses[39] - whole[39]).abs() < 0.03, "{optimizer}: {losses:?} {whole:?}");
            trainer.save(&path).unwrap();
            let mut resumed = Trainer::load(&gpu, &path).unwrap();
            let mut other = Trainer::load_as(&gpu, &path, &Optimizer::new(kind)).unwrap();
            for _ in 0..3 {
                let (a, b) = (trainer.step(&data).unwrap(), resumed.step(&data).unwrap());
                assert_eq!((a.loss, a.grad_norm), (b.loss, b.grad_norm), "{optimizer} resumes");
                let c = other.step(&data).unwrap();
                assert!((a.loss - c.loss).abs() < 0.01, "{optimizer}: {} {}", a.loss, c.loss);
            }
        }
    }
}

/// Logits of a text are those of the whole computation and of the processor, and in every precision
/// the same bits however it comes, behind what was taken out, too.
#[test]
fn texts_are_decoded_as_on_the_processor() {
    let Some(gpu) = gpu() else { return };
    let cpu = engine("cpu").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let wide = ModelConfig { channels: 512, ..config() };
    let odd = ModelConfig {
        vocab_size: 255,
        channels: 51,
        heads: 3,
        mlp_channels: 37,
        activation: Activation::Gelu,
        tied_head: false,
        scale_attention_by_layer: true,
        ..config()
    };
    let narrow = ModelConfig { channels: 72, heads: 3, mlp_channels: 200, ..config() };
    // Products of many rows.
    let large = ModelConfig { channels: 1024, heads: 16, mlp_channels: 17_000, ..config() };
    for config in [config(), wide, odd, narrow, large] {
        let model = Model::new(&gpu, &config).unwrap();
        // Logits that differ.
        let mut trainer = Trainer::new(&model, options("bf16")).unwrap();
        let data = Dataset::from_tokens((0..5000u32).map(|i| i * i % 253).collect()).unwrap();
        for _ in 0..20 {
            trainer.step(&data).unwrap();
        }
        model.save(folder.path()).unwrap();
        let on_cpu = Model::load(&cpu, folder.path()).unwrap();
        let text: Vec<u32> = (0..128u32).map(|i| (i * 31 + i * i) % 253).collect();
        let logits = |decoder: &mut Decoder| {
            let mut logits = vec![f32::NAN; config.vocab_size];
            decoder.logits(0, &mut logits).unwrap();
            logits
        };
        let mut whole = vec![f32::NAN; config.vocab_size];
        model.next_logits(&text, &mut whole).unwrap();
        for (weights, bound) in [
            (DecoderWeights::F32, [1e-4, 1e-4]),
            (DecoderWeights::Bf16, [0.03, 0.03]),
            (DecoderWeights::Mxfp4, [0.5, 0.05]),
        ] {
            let what = format!("{weights}, {config:?}");
            let decoder = |model: &Model| {
                Decoder::new(model, DecoderOptions { room: 128, weights, ..Default::default() })
            };
            let mut ours = match decoder(&model) {
                Err(Error::Unsupported { .. })
                    if weights == DecoderWeights::Mxfp4 && config.channels == 51 =>
                {
                    continue;
                }
                ours => ours.unwrap(),
            };
            ours.push(0, &text).unwrap();
            let at_once = logits(&mut ours);
            let mut theirs = decoder(&on_cpu).unwrap();
            theirs.push(0, &text).unwrap();
            for (other, bound) in [whole.clone(), logits(&mut theirs)].iter().zip(bound) {
                let size = other.iter().fold(0.0f32, |size, v| size.max(v.abs()));
                let off = other.iter().zip(&at_once).map(|(a, b)| (a - b).abs());
                let off = off.fold(0.0f32, f32::max) / size;
                assert!(off < bound, "{what}: off by {off}");
            }
            for pieces in [&[1][..], &[20, 1, 5, 100]] {
                let mut ours = decoder(&model).unwrap();
                for piece in pieces.iter().cycle() {
                    let start = ours.tokens(0).len();
                    if start == text.len() {
                        break;
                    }
                    let end = text.len().min(start + piece);
                    ours.push(0, &text[start..end]).unwrap();
                    assert!(logits(&mut ours).iter().all(|v| v.is_finite()), "{what}");
                }
                assert!(logits(&mut ours) == at_once, "{what}: in pieces of {pieces:?}");
                ours.rewind(0, 50).unwrap();
                ours.push(0, &[3, 2, 1]).unwrap();
                logits(&mut ours);
                ours.rewind(0, 50).unwrap();
                ours.push(0, &text[50..]).unwrap();
                assert!(logits(&mut ours) == at_once, "{what}: behind what was taken out");
            }
        }
        // A text that is forked goes on from where the other was.
        let of_two = DecoderOptions { sequences: 2, ..Default::default() };
        let mut two = Decoder::new(&model, of_two).unwrap();
        two.push(0, &text[..40]).unwrap();
        let before = logits(&mut two);
        two.fork(0, 1).unwrap();
        for (sequence, token) in [(0, 7), (1, 9), (0, 11), (1, 13), (0, 17)] {
            two.push(sequence, &[token]).unwrap();
            let mut ours = vec![f32::NAN; config.vocab_size];
            two.logits(sequence, &mut ours).unwrap();
            let mut alone = Decoder::new(&model, DecoderOptions::default()).unwrap();
            alone.push(0, two.tokens(sequence)).unwrap();
            assert!(logits(&mut alone) == ours && ours != before, "{sequence}, {config:?}");
        }
        // All tokens at once, texts beside each other and guesses have the bits of a token at a time.
        for weights in [DecoderWeights::Bf16, DecoderWeights::Mxfp4] {
            let drafts = weights == DecoderWeights::Bf16 && config.channels != 51;
            let options = DecoderOptions { sequences: 3, room: 0, weights, drafts };
            let Ok(mut ours) = Decoder::new(&model, options) else {
                assert!(config.channels == 51, "{weights}");
                continue;
            };
            let vocab = config.vocab_size;
            let mut all = vec![f32::NAN; 100 * vocab];
            ours.push(0, &text[..100]).unwrap();
            ours.logits_from(0, 0, &mut all).unwrap();
            let after = |count: usize| &all[(count - 1) * vocab..][..vocab];
            for count in [100, 65, 64, 33, 1] {
                ours.rewind(0, count).unwrap();
                assert!(logits(&mut ours) == after(count), "{weights}, {config:?}, {count}");
            }
            ours.push(1, &text[..5]).unwrap();
            ours.push(2, &text[..77]).unwrap();
            let mut of_each = vec![f32::NAN; 3 * vocab];
            ours.logits_of(&[2, 0, 1], &mut of_each).unwrap();
            assert!(of_each == [after(77), after(1), after(5)].concat(), "{weights}, {config:?}");
            let mut plain = Vec::new();
            for draft in Draft::ALL.into_iter().filter(|draft| drafts || !draft.is_of_model()) {
                for draft_tokens in [0, 3] {
                    ours.rewind(1, 5).unwrap();
                    let how = GenerateOptions {
                        max_tokens: 40,
                        draft,
                        draft_tokens,
                        ..GenerateOptions::default()
                    };
                    let written = ours.generate(1, &how, &mut |_| true).unwrap().tokens;
                    if draft == Draft::None {
                        plain = written;
                    } else {
                        assert_eq!(written, plain, "{weights}, {draft}, {config:?}");
                    }
                }
            }
        }
        // Where a trainer changes what weights are kept as, decoders follow.
        let decoders = || {
            DecoderWeights::ALL.into_iter().filter_map(|weights| {
                let mut decoder = Decoder::new(
                    &model,
                    DecoderOptions { room: 128, weights, ..Default::default() },
                )
                .ok()?;
                decoder.push(0, &text[..9]).unwrap();
                Some(decoder)
            })
        };
        let mut old: Vec<_> = decoders().collect();
        // Until a token's pass is recorded, which has to be forgotten with where the weights were.
        for decoder in &mut old {
            for token in &text[9..12] {
                decoder.push(0, &[*token]).unwrap();
                logits(decoder);
            }
            decoder.rewind(0, 9).unwrap();
        }
        for master in [Master::Split, Master::F32] {
            let optimizer = Optimizer { master, ..Optimizer::default() };
            let options = TrainerOptions { optimizer, ..options("bf16") };
            Trainer::new(&model, options).unwrap().step(&data).unwrap();
            for (old, mut fresh) in old.iter_mut().zip(decoders()) {
                assert!(logits(old) == logits(&mut fresh), "{master:?}, {config:?}");
                for token in &text[20..25] {
                    old.push(0, &[*token]).unwrap();
                    fresh.push(0, &[*token]).unwrap();
                    assert!(logits(old) == logits(&mut fresh), "{master:?}, {config:?}: {token}");
                }
                old.rewind(0, 9).unwrap();
            }
        }
    }
}

/// Trainers of one model that keep its master weights otherwise take turns, evaluate, generate and
/// save; and where that changes where the weights lie, no recorded pass reads where they were.
#[test]
fn trainers_that_keep_weights_otherwise_share_a_model() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (path, data) = (folder.path().join("run"), text());
    let with = |master, recipe| TrainerOptions {
        optimizer: Optimizer { master, ..Optimizer::default() },
        ..options(recipe)
    };
    let run = |masters: [Master; 2]| {
        let model = Model::new(&gpu, &config()).unwrap();
        let mut first = Trainer::new(&model, with(masters[0], "bf16")).unwrap();
        let mut second = Trainer::new(&model, with(masters[1], "fp8-mxfp4-rht-sr")).unwrap();
        let mut losses = Vec::new();
        for _ in 0..5 {
            losses.push(first.step(&data).unwrap().loss);
            losses.push(second.step(&data).unwrap().loss);
            losses.push(second.eval(&data, 2).unwrap().loss);
        }
        let greedy = GenerateOptions { temperature: 0.0, max_tokens: 4, ..Default::default() };
        let tokens = model.generate(&[10, 20, 30], &greedy, &mut |_| true).unwrap().tokens;
        second.save(&path).unwrap();
        let loaded = Trainer::load(&gpu, &path).unwrap().eval(&data, 2).unwrap().loss;
        assert_eq!(loaded, second.eval(&data, 2).unwrap().loss);
        (losses, tokens)
    };
    let (plain, tokens) = run([Master::F32; 2]);
    for masters in [[Master::Split; 2], [Master::F32, Master::Split], [Master::Split, Master::F32]]
    {
        let (losses, others) = run(masters);
        let furthest = losses.iter().zip(&plain).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(furthest < 0.01, "{masters:?}: {losses:?} {plain:?}");
        assert_eq!(others.len(), tokens.len(), "{masters:?}");
    }
}

fn gpus() -> usize {
    (1..8).find(|gpu| engine(&format!("cuda:{gpu}")).is_err()).unwrap_or(8)
}

/// The engine of a rank, on a GPU of its own where there are as many.
fn engine_of(
    (rank, size): (usize, usize),
    gpus: usize,
    group: ranks::Threads,
    (transport, shards): (Transport, bool),
) -> Result<Engine, Error> {
    let device = format!("cuda:{}", rank % gpus);
    let options = ranks::options(rank, size, group);
    let group = options.group.map(|group| group.with_transport(transport));
    let group = group.map(|group| group.with_sharded_states(shards));
    Engine::new(EngineOptions { device, group, ..options })
}

/// Whether the first two GPUs can exchange so; a line says why not.
fn links_by(transport: Transport) -> bool {
    let engines = ranks::on_ranks(2, |rank, group| {
        engine_of((rank, 2), 2, group, (transport, false)).map(drop)
    });
    engines.into_iter().all(|engine| engine.inspect_err(|e| println!("skipped: {e}")).is_ok())
}

/// Wherever a host's function fails, both ranks have an error soon, whatever is on its way between
/// their GPUs, and give all back.
#[test]
fn a_group_that_ends_leaves_no_gpu_waiting() {
    if gpu().is_none() || gpus() < 2 {
        println!("skipped: two GPUs are needed");
        return;
    }
    let data = text();
    for (transport, every, shards) in [
        (Transport::Peer, 1, false),
        (Transport::Peer, 1, true),
        (Transport::Nccl, 3, false),
        (Transport::Nccl, 3, true),
    ] {
        if !links_by(transport) {
            continue;
        }
        let run = |fails: usize, rank: usize, mut group: ranks::Threads| -> Result<(), Error> {
            if rank == 1 {
                group.until_failure = fails;
            }
            let engine = engine_of((rank, 2), 2, group, (transport, shards))?;
            let how = TrainerOptions { batch_size: 2, ..options("fp8-mxfp4-rht-sr") };
            let mut trainer = Trainer::new(&Model::new(&engine, &config())?, how)?;
            (0..3).try_for_each(|_| trainer.step(&data).map(drop))
        };
        let mut fails = 0;
        loop {
            let started = std::time::Instant::now();
            let results = ranks::on_ranks(2, |rank, group| run(fails, rank, group));
            let seconds = started.elapsed().as_secs_f64();
            assert!(seconds < 25.0, "{transport}, {shards}, {fails}: {seconds} s");
            if results.iter().all(Result::is_ok) {
                break;
            }
            for result in &results {
                let is_peer = matches!(result, Err(Error::Peer { .. }));
                assert!(is_peer, "{transport}, {shards}, {fails}: {results:?}");
            }
            fails += every;
        }
        assert!(fails > 15, "{transport}, {shards}: {fails}");
    }
}

/// Ranks that keep states of some tensors each, and give weights around by every way that GPUs have:
/// losses, norms and files of one that keeps all.
#[test]
fn sharded_states_change_no_bit() {
    if gpu().is_none() {
        return;
    }
    let (data, gpus, folder) = (text(), gpus(), tempfile::tempdir().unwrap());
    let mut ways = vec![(2, Transport::Host), (4, Transport::Host)];
    if gpus > 1 {
        let linked = [Transport::Peer, Transport::Nccl].into_iter().filter(|way| links_by(*way));
        ways.extend(linked.flat_map(|way| [2, 4].map(|size| (size, way))));
        ways.retain(|(size, way)| *size <= gpus || *way == Transport::Host);
    }
    for optimizer in [
        "adamw",
        "adamw,master=split",
        "adamw,moments=int8,master=split",
        "adamw,moments=fp8",
        "muon",
    ] {
        let of_size = |size: usize, transport: Transport| {
            let dir = folder.path().join(format!("{size}{transport}"));
            let mut all = ranks::on_ranks(size, |rank, group| {
                let engine = engine_of((rank, size), gpus, group, (transport, true)).unwrap();
                let how = TrainerOptions {
                    batch_size: 2,
                    lanes: 4,
                    optimizer: optimizer.parse().unwrap(),
                    ..self::options("fp8-mxfp4-rht-sr")
                };
                let model = Model::new(&engine, &config()).unwrap();
                let mut trainer = Trainer::new(&model, how).unwrap();
                let mut steps = Vec::new();
                for _ in 0..20 {
                    let stats = trainer.step(&data).unwrap();
                    steps.push([stats.loss, stats.grad_norm].map(f32::to_bits));
                }
                // Another trainer of the model, which moves weights where it keeps them otherwise.
                let plain = TrainerOptions { batch_size: 2, lanes: 4, ..self::options("bf16") };
                let mut other = Trainer::new(&model, plain).unwrap();
                for _ in 0..2 {
                    for trainer in [&mut other, &mut trainer] {
                        let stats = trainer.step(&data).unwrap();
                        steps.push([stats.loss, stats.grad_norm].map(f32::to_bits));
                    }
                }
                // Weights at once, with what ranks still send to each other then.
                trainer.step(&data).unwrap();
                let mut sum = 0u64;
                for tensor in model.tensors() {
                    let mut values = vec![0.0; tensor.shape.iter().product()];
                    model.read_tensor(&tensor.name, &mut values).unwrap();
                    let add = |sum: u64, value: &f32| {
                        sum.wrapping_mul(31).wrapping_add(value.to_bits().into())
                    };
                    sum = values.iter().fold(sum, add);
                }
                steps.push([sum as u32, (sum >> 32) as u32]);
                steps.push([trainer.eval(&data, 3).unwrap().loss.to_bits(), 0]);
                trainer.save(&dir).unwrap();
                steps
            });
            let steps = all.remove(0);
            assert!(
                all.iter().all(|other| *other == steps),
                "{optimizer}: {size} ranks by {transport} differ"
            );
            let read = |name| std::fs::read(dir.join(name)).unwrap();
            (steps, ["model.safetensors", "trainer.safetensors"].map(read))
        };
        let alone = of_size(1, Transport::Auto);
        for (size, transport) in &ways {
            let (steps, files) = of_size(*size, *transport);
            assert_eq!(steps, alone.0, "{optimizer}: {size} ranks by {transport}");
            assert!(files == alone.1, "{optimizer}: files of {size} ranks by {transport}");
        }
    }
}

/// Gradients that NCCL carries in less than f32, to ranks that have all states and to those that have
/// some: losses near those of f32, the same on both ranks and again.
#[test]
fn wires_train_nearly_as_f32_does() {
    if gpu().is_none() || gpus() < 2 || !links_by(Transport::Nccl) {
        println!("skipped: two GPUs and NCCL are needed");
        return;
    }
    let data = text();
    let run = |wire: Wire, shards: bool| {
        let mut all = ranks::on_ranks(2, |rank, group| {
            let options = ranks::options(rank, 2, group);
            let group = options.group.map(|group| group.with_transport(Transport::Nccl));
            let group = group.map(|group| group.with_wire(wire).with_sharded_states(shards));
            let device = format!("cuda:{rank}");
            let engine = Engine::new(EngineOptions { device, group, ..options }).unwrap();
            let how = TrainerOptions { batch_size: 2, lanes: 2, ..self::options("bf16") };
            // Few tensors end where a group of rotated numbers does.
            let config = ModelConfig { channels: 144, ..config() };
            let mut trainer = Trainer::new(&Model::new(&engine, &config).unwrap(), how).unwrap();
            let of_step = |stats: mxfp4train::StepStats| [stats.loss, stats.grad_norm];
            (0..60).map(|_| of_step(trainer.step(&data).unwrap())).collect::<Vec<_>>()
        });
        let first = all.remove(0);
        assert!(all[0] == first, "{wire}, {shards}: ranks differ");
        first
    };
    for shards in [false, true] {
        let plain = run(Wire::F32, shards);
        for (wire, of_norm) in [(Wire::Bf16, 0.01), (Wire::Fp8, 0.03), (Wire::Mxfp4, 0.25)] {
            let rounded = run(wire, shards);
            assert_eq!(rounded[0][0], plain[0][0], "{wire}");
            let off = (rounded[0][1] - plain[0][1]).abs() / plain[0][1];
            assert!(off > 0.0 && off < of_norm, "{wire}, {shards}: {off}");
            let (ours, exact) = (rounded[59][0], plain[59][0]);
            assert!((ours - exact).abs() < 0.05 * exact, "{wire}, {shards}: {ours} {exact}");
            assert_eq!(run(wire, shards), rounded, "{wire}, {shards}");
        }
    }
}

/// Ranks share the GPUs that there are, by every way that these have: losses, norms and files of one that
/// has all lanes, and of ranks that go on from each other.
#[test]
fn any_number_of_ranks_has_the_same_bits() {
    if gpu().is_none() {
        return;
    }
    let gpus = gpus();
    let folder = tempfile::tempdir().unwrap();
    let data = text();
    let has_nccl = gpus > 1 && links_by(Transport::Nccl);
    for (recipe, optimizer) in [
        ("mxfp4-rht-sr", "adamw"),
        ("fp8-mxfp4-rht-sr", "adamw,moments=int8,master=split"),
        ("bf16", "muon"),
    ] {
        let how = || TrainerOptions {
            batch_size: 2,
            lanes: 4,
            optimizer: optimizer.parse().unwrap(),
            ..options(recipe)
        };
        let of_size = |size: usize, transport: Transport| {
            let dir = folder.path().join(size.to_string());
            let mut all = ranks::on_ranks(size, |rank, group| {
                let engine = engine_of((rank, size), gpus, group, (transport, false)).unwrap();
                let model = Model::new(&engine, &config()).unwrap();
                let mut trainer = Trainer::new(&model, how()).unwrap();
                let of_step =
                    |stats: mxfp4train::StepStats| [stats.loss, stats.grad_norm].map(f32::to_bits);
                let mut steps: Vec<_> =
                    (0..50).map(|_| of_step(trainer.step(&data).unwrap())).collect();
                let eval = trainer.eval(&data, 7).unwrap();
                steps.push([eval.loss.to_bits(), eval.tokens as u32]);
                trainer.save(&dir).unwrap();
                steps
            });
            let steps = all.remove(0);
            assert!(all.iter().all(|other| *other == steps), "{recipe}: ranks of {size} differ");
            let read = |name| std::fs::read(dir.join(name)).unwrap();
            (steps, ["model.safetensors", "trainer.safetensors"].map(read))
        };
        let alone = of_size(1, Transport::Auto);
        let ways = [Transport::Auto, Transport::Peer, Transport::Nccl];
        let apart = ways.into_iter().flat_map(|way| [(2, way), (4, way)]);
        let apart =
            apart.filter(|(size, way)| *size <= gpus && (*way != Transport::Nccl || has_nccl));
        for (size, transport) in
            [(2, Transport::Host), (4, Transport::Auto)].into_iter().chain(apart)
        {
            let (steps, files) = of_size(size, transport);
            assert_eq!(steps, alone.0, "{recipe}: {size} ranks by {transport}");
            assert!(files == alone.1, "{recipe}: files of {size} ranks by {transport}");
        }
        let loaded = ranks::on_ranks(2, |rank, group| {
            let engine = engine_of((rank, 2), gpus, group, (Transport::Auto, false)).unwrap();
            let mut trainer = Trainer::load(&engine, &folder.path().join("4")).unwrap();
            trainer.step(&data).unwrap().loss.to_bits()
        });
        let mut trainer =
            Trainer::load(&engine("cuda").unwrap(), &folder.path().join("2")).unwrap();
        assert_eq!(loaded, [trainer.step(&data).unwrap().loss.to_bits(); 2]);
    }
}

/// Of weights that are split the copy on the host has the halves, which a save puts together.
#[test]
fn snapshots_have_the_bytes_of_saves() {
    let Some(engine) = gpu() else { return };
    let (data, folder) = (text(), tempfile::tempdir().unwrap());
    let [straight, copied] = ["straight", "copied"].map(|name| folder.path().join(name));
    let mut earlier = None;
    for (recipe, optimizer) in [
        ("bf16", "adamw,moments=int8,master=split"),
        ("mxfp4-rht-sr", "adamw"),
        ("fp8-mxfp4-rht-sr", "adamw,moments=bf16,master=split,gradients=bf16"),
    ] {
        let model = Model::new(&engine, &config()).unwrap();
        let how = TrainerOptions { optimizer: optimizer.parse().unwrap(), ..options(recipe) };
        let mut trainer = Trainer::new(&model, how).unwrap();
        for _ in 0..2 {
            trainer.step(&data).unwrap();
            trainer.step(&data).unwrap();
            trainer.save(&straight).unwrap();
            let snapshot = trainer.snapshot(earlier.take()).unwrap();
            std::thread::scope(|scope| {
                let saved = scope.spawn(|| snapshot.save(&copied));
                trainer.step(&data).unwrap();
                saved.join().unwrap().unwrap();
            });
            for file in ["model.safetensors", "trainer.safetensors", "trainer.json"] {
                let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
                assert!(read(&straight) == read(&copied), "{recipe}, {optimizer}: {file}");
            }
            earlier = Some(snapshot);
        }
    }
}
