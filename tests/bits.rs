//! The bits of short runs are those of the records in `tests/bits/`, a file for each instruction
//! set and one for an H100: losses and norms of every step, and hashes of what the run leaves. Who
//! changes how the code is built, and not what it computes, learns here whether that was so.
//!
//! `MXT_BLESS=1 cargo test --test bits` writes the records of what this machine has,
//! `MXT_BLESS=FOLDER` writes them to that folder. The bits of a recipe that exists change on
//! purpose only, and a commit that changes them says why. Records of what few machines have may
//! lack the newest cases until one of these has run them, which the test then says.
//!
//! NOTE: a record also depends on what is not ours: on glibc's logarithms and powers, and on a GPU
//! on cuBLASLt, whose version is in the record's first line.

mod common;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::{env, fs};

use common::FIRST_RECIPES;
use mxfp4train::backend::cpu::Isa;
use mxfp4train::{
    Activation, Dataset, Engine, EngineOptions, Error, Model, ModelConfig, Optimizer,
    OptimizerKind, Recipe, Recompute, Schedule, ScheduleKind, StepStats, Trainer, TrainerOptions,
};
use safetensors::SafeTensors;
use sha2::{Digest, Sha256};

/// Set for the process that runs all cases on one instruction set: the file for what it finds.
const FOUND: &str = "MXT_TEST_BITS";

const STEPS: u64 = 4;

struct Case {
    name: String,
    model: ModelConfig,
    options: TrainerOptions,
    /// Whether it is saved after half of its steps, and goes on as loaded.
    resumes: bool,
}

impl Case {
    /// Whether it takes too long to be run on two numbers of threads, and on the portable set at
    /// all: what is in it is also in a case of another size.
    fn is_long(&self) -> bool {
        self.name.strip_prefix("even ").is_some_and(|rest| !FIRST_RECIPES.contains(&rest))
    }

    fn with(mut self, note: &str, change: impl FnOnce(&mut Self)) -> Self {
        self.name = format!("{}, {note}", self.name);
        change(&mut self);
        self
    }
}

fn case(shape: &str, model: ModelConfig, batch_size: usize, length: usize, recipe: &str) -> Case {
    let schedule = Schedule {
        kind: ScheduleKind::Linear,
        lr: 1e-2,
        min_lr: 1e-3,
        warmup_steps: 1,
        total_steps: STEPS,
        ..Schedule::default()
    };
    let options = TrainerOptions {
        batch_size,
        sequence_length: length,
        recipe: recipe.parse().unwrap(),
        schedule,
        ..TrainerOptions::default()
    };
    Case { name: format!("{shape} {recipe}"), model, options, resumes: false }
}

/// Sizes that nothing divides.
fn odd(recipe: &str) -> Case {
    let model = ModelConfig {
        vocab_size: 97,
        context_length: 29,
        layers: 2,
        heads: 3,
        channels: 36,
        mlp_channels: 52,
        ..ModelConfig::default()
    };
    case("odd", model, 3, 23, recipe)
}

/// Sizes that 64 divides, for which a GPU has kernels of their own.
fn even(recipe: &str) -> Case {
    let model = ModelConfig {
        vocab_size: 128,
        context_length: 64,
        layers: 2,
        heads: 2,
        channels: 128,
        ..ModelConfig::default()
    };
    case("even", model, 2, 64, recipe)
}

/// So many rows that products are cut along their reduction dimension.
fn tall(recipe: &str) -> Case {
    let model = ModelConfig {
        vocab_size: 97,
        context_length: 64,
        layers: 1,
        heads: 1,
        channels: 64,
        ..ModelConfig::default()
    };
    case("tall", model, 36, 64, recipe)
}

