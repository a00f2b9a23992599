//! Folders that environment variables name: where libraries are opened and machine code is kept.
//!
//! NOTE: only absolute ones count. A name relative to the current folder would let whoever fills
//! that folder run code in this process.

use std::ffi::{OsString, c_int};
use std::path::PathBuf;
use std::sync::OnceLock;

use cudarc::{cublaslt, nvrtc};

use crate::{Error, Result};

/// The CUDA release whose interfaces are used.
pub(super) const CUDA: c_int = 13_000;

/// What the environment says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Folders {
    /// Where a CUDA toolkit keeps its libraries, if the loader does not know it.
    pub(crate) libraries: Vec<PathBuf>,
    /// `MXT_CACHE_DIR`, or `mxfp4train` in the user's cache folder; None where neither is known.
    pub(crate) cache: Option<PathBuf>,
}

impl Folders {
    /// Reads the process's environment; `warn` receives at most one line.
    pub(crate) fn from_environment(warn: &dyn Fn(String)) -> Self {
        Self::of(|name| std::env::var_os(name), warn)
    }

    fn of(get: impl Fn(&str) -> Option<OsString>, warn: &dyn Fn(String)) -> Self {
        let mut ignored = Vec::new();
        let mut folder = |name: &str| {
            let value = get(name)?;
            let path = PathBuf::from(&value);
            if path.is_absolute() {
                return Some(path);
            }
            ignored.push(format!("{name}={value:?}"));
            None
        };
        let toolkits = ["CUDA_HOME", "CUDA_PATH"].map(&mut folder);
        let [own, cache, home] = ["MXT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"].map(&mut folder);
        if !ignored.is_empty() {
            let ignored = ignored.join(", ");
            warn(format!("expected absolute names of folders, so these are ignored: {ignored}"));
        }
        let known = ["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from);
        let toolkits = toolkits.into_iter().flatten().chain(known);
        let cache = cache.or_else(|| Some(home?.join(".cache")));
        Self {
            libraries: toolkits.map(|root| root.join("lib64")).collect(),
            cache: own.or_else(|| Some(cache?.join("mxfp4train"))),
        }
    }

    /// Opens NVRTC and cuBLASLt.
    pub(super) fn open_libraries(&self) -> Result<()> {
        self.open_nvrtc()?;
        // SAFETY: looks for a library by name.
        require(unsafe { cublaslt::sys::is_culib_present() }, "libcublasLt.so.13", "nvidia-cublas")
    }

    /// Opens NVRTC, also where it lies outside the loader's own folders.
    pub(crate) fn open_nvrtc(&self) -> Result<()> {
        static OPENED: OnceLock<Vec<libloading::Library>> = OnceLock::new();
        OPENED.get_or_init(|| {
            let mut opened = Vec::new();
            for folder in &self.libraries {
                for name in ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13", "libcublasLt.so.13"] {
                    // A library that is open under its SONAME is found by that name from then on.
                    // SAFETY: the folder is absolute, and the user or the system's administrator
                    // names it as that of a toolkit: who puts files there is trusted with running
                    // code here.
                    opened.extend(unsafe { libloading::Library::new(folder.join(name)) });
                }
            }
            opened
        });
        // SAFETY: looks for a library by name.
        require(unsafe { nvrtc::sys::is_culib_present() }, "libnvrtc.so.13", "nvidia-cuda-nvrtc")
    }
}

fn require(present: bool, library: &str, package: &str) -> Result<()> {
    if present {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("CUDA without {library}"),
        remedy: format!(
            "install the CUDA {} toolkit, or `pip install {package}`, and put the folder of the \
             library into LD_LIBRARY_PATH (or name the toolkit in CUDA_HOME)",
            CUDA / 1000
        ),
    })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// The folders and the warnings under these variables.
    fn read(variables: &[(&str, &str)]) -> (Folders, Vec<String>) {
        let warnings = RefCell::new(Vec::new());
        let get = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.into())
        };
        let folders = Folders::of(get, &|line| warnings.borrow_mut().push(line));
        (folders, warnings.into_inner())
    }

    #[test]
    fn the_first_variable_that_is_set_names_the_cache() {
        let home = ("HOME", "/home/x");
        let xdg = ("XDG_CACHE_HOME", "/cache");
        let own = ("MXT_CACHE_DIR", "/own");
        for (variables, cache) in [
            (&[][..], None),
            (&[home], Some("/home/x/.cache/mxfp4train")),
            (&[home, xdg], Some("/cache/mxfp4train")),
            (&[home, xdg, own], Some("/own")),
        ] {
            let (folders, warnings) = read(variables);
            assert_eq!(folders.cache, cache.map(PathBuf::from));
            assert_eq!(warnings, [""; 0]);
        }
    }

    #[test]
    fn toolkits_come_before_the_known_places() {
        let (folders, warnings) = read(&[("CUDA_PATH", "/b"), ("CUDA_HOME", "/a")]);
        let expected = ["/a/lib64", "/b/lib64", "/usr/local/cuda/lib64", "/opt/cuda/lib64"];
        assert_eq!(folders.libraries, expected.map(PathBuf::from));
        assert_eq!(warnings, [""; 0]);
    }

    #[test]
    fn an_empty_or_relative_variable_names_nothing_and_is_warned_of_once() {
        const NAMES: [&str; 5] =
            ["CUDA_HOME", "CUDA_PATH", "MXT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"];
        let (unset, _) = read(&[]);
        for value in ["", ".", "cuda", "./cuda", "../cuda", "~/cuda"] {
            let (folders, warnings) = read(&NAMES.map(|name| (name, value)));
            assert_eq!(folders, unset, "{value:?}");
            let [warning] = &warnings[..] else { panic!("{warnings:?}") };
            for name in NAMES {
                assert!(warning.contains(&format!("{name}={value:?}")), "{warning}");
            }
        }
        let (folders, warnings) = read(&[("MXT_CACHE_DIR", "here"), ("HOME", "/home/x")]);
        assert_eq!(folders.cache, Some("/home/x/.cache/mxfp4train".into()));
        assert_eq!(warnings.len(), 1);
    }
}
