//! `mxt_group`: the ranks that train together, and the host's two collectives.

use std::ffi::c_void;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::arguments;
use super::float_mode;
use super::guard;
use super::status::{Failure, mxt_status};
use super::structs::{self, Options, read, versioned};
use super::user_data::UserData;
use crate::{Collectives, Group, Transport, Wire};

/// Hands out and takes in blocks of `bytes_per_rank` bytes, one for each rank: block r of `send` goes
/// to rank r, and block r of `receive` came from it, this rank's own included. The buffers are
/// borrowed for the call and do not overlap. MPI_Alltoall of MPI_BYTE is one; a call has some tens
/// of MiB at most.
///
/// Returns 0 when this rank's part is done; any other number ends the group: the call that needed it
/// returns MXT_ERROR_PEER, and so does every later one, at once. It must give up by itself, by a
/// deadline or when a connection breaks, where another rank is gone.
///
/// Runs on the thread of the call that needs it. It must not throw, longjmp, or call the library.
pub type mxt_all_to_all_fn = Option<
    unsafe extern "C-unwind" fn(
        user_data: *mut c_void,
        send: *const c_void,
        receive: *mut c_void,
        bytes_per_rank: usize,
    ) -> i32,
>;

/// Gathers `bytes_per_rank` bytes of every rank: `send` of all ranks, one behind the other in their
/// order, become `receive`, this rank's own included. MPI_Allgather of MPI_BYTE is one. All else as
/// for mxt_all_to_all_fn.
pub type mxt_all_gather_fn = Option<
    unsafe extern "C-unwind" fn(
        user_data: *mut c_void,
        send: *const c_void,
        receive: *mut c_void,
        bytes_per_rank: usize,
    ) -> i32,
>;

/// This rank gives up: calls in which other ranks wait for it should fail. Called at most once, on the
/// thread of the call that failed, and nothing else is called then. It must not throw, longjmp, or
/// call the library.
pub type mxt_abort_fn = Option<unsafe extern "C-unwind" fn(user_data: *mut c_void)>;

/// Gives back what a `user_data` pointer stands for. It must not throw or longjmp.
pub type mxt_user_data_free_fn = Option<unsafe extern "C-unwind" fn(user_data: *mut c_void)>;

/// How the gradients of ranks get from GPU to GPU. It changes no bit where they are sent as f32
/// (gradient_wire). On processors they go through the callbacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_transport {
    /// As MXT_TRANSPORT_PEER where that can be, else as MXT_TRANSPORT_NCCL, else as
    /// MXT_TRANSPORT_HOST, with a warning to the log.
    Auto = 0,
    /// By the callbacks, through the memory of the host.
    Host = 1,
    /// By NCCL, of which every rank needs the same release (libnccl.so.2, 2.19 or newer), and a GPU of
    /// its own. Where it cannot be, mxt_engine_new returns MXT_ERROR_UNSUPPORTED and says why.
    Nccl = 2,
    /// In each other's memory: of at most 8 GPUs of one host that reach it (over NVLink or PCIe),
    /// each of one rank. Likewise.
    Peer = 3,
}

/// What gradients are sent as from rank to rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_wire {
    /// As they are: 4 bytes a number.
    F32 = 0,
    /// To nearest: 2 bytes.
    Bf16 = 1,
    /// E4M3 to nearest, with a scale for 32 numbers: 1.03 bytes.
    Fp8 = 2,
    /// E2M1 with a scale for 32 numbers, rotated and rounded stochastically, so that the mean is the
    /// gradient: 0.53 bytes.
    Mxfp4 = 3,
}