fn cases() -> Vec<Case> {
    const SWITCHES: [&str; 19] = [
        "mxfp4-rht-sr,g=32",
        "mxfp4-rht-sr,g=128",
        "mxfp4-rht-sr,g=256",
        "mxfp4-rht-sr,signs=fixed",
        "mxfp4-rht-sr,sr=dy",
        "mxfp4-rht-sr,sr=other",
        "mxfp4-rht-sr,dgrad=bf16",
        "mxfp4-rht-sr,wgrad=bf16",
        "mxfp4-rht-sr,bf16-last-layers=1",
        "mxfp4-rht-sr,bf16-last-steps=0.5",
        "mxfp4,dgrad=bf16",
        "mxfp4-rht,g=128,signs=fixed",
        "mxfp4-sr,sr=dy",
        "mxfp4-sr,wgrad=bf16",
        "fp8-mxfp4-rht-sr,g=32,sr=other",
        "fp8-mxfp4-rht-sr,g=128,signs=fixed",
        "fp8-mxfp4-rht-sr,dgrad=bf16",
        "fp8-mxfp4-rht-sr,wgrad=bf16",
        "fp8-mxfp4-rht-sr,bf16-last-layers=1,bf16-last-steps=0.5",
    ];
    // Made by the code that brought them, the others by one that knew nothing of them.
    const LATER: [&str; 3] =
        ["mxfp4,range=3/4", "mxfp4-rht,range=3/4", "mxfp4-rht-sr,sr=dy,range=3/4"];
    const BOTH: [&str; 2] = ["mxfp4-rht-sr", "fp8-mxfp4-rht-sr"];
    let mut all = Vec::new();
    for shape in [odd, even] {
        all.extend(FIRST_RECIPES.map(shape));
        all.extend(SWITCHES.map(shape));
        for recipe in BOTH {
            let accumulated = |case: &mut Case| case.options.accumulation = 3;
            all.push(shape(recipe).with("accumulation 3", accumulated));
        }
        for recipe in BOTH {
            for recompute in [Recompute::Pointwise, Recompute::Block] {
                let change = |case: &mut Case| case.options.recompute = recompute;
                all.push(shape(recipe).with(&format!("recompute {recompute}"), change));
            }
            all.push(shape(recipe).with("resumed", |case| case.resumes = true));
        }
        for recipe in ["fp32"].into_iter().chain(BOTH) {
            let untied = |case: &mut Case| case.model.tied_head = false;
            all.push(shape(recipe).with("untied head", untied));
            let exact = |case: &mut Case| case.model.activation = Activation::Gelu;
            all.push(shape(recipe).with("exact GELU", exact));
            let by_layer = |case: &mut Case| case.model.scale_attention_by_layer = true;
            all.push(shape(recipe).with("attention scaled by layer", by_layer));
            let everything = |case: &mut Case| {
                untied(case);
                exact(case);
                by_layer(case);
                case.options.recompute = Recompute::Block;
                case.resumes = true;
            };
            all.push(shape(recipe).with("all of these", everything));
        }
        all.extend(LATER.map(shape));
        let stable = |case: &mut Case| {
            case.options.optimizer = Optimizer::new(OptimizerKind::StableAdamW);
        };
        all.push(shape("mxfp4-rht-sr").with("stable-adamw", stable));
        for optimizer in [
            "adamw,moments=bf16",
            "stable-adamw,moments=int8",
            "stable-spam,reset=3",
            "gradstab,moments=int8",
            "muon,ratio=2",
            "muon,moments=int8,momentum=0.9,ratio=5",
            "adamw,moments=fp8",
            "muon,moments=fp8,ratio=5",
        ] {
            let smaller = |case: &mut Case| {
                case.options.optimizer = optimizer.parse().unwrap();
                case.options.optimizer.beta2 = 0.999;
                case.resumes = true;
            };
            all.push(shape("mxfp4-rht-sr").with(optimizer, smaller));
        }
    }
    all.extend(["fp32", "bf16", "mxfp4-rht-sr,g=256", "fp8-mxfp4-rht-sr"].map(tall));
    all.extend(Recipe::NAMES.into_iter().filter(|name| !FIRST_RECIPES.contains(name)).map(odd));
    all.extend(["mxfp4-rht,range=3/4,unbias=tensor", "tetrajet,fp8=qkv+proj"].map(odd));
    all
}

