//! Where a run is saved: in its folder or, while that is not possible, beside it.
//!
//! NOTE: a save that fails must cost no step. So the checkpoint goes to another name, `OUT.step-N`,
//! which --resume takes as well, and the next save tries OUT again. Not to the temporary folder,
//! which may be memory and is gone after a restart; a user who wants a third place names it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use mxfp4train::{Snapshot, Trainer};

use super::setup::Places;
use crate::console::{self, shell_word};
use crate::failure::{Failure, Outcome};
use crate::hugging_face;
use crate::lock::RunLock;
use crate::ranks::Team;
use crate::run_file::{self, RunFile};

/// The files of a checkpoint of this program.
pub(super) const FILES: [&str; 5] =
    ["config.json", "model.safetensors", "trainer.json", "trainer.safetensors", run_file::FILE];

/// What a run begins from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// No run before it.
    New,
    /// A run whose checkpoint lies elsewhere, or is of other settings.
    Resumed,
    /// What its own folder holds, as it is, with room for another.
    Held,
}

/// The saves of a run.
pub(crate) struct Saves {
    /// The run's folder.
    pub(crate) out: PathBuf,
    places: Places,
    /// Options that a resumed run has to be given again, with their values.
    again: Vec<(&'static str, u64)>,
    /// Those of its ranks, as they are typed.
    ranks: String,
    pub(crate) run_file: RunFile,
    /// Put beside the checkpoint's own files, with `run_file`.
    files: hugging_face::Files,
    pub(crate) lock: RunLock,
    /// Step and place of the last save.
    last: Option<(u64, PathBuf)>,
    /// A folder beside `out` that this run has made.
    beside: Option<PathBuf>,
    /// Saves in a row that failed.
    failed: u64,
    /// Where the run goes on while it is saved.
    background: Option<Background>,
}

/// Saves by a thread of their own.
#[derive(Default)]
struct Background {
    /// The memory of the last one.
    snapshot: Option<Snapshot>,
    /// Its step, and what comes of it.
    saving: Option<(u64, JoinHandle<(Snapshot, Outcome)>)>,
    /// Whether a save was left out for another, which is said once.
    has_left_out: bool,
}

impl Saves {
    pub(crate) fn new(
        out: PathBuf,
        places: Places,
        again: Vec<(&'static str, u64)>,
        run_file: RunFile,
        files: hugging_face::Files,
        lock: RunLock,
    ) -> Self {
        let (last, beside, failed, background) = (None, None, 0, None);
        let ranks = String::new();
        Self { out, places, again, ranks, run_file, files, lock, last, beside, failed, background }
    }

    /// With options of ranks that a resumed run has to be given again.
    pub(crate) fn among(self, ranks: String) -> Self {
        Self { ranks, ..self }
    }

    /// Whether [`Saves::begin`] waits for what it begins.
    pub(crate) fn in_background(self, is_so: bool) -> Self {
        Self { background: is_so.then(Background::default), ..self }
    }

    /// [`Saves::save`] on the way: a thread of its own saves, where that is wanted and there is memory
    /// for a copy. One that was begun before and failed is made up for at once; while one is still being
    /// written, this one is left out.
    ///
    /// # Errors
    /// As [`Saves::save`].
    pub(crate) fn begin(&mut self, trainer: &mut Team) -> Outcome {
        if let Some(background) = &mut self.background
            && let Some((of, thread)) = &background.saving
            && !thread.is_finished()
        {
            if !background.has_left_out {
                background.has_left_out = true;
                console::note(&format!(
                    "mxtrain: note: step {} is not saved, for step {of} is still being written; a \
                     larger --save-every would save what is due",
                    trainer.steps_done()
                ));
            }
            return Ok(());
        }
        if let Some(failure) = self.settle() {
            return self.make_up(trainer, &failure);
        }
        let Some(background) = &mut self.background else { return self.save(trainer) };
        let (step, out) = (trainer.steps_done(), self.out.clone());
        let begun = trainer.snapshot(background.snapshot.take()).map_err(Failure::from);
        let begun = begun.and_then(|snapshot| {
            let save = move || {
                let saved = snapshot.save(&out).map_err(Failure::from);
                (snapshot, saved)
            };
            let thread = thread::Builder::new().name("save".into()).spawn(save);
            thread.map_err(|e| Failure::runtime(format!("cannot start a thread that saves: {e}")))
        });
        match begun {
            Ok(thread) => {
                background.saving = Some((step, thread));
                Ok(())
            }
            Err(failure) => {
                let message = failure.message;
                console::note(&format!("mxtrain: warning: {message}; the run waits for this save"));
                self.save(trainer)
            }
        }
    }

    /// Sees what has come of a save that was begun, if it has ended.
    ///
    /// # Errors
    /// As [`Saves::save`], where it has failed and could not be made up for.
    pub(crate) fn look(&mut self, trainer: &mut Team) -> Outcome {
        let saving = self.background.as_ref().and_then(|background| background.saving.as_ref());
        if !saving.is_some_and(|(_, thread)| thread.is_finished()) {
            return Ok(());
        }
        match self.settle() {
            Some(failure) => self.make_up(trainer, &failure),
            None => Ok(()),
        }
    }

    /// Waits for a save that was begun. The failure of one that failed.
    fn settle(&mut self) -> Option<Failure> {
        let background = self.background.as_mut()?;
        let (step, thread) = background.saving.take()?;
        let saved = match thread.join() {
            Ok((snapshot, saved)) => {
                background.snapshot = Some(snapshot);
                saved
            }
            Err(_) => Err(Failure::runtime("a mistake in mxtrain ended a save")),
        };
        let out = self.out.clone();
        let saved = saved.and_then(|()| self.describe(&out));
        saved.map(|()| self.note_saved(step)).err()
    }

    /// Saves as it is now what could not be saved in the background.
    fn make_up(&mut self, trainer: &mut Team, failure: &Failure) -> Outcome {
        let message = &failure.message;
        console::note(&format!("mxtrain: warning: {message}; the run waits for another save"));
        self.save(trainer)
    }

    /// Saves before the first step: a folder that cannot be written should not show after hours. A
    /// run that does not go on with one before sets its files aside: a kill on the way may leave
    /// weights alone, but not beside a description of others. Where it goes on with what the folder
    /// itself holds, the run's description alone is written: a checkpoint may be gigabytes, and take
    /// minutes.
    pub(crate) fn first(&mut self, trainer: &mut Team, origin: Origin) -> Outcome {
        let before = if origin == Origin::New { set_aside(&self.out)? } else { Vec::new() };
        if origin != Origin::Held {
            trainer.save(&self.out).inspect_err(|_| put_back(&before))?;
        }
        for path in &before {
            let _ = fs::remove_file(aside(path));
        }
        self.put_files(&self.out.clone())?;
        self.lock.renew();
        self.last = Some((trainer.steps_done(), self.out.clone()));
        if let Some(background) = &mut self.background {
            // Memory that is new takes seconds; where there is none, the first save says so.
            background.snapshot = trainer.snapshot(None).ok();
        }
        Ok(())
    }

    /// Saves what is not saved, in `out` or elsewhere, and says where.
    ///
    /// # Errors
    /// Where no place is left, with the reasons.
    pub(crate) fn save(&mut self, trainer: &mut Team) -> Outcome {
        // What has come of that is made up for here.
        let _ = self.settle();
        let step = trainer.steps_done();
        if self.is_in_out(step) {
            return Ok(());
        }
        let Err(failure) = self.save_to(&self.out.clone(), trainer) else {
            self.note_saved(step);
            return Ok(());
        };
        if self.last.as_ref().is_some_and(|(saved, _)| *saved == step) {
            // Beside it, by an earlier try.
            return Ok(());
        }
        if trainer.has_lost_states() {
            return Err(Failure::runtime(format!(
                "step {step} is lost with the states that another process kept; go on with: {}",
                self.resume(&self.out)
            )));
        }
        let reasons = match self.beside {
            Some(_) => format!("{} still cannot be written", self.out.display()),
            None => failure.message,
        };
        self.save_beside(trainer, reasons)
    }

    /// `out` holds this step.
    fn note_saved(&mut self, step: u64) {
        self.failed = 0;
        self.lock.renew();
        self.last = Some((step, self.out.clone()));
        if let Some(beside) = self.beside.take() {
            remove(&beside, &self.run_file.files);
            console::note(&format!(
                "mxtrain: step {step} is saved in {} again; {} is removed",
                self.out.display(),
                beside.display()
            ));
        }
    }

    /// Saves the last state of a run that cannot go on as it is, beside what `out` has of it.
    ///
    /// # Errors
    /// As [`Saves::save`].
    pub(crate) fn save_apart(&mut self, trainer: &mut Team) -> Outcome {
        // It is the state of now that counts, and that is saved.
        let _ = self.settle();
        if self.last.as_ref().is_some_and(|(saved, _)| *saved == trainer.steps_done()) {
            return Ok(());
        }
        let reason = format!("{}, as what is behind it may be of no use", self.held());
        self.save_beside(trainer, reason)
    }

    fn save_beside(&mut self, trainer: &mut Team, mut reasons: String) -> Outcome {
        let step = trainer.steps_done();
        // Also of ".", the current folder.
        let out = std::path::absolute(&self.out).unwrap_or_else(|_| self.out.clone());
        let name = out.file_name().map(|name| name.to_string_lossy().into_owned());
        let name = format!("{}.step-{step}", name.unwrap_or_else(|| "checkpoint".into()));
        let parent = out.parent().map(Path::to_owned);
        for folder in parent.into_iter().chain(self.places.fallback.clone()) {
            let place = free_name(&folder.join(&name));
            match self.save_to(&place, trainer) {
                // It is whole, and can be resumed, if with more options, where only what belongs to it
                // could not be written.
                Err(failure) if !Trainer::is_saved_in(&place) => {
                    reasons.push_str(&format!("; {}", failure.message));
                }
                saved => {
                    if let Err(failure) = saved {
                        reasons.push_str(&format!("; {}", failure.message));
                    }
                    console::note(&format!(
                        "mxtrain: warning: {reasons}; step {step} is saved in {0} instead; go on from \
                         it with: {1}",
                        place.display(),
                        self.resume(&place)
                    ));
                    self.failed = 0;
                    self.last = Some((step, place.clone()));
                    if let Some(older) = self.beside.replace(place) {
                        remove(&older, &self.run_file.files);
                    }
                    return Ok(());
                }
            }
        }
        Err(Failure::runtime(format!("step {step} could not be saved: {reasons}")))
    }

    /// Says that a save on the way failed; in short where the one before did, too.
    pub(crate) fn warn(&mut self, failure: &Failure) {
        self.failed += 1;
        let what = match self.failed {
            1 => failure.message.clone(),
            failed => format!("no save is possible, {failed} in a row have failed"),
        };
        console::note(&format!("mxtrain: warning: {what}; {}", self.held()));
    }

    /// The command that goes on with a checkpoint of the run.
    pub(crate) fn resume(&self, folder: &Path) -> String {
        let mut command = format!("mxtrain train --resume {}", shell_word(folder.as_os_str()));
        for (name, place) in self.places.by_name() {
            command.push_str(&format!(" --{name} {}", shell_word(place.as_os_str())));
        }
        for (name, every) in self.again.iter().filter(|(_, every)| *every > 0) {
            command.push_str(&format!(" --{name} {every}"));
        }
        if self.background.is_some() {
            command.push_str(" --save-in-background");
        }
        command.push_str(&self.ranks);
        command
    }

    /// Whether the run's own folder holds `step`.
    pub(crate) fn is_in_out(&self, step: u64) -> bool {
        self.last.as_ref().is_some_and(|(saved, place)| *saved == step && *place == self.out)
    }

    /// What is saved and where, for a message.
    pub(crate) fn held(&self) -> String {
        match &self.last {
            Some((step, place)) => format!("{} holds step {step}", place.display()),
            None => "nothing is saved".into(),
        }
    }

    fn save_to(&mut self, folder: &Path, trainer: &mut Team) -> Outcome {
        trainer.save(folder)?;
        self.describe(folder)
    }

    /// Puts what belongs to a checkpoint beside it. In `out` that is carried along, unless the folder
    /// was made anew, or its description damaged: without it the checkpoint could not be resumed.
    fn describe(&mut self, folder: &Path) -> Outcome {
        if !matches!(RunFile::read(folder), Ok(Some(_))) {
            self.put_files(folder)?;
        }
        Ok(())
    }

    /// Puts the files that are not the library's into a checkpoint folder.
    fn put_files(&mut self, folder: &Path) -> Outcome {
        // One that cannot be read lists nothing but what this run has put: what else is in the
        // folder is then taken for the user's.
        let before = RunFile::read(folder).ok().flatten().map(|file| file.files);
        let before = before.unwrap_or_else(|| self.run_file.files.clone());
        self.run_file.files = self.files.put(folder, &before)?;
        for note in self.files.notes.drain(..) {
            console::note(&format!("mxtrain: note: {note}"));
        }
        self.run_file.write(folder)
    }
}

/// Gives the files that an earlier run put into a folder beside the weights another name,
/// [`aside`].
fn set_aside(folder: &Path) -> Outcome<Vec<PathBuf>> {
    let mut paths = Vec::new();
    // One that cannot be read lists nothing: what is in the folder is then taken for the user's.
    let listed = RunFile::read(folder).ok().flatten().map(|file| file.files).unwrap_or_default();
    // The list goes last: as long as a file of the run is there, it says whose that is.
    for name in hugging_face::unchanged(folder, &listed).into_iter().chain([run_file::FILE.into()])
    {
        let path = folder.join(name);
        match fs::rename(&path, aside(&path)) {
            // Of what is no folder, the save says more.
            Err(e)
                if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&e.kind()) => {}
            Err(e) => {
                put_back(&paths);
                return Err(Failure::io("rename", &path)(e));
            }
            Ok(()) => paths.push(path),
        }
    }
    Ok(paths)
}

/// Gives files that were set aside their names back.
fn put_back(paths: &[PathBuf]) {
    for path in paths {
        let _ = fs::rename(aside(path), path);
    }
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".replaced");
    name.into()
}

