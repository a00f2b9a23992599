// Ownership, moves, errors, tensors and views.
#include "check.hpp"

#include <algorithm>
#include <array>
#include <filesystem>
#include <optional>
#include <random>
#if defined(__has_include) && __has_include(<span>)
#include <span>
#endif

static_assert(!std::is_copy_constructible_v<mxt::Engine> &&
              !std::is_copy_assignable_v<mxt::Engine>);
static_assert(!std::is_copy_constructible_v<mxt::Model>);
static_assert(!std::is_copy_constructible_v<mxt::Dataset>);
static_assert(!std::is_copy_constructible_v<mxt::Trainer>);
static_assert(std::is_nothrow_move_constructible_v<mxt::Engine>);
static_assert(std::is_nothrow_move_assignable_v<mxt::Model>);
static_assert(std::is_nothrow_move_constructible_v<mxt::Dataset>);
static_assert(std::is_nothrow_move_constructible_v<mxt::Trainer>);
static_assert(std::is_nothrow_copy_constructible_v<mxt::error>);
static_assert(std::is_base_of_v<std::runtime_error, mxt::error>);
// A view is of the very elements: not of bytes, not of a derived class, not of const ones.
static_assert(!std::is_constructible_v<mxt::view<const std::uint32_t>, std::string &>);
static_assert(!std::is_constructible_v<mxt::view<float>, const std::vector<float> &>);
static_assert(
    !std::is_constructible_v<mxt::view<const std::runtime_error>, std::vector<mxt::error> &>);

template <class Body>
static void fails(mxt_status status, std::string_view text, Body body) {
  try {
    body();
  } catch (const mxt::error &error) {
    CHECK(error.status() == status);
    CHECK(std::string_view(error.what()).find(text) != std::string_view::npos);
    return;
  }
  CHECK(!"an exception was expected");
}

static void errors() {
  mxt::EngineOptions options;
  options.device = "abacus";
  fails(MXT_ERROR_INVALID_ARGUMENT, "abacus", [&] { mxt::Engine engine(options); });
  mxt::Engine engine(one_thread());
  mxt::ModelConfig config = small_config();
  config.heads = 3;
  fails(MXT_ERROR_INVALID_ARGUMENT, "heads", [&] { mxt::Model model(engine, config); });
  config.struct_size = 1;
  fails(MXT_ERROR_STRUCT_SIZE, "struct_size", [&] { mxt::Model model(engine, config); });
  fails(MXT_ERROR_IO, "", [&] { mxt::Model::load(engine, "/nowhere/at/all"); });
  fails(MXT_ERROR_INVALID_ARGUMENT, "", [] { mxt::Dataset::open("/nowhere/*.bin"); });
  const std::vector<std::string> files = {"/nowhere/a.bin", "/nowhere/b.bin"};
  fails(MXT_ERROR_IO, "/nowhere/a.bin", [&] { mxt::Dataset::open_files(files); });
  mxt::DatasetOptions data_options;
  data_options.token_type = static_cast<mxt::TokenType>(9);
  fails(MXT_ERROR_INVALID_ARGUMENT, "token_type", [&] { mxt::Dataset::open("x", data_options); });

  mxt::Model model(engine, small_config());
  fails(MXT_ERROR_NO_SUCH_TENSOR, "no.such", [&] { model.read("no.such"); });
  fails(MXT_ERROR_NO_SUCH_TENSOR, "no.such", [&] { model.write("no.such", {1.0f}); });
  fails(MXT_ERROR_INVALID_ARGUMENT, "", [&] { model.write("transformer.ln_f.weight", {1.0f}); });
  fails(MXT_ERROR_INVALID_ARGUMENT, "", [&] { model.tensor(model.tensor_count()); });
  fails(MXT_ERROR_INVALID_ARGUMENT, "prompt", [&] { model.generate({}); });
  fails(MXT_ERROR_TOKEN_RANGE, "32", [&] { model.generate({32}); });
  mxt::TrainerOptions trainer_options = small_options();
  trainer_options.recipe = "mxfp3";
  fails(MXT_ERROR_INVALID_ARGUMENT, "mxfp3", [&] { mxt::Trainer trainer(model, trainer_options); });
  trainer_options = small_options();
  trainer_options.optimizer = "sgd";
  fails(MXT_ERROR_INVALID_ARGUMENT, "sgd", [&] { mxt::Trainer trainer(model, trainer_options); });
  trainer_options.optimizer = "stable-adamw";
  CHECK(std::string(mxt::Trainer(model, trainer_options).options().optimizer) == "stable-adamw");
  auto deep_config = small_config();
  deep_config.layers = 3;
  mxt::Model deep(engine, deep_config);
  trainer_options.token_drop = "start=16,steps=2";
  CHECK(std::string(mxt::Trainer(deep, trainer_options).options().token_drop) ==
        "start=16,steps=2");

  options = one_thread();
  options.memory_limit = 1000;
  mxt::Engine narrow(options);
  fails(MXT_ERROR_OUT_OF_MEMORY, "", [&] { mxt::Model big(narrow, small_config()); });
}

