//! The log of a run: one JSON object a line, for every step and every evaluation, and for what is
//! seen of weights.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use mxfp4train::{EvalStats, Sharpness, StepStats, UpdateMetrics, WeightChange, WeightMetrics};
use rustix::fs::{Access, AtFlags, CWD, OFlags};
use serde::Serialize;

use super::updates::OfUpdates;
use crate::failure::{Failure, Outcome};

/// A log file.
///
/// NOTE: it is opened for every line. It may lie in the checkpoint folder, where a save can put a
/// copy in its place; some 10 microseconds a step are the price.
pub(crate) struct Log {
    path: PathBuf,
    /// The last line may have been written in part.
    is_torn: bool,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Line {
    Step {
        step: u64,
        loss: f32,
        grad_norm: f32,
        lr: f32,
        tokens: u64,
        seconds: f64,
        /// Left out where there are none, as on CPUs.
        #[serde(skip_serializing_if = "is_zero")]
        raised_blocks: u64,
        /// Left out where there are no other ranks.
        #[serde(skip_serializing_if = "Option::is_none")]
        exchange_seconds: Option<f64>,
    },
    Eval {
        step: u64,
        loss: f32,
        tokens: u64,
        seconds: f64,
        #[serde(flatten)]
        sharpness: Option<OfLogits>,
    },
    Update {
        step: u64,
        #[serde(flatten)]
        found: OfUpdates,
    },
    Weights {
        step: u64,
        steps: u64,
        #[serde(flatten)]
        all: Change,
        tensors: BTreeMap<String, Change>,
    },
}

/// [`Sharpness`] as it is written, here and by `mxtrain eval`.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct OfLogits {
    sharpness: f32,
    sharpness_last: f32,
    sharpness_epsilon: f32,
    logit_amax: f32,
}

impl From<Sharpness> for OfLogits {
    fn from(found: Sharpness) -> Self {
        let Sharpness { epsilon, all, last, logit_amax } = found;
        Self { sharpness: all, sharpness_last: last, sharpness_epsilon: epsilon, logit_amax }
    }
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// [`WeightChange`] as it is written.
#[derive(Serialize)]
struct Change {
    change: f64,
    rounded_change: f64,
    flipped: f64,
    confidence: f64,
    oscillating: f64,
    clipped: f64,
    amax: f32,
}

impl From<&WeightChange> for Change {
    fn from(found: &WeightChange) -> Self {
        let &WeightChange {
            change,
            rounded_change,
            flipped,
            confidence,
            oscillating,
            clipped,
            amax,
        } = found;
        Self { change, rounded_change, flipped, confidence, oscillating, clipped, amax }
    }
}

impl Log {
    /// Begins an empty log, or goes on with the one that is there. Lines of steps that a resumed
    /// run repeats come twice, with the same numbers.
    pub(crate) fn open(path: &Path, append: bool) -> Outcome<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Failure::io("create", parent))?;
        }
        let mut options = File::options();
        open(path, options.create(true).write(true).append(append).truncate(!append))
            .map_err(Failure::io("open", path))?;
        Ok(Self { path: path.to_owned(), is_torn: append && is_torn(path) })
    }

    /// Finds out whether a log can be opened, without a trace of it. A run that cannot have its log
    /// should not find out when it has already saved; and in the checkpoint folder the log may only
    /// come after the first save.
    pub(crate) fn check(path: &Path) -> Outcome {
        let failure = |e: io::Error| Failure::io("open", path)(e);
        match path.metadata() {
            Ok(metadata) if metadata.is_dir() => Err(failure(io::ErrorKind::IsADirectory.into())),
            Ok(_) => may_write(path).map_err(failure),
            Err(e) if e.kind() == io::ErrorKind::NotFound => may_create(path).map_err(failure),
            Err(e) => Err(failure(e)),
        }
    }

    /// Adds a step.
    pub(crate) fn step(&mut self, s: &StepStats) -> Outcome {
        let &StepStats {
            step,
            loss,
            grad_norm,
            lr,
            tokens,
            seconds,
            raised_blocks,
            exchange_seconds,
        } = s;
        let exchange_seconds = Some(exchange_seconds).filter(|seconds| *seconds > 0.0);
        self.line(&Line::Step {
            step,
            loss,
            grad_norm,
            lr,
            tokens,
            seconds,
            raised_blocks,
            exchange_seconds,
        })
    }

    /// Adds what a window of steps has shown of the weights.
    pub(crate) fn weights(&mut self, found: &WeightMetrics) -> Outcome {
        let WeightMetrics { step, steps, all, tensors } = found;
        let tensors = tensors.iter().map(|(name, of)| (name.clone(), of.into())).collect();
        self.line(&Line::Weights { step: *step, steps: *steps, all: all.into(), tensors })
    }

    /// Adds what the update of a step did.
    pub(crate) fn update(&mut self, found: &UpdateMetrics) -> Outcome {
        self.line(&Line::Update { step: found.step, found: found.into() })
    }

    /// Adds an evaluation after `step` steps.
    pub(crate) fn eval(&mut self, step: u64, stats: &EvalStats) -> Outcome {
        let &EvalStats { loss, tokens, seconds, sharpness, .. } = stats;
        let sharpness = sharpness.map(Into::into);
        self.line(&Line::Eval { step, loss, tokens, seconds, sharpness })
    }

    fn line(&mut self, line: &Line) -> Outcome {
        let mut text = serde_json::to_string(line).expect("plain data becomes JSON");
        text.push('\n');
        if self.is_torn {
            text.insert(0, '\n');
        }
        let written = open(&self.path, File::options().append(true).create(true))
            .and_then(|mut file| file.write_all(text.as_bytes()));
        self.is_torn = written.is_err();
        written.map_err(Failure::io("write", &self.path))
    }
}

