// What callbacks may return and throw: the run or the text ends in order, and what was thrown
// arrives at the caller.
#include "check.hpp"

#include <memory>
#include <thread>

namespace {

// An exception of the host's own, which has nothing to do with std::exception.
struct Enough {
  int step;
};

struct Fixture {
  mxt::Engine engine{one_thread()};
  mxt::Model model{engine, small_config()};
  mxt::Dataset dataset = mxt::Dataset::from_tokens(some_tokens());
  mxt::Trainer trainer{model, small_options()};
};

int steps_seen = 0;
void count_step(const mxt::StepStats &) { steps_seen++; }

void what_a_callback_may_be(Fixture &it) {
  CHECK(it.trainer.run(it.dataset, 2, count_step).steps == 2 && steps_seen == 2);
  CHECK(it.trainer.run(it.dataset, 1, &count_step).steps == 1 && steps_seen == 3);
  // Only moved, never copied.
  auto owned = std::make_unique<int>(0);
  const int *seen = owned.get();
  it.trainer.run(it.dataset, 2, [owned = std::move(owned), seen](const mxt::StepStats &) {
    CHECK(seen == owned.get());
    ++*owned;
  });
  // By reference, with state, and with the evaluation.
  struct Counter {
    int steps = 0, evaluations = 0;
    mxt::Flow operator()(const mxt::StepStats &step, const mxt::EvalStats *eval) {
      CHECK(step.loss > 0 && step.struct_size == sizeof step);
      evaluations += eval != nullptr;
      return ++steps == 4 ? mxt::Flow::stop : mxt::Flow::go_on;
    }
  } counter;
  mxt::RunOptions options = 10;
  options.eval_dataset = it.dataset.get();
  options.eval_every = 1;
  options.eval_batches = 1;
  const mxt::RunResult result = it.trainer.run(it.dataset, options, std::ref(counter));
  CHECK(result.steps == 4 && result.end == mxt::RunEnd::callback);
  CHECK(counter.steps == 4 && counter.evaluations == 4 && result.last_eval_loss > 0);
}

void exceptions_of_a_run(Fixture &it, const std::string &folder) {
  mxt::RunOptions options = 10;
  options.save_dir = folder;
  const std::uint64_t before = it.trainer.steps_done();
  int caught = 0;
  try {
    it.trainer.run(it.dataset, options, [&](const mxt::StepStats &stats) {
      if (stats.step == before + 3) throw Enough{static_cast<int>(stats.step)};
    });
  } catch (const Enough &enough) {
    caught = enough.step;
  }
  CHECK(caught == static_cast<int>(before + 3) && it.trainer.steps_done() == before + 3);
  // The run ended in order: what it had done is saved.
  mxt::Trainer resumed = mxt::Trainer::load(it.engine, folder);
  CHECK(resumed.steps_done() == before + 3);
  CHECK(resumed.step(it.dataset).loss == it.trainer.step(it.dataset).loss);
  // Nothing of it is left behind.
  CHECK(it.trainer.run(it.dataset, 2, [](const mxt::StepStats &) {}).steps == 2);
  CHECK(it.trainer.run(it.dataset, 2).end == mxt::RunEnd::finished);
}

// An error of the library inside a callback is an exception like any other, and so is one of a run
// inside a run.
void exceptions_from_within(Fixture &it) {
  mxt_status status = MXT_OK;
  try {
    it.trainer.run(it.dataset, 5, [&](const mxt::StepStats &) { it.model.read("no.such"); });
  } catch (const mxt::error &error) {
    status = error.status();
  }
  CHECK(status == MXT_ERROR_NO_SUCH_TENSOR);

  int inner = 0, outer = 0;
  try {
    it.trainer.run(it.dataset, 5, [&](const mxt::StepStats &) {
      try {
        it.trainer.run(it.dataset, 5, [](const mxt::StepStats &) { throw Enough{1}; });
      } catch (const Enough &enough) {
        inner += enough.step;
        throw Enough{7};
      }
    });
  } catch (const Enough &enough) {
    outer = enough.step;
  }
  CHECK(inner == 1 && outer == 7);

  // What fails inside and is caught there does not end the run.
  int caught = 0;
  const mxt::RunResult result = it.trainer.run(it.dataset, 3, [&](const mxt::StepStats &) {
    try {
      it.model.read("no.such");
    } catch (const mxt::error &) {
      caught++;
    }
  });
  CHECK(result.steps == 3 && caught == 3);
}

void tokens(Fixture &it) {
  mxt::GenerateOptions options;
  options.max_tokens = 8;
  std::vector<std::uint32_t> seen;
  const auto text = it.model.generate({1, 2}, options, [&](std::uint32_t token) {
    seen.push_back(token);
    return seen.size() == 5 ? mxt::Flow::stop : mxt::Flow::go_on;
  });
  CHECK(text == seen && text.size() == 5);
  // The first token of a greedy text, as a stop token, is all of the text.
  mxt::GenerateOptions greedy;
  greedy.temperature = 0;
  const auto whole = it.model.generate({1, 2}, greedy);
  greedy.stop_at({whole.data(), 1});
  CHECK(it.model.generate({1, 2}, greedy) == std::vector<std::uint32_t>{whole[0]});

  int caught = 0;
  std::size_t count = 0;
  try {
    it.model.generate({1}, options, [&](std::uint32_t) {
      if (++count == 3) throw Enough{3};
    });
  } catch (const Enough &enough) {
    caught = enough.step;
  }
  CHECK(caught == 3 && count == 3);
  // While tokens are sampled, the model is in use.
  mxt_status status = MXT_OK;
  try {
    it.model.generate({1}, options, [&](std::uint32_t) { it.model.read("transformer.ln_f.bias"); });
  } catch (const mxt::error &error) {
    status = error.status();
  }
  CHECK(status == MXT_ERROR_BUSY);
  CHECK(it.model.generate({1}, options).size() == 8);
  // Memory is for what is written, not for what may be.
  options.max_tokens = SIZE_MAX;
  count = 0;
  const auto short_text = it.model.generate({1}, options, [&](std::uint32_t) {
    return ++count == 4 ? mxt::Flow::stop : mxt::Flow::go_on;
  });
  CHECK(short_text.size() == 4);
}

// The log callback outlives the engine, and what it throws arrives at the call that logged.
void log_lines() {
  int lines = 0;
  bool armed = false;
  auto log = [&](mxt::LogLevel level, std::string_view line) {
    CHECK(level >= mxt::LogLevel::warning && level <= mxt::LogLevel::debug && !line.empty());
    lines++;
    if (armed) throw Enough{9};
  };
  auto engine = std::make_unique<mxt::Engine>(one_thread(), log);
  CHECK(lines > 0);
  mxt::Model model(*engine, small_config());
  engine.reset();
  const int before = lines;
  mxt::Trainer trainer(model, small_options());
  CHECK(lines > before);
  armed = true;
  int caught = 0;
  try {
    mxt::Trainer other(model, small_options());
  } catch (const Enough &enough) {
    caught++;
    CHECK(enough.step == 9);
  }
  try {
    mxt::Engine other(one_thread(), log);
  } catch (const Enough &) {
    caught++;
  }
  CHECK(caught == 2);
  armed = false;
  CHECK(model.config().layers == 1);
}

void log_is_destroyed_once() {
  const auto owned = std::make_shared<int>(0);
  const auto log = [owned](mxt::LogLevel, std::string_view) {};
  CHECK(owned.use_count() == 2);
  {
    auto trainer = [&] {
      mxt::Engine engine(one_thread(), log);
      mxt::Engine moved(std::move(engine));
      mxt::Model model(moved, small_config());
      return mxt::Trainer(model, small_options());
    }();
    CHECK(owned.use_count() == 3);
    // From within a call: the trainer goes with the run that it is in.
    auto last = std::make_unique<mxt::Trainer>(std::move(trainer));
    Fixture it;
    last->run(it.dataset, 5, [&](const mxt::StepStats &) {
      last.reset();
      CHECK(owned.use_count() == 3);
    });
    CHECK(owned.use_count() == 2);
  }
  // An engine that cannot be made leaves nothing behind.
  mxt::EngineOptions options = one_thread();
  options.device = "abacus";
  bool threw = false;
  try {
    mxt::Engine none(options, log);
  } catch (const mxt::error &error) {
    threw = error.status() == MXT_ERROR_INVALID_ARGUMENT;
  }
  CHECK(threw && owned.use_count() == 2);
}

void freed_and_stopped_from_elsewhere() {
  Fixture it;
  auto trainer = std::make_unique<mxt::Trainer>(it.model, small_options());
  const mxt::RunResult result =
      trainer->run(it.dataset, 5, [&](const mxt::StepStats &) { trainer.reset(); });
  CHECK(result.steps == 1 && trainer == nullptr);

  std::thread stopper;
  const mxt::RunResult stopped = it.trainer.run(it.dataset, 1000000, [&](const mxt::StepStats &) {
    if (!stopper.joinable()) stopper = std::thread([&] { it.trainer.request_stop(); });
  });
  stopper.join();
  CHECK(stopped.end == mxt::RunEnd::request && stopped.steps > 0);
}

}  // namespace

