//! The records: lines of JSON that hold a result and everything needed to get it again.
//!
//! Each has a `kind` and a `version`, which change when its layout does. A file is any number of
//! them, one behind the other, so files that are joined are a file of all their records.

use std::env;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use mxfp4train::{Carried, Dataset, ModelConfig, Optimizer, TrainerOptions};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Deserializer, Map, Value};

use crate::console;
use crate::failure::{Failure, Outcome};
use crate::files;
use crate::spikes::Spikes;
use crate::tokenizer::{self, Tokenizer};
use crate::tokens_file::write_whole;
use crate::train::Data;

/// What a record of a kind holds besides `kind`, `version` and `origin`.
pub(crate) trait Record: Serialize + DeserializeOwned {
    const KIND: &'static str;
    const VERSION: u32;
}

/// What every record says of itself.
#[derive(Deserialize)]
struct Kind {
    kind: String,
    version: u64,
}

/// A record as its file has it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Recorded<R> {
    kind: String,
    version: u32,
    pub(crate) origin: Origin,
    #[serde(flatten)]
    pub(crate) record: R,
}

/// Where a record comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// Version of mxtrain.
    pub(crate) program: String,
    /// Commit that it was built from; "unknown" where the build had none.
    pub(crate) commit: String,
    /// Device and kernels, as the library describes them.
    pub(crate) machine: String,
    /// When the record was written, in UTC.
    pub(crate) date: String,
    /// The command; absolute paths are cut to their last part.
    pub(crate) command: Vec<String>,
}

impl Origin {
    /// The present program on a machine that says `about` of itself.
    pub(crate) fn here(about: &str) -> Self {
        Self {
            program: format!("mxtrain {}", env!("CARGO_PKG_VERSION")),
            commit: option_env!("MXTRAIN_COMMIT").unwrap_or("unknown").into(),
            // Why "auto" did not take a GPU stands before.
            machine: about.rsplit("; ").next().unwrap_or_default().into(),
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            // Names of files need not be text.
            command: env::args_os().map(|word| without_folder(&word.to_string_lossy())).collect(),
        }
    }
}

/// A word of a command without the folders that only this machine has.
fn without_folder(word: &str) -> String {
    let (option, value) = match word.split_once('=') {
        Some((option, value)) if option.starts_with("--") => (format!("{option}="), value),
        _ => (String::new(), word),
    };
    let path = Path::new(value);
    match path.file_name() {
        Some(name) if path.is_absolute() => option + &name.to_string_lossy(),
        _ => word.to_owned(),
    }
}

/// Writes a record, or prints it where that fails: it may have taken hours.
pub(crate) fn write<R: Record>(path: &Path, origin: Origin, record: R) -> Outcome {
    let whole = Recorded { kind: R::KIND.into(), version: R::VERSION, origin, record };
    let mut text = serde_json::to_string(&whole).expect("plain data becomes JSON");
    text.push('\n');
    write_whole(path, text.as_bytes()).map_err(|mut failure| {
        if console::print_json(&whole).is_ok() {
            failure.message.push_str("; the record is in standard output instead");
        }
        failure
    })
}

/// Reads a file of one record; `None` where there is no file.
pub(crate) fn read<R: Record>(path: &Path) -> Outcome<Option<Recorded<R>>> {
    match files::read_text(path) {
        Ok(text) => parse(path, &text).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::io("read", path)(e)),
    }
}

/// The texts of the records in that of a file, each with its place: the file and the line where it
/// begins. What is no record is the last of them, with all that follows it.
pub(crate) fn each<'a>(path: &Path, text: &'a str) -> Vec<(PathBuf, &'a str)> {
    let mut values = Deserializer::from_str(text).into_iter::<Kind>();
    let (mut found, mut start, mut line) = (Vec::new(), 0, 1);
    while start < text.len() || found.is_empty() {
        let end = match values.next() {
            Some(Ok(_)) => values.byte_offset(),
            None if !found.is_empty() => break,
            Some(Err(_)) | None => text.len(),
        };
        let record = text[start..end].trim_start();
        line += text[start..end - record.len()].matches('\n').count();
        found.push((format!("{}:{line}", path.display()).into(), record));
        line += record.matches('\n').count();
        start = end;
    }
    found
}

