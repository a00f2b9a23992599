//! `mxt_files`: the files of a checkpoint without a folder, in memory or wherever the host has them.

use std::ffi::{CStr, CString, c_char, c_void};
use std::io;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::arguments::{self, check};
use super::engine::mxt_engine;
use super::float_mode;
use super::group::mxt_user_data_free_fn;
use super::guard;
use super::handle::{Handle, State, keep, refused};
use super::message::Slot;
use super::model::{mxt_model, stored_weights};
use super::snapshot::mxt_snapshot;
use super::status::{Failure, mxt_status};
use super::structs::{self, Options, read, versioned};
use super::trainer::mxt_trainer;
use super::user_data::UserData;
use crate::reserve::{self, reserve};
use crate::{FileRead, FileSave, Files, MemoryFiles, Model, Trainer};

/// What mxt_file_open_fn returns where there is no file of the name.
pub const MXT_NO_SUCH_FILE: i32 = 1;

/// Opens the file `name` for reading, such as "model.safetensors": stores in `*file` what the other
/// functions get for it, which is not looked at, and in `*size` its bytes. `name` is borrowed for the
/// call. Several files are open at once.
///
/// Returns 0; MXT_NO_SUCH_FILE where there is none of this name, which is no failure; any other number
/// ends the load.
pub type mxt_file_open_fn = Option<
    unsafe extern "C-unwind" fn(
        user_data: *mut c_void,
        name: *const c_char,
        file: *mut *mut c_void,
        size: *mut u64,
    ) -> i32,
>;

/// Stores the `count` bytes from `offset` on in `to`, all of which lie in the file. A file is what it
/// was when it was opened. Returns 0; any other number ends the load.
pub type mxt_file_read_fn = Option<
    unsafe extern "C-unwind" fn(
        user_data: *mut c_void,
        file: *mut c_void,
        offset: u64,
        to: *mut c_void,
        count: usize,
    ) -> i32,
>;

/// Ends the use of a file: called exactly once for each that was opened or created, also after a
/// failure: a new file that has fewer bytes then than were announced is one of a save that has failed.
/// Returns 0; any other number ends a save, of a file that was written.
pub type mxt_file_close_fn =
    Option<unsafe extern "C-unwind" fn(user_data: *mut c_void, file: *mut c_void) -> i32>;

/// Begins a save. Returns 0; any other number ends it, and nothing else is called.
pub type mxt_files_begin_fn = Option<unsafe extern "C-unwind" fn(user_data: *mut c_void) -> i32>;

/// Begins the file `name`, of which `size` bytes are going to be written, and stores in `*file` what the
/// other functions get for it. `name` is borrowed for the call. One file is written at a time. Returns
/// 0; any other number ends the save.
pub type mxt_file_create_fn = Option<
    unsafe extern "C-unwind" fn(
        user_data: *mut c_void,
        name: *const c_char,
        size: u64,
        file: *mut *mut c_void,
    ) -> i32,
>;

/// Appends `count` bytes to the file. Returns 0; any other number ends the save.
pub type mxt_file_write_fn = Option<
    unsafe extern "C-unwind" fn(
        user_data: *mut c_void,
        file: *mut c_void,
        from: *const c_void,
        count: usize,
    ) -> i32,
>;

/// Makes what was written since the save began the checkpoint, all of it at once. Files of the one
/// before that were not written again are no part of it: mxt_file_open_fn must not find a
/// "trainer.json" or "trainer.safetensors" any more where a model was saved without a training state.
/// Returns 0; any other number says that this was not done, and the save is given up.
pub type mxt_files_commit_fn = Option<unsafe extern "C-unwind" fn(user_data: *mut c_void) -> i32>;

/// Gives up the save that was begun, for something failed: called once in place of a successful
/// commit, when all its files are closed. What the files were before the save, they must be after it.
pub type mxt_files_abort_fn = Option<unsafe extern "C-unwind" fn(user_data: *mut c_void)>;

/// Says why another of the functions has just failed, as a line for a person: UTF-8, read before
/// anything else is called. NULL where there is nothing to say.
pub type mxt_files_error_fn =
    Option<unsafe extern "C-unwind" fn(user_data: *mut c_void) -> *const c_char>;

