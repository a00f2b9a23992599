//! `mxt_files`: the files of a checkpoint without a folder, in memory or wherever the host has
//! them.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::arguments::{self, check};
use super::engine::mxt_engine;
use super::file_callbacks::{Host, mxt_file_callbacks};
use super::group::mxt_user_data_free_fn;
use super::guard;
use super::handle::{Handle, State, keep, refused};
use super::message::Slot;
use super::model::{mxt_model, stored_weights};
use super::snapshot::mxt_snapshot;
use super::status::{Failure, mxt_status};
use super::structs::read;
use super::trainer::mxt_trainer;
use super::user_data::UserData;
use crate::reserve::reserve;
use crate::{Files, MemoryFiles, Model, Trainer};

/// A set of named files that checkpoints are loaded from and saved to, in place of a folder: the
/// host's (mxt_files_from_callbacks) or in memory (mxt_files_in_memory). Their bytes are those of a
/// folder's files: "config.json" and "model.safetensors" and, of a trainer, "trainer.json" and
/// "trainer.safetensors". Loads read a model in several files with an index, too.
///
/// What uses it needs it for itself; loads from memory may run at once on several threads. Make
/// with one of the two, free with mxt_files_free.
pub struct mxt_files {
    state: State,
    set: RwLock<Set>,
    /// Whether its files are in memory.
    is_memory: bool,
    /// Runs that save to it.
    borrowers: AtomicUsize,
}

enum Set {
    Memory(Memory),
    Host(Host),
}

#[derive(Default)]
struct Memory {
    files: MemoryFiles,
    /// The names as C strings, which mxt_files_name lends.
    names: Vec<CString>,
}

impl mxt_files {
    fn new(set: Set) -> *mut Self {
        let is_memory = matches!(set, Set::Memory(_));
        let (state, set, borrowers) = (State::new(), RwLock::new(set), AtomicUsize::new(0));
        Self { state, set, is_memory, borrowers }.into_raw()
    }

    /// Runs a load.
    fn load<R>(&self, body: impl FnOnce(&dyn Files) -> Result<R, Failure>) -> Result<R, Failure> {
        if self.is_memory {
            return body(self.shared()?.files());
        }
        // The host is asked for one thing at a time.
        body(self.exclusive()?.files())
    }

    /// Runs a save.
    fn save<R>(
        &self,
        body: impl FnOnce(&mut dyn Files) -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        let mut set = self.exclusive()?;
        match &mut *set {
            Set::Host(host) => body(host),
            Set::Memory(memory) => {
                // NOTE: before, so that nothing fails once files have changed.
                let mut names = Vec::new();
                reserve(&mut names, NAMES, memory.names.len() + MemoryFiles::CHECKPOINT.len())?;
                let result = body(&mut memory.files)?;
                memory.list(names);
                Ok(result)
            }
        }
    }

    /// Saves a trainer.
    pub(super) fn save_trainer(&self, trainer: &mxt_trainer) -> Result<(), Failure> {
        self.save(|files| trainer.exclusive(|trainer| Ok(trainer.save_to(files)?)))
    }

    /// Files in memory, to be looked at.
    fn memory<R>(&self, body: impl FnOnce(&Memory) -> Result<R, Failure>) -> Result<R, Failure> {
        match &*self.shared()? {
            Set::Memory(memory) => body(memory),
            Set::Host(_) => Err(not_in_memory()),
        }
    }

    /// Files in memory, to be changed.
    fn change(
        &self,
        body: impl FnOnce(&mut MemoryFiles) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        match &mut *self.exclusive()? {
            Set::Memory(memory) => {
                let mut names = Vec::new();
                reserve(&mut names, NAMES, memory.names.len() + 1)?;
                body(&mut memory.files)?;
                memory.list(names);
                Ok(())
            }
            Set::Host(_) => Err(not_in_memory()),
        }
    }

    fn shared(&self) -> Result<RwLockReadGuard<'_, Set>, Failure> {
        self.set.try_read().map_err(refused)
    }

    fn exclusive(&self) -> Result<RwLockWriteGuard<'_, Set>, Failure> {
        self.set.try_write().map_err(refused)
    }
}

const NAMES: &str = "the names of files";

fn not_in_memory() -> Failure {
    Failure::invalid("files", "expected files in memory (mxt_files_in_memory), got the host's own")
}

impl Set {
    fn files(&self) -> &dyn Files {
        match self {
            Self::Memory(memory) => &memory.files,
            Self::Host(host) => host,
        }
    }
}

