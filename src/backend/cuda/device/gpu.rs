//! One GPU: its libraries, context and stream, kernel launches, and the first thing that went
//! wrong.
//!
//! The driver, NVRTC and cuBLASLt are opened at run time, so that the library starts without them.
//! All work goes to one stream, so that it may be the host's own.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};

use super::cache::Cache;
use super::capture::{self, Redraw};
use super::compile::{self, Compiled, File, c_string};
use super::folders::{CUDA, Folders};
use crate::backend::block::Supply;
use crate::{Error, Result};

/// An opened GPU. Everything runs on one stream, in the order of the calls.
pub(crate) struct Gpu {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// The host's own stream is not destroyed.
    own_stream: bool,
    /// Such as "NVIDIA H200".
    pub(crate) name: String,
    /// Major and minor.
    pub(crate) capability: (i32, i32),
    /// Streaming multiprocessors.
    pub(crate) multiprocessors: u32,
    modules: Vec<sys::CUmodule>,
    kernels: HashMap<String, sys::CUfunction>,
    /// The first error of an operation, which returned nothing.
    error: Mutex<Option<String>>,
    /// Whether something runs on it that nothing ends.
    is_stuck: AtomicBool,
    /// Where large memory of the host comes from, and how much of it and of the GPU's is in use.
    pub(crate) supply: Arc<Supply>,
}

thread_local! {
    /// Where this thread queues work in place of the stream of all; null where it does not.
    static BESIDE: Cell<sys::CUstream> = const { Cell::new(std::ptr::null_mut()) };
}