/// The host's functions for the files of a checkpoint. Fill it with mxt_file_callbacks_init.
///
/// They run on the thread that is inside the call that loads or saves, in which only that call uses
/// them. They may call the library, but calls on the mxt_files, on the trainer that is saved, and such
/// as would change the model that is saved, return MXT_ERROR_BUSY. They must not throw or longjmp.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct mxt_file_callbacks {
    /// Set by mxt_file_callbacks_init.
    pub struct_size: usize,
    /// Passed to the functions below. It must stay valid until `user_data_free` is called with it.
    pub user_data: *mut c_void,
    /// Opens a file. NULL (default): nothing can be loaded.
    pub open: mxt_file_open_fn,
    /// Reads a piece of a file. Must be there where `open` is.
    pub read: mxt_file_read_fn,
    /// Closes a file. Must be there.
    pub close: mxt_file_close_fn,
    /// Begins a save, or NULL (default) where nothing is to be done then.
    pub begin: mxt_files_begin_fn,
    /// Begins a file of a save. NULL (default): nothing can be saved.
    pub create: mxt_file_create_fn,
    /// Writes a piece of a file. Must be there where `create` is.
    pub write: mxt_file_write_fn,
    /// Ends a save that has succeeded. Must be there where `create` is.
    pub commit: mxt_files_commit_fn,
    /// Ends a save that has failed. Must be there where `create` is.
    pub abort: mxt_files_abort_fn,
    /// Says why a function failed, or NULL (default): messages have the number that it returned.
    pub error: mxt_files_error_fn,
    /// Called with `user_data`, whatever it is, exactly once for each call of mxt_files_from_callbacks
    /// that succeeds, when the library will never call the functions above again: at the end of
    /// mxt_files_free, or of the call that still uses the files then. A mxt_files_from_callbacks that
    /// fails never calls it: user_data is the caller's still. NULL (default): nothing is called.
    pub user_data_free: mxt_user_data_free_fn,
}
versioned!(mxt_file_callbacks, last = user_data_free: mxt_user_data_free_fn);

impl Options for mxt_file_callbacks {
    fn defaults() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            user_data: std::ptr::null_mut(),
            open: None,
            read: None,
            close: None,
            begin: None,
            create: None,
            write: None,
            commit: None,
            abort: None,
            error: None,
            user_data_free: None,
        }
    }
}

/// A set of named files that checkpoints are loaded from and saved to, in place of a folder: the host's
/// (mxt_files_from_callbacks) or in memory (mxt_files_in_memory). Their bytes are those of a folder's
/// files: "config.json" and "model.safetensors" and, of a trainer, "trainer.json" and
/// "trainer.safetensors". Loads read a model in several files with an index, too.
///
/// What uses it needs it for itself; loads from memory may run at once on several threads. Make with
/// one of the two, free with mxt_files_free.
pub struct mxt_files {
    state: State,
    set: RwLock<Set>,
    /// Whether its files are in memory.
    is_memory: bool,
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
        Self { state: State::new(), set: RwLock::new(set), is_memory }.into_raw()
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

type OpenFn =
    unsafe extern "C-unwind" fn(*mut c_void, *const c_char, *mut *mut c_void, *mut u64) -> i32;
type ReadFn = unsafe extern "C-unwind" fn(*mut c_void, *mut c_void, u64, *mut c_void, usize) -> i32;
type CloseFn = unsafe extern "C-unwind" fn(*mut c_void, *mut c_void) -> i32;
type EndFn = unsafe extern "C-unwind" fn(*mut c_void) -> i32;
type CreateFn =
    unsafe extern "C-unwind" fn(*mut c_void, *const c_char, u64, *mut *mut c_void) -> i32;
type WriteFn = unsafe extern "C-unwind" fn(*mut c_void, *mut c_void, *const c_void, usize) -> i32;

/// The host's functions.
struct Host {
    user_data: UserData,
    reading: Option<(OpenFn, ReadFn)>,
    close: CloseFn,
    writing: Option<Writing>,
    error: mxt_files_error_fn,
}

#[derive(Clone, Copy)]
struct Writing {
    begin: Option<EndFn>,
    create: CreateFn,
    write: WriteFn,
    commit: EndFn,
    abort: unsafe extern "C-unwind" fn(*mut c_void),
}

impl Host {
    fn new(callbacks: mxt_file_callbacks) -> Result<Self, Failure> {
        let mxt_file_callbacks {
            struct_size: _,
            user_data,
            open,
            read,
            close,
            begin,
            create,
            write,
            commit,
            abort,
            error,
            user_data_free,
        } = callbacks;
        let close = close.ok_or_else(|| Failure::null("close of the callbacks"))?;
        let reading = match (open, read) {
            (None, None) => None,
            (Some(open), Some(read)) => Some((open, read)),
            _ => return Err(Failure::null("one of open and read of the callbacks")),
        };
        let writing = match (create, write, commit, abort) {
            (None, None, None, None) if begin.is_none() => None,
            (Some(create), Some(write), Some(commit), Some(abort)) => {
                Some(Writing { begin, create, write, commit, abort })
            }
            _ => {
                return Err(Failure::null(
                    "one of create, write, commit and abort of the callbacks",
                ));
            }
        };
        if reading.is_none() && writing.is_none() {
            return Err(Failure::null("open and create of the callbacks"));
        }
        Ok(Self {
            user_data: UserData::new(user_data, user_data_free),
            reading,
            close,
            writing,
            error,
        })
    }