impl Memory {
    /// Lists the names anew, in a list with room for all.
    fn list(&mut self, mut names: Vec<CString>) {
        // No name has a zero byte: they came as C strings, or are ours.
        names.extend(self.files.names().filter_map(|name| CString::new(name).ok()));
        self.names = names;
    }
}

impl Handle for mxt_files {
    const SLOT: Slot = Slot::Files;
    const NAME: &'static str = "files";

    fn state(&self) -> &State {
        &self.state
    }
}

/// Files of which a call makes use beside its own handle.
///
/// # Safety
/// `files` is NULL or a live handle.
pub(super) unsafe fn given(files: *const mxt_files) -> Result<Arc<mxt_files>, Failure> {
    // SAFETY: as promised by the caller.
    let files = unsafe { keep(files) }.ok_or_else(|| Failure::null("files"))?;
    match files.state.refusal() {
        Some(refusal) => Err(refusal),
        None => Ok(files),
    }
}

/// Files for as long as a run lasts, also where the host gives them up meanwhile.
pub(super) struct Borrowed(Arc<mxt_files>);

/// [`given`] for a run.
///
/// # Safety
/// `files` is NULL or a live handle.
pub(super) unsafe fn borrowed(files: *const mxt_files) -> Result<Borrowed, Failure> {
    // SAFETY: as promised by the caller.
    let files = unsafe { given(files) }?;
    files.borrowers.fetch_add(1, Ordering::AcqRel);
    Ok(Borrowed(files))
}

impl Deref for Borrowed {
    type Target = mxt_files;

    fn deref(&self) -> &mxt_files {
        &self.0
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.0.borrowers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Makes files that the host reads and writes, and stores them in `*files` for the caller to free.
/// `callbacks` is not read after the call.
///
/// Errors: MXT_ERROR_NULL (also for functions that must be there), MXT_ERROR_STRUCT_SIZE. The
/// message is in mxt_last_error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_files_from_callbacks(
    callbacks: *const mxt_file_callbacks,
    files: *mut *mut mxt_files,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::maker("mxt_files_from_callbacks", || unsafe {
        let out = arguments::place("files", files)?;
        let host = Host::new(read("callbacks", callbacks)?)?;
        host.keep();
        out.put(mxt_files::new(Set::Host(host)));
        Ok(())
    })
}

/// Makes a set of files in memory, of which there are none yet, and stores it in `*files` for the
/// caller to free.
///
/// Errors: MXT_ERROR_NULL. The message is in mxt_last_error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_files_in_memory(files: *mut *mut mxt_files) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::maker("mxt_files_in_memory", || unsafe {
        let out = arguments::place("files", files)?;
        out.put(mxt_files::new(Set::Memory(Memory::default())));
        Ok(())
    })
}

/// Number of files in memory. 0 for files of the host's own, while another call changes them, and
/// if `files` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_files_count(files: *const mxt_files) -> usize {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe {
        guard::getter("mxt_files_count", files, |files| {
            files.memory(|memory| Ok(memory.names.len())).unwrap_or_default()
        })
    }
}

/// The name of file `index` in memory (0 to mxt_files_count - 1), in the order of their bytes; NULL
/// where there is no such file, and if `files` is NULL. The text is valid until the files change or
/// are freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_files_name(files: *const mxt_files, index: usize) -> *const c_char {
    // SAFETY: a live handle or NULL, as the header asks.
    let name = unsafe {
        guard::getter("mxt_files_name", files, |files| {
            let name = files.memory(|memory| Ok(memory.names.get(index).map(|name| name.as_ptr())));
            name.unwrap_or_default()
        })
    };
    name.unwrap_or(std::ptr::null())
}

/// Stores in `*bytes` where the bytes of a file in memory lie, and in `*count` how many there are.
/// They are valid, to be read, until the files change or are freed.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (no file of this name, or
/// files of the host's own), MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_files_view(
    files: *const mxt_files,
    name: *const c_char,
    bytes: *mut *const c_void,
    count: *mut usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_files_view", files, |files| {
            let name = arguments::text("name", name)?;
            let to_bytes = arguments::place("bytes", bytes)?;
            let to_count = arguments::place("count", count)?;
            files.memory(|memory| {
                let found = memory.files.get(&name).ok_or_else(|| no_such_file(memory, &name))?;
                to_bytes.put(found.as_ptr().cast());
                to_count.put(found.len());
                Ok(())
            })
        })
    }
}

fn no_such_file(memory: &Memory, name: &str) -> Failure {
    let first = memory.names.first().map(|name| name.as_c_str());
    let there = match first.map(CStr::to_string_lossy) {
        Some(first) => format!("{} others, such as {first:?}", memory.names.len()),
        None => "none".into(),
    };
    Failure::invalid(
        "name",
        format!("expected the name of a file, got {name:?}; there are {there}"),
    )
}

