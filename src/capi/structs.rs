//! Structs that grow: the first field, `struct_size`, says which version of a struct the host
//! knows.
//!
//! An older host passes a smaller struct: the fields that it lacks get their defaults, and are not
//! written in results. A newer host passes a larger one: accepted while the part that this library
//! does not know is zero, that is, while nothing is asked that it would silently not do.

use super::arguments::check;
use super::status::Failure;
use super::status::mxt_status_code::MXT_ERROR_STRUCT_SIZE;

/// No struct will ever be larger; more than this is memory that was not initialized.
const MAX_SIZE: usize = 1024;

/// A struct of the C API whose first field is `struct_size: usize`.
///
/// # Safety
/// `repr(C)`, no padding (so that growth always changes the size), and valid for any bytes.
pub(super) unsafe trait Versioned: Copy {
    /// Its name in C.
    const NAME: &'static str;
    /// Its size in the first version of the API.
    const FIRST_SIZE: usize;
    /// Where the fields end that came later. No version ends between two: a pointer of which a host
    /// passes half is none.
    const LATER_SIZES: &[usize];
}

/// A [`Versioned`] struct that the host fills.
pub(super) trait Options: Versioned {
    /// The default of every field, with `struct_size` of this library's version.
    fn defaults() -> Self;
}

/// Declares a [`Versioned`] struct by the last field of its first version, which stays as it is
/// when fields are added behind; these follow it here.
macro_rules! versioned {
    ($name:ident, last = $last:ident: $type:ty $(, then $later:ident: $later_type:ty)*) => {
        // SAFETY: the structs of this API are `repr(C)` and hold numbers, pointers and optional
        // function pointers. That the first version has no padding at its end is asserted here;
        // that there is none between fields or behind the last, tests/abi.rs asks a C compiler.
        unsafe impl $crate::capi::structs::Versioned for $name {
            const NAME: &'static str = stringify!($name);
            const FIRST_SIZE: usize = {
                let end = std::mem::offset_of!($name, $last) + size_of::<$type>();
                assert!(std::mem::offset_of!($name, struct_size) == 0);
                assert!(end.is_multiple_of(align_of::<$name>()), "add a field instead of padding");
                end
            };
            const LATER_SIZES: &[usize] = {
                const ENDS: &[usize] = &[
                    $(std::mem::offset_of!($name, $later) + size_of::<$later_type>()),*
                ];
                let last = match ENDS.last() {
                    Some(last) => *last,
                    None => <$name as $crate::capi::structs::Versioned>::FIRST_SIZE,
                };
                assert!(last == size_of::<$name>(), "name the fields that came later");
                ENDS
            };
        }
    };
}
pub(super) use versioned;

/// Fills a struct of the host with the defaults; `size` is the `sizeof` that the host sees.
///
/// # Safety
/// `place` is NULL or valid for writes of `size` bytes.
pub(super) unsafe fn init<T: Options>(place: *mut T, size: usize) -> Result<(), Failure> {
    check("options", place, 1)?;
    check_size::<T>(size)?;
    // SAFETY: as promised by the caller.
    unsafe { write(place, size, T::defaults()) };
    Ok(())
}

/// Reads a struct of the host.
///
/// # Safety
/// `options` is NULL or points to as many bytes as its `struct_size` says.
pub(super) unsafe fn read<T: Options>(what: &str, options: *const T) -> Result<T, Failure> {
    // SAFETY: as promised by the caller.
    let size = unsafe { size_of_struct(what, options) }?;
    let known = size.min(size_of::<T>());
    let mut value = T::defaults();
    let bytes = options.cast::<u8>();
    // SAFETY: `size` bytes are readable; T is valid for any bytes.
    let rest = unsafe {
        std::ptr::copy_nonoverlapping(bytes, (&raw mut value).cast::<u8>(), known);
        std::slice::from_raw_parts(bytes.add(known), size - known)
    };
    if rest.iter().any(|byte| *byte != 0) {
        let message = format!(
            "{what}: struct_size is {size}, this library knows {known} bytes of {} and the rest is \
             not zero; it asks for something newer than this library (version {})",
            T::NAME,
            env!("CARGO_PKG_VERSION"),
        );
        return Err(Failure::new(MXT_ERROR_STRUCT_SIZE, message));
    }
    Ok(value)
}

/// [`read`], where NULL stands for the defaults.
///
/// # Safety
/// As for [`read`].
pub(super) unsafe fn read_or_default<T: Options>(
    what: &str,
    options: *const T,
) -> Result<T, Failure> {
    if options.is_null() {
        return Ok(T::defaults());
    }
    // SAFETY: as promised by the caller.
    unsafe { read(what, options) }
}

/// A struct that a call fills when nothing can fail any more.
pub(super) struct Out<T>(Option<(*mut T, usize)>);

impl<T: Versioned> Out<T> {
    /// A result that must have a place.
    ///
    /// # Safety
    /// `place` is NULL or valid for writes of as many bytes as its `struct_size` says.
    pub(super) unsafe fn required(what: &str, place: *mut T) -> Result<Self, Failure> {
        // SAFETY: as promised by the caller.
        let size = unsafe { size_of_struct(what, place) }?;
        Ok(Self(Some((place, size))))
    }

