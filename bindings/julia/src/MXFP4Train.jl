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
MXFP4Train.save(trainer, "out")    # MXFP4Train.load(Trainer, engine, "out") goes on from there
```

What holds everywhere:

- Tokens are numbers from 0 to `vocab_size - 1`, as in every file of tokens, not from 1.
- C's arrays are row-major and Julia's column-major, and nothing is transposed on the way: an array
  here has C's dimensions in reverse order. A linear layer's weight of a GPT-2, which is (in, out)
  in the checkpoint, is an `out × in` matrix in Julia, so that `weight * x .+ bias` is the layer;
  that of a Llama is (out, in) there, and the layer is `weight' * x`.
- Options are keyword arguments with the names and the defaults of the C structs.
- Numbers that come back are `Int`, `Float32` and `Float64`; tokens are `Int`.
- A call that fails throws an [`MXFP4Error`](@ref), or an `ArgumentError` that names the option. What
  a callback throws ends the run, the step, the text or the batch in order (a run still saves) and is
  thrown by the call that called back. So does Ctrl-C: it takes effect after a step.
- `close` frees an object at once; else the garbage collector does. Objects may be closed in any
  order and by any thread; one that is inside a call is freed when the call returns. A closed one
  answers with errors, and with 0 where there is nothing to fail, as `steps_done`.
- An object that is inside a call refuses others from other tasks with a busy error. Different
  objects can be used from different threads. While a step runs, Julia's garbage collector waits for
  it, and other threads may have to wait for the collector.
- Several GPUs, or machines, train one model as ranks of a [`Group`](@ref).
- `load` and `save`, `memory`, and `rank` and `ranks`, are not exported, because so many packages have functions
  of these names: write `MXFP4Train.save`, or `using MXFP4Train: load, save`.

The library is looked for at the path in the environment variable `MXFP4TRAIN_LIBRARY`, else, from
Julia 1.6 on, at the one that the preference `library` of this package names, else where the system
looks for libraries. The preference is two lines in `LocalPreferences.toml`, beside the
`Project.toml` that has MXFP4Train among its dependencies:

    [MXFP4Train]
    library = "/usr/local/lib/libmxfp4train.so.0"
"""
module MXFP4Train

using Libdl: dlopen, dlsym
using Serialization: Serialization

export Dataset, Decoder, Engine, Group, IGNORED, MXFP4Error, Model, Snapshot, Tensors, Trainer
export clear_stop, config, coverage, evaluate!, fork!, forward_backward!, generate, generate!,
    gradients, load_lora, logits, logits_from, max_token, merge_lora, next_logits, options, parameter_count, plan, renew!,
    request_stop, rewind!, run!, save_lora, scale_gradients!, schedule_start, score, set_lr!, set_schedule!,
    set_sharpness!, step!, steps, steps_done, tensor_update, tensors, tokens, update!, use_schedule!,
    watch_updates!, watch_weights!, weight_metrics, with_lora, zero_gradients!

include("LibMXFP4Train.jl")
const Lib = LibMXFP4Train

include("calls.jl")
include("callbacks.jl")
include("engine.jl")
include("model.jl")
include("decoder.jl")
include("tensors.jl")
include("dataset.jl")
include("trainer.jl")
include("batch.jl")
include("snapshot.jl")
include("files.jl")
include("run.jl")

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
    isempty(path) && (path = preferred_library())
    # A path must mean the same file when the working folder changes; a name must stay one.
    return isfile(path) ? abspath(path) : path
end

# What the preference says; where there is none, the name that the system knows the library by.
function preferred_library()
    # Julia reads preferences by itself from 1.6 on.
    isdefined(Base, :get_preferences) || return Lib.libmxfp4train
    preferences = Base.get_preferences(Base.PkgId(@__MODULE__).uuid)
    return String(get(preferences, "library", Lib.libmxfp4train))
end

function __init__()
    path = library_path()
    library = try
        dlopen(path)
    catch exception
        error(
            "expected the mxfp4train library at $(repr(path)): $(sprint(showerror, exception)); " *
            "set MXFP4TRAIN_LIBRARY to the path of libmxfp4train.so before MXFP4Train is loaded",
        )
    end
    abi = Int(ccall(dlsym(library, :mxt_abi_version), UInt32, ()))
    if abi != Lib.MXT_ABI_VERSION
        error(
            "expected a library with ABI version $(Lib.MXT_ABI_VERSION), got $abi at " *
            "$(repr(path)); install the library of this package's version",
        )
    end
    # NOTE: calls name the library by its SONAME, by which the system finds the one that is loaded.
    if dlopen(Lib.libmxfp4train; throw_error = false) != library
        error(
            "expected $(repr(path)) to be known to the system as $(Lib.libmxfp4train), but it is " *
            "not; build it as its project does, with this SONAME",
        )
    end
    return nothing
end

end