/// Puts a copy of `count` bytes into memory as the file `name`, in place of one of the same name.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (an empty name, files of the
/// host's own), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY; the files are then as before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_files_put(
    files: *mut mxt_files,
    name: *const c_char,
    bytes: *const c_void,
    count: usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_files_put", files.cast_const(), |files| {
            let name = file_name(name)?;
            let mut copy = Vec::new();
            if count > 0 {
                check::<u8>("bytes", bytes.cast(), count)?;
                reserve(&mut copy, "a file in memory", count)?;
                copy.extend_from_slice(std::slice::from_raw_parts(bytes.cast(), count));
            }
            files.change(|files| {
                files.put(name, copy);
                Ok(())
            })
        })
    }
}

/// mxt_files_put without a copy, of bytes that lie in the host's memory, such as a map of a file:
/// they have to stay there, unchanged, until `user_data_free` is called with `user_data`: once,
/// when the file is replaced or removed or the files are freed. `user_data_free` may be NULL; calls
/// on the files from it return MXT_ERROR_BUSY.
///
/// Errors: those of mxt_files_put; the user data stay the caller's then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_files_lend(
    files: *mut mxt_files,
    name: *const c_char,
    bytes: *const c_void,
    count: usize,
    user_data: *mut c_void,
    user_data_free: mxt_user_data_free_fn,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_files_lend", files.cast_const(), |files| {
            let name = file_name(name)?;
            if count > 0 {
                check::<u8>("bytes", bytes.cast(), count)?;
            }
            let bytes =
                if count > 0 { bytes.cast() } else { std::ptr::NonNull::dangling().as_ptr() };
            let host = UserData::new(user_data, user_data_free);
            files.change(|files| {
                host.keep();
                files.lend(name, Arc::new(Lent { bytes, count, _host: host }));
                Ok(())
            })
        })
    }
}

/// Bytes in the host's memory.
struct Lent {
    bytes: *const u8,
    count: usize,
    _host: UserData,
}

// SAFETY: the header asks for bytes that do not change, which any thread may read.
unsafe impl Send for Lent {}
// SAFETY: as above.
unsafe impl Sync for Lent {}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the header asks for so many bytes that stay as long as the user data.
        unsafe { std::slice::from_raw_parts(self.bytes, self.count) }
    }
}

/// The name of a file that is put.
///
/// # Safety
/// `name` is NULL or ends with a zero byte.
unsafe fn file_name(name: *const c_char) -> Result<String, Failure> {
    // SAFETY: as promised by the caller.
    let name = unsafe { arguments::text("name", name) }?;
    if name.is_empty() {
        return Err(Failure::invalid("name", "expected the name of a file, got an empty string"));
    }
    Ok(name)
}

/// Removes a file from memory.
///
/// Errors: as mxt_files_view.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_files_remove(
    files: *mut mxt_files,
    name: *const c_char,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_files_remove", files.cast_const(), |files| {
            let name = arguments::text("name", name)?;
            files.memory(|memory| match memory.files.get(&name) {
                Some(_) => Ok(()),
                None => Err(no_such_file(memory, &name)),
            })?;
            files.change(|files| {
                files.remove(&name);
                Ok(())
            })
        })
    }
}

/// mxt_model_load of files that lie elsewhere than in a folder. They are read in pieces; memory
/// that was lent is not copied.
///
/// Errors: those of mxt_model_load, with MXT_ERROR_IO for what the host's functions fail at, and
/// MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_load_from(
    engine: *const mxt_engine,
    files: *mut mxt_files,
    model: *mut *mut mxt_model,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::child("mxt_model_load_from", engine, |engine| {
            let out = arguments::place("model", model)?;
            let files = given(files.cast_const())?;
            let loaded = files.load(|files| Ok(Model::load_from(&engine.engine, files)?))?;
            out.put(mxt_model::new(loaded)?.into_raw());
            Ok(())
        })
    }
}

/// mxt_model_save_as to files that lie elsewhere than in a folder. `weights` is one of
/// mxt_stored_weights. A failure leaves the files as they were, and where they are the host's its
/// functions see to that.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO (what the host's functions fail
/// at), MXT_ERROR_NOT_FINITE (a weight), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_save_to(
    model: *const mxt_model,
    files: *mut mxt_files,
    weights: i32,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_save_to", model, |model| {
            let files = given(files.cast_const())?;
            let weights = stored_weights(weights)?;
            let _reading = model.state().access().read()?;
            files.save(|files| Ok(model.model.save_to(files, weights)?))
        })
    }
}

