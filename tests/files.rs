//! Checkpoints in files that lie elsewhere than in a folder: the same bytes, the same run, and a
//! failure at any call leaves everything as it was.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use mxfp4train::{
    Dataset, Engine, EngineOptions, Error, FileRead, FileSave, Files, MemoryFiles, Model,
    ModelConfig, StoredWeights, Trainer, TrainerOptions,
};

fn engine() -> Engine {
    Engine::new(EngineOptions { threads: 1, ..EngineOptions::default() }).unwrap()
}

fn model(engine: &Engine) -> Model {
    let config = ModelConfig {
        vocab_size: 64,
        context_length: 16,
        layers: 1,
        heads: 2,
        channels: 8,
        ..ModelConfig::default()
    };
    Model::new(engine, &config).unwrap()
}

fn trainer(engine: &Engine, optimizer: &str) -> Trainer {
    let options = TrainerOptions {
        batch_size: 2,
        optimizer: optimizer.parse().unwrap(),
        ..TrainerOptions::default()
    };
    Trainer::new(&model(engine), options).unwrap()
}

fn data() -> Dataset {
    Dataset::from_tokens((0..500).map(|i| i * i % 61).collect()).unwrap()
}

fn of_folder(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
        .collect()
}

fn of_memory(files: &MemoryFiles) -> BTreeMap<String, Vec<u8>> {
    files.names().map(|name| (name.to_owned(), files.get(name).unwrap().to_vec())).collect()
}

/// Every number of a model, in the order of its tensors.
fn weights(model: &Model) -> Vec<u32> {
    let mut all = Vec::new();
    for tensor in model.tensors() {
        let mut values = vec![0.0; tensor.len()];
        model.read_tensor(&tensor.name, &mut values).unwrap();
        all.extend(values.iter().map(|value| value.to_bits()));
    }
    all
}

/// Also of states that are codes and scales, and of weights that are stored as other numbers.
#[test]
fn bytes_are_those_of_a_folder() {
    let (engine, folder) = (engine(), tempfile::tempdir().unwrap());
    for optimizer in ["adamw", "adamw,moments=int8", "adamw,moments=fp8", "muon", "stable-spam"] {
        let mut trainer = trainer(&engine, optimizer);
        trainer.step(&data()).unwrap();
        let dir = folder.path().join(optimizer);
        trainer.save(&dir).unwrap();
        let mut files = MemoryFiles::new();
        trainer.save_to(&mut files).unwrap();
        assert_eq!(of_memory(&files), of_folder(&dir), "{optimizer}");
        let mut copied = MemoryFiles::new();
        trainer.snapshot(None).unwrap().save_to(&mut copied).unwrap();
        assert_eq!(of_memory(&copied), of_folder(&dir), "{optimizer}");
        for weights in StoredWeights::ALL {
            let dir = folder.path().join(format!("{optimizer}-{}", weights.as_str()));
            trainer.model().save_as(&dir, weights).unwrap();
            trainer.model().save_to(&mut files, weights).unwrap();
            // The training state of the trainer is gone: it would not fit.
            assert_eq!(of_memory(&files), of_folder(&dir), "{optimizer}, {weights:?}");
        }
    }
}

/// In memory of its own and in lent memory.
#[test]
fn a_run_goes_on_from_memory_bit_for_bit() {
    let engine = engine();
    let mut straight = trainer(&engine, "adamw");
    straight.step(&data()).unwrap();
    let mut files = MemoryFiles::new();
    files.put("tokenizer.json", b"{}".to_vec());
    straight.save_to(&mut files).unwrap();
    assert_eq!(files.names().len(), 5);
    assert_eq!(files.get("tokenizer.json"), Some(&b"{}"[..]));
    let mut lent = MemoryFiles::new();
    for name in MemoryFiles::CHECKPOINT {
        lent.lend(name, Arc::new(files.get(name).unwrap().to_vec()));
    }
    let mut resumed = Trainer::load_from(&engine, &files).unwrap();
    let rounded = "adamw,moments=bf16".parse().unwrap();
    let other = Trainer::load_from_as(&engine, &lent, &rounded).unwrap();
    assert_eq!(other.options().optimizer, rounded);
    let mut again = Trainer::load_from(&engine, &lent).unwrap();
    let alone = Model::load_from(&engine, &lent).unwrap();
    assert_eq!(weights(&alone), weights(straight.model()));
    for _ in 0..3 {
        let loss = straight.step(&data()).unwrap().loss.to_bits();
        assert_eq!(resumed.step(&data()).unwrap().loss.to_bits(), loss);
        assert_eq!(again.step(&data()).unwrap().loss.to_bits(), loss);
    }
    assert_eq!(weights(resumed.model()), weights(straight.model()));
}

/// Files of a host, of which a call fails.
#[derive(Default)]
struct Faulty {
    files: MemoryFiles,
    calls: Rc<Cell<usize>>,
    /// The number of the call that fails, from 1 on; 0 lets all succeed.
    fails_at: usize,
    /// What happened, a letter each.
    log: Rc<RefCell<String>>,
}

impl Faulty {
    fn call(&self, what: char) -> io::Result<()> {
        call((&self.calls, self.fails_at, &self.log), what)
    }
}

fn call(
    (calls, fails_at, log): (&Cell<usize>, usize, &RefCell<String>),
    what: char,
) -> io::Result<()> {
    calls.set(calls.get() + 1);
    log.borrow_mut().push(what);
    if calls.get() == fails_at {
        return Err(io::Error::other("the archive is on fire"));
    }
    Ok(())
}

