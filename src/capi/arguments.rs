//! Strings and arrays that the host passes in, checked before Rust may look at them.
//!
//! NOTE: what the host passes in is copied, and the copy is checked and used. Another thread of the
//! host may write there, which it should not, but what was checked must be what is used: a string
//! that is UTF-8, tokens of the vocabulary.

use std::ffi::{OsString, c_char};
use std::path::PathBuf;

use super::status::Failure;
use super::status::mxt_status_code::MXT_ERROR_UTF8;
use crate::reserve::reserve;

/// A string that must be there.
///
/// # Safety
/// `text` is NULL or ends with a zero byte.
pub(super) unsafe fn text(what: &str, text: *const c_char) -> Result<String, Failure> {
    // SAFETY: as promised by the caller.
    String::from_utf8(unsafe { bytes(what, text) }?).map_err(|error| {
        let (at, bytes) = (error.utf8_error().valid_up_to(), error.as_bytes());
        let message = format!(
            "{what}: expected UTF-8, got byte 0x{:02x} at offset {at} of \"{}\"",
            bytes[at],
            bytes.escape_ascii(),
        );
        Failure::new(MXT_ERROR_UTF8, message)
    })
}

/// A path that must be there and not empty: the system's bytes, of no certain encoding.
///
/// # Safety
/// As for [`text`].
pub(super) unsafe fn path(what: &str, path: *const c_char) -> Result<PathBuf, Failure> {
    // SAFETY: as promised by the caller.
    let path = unsafe { os_text(what, path) }?;
    if path.is_empty() {
        return Err(Failure::invalid(what, "expected a path, got an empty string"));
    }
    Ok(path.into())
}

/// [`path`], of which a rank that does not write takes whatever is there: a refusal there alone would
/// leave the others waiting.
///
/// # Safety
/// As for [`text`].
pub(super) unsafe fn path_of_save(
    what: &str,
    text: *const c_char,
    writes: bool,
) -> Result<PathBuf, Failure> {
    // SAFETY: as promised by the caller.
    unsafe { if writes { path(what, text) } else { os_text(what, text).map(Into::into) } }
}

/// A path or pattern that must be there.
///
/// # Safety
/// As for [`text`].
#[cfg(unix)]
pub(super) unsafe fn os_text(what: &str, text: *const c_char) -> Result<OsString, Failure> {
    use std::os::unix::ffi::OsStringExt;

    // SAFETY: as promised by the caller.
    Ok(OsString::from_vec(unsafe { bytes(what, text) }?))
}

/// A path or pattern that must be there. Paths of this system are not bytes.
///
/// # Safety
/// As for [`text`].
#[cfg(not(unix))]
pub(super) unsafe fn os_text(what: &str, path: *const c_char) -> Result<OsString, Failure> {
    // SAFETY: as promised by the caller.
    unsafe { text(what, path) }.map(OsString::from)
}

/// A string without its zero byte.
///
/// # Safety
/// As for [`text`].
unsafe fn bytes(what: &str, text: *const c_char) -> Result<Vec<u8>, Failure> {
    const MOST: usize = 4095;
    if text.is_null() {
        return Err(Failure::null(what));
    }
    // SAFETY: as promised by the caller, and no byte behind the zero is read.
    let byte = |at| unsafe { text.add(at).cast::<u8>().read_volatile() };
    let mut bytes = Vec::new();
    let length = (0..).take_while(|at| byte(*at) != 0).count();
    // No name and no path. Messages quote what is shorter.
    if length > MOST {
        let message = format!("expected at most {MOST} bytes, got a string of {length}");
        return Err(Failure::invalid(what, message));
    }
    reserve(&mut bytes, "a string", length)?;
    bytes.extend((0..length).map(byte).take_while(|byte| *byte != 0));
    Ok(bytes)
}

/// A copy of an array; NULL is allowed where `count` is 0.
///
/// # Safety
/// `data` is NULL or points to `count` elements that may be read.
pub(super) unsafe fn copied<T: Copy>(
    what: &'static str,
    data: *const T,
    count: usize,
) -> Result<Vec<T>, Failure> {
    let mut copy = Vec::new();
    if count > 0 {
        check(what, data, count)?;
        reserve(&mut copy, what, count)?;
        // SAFETY: as promised by the caller; alignment and size were checked.
        copy.extend((0..count).map(|i| unsafe { data.add(i).read_volatile() }));
    }
    Ok(copy)
}

