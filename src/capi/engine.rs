//! `mxt_engine`: a device, its threads, the seed, and where log lines go.

use std::ffi::{CString, c_char, c_void};
use std::sync::Arc;

use super::float_mode;
use super::group::{Given, mxt_group, mxt_user_data_free_fn};
use super::guard;
use super::handle::{Handle, State};
use super::message::Slot;
use super::status::{Failure, mxt_status};
use super::structs::{self, Options, Out, versioned};
use super::user_data::UserData;
use super::{arguments, structs::read_or_default};
use crate::{Allocator, CudaStream, Engine, EngineMemory, EngineOptions, LogFn};

/// How much a log line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_log_level {
    /// Something is likely wrong, yet the call goes on.
    Warning = 1,
    /// What a user wants to know once: device, kernels, memory.
    Info = 2,
    /// Details for whoever looks for a fault.
    Debug = 3,
}

/// Receives a log line. `level` is one of mxt_log_level, `message` a UTF-8 line without a line
/// end, borrowed for the call.
///
/// Runs on the thread that is inside the call that logs, and on several at once where several
/// threads use the engine. It must not throw or longjmp, and calls on the object whose call logs
/// return MXT_ERROR_BUSY.
pub type mxt_log_fn =
    Option<unsafe extern "C-unwind" fn(user_data: *mut c_void, level: i32, message: *const c_char)>;

/// Gives `bytes` bytes of memory, at least one, at a multiple of `alignment`, a power of two, with
/// whatever is in them; NULL where there is none, which is MXT_ERROR_OUT_OF_MEMORY of the call that
/// needs them. Nothing else may use them until they are given to mxt_deallocate_fn.
///
/// Runs on the thread that is inside a call, and on several at once where several threads use the
/// engine. It must not throw, longjmp, or call the library.
pub type mxt_allocate_fn = Option<
    unsafe extern "C-unwind" fn(
        user_data: *mut c_void,
        bytes: usize,
        alignment: usize,
    ) -> *mut c_void,
>;

/// Takes back memory, with the size and the alignment that it was asked for with. All else as for
/// mxt_allocate_fn.
pub type mxt_deallocate_fn = Option<
    unsafe extern "C-unwind" fn(
        user_data: *mut c_void,
        memory: *mut c_void,
        bytes: usize,
        alignment: usize,
    ),
>;