// What was moved from fails in order; everything lives as long as it is needed.
static void moves_and_lifetimes() {
  std::optional<mxt::Engine> engine(std::in_place, one_thread());
  std::optional<mxt::Model> model(std::in_place, *engine, small_config());
  std::optional<mxt::Dataset> dataset(mxt::Dataset::from_tokens(some_tokens()));
  mxt::Trainer first(*model, small_options());
  engine.reset();
  model.reset();
  CHECK(dataset->coverage(8).files == 1);
  CHECK(first.step(*dataset).step == 1);
  mxt::Trainer second = std::move(first);
  CHECK(second.step(*dataset).step == 2);
  mxt::TrainerOptions switched = small_options();
  switched.recipe = "mxfp4-rht,range=3/4";
  mxt::Model trained = second.model();
  mxt::Trainer nearest(trained, switched);
  CHECK(nearest.step(*dataset).step == 1);
  CHECK(nearest.options().recipe == std::string(switched.recipe));
  switched.recipe = "bf16,haste=1";
  const mxt::EvalStats merged = mxt::Trainer(trained, switched).eval(*dataset, 1);
  CHECK(merged.spared_products > 0.8 && merged.spared_all < merged.spared_products);
  mxt::TrainerOptions schedule;
  schedule.lr = 2e-3f;
  second.set_schedule(schedule);
  CHECK(second.schedule_start() == 2 && second.options().lr == 2e-3f);
  CHECK(first.get() == nullptr && first.steps_done() == 0);
  first.request_stop();
  first.clear_stop();
  fails(MXT_ERROR_NULL, "trainer", [&] { first.step(*dataset); });
  fails(MXT_ERROR_NULL, "trainer", [&] { first.run(*dataset, 3); });
  fails(MXT_ERROR_NULL, "", [&] { first.model(); });
  first = std::move(second);
  CHECK(first.steps_done() == 2);
  const mxt::Dataset moved = std::move(*dataset);
  fails(MXT_ERROR_NULL, "dataset", [&] { first.step(*dataset); });
  CHECK(dataset->token_count() == 0 && moved.token_count() == 4000);
  std::vector<std::uint32_t> read(4000);
  moved.read(0, read);
  CHECK(read == some_tokens());
  fails(MXT_ERROR_INVALID_ARGUMENT, "the dataset has 4000", [&] { moved.read(1, read); });
}

