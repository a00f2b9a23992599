# Texts that grow: tokens in, logits out.

"""
    Decoder(model; sequences = 1, room = 0, weights = :f32, drafts = false)

Texts of a model, beside each other and empty at first, with room for `room` tokens each (0: the
model's context): tokens in, the logits of what comes next out. Keys and values of a text are kept, so
that a token takes little time. `weights` is `:f32`, `:bf16` or `:mxfp4`; `drafts` keeps them in MXFP4,
too, for drafts of [`generate!`](@ref). A decoder follows its model: where weights have been changed,
the next logits are those of the new ones.

    decoder = Decoder(model)
    append!(decoder, [1, 2, 3])
    logits(decoder)

Sequences are numbered from 1.
"""
mutable struct Decoder <: Handle
    handle::Ptr{Lib.mxt_decoder}
    uses::Threads.Atomic{Int}
    vocab_size::Int
    sequences::Int

    # Owns `handle` from now on.
    function Decoder(handle::Ptr{Lib.mxt_decoder}, vocab_size::Int, sequences::Int)
        return finalizer(close, new(handle, new_uses(), vocab_size, sequences))
    end
end

function Decoder(model::Model; weights::Symbol = :f32, drafts::Bool = false, fields...)
    managed = (weights = number_of("weights", DECODER_WEIGHTS, weights), drafts = drafts)
    init = Lib.mxt_decoder_options_init
    how = Ref(filled(Lib.mxt_decoder_options, init, fields, managed))
    vocab_size, sequences = config(model).vocab_size, julia_number(how[].sequences)
    own = handle -> Decoder(handle, vocab_size, sequences)
    return made(own, Lib.mxt_decoder, model) do handle
        Lib.mxt_decoder_new(model, how, handle)
    end
end

"""
    append!(decoder, tokens; sequence = 1)

Appends tokens to a text. They are computed when logits are asked for.
"""
function Base.append!(decoder::Decoder, tokens::AbstractVector{<:Integer}; sequence::Integer = 1)
    pushed, number = c_tokens("tokens", tokens), sequence_number(decoder, sequence)
    call(() -> Lib.mxt_decoder_push(decoder, number, pushed, length(pushed)), decoder)
    return decoder
end

"""
    logits(decoder; sequence = 1)

The logits of the token after a text, which has at least one: those of token `t` have the index
`t + 1`.
"""
function logits(decoder::Decoder; sequence::Integer = 1)
    number = sequence_number(decoder, sequence)
    found = Vector{Float32}(undef, decoder.vocab_size)
    call(() -> Lib.mxt_decoder_logits(decoder, number, found, length(found)), decoder)
    return found
end

"""
    logits(decoder, sequences)

The logits of the tokens after several different texts, a column each, for which the weights are read
once.
"""
function logits(decoder::Decoder, sequences::AbstractVector{<:Integer})
    numbers = sequence_numbers(decoder, sequences)
    found = Matrix{Float32}(undef, decoder.vocab_size, length(numbers))
    call(decoder) do
        count = length(numbers)
        Lib.mxt_decoder_logits_of(decoder, numbers, count, found, length(found))
    end
    return found
end

"""
    logits_from(decoder, from; sequence = 1)

The logits of what comes after each token of a text from number `from` on (the first is 1), a column
each: what it takes to score a text.
"""
function logits_from(decoder::Decoder, from::Integer; sequence::Integer = 1)
    number, last = sequence_number(decoder, sequence), length(tokens(decoder; sequence = sequence))
    if !(1 <= from <= last)
        throw(ArgumentError("from: expected a token of the text, from 1 to $last, got $from"))
    end
    start = convert(Csize_t, from - 1)
    found = Matrix{Float32}(undef, decoder.vocab_size, last - start)
    call(decoder) do
        Lib.mxt_decoder_logits_from(decoder, number, start, found, length(found))
    end
    return found
end

