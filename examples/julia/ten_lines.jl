# examples/julia/ten_lines.jl
using MXFP4Train

dataset = Dataset("data/train.bin")
engine = Engine()
model = Model(engine; vocab_size = 256, context_length = 64, layers = 2, channels = 96)
trainer = Trainer(model)
run!(trainer, dataset; steps = 100, save_dir = "out") do step, evaluation
    println("loss ", step.loss)
end
tensors(model)["transformer.wte.weight"]    # an array, channels × vocabulary