static void tensors() {
  mxt::Engine engine(one_thread());
  mxt::Model model(engine, small_config());
  CHECK(engine.device() == "cpu" && engine.threads() == 1 && engine.seed() == 1337);
  mxt::Group group;
  mxt::EngineOptions one_of_one;
  one_of_one.threads = 1;
  one_of_one.group = &group;
  const mxt::Engine alone(one_of_one);
  CHECK(alone.rank() == 0 && alone.ranks() == 1);
  CHECK(model.config().channels == 16 && model.config().layer_norm_epsilon > 0);
  mxt::ModelConfig other = small_config();
  other.mlp_channels = 37, other.activation = mxt::Activation::gelu, other.tied_head = false;
  mxt::Model unlike(engine, other);
  CHECK(unlike.config().mlp_channels == 37 && unlike.config().activation == mxt::Activation::gelu);
  CHECK(unlike.read("lm_head.weight").size() == unlike.read("transformer.wte.weight").size());
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < model.tensor_count(); i++) {
    const mxt::TensorInfo info = model.tensor(i);
    std::size_t product = 1;
    for (const std::size_t dimension : info.shape) product *= dimension;
    CHECK(product == info.element_count && model.read(info.name).size() == product);
    sum += product;
  }
  CHECK(sum == model.parameter_count());

  const std::vector<float> logits = model.next_logits({1, 2, 3});
  mxt::GenerateOptions greedy;
  greedy.temperature = 0;
  greedy.max_tokens = 1;
  const auto likeliest = std::max_element(logits.begin(), logits.end()) - logits.begin();
  CHECK(logits.size() == 32 && model.generate({1, 2, 3}, greedy)[0] == likeliest);
  fails(MXT_ERROR_TOKEN_RANGE, "32", [&] { model.next_logits({32}); });

  std::vector<float> hidden;
  const std::vector<float> scores = model.score({1, 2, 3, 1, 2}, {3, 2}, &hidden);
  CHECK(scores.size() == 5 && scores[0] == 0 && scores[1] < 0 && scores[1] == scores[4]);
  CHECK(hidden.size() % 5 == 0 && model.score({1, 2, 3, 1, 2}, {3, 2}) == scores);
  fails(MXT_ERROR_INVALID_ARGUMENT, "add up", [&] { model.score({1, 2}, {3}); });

  mxt::DecoderOptions two;
  two.sequences = 2;
  mxt::Decoder decoder(model, two);
  decoder.push({1, 2});
  decoder.fork(0, 1);
  decoder.push({3}, 1);
  CHECK(decoder.logits(1) == logits && decoder.logits() == model.next_logits({1, 2}));
  CHECK(decoder.tokens(1) == (std::vector<std::uint32_t>{1, 2, 3}));
  decoder.rewind(1, 1);
  CHECK(decoder.tokens(1) == std::vector<std::uint32_t>{1});
  std::vector<float> all = model.next_logits({1});
  const std::vector<float> second = model.next_logits({1, 2});
  all.insert(all.end(), second.begin(), second.end());
  CHECK(decoder.logits_from(1).size() == 32 && decoder.logits_from(0) == all);
  fails(MXT_ERROR_INVALID_ARGUMENT, "from", [&] { decoder.logits_from(2); });
  greedy.max_tokens = 5;
  greedy.draft = mxt::Draft::ngram;
  std::size_t seen = 0;
  const auto written = decoder.generate(
      greedy, 0, [&](std::uint32_t) { return ++seen == 3 ? mxt::Flow::stop : mxt::Flow::go_on; });
  CHECK(written.size() == 3 && seen == 3 && decoder.tokens().size() == 5);
  CHECK(decoder.generate(greedy).size() == 5);
  decoder.rewind(2);
  CHECK(decoder.generate(greedy) == model.generate({1, 2}, greedy));
  decoder.rewind(2), decoder.rewind(1, 1);
  greedy.draft = mxt::Draft::none;
  const std::vector<std::size_t> both = {1, 0};
  std::vector<float> of_both = model.next_logits({1});
  of_both.insert(of_both.end(), second.begin(), second.end());
  CHECK(decoder.logits_of(both) == of_both);
  const auto texts = decoder.generate_each(both, greedy);
  CHECK(texts.size() == 2 && texts[0] == model.generate({1}, greedy));
  CHECK(texts[1] == model.generate({1, 2}, greedy) && decoder.tokens().size() == 7);
  CHECK(decoder.generate_each(std::vector<std::size_t>()).empty());
  const std::vector<std::size_t> twice = {0, 0};
  fails(MXT_ERROR_INVALID_ARGUMENT, "twice", [&] { decoder.generate_each(twice); });
  greedy.draft = mxt::Draft::mxfp4;
  fails(MXT_ERROR_INVALID_ARGUMENT, "with drafts", [&] { decoder.generate(greedy); });
  fails(MXT_ERROR_INVALID_ARGUMENT, "sequence", [&] { decoder.logits(2); });
  fails(MXT_ERROR_TOKEN_RANGE, "32", [&] { decoder.push({32}); });

  fails(MXT_ERROR_INVALID_ARGUMENT, "weights",
        [&] { model.save_as("no-folder", static_cast<mxt::StoredWeights>(9)); });

  std::vector<float> values = model.read("transformer.ln_f.weight");
  CHECK(values.size() == 16 && values[3] == 1.0f);
  values[3] = 2.0f;
  model.write("transformer.ln_f.weight", values);
  std::array<float, 16> array{};
  model.read("transformer.ln_f.weight", array);
  CHECK(array[3] == 2.0f && array[4] == 1.0f);
  float plain[16] = {};
  model.read("transformer.ln_f.weight", plain);
  model.read("transformer.ln_f.weight", {plain, 16});
  CHECK(plain[3] == 2.0f);
