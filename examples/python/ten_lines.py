# examples/python/ten_lines.py
import mxfp4train as mxt

dataset = mxt.Dataset("data/train.bin")
engine = mxt.Engine()
model = mxt.Model(engine, vocab_size=256, context_length=64, layers=2, channels=96)
trainer = mxt.Trainer(model)
trainer.run(dataset, steps=100, save_dir="out", on_step=lambda step, _: print("loss", step.loss))
model.tensors["transformer.wte.weight"]    # a numpy array, vocabulary × channels
