//! Memory whose size comes from outside, in vectors.
//!
//! NOTE: a vector that cannot grow ends the process, a host's as well as ours. So what depends on the
//! size of a model, a batch or a file asks first, and a refusal is an error.

use crate::{Error, Result};

/// Makes room in `vec` for `len` elements in all; messages call them `what`.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub(crate) fn reserve<T>(vec: &mut Vec<T>, what: &'static str, len: usize) -> Result<()> {
    let more = len.saturating_sub(vec.len());
    vec.try_reserve_exact(more).map_err(|_| Error::OutOfMemory {
        what,
        needed: (len as u64).saturating_mul(size_of::<T>() as u64),
        limit: "which the system refuses; use a smaller batch or model".into(),
    })
}

/// A vector of `len` zeros, or the error of [`reserve`].
pub(crate) fn zeros<T: Default + Clone>(what: &'static str, len: usize) -> Result<Vec<T>> {
    let mut vec = Vec::new();
    reserve(&mut vec, what, len)?;
    vec.resize(len, T::default());
    Ok(vec)
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
}