#ifdef __cpp_lib_span
  const std::span<const float> span(array);
  model.write("transformer.ln_f.weight", span);
  const std::span<const float> back = mxt::view<const float>(values);
  CHECK(back.size() == 16 && back[3] == 2.0f);
#endif
  mxt::view<const float> view = values;
  float total = 0;
  for (const float value : view) total += value;
  CHECK(total == 17.0f && view[3] == 2.0f && !view.empty());

  const mxt::MemoryPlan plan = mxt::plan(engine, small_config(), small_options());
  CHECK(plan.total > plan.weights && plan.weights > 0);
  CHECK(mxt::version() == mxt_version() && mxt::build_info().front() == '{');
  CHECK(mxt::status_string(MXT_ERROR_BUSY) == "busy");
}

static void watches() {
  mxt::Engine engine(one_thread());
  mxt::Model model(engine, small_config());
  const mxt::Dataset dataset = mxt::Dataset::from_tokens(some_tokens());
  mxt::Trainer trainer(model, small_options());
  fails(MXT_ERROR_INVALID_ARGUMENT, "call mxt_trainer_watch_updates",
        [&] { trainer.tensor_update("transformer.wte.weight"); });
  trainer.watch_updates(2);
  const mxt::StepStats first = trainer.step(dataset), second = trainer.step(dataset);
  CHECK(first.update_rms_tensor == UINT32_MAX && second.update_rms_max > 0);
  const mxt::TensorInfo largest = model.tensor(second.update_rms_tensor);
  const mxt::TensorUpdate update = trainer.tensor_update(largest.name);
  CHECK(update.step == 2 && update.rms == second.update_rms_max && update.grad_norm > 0);
  fails(MXT_ERROR_NO_SUCH_TENSOR, "no.such", [&] { trainer.tensor_update("no.such"); });
  trainer.watch_updates(0);
  fails(MXT_ERROR_INVALID_ARGUMENT, "", [&] { trainer.tensor_update(largest.name); });

  fails(MXT_ERROR_INVALID_ARGUMENT, "recipe", [&] { trainer.watch_weights(2); });
  mxt::TrainerOptions options = small_options();
  options.recipe = "tetrajet";
  mxt::Trainer rounding(model, options);
  rounding.watch_weights(2);
  fails(MXT_ERROR_INVALID_ARGUMENT, "call mxt_trainer_watch_weights",
        [&] { rounding.weight_metrics(); });
  rounding.run(dataset, 3);
  const std::string qkv = "transformer.h.0.attn.c_attn.weight";
  const mxt::WeightMetrics all = rounding.weight_metrics(), one = rounding.weight_metrics(qkv);
  CHECK(all.step == 2 && all.steps == 2 && all.tensors == 4 && all.change > 0);
  CHECK(one.step == 2 && one.tensors == 1 && one.flipped > 0 && one.amax <= all.amax);
  fails(MXT_ERROR_INVALID_ARGUMENT, qkv,
        [&] { rounding.weight_metrics("transformer.wte.weight"); });
}

// Options are their own: what they were made from may go.
static void options_own_their_texts() {
  mxt::Engine engine(one_thread());
  mxt::Model model(engine, small_config());
  mxt::TrainerOptions options = small_options();
  {
    const std::string recipe = "mxfp4-rht-sr,g=128", frozen = "transformer.wpe.weight";
    options.recipe = recipe, options.frozen = frozen;
  }
  options.schedule = mxt::Schedule::trapezoid;
  options.total_steps = 9;
  options.document_end = 7;
  std::optional<mxt::Trainer> trainer(std::in_place, model, options);
  const mxt::TrainerOptions found = trainer->options();
  trainer.reset();
  const mxt::TrainerOptions copy = found;
  CHECK(copy.recipe == "mxfp4-rht-sr,g=128" && copy.frozen == "transformer.wpe.weight");
  CHECK(copy.schedule == mxt::Schedule::trapezoid && copy.document_end == 7u);
  CHECK(copy.c().recipe != found.c().recipe && copy.c().has_document_end == 1);
  CHECK(mxt::TrainerOptions().c().frozen == nullptr && !mxt::TrainerOptions().document_end);
  CHECK(small_config().activation == mxt::Activation::gelu_tanh && small_config().tied_head);
  const auto layers = mxt::LoraLayers::attn_c_attn | mxt::LoraLayers::mlp_c_proj;
  CHECK(model.with_lora(2, 0, layers).config().lora_layers == layers);

  std::vector<mxt::TensorInfo> tensors = model.tensors();
  CHECK(tensors.size() == model.tensor_count() && tensors[0].name == "transformer.wte.weight");
  CHECK(tensors[0].shape == (std::vector<std::size_t>{32, 16}));
}

