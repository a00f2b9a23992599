# Needs the library: see MXFP4TRAIN_LIBRARY in the package's documentation.
using MXFP4Train
using MXFP4Train: Lib, load, save
using Serialization: serialize
using Test

# Whether all is tested, or what calls back alone, which another level of the optimizer may break.
const IS_WHOLE = get(ENV, "MXFP4TRAIN_TESTS", "all") == "all"

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

# Its name in newer versions of Julia, and in older ones.
const exception_stack =
    isdefined(Base, :current_exceptions) ? Base.current_exceptions : Base.catch_stack

# Whether `f` throws a `T` whose message has `text`.
function refuses(f, ::Type{T}, text) where {T}
    exception = thrown(f)
    return exception isa T && occursin(text, sprint(showerror, exception))
end

const WTE = "transformer.wte.weight"
const LN = "transformer.ln_f.weight"

struct Enough <: Exception
    step::Int
end

struct Recorder
    steps::Vector{Int}
end

(recorder::Recorder)(step, _) = push!(recorder.steps, step.step)

IS_WHOLE && @testset "library" begin
    @test MXFP4Train.version() isa VersionNumber
    @test startswith(MXFP4Train.build_info(), "{")
    @test Lib.mxt_abi_version() == Lib.MXT_ABI_VERSION
end

IS_WHOLE && @testset "errors" begin
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
    engine, model = new_engine(), new_model()
    @test refuses(() -> Model(engine; leyers = 2), ArgumentError, "leyers")
    @test refuses(() -> Model(engine; struct_size = 2), ArgumentError, "struct_size")
    @test refuses(() -> Trainer(model; schedule = :sometimes), ArgumentError, "sometimes")
    @test refuses(() -> Trainer(model; schedule = "cosine"), ArgumentError, "schedule")
    # What does not fit into C's number names the option.
    for wrong in (-1, 2.5, big(2)^64, NaN, "2", nothing)
        @test refuses(() -> Model(engine; layers = wrong), ArgumentError, "layers: expected")
        @test refuses(() -> Trainer(model; warmup_steps = wrong), ArgumentError, "warmup_steps: ")
        @test refuses(() -> generate(model, [1]; max_tokens = wrong), ArgumentError, "max_tokens: ")
    end
    @test refuses(() -> Trainer(model; lr = "1e-3"), ArgumentError, "lr: expected a number")
    @test refuses(() -> new_engine(seed = -1), ArgumentError, "seed: ")
    @test refuses(() -> plan(engine; model = (heads = -3,)), ArgumentError, "heads: ")
    @test config(Model(engine; SMALL..., layers = 1.0)).layers == 1
    @test isopen(new_engine(seed = typemax(UInt64)))
    # Text: a zero character is refused, all others arrive.
    @test refuses(() -> Dataset("x"; token_type = :u64), ArgumentError, "token_type: ")
    @test refuses(() -> Dataset("zero\0byte"), ArgumentError, "pattern: ")
    @test refuses(() -> Dataset(["a", "zero\0byte"]), ArgumentError, "paths: ")
    @test refuses(() -> new_engine(device = "c\0pu"), ArgumentError, "device: ")
    @test refuses(() -> Trainer(model; recipe = "b\0f16"), ArgumentError, "recipe: ")
    @test refuses(() -> save(model, "a\0b"), ArgumentError, "folder: ")
    @test refuses(() -> load(Model, engine, "a\0b"), ArgumentError, "folder: ")
    @test refuses(() -> Model(engine, "out"), MethodError, "Model")
    @test status_of(() -> new_engine(device = "\xff")) == Lib.MXT_ERROR_UTF8
    mktempdir() do folder
        # A part of a string is not a `String`.
        path = chop("<" * joinpath(folder, "Größe 数") * ">"; head = 1, tail = 1)
        save(model, path)
        @test tensors(load(Model, engine, path))[LN] == ones(16)
        for weights in (:f16, :bf16, :mxfp4)
            save(model, path; weights = weights)
            found = tensors(load(Model, engine, path))["transformer.h.0.mlp.c_fc.weight"]
            exact = tensors(model)["transformer.h.0.mlp.c_fc.weight"]
            @test 0 < maximum(abs.(found .- exact)) < 0.05
        end
        @test refuses(() -> save(model, path; weights = :fp8), ArgumentError, "weights: expected")
    end
    # No stream on a CPU.
    @test status_of(() -> new_engine(cuda_stream = Ptr{Int}(8))) == Lib.MXT_ERROR_INVALID_ARGUMENT
    @test isopen(new_engine(cuda_stream = C_NULL))
end

IS_WHOLE && @testset "names" begin
    # Too many packages export these.
    @test isempty(intersect(names(MXFP4Train), (:load, :save, :memory, :rank, :ranks)))
end

IS_WHOLE && @testset "lifetimes" begin
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
    @test clear_stop(trainer) === nothing
    @test request_stop(trainer) === nothing
    other = new_trainer()
    objects = (new_engine(), new_model(), new_dataset(), new_trainer())
    for object in objects
        kind = string(nameof(typeof(object)))
        @test startswith(sprint(show, object), kind * "(")
        # Two objects with one handle would free it twice.
        @test refuses(() -> deepcopy(object), ArgumentError, kind)
        @test refuses(() -> deepcopy(Dict(1 => [object])), ArgumentError, "checkpoint")
        @test refuses(() -> serialize(IOBuffer(), object), ArgumentError, kind)
        @test_throws MethodError copy(object)
        close(object)
        @test sprint(show, object) == kind * "(closed)"
    end
    engine, model, dataset, trainer = objects
    for use in (
        () -> Model(engine; SMALL...),
        () -> load(Model, engine, "x"),
        () -> load(Trainer, engine, "x"),
        () -> plan(engine),
        () -> Trainer(model),
        () -> config(model),
        () -> save(model, "x"),
        () -> generate(model, [1]),
        () -> next_logits(model, [1]),
        () -> max_token(dataset),
        () -> step!(other, dataset),
        () -> evaluate!(other, dataset),
        () -> run!(other, dataset; steps = 1),
        () -> run!(other, new_dataset(); steps = 1, eval_dataset = dataset),
        () -> step!(trainer, new_dataset()),
        () -> step!(trainer, zeros(Int, 17, 2)),
        () -> forward_backward!(trainer, zeros(Int, 16, 2), zeros(Int, 16, 2)),
        () -> forward_backward!((_...) -> nothing, trainer, zeros(Int, 16, 2)),
        () -> update!(trainer),
        () -> zero_gradients!(trainer),
        () -> scale_gradients!(trainer, 2),
        () -> scale_gradients!(trainer, WTE, 2),
        () -> gradients(trainer),
        () -> evaluate!(trainer, new_dataset()),
        () -> run!(trainer, new_dataset(); steps = 1),
        () -> options(trainer),
        () -> save(trainer, "x"),
        () -> Snapshot(trainer),
        () -> set_sharpness!(trainer, 1e-3),
        () -> watch_updates!(trainer, 1),
        () -> tensor_update(trainer, WTE),
        () -> watch_weights!(trainer, 1),
        () -> weight_metrics(trainer),
        () -> weight_metrics(trainer, WTE),
        () -> set_lr!(trainer, 1),
        () -> use_schedule!(trainer),
        () -> Model(trainer),
    )
        @test status_of(use) == Lib.MXT_ERROR_NULL
    end
    @test length(dataset) == steps_done(trainer) == parameter_count(model) == 0
    @test MXFP4Train.rank(engine) == MXFP4Train.ranks(engine) == 0
    @test isempty(dataset) && isempty(collect(dataset)) && isempty(tensors(model))
    @test_throws BoundsError dataset[1]
    @test steps_done(other) == 0
end

IS_WHOLE && @testset "closed by one thread, used by another" begin
    bytes = UInt16[i % 29 for i in 1:4000]
    mktempdir() do folder
        path = joinpath(folder, "tokens.bin")
        write(path, bytes)
        for round in 1:200
            dataset = Dataset(path)
            read() = thrown(() -> max_token(dataset)) isa Union{Nothing,MXFP4Error}
            user = Threads.@spawn all(_ -> read(), 1:400)
            # Sooner or later while the other thread reads.
            foreach(_ -> read(), 1:round)
            close(dataset)
            @test fetch(user) && !isopen(dataset)
        end
    end
end

