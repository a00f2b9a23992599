//! Event files for TensorBoard: the numbers of a run's log as scalars over its steps.
//!
//! A file is a row of records, each a length, its checksum, an event and its checksum. Every run
//! writes a file of its own, and TensorBoard reads those of a folder as one, in the order of their
//! names. A file begins by saying the step that its run goes on from; TensorBoard then forgets what
//! the files before have of later steps, so that steps which a resumed run repeats are shown once.
//!
//! NOTE: the few fields that are needed of TensorBoard's messages are declared here, with the
//! numbers that they have there. The crates that write event files have not been kept up, and
//! generating code from the .proto files takes protoc at build time.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crc::{CRC_32_ISCSI, Crc};
use mxfp4train::{EvalStats, StepStats, UpdateMetrics, WeightMetrics};
use prost::Message;

use super::log::{may_create, may_write, open};
use super::updates::by_group;
use crate::failure::{Failure, Outcome};

/// TensorBoard takes any file for one of events whose name has `tfevents` in it.
const PREFIX: &str = "events.out.tfevents.";
/// Digits of the number behind it, by which names are in order.
const DIGITS: usize = 10;
/// What the first event of a file says.
const VERSION: &str = "brain.Event:2";

/// The event file of a run.
///
/// NOTE: it is opened for every event, as the log is for every line.
pub(crate) struct TensorBoard {
    path: PathBuf,
}

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    /// One of several kinds of values, so that 0 is written, too.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

impl SessionLog {
    /// Events of this step and later ones that came before are void.
    const START: Self = Self { status: 1 };
}

impl TensorBoard {
    /// Begins a file in `dir`, which is created, for a run that has done `step` steps.
    pub(crate) fn begin(dir: &Path, step: u64) -> Outcome<Self> {
        fs::create_dir_all(dir).map_err(Failure::io("create", dir))?;
        let path = new_file(dir).map_err(Failure::io("make an event file in", dir))?;
        let run = Self { path };
        run.event(step.saturating_add(1), What::SessionLog(SessionLog::START))?;
        Ok(run)
    }

