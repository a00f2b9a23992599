# Many steps in one call.

"""
    run!(trainer, dataset; steps, eval_dataset = nothing, eval_every = 0, eval_batches = 20,
         save_dir = nothing, save_every = 0)
    run!(f, trainer, dataset; ...)

Does `steps` steps with evaluations and checkpoints.

`f(step, evaluation)` is called after each step with what `step!` gives, and with what `evaluate!`
gives or `nothing` if the step was followed by no evaluation. The run ends when it returns `:stop`.
It may use the trainer: evaluate, save, generate, even close it. With the `do` syntax:

    run!(trainer, dataset; steps = 1000, save_dir = "out") do step, evaluation
        println(step.loss)
        step.loss < 1 && return :stop
    end

With `eval_dataset` the run evaluates whenever the number of steps done is a multiple of
`eval_every`, and after the last step; with `save_dir` it saves likewise by `save_every`, and at its
end, however it ends.

An evaluation or a save that fails does not end the run: the log gets a warning, and the next one is
tried when it is due. Where the last one of its kind fails, `run!` throws that error at its end.

Returns a named tuple: `steps`, `tokens` and `seconds` of this call, `last_loss` and
`last_eval_loss` (NaN if there was none), `ended` (`:finished`, `:callback` or `:request`), `saved`,
whether `save_dir` holds the trainer as it is now, and `eval_errors` and `save_errors`, how many of
them failed.
"""
run!(trainer::Trainer, dataset::Dataset; fields...) =
    run!(Returns(nothing), trainer, dataset; fields...)

function run!(
    f,
    trainer::Trainer,
    dataset::Dataset;
    eval_dataset::Union{Nothing,Dataset} = nothing,
    save_dir::Union{Nothing,AbstractString} = nothing,
    fields...,
)
    if eval_dataset !== nothing && !isopen(eval_dataset)
        throw(ArgumentError("eval_dataset: expected an open dataset, got a closed one"))
    end
    callback = Callback(f)
    text = text_or_nothing(save_dir)
    result = sized(Lib.mxt_run_result)
    status = GC.@preserve callback text eval_dataset begin
        managed = (
            eval_dataset = eval_dataset === nothing ? C_NULL : eval_dataset.handle,
            save_dir = c_string(text),
            on_step = step_function(),
            user_data = pointer_from_objref(callback),
        )
        how = Ref(filled(Lib.mxt_run_options, Lib.mxt_run_options_init, fields, managed))
        calling_back(() -> Lib.mxt_trainer_run(trainer, dataset, how, result))
    end
    check(status)
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

"""
    request_stop(trainer)

Asks a run to stop before its next step or, during an evaluation, its next batch; one that is not
started yet stops at once. `evaluate!` throws an error with status `MXT_STOPPED`. The request stands
until a run uses it up, or `clear_stop`. For other tasks and threads than the one in which the run is.
"""
function request_stop(trainer::Trainer)
    Lib.mxt_trainer_request_stop(trainer)
    return nothing
end

"""
    clear_stop(trainer)

Takes a stop request back that no run has used up.
"""
function clear_stop(trainer::Trainer)
    Lib.mxt_trainer_clear_stop(trainer)
    return nothing
end

# In the order of C's numbers, from 0.
const RUN_ENDS = (:finished, :callback, :request)
