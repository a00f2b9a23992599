// Trains in a worker thread, as an application with a window would: the main thread shows progress,
// stops the worker in the middle, and a second worker goes on from the checkpoint.
//
//   cargo build --release
//   c++ -std=c++17 -pthread -Iinclude -Ibindings/cpp examples/cpp/train.cpp -o train
//       -Ltarget/release -lmxfp4train        (one command in two lines)
//   ln -s libmxfp4train.so target/release/libmxfp4train.so.0
//   LD_LIBRARY_PATH=target/release ./train [TOKENS.bin]
//
// TOKENS.bin holds bytes as 16-bit tokens, or any tokens below 50257. Without it the program learns
// a nursery rhyme by heart.
#include "mxfp4train.hpp"

#include <chrono>
#include <cstdio>
#include <future>
#include <mutex>

namespace {

constexpr std::uint64_t total_steps = 200;
constexpr const char *checkpoint = "checkpoint";

constexpr std::string_view rhyme =
    "Humpty Dumpty sat on a wall, Humpty Dumpty had a great fall; "
    "all the king's horses and all the king's men could not put Humpty together again. ";

// What the worker tells and the main thread shows.
class Progress {
 public:
  void set(const mxt::StepStats &stats) {
    const std::lock_guard<std::mutex> lock(mutex_);
    stats_ = stats;
  }
  mxt::StepStats get() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }

 private:
  mutable std::mutex mutex_;
  mxt::StepStats stats_{};
};

mxt::Dataset open_tokens(const char *path) {
  if (path != nullptr) return mxt::Dataset::open(path);
  std::vector<std::uint32_t> tokens(8192);
  for (std::size_t i = 0; i < tokens.size(); i++) {
    tokens[i] = static_cast<unsigned char>(rhyme[i % rhyme.size()]);
  }
  return mxt::Dataset::from_tokens(tokens);
}

mxt::Trainer new_trainer(const mxt::Engine &engine, const mxt::Dataset &dataset) {
  mxt::ModelConfig config;
  config.vocab_size = dataset.max_token() + std::size_t{1};
  config.context_length = 64;
  config.layers = 2;
  config.heads = 4;
  config.channels = 64;
  mxt::Model model(engine, config);

  mxt::TrainerOptions options;
  options.recipe = "mxfp4-rht-sr";  // forward in bf16, backward in MXFP4
  options.schedule = mxt::Schedule::cosine;
  options.lr = 3e-3f;
  options.warmup_steps = 10;
  options.total_steps = total_steps;
  std::printf("%llu parameters, %llu tokens\n",
              static_cast<unsigned long long>(model.parameter_count()),
              static_cast<unsigned long long>(dataset.token_count()));
  return mxt::Trainer(model, options);  // the trainer keeps the model alive
}

// Runs to the end of the schedule in a thread of its own and shows how it goes, until `stop_after`
// steps are done.
mxt::RunResult train(mxt::Trainer &trainer, const mxt::Dataset &dataset, std::uint64_t stop_after) {
  Progress progress;
  std::future<mxt::RunResult> worker = std::async(std::launch::async, [&] {
    mxt::RunOptions options = total_steps - trainer.steps_done();
    options.eval_dataset = dataset.get();
    options.eval_batches = 4;
    options.save_dir = checkpoint;  // written at the end, however the run ends
    return trainer.run(dataset, options, [&](const mxt::StepStats &stats) { progress.set(stats); });
  });
  while (worker.wait_for(std::chrono::milliseconds(200)) != std::future_status::ready) {
    const mxt::StepStats stats = progress.get();
    if (stats.step == 0) continue;
    std::printf("step %4llu  loss %.4f  %.0f tokens/s\n",
                static_cast<unsigned long long>(stats.step), static_cast<double>(stats.loss),
                static_cast<double>(stats.tokens_per_second));
    if (stats.step >= stop_after) trainer.request_stop();
  }
  // What the library or a callback threw in the worker is thrown here.
  return worker.get();
}

int run(const char *path) {
  const mxt::Engine engine;
  const mxt::Dataset dataset = open_tokens(path);
  {
    mxt::Trainer trainer = new_trainer(engine, dataset);
    const mxt::RunResult result = train(trainer, dataset, total_steps / 4);
    std::printf("%s after %llu steps\n",
                result.end == mxt::RunEnd::request ? "stopped" : "finished",
                static_cast<unsigned long long>(result.steps));
  }
  // As another process would: everything comes back from the checkpoint.
  mxt::Trainer trainer = mxt::Trainer::load(engine, checkpoint);
  std::printf("resumed at step %llu\n", static_cast<unsigned long long>(trainer.steps_done()));
  if (trainer.steps_done() < total_steps) {
    const mxt::RunResult result = train(trainer, dataset, total_steps);
    std::printf("%llu steps more, evaluation %.4f nats a token\n",
                static_cast<unsigned long long>(result.steps),
                static_cast<double>(result.last_eval_loss));
  }

  mxt::GenerateOptions options;
  options.temperature = 0.5f;
  std::putchar('H');
  trainer.model().generate({'H'}, options, [](std::uint32_t token) {
    std::putchar(token < 256 ? static_cast<int>(token) : '?');
  });
  std::putchar('\n');
  return 0;
}

}  // namespace

int main(int argc, char **argv) {
  try {
    return run(argc > 1 ? argv[1] : nullptr);
  } catch (const mxt::error &error) {
    std::fprintf(stderr, "%s: %s\n", mxt_status_string(error.status()), error.what());
    return 1;
  }
}
