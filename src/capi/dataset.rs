//! `mxt_dataset`: tokens to train on.

use std::ffi::{c_char, c_void};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::arguments::{self, check};
use super::float_mode;
use super::group::mxt_user_data_free_fn;
use super::guard;
use super::handle::{Handle, State};
use super::message::Slot;
use super::status::{Failure, mxt_status};
use super::structs::{self, Options, Out, read_or_default, versioned};
use super::user_data::UserData;
use crate::reserve::reserve;
use crate::{Coverage, Dataset, DatasetOptions, Error, TokenMemory, TokenType};

/// Tokens to train on: files that are mapped into memory, tokens of the host, or windows that it
/// fills. It is never changed, so any number of threads and trainers may use it at once. Make with
/// one of the mxt_dataset_open or mxt_dataset_from functions, free with mxt_dataset_free.
///
/// All its tokens are checked against a model's vocabulary before the first step or evaluation of a
/// trainer: at once up to 256 MiB, which takes some 0.1 s; else by a thread of the dataset while
/// the training goes on, and what it finds is the error of the next step. The thread blocks all
/// signals but faults, and has ended when mxt_dataset_free returns and no other call uses the
/// dataset.
///
/// Nothing that happens to a file ends the process. Where its tokens are not there any more,
/// because it has become shorter or its disk fails, the call that needs them returns MXT_ERROR_IO;
/// a trainer is then as before the call.
pub struct mxt_dataset {
    state: State,
    pub(super) data: Dataset,
}

impl mxt_dataset {
    fn new(data: Dataset) -> *mut Self {
        Self { state: State::new(), data }.into_raw()
    }
}

impl Handle for mxt_dataset {
    const SLOT: Slot = Slot::Dataset;
    const NAME: &'static str = "dataset";

    fn state(&self) -> &State {
        &self.state
    }
}

/// What a token is in a file without a header to say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_token_type {
    /// Found out by a look at the tokens: 16 bits, unless they must be 32 or 64. A file in which
    /// they may be either is refused.
    Auto = 0,
    /// Two unsigned bytes.
    U16 = 1,
    /// Four unsigned bytes.
    U32 = 2,
    /// Eight signed bytes.
    I64 = 3,
    /// One unsigned byte.
    U8 = 4,
    /// Four signed bytes.
    I32 = 5,
}

/// How a dataset is opened. Fill it with mxt_dataset_options_init.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_dataset_options {
    /// Set by mxt_dataset_options_init.
    pub struct_size: usize,
    /// One of mxt_token_type. Default MXT_TOKEN_TYPE_AUTO. For files without a header; a header is
    /// believed. With another value than AUTO files are not refused for looking like text.
    pub token_type: i32,
    /// Not used; must be 0.
    pub reserved: i32,
}
versioned!(mxt_dataset_options, last = reserved: i32);

impl Options for mxt_dataset_options {
    fn defaults() -> Self {
        let token_type = mxt_token_type::Auto as i32;
        Self { struct_size: size_of::<Self>(), token_type, reserved: 0 }
    }
}

impl mxt_dataset_options {
    fn parse(self) -> Result<DatasetOptions, Failure> {
        const TYPES: [(mxt_token_type, Option<TokenType>); 6] = [
            (mxt_token_type::Auto, None),
            (mxt_token_type::U16, Some(TokenType::U16)),
            (mxt_token_type::U32, Some(TokenType::U32)),
            (mxt_token_type::I64, Some(TokenType::I64)),
            (mxt_token_type::U8, Some(TokenType::U8)),
            (mxt_token_type::I32, Some(TokenType::I32)),
        ];
        if self.reserved != 0 {
            let message = format!("expected 0, got {}", self.reserved);
            return Err(Failure::invalid("reserved", message));
        }
        let found = TYPES.into_iter().find(|(number, _)| *number as i32 == self.token_type);
        let Some((_, token_type)) = found else {
            let message =
                format!("expected one of mxt_token_type, 0 to 5; got {}", self.token_type);
            return Err(Failure::invalid("token_type", message));
        };
        Ok(DatasetOptions { token_type })
    }
}

