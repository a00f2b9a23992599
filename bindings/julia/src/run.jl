# Many steps in one call.

"""
    run!(trainer, dataset; steps, eval_dataset = nothing, eval_every = 0, eval_batches = 20,
         save_dir = nothing, save_every = 0, save_files = nothing)
    run!(f, trainer, dataset; ...)

Does `steps` steps with evaluations and checkpoints.

`f(step, evaluation)` is called after each step with what `step!` gives, and with what `evaluate!`
gives or `nothing` if the step was followed by no evaluation. It may use the trainer: evaluate,
save, generate, even close it. With the `do` syntax:

    run!(trainer, dataset; steps = 1000, save_dir = "out") do step, evaluation
        step.step % 100 == 0 && println(step.loss)
        step.loss < 1 && return :stop
    end

The run ends when `f` returns `:stop`. Anything else goes on, `false` too, which is what the last
line above is as long as the loss is high. But another symbol than `:stop` and `:go_on` is taken for
a mistake and is an error.

With `eval_dataset` the run evaluates whenever the number of steps done is a multiple of
`eval_every`, and after the last step; with `save_dir` it saves likewise by `save_every`, and at its
end, however it ends. In its place `save_files` is a dictionary of names and bytes, or a
[`MXFP4Train.FileStore`](@ref); what one throws ends the run, too.

An evaluation or a save that fails does not end the run: the log gets a warning, and the next one is
tried when it is due. Where the last one of its kind fails, `run!` throws that error at its end; what
`f` throws goes before it, and has it as its cause.

Ctrl-C ends the run after the step that it is in: the run saves, then throws an
`InterruptException`. It does so in a script, too, which Julia otherwise ends at once at Ctrl-C; a
script that has called `Base.exit_on_sigint` itself calls it again after a run. Julia hands Ctrl-C to
whatever task its first thread is at: where that is not the run's, catch the exception there and call
[`request_stop`](@ref).

Returns a named tuple: `steps`, `tokens` and `seconds` of this call, `last_loss` and
`last_eval_loss` (NaN if there was none), `ended` (`:finished`, `:callback` or `:request`), `saved`,
whether `save_dir` or `save_files` holds the trainer as it is now, and `eval_errors` and `save_errors`, how many of
them failed.
"""
run!(trainer::Trainer, dataset::Dataset; fields...) = run!(do_nothing, trainer, dataset; fields...)

function run!(
    f,
    trainer::Trainer,
    dataset::Dataset;
    steps = nothing,
    eval_dataset::Union{Nothing,Dataset} = nothing,
    save_dir::Union{Nothing,AbstractString} = nothing,
    save_files::Union{Nothing,FilePlace} = nothing,
    fields...,
)
    if steps === nothing
        throw(ArgumentError("steps: expected the number of steps to do, got none"))
    end
    slot = Slot(f)
    text = text_or_nothing("save_dir", save_dir)
    result = sized(Lib.mxt_run_result)
    files = save_files === nothing ? nothing : Files(store_of(save_files))
    others = filter(!isnothing, (eval_dataset, files))
    GC.@preserve slot text eval_dataset files begin
        managed = (
            steps = c_number(UInt64, "steps", steps),
            eval_dataset = eval_dataset === nothing ? C_NULL : eval_dataset.handle,
            save_dir = c_string(text),
            on_step = step_function(),
            user_data = slot_pointer(slot),
            save_files = files === nothing ? C_NULL : files.handle,
        )
        how = Ref(filled(Lib.mxt_run_options, Lib.mxt_run_options_init, fields, managed))
        try
            catching_ctrl_c() do
                call(trainer, dataset, others...) do
                    Lib.mxt_trainer_run(trainer, dataset, how, result)
                end
            end
        finally
            files === nothing || close(files)
        end
    end
    run = result[]
    return (
        steps = Int(run.steps),
        tokens = Int(run.tokens),
        seconds = run.seconds,
        last_loss = run.last_loss,
        last_eval_loss = run.last_eval_loss,
        ended = RUN_ENDS[run.end_ + 1],
        saved = run.saved != 0,
        eval_errors = Int(run.eval_errors),
        save_errors = Int(run.save_errors),
    )
end

# Runs `body` with Ctrl-C as an exception. In a script, and nowhere else, Julia ends the process.
#
# NOTE: the switch is one for the process, so the first run turns it and the last turns it back.
# Julia does not tell how it stands.
function catching_ctrl_c(body)
    (isinteractive() || isempty(PROGRAM_FILE)) && return body()
    lock(CATCHING) do
        CATCHING_RUNS[] += 1
        Base.exit_on_sigint(false)
    end
    try
        return body()
    finally
        lock(CATCHING) do
            CATCHING_RUNS[] -= 1
            CATCHING_RUNS[] == 0 && Base.exit_on_sigint(true)
        end
    end
end

const CATCHING = ReentrantLock()
const CATCHING_RUNS = Ref(0)

"""
    request_stop(trainer)

Asks a run to stop before its next step or, during an evaluation, its next batch; one that is not
started yet stops at once. `evaluate!` throws an error with status `MXT_STOPPED`. The request stands
until a run uses it up, or `clear_stop`. For other tasks and threads than the one in which the run is.
"""
function request_stop(trainer::Trainer)
    ask(Lib.mxt_trainer_request_stop, trainer, nothing)
    return nothing
end

"""
    clear_stop(trainer)

Takes a stop request back that no run has used up.
"""
function clear_stop(trainer::Trainer)
    ask(Lib.mxt_trainer_clear_stop, trainer, nothing)
    return nothing
end

# In the order of C's numbers, from 0.
const RUN_ENDS = (:finished, :callback, :request)
