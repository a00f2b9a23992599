//! From kernel sources to machine code: NVRTC, and a cache of what it made.
//!
//! Sources are part of the library. A file is compiled for the chip that is present when an engine
//! first needs it, all files at once on as many threads, and the result is kept in the user's cache
//! folder under a hash of everything that it depends on ([`super::cache`]). Kernels are known by
//! their C++ names, those of templates with their arguments; what they are called in the code is
//! kept with it.

use std::ffi::{CStr, CString, c_int};

use cudarc::nvrtc::{result, sys};

use super::cache::{Cache, Key};
use crate::signals::signals_blocked;
use crate::thread::mark_as_ours;
use crate::{Error, Result};

/// NVRTC's options besides the chip. Lambdas are device code like everything else.
const OPTIONS: [&str; 2] = ["--std=c++17", "--device-as-default-execution-space"];

/// A kernel file.
#[derive(Clone, Copy)]
pub(crate) struct File {
    pub(crate) name: &'static str,
    /// What it begins with, and last its own text.
    pub(crate) texts: &'static [&'static str],
    /// The names of its kernels for chips of a compute capability; where there are none, nothing is
    /// compiled.
    pub(crate) kernels: fn((i32, i32)) -> Vec<String>,
}

/// NVRTC's name for a chip. The "a" gives a kernel the instructions that only this very chip has.
pub(crate) fn architecture((major, minor): (i32, i32)) -> String {
    format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
}

/// Machine code of one file.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Compiled {
    pub(crate) cubin: Vec<u8>,
    /// Of each kernel, its name and what it is called in the code.
    pub(crate) names: Vec<(String, String)>,
}

impl Compiled {
    /// The code, a line for each kernel, the length of the code.
    fn to_bytes(&self) -> Vec<u8> {
        let names: String =
            self.names.iter().map(|(name, symbol)| format!("{symbol} {name}\n")).collect();
        let length = (self.cubin.len() as u64).to_le_bytes();
        [&self.cubin, names.as_bytes(), &length].concat()
    }

    /// What [`Compiled::to_bytes`] made.
    fn from_bytes(mut bytes: Vec<u8>) -> Option<Self> {
        let (rest, length) = bytes.split_last_chunk()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let lines = str::from_utf8(rest.get(length..)?).ok()?.lines();
        let names = lines.map(|line| {
            let (symbol, name) = line.split_once(' ')?;
            Some((name.to_owned(), symbol.to_owned()))
        });
        let names = names.collect::<Option<_>>()?;
        bytes.truncate(length);
        Some(Self { cubin: bytes, names })
    }
}

/// Machine code, and where it has its place.
pub(crate) struct Code {
    place: Place,
    pub(crate) compiled: Compiled,
    /// Whether it comes from the cache, which may hold what was never tried.
    pub(crate) cached: bool,
}

/// Which file for which chip, and where the cache has it.
struct Place {
    name: &'static str,
    texts: &'static [&'static str],
    kernels: Vec<String>,
    architecture: String,
    key: Key,
}

/// Bytes of the stack of a thread that compiles: what a process's first thread has, for nothing is
/// known of a compiler's needs.
const STACK: usize = 8 << 20;

/// Machine code of every file, from the cache where it holds it.
pub(crate) fn all(
    files: &[File],
    cache: Option<&Cache>,
    capability: (i32, i32),
    driver_version: c_int,
) -> Result<Vec<Code>> {
    let codes = each_file(files, |file| {
        let kernels = (file.kernels)(capability);
        if kernels.is_empty() {
            return Ok(None);
        }
        let [major, minor] = compiler_version();
        let versions = [driver_version, major, minor];
        let place = Place::new(file, kernels, &architecture(capability), versions);
        Code::get(place, cache, &compile).map(Some)
    })?;
    Ok(codes.into_iter().flatten().collect())
}

