# The way of a callback through C: functions without closures, whose user data is a `Slot`.

# What C's user data points to: a place with a Julia function, or with a `Group`. Whoever passes it
# keeps it alive for as long as C may call.
#
# NOTE: C gets the address of the place, not of an object. The optimizer may keep the place itself
# on the stack, without the tag in front that says its type; what is in it is always whole.
const Slot = Base.RefValue{Any}

slot_pointer(slot::Slot) = Ptr{Cvoid}(Base.unsafe_convert(Ptr{Any}, slot))
slot_function(user_data::Ptr{Cvoid}) = unsafe_load(Ptr{Any}(user_data))
slot_group(user_data::Ptr{Cvoid}) = unsafe_load(Ptr{Any}(user_data))::Group

const GO_ON = Int32(0)
const STOP = Int32(1)

# What a callback of no interest is. NOTE: runs and texts always have one: Ctrl-C comes in there.
do_nothing(_...) = nothing

# The key under which a task keeps what its callback has thrown.
const THROWN = :MXFP4Train_thrown

# What a callback has thrown, and whether that makes the call fail, or asks it to end.
struct Thrown
    exception::Any
    fails::Bool
end

# Runs a callback. Whatever it throws is kept for `call`, and says stop.
function guarded(callback; fails = false)
    # What a log callback has thrown in between is on its way: nothing more is called.
    haskey(task_local_storage(), THROWN) && return STOP
    try
        return flow(Base.reenable_sigint(callback))
    catch exception
        task_local_storage(THROWN, Thrown(exception, fails))
        return STOP
    end
end

# Runs a function of a group, which ends where it throws, one that fills windows of a step, or one of
# a store. What it throws is kept for `call`.
#
# NOTE: nothing else ends them, since the other ranks wait for this one, and a run saves at its end,
# however it ends. Where a callback has thrown before, the call still goes to its end, and that
# exception is the one that arrives. Ctrl-C waits for a callback that can stop in order, or for the
# end of the call.
function exchanged(exchange)
    try
        return flow(exchange())
    catch exception
        thrown = task_local_storage()
        haskey(thrown, THROWN) || task_local_storage(THROWN, Thrown(exception, true))
        return STOP
    end
end

# What a callback has thrown in this task, as `Thrown`, or `nothing`.
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

function on_loss(user_data::Ptr{Cvoid}, rows::Ptr{Lib.mxt_logits})::Int32
    return guarded(; fails = true) do
        of = unsafe_load(rows)
        before, count, vocab_size = Int(of.first_row), Int(of.rows), Int(of.vocab_size)
        # A row of C is a column here. Both are C's memory, as long as the callback runs.
        logits = Base.unsafe_wrap(Matrix{Float32}, of.logits, (vocab_size, count))
        losses = Base.unsafe_wrap(Vector{Float32}, of.losses, count)
        slot_function(user_data)(logits, losses, (before + 1):(before + count))
    end
end

function on_window(
    user_data::Ptr{Cvoid},
    number::UInt64,
    tokens::Ptr{UInt32},
    weights::Ptr{Cfloat},
    sequence_length::Csize_t,
)::Int32
    return exchanged() do
        count = Int(sequence_length)
        # C's memory, as long as the callback runs.
        inputs_and_last = Base.unsafe_wrap(Vector{UInt32}, tokens, count + 1)
        factors = Base.unsafe_wrap(Vector{Float32}, weights, count)
        slot_function(user_data)(Int(number) + 1, inputs_and_last, factors)
    end
end

function on_packed_window(
    user_data::Ptr{Cvoid},
    number::UInt64,
    tokens::Ptr{UInt32},
    weights::Ptr{Cfloat},
    documents::Ptr{UInt32},
    sequence_length::Csize_t,
)::Int32
    return exchanged() do
        count = Int(sequence_length)
        # C's memory, as long as the callback runs.
        inputs_and_last = Base.unsafe_wrap(Vector{UInt32}, tokens, count + 1)
        factors = Base.unsafe_wrap(Vector{Float32}, weights, count)
        numbers = Base.unsafe_wrap(Vector{UInt32}, documents, count)
        slot_function(user_data)(Int(number) + 1, inputs_and_last, factors, numbers)
    end
end

function on_log(user_data::Ptr{Cvoid}, level::Int32, line::Cstring)::Cvoid
    guarded() do
        slot_function(user_data)(log_level(level), unsafe_string(line))
        return nothing
    end
    return nothing
end

function on_all_to_all(
    user_data::Ptr{Cvoid},
    send::Ptr{Cvoid},
    receive::Ptr{Cvoid},
    bytes_per_rank::Csize_t,
)::Int32
    return exchanged() do
        group = slot_group(user_data)
        bytes = group.size * bytes_per_rank
        group.all_to_all(bytes_at(send, bytes), bytes_at(receive, bytes))
    end
end

function on_all_gather(
    user_data::Ptr{Cvoid},
    send::Ptr{Cvoid},
    receive::Ptr{Cvoid},
    bytes_per_rank::Csize_t,
)::Int32
    return exchanged() do
        group = slot_group(user_data)
        bytes = group.size * bytes_per_rank
        group.all_gather(bytes_at(send, bytes_per_rank), bytes_at(receive, bytes))
    end
end

function on_abort(user_data::Ptr{Cvoid})::Cvoid
    exchanged(() -> slot_group(user_data).abort())
    return nothing
end

slot_store(user_data::Ptr{Cvoid}) = unsafe_load(Ptr{Any}(user_data))::StoreState
slot_file(user_data::Ptr{Cvoid}, file::Ptr{Cvoid}) = slot_store(user_data).files[UInt(file)]

