// Trains between the frames of a game: whatever a frame leaves of its time goes to batches, as many
// as fit, and a step is made of every eight. No thread is started for it, and a frame comes late
// only where the machine is busy with something else.
//
//   cargo build --release
//   c++ -std=c++17 -Iinclude -Ibindings/cpp examples/cpp/game_loop.cpp -o game_loop
//       -Ltarget/release -lmxfp4train        (one command in two lines)
//   ln -s libmxfp4train.so target/release/libmxfp4train.so.0
//   LD_LIBRARY_PATH=target/release ./game_loop
#include "mxfp4train.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>
#include <thread>

namespace {

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::duration<double, std::milli>;

constexpr std::size_t rows = 2, length = 32, batches_of_a_step = 8;
constexpr int frames = 240;
constexpr Milliseconds frame_time{1000.0 / 60};

// What the game does in a frame, with a time of its own: physics, sound, pictures.
void play(std::mt19937 &random) {
  std::this_thread::sleep_for(Milliseconds(1.0 + static_cast<double>(random() % 60) / 10));
}

// What the player did, as the game saw it: moves that follow each other in patterns.
class Moves {
 public:
  // The next windows of them: what came, and what came next.
  void next(std::vector<std::uint32_t> &tokens, std::vector<std::uint32_t> &targets) {
    for (std::size_t i = 0; i < tokens.size(); i++) {
      tokens[i] = move(at_);
      targets[i] = move(++at_);
    }
  }

 private:
  static std::uint32_t move(std::size_t at) {
    return static_cast<std::uint32_t>((at % 7) * (at % 3) % 16);
  }
  std::size_t at_ = 0;
};

// How long a thing takes: the longest of late, which is forgotten slowly.
class Duration {
 public:
  template <class Work>
  void measure(Work work) {
    const auto begun = Clock::now();
    work();
    longest_ = std::max(Milliseconds(Clock::now() - begun), 0.95 * longest_);
  }
  Milliseconds longest() const { return longest_; }

 private:
  Milliseconds longest_{0};
};

}  // namespace

int main() {
  mxt::EngineOptions one_thread;
  one_thread.threads = 1;  // the other cores are the game's
  mxt::Engine engine(one_thread);
  mxt::ModelConfig config;
  config.vocab_size = 16, config.context_length = length;
  config.layers = 2, config.heads = 2, config.channels = 64;
  mxt::Model model(engine, config);
  mxt::TrainerOptions options;
  options.batch_size = rows, options.accumulation = batches_of_a_step;
  options.lr = 3e-3f;
  mxt::Trainer trainer(model, options);

  std::mt19937 random(1);
  Moves moves;
  std::vector<std::uint32_t> tokens(rows * length), targets(rows * length);
  Duration of_batch, of_update;
  std::size_t batches = 0, late = 0;
  mxt::StepStats stats{};
  const auto batch = [&] {
    moves.next(tokens, targets);
    trainer.forward_backward(tokens, targets);
    batches++;
  };
  const auto update = [&] { stats = trainer.update(); };
  // Once before the first frame, so that their times are known.
  for (std::size_t i = 0; i < batches_of_a_step; i++) of_batch.measure(batch);
  of_update.measure(update);
  std::printf("a batch takes %.2f ms, an update %.2f ms\n", of_batch.longest().count(),
              of_update.longest().count());

  auto next_frame = Clock::now();
  for (int frame = 1; frame <= frames; frame++) {
    next_frame += std::chrono::duration_cast<Clock::duration>(frame_time);
    play(random);
    while (true) {
      const bool is_whole = batches % batches_of_a_step == 0 && batches > 0 &&
                            batches / batches_of_a_step > trainer.steps_done();
      const Duration &next = is_whole ? of_update : of_batch;
      if (Clock::now() + std::chrono::duration_cast<Clock::duration>(next.longest()) > next_frame) {
        break;
      }
      if (is_whole) {
        of_update.measure(update);
      } else {
        of_batch.measure(batch);
      }
    }
    late += Clock::now() > next_frame;
    std::this_thread::sleep_until(next_frame);
    if (frame % 60 == 0) {
      std::printf("frame %d: step %llu, loss %.3f\n", frame,
                  static_cast<unsigned long long>(stats.step), stats.loss);
    }
  }
  std::printf("%zu batches in %d frames, %zu of them late\n", batches, frames, late);
}