    /// Finds out whether event files can be made in a folder, without a trace of it.
    pub(crate) fn check(dir: &Path) -> Outcome {
        let checked = match dir.metadata() {
            Ok(metadata) if metadata.is_dir() => may_write(dir),
            Ok(_) => Err(io::ErrorKind::NotADirectory.into()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => may_create(dir),
            Err(e) => Err(e),
        };
        checked.map_err(Failure::io("make an event file in", dir))
    }

    /// Adds a step.
    pub(crate) fn step(&self, stats: &StepStats) -> Outcome {
        let &StepStats { step, loss, grad_norm, lr, tokens, seconds, raised_blocks, .. } = stats;
        let mut scalars = vec![
            ("train/loss", loss),
            ("train/lr", lr),
            ("train/grad_norm", grad_norm),
            ("train/tokens_per_second", per_second(tokens, seconds)),
            ("train/seconds", seconds as f32),
        ];
        if raised_blocks > 0 {
            scalars.push(("train/raised_blocks", raised_blocks as f32));
        }
        self.scalars(step, &scalars)
    }

    /// Adds an evaluation after `step` steps.
    pub(crate) fn eval(&self, step: u64, stats: &EvalStats) -> Outcome {
        let &EvalStats { loss, tokens, seconds, sharpness, .. } = stats;
        let mut scalars = vec![
            ("validation/loss", loss),
            ("validation/tokens_per_second", per_second(tokens, seconds)),
            ("validation/seconds", seconds as f32),
        ];
        if let Some(found) = sharpness {
            scalars.extend([
                ("validation/sharpness", found.all),
                ("validation/sharpness_last", found.last),
                ("validation/logit_amax", found.logit_amax),
            ]);
        }
        self.scalars(step, &scalars)
    }

    /// Adds what a window of steps has shown of all weights together. Single tensors, which would
    /// be charts by the hundred, are in the log alone.
    pub(crate) fn weights(&self, found: &WeightMetrics) -> Outcome {
        let all = &found.all;
        self.scalars(
            found.step,
            &[
                ("weights/change", all.change as f32),
                ("weights/rounded_change", all.rounded_change as f32),
                ("weights/flipped", all.flipped as f32),
                ("weights/confidence", all.confidence as f32),
                ("weights/oscillating", all.oscillating as f32),
                ("weights/clipped", all.clipped as f32),
                ("weights/amax", all.amax),
            ],
        )
    }

    /// Adds what the update of a step did. Single tensors are in the log alone, as above.
    pub(crate) fn update(&self, found: &UpdateMetrics) -> Outcome {
        let groups = by_group(found).into_iter();
        let groups: Vec<_> =
            groups.map(|(group, norm)| (format!("grad_norm/{group}"), norm)).collect();
        let largest = found.largest().map(|(_, rms)| ("train/update_rms_max", rms));
        let groups = groups.iter().map(|(tag, norm)| (tag.as_str(), *norm));
        self.scalars(found.step, &groups.chain(largest).collect::<Vec<_>>())
    }

    fn scalars(&self, step: u64, scalars: &[(&str, f32)]) -> Outcome {
        let value =
            |&(tag, value): &(&str, f32)| Value { tag: tag.to_owned(), simple_value: Some(value) };
        self.event(step, What::Summary(Summary { values: scalars.iter().map(value).collect() }))
    }

    fn event(&self, step: u64, what: What) -> Outcome {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        append(&self.path, now, step, what).map_err(Failure::io("write", &self.path))
    }
}

fn per_second(tokens: u64, seconds: f64) -> f32 {
    (tokens as f64 / seconds.max(1e-9)) as f32
}

/// Makes an empty file whose name comes after those of all event files in the folder, also where
/// the clock was put back.
fn new_file(dir: &Path) -> io::Result<PathBuf> {
    let mut number = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    for entry in dir.read_dir()? {
        let name = entry?.file_name();
        number = number.max(name.to_str().and_then(number_of).map_or(0, |before| before + 1));
    }
    loop {
        let path = dir.join(format!("{PREFIX}{number:0DIGITS$}.mxtrain"));
        match File::create_new(&path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => number += 1,
            made => return made.map(|_| path),
        }
    }
}

/// The number in the name of an event file, in whoever's.
fn number_of(name: &str) -> Option<u64> {
    let number = name.strip_prefix(PREFIX)?.split('.').next()?;
    (number.len() == DIGITS).then(|| number.parse().ok())?
}

/// Adds an event to a file, whole or not at all: nothing can be read behind a part of one.
fn append(path: &Path, wall_time: f64, step: u64, what: What) -> io::Result<()> {
    let mut file = open(path, File::options().append(true).create(true))?;
    let length = file.metadata()?.len();
    let mut bytes = Vec::new();
    if length == 0 {
        let version = What::FileVersion(VERSION.to_owned());
        bytes = record(&Event { wall_time, step: 0, what: Some(version) });
    }
    let step = i64::try_from(step).unwrap_or(i64::MAX);
    bytes.extend(record(&Event { wall_time, step, what: Some(what) }));
    file.write_all(&bytes).inspect_err(|_| {
        let _ = file.set_len(length);
    })
}

/// An event as it stands in a file.
fn record(event: &Event) -> Vec<u8> {
    let event = event.encode_to_vec();
    let length = (event.len() as u64).to_le_bytes();
    [&length[..], &checksum(&length), &event, &checksum(&event)].concat()
}

/// CRC-32C as records have it: turned by 15 bits and moved by a constant, because the checksum of
/// what holds its own checksum says little.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
    CRC.checksum(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use mxfp4train::Sharpness;

    use super::*;

    const STATS: StepStats = StepStats {
        step: 7,
        loss: 0.25,
        grad_norm: 2.0,
        lr: 0.0,
        tokens: 64,
        seconds: 0.5,
        raised_blocks: 0,
        exchange_seconds: 0.0,
    };

    /// The events of a file, whose checksums must be right.
    fn events(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let (mut rest, mut events) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], checksum(&rest[..8]));
            let event = &rest[12..][..length];
            assert_eq!(rest[12 + length..][..4], checksum(event));
            events.push(Event::decode(event).unwrap());
            rest = &rest[16 + length..];
        }
        events
    }

    fn scalars(event: &Event) -> Vec<(&str, f32)> {
        let Some(What::Summary(summary)) = &event.what else { panic!("{event:?}") };
        let values = summary.values.iter();
        values.map(|value| (&value.tag[..], value.simple_value.unwrap())).collect()
    }

    /// Made with TensorBoard's `RecordWriter` and its messages.
    #[test]
    fn records_are_tensorboards_own() {
        let hex = |what, wall_time, step| {
            let record = record(&Event { wall_time, step, what: Some(what) });
            record.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        assert_eq!(
            hex(What::FileVersion(VERSION.into()), 1.5, 0),
            "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
        );
        assert_eq!(
            hex(What::SessionLog(SessionLog::START), 1.5, 300),
            "100000000000000095fbfe1809000000000000f83f10ac023a020801713b788a"
        );
        let value = |tag: &str, value| Value { tag: tag.into(), simple_value: Some(value) };
        let values = vec![value("train/loss", 0.25), value("train/lr", 0.0)];
        assert_eq!(
            hex(What::Summary(Summary { values }), 2.0, 7),
            "31000000000000009d8383e909000000000000004010072a240a110a0a747261696e2f6c6f7373150000803e\
             0a0f0a08747261696e2f6c7215000000002b8644d4"
        );
    }

    #[test]
    fn steps_and_evaluations_become_scalars() {
        let dir = tempfile::tempdir().unwrap();
        let run = TensorBoard::begin(&dir.path().join("a/b"), 6).unwrap();
        run.step(&STATS).unwrap();
        run.step(&StepStats { step: 8, raised_blocks: 3, ..STATS }).unwrap();
        let found = Sharpness { epsilon: 1e-3, all: 0.5, last: 0.75, logit_amax: 9.0 };
        let eval =
            EvalStats { loss: 1.5, tokens: 8, seconds: 0.25, spared: None, sharpness: Some(found) };
        run.eval(8, &eval).unwrap();
        let events = events(&run.path);
        assert!(events.iter().all(|event| event.wall_time > 1.6e9));
        assert_eq!(events[0].what, Some(What::FileVersion(VERSION.into())));
        assert_eq!(
            (events[1].step, &events[1].what),
            (7, &Some(What::SessionLog(SessionLog::START)))
        );
        let of_step = [
            ("train/loss", 0.25),
            ("train/lr", 0.0),
            ("train/grad_norm", 2.0),
            ("train/tokens_per_second", 128.0),
            ("train/seconds", 0.5),
        ];
        assert_eq!((events[2].step, scalars(&events[2])), (7, of_step.to_vec()));
        assert_eq!(scalars(&events[3]).last(), Some(&("train/raised_blocks", 3.0)));
        let of_eval = [
            ("validation/loss", 1.5),
            ("validation/tokens_per_second", 32.0),
            ("validation/seconds", 0.25),
            ("validation/sharpness", 0.5),
            ("validation/sharpness_last", 0.75),
            ("validation/logit_amax", 9.0),
        ];
        assert_eq!((events[4].step, scalars(&events[4])), (8, of_eval.to_vec()));
        assert_eq!(events.len(), 5);
    }

    #[test]
    fn updates_become_scalars_by_group() {
        let dir = tempfile::tempdir().unwrap();
        let run = TensorBoard::begin(dir.path(), 0).unwrap();
        run.update(&super::super::updates::tests::found()).unwrap();
        let events = events(&run.path);
        let of_update = [
            ("grad_norm/attn.c_attn", 13.0),
            ("grad_norm/lm_head", 7.0),
            ("grad_norm/ln_2", 2.0),
            ("grad_norm/wte", 1.0),
            ("train/update_rms_max", 2.5),
        ];
        assert_eq!((events[2].step, scalars(&events[2])), (3, of_update.to_vec()));
    }

    #[test]
    fn files_of_a_folder_are_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let begin = || TensorBoard::begin(dir.path(), 0).unwrap().path;
        let [first, second] = [begin(), begin()];
        assert!(first < second, "{first:?} {second:?}");
        let name = "events.out.tfevents.4000000000.of.others";
        for name in [name, "events.out.tfevents.99999999999", "events.out.tfevents.x", "notes"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(begin(), dir.path().join("events.out.tfevents.4000000001.mxtrain"));
    }

    #[test]
    fn a_lost_file_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let run = TensorBoard::begin(dir.path(), 0).unwrap();
        fs::remove_file(&run.path).unwrap();
        fs::create_dir(&run.path).unwrap();
        let failure = run.step(&STATS).unwrap_err();
        assert!(failure.message.starts_with("cannot write "), "{}", failure.message);
        fs::remove_dir(&run.path).unwrap();
        run.step(&STATS).unwrap();
        let events = events(&run.path);
        assert_eq!(events[0].what, Some(What::FileVersion(VERSION.into())));
        assert_eq!((events.len(), scalars(&events[1])[0]), (2, ("train/loss", 0.25)));
    }

    #[test]
    fn what_cannot_hold_event_files_is_known_before_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let check = |name: &str| TensorBoard::check(&dir.path().join(name)).map_err(|f| f.message);
        assert_eq!(check("."), Ok(()));
        assert_eq!(check("a/b"), Ok(()));
        fs::write(dir.path().join("file"), "").unwrap();
        for name in ["file", "file/runs"] {
            let message = check(name).unwrap_err();
            assert!(message.starts_with("cannot make an event file in "), "{message}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