// A loss of the host's, which may throw: then nothing waits any more.
void losses(Fixture &it) {
  std::vector<std::uint32_t> tokens(32), targets(32);
  for (std::uint32_t i = 0; i < 32; i++)
    tokens[i] = i * i % 29, targets[i] = (i + 1) * (i + 1) % 29;
  mxt::Batch batch;
  batch.count = 32, batch.tokens = tokens.data();
  std::size_t seen = 0;
  const std::uint64_t before = it.trainer.steps_done();
  // The squares of logits: they are to become small.
  const auto squares = [&](const mxt::LogitRows &of) {
    CHECK(of.first == seen && of.vocab_size == 32 && of.logits.size() == 32 * of.losses.size());
    for (std::size_t row = 0; row < of.losses.size(); row++) {
      float loss = 0.0f;
      for (float &y : of.row(row)) loss += y * y, y *= 2.0f;
      of.losses[row] = loss;
    }
    seen += of.losses.size();
  };
  float first = 0.0f, last = 0.0f;
  for (int i = 0; i < 10; i++) {
    seen = 0;
    it.trainer.forward_backward(batch, squares);
    CHECK(seen == 32);
    last = it.trainer.update().loss;
    if (i == 0) first = last;
  }
  CHECK(last < 0.9f * first && it.trainer.steps_done() == before + 10);
  seen = 0;
  CHECK(it.trainer.forward(batch, squares).loss < last && seen == 32);

  it.trainer.forward_backward(tokens, targets);
  int caught = 0;
  try {
    it.trainer.forward_backward(batch, [](const mxt::LogitRows &) { throw Enough{5}; });
  } catch (const Enough &enough) {
    caught = enough.step;
  }
  CHECK(caught == 5);
  mxt_status status = MXT_OK;
  try {
    it.trainer.update();
  } catch (const mxt::error &error) {
    status = error.status();
  }
  CHECK(status == MXT_ERROR_INVALID_ARGUMENT);
  try {
    it.trainer.forward_backward(batch, [](const mxt::LogitRows &) { return mxt::Flow::stop; });
  } catch (const mxt::error &error) {
    status = error.status();
  }
  CHECK(status == MXT_STOPPED);

  // Gradients, and lengths that do not fit.
  std::vector<float> weights(32, 1.0f), bias(16), doubled(16);
  it.trainer.forward_backward(tokens, targets, weights);
  it.trainer.read_gradient("transformer.ln_f.bias", bias);
  it.trainer.scale_gradients(4.0f);
  it.trainer.scale_gradients("transformer.ln_f.bias", 0.5f);
  it.trainer.read_gradient("transformer.ln_f.bias", doubled);
  CHECK(doubled[3] == 2.0f * bias[3] && bias[3] != 0.0f);
  it.trainer.write_gradient("transformer.ln_f.bias", bias);
  it.trainer.read_gradient("transformer.ln_f.bias", doubled);
  CHECK(doubled == bias);
  it.trainer.zero_gradients();
  batch.targets = targets.data();
  CHECK(it.trainer.forward(batch).tokens == 32);
  // Documents: the second token of one is where the first of another was.
  std::vector<std::uint32_t> documents(32, 3);
  std::vector<float> together(32), apart(32);
  mxt::Batch packed = batch;
  packed.losses = together.data();
  it.trainer.forward(packed);
  for (std::size_t i = 5; i < 16; i++) documents[i] = 0;
  packed.documents = documents.data();
  packed.losses = apart.data();
  it.trainer.forward(packed);
  CHECK(together[4] == apart[4] && together[5] != apart[5] && together[16] == apart[16]);
  it.trainer.forward_backward(tokens, targets, {}, documents);
  // As many of each, or nothing is read.
  const std::vector<std::uint32_t> few(10, 1);
  const std::vector<float> few_weights(10, 1.0f);
  for (const auto &call :
       {std::function<void()>([&] { it.trainer.forward_backward(few, targets); }),
        {[&] { it.trainer.forward_backward(tokens, few); }},
        {[&] { it.trainer.forward_backward(few, few, {}, documents); }},
        {[&] { it.trainer.forward_backward(few, few, std::vector<float>(32, 1.0f)); }},
        {[&] { it.trainer.forward_backward(tokens, targets, few_weights); }}}) {
    bool refused = false;
    try {
      call();
    } catch (const mxt::error &error) {
      refused = error.status() == MXT_ERROR_INVALID_ARGUMENT &&
                std::string_view(error.what()).find("as many as tokens") != std::string_view::npos;
    }
    CHECK(refused);
  }
  it.trainer.zero_gradients();
  documents.pop_back();
  std::string what;
  try {
    it.trainer.forward_backward(tokens, targets, {}, documents);
  } catch (const mxt::error &error) {
    what = error.what();
  }
  CHECK(what.find("got 31") != std::string::npos);
  weights.pop_back();
  try {
    it.trainer.forward_backward(tokens, targets, weights);
  } catch (const mxt::error &error) {
    what = error.what();
  }
  CHECK(what.find("got 31") != std::string::npos);
}

