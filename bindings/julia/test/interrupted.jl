# What runtests.jl starts and interrupts: is sent SIGINT five times.
using MXFP4Train

const FOLDER = first(ARGS)

function tell(line)
    println(line)
    flush(stdout)
end

const DATA = Dataset([(i * i + i ÷ 7) % 29 for i in 0:3999])
const WINDOWS = Dataset((number, tokens, _) -> (tokens .= (1:17) .+ number), 9)

# The steps that a run had done when Ctrl-C ended it.
function interrupted(f, name, trainer, data = DATA)
    save_dir = joinpath(FOLDER, name)
    try
        run!(f, trainer, data; steps = typemax(Int), save_dir = save_dir, save_every = 100)
    catch exception
        exception isa InterruptException || rethrow()
        return steps_done(trainer)
    end
    error("expected an interrupted run")
end

# A rank that hears what it says as the other's words.
function twin()
    all_to_all(send, receive) = copyto!(receive, send)
    all_gather(mine, all) = copyto!(all, [mine; mine])
    return Group(0, 2; all_to_all = all_to_all, all_gather = all_gather)
end

function new_trainer(group)
    model = Model(
        Engine(threads = 1, group = group);
        vocab_size = 32,
        context_length = 16,
        layers = 1,
        heads = 2,
        channels = 16,
    )
    return Trainer(model; batch_size = 2)
end

function main()
    trainer = new_trainer(nothing)
    steps = interrupted("callback", trainer) do step, _
        step.step == 3 && tell("running")
    end
    tell(steps)
    tell(interrupted((_, _) -> nothing, "silent", trainer))
    tell(interrupted((_, _) -> nothing, "windows", trainer, WINDOWS))
    tell(interrupted((_, _) -> nothing, "rank", new_trainer(twin())))
    # What Julia prints when a signal ends it is expected.
    redirect_stderr(open("/dev/null", "w"))
    tell("waiting")
    sleep(60)
end

main()
