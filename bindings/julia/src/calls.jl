# What every call of the library needs: errors, option structs, handles that free themselves.

"""
    MXFP4Error(status, message)

A call that failed: one of the `MXT_ERROR_` numbers of `LibMXFP4Train`, and the library's message,
which says what was expected, what came, and the fix where one is known.
"""
struct MXFP4Error <: Exception
    status::Int32
    message::String
end

function Base.showerror(io::IO, error::MXFP4Error)
    status = unsafe_string(Lib.mxt_status_string(error.status))
    return print(io, "MXFP4Error (", status, "): ", error.message)
end

# Throws what a callback has thrown during the call, else an error if the call failed.
#
# NOTE: nothing between the call and this may switch tasks, since the message belongs to the thread.
function check(status::Int32)
    thrown = take_thrown!()
    thrown === nothing || throw(something(thrown))
    status == Lib.MXT_OK || throw(MXFP4Error(status, unsafe_string(Lib.mxt_last_error())))
    return nothing
end

"""
An object of the library. A subtype has a field `handle`, which is NULL once it is closed.
"""
abstract type Handle end

Base.isopen(object::Handle) = object.handle != C_NULL

# Also the finalizer: it throws nothing and switches no task.
function Base.close(object::Handle)
    handle = object.handle
    object.handle = C_NULL
    release(handle)
    return nothing
end

# The library's defaults with `fields` of the user in place of some, and with `managed`: pointers and
# others that the package fills in.
function filled(::Type{T}, init, fields, managed = (;)) where {T}
    reference = Ref{T}()
    check(init(reference, sizeof(T)))
    defaults = reference[]
    names = fieldnames(T)
    known = filter(name -> !haskey(managed, name) && is_option(T, name), names)
    for name in keys(fields)
        name in known && continue
        throw(ArgumentError("expected options among $(join(known, ", ")), got $name"))
    end
    # The constructor converts, and refuses what does not fit.
    values = map(names) do name
        haskey(managed, name) && return managed[name]
        return get(fields, name, getfield(defaults, name))
    end
    return T(values...)
end

function is_option(::Type{T}, name::Symbol) where {T}
    return name !== :struct_size && !(fieldtype(T, name) <: Union{Ptr,Cstring})
end

# A struct for the library to fill, whose size, the first field, is set.
function sized(::Type{T}) where {T}
    reference = Ref{T}()
    GC.@preserve reference begin
        size = Ptr{Csize_t}(Base.unsafe_convert(Ptr{T}, reference))
        unsafe_store!(size, sizeof(T))
    end
    return reference
end

# A struct of the library without its size, as a named tuple.
function named(filled::T) where {T}
    names = Base.tail(fieldnames(T))
    return NamedTuple{names}(map(name -> getfield(filled, name), names))
end

# A pointer for a field of a struct. The caller preserves the text.
c_string(::Nothing) = Cstring(C_NULL)
c_string(text::String) = Base.unsafe_convert(Cstring, text)

# Text as `c_string` wants it; `nothing` is NULL.
text_or_nothing(::Nothing) = nothing
text_or_nothing(text::AbstractString) = String(text)

# Tokens as C wants them; a negative or too large number is an `InexactError`.
c_tokens(tokens::AbstractArray{<:Integer}) = convert(Vector{UInt32}, vec(tokens))
