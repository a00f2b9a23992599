//! Strings and arrays that the host passes in, checked before Rust may look at them.

use std::ffi::{CStr, OsStr, c_char};
use std::path::Path;

use super::status::Failure;
use super::status::mxt_status_code::MXT_ERROR_UTF8;

/// A string that must be there.
///
/// # Safety
/// `text` is NULL or ends with a zero byte, and does not change for `'a`.
pub(super) unsafe fn text<'a>(what: &str, text: *const c_char) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Err(Failure::null(what));
    }
    // SAFETY: as promised by the caller.
    let bytes = unsafe { CStr::from_ptr(text) };
    check_length(what, bytes)?;
    bytes.to_str().map_err(|error| {
        let message = format!(
            "{what}: expected UTF-8, got byte 0x{:02x} at offset {} of {bytes:?}",
            bytes.to_bytes()[error.valid_up_to()],
            error.valid_up_to(),
        );
        Failure::new(MXT_ERROR_UTF8, message)
    })
}

/// A path that must be there and not empty: the system's bytes, of no certain encoding.
///
/// # Safety
/// As for [`text`].
pub(super) unsafe fn path<'a>(what: &str, path: *const c_char) -> Result<&'a Path, Failure> {
    // SAFETY: as promised by the caller.
    let path = unsafe { os_text(what, path) }?;
    if path.is_empty() {
        return Err(Failure::invalid(what, "expected a path, got an empty string"));
    }
    Ok(Path::new(path))
}

/// A path or pattern that must be there.
///
/// # Safety
/// As for [`text`].
#[cfg(unix)]
pub(super) unsafe fn os_text<'a>(what: &str, text: *const c_char) -> Result<&'a OsStr, Failure> {
    use std::os::unix::ffi::OsStrExt;

    if text.is_null() {
        return Err(Failure::null(what));
    }
    // SAFETY: as promised by the caller.
    let text = unsafe { CStr::from_ptr(text) };
    check_length(what, text)?;
    Ok(OsStr::from_bytes(text.to_bytes()))
}

/// Refuses strings that are no name and no path, before a message quotes them.
fn check_length(what: &str, text: &CStr) -> Result<(), Failure> {
    const MOST: usize = 4095;
    let length = text.count_bytes();
    if length <= MOST {
        return Ok(());
    }
    let message = format!("expected at most {MOST} bytes, got a string of {length}");
    Err(Failure::invalid(what, message))
}

/// A path or pattern that must be there. Paths of this system are not bytes.
///
/// # Safety
/// As for [`text`].
#[cfg(not(unix))]
pub(super) unsafe fn os_text<'a>(what: &str, path: *const c_char) -> Result<&'a OsStr, Failure> {
    // SAFETY: as promised by the caller.
    unsafe { text(what, path) }.map(OsStr::new)
}

/// An array to read; NULL is allowed where `count` is 0.
///
/// # Safety
/// `data` is NULL or points to `count` elements that do not change for `'a`.
pub(super) unsafe fn slice<'a, T>(
    what: &str,
    data: *const T,
    count: usize,
) -> Result<&'a [T], Failure> {
    if count == 0 {
        return Ok(&[]);
    }
    check(what, data, count)?;
    // SAFETY: as promised by the caller; alignment and size were checked.
    Ok(unsafe { std::slice::from_raw_parts(data, count) })
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
            assert_eq!(slice("x", numbers.as_ptr(), 3).ok(), Some(&numbers[..]));
            assert_eq!(slice::<u32>("x", null(), 0).ok(), Some(&[][..]));
            assert_eq!(slice_mut::<u32>("x", null_mut(), 0).ok().map(|s| s.len()), Some(0));
            let status = |data, count| slice::<u32>("x", data, count).map_err(|f| f.status);
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
            assert_eq!(text("x", c"día".as_ptr()).ok(), Some("día"));
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
