// The throwing half of a program whose other half, returning.cpp, does without exceptions: the same
// names in both, and no clash.
#include "check.hpp"

bool other_mode_works();

bool other_mode_works() {
  mxt::Engine engine(one_thread());
  mxt::Model model(engine, small_config());
  mxt::Dataset dataset = mxt::Dataset::from_tokens(some_tokens());
  mxt::Trainer trainer(model, small_options());
  bool caught = false;
  try {
    trainer.run(dataset, 3, [](const mxt::StepStats &) { throw std::runtime_error("enough"); });
  } catch (const std::runtime_error &) {
    caught = true;
  }
  return caught && trainer.steps_done() == 1;
}
