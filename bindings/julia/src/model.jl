# A model: making, loading, saving, sampling.

"""
    Model(engine; vocab_size = 50257, context_length = 1024, layers = 12, heads = 12, channels = 768,
        mlp_channels = 4channels, activation = :gelu_tanh, tied_head = true, scale_attention = true,
        scale_attention_by_layer = false, lora_rank = 0, lora_alpha = 0, lora_layers = LORA_LAYERS)
    Model(engine; architecture = :llama, kv_heads = heads, head_size = channels ÷ heads,
        qkv_bias = false, qk_norm = false, rope_theta = 10000, rope_scaling = :none,
        rope_factor = 1, rope_low_frequency = 1, rope_high_frequency = 4,
        rope_original_context = 8192, ...)

A model with random initial weights, drawn from the engine's seed. The defaults are GPT-2 small.
`activation` is `:gelu_tanh` or `:gelu`. With `tied_head = false` there is a tensor `lm_head.weight`.
With a `lora_rank` there are adapters, as [`with_lora`](@ref) makes them.

A Llama has RMSNorm, rotary positions, SwiGLU, and no biases; its `mlp_channels` are by default 8/3
of `channels`, rounded up to a multiple of 256. With `qkv_bias` it is a Qwen2, with `qk_norm` a
Qwen3. Pair i of a head of n channels turns by `rope_theta^(-2i / n)` a position. `rope_scaling` is
`:none`; `:linear`, which divides positions by `rope_factor`; or `:llama3`, which divides those of
pairs that turn less than `rope_low_frequency` times in `rope_original_context` positions, and
leaves those that turn more than `rope_high_frequency` times.

    Model(trainer)

The model of a trainer: not a copy, so the next step changes what it reads.
"""
mutable struct Model <: Handle
    handle::Ptr{Lib.mxt_model}
    uses::Threads.Atomic{Int}
    engine::Engine

    # Owns `handle` from now on.
    function Model(handle::Ptr{Lib.mxt_model}, engine::Engine)
        return finalizer(close, new(handle, new_uses(), engine))
    end
end

function Model(engine::Engine; fields...)
    config = Ref(model_config(; fields...))
    return made(handle -> Model(handle, engine), Lib.mxt_model, engine) do handle
        Lib.mxt_model_new(engine, config, handle)
    end
end

"""
    MXFP4Train.load(Model, engine, folder)

The model of a checkpoint folder, written by this library or by Hugging Face transformers (`gpt2`,
`llama`, `mistral`, `qwen2`, `qwen3`).
"""
function load(::Type{Model}, engine::Engine, folder::AbstractString)
    text = text_or_nothing("folder", folder)
    return made(handle -> Model(handle, engine), Lib.mxt_model, engine) do handle
        Lib.mxt_model_load(engine, text, handle)
    end
end

"""
    MXFP4Train.save(model, folder; weights = :f32)

Saves weights and configuration so that Hugging Face transformers opens the folder. A failure leaves
what was there before. `weights` is what they are stored as: `:f32`, `:f16`, `:bf16`, or `:mxfp4`,
which this library alone reads.
"""
function save(model::Model, folder::AbstractString; weights::Symbol = :f32)
    text, number = text_or_nothing("folder", folder), number_of("weights", STORED_WEIGHTS, weights)
    return call(() -> Lib.mxt_model_save_as(model, text, number), model)
end

const LORA_LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

# Linear layers as C's bits; all are 0.
function lora_bits(layers)
    bits = 0x00000000
    for layer in layers
        number = findfirst(==(layer), LORA_LAYERS)
        if number === nothing
            throw(ArgumentError("layers: expected some of $LORA_LAYERS, got $(repr(layer))"))
        end
        bits |= 0x00000001 << (number - 1)
    end
    return bits
end

"""
    with_lora(model; rank = 8, alpha = 2rank, layers = MXFP4Train.LORA_LAYERS)

A new model with the weights of `model`, which stays as it is, and adapters (LoRA) beside its linear
layers, which change nothing yet. A [`Trainer`](@ref) of it trains the adapters alone. `layers` are some
of `"attn.c_attn"`, `"attn.c_proj"`, `"mlp.c_fc"`, `"mlp.c_proj"`, of every block; in Llama's they
stand for `self_attn.qkv_proj`, `self_attn.o_proj`, `mlp.gate_up_proj`, `mlp.down_proj`. Both models
take memory.
"""
function with_lora(model::Model; rank::Integer = 8, alpha::Real = 2rank, layers = LORA_LAYERS)
    bits = lora_bits(layers)
    bits == 0 && throw(ArgumentError("layers: expected some of $LORA_LAYERS, got none"))
    return made(handle -> Model(handle, model.engine), Lib.mxt_model, model) do handle
        Lib.mxt_model_with_lora(model, rank, alpha, bits, handle)
    end
end

