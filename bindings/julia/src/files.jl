# Checkpoints without a folder: in a dictionary, or wherever a program keeps its files.

"""
    MXFP4Train.FileStore(; open, create, commit, abort, begin_save = () -> nothing)

A program's own place for the files of a checkpoint, which [`MXFP4Train.save`](@ref) and
[`MXFP4Train.load`](@ref) take in place of a folder, as they take an `AbstractDict` of names and
vectors of bytes.

- `open(name)` is an `IO` that can be read and seeked, or `nothing` where there is no such file.
- `begin_save()` begins a save.
- `create(name, size)` is an `IO` to which so many bytes are going to be written, from the first to
  the last. It is closed before the next one is made.
- `commit()` is called when all files are written: they take the place of those of the save before.
  A `"trainer.json"` or `"trainer.safetensors"` that was not written, as with a model, is gone.
- `abort()` is called in its place where anything failed: the files are what they were before.

What one of them, or an `IO`, throws is thrown by the call that loads or saves. Meanwhile the
trainer and its model are busy.
"""
struct FileStore
    open::Any
    begin_save::Any
    create::Any
    commit::Any
    abort::Any

    function FileStore(; open, create, commit, abort, begin_save = () -> nothing)
        return new(open, begin_save, create, commit, abort)
    end
end

# A store with the files of it that are open, by the numbers that C has in place of pointers.
mutable struct StoreState
    store::FileStore
    files::Dict{UInt,Any}
    last::UInt

    StoreState(store::FileStore) = new(store, Dict{UInt,Any}(), 0)
end

function add!(state::StoreState, file)
    state.last += 1
    state.files[state.last] = file
    return Ptr{Cvoid}(state.last)
end

# Where a checkpoint is, if not in a folder.
const FilePlace = Union{AbstractDict,FileStore}

# The library's files, for a call.
mutable struct Files <: Handle
    handle::Ptr{Lib.mxt_files}
    uses::Threads.Atomic{Int}
    # What the library calls, or reads, until the object is freed.
    source::Slot

    function Files(handle::Ptr{Lib.mxt_files}, source::Slot)
        return finalizer(close, new(handle, new_uses(), source))
    end
end

function Files(store::FileStore)
    source = Slot(StoreState(store))
    managed = (
        user_data = slot_pointer(source),
        open = file_open_function(),
        read = file_read_function(),
        close = file_close_function(),
        begin_ = files_begin_function(),
        create = file_create_function(),
        write = file_write_function(),
        commit = files_commit_function(),
        abort = files_abort_function(),
    )
    how = filled(Lib.mxt_file_callbacks, Lib.mxt_file_callbacks_init, (;), managed)
    callbacks = Ref(how)
    return made(handle -> Files(handle, source), Lib.mxt_files) do handle
        Lib.mxt_files_from_callbacks(callbacks, handle)
    end
end

# Of a dictionary, to load from: its bytes are not copied.
function Files(files::AbstractDict)
    content = [(file_name(name), convert(Vector{UInt8}, bytes)) for (name, bytes) in files]
    source = Slot(content)
    memory = made(handle -> Files(handle, source), Lib.mxt_files) do handle
        Lib.mxt_files_in_memory(handle)
    end
    for (name, bytes) in content
        call(memory) do
            Lib.mxt_files_lend(memory, name, bytes, length(bytes), C_NULL, C_NULL)
        end
    end
    return memory
end

function file_name(name)
    name isa AbstractString && return text_or_nothing("files", name)
    throw(ArgumentError("files: expected names as keys, got $(repr(name))"))
end

# Runs `body` with files.
function with_files(body, files::Files)
    try
        return body(files)
    finally
        close(files)
    end
end

load_with(body, place::FilePlace) = with_files(body, Files(place))
save_with(body, place::FilePlace) = with_files(body, Files(store_of(place)))

store_of(store::FileStore) = store