    /// Runs one of the functions, which returns a number; others than 0 are failures.
    fn call(&self, name: &str, function: impl FnOnce(*mut c_void) -> i32) -> io::Result<()> {
        match float_mode::in_hosts(|| function(self.user_data.pointer)) {
            0 => Ok(()),
            code => Err(self.failure(name, code)),
        }
    }

    /// What the host says of a failure.
    fn failure(&self, name: &str, code: i32) -> io::Error {
        /// As much as a message of ours has room for.
        const MOST: usize = 1023;
        let mut said = Vec::new();
        if let Some(error) = self.error {
            // SAFETY: the header asks for a function that takes this pointer.
            let text = float_mode::in_hosts(|| unsafe { error(self.user_data.pointer) });
            if !text.is_null() && reserve(&mut said, "a message", MOST).is_ok() {
                // SAFETY: the header asks for a text that ends with a zero byte; nothing behind that
                // is read.
                let bytes = (0..MOST).map(|at| unsafe { text.add(at).cast::<u8>().read() });
                said.extend(bytes.take_while(|byte| *byte != 0));
            }
        }
        let said = String::from_utf8_lossy(&said);
        let message = match &*said {
            "" => reserve::text("a message", format_args!("the callback {name} returned {code}")),
            said => reserve::text("a message", format_args!("{said}")),
        };
        io::Error::other(message.unwrap_or_default())
    }

    /// Closes a file.
    fn close(&self, file: *mut c_void) -> io::Result<()> {
        // SAFETY: the header asks for a function that takes what the host made of a file, once.
        self.call("close", |user_data| unsafe { (self.close)(user_data, file) })
    }
}

/// A name as the host gets it.
fn c_name(name: &str) -> io::Result<CString> {
    CString::new(name).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn cannot(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, format!("the callbacks for {what} are NULL"))
}

impl Files for Host {
    fn open(&self, name: &str) -> io::Result<Option<Box<dyn FileRead + '_>>> {
        let (open, read) = self.reading.ok_or_else(|| cannot("reading"))?;
        let (name, mut file, mut size) = (c_name(name)?, std::ptr::null_mut(), 0);
        let user_data = self.user_data.pointer;
        // SAFETY: the header asks for a function that takes these.
        match float_mode::in_hosts(|| unsafe {
            open(user_data, name.as_ptr(), &raw mut file, &raw mut size)
        }) {
            0 => Ok(Some(Box::new(HostFile { host: self, file, size, read }))),
            MXT_NO_SUCH_FILE => Ok(None),
            code => Err(self.failure("open", code)),
        }
    }

    fn save(&mut self) -> io::Result<Box<dyn FileSave + '_>> {
        let writing = self.writing.ok_or_else(|| cannot("writing"))?;
        if let Some(begin) = writing.begin {
            // SAFETY: the header asks for a function that takes this pointer.
            self.call("begin", |user_data| unsafe { begin(user_data) })?;
        }
        Ok(Box::new(HostSave { host: self, writing, file: None, is_done: false }))
    }
}

/// An open file of the host's.
struct HostFile<'a> {
    host: &'a Host,
    file: *mut c_void,
    size: u64,
    read: ReadFn,
}

impl FileRead for HostFile<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        let (out, count) = (to.as_mut_ptr().cast(), to.len());
        self.host.call("read", |user_data| {
            // SAFETY: the header asks for a function that writes so many bytes.
            unsafe { (self.read)(user_data, self.file, offset, out, count) }
        })
    }
}

impl Drop for HostFile<'_> {
    fn drop(&mut self) {
        // What was read is not less true for it.
        let _ = self.host.close(self.file);
    }
}

/// A save to the host's files.
struct HostSave<'a> {
    host: &'a Host,
    writing: Writing,
    /// The one that is written.
    file: Option<*mut c_void>,
    is_done: bool,
}

