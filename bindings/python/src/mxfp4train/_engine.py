"""A device with its threads, and the ranks that it trains with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Callable, Optional

import numpy as np

from . import _arrays as arrays
from . import _callbacks as callbacks
from ._calls import Handle, ask, call, choice, make, options, sized, text, tuple_of, whole
from ._library import ffi, lib, text_of
from ._stats import MemoryPlan, MemoryUse

# In the order of C's numbers, from 0.
TRANSPORTS = ("auto", "host", "nccl", "peer")
WIRES = ("f32", "bf16", "fp8", "mxfp4")

Exchange = Callable[[np.ndarray, np.ndarray], Any]


@dataclass(frozen=True)
class Group:
    """Rank `rank`, from 0 on, of `size` ranks that train one model together.

    They are processes on one machine or many, or threads of one, each with an engine of its own.
    Every rank computes its part of each step and has all of the model. All that they say to each
    other goes through two functions over arrays of bytes, which fill the second one:

    - `all_to_all(send, receive)`: both are `size` blocks of one length. Block r of `send` goes to
      rank r, and block r of `receive` came from it, this rank's own included.
    - `all_gather(mine, all)`: `all` becomes the bytes of all ranks, in their order.
    - `abort()` is called at most once, when this rank gives up: calls in which others wait for it
      should fail.

    With mpi4py:

        Group(comm.rank, comm.size, comm.Alltoall, comm.Allgather, lambda: comm.Abort(1))

    The arrays are the library's memory, and no longer to be used after the call: a function that
    sends later, or keeps some, needs `send.copy()`. It must give up by itself, with an exception,
    where another rank is gone, and must not call the library. What one throws ends the group: the
    call that needed it raises that, every later one PeerError.

    Making an engine or a trainer, and Trainer's load, save, step (in all its forms), update,
    evaluate and run are calls that all ranks make, in the same order with the same arguments, but
    for tokens, of which each brings its own, and folders, of which that of rank 0 is written to.
    What fails on one rank fails on all, before anything is changed.

    `transport` is "auto", "host", "nccl" or "peer"; `gradient_wire` is "f32", "bf16", "fp8" or
    "mxfp4", for slow links. With `shard_states` the optimizer's states of each tensor are kept by
    one rank alone; a snapshot is made by all ranks then. `timeout_seconds` is the longest wait
    between GPUs. None is the library's default.
    """

    rank: int
    size: int
    all_to_all: Exchange
    all_gather: Exchange
    abort: Optional[Callable[[], Any]] = None
    transport: Optional[str] = None
    timeout_seconds: Optional[int] = None
    shard_states: Optional[bool] = None
    gradient_wire: Optional[str] = None

    def _struct(self, pointer: Any) -> Any:
        given = {
            "rank": self.rank,
            "size": self.size,
            "all_to_all": callbacks.on_all_to_all,
            "all_gather": callbacks.on_all_gather,
            "abort": None if self.abort is None else callbacks.on_abort,
            "user_data": pointer,
            "user_data_free": callbacks.on_free,
            "timeout_seconds": self.timeout_seconds,
            "transport": choice("transport", TRANSPORTS, self.transport),
            "shard_states": self.shard_states,
            "gradient_wire": choice("gradient_wire", WIRES, self.gradient_wire),
        }
        return options("mxt_group", given, [])


class Engine(Handle):
    """A device with its worker threads; everything else is made from one.

    `device` is "cpu" (the default), "cuda", "cuda:1" and so on, or "auto". `threads` are at most
    1024, by default one for each core; results do not depend on them. `seed` (1337) is that of
    everything random. `memory_limit` is the most bytes that one model with its trainer may take.

    `log(level, line)` receives log lines, the level being "warning", "info" or "debug"; without it
    the library is silent. It runs on the thread that is inside the call that logs; what it raises,
    that call raises.

    `cuda_stream` is the address of a stream of the host (such as
    `torch.cuda.Stream().cuda_stream`) on which all work is queued; it must outlive the engine and
    everything made from it. It is not 0, CUDA's default stream. `group` are the ranks that train
    together.

    `allocate(bytes, alignment)` gives large memory of the host, such as weights on the CPU, as an
    address, or None where there is none; `deallocate(address, bytes, alignment)` takes it back.
    They must not use the library.

    Raises InvalidArgument, Unsupported (a device that is not there, with what to install),
    OutOfMemory, DeviceError; with a group Mismatch and PeerError.
    """

    _place: arrays.Place
    _ranks: int

    def __init__(
        self,
        *,
        device: str | None = None,
        threads: int | None = None,
        seed: int | None = None,
        memory_limit: int | None = None,
        log: Callable[[str, str], Any] | None = None,
        cuda_stream: int | None = None,
        group: Group | None = None,
        allocate: Callable[[int, int], int | None] | None = None,
        deallocate: Callable[[int, int, int], Any] | None = None,
    ) -> None:
        lent: list[callbacks.Owned] = []
        pointers: list[Any] = []
        keep: list[Any] = []
        stream = None if cuda_stream is None else whole("cuda_stream", cuda_stream, "uintptr_t")
        if stream == 0:
            # NOTE: C makes a stream of its own then, which does not wait for the default one.
            raise ValueError(
                "cuda_stream: expected the address of a stream, got 0, which is CUDA's default; "
                "make another, as torch.cuda.Stream() does"
            )
        given: dict[str, Any] = {
            "device": text("device", device),
            "threads": threads,
            "seed": seed,
            "memory_limit": memory_limit,
        }
        if log is not None:
            lent.append(callbacks.Owned(log))
            pointers.append(lent[-1].pointer())
            given["log"] = callbacks.on_log
            given["log_user_data"] = pointers[-1]
            given["log_user_data_free"] = callbacks.on_free
        if stream is not None:
            given["cuda_stream"] = ffi.cast("void *", stream)
        if group is not None:
            lent.append(callbacks.Owned(group))
            pointers.append(lent[-1].pointer())
            given["group"] = group._struct(pointers[-1])
        if (allocate is None) != (deallocate is None):
            raise TypeError("expected both of allocate and deallocate, or none, got one")
        if allocate is not None:
            # NOTE: until the last memory is given back, also by what Python's collector frees.
            pointers.append(callbacks.pointer_to((allocate, deallocate)))
            given["allocate"] = callbacks.on_allocate
            given["deallocate"] = callbacks.on_deallocate
            given["allocator_user_data"] = pointers[-1]
            given["allocator_user_data_free"] = callbacks.on_free
        struct = options("mxt_engine_options", given, keep)
        # The library calls these until the last object that was made from the engine is gone.
        # Each of those has them.
        self._lent = tuple(lent)
        with callbacks.lending(*pointers):
            self._own(make("engine", lib.mxt_engine_new, struct))
        self._place = arrays.Place(text_of(ask(lib.mxt_engine_device, self, ffi.NULL)), stream)
        self._ranks = ask(lib.mxt_engine_ranks, self, 0)

    @property
    def device(self) -> str:
        """The name of the device: "cpu", or "cuda:0" for the first GPU."""
        return self._place.device

    @property
    def threads(self) -> int:
        """Number of worker threads, 0 for a GPU and of a closed engine."""
        return ask(lib.mxt_engine_threads, self, 0)

    @property
    def seed(self) -> int:
        """The seed that models and trainers start from."""
        return ask(lib.mxt_engine_seed, self, 0)

    @property
    def rank(self) -> int:
        """Which rank of its group it is, from 0 on."""
        return ask(lib.mxt_engine_rank, self, 0)

    @property
    def ranks(self) -> int:
        """How many ranks its group has; 1 without a group."""
        return ask(lib.mxt_engine_ranks, self, 0)

    def memory(self) -> MemoryUse:
        """How much large memory is in use, by the engine and all that was made from it."""
        memory = sized("mxt_memory_use")
        call(lib.mxt_engine_memory, self, memory)
        return tuple_of(MemoryUse, memory)

    def plan(
        self, model: Mapping[str, Any] | None = None, trainer: Mapping[str, Any] | None = None
    ) -> MemoryPlan:
        """The bytes that a model with its trainer will take, before anything is allocated.

        `model` and `trainer` are keyword arguments of `Model` and `Trainer`.
        """
        from ._model import config_struct
        from ._trainer import options_struct

        keep: list[Any] = []
        plan = sized("mxt_memory_plan")
        shape = config_struct(**(model or {}))
        call(lib.mxt_plan, self, shape, options_struct(keep, **(trainer or {})), plan)
        return tuple_of(MemoryPlan, plan)

    def _description(self) -> str:
        return f" on {self.device}, {self.threads} threads, seed {self.seed}"
