//! `mxt_file_callbacks`: the files of a checkpoint wherever the host has them.

use std::ffi::{CString, c_char, c_void};
use std::io;

use super::float_mode;
use super::group::mxt_user_data_free_fn;
use super::guard;
use super::status::{Failure, mxt_status};
use super::structs::{self, Options, versioned};
use super::user_data::UserData;
use crate::reserve::{self, reserve};
use crate::{FileRead, FileSave, Files};

/// What mxt_file_open_fn returns where there is no file of the name.
pub const MXT_NO_SUCH_FILE: i32 = 1;

/// Opens the file `name` for reading, such as "model.safetensors": stores in `*file` what the other
/// functions get for it, which is not looked at, and in `*size` its bytes. `name` is borrowed for
/// the call. Several files are open at once.
///
/// Returns 0; MXT_NO_SUCH_FILE where there is none of this name, which is no failure; any other
/// number ends the load.
pub type mxt_file_open_fn = Option<
    unsafe extern "C-unwind" fn(
        user_data: *mut c_void,
        name: *const c_char,
        file: *mut *mut c_void,
        size: *mut u64,
    ) -> i32,
>;

/// Stores the `count` bytes from `offset` on in `to`, all of which lie in the file. A file is what
/// it was when it was opened. Returns 0; any other number ends the load.
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
/// failure: a new file that has fewer bytes then than were announced is one of a save that has
/// failed. Returns 0; any other number ends a save, of a file that was written.
pub type mxt_file_close_fn =
    Option<unsafe extern "C-unwind" fn(user_data: *mut c_void, file: *mut c_void) -> i32>;

/// Begins a save. Returns 0; any other number ends it, and nothing else is called.
pub type mxt_files_begin_fn = Option<unsafe extern "C-unwind" fn(user_data: *mut c_void) -> i32>;

/// Begins the file `name`, of which `size` bytes are going to be written, and stores in `*file`
/// what the other functions get for it. `name` is borrowed for the call. One file is written at a
/// time. Returns 0; any other number ends the save.
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
/// "trainer.json" or "trainer.safetensors" any more where a model was saved without a training
/// state. Returns 0; any other number says that this was not done, and the save is given up.
pub type mxt_files_commit_fn = Option<unsafe extern "C-unwind" fn(user_data: *mut c_void) -> i32>;

/// Gives up the save that was begun, for something failed: called once in place of a successful
/// commit, when all its files are closed. What the files were before the save, they must be after
/// it.
pub type mxt_files_abort_fn = Option<unsafe extern "C-unwind" fn(user_data: *mut c_void)>;

/// Says why another of the functions has just failed, as a line for a person: UTF-8, read before
/// anything else is called. NULL where there is nothing to say.
pub type mxt_files_error_fn =
    Option<unsafe extern "C-unwind" fn(user_data: *mut c_void) -> *const c_char>;

/// The host's functions for the files of a checkpoint. Fill it with mxt_file_callbacks_init.
///
/// They run on the thread that is inside the call that loads or saves, in which only that call uses
/// them. They may call the library, but calls on the mxt_files, on the trainer that is saved, and
/// such as would change the model that is saved, return MXT_ERROR_BUSY. They must not throw or
/// longjmp.
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
    /// Called with `user_data`, whatever it is, exactly once for each call of
    /// mxt_files_from_callbacks that succeeds, when the library will never call the functions above
    /// again: at the end of mxt_files_free, or of the call that still uses the files then. A
    /// mxt_files_from_callbacks that fails never calls it: user_data is the caller's still. NULL
    /// (default): nothing is called.
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

type OpenFn =
    unsafe extern "C-unwind" fn(*mut c_void, *const c_char, *mut *mut c_void, *mut u64) -> i32;
type ReadFn = unsafe extern "C-unwind" fn(*mut c_void, *mut c_void, u64, *mut c_void, usize) -> i32;
type CloseFn = unsafe extern "C-unwind" fn(*mut c_void, *mut c_void) -> i32;
type EndFn = unsafe extern "C-unwind" fn(*mut c_void) -> i32;
type CreateFn =
    unsafe extern "C-unwind" fn(*mut c_void, *const c_char, u64, *mut *mut c_void) -> i32;
type WriteFn = unsafe extern "C-unwind" fn(*mut c_void, *mut c_void, *const c_void, usize) -> i32;

/// The host's functions.
pub(super) struct Host {
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
    pub(super) fn new(callbacks: mxt_file_callbacks) -> Result<Self, Failure> {
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

    /// From here on the user data are the library's.
    pub(super) fn keep(&self) {
        self.user_data.keep();
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
                // SAFETY: the header asks for a text that ends with a zero byte; nothing behind
                // that is read.
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
