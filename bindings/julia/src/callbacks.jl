# The way of a callback through C: functions without closures, whose user data is a `Callback`.

# A Julia function. The address of this object is the user data, so whoever passes it keeps it alive
# for as long as C may call.
#
# NOTE: runs and texts always have one, be it of a function that does nothing: Ctrl-C comes in here.
mutable struct Callback
    f::Any
end

const GO_ON = Int32(0)
const STOP = Int32(1)

# The key under which a task keeps what its callback has thrown.
const THROWN = :MXFP4Train_thrown

# Makes a call of the library that may call back.
#
# NOTE: Ctrl-C must not throw through the library's frames, so it waits outside of callbacks. And the
# library remembers things by thread, so a callback that waits must go on on the same thread.
function calling_back(call)
    task = current_task()
    sticky = task.sticky
    task.sticky = true
    try
        return Base.disable_sigint(call)
    finally
        task.sticky = sticky
    end
end

# Runs a callback. Whatever it throws is kept for `check`, and says stop.
function guarded(callback)
    try
        answer = Base.reenable_sigint(callback)
        # What a log callback has thrown in between is on its way, too.
        return answer === :stop || haskey(task_local_storage(), THROWN) ? STOP : GO_ON
    catch exception
        get!(task_local_storage(), THROWN, Some{Any}(exception))
        return STOP
    end
end

# What a callback of this task has thrown, in `Some`, or `nothing`.
take_thrown!() = pop!(task_local_storage(), THROWN, nothing)

function on_step(
    user_data::Ptr{Cvoid},
    step::Ptr{Lib.mxt_step_stats},
    evaluation::Ptr{Lib.mxt_eval_stats},
)::Int32
    return guarded() do
        callback = unsafe_pointer_to_objref(user_data)::Callback
        seen = evaluation == C_NULL ? nothing : named(unsafe_load(evaluation))
        callback.f(named(unsafe_load(step)), seen)
    end
end

function on_token(user_data::Ptr{Cvoid}, token::UInt32)::Int32
    return guarded() do
        callback = unsafe_pointer_to_objref(user_data)::Callback
        callback.f(token)
    end
end

function on_log(user_data::Ptr{Cvoid}, level::Int32, line::Cstring)::Cvoid
    guarded() do
        callback = unsafe_pointer_to_objref(user_data)::Callback
        callback.f(log_level(level), unsafe_string(line))
        return nothing
    end
    return nothing
end

# NOTE: not constants, since the addresses differ in every process and packages are compiled ahead.
step_function() =
    @cfunction(on_step, Int32, (Ptr{Cvoid}, Ptr{Lib.mxt_step_stats}, Ptr{Lib.mxt_eval_stats}))
token_function() = @cfunction(on_token, Int32, (Ptr{Cvoid}, UInt32))
log_function() = @cfunction(on_log, Cvoid, (Ptr{Cvoid}, Int32, Cstring))

function log_level(level::Int32)
    level == Lib.MXT_LOG_LEVEL_WARNING && return :warning
    level == Lib.MXT_LOG_LEVEL_INFO && return :info
    return :debug
end