/// mxt_model_load_lora of files that lie elsewhere than in a folder.
///
/// Errors: those of mxt_model_load_lora, with MXT_ERROR_IO for what the host's functions fail at.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_load_lora_from(
    model: *const mxt_model,
    files: *mut mxt_files,
    adapted: *mut *mut mxt_model,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_load_lora_from", model, |model| {
            let out = arguments::place("adapted", adapted)?;
            let files = given(files.cast_const())?;
            let _reading = model.state().access().read()?;
            let loaded = files.load(|files| Ok(model.model.load_lora_from(files)?))?;
            out.put(mxt_model::new(loaded)?.into_raw());
            Ok(())
        })
    }
}

/// mxt_model_save_lora to files that lie elsewhere than in a folder. In memory a checkpoint beside them
/// stays; give adapters a set of files of their own where `commit` of the host replaces all.
///
/// Errors: those of mxt_model_save_to, and MXT_ERROR_INVALID_ARGUMENT also for a model without
/// adapters.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_save_lora_to(
    model: *const mxt_model,
    files: *mut mxt_files,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_save_lora_to", model, |model| {
            let files = given(files.cast_const())?;
            let _reading = model.state().access().read()?;
            files.save(|files| Ok(model.model.save_lora_to(files)?))
        })
    }
}

/// mxt_trainer_load of files that lie elsewhere than in a folder or, where `optimizer` is not NULL,
/// mxt_trainer_load_as.
///
/// Errors: those of mxt_trainer_load_as, with MXT_ERROR_IO for what the host's functions fail at,
/// and MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_load_from(
    engine: *const mxt_engine,
    files: *mut mxt_files,
    optimizer: *const c_char,
    trainer: *mut *mut mxt_trainer,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::child("mxt_trainer_load_from", engine, |engine| {
            let out = arguments::place("trainer", trainer)?;
            let files = given(files.cast_const())?;
            let optimizer = match optimizer.is_null() {
                true => None,
                false => Some(arguments::text("optimizer", optimizer)?.parse()?),
            };
            let engine = &engine.engine;
            let loaded = files.load(|files| {
                Ok(match &optimizer {
                    None => Trainer::load_from(engine, files)?,
                    Some(stored) => Trainer::load_from_as(engine, files, stored)?,
                })
            })?;
            out.put(mxt_trainer::with_model(loaded)?);
            Ok(())
        })
    }
}

/// mxt_trainer_save to files that lie elsewhere than in a folder. A failure leaves the files as
/// they were, and where they are the host's its functions see to that. Collective; of a group, rank
/// 0 writes, and files of other ranks are not touched.
///
/// Errors: those of mxt_model_save_to, and MXT_ERROR_NOT_FINITE also for a moment.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_save_to(
    trainer: *mut mxt_trainer,
    files: *mut mxt_files,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_trainer_save_to", trainer.cast_const(), |trainer| {
            let files = given(files.cast_const())?;
            files.save_trainer(trainer)
        })
    }
}

/// mxt_snapshot_save to files that lie elsewhere than in a folder.
///
/// Errors: those of mxt_snapshot_save and of mxt_trainer_save_to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_snapshot_save_to(
    snapshot: *mut mxt_snapshot,
    files: *mut mxt_files,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_snapshot_save_to", snapshot.cast_const(), |snapshot| {
            let files = given(files.cast_const())?;
            files.save(|files| snapshot.copy(|copy| Ok(copy.save_to(files)?)))
        })
    }
}

/// The message of the last call with this handle that failed, on whichever thread; the empty string
/// when there is none.
///
/// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
/// call of mxt_files_last_error. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_files_last_error(files: *const mxt_files) -> *const c_char {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::last_error("mxt_files_last_error", files) }
}

/// Drops what the files hold while they are still there, and busy: what gives lent bytes or user data
/// back may call functions on them.
struct Emptied(Arc<mxt_files>);

impl Drop for Emptied {
    fn drop(&mut self) {
        if self.0.borrowers.load(Ordering::Acquire) == 0
            && let Ok(mut set) = self.0.exclusive()
        {
            let nothing = Set::Memory(Memory::default());
            drop(std::mem::replace(&mut *set, nothing));
        }
    }
}

/// Gives the files up, and those in memory with them; NULL does nothing. What was loaded from them
/// stays usable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_files_free(files: *mut mxt_files) {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe {
        if let Some(files) = keep(files.cast_const()) {
            guard::release("mxt_files_free", Emptied(files));
        }
        guard::free("mxt_files_free", files);
    }
}