IS_WHOLE && @testset "model and tensors" begin
    model = new_model()
    @test config(model).channels == 16 && config(model).layers == 1
    @test config(model).tied_head && config(model).activation === :gelu_tanh
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
    # What is assigned by broadcasting arrives in the model, too.
    weights[name] .= 3
    @test weights[name] == fill(3, 16)
    weights[name] .+= 1:16
    @test tensors(model)[name] == 4:19
    weights[WTE] .= weights[WTE] .* 0 .+ (1:16)
    @test all(column == 1:16 for column in eachcol(weights[WTE]))
    @test_throws DimensionMismatch weights[name] .= zeros(3)
    @test_throws KeyError weights["no.such"] .= 0
    @test refuses(() -> weights[name] = 0, ArgumentError, name)
    # Other memory and other numbers than a `Matrix{Float32}`.
    matrix = reshape(collect(1.0:512.0), 32, 16)
    weights[WTE] = transpose(matrix)
    @test weights[WTE] == matrix'
    weights[WTE] = view([matrix matrix]', 1:16, 1:32)
    @test weights[WTE] == matrix'
    weights[WTE] = trunc.(Int, matrix')
    @test weights[WTE] == matrix'
    @test_throws DimensionMismatch weights[WTE] = matrix
    @test status_of(() -> weights[name] .= NaN) == Lib.MXT_ERROR_NOT_FINITE
    weights[name] = values
    @test occursin("16×32", sprint(show, MIME"text/plain"(), weights))
    needed = plan(new_engine(); model = SMALL, trainer = (batch_size = 2, recipe = "bf16"))
    @test needed.total > needed.weights > 0
    mktempdir() do folder
        save(model, folder)
        @test tensors(load(Model, new_engine(), folder))[name] == values
    end
end

IS_WHOLE && @testset "Llamas" begin
    # Nothing in it is what a default or another number says, too.
    llama = (;
        SMALL...,
        architecture = :llama,
        layers = 2,
        heads = 4,
        kv_heads = 2,
        head_size = 6,
        mlp_channels = 20,
        tied_head = false,
        qk_norm = true,
        rope_theta = 5e5,
        rope_scaling = :llama3,
        rope_factor = 8,
        rope_low_frequency = 0.5,
        rope_high_frequency = 3,
        rope_original_context = 9,
    )
    model, engine = Model(new_engine(); llama...), new_engine()
    shape = config(model)
    @test all(getfield(shape, name) == getfield(llama, name) for name in keys(llama))
    @test shape.qkv_bias === false && config(Model(engine; shape...)) == shape
    plain = config(Model(engine; SMALL..., architecture = :llama, qkv_bias = true))
    @test plain.qkv_bias && plain.kv_heads == plain.head_size == plain.mlp_channels == 0
    @test plain.rope_theta == 10000 && plain.rope_scaling === :none
    @test config(new_model()).architecture === :gpt2

    # The rows of parts are columns here.
    weights = tensors(model)
    attention, mlp = "model.layers.0.self_attn.", "model.layers.1.mlp."
    q, k, v = (weights["$(attention)$(name)_proj.weight"] for name in "qkv")
    @test size(q) == (16, 24) && size(k) == size(v) == (16, 12)
    @test hcat(q, k, v) == weights[attention * "qkv_proj.weight"]
    gate, up = weights[mlp * "gate_proj.weight"], weights[mlp * "up_proj.weight"]
    @test size(gate) == (16, 20) && hcat(gate, up) == weights[mlp * "gate_up_proj.weight"]
    of_k = attention * "k_proj.weight"
    @test haskey(weights, of_k) && !(of_k in keys(weights))
    @test sum(length(weights[name]) for name in keys(weights)) == parameter_count(model)
    weights[of_k] .= 1
    @test weights[attention * "qkv_proj.weight"] == hcat(q, ones(16, 12), v)
    weights[of_k] = k
    @test_throws DimensionMismatch weights[of_k] = q
    @test_throws KeyError weights["model.layers.2.mlp.up_proj.weight"]
    @test_throws KeyError weights[attention * "q_proj.bias"]

    trainer, data = Trainer(model; batch_size = 2, lr = 1e-2), new_dataset()
    losses = [step!(trainer, data).loss for _ in 1:20]
    @test losses[end] < losses[1]
    @test size(gradients(trainer)[of_k]) == (16, 12) && any(!=(0), gradients(trainer)[of_k])
    gradients(trainer)[of_k] = ones(16, 12)
    @test gradients(trainer)[of_k] == ones(16, 12)
    frozen = Trainer(model; batch_size = 2, frozen = "*.qkv_proj.*")
    step!(frozen, data)
    @test !haskey(gradients(frozen), of_k) && haskey(gradients(frozen), mlp * "up_proj.weight")
    text = generate(model, [1, 2, 3]; max_tokens = 5, temperature = 0)
    @test length(text) == 5 && text[1] == argmax(next_logits(model, [1, 2, 3])) - 1
    @test size(tensors(with_lora(model; rank = 2))[attention * "qkv_proj.lora_B.weight"]) == (2, 48)
    mktempdir() do folder
        save(model, folder)
        again = load(Model, engine, folder)
        @test config(again) == shape && tensors(again)[of_k] == tensors(model)[of_k]
    end
    oracle = load(Model, engine, joinpath(@__DIR__, "../../../tests/oracle/qwen2-odd"))
    @test config(oracle).architecture === :llama && config(oracle).qkv_bias
    @test config(oracle).rope_theta == 1e6 && config(oracle).kv_heads == 1
    @test size(tensors(oracle)[attention * "k_proj.bias"]) == (8,)

    for (change, field) in (
        (kv_heads = 3,) => "kv_heads",
        (head_size = 5,) => "head_size",
        (qkv_bias = true,) => "qkv_bias",
        (rope_theta = 0,) => "rope_theta",
        (rope_factor = 0.5,) => "rope_factor",
        (rope_low_frequency = 3,) => "rope_high_frequency",
        (architecture = :gpt2,) => "architecture llama",
    )
        @test refuses(() -> Model(engine; llama..., change...), MXFP4Error, field)
    end
    @test refuses(() -> Model(engine; architecture = :bert), ArgumentError, "architecture: exp")
    @test refuses(() -> Model(engine; rope_scaling = :yarn), ArgumentError, "rope_scaling: exp")
    @test refuses(() -> Model(engine; kv_heads = -1), ArgumentError, "kv_heads: expected a whole")
end

IS_WHOLE && @testset "adapters and frozen tensors" begin
    base, data = new_model(), new_dataset()
    adapted = with_lora(base; rank = 3, layers = ("attn.c_attn", "mlp.c_proj"))
    shape = config(adapted)
    @test shape.lora_rank == 3 && shape.lora_alpha == 6
    @test shape.lora_layers == ["attn.c_attn", "mlp.c_proj"] && isempty(config(base).lora_layers)
    trainer = Trainer(adapted; batch_size = 2, lr = 1e-2)
    foreach(_ -> step!(trainer, data), 1:3)
    name, of_b = "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.lora_B.weight"
    @test tensors(adapted)[name] == tensors(base)[name] && any(!=(0), tensors(adapted)[of_b])
    mktempdir() do folder
        save_lora(adapted, folder)
        again = load_lora(base, folder)
        @test tensors(again)[of_b] == tensors(adapted)[of_b]
        kept = Dict{String,Vector{UInt8}}()
        save_lora(adapted, kept)
        @test kept["adapter_model.safetensors"] == read(joinpath(folder, "adapter_model.safetensors"))
        @test tensors(load_lora(base, kept))[of_b] == tensors(adapted)[of_b]
        @test tensors(merge_lora(again))[name] != tensors(base)[name]
    end
    @test_throws ArgumentError with_lora(base; layers = ("c_attn",))
    @test_throws ArgumentError with_lora(base; layers = ())
    @test status_of(() -> with_lora(base; rank = 0)) == Lib.MXT_ERROR_INVALID_ARGUMENT
    @test status_of(() -> merge_lora(base)) == Lib.MXT_ERROR_INVALID_ARGUMENT
    needed = plan(new_engine(); model = (; SMALL..., lora_rank = 2), trainer = (batch_size = 2,))
    @test needed.gradients < plan(new_engine(); model = SMALL, trainer = (batch_size = 2,)).gradients

    frozen = Trainer(base; batch_size = 2, lr = 1e-2, frozen = "transformer.h.*")
    before = tensors(base)[name]
    step!(frozen, data)
    @test tensors(base)[name] == before && options(frozen).frozen == "transformer.h.*"
    @test !haskey(gradients(frozen), name) && haskey(gradients(frozen), WTE)
    @test length(collect(gradients(frozen))) == length(gradients(frozen)) > 0
end

IS_WHOLE && @testset "dataset" begin
    tokens = [(i * i + i ÷ 7) % 29 for i in 0:3999]
    dataset = new_dataset()
    @test length(dataset) == 4000 && max_token(dataset) == 28
    @test dataset[1] == tokens[1] && dataset[end] == tokens[end] && dataset[4000] isa Int
    @test dataset[11:20] == tokens[11:20] && dataset[[3, 1, 2]] == tokens[[3, 1, 2]]
    @test_throws ArgumentError dataset[trues(3)]
    @test dataset[:] == tokens && dataset[2:7:end] == tokens[2:7:end] && dataset[5:4] == Int[]
    for place in (0, 4001, -1, typemin(Int), typemax(Int), 0:3, 3999:4001)
        @test_throws BoundsError dataset[place]
    end
    @test collect(dataset) == tokens && eltype(dataset) == Int && sum(dataset) == sum(tokens)
    @test [place for place in eachindex(dataset)] == 1:4000
    mktempdir() do folder
        paths = [joinpath(folder, "$part.bin") for part in ("a", "b")]
        foreach(path -> write(path, UInt16[1, 2, 3, 4]), paths)
        @test length(Dataset(paths)) == 8
        @test length(Dataset(paths; token_type = :u8)) == 16
        @test length(Dataset(first(paths); token_type = :u32)) == 2
        @test coverage(Dataset(paths), 8).short_files == 2
        @test length(Dataset(joinpath(folder, "*.bin"))) == 8
        @test Dataset(paths)[3:6] == [3, 4, 1, 2]
        # More than what one call reads.
        write(paths[1], UInt16[i % 50_000 for i in 1:100_000])
        @test collect(Dataset(paths[1])) == [i % 50_000 for i in 1:100_000]
    end
    # Other memory and other numbers.
    @test Dataset(view(tokens, 1:2:9))[:] == tokens[1:2:9]
    @test Dataset(UInt8[1, 255])[:] == [1, 255] && Dataset(3:5)[:] == 3:5
    @test Dataset([typemax(UInt32)])[1] == 2^32 - 1
    @test refuses(() -> Dataset([1, -1]), ArgumentError, "got -1 at place 2")
    @test refuses(() -> Dataset([2^32]), ArgumentError, "4294967296")
    @test status_of(() -> Dataset(Int[])) == Lib.MXT_ERROR_INVALID_ARGUMENT
end

# A dataset of tokens that nothing else keeps, with what the collector does with them.
@noinline function of_garbage(lent, events)
    dataset = lent(finalizer(_ -> push!(events, :tokens), UInt16[i % 29 for i in 1:4000]))
    return finalizer(_ -> push!(events, :dataset), dataset)
end

IS_WHOLE && @testset "tokens that are not copied" begin
    tokens = new_dataset()[:]
    copied = new_trainer()
    expected = [stats.loss for stats in steps(copied, new_dataset(), 3)]
    for T in (UInt16, UInt32)
        memory = T.(tokens)
        around = [T[9, 9, 9]; memory; T[30]]
        for given in (memory, view(around, 4:4003), view(view(around, 2:4003), 3:4002), view(memory, :))
            dataset, trainer = Dataset(given; copy = false), new_trainer()
            @test [stats.loss for stats in steps(trainer, dataset, 3)] == expected
            @test dataset[:] == tokens && length(dataset) == 4000 && max_token(dataset) == 28
            @test sprint(show, dataset) == "Dataset(4000 tokens)"
        end
        # Where they are, and in a copy.
        lent, own = Dataset(memory; copy = false), Dataset(memory)
        memory[7] = 31
        @test lent[7] == 31 && own[7] == tokens[7]
        # To grow is an error, or goes on without the dataset.
        thrown(() -> append!(memory, zeros(T, 100_000)))
        thrown(() -> empty!(memory))
        GC.gc()
        @test lent[8:end] == tokens[8:end]
        close(lent)
        @test thrown(() -> lent[1]) isa BoundsError
    end
    # They live as long as the dataset, and no longer.
    events = Symbol[]
    dataset = of_garbage(tokens -> Dataset(tokens; copy = false), events)
    foreach(_ -> GC.gc(), 1:3)
    @test isempty(events) && dataset[:] == [i % 29 for i in 1:4000]
    close(dataset)
    foreach(_ -> GC.gc(), 1:3)
    @test events == [:tokens] && !isopen(dataset)
    foreach(_ -> (of_garbage(tokens -> Dataset(tokens; copy = false), events); GC.gc()), 1:3)
    foreach(_ -> GC.gc(), 1:3)
    @test count(==(:tokens), events) == 4 && count(==(:dataset), events) == 3
    for wrong in (tokens, UInt8[1, 2], 1:2, view(UInt16[1, 2, 3], 1:2:3), view(UInt16[1 2; 3 4], :, 1))
        @test refuses(() -> Dataset(wrong; copy = false), ArgumentError, "copy: expected a Vector of")
    end
    @test status_of(() -> Dataset(UInt16[]; copy = false)) == Lib.MXT_ERROR_INVALID_ARGUMENT
    # What is no token of the model.
    wide = Dataset(UInt32[i % 40 for i in 1:4000]; copy = false)
    @test max_token(wide) == 39
    @test status_of(() -> step!(copied, wide)) == Lib.MXT_ERROR_TOKEN_RANGE
end

IS_WHOLE && @testset "steps, save and load" begin
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
    # A transposed matrix has as many numbers, and would train on something else.
    @test refuses(() -> step!(trainer, tokens'), DimensionMismatch, "17×2")
    @test refuses(() -> step!(trainer, tokens'), DimensionMismatch, "permutedims")
    @test refuses(() -> step!(trainer, tokens[:, 1:1]), DimensionMismatch, "got 17×1")
    @test refuses(() -> step!(trainer, -tokens .- 1), ArgumentError, "tokens: ")
    @test refuses(() -> steps(trainer, dataset, -1), ArgumentError, "count: ")
    @test refuses(() -> evaluate!(trainer, dataset; max_batches = -1), ArgumentError, "max_batches")
    # Numbers are signed: they print as decimals and do not wrap.
    stats = step!(trainer, view(hcat(tokens, tokens), :, 1:2))
    @test stats.step isa Int && stats.tokens isa Int && stats.raised_blocks isa Int
    @test stats.step - 100 < 0 && occursin("tokens = 32,", string(stats))
    @test evaluate!(trainer, dataset; max_batches = 1).tokens isa Int
    @test all(value isa Int for value in values(plan(new_engine(); model = SMALL)))
    many = Trainer(new_model(); schedule = :cosine, total_steps = typemax(UInt64))
    @test options(many).total_steps == typemax(Int)
    @test all(isa(config(new_model())[name], Int) for name in (:layers, :heads, :channels))
    # Views and transposes have the tokens of their own order.
    twins = map((copy(tokens), view([tokens; tokens], 18:34, :), permutedims(tokens)')) do matrix
        step!(new_trainer(), matrix).loss
    end
    @test length(unique(twins)) == 1
    plain = evaluate!(trainer, dataset; max_batches = 1)
    @test isnan(plain.sharpness) && isnan(plain.logit_amax)
    set_sharpness!(trainer, 5e-4)
    sharp = evaluate!(trainer, dataset; max_batches = 1)
    @test sharp.loss == plain.loss && sharp.sharpness > 0 && sharp.sharpness_epsilon == 5.0f-4
    set_sharpness!(trainer, 0)
    @test isnan(plain.spared_products) && isnan(plain.spared_all)
    merging = Trainer(new_model(); recipe = "bf16,haste=1", batch_size = 2)
    spared = evaluate!(merging, dataset; max_batches = 1)
    # Hashes of one bit leave two of 16 channels or more.
    @test 1 - 2 / 16 <= spared.spared_products < 1 && spared.spared_all < spared.spared_products
    set_lr!(trainer, 1e-3)
    @test step!(trainer, dataset).lr == 1.0f-3
    use_schedule!(trainer)
    @test step!(trainer, dataset).lr == 1.0f-2
    set_schedule!(trainer; schedule = :linear, lr = 4e-3, total_steps = 4)
    @test schedule_start(trainer) == steps_done(trainer)
    @test step!(trainer, dataset).lr == 4.0f-3 && step!(trainer, dataset).lr == 3.0f-3
    @test thrown(() -> set_schedule!(trainer; clip = 1)) isa ArgumentError
    set_schedule!(trainer; lr = 1e-2)
    made_from = options(trainer)
    @test made_from.recipe == "mxfp4-rht-sr" && made_from.schedule === :constant
    switched = Trainer(new_model(); batch_size = 2, recipe = "mxfp4-rht,range=3/4")
    @test isfinite(step!(switched, tokens).loss) && options(switched).recipe == "mxfp4-rht,range=3/4"
    @test made_from.optimizer == "adamw"
    stable = Trainer(new_model(); optimizer = "stable-adamw", clip = 0, batch_size = 2)
    @test options(stable).optimizer == "stable-adamw" && isfinite(step!(stable, dataset).loss)
    close(stable)
    @test refuses(() -> Trainer(new_model(); optimizer = "sgd"), MXFP4Error, "stable-adamw")
    deep = Model(new_engine(); SMALL..., layers = 3, context_length = 32)
    dropping = Trainer(deep; token_drop = "start=16,steps=50%", total_steps = 2, batch_size = 2)
    @test options(dropping).token_drop == "start=16,steps=50%" && isfinite(step!(dropping, dataset).loss)
    @test made_from.token_drop === nothing
    @test refuses(() -> Trainer(deep; token_drop = "16"), MXFP4Error, "token_drop: expected start=N")
    mktempdir() do folder
        save(trainer, folder)
        resumed = load(Trainer, new_engine(), folder)
        @test step!(resumed, dataset).loss == step!(trainer, dataset).loss
    end
    # What the trainer was, whatever it does since.
    snapshot = Snapshot(trainer)
    mktempdir() do folder
        for _ in 1:2
            loss = step!(trainer, dataset).loss
            @test save(snapshot, folder) === nothing
            @test step!(load(Trainer, new_engine(), folder), dataset).loss == loss
            @test renew!(snapshot, trainer) === snapshot
        end
    end
    close(snapshot)
    @test sprint(show, snapshot) == "Snapshot(closed)"
    @test status_of(() -> save(snapshot, "x")) == Lib.MXT_ERROR_NULL
    of_trainer = Model(trainer)
    before = tensors(of_trainer)["transformer.ln_f.weight"]
    step!(trainer, dataset)
    @test tensors(of_trainer)["transformer.ln_f.weight"] != before
end

# Windows of a batch of `new_trainer()`, and their inputs and targets.
windows(seed, columns = 2) = [(i * i + seed * (i + 5j)) % 29 for i in 1:17, j in 1:columns]
inputs(windows) = windows[1:(end - 1), :]
targets(windows) = windows[2:end, :]

# Those of its results that are bits.
bits(stats) = (stats.step, stats.loss, stats.grad_norm, stats.tokens, stats.raised_blocks)

# Cross-entropy with label smoothing, as a program writes it.
function smoothed(targets, smoothing)
    return function (logits, losses, places)
        for (column, place) in enumerate(places)
            logit = view(logits, :, column)
            log_p = logit .- maximum(logit)
            log_p .-= log(sum(exp, log_p))
            wanted = fill(Float32(smoothing / length(logit)), length(logit))
            targets[place] == IGNORED || (wanted[targets[place] + 1] += 1 - smoothing)
            losses[column] = -sum(wanted .* log_p)
            logit .= exp.(log_p) .- wanted
        end
    end
end

# A store in a dictionary, whose call number `fails_at` throws; what happened, in `log`.
mutable struct Burning
    files::Dict{String,Vector{UInt8}}
    calls::Int
    fails_at::Int
    log::Vector{Symbol}
end

Burning() = Burning(Dict(), 0, 0, Symbol[])

function burn(of::Burning, what)
    of.calls += 1
    push!(of.log, what)
    of.calls == of.fails_at && throw(Enough(of.calls))
    return nothing
end

# What is written, after it is closed.
mutable struct Kept <: IO
    of::Burning
    name::String
    bytes::Vector{UInt8}
end

function Base.unsafe_write(io::Kept, from::Ptr{UInt8}, count::UInt)
    burn(io.of, :write)
    append!(io.bytes, unsafe_wrap(Vector{UInt8}, from, count))
    return Int(count)
end

Base.close(io::Kept) = burn(io.of, :close)

function store_of(of::Burning)
    fresh = Dict{String,Kept}()
    return MXFP4Train.FileStore(
        open = function (name)
            burn(of, :open)
            return haskey(of.files, name) ? IOBuffer(of.files[name]) : nothing
        end,
        begin_save = () -> (burn(of, :begin); empty!(fresh)),
        create = function (name, size)
            burn(of, :create)
            return fresh[name] = Kept(of, name, UInt8[])
        end,
        commit = function ()
            burn(of, :commit)
            of.files = Dict(name => kept.bytes for (name, kept) in fresh)
        end,
        abort = () -> (push!(of.log, :abort); empty!(fresh)),
    )
end

@testset "files without a folder" begin
    trainer, dataset = new_trainer(), new_dataset()
    step!(trainer, dataset)
    files = Dict{String,Any}("tokenizer.json" => UInt8[1])
    save(trainer, files)
    of_folder = mktempdir() do folder
        save(trainer, folder)
        Dict(name => read(joinpath(folder, name)) for name in readdir(folder))
    end
    @test pop!(files, "tokenizer.json") == UInt8[1] && files == of_folder && length(files) == 4
    copied = Dict{String,Vector{UInt8}}()
    snapshot = Snapshot(trainer)
    save(snapshot, copied)
    @test copied == of_folder
    # A store, of which every call throws in turn.
    of = Burning()
    store = store_of(of)
    save(trainer, store)
    @test of.files == of_folder && of.log[1] === :begin && of.log[end] === :commit
    step!(trainer, dataset)
    failures = 0
    while true
        of.calls, of.fails_at, of.log = 0, failures + 1, Symbol[]
        exception = thrown(() -> save(trainer, store))
        exception === nothing && break
        failures += 1
        @test exception === Enough(failures) && of.files == of_folder
        @test of.log[end] === (failures == 1 ? :begin : :abort)
    end
    @test failures > 20 && of.log[end] === :commit && of.files != of_folder
    failures, of.files = 0, of_folder
    while true
        of.calls, of.fails_at = 0, failures + 1
        exception = thrown(() -> close(load(Trainer, new_engine(), store)))
        exception === nothing && break
        failures += 1
        @test exception === Enough(failures)
    end
    @test failures == 4
    # They go on from there.
    of.fails_at = 0
    straight = step!(load(Trainer, new_engine(), of_folder), dataset).loss
    @test step!(load(Trainer, new_engine(), store), dataset).loss == straight
    rounded = load(Trainer, new_engine(), of_folder; optimizer = "adamw,moments=int8")
    @test options(rounded).optimizer == "adamw,moments=int8"
    # A model alone: the training state would not fit.
    save(Model(trainer), files; weights = :bf16)
    @test sort(collect(keys(files))) == ["config.json", "model.safetensors"]
    @test config(load(Model, new_engine(), files)) == config(Model(trainer))
    @test status_of(() -> load(Trainer, new_engine(), files)) == Lib.MXT_ERROR_FORMAT
    @test status_of(() -> load(Model, new_engine(), Dict{String,Any}())) == Lib.MXT_ERROR_FORMAT
    @test refuses(() -> load(Model, new_engine(), Dict(1 => UInt8[])), ArgumentError, "names")
    # A run saves there, too.
    for place in (files, store)
        seen = Int[]
        ended = run!(trainer, dataset; steps = 2, save_every = 1, save_files = place) do _, _
            push!(seen, length(files))
        end
        @test ended.saved && seen == [4, 4]
        @test steps_done(load(Trainer, new_engine(), place)) == steps_done(trainer)
    end
    of.calls, of.fails_at, done = 0, 3, steps_done(trainer)
    @test thrown(() -> run!(trainer, dataset; steps = 9, save_every = 1, save_files = store)) ===
          Enough(3)
    @test steps_done(trainer) == done + 1
    # And it does where its callback throws; where it cannot, both are told.
    of.fails_at = 0
    ends(_, _) = throw(Enough(-1))
    for place in (files, store)
        @test thrown(() -> run!(ends, trainer, dataset; steps = 9, save_files = place)) ===
              Enough(-1)
        @test steps_done(load(Trainer, new_engine(), place)) == steps_done(trainer)
    end
    of.calls, of.fails_at = 0, 3
    mktemp() do file, _
        for place in ((save_files = store,), (save_dir = file,))
            told = try
                run!(ends, trainer, dataset; steps = 9, place...)
            catch
                first.(exception_stack())
            end
            @test told[end] === Enough(-1) && told[end - 1] isa MXFP4Error
        end
    end
    # What is closed is closed.
    save(Model(trainer), files)
    close(snapshot)
    @test status_of(() -> save(snapshot, files)) == Lib.MXT_ERROR_NULL
    @test sort(collect(keys(files))) == ["config.json", "model.safetensors"]
end

IS_WHOLE && @testset "memory in use" begin
    engine = new_engine()
    @test MXFP4Train.memory(engine).device_bytes == 0
    trainer = new_trainer(Model(engine; SMALL...))
    use = MXFP4Train.memory(engine)
    @test use.device_bytes == use.device_peak > 0 == use.host_bytes
    @test use.device_limit > use.device_bytes
    snapshot = Snapshot(trainer)
    @test MXFP4Train.memory(engine).host_bytes > 0
    close(snapshot)
    @test MXFP4Train.memory(engine).host_bytes == 0 < MXFP4Train.memory(engine).host_peak
end

@testset "a step in parts" begin
    # The bits of whole steps, with weights of 1 and without, from any memory and of any numbers.
    for accumulation in (1, 3)
        how = (batch_size = 2, lr = 1e-2, accumulation = accumulation)
        whole, parts = Trainer(new_model(); how...), Trainer(new_model(); how...)
        for (seed, weights) in enumerate((nothing, ones(16, 2), trues(16, 2), ones(Int, 2, 16)'))
            rows, losses, sum_of_losses = windows(seed, 2accumulation), fill(NaN, 16, 2), 0.0
            expected = step!(whole, rows)
            for batch in 1:accumulation
                columns = view(rows, :, (2batch - 1):(2batch))
                given = (view(columns, 1:16, :), UInt16.(targets(columns)))
                @test forward_backward!(parts, given...; weights = weights, losses = losses) === nothing
                sum_of_losses += sum(losses)
            end
            found = update!(parts)
            @test bits(found) == bits(expected) && keys(found) == keys(expected)
            @test isapprox(sum_of_losses / (32accumulation), found.loss; rtol = 1e-5)
        end
        @test tensors(Model(parts))[WTE] == tensors(Model(whole))[WTE]
        @test steps_done(parts) == 4
    end

    # A mask of targets is one of weights, and what it hides does not matter.
    trainer, rows = new_trainer(), windows(3)
    mask = [i > 5j for i in 1:16, j in 1:2]
    losses = Matrix{Float32}(undef, 16, 2)
    @test IGNORED isa Int && IGNORED == typemax(UInt32)
    masked = ifelse.(mask, targets(rows), IGNORED)
    @test masked == replace(ifelse.(mask, Int32.(targets(rows)), Int32(-100)), -100 => IGNORED)
    forward_backward!(trainer, inputs(rows), UInt32.(masked); losses = losses)
    @test all((losses .> 0) .== mask)
    of_masked, mean_of_masked = gradients(trainer)[WTE], sum(losses) / count(mask)
    zero_gradients!(trainer)
    forward_backward!(trainer, inputs(rows), targets(rows); weights = mask, losses = losses)
    @test gradients(trainer)[WTE] == of_masked && all(losses .> 0)
    stats = update!(trainer)
    @test isapprox(stats.loss, mean_of_masked; rtol = 1e-5) && stats.tokens == 32
    # Another divisor is another mean; weights below 0 need one.
    for divisor in (count(mask), 2count(mask), nothing, 0)
        forward_backward!(trainer, inputs(rows), masked; losses = losses, divisor = divisor)
        part = something(divisor, 0) == 2count(mask) ? 2 : 1
        @test isapprox(update!(trainer).loss, sum(losses) / count(mask) / part; rtol = 1e-5)
    end
    forward_backward!(trainer, inputs(rows), masked; weights = .-mask)
    @test refuses(() -> update!(trainer), MXFP4Error, "pass a divisor")
    forward_backward!(trainer, inputs(rows), masked; weights = .-mask, divisor = 32)
    @test update!(trainer).loss < 0
    # A mean over nothing is none.
    forward_backward!(trainer, inputs(rows), fill(IGNORED, 16, 2); losses = losses)
    @test iszero(losses) && refuses(() -> gradients(trainer)[WTE], MXFP4Error, "divisor")
    @test refuses(() -> update!(trainer), MXFP4Error, "every target is ignored")
    @test refuses(() -> update!(trainer), MXFP4Error, "call forward_backward first")
end

@testset "documents that share a sequence" begin
    trainer, rows = new_trainer(), windows(3)
    documents = [i < 7 ? 9 : (i == 7 ? 0 : 4) for i in 1:16, j in 1:2]
    together, apart = fill(NaN, 16, 2), fill(NaN, 16, 2)
    evaluate!(trainer, inputs(rows), targets(rows); losses = together)
    evaluate!(trainer, inputs(rows), targets(rows); documents = documents, losses = apart)
    @test apart[1:6, :] == together[1:6, :] && all(apart[7:16, :] .!= together[7:16, :])
    for of in (7:7, 8:16)
        alone = Trainer(Model(trainer); batch_size = 2, sequence_length = length(of))
        found = fill(NaN, length(of), 2)
        evaluate!(alone, inputs(rows)[of, :], targets(rows)[of, :]; losses = found)
        @test found == apart[of, :]
    end
    forward_backward!(trainer, inputs(rows), targets(rows); documents = documents)
    @test isapprox(update!(trainer).loss, sum(apart) / 32; rtol = 1e-5)
    @test_throws DimensionMismatch forward_backward!(
        trainer, inputs(rows), targets(rows); documents = documents[1:15, :],
    )

    # A token ends them, too, and windows of the program have them.
    last = rows[6, 1]
    by_token = Trainer(new_model(); batch_size = 2, document_end = last)
    @test options(by_token).document_end === last && options(trainer).document_end === nothing
    @test !haskey(options(trainer), :has_document_end)
    given = Trainer(new_model(); batch_size = 2)
    numbers = vcat(zeros(Int, 1, 2), cumsum(rows[1:15, :] .== last; dims = 1))
    evaluation = evaluate!(given, inputs(rows), targets(rows); documents = numbers)
    @test evaluate!(by_token, inputs(rows), targets(rows)).loss == evaluation.loss
    @test evaluate!(given, inputs(rows), targets(rows)).loss != evaluation.loss
    dataset = Dataset(2; packed = true) do number, tokens, weights, documents
        @assert documents isa Vector{UInt32} && iszero(documents) && length(documents) == 16
        tokens .= rows[:, number]
        documents .= numbers[:, number]
    end
    @test isapprox(evaluate!(given, dataset).loss, evaluation.loss; rtol = 1e-6)
    @test step!(given, dataset).loss > 0
    too_large() = Trainer(new_model(); document_end = 32)
    @test refuses(too_large, MXFP4Error, "document_end")
    @test refuses(() -> Trainer(new_model(); document_end = -1), ArgumentError, "document_end: ")
end

@testset "losses of the program" begin
    # Without smoothing it is the library's own, up to rounding.
    own, trainer = [Trainer(new_model(); batch_size = 2, lr = 1e-2, recipe = "fp32") for _ in 1:2]
    for seed in 1:3
        rows = windows(seed)
        predicted = targets(rows)
        predicted[4:6, 2] .= IGNORED
        weights = [0.5 + i % 2 for i in 1:16, _ in 1:2]
        losses = [fill(NaN, 16, 2), fill(NaN, 16, 2)]
        forward_backward!(own, inputs(rows), predicted; weights = weights, losses = losses[1])
        loss = smoothed(predicted, 0)
        forward_backward!(loss, trainer, inputs(rows), predicted; weights = weights, losses = losses[2])
        @test isapprox(losses[1], losses[2]; rtol = 1e-5) && iszero(losses[2][4:6, 2])
        @test isapprox(gradients(own)[WTE], gradients(trainer)[WTE]; rtol = 1e-4)
        @test isapprox(update!(own).loss, update!(trainer).loss; rtol = 1e-5)
    end
    # With it, it learns; what it captures it may change, and the collector may be at work.
    rows, counted, places_of = windows(1), Int[], Int[]
    learned = map(1:40) do step
        smooth = smoothed(targets(rows), 0.1)
        forward_backward!(trainer, inputs(rows)) do logits, losses, places
            @assert logits isa Matrix{Float32} && losses isa Vector{Float32}
            @assert size(logits) == (32, length(places)) && length(losses) == length(places)
            append!(places_of, places)
            step % 10 == 0 && GC.gc()
            yield()
            smooth(logits, losses, places)
            push!(counted, step)
            return false
        end
        update!(trainer).loss
    end
    @test learned[end] < learned[1] - 0.5 && counted == 1:40 && places_of == repeat(1:32, 40)
    # Places go on where a part ends.
    wide = Model(new_engine(); SMALL..., vocab_size = 60_000, channels = 2)
    of_wide = Trainer(wide; batch_size = 10, recipe = "fp32")
    parts, squares = UnitRange{Int}[], fill(NaN, 16, 10)
    forward_backward!(of_wide, zeros(Int, 16, 10); losses = squares) do logits, losses, places
        push!(parts, places)
        losses .= places
        logits .= 0
    end
    @test length(parts) > 1 && vcat(parts...) == 1:160 && squares == reshape(1:160, 16, 10)
    stats = update!(of_wide)
    @test stats.grad_norm == 0 && isapprox(stats.loss, sum(1:160) / 160)

    # What a loss throws arrives, as does an answer that it may not give, and no batch waits any more.
    before = tensors(Model(trainer))[WTE]
    for (loss, is_expected) in (
        ((_...) -> throw(Enough(7)), error -> error === Enough(7)),
        ((_...) -> throw(InterruptException()), error -> error isa InterruptException),
        ((_...) -> :stop, error -> error.status == Lib.MXT_STOPPED),
        ((_...) -> :halt, error -> error isa ArgumentError && occursin(":halt", error.msg)),
        (() -> nothing, error -> error isa MethodError),
    )
        forward_backward!(trainer, inputs(rows), targets(rows))
        @test is_expected(thrown(() -> forward_backward!(loss, trainer, inputs(rows))))
        @test refuses(() -> update!(trainer), MXFP4Error, "call forward_backward first")
    end
    @test tensors(Model(trainer))[WTE] == before
    # The losses of a call that fails are not written.
    losses = fill(NaN, 16, 2)
    thrown(() -> forward_backward!((_...) -> throw(Enough(1)), trainer, inputs(rows); losses = losses))
    @test all(isnan, losses)
    # Meanwhile trainer and model are busy.
    inner = Int32[]
    forward_backward!(trainer, inputs(rows)) do logits, losses, places
        for use in (
            () -> update!(trainer),
            () -> zero_gradients!(trainer),
            () -> scale_gradients!(trainer, 2),
            () -> gradients(trainer)[WTE],
            () -> tensors(Model(trainer))[WTE] = before,
            () -> forward_backward!(trainer, inputs(rows), targets(rows)),
        )
            push!(inner, status_of(use))
        end
        # Others are not, whose exceptions stay there.
        thrown(() -> forward_backward!((_...) -> throw(Enough(1)), own, inputs(rows))) === Enough(1) ||
            throw(Enough(2))
        smoothed(targets(rows), 0)(logits, losses, places)
    end
    @test inner == fill(Lib.MXT_ERROR_BUSY, 6) && update!(trainer).loss > 0
    # A number that is not finite shows at the update.
    forward_backward!((logits, _, _) -> fill!(logits, NaN), trainer, inputs(rows))
    @test status_of(() -> update!(trainer)) == Lib.MXT_ERROR_NOT_FINITE
    @test step!(trainer, rows).loss > 0
    # Closed by its own loss.
    @test thrown(() -> forward_backward!((_...) -> close(trainer), trainer, inputs(rows))) === nothing
    @test !isopen(trainer)
end

@testset "what is ignored may be anything" begin
    rows = windows(2)
    predicted = targets(rows)
    predicted[4:6, 2] .= IGNORED
    weights = [i == 3 ? 0.0 : 0.5 for i in 1:16, _ in 1:2]
    hidden = (predicted .== IGNORED) .| (weights .== 0)
    found = map((0, NaN)) do wild
        trainer, losses = new_trainer(), fill(-1.0, 16, 2)
        of_ignored = ifelse.(predicted .== IGNORED, wild, weights)
        how = (weights = of_ignored, losses = losses)
        forward_backward!(trainer, inputs(rows), predicted; how...) do logits, losses, places
            @assert all(isnan, losses)
            smoothed(predicted, 0)(logits, losses, places)
            for (column, place) in enumerate(places)
                hidden[place] || continue
                losses[column] = wild
                logits[:, column] .= wild
            end
        end
        return losses[.!hidden], losses[4:6, 2], bits(update!(trainer)), tensors(Model(trainer))[WTE]
    end
    @test found[1] == found[2] && iszero(found[2][2])
    # The loss alone, with what waits beside.
    trainer, losses = new_trainer(), fill(-1.0, 16, 2)
    own = evaluate!(smoothed(predicted, 0), trainer, inputs(rows), predicted; weights = weights)
    forward_backward!(trainer, inputs(rows), predicted; weights = weights)
    alone = evaluate!(trainer, inputs(rows), predicted; weights = weights, losses = losses)
    @test isapprox(own.loss, alone.loss; rtol = 1e-5) && own.tokens == alone.tokens == count(.!hidden)
    @test iszero(losses[4:6, 2]) && all(losses[.!hidden] .> 0)
    @test isapprox(update!(trainer).loss, alone.loss; rtol = 1e-2)
    # A loss that is left out is no number.
    trainer = new_trainer()
    forward_backward!((logits, _, _) -> fill!(logits, 0), trainer, inputs(rows))
    @test refuses(() -> update!(trainer), MXFP4Error, "the loss of step 1")
    # A loss without targets needs a loss.
    nothing_wanted() = forward_backward!(nothing, trainer, inputs(rows))
    @test refuses(nothing_wanted, MXFP4Error, "pass what each position is to predict, or a loss")
end

# Window `number` of those that tests fill, and its weights.
window(number) = [(i * i + 3number * i + number) % 29 for i in 0:16]
factors(number) = [(0, 1, 0.5)[(i + number) % 3 + 1] for i in 1:16]

# `count` of them, each number of which is told to `seen`.
function new_windows(count; seen = Int[])
    return Dataset(count) do number, tokens, weights
        @assert number isa Int && tokens isa Vector{UInt32} && weights isa Vector{Float32}
        @assert length(tokens) == 17 && weights == ones(16)
        push!(seen, number)
        tokens .= window(number)
        weights .= factors(number)
    end
end

@testset "windows of the program" begin
    # The bits of batches with the same weights, each window once in an epoch, the collector at work.
    seen = Int[]
    dataset = new_windows(6; seen = seen)
    @test isempty(seen) && sprint(show, dataset) == "Dataset(windows)"
    by_windows, by_batches = [Trainer(new_model(); batch_size = 2, accumulation = 3) for _ in 1:2]
    epochs = map(1:3) do _
        stats = step!(by_windows, dataset)
        epoch = splice!(seen, 1:6)
        for batch in (epoch[1:2], epoch[3:4], epoch[5:6])
            rows, weights = hcat(window.(batch)...), hcat(factors.(batch)...)
            forward_backward!(by_batches, inputs(rows), targets(rows); weights = weights)
        end
        GC.gc()
        @test bits(stats) == bits(update!(by_batches)) && isempty(seen)
        return epoch
    end
    @test tensors(Model(by_windows))[WTE] == tensors(Model(by_batches))[WTE]
    @test all(sort(epoch) == 1:6 for epoch in epochs) && length(unique(epochs)) > 1
    # An evaluation asks for some spread evenly, and counts what has a weight.
    evaluation = evaluate!(by_windows, dataset)
    counted = sum(count(!iszero, factors(number)) for number in 1:6)
    @test evaluation.tokens === counted && evaluation.loss > 0 && seen == 1:6
    empty!(seen)
    evaluate!(by_windows, dataset; max_batches = 1)
    @test seen == [1, 4]
    # A run that is loaded goes on as if it had never stopped.
    mktempdir() do folder
        result = run!(by_windows, dataset; steps = 3, eval_dataset = dataset, save_dir = folder)
        @test result.saved && result.last_eval_loss > 0 && result.eval_errors == 0
        loaded = load(Trainer, new_engine(), folder)
        @test bits(step!(loaded, dataset)) == bits(step!(by_windows, dataset))
    end
    # There are no tokens in a row.
    @test length(dataset) == 0 && isempty(collect(dataset)) && isempty(dataset[:])
    @test coverage(dataset, 16).windows == 6
    @test_throws BoundsError dataset[1]
    @test status_of(() -> max_token(dataset)) == Lib.MXT_ERROR_UNSUPPORTED
    @test status_of(() -> new_windows(0)) == Lib.MXT_ERROR_INVALID_ARGUMENT
    @test refuses(() -> new_windows(-1), ArgumentError, "count: ")

    # What goes wrong while one is filled arrives, and the trainer is as before.
    trainer = Trainer(new_model(); batch_size = 2)
    broken = nothing
    breaking = Dataset(6) do number, tokens, weights
        tokens .= window(number)
        yield()
        GC.gc(false)
        return broken === nothing ? broken : broken(tokens, weights)
    end
    for (breaks, is_expected) in (
        ((_, _) -> throw(Enough(7)), error -> error === Enough(7)),
        ((_, _) -> throw(InterruptException()), error -> error isa InterruptException),
        ((_, _) -> :stop, error -> error.status == Lib.MXT_ERROR_IO),
        ((_, _) -> :halt, error -> error isa ArgumentError && occursin(":halt", error.msg)),
        ((tokens, _) -> tokens[1] = -1, error -> error isa InexactError),
        ((tokens, _) -> tokens[18] = 0, error -> error isa BoundsError),
        ((tokens, _) -> tokens[1] = 32, error -> error.status == Lib.MXT_ERROR_TOKEN_RANGE),
        ((_, weights) -> weights[3] = NaN, error -> error.status == Lib.MXT_ERROR_NOT_FINITE),
        ((_, weights) -> weights[3] = -1, error -> error.status == Lib.MXT_ERROR_INVALID_ARGUMENT),
        (() -> nothing, error -> error isa MethodError),
    )
        broken = breaks
        @test is_expected(thrown(() -> step!(trainer, breaking)))
        @test is_expected(thrown(() -> evaluate!(trainer, breaking)))
        broken = nothing
        @test step!(trainer, breaking).step == steps_done(trainer)
    end
    @test steps_done(trainer) == 10
    # Nothing is learned of windows that do not count, and there is no mean over them.
    broken = (_, weights) -> fill!(weights, 0)
    @test step!(trainer, breaking).loss == 0
    @test status_of(() -> evaluate!(trainer, breaking)) == Lib.MXT_ERROR_INVALID_ARGUMENT
    broken = nothing
    # A run saves the steps before.
    mktempdir() do folder
        error = thrown() do
            run!(trainer, breaking; steps = 9, save_dir = folder) do step, _
                step.step == 13 && (broken = (_, _) -> throw(Enough(13)))
            end
        end
        @test error === Enough(13) && steps_done(trainer) == 13
        @test steps_done(load(Trainer, new_engine(), folder)) == 13
        # One in an evaluation ends it, too.
        error = thrown() do
            how = (eval_dataset = breaking, eval_every = 2, save_dir = folder)
            run!(trainer, new_windows(6); steps = 9, how...)
        end
        @test error === Enough(13) && steps_done(trainer) == 14
        @test steps_done(load(Trainer, new_engine(), folder)) == 14
    end
    # Meanwhile trainer and model are busy, and others are not.
    inner, other = Int32[], new_trainer()
    broken = function (_, _)
        foreach((() -> step!(trainer, dataset), () -> tensors(Model(trainer))[WTE] .= 0)) do use
            push!(inner, status_of(use))
        end
        thrown(() -> step!(other, Dataset((_...) -> throw(Enough(1)), 2))) === Enough(1) ||
            throw(Enough(2))
        step!(other, dataset)
    end
    @test step!(trainer, breaking).loss > 0 && inner == fill(Lib.MXT_ERROR_BUSY, 4)
    # Closed by its own function.
    broken = (_, _) -> close(breaking)
    @test step!(trainer, breaking).loss > 0 && !isopen(breaking)
    @test status_of(() -> step!(trainer, breaking)) == Lib.MXT_ERROR_NULL
    # Several trainers at once.
    shared = Dataset((number, tokens, _) -> (tokens .= window(number); yield()), 6)
    losses = map(1:4) do _
        Threads.@spawn [stats.loss for stats in steps(new_trainer(), shared, 10)]
    end
    @test length(unique(fetch.(losses))) == 1
    # What a function captures lives as long as the dataset, and no longer.
    events = Symbol[]
    of_numbers(numbers) = Dataset((_, tokens, _) -> (tokens .= view(numbers, 1:17)), 6)
    captured = of_garbage(of_numbers, events)
    foreach(_ -> GC.gc(), 1:3)
    @test isempty(events) && step!(trainer, captured).loss > 0
    close(captured)
    foreach(_ -> GC.gc(), 1:3)
    @test events == [:tokens]
end

IS_WHOLE && @testset "gradients" begin
    dataset, rows, trainer = new_dataset(), windows(2), new_trainer()
    weights = tensors(Model(trainer))
    found = gradients(trainer)
    @test found isa Tensors && keys(found) == keys(weights) && length(found) == length(weights)
    @test all(size(found[name]) == size(weights[name]) for name in keys(found))
    # Of the last step, before clipping.
    norm() = sqrt(sum(sum(abs2, Float64.(values)) for (_, values) in gradients(trainer)))
    @test isapprox(step!(trainer, dataset).grad_norm, norm(); rtol = 1e-5)
    # Of batches that wait.
    forward_backward!(trainer, inputs(rows), targets(rows))
    before = found[WTE]
    @test update!(trainer).grad_norm > 0 && found[WTE] == before
    forward_backward!(trainer, inputs(rows), targets(rows))
    first_one = Dict(found)
    @test scale_gradients!(trainer, 4) === nothing
    @test scale_gradients!(trainer, SubString(LN), 0.5) === nothing
    @test found[WTE] == 4first_one[WTE] && found[LN] == 2first_one[LN]
    scale_gradients!(trainer, 0.25)
    found[LN] .*= 2
    @test all(isapprox(found[name], first_one[name]; rtol = 1e-6) for name in keys(found))
    found[LN] = 1:16
    @test isapprox(found[LN], 1:16; rtol = 1e-6)
    # A vocabulary × channels array of C is channels × vocabulary here, as the weights are.
    matrix = reshape(collect(1.0:512.0), 16, 32)
    found[WTE] = matrix
    found["transformer.wpe.weight"] .= 0
    @test isapprox(found[WTE], matrix; rtol = 1e-6) && iszero(found["transformer.wpe.weight"])
    @test isapprox(norm(), update!(trainer).grad_norm; rtol = 1e-5)
    # A program may bring them all: the same step.
    source, sink = new_trainer(), new_trainer()
    forward_backward!(source, inputs(rows), targets(rows))
    brought = Dict(gradients(source))
    gradients(sink)[LN] = brought[LN]
    @test iszero(gradients(sink)[WTE]) && gradients(sink)[LN] == brought[LN]
    foreach(((name, values),) -> gradients(sink)[name] = values, brought)
    expected, stats = update!(source), update!(sink)
    @test stats.grad_norm == expected.grad_norm && stats.loss == 0 && stats.tokens == 0
    @test tensors(Model(sink))[WTE] == tensors(Model(source))[WTE]
    forward_backward!(source, inputs(rows), targets(rows))
    @test zero_gradients!(source) === nothing
    @test status_of(() -> update!(source)) == Lib.MXT_ERROR_INVALID_ARGUMENT

    # What is refused leaves what waits.
    plain, refusing = new_trainer(), new_trainer()
    foreach(t -> forward_backward!(t, inputs(rows), targets(rows)), (plain, refusing))
    waiting = "wait for an update"
    @test refuses(() -> step!(refusing, rows), MXFP4Error, waiting)
    @test refuses(() -> run!(refusing, dataset; steps = 1), MXFP4Error, waiting)
    @test evaluate!(refusing, dataset; max_batches = 1).loss > 0
    give(; tokens = inputs(rows), targets = targets(rows), fields...) =
        forward_backward!(refusing, tokens, targets; fields...)
    for (wrong, got) in (
        (rows, "17×2"),
        (inputs(rows)', "2×16; permutedims("),
        (inputs(rows)[:, 1:1], "16×1"),
    )
        for (name, use) in (
            ("tokens", () -> give(tokens = wrong)),
            ("targets", () -> give(targets = wrong)),
            ("weights", () -> give(weights = wrong)),
            ("losses", () -> give(losses = Float32.(wrong))),
        )
            expected = "$name: expected a matrix of 16×2 (sequence_length by batch_size), got $got"
            @test refuses(use, DimensionMismatch, expected)
        end
    end
    @test refuses(() -> give(targets = fill(-100, 16, 2)), ArgumentError, "targets: expected tokens")
    @test refuses(() -> give(tokens = fill(-100, 16, 2)), ArgumentError, "tokens: expected tokens")
    @test refuses(() -> give(divisor = "2"), ArgumentError, "divisor: expected a number")
    for (status, use) in (
        (Lib.MXT_ERROR_TOKEN_RANGE, () -> give(tokens = fill(32, 16, 2))),
        (Lib.MXT_ERROR_TOKEN_RANGE, () -> give(targets = fill(32, 16, 2))),
        (Lib.MXT_ERROR_TOKEN_RANGE, () -> give(tokens = fill(IGNORED, 16, 2))),
        (Lib.MXT_ERROR_NOT_FINITE, () -> give(weights = fill(1e300, 16, 2))),
        (Lib.MXT_ERROR_INVALID_ARGUMENT, () -> give(divisor = NaN)),
        (Lib.MXT_ERROR_NULL, () -> forward_backward!(nothing, refusing, inputs(rows))),
        (Lib.MXT_ERROR_INVALID_ARGUMENT, () -> scale_gradients!(refusing, Inf)),
        (Lib.MXT_ERROR_NO_SUCH_TENSOR, () -> scale_gradients!(refusing, "no.such", 1)),
        (Lib.MXT_ERROR_NOT_FINITE, () -> gradients(refusing)[LN] .= NaN),
    )
        @test status_of(use) == status
    end
    @test refuses(() -> scale_gradients!(refusing, "a\0b", 1), ArgumentError, "name: ")
    @test_throws KeyError gradients(refusing)["no.such"]
    @test_throws DimensionMismatch gradients(refusing)[LN] = 1:15
    @test bits(update!(refusing)) == bits(update!(plain))
    @test status_of(() -> scale_gradients!(refusing, 1)) == Lib.MXT_ERROR_INVALID_ARGUMENT
    # With lanes there are as many batches as there are, and gradients are parts of a sum.
    lanes = Trainer(new_model(); batch_size = 2, lanes = 2)
    forward_backward!(lanes, inputs(rows), targets(rows))
    @test refuses(() -> update!(lanes), MXFP4Error, "expected 2 batches")
    @test status_of(() -> scale_gradients!(lanes, 1)) == Lib.MXT_ERROR_UNSUPPORTED
    @test status_of(() -> gradients(lanes)[LN] .= 0) == Lib.MXT_ERROR_UNSUPPORTED
    forward_backward!(lanes, inputs(rows), targets(rows))
    @test update!(lanes).tokens == 64
    # A trainer that is closed has none.
    close(trainer)
    @test status_of(() -> found[WTE]) == Lib.MXT_ERROR_NULL
end

IS_WHOLE && @testset "updates and weights are watched" begin
    dataset = new_dataset()
    trainer = new_trainer()
    names = keys(tensors(Model(trainer)))
    @test refuses(() -> tensor_update(trainer, WTE), MXFP4Error, "call mxt_trainer_watch_updates")
    @test refuses(() -> watch_updates!(trainer, -1), ArgumentError, "every: ")
    @test watch_updates!(trainer, 2) === nothing
    stats = step!(trainer, dataset)
    @test isnan(stats.update_rms_max) && stats.update_rms_tensor === 0
    @test status_of(() -> tensor_update(trainer, WTE)) == Lib.MXT_ERROR_INVALID_ARGUMENT
    stats = step!(trainer, dataset)
    updates = [tensor_update(trainer, name) for name in names]
    @test all(update.step == 2 for update in updates)
    norm = sqrt(sum(Float64(update.grad_norm)^2 for update in updates))
    @test isapprox(norm, stats.grad_norm; rtol = 1e-5)
    @test stats.update_rms_max == maximum(update.rms for update in updates) > 0
    @test updates[stats.update_rms_tensor].rms == stats.update_rms_max
    @test status_of(() -> tensor_update(trainer, "no.such")) == Lib.MXT_ERROR_NO_SUCH_TENSOR
    @test refuses(() -> tensor_update(trainer, "a\0b"), ArgumentError, "name: ")
    # The callbacks of a run see the same.
    places = Int[]
    run!((step, _) -> push!(places, step.update_rms_tensor), trainer, dataset; steps = 4)
    @test places[[1, 3]] == [0, 0] && all(in(eachindex(names)), places[[2, 4]])
    watch_updates!(trainer, 0)
    @test isnan(step!(trainer, dataset).update_rms_max)

    qkv = "transformer.h.0.attn.c_attn.weight"
    @test refuses(() -> watch_weights!(trainer, 2), MXFP4Error, "recipe: expected")
    @test refuses(() -> watch_weights!(trainer, 0.5), MethodError, "watch_weights!")
    rounding = Trainer(new_model(); batch_size = 2, lr = 1e-2, recipe = "tetrajet")
    watch_weights!(rounding, 2)
    step!(rounding, dataset)
    @test refuses(() -> weight_metrics(rounding), MXFP4Error, "call mxt_trainer_watch_weights")
    step!(rounding, dataset)
    all_of_them = weight_metrics(rounding)
    @test all_of_them.step === 2 && all_of_them.steps === 2 && all_of_them.tensors === 4
    @test all_of_them.change > 0 && 0 < all_of_them.flipped < 1 && all_of_them.clipped == 0
    of_one = weight_metrics(rounding, SubString(qkv))
    @test of_one.tensors == 1 && of_one.rounded_change > 0 && of_one.amax <= all_of_them.amax
    @test refuses(() -> weight_metrics(rounding, WTE), MXFP4Error, qkv)
    @test status_of(() -> weight_metrics(rounding, "no.such")) == Lib.MXT_ERROR_NO_SUCH_TENSOR
    # What one step changes, by the weights themselves.
    weights = tensors(Model(rounding))
    watch_weights!(rounding, 1)
    before = Float64.(weights[qkv])
    step!(rounding, dataset)
    after = Float64.(weights[qkv])
    moved = sqrt(sum(abs2, after - before) / sum(abs2, before))
    @test isapprox(weight_metrics(rounding, qkv).change, moved; rtol = 1e-5)
    watch_weights!(rounding, 0)
    @test status_of(() -> weight_metrics(rounding)) == Lib.MXT_ERROR_INVALID_ARGUMENT
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
    @test result.eval_errors == 0 && result.save_errors == 0
    @test run!(trainer, dataset; steps = 2).steps == 2
    result = run!((step, _) -> step.step == 10 ? :stop : nothing, trainer, dataset; steps = 9)
    @test result.steps == 2 && result.ended === :callback
    result = run!((_, _) -> request_stop(trainer), trainer, dataset; steps = 9)
    @test result.steps == 1 && result.ended === :request

    for (fields, name) in (
        ((;), "steps: "),
        ((steps = -1,), "steps: "),
        ((steps = 1, eval_every = -1), "eval_every: "),
        ((steps = 1, save_dir = "\0"), "save_dir: "),
    )
        @test refuses(() -> run!(trainer, dataset; fields...), ArgumentError, name)
    end
    @test run!(trainer, dataset; steps = 0).steps == 0
    # `false` is what the last line of many a callback is, and asks for nothing.
    for answer in (false, true, nothing, 0, 1, :go_on, "stop")
        @test run!((_, _) -> answer, new_trainer(), dataset; steps = 2).ended === :finished
    end
    halting() = run!((_, _) -> :halt, trainer, dataset; steps = 2)
    @test refuses(halting, ArgumentError, ":halt")
    # What a callback captures may be changed by it, while the collector is at work.
    counts, losses, text = Dict{Int,Vector{Float64}}(), Float32[], ""
    run!(new_trainer(), dataset; steps = 20) do step, _
        counts[step.step] = rand(1000)
        push!(losses, step.loss)
        text *= string(step.step, ' ')
        GC.gc(step.step % 5 == 0)
    end
    @test sort(collect(keys(counts))) == 1:20 && length(losses) == 20
    @test text == join(1:20, ' ') * " "
    # A callable object, and a function that is only known when it is called.
    struct_of_calls = Recorder(Int[])
    run!(struct_of_calls, new_trainer(), dataset; steps = 3)
    @test struct_of_calls.steps == 1:3
    late = Core.eval(@__MODULE__, :((step, _) -> push!($losses, step.loss)))
    run!(late, new_trainer(), dataset; steps = 3)
    @test length(losses) == 23
    trainer = new_trainer()
    run!(trainer, dataset; steps = 10)

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
    # Of two errors the outer one arrives, and nothing of the inner one stays behind.
    outer = thrown() do
        run!(trainer, dataset; steps = 3) do _, _
            try
                run!((_, _) -> throw(Enough(1)), trainer, dataset; steps = 3)
            finally
                throw(Enough(2))
            end
        end
    end
    @test outer === Enough(2) && step!(trainer, dataset).step == steps_done(trainer)
    # Closed by its own callback, while the collector is at work.
    result = run!(trainer, dataset; steps = 5) do _, _
        close(trainer)
        GC.gc()
    end
    @test result.steps == 1 && !isopen(trainer)
end

IS_WHOLE && @testset "score" begin
    model = new_model()
    texts = [[1, 2, 3, 4], Int[], [5], [1, 2]]
    scores, hidden = score(model, texts; hidden = true)
    @test length.(scores) == length.(texts) && scores == score(model, texts)
    @test scores[1][1] == 0 && scores[3] == [0] && scores[1][1:2] == scores[4]
    logits = next_logits(model, [1, 2, 3])
    @test scores[1][4] ≈ logits[5] - log(sum(exp, logits)) atol = 1e-5
    @test size.(hidden, 2) == length.(texts) && hidden[1][:, 1:2] == hidden[4]
    @test refuses(() -> score(model, [[1, 99]]), MXFP4Error, "99")
    @test refuses(() -> score(model, [[-1]]), ArgumentError, "texts: ")
    @test refuses(() -> score(model, [[1]]; weights = :mxfp4), MXFP4Error, "MXT_DECODER_WEIGHTS_BF16 (1), got 2")
end

@testset "generate" begin
    model = new_model()
    @test length(generate(model, [1, 2]; max_tokens = 5)) == 5
    logits = next_logits(model, [1, 2])
    @test length(logits) == 32
    @test generate(model, [1, 2]; max_tokens = 1, temperature = 0) == [argmax(logits) - 1]
    stopped = generate(model, [1, 2]; temperature = 0, stop_tokens = [argmax(logits) - 1])
    @test stopped == [argmax(logits) - 1]
    seen = Int[]
    tokens = generate(model, [1, 2]; max_tokens = 8) do token
        push!(seen, token)
        length(seen) == 3 ? :stop : nothing
    end
    @test tokens == seen && length(seen) == 3 && tokens isa Vector{Int}
    @test tokens == generate(model, [1, 2]; max_tokens = 3)
    # Memory is for what is written, not for what may be.
    for most in (10^12, typemax(Int), typemax(UInt64))
        counted = 0
        text = generate(model, UInt8[1, 2]; max_tokens = most) do _
            counted += 1
            counted < 5 ? counted == 3 : :stop
        end
        @test length(text) == 5
    end
    text = generate(model, [1, 2]; max_tokens = 20, seed = 3) do token
        GC.gc(false)
        token isa Int || throw(Enough(1))
    end
    @test text == generate(model, view([1, 0, 2], 1:2:3); max_tokens = 20, seed = 3)
    @test refuses(() -> generate(model, [-1]), ArgumentError, "prompt: ")
    @test refuses(() -> next_logits(model, [-1]), ArgumentError, "tokens: ")
    @test refuses(() -> generate(_ -> :halt, model, [1]), ArgumentError, ":halt")
    # A callback may close the model that calls it.
    closing = new_model()
    @test length(generate(_ -> close(closing), closing, [1]; max_tokens = 4)) == 4
    @test !isopen(closing)
    @test thrown(() -> generate(_ -> throw(Enough(2)), model, [1])) === Enough(2)
    # While tokens are sampled, the model is in use.
    busy = status_of(() -> generate(_ -> tensors(model)["transformer.ln_f.bias"], model, [1]))
    @test busy == Lib.MXT_ERROR_BUSY
    @test status_of(() -> generate(model, Int[])) == Lib.MXT_ERROR_INVALID_ARGUMENT
end

IS_WHOLE && @testset "decoder" begin
    model = new_model()
    decoder = Decoder(model; sequences = 2)
    @test append!(decoder, [1, 2]) === decoder
    @test logits(decoder) == next_logits(model, [1, 2])
    append!(decoder, UInt8[3])
    fork!(decoder, 1, 2)
    append!(decoder, [4]; sequence = 2)
    rewind!(decoder, 1)
    @test tokens(decoder) == [1] && tokens(decoder; sequence = 2) == [1, 2, 3, 4]
    @test tokens(decoder) isa Vector{Int}
    @test logits(decoder; sequence = 2) == next_logits(model, [1, 2, 3, 4])
    @test logits(decoder) == next_logits(model, [1])
    tensors(model)["transformer.ln_f.bias"] = fill(0.5, 16)
    @test logits(decoder) == next_logits(model, [1])
    for weights in (:bf16, :mxfp4)
        other = Decoder(model; weights = weights, room = 3)
        @test logits(append!(other, [1, 2, 3])) != logits(append!(Decoder(model), [1, 2, 3]))
        @test status_of(() -> append!(other, [4])) == Lib.MXT_ERROR_INVALID_ARGUMENT
    end
    @test refuses(() -> Decoder(model; weights = :fp8), ArgumentError, "weights: ")
    @test logits_from(decoder, 1; sequence = 2)[:, 3] == next_logits(model, [1, 2, 3])
    @test size(logits_from(decoder, 4; sequence = 2)) == (32, 1)
    @test refuses(() -> logits_from(decoder, 0), ArgumentError, "from: ")
    @test refuses(() -> logits_from(decoder, 2), ArgumentError, "from 1 to 1, got 2")
    drafting = Decoder(model; drafts = true)
    plain = generate(model, [1, 2]; max_tokens = 9)
    for draft in (:none, :ngram, :mxfp4, :mxfp4_ngram)
        rewind!(drafting, 0)
        append!(drafting, [1, 2])
        @test generate!(drafting; max_tokens = 9, draft = draft, draft_tokens = 3) == plain
        @test tokens(drafting) == [1; 2; plain]
        @test generate(model, [1, 2]; max_tokens = 9, draft = draft) == plain
    end
    together = Decoder(model; sequences = 3)
    for (sequence, text) in enumerate(([1, 2], [3], [1, 2]))
        append!(together, text; sequence = sequence)
    end
    @test logits(together, [2, 1]) == hcat(next_logits(model, [3]), next_logits(model, [1, 2]))
    texts = generate!(together, [1, 3, 2]; max_tokens = 9, seed = 1336)
    @test texts[2] == plain && length(texts[1]) == 9 && texts isa Vector{Vector{Int}}
    @test tokens(together; sequence = 2) == [3; texts[3]]
    @test refuses(() -> logits(together, [0]), ArgumentError, "sequence: ")
    @test status_of(() -> generate!(together, [1, 1])) == Lib.MXT_ERROR_INVALID_ARGUMENT
    rewind!(drafting, 2)
    @test generate!(token -> token == plain[3] ? :stop : nothing, drafting)[end] == plain[3]
    @test refuses(() -> generate!(drafting; draft = :all), ArgumentError, "draft: ")
    @test refuses(() -> generate!(drafting; weights = 1.5), ArgumentError, "weights")
    @test refuses(() -> generate!(drafting; sequence = 2), ArgumentError, "sequence: ")
    close(drafting)
    @test refuses(() -> append!(decoder, [-1]), ArgumentError, "tokens: ")
    @test refuses(() -> logits(decoder; sequence = 0), ArgumentError, "sequence: ")
    @test refuses(() -> fork!(decoder, 1, 3), ArgumentError, "from 1 to 2, got 3")
    @test status_of(() -> Decoder(model; room = 10^6)) == Lib.MXT_ERROR_INVALID_ARGUMENT
    @test status_of(() -> append!(decoder, [99])) == Lib.MXT_ERROR_TOKEN_RANGE
    @test sprint(show, decoder) == "Decoder(2 sequences)"
    expected = next_logits(model, [1])
    close(model)
    @test logits(decoder) == expected
    close(decoder)
    @test sprint(show, decoder) == "Decoder(closed)"
    @test status_of(() -> logits(decoder)) == Lib.MXT_ERROR_NULL
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
    # One that was thrown in a callback of a run, and caught there, does not come back.
    run!(trainer, new_dataset(); steps = 2) do _, _
        thrown(() -> new_trainer(model)) === Enough(9) || throw(Enough(10))
    end
    armed = false
    @test steps_done(trainer) == 2
end

@testset "tasks" begin
    losses = map(1:4) do _
        Threads.@spawn begin
            trainer = new_trainer()
            # A callback may wait, and collect.
            run!(trainer, new_dataset(); steps = 5) do step, _
                yield()
                GC.gc(step.step == 3)
            end.last_loss
        end
    end
    @test length(unique(fetch.(losses))) == 1
    # A trainer is for one task at a time.
    trainer = new_trainer()
    inside, go_on = Channel{Nothing}(1), Channel{Nothing}(1)
    model = Model(trainer)
    task = @async generate(model, [1]; max_tokens = 1) do _
        put!(inside, nothing)
        take!(go_on)
    end
    take!(inside)
    @test status_of(() -> step!(trainer, new_dataset())) == Lib.MXT_ERROR_BUSY
    put!(go_on, nothing)
    @test length(fetch(task)) == 1
    # Stopped from another task.
    task = @async run!((_, _) -> yield(), trainer, new_dataset(); steps = typemax(Int))
    while steps_done(trainer) < 3
        yield()
    end
    request_stop(trainer)
    @test fetch(task).ended === :request
    # Closed by another task.
    task = @async run!((_, _) -> yield(), trainer, new_dataset(); steps = typemax(Int))
    yield()
    close(trainer)
    @test fetch(task).ended === :request
end

# What `f` makes of each rank of a group, in tasks of this process: what a rank brings to another
# goes through a channel.
function on_ranks(f, size)
    boxes = [Channel{Vector{UInt8}}(1) for from in 1:size, to in 1:size]
    abort() = foreach(close, boxes)
    function parts(bytes)
        count = length(bytes) ÷ size
        return [view(bytes, (rank * count + 1):((rank + 1) * count)) for rank in 0:(size - 1)]
    end
    function exchange(rank, blocks, receive)
        # Copies, since the vectors are borrowed.
        foreach((block, box) -> put!(box, collect(block)), blocks, boxes[rank + 1, :])
        foreach((block, box) -> copyto!(block, take!(box)), parts(receive), boxes[:, rank + 1])
    end
    tasks = map(0:(size - 1)) do rank
        group = Group(
            rank,
            size;
            all_to_all = (send, receive) -> exchange(rank, parts(send), receive),
            all_gather = (mine, all) -> exchange(rank, fill(mine, size), all),
            abort = abort,
        )
        Threads.@spawn try
            f(group)
        catch
            # Nobody is to wait for a test that fails.
            abort()
            rethrow()
        end
    end
    return fetch.(tasks)
end

# A rank whose functions do what they do where `answer()` is `nothing`, and else answer that.
function answering(answer, group)
    function instead(exchange)
        return function (send, receive)
            said = answer()
            return said === nothing ? exchange(send, receive) : said
        end
    end
    return Group(
        group.rank,
        group.size;
        all_to_all = instead(group.all_to_all),
        all_gather = instead(group.all_gather),
        abort = group.abort,
    )
end

@testset "ranks" begin
    dataset = new_dataset()
    tokens = [(i * i + 3j) % 29 for i in 1:17, j in 1:4]
    how = (batch_size = 2, lr = 1e-2)
    # One rank needs no functions, and is what there is without a group.
    engine = new_engine(group = Group(0, 1))
    @test MXFP4Train.rank(engine) === 0 && MXFP4Train.ranks(engine) === 1
    @test MXFP4Train.rank(new_engine()) === 0 && MXFP4Train.ranks(new_engine()) === 1
    @test options(Trainer(Model(engine; SMALL...))).accumulation == 1
    @test options(Trainer(Model(engine; SMALL...); lanes = 4)).accumulation == 4
    @test plan(engine; model = SMALL).exchange == 0
    @test plan(engine; model = SMALL, trainer = (lanes = 2,)).exchange > 0
    @test refuses(() -> Group(-1, 2), ArgumentError, "rank: ")
    @test refuses(() -> Group(0, 2.5), ArgumentError, "size: ")
    @test thrown(() -> new_engine(group = 2)) isa TypeError
    @test status_of(() -> new_engine(group = Group(0, 2))) == Lib.MXT_ERROR_NULL
    none(_, _) = throw(Enough(0))
    nowhere = Group(2, 2; all_to_all = none, all_gather = none)
    @test status_of(() -> new_engine(group = nowhere)) == Lib.MXT_ERROR_INVALID_ARGUMENT

    # Two ranks are one, bit for bit.
    mktempdir() do folder
        function trained(group)
            member = new_engine(group = group)
            rank, count = MXFP4Train.rank(member), MXFP4Train.ranks(member)
            trainer = Trainer(Model(member; SMALL...); lanes = 2, how...)
            # The trainer has what it needs of it.
            close(member)
            GC.gc()
            losses = [stats.loss for stats in steps(trainer, dataset, 3)]
            columns = 4 ÷ count
            stats = step!(trainer, tokens[:, (rank * columns + 1):((rank + 1) * columns)])
            push!(losses, stats.loss, evaluate!(trainer, dataset).loss)
            path = joinpath(folder, string(count))
            for column in (rank * columns + 1):2:((rank + 1) * columns)
                batch = tokens[:, column:(column + 1)]
                forward_backward!(trainer, inputs(batch), targets(batch))
            end
            push!(losses, update!(trainer).loss)
            run = run!(trainer, dataset; steps = 3, eval_dataset = dataset, save_dir = path)
            push!(losses, run.last_loss, run.last_eval_loss)
            @assert options(trainer).accumulation == 2 && stats.tokens == 64
            @assert (count == 1) == (stats.exchange_seconds == 0)
            return losses, tensors(Model(trainer))[WTE], read(joinpath(path, "model.safetensors"))
        end
        alone = trained(nothing)
        @test trained(Group(0, 1)) == alone
        @test on_ranks(trained, 2) == [alone, alone]
    end

    # Windows are filled by the ranks that want them; what one throws fails on all.
    function filled(group)
        seen, broken = Int[], Ref(false)
        data = Dataset(8) do number, tokens, weights
            broken[] && (group === nothing || group.rank == 1) && throw(Enough(6))
            push!(seen, number)
            tokens .= window(number)
            weights .= factors(number)
        end
        trainer = Trainer(Model(new_engine(group = group); SMALL...); lanes = 2, how...)
        losses = [stats.loss for stats in steps(trainer, data, 2)]
        of_steps = copy(seen)
        push!(losses, evaluate!(trainer, data).loss)
        broken[] = true
        error = thrown(() -> step!(trainer, data))
        broken[] = false
        return [losses; step!(trainer, data).loss], of_steps, error
    end
    alone, (first_rank, second_rank) = filled(nothing), on_ranks(filled, 2)
    @test first_rank[1] == second_rank[1] == alone[1]
    @test sort([first_rank[2]; second_rank[2]]) == sort(alone[2]) == 1:8
    @test alone[3] === second_rank[3] === Enough(6)
    @test first_rank[3].status == Lib.MXT_ERROR_PEER && occursin("window", first_rank[3].message)

    # What one cannot do nobody does, also where it is refused before the library sees it.
    found = on_ranks(2) do group
        trainer = Trainer(Model(new_engine(group = group); SMALL...); how...)
        mine, is_second = tokens[:, 1:2], group.rank == 1
        failures = map((tokens, mine[:, 1:1], permutedims(mine), -mine .- 1, mine .+ 29)) do wrong
            thrown(() -> step!(trainer, is_second ? wrong : mine))
        end
        return failures, step!(trainer, mine).step
    end
    (others, step), (own, _) = found
    @test step == 1 && all(error.status == Lib.MXT_ERROR_PEER for error in others)
    @test all(occursin("rank 1 on ", error.message) for error in others)
    kinds = (DimensionMismatch, DimensionMismatch, DimensionMismatch, ArgumentError, MXFP4Error)
    @test all(isa.(own, kinds)) && own[end].status == Lib.MXT_ERROR_TOKEN_RANGE
    @test occursin("17×2", own[1].msg) && occursin("batch_size / 2 ranks)", own[1].msg)
    @test occursin("permutedims", own[3].msg)

    # An exception in a run ends it on all ranks, which save and can go on.
    mktempdir() do folder
        found = on_ranks(2) do group
            trainer = Trainer(Model(new_engine(group = group); SMALL...); how...)
            run = nothing
            error = thrown() do
                run = run!(trainer, dataset; steps = 9, save_dir = folder) do step, _
                    group.rank == 1 && step.step == 3 && throw(Enough(3))
                end
            end
            return error, run === nothing ? run : run.ended, step!(trainer, dataset).step
        end
        @test found == [(nothing, :request, 4), (Enough(3), nothing, 4)]
        # On one rank, too.
        @test steps_done(load(Trainer, new_engine(), folder)) == 3
    end
    # One in the log arrives when the call has been made with all ranks.
    found = on_ranks(2) do group
        armed = false
        log = (_, _) -> armed && group.rank == 1 && throw(Enough(4))
        model = Model(new_engine(group = group, log = log); SMALL...)
        armed = true
        error = thrown(() -> Trainer(model; how...))
        armed = false
        return error, step!(Trainer(model; how...), dataset).step
    end
    @test found == [(nothing, 1), (Enough(4), 1)]

    # One in a function of the group ends it: the call throws it, and later ones say so.
    for calls in 0:2:12
        found = on_ranks(2) do group
            left = Ref(typemax(Int))
            failing = answering(group) do
                left[] -= 1
                left[] < 0 && group.rank == 1 ? throw(Enough(5)) : nothing
            end
            trainer = Trainer(Model(new_engine(group = failing); SMALL...); how...)
            left[] = calls
            error = thrown(() -> foreach(_ -> step!(trainer, dataset), 1:99))
            again = thrown(() -> step!(trainer, dataset))
            return error, again, status_of(() -> evaluate!(trainer, dataset))
        end
        # The other one's channels are closed by then.
        @test found[1][1] isa InvalidStateException && found[2][1] === Enough(5)
        @test all(again.status == Lib.MXT_ERROR_PEER for (_, again, _) in found)
        @test all(occursin("the group has ended", again.message) for (_, again, _) in found)
        @test all(status == Lib.MXT_ERROR_PEER for (_, _, status) in found)
    end
    # Without an exception there is the library's error at once, also where an engine is made.
    found = on_ranks(2) do group
        stopping = answering(() -> group.rank == 1 ? :stop : nothing, group)
        return thrown(() -> new_engine(group = stopping))
    end
    @test found[1] isa InvalidStateException && found[2].status == Lib.MXT_ERROR_PEER
    @test occursin("all_gather", found[2].message)
end

@testset "objects that the collector frees" begin
    for round in 1:3
        run!(new_trainer(), new_dataset(); steps = 10) do step, _
            # Garbage with finalizers, collected inside of a call.
            foreach(_ -> (new_model(); new_dataset()), 1:5)
            GC.gc(step.step % 5 == 0)
        end
    end
    @test steps_done(new_trainer()) == 0
end

# Starts a Julia with a program of this folder, and gives the process and what it prints.
function start(program, arguments...)
    path, project = joinpath(@__DIR__, program), Base.active_project()
    command = `$(Base.julia_cmd()) --project=$project $path $arguments`
    return open(pipeline(command; stderr = stderr), "r")
end

@testset "Ctrl-C in a script" begin
    mktempdir() do folder
        process = start("interrupted.jl", folder)
        @test readline(process) == "running"
        kill(process, Base.SIGINT)
        done = parse(Int, readline(process))
        @test done >= 3
        @test steps_done(load(Trainer, new_engine(), joinpath(folder, "callback"))) == done
        # So do a run that says nothing, once it runs, on windows of the program, and of a rank, ...
        for name in ("silent", "windows", "rank")
            while !isfile(joinpath(folder, name, "trainer.json")) && process_running(process)
                sleep(0.01)
            end
            kill(process, Base.SIGINT)
            done = parse(Int, readline(process))
            @test steps_done(load(Trainer, new_engine(), joinpath(folder, name))) == done
        end
        # ... and afterwards the script ends at once, as scripts do.
        @test readline(process) == "waiting"
        kill(process, Base.SIGINT)
        @test readline(process) == ""
        wait(process)
        @test process.exitcode == 130 && process.termsignal == 0
    end
end
