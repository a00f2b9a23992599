# A model in training, step by step.

"""
    Trainer(model; recipe = nothing, recompute = nothing, optimizer = nothing, token_drop = nothing,
            schedule = :constant, batch_size = 8, sequence_length = 0, accumulation = 0, lanes = 0,
            lr = 3e-4, min_lr = 0, warmup_steps = 0, total_steps = 0, decay_steps = 0, beta1 = 0.9,
            beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1, clip = 1, document_end = nothing)

A trainer at step 0 that changes the weights of `model`. All memory of training is allocated here.

`recipe` says which number formats the linear layers use: `"fp32"`, `"bf16"`, `"mxfp4-rht-sr"` (what
`nothing` is) and others that the C header lists. `schedule` is `:constant`, `:cosine`, `:linear` or
`:trapezoid`. `recompute` says what the backward pass computes again to save memory: `"nothing"`,
`"pointwise"` or `"block"`. `optimizer` says what moves the weights: `"adamw"` (what `nothing` is)
or `"stable-adamw"`, which is made for `clip = 0`. `token_drop` says how many tokens of a sequence
the blocks between the first and the last see in training: `"start=128,steps=60%"` begins with 128
and comes to all of them after 60 % of `total_steps`; `nothing` is all. `document_end` is the token that
ends a document, such as 50256 of GPT-2: attention then looks at no document but a token's own, and
positions are counted from where it begins, in all batches and windows that come without `documents`.

`accumulation` is how many batches make a step, those of all ranks of a [`Group`](@ref) together; 0 is
as many as there are lanes. `lanes` are the parts of a step that ranks share, each of as many batches:
with the same lanes, losses, weights and files are the same bits on any number of ranks that divides
them by a power of two, and a saved run goes on on any of these; 0 is as many as there are ranks, 1
without a group.
"""
mutable struct Trainer <: Handle
    handle::Ptr{Lib.mxt_trainer}
    uses::Threads.Atomic{Int}
    engine::Engine

    # Owns `handle` from now on.
    function Trainer(handle::Ptr{Lib.mxt_trainer}, engine::Engine)
        return finalizer(close, new(handle, new_uses(), engine))
    end
end

function Trainer(model::Model; fields...)
    return with_trainer_options(; fields...) do how
        made(handle -> Trainer(handle, model.engine), Lib.mxt_trainer, model) do handle
            Lib.mxt_trainer_new(model, how, handle)
        end
    end
end

function Model(trainer::Trainer)
    return made(handle -> Model(handle, trainer.engine), Lib.mxt_model, trainer) do handle
        Lib.mxt_trainer_model(trainer, handle)
    end
end

"""
    MXFP4Train.load(Trainer, engine, folder; optimizer = nothing)

Loads what `MXFP4Train.save(trainer, folder)` wrote. The next steps are the same, bit for bit, as if
the run had never stopped. With an `optimizer`, which must be the saved one, moments are kept from
here on in what it says, such as `"adamw,moments=int8"`.
"""
function load(
    ::Type{Trainer},
    engine::Engine,
    folder::AbstractString;
    optimizer::Union{Nothing,AbstractString} = nothing,
)
    text, mover = text_or_nothing("folder", folder), text_or_nothing("optimizer", optimizer)
    return made(handle -> Trainer(handle, engine), Lib.mxt_trainer, engine) do handle
        if mover === nothing
            Lib.mxt_trainer_load(engine, text, handle)
        else
            Lib.mxt_trainer_load_as(engine, text, mover, handle)
        end
    end
end

"""
    MXFP4Train.save(trainer, folder)

Saves model, moments, options and position. A failure, or a kill at any instant, leaves what was
there before.
"""
function save(trainer::Trainer, folder::AbstractString)
    text = text_or_nothing("folder", folder)
    return call(() -> Lib.mxt_trainer_save(trainer, text), trainer)
end

"""
    step!(trainer, dataset)

Does one optimizer step on the next windows of a dataset. Returns what it did as a named tuple:
`step`, `tokens`, `seconds`, `loss` (nats a token, before the update), `grad_norm`, `lr`,
`tokens_per_second`, `raised_blocks` (of MXFP4, see `mxt_step_stats`), where
[`watch_updates!`](@ref) watches the step, `update_rms_max` and `update_rms_tensor`, else `NaN` and 0,
and `exchange_seconds`, in which this rank waited for others and exchanged gradients with them.

    step!(trainer, tokens)

Does the step on a matrix of tokens, numbers from 0: `sequence_length + 1` rows, and a column for
each of the `accumulation * batch_size` sequences. A matrix of another size is a
`DimensionMismatch`. Of the ranks of a [`Group`](@ref) each brings its part of the columns, as many as
every other: rank 0 the first of them, and so on.
"""
function step!(trainer::Trainer, dataset::Dataset)
    stats = sized(Lib.mxt_step_stats)
    call(() -> Lib.mxt_trainer_step(trainer, dataset, stats), trainer, dataset)
    return named(stats[])
