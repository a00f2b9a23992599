// Checkpoints without a folder: in memory, and in a store of the program's that fails and throws.
#include "check.hpp"

#include <cstring>
#include <map>
#include <memory_resource>

namespace {

using Bytes = std::vector<std::byte>;

struct Burnt {
  int call;
};

// A store in a map. Call number `fails_at` fails, or throws.
struct State {
  std::map<std::string, Bytes> files, new_files;
  int calls = 0, fails_at = 0, commits = 0, aborts = 0, open = 0;
  bool throws = false, is_destroyed = false;

  mxt::Flow call() {
    if (++calls != fails_at) return mxt::Flow::go_on;
    if (throws) throw Burnt{calls};
    return mxt::Flow::stop;
  }
};

class Store : public mxt::FileStore {
 public:
  explicit Store(State &state) : state_(state) {}
  ~Store() override { state_.is_destroyed = true; }

  mxt::Flow open(const std::string &name, std::unique_ptr<Reader> &reader) override {
    if (state_.call() == mxt::Flow::stop) return mxt::Flow::stop;
    const auto found = state_.files.find(name);
    if (found != state_.files.end()) reader = std::make_unique<Open>(state_, found->second);
    return mxt::Flow::go_on;
  }
  mxt::Flow begin() override { return state_.call(); }
  mxt::Flow create(const std::string &name, std::uint64_t size,
                   std::unique_ptr<Writer> &writer) override {
    if (state_.call() == mxt::Flow::stop) return mxt::Flow::stop;
    writer = std::make_unique<New>(state_, state_.new_files[name], size);
    return mxt::Flow::go_on;
  }
  mxt::Flow commit() override {
    if (state_.call() == mxt::Flow::stop) return mxt::Flow::stop;
    state_.files = std::move(state_.new_files);
    state_.new_files.clear();
    state_.commits++;
    return mxt::Flow::go_on;
  }
  void abort() override {
    state_.new_files.clear();
    state_.aborts++;
  }
  const char *error() const override { return "the store is full"; }

 private:
  class Open : public Reader {
   public:
    Open(State &state, const Bytes &bytes) : state_(state), bytes_(bytes) { state_.open++; }
    ~Open() override { state_.open--; }
    std::uint64_t size() const override { return bytes_.size(); }
    mxt::Flow read(std::uint64_t offset, mxt::view<std::byte> to) override {
      if (state_.call() == mxt::Flow::stop) return mxt::Flow::stop;
      CHECK(offset + to.size() <= bytes_.size());
      std::memcpy(to.data(), bytes_.data() + offset, to.size());
      return mxt::Flow::go_on;
    }

   private:
    State &state_;
    const Bytes &bytes_;
  };

  class New : public Writer {
   public:
    New(State &state, Bytes &bytes, std::uint64_t size)
        : state_(state), bytes_(bytes), size_(size) {
      state_.open++;
    }
    ~New() override { state_.open--; }
    mxt::Flow write(mxt::view<const std::byte> part) override {
      if (state_.call() == mxt::Flow::stop) return mxt::Flow::stop;
      bytes_.insert(bytes_.end(), part.begin(), part.end());
      return mxt::Flow::go_on;
    }
    mxt::Flow close() override {
      CHECK(bytes_.size() == size_);
      return state_.call();
    }

   private:
    State &state_;
    Bytes &bytes_;
    std::uint64_t size_;
  };

