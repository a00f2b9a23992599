//! From kernel sources to machine code: NVRTC, and a cache of what it made.
//!
//! Sources are part of the library. A file is compiled for the chip that is present when an engine
//! first needs it, all files at once on as many threads, and the result is kept in the user's cache
//! folder under a hash of everything that it depends on.

use std::ffi::c_int;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result, sys};

use super::gpu::c_string;
use crate::{Error, Result};

/// Put in front of every file.
pub(super) const PRELUDE: &str = include_str!("../../../kernels/prelude.cuh");

/// NVRTC's options besides the chip. Lambdas are device code like everything else.
const OPTIONS: [&str; 2] = ["--std=c++17", "--device-as-default-execution-space"];

/// A kernel file by its name, with its text.
pub(super) const FILES: [(&str, &str); 13] = [
    ("adamw", include_str!("../../../kernels/adamw.cu")),
    ("attention", include_str!("../../../kernels/attention.cu")),
    ("attention_sm90", include_str!("../../../kernels/attention_sm90.cu")),
    ("classifier", include_str!("../../../kernels/classifier.cu")),
    ("embedding", include_str!("../../../kernels/embedding.cu")),
    ("fp8", include_str!("../../../kernels/fp8.cu")),
    ("gelu", GELU),
    ("layernorm", include_str!("../../../kernels/layernorm.cu")),
    ("linear", include_str!("../../../kernels/linear.cu")),
    ("mxfp4", MXFP4),
    ("mxfp4_fp8", MXFP4_FP8),
    ("mxfp4_sm120", include_str!("../../../kernels/mxfp4_sm120.cu")),
    ("normal", NORMAL),
];

/// The files of GELU, of MXFP4 and of its random bits, which share their beginnings.
const GELU: &str = concat!(
    include_str!("../../../kernels/gelu.cuh"),
    "#line 1 \"gelu.cu\"\n",
    include_str!("../../../kernels/gelu.cu")
);
const MXFP4: &str = concat!(
    include_str!("../../../kernels/mxfp4.cuh"),
    "#line 1 \"mxfp4.cu\"\n",
    include_str!("../../../kernels/mxfp4.cu")
);
const MXFP4_FP8: &str = concat!(
    include_str!("../../../kernels/mxfp4.cuh"),
    include_str!("../../../kernels/gelu.cuh"),
    "#line 1 \"mxfp4_fp8.cu\"\n",
    include_str!("../../../kernels/mxfp4_fp8.cu")
);
const NORMAL: &str = concat!(
    include_str!("../../../kernels/mxfp4.cuh"),
    "#line 1 \"normal.cu\"\n",
    include_str!("../../../kernels/normal.cu")
);

/// NVRTC's name for a chip. The "a" gives a kernel the instructions that only this very chip has.
pub(super) fn architecture((major, minor): (i32, i32)) -> String {
    format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
}

/// Bytes of the stack of a thread that compiles: what a process's first thread has, for nothing is known
/// of a compiler's needs.
const STACK: usize = 8 << 20;

/// Machine code of every file, from the cache where it holds it.
pub(super) fn all(architecture: &str, driver_version: c_int) -> Result<Vec<Vec<u8>>> {
    let folder = cache_folder();
    std::thread::scope(|scope| {
        let compiling = FILES.map(|(name, source)| {
            let folder = folder.as_deref();
            let builder = std::thread::Builder::new().stack_size(STACK);
            builder.spawn_scoped(scope, move || {
                cached(folder, name, source, architecture, driver_version)
            })
        });
        let refused = |e| Error::Unsupported {
            what: "compiling kernels".into(),
            remedy: format!("the system refuses to start a thread ({e}); end others"),
        };
        let join = |thread: std::io::Result<std::thread::ScopedJoinHandle<'_, _>>| {
            thread.map_err(refused)?.join().map_err(panicked)?
        };
        compiling.into_iter().map(join).collect()
    })
}

fn panicked(_: Box<dyn std::any::Any + Send>) -> Error {
    Error::Device { message: "NVRTC lacks a function; is it older than CUDA 13?".into() }
}

/// Compiles one file for `architecture`, such as "sm_90a". No GPU is needed.
pub(super) fn cubin(name: &str, source: &str, architecture: &str) -> Result<Vec<u8>> {
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

fn cached(
    folder: Option<&Path>,
    name: &str,
    source: &str,
    architecture: &str,
    driver_version: c_int,
) -> Result<Vec<u8>> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    let _ = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    let key = (PRELUDE, source, OPTIONS, architecture, driver_version, major, minor);
    let path = folder.map(|folder| folder.join(format!("{name}-{architecture}-{}", hash(&key))));
    if let Some(code) = path.as_deref().and_then(read) {
        return Ok(code);
    }
    let code = cubin(name, source, architecture)?;
    if let Some(path) = path {
        // A cache that cannot be written costs the next start some seconds, nothing else.
        let _ = write(&path, &code);
    }
    Ok(code)
}

/// What the cache holds under `path`: its length and checksum, then the code. Nothing if damaged.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let code = bytes.split_off(bytes.len().min(HEADER));
    (bytes == header(&code)).then_some(code)
}

/// Writes to a name of this process, then renames, so that no reader sees half a file.
fn write(path: &Path, code: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or_else(|| Path::new("."));
    fs::create_dir_all(folder)?;
    let temporary = path.with_extension(format!("{}.part", std::process::id()));
    let mut file = fs::File::create(&temporary)?;
    file.write_all(&header(code)).and_then(|()| file.write_all(code))?;
    fs::rename(&temporary, path)
}

const HEADER: usize = 12;

fn header(code: &[u8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&(code.len() as u64).to_le_bytes());
    header[8..].copy_from_slice(&crc32fast::hash(code).to_le_bytes());
    header
}

/// 64 bits that name a version of a file.
fn hash(key: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// `MXT_CACHE_DIR`, or `mxfp4train` in the user's cache folder; None where neither is known.
fn cache_folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(folder) = variable("MXT_CACHE_DIR") {
        return Some(folder.into());
    }
    let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")))?;
    Some(cache.join("mxfp4train"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every kernel compiles for every chip that the library knows, with the compiler that users have.
    #[test]
    fn kernels_compile_for_every_chip() {
        if let Err(error) = super::super::gpu::open_nvrtc() {
            println!("skipped: {error}");
            return;
        }
        for architecture in ["sm_80", "sm_90a", "sm_100a", "sm_120a"] {
            for (name, source) in FILES {
                let code = cubin(name, source, architecture).unwrap_or_else(|e| panic!("{e}"));
                println!("{name}.cu for {architecture}: {} bytes", code.len());
                assert!(code.starts_with(b"\x7fELF"));
                let product = b"product_mxfp4_f32";
                let has_product = code.windows(product.len()).any(|window| window == product);
                let expected = name == "mxfp4_sm120" && architecture == "sm_120a";
                assert_eq!(has_product, expected, "{name}.cu for {architecture}");
            }
        }
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
    fn the_cache_gives_back_what_was_written_and_nothing_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        assert!(read(&path).is_none());
        write(&path, b"code").unwrap();
        assert_eq!(read(&path).unwrap(), b"code");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(read(&path).is_none());
        fs::write(&path, b"short").unwrap();
        assert!(read(&path).is_none());
    }
}