/// What `get` makes of each file, all at once on as many threads.
fn each_file<R: Send>(files: &[File], get: impl Fn(&File) -> Result<R> + Sync) -> Result<Vec<R>> {
    std::thread::scope(|scope| {
        let start = |file| {
            let get = &get;
            std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, move || {
                // What NVRTC lacks is a panic here, and an error of the caller's.
                mark_as_ours();
                get(file)
            })
        };
        let compiling: Vec<_> = signals_blocked(|| files.iter().map(start).collect());
        let refused = |e| Error::Unsupported {
            what: "compiling kernels".into(),
            remedy: format!("the system refuses to start a thread ({e}); end others"),
        };
        let join = |thread: std::io::Result<std::thread::ScopedJoinHandle<'_, _>>| {
            thread.map_err(refused)?.join().map_err(panicked)?
        };
        // All of them, before any error: a panic that nobody has joined is one of the scope.
        let joined: Vec<_> = compiling.into_iter().map(join).collect();
        joined.into_iter().collect()
    })
}

impl Place {
    /// `versions` are those of driver and compiler.
    fn new(file: &File, kernels: Vec<String>, architecture: &str, versions: [c_int; 3]) -> Self {
        let versions = versions.map(c_int::to_le_bytes);
        let texts = [file.name, architecture].into_iter().chain(file.texts.iter().copied());
        let texts = texts.chain(OPTIONS).chain(kernels.iter().map(String::as_str));
        let parts = texts.map(str::as_bytes).chain(versions.iter().map(|bytes| &bytes[..]));
        let key = Key::of(parts);
        let &File { name, texts, .. } = file;
        Self { name, texts, kernels, architecture: architecture.to_owned(), key }
    }

    /// The name of its file in the cache.
    fn file(&self) -> String {
        format!("{}-{}-{}", self.name, self.architecture, self.key)
    }
}

/// NVRTC's, major and minor.
fn compiler_version() -> [c_int; 2] {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    let _ = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    [major, minor]
}

fn compile(place: &Place) -> Result<Compiled> {
    cubin(place.name, place.texts, &place.kernels, &place.architecture)
}

impl Code {
    /// From the cache, or else from `compile`.
    fn get(
        place: Place,
        cache: Option<&Cache>,
        compile: &dyn Fn(&Place) -> Result<Compiled>,
    ) -> Result<Self> {
        let found = cache.and_then(|cache| cache.read(&place.file(), &place.key));
        let found = found.and_then(Compiled::from_bytes);
        let cached = found.is_some();
        let compiled = found.map_or_else(|| compile(&place), Ok)?;
        let code = Self { place, compiled, cached };
        if !cached {
            code.keep(cache);
        }
        Ok(code)
    }

    /// A cache that cannot be written costs the next start some seconds, nothing else.
    fn keep(&self, cache: Option<&Cache>) {
        if let Some(cache) = cache {
            let _ = cache.write(&self.place.file(), &self.place.key, &self.compiled.to_bytes());
        }
    }

    /// Gives the code to `load`, the driver. What the cache had and the driver refuses is compiled
    /// anew, once, and kept in its place if the driver takes that.
    pub(crate) fn load(
        self,
        cache: Option<&Cache>,
        load: impl FnMut(&Compiled) -> Result<()>,
    ) -> Result<()> {
        self.load_with(cache, &compile, load)
    }

    fn load_with(
        mut self,
        cache: Option<&Cache>,
        compile: &dyn Fn(&Place) -> Result<Compiled>,
        mut load: impl FnMut(&Compiled) -> Result<()>,
    ) -> Result<()> {
        match load(&self.compiled) {
            Err(_) if self.cached => {
                self.compiled = compile(&self.place)?;
                load(&self.compiled)?;
                self.keep(cache);
                Ok(())
            }
            result => result,
        }
    }
}

fn panicked(_: Box<dyn std::any::Any + Send>) -> Error {
    Error::Device { message: "NVRTC lacks a function; is it older than CUDA 13?".into() }
}

/// A C string of text without zero bytes.
pub(super) fn c_string(text: &str) -> CString {
    CString::new(text).expect("sources and options hold no zero byte")
}