/// Whether a path is that of a log or of nothing, and no other name of a file elsewhere.
pub(crate) fn is_log(path: &Path) -> bool {
    let begins = || -> io::Result<bool> {
        let mut text = Vec::new();
        open(path, File::options().read(true))?.take(8).read_to_end(&mut text)?;
        Ok(text.is_empty() || text == b"{\"type\":")
    };
    match path.symlink_metadata() {
        Ok(metadata) => {
            metadata.is_file() && metadata.nlink() == 1 && begins().is_ok_and(|begins| begins)
        }
        Err(e) => e.kind() == io::ErrorKind::NotFound,
    }
}

/// Whether the process may make what is not there yet, and the folders that lead to it.
pub(super) fn may_create(path: &Path) -> io::Result<()> {
    match path.ancestors().skip(1).find(|folder| folder.exists()) {
        Some(folder) if !folder.is_dir() => Err(io::ErrorKind::NotADirectory.into()),
        Some(folder) => may_write(folder),
        // The current folder.
        None => may_write(Path::new(".")),
    }
}

/// Whether the process may write to a file or into a folder.
pub(super) fn may_write(path: &Path) -> io::Result<()> {
    Ok(rustix::fs::accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS)?)
}

/// Whether the log does not end with a whole line: the run before met a full disk, or died.
fn is_torn(path: &Path) -> bool {
    let last = || -> io::Result<[u8; 1]> {
        let mut file = open(path, File::options().read(true))?;
        let mut last = [b'\n'];
        if file.metadata()?.is_file() && file.seek(SeekFrom::End(0))? > 0 {
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
        }
        Ok(last)
    };
    last().is_ok_and(|last| last != [b'\n'])
}