/// What sequences of some length read of a dataset. Set struct_size to sizeof(mxt_coverage) before
/// the call that fills it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_coverage {
    /// sizeof(mxt_coverage), set by the caller.
    pub struct_size: usize,
    /// Windows of an epoch, of a sequence and one more token each; 0 where no file is long enough.
    pub windows: u64,
    /// Files of the dataset.
    pub files: u64,
    /// Files shorter than a window, which training never reads.
    pub short_files: u64,
    /// Tokens of all files.
    pub tokens: u64,
    /// Tokens of the files that training never reads.
    pub short_tokens: u64,
    /// Tokens of the shortest file. Sequences of one less read every file.
    pub shortest: u64,
    /// Tokens of the longest file.
    pub longest: u64,
}
versioned!(mxt_coverage, last = longest: u64);

impl From<Coverage> for mxt_coverage {
    fn from(coverage: Coverage) -> Self {
        let Coverage { windows, files, short_files, tokens, short_tokens, .. } = coverage;
        Self {
            struct_size: size_of::<Self>(),
            windows,
            files,
            short_files,
            tokens,
            short_tokens,
            shortest: coverage.shortest,
            longest: coverage.longest,
        }
    }
}

/// Fills `options` with the defaults. `struct_size` is sizeof(mxt_dataset_options) as the caller's
/// compiler sees it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_options_init(
    options: *mut mxt_dataset_options,
    struct_size: usize,
) -> mxt_status {
    // SAFETY: the caller's struct has `struct_size` bytes.
    guard::function("mxt_dataset_options_init", || unsafe { structs::init(options, struct_size) })
}

/// Opens a token file, or all files that a pattern such as "data/train_*.bin" matches, in the order
/// of their names, and stores the dataset in `*dataset` for the caller to free. `*` and `?` match
/// within a name, `**` any number of folders; a path that exists is taken as it is.
///
/// Each file may be raw little-endian tokens of 16 bits, or of 32 or 64 where that is beyond doubt;
/// llm.c's format with its header; NumPy's .npy of uint8, uint16, uint32, int32 or int64, of one
/// dimension, or of two, read row by row; or Megatron's pair of .bin and .idx, of which either file
/// can be named, and which counts once where both match. Documents are not told apart, and windows
/// do not cross files. Links are followed, and a file that is found again through one counts once.
///
/// Files are mapped, not read, and none keeps a descriptor open. A file may be replaced by renaming
/// another over it, which changes nothing for the dataset; tokens that are written to it are
/// checked like all others. There may be any number of files; those beyond 16,384 are opened for
/// every read, and so must keep their names.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a pattern that matches nothing),
/// MXT_ERROR_IO, MXT_ERROR_FORMAT (a damaged file, or one of another kind, which the message names
/// with the remedy), MXT_ERROR_OUT_OF_MEMORY. The message is in mxt_last_error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_open(
    pattern: *const c_char,
    dataset: *mut *mut mxt_dataset,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::maker("mxt_dataset_open", || unsafe { open(pattern, std::ptr::null(), dataset) })
}

/// Does what mxt_dataset_open does, with options. `options` may be NULL for the defaults.
///
/// Errors: those of mxt_dataset_open, MXT_ERROR_STRUCT_SIZE, and MXT_ERROR_INVALID_ARGUMENT for an
/// option, which the message names.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_open_with(
    pattern: *const c_char,
    options: *const mxt_dataset_options,
    dataset: *mut *mut mxt_dataset,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::maker("mxt_dataset_open_with", || unsafe { open(pattern, options, dataset) })
}

/// # Safety
/// Pointers are NULL or valid.
unsafe fn open(
    pattern: *const c_char,
    options: *const mxt_dataset_options,
    dataset: *mut *mut mxt_dataset,
) -> Result<(), Failure> {
    // SAFETY: as promised by the caller.
    unsafe {
        let out = arguments::place("dataset", dataset)?;
        let options = read_or_default("options", options)?.parse()?;
        let data = Dataset::open_with(arguments::os_text("pattern", pattern)?, &options)?;
        out.put(mxt_dataset::new(data));
    }
    Ok(())
}

/// Opens `count` token files as one dataset, in the order given, and stores it in `*dataset` for
/// the caller to free. `paths` and its strings are borrowed for the call.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (no files), MXT_ERROR_IO, MXT_ERROR_FORMAT,
/// MXT_ERROR_OUT_OF_MEMORY. The message is in mxt_last_error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_open_files(
    paths: *const *const c_char,
    count: usize,
    dataset: *mut *mut mxt_dataset,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::maker("mxt_dataset_open_files", || unsafe {
        open_files(paths, count, std::ptr::null(), dataset)
    })
}