end

function step!(trainer::Trainer, tokens::AbstractMatrix{<:Integer})
    columns = nothing
    try
        columns = step_columns(trainer, tokens)
    finally
        columns === nothing && refuse_step(trainer)
    end
    stats = sized(Lib.mxt_step_stats)
    call(trainer) do
        Lib.mxt_trainer_step_tokens(trainer, columns, length(columns), stats)
    end
    return named(stats[])
end

# The tokens of a step as C wants them.
function step_columns(trainer::Trainer, tokens::AbstractMatrix{<:Integer})
    how = options(trainer)
    # NOTE: not `ranks`, which is 0 where the engine is closed already.
    count = trainer.engine.group[].size
    expected = (how.sequence_length + 1, how.accumulation * how.batch_size ÷ count)
    part = count == 1 ? "" : " / $count ranks"
    names = "sequence_length + 1 by accumulation * batch_size$part"
    check_size("tokens", tokens, expected, names)
    return c_tokens("tokens", tokens)
end

# An error unless a matrix is of the expected size, which `names` explains; `what` names the matrix.
#
# NOTE: C sees numbers in a row, and would train on a transposed matrix as on any other.
function check_size(what, matrix::AbstractMatrix, expected::Tuple{Int,Int}, names)
    size(matrix) == expected && return nothing
    fix = reverse(size(matrix)) == expected ? "; permutedims($what) has it" : ""
    wanted, got = join(expected, '×'), join(size(matrix), '×')
    throw(DimensionMismatch("$what: expected a matrix of $wanted ($names), got $got$fix"))
end

# Tells the other ranks of a step that is refused here, for which they would wait: by a step on no
# tokens, which fails on all of them and changes nothing.
function refuse_step(trainer::Trainer)
    trainer.engine.group[].size == 1 && return nothing
    none = UInt32[]
    return call(trainer) do
        Lib.mxt_trainer_step_tokens(trainer, none, 0, C_NULL)
        return Lib.MXT_OK
    end
end

# The index of a tensor counts from 1 here, and 0 is none.
function named(stats::Lib.mxt_step_stats)
    index = stats.update_rms_tensor
    place = index == typemax(index) ? 0 : Int(index) + 1
    return merge(fields_of(stats), (update_rms_tensor = place,))
end

"""
    steps(trainer, dataset, count)

Iterates over `count` steps: every turn of the loop does one and gives what it did, as `step!` does.

    for stats in steps(trainer, dataset, 100)
        println(stats.loss)
    end
"""
function steps(trainer::Trainer, dataset::Dataset, count::Integer)
    return Steps(trainer, dataset, c_number(UInt32, "count", count))
end

# What `steps` makes.
struct Steps
    trainer::Trainer
    dataset::Dataset
    count::Int
end

function Base.iterate(steps::Steps, done = 0)
    done >= steps.count && return nothing
    return (step!(steps.trainer, steps.dataset), done + 1)
end

Base.length(steps::Steps) = steps.count
Base.IteratorEltype(::Type{Steps}) = Base.EltypeUnknown()

"""
    evaluate!(trainer, dataset; max_batches = 0)

The mean loss over at most `max_batches` batches spread evenly over the dataset, 0 for all of it, as
a named tuple: `tokens`, `seconds`, `loss` (nats a token), `perplexity`, and, `NaN` unless
[`set_sharpness!`](@ref) asks for them, `sharpness`, `sharpness_last`, `sharpness_epsilon` and
`logit_amax`. With `haste` in the recipe, `spared_products` and `spared_all` are the part of the
linear layers' operations that merging channels would spare, without and with what merging itself
adds; else `NaN`. It changes nothing of the run, but needs the trainer for itself.
"""
function evaluate!(trainer::Trainer, dataset::Dataset; max_batches::Integer = 0)
    most = c_number(Csize_t, "max_batches", max_batches)
    stats = sized(Lib.mxt_eval_stats)
    call(() -> Lib.mxt_trainer_eval(trainer, dataset, most, stats), trainer, dataset)
    return named(stats[])
