# Trains a small GPT from Julia: steps in a loop, a run with a callback, a checkpoint, some text.
#
#   cargo build --release
#   MXFP4TRAIN_LIBRARY=target/release/libmxfp4train.so \
#     julia --project=bindings/julia examples/julia/train.jl [TOKENS.bin]
#
# TOKENS.bin holds bytes as 16-bit tokens, or any tokens below 50257. Without it the program learns
# a nursery rhyme by heart.
using MXFP4Train
using Printf: @printf

const RHYME = "Humpty Dumpty sat on a wall, Humpty Dumpty had a great fall; " *
              "all the king's horses and all the king's men could not put Humpty together again. "

function main(arguments)
    dataset = isempty(arguments) ? Dataset(codeunits(RHYME^60)) : Dataset(first(arguments))
    engine = Engine()
    model = Model(
        engine;
        vocab_size = max_token(dataset) + 1,
        context_length = 64,
        layers = 2,
        heads = 4,
        channels = 64,
    )
    println(model, ", ", dataset)
    trainer = Trainer(
        model;
        recipe = "mxfp4-rht-sr",    # forward in bf16, backward in MXFP4
        schedule = :cosine,
        lr = 3e-3,
        warmup_steps = 10,
        total_steps = 200,
    )

    # The first steps one by one: this is all that a loop of your own needs.
    for stats in steps(trainer, dataset, 3)
        @printf("step %4d  loss %.4f\n", stats.step, stats.loss)
    end

    # The rest in one call, which ends with a checkpoint.
    run!(trainer, dataset; steps = 97, eval_dataset = dataset, save_dir = "checkpoint") do step, eval
        step.step % 20 == 0 && @printf("step %4d  loss %.4f\n", step.step, step.loss)
        eval === nothing || @printf("           evaluation %.4f nats a token\n", eval.loss)
    end

    # As another process would: everything comes back from the checkpoint.
    resumed = MXFP4Train.load(Trainer, engine, "checkpoint")
    println("resumed at step ", steps_done(resumed))
    run!(resumed, dataset; steps = 200 - steps_done(resumed))

    # Weights are arrays: the length of every token's embedding.
    embeddings = tensors(Model(resumed))["transformer.wte.weight"]
    @printf("mean length of an embedding %.3f\n", sqrt(sum(abs2, embeddings) / size(embeddings, 2)))

    print("H")
    generate(Model(resumed), [Int('H')]; temperature = 0.5) do token
        print(token < 128 ? Char(token) : '?')
    end
    println()
    return nothing
end

main(ARGS)