"""
    load_lora(model, folder)

[`with_lora`](@ref) of the adapters that PEFT or [`save_lora`](@ref) saved: LoRA of one rank, without
DoRA, biases or further modules, the same in all blocks.
"""
function load_lora(model::Model, folder::AbstractString)
    text = text_or_nothing("folder", folder)
    return made(handle -> Model(handle, model.engine), Lib.mxt_model, model) do handle
        Lib.mxt_model_load_lora(model, text, handle)
    end
end

"""
    merge_lora(model)

A new model with the adapters of `model` added to its weights.
"""
function merge_lora(model::Model)
    return made(handle -> Model(handle, model.engine), Lib.mxt_model, model) do handle
        Lib.mxt_model_merge_lora(model, handle)
    end
end

"""
    save_lora(model, folder)

Saves the adapters alone, as a folder that PEFT opens beside the model that they were made for.
"""
function save_lora(model::Model, folder::AbstractString)
    text = text_or_nothing("folder", folder)
    return call(() -> Lib.mxt_model_save_lora(model, text), model)
end

"""
    config(model)

The shape of the model, as a named tuple, of which `Model(engine; config(model)...)` makes another.
`mlp_channels`, `kv_heads` and `head_size` of 0 stand for what they are by default.
"""
function config(model::Model)
    shape = sized(Lib.mxt_model_config)
    call(() -> Lib.mxt_model_get_config(model, shape), model)
    found = named(shape[])
    return merge(found, (
        architecture = ARCHITECTURES[found.architecture + 1],
        activation = ACTIVATIONS[found.activation + 1],
        tied_head = found.tied_head != 0,
        scale_attention = found.scale_attention != 0,
        scale_attention_by_layer = found.scale_attention_by_layer != 0,
        qkv_bias = found.qkv_bias != 0,
        qk_norm = found.qk_norm != 0,
        rope_scaling = ROPE_SCALINGS[found.rope_scaling + 1],
        lora_layers = [
            layer for (i, layer) in enumerate(LORA_LAYERS) if found.lora_layers >> (i - 1) & 1 == 1
        ],
    ))
end

"""
    parameter_count(model)

The number of trained numbers.
"""
parameter_count(model::Model) = Int(ask(Lib.mxt_model_parameter_count, model, 0))

"""
    next_logits(model, tokens)

The logits of the token after `tokens`, as a vector with one for each token of the vocabulary: that
of token `t` has the index `t + 1`.
"""
function next_logits(model::Model, tokens::AbstractVector{<:Integer})
    before = c_tokens("tokens", tokens)
    logits = Vector{Float32}(undef, config(model).vocab_size)
    call(model) do
        Lib.mxt_model_next_logits(model, before, length(before), logits, length(logits))
    end
    return logits
end

"""
    score(model, texts; weights = :f32, hidden = false)

For each text, a vector of tokens, the log-probability of every token after those before it; that of
the first, before which there is none, is 0, so that the sum is that of all the rest. Texts have at most
as many tokens as the context.

With `hidden` a pair: the same, and for each text what the norm behind the last block puts out, a matrix
with a column for each token. `weights` is `:f32` or `:bf16`, which is quicker on a GPU.
"""
function score(
    model::Model,
    texts::AbstractVector{<:AbstractVector{<:Integer}};
    weights = :f32,
    hidden::Bool = false,
)
    lengths = Csize_t[length(text) for text in texts]
    tokens = c_tokens("texts", reduce(vcat, texts; init = UInt32[]))
    found = Vector{Float32}(undef, length(tokens))
    states = Matrix{Float32}(undef, hidden ? config(model).channels : 0, length(tokens))
    wanted = Int32(number_of("weights", DECODER_WEIGHTS, weights))
    call(model) do
        Lib.mxt_model_score(
            model,
            wanted,
            tokens,
            length(tokens),
            lengths,
            length(lengths),
            found,
            hidden ? pointer(states) : C_NULL,
        )
    end
    ends = cumsum(Int.(lengths))
    of_text(i) = (ends[i] - Int(lengths[i]) + 1):ends[i]
    scores = [found[of_text(i)] for i in eachindex(lengths)]
    return hidden ? (scores, [states[:, of_text(i)] for i in eachindex(lengths)]) : scores
end

"""
    generate(model, prompt; max_tokens = 256, temperature = 0.8, top_k = 0, top_p = 1, min_p = 0,
             repetition_penalty = 1, seed = 1337, stop_tokens = [], weights = :f32,
             draft = :none, draft_tokens = 0, slide = false)
    generate(f, model, prompt; ...)

A continuation of the tokens of `prompt`, without the prompt, as a `Vector{Int}`.

`temperature` divides the logits, and 0 takes the most likely token. `top_k`, `top_p` and `min_p` keep
the k most likely tokens, those that together have this probability, and those that are at least
this part as likely as the first; 0, 1 and 0 keep all. `repetition_penalty` above 1 makes tokens that
the text has less likely. The same `seed` gives the same text.

A token of `stop_tokens` ends the text and is its last token. `weights` is `:f32`, `:bf16` or
`:mxfp4`. `draft` is who guesses tokens, for several to be checked at once, which changes no text:
`:none`, `:ngram` (the text itself), `:mxfp4` (the model in MXFP4) or `:mxfp4_ngram`; `draft_tokens` is
how many at a time, 0 for as many as gain most. With `slide`, a quarter of the context falls out of a
text that exceeds it at once. `f(token)` is called for each token as it is sampled; the text ends when it returns `:stop`
(see [`run!`](@ref) for what it may return). With the `do` syntax:

    generate(model, prompt) do token
        print(Char(token))
    end
"""
generate(model::Model, prompt::AbstractVector{<:Integer}; fields...) =
    generate(do_nothing, model, prompt; fields...)