/// Does what mxt_dataset_open_files does, with options. `options` may be NULL for the defaults.
///
/// Errors: those of mxt_dataset_open_files, MXT_ERROR_STRUCT_SIZE, and MXT_ERROR_INVALID_ARGUMENT
/// for an option, which the message names.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_open_files_with(
    paths: *const *const c_char,
    count: usize,
    options: *const mxt_dataset_options,
    dataset: *mut *mut mxt_dataset,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::maker("mxt_dataset_open_files_with", || unsafe {
        open_files(paths, count, options, dataset)
    })
}

/// # Safety
/// Pointers are NULL or valid.
unsafe fn open_files(
    paths: *const *const c_char,
    count: usize,
    options: *const mxt_dataset_options,
    dataset: *mut *mut mxt_dataset,
) -> Result<(), Failure> {
    // SAFETY: as promised by the caller.
    unsafe {
        let out = arguments::place("dataset", dataset)?;
        let options = read_or_default("options", options)?.parse()?;
        let given = arguments::copied("paths", paths, count)?;
        let mut paths = Vec::new();
        reserve(&mut paths, "the paths of a dataset", given.len())?;
        for (i, path) in given.iter().enumerate() {
            paths.push(arguments::path(&format!("paths[{i}]"), *path)?);
        }
        let data = Dataset::open_files_with(&paths, &options)?;
        out.put(mxt_dataset::new(data));
    }
    Ok(())
}

/// Makes a dataset from `count` tokens in memory, which are copied, and stores it in `*dataset` for
/// the caller to free.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_OUT_OF_MEMORY. The message is in
/// mxt_last_error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_from_tokens(
    tokens: *const u32,
    count: usize,
    dataset: *mut *mut mxt_dataset,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::maker("mxt_dataset_from_tokens", || unsafe {
        let out = arguments::place("dataset", dataset)?;
        let tokens = arguments::copied("a copy of the tokens", tokens, count)?;
        out.put(mxt_dataset::new(Dataset::from_tokens(tokens)?));
        Ok(())
    })
}

/// Makes a dataset from `count` tokens in memory of the host's, which are not copied, and stores it in
/// `*dataset` for the caller to free. `token_type` is MXT_TOKEN_TYPE_U16 or MXT_TOKEN_TYPE_U32. The
/// tokens have to stay there, unchanged, until `user_data_free` is called with `user_data`: once, when
/// mxt_dataset_free has been called and no other call uses the dataset any more, on the thread that
/// ends it. `user_data_free` may be NULL.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_OUT_OF_MEMORY: the user data stay the
/// caller's then. The message is in mxt_last_error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_from_memory(
    tokens: *const c_void,
    count: usize,
    token_type: i32,
    user_data: *mut c_void,
    user_data_free: mxt_user_data_free_fn,
    dataset: *mut *mut mxt_dataset,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::maker("mxt_dataset_from_memory", || unsafe {
        let out = arguments::place("dataset", dataset)?;
        let host = Arc::new(UserData::new(user_data, user_data_free));
        let data = match token_type {
            of if of == mxt_token_type::U16 as i32 => borrowed::<u16>(tokens, count, &host)?,
            of if of == mxt_token_type::U32 as i32 => borrowed::<u32>(tokens, count, &host)?,
            of => {
                let message =
                    format!("expected MXT_TOKEN_TYPE_U16 or MXT_TOKEN_TYPE_U32, got {of}");
                return Err(Failure::invalid("token_type", message));
            }
        };
        host.keep();
        out.put(mxt_dataset::new(data));
        Ok(())
    })
}

/// # Safety
/// `tokens` is NULL or points to `count` tokens that stay there as long as `host` lives.
unsafe fn borrowed<T: Copy + Into<u32> + 'static>(
    tokens: *const c_void,
    count: usize,
    host: &Arc<UserData>,
) -> Result<Dataset, Failure>
where
    Borrowed<T>: TokenMemory,
{
    let tokens: *const T = tokens.cast();
    check("tokens", tokens, count)?;
    Ok(Dataset::from_memory(Borrowed { tokens, count, _host: host.clone() })?)
}

/// Tokens of the host's.
struct Borrowed<T> {
    tokens: *const T,
    count: usize,
    _host: Arc<UserData>,
}

// SAFETY: the header asks for tokens that do not change, which any thread may read.
unsafe impl<T> Send for Borrowed<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Borrowed<T> {}

