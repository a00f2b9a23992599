//! Memory whose size comes from outside, in vectors.
//!
//! NOTE: a vector that cannot grow ends the process, a host's as well as ours. So what depends on
//! the size of a model, a batch or a file asks first, and a refusal is an error. So it is, too, as
//! long as the reserve of the C library is in use (`emergency.rs`): many small pieces would empty
//! it.

use std::fmt::{self, Write};

use crate::{Error, Result};

/// Whether memory is so short that nothing new may begin. Never in Rust programs, which have an
/// allocator of their own.
pub(crate) fn is_short() -> bool {
    #[cfg(feature = "c-library")]
    return crate::emergency::is_low();
    #[cfg(not(feature = "c-library"))]
    false
}

/// Memory that is kept for code of others which allocates without asking, and ends the process
/// where there is none. In Rust programs, which have an allocator of their own, it is asked for and
/// given back.
#[derive(Debug)]
pub(crate) struct Spare {
    #[cfg(feature = "c-library")]
    _kept: crate::emergency::Spare,
}

impl Spare {
    /// Keeps `bytes` until it is dropped; messages call them `what`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn new(what: &'static str, bytes: usize) -> Result<Self> {
        #[cfg(feature = "c-library")]
        match crate::emergency::Spare::new(bytes) {
            Some(kept) => Ok(Self { _kept: kept }),
            None => Err(refused(what, bytes as u64)),
        }
        #[cfg(not(feature = "c-library"))]
        reserve(&mut Vec::<u8>::new(), what, bytes).map(|()| Self {})
    }
}

/// Room for `more` elements in all that `vec` will have; messages call them `what`.
fn room<T>(
    vec: &mut Vec<T>,
    what: &'static str,
    more: usize,
    try_reserve: impl FnOnce(&mut Vec<T>) -> Result<(), std::collections::TryReserveError>,
) -> Result<()> {
    if vec.capacity() - vec.len() >= more {
        return Ok(());
    }
    #[cfg(feature = "c-library")]
    let try_reserve = |vec: &mut _| crate::emergency::keeping_spares(|| try_reserve(vec));
    if !is_short() && try_reserve(vec).is_ok() {
        return Ok(());
    }
    let needed = (vec.len() as u64 + more as u64).saturating_mul(size_of::<T>() as u64);
    Err(refused(what, needed))
}

fn refused(what: &'static str, needed: u64) -> Error {
    Error::OutOfMemory {
        what,
        needed,
        limit: "which the system refuses; use a smaller batch or model".into(),
    }
}

/// Makes room in `vec` for `len` elements in all; messages call them `what`.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn reserve<T>(vec: &mut Vec<T>, what: &'static str, len: usize) -> Result<()> {
    let more = len.saturating_sub(vec.len());
    room(vec, what, more, |vec| vec.try_reserve_exact(more))
}

/// As many elements of `vec`, whatever they are, or the error of [`reserve`].
///
/// NOTE: it stays as long as it was, for memory that was not used before is dear: the system clears
/// it, page by page.
pub(crate) fn reuse<'v, T: Default + Clone>(
    vec: &'v mut Vec<T>,
    what: &'static str,
    len: usize,
) -> Result<&'v mut [T]> {
    if vec.len() < len {
        reserve(vec, what, len)?;
        vec.resize(len, T::default());
    }
    Ok(&mut vec[..len])
}

/// Appends to a vector that grows as it has to, or the error of [`reserve`].
pub(crate) fn push<T>(vec: &mut Vec<T>, what: &'static str, value: T) -> Result<()> {
    room(vec, what, 1, |vec| vec.try_reserve(1))?;
    vec.push(value);
    Ok(())
}

/// A vector of `len` zeros, or the error of [`reserve`].
pub(crate) fn zeros<T: Default + Clone>(what: &'static str, len: usize) -> Result<Vec<T>> {
    let mut vec = Vec::new();
    reserve(&mut vec, what, len)?;
    vec.resize(len, T::default());
    Ok(vec)
}

/// A vector of all `items`, the first error among them, or that of [`reserve`].
pub(crate) fn collect<T>(
    what: &'static str,
    items: impl IntoIterator<Item = Result<T>>,
) -> Result<Vec<T>> {
    let items = items.into_iter();
    let mut vec = Vec::new();
    reserve(&mut vec, what, items.size_hint().0)?;
    for item in items {
        push(&mut vec, what, item?)?;
    }
    Ok(vec)
}

/// A text, or the error of [`reserve`].
pub(crate) fn text(what: &'static str, arguments: fmt::Arguments<'_>) -> Result<String> {
    struct Fallible(Vec<u8>, &'static str, Result<()>);
    impl Write for Fallible {
        fn write_str(&mut self, part: &str) -> fmt::Result {
            self.2 = room(&mut self.0, self.1, part.len(), |bytes| bytes.try_reserve(part.len()));
            self.2.as_ref().map_err(|_| fmt::Error)?;
            self.0.extend_from_slice(part.as_bytes());
            Ok(())
        }
    }
    let mut written = Fallible(Vec::new(), what, Ok(()));
    let _ = written.write_fmt(arguments);
    written.2?;
    Ok(String::from_utf8(written.0).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hopeless_size_is_an_error() {
        assert_eq!(zeros::<u32>("x", 3).unwrap(), [0, 0, 0]);
        for len in [1 << 45, usize::MAX] {
            let error = zeros::<u32>("the tokens", len).unwrap_err().to_string();
            assert!(error.contains("bytes are needed for the tokens"), "{error}");
        }
    }

    #[test]
    fn items_are_collected_and_texts_written() {
        let items = [Ok(1), Ok(2)];
        assert_eq!(collect("x", items).unwrap(), [1, 2]);
        let endless = (0..usize::MAX).map(Ok::<_, Error>);
        assert!(collect("the numbers", endless).is_err());
        let failing = [Ok(1), Err(Error::Stopped)];
        assert!(matches!(collect("x", failing), Err(Error::Stopped)));
        assert_eq!(text("x", format_args!("{}.{:02}", "ä", 7)).unwrap(), "ä.07");
    }
}
