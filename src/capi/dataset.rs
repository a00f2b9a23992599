//! `mxt_dataset`: tokens to train on.

use std::ffi::c_char;

use super::arguments;
use super::guard;
use super::handle::{Handle, State};
use super::message::Slot;
use super::status::{Failure, mxt_status};
use crate::{Dataset, Error};

/// Tokens to train on: files that are mapped into memory, or a copy of the host's own. It is never
/// changed, so any number of threads and trainers may use it at once. Make with one of the
/// mxt_dataset_open or mxt_dataset_from functions, free with mxt_dataset_free.
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

/// Opens a token file, or all files that a pattern such as "data/train_*.bin" matches, in the
/// order of their names, and stores the dataset in `*dataset` for the caller to free.
///
/// Files are raw little-endian 16-bit tokens, or llm.c's format with its header. They are mapped,
/// not read, and must not be changed or truncated while the dataset is in use.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (a pattern that matches
/// nothing), MXT_ERROR_IO, MXT_ERROR_FORMAT. The message is in mxt_last_error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_open(
    pattern: *const c_char,
    dataset: *mut *mut mxt_dataset,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::function("mxt_dataset_open", || unsafe {
        let out = arguments::place("dataset", dataset)?;
        let data = Dataset::open(arguments::text("pattern", pattern)?)?;
        out.put(mxt_dataset::new(data));
        Ok(())
    })
}

/// Opens `count` token files as one dataset, in the order given, and stores it in `*dataset` for
/// the caller to free. `paths` and its strings are borrowed for the call.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (no files), MXT_ERROR_IO,
/// MXT_ERROR_FORMAT. The message is in mxt_last_error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_open_files(
    paths: *const *const c_char,
    count: usize,
    dataset: *mut *mut mxt_dataset,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::function("mxt_dataset_open_files", || unsafe {
        let out = arguments::place("dataset", dataset)?;
        let paths = arguments::slice("paths", paths, count)?;
        let paths = paths.iter().enumerate();
        let paths = paths.map(|(i, path)| arguments::path(&format!("paths[{i}]"), *path));
        let data = Dataset::open_files(&paths.collect::<Result<Vec<_>, _>>()?)?;
        out.put(mxt_dataset::new(data));
        Ok(())
    })
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
    guard::function("mxt_dataset_from_tokens", || unsafe {
        let out = arguments::place("dataset", dataset)?;
        let tokens = arguments::slice("tokens", tokens, count)?;
        let mut copy = Vec::new();
        copy.try_reserve_exact(tokens.len()).map_err(|_| out_of_memory(tokens.len()))?;
        copy.extend_from_slice(tokens);
        out.put(mxt_dataset::new(Dataset::from_tokens(copy)?));
        Ok(())
    })
}

/// Number of tokens in all files. 0 if `dataset` is NULL. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_token_count(dataset: *const mxt_dataset) -> u64 {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::getter("mxt_dataset_token_count", dataset, |d| d.data.token_count()) }
}

/// Stores the largest token in `*token`: a model needs a vocab_size above it. Reads all files.
///
/// Any thread may call it at any time. Errors: MXT_ERROR_NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_dataset_max_token(
    dataset: *const mxt_dataset,
    token: *mut u32,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_dataset_max_token", dataset, |dataset| {
            let out = arguments::place("token", token)?;
            out.put(dataset.data.max_token());
            Ok(())
        })
    }
}

/// Copies `count` tokens, from number `first` on, to `tokens`, which has room for so many. Tokens
/// are counted from 0 over all files in their order. `tokens` may be NULL where `count` is 0.
///
/// Any thread may call it at any time. Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (the
/// dataset ends before `first` + `count`).
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

fn out_of_memory(tokens: usize) -> Failure {
    let error = Error::OutOfMemory {
        what: "a copy of the tokens",
        needed: (tokens * size_of::<u32>()) as u64,
        limit: "the system has less; write them to a file and open that".into(),
    };
    error.into()
}
