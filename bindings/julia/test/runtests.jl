# Needs the library: see MXFP4TRAIN_LIBRARY in the package's documentation.
using MXFP4Train
using MXFP4Train: Lib, load, save
using Test

const SMALL = (vocab_size = 32, context_length = 16, layers = 1, heads = 2, channels = 16)

new_engine(; options...) = Engine(; threads = 1, options...)
new_model() = Model(new_engine(); SMALL...)
new_dataset() = Dataset([(i * i + i ÷ 7) % 29 for i in 0:3999])
new_trainer(model = new_model()) = Trainer(model; batch_size = 2, lr = 1e-2)

# What `f` throws, or `nothing`.
function thrown(f)
    try
        f()
        return nothing
    catch exception
        return exception
    end
end

status_of(f) = (thrown(f)::MXFP4Error).status

struct Enough <: Exception
    step::Int
end

@testset "library" begin
    @test MXFP4Train.version() isa VersionNumber
    @test startswith(MXFP4Train.build_info(), "{")
    @test Lib.mxt_abi_version() == Lib.MXT_ABI_VERSION
end

@testset "errors" begin
    error = thrown(() -> Engine(device = "abacus"))
    @test error isa MXFP4Error && error.status == Lib.MXT_ERROR_INVALID_ARGUMENT
    @test occursin("abacus", error.message)
    @test occursin("invalid argument", sprint(showerror, error))
    @test status_of(() -> Model(new_engine(); SMALL..., heads = 3)) == Lib.MXT_ERROR_INVALID_ARGUMENT
    @test status_of(() -> Dataset("/nowhere/*.bin")) == Lib.MXT_ERROR_INVALID_ARGUMENT
    @test status_of(() -> Dataset(["/nowhere/a.bin"])) == Lib.MXT_ERROR_IO
    @test status_of(() -> load(Model, new_engine(), "/nowhere")) == Lib.MXT_ERROR_IO
    narrow = new_engine(memory_limit = 1000)
    @test status_of(() -> Model(narrow; SMALL...)) == Lib.MXT_ERROR_OUT_OF_MEMORY
    @test_throws ArgumentError Model(new_engine(); leyers = 2)
    @test_throws ArgumentError Model(new_engine(); struct_size = 2)
    @test_throws ArgumentError Trainer(new_model(); schedule = :sometimes)
    @test_throws ArgumentError Dataset("zero\0byte")
    @test_throws ArgumentError Dataset([-1, 2])
    @test_throws ArgumentError Model(new_engine(); layers = -1)
end

@testset "lifetimes" begin
    dataset = new_dataset()
    trainer = new_trainer()
    # Engine and model have no name any more.
    foreach(_ -> GC.gc(), 1:3)
    @test step!(trainer, dataset).step == 1
    close(trainer)
    close(trainer)
    @test !isopen(trainer) && steps_done(trainer) == 0
    @test status_of(() -> step!(trainer, dataset)) == Lib.MXT_ERROR_NULL
    @test request_stop(trainer) === nothing
    closed = new_dataset()
    close(closed)
    other = new_trainer()
    @test status_of(() -> run!(other, dataset; steps = 1, eval_dataset = closed)) == Lib.MXT_ERROR_NULL
    for object in (trainer, dataset, new_model(), new_engine())
        @test sprint(show, object) isa String
    end
end

@testset "model and tensors" begin
    model = new_model()
    @test config(model).channels == 16 && config(model).layers == 1
    weights = tensors(model)
    @test sum(length(weights[name]) for name in keys(weights)) == parameter_count(model)
    # C's (vocabulary, channels) is Julia's channels × vocabulary.
    @test size(weights["transformer.wte.weight"]) == (16, 32)
    @test size(weights["transformer.h.0.mlp.c_fc.weight"]) == (64, 16)
    name = "transformer.ln_f.weight"
    values = weights[name]
    @test values == ones(Float32, 16)
    values[3] = 2
    @test weights[name][3] == 1
    weights[name] = values
    @test weights[name] == values && tensors(model)[name][3] == 2
    @test haskey(weights, name) && !haskey(weights, "no.such") && get(weights, "no.such", 7) == 7
    @test_throws KeyError weights["no.such"]
    @test_throws DimensionMismatch setindex!(weights, zeros(3), name)
    @test length(collect(weights)) == length(weights)
    @test occursin("16×32", sprint(show, MIME"text/plain"(), weights))
    needed = plan(new_engine(); model = SMALL, trainer = (batch_size = 2, recipe = "bf16"))
    @test needed.total > needed.weights > 0
    mktempdir() do folder
        save(model, folder)
        @test tensors(load(Model, new_engine(), folder))[name] == values
    end
end

@testset "dataset" begin
    dataset = new_dataset()
    @test length(dataset) == 4000 && max_token(dataset) == 28
    mktempdir() do folder
        paths = [joinpath(folder, "$part.bin") for part in ("a", "b")]
        foreach(path -> write(path, UInt16[1, 2, 3, 4]), paths)
        @test length(Dataset(paths)) == 8
        @test length(Dataset(joinpath(folder, "*.bin"))) == 8
    end
end

