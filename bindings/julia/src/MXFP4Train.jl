"""
Trains GPT models with the backward pass in MXFP4, by way of the C library `mxfp4train`.

```julia
using MXFP4Train

engine = Engine()
model = Model(engine; layers = 6, heads = 6, channels = 384)
dataset = Dataset("data/train.bin")
trainer = Trainer(model; recipe = "mxfp4-rht-sr", lr = 1e-3)
for stats in steps(trainer, dataset, 1000)
    println(stats.step, " ", stats.loss)
end
save(trainer, "out")    # load(Trainer, engine, "out") goes on from there
```

What holds everywhere:

- Tokens are numbers from 0 to `vocab_size - 1`, as in every file of tokens, not from 1.
- C's arrays are row-major and Julia's column-major, and nothing is transposed on the way: an array
  here has C's dimensions in reverse order. A linear layer's weight, which is (in, out) in the
  checkpoint, is an `out × in` matrix in Julia, so that `weight * x .+ bias` is the layer.
- Options are keyword arguments with the names and the defaults of the C structs.
- A call that fails throws an [`MXFP4Error`](@ref). What a callback throws ends the run or the text
  in order (a run still saves) and is thrown by the call that called back. So does Ctrl-C: it takes
  effect after a step.
- `close` frees an object at once; else the garbage collector does. Objects may be closed in any
  order, and a closed one can still be asked and answers with errors.
- An object that is inside a call refuses others from other tasks with a busy error. Different
  objects can be used from different threads. While a step runs, Julia's garbage collector waits for
  it, and other threads may have to wait for the collector.

The library is looked for at the path in the environment variable `MXFP4TRAIN_LIBRARY`, else at the
one that [`set_library!`](@ref) has stored, else where the system looks for libraries.
"""
module MXFP4Train

using Libdl: dlopen
using Preferences: @load_preference, @set_preferences!

export Dataset, Engine, MXFP4Error, Model, Tensors, Trainer
export clear_stop, config, coverage, evaluate!, generate, load, max_token, next_logits, options,
    parameter_count, plan, request_stop, run!, save, schedule_start, set_library!, set_lr!, set_schedule!, step!,
    steps, steps_done, tensors, use_schedule!

include("LibMXFP4Train.jl")
import .LibMXFP4Train as Lib

include("calls.jl")
include("callbacks.jl")
include("engine.jl")
include("model.jl")
include("tensors.jl")
include("dataset.jl")
include("trainer.jl")
include("run.jl")

"""
    set_library!(path)

Stores where the library `libmxfp4train.so` is, as a preference of the active project. It is used
when the package is loaded the next time: start Julia anew.
"""
function set_library!(path::AbstractString)
    @set_preferences!("library" => String(path))
    return nothing
end

"""
    version()

The version of the library that is loaded.
"""
version() = VersionNumber(unsafe_string(Lib.mxt_version()))

"""
    build_info()

What the loaded library's build is, as the text of a JSON object.
"""
build_info() = unsafe_string(Lib.mxt_build_info())

function library_path()
    path = get(ENV, "MXFP4TRAIN_LIBRARY", "")
    if isempty(path)
        # Where there is no preference, the name that the system knows the library by.
        path = @load_preference("library", Lib.libmxfp4train)
    end
    # A path must mean the same file when the working folder changes; a name must stay one.
    return isfile(path) ? abspath(path) : path
end

function __init__()
    path = library_path()
    try
        dlopen(path)
    catch exception
        error(
            "expected the mxfp4train library at $(repr(path)): $(sprint(showerror, exception)); " *
            "set MXFP4TRAIN_LIBRARY to the path of libmxfp4train.so, or call set_library!",
        )
    end
    Lib.use(path)
    if Lib.mxt_abi_version() != Lib.MXT_ABI_VERSION
        error(
            "expected a library with ABI version $(Lib.MXT_ABI_VERSION), got " *
            "$(Lib.mxt_abi_version()) at $(repr(path)); install the library of this package's version",
        )
    end
    return nothing
end

end