/// What a case leaves, as lines: the bits of numbers, with the numbers for people.
fn run(engine: &Engine, case: &Case) -> String {
    let text = fs::read("tests/text/prose.txt").unwrap();
    let tokens: Vec<u32> =
        text[..20_000].iter().map(|byte| u32::from(*byte) % case.model.vocab_size as u32).collect();
    let prompt = &tokens[..11];
    let data = Dataset::from_tokens(tokens.clone()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint");

    let model = Model::new(engine, &case.model).unwrap();
    let mut trainer = Trainer::new(&model, case.options.clone()).unwrap();
    let mut lines = format!("{}\n", case.name);
    for step in 1..=STEPS {
        let StepStats { loss, grad_norm, raised_blocks, .. } = trainer.step(&data).unwrap();
        let (loss, norm) = (shown(loss), shown(grad_norm));
        write!(lines, "  step {step}  loss {loss}  norm {norm}").unwrap();
        let raised =
            if raised_blocks > 0 { format!("  raised {raised_blocks}") } else { "".into() };
        writeln!(lines, "{raised}").unwrap();
        if case.resumes && step == STEPS / 2 {
            trainer.save(&checkpoint).unwrap();
            trainer = Trainer::load(engine, &checkpoint).unwrap();
        }
    }
    let eval = shown(trainer.eval(&data, 2).unwrap().loss);
    let mut logits = vec![0.0; case.model.vocab_size];
    trainer.model().next_logits(prompt, &mut logits).unwrap();
    let logits = short(Sha256::new().chain_update(bytemuck::cast_slice(&logits)));
    trainer.save(&checkpoint).unwrap();
    let [weights, moments] = ["model", "trainer"].map(|name| {
        hash_of_tensors(&fs::read(checkpoint.join(name).with_extension("safetensors")).unwrap())
    });
    writeln!(lines, "  eval  loss {eval}  logits {logits}").unwrap();
    writeln!(lines, "  weights {weights}  moments {moments}").unwrap();
    lines
}

fn shown(value: f32) -> String {
    format!("{:08x} ({value})", value.to_bits())
}

/// Of names, shapes and values, in the order of names.
fn hash_of_tensors(file: &[u8]) -> String {
    let mut tensors = SafeTensors::deserialize(file).unwrap().tensors();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let hash = tensors.iter().fold(Sha256::new(), |hash, (name, tensor)| {
        hash.chain_update(format!("{name} {:?}\n", tensor.shape())).chain_update(tensor.data())
    });
    short(hash)
}

fn short(hash: Sha256) -> String {
    hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn portable() {
    check_on(Isa::Portable);
}

#[test]
fn avx2() {
    check_on(Isa::Avx2);
}

#[test]
fn avx512() {
    check_on(Isa::Avx512);
}

#[test]
fn amx() {
    check_on(Isa::Amx);
}

/// In a process of its own, because the environment names the instruction set.
fn check_on(isa: Isa) {
    if !isa.is_available() {
        println!("skipped: this processor has no {}", isa.name());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let found = folder.path().join("found");
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "all_cases_in_a_child", "--nocapture"])
        .env("MXT_CPU_ISA", isa.name())
        .env(FOUND, &found)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", isa.name());
    let found = fs::read_to_string(found).unwrap();
    let head = format!("# The CPU with MXT_CPU_ISA={}; see tests/bits.rs.\n", isa.name());
    check(isa.name(), &(head + &found));
}

/// The other process of the test above; on its own it has nothing to do.
#[test]
fn all_cases_in_a_child() {
    let Some(found) = env::var_os(FOUND) else { return };
    let [one, three] = [1, 3]
        .map(|threads| Engine::new(EngineOptions { threads, ..EngineOptions::default() }).unwrap());
    let is_slow = Isa::from_environment().unwrap() == Isa::Portable;
    let mut all = String::new();
    for case in cases().iter().filter(|case| !(is_slow && case.is_long())) {
        let lines = run(&one, case);
        if !case.is_long() {
            assert_eq!(lines, run(&three, case), "1 thread and 3 differ");
        }
        all.push_str(&lines);
    }
    fs::write(found, all).unwrap();
}

/// Without an H100, the test says so and passes.
#[test]
fn cuda_h100() {
    let log = Arc::new(Mutex::new(String::new()));
    let lines = Arc::clone(&log);
    let options = EngineOptions {
        device: "cuda".into(),
        log: Some(Box::new(move |_, line| *lines.lock().unwrap() += line)),
        ..EngineOptions::default()
    };
    let engine = match Engine::new(options) {
        Ok(engine) => engine,
        Err(error @ Error::Unsupported { .. }) => return println!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    };
    let log = log.lock().unwrap().clone();
    let gpu = log.rsplit_once("device cuda:0: ").expect("the log tells which GPU it is").1;
    if !gpu.contains("H100") || !gpu.contains("compute capability 9.0") {
        return println!("skipped: the record is of an H100, and this is {gpu}");
    }
    // SAFETY: it takes nothing, and the library is there, for the engine works with it.
    let version = unsafe { cudarc::cublaslt::sys::cublasLtGetVersion() };
    let head = format!("# {gpu} with cuBLASLt {version}; see tests/bits.rs.\n");
    check("cuda-h100", &cases().iter().fold(head, |all, case| all + &run(&engine, case)));
}

fn record(name: &str) -> PathBuf {
    Path::new("tests/bits").join(name).with_extension("txt")
}

/// Compares with the record of this name, or writes it if that is asked for.
fn check(name: &str, found: &str) {
    let path = record(name);
    if let Some(folder) = env::var_os("MXT_BLESS") {
        let path =
            if folder == "1" { path } else { Path::new(&folder).join(path.file_name().unwrap()) };
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, found).unwrap();
        return println!("written: {}", path.display());
    }
    let expected = fs::read_to_string(&path).unwrap_or_else(|error| {
        panic!("{}: {error}; MXT_BLESS=1 cargo test --test bits writes it", path.display())
    });
    let found = &match ON_EVERY_MACHINE.contains(&name) {
        true => found.to_owned(),
        false => recorded(name, &expected, found),
    };
    if let Some(difference) = difference(&expected, found) {
        let why = "The bits of a recipe that exists change on purpose only; if these were to, \
            MXT_BLESS=1 cargo test --test bits writes the record anew.";
        panic!("{}, {difference}\n{why}", path.display());
    }
}