/// The record in the text of a file.
pub(crate) fn parse<R: Record>(path: &Path, text: &str) -> Outcome<Recorded<R>> {
    let (kind, version) = kind_of(path, text)?;
    if kind != R::KIND || version != u64::from(R::VERSION) {
        return Err(Failure::usage(format!(
            "{}: expected a record of kind {:?}, version {}; got {kind:?}, version {version}; it was \
             written by another mxtrain: move it away",
            path.display(),
            R::KIND,
            R::VERSION,
        )));
    }
    if let Some(wrong) = unprintable(&files::parse_json(path, text.as_bytes())?) {
        return Err(Failure::usage(format!(
            "{}: expected texts of a line each, at most {LONGEST} characters; got {:.60?}",
            path.display(),
            wrong
        )));
    }
    files::parse_json(path, text.as_bytes())
}

/// Characters of the longest text that a report shows.
const LONGEST: usize = 1000;

/// A text of a record that cannot stand in a line of a report. Those of its command do not.
fn unprintable(record: &Value) -> Option<&str> {
    match record {
        Value::String(text) => {
            let is_wrong = text.chars().any(char::is_control) || text.chars().count() > LONGEST;
            is_wrong.then_some(text)
        }
        Value::Array(all) => all.iter().find_map(unprintable),
        Value::Object(all) => {
            all.iter().filter(|(name, _)| *name != "command").find_map(|(_, of)| unprintable(of))
        }
        _ => None,
    }
}

/// Kind and version that the text of a file says it has.
pub(crate) fn kind_of(path: &Path, text: &str) -> Outcome<(String, u64)> {
    let kind: Kind = serde_json::from_str(text).map_err(|e| {
        Failure::usage(format!("{}: no record of `mxtrain compare`: {e}", path.display()))
    })?;
    Ok((kind.kind, kind.version))
}

/// The data of a run, so that equal data can be told from other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct DataRecord {
    /// Last part of the folder's or the pattern's name; two names may stand for the same data.
    pub(crate) name: String,
    pub(crate) tokenizer: Option<tokenizer::Kind>,
    pub(crate) train: TokensRecord,
    pub(crate) validation: Option<TokensRecord>,
}

/// The files of a dataset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TokensRecord {
    pub(crate) tokens: u64,
    /// CRC-32 of the bytes of its files, one after the other.
    pub(crate) crc32: String,
}

impl DataRecord {
    /// Reads all files.
    pub(crate) fn of(data: &Data) -> Outcome<Self> {
        let name = Path::new(&data.name).file_name().unwrap_or_default();
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            tokenizer: data.tokenizer.as_ref().map(Tokenizer::kind),
            train: TokensRecord::of(&data.train)?,
            validation: data.val.as_ref().map(TokensRecord::of).transpose()?,
        })
    }
}

impl TokensRecord {
    fn of(data: &Dataset) -> Outcome<Self> {
        struct Crc(crc32fast::Hasher);
        impl io::Write for Crc {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.update(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut crc = Crc(crc32fast::Hasher::new());
        for file in data.files() {
            File::open(&file.path)
                .and_then(|mut open| io::copy(&mut open, &mut crc))
                .map_err(Failure::io("read", &file.path))?;
        }
        Ok(Self { tokens: data.token_count(), crc32: format!("{:08x}", crc.0.finalize()) })
    }
}

/// Everything that the losses of a run depend on, under the names of the options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) recipe: String,
    pub(crate) seed: u64,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) channels: usize,
    pub(crate) context: usize,
    pub(crate) vocab_size: usize,
    pub(crate) batch_size: usize,
    pub(crate) sequence_length: usize,
    pub(crate) accumulation: usize,
    pub(crate) recompute: String,
    /// None where every block sees every token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) token_drop: Option<String>,
    pub(crate) steps: u64,
    pub(crate) lr: f32,
    pub(crate) min_lr: f32,
    pub(crate) warmup: u64,
    pub(crate) schedule: String,
    pub(crate) decay_steps: u64,
    /// None where it is AdamW.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) optimizer: Option<String>,
    pub(crate) weight_decay: f32,
    pub(crate) beta1: f32,
    pub(crate) beta2: f32,
    pub(crate) epsilon: f32,
    pub(crate) clip: f32,
    pub(crate) eval_every: u64,
    pub(crate) eval_batches: usize,
    /// How far logits move where evaluations measure how sharp the loss is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sharpness: Option<f32>,
    pub(crate) data: DataRecord,
}