impl Files for Faulty {
    fn open(&self, name: &str) -> io::Result<Option<Box<dyn FileRead + '_>>> {
        self.call('o')?;
        let bytes = self.files.get(name);
        Ok(bytes.map(|bytes| Box::new(FaultyRead { bytes, of: self }) as Box<dyn FileRead + '_>))
    }

    fn save(&mut self) -> io::Result<Box<dyn FileSave + '_>> {
        self.call('b')?;
        let (calls, log) = (self.calls.clone(), self.log.clone());
        let (fails_at, save) = (self.fails_at, Some(self.files.save()?));
        Ok(Box::new(FaultySave { save, calls, fails_at, log, left: None }))
    }
}

struct FaultyRead<'a> {
    bytes: &'a [u8],
    of: &'a Faulty,
}

impl FileRead for FaultyRead<'_> {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.of.call('r')?;
        self.bytes.read_at(offset, to)
    }
}

struct FaultySave<'a> {
    save: Option<Box<dyn FileSave + 'a>>,
    calls: Rc<Cell<usize>>,
    fails_at: usize,
    log: Rc<RefCell<String>>,
    /// Bytes of the open file that are not written.
    left: Option<u64>,
}

impl<'a> FaultySave<'a> {
    fn call(&mut self, what: char) -> io::Result<&mut Box<dyn FileSave + 'a>> {
        call((&self.calls, self.fails_at, &self.log), what)?;
        Ok(self.save.as_mut().unwrap())
    }
}

impl FileSave for FaultySave<'_> {
    fn create(&mut self, name: &str, size: u64) -> io::Result<()> {
        assert_eq!(self.left.replace(size), None);
        self.call('c')?.create(name, size)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.left = Some(self.left.unwrap().checked_sub(bytes.len() as u64).unwrap());
        self.call('w')?.write(bytes)
    }

    fn close(&mut self) -> io::Result<()> {
        assert_eq!(self.left.take(), Some(0), "as many bytes as were announced");
        self.call('z')?.close()
    }

    fn commit(mut self: Box<Self>) -> io::Result<()> {
        self.call('!')?;
        self.save.take().unwrap().commit()
    }
}

impl Drop for FaultySave<'_> {
    fn drop(&mut self) {
        if self.save.is_some() {
            self.log.borrow_mut().push('x');
        }
    }
}

/// The files, the model and the trainer.
#[test]
fn a_failed_save_changes_nothing() {
    let engine = engine();
    let mut trainer = trainer(&engine, "adamw");
    trainer.step(&data()).unwrap();
    let mut faulty = Faulty::default();
    trainer.save_to(&mut faulty.files).unwrap();
    let before = of_memory(&faulty.files);
    trainer.step(&data()).unwrap();
    let at = weights(trainer.model());
    let mut failed = 0;
    loop {
        faulty.fails_at += 1;
        faulty.calls.set(0);
        faulty.log.borrow_mut().clear();
        match trainer.save_to(&mut faulty) {
            Ok(()) => break,
            Err(error) => {
                assert!(matches!(error, Error::Io { .. }), "{error}");
                assert!(error.to_string().contains("the archive is on fire"), "{error}");
            }
        }
        failed += 1;
        // Given up at once, unless it was never begun.
        let log = faulty.log.borrow();
        assert_eq!(log.len(), faulty.fails_at + usize::from(faulty.fails_at > 1), "{log}");
        assert_eq!(log.ends_with('x'), faulty.fails_at > 1, "{log}");
        assert_eq!(of_memory(&faulty.files), before);
        assert_eq!((trainer.steps_done(), weights(trainer.model())), (2, at.clone()));
    }
    assert!(failed > 20 && faulty.log.borrow().ends_with('!'), "{failed}");
    let resumed = Trainer::load_from(&engine, &faulty.files).unwrap();
    assert_eq!((resumed.steps_done(), weights(resumed.model())), (2, at));
}

#[test]
fn a_failed_load_says_what_the_host_says() {
    let engine = engine();
    let mut faulty = Faulty::default();
    trainer(&engine, "adamw").save_to(&mut faulty.files).unwrap();
    let mut failed = 0;
    loop {
        faulty.fails_at += 1;
        faulty.calls.set(0);
        let Err(error) = Trainer::load_from(&engine, &faulty) else { break };
        assert!(matches!(error, Error::Io { .. }), "{error}");
        assert!(error.to_string().contains("the archive is on fire"), "{error}");
        failed += 1;
    }
    assert!(failed > 20, "{failed}");
}

/// As in a folder: each is named.
#[test]
fn damage_is_named() {
    let engine = engine();
    let load =
        |files: &MemoryFiles| Trainer::load_from(&engine, files).map(drop).unwrap_err().to_string();
    let mut whole = MemoryFiles::new();
    let error = load(&whole);
    assert!(error.starts_with("config.json: expected"), "{error}");
    trainer(&engine, "adamw").save_to(&mut whole).unwrap();
    for name in MemoryFiles::CHECKPOINT {
        let mut files = whole.clone();
        assert!(files.remove(name) && !files.remove(name));
        let error = load(&files);
        assert!(error.starts_with(name), "{error}");
        for damage in [
            |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2),
            |bytes: &mut Vec<u8>| bytes.clear(),
            |bytes: &mut Vec<u8>| {
                let middle = bytes.len() - bytes.len() / 4;
                bytes[middle] ^= 1;
            },
        ] {
            let mut bytes = whole.get(name).unwrap().to_vec();
            damage(&mut bytes);
            let mut files = whole.clone();
            files.put(name, bytes);
            let error = load(&files);
            assert!(error.contains(name), "{name}: {error}");
        }
    }
}