  State &state_;
};

struct Fixture {
  mxt::Engine engine{one_thread()};
  mxt::Model model{engine, small_config()};
  mxt::Dataset dataset = mxt::Dataset::from_tokens(some_tokens());
  mxt::Trainer trainer{model, small_options()};
};

bool is_same(const mxt::Files &files, const std::map<std::string, Bytes> &others) {
  const auto names = files.names();
  bool same = names.size() == others.size();
  for (const auto &name : names) {
    const auto bytes = files.bytes(name);
    const Bytes &other = others.at(name);
    same = same && bytes.size() == other.size() &&
           std::memcmp(bytes.data(), other.data(), other.size()) == 0;
  }
  return same;
}

void in_memory(Fixture &it) {
  mxt::Files files, lent;
  CHECK(files.names().empty());
  it.trainer.step(it.dataset);
  it.trainer.save(files);
  CHECK(files.names().size() == 4 && files.names()[0] == "config.json");
  auto owner = std::make_shared<std::vector<Bytes>>();
  for (const auto &name : files.names()) {
    const auto bytes = files.bytes(name);
    owner->emplace_back(bytes.begin(), bytes.end());
    lent.lend(name, owner->back(), owner);
  }
  CHECK(owner.use_count() == 5);
  mxt::Trainer resumed = mxt::Trainer::load(it.engine, files);
  mxt::Trainer again = mxt::Trainer::load(it.engine, lent);
  mxt::Trainer rounded = mxt::Trainer::load_as(it.engine, lent, "adamw,moments=bf16");
  CHECK(rounded.options().optimizer == std::string("adamw,moments=bf16"));
  const float loss = it.trainer.step(it.dataset).loss;
  CHECK(resumed.step(it.dataset).loss == loss && again.step(it.dataset).loss == loss);
  lent.remove("trainer.json");
  CHECK(owner.use_count() == 4);
  {
    mxt::Files moved = std::move(lent);
  }
  CHECK(owner.use_count() == 1);

  mxt::Snapshot snapshot = resumed.snapshot();
  mxt::Files copy;
  snapshot.save(copy);
  resumed.save(files);
  for (const auto &name : files.names()) {
    const auto a = files.bytes(name), b = copy.bytes(name);
    CHECK(a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0);
  }
  it.model.save(files, mxt::StoredWeights::bf16);
  CHECK(files.names().size() == 2);
  CHECK(mxt::Model::load(it.engine, files).parameter_count() == it.model.parameter_count());
  const Bytes some(3);
  files.put("some", some);
  CHECK(files.names().size() == 3 && files.bytes("some").size() == 3);
  mxt_status status = MXT_OK;
  try {
    files.bytes("none");
  } catch (const mxt::error &error) {
    status = error.status();
  }
  CHECK(status == MXT_ERROR_INVALID_ARGUMENT);
}

void in_a_store(Fixture &it) {
  State state;
  mxt::Files files(std::make_unique<Store>(state));
  mxt::Files before, after;
  it.trainer.save(files);
  it.trainer.save(before);
  CHECK(is_same(before, state.files) && state.commits == 1 && state.aborts == 0);
  it.trainer.step(it.dataset);
  it.trainer.save(after);
  for (const bool throws : {false, true}) {
    state.throws = throws;
    int failures = 0;
    for (bool is_done = false; !is_done;) {
      state.calls = state.commits = state.aborts = 0;
      state.fails_at = ++failures;
      bool failed = false;
      try {
        it.trainer.save(files);
        is_done = true;
      } catch (const mxt::error &error) {
        failed = !throws && error.status() == MXT_ERROR_IO &&
                 std::strstr(error.what(), "the store is full") != nullptr;
      } catch (const Burnt &burnt) {
        failed = throws && burnt.call == failures;
      }
      CHECK(failed != is_done && state.open == 0 && state.new_files.empty());
      CHECK(state.commits == is_done && state.aborts == (failed && failures > 1));
      CHECK(is_same(is_done || throws ? after : before, state.files));
    }
    CHECK(failures > 20);
    // A load, too.
    failures = 0;
    for (bool is_done = false; !is_done;) {
      state.calls = 0;
      state.fails_at = ++failures;
      bool failed = false;
      try {
        mxt::Trainer loaded = mxt::Trainer::load(it.engine, files);
        CHECK(loaded.steps_done() == it.trainer.steps_done());
        is_done = true;
      } catch (const mxt::error &error) {
        failed = !throws && error.status() == MXT_ERROR_IO;
      } catch (const Burnt &burnt) {
        failed = throws && burnt.call == failures;
      }
      CHECK(failed != is_done && state.open == 0);
    }
    CHECK(failures > 20);
  }
  state.fails_at = 0;
  // A run saves where its callback throws, too, and where a save before has failed.
  for (const int call : {0, 3}) {
    mxt::RunOptions options(4);
    options.save_files = files.get();
    options.save_every = call == 0 ? 0 : 1;
    state.calls = state.commits = 0;
    state.fails_at = call;
    int thrown = -1;
    try {
      it.trainer.run(it.dataset, options, [&](const mxt::StepStats &) {
        if (call == 0) throw Burnt{0};
      });
    } catch (const Burnt &burnt) {
      thrown = burnt.call;
    }
    CHECK(thrown == call && state.commits == 1);
    CHECK(mxt::Trainer::load(it.engine, files).steps_done() == it.trainer.steps_done());
  }
  CHECK(!state.is_destroyed);
  files = mxt::Files();
  CHECK(state.is_destroyed);
  mxt_status status = MXT_OK;
  try {
    mxt::Files none{std::unique_ptr<mxt::FileStore>()};
  } catch (const mxt::error &error) {
    status = error.status();
  }
  CHECK(status == MXT_ERROR_NULL);
}

// A store on another that calls the library itself, in its destructors, too.
class Forwarding : public mxt::FileStore {
 public:
  explicit Forwarding(mxt::Files &to) : to_(to) {}
  mxt::Flow open(const std::string &, std::unique_ptr<Reader> &) override {
    return mxt::Flow::go_on;
  }
  mxt::Flow create(const std::string &name, std::uint64_t,
                   std::unique_ptr<Writer> &writer) override {
    writer = std::make_unique<File>(to_, name);
    return mxt::Flow::go_on;
  }
  mxt::Flow commit() override {
    return to_.names().size() == 4 ? mxt::Flow::go_on : mxt::Flow::stop;
  }
  void abort() override {}