/// Ranks that train one model together, of which this program (or this thread of it) is one. Fill it
/// with mxt_group_init, and put it into mxt_engine_options.
///
/// Every rank computes its part of each step and has all of the model. For given `lanes` of the
/// trainer, losses, weights and files are the same bits on any number of ranks that the lanes allow.
///
/// Calls on an engine with a group, and on what is made from it, that are collective:
/// mxt_engine_new, mxt_trainer_new, _load, _load_as, _step, _step_unless_stopped, _step_tokens,
/// _update, _eval, _save and _run. All ranks make them in the same order with the same arguments,
/// but for tokens that a rank brings, and folders: rank 0 writes to its own. What fails on one
/// rank, fails on all, before anything is changed: the rank itself has its error, the others
/// MXT_ERROR_PEER with its words, or MXT_STOPPED. Ranks that do not have alike what they must get
/// MXT_ERROR_MISMATCH with what differs. What the library refuses before it begins (MXT_ERROR_NULL,
/// _STRUCT_SIZE, _BUSY, _POISONED, _INVALID_ARGUMENT of fields of this struct) the others do not
/// hear of: they wait, and the rank has to make the call again, or end. All other calls, and
/// freeing, are a rank's own, but for mxt_trainer_snapshot and mxt_snapshot_renew with
/// shard_states. One group makes one call at a time: a second thread that makes another one on the
/// same engine waits for it.
///
/// Where NCCL carries gradients, it starts threads of its own in mxt_engine_new, and takes about
/// a GiB of the GPU beside what is planned. It is given back on a thread that mxt_engine_free, or what
/// frees the last of the engine, waits half a second for.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct mxt_group {
    /// Set by mxt_group_init.
    pub struct_size: usize,
    /// Which rank this is, from 0 on. Default 0.
    pub rank: u32,
    /// How many there are. 1 (default) is no group: nothing below is used.
    pub size: u32,
    /// Called for gradients, at every step.
    pub all_to_all: mxt_all_to_all_fn,
    /// Called for all else.
    pub all_gather: mxt_all_gather_fn,
    /// Called when this rank gives up, or NULL (default).
    pub abort: mxt_abort_fn,
    /// Passed to the functions above. It must stay valid until the engine and everything made from it
    /// is freed, or until `user_data_free` is called with it.
    pub user_data: *mut c_void,
    /// Called with `user_data` exactly once for each call of mxt_engine_new that succeeds, when the
    /// library will never call the functions above again; as log_user_data_free of
    /// mxt_engine_options. Where there is one rank, that is the end of mxt_engine_new itself. NULL
    /// (default): nothing is called.
    pub user_data_free: mxt_user_data_free_fn,
    /// Longest wait for another rank where gradients go from GPU to GPU, in seconds: a GPU cannot
    /// tell a rank that is gone from one that is slow, and the callbacks show one that is gone
    /// earlier. The call returns MXT_ERROR_PEER then. At least 1. Default 600.
    pub timeout_seconds: u64,
    /// One of mxt_transport, the same on all ranks. Default MXT_TRANSPORT_AUTO.
    pub transport: i32,
    /// 1: the optimizer's states of each tensor are kept by one rank alone, which updates it and
    /// gives it to all others, so that a rank takes a part of their memory (ZeRO-1); the same on
    /// all ranks. It changes no bit. For adamw and muon without ramping; mxt_trainer_watch_updates
    /// is MXT_ERROR_INVALID_ARGUMENT then. mxt_trainer_snapshot is collective, and that of rank 0
    /// has all that there is to save. What a rank kept is lost with it, and where a group ends
    /// within a step, weights may be those of within it: go on from a checkpoint then. 0 (default):
    /// every rank keeps all.
    pub shard_states: i32,
    /// One of mxt_wire, the same on all ranks: what gradients are sent as, for links that are
    /// slower than what computes gradients. Sums are made in f32. All but MXT_WIRE_F32 change
    /// losses a little, and make their bits those of so many ranks; not with MXT_TRANSPORT_PEER,
    /// and MXT_TRANSPORT_AUTO passes over that. Default MXT_WIRE_F32.
    pub gradient_wire: i32,
    /// Must be 0.
    pub reserved: i32,
}
versioned!(mxt_group, last = reserved: i32);

impl Options for mxt_group {
    fn defaults() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            rank: 0,
            size: 1,
            all_to_all: None,
            all_gather: None,
            abort: None,
            user_data: std::ptr::null_mut(),
            user_data_free: None,
            timeout_seconds: Group::TIMEOUT.as_secs(),
            transport: mxt_transport::Auto as i32,
            shard_states: 0,
            gradient_wire: mxt_wire::F32 as i32,
            reserved: 0,
        }
    }
}

fn transport(value: i32) -> Result<Transport, Failure> {
    use mxt_transport as C;
    let all = [
        (C::Auto as i32, "MXT_TRANSPORT_AUTO", Transport::Auto),
        (C::Host as i32, "MXT_TRANSPORT_HOST", Transport::Host),
        (C::Nccl as i32, "MXT_TRANSPORT_NCCL", Transport::Nccl),
        (C::Peer as i32, "MXT_TRANSPORT_PEER", Transport::Peer),
    ];
    arguments::one_of("transport", value, &all)
}