/// What an engine is made from. Fill it with mxt_engine_options_init.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct mxt_engine_options {
    /// Set by mxt_engine_options_init.
    pub struct_size: usize,
    /// "cpu"; "cuda" or "cuda:0" for the first NVIDIA GPU, "cuda:1" for the second and so on;
    /// "auto" for the first GPU where there is one that works, else the CPU. NULL is "cpu".
    /// Borrowed for the call.
    pub device: *const c_char,
    /// Worker threads on the CPU, at most 1,024. 0 (default) takes one for each core that the
    /// process may use, which ranks of a group on the same host share. Results do not depend on it. A
    /// GPU takes none.
    pub threads: usize,
    /// Seed of everything random: initial weights, data order, rounding, transforms. Default 1337.
    pub seed: u64,
    /// Most bytes that one model with its trainer may take. 0 (default) sets no limit.
    pub memory_limit: u64,
    /// Receives log lines. NULL (default): the library is silent.
    pub log: mxt_log_fn,
    /// Passed to `log`. It must stay valid until the engine and everything made from it is freed,
    /// or until `log_user_data_free` is called with it.
    pub log_user_data: *mut c_void,
    /// A CUDA stream of the host (CUstream or cudaStream_t) in the primary context of the device,
    /// where cudaStreamCreate makes them. All work of the engine is queued there, in the order of
    /// the calls, between the host's own. It must not be capturing while a call is inside, and must
    /// live until the engine and everything made from it is freed. NULL (default): the engine makes
    /// its own. With device "auto" there must be a GPU then.
    pub cuda_stream: *mut c_void,
    /// Called with `log_user_data`, whatever it is, exactly once for each call of mxt_engine_new
    /// that succeeds, when the library will never call `log` again: at the end of the call that
    /// gives up the last of the engine and all that was made from it, on the thread of that call,
    /// after the worker threads have ended. Where `log` is NULL, that is the end of mxt_engine_new
    /// itself. An mxt_engine_new that fails never calls it: log_user_data is the caller's still. A
    /// child made by fork() that frees the handles calls it as well, for its own copy of memory.
    /// NULL (default): nothing is called.
    pub log_user_data_free: mxt_user_data_free_fn,
    /// The ranks that train together, of which this engine is one; see mxt_group. mxt_engine_new is
    /// collective then. Borrowed for the call. NULL (default): it trains alone.
    pub group: *const mxt_group,
    /// Gives large memory of the host in place of the system: on the CPU weights, gradients,
    /// states, activations and workspaces, and on every device what snapshots copy. It is asked for
    /// some large blocks by the calls that make models, trainers, decoders and snapshots, not by
    /// steps. NULL (default): the system maps them.
    pub allocate: mxt_allocate_fn,
    /// Takes back what `allocate` gave. Must be there where that is.
    pub deallocate: mxt_deallocate_fn,
    /// Passed to the two. It must stay valid until the engine and everything made from it is freed,
    /// or until `allocator_user_data_free` is called with it.
    pub allocator_user_data: *mut c_void,
    /// Called with `allocator_user_data` exactly once for each call of mxt_engine_new that
    /// succeeds, when all memory is given back and the library will never call the two again; as
    /// log_user_data_free. Where `allocate` is NULL, that is the end of mxt_engine_new itself. NULL
    /// (default): nothing is called.
    pub allocator_user_data_free: mxt_user_data_free_fn,
}
versioned!(
    mxt_engine_options,
    last = log_user_data: *mut c_void,
    then cuda_stream: *mut c_void,
    then log_user_data_free: mxt_user_data_free_fn,
    then group: *const mxt_group,
    then allocate: mxt_allocate_fn,
    then deallocate: mxt_deallocate_fn,
    then allocator_user_data: *mut c_void,
    then allocator_user_data_free: mxt_user_data_free_fn
);

impl Options for mxt_engine_options {
    fn defaults() -> Self {
        let options = EngineOptions::default();
        Self {
            struct_size: size_of::<Self>(),
            device: std::ptr::null(),
            threads: options.threads,
            seed: options.seed,
            memory_limit: options.memory_limit,
            log: None,
            log_user_data: std::ptr::null_mut(),
            cuda_stream: std::ptr::null_mut(),
            log_user_data_free: None,
            group: std::ptr::null(),
            allocate: None,
            deallocate: None,
            allocator_user_data: std::ptr::null_mut(),
            allocator_user_data_free: None,
        }
    }
}

/// What an engine, and all that was made from it, has in use of large memory. Set struct_size to
/// sizeof(mxt_memory_use) before the call that fills it. Beside that there are buffers of a call,
/// and what a GPU's driver takes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_memory_use {
    /// sizeof(mxt_memory_use), set by the caller.
    pub struct_size: usize,
    /// Bytes of the device that are in use now: weights, gradients, states, activations and
    /// workspaces of models, trainers and decoders. Of the CPU, this is memory of the host.
    pub device_bytes: u64,
    /// The most of them at any time since the engine was made.
    pub device_peak: u64,
    /// The most bytes that the device has for all that runs there, or memory_limit of the engine
    /// where that is less; 0 where the system does not say.
    pub device_limit: u64,
    /// Bytes of the host beside them that are in use now: snapshots.
    pub host_bytes: u64,
    /// The most of them at any time since the engine was made.
    pub host_peak: u64,
    /// The most bytes that the machine and the process's control groups give; 0 where the system
    /// does not say.
    pub host_limit: u64,
}
versioned!(mxt_memory_use, last = host_limit: u64);

/// A device with its worker threads. Everything else is made from one. It is never changed, so any
/// number of threads may use it at once. Make with mxt_engine_new, free with mxt_engine_free.
pub struct mxt_engine {
    state: State,
    pub(super) engine: Engine,
    device: CString,
}