 private:
  class File : public Writer {
   public:
    File(mxt::Files &to, const std::string &name) : to_(to), name_(name) {}
    ~File() override { to_.put(name_, bytes_); }
    mxt::Flow write(mxt::view<const std::byte> part) override {
      bytes_.insert(bytes_.end(), part.begin(), part.end());
      return mxt::Flow::go_on;
    }

   private:
    mxt::Files &to_;
    std::string name_;
    Bytes bytes_;
  };

  mxt::Files &to_;
};

// What a callback has thrown before does not come out of calls that a store makes.
void in_a_store_that_calls_back(Fixture &it) {
  mxt::Files memory;
  mxt::Files files(std::make_unique<Forwarding>(memory));
  mxt::RunOptions options(4);
  options.save_files = files.get();
  bool caught = false;
  try {
    it.trainer.run(it.dataset, options, [&](const mxt::StepStats &) { throw Burnt{1}; });
  } catch (const Burnt &) {
    caught = true;
  }
  CHECK(caught);
  CHECK(mxt::Trainer::load(it.engine, memory).steps_done() == it.trainer.steps_done());
}

// Without a callback for steps, too, an exception of another ends the run, and it saves.
void a_run_without_a_callback(Fixture &it) {
  State state;
  state.throws = true;
  state.fails_at = 3;
  mxt::Files files(std::make_unique<Store>(state));
  mxt::RunOptions options(4);
  options.save_files = files.get();
  options.save_every = 1;
  const std::uint64_t before = it.trainer.steps_done();
  bool caught = false;
  try {
    it.trainer.run(it.dataset, options);
  } catch (const Burnt &) {
    caught = true;
  }
  CHECK(caught && it.trainer.steps_done() == before + 1 && state.commits == 1);
}

// What is out, and how much there may be.
class Counting : public std::pmr::memory_resource {
 public:
  std::size_t out = 0, most = SIZE_MAX;

 private:
  void *do_allocate(std::size_t bytes, std::size_t alignment) override {
    if (bytes > most - out) throw std::bad_alloc();
    out += bytes;
    return std::pmr::new_delete_resource()->allocate(bytes, alignment);
  }
  void do_deallocate(void *memory, std::size_t bytes, std::size_t alignment) override {
    out -= bytes;
    std::pmr::new_delete_resource()->deallocate(memory, bytes, alignment);
  }
  bool do_is_equal(const memory_resource &other) const noexcept override { return this == &other; }
};

void memory(Fixture &it) {
  Counting counting;
  {
    mxt::EngineOptions options = one_thread();
    options.allocate_from(counting);
    mxt::Engine engine(options);
    CHECK(engine.memory().device_bytes == 0);
    mxt::Model model(engine, small_config());
    mxt::Trainer trainer(model, small_options());
    trainer.step(it.dataset);
    const mxt::MemoryUse use = engine.memory();
    CHECK(use.device_bytes == counting.out && counting.out > 0 && use.device_limit > 0);
    counting.most = counting.out;
    mxt_status status = MXT_OK;
    try {
      trainer.snapshot();
    } catch (const mxt::error &error) {
      status = error.status();
    }
    CHECK(status == MXT_ERROR_OUT_OF_MEMORY && trainer.step(it.dataset).loss > 0);
    counting.most = SIZE_MAX;
    CHECK(mxt::Snapshot(trainer.snapshot()).get() != nullptr);
    CHECK(engine.memory().host_peak > 0 && engine.memory().host_bytes == 0);
  }
  CHECK(counting.out == 0);
}

}  // namespace

int main(int argc, char **argv) {
  CHECK(argc == 2 && argv[1][0] != 0);
  Fixture it;
  in_memory(it);
  in_a_store(it);
  in_a_store_that_calls_back(it);
  a_run_without_a_callback(it);
  memory(it);
  return 0;
}