/// Instruction sets whose records have every case.
const ON_EVERY_MACHINE: [&str; 2] = ["avx2", "portable"];

/// What was found of the cases that a record has; says which it lacks.
fn recorded(name: &str, expected: &str, found: &str) -> String {
    let is_case = |line: &str| !line.starts_with([' ', '#']);
    let known: Vec<_> = expected.lines().filter(|line| is_case(line)).collect();
    let (mut kept, mut is_known, mut lacking) = (String::new(), true, Vec::new());
    for line in found.lines() {
        if is_case(line) {
            is_known = known.contains(&line);
            if !is_known {
                lacking.push(line);
            }
        }
        if is_known {
            writeln!(kept, "{line}").unwrap();
        }
    }
    if !lacking.is_empty() {
        println!("not recorded for {name} yet: {}", lacking.join("; "));
    }
    kept
}

#[test]
fn what_a_record_lacks_is_passed_over_and_nothing_else() {
    let expected = "# here\none\n  1\nthree\n  3\n";
    let found = "# here\none\n  1\ntwo\n  2\nthree\n  3\n";
    assert_eq!(recorded("few", expected, found), expected);
    let other = recorded("few", expected, &found.replace("  3", "  4"));
    assert!(difference(expected, &other).unwrap().contains("case \"three\""));
    let less = recorded("few", expected, "# here\none\n  1\n");
    assert!(difference(expected, &less).is_some());
}

/// The first line that differs, and all cases that do. The first line of a record is no result; it
/// tells where the record comes from.
fn difference(expected: &str, found: &str) -> Option<String> {
    let (mut first, mut case, mut differ) = (None, "", Vec::new());
    let heads = [expected, found].map(|text| text.lines().next().unwrap_or_default());
    let [mut expected, mut found] = [expected, found].map(|text| text.lines().skip(1));
    for number in 2.. {
        let lines = [expected.next(), found.next()];
        let Some(any) = lines[1].or(lines[0]) else { break };
        if !any.starts_with(' ') {
            case = any;
        }
        if lines[0] != lines[1] {
            let [expected, found] = lines.map(|line| line.map_or("no more lines", str::trim));
            first.get_or_insert_with(|| {
                format!("line {number}, case {case:?}\n  expected  {expected}\n  found     {found}")
            });
            differ.push(case);
        }
    }
    differ.dedup();
    let mut text = format!("{}\nCases that differ: {}.", first?, differ.join("; "));
    if heads[0] != heads[1] {
        write!(text, "\nThe record is of another place:\n  {}\n  {}", heads[0], heads[1]).unwrap();
    }
    Some(text)
}

#[test]
fn a_difference_names_case_and_line() {
    let record = "# here\none\n  step 1  loss 1\ntwo\n  step 1  loss 2\n";
    assert_eq!(difference(record, &record.replace("here", "there")), None);
    let text = difference(record, &record.replace("loss 2", "loss 3")).unwrap();
    let expected = "line 5, case \"two\"\n  expected  step 1  loss 2\n  found     step 1  loss 3\n\
        Cases that differ: two.";
    assert_eq!(text, expected);
    assert!(difference(record, "# here\none\n").unwrap().contains("found     no more lines"));
}
