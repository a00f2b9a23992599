// mxfp4train.hpp: the C API as C++17 classes. Header-only; link with libmxfp4train.
//
//   mxt::Engine engine;                                     // a device and its threads
//   mxt::ModelConfig config;                                // GPT-2 small, unless changed
//   mxt::Model model(engine, config);
//   mxt::Dataset dataset = mxt::Dataset::open("train.bin");
//   mxt::Trainer trainer(model);
//   for (int i = 0; i < 1000; i++) std::printf("%g\n", trainer.step(dataset).loss);
//   trainer.save("out");                                    // Trainer::load goes on from there
//
// What a call does, its units, its threads and its errors are written in mxfp4train.h, at the C
// function of the same name; here is only what C++ adds:
//
// 1. Handles free themselves. They can be moved, not copied, and destroyed in any order. A handle
//    that was moved from, or made from nullptr, is empty: it is false, and calls on it fail with
//    MXT_ERROR_NULL.
//
// 2. A call that fails throws mxt::error, with the status and the library's message.
//    With MXT_NO_EXCEPTIONS defined before the include, or exceptions off in the compiler, the same
//    functions return an mxt::result, and there are no throwing constructors: use create, which
//    both modes have. Parts of one program may use different modes.
//
// 3. Callbacks are anything that can be called: lambdas, functions, objects, which are taken by
//    value (std::ref passes one by reference). They return nothing, or mxt::Flow to say whether to
//    go on. An exception that leaves a callback does not pass through the library: it ends the run
//    or the text in order (a run still writes its checkpoint; should that fail, the log says so),
//    and is thrown again, the same object, once the C function has returned. An exception of a log
//    callback is thrown again by the call that logged. Without exceptions a callback must not
//    throw.
//
// 4. Options are the C structs with their defaults filled in. Texts are std::string, and the
//    options' own; what C says by a number is an enum class, such as mxt::Schedule::cosine.
//
// Memory that the classes themselves cannot get (for a vector of tokens, say) is std::bad_alloc, as
// everywhere in C++.

#ifndef MXFP4TRAIN_HPP
#define MXFP4TRAIN_HPP

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <memory_resource>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "mxfp4train.h"

#if !defined(MXT_NO_EXCEPTIONS) && !defined(__cpp_exceptions)
#define MXT_NO_EXCEPTIONS
#endif