    /// A result that is dropped where the host passes NULL.
    ///
    /// # Safety
    /// As for [`Out::required`].
    pub(super) unsafe fn optional(what: &str, place: *mut T) -> Result<Self, Failure> {
        if place.is_null() {
            return Ok(Self(None));
        }
        // SAFETY: as promised by the caller.
        unsafe { Self::required(what, place) }
    }

    /// # Safety
    /// The pointer that it was made from is still valid.
    pub(super) unsafe fn put(self, value: T) {
        if let Some((place, size)) = self.0 {
            // SAFETY: as promised by the caller.
            unsafe { write(place, size, value) };
        }
    }
}

/// Writes what the host knows of `value`, zeros behind it, and the host's own `struct_size`.
///
/// # Safety
/// `place` is valid for writes of `size` bytes, at least a `usize`.
unsafe fn write<T: Versioned>(place: *mut T, size: usize, value: T) {
    let known = size.min(size_of::<T>());
    let bytes = place.cast::<u8>();
    // SAFETY: as promised by the caller.
    unsafe {
        std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), bytes, known);
        std::ptr::write_bytes(bytes.add(known), 0, size - known);
        place.cast::<usize>().write(size);
    }
}

/// # Safety
/// `options` is NULL or points to a `usize`.
unsafe fn size_of_struct<T: Versioned>(what: &str, options: *const T) -> Result<usize, Failure> {
    check(what, options, 1)?;
    // SAFETY: not NULL and aligned; the first field of every version is its size.
    let size = unsafe { options.cast::<usize>().read() };
    check_size::<T>(size).map_err(|failure| Failure {
        message: format!("{what}: {}", failure.message).into(),
        ..failure
    })?;
    Ok(size)
}

fn check_size<T: Versioned>(size: usize) -> Result<(), Failure> {
    let is_newer = (size_of::<T>()..=MAX_SIZE).contains(&size);
    if is_newer || size == T::FIRST_SIZE || T::LATER_SIZES.contains(&size) {
        return Ok(());
    }
    let message = format!(
        "struct_size is {size}, expected sizeof({}), {} bytes in this library; fill the struct \
         with its _init function, or set struct_size if it has none",
        T::NAME,
        size_of::<T>(),
    );
    Err(Failure::new(MXT_ERROR_STRUCT_SIZE, message))
}

#[cfg(test)]
mod tests {
    use super::super::status::mxt_status_code;
    use super::*;

    /// A struct in its second version; `c` came later.
    #[derive(Clone, Copy, Debug, PartialEq)]
    #[repr(C)]
    struct thing {
        struct_size: usize,
        a: u64,
        b: u64,
        c: u64,
    }
    versioned!(thing, last = b: u64, then c: u64);

    impl Options for thing {
        fn defaults() -> Self {
            Self { struct_size: size_of::<Self>(), a: 1, b: 2, c: 3 }
        }
    }

    fn status(words: &[usize]) -> Result<thing, mxt_status_code> {
        // SAFETY: the tests never claim a size above that of `words` that would be read.
        unsafe { read::<thing>("x", words.as_ptr().cast()) }.map_err(|failure| failure.status)
    }

    #[test]
    fn older_and_newer_hosts() {
        assert_eq!(status(&[24, 7, 8]), Ok(thing { struct_size: 24, a: 7, b: 8, c: 3 }));
        assert_eq!(status(&[32, 7, 8, 9]), Ok(thing { struct_size: 32, a: 7, b: 8, c: 9 }));
        let newer = Ok(thing { struct_size: 48, a: 7, b: 8, c: 9 });
        assert_eq!(status(&[48, 7, 8, 9, 0, 0]), newer);
        assert_eq!(status(&[48, 7, 8, 9, 0, 1]), Err(MXT_ERROR_STRUCT_SIZE));
        // Also one that ends within a field.
        for size in [0, 8, 23, 25, 28, 31, MAX_SIZE + 1, usize::MAX] {
            assert_eq!(status(&[size, 7, 8, 9]), Err(MXT_ERROR_STRUCT_SIZE), "{size}");
        }
    }

    #[test]
    fn results_fill_what_the_host_knows() {
        let value = thing { struct_size: 0, a: 7, b: 8, c: 9 };
        let put = |words: &mut [usize]| {
            // SAFETY: the sizes in the tests are those of the arrays, or smaller.
            unsafe {
                let out = Out::<thing>::required("x", words.as_mut_ptr().cast())?;
                out.put(value);
            }
            Ok::<_, Failure>(())
        };
        let mut older = [24, 0, 0, 5];
        assert!(put(&mut older).is_ok());
        assert_eq!(older, [24, 7, 8, 5]);
        let mut newer = [40, 0, 0, 5, 5];
        assert!(put(&mut newer).is_ok());
        assert_eq!(newer, [40, 7, 8, 9, 0]);
        assert!(put(&mut [0, 0, 0, 5]).is_err());
    }

    #[test]
    fn defaults_go_no_further_than_the_host_struct() {
        let mut older = [0_usize, 0, 0, 5];
        // SAFETY: 24 bytes are there.
        assert!(unsafe { init::<thing>(older.as_mut_ptr().cast(), 24) }.is_ok());
        assert_eq!(older, [24, 1, 2, 5]);
    }
}
