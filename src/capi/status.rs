//! Status codes: their values, their texts, and which error becomes which code.

use std::borrow::Cow;
use std::ffi::{CStr, c_char};
use std::io::ErrorKind;

use crate::Error;

/// The values of mxt_status. A value never changes its meaning and is never used again.
/// cbindgen:prefix-with-name=false
/// cbindgen:rename-all=None
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_status_code {
    /// The call did what it says.
    MXT_OK = 0,
    /// A pointer that must not be NULL is NULL.
    MXT_ERROR_NULL = -1,
    /// An argument or an option has a value that the call cannot use.
    MXT_ERROR_INVALID_ARGUMENT = -2,
    /// A string is not UTF-8.
    MXT_ERROR_UTF8 = -3,
    /// The struct_size of a struct is none that this library knows, or a part of the struct that it
    /// does not know is not zero.
    MXT_ERROR_STRUCT_SIZE = -4,
    /// Another call is inside this object: from another thread, or this call came from a callback.
    MXT_ERROR_BUSY = -5,
    /// A panic in an earlier call left this object unusable: free it.
    MXT_ERROR_POISONED = -6,
    /// A defect of the library showed itself inside this call. The message says where; please
    /// report it. The handle is poisoned, the process and all other handles are sound.
    MXT_ERROR_PANIC = -7,
    /// A file or folder cannot be opened, read, written or renamed.
    MXT_ERROR_IO = -8,
    /// A file is damaged, truncated or of a kind that this version does not read.
    MXT_ERROR_FORMAT = -9,
    /// A file is sound but does not fit what it is used with, or the ranks of a group do not have
    /// alike what they must.
    MXT_ERROR_MISMATCH = -10,
    /// A token is not below the vocabulary size of the model.
    MXT_ERROR_TOKEN_RANGE = -11,
    /// More memory is needed than the limit allows or the system gives.
    MXT_ERROR_OUT_OF_MEMORY = -12,
    /// The device or this build cannot do it; the message says what can be done instead.
    MXT_ERROR_UNSUPPORTED = -13,
    /// A loss, a gradient norm or a weight is NaN or infinite.
    MXT_ERROR_NOT_FINITE = -14,
    /// The model has no tensor of this name.
    MXT_ERROR_NO_SUCH_TENSOR = -15,
    /// The caller's buffer is too small; the message says how much is needed.
    MXT_ERROR_BUFFER_TOO_SMALL = -16,
    /// The handle was made before fork() in a parent of this process. Free it, or leave it.
    MXT_ERROR_FORKED = -17,
    /// A GPU failed. The handle is poisoned: free it and what was made on the same device.
    MXT_ERROR_DEVICE = -18,
    /// A stop was asked for (mxt_trainer_request_stop) while the call was at work. It has changed
    /// nothing; no harm was done.
    MXT_STOPPED = -19,
    /// Another rank of the group failed, is gone, or does not answer. The message has its rank and
    /// its words. Where it said why, the call has changed nothing and the group goes on; otherwise
    /// the group has ended, and every further collective call returns this at once.
    MXT_ERROR_PEER = -20,
}
use mxt_status_code::*;

/// What a call returns: MXT_OK, or one of the negative numbers of mxt_status_code. Later versions
/// may add codes, so treat an unknown negative number as an error.
pub type mxt_status = i32;

/// A short English text for a status code, such as "busy". The text of a code that this library
/// does not know is "unknown status". For what went wrong in particular read mxt_last_error.
///
/// Never NULL; the text is static. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub extern "C" fn mxt_status_string(status: mxt_status) -> *const c_char {
    let known = TEXTS.iter().find(|(code, _)| *code as mxt_status == status);
    known.map_or(c"unknown status", |(_, text)| text).as_ptr()
}