// Tokens of the host's own, which it keeps alive, and windows that it fills.
void data(Fixture &it) {
  auto tokens = std::make_shared<std::vector<std::uint16_t>>();
  for (const std::uint32_t token : some_tokens()) {
    tokens->push_back(static_cast<std::uint16_t>(token));
  }
  const std::weak_ptr<std::vector<std::uint16_t>> watched = tokens;
  {
    const mxt::view<const std::uint16_t> view = *tokens;
    const mxt::Dataset lent = mxt::Dataset::from_memory(view, std::move(tokens));
    CHECK(lent.token_count() == 4000 && !watched.expired());
    CHECK(it.trainer.eval(lent, 3).loss == it.trainer.eval(it.dataset, 3).loss);
  }
  CHECK(watched.expired());

  const mxt::Dataset windows = mxt::Dataset::from_windows(
      20, [](std::uint64_t number, mxt::view<std::uint32_t> to, mxt::view<float> weights) {
        CHECK(to.size() == weights.size() + 1 && number < 20);
        for (std::size_t i = 0; i < to.size(); i++) {
          to[i] = static_cast<std::uint32_t>((i * i + number) % 29);
        }
        weights[0] = 0.0f;
      });
  CHECK(it.trainer.eval(windows).tokens == 20 * 15 && it.trainer.step(windows).loss > 0);
  const auto throws = [](std::uint64_t, mxt::view<std::uint32_t>, mxt::view<float>) {
    throw Enough{9};
  };
  const mxt::Dataset broken = mxt::Dataset::from_windows(20, throws);
  int caught = 0;
  try {
    it.trainer.step(broken);
  } catch (const Enough &enough) {
    caught = enough.step;
  }
  CHECK(caught == 9);
  CHECK(it.trainer.run(windows, 2).steps == 2);

  const mxt::Dataset packed = mxt::Dataset::from_packed_windows(
      20, [](std::uint64_t number, mxt::view<std::uint32_t> to, mxt::view<float> weights,
             mxt::view<std::uint32_t> documents) {
        CHECK(documents.size() == weights.size() && documents[3] == 0);
        for (std::size_t i = 0; i < to.size(); i++) {
          to[i] = static_cast<std::uint32_t>((i * i + number) % 29);
        }
        weights[0] = 0.0f;
        if (number == 19) throw Enough{19};
        for (std::size_t i = 7; i < documents.size(); i++) documents[i] = 1;
      });
  CHECK(it.trainer.eval(packed, 1).loss != it.trainer.eval(windows, 1).loss);
  try {
    it.trainer.eval(packed);
  } catch (const Enough &enough) {
    caught = enough.step;
  }
  CHECK(caught == 19);
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  Fixture it;
  what_a_callback_may_be(it);
  exceptions_of_a_run(it, std::string(argv[1]) + "/run");
  exceptions_from_within(it);
  tokens(it);
  losses(it);
  data(it);
  log_lines();
  log_is_destroyed_once();
  freed_and_stopped_from_elsewhere();
  return 0;
}
