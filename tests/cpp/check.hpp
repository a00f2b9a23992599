// What the C++ test programs share: a check that says where and why, and a model that trains in no
// time. Programs are silent and return 0.
#ifndef CHECK_HPP
#define CHECK_HPP

#include "mxfp4train.hpp"

#include <cstdio>
#include <cstdlib>

#define CHECK(condition) \
  do { \
    if (!(condition)) { \
      std::fprintf(stderr, "%s:%d: failed: %s\n  last error: %s\n", __FILE__, __LINE__, \
                   #condition, mxt_last_error()); \
      std::exit(1); \
    } \
  } while (0)

static inline mxt::ModelConfig small_config() {
  mxt::ModelConfig config;
  config.vocab_size = 32;
  config.context_length = 16;
  config.layers = 1;
  config.heads = 2;
  config.channels = 16;
  return config;
}

static inline mxt::TrainerOptions small_options() {
  mxt::TrainerOptions options;
  options.batch_size = 2;
  options.lr = 1e-2f;
  return options;
}

static inline mxt::EngineOptions one_thread() {
  mxt::EngineOptions options;
  options.threads = 1;
  return options;
}

static inline std::vector<std::uint32_t> some_tokens() {
  std::vector<std::uint32_t> tokens(4000);
  for (std::uint32_t i = 0; i < tokens.size(); i++) tokens[i] = (i * i + i / 7) % 29;
  return tokens;
}

#endif