const TEXTS: [(mxt_status_code, &CStr); 21] = [
    (MXT_OK, c"ok"),
    (MXT_ERROR_NULL, c"argument is NULL"),
    (MXT_ERROR_INVALID_ARGUMENT, c"invalid argument"),
    (MXT_ERROR_UTF8, c"string is not UTF-8"),
    (MXT_ERROR_STRUCT_SIZE, c"struct_size does not fit"),
    (MXT_ERROR_BUSY, c"busy"),
    (MXT_ERROR_POISONED, c"unusable after a panic"),
    (MXT_ERROR_PANIC, c"panic inside the library"),
    (MXT_ERROR_IO, c"input/output error"),
    (MXT_ERROR_FORMAT, c"damaged or unknown file"),
    (MXT_ERROR_MISMATCH, c"does not fit"),
    (MXT_ERROR_TOKEN_RANGE, c"token outside the vocabulary"),
    (MXT_ERROR_OUT_OF_MEMORY, c"out of memory"),
    (MXT_ERROR_UNSUPPORTED, c"not supported"),
    (MXT_ERROR_NOT_FINITE, c"not finite"),
    (MXT_ERROR_NO_SUCH_TENSOR, c"no such tensor"),
    (MXT_ERROR_BUFFER_TOO_SMALL, c"buffer too small"),
    (MXT_ERROR_FORKED, c"made before fork"),
    (MXT_ERROR_DEVICE, c"the device failed"),
    (MXT_STOPPED, c"stopped, as asked"),
    (MXT_ERROR_PEER, c"another rank failed"),
];

/// Why a call fails: what it returns, and the text for its message.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) status: mxt_status_code,
    pub(super) message: Cow<'static, str>,
}

impl Failure {
    pub(super) fn new(status: mxt_status_code, message: impl Into<Cow<'static, str>>) -> Self {
        Self { status, message: message.into() }
    }

    /// A pointer that must not be NULL is NULL.
    pub(super) fn null(what: &str) -> Self {
        Self::new(MXT_ERROR_NULL, format!("{what} is NULL; pass a valid pointer"))
    }

    pub(super) fn invalid(what: &str, message: impl std::fmt::Display) -> Self {
        Self::new(MXT_ERROR_INVALID_ARGUMENT, format!("{what}: {message}"))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::InvalidArgument { .. } => MXT_ERROR_INVALID_ARGUMENT,
            Error::Io { source, .. } if source.kind() == ErrorKind::OutOfMemory => {
                MXT_ERROR_OUT_OF_MEMORY
            }
            Error::Io { .. } => MXT_ERROR_IO,
            Error::Format { .. } => MXT_ERROR_FORMAT,
            Error::Mismatch { .. } | Error::RanksDiffer { .. } => MXT_ERROR_MISMATCH,
            Error::TokenRange { .. } => MXT_ERROR_TOKEN_RANGE,
            Error::OutOfMemory { .. } => MXT_ERROR_OUT_OF_MEMORY,
            Error::Unsupported { .. } => MXT_ERROR_UNSUPPORTED,
            Error::NotFinite { .. } => MXT_ERROR_NOT_FINITE,
            Error::NoSuchTensor { .. } => MXT_ERROR_NO_SUCH_TENSOR,
            Error::Device { .. } => MXT_ERROR_DEVICE,
            Error::Stopped => MXT_STOPPED,
            Error::Peer { .. } => MXT_ERROR_PEER,
            Error::Poisoned => MXT_ERROR_POISONED,
        };
        Self::new(status, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_operation_without_memory_is_out_of_memory() {
        let status = |number| {
            let source = std::io::Error::from_raw_os_error(number);
            Failure::from(Error::Io { action: "read", path: "x".into(), source }).status
        };
        assert_eq!(status(libc::ENOMEM), MXT_ERROR_OUT_OF_MEMORY);
        assert_eq!(status(libc::EIO), MXT_ERROR_IO);
    }

    #[test]
    fn values_are_fixed_and_texts_differ() {
        for (index, (code, text)) in TEXTS.iter().enumerate() {
            assert_eq!(
                *code as mxt_status,
                -(index as mxt_status),
                "the place in the table is the value"
            );
            assert_eq!(TEXTS.iter().filter(|(_, other)| other == text).count(), 1);
            assert_eq!(mxt_status_string(*code as mxt_status), text.as_ptr());
        }
        for unknown in [1, -21, mxt_status::MAX, mxt_status::MIN] {
            // SAFETY: the function returns a static string.
            let text = unsafe { CStr::from_ptr(mxt_status_string(unknown)) };
            assert_eq!(text, c"unknown status");
        }
    }
}
