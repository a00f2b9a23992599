// The mode without exceptions, which is compiled with -fno-exceptions too.
#define MXT_NO_EXCEPTIONS
#include "check.hpp"

#include <type_traits>

static_assert(!std::is_constructible_v<mxt::Engine, mxt::EngineOptions>);
static_assert(!std::is_convertible_v<mxt::result<void>, bool>);
static_assert(std::is_constructible_v<bool, mxt::result<void>>);

namespace {

std::string first_line;

mxt::result<float> train(const std::string &folder) {
  auto engine = mxt::Engine::create(one_thread(), [](mxt::LogLevel, std::string_view line) {
    if (first_line.empty()) first_line = line;
  });
  if (!engine) return engine.error();
  auto model = mxt::Model::create(*engine, small_config());
  if (!model) return model.error();
  auto dataset = mxt::Dataset::from_tokens(some_tokens());
  if (!dataset) return dataset.error();
  auto trainer = mxt::Trainer::create(*model, small_options());
  if (!trainer) return trainer.error();

  int steps = 0;
  auto run = trainer->run(*dataset, 10, [&](const mxt::StepStats &) {
    return ++steps == 4 ? mxt::Flow::stop : mxt::Flow::go_on;
  });
  CHECK(run && run->steps == 4 && run->end == mxt::RunEnd::callback);
  auto snapshot = trainer->snapshot();
  if (!snapshot) return snapshot.error();
  if (auto renewed = trainer->renew(*snapshot); !renewed) return renewed.error();
  if (auto saved = snapshot->save(folder); !saved) return saved.error();
  if (auto saved = trainer->save(folder); !saved) return saved.error();
  auto resumed = mxt::Trainer::load(*engine, folder);
  CHECK(resumed && resumed->steps_done() == 4);
  auto tokens = std::move(trainer->model().value()).generate({1, 2, 3});
  CHECK(tokens && tokens->size() == mxt::GenerateOptions().max_tokens);
  const auto none = resumed->tensor_update("transformer.wte.weight");
  CHECK(!none && none.error().status() == MXT_ERROR_INVALID_ARGUMENT);
  if (auto watched = resumed->watch_updates(5); !watched) return watched.error();
  const auto step = resumed->step(*dataset);
  if (!step) return step.error();
  const auto update = resumed->tensor_update("transformer.wte.weight");
  CHECK(update && update->step == 5 && update->grad_norm > 0);
  CHECK(!resumed->watch_weights(1) && !resumed->weight_metrics());
  return step->loss;
}

void errors() {
  auto engine = mxt::Engine::create(one_thread());
  CHECK(engine);
  mxt::ModelConfig config = small_config();
  config.heads = 3;
  const auto model = mxt::Model::create(*engine, config);
  CHECK(!model && model.error().status() == MXT_ERROR_INVALID_ARGUMENT);
  CHECK(std::string_view(model.error().what()).find("heads") != std::string_view::npos);
  const auto dataset = mxt::Dataset::open("/nowhere/*.bin");
  CHECK(!dataset && dataset.error().status() == MXT_ERROR_INVALID_ARGUMENT);
  mxt::Engine moved = std::move(*engine);
  const auto none = mxt::Model::create(*engine, small_config());
  CHECK(!none && none.error().status() == MXT_ERROR_NULL);
  CHECK(mxt::plan(moved, small_config())->total > 0);
}

}  // namespace

#ifdef WITH_OTHER_MODE
// The other half of the program is modes.cpp.
bool other_mode_works();
#endif

int main(int argc, char **argv) {
  CHECK(argc == 2);
  const mxt::result<float> loss = train(std::string(argv[1]) + "/run");
  CHECK(loss && *loss > 0);
  CHECK(!first_line.empty());
  errors();
#ifdef WITH_OTHER_MODE
  CHECK(other_mode_works());
#endif
  return 0;
}