/// Compiles these kernels of one file for `architecture`, such as "sm_90a". No GPU is needed.
pub(crate) fn cubin(
    name: &str,
    texts: &[&str],
    kernels: &[String],
    architecture: &str,
) -> Result<Compiled> {
    let failed = |what: &str| Error::Device { message: format!("{what} {name}.cu: NVRTC failed") };
    let (own, before) = texts.split_last().unwrap_or((&"", &[]));
    let text = c_string(&format!("{}\n#line 1 \"{name}.cu\"\n{own}", before.concat()));
    let program = result::create_program(&text, Some(&c_string(&format!("{name}.cu"))))
        .map_err(|_| failed("reading"))?;
    let expressions: Vec<_> = kernels.iter().map(|kernel| c_string(kernel)).collect();
    let mut options = vec![format!("--gpu-architecture={architecture}")];
    options.extend(OPTIONS.map(String::from));
    // SAFETY: `program` was made above and is destroyed below.
    let compiled = unsafe {
        let add = |expression: &CString| {
            sys::nvrtcAddNameExpression(program, expression.as_ptr()).result()
        };
        let added = expressions.iter().try_for_each(add);
        added.and_then(|()| result::compile_program(program, &options))
    };
    // SAFETY: as above; the log holds what the compiler says.
    let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
    let mut cubin = Vec::new();
    let mut size = 0;
    // SAFETY: `cubin` gets the size that NVRTC asks for.
    let read = unsafe {
        let sized = sys::nvrtcGetCUBINSize(program, &mut size);
        cubin.resize(size, 0u8);
        sized
            .result()
            .and_then(|()| sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()).result())
    };
    let symbol = |(kernel, expression): (&String, &CString)| {
        let mut symbol = std::ptr::null();
        // SAFETY: writes a pointer to a C string that lives as long as the program, and is copied.
        unsafe {
            sys::nvrtcGetLoweredName(program, expression.as_ptr(), &mut symbol).result()?;
            Ok((kernel.clone(), CStr::from_ptr(symbol).to_string_lossy().into_owned()))
        }
    };
    let names: Result<_, result::NvrtcError> =
        kernels.iter().zip(&expressions).map(symbol).collect();
    // SAFETY: made above.
    let _ = unsafe { result::destroy_program(program) };
    match (compiled, read, names) {
        (Ok(()), Ok(()), Ok(names)) => Ok(Compiled { cubin, names }),
        _ => {
            let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|c| *c != 0).collect();
            let log = String::from_utf8_lossy(&log);
            Err(Error::Device { message: format!("compiling {name}.cu for {architecture}: {log}") })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::HashSet;

    use super::*;

    /// The host's signal handlers run on none of them, and no panic prints anything.
    #[test]
    fn threads_that_compile_are_guests() {
        let files = ["a", "b", "c"].map(file);
        let is_guest = |_: &File| {
            let mut blocked = std::mem::MaybeUninit::uninit();
            // SAFETY: the mask is the calling thread's own; it is filled, then asked.
            let is_blocked = unsafe {
                libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), blocked.as_mut_ptr());
                libc::sigismember(blocked.as_ptr(), libc::SIGUSR1) == 1
            };
            Ok(is_blocked && crate::thread::is_ours())
        };
        assert_eq!(each_file(&files, is_guest).unwrap(), [true; 3]);
        let panics =
            |_: &File| -> Result<()> { std::panic::resume_unwind(Box::new("no such function")) };
        let error = each_file(&files, panics).unwrap_err().to_string();
        assert!(error.contains("NVRTC lacks a function"), "{error}");
    }

    #[test]
    fn whatever_code_depends_on_changes_its_place() {
        let place = |name, texts, kernels: &[&str], architecture, versions| {
            let kernels = kernels.iter().map(|name| (*name).to_owned()).collect();
            Place::new(&File { texts, ..file(name) }, kernels, architecture, versions)
        };
        let files = [
            place("a", &["text"], &["k"], "sm_80", [13000, 13, 0]),
            place("b", &["text"], &["k"], "sm_80", [13000, 13, 0]),
            place("a", &["texts"], &["k"], "sm_80", [13000, 13, 0]),
            place("a", &["te", "xt"], &["k"], "sm_80", [13000, 13, 0]),
            place("a", &["text"], &["k<1>"], "sm_80", [13000, 13, 0]),
            place("a", &["text"], &["k", "l"], "sm_80", [13000, 13, 0]),
            place("a", &["text"], &["k"], "sm_90a", [13000, 13, 0]),
            place("a", &["text"], &["k"], "sm_80", [13010, 13, 0]),
            place("a", &["text"], &["k"], "sm_80", [13000, 14, 0]),
            place("a", &["text"], &["k"], "sm_80", [13000, 13, 1]),
        ]
        .map(|place| place.file());
        let different: HashSet<_> = files.iter().collect();
        assert_eq!(different.len(), files.len(), "{files:?}");
    }

    /// What a chip that takes no code but "good" loads.
    fn load(code: &Compiled) -> Result<()> {
        match &code.cubin[..] {
            b"good" => Ok(()),
            _ => Err(Error::Device { message: "an invalid image".into() }),
        }
    }

    /// Gets a file and loads it; gives how often it was compiled.
    fn get_and_load(cache: &Cache, made: &[u8]) -> (usize, Result<()>) {
        let compiled = Cell::new(0);
        let compile = |_: &Place| {
            compiled.set(compiled.get() + 1);
            Ok(code(made))
        };
        let got = Code::get(place(), Some(cache), &compile).unwrap();
        let loaded = got.load_with(Some(cache), &compile, load);
        (compiled.get(), loaded)
    }

    fn file(name: &'static str) -> File {
        File { name, texts: &["text"], kernels: |_| Vec::new() }
    }

    fn place() -> Place {
        Place::new(&file("file"), vec!["kernel".into()], "sm_80", [13000, 13, 0])
    }

    fn code(cubin: &[u8]) -> Compiled {
        let names =
            vec![("kernel<1, true>".into(), "_Z6kernelIL1".into()), ("k".into(), "k".into())];
        Compiled { cubin: cubin.to_vec(), names }
    }

    #[test]
    fn names_are_kept_with_the_code() {
        for cubin in [&b""[..], b"good", b"\n \xff\0"] {
            let whole = code(cubin).to_bytes();
            assert_eq!(Compiled::from_bytes(whole.clone()).unwrap(), code(cubin));
            for damaged in [&whole[1..], &whole[..whole.len() - 1], b"", b"good"] {
                assert!(Compiled::from_bytes(damaged.to_vec()) != Some(code(cubin)));
            }
        }
    }

    #[test]
    fn what_the_driver_refuses_is_compiled_anew_once() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let (compiled, loaded) = get_and_load(&cache, b"good");
        assert_eq!((compiled, loaded.is_ok()), (1, true));
        let (compiled, loaded) = get_and_load(&cache, b"bad");
        assert_eq!((compiled, loaded.is_ok()), (0, true), "the cache had it");

        let held = || cache.read(&place().file(), &place().key).unwrap();
        let stale = code(b"stale").to_bytes();
        cache.write(&place().file(), &place().key, &stale).unwrap();
        let (compiled, loaded) = get_and_load(&cache, b"good");
        assert_eq!((compiled, loaded.is_ok()), (1, true));
        assert_eq!(held(), code(b"good").to_bytes(), "the entry is replaced");

        // What is refused when it is new is an error at once, and never replaces anything.
        cache.write(&place().file(), &place().key, &stale).unwrap();
        let (compiled, loaded) = get_and_load(&cache, b"bad");
        assert!(loaded.unwrap_err().to_string().contains("an invalid image"));
        assert_eq!((compiled, held()), (1, stale));
        let compile = |_: &Place| Ok(code(b"bad"));
        let got = Code::get(place(), None, &compile).unwrap();
        let never = |_: &Place| panic!("compiled a second time");
        assert!(got.load_with(None, &never, load).is_err());
    }
}
