# Tokens to train on.

"""
    Dataset(pattern)

Opens a token file, or all that a pattern such as `"data/train_*.bin"` matches. Files are mapped, not
read, and must not change while the dataset is in use.

    Dataset(paths)

Opens a vector of token files as one dataset, in the order given.

    Dataset(tokens)

Copies a vector of tokens, which are numbers from 0.

`length(dataset)` is the number of tokens.
"""
mutable struct Dataset <: Handle
    handle::Ptr{Lib.mxt_dataset}

    # Owns `handle` from now on.
    Dataset(handle::Ptr{Lib.mxt_dataset}) = finalizer(close, new(handle))
end

function Dataset(pattern::AbstractString)
    return made_dataset(handle -> Lib.mxt_dataset_open(pattern, handle))
end

function Dataset(paths::AbstractVector{<:AbstractString})
    # As an array of strings, `ccall` makes C's array of pointers of it and keeps both alive.
    strings = convert(Vector{String}, paths)
    return made_dataset() do handle
        Lib.mxt_dataset_open_files(strings, length(strings), handle)
    end
end

function Dataset(tokens::AbstractVector{<:Integer})
    copied = c_tokens(tokens)
    return made_dataset() do handle
        Lib.mxt_dataset_from_tokens(copied, length(copied), handle)
    end
end

Base.length(dataset::Dataset) = Int(Lib.mxt_dataset_token_count(dataset))

"""
    max_token(dataset)

The largest token: a model needs a `vocab_size` above it. Reads all files.
"""
function max_token(dataset::Dataset)
    token = Ref{UInt32}(0)
    check(Lib.mxt_dataset_max_token(dataset, token))
    return Int(token[])
end

release(handle::Ptr{Lib.mxt_dataset}) = Lib.mxt_dataset_free(handle)
Base.unsafe_convert(::Type{Ptr{Lib.mxt_dataset}}, dataset::Dataset) = dataset.handle

function Base.show(io::IO, dataset::Dataset)
    isopen(dataset) || return print(io, "Dataset(closed)")
    return print(io, "Dataset(", length(dataset), " tokens)")
end

# The dataset that `make(handle)` stores in the reference `handle`.
function made_dataset(make)
    handle = Ref{Ptr{Lib.mxt_dataset}}(C_NULL)
    status = make(handle)
    dataset = Dataset(handle[])
    check(status)
    return dataset
end