/// Opens a file without waiting for the reader of a pipe, who may have gone away.
pub(super) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVAL: EvalStats =
        EvalStats { loss: 1.0, tokens: 8, seconds: 0.25, spared: None, sharpness: None };

    #[test]
    fn lines_are_short_and_a_resumed_log_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/run.jsonl");
        let step = StepStats {
            step: 1,
            loss: 5.1,
            grad_norm: 2.0,
            lr: 1e-3,
            tokens: 64,
            seconds: 0.5,
            raised_blocks: 0,
            exchange_seconds: 0.0,
        };
        Log::open(&path, false).unwrap().step(&step).unwrap();
        let eval = EvalStats { loss: f32::NAN, ..EVAL };
        Log::open(&path, true).unwrap().eval(1, &eval).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"type\":\"step\",\"step\":1,\"loss\":5.1,\"grad_norm\":2.0,\"lr\":0.001,\"tokens\":64,\
             \"seconds\":0.5}\n\
             {\"type\":\"eval\",\"step\":1,\"loss\":null,\"tokens\":8,\"seconds\":0.25}\n"
        );
        Log::open(&path, false).unwrap().step(&StepStats { raised_blocks: 7, ..step }).unwrap();
        let line = fs::read_to_string(&path).unwrap();
        assert!(line.ends_with("\"seconds\":0.5,\"raised_blocks\":7}\n"), "{line}");
        Log::open(&path, false).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn sharpness_stands_with_its_epsilon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.jsonl");
        let found = Sharpness { epsilon: 5e-4, all: 0.25, last: 0.5, logit_amax: 9.0 };
        let eval = EvalStats { sharpness: Some(found), ..EVAL };
        Log::open(&path, false).unwrap().eval(3, &eval).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"type\":\"eval\",\"step\":3,\"loss\":1.0,\"tokens\":8,\"seconds\":0.25,\
             \"sharpness\":0.25,\"sharpness_last\":0.5,\"sharpness_epsilon\":0.0005,\
             \"logit_amax\":9.0}\n"
        );
    }

    #[test]
    fn what_is_seen_of_weights_is_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.jsonl");
        let all = WeightChange { change: 0.5, amax: 2.0, ..WeightChange::default() };
        let tensors = vec![("h.0.w".to_owned(), all)];
        let found = WeightMetrics { step: 20, steps: 10, all, tensors };
        Log::open(&path, false).unwrap().weights(&found).unwrap();
        let numbers = "\"change\":0.5,\"rounded_change\":0.0,\"flipped\":0.0,\"confidence\":0.0,\
                       \"oscillating\":0.0,\"clipped\":0.0,\"amax\":2.0";
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            format!(
                "{{\"type\":\"weights\",\"step\":20,\"steps\":10,{numbers},\
                 \"tensors\":{{\"h.0.w\":{{{numbers}}}}}}}\n"
            )
        );
    }

    #[test]
    fn a_resumed_log_goes_on_after_half_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.jsonl");
        fs::write(&path, "{}\n{\"ty").unwrap();
        Log::open(&path, true).unwrap().eval(1, &EVAL).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("{}\n{\"ty\n{\"type\":\"eval\""), "{text}");
        Log::open(&path, true).unwrap().eval(2, &EVAL).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 4);
    }

    #[test]
    fn what_cannot_be_a_log_is_known_before_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let check = |name: &str| Log::check(&dir.path().join(name)).map_err(|f| f.message);
        assert_eq!(check("a/b/run.jsonl"), Ok(()));
        fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(check("file"), Ok(()));
        assert!(check("file/run.jsonl").unwrap_err().contains("cannot open"));
        fs::create_dir(dir.path().join("folder")).unwrap();
        assert!(check("folder").unwrap_err().contains("directory"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_line_after_a_lost_one_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.jsonl");
        let mut log = Log::open(&path, false).unwrap();
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(log.eval(1, &EVAL).is_err());
        fs::remove_dir(&path).unwrap();
        log.eval(2, &EVAL).unwrap();
        log.eval(3, &EVAL).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("\n{") && text.lines().count() == 3, "{text}");
    }
}