static void empty_handles() {
  mxt::Engine engine = nullptr;
  mxt::Model model = nullptr;
  mxt::Dataset dataset = nullptr;
  mxt::Decoder decoder = nullptr;
  mxt::Trainer trainer = nullptr;
  mxt::Snapshot snapshot = nullptr;
  mxt::Files files = nullptr;
  CHECK(!engine && !model && !dataset && !decoder && !trainer && !snapshot && !files);
  fails(MXT_ERROR_NULL, "model", [&] { model.tensors(); });
  fails(MXT_ERROR_NULL, "trainer", [&] { trainer.update(); });
  engine = mxt::Engine(one_thread());
  model = mxt::Model(engine, small_config());
  trainer = mxt::Trainer(model, small_options());
  dataset = mxt::Dataset::from_tokens(some_tokens());
  CHECK(engine && model && dataset && trainer && trainer.step(dataset).step == 1);
  const mxt::Trainer other = std::move(trainer);
  CHECK(!trainer && other);
}

static void adapters() {
  mxt::Engine engine(one_thread());
  mxt::Model base(engine, small_config());
  mxt::Model adapted = base.with_lora(2, 0, mxt::LoraLayers::mlp_c_fc);
  CHECK(adapted.config().lora_rank == 2 && adapted.config().lora_alpha == 4);
  mxt::Trainer trainer(adapted, small_options());
  const auto dataset = mxt::Dataset::from_tokens(some_tokens());
  for (int i = 0; i < 3; i++) trainer.step(dataset);
  const std::string fc = "transformer.h.0.mlp.c_fc.";
  CHECK(adapted.read(fc + "weight") == base.read(fc + "weight"));
  const std::string dir = (std::filesystem::temp_directory_path() /
                           ("mxt-lora-" + std::to_string(std::random_device{}())))
                              .string();
  adapted.save_lora(dir);
  const mxt::Model again = base.load_lora(dir);
  std::filesystem::remove_all(dir);
  CHECK(again.read(fc + "lora_B.weight") == adapted.read(fc + "lora_B.weight"));
  mxt::Files files;
  adapted.save_lora(files);
  CHECK(base.load_lora(files).read(fc + "lora_B.weight") == adapted.read(fc + "lora_B.weight"));
  CHECK(again.merge_lora().read(fc + "weight") != base.read(fc + "weight"));
  fails(MXT_ERROR_INVALID_ARGUMENT, "adapters", [&] { base.merge_lora(); });
  fails(MXT_ERROR_INVALID_ARGUMENT, "lora", [&] { base.with_lora(0); });

  mxt::TrainerOptions options = small_options();
  options.frozen = "transformer.h.*";
  mxt::Trainer partly(base, options);
  const std::vector<float> before = base.read(fc + "weight");
  partly.step(dataset);
  CHECK(base.read(fc + "weight") == before);
  CHECK(partly.options().frozen == "transformer.h.*");
  CHECK(!partly.is_trained(fc + "weight") && partly.is_trained("transformer.wte.weight"));
}

static mxt::ModelConfig llama_config() {
  mxt::ModelConfig config = small_config();
  config.architecture = mxt::Architecture::llama;
  config.layers = 2;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_size = 6;
  config.mlp_channels = 20;
  config.qk_norm = true;
  config.tied_head = false;
  config.rope_theta = 5e5;
  config.rope_scaling = mxt::RopeScaling::llama3;
  config.rope_factor = 8;
  config.rope_low_frequency = 0.5f;
  config.rope_high_frequency = 3;
  config.rope_original_context = 9;
  return config;
}

