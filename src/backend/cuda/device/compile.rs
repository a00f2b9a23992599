//! From kernel sources to machine code: NVRTC, and a cache of what it made.
//!
//! Sources are part of the library. A file is compiled for the chip that is present when an engine
//! first needs it, all files at once on as many threads, and the result is kept in the user's cache
//! folder under a hash of everything that it depends on ([`super::cache`]).

use std::ffi::c_int;

use cudarc::nvrtc::{result, sys};

use super::cache::{Cache, Key};
use super::gpu::c_string;
use crate::signals::signals_blocked;
use crate::thread::mark_as_ours;
use crate::{Error, Result};

/// Put in front of every file.
pub(crate) const PRELUDE: &str = include_str!("../../../../kernels/prelude.cuh");

/// NVRTC's options besides the chip. Lambdas are device code like everything else.
const OPTIONS: [&str; 2] = ["--std=c++17", "--device-as-default-execution-space"];

/// A kernel file by its name, with its text.
pub(crate) const FILES: [(&str, &str); 13] = [
    ("adamw", include_str!("../../../../kernels/adamw.cu")),
    ("attention", include_str!("../../../../kernels/attention.cu")),
    ("attention_sm90", include_str!("../../../../kernels/attention_sm90.cu")),
    ("classifier", include_str!("../../../../kernels/classifier.cu")),
    ("embedding", include_str!("../../../../kernels/embedding.cu")),
    ("fp8", include_str!("../../../../kernels/fp8.cu")),
    ("gelu", GELU),
    ("layernorm", include_str!("../../../../kernels/layernorm.cu")),
    ("linear", include_str!("../../../../kernels/linear.cu")),
    ("mxfp4", MXFP4),
    ("mxfp4_fp8", MXFP4_FP8),
    ("mxfp4_sm120", include_str!("../../../../kernels/mxfp4_sm120.cu")),
    ("normal", NORMAL),
];

/// The files of GELU, of MXFP4 and of its random bits, which share their beginnings.
const GELU: &str = concat!(
    include_str!("../../../../kernels/gelu.cuh"),
    "#line 1 \"gelu.cu\"\n",
    include_str!("../../../../kernels/gelu.cu")
);
const MXFP4: &str = concat!(
    include_str!("../../../../kernels/mxfp4.cuh"),
    "#line 1 \"mxfp4.cu\"\n",
    include_str!("../../../../kernels/mxfp4.cu")
);
const MXFP4_FP8: &str = concat!(
    include_str!("../../../../kernels/mxfp4.cuh"),
    include_str!("../../../../kernels/gelu.cuh"),
    "#line 1 \"mxfp4_fp8.cu\"\n",
    include_str!("../../../../kernels/mxfp4_fp8.cu")
);
const NORMAL: &str = concat!(
    include_str!("../../../../kernels/mxfp4.cuh"),
    "#line 1 \"normal.cu\"\n",
    include_str!("../../../../kernels/normal.cu")
);

/// NVRTC's name for a chip. The "a" gives a kernel the instructions that only this very chip has.
pub(crate) fn architecture((major, minor): (i32, i32)) -> String {
    format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
}

/// Compiled machine code of one file.
pub(crate) struct Code {
    place: Place,
    bytes: Vec<u8>,
    /// Whether it comes from the cache, which may hold what was never tried.
    cached: bool,
}

/// Which file for which chip, and where the cache has it.
struct Place {
    name: &'static str,
    source: &'static str,
    architecture: String,
    key: Key,
}

/// Bytes of the stack of a thread that compiles: what a process's first thread has, for nothing is known
/// of a compiler's needs.
const STACK: usize = 8 << 20;

/// Machine code of every file, from the cache where it holds it.
pub(crate) fn all(
    cache: Option<&Cache>,
    architecture: &str,
    driver_version: c_int,
) -> Result<Vec<Code>> {
    each_file(|name, source| {
        let [major, minor] = compiler_version();
        let versions = [driver_version, major, minor];
        Code::get(Place::new(name, source, architecture, versions), cache, &compile)
    })
}

/// What `get` makes of each file, all at once on as many threads.
fn each_file<R: Send>(
    get: impl Fn(&'static str, &'static str) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    std::thread::scope(|scope| {
        let start = |(name, source)| {
            let get = &get;
            std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, move || {
                // What NVRTC lacks is a panic here, and an error of the caller's.
                mark_as_ours();
                get(name, source)
            })
        };
        let compiling = signals_blocked(|| FILES.map(start));
        let refused = |e| Error::Unsupported {
            what: "compiling kernels".into(),
            remedy: format!("the system refuses to start a thread ({e}); end others"),
        };
        let join = |thread: std::io::Result<std::thread::ScopedJoinHandle<'_, _>>| {
            thread.map_err(refused)?.join().map_err(panicked)?
        };
        // All of them, before any error: a panic that nobody has joined is one of the scope.
        compiling.map(join).into_iter().collect()
    })
}

