//! Resident memory is what the plan says, and stays there.

#![cfg(target_os = "linux")]

use std::process::Command;

use mxfp4train::{Dataset, Engine, EngineOptions, Model, ModelConfig, Trainer, TrainerOptions};

/// Set for the process that trains.
const CHILD: &str = "MXT_TEST_MEMORY_CHILD";

/// A field of /proc/self/status in bytes.
fn status(field: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0
}

#[test]
fn resident_memory_is_the_plan() {
    // Many steps are short ones.
    for case in ["fp32 20 128", "bf16 20 128", "mxfp4-rht-sr 20 128", "mxfp4-rht-sr 150 32"] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "train_in_a_child", "--nocapture"])
            .env(CHILD, case)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}");
        print!("{text}");
    }
}

/// The other process of the test above; on its own it has nothing to do.
#[test]
fn train_in_a_child() {
    let Ok(case) = std::env::var(CHILD) else { return };
    let [recipe, steps, length] = case.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let steps: usize = steps.parse().unwrap();
    let before = status("VmRSS");
    let engine = Engine::new(EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap();
    let config = ModelConfig {
        vocab_size: 4096,
        context_length: 128,
        layers: 2,
        heads: 4,
        channels: 384,
        ..ModelConfig::default()
    };
    let options = TrainerOptions {
        batch_size: 2,
        sequence_length: length.parse().unwrap(),
        recipe: recipe.parse().unwrap(),
        ..TrainerOptions::default()
    };
    let data = Dataset::from_tokens((0..20_000u32).map(|i| i * i % 4093).collect()).unwrap();
    let model = Model::new(&engine, &config).unwrap();
    let mut trainer = Trainer::new(&model, options).unwrap();
    let plan = trainer.plan().total() as f64;
    let mut at_step_2 = 0.0;
    for step in 1..=steps {
        trainer.step(&data).unwrap();
        if step == 2 {
            at_step_2 = status("VmRSS");
        }
    }
    let (resident, peak) = (status("VmRSS"), status("VmHWM"));
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    println!(
        "\n{recipe}: plan {:.1} MiB; resident {:.1} before, {:.1} after 2 steps, {:.1} after {steps}, \
         peak {:.1}",
        mib(plan),
        mib(before),
        mib(at_step_2),
        mib(resident),
        mib(peak)
    );
    // Of what the process holds besides, its code and the like, the plan knows nothing.
    let ours = (peak - before) / plan;
    assert!((0.9..1.1).contains(&ours), "{ours:.3} of the plan is resident");
    assert!((resident - at_step_2).abs() < 0.01 * plan, "memory is not flat");
}
