# Tokens to train on.

"""
    Dataset(pattern; token_type = :auto)

Opens a token file, or all that a pattern such as `"data/train_*.bin"` matches. Files are mapped, not
read. `token_type` is what a token is in a file without a header: `:u16`, `:u32`, `:i64`, `:u8` or
`:i32`; `:auto` finds out.

    Dataset(paths; token_type = :auto)

Opens a vector of token files as one dataset, in the order given.

    Dataset(tokens; copy = true)

Copies a vector of tokens, which are numbers from 0. With `copy = false` a `Vector{UInt16}` or a
`Vector{UInt32}`, or a view of a range of one, is used where it is, and read once to know the largest
token. It must then not change until the dataset is closed. Nor can it grow or shrink any more: where
Julia does not refuse that, the dataset goes on with the tokens that were.

    Dataset(fill, count; packed = false)

`count` windows that `fill(number, tokens, weights)` writes each time that one is wanted, with numbers
from 1 on. `tokens` is a `Vector{UInt32}` of `sequence_length + 1`: all but the last are what the model
reads, and each but the first is the target of the one before it. `weights` is a `Vector{Float32}` of
`sequence_length`, in which `weights[i]` is the factor of the loss of `tokens[i + 1]`, at least 0: 1 unless `fill`
changes it, and 0 for what is not to be learned, as a prompt or padding. With the `do` syntax:

    dataset = Dataset(length(examples)) do number, tokens, weights
        tokens .= examples[number].tokens
        weights .= examples[number].is_answer[2:end]
    end

With `packed = true` windows are packed with documents, which are kept apart, and `fill(number, tokens,
weights, documents)` gets one array more: a `Vector{UInt32}` of `sequence_length`, the number of the
document that each input is of, which is 0 before. Where it changes another document begins, as in
[`forward_backward!`](@ref); a window of one number is cut at the trainer's `document_end`, where there
is one. The last input of a document has the first of the next as its target: its weight is to be 0
where that is not to be learned.

Training asks for every window once in an epoch, in an order that the engine's seed gives, and an
evaluation for some spread evenly. The same number has to give the same window whenever it is asked for,
so that a run that is loaded goes on as if it had never stopped. A loss is the weighted sum over the sum
of weights of its step or evaluation; the `tokens` of an evaluation are the targets whose weight is not
0. The arrays are the library's memory, and no longer to be used when `fill` has returned. What it
throws is thrown by the call that needs the window, and an answer of `:stop` is an error with status
`MXT_ERROR_IO`; the trainer is then as before the step. Meanwhile the trainer and its model are busy, and
Ctrl-C waits for the end of the step. Several tasks that use the dataset may be in `fill` at once. Such a
dataset is empty as a vector, and [`max_token`](@ref) of it is an error.

A dataset is read like a vector: `dataset[1]`, `dataset[end]`, `dataset[11:20]`, `length(dataset)`,
`for token in dataset`. Places count from 1, as everywhere in Julia; the tokens themselves are
numbers from 0. Several files are read one after the other.
"""
mutable struct Dataset <: Handle
    handle::Ptr{Lib.mxt_dataset}
    uses::Threads.Atomic{Int}
    # What the library uses of Julia's until the object is freed: tokens, or what fills windows.
    #
    # NOTE: it does so in calls alone, which have the dataset. So it needs no `user_data_free`, which
    # Julia could not take from any thread but its own; and it does not matter in which order the
    # collector finalizes the dataset and the tokens, which may be a file that is unmapped then.
    source::Slot

    # Owns `handle` from now on.
    function Dataset(handle::Ptr{Lib.mxt_dataset}, source::Slot = Slot(nothing))
        return finalizer(close, new(handle, new_uses(), source))
    end
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

function Dataset(tokens::AbstractVector{<:Integer}; copy::Bool = true)
    copy || return lent(tokens)
    copied = c_tokens("tokens", tokens)
    return made(Dataset, Lib.mxt_dataset) do handle
        Lib.mxt_dataset_from_tokens(copied, length(copied), handle)
    end
end

# A range of tokens as they lie in memory.
const TokenRange{T} = SubArray{T,1,Vector{T},<:Tuple{AbstractUnitRange},true}

lent(tokens::Union{Vector{UInt16},TokenRange{UInt16}}) = lent(tokens, Lib.MXT_TOKEN_TYPE_U16)
lent(tokens::Union{Vector{UInt32},TokenRange{UInt32}}) = lent(tokens, Lib.MXT_TOKEN_TYPE_U32)

function lent(tokens::AbstractVector)
    wanted = "a Vector of UInt16 or UInt32, or a view of a range of one"
    throw(ArgumentError("copy: expected $wanted, to be used without a copy; got $(typeof(tokens))"))
end

function lent(tokens::AbstractVector, token_type::Int32)
    vector = tokens isa SubArray ? parent(tokens) : tokens
    # NOTE: a vector whose memory is another array's, too, does not free it when it is resized.
    source = Slot((vector, reshape(vector, length(vector), 1)))
    dataset = made(handle -> Dataset(handle, source), Lib.mxt_dataset) do handle
        Lib.mxt_dataset_from_memory(tokens, length(tokens), token_type, C_NULL, C_NULL, handle)
    end
    # NOTE: or else a thread of the library's may look for it, and read them while no call does.
    max_token(dataset)
    return dataset
end

function Dataset(fill, count::Integer; packed::Bool = false)
    windows, source = c_number(UInt64, "count", count), Slot(fill)
    return made(handle -> Dataset(handle, source), Lib.mxt_dataset) do handle
        user_data = slot_pointer(source)
        if packed
            filler = packed_window_function()
            Lib.mxt_dataset_from_packed_windows(windows, filler, user_data, C_NULL, handle)
        else
            Lib.mxt_dataset_from_windows(windows, window_function(), user_data, C_NULL, handle)
        end
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

function released(dataset::Dataset)
    dataset.source[] = nothing
    return nothing
end

Base.unsafe_convert(::Type{Ptr{Lib.mxt_dataset}}, dataset::Dataset) = dataset.handle

function Base.show(io::IO, dataset::Dataset)
    text = ask(dataset, "closed") do dataset
        tokens = Int(Lib.mxt_dataset_token_count(dataset))
        # All others have a token.
        return tokens > 0 ? "$tokens tokens" : "windows"
    end
    return print(io, "Dataset(", text, ")")
end
