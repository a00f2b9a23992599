//! Runs of `mxtrain compare train` that were stopped: what goes on with them the next time, bit for
//! bit.

use std::fs;
use std::path::{Path, PathBuf};

use mxfp4train::{Engine, Trainer};
use serde::{Deserialize, Serialize};

use super::record::{self, Origin, Record, Settings};
use super::train::Tally;
use crate::console;
use crate::failure::{Failure, Outcome};

/// Folder of stopped runs within that of the records.
const FOLDER: &str = "unfinished";

/// Where a stopped run is: a checkpoint, and beside it what the run had shown.
pub(super) struct Unfinished {
    checkpoint: PathBuf,
    shown: PathBuf,
}

/// What a stopped run had shown.
#[derive(Serialize, Deserialize)]
struct Shown {
    settings: Settings,
    tally: Tally,
}

impl Record for Shown {
    const KIND: &'static str = "unfinished-run";
    const VERSION: u32 = 1;
}

impl Unfinished {
    /// That of the run named `name`, whose record goes into `folder`.
    pub(super) fn of(folder: &Path, name: &str) -> Self {
        let folder = folder.join(FOLDER);
        Self { checkpoint: folder.join(name), shown: folder.join(format!("{name}.json")) }
    }

    /// Saves a run that stops here.
    pub(super) fn save(
        &self,
        trainer: &mut Trainer,
        settings: &Settings,
        tally: &Tally,
        about: &str,
    ) -> Outcome {
        if let Some(folder) = self.checkpoint.parent() {
            fs::create_dir_all(folder).map_err(Failure::io("create", folder))?;
        }
        // In this order: what is shown says how many steps the checkpoint must have.
        trainer.save(&self.checkpoint)?;
        let shown = Shown { settings: settings.clone(), tally: tally.clone() };
        record::write(&self.shown, Origin::here(about), shown)
    }

    /// The run as it stopped; none where there is none of these settings.
    pub(super) fn load(
        &self,
        engine: &Engine,
        settings: &Settings,
    ) -> Outcome<Option<(Trainer, Tally)>> {
        self.found(engine, settings).map_err(|failure| {
            let message = format!(
                "{}; remove {} to begin the run anew",
                failure.message,
                console::shown(&self.shown)
            );
            Failure { message, ..failure }
        })
    }

    fn found(&self, engine: &Engine, settings: &Settings) -> Outcome<Option<(Trainer, Tally)>> {
        let Some(found) = record::read::<Shown>(&self.shown)? else { return Ok(None) };
        let Shown { settings: saved, tally } = found.record;
        if settings.difference(&saved).is_some() {
            return Ok(None);
        }
        if !tally.is_whole() {
            let message = format!("{}: damaged or edited", console::shown(&self.shown));
            return Err(Failure::usage(message));
        }
        let trainer = Trainer::load(engine, &self.checkpoint)?;
        // A kill between the two leaves them of different steps.
        Ok((trainer.steps_done() == tally.steps_done()).then_some((trainer, tally)))
    }

    /// Removes it, with the folder if it was the last; a run that is done needs none.
    pub(super) fn remove(&self) {
        if !self.shown.exists() {
            return;
        }
        let removed = fs::remove_file(&self.shown)
            .and_then(|()| fs::remove_dir_all(&self.checkpoint))
            .map_err(Failure::io("remove", &self.checkpoint));
        if let Err(failure) = removed {
            console::note(&format!("mxtrain: {}", failure.message));
        }
        if let Some(folder) = self.checkpoint.parent() {
            // It may hold others.
            let _ = fs::remove_dir(folder);
        }
    }
}