impl FileSave for HostSave<'_> {
    fn create(&mut self, name: &str, size: u64) -> io::Result<()> {
        let (name, mut file) = (c_name(name)?, std::ptr::null_mut());
        let create = self.writing.create;
        self.host.call("create", |user_data| {
            // SAFETY: the header asks for a function that takes these.
            unsafe { create(user_data, name.as_ptr(), size, &raw mut file) }
        })?;
        self.file = Some(file);
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let (write, file) = (self.writing.write, self.file.ok_or(io::ErrorKind::InvalidInput)?);
        self.host.call("write", |user_data| {
            // SAFETY: the header asks for a function that reads so many bytes.
            unsafe { write(user_data, file, bytes.as_ptr().cast(), bytes.len()) }
        })
    }

    fn close(&mut self) -> io::Result<()> {
        self.file.take().map_or(Ok(()), |file| self.host.close(file))
    }

    fn commit(mut self: Box<Self>) -> io::Result<()> {
        let commit = self.writing.commit;
        // SAFETY: the header asks for a function that takes this pointer.
        self.host.call("commit", |user_data| unsafe { commit(user_data) })?;
        self.is_done = true;
        Ok(())
    }
}

impl Drop for HostSave<'_> {
    fn drop(&mut self) {
        if self.is_done {
            return;
        }
        let _ = self.close();
        let (abort, user_data) = (self.writing.abort, self.host.user_data.pointer);
        // SAFETY: the header asks for a function that takes this pointer.
        float_mode::in_hosts(|| unsafe { abort(user_data) });
    }
}

/// Fills `callbacks` with the defaults. `struct_size` is sizeof(mxt_file_callbacks) as the caller's
/// compiler sees it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_file_callbacks_init(
    callbacks: *mut mxt_file_callbacks,
    struct_size: usize,
) -> mxt_status {
    // SAFETY: the caller's struct has `struct_size` bytes.
    guard::function("mxt_file_callbacks_init", || unsafe { structs::init(callbacks, struct_size) })
}

/// Makes files that the host reads and writes, and stores them in `*files` for the caller to free.
/// `callbacks` is not read after the call.
///
/// Errors: MXT_ERROR_NULL (also for functions that must be there), MXT_ERROR_STRUCT_SIZE. The message
/// is in mxt_last_error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_files_from_callbacks(
    callbacks: *const mxt_file_callbacks,
    files: *mut *mut mxt_files,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::maker("mxt_files_from_callbacks", || unsafe {
        let out = arguments::place("files", files)?;
        let host = Host::new(read("callbacks", callbacks)?)?;
        host.user_data.keep();
        out.put(mxt_files::new(Set::Host(host)));
        Ok(())
    })
}

/// Makes a set of files in memory, of which there are none yet, and stores it in `*files` for the caller
/// to free.
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

/// Number of files in memory. 0 for files of the host's own, while another call changes them, and if
/// `files` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_files_count(files: *const mxt_files) -> usize {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe {
        guard::getter("mxt_files_count", files, |files| {
            files.memory(|memory| Ok(memory.names.len())).unwrap_or_default()
        })
    }
}

/// The name of file `index` in memory (0 to mxt_files_count - 1), in the order of their bytes; NULL where
/// there is no such file, and if `files` is NULL. The text is valid until the files change or are freed.
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

/// Stores in `*bytes` where the bytes of a file in memory lie, and in `*count` how many there are. They
/// are valid, to be read, until the files change or are freed.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (no file of this name, or files of
/// the host's own), MXT_ERROR_BUSY.
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

/// mxt_files_put without a copy, of bytes that lie in the host's memory, such as a map of a file: they
/// have to stay there, unchanged, until `user_data_free` is called with `user_data`: once, when the file
/// is replaced or removed or the files are freed. `user_data_free` may be NULL; calls on the
/// files from it return MXT_ERROR_BUSY.
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

/// mxt_model_load of files that lie elsewhere than in a folder. They are read in pieces; memory that was
/// lent is not copied.
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
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO (what the host's functions fail at),
/// MXT_ERROR_NOT_FINITE (a weight), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
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

/// mxt_trainer_load of files that lie elsewhere than in a folder or, where `optimizer` is not NULL,
/// mxt_trainer_load_as.
///
/// Errors: those of mxt_trainer_load_as, with MXT_ERROR_IO for what the host's functions fail at, and
/// MXT_ERROR_BUSY.
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

/// mxt_trainer_save to files that lie elsewhere than in a folder. A failure leaves the files as they
/// were, and where they are the host's its functions see to that. Collective; of a group, rank 0 writes,
/// and files of other ranks are not touched.
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

/// Gives the files up, and those in memory with them; NULL does nothing. What was loaded from them stays
/// usable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_files_free(files: *mut mxt_files) {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::free("mxt_files_free", files) }
}
