# A device with its threads, and the ranks that it trains with.

"""
    Group(rank, size; all_to_all, all_gather, abort = nothing, transport = :auto,
        timeout_seconds = 600, shard_states = false, gradient_wire = :f32)

Rank `rank`, from 0 on, of `size` ranks that train one model together, for [`Engine`](@ref): processes
on one machine or many, each with an engine of its own. Every rank computes its part of each step and
has all of the model. With the same `lanes` of the trainer, losses, weights and files are the same bits
on any number of ranks that the lanes allow.

All that ranks say to each other goes through two functions over vectors of bytes, which fill the
second vector. Every rank calls them in the same order with the same lengths.

- `all_to_all(send, receive)`: both are as many blocks of one length as there are ranks. Block r of
  `send` goes to rank r, and block r of `receive` came from it, this rank's own included.
- `all_gather(mine, all)`: `all` becomes the bytes of all ranks, one behind the other in their order.
- `abort()` is called at most once, when this rank gives up: calls in which others wait for it should
  fail.

The vectors are the library's memory, and no longer to be used after the call. A function must give up
by itself, with an exception, where another rank is gone, and must not call the library. What one
throws ends the group: the call that needed it throws that, and every later one an
[`MXFP4Error`](@ref) with status `MXT_ERROR_PEER`. One that returns `:stop` ends it, too. Ctrl-C does
not come in there, but after the step, as ever.

Making an engine or a trainer, `MXFP4Train.load(Trainer, ...)`, `MXFP4Train.save(trainer, ...)`,
[`step!`](@ref), [`update!`](@ref), [`evaluate!`](@ref) and [`run!`](@ref) are calls that all ranks make,
in the same order with the same arguments, but for tokens, of which each brings its own, and folders,
of which that of rank 0 is written to. What fails on one rank, fails on all, before anything is changed:
the others get an error with status `MXT_ERROR_PEER` and its words. An answer of `:stop` in a run, or an
exception there, ends the runs of all ranks in order.

With MPI.jl, which this package does not depend on:

    using MPI, MXFP4Train
    MPI.Init()
    comm = MPI.COMM_WORLD
    count = MPI.Comm_size(comm)
    blocks(bytes) = MPI.UBuffer(bytes, length(bytes) ÷ count)
    group = Group(
        MPI.Comm_rank(comm),
        count;
        all_to_all = (send, receive) -> MPI.Alltoall!(blocks(send), blocks(receive), comm),
        all_gather = (mine, all) -> MPI.Allgather!(mine, blocks(all), comm),
        # MPI has no other way to wake those who wait than to end them all.
        abort = () -> MPI.Abort(comm, 1),
    )
    engine = Engine(group = group)

Gradients go from GPU to GPU where these are of one host and reach each other's memory, else by NCCL
where all ranks have it, else by the functions (`transport = :auto`). `:peer`, `:nccl` and `:host` name
one of these ways, and are an error where it cannot be. A rank is waited for `timeout_seconds`
between GPUs.

With `shard_states` the optimizer's states of each tensor are kept by one rank alone, which updates it
and gives it to all others: no bit changes, and each rank takes a part of the memory of states. It is
for `adamw` and `muon`. A snapshot is made by all ranks then, and rank 0 saves it.

`gradient_wire` says what gradients are sent as, for slow links: `:f32`, `:bf16`, `:fp8`, or `:mxfp4`,
of which the mean is the gradient. All but the first change losses a little, and make their bits those
of so many ranks.

A function may wait for other tasks, so ranks can also be tasks of one process.
"""
struct Group
    rank::Int
    size::Int
    all_to_all::Any
    all_gather::Any
    abort::Any
    transport::Int32
    timeout_seconds::UInt64
    shard_states::Int32
    gradient_wire::Int32

    function Group(
        rank,
        size;
        all_to_all = nothing,
        all_gather = nothing,
        abort = nothing,
        transport = :auto,
        timeout_seconds = 600,
        shard_states::Bool = false,
        gradient_wire = :f32,
    )
        which, count = c_number(UInt32, "rank", rank), c_number(UInt32, "size", size)
        way = Int32(number_of("transport", TRANSPORTS, transport))
        wire = Int32(number_of("gradient_wire", WIRES, gradient_wire))
        seconds = c_number(UInt64, "timeout_seconds", timeout_seconds)
        return new(which, count, all_to_all, all_gather, abort, way, seconds, shard_states, wire)
    end
end

# In the order of the header.
const TRANSPORTS = (:auto, :host, :nccl, :peer)
const WIRES = (:f32, :bf16, :fp8, :mxfp4)

