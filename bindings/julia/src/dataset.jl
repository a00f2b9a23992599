# Tokens to train on.

"""
    Dataset(pattern; token_type = :auto)

Opens a token file, or all that a pattern such as `"data/train_*.bin"` matches. Files are mapped, not
read. `token_type` is what a token is in a file without a header: `:u16`, `:u32`, `:i64`, `:u8` or
`:i32`; `:auto` finds out.

    Dataset(paths; token_type = :auto)

Opens a vector of token files as one dataset, in the order given.

    Dataset(tokens)

Copies a vector of tokens, which are numbers from 0.

A dataset is read like a vector: `dataset[1]`, `dataset[end]`, `dataset[11:20]`, `length(dataset)`,
`for token in dataset`. Places count from 1, as everywhere in Julia; the tokens themselves are
numbers from 0. Several files are read one after the other.
"""
mutable struct Dataset <: Handle
    handle::Ptr{Lib.mxt_dataset}
    uses::Threads.Atomic{Int}

    # Owns `handle` from now on.
    Dataset(handle::Ptr{Lib.mxt_dataset}) = finalizer(close, new(handle, new_uses()))
end

function Dataset(pattern::AbstractString; token_type::Symbol = :auto)
    text, how = text_or_nothing("pattern", pattern), dataset_options(token_type)
    return made(Dataset, Lib.mxt_dataset) do handle
        Lib.mxt_dataset_open_with(text, how, handle)
    end
end

function Dataset(paths::AbstractVector{<:AbstractString}; token_type::Symbol = :auto)
    how = dataset_options(token_type)
    # As an array of strings, `ccall` makes C's array of pointers of it and keeps both alive.
    strings = String[text_or_nothing("paths", path) for path in paths]
    return made(Dataset, Lib.mxt_dataset) do handle
        Lib.mxt_dataset_open_files_with(strings, length(strings), how, handle)
    end
end

function Dataset(tokens::AbstractVector{<:Integer})
    copied = c_tokens("tokens", tokens)
    return made(Dataset, Lib.mxt_dataset) do handle
        Lib.mxt_dataset_from_tokens(copied, length(copied), handle)
    end
end

Base.length(dataset::Dataset) = Int(ask(Lib.mxt_dataset_token_count, dataset, 0))
Base.eltype(::Type{Dataset}) = Int
Base.firstindex(::Dataset) = 1
Base.lastindex(dataset::Dataset) = length(dataset)
Base.eachindex(dataset::Dataset) = Base.OneTo(length(dataset))
Base.keys(dataset::Dataset) = eachindex(dataset)

Base.getindex(dataset::Dataset, place::Integer) = dataset[place:place][1]
Base.getindex(dataset::Dataset, ::Colon) = dataset[eachindex(dataset)]

function Base.getindex(dataset::Dataset, places::AbstractUnitRange{<:Integer})
    isempty(places) && return Int[]
    if first(places) < 1 || last(places) > length(dataset)
        throw(BoundsError(dataset, places))
    end
    tokens = Vector{UInt32}(undef, length(places))
    call(dataset) do
        Lib.mxt_dataset_read(dataset, first(places) - 1, length(tokens), tokens)
    end
    return convert(Vector{Int}, tokens)
end

function Base.getindex(dataset::Dataset, places::AbstractVector{<:Integer})
    if eltype(places) === Bool
        throw(ArgumentError("places: expected numbers, got a mask; findall(mask) has its numbers"))
    end
    return Int[dataset[place] for place in places]
end

# The tokens that one call reads, of which the next is at `place` of `chunk`.
const CHUNK = 1 << 14

function Base.iterate(dataset::Dataset, (chunk, place, after) = (Int[], 1, 1))
    if place > length(chunk)
        chunk = dataset[after:min(after + CHUNK - 1, length(dataset))]
        isempty(chunk) && return nothing
        place, after = 1, after + length(chunk)
    end
    return chunk[place], (chunk, place + 1, after)
end

"""
    max_token(dataset)

The largest token: a model needs a `vocab_size` above it. Reads all files.
"""
function max_token(dataset::Dataset)
    token = Ref{UInt32}(0)
    call(() -> Lib.mxt_dataset_max_token(dataset, token), dataset)
    return Int(token[])
end

"""
    coverage(dataset, sequence_length)

What training with sequences of that length reads of the files, as a named tuple: `windows` of an
epoch, `files`, `short_files` (shorter than a sequence and one token, never read), `tokens`,
`short_tokens` (of those files), and the tokens of the `shortest` and the `longest` file.
"""
function coverage(dataset::Dataset, sequence_length::Integer)
    length = c_number(Csize_t, "sequence_length", sequence_length)
    counts = sized(Lib.mxt_coverage)
    call(() -> Lib.mxt_dataset_coverage(dataset, length, counts), dataset)
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
    text = ask(dataset -> "$(Int(Lib.mxt_dataset_token_count(dataset))) tokens", dataset, "closed")
    return print(io, "Dataset(", text, ")")
end
