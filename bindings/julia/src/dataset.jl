# Tokens to train on.

"""
    Dataset(pattern; token_type = :auto)

Opens a token file, or all that a pattern such as `"data/train_*.bin"` matches. Files are mapped, not
read, and must not change while the dataset is in use. `token_type` is what a token is in a file
without a header: `:u16`, `:u32`, `:i64`, `:u8` or `:i32`; `:auto` finds out.

    Dataset(paths; token_type = :auto)

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

function Dataset(pattern::AbstractString; token_type::Symbol = :auto)
    how = dataset_options(token_type)
    return made_dataset(handle -> Lib.mxt_dataset_open_with(pattern, how, handle))
end

function Dataset(paths::AbstractVector{<:AbstractString}; token_type::Symbol = :auto)
    how = dataset_options(token_type)
    # As an array of strings, `ccall` makes C's array of pointers of it and keeps both alive.
    strings = convert(Vector{String}, paths)
    return made_dataset() do handle
        Lib.mxt_dataset_open_files_with(strings, length(strings), how, handle)
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

"""
    coverage(dataset, sequence_length)

What training with sequences of that length reads of the files, as a named tuple: `windows` of an
epoch, `files`, `short_files` (shorter than a sequence and one token, never read), `tokens`,
`short_tokens` (of those files), and the tokens of the `shortest` and the `longest` file.
"""
function coverage(dataset::Dataset, sequence_length::Integer)
    counts = sized(Lib.mxt_coverage)
    check(Lib.mxt_dataset_coverage(dataset, sequence_length, counts))
    return named(counts[])
end

# In the order of `mxt_token_type`.
const TOKEN_TYPES = (:auto, :u16, :u32, :i64, :u8, :i32)

function dataset_options(token_type::Symbol)
    number = findfirst(==(token_type), TOKEN_TYPES)
    if number === nothing
        throw(ArgumentError("token_type: expected one of $TOKEN_TYPES, got $(repr(token_type))"))
    end
    managed = (token_type = number - 1,)
    return Ref(filled(Lib.mxt_dataset_options, Lib.mxt_dataset_options_init, (;), managed))
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
