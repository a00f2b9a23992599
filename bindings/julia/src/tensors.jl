# The weights of a model by name.

"""
    tensors(model)

The weights of a model as a dictionary from Hugging Face's names to arrays:

    weights = tensors(model)
    weights["transformer.wte.weight"]                # a copy, channels × vocabulary
    weights["transformer.ln_f.bias"] = zeros(768)    # overwrites the model's

An array has C's dimensions in reverse order: a weight that is (in, out) in the checkpoint is an
`out × in` matrix here, with no number moved.
"""
tensors(model::Model) = Tensors(model)

"""
The dictionary that [`tensors`](@ref) makes. Reading an entry copies it out of the model.
"""
struct Tensors <: AbstractDict{String,Array{Float32}}
    model::Model
    names::Vector{String}
    sizes::Dict{String,Tuple{Vararg{Int}}}

    function Tensors(model::Model)
        names = String[]
        sizes = Dict{String,Tuple{Vararg{Int}}}()
        for index in 0:(Int(Lib.mxt_model_tensor_count(model)) - 1)
            reference = sized(Lib.mxt_tensor_info)
            # The name is valid as long as the model.
            GC.@preserve model begin
                check(Lib.mxt_model_tensor_info(model, index, reference))
                info = reference[]
                name = unsafe_string(info.name)
                push!(names, name)
                sizes[name] = reverse(ntuple(i -> Int(info.shape[i]), Int(info.rank)))
            end
        end
        return new(model, names, sizes)
    end
end

function Base.getindex(weights::Tensors, name::AbstractString)
    haskey(weights, name) || throw(KeyError(name))
    values = Array{Float32}(undef, weights.sizes[name])
    check(Lib.mxt_model_tensor_read(weights.model, name, values, length(values)))
    return values
end

function Base.setindex!(weights::Tensors, values::AbstractArray{<:Real}, name::AbstractString)
    haskey(weights, name) || throw(KeyError(name))
    expected = weights.sizes[name]
    if size(values) != expected
        throw(DimensionMismatch("$name: expected size $expected, got $(size(values))"))
    end
    copied = Array{Float32}(values)
    check(Lib.mxt_model_tensor_write(weights.model, name, copied, length(copied)))
    return weights
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