/// An array to fill; NULL is allowed where `count` is 0.
///
/// # Safety
/// `data` is NULL or points to `count` elements that nothing else reads or writes for `'a`.
pub(super) unsafe fn slice_mut<'a, T>(
    what: &str,
    data: *mut T,
    count: usize,
) -> Result<&'a mut [T], Failure> {
    if count == 0 {
        return Ok(&mut []);
    }
    check(what, data, count)?;
    // SAFETY: as promised by the caller; alignment and size were checked.
    Ok(unsafe { std::slice::from_raw_parts_mut(data, count) })
}

/// A place for one result that must be there.
pub(super) fn place<T>(what: &str, place: *mut T) -> Result<Place<T>, Failure> {
    check(what, place, 1)?;
    Ok(Place(place))
}

/// Memory of the host that a call fills when nothing can fail any more.
pub(super) struct Place<T>(*mut T);

impl<T> Place<T> {
    /// # Safety
    /// The pointer that it was made from is valid for a write.
    pub(super) unsafe fn put(self, value: T) {
        // SAFETY: not NULL and aligned, see `place`; valid as promised by the caller.
        unsafe { self.0.write(value) }
    }
}

/// What a number of an enum stands for, of `all`: numbers, their names in C and what they are here.
pub(super) fn one_of<T: Copy>(
    what: &str,
    value: i32,
    all: &[(i32, &str, T)],
) -> Result<T, Failure> {
    if let Some((.., found)) = all.iter().find(|(number, ..)| *number == value) {
        return Ok(*found);
    }
    let mut message = "expected ".to_owned();
    for (place, (number, name, _)) in all.iter().enumerate() {
        message += match all.len() - place {
            _ if place == 0 => "",
            1 => " or ",
            _ => ", ",
        };
        message += &format!("{name} ({number})");
    }
    Err(Failure::invalid(what, message + &format!(", got {value}")))
}

/// A yes or no.
pub(super) fn flag(name: &'static str, value: i32) -> Result<bool, Failure> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Failure::invalid(name, format!("expected 0 or 1, got {other}"))),
    }
}

/// What Rust asks of a pointer to `count` elements besides being valid.
pub(super) fn check<T>(what: &str, data: *const T, count: usize) -> Result<(), Failure> {
    if data.is_null() {
        return Err(Failure::null(what));
    }
    if !data.is_aligned() {
        let (align, address) = (align_of::<T>(), data.addr());
        return Err(Failure::invalid(
            what,
            format!("expected an address that {align} divides, got {address:#x}"),
        ));
    }
    if count > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Failure::invalid(what, format!("{count} elements cannot lie in memory")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ptr::{null, null_mut};

    use super::super::status::mxt_status_code::{MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_NULL};
    use super::*;

    #[test]
    fn pointers_are_checked() {
        let numbers = [1_u32, 2, 3];
        // SAFETY: valid, or rejected before use.
        unsafe {
            assert_eq!(copied("x", numbers.as_ptr(), 3).ok(), Some(numbers.to_vec()));
            assert_eq!(copied::<u32>("x", null(), 0).ok(), Some(Vec::new()));
            assert_eq!(slice_mut::<u32>("x", null_mut(), 0).ok().map(|s| s.len()), Some(0));
            let status = |data, count| copied::<u32>("x", data, count).map_err(|f| f.status);
            assert_eq!(status(null(), 1), Err(MXT_ERROR_NULL));
            let odd = numbers.as_ptr().byte_add(1);
            assert_eq!(status(odd, 1), Err(MXT_ERROR_INVALID_ARGUMENT));
            assert_eq!(status(numbers.as_ptr(), usize::MAX), Err(MXT_ERROR_INVALID_ARGUMENT));
        }
    }

    #[test]
    fn strings_are_checked() {
        // SAFETY: literals end with a zero byte.
        unsafe {
            assert_eq!(text("x", c"día".as_ptr()).ok(), Some("día".into()));
            assert_eq!(text("x", null()).map_err(|f| f.status), Err(MXT_ERROR_NULL));
            let failure = text("x", c"ab\xff".as_ptr()).err().map(|f| (f.status, f.message));
            let message = r#"x: expected UTF-8, got byte 0xff at offset 2 of "ab\xff""#;
            assert_eq!(failure, Some((MXT_ERROR_UTF8, message.into())));
            let failure = path("dir", c"".as_ptr()).map_err(|f| f.status);
            assert_eq!(failure, Err(MXT_ERROR_INVALID_ARGUMENT));
            let failure = path("dir", null()).map_err(|f| f.status);
            assert_eq!(failure, Err(MXT_ERROR_NULL));
            #[cfg(unix)]
            assert_eq!(path("dir", c"ab\xff".as_ptr()).unwrap().as_os_str().len(), 3);
        }
    }
}
