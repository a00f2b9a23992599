# What every call of the library needs: objects that stay alive, errors, option structs.
#
# NOTE: whatever may fail goes through `call`, be it as small as it is. The library remembers its
# messages by thread and may call back, and Ctrl-C must not throw through its frames.

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

"""
An object of the library. A subtype has the fields `handle`, which is never changed, and `uses`: 2
for every call that is inside, and 1 until the object is closed.

NOTE: the library's object is freed when nothing is left of `uses`, not when `close` is called:
another task may be about to hand the pointer to the library.
"""
abstract type Handle end

# What a new object has: it is open.
new_uses() = Threads.Atomic{Int}(1)

Base.isopen(object::Handle) = isodd(object.uses[])

# Also the finalizer: it throws nothing, waits for nothing and switches no task.
function Base.close(object::Handle)
    hold(object) || return nothing
    closing(object)
    Threads.atomic_and!(object.uses, ~1)
    leave(object)
    return nothing
end

# What an object does before it is closed.
closing(::Handle) = nothing

# Keeps an object for a call, until `leave`; false if it is closed.
function hold(object::Handle)
    while true
        uses = object.uses[]
        isodd(uses) || return false
        Threads.atomic_cas!(object.uses, uses, uses + 2) == uses && return true
    end
end

function leave(object::Handle)
    Threads.atomic_sub!(object.uses, 2) == 2 || return nothing
    release(object.handle)
    released(object)
    return nothing
end

# What an object does when it is freed.
released(::Handle) = nothing

# Makes a call of the library. Throws what a callback has thrown during the call, else an error if
# `body` returns one. `objects` are those that the call uses.
function call(body, objects::Handle...)
    task = current_task()
    sticky = task.sticky
    # NOTE: a callback that waits must go on on the same thread.
    task.sticky = true
    try
        return Base.disable_sigint() do
            holding(objects) do
                status = body()
                thrown = take_thrown!()
                if status != Lib.MXT_OK
                    error = MXFP4Error(status, unsafe_string(Lib.mxt_last_error()))
                    thrown === nothing && throw(error)
                    # What failed beside it, as a run's save, is told as its cause.
                    thrown.fails || status == Lib.MXT_STOPPED || throw_behind(thrown, error)
                end
                thrown === nothing || throw(thrown.exception)
                return nothing
            end
        end
    finally
        task.sticky = sticky
    end
end

# Throws what a callback has thrown, "caused by" an error, in Julia's words.
function throw_behind(thrown, error)
    try
        throw(error)
    catch
        throw(thrown.exception)
    end
end

# Asks for what cannot fail, of an open object; `closed` is the answer of a closed one.
function ask(question, object::Handle, closed)
    return Base.disable_sigint() do
        hold(object) || return closed
        try
            return question(object)
        finally
            leave(object)
        end
    end
end

holding(body, ::Tuple{}) = body()

function holding(body, objects::Tuple)
    object = first(objects)
    if !hold(object)
        kind = nameof(typeof(object))
        throw(MXFP4Error(Lib.MXT_ERROR_NULL, "expected an open $kind, got one that is closed"))
    end
    try
        return holding(body, Base.tail(objects))
    finally
        leave(object)
    end
end

# The object that `wrap` makes of the handle that `make(reference)` stores. `objects` are those that
# the call uses.
#
# NOTE: the object is there before Ctrl-C can come, or nobody would free what the handle points to.
function made(make, wrap, ::Type{T}, objects::Handle...) where {T}
    return Base.disable_sigint() do
        handle = Ref{Ptr{T}}(C_NULL)
        call(() -> make(handle), objects...)
        return wrap(handle[])
    end
end

# Two objects with one handle would free it twice.
function Base.deepcopy_internal(object::Handle, ::IdDict)
    throw(ArgumentError("deepcopy: $(not_copied(object))"))
end

function Serialization.serialize(::Serialization.AbstractSerializer, object::Handle)
    throw(ArgumentError("serialize: $(not_copied(object))"))
end

function not_copied(object::Handle)
    kind = nameof(typeof(object))
    return "expected plain data, got a $kind, which is an object of the library and cannot be " *
           "copied; a checkpoint can: MXFP4Train.save and MXFP4Train.load"
end

# The library's defaults with `fields` of the user in place of some, and with `managed`: pointers
# and others that the package fills in.
function filled(::Type{T}, init, fields, managed = (;)) where {T}
    reference = Ref{T}()
    call(() -> init(reference, sizeof(T)))
    defaults = reference[]
    names = fieldnames(T)
    known = filter(name -> !haskey(managed, name) && is_option(T, name), names)
    for name in keys(fields)
        name in known && continue
        throw(ArgumentError("expected options among $(join(known, ", ")), got $name"))
    end
    values = map(names) do name
        haskey(managed, name) && return managed[name]
        haskey(fields, name) || return getfield(defaults, name)
        return c_number(fieldtype(T, name), name, fields[name])
    end
    return T(values...)
end

function is_option(::Type{T}, name::Symbol) where {T}
    return name !== :struct_size && !(fieldtype(T, name) <: Union{Ptr,Cstring})
end

# An option as a number of C; `what` names it in errors.
function c_number(::Type{T}, what, value) where {T<:Integer}
    if value isa Real && isinteger(value) && typemin(T) <= value <= typemax(T)
        return convert(T, value)
    end
    range = "$(Int128(typemin(T))) to $(Int128(typemax(T)))"
    throw(ArgumentError("$what: expected a whole number from $range, got $(repr(value))"))
end

function c_number(::Type{T}, what, value) where {T<:AbstractFloat}
    value isa Real && return convert(T, value)
    throw(ArgumentError("$what: expected a number, got $(repr(value))"))
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
named(filled) = fields_of(filled)

function fields_of(filled::T) where {T}
    names = Base.tail(fieldnames(T))
    return NamedTuple{names}(map(name -> julia_number(getfield(filled, name)), names))
end

# C's numbers as Julia's, since unsigned ones print as hexadecimal and wrap below 0.
#
# NOTE: an option may say "as many as there are" with a number above all of Julia's.
julia_number(value::Unsigned) = Int(min(value, UInt64(typemax(Int))))
julia_number(value::Int32) = Int(value)
julia_number(value) = value

# A pointer for a field of a struct. The caller preserves the text.
c_string(::Nothing) = Cstring(C_NULL)
c_string(text::String) = Base.unsafe_convert(Cstring, text)

# Text as `c_string` wants it; `nothing` is NULL. `what` names it in errors.
text_or_nothing(what, ::Nothing) = nothing

function text_or_nothing(what, text::AbstractString)
    if '\0' in text
        throw(ArgumentError("$what: expected text without zero characters, got $(repr(text))"))
    end
    return String(text)
end

# Tokens as C wants them, column after column.
function c_tokens(what, tokens::AbstractArray{<:Integer})
    converted = Vector{UInt32}(undef, length(tokens))
    for (place, token) in enumerate(tokens)
        if !(0 <= token <= typemax(UInt32))
            throw(ArgumentError("$what: expected tokens from 0 on, got $token at place $place"))
        end
        converted[place] = token
    end
    return converted
end
