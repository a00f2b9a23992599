# A step in parts: gradients of batches, what is done with them before an update, and the update.

"""
    IGNORED

In place of a target: the place is no part of the loss, as -100 is in PyTorch.
`replace(labels, -100 => IGNORED)` makes targets of such labels.
"""
const IGNORED = Int(Lib.MXT_IGNORED)

"""
    forward_backward!(trainer, tokens, targets; weights = nothing, divisor = nothing,
                      losses = nothing, documents = nothing)

Computes the gradients of a batch and adds them to those of the batches since the last
[`update!`](@ref), which makes a step of them all.

`tokens`, numbers from 0, are what the model reads, and `targets` what it is to predict at each place,
or [`IGNORED`](@ref): in a language model the next token. All matrices have `sequence_length` rows and
a column for each of `batch_size` sequences; another size is a `DimensionMismatch`.

- `weights` is a matrix with a factor of each loss, or a mask: `false` or 0 for what is not to be
  learned, as a prompt or padding. `nothing` is 1 for all. At ignored targets it may be anything.
- `divisor` is what the sum of weighted losses is divided by, together with the divisors of the step's
  other batches. `nothing`, or 0, is the sum of the weights of targets that are not ignored, so that
  the step's loss is the mean over what counts. Weights that may be below 0, as advantages are, need
  another one, such as `length(tokens)`.
- `losses` is a matrix that gets the loss of each place, without its weight; 0 where the target is
  ignored.
- `documents` is a matrix with the number of the document that each token is of. Where it changes down a
  column another document begins: attention looks at no document but a token's own, and positions are
  counted from where it begins, so that each has the logits that it has alone. `nothing` takes the
  trainer's `document_end` or, without it, each column as one document.

Where `accumulation` such batches have no weights but 1, the step has the bits of [`step!`](@ref). Any
other number of batches is as good, but with `lanes` or in a [`Group`](@ref), of which each rank gives
its `accumulation ÷ ranks`; and `gradients=bf16` takes one. No batch is added to gradients that were
written or scaled. While batches wait, `step!` and `run!` are errors; evaluating and saving go
on, and a checkpoint does not have them. After an error of this call those before still wait, unless it
comes from a `loss`:

    forward_backward!(loss, trainer, tokens; ...)
    forward_backward!(loss, trainer, tokens, targets; ...)

The same with a loss of your own in place of cross-entropy. `loss(logits, losses, places)` is called
with some places at a time, some 32 MiB of logits; all places come once, in order. `places` is the range
of their indices in `tokens`, so that `targets[places]` are their targets. `logits` is a matrix with a
column for each, in which the logit of token `t` has the index `t + 1`: overwrite it with the gradient
of the place's loss in its logits. The loss itself goes into `losses`, a vector of `NaN` before.
`weights` and `divisor` are in neither: the library multiplies. Without `targets` the loss is of all
places. With the `do` syntax, for label smoothing:

    forward_backward!(trainer, tokens) do logits, losses, places
        for (column, place) in enumerate(places)
            logit = view(logits, :, column)
            log_p = logit .- maximum(logit)
            log_p .-= log(sum(exp, log_p))
            wanted = fill(0.1f0 / length(logit), length(logit))
            wanted[targets[place] + 1] += 0.9f0
            losses[column] = -sum(wanted .* log_p)
            logit .= exp.(log_p) .- wanted
        end
    end

Both arrays are the library's memory, and no longer to be used when `loss` has returned. Meanwhile the
trainer and its model are busy. What `loss` throws is thrown here, and an answer of `:stop` is an error
with status `MXT_STOPPED`; in either case no batch waits any more. It gets places that are ignored or of
weight 0, too, where what it writes does not count, be it `NaN`; elsewhere a number that is not finite,
as a loss that it leaves out, is an error of [`update!`](@ref).
"""
function forward_backward!(
    trainer::Trainer,
    tokens::AbstractMatrix{<:Integer},
    targets::AbstractMatrix{<:Integer};
    fields...,
)
    return forward_backward!(nothing, trainer, tokens, targets; fields...)
end

function forward_backward!(
    loss,
    trainer::Trainer,
    tokens::AbstractMatrix{<:Integer},
    targets::Union{Nothing,AbstractMatrix{<:Integer}} = nothing;
    fields...,
)
    return on_batch(Lib.mxt_trainer_forward_backward, loss, trainer, tokens, targets; fields...)
end

"""
    evaluate!(trainer, tokens, targets; weights = nothing, divisor = nothing, losses = nothing,
              documents = nothing)
    evaluate!(loss, trainer, tokens; ...)
    evaluate!(loss, trainer, tokens, targets; ...)

The loss of a batch, without gradients: arguments as those of [`forward_backward!`](@ref), of which what
a `loss` writes for gradients is dropped; result as that of a dataset, with the targets whose weight is
not 0 as `tokens`. It changes nothing of the run, batches that wait for an update included, and is not
collective.
"""
function evaluate!(
    trainer::Trainer,
    tokens::AbstractMatrix{<:Integer},
    targets::AbstractMatrix{<:Integer};
    fields...,
)
    return evaluate!(nothing, trainer, tokens, targets; fields...)
end

function evaluate!(
    loss,
    trainer::Trainer,
    tokens::AbstractMatrix{<:Integer},
    targets::Union{Nothing,AbstractMatrix{<:Integer}} = nothing;
    fields...,
)
    stats = sized(Lib.mxt_eval_stats)
    forward(trainer, batch) = Lib.mxt_trainer_forward(trainer, batch, stats)
    on_batch(forward, loss, trainer, tokens, targets; fields...)
    return named(stats[])