// SAFETY: handles of the driver may be used from any thread whose current context is theirs, which
// `scope` sees to.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver serializes what needs it.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// Opens GPU `ordinal` and loads all kernels, compiling those that are not cached. With
    /// `stream`, the host's own, everything runs on that one. `warn` receives what a user should
    /// put right.
    pub(crate) fn open(
        ordinal: usize,
        stream: Option<sys::CUstream>,
        files: &[File],
        warn: &dyn Fn(String),
    ) -> Result<Self> {
        let unsupported = |what: String, remedy: &str| {
            Err(Error::Unsupported { what, remedy: remedy.to_owned() })
        };
        // SAFETY: looks for a library by name.
        if !unsafe { sys::is_culib_present() } {
            return unsupported(
                format!("device cuda:{ordinal}"),
                "no NVIDIA driver (libcuda.so.1) is found; install one, or use device \"cpu\"",
            );
        }
        if let Err(error) = driver::result::init() {
            return unsupported(
                format!("device cuda:{ordinal}"),
                &format!("the NVIDIA driver does not start ({}); use \"cpu\"", text(error.0)),
            );
        }
        let mut version = 0;
        // SAFETY: writes one number.
        if unsafe { sys::cuDriverGetVersion(&mut version) } != CUresult::CUDA_SUCCESS
            || version < CUDA
        {
            return unsupported(
                format!("the NVIDIA driver for CUDA {}.{}", version / 1000, version % 1000 / 10),
                "install a driver of release 580 or newer, or use device \"cpu\"",
            );
        }
        let count = driver::result::device::get_count().unwrap_or(0);
        if ordinal >= count.max(0) as usize {
            return unsupported(
                format!("device cuda:{ordinal}"),
                &format!("this machine has {count} GPUs, numbered from 0"),
            );
        }
        let folders = Folders::from_environment(warn);
        folders.open_libraries()?;

        let closed = |error: driver::DriverError| Error::Device {
            message: format!("cannot open cuda:{ordinal}: {}", text(error.0)),
        };
        let device = driver::result::device::get(ordinal as c_int).map_err(closed)?;
        // SAFETY: `device` is valid for all of these.
        let attribute = |which| unsafe { driver::result::device::get_attribute(device, which) };
        let major = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
        let minor = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR;
        let processors = Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let name = driver::result::device::get_name(device).unwrap_or_else(|_| "GPU".into());
        let (Ok(major), Ok(minor), Ok(multiprocessors)) =
            (attribute(major), attribute(minor), attribute(processors))
        else {
            return Err(Error::Device { message: format!("cuda:{ordinal} does not answer") });
        };
        if major < 8 {
            return unsupported(
                format!("{name} of compute capability {major}.{minor}"),
                "the kernels need 8.0 (Ampere) or newer; use device \"cpu\"",
            );
        }
        // NOTE: before a context is current, for `warn` calls the host.
        let cache = folders.cache.map(|folder| Cache::open(&folder));
        let cache = cache.and_then(|opened| {
            opened.map_err(|why| warn(format!("the cache of GPU kernels at {why}"))).ok()
        });
        // SAFETY: released in `drop`.
        let context = unsafe { driver::result::primary_ctx::retain(device) }.map_err(closed)?;
        let mut gpu = Self {
            device,
            context,
            stream: stream.unwrap_or(std::ptr::null_mut()),
            own_stream: stream.is_none(),
            name,
            capability: (major, minor),
            multiprocessors: multiprocessors as u32,
            modules: Vec::new(),
            kernels: HashMap::new(),
            error: Mutex::new(None),
            is_stuck: AtomicBool::new(false),
            supply: Arc::default(),
        };
        let _current = gpu.enter();
        if let Some(stream) = stream {
            let mut of = std::ptr::null_mut();
            // SAFETY: the host says that it is a stream.
            let result = unsafe { sys::cuStreamGetCtx(stream, &mut of) };
            if result != CUresult::CUDA_SUCCESS || of != context {
                let message = format!(
                    "expected a stream of the primary context of cuda:{ordinal}, as \
                     cudaStreamCreate makes after cudaSetDevice({ordinal})"
                );
                return Err(Error::invalid("cuda_stream", message));
            }
        } else {
            let kind = driver::result::stream::StreamKind::NonBlocking;
            gpu.stream = driver::result::stream::create(kind).map_err(|error| Error::Device {
                message: format!("cannot make a stream: {}", text(error.0)),
            })?;
        }
        gpu.load_kernels(files, cache.as_ref(), version)?;
        Ok(gpu)
    }

    /// Runs `f` with this GPU's context current, and gives the thread its own back.
    pub(crate) fn scope<R>(&self, f: impl FnOnce() -> R) -> R {
        let _current = self.enter();
        f()
    }

    fn enter(&self) -> Current {
        // SAFETY: the context is retained as long as `self` lives.
        let result = unsafe { sys::cuCtxPushCurrent_v2(self.context) };
        self.note("cuCtxPushCurrent", result);
        Current { pushed: result == CUresult::CUDA_SUCCESS }
    }

    /// Where work is queued: the stream, or what this thread captures, or [`Gpu::beside`].
    pub(crate) fn stream(&self) -> sys::CUstream {
        let beside = Some(BESIDE.get()).filter(|stream| !stream.is_null());
        capture::capturing().or(beside).unwrap_or(self.stream)
    }

    /// Queues what `f` asks for on another stream of this GPU.
    pub(super) fn beside<R>(&self, stream: sys::CUstream, f: impl FnOnce() -> R) -> R {
        /// Also where `f` panics.
        struct Back;
        impl Drop for Back {
            fn drop(&mut self) {
                BESIDE.set(std::ptr::null_mut());
            }
        }
        BESIDE.set(stream);
        let _back = Back;
        f()
    }

    /// From here on nothing waits for it any more, and its memory stays taken.
    pub(crate) fn give_up(&self) {
        self.is_stuck.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_stuck(&self) -> bool {
        self.is_stuck.load(Ordering::Relaxed)
    }

    /// Launches a kernel, if there is anything to do; `arguments` point to values of the types that
    /// it declares. Whether it was launched.
    pub(crate) fn launch(
        &self,
        kernel: &str,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        arguments: &mut [*mut c_void],
    ) -> bool {
        let Some(function) = self.kernels.get(kernel) else {
            self.fail(format!("no kernel is named {kernel}; this is a defect, report it"));
            return false;
        };
        if grid.contains(&0) {
            return false;
        }
        let [x, y, z] = grid.map(|n| n as u32);
        use sys::CUlaunchAttributeID as Attribute;
        let mut overlapping = sys::CUlaunchAttribute {
            id: Attribute::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: block as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: self.stream(),
            attrs: &mut overlapping,
            // NOTE: every kernel waits by itself for those before it (`begin` in ptx.cuh), so
            // it may start while they end: a microsecond a kernel, 1 to 2% of a step of a small
            // model.
            numAttrs: u32::from(self.capability >= (9, 0)),
        };
        // SAFETY: the caller's arguments are what the kernel declares; the stream is this
        // context's.
        let result = unsafe {
            let arguments = arguments.as_mut_ptr();
            sys::cuLaunchKernelEx(&config, *function, arguments, std::ptr::null_mut())
        };
        self.note(kernel, result);
        result == CUresult::CUDA_SUCCESS
    }

    /// Launches a kernel whose one argument holds random numbers; a recording draws them anew.
    pub(crate) fn launch_drawn(
        &self,
        kernel: &str,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        mut arguments: impl Redraw + 'static,
    ) {
        if self.launch(kernel, grid, block, shared, &mut [arguments.argument()]) {
            capture::note_redrawn(arguments);
        }
    }

    /// Keeps the first error of an operation for [`Gpu::check`].
    pub(crate) fn note(&self, what: &str, result: CUresult) {
        if result != CUresult::CUDA_SUCCESS {
            self.fail(format!("{what}: {}", text(result)));
        }
    }

    pub(crate) fn fail(&self, message: String) {
        if !capture::has_failed() {
            self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(message);
        }
    }

    /// The first error that an operation met, if there was one. It stays: the state of the device
    /// is not known any more.
    pub(crate) fn check(&self) -> Result<()> {
        match &*self.error.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some(message) => Err(Error::Device { message: format!("{}: {message}", self.name) }),
        }
    }

    /// Waits for everything asked for so far.
    pub(crate) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        self.note("the GPU", unsafe { sys::cuStreamSynchronize(self.stream) });
        self.check()
    }

    /// What it is called, or the part of it that this process has, whoever numbers it.
    pub(crate) fn uuid(&self) -> String {
        // SAFETY: bytes, of which all are values.
        let mut uuid: sys::CUuuid = unsafe { std::mem::zeroed() };
        // SAFETY: writes 16 bytes.
        self.note("the GPU's name", unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, self.device) });
        uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect()
    }

    /// Bytes free and bytes in all.
    pub(crate) fn memory(&self) -> Option<(usize, usize)> {
        self.scope(|| driver::result::mem_get_info().ok())
    }

    fn load_kernels(
        &mut self,
        files: &[File],
        cache: Option<&Cache>,
        driver_version: c_int,
    ) -> Result<()> {
        let all = compile::all(files, cache, self.capability, driver_version)?;
        let _alone = capture::without_captures();
        all.into_iter().try_for_each(|code| code.load(cache, |made| self.load(made)))
    }

    /// Loads the kernels of one file, in place of those of the same names.
    pub(crate) fn load(&mut self, Compiled { cubin, names }: &Compiled) -> Result<()> {
        let _current = self.enter();
        let most_shared = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        // SAFETY: the device is valid.
        let most_shared =
            unsafe { driver::result::device::get_attribute(self.device, most_shared) };
        let failed = |what: &str, result| Error::Device {
            message: format!("{what} of a kernel file: {}", text(result)),
        };
        let mut module = std::ptr::null_mut();
        // SAFETY: a whole cubin, which the driver copies.
        let result = unsafe { sys::cuModuleLoadData(&mut module, cubin.as_ptr().cast()) };
        if result != CUresult::CUDA_SUCCESS {
            return Err(failed("loading", result));
        }
        self.modules.push(module);
        for (name, symbol) in names {
            let mut function = std::ptr::null_mut();
            // SAFETY: the module is loaded; writes a handle.
            let result = unsafe {
                sys::cuModuleGetFunction(&mut function, module, c_string(symbol).as_ptr())
            };
            if result != CUresult::CUDA_SUCCESS {
                return Err(failed(&format!("finding {name}"), result));
            }
            self.allow_shared_memory(function, most_shared.unwrap_or(0));
            self.kernels.insert(name.clone(), function);
        }
        Ok(())
    }

    /// Lets a kernel ask for all shared memory that its own static part leaves.
    fn allow_shared_memory(&self, function: sys::CUfunction, most: c_int) {
        use sys::CUfunction_attribute_enum as Which;
        // SAFETY: `function` is loaded.
        let used = unsafe {
            driver::result::function::get_function_attribute(
                function,
                Which::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
            )
        };
        let rest = most - used.unwrap_or(0);
        let which = Which::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: as above. A refusal shows at the launch that needs the memory.
        let _ = unsafe { driver::result::function::set_function_attribute(function, which, rest) };
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.is_stuck() {
            return;
        }
        let modules = std::mem::take(&mut self.modules);
        let _alone = capture::without_captures();
        self.scope(|| {
            // SAFETY: all of this is ours, and nothing uses it any more. Errors have no receiver.
            unsafe {
                let _ = sys::cuStreamSynchronize(self.stream);
                for module in modules {
                    let _ = sys::cuModuleUnload(module);
                }
                if self.own_stream && !self.stream.is_null() {
                    let _ = sys::cuStreamDestroy_v2(self.stream);
                }
            }
        });
        // SAFETY: retained in `open`.
        let _ = unsafe { driver::result::primary_ctx::release(self.device) };
    }
}

