//! The engine: a device, its threads, the seed of all random numbers, and where log lines go.
//!
//! Which device it is is asked once, at the top: `Model`, `Trainer` and `Decoder` hold an enum of
//! what runs on which, and all below is generic over `Backend`. The engine asks besides, for what
//! only one of them has.

mod link;

use std::ffi::c_void;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::backend::block::{Kind, Supply};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::{Allocator, Device, Memory, on_device};
use crate::comm::{Call, Group, Ranks, Wire};
use crate::{CudaStream, Error, MemoryRoom, Result};

/// How much a log line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(i32)]
pub enum LogLevel {
    /// Something is likely wrong, yet the call goes on.
    Warning = 1,
    /// What a user wants to know once: device, kernels, memory.
    Info = 2,
    /// Details for whoever looks for a fault.
    Debug = 3,
}

/// Receives log lines, on the thread that is inside the call that logs.
pub type LogFn = Box<dyn Fn(LogLevel, &str) + Send + Sync>;

/// What an [`Engine`] is made from. `Default` is the CPU, all its cores, seed 1337.
pub struct EngineOptions {
    /// `"cpu"`, `"cuda"` or `"cuda:0"` for the first GPU, `"cuda:1"` for the second and so on, or
    /// `"auto"` for the first GPU where there is one that works.
    pub device: String,
    /// Worker threads on the CPU; 0 takes one for each core that the process may use, which ranks of
    /// a group on the same host share. A GPU takes none.
    pub threads: usize,
    /// Seed of everything random: initial weights, data order, rounding, transforms.
    pub seed: u64,
    /// Most bytes that one model with its trainer may plan for; 0 sets no limit.
    pub memory_limit: u64,
    /// Receives log lines; without it the library is silent.
    pub log: Option<LogFn>,
    /// The stream on which a GPU does all work; without it the engine makes its own.
    pub cuda_stream: Option<CudaStream>,
    /// The ranks that train together, of which this engine is one; none (default) trains alone.
    /// [`Engine::new`] is collective then, and so are [`crate::Trainer`]'s `new`, `load`, `step`,
    /// `eval` and `save`, and `snapshot` where states are sharded: all ranks make them, in the same
    /// order, with the same options.
    pub group: Option<Group>,
    /// Gives large memory of the host: on the CPU weights, gradients, states, activations and
    /// workspaces, and on every device what snapshots copy. It is dropped when all of that is.
    /// Without it (default), the system maps it.
    pub allocator: Option<Box<dyn Allocator>>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            device: "cpu".into(),
            threads: 0,
            seed: 1337,
            memory_limit: 0,
            log: None,
            cuda_stream: None,
            group: None,
            allocator: None,
        }
    }
}

/// Memory of one kind that an engine has in use; see [`Engine::memory`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes now.
    pub now: u64,
    /// The most bytes at any time since the engine was made.
    pub peak: u64,
    /// The most bytes that there can be, for all that runs there; 0 where the system does not say.
    pub limit: u64,
}

/// What an engine and all that was made from it have in use of large memory; see
/// [`Engine::memory`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineMemory {
    /// Of the device: weights, gradients, states, activations and workspaces of models, trainers
    /// and decoders. Of the CPU, this is memory of the host.
    pub device: MemoryUse,
    /// Of the host beside it: snapshots.
    pub host: MemoryUse,
}

/// A device and what belongs to it. Cheap to clone; clones share one thread pool.
#[derive(Clone)]
pub struct Engine(Arc<Inner>);

struct Inner {
    device: Device<Arc<Cpu>, Arc<Cuda>>,
    /// Such as "cuda:0".
    name: String,
    seed: u64,
    memory_limit: u64,
    /// Where there are others than this one.
    ranks: Option<Ranks>,
    // NOTE: the last field, so that it is dropped when the device's threads have ended.
    log: Option<LogFn>,
}