impl Handle for mxt_engine {
    const SLOT: Slot = Slot::Engine;
    const NAME: &'static str = "engine";

    fn state(&self) -> &State {
        &self.state
    }
}

/// Fills `options` with the defaults. `struct_size` is sizeof(mxt_engine_options) as the caller's
/// compiler sees it, so that an older program is not written past the end of its struct.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_engine_options_init(
    options: *mut mxt_engine_options,
    struct_size: usize,
) -> mxt_status {
    // SAFETY: the caller's struct has `struct_size` bytes.
    guard::function("mxt_engine_options_init", || unsafe { structs::init(options, struct_size) })
}

/// Starts an engine and stores it in `*engine`, for the caller to free with mxt_engine_free.
///
/// `options` may be NULL for the defaults, and is not read after the call.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_UTF8, MXT_ERROR_INVALID_ARGUMENT (an
/// unknown device, too many threads, a stream of another device), MXT_ERROR_OUT_OF_MEMORY (for the
/// threads; use fewer), MXT_ERROR_UNSUPPORTED (threads that the system does not start, a device
/// that is not there, or whose driver, NVRTC or cuBLASLt is missing; the message says what to
/// install), MXT_ERROR_DEVICE (a GPU that fails); with a group MXT_ERROR_MISMATCH (ranks of other
/// versions, seeds or chips) and MXT_ERROR_PEER. The message is in mxt_last_error.
///
/// A GPU's kernels are compiled when a chip is met for the first time (some seconds) and kept in
/// the user's cache folder: $MXT_CACHE_DIR, else mxfp4train in $XDG_CACHE_HOME or ~/.cache. Only
/// absolute names count. A folder that belongs to another user, or that others may write, is not
/// used: kernels are compiled every time then, and the log warns.
///
/// In the second step of a trainer on a GPU the library captures a CUDA graph, for some
/// milliseconds. A call that waits for the whole device then, as cudaDeviceSynchronize does, may
/// get an error from CUDA: a host with CUDA code on other threads waits for its streams instead.
/// Should a capture be broken off, the step is done without, and the next one tries again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_engine_new(
    options: *const mxt_engine_options,
    engine: *mut *mut mxt_engine,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    guard::maker("mxt_engine_new", || unsafe {
        let out = arguments::place("engine", engine)?;
        let options = read_or_default("options", options)?;
        let host = UserData::new(options.log_user_data, options.log_user_data_free);
        let host = Arc::new(host);
        let allocator =
            UserData::new(options.allocator_user_data, options.allocator_user_data_free);
        let allocator = Arc::new(allocator);
        let functions = match (options.allocate, options.deallocate) {
            (None, None) => None,
            (Some(allocate), Some(deallocate)) => Some((allocate, deallocate)),
            _ => return Err(Failure::null("one of allocate and deallocate of the options")),
        };
        let mut given = Given::new(options.group)?;
        let engine = Engine::new(EngineOptions {
            device: if options.device.is_null() {
                EngineOptions::default().device
            } else {
                arguments::text("device", options.device)?
            },
            threads: options.threads,
            seed: options.seed,
            memory_limit: options.memory_limit,
            log: options.log.map(|function| log_to(host.clone(), function)),
            cuda_stream: (!options.cuda_stream.is_null())
                .then(|| CudaStream::from_raw(options.cuda_stream)),
            group: given.group.take(),
            allocator: functions.map(|(allocate, deallocate)| {
                let host = allocator.clone();
                Box::new(HostAllocator { host, allocate, deallocate }) as Box<dyn Allocator>
            }),
        })?;
        let device = CString::new(engine.device()).map_err(|error| {
            Failure::invalid("device", format!("expected a name without zero bytes: {error}"))
        })?;
        out.put(mxt_engine { state: State::new(), engine, device }.into_raw());
        host.keep();
        allocator.keep();
        given.keep();
        Ok(())
    })
}

/// The host's functions for large memory.
struct HostAllocator {
    host: Arc<UserData>,
    allocate: unsafe extern "C-unwind" fn(*mut c_void, usize, usize) -> *mut c_void,
    deallocate: unsafe extern "C-unwind" fn(*mut c_void, *mut c_void, usize, usize),
}