static bool is_llama(const mxt::ModelConfig &found) {
  const mxt::ModelConfig given = llama_config();
  return found.architecture == given.architecture && found.heads == given.heads &&
         found.kv_heads == given.kv_heads && found.head_size == given.head_size &&
         found.mlp_channels == given.mlp_channels && found.tied_head == given.tied_head &&
         found.qkv_bias == given.qkv_bias && found.qk_norm == given.qk_norm &&
         found.rope_theta == given.rope_theta && found.rope_scaling == given.rope_scaling &&
         found.rope_factor == given.rope_factor &&
         found.rope_low_frequency == given.rope_low_frequency &&
         found.rope_high_frequency == given.rope_high_frequency &&
         found.rope_original_context == given.rope_original_context;
}

static void llamas() {
  mxt::Engine engine(one_thread());
  mxt::Model model(engine, llama_config());
  CHECK(is_llama(model.config()));
  const auto dataset = mxt::Dataset::from_tokens(some_tokens());
  mxt::Trainer trainer(model, small_options());
  const float first = trainer.step(dataset).loss, second = trainer.step(dataset).loss;
  CHECK(trainer.steps_done() == 2 && first != second);
  const auto text = model.generate({1, 2, 3});
  CHECK(text.size() == mxt::GenerateOptions().max_tokens);

  // Parts have the rows of the tensor that they are of, one after the other.
  const std::string attention = "model.layers.1.self_attn.", mlp = "model.layers.1.mlp.";
  std::vector<float> rows = model.read(attention + "q_proj.weight");
  CHECK(rows.size() == 24 * 16);
  for (const char *name : {"k_proj.weight", "v_proj.weight"}) {
    const std::vector<float> part = model.read(attention + name);
    CHECK(part.size() == 12 * 16);
    rows.insert(rows.end(), part.begin(), part.end());
  }
  CHECK(model.read(attention + "qkv_proj.weight") == rows);
  CHECK(model.read(mlp + "gate_proj.weight").size() == 20 * 16);
  CHECK(model.read(mlp + "up_proj.weight") != model.read(mlp + "gate_proj.weight"));
  const std::vector<float> ones(12 * 16, 1.0f);
  model.write(attention + "k_proj.weight", ones);
  CHECK(model.read(attention + "k_proj.weight") == ones);
  CHECK(model.read(attention + "qkv_proj.weight").front() == rows.front());
  std::vector<float> gradient(12 * 16);
  trainer.read_gradient(attention + "k_proj.weight", gradient);
  trainer.write_gradient(attention + "k_proj.weight", ones);
  fails(MXT_ERROR_INVALID_ARGUMENT, "a part of a tensor",
        [&] { model.write(attention + "k_proj.weight", rows); });
  for (const std::string name : {"self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"}) {
    fails(MXT_ERROR_NO_SUCH_TENSOR, name, [&] { model.read(name); });
  }

  mxt::Files files;
  model.save(files);
  const mxt::Model loaded = mxt::Model::load(engine, files);
  CHECK(is_llama(loaded.config()) && loaded.next_logits({5}) == model.next_logits({5}));
  CHECK(mxt::Model(engine, loaded.config()).parameter_count() == model.parameter_count());

  const auto refused = [&](std::string_view field, void (*change)(mxt::ModelConfig &)) {
    mxt::ModelConfig config = llama_config();
    change(config);
    fails(MXT_ERROR_INVALID_ARGUMENT, field, [&] { mxt::Model none(engine, config); });
  };
  refused("kv_heads", [](auto &config) { config.kv_heads = 3; });
  refused("head_size", [](auto &config) { config.head_size = 5; });
  refused("qkv_bias", [](auto &config) { config.qkv_bias = true; });
  refused("rope_theta", [](auto &config) { config.rope_theta = 0; });
  refused("rope_factor", [](auto &config) { config.rope_factor = 0.5f; });
  refused("rope_scaling",
          [](auto &config) { config.rope_scaling = static_cast<mxt::RopeScaling>(9); });
  refused("architecture",
          [](auto &config) { config.architecture = static_cast<mxt::Architecture>(7); });
  CHECK(!mxt::ModelConfig().qk_norm && mxt::ModelConfig().kv_heads == 0);
  CHECK(mxt::ModelConfig().rope_scaling == mxt::RopeScaling::none);
}

int main() {
  errors();
  llamas();
  moves_and_lifetimes();
  tensors();
  watches();
  adapters();
  options_own_their_texts();
  empty_handles();
  return 0;
}