# The group in a slot as C has it, whose functions get the slot.
function c_group(slot::Slot)
    group = slot[]
    managed = (
        all_to_all = group.all_to_all === nothing ? C_NULL : all_to_all_function(),
        all_gather = group.all_gather === nothing ? C_NULL : all_gather_function(),
        abort = group.abort === nothing ? C_NULL : abort_function(),
        user_data = slot_pointer(slot),
    )
    ranks = (
        rank = group.rank,
        size = group.size,
        transport = group.transport,
        timeout_seconds = group.timeout_seconds,
        shard_states = group.shard_states,
        gradient_wire = group.gradient_wire,
    )
    return filled(Lib.mxt_group, Lib.mxt_group_init, ranks, managed)
end

"""
    Engine(; device = nothing, threads = 0, seed = 1337, memory_limit = 0, log = nothing,
        cuda_stream = C_NULL, group = nothing)

A device with its worker threads; everything else is made from one.

`device` is `"cpu"`, `"cuda"`, `"cuda:1"` and so on, or `"auto"`; 0 threads are one for each core;
`memory_limit` is the most bytes that one model with its trainer may take, 0 for no limit.
`log(level, line)` receives log lines, `level` being `:warning`, `:info` or `:debug`; without it the
library is silent. `cuda_stream` is the stream of a GPU on which all work is queued (a `CUstream`, such
as the `handle` of CUDA.jl's `CuStream`), which must outlive the engine and everything made from it;
without it the engine makes its own. `group` is a [`Group`](@ref) of ranks that train together, of which
this engine is one; without it the engine trains alone.
"""
mutable struct Engine <: Handle
    handle::Ptr{Lib.mxt_engine}
    uses::Threads.Atomic{Int}
    # The library may log, and call the functions of the group, until the last object that was made
    # from this engine is gone. These have the engine, so they keep these alive.
    log::Slot
    group::Slot

    function Engine(;
        device::Union{Nothing,AbstractString} = nothing,
        log = nothing,
        cuda_stream::Ptr = C_NULL,
        group::Union{Nothing,Group} = nothing,
        fields...,
    )
        # One rank of one is what the library takes for no group.
        slot, ranks = Slot(log), Slot(group === nothing ? Group(0, 1) : group)
        text, joined = text_or_nothing("device", device), Ref{Lib.mxt_group}()
        GC.@preserve slot ranks text joined begin
            joined[] = c_group(ranks)
            managed = (
                device = c_string(text),
                log = log === nothing ? C_NULL : log_function(),
                log_user_data = slot_pointer(slot),
                cuda_stream = Ptr{Cvoid}(cuda_stream),
                group = Base.unsafe_convert(Ptr{Lib.mxt_group}, joined),
            )
            how = Ref(filled(Lib.mxt_engine_options, Lib.mxt_engine_options_init, fields, managed))
            wrap = handle -> finalizer(close, new(handle, new_uses(), slot, ranks))
            return made(handle -> Lib.mxt_engine_new(how, handle), wrap, Lib.mxt_engine)
        end
    end
end

"""
    MXFP4Train.rank(engine)

Which rank of its [`Group`](@ref) an engine is, from 0 on; 0 without a group.
"""
rank(engine::Engine) = Int(ask(Lib.mxt_engine_rank, engine, 0))

"""
    MXFP4Train.ranks(engine)

How many ranks an engine's [`Group`](@ref) has; 1 without a group.
"""
ranks(engine::Engine) = Int(ask(Lib.mxt_engine_ranks, engine, 0))

"""
    MXFP4Train.memory(engine)

How much large memory an engine, and all that was made from it, has in use, in bytes, as a named tuple:
`device_bytes` (weights, gradients, states, activations, workspaces), `device_peak`, `device_limit`, and
beside them on the host `host_bytes` (snapshots), `host_peak` and `host_limit`. Limits that the system
does not say are 0.
"""
function memory(engine::Engine)
    use = sized(Lib.mxt_memory_use)
    call(() -> Lib.mxt_engine_memory(engine, use), engine)
    return named(use[])
end

release(handle::Ptr{Lib.mxt_engine}) = Lib.mxt_engine_free(handle)
Base.unsafe_convert(::Type{Ptr{Lib.mxt_engine}}, engine::Engine) = engine.handle

function Base.show(io::IO, engine::Engine)
    text = ask(engine, "closed") do engine
        device = unsafe_string(Lib.mxt_engine_device(engine))
        threads = Int(Lib.mxt_engine_threads(engine))
        return "$device, threads = $threads, seed = $(Lib.mxt_engine_seed(engine))"
    end
    return print(io, "Engine(", text, ")")
end