end

"""
    set_sharpness!(trainer, epsilon)

Asks evaluations from here on how much the loss could rise if each logit y moved by up to `epsilon`
(|y| + 1), in percent of 1 + loss. 0 ends it.
"""
function set_sharpness!(trainer::Trainer, epsilon::Real)
    return call(() -> Lib.mxt_trainer_set_sharpness(trainer, epsilon), trainer)
end

"""
    watch_updates!(trainer, every)

Watches the updates of the steps that `every` divides, from here on; 0 ends it. What [`step!`](@ref)
gives for such a step, and [`run!`](@ref) hands to its callback, has in `update_rms_max` how far the
gradient of a tensor is at most beyond what its second moment has seen coming (1 while gradients stay
as they were), and in `update_rms_tensor` which tensor that is, so that
`keys(tensors(Model(trainer)))[update_rms_tensor]` is its name. [`tensor_update`](@ref) says the same
of each tensor. Nothing of the run changes, bit for bit.
"""
function watch_updates!(trainer::Trainer, every::Integer)
    number = c_number(UInt64, "every", every)
    return call(() -> Lib.mxt_trainer_watch_updates(trainer, number), trainer)
end

"""
    tensor_update(trainer, name)

What the last update that [`watch_updates!`](@ref) watched did to a tensor, as a named tuple: `step`,
`grad_norm` (before clipping) and `rms` (see `mxt_tensor_update`; `NaN` of a tensor without a second
moment). An error where no update was watched yet.
"""
function tensor_update(trainer::Trainer, name::AbstractString)
    text = text_or_nothing("name", name)
    update = sized(Lib.mxt_tensor_update)
    call(() -> Lib.mxt_trainer_tensor_update(trainer, text, update), trainer)
    return named(update[])
end

"""
    watch_weights!(trainer, every)

Watches how the weights of blocks change, and what they are rounded to in the forward pass, over
windows of `every` steps from here on, for [`weight_metrics`](@ref); 0 ends it. The recipe has to hold
weights in blocks of MXFP4 or NVFP4, unrotated, in the forward pass, as `"tetrajet"` does. Nothing of
the run changes, bit for bit.
"""
function watch_weights!(trainer::Trainer, every::Integer)
    number = c_number(UInt64, "every", every)
    return call(() -> Lib.mxt_trainer_watch_weights(trainer, number), trainer)
end

"""
    weight_metrics(trainer)
    weight_metrics(trainer, name)

What the last whole window of [`watch_weights!`](@ref) has shown of all weights that are watched, or
of one tensor, as a named tuple: `step` (the last of the window), `steps` (of the window), `change`,
`rounded_change`, `flipped`, `confidence`, `oscillating`, `clipped`, `amax` (see
`mxt_weight_metrics`) and `tensors`, how many they are. An error where no window is whole yet.
"""
weight_metrics(trainer::Trainer) = metrics_of(trainer, nothing)

function weight_metrics(trainer::Trainer, name::AbstractString)
    return metrics_of(trainer, text_or_nothing("name", name))
end

function metrics_of(trainer::Trainer, text::Union{Nothing,String})
    metrics = sized(Lib.mxt_weight_metrics)
    name = text === nothing ? C_NULL : text
    call(() -> Lib.mxt_trainer_weight_metrics(trainer, name, metrics), trainer)
    return named(metrics[])
end

"""
    set_lr!(trainer, lr)

Takes `lr` as the learning rate from the next step on, in place of the schedule's.
"""
set_lr!(trainer::Trainer, lr::Real) = call(() -> Lib.mxt_trainer_set_lr(trainer, lr), trainer)

"""
    set_schedule!(trainer; schedule = :constant, lr = 3e-4, min_lr = 0, warmup_steps = 0,
                  total_steps = 0, decay_steps = 0)

Takes a new schedule from the next step on. Its steps are counted from here: it ends `total_steps`
steps later. `schedule` is one of [`Trainer`](@ref)'s. A rate of [`set_lr!`](@ref) is dropped.
"""
function set_schedule!(trainer::Trainer; fields...)
    for name in keys(fields)
        name in SCHEDULE_FIELDS && continue
        known = join(SCHEDULE_FIELDS, ", ")
        throw(ArgumentError("expected options among $known, got $name"))
    end
    return with_trainer_options(; fields...) do how
        call(() -> Lib.mxt_trainer_set_schedule(trainer, how), trainer)
    end
