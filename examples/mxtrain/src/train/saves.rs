//! Where a run is saved: in its folder or, while that is not possible, beside it.
//!
//! NOTE: a save that fails must cost no step. So the checkpoint goes to another name, `OUT.step-N`,
//! which --resume takes as well, and the next save tries OUT again. Not to the temporary folder, which
//! may be memory and is gone after a restart; a user who wants a third place names it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mxfp4train::Trainer;

use super::lock::RunLock;
use super::shell_word;
use crate::console;
use crate::failure::{Failure, Outcome};
use crate::hugging_face;
use crate::run_file::{self, RunFile};

/// The files of a checkpoint of this program.
const FILES: [&str; 5] =
    ["config.json", "model.safetensors", "trainer.json", "trainer.safetensors", run_file::FILE];

/// The saves of a run.
pub(crate) struct Saves {
    /// The run's folder.
    pub(crate) out: PathBuf,
    /// Where to save if neither `out` nor its parent can be written.
    pub(crate) fallback: Option<PathBuf>,
    pub(crate) run_file: RunFile,
    /// Put beside the checkpoint's own files, with `run_file`.
    files: hugging_face::Files,
    pub(crate) lock: RunLock,
    /// Step and place of the last save.
    last: Option<(u64, PathBuf)>,
    /// A folder beside `out` that this run has made.
    beside: Option<PathBuf>,
}

impl Saves {
    pub(crate) fn new(
        out: PathBuf,
        fallback: Option<PathBuf>,
        run_file: RunFile,
        files: hugging_face::Files,
        lock: RunLock,
    ) -> Self {
        Self { out, fallback, run_file, files, lock, last: None, beside: None }
    }

    /// The first save: a folder that cannot be written should not show after hours.
    pub(crate) fn first(&mut self, trainer: &mut Trainer) -> Outcome {
        trainer.save(&self.out)?;
        self.put_files(&self.out.clone())?;
        self.lock.renew();
        self.last = Some((trainer.steps_done(), self.out.clone()));
        Ok(())
    }

    /// Saves what is not saved, in `out` or elsewhere, and says where.
    ///
    /// # Errors
    /// Where no place is left, with the reasons.
    pub(crate) fn save(&mut self, trainer: &mut Trainer) -> Outcome {
        let step = trainer.steps_done();
        if self.is_in_out(step) {
            return Ok(());
        }
        let Err(failure) = self.save_to(&self.out.clone(), trainer) else {
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
            return Ok(());
        };
        if self.last.as_ref().is_some_and(|(saved, _)| *saved == step) {
            // Beside it, by an earlier try.
            return Ok(());
        }
        let mut reasons = failure.message;
        // Also of ".", the current folder.
        let out = std::path::absolute(&self.out).unwrap_or_else(|_| self.out.clone());
        let name = out.file_name().map(|name| name.to_string_lossy().into_owned());
        let name = format!("{}.step-{step}", name.unwrap_or_else(|| "checkpoint".into()));
        let parent = out.parent().map(Path::to_owned);
        for folder in parent.into_iter().chain(self.fallback.clone()) {
            let place = free_name(&folder.join(&name));
            match self.save_to(&place, trainer) {
                Err(failure) => reasons.push_str(&format!("; {}", failure.message)),
                Ok(()) => {
                    console::note(&format!(
                        "mxtrain: warning: {reasons}; step {step} is saved in {0} instead; go on from \
                         it with: mxtrain train --resume {1}",
                        place.display(),
                        shell_word(place.as_os_str())
                    ));
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

    fn save_to(&mut self, folder: &Path, trainer: &mut Trainer) -> Outcome {
        trainer.save(folder)?;
        // In `out` they are carried along, unless the folder was made anew.
        if !folder.join(run_file::FILE).exists() {
            self.put_files(folder)?;
        }
        Ok(())
    }

    /// Puts the files that are not the library's into a checkpoint folder.
    fn put_files(&mut self, folder: &Path) -> Outcome {
        // One that cannot be read lists nothing: what is in the folder is then taken for the user's.
        let before = RunFile::read(folder).ok().flatten().map(|file| file.files);
        self.run_file.files = self.files.put(folder, &before.unwrap_or_default())?;
        for note in self.files.notes.drain(..) {
            console::note(&format!("mxtrain: note: {note}"));
        }
        self.run_file.write(folder)
    }
}

/// The path, or with a number behind it if it is taken.
fn free_name(path: &Path) -> PathBuf {
    let numbered = |n: u64| PathBuf::from(format!("{}-{n}", path.display()));
    let is_free = |path: &PathBuf| path.symlink_metadata().is_err();
    let names = std::iter::once(path.to_owned()).chain((2..1000).map(numbered));
    names.into_iter().find(is_free).unwrap_or_else(|| numbered(1000))
}

/// Removes a checkpoint that this run has made, with its `files`, but not what others have put there.
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