end

# What a C function makes of a batch.
function on_batch(
    work,
    loss,
    trainer::Trainer,
    tokens::AbstractMatrix{<:Integer},
    targets::Union{Nothing,AbstractMatrix{<:Integer}};
    weights::Union{Nothing,AbstractMatrix{<:Real}} = nothing,
    divisor = nothing,
    losses::Union{Nothing,AbstractMatrix{<:AbstractFloat}} = nothing,
    documents::Union{Nothing,AbstractMatrix{<:Integer}} = nothing,
)
    how = options(trainer)
    expected = (how.sequence_length, how.batch_size)
    given = (
        tokens = tokens,
        targets = targets,
        weights = weights,
        losses = losses,
        documents = documents,
    )
    for (what, matrix) in pairs(given)
        matrix === nothing && continue
        check_size(what, matrix, expected, "sequence_length by batch_size")
    end
    slot, inputs = Slot(loss), c_tokens("tokens", tokens)
    outputs = targets === nothing ? nothing : c_tokens("targets", targets)
    numbers = documents === nothing ? nothing : c_tokens("documents", documents)
    factors = weights === nothing ? nothing : Matrix{Float32}(weights)
    found = losses === nothing ? nothing : Matrix{Float32}(undef, expected)
    GC.@preserve slot inputs outputs numbers factors found begin
        managed = (
            count = length(inputs),
            tokens = pointer(inputs),
            targets = pointer_or_null(outputs),
            weights = pointer_or_null(factors),
            losses = pointer_or_null(found),
            loss = loss === nothing ? C_NULL : loss_function(),
            user_data = slot_pointer(slot),
            documents = pointer_or_null(numbers),
        )
        fields = divisor === nothing ? (;) : (divisor = divisor,)
        batch = Ref(filled(Lib.mxt_batch, Lib.mxt_batch_init, fields, managed))
        call(() -> work(trainer, batch), trainer)
    end
    found === nothing || (losses .= found)
    return nothing
end

# A pointer for a field of a struct. The caller preserves the array.
pointer_or_null(::Nothing) = C_NULL
pointer_or_null(array::Array) = pointer(array)

"""
    update!(trainer)

Does one optimizer step by the gradients of all batches since the last one, those of
[`forward_backward!`](@ref): clips, and moves the weights. Returns what [`step!`](@ref) returns. All
ranks of a [`Group`](@ref) call it together.

It is an error where no batch waits, and where the divisors of all of them are not above 0 together, as
where every target is ignored. Weights and moments are then as before, and no batch waits any more; but
where they are too few, with `lanes` or in a group, those of all ranks still do.
"""
function update!(trainer::Trainer)
    stats = sized(Lib.mxt_step_stats)
    call(() -> Lib.mxt_trainer_update(trainer, stats), trainer)
    return named(stats[])
end

"""
    zero_gradients!(trainer)

Drops the gradients that wait for an update; the next batch begins a step anew.
"""
function zero_gradients!(trainer::Trainer)
    return call(() -> Lib.mxt_trainer_zero_gradients(trainer), trainer)
end

"""
    scale_gradients!(trainer, factor)
    scale_gradients!(trainer, name, factor)

Multiplies the gradients that wait for an update, or that of one tensor, by `factor`. Not with `lanes`,
and not in a [`Group`](@ref).
"""
function scale_gradients!(trainer::Trainer, factor::Real)
    return call(() -> Lib.mxt_trainer_scale_gradients(trainer, C_NULL, factor), trainer)
end

function scale_gradients!(trainer::Trainer, name::AbstractString, factor::Real)
    text = text_or_nothing("name", name)
    return call(() -> Lib.mxt_trainer_scale_gradients(trainer, text, factor), trainer)
end

"""
    gradients(trainer)

The gradients as a dictionary from names to arrays, to be used as that of [`tensors`](@ref), with arrays
of the same sizes: those of the last step, before clipping; or, where batches wait for an update, those
of their loss so far (of this rank, and of its last lane). Frozen tensors have none, and beside adapters
nothing else has.

    forward_backward!(trainer, tokens, targets)
    gradients(trainer)["transformer.wte.weight"]           # a copy, channels × vocabulary
    gradients(trainer)["transformer.wpe.weight"] .= 0      # positions learn nothing of it
    update!(trainer)

What is assigned overwrites the gradient that waits for an update. Where none waits, those of all other
tensors are 0, so a program may bring all gradients itself. Not with `lanes`, and not in a
[`Group`](@ref).
"""
function gradients(trainer::Trainer)
    model = Model(trainer)
    try
        return Tensors(trainer, model)
    finally
        close(model)
    end
end

# Whether a trainer has a gradient of a tensor.
function has_values(trainer::Trainer, name)
    is_trained = Ref(Int32(0))
    call(() -> Lib.mxt_trainer_is_trained(trainer, name, is_trained), trainer)
    return is_trained[] != 0
end

function read_values(trainer::Trainer, name::AbstractString, values::Array{Float32})
    return call(trainer) do
        Lib.mxt_trainer_read_gradient(trainer, name, values, length(values))
    end
end

function write_values(trainer::Trainer, name::AbstractString, values::Array{Float32})
    return call(trainer) do
        Lib.mxt_trainer_write_gradient(trainer, name, values, length(values))
    end
end