"""
    generate!(decoder; sequence = 1, ...)
    generate!(f, decoder; sequence = 1, ...)

Samples a continuation of a text, which has at least one token, appends it, and returns it as a
`Vector{Int}`. The options and `f` are those of [`generate`](@ref), but for `weights`: the decoder has
its own. Where there is no more room, the oldest tokens fall out.
"""
generate!(decoder::Decoder; fields...) = generate!(do_nothing, decoder; fields...)

function generate!(f, decoder::Decoder; sequence::Integer = 1, fields...)
    number = sequence_number(decoder, sequence)
    return sampled(f, decoder; fields...) do how, written
        Lib.mxt_decoder_generate(decoder, number, how, C_NULL, 0, written)
    end
end

"""
    rewind!(decoder, length; sequence = 1)

Takes the tokens behind the first `length` of a text out again; others can follow.
"""
function rewind!(decoder::Decoder, length::Integer; sequence::Integer = 1)
    left, number = c_number(Csize_t, "length", length), sequence_number(decoder, sequence)
    call(() -> Lib.mxt_decoder_rewind(decoder, number, left), decoder)
    return decoder
end

"""
    fork!(decoder, from, to)

Makes sequence `to` the text of sequence `from`, with what is computed of it, so that both can go on
in their own ways.
"""
function fork!(decoder::Decoder, from::Integer, to::Integer)
    source, target = sequence_number(decoder, from), sequence_number(decoder, to)
    call(() -> Lib.mxt_decoder_fork(decoder, source, target), decoder)
    return decoder
end

"""
    tokens(decoder; sequence = 1)

A text so far.
"""
function tokens(decoder::Decoder; sequence::Integer = 1)
    number, count = sequence_number(decoder, sequence), Ref{Csize_t}(0)
    call(() -> Lib.mxt_decoder_tokens(decoder, number, C_NULL, 0, count), decoder)
    found = Vector{UInt32}(undef, count[])
    call(decoder) do
        Lib.mxt_decoder_tokens(decoder, number, found, length(found), count)
    end
    return convert(Vector{Int}, found)
end

"""
    generate!(decoder, sequences; max_tokens = 256, ...)

[`generate!`](@ref) of several different texts at once, which read the weights together: a
`Vector{Int}` for each. The first has the seed of the options, each other one the next. No draft, and
no `f`.
"""
function generate!(
    decoder::Decoder,
    sequences::AbstractVector{<:Integer};
    stop_tokens::AbstractVector{<:Integer} = Int[],
    slide::Bool = false,
    fields...,
)
    numbers, stops = sequence_numbers(decoder, sequences), c_tokens("stop_tokens", stop_tokens)
    GC.@preserve stops begin
        managed = (
            stop_tokens = pointer(stops),
            stop_token_count = length(stops),
            draft = 0,
            slide = slide,
        )
        how = Ref(filled(Lib.mxt_generate_options, Lib.mxt_generate_options_init, fields, managed))
        most, count = how[].max_tokens, length(numbers)
        found, written = Matrix{UInt32}(undef, most, count), Vector{Csize_t}(undef, count)
        call(decoder) do
            Lib.mxt_decoder_generate_each(decoder, numbers, count, how, found, most, written)
        end
    end
    return [convert(Vector{Int}, found[1:written[i], i]) for i in 1:count]
end

sequence_numbers(decoder, sequences) =
    Csize_t[sequence_number(decoder, sequence) for sequence in sequences]

# As C counts them.
function sequence_number(decoder, sequence)
    if !(1 <= sequence <= decoder.sequences)
        last = decoder.sequences
        throw(ArgumentError("sequence: expected a number from 1 to $last, got $sequence"))
    end
    return convert(Csize_t, sequence - 1)
end

release(handle::Ptr{Lib.mxt_decoder}) = Lib.mxt_decoder_free(handle)
Base.unsafe_convert(::Type{Ptr{Lib.mxt_decoder}}, decoder::Decoder) = decoder.handle

function Base.show(io::IO, decoder::Decoder)
    text = isopen(decoder) ? "$(decoder.sequences) sequences" : "closed"
    return print(io, "Decoder(", text, ")")
end