end

const SCHEDULE_FIELDS = (:schedule, :lr, :min_lr, :warmup_steps, :total_steps, :decay_steps)

"""
    schedule_start(trainer)

The step that the schedule counts from: 0, or where [`set_schedule!`](@ref) set it.
"""
schedule_start(trainer::Trainer) = Int(ask(Lib.mxt_trainer_schedule_start, trainer, 0))

"""
    use_schedule!(trainer)

Returns to the schedule's learning rate.
"""
use_schedule!(trainer::Trainer) = call(() -> Lib.mxt_trainer_use_schedule(trainer), trainer)

"""
    steps_done(trainer)

The number of optimizer steps since step 0, those before a save and load included.
"""
steps_done(trainer::Trainer) = Int(ask(Lib.mxt_trainer_steps_done, trainer, 0))

"""
    options(trainer)

What the trainer was made from, as a named tuple.
"""
function options(trainer::Trainer)
    filled_in = sized(Lib.mxt_trainer_options)
    texts = Ref(("", "", ""))
    drop, frozen = Ref{Union{Nothing,String}}(nothing), Ref{Union{Nothing,String}}(nothing)
    text_or_none(text) = text == Cstring(C_NULL) ? nothing : unsafe_string(text)
    call(trainer) do
        status = Lib.mxt_trainer_get_options(trainer, filled_in)
        if status == Lib.MXT_OK
            # The texts are valid as long as the trainer, so they are copied while that is held.
            how = filled_in[]
            texts[] = map(unsafe_string, (how.recipe, how.recompute, how.optimizer))
            drop[], frozen[] = text_or_none(how.token_drop), text_or_none(how.frozen)
        end
        return status
    end
    how = filled_in[]
    recipe, recompute, optimizer = texts[]
    schedule = SCHEDULES[how.schedule + 1]
    managed = (
        recipe = recipe,
        recompute = recompute,
        optimizer = optimizer,
        token_drop = drop[],
        frozen = frozen[],
        document_end = how.has_document_end == 0 ? nothing : Int(how.document_end),
        schedule = schedule,
    )
    return Base.structdiff(merge(named(how), managed), NamedTuple{(:has_document_end,)})
end

# A run whose trainer is closed stops before its next step.
closing(trainer::Trainer) = Lib.mxt_trainer_request_stop(trainer)
release(handle::Ptr{Lib.mxt_trainer}) = Lib.mxt_trainer_free(handle)
Base.unsafe_convert(::Type{Ptr{Lib.mxt_trainer}}, trainer::Trainer) = trainer.handle

function Base.show(io::IO, trainer::Trainer)
    describe(trainer) = "$(Int(Lib.mxt_trainer_steps_done(trainer))) steps done"
    text = ask(describe, trainer, "closed")
    return print(io, "Trainer(", text, ")")
end

# In the order of C's numbers, from 0.
const SCHEDULES = (:constant, :cosine, :linear, :trapezoid)

# What `use` makes of a reference to the options, whose text lives until it returns.
function with_trainer_options(
    use;
    recipe::Union{Nothing,AbstractString} = nothing,
    recompute::Union{Nothing,AbstractString} = nothing,
    optimizer::Union{Nothing,AbstractString} = nothing,
    token_drop::Union{Nothing,AbstractString} = nothing,
    frozen::Union{Nothing,AbstractString} = nothing,
    document_end::Union{Nothing,Integer} = nothing,
    schedule = :constant,
    fields...,
)
    number = findfirst(==(schedule), SCHEDULES)
    if number === nothing
        throw(ArgumentError("schedule: expected one of $SCHEDULES, got $(repr(schedule))"))
    end
    text, again = text_or_nothing("recipe", recipe), text_or_nothing("recompute", recompute)
    mover, drop = text_or_nothing("optimizer", optimizer), text_or_nothing("token_drop", token_drop)
    stays = text_or_nothing("frozen", frozen)
    GC.@preserve text again mover drop stays begin
        managed = (
            recipe = c_string(text),
            recompute = c_string(again),
            optimizer = c_string(mover),
            token_drop = c_string(drop),
            frozen = c_string(stays),
            has_document_end = document_end === nothing ? 0 : 1,
            document_end = c_number(UInt32, "document_end", something(document_end, 0)),
            schedule = number - 1,
        )
        how = filled(Lib.mxt_trainer_options, Lib.mxt_trainer_options_init, fields, managed)
        return use(Ref(how))
    end
end