impl Engine {
    /// Starts the device: its worker threads, or a GPU's kernels, which are compiled when a chip is
    /// met for the first time (some seconds).
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] and [`Error::Unsupported`] for threads that the system does not
    /// start; [`Error::Unsupported`] for a device that is not there, [`Error::InvalidArgument`] for
    /// one that does not exist, for a stream that is not the device's, or for more than 1,024
    /// threads, [`Error::Device`] for a GPU that fails. With a group, [`Error::RanksDiffer`] for
    /// ranks of other versions, seeds or chips, [`Error::Peer`], and [`Error::Unsupported`] where
    /// [`crate::Transport::Nccl`] or [`crate::Transport::Peer`] is asked for and cannot be had.
    pub fn new(mut options: EngineOptions) -> Result<Self> {
        let ranks = match options.group.take() {
            Some(group) if group.is_one() => None,
            group => group.map(Ranks::new).transpose()?,
        };
        let Some(ranks) = ranks else { return Self::alone(options) };
        if options.threads == 0 {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            options.threads = (cores / ranks.on_this_host()).max(1);
        }
        let made = Self::alone(options);
        let made = match ranks.agree(Call::Engine, made.as_ref().map(drop)) {
            Ok(()) => made?,
            Err(error) => return made.and(Err(error)),
        };
        let chip = match made.backend() {
            Device::Cpu(cpu) => cpu.isa().name().to_owned(),
            Device::Cuda(cuda) => cuda.description().to_owned(),
        };
        ranks.compare(&[
            ("the library's version", env!("CARGO_PKG_VERSION").to_owned()),
            ("the chip, or MXT_CPU_ISA,", chip),
            ("seed", made.seed().to_string()),
            ("transport", ranks.transport.to_string()),
            ("shard_states", ranks.shards_states.to_string()),
            ("gradient_wire", ranks.wire.to_string()),
        ])?;
        let Ok(mut inner) = Arc::try_unwrap(made.0) else { unreachable!("nobody else has it") };
        let linked = link::link(&mut inner.device, &ranks);
        if let Some((level, line)) = ranks.end_if_alone(linked)? {
            inner.log(level, || line);
        }
        inner.ranks = Some(ranks);
        let engine = Self(Arc::new(inner));
        engine.log(LogLevel::Info, || match engine.ranks() {
            Some(ranks) => {
                let rounded = match ranks.wire {
                    Wire::F32 => String::new(),
                    wire => format!(", gradients are sent as {wire}"),
                };
                format!("rank {} of {}{rounded}", ranks.rank(), ranks.size())
            }
            None => String::new(),
        });
        Ok(engine)
    }

    fn alone(mut options: EngineOptions) -> Result<Self> {
        let allocator = options.allocator.take();
        let supply = &Arc::new(Supply::new(allocator));
        let cpu = || -> Result<_> {
            let cpu = Cpu::new(options.threads)?.supplied(supply);
            Ok(("cpu".to_owned(), Device::Cpu(Arc::new(cpu))))
        };
        let stream = options.cuda_stream;
        let warn = |line: String| {
            if let Some(log) = &options.log {
                log(LogLevel::Warning, &line);
            }
        };
        let cuda = |ordinal| Ok(Device::Cuda(Arc::new(Cuda::new(ordinal, stream, supply, &warn)?)));
        let mut passed_over = None;
        let (name, device) = match options.device.as_str() {
            "cpu" if stream.is_some() => {
                let message = "expected none for device \"cpu\", which has no streams";
                return Err(Error::invalid("cuda_stream", message));
            }
            "cpu" => cpu()?,
            "auto" => match cuda(0) {
                Ok(device) => ("cuda:0".to_owned(), device),
                // Whoever has a stream expects the work on it.
                Err(reason) if stream.is_some() => return Err(reason),
                Err(reason) => {
                    passed_over = Some(reason);
                    cpu()?
                }
            },
            other => {
                let number = match other.strip_prefix("cuda") {
                    Some("") => Some(0),
                    Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse::<usize>().ok()),
                    None => None,
                };
                let Some(number) = number else {
                    let message = format!(
                        "expected \"cpu\", \"cuda\", \"cuda:N\" or \"auto\", got {other:?}"
                    );
                    return Err(Error::invalid("device", message));
                };
                (format!("cuda:{number}"), cuda(number)?)
            }
        };
        let EngineOptions { seed, memory_limit, log, .. } = options;
        let ranks = None;
        let engine = Self(Arc::new(Inner { device, name, seed, memory_limit, ranks, log }));
        if let Some(reason) = passed_over {
            engine.log(LogLevel::Info, || format!("device auto: the CPU, because {reason}"));
        }
        engine.log(LogLevel::Info, || match engine.backend() {
            Device::Cpu(cpu) => {
                format!("device cpu: {} threads, {} kernels", cpu.threads(), cpu.isa().name())
            }
            Device::Cuda(cuda) => format!("device {}: {}", engine.device(), cuda.description()),
        });
        Ok(engine)
    }

    /// An engine on a device that a test has made.
    #[cfg(test)]
    pub(crate) fn on(device: Device<Arc<Cpu>, Arc<Cuda>>) -> Self {
        let EngineOptions { seed, memory_limit, log, .. } = EngineOptions::default();
        let (name, ranks) = ("test".into(), None);
        Self(Arc::new(Inner { device, name, seed, memory_limit, ranks, log }))
    }

    /// The device's name: `"cpu"`, or `"cuda:0"` for the first GPU.
    pub fn device(&self) -> &str {
        &self.0.name
    }

    /// Worker threads: those of the CPU, none for a GPU.
    pub fn threads(&self) -> usize {
        match self.backend() {
            Device::Cpu(cpu) => cpu.threads(),
            Device::Cuda(_) => 0,
        }
    }

    /// The seed that models and trainers of this engine start from.
    pub fn seed(&self) -> u64 {
        self.0.seed
    }

    /// Most bytes that one model with its trainer may plan for; 0 for no limit.
    pub fn memory_limit(&self) -> u64 {
        self.0.memory_limit
    }

    /// Which rank of its group it is, from 0 on; 0 without one.
    pub fn rank(&self) -> usize {
        self.ranks().map_or(0, Ranks::rank)
    }

    /// Ranks of its group; 1 without one.
    pub fn size(&self) -> usize {
        self.ranks().map_or(1, Ranks::size)
    }

    /// Whether its group has ended, since a rank is gone or does not answer: nothing collective can be
    /// done any more.
    pub fn has_lost_its_group(&self) -> bool {
        self.ranks().is_some_and(Ranks::has_ended)
    }

    /// Whether the ranks of its group keep the optimizer's states of some tensors each
    /// ([`Group::with_sharded_states`]).
    pub fn shards_states(&self) -> bool {
        self.ranks().is_some_and(|ranks| ranks.shards_states)
    }

    /// Its group, where there are others than this one.
    pub(crate) fn ranks(&self) -> Option<&Ranks> {
        self.0.ranks.as_ref()
    }

    pub(crate) fn backend(&self) -> &Device<Arc<Cpu>, Arc<Cuda>> {
        &self.0.device
    }

    /// Bytes from `address` to the end of its allocation, if that is memory of a GPU that this
    /// engine works on.
    pub(crate) fn room_on_gpu(&self, address: *const c_void) -> Option<usize> {
        match self.backend() {
            Device::Cpu(_) => None,
            Device::Cuda(cuda) => cuda.room_at(address as u64),
        }
    }

    /// Copies from a GPU's memory, in the order of the stream.
    ///
    /// # Safety
    /// As many bytes lie at `from`, see [`Engine::room_on_gpu`].
    pub(crate) unsafe fn copy_from_gpu(&self, to: &mut [u8], from: *const c_void) -> Result<()> {
        match self.backend() {
            Device::Cpu(_) => unreachable!("no memory is that of a GPU"),
            Device::Cuda(cuda) => cuda.read(from as u64, to),
        }
    }

    /// Copies to a GPU's memory, in the order of the stream.
    ///
    /// # Safety
    /// There is room for as many bytes at `to`, see [`Engine::room_on_gpu`].
    pub(crate) unsafe fn copy_to_gpu(&self, to: *mut c_void, from: &[u8]) -> Result<()> {
        match self.backend() {
            Device::Cpu(_) => unreachable!("no memory is that of a GPU"),
            Device::Cuda(cuda) => cuda.write(to as u64, from),
        }
    }

    /// The memory of the device, which for the CPU is what the machine and the process's control
    /// groups give; [`EngineOptions::memory_limit`] narrows it. `None` where the system does not
    /// say.
    pub fn memory_room(&self) -> Option<MemoryRoom> {
        let mut room = match self.backend() {
            Device::Cpu(_) => MemoryRoom::of_host(Path::new("/"))?,
            Device::Cuda(cuda) => {
                let (available, limit) = cuda.memory()?;
                MemoryRoom {
                    limit,
                    limited_by: format!("the memory of {}", self.device()),
                    available,
                }
            }
        };
        let own = self.memory_limit();
        if own > 0 && own < room.limit {
            room.limit = own;
            room.limited_by = "the engine's memory_limit".into();
            room.available = room.available.min(own);
        }
        Some(room)
    }

    /// How much large memory the engine, and all that was made from it, has in use now and has had
    /// in use at most. Beside that there are buffers of a call, and what a GPU's driver takes.
    pub fn memory(&self) -> EngineMemory {
        let supply = on_device!(self.backend(), backend => backend.supply());
        let of = |kind, limit: Option<MemoryRoom>| {
            let [now, peak] = supply.count(kind).get();
            MemoryUse { now, peak, limit: limit.map_or(0, |room| room.limit) }
        };
        EngineMemory {
            device: of(Kind::Device, self.memory_room()),
            host: of(Kind::Host, MemoryRoom::of_host(Path::new("/"))),
        }
    }

    /// An error if `bytes` in all, of which `fresh` are still to be allocated, can never be had,
    /// above all because of the memory limit; a warning to the log if they cannot be had now.
    pub(crate) fn check_memory(&self, what: &'static str, bytes: u64, fresh: u64) -> Result<()> {
        match self.memory_limit() {
            limit if limit > 0 && bytes > limit => {
                return Err(Error::OutOfMemory {
                    what,
                    needed: bytes,
                    limit: format!("the limit is {limit}; use a smaller batch or model"),
                });
            }
            _ => {}
        }
        // A GPU's free memory is looked at by its arena.
        if let Device::Cpu(_) = self.backend()
            && let Some(room) = MemoryRoom::of_host(Path::new("/"))
            && let Some(warning) = room.check(what, bytes, fresh)?
        {
            self.log(LogLevel::Warning, || warning);
        }
        Ok(())
    }

    /// Sends a line to the log callback; `line` is not called where there is none.
    pub(crate) fn log(&self, level: LogLevel, line: impl FnOnce() -> String) {
        self.0.log(level, line);
    }
}

impl Inner {
    fn log(&self, level: LogLevel, line: impl FnOnce() -> String) {
        if let Some(log) = &self.log {
            log(level, &line());
        }
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("device", &self.device())
            .field("threads", &self.threads())
            .field("seed", &self.seed())
            .finish_non_exhaustive()
    }
}
