# The weights of a model by name, and what else has a number for each of them.

"""
    tensors(model)

The weights of a model as a dictionary from Hugging Face's names to arrays:

    weights = tensors(model)
    weights["transformer.wte.weight"]                # a copy, channels × vocabulary
    weights["transformer.ln_f.bias"] = zeros(768)    # overwrites the model's
    weights["transformer.ln_f.weight"] .*= 2         # so does this

What is read is an array of its own, so changing a number of it changes the array and not the model.
Change it as often as you like and assign it once:

    values = weights["transformer.wpe.weight"]
    values[:, 1] .= 0
    weights["transformer.wpe.weight"] = values

An array has C's dimensions in reverse order: a weight that is (in, out) in the checkpoint is an
`out × in` matrix here, with no number moved; those of a Llama, (out, in) there, are `in × out`.

`self_attn.qkv_proj` of Llama's blocks has what files have as `q_proj`, `k_proj` and `v_proj`, one
behind the other in the last dimension, and `mlp.gate_up_proj` has `gate_proj` and `up_proj`. These
names have values, too, and are not among the `keys`.
"""
tensors(model::Model) = Tensors(model, model)

"""
The dictionary that [`tensors`](@ref) and [`gradients`](@ref) make. Reading an entry copies it.
"""
struct Tensors <: AbstractDict{String,Array{Float32}}
    # What has the values, for `read_values` and `write_values`.
    source::Handle
    names::Vector{String}
    sizes::Dict{String,Tuple{Vararg{Int}}}

    # Values of `source` for the tensors of `model`.
    function Tensors(source::Handle, model::Model)
        names = String[]
        sizes = Dict{String,Tuple{Vararg{Int}}}()
        for index in 0:(Int(ask(Lib.mxt_model_tensor_count, model, 0)) - 1)
            info = sized(Lib.mxt_tensor_info)
            name = Ref("")
            call(model) do
                status = Lib.mxt_model_tensor_info(model, index, info)
                # The text is valid as long as the model, so it is copied while that is held.
                status == Lib.MXT_OK && (name[] = unsafe_string(info[].name))
                return status
            end
            has_values(source, name[]) || continue
            shape = info[].shape
            push!(names, name[])
            sizes[name[]] = reverse(ntuple(i -> Int(shape[i]), Int(info[].rank)))
            add_parts!(sizes, model, name[])
        end
        return new(source, names, sizes)
    end
end

# Sizes of what files have in place of a tensor of Llama's blocks.
function add_parts!(sizes, model::Model, name)
    for whole in ("self_attn.qkv_proj.", "mlp.gate_up_proj.")
        at = findfirst(whole, name)
        at === nothing && continue
        before, kind = name[1:(first(at) - 1)], name[(last(at) + 1):end]
        kind == "weight" || kind == "bias" || continue
        all, parts = parts_of(whole, config(model))
        for (part, share) in parts
            inner, rows = Base.front(sizes[name]), sizes[name][end]
            sizes["$before$part$kind"] = (inner..., rows ÷ all * share)
        end
    end
    return sizes
end

# In how many equal shares its rows fall, and how many of them each part has.
function parts_of(whole, shape)
    if whole == "mlp.gate_up_proj."
        return 2, ("mlp.gate_proj." => 1, "mlp.up_proj." => 1)
    end
    q, kv = shape.heads, shape.kv_heads == 0 ? shape.heads : shape.kv_heads
    names = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
    return q + 2kv, (names[1] => q, names[2] => kv, names[3] => kv)
end

has_values(::Model, name) = true

function Base.getindex(weights::Tensors, name::AbstractString)
    haskey(weights, name) || throw(KeyError(name))
    values = Array{Float32}(undef, weights.sizes[name])
    read_values(weights.source, name, values)
    return values
end

function Base.setindex!(weights::Tensors, values::AbstractArray{<:Real}, name::AbstractString)
    haskey(weights, name) || throw(KeyError(name))
    expected = weights.sizes[name]
    if size(values) != expected
        throw(DimensionMismatch("$name: expected size $expected, got $(size(values))"))
    end
    write_values(weights.source, name, Array{Float32}(values))
    return weights
end

function read_values(model::Model, name::AbstractString, values::Array{Float32})
    return call(() -> Lib.mxt_model_tensor_read(model, name, values, length(values)), model)
end

function write_values(model::Model, name::AbstractString, values::Array{Float32})
    return call(() -> Lib.mxt_model_tensor_write(model, name, values, length(values)), model)
end

function Base.setindex!(::Tensors, value, name::AbstractString)
    throw(
        ArgumentError(
            "$name: expected an array of real numbers, got $(typeof(value)); " *
            "weights[name] .= value writes it to all places",
        ),
    )
end

# What is on the left of `weights[name] .= values`.
struct Entry
    weights::Tensors
    name::String
end

function Base.dotview(weights::Tensors, name::AbstractString)
    haskey(weights, name) || throw(KeyError(name))
    return Entry(weights, name)
end

Base.materialize!(entry::Entry, values::Base.Broadcast.Broadcasted) = write_entry(entry, values)
Base.materialize!(entry::Entry, values) = write_entry(entry, values)

function write_entry(entry::Entry, values)
    # NOTE: not what is there, so that nothing is read: all of it is overwritten.
    filled = Array{Float32}(undef, entry.weights.sizes[entry.name])
    entry.weights[entry.name] = Base.materialize!(filled, values)
    return values
end

function Base.get(weights::Tensors, name, default)
    return haskey(weights, name) ? weights[name] : default
end

function Base.iterate(weights::Tensors, index = 1)
    index > length(weights) && return nothing
    name = weights.names[index]
    return (name => weights[name], index + 1)
end

Base.length(weights::Tensors) = length(weights.names)
Base.haskey(weights::Tensors, name) = haskey(weights.sizes, name)
# In the order of the model, and without reading the values.
Base.keys(weights::Tensors) = weights.names

function Base.show(io::IO, ::MIME"text/plain", weights::Tensors)
    print(io, "Tensors with ", length(weights), " entries:")
    for name in weights.names
        print(io, "\n  ", name, "  ", join(weights.sizes[name], '×'))
    end
    return nothing
end

Base.show(io::IO, weights::Tensors) = print(io, "Tensors(", length(weights), " entries)")
