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
    # The library may log until the last object that was made from this engine is gone. These have
    # the engine, so they keep this alive.
    log::Callback

    function Engine(;
        device::Union{Nothing,AbstractString} = nothing,
        log = nothing,
        fields...,
    )
        callback = Callback(log)
        text = text_or_nothing(device)
        handle = Ref{Ptr{Lib.mxt_engine}}(C_NULL)
        status = GC.@preserve callback text begin
            managed = (
                device = c_string(text),
                log = log === nothing ? C_NULL : log_function(),
                log_user_data = pointer_from_objref(callback),
            )
            how = Ref(filled(Lib.mxt_engine_options, Lib.mxt_engine_options_init, fields, managed))
            calling_back(() -> Lib.mxt_engine_new(how, handle))
        end
        engine = finalizer(close, new(handle[], callback))
        check(status)
        return engine
    end
end

release(handle::Ptr{Lib.mxt_engine}) = Lib.mxt_engine_free(handle)
Base.unsafe_convert(::Type{Ptr{Lib.mxt_engine}}, engine::Engine) = engine.handle

function Base.show(io::IO, engine::Engine)
    isopen(engine) || return print(io, "Engine(closed)")
    device = unsafe_string(Lib.mxt_engine_device(engine))
    threads = Int(Lib.mxt_engine_threads(engine))
    seed = Lib.mxt_engine_seed(engine)
    return print(io, "Engine(", device, ", threads = ", threads, ", seed = ", seed, ")")
end
