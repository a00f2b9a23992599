//! `trainer.json`: everything of a run that is neither weights nor moments.
//!
//! It knows the two tensor files that it was written with, and its own checksum, since a changed
//! step or seed would go unnoticed otherwise. Whoever edits it on purpose removes `crc32`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::tensors::Fingerprint;
use crate::gpt::Recompute;
use crate::optim::{Optimizer, Schedule};
use crate::run::{TrainerOptions, TrainerState};
use crate::{Error, Result};

/// Version of the layout. A change of a key or of its meaning counts it up; a new key that is left
/// out where it says nothing new does not, so that files without it are what they were.
const VERSION: u32 = 1;

/// The tensor files that belong to a `trainer.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sisters {
    #[serde(rename = "model.safetensors")]
    pub(super) model: Fingerprint,
    #[serde(rename = "trainer.safetensors")]
    pub(super) moments: Fingerprint,
}

/// The file's text.
///
/// # Errors
/// [`Error::InvalidArgument`] for a state that could not be loaded again.
pub(super) fn to_json(path: &Path, state: &TrainerState, files: Sisters) -> Result<String> {
    check(state)?;
    let mut document = Document::new(state, files);
    let json = |e| Error::format(path, format!("cannot write it: {e}"));
    document.crc32 = Some(document.checksum().map_err(json)?);
    let text = serde_json::to_string_pretty(&document).map_err(json)?;
    Ok(text + "\n")
}

/// Reads the file's text; messages call it `path`.
///
/// # Errors
/// [`Error::Format`] naming line and column or the key.
pub(super) fn from_json(path: &Path, text: &[u8]) -> Result<(TrainerState, Sisters)> {
    let json = |e| Error::format(path, format!("expected a training state in JSON: {e}"));
    let Head { version } = serde_json::from_slice(text).map_err(json)?;
    if version != VERSION {
        let fix =
            if version > VERSION { "; a newer library wrote it: update this one" } else { "" };
        let message = format!("expected version {VERSION}, found version {version}{fix}");
        return Err(Error::format(path, message));
    }
    let mut document: Document = serde_json::from_slice(text).map_err(json)?;
    if let Some(expected) = document.crc32.take() {
        let found = document.checksum().map_err(json)?;
        if expected != found {
            return Err(Error::format(
                path,
                format!(
                    "damaged or edited: expected CRC-32 {expected}, found {found}; restore it from \
                     a copy, or remove the key \"crc32\" if the change was meant"
                ),
            ));
        }
    }
    let (state, files) = document.into_state().map_err(|e| Error::format(path, e.to_string()))?;
    check(&state).map_err(|e| Error::format(path, e.to_string()))?;
    Ok((state, files))
}

/// Checks what the types do not: a hostile file must not make later arithmetic overflow.
fn check(state: &TrainerState) -> Result<()> {
    let options = &state.options;
    options.optimizer.validate()?;
    options.schedule.validate()?;
    for (what, value) in [
        ("batch_size", options.batch_size),
        ("accumulation", options.accumulation),
        ("lanes", options.lanes),
        // 0 stands for the model's context length.
        ("sequence_length", options.sequence_length.max(1)),
    ] {
        if value == 0 || value > 1 << 24 {
            let message = format!("expected a number from 1 to {}, got {value}", 1 << 24);
            return Err(Error::invalid(what, message));
        }
    }
    // The number of the next window must stay far from the end of 64 bits, where a sum would wrap.
    let windows =
        u128::from(state.step) * options.batch_size as u128 * options.accumulation as u128;
    if state.step >= 1 << 62 || windows >= 1 << 62 {
        let message = format!("expected a number that a run can reach, got {}", state.step);
        return Err(Error::invalid("step", message));
    }
    if state.schedule_start > state.step {
        let message =
            format!("expected at most the step, {}, got {}", state.step, state.schedule_start);
        return Err(Error::invalid("schedule_start", message));
    }
    match state.lr_override {
        Some(lr) if !(lr.is_finite() && lr >= 0.0) => {
            Err(Error::invalid("lr_override", format!("expected at least 0, got {lr}")))
        }
        _ => Ok(()),
    }
}