// SAFETY: the header asks for memory of so many bytes that nothing else uses.
unsafe impl Allocator for HostAllocator {
    fn allocate(&self, bytes: usize, alignment: usize) -> *mut u8 {
        let user_data = self.host.pointer;
        // SAFETY: the header asks for a function that takes these.
        float_mode::in_hosts(|| unsafe { (self.allocate)(user_data, bytes, alignment) }).cast()
    }

    unsafe fn deallocate(&self, memory: *mut u8, bytes: usize, alignment: usize) {
        let user_data = self.host.pointer;
        // SAFETY: as above, and it came from `allocate`, as promised by the caller.
        float_mode::in_hosts(|| unsafe {
            (self.deallocate)(user_data, memory.cast(), bytes, alignment);
        });
    }
}

/// Stores how much large memory `engine`, and all that was made from it, has in use in `*memory`,
/// whose struct_size the caller has set. Any thread may call it at any time.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_engine_memory(
    engine: *const mxt_engine,
    memory: *mut mxt_memory_use,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_engine_memory", engine, |engine| {
            let out = Out::required("memory", memory)?;
            let EngineMemory { device, host } = engine.engine.memory();
            out.put(mxt_memory_use {
                struct_size: size_of::<mxt_memory_use>(),
                device_bytes: device.now,
                device_peak: device.peak,
                device_limit: device.limit,
                host_bytes: host.now,
                host_peak: host.peak,
                host_limit: host.limit,
            });
            Ok(())
        })
    }
}

/// The name of the device: "cpu", or "cuda:0" for the first GPU. NULL if `engine` is NULL.
///
/// The text is valid as long as the engine. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_engine_device(engine: *const mxt_engine) -> *const c_char {
    // SAFETY: a live handle or NULL, as the header asks.
    let device = unsafe {
        guard::getter("mxt_engine_device", engine, |engine| Some(engine.device.as_ptr()))
    };
    device.unwrap_or(std::ptr::null())
}

/// Number of worker threads: those of the CPU, 0 for a GPU. 0 if `engine` is NULL. Any thread may
/// call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_engine_threads(engine: *const mxt_engine) -> usize {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::getter("mxt_engine_threads", engine, |engine| engine.engine.threads()) }
}

/// The seed that models and trainers of this engine start from. 0 if `engine` is NULL. Any thread
/// may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_engine_seed(engine: *const mxt_engine) -> u64 {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::getter("mxt_engine_seed", engine, |engine| engine.engine.seed()) }
}

/// Which rank of its group an engine is, from 0 on; 0 without a group, and if `engine` is NULL. Any
/// thread may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_engine_rank(engine: *const mxt_engine) -> usize {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::getter("mxt_engine_rank", engine, |engine| engine.engine.rank()) }
}

/// Ranks of an engine's group; 1 without one, 0 if `engine` is NULL. Any thread may call it at any
/// time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_engine_ranks(engine: *const mxt_engine) -> usize {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::getter("mxt_engine_ranks", engine, |engine| engine.engine.size()) }
}

/// The message of the last call with this engine that failed (making a model from it, for one), on
/// whichever thread; the empty string when there is none.
///
/// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
/// call of mxt_engine_last_error. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_engine_last_error(engine: *const mxt_engine) -> *const c_char {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::last_error("mxt_engine_last_error", engine) }
}

/// Gives the engine up; NULL does nothing. Models and trainers that were made from it stay usable:
/// the worker threads end with the last of them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_engine_free(engine: *mut mxt_engine) {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::free("mxt_engine_free", engine) }
}

/// The host's log callback as the crate wants it.
fn log_to(
    host: Arc<UserData>,
    function: unsafe extern "C-unwind" fn(*mut c_void, i32, *const c_char),
) -> LogFn {
    Box::new(move |level, line| {
        let line = CString::new(line.replace('\0', " ")).unwrap_or_default();
        // SAFETY: the header asks for a function and user data that live as long as the engine.
        float_mode::in_hosts(|| unsafe {
            function(host.pointer, level as i32, line.as_ptr());
        });
    })
}