# A dictionary that changes when all is written.
function store_of(files::AbstractDict)
    fresh = Dict{String,Written}()
    return FileStore(
        open = function (name)
            return haskey(files, name) ? IOBuffer(convert(Vector{UInt8}, files[name])) : nothing
        end,
        begin_save = () -> empty!(fresh),
        create = (name, size) -> (fresh[name] = Written(sizehint!(UInt8[], size))),
        commit = function ()
            checkpoint = ("config.json", "model.safetensors", "trainer.json", "trainer.safetensors")
            # Of a checkpoint before, nothing stays beside one; adapters are none.
            if haskey(fresh, "config.json")
                for name in checkpoint
                    delete!(files, name)
                end
            end
            for (name, file) in fresh
                files[name] = file.bytes
            end
            return empty!(fresh)
        end,
        abort = () -> empty!(fresh),
    )
end

# What is written to it, also when it is closed.
struct Written <: IO
    bytes::Vector{UInt8}
end

function Base.unsafe_write(io::Written, from::Ptr{UInt8}, count::UInt)
    append!(io.bytes, Base.unsafe_wrap(Vector{UInt8}, from, count))
    return Int(count)
end

Base.close(::Written) = nothing

"""
    MXFP4Train.load(Model, engine, files)

The model of a dictionary of names and bytes, or of a [`MXFP4Train.FileStore`](@ref).
"""
function load(::Type{Model}, engine::Engine, place::FilePlace)
    return load_with(place) do files
        return made(handle -> Model(handle, engine), Lib.mxt_model, engine, files) do handle
            Lib.mxt_model_load_from(engine, files, handle)
        end
    end
end

"""
    MXFP4Train.save(model, files; weights = :f32)

Saves a model to a dictionary of names and bytes, or to a [`MXFP4Train.FileStore`](@ref).
"""
function save(model::Model, place::FilePlace; weights::Symbol = :f32)
    number = number_of("weights", STORED_WEIGHTS, weights)
    return save_with(place) do files
        call(() -> Lib.mxt_model_save_to(model, files, number), model, files)
    end
end

"""
    load_lora(model, files)

[`load_lora`](@ref) of a dictionary of names and bytes, or of a [`MXFP4Train.FileStore`](@ref).
"""
function load_lora(model::Model, place::FilePlace)
    return load_with(place) do files
        return made(handle -> Model(handle, model.engine), Lib.mxt_model, model, files) do handle
            Lib.mxt_model_load_lora_from(model, files, handle)
        end
    end
end

"""
    save_lora(model, files)

[`save_lora`](@ref) to a dictionary of names and bytes, or to a [`MXFP4Train.FileStore`](@ref).
"""
function save_lora(model::Model, place::FilePlace)
    return save_with(place) do files
        call(() -> Lib.mxt_model_save_lora_to(model, files), model, files)
    end
end

"""
    MXFP4Train.load(Trainer, engine, files; optimizer = nothing)

Loads a trainer from a dictionary of names and bytes, or from a [`MXFP4Train.FileStore`](@ref).
"""
function load(
    ::Type{Trainer},
    engine::Engine,
    place::FilePlace;
    optimizer::Union{Nothing,AbstractString} = nothing,
)
    mover = text_or_nothing("optimizer", optimizer)
    return load_with(place) do files
        return made(handle -> Trainer(handle, engine), Lib.mxt_trainer, engine, files) do handle
            text = mover === nothing ? Cstring(C_NULL) : mover
            Lib.mxt_trainer_load_from(engine, files, text, handle)
        end
    end
end

"""
    MXFP4Train.save(trainer, files)
    MXFP4Train.save(snapshot, files)

Saves a trainer, or what it was, to a dictionary of names and bytes, or to a
[`MXFP4Train.FileStore`](@ref). The bytes are those of the files of a folder. A dictionary changes
when all is written.
"""
function save(trainer::Trainer, place::FilePlace)
    return save_with(place) do files
        call(() -> Lib.mxt_trainer_save_to(trainer, files), trainer, files)
    end
end

function save(snapshot::Snapshot, place::FilePlace)
    return save_with(place) do files
        call(() -> Lib.mxt_snapshot_save_to(snapshot, files), snapshot, files)
    end
end

release(handle::Ptr{Lib.mxt_files}) = Lib.mxt_files_free(handle)
Base.unsafe_convert(::Type{Ptr{Lib.mxt_files}}, files::Files) = files.handle
