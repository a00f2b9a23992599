// examples/cpp/ten_lines.cpp
#include <cstdio>
#include <mxfp4train.hpp>

int main() {
  mxt::Dataset data = mxt::Dataset::open("data/train.bin");
  mxt::ModelConfig shape;  // GPT-2 small (124M), made smaller:
  shape.vocab_size = 256, shape.context_length = 64, shape.layers = 2, shape.channels = 96;
  mxt::Engine engine;
  mxt::Model model(engine, shape);
  mxt::Trainer trainer(model);
  while (trainer.steps_done() < 100) std::printf("loss %.3f\n", trainer.step(data).loss);
  trainer.save("out");
}