@testset "steps, save and load" begin
    dataset = new_dataset()
    trainer = new_trainer()
    losses = [stats.loss for stats in steps(trainer, dataset, 30)]
    @test length(losses) == 30 && losses[end] < losses[1]
    @test steps_done(trainer) == 30
    evaluation = evaluate!(trainer, dataset; max_batches = 2)
    @test evaluation.loss > 0
    @test isapprox(evaluation.perplexity, exp(evaluation.loss); rtol = 1e-4)
    tokens = rand(0:31, 17, 2)
    @test step!(trainer, tokens).tokens == 32
    @test_throws DimensionMismatch step!(trainer, tokens[:, 1:1])
    set_lr!(trainer, 1e-3)
    @test step!(trainer, dataset).lr == 1.0f-3
    use_schedule!(trainer)
    @test step!(trainer, dataset).lr == 1.0f-2
    made_from = options(trainer)
    @test made_from.recipe == "mxfp4-rht-sr" && made_from.schedule === :constant
    mktempdir() do folder
        save(trainer, folder)
        resumed = load(Trainer, new_engine(), folder)
        @test step!(resumed, dataset).loss == step!(trainer, dataset).loss
    end
    of_trainer = Model(trainer)
    before = tensors(of_trainer)["transformer.ln_f.weight"]
    step!(trainer, dataset)
    @test tensors(of_trainer)["transformer.ln_f.weight"] != before
end

@testset "runs" begin
    dataset = new_dataset()
    trainer = new_trainer()
    seen = Int[]
    evaluations = 0
    result = run!(trainer, dataset; steps = 6, eval_dataset = dataset, eval_every = 2) do step, eval
        push!(seen, step.step)
        evaluations += eval !== nothing
    end
    @test seen == 1:6 && evaluations == 3
    @test result.steps == 6 && result.ended === :finished && !result.saved
    @test run!(trainer, dataset; steps = 2).steps == 2
    result = run!((step, _) -> step.step == 10 ? :stop : nothing, trainer, dataset; steps = 9)
    @test result.steps == 2 && result.ended === :callback
    result = run!((_, _) -> request_stop(trainer), trainer, dataset; steps = 9)
    @test result.steps == 1 && result.ended === :request

    # What a callback throws ends the run in order, saves, and arrives here.
    mktempdir() do folder
        error = thrown() do
            run!(trainer, dataset; steps = 9, save_dir = folder) do step, _
                step.step == 13 && throw(Enough(step.step))
            end
        end
        @test error === Enough(13) && steps_done(trainer) == 13
        @test steps_done(load(Trainer, new_engine(), folder)) == 13
    end
    @test run!(trainer, dataset; steps = 1).ended === :finished
    # A run inside a run, with an error of the library inside.
    inner = nothing
    outer = thrown() do
        run!(trainer, dataset; steps = 3) do _, _
            inner = thrown(() -> run!((_, _) -> throw(Enough(1)), trainer, dataset; steps = 3))
            step!(trainer, fill(99, 17, 2))
        end
    end
    @test inner === Enough(1) && outer isa MXFP4Error
    # Closed by its own callback, while the collector is at work.
    result = run!(trainer, dataset; steps = 5) do _, _
        close(trainer)
        GC.gc()
    end
    @test result.steps == 1 && !isopen(trainer)
end

@testset "generate" begin
    model = new_model()
    @test length(generate(model, [1, 2]; max_tokens = 5)) == 5
    logits = next_logits(model, [1, 2])
    @test length(logits) == 32
    @test generate(model, [1, 2]; max_tokens = 1, temperature = 0) == [argmax(logits) - 1]
    seen = UInt32[]
    tokens = generate(model, [1, 2]; max_tokens = 8) do token
        push!(seen, token)
        length(seen) == 3 ? :stop : nothing
    end
    @test tokens == seen && length(seen) == 3
    @test thrown(() -> generate(_ -> throw(Enough(2)), model, [1])) === Enough(2)
    # While tokens are sampled, the model is in use.
    busy = status_of(() -> generate(_ -> tensors(model)["transformer.ln_f.bias"], model, [1]))
    @test busy == Lib.MXT_ERROR_BUSY
    @test status_of(() -> generate(model, Int[])) == Lib.MXT_ERROR_INVALID_ARGUMENT
end

@testset "log" begin
    lines = Tuple{Symbol,String}[]
    armed = false
    log = function (level, line)
        armed && throw(Enough(9))
        push!(lines, (level, line))
    end
    engine = new_engine(log = log)
    model = Model(engine; SMALL...)
    close(engine)
    GC.gc()
    trainer = new_trainer(model)
    @test length(lines) >= 3 && all(level === :info for (level, _) in lines)
    armed = true
    @test thrown(() -> new_trainer(model)) === Enough(9)
    armed = false
    @test steps_done(trainer) == 0
end

@testset "tasks" begin
    losses = map(1:2) do _
        Threads.@spawn begin
            trainer = new_trainer()
            # A callback may wait.
            run!((_, _) -> (yield(); nothing), trainer, new_dataset(); steps = 5).last_loss
        end
    end
    @test length(unique(fetch.(losses))) == 1
end