/// The path, or with a number behind it if it is taken.
fn free_name(path: &Path) -> PathBuf {
    let numbered = |n: u64| PathBuf::from(format!("{}-{n}", path.display()));
    let is_free = |path: &PathBuf| {
        path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    };
    let names = std::iter::once(path.to_owned()).chain((2..1000).map(numbered));
    names.into_iter().find(is_free).unwrap_or_else(|| numbered(1000))
}

/// Removes a checkpoint that this run has made, with its `files`, but not what others have put
/// there.
fn remove(folder: &Path, files: &BTreeMap<String, String>) {
    for name in files.keys().map(String::as_str).chain(FILES) {
        let _ = fs::remove_file(folder.join(name));
    }
    let _ = fs::remove_dir(folder);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_taken_gets_a_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.step-3");
        assert_eq!(free_name(&path), path);
        fs::create_dir(&path).unwrap();
        assert_eq!(free_name(&path), dir.path().join("out.step-3-2"));
    }

    #[test]
    fn files_of_an_earlier_run_are_set_aside_and_those_of_the_user_stay() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        assert!(set_aside(&folder.join("none")).unwrap().is_empty());
        fs::write(folder.join("outside"), "x").unwrap();
        assert!(set_aside(&folder.join("outside")).unwrap().is_empty());
        let mut file = RunFile::new(None, BTreeMap::new());
        for name in ["tokenizer.json", "tokenizer_config.json", "outside"] {
            fs::write(folder.join(name), "x").unwrap();
            file.files.insert(name.into(), format!("{:08x}", crc32fast::hash(b"x")));
        }
        fs::write(folder.join("tokenizer_config.json"), "changed").unwrap();
        file.write(folder).unwrap();
        // Where one of them cannot be, none is.
        let in_the_way = aside(&folder.join(run_file::FILE));
        fs::create_dir(&in_the_way).unwrap();
        assert!(set_aside(folder).is_err());
        assert!(folder.join("tokenizer.json").is_file() && folder.join(run_file::FILE).is_file());
        fs::remove_dir(in_the_way).unwrap();
        let paths = set_aside(folder).unwrap();
        assert_eq!(paths, ["tokenizer.json", run_file::FILE].map(|name| folder.join(name)));
        paths.iter().for_each(|path| fs::remove_file(aside(path)).unwrap());
        let mut left: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["outside", "tokenizer_config.json"]);
    }

    #[test]
    fn what_others_have_put_into_a_folder_stays() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("out.step-3");
        fs::create_dir(&folder).unwrap();
        let files = BTreeMap::from([("tokenizer.json".to_owned(), String::new())]);
        for name in FILES.iter().chain(&["notes", "tokenizer.json"]) {
            fs::write(folder.join(name), "").unwrap();
        }
        remove(&folder, &files);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_file(folder.join("notes")).unwrap();
        remove(&folder, &files);
        assert!(!folder.exists());
    }
}