macro_rules! borrowed_memory {
    ($($token:ty, $kind:ident;)*) => {$(
        impl TokenMemory for Borrowed<$token> {
            fn count(&self) -> usize {
                self.count
            }

            fn token_type(&self) -> TokenType {
                TokenType::$kind
            }

            fn copy(&self, first: usize, to: &mut [u32]) {
                let is_there = first <= self.count && to.len() <= self.count - first;
                assert!(is_there, "tokens lie in the memory");
                for (i, to) in to.iter_mut().enumerate() {
                    // SAFETY: there, as asserted. A host that changes them even so gets either.
                    *to = unsafe { self.tokens.add(first + i).read_volatile() }.into();
                }
            }
        }
    )*};
}

borrowed_memory! {
    u16, U16;
    u32, U32;
}

/// Fills window `number` of a dataset: `tokens` gets sequence_length + 1 tokens, of which all but
/// the last are inputs, and each but the first the target of the one before it; `weights` has
/// sequence_length numbers, a factor of each target's loss, at least 0 and 1 before: 0 for what is
/// not to be learned, as a prompt or padding. Both are borrowed for the call. The same number has
/// to give the same window whenever it is asked for, so that a run that is resumed is the run that
/// was not stopped.
///
/// Returns 0; any other number ends the call that needs the window with MXT_ERROR_IO, and the
/// trainer is as before it. A token outside of the vocabulary ends it with MXT_ERROR_TOKEN_RANGE, a
/// weight that is not finite with MXT_ERROR_NOT_FINITE, one below 0 with
/// MXT_ERROR_INVALID_ARGUMENT.
///
/// Runs on the thread that is inside that call; on several threads at once where several trainers
/// use the dataset. Calls on the trainer that it fills for, and on its model, return
/// MXT_ERROR_BUSY. It must not throw or longjmp.
pub type mxt_window_fn = Option<
    unsafe extern "C-unwind" fn(
        user_data: *mut c_void,
        number: u64,
        tokens: *mut u32,
        weights: *mut f32,
        sequence_length: usize,
    ) -> i32,
>;

/// Makes a dataset of `count` windows that the host fills, numbered from 0, each time that one is
/// wanted, and stores it in `*dataset` for the caller to free. Training asks for all of them once
/// in an epoch, in an order that the engine's seed gives, an evaluation for some spread evenly, in
/// their order. A loss is the weighted sum over the sum of weights of its step or evaluation; a
/// step whose weights are all 0 has a loss of 0 and no gradient, such an evaluation is
/// MXT_ERROR_INVALID_ARGUMENT. The tokens of an evaluation are the targets whose weight is not 0.
/// Ranks of a group compare the number of windows, and not what is in them. Functions that read
/// tokens of a dataset return MXT_ERROR_UNSUPPORTED.
///
/// `user_data` is passed to `fill`, and to `user_data_free` (which may be NULL) as for
/// mxt_dataset_from_memory.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a count of 0): the user data stay the caller's
/// then. The message is in mxt_last_error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_from_windows(
    count: u64,
    fill: mxt_window_fn,
    user_data: *mut c_void,
    user_data_free: mxt_user_data_free_fn,
    dataset: *mut *mut mxt_dataset,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::maker("mxt_dataset_from_windows", || unsafe {
        let out = arguments::place("dataset", dataset)?;
        let fill = fill.ok_or_else(|| Failure::null("fill"))?;
        let host = Arc::new(UserData::new(user_data, user_data_free));
        let of_dataset = host.clone();
        let data = Dataset::from_windows(count, move |number, tokens, weights| {
            let (to, of, length) = (tokens.as_mut_ptr(), weights.as_mut_ptr(), weights.len());
            let user_data = of_dataset.pointer;
            // The header asks for a function that fills as many.
            let code = float_mode::in_hosts(|| fill(user_data, number, to, of, length));
            filled(number, code)
        })?;
        host.keep();
        out.put(mxt_dataset::new(data));
        Ok(())
    })
}

/// What a callback's answer says of a window.
fn filled(number: u64, code: i32) -> crate::Result<()> {
    if code == 0 {
        return Ok(());
    }
    let (path, action) = (PathBuf::from(format!("window {number}")), "fill");
    let source = io::Error::other(format!("the callback returned {code}"));
    Err(Error::Io { action, path, source })
}

/// Fills window `number` of a dataset, as mxt_window_fn, and `documents` besides: for each of the
/// sequence_length inputs the number of the document that it is of, which is 0 before.
pub type mxt_packed_window_fn = Option<
    unsafe extern "C-unwind" fn(
        user_data: *mut c_void,
        number: u64,
        tokens: *mut u32,
        weights: *mut f32,
        documents: *mut u32,
        sequence_length: usize,
    ) -> i32,
