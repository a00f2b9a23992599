//! Resident memory is what the plan says, and stays there; what is in use is told, and where the
//! host gives the memory, it is the host's.

#![cfg(target_os = "linux")]

use std::alloc::{Layout, alloc, dealloc};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mxfp4train::{
    Allocator, Dataset, Decoder, DecoderOptions, Engine, EngineOptions, Error, MemoryUse, Model,
    ModelConfig, Trainer, TrainerOptions,
};

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

fn small() -> (ModelConfig, TrainerOptions) {
    let config = ModelConfig {
        vocab_size: 64,
        context_length: 16,
        layers: 2,
        heads: 2,
        channels: 32,
        ..ModelConfig::default()
    };
    (config, TrainerOptions { batch_size: 2, ..TrainerOptions::default() })
}

/// What is in use is what was planned, and nothing is when all is freed.
#[test]
fn memory_in_use_is_the_plan() {
    let engine = Engine::new(EngineOptions { threads: 1, ..EngineOptions::default() }).unwrap();
    let (config, options) = small();
    assert_eq!(engine.memory().device, MemoryUse { limit: engine.memory().device.limit, ..EMPTY });
    let model = Model::new(&engine, &config).unwrap();
    let weights = engine.memory().device.now;
    let mut trainer = Trainer::new(&model, options).unwrap();
    let whole = engine.memory();
    assert_eq!(whole.device.now, trainer.plan().total());
    assert_eq!((whole.device.peak, whole.host.now), (whole.device.now, 0));
    assert!(whole.device.limit >= whole.device.now && whole.host.limit > 0);
    let snapshot = trainer.snapshot(None).unwrap();
    assert_eq!(engine.memory().host.now, snapshot.bytes());
    let snapshot = trainer.snapshot(Some(snapshot)).unwrap();
    assert_eq!(engine.memory().host.peak, snapshot.bytes());
    drop(trainer);
    assert_eq!(engine.memory().device.now, weights);
    assert_eq!(engine.memory().device.peak, whole.device.peak);
    drop(model);
    assert_eq!(engine.memory().device.now, weights, "the snapshot has the model");
    drop(snapshot);
    assert_eq!((engine.memory().device.now, engine.memory().host.now), (0, 0));
}

const EMPTY: MemoryUse = MemoryUse { now: 0, peak: 0, limit: 0 };

/// Bytes that are out, blocks that were given, and how many there may be.
#[derive(Default)]
struct Counting {
    out: AtomicUsize,
    given: AtomicUsize,
    most: usize,
}

// SAFETY: the process's own memory.
unsafe impl Allocator for Counting {
    fn allocate(&self, bytes: usize, alignment: usize) -> *mut u8 {
        if self.given.fetch_add(1, Ordering::Relaxed) >= self.most {
            return std::ptr::null_mut();
        }
        self.out.fetch_add(bytes, Ordering::Relaxed);
        // SAFETY: not of size 0.
        unsafe { alloc(Layout::from_size_align(bytes, alignment).unwrap()) }
    }

    unsafe fn deallocate(&self, memory: *mut u8, bytes: usize, alignment: usize) {
        self.out.fetch_sub(bytes, Ordering::Relaxed);
        // SAFETY: allocated so.
        unsafe { dealloc(memory, Layout::from_size_align(bytes, alignment).unwrap()) };
    }
}

/// Where the host's allocator gives it, all large memory is its own, steps ask for none, and the
/// same numbers come out. Where it refuses, the call says so, and the rest goes on.
#[test]
fn large_memory_is_the_hosts() {
    let data = Dataset::from_tokens((0..2000u32).map(|i| i * i % 61).collect()).unwrap();
    let (config, options) = small();
    let train = |counting: Option<&Arc<Counting>>| -> Result<Vec<u32>, Error> {
        let allocator = counting.map(|counting| Box::new(counting.clone()) as Box<dyn Allocator>);
        let options = options.clone();
        let engine =
            Engine::new(EngineOptions { threads: 2, allocator, ..EngineOptions::default() })?;
        let model = Model::new(&engine, &config)?;
        let mut trainer = Trainer::new(&model, options)?;
        let given = counting.map(|counting| counting.given.load(Ordering::Relaxed));
        let losses = (0..3).map(|_| Ok(trainer.step(&data)?.loss.to_bits()));
        let losses = losses.collect::<Result<Vec<_>, Error>>()?;
        if let (Some(counting), Some(given)) = (counting, given) {
            assert_eq!(counting.given.load(Ordering::Relaxed), given, "steps ask for nothing");
        }
        let snapshot = trainer.snapshot(None)?;
        let mut decoder = Decoder::new(&model, DecoderOptions::default())?;
        decoder.push(0, &[1, 2, 3])?;
        decoder.logits(0, &mut [0.0; 64])?;
        if let Some(counting) = counting {
            let memory = engine.memory();
            let out = counting.out.load(Ordering::Relaxed) as u64;
            assert_eq!(memory.device.now + memory.host.now, out);
        }
        drop(snapshot);
        Ok(losses)
    };
    let expected = train(None).unwrap();
    let mut failed = 0;
    for most in 0.. {
        let counting = Arc::new(Counting { most, ..Counting::default() });
        let trained = train(Some(&counting));
        assert_eq!(counting.out.load(Ordering::Relaxed), 0);
        assert_eq!(Arc::strong_count(&counting), 1, "the allocator is given back");
        match trained {
            Ok(losses) => {
                assert_eq!(losses, expected);
                break;
            }
            Err(error) => {
                assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
                assert!(error.to_string().contains("the program's allocator"), "{error}");
                failed += 1;
            }
        }
    }
    assert!(failed >= 4, "{failed}");
}
