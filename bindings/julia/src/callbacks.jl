# The way of a callback through C: functions without closures, whose user data is a `Slot`.

# What C's user data points to: a place with a Julia function. Whoever passes it keeps it alive for
# as long as C may call.
#
# NOTE: C gets the address of the place, not of an object. The optimizer may keep the place itself
# on the stack, without the tag in front that says its type; the function in it is always whole.
const Slot = Base.RefValue{Any}

slot_pointer(slot::Slot) = Ptr{Cvoid}(Base.unsafe_convert(Ptr{Any}, slot))
slot_function(user_data::Ptr{Cvoid}) = unsafe_load(Ptr{Any}(user_data))

const GO_ON = Int32(0)
const STOP = Int32(1)

# What a callback of no interest is. NOTE: runs and texts always have one: Ctrl-C comes in there.
do_nothing(_...) = nothing

# The key under which a task keeps what its callback has thrown.
const THROWN = :MXFP4Train_thrown

# Runs a callback. Whatever it throws is kept for `call`, and says stop.
function guarded(callback)
    # What a log callback has thrown in between is on its way: nothing more is called.
    haskey(task_local_storage(), THROWN) && return STOP
    try
        return flow(Base.reenable_sigint(callback))
    catch exception
        task_local_storage(THROWN, Some{Any}(exception))
        return STOP
    end
end

# What a callback has thrown in this task, in `Some`, or `nothing`.
take_thrown!() = pop!(task_local_storage(), THROWN, nothing)

# NOTE: `false` goes on, too. A callback often ends with `step.step % 10 == 0 && println(step)`,
# which is `false` nine times of ten and asks for nothing; and elsewhere it is `true` that stops.
flow(_) = GO_ON

function flow(answer::Symbol)
    answer === :stop && return STOP
    answer === :go_on && return GO_ON
    throw(ArgumentError("callback: expected :stop, or anything else but a symbol, got :$answer"))
end

function on_step(
    user_data::Ptr{Cvoid},
    step::Ptr{Lib.mxt_step_stats},
    evaluation::Ptr{Lib.mxt_eval_stats},
)::Int32
    return guarded() do
        seen = evaluation == C_NULL ? nothing : named(unsafe_load(evaluation))
        slot_function(user_data)(named(unsafe_load(step)), seen)
    end
end

function on_token(user_data::Ptr{Cvoid}, token::UInt32)::Int32
    return guarded(() -> slot_function(user_data)(Int(token)))
end

function on_log(user_data::Ptr{Cvoid}, level::Int32, line::Cstring)::Cvoid
    guarded() do
        slot_function(user_data)(log_level(level), unsafe_string(line))
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