function generate(
    f,
    model::Model,
    prompt::AbstractVector{<:Integer};
    weights::Symbol = :f32,
    fields...,
)
    number = number_of("weights", DECODER_WEIGHTS, weights)
    prompt_tokens = c_tokens("prompt", prompt)
    return sampled(f, model; weights = number, fields...) do how, written
        count = length(prompt_tokens)
        Lib.mxt_model_generate(model, how, prompt_tokens, count, C_NULL, 0, written)
    end
end

# The tokens that `generate(how, written)` writes, a call of C on `object`.
function sampled(
    generate,
    f,
    object;
    stop_tokens::AbstractVector{<:Integer} = Int[],
    draft::Symbol = :none,
    slide::Bool = false,
    fields...,
)
    stops, by = c_tokens("stop_tokens", stop_tokens), number_of("draft", DRAFTS, draft)
    # Tokens are kept as they come, so memory is for what is written and not for `max_tokens`.
    tokens = Int[]
    slot = Slot(token -> f(push!(tokens, token)[end]))
    written = Ref{Csize_t}(0)
    GC.@preserve slot stops begin
        managed = (
            on_token = token_function(),
            user_data = slot_pointer(slot),
            stop_tokens = pointer(stops),
            stop_token_count = length(stops),
            draft = by,
            slide = slide,
        )
        how = Ref(filled(Lib.mxt_generate_options, Lib.mxt_generate_options_init, fields, managed))
        call(() -> generate(how, written), object)
    end
    return tokens
end

"""
    plan(engine; model = (;), trainer = (;))

The bytes that a model with its trainer will take, by purpose, before anything is allocated. The
options are those of [`Model`](@ref) and [`Trainer`](@ref), as named tuples.
"""
function plan(engine::Engine; model = (;), trainer = (;))
    shape = Ref(model_config(; model...))
    result = sized(Lib.mxt_memory_plan)
    with_trainer_options(; trainer...) do how
        call(() -> Lib.mxt_plan(engine, shape, how, result), engine)
    end
    return named(result[])
end

release(handle::Ptr{Lib.mxt_model}) = Lib.mxt_model_free(handle)
Base.unsafe_convert(::Type{Ptr{Lib.mxt_model}}, model::Model) = model.handle

function Base.show(io::IO, model::Model)
    text = ask(model -> "$(Int(Lib.mxt_model_parameter_count(model))) parameters", model, "closed")
    return print(io, "Model(", text, ")")
end

# In the order of C's numbers, from 0.
const ARCHITECTURES = (:gpt2, :llama)
const ACTIVATIONS = (:gelu_tanh, :gelu)
const ROPE_SCALINGS = (:none, :linear, :llama3)
const DECODER_WEIGHTS = (:f32, :bf16, :mxfp4)
const DRAFTS = (:none, :ngram, :mxfp4, :mxfp4_ngram)

const STORED_WEIGHTS = (:f32, :f16, :bf16, :mxfp4)

# C's number of one of `names`; `what` is the argument's name.
function number_of(what, names, name::Symbol)
    number = findfirst(==(name), names)
    if number === nothing
        throw(ArgumentError("$what: expected one of $names, got $(repr(name))"))
    end
    return number - 1
end

# The library's defaults with `fields` in place of some.
function model_config(;
    architecture::Symbol = :gpt2,
    activation::Symbol = :gelu_tanh,
    tied_head::Bool = true,
    scale_attention::Bool = true,
    scale_attention_by_layer::Bool = false,
    qkv_bias::Bool = false,
    qk_norm::Bool = false,
    rope_scaling::Symbol = :none,
    lora_layers = (),
    fields...,
)
    managed = (
        architecture = number_of("architecture", ARCHITECTURES, architecture),
        activation = number_of("activation", ACTIVATIONS, activation),
        tied_head = tied_head,
        scale_attention = scale_attention,
        scale_attention_by_layer = scale_attention_by_layer,
        qkv_bias = qkv_bias,
        qk_norm = qk_norm,
        rope_scaling = number_of("rope_scaling", ROPE_SCALINGS, rope_scaling),
        lora_layers = lora_bits(lora_layers),
    )
    return filled(Lib.mxt_model_config, Lib.mxt_model_config_init, fields, managed)
end