impl Settings {
    /// The settings of a run; `eval_every` is the number of steps between two measurements.
    pub(crate) fn new(
        seed: u64,
        config: &ModelConfig,
        options: &TrainerOptions,
        eval_every: u64,
        eval_batches: usize,
        data: &DataRecord,
    ) -> Self {
        let (schedule, optimizer) = (&options.schedule, &options.optimizer);
        let usual = Optimizer::default().to_string();
        Self {
            recipe: options.recipe.to_string(),
            seed,
            layers: config.layers,
            heads: config.heads,
            channels: config.channels,
            context: config.context_length,
            vocab_size: config.vocab_size,
            batch_size: options.batch_size,
            sequence_length: match options.sequence_length {
                0 => config.context_length,
                length => length,
            },
            accumulation: options.accumulation,
            recompute: options.recompute.to_string(),
            token_drop: options.token_drop.map(|drop| drop.to_string()),
            steps: schedule.total_steps,
            lr: schedule.lr,
            min_lr: schedule.min_lr,
            warmup: schedule.warmup_steps,
            schedule: schedule.kind.to_string(),
            decay_steps: schedule.decay_steps,
            optimizer: Some(optimizer.to_string()).filter(|name| *name != usual),
            weight_decay: optimizer.weight_decay,
            beta1: optimizer.beta1,
            beta2: optimizer.beta2,
            epsilon: optimizer.epsilon,
            clip: optimizer.clip,
            eval_every,
            eval_batches,
            sharpness: None,
            data: data.clone(),
        }
    }

    /// Tokens of an optimizer step.
    pub(crate) fn step_tokens(&self) -> u64 {
        let tokens = self.batch_size.saturating_mul(self.sequence_length);
        tokens.saturating_mul(self.accumulation) as u64
    }

    /// What must be equal for two runs to be the same, by name. Not the name of the data, nor what
    /// is computed again to save memory or measured besides, which changes no result.
    pub(crate) fn compared(&self) -> Map<String, Value> {
        // By way of the text, in which an f32 has the digits that were given for it.
        let text = serde_json::to_string(self).expect("plain data becomes JSON");
        let mut all: Map<String, Value> = serde_json::from_str(&text).expect("it was just written");
        all.remove("recompute");
        all.remove("sharpness");
        if let Some(data) = all["data"].as_object_mut() {
            data.remove("name");
        }
        all
    }

    /// The first setting that differs: its option, the value here and the value there.
    pub(crate) fn difference(&self, other: &Self) -> Option<(String, String, String)> {
        let [ours, theirs] = [self, other].map(|settings| {
            let mut all = settings.compared();
            all.entry("optimizer").or_insert_with(|| Optimizer::default().to_string().into());
            all.entry("token_drop").or_insert_with(|| "none".into());
            all
        });
        // The optimizer first: others have their defaults from it.
        let (first, others): (Vec<_>, Vec<_>) =
            ours.iter().partition(|(name, _)| *name == "optimizer");
        let mut all = first.into_iter().chain(others);
        all.find(|(name, value)| theirs[*name] != **value).map(|(name, value)| {
            (format!("--{}", name.replace('_', "-")), value.to_string(), theirs[name].to_string())
        })
    }
}

/// A point of a run's curves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Point {
    pub(crate) step: u64,
    pub(crate) tokens: u64,
    /// Mean over the steps since the last point, in nats a token.
    pub(crate) train_loss: f64,
    /// In nats a token, by the recipe's own forward pass.
    pub(crate) validation_loss: f64,
    /// Of the same weights by a forward pass in bf16; none where nobody measured it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) validation_loss_in_bf16: Option<f64>,
    /// Mean norm of the gradient, before clipping, over the same steps.
    pub(crate) grad_norm: f64,
    /// [`mxfp4train::Sharpness::all`], where it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sharpness: Option<f64>,
}

/// What shows how a run strays from another one of the same seed and data, in nats a token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Deviation {
    /// Training loss after a twentieth of the steps, as a mean that decays by 0.99 a step; none where
    /// the run diverged before.
    pub(crate) early_loss: Option<f64>,
    /// The same after the last step that was done.
    pub(crate) smoothed_loss: f64,
}

impl Deviation {
    /// Of a run of so many steps, from the losses of those that were done; none without any.
    pub(crate) fn of(losses: impl Iterator<Item = f64>, steps: u64) -> Option<Self> {
        const DECAY: f64 = 0.99;
        let (mut sum, mut weight, mut early_loss) = (0.0, 0.0, None);
        for (step, loss) in (1..).zip(losses) {
            (sum, weight) = (DECAY * sum + (1.0 - DECAY) * loss, DECAY * weight + 1.0 - DECAY);
            if step == (steps / 20).max(1) {
                early_loss = Some(sum / weight);
            }
        }
        (weight > 0.0).then(|| Self { early_loss, smoothed_loss: sum / weight })
    }
}