namespace mxt {

// The namespace is part of every symbol, so that the two modes can be linked into one program.
#ifdef MXT_NO_EXCEPTIONS
inline namespace returning {
#else
inline namespace throwing {
#endif

// What went wrong: a code of mxt_status_code, and in what() the library's message.
class error : public std::runtime_error {
 public:
  error(mxt_status status, const std::string &message)
      : std::runtime_error(message), status_(status) {}

  mxt_status status() const noexcept { return status_; }

 private:
  mxt_status status_;
};

using StepStats = mxt_step_stats;
using EvalStats = mxt_eval_stats;
using TensorUpdate = mxt_tensor_update;
using WeightMetrics = mxt_weight_metrics;
using Coverage = mxt_coverage;
using MemoryPlan = mxt_memory_plan;
using MemoryUse = mxt_memory_use;

// What C says by numbers; each has the value of C's constant of its name.
enum class LogLevel : std::int32_t {
  warning = MXT_LOG_LEVEL_WARNING,
  info = MXT_LOG_LEVEL_INFO,
  debug = MXT_LOG_LEVEL_DEBUG,
};
enum class Architecture : std::int32_t {
  gpt2 = MXT_ARCHITECTURE_GPT2,
  llama = MXT_ARCHITECTURE_LLAMA,
};
// How rotary positions are stretched.
enum class RopeScaling : std::int32_t {
  none = MXT_ROPE_SCALING_NONE,
  linear = MXT_ROPE_SCALING_LINEAR,
  llama3 = MXT_ROPE_SCALING_LLAMA3,
};
enum class Activation : std::int32_t {
  gelu_tanh = MXT_ACTIVATION_GELU_TANH,
  gelu = MXT_ACTIVATION_GELU,
};
enum class StoredWeights : std::int32_t {
  f32 = MXT_STORED_WEIGHTS_F32,
  f16 = MXT_STORED_WEIGHTS_F16,
  bf16 = MXT_STORED_WEIGHTS_BF16,
  mxfp4 = MXT_STORED_WEIGHTS_MXFP4,
};
enum class DecoderWeights : std::int32_t {
  f32 = MXT_DECODER_WEIGHTS_F32,
  bf16 = MXT_DECODER_WEIGHTS_BF16,
  mxfp4 = MXT_DECODER_WEIGHTS_MXFP4,
};
enum class Draft : std::int32_t {
  none = MXT_DRAFT_NONE,
  ngram = MXT_DRAFT_NGRAM,
  mxfp4 = MXT_DRAFT_MXFP4,
  mxfp4_ngram = MXT_DRAFT_MXFP4_NGRAM,
};
// Of a token; `automatic` finds out.
enum class TokenType : std::int32_t {
  automatic = MXT_TOKEN_TYPE_AUTO,
  u16 = MXT_TOKEN_TYPE_U16,
  u32 = MXT_TOKEN_TYPE_U32,
  i64 = MXT_TOKEN_TYPE_I64,
  u8 = MXT_TOKEN_TYPE_U8,
  i32 = MXT_TOKEN_TYPE_I32,
};
enum class Schedule : std::int32_t {
  constant = MXT_SCHEDULE_CONSTANT,
  cosine = MXT_SCHEDULE_COSINE,
  linear = MXT_SCHEDULE_LINEAR,
  trapezoid = MXT_SCHEDULE_TRAPEZOID,
};
enum class RunEnd : std::int32_t {
  finished = MXT_RUN_END_FINISHED,
  callback = MXT_RUN_END_CALLBACK,
  request = MXT_RUN_END_REQUEST,
};
// Linear layers of every block; several are joined by |.
enum class LoraLayers : std::uint32_t {
  attn_c_attn = MXT_LORA_LAYER_ATTN_C_ATTN,
  attn_c_proj = MXT_LORA_LAYER_ATTN_C_PROJ,
  mlp_c_fc = MXT_LORA_LAYER_MLP_C_FC,
  mlp_c_proj = MXT_LORA_LAYER_MLP_C_PROJ,
  all = attn_c_attn | attn_c_proj | mlp_c_fc | mlp_c_proj,
};
constexpr LoraLayers operator|(LoraLayers a, LoraLayers b) noexcept {
  return static_cast<LoraLayers>(static_cast<std::uint32_t>(a) | static_cast<std::uint32_t>(b));
}

// What a callback may return.
enum class Flow : std::int32_t { go_on = 0, stop = 1 };

// Receives log lines, on whichever thread is inside a call.
using LogFunction = std::function<void(LogLevel level, std::string_view line)>;

// Elements that somebody else owns, like std::span: made from a vector, an array, a span, a pointer
// with a count or, for const elements and the length of one call, a list in braces.
template <class T>
class view {
  template <class C>
  using data_of = decltype(std::data(std::declval<C &>()));

 public:
  constexpr view() noexcept = default;
  constexpr view(T *data, std::size_t size) noexcept : data_(data), size_(size) {}
  constexpr view(std::initializer_list<std::remove_const_t<T>> list) noexcept
      : data_(std::data(list)), size_(list.size()) {}
  // The arrays are compared, not the elements: a derived class has another size than its base.
  template <class C, class = std::enable_if_t<
                         std::is_convertible_v<std::remove_pointer_t<data_of<C>> (*)[], T (*)[]>>>
  constexpr view(C &&container) noexcept
      : data_(std::data(container)), size_(std::size(container)) {}

  constexpr T *data() const noexcept { return data_; }
  constexpr std::size_t size() const noexcept { return size_; }
  constexpr bool empty() const noexcept { return size_ == 0; }
  constexpr T *begin() const noexcept { return data_; }
  constexpr T *end() const noexcept { return data_ + size_; }
  constexpr T &operator[](std::size_t index) const { return data_[index]; }

 private:
  T *data_ = nullptr;
  std::size_t size_ = 0;
};

// Some rows of a batch on their way through a loss of the host's.
struct LogitRows {
  view<float> logits;  // (rows, vocab_size): to be replaced by gradients of each row's loss
  view<float> losses;  // (rows): to be written
  std::size_t first;   // number of the first row: position t of sequence b is b * length + t
  std::size_t vocab_size;

  // The logits of one of them, from 0 on.
  view<float> row(std::size_t index) const {
    return {logits.data() + index * vocab_size, vocab_size};
  }
};

// Fills window `number` of a dataset: `tokens` has one more than `weights`, which are 1 before.
using WindowFunction =
    std::function<void(std::uint64_t number, view<std::uint32_t> tokens, view<float> weights)>;

// The same, and the number of the document that each input is of, which is 0 before.
using PackedWindowFunction =
    std::function<void(std::uint64_t number, view<std::uint32_t> tokens, view<float> weights,
                       view<std::uint32_t> documents)>;

// A program's own place for the files of a checkpoint, to be derived from. What the functions mean
// is in the C header, at mxt_file_callbacks. Flow::stop says that one has failed, which is
// MXT_ERROR_IO with the text of error(); so does an exception, which is thrown again by the call
// that needed it.
class FileStore {
 public:
  // A file that is open for reading, and closed by its end.
  class Reader {
   public:
    virtual ~Reader() = default;
    virtual std::uint64_t size() const = 0;
    // Fills `to` with the bytes from `offset` on.
    virtual Flow read(std::uint64_t offset, view<std::byte> to) = 0;
  };

  // A file of a save, from its first byte to its last.
  class Writer {
   public:
    virtual ~Writer() = default;
    virtual Flow write(view<const std::byte> bytes) = 0;
    // All is written. Not called where the save has failed.
    virtual Flow close() { return Flow::go_on; }
  };

  virtual ~FileStore() = default;
  // Opens a file; without one of this name, `reader` stays empty.
  virtual Flow open(const std::string &name, std::unique_ptr<Reader> &reader) = 0;
  virtual Flow begin() { return Flow::go_on; }
  virtual Flow create(const std::string &name, std::uint64_t size,
                      std::unique_ptr<Writer> &writer) = 0;
  // All files are written: they take the place of those of the save before.
  virtual Flow commit() = 0;
  // The save is given up: the files are what they were before it.
  virtual void abort() = 0;
  // Why one of them has just failed.
  virtual const char *error() const { return nullptr; }
};

#ifdef MXT_NO_EXCEPTIONS

// A value, or why there is none. To take the value of a failure ends the program: ask first.
template <class T>
class [[nodiscard]] result {
 public:
  result(T value) : state_(std::move(value)) {}
  result(mxt::error failure) : state_(std::move(failure)) {}

  explicit operator bool() const noexcept { return state_.index() == 0; }
  T &value() & { return *pointer(); }
  T &&value() && { return std::move(*pointer()); }
  const T &value() const & { return *const_cast<result *>(this)->pointer(); }
  T &operator*() & { return value(); }
  T &&operator*() && { return std::move(*this).value(); }
  const T &operator*() const & { return value(); }
  T *operator->() { return pointer(); }
  const T *operator->() const { return &value(); }

  // Not to be asked of a success.
  const mxt::error &error() const {
    const mxt::error *failure = std::get_if<1>(&state_);
    if (failure == nullptr) std::terminate();
    return *failure;
  }

 private:
  T *pointer() {
    T *value = std::get_if<0>(&state_);
    if (value == nullptr) std::terminate();
    return value;
  }

  std::variant<T, mxt::error> state_;
};

// Success, or why there was none.
template <>
class [[nodiscard]] result<void> : public result<std::monostate> {
 public:
  result() : result<std::monostate>(std::monostate()) {}
  result(mxt::error failure) : result<std::monostate>(std::move(failure)) {}
};

// What a function that makes a T returns in this mode.
template <class T>
using outcome = result<T>;

#else

// What a function that makes a T returns in this mode.
template <class T>
using outcome = T;

#endif

namespace detail {

struct deleter {
  void operator()(mxt_engine *handle) const noexcept { mxt_engine_free(handle); }
  void operator()(mxt_model *handle) const noexcept { mxt_model_free(handle); }
  void operator()(mxt_dataset *handle) const noexcept { mxt_dataset_free(handle); }
  void operator()(mxt_decoder *handle) const noexcept { mxt_decoder_free(handle); }
  void operator()(mxt_trainer *handle) const noexcept { mxt_trainer_free(handle); }
  void operator()(mxt_snapshot *handle) const noexcept { mxt_snapshot_free(handle); }
  void operator()(mxt_files *handle) const noexcept { mxt_files_free(handle); }
};

template <class T>
using handle = std::unique_ptr<T, deleter>;

// A struct for the library to fill.
template <class T>
T sized() noexcept {
  T value{};
  value.struct_size = sizeof(T);
  return value;
}

#ifdef MXT_NO_EXCEPTIONS

inline bool callback_threw() noexcept { return false; }

template <class Body>
Flow guarded(Body body) noexcept {
  return body();
}

inline result<void> failed(mxt_status status, const std::string &message) {
  return error(status, message);
}

inline result<void> finish(mxt_status status) {
  if (status != MXT_OK) return error(status, mxt_last_error());
  return {};
}

template <class T>
result<T> finish(mxt_status status, T value) {
  if (status != MXT_OK) return error(status, mxt_last_error());
  return value;
}

#else

// The exception of a callback on its way around the C function that is running on this thread.
inline std::exception_ptr &pending() noexcept {
  thread_local std::exception_ptr exception;
  return exception;
}

inline bool callback_threw() noexcept { return pending() != nullptr; }

// Runs a callback of the host. The first exception is kept, and says stop.
template <class Body>
Flow guarded(Body body) noexcept {
  // What the callback calls itself does not throw what another has thrown before.
  const std::exception_ptr before = std::exchange(pending(), nullptr);
  Flow flow = Flow::stop;
  try {
    flow = body();
  } catch (...) {
    if (!callback_threw()) pending() = std::current_exception();
  }
  if (before) pending() = before;
  return flow;
}

[[noreturn]] inline void failed(mxt_status status, const std::string &message) {
  throw error(status, message);
}

// Every call of the library that can fail or call back ends here.
inline void finish(mxt_status status) {
  if (callback_threw()) std::rethrow_exception(std::exchange(pending(), nullptr));
  if (status != MXT_OK) throw error(status, mxt_last_error());
}

template <class T>
T finish(mxt_status status, T value) {
  finish(status);
  return value;
}

#endif

// Destroys what the host has given, whose destructor may call the library.
template <class T>
void destroy(void *user_data) noexcept {
  guarded([&]() -> Flow {
    delete static_cast<T *>(user_data);
    return Flow::go_on;
  });
}

template <class Callback, class... Arguments>
Flow invoke(Callback &callback, const Arguments &...arguments) {
  using R = std::invoke_result_t<Callback &, const Arguments &...>;
  static_assert(std::is_void_v<R> || std::is_same_v<R, Flow>,
                "a callback returns nothing, or mxt::Flow::go_on or mxt::Flow::stop");
  if constexpr (std::is_void_v<R>) {
    callback(arguments...);
    return Flow::go_on;
  } else {
    return callback(arguments...);
  }
}

// What the C functions call: `user_data` points to the host's callback.
template <class Callback>
std::int32_t on_step(void *user_data, const mxt_step_stats *step, const mxt_eval_stats *eval) {
  const Flow flow = guarded([&]() -> Flow {
    Callback &callback = *static_cast<Callback *>(user_data);
    if constexpr (std::is_invocable_v<Callback &, const StepStats &, const EvalStats *>) {
      return invoke(callback, *step, eval);
    } else {
      return invoke(callback, *step);
    }
  });
  return static_cast<std::int32_t>(callback_threw() ? Flow::stop : flow);
}

// In place of a callback of the host: what another one has thrown ends the run.
inline std::int32_t stop_if_thrown(void *, const mxt_step_stats *, const mxt_eval_stats *) {
  return callback_threw() ? 1 : 0;
}

template <class Callback>
std::int32_t on_logits(void *user_data, const mxt_logits *of) {
  const Flow flow = guarded([&]() -> Flow {
    const auto rows = static_cast<std::size_t>(of->rows);
    const auto vocab_size = static_cast<std::size_t>(of->vocab_size);
    const LogitRows logits{{of->logits, rows * vocab_size},
                           {of->losses, rows},
                           static_cast<std::size_t>(of->first_row),
                           vocab_size};
    return invoke(*static_cast<Callback *>(user_data), logits);
  });
  return static_cast<std::int32_t>(callback_threw() ? Flow::stop : flow);
}

template <class Callback>
std::int32_t on_token(void *user_data, std::uint32_t token) {
  const Flow flow =
      guarded([&]() -> Flow { return invoke(*static_cast<Callback *>(user_data), token); });
  return static_cast<std::int32_t>(callback_threw() ? Flow::stop : flow);
}

// A text as it comes, so that it takes memory for what is written and not for max_tokens; with the
// callback of the host's options behind.
struct Text {
  std::vector<std::uint32_t> tokens;
  mxt_token_fn on_token;
  void *user_data;
};

inline std::int32_t keep_token(void *user_data, std::uint32_t token) {
  const Flow flow = guarded([&]() -> Flow {
    Text &text = *static_cast<Text *>(user_data);
    text.tokens.push_back(token);
    if (text.on_token == nullptr) return Flow::go_on;
    return text.on_token(text.user_data, token) == 0 ? Flow::go_on : Flow::stop;
  });
  return static_cast<std::int32_t>(callback_threw() ? Flow::stop : flow);
}

inline void on_log(void *user_data, std::int32_t level, const char *line) {
  guarded([&]() -> Flow {
    (*static_cast<LogFunction *>(user_data))(static_cast<LogLevel>(level), line);
    return Flow::go_on;
  });
}

inline void on_log_free(void *user_data) { destroy<LogFunction>(user_data); }

inline std::int32_t on_window(void *user_data, std::uint64_t number, std::uint32_t *tokens,
                              float *weights, std::size_t length) {
  const Flow flow = guarded([&]() -> Flow {
    const auto &fill = *static_cast<WindowFunction *>(user_data);
    fill(number, {tokens, length + 1}, {weights, length});
    return Flow::go_on;
  });
  return static_cast<std::int32_t>(flow);
}

inline void on_window_free(void *user_data) { destroy<WindowFunction>(user_data); }

inline std::int32_t on_packed_window(void *user_data, std::uint64_t number, std::uint32_t *tokens,
                                     float *weights, std::uint32_t *documents, std::size_t length) {
  const Flow flow = guarded([&]() -> Flow {
    const auto &fill = *static_cast<PackedWindowFunction *>(user_data);
    fill(number, {tokens, length + 1}, {weights, length}, {documents, length});
    return Flow::go_on;
  });
  return static_cast<std::int32_t>(flow);
}

inline void on_packed_window_free(void *user_data) { destroy<PackedWindowFunction>(user_data); }

inline void on_owner_free(void *user_data) { destroy<std::shared_ptr<const void>>(user_data); }

// A file of a store that is open, of which C has a pointer.
struct Stored {
  std::unique_ptr<FileStore::Reader> reader;
  std::unique_ptr<FileStore::Writer> writer;
  // Bytes that are still to be written.
  std::uint64_t left = 0;
};

inline FileStore &store_of(void *user_data) noexcept {
  return **static_cast<std::unique_ptr<FileStore> *>(user_data);
}

// Runs a function of a store, also where a callback has thrown before: a run saves at its end,
// however it ends. What one throws is an answer like stop.
template <class Body>
std::int32_t stored(Body body) noexcept {
  return static_cast<std::int32_t>(guarded(body));
}

inline std::int32_t on_file_open(void *user_data, const char *name, void **file,
                                 std::uint64_t *size) {
  bool is_there = false;
  const std::int32_t failed = stored([&]() -> Flow {
    auto opened = std::make_unique<Stored>();
    if (store_of(user_data).open(name, opened->reader) != Flow::go_on) return Flow::stop;
    if (!opened->reader) return Flow::go_on;
    is_there = true;
    *size = opened->reader->size();
    *file = opened.release();
    return Flow::go_on;
  });
  if (failed != 0) return -1;
  return is_there ? 0 : MXT_NO_SUCH_FILE;
}

inline std::int32_t on_file_read(void *, void *file, std::uint64_t offset, void *to,
                                 std::size_t count) {
  return stored([&]() -> Flow {
    const view<std::byte> bytes(static_cast<std::byte *>(to), count);
    return static_cast<Stored *>(file)->reader->read(offset, bytes);
  });
}

inline std::int32_t on_file_create(void *user_data, const char *name, std::uint64_t size,
                                   void **file) {
  return stored([&]() -> Flow {
    auto created = std::make_unique<Stored>();
    if (store_of(user_data).create(name, size, created->writer) != Flow::go_on) return Flow::stop;
    if (!created->writer) return Flow::stop;
    created->left = size;
    *file = created.release();
    return Flow::go_on;
  });
}

inline std::int32_t on_file_write(void *, void *file, const void *from, std::size_t count) {
  Stored &written = *static_cast<Stored *>(file);
  const std::int32_t failed = stored([&]() -> Flow {
    return written.writer->write({static_cast<const std::byte *>(from), count});
  });
  if (failed == 0) written.left -= count;
  return failed;
}

inline std::int32_t on_file_close(void *, void *file) {
  return stored([&]() -> Flow {
    const std::unique_ptr<Stored> owned(static_cast<Stored *>(file));
    return owned->writer && owned->left == 0 ? owned->writer->close() : Flow::go_on;
  });
}

inline std::int32_t on_files_begin(void *user_data) {
  return stored([&]() -> Flow { return store_of(user_data).begin(); });
}

inline std::int32_t on_files_commit(void *user_data) {
  return stored([&]() -> Flow { return store_of(user_data).commit(); });
}

// Also where an exception is on its way.
inline void on_files_abort(void *user_data) {
  guarded([&]() -> Flow {
    store_of(user_data).abort();
    return Flow::go_on;
  });
}

inline const char *on_files_error(void *user_data) {
  const char *text = nullptr;
  guarded([&]() -> Flow {
    text = store_of(user_data).error();
    return Flow::go_on;
  });
  return text;
}

inline void on_files_free(void *user_data) { destroy<std::unique_ptr<FileStore>>(user_data); }

inline void *on_allocate(void *user_data, std::size_t bytes, std::size_t alignment) {
  auto *resource = static_cast<std::pmr::memory_resource *>(user_data);
#ifdef MXT_NO_EXCEPTIONS
  return resource->allocate(bytes, alignment);
#else
  // That there is none is an error of the library, which says how much was needed.
  try {
    return resource->allocate(bytes, alignment);
  } catch (...) {
    return nullptr;
  }
#endif
}

inline void on_deallocate(void *user_data, void *memory, std::size_t bytes, std::size_t alignment) {
  static_cast<std::pmr::memory_resource *>(user_data)->deallocate(memory, bytes, alignment);
}

// A C struct with the library's defaults. Should the library refuse the struct, as one of another
// major version may, struct_size stays 0 and the call that takes the struct says so.
template <class C, mxt_status (*init)(C *, std::size_t)>
struct defaults : C {
  defaults() noexcept : C{} { (void)init(this, sizeof(C)); }
};

// Texts of options: an empty one is NULL, which stands for the default or for none.
inline const char *pointer(const std::string &text) noexcept {
  return text.empty() ? nullptr : text.c_str();
}
inline std::string text(const char *pointer) { return pointer == nullptr ? "" : pointer; }

}  // namespace detail

// Options are the structs of C with their defaults, but that texts are their own, numbers that
// stand for something are of its enum, and flags are bool. What the fields mean is in the C header.
// c() is the struct of C, whose texts live as long as the options and are unchanged.
struct EngineOptions : private detail::defaults<mxt_engine_options, mxt_engine_options_init> {
  using C = mxt_engine_options;
  using C::allocate, C::allocator_user_data, C::allocator_user_data_free, C::cuda_stream,
      C::deallocate, C::group, C::log, C::log_user_data, C::log_user_data_free, C::memory_limit,
      C::seed, C::struct_size, C::threads;
  std::string device = detail::text(C::device);

  C c() const noexcept {
    C c = *this;
    c.device = detail::pointer(device);
    return c;
  }

  // Large memory of the host comes from `resource`, which must outlive the engine and all that is
  // made from it. Where it throws, the call that needed the memory fails with
  // MXT_ERROR_OUT_OF_MEMORY.
  void allocate_from(std::pmr::memory_resource &resource) noexcept {
    allocate = detail::on_allocate;
    deallocate = detail::on_deallocate;
    allocator_user_data = std::addressof(resource);
  }
};
// Ranks that train together, by functions of C: put its address into EngineOptions::group.
using Group = detail::defaults<mxt_group, mxt_group_init>;
// What a trainer learns from in one go, for pointers of C.
using Batch = detail::defaults<mxt_batch, mxt_batch_init>;

struct ModelConfig : private detail::defaults<mxt_model_config, mxt_model_config_init> {
  using C = mxt_model_config;
  using C::channels, C::context_length, C::head_size, C::heads, C::kv_heads, C::layer_norm_epsilon,
      C::layers, C::lora_alpha, C::lora_rank, C::mlp_channels, C::rope_factor,
      C::rope_high_frequency, C::rope_low_frequency, C::rope_original_context, C::rope_theta,
      C::struct_size, C::vocab_size;
  Architecture architecture;
  Activation activation;
  RopeScaling rope_scaling;
  bool tied_head, scale_attention, scale_attention_by_layer, qkv_bias, qk_norm;
  // Those that have adapters where there is a lora_rank; without any, all.
  LoraLayers lora_layers;

  ModelConfig() noexcept { take(); }
  explicit ModelConfig(const C &c) noexcept {
    static_cast<C &>(*this) = c;
    take();
  }

  C c() const noexcept {
    C c = *this;
    c.architecture = static_cast<std::int32_t>(architecture);
    c.activation = static_cast<std::int32_t>(activation);
    c.tied_head = tied_head;
    c.scale_attention = scale_attention;
    c.scale_attention_by_layer = scale_attention_by_layer;
    c.qkv_bias = qkv_bias;
    c.qk_norm = qk_norm;
    c.rope_scaling = static_cast<std::int32_t>(rope_scaling);
    c.lora_layers = static_cast<std::uint32_t>(lora_layers);
    return c;
  }

 private:
  void take() noexcept {
    architecture = static_cast<Architecture>(C::architecture);
    activation = static_cast<Activation>(C::activation);
    tied_head = C::tied_head != 0;
    scale_attention = C::scale_attention != 0;
    scale_attention_by_layer = C::scale_attention_by_layer != 0;
    qkv_bias = C::qkv_bias != 0;
    qk_norm = C::qk_norm != 0;
    rope_scaling = static_cast<RopeScaling>(C::rope_scaling);
    lora_layers = static_cast<LoraLayers>(C::lora_layers);
  }
};

struct TrainerOptions : private detail::defaults<mxt_trainer_options, mxt_trainer_options_init> {
  using C = mxt_trainer_options;
  using C::accumulation, C::batch_size, C::beta1, C::beta2, C::clip, C::decay_steps, C::epsilon,
      C::lanes, C::lr, C::min_lr, C::sequence_length, C::struct_size, C::total_steps,
      C::warmup_steps, C::weight_decay;
  std::string recipe, recompute, optimizer, token_drop, frozen;
  Schedule schedule;
  // The token that ends a document, where documents that share a sequence are kept apart.
  std::optional<std::uint32_t> document_end;

  TrainerOptions() { take(); }
  explicit TrainerOptions(const C &c) {
    static_cast<C &>(*this) = c;
    take();
  }

  C c() const noexcept {
    C c = *this;
    c.recipe = detail::pointer(recipe);
    c.recompute = detail::pointer(recompute);
    c.optimizer = detail::pointer(optimizer);
    c.token_drop = detail::pointer(token_drop);
    c.frozen = detail::pointer(frozen);
    c.schedule = static_cast<std::int32_t>(schedule);
    c.has_document_end = document_end.has_value();
    c.document_end = document_end.value_or(0);
    return c;
  }

 private:
  void take() {
    recipe = detail::text(C::recipe);
    recompute = detail::text(C::recompute);
    optimizer = detail::text(C::optimizer);
    token_drop = detail::text(C::token_drop);
    frozen = detail::text(C::frozen);
    schedule = static_cast<Schedule>(C::schedule);
    if (C::has_document_end != 0) document_end = C::document_end;
  }
};

struct DatasetOptions : private detail::defaults<mxt_dataset_options, mxt_dataset_options_init> {
  using C = mxt_dataset_options;
  using C::struct_size;
  TokenType token_type = static_cast<TokenType>(C::token_type);

  C c() const noexcept {
    C c = *this;
    c.token_type = static_cast<std::int32_t>(token_type);
    return c;
  }
};

struct DecoderOptions : private detail::defaults<mxt_decoder_options, mxt_decoder_options_init> {
  using C = mxt_decoder_options;
  using C::room, C::sequences, C::struct_size;
  DecoderWeights weights = static_cast<DecoderWeights>(C::weights);
  bool drafts = C::drafts != 0;

  C c() const noexcept {
    C c = *this;
    c.weights = static_cast<std::int32_t>(weights);
    c.drafts = drafts;
    return c;
  }
};

struct GenerateOptions : private detail::defaults<mxt_generate_options, mxt_generate_options_init> {
  using C = mxt_generate_options;
  using C::accepted, C::draft_tokens, C::drafted, C::max_tokens, C::min_p, C::on_token,
      C::repetition_penalty, C::seed, C::stop_token_count, C::stop_tokens, C::struct_size,
      C::temperature, C::top_k, C::top_p, C::user_data;
  DecoderWeights weights = static_cast<DecoderWeights>(C::weights);
  bool slide = C::slide != 0;
  Draft draft = static_cast<Draft>(C::draft);

  C c() const noexcept {
    C c = *this;
    c.weights = static_cast<std::int32_t>(weights);
    c.slide = slide;
    c.draft = static_cast<std::int32_t>(draft);
    return c;
  }

  // The tokens that end a text. They are not copied: they must live until the text is made.
  void stop_at(view<const std::uint32_t> tokens) noexcept {
    stop_tokens = tokens.data();
    stop_token_count = tokens.size();
  }
  void stop_at(std::initializer_list<std::uint32_t> tokens) = delete;  // It would not live.
};

struct RunOptions : private detail::defaults<mxt_run_options, mxt_run_options_init> {
  using C = mxt_run_options;
  using C::eval_batches, C::eval_dataset, C::eval_every, C::on_step, C::save_every, C::save_files,
      C::steps, C::struct_size, C::user_data;
  std::string save_dir = detail::text(C::save_dir);

  // So that a number of steps can be given where no more is wanted.
  RunOptions(std::uint64_t step_count = 0) { steps = step_count; }

  C c() const noexcept {
    C c = *this;
    c.save_dir = detail::pointer(save_dir);
    return c;
  }
};

// How a run went.
struct RunResult : private mxt_run_result {
  using C = mxt_run_result;
  using C::eval_errors, C::last_eval_loss, C::last_loss, C::save_errors, C::seconds, C::steps,
      C::tokens;
  RunEnd end;
  bool saved;

  explicit RunResult(const C &c) noexcept
      : C(c), end(static_cast<RunEnd>(C::end)), saved(C::saved != 0) {}
};

// Name and shape of a tensor. Linear weights are (in, out).
struct TensorInfo {
  std::string name;
  // The dimensions, slowest first.
  std::vector<std::size_t> shape;
  std::size_t element_count = 0;
};

// A device with its worker threads.
class Engine {
 public:
  Engine(std::nullptr_t) noexcept {}  // Empty, until one is moved in.
#ifndef MXT_NO_EXCEPTIONS
  explicit Engine(const EngineOptions &options = {}, LogFunction log = {})
      : Engine(create(options, std::move(log))) {}
#endif

  // `log` takes the place of options.log, and lives as long as all that is made from the engine: it
  // is destroyed by the call that gives up the last of that, on the thread of that call.
  static outcome<Engine> create(EngineOptions options = {}, LogFunction log = {}) {
    std::unique_ptr<LogFunction> owned;
    if (log) {
      owned = std::make_unique<LogFunction>(std::move(log));
      options.log = detail::on_log;
      options.log_user_data = owned.get();
      options.log_user_data_free = detail::on_log_free;
    }
    mxt_engine *engine = nullptr;
    const mxt_engine_options c = options.c();
    const mxt_status status = mxt_engine_new(&c, &engine);
    if (status == MXT_OK) (void)owned.release();
    return detail::finish(status, Engine(engine));
  }

  std::string device() const {
    const char *name = mxt_engine_device(get());
    return name == nullptr ? "" : name;
  }
  std::size_t threads() const noexcept { return mxt_engine_threads(get()); }
  std::uint64_t seed() const noexcept { return mxt_engine_seed(get()); }
  // Which rank of its group it is, and how many there are; 0 of 1 without one.
  std::size_t rank() const noexcept { return mxt_engine_rank(get()); }
  std::size_t ranks() const noexcept { return mxt_engine_ranks(get()); }

  // How much large memory is in use, by the engine and all that was made from it.
  outcome<MemoryUse> memory() const {
    auto use = detail::sized<MemoryUse>();
    const mxt_status status = mxt_engine_memory(get(), &use);
    return detail::finish(status, use);
  }

  // Whether it is not empty: what was moved from is.
  explicit operator bool() const noexcept { return handle_ != nullptr; }

  // The C handle, which stays this object's.
  mxt_engine *get() const noexcept { return handle_.get(); }

 private:
  explicit Engine(mxt_engine *engine) : handle_(engine) {}

  detail::handle<mxt_engine> handle_;
};

// The files of a checkpoint without a folder: in memory, or in a store of the program's.
class Files {
 public:
  Files(std::nullptr_t) noexcept {}  // Empty, until one is moved in.
#ifndef MXT_NO_EXCEPTIONS
  // In memory, without any yet.
  Files() : Files(create()) {}
  explicit Files(std::unique_ptr<FileStore> store) : Files(create(std::move(store))) {}
#endif

  static outcome<Files> create() {
    mxt_files *files = nullptr;
    const mxt_status status = mxt_files_in_memory(&files);
    return detail::finish(status, Files(files));
  }

  // The store lives as long as the files, or as the call that uses them last.
  static outcome<Files> create(std::unique_ptr<FileStore> store) {
    detail::defaults<mxt_file_callbacks, mxt_file_callbacks_init> callbacks;
    callbacks.open = detail::on_file_open;
    callbacks.read = detail::on_file_read;
    callbacks.close = detail::on_file_close;
    callbacks.begin = detail::on_files_begin;
    callbacks.create = detail::on_file_create;
    callbacks.write = detail::on_file_write;
    callbacks.commit = detail::on_files_commit;
    callbacks.abort = detail::on_files_abort;
    callbacks.error = detail::on_files_error;
    callbacks.user_data_free = detail::on_files_free;
    // One that is not there is for the C function to complain about.
    if (!store) callbacks.close = nullptr;
    auto owned = std::make_unique<std::unique_ptr<FileStore>>(std::move(store));
    callbacks.user_data = owned.get();
    mxt_files *files = nullptr;
    const mxt_status status = mxt_files_from_callbacks(&callbacks, &files);
    if (status == MXT_OK) (void)owned.release();
    return detail::finish(status, Files(files));
  }

  // The names of files in memory.
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    const std::size_t count = mxt_files_count(get());
    for (std::size_t i = 0; i < count; i++) {
      const char *name = mxt_files_name(get(), i);
      if (name != nullptr) names.emplace_back(name);
    }
    return names;
  }

  // The bytes of a file in memory, until the files change or are destroyed.
  outcome<view<const std::byte>> bytes(const std::string &name) const {
    const void *bytes = nullptr;
    std::size_t count = 0;
    const mxt_status status = mxt_files_view(get(), name.c_str(), &bytes, &count);
    return detail::finish(status,
                          view<const std::byte>(static_cast<const std::byte *>(bytes), count));
  }

  // Puts a copy of bytes.
  outcome<void> put(const std::string &name, view<const std::byte> bytes) {
    return detail::finish(mxt_files_put(get(), name.c_str(), bytes.data(), bytes.size()));
  }

  // Puts bytes that stay where they are as long as the file is there; `owner` is kept until then.
  outcome<void> lend(const std::string &name, view<const std::byte> bytes,
                     std::shared_ptr<const void> owner = {}) {
    auto owned = std::make_unique<std::shared_ptr<const void>>(std::move(owner));
    const mxt_status status = mxt_files_lend(get(), name.c_str(), bytes.data(), bytes.size(),
                                             owned.get(), detail::on_owner_free);
    if (status == MXT_OK) (void)owned.release();
    return detail::finish(status);
  }

  outcome<void> remove(const std::string &name) {
    return detail::finish(mxt_files_remove(get(), name.c_str()));
  }

  // Whether it is not empty: what was moved from is.
  explicit operator bool() const noexcept { return handle_ != nullptr; }

  // The C handle, which stays this object's.
  mxt_files *get() const noexcept { return handle_.get(); }

 private:
  explicit Files(mxt_files *files) : handle_(files) {}

  detail::handle<mxt_files> handle_;
};

// A model: its shape and its weights.
class Model {
 public:
  Model(std::nullptr_t) noexcept {}  // Empty, until one is moved in.
#ifndef MXT_NO_EXCEPTIONS
  Model(const Engine &engine, const ModelConfig &config) : Model(create(engine, config)) {}
#endif

  // A model with random initial weights.
  static outcome<Model> create(const Engine &engine, const ModelConfig &config) {
    mxt_model *model = nullptr;
    const mxt_model_config c = config.c();
    const mxt_status status = mxt_model_new(engine.get(), &c, &model);
    return detail::finish(status, Model(model));
  }

  // The model of a checkpoint folder, this library's or Hugging Face's.
  static outcome<Model> load(const Engine &engine, const std::string &dir) {
    mxt_model *model = nullptr;
    const mxt_status status = mxt_model_load(engine.get(), dir.c_str(), &model);
    return detail::finish(status, Model(model));
  }

  static outcome<Model> load(const Engine &engine, const Files &files) {
    mxt_model *model = nullptr;
    const mxt_status status = mxt_model_load_from(engine.get(), files.get(), &model);
    return detail::finish(status, Model(model));
  }

  outcome<void> save(const std::string &dir) const {
    return detail::finish(mxt_model_save(get(), dir.c_str()));
  }
  outcome<void> save(Files &files, StoredWeights weights = StoredWeights::f32) const {
    const auto number = static_cast<std::int32_t>(weights);
    return detail::finish(mxt_model_save_to(get(), files.get(), number));
  }

  // The same as other numbers.
  outcome<void> save_as(const std::string &dir, StoredWeights weights) const {
    const auto number = static_cast<std::int32_t>(weights);
    return detail::finish(mxt_model_save_as(get(), dir.c_str(), number));
  }

  // A model of these weights with adapters, which a trainer of it trains alone. `alpha` is 0 for
  // twice the rank.
  outcome<Model> with_lora(std::size_t rank, float alpha = 0,
                           LoraLayers layers = LoraLayers::all) const {
    mxt_model *adapted = nullptr;
    const auto bits = static_cast<std::uint32_t>(layers);
    const mxt_status status = mxt_model_with_lora(get(), rank, alpha, bits, &adapted);
    return detail::finish(status, Model(adapted));
  }

  // The same with the adapters of a folder, PEFT's or that of save_lora.
  outcome<Model> load_lora(const std::string &dir) const {
    mxt_model *adapted = nullptr;
    const mxt_status status = mxt_model_load_lora(get(), dir.c_str(), &adapted);
    return detail::finish(status, Model(adapted));
  }

  outcome<Model> load_lora(const Files &files) const {
    mxt_model *adapted = nullptr;
    const mxt_status status = mxt_model_load_lora_from(get(), files.get(), &adapted);
    return detail::finish(status, Model(adapted));
  }

  // A model with the adapters added to its weights.
  outcome<Model> merge_lora() const {
    mxt_model *merged = nullptr;
    const mxt_status status = mxt_model_merge_lora(get(), &merged);
    return detail::finish(status, Model(merged));
  }

  // The adapters alone, as a folder that PEFT opens.
  outcome<void> save_lora(const std::string &dir) const {
    return detail::finish(mxt_model_save_lora(get(), dir.c_str()));
  }
  outcome<void> save_lora(Files &files) const {
    return detail::finish(mxt_model_save_lora_to(get(), files.get()));
  }

  outcome<ModelConfig> config() const {
    auto config = detail::sized<mxt_model_config>();
    const mxt_status status = mxt_model_get_config(get(), &config);
    return detail::finish(status, ModelConfig(config));
  }

  std::uint64_t parameter_count() const noexcept { return mxt_model_parameter_count(get()); }
  std::size_t tensor_count() const noexcept { return mxt_model_tensor_count(get()); }

  // Tensor `index`, 0 to tensor_count() - 1.
  outcome<TensorInfo> tensor(std::size_t index) const {
    auto raw = detail::sized<mxt_tensor_info>();
    const mxt_status status = mxt_model_tensor_info(get(), index, &raw);
    return detail::finish(status, status == MXT_OK ? info_of(raw) : TensorInfo());
  }

  // All tensors, in their order.
  outcome<std::vector<TensorInfo>> tensors() const {
    std::vector<TensorInfo> tensors(tensor_count());
    // Of a model that is none it is for the C function to complain.
    mxt_status status = MXT_OK;
    for (std::size_t i = 0; status == MXT_OK && (i < tensors.size() || get() == nullptr); i++) {
      auto raw = detail::sized<mxt_tensor_info>();
      status = mxt_model_tensor_info(get(), i, &raw);
      if (status == MXT_OK) tensors[i] = info_of(raw);
    }
    return detail::finish(status, std::move(tensors));
  }

  // Copies a tensor into `values`, row-major, which must have room for exactly its elements; or a
  // part of one of Llama's blocks, by its name in files, as "self_attn.q_proj.weight" of a block.
  outcome<void> read(const std::string &name, view<float> values) const {
    return detail::finish(mxt_model_tensor_read(get(), name.c_str(), values.data(), values.size()));
  }

  // A copy of a tensor or a part, row-major.
  outcome<std::vector<float>> read(const std::string &name) const {
    // A name that is not found, or a model that is none, is for the C function to complain about.
    const std::size_t count = element_count(name);
    std::vector<float> values(count == 0 ? 1 : count);
    const mxt_status status =
        mxt_model_tensor_read(get(), name.c_str(), values.data(), values.size());
    return detail::finish(status, std::move(values));
  }

  // Overwrites a tensor or a part with `values`, row-major.
  outcome<void> write(const std::string &name, view<const float> values) {
    return detail::finish(
        mxt_model_tensor_write(get(), name.c_str(), values.data(), values.size()));
  }

  // The logits of the token after `tokens`, one for each token of the vocabulary.
  outcome<std::vector<float>> next_logits(view<const std::uint32_t> tokens) const {
    auto config = detail::sized<mxt_model_config>();
    mxt_status status = mxt_model_get_config(get(), &config);
    std::vector<float> logits(config.vocab_size);
    if (status == MXT_OK) {
      status =
          mxt_model_next_logits(get(), tokens.data(), tokens.size(), logits.data(), logits.size());
    }
    return detail::finish(status, std::move(logits));
  }

  // The log-probability of every token of texts, after those before it in its own text; that of the
  // first is 0. `tokens` are those of all texts, `lengths` how many each has. Where `hidden` is not
  // null, it becomes what the norm behind the last block puts out: (tokens, channels).
  outcome<std::vector<float>> score(view<const std::uint32_t> tokens,
                                    view<const std::size_t> lengths,
                                    std::vector<float> *hidden = nullptr,
                                    DecoderWeights weights = DecoderWeights::f32) const {
    auto config = detail::sized<mxt_model_config>();
    mxt_status status = mxt_model_get_config(get(), &config);
    std::vector<float> found(tokens.size());
    if (status == MXT_OK) {
      if (hidden) hidden->assign(tokens.size() * config.channels, 0.0f);
      const auto form = static_cast<std::int32_t>(weights);
      status = mxt_model_score(get(), form, tokens.data(), tokens.size(), lengths.data(),
                               lengths.size(), found.data(), hidden ? hidden->data() : nullptr);
    }
    return detail::finish(status, std::move(found));
  }

  // A continuation of `prompt`, without the prompt.
  outcome<std::vector<std::uint32_t>> generate(view<const std::uint32_t> prompt,
                                               const GenerateOptions &options = {}) {
    detail::Text text{{}, options.on_token, options.user_data};
    mxt_generate_options keeping = options.c();
    keeping.on_token = detail::keep_token;
    keeping.user_data = &text;
    std::size_t written = 0;
    const mxt_status status =
        mxt_model_generate(get(), &keeping, prompt.data(), prompt.size(), nullptr, 0, &written);
    return detail::finish(status, std::move(text.tokens));
  }

  // The same, with `on_token(std::uint32_t)` called for each token, in place of options.on_token.
  template <class OnToken>
  outcome<std::vector<std::uint32_t>> generate(view<const std::uint32_t> prompt,
                                               GenerateOptions options, OnToken on_token) {
    options.on_token = detail::on_token<OnToken>;
    options.user_data = std::addressof(on_token);
    return generate(prompt, options);
  }

  // Whether it is not empty: what was moved from is.
  explicit operator bool() const noexcept { return handle_ != nullptr; }

  // The C handle, which stays this object's.
  mxt_model *get() const noexcept { return handle_.get(); }

 private:
  friend class Trainer;
  explicit Model(mxt_model *model) noexcept : handle_(model) {}

  static TensorInfo info_of(const mxt_tensor_info &raw) {
    TensorInfo info;
    info.name = raw.name;
    info.shape.assign(raw.shape, raw.shape + raw.rank);
    info.element_count = static_cast<std::size_t>(raw.element_count);
    return info;
  }

  // Elements of the tensor of this name, or of the part; 0 where there is none.
  std::size_t element_count(const std::string &name) const {
    for (std::size_t i = 0; i < tensor_count(); i++) {
      auto info = detail::sized<mxt_tensor_info>();
      if (mxt_model_tensor_info(get(), i, &info) == MXT_OK && name == info.name) {
        return static_cast<std::size_t>(info.element_count);
      }
    }
    auto config = detail::sized<mxt_model_config>();
    if (mxt_model_get_config(get(), &config) != MXT_OK) return 0;
    const std::size_t q = config.heads, kv = config.kv_heads == 0 ? q : config.kv_heads;
    const struct {
      std::string_view part, whole;
      std::size_t rows, of;
    } parts[] = {
        {"self_attn.q_proj.", "self_attn.qkv_proj.", q, q + 2 * kv},
        {"self_attn.k_proj.", "self_attn.qkv_proj.", kv, q + 2 * kv},
        {"self_attn.v_proj.", "self_attn.qkv_proj.", kv, q + 2 * kv},
        {"mlp.gate_proj.", "mlp.gate_up_proj.", 1, 2},
        {"mlp.up_proj.", "mlp.gate_up_proj.", 1, 2},
    };
    for (const auto &[part, whole, rows, of] : parts) {
      const std::size_t at = name.find(part);
      if (at == std::string::npos) continue;
      return element_count(std::string(name).replace(at, part.size(), whole)) / of * rows;
    }
    return 0;
  }

  detail::handle<mxt_model> handle_;
};

// Texts of a model that grow, numbered from 0: tokens in, the logits of what comes next out.
class Decoder {
 public:
  Decoder(std::nullptr_t) noexcept {}  // Empty, until one is moved in.
#ifndef MXT_NO_EXCEPTIONS
  explicit Decoder(const Model &model, const DecoderOptions &options = {})
      : Decoder(create(model, options)) {}
#endif

  // All its memory is allocated here. The model may be destroyed first.
  static outcome<Decoder> create(const Model &model, const DecoderOptions &options = {}) {
    mxt_decoder *decoder = nullptr;
    auto config = detail::sized<mxt_model_config>();
    mxt_status status = mxt_model_get_config(model.get(), &config);
    const mxt_decoder_options c = options.c();
    if (status == MXT_OK) status = mxt_decoder_new(model.get(), &c, &decoder);
    return detail::finish(status, Decoder(decoder, config.vocab_size));
  }

  // Appends tokens to a text. They are computed when logits are asked for.
  outcome<void> push(view<const std::uint32_t> tokens, std::size_t sequence = 0) {
    return detail::finish(mxt_decoder_push(get(), sequence, tokens.data(), tokens.size()));
  }

  // The logits of the token after a text, one for each token of the vocabulary.
  outcome<std::vector<float>> logits(std::size_t sequence = 0) {
    std::vector<float> logits(vocab_size_);
    const mxt_status status = mxt_decoder_logits(get(), sequence, logits.data(), logits.size());
    return detail::finish(status, std::move(logits));
  }

  // The logits of what comes after each token from number `from` on, behind each other.
  outcome<std::vector<float>> logits_from(std::size_t from, std::size_t sequence = 0) {
    std::size_t count = 0;
    mxt_status status = mxt_decoder_tokens(get(), sequence, nullptr, 0, &count);
    std::vector<float> logits(count > from ? (count - from) * vocab_size_ : 0);
    if (status == MXT_OK) {
      status = mxt_decoder_logits_from(get(), sequence, from, logits.data(), logits.size());
    }
    return detail::finish(status, std::move(logits));
  }

  // The logits of the tokens after several texts, behind each other, for which weights are read
  // once.
  outcome<std::vector<float>> logits_of(view<const std::size_t> sequences) {
    std::vector<float> logits(sequences.size() * vocab_size_);
    const mxt_status status = mxt_decoder_logits_of(get(), sequences.data(), sequences.size(),
                                                    logits.data(), logits.size());
    return detail::finish(status, std::move(logits));
  }

  // Samples continuations of several texts at once, and appends them. The first has the options'
  // seed, each other one the next.
  outcome<std::vector<std::vector<std::uint32_t>>> generate_each(
      view<const std::size_t> sequences, const GenerateOptions &options = {}) {
    const std::size_t count = sequences.size(), most = options.max_tokens;
    std::vector<std::uint32_t> tokens(count * most);
    std::vector<std::size_t> written(count);
    const mxt_generate_options c = options.c();
    const mxt_status status = mxt_decoder_generate_each(get(), sequences.data(), count, &c,
                                                        tokens.data(), most, written.data());
    std::vector<std::vector<std::uint32_t>> texts(count);
    for (std::size_t i = 0; i < count && status == MXT_OK; i++) {
      texts[i].assign(tokens.data() + i * most, tokens.data() + i * most + written[i]);
    }
    return detail::finish(status, std::move(texts));
  }

  // Samples a continuation of a text and appends it; returns the new tokens. The options' weights
  // are not looked at.
  outcome<std::vector<std::uint32_t>> generate(const GenerateOptions &options = {},
                                               std::size_t sequence = 0) {
    detail::Text text{{}, options.on_token, options.user_data};
    mxt_generate_options keeping = options.c();
    keeping.on_token = detail::keep_token;
    keeping.user_data = &text;
    std::size_t written = 0;
    const mxt_status status = mxt_decoder_generate(get(), sequence, &keeping, nullptr, 0, &written);
    return detail::finish(status, std::move(text.tokens));
  }

  // The same, with `on_token(std::uint32_t)` called for each token, in place of options.on_token.
  template <class OnToken>
  outcome<std::vector<std::uint32_t>> generate(GenerateOptions options, std::size_t sequence,
                                               OnToken on_token) {
    options.on_token = detail::on_token<OnToken>;
    options.user_data = std::addressof(on_token);
    return generate(options, sequence);
  }

  // Takes the tokens from number `length` on out again.
  outcome<void> rewind(std::size_t length, std::size_t sequence = 0) {
    return detail::finish(mxt_decoder_rewind(get(), sequence, length));
  }

  // Makes a text that of another, with what is computed of it.
  outcome<void> fork(std::size_t from, std::size_t to) {
    return detail::finish(mxt_decoder_fork(get(), from, to));
  }

  // A text so far.
  outcome<std::vector<std::uint32_t>> tokens(std::size_t sequence = 0) const {
    std::size_t count = 0;
    mxt_status status = mxt_decoder_tokens(get(), sequence, nullptr, 0, &count);
    std::vector<std::uint32_t> tokens(count);
    if (status == MXT_OK) {
      status = mxt_decoder_tokens(get(), sequence, tokens.data(), tokens.size(), &count);
    }
    return detail::finish(status, std::move(tokens));
  }

  // Whether it is not empty: what was moved from is.
  explicit operator bool() const noexcept { return handle_ != nullptr; }

  // The C handle, which stays this object's.
  mxt_decoder *get() const noexcept { return handle_.get(); }

 private:
  Decoder(mxt_decoder *decoder, std::size_t vocab_size)
      : handle_(decoder), vocab_size_(vocab_size) {}

  detail::handle<mxt_decoder> handle_;
  std::size_t vocab_size_ = 0;
};

// Tokens to train on.
class Dataset {
 public:
  Dataset(std::nullptr_t) noexcept {}  // Empty, until one is moved in.
  // A token file, or all files that a pattern such as "data/train_*.bin" matches.
  static outcome<Dataset> open(const std::string &pattern, const DatasetOptions &options = {}) {
    mxt_dataset *dataset = nullptr;
    const mxt_dataset_options c = options.c();
    const mxt_status status = mxt_dataset_open_with(pattern.c_str(), &c, &dataset);
    return detail::finish(status, Dataset(dataset));
  }

  // Several token files, in the order given.
  static outcome<Dataset> open_files(view<const std::string> paths,
                                     const DatasetOptions &options = {}) {
    std::vector<const char *> pointers;
    pointers.reserve(paths.size());
    for (const std::string &path : paths) pointers.push_back(path.c_str());
    mxt_dataset *dataset = nullptr;
    const mxt_dataset_options c = options.c();
    const mxt_status status =
        mxt_dataset_open_files_with(pointers.data(), pointers.size(), &c, &dataset);
    return detail::finish(status, Dataset(dataset));
  }

  // A copy of tokens in memory.
  static outcome<Dataset> from_tokens(view<const std::uint32_t> tokens) {
    mxt_dataset *dataset = nullptr;
    const mxt_status status = mxt_dataset_from_tokens(tokens.data(), tokens.size(), &dataset);
    return detail::finish(status, Dataset(dataset));
  }

  // Tokens that stay where they are, and what they are, as long as the dataset lives; `owner` is
  // kept until then.
  static outcome<Dataset> from_memory(view<const std::uint32_t> tokens,
                                      std::shared_ptr<const void> owner = {}) {
    return from_memory(tokens.data(), tokens.size(), TokenType::u32, std::move(owner));
  }
  static outcome<Dataset> from_memory(view<const std::uint16_t> tokens,
                                      std::shared_ptr<const void> owner = {}) {
    return from_memory(tokens.data(), tokens.size(), TokenType::u16, std::move(owner));
  }

  // `count` windows that `fill` writes when they are wanted, with a weight for each target. What it
  // throws is thrown again by the call that needed the window.
  static outcome<Dataset> from_windows(std::uint64_t count, WindowFunction fill) {
    auto owned = std::make_unique<WindowFunction>(std::move(fill));
    mxt_dataset *dataset = nullptr;
    const mxt_status status = mxt_dataset_from_windows(count, detail::on_window, owned.get(),
                                                       detail::on_window_free, &dataset);
    if (status == MXT_OK) (void)owned.release();  // the library's now
    return detail::finish(status, Dataset(dataset));
  }

  // The same of windows that are packed with documents, which are kept apart: where the number
  // changes along a window another document begins.
  static outcome<Dataset> from_packed_windows(std::uint64_t count, PackedWindowFunction fill) {
    auto owned = std::make_unique<PackedWindowFunction>(std::move(fill));
    mxt_dataset *dataset = nullptr;
    const mxt_status status = mxt_dataset_from_packed_windows(
        count, detail::on_packed_window, owned.get(), detail::on_packed_window_free, &dataset);
    if (status == MXT_OK) (void)owned.release();  // the library's now
    return detail::finish(status, Dataset(dataset));
  }

  std::uint64_t token_count() const noexcept { return mxt_dataset_token_count(get()); }

  // The largest token; reads all files.
  outcome<std::uint32_t> max_token() const {
    std::uint32_t token = 0;
    const mxt_status status = mxt_dataset_max_token(get(), &token);
    return detail::finish(status, token);
  }

  // What training with sequences of `sequence_length` tokens reads of the files.
  outcome<Coverage> coverage(std::size_t sequence_length) const {
    auto coverage = detail::sized<mxt_coverage>();
    const mxt_status status = mxt_dataset_coverage(get(), sequence_length, &coverage);
    return detail::finish(status, coverage);
  }

  // Copies tokens, from number `first` on, into `tokens` until it is full. Numbers start from 0.
  outcome<void> read(std::uint64_t first, view<std::uint32_t> tokens) const {
    return detail::finish(mxt_dataset_read(get(), first, tokens.size(), tokens.data()));
  }

  // Whether it is not empty: what was moved from is.
  explicit operator bool() const noexcept { return handle_ != nullptr; }

  // The C handle, which stays this object's.
  mxt_dataset *get() const noexcept { return handle_.get(); }

 private:
  static outcome<Dataset> from_memory(const void *tokens, std::size_t count, TokenType type,
                                      std::shared_ptr<const void> owner) {
    const auto number = static_cast<std::int32_t>(type);
    auto owned = std::make_unique<std::shared_ptr<const void>>(std::move(owner));
    mxt_dataset *dataset = nullptr;
    const mxt_status status = mxt_dataset_from_memory(tokens, count, number, owned.get(),
                                                      detail::on_owner_free, &dataset);
    if (status == MXT_OK) (void)owned.release();  // the library's now
    return detail::finish(status, Dataset(dataset));
  }

  explicit Dataset(mxt_dataset *dataset) noexcept : handle_(dataset) {}

  detail::handle<mxt_dataset> handle_;
};

// What a trainer was, in the host's memory: Trainer::snapshot makes it. A thread may save it while
// the trainer goes on.
class Snapshot {
 public:
  Snapshot(std::nullptr_t) noexcept {}  // Empty, until one is moved in.
  // As Trainer::save would have saved it.
  outcome<void> save(const std::string &dir) {
    return detail::finish(mxt_snapshot_save(get(), dir.c_str()));
  }
  outcome<void> save(Files &files) {
    return detail::finish(mxt_snapshot_save_to(get(), files.get()));
  }

  // Whether it is not empty: what was moved from is.
  explicit operator bool() const noexcept { return handle_ != nullptr; }

  // The C handle, which stays this object's.
  mxt_snapshot *get() const noexcept { return handle_.get(); }

 private:
  friend class Trainer;
  explicit Snapshot(mxt_snapshot *snapshot) noexcept : handle_(snapshot) {}

  detail::handle<mxt_snapshot> handle_;
};

// A model in training.
class Trainer {
 public:
  Trainer(std::nullptr_t) noexcept {}  // Empty, until one is moved in.
#ifndef MXT_NO_EXCEPTIONS
  explicit Trainer(Model &model, const TrainerOptions &options = {})
      : Trainer(create(model, options)) {}
#endif

  // A trainer at step 0 that changes the weights of `model`.
  static outcome<Trainer> create(Model &model, const TrainerOptions &options = {}) {
    mxt_trainer *trainer = nullptr;
    const mxt_trainer_options c = options.c();
    const mxt_status status = mxt_trainer_new(model.get(), &c, &trainer);
    return detail::finish(status, Trainer(trainer));
  }

  // What save wrote, to go on from there as if the run had never stopped.
  static outcome<Trainer> load(const Engine &engine, const std::string &dir) {
    mxt_trainer *trainer = nullptr;
    const mxt_status status = mxt_trainer_load(engine.get(), dir.c_str(), &trainer);
    return detail::finish(status, Trainer(trainer));
  }

  // The same, with moments kept from here on in what `optimizer` says ("adamw,moments=int8").
  static outcome<Trainer> load_as(const Engine &engine, const std::string &dir,
                                  const std::string &optimizer) {
    mxt_trainer *trainer = nullptr;
    const mxt_status status =
        mxt_trainer_load_as(engine.get(), dir.c_str(), optimizer.c_str(), &trainer);
    return detail::finish(status, Trainer(trainer));
  }

  static outcome<Trainer> load(const Engine &engine, const Files &files) {
    mxt_trainer *trainer = nullptr;
    const mxt_status status = mxt_trainer_load_from(engine.get(), files.get(), nullptr, &trainer);
    return detail::finish(status, Trainer(trainer));
  }
  static outcome<Trainer> load_as(const Engine &engine, const Files &files,
                                  const std::string &optimizer) {
    mxt_trainer *trainer = nullptr;
    const mxt_status status =
        mxt_trainer_load_from(engine.get(), files.get(), optimizer.c_str(), &trainer);
    return detail::finish(status, Trainer(trainer));
  }

  outcome<void> save(const std::string &dir) {
    return detail::finish(mxt_trainer_save(get(), dir.c_str()));
  }
  outcome<void> save(Files &files) {
    return detail::finish(mxt_trainer_save_to(get(), files.get()));
  }

  // A copy of what save would write.
  outcome<Snapshot> snapshot() {
    mxt_snapshot *snapshot = nullptr;
    const mxt_status status = mxt_trainer_snapshot(get(), &snapshot);
    return detail::finish(status, Snapshot(snapshot));
  }

  // Makes an earlier one anew, in its memory, which is faster than another one.
  outcome<void> renew(Snapshot &snapshot) {
    return detail::finish(mxt_snapshot_renew(snapshot.get(), get()));
  }

  // One optimizer step on the next windows of `dataset`.
  outcome<StepStats> step(const Dataset &dataset) {
    auto stats = detail::sized<StepStats>();
    const mxt_status status = mxt_trainer_step(get(), dataset.get(), &stats);
    return detail::finish(status, stats);
  }

  // The same, given up with MXT_STOPPED where a stop is asked for, before each of its batches.
  outcome<StepStats> step_unless_stopped(const Dataset &dataset) {
    auto stats = detail::sized<StepStats>();
    const mxt_status status = mxt_trainer_step_unless_stopped(get(), dataset.get(), &stats);
    return detail::finish(status, stats);
  }

  // One optimizer step on accumulation * batch_size rows of sequence_length + 1 tokens.
  outcome<StepStats> step_tokens(view<const std::uint32_t> tokens) {
    auto stats = detail::sized<StepStats>();
    const mxt_status status = mxt_trainer_step_tokens(get(), tokens.data(), tokens.size(), &stats);
    return detail::finish(status, stats);
  }

  // Adds the gradients of a batch to those that wait for an update.
  outcome<void> forward_backward(const Batch &batch) {
    return detail::finish(mxt_trainer_forward_backward(get(), &batch));
  }

  // The same of batch_size * sequence_length tokens and targets, each maybe MXT_IGNORED, and
  // weights, or none, and the numbers of the documents that tokens are of, or none.
  outcome<void> forward_backward(view<const std::uint32_t> tokens,
                                 view<const std::uint32_t> targets, view<const float> weights = {},
                                 view<const std::uint32_t> documents = {}) {
    Batch batch;
    batch.tokens = tokens.data();
    batch.targets = targets.data();
    batch.weights = weights.empty() ? nullptr : weights.data();
    batch.documents = documents.empty() ? nullptr : documents.data();
    batch.count = tokens.size();
    // C has one count for all of them, and reads as many of each.
    const auto differs = [&](std::size_t size) { return size != tokens.size(); };
    if (differs(targets.size())) return mismatch("targets", targets.size(), tokens.size());
    if (batch.weights != nullptr && differs(weights.size())) {
      return mismatch("weights", weights.size(), tokens.size());
    }
    if (batch.documents != nullptr && differs(documents.size())) {
      return mismatch("documents", documents.size(), tokens.size());
    }
    return forward_backward(batch);
  }

  // The same with `loss(const LogitRows &)` in place of cross-entropy: it writes losses, and puts
  // their gradients where the logits are. It must not use this trainer.
  template <class Loss>
  outcome<void> forward_backward(Batch batch, Loss loss) {
    batch.loss = detail::on_logits<Loss>;
    batch.user_data = std::addressof(loss);
    return forward_backward(batch);
  }

  // The loss of a batch, without gradients.
  outcome<EvalStats> forward(const Batch &batch) {
    auto stats = detail::sized<EvalStats>();
    const mxt_status status = mxt_trainer_forward(get(), &batch, &stats);
    return detail::finish(status, stats);
  }
  template <class Loss>
  outcome<EvalStats> forward(Batch batch, Loss loss) {
    batch.loss = detail::on_logits<Loss>;
    batch.user_data = std::addressof(loss);
    return forward(batch);
  }

  // One optimizer step by the gradients of all batches since the last one.
  outcome<StepStats> update() {
    auto stats = detail::sized<StepStats>();
    const mxt_status status = mxt_trainer_update(get(), &stats);
    return detail::finish(status, stats);
  }

  // Drops the gradients that wait for an update.
  outcome<void> zero_gradients() { return detail::finish(mxt_trainer_zero_gradients(get())); }

  // Multiplies the gradients that wait, all of them or that of a tensor.
  outcome<void> scale_gradients(float factor) {
    return detail::finish(mxt_trainer_scale_gradients(get(), nullptr, factor));
  }
  outcome<void> scale_gradients(const std::string &tensor, float factor) {
    return detail::finish(mxt_trainer_scale_gradients(get(), tensor.c_str(), factor));
  }

  // Whether a tensor is trained, so that it has a gradient.
  outcome<bool> is_trained(const std::string &tensor) {
    std::int32_t is_trained = 0;
    const mxt_status status = mxt_trainer_is_trained(get(), tensor.c_str(), &is_trained);
    return detail::finish(status, is_trained != 0);
  }

  // Copies the gradient of a tensor into `values`, row-major, which must have room for exactly its
  // elements: that of the last step, or that which waits for an update.
  outcome<void> read_gradient(const std::string &tensor, view<float> values) {
    return detail::finish(
        mxt_trainer_read_gradient(get(), tensor.c_str(), values.data(), values.size()));
  }

  // Overwrites the gradient of a tensor that waits for an update; without any, all others are 0.
  outcome<void> write_gradient(const std::string &tensor, view<const float> values) {
    return detail::finish(
        mxt_trainer_write_gradient(get(), tensor.c_str(), values.data(), values.size()));
  }

  // The mean loss over at most `max_batches` batches; 0 takes all of the dataset.
  outcome<EvalStats> eval(const Dataset &dataset, std::size_t max_batches = 0) {
    auto stats = detail::sized<EvalStats>();
    const mxt_status status = mxt_trainer_eval(get(), dataset.get(), max_batches, &stats);
    return detail::finish(status, stats);
  }

  // Evaluations from here on say how sharp the loss is in the logits; 0 ends it.
  outcome<void> set_sharpness(float epsilon) {
    return detail::finish(mxt_trainer_set_sharpness(get(), epsilon));
  }

  // Watches the updates of the steps that `every` divides, whose stats then have update_rms_max and
  // update_rms_tensor; 0 ends it.
  outcome<void> watch_updates(std::uint64_t every) {
    return detail::finish(mxt_trainer_watch_updates(get(), every));
  }

  // What the last update that was watched did to a tensor.
  outcome<TensorUpdate> tensor_update(const std::string &tensor) {
    auto update = detail::sized<TensorUpdate>();
    const mxt_status status = mxt_trainer_tensor_update(get(), tensor.c_str(), &update);
    return detail::finish(status, update);
  }

  // Watches how the weights of blocks change, over windows of `every` steps; 0 ends it.
  outcome<void> watch_weights(std::uint64_t every) {
    return detail::finish(mxt_trainer_watch_weights(get(), every));
  }

  // What the last whole window has shown of all weights that are watched.
  outcome<WeightMetrics> weight_metrics() {
    auto metrics = detail::sized<WeightMetrics>();
    const mxt_status status = mxt_trainer_weight_metrics(get(), nullptr, &metrics);
    return detail::finish(status, metrics);
  }

  // The same of one tensor.
  outcome<WeightMetrics> weight_metrics(const std::string &tensor) {
    auto metrics = detail::sized<WeightMetrics>();
    const mxt_status status = mxt_trainer_weight_metrics(get(), tensor.c_str(), &metrics);
    return detail::finish(status, metrics);
  }

  // Many steps with evaluations and checkpoints.
  outcome<RunResult> run(const Dataset &dataset, const RunOptions &options) {
    auto result = detail::sized<mxt_run_result>();
    mxt_run_options c = options.c();
    if (c.on_step == nullptr) c.on_step = detail::stop_if_thrown;
    const mxt_status status = mxt_trainer_run(get(), dataset.get(), &c, &result);
    return detail::finish(status, RunResult(result));
  }

  // The same, with `on_step(const StepStats &)` or `on_step(const StepStats &, const EvalStats *)`
  // called after each step, in place of options.on_step. It may use the library, this trainer too.
  template <class OnStep>
  outcome<RunResult> run(const Dataset &dataset, RunOptions options, OnStep on_step) {
    options.on_step = detail::on_step<OnStep>;
    options.user_data = std::addressof(on_step);
    return run(dataset, options);
  }

  // Stops a run before its next step, and eval before its next batch, with MXT_STOPPED. From any
  // thread or signal handler, while this object lives and is not moved from.
  void request_stop() const noexcept { mxt_trainer_request_stop(get()); }
  void clear_stop() const noexcept { mxt_trainer_clear_stop(get()); }

  outcome<void> set_lr(float lr) { return detail::finish(mxt_trainer_set_lr(get(), lr)); }
  // Takes the schedule of `options` (kind, rates, warmup_steps, total_steps, decay_steps) from the
  // next step on, its steps counted from here.
  outcome<void> set_schedule(const TrainerOptions &options) {
    const mxt_trainer_options c = options.c();
    return detail::finish(mxt_trainer_set_schedule(get(), &c));
  }
  // The step that the schedule counts from.
  std::uint64_t schedule_start() const noexcept { return mxt_trainer_schedule_start(get()); }
  outcome<void> use_schedule() { return detail::finish(mxt_trainer_use_schedule(get())); }
  std::uint64_t steps_done() const noexcept { return mxt_trainer_steps_done(get()); }

  // The model in training itself, not a copy: the next step changes what it reads.
  outcome<Model> model() const {
    mxt_model *model = nullptr;
    const mxt_status status = mxt_trainer_model(get(), &model);
    return detail::finish(status, Model(model));
  }

  // What the trainer was made from.
  outcome<TrainerOptions> options() const {
    auto options = detail::sized<mxt_trainer_options>();
    const mxt_status status = mxt_trainer_get_options(get(), &options);
    return detail::finish(status, TrainerOptions(options));
  }

  // Whether it is not empty: what was moved from is.
  explicit operator bool() const noexcept { return handle_ != nullptr; }

  // The C handle, which stays this object's.
  mxt_trainer *get() const noexcept { return handle_.get(); }

 private:
  explicit Trainer(mxt_trainer *trainer) : handle_(trainer) {}

  static outcome<void> mismatch(const char *what, std::size_t size, std::size_t tokens) {
    return detail::failed(MXT_ERROR_INVALID_ARGUMENT, std::string("forward_backward: ") + what +
                                                          ": expected " + std::to_string(tokens) +
                                                          ", as many as tokens, got " +
                                                          std::to_string(size));
  }

  detail::handle<mxt_trainer> handle_;
};

// The bytes that a model of this shape with its trainer will take.
inline outcome<MemoryPlan> plan(const Engine &engine, const ModelConfig &config,
                                const TrainerOptions &options = {}) {
  auto result = detail::sized<MemoryPlan>();
  const mxt_model_config of_model = config.c();
  const mxt_trainer_options of_trainer = options.c();
  const mxt_status status = mxt_plan(engine.get(), &of_model, &of_trainer, &result);
  return detail::finish(status, result);
}

// The version of the library that is running, such as "0.1.0".
inline std::string version() { return mxt_version(); }

// What the library's build is, as a JSON object.
inline std::string build_info() { return mxt_build_info(); }

// A short English text for a status code.
inline std::string status_string(mxt_status status) { return mxt_status_string(status); }

}  // inline namespace
}  // namespace mxt

#endif  // MXFP4TRAIN_HPP