fn wire(value: i32) -> Result<Wire, Failure> {
    use mxt_wire as C;
    let all = [
        (C::F32 as i32, "MXT_WIRE_F32", Wire::F32),
        (C::Bf16 as i32, "MXT_WIRE_BF16", Wire::Bf16),
        (C::Fp8 as i32, "MXT_WIRE_FP8", Wire::Fp8),
        (C::Mxfp4 as i32, "MXT_WIRE_MXFP4", Wire::Mxfp4),
    ];
    arguments::one_of("gradient_wire", value, &all)
}

/// Fills `group` with the defaults. `struct_size` is sizeof(mxt_group) as the caller's compiler sees
/// it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_group_init(group: *mut mxt_group, struct_size: usize) -> mxt_status {
    // SAFETY: the caller's struct has `struct_size` bytes.
    guard::function("mxt_group_init", || unsafe { structs::init(group, struct_size) })
}

/// The host's side of a group, which mxt_engine_new has not yet been given for good.
pub(super) struct Given {
    pub(super) group: Option<Group>,
    host: Option<Arc<UserData>>,
}

impl Given {
    /// # Safety
    /// `group` is NULL or points to as many bytes as its `struct_size` says.
    pub(super) unsafe fn new(group: *const mxt_group) -> Result<Self, Failure> {
        if group.is_null() {
            return Ok(Self { group: None, host: None });
        }
        // SAFETY: as promised by the caller.
        let options = unsafe { read("group", group) }?;
        let host = Arc::new(UserData::new(options.user_data, options.user_data_free));
        let (all_to_all, all_gather) = match (options.all_to_all, options.all_gather) {
            (Some(all_to_all), Some(all_gather)) => (all_to_all, all_gather),
            _ if (options.rank, options.size) == (0, 1) => {
                return Ok(Self { group: None, host: Some(host) });
            }
            _ => return Err(Failure::null("all_to_all or all_gather of the group")),
        };
        let mxt_group { rank, size, abort, .. } = options;
        if options.timeout_seconds == 0 {
            return Err(Failure::invalid("timeout_seconds", "expected at least 1, got 0"));
        }
        let timeout = Duration::from_secs(options.timeout_seconds);
        let transport = transport(options.transport)?;
        let shards_states = arguments::flag("shard_states", options.shard_states)?;
        let wire = wire(options.gradient_wire)?;
        if options.reserved != 0 {
            let message = format!("expected 0, got {}", options.reserved);
            return Err(Failure::invalid("reserved", message));
        }
        // What is no number of ranks is refused before anything is exchanged.
        let ranks = (size as usize).max(1);
        let collectives = Callbacks { host: host.clone(), ranks, all_to_all, all_gather, abort };
        let group = Group::new(rank as usize, size as usize, Box::new(collectives));
        let group = group.with_transport(transport).with_timeout(timeout);
        let group = group.with_sharded_states(shards_states).with_wire(wire);
        Ok(Self { group: Some(group), host: Some(host) })
    }

    /// The engine has it now.
    pub(super) fn keep(self) {
        if let Some(host) = self.host {
            host.keep();
        }
    }
}

type Collective =
    unsafe extern "C-unwind" fn(*mut c_void, *const c_void, *mut c_void, usize) -> i32;

struct Callbacks {
    host: Arc<UserData>,
    ranks: usize,
    all_to_all: Collective,
    all_gather: Collective,
    abort: mxt_abort_fn,
}

impl Callbacks {
    fn call(
        &self,
        (name, function): (&str, Collective),
        send: &[u8],
        receive: &mut [u8],
        bytes: usize,
    ) -> io::Result<()> {
        let (send, receive) = (send.as_ptr().cast(), receive.as_mut_ptr().cast());
        let user_data = self.host.pointer;
        // SAFETY: the header asks for a function that reads and writes as many bytes, and user data
        // that lives as long as the engine.
        match float_mode::in_hosts(|| unsafe { function(user_data, send, receive, bytes) }) {
            0 => Ok(()),
            code => Err(io::Error::other(format!("the callback {name} returned {code}"))),
        }
    }
}

impl Collectives for Callbacks {
    fn all_to_all(&mut self, send: &[u8], receive: &mut [u8]) -> io::Result<()> {
        let bytes = send.len() / self.ranks;
        self.call(("all_to_all", self.all_to_all), send, receive, bytes)
    }

    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> io::Result<()> {
        self.call(("all_gather", self.all_gather), mine, all, mine.len())
    }

    fn abort(&mut self) {
        if let Some(abort) = self.abort {
            // SAFETY: the header asks for a function that takes this pointer.
            float_mode::in_hosts(|| unsafe { abort(self.host.pointer) });
        }
    }
}