/// What multiplied one kind of GEMM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CarriedRecord {
    /// forward, dgrad or wgrad.
    pub(crate) gemm: String,
    /// Of its two operands.
    pub(crate) formats: [String; 2],
    pub(crate) numbers: String,
    /// Whether these are wider than the formats, so that the speed is not theirs.
    pub(crate) emulated: bool,
}

impl CarriedRecord {
    pub(crate) fn of(carried: &Carried) -> Self {
        Self {
            gemm: carried.gemm.into(),
            formats: carried.formats.map(|format| format.to_string()),
            numbers: carried.numbers.name().into(),
            emulated: carried.is_emulated(),
        }
    }
}

/// One training run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) settings: Settings,
    pub(crate) curve: Vec<Point>,
    /// Mean over the last twentieth of the steps; none where the run diverged.
    pub(crate) train_loss: Option<f64>,
    /// After the last step, by the recipe's own forward pass.
    pub(crate) validation_loss: Option<f64>,
    /// Of the same weights by a forward pass in bf16; none where nobody measured it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) validation_loss_in_bf16: Option<f64>,
    /// Why the run ended before its last step: a loss or a gradient that is not finite.
    pub(crate) diverged: Option<String>,
    /// Blocks of MXFP4 operands whose scale was raised, of all that were quantized.
    pub(crate) raised_blocks: u64,
    pub(crate) quantized_blocks: u64,
    /// Of the losses and gradients of its steps; none in records of before they were counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) spikes: Option<Spikes>,
    /// None in records of before it was known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) deviation: Option<Deviation>,
    /// What multiplied the GEMMs of linear layers; none in records of before it was known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) carriers: Option<Vec<CarriedRecord>>,
    /// Median of the steps.
    pub(crate) tokens_per_second: f64,
    /// Wall-clock duration of the run, measurements included.
    pub(crate) seconds: f64,
}

impl Record for Run {
    const KIND: &'static str = "run";
    const VERSION: u32 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothed_losses_are_means_that_decay() {
        let of = |losses: &[f64], steps| Deviation::of(losses.iter().copied(), steps);
        assert_eq!(of(&[], 40), None);
        let found = of(&[3.0; 40], 40).unwrap();
        assert!((found.smoothed_loss - 3.0).abs() < 1e-12, "{found:?}");
        // Of two steps the second weighs a hundredth more.
        let found = of(&[1.0, 3.0, 9.0], 40).unwrap();
        assert!((found.early_loss.unwrap() - (0.99 + 3.0) / 1.99).abs() < 1e-12, "{found:?}");
        assert_eq!(of(&[1.0], 40).unwrap().early_loss, None);
        assert_eq!(of(&[1.0], 5).unwrap().early_loss, Some(1.0));
    }

    #[test]
    fn records_follow_each_other() {
        let at = |text: &str| {
            let found = each(Path::new("f"), text);
            let found = found.into_iter().map(|(place, text)| (place.display().to_string(), text));
            found.map(|(place, text)| format!("{place} {text}")).collect::<Vec<_>>()
        };
        let record = r#"{"kind": "run", "version": 1}"#;
        let first = format!("f:1 {record}");
        assert_eq!(at(&format!("{record}\n")), std::slice::from_ref(&first));
        let spread = record.replace(", ", ",\n");
        let expected = [format!("f:1 {spread}"), format!("f:4 {record}"), format!("f:4 {record}")];
        assert_eq!(at(&format!("{spread}\n\n{record}{record}")), expected);
        for wrong in ["no record", "{}"] {
            let expected = [first.clone(), format!("f:2 {wrong}\n{record}\n")];
            assert_eq!(at(&format!("{record}\n{wrong}\n{record}\n")), expected);
        }
        assert_eq!(at(""), ["f:1 "]);
        assert_eq!(at("\n"), ["f:2 "]);
    }

    #[test]
    fn texts_are_lines() {
        let found = |text: String| {
            let record = serde_json::json!({"origin": {"command": ["\n"], "machine": [text]}});
            unprintable(&record).map(str::to_owned)
        };
        assert_eq!(found("NVIDIA H200".into()), None);
        assert_eq!(found("a\u{1b}[31m".into()).as_deref(), Some("a\u{1b}[31m"));
        assert!(found("x".repeat(LONGEST)).is_none() && found("x".repeat(LONGEST + 1)).is_some());
    }

    #[test]
    fn folders_of_this_machine_stay_here() {
        assert_eq!(without_folder("/home/me/data"), "data");
        assert_eq!(without_folder("--data=/home/me/data"), "--data=data");
        assert_eq!(without_folder("mxfp4-rht-sr,g=128"), "mxfp4-rht-sr,g=128");
        assert_eq!(without_folder("runs/a"), "runs/a");
    }
}