#[derive(Deserialize)]
struct Head {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    step: u64,
    seed: u64,
    /// Not written where it is 0, as files of earlier versions have it.
    #[serde(default, skip_serializing_if = "is_zero")]
    schedule_start: u64,
    lr_override: Option<f32>,
    recipe: String,
    /// Not written where nothing is, as files of earlier versions have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    recompute: Option<String>,
    batch_size: usize,
    sequence_length: usize,
    accumulation: usize,
    /// Not written where it is 1, as files of earlier versions have it.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    lanes: usize,
    optimizer: Settings,
    schedule: Curve,
    /// Not written where nothing is dropped, as files of earlier versions have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token_drop: Option<String>,
    /// Not written where nothing is, as files of earlier versions have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    frozen: Option<String>,
    /// Not written where there is none, as files of earlier versions have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    document_end: Option<u32>,
    files: Sisters,
    #[serde(skip_serializing_if = "Option::is_none")]
    crc32: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// Not written where it is AdamW, as files of earlier versions have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    weight_decay: f32,
    clip: f32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Curve {
    kind: String,
    lr: f32,
    min_lr: f32,
    warmup_steps: u64,
    total_steps: u64,
    decay_steps: u64,
}

impl Document {
    fn new(state: &TrainerState, files: Sisters) -> Self {
        // Taken apart by name, so that a new field cannot be forgotten here.
        let TrainerState { options, seed, step, schedule_start, lr_override } = state;
        let TrainerOptions {
            batch_size,
            sequence_length,
            accumulation,
            lanes,
            recipe,
            recompute,
            optimizer,
            schedule,
            token_drop,
            frozen,
            document_end,
        } = options;
        // The first seven are what its name has.
        let &Optimizer {
            kind: _,
            moments: _,
            master: _,
            gradients: _,
            normalization: _,
            muon: _,
            ramping: _,
            beta1,
            beta2,
            epsilon,
            weight_decay,
            clip,
        } = optimizer;
        let (name, usual) = (optimizer.to_string(), Optimizer::default().to_string());
        let named = (name != usual).then_some(name);
        let optimizer = Settings { kind: named, beta1, beta2, epsilon, weight_decay, clip };
        let &Schedule { kind, lr, min_lr, warmup_steps, total_steps, decay_steps } = schedule;
        Self {
            version: VERSION,
            step: *step,
            seed: *seed,
            schedule_start: *schedule_start,
            lr_override: *lr_override,
            recipe: recipe.to_string(),
            recompute: (*recompute != Recompute::Nothing).then(|| recompute.to_string()),
            batch_size: *batch_size,
            sequence_length: *sequence_length,
            accumulation: *accumulation,
            lanes: *lanes,
            optimizer,
            schedule: Curve {
                kind: kind.to_string(),
                lr,
                min_lr,
                warmup_steps,
                total_steps,
                decay_steps,
            },
            token_drop: token_drop.map(|drop| drop.to_string()),
            frozen: (!frozen.is_empty()).then(|| frozen.to_string()),
            document_end: *document_end,
            files,
            crc32: None,
        }
    }

    fn into_state(self) -> Result<(TrainerState, Sisters)> {
        let Settings { kind, beta1, beta2, epsilon, weight_decay, clip } = self.optimizer;
        let named: Optimizer = kind.as_deref().map(str::parse).transpose()?.unwrap_or_default();
        let optimizer = Optimizer { beta1, beta2, epsilon, weight_decay, clip, ..named };
        let Curve { kind, lr, min_lr, warmup_steps, total_steps, decay_steps } = self.schedule;
        let options = TrainerOptions {
            batch_size: self.batch_size,
            sequence_length: self.sequence_length,
            accumulation: self.accumulation,
            lanes: self.lanes,
            recipe: self.recipe.parse()?,
            recompute: self.recompute.as_deref().unwrap_or("nothing").parse()?,
            optimizer,
            schedule: Schedule {
                kind: kind.parse()?,
                lr,
                min_lr,
                warmup_steps,
                total_steps,
                decay_steps,
            },
            token_drop: self.token_drop.as_deref().map(str::parse).transpose()?,
            frozen: self.frozen.as_deref().map(str::parse).transpose()?.unwrap_or_default(),
            document_end: self.document_end,
        };
        let Self { seed, step, schedule_start, lr_override, files, .. } = self;
        Ok((TrainerState { options, seed, step, schedule_start, lr_override }, files))
    }

    /// CRC-32 of the values: white space and the order of the keys do not count. `crc32` is None.
    fn checksum(&self) -> serde_json::Result<String> {
        debug_assert!(self.crc32.is_none());
        Ok(format!("{:08x}", crc32fast::hash(&serde_json::to_vec(self)?)))
    }
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

fn one() -> usize {
    1
}

fn is_one(n: &usize) -> bool {
    *n == 1
}
