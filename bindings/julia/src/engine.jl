# A device with its threads.

"""
    Engine(; device = nothing, threads = 0, seed = 1337, memory_limit = 0, log = nothing,
        cuda_stream = C_NULL)

A device with its worker threads; everything else is made from one.

`device` is `"cpu"`, `"cuda"`, `"cuda:1"` and so on, or `"auto"`; 0 threads are one for each core;
`memory_limit` is the most bytes that one model with its trainer may take, 0 for no limit.
`log(level, line)` receives log lines, `level` being `:warning`, `:info` or `:debug`; without it the
library is silent. `cuda_stream` is the stream of a GPU on which all work is queued (a `CUstream`, such
as the `handle` of CUDA.jl's `CuStream`), which must outlive the engine and everything made from it;
without it the engine makes its own.
"""
mutable struct Engine <: Handle
    handle::Ptr{Lib.mxt_engine}
    uses::Threads.Atomic{Int}
    # The library may log until the last object that was made from this engine is gone. These have
    # the engine, so they keep this alive.
    log::Slot

    function Engine(;
        device::Union{Nothing,AbstractString} = nothing,
        log = nothing,
        cuda_stream::Ptr = C_NULL,
        fields...,
    )
        slot = Slot(log)
        text = text_or_nothing("device", device)
        GC.@preserve slot text begin
            managed = (
                device = c_string(text),
                log = log === nothing ? C_NULL : log_function(),
                log_user_data = slot_pointer(slot),
                cuda_stream = Ptr{Cvoid}(cuda_stream),
            )
            how = Ref(filled(Lib.mxt_engine_options, Lib.mxt_engine_options_init, fields, managed))
            wrap = handle -> finalizer(close, new(handle, new_uses(), slot))
            return made(handle -> Lib.mxt_engine_new(how, handle), wrap, Lib.mxt_engine)
        end
    end
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