>;

/// mxt_dataset_from_windows of windows that are packed with documents, which are kept apart as those
/// of mxt_batch are: where the number changes along a window another document begins. A window whose
/// numbers are all the same is cut at document_end of the trainer's options, where there is one. The
/// last input of a document has the first of the next as its target: its weight is to be 0 where that
/// is not to be learned.
///
/// Errors: as mxt_dataset_from_windows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_from_packed_windows(
    count: u64,
    fill: mxt_packed_window_fn,
    user_data: *mut c_void,
    user_data_free: mxt_user_data_free_fn,
    dataset: *mut *mut mxt_dataset,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::maker("mxt_dataset_from_packed_windows", || unsafe {
        let out = arguments::place("dataset", dataset)?;
        let fill = fill.ok_or_else(|| Failure::null("fill"))?;
        let host = Arc::new(UserData::new(user_data, user_data_free));
        let of_dataset = host.clone();
        let data =
            Dataset::from_packed_windows(count, move |number, tokens, weights, documents| {
                let (to, of, length) = (tokens.as_mut_ptr(), weights.as_mut_ptr(), weights.len());
                let (documents, user_data) = (documents.as_mut_ptr(), of_dataset.pointer);
                // The header asks for a function that fills as many.
                let code =
                    float_mode::in_hosts(|| fill(user_data, number, to, of, documents, length));
                filled(number, code)
            })?;
        host.keep();
        out.put(mxt_dataset::new(data));
        Ok(())
    })
}

/// Number of tokens in all files; 0 where the host fills windows, and if `dataset` is NULL. Any thread
/// may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_token_count(dataset: *const mxt_dataset) -> u64 {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::getter("mxt_dataset_token_count", dataset, |d| d.data.token_count()) }
}

/// Stores the largest token in `*token`: a model needs a vocab_size above it. Reads all files,
/// unless that has been done.
///
/// Any thread may call it at any time. Errors: MXT_ERROR_NULL, MXT_ERROR_IO, MXT_ERROR_TOKEN_RANGE
/// (a number below 0 or above 32 bits, which is no token).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_max_token(
    dataset: *const mxt_dataset,
    token: *mut u32,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_dataset_max_token", dataset, |dataset| {
            let out = arguments::place("token", token)?;
            out.put(dataset.data.max_token()?);
            Ok(())
        })
    }
}

/// Counts what training with sequences of `sequence_length` tokens reads of the dataset, and stores
/// it in `*coverage` (struct_size set by the caller). Files without a whole window, of a sequence
/// and one more token, are never read; a trainer's first step with such a dataset says so in the
/// engine's log, unless this function was called with the trainer's length before.
///
/// Any thread may call it at any time. Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_coverage(
    dataset: *const mxt_dataset,
    sequence_length: usize,
    coverage: *mut mxt_coverage,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_dataset_coverage", dataset, |dataset| {
            let out = Out::required("coverage", coverage)?;
            out.put(dataset.data.coverage(sequence_length).into());
            Ok(())
        })
    }
}

/// Copies `count` tokens, from number `first` on, to `tokens`, which has room for so many. Tokens
/// are counted from 0 over all files in their order. `tokens` may be NULL where `count` is 0.
///
/// Any thread may call it at any time. Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (the
/// dataset ends before `first` + `count`), MXT_ERROR_IO, MXT_ERROR_TOKEN_RANGE (a number below 0 or
/// above 32 bits, which is no token).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_read(
    dataset: *const mxt_dataset,
    first: u64,
    count: usize,
    tokens: *mut u32,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_dataset_read", dataset, |dataset| {
            let tokens = arguments::slice_mut("tokens", tokens, count)?;
            Ok(dataset.data.read(first, tokens)?)
        })
    }
}

/// The message of the last call with this dataset as its first argument that failed; the empty
/// string when there is none. What goes wrong while a trainer reads it is on the trainer.
///
/// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
/// call of mxt_dataset_last_error. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_last_error(dataset: *const mxt_dataset) -> *const c_char {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::last_error("mxt_dataset_last_error", dataset) }
}

/// Gives the dataset up; NULL does nothing. Files are unmapped when no call uses it any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_free(dataset: *mut mxt_dataset) {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::free("mxt_dataset_free", dataset) }
}