impl Place {
    /// `versions` are those of driver and compiler.
    fn new(
        name: &'static str,
        source: &'static str,
        architecture: &str,
        versions: [c_int; 3],
    ) -> Self {
        let versions = versions.map(c_int::to_le_bytes);
        let texts = [name, PRELUDE, source, architecture].into_iter().chain(OPTIONS);
        let parts = texts.map(str::as_bytes).chain(versions.iter().map(|bytes| &bytes[..]));
        Self { name, source, architecture: architecture.to_owned(), key: Key::of(parts) }
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

fn compile(place: &Place) -> Result<Vec<u8>> {
    cubin(place.name, place.source, &place.architecture)
}

impl Code {
    /// From the cache, or else from `compile`.
    fn get(
        place: Place,
        cache: Option<&Cache>,
        compile: &dyn Fn(&Place) -> Result<Vec<u8>>,
    ) -> Result<Self> {
        let found = cache.and_then(|cache| cache.read(&place.file(), &place.key));
        let cached = found.is_some();
        let bytes = found.map_or_else(|| compile(&place), Ok)?;
        let code = Self { place, bytes, cached };
        if !cached {
            code.keep(cache);
        }
        Ok(code)
    }

    /// A cache that cannot be written costs the next start some seconds, nothing else.
    fn keep(&self, cache: Option<&Cache>) {
        if let Some(cache) = cache {
            let _ = cache.write(&self.place.file(), &self.place.key, &self.bytes);
        }
    }

    /// Gives the code to `load`, the driver. What the cache had and the driver refuses is compiled anew,
    /// once, and kept in its place if the driver takes that.
    pub(crate) fn load(
        self,
        cache: Option<&Cache>,
        load: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.load_with(cache, &compile, load)
    }

    fn load_with(
        mut self,
        cache: Option<&Cache>,
        compile: &dyn Fn(&Place) -> Result<Vec<u8>>,
        mut load: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        match load(&self.bytes) {
            Err(_) if self.cached => {
                self.bytes = compile(&self.place)?;
                load(&self.bytes)?;
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

/// Compiles one file for `architecture`, such as "sm_90a". No GPU is needed.
pub(crate) fn cubin(name: &str, source: &str, architecture: &str) -> Result<Vec<u8>> {
    let failed = |what: &str| Error::Device { message: format!("{what} {name}.cu: NVRTC failed") };
    let text = c_string(&format!("{PRELUDE}\n#line 1 \"{name}.cu\"\n{source}"));
    let program = result::create_program(&text, Some(&c_string(&format!("{name}.cu"))))
        .map_err(|_| failed("reading"))?;
    let mut options = vec![format!("--gpu-architecture={architecture}")];
    options.extend(OPTIONS.map(String::from));
    // SAFETY: `program` was made above and is destroyed below.
    let compiled = unsafe { result::compile_program(program, &options) };
    // SAFETY: as above; the log holds what the compiler says.
    let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
    let mut code = Vec::new();
    let mut size = 0;
    // SAFETY: `code` gets the size that NVRTC asks for.
    let read = unsafe {
        let sized = sys::nvrtcGetCUBINSize(program, &mut size);
        code.resize(size, 0u8);
        sized.result().and_then(|()| sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result())
    };
    // SAFETY: made above.
    let _ = unsafe { result::destroy_program(program) };
    if compiled.is_err() || read.is_err() {
        let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|c| *c != 0).collect();
        let log = String::from_utf8_lossy(&log);
        return Err(Error::Device {
            message: format!("compiling {name}.cu for {architecture}: {log}"),
        });
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::HashSet;

    use super::super::folders::Folders;
    use super::*;

    /// Every kernel compiles for every chip that the library knows, with the compiler that users have.
    #[test]
    fn kernels_compile_for_every_chip() {
        if let Err(error) = super::super::gpu::open_nvrtc(&Folders::from_environment(&|_| ())) {
            println!("skipped: {error}");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        for architecture in ["sm_80", "sm_90a", "sm_100a", "sm_120a"] {
            let get = || all(Some(&cache), architecture, 13_000).unwrap_or_else(|e| panic!("{e}"));
            let codes = get();
            for ((name, _), Code { bytes, cached, .. }) in FILES.iter().zip(&codes) {
                println!("{name}.cu for {architecture}: {} bytes", bytes.len());
                assert!(bytes.starts_with(b"\x7fELF") && !cached);
                let product = b"product_mxfp4_f32";
                let has_product = bytes.windows(product.len()).any(|window| window == product);
                let expected = *name == "mxfp4_sm120" && architecture == "sm_120a";
                assert_eq!(has_product, expected, "{name}.cu for {architecture}");
            }
            let same = |(a, b): (&Code, &Code)| a.cached && a.bytes == b.bytes;
            assert!(get().iter().zip(&codes).all(same), "the cache has other code");
        }
    }

    /// The host's signal handlers run on none of them, and no panic prints anything.
    #[test]
    fn threads_that_compile_are_guests() {
        let is_guest = |_, _| {
            let mut blocked = std::mem::MaybeUninit::uninit();
            // SAFETY: the mask is the calling thread's own; it is filled, then asked.
            let is_blocked = unsafe {
                libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), blocked.as_mut_ptr());
                libc::sigismember(blocked.as_ptr(), libc::SIGUSR1) == 1
            };
            Ok(is_blocked && crate::thread::is_ours())
        };
        assert_eq!(each_file(is_guest).unwrap(), [true; FILES.len()]);
        let panics =
            |_, _| -> Result<()> { std::panic::resume_unwind(Box::new("no such function")) };
        let error = each_file(panics).unwrap_err().to_string();
        assert!(error.contains("NVRTC lacks a function"), "{error}");
    }

    /// A kernel that did not wait would read what the one before it has not written yet.
    #[test]
    fn every_kernel_waits_for_those_before_it() {
        let mut kernels = 0;
        for (name, source) in FILES {
            for kernel in source.split("__global__ ").skip(1) {
                let body = kernel.split_once('{').map_or("", |(_, body)| body);
                let first = body.trim_start_matches([' ', '\n', '\\']);
                assert!(first.starts_with("begin();"), "{name}.cu: {kernel:.80}");
                kernels += 1;
            }
        }
        assert!(kernels > 40, "{kernels}");
    }

    #[test]
    fn whatever_code_depends_on_changes_its_place() {
        let files = [
            Place::new("a", "source", "sm_80", [13000, 13, 0]),
            Place::new("b", "source", "sm_80", [13000, 13, 0]),
            Place::new("a", "sources", "sm_80", [13000, 13, 0]),
            Place::new("a", "source", "sm_90a", [13000, 13, 0]),
            Place::new("a", "source", "sm_80", [13010, 13, 0]),
            Place::new("a", "source", "sm_80", [13000, 14, 0]),
            Place::new("a", "source", "sm_80", [13000, 13, 1]),
        ]
        .map(|place| place.file());
        let different: HashSet<_> = files.iter().collect();
        assert_eq!(different.len(), files.len(), "{files:?}");
    }

    /// What a chip that takes no code but "good" loads.
    fn load(code: &[u8]) -> Result<()> {
        match code {
            b"good" => Ok(()),
            _ => Err(Error::Device { message: "an invalid image".into() }),
        }
    }

    /// Gets a file and loads it; gives how often it was compiled.
    fn get_and_load(cache: &Cache, made: &[u8]) -> (usize, Result<()>) {
        let compiled = Cell::new(0);
        let compile = |_: &Place| {
            compiled.set(compiled.get() + 1);
            Ok(made.to_vec())
        };
        let code = Code::get(place(), Some(cache), &compile).unwrap();
        let loaded = code.load_with(Some(cache), &compile, load);
        (compiled.get(), loaded)
    }

    fn place() -> Place {
        Place::new("file", "source", "sm_80", [13000, 13, 0])
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
        cache.write(&place().file(), &place().key, b"stale").unwrap();
        let (compiled, loaded) = get_and_load(&cache, b"good");
        assert_eq!((compiled, loaded.is_ok()), (1, true));
        assert_eq!(held(), b"good", "the entry is replaced");

        // What is refused when it is new is an error at once, and never replaces anything.
        cache.write(&place().file(), &place().key, b"stale").unwrap();
        let (compiled, loaded) = get_and_load(&cache, b"bad");
        assert!(loaded.unwrap_err().to_string().contains("an invalid image"));
        assert_eq!((compiled, held()), (1, b"stale".to_vec()));
        let compile = |_: &Place| Ok(b"bad".to_vec());
        let code = Code::get(place(), None, &compile).unwrap();
        let never = |_: &Place| panic!("compiled a second time");
        assert!(code.load_with(None, &never, load).is_err());
    }
}