function on_file_open(
    user_data::Ptr{Cvoid},
    name::Cstring,
    file::Ptr{Ptr{Cvoid}},
    size::Ptr{UInt64},
)::Int32
    is_there = Ref(false)
    failed = exchanged() do
        state = slot_store(user_data)
        opened = state.store.open(unsafe_string(name))
        opened === nothing && return nothing
        unsafe_store!(file, add!(state, opened))
        is_there[] = true
        unsafe_store!(size, UInt64(position(seekend(opened))))
        return nothing
    end
    if failed == STOP
        # C does not know of it, and closes nothing.
        is_there[] && exchanged(() -> (close_file(user_data, unsafe_load(file)); nothing))
        return Int32(-1)
    end
    return is_there[] ? GO_ON : Int32(Lib.MXT_NO_SUCH_FILE)
end

function on_file_read(
    user_data::Ptr{Cvoid},
    file::Ptr{Cvoid},
    offset::UInt64,
    to::Ptr{Cvoid},
    count::Csize_t,
)::Int32
    return exchanged() do
        opened = slot_file(user_data, file)
        seek(opened, Int(offset))
        read!(opened, bytes_at(to, Int(count)))
        return nothing
    end
end

function on_file_close(user_data::Ptr{Cvoid}, file::Ptr{Cvoid})::Int32
    return exchanged(() -> (close_file(user_data, file); nothing))
end

function close_file(user_data::Ptr{Cvoid}, file::Ptr{Cvoid})
    return close(pop!(slot_store(user_data).files, UInt(file)))
end

function on_files_begin(user_data::Ptr{Cvoid})::Int32
    return exchanged(() -> (slot_store(user_data).store.begin_save(); nothing))
end

function on_file_create(
    user_data::Ptr{Cvoid},
    name::Cstring,
    size::UInt64,
    file::Ptr{Ptr{Cvoid}},
)::Int32
    return exchanged() do
        state = slot_store(user_data)
        unsafe_store!(file, add!(state, state.store.create(unsafe_string(name), Int(size))))
        return nothing
    end
end

function on_file_write(
    user_data::Ptr{Cvoid},
    file::Ptr{Cvoid},
    from::Ptr{Cvoid},
    count::Csize_t,
)::Int32
    return exchanged() do
        written = write(slot_file(user_data, file), bytes_at(from, Int(count)))
        written == count || error("expected to write $count bytes, the IO took $written")
        return nothing
    end
end

function on_files_commit(user_data::Ptr{Cvoid})::Int32
    return exchanged(() -> (slot_store(user_data).store.commit(); nothing))
end

function on_files_abort(user_data::Ptr{Cvoid})::Cvoid
    exchanged(() -> (slot_store(user_data).store.abort(); nothing))
    return nothing
end

# C's memory, as long as the callback runs.
bytes_at(start::Ptr{Cvoid}, count) = Base.unsafe_wrap(Vector{UInt8}, Ptr{UInt8}(start), count)

# NOTE: not constants, since the addresses differ in every process and packages are compiled ahead.
step_function() =
    @cfunction(on_step, Int32, (Ptr{Cvoid}, Ptr{Lib.mxt_step_stats}, Ptr{Lib.mxt_eval_stats}))
token_function() = @cfunction(on_token, Int32, (Ptr{Cvoid}, UInt32))
loss_function() = @cfunction(on_loss, Int32, (Ptr{Cvoid}, Ptr{Lib.mxt_logits}))
window_function() =
    @cfunction(on_window, Int32, (Ptr{Cvoid}, UInt64, Ptr{UInt32}, Ptr{Cfloat}, Csize_t))
packed_window_function() = @cfunction(
    on_packed_window,
    Int32,
    (Ptr{Cvoid}, UInt64, Ptr{UInt32}, Ptr{Cfloat}, Ptr{UInt32}, Csize_t),
)
log_function() = @cfunction(on_log, Cvoid, (Ptr{Cvoid}, Int32, Cstring))
all_to_all_function() =
    @cfunction(on_all_to_all, Int32, (Ptr{Cvoid}, Ptr{Cvoid}, Ptr{Cvoid}, Csize_t))
all_gather_function() =
    @cfunction(on_all_gather, Int32, (Ptr{Cvoid}, Ptr{Cvoid}, Ptr{Cvoid}, Csize_t))
file_open_function() =
    @cfunction(on_file_open, Int32, (Ptr{Cvoid}, Cstring, Ptr{Ptr{Cvoid}}, Ptr{UInt64}))
file_read_function() =
    @cfunction(on_file_read, Int32, (Ptr{Cvoid}, Ptr{Cvoid}, UInt64, Ptr{Cvoid}, Csize_t))
file_close_function() = @cfunction(on_file_close, Int32, (Ptr{Cvoid}, Ptr{Cvoid}))
files_begin_function() = @cfunction(on_files_begin, Int32, (Ptr{Cvoid},))
file_create_function() =
    @cfunction(on_file_create, Int32, (Ptr{Cvoid}, Cstring, UInt64, Ptr{Ptr{Cvoid}}))
file_write_function() =
    @cfunction(on_file_write, Int32, (Ptr{Cvoid}, Ptr{Cvoid}, Ptr{Cvoid}, Csize_t))
files_commit_function() = @cfunction(on_files_commit, Int32, (Ptr{Cvoid},))
files_abort_function() = @cfunction(on_files_abort, Cvoid, (Ptr{Cvoid},))
abort_function() = @cfunction(on_abort, Cvoid, (Ptr{Cvoid},))

function log_level(level::Int32)
    level == Lib.MXT_LOG_LEVEL_WARNING && return :warning
    level == Lib.MXT_LOG_LEVEL_INFO && return :info
    return :debug
end