/// Takes the context off the thread again.
struct Current {
    /// Where the driver refused to make it current, what is current is the host's.
    pushed: bool,
}

impl Drop for Current {
    fn drop(&mut self) {
        if self.pushed {
            let mut context = std::ptr::null_mut();
            // SAFETY: writes a handle.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut context) };
        }
    }
}

/// What the driver says of a result.
pub(crate) fn text(result: CUresult) -> String {
    let mut message = std::ptr::null();
    // SAFETY: writes a pointer to a static string.
    let known = unsafe { sys::cuGetErrorString(result, &mut message) };
    if known == CUresult::CUDA_SUCCESS && !message.is_null() {
        // SAFETY: as above.
        unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
    } else {
        format!("{result:?}")
    }
}

/// Launches a kernel: `launch!(gpu, "name", [grid; 3], block, shared bytes; arguments...)`. The
/// arguments must have the types that the kernel declares: u64 for a pointer or a number, u32, f32,
/// f64, or a `repr(C)` struct.
macro_rules! launch {
    ($gpu:expr, $kernel:expr, $grid:expr, $block:expr, $shared:expr; $($argument:expr),* $(,)?) => {
        $gpu.launch(
            $kernel,
            $grid,
            $block,
            $shared,
            &mut [$(std::ptr::from_mut(&mut { $argument }).cast()),*],
        )
    };
}
pub(crate) use launch;
